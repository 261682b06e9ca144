"""Scores of components for features: beside loops in numpy, planted truth, and orders counted one by one."""

import math
from dataclasses import replace
from itertools import permutations as all_orders

import numpy as np
import pytest
import torch
from labelled_samples import as_users_run_it, assert_same, sample
from scipy import stats

from vitdecomp_lens import decompose, testbed
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import CapacityError, InputError, StoreError, UnknownNameError, VitDecompWarning
from vitdecomp_lens.interpret import describe, omp, text_span
from vitdecomp_lens.interpret.feature_scores import FeatureScores
from vitdecomp_lens.interpret.features import probe, score_features, text_null
from vitdecomp_lens.interpret.statistics import bootstrap_counts
from vitdecomp_lens.testbed.planted import planted_features, planted_spans

PLAIN = {"bootstrap": 0, "permutations": 0}
SURE = ("correlation_interval", "covariance_interval", "correlation_p", "covariance_p")
TENSORS = ("correlation", "covariance", "variance", "total", "spread", *SURE)


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bank_of(directions, *, space="planted"):
    return TextBank([f"text {row}" for row in range(len(directions))], directions, space=space)


def own_directions(planted):
    """Each planted feature as one of a single text."""
    bank = bank_of(planted.directions)
    return {f"feature {row}": bank.select(text) for row, text in enumerate(bank)}


def two_features(d_clip=6, seed=3):
    """Of two and three texts at odd angles."""
    bank = bank_of(normal(5, d_clip, seed=seed))
    return {"one": bank.select(["text 0", "text 1"]), "two": bank.select(["text 2", "text 3", "text 4"])}


def related(*, components=5, images=40, d_clip=6, seed=0, dtype=torch.float64):
    """Components that share something, so that scores differ; with large means."""
    shared = normal(1, images, d_clip, seed=seed)
    values = normal(components, images, d_clip, seed=seed + 1) + normal(components, 1, 1, seed=seed + 2) * shared
    values += 30 * normal(components, 1, d_clip, seed=seed + 3)
    return Decomposition(values.to(dtype), tuple(f"L0H{n}" for n in range(components)), values.sum(0).to(dtype))


def by_loop(parts, features, whole=None):
    """Correlations and covariances, one number after the other."""
    values = parts.values.double().numpy()
    whole = values.sum(0) if whole is None else whole.numpy()
    correlation, covariance = np.zeros((2, len(values), len(features)))
    for column, bank in enumerate(features.values()):
        basis = bank.subspace().numpy()
        for row, own in enumerate(values):
            pairs = [np.stack([own @ b, whole @ b]) for b in basis]
            correlation[row, column] = np.mean([np.corrcoef(pair)[0, 1] for pair in pairs])
            covariance[row, column] = np.sum([np.cov(pair, bias=True)[0, 1] for pair in pairs])
    return torch.tensor(correlation), torch.tensor(covariance)


# ---- the scores


