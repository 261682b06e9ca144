"""Images in the coordinates of their components' spans, beside a column for the bias: what a fit reads, many times."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
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
        rows = like.new_ones(count, width + 1)
        return cls(rows, like.new_empty(count, like.shape[1]), like.new_empty(count))

    def __len__(self) -> int:
        return self.filled

    def fill(self, coordinates: Float[Tensor, "batch coordinate"], targets: Float[Tensor, "batch d_clip"]) -> int:
        """Put in as many of the images as there is room for, and say how many."""
        count = min(len(targets), len(self.units) - self.filled)
        place = slice(self.filled, self.filled + count)
        norms = targets[:count].norm(dim=-1)
        self.rows[place, :-1] = coordinates[:count]
        self.units[place] = targets[:count] / norms[:, None]
        self.norms[place] = norms
        self.filled += count
        return count

    def scaled(self, unit: float) -> "Table":
        """The same, the column for the bias being ``unit``."""
        self.rows[:, -1] = unit
        return self


class Coordinates:
    """The images that are fitted, window by window, and those that are held out.

    Where all images that are fitted need at most ``max_bytes``, they are one window, which is kept. Otherwise the
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
        self.spans, self._source, self._mask, self._max_bytes = spans, source, held_out, max_bytes
        self.fitted = int((~held_out).sum())
        tables: list[tuple[Bool[Tensor, "image"], Table]] = []
        for first, values, targets, _ in checked(source):
            if not tables:
                tables = self._tables(targets, some_of(~held_out, _SAMPLE, seed))
            rows = spans.project(values)
            for mask, table in tables:
                here = mask[first : first + len(targets)].to(values.device)
                table.fill(rows[here], targets[here])
        self.unit = self._typical(tables[1][1])  # a source without images has been refused
        self.held, self.sample, *kept = (table.scaled(self.unit) for _, table in tables)
        # Where the sample is all of the images, it is what is kept.
        self._kept = (kept or [self.sample])[0] if self.kept else None
        self.mean_norm = float(self.sample.norms.mean())

    def _tables(self, targets: Tensor, sample: Tensor) -> list[tuple[Tensor, Table]]:
        """Room for the images held out, for a sample, and for all others where these are more and can be kept."""
        held = self._room(int(self._mask.sum()), targets)
        self._window = min(self.fitted, max(1, self._max_bytes // (held.rows[0].nbytes + held.units[0].nbytes)))
        tables = [(self._mask, held), (sample, self._room(int(sample.sum()), targets))]
        if self.kept and int(sample.sum()) < self.fitted:
            tables.append((~self._mask, self._room(self.fitted, targets)))
        return tables

    @property
    def kept(self) -> bool:
        """Whether the images are kept, and the source is read no more."""
        return self._window >= self.fitted

    @property
    def targets_differ_in_length(self) -> bool:
        """Whether the lengths of targets say anything, and not that they were divided by them."""
        norms = self.sample.norms
        return bool(((norms - norms.mean()).abs() > 1e-4 * norms.mean()).any())

    def _room(self, count: int, targets: Tensor) -> Table:
        return Table.empty(count, self.spans.layout.width, targets)

    def _typical(self, table: Table) -> float:
        rows = table.rows[:, :-1]
        return math.sqrt(float(rows.square().sum(1).mean()) / sum(rank > 0 for rank in self.spans.layout.ranks)) or 1.0

    def windows(self) -> Iterator[Table]:
        """All images that are fitted, in the source's order."""
        if self._kept is not None:
            yield self._kept
            return
        left, table = self.fitted, None
        for first, values, targets, _ in checked(self._source):
            chosen = ~self._mask[first : first + len(targets)].to(values.device)
            rows, targets = self.spans.project(values)[chosen], targets[chosen]
            while len(targets):
                if table is None:
                    table = self._room(min(self._window, left), targets).scaled(self.unit)
                taken = table.fill(rows, targets)
                rows, targets, left = rows[taken:], targets[taken:], left - taken
                if len(table) == len(table.units):
                    yield table
                    table = None

    def pieces(self) -> Iterator[Table]:
        """The same in pieces that are small beside a window."""
        for window in self.windows():
            for start in range(0, len(window), _SAMPLE):
                place = slice(start, start + _SAMPLE)
                units = window.units[place]
                yield Table(window.rows[place], units, window.norms[place], len(units))

    @cached_property
    def digest(self) -> list[float]:
        """A few numbers that tell whether these are the same images, in the same order."""
        tables = (self.held, self.sample)
        return [_weighed(tensor) for table in tables for tensor in (table.rows, table.units[:, :1])]


def _weighed(rows: Float[Tensor, "batch column"]) -> float:
    """The mean square, each row with a weight that its position draws. It is off by rounding where rows are."""
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float(weights @ rows.square().mean(1, dtype=torch.float64).cpu())
