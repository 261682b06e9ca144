"""The match rate of two readings, against sets of classes counted by hand."""

import pytest
import torch

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.interpret import Spans, match_rate, text_span
from vitdecomp_lens.testbed.planted import planted_maps, planted_spans

CLASSES = tuple(f"class {n}" for n in range(20))


def reading(chosen, *, components=None, classes=CLASSES):
    chosen = torch.tensor(chosen)
    count, steps = chosen.shape
    return Spans(
        components=components or tuple(f"L0H{n}" for n in range(count)),
        bank=TextBank(classes, torch.eye(len(classes)), space="here"),
        chosen=chosen,
        share_explained=torch.zeros(count, steps),
        directions=torch.zeros(count, steps, 3),
        mean=torch.zeros(count, 3),
        ranks=torch.zeros(count, dtype=torch.int64),
        method="published TextSpan",
        images=5,
    )


def test_rates_are_counted_without_regard_to_order():
    truth = reading([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    other = reading([[3, 2, 1, 0], [7, 12, 13, 5], [0, 1, 2, 3]])
    match = match_rate(truth, other, steps=4)
    assert match.shared.tolist() == [4, 2, 0]
    assert match.rates.tolist() == [1, 0.5, 0]
    assert match.mean == 0.5
    assert match["L0H1"] == 0.5
    assert match.chance.tolist() == pytest.approx([4 / 20] * 3)
    assert repr(match) == "MatchRate(0.500 over 3 components; by chance 0.200)"
    with pytest.raises(UnknownNameError, match="L0H9"):
        match["L0H9"]


def test_only_the_first_steps_count():
    truth = reading([[0, 1, 2, 3]])
    other = reading([[4, 1, 0, 2]])
    assert [match_rate(truth, other, steps=n)["L0H0"] for n in (1, 2, 4)] == [0, 0.5, 0.75]


def test_components_are_compared_by_label_and_constants_and_what_does_not_vary_are_left_out():
    bias, added = Component("constant", name="head.bias"), Component("constant", name="aligner.bias")
    heads = Component("head", 0, 0), Component("head", 0, 1), Component("mlp", 0)
    truth = reading([[0, 1], [2, 3], [-1, -1], [4, 5]], components=(*heads, bias))
    other = reading([[0, 1], [4, 5], [2, 9], [0, 1]], components=(added, heads[2], heads[1], heads[0]))
    match = match_rate(truth, other, steps=2)
    assert match.labels == ("L0H0", "L0H1")
    assert match.rates.tolist() == [1, 0.5]


def test_shorter_lists_count_what_is_there():
    truth = reading([[0, 1, 2, -1], [0, 1, 2, 3], [5, -1, -1, -1]])
    other = reading([[2, 9, 8, 7], [3, -1, -1, -1], [-1, -1, -1, -1]])
    match = match_rate(truth, other, steps=4)
    assert match.rates.tolist() == pytest.approx([1 / 3, 1 / 4, 0])
    assert match.chance.tolist() == pytest.approx([4 / 20, 1 / 20, 0])


def test_classes_drawn_at_random_match_at_the_rate_of_chance():
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.rand(4000, 20, generator=draw).argsort(1)[:, :6].tolist() for _ in range(2))
    match = match_rate(reading(one), reading(two), steps=6)
    assert match.mean == pytest.approx(match.mean_chance, abs=0.01)
    assert match.mean_chance == pytest.approx(0.3)


def test_an_exact_alignment_keeps_every_class_and_a_wrong_one_few():
    planted = planted_maps(images=400, d_rep=48, d_clip=48, components=6, d_head=8, dtype=torch.float64)
    # Class vectors that the maps take, within each component's span, to what stands for the classes over there.
    names = tuple(f"class {n}" for n in range(48))
    own = planted.spans.permute(0, 2, 1).reshape(48, 48)
    there = planted.reached.permute(0, 2, 1).reshape(48, 48)
    aligned = planted.parts.map(planted)
    truth = text_span(planted.parts.select(labels="L0H0"), TextBank(names, own, space="own"), steps=5)
    right = text_span(aligned.select(labels="L0H0"), TextBank(names, there, space="there"), steps=5)
    wrong = text_span(aligned.select(labels="L0H0"), TextBank(names, there.flip(0), space="there"), steps=5)
    assert truth.chosen[0].tolist() == right.chosen[0].tolist()
    assert match_rate(truth, right, steps=5).mean == 1
    assert match_rate(truth, wrong, steps=5).mean < 0.5


def test_what_cannot_be_compared_is_refused():
    truth = reading([[0, 1], [2, 3]])
    for other, steps, says in (
        (truth, 0, "steps= of at least 1"),
        (truth, 10, "steps=10 steps; truth has 2"),
        (reading([[0], [2]]), 2, "aligned has 1"),
        (reading([[0, 1], [2, 3]], classes=("a", *CLASSES[1:])), 2, "first different: 'class 0' and 'a'"),
        (reading([[0, 1], [2, 3]], classes=CLASSES[:15]), 2, "there are 20 and 15"),
        (reading([[0, 1], [2, 3]], components=("L0H0", "L1H1")), 2, "'L0H1' is in only one"),
    ):
        with pytest.raises(InputError, match=says):
            match_rate(truth, other, steps=steps)
    empty = reading([[-1, -1], [-1, -1]])
    with pytest.raises(InputError, match="that vary over images"):
        match_rate(empty, truth, steps=2)


def test_the_default_is_the_ten_classes_of_the_paper():
    planted = planted_spans(images=50, d_clip=32, texts=60, noise=0.1)
    spans = text_span(planted.parts, TextBank(planted.texts, planted.directions, space="planted"), steps=10)
    match = match_rate(spans, spans)
    assert match.shared.tolist() == [10] * 8
    assert match.mean_chance == pytest.approx(10 / 60)
