"""Direct scores beside total effects: the same function of both, against NumPy and SciPy."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from labelled_samples import as_users_run_it
from tiny_models import TINY_MODELS, images_for

from vitdecomp_lens import HookedViT, attribute
from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.causal import EffectsTable, effects_table
from vitdecomp_lens.interpret.statistics import bootstrap_counts
from vitdecomp_lens.intervene import total_effects

BYS = ("covariance", "correlation", "variance")
LABELS = ("L0H0", "L0H1", "mlp.0", "L1H0", "mlp.1")


def random_scores(images=40, directions=3, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(LABELS), images, directions, generator=generator, dtype=torch.float64)
    values *= torch.tensor([0.1, 2.0, 0.5, 1.0, 0.3], dtype=torch.float64)[:, None, None]
    return Attribution(values + 3, LABELS, (values + 3).sum(0))


def effects_of(direct, *, how="mean", seed=None, constant=0.0):
    """Effects as if later components reacted in some way of their own; of those that only the sum makes, without."""
    noise = torch.zeros_like(direct.values)
    if seed is not None:
        noise = 0.8 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed), dtype=noise.dtype)
    metadata = {"effect": "total", "how": how}
    return replace(direct, values=constant - direct.values + noise, complete=False, metadata=metadata)


def by_hand(removed, whole, by, weights=None):
    """The score of one component, image by image."""
    w = np.full(len(whole), 1 / len(whole)) if weights is None else weights / weights.sum()
    scores = []
    for x, y in zip(removed.T, whole.T, strict=True):
        (vx, cov), (_, vy) = np.cov(x, y, aweights=w, bias=True)
        scores.append({"covariance": cov, "variance": 2 * cov - vx, "correlation": cov / np.sqrt(vx * vy)}[by])
    return np.mean(scores) if by == "correlation" else np.sum(scores)


@pytest.mark.parametrize("by", BYS)
def test_scores_are_those_of_numpy(by):
    direct = random_scores()
    total = effects_of(direct, seed=5)
    table = effects_table(direct, total, by=by, resamples=0)
    whole = direct.total.numpy()
    expected = [by_hand(direct[label].numpy(), whole, by) for label in LABELS]
    np.testing.assert_allclose(table.direct, expected, atol=1e-12)
    removed = [by_hand(-total[label].numpy(), whole, by) for label in LABELS]
    np.testing.assert_allclose(table.total[0], removed, atol=1e-12)
    assert float(table.agreement[0]) == pytest.approx(scipy.stats.spearmanr(expected, removed).statistic)
    assert table.direct_interval is table.total_interval is table.agreement_interval is None
    assert table.variance == pytest.approx(whole.var(0).sum())


def test_additive_scores_sum_to_the_features_variance():
    direct = random_scores()
    table = effects_table(direct, effects_of(direct), resamples=0)
    assert float(table.direct.sum()) == pytest.approx(table.variance, rel=1e-12)


def test_variance_is_what_the_read_out_loses():
    direct = random_scores()
    total = effects_of(direct, seed=5)
    table = effects_table(direct, total, by="variance", resamples=0)
    without = (direct.total + total["L1H0"]).numpy()
    assert float(table.total[0, 3]) == pytest.approx(direct.total.numpy().var(0).sum() - without.var(0).sum())


@pytest.mark.parametrize("by", BYS)
def test_where_nothing_reacts_direct_and_total_are_one(by):
    direct = random_scores()
    totals = {"zero": effects_of(direct, how="zero"), "mean": effects_of(direct, constant=17.0)}
    table = effects_table(direct, totals, by=by, resamples=50)
    for column in range(2):
        torch.testing.assert_close(table.total[column], table.direct)
    torch.testing.assert_close(table.agreement, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(table.agreement_interval, torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("by", ["covariance", "variance"])
def test_any_orthonormal_basis_gives_the_same(by):
    direct, total = random_scores(), effects_of(random_scores(), seed=5)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    turned = [replace(one, values=one.values @ rotation, total=one.total @ rotation) for one in (direct, total)]
    one, other = effects_table(direct, total, by=by, resamples=0), effects_table(*turned, by=by, resamples=0)
    torch.testing.assert_close(one.direct, other.direct)
    torch.testing.assert_close(one.total, other.total)


@pytest.mark.parametrize("by", BYS)
def test_intervals_are_those_of_resampled_images(by):
    direct = random_scores(images=12)
    total = effects_of(direct, seed=5)
    table = effects_table(direct, total, by=by, resamples=200, seed=3, level=0.9)
    whole, samples = direct.total.numpy(), []
    for counts in bootstrap_counts(12, 200, 3).numpy():
        sample = [
            [by_hand(values.numpy(), whole, by, counts) for values in removed]
            for removed in (direct.values, -total.values)
        ]
        samples.append((*sample[0], *sample[1], scipy.stats.spearmanr(*sample).statistic))
    low, high = np.quantile(np.array(samples), [0.05, 0.95], axis=0)
    for found, expected in ((0, low), (1, high)):
        np.testing.assert_allclose(table.direct_interval[found], expected[:5], atol=1e-9)
        np.testing.assert_allclose(table.total_interval[found, 0], expected[5:10], atol=1e-9)
        np.testing.assert_allclose(table.agreement_interval[found], expected[10:], atol=1e-9)


def test_what_does_not_vary_scores_nothing():
    direct = random_scores()
    direct.values[2] = 1 / 3
    for by in BYS:
        table = effects_table(direct, effects_of(direct), by=by, resamples=20)
        assert float(table.direct[2].abs()) < 1e-12
        assert bool(table.direct_interval.isfinite().all())


def test_it_is_the_effect_on_a_model():
    model, images = HookedViT(TINY_MODELS["no_final_norm"]().double()), images_for("no_final_norm", 12).double()
    basis = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0].T
    direct = attribute(model, images, basis)
    totals = {
        how: total_effects(model, images, how=how, reference=images, directions=basis) for how in ("zero", "mean")
    }
    table = effects_table(direct, totals, resamples=100)
    row = table.labels.index("mlp.1")
    assert float(table.total[0, row]) == pytest.approx(float(table.direct[row]))  # nothing comes behind it
    assert not torch.allclose(table.total[0], table.direct)
    assert table.hows == ("zero", "mean")
    assert len(table) == len(totals["zero"])
    rows = table.table(2).splitlines()
    assert len(rows) == 5
    assert rows[2].startswith(f"| {table.labels[int(table.direct.argmax())]} |")


def test_read_outs_are_compared_by_what_varies_in_them():
    """A large mean, such as an aligner's bias gives, does not hide that images are in another order."""
    direct = random_scores()
    far = replace(direct, total=direct.total + 1e4)
    total = effects_of(far)
    assert effects_table(far, total, resamples=0).variance == pytest.approx(
        float(direct.total.var(0, correction=0).sum())
    )
    with pytest.raises(InputError, match="vary by up to"):
        effects_table(far, replace(total, total=far.total.flip(0)), resamples=0)
    # Rounding of what hardly varies is no difference.
    single = replace(far.to(torch.float32), total=(direct.total * 1e-4 + 1e4).float())
    again = replace(effects_of(single), total=torch.nextafter(single.total, torch.tensor(torch.inf)))
    assert not torch.equal(single.total, again.total)
    effects_table(single, again, resamples=0)


