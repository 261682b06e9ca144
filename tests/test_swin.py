"""Swin, SwinV2 and SwinV2-Cr: what is theirs alone. `test_staged.py` has what holds for all models with stages."""

import math

import pytest
import torch
from PIL import Image
from staged_models import STAGED_MODELS, SWIN, images_for
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, SwinTransformerV2CrBlock
from tiny_models import perturb
from torch import nn
from torch.nn import functional

from vitdecomp_lens import HookedViT, attribute_tokens, decompose
from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.explain import explain
from vitdecomp_lens.hooked.windows import Windows

FAMILIES = {"swin": SwinTransformer, "swin_v2": SwinTransformerV2, "swin_v2_cr": SwinTransformerV2Cr}
BLOCKS = {"swin": SwinTransformerBlock, "swin_v2": SwinTransformerV2Block, "swin_v2_cr": SwinTransformerV2CrBlock}
SLOWER = ("hook_pattern", "hook_attn_scores", "hook_scale", "hook_normalized")


def made(family, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return perturb(FAMILIES[family](**{**SWIN, "num_classes": 5, **options})).requires_grad_(False)


def random_images(*size, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def check_is_the_librarys(model, images):
    """Bit for bit without hooks, and with those that see what the library computes anyway."""
    expected = model.original(images)
    assert torch.equal(model(images), expected)
    plain = [hook for hook in model.hook_dict if not hook.endswith(SLOWER)]
    assert torch.equal(model.run_with_cache(images, names_filter=plain)[0], expected)
    torch.testing.assert_close(model.run_with_cache(images)[0], expected)


def check_is_exact(model, images):
    parts = decompose(model, images)
    assert parts.complete
    assert parts.gap.max() < 1e-10


# --- windows --------------------------------------------------------------------------------------------------------


def test_windows_undo_what_the_library_does():
    for window, shift, size in [((4, 4), (2, 2), (8, 8)), ((4, 2), (1, 0), (7, 5)), ((3, 3), (1, 1), (9, 7))]:
        windows = Windows(window, shift)
        windows.see(size)
        padding = windows.padding(size)
        tokens = torch.arange(padding + size[0] * size[1]).double().expand(2, -1).unsqueeze(-1)
        like = torch.zeros(tokens.shape[1] * 2 // (window[0] * window[1]), window[0] * window[1], 1).double()
        cut = windows.restore(tokens, like)
        assert cut.shape == like.shape
        assert torch.equal(windows.show(cut), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_of_shifted_windows_is_the_librarys(family):
    for grid, window in [((16, 16), (4, 4)), ((8, 12), (4, 6)), ((8, 4), (4, 4)), ((6, 9), (3, 3))]:
        shift = tuple(0 if length <= side else side // 2 for length, side in zip(grid, window, strict=True))
        image = torch.zeros(1, *grid, 8)
        size = "feat_size" if family == "swin_v2_cr" else "input_resolution"
        block = BLOCKS[family](8, num_heads=2, window_size=window, shift_size=shift, **{size: grid})
        assert block.window_size == window
        assert block.shift_size == shift
        assert torch.equal(Windows(window, shift).keep_apart(image), block.get_attn_mask(image))


# Decomposing them is shown for one family here, and for padding in each of them by `test_staged.py`.
decomposed = pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.sweep] * (family != "swin")) for family in FAMILIES]
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_for_any_size_is_the_librarys_at_each(family):
    """Windows divide the first, not the others; the last is smaller than a window in the second stage."""
    module = made(family, strict_img_size=False)
    for dtype in (torch.float32, torch.float64):
        model = HookedViT(module.to(dtype))
        assert model.image_spec.size is None
        for size in ((32, 32), (40, 24), (36, 28), (12, 52)):
            images = random_images(*size, dtype=dtype)
            check_is_the_librarys(model, images)
            grid = model.token_grid(images)
            assert (grid.rows, grid.columns) == (size[0] // 2, size[1] // 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_larger_than_the_grid_are_padded_where_the_model_says_so(family):
    model, images = HookedViT(made(family, always_partition=True, window_size=16)), random_images(32, 32)
    check_is_the_librarys(model, images.float())
    grid = model.token_grid(images.float(), "blocks.3.attn.hook_v")
    assert (grid.rows, grid.columns, len(grid.prefix)) == (8, 8, 16 * 16 - 8 * 8)


@decomposed
def test_sizes_that_windows_do_not_fit_are_decomposed_exactly(family):
    check_is_exact(HookedViT(made(family, strict_img_size=False).double()), random_images(12, 52))
    check_is_exact(HookedViT(made(family, always_partition=True, window_size=16).double()), random_images(32, 32))


# A first Swin has a table of biases, for windows of one size.
@pytest.mark.parametrize(("family", "window"), [("swin", (4, 4)), ("swin_v2", (6, 5)), ("swin_v2_cr", (6, 5))])
def test_a_model_that_was_resized_is_the_librarys(family, window):
    module = made(family)
    module.set_input_size(img_size=(48, 40), window_size=window)
    check_is_the_librarys(HookedViT(module), random_images(48, 40, dtype=torch.float32))


# --- sizes that a model does not take -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_size_is_said(family):
    model = HookedViT(made(family).double())
    # Windows would divide the first size, but not the second, nor the patch the third.
    for size in ((40, 32), (36, 28), (33, 32)):
        for refuses in (model, lambda images: decompose(model, images)):
            with pytest.raises(InputError, match=rf"3, 32, 32\]; got \[2, 3, {size[0]}, {size[1]}\].* 32 × 32"):
                refuses(random_images(*size))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_that_patches_do_not_divide_is_refused(family):
    model = HookedViT(made(family, strict_img_size=False, patch_size=4).double())
    for size in ((34, 32), (32, 35), (2, 32)):
        with pytest.raises(InputError, match=r"multiples of 4 and 4, so that patches"):
            model(random_images(*size))


# --- what there is at the hooks -------------------------------------------------------------------------------------


def windows_of_the_first(value, rows, columns, side):
    """Cut ``batch token head d_head`` of an image that is neither rolled nor padded: ``window head token d_head``."""
    grid = value.unflatten(1, (rows // side, side, columns // side, side))
    return grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)


@pytest.mark.parametrize("name", ["swin_v2", "swin_v2_cr"])
def test_scores_are_cosines_of_what_is_shown_by_head_with_bias(name):
    module = STAGED_MODELS[name]().double()
    attn = (module.layers if name == "swin_v2" else module.stages)[0].blocks[0].attn
    with torch.no_grad():
        attn.logit_scale.view(-1).copy_(torch.tensor([1.5, 9.0]))  # the second is beyond where it is cut off
    model, images = HookedViT(module), images_for(name)
    _, cache = model.run_with_cache(images)
    q, k = cache["blocks.0.attn.hook_q"], cache["blocks.0.attn.hook_k"]
    for shown in (q, k):
        torch.testing.assert_close(shown.norm(dim=-1), torch.ones_like(shown[..., 0]))
    raw = functional.linear(images_embedded(model, images), attn.qkv.weight).unflatten(-1, (3, 2, 4))
    biases = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) if name == "swin_v2" else attn.qkv.bias
    raw = raw + biases.view(3, 2, 4)
    torch.testing.assert_close(q, raw[:, :, 0] / raw[:, :, 0].norm(dim=-1, keepdim=True))
    torch.testing.assert_close(cache["blocks.0.attn.hook_v"], raw[:, :, 2])
    cosines = windows_of_the_first(q, 16, 16, 4) @ windows_of_the_first(k, 16, 16, 4).transpose(-2, -1)
    factors = torch.tensor([math.exp(1.5), 100.0], dtype=torch.float64).view(2, 1, 1)
    bias = cache["blocks.0.attn.hook_attn_scores"] - factors * cosines
    torch.testing.assert_close(bias, relative_bias(attn, 4).expand_as(bias))
    torch.testing.assert_close(cache["blocks.0.attn.hook_pattern"], (factors * cosines + bias).softmax(-1))


def images_embedded(model, images):
    return model.run_with_cache(images, names_filter="hook_embed")[1]["hook_embed"]


def relative_bias(attn, side):
    """The bias of each pair of tokens of a window, from their offset, one pair after the other."""
    places = [(row, column) for row in range(side) for column in range(side)]
    offsets = torch.tensor([[(a - c, b - d) for c, d in places] for a, b in places], dtype=torch.float64)
    if hasattr(attn, "meta_mlp"):
        return attn.meta_mlp(offsets.sign() * (1 + offsets.abs()).log()).movedim(-1, 0)
    offsets = offsets / (side - 1) * 8
    return 16 * attn.cpb_mlp(offsets.sign() * (offsets.abs() + 1).log2() / 3).movedim(-1, 0).sigmoid()


def test_scores_of_tokens_apart_are_masked_in_shifted_windows():
    for name in ("swin", "swin_v2", "swin_v2_cr"):
        model, images = HookedViT(STAGED_MODELS[name]()), images_for(name, dtype=torch.float32)
        _, cache = model.run_with_cache(images, names_filter="blocks.1.attn.hook_attn_scores")
        scores = cache["blocks.1.attn.hook_attn_scores"].unflatten(0, (2, 4, 4))
        apart = scores[:, 3, 3, :, 0, -1]  # opposite corners of the image
        assert apart.max() < -50
        assert scores[:, 0, 0].min() > -50


def test_norms_of_the_stream_stand_before_what_reads_it():
    """In SwinV2-Cr: ``hook_resid_post`` is normed at the end of a stage; at the very end ``ln_final`` norms."""
    name = "swin_v2_cr_not_square"
    model, images = HookedViT(STAGED_MODELS[name]().double()), images_for(name)
    output, cache = model.run_with_cache(images)
    for number, block in enumerate(model.hooked_blocks):
        added = cache[f"blocks.{number}.hook_resid_mid"] + cache[f"blocks.{number}.hook_mlp_out"]
        assert (f"blocks.{number}.ln3.hook_scale" in model.hook_dict) == (number == 1)
        expected = block.ln3(added) if number == 1 else added
        torch.testing.assert_close(cache[f"blocks.{number}.hook_resid_post"], expected)
    scale = cache["blocks.1.ln3.hook_scale"]
    assert scale.shape == (2, 16 * 32, 1)
    last = cache["blocks.3.hook_resid_post"]
    torch.testing.assert_close(cache["ln_final.hook_scale"], (last.var(-1, correction=0, keepdim=True) + 1e-5).sqrt())
    representation = model.ln_final(last).mean(1)
    torch.testing.assert_close(cache["hook_representation"], representation)
    torch.testing.assert_close(output, representation @ model.W_U + model.b_U)
    assert torch.equal(model.ln_final.w, model.original.stages[1].blocks[1].norm3.weight)


def test_a_norm_between_blocks_is_part_of_the_stream():
    name = "swin_v2_cr_not_square"
    module = made("swin_v2_cr", depths=(3, 2), extra_norm_period=2)
    model, images = HookedViT(module.double()), images_for(name)[:, :, :, :32]
    _, cache = model.run_with_cache(images)
    assert "blocks.1.ln3.hook_scale" in model.hook_dict
    assert torch.equal(cache["blocks.2.hook_resid_pre"], cache["blocks.1.hook_resid_post"])
    check_is_the_librarys(model, images)
    check_is_exact(model, images)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_has_no_meaning_across_stages_says_so():
    for name, blocks in [("swin", "SwinBlocks"), ("swin_v2", "SwinV2Blocks"), ("swin_v2_cr", "SwinV2CrBlocks")]:
        model = HookedViT(STAGED_MODELS[name]())
        assert model.stages == (range(2), range(2, 4))
        with pytest.raises(InputError, match="another width, in later blocks"):
            model.accumulated_bias(3)
        with pytest.raises(InputError, match=f"this model has {blocks}"):
            model.set_use_split_qkv_input(True)


def stages_of(module):
    return module.layers if hasattr(module, "layers") else module.stages


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_another_kind_are_refused_by_name(family):
    class Skipping(nn.Module):
        def forward(self, x):
            return x

    module = made(family)
    stages_of(module)[0].downsample = Skipping()
    with pytest.raises(UnsupportedModelError, match=r"merging of patches .*Skipping cannot be hooked"):
        HookedViT(module)
    module = made(family)
    module.head = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"head .*Identity cannot be hooked"):
        HookedViT(module)
    method = "_shifted_window_attn" if family == "swin_v2_cr" else "_attn"
    other = type("Unrolled", (BLOCKS[family],), {method: lambda self, x: x})
    module = made(family)
    stages_of(module)[1].blocks[1].__class__ = other
    with pytest.raises(UnsupportedModelError, match=f"Unrolled overrides {method} of {BLOCKS[family].__name__}"):
        HookedViT(module)


def test_a_tower_without_classifier_returns_its_representation():
    for family in FAMILIES:
        model, images = HookedViT(made(family, num_classes=0)), random_images(32, 32, dtype=torch.float32)
        check_is_the_librarys(model, images)
        with pytest.raises(InputError, match="its representation is its output"):
            _ = model.W_U


# --- uses -----------------------------------------------------------------------------------------------------------


def test_explain_lays_all_grids_over_the_photograph(tmp_path):
    module = made("swin", img_size=(36, 28), depths=(2, 2, 2), num_heads=(2, 2, 4))
    module.pretrained_cfg = {"input_size": (3, 36, 28), "crop_pct": 1.0}
    model = HookedViT(module)
    photograph = tmp_path / "photograph.png"
    Image.new("RGB", (60, 80), (200, 30, 90)).save(photograph)
    (found,) = explain(model, [photograph], class_=1)
    whole = sum(one.patches for one in found.contributions if one.patches is not None)
    assert float(found.heatmap.values.sum()) == pytest.approx(whole, abs=1e-5)
    assert list(found.prefix) == ["padding"]
    assert found.gap < 1e-5


def test_maps_over_pixels_lie_where_the_rectangles_are_though_merging_pads():
    model, images = (
        HookedViT(STAGED_MODELS["swin_merging_pads"]()),
        images_for("swin_merging_pads", dtype=torch.float32),
    )
    u = model.W_U.T[:1]
    for block in attribute_tokens(model, images[:1], u).blocks:
        only, grid = torch.zeros_like(block.values[:1, :1, :, :1]), block.grid
        for token in (len(grid.prefix), len(grid) - 1, len(grid) - 1 - grid.columns // 2):
            only.zero_()[0, 0, token] = 1
            top, left, bottom, right = (int(edge) for edge in grid.rectangle(token))
            for mode in ("nearest", "density"):
                shown = block.take([0]).with_values(only).to_pixels(*images.shape[2:], mode=mode)[0, 0, 0]
                inside = shown[top:bottom, left:right]
                assert bool((inside > 0).all())
                assert float(shown.sum()) == pytest.approx(float(inside.sum()))
                assert mode == "nearest" or float(shown.sum()) == pytest.approx(float(inside.numel() > 0))


def test_heads_may_be_of_any_width():
    module = made("swin", head_dim=6)
    model, images = HookedViT(module), random_images(32, 32, dtype=torch.float32)
    check_is_the_librarys(model, images)
    assert [block.attn.heads for block in model.blocks] == [2, 2, 4, 4]
    assert decompose(model, images).gap.max() < 1e-5
