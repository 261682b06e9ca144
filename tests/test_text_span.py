"""TextSpan for all components at once, against plain loops over steps, components and images."""

from itertools import accumulate

import pytest
import torch
from labelled_samples import as_users_run_it
from torch.profiler import ProfilerActivity, profile

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import CapacityError, InputError, UnknownNameError
from vitdecomp_lens.interpret import VARIANTS, text_span
from vitdecomp_lens.testbed.planted import planted_spans

BOTH = pytest.mark.parametrize("variant", VARIANTS)
RANKS = (3, 11, 30, 100)  # of the components of `sample`


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bank_of(count, width, *, seed=1, dtype=torch.float64, space="here"):
    directions = torch.randn(count, width, generator=generator(seed), dtype=torch.float64)
    return TextBank([f"text {n}" for n in range(count)], directions.to(dtype), space=space)


def sample(*, images=150, width=100, ranks=RANKS, seed=0, dtype=torch.float64):
    """Components of known rank, with means, falling spectra and very different sizes."""
    draw = generator(seed)
    values = []
    for number, rank in enumerate(ranks):
        codes = torch.randn(images, rank, generator=draw, dtype=torch.float64) * 0.97 ** torch.arange(rank)
        codes += 2 * torch.randn(rank, generator=draw, dtype=torch.float64)
        directions = torch.linalg.qr(torch.randn(width, rank, generator=draw, dtype=torch.float64)).Q.T
        values.append(10.0 ** (number - 1) * codes.to(dtype) @ directions.to(dtype))
    return Decomposition(torch.stack(values), tuple(f"L0H{n}" for n in range(len(ranks))))


def loop(outputs, texts, steps, rank, variant):
    """The algorithm as it was published, or with rows compared at unit length; the numerical rank at most."""
    outputs, texts = outputs.double(), texts.double()
    lengths, mean = texts.norm(dim=1), outputs.mean(0)
    spanning = outputs if variant == "published" else outputs - mean
    rank = min(rank, int(torch.linalg.matrix_rank(spanning, rtol=1e-6)))
    axes = torch.linalg.svd(spanning, full_matrices=False).Vh[:rank]
    texts = texts @ axes.T @ axes
    outputs = outputs - mean
    total, chosen, shares = outputs.square().sum(), [], []
    for _ in range(min(steps, rank)):
        deviations = (outputs @ texts.T).std(0)
        if variant == "corrected":
            at_unit_length = deviations / texts.norm(dim=1)
            at_unit_length[texts.norm(dim=1) < 1e-4 * lengths] = 0
            deviations[at_unit_length < (1 - 1e-6) ** 0.5 * at_unit_length.max()] = 0
        chosen.append(int(deviations.argmax()))
        text = texts[chosen[-1]].clone()
        outputs = outputs - torch.outer(outputs @ text / (text @ text), text)
        texts = texts - torch.outer(texts @ text / (text @ text), text)
        shares.append(1 - outputs.square().sum() / total)
    return chosen, torch.stack(shares)


def assert_as_the_loop(parts, bank, *, steps, rank, variant):
    spans = text_span(parts, bank, steps=steps, rank=rank, variant=variant)
    tolerance = 1e-6 if parts.values.dtype == torch.float32 else 1e-10
    for row, label in enumerate(parts.labels):
        chosen, shares = loop(parts[label], bank.directions, steps, rank, variant)
        assert spans.chosen[row, : len(chosen)].tolist() == chosen
        assert spans.texts[label] == [bank.texts[n] for n in chosen]
        torch.testing.assert_close(spans.share_explained[row, : len(chosen)].double(), shares, rtol=0, atol=tolerance)
    return spans


@BOTH
@pytest.mark.parametrize("rank", [5, 20, 100])
def test_choices_and_shares_are_those_of_the_plain_loop(variant, rank):
    # At rank 5, two components are held by the first directions looked at, one by the next, one by none.
    spans = assert_as_the_loop(sample(), bank_of(120, 100), steps=12, rank=rank, variant=variant)
    assert spans.ranks.tolist() == [min(rank, own) for own in RANKS]


@BOTH
def test_choices_are_those_of_the_plain_loop_down_to_the_last_direction(variant):
    parts = sample(images=60, width=12, ranks=(12, 12, 7))
    spans = assert_as_the_loop(parts, bank_of(50, 12), steps=15, rank=80, variant=variant)
    assert [len(texts) for texts in spans.texts.values()] == [12, 12, 7]
    torch.testing.assert_close(spans.share_explained[:, -1], torch.ones(3).double())


