"""TransformerLens' own tools work on a hooked vision transformer."""

import pytest
import torch
from test_hooked_meaning import close, exact
from tiny_models import TINY_MODELS, images_for
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.config import TransformerBridgeConfig

from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.hooked import HookedViT


@pytest.fixture
def model():
    return HookedViT(TINY_MODELS["layer_scale"]())


@pytest.fixture
def images():
    return images_for("layer_scale")


@pytest.mark.parametrize("name", ["class_token", "layer_scale", "deit3", "parallel_scaling_fused", "diff_attention"])
def test_residual_decomposition_sums_to_the_stream(name):
    model, images = exact(name)
    _, cache = model.run_with_cache(images)
    assert isinstance(model, HookedRootModule)
    assert isinstance(cache, ActivationCache)
    final = cache["blocks.1.hook_resid_post"]
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    assert close(parts.sum(0), final)
    assert close(cache.accumulated_resid(layer=-1)[-1], final)


@pytest.mark.parametrize("name", ["class_token", "layer_scale", "deit3"])
def test_stacked_heads_and_neurons_sum_to_the_stream(name):
    model, images = exact(name)
    _, cache = model.run_with_cache(images)
    final = cache["blocks.1.hook_resid_post"]
    heads = cache.stack_head_results(incl_remainder=True)
    assert heads.shape[0] == 2 * 4 + 1
    assert close(heads.sum(0), final)
    whole = cache.get_full_resid_decomposition(expand_neurons=True)
    assert close(whole.sum(0), final)


def test_final_norm_of_the_stream_is_the_representation(model, images):
    _, cache = model.to(torch.float64).run_with_cache(images.double())
    normed = model.ln_final(cache.accumulated_resid(layer=-1)[-1])[:, 0]
    assert close(normed, cache["hook_representation"])
    stack = cache.apply_ln_to_stack(cache.decompose_resid(pos_slice=0), pos_slice=0)
    assert close(stack.sum(0), cache["ln_final.hook_normalized"][:, 0])


def test_accumulated_biases_are_those_of_the_branches(model):
    first, second = model.blocks
    assert torch.equal(model.accumulated_bias(0), torch.zeros(32))
    assert torch.allclose(model.accumulated_bias(1), first.attn.b_O + first.mlp.b_out)
    assert torch.allclose(model.accumulated_bias(1, include_mlp_biases=False), first.attn.b_O)
    expected = first.attn.b_O + first.mlp.b_out + second.attn.b_O
    assert torch.allclose(model.accumulated_bias(1, mlp_input=True), expected)


def test_configuration_is_read_off_the_modules(model):
    cfg = model.cfg
    assert isinstance(cfg, TransformerBridgeConfig)
    assert (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.d_mlp) == (2, 4, 32, 8, 128)
    assert (cfg.n_ctx, cfg.d_vocab, cfg.eps, cfg.normalization_type) == (17, 10, 1e-6, "LN")
    assert (cfg.attention_dir, cfg.is_visual_model, cfg.n_key_value_heads) == ("bidirectional", True, None)
    assert cfg.act_fn == "gelu"
    assert HookedViT(TINY_MODELS["open_clip_whole"]()).cfg.act_fn == "quickgelu"


def test_class_directions_are_the_classifiers_rows_times_the_final_norms_gain(model):
    rows = model.original.head.weight[[3, 1]] * model.original.norm.weight
    assert torch.equal(model.tokens_to_residual_directions(torch.tensor([3, 1])), rows)
    assert model.to_single_token(4) == 4
    with pytest.raises(InputError, match="its representation is its output"):
        _ = HookedViT(TINY_MODELS["no_classifier"]()).W_U


def test_projections_of_clip_are_the_unembedding():
    model = HookedViT(TINY_MODELS["open_clip"]())
    assert torch.equal(model.W_U, model.original.proj)
    trunk = HookedViT(TINY_MODELS["open_clip_timm"]())
    assert torch.equal(trunk.W_U, trunk.original.head.proj.weight.T)


# Filters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("hook_embed", 1),
        (["hook_embed", "hook_representation"], 2),
        (("hook_embed", "blocks.0.attn.hook_z"), 2),
        (lambda name: name.endswith("hook_z"), 2),
        (None, 41),
    ],
)
def test_filters_keep_what_they_name(model, images, names, count):
    _, cache = model.run_with_cache(images, names_filter=names)
    assert len(cache.cache_dict) == count