def test_scores_are_those_of_a_loop_and_covariances_sum_to_the_total():
    parts, features = related(), two_features()
    scores = score_features(parts, features, **PLAIN)
    correlation, covariance = by_loop(parts, features)
    torch.testing.assert_close(scores.correlation, correlation, rtol=0, atol=1e-11)
    torch.testing.assert_close(scores.covariance, covariance, rtol=1e-11, atol=1e-11)
    for column, bank in enumerate(features.values()):
        basis = bank.subspace()
        assert float(scores.total[column]) == pytest.approx(float((parts.sum() @ basis.T).var(0, correction=0).sum()))
        within = (parts.values @ basis.T).var(1, correction=0).sum(1)
        torch.testing.assert_close(scores.variance[:, column], within, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(scores.spread, parts.values.var(1, correction=0).sum(1))
    assert float((scores.rest / scores.total).abs().max()) < 1e-10
    assert scores.correlation_interval is scores.covariance_p is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_covariances_sum_to_the_total_in_both_precisions_however_large_the_means(dtype):
    parts = related(components=30, dtype=dtype)
    parts = Decomposition(parts.values + 1000, parts.components)
    scores = score_features(parts, two_features(), **PLAIN)
    assert scores.covariance.dtype == dtype
    assert float((scores.rest / scores.total).abs().max()) < (1e-6 if dtype == torch.float32 else 1e-10)


def test_half_precision_is_scored_in_single():
    parts = related().to(torch.bfloat16)
    scores = score_features(parts, two_features(), **PLAIN)
    assert scores.correlation.dtype == torch.float32
    correlation, _ = by_loop(parts, two_features())
    torch.testing.assert_close(scores.correlation.double(), correlation, rtol=0, atol=1e-4)


def test_scores_do_not_depend_on_the_order_of_the_texts():
    parts, bank = related(), bank_of(normal(3, 6, seed=7))
    features = {"one": bank, "other": bank.select(["text 2", "text 0", "text 1"])}
    scores = score_features(parts, features, **PLAIN)
    for values in (scores.correlation, scores.covariance):
        torch.testing.assert_close(values[:, 0], values[:, 1])


@pytest.mark.parametrize("seed", range(3))
def test_planted_weights_are_found_in_their_order_over_all_components(seed):
    planted = planted_features(images=2000, d_clip=16, components=30, features=4, sparse=False, seed=seed)
    scores = score_features(planted.parts, own_directions(planted), **PLAIN)
    for of, correlation, covariance in zip(planted.weights.T, scores.correlation.T, scores.covariance.T, strict=True):
        assert stats.spearmanr(correlation, of).statistic >= 0.95
        assert stats.spearmanr(covariance, of).statistic >= 0.95
    torch.testing.assert_close(scores.correlation, planted.scores, rtol=0, atol=0.06)


@pytest.mark.parametrize("seed", range(3))
def test_those_that_carry_a_feature_come_before_those_that_do_not(seed):
    planted = planted_features(images=2000, d_clip=16, components=30, features=4, seed=seed)
    scores = score_features(planted.parts, own_directions(planted), **PLAIN)
    for column in range(4):
        of, writes = planted.weights[:, column], planted.weights[:, column] > 0
        for found in (scores.correlation[:, column], scores.covariance[:, column]):
            assert stats.spearmanr(found[writes], of[writes]).statistic >= 0.95
            assert found[writes].min() > found[~writes].max()
    torch.testing.assert_close(scores.correlation, planted.scores, rtol=0, atol=0.06)


def test_of_some_components_the_whole_is_the_total_and_the_rest_is_told():
    parts, features = related(), two_features()
    some = parts.select(labels=["L0H3", "L0H1"])
    scores, every = (score_features(one, features, bootstrap=10) for one in (some, parts))
    assert scores.labels == ("L0H3", "L0H1")
    for name in ("correlation", "covariance", "correlation_p"):
        torch.testing.assert_close(getattr(scores, name), getattr(every, name)[[3, 1]])
    torch.testing.assert_close(scores.total, every.total)
    torch.testing.assert_close(scores.rest, every.covariance[[0, 2, 4]].sum(0))


def test_batches_one_after_the_other_give_the_same_from_a_generator_too():
    parts, features = related(), two_features()
    whole = score_features(parts, features)
    some = score_features(parts.select(labels="L0H2"), features)
    for cut, expected in ((parts, whole), (parts.select(labels="L0H2"), some)):
        batches = (cut.images(slice(start, start + 7)) for start in range(0, 40, 7))
        again = score_features(batches, features)
        for name in TENSORS:
            torch.testing.assert_close(getattr(again, name), getattr(expected, name))


def test_little_memory_gives_the_same_in_pieces():
    parts, features = related(), {**two_features(), **{"three": bank_of(normal(2, 6, seed=9))}}
    pieces, whole = score_features(parts, features, max_bytes=5 * 40 * 8 * 3), score_features(parts, features)
    assert (pieces.features, pieces.widths) == (whole.features, whole.widths) == (("one", "two", "three"), (2, 3, 2))
    for name in TENSORS:
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    with pytest.raises(CapacityError, match="max_bytes=4,799 allows"):
        score_features(parts, features, max_bytes=5 * 40 * 8 * 3 - 1)


# ---- intervals


def test_intervals_are_percentiles_of_scores_of_resampled_images():
    parts, features = related(images=25), two_features()
    scores = score_features(parts, features, bootstrap=40, level=0.8, seed=5)
    drawn = [torch.arange(25).repeat_interleave(counts) for counts in bootstrap_counts(25, 40, 5)]
    found = [by_loop(parts.images(rows), features) for rows in drawn]
    for number, name in enumerate(("correlation", "covariance")):
        samples = np.stack([one[number].numpy() for one in found])
        expected = torch.tensor(np.quantile(samples, [0.1, 0.9], axis=0))
        torch.testing.assert_close(getattr(scores, f"{name}_interval"), expected, rtol=1e-9, atol=1e-9)


def test_intervals_cover_the_truth_at_about_their_level():
    covered = []
    for draw in range(40):
        planted = planted_features(images=150, d_clip=4, components=12, features=3, draw=draw)
        scores = score_features(planted.parts, own_directions(planted), permutations=0, level=0.9)
        truth = planted.weights * planted.weights.sum(0) + 0.3**2
        for (low, high), value in (
            (scores.correlation_interval, planted.scores),
            (scores.covariance_interval, truth),
        ):
            covered.append(((low <= value) & (value <= high)).float().mean((0, 1)))
    covered = torch.stack(covered).reshape(40, 2)
    # Pairs of one draw go together, so that the error is that of draws.
    assert (abs(covered.mean(0) - 0.9) < 0.02 + 3 * covered.std(0) / math.sqrt(40)).all()


# ---- p-values


def test_p_values_are_the_shares_of_all_orders_counted_one_by_one():
    images, features = 5, two_features(d_clip=4)
    parts = related(components=3, images=images, d_clip=4, seed=11)
    scores = score_features(parts, features, bootstrap=0, permutations=20_000)
    assert scores.orders == 20_000
    found, chance = {"correlation": [], "covariance": []}, {"correlation": [], "covariance": []}
    for row in range(3):
        by_order = []
        rest = parts.values.sum(0) - parts.values[row]
        for order in all_orders(range(images)):
            own = Decomposition(parts.values[row : row + 1, list(order)], ("L0H0",))
            by_order.append([one[0].numpy() for one in by_loop(own, features, whole=rest + own.values[0])])
        for number, name in enumerate(found):
            far = np.abs((every := np.stack([one[number] for one in by_order])) - every.mean(0))
            found[name].append((far >= far[0] - 1e-12).mean(0))  # the first order is the true one
            chance[name].append((every.mean(0), every.std(0)))
    for name, expected in found.items():
        # One in five orders is drawn with its circle: the error is at most that of 4,000 draws.
        torch.testing.assert_close(
            getattr(scores, f"{name}_p"), torch.tensor(np.stack(expected)), rtol=0, atol=4 * 0.5 / math.sqrt(4000)
        )
        mean, deviation = np.array(chance[name]).swapaxes(0, 1)
        off = np.abs(getattr(scores, f"{name}_chance").numpy() - mean)
        assert (off <= 4 * deviation / math.sqrt(4000)).all()


def test_the_order_of_all_images_does_not_matter_to_a_p_value_of_sorted_ones():
    """Neighbours alike, as where a data set is sorted by class: circles of the given order would see nothing."""
    trend = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None] * torch.ones(1, 4)
    values = torch.stack([trend + 0.3 * normal(60, 4, seed=seed) for seed in range(4)])
    scores = score_features(
        Decomposition(values, [f"L0H{n}" for n in range(4)]), {"all": bank_of(torch.eye(4).double())}
    )
    assert (scores.correlation_p <= 2 / 1000).all()


