"""Total effects against edited weights and patched originals, in float64."""

import copy
from functools import cache

import pytest
import staged_models
import torch
from foreign_vit import ForeignViT
from labelled_samples import as_users_run_it
from tiny_models import TINY_MODELS, images_for
from torch import nn
from torch.nn import functional
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens import HookedViT, attribute, decompose
from vitdecomp_lens.errors import CapacityError, InputError, UnknownNameError, UnsupportedModelError
from vitdecomp_lens.intervene import Reference, ablate_run, ablating, total_effects
from vitdecomp_lens.intervening.reference import taken

HOWS = ("zero", "mean", "position_mean", "resample")


@cache
def original(name):
    made = TINY_MODELS[name] if name in TINY_MODELS else staged_models.STAGED_MODELS[name]
    return made().double().requires_grad_(False)


def images_of(name, batch=3, seed=1):
    if name in TINY_MODELS:
        return images_for(name, batch, seed=seed).double()
    return staged_models.images_for(name, batch, seed=seed)


def setup(name="class_token"):
    return HookedViT(original(name)), images_of(name), images_of(name, 5, seed=9)


def edited(name):
    """A copy of the unmodified model whose weights a test may change."""
    return copy.deepcopy(original(name))


def no_hooks_are_left(model):
    return not any(p._forward_hooks or p._forward_pre_hooks for p in model.modules() if isinstance(p, HookPoint))


# ---- against edited weights


def projections(model):
    """The output projection of each attention of an unmodified model."""
    if hasattr(model, "visual"):
        model = model.visual
    if hasattr(model, "transformer"):
        return [block.attn.out_proj for block in model.transformer.resblocks]
    return [block.attn.proj for block in model.blocks]


def columns(projection, head, heads=4):
    width = projection.weight.shape[1] // heads
    return slice(head * width, (head + 1) * width)


def run_original(model, images):
    return model.encode_image(images) if hasattr(model, "encode_image") else model(images)


def same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


