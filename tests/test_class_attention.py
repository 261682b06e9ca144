"""CaiT and XCiT: a class token that comes in late, heads that talk, channels that attend to each other."""

from functools import cache

import pytest
import torch
from einops import einsum
from timm.models.cait import Cait, TalkingHeadAttn
from timm.models.xcit import Xcit
from tiny_models import TINY, TINY_MODELS, images_for, perturb

from vitdecomp_lens import HookedViT, attribute_tokens, decompose
from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.frozen.program import Program
from vitdecomp_lens.frozen.trace import trace
from vitdecomp_lens.request import make_request

CAIT = ["cait", "cait_mean_pool", "cait_no_biases"]
XCIT = ["xcit", "xcit_tokens_norm", "xcit_no_positions", "xcit_patch16", "xcit_mean_pool"]
BY_CLASS_TOKEN = ["cait", "cait_no_biases", "xcit", "xcit_tokens_norm", "xcit_no_positions", "xcit_patch16"]
slow_by_token = pytest.mark.filterwarnings("ignore::vitdecomp_lens.errors.VitDecompWarning")


def exact(name):
    return HookedViT(TINY_MODELS[name]().double()), images_for(name).double()


@cache
def traced(name):
    """The same for tests that only decompose: what takes time is to trace a model."""
    return exact(name)


def cached(name):
    model, images = exact(name)
    with torch.no_grad():
        return model, images, model.run_with_cache(images)[1]


