"""Where an alignment is fitted from: contributions and targets that are read piece by piece, and over again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError

MOST_HELD_OUT = 5000  # a mean over as many is known to a hundredth of the spread
_CHUNK = 1024

Chunk = tuple[Float[Tensor, "component batch d_rep"], Float[Tensor, "batch d_clip"]]


@runtime_checkable
class AlignmentSource(Protocol):
    """Contributions and targets of many images, in a fixed order that does not depend on how it is cut into chunks."""

    @property
    def components(self) -> Sequence[Component]:
        """What each row of the values belongs to. All of a model's: their sum is its representation."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of which model and cut, as a decomposition's metadata say it."""

    @property
    def space(self) -> str | None:
        """Which space the targets live in."""

    @property
    def count(self) -> int:
        """How many images there are."""

    def chunks(self) -> Iterator[Chunk]:
        """All images once: values ``[component batch d_rep]`` and targets ``[batch d_clip]``, again at every call."""


@dataclass(frozen=True, eq=False)
class Paired:
    """A decomposition in memory and the targets of its images, as an `AlignmentSource`."""

    parts: Decomposition
    targets: Float[Tensor, "batch d_clip"]
    space: str | None = None

    def __post_init__(self) -> None:
        if not self.parts.complete:
            raise InputError(
                "Expected a complete decomposition, because all components together are aligned to the target; this "
                "one is incomplete. Fit on what decompose() gave, before select() or ablate()."
            )
        if self.targets.ndim != 2 or len(self.targets) != self.count:
            raise InputError(
                f'Expected targets as Float[Tensor, "batch d_clip"], a row for each of the {self.count} images of the '
                f"decomposition; got shape {tuple(self.targets.shape)}."
            )

    @property
    def components(self) -> tuple[Component, ...]:
        """The decomposition's."""
        return tuple(self.parts.components)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The decomposition's."""
        return self.parts.metadata

    @property
    def count(self) -> int:
        """How many images there are."""
        return self.parts.values.shape[1]

    def chunks(self) -> Iterator[Chunk]:
        """Views of the values."""
        for start in range(0, self.count, _CHUNK):
            rows = slice(start, start + _CHUNK)
            yield self.parts.values[:, rows], self.targets[rows]


@dataclass(frozen=True, eq=False)
class Summed:
    """A source with one component: the sum of all. One map of it is one map shared by all."""

    source: AlignmentSource

    @property
    def components(self) -> tuple[Component, ...]:
        """The sum."""
        return (Component(kind="source", name="sum"),)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The source's."""
        return self.source.metadata

    @property
    def space(self) -> str | None:
        """The source's."""
        return self.source.space

    @property
    def count(self) -> int:
        """How many images there are."""
        return self.source.count

    def chunks(self) -> Iterator[Chunk]:
        """The source's, summed in at least float32."""
        for piece in checked(self):
            yield piece.values, piece.targets


class Piece(NamedTuple):
    """A chunk that has been checked.

    Attributes:
        first: The number of its first image.
        values: In at least float32.
        targets: In the same.
        rounding: The precision that the values came in, as `torch.finfo` gives it: of float16, float16's.
    """

    first: int
    values: Float[Tensor, "component batch d_rep"]
    targets: Float[Tensor, "batch d_clip"]
    rounding: float


def checked(source: AlignmentSource) -> Iterator[Piece]:
    """The chunks of a source, each with the number of its first image.

    Raises:
        InputError: Where a chunk does not fit the source, or holds what no map can be fitted to.
    """
    if isinstance(source, Summed):  # the sum is no more precise than what is summed
        for piece in checked(source.source):
            yield piece._replace(values=piece.values.sum(0, keepdim=True))
        return
    first = 0
    for values, targets in source.chunks():
        _refuse_shapes(source, values, targets)
        rounding, dtype = torch.finfo(values.dtype).eps, torch.promote_types(values.dtype, torch.float32)
        values, targets = values.detach().to(dtype), targets.detach().to(values.device, dtype)
        _refuse_numbers(values, targets, first)
        if first + len(targets) > source.count:
            _refuse_count(source, first + len(targets))
        yield Piece(first, values, targets, rounding)
        first += len(targets)
    _refuse_count(source, first)


