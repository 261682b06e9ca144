"""Laws of what is done to a decomposition: projecting, mapping, ablating, spreading constants."""

import dataclasses

import pytest
import torch
from labelled_samples import COMPONENTS, COVERAGE, KINDS, as_users_run_it, assert_same, sample

from vitdecomp_lens.errors import InputError, UnknownNameError

# ---- directions and maps


def test_project_then_sum_equals_sum_then_project():
    parts = sample(coverage=COVERAGE, metadata={"model": "tiny"})
    directions = torch.randn(4, 5, dtype=torch.float64)
    scores = parts.project(directions, names=["a", "b", "c", "d"])
    torch.testing.assert_close(scores.sum(), parts.sum() @ directions.T, atol=1e-13, rtol=0)
    torch.testing.assert_close(scores["L1H2"], parts["L1H2"] @ directions.T, atol=1e-13, rtol=0)
    assert torch.equal(scores.total, parts.total @ directions.T)
    assert scores.check_gap().complete
    assert (scores.coverage, scores.metadata, scores.directions) == (COVERAGE, {"model": "tiny"}, tuple("abcd"))


def test_directions_follow_the_dtype_of_the_values():
    assert sample(dtype=torch.float32).project(torch.ones(1, 5, dtype=torch.float64)).values.dtype == torch.float32


def test_project_then_group_equals_group_then_project():
    parts, directions = sample(), torch.randn(2, 5, dtype=torch.float64)
    one, other = parts.project(directions).group(by="layer"), parts.group(by="layer").project(directions)
    assert one.labels == other.labels
    torch.testing.assert_close(one.values, other.values, atol=1e-13, rtol=0)


@pytest.mark.parametrize("shape", [(4, 6), (0, 5)])
def test_directions_of_another_space_are_refused(shape):
    with pytest.raises(InputError) as caught:
        sample().project(torch.ones(shape, dtype=torch.float64))
    assert str(caught.value) == (
        f'Expected directions as Float[Tensor, "direction d_rep"] with rows of d_rep=5; got shape {shape}. '
        f"For one direction, project(direction[None]); for directions of another space, map(aligner) first."
    )


@as_users_run_it()
def test_a_single_direction_is_refused_with_the_repaired_call():
    with pytest.raises(InputError, match=r"got shape \(5,\). For one direction, project\(direction\[None\]\)"):
        sample().project(torch.ones(5, dtype=torch.float64))


MATRIX = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LAYER = torch.nn.Linear(5, 3, bias=False).double()


@pytest.mark.parametrize(
    ("linear_map", "matrix"),
    [(MATRIX, MATRIX), (lambda x: x @ MATRIX, MATRIX), (LAYER, LAYER.weight.T)],
    ids=["matrix", "function", "module"],
)
def test_a_linear_map_takes_every_component_and_the_total(linear_map, matrix):
    parts = sample()
    mapped = parts.map(linear_map)
    torch.testing.assert_close(mapped.values, parts.values @ matrix, atol=1e-14, rtol=0)
    torch.testing.assert_close(mapped.total, parts.total @ matrix, atol=1e-14, rtol=0)
    assert mapped.labels == parts.labels
    mapped.check_gap()
    torch.testing.assert_close(
        parts.select(kind="head").map(linear_map).rest, parts.select(kind="head").rest @ matrix, atol=1e-13, rtol=0
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x + 0.5, r"^Expected a linear map; this one takes zero to values up to 5.0e-01, and would add them"),
        (torch.tanh, r"^Expected a linear map; this one takes -2 x to something else than -2 times"),
        (torch.relu, r"^Expected a linear map; this one takes -2 x"),
        (torch.nn.functional.normalize, r"^Expected a linear map; this one takes -2 x"),
    ],
)
def test_a_function_that_is_not_linear_is_refused(function, message):
    with pytest.raises(InputError, match=message):
        sample().map(function)


