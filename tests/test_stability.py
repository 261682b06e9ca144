"""Whether texts stay when images are drawn again, or another bank is read with."""

from functools import partial

import pytest
import torch

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.interpret.stability import bank_stability, label_stability
from vitdecomp_lens.interpret.statistics import bootstrap_counts
from vitdecomp_lens.interpret.text_span import text_span
from vitdecomp_lens.testbed.planted import planted_spans

READ = partial(text_span, steps=4, rank=40)


def planted_bank(*, space="planted", **options):
    options = {"images": 120, "d_clip": 40, "texts": 60, "components": 3, "per_component": 4, **options}
    planted = planted_spans(**options, dtype=torch.float64)
    return planted, TextBank(planted.texts, planted.directions, space=space)


def test_shares_and_jaccard_indices_are_those_of_a_loop():
    planted, bank = planted_bank(noise=0.4, images=30)
    found = label_stability(planted.parts, bank, READ, resamples=6, seed=2)
    base = READ(planted.parts, bank)
    drawn = [torch.arange(30).repeat_interleave(counts) for counts in bootstrap_counts(30, 6, 2)]
    again = [READ(planted.parts.images(rows), bank) for rows in drawn]
    for row, (label, texts) in enumerate(base.texts.items()):
        expected = [sum(text in one.texts[label] for one in again) / 6 for text in texts]
        assert found.shares[row].tolist() == pytest.approx(expected)
        assert [text for text, _ in found[label]] == texts
        assert [share for _, share in found[label]] == pytest.approx(expected)
        for number, one in enumerate(again):
            mine, other = set(texts), set(one.texts[label])
            assert float(found.jaccard[number, row]) == pytest.approx(len(mine & other) / len(mine | other))
            spans = base.directions[row].T @ base.directions[row], one.directions[row].T @ one.directions[row]
            assert float(found.overlap[number, row]) == pytest.approx(float((spans[0] @ spans[1]).trace()) / 4)
    assert 0.2 < found.mean < 1
    assert found.chance.tolist() == pytest.approx([4 / 60] * 3)
    low, high = found.jaccard_interval()
    assert (low <= found.jaccard.mean(0)).all()
    assert (high >= found.jaccard.mean(0)).all()


def test_planted_texts_stay_and_those_read_into_noise_do_not():
    planted, bank = planted_bank()
    stable = label_stability(planted.parts, bank, READ, resamples=5)
    assert stable.mean == 1
    assert (stable.jaccard == 1).all()
    torch.testing.assert_close(stable.overlap, torch.ones_like(stable.overlap))
    noise = planted_bank(noise=30.0)[0].parts
    unstable = label_stability(noise, bank, READ, resamples=5)
    assert unstable.mean < 0.6
    assert repr(stable) == (
        "LabelStability(resample=5, component=3: 3 head (layer 0); texts chosen again 1.000, by chance 0.067)"
    )


def test_what_has_no_texts_is_left_out_and_not_a_number_is_nothing():
    planted, bank = planted_bank()
    values = planted.parts.values.clone()
    values[1] = 3.0
    parts = type(planted.parts)(values, planted.parts.components)
    found = label_stability(parts, bank, READ, resamples=3)
    assert found["L0H1"] == ()
    assert found.shares[1].tolist() == [0] * 4
    assert found.jaccard[:, 1].tolist() == found.overlap[:, 1].tolist() == [0] * 3
    assert found.mean == 1
    both = bank_stability(parts, bank, bank, READ)
    for values in (both.overlap, both.cosine):
        assert values.tolist() == pytest.approx([1, 0, 1])
    assert both.chance[1] == 0


def test_another_bank_that_spans_the_same_says_the_same():
    planted, bank = planted_bank(texts=12)
    # Each text turned within the span of its component's four: other directions, one span.
    turned = bank.directions.clone()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    for texts in planted.chosen.values():
        rows = [bank.texts.index(text) for text in texts]
        turned[rows] = turn @ bank.directions[rows]
    other = TextBank([f"turned {text}" for text in bank], turned, space="planted")
    found = bank_stability(planted.parts, bank, other, READ)
    torch.testing.assert_close(found.overlap, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found.cosine, torch.ones(3, dtype=torch.float64))
    assert not {*found.first.texts["L0H0"]} & {*found.second.texts["L0H0"]}


def test_cosines_are_those_of_reconstructions_and_weigh_by_variance():
    planted, bank = planted_bank(noise=0.2)
    half = bank.select(bank.texts[::2])
    found = bank_stability(planted.parts, bank, half, READ)
    one, two = (reading.reconstruction(planted.parts).values for reading in (found.first, found.second))
    one, two = (values - values.mean(1, keepdim=True) for values in (one, two))
    expected = torch.nn.functional.cosine_similarity(one.flatten(1), two.flatten(1))
    torch.testing.assert_close(found.cosine, expected)
    assert (found.overlap < 1).all()
    assert found.chance.tolist() == pytest.approx([4 / 40] * 3)
    assert repr(found).startswith("BankStability(3 head (layer 0); overlap 0.")


def test_random_spans_overlap_by_chance():
    planted, bank = planted_bank(noise=50.0, components=40, images=400)
    other = planted_bank(seed=9)[1]
    found = bank_stability(planted.parts, bank, other, partial(text_span, steps=4, rank=40))
    # Both choose along what noise is largest by chance, a little more alike than at random.
    assert 0.08 < float(found.overlap.mean()) < 0.2


def test_what_cannot_be_read_again_is_refused():
    planted, bank = planted_bank()
    parts = planted.parts
    calls = iter([parts, parts.select(labels="L0H0")])
    for call, says in (
        (lambda: label_stability(parts.images(slice(3)), bank, READ), "at least 4 images.*got 3"),
        (lambda: label_stability(parts, bank, READ, resamples=0), "resamples= of at least 1"),
        (lambda: label_stability(parts, bank, lambda parts, bank: bank), "got a TextBank"),
        (lambda: label_stability(parts, bank, lambda _, bank: READ(next(calls), bank)), "the same components"),
        (lambda: bank_stability(parts, bank, planted_bank(space="other")[1], READ), "got 'other'"),
    ):
        with pytest.raises(InputError, match=says):
            call()
    with pytest.raises(UnknownNameError, match="L0H9"):
        label_stability(parts, bank, READ, resamples=1)["L0H9"]