@pytest.mark.parametrize(("images", "sets"), [(6, 60), (24, 60), (151, 40)])
def test_under_the_null_one_in_twenty_p_values_is_below_one_in_twenty(images, sets):
    """Components that have nothing to do with each other; each is a part of the whole all the same."""
    features = two_features()
    p, naive = [], []
    for seed in range(sets):
        values = normal(6, images, 6, seed=1000 + seed) * torch.logspace(-1, 1, 6, dtype=torch.float64)[:, None, None]
        parts = Decomposition(values, [f"L0H{n}" for n in range(6)])
        scores = score_features(parts, features, bootstrap=0, permutations=200)
        p.append(torch.stack([scores.correlation_p, scores.covariance_p]))
        along = values @ features["one"].subspace()[0]
        naive.append(stats.pearsonr(along.numpy(), along.sum(0).numpy()[None], axis=1).pvalue <= 0.05)
    for rate in (0.05, 0.3):
        for which in torch.stack(p, 1):
            found, low, high = int((which <= rate).sum()), *stats.binom.interval(0.999, which.numel(), rate)
            assert low <= found <= high
    # The usual test says that most of them are significant: what it sees is that a part correlates with its whole.
    assert np.mean(naive) > 0.15


def test_what_others_write_too_is_found_significant():
    planted = planted_features(images=300, d_clip=8, components=20, features=2)
    scores = score_features(planted.parts, own_directions(planted), bootstrap=0)
    for column, name in enumerate(scores.features):
        writes = {scores.labels[row] for row in (planted.weights[:, column] > 0).nonzero().flatten().tolist()}
        found = scores.significant(name, rate=0.05)
        assert writes <= {*found}
        assert len({*found} - writes) <= 1
        values = [scores.score(label, name).value for label in found]
        assert values == sorted(values, reverse=True)


