"""Intervals of 95 %, by drawing as many images with replacement."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.applications.repair import GroupAccuracy
from vitdecomp_lens.interpret.statistics import bootstrap_counts, interval

__all__ = ["of_groups", "of_means"]

RESAMPLES = 1000


def of_means(values: Float[Tensor, "number image"]) -> list[tuple[float, float]]:
    """The intervals of several numbers that are each a mean over the same images.

    Example:
        >>> of_means(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
        [(1.0, 1.0), (0.0, 0.0)]
    """
    means = _counts(values.shape[1]) @ values.double().cpu().T / values.shape[1]
    low, high = interval(means)
    return list(zip(low.tolist(), high.tolist(), strict=True))


@lru_cache(maxsize=2)
def _counts(images: int) -> Float[Tensor, "resample image"]:
    return bootstrap_counts(images, RESAMPLES, seed=0).double()


def of_groups(found: GroupAccuracy) -> dict[str, tuple[float, float]]:
    """The intervals of the worst group, of the average of groups, and of each group, which all keep their sizes.

    Of n images with a share p that is right, as many drawn with replacement have Binomial(n, p) right ones.

    Example:
        >>> of_groups(GroupAccuracy(("land", "water"), (1.0, 0.5), (20, 20)))["land"]
        (1.0, 1.0)
    """
    images = torch.tensor(found.images, dtype=torch.float64).expand(RESAMPLES, -1)
    shares = torch.tensor(found.accuracies, dtype=torch.float64).expand(RESAMPLES, -1)
    drawn = torch.binomial(images, shares, generator=torch.Generator().manual_seed(0)) / images
    low, high = interval(torch.cat([drawn.amin(1, keepdim=True), drawn.mean(1, keepdim=True), drawn], 1))
    names = ("worst group", "average of groups", *found.names)
    return dict(zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True))
