"""Streamed moments: against NumPy on everything at once, in any order, and the spans that they show."""

import numpy as np
import pytest
import torch

from vitdecomp_lens.clip.coordinates import Coordinates
from vitdecomp_lens.clip.moments import JointMoments, Layout, Moments, Spans, spans_of
from vitdecomp_lens.clip.sources import Paired, Summed, held_out_mask, some_of
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.testbed.planted import planted_maps

EPS = torch.finfo(torch.float64).eps


def drawn(*size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def summed(values, sizes):
    moments = Moments(len(values), values.shape[2])
    for piece in values.split(sizes, dim=1):
        moments.add(piece)
    return moments


@pytest.mark.parametrize("sizes", [50, 7, 1, [0, 13, 0, 37]])
def test_moments_are_those_of_all_images_at_once(sizes):
    values = 3 + drawn(2, 50, 4)
    moments = summed(values, sizes)
    for row in range(2):
        covariance = np.cov(values[row].numpy().T, bias=True)
        np.testing.assert_allclose(moments.scatter[row] / moments.count, covariance, rtol=0, atol=1e-13)
    np.testing.assert_allclose(moments.mean, values.numpy().mean(1), rtol=0, atol=1e-14)


def test_moments_merge_in_any_order():
    values = 100 + drawn(2, 60, 4)
    whole = summed(values, 60)
    for order in ([0, 1, 2], [2, 0, 1]):
        pieces = values.split(20, dim=1)
        merged = Moments(2, 4)
        for number in order:
            merged.merge(summed(pieces[number], 9))
        assert merged.count == 60
        torch.testing.assert_close(merged.mean, whole.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(merged.scatter, whole.scatter, rtol=0, atol=1e-10)


def test_a_large_mean_does_not_hide_what_varies_in_single_precision():
    values = drawn(1, 2000, 5)
    single = summed((values + 1000).float(), 500)
    covariance = np.cov(values[0].numpy().T, bias=True)
    # Values about 1,000 are rounded to 6e-5; products of what is not centred would be off by a tenth.
    np.testing.assert_allclose(single.scatter[0] / 2000, covariance, rtol=0, atol=1e-3)


def test_spans_are_those_that_were_planted():
    planted = planted_maps(images=300, d_rep=20, d_clip=16, components=3, d_head=5, dtype=torch.float64)
    bases = summed(planted.parts.values, 64).bases(rounding=EPS)
    for basis, span in zip(bases, planted.spans, strict=True):
        assert basis.shape == (20, 5)
        torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
        torch.testing.assert_close(basis @ basis.T, span @ span.T)


def test_a_constant_spans_its_direction_and_what_is_zero_spans_nothing():
    values = torch.zeros(3, 40, 6, dtype=torch.float64)
    values[0] = drawn(6)
    values[1] = drawn(6, seed=1) * (1 + drawn(40, 1).abs())
    bases = summed(values, 16).bases(rounding=EPS)
    assert [basis.shape[1] for basis in bases] == [1, 1, 0]
    for basis, values_ in zip(bases[:2], values, strict=False):
        torch.testing.assert_close((values_ @ basis).abs()[:, 0], values_.norm(dim=1))


def test_the_mean_belongs_to_a_span_and_small_directions_do_not():
    directions = torch.linalg.qr(drawn(6, 6)).Q
    codes = drawn(500, 3) * torch.tensor([1.0, 0.5, 1e-5])
    values = (codes @ directions[:3] + 2 * directions[3])[None]
    moments = summed(values, 100)
    (basis,) = moments.bases(rounding=EPS)
    wanted = directions[[0, 1, 3]]
    torch.testing.assert_close(basis @ basis.T, wanted.T @ wanted, rtol=0, atol=1e-4)
    (finer,) = moments.bases(rounding=EPS, tolerance=1e-7)
    assert finer.shape[1] == 4
    (capped,) = moments.bases(rounding=EPS, max_rank=1)
    assert abs(float(capped[:, 0] @ directions[0])) > 0.99


def test_equal_ranks_stand_together():
    layout = Layout((3, 1, 0, 3, 2))
    assert layout.width == 9
    assert [rank for rank, *_ in layout.stacks] == [1, 2, 3]
    covered = sorted(column for columns in layout.slices for column in range(columns.start, columns.stop))
    assert covered == list(range(9))
    rank, count, columns = layout.stacks[-1]
    assert (rank, count, columns.stop - columns.start) == (3, 2, 6)
    assert all(sum(layout.ranks[row] for row in block) <= 4 for block in layout.blocks(4))
    assert sorted(row for block in layout.blocks(4) for row in block) == list(range(5))


def test_coordinates_are_inner_products_with_each_components_own_basis():
    bases = [torch.linalg.qr(drawn(6, rank, seed=rank)).Q for rank in (3, 1, 2)]
    values = drawn(3, 4, 6)
    spans = Spans.of(bases, torch.float64)
    found = spans.project(values)
    for vectors, basis, columns in zip(values, bases, spans.layout.slices, strict=True):
        torch.testing.assert_close(found[:, columns], vectors @ basis)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_joint_moments_do_not_depend_on_their_shift(shift):
    rows, targets = 5 + drawn(40, 6), drawn(40, 3, seed=1)
    whole, other = (JointMoments(6, 3, torch.full((6,), shift, dtype=torch.float64)) for _ in range(2))
    whole.add(rows[:9], targets[:9])
    other.add(rows[9:], targets[9:])
    whole.merge(other)
    second, cross = whole.finished()
    np.testing.assert_allclose(second, rows.numpy().T @ rows.numpy() / 40, rtol=1e-12)
    np.testing.assert_allclose(cross, rows.numpy().T @ targets.numpy() / 40, rtol=0, atol=1e-13)


def test_joint_moments_of_different_shifts_do_not_merge():
    one, other = (JointMoments(2, 1, torch.full((2,), shift)) for shift in (0.0, 1.0))
    with pytest.raises(InputError, match="same shift"):
        one.merge(other)


def source(*, images=120, dtype=torch.float64):
    planted = planted_maps(images=images, d_rep=10, d_clip=8, components=5, d_head=3, dtype=dtype)
    return Paired(planted.parts, planted.targets)


def test_spans_are_the_same_group_by_group():
    mask = held_out_mask(120, 0.1, 0)
    options = {"tolerance": 1e-3, "max_rank": None, "seed": 0}
    at_once = spans_of(source(), mask, max_bytes=1 << 20, **options)
    by_groups = spans_of(source(), mask, max_bytes=2 * 8 * 10**2, **options)
    assert at_once.layout == by_groups.layout
    assert torch.equal(at_once.basis, by_groups.basis)


def test_what_is_held_out_has_no_part_in_spans():
    values = torch.zeros(1, 20, 4, dtype=torch.float64)
    values[0, :, 0] = drawn(20)
    values[0, 3, 1] = 10.0
    parts = Decomposition(values, ("L0H0",), values[0])
    mask = held_out_mask(20, [3], 0)
    spans = spans_of(Paired(parts, drawn(20, 2)), mask, tolerance=1e-3, max_rank=None, max_bytes=1 << 20, seed=0)
    assert spans.layout.ranks == (1,)


class Chunks(Paired):
    """Chunks of a size of its own; how many were read is counted."""

    size, read = 3000, 0

    def chunks(self):
        for start in range(0, self.count, self.size):
            type(self).read += 1
            yield self.parts.values[:, start : start + self.size], self.targets[start : start + self.size]


def sorted_by_class(images=3000):
    """Contributions that lie in other directions from the middle on."""
    values = torch.zeros(1, images, 6, dtype=torch.float64)
    values[0, : images // 2, :2] = drawn(images // 2, 2)
    values[0, images // 2 :, 2:4] = 3 + drawn(images - images // 2, 2, seed=1)
    return Decomposition(values, ("L0H0",), values[0])


@pytest.mark.parametrize("size", [3000, 700, 64])
def test_spans_do_not_depend_on_the_order_of_classes(size):
    source = Chunks(sorted_by_class(), drawn(3000, 2))
    mask = held_out_mask(3000, 0.1, 0)
    Chunks.size, Chunks.read = size, 0
    found = spans_of(source, mask, tolerance=1e-3, max_rank=None, max_bytes=1 << 20, seed=2)
    assert found.layout.ranks == (4,)
    assert not found.basis[4:].any()
    chosen = some_of(~mask, 1024, 2)
    assert int(chosen.sum()) == 1024
    assert not bool((chosen & mask).any())
    assert Chunks.read == -(-(int(torch.nonzero(chosen).max()) + 1) // size)  # none behind the last that is chosen


def test_what_sees_only_some_images_sees_some_of_each_class():
    values = torch.zeros(1, 9000, 3, dtype=torch.float32)
    values[0] = drawn(9000, 3, dtype=torch.float32)
    values[0, 4500:] *= 10
    targets = drawn(9000, 2, seed=1, dtype=torch.float32)
    targets[4500:] *= 3
    source = Paired(Decomposition(values, ("L0H0",), values[0]), targets)
    mask = held_out_mask(9000, 0.1, 0)
    spans = spans_of(source, mask, tolerance=1e-3, max_rank=None, max_bytes=1 << 20, seed=0)
    for max_bytes in (1 << 30, 30_000):
        found = Coordinates(source, spans, mask, max_bytes=max_bytes, seed=0)
        assert found.unit == pytest.approx(float(values.square().sum(2).mean().sqrt()), rel=0.05)
        assert found.mean_norm == pytest.approx(float(targets.norm(dim=1).mean()), rel=0.05)
        assert len(found.sample) == 4096
        fitted = torch.cat([table.units[numbers] for table, numbers in found.windows()])
        torch.testing.assert_close(fitted, targets[~mask] / targets[~mask].norm(dim=1, keepdim=True))


@pytest.mark.parametrize("method", ["each", "summed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_rounding_adds_to_half_precision_is_no_direction(dtype, method):
    planted = planted_maps(images=1500, d_rep=24, d_clip=16, components=3, d_head=5, dtype=torch.float64)
    values = planted.parts.values
    if method == "summed":
        values = values[:1]
    values = values + 10 * planted.spans[: len(values), None, :, 0]  # what is rounded is large beside what varies
    source = Paired(Decomposition(values.to(dtype), planted.components[: len(values)], None), planted.targets.to(dtype))
    mask = held_out_mask(1500, 0.1, 0)
    read = Summed(source) if method == "summed" else source
    spans = spans_of(read, mask, tolerance=1e-3, max_rank=None, max_bytes=1 << 20, seed=0)
    assert spans.layout.ranks == (5,) * len(values)
    assert spans.basis.dtype == torch.float32
    precision = torch.finfo(dtype).eps
    for columns, span in zip(spans.layout.slices, planted.spans, strict=False):
        found = spans.basis[:, columns].double()
        assert float((found @ found.T - span @ span.T).norm()) < 10 * precision


def test_images_in_another_order_are_others():
    parts, targets = source().parts, source().targets
    mask = held_out_mask(120, 0.2, 0)
    spans = spans_of(source(), mask, tolerance=1e-3, max_rank=None, max_bytes=1 << 20, seed=0)

    def digest(order):
        moved = Paired(parts.images(order), targets[order])
        return Coordinates(moved, spans, mask, max_bytes=1 << 20, seed=0).digest

    as_it_is = list(range(120))
    swapped = list(as_it_is)
    one, other = torch.nonzero(~mask)[:2, 0].tolist()
    swapped[one], swapped[other] = other, one
    assert digest(as_it_is) == digest(as_it_is)
    same = [np.isclose(a, b, rtol=1e-5, atol=0) for a, b in zip(digest(as_it_is), digest(swapped), strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("window", [1, 17, 50])
def test_windows_hold_all_fitted_images_in_order_whether_kept_or_read_again(window):
    mask = held_out_mask(120, 0.2, 3)
    spans = spans_of(source(), mask, tolerance=1e-3, max_rank=None, max_bytes=1 << 20, seed=0)
    kept = Coordinates(source(), spans, mask, max_bytes=1 << 20, seed=0)
    again = Coordinates(source(), spans, mask, max_bytes=window * 8 * (16 + 8), seed=0)
    assert again.unit == kept.unit
    assert kept.kept
    assert not again.kept
    tables = [table.some(numbers) for table, numbers in again.windows()]
    assert [len(table) for table in tables[:-1]] == [window] * (len(tables) - 1)
    ((every, fitted),) = kept.windows()
    whole = every.some(fitted)
    torch.testing.assert_close(torch.cat([table.rows for table in tables]), whole.rows)
    torch.testing.assert_close(torch.cat([table.units for table in tables]), whole.units)
    targets = source().targets
    torch.testing.assert_close(whole.units * whole.norms[:, None], targets[~mask])
    torch.testing.assert_close(kept.held.units * kept.held.norms[:, None], targets[mask])


def test_bases_keep_no_more_than_themselves():
    moments = Moments(3, 40)
    moments.add(
        torch.randn(3, 100, 4, generator=torch.Generator().manual_seed(0)).double() @ torch.randn(4, 40).double()
    )
    assert [basis.untyped_storage().nbytes() for basis in moments.bases(rounding=1e-15)] == [8 * 40 * 4] * 3