def close(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


def directions(count=2):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# Which tokens are where --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cait", "xcit", "xcit_tokens_norm"])
def test_only_the_class_token_attends_in_the_last_blocks(name):
    model, images, cache = cached(name)
    model.set_use_attn_result(True)
    result = model.run_with_cache(images, names_filter="blocks.2.attn.hook_result")[1]["blocks.2.attn.hook_result"]
    assert result.shape == (3, 1, 4, 32)
    for hook in ("attn.hook_q", "attn.hook_z"):
        assert cache[f"blocks.2.{hook}"].shape == (3, 1, 4, 8)
    for hook in ("attn.hook_k", "attn.hook_v"):
        assert cache[f"blocks.2.{hook}"].shape == (3, 17, 4, 8)
    assert cache["blocks.2.attn.hook_pattern"].shape == (3, 4, 1, 17)
    assert cache["blocks.2.ln1.hook_normalized"].shape == (3, 17, 32)
    assert cache["blocks.2.ln2.hook_normalized"].shape == (3, 17 if name == "xcit_tokens_norm" else 1, 32)
    assert cache["blocks.2.hook_attn_out"].shape == cache["blocks.2.hook_mlp_out"].shape == (3, 1, 32)
    stream = (3, 1 if name == "cait" else 17, 32)
    assert all(cache[f"blocks.2.hook_resid_{where}"].shape == stream for where in ("pre", "mid", "post"))
    assert cache["blocks.1.hook_resid_post"].shape == (3, 16, 32)
    assert cache["ln_final.hook_normalized"].shape == (3, 17, 32)


PATCHES, CLASS_AND_PATCHES = TokenGrid(4, 4, (32, 32)), TokenGrid(4, 4, (32, 32), ("CLS",))
CLASS = TokenGrid(0, 0, (32, 32), ("CLS",))


@pytest.mark.parametrize("name", ["cait", "xcit", "xcit_tokens_norm"])
def test_grids_say_which_tokens_a_hook_sees(name):
    model, images = exact(name)
    model.set_use_attn_result(True)
    grid_at = lambda hook: model.token_grid(images, hook)  # noqa: E731
    assert model.token_grid(images) == PATCHES
    assert {grid_at(h) for h in ("hook_full_embed", "blocks.1.attn.hook_v", "blocks.1.hook_resid_post")} == {PATCHES}
    assert {grid_at(f"blocks.2.attn.hook_{what}") for what in ("k", "v", "pattern")} == {CLASS_AND_PATCHES}
    assert {grid_at(h) for h in ("blocks.2.ln1.hook_scale", "ln_final.hook_scale")} == {CLASS_AND_PATCHES}
    added = ("attn.hook_q", "attn.hook_z", "attn.hook_result", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")
    assert {grid_at(f"blocks.3.{hook}") for hook in added} == {CLASS}
    stream = CLASS if name == "cait" else CLASS_AND_PATCHES
    assert {grid_at(f"blocks.3.hook_resid_{where}") for where in ("pre", "mid", "post")} == {stream}
    assert grid_at("blocks.3.ln2.hook_scale") == (CLASS_AND_PATCHES if name == "xcit_tokens_norm" else CLASS)
    assert CLASS.names == ("CLS",)
    assert CLASS.rectangle(0) is None


def test_tokens_lie_row_by_row_in_images_that_are_not_square():
    options = {**TINY, "img_size": (32, 48)}
    images = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    for original, reach in ((Cait(**options), 0), (Xcit(**options, cls_attn_layers=1), 1)):
        model = HookedViT(perturb(original))
        grid = model.token_grid(images, "blocks.2.attn.hook_v")
        assert (grid.rows, grid.columns, len(grid)) == (4, 6, 25)
        top, left, bottom, right = map(int, grid.rectangle(1 + 6 + 4))
        changed = images.clone()
        changed[:, :, top:bottom, left:right] += 1
        before, after = (model.run_with_cache(x, names_filter="hook_embed")[1]["hook_embed"] for x in (images, changed))
        moved = (after - before).abs().amax((0, 2)).unflatten(0, (4, 6))
        assert moved[1, 4] > 1e-2
        # Where convolutions overlap, a pixel reaches the patches beside its own.
        moved[max(0, 1 - reach) : 2 + reach, 4 - reach : 5 + reach] = 0
        assert moved.max() < 1e-6


# What the hooks mean -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAIT)
def test_talking_heads_mix_scores_before_the_softmax_and_patterns_after_it(name):
    model, _, cache = cached(name)
    core = model.original.blocks[1].attn
    q, k, v, z = (cache[f"blocks.1.attn.hook_{what}"] for what in "qkvz")
    raw = einsum(q, k, "b i h e, b j h e -> b h i j") * core.scale
    scores = einsum(raw, core.proj_l.weight, "b h i j, g h -> b g i j") + core.proj_l.bias[:, None, None]
    close(cache["blocks.1.attn.hook_attn_scores"], scores)
    pattern = (
        einsum(scores.softmax(-1), core.proj_w.weight, "b h i j, g h -> b g i j") + core.proj_w.bias[:, None, None]
    )
    close(cache["blocks.1.attn.hook_pattern"], pattern)
    close(einsum(cache["blocks.1.attn.hook_pattern"], v, "b h i j, b j h e -> b i h e"), z)
    assert (pattern.sum(-1) - 1).abs().max() > 0.1


@pytest.mark.parametrize("name", ["cait", "xcit"])
def test_class_attention_mixes_the_values_of_all_tokens(name):
    model, _, cache = cached(name)
    q, k, v, z = (cache[f"blocks.3.attn.hook_{what}"] for what in "qkvz")
    scores = einsum(q, k, "b i h e, b j h e -> b h i j") / 8**0.5
    close(cache["blocks.3.attn.hook_attn_scores"], scores)
    close(cache["blocks.3.attn.hook_pattern"], scores.softmax(-1))
    close(einsum(cache["blocks.3.attn.hook_pattern"], v, "b h i j, b j h e -> b i h e"), z)
    attn, ln1 = model.blocks[3].attn, model.blocks[3].ln1
    normed = cache["blocks.3.ln1.hook_normalized"] * ln1.w + ln1.b
    for letter, tokens in (("Q", normed[:, :1]), ("K", normed), ("V", normed)):
        weight, bias = getattr(attn, f"W_{letter}"), getattr(attn, f"b_{letter}")
        close(cache[f"blocks.3.attn.hook_{letter.lower()}"], einsum(tokens, weight, "b t d, h d e -> b t h e") + bias)


def test_the_class_token_attends_to_the_patches_as_the_blocks_before_left_them():
    model, _, cache = cached("cait")
    stream, patches = cache["blocks.3.hook_resid_pre"], cache["blocks.1.hook_resid_post"]
    tokens = torch.cat([stream, patches], dim=1)
    scale = (tokens.var(-1, unbiased=False, keepdim=True) + model.blocks[3].ln1.eps).sqrt()
    close(cache["blocks.3.ln1.hook_scale"], scale)
    close(cache["blocks.2.hook_resid_pre"], model.original.cls_token.expand(3, -1, -1))


@pytest.mark.parametrize("name", XCIT)
def test_channels_attend_to_channels(name):
    model, _, cache = cached(name)
    temperature = model.original.blocks[1].attn.temperature
    q, k, v, z = (cache[f"blocks.1.attn.hook_{what}"] for what in "qkvz")
    close(q.square().sum(1), torch.ones_like(q[:, 0]))
    close(k.square().sum(1), torch.ones_like(q[:, 0]))
    scores = einsum(q, k, "b t h c, b t h d -> b h c d") * temperature
    close(cache["blocks.1.attn.hook_attn_scores"], scores)
    close(cache["blocks.1.attn.hook_pattern"], scores.softmax(-1))
    close(einsum(scores.softmax(-1), v, "b h c d, b t h d -> b t h c"), z)


def test_in_channel_attention_a_token_writes_to_its_own_place():
    model, images, cache = cached("xcit")

    def move(value, hook):
        value[:, 5] += 1
        return value

    with model.hooks([("blocks.1.attn.hook_v", move)]), torch.no_grad():
        moved = model.run_with_cache(images, names_filter="blocks.1.attn.hook_z")[1]["blocks.1.attn.hook_z"]
    change = (moved - cache["blocks.1.attn.hook_z"]).abs().amax((0, 2, 3))
    assert change[5] > 0.1
    change[5] = 0
    assert change.max() < 1e-12


@pytest.mark.parametrize("name", XCIT)
def test_channel_blocks_have_three_branches(name):
    model, _, cache = cached(name)
    block, core = model.blocks[1], model.original.blocks[1]
    pre, attn, conv, mid = (cache[f"blocks.1.hook_{w}"] for w in ("resid_pre", "attn_out", "conv_out", "resid_mid"))
    with torch.no_grad():
        close(core.gamma3 * core.local_mp(core.norm3(pre + attn), 4, 4), conv)
        close(core.gamma2 * core.mlp(core.norm2(mid)), cache["blocks.1.hook_mlp_out"])
    close(pre + attn + conv, mid)
    assert block.has_convolution
    hooks = [hook for hook in model.hook_dict if hook.startswith("blocks.1.hook_")]
    order = ("resid_pre", "attn_out", "conv_out", "resid_mid", "mlp_out", "resid_post")
    assert hooks == [f"blocks.1.hook_{what}" for what in order]


@pytest.mark.parametrize("name", XCIT)
def test_norms_of_class_blocks_act_on_the_stream_itself(name):
    model, _, cache = cached(name)
    core, tokens_norm = model.original.cls_attn_blocks[0], "tokens_norm" in name or name == "xcit_mean_pool"
    pre, mid, post = (cache[f"blocks.2.hook_resid_{where}"] for where in ("pre", "mid", "post"))
    attn_out, mlp_out = cache["blocks.2.hook_attn_out"], cache["blocks.2.hook_mlp_out"]
    with torch.no_grad():
        close(mid[:, :1], pre[:, :1] + attn_out)
        close(mid[:, 1:], pre[:, 1:] + core.gamma1 * core.norm1(pre)[:, 1:])
        close(post[:, :1], core.norm2(mid)[:, :1] + mlp_out)
        close(mlp_out, core.gamma2 * core.mlp(core.norm2(mid)[:, :1]))
        close(post[:, 1:], 2 * (core.norm2(mid) if tokens_norm else mid)[:, 1:])


def test_positions_are_what_the_module_makes_of_rows_and_columns():
    model, _, cache = cached("xcit")
    expected = model.original.pos_embed(3, 4, 4).flatten(2).transpose(1, 2)
    assert torch.equal(cache["hook_pos_embed"], expected)
    assert torch.equal(cache["hook_embed"], cache["hook_patch_embed"])


# How the libraries run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind", "fused"), [("xcit", "XCA", True), ("xcit", "ClassAttn", False)])
def test_either_kernel_of_the_library_is_matched_bit_for_bit(name, kind, fused):
    original = TINY_MODELS[name]()
    chosen = [module for module in original.modules() if type(module).__name__ == kind]
    for module in chosen:
        assert module.fused_attn != fused
        module.fused_attn = fused
    model, images = HookedViT(original), images_for(name)
    slower = ("hook_pattern", "hook_attn_scores", "hook_scale", "hook_normalized")
    output, _ = model.run_with_cache(images, names_filter=lambda hook: not hook.endswith(slower))
    assert torch.equal(output, original(images))
    torch.testing.assert_close(model.run_with_cache(images)[0], original(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 24), (8, 48)])
def test_xcit_takes_any_size_that_patches_tile(size):
    model = HookedViT(TINY_MODELS["xcit"]().double())
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    slower = ("hook_pattern", "hook_attn_scores", "hook_scale", "hook_normalized")
    output, cache = model.run_with_cache(images, names_filter=lambda hook: not hook.endswith(slower))
    assert torch.equal(output, model.original(images))
    grid = model.token_grid(images)
    assert (grid.rows, grid.columns, grid.image_size) == (size[0] // 8, size[1] // 8, size)
    assert cache["hook_full_embed"].shape[1] == len(grid)
    assert decompose(model, images).gap.max() < 1e-10


@pytest.mark.parametrize(("name", "size"), [("xcit", 36), ("xcit_patch16", 56), ("cait", 36), ("cait", 40)])
def test_other_sizes_are_refused(name, size):
    model = HookedViT(TINY_MODELS[name]())
    with pytest.raises(InputError, match=r"multiples of|\[batch, 3, 32, 32\]"):
        model(torch.zeros(1, 3, size, size))


@pytest.mark.parametrize("name", ["cait", "xcit"])
def test_gradient_checkpoints_change_nothing(name):
    original = TINY_MODELS[name]()
    original.set_grad_checkpointing()
    model, images = HookedViT(original), images_for(name)
    assert torch.equal(model(images), original(images))


@pytest.mark.parametrize(("name", "blocks"), [("cait", "blocks_token_only"), ("xcit", "cls_attn_blocks")])
def test_hooks_that_users_put_on_class_blocks_run_too(name, blocks):
    original = TINY_MODELS[name]()
    before = original(images_for(name))
    getattr(original, blocks)[0].register_forward_hook(lambda module, args, output: output * 2)
    getattr(original, blocks)[1].attn.register_forward_hook(lambda module, args, output: output * 3)
    model = HookedViT(original)
    assert not torch.equal(before, original(images_for(name)))
    assert torch.equal(model(images_for(name)), original(images_for(name)))


@pytest.mark.parametrize("name", ["cait", "xcit"])
def test_split_inputs_reach_one_head_each_and_the_query_is_the_class_tokens(name):
    model, images, clean = cached(name)
    model.set_use_split_qkv_input(True)

    def move_head_1(value, hook):
        value[:, :, 1] += 0.5 * torch.linspace(-1, 1, value.shape[-1]).to(value)
        return value

    for layer, tokens in ((1, 16), (2, 17)):
        for letter in "qkv":
            hook = f"blocks.{layer}.hook_{letter}_input"
            seen = model.run_with_cache(images, names_filter=hook)[1][hook]
            assert seen.shape == (3, 1 if (layer, letter) == (2, "q") else tokens, 4, 32)
            assert seen.shape[1] == len(model.token_grid(images, hook))
            with model.hooks([(hook, move_head_1)]), torch.no_grad():
                cache = model.run_with_cache(images)[1]
            for other in "qkv":
                point = f"blocks.{layer}.attn.hook_{other}"
                change = (cache[point] - clean[point]).abs().amax((0, 1, 3))
                assert [h for h, size in enumerate(change) if size > 1e-9] == ([1] if other == letter else [])


# Decompositions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAIT + XCIT)
@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
def test_cuts_by_component_take_the_fast_way(name, by):
    model, images = traced(name)
    assert decompose(model, images, by=by).gap.max() < 1e-10  # a warning, which the slow way gives, would be an error
    assert type(make_request(model, images, by, "representation", None, tokens=False).program) is Program


@pytest.mark.parametrize("name", BY_CLASS_TOKEN)
def test_a_class_token_is_a_constant_and_only_blocks_that_change_it_write_into_it(name):
    model, images = traced(name)
    parts = decompose(model, images)
    assert parts["cls_token"].abs().max() > 1e-3
    writers = {layer for layer in range(model.cfg.n_layers) if parts.select(layer=layer).values.any()}
    assert writers == set(range(2, model.cfg.n_layers))
    assert not parts["embed"].any()


@pytest.mark.parametrize("name", ["cait_mean_pool", "xcit_mean_pool"])
def test_in_a_mean_of_patches_the_class_token_has_no_part(name):
    parts = decompose(*traced(name))
    assert "cls_token" not in parts or not parts["cls_token"].any()
    writers = {layer for layer in range(4) if parts.select(layer=layer).values.any()}
    assert writers == {0, 1}


def test_scores_by_token_of_class_attention_have_the_class_token_before_the_patches():
    check_blocks_by_grid("cait", patches=11, class_and_patches=8, class_only=2)


def test_scores_by_token_of_xcit_too():
    check_blocks_by_grid("xcit", patches=13, class_and_patches=8, class_only=2)


def check_blocks_by_grid(name, **counts):
    model, images = traced(name)
    tokens = attribute_tokens(model, images, directions())
    found = {block.grid: len(block) for block in tokens.blocks}
    assert found == dict(zip((PATCHES, CLASS_AND_PATCHES, CLASS), counts.values(), strict=True))
    assert tokens["L2H0"].shape == (3, 17, 2)
    assert tokens["L2H0"].abs().amin((0, 2)).min() > 0
    assert tokens["mlp.3"].shape == (3, 1, 2)
    parts = decompose(model, images)
    close(tokens["mlp.3"][:, 0], parts["mlp.3"] @ directions().T)
    close(tokens["L3H1"].sum(1), parts["L3H1"] @ directions().T)


@slow_by_token
@pytest.mark.parametrize("name", CAIT + XCIT)
def test_scores_by_token_are_those_of_the_token_that_is_moved(name):
    """The replay of the cut at ``hook_v`` with nothing but one token's values is the score of that token."""
    model, images = traced(name)
    u = directions()
    points = {p.hook: p for p in model.token_points("head")}
    graph = trace(model, images[:1], listened=list(points))
    cut = graph.cut(list(points))
    recorded, scores = graph.record(images), attribute_tokens(model, images, u)
    nothing = graph.replay(cut, recorded, {})
    for hook, point in points.items():
        value = recorded[cut.points[hook]]
        for token in {0, value.shape[1] // 2, value.shape[1] - 1}:
            head = token % value.shape[2] if point.axis else slice(None)
            kept = torch.zeros_like(value)
            kept[:, token, head] = value[:, token, head]
            alone = (graph.replay(cut, recorded, {hook: kept}) - nothing) @ u.T
            component = point.components(1)[0] if point.axis is None else point.components(value.shape[2])[head]
            torch.testing.assert_close(scores[component.label][:, token], alone, rtol=0, atol=1e-10)


# What is refused ---------------------------------------------------------------------------------------------------


def test_what_hooking_relies_on_may_not_be_overridden():
    class Changed(Cait):
        def forward_cls(self, x):
            return super().forward_cls(x) * 2

    with pytest.raises(UnsupportedModelError, match="Changed overrides forward_cls of Cait"):
        HookedViT(Changed(**TINY).eval())


def test_unknown_attention_is_refused_by_name():
    class Other(TalkingHeadAttn):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(UnsupportedModelError, match=r"attention .*Other cannot be hooked"):
        HookedViT(Cait(**TINY, attn_block=Other).eval())


@pytest.mark.parametrize("name", ["cait", "xcit"])
def test_a_model_whose_class_attention_was_pruned_is_a_column_of_patches(name):
    original = TINY_MODELS[name]()
    original.prune_intermediate_layers(1)
    original.global_pool = "avg"
    model, images = HookedViT(original.double()), images_for(name).double()
    assert torch.equal(model(images), original(images))
    assert model.token_grid(images, "ln_final.hook_scale") == PATCHES
    assert decompose(model, images).gap.max() < 1e-10