@BOTH
@pytest.mark.parametrize("coherence", [0.0, 0.4])
def test_choices_are_those_of_the_plain_loop_on_planted_texts_and_noise(variant, coherence):
    planted = planted_spans(images=90, d_clip=40, coherence=coherence, noise=0.02, dtype=torch.float64)
    bank = TextBank(planted.texts, planted.directions, space="planted")
    assert_as_the_loop(planted.parts, bank, steps=8, rank=40, variant=variant)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_texts_are_found_in_their_order(variant, dtype):
    planted = planted_spans(images=40, d_clip=48, dtype=dtype)
    spans = text_span(planted.parts, TextBank(planted.texts, planted.directions, space="planted"), variant=variant)
    assert spans.texts == {label: list(texts) for label, texts in planted.chosen.items()}
    assert spans.ranks.tolist() == [5] * 8
    variances = planted.deviations.square()
    shares = variances.cumsum(1) / variances.sum(1, keepdim=True)
    torch.testing.assert_close(spans.share_explained[:, :5], shares)


@BOTH
def test_no_share_is_above_that_of_as_many_principal_components(variant):
    parts = sample()
    spans = text_span(parts, bank_of(200, 100), variant=variant)
    centred = parts.values - parts.values.mean(1, keepdim=True)
    squares = torch.linalg.svdvals(centred).square()
    bound = squares.cumsum(1) / squares.sum(1, keepdim=True)
    assert (spans.share_explained <= bound[:, :20] + 1e-12).all()
    assert (spans.share_explained.diff(dim=1) >= 0).all()
    assert (spans.share_explained[:, 0] > 0).all()


@BOTH
def test_each_component_is_read_as_if_alone_and_pieces_agree(variant):
    parts, bank = sample(), bank_of(120, 100)
    whole = text_span(parts, bank, rank=5, variant=variant)
    one_by_one = text_span(parts, bank, rank=5, variant=variant, max_bytes=3_000_000)
    for other in (one_by_one, text_span(parts.select(labels=parts.labels[::-1]), bank, rank=5, variant=variant)):
        assert other.texts == whole.texts
        rows = [other.labels.index(label) for label in whole.labels]
        for name in ("share_explained", "directions", "mean"):
            torch.testing.assert_close(getattr(other, name)[rows], getattr(whole, name))


