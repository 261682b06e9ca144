"""Sparse codes in words, against scikit-learn, scipy and plain loops."""

from functools import partial
from itertools import accumulate

import pytest
import torch
from labelled_samples import as_users_run_it
from scipy.optimize import nnls
from sklearn.linear_model import Lasso, orthogonal_mp
from torch.profiler import ProfilerActivity, profile

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import CapacityError, InputError, UnknownNameError
from vitdecomp_lens.interpret import (
    Codes,
    Spans,
    lasso,
    match_rate,
    nonnegative_lasso,
    omp,
    representation,
    simultaneous_omp,
    text_span,
)
from vitdecomp_lens.testbed.planted import planted_spans

SINGLE = pytest.mark.parametrize("read", [omp, nonnegative_lasso])
CENTRES = pytest.mark.parametrize("centre", [True, False, "given"])
COUNT, WIDTH = 70, 24


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def bank_of(count=COUNT, width=WIDTH, *, seed=1, dtype=torch.float64, space="here"):
    directions = normal(count, width, seed=seed) + 0.3
    return TextBank([f"text {n}" for n in range(count)], directions.to(dtype), space=space)


def sample(*, components=3, images=7, width=WIDTH, seed=0, dtype=torch.float64, **options):
    """Components with means, of very different sizes."""
    values = normal(components, images, width, seed=seed) + normal(components, 1, width, seed=seed + 1)
    values *= 10.0 ** torch.arange(components)[:, None, None] / 10
    return Decomposition(values.to(dtype), tuple(f"L0H{n}" for n in range(components)), **options)


def centre_of(parts, centre):
    """The option, and what it takes off."""
    if centre == "given":
        given = normal(len(parts), parts.values.shape[-1], seed=9)
        return given, given
    return centre, parts.values.mean(1) if centre else torch.zeros_like(parts.values[:, 0])


def dense(codes):
    """Amounts of all texts."""
    amounts = torch.zeros(*codes.chosen.shape[:2], len(codes.bank) + 1, dtype=codes.amounts.dtype)
    amounts.scatter_add_(2, codes.chosen % (len(codes.bank) + 1), codes.amounts)
    assert not amounts[..., -1].any()
    return amounts[..., :-1]


def shares_of(vectors, reconstructions):
    return 1 - (vectors - reconstructions).square().sum(-1) / vectors.square().sum(-1)


# ---- OMP


@CENTRES
def test_omp_is_that_of_scikit_learn_step_by_step(centre):
    parts, bank = sample(), bank_of()
    centre, mean = centre_of(parts, centre)
    codes = omp(parts, bank, centre=centre, steps=8)
    vectors = parts.values - mean[:, None]
    atoms, targets = bank.directions.T, vectors.flatten(0, 1).T
    for steps in range(1, 9):
        truth = torch.tensor(orthogonal_mp(atoms.numpy(), targets.numpy(), n_nonzero_coefs=steps)).T.reshape(3, 7, -1)
        for row, image in torch.cartesian_prod(torch.arange(3), torch.arange(7)).tolist():
            assert set(codes.chosen[row, image, :steps].tolist()) == set(truth[row, image].nonzero()[:, 0].tolist())
        shares = shares_of(vectors, truth @ bank.directions)
        torch.testing.assert_close(codes.share_explained[..., steps - 1], shares, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense(codes), truth, rtol=0, atol=1e-10 * float(truth.abs().max()))
    torch.testing.assert_close(codes.mean, mean)


def test_omp_finds_what_was_planted_and_stops_there():
    bank = TextBank([f"text {n}" for n in range(30)], torch.linalg.qr(normal(40, 30)).Q.T, space="here")
    amounts = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
    vector = amounts @ bank.directions[[7, 2, 19]]
    codes = omp(Decomposition(vector.expand(1, 2, -1), ("mlp.3",)), bank, centre=False, steps=6)
    assert codes.texts == {"mlp.3": [["text 7", "text 2", "text 19"]] * 2}
    assert codes.code("mlp.3", -1) == tuple(
        (f"text {n}", pytest.approx(a)) for n, a in zip([7, 2, 19], amounts.tolist(), strict=True)
    )
    assert codes.chosen[0, 0].tolist() == [7, 2, 19, -1, -1, -1]
    expected = torch.tensor([9, 13, 14, 14, 14, 14], dtype=torch.float64) / 14
    torch.testing.assert_close(codes.share_explained[0, 1], expected)


