"""Every hook is live and means what its name says."""

import open_clip.transformer
import pytest
import torch
from einops import einsum
from test_hooked_parity import first
from tiny_models import TINY_MODELS, _open_clip, images_for, swept
from torch.nn import functional

from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked import HookedViT

NAMES = list(TINY_MODELS)
POST_NORM = {"post_norm", "eva_post_norm", "relpos_post_norm"}
NORM_AFTER_ATTENTION = {*POST_NORM, "open_clip_custom_all"}
ONLY_OF_THE_CLASS_TOKEN = ("attn.", "hook_attn_out", "mlp.", "hook_mlp_out")
NOT_IN_THE_OUTPUT: dict[str, tuple[str, ...]] = {
    "open_clip_pooler_parallel": ("attn_pool.",),  # its tokens are pooled, and then not returned
    # The mean is that of the patches, and what the class token gathers in the last blocks is not read.
    "cait_mean_pool": ("blocks.2.", "blocks.3."),
    "xcit_mean_pool": tuple(f"blocks.{layer}.{below}" for layer in (2, 3) for below in ONLY_OF_THE_CLASS_TOKEN),
}
NOISE = torch.Generator()


def noise_like(value):
    return torch.randn(value.shape, generator=NOISE.manual_seed(0)).to(value.dtype)


def moved(value, hook):
    """A hook that changes a value visibly."""
    return value * 1.2 + 0.2 * noise_like(value)


def exact(name):
    """A model and images in float64, where rounding cannot hide a mistake."""
    return HookedViT(TINY_MODELS[name]()).to(torch.float64), images_for(name).double()


def close(left, right):
    return bool((left - right).abs().max() <= 1e-11 * max(right.abs().max().item(), 1.0))


@pytest.fixture(params=swept(NAMES))
def name(request):
    return request.param


# Live ------------------------------------------------------------------------------------------------------


def test_every_hook_is_live(name):
    model, images = HookedViT(TINY_MODELS[name]()), images_for(name)
    dead = NOT_IN_THE_OUTPUT.get(name, ())
    with torch.no_grad():
        expected = first(model(images))
        for hook in model.hook_dict:
            output = first(model.run_with_hooks(images, fwd_hooks=[(hook, moved)]))
            changed = (output - expected).abs().max() > 1e-4
            assert changed == (not hook.startswith(dead)), hook


