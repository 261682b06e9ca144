"""What was collected over a data set, on disk: read in chunks, or as decompositions, without the model.

A store is a folder: ``manifest.json`` says of which model, cut and images it is; ``chunk-000000.safetensors`` and so on
hold one batch each, in the order of the data set; ``complete.json`` is written when all of them are there. Nothing is
ever unpickled. `vitdecomp_lens.collect` makes stores.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens import storage
from vitdecomp_lens.collecting import gathered
from vitdecomp_lens.collecting.files import COMPLETE, LABEL, MANIFEST, RESUME, StoreFiles, ids_hash, read_json
from vitdecomp_lens.collecting.gathered import Gather, Gathered
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError, near_matches
from vitdecomp_lens.selecting import rows_of_batch, summary

__all__ = ["Gather", "Gathered", "Store"]


class Store:
    """What was collected over a data set. It satisfies `vitdecomp_lens.clip.AlignmentSource`.

    Args:
        path: The folder.

    Raises:
        StoreError: Where there is no store, or it is unfinished, damaged, or of another version.

    Attributes:
        path: The folder.
        manifest: What was asked for: model, cut, images, precision; and with which versions and threads it was made.
        skipped: Identifier and reason of every image that could not be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / MANIFEST).is_file():
            raise StoreError(
                f"Expected a store at {str(self.path)!r}; there is no {MANIFEST}. Use collect() to make one."
            )
        self.manifest: Mapping[str, Any] = read_json(self.path / MANIFEST)
        self._files = StoreFiles(self.path, self.manifest)
        if not (self.path / COMPLETE).is_file():
            raise StoreError(
                f"The store {str(self.path)!r} is unfinished: {len(self._files.numbers())} chunks are there. Collect "
                f"again with {RESUME}."
            )
        complete = read_json(self.path / COMPLETE)
        if complete.get("store") != self._files.key:
            raise StoreError(f"The {MANIFEST} of the store {str(self.path)!r} is another store's, as {COMPLETE} says.")
        with storage.restoring(self.path / MANIFEST, kind="manifest"):
            self._sizes: list[int] = complete["sizes"]
            self._ids_hash: str = complete["ids"]
            self.skipped = tuple((name, reason) for name, reason in complete["skipped"])
            cut = self.manifest["cut"]
            self._cut = storage.unpack(cut)
            # The class alone would not tell a model from another of its kind.
            self._cut["metadata"] = {**self._cut["metadata"], "weights": self.manifest["asked"]["model"]}
            self.components: tuple[Component, ...] = storage.unpack_components(cut["components"])
        there = set(self._files.numbers())
        for number in range(len(self._sizes)):
            if number not in there:
                self._files.header(number)  # says so

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Store":
        """The store in a folder; the same as ``Store(path)``."""
        return cls(path)

    # ---- what it is of

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of which model and cut, as a decomposition's metadata say it; ``"weights"`` is a hash of the model's."""
        found: Mapping[str, Any] = self._cut["metadata"]
        return found

    @property
    def space(self) -> str | None:
        """The space of the embeddings; None where there are none."""
        found: str | None = self.manifest["asked"]["space"]
        return found

    @property
    def count(self) -> int:
        """How many images there are, without those that were skipped."""
        return sum(self._sizes)

    def __len__(self) -> int:
        return self.count

    @property
    def kept(self) -> tuple[str, ...]:
        """What is stored of every image: contributions, representations, embeddings."""
        return tuple(self.manifest["asked"]["keep"])

    @property
    def complete(self) -> bool:
        """Whether the components are all of the model's, so that they sum to its representation."""
        return bool(self._cut["complete"])

    def check_space(self, other: str) -> None:
        """Refuse what lives in another space.

        Raises:
            InputError: Where the names differ.
        """
        if other != self.space:
            raise InputError(
                f"Expected the space of the store's embeddings, {self.space!r}; got {other!r}. Directions of one model "
                f"mean nothing in another's space: collect with clip= of the model that the other side was made with."
            )

    def __repr__(self) -> str:
        return (
            f"Store({str(self.path)!r}: {self.count} images in {len(self._sizes)} chunks, "
            f"{', '.join(self.kept) or 'nothing kept'}; {summary(self.components)})"
        )

    # ---- labels and identifiers

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The identifier of every image, in the order of the store.

        Raises:
            StoreError: Where chunks are damaged, or are not those that the store was finished with.
        """
        headers = map(self._files.header, range(len(self._sizes)))
        ids = tuple(name for header in headers for name in header["ids"])
        if ids_hash([ids]) != self._ids_hash:
            raise StoreError(f"The chunks of the store {str(self.path)!r} are not those that it was finished with.")
        return ids

    @property
    def label_names(self) -> Mapping[str, Sequence[str] | None]:
        """The labels that every image carries, and the names of their values, where they have names."""
        found: Mapping[str, Sequence[str] | None] = self.manifest["labels"]
        return found

    def labels(self, name: str) -> Int[Tensor, "image"]:
        """One label of every image.

        Raises:
            UnknownNameError: Where images have no such label.
        """
        if name not in self.label_names:
            raise UnknownNameError(f"The store has no label {name!r}; {near_matches(name, self.label_names)}")
        return self._column(LABEL + name)

    # ---- values

    def embeddings(self) -> Float[Tensor, "image d_clip"]:
        """The CLIP embedding of every image, not normalised.

        Raises:
            InputError: Where they were not kept.
        """
        self._needs("embeddings")
        return self._column("embeddings")

    def representations(self) -> Float[Tensor, "image d_rep"]:
        """The model's representation of every image.

        Raises:
            InputError: Where they were not kept.
        """
        self._needs("representations")
        return self._column("representations")

    def decomposition(self, images: int | slice | Sequence[int] | Tensor = slice(None)) -> Decomposition:
        """The contributions of some images, in their order; nothing else is read into memory.

        Args:
            images: A number, a slice, numbers, or a mask; all by default.

        Raises:
            InputError: Where there is no such image, or contributions were not kept.
            StoreError: Where a chunk is damaged.
        """
        self._needs("contributions")
        rows = rows_of_batch(images, self.count)
        if not rows:
            raise InputError("Expected at least one image of the store; got none.")
        starts = [0, *accumulate(self._sizes)]
        chunk_of = torch.bucketize(torch.tensor(rows), torch.tensor(starts[1:]), right=True).tolist()
        pieces, totals = [], []
        for number, group in groupby(range(len(rows)), key=chunk_of.__getitem__):
            tensors, _ = self._files.read(number)
            inside = [rows[place] - starts[number] for place in group]
            pieces.append(tensors["contributions"][:, inside])
            if "representations" in tensors:
                totals.append(tensors["representations"][inside])
        total = torch.cat(totals) if totals else None
        return Decomposition(torch.cat(pieces, 1), self.components, total, **self._cut)

    def chunks(self) -> Iterator[tuple[Float[Tensor, "component batch d_rep"], Float[Tensor, "batch d_clip"]]]:
        """All images once, in chunks: contributions and embeddings; what an aligner is fitted from.

        Raises:
            InputError: Where one of the two was not kept, or the components are not all of the model's.
            StoreError: Where a chunk is damaged.
        """
        self._needs("contributions", "embeddings")
        if not self.complete:
            raise InputError(
                "Expected a store of all components, because all of them together are aligned; this one has some. "
                "Collect again without components=."
            )
        for number, size in enumerate(self._sizes):
            if size:
                tensors, _ = self._files.read(number)
                yield tensors["contributions"], tensors["embeddings"]

    def _needs(self, *names: str) -> None:
        for name in names:
            if name not in self.kept:
                clip = ", clip=..." if name == "embeddings" else ""
                raise InputError(
                    f"The store holds no {name}, only {', '.join(self.kept) or 'identifiers and labels'}. Collect "
                    f"again with keep=[..., {name!r}]{clip}."
                )

    def _column(self, name: str) -> Tensor:
        """One tensor of all chunks."""
        return torch.cat([self._files.read(number)[0][name] for number, size in enumerate(self._sizes) if size])

    # ---- statistics

    @cached_property
    def gathered(self) -> Gathered:
        """What was gathered of every component in the same pass.

        Raises:
            InputError: Where nothing was.
            StoreError: Where a file is damaged, or does not cover every chunk once.
        """
        found = gathered.merged(self.path, self._files.key)
        if found is None:
            raise InputError("Nothing was gathered. Collect with gather=Gather(...).")
        whole, chunks = found
        if chunks != list(range(len(self._sizes))):
            raise StoreError(f"The statistics of the store {str(self.path)!r} are not of every chunk once.")
        return whole

    def top_images(self, component: str | Component, direction: int = 0) -> tuple[tuple[str, float], ...]:
        """The images for which a component writes most, by identifier, with their scores; highest first.

        Args:
            component: Its label.
            direction: Along which of the directions that were gathered along.

        Raises:
            UnknownNameError: Where there is no such component.
            InputError: Where top images were not gathered, or there is no such direction.
        """
        label = component.label if isinstance(component, Component) else component
        known = [c.label for c in self.components]
        if label not in known:
            raise UnknownNameError(f"There is no component {label!r}; {near_matches(label, known)}")
        found = self.gathered
        if not found.gather.top:
            raise InputError("Top images were not gathered. Collect with gather=Gather(top=16).")
        if not 0 <= direction < found.top_scores.shape[1]:
            raise InputError(f"There is no direction {direction}; there are {found.top_scores.shape[1]}, from 0.")
        row = known.index(label)
        scores, numbers = found.top_scores[row, direction].tolist(), found.top_numbers[row, direction].tolist()
        return tuple((self._id_of(number), score) for number, score in zip(numbers, scores, strict=True))

    def _id_of(self, number: int) -> str:
        """The identifier of an image by its chunk and place in it, which `top_numbers` hold as one number."""
        chunk, place = divmod(number, self.manifest["asked"]["batch_size"])
        return str(self._files.header(chunk)["ids"][place])

    # ---- checking

    def verify(self) -> tuple[str, ...]:
        """Read all, and say what is damaged: one sentence for each file, none if all is as it was written."""
        problems = []
        for number, size in enumerate(self._sizes):
            try:
                tensors, header = self._files.read(number)
            except StoreError as error:
                problems.append(str(error))
                continue
            wanted = {*self.kept, *(LABEL + name for name in self.label_names)} if size else set()
            if len(header["ids"]) != size or set(tensors) != wanted:
                problems.append(f"{self._files.chunk(number).name} holds something else than it should.")
        try:
            if not problems:
                assert self.ids is not None
            if self.manifest["asked"]["gather"] is not None:
                assert self.gathered is not None
        except StoreError as error:
            problems.append(str(error))
        return tuple(problems)
