"""What can be compared, and what is refused."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.gap import summed
from vitdecomp_lens.interpret.readings import refuse_parts as refuse_other_parts

# What varies less than this, relative to the length of a component's values, is rounding: that of float32.
NOISE = 2e-6


def refuse_values(parts: Decomposition, fewest: int) -> None:
    """Refuse contributions to too few images, and those that are not finite.

    Raises:
        InputError: Then.
    """
    values = parts.values
    if values.shape[1] < fewest:
        raise InputError(
            f"Expected contributions to at least {fewest} images, because what varies over images is compared; got "
            f"{values.shape[1]}."
        )
    for label, one in zip(parts.labels, values, strict=True):  # one by one, because they are large
        if not bool(one.isfinite().all()):
            raise InputError(f"Expected finite contributions; those of {label!r} have NaN or Inf. Look at its images.")


def refuse_parts(parts: Decomposition, bank: TextBank) -> None:
    """The same of contributions that are to be compared by texts, and refuse those of another space.

    Raises:
        InputError: Then.
    """
    refuse_other_parts(parts, bank, images=2)
    refuse_values(parts, 2)


def total_of(parts: Decomposition) -> Float[Tensor, "batch d_rep"]:
    """What all components of the model write together, also where only some are given.

    Raises:
        InputError: Where it is not known.
    """
    if parts.total is not None:
        return parts.total
    if not parts.complete:
        raise InputError(
            "Expected contributions with the total of the model, because components are compared with it; these are "
            "some of the components, without total. Give Decomposition(..., total=...)."
        )
    return summed(parts.values).to(parts.values.dtype)


def without_constants(parts: Decomposition) -> Decomposition:
    """All components but constants.

    Raises:
        InputError: Where there are only constants.
    """
    labels = [c.label for c in parts.components if c.kind != "constant"]
    if not labels:
        raise InputError("Expected components that vary over images, to be compared; there are only constants.")
    return parts.select(labels=labels)


def unvarying(values: Float[Tensor, "component batch d_rep"]) -> Bool[Tensor, "component"]:
    """Which components write the same for all images, but for rounding."""
    noise = noise_of(values.dtype)
    found = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    for row, one in enumerate(values):  # one by one, because in double precision all of them are large
        wide = one.double()
        found[row] = (wide - wide.mean(0)).norm() <= noise * wide.norm()
    return found


def noise_of(dtype: torch.dtype) -> float:
    """What is rounding in values of a dtype, relative to their length."""
    return max(NOISE, torch.finfo(dtype).eps)