@pytest.mark.parametrize("name", swept(NAMES))  # it runs the model twice for each hook
def test_writing_in_place_is_the_same_as_returning_and_spares_the_parameters(name):
    model, images = HookedViT(TINY_MODELS[name]()), images_for(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def write(value, hook):
        value.mul_(1.2).add_(0.2 * noise_like(value))

    with torch.no_grad():
        for hook in model.hook_dict:
            written = first(model.run_with_hooks(images, fwd_hooks=[(hook, write)]))
            with_copy = first(model.run_with_hooks(images, fwd_hooks=[(hook, moved)]))
            assert (written - with_copy).abs().max() <= 2e-6 * with_copy.abs().max(), hook
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["class_token", "no_prefix_no_norm", "open_clip", "parallel_scaling", "prr_pool"])
def test_writing_in_place_changes_nothing_upstream_in_the_cache(name):
    model, images = HookedViT(TINY_MODELS[name]()), images_for(name)
    order = list(model.hook_dict)

    def erase(value, hook):
        value.zero_()

    with torch.no_grad():
        _, clean = model.run_with_cache(images)
        for hook in ("hook_embed", "hook_pos_embed", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_k"):
            model.add_hook(hook, erase)
            _, cache = model.run_with_cache(images)
            model.reset_hooks()
            upstream = [n for n in order[: order.index(hook)] if n.startswith(("hook_patch", "hook_embed", "blocks.0"))]
            upstream = [n for n in upstream if not (hook.startswith("hook_") and n.startswith("blocks"))]
            for before in upstream:
                assert torch.equal(cache[before], clean[before]), (hook, before)


def test_no_hook_is_left_after_an_exception():
    model, images = HookedViT(TINY_MODELS["class_token"]()), images_for("class_token")

    def fail(value, hook):
        raise RuntimeError("from a hook")

    with pytest.raises(RuntimeError, match="from a hook"):
        model.run_with_hooks(images, fwd_hooks=[("blocks.1.attn.hook_pattern", fail)])
    with pytest.raises(InputError):
        model.run_with_cache(images[0])
    assert not any(point._forward_hooks or point._backward_hooks for point in model.hook_points())
    assert model.list_hooks() == {}
    assert torch.equal(model(images), model.original(images))


def test_backward_hooks_see_gradients():
    model, images = HookedViT(TINY_MODELS["class_token"]()), images_for("class_token")
    seen = {}
    names = ["blocks.0.attn.hook_z", "blocks.0.attn.hook_pattern", "blocks.1.ln2.hook_normalized", "hook_embed"]
    hooks = [(name, lambda grad, hook: seen.__setitem__(hook.name, grad.shape)) for name in names]
    with model.hooks(bwd_hooks=hooks):
        model(images).sum().backward()
    assert set(seen) == set(names)
    assert seen["blocks.0.attn.hook_z"] == (3, 17, 4, 8)


# Names -----------------------------------------------------------------------------------------------------


def test_names_are_transformerlens():
    model = HookedViT(TINY_MODELS["class_token"]())
    block = [
        "hook_resid_pre",
        *("ln1.hook_scale", "ln1.hook_normalized"),
        *(f"attn.hook_{what}" for what in ("q", "k", "v", "attn_scores", "pattern", "z")),
        "hook_attn_out",
        "hook_resid_mid",
        *("ln2.hook_scale", "ln2.hook_normalized"),
        *("mlp.hook_pre", "mlp.hook_post"),
        "hook_mlp_out",
        "hook_resid_post",
    ]
    assert list(model.hook_dict) == [
        *("hook_patch_embed", "hook_embed", "hook_pos_embed", "hook_full_embed"),
        *(f"blocks.{layer}.{hook}" for layer in range(2) for hook in block),
        *("ln_final.hook_scale", "ln_final.hook_normalized", "hook_representation"),
    ]
    assert all(point.name == name for name, point in model.hook_dict.items())


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("dinov2", ["blocks.0.mlp.hook_pre_linear"], []),
        ("timm_clip", ["ln_pre.hook_scale"], []),
        ("no_positions", ["hook_embed"], ["hook_pos_embed"]),
        ("no_final_norm", [], ["ln_final.hook_scale"]),
        ("parallel_scaling", ["blocks.0.ln1.hook_scale"], ["blocks.0.hook_resid_mid", "blocks.0.ln2.hook_scale"]),
        ("parallel_things", ["blocks.1.attns.1.hook_z", "blocks.1.mlps.0.hook_post", "blocks.0.ln1s.1.hook_scale"], []),
        ("siglip", ["attn_pool.hook_pattern", "attn_pool.hook_mlp_out", "attn_pool.mlp.hook_post"], []),
        ("prr_pool", ["attn_pool.hook_z", "attn_pool.hook_pattern"], ["attn_pool.hook_mlp_out"]),
        ("open_clip_pooler_cascade", ["attn_pool.hook_q", "attn_pool_contrastive.hook_z"], []),
        ("class_token", [], ["blocks.0.attn.hook_result", "blocks.0.hook_q_input"]),
    ],
)
def test_variants_have_the_hooks_that_they_should(name, present, absent):
    hooks = HookedViT(TINY_MODELS[name]()).hook_dict
    assert not [hook for hook in present if hook not in hooks]
    assert not [hook for hook in absent if hook in hooks]


