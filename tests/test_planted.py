"""Planted truth: what is said of it holds."""

import dataclasses
import math

import pytest
import torch

from vitdecomp_lens.decomposition import ComponentMaps, Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.testbed.planted import (
    planted_features,
    planted_groups,
    planted_maps,
    planted_spans,
    planted_tokens,
)

EXACT = {"dtype": torch.float64}
SMALL = {
    planted_maps: {"images": 7, "d_rep": 10, "d_clip": 9, "d_head": 3},
    planted_features: {"images": 7, "d_clip": 9},
    planted_spans: {"images": 7, "d_clip": 9, "texts": 23},
    planted_tokens: {"images": 7, "grid": (3, 4)},
    planted_groups: {"images": 7, "d_rep": 10},
}
OF_IMAGES = {"parts", "targets", "factors", "tokens", "masks", "strengths", "label", "spurious"}
planting = pytest.mark.parametrize("plant", SMALL, ids=lambda plant: plant.__name__)


def correlations(x, y):
    """Over axis 0, of each column with the one of the same number."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (x * y).sum(0) / (x.norm(dim=0) * y.norm(dim=0))


def ranks(x):
    """With the mean rank for what is equal."""
    return ((x[:, None] > x).double() + (x[:, None] == x).double() / 2).sum(1)


def spearman(x, y):
    return float(correlations(ranks(x), ranks(y)))


def fields(planted):
    """Its fields, with what can be compared by torch.equal or ==."""
    found = {field.name: getattr(planted, field.name) for field in dataclasses.fields(planted)}
    return {
        name: getattr(value, "values", value) if name in ("parts", "tokens") else value for name, value in found.items()
    }


def same(x, y):
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


# --- all of them ------------------------------------------------------------------------------------------------


@planting
def test_the_components_sum_to_the_total(plant):
    planted = plant(**SMALL[plant], **EXACT)
    assert planted.parts.values.shape[1] == 7
    assert float(planted.parts.check_gap().gap.max()) < 1e-13
    assert plant(**SMALL[plant]).parts.check_gap().values.dtype == torch.float32


@planting
def test_a_seed_is_a_truth_and_a_draw_is_images_of_it(plant):
    first, again = (fields(plant(**SMALL[plant], seed=3, draw=1)) for _ in range(2))
    assert all(same(first[name], again[name]) for name in first)
    drawn = fields(plant(**SMALL[plant], seed=3, draw=2))
    assert {name for name in first if not same(first[name], drawn[name])} == OF_IMAGES & first.keys()
    more = fields(plant(**{**SMALL[plant], "images": 9}, seed=3, draw=1))
    assert all(same(first[name], more[name]) for name in first.keys() - OF_IMAGES)
    other = fields(plant(**SMALL[plant], seed=4, draw=1))
    tensors = {name for name, value in first.items() if isinstance(value, torch.Tensor)}
    assert not any(same(first[name], other[name]) for name in tensors)


@planting
def test_draws_have_the_same_means(plant):
    first, second = (plant(**{**SMALL[plant], "images": 3000}, draw=draw, **EXACT).parts.values for draw in (1, 2))
    error = (first.var(1) + second.var(1)).div(3000).sqrt()
    assert bool(((first.mean(1) - second.mean(1)).abs() <= 5 * error + 1e-12).all())


@planting
def test_a_dtype_is_a_cast_of_the_same_numbers(plant):
    fine, coarse = (fields(plant(**SMALL[plant], dtype=dtype)) for dtype in (torch.float64, torch.float32))
    for name, value in fine.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.dtype == torch.float64
            assert torch.equal(value.float(), coarse[name])
        else:
            assert same(value, coarse[name])


@planting
def test_pieces_make_one_set(plant):
    pieces = [plant(**SMALL[plant], draw=draw).parts for draw in range(3)]
    assert Decomposition.cat(pieces).check_gap().values.shape[1] == 21


@pytest.mark.parametrize(
    ("plant", "name", "value"),
    [
        *((plant, "images", 0) for plant in SMALL),
        *((plant, "components", 0) for plant in SMALL),
        *((plant, "noise", -0.1) for plant in SMALL),
        *((plant, "noise", math.nan) for plant in SMALL),
        (planted_maps, "d_head", 10),
        (planted_maps, "d_head", 0),
        (planted_maps, "d_rep", 0),
        (planted_maps, "d_clip", 0),
        (planted_features, "features", 10),
        (planted_spans, "images", 5),
        (planted_spans, "d_clip", 5),
        (planted_spans, "texts", 4),
        (planted_spans, "per_component", 0),
        (planted_spans, "coherence", 1.0),
        (planted_spans, "coherence", -0.1),
        (planted_tokens, "grid", (1, 4)),
        (planted_tokens, "d_clip", 2),
        (planted_groups, "components", 1),
        (planted_groups, "d_rep", 1),
        (planted_groups, "agrees", 1.1),
    ],
)
def test_what_cannot_be_planted_is_refused_by_name(plant, name, value):
    with pytest.raises(InputError, match=rf"^Expected {name}= "):
        plant(**{**SMALL[plant], name: value})


@pytest.mark.parametrize(("d_rep", "d_clip"), [(2, 9), (9, 2)])
def test_a_span_has_to_fit_into_both_spaces(d_rep, d_clip):
    with pytest.raises(InputError, match=r"^Expected d_head= from 1 to 2; got 3\.$"):
        planted_maps(images=4, d_rep=d_rep, d_clip=d_clip, d_head=3)


# --- maps -------------------------------------------------------------------------------------------------------

SPACES = pytest.mark.parametrize(("d_rep", "d_clip"), [(11, 17), (13, 13), (19, 12), (4, 9), (9, 4), (4, 4)])


@SPACES
def test_maps_are_isometries_on_the_spans_and_zero_off_them(d_rep, d_clip):
    planted = planted_maps(images=20, d_rep=d_rep, d_clip=d_clip, components=5, d_head=4, **EXACT)
    spans, maps, eye = planted.spans, planted.maps, torch.eye(4, dtype=torch.float64)
    assert maps.shape == (5, d_rep, d_clip)
    assert float((spans.mT @ spans - eye).abs().max()) < 1e-12
    assert float((spans.mT @ maps @ maps.mT @ spans - eye).abs().max()) < 1e-12
    off = torch.eye(d_rep, dtype=torch.float64) - spans @ spans.mT
    assert float((off @ maps).abs().max()) < 1e-12


@SPACES
def test_components_fill_their_spans_and_no_more(d_rep, d_clip):
    planted = planted_maps(images=200, d_rep=d_rep, d_clip=d_clip, components=5, d_head=4, **EXACT)
    values = planted.parts.values
    assert float((values - values @ planted.spans @ planted.spans.mT).abs().max()) < 1e-12
    spectra = torch.linalg.svdvals(values - values.mean(1, keepdim=True)) / math.sqrt(200)
    assert float(spectra[:, 3].min()) > 0.05
    assert bool((spectra[:, 0] > 1.7 * spectra[:, 3]).all())  # not flat
    assert float(spectra[:, 0].max() / spectra[:, 0].min()) > 1.5  # of differing scales
    assert bool((values.mean(1).norm(dim=-1) > 2 * spectra[:, 0] / math.sqrt(200)).all())


@SPACES
def test_the_targets_are_the_components_through_their_maps(d_rep, d_clip):
    planted = planted_maps(images=20, d_rep=d_rep, d_clip=d_clip, components=5, d_head=4, **EXACT)
    mapped = sum(planted.parts.values[i] @ planted.maps[i] for i in range(5))
    torch.testing.assert_close(planted.targets, mapped, rtol=0, atol=1e-12)
    assert isinstance(planted, ComponentMaps)
    torch.testing.assert_close(planted.parts.map(planted).total, planted.targets, rtol=0, atol=1e-12)


def test_maps_keep_lengths_and_angles_of_a_component():
    planted = planted_maps(images=20, d_rep=15, d_clip=12, components=3, d_head=4, **EXACT)
    before, after = planted.parts.values, planted.parts.values @ planted.maps
    torch.testing.assert_close(before @ before.mT, after @ after.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("d_rep", "d_clip"), [(11, 17), (19, 12)])
def test_least_squares_finds_the_maps(d_rep, d_clip):
    planted = planted_maps(images=60, d_rep=d_rep, d_clip=d_clip, components=5, d_head=4, **EXACT)
    rows = planted.parts.values.transpose(0, 1).flatten(1)
    found = (torch.linalg.pinv(rows, rtol=1e-10) @ planted.targets).reshape(5, d_rep, d_clip)
    torch.testing.assert_close(found, planted.maps, rtol=0, atol=1e-9)
    held_out = planted_maps(images=9, d_rep=d_rep, d_clip=d_clip, components=5, d_head=4, draw=1, **EXACT)
    torch.testing.assert_close((held_out.parts.values @ found).sum(0), held_out.targets, rtol=0, atol=1e-9)


def test_noise_is_in_units_of_the_targets():
    clean, noisy = (planted_maps(images=4000, d_rep=20, d_clip=16, noise=noise) for noise in (0.0, 0.5))
    assert torch.equal(clean.parts.values, noisy.parts.values)
    spread = (clean.targets - clean.targets.mean(0)).square().mean().sqrt()
    added = noisy.targets - clean.targets
    assert float(added.square().mean().sqrt() / spread) == pytest.approx(0.5, rel=0.03)
    assert float(correlations(added, clean.targets).abs().max()) < 0.07


# --- features ---------------------------------------------------------------------------------------------------


def test_components_are_weighted_sums_of_features():
    planted = planted_features(images=30, d_clip=12, noise=0.0, **EXACT)
    directions, weights = planted.directions, planted.weights
    assert float((directions @ directions.T - torch.eye(6, dtype=torch.float64)).abs().max()) < 1e-13
    varying = planted.parts.values - planted.parts.values.mean(1, keepdim=True)
    factors = planted.factors - planted.factors.mean(0)
    expected = torch.einsum("if,bf,fd->ibd", weights, factors, directions)
    torch.testing.assert_close(varying, expected, rtol=0, atol=1e-12)
    assert float(planted.parts.values.mean(1).abs().max()) > 1  # a score that does not centre is wrong


@pytest.mark.parametrize(("components", "features"), [(20, 6), (3, 8), (1, 1), (9, 1)])
def test_weights_are_sparse_and_every_feature_is_written(components, features):
    for seed in range(5):
        weights = planted_features(images=1, d_clip=8, components=components, features=features, seed=seed).weights
        assert bool((weights[weights != 0] >= 0.25).all())
        assert bool((weights > 0).any(0).all())
        assert int((weights == 0).all(1).sum()) == components // 5
    assert features == 1 or components == 1 or bool((weights == 0).any())


def test_weights_that_are_not_sparse_are_all_different():
    weights = planted_features(images=1, d_clip=8, components=40, features=5, sparse=False).weights
    assert all(len(of.unique()) == 40 for of in weights.T)
    assert 0 < float(weights.min()) < 0.25 < 1 < float(weights.max()) < 1.25


@pytest.mark.parametrize("seed", range(3))
def test_scores_have_the_order_of_the_weights(seed):
    planted = planted_features(images=4000, d_clip=24, seed=seed, **EXACT)
    along = planted.parts.project(planted.directions)
    scores = torch.stack([correlations(values, along.total) for values in along.values])
    torch.testing.assert_close(scores, planted.scores, rtol=0, atol=0.06)
    for weights, of_feature, limits in zip(planted.weights.T, scores.T, planted.scores.T, strict=True):
        carried = weights > 0
        assert spearman(weights, limits) == pytest.approx(1)
        assert float(of_feature[carried].min()) > float(of_feature[~carried].max())
        assert spearman(weights[carried], of_feature[carried]) > 0.9
    overall = [spearman(*of) for of in zip(planted.weights.T, scores.T, strict=True)]
    assert sum(overall) / len(overall) > 0.8  # not 1, as the order of those that write nothing is chance


def test_without_noise_scores_are_1_and_0():
    planted = planted_features(images=5, d_clip=8, noise=0.0, **EXACT)
    torch.testing.assert_close(planted.scores, (planted.weights > 0).double(), rtol=0, atol=1e-12)


# --- spans ------------------------------------------------------------------------------------------------------


def greedy(values, directions, steps, *, project, unit):
    """The loop of TextSpan, from scratch: the row along which values vary most, which is then taken out of both."""
    values, found, gone = values - values.mean(0), [], []
    basis = torch.linalg.svd(values, full_matrices=False).Vh[:5]
    rows = directions @ basis.T @ basis if project else directions
    for _ in range(steps):
        sizes = rows.norm(dim=1, keepdim=True)
        scaled = torch.where(sizes > 1e-9, rows / sizes, 0) if unit else rows
        found.append(int((values @ scaled.T).std(0).argmax()))
        taken = rows[found[-1]] / rows[found[-1]].norm()
        gone.append(float((values @ taken).square().mean()))
        values, rows = (x - (x @ taken)[:, None] * taken for x in (values, rows))
    return found, gone


@pytest.mark.parametrize(
    ("project", "unit", "steps"), [(True, False, 5), (False, False, 5), (False, True, 5), (True, True, 4)]
)
@pytest.mark.parametrize("images", [6, 300])
def test_a_greedy_method_finds_the_texts_in_their_order(project, unit, steps, images):
    planted = planted_spans(images=images, d_clip=32, **EXACT)
    for row, label in enumerate(planted.parts):
        found, gone = greedy(planted.parts[label], planted.directions, steps, project=project, unit=unit)
        assert tuple(planted.texts[number] for number in found) == planted.chosen[label][:steps]
        variances = planted.deviations[row, :steps] ** 2
        torch.testing.assert_close(torch.tensor(gone, **EXACT), variances, rtol=1e-10, atol=0)


def test_components_lie_in_the_span_of_their_texts():
    planted = planted_spans(images=50, d_clip=32, coherence=0.4, **EXACT)
    for label, texts in planted.chosen.items():
        basis = torch.linalg.qr(planted.directions[[planted.texts.index(text) for text in texts]].T).Q
        values = planted.parts[label]
        assert float((values - values @ basis @ basis.T).abs().max()) < 1e-12
        assert int(torch.linalg.matrix_rank(values - values.mean(0))) == 5
    assert bool((planted.deviations[:, 1:] < 0.8 * planted.deviations[:, :-1]).all())


def test_components_have_texts_of_their_own_while_there_are_enough():
    everything = [text for texts in planted_spans(images=6, d_clip=32).chosen.values() for text in texts]
    assert len(set(everything)) == len(everything) == 40
    shared = planted_spans(images=6, d_clip=32, texts=12).chosen
    assert len(shared) == 8
    assert all(len(set(texts)) == 5 for texts in shared.values())
    assert len({text for texts in shared.values() for text in texts}) == 10


@pytest.mark.parametrize("coherence", [0.0, 0.3, 0.9])
def test_texts_are_unit_and_as_alike_as_asked(coherence):
    planted = planted_spans(images=6, d_clip=32, coherence=coherence, **EXACT)
    alike = planted.directions @ planted.directions.T
    assert planted.directions.shape == (200, 32)
    assert float((alike.diagonal() - 1).abs().max()) < 1e-13
    apart = ~torch.eye(200, dtype=torch.bool)
    assert float(alike[apart].mean()) == pytest.approx(coherence, abs=0.02)
    for texts in planted.chosen.values():
        rows = [planted.texts.index(text) for text in texts]
        together = alike[rows][:, rows][~torch.eye(5, dtype=torch.bool)]
        assert float((together - coherence).abs().max()) < 1e-13


def test_noise_is_added_to_spans():
    clean, noisy = (planted_spans(images=500, d_clip=32, noise=noise) for noise in (0.0, 0.2))
    added = noisy.parts.values - clean.parts.values
    assert float(added.std()) == pytest.approx(0.2, rel=0.02)


# --- tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [1, 2, 6])
def test_scores_by_token_sum_to_those_of_the_vectors(components):
    planted = planted_tokens(images=5, grid=(3, 4), components=components, **EXACT)
    assert float(planted.tokens.check_gap().gap.max()) < 1e-13
    summed, scores = planted.tokens.sum_tokens(), planted.parts.project(planted.directions)
    assert summed.labels == scores.labels
    torch.testing.assert_close(summed.values, scores.values, rtol=0, atol=1e-12)
    torch.testing.assert_close(summed.total, scores.total, rtol=0, atol=1e-12)


def test_without_noise_the_carrier_writes_its_text_on_the_masks_only():
    planted = planted_tokens(images=40, grid=(4, 5), noise=0.0, **EXACT)
    scores = planted.tokens[planted.carrier]
    number = planted.tokens.directions.index(planted.text)
    patches = planted.masks.flatten(1)
    assert float(scores[:, 0].abs().max()) == 0  # the prefix token
    assert torch.equal(scores[:, 1:, number] > 0.4, patches)
    assert bool((scores[:, 1:, number][~patches].abs() < 1e-13).all())
    others = [n for n in range(3) if n != number]
    assert float(scores[:, :, others].abs().max()) < 1e-12
    torch.testing.assert_close(scores[:, :, number].sum(1), planted.strengths, rtol=0, atol=1e-12)


def test_masks_are_rectangles_that_differ_by_image():
    planted = planted_tokens(images=200, grid=(4, 5))
    rows, columns = planted.masks.any(2), planted.masks.any(1)
    assert torch.equal(planted.masks, rows[:, :, None] & columns[:, None])
    for side in (rows, columns):
        assert bool(((side[:, 1:] != side[:, :-1]).sum(1) <= 2).all())
        assert bool((side.any(1) & ~side.all(1)).all())
        assert bool(side.any(0).all())
    assert len(planted.masks.flatten(1).unique(dim=0)) > 40


def test_patches_of_the_mask_stand_out_in_the_carrier_alone():
    planted = planted_tokens(images=300)
    shown = planted.masks.flatten(1)
    for label in planted.tokens:
        heat = planted.tokens[label][:, 1:, 0]
        inside, outside = heat[shown], heat[~shown]
        if label == planted.carrier:
            assert float((inside > outside.quantile(0.95)).float().mean()) > 0.99
            assert spearman(planted.parts[label] @ planted.directions[0], planted.strengths) > 0.98
        else:
            assert abs(float(inside.mean() - outside.mean())) < 0.02
            assert abs(spearman(planted.parts[label] @ planted.directions[0], planted.strengths)) < 0.2


def test_half_of_the_components_write_a_text_of_their_own():
    planted = planted_tokens(images=200, **EXACT)
    spreads = planted.tokens.sum_tokens().values[:-1].std(1)
    assert int((spreads > 2).sum()) == 3
    assert bool(((spreads > 2).sum(0) == 1).all())
    assert bool(((spreads > 2).sum(1) <= 1).all())


# --- groups -----------------------------------------------------------------------------------------------------


def ridge(vectors, label, penalty=1e-3):
    """The linear classifier of least squares: its weights and its offset."""
    centred, signs = vectors - vectors.mean(0), (2 * label - 1).to(vectors)
    gram = centred.T @ centred / len(vectors) + penalty * torch.eye(vectors.shape[1], dtype=vectors.dtype)
    weights = torch.linalg.solve(gram, centred.T @ (signs - signs.mean()) / len(vectors))
    return weights, signs.mean() - vectors.mean(0) @ weights


def accuracies(classifier, vectors, planted):
    """Of the worst of four groups, and the average of the groups."""
    weights, offset = classifier
    right = ((vectors @ weights + offset > 0) == planted.label.bool()).double()
    groups = [right[(planted.label == y) & (planted.spurious == s)] for y in (0, 1) for s in (0, 1)]
    of_groups = torch.stack([group.mean() for group in groups])
    return float(of_groups.min()), float(of_groups.mean())


@pytest.mark.parametrize("seed", range(3))
def test_ablating_the_carriers_repairs_the_worst_group(seed):
    biased = planted_groups(images=4000, seed=seed, **EXACT)
    fair = planted_groups(images=8000, agrees=0.5, seed=seed, draw=1, **EXACT)
    fitted = ridge(biased.parts.total, biased.label)
    worst, average = accuracies(fitted, fair.parts.total, fair)
    assert worst < average - 0.05
    repaired = fair.parts.ablate(biased.carriers, how="mean", reference=biased.parts).sum()
    oracle = ridge(fair.parts.total, fair.label)
    _, best = accuracies(oracle, fair.parts.total, fair)
    restored, _ = accuracies(fitted, repaired, fair)
    assert restored > best - 0.02
    others = tuple(set(fair.parts) - {*biased.core, *biased.carriers})
    without = {of: fair.parts.ablate(of, how="mean", reference=biased.parts).sum() for of in (biased.core, others)}
    assert accuracies(fitted, without[biased.core], fair)[0] < 0.1
    assert accuracies(fitted, without[others], fair)[0] == pytest.approx(worst, abs=0.01)


def test_core_components_write_the_label_and_carriers_the_attribute():
    planted = planted_groups(images=8000, agrees=0.5, **EXACT)
    along = planted.parts.project(planted.directions)
    signs = torch.stack([planted.label, planted.spurious], dim=1).double()
    for label in along:
        found = correlations(along[label], signs)
        expected = torch.tensor([label in planted.core, label in planted.carriers])
        assert torch.equal(found > 0.5, expected)
        assert float(found[~expected].abs().max()) < 0.05
    assert len(planted.core) == len(planted.carriers) == 3
    assert float(planted.parts.values.mean(1).abs().max()) > 1  # ablating to zero is not ablating to the mean


@pytest.mark.parametrize("agrees", [0.0, 0.5, 0.9, 1.0])
def test_label_and_attribute_agree_as_often_as_asked(agrees):
    planted = planted_groups(images=4000, agrees=agrees)
    assert float((planted.label == planted.spurious).double().mean()) == pytest.approx(agrees, abs=0.03)
    assert float(planted.label.double().mean()) == pytest.approx(0.5, abs=0.03)


def test_two_components_are_enough_for_groups():
    planted = planted_groups(images=5, components=2)
    assert {*planted.core, *planted.carriers} == {"L0H0", "L0H1"}
