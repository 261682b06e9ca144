"""Sparse codes found greedily: orthogonal matching pursuit of single vectors, and of all images of a component at once.

Both explain vectors by texts as they are, in all dimensions of the space: each step takes the text along which most is
left, then fits all texts so far anew by least squares. (TextSpan compares texts only as far as they lie in the
directions that a component writes into; without that projection it would be simultaneous OMP.)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.moments import Moments, at_once, moments_of, noise_of, numbers_for_moments
from vitdecomp_lens.interpret.pursuit import greedy
from vitdecomp_lens.interpret.readings import Codes, Piece, Spans, joined, on_texts, refuse_parts
from vitdecomp_lens.interpret.vectors import Found, Vectors, taken_off

__all__ = ["omp", "simultaneous_omp"]

WIDTH = 96  # directions that are looked at first: more than a head writes into
INSTEAD = "take fewer texts or fewer steps="


@torch.no_grad()
def omp(
    parts: Decomposition,
    bank: TextBank,
    *,
    centre: bool | Float[Tensor, "component d_clip"],
    steps: int = 10,
    max_bytes: int = 2**29,
) -> Codes:
    """A few texts for each single contribution, by orthogonal matching pursuit; for all of them at once.

    Each step takes the text whose product with what is left of the vector is largest, of either sign, and fits all
    texts so far anew. What is left is orthogonal to them, and none is chosen twice. A list ends before ``steps`` where
    nothing but rounding is left, or every other text lies in the span of those chosen. A vector that is zero once the
    mean is taken off, as all of a constant are, has no texts and a share of 0. All is computed in double precision.

    Args:
        parts: Contributions in the space of the texts, as ``parts.map(aligner)`` gives them. For what the model as a
            whole says, ``representation(parts)``.
        bank: The texts; ``bank.centred()`` to take their mean off, too.
        centre: What is taken off the vectors: with True each component's mean over these images; with False nothing;
            else a vector for each component, such as a mean over other images.
        steps: How many texts at most.
        max_bytes: Memory that may be taken beyond the input and twice the result: vectors are read in
            pieces that need no more.

    Returns:
        Texts, amounts and cumulative shares of each vector's squared length.

    Raises:
        InputError: Where parts and bank are not of one space, contributions have NaN or Inf, or an option is out of
            range.
        CapacityError: Where a single vector needs more than ``max_bytes``.

    Example:
        >>> bank = TextBank(["a cat", "a dog", "a car"], torch.eye(3), space="example")
        >>> parts = Decomposition(torch.tensor([[[0.0, 2.0, -1.0]]]), ("L0H0",))
        >>> omp(parts, bank, centre=False).code("L0H0")
        (('a dog', 2.0), ('a car', -1.0))
    """
    refuse_steps(steps)
    refuse_parts(parts, bank)
    vectors = Vectors.of(parts, centre)
    texts = bank.directions.detach().to(vectors.mean)
    text, d_clip = texts.shape
    one = texts.element_size() * (7 * text + 3 * steps * d_clip + 8 * d_clip + 4 * steps**2)
    what = f"vector of {d_clip} dimensions by {text:,} texts"
    size = at_once(one, 2 * texts.nbytes + vectors.mean.nbytes, max_bytes, what=what, instead=INSTEAD)
    numbers = torch.arange(len(vectors), device=texts.device)
    found = [Found(piece, *_pursued(*vectors[piece], texts, steps)) for piece in numbers.split(size)]
    return vectors.codes(found, parts, bank, "OMP")


def _pursued(
    vectors: Float[Tensor, "vector d_clip"],
    floor: Float[Tensor, "vector"],
    texts: Float[Tensor, "text d_clip"],
    steps: int,
) -> tuple[Int[Tensor, "vector step"], Float[Tensor, "vector step"], Float[Tensor, "vector step"]]:
    """Texts, amounts and shares."""
    chosen, explained, found = greedy(texts.T, vectors[:, :, None], texts.square().sum(1), floor, steps=steps)
    scores = found @ vectors[:, :, None]
    within = texts[chosen.clamp(min=0)] @ found.mT
    squares = vectors.square().sum(1, keepdim=True)
    shares = explained.cumsum(1) / squares.where(squares > 0, 1)
    return chosen, on_texts(scores.mT, within, chosen)[:, 0], shares


@torch.no_grad()
def simultaneous_omp(
    parts: Decomposition,
    bank: TextBank,
    *,
    steps: int = 20,
    centre: bool | Float[Tensor, "component d_clip"] = True,
    max_bytes: int = 2**29,
) -> Spans:
    """A few texts for each component, the same for all its images, by simultaneous orthogonal matching pursuit.

    Each step takes the text t with the largest Σ ⟨t, what is left⟩² over images, and fits all images anew by the texts
    so far. Only second moments over images are needed for that, so that neither time a step nor memory depends on
    their number. (Head Pursuit, arXiv 2510.21518, reads attention heads by simultaneous OMP.) Lists end as those of
    `omp` do. All is computed in double precision.

    Args:
        parts: Contributions in the space of the texts, as ``parts.map(aligner)`` gives them.
        bank: The texts; ``bank.centred()`` to take their mean off, too.
        steps: How many texts at most.
        centre: What is taken off the contributions: with True each component's mean over these images, so that texts
            explain how it varies; with False nothing; else a vector for each component.
        max_bytes: Memory that may be taken beyond input and result: components are read in pieces that need no more.

    Returns:
        Texts, cumulative shares of each component's variance, and the directions that explain them.

    Raises:
        InputError: Where parts and bank are not of one space, contributions have NaN or Inf, there is only one image
            to centre, or an option is out of range.
        CapacityError: Where a single component needs more than ``max_bytes``.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_spans
        >>> planted = planted_spans(images=6, d_clip=16, texts=20, components=1)
        >>> bank = TextBank(planted.texts, planted.directions, space="planted")
        >>> simultaneous_omp(planted.parts, bank).texts["L0H0"] == list(planted.chosen["L0H0"])
        True
    """
    refuse_steps(steps)
    refuse_parts(parts, bank)
    values, mean = parts.values.detach(), taken_off(parts, centre)
    texts = bank.directions.detach().to(values.device, torch.float64)
    text, d_clip = texts.shape
    choosing = (d_clip + 1) * (4 * d_clip + 2 * text) + 2 * steps * d_clip + 6 * text
    one = texts.element_size() * (numbers_for_moments(d_clip, WIDTH) + choosing)
    what = f"component of {d_clip} dimensions by {text:,} texts"
    fixed = 2 * texts.nbytes + (0 if mean is None else mean.nbytes)
    size = at_once(one, fixed, max_bytes, what=what, instead=INSTEAD)
    pieces = []
    for rows, moments in moments_of(values, parts.labels, size=size, width=WIDTH):
        around = moments.mean if mean is None else mean[rows]
        pieces.append(_spanned(moments, rows, around, texts, steps, noise_of(values.dtype)))
        del moments
    return joined(pieces, parts, bank, "simultaneous OMP")


def _spanned(
    moments: Moments,
    rows: list[int],
    around: Float[Tensor, "component d_clip"],
    texts: Float[Tensor, "text d_clip"],
    steps: int,
    noise: float,
) -> Piece:
    floor = noise**2 * (moments.squares + moments.images * around.square().sum(1))
    factor = _factor(moments, around, floor)
    ranks = (torch.linalg.eigvalsh(factor.mT @ factor) > floor[:, None]).sum(1)
    chosen, explained, directions = greedy(texts.T, factor, texts.square().sum(1), floor, steps=steps)
    squares = factor.square().sum((1, 2))
    share = explained.cumsum(1) / squares.where(squares > 0, 1)[:, None]
    return Piece(rows, chosen, share, directions, around, ranks)


def _factor(
    moments: Moments, around: Float[Tensor, "component d_clip"], floor: Float[Tensor, "component"]
) -> Float[Tensor, "component d_clip rank"]:
    """L with L Lᵀ = Σ over images of x xᵀ, for vectors x around some point; without what is rounding."""
    squares, directions = (tensor.flip(-1) for tensor in torch.linalg.eigh(moments.scatter))
    squares = squares.where(squares > floor[:, None], 0)
    kept = max(1, int((squares > 0).sum(1).max()))
    factor = moments.outside(directions[..., :kept] * squares[:, None, :kept].sqrt())
    # The scatter is around the mean. Around another point it is as if there was one more image, which shows where.
    offset = moments.images**0.5 * (moments.mean - around)
    return torch.cat([factor, offset[:, :, None]], dim=2) if bool(offset.any()) else factor


def refuse_steps(steps: int) -> None:
    """Refuse less than one step."""
    if steps < 1:
        raise InputError(f"Expected steps= of at least 1; got {steps}.")
