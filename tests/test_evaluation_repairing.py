"""Repair evaluated: on planted heads, of which it is known what they write."""

import warnings
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from test_applications_repair import planted_model, stripes

from vitdecomp_lens import HookedViT
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.errors import InputError, UnsupportedModelError, VitDecompWarning
from vitdecomp_lens.evaluation import repairing
from vitdecomp_lens.evaluation.records import Results
from vitdecomp_lens.evaluation.repairing import RepairProtocol, spurious, typographic
from vitdecomp_lens.evaluation.subjects import Question, Splits, Subject
from vitdecomp_lens.linear_classifier import LinearClassifier
from vitdecomp_lens.testbed.planted import planted_groups

PROTOCOL = RepairProtocol(decay=0.1, images=300, orders=2, most=3, slack=0.02)
WITHIN = 0.02  # of what a classifier without the planted heads has
# Of three channels, what texts are: one head writes the first, another the second, and none the third.
TEXTS = {
    "round": (1.0, 0.0, 0.0),
    "water": (0.0, 1.0, 0.0),
    "it says round": (1.0, 0.3, 1.0),
    "it says angular": (-1.0, -0.3, 1.0),
}
NAMES = ("it says angular", "it says round")


@dataclass(frozen=True, eq=False)
class Images:
    """Images with all that is known of them."""

    pixels: object
    labels: dict

    def __len__(self):
        return len(self.pixels)

    def batches(self, model):
        yield from self.pixels.split(250)

    def masks(self, model, name="object"):
        raise NotImplementedError


def texts(several):
    rows = torch.zeros(len(several), 16, dtype=torch.float64)
    rows[:, 8:11] = torch.tensor([TEXTS[text] for text in several], dtype=torch.float64)
    return TextBank(tuple(several), rows, space="planted")


def drawn(count, agrees, seed):
    """Images of a class, told by one channel, and of something that mostly goes with it, told by another."""
    pixels, label, water = stripes(count, agrees, seed)
    return Images(pixels, {"group": label, "water": water, "written": (water != label).long()})


@cache
def planted():
    model = planted_model()
    model.pos_embed[..., :4] = model.pos_embed[..., 8:10] = 0  # no constants along what heads read and texts name
    model.pos_embed[..., 15] -= model.pos_embed.sum(-1)
    subject = Subject("planted", HookedViT(model), texts, None, classifier=False)
    return subject, Splits(drawn(600, 0.97, 0), drawn(400, 0.5, 1), drawn(900, 0.5, 2))


@cache
def repaired():
    subject, data = planted()
    found = spurious(subject, data, core=("round",), background=("water",), seed=0, protocol=PROTOCOL)
    return Results(tuple(found), {})


def bound():
    """The worst group of a classifier that sees nothing but what the head of the class writes."""
    subject, data = planted()
    fitted, judged = (repairing.contributions(subject, samples).total[:, 8:9] for samples in (data.training, data.test))
    labels = data.test.labels
    classifier = LinearClassifier.fit(fitted, data.training.labels["group"], decay=0.1)
    groups = repairing.Groups.crossing(group=labels["group"], water=labels["water"])
    return repairing.GroupAccuracy.of(classifier(judged), labels["group"], groups).worst


METHODS = ("total, mean", "total, position_mean, skipping", "total, mean, by what is read, skipping")


@pytest.mark.parametrize("method", METHODS)
def test_the_planted_head_is_found_and_the_worst_group_restored(method):
    found = repaired()
    assert found.mean(measure="count", method=method) == 1
    assert found.mean(measure="worst group", method="before") < bound() - 0.1
    assert found.mean(measure="worst group", method=method) > bound() - WITHIN
    assert found.mean(measure="average of groups", method=method) > found.mean(
        measure="average of groups", method="before"
    )


def test_numbers_of_one_accuracy_have_intervals_over_images():
    found = repaired()
    (single,) = found.where(measure="worst group", method="total, mean").records
    assert single.interval[0] < single.value < single.interval[1]
    (several,) = found.where(measure="worst group", method="direct, random").records
    assert several.interval is None
    assert {record.interval for record in found.where(measure="count").records} == {None}


def test_other_orders_do_not_restore_it():
    found = repaired()
    worst = found.mean(measure="worst group", method="total, mean, skipping")
    for order in ("reversed", "random"):
        assert found.mean(measure="worst group", method=f"total, mean, skipping, {order}") < worst - 0.1


