"""Single vectors to be coded one by one: each component's contribution to each image, minus what is taken off.

They are told apart by one number, images of the first component first, and made in double precision, a few at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.interpret.moments import BLOCK, noise_of, not_finite
from vitdecomp_lens.interpret.readings import Codes

Centre = bool | Float[Tensor, "component d_clip"]


def taken_off(parts: Decomposition, centre: Centre) -> Float[Tensor, "component d_clip"] | None:
    """What is taken off each component's vectors, in double precision; None stands for its mean over the images.

    Raises:
        InputError: Where there is but one image, or vectors that are given do not fit or are not finite.
    """
    component, batch, d_clip = parts.values.shape
    if isinstance(centre, Tensor):
        if centre.shape != (component, d_clip) or not bool(centre.isfinite().all()):
            raise InputError(
                f'Expected centre= as finite Float[Tensor, "component d_clip"] of shape {(component, d_clip)}; got '
                f"shape {tuple(centre.shape)}. A mean over other images is reference.values.mean(1)."
            )
        return centre.detach().to(parts.values.device, torch.float64)
    if not isinstance(centre, bool):
        raise InputError(f"Expected centre= to be True, False or vectors to take off; got {centre!r}.")
    if not centre:
        return parts.values.new_zeros((component, d_clip), dtype=torch.float64)
    if batch < 2:
        raise InputError(
            f"Expected at least 2 images for centre=True, as of {batch} nothing is left around the mean. Pass the "
            f"mean over other images, centre=reference.values.mean(1), or centre=False."
        )
    return None


@dataclass(frozen=True, eq=False)
class Found:
    """The codes of some vectors, of whatever number of steps, by the vectors' ``numbers``."""

    numbers: Int[Tensor, "vector"]
    chosen: Int[Tensor, "vector step"]
    amounts: Float[Tensor, "vector step"]
    shares: Float[Tensor, "vector step"]


@dataclass(frozen=True, eq=False)
class Vectors:
    """All single vectors of a decomposition, around ``mean``."""

    values: Float[Tensor, "component batch d_clip"]
    labels: tuple[str, ...]
    mean: Float[Tensor, "component d_clip"]

    @classmethod
    def of(cls, parts: Decomposition, centre: Centre) -> "Vectors":
        """Those of a decomposition.

        Raises:
            InputError: As `taken_off`.
        """
        values, mean = parts.values.detach(), taken_off(parts, centre)
        if mean is None:
            mean = sum(block.sum(1, dtype=torch.float64) for block in values.split(BLOCK, dim=1)) / values.shape[1]
        return cls(values, parts.labels, mean)

    def __len__(self) -> int:
        return self.values.shape[0] * self.values.shape[1]

    def __getitem__(
        self, numbers: Int[Tensor, "vector"]
    ) -> tuple[Float[Tensor, "vector d_clip"], Float[Tensor, "vector"]]:
        """Some vectors, and the squares below which they hold nothing but rounding; those that do are zero.

        Raises:
            InputError: Where one is not finite; it names the component.
        """
        batch = self.values.shape[1]
        component = numbers // batch
        whole, mean = self.values[component, numbers % batch].double(), self.mean[component]
        vectors = whole - mean
        squares = vectors.square().sum(1)
        if not bool(squares.isfinite().all()):
            raise not_finite(self.labels[int(component[~squares.isfinite()][0])])
        floor = noise_of(self.values.dtype) ** 2 * (whole.square().sum(1) + mean.square().sum(1))
        return vectors.where((squares > floor)[:, None], 0), floor

    def codes(self, found: Sequence[Found], parts: Decomposition, bank: TextBank, method: str) -> Codes:
        """Put together what was found for all vectors.

        Args:
            found: Every vector in one of them.
            parts: Where the vectors are from.
            bank: The texts.
            method: How it was found.
        """
        shape, dtype = self.values.shape[:2], accumulator(self.values.dtype)
        steps = max(some.chosen.shape[1] for some in found)
        chosen = torch.full((len(self), steps), -1, device=self.values.device)
        amounts, shares = (torch.zeros(len(self), steps, dtype=dtype, device=self.values.device) for _ in range(2))
        for some in found:
            own = some.chosen.shape[1]
            chosen[some.numbers, :own] = some.chosen
            amounts[some.numbers, :own] = some.amounts.to(dtype)
            shares[some.numbers, :own] = some.shares.to(dtype)
            shares[some.numbers, own:] = some.shares[:, -1:].to(dtype)
        return Codes(
            components=parts.components,
            bank=bank,
            chosen=chosen.unflatten(0, shape),
            share_explained=shares.unflatten(0, shape),
            mean=self.mean.to(dtype),
            method=method,
            images=shape[1],
            amounts=amounts.unflatten(0, shape),
        )
