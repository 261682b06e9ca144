"""Bad input gets an error of ours that says what was expected, what came, and what to do."""

import pytest
import torch
from labelled_samples import as_users_run_it
from tiny_models import TINY_MODELS, images_for

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose
from vitdecomp_lens.errors import CapacityError, InputError, UnknownNameError, UnsupportedModelError, VitDecompError

IMAGES = images_for("class_token")


def model():
    return HookedViT(TINY_MODELS["class_token"]())


def nan_image():
    bad = IMAGES.clone()
    bad[1, 0, 0, 0] = torch.nan
    return bad


BAD_IMAGES = {
    "rank": (IMAGES[0], InputError, r"images"),
    "channels": (IMAGES[:, :1], InputError, r"channel"),
    "size": (torch.rand(2, 3, 40, 32), InputError, r"32"),
    "uint8": ((IMAGES * 255).clamp(0, 255).to(torch.uint8), InputError, r"uint8"),
    "nan": (nan_image(), InputError, r"NaN|not finite|finite"),
    "inf": (torch.full_like(IMAGES, torch.inf), InputError, r"finite|infin"),
    "empty": (IMAGES[:0], InputError, r"empty|at least one"),
    "dtype": (IMAGES.double(), InputError, r"float64"),
    "no_tensor": ("photograph.jpg", InputError, r"str"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(case):
    images, error, message = BAD_IMAGES[case]
    with as_users_run_it(), pytest.raises(error, match=message):
        decompose(model(), images)


BAD_DIRECTIONS = {
    "one_dimension": (torch.rand(32), r"pass directions\[None\]"),
    "other_space": (torch.rand(2, 7), r"\[direction, 32\]; got \(2, 7\)"),
    "integers": (torch.ones(2, 32, dtype=torch.long), r"floating tensor \[direction, 32\]"),
    "nan": (torch.full((1, 32), torch.nan), r"NaN or infinite"),
    "none_at_all": (torch.rand(0, 32), r"\[direction, 32\]; got \(0, 32\)"),
}


@pytest.mark.parametrize("case", BAD_DIRECTIONS)
@pytest.mark.parametrize("function", [attribute, attribute_tokens])
def test_bad_directions_are_refused(case, function):
    directions, message = BAD_DIRECTIONS[case]
    with as_users_run_it(), pytest.raises(InputError, match=message):
        function(model(), IMAGES, directions)


def test_unknown_options_are_refused():
    with as_users_run_it(), pytest.raises(InputError, match="by= must be 'layer', 'head' or 'neuron'; got 'heads'"):
        decompose(model(), IMAGES, by="heads")
    with pytest.raises(UnknownNameError, match="did you mean 'hook_representation'"):
        decompose(model(), IMAGES, of="hook_represent")
    with pytest.raises(UnknownNameError, match="no component 'L1H9'; did you mean"):
        decompose(model(), IMAGES, components=["L1H9"])
    with pytest.raises(InputError, match="batch_size= must be at least 1; got 0"):
        decompose(model(), IMAGES, batch_size=0)


def test_a_hook_with_many_vectors_an_image_says_how_to_pool():
    with pytest.raises(InputError, match=r"must be one vector an image, \[batch, d\].*is \[batch, 17, 32\]. Pool it"):
        decompose(model(), IMAGES, of="blocks.1.hook_resid_post")


def test_several_outputs_need_of():
    with pytest.raises(InputError, match=r"returns 2 tensors; name the one to decompose with of="):
        decompose(model(), IMAGES, of=lambda module, images: (module(images), module(images) + 1))


def test_too_large_a_result_is_refused_before_it_is_computed():
    hooked = model()
    with pytest.raises(CapacityError, match=r"would take .* GiB, more than max_bytes=1000 allows. Use fewer images"):
        decompose(hooked, IMAGES, by="neuron", max_bytes=1000)
    with pytest.raises(CapacityError, match=r"component batch token direction"):
        attribute_tokens(hooked, IMAGES, torch.rand(4, 32), max_bytes=1000)


def test_a_module_that_does_not_say_where_its_components_are_is_told_what_to_do():
    with pytest.raises(UnsupportedModelError, match=r"Wrap it: HookedViT\(model\)"):
        decompose(TINY_MODELS["class_token"](), IMAGES)


def test_every_error_is_one_of_ours():
    for error in (InputError, UnknownNameError, UnsupportedModelError, CapacityError):
        assert issubclass(error, VitDecompError)
    assert "did you mean" in str(UnknownNameError("no 'a'; did you mean 'b'?"))