# ---- simultaneous OMP


def joint_loop(vectors, texts, steps):
    """Simultaneous OMP with a least-squares fit in each step."""
    left, chosen, shares = vectors, [], []
    for _ in range(steps):
        chosen.append(int((left @ texts.T).square().sum(0).argmax()))
        atoms = texts[chosen]
        fitted = torch.linalg.lstsq(atoms.T, vectors.T).solution.T
        left = vectors - fitted @ atoms
        shares.append(1 - left.square().sum() / vectors.square().sum())
    return chosen, torch.stack(shares), fitted


@CENTRES
@pytest.mark.parametrize("shape", [(40, 24, 24), (9, 24, 5), (200, 130, 60), (200, 130, 120)])
def test_simultaneous_omp_is_the_plain_loop(centre, shape):
    # Components of rank 60 and 120 are held by the directions first looked at, and by all.
    images, width, rank = shape
    values = sample(images=images, width=rank).values @ torch.linalg.qr(normal(width, rank)).Q.T
    parts, bank = Decomposition(values, ("L0H0", "mlp.0", "embed")), bank_of(150, width)
    centre, mean = centre_of(parts, centre)
    spans = simultaneous_omp(parts, bank, steps=12, centre=centre)
    coefficients, kept = spans.coefficients(parts), spans.reconstruction(parts)
    for row in range(3):
        vectors = values[row] - mean[row]
        chosen, shares, fitted = joint_loop(vectors, bank.directions, 12)
        assert spans.chosen[row].tolist() == chosen
        torch.testing.assert_close(spans.share_explained[row], shares, rtol=0, atol=1e-10)
        size = float(fitted.abs().max())
        torch.testing.assert_close(coefficients[row], fitted, rtol=0, atol=1e-7 * size)
        torch.testing.assert_close(kept.values[row], mean[row] + fitted @ bank.directions[chosen], atol=1e-7, rtol=1e-7)
        assert int(spans.ranks[row]) == torch.linalg.matrix_rank(vectors, rtol=1e-6)


