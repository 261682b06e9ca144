"""Ablation curves as a task, against `ablation.direct` and `ablation.total`."""

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from tiny_models import TINY_MODELS, images_for

from vitdecomp_lens import HookedViT, decompose
from vitdecomp_lens.applications import ablation
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.evaluation import ablating
from vitdecomp_lens.evaluation.records import Record, Results
from vitdecomp_lens.evaluation.subjects import Question, Splits, Subject, contributions

QUESTION = Question("kind", ("this", "that", "other"), (0, 1, 2))
PROTOCOL = ablating.CurveProtocol(random=2, images=5, points=4)
EVERY = list(range(11))


DIRECTIONS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Random:
    """Images of noise; their labels are what texts say of them, so that the model is right while nothing is ablated."""

    seed: int
    model: HookedViT

    def __len__(self):
        return 6

    @cached_property
    def labels(self):
        (batch,) = self.batches(self.model)
        return {"kind": read(decompose(self.model, batch).total).argmax(1)}

    def batches(self, model):
        yield images_for("layer_scale", 6, seed=self.seed).double()

    def masks(self, model, name="object"):
        raise AssertionError("there are none")


def texts(several):
    return TextBank(several, DIRECTIONS[: len(several)], space="own")


def read(z):
    return z @ texts(QUESTION.texts).directions.T


@pytest.fixture(scope="module")
def made():
    model = HookedViT(TINY_MODELS["layer_scale"]().double().requires_grad_(False))
    subject, data = Subject("tiny", model, texts), Splits(*(Random(seed, model) for seed in (1, 2, 3)))
    return subject, data, Results(tuple(ablating.curves(subject, data, QUESTION, seed=1, protocol=PROTOCOL)), {})


def curve(found, method):
    one = found.where(measure="accuracy", method=method)
    return one.names("step"), tuple(record.value for record in one.records)


def test_direct_curves_are_those_of_the_sum(made):
    subject, data, found = made
    parts, others = contributions(subject, data.test), contributions(subject, data.training)
    options = {"reference": others, "classifier": read}
    for order in ("last first", "first first"):
        expected = ablation.direct(parts, data.test.labels["kind"], order=order, **options)
        assert curve(found, f"direct, mean, {order}") == (tuple(EVERY), pytest.approx(expected.values))
        (area,) = found.values(measure="area", method=f"direct, mean, {order}")
        assert area == pytest.approx(expected.area)
    chance = [ablation.direct(parts, data.test.labels["kind"], order="random", seed=s, **options) for s in (2, 3)]
    means = [(one + other) / 2 for one, other in zip(*(one.values for one in chance), strict=True)]
    assert curve(found, "direct, mean, random")[1] == pytest.approx(means)


@pytest.mark.parametrize("how", ["mean", "position_mean"])
def test_total_curves_are_those_of_runs(made, how):
    subject, data, found = made
    (images,), (others,) = (list(one.batches(subject.model)) for one in (data.test, data.training))
    labels = data.test.labels["kind"][:5]
    for order in ("last first", "first first"):
        expected = ablation.total(
            subject.model,
            images[:5],
            labels,
            classifier=read,
            order=order,
            how=how,
            reference=others,
        )
        steps, values = curve(found, f"total, {how}, {order}")
        assert steps == (0, 3, 7, 10)
        assert values == pytest.approx([expected.values[step] for step in steps])


def test_every_curve_starts_with_nothing_ablated(made):
    *_, found = made
    assert {record.value for record in found.where(measure="accuracy", step=0).records} == {1.0}
    assert len(found.where(measure="area").records) == len(ablating.EFFECTS) * len(ablating.ORDERS)
    assert found.names("of") == ("kind",)


def test_the_area_is_that_below_straight_lines():
    values = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.5, 0.0]])
    assert ablating._area([0, 1, 4], values).tolist() == pytest.approx([(0.75 + 1.5) / 4, (0.5 + 1.5) / 4])


def test_every_number_has_an_interval_over_images(made):
    *_, found = made
    for record in found.records:
        assert record.interval[0] <= record.value <= record.interval[1]
    assert {record.interval for record in found.where(measure="accuracy", step=0).records} == {(1.0, 1.0)}
    assert any(record.interval[0] < record.interval[1] for record in found.where(measure="area").records)


def test_curves_of_several_models_stand_side_by_side(made):
    pytest.importorskip("matplotlib")
    *_, found = made
    other = Results(tuple(Record(**{**vars(record), "model": "other"}) for record in found.records), {})
    figure = ablating.plot(found + other)
    panels = figure.axes
    assert len(panels) == 2 * len(ablating.EFFECTS)
    assert [axes.get_title() for axes in panels[:2]] == ["tiny", "other"]
    steps, values = curve(found, "direct, mean, last first")
    line = panels[0].lines[0]
    assert (tuple(line.get_xdata()), tuple(line.get_ydata())) == (steps, values)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(ablating.ORDERS)
    with pytest.raises(InputError, match="one question"):
        ablating.plot(Results((), {}))
