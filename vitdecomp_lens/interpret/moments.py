"""The second moments of components over images, within the few directions that hold their values.

A head writes into few of the space's dimensions. Whatever asks only how a component varies can be answered from its
scatter within these, whatever the number of images; they are read a block at a time, in double precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitdecomp_lens.errors import CapacityError, InputError
from vitdecomp_lens.selecting import taken

BLOCK = 512  # images that are read at once
SPARE = 16  # directions beyond the rank, so that a component of that rank is surely held
WIDER = 3


def noise_of(dtype: torch.dtype) -> float:
    """Below this share of the length of all of a component's values, a direction is rounding.

    That of float32, and what covariances in double precision can tell from nothing; or that of a dtype still coarser.
    """
    return max(2e-6, torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Moments:
    """The second moments of components, within directions that hold all their values.

    Attributes:
        basis: These directions, as orthonormal columns; None where they are all dimensions.
        mean: Over images.
        scatter: Σ over images of centred values, times themselves, along the directions.
        spread: The trace of the scatter along all dimensions.
        squares: Σ of all squares, with the mean in them.
        images: How many.
    """

    basis: Float[Tensor, "component d_clip width"] | None
    mean: Float[Tensor, "component d_clip"]
    scatter: Float[Tensor, "component width width"]
    spread: Float[Tensor, "component"]
    squares: Float[Tensor, "component"]
    images: int

    @property
    def mean_within(self) -> Float[Tensor, "component width"]:
        """The mean along the directions."""
        return self.mean if self.basis is None else (self.mean[:, None] @ self.basis)[:, 0]

    def missed(self) -> Float[Tensor, "component"]:
        """Σ of the squares of what the directions do not hold."""
        held = torch.diagonal(self.scatter, dim1=1, dim2=2).sum(1) + self.images * self.mean_within.square().sum(1)
        return self.squares - held

    def outside(self, columns: Float[Tensor, "component width rank"]) -> Float[Tensor, "component d_clip rank"]:
        """Columns that are given along the directions, along all dimensions."""
        return columns if self.basis is None else self.basis @ columns

    def of(self, held: Bool[Tensor, "component"]) -> "Moments":
        """Those of some components."""
        if bool(held.all()):
            return self
        basis = None if self.basis is None else self.basis[held]
        tensors = (self.mean[held], self.scatter[held], self.spread[held], self.squares[held])
        return Moments(basis, *tensors, self.images)


def numbers_for_moments(d_clip: int, width: int) -> int:
    """How many numbers the moments of one component take at most while they are read, first within ``width``."""
    width = min(d_clip, width)
    return BLOCK * (2 * d_clip + width) + 5 * d_clip * (width + d_clip)  # in the worst case, along all dimensions


def at_once(one: int, fixed: int, max_bytes: int, *, what: str, instead: str) -> int:
    """How many components or vectors may be read at once.

    Args:
        one: The bytes that each of them takes.
        fixed: The bytes that all take together.
        max_bytes: How many there are.
        what: What one of them is, for the message.
        instead: What to do beside raising ``max_bytes``.

    Raises:
        CapacityError: Where there is no room for a single one.
    """
    if one > max_bytes - fixed:
        raise CapacityError(
            f"Reading one {what} takes about {one + fixed:,} bytes, more than max_bytes={max_bytes:,} allows. "
            f"Raise max_bytes=, or {instead}."
        )
    return (max_bytes - fixed) // one


def moments_of(
    values: Float[Tensor, "component batch d_clip"], labels: tuple[str, ...], *, size: int, width: int
) -> Iterator[tuple[list[int], Moments]]:
    """The moments of components, ``size`` at a time at most: first within ``width`` directions, of some in wider ones.

    To be forgotten before the next are asked for: they are most of the memory.

    Yields:
        The components' numbers, and their moments. The numbers are in no order.

    Raises:
        InputError: Where contributions are not finite.
    """
    every = list(range(len(values)))
    for first in every[::size]:
        yield from _read(values, every[first : first + size], labels, width)


def _read(
    values: Float[Tensor, "component batch d_clip"], rows: list[int], labels: tuple[str, ...], width: int
) -> Iterator[tuple[list[int], Moments]]:
    """To find the directions takes a pass over the values and a product with ``width`` columns.

    That is a small part of what the scatter in all dimensions would take.
    """
    basis = None if width >= values.shape[-1] else _row_space(values, rows, width)
    moments = _moments(values, rows, basis)
    _refuse_not_finite(moments, rows, labels)
    held = moments.missed() <= noise_of(values.dtype) ** 2 * moments.squares
    if basis is None:
        held = torch.ones_like(held)
    inside = [row for row, is_held in zip(rows, held.tolist(), strict=True) if is_held]
    outside = [row for row, is_held in zip(rows, held.tolist(), strict=True) if not is_held]
    if inside:
        yield inside, moments.of(held)
    del basis, moments, held
    if outside:
        yield from _read(values, outside, labels, width * WIDER)


def _refuse_not_finite(moments: Moments, rows: list[int], labels: tuple[str, ...]) -> None:
    for row, is_finite in zip(rows, torch.isfinite(moments.squares).tolist(), strict=True):
        if not is_finite:
            raise not_finite(labels[row])


def not_finite(label: str) -> InputError:
    """The error for contributions that are not finite, for the caller to raise."""
    return InputError(
        f"Expected finite contributions; those of {label!r} have NaN or Inf, or are too large to be "
        f"squared. Look at the images with parts[{label!r}]."
    )


def _blocks(
    values: Float[Tensor, "component batch d_clip"], rows: list[int], size: int
) -> Iterator[Float[Tensor, "row image d_clip"]]:
    """Some components in double precision, a block of images at a time: all images would be most of the memory."""
    return (taken(block, rows).double() for block in values.split(size, dim=1))


def _row_space(
    values: Float[Tensor, "component batch d_clip"], rows: list[int], width: int
) -> Float[Tensor, "row d_clip width"]:
    """Orthonormal columns that hold the values of every component whose rank is somewhat smaller than ``width``.

    Images are weighted at random and summed into ``width`` groups; the groups span what the images span, if that has
    no more dimensions. Whether it has is for the caller to look at.
    """
    _, batch, d_clip = values.shape
    weights = torch.randn(batch, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(values.device)
    groups = weights.new_zeros(len(rows), width, d_clip)
    for block, weight in zip(_blocks(values, rows, width), weights.split(width), strict=True):
        groups[:, : block.shape[1]].addcmul_(block, weight[:, None])
    return torch.linalg.qr(groups.nan_to_num_().mT).Q  # what is not finite is refused by the caller


def _moments(
    values: Float[Tensor, "component batch d_clip"],
    rows: list[int],
    basis: Float[Tensor, "row d_clip width"] | None,
) -> Moments:
    batch, d_clip = values.shape[1:]
    width = d_clip if basis is None else basis.shape[-1]
    mean = torch.zeros(len(rows), d_clip, dtype=torch.float64, device=values.device)
    for block in _blocks(values, rows, BLOCK):
        mean += block.sum(1) / batch
    scatter = mean.new_zeros(len(rows), width, width)
    spread = mean.new_zeros(len(rows))
    for block in _blocks(values, rows, BLOCK):
        # The mean is taken off before, not off the moments after: where it is large, little else would be left.
        centred = block - mean[:, None]
        spread += torch.linalg.vector_norm(centred, dim=(1, 2)).square()
        within = centred if basis is None else centred @ basis
        scatter.baddbmm_(within.mT, within)
    return Moments(basis, mean, scatter, spread, spread + batch * mean.square().sum(1), batch)