def test_of_one_image_it_is_omp():
    parts, bank = sample(images=1), bank_of()
    together, single = simultaneous_omp(parts, bank, steps=9, centre=False), omp(parts, bank, steps=9, centre=False)
    assert torch.equal(together.chosen, single.chosen[:, 0])
    torch.testing.assert_close(together.share_explained, single.share_explained[:, 0])
    torch.testing.assert_close(together.coefficients(parts), single.coefficients(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_texts_are_found_in_their_order_by_simultaneous_omp(dtype):
    planted = planted_spans(images=40, d_clip=48, dtype=dtype)
    bank = TextBank(planted.texts, planted.directions, space="planted")
    spans = simultaneous_omp(planted.parts, bank)
    assert spans.texts == {label: list(texts) for label, texts in planted.chosen.items()}
    assert spans.ranks.tolist() == [5] * 8
    variances = planted.deviations.square()
    torch.testing.assert_close(spans.share_explained[:, :5], variances.cumsum(1) / variances.sum(1, keepdim=True))
    torch.testing.assert_close(spans.coefficients(planted.parts)[..., :5].std(1, correction=0), planted.deviations)
    assert match_rate(spans, text_span(planted.parts, bank), steps=5).mean == 1


def test_planted_texts_are_found_in_noise_whatever_their_coherence():
    planted = planted_spans(images=400, d_clip=96, texts=60, coherence=0.1, noise=0.02, dtype=torch.float64)
    bank = TextBank(planted.texts, planted.directions, space="planted")
    spans = simultaneous_omp(planted.parts, bank, steps=5)
    assert all(set(spans.texts[label]) == set(texts) for label, texts in planted.chosen.items())
    other = planted_spans(images=50, d_clip=96, texts=60, coherence=0.1, noise=0.02, draw=1, dtype=torch.float64)
    # The noise along five of 96 directions is taken for texts; all else of it is left.
    left = spans.residual(other.parts).values - spans.residual(other.parts).values.mean(1, keepdim=True)
    assert float(left.square().mean()) == pytest.approx(0.02**2, rel=0.1)


def test_share_is_never_above_that_of_as_many_principal_components():
    parts, bank = sample(images=30), bank_of(200)
    spans = simultaneous_omp(parts, bank)
    squares = torch.linalg.svdvals(parts.values - parts.values.mean(1, keepdim=True)).square()
    bound = squares.cumsum(1) / squares.sum(1, keepdim=True)
    assert (spans.share_explained <= bound[:, :20] + 1e-12).all()
    assert (spans.share_explained.diff(dim=1) >= 0).all()


# ---- the non-negative lasso


def conditions_are_met(vectors, texts, amounts, penalty):
    """At a minimum no text gains, and what is in neither gains nor loses; in units of the vector's length."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    gains = ((vectors - amounts @ texts) / lengths) @ texts.T - penalty
    assert (amounts >= 0).all()
    assert float(gains.max()) < 1e-8
    assert float((gains * (amounts > 0)).abs().max()) < 1e-8


@CENTRES
@pytest.mark.parametrize("penalty", [0.05, 0.3])
def test_the_lasso_is_that_of_scikit_learn(centre, penalty):
    parts, bank = sample(), bank_of()
    centre, mean = centre_of(parts, centre)
    codes = nonnegative_lasso(parts, bank, centre=centre, penalty=penalty)
    vectors, amounts = parts.values - mean[:, None], dense(codes)
    conditions_are_met(vectors, bank.directions, amounts, penalty)
    for vector, mine in zip(vectors.flatten(0, 1), amounts.flatten(0, 1), strict=True):
        alpha = penalty * float(vector.norm()) / WIDTH
        model = Lasso(alpha=alpha, positive=True, fit_intercept=False, tol=1e-12, max_iter=200_000)
        truth = torch.tensor(model.fit(bank.directions.T.numpy(), vector.numpy()).coef_)
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-5 * float(vector.norm()))


def test_without_a_penalty_it_is_non_negative_least_squares():
    parts, bank = sample(images=4), bank_of(15)
    amounts = dense(nonnegative_lasso(parts, bank, centre=False, penalty=0.0))
    for vector, mine in zip(parts.values.flatten(0, 1), amounts.flatten(0, 1), strict=True):
        truth = torch.tensor(nnls(bank.directions.T.numpy(), vector.numpy())[0])
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-8 * float(vector.norm()))


def test_vectors_of_many_texts_get_more_room(monkeypatch):
    parts, bank = sample(width=60), bank_of(300, 60)
    roomy = nonnegative_lasso(parts, bank, centre=False, penalty=0.01)
    counts = (roomy.chosen >= 0).sum(-1)
    monkeypatch.setattr(lasso, "SLOTS", 3)
    tight = nonnegative_lasso(parts, bank, centre=False, penalty=0.01)
    assert int(counts.max()) > 12  # more than twice, of which 3 become 6 and 12
    torch.testing.assert_close(dense(tight), dense(roomy))
    conditions_are_met(parts.values, bank.directions, dense(tight), 0.01)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_texts_that_are_sums_of_others_or_nearly_the_same_are_no_hindrance(penalty):
    bank = bank_of(12, 6)
    rows = [
        bank.directions,
        bank.directions[:6] + bank.directions[1:7],
        bank.directions + 1e-9 * bank.directions.roll(1, 0),
    ]
    directions = torch.cat(rows)
    bank = TextBank([f"text {n}" for n in range(len(directions))], directions, space="here")
    parts = sample(images=40, width=6)
    amounts = dense(nonnegative_lasso(parts, bank, centre=False, penalty=penalty))
    conditions_are_met(parts.values, bank.directions, amounts, penalty)


def test_the_largest_amount_comes_first_and_shares_are_of_the_texts_so_far():
    parts, bank = sample(), bank_of()
    codes = nonnegative_lasso(parts, bank, centre=False, penalty=0.05)
    assert (codes.amounts.diff(dim=-1) <= 0).all()
    assert torch.equal(codes.amounts > 0, codes.chosen >= 0)
    terms = codes.amounts[..., None] * bank.directions[codes.chosen.clamp(min=0)]
    torch.testing.assert_close(codes.share_explained, shares_of(parts.values[:, :, None], terms.cumsum(2)))


def test_from_the_largest_cosine_on_there_are_no_texts():
    parts, bank = sample(images=3), bank_of()
    cosines = (parts.values / parts.values.norm(dim=-1, keepdim=True)) @ bank.directions.T
    largest = cosines.amax(-1).sort(dim=-1).values
    for penalty in (float(largest.max()) + 1e-6, float(largest.min()) - 1e-6):
        codes = nonnegative_lasso(parts, bank, centre=False, penalty=penalty)
        assert torch.equal((codes.chosen[..., 0] >= 0), cosines.amax(-1) > penalty)
    assert not nonnegative_lasso(parts, bank, centre=False, penalty=float(largest.max()) + 1e-6).share_explained.any()


def test_texts_whose_amounts_do_not_settle_are_refused(monkeypatch):
    monkeypatch.setattr(lasso, "ROUNDS", 0)
    with pytest.raises(InputError, match="that can be told apart"):
        nonnegative_lasso(sample(), bank_of(), centre=False)


# ---- what all codes share


@SINGLE
def test_reconstruction_and_residual_are_the_contributions(read):
    parts, bank = sample(metadata={"space": "here"}), bank_of()
    codes = read(parts, bank, centre=True)
    kept, rest = codes.reconstruction(parts), codes.residual(parts)
    assert kept.labels == rest.labels == parts.labels
    assert not kept.complete
    torch.testing.assert_close(kept.values + rest.values, parts.values)
    torch.testing.assert_close(kept.values - codes.mean[:, None], dense(codes) @ bank.directions)
    centred = parts.values - codes.mean[:, None]
    torch.testing.assert_close(shares_of(centred, centred - rest.values), codes.share_explained[..., -1])
    assert torch.equal(codes.coefficients(parts), codes.amounts)
    # Components are found by their labels, also among others and in another order.
    some = read(parts.select(labels=["L0H2", "L0H0"]), bank, centre=True)
    torch.testing.assert_close(some.residual(parts).values, rest.values[[2, 0]])


@SINGLE
def test_codes_are_for_the_images_that_were_read(read):
    parts, bank = sample(), bank_of()
    codes = read(parts, bank, centre=True)
    with pytest.raises(InputError, match=r"the 7 images that were read.* got 2"):
        codes.reconstruction(parts.images([0, 1]))
    with pytest.raises(UnknownNameError, match="L0H0"):
        codes.residual(parts.select(labels=["L0H1", "L0H2"]))
    with pytest.raises(InputError, match="'there', the texts of 'here'"):
        codes.residual(sample(metadata={"space": "there"}))
    with pytest.raises(UnknownNameError, match="L0H9"):
        codes.code("L0H9")
    with pytest.raises(InputError, match="an image from 0 to 6; got 7"):
        codes.code("L0H0", 7)


@SINGLE
def test_each_vector_is_coded_as_if_alone_and_pieces_agree(read):
    parts, bank = sample(images=40), bank_of()
    whole = read(parts, bank, centre=False)
    pieces = read(parts, bank, centre=False, max_bytes=400_000)
    assert torch.equal(pieces.chosen, whole.chosen)
    torch.testing.assert_close(pieces.amounts, whole.amounts)
    torch.testing.assert_close(pieces.share_explained, whole.share_explained)
    one = read(parts.select(labels="L0H1").images([33]), bank, centre=False)
    assert one.code("L0H1") == tuple((text, pytest.approx(a)) for text, a in whole.code("L0H1", 33))


@pytest.mark.parametrize("read", [omp, partial(nonnegative_lasso, penalty=0.3), simultaneous_omp])
def test_memory_stays_below_what_is_allowed_however_many_images(read):
    bank, allowed = bank_of(200, 48, dtype=torch.float32), 4_000_000
    for images in (40, 300):
        parts = sample(images=images, width=48, dtype=torch.float32)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            reading = read(parts, bank, centre=False, max_bytes=allowed)
        events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
        peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
        result = 4 * reading.chosen.numel() * 4 if isinstance(reading, Codes) else 0
        assert peak < allowed + 2 * result


def test_components_that_are_read_in_pieces_are_as_if_read_at_once():
    parts, bank = sample(components=6, images=30), bank_of()
    whole, pieces = (simultaneous_omp(parts, bank, steps=5, max_bytes=most) for most in (2**29, 700_000))
    assert pieces.texts == whole.texts
    torch.testing.assert_close(pieces.directions, whole.directions)


@SINGLE
def test_where_nothing_is_there_to_code_there_are_no_texts(read):
    parts, bank = sample(components=1), bank_of()
    constant = normal(1, 1, WIDTH).expand(1, 7, WIDTH)
    values = torch.cat([parts.values, constant, torch.zeros_like(constant)])
    parts = Decomposition(values, ("L0H0", Component("constant", name="bias"), "mlp.0"))
    codes = read(parts, bank, centre=True)
    assert codes.texts["bias"] == codes.texts["mlp.0"] == [[]] * 7
    assert not codes.share_explained[1:].any()
    torch.testing.assert_close(codes.reconstruction(parts).values[1:], values[1:])
    assert all(read(parts, bank, centre=False).texts["bias"])
    spans = simultaneous_omp(parts, bank)
    assert spans.texts["bias"] == spans.texts["mlp.0"] == []
    assert (spans.ranks.tolist(), spans.share_explained[1:].any()) == ([6, 0, 0], False)
    assert simultaneous_omp(parts, bank, centre=False).ranks.tolist() == [7, 1, 0]


def test_a_list_ends_where_texts_or_dimensions_do():
    parts = sample(images=9, width=6)
    for bank in (bank_of(4, 6), bank_of(50, 6)):
        most = min(len(bank), 6)
        codes, spans = omp(parts, bank, centre=False, steps=20), simultaneous_omp(parts, bank, steps=20)
        for reading in (codes, spans):
            assert reading.chosen.shape[-1] == 20
            assert (reading.chosen >= 0).sum(-1).unique().tolist() == [most]
            torch.testing.assert_close(
                reading.share_explained[..., most:],
                reading.share_explained[..., -1:].expand(*reading.chosen.shape[:-1], 20 - most),
            )
    torch.testing.assert_close(codes.share_explained[..., -1], torch.ones(3, 9).double())


def test_single_precision_is_coded_as_double_is():
    parts, bank = sample(dtype=torch.float32), bank_of(dtype=torch.float32)
    for read in (omp, nonnegative_lasso):
        codes = read(parts, bank, centre=True)
        wide = read(parts.to(torch.float64), bank.to(torch.float64), centre=True)
        assert {codes.amounts.dtype, codes.share_explained.dtype, codes.mean.dtype} == {torch.float32}
        assert torch.equal(codes.chosen, wide.chosen)
        torch.testing.assert_close(codes.amounts, wide.amounts.float())
        half = read(parts.to(torch.bfloat16), bank, centre=True)
        assert half.amounts.dtype == torch.float32
        assert half.reconstruction(parts.to(torch.bfloat16)).values.dtype == torch.bfloat16


def test_the_representation_is_read_as_a_component_is():
    parts, bank = sample(total=normal(7, WIDTH), complete=False, metadata={"space": "here"}), bank_of()
    whole = representation(parts)
    codes = nonnegative_lasso(whole, bank.centred(), centre=True)
    assert codes.labels == ("representation",)
    assert len(codes.texts["representation"]) == 7
    torch.testing.assert_close(codes.mean[0], parts.total.mean(0))
    with pytest.raises(InputError, match="'here', the texts of 'there'"):
        omp(whole, bank_of(space="there"), centre=True)
    with pytest.raises(InputError, match="with a total"):
        representation(sample())


def test_nothing_is_written_into_what_was_given_and_no_graph_is_made():
    parts, bank = sample(), bank_of()
    values, directions = parts.values.clone(), bank.directions.clone()
    parts = Decomposition(parts.values.requires_grad_(), parts.components)
    for read in (omp, nonnegative_lasso, simultaneous_omp):
        assert not read(parts, bank, centre=True).share_explained.requires_grad
    assert torch.equal(parts.values, values)
    assert torch.equal(bank.directions, directions)


def test_readings_say_what_they_are():
    parts, bank = sample(), bank_of()
    start = "3 head (layer 0); 70 texts of 'here', 7 images)"
    assert repr(omp(parts, bank, centre=True, steps=4)) == f"Codes(component=3, step=4, OMP: {start}"
    assert repr(nonnegative_lasso(parts, bank, centre=True, penalty=0.9)) == (
        f"Codes(component=3, step=1, non-negative lasso, penalty 0.9: {start}"
    )
    spans = simultaneous_omp(parts, bank, steps=4)
    assert repr(spans) == f"Spans(component=3, step=4, simultaneous OMP: {start}"
    assert isinstance(spans, Spans)
    assert len(spans) == 3


# ---- bad input


@pytest.mark.parametrize("read", [omp, nonnegative_lasso, simultaneous_omp])
def test_what_cannot_be_read_is_refused(read):
    parts, bank = sample(), bank_of()
    other = Decomposition(parts.values, parts.components, metadata={"space": "there"})
    for given, texts, centre, says in (
        (other, bank, True, "'there', the texts of 'here'"),
        (parts, bank_of(9, 12), True, "24 dimensions, the texts of 'here' 12"),
        (parts.images(slice(0, 0)), bank, False, "at least 1 image; got 0"),
        (Decomposition(parts.values[:0], ()), bank, True, "at least one component"),
        (parts.images([0]), bank, True, "at least 2 images for centre=True, as of 1"),
        (parts, bank, torch.zeros(2, WIDTH), r"of shape \(3, 24\); got shape \(2, 24\)"),
        (parts, bank, torch.full((3, WIDTH), torch.nan), "finite"),
    ):
        with as_users_run_it(), pytest.raises(InputError, match=says):
            read(given, texts, centre=centre)
    with as_users_run_it(), pytest.raises(InputError, match="got Tensor, TextBank"):
        read(parts.values, bank, centre=True)
    with as_users_run_it(), pytest.raises(InputError, match="True, False or vectors to take off; got 'mean'"):
        read(parts, bank, centre="mean")
    with pytest.raises(CapacityError, match="max_bytes=1,000 allows"):
        read(parts, bank, centre=True, max_bytes=1000)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("read", [omp, nonnegative_lasso, simultaneous_omp])
def test_contributions_that_are_not_finite_are_refused_by_name(read, centre, bad):
    parts = sample()
    parts.values[1, 4, 2] = bad
    with pytest.raises(InputError, match="'L0H1' have NaN or Inf"):
        read(parts, bank_of(), centre=centre)


def test_options_out_of_range_are_refused():
    parts, bank = sample(), bank_of()
    for read in (omp, simultaneous_omp):
        with pytest.raises(InputError, match="steps= of at least 1; got 0"):
            read(parts, bank, centre=True, steps=0)
    for penalty in (-0.1, 1.0, torch.nan):
        with pytest.raises(InputError, match=f"from 0 to below 1.* got {penalty}"):
            nonnegative_lasso(parts, bank, centre=True, penalty=penalty)