def _refuse_count(source: AlignmentSource, found: int) -> None:
    if found != source.count:
        few = "only " if found < source.count else "at least "
        raise InputError(
            f"Expected chunks of {source.count} images in all, as the source counts them; got {few}{found}."
        )


def _refuse_shapes(source: AlignmentSource, values: Tensor, targets: Tensor) -> None:
    if values.ndim != 3 or targets.ndim != 2 or values.shape[:2] != (len(source.components), len(targets)):
        raise InputError(
            f'Expected values as Float[Tensor, "component batch d_rep"] of {len(source.components)} components and '
            f'targets as Float[Tensor, "batch d_clip"] of the same images; got shapes {tuple(values.shape)} and '
            f"{tuple(targets.shape)}."
        )
    if not (values.is_floating_point() and targets.is_floating_point()):
        raise InputError(f"Expected floating values and targets; got {values.dtype} and {targets.dtype}.")


def _refuse_numbers(values: Tensor, targets: Tensor, first: int) -> None:
    # The sum is finite if all are, and needs no second tensor of this size.
    if not bool(values.sum().isfinite()):
        bad = ~values.isfinite().all(-1).all(0)
        if bool(bad.any()):
            raise InputError(
                f"Expected finite contributions; those of image {first + int(bad.int().argmax())} hold NaN or Inf. "
                f"Check that image, or the model's output for it."
            )
    norms = targets.norm(dim=-1)
    bad = ~norms.isfinite() | (norms == 0)
    if bool(bad.any()):
        worst = int(bad.int().argmax())
        what = "is zero and has no direction" if norms[worst] == 0 else "holds NaN or Inf"
        raise InputError(f"Expected targets with a direction; that of image {first + worst} {what}. Leave it out.")


def images_of(values: Float[Tensor, "component batch d_rep"], mask: Bool[Tensor, "batch"]) -> Tensor:
    """Some of the images; all of them without a copy."""
    return values if bool(mask.all()) else values[:, mask.to(values.device)]


def some_of(mask: Bool[Tensor, "image"], most: int, seed: int) -> Bool[Tensor, "image"]:
    """As many of the images in a mask, drawn by the seed: those that come first may all be of one class."""
    numbers = torch.nonzero(mask)[:, 0]
    drawn = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))[:most]
    chosen = torch.zeros_like(mask)
    chosen[numbers[drawn]] = True
    return chosen


def held_out_mask(count: int, held_out: int | float | Sequence[int] | Tensor, seed: int) -> Bool[Tensor, "image"]:
    """Which images are held out: by their number only, however they come in chunks.

    Args:
        count: How many images there are.
        held_out: A fraction (at most 5,000 images are then held out), the numbers of images, or a mask.
        seed: Which images a fraction draws.

    Raises:
        InputError: Where no image would be held out, or none be left to fit.
    """
    mask = torch.zeros(count, dtype=torch.bool)
    if isinstance(held_out, int | float):
        if not 0 < held_out < 1:
            raise InputError(f"Expected held_out= between 0 and 1, numbers of images, or a mask; got {held_out}.")
        number = min(max(1, round(count * held_out)), MOST_HELD_OUT)
        mask[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:number]] = True
    else:
        mask = _given_mask(mask, torch.as_tensor(held_out).cpu())
    if not 0 < int(mask.sum()) < count:
        raise InputError(
            f"Expected images to hold out and images to fit, at least one of each; of {count}, {int(mask.sum())} "
            f"would be held out. Fit on more images."
        )
    return mask


def _given_mask(mask: Tensor, given: Tensor) -> Tensor:
    if given.dtype == torch.bool and given.shape == mask.shape:
        return given
    if given.dtype == torch.bool or given.is_floating_point() or given.ndim != 1:
        raise InputError(
            f"Expected held_out= as a mask of {len(mask)} images or numbers of images; got {tuple(given.shape)} of "
            f"{given.dtype}."
        )
    if len(given) and not (int(given.min()) >= 0 and int(given.max()) < len(mask)):
        raise InputError(f"Expected numbers of images from 0 to {len(mask) - 1} in held_out=; got {given.tolist()}.")
    mask[given] = True
    return mask
