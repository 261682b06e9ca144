"""Aligners: planted truth is found, by every method that can; the same again whatever way images come."""

import dataclasses
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from labelled_samples import as_users_run_it
from timm.models.vision_transformer import VisionTransformer
from tiny_models import perturb

from vitdecomp_lens import decompose
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.clip.checkpoints import Schedule, State
from vitdecomp_lens.clip.coordinates import Coordinates
from vitdecomp_lens.clip.fitting import optimise
from vitdecomp_lens.clip.moments import Layout, spans_of
from vitdecomp_lens.clip.objective import METHODS, Objective, nearest_isometry, retract
from vitdecomp_lens.clip.separating import _turned
from vitdecomp_lens.clip.sources import MOST_HELD_OUT, Paired, held_out_mask
from vitdecomp_lens.clip.starting import NormalEquations, each_alone, isometries, least_squares
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import ComponentMaps, Decomposition
from vitdecomp_lens.errors import InputError, StoreError
from vitdecomp_lens.testbed.models import build, normalised
from vitdecomp_lens.testbed.planted import planted_maps
from vitdecomp_lens.testbed.scenes import Scenes


def planted(*, images=700, d_rep=24, d_clip=32, components=12, d_head=6, dtype=torch.float64, **options):
    return planted_maps(
        images=images, d_rep=d_rep, d_clip=d_clip, components=components, d_head=d_head, dtype=dtype, **options
    )


def drawn(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(targets):
    return targets / targets.norm(dim=-1, keepdim=True)


def errors(aligner, truth):
    """Of the components that were planted, which come first."""
    off = aligner.maps[: len(truth.maps)] - truth.maps
    return off.flatten(1).norm(dim=1) / truth.maps.flatten(1).norm(dim=1)


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("basis", "weights", "bias"))


class Cut:
    """A source that comes in chunks of a size of its own."""

    space = None

    def __init__(self, parts, targets, size):
        self.parts, self.targets, self.size, self.passes = parts, targets, size, 0
        self.components, self.metadata, self.count = parts.components, parts.metadata, len(targets)

    def chunks(self):
        self.passes += 1
        yield from zip(self.parts.values.split(self.size, dim=1), self.targets.split(self.size), strict=True)


# ---- planted truth


@pytest.mark.parametrize("given", [True, False], ids=["as they are", "unit rows"])
@pytest.mark.parametrize("d_rep", [24, 32, 48])
def test_compalign_recovers_planted_maps(d_rep, given):
    truth, other = planted(d_rep=d_rep), planted(d_rep=d_rep, draw=1)
    aligner = Aligner.fit(truth.parts, truth.targets if given else unit(truth.targets))
    assert float(errors(aligner, truth).max()) < 1e-2
    for tolerance in (1e-2, 1e-3):
        report = aligner.report(other.parts, other.targets, tolerance=tolerance)
        assert report.within == 0
        assert report.across == 0
    assert report.cosine_distance < 1e-3
    assert float(report.isometry.max()) < 1e-2
    assert report.scale == pytest.approx(1, abs=1e-2)
    torch.testing.assert_close(report.shares_after, report.shares_before, rtol=1e-2, atol=0)


def test_single_precision_recovers_them_too():
    truth = planted(d_rep=48, dtype=torch.float32)
    aligner = Aligner.fit(truth.parts, truth.targets)
    assert aligner.maps.dtype == torch.float32
    assert float(errors(aligner, truth).max()) < 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_beside_it(method):
    truth, other = planted(noise=0.3, d_rep=32), planted(noise=0.3, d_rep=32, draw=1)
    aligner = Aligner.fit(truth.parts, truth.targets, method=method)
    report = aligner.report(other.parts, other.targets)
    best = truth.parts.map(truth).total
    least = float(1 - torch.cosine_similarity(best, truth.targets).mean())
    if method == "shared":
        assert report.cosine_distance > 2 * least
        assert report.within > 0.03
        assert torch.equal(aligner.maps[0], aligner.maps[-1])
    else:
        assert report.cosine_distance < 1.3 * least
    if method == "unconstrained":
        assert report.isometry.max() > 0.05
    if method in ("compalign", "orthogonal"):
        assert float(report.isometry.max()) < 0.02
        assert report.within == 0
        assert report.across == 0
    if method == "compalign_paper":  # d_rep is d_clip, so that spans are not made up for by what is outside of them
        assert float(report.isometry.max()) < 0.1
    if method == "orthogonal":
        for columns in Layout(aligner.ranks).slices:
            torch.testing.assert_close(
                aligner.weights[columns] @ aligner.weights[columns].T, torch.eye(6, dtype=torch.float64)
            )


def test_with_few_images_isometries_generalise_and_least_squares_does_not():
    truth, other = planted(images=110, noise=0.3), planted(noise=0.3, draw=1)
    found = {
        method: Aligner.fit(truth.parts, truth.targets, method=method).report(other.parts, other.targets)
        for method in ("compalign", "unconstrained", "shared")
    }
    assert found["compalign"].cosine_distance < found["unconstrained"].cosine_distance
    assert found["compalign"].within < found["unconstrained"].within
    assert found["compalign"].across < found["unconstrained"].across


