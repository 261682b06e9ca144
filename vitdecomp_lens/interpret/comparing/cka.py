"""Which components of two models tell the same images apart: linear centred kernel alignment."""

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import CapacityError, InputError
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.interpret.comparing.inputs import refuse_values, unvarying, without_constants
from vitdecomp_lens.interpret.comparing.matches import Matching, draws_for, matched, refuse_draws
from vitdecomp_lens.interpret.statistics import permutations as drawn_permutations

FEWEST = 4  # images; fewer have no debiased CKA


@torch.no_grad()
def match_by_cka(
    first: Decomposition,
    second: Decomposition,
    *,
    debiased: bool = True,
    permutations: int | None = None,
    seed: int = 0,
    max_bytes: int = 2**30,
) -> Matching:
    """Match components of two models by which images they tell apart: the linear CKA of their contributions.

    Neither texts nor an alignment are needed, and representations may be of different widths. Chance puts the images
    of the second model into another order, for all of its components the same.

    Args:
        first: Contributions. Select the heads first to match heads.
        second: Those of another model to the same images, in the same order.
        debiased: As for `linear_cka`.
        permutations: How often to draw chance. None for 20 times the components of the model that has more, so that a
            single match can be found among them; fewer where these would take more than 2**42 operations, but never
            fewer than 200. A drawing takes 2 · components · components · images² operations: for 2 × 36 heads at 500
            images 0.1 s on a CPU core, and there are 720 of them; for 2 × 144 heads 0.4 s, and there are 424, so that
            seven have to stand out together.
        seed: Of the drawing.
        max_bytes: Memory that may be taken beyond input and result: a number for each component and pair of images, for
            those of the second model twice.

    Raises:
        InputError: Where the two are not of equally many images, there are fewer than 4, or contributions have NaN or
            Inf.
        CapacityError: Where more memory is needed.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_spans
        >>> parts = planted_spans(images=60, d_clip=16, texts=40).parts
        >>> found = match_by_cka(parts, parts.map(2 * torch.eye(16).flip(0)), permutations=20)
        >>> all(match.component == match.other and match.mutual for match in found.matches)
        True
    """
    first, second = without_constants(first), without_constants(second)
    _refuse_other_images(first, second)
    for parts in (first, second):
        refuse_values(parts, FEWEST)
    refuse_draws(permutations, "permutations")
    dtype = accumulator(first.values.dtype, second.values.dtype)
    _refuse_size(first, second, dtype, max_bytes)
    if permutations is None:
        each = 2 * len(first) * len(second) * first.values.shape[1] ** 2
        permutations = draws_for(max(len(first), len(second)), each)
    mine, others = (_pairs(parts.values.to(first.values.device, dtype), debiased) for parts in (first, second))
    orders = drawn_permutations(others.shape[1], permutations, seed).to(others.device)

    def compare(draw: int | None) -> Float[Tensor, "first second"]:
        drawn = others if draw is None else others[:, orders[draw][:, None], orders[draw]]
        return mine.flatten(1) @ drawn.flatten(1).T

    return matched(first, second, "debiased CKA" if debiased else "CKA", compare, permutations)


@torch.no_grad()
def linear_cka(
    first: Float[Tensor, "batch d_first"], second: Float[Tensor, "others d_second"], *, debiased: bool = False
) -> float:
    """How far two sets of vectors tell the same images apart: linear centred kernel alignment.

    With the means over images taken off it is ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), in Frobenius norms. It is 1 for vectors that
    are rotated, shifted and scaled as a whole, and 0 where one of the two does not vary. By chance it is above 0, far
    above for wide vectors of few images; debiased, it is 0 on average then, and may be below.

    Args:
        first: A vector an image.
        second: Those of something else, of any width.
        debiased: Whether products of similarities are estimated without bias (Song and others, 2012).

    Raises:
        InputError: Where the two are not of equally many images, or there are fewer than 4.

    Example:
        >>> vectors = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [3.0, 3.0]])
        >>> round(linear_cka(vectors, 2 * vectors.flip(1) + 1), 5)
        1.0
    """
    if len(first) != len(second) or len(first) < FEWEST:
        raise InputError(f"Expected vectors of the same images, at least {FEWEST}; got {len(first)} and {len(second)}.")
    dtype = accumulator(first.dtype, second.dtype)
    mine, others = (_pairs(vectors[None].to(first.device, dtype), debiased) for vectors in (first, second))
    return float((mine * others).sum())


def _pairs(values: Float[Tensor, "component batch d_rep"], debiased: bool) -> Float[Tensor, "component batch batch"]:
    """How alike each two images are to each component, so that the product of two components' is their CKA."""
    components, images, _ = values.shape
    found = values.new_zeros(components, images, images)
    for row in (~unvarying(values)).nonzero()[:, 0].tolist():  # one by one, because they are large
        centred = values[row] - values[row].mean(0)
        centred /= centred.norm()
        pairs = _u_centred(centred @ centred.T) if debiased else centred @ centred.T
        torch.div(pairs, pairs.norm(), out=found[row])
    return found


def _u_centred(pairs: Float[Tensor, "batch batch"]) -> Float[Tensor, "batch batch"]:
    """What makes products of two estimates without bias: rows and columns that sum to 0 without the diagonal."""
    images = len(pairs)
    pairs.fill_diagonal_(0)
    sums = pairs.sum(1)
    pairs -= (sums[:, None] + sums) / (images - 2)
    pairs += sums.sum() / ((images - 1) * (images - 2))
    return pairs.fill_diagonal_(0)


def _refuse_other_images(first: Decomposition, second: Decomposition) -> None:
    images, others = first.values.shape[1], second.values.shape[1]
    if images != others:
        raise InputError(
            f"Expected contributions to the same images, in the same order; there are {images} and {others} images. "
            f"Decompose the same ones with both models, or match by texts."
        )


def _refuse_size(first: Decomposition, second: Decomposition, dtype: torch.dtype, max_bytes: int) -> None:
    images = first.values.shape[1]
    needed = (len(first) + 2 * len(second)) * images**2 * torch.finfo(dtype).bits // 8
    if needed > max_bytes:
        fit = int(images * (max_bytes / needed) ** 0.5)
        raise CapacityError(
            f"CKA of {len(first)} with {len(second)} components over {images} images would take "
            f"{needed / 2**20:.0f} MiB; {max_bytes / 2**20:.0f} are allowed. Compare on {fit} images, as with "
            f"parts.images(slice({fit})), select fewer components, or allow more with max_bytes=."
        )
