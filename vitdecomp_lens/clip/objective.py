"""What maps are fitted for: the cosine to the targets, and that each map is an isometry.

All maps of a fit are one matrix ``[column, d_clip]``: the maps of the components' spans, one under the other, and the
bias as the map of the last column.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vitdecomp_lens.clip.moments import Layout

METHODS = ("compalign", "compalign_paper", "unconstrained", "shared", "orthogonal")


@dataclass(frozen=True)
class Objective:
    """E[1 − cos(Σ f_i(c_i) + b, z)] + penalty · mean over components of how far f_i is from an isometry.

    How far, for ``"compalign"``: ‖WWᵀ − I‖² / r for the map W [r, d_clip] of a span of r dimensions, and, where r is
    more than d_clip and no isometry exists, ‖WᵀW − I‖² / d_clip, a *co-isometry*.

    For ``"compalign_paper"``: ‖MᵀM − I‖² / d_clip for a map M of all d_rep dimensions that is W on the span. What M is
    outside, no image sees; it is taken as what makes the term least, in closed form: there it can make up for
    d_rep − d_clip directions of the span that are too short, and for none that is too long.

    Attributes:
        method: One of `METHODS`.
        penalty: The weight of the second term.
        layout: Which rows of the maps are whose.
        d_rep: The width of components.
        d_clip: The width of targets.
    """

    method: str
    penalty: float
    layout: Layout
    d_rep: int
    d_clip: int

    def __call__(
        self, maps: Float[Tensor, "column d_clip"], rows: Tensor, units: Tensor
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The cosine distance, and the second term with its weight."""
        distance = 1 - cosine_similarity(rows @ maps, units, dim=-1).mean()
        if self.method not in ("compalign", "compalign_paper") or not self.penalty:
            return distance, torch.zeros_like(distance)
        return distance, self.penalty * self.deviation(maps)

    def deviation(self, maps: Float[Tensor, "column d_clip"]) -> Float[Tensor, ""]:
        """The mean over components of how far each map is from what the method wants of it."""
        paper, total = self.method == "compalign_paper", maps.new_zeros(())
        for rank, count, columns in self.layout.stacks:
            gram = small_gram(maps[columns].view(count, rank, self.d_clip))
            if paper and self._spare(rank):
                total = total + self._too_long(gram, self._spare(rank)).sum() / self.d_clip
            else:
                size = self.d_clip if paper else gram.shape[-1]
                identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
                total = total + (gram - identity).square().sum() / size
        return total / len(self.layout.ranks) + self._unreachable

    @property
    def least(self) -> float:
        """What the second term comes to at least: above zero where maps of the paper's kind cannot be isometries."""
        return self.penalty * self._unreachable

    @property
    def _unreachable(self) -> float:
        return max(0, self.d_clip - self.d_rep) / self.d_clip if self.method == "compalign_paper" else 0.0

    def _spare(self, rank: int) -> int:
        """How many directions outside of a span can make up for some of the span that are too short."""
        return max(0, self.d_rep - max(rank, self.d_clip))

    def _too_long(self, gram: Float[Tensor, "component r r"], spare: int) -> Float[Tensor, "component"]:
        excess = torch.linalg.eigvalsh(gram) - 1  # rising: the shortest directions come first
        made_up_for = excess[:, :spare].clamp_min(0)
        return made_up_for.square().sum(-1) + excess[:, spare:].square().sum(-1)


def small_gram(maps: Float[Tensor, "component r d_clip"]) -> Float[Tensor, "component n n"]:
    """WWᵀ, or WᵀW where that is smaller: the identity for an isometry, or for a co-isometry."""
    return maps @ maps.mT if maps.shape[1] <= maps.shape[2] else maps.mT @ maps


def nearest_isometry(maps: Float[Tensor, "*axes r d_clip"]) -> Float[Tensor, "*axes r d_clip"]:
    """The polar factor: orthonormal rows, or columns where there are more rows than columns."""
    left, _, right = torch.linalg.svd(maps, full_matrices=False)
    return left @ right


def retract(maps: Float[Tensor, "column d_clip"], layout: Layout, *, exactly: bool = False) -> None:
    """Make every map the isometry nearest to it, in place.

    Not exactly, it is four steps of Newton and Schulz, products only; from maps that a gradient step has moved, that
    is all of the precision.
    """
    for rank, count, columns in layout.stacks:
        stack = maps[columns].view(count, rank, maps.shape[1])
        if exactly:
            stack.copy_(nearest_isometry(stack))
            continue
        for _ in range(4):
            gram = small_gram(stack)
            longer = gram @ stack if rank <= maps.shape[1] else stack @ gram
            stack.mul_(1.5).sub_(longer, alpha=0.5)