def test_a_space_and_its_rotated_copy():
    rotation = torch.linalg.qr(drawn(12, 12)).Q
    embeddings = 0.3 + drawn(200, 12, seed=1)
    parts = Decomposition(embeddings[None], ("embed",), embeddings)
    aligner = Aligner.fit(parts, unit(embeddings @ rotation))
    assert float((aligner.maps[0] - rotation).norm() / rotation.norm()) < 1e-2


def test_a_model_and_its_rotated_copy():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0, global_pool="avg"
    )
    model = model.double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    parts = decompose(model, 2 * drawn(500, 3, 16, 16))
    rotation = torch.linalg.qr(drawn(16, 16)).Q
    aligner = Aligner.fit(parts, parts.total @ rotation)
    assert aligner.fit_report.cosine_distance < 1e-6
    varies = [c.label for c in parts.components if c.kind != "constant"]
    assert len(varies) >= 7
    for label in varies:
        wanted = parts[label] @ rotation
        found = parts.map(aligner)[label]
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2, label
    with as_users_run_it(), pytest.raises(InputError, match="this aligner was made for"):
        aligner.refuse_other(decompose(model, drawn(2, 3, 16, 16), by="layer"))


@pytest.fixture(scope="module")
def rotated():
    """A CLIP's contributions, and its embeddings rotated; the rotation."""
    clip = perturb(build("clip")).requires_grad_(False).double()
    images = normalised(Scenes(size=940).images(range(940))).double()
    rotation = torch.linalg.qr(drawn(64, 64)).Q
    parts = decompose(clip.visual, images)
    targets = clip.encode_image(images) @ rotation
    return parts, targets, rotation


@pytest.mark.parametrize("method", ["compalign", "unconstrained", "orthogonal"])
def test_a_clip_and_its_rotated_copy(rotated, method):
    parts, targets, rotation = rotated
    fitted, others = parts.images(range(900)), parts.images(range(900, 940))
    aligner = Aligner.fit(fitted, targets[:900], method=method, rank_tolerance=1e-5)
    report = aligner.report(others, targets[900:])
    assert report.cosine_distance < 1e-7
    assert report.within == report.across == 0
    if method != "unconstrained":
        assert float(report.isometry.max()) < 1e-6
    slices, ranks = Layout(aligner.ranks).slices, dict(zip(parts.labels, aligner.ranks, strict=True))
    assert [ranks[c.label] for c in parts.components if c.kind == "head"] == [16] * 16
    mapped = others.map(aligner)
    for row, component in enumerate(parts.components):
        wanted, found = others.values[row] @ rotation, mapped.values[row]
        if component.kind == "head":  # all of the map, not only where the head writes much
            basis = aligner.basis[:, slices[row]]
            off = (aligner.weights[slices[row]] - basis.T @ rotation).norm() / ranks[component.label] ** 0.5
            assert float(off) < 1e-2, component.label
        # The last norm's shift lies outside of what other components write, where nothing says how to turn it.
        most = 0.1 if component.label == "ln_post.bias" else 1e-2
        assert float((found - wanted).norm()) <= most * float(wanted.norm()), component.label


def with_constants(truth, turn):
    """Planted components beside three that are divided by one norm, one of them negative, and two that never change."""
    images = truth.parts.values.shape[1]
    amounts = 1 + 0.2 * drawn(images, seed=7).tanh()
    series = torch.stack([amounts, -2 * amounts, 0.5 * amounts, *torch.ones(2, images, dtype=torch.float64)])
    added = series[:, :, None] * drawn(5, 1, truth.parts.values.shape[2], seed=8)
    values = torch.cat([truth.parts.values, added])
    labels = (*truth.parts.labels, "pos", "cls", "proj.bias", "norm.bias", "head.bias")
    return Decomposition(values, labels, values.sum(0)), truth.targets + added.sum(0) @ turn, added @ turn


@pytest.mark.parametrize("method", ["compalign", "unconstrained", "orthogonal"])
def test_components_that_no_image_tells_apart_are_mapped_as_one_body(method):
    truth, turn = planted(images=400, components=3), torch.linalg.qr(drawn(32, 24, seed=9)).Q.T
    parts, targets, wanted = with_constants(truth, turn)
    aligner = Aligner.fit(parts, targets, method=method)
    assert float(errors(aligner, truth).max()) < 1e-2
    moved = parts.map(aligner)
    report = aligner.report(parts, targets)
    assert report.cosine_distance < 1e-7
    assert aligner.ranks == (6, 6, 6, 1, 1, 1, 1, 1)
    scale = report.scale**0.5
    for rows in ([3, 4, 5], [6, 7]):  # lengths and angles within each of the two
        before, after = parts.values[rows, 0], moved.values[rows, 0]
        torch.testing.assert_close(after @ after.T / scale**2, before @ before.T, rtol=2e-2, atol=0.05)
    # Where the first three go together is what images show; the others are in the bias.
    torch.testing.assert_close(moved.values[3:6].sum(0) / scale, wanted[:3].sum(0), rtol=0, atol=0.05)
    bias = aligner.bias + moved.values[6:8, 0].sum(0)
    torch.testing.assert_close(bias / scale, wanted[3:, 0].sum(0), rtol=0, atol=0.05)


