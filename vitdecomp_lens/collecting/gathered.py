"""Statistics of contributions, gathered chunk by chunk in float64: they need no stored contributions."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens import storage
from vitdecomp_lens.clip.moments import Moments
from vitdecomp_lens.collecting.files import RESUME
from vitdecomp_lens.errors import InputError, StoreError

KIND = "Gathered"
_ANEW = f"Delete it; collecting again with {RESUME} gathers it anew."


@dataclass(frozen=True, eq=False)
class Gather:
    """What to gather of every component; the mean always.

    Attributes:
        covariance: Its covariance, ``[component d_rep d_rep]`` in float64.
        cross: Its covariance with the CLIP embeddings, ``[component d_rep d_clip]`` in float64.
        top: How many of the images that it writes most for.
        directions: Directions along which it writes most for the top images, as rows; without, the longest vectors.

    Raises:
        InputError: Where numbers or directions cannot be used.
    """

    covariance: bool = False
    cross: bool = False
    top: int = 0
    directions: Float[Tensor, "direction d_rep"] | None = None

    def __post_init__(self) -> None:
        if self.top < 0 or (self.directions is not None and not self.top):
            raise InputError(f"Expected top= as a number of images, at least 1 with directions; got {self.top}.")

    def as_json(self) -> dict[str, Any]:
        """What tells one request from another."""
        asked: dict[str, Any] = {"covariance": self.covariance, "cross": self.cross, "top": self.top}
        if self.directions is not None:
            values = self.directions.detach().cpu().double().contiguous()
            asked["directions"] = hashlib.blake2b(values.numpy().tobytes(), digest_size=8).hexdigest()
        return asked


class Gathered:
    """Means, covariances and top images of components, over whatever was added.

    Args:
        components: How many components.
        d_rep: How wide they are.
        gather: What to gather.
        d_clip: How wide embeddings are, for ``gather.cross``.
        device: Where sums are kept.

    Raises:
        InputError: Where directions are of another space.

    Example:
        >>> values = torch.randn(3, 8, 4)
        >>> whole, one, two = (Gathered(3, 4, Gather(top=2)) for _ in range(3))
        >>> whole.add(values, first=0)
        >>> one.add(values[:, :5], first=0)
        >>> two.add(values[:, 5:], first=5)
        >>> one.merge(two)
        >>> torch.allclose(one.mean, whole.mean), torch.equal(one.top_numbers, whole.top_numbers)
        (True, True)
    """

    def __init__(
        self, components: int, d_rep: int, gather: Gather, d_clip: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        if gather.directions is not None and (gather.directions.ndim != 2 or gather.directions.shape[1] != d_rep):
            raise InputError(
                f'Expected directions as Float[Tensor, "direction d_rep"] with rows of d_rep={d_rep}; got shape '
                f"{tuple(gather.directions.shape)}. They are of another space."
            )
        self.gather, self.count = gather, 0
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.mean = torch.zeros(components, d_rep, **options)
        self.moments = Moments(components, d_rep, device) if gather.covariance else None
        self.embedding_mean = torch.zeros(d_clip if gather.cross else 0, **options)
        self.scatter = torch.zeros(components, d_rep, len(self.embedding_mean), **options)
        rows = 1 if gather.directions is None else len(gather.directions)
        self.top_scores = torch.zeros(components, rows, 0, **options)
        self.top_numbers = torch.zeros(components, rows, 0, dtype=torch.int64, device=device)

    @property
    def covariance(self) -> Float[Tensor, "component d_rep d_rep"]:
        """Of each component over the images.

        Raises:
            InputError: Where it was not gathered.
        """
        if self.moments is None:
            raise InputError("Covariances were not gathered. Collect with gather=Gather(covariance=True).")
        return self.moments.scatter / max(self.count, 1)

    @property
    def cross(self) -> Float[Tensor, "component d_rep d_clip"]:
        """The covariance of each component with the embeddings over the images.

        Raises:
            InputError: Where it was not gathered.
        """
        if not self.gather.cross:
            raise InputError("Cross-moments were not gathered. Collect with gather=Gather(cross=True).")
        return self.scatter / max(self.count, 1)

    def add(
        self,
        values: Float[Tensor, "component batch d_rep"],
        embeddings: Float[Tensor, "batch d_clip"] | None = None,
        *,
        first: int,
    ) -> None:
        """Add images.

        Args:
            values: What components write.
            embeddings: Of the same images, for ``gather.cross``.
            first: The number of the first image; the others follow. Numbers are how `top_numbers` names images.
        """
        if not values.shape[1]:
            return
        if self.moments is not None:
            self.moments.add(values)
        self._keep_top(values, first)
        mean, embedding_mean = values.mean(1, dtype=torch.float64), self.embedding_mean
        if self.gather.cross:
            assert embeddings is not None
            embedding_mean = embeddings.mean(0, dtype=torch.float64)
            centred = embeddings - embedding_mean.to(embeddings.dtype)
            for row, vectors in enumerate(values):  # one by one, or all products at once would be as large as the sums
                self.scatter[row] += (vectors - mean[row].to(vectors.dtype)).T @ centred.to(vectors.dtype)
        self._join(values.shape[1], mean, embedding_mean)

    def merge(self, other: "Gathered") -> None:
        """Add what another has gathered, over other images.

        Raises:
            InputError: Where it gathered something else.
        """
        if self.gather.as_json() != other.gather.as_json() or self.mean.shape != other.mean.shape:
            raise InputError(
                f"Expected statistics of the same kind to merge, {self.gather.as_json()} of {tuple(self.mean.shape)}; "
                f"got {other.gather.as_json()} of {tuple(other.mean.shape)}."
            )
        if self.moments is not None and other.moments is not None:
            self.moments.merge(other.moments)
        self._join_top(other.top_scores, other.top_numbers)
        self.scatter += other.scatter
        self._join(other.count, other.mean, other.embedding_mean)

    def _join(self, count: int, mean: Tensor, embedding_mean: Tensor) -> None:
        """Take the two means for one: what lies between them is scatter too."""
        together = self.count + count
        if not together:
            return
        between, between_embeddings = mean - self.mean, embedding_mean - self.embedding_mean
        if self.gather.cross:  # one by one and in place, or what is added would be as large as the sums
            for row, scatter in enumerate(self.scatter):
                scatter.addr_(between[row], between_embeddings, alpha=self.count * count / together)
        self.mean += between * (count / together)
        self.embedding_mean += between_embeddings * (count / together)
        self.count = together

    def _keep_top(self, values: Tensor, first: int) -> None:
        if not self.gather.top:
            return
        if self.gather.directions is None:
            scores = values.norm(dim=-1)[:, None]
        else:
            scores = (values @ self.gather.directions.to(values).T).transpose(1, 2)
        numbers = torch.arange(first, first + values.shape[1], device=values.device)
        self._join_top(scores.double(), numbers.expand_as(scores))

    def _join_top(
        self, scores: Float[Tensor, "component row many"], numbers: Int[Tensor, "component row many"]
    ) -> None:
        """Keep the highest scores; of equal ones the lowest numbers, so that the order of adding does not matter."""
        scores, numbers = torch.cat([self.top_scores, scores], -1), torch.cat([self.top_numbers, numbers], -1)
        numbers, order = numbers.sort(-1)
        scores, order = scores.gather(-1, order).sort(stable=True, dim=-1, descending=True)
        kept = slice(self.gather.top)
        self.top_scores = scores[..., kept].contiguous()
        self.top_numbers = numbers.gather(-1, order)[..., kept].contiguous()

    # ---- on disk

    def save(self, path: str | os.PathLike[str], said: Mapping[str, Any]) -> None:
        """Write to one file, whole or not at all.

        Args:
            path: Where to.
            said: What else JSON is to hold.

        Raises:
            StoreError: Where the file cannot be written.
        """
        header = {"gather": self.gather.as_json(), "count": self.count, "said": dict(said)}
        storage.write(path, kind=KIND, tensors=self._tensors(), header=header)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "mean": self.mean,
            "embedding_mean": self.embedding_mean,
            "cross": self.scatter,
            "top_scores": self.top_scores,
            "top_numbers": self.top_numbers,
        }
        if self.moments is not None:
            tensors |= {"covariance": self.moments.scatter, "moments_mean": self.moments.mean}
        if self.gather.directions is not None:
            tensors["directions"] = self.gather.directions
        return tensors

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: torch.device | str = "cpu", *, again: str = storage.AGAIN
    ) -> tuple["Gathered", dict[str, Any]]:
        """Read what `save` wrote, and what else was said.

        Args:
            path: The file.
            device: Where to.
            again: What to do where it is damaged.

        Raises:
            StoreError: Where the file is missing, damaged, half-written, or holds something else.
        """
        tensors, header = storage.read(
            path, kind=KIND, needs=("mean", "cross", "top_scores", "top_numbers"), again=again
        )
        with storage.restoring(path, kind=KIND, again=again):
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            asked = {**header["gather"], "directions": tensors.get("directions")}
            (components, d_rep), d_clip = tensors["mean"].shape, tensors["cross"].shape[2]
            found = cls(components, d_rep, Gather(**asked), d_clip, device)
            found.count, found.mean, found.scatter = header["count"], tensors["mean"], tensors["cross"]
            found.embedding_mean = tensors["embedding_mean"]
            found.top_scores, found.top_numbers = tensors["top_scores"], tensors["top_numbers"]
            if found.moments is not None:
                found.moments.count, found.moments.mean = found.count, tensors["moments_mean"]
                found.moments.scatter = tensors["covariance"]
            said: dict[str, Any] = header["said"]
        return found, said


class Part:
    """Statistics on their way, of one process of several: a file that says which chunks are in it.

    Args:
        folder: The store's.
        rank: Of the process.
        key: Which store this is, so that files of another are refused.
        fresh: What to begin with, where the process has no file yet.

    Attributes:
        covered: The chunks that are in this file or in that of another process.
    """

    def __init__(self, folder: Path, rank: int, key: str, fresh: Gathered) -> None:
        self.path, self._key = folder / f"gathered-{rank:04d}.safetensors", key
        self._gathered, self._new = fresh, 0
        self._chunks: list[int] = []
        self.covered: set[int] = set()
        for path in _files(folder):
            found, chunks = _load_part(path, key, fresh.mean.device)
            self.covered.update(chunks)
            if path == self.path:
                self._gathered, self._chunks = found, chunks

    def add(self, chunk: int, values: Tensor, embeddings: Tensor | None, *, first: int) -> None:
        """Add a chunk's images; a chunk that is covered already is left out."""
        if chunk in self.covered:
            return
        self._gathered.add(values, embeddings, first=first)
        self._chunks.append(chunk)
        self.covered.add(chunk)
        self._new += 1

    def save(self) -> None:
        """Write what is new, so that a kill loses nothing from before."""
        if self._new:
            self._gathered.save(self.path, {"store": self._key, "chunks": self._chunks})
            self._new = 0


def merged(folder: Path, key: str) -> tuple[Gathered, list[int]] | None:
    """What all processes have gathered, in the order of their ranks, and from which chunks; None if nothing.

    Raises:
        StoreError: Where a file is damaged or of another store.
    """
    several = [_load_part(path, key) for path in _files(folder)]
    if not several:
        return None
    (whole, chunks), *others = several
    for other, more in others:
        whole.merge(other)
        chunks = chunks + more
    return whole, sorted(chunks)


def _load_part(path: Path, key: str, device: torch.device | str = "cpu") -> tuple[Gathered, list[int]]:
    try:
        found, said = Gathered.load(path, device, again=_ANEW)
        with storage.restoring(path, kind=KIND, again=_ANEW):
            mine, chunks = said["store"] == key, list(said["chunks"])
        if not mine:
            raise storage.damaged(path, KIND, "it belongs to another store", _ANEW)
    except StoreError as error:
        why = str(error).removesuffix(_ANEW).rstrip()
        raise StoreError(
            f"The statistics {path.name} of the store {str(path.parent)!r} cannot be used. {why} {_ANEW}"
        ) from error
    return found, chunks


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("gathered-*.safetensors"))
