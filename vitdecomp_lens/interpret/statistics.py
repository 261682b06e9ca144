"""How sure a number is: resampled images, intervals, rank correlation, many tests at once.

All that is drawn comes from a seed on the CPU, so that it is the same on every device. Resample number r depends on the
seed and on r alone: many of them can be drawn a few at a time, by ``first``.
"""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.gap import accumulator

__all__ = ["bootstrap_counts", "false_discovery", "interval", "pearson", "permutations", "ranks", "spearman"]

LARGEST_SEED = 2**62


def ranks(values: Num[Tensor, "*axes item"]) -> Float[Tensor, "*axes item"]:
    """Ranks along the last axis, from 1; equal values share the mean of theirs.

    Raises:
        InputError: Where a value is not a number.

    Example:
        >>> ranks(torch.tensor([10.0, 30.0, 20.0, 20.0]))
        tensor([1.0000, 4.0000, 2.5000, 2.5000])
    """
    if bool(values.isnan().any()):
        raise InputError("Expected values that can be put in an order; some are NaN. Leave those items out.")
    ordered, values = values.sort(-1).values.contiguous(), values.contiguous()
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    dtype = accumulator(values.dtype) if values.is_floating_point() else torch.get_default_dtype()
    return (below + up_to + 1).to(dtype) / 2


def pearson(a: Num[Tensor, "*#axes item"], b: Num[Tensor, "*#axes item"]) -> Float[Tensor, "..."]:
    """The correlation along the last axis; 0 where one of the two does not vary.

    Axes before the last broadcast.

    Raises:
        InputError: Where there are fewer than two items, or they are not equally many.

    Example:
        >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[2.0, 4.0, 6.0], [1.0, 1.0, 1.0]]))
        tensor([1., 0.])
    """
    if a.shape[-1] != b.shape[-1] or a.shape[-1] < 2:
        raise InputError(f"Expected at least 2 items, equally many on both sides; got {a.shape[-1]} and {b.shape[-1]}.")
    kinds = [t.dtype for t in (a, b) if t.is_floating_point()] or [torch.get_default_dtype()]
    one, other = (_standardised(t.double()) for t in (a, b))
    return (one * other).sum(-1).clamp(-1, 1).to(accumulator(*kinds))


def _standardised(values: Float[Tensor, "*axes item"]) -> Float[Tensor, "*axes item"]:
    """With mean 0 and length 1; zero where there is nothing but rounding around the mean."""
    centred = values - values.mean(-1, keepdim=True)
    lengths = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    rounding = torch.finfo(values.dtype).eps * torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return torch.where(lengths > 4 * rounding, centred / lengths, 0)


def spearman(a: Num[Tensor, "*#axes item"], b: Num[Tensor, "*#axes item"]) -> Float[Tensor, "..."]:
    """The rank correlation along the last axis, ties sharing their mean rank; 0 where one of the two does not vary.

    Axes before the last broadcast.

    Raises:
        InputError: Where there are fewer than two items, they are not equally many, or one is NaN.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 10.0, 1000.0, 100.0]))
        tensor(0.8000)
    """
    return pearson(ranks(a), ranks(b))


def bootstrap_counts(images: int, resamples: int, seed: int, *, first: int = 0) -> Int[Tensor, "resample image"]:
    """How often each image is in each resample, of as many images drawn with replacement.

    Divided by the number of images they are weights, with which means and covariances of all resamples are products of
    matrices.

    Args:
        images: How many there are, and how many are drawn.
        resamples: How many times.
        seed: Others for others.
        first: The number of the first resample.

    Raises:
        InputError: Where a number is out of range.

    Example:
        >>> bootstrap_counts(5, 2, seed=0).sum(1)
        tensor([5, 5])
    """
    counts = torch.zeros(resamples, images, dtype=torch.int64)
    ones = torch.ones(images, dtype=torch.int64)
    for row, generator in enumerate(_generators(images, resamples, seed, first)):
        counts[row].scatter_add_(0, torch.randint(images, (images,), generator=generator), ones)
    return counts


def permutations(images: int, resamples: int, seed: int, *, first: int = 0) -> Int[Tensor, "resample image"]:
    """Image numbers in random orders.

    Args:
        images: How many there are.
        resamples: How many orders.
        seed: Others for others.
        first: The number of the first order.

    Raises:
        InputError: Where a number is out of range.

    Example:
        >>> permutations(4, 2, seed=0).sort(1).values
        tensor([[0, 1, 2, 3],
                [0, 1, 2, 3]])
    """
    drawn = [torch.randperm(images, generator=g) for g in _generators(images, resamples, seed, first)]
    return torch.stack(drawn) if drawn else torch.zeros(0, images, dtype=torch.int64)


def _generators(images: int, resamples: int, seed: int, first: int) -> list[torch.Generator]:
    for name, value, least in (("images", images, 1), ("resamples", resamples, 0), ("first", first, 0)):
        if value < least:
            raise InputError(f"Expected {name}= of at least {least}; got {value}.")
    source = torch.Generator().manual_seed(seed)
    seeds = torch.randint(LARGEST_SEED, (first + resamples,), generator=source)[first:]
    return [torch.Generator().manual_seed(one) for one in seeds.tolist()]


def interval(
    samples: Float[Tensor, "resample *axes"], level: float = 0.95
) -> tuple[Float[Tensor, "*axes"], Float[Tensor, "*axes"]]:
    """The percentile interval of what resamples gave: its lower and its upper end.

    Args:
        samples: Along the first axis, the same number from each resample.
        level: The share of resamples that are to lie between the ends.

    Raises:
        InputError: Where there are no samples, or the level is not between 0 and 1.

    Example:
        >>> interval(torch.arange(101.0), level=0.9)
        (tensor(5.), tensor(95.))
    """
    if not len(samples) or not 0 < level < 1:
        raise InputError(f"Expected samples, and a level between 0 and 1; got {len(samples)} and level={level}.")
    ordered = samples.sort(0).values
    return _quantile(ordered, (1 - level) / 2), _quantile(ordered, (1 + level) / 2)


def _quantile(ordered: Float[Tensor, "resample *axes"], share: float) -> Float[Tensor, "*axes"]:
    place = share * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below)


def false_discovery(p: Float[Tensor, "*axes test"]) -> Float[Tensor, "*axes test"]:
    """For each test the smallest rate of false discoveries at which it is one, by Benjamini and Hochberg.

    Of the tests whose number here is at most 0.05, no more than 5 % are expected to be false. That holds for tests
    that are independent, or that rise and fall together.

    Args:
        p: The p-values of the tests that were looked at, all of them, along the last axis.

    Raises:
        InputError: Where a p-value is not between 0 and 1.

    Example:
        >>> false_discovery(torch.tensor([0.01, 0.5, 0.02]))
        tensor([0.0300, 0.5000, 0.0300])
    """
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise InputError("Expected p-values from 0 to 1; some are not.")
    count = p.shape[-1]
    ordered, order = p.sort(-1)
    scaled = ordered * count / torch.arange(1, count + 1, device=p.device)
    # A test is no less of a discovery than one of a larger p-value.
    rates = scaled.flip(-1).cummin(-1).values.flip(-1).clamp(max=1)
    return torch.empty_like(rates).scatter_(-1, order, rates)