def test_activations_have_the_documented_shapes(name):
    model, images = HookedViT(TINY_MODELS[name]()), images_for(name)
    _, cache = model.run_with_cache(images)
    width = model.cfg.d_model
    for hook, value in cache.items():
        tokens = len(model.token_grid(images, hook))  # class attention reads more of them than it writes
        assert value.shape[0] == 3, hook
        if hook.startswith("blocks."):
            last = hook.rpartition(".")[2]
            by_head = ("pattern", "attn_scores", "q", "k", "rot_q", "rot_k", "v", "z")
            assert value.ndim == 3 + (last.removeprefix("hook_") in by_head), hook
            if last in ("hook_pattern", "hook_attn_scores"):
                of_channels = type(model.get_submodule(hook.rpartition(".")[0])).__name__ == "ChannelAttention"
                queries = len(model.token_grid(images, hook.replace(last, "hook_q")))
                expected = (model.cfg.d_head,) * 2 if of_channels else (queries, tokens)
                assert value.shape[2:] == expected, hook
            else:
                assert value.shape[1] == tokens, hook
        in_blocks = hook.startswith("blocks.") and hook.endswith(("resid_pre", "mlp_out"))
        if in_blocks or hook in ("hook_embed", "hook_pos_embed", "hook_full_embed"):
            assert value.shape == (3, tokens, width), hook
    grid = model.token_grid(images)
    assert cache["hook_patch_embed"].shape == (3, grid.rows * grid.columns, width)


# The stream ------------------------------------------------------------------------------------------------


def test_branch_outputs_are_what_is_added_to_the_stream(name):
    model, images = exact(name)
    _, cache = model.run_with_cache(images)
    for layer, block in enumerate(model.hooked_blocks):
        pre, post = cache[f"blocks.{layer}.hook_resid_pre"], cache[f"blocks.{layer}.hook_resid_post"]
        attn_out, mlp_out = cache[f"blocks.{layer}.hook_attn_out"], cache[f"blocks.{layer}.hook_mlp_out"]
        if layer and pre.shape == cache[f"blocks.{layer - 1}.hook_resid_post"].shape:  # else a class token comes in
            assert torch.equal(pre, cache[f"blocks.{layer - 1}.hook_resid_post"])
        if type(block).__name__ == "NormedClassBlock":
            continue  # its second norm acts on the stream itself: test_class_attention.py
        attn_out = attn_out + cache.cache_dict.get(f"blocks.{layer}.hook_conv_out", 0.0)
        assert close(pre + attn_out + mlp_out, post)
        if f"blocks.{layer}.hook_resid_mid" in cache:
            assert close(pre + attn_out, cache[f"blocks.{layer}.hook_resid_mid"])


def test_embedding_plus_positions_is_the_full_embedding(name):
    model, images = exact(name)
    _, cache = model.run_with_cache(images)
    positions = cache.cache_dict.get("hook_pos_embed", 0.0)
    assert close(cache["hook_embed"] + positions, cache["hook_full_embed"])
    prefix = len(model.token_grid(images).prefix)
    assert torch.equal(cache["hook_embed"][:, prefix:], cache["hook_patch_embed"])


def test_norm_hooks_hold_denominator_and_normalised_value():
    model, images = exact("class_token")
    _, cache = model.run_with_cache(images)
    stream = cache["blocks.1.hook_resid_mid"]
    scale, normalized = cache["blocks.1.ln2.hook_scale"], cache["blocks.1.ln2.hook_normalized"]
    variance = stream.var(-1, keepdim=True, unbiased=False)
    assert close(scale, (variance + 1e-6).sqrt())
    assert close(normalized * scale, stream - stream.mean(-1, keepdim=True))
    ln2, mlp = model.blocks[1].ln2, model.blocks[1].mlp
    assert close(cache["blocks.1.mlp.hook_pre"], (normalized * ln2.w + ln2.b) @ mlp.W_in + mlp.b_in)


def test_rms_norms_are_not_centred():
    model, images = exact("rms_norm")
    _, cache = model.run_with_cache(images)
    stream, scale = cache["blocks.0.hook_resid_pre"], cache["blocks.0.ln1.hook_scale"]
    assert close(scale, (stream.square().mean(-1, keepdim=True) + model.blocks[0].ln1.eps).sqrt())
    assert close(cache["blocks.0.ln1.hook_normalized"] * scale, stream)
    assert model.cfg.normalization_type == "RMS"


# Heads and neurons -----------------------------------------------------------------------------------------