def test_what_writes_against_the_others_is_told_from_what_writes_with_them():
    shared = normal(1, 200, 4)
    values = normal(12, 200, 4, seed=1) + torch.tensor([1.0] * 6 + [0.0] * 4 + [-1.0] * 2)[:, None, None] * shared
    scores = score_features(
        Decomposition(values, [f"L0H{n}" for n in range(12)]), {"x": bank_of(torch.eye(4).double())}
    )
    for by in ("correlation", "covariance"):
        assert {*scores.significant("x", by=by, side="above")} == {f"L0H{n}" for n in range(6)}
        assert {*scores.significant("x", by=by, side="below")} == {"L0H10", "L0H11"}
        assert {*scores.significant("x", by=by)} == {f"L0H{n}" for n in (*range(6), 10, 11)}
    # Chance is above 0, because a component is a part of the whole: below it may well be above 0.
    assert (scores.correlation_chance > 0.05).all()
    with as_users_run_it(), pytest.raises(InputError, match="'both', 'above', 'below'; got 'over'"):
        scores.significant("x", side="over")
    with pytest.raises(InputError, match="what chance gives on average"):
        replace(scores, correlation_chance=None).significant("x", side="above")


def test_few_carriers_among_many_components_are_found():
    """With 1,000 orders no p-value is below .001, and of 200 components five would have to be that sure."""
    values = normal(200, 100, 3, seed=10)
    values[:2] += 10 * normal(1, 100, 3, seed=11)
    parts = Decomposition(values, [f"L0H{n}" for n in range(200)], values.sum(0))
    features = {"x": bank_of(torch.eye(3).double())}
    scores = score_features(parts, features, bootstrap=0)
    assert scores.orders == 4000
    assert {*scores.significant("x")} == {"L0H0", "L0H1"}
    few = score_features(parts, features, bootstrap=0, permutations=1000)
    assert (few.correlation_p[:2] == 1 / 1000).all()  # as sure as can be
    assert few.significant("x") == ()
    batches = (parts.images(slice(start, start + 50)) for start in (0, 50))
    assert score_features(batches, features, bootstrap=0).orders == 4000
    assert score_features(parts.select(labels=["L0H0"]), features, bootstrap=0).orders == 1000


