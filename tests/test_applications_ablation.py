"""Cumulative ablation against ablations one by one."""

import math
from functools import cache

import pytest
import torch
from tiny_models import TINY_MODELS, images_for

from vitdecomp_lens import HookedViT, decompose, testbed
from vitdecomp_lens.applications import ablation
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.cumulative import direct_steps, total_steps
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.interpret.features import score_features
from vitdecomp_lens.intervene import Reference, ablate_run
from vitdecomp_lens.linear_classifier import LinearClassifier
from vitdecomp_lens.testbed.planted import planted_groups

LABELS = ("embed", "L0H0", "L0H1", "mlp.0", "L1H0", "L1H1", "mlp.1", "norm.bias")


def random_parts(batch=6, d_rep=5, seed=0, dtype=torch.float64):
    values = torch.randn(len(LABELS), batch, d_rep, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Decomposition(values, LABELS, values.sum(0))


def mean_of_first(scores, labels):
    return float(scores[:, 0].mean() + labels.double().mean())


@cache
def small_model():
    """Every test leaves it as it was."""
    model = HookedViT(TINY_MODELS["layer_scale"]().double().requires_grad_(False))
    return model, images_for("layer_scale", 5).double(), images_for("layer_scale", 4, seed=7).double()


# ---- in the sum


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_each_step_is_what_one_ablation_of_all_so_far_gives(how):
    parts, reference = random_parts(), random_parts(4, seed=1)
    order = ["mlp.1", "L0H1", "embed", "L1H0"]
    directions = torch.randn(3, 5, dtype=torch.float64)
    steps = direct_steps(parts, order, classifier=directions, how=how, reference=reference, seed=3)
    for count in range(5):
        ablated = parts
        if count:
            chance = torch.Generator().manual_seed(3)
            ablated = parts.ablate(order[:count], how=how, reference=reference, generator=chance)
        torch.testing.assert_close(steps[count], ablated.values.sum(0) @ directions.T, rtol=0, atol=1e-12)


def test_steps_can_be_left_out():
    parts = random_parts()
    every = direct_steps(parts, ["L0H0", "L1H0", "mlp.0"], how="zero")
    some = direct_steps(parts, ["L0H0", "L1H0", "mlp.0"], how="zero", at=(0, 3))
    assert torch.equal(some, every[[0, 3]])
    for wrong in ([], [3, 0], [4], [-1]):
        with pytest.raises(InputError, match="ascending"):
            direct_steps(parts, ["L0H0", "L1H0", "mlp.0"], how="zero", at=wrong)


def test_what_is_incomplete_starts_from_the_models_total():
    parts = random_parts().select(kind="head")
    steps = direct_steps(parts, ["L1H1"], how="zero")
    torch.testing.assert_close(steps[1], parts.total - parts["L1H1"], rtol=0, atol=1e-12)


def test_many_small_steps_do_not_add_up_their_rounding():
    values = torch.randn(400, 3, 4)
    parts = Decomposition(values, tuple(f"L{n}H0" for n in range(400)), values.sum(0))
    last = direct_steps(parts, list(parts.labels), how="zero", at=(400,))[0]
    assert last.abs().max() < 1e-5  # the sum itself is rounded once
    assert last.dtype == torch.float32


def test_a_curve_in_the_sum():
    parts, labels = random_parts(), torch.zeros(6, dtype=torch.int64)
    curve = ablation.direct(parts, labels, measure=mean_of_first, how="zero", order="first first")
    assert curve.components == ("L0H0", "L0H1", "mlp.0", "L1H0", "L1H1", "mlp.1")
    left = parts.total[:, 0]
    assert curve.values[0] == pytest.approx(float(left.mean()))
    for label, value in zip(curve.components, curve.values[1:], strict=True):
        left = left - parts[label][:, 0]
        assert value == pytest.approx(float(left.mean()))
    assert (curve.effect, curve.how, curve.order) == ("direct", "zero", "first first")
    assert (curve.measure, curve.images) == ("mean_of_first", 6)


def test_kinds_layers_and_how_many():
    parts, labels = random_parts(), torch.zeros(6, dtype=torch.int64)

    def ablated(**options):
        return ablation.direct(parts, labels, how="zero", **options).components

    assert ablated() == ("mlp.1", "L1H1", "L1H0", "mlp.0", "L0H1", "L0H0")
    assert ablated(kind="head", most=3) == ("L1H1", "L1H0", "L0H1")
    assert ablated(kind=("mlp", "embed"), order="first first") == ("embed", "mlp.0", "mlp.1")
    assert ablated(layer=0) == ("mlp.0", "L0H1", "L0H0")
    assert ablated(components=["L0H1", "mlp.1"]) == ("mlp.1", "L0H1")
    with pytest.raises(UnknownNameError, match=r"norm\.bias"):
        ablated(components=["norm.bias"])  # a constant has no other value to take


def test_accuracy_is_the_default():
    parts = random_parts()
    classifier = LinearClassifier(torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
    labels = classifier(parts.total).argmax(1)
    curve = ablation.direct(parts, labels, classifier=classifier, how="zero", components=["L0H0"])
    expected = (classifier(parts.total - parts["L0H0"]).argmax(1) == labels).double().mean()
    assert curve.values == (1.0, pytest.approx(float(expected)))


def test_a_mean_by_position_is_no_business_of_a_sum():
    with pytest.raises(InputError, match="how='mean'"):
        ablation.direct(random_parts(), torch.zeros(6, dtype=torch.int64), how="position_mean")


# ---- orders


def components():
    return [Component.from_label(label) for label in LABELS[1:7]]


def test_orders_by_depth_and_by_chance():
    first, _ = ablation.in_order(components(), "first first")
    last, name = ablation.in_order(components(), "last first")
    assert last == first[::-1]
    assert name == "last first"
    shuffled = [ablation.in_order(components(), "random", seed=seed)[0] for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(shuffled[0]) == sorted(first)


def test_depth_is_by_layer_whatever_the_order_of_rows():
    mixed = [Component("pool", name="pool.mlp"), Component("mlp", 1), Component("head", 0, 0), Component("embed")]
    assert ablation.in_order(mixed, "first first")[0] == ("embed", "L0H0", "mlp.1", "pool.mlp")


def test_orders_by_score():
    scores = {label: number for number, label in enumerate(("L1H0", "mlp.0", "L0H0", "L0H1", "mlp.1", "L1H1"))}
    assert ablation.in_order(components(), scores) == (("L1H1", "mlp.1", "L0H1", "L0H0", "mlp.0", "L1H0"), "by score")
    assert ablation.in_order(components(), ["mlp.1", "L0H0"]) == (("mlp.1", "L0H0"), "given")
    with pytest.raises(InputError, match=r"'mlp\.1' has none"):
        ablation.in_order(components(), dict.fromkeys(LABELS[:6], 0.0))
    with pytest.raises(UnknownNameError, match="L9H9"):
        ablation.in_order(components(), ["L9H9"])
    with pytest.raises(InputError, match="last first"):
        ablation.in_order(components(), "deepest")
    with pytest.raises(InputError, match="FeatureScores"):
        ablation.in_order(components(), "random", feature="colour")


def scored():
    planted = planted_groups(images=400)
    texts = TextBank(["round", "water"], planted.directions, space="planted")
    features = {"core": texts.select("round"), "spurious": texts.select("water")}
    return planted, score_features(planted.parts, features, bootstrap=0, permutations=0)


def test_planted_carriers_come_first_by_the_score_of_their_feature():
    planted, scores = scored()
    order, _ = ablation.in_order(planted.parts.components, scores, feature="spurious")
    assert set(order[:3]) == set(planted.carriers)
    with pytest.raises(InputError, match="'core', 'spurious'"):
        ablation.in_order(planted.parts.components, scores)


def test_planted_labels_fall_to_chance_when_their_components_are_gone():
    planted, scores = scored()
    fair = planted_groups(images=2000, agrees=0.5, draw=1)
    directions = torch.stack([-planted.directions[0], planted.directions[0]])
    centred = directions @ planted.parts.total.mean(0)

    def read(z):
        return z @ directions.T - centred

    options = {"classifier": read, "reference": planted.parts}
    by_score = ablation.direct(fair.parts, fair.label, order=scores, feature="core", **options)
    assert by_score.values[0] > 0.95
    assert abs(by_score.values[3] - 0.5) < 0.05
    carriers = ablation.direct(fair.parts, fair.label, order=planted.carriers, **options)
    assert min(carriers.values) > 0.95
    chance = [ablation.direct(fair.parts, fair.label, order="random", seed=s, **options).area for s in range(3)]
    assert by_score.area < min(chance)


# ---- in the run


@pytest.mark.parametrize("how", ["zero", "mean", "position_mean", "resample"])
def test_each_run_is_ablate_runs(how):
    model, images, others = small_model()
    reference = Reference.of(model, others)
    order = ["mlp.1", "L1H2", "attn.0", "L1H0"]
    steps = total_steps(model, images, order, how=how, reference=reference, batch_size=2, seed=5)
    for count in range(5):
        options = {"how": how, "reference": reference, "of": "representation", "seed": 5}
        expected = ablate_run(model, images, components=order[:count], **options)
        torch.testing.assert_close(steps[count], expected, rtol=0, atol=1e-12)


def test_batches_are_gone_through_once_and_the_reference_too():
    model, images, others = small_model()
    whole = total_steps(model, images, ["mlp.1", "L1H2"], of="logits", reference=others)
    batches = (batch for batch in images.split(2))
    found = total_steps(model, batches, ["mlp.1", "L1H2"], of="logits", reference=(image[None] for image in others))
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


def test_a_curve_in_the_run():
    model, images, others = small_model()
    labels = model(images).argmax(1)
    curve = ablation.total(model, images, labels, of="logits", kind="mlp", reference=others)
    assert curve.components == ("mlp.1", "mlp.0")
    assert curve.values[0] == 1
    for count in (1, 2):
        ablated = ablate_run(model, images, components=curve.components[:count], reference=others)
        assert curve.values[count] == ablation.accuracy(ablated, labels)
    assert (curve.effect, curve.how) == ("total", "mean")
    whole = ablation.total(model, images, labels, of="logits", by="layer", reference=others)
    assert whole.components == ("mlp.1", "attn.1", "mlp.0", "attn.0")


def test_the_last_component_has_the_same_effect_in_sum_and_run_but_for_the_norm():
    model, images, _ = small_model()
    hook = "blocks.1.hook_resid_post"  # before the final norm there is nothing to react

    def stream(model, images):
        return model.run_with_cache(images, names_filter=hook)[1][hook][:, 0]

    run = total_steps(model, images, ["mlp.1"], of=stream, how="zero")
    parts = decompose(model, images, by="head", of=stream)
    torch.testing.assert_close(direct_steps(parts, ["mlp.1"], how="zero"), run, rtol=0, atol=1e-10)


def test_a_trained_model_forgets_its_shapes_in_the_sum_and_in_the_run():
    model = testbed.load("deit")
    scenes, others = testbed.Scenes("validation", seed=3, size=48), testbed.Scenes("train", seed=5, size=32)
    images = testbed.normalised(scenes.images(range(48)))
    reference = testbed.normalised(others.images(range(32)))
    labels = scenes.labels("shape", range(48))
    count = len(testbed.ATTRIBUTES["shape"])
    start = testbed.CLASSES.index(testbed.ATTRIBUTES["shape"][0])

    def shapes(logits):
        return logits[:, start : start + count]

    parts, other_parts = (decompose(model, batch, by="layer", of="logits") for batch in (images, reference))
    direct = ablation.direct(parts, labels, classifier=shapes, reference=other_parts)
    total = ablation.total(model, images, labels, of="logits", by="layer", classifier=shapes, reference=reference)
    assert direct.components == total.components
    assert direct.values[0] == total.values[0] > 2 / count
    for curve in (direct, total):
        assert curve.values[-1] < curve.values[0] / 2


# ---- what is shown


def curve(values=(1.0, 0.75, 0.5), effect="direct", order="last first", measure="accuracy"):
    return ablation.AblationCurve(("mlp.1", "mlp.0"), values, effect, "mean", order, 0, measure, 8)


def test_a_curve_says_what_it_is():
    assert repr(curve()) == (
        "AblationCurve(direct, mean, last first: accuracy 1.000 to 0.500 over 2 components, 8 images)"
    )
    assert curve(order="random").name == "direct, mean, random, seed 0"
    assert curve().area == pytest.approx(0.75)
    assert curve((1.0, 0.0, 0.0)).area == pytest.approx(0.25)
    assert math.isclose(ablation.AblationCurve((), (0.3,), "total", "zero", "given", 0, "accuracy", 1).area, 0.3)
    assert curve().table().splitlines()[-1] == "| 2 | mlp.0 | 0.5000 |"


def test_several_curves_in_one_table_and_one_picture(tmp_path):
    pytest.importorskip("matplotlib")
    short = ablation.AblationCurve(("mlp.1",), (1.0, 0.9), "total", "mean", "last first", 0, "accuracy", 8)
    lines = ablation.table([curve(), short]).splitlines()
    assert lines[0] == "| ablated | direct, mean, last first | total, mean, last first |"
    assert lines[3:] == ["| 1 | 0.7500 | 0.9000 |", "| 2 | 0.5000 |  |"]
    figure = ablation.plot([curve(), short], names=["one", "other"])
    (axes,) = figure.axes
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"]
    assert [
        line.get_ydata().tolist() if hasattr(line.get_ydata(), "tolist") else list(line.get_ydata())
        for line in axes.lines
    ] == [[1.0, 0.75, 0.5], [1.0, 0.9]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "other"]
    figure.savefig(tmp_path / "curves.png")
    assert len(curve().plot().axes[0].lines) == 1
    with pytest.raises(InputError, match="one measure"):
        ablation.plot([curve(), curve(measure="loss")])
    for empty in (ablation.plot, ablation.table):
        with pytest.raises(InputError, match="at least one curve"):
            empty([])


# ---- bad input


def never(scores, labels):
    raise AssertionError("nothing is to be measured")


def test_bad_input_is_named():
    parts, labels = random_parts(), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(InputError, match="a label for each of the 6"):
        ablation.direct(parts, labels[:5], how="zero")
    with pytest.raises(InputError, match="reference"):
        ablation.direct(parts, labels)
    with pytest.raises(InputError, match="width 5"):
        ablation.direct(parts, labels, classifier=torch.ones(2, 4), how="zero")
    with pytest.raises(InputError, match=r"'mlp\.0' comes twice"):
        direct_steps(parts, ["mlp.0", "mlp.0"], how="zero")
    with pytest.raises(InputError, match="list of labels"):
        direct_steps(parts, "mlp.0", how="zero")
    with pytest.raises(InputError, match="most= as a number"):
        ablation.direct(parts, labels, how="zero", most=-1)
    model, images, _ = small_model()
    with pytest.raises(InputError, match="at least one batch"):
        ablation.total(model, [], labels, how="zero")
    with pytest.raises(InputError, match=f"a label for each of the {len(images)} images; got {len(images) + 1}"):
        ablation.total(model, images, torch.zeros(len(images) + 1), measure=never, how="zero")
    with pytest.raises(InputError, match="batch_size"):
        total_steps(model, images, ["mlp.0"], how="zero", batch_size=0)
    with pytest.raises(InputError, match="one vector an image"):
        total_steps(model, images, ["mlp.0"], how="zero", of="blocks.0.hook_mlp_out")