def test_heads_times_output_weights_are_what_is_added(name):
    if name in NORM_AFTER_ATTENTION:
        pytest.skip("a norm stands between the heads and the stream")
    model, images = exact(name)
    _, cache = model.run_with_cache(images)
    for layer, block in enumerate(model.hooked_blocks):
        added = sum(
            einsum(cache[f"blocks.{layer}.{path}.hook_z"], attn.W_O, "b t h e, h e d -> b t d") + attn.b_O
            for path, attn in block.attentions.items()
        )
        assert close(added, cache[f"blocks.{layer}.hook_attn_out"])


@pytest.mark.parametrize("name", sorted(NORM_AFTER_ATTENTION))
def test_heads_times_output_weights_enter_the_norm_where_one_follows(name):
    model, images = exact(name)
    _, cache = model.run_with_cache(images)
    attn, core = model.blocks[1].attn, model.original.blocks[1] if name in POST_NORM else None
    mixed = einsum(cache["blocks.1.attn.hook_z"], attn.W_O, "b t h e, h e d -> b t d") + attn.b_O
    if core is None:
        core = model.original.transformer.resblocks[1]
        assert close(core.ls_1(core.ln_attn(mixed)), cache["blocks.1.hook_attn_out"])
    else:
        assert close(core.norm1(mixed), cache["blocks.1.hook_attn_out"])


def test_neurons_times_output_weights_are_what_is_added(name):
    if name in POST_NORM:
        pytest.skip("a norm stands between the neurons and the stream")
    model, images = exact(name)
    _, cache = model.run_with_cache(images)
    for layer, block in enumerate(model.hooked_blocks):
        added = sum(
            cache[f"blocks.{layer}.{path}.hook_post"] @ mlp.W_out + mlp.b_out
            for path, mlp in block.mlps_by_name.items()
        )
        assert close(added, cache[f"blocks.{layer}.hook_mlp_out"])


def test_results_of_heads_plus_bias_are_what_is_added_and_are_live(name):
    model, images = exact(name)
    before = set(model.hook_dict)
    with torch.no_grad():
        expected = first(model(images))
        model.set_use_attn_result(True)
        results = sorted(set(model.hook_dict) - before)
        output, cache = model.run_with_cache(images)
        assert close(first(output), expected)
        for hook in results:
            changed = first(model.run_with_hooks(images, fwd_hooks=[(hook, lambda v, hook: v + noise_like(v))]))
            dead = hook.startswith(NOT_IN_THE_OUTPUT.get(name, ()))
            assert ((changed - expected).abs().max() > 1e-4) == (not dead)
    attentions = [(i, path, a) for i, block in enumerate(model.hooked_blocks) for path, a in block.attentions.items()]
    assert results == sorted(f"blocks.{i}.{path}.hook_result" for i, path, _ in attentions)
    for layer in range(model.cfg.n_layers if name not in NORM_AFTER_ATTENTION else 0):
        added = sum(
            cache[f"blocks.{layer}.{path}.hook_result"].sum(2) + attn.b_O for i, path, attn in attentions if i == layer
        )
        assert close(added, cache[f"blocks.{layer}.hook_attn_out"])
    model.set_use_attn_result(False)
    assert set(model.hook_dict) == before


@pytest.mark.parametrize("name", ["class_token", "parallel_scaling", "open_clip", "open_clip_custom", "no_biases"])
def test_queries_keys_and_values_are_the_normed_stream_times_weights(name):
    model, images = exact(name)
    _, cache = model.run_with_cache(images)
    block = model.blocks[1]
    normed = block.ln1(cache["blocks.1.hook_resid_pre"])
    for letter in "VQK" if name != "parallel_scaling" else "V":
        weight, bias = getattr(block.attn, f"W_{letter}"), getattr(block.attn, f"b_{letter}")
        value = einsum(normed, weight, "b t d, h d e -> b t h e") + bias
        assert close(value, cache[f"blocks.1.attn.hook_{letter.lower()}"])


