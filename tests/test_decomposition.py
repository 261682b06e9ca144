"""Laws of labelled values: what they sum to, and what selecting and grouping keep."""

import dataclasses
import math
import re

import pytest
import torch
from labelled_samples import COMPONENTS, COVERAGE, KINDS, sample

from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import GapError, InputError, UnknownNameError

# ---- the sum, the gap, the rest


@KINDS
def test_contributions_sum_to_the_total(kind):
    parts = sample(kind=kind)
    assert parts.gap.shape == (3,)
    assert parts.gap.max() < 1e-14
    assert parts.check_gap() is parts
    assert torch.equal(parts.sum(), parts.values.sum(0))


@KINDS
def test_the_gap_is_the_largest_error_over_the_largest_value_of_each_image(kind):
    total = torch.tensor([[4.0, -8.0], [1.0, 1.0]], dtype=torch.float64)
    values = (total + torch.tensor([[0.0, 2.0], [-0.5, 0.25]])).reshape(1, 2, 2)
    parts = kind(values=values, components=("embed",), total=total)
    assert parts.gap.tolist() == [0.25, 0.5]
    assert parts.rest.tolist() == [[0.0, -2.0], [0.5, -0.25]]


def test_a_total_of_zero_has_no_gap_if_the_sum_is_zero_and_an_infinite_one_if_not():
    values = torch.tensor([[[1.0, 2.0], [1.0, 2.0]], [[-1.0, -2.0], [-1.0, -1.0]]])
    parts = Decomposition(values, ("embed", "mlp.0"), torch.zeros(2, 2))
    assert parts.gap.tolist() == [0.0, math.inf]
    with pytest.raises(GapError, match=r"image 1 .* gap inf, worst at d_rep 1"):
        parts.check_gap()


def test_half_precision_is_summed_in_float32():
    ones = torch.ones(257, 1, 1, dtype=torch.bfloat16)  # bfloat16 has no 257, only 256 and 258
    parts = Decomposition(ones, tuple(f"L0N{i}" for i in range(257)), torch.full((1, 1), 257.0))
    assert parts.gap.item() == 0.0
    assert parts.gap.dtype == torch.float32
    assert parts.rest.item() == 0.0
    assert parts.sum().dtype == parts.group(by="layer").values.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "error", "fails"),
    [
        (torch.float64, 3e-11, False),
        (torch.float64, 3e-10, True),
        (torch.float32, 3e-6, False),
        (torch.float32, 3e-5, True),
        (torch.float16, 0.5, False),
        (torch.bfloat16, 0.5, False),
    ],
)
def test_the_default_tolerance_follows_the_dtype(dtype, error, fails):
    values = torch.tensor([[[1.0]], [[error]]], dtype=dtype)
    parts = Decomposition(values, ("embed", "mlp.0"), torch.ones(1, 1, dtype=dtype))
    assert parts.gap.item() == pytest.approx(error, rel=0.1)
    if fails:
        with pytest.raises(GapError):
            parts.check_gap()
    else:
        assert parts.check_gap() is parts
    with pytest.raises(GapError):
        parts.check_gap(tolerance=error / 2)


def test_a_gap_that_is_not_a_number_fails():
    with pytest.raises(GapError, match=r"image 0 .* gap nan"):
        Decomposition(torch.full((1, 1, 2), math.nan), ("embed",), torch.ones(1, 2)).check_gap()


def test_the_gap_error_names_the_worst_image_the_place_and_the_tolerance():
    total = torch.ones(3, 4, dtype=torch.float64)
    values = total.clone()[None]
    values[0, 1, 2] += 1e-3
    values[0, 2, 0] += 2e-2
    with pytest.raises(GapError) as caught:
        Decomposition(values, ("embed",), total).check_gap()
    assert str(caught.value) == (
        "The components of image 2 sum to something else than what the model computed: gap 2.0e-02, worst at d_rep 0; "
        "allowed is 1.0e-10 (torch.float64). Look at .coverage for where walks stopped, or allow more with "
        "check_gap(tolerance=...)."
    )


@KINDS
def test_without_a_total_or_a_component_there_is_no_gap_and_nothing_to_check(kind):
    parts = sample(kind=kind)
    without_total = dataclasses.replace(parts, total=None)
    assert without_total.gap is None
    assert without_total.rest is None
    with pytest.raises(InputError, match="a total is missing"):
        without_total.check_gap()
    selected = parts.select(kind="head")
    assert selected.gap is None
    with pytest.raises(InputError, match="a component is missing"):
        selected.check_gap()


def test_values_that_need_gradients_have_a_gap_and_keep_their_gradients():
    parts = sample()
    values = parts.values.clone().requires_grad_()
    live = dataclasses.replace(parts, values=values)
    assert live.check_gap().gap.requires_grad is False
    live.select(kind="head").project(torch.ones(1, 5, dtype=torch.float64)).values.sum().backward()
    heads = torch.tensor([c.kind == "head" for c in COMPONENTS])
    assert torch.equal(values.grad, heads[:, None, None].expand_as(values).double())


# ---- labels, selecting


@KINDS
def test_labels_find_their_row(kind):
    parts = sample(kind=kind)
    assert len(parts) == len(COMPONENTS) == len(parts.labels)
    assert list(parts) == list(parts.labels)
    assert "L1H2" in parts
    assert "L9H2" not in parts
    for row, label in enumerate(parts.labels):
        assert torch.equal(parts[label], parts.values[row])