def allocated(work):
    """The most bytes that a run had allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("rank", [5, 80])
def test_memory_stays_below_what_is_allowed_however_many_images(rank):
    ranks = (3, 4, 30, 80) * 2
    bank = bank_of(300, 100, dtype=torch.float32)
    few, many = (sample(images=images, ranks=ranks, dtype=torch.float32) for images in (1000, 8000))
    allowed = 8_000_000  # less than the values alone take
    peaks = [allocated(lambda p=p: text_span(p, bank, rank=rank, max_bytes=allowed)) for p in (few, many)]
    assert max(peaks) < allowed
    assert peaks[1] < 1.1 * peaks[0]


def test_single_precision_chooses_what_double_does_and_its_rounding_is_no_direction():
    parts, bank = sample(dtype=torch.float32), bank_of(120, 100, dtype=torch.float32)
    spans = assert_as_the_loop(parts, bank, steps=12, rank=100, variant="published")
    assert spans.ranks.tolist() == list(RANKS)
    assert {t.dtype for t in (spans.share_explained, spans.directions, spans.mean)} == {torch.float32}
    assert spans.coefficients(parts).dtype == torch.float32


def test_half_precision_is_read_in_double_and_answered_in_single():
    planted = planted_spans(images=40, d_clip=48, dtype=torch.float64)
    bank = TextBank(planted.texts, planted.directions, space="planted")
    spans = text_span(planted.parts.to(torch.bfloat16), bank)
    assert spans.directions.dtype == torch.float32
    assert all(spans.texts[label][:3] == list(planted.chosen[label][:3]) for label in planted.chosen)


def test_the_corrected_variant_does_not_favour_texts_that_are_long_within_the_component():
    amounts = torch.randn(30, 2, generator=generator(), dtype=torch.float64)
    amounts = torch.linalg.qr(amounts - amounts.mean(0)).Q * torch.tensor([1.0, 0.6])
    values = torch.zeros(1, 30, 8, dtype=torch.float64)
    values[0, :, :2] = amounts
    directions = torch.zeros(2, 8, dtype=torch.float64)
    directions[0, [0, 7]] = torch.tensor([0.5, 0.75**0.5], dtype=torch.float64)
    directions[1, 1] = 1
    parts, bank = (
        Decomposition(values, ("L0H0",)),
        TextBank(["little of the first", "the second"], directions, space="plane"),
    )
    published, corrected = (text_span(parts, bank, variant=variant) for variant in VARIANTS)
    assert published.texts["L0H0"] == ["the second", "little of the first"]
    assert corrected.texts["L0H0"] == ["little of the first", "the second"]
    assert float(corrected.share_explained[0, 0]) == pytest.approx(1 / 1.36)


@BOTH
def test_a_text_that_others_explain_already_is_not_chosen(variant):
    bank = bank_of(3, 6)
    near = bank.directions[0] + 1e-9 * bank.directions[1]
    both = torch.stack([*bank.directions, near, bank.directions[:2].sum(0)])
    bank = TextBank(["a", "b", "c", "a again", "a and b"], both, space="here")
    spans = text_span(sample(images=40, width=6, ranks=(6,)), bank, variant=variant)
    assert len(spans.texts["L0H0"]) == 3
    assert len({"a", "a again"} & set(spans.texts["L0H0"])) <= 1


@BOTH
def test_what_does_not_vary_has_no_texts(variant):
    parts = sample(images=40, width=30, ranks=(4,))
    constant = torch.randn(30, generator=generator(), dtype=torch.float64).expand(1, 40, 30)
    values = torch.cat([parts.values, constant, torch.zeros_like(constant)])
    parts = Decomposition(values, ("L0H0", Component("constant", name="bias"), "mlp.0"))
    spans = text_span(parts, bank_of(20, 30), steps=6, variant=variant)
    assert spans.texts["bias"] == spans.texts["mlp.0"] == []
    assert (spans.chosen[1:] == -1).all()
    assert not spans.share_explained[1:].any()
    assert not spans.directions[1:].any()
    assert spans.ranks.tolist() == [4, int(variant == "published"), 0]
    torch.testing.assert_close(spans.reconstruction(parts).values[1:], values[1:])


@pytest.mark.parametrize(("variant", "ranks"), [("published", [6]), ("corrected", [5])])
def test_fewer_images_than_the_rank_span_fewer_directions(variant, ranks):
    parts = sample(images=6, width=30, ranks=(30,))
    spans = text_span(parts, bank_of(60, 30), variant=variant)
    assert spans.ranks.tolist() == ranks
    assert len(spans.texts["L0H0"]) <= ranks[0]


@BOTH
def test_a_list_ends_where_directions_or_texts_do(variant):
    parts = sample(ranks=(30,))
    assert len(text_span(parts, bank_of(60, 100), rank=4, variant=variant).texts["L0H0"]) == 4
    spans = text_span(parts, bank_of(7, 100), variant=variant)
    assert sorted(spans.texts["L0H0"]) == [f"text {n}" for n in range(7)]
    assert (spans.share_explained[:, 6:] == spans.share_explained[:, 6:7]).all()


@BOTH
def test_directions_are_orthonormal_and_span_what_the_texts_span_within_the_component(variant):
    parts, bank = sample(), bank_of(120, 100)
    spans = text_span(parts, bank, steps=3, rank=100, variant=variant)
    torch.testing.assert_close(
        spans.directions @ spans.directions.mT, torch.eye(3, dtype=torch.float64).expand(4, 3, 3), rtol=0, atol=1e-10
    )
    spanning = parts.values[0] if variant == "published" else parts.values[0] - parts.values[0].mean(0)
    axes = torch.linalg.svd(spanning, full_matrices=False).Vh[:3]
    texts = bank.directions[spans.chosen[0]] @ axes.T @ axes
    within = texts @ spans.directions[0].T
    torch.testing.assert_close(within @ spans.directions[0], texts)
    torch.testing.assert_close(within, within.tril(), rtol=0, atol=1e-9)


def test_reconstruction_and_residual_are_the_contributions_and_share_the_variance():
    parts, bank = sample(), bank_of(120, 100)
    spans = text_span(parts, bank, steps=5)
    kept, rest = spans.reconstruction(parts), spans.residual(parts)
    assert kept.labels == rest.labels == parts.labels
    assert not kept.complete
    torch.testing.assert_close(kept.values + rest.values, parts.values)
    variances = [one.values.var(1).sum(-1) for one in (kept, parts)]
    torch.testing.assert_close(variances[0] / variances[1], spans.share_explained[:, -1])
    scores = spans.scores(parts)
    assert scores.shape == (4, 150, 5)
    torch.testing.assert_close(scores.var(1).cumsum(1) / variances[1][:, None], spans.share_explained)


@BOTH
def test_coefficients_are_of_the_texts_within_the_directions_they_were_compared_in(variant):
    parts, bank = sample(), bank_of(120, 100)
    spans = text_span(parts, bank, steps=5, rank=100, variant=variant)
    coefficients, kept = spans.coefficients(parts), spans.reconstruction(parts)
    for row, label in enumerate(parts.labels):
        spanning = parts[label] if variant == "published" else parts[label] - parts[label].mean(0)
        axes = torch.linalg.svd(spanning, full_matrices=False).Vh[: RANKS[row]]
        chosen = spans.chosen[row][spans.chosen[row] >= 0]
        texts = bank.directions[chosen] @ axes.T @ axes
        within = coefficients[row, :, : len(chosen)] @ texts
        torch.testing.assert_close(within + parts[label].mean(0), kept[label], rtol=1e-6, atol=1e-6)
        assert not coefficients[row, :, len(chosen) :].any()


def test_a_reading_applies_to_other_images_and_to_components_in_another_order():
    parts, bank = sample(), bank_of(120, 100)
    spans = text_span(parts.select(labels=["L0H2", "L0H0"]), bank, steps=5)
    other = sample(images=7)
    kept = spans.reconstruction(other)
    assert kept.labels == ("L0H2", "L0H0")
    assert kept.values.shape == (2, 7, 100)
    alone = text_span(parts.select(labels="L0H0"), bank, steps=5)
    torch.testing.assert_close(kept["L0H0"], alone.reconstruction(other)["L0H0"])
    assert spans.texts["L0H0"] == alone.texts["L0H0"]
    with pytest.raises(UnknownNameError, match="L0H2"):
        spans.residual(other.select(labels="L0H0"))
    with pytest.raises(InputError, match="100 dimensions"):
        spans.residual(sample(width=60, ranks=(3, 4, 5)))


def test_nothing_is_written_into_what_was_given_and_no_graph_is_made():
    parts, bank = sample(), bank_of(120, 100)
    values, directions = parts.values.clone(), bank.directions.clone()
    parts = Decomposition(parts.values.requires_grad_(), parts.components)
    spans = text_span(parts, bank, rank=5)
    assert torch.equal(parts.values, values)
    assert torch.equal(bank.directions, directions)
    assert not spans.directions.requires_grad


def test_a_reading_says_what_it_is():
    spans = text_span(sample(), bank_of(120, 100))
    assert repr(spans) == (
        "Spans(component=4, step=20, published TextSpan: 4 head (layer 0); 120 texts of 'here', 150 images)"
    )
    assert (len(spans), spans.method, spans.images) == (4, "published TextSpan", 150)


def test_bad_input_is_refused():
    parts, bank = sample(images=20, width=10, ranks=(4,)), bank_of(9, 10)
    for options, says in (
        ({"steps": 0}, "steps= of at least 1; got 0"),
        ({"rank": -1}, "rank= of at least 1; got -1"),
        ({"variant": "fast"}, "'published', 'corrected'; got 'fast'"),
    ):
        with pytest.raises(InputError, match=says):
            text_span(parts, bank, **options)
    with pytest.raises(InputError, match="10 dimensions, the texts of 'here' 12"):
        text_span(parts, bank_of(9, 12))
    with pytest.raises(InputError, match=r"at least 2 images.* got 1"):
        text_span(parts.images(slice(0, 1)), bank)
    with pytest.raises(CapacityError, match="max_bytes=1,000 allows"):
        text_span(parts, bank, max_bytes=1000)
    with as_users_run_it(), pytest.raises(InputError, match="got Tensor, TextBank"):
        text_span(parts.values, bank)


def test_contributions_of_another_space_are_refused():
    parts, bank = sample(images=20, width=10, ranks=(4,)), bank_of(9, 10)
    there = Decomposition(parts.values, parts.components, metadata={"space": "there"})
    here = Decomposition(parts.values, parts.components, metadata={"space": "here"})
    with pytest.raises(InputError, match="'there', the texts of 'here'"):
        text_span(there, bank)
    with pytest.raises(InputError, match="'there', the texts of 'here'"):
        text_span(here, bank).reconstruction(there)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rank", [3, 80])
def test_contributions_that_are_not_finite_are_refused_by_name(bad, rank):
    parts = sample(images=20, width=40, ranks=(4, 4, 4))
    parts.values[1, 7, 2] = bad
    with pytest.raises(InputError, match="'L0H1' have NaN or Inf"):
        text_span(parts, bank_of(9, 40), rank=rank)
