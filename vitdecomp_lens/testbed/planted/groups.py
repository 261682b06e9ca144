"""Components that write a label, or what merely goes with it."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.testbed.planted.basics import (
    complete,
    expect,
    expect_sizes,
    generator,
    normal,
    orthonormal,
    uniform,
)

HUSHED = 0.0625  # how much of their noise components have along either direction if it is not theirs


@dataclass(frozen=True, eq=False)
class PlantedGroups:
    """Components of which some write a label, and others an attribute that mostly goes with it.

    Attributes:
        parts: Complete.
        label: Of the images: 0 or 1.
        spurious: The attribute: 0 or 1.
        core: The labels of the components that write the images' label only.
        carriers: The labels of those that write the attribute only.
        directions: Along which the one is written, and the other; orthonormal.
    """

    parts: Decomposition
    label: Int[Tensor, "batch"]
    spurious: Int[Tensor, "batch"]
    core: tuple[str, ...]
    carriers: tuple[str, ...]
    directions: Float[Tensor, "2 d_rep"]


def planted_groups(
    *,
    images: int,
    d_rep: int = 32,
    components: int = 12,
    agrees: float = 0.9,
    noise: float = 0.5,
    seed: int = 0,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PlantedGroups:
    """Images of two classes and an attribute that mostly goes with them, and is seen more easily.

    A quarter of the components write the label, which is worth ±1 in their sum, a quarter the attribute, worth ±2; all
    have a constant of their own and noise, of which little lies along a direction that they do not write: to ablate
    components that write neither changes next to nothing. A linear classifier fitted where label and attribute mostly
    agree reads both, and fails where they do not. Carriers set to their mean, it is left with the label; set to zero,
    it has another threshold as well. For fair images of the same truth, ask for ``agrees=0.5`` and another ``draw``.

    Args:
        images: How many.
        d_rep: Width of the representation; at least 2.
        components: How many; at least 2.
        agrees: How probably attribute and label agree.
        noise: Standard deviation of the noise in each dimension of the sum of those that write the label.
        seed: Another truth.
        draw: Other images of the same truth.
        dtype: Of all that is returned.

    Raises:
        InputError: Where a size is no size, or ``agrees`` is no probability.

    Example:
        >>> planted = planted_groups(images=1000)
        >>> 0.85 < float((planted.label == planted.spurious).float().mean()) < 0.95
        True
    """
    expect_sizes(images=images)
    expect("d_rep", d_rep, 2)
    expect("components", components, 2)
    expect("agrees", agrees, 0, 1)
    expect("noise", noise, 0)
    truth, chance = generator(seed), generator(seed, draw)
    directions = orthonormal(truth, 1, d_rep, 2)[0].T
    count = max(1, components // 4)
    core, carriers = torch.randperm(components, generator=truth)[: 2 * count].reshape(2, count).sort().values
    label = torch.randint(2, (images,), generator=chance)
    spurious = torch.where(uniform(chance, images) < agrees, label, 1 - label)
    noises = noise / math.sqrt(count) * normal(chance, components, images, d_rep)
    damped = torch.full((components, 1, 2), 1 - HUSHED, dtype=torch.float64)
    damped[core, :, 0] = damped[carriers, :, 1] = 0
    noises -= (noises @ directions.T * damped) @ directions
    values = normal(truth, components, 1, d_rep) + noises
    values[core] += (2 * label - 1)[:, None] * directions[0] / count
    values[carriers] += 2 * (2 * spurious - 1)[:, None] * directions[1] / count
    parts = complete(values, dtype)
    names_of_core, names_of_carriers = (tuple(parts.labels[row] for row in rows.tolist()) for rows in (core, carriers))
    return PlantedGroups(parts, label, spurious, names_of_core, names_of_carriers, directions.to(dtype))