def test_constants_are_found_whatever_they_are_divided_by_and_however_images_come():
    parts, targets, _ = with_constants(planted(images=400, components=3), torch.linalg.qr(drawn(32, 24)).Q.T)
    mask = held_out_mask(400, 0.1, 0)
    options = {"tolerance": 1e-3, "max_rank": None, "seed": 0}
    for size, max_bytes in ((400, 1 << 30), (50, 8 * 24**2 * 3)):  # all components at once, and three at a time
        spans = spans_of(Cut(parts, targets, size), mask, max_bytes=max_bytes, **options)
        assert spans.members == ((0,), (1,), (2,), (3, 4, 5))
        assert [(group.rows, group.constant) for group in spans.inseparable] == [((6, 7), True), ((3, 4, 5), False)]
        vectors = spans.inseparable[1].vectors
        ratio = vectors / parts.values[3:6, 0]
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
        halves = parts.to(torch.float16)
        found = spans_of(Cut(halves, targets, size), mask, max_bytes=max_bytes, **options)
        assert found.members == spans.members
    varied = parts.values.clone()
    varied[4, ::2] *= 1.01
    apart = Cut(Decomposition(varied, parts.labels, varied.sum(0)), targets, 400)
    spans = spans_of(apart, mask, max_bytes=1 << 30, **options)
    assert spans.members == ((0,), (1,), (2,), (4,), (3, 5))
    constant = Decomposition(parts.values[6:], parts.labels[6:], parts.values[6:].sum(0))
    with pytest.raises(InputError, match="all are the same for all images"):
        Aligner.fit(constant, targets)


def test_opposite_directions_are_turned_too():
    vectors = torch.eye(3, dtype=torch.float64)[:2]
    for wanted in (-vectors.sum(0), vectors.sum(0), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)):
        found = _turned(vectors, vectors.clone(), wanted, 1.0)
        torch.testing.assert_close(found.sum(0), wanted)
        gram = torch.eye(2, dtype=torch.float64) * float(wanted.square().sum()) / 2
        torch.testing.assert_close(found @ found.T, gram)


def test_a_source_sorted_by_class_is_fitted_as_a_shuffled_one_is():
    # From the middle on, contributions lie elsewhere: the first images show half of each span.
    truth = planted(images=4000, d_rep=24, components=3, d_head=6)
    values = truth.parts.values.clone()
    coordinates = torch.einsum("cbd,cdr->cbr", values, truth.spans)
    coordinates[:, :2000, 3:] = 0
    coordinates[:, 2000:, :3] = 0
    values = torch.einsum("cbr,cdr->cbd", coordinates, truth.spans)
    targets = torch.einsum("cbd,cde->be", values, truth.maps)
    aligner = Aligner.fit(Decomposition(values, truth.components, values.sum(0)), targets)
    assert aligner.ranks == (6, 6, 6)
    assert float(aligner.fit_report.outside.max()) < 1e-10
    assert float(errors(aligner, truth).max()) < 1e-2


@pytest.mark.parametrize("method", ["compalign", "shared"])
def test_half_precision_is_fitted_on_the_spans_that_were_planted(method):
    truth, other = planted(components=4), planted(components=4, draw=1)
    parts = replace(truth.parts.to(torch.bfloat16), total=None)
    aligner = Aligner.fit(parts, truth.targets.bfloat16(), method=method)
    if method == "compalign":
        assert aligner.ranks == (6, 6, 6, 6)
        assert aligner.report(replace(other.parts.to(torch.float32), total=None), other.targets).cosine_distance < 1e-3
    assert aligner.maps.dtype == torch.float32


def test_a_span_wider_than_the_space_gets_a_co_isometry():
    truth = planted(images=400, d_clip=8, d_rep=12, components=2, d_head=4)
    wide = drawn(1, 400, 12, seed=3)
    projection = torch.linalg.qr(drawn(12, 8, seed=4)).Q
    values = torch.cat([truth.parts.values, wide])
    parts = Decomposition(values, ("L0H0", "L0H1", "mlp.0"), values.sum(0))
    targets = truth.targets + wide[0] @ projection
    for method in ("compalign", "orthogonal"):
        aligner = Aligner.fit(parts, targets, method=method)
        assert aligner.ranks == (4, 4, 12)
        assert aligner.fit_report.co_isometric == ("mlp.0",)
        assert aligner.fit_report.cosine_distance < 1e-3
        assert float(aligner.fit_report.isometry.max()) < 1e-2
        assert float((aligner.maps[2] - projection).norm() / projection.norm()) < 1e-2


