"""The greedy choice that TextSpan, OMP and simultaneous OMP share.

Each step takes the text that sees most of what is left, and takes its direction out. The three differ in what they
look at: TextSpan at texts as far as they lie within a component, OMP at whole texts and a single vector, simultaneous
OMP at whole texts and all images of a component.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# A text of which less than this is left, of its own length, lies in the span of those before it.
SPENT = 1e-4
# Variances nearer to each other than this are one. So are all texts' in a component's last direction, at unit length.
TIED = 1e-6


def greedy(
    texts: Float[Tensor, "width text"] | Float[Tensor, "row width text"],
    factor: Float[Tensor, "row width image"],
    lengths: Float[Tensor, "text"],
    floor: Float[Tensor, "row"],
    *,
    steps: int,
    at_unit_length: bool = False,
) -> tuple[Int[Tensor, "row step"], Float[Tensor, "row step"], Float[Tensor, "row step width"]]:
    """The texts chosen, the squares each explains, and the orthonormal directions.

    Directions taken out are orthogonal to each other, so that along a new one, what is left of a text and all of the
    text are the same. So only two things change from step to step, both by a product of two vectors: what the factor
    reads in the texts, and how long the texts still are. Scores are summed anew from what the factor reads; taken off
    step by step they would keep the rounding of the first, largest ones.

    Args:
        texts: As columns: the same for all rows, or each row's own.
        factor: What is to be explained, as columns; any L with L Lᵀ = Σ over images of x xᵀ does for images x.
        lengths: The texts' squared lengths, of which too little may be left for a text to be chosen.
        floor: Squares below this are rounding.
        steps: How many texts at most.
        at_unit_length: Whether what is left of a text is compared at unit length, or as long as it then is.
    """
    row, width, _ = factor.shape
    read = factor.mT @ texts if texts.ndim == 3 else _through(factor.mT, texts)
    left = texts.square().sum(-2).expand(row, -1).clone()
    chosen = torch.full((row, steps), -1, device=factor.device)
    explained = factor.new_zeros(row, steps)
    found = factor.new_zeros(row, steps, width)
    for step in range(min(steps, width)):
        seen = read.square().sum(1)
        usable = (left > SPENT**2 * lengths) & (seen > floor[:, None] * left)
        number = _best(seen, left, usable, at_unit_length)
        goes_on = usable.gather(1, number)
        if not bool(goes_on.any()):
            break
        direction = _orthonormal_to(found, _columns(texts, number)).where(goes_on, 0)
        amounts = direction @ texts if texts.ndim == 2 else (direction[:, None] @ texts)[:, 0]
        taken = (direction[:, None] @ factor)[:, 0]
        read.baddbmm_(taken[:, :, None], amounts[:, None], alpha=-1)
        left -= amounts.square()
        chosen[:, step] = number.where(goes_on, -1)[:, 0]
        explained[:, step] = taken.square().sum(1)
        found[:, step] = direction
    return chosen, explained, found


def _through(
    rows: Float[Tensor, "row image width"], texts: Float[Tensor, "width text"]
) -> Float[Tensor, "row image text"]:
    """One product for all rows, of which none needs its own copy of the texts."""
    return (rows.flatten(0, 1) @ texts).unflatten(0, rows.shape[:2])


def _columns(
    texts: Float[Tensor, "width text"] | Float[Tensor, "row width text"], number: Int[Tensor, "row 1"]
) -> Float[Tensor, "row width"]:
    if texts.ndim == 2:
        return texts.T[number[:, 0]]
    return texts.gather(2, number[:, None].expand(-1, texts.shape[1], 1))[..., 0]


def _best(
    seen: Float[Tensor, "row text"],
    left: Float[Tensor, "row text"],
    usable: Bool[Tensor, "row text"],
    at_unit_length: bool,
) -> Int[Tensor, "row 1"]:
    """The text that sees most; of texts that tie at unit length, the one of which most is left there."""
    if at_unit_length:
        each = (seen / left).where(usable, 0)
        usable = usable & (each >= (1 - TIED) * each.amax(1, keepdim=True))
    return seen.where(usable, -1).argmax(1, keepdim=True)


def _orthonormal_to(
    found: Float[Tensor, "row step width"], text: Float[Tensor, "row width"]
) -> Float[Tensor, "row width"]:
    """What a text has beyond orthonormal directions, at unit length. Twice, as once leaves the rounding of the text."""
    for _ in range(2):
        text = text - (found.mT @ (found @ text[..., None]))[..., 0]
    return torch.nn.functional.normalize(text, dim=-1, eps=torch.finfo(text.dtype).tiny)
