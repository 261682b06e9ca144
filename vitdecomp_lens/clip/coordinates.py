"""Images in the coordinates of their components' spans, beside a column for the bias: what a fit reads, many times."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitdecomp_lens.clip.moments import Spans
from vitdecomp_lens.clip.sources import AlignmentSource, checked, some_of

_SAMPLE = 4096


@dataclass
class Table:
    """Images as rows.

    Attributes:
        rows: Coordinates, and one more column, the same number for all images: the bias is its map.
        units: The directions of the targets.
        norms: The lengths of the targets.
        filled: How many rows are in use.
    """

    rows: Float[Tensor, "batch column"]
    units: Float[Tensor, "batch d_clip"]
    norms: Float[Tensor, "batch"]
    filled: int = 0

    @classmethod
    def empty(cls, count: int, width: int, like: Float[Tensor, "batch d_clip"]) -> "Table":
        """Room for so many images; the last column is one."""
        rows = like.new_empty(count, width + 1)
        rows[:, -1] = 1
        return cls(rows, like.new_empty(count, like.shape[1]), like.new_empty(count))

    def __len__(self) -> int:
        return self.filled

    @property
    def left(self) -> int:
        """For how many more images there is room."""
        return len(self.rows) - self.filled

    def next(self, count: int) -> "Table":
        """The next rows, from now on in use."""
        place = slice(self.filled, self.filled + count)
        self.filled += count
        return Table(self.rows[place], self.units[place], self.norms[place], count)

    def write(self, spans: Spans, values: Float[Tensor, "component batch d_rep"], targets: Tensor) -> "Table":
        """Fill all rows, in place."""
        spans.project(values, into=self.rows[:, :-1])
        torch.linalg.vector_norm(targets, dim=-1, out=self.norms)
        torch.div(targets, self.norms[:, None], out=self.units)
        return self

    def take(self, other: "Table", numbers: Int[Tensor, "image"]) -> None:
        """Fill the next rows with some of another table's."""
        here = self.next(len(numbers))
        for mine, theirs in ((here.rows, other.rows), (here.units, other.units), (here.norms, other.norms)):
            torch.index_select(theirs, 0, numbers.to(theirs.device), out=mine)

    def some(self, numbers: Int[Tensor, "image"]) -> "Table":
        """Some of the rows."""
        return Table(self.rows[numbers], self.units[numbers], self.norms[numbers], len(numbers))

    def scaled(self, unit: float) -> "Table":
        """The same, the column for the bias being ``unit``."""
        self.rows[:, -1] = unit
        return self


class Coordinates:
    """The images that are fitted, window by window, and those that are held out.

    Where all images need at most ``max_bytes``, they are kept, and those that are fitted are one window. Otherwise the
    source is read again whenever they are asked for, and a window is as large as that allows. Windows do not depend on
    the source's chunks.

    Attributes:
        spans: In whose coordinates.
        held: The images held out.
        sample: Some that are not, drawn by the seed, for what needs only a few.
        unit: The number in the column for the bias: the size of a typical component, so that a map of that column is
            as large as other maps.
    """

    def __init__(
        self, source: AlignmentSource, spans: Spans, held_out: Bool[Tensor, "image"], *, max_bytes: int, seed: int
    ) -> None:
        self.spans, self._source, self._mask = spans, source, held_out
        self.fitted = int((~held_out).sum())
        drawn = some_of(~held_out, _SAMPLE, seed)
        tables: list[tuple[Bool[Tensor, "image"], Table]] = []
        for first, values, targets, _ in checked(source):
            if not tables:
                tables = [(mask, self._room(int(mask.sum()), targets)) for mask in (held_out, drawn)]
                most = max(1, max_bytes // (tables[0][1].rows[0].nbytes + tables[0][1].units[0].nbytes))
                self._kept = self._room(len(held_out), targets) if len(held_out) <= most else None
                self._window = min(most, self.fitted)
            chunk = self._chunk(values, targets, self._kept)
            for mask, table in tables:
                table.take(chunk, _numbers(mask, first, len(targets)))
        self.unit = self._typical(tables[1][1])  # a source without images has been refused
        self.held, self.sample = (table.scaled(self.unit) for _, table in tables)
        if self._kept is not None:
            self._kept.scaled(self.unit)
        self.mean_norm = float(self.sample.norms.mean())

    @property
    def kept(self) -> bool:
        """Whether the images are kept, and the source is read no more."""
        return self._kept is not None

    @property
    def targets_differ_in_length(self) -> bool:
        """Whether the lengths of targets say anything, and not that they were divided by them."""
        norms = self.sample.norms
        return bool(((norms - norms.mean()).abs() > 1e-4 * norms.mean()).any())

    def _room(self, count: int, targets: Tensor) -> Table:
        return Table.empty(count, self.spans.layout.width, targets)

    def _chunk(self, values: Tensor, targets: Tensor, table: Table | None = None) -> Table:
        """A chunk in coordinates; written into a table, if there is one."""
        room = self._room(len(targets), targets) if table is None else table
        return room.next(len(targets)).write(self.spans, values, targets)

    def _typical(self, table: Table) -> float:
        length = float(torch.linalg.vector_norm(table.rows[:, :-1]))
        return length / math.sqrt(len(table) * sum(rank > 0 for rank in self.spans.layout.ranks)) or 1.0

    def windows(self) -> Iterator[tuple[Table, Int[Tensor, "image"]]]:
        """All images that are fitted, in the source's order: tables, and the numbers of the rows that these are."""
        if self._kept is not None:
            yield self._kept, _numbers(~self._mask, 0, len(self._kept)).to(self._kept.rows.device)
            return
        left, table = self.fitted, None
        for first, values, targets, _ in checked(self._source):
            chunk, numbers = self._chunk(values, targets), _numbers(~self._mask, first, len(targets))
            while len(numbers):
                if table is None:
                    table = self._room(min(self._window, left), targets).scaled(self.unit)
                taken, numbers = numbers[: table.left], numbers[table.left :]
                table.take(chunk.scaled(self.unit), taken)
                left -= len(taken)
                if not table.left:
                    yield table, torch.arange(len(table), device=table.rows.device)
                    table = None

    def pieces(self) -> Iterator[Table]:
        """The same in pieces that are small beside a window."""
        for window, numbers in self.windows():
            for some in numbers.split(_SAMPLE):
                yield window.some(some)

    @cached_property
    def digest(self) -> list[float]:
        """A few numbers that tell whether these are the same images, in the same order."""
        tables = (self.held, self.sample)
        return [_weighed(tensor) for table in tables for tensor in (table.rows, table.units[:, :1])]


def _numbers(mask: Bool[Tensor, "image"], first: int, count: int) -> Int[Tensor, "_"]:
    """Which of a chunk's images are in a mask of all."""
    return torch.nonzero(mask[first : first + count])[:, 0]


def _weighed(rows: Float[Tensor, "batch column"]) -> float:
    """The mean square, each row with a weight that its position draws. It is off by rounding where rows are."""
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float(weights @ rows.square().mean(1, dtype=torch.float64).cpu())
