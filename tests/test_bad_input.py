"""Bad input gets an error of ours that says what was expected, what came, and what to do."""

import pytest
import torch
from labelled_samples import as_users_run_it
from tiny_models import TINY_MODELS, images_for

from vitdecomp_lens import Component, HookedViT, attribute, attribute_tokens, decompose
from vitdecomp_lens.errors import CapacityError, InputError, UnknownNameError, UnsupportedModelError, VitDecompError

IMAGES = images_for("class_token")


def model():
    return HookedViT(TINY_MODELS["class_token"]())


def nan_image():
    bad = IMAGES.clone()
    bad[1, 0, 0, 0] = torch.nan
    return bad


WANTED = r"\[batch, 3, 32, 32\]"
TO_FINITE = r"has NaN or infinite values\. Check how it was loaded and normalised\."

# What was expected, what came, and what to do, in this order. Where nothing is left to do but what was expected, the
# message ends there.
BAD_IMAGES = {
    "rank": (IMAGES[0], rf"must be {WANTED}; got \[3, 32, 32\]\. Add the batch axis: images\[None\]\."),
    "channels": (
        IMAGES[:, :1],
        rf"must have 3 channels, {WANTED}; got \[3, 1, 32, 32\]\. .*images\.expand\(-1, 3, -1, -1\)\.",
    ),
    "channels_last": (
        IMAGES.permute(0, 2, 3, 1),
        rf"must have 3 channels, {WANTED}; got \[3, 32, 32, 3\]\. Channels come first: images\.permute\(0, 3, 1, 2\)\.",
    ),
    "size": (
        torch.rand(2, 3, 40, 32),
        rf"must be {WANTED}; got \[2, 3, 40, 32\]\. Use model\.preprocess\(photographs\), or resize them to 32 × 32\.",
    ),
    "uint8": (
        (IMAGES * 255).clamp(0, 255).to(torch.uint8),
        r"must be floating point and normalised; got torch\.uint8\. Use model\.preprocess\(photographs\)",
    ),
    "nan": (nan_image(), rf"must be finite; image 1 of 3 {TO_FINITE}"),
    "inf": (torch.full_like(IMAGES, torch.inf), rf"must be finite; image 0 of 3 {TO_FINITE}"),
    "empty": (
        IMAGES[:0],
        rf"must be {WANTED} with at least one image; got an empty batch \[0, 3, 32, 32\]\. Check what",
    ),
    "dtype": (
        IMAGES.double(),
        r"model is torch\.float32 and the images are torch\.float64\. Convert them: images\.to\(torch\.float32\)\.",
    ),
    "no_tensor": (
        "photograph.jpg",
        rf"must be a tensor {WANTED}; got str\. Use model\.preprocess\(photographs\)\.",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(case):
    images, message = BAD_IMAGES[case]
    with as_users_run_it(), pytest.raises(InputError, match=message):
        decompose(model(), images)


DIRECTIONS = r"Expected directions \[direction, 32\]; got"
BAD_DIRECTIONS = {
    "one_dimension": (torch.rand(32), rf"{DIRECTIONS} \(32,\)\. For one direction, pass directions\[None\]\."),
    "other_space": (torch.rand(2, 7), rf"{DIRECTIONS} \(2, 7\)\. They may be of another space: make them for"),
    "integers": (
        torch.ones(2, 32, dtype=torch.long),
        r"directions as a floating tensor \[direction, 32\]; got a tensor of torch\.int64\. Convert them",
    ),
    "no_tensor": ([0.5] * 32, r"directions as a floating tensor \[direction, 32\]; got list\."),
    "nan": (
        torch.full((1, 32), torch.nan),
        r"Expected finite directions; direction 0 of 1 has NaN or infinite entries\. Check how",
    ),
    "none_at_all": (torch.rand(0, 32), rf"{DIRECTIONS} \(0, 32\)\."),
}


@pytest.mark.parametrize("case", BAD_DIRECTIONS)
@pytest.mark.parametrize("function", [attribute, attribute_tokens])
def test_bad_directions_are_refused(case, function):
    directions, message = BAD_DIRECTIONS[case]
    with as_users_run_it(), pytest.raises(InputError, match=message):
        function(model(), IMAGES, directions)


def test_unknown_options_are_refused():
    message = r"by= must be 'layer', 'head', 'neuron' or 'latent'; got 'heads'\."
    with as_users_run_it(), pytest.raises(InputError, match=message):
        decompose(model(), IMAGES, by="heads")
    message = r"of= must be .* or a function; got 'hook_represent': did you mean 'hook_representation'"
    with pytest.raises(UnknownNameError, match=message):
        decompose(model(), IMAGES, of="hook_represent")
    with pytest.raises(UnknownNameError, match=r"There is no component 'L1H9'; did you mean .*'L1H3'"):
        decompose(model(), IMAGES, components=["L1H9"])
    with pytest.raises(InputError, match=r"batch_size= must be at least 1; got 0\."):
        decompose(model(), IMAGES, batch_size=0)


def test_a_hook_with_many_vectors_an_image_says_how_to_pool():
    message = r"must be one vector an image, \[batch, d\].*is \[batch, 17, 32\]\. Name a hook.*hook_representation"
    with pytest.raises(InputError, match=message):
        decompose(model(), IMAGES, of="blocks.1.hook_resid_post")


def test_several_outputs_need_of():
    with pytest.raises(InputError, match=r"returns 2 tensors; name the one to decompose with of=.* of=lambda"):
        decompose(model(), IMAGES, of=lambda module, images: (module(images), module(images) + 1))


def test_too_large_a_result_is_refused_before_it_is_computed():
    hooked = model()
    message = r"\[264, 3, 32\].*more than max_bytes=1000 allows\. Use fewer images.*raise max_bytes="
    with pytest.raises(CapacityError, match=message):
        decompose(hooked, IMAGES, by="neuron", max_bytes=1000)
    message = r"component.*token.*direction\] = \[.*max_bytes=1000 allows\. Use fewer images"
    with pytest.raises(CapacityError, match=message):
        attribute_tokens(hooked, IMAGES, torch.rand(4, 32), max_bytes=1000)


def test_every_error_is_one_of_ours():
    for error in (InputError, UnknownNameError, UnsupportedModelError, CapacityError):
        assert issubclass(error, VitDecompError)
    assert "did you mean" in str(UnknownNameError("no 'a'; did you mean 'b'?"))


def test_models_that_do_not_exist_are_named_with_near_matches():
    with pytest.raises(UnknownNameError, match=r"timm has no model 'test_vitt'; did you mean 'test_vit'"):
        HookedViT.from_timm("test_vitt")
    with pytest.raises(UnknownNameError, match=r"open_clip has no model 'ViT-B16'; did you mean 'ViT-B-16'"):
        HookedViT.from_open_clip("ViT-B16")
    known = r"there are .* such as 'openai', 'laion400m_e31'"
    with pytest.raises(UnknownNameError, match=rf"open_clip has no weights 'laion' for ViT-B-16; {known}"):
        HookedViT.from_open_clip("ViT-B-16", pretrained="laion")


def test_a_name_is_no_module():
    message = r"Expected a module; got str\. For a model by name: HookedViT\.from_timm\('test_vit'\)\."
    with as_users_run_it(), pytest.raises(UnsupportedModelError, match=message):
        HookedViT("test_vit")


def test_what_is_read_is_named_with_near_matches():
    message = r"'embedding', a hook name or a function; got 'logit': did you mean 'logits'"
    with pytest.raises(UnknownNameError, match=message):
        decompose(model(), IMAGES, of="logit")


def test_components_are_found_by_label_or_component_and_nothing_else():
    parts = decompose(model(), IMAGES)
    scores = attribute_tokens(model(), IMAGES, torch.ones(1, 32))
    assert torch.equal(parts[Component.from_label("L1H1")], parts["L1H1"])
    assert torch.equal(scores[Component.from_label("L1H1")], scores["L1H1"])
    for index in (3, (1, 1), None):
        message = r"Expected a label such as 'L3H7' or a Component; got .*\.values\[row\]"
        with as_users_run_it(), pytest.raises(InputError, match=message):
            parts[index]


def test_one_image_is_taken_by_its_number():
    parts = decompose(model(), IMAGES)
    assert torch.equal(parts.images(1).values, parts.values[:, 1:2])
    assert torch.equal(parts.images(-1).total, parts.total[-1:])
    with pytest.raises(InputError, match=r"image numbers from 0 to 2.* got"):
        parts.images(3)