# ---- what does not vary


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_score_nothing_whatever_their_size(dtype):
    parts = related(dtype=dtype)
    constant = 1e4 * normal(1, 1, 6, seed=5).to(dtype).expand(1, 40, 6)
    almost = constant * (1 + torch.finfo(dtype).eps * normal(1, 40, 6, seed=6).sign().to(dtype))
    values = torch.cat([constant, parts.values, torch.zeros_like(constant), almost])
    every = Decomposition(values, ("norm.bias", *parts.labels, "zero", "almost"))
    scores, before = (score_features(one, two_features()) for one in (every, parts))
    rows = [0, -2, -1]
    for name in ("correlation", "covariance", "variance"):
        assert (getattr(scores, name)[rows] == 0).all()
    assert (scores.spread[rows] == 0).all()
    for name in ("correlation", "covariance"):
        assert (getattr(scores, f"{name}_p")[rows] == 1).all()
        assert (getattr(scores, f"{name}_interval")[:, rows] == 0).all()
        torch.testing.assert_close(getattr(scores, f"{name}_p")[1:-2], getattr(before, f"{name}_p"), rtol=0, atol=2e-3)


def test_components_that_cancel_leave_no_whole_and_no_nan():
    values = normal(1, 20, 6).repeat(2, 1, 1)
    values[1] *= -1
    scores = score_features(Decomposition(values, ("L0H0", "L0H1")), two_features())
    for name in ("correlation", "covariance", "correlation_interval", "covariance_interval"):
        assert (getattr(scores, name) == 0).all()
    assert scores.total.tolist() == [0, 0]
    assert (
        (scores.correlation_p > 0) & (scores.correlation_p < 0.01)
    ).all()  # they could hardly oppose each other more


def test_a_single_component_is_the_whole_and_no_order_changes_that():
    scores = score_features(related(components=1), two_features())
    torch.testing.assert_close(scores.correlation, torch.ones(1, 2, dtype=torch.float64))
    assert (scores.correlation_p == 1).all()


# ---- asking


def hand_made():
    correlation = torch.tensor([[0.9, 0.7, 0.1], [0.5, 0.0, 0.4], [0.2, -0.1, -0.3], [0.6, 0.2, 0.7]])
    return FeatureScores(
        components=("L0H0", "L0H1", "mlp.0", "embed"), features=("colour", "shape", "place"), correlation=correlation,
        covariance=correlation.flip(0), variance=correlation.abs(), total=torch.ones(3), spread=torch.ones(4),
        correlation_interval=None, covariance_interval=None, correlation_p=None, covariance_p=None, widths=(2, 2, 1),
        space="planted", images=9, resamples=0, orders=0,
    )  # fmt: skip


def test_ranking_and_selecting_are_what_one_reads_off_the_table():
    scores = hand_made()
    assert [label for label, _ in scores.top("colour", 3)] == ["L0H0", "embed", "L0H1"]
    assert scores.top("colour", 1, by="covariance")[0] == ("embed", pytest.approx(0.9))
    assert [name for name, _ in scores.top_features("embed")] == ["place", "colour", "shape"]
    assert scores.margins("colour").tolist() == pytest.approx([0.2, 0.1, 0.3, -0.1])
    assert scores.select("colour", k=2) == ("mlp.0", "L0H0")
    assert scores.select("colour", against="shape", k=2) == ("L0H1", "embed")
    assert scores.select("place", against=["colour", "shape"]) == ("embed", "L0H1", "mlp.0", "L0H0")
    assert str(scores.score("L0H0", "colour")) == "0.900"
    assert repr(scores) == (
        "FeatureScores(component=4, feature=3: 2 head (layer 0), 1 mlp (layer 0), 1 embed; 'planted', 9 images, no "
        "intervals)"
    )