def test_constants_and_components_that_write_nothing():
    truth = planted(images=300, components=3)
    constant = drawn(24, seed=5).expand(300, 24)
    values = torch.cat([truth.parts.values, constant[None], torch.zeros(1, 300, 24, dtype=torch.float64)])
    parts = Decomposition(values, (*truth.components, "norm.bias", "head.bias"), values.sum(0))
    aligner = Aligner.fit(parts, truth.targets)
    assert aligner.ranks == (6, 6, 6, 1, 0)
    assert aligner.fit_report.cosine_distance < 1e-6
    assert float(errors(aligner, truth).max()) < 1e-2
    moved = parts.map(aligner)
    torch.testing.assert_close(moved["norm.bias"].norm(dim=1), constant.norm(dim=1))
    assert not moved["head.bias"].any()


# ---- closed forms and objective


def equations(truth, max_bytes=1 << 30):
    source = Paired(truth.parts, truth.targets)
    mask = held_out_mask(source.count, 0.1, 0)
    spans = spans_of(source, mask, tolerance=1e-3, max_rank=None, max_bytes=1 << 30, seed=0)
    coordinates = Coordinates(source, spans, mask, max_bytes=1 << 30, seed=0)
    return NormalEquations(coordinates, max_bytes), mask, spans


@pytest.mark.parametrize("lengths", ["given", "unit"])
def test_the_start_is_least_squares(lengths):
    truth = planted(noise=0.3)
    found, mask, spans = equations(truth)
    maps = least_squares(found, 1e-13, lengths=lengths)
    rows = torch.cat([spans.project(truth.parts.values), torch.ones(700, 1, dtype=torch.float64)], 1)[~mask].numpy()
    targets = truth.targets[~mask]
    targets = unit(targets) if lengths == "unit" else targets / targets.norm(dim=-1).mean()
    wanted = np.linalg.lstsq(rows, targets.numpy(), rcond=None)[0]
    np.testing.assert_allclose(maps[:-1], wanted[:-1], rtol=0, atol=1e-9)
    np.testing.assert_allclose(maps[-1] * found.coordinates.unit, wanted[-1], rtol=0, atol=1e-9)


def test_blocks_come_to_what_all_at_once_does():
    truth = planted(noise=0.3)
    joint, _, spans = equations(truth)
    blocks, *_ = equations(truth, max_bytes=16 * 20**2 + 64 * 20 * 32)
    assert joint.joint
    assert len(blocks.blocks) == 4
    one, other = (least_squares(found, 1e-6) for found in (joint, blocks))
    torch.testing.assert_close(other, one, rtol=0, atol=2e-3 * float(one.abs().max()))
    objective = Objective("compalign", 1.0, spans.layout, 24, 32)
    held = joint.coordinates.held
    one, other = (
        objective(isometries(found, objective, maps), held.rows, held.units)
        for found, maps in ((joint, one), (blocks, other))
    )
    assert float(other[0]) == pytest.approx(float(one[0]), rel=0.02)


