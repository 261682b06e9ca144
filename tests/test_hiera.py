"""Hiera: unrolled tokens shown as they are in the image, and the maximum that the stream passes through."""

import pytest
import torch
from staged_models import HIERA, STAGED_MODELS, images_for
from timm.models.hiera import Hiera, HieraBlock
from tiny_models import perturb
from torch import nn

from vitdecomp_lens import HookedViT, attribute_tokens, decompose
from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.frozen.trace import trace

pytestmark = pytest.mark.filterwarnings("ignore:aten..amax:vitdecomp_lens.errors.VitDecompWarning")

DEEP = {
    "img_size": (64, 96),
    "embed_dim": 4,
    "stages": (1, 2, 1, 2),
    "q_pool": 3,
    "mask_unit_size": (8, 8),
}
SHAPES = {
    "square": {},
    "not_square": {"img_size": (64, 96)},
    "deep": DEEP,
    "not_all_stages_merge": {**DEEP, "q_pool": 2},
    "none_merges": {"q_pool": 0},
    "merged_by_rows": {"q_stride": (2, 1), "mask_unit_size": (4, 1), "img_size": (64, 32)},
    "windows_in_all_stages": {**DEEP, "mask_unit_attn": (True, True, True, True)},
    "no_windows": {"mask_unit_attn": (False, False, False)},
    "not_projected": {"use_expand_proj": False},
    "small_windows": {**DEEP, "mask_unit_size": (4, 4)},
    "windows_of_half_a_merging": {"mask_unit_size": (4, 2), "mask_unit_attn": (True, False, False)},
}


