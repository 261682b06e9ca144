"""Positions within attention: rotated queries and keys, biases of the scores; stems in front of a column."""

import copy
from functools import partial

import pytest
import timm
import torch
from einops import einsum
from test_hooked_meaning import close, exact, moved, noise_like
from test_hooked_parity import lazy_names, plain_names
from timm.layers import HybridEmbed, apply_rot_embed_cat
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from tiny_models import TINY, TINY_MODELS, images_for, perturb
from torch import nn
from torch.nn import functional

from vitdecomp_lens import HookedViT, attribute_tokens, decompose
from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.hooked.registry import ImageSpec

ROTARY = sorted(
    name for name in TINY_MODELS if name.startswith(("eva", "dinov3", "rope")) and TINY_MODELS[name]().rope is not None
)
BIASED = sorted(name for name in TINY_MODELS if name.startswith(("beit", "relpos")) and name != "beit_no_bias")
COLUMNS = sorted(name for name in TINY_MODELS if name.startswith(("eva", "dinov3", "rope", "beit", "relpos", "hybrid")))


def rotations(model, layer):
    """The library's own rotations of a layer, of a 4 × 4 grid."""
    rope = model.rope
    cached = not getattr(model, "dynamic_img_size", False) and hasattr(rope, "feat_shape")
    embed = rope.get_embed() if cached else rope.get_embed(shape=(4, 4))
    return embed[layer] if getattr(model, "rope_mixed", False) else embed


def bias_of(model, layer):
    """What the library adds to the scores of a layer: the sum of a bias of its own and one of all blocks."""
    attn, biases = model.blocks[layer].attn, []
    if isinstance(model, Beit):
        biases += [] if attn.relative_position_bias_table is None else [attn._get_rel_pos_bias()]
        biases += [] if model.rel_pos_bias is None else [model.rel_pos_bias()]
    else:
        biases += [module.get_bias() for module in (attn.rel_pos, model.shared_rel_pos) if module is not None]
    return sum(biases)


@pytest.fixture(params=ROTARY)
def rotary(request):
    return request.param


@pytest.fixture(params=BIASED)
def biased(request):
    return request.param


@pytest.fixture(params=COLUMNS)
def column(request):
    return request.param


# Rotary positions ------------------------------------------------------------------------------------------


def test_rotated_queries_and_keys_are_the_librarys_rotation_of_patches_alone(rotary):
    model, images = exact(rotary)
    _, cache = model.run_with_cache(images)
    prefix = len(model.token_grid(images).prefix)
    for layer in range(2):
        half, embed = model.original.blocks[layer].attn.rotate_half, rotations(model.original, layer)
        for letter in "qk":
            plain = cache[f"blocks.{layer}.attn.hook_{letter}"]
            turned = cache[f"blocks.{layer}.attn.hook_rot_{letter}"]
            assert turned.shape == plain.shape == (3, prefix + 16, 4, 8)
            assert torch.equal(turned[:, :prefix], plain[:, :prefix])
            expected = apply_rot_embed_cat(plain[:, prefix:].transpose(1, 2), embed, half=half).transpose(1, 2)
            assert close(turned[:, prefix:], expected)
            assert (turned[:, prefix:] - plain[:, prefix:]).abs().max() > 0.1


def test_scores_are_dot_products_of_rotated_queries_and_keys(rotary):
    model, images = exact(rotary)
    _, cache = model.run_with_cache(images)
    q, k = cache["blocks.1.attn.hook_rot_q"], cache["blocks.1.attn.hook_rot_k"]
    scores = einsum(q, k, "b i h e, b j h e -> b h i j") / 8**0.5
    assert close(cache["blocks.1.attn.hook_attn_scores"], scores)
    assert close(cache["blocks.1.attn.hook_pattern"], scores.softmax(-1))
    before = einsum(cache["blocks.1.attn.hook_q"], cache["blocks.1.attn.hook_k"], "b i h e, b j h e -> b h i j")
    assert not close(scores * 8**0.5, before), "positions matter"


def test_scores_are_what_the_library_gives_its_softmax(rotary, monkeypatch):
    model, images = exact(rotary)
    for block in model.original.blocks:
        block.attn.fused_attn = False
    seen, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, **how: (seen.append(self), softmax(self, **how))[1])
    model.original(images)
    monkeypatch.undo()
    model = HookedViT(model.original)
    _, cache = model.run_with_cache(images)
    for layer in range(2):
        assert close(cache[f"blocks.{layer}.attn.hook_attn_scores"], seen[layer])