def test_a_matrix_of_another_width_is_refused():
    with pytest.raises(InputError) as caught:
        sample().map(torch.ones(4, 3, dtype=torch.float64))
    assert str(caught.value) == "Expected maps from d_rep=5 (axis 0 of 2); got maps of shape (4, 3)."


@dataclasses.dataclass
class Maps:
    """An aligner, as far as a decomposition knows it."""

    components: tuple
    maps: torch.Tensor
    bias: torch.Tensor


def aligner(components=COMPONENTS, *, d_rep=5):
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(len(COMPONENTS), d_rep, 3, generator=generator, dtype=torch.float64)
    rows = [COMPONENTS.index(c) for c in components]
    return Maps(tuple(components), maps[rows], torch.arange(3, dtype=torch.float64))


def test_an_aligner_maps_each_component_by_its_own_map_and_its_bias_is_a_component():
    parts, its = sample(), aligner()
    mapped = parts.map(its)
    assert mapped.labels == (*parts.labels, "aligner.bias")
    assert mapped.components[-1].kind == "constant"
    for row, label in enumerate(parts.labels):
        torch.testing.assert_close(mapped[label], parts[label] @ its.maps[row], atol=1e-14, rtol=0)
    assert torch.equal(mapped["aligner.bias"], its.bias.expand(3, 3))
    expected = sum(parts[label] @ its.maps[row] for row, label in enumerate(parts.labels)) + its.bias
    torch.testing.assert_close(mapped.total, expected, atol=1e-13, rtol=0)
    mapped.check_gap()


def test_an_aligner_is_matched_by_labels_and_not_by_order():
    parts = sample()
    assert_same(parts.map(aligner(COMPONENTS[::-1])), parts.map(aligner()))


def test_an_aligner_made_for_other_components_is_refused():
    with pytest.raises(InputError) as caught:
        sample().map(aligner(COMPONENTS[:-1]))
    assert str(caught.value) == (
        "Expected an aligner made for these components; it has 13, the decomposition 14, and 'norm.bias' is in only "
        "one of them. Fit it on the same model and cut, or group(by=...) to its."
    )
    with pytest.raises(
        InputError, match=r"^Expected maps from d_rep=5 \(axis 1 of 3\); got maps of shape \(14, 6, 3\)"
    ):
        sample().map(aligner(d_rep=6))


def test_an_aligner_refuses_what_is_incomplete():
    with pytest.raises(InputError) as caught:
        sample().select(kind="head").map(aligner())
    assert str(caught.value) == (
        "Expected a complete decomposition, because an aligner's bias belongs to the sum of all components; this one "
        "is incomplete. Map first, then select or ablate."
    )


# ---- ablating and spreading


@pytest.mark.parametrize("chosen", [{"labels": ["L1H2", "mlp.1"]}, {"kind": "head", "layer": 1}, {"labels": "L0N2"}])
def test_after_ablating_to_zero_the_rest_is_what_was_removed(chosen):
    parts = sample()
    ablated, removed = parts.ablate(**chosen), parts.select(**chosen)
    torch.testing.assert_close(ablated.rest, removed.sum(), atol=1e-14, rtol=0)
    assert ablated.labels == parts.labels
    assert torch.equal(ablated.total, parts.total)
    assert not ablated.complete
    for label in parts:
        expected = torch.zeros_like(parts[label]) if label in removed else parts[label]
        assert torch.equal(ablated[label], expected)


def test_ablating_does_not_touch_the_original():
    parts = sample()
    before = parts.values.clone()
    parts.ablate(kind="head")
    assert torch.equal(parts.values, before)


def test_mean_ablation_writes_the_mean_over_the_reference():
    parts, reference = sample(), sample(batch=7, seed=3)
    ablated = parts.ablate(["L1H2", "embed"], how="mean", reference=reference)
    for label in ("L1H2", "embed"):
        torch.testing.assert_close(ablated[label], reference[label].mean(0).expand(3, 5), atol=1e-14, rtol=0)
    assert torch.equal(ablated["L0H0"], parts["L0H0"])
    taken = parts.select(labels=["L1H2", "embed"]).sum() - ablated.select(labels=["L1H2", "embed"]).sum()
    torch.testing.assert_close(ablated.rest, taken, atol=1e-13, rtol=0)