def test_one_score_tells_its_interval_and_p_value():
    parts, features = related(), two_features()
    scores = score_features(parts, features)
    one = scores.score("L0H2", "two", by="covariance")
    assert one.value == float(scores.covariance[2, 1])
    assert [one.low, one.high] == scores.covariance_interval[:, 2, 1].tolist()
    assert one.p == float(scores.covariance_p[2, 1])
    assert one.low < one.value < one.high
    assert f"[{one.low:.3f}, {one.high:.3f}], p = " in str(one)


@pytest.mark.parametrize("options", [{}, PLAIN])
def test_scores_are_stored(tmp_path, options):
    scores = score_features(related(), two_features(), **options)
    scores.save(tmp_path / "scores.safetensors")
    assert_same(FeatureScores.load(tmp_path / "scores.safetensors"), scores)
    sample().save(tmp_path / "parts.safetensors")
    with pytest.raises(StoreError, match="another kind"):
        FeatureScores.load(tmp_path / "parts.safetensors")


def test_probing_reads_both_ways_round():
    planted = planted_spans(images=60, d_clip=48, texts=40, components=4, per_component=3, dtype=torch.float64)
    bank = TextBank(planted.texts, planted.directions, space="planted")
    scores = probe(planted.parts, bank, **PLAIN)
    assert scores.correlation.shape == (4, 40)
    for row, (label, texts) in enumerate(planted.chosen.items()):
        found = [text for text, _ in scores.top_features(label, 3, by="covariance")]
        assert set(found) == set(texts)
        assert scores.top(texts[0], 1, by="covariance")[0][0] == label
        # The variance along a text is what was planted, and all of the component lies along its own texts.
        own = scores.variance[row, [bank.texts.index(text) for text in texts]]
        torch.testing.assert_close(own, planted.deviations[row].square())
        assert float(own.sum() / scores.spread[row]) == pytest.approx(1)
    some = probe(planted.parts, bank, texts=["text 7", "text 3"])
    assert some.features == ("text 7", "text 3")
    torch.testing.assert_close(some.correlation, scores.correlation[:, [7, 3]])
    one = score_features(planted.parts, {"text 3": bank.select("text 3")})
    torch.testing.assert_close(one.correlation_p[:, 0], some.correlation_p[:, 1], rtol=0, atol=1e-9)


# ---- random texts


def test_a_features_own_texts_stand_out_among_random_ones_and_others_do_not():
    planted = planted_spans(images=80, d_clip=64, texts=60, components=3, per_component=3, dtype=torch.float64)
    bank = TextBank(planted.texts, planted.directions, space="planted")
    features = {"own": bank.select(planted.chosen["L0H1"]), "single": bank.select(planted.chosen["L0H2"][0])}
    null = text_null(planted.parts, features, bank, draws=99)
    assert null.correlation.shape == (99, 3, 2)
    assert float(null.covariance_p[1, 0]) == pytest.approx(0.01)
    assert (null.covariance_p[[0, 2], 0] > 0.1).all()
    assert float(null.covariance_p[2, 1]) <= 0.06  # its first text is drawn alone once in sixty
    again = text_null(planted.parts, features, bank, draws=99, max_bytes=3 * 80 * 8 * 10)
    torch.testing.assert_close(null.covariance, again.covariance)


def test_random_features_have_p_values_of_chance():
    parts = related(components=3, images=30, d_clip=40)
    bank = bank_of(normal(150, 40, seed=2))
    orders = torch.stack([torch.randperm(150, generator=torch.Generator().manual_seed(s))[:2] for s in range(150)])
    features = {f"random {n}": bank.select([bank.texts[i] for i in of]) for n, of in enumerate(orders.tolist())}
    null = text_null(parts, features, bank, draws=99, seed=8)
    for p in (null.correlation_p, null.covariance_p):
        for row in p:
            for rate in (0.05, 0.2):
                # All are held against the same 99 sets, which have an error of their own.
                found = float((row <= rate).float().mean())
                assert abs(found - rate) < 4 * math.sqrt(rate * (1 - rate) * (1 / 150 + 1 / 99))


# ---- bad input