def test_a_change_of_rotated_queries_is_made_after_the_rotation(rotary):
    model, images = exact(rotary)
    _, clean = model.run_with_cache(images)
    for letter in "qk":
        model.add_hook(f"blocks.1.attn.hook_rot_{letter}", moved)
        _, cache = model.run_with_cache(images)
        model.reset_hooks()
        assert torch.equal(cache[f"blocks.1.attn.hook_{letter}"], clean[f"blocks.1.attn.hook_{letter}"])
        changed = moved(clean[f"blocks.1.attn.hook_rot_{letter}"], None)
        assert close(cache[f"blocks.1.attn.hook_rot_{letter}"], changed)
        assert not close(cache["blocks.1.attn.hook_z"], clean["blocks.1.attn.hook_z"])


def test_only_rotary_models_have_hooks_of_rotated_queries():
    for name in COLUMNS:
        model = HookedViT(TINY_MODELS[name]())
        assert ("blocks.0.attn.hook_rot_q" in model.hook_dict) == (name in ROTARY)
        assert model.cfg.positional_embedding_type == ("rotary" if name in ROTARY else "standard")


@pytest.mark.parametrize("name", ["eva02_dynamic", "dinov3_dynamic"])
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_rotations_follow_the_size_of_the_images(name, size):
    model = HookedViT(TINY_MODELS[name]())
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    output, cache = model.run_with_cache(images, names_filter=plain_names(model))
    assert torch.equal(output, model.original(images))
    grid = model.token_grid(images)
    assert (grid.rows, grid.columns) == (size[0] // 8, size[1] // 8)
    assert cache["blocks.1.attn.hook_rot_k"].shape[1] == len(grid)
    parts = decompose(model.double(), images.double())
    assert parts.gap.max() < 1e-10


def test_padded_sizes_are_followed_too():
    model = HookedViT(TINY_MODELS["eva02_dynamic"]())
    images = torch.randn(2, 3, 36, 30, generator=torch.Generator().manual_seed(0))
    output, cache = model.run_with_cache(images, names_filter=plain_names(model))
    assert torch.equal(output, model.original(images))
    assert cache["hook_patch_embed"].shape[1] == 5 * 4


class WideNorm(nn.LayerNorm):
    """A norm that returns float32, as autocast makes them do on some devices."""

    def forward(self, x):
        return super().forward(x.float())


def test_rotated_queries_have_the_dtype_of_the_values():
    original = TINY_MODELS["dinov3"]()
    for block in original.blocks:
        block.attn.q_norm = block.attn.k_norm = WideNorm(8)
    model, images = HookedViT(original), images_for("dinov3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, cache = model.run_with_cache(images, names_filter=plain_names(model))
        assert torch.equal(output, original(images))
    assert cache["blocks.0.attn.hook_q"].dtype == torch.float32
    assert cache["blocks.0.attn.hook_rot_q"].dtype == cache["blocks.0.attn.hook_v"].dtype == torch.bfloat16


def test_keys_and_values_that_heads_share_are_refused():
    model = Eva(**TINY, attn_type="rope", qkv_fused=False, use_rot_pos_emb=True, num_kv_heads=2).eval()
    with pytest.raises(UnsupportedModelError, match=r"AttentionRope has 4 heads for queries that share 2 for keys"):
        HookedViT(model)
    assert HookedViT(TINY_MODELS["rope_three_axes"]()).branches == 4


# Biases of the scores --------------------------------------------------------------------------------------


def test_scores_hold_the_bias_by_position(biased):
    model, images = exact(biased)
    _, cache = model.run_with_cache(images)
    for layer in range(2):
        q, k, v = (cache[f"blocks.{layer}.attn.hook_{letter}"] for letter in "qkv")
        bias = bias_of(model.original, layer)
        assert bias.abs().max() > 0.05
        scores = einsum(q, k, "b i h e, b j h e -> b h i j") / 8**0.5 + bias
        assert close(cache[f"blocks.{layer}.attn.hook_attn_scores"], scores)
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        assert close(pattern, scores.softmax(-1))
        assert close(cache[f"blocks.{layer}.attn.hook_z"], einsum(pattern, v, "b h i j, b j h e -> b i h e"))


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_result"])
def test_a_bias_reaches_the_attention_whichever_way_it_runs(biased, hook):
    model, images = exact(biased)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    expected = model.original(images)
    for also in ("hook_embed", "blocks.1.hook_q_input"):
        hooks = [(name, lambda value, hook: None) for name in (hook, also)]
        assert close(model.run_with_hooks(images, fwd_hooks=hooks), expected)


# Both ------------------------------------------------------------------------------------------------------


def test_the_kernel_is_fused_until_scores_or_patterns_are_looked_at(column, monkeypatch):
    model, images = HookedViT(TINY_MODELS[column]()), images_for(column)
    calls, fused = [], functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *args, **how: (calls.append(1), fused(*args, **how))[1]
    )
    inside = [hook for hook in plain_names(model) if hook.startswith("blocks.")]
    model.run_with_cache(images, names_filter=inside)
    expected = len(calls)
    assert expected >= 2
    for hook in ("blocks.0.attn.hook_pattern", "blocks.0.attn.hook_attn_scores"):
        calls.clear()
        model.run_with_cache(images, names_filter=hook)
        assert len(calls) == expected - 1
    assert hook in lazy_names(model)


def test_unfused_attention_of_the_library_is_matched_bit_for_bit(column):
    if column == "beit_both_biases":
        pytest.skip("the library adds its two biases to the scores one after the other there: equal to rounding")
    original = TINY_MODELS[column]()
    for block in original.blocks:
        block.attn.fused_attn = False
    model, images = HookedViT(original), images_for(column)
    output, _ = model.run_with_cache(images, names_filter=lambda hook: ".attn." in hook)
    assert torch.equal(output, original(images))


def test_split_inputs_reach_one_head_each(column):
    model, images = exact(column)
    expected, clean = model.run_with_cache(images)
    model.set_use_split_qkv_input(True)

    def move_head_1(value, hook):
        value[:, :, 1] += noise_like(value[:, :, 1])

    for letter in "qkv":
        hook = f"blocks.1.hook_{letter}_input"
        assert close(model.run_with_hooks(images, fwd_hooks=[(hook, lambda value, hook: None)]), expected)
        model.add_hook(hook, move_head_1)
        _, cache = model.run_with_cache(images)
        model.reset_hooks()
        for other in "qkv":
            change = (cache[f"blocks.1.attn.hook_{other}"] - clean[f"blocks.1.attn.hook_{other}"]).abs().amax((0, 1, 3))
            assert [head for head, size in enumerate(change) if size > 1e-9] == ([1] if other == letter else [])


def test_queries_keys_and_values_are_the_normed_stream_times_weights(column):
    model, images = exact(column)
    _, cache = model.run_with_cache(images)
    block = model.blocks[1]
    stream = cache["blocks.1.hook_resid_pre"]
    read = stream if "post_norm" in column else block.ln1(stream)
    has_qk_norm = any(hasattr(getattr(block.attn.core, "q_norm", None), "eps") for _ in "q")
    for letter in "V" if has_qk_norm else "VQK":
        weight, bias = getattr(block.attn, f"W_{letter}"), getattr(block.attn, f"b_{letter}")
        value = einsum(read, weight, "b t d, h d e -> b t h e") + bias
        assert close(value, cache[f"blocks.1.attn.hook_{letter.lower()}"])


@pytest.mark.parametrize("name", ["eva02_clip", "beit_both_biases", "relpos_shared"])
def test_what_blocks_are_given_is_forgotten_after_the_run(name):
    model, images = HookedViT(TINY_MODELS[name]()), images_for(name)
    model.run_with_cache(images)

    def fail(value, hook):
        raise RuntimeError("from a hook")

    with pytest.raises(RuntimeError, match="from a hook"):
        model.run_with_hooks(images, fwd_hooks=[("blocks.1.attn.hook_v", fail)])
    assert not any(block.attn.context for block in model.hooked_blocks)
    assert torch.equal(copy.deepcopy(model)(images), model.original(images))


@pytest.mark.parametrize("name", ["eva02_clip", "beit_shared_bias", "relpos_shared"])
def test_gradient_checkpoints_keep_what_blocks_are_given(name):
    original = TINY_MODELS[name]()
    original.set_grad_checkpointing()
    model, images = HookedViT(original), images_for(name)
    gradients = []
    for module in (original, model):
        original.zero_grad()
        with model.hooks([("blocks.0.attn.hook_z", lambda value, hook: None)]):
            module(images).square().sum().backward()
        gradients.append(original.blocks[0].attn.proj.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)


def test_a_hook_on_the_librarys_attention_may_change_what_it_is_given():
    original = TINY_MODELS["eva02_clip"]()

    def without_rotation(module, args, kwargs):
        return args, {**kwargs, "rope": None}

    original.blocks[0].attn.register_forward_pre_hook(without_rotation, with_kwargs=True)
    model, images = HookedViT(original), images_for("eva02_clip")
    output, cache = model.run_with_cache(images, names_filter=plain_names(model))
    assert torch.equal(output, original(images))
    assert torch.equal(cache["blocks.0.attn.hook_rot_q"], cache["blocks.0.attn.hook_q"])
    assert not torch.equal(cache["blocks.1.attn.hook_rot_q"], cache["blocks.1.attn.hook_q"])


@pytest.mark.parametrize("name", ["eva02", "dinov3", "beit", "relpos_table"])
def test_masks_are_refused(name):
    model = HookedViT(TINY_MODELS[name]())
    with pytest.raises(InputError, match="attn_mask must be None"):
        model.hooked_blocks[0](torch.zeros(1, 17, 32), is_causal=True)


@pytest.mark.parametrize("name", ["eva", "dinov3", "beit", "rope_mixed"])
def test_layer_scale_that_is_a_parameter_is_live_and_folded(name):
    model, images = exact(name)
    block, core = model.blocks[0], model.original.blocks[0]
    if core.gamma_1 is None:
        assert torch.equal(block.attn.b_O, core.attn.proj.bias)
        return
    with torch.no_grad():
        core.gamma_1.mul_(3)
    assert torch.equal(block.attn.b_O, core.attn.proj.bias * core.gamma_1)
    assert torch.equal(model(images), model.original(images))
    core.gamma_1 = nn.Parameter(2 * core.gamma_1.detach())
    assert torch.equal(block.attn.b_O, core.attn.proj.bias * core.gamma_1)


def test_of_two_norms_behind_the_blocks_both_can_be_looked_at():
    model, images = exact("eva_two_norms")
    _, cache = model.run_with_cache(images)
    normed = model.ln_final(cache["blocks.1.hook_resid_post"])
    assert close(model.ln_pooled(normed[:, 1:].mean(1)), cache["hook_representation"])
    assert cache["ln_final.hook_normalized"].shape == (3, 17, 32)
    assert cache["ln_pooled.hook_normalized"].shape == (3, 32)


def test_a_hook_of_the_users_in_front_of_the_dropout_still_runs():
    original = TINY_MODELS["beit_no_bias"]()
    original.pos_drop.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model, images = HookedViT(original), images_for("beit_no_bias")
    output, _ = model.run_with_cache(images, names_filter=plain_names(model))
    assert torch.equal(output, original(images))


# Stems -----------------------------------------------------------------------------------------------------


def test_a_stem_is_one_component_and_its_patches_are_its_strides():
    model, images = exact("hybrid")
    grid = model.token_grid(images)
    assert (grid.rows, grid.columns, grid.image_size) == (4, 4, (32, 32))
    assert grid.rectangle(1 + 5) == (8.0, 8.0, 16.0, 16.0)
    assert model.image_spec == ImageSpec(3, (32, 32))
    assert model.component_points("head")[0].hook == "hook_patch_embed"
    parts = decompose(model, images, by="head")
    assert parts.gap.max() < 1e-10
    assert [label for label in parts.labels if "patch_embed" in label] == []
    tokens = attribute_tokens(model, images, torch.eye(32, dtype=torch.float64)[:2])
    assert tokens["embed"].shape == (3, 1 + 16, 2)


def test_stems_of_other_sizes():
    model = HookedViT(TINY_MODELS["hybrid_dynamic"]())
    assert model.image_spec == ImageSpec(3, None, (4, 4)), "the stem's features are padded, not the image"
    images = torch.randn(1, 3, 36, 28, generator=torch.Generator().manual_seed(0))
    output, cache = model.run_with_cache(images, names_filter=plain_names(model))
    assert torch.equal(output, model.original(images))
    grid = model.token_grid(images)
    assert (grid.rows, grid.columns, grid.image_size) == (5, 4, (40, 32))
    assert cache["hook_patch_embed"].shape[1] == 20
    with pytest.raises(InputError, match="multiples of 4 and 4"):
        model(torch.zeros(1, 3, 34, 28))


def test_the_grid_is_the_stems_where_its_stride_does_not_divide_the_image():
    stem = ConvStem(channels=(8, 16), depth=2, kernel_size=3, stride=(2, 2), padding=1)
    options = {**TINY, "img_size": 21, "patch_size": 1, "embed_layer": partial(HybridEmbed, backbone=stem)}
    model = HookedViT(perturb(VisionTransformer(**options)))
    images = torch.randn(1, 3, 21, 21, generator=torch.Generator().manual_seed(0))
    assert model.original.patch_embed.dynamic_feat_size((21, 21)) == (7, 7), "what rounding makes of it"
    assert len(model.token_grid(images)) == 1 + 36
    assert decompose(model, images).gap.max() < 1e-5


def test_a_resnet_in_front_is_hooked():
    model = HookedViT(timm.create_model("vit_tiny_r_s16_p8_224", depth=1, num_classes=3).eval())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    output, cache = model.run_with_cache(images, names_filter=plain_names(model))
    assert torch.equal(output, model.original(images))
    assert cache["hook_patch_embed"].shape == (1, 49, 192)
    assert model.token_grid(images).image_size == (224, 224)