@pytest.mark.parametrize("name", ["class_token", "open_clip", "open_clip_tokens_first", "parallel_things"])
@pytest.mark.parametrize("grad", [True, False])
def test_patterns_are_softmaxed_scores_and_mix_the_values(name, grad):
    model, images = exact(name)
    with torch.set_grad_enabled(grad):
        _, cache = model.run_with_cache(images)
    attn = "blocks.1.attns.1" if name == "parallel_things" else "blocks.1.attn"
    q, k, v = (cache[f"{attn}.hook_{letter}"] for letter in "qkv")
    scores = einsum(q, k, "b i h e, b j h e -> b h i j") / q.shape[-1] ** 0.5
    assert close(cache[f"{attn}.hook_attn_scores"], scores)
    assert close(cache[f"{attn}.hook_pattern"], scores.softmax(-1))
    assert close(cache[f"{attn}.hook_z"], einsum(cache[f"{attn}.hook_pattern"], v, "b h i j, b j h e -> b i h e"))


@pytest.mark.parametrize("name", ["diff_attention", "diff_parallel_scaling"])
def test_differential_patterns_are_differences_by_head(name):
    model, images = exact(name)
    _, cache = model.run_with_cache(images)
    scores, pattern = cache["blocks.1.attn.hook_attn_scores"], cache["blocks.1.attn.hook_pattern"]
    factor = getattr(model.original.blocks[1], "attn", model.original.blocks[1])._compute_lambda().double()
    assert scores.shape[1] == 2 * pattern.shape[1] == 8
    assert close(pattern, scores[:, 0::2].softmax(-1) - factor * scores[:, 1::2].softmax(-1))
    assert cache["blocks.1.attn.hook_q"].shape[2:] == (8, 4)
    assert cache["blocks.1.attn.hook_z"].shape[2:] == (4, 8)


@pytest.mark.parametrize("name", ["dinov2", "glu"])
def test_gated_neurons_are_products(name):
    model, images = exact(name)
    _, cache = model.run_with_cache(images)
    act, mlp = model.original.blocks[0].mlp.act, model.blocks[0].mlp
    pre, linear = cache["blocks.0.mlp.hook_pre"], cache["blocks.0.mlp.hook_pre_linear"]
    normed = model.blocks[0].ln2(cache["blocks.0.hook_resid_mid"])
    assert close(act(pre) * linear, cache["blocks.0.mlp.hook_post"])
    assert close(normed @ mlp.W_gate + mlp.b_gate, pre)
    assert close(normed @ mlp.W_in + mlp.b_in, linear)
    assert model.cfg.gated_mlp


def test_split_gated_weights_belong_to_their_hooks():
    model, images = exact("swiglu")
    _, cache = model.run_with_cache(images)
    mlp, normed = model.blocks[0].mlp, model.blocks[0].ln2(cache["blocks.0.hook_resid_mid"])
    assert close(normed @ mlp.W_gate + mlp.b_gate, cache["blocks.0.mlp.hook_pre"])
    assert close(normed @ mlp.W_in + mlp.b_in, cache["blocks.0.mlp.hook_pre_linear"])


@pytest.mark.parametrize("name", ["class_token", "post_norm", "open_clip", "open_clip_tokens_first", "diff_attention"])
def test_split_inputs_reach_one_head_each(name):
    model, images = exact(name)
    expected, clean = model.run_with_cache(images)
    model.set_use_split_qkv_input(True)

    def move_head_1(value, hook):
        value[:, :, 1] += noise_like(value[:, :, 1])
        return value

    for letter in "qkv":
        hook = f"blocks.1.hook_{letter}_input"
        same = model.run_with_hooks(images, fwd_hooks=[(hook, lambda value, hook: None)])
        assert close(same, expected)
        model.add_hook(hook, move_head_1)
        output, cache = model.run_with_cache(images)
        model.reset_hooks()
        assert (output - expected).abs().max() > 1e-4
        for other in "qkv":
            change = (cache[f"blocks.1.attn.hook_{other}"] - clean[f"blocks.1.attn.hook_{other}"]).abs().amax((0, 1, 3))
            moved = [head for head, size in enumerate(change) if size > 1e-9]
            assert moved == ([1] if other == letter else [])
    model.set_use_split_qkv_input(False)
    assert "blocks.1.hook_q_input" not in model.hook_dict