def test_what_cannot_be_scored_is_refused():
    parts, features = related(), two_features()
    elsewhere = {name: TextBank(bank.texts, bank.directions, space="other") for name, bank in features.items()}
    told = Decomposition(parts.values, parts.components, metadata={"space": "CLIP-64-abc"})
    nan = parts.values.clone()
    nan[2, 3, 1] = torch.nan
    cases = (
        (lambda: score_features(told, features), "of 'CLIP-64-abc', the texts of 'planted'"),
        (lambda: score_features(parts, {**features, "x": elsewhere["one"]}), "'x' of 'other'"),
        (lambda: score_features(parts, two_features(d_clip=7)), "have 6 dimensions, the texts of 'planted' 7"),
        (lambda: score_features(parts, {}), "at least one feature"),
        (lambda: score_features(parts, {"one": ["red"]}), "that of 'one' is a list"),
        (lambda: score_features(parts.images(slice(3)), features), "at least 4 images.*got 3"),
        (lambda: score_features([], features), "at least 4 images.*got 0"),
        (lambda: score_features(["L0H0"], features), "Expected a Decomposition, or several; got str"),
        (lambda: score_features([parts, parts.select(labels="L0H1")], features), "components differ"),
        (lambda: score_features(Decomposition(nan, parts.components), features), "'L0H2' have NaN or Inf"),
        (lambda: score_features(Decomposition(parts.values, parts.components, complete=False), features), "a total"),
        (lambda: score_features(parts, features, bootstrap=-1), "bootstrap= of at least 0"),
        (lambda: score_features(parts, features, level=95.0), "level= between 0 and 1"),
        (lambda: probe(parts, features), "Expected a TextBank; got dict"),
        (lambda: text_null(parts, features, features["two"]), "up to 3; got 3"),
        (lambda: text_null(parts, features, elsewhere["two"]), "'the bank of random texts' of 'other'"),
        (lambda: text_null(parts, features, features["two"], draws=0), "draws= of at least 1"),
        (lambda: text_null([parts], features, features["two"]), "got list"),
        (lambda: hand_made().select("colour", against=["colour", "shape"]), "other features than 'colour'"),
        (lambda: hand_made().select("colour", against="colour"), r"got \['colour'\]"),
        (lambda: hand_made().top("colour", 0), "k= of at least 1"),
        (lambda: hand_made().top("colour", by="norm"), "got by='norm'"),
        (lambda: hand_made().significant("colour"), "permutations= above 0"),
    )
    with as_users_run_it():
        for call, says in cases:
            with pytest.raises(InputError, match=says):
                call()
    with pytest.raises(UnknownNameError, match="did you mean 'colour'"):
        hand_made().top("color")
    with pytest.raises(UnknownNameError, match="L0H9"):
        hand_made().score("L0H9", "colour")
    nan = parts.total.clone()
    nan[3] = torch.inf
    with pytest.raises(InputError, match="finite total"):
        score_features(Decomposition(parts.values, parts.components, nan, complete=False), features)


@pytest.mark.parametrize(
    "read",
    [
        lambda parts, bank: text_span(parts, bank, steps=1),
        lambda parts, bank: omp(parts, bank, centre=True, steps=1),
        lambda parts, bank: score_features(parts, {"one": bank.select(bank.texts[:2])}, **PLAIN),
        lambda parts, bank: describe(parts, bank, phrases=1),
    ],
)
def test_contributions_that_nobody_took_into_the_space_of_the_texts_are_warned_of(read):
    clip, images = testbed.load_original("clip"), testbed.normalised(testbed.Scenes("test").images(range(6)))
    bank = testbed.banks.text_bank(clip, ["a red object", "a blue object", "a circle"])
    read(decompose(testbed.load("clip"), images), bank)  # its own are there
    parts = decompose(testbed.load("deit"), images, by="head")
    read(parts.map(testbed.aligner("deit")), bank)
    with pytest.warns(VitDecompWarning, match=r"a VisionTransformer's.*parts\.map\(aligner\)"):
        read(parts, bank)
