"""TextSpan: a few texts of a bank that together span what a component writes, found greedily.

Each step takes the text along which the component varies most, then takes that direction out of the component and out
of all texts (Gandelsman, Efros and Steinhardt, 2024). Only second moments over images are needed for that: a text t
has variance t Σ tᵀ. All components of a piece go through each step together, in coordinates of the few directions
that hold their values, and neither time a step nor memory depends on the number of images.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.moments import SPARE, Moments, at_once, moments_of, noise_of, numbers_for_moments
from vitdecomp_lens.interpret.pursuit import greedy
from vitdecomp_lens.interpret.readings import Piece, Spans, joined, refuse_parts

__all__ = ["VARIANTS", "text_span"]

VARIANTS: tuple[str, ...] = get_args(Literal["published", "corrected"])


@dataclass(frozen=True)
class _Request:
    """What every piece is read with."""

    texts: Float[Tensor, "text d_clip"]
    steps: int
    rank: int
    corrected: bool
    noise: float


@torch.no_grad()
def text_span(
    parts: Decomposition,
    bank: TextBank,
    *,
    steps: int = 20,
    rank: int = 80,
    variant: str = "published",
    max_bytes: int = 2**29,
) -> Spans:
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
    refuse_parts(parts, bank, images=2)
    values = parts.values.detach()
    directions = bank.directions.detach().to(values.device, torch.float64)
    request = _Request(directions, steps, min(rank, values.shape[-1]), variant == "corrected", noise_of(values.dtype))
    pieces = []
    size = _piece(request, max_bytes)
    for rows, moments in moments_of(values, parts.labels, size=size, width=request.rank + SPARE):
        pieces.append(_choose(moments, rows, request))
        del moments
    return joined(pieces, parts, bank, f"{variant} TextSpan")


def _refuse_options(steps: int, rank: int, variant: str) -> None:
    if variant not in VARIANTS:
        raise InputError(f"Expected variant= to be one of {', '.join(map(repr, VARIANTS))}; got {variant!r}.")
    for name, value in (("steps", steps), ("rank", rank)):
        if value < 1:
            raise InputError(f"Expected {name}= of at least 1; got {value}.")


def _piece(request: _Request, max_bytes: int) -> int:
    """How many components may be read at once."""
    text, d_clip = request.texts.shape
    choosing = request.rank * 3 * (text + d_clip) + 6 * text
    one = request.texts.element_size() * (numbers_for_moments(d_clip, request.rank + SPARE) + choosing)
    what = f"component of {d_clip} dimensions by {text:,} texts"
    return at_once(one, request.texts.nbytes, max_bytes, what=what, instead="take fewer texts or a smaller rank=")


def _choose(moments: Moments, rows: list[int], request: _Request) -> Piece:
    floor = request.noise**2 * moments.squares
    kept, ranks = _first_directions(moments, floor, request)
    factor = _factor(kept.mT @ moments.scatter @ kept)
    kept = moments.outside(kept)
    along = rearrange(kept, "component d_clip rank -> (component rank) d_clip") @ request.texts.T
    along = rearrange(along, "(component rank) text -> component rank text", component=len(rows))
    lengths = request.texts.square().sum(1)
    chosen, explained, found = greedy(
        along, factor, lengths, floor, steps=request.steps, at_unit_length=request.corrected
    )
    share = explained.cumsum(1) / moments.spread.where(moments.spread > 0, 1)[:, None]
    return Piece(rows, chosen, share, found @ kept.mT, moments.mean, ranks)


def _first_directions(
    moments: Moments, floor: Float[Tensor, "component"], request: _Request
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
