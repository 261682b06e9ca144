"""TextSpan: a few texts of a bank that together span what a component writes, found greedily.

Each step takes the text along which the component varies most, then takes that direction out of the component and out
of all texts (Gandelsman, Efros and Steinhardt, 2024). Only second moments over images are needed for that: a text t
has variance t Σ tᵀ. All components of a piece go through each step together, in coordinates of the few directions
that hold their values, and neither time a step nor memory depends on the number of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import CapacityError, InputError
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.interpret.readings import Reading, refuse_other_space
from vitdecomp_lens.selecting import taken

__all__ = ["VARIANTS", "text_span"]

VARIANTS: tuple[str, ...] = get_args(Literal["published", "corrected"])
# Relative to the length of all of a component's values, directions shorter than this are rounding: that of float32,
# and what covariances in double precision can tell from nothing.
NOISE = 2e-6
# A text of which less than this is left, of its own length, lies in the span of those before it.
SPENT = 1e-4
# Variances nearer to each other than this are one. So are all texts' in a component's last direction, at unit length.
TIED = 1e-6
BLOCK = 512  # images that are read at once
SPARE = 16  # directions beyond the rank, so that a component of that rank is surely held
WIDER = 3


@dataclass(frozen=True)
class _Request:
    """What every piece is read with."""

    texts: Float[Tensor, "text d_clip"]
    steps: int
    rank: int
    corrected: bool
    noise: float


@dataclass(frozen=True)
class _Moments:
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


@dataclass(frozen=True)
class _Read:
    """What was found for the components of a piece, of which ``rows`` are the numbers."""

    rows: list[int]
    chosen: Int[Tensor, "component step"]
    share: Float[Tensor, "component step"]
    directions: Float[Tensor, "component step d_clip"]
    mean: Float[Tensor, "component d_clip"]
    ranks: Int[Tensor, "component"]


@torch.no_grad()
def text_span(
    parts: Decomposition,
    bank: TextBank,
    *,
    steps: int = 20,
    rank: int = 80,
    variant: str = "published",
    max_bytes: int = 2**29,
) -> Reading:
    """The texts that span what each component writes, by TextSpan, for all components at once.

    Each step chooses the text along which what is left of the component varies most, and takes that direction out of
    component and texts. ``"published"`` is the algorithm of Gandelsman, Efros and Steinhardt (2024) as it was
    published: texts are projected onto the component's first ``rank`` right singular vectors, the mean not taken off,
    and compared as long as they then are, so that of two texts of nearly one direction the longer is favoured.
    ``"corrected"`` projects them onto the first ``rank`` principal directions around the mean, and compares them at
    unit length in each step: the text whose own direction takes most variance (of several
    that take the same, as all do in a component's last direction, the one that lies in it most).

    Directions that hold nothing but rounding are left out: ``ranks`` says how many are used, at most ``rank``. There
    are never more texts than that; with none left that the component varies along, a component's list ends. One that
    does not vary at all, a constant, has no texts and a share of 0. All is computed in double precision.

    Args:
        parts: Contributions in the space of the texts, as ``parts.map(aligner)`` gives them. Select components first
            to read some only.
        bank: The texts.
        steps: How many texts at most.
        rank: How many directions of a component at most.
        variant: ``"published"`` or ``"corrected"``.
        max_bytes: Memory that may be taken beyond input and result: components are read in pieces that need no more.

    Returns:
        Texts, cumulative shares of each component's variance, and the directions that explain them.

    Raises:
        InputError: Where parts and bank are not of one space, contributions have NaN or Inf, there are fewer than two
            images, or an option is out of range.
        CapacityError: Where a single component needs more than ``max_bytes``.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_spans
        >>> planted = planted_spans(images=6, d_clip=16, texts=20, components=1)
        >>> bank = TextBank(planted.texts, planted.directions, space="planted")
        >>> spans = text_span(planted.parts, bank, steps=5)
        >>> spans.texts["L0H0"] == list(planted.chosen["L0H0"])
        True
    """
    _refuse_options(steps, rank, variant)
    _refuse_parts(parts, bank)
    values = parts.values.detach()
    directions = bank.directions.detach().to(values.device, torch.float64)
    noise = max(NOISE, torch.finfo(values.dtype).eps)
    request = _Request(directions, steps, min(rank, values.shape[-1]), variant == "corrected", noise)
    size = _piece(request, max_bytes)
    every = list(range(len(values)))
    pieces = [
        read
        for first in every[::size]
        for read in _read(values, every[first : first + size], request, request.rank + SPARE, parts.labels)
    ]
    order = torch.tensor([row for read in pieces for row in read.rows], device=values.device).argsort()
    dtype = accumulator(values.dtype)
    return Reading(
        components=parts.components,
        bank_texts=tuple(bank.texts),
        chosen=torch.cat([read.chosen for read in pieces])[order],
        share_explained=torch.cat([read.share for read in pieces])[order].to(dtype),
        directions=torch.cat([read.directions for read in pieces])[order].to(dtype),
        mean=torch.cat([read.mean for read in pieces])[order].to(dtype),
        ranks=torch.cat([read.ranks for read in pieces])[order],
        variant=variant,
        space=bank.space,
        images=values.shape[1],
    )


def _refuse_options(steps: int, rank: int, variant: str) -> None:
    if variant not in VARIANTS:
        raise InputError(f"Expected variant= to be one of {', '.join(map(repr, VARIANTS))}; got {variant!r}.")
    for name, value in (("steps", steps), ("rank", rank)):
        if value < 1:
            raise InputError(f"Expected {name}= of at least 1; got {value}.")


def _refuse_parts(parts: Decomposition, bank: TextBank) -> None:
    if not isinstance(parts, Decomposition) or not isinstance(bank, TextBank):
        raise InputError(f"Expected a Decomposition and a TextBank; got {type(parts).__name__}, {type(bank).__name__}.")
    component, batch, width = parts.values.shape
    if not component:
        raise InputError("Expected at least one component to read; the decomposition has none.")
    if batch < 2:
        raise InputError(
            f"Expected at least 2 images, since texts are chosen by variance over images; got {batch}. "
            f"Decomposition.cat([...]) joins batches."
        )
    refuse_other_space(parts.metadata, bank.space)
    if width != bank.directions.shape[1]:
        raise InputError(
            f"Expected contributions and texts of one space; the contributions have {width} dimensions, the texts of "
            f"{bank.space!r} {bank.directions.shape[1]}. Take them there with parts.map(aligner) first."
        )


def _piece(request: _Request, max_bytes: int) -> int:
    """How many components may be read at once."""
    text, d_clip = request.texts.shape
    width = min(d_clip, request.rank + SPARE)
    blocks = BLOCK * (2 * d_clip + width)
    moments = 5 * d_clip * (width + d_clip)  # in the worst case, along all dimensions
    choosing = request.rank * 3 * (text + d_clip) + 6 * text
    one = request.texts.element_size() * (blocks + moments + choosing)
    free = max_bytes - request.texts.nbytes
    if one > free:
        raise CapacityError(
            f"Reading one component of {d_clip} dimensions by {text:,} texts takes about "
            f"{one + request.texts.nbytes:,} bytes, more than "
            f"max_bytes={max_bytes:,} allows. Raise max_bytes=, or take fewer texts or a smaller rank=."
        )
    return free // one


def _read(
    values: Float[Tensor, "component batch d_clip"],
    rows: list[int],
    request: _Request,
    width: int,
    labels: tuple[str, ...],
) -> Iterator[_Read]:
    """Read some components within ``width`` directions; those that need more, in wider ones.

    A head writes into few of the space's dimensions. To find these takes a pass over its values and a product with
    ``width`` columns, a small part of what the scatter in all dimensions would take.
    """
    basis = None if width >= values.shape[-1] else _row_space(values, rows, width)
    moments = _moments(values, rows, basis)
    _refuse_not_finite(moments, rows, labels)
    held = moments.missed() <= request.noise**2 * moments.squares
    if basis is None:
        held = torch.ones_like(held)
    inside = [row for row, is_held in zip(rows, held.tolist(), strict=True) if is_held]
    outside = [row for row, is_held in zip(rows, held.tolist(), strict=True) if not is_held]
    if inside:
        yield _choose(_kept(moments, held), inside, request)
    del basis, moments, held
    if outside:
        yield from _read(values, outside, request, width * WIDER, labels)


def _kept(moments: _Moments, held: Bool[Tensor, "component"]) -> _Moments:
    if bool(held.all()):
        return moments
    basis = None if moments.basis is None else moments.basis[held]
    tensors = (moments.mean[held], moments.scatter[held], moments.spread[held], moments.squares[held])
    return _Moments(basis, *tensors, moments.images)


def _refuse_not_finite(moments: _Moments, rows: list[int], labels: tuple[str, ...]) -> None:
    for row, is_finite in zip(rows, torch.isfinite(moments.squares).tolist(), strict=True):
        if not is_finite:
            raise InputError(
                f"Expected finite contributions; those of {labels[row]!r} have NaN or Inf, or are too large to be "
                f"squared. Look at the images with parts[{labels[row]!r}]."
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
) -> _Moments:
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
    return _Moments(basis, mean, scatter, spread, spread + batch * mean.square().sum(1), batch)


def _choose(moments: _Moments, rows: list[int], request: _Request) -> _Read:
    floor = request.noise**2 * moments.squares
    kept, ranks = _first_directions(moments, floor, request)
    factor = _factor(kept.mT @ moments.scatter @ kept)
    kept = kept if moments.basis is None else moments.basis @ kept
    along = rearrange(kept, "component d_clip rank -> (component rank) d_clip") @ request.texts.T
    along = rearrange(along, "(component rank) text -> component rank text", component=len(rows))
    chosen, explained, found = _greedy(along, factor, request, floor)
    share = explained.cumsum(1) / moments.spread.where(moments.spread > 0, 1)[:, None]
    return _Read(rows, chosen, share, found @ kept.mT, moments.mean, ranks)


def _first_directions(
    moments: _Moments, floor: Float[Tensor, "component"], request: _Request
) -> tuple[Float[Tensor, "component width rank"], Int[Tensor, "component"]]:
    """The directions in which texts are compared, as columns, zero beyond each component's rank; and the ranks."""
    second = moments.scatter
    if not request.corrected:
        mean = moments.mean_within
        second = second + moments.images * mean[:, :, None] * mean[:, None]
    squares, directions = (tensor.flip(-1) for tensor in torch.linalg.eigh(second))
    ranks = (squares > floor[:, None]).sum(1).clamp(max=request.rank)
    kept = directions[..., : max(1, int(ranks.max()))]
    return kept * (torch.arange(kept.shape[-1], device=kept.device) < ranks[:, None])[:, None], ranks


def _factor(scatter: Float[Tensor, "component rank rank"]) -> Float[Tensor, "component rank rank"]:
    """L with L Lᵀ = scatter."""
    squares, directions = torch.linalg.eigh(scatter)
    return directions * squares.clamp(min=0).sqrt()[:, None]


def _greedy(
    along: Float[Tensor, "component rank text"],
    factor: Float[Tensor, "component rank rank"],
    request: _Request,
    floor: Float[Tensor, "component"],
) -> tuple[Int[Tensor, "component step"], Float[Tensor, "component step"], Float[Tensor, "component step rank"]]:
    """The texts chosen, the scatter each explains, and the orthonormal directions.

    Directions taken out are orthogonal to each other, so that along a new one, what is left of a text and all of the
    text are the same. So only two things change from step to step, both by a product of two vectors: what the factor
    reads in the texts, and how long the texts still are. Scores are summed anew from what the factor reads; taken off
    step by step they would keep the rounding of the first, largest ones.
    """
    component, rank, _ = along.shape
    lengths = request.texts.square().sum(1)
    read = factor.mT @ along
    left = along.square().sum(1)
    chosen = torch.full((component, request.steps), -1, device=along.device)
    explained = along.new_zeros(component, request.steps)
    found = along.new_zeros(component, request.steps, rank)
    for step in range(min(request.steps, rank)):
        seen = read.square().sum(1)
        usable = (left > SPENT**2 * lengths) & (seen > floor[:, None] * left)
        number = _best(seen, left, usable, request.corrected)
        goes_on = usable.gather(1, number)
        if not bool(goes_on.any()):
            break
        text = along.gather(2, number[:, None].expand(-1, rank, 1))[..., 0]
        direction = _orthonormal_to(found, text).where(goes_on, 0)
        amounts = (direction[:, None] @ along)[:, 0]
        taken = (direction[:, None] @ factor)[:, 0]
        read.baddbmm_(taken[:, :, None], amounts[:, None], alpha=-1)
        left -= amounts.square()
        chosen[:, step] = number.where(goes_on, -1)[:, 0]
        explained[:, step] = taken.square().sum(1)
        found[:, step] = direction
    return chosen, explained, found


def _best(
    seen: Float[Tensor, "component text"],
    left: Float[Tensor, "component text"],
    usable: Bool[Tensor, "component text"],
    corrected: bool,
) -> Int[Tensor, "component 1"]:
    """The text of most variance; of texts that tie at unit length, the one of which most is left there."""
    if corrected:
        each = (seen / left).where(usable, 0)
        usable = usable & (each >= (1 - TIED) * each.amax(1, keepdim=True))
    return seen.where(usable, -1).argmax(1, keepdim=True)


def _orthonormal_to(
    found: Float[Tensor, "component step rank"], text: Float[Tensor, "component rank"]
) -> Float[Tensor, "component rank"]:
    """What a text has beyond orthonormal directions, at unit length. Twice, as once leaves the rounding of the text."""
    for _ in range(2):
        text = text - (found.mT @ (found @ text[..., None]))[..., 0]
    return torch.nn.functional.normalize(text, dim=-1, eps=torch.finfo(text.dtype).tiny)