def test_planted_components_are_found_in_the_sum(monkeypatch):
    truths = [planted_groups(images=2000, agrees=a, draw=d, dtype=torch.float64) for d, a in enumerate((0.9, 0.5, 0.5))]
    training, test = truths[0], truths[2]
    data = Splits(*(Images(truth.parts, {"group": truth.label, "water": truth.spurious}) for truth in truths))
    monkeypatch.setattr(repairing, "contributions", lambda subject, samples: samples.pixels)
    monkeypatch.setattr(repairing._Repair, "_total", lambda bench, ranking: ())  # there is nothing to run

    def told(several):
        which = ["round", "water"].index(several[0])
        return TextBank(tuple(several), training.directions[[which]], space="planted")

    def groups(samples):
        return repairing.Groups.crossing(group=samples.labels["group"], water=samples.labels["water"])

    subject = replace(planted()[0], texts=told)
    classifier = LinearClassifier.fit(training.parts.total, training.label, decay=0.1)
    bench = repairing._Repair(subject, data, PROTOCOL, training.parts, classifier, "group", groups, {"average": 0.0}, 0)
    found = {method: (several, count) for method, several, count in bench.methods(("water",), ("round",))}
    others = [label for label in test.parts.labels if label not in test.carriers]
    fitted, judged = (truth.parts.select(labels=others).values.sum(0) for truth in (training, test))
    scores = LinearClassifier.fit(fitted, training.label, decay=0.1)(judged)
    without = repairing.GroupAccuracy.of(scores, test.label, groups(data.test)).worst
    for method in ("direct", "direct, skipping"):
        (accuracy,), count = found[method]
        assert count == len(test.carriers)
        assert accuracy.worst > without - WITHIN
    worst = found["direct"][0][0].worst
    assert found["before"][0][0].worst < worst - 0.1
    assert all(one.worst < worst - 0.1 for order in ("reversed", "random") for one in found[f"direct, {order}"][0])
    compared = {method: (several, count) for method, several, count in bench.comparisons(("water",))}
    assert list(compared) == ["balanced probe", "subspace projection"]
    for (accuracy,), count in compared.values():
        assert count is None
        assert accuracy.worst > found["before"][0][0].worst + 0.05


def test_the_exported_model_is_the_ablated_one():
    found = repaired()
    for measure in ("worst group", "average of groups", "count"):
        ablated, exported = (
            found.mean(measure=measure, method=f"total, mean, skipping{more}") for more in ("", ", exported")
        )
        assert ablated == exported


def test_a_group_without_samples_is_refused_by_name():
    subject, data = planted()
    labels = data.test.labels
    empty = replace(data, test=Images(data.test.pixels, {**labels, "water": labels["water"] | labels["group"]}))
    with pytest.raises(InputError, match="none of 'class 1, background 0'"):
        list(spurious(subject, empty, core=("round",), background=("water",), seed=0, protocol=PROTOCOL))


def test_a_model_that_cannot_be_exported_is_told_and_nothing_breaks(monkeypatch):
    def refused(*args, **options):
        raise UnsupportedModelError("No bias.")

    subject, data = planted()
    monkeypatch.setattr(repairing.repair, "export", refused)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = list(spurious(subject, data, core=("round",), background=("water",), seed=0, protocol=PROTOCOL))
    assert [str(one.message) for one in caught if issubclass(one.category, VitDecompWarning)] == [
        "planted is not exported: No bias."
    ]
    assert not [one for one in found if one.method.endswith("exported")]
    assert len(found) > 20


def test_written_words_are_taken_away():
    subject, data = planted()
    question, protocol = Question("group", NAMES, (0, 1)), replace(PROTOCOL, clean=0.1)  # right words were of use
    found = Results(tuple(typographic(subject, data, question, words=("water",), seed=0, protocol=protocol)), {})
    clean, written = (found.mean(measure=name, method="before") for name in ("clean", "written"))
    assert clean > written + 0.1
    for method in ("direct", "total, mean, skipping"):
        assert found.mean(measure="count", method=method) == 1
        after = {name: found.mean(measure=name, method=method) for name in ("clean", "written")}
        assert abs(after["clean"] - after["written"]) < WITHIN  # what is written makes no difference
        share = (after["written"] - written) / (clean - written)
        assert found.mean(measure="regained", method=method) == pytest.approx(share)
    assert not found.values(measure="regained", method="before")
    strict = replace(protocol, clean=0.0)
    found = Results(tuple(typographic(subject, data, question, words=("water",), seed=0, protocol=strict)), {})
    assert found.mean(measure="count", method="direct") == 0


def test_where_nothing_is_lost_nothing_is_regained():
    subject, data = planted()
    same = {**data.test.labels, "written": torch.arange(900) % 2}
    data = replace(data, test=Images(data.test.pixels, same))
    question = Question("group", NAMES, (0, 1))
    found = Results(tuple(typographic(subject, data, question, words=("water",), seed=0, protocol=PROTOCOL)), {})
    lost = found.mean(measure="clean", method="before") - found.mean(measure="written", method="before")
    assert bool(found.values(measure="regained")) == (lost >= repairing.LOST)