def test_the_reference_is_matched_by_labels_and_not_by_order():
    parts, reference = sample(), sample(batch=7, seed=3)
    shuffled = reference.select(labels=["embed", "L1H2", "L0H0"])
    one = parts.ablate(["L1H2", "L0H0"], how="mean", reference=reference)
    assert_same(one, parts.ablate(["L1H2", "L0H0"], how="mean", reference=shuffled))


def test_mean_ablation_by_a_constant_component_changes_nothing():
    parts = sample()
    constant = parts.values[:, :1].expand(-1, 3, -1)
    constant = dataclasses.replace(parts, values=constant, total=constant.sum(0))
    ablated = constant.ablate("norm.bias", how="mean", reference=constant)
    torch.testing.assert_close(ablated.values, constant.values, atol=1e-15, rtol=0)


def test_resampling_takes_whole_images_of_the_reference_and_follows_its_generator():
    parts, reference = sample(batch=20), sample(batch=7, seed=3)
    chosen = ["L1H2", "mlp.1"]

    def resampled(seed):
        generator = torch.Generator().manual_seed(seed)
        return parts.ablate(chosen, how="resample", reference=reference, generator=generator)

    ablated = resampled(0)
    rows = [[torch.equal(ablated["L1H2"][i], row) for row in reference["L1H2"]].index(True) for i in range(20)]
    assert len(set(rows)) > 2
    assert torch.equal(ablated["mlp.1"], reference["mlp.1"][rows])
    assert torch.equal(ablated["embed"], parts["embed"])
    assert_same(ablated, resampled(0))
    assert not torch.equal(ablated.values, resampled(1).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, 'Expected the components to ablate, as in ablate("L3H7") or ablate(kind="head").'),
        (
            {"labels": "embed", "how": "mean"},
            "how='mean' takes values from other images: expected reference=, a Decomposition of at least one image; "
            "got none. Or use how='zero'.",
        ),
        (
            {"labels": "embed", "how": "resample", "reference": sample(batch=0)},
            "how='resample' takes values from other images: expected reference=, a Decomposition of at least one "
            "image; got one of no images. Or use how='zero'.",
        ),
        (
            {"labels": "embed", "how": "resample", "reference": sample()},
            "how='resample' draws images: expected generator=, as torch.Generator().manual_seed(0).",
        ),
        (
            {"labels": "embed", "how": "mean", "reference": sample(width=6)},
            "Expected a reference of the same space, d_rep=5; got d_rep=6. Decompose the reference images with the "
            "same model.",
        ),
        ({"labels": "embed", "how": "off"}, "Expected how='zero', 'mean' or 'resample'; got how='off'."),
    ],
)
@as_users_run_it()
def test_an_ablation_says_what_it_needs(options, message):
    with pytest.raises(InputError) as caught:
        sample().ablate(**options)
    assert str(caught.value) == message


def test_a_reference_without_the_component_is_refused():
    with pytest.raises(UnknownNameError, match=r"^There is no component 'L1H2'; did you mean"):
        sample().ablate("L1H2", how="mean", reference=sample().select(layer=0))


@KINDS
def test_spreading_constants_keeps_the_sum_and_gives_every_other_component_the_same(kind):
    parts = sample(kind=kind)
    spread = parts.spread_constants()
    assert spread.labels == tuple(c.label for c in COMPONENTS if c.kind != "constant")
    assert spread.complete
    spread.check_gap()
    share = parts.select(kind="constant").sum() / 12
    for label in spread:
        torch.testing.assert_close(spread[label] - parts[label], share, atol=1e-14, rtol=0)


def test_constants_alone_cannot_be_spread():
    with pytest.raises(
        InputError, match=r"^Expected components to spread the constants over; there are only constants"
    ):
        sample().select(kind="constant").spread_constants()
