"""Laws of scores laid over the image: which pixel shows which patch, and what the pixels sum to."""

import dataclasses

import pytest
import torch
from labelled_samples import (
    COARSE,
    as_users_run_it,
    token_sample,
)

from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.errors import CapacityError, InputError
from vitdecomp_lens.tokens import TokenAttribution, TokenBlock

# ---- over the image


def test_every_pixel_shows_the_score_of_the_patch_whose_rectangle_holds_it():
    tokens = token_sample(coarse_only=True)
    pixels = tokens.to_pixels(32, 48)
    assert pixels.shape == (4, 3, 2, 32, 48)
    for token in range(len(COARSE)):
        if (rectangle := COARSE.rectangle(token)) is not None:
            top, left, bottom, right = map(int, rectangle)
            inside = pixels[..., top:bottom, left:right]
            expected = tokens.values[:, :, token, :, None, None].expand_as(inside)
            assert torch.equal(inside, expected)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (64, 96), (17, 31), (5, 3), (1, 1), (224, 225)])
def test_a_pixel_lies_in_the_patch_that_holds_its_centre(height, width):
    tokens = token_sample(coarse_only=True)
    pixels = tokens.to_pixels(height, width)
    patches = tokens.values[:, :, 2:].unflatten(2, (2, 3))
    for y in {0, height // 3, height // 2, height - 1}:
        for x in {0, width // 3, width // 2, width - 1}:
            row, column = int((y + 0.5) / height * 2), int((x + 0.5) / width * 3)
            assert torch.equal(pixels[..., y, x], patches[:, :, row, column])


@pytest.mark.parametrize(("height", "width"), [(32, 48), (64, 96), (17, 31), (5, 3), (1, 1), (224, 225)])
def test_to_pixels_density_conserves_the_sum(height, width):
    tokens = token_sample()
    pixels = tokens.to_pixels(height, width, mode="density")
    assert pixels.shape == (9, 3, 2, height, width)
    expected = torch.cat([b.values[:, :, len(b.grid.prefix) :].sum(2) for b in tokens.blocks])
    torch.testing.assert_close(pixels.sum((-1, -2)), expected, atol=1e-12, rtol=0)


def test_density_divides_by_the_area_where_patches_are_whole_pixels():
    tokens = token_sample(coarse_only=True)
    area = 16 * 16
    torch.testing.assert_close(
        tokens.to_pixels(32, 48, mode="density"), tokens.to_pixels(32, 48) / area, atol=1e-15, rtol=0
    )


def test_density_shares_a_pixel_among_the_patches_that_it_touches():
    patches = torch.tensor([6.0, 12.0, 24.0]).reshape(1, 1, 3, 1)
    tokens = TokenAttribution(
        (TokenBlock(patches, ("embed",), TokenGrid(1, 3, (1, 3))),), Attribution(torch.zeros(0, 1, 1), ())
    )
    assert tokens.to_pixels(1, 2, mode="density").flatten().tolist() == pytest.approx([12.0, 30.0])
    assert tokens.to_pixels(1, 2).flatten().tolist() == [6.0, 24.0]


def test_prefix_tokens_have_no_pixels():
    tokens = token_sample(coarse_only=True)
    values = tokens.values.clone()
    values[:, :, :2] = torch.nan
    without = dataclasses.replace(tokens, blocks=(tokens.blocks[0].with_values(values),))
    assert torch.equal(without.to_pixels(8, 8), tokens.to_pixels(8, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: token_sample().select(kind="constant").to_pixels(8, 8),
            "Expected components with tokens; there are none. Select some, or read .untokened.",
        ),
        (lambda: token_sample().to_pixels(0, 8), "Expected a height and width of at least one pixel; got 0 × 8."),
        (
            lambda: token_sample().to_pixels(8, 8, mode="linear"),
            "Expected mode='nearest' or mode='density'; got mode='linear'.",
        ),
    ],
)
@as_users_run_it()
def test_pixels_that_cannot_be_are_refused(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == message


def test_maps_that_are_too_large_are_refused_before_they_are_made():
    assert token_sample().to_pixels(8, 8, max_bytes=9 * 3 * 2 * 8 * 8 * 8).numel() == 9 * 3 * 2 * 8 * 8
    with pytest.raises(CapacityError) as caught:
        token_sample().to_pixels(8, 8, max_bytes=27_647)
    assert str(caught.value) == (
        "9 components × 3 images × 2 directions × 8 × 8 pixels take 27,648 bytes; allowed are 27,647. "
        "Select components or images first, or raise max_bytes=."
    )
    with pytest.raises(CapacityError):
        token_sample().to_pixels(100_000, 100_000)