def test_it_is_shown_as_markdown():
    ends = torch.tensor([0.5, 1.5])
    table = EffectsTable(
        components=("L0H0", "mlp.0", "L1H0"),
        hows=("zero",),
        direct=torch.tensor([0.1, 2.0, -1.0]),
        total=torch.tensor([[0.0, 1.25, -3.0]]),
        agreement=torch.tensor([1.0]),
        direct_interval=ends[:, None].expand(2, 3),
        total_interval=None,
        agreement_interval=torch.tensor([[0.5], [1.0]]),
        by="covariance",
        variance=4.0,
        images=20,
        resamples=100,
        level=0.95,
    )
    assert table.table(2) == (
        "| component | direct covariance | total, zero |\n"
        "| --- | --- | --- |\n"
        "| mlp.0 | 2 [0.5, 1.5] | 1.25 |\n"
        "| L0H0 | 0.1 [0.5, 1.5] | 0 |\n"
        "| rank agreement |  | 1.00 [0.50, 1.00] |"
    )
    assert repr(table) == (
        "EffectsTable(3 components: 2 head (layers 0, 1), 1 mlp (layer 0); covariance, 20 images; rank agreement of "
        "direct and total: zero 1.00 [0.50, 1.00])"
    )
    with pytest.raises(InputError, match="k= of at least 1"):
        table.table(0)


def test_what_does_not_fit_together_is_refused():
    direct = random_scores()
    total = effects_of(direct)
    other = random_scores(seed=1)
    few = direct.select(labels=LABELS[:2])
    for first, second, message in (
        (total, direct, "got total effects first"),
        (direct, replace(total, metadata={"effect": "direct"}), r"second \(total\), as of total_effects"),
        (direct, direct, r"second \(total\).* Direct scores are none"),
        (direct, {"zero": total, "mean": other}, r"second \(mean\)"),
        (direct.images(range(5)), total, r"is \[5, 3\], of total effects \(mean\) \[40, 3\]"),
        (direct, replace(total, total=other.total), "differ by up to"),
        (direct.images([0]), total.images([0]), "at least 2 images"),
        (direct, effects_of(few), "at least 3 components"),
        (few, total, "none of 'mlp.0'"),
        (direct, {}, "at least one kind"),
        (direct, {"a": total, "b": effects_of(few)}, "only some of them"),
        (replace(direct, total=None), replace(total, total=None), "projections of the whole"),
    ):
        with pytest.raises(InputError, match=message):
            effects_table(first, second)
    with as_users_run_it(), pytest.raises(InputError, match="Expected by="):
        effects_table(direct, total, by="norm")
    with pytest.raises(InputError, match="level between 0 and 1"):
        effects_table(direct, total, level=1.0)
    with pytest.raises(InputError, match="resamples= of at least 0"):
        effects_table(direct, total, resamples=-1)
