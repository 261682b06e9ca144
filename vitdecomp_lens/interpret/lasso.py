"""The non-negative lasso: each vector as a sum of a few texts in amounts above zero, as SpLiCE codes images.

For a vector x of unit length and texts t_j it is the w ≥ 0 that minimises ½ ‖x − Σ w_j t_j‖² + penalty Σ w_j. It is
found by an active set: the best fit of the texts that are in is made by Newton steps, as long as amounts stay above
zero; a text that reaches zero goes out; once the fit is made, the text that would help most comes in. Nothing else is
tuned, and what it ends at is the minimum: the conditions for that are what ends it.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.moments import at_once
from vitdecomp_lens.interpret.readings import Codes, combined, refuse_parts
from vitdecomp_lens.interpret.vectors import Found, Vectors

__all__ = ["nonnegative_lasso"]

SLOTS = 32  # texts that a vector is given room for at first
# How nearly the conditions for a minimum hold, at unit length.
SETTLED = 1e-10
# Added to products of texts with themselves: where one is a sum of others, steps towards the minimum stay finite.
RIDGE = 1e-12
ROUNDS = 50  # for each slot; twice or three times a text is usual


@torch.no_grad()
def nonnegative_lasso(
    parts: Decomposition,
    bank: TextBank,
    *,
    centre: bool | Float[Tensor, "component d_clip"],
    penalty: float = 0.1,
    max_bytes: int = 2**29,
) -> Codes:
    """A few texts for each single contribution, in amounts above zero, by the lasso; for all of them at once.

    It minimises ½ ‖x/‖x‖ − Σ w t‖² + penalty Σ w over w ≥ 0, for each vector x, once ``centre`` is taken off; the
    amounts are ‖x‖ w. So the penalty compares with cosines: from the largest cosine of a text with x on, there are no
    texts; and in the end every text that is in has the product ``penalty`` with what is left of x/‖x‖, and none more.
    (SpLiCE, arXiv 2402.10376, codes image embeddings so, with images and texts centred by their means and at unit
    length: ``nonnegative_lasso(representation(parts), bank.centred(), centre=True)``. Amounts are those of the minimum,
    and shrunk by the penalty.) A vector that is zero once the mean is taken off, as all of a constant are, has no texts
    and a share of 0. All is computed in double precision; the conditions for the minimum hold to 1e-10.

    Args:
        parts: Contributions in the space of the texts, as ``parts.map(aligner)`` gives them. For what the model as a
            whole says, ``representation(parts)``.
        bank: The texts; ``bank.centred()`` to take their mean off, too.
        centre: What is taken off the vectors: with True each component's mean over these images; with False nothing;
            else a vector for each component, such as a mean over other images.
        penalty: From 0, for non-negative least squares, to below 1. With more, fewer texts.
        max_bytes: Memory that may be taken beyond the input and twice the result: vectors are read in
            pieces that need no more.

    Returns:
        Texts, amounts and cumulative shares of each vector's squared length. There are as many steps as the vector of
        most texts has.

    Raises:
        InputError: Where parts and bank are not of one space, contributions have NaN or Inf, an option is out of
            range, or texts are so nearly dependent that there is no telling them apart.
        CapacityError: Where a single vector needs more than ``max_bytes``.

    Example:
        >>> bank = TextBank(["a cat", "a dog", "a car"], torch.eye(3), space="example")
        >>> parts = Decomposition(torch.tensor([[[0.0, 4.0, -3.0]]]), ("L0H0",))
        >>> nonnegative_lasso(parts, bank, centre=False, penalty=0.1).code("L0H0")
        (('a dog', 3.5),)
    """
    if not 0 <= penalty < 1:
        raise InputError(
            f"Expected penalty= from 0 to below 1, as it is compared with cosines; got {penalty}. With more, fewer "
            f"texts are in."
        )
    refuse_parts(parts, bank)
    vectors = Vectors.of(parts, centre)
    texts = bank.directions.detach().to(vectors.mean)
    texts = torch.cat([texts, torch.zeros_like(texts[:1])])  # an empty slot holds the last, which is nothing
    most = min(len(bank), texts.shape[1] + 1)  # more texts are never independent
    found, slots, waiting = [], min(SLOTS, most), torch.arange(len(vectors), device=texts.device)
    while len(waiting):
        later = []
        for numbers in waiting.split(_size(texts, slots, max_bytes, vectors.mean.nbytes)):
            solved = _solved(vectors[numbers][0], texts, penalty, slots)
            found.append(Found(numbers[solved.done], solved.chosen, solved.amounts, solved.shares))
            later.append(numbers[~solved.done])
        waiting = torch.cat(later)
        if len(waiting) and slots == most:
            raise _dependent()
        slots = min(2 * slots, most)
    return vectors.codes(found, parts, bank, f"non-negative lasso, penalty {penalty:g}")


def _size(texts: Float[Tensor, "text_and_none d_clip"], slots: int, max_bytes: int, mean_bytes: int) -> int:
    """How many vectors may be solved at once."""
    text, d_clip = texts.shape
    one = texts.element_size() * (3 * text + (slots + 8) * d_clip + 8 * slots**2 + 16 * slots)
    what = f"vector of {d_clip} dimensions by {text - 1:,} texts, of which it needs {slots},"
    return at_once(
        one, 2 * texts.nbytes + mean_bytes, max_bytes, what=what, instead="take fewer texts or a larger penalty="
    )


def _dependent() -> InputError:
    return InputError(
        "Expected texts that can be told apart; their amounts do not settle. Raise penalty=, or leave out texts that "
        "are nearly sums of others."
    )


@dataclass(frozen=True)
class _Solved:
    """What was found for those vectors that are done; the others need more slots."""

    done: Bool[Tensor, "vector"]
    chosen: Int[Tensor, "found step"]
    amounts: Float[Tensor, "found step"]
    shares: Float[Tensor, "found step"]


@dataclass(frozen=True)
class _Active:
    """Vectors that are being solved.

    Attributes:
        rows: Their numbers in the piece.
        vectors: At unit length.
        slots: The texts that are in, and the number of none where a slot is empty.
        weights: How much of each; 0 in empty slots.
        gram: Products of the texts that are in; 1 on the diagonal of empty slots.
    """

    rows: Int[Tensor, "vector"]
    vectors: Float[Tensor, "vector d_clip"]
    slots: Int[Tensor, "vector slot"]
    weights: Float[Tensor, "vector slot"]
    gram: Float[Tensor, "vector slot slot"]

    def of(self, kept: Bool[Tensor, "vector"]) -> "_Active":
        """Some of them."""
        if bool(kept.all()):
            return self
        return _Active(self.rows[kept], self.vectors[kept], self.slots[kept], self.weights[kept], self.gram[kept])


def _solved(
    vectors: Float[Tensor, "vector d_clip"], texts: Float[Tensor, "text_and_none d_clip"], penalty: float, slots: int
) -> _Solved:
    count, none = len(vectors), len(texts) - 1
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    done = torch.zeros(count, dtype=torch.bool, device=vectors.device)
    chosen = torch.full((count, slots), -1, device=vectors.device)
    amounts, shares = vectors.new_zeros(count, slots), vectors.new_zeros(count, slots)
    active = _Active(
        rows=torch.arange(count, device=vectors.device),
        vectors=vectors / lengths.where(lengths > 0, 1),
        slots=torch.full((count, slots), none, device=vectors.device),
        weights=vectors.new_zeros(count, slots),
        gram=torch.eye(slots, dtype=vectors.dtype, device=vectors.device).repeat(count, 1, 1),
    )
    for _ in range(ROUNDS * (slots + 1)):
        gradient, best, gain = _looked_at(active, texts, penalty)
        settled = gradient.abs().amax(1) <= SETTLED
        finished = settled & (gain <= SETTLED)
        rows = active.rows[finished]
        done[rows] = True
        chosen[rows], amounts[rows], shares[rows] = _code(active.of(finished), gradient[finished] + penalty, none)
        is_full = (active.slots < none).all(1)
        going_on = ~finished & ~(settled & is_full)
        if not bool(going_on.any()):
            break
        active = active.of(going_on)
        gradient, best, gain, settled = gradient[going_on], best[going_on], gain[going_on], settled[going_on]
        _let_in(active, gradient, best, gain, settled, texts)
        active = _stepped(active, gradient, none)
    else:
        raise _dependent()
    widest = max(1, int((chosen >= 0).sum(1).max()))
    return _Solved(done, chosen[done, :widest], (amounts * lengths)[done, :widest], shares[done, :widest])


def _looked_at(
    active: _Active, texts: Float[Tensor, "text_and_none d_clip"], penalty: float
) -> tuple[Float[Tensor, "vector slot"], Int[Tensor, "vector"], Float[Tensor, "vector"]]:
    """How much better it gets with more of each text that is in; the best of the others, and the same for it."""
    left = active.vectors - combined(active.slots, active.weights, texts)
    gains = left @ texts.T - penalty
    gradient = gains.gather(1, active.slots).where(active.slots < len(texts) - 1, 0)
    gains.scatter_(1, active.slots, -torch.inf)
    gains[:, -1] = -torch.inf
    gain, best = gains.max(1)
    return gradient, best, gain


def _let_in(
    active: _Active,
    gradient: Float[Tensor, "vector slot"],
    best: Int[Tensor, "vector"],
    gain: Float[Tensor, "vector"],
    settled: Bool[Tensor, "vector"],
    texts: Float[Tensor, "text_and_none d_clip"],
) -> None:
    """Put the best text into an empty slot of the vectors whose fit is made; in place."""
    rows = settled.nonzero()[:, 0]
    slot = (active.slots[rows] == len(texts) - 1).int().argmax(1)
    active.slots[rows, slot] = best[rows]
    gradient[rows, slot] = gain[rows]
    products = (texts[active.slots[rows]] @ texts[best[rows]][:, :, None])[..., 0]
    active.gram[rows, slot] = products
    active.gram[rows, :, slot] = products


def _stepped(active: _Active, gradient: Float[Tensor, "vector slot"], none: int) -> _Active:
    """A Newton step, as far as amounts stay above zero; what gets there goes out."""
    ridge = RIDGE * torch.eye(gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
    change = torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky(active.gram + ridge))[..., 0]
    reach = (active.weights / -change).where((change < 0) & (active.slots < none), torch.inf)
    length = reach.amin(1, keepdim=True).clamp(max=1)
    weights = active.weights + length * change
    is_in = (active.slots < none) & (reach > length) & (weights > 0)
    gram = active.gram * (is_in[:, :, None] & is_in[:, None]) + torch.diag_embed((~is_in).to(weights))
    return replace(active, slots=active.slots.where(is_in, none), weights=weights.where(is_in, 0), gram=gram)


def _code(
    active: _Active, products: Float[Tensor, "vector slot"], none: int
) -> tuple[Int[Tensor, "vector slot"], Float[Tensor, "vector slot"], Float[Tensor, "vector slot"]]:
    """Texts, amounts and shares, the largest amount first.

    Of a vector x at unit length, y leaves 1 − ‖x − y‖² = 2⟨x, y⟩ − ‖y‖² explained.

    Args:
        active: Vectors that are done.
        products: ⟨text, what is left⟩ for the texts that are in.
        none: The number of none.
    """
    fitted = (active.gram @ active.weights[..., None])[..., 0] + products
    order = active.weights.argsort(dim=1, descending=True, stable=True)
    weights, slots = active.weights.gather(1, order), active.slots.gather(1, order)
    terms = active.gram * active.weights[:, :, None] * active.weights[:, None]
    terms = terms.gather(1, order[:, :, None].expand_as(terms)).gather(2, order[:, None].expand_as(terms))
    squares = torch.diagonal(terms.cumsum(1).cumsum(2), dim1=1, dim2=2)
    return slots.where(slots < none, -1), weights, 2 * (weights * fitted.gather(1, order)).cumsum(1) - squares