def test_split_inputs_are_refused_where_branches_share_their_input():
    with pytest.raises(InputError, match="ScalingBlock"):
        HookedViT(TINY_MODELS["parallel_scaling"]()).set_use_split_qkv_input(True)


# Read-out --------------------------------------------------------------------------------------------------


def test_the_representation_is_what_the_library_calls_so(name):
    model, images = HookedViT(TINY_MODELS[name]()), images_for(name)
    _, cache = model.run_with_cache(images, names_filter="hook_representation")
    if name.startswith("open_clip"):
        expected = first(model.original(images))
    else:
        expected = model.original.forward_head(model.original.forward_features(images), pre_logits=True)
    assert torch.equal(cache["hook_representation"], expected)


def test_unembedding_maps_the_representation_to_the_logits(name):
    model, images = exact(name)
    if name.startswith("open_clip") or name in ("no_classifier", "distilled"):
        pytest.skip("the representation is the output, or not all that the classifiers read")
    logits, cache = model.run_with_cache(images)
    assert close(cache["hook_representation"] @ model.W_U + model.b_U, logits)
    assert model.cfg.d_vocab == model.W_U.shape[1] == 10


def test_a_distilled_representation_moves_both_tokens_alike():
    model, images = exact("distilled")
    logits = model(images)
    change = noise_like(torch.empty(32)).double()
    moved = model.run_with_hooks(images, fwd_hooks=[("hook_representation", lambda value, hook: value + change)])
    assert close(moved - logits, (change @ model.W_U).expand_as(logits))


def test_scaled_cosine_attention_is_matched(monkeypatch):
    """open_clip multiplies four axes with ``bmm``, which takes three: mended here, to have something to compare."""
    model = HookedViT(_open_clip(scaled_cosine_attn=True, scale_heads=True)())
    monkeypatch.setattr(open_clip.transformer.torch, "bmm", torch.matmul)
    images = images_for("open_clip")
    expected = model.original(images)
    output, cache = model.run_with_cache(images)
    assert (output - expected).abs().max() <= 1e-6 * expected.abs().max()
    core = model.original.transformer.resblocks[0].attn
    q, k = cache["blocks.0.attn.hook_q"], cache["blocks.0.attn.hook_k"]
    assert functional.cosine_similarity(q, q, dim=-1).allclose(q.square().sum(-1), atol=1e-6)
    scores = einsum(q, k, "b i h e, b j h e -> b h i j") * core.logit_scale.clamp(max=core.logit_scale_max).exp()
    assert scores.allclose(cache["blocks.0.attn.hook_attn_scores"], atol=1e-5)


@pytest.mark.parametrize("name", ["layer_scale", "parallel_scaling", "open_clip", "open_clip_tokens_first"])
def test_the_way_through_results_and_split_inputs_is_made_of_products(name):
    model, images = exact(name)
    model.set_use_attn_result(True)
    looked_at = ["blocks.1.attn.hook_result"]
    if name != "parallel_scaling":
        model.set_use_split_qkv_input(True)
        looked_at.append("blocks.1.hook_v_input")
    with model.hooks([(hook, lambda value, hook: None) for hook in looked_at]), torch.no_grad():
        program = torch.export.export(model, (images,), strict=False)
    operations = {str(node.target) for node in program.graph.nodes}
    assert "aten.matmul.default" in operations
    assert "aten.einsum.default" not in operations, "the frozen map has no rule for it"


@pytest.mark.parametrize("name", ["parallel_scaling_fused", "diff_parallel_scaling", "no_biases"])
def test_what_has_no_output_bias_adds_none(name):
    model, images = exact(name)
    model.set_use_attn_result(True)
    for look in ("blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.attn.hook_result"):
        with model.hooks([(look, lambda value, hook: None)]):
            parts = decompose(model, images, by="head")
        constants = [component.label for component in parts.components if component.kind == "constant"]
        assert constants
        assert [label for label in constants if not parts[label].any()] == []
    attn = model.hooked_blocks[1].attentions["attn"]
    assert not attn.has_output_bias
    assert attn.b_O.shape == (32,)
    assert not attn.b_O.any()