def test_labels_are_read_as_components():
    parts = Decomposition(torch.ones(3, 1, 2), ("L0H1", "mlp.3", "norm.bias"))
    assert parts.components == (
        Component("head", 0, 1),
        Component("mlp", 3),
        Component("constant", name="norm.bias"),
    )


def test_an_unknown_label_comes_with_near_matches():
    with pytest.raises(UnknownNameError) as caught:
        sample()["L1H9"]
    assert re.fullmatch(r"There is no component 'L1H9'; did you mean '.*L1H\d.*'\?", str(caught.value))


@pytest.mark.parametrize(
    ("criteria", "labels"),
    [
        ({"kind": "head", "layer": 1}, ("L1H0", "L1H1", "L1H2")),
        ({"kind": "head", "head": {0, 2}, "layer": range(1)}, ("L0H0", "L0H2")),
        ({"kind": ("embed", "mlp")}, ("embed", "mlp.1")),
        ({"neuron": [3, 1]}, ("L0N1", "L0N3")),
        ({"name": "norm.bias"}, ("norm.bias",)),
        ({"layer": 0, "head": 0}, ("L0H0",)),
        ({"labels": ["mlp.1", "L0H2", "embed"]}, ("mlp.1", "L0H2", "embed")),
        ({"labels": "embed"}, ("embed",)),
        ({"labels": ["mlp.1", "L0H2"], "kind": "head"}, ("L0H2",)),
    ],
)
@KINDS
def test_select_keeps_the_total_and_has_a_rest(kind, criteria, labels):
    parts = sample(kind=kind)
    selected = parts.select(**criteria)
    assert selected.labels == labels
    assert not selected.complete
    assert torch.equal(selected.total, parts.total)
    for label in labels:
        assert torch.equal(selected[label], parts[label])
    others = [label for label in parts if label not in labels]
    torch.testing.assert_close(selected.rest, parts.select(labels=others).sum(), atol=1e-14, rtol=0)


@KINDS
def test_selecting_everything_stays_complete_in_any_order(kind):
    parts = sample(kind=kind)
    backwards = parts.select(labels=parts.labels[::-1])
    assert backwards.labels == parts.labels[::-1]
    assert backwards.complete
    backwards.check_gap()


def test_selecting_nothing_says_what_there_is():
    with pytest.raises(UnknownNameError) as caught:
        sample().select(kind="head", layer=range(5, 7))
    assert str(caught.value) == (
        "No component has kind='head', layer=range(5, 7); there are 1 embed, 6 head (layers 0, 1), "
        "4 neuron (layer 0), 1 mlp (layer 1), 2 constant (layer 1)."
    )
    with pytest.raises(UnknownNameError, match=r"^No component has labels=\[\]; there are"):
        sample().select(labels=[])


@KINDS
def test_selecting_from_what_is_incomplete_never_makes_it_complete(kind):
    some = sample(kind=kind).select(kind="head")
    assert not some.select(labels=some.labels).complete


# ---- grouping


@pytest.mark.parametrize("by", ["layer", "kind"])
@KINDS
def test_coarse_is_the_sum_of_fine(kind, by):
    parts = sample(kind=kind, coverage=COVERAGE)
    coarse = parts.group(by=by)
    torch.testing.assert_close(coarse.sum(), parts.sum(), atol=1e-14, rtol=0)
    assert coarse.complete
    assert coarse.coverage == COVERAGE
    assert torch.equal(coarse.total, parts.total)
    coarse.check_gap()


def test_layers_sum_their_heads_and_their_neurons_each_to_its_own():
    parts = sample()
    layers = parts.group(by="layer")
    assert layers.labels == ("embed", "attn.0", "attn.1", "mlp.0", "mlp.1", "blocks.1.attn.proj.bias", "norm.bias")
    for layer in (0, 1):
        assert torch.equal(layers[f"attn.{layer}"], parts.select(kind="head", layer=layer).sum())
    assert torch.equal(layers["mlp.0"], parts.select(kind="neuron").sum())
    assert torch.equal(layers["mlp.1"], parts["mlp.1"])
    assert layers.components[1] == Component("attn", 0)


def test_heads_join_the_rest_of_their_attention():
    parts = Decomposition(torch.tensor([[[1.0]], [[2.0]], [[4.0]]]), ("L0H0", "attn.0", "L1H0"))
    layers = parts.group(by="layer")
    assert dict(zip(layers.labels, layers.values.flatten().tolist(), strict=True)) == {"attn.0": 3.0, "attn.1": 4.0}


def test_kinds_have_one_component_each():
    parts = dataclasses.replace(
        sample(), components=(*COMPONENTS[:-2], Component("intervention", name="hook_z"), COMPONENTS[-1])
    )
    kinds = parts.group(by="kind")
    assert kinds.labels == ("embed", "head", "neuron", "mlp", "intervention@all", "constant")
    torch.testing.assert_close(kinds["head"], parts.select(kind="head").sum(), atol=1e-14, rtol=0)


@KINDS
def test_grouping_what_is_selected_stays_incomplete(kind):
    coarse = sample(kind=kind).select(kind="head").group(by="layer")
    assert coarse.labels == ("attn.0", "attn.1")
    assert not coarse.complete
