"""Laws of labelled values as batches, and what they refuse when they are made."""

import dataclasses
import math

import pytest
import torch
from labelled_samples import COVERAGE, KINDS, as_users_run_it, assert_same, sample

from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Attribution, Coverage, Decomposition, Stop
from vitdecomp_lens.errors import InputError, UnknownNameError

# ---- batches


@KINDS
def test_cat_of_slices_is_identity(kind):
    names = {"directions": tuple("abcde")} if kind is Attribution else {}
    parts = sample(kind=kind, batch=5, coverage=COVERAGE, metadata={"model": "tiny", "size": [8, 8]}, **names)
    assert_same(kind.cat([parts.images(slice(0, 2)), parts.images(slice(2, 3)), parts.images(slice(3, None))]), parts)
    assert_same(kind.cat([parts]), parts)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, -2), [4, 2, 0]),
        ([3, 3, -5], [3, 3, 0]),
        (torch.tensor([4, 1]), [4, 1]),
        ([True, False, False, True, False], [0, 3]),
        (torch.tensor([False, True, False, False, True]), [1, 4]),
        ([], []),
        (slice(3, 3), []),
    ],
)
@KINDS
def test_images_picks_rows_of_values_and_total_alike(kind, index, rows):
    parts = sample(kind=kind, batch=5)
    some = parts.images(index)
    assert torch.equal(some.values, parts.values[:, rows])
    assert torch.equal(some.total, parts.total[rows])
    assert some.check_gap().complete


@pytest.mark.parametrize("index", [[5], [-6], [True, False], [0.5]])
@as_users_run_it()
def test_images_that_are_not_there_are_refused(index):
    with pytest.raises(InputError) as caught:
        sample(batch=5).images(index)
    assert str(caught.value) == (f"Expected a slice, image numbers from 0 to 4, or a mask of length 5; got {index!r}.")


ADVICE = "Decompose both with the same model and cut, or select the same labels from both."


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (sample().select(labels=sample().labels[::-1]), "components differ ('embed' and 'norm.bias')"),
        (sample().select(labels=sample().labels[:3]), "components differ (14 and 3 of them)"),
        (sample(width=6), "d_rep differs (5 and 6)"),
        (dataclasses.replace(sample(), total=None), "only one has a total"),
    ],
)
def test_batches_that_do_not_fit_are_not_concatenated(other, what):
    with pytest.raises(InputError) as caught:
        Decomposition.cat([sample(), sample(), other])
    assert str(caught.value) == f"Expected batches of the same components to concatenate; in 0 and 2 {what}. {ADVICE}"


def test_batches_of_other_directions_are_not_concatenated():
    one = sample(kind=Attribution, directions=tuple("abcde"))
    with pytest.raises(InputError, match="in 0 and 1 directions differ"):
        Attribution.cat([one, dataclasses.replace(one, directions=tuple("abcdf"))])


def test_no_batches_are_not_concatenated():
    with pytest.raises(InputError, match=r"^Expected at least one Decomposition to concatenate; got none"):
        Decomposition.cat([])


def test_cat_keeps_what_all_agree_on():
    one = sample(coverage=COVERAGE, metadata={"model": "tiny", "batch": 0})
    other = sample(seed=1, coverage=Coverage(4, 4), metadata={"model": "tiny", "batch": 1})
    both = Decomposition.cat([one, dataclasses.replace(other, complete=False)])
    assert both.metadata == {"model": "tiny"}
    assert both.coverage is None
    assert not both.complete
    assert Decomposition.cat([one, other]).check_gap().complete


@KINDS
def test_to_changes_dtype_and_device_of_values_and_total(kind):
    parts = sample(kind=kind).to(torch.float32)
    assert (parts.values.dtype, parts.total.dtype) == (torch.float32, torch.float32)
    assert parts.to("meta").values.device.type == "meta"
    assert_same(parts.cpu(), parts)


