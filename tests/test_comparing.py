"""Comparing models, against plain formulas in double precision."""

import inspect
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import CapacityError, InputError, UnknownNameError
from vitdecomp_lens.interpret.comparing import (
    Concentration,
    Matching,
    compare_models,
    concentration,
    linear_cka,
    match_by_cka,
    match_by_texts,
    models,
    participation_ratio,
    text_profiles,
)
from vitdecomp_lens.interpret.comparing.matches import FEWEST, OPERATIONS, draws_for
from vitdecomp_lens.interpret.statistics import bootstrap_counts

IMAGES, WIDTH, TEXTS = 40, 12, 30


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed=0):
    return torch.randn(*size, generator=generator(seed), dtype=torch.float64)


def rotation(size, seed=0):
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def heads(count=5, *, seed=0, images=IMAGES, width=WIDTH, rank=3, constant=True):
    """Heads of some rank with means of their own, and a constant; complete."""
    values = normal(count, images, rank, seed=seed) @ normal(count, rank, width, seed=seed + 1000)
    values += normal(count, 1, width, seed=seed + 2000)
    components = [Component("head", number // 2, number % 2) for number in range(count)]
    if constant:
        values = torch.cat([values, normal(1, 1, width, seed=seed + 3000).expand(1, images, width)])
        components.append(Component("constant", name="head.bias"))
    return Decomposition(values, tuple(components), values.sum(0))


def bank(count=TEXTS, *, width=WIDTH, seed=7):
    return TextBank([f"text {n}" for n in range(count)], normal(count, width, seed=seed), space="here")


def shuffled(parts, order):
    """The same contributions under other labels, and which label each one's is now."""
    components = [c for c in parts.components if c.kind == "head"]
    values = parts.select(kind="head").values[order]
    found = {components[old].label: components[new].label for new, old in enumerate(order)}
    return Decomposition(values, tuple(components), parts.total, complete=False), found


def by_variance(one, two):
    return match_by_texts(one, two, bank(), profile="variance", rotations=3)


# --- participation ratio and concentration --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_ratio_counts_components_that_write_the_same(count):
    assert float(participation_ratio(torch.full((count,), 0.3, dtype=torch.float64))) == pytest.approx(count)
    padded = torch.cat([torch.full((count,), 5.0), torch.zeros(4)])
    assert float(participation_ratio(padded)) == pytest.approx(count)
    one_hot = torch.nn.functional.one_hot(torch.tensor(0), count).double()
    assert float(participation_ratio(one_hot)) == 1


def test_what_writes_against_a_feature_has_no_share():
    scores = torch.tensor([[3.0, 1.0, -1.0], [1.0, -8.0, -1.0], [-2.0, 1.0, 0.0]], dtype=torch.float64)
    shares = torch.tensor([0.75, 0.25])
    found = participation_ratio(scores)
    assert found[:2].tolist() == pytest.approx([1 / float(shares.square().sum()), 2.0])
    assert found[2].isnan()
    assert torch.equal(participation_ratio(1000 * scores)[:2], found[:2])


def test_scores_are_covariances_that_sum_to_the_whole():
    parts, texts = heads(), bank(3)
    found = concentration(parts, {"some": texts, "one": texts.select("text 1")}, resamples=20)
    for column, some in enumerate((texts.texts, ("text 1",))):
        projector = torch.linalg.pinv(texts.select(some).directions) @ texts.select(some).directions
        along = (parts.values - parts.values.mean(1, keepdim=True)) @ projector
        plain = torch.stack([(one * along.sum(0)).sum(1).mean() for one in along])
        assert torch.allclose(found.scores[:, column], plain, rtol=1e-10, atol=1e-12)
        whole = (parts.total - parts.total.mean(0)) @ projector
        assert float(found.scores[:, column].sum()) == pytest.approx(float(whole.square().sum(1).mean()), rel=1e-10)
        shares = plain.clamp(min=0) / plain.clamp(min=0).sum()
        assert found[found.features[column]] == pytest.approx(1 / float(shares.square().sum()))
        against = float(-plain.clamp(max=0).sum())
        assert float(found.opposed[column]) == pytest.approx(against / float(plain.abs().sum()), abs=1e-12)
    assert found.scores[-1].tolist() == [0, 0]  # the constant
    assert repr(found).startswith("Concentration(some ")
    with pytest.raises(UnknownNameError, match="did you mean 'some'"):
        found["sme"]


def test_intervals_are_those_of_images_drawn_again():
    parts, texts = heads(), bank(2)
    found = concentration(parts, {"some": texts}, resamples=50, level=0.8, seed=3)
    drawn = []
    for counts in bootstrap_counts(IMAGES, 50, 3):
        images = torch.repeat_interleave(torch.arange(IMAGES), counts)
        drawn.append(concentration(parts.images(images), {"some": texts}, resamples=1)["some"])
    ends = torch.tensor(drawn, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert [float(found.low[0]), float(found.high[0])] == pytest.approx(ends.tolist())
    assert found.told("some") == f"{found['some']:.1f} [{ends[0]:.1f}, {ends[1]:.1f}]"


def test_intervals_hold_the_truth_as_often_as_they_say():
    variances = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    truth, held = float(participation_ratio(variances)), 0
    line = TextBank(["it"], torch.ones(1, 1, dtype=torch.float64), space="here")
    for seed in range(120):
        values = variances.sqrt()[:, None, None] * normal(4, 300, 1, seed=seed)
        found = concentration(Decomposition(values, ("a", "b", "c", "d")), {"it": line}, resamples=150, seed=seed)
        held += float(found.low[0]) <= truth <= float(found.high[0])
    # Percentile intervals of a ratio hold a little less than they say: of 95 %, about 93.
    assert abs(held / 120 - 0.93) < 3 * (0.93 * 0.07 / 120) ** 0.5


def test_a_feature_that_nobody_writes_has_no_ratio():
    values = torch.zeros(2, 10, 2)
    values[:, :, 0] = normal(2, 10).float()
    up = TextBank(["up"], torch.tensor([[0.0, 1.0]]), space="here")
    found = concentration(Decomposition(values, ("L0H0", "L0H1")), {"up": up}, resamples=5)
    assert found.ratio.isnan().all()
    assert found.told("up") == "–"


# --- CKA ------------------------------------------------------------------------------------------------------------


def centred_gram(vectors):
    middle = torch.eye(len(vectors), dtype=torch.float64) - 1 / len(vectors)
    return middle @ (vectors @ vectors.T) @ middle


def plain_cka(one, two):
    first, second = centred_gram(one), centred_gram(two)
    return float((first @ second).trace() / ((first @ first).trace() * (second @ second).trace()).sqrt())


def unbiased_hsic(one, two):
    """As Song and others (2012) write it."""
    n = len(one)
    first, second = one @ one.T, two @ two.T
    first, second = (gram - gram.diagonal().diag() for gram in (first, second))
    whole = first.sum() * second.sum() / ((n - 1) * (n - 2))
    return ((first @ second).trace() + whole - 2 / (n - 2) * (first @ second).sum()) / (n * (n - 3))


def plain_debiased(one, two):
    return float(unbiased_hsic(one, two) / (unbiased_hsic(one, one) * unbiased_hsic(two, two)).sqrt())


@pytest.mark.parametrize("images", [4, 9, 30])
@pytest.mark.parametrize(("debiased", "plain"), [(False, plain_cka), (True, plain_debiased)])
def test_cka_is_that_of_centred_grams(images, debiased, plain):
    one, two = normal(images, 5) + 3, normal(images, 9, seed=1) - 2
    two[:, :3] += one[:, :3]
    assert linear_cka(one, two, debiased=debiased) == pytest.approx(plain(one, two), rel=1e-10)
    assert linear_cka(one, one, debiased=debiased) == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_see_rotation_shift_and_scale(debiased):
    one, two = normal(20, 6), normal(20, 4, seed=1)
    moved = 1e3 * one @ rotation(6) + normal(6, seed=2)
    assert linear_cka(moved, two, debiased=debiased) == pytest.approx(linear_cka(one, two, debiased=debiased), rel=1e-9)


def test_debiased_cka_of_unrelated_vectors_is_zero_on_average():
    pairs = [(normal(12, 20, seed=seed), normal(12, 20, seed=seed + 500)) for seed in range(100)]
    biased, debiased = (
        torch.tensor([linear_cka(*pair, debiased=flag) for pair in pairs], dtype=torch.float64)
        for flag in (False, True)
    )
    assert biased.mean() > 0.5
    assert debiased.mean().abs() < 4 * debiased.std() / 10


@pytest.mark.parametrize("debiased", [False, True])
def test_each_pair_of_heads_has_its_own_cka(debiased):
    one, two = heads(4), heads(3, seed=1, width=7)
    found = match_by_cka(one, two, debiased=debiased, permutations=2)
    plain = plain_debiased if debiased else plain_cka
    for row, column in itertools.product(range(4), range(3)):
        expected = plain(one.values[row], two.values[column])
        assert float(found.similarity[row, column]) == pytest.approx(expected, abs=1e-10)
    assert [c.label for c in found.first] == ["L0H0", "L0H1", "L1H0", "L1H1"]  # constants are left out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_turned_and_shuffled_copy_is_found_by_cka(dtype):
    parts = heads(6)
    copy, truth = shuffled(parts, [3, 1, 5, 0, 4, 2])
    wider = torch.linalg.qr(normal(20, WIDTH)).Q.T  # an isometry into another width
    found = match_by_cka(parts.to(dtype), copy.map(3 * wider).to(dtype), permutations=99)
    assert {match.component: match.other for match in found.matches} == truth
    assert all(match.mutual and match.p == pytest.approx(0.01) for match in found.matches)
    assert found.similarity.amax(1).tolist() == pytest.approx([1] * 6, rel=1e-5)
    assert len(found.mutual) == len(found.above_chance) == 6
    assert found.mean == pytest.approx(1, rel=1e-5)
    assert found.mean_chance < 0.5


@pytest.mark.parametrize("match", [match_by_cka, by_variance])
def test_a_head_that_does_not_vary_is_nobodys_match_and_in_no_mean(match):
    one, two = heads(3, constant=False), heads(4, seed=1, constant=False)
    for parts, still in ((one, 1), (two, 0)):
        parts.values[still] = parts.values[still, :1]
    for second, others in ((two, (1, 2, 3)), (one, (0, 2))):
        found = match(one, second)
        kept = match(one.select(labels=["L0H0", "L1H0"]), second.select(labels=[second.labels[n] for n in others]))
        for label in ("L0H0", "L1H0"):
            mine, expected = vars(found[label]), vars(kept[label])
            numbers = {name: pytest.approx(value) for name, value in expected.items() if isinstance(value, float)}
            assert mine == {**expected, **numbers}
        assert [match.component for match in found.mutual] == [match.component for match in kept.mutual]
        assert (found.mean, found.mean_chance) == pytest.approx((kept.mean, kept.mean_chance))
        assert (found["L0H1"].similarity, found["L0H1"].p, found["L0H1"].mutual) == (0, 1, False)
    alone = match(one.select(labels=["L0H1"]), two.select(labels=["L0H0"]))
    assert alone.mutual == ()
    assert math.isnan(alone.mean)


def test_against_less_than_nothing_a_head_that_does_not_vary_is_no_match():
    null = torch.zeros(3, 2, dtype=torch.float64)
    similarity = torch.tensor([[-0.5, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = Matching(("a", "still"), ("x", "still"), similarity, null, null, "nothing", (3, 3))
    first = found.matches[0]
    assert (first.component, first.other, first.similarity, first.mutual) == ("a", "x", -0.5, True)
    assert [match.component for match in found.mutual] == ["a"]
    assert found.mean == -0.5


def test_a_head_that_does_not_vary_is_like_no_other():
    parts = heads(3).to(torch.float32)
    parts.values[1] = parts.values[1, :1] * (1 + 1e-7 * torch.randn(IMAGES, 1, generator=generator(0)))
    found = match_by_cka(parts, parts, permutations=9)
    assert found.similarity[1].abs().max() == 0
    assert found["L0H1"].p == 1
    profiles = text_profiles(parts, bank())
    assert profiles[1].abs().max() == 0
    assert match_by_texts(parts, parts, bank(), rotations=9)["L0H1"].similarity == 0


# --- texts ----------------------------------------------------------------------------------------------------------


def test_profiles_are_those_of_plain_loops():
    parts, texts = heads(), bank()
    correlation = text_profiles(parts, texts, centre=False)
    variance = text_profiles(parts, texts, profile="variance", centre=False)
    for row, column in itertools.product(range(5), range(TEXTS)):
        along, whole = parts.values[row] @ texts.directions[column], parts.total @ texts.directions[column]
        assert float(variance[row, column]) == pytest.approx(float(along.var(correction=0)), rel=1e-8)
        expected = float(torch.corrcoef(torch.stack([along, whole]))[0, 1])
        assert float(correlation[row, column]) == pytest.approx(expected, abs=1e-8)
    centred = text_profiles(parts, texts)
    assert torch.allclose(centred, correlation - correlation.mean(1, keepdim=True))
    only = parts.select(labels=["L0H1"])  # knows the total
    assert torch.allclose(text_profiles(only, texts)[0], centred[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_beyond_what_a_component_or_the_model_writes_there_is_no_correlation(dtype, offset):
    """Rounding has a correlation with anything; a hundredth of a component is none."""
    turn = rotation(WIDTH)
    values = torch.zeros(3, IMAGES, WIDTH, dtype=torch.float64)
    values[0, :, :4], values[1, :, 2:6] = normal(IMAGES, 4), normal(IMAGES, 4, seed=1)
    values[2, :, :6], values[0, :, 3] = normal(IMAGES, 6, seed=2), values[0, :, 3] / 100
    parts = Decomposition(((values + offset * normal(3, 1, WIDTH, seed=3)) @ turn).to(dtype), ("L0H0", "L0H1", "L0H2"))
    texts = TextBank([f"axis {n}" for n in range(WIDTH)], turn, space="here")
    found = text_profiles(parts, texts, centre=False)
    written = torch.zeros(3, WIDTH, dtype=torch.bool)
    written[0, :4] = written[1, 2:6] = written[2, :6] = True
    assert (found[~written] == 0).all()
    assert (found[written] != 0).all()
    turned = values @ turn
    plain = text_profiles(Decomposition(turned, parts.components), texts, centre=False)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-3 if offset and dtype == torch.float32 else 1e-5)


@pytest.mark.parametrize("profile", ["correlation", "variance"])
def test_profiles_do_not_see_a_rotation_of_all(profile):
    parts, texts, turn = heads(), bank(), rotation(WIDTH)
    turned = TextBank(texts.texts, texts.directions @ turn, space="here")
    found = text_profiles(parts.map(turn), turned, profile=profile)
    assert torch.allclose(found, text_profiles(parts, texts, profile=profile), atol=1e-10)


@pytest.mark.parametrize("profile", ["correlation", "variance"])
@pytest.mark.parametrize("centre", [True, False])
def test_a_shuffled_copy_is_found_by_texts(profile, centre):
    parts = heads(6)
    copy, truth = shuffled(parts, [3, 1, 5, 0, 4, 2])
    found = match_by_texts(parts, copy.images(range(5, IMAGES)), bank(), profile=profile, centre=centre, rotations=49)
    assert {match.component: match.other for match in found.matches} == truth
    assert all(match.mutual and match.p == pytest.approx(0.02) for match in found.matches)
    assert found.images == (IMAGES, IMAGES - 5)
    cosines = torch.nn.functional.cosine_similarity(
        text_profiles(parts, bank(), profile=profile, centre=centre)[:6, None],
        text_profiles(copy.images(range(5, IMAGES)), bank(), profile=profile, centre=centre)[None],
        dim=2,
    )
    assert torch.allclose(found.similarity, cosines)


def test_rotations_stand_for_contributions_that_are_turned(monkeypatch):
    one, two, texts = heads(3), heads(2, seed=1), bank()
    turn = rotation(WIDTH, seed=5)
    monkeypatch.setattr("vitdecomp_lens.interpret.comparing.profiles._rotation", lambda size, chance: turn)
    chance = match_by_texts(one, two, texts, rotations=1)
    turned = match_by_texts(one, two.map(turn.T), texts, rotations=1)
    assert torch.allclose(chance.null_first[0], turned.similarity.amax(1))
    assert torch.allclose(chance.null_second[0], turned.similarity.amax(0))


# --- chance ---------------------------------------------------------------------------------------------------------


def by_cka(one, two, seed):
    return match_by_cka(one, two, permutations=19, seed=seed)


def by_texts(one, two, seed):
    return match_by_texts(one, two, bank(12, width=6), rotations=19, seed=seed)


@pytest.mark.parametrize("match", [by_cka, by_texts])
def test_unrelated_heads_match_more_than_chance_in_one_of_twenty(match):
    repeats, found = 200, 0
    for seed in range(repeats):
        one = heads(2, seed=seed, images=10, width=6, rank=2)
        two = heads(3, seed=seed + 10_000, images=10, width=6, rank=2)
        found += match(one, two, seed)["L0H1"].p <= 0.05
    error = (0.05 * 0.95 / repeats) ** 0.5
    assert abs(found / repeats - 0.05) < 3 * error


def test_p_values_count_chance_and_the_match_itself():
    null = torch.tensor([[0.1, 0.9], [0.5, 0.9], [0.2, 0.8]], dtype=torch.float64)
    similarity = torch.tensor([[0.5, 0.3, 0.4], [0.7, 0.85, 0.1]], dtype=torch.float64)
    found = Matching(("a", "b"), ("x", "y", "z"), similarity, null, null[:, [0, 1, 1]], "nothing", (3, 3))
    assert [(m.component, m.other, m.similarity, m.mutual) for m in found.matches] == [
        ("a", "x", 0.5, False),
        ("b", "y", 0.85, True),
    ]
    assert [m.p for m in found.matches] == pytest.approx([2 / 4, 3 / 4])
    assert [m.chance for m in found.matches] == pytest.approx([0.8 / 3, 2.6 / 3])
    back = found.flipped()
    assert [(m.component, m.other, m.mutual) for m in back.matches] == [
        ("x", "b", False),
        ("y", "b", True),
        ("z", "a", False),
    ]
    assert [m.p for m in back.matches] == pytest.approx([1 / 4, 3 / 4, 1.0])
    assert [found.mean, back.mean] == pytest.approx([(0.5 + 0.85 + 0.7 + 0.85 + 0.4) / 5] * 2)
    assert found.above_chance == ()
    assert repr(found) == "Matching(2 with 3 components by nothing: 0.660, by chance 0.627; 1 mutual)"


def test_more_than_chance_counts_all_matches_that_were_looked_at():
    null = torch.linspace(0, 1, 99, dtype=torch.float64)[:, None].expand(99, 20)
    for likely, told in ((4, 4), (3, 0)):  # of 20 tests at p = .01, .01 × 20 / 4 = .05 and .01 × 20 / 3 > .05
        similarity = torch.full((20, 1), 0.5, dtype=torch.float64)
        similarity[:likely] = 2
        found = Matching([f"h{n}" for n in range(20)], ("x",), similarity, null, null[:, :1], "nothing", (3, 3))
        assert [match.p for match in found.matches[: likely + 1]] == pytest.approx([0.01] * likely + [0.51])
        assert len(found.above_chance) == told


@pytest.mark.parametrize("match", [match_by_cka, match_by_texts])
def test_chance_is_drawn_often_enough_for_a_single_match(match):
    """Among 15 heads a single one has to be at 1 in 300."""
    one, two = heads(15, images=12, width=20), heads(15, seed=50, images=12, width=20)
    two.values[7] = one.values[4]
    options = {} if match is match_by_cka else {"bank": bank(40, width=20), "profile": "variance"}
    found = match(one, two, **options)
    assert [len(found.null_first), len(found.null_second)] == [300, 300]
    assert "L2H0" in [one.component for one in found.above_chance]
    option = "permutations" if match is match_by_cka else "rotations"
    assert len(match(one, two, **options, **{option: 7}).null_first) == 7


def test_chance_is_drawn_as_often_as_it_may_cost():
    assert draws_for(4, 1) == FEWEST == 200
    assert draws_for(144, 1) == 2880
    assert draws_for(144, OPERATIONS // 500) == 500
    assert draws_for(144, OPERATIONS) == 200


# --- several models -------------------------------------------------------------------------------------------------


def several():
    one = heads(4)
    copy, _ = shuffled(one, [2, 0, 3, 1])
    return {"one": one, "co|py": copy, "other": heads(3, seed=5)}


def test_models_stand_beside_each_other_in_a_table():
    features = {"colour": bank(2), "shape": bank(3, seed=8)}
    found = compare_models(several(), features, resamples=20, draws=99)
    assert found.models == ("one", "co|py", "other")
    assert list(found.matchings) == [("one", "co|py"), ("one", "other"), ("co|py", "other")]
    first, second = found.table().split("\n\n")
    lines = first.splitlines()
    assert "co\\|py (of 4)" in lines[0]
    assert set(lines[1]) == set("| -")
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("| colour ")
    assert found.concentrations["other"].told("colour") in lines[2]
    same = second.splitlines()[2]
    assert [cell.strip() for cell in same.split(" | ")][1:3] == ["debiased CKA", "1.00"]
    assert same.rstrip(" |").endswith("4 of 4, 4 of 4 | 4")
    assert repr(found) == "Comparison(one, co|py, other: 2 features, 3 pairs of models matched)"


def test_models_are_compared_by_texts_and_alone():
    features = {"colour": bank(2)}
    found = compare_models(several(), features, by="texts", bank=bank(), resamples=5, draws=9)
    assert found.matchings["one", "co|py"].measure == f"correlation with {TEXTS} texts"
    alone = compare_models({"one": heads(2)}, features, resamples=5)
    assert alone.matchings == {}
    assert len(alone.table().splitlines()) == 3


def test_models_stand_beside_each_other_in_a_picture(tmp_path):
    features = {"colour": bank(2), "$x^": bank(3, seed=8)}
    figure = compare_models(several(), features, resamples=20, draws=9).plot()
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    ratios, matches = figure.axes[:2]
    assert [label.get_text() for label in ratios.get_yticklabels()] == ["colour", "$x^"]
    assert len(ratios.get_legend().get_texts()) == 3
    assert [label.get_text() for label in matches.get_xticklabels()] == ["one", "co|py", "other"]
    alone = compare_models({"one": heads(2)}, features, resamples=5).plot()
    assert len(alone.axes) == 1


def test_a_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setattr(models, "can_draw", lambda: False)
    with pytest.raises(InputError, match=r"vitdecomp-lens\[viz\]"):
        compare_models({"one": heads(2)}, {"colour": bank(2)}, resamples=5).plot()


# --- what is refused ------------------------------------------------------------------------------------------------


def broken():
    parts = heads(3)
    parts.values[1, 2, 3] = torch.nan
    return parts


def without_total():
    return Decomposition(heads(2).values[:2], ("L0H0", "L0H1"), complete=False)


def constants_only():
    return heads(2).select(kind="constant")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: concentration(heads(), {}), "at least one feature"),
        (lambda: concentration(heads(), {"a": bank(width=9)}), "map"),
        (lambda: concentration(without_total(), {"a": bank(2)}), "with the total of the model"),
        (lambda: concentration(broken(), {"a": bank(2)}), "'L0H1' have NaN"),
        (lambda: concentration(heads().images([0]), {"a": bank(2)}), "at least 2 images"),
        (lambda: match_by_cka(heads(), heads(images=9)), "there are 40 and 9"),
        (lambda: match_by_cka(heads(images=3), heads(images=3)), "at least 4 images"),
        (lambda: match_by_cka(broken(), heads()), "'L0H1' have NaN"),
        (lambda: match_by_cka(constants_only(), heads()), "only constants"),
        (lambda: match_by_cka(heads(), heads(), permutations=0), "permutations= of at least 1"),
        (lambda: match_by_texts(heads(), heads(), bank(), profile="mean"), "'correlation', 'variance'"),
        (lambda: match_by_texts(without_total(), heads(), bank()), "with the total of the model"),
        (lambda: match_by_texts(heads(), heads(), bank(), rotations=0), "rotations= of at least 1"),
        (lambda: concentration(heads(), {"a": bank(2)}, resamples=0), "resamples= of at least 1"),
        (lambda: concentration(heads(), {"a": bank(2)}, level=95.0), "level= between 0 and 1"),
        (lambda: compare_models({"a": heads()}, {"a": bank(2)}, draws=0), "draws= of at least 1"),
        (lambda: linear_cka(normal(5, 2), normal(6, 2)), "got 5 and 6"),
        (lambda: linear_cka(normal(3, 2), normal(3, 2)), "at least 4"),
        (lambda: compare_models({}, {"a": bank(2)}), "at least one model.*got none"),
        (lambda: compare_models({"a": heads()}, {"a": bank(2)}, by="texts"), "with bank="),
        (lambda: compare_models({"a": heads()}, {"a": bank(2)}, by="kca"), "got 'kca'"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_models_without_names_are_refused_where_types_are_not_checked():
    with pytest.raises(InputError, match=r"as \{name: decomposition\}; got a list"):
        inspect.unwrap(compare_models)([heads(), heads()], {"a": bank(2)})


def test_another_space_is_refused():
    parts = Decomposition(heads(2, constant=False).values, ("L0H0", "L0H1"), metadata={"space": "there"})
    for call in (lambda: concentration(parts, {"a": bank(2)}), lambda: match_by_texts(parts, parts, bank())):
        with pytest.raises(InputError, match="'there'"):
            call()


def test_too_much_memory_is_refused_with_what_fits():
    parts = heads(3)
    needed = 9 * IMAGES**2 * 8
    assert match_by_cka(parts, parts, permutations=1, max_bytes=needed)
    with pytest.raises(CapacityError, match=r"slice\(28\)"):
        match_by_cka(parts, parts, permutations=1, max_bytes=needed // 2)


def test_comparing_models_is_allowed_more_memory():
    parts = heads(3)
    needed = 9 * IMAGES**2 * 8
    options = {"resamples": 5, "draws": 1}
    assert compare_models({"a": parts, "b": parts}, {"x": bank(2)}, max_bytes=needed, **options).matchings
    with pytest.raises(CapacityError, match="max_bytes="):
        compare_models({"a": parts, "b": parts}, {"x": bank(2)}, max_bytes=needed - 1, **options)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, list | tuple) else (found,):
            if isinstance(one, torch.Tensor):
                self.bytes = max(self.bytes, one.nbytes)
        return found


def test_concentration_never_holds_all_values_again():
    values = normal(30, 50, 64).float()
    parts = Decomposition(values, [f"L0H{n}" for n in range(30)], values.sum(0))
    with Largest() as largest:
        concentration(parts, {"a": bank(2, width=64)}, resamples=10)
    assert largest.bytes < values.nbytes / 4


def test_concentrations_carry_labels():
    numbers = torch.ones(1)
    found = Concentration(("a",), ("L0H0",), torch.ones(1, 1), numbers, numbers, numbers, numbers, 0.95, 5, 10)
    assert found.components == (Component("head", 0, 0),)
    with pytest.raises(InputError, match="for each of the 2 rows"):
        Concentration(("a",), ("L0H0",), torch.ones(2, 1), numbers, numbers, numbers, numbers, 0.95, 5, 10)
