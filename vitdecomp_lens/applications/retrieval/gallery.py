"""Galleries: a vector an image, what is nearest to others found exactly, or by an index of faiss."""

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens import storage
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.gap import accumulator, summed
from vitdecomp_lens.selecting import refuse_duplicates

__all__ = ["EXACT", "Gallery", "Ranking", "Similarity", "vectors"]

Similarity = Literal["cosine", "dot"]
EXACT = "exact"
FAISS = "faiss"
BLOCK = 8192  # images whose similarities to all queries are there at once
INSTALL = "An index of faiss needs it: pip install faiss-cpu. Or take index='exact', which needs nothing."
if TYPE_CHECKING:
    Ids = tuple[str, ...]
else:
    # A field holds a tuple; its constructor reads any sequence, which the checks at run time let through.
    Ids = Sequence[str]


def vectors(parts: Decomposition, components: Collection[str] | None = None) -> Float[Tensor, "batch d_rep"]:
    """The sum of what chosen components write: Σ c_i.

    Args:
        parts: Contributions; in the space of texts, where they are to be compared with texts.
        components: Their labels, such as ``scores.select("colour")``; None for the whole, what the model itself
            computed where that is known.

    Raises:
        UnknownNameError: Where a label is unknown.
        InputError: Where no component is chosen; where the whole is not known.
    """
    if components is not None:
        labels = [components] if isinstance(components, str) else list(components)
        if not labels:
            raise InputError("Expected at least one component; got none. Pass None for the whole representation.")
        return summed(parts.select(labels=labels).values)
    if parts.total is not None:
        return parts.total.to(accumulator(parts.total.dtype))
    if not parts.complete:
        raise InputError("Expected components= to sum: these contributions are not all, and their total is not known.")
    return summed(parts.values)


@dataclass(frozen=True, eq=False, repr=False)
class Ranking:
    """For each query, the images found, best first.

    Attributes:
        queries: The texts or ids of reference images.
        ids: Of all images of the gallery.
        rows: The numbers in the gallery of those found. -1 where an approximate index found fewer.
        scores: How similar they are.
        similarity: Of which kind.
    """

    queries: tuple[str, ...]
    ids: tuple[str, ...] = field(repr=False)
    rows: Int[Tensor, "query found"]
    scores: Float[Tensor, "query found"]
    similarity: Similarity

    def __getitem__(self, query: str) -> tuple[tuple[str, float], ...]:
        """The ids of the images found for one query, with how similar they are."""
        if query not in self.queries:
            raise UnknownNameError(f"There is no query {query!r}; {near_matches(query, self.queries)}")
        place = self.queries.index(query)
        pairs = zip(self.rows[place].tolist(), self.scores[place].tolist(), strict=True)
        return tuple((self.ids[row], score) for row, score in pairs if row >= 0)

    def __repr__(self) -> str:
        query, found = self.rows.shape
        return f"Ranking({query=}, {found=}, of {len(self.ids)} images by {self.similarity})"