# ---- what is refused when it is made


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"components": ("embed",)},
            "Expected a component for each of the 2 rows of values (axis 0); got 1 components.",
        ),
        (
            {"components": ("L0H1", Component("head", 0, 1))},
            "Expected labels that tell components apart; 'L0H1' is carried more than once. Sum such rows, or give "
            "them names.",
        ),
        (
            {"values": torch.ones(2, 3)},
            'Expected values as Float[Tensor, "component batch d_rep"] with at least one d_rep; got shape (2, 3) of '
            "torch.float32.",
        ),
        (
            {"values": torch.ones(2, 1, 3, dtype=torch.int64)},
            'Expected values as Float[Tensor, "component batch d_rep"] with at least one d_rep; got shape (2, 1, 3) '
            "of torch.int64.",
        ),
        (
            {"total": torch.ones(1, 4)},
            'Expected total as Float[Tensor, "batch d_rep"] of shape (1, 3), as the values have it; got shape (1, 4) '
            "of torch.float32.",
        ),
        (
            {"total": torch.ones(1, 3, device="meta")},
            "Expected values and total on one device; got cpu and meta.",
        ),
    ],
)
@as_users_run_it()
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(InputError) as caught:
        Decomposition(**{"values": torch.ones(2, 1, 3), "components": ("embed", "mlp.0"), **given})
    assert str(caught.value) == message


def test_metadata_that_no_file_could_hold_is_refused():
    with pytest.raises(InputError, match=r"^Expected metadata that JSON can hold .*Tensor"):
        sample(metadata={"scale": torch.ones(1)})
    with pytest.raises(InputError, match=r"^Expected metadata that JSON can hold"):
        sample(metadata={"scale": math.nan})


def test_metadata_is_a_copy_and_becomes_what_json_gives_back():
    given = {"size": (8, 8)}
    parts = sample(metadata=given)
    given["size"] = None
    assert parts.metadata == {"size": [8, 8]}


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample().values = torch.ones(1)


def test_a_decomposition_shows_what_it_holds():
    assert repr(sample()) == (
        "Decomposition(component=14, batch=3, d_rep=5, torch.float64, cpu: 1 embed, 6 head (layers 0, 1), "
        "4 neuron (layer 0), 1 mlp (layer 1), 2 constant (layer 1); complete, with total)"
    )
    assert repr(dataclasses.replace(sample(kind=Attribution).select(kind="mlp"), total=None)) == (
        "Attribution(component=1, batch=3, direction=5, torch.float64, cpu: 1 mlp (layer 1); incomplete, without total)"
    )


# ---- directions by name, coverage


def test_top_names_the_components_that_write_most():
    values = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[5.0, -1.0], [5.0, -1.0]], [[-9.0, 7.0], [-9.0, 9.0]]])
    scores = Attribution(values, ("L0H0", "L0H1", "mlp.0"), directions=("a dog", "a cat"))
    assert scores.top("a dog", 2) == (("L0H1", 5.0), ("L0H0", 2.0))
    assert scores.top(-1, k=10) == (("mlp.0", 8.0), ("L0H0", 0.0), ("L0H1", -1.0))
    with pytest.raises(UnknownNameError, match=r"^There is no direction 'a dig'; did you mean 'a dog'"):
        scores.top("a dig")
    with pytest.raises(UnknownNameError, match=r"^There is no direction 2; there are 2, numbered from 0\."):
        scores.top(2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a",), "Expected a name for each of the 2 directions; got 1 names."),
        (
            ("a", "a"),
            "Expected labels that tell directions apart; 'a' is carried more than once. Sum such rows, or "
            "give them names.",
        ),
    ],
)
def test_names_that_do_not_fit_the_directions_are_refused(names, message):
    with pytest.raises(InputError) as caught:
        Attribution(torch.ones(1, 1, 2), ("embed",), directions=names)
    assert str(caught.value) == message


def test_coverage_is_the_share_of_branches_found():
    assert COVERAGE.share == 0.75
    assert Coverage(0, 0).share == 0.0
    assert str(Coverage(4, 4)) == "4 of 4 branches are components of their own (100 %)"
    assert str(COVERAGE) == (
        "3 of 4 branches are components of their own (75 %); walks stopped at\n  aten.tanh.default in head: nonlinear"
    )
    assert str(Stop("aten.gelu.default", "", "nonlinear")) == "aten.gelu.default in the model itself: nonlinear"


@pytest.mark.parametrize(("found", "branches"), [(-1, 3), (4, 3)])
def test_coverage_beyond_all_is_refused(found, branches):
    with pytest.raises(InputError) as caught:
        Coverage(found, branches)
    assert str(caught.value) == (
        f"Coverage counts found branches among all: expected 0 <= found <= branches, got found={found}, "
        f"branches={branches}."
    )
