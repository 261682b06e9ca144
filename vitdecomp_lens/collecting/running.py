"""One process's way through its chunks: read, run, write."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count as numbers_from

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.collecting.files import LABEL, StoreFiles
from vitdecomp_lens.collecting.gathered import Part
from vitdecomp_lens.collecting.models import Eye
from vitdecomp_lens.collecting.processes import Processes
from vitdecomp_lens.collecting.reading import Batch, Reader, refuse_nonfinite
from vitdecomp_lens.components import Component
from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import GapError, InputError

Progress = Callable[[int, int | None, int], None]
SHARE_OF_SAVING = 0.05  # of the time, for writing statistics that a kill would lose


@dataclass
class Run:
    """What a process needs on its way through its chunks.

    Attributes:
        model: What is decomposed.
        eye: What embeds images.
        cut: The decomposition of one picture, for components and widths.
        files: Where chunks go.
        reader: Where images come from.
        part: Statistics to gather.
        processes: Which process this is.
        progress: Whom to tell.
        found: How many images were there before.
        done: How many were done since.
    """

    model: nn.Module
    eye: Eye | None
    cut: Decomposition
    files: StoreFiles
    reader: Reader
    part: Part | None
    processes: Processes
    progress: Progress | None
    found: int = 0
    done: int = 0

    def all_chunks(self) -> None:
        """Make every chunk of this process that is not there, and the statistics."""
        begun, saving = time.monotonic(), 0.0
        for batch in self.reader.batches(self._missing()):
            if batch.ids or batch.skipped:
                self._chunk(batch)
            self._report(len(batch.ids) + len(batch.skipped))
            # What statistics are worth saving how often depends on how large they are: a share of the time.
            if self.part is not None and saving <= SHARE_OF_SAVING * (time.monotonic() - begun):
                start = time.monotonic()
                self._save(self.part)
                saving += time.monotonic() - start
        if self.part is not None:
            self._save(self.part)

    def _save(self, part: Part) -> None:
        with self.files.resumable():
            part.save()

    def _missing(self) -> Iterator[int]:
        """The chunks of this process that are not there yet; without end where the data set's is not known."""
        size, count = self.reader.size, self.reader.source.count
        first, step = self.processes.rank, self.processes.count
        mine = numbers_from(first, step) if count is None else range(first, -(-count // size), step)
        for number in mine:
            if self.files.has(number) and (self.part is None or number in self.part.covered):
                self.found += size if count is None else min(size, count - number * size)
                continue
            yield number

    def _report(self, images: int) -> None:
        self.done += images
        if self.progress is not None:
            self.progress(self.found + self.done, self._mine, self.found)

    @cached_property
    def _mine(self) -> int | None:
        """How many images are this process's."""
        size, total = self.reader.size, self.reader.source.count
        if total is None:
            return None
        first, step = self.processes.rank, self.processes.count
        return sum(min(size, total - start) for start in range(first * size, total, step * size))

    def _chunk(self, batch: Batch) -> None:
        tensors = {LABEL + name: numbers for name, numbers in batch.labels.items()}
        if batch.ids:
            values, total, embeddings = self._computed(batch)
            kept = {"contributions": values, "representations": total, "embeddings": embeddings}
            asked = self.files.manifest["asked"]
            stored = {name: tensor for name in asked["keep"] if (tensor := kept[name]) is not None}
            if "contributions" in stored:
                stored["contributions"] = self._rounded(values, batch, getattr(torch, asked["dtype"]))
            tensors = stored | tensors
            if self.part is not None:
                beside = None if embeddings is None else embeddings.to(values.device)
                self.part.add(batch.number, values, beside, first=batch.number * self.reader.size)
        elif self.part is not None:
            empty = self.cut.values[:, :0]
            self.part.add(batch.number, empty, None, first=batch.number * self.reader.size)
        with self.files.resumable():
            self.files.write(batch.number, tensors if batch.ids else {}, batch.ids, batch.skipped)

    def _computed(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Contributions, representations and embeddings of one batch."""
        labels = None if self.cut.complete else [component.label for component in self.cut.components]
        asked = self.files.manifest["asked"]
        try:
            parts = decompose(self.model, batch.images[0], by=asked["by"], of=asked["of"], components=labels)
        except GapError as error:
            raise GapError(f"{error} The batch's images are {batch.ids[0]!r} to {batch.ids[-1]!r}.") from error
        assert parts.total is not None
        embeddings = None
        if self.eye is not None:
            embeddings = parts.total if self.eye.is_model else self.eye(batch.images[1])
            refuse_nonfinite(embeddings, batch.ids, "embeddings")
        refuse_nonfinite(parts.total, batch.ids, "representations")
        values = in_order(parts, self.cut.components).detach()
        refuse_nonfinite(values.transpose(0, 1), batch.ids, "contributions")
        return values, parts.total.detach(), embeddings

    def _rounded(self, values: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
        rounded = values.to(dtype)
        least, most = values.aminmax()
        if max(float(most), -float(least)) > torch.finfo(dtype).max:
            wider = "They are too large for float16: pass dtype=torch.bfloat16 or torch.float32."
            refuse_nonfinite(rounded.transpose(0, 1), batch.ids, f"contributions in {dtype}", lambda: wider)
        return rounded


def in_order(parts: Decomposition, components: Sequence[Component]) -> Float[Tensor, "component batch d_rep"]:
    """The values of these components. Hooks that changed nothing in a batch have left no row, and wrote zero.

    Raises:
        InputError: Where there is a component that is not among them.
    """
    if tuple(parts.components) == tuple(components):
        return parts.values
    known = {component.label: row for row, component in enumerate(components)}
    values = parts.values.new_zeros(len(components), *parts.values.shape[1:])
    for component, vectors in zip(parts.components, parts.values, strict=True):
        if component.label not in known:
            raise InputError(
                f"Expected the same components for every batch; {component.label!r} is new. Hooks on the model must "
                f"stay as they were at the beginning, and change its first pictures too."
            )
        values[known[component.label]] = vectors
    if missing := [c.label for c in components if c.label not in parts and c.kind != "intervention"]:
        raise InputError(f"Expected the same components for every batch; {missing[0]!r} is missing.")
    return values
