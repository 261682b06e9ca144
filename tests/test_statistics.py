"""Resampling, intervals and rank correlation, beside scipy and numpy."""

import numpy as np
import pytest
import torch
from labelled_samples import as_users_run_it
from scipy import stats

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.statistics import (
    bootstrap_counts,
    false_discovery,
    interval,
    pearson,
    permutations,
    ranks,
    spearman,
)


def normal(*size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("levels", [3, 1000])
def test_ranks_and_rank_correlations_are_those_of_scipy_ties_included(levels):
    a, b = ((levels * normal(4, 30, seed=seed).sigmoid()).round() for seed in (0, 1))
    b = b + a
    assert torch.equal(ranks(a), torch.tensor(stats.rankdata(a.numpy(), axis=-1)))
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    torch.testing.assert_close(spearman(a, b), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    expected = [stats.pearsonr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    torch.testing.assert_close(pearson(a, b), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_leading_axes_broadcast_and_integers_have_ranks():
    a, b = torch.arange(8), normal(2, 3, 8)
    assert spearman(a, b).shape == (2, 3)
    assert spearman(a, b)[1, 2] == pytest.approx(stats.spearmanr(a, b[1, 2]).statistic)
    assert spearman(a.half(), a.half()).dtype == torch.float32


def test_what_does_not_vary_correlates_with_nothing():
    constant = torch.full((9,), 0.1)
    assert spearman(constant, normal(9)) == 0
    assert pearson(constant.double(), normal(9)) == 0
    assert pearson(0.1 + torch.zeros(9, dtype=torch.float64), normal(9)) == 0


def test_small_variation_around_a_large_mean_is_seen():
    a = normal(50)
    assert pearson(1e6 + a, a) == pytest.approx(1, abs=1e-9)


def test_resamples_have_as_many_images_and_are_those_of_drawing_with_replacement():
    counts = bootstrap_counts(40, 3000, seed=1)
    assert counts.shape == (3000, 40)
    assert (counts.sum(1) == 40).all()
    # How often one image is in a resample is binomial: 40 draws, each with chance 1/40.
    seen = torch.bincount(counts.flatten(), minlength=41)[:5] / counts.numel()
    expected = stats.binom.pmf(np.arange(5), 40, 1 / 40)
    torch.testing.assert_close(seen.double(), torch.tensor(expected), rtol=0, atol=0.005)


@pytest.mark.parametrize("draw", [bootstrap_counts, permutations])
def test_resamples_are_the_same_drawn_at_once_or_in_pieces_and_others_from_another_seed(draw):
    whole = draw(12, 7, seed=3)
    pieces = torch.cat([draw(12, 3, seed=3), draw(12, 0, seed=3), draw(12, 4, seed=3, first=3)])
    assert torch.equal(whole, pieces)
    assert not torch.equal(whole, draw(12, 7, seed=4))
    assert len(whole.unique(dim=0)) == 7


def test_every_order_is_as_likely():
    orders = permutations(3, 6000, seed=0)
    assert torch.equal(orders.sort(1).values, torch.arange(3).expand(6000, 3))
    found = stats.chisquare(orders.unique(dim=0, return_counts=True)[1].numpy())
    assert found.pvalue > 1e-3


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("count", [1, 2, 200])
def test_intervals_are_numpys_percentiles(level, count):
    samples = normal(count, 3, 2)
    low, high = interval(samples, level)
    expected = np.quantile(samples.numpy(), [(1 - level) / 2, (1 + level) / 2], axis=0)
    torch.testing.assert_close(torch.stack([low, high]), torch.tensor(expected))


def test_false_discovery_rates_are_those_of_scipy():
    p = normal(5, 40).sigmoid() ** 4
    p[0, :7] = p[0, 7]
    expected = stats.false_discovery_control(p.numpy(), axis=-1)
    torch.testing.assert_close(false_discovery(p), torch.tensor(expected))


def test_what_cannot_be_used_is_refused():
    for call, says in (
        (lambda: ranks(torch.tensor([1.0, torch.nan])), "NaN"),
        (lambda: pearson(torch.ones(1), torch.ones(1)), "at least 2 items"),
        (lambda: spearman(torch.ones(3), torch.ones(4)), "got 3 and 4"),
        (lambda: bootstrap_counts(0, 3, seed=0), "images= of at least 1"),
        (lambda: permutations(3, -1, seed=0), "resamples= of at least 0"),
        (lambda: interval(torch.ones(0, 2)), "got 0"),
        (lambda: interval(torch.ones(3), level=95.0), "level=95.0"),
        (lambda: false_discovery(torch.tensor([0.1, torch.nan])), "from 0 to 1"),
    ):
        with as_users_run_it(), pytest.raises(InputError, match=says):
            call()