@pytest.mark.parametrize(
    "run",
    [
        lambda model, images, name: model.run_with_cache(images, names_filter=name),
        lambda model, images, name: model.run_with_cache(images, names_filter=(name, "hook_embed")),
        lambda model, images, name: model.run_with_hooks(images, fwd_hooks=[(name, print)]),
        lambda model, images, name: model.hooks(fwd_hooks=[(name, print)]).__enter__(),
        lambda model, images, name: model.hooks(bwd_hooks=[(name, print)]).__enter__(),
        lambda model, images, name: model.add_hook(name, print),
        lambda model, images, name: model.add_perma_hook(name, print),
    ],
)
def test_unknown_hooks_raise_with_near_matches(model, images, run):
    advice = r"no hook 'blocks\.0\.attn\.hook_zz'; did you mean 'blocks\.0\.attn\.hook_z'"
    with pytest.raises(UnknownNameError, match=advice):
        run(model, images, "blocks.0.attn.hook_zz")
    with pytest.raises(UnknownNameError, match=r"no hook 'blocks\.0\.attn'"):
        run(model, images, "blocks.0.attn")
    assert model.list_hooks() == {}


def test_filters_that_match_nothing_raise(model, images):
    with pytest.raises(UnknownNameError, match="matches none of the 41 hooks"):
        model.run_with_cache(images, names_filter=lambda name: "nothing" in name)
    with pytest.raises(UnknownNameError, match="names no hook"):
        model.run_with_cache(images, names_filter=[])


def test_position_slices_take_tokens_and_leave_what_has_none(model, images):
    _, cache = model.run_with_cache(images, pos_slice=0)
    assert cache["blocks.0.hook_resid_pre"].shape == (3, 1, 32)
    assert cache["blocks.0.attn.hook_z"].shape == (3, 1, 4, 8)
    assert cache["blocks.0.attn.hook_pattern"].shape == (3, 4, 1, 17)
    assert cache["hook_representation"].shape == (3, 32)
    assert cache["hook_patch_embed"].shape == (3, 16, 32)
    _, pooled = HookedViT(TINY_MODELS["mean_pool_fc_norm"]()).run_with_cache(images, pos_slice=[0, 1])
    assert pooled["ln_final.hook_scale"].shape == (3, 1)
    assert pooled["blocks.0.hook_resid_pre"].shape == (3, 2, 32)


def test_a_single_image_can_drop_its_batch_axis(model, images):
    _, cache = model.run_with_cache(images[:1], remove_batch_dim=True)
    assert cache["blocks.0.attn.hook_z"].shape == (17, 4, 8)
    assert not cache.has_batch_dim


def test_gradients_can_be_cached(images):
    model = HookedViT(TINY_MODELS["class_token"]())
    kept, forward, backward = model.get_caching_hooks(["blocks.0.attn.hook_z"], incl_bwd=True)
    with model.hooks(forward, backward):
        model(images).sum().backward()
    assert kept["blocks.0.attn.hook_z_grad"].shape == kept["blocks.0.attn.hook_z"].shape
    assert kept["blocks.0.attn.hook_z_grad"].abs().max() > 0


def test_biases_behind_a_norm_are_not_added_up():
    with pytest.raises(InputError, match="a norm stands between a branch's bias and the stream"):
        HookedViT(TINY_MODELS["post_norm"]()).accumulated_bias(1)
    with pytest.raises(InputError, match="from 0 to 2; got 99"):
        HookedViT(TINY_MODELS["class_token"]()).accumulated_bias(99)


def test_a_slice_of_tokens_that_a_hook_has_not_is_refused_by_its_name():
    model, images = HookedViT(TINY_MODELS["cait"]()), images_for("cait")
    with pytest.raises(InputError, match=r"pos_slice does not fit blocks\.2\.hook_resid_pre, which has 1 tokens"):
        model.run_with_cache(images, pos_slice=5)


def test_token_grids_are_of_hooks_that_exist():
    model, images = HookedViT(TINY_MODELS["class_token"]()), images_for("class_token")
    with pytest.raises(UnknownNameError, match="hook_mlp_out"):
        model.token_grid(images, "blocks.0.hook_mpl_out")