FAMILIES = ["class_token", "layer_scale", "distilled", "inner_norms", "gated_attention", "siglip", "post_norm"]
FAMILIES += ["eva02", "beit", "open_clip", "open_clip_tokens_first", "open_clip_whole"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_that_is_zeroed_is_one_whose_rows_of_the_projection_are_zero(name):
    model, images, _ = setup(name)
    by_hand = edited(name)
    for layer, head in ((0, 2), (1, 1), (1, 3)):
        projection = projections(by_hand)[layer]
        projection.weight[:, columns(projection, head)] = 0
    changed = ablate_run(model, images, components=["L0H2", "L1H1", "L1H3"], how="zero")
    same(changed, run_original(by_hand, images))
    assert not torch.allclose(changed, model(images))


@pytest.mark.parametrize("name", ["class_token", "distilled", "eva02", "open_clip"])
def test_a_mean_that_is_written_is_a_bias(name):
    model, images, reference = setup(name)
    by_hand = edited(name)
    projection = projections(by_hand)[1]
    seen = []
    handle = projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    if not hasattr(by_hand, "transformer"):
        for image in reference:
            run_original(by_hand, image[None])
    else:  # open_clip's attention takes the projection's weights without calling it
        with HookedViT(edited(name)).hooks([("blocks.1.attn.hook_z", lambda z, hook: seen.append(z.flatten(2)))]) as m:
            for image in reference:
                m(image[None])
    handle.remove()
    mean = torch.cat([z.flatten(0, 1) for z in seen]).mean(0)
    here = columns(projection, 2)
    projection.bias += projection.weight[:, here] @ mean[here]
    projection.weight[:, here] = 0
    same(ablate_run(model, images, components=["L1H2"], reference=reference), run_original(by_hand, images))


@pytest.mark.parametrize("name", ["class_token", "layer_scale"])
def test_layers_and_neurons_that_are_zeroed_have_zero_weights(name):
    model, images, _ = setup(name)
    by_hand = edited(name)
    by_hand.blocks[0].mlp.fc2.weight[:, 5] = 0
    for layer in (by_hand.blocks[1].mlp.fc2, by_hand.blocks[0].attn.proj):
        layer.weight[:], layer.bias[:] = 0, 0
    same(ablate_run(model, images, components=["L0N5", "mlp.1", "attn.0"], how="zero"), by_hand(images))
    embedded = edited(name)
    embedded.patch_embed.proj.weight[:], embedded.patch_embed.proj.bias[:] = 0, 0
    same(ablate_run(model, images, components="embed", how="zero"), embedded(images))


def test_heads_of_parallel_attentions_are_numbered_on():
    model, images, _ = setup("parallel_things")
    by_hand = edited("parallel_things")
    projection = by_hand.blocks[1].attns[1].attn.proj
    projection.weight[:, columns(projection, 1)] = 0
    same(ablate_run(model, images, components=["L1H5"], how="zero"), by_hand(images))


def test_a_convolution_that_is_zeroed_has_zero_weights():
    model, images, _ = setup("maxvit")
    by_hand = edited("maxvit")
    last = by_hand.stages[1].blocks[0].conv.conv3_1x1
    last.weight[:] = 0
    if last.bias is not None:
        last.bias[:] = 0
    convolutions = [p.component.label for p in model.component_points("layer") if p.component.kind == "conv"]
    same(ablate_run(model, images, components=[convolutions[1]], how="zero"), by_hand(images))


# ---- windows


def z_by_hand(name, layer, images, change=None):
    """The unmodified model with what enters an attention's output projection, window by window, seen and changed."""
    model, seen = edited(name), []
    blocks = [block for stage in model.layers for block in stage.blocks]

    def hook(_module, args):
        seen.append(args[0])
        return None if change is None else (change(args[0]),)

    blocks[layer].attn.proj.register_forward_pre_hook(hook)
    return model(images), seen[0]


@pytest.mark.parametrize("name", ["swin", "swin_padded"])
def test_a_mean_by_position_follows_the_windows(name):
    model, images, reference = setup(name)
    _, z = z_by_hand(name, 1, reference)
    mean = z.unflatten(0, (len(reference), -1)).mean(0)  # each window by itself: shifted and padded as it is

    def change(z):
        z = z.clone()
        z[..., columns(model.original.layers[0].blocks[1].attn.proj, 0, heads=2)] = mean.repeat(len(images), 1, 1)[
            ..., columns(model.original.layers[0].blocks[1].attn.proj, 0, heads=2)
        ]
        return z

    output, _ = z_by_hand(name, 1, images, change)
    same(ablate_run(model, images, components=["L1H0"], how="position_mean", reference=reference), output)


@pytest.mark.parametrize("name", ["class_token", "swin_padded", "maxvit", "hiera"])
def test_all_heads_at_their_mean_are_the_attention_at_its_mean(name):
    model, images, reference = setup(name)
    for layer in (1, len(model.blocks) - 1):
        if not model.hooked_blocks[layer].attentions:
            continue
        count = model.hooked_blocks[layer].attentions["attn"].heads
        heads = [f"L{layer}H{head}" for head in range(count)]
        whole = ablate_run(model, images, components=[f"attn.{layer}"], reference=reference)
        same(ablate_run(model, images, components=heads, reference=reference), whole)


@pytest.mark.parametrize("how", ["mean", "position_mean"])
def test_an_attention_in_shifted_windows_is_replaced_in_the_image(how):
    model, images, reference = setup("swin_padded")
    by_hand = edited("swin_padded")
    block, seen = by_hand.layers[0].blocks[1], []
    attend = block._attn
    block._attn = lambda x: seen.append(attend(x)) or seen[-1]
    by_hand(reference)
    mean = seen[0].mean(0, keepdim=True) if how == "position_mean" else seen[0].mean((0, 1, 2), keepdim=True)
    block._attn = lambda x: mean.expand_as(x)
    same(ablate_run(model, images, components=["attn.1"], how=how, reference=reference), by_hand(images))


# ---- direct and total effects


def test_without_a_final_norm_the_last_mlp_has_its_direct_effect():
    model, images, reference = setup("no_final_norm")
    parts, others = decompose(model, images), decompose(model, reference)
    total = total_effects(model, images, ["mlp.1"], how="zero")
    same(total["mlp.1"], -parts["mlp.1"])
    same(total.total, parts.total)
    # What the mean of a contribution is in a sum, the mean by position is in a run; resampling draws the same images.
    for how, direct in (("position_mean", "mean"), ("resample", "resample")):
        generator = torch.Generator().manual_seed(4)
        expected = parts.ablate("mlp.1", how=direct, reference=others, generator=generator).sum() - parts.sum()
        found = total_effects(model, images, ["mlp.1"], how=how, reference=reference, seed=4)
        same(found["mlp.1"], expected)
        assert found["mlp.1"].abs().max() > 1e-3


def test_with_a_final_norm_the_last_mlp_moves_its_statistics_too():
    model, images, _ = setup("class_token")
    by_hand, seen = original("class_token"), {}
    handles = [
        by_hand.norm.register_forward_pre_hook(lambda _m, args: seen.update(stream=args[0])),
        by_hand.blocks[1].mlp.register_forward_hook(lambda _m, _args, out: seen.update(mlp=out)),
    ]
    by_hand(images)
    for handle in handles:
        handle.remove()
    expected = by_hand.norm(seen["stream"] - seen["mlp"])[:, 0]
    clean = by_hand.norm(seen["stream"])[:, 0]
    directions = torch.randn(3, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    total = total_effects(model, images, ["mlp.1"], how="zero", directions=directions, names=("a", "b", "c"))
    same(total["mlp.1"], (expected - clean) @ directions.T)
    assert total.directions == ("a", "b", "c")
    direct = attribute(model, images, directions, by="layer")
    assert not torch.allclose(total["mlp.1"], -direct["mlp.1"])
    same(total.total, direct.total)


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
def test_effects_of_all_components_are_those_of_single_runs(by):
    model, images, reference = setup("dinov2_reg")
    effects = total_effects(model, images, by=by, how="mean", reference=reference, of="logits", batch_size=2)
    assert not effects.complete
    expected = {label for label, c in zip(*_labels(decompose(model, images, by=by)), strict=True) if c != "constant"}
    assert set(effects.labels) == expected
    assert effects.metadata["effect"] == "total"
    some = effects.labels[:: max(1, len(effects) // 6)]
    for label in some:
        changed = ablate_run(model, images, components=[label], reference=reference)
        same(effects[label], changed - model(images))


def _labels(parts):
    return parts.labels, [component.kind for component in parts.components]


def test_effects_in_another_space_are_those_of_decomposing_the_edited_run():
    model, images, _ = setup()
    matrix = torch.randn(32, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def mapped(model, images):
        return decompose(model, images).map(matrix).total

    effects = total_effects(model, images, ["L0H1", "mlp.0"], how="zero", of=mapped)
    plain = total_effects(model, images, ["L0H1", "mlp.0"], how="zero")
    same(effects.values, plain.values @ matrix)
    assert effects.metadata["of"] == "mapped"


# ---- the reference


@pytest.mark.parametrize("name", ["distilled", "swin_padded", "siglip"])
def test_a_reference_in_batches_is_a_plain_mean(name):
    model, images, reference = setup(name)
    _, cache = model.run_with_cache(reference)
    gathered = Reference.of(model, (batch for batch in reference.split([1, 3, 1])), batch_size=2)
    assert gathered.count == 5
    assert repr(gathered) == f"Reference(5 images, {len(gathered.means)} hooks)"
    for hook, mean in gathered.position_means.items():
        same(mean[0], cache[hook].mean(0))
    hook = "blocks.1.attn.hook_z"
    padding = sum(token.startswith("pad") for token in model.token_grid(images, hook).prefix)
    assert (padding > 0) == (name == "swin_padded")
    same(gathered.means[hook][0, 0], cache[hook][:, padding:].mean((0, 1)))
    for how in ("mean", "position_mean"):
        for component in ("L1H1", "attn.1", "L1N3", "mlp.0"):
            once = ablate_run(model, images, components=[component], how=how, reference=gathered)
            same(once, ablate_run(model, images, components=[component], how=how, reference=reference))
    with pytest.raises(InputError, match="those of an iterator are gone"):
        ablate_run(model, images, components=["L1H1"], how="resample", reference=gathered)


def test_a_reference_of_some_components_has_no_others():
    model, images, reference = setup()
    gathered = Reference.of(model, reference, components=["L1H0"])
    ablate_run(model, images, components=["L1H3"], reference=gathered)  # of the same hook
    with pytest.raises(InputError, match=r"nothing of the hook 'blocks.0.hook_mlp_out'"):
        ablate_run(model, images, components=["mlp.0"], reference=gathered)


def test_resampled_components_have_what_one_other_image_has():
    model, images, reference = setup()
    drawn = torch.randint(5, (3,), generator=torch.Generator().manual_seed(11))
    _, cache = model.run_with_cache(reference[drawn])
    with model.hooks(
        [
            ("blocks.0.attn.hook_z", lambda z, hook: z.index_copy(2, torch.tensor([1]), cache[hook.name][:, :, 1:2])),
            ("blocks.1.hook_mlp_out", lambda _value, hook: cache[hook.name]),
        ]
    ):
        expected = model(images)
    components = ["L0H1", "mlp.1"]
    kept = Reference.of(model, [reference[:2], reference[2:]], components=components)
    for given in (reference, list(reference.split(2)), kept):
        found = ablate_run(model, images, components=components, how="resample", reference=given, seed=11)
        same(found, expected)
        one_by_one = ablate_run(
            model, images, components=components, how="resample", reference=given, seed=11, batch_size=1
        )
        same(one_by_one, expected)
    assert torch.equal(taken(list(reference.split(2)), torch.tensor([4, 0, 2])), reference[[4, 0, 2]])


# ---- the run


def test_without_components_it_is_the_plain_run_bit_for_bit():
    model = HookedViT(TINY_MODELS["class_token"]())
    images = images_for("class_token")
    for how in HOWS:
        assert torch.equal(ablate_run(model, images, components=[], how=how), model.original(images))


@pytest.mark.parametrize("how", HOWS)
def test_micro_batches_change_nothing(how):
    model, images, reference = setup("distilled")
    components = ["L0H1", "attn.1", "mlp.0"]
    whole = ablate_run(model, images, components=components, how=how, reference=reference)
    cut = ablate_run(model, images, components=components, how=how, reference=reference, batch_size=2)
    same(cut, whole)
    assert not torch.allclose(whole, model(images))


@pytest.mark.parametrize("components", [["L0H1"], ["mlp.1", "attn.0"], ["L0N3"]])
def test_attention_stays_fused(components, monkeypatch):
    model, images, reference = setup("class_token")
    calls, fused = [], functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or fused(*args, **kw)
    )
    ablate_run(model, images, components=components, how="zero")
    assert len(calls) == 2
    Reference.of(model, reference)
    assert len(calls) == 4


def test_hooks_of_the_users_take_part_and_the_ablation_comes_last():
    model, images, _ = setup()
    by_hand = edited("class_token")
    by_hand.blocks[0].attn.proj.weight *= 2
    by_hand.blocks[0].attn.proj.weight[:, columns(by_hand.blocks[0].attn.proj, 1)] = 0
    seen = []
    user = [
        ("blocks.0.attn.hook_z", lambda z, hook: 2 * z),
        ("blocks.1.hook_resid_pre", lambda value, hook: seen.append(value)),
    ]
    with model.hooks(user):
        same(ablate_run(model, images, components=["L0H1"], how="zero"), by_hand(images))
        doubled = Reference.of(model, images)
        points = {name: len(point._forward_hooks) for name, point in model.hook_dict.items()}
        assert sum(points.values()) == 2
    torch.testing.assert_close(2 * Reference.of(model, images).means["blocks.0.attn.hook_z"], doubled.means[user[0][0]])
    assert len(seen[0]) == 3
    assert no_hooks_are_left(model)


def test_no_hook_is_left_after_an_error():
    model, images, reference = setup()

    def fail(value, hook):
        raise ArithmeticError("on purpose")

    with model.hooks([("blocks.1.hook_resid_pre", fail)]):
        for call in (
            lambda: ablate_run(model, images, components=["L0H1"], how="zero"),
            lambda: ablate_run(model, images, components=["L0H1"], reference=reference),
            lambda: total_effects(model, images, how="zero"),
        ):
            with pytest.raises(ArithmeticError):
                call()
    with pytest.raises(UnknownNameError, match=r"blocks.0.attn.hook_z has 4, from 'L0H0' to 'L0H3'"):
        ablate_run(model, images, components=["mlp.1", "L0H4"], how="zero")
    with pytest.raises(KeyError), ablating(model, images, components=["mlp.1"], how="zero"):
        raise KeyError
    assert no_hooks_are_left(model)


def test_whatever_runs_inside_sees_the_edited_model():
    model, images, reference = setup()
    with ablating(model, images, components=["L0H1"], how="zero") as inside:
        parts = decompose(inside, images)
        output = model(images)
    assert not parts["L0H1"].any()
    assert parts.gap.max() < 1e-10
    same(output, ablate_run(model, images, components=["L0H1"], how="zero"))
    with ablating(model, images, components=["mlp.0"], how="resample", reference=reference, seed=3):
        same(
            model(images), ablate_run(model, images, components=["mlp.0"], how="resample", reference=reference, seed=3)
        )
        with pytest.raises(InputError, match="run on all of the images at once"):
            model(images[:2])


def test_what_is_returned_can_be_named():
    model, images, _ = setup()
    by_hand = edited("class_token")
    by_hand.blocks[0].mlp.fc2.weight[:], by_hand.blocks[0].mlp.fc2.bias[:] = 0, 0
    features = by_hand.forward_head(by_hand.forward_features(images), pre_logits=True)
    run = {"components": ["mlp.0"], "how": "zero"}
    same(ablate_run(model, images, **run, of="representation"), features)
    same(ablate_run(model, images, **run, of="logits"), by_hand(images))
    same(ablate_run(model, images, **run, of="embedding"), functional.normalize(features, dim=-1))
    same(ablate_run(model, images, **run, of=lambda model, images: 2 * model(images)), 2 * by_hand(images))
    assert not ablate_run(model, images, **run, of="blocks.0.hook_mlp_out").any()
    with pytest.raises(UnknownNameError, match="of= must be"):
        ablate_run(model, images, **run, of="blocks.0.hook_mlp_outt")


def test_outputs_of_several_tensors_are_put_together():
    model, images, _ = setup("open_clip_tokens_out")
    whole = ablate_run(model, images, components=["mlp.0"], how="zero")
    cut = ablate_run(model, images, components=["mlp.0"], how="zero", batch_size=2)
    assert isinstance(cut, tuple)
    for one, other in zip(whole, cut, strict=True):
        same(one, other)


def test_gradients_flow_where_images_have_them():
    model, images, _ = setup()
    output = ablate_run(model, images.clone().requires_grad_(), components=["L0H1"], how="zero")
    assert output.requires_grad
    assert not ablate_run(model, images, components=["L0H1"], how="zero").requires_grad


def test_half_precision_is_compared_in_single():
    model = HookedViT(TINY_MODELS["class_token"]().bfloat16())
    images = images_for("class_token").bfloat16()
    effects = total_effects(model, images, ["L0H1", "mlp.1"], reference=images)
    assert effects.values.dtype == torch.float32
    assert ablate_run(model, images, components=["L0H1"], reference=images).dtype == torch.bfloat16


# ---- models of somebody else's


def foreign():
    torch.manual_seed(0)
    model = ForeignViT().eval().double().requires_grad_(False)
    return model, torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:.*The slow replay takes its place")
def test_a_model_with_canonical_names_is_edited_at_them():
    model, images = foreign()
    by_hand = copy.deepcopy(model)
    by_hand.blocks[0].attn.W_O[1] = 0
    by_hand.blocks[2].mlp.W_out[7] = 0
    by_hand.blocks[1].mlp.W_out[:], by_hand.blocks[1].mlp.b_out[:] = 0, 0
    same(ablate_run(model, images, components=["L0H1", "L2N7", "mlp.1"], how="zero"), by_hand(images))
    effects = total_effects(model, images, how="mean", reference=images)
    assert {"embed", "L2H2", "mlp.0"} <= set(effects.labels)
    with pytest.raises(InputError, match="'W_pos' is a constant"):
        ablate_run(model, images, components=["W_pos"], how="zero")
    assert no_hooks_are_left(model)


def test_a_mapping_says_where_components_are():
    model, images = foreign()
    given = {"first": "blocks.0.hook_mlp_out"}
    same(
        ablate_run(model, images, components=given, reference=images),
        ablate_run(model, images, components=["mlp.0"], reference=images),
    )
    assert total_effects(model, images, given, how="zero").labels == ("first",)
    with pytest.raises(InputError, match="never passes the hook 'hook_unused'"):
        ablate_run(model, images, components={"first": "hook_unused"}, how="zero")
    with pytest.raises(UnknownNameError, match=r"did you mean 'blocks.0.hook_mlp_out'"):
        ablate_run(model, images, components={"first": "blocks.0.hook_mlp_oot"}, how="zero")
    ours, images, _ = setup()
    with pytest.raises(InputError, match="says itself at which hooks"):
        ablate_run(ours, images, components=given, how="zero")


class Maps(HookedRootModule):
    """A convolution whose map is hooked, channels first or last, and a pooled linear layer."""

    def __init__(self, *, channels_last):
        super().__init__()
        self.channels_last = channels_last
        self.conv, self.head = nn.Conv2d(3, 5, 2, stride=2), nn.Linear(5, 4)
        self.hook_map = HookPoint()
        self.setup()

    def forward(self, images):
        maps = torch.relu(self.conv(images))
        maps = (
            self.hook_map(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.channels_last else self.hook_map(maps)
        )
        return self.head((maps * torch.arange(1.0, 4.0).to(maps)).mean((2, 3)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_tokens_of_a_map_are_found_by_their_places(channels_last):
    torch.manual_seed(0)
    model = Maps(channels_last=channels_last).double().eval()
    images = torch.randn(4, 3, 4, 6, dtype=torch.float64)
    maps = torch.relu(model.conv(images))
    mean = maps.mean((0, 2, 3), keepdim=True).expand_as(maps)
    expected = model.head((mean * torch.arange(1.0, 4.0)).mean((2, 3)))
    same(ablate_run(model, images, components={"map": "hook_map"}, reference=images), expected)


def test_a_model_without_hook_points_is_to_be_wrapped():
    _, images, _ = setup()
    with pytest.raises(UnsupportedModelError, match=r"passes none. Wrap it: HookedViT\(model\)"):
        ablate_run(original("class_token"), images, components=["attn.0"], how="zero")


def test_a_component_without_a_hook_point_is_refused():
    torch.manual_seed(0)
    model = ForeignViT().eval().double().requires_grad_(False)
    for block in model.blocks:  # no hook sees what the MLPs write
        block.hook_mlp_out, block.mlp.hook_post = nn.Identity(), nn.Identity()
    model.setup()
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    unhooked = next(label for label in decompose(model, images, by="layer").labels if label.endswith(".mlp"))
    with pytest.raises(InputError, match="no hook point has its value"):
        ablate_run(model, images, components=[unhooked], how="zero")


# ---- bad input


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"components": ["norm.bias"]}, InputError, "'norm.bias' is a constant"),
        ({"components": ["blocks.0.attn.proj.bias"]}, InputError, "is a constant"),
        ({"components": ["intervention@hook_embed"]}, InputError, "is what a hook of yours changes"),
        ({"components": ["mlp.9"]}, UnknownNameError, "There is no component 'mlp.9' to ablate; did you mean 'mlp.1'"),
        ({"components": ["L9H0"]}, UnknownNameError, "There is no component 'L9H0'"),
        ({"components": [3]}, InputError, "Expected labels of components"),
        ({"how": "median"}, InputError, "Expected how='mean', 'position_mean', 'zero' or 'resample'"),
        ({"how": "mean"}, InputError, "how='mean' takes values from other images"),
        ({"how": "resample"}, InputError, "how='resample' takes values from other images"),
        ({"how": "mean", "reference": []}, InputError, "at least one reference image; got none"),
        ({"how": "mean", "reference": [1, 2]}, InputError, "tensors .* got int"),
        ({"how": "mean", "reference": torch.zeros(0, 3, 32, 32, dtype=torch.float64)}, InputError, "at least one"),
        ({"how": "mean", "reference": torch.zeros(2, 3, 32, 32)}, InputError, "The model is torch.float64"),
        ({"how": "resample", "reference": [torch.full((2, 3, 32, 32), torch.nan).double()]}, InputError, "finite"),
        ({"how": "mean", "reference": torch.zeros(1), "batch_size": 0}, InputError, "batch_size= must be at least 1"),
        ({"batch_size": 0}, InputError, "batch_size= must be at least 1"),
    ],
)
def test_bad_input_is_refused(options, kind, message):
    model, images, _ = setup()
    with as_users_run_it(), pytest.raises(kind, match=message):
        ablate_run(model, images, **{"components": ["L0H1"], "how": "zero", **options})
    assert no_hooks_are_left(model)


def test_images_that_the_model_cannot_take_are_refused():
    model, images, _ = setup()
    for bad in (images[:0], images[:, :2], images.float(), images * torch.nan):
        with pytest.raises(InputError):
            ablate_run(model, bad, components=["L0H1"], how="zero")


def test_positions_of_another_size_do_not_fit():
    model, images, _ = setup("dynamic_size")
    larger = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with pytest.raises(InputError, match="reference images of the same size"):
        ablate_run(model, images, components=["mlp.0"], how="position_mean", reference=larger)
    assert ablate_run(model, images, components=["mlp.0"], how="mean", reference=larger).shape == (3, 10)
    with pytest.raises(InputError, match="reference images of one size"):
        Reference.of(model, [images, larger])


def test_what_cannot_be_an_effect_is_refused():
    model, images, _ = setup()
    with pytest.raises(InputError, match=r"one vector an image, \[batch, d\]; got \[3, 17, 32\]"):
        total_effects(model, images, ["mlp.0"], how="zero", of="blocks.0.hook_resid_post")
    with pytest.raises(InputError, match="at least one component"):
        total_effects(model, images, [], how="zero")
    with pytest.raises(InputError, match="d_rep=32"):
        total_effects(model, images, ["mlp.0"], how="zero", directions=torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(CapacityError, match="component batch direction"):
        total_effects(model, images, how="zero", max_bytes=100)
    with as_users_run_it(), pytest.raises(InputError, match="by= must be"):
        total_effects(model, images, how="zero", by="block")