def peak(function):
    """How many bytes of tensors there were at most, what operations need for themselves among them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("blocks", [1, 3])
def test_closed_forms_keep_to_the_memory_they_are_given(blocks):
    truth = planted(images=100, d_clip=8, components=40, d_head=8, d_rep=24)
    width = 320 // blocks + 9
    max_bytes = 16 * width**2 + 64 * width * 8
    found, _, spans = equations(truth, max_bytes)
    assert len(found.blocks) == blocks
    objective = Objective("compalign", 1.0, spans.layout, 24, 8)

    def closed_forms():
        mine = NormalEquations(found.coordinates, max_bytes)
        isometries(mine, objective, least_squares(mine, 1e-6))

    batch = 3 * 8 * 90 * (321 + 8)  # rows of a piece, centred
    assert 0.5 * max_bytes < peak(closed_forms) < max_bytes + batch


def test_sweeps_end_at_isometries_that_no_other_isometry_of_one_component_betters():
    truth = planted(images=300, components=4, noise=0.5)
    found, _, spans = equations(truth)
    objective = Objective("orthogonal", 1.0, spans.layout, 24, 32)
    maps = isometries(found, objective, least_squares(found, 1e-6))
    again = isometries(found, objective, maps)
    held = found.coordinates.held
    one, other = (float(objective(m, held.rows, held.units)[0]) for m in (maps, again))
    assert other >= one * 0.97
    for columns in spans.layout.slices:
        torch.testing.assert_close(maps[columns] @ maps[columns].T, torch.eye(6, dtype=torch.float64))


def test_the_first_start_has_the_best_isometry_of_each_component_alone():
    truth = planted(images=300, components=4, noise=0.5)
    coordinates, spans = equations(truth)[0].coordinates, equations(truth)[2]
    maps, table = each_alone(coordinates), coordinates.sample
    rows, units = ((one - one.mean(0)).numpy() for one in (table.rows[:, :-1], table.units))
    for columns in spans.layout.slices:
        left, _, right = np.linalg.svd(rows[:, columns].T @ units, full_matrices=False)
        np.testing.assert_allclose(maps[columns].numpy(), left @ right, atol=1e-10)
    written = table.rows @ maps  # the bias: what is written lies, on average, where targets lie, in their own scale
    scale = (written - written.mean(0)).square().sum() / ((written - written.mean(0)) * table.units).sum()
    torch.testing.assert_close(written.mean(0), scale * table.units.mean(0))


@pytest.mark.parametrize(
    ("d_rep", "d_clip", "rank"), [(7, 5, 3), (6, 5, 3), (5, 5, 3), (4, 6, 3), (7, 5, 6), (9, 4, 3)]
)
def test_the_papers_penalty_is_the_least_over_what_no_image_sees(d_rep, d_clip, rank):
    # The oracle: full maps, of which the part outside of the span is optimised.
    maps = 0.8 * drawn(rank, d_clip, seed=rank)
    found = Objective("compalign_paper", 1.0, Layout((rank,)), d_rep, d_clip).deviation(torch.cat([maps, maps[:1]]))
    least = min(_papers_own(maps, d_rep - rank, seed) for seed in range(4))
    assert float(found) == pytest.approx(least, rel=1e-5)


def _papers_own(maps, others, seed):
    outside = drawn(others, maps.shape[1], seed=10 + seed).requires_grad_()
    identity = torch.eye(maps.shape[1], dtype=maps.dtype)
    lbfgs = torch.optim.LBFGS([outside], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        lbfgs.zero_grad()
        full = torch.cat([maps, outside])
        value = (full.T @ full - identity).square().sum() / maps.shape[1]
        value.backward()
        return value

    lbfgs.step(loss)
    return float(loss().detach())


def test_gains_are_judged_beside_what_no_maps_can_reach():
    # Nine tenths of the paper's penalty are a constant here; gains of a thousandth of the rest are gains.
    truth = planted(images=300, d_rep=8, d_clip=80, components=3, d_head=3)
    objective = Objective("compalign_paper", 1.0, Layout((3, 3, 3)), 8, 80)
    assert objective.least == pytest.approx(0.9)
    maps = drawn(10, 80)
    retract(maps[:-1], objective.layout, exactly=True)
    assert float(objective.deviation(maps)) == pytest.approx(0.9)
    assert Objective("compalign_paper", 1.0, Layout((3, 3, 3)), 80, 8).least == 0
    assert Objective("compalign", 1.0, Layout((3, 3, 3)), 8, 80).least == 0
    source = Paired(truth.parts, truth.targets)
    mask = held_out_mask(300, 0.1, 0)
    spans = spans_of(source, mask, tolerance=1e-3, max_rank=None, max_bytes=1 << 30, seed=0)
    coordinates = Coordinates(source, spans, mask, max_bytes=1 << 30, seed=0)
    with torch.no_grad():
        entry = tuple(map(float, objective(maps, coordinates.held.rows, coordinates.held.units)))
    state = State(maps, maps.clone(), "drawn", 1e-4, [entry])
    schedule = Schedule(epochs=2, batch_size=32, learning_rate=1e-4, patience=1, seed=0)
    optimise(state, objective, coordinates, schedule, after_epoch=lambda state: None)
    assert state.epoch == 2  # or it would have ended
    assert state.rate == 1e-4
    for before, after in pairwise(map(sum, state.history)):
        assert 1e-3 * (before - 0.9) < before - after < 1e-3 * before


def test_the_penalty_is_zero_for_isometries_only():
    layout = Layout((3, 3, 1, 7, 0))
    maps = drawn(15, 5)
    objective = Objective("compalign", 1.0, layout, 8, 5)
    assert float(objective.deviation(maps)) > 0.1
    retract(maps[:-1], layout, exactly=True)
    assert float(objective.deviation(maps)) < 1e-20
    assert float(objective.deviation(2 * maps)) == pytest.approx(
        9 * 4 / 5
    )  # (4 − 1)² a direction; one of five is empty


def test_newton_and_schulz_come_to_the_polar_factor():
    layout = Layout((3, 3, 7))
    exact = drawn(13, 5)
    retract(exact, layout, exactly=True)
    moved = exact + 0.02 * drawn(13, 5, seed=1)
    wanted = moved.clone()
    retract(wanted, layout, exactly=True)
    retract(moved, layout)
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-10)
    tall = drawn(7, 5)
    torch.testing.assert_close(nearest_isometry(tall).T @ nearest_isometry(tall), torch.eye(5, dtype=torch.float64))


# ---- the same again


def test_chunks_change_nothing():
    truth = planted(images=300, noise=0.3)
    targets = unit(truth.targets)
    whole = Aligner.fit(truth.parts, targets)
    assert whole.metadata["alignment"]["epochs"] > 0
    for size in (300, 41):
        other = Aligner.fit_stream(Cut(truth.parts, targets, size))
        torch.testing.assert_close(other.maps, whole.maps, rtol=0, atol=1e-10)
        torch.testing.assert_close(other.bias, whole.bias, rtol=0, atol=1e-10)


def test_the_seed_decides_and_nothing_else_is_drawn():
    truth = planted(images=300, noise=0.3)
    targets = unit(truth.targets)
    state = torch.get_rng_state()
    one, again = (Aligner.fit(truth.parts, targets, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, again)
    assert torch.equal(one.fit_report.distances, again.fit_report.distances)
    assert not same(one, Aligner.fit(truth.parts, targets, seed=4))


def test_little_memory_reads_again_and_comes_to_as_good_an_end():
    truth, other = (planted(images=400, components=8, noise=0.3, draw=draw) for draw in range(2))
    whole = Aligner.fit(truth.parts, truth.targets)
    source = Cut(truth.parts, truth.targets, 100)
    small = Aligner.fit_stream(source, max_bytes=60_000)
    assert source.passes > 10  # windows of images, blocks of components
    one, two = (aligner.report(other.parts, other.targets) for aligner in (whole, small))
    assert two.cosine_distance < 1.1 * one.cosine_distance
    assert float(two.isometry.max()) < 0.02
    again = Aligner.fit_stream(Cut(truth.parts, truth.targets, 33), max_bytes=60_000)
    torch.testing.assert_close(again.maps, small.maps, rtol=0, atol=1e-9)


def test_with_little_memory_a_component_that_writes_nothing_is_no_hindrance():
    truth = planted(images=120, components=3)
    values = truth.parts.values.clone()
    values[1:] = 0
    parts = Decomposition(values, truth.parts.components, values.sum(0))
    aligner = Aligner.fit(parts, truth.targets, max_bytes=3000, epochs=1)
    assert not aligner.maps[1:].any()
    assert aligner.maps[0].any()


class Killed(BaseException):
    """What ends a process."""


@pytest.mark.parametrize("max_bytes", [1 << 30, 60_000], ids=["kept", "read again"])
@pytest.mark.parametrize("method", ["compalign", "orthogonal", "unconstrained"])
def test_a_fit_that_was_ended_goes_on_bit_for_bit(tmp_path, method, max_bytes):
    truth = planted(images=240, components=6, noise=0.5)
    targets = unit(truth.targets)
    options = {"method": method, "max_bytes": max_bytes, "epochs": 5, "patience": 5, "learning_rate": 1e-3}
    whole = Aligner.fit(truth.parts, targets, **options)
    told = []

    def end(progress):
        if progress.epoch not in told:  # the start is told whenever a better one is found
            told.append(progress.epoch)
        if progress.epoch in (1, 3):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            Aligner.fit(truth.parts, targets, checkpoint=tmp_path / "fit", progress=end, **options)
    resumed = Aligner.fit(truth.parts, targets, checkpoint=tmp_path / "fit", progress=end, **options)
    assert told == [0, 1, 2, 3, 4, 5]
    assert same(resumed, whole)
    assert resumed.metadata == whole.metadata
    finished = Aligner.fit(truth.parts, targets, checkpoint=tmp_path / "fit", progress=end, **options)
    assert told == [0, 1, 2, 3, 4, 5]
    assert same(finished, whole)


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    truth = planted(images=100, components=3)
    path = tmp_path / "fit"
    Aligner.fit(truth.parts, truth.targets, checkpoint=path, epochs=1)
    with pytest.raises(StoreError, match="another penalty"):
        Aligner.fit(truth.parts, truth.targets, checkpoint=path, epochs=1, penalty=2.0)
    with pytest.raises(StoreError, match="another held_out"):
        Aligner.fit(truth.parts, truth.targets, checkpoint=path, epochs=1, held_out=[1, 2])
    with pytest.raises(StoreError, match="are others"):
        Aligner.fit(truth.parts, truth.targets.flip(1), checkpoint=path, epochs=1)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match="damaged"):
        Aligner.fit(truth.parts, truth.targets, checkpoint=path, epochs=1)


# ---- reports


def test_a_report_says_what_can_be_said_by_hand():
    truth = planted(images=200, components=3, d_head=2)
    factors = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    layout = Layout((2, 2, 2))
    basis = torch.cat(list(truth.spans), 1)
    weights = torch.cat([f * s.T @ m for f, s, m in zip(factors, truth.spans, truth.maps, strict=True)])
    aligner = Aligner(truth.components, layout.ranks, basis, weights, drawn(32))
    report = aligner.report(truth.parts, truth.targets)
    mapped = truth.parts.map(aligner)
    np.testing.assert_allclose(
        report.distances, 1 - torch.cosine_similarity(mapped.total, truth.targets).numpy(), rtol=0, atol=1e-12
    )
    for shares, values in ((report.shares_before, truth.parts.values), (report.shares_after, mapped.values[:3])):
        variances = values.numpy().var(1).sum(1)
        np.testing.assert_allclose(shares, variances / variances.sum(), rtol=1e-10)
    # WWᵀ is I, 9 I and 0: the k that is nearest to all, in units of itself, is Σ k_i² / Σ k_i.
    assert report.scale == pytest.approx(82 / 10)
    np.testing.assert_allclose(report.isometry, abs(np.array([1, 9, 0]) / 8.2 - 1), rtol=1e-10)
    assert report.within == 0
    before, after = truth.parts.values.norm(dim=-1).numpy(), mapped.values[:3].norm(dim=-1).numpy()
    changed = ordered = 0
    for i in range(3):
        for j in range(3):
            clear = [abs(n[i] - n[j]) > 0.01 * np.maximum(n[i], n[j]) for n in (before, after)]
            ordered += clear[0].sum()
            changed += (clear[0] & clear[1] & ((before[i] > before[j]) != (after[i] > after[j]))).sum()
    assert report.across == pytest.approx(changed / ordered, abs=0.02)
    assert report.across > 0.1
    assert float(report.outside.max()) < 1e-12


def test_what_is_outside_of_a_span_is_told():
    truth = planted(images=300, components=3)
    capped = Aligner.fit(truth.parts, truth.targets, max_rank=4)
    assert capped.ranks == (4, 4, 4)
    inside = capped.basis[:, Layout(capped.ranks).slices[0]]
    report = capped.report(truth.parts, truth.targets)
    first = truth.parts.values[0]
    wanted = 1 - float((first @ inside).square().sum() / first.square().sum())
    assert float(report.outside[0]) == pytest.approx(wanted)
    assert wanted > 0.01


def test_within_a_component_norms_that_change_order_are_counted():
    values = torch.zeros(1, 300, 2, dtype=torch.float64)
    values[0, ::2, 0] = 1.0
    values[0, 1::2, 1] = 2.0
    parts = Decomposition(values, ("L0H0",), values[0])
    swap = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))  # lengths 1 and 2 become 4 and 2
    aligner = Aligner(("L0H0",), (2,), torch.eye(2, dtype=torch.float64), swap, torch.zeros(2, dtype=torch.float64))
    report = aligner.report(parts, torch.ones(300, 2, dtype=torch.float64))
    assert report.within == 1.0
    assert report.across == 0.0


# ---- files and provenance


def test_an_aligner_is_what_decompositions_take():
    truth = planted(images=120, components=3)
    aligner = Aligner.fit(truth.parts, truth.targets)
    assert isinstance(aligner, ComponentMaps)
    shuffled = truth.parts.select(labels=truth.parts.labels[::-1])
    mapped = replace(shuffled, complete=True).map(aligner)
    torch.testing.assert_close(mapped["L0H0"], truth.parts.map(aligner)["L0H0"])
    torch.testing.assert_close(
        aligner.report(replace(shuffled, complete=True), truth.targets).isometry, aligner.fit_report.isometry
    )


@pytest.mark.parametrize("method", ["compalign", "shared"])
def test_files_give_back_what_was_written(tmp_path, method):
    truth = planted(images=120, components=3)
    parts = replace(truth.parts, metadata={"model": "deit", "by": "head", "of": "representation"})
    aligner = Aligner.fit(parts, truth.targets, space="clip-a", method=method)
    aligner.save(tmp_path / "aligner")
    loaded = Aligner.load(tmp_path / "aligner", for_=parts, space="clip-a")
    assert same(loaded, aligner)
    assert loaded.metadata == aligner.metadata
    assert loaded.metadata["alignment"]["method"] == loaded.method == method
    assert loaded.components == aligner.components
    for f in dataclasses.fields(aligner.fit_report):
        one, other = getattr(aligner.fit_report, f.name), getattr(loaded.fit_report, f.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert repr(loaded) == repr(aligner)
    assert method in repr(loaded)
    assert "cosine distance" in repr(loaded.fit_report)


def test_another_model_cut_or_space_is_refused(tmp_path):
    truth = planted(images=120, components=3)
    said = {"model": "deit", "weights": "1f", "by": "head", "of": "representation"}
    parts = replace(truth.parts, metadata=said)
    Aligner.fit(parts, truth.targets, space="clip-a").save(tmp_path / "aligner")
    # Of somebody's tensors nothing is known; a decomposition that knows its model has to know its weights.
    assert Aligner.load(tmp_path / "aligner", for_=replace(parts, metadata={})).metadata["weights"] == "1f"
    unsaid = {name: value for name, value in said.items() if name != "weights"}
    with pytest.raises(InputError, match="weights='1f'; got one of a deit that does not say of which weights"):
        Aligner.load(tmp_path / "aligner", for_=replace(parts, metadata=unsaid))
    for name, other in (("model", "dino"), ("weights", "2e"), ("by", "layer"), ("of", "logits")):
        with pytest.raises(InputError, match=f"{name}='{said[name]}'.*{name}='{other}'"):
            Aligner.load(tmp_path / "aligner", for_=replace(parts, metadata=said | {name: other}))
    with pytest.raises(InputError, match=r"'2e'\. It was probably made for another model: .* in the same precision"):
        Aligner.load(tmp_path / "aligner", for_=replace(parts, metadata=said | {"weights": "2e"}))
    with pytest.raises(InputError, match=r"'clip-b'.*'clip-a'"):
        Aligner.load(tmp_path / "aligner", space="clip-b")
    with pytest.raises(InputError, match="'L0H2' is in only one"):
        Aligner.load(tmp_path / "aligner", for_=replace(parts.select(head=[0, 1]), complete=True))
    narrow = planted(images=5, d_rep=16, components=3)
    with pytest.raises(InputError, match="d_rep=16"):
        Aligner.load(tmp_path / "aligner", for_=narrow.parts)
    with pytest.raises(StoreError, match="no such file"):
        Aligner.load(tmp_path / "none")
    parts.save(tmp_path / "parts")
    with pytest.raises(StoreError, match="another kind"):
        Aligner.load(tmp_path / "parts")
    whole = (tmp_path / "aligner").read_bytes()
    (tmp_path / "aligner").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match="damaged"):
        Aligner.load(tmp_path / "aligner")


# ---- bad input


def test_what_cannot_be_aligned_is_refused():
    truth = planted(images=40, components=3)
    parts, targets = truth.parts, truth.targets
    broken = parts.values.clone()
    broken[1, 7, 2] = torch.nan
    zero, bad, alike = (targets.clone() for _ in range(3))
    zero[5] = 0
    bad[6, 0] = torch.inf
    alike[:] = targets[0]
    cases = [
        (replace(parts, values=broken), targets, "image 7 hold NaN"),
        (parts, zero, "image 5 is zero"),
        (parts, bad, "image 6 holds NaN or Inf"),
        (parts, alike, "all the same"),
        (parts, targets[:-1], "each of the 40 images"),
        (parts.select(head=0), targets, "complete decomposition"),
        (replace(parts, values=0 * parts.values, total=None), targets, "all of them are zero"),
        (parts.images([0]), targets[:1], "Fit on more images"),
        (parts.images([]), targets[:0], "Fit on more images"),
    ]
    for values, wanted, message in cases:
        with as_users_run_it(), pytest.raises(InputError, match=message):
            Aligner.fit(values, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "comp_align"}, "did you mean 'compalign'"),
        ({"penalty": -1.0}, "penalty= of at least 0"),
        ({"penalty": float("nan")}, "penalty="),
        ({"held_out": 0.0}, "held_out= between 0 and 1"),
        ({"held_out": [41]}, "numbers of images from 0 to 39"),
        ({"held_out": list(range(40))}, "40 would be held out"),
        ({"held_out": []}, "held_out="),
        ({"epochs": -1}, "epochs="),
        ({"batch_size": 0}, "batch_size="),
        ({"learning_rate": 0.0}, "learning_rate= above 0"),
        ({"learning_rate": 1e38}, "learning_rate= above 0 and at most 1"),
        ({"learning_rate": float("nan")}, "learning_rate= above 0"),
        ({"penalty": 1e30}, "penalty= of at least 0 and at most 1e6"),
        ({"seed": 2**64}, "seed= a whole number"),
        ({"patience": 0}, "patience="),
        ({"rank_tolerance": 1.0}, "rank_tolerance="),
        ({"max_rank": 0}, "max_rank="),
        ({"max_bytes": 0}, "max_bytes="),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    truth = planted(images=40, components=3)
    with pytest.raises(InputError, match=message):
        Aligner.fit(truth.parts, truth.targets, **options)


def test_a_source_that_does_not_say_what_it_gives_is_refused():
    truth = planted(images=40, components=3)
    short, long = (Cut(truth.parts, truth.targets, 10) for _ in range(2))
    short.count, long.count = 41, 39
    other = Cut(truth.parts, truth.targets, 10)
    other.components = (Component("embed"),)
    with pytest.raises(InputError, match=r"41 images in all.*only 40"):
        Aligner.fit_stream(short)
    with pytest.raises(InputError, match=r"39 images in all.*at least 40"):
        Aligner.fit_stream(long)
    with pytest.raises(InputError, match="1 components"):
        Aligner.fit_stream(other)


def test_images_held_out_are_those_that_were_asked_for():
    numbers = [3, 5, 8]
    mask = torch.zeros(40, dtype=torch.bool)
    mask[numbers] = True
    for asked in (numbers, torch.tensor(numbers), mask):
        assert torch.equal(held_out_mask(40, asked, 0), mask)
    assert int(held_out_mask(40, 0.25, 0).sum()) == 10
    assert not torch.equal(held_out_mask(40, 0.25, 0), held_out_mask(40, 0.25, 1))
    assert int(held_out_mask(10**6, 0.1, 0).sum()) == MOST_HELD_OUT
    truth = planted(images=40, components=3)
    found = Aligner.fit(truth.parts, truth.targets, held_out=mask)
    assert len(found.fit_report.distances) == 3


def test_tensors_that_want_gradients_are_taken_without():
    truth = planted(images=60, components=3)
    parts = replace(truth.parts, values=truth.parts.values.requires_grad_())
    aligner = Aligner.fit(parts, unit(truth.targets).requires_grad_(), epochs=1)
    assert not aligner.maps.requires_grad
    assert not aligner.fit_report.distances.requires_grad