def hiera(dtype=torch.float64, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return perturb(Hiera(**{**HIERA, "num_classes": 5, **options})).requires_grad_(False).to(dtype)


def model_and_images(dtype=torch.float64, batch=2, **options):
    model = HookedViT(hiera(dtype, **options))
    size = model.image_spec.size
    return model, torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_orders_are_what_the_library_rolls_back_at_every_block(name):
    model, _ = model_and_images(**SHAPES[name])
    library = model.original
    rows, columns = library.unroll.size
    tokens = torch.arange(2 * rows * columns * 3).view(2, -1, 3)
    assert torch.equal(model.hooked_blocks[0].before.show(library.unroll(tokens)), tokens)
    for number, block in enumerate(model.hooked_blocks):
        height, width = block.after.size
        value = torch.randperm(2 * height * width * 3).view(2, -1, 3)
        shown = block.after.show(value)
        assert torch.equal(shown, library.reroll(value, number).flatten(1, 2))
        assert torch.equal(block.after.restore(shown, value), value)
        by_head = value.unsqueeze(1).expand(-1, 2, -1, -1)
        assert torch.equal(block.after.show(by_head, 2)[:, 1], shown)


@pytest.mark.parametrize("name", SHAPES)
def test_the_stream_is_the_librarys_intermediates(name):
    model, images = model_and_images(torch.float32, **SHAPES[name])
    _, cache = model.run_with_cache(images)
    expected = model.original.forward_intermediates(images, output_fmt="NHWC", coarse=False, intermediates_only=True)
    for number, value in enumerate(expected):
        torch.testing.assert_close(cache[f"blocks.{number}.hook_resid_post"], value.flatten(1, 2))
        grid = model.token_grid(images, f"blocks.{number}.hook_resid_post")
        assert (grid.rows, grid.columns) == value.shape[1:3]
        assert grid.image_size == images.shape[2:]


def in_windows(value, rows, columns, down, across):
    """``batch row·column head d`` cut into windows by hand: ``batch·window head token d``."""
    grid = value.unflatten(1, (rows, columns))
    height, width = rows // down, columns // across
    cut = [
        grid[:, y * height : (y + 1) * height, x * width : (x + 1) * width].flatten(1, 2)
        for y in range(down)
        for x in range(across)
    ]
    return torch.stack(cut, 1).flatten(0, 1).transpose(1, 2)


@pytest.mark.parametrize("name", SHAPES)
def test_patterns_are_of_windows_as_they_are_in_the_image(name):
    """z = pattern @ v and scores = q kᵀ, all of them cut by hand from what the hooks show of the image."""
    model, images = model_and_images(**SHAPES[name])
    _, cache = model.run_with_cache(images)
    in_window = 0
    for number, block in enumerate(model.hooked_blocks):
        at = f"blocks.{number}.attn."
        down, across = 1, 1
        if block.attn.core.use_mask_unit_attn:
            down, across = model.original.mask_spatial_shape
            in_window += 1
        cut = {}
        for kind in "qkvz":
            grid = model.token_grid(images, f"{at}hook_{kind}")
            cut[kind] = in_windows(cache[f"{at}hook_{kind}"], grid.rows, grid.columns, down, across)
        scores = cut["q"] @ cut["k"].transpose(-2, -1) * block.attn.scale
        torch.testing.assert_close(cache[f"{at}hook_attn_scores"], scores)
        torch.testing.assert_close(cache[f"{at}hook_pattern"], scores.softmax(-1))
        torch.testing.assert_close(cut["z"], cache[f"{at}hook_pattern"] @ cut["v"])
    assert in_window == sum(block.attn.core.use_mask_unit_attn for block in model.hooked_blocks)
    assert (in_window == 0) == (name == "no_windows")


def test_queries_are_shown_as_they_are_merged():
    model, images = model_and_images()
    _, cache = model.run_with_cache(images)
    block = model.hooked_blocks[1]
    normed = cache["blocks.1.ln1.hook_normalized"] * block.ln1.w + block.ln1.b
    q = torch.einsum("btd,hde->bthe", normed, block.attn.W_Q) + block.attn.b_Q
    grid = model.token_grid(images, "blocks.1.attn.hook_k")
    maps = q.unflatten(1, (grid.rows, grid.columns)).permute(0, 3, 4, 1, 2)
    largest = nn.functional.max_pool2d(maps.flatten(0, 1), 2).unflatten(0, maps.shape[:2])
    torch.testing.assert_close(cache["blocks.1.attn.hook_q"], largest.flatten(3).permute(0, 3, 1, 2))


def test_an_embedding_with_positions_is_what_the_blocks_get():
    model, images = model_and_images(abs_win_pos_embed=True, global_pos_size=(7, 7))
    _, cache = model.run_with_cache(images)
    expected = model.original._pos_embed(cache["hook_patch_embed"])
    assert torch.equal(cache["hook_full_embed"], expected)
    assert torch.equal(cache["blocks.0.hook_resid_pre"], expected)
    assert torch.equal(cache["hook_patch_embed"], model.original.patch_embed(images))


def test_stages_that_do_not_merge_keep_their_grid():
    model, images = model_and_images(**SHAPES["not_all_stages_merge"])
    rows = [model.token_grid(images, f"blocks.{n}.hook_resid_pre").rows for n in range(6)]
    assert rows == [16, 16, 8, 8, 4, 4]
    assert [model.token_grid(images, f"blocks.{n}.hook_resid_post").rows for n in range(6)] == [16, 8, 8, 4, 4, 4]
    assert [list(stage) for stage in model.stages] == [[0], [1, 2], [3], [4, 5]]


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_the_originals(name, fused):
    module = hiera(torch.float32, **SHAPES[name])
    for block in module.blocks:
        block.attn.fused_attn = fused
    model = HookedViT(module)
    images = torch.randn(2, 3, *model.image_spec.size, generator=torch.Generator().manual_seed(1))
    expected = module(images)
    assert torch.equal(model(images), expected)
    plain = [hook for hook in model.hook_dict if not hook.endswith(("pattern", "attn_scores", "scale", "normalized"))]
    assert torch.equal(model.run_with_cache(images, names_filter=plain)[0], expected)
    torch.testing.assert_close(model.run_with_cache(images)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["square", "not_projected"])
def test_inputs_of_queries_keys_and_values_may_be_separate(name):
    model, images = model_and_images(**SHAPES[name])
    expected, clean = model.run_with_cache(images)
    model.set_use_split_qkv_input(True)
    output, cache = model.run_with_cache(images)
    torch.testing.assert_close(output, expected)
    for hook in ("q_input", "k_input", "v_input"):
        shown = cache[f"blocks.1.hook_{hook}"]
        torch.testing.assert_close(shown, clean["blocks.1.hook_resid_pre"].unsqueeze(2).expand_as(shown))
        assert model.token_grid(images, f"blocks.1.hook_{hook}").rows == 16
        changed = model.run_with_hooks(images, fwd_hooks=[(f"blocks.1.hook_{hook}", lambda value, hook: value.flip(1))])
        assert not torch.allclose(changed, expected)
    for hook in ("hook_q", "hook_k", "hook_v"):
        torch.testing.assert_close(cache[f"blocks.1.attn.{hook}"], clean[f"blocks.1.attn.{hook}"])


@pytest.mark.parametrize("options", [{"global_pool": "max"}, {"global_pool": "avgmax"}, {"num_classes": 0}])
def test_other_readouts_are_exact(options):
    model, images = model_and_images(**options)
    assert torch.equal(model(images), model.original(images))
    parts = decompose(model, images)
    assert parts.gap.max() < 1e-10
    expected = model.original.forward_head(model.original.forward_features(images), pre_logits=True)
    torch.testing.assert_close(parts.total, expected)


def test_an_unpooled_representation_is_in_rows_of_tokens():
    model, images = model_and_images(**SHAPES["not_all_stages_merge"], global_pool="")
    _, cache = model.run_with_cache(images)
    normed = model.original.head.norm(cache["blocks.5.hook_resid_post"])
    torch.testing.assert_close(cache["hook_representation"], normed)
    shown = cache["ln_final.hook_normalized"] * model.original.head.norm.weight + model.original.head.norm.bias
    torch.testing.assert_close(shown, normed)


def test_a_decomposition_under_a_hook_on_the_pattern_is_exact():
    model, images = model_and_images()
    clean = model.run_with_cache(images)[1]["hook_representation"]
    windows, merging, whole = (f"blocks.{number}.attn.hook_pattern" for number in (0, 1, 3))
    with model.hooks([(hook, lambda value, hook: value.square()) for hook in (windows, merging, whole)]):
        parts = decompose(model, images)
        assert parts.gap.max() < 1e-10
        torch.testing.assert_close(parts.total, model.run_with_cache(images)[1]["hook_representation"])
    assert not torch.allclose(parts.total, clean)


# --- the maximum ----------------------------------------------------------------------------------------------------


def two_stages(**options):
    """One merging, so that what an embedding writes can be worked out by hand."""
    return model_and_images(stages=(1, 1), q_pool=1, mask_unit_size=(2, 2), mask_unit_attn=(True, False), **options)


def blocks_of_four(value, grid):
    """``batch row·column d`` to ``batch merged four d``."""
    cut = value.unflatten(1, (grid.rows // 2, 2, grid.columns // 2, 2)).permute(0, 1, 3, 2, 4, 5)
    return cut.flatten(1, 2).flatten(2, 3)


def centred(value, scale):
    return (value - value.mean(-1, keepdim=True)) / scale


def written_by_patches(model, images, cache, u):
    """⟨u, what the frozen model makes of each patch embedding⟩, by hand: ``batch merged four``."""
    grid, block = model.token_grid(images), model.hooked_blocks[1]
    x, norm = cache["hook_patch_embed"], block.ln1
    if block.core.proj is not None:
        stream = (cache["blocks.1.ln1.hook_normalized"] * norm.w + norm.b) @ block.core.proj.weight.T
        moved = (centred(x, cache["blocks.1.ln1.hook_scale"]) * norm.w) @ block.core.proj.weight.T
    else:
        stream, moved = cache["blocks.1.hook_resid_pre"], x
    fours, moved = blocks_of_four(stream, grid), blocks_of_four(moved, grid)
    wins = nn.functional.one_hot(fours.argmax(2), 4).movedim(-1, 2)
    added = moved * wins if block.core.proj is not None else torch.cat([moved * wins, moved / 4], -1)
    final = centred(added / added.shape[1], cache["ln_final.hook_scale"][:, None, None, :])
    return (final * model.get_submodule("ln_final").w) @ u


@pytest.mark.parametrize("projected", [True, False])
def test_patches_write_where_they_are_the_largest(projected):
    model, images = two_stages(use_expand_proj=projected)
    _, cache = model.run_with_cache(images)
    u = torch.randn(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = attribute_tokens(model, images, u[None])["embed"]
    grid = model.token_grid(images)
    found = blocks_of_four(scores, grid)[..., 0]
    torch.testing.assert_close(found, written_by_patches(model, images, cache, u))


def moved_patch(token, amount):
    def move(value, hook):
        value = value.clone()
        value[:, token] += amount
        return value

    return move


def test_a_patch_that_is_the_largest_nowhere_writes_nothing():
    """All channels rank the tokens alike, so that three of four lose everywhere: moving them moves no score."""
    model, images = two_stages(batch=1)
    block = model.original.blocks[1]
    block.proj.weight.copy_(block.proj.weight[:1].abs() * torch.linspace(1, 2, 16, dtype=torch.float64)[:, None])
    _, cache = model.run_with_cache(images)
    grid = model.token_grid(images)
    projected = block.proj(block.norm1(cache["blocks.1.hook_resid_pre"]))
    ranks = blocks_of_four(projected, grid)[0, 0]
    places = (0, 1, grid.columns, grid.columns + 1)
    winner = places[int(ranks[:, 0].argmax())]
    assert all(places[int(place)] == winner for place in ranks.argmax(0))
    u = torch.randn(1, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    graph = trace(model, images)
    cut = graph.cut([point.hook for point in model.token_points("layer")])
    recorded = graph.record(images)
    before, tokens = graph.replay(cut, recorded, {}), attribute_tokens(model, images, u, by="layer")["embed"]
    for place in places:
        value = torch.zeros_like(cache["hook_patch_embed"])
        value[:, place] = cache["hook_patch_embed"][:, place]
        alone = (graph.replay(cut, recorded, {"hook_patch_embed": value}) - before).flatten(1) @ u.T
        torch.testing.assert_close(tokens[:, place], alone, rtol=0, atol=1e-12)
        value[:, place] += torch.arange(8)
        moved = (graph.replay(cut, recorded, {"hook_patch_embed": value}) - before).flatten(1) @ u.T
        assert (alone.abs().max() > 1e-6) == (place == winner)
        assert ((moved - alone).abs().max() < 1e-12) == (place != winner)


def test_a_stream_passes_on_the_largest_alone():
    """With silent branches, a small move of a patch that loses everywhere is not seen behind the merging."""
    model, images = two_stages(batch=1)
    block = model.original.blocks[1]
    block.proj.weight.copy_(block.proj.weight[:1] * torch.linspace(1, 2, 16, dtype=torch.float64)[:, None])
    silent = [(f"blocks.{n}.hook_{b}", lambda value, hook: value * 0) for n in (0, 1) for b in ("attn_out", "mlp_out")]
    with model.hooks(silent):
        _, cache = model.run_with_cache(images)
        grid = model.token_grid(images)
        order = blocks_of_four(block.proj(block.norm1(cache["blocks.1.hook_resid_pre"])), grid)[0, 0, :, 0].argsort()
        places = [(0, 1, grid.columns, grid.columns + 1)[int(number)] for number in order]
        for place, is_largest in ((places[0], False), (places[-1], True)):
            with model.hooks([("hook_patch_embed", moved_patch(place, 1e-6 * torch.arange(8)))]):
                _, after = model.run_with_cache(images)
            change = after["blocks.1.hook_resid_post"] - cache["blocks.1.hook_resid_post"]
            assert (change.abs().max() > 0) == is_largest


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (60, 64), (65, 64)])
def test_images_of_another_size_are_refused(size):
    model, _ = model_and_images(torch.float32)
    with pytest.raises(InputError, match=r"\[batch, 3, 64, 64\].*resize them to 64 × 64"):
        model(torch.zeros(1, 3, *size))


def test_dropping_patches_is_refused():
    model, images = model_and_images(patch_drop_rate=0.5)
    assert torch.equal(model(images), model.original(images))
    model.train()
    with pytest.raises(UnsupportedModelError, match="patch_drop_rate=0"):
        model(images)


def test_masks_are_refused():
    model, images = model_and_images()
    with pytest.raises(UnsupportedModelError, match="without mask="):
        model.tower(images, mask=torch.ones(2, 16, dtype=torch.bool))


def test_videos_are_refused():
    video = Hiera(
        img_size=(4, 32, 32),
        embed_dim=8,
        stages=(1, 1),
        q_pool=1,
        q_stride=(1, 2, 2),
        mask_unit_size=(1, 2, 2),
        mask_unit_attn=(True, False),
        patch_kernel=(3, 7, 7),
        patch_stride=(2, 4, 4),
        patch_padding=(1, 3, 3),
        sep_pos_embed=True,
    ).eval()
    with pytest.raises(UnsupportedModelError, match="input with 3 axes"):
        HookedViT(video)


def test_windows_that_are_no_rectangles_are_refused():
    odd = hiera(img_size=(96, 96), mask_unit_size=(3, 4), mask_unit_attn=(True, False, False))
    assert odd(torch.zeros(1, 3, 96, 96, dtype=torch.float64)).shape == (1, 5)
    with pytest.raises(UnsupportedModelError, match="Windows of 12 tokens"):
        HookedViT(odd)


class OtherBlock(HieraBlock):
    """Runs otherwise."""

    def forward(self, x):
        return x


class OtherHiera(Hiera):
    """Overrides what hooking relies on."""

    def forward_features(self, x, mask=None):
        return super().forward_features(x, mask)


def test_what_is_overridden_is_refused_by_name():
    module = hiera()
    module.blocks[1].__class__ = OtherBlock
    with pytest.raises(UnsupportedModelError, match="OtherBlock cannot be hooked; those that can are HieraBlock"):
        HookedViT(module)
    module = hiera()
    module.__class__ = OtherHiera
    with pytest.raises(UnsupportedModelError, match="OtherHiera overrides forward_features of Hiera"):
        HookedViT(module)
    module = hiera()
    module.head.pre_logits = nn.Sequential(nn.Linear(32, 32), nn.GELU()).double()
    with pytest.raises(UnsupportedModelError, match="hidden layer of the classifier"):
        HookedViT(module)


def test_the_original_stays_as_it_was():
    module = STAGED_MODELS["hiera"]()
    names = [name for name, _ in module.named_modules()]
    model, images = HookedViT(module), images_for("hiera", dtype=torch.float32)
    model.run_with_cache(images)
    assert [name for name, _ in module.named_modules()] == names
    assert type(module.blocks[0]) is HieraBlock
    assert torch.equal(module(images), model(images))


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_pruned_model_has_the_stages_that_are_left(last):
    module = STAGED_MODELS["hiera"]()
    module.prune_intermediate_layers([last], prune_head=True)
    model, images = HookedViT(module), images_for("hiera", dtype=torch.float32)
    assert torch.equal(model(images), module(images))
    assert [number for stage in model.stages for number in stage] == list(range(len(module.blocks)))
    assert len(model.stages) == last + 1