@dataclass(frozen=True, eq=False, repr=False)
class Gallery:
    """Images to be found, by a vector each.

    Attributes:
        ids: All different.
        vectors: A row an image.
        space: The name of the space that they are in, as a text bank's; None where it is not known.
        components: The labels of the components that were summed; None for the whole representation.
        index: ``"exact"``; or ``"faiss"``, or ``"faiss:IVF4096,Flat"`` with any description that
            ``faiss.index_factory`` knows, for millions of images. An index is made when it is first asked.

    Raises:
        InputError: Where there are no images; where ids do not fit vectors or are given twice; where vectors are not
            finite.

    Example:
        >>> gallery = Gallery(["a", "b", "c"], torch.eye(3))
        >>> gallery.search(torch.tensor([[0.0, 2.0, 1.0]]), 2, names=["mine"])["mine"][0][0]
        'b'
    """

    ids: Ids
    vectors: Float[Tensor, "image d_rep"]
    space: str | None = None
    components: tuple[str, ...] | None = None
    index: str = EXACT

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        if not len(self.ids) or not self.vectors.shape[1]:
            raise InputError("Expected a gallery of at least one image; this one is empty.")
        if len(self.ids) != len(self.vectors):
            raise InputError(f"Expected an id for each of the {len(self.vectors)} vectors; got {len(self.ids)} ids.")
        refuse_duplicates(self.ids, of="images")
        finite = self.vectors.isfinite().all(1)
        if not bool(finite.all()):
            raise InputError(f"Expected finite vectors; that of {self.ids[int((~finite).nonzero()[0])]!r} is not.")
        if self.index.partition(":")[0] not in (EXACT, FAISS) or self.index.startswith(f"{EXACT}:"):
            raise InputError(f"Expected index='exact', 'faiss' or 'faiss:DESCRIPTION'; got {self.index!r}.")

    @classmethod
    def of(
        cls,
        parts: Decomposition | Iterable[Decomposition],
        *,
        components: Collection[str] | None = None,
        ids: Sequence[str] | None = None,
        index: str = EXACT,
    ) -> "Gallery":
        """The gallery of what chosen components write.

        Args:
            parts: Contributions; or several batches of them, each looked at once and let go.
            components: As for `vectors`.
            ids: One an image; None numbers them.
            index: As for the class.

        Raises:
            InputError: Where there are no images, or batches are of different spaces.
            UnknownNameError: Where a component is unknown.

        Example:
            >>> parts = Decomposition(torch.randn(2, 4, 3), ("L0H0", "mlp.0"))
            >>> Gallery.of(parts, components=["L0H0"])
            Gallery(image=4, d_rep=3, 1 component, space=None, index='exact')
        """
        rows, spaces = [], []
        for batch in [parts] if isinstance(parts, Decomposition) else parts:
            rows.append(vectors(batch, components))
            spaces.append(batch.metadata.get("space"))
        if len(set(spaces)) > 1:
            raise InputError(f"Expected batches of one space; got {sorted(map(str, set(spaces)))}.")
        found = torch.cat(rows) if rows else torch.zeros(0, 1)
        names = [str(number) for number in range(len(found))] if ids is None else ids
        labels = (components,) if isinstance(components, str) else components
        return cls(tuple(names), found, (spaces or [None])[0], None if labels is None else tuple(labels), index)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        image, d_rep = self.vectors.shape
        count = None if self.components is None else len(self.components)
        of = "the whole" if count is None else f"{count} component{'s' if count > 1 else ''}"
        return f"Gallery({image=}, {d_rep=}, {of}, space={self.space!r}, index={self.index!r})"

    @cached_property
    def _places(self) -> dict[str, int]:
        return {one: place for place, one in enumerate(self.ids)}

    def places(self, ids: Sequence[str]) -> list[int]:
        """The numbers of images by their ids, or of one by its id.

        Raises:
            UnknownNameError: Where there is no such image.
        """
        ids = [ids] if isinstance(ids, str) else ids
        for one in ids:
            if one not in self._places:
                raise UnknownNameError(f"There is no image {one!r} in the gallery; {near_matches(one, self.ids)}")
        return [self._places[one] for one in ids]

    def refuse_other(self, space: str | None, width: int) -> None:
        """Refuse what is of another space.

        Raises:
            InputError: Where its name, if both are known, or its width is another.
        """
        if self.space is not None and space is not None and space != self.space:
            raise InputError(
                f"Expected the space of this gallery, {self.space!r}; got {space!r}. Vectors of one model mean nothing "
                f"in another's space: map both into one, and embed texts with its model."
            )
        if width != self.vectors.shape[1]:
            raise InputError(f"Expected vectors of the gallery's width, {self.vectors.shape[1]}; got {width}.")

    # ---- searching

    def search(
        self,
        queries: Float[Tensor, "query d_rep"],
        k: int = 10,
        *,
        similarity: Similarity = "cosine",
        without: Sequence[int | None] | None = None,
        names: Sequence[str] | None = None,
    ) -> Ranking:
        """The images nearest to each query.

        An exact search keeps the similarities of 8,192 images at a time, and the k best so far; of equal ones the first
        come first, whatever their number.

        Args:
            queries: Any vectors of the gallery's space.
            k: How many images at most.
            similarity: ``"cosine"``, or ``"dot"`` for the product itself.
            without: For each query the number of an image that is not to be found, such as the query itself, or None.
            names: A name for each query; None numbers them.

        Raises:
            InputError: Where queries do not fit, k is below 1, there is nothing to find, or faiss is asked for and not
                installed.
        """
        self.refuse_other(None, queries.shape[1])
        if similarity not in get_args(Similarity):
            raise InputError(f"Expected similarity='cosine' or 'dot'; got {similarity!r}.")
        if not len(queries) or not bool(queries.isfinite().all()):
            raise InputError("Expected at least one query, all of finite numbers.")
        left_out = [None] * len(queries) if without is None else list(without)
        named = [str(number) for number in range(len(queries))] if names is None else names
        if not len(left_out) == len(named) == len(queries):
            raise InputError(f"Expected without= and names= one a query; got {len(left_out)} and {len(named)}.")
        there = len(self) - any(row is not None for row in left_out)
        if k < 1 or there < 1:
            raise InputError(f"Expected k= of at least 1, and images to find; got k={k} and {there} images.")
        dtype = torch.promote_types(accumulator(self.vectors.dtype), queries.dtype)
        wanted = queries.detach().to(self.vectors.device, dtype)
        if similarity == "cosine":
            wanted = torch.nn.functional.normalize(wanted, dim=1)
        search = self._search_exactly if self.index == EXACT else self._search_by_faiss
        scores, rows = search(wanted, min(k, there), similarity, left_out)
        return Ranking(tuple(named), self.ids, rows, scores, similarity)

    def _search_exactly(
        self, queries: Tensor, k: int, similarity: Similarity, without: Sequence[int | None]
    ) -> tuple[Tensor, Tensor]:
        """The k best of each block and those so far, again and again."""
        scores = queries.new_empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for first in range(0, len(self), BLOCK):
            block = self.vectors[first : first + BLOCK].detach().to(queries)
            if similarity == "cosine":
                block = torch.nn.functional.normalize(block, dim=1)
            found = queries @ block.T
            for query, row in enumerate(without):
                if row is not None and first <= row < first + len(block):
                    found[query, row - first] = -torch.inf
            numbers = torch.arange(first, first + len(block), device=rows.device).expand(len(queries), -1)
            scores, rows = _best(torch.cat([scores, found], 1), torch.cat([rows, numbers], 1), k)
        return scores, rows

    def _search_by_faiss(
        self, queries: Tensor, k: int, similarity: Similarity, without: Sequence[int | None]
    ) -> tuple[Tensor, Tensor]:
        index = self._faiss(similarity)
        spare = any(row is not None for row in without)
        wide = queries.float().cpu().contiguous().numpy()
        scores, rows = (torch.from_numpy(one) for one in index.search(wide, k + spare))
        rejected = torch.tensor([-2 if row is None else row for row in without])
        scores = scores.masked_fill((rows == rejected[:, None]) | (rows < 0), -torch.inf)
        best, order = scores.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], rows.gather(1, order)[:, :k]
        return best.to(queries), rows.masked_fill(best == -torch.inf, -1).to(queries.device)

    def _faiss(self, similarity: Similarity) -> Any:
        known: dict[str, Any] = self.__dict__.setdefault("_indices", {})
        if similarity not in known:
            known[similarity] = self._make_faiss(similarity)
        return known[similarity]

    def _make_faiss(self, similarity: Similarity) -> Any:
        try:
            faiss: Any = import_module("faiss")
        except ImportError as error:
            raise InputError(INSTALL) from error
        described = self.index.partition(":")[2] or "Flat"
        rows = self.vectors.detach().float().cpu()
        rows = torch.nn.functional.normalize(rows, dim=1) if similarity == "cosine" else rows
        try:
            index = faiss.index_factory(rows.shape[1], described, faiss.METRIC_INNER_PRODUCT)
            index.train(rows.contiguous().numpy())
        except RuntimeError as error:
            raise InputError(f"faiss makes no index {described!r} of {len(rows)} images: {error}") from error
        index.add(rows.contiguous().numpy())
        return index

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all; an index of faiss is made again.

        Raises:
            StoreError: Where the file cannot be written.
        """
        header = {"ids": self.ids, "space": self.space, "components": self.components, "index": self.index}
        storage.write(path, kind="Gallery", tensors={"vectors": self.vectors}, header=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Gallery":
        """Read what `save` wrote, onto the CPU. Nothing is unpickled.

        Raises:
            StoreError: Where the file is missing, damaged, half-written, or holds something else.
        """
        tensors, header = storage.read(path, kind="Gallery", needs=("vectors",))
        with storage.restoring(path, kind="Gallery"):
            names = header["components"]
            chosen = None if names is None else tuple(names)
            return cls(header["ids"], tensors["vectors"], header["space"], chosen, header["index"])

    def images(self, ids: Sequence[str]) -> "Gallery":
        """Some of the images, in the order asked for.

        Raises:
            UnknownNameError: Where there is no such image.
        """
        rows = self.places(ids)
        return replace(self, ids=tuple(self.ids[row] for row in rows), vectors=self.vectors[rows])


def _best(
    scores: Float[Tensor, "query candidate"], rows: Int[Tensor, "query candidate"], k: int
) -> tuple[Float[Tensor, "query found"], Int[Tensor, "query found"]]:
    """The k best; of equal ones those that come first. Candidates that are equal stand in the order of their rows."""
    k = min(k, scores.shape[1])
    least = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > least, scores == least
    room = k - above.sum(1, keepdim=True)
    kept = above | (equal & (equal.cumsum(1) <= room))  # exactly k in each row
    places = kept.nonzero()[:, 1].reshape(len(scores), k)
    best, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return best, rows.gather(1, places).gather(1, order)
