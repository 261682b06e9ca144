"""What goes through the values of later heads, against runs in which all else is held."""

from functools import cache

import pytest
import torch
from staged_models import shared
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY, TINY_MODELS, images_for, perturb
from torch import nn

from vitdecomp_lens import HookedViT, attribute_second_order, decompose, second_order
from vitdecomp_lens.errors import CapacityError, InputError, UnknownNameError, UnsupportedModelError

SOURCES = {
    "L0H1": ("blocks.0.attn.hook_z", lambda z: z[:, :, 1]),
    "L1H3": ("blocks.1.attn.hook_z", lambda z: z[:, :, 3]),
    "mlp.0": ("blocks.0.hook_mlp_out", lambda out: out),
    "mlp.1": ("blocks.1.hook_mlp_out", lambda out: out),
    "L0N5": ("blocks.0.mlp.hook_post", lambda post: post[:, :, 5]),
    "embed": ("hook_patch_embed", lambda patches: patches),
}
POOLED = {
    "class token": {},
    "mean": {"global_pool": "avg", "fc_norm": False},
    "mean, then norm": {"global_pool": "avg", "fc_norm": True, "init_values": 0.5},
    "registers": {"reg_tokens": 2, "qk_norm": True},
}


@cache
def deep(name):
    """A model of three blocks, so that a path may go through one head or through two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HookedViT(perturb(VisionTransformer(**{**TINY, **POOLED[name], "depth": 3})).double())
        return model, torch.randn(2, 3, 32, 32, dtype=torch.float64)


def run(model, images, cache, source, live):
    """The representation without a source, all attentions, norms and MLPs held but the source's and what is live.

    Args:
        live: Layer and head whose value may follow; head None for all of the layer; None for nothing.
    """
    hook, part = SOURCES[source]

    def zeroed(value, hook):
        value = value.clone()
        part(value).zero_()
        return value

    def held(value, hook):
        clean = cache[hook.name].clone()
        if live is not None and hook.name == f"blocks.{live[0]}.attn.hook_z":
            heads = slice(None) if live[1] is None else live[1]
            clean[:, :, heads] = value[:, :, heads]
        return clean

    ends = ("hook_pattern", "hook_scale", "attn.hook_z", "hook_mlp_out")
    own = hook.replace("mlp.hook_post", "hook_mlp_out")
    names = [name for name in model.hook_dict if name.endswith(ends) and name != own]
    with model.hooks([*((name, held) for name in names), (hook, zeroed)]):
        _, after = model.run_with_cache(images, names_filter="hook_representation")
    return after["hook_representation"]


@pytest.mark.parametrize("name", POOLED, scope="module")
def test_effects_are_what_a_run_shows_in_which_all_else_is_held(name):
    model, images = deep(name)
    _, cache = model.run_with_cache(images)
    by_head = second_order(model, images, through=["L2H1", "L1H0", "attn.2"])
    by_neuron = second_order(model, images, by="neuron", through=["L2H1", "L1H0", "attn.2"])
    for source in SOURCES:
        effects = by_neuron if "N" in source else by_head
        held = run(model, images, cache, source, None)
        for carrier, live in {"L2H1": (2, 1), "L1H0": (1, 0), "attn.2": (2, None)}.items():
            expected = held - run(model, images, cache, source, live)
            assert (effects[carrier][source] - expected).abs().max() < 1e-12, (source, carrier)
    assert by_head["L1H0"]["L1H3"].abs().max() == 0  # heads of one layer do not read each other
    assert min(part[c].abs().max() for part in (by_head["L2H1"], by_head["attn.2"]) for c in ("L1H3", "mlp.0")) > 1e-4


@pytest.mark.parametrize("name", ["siglip", "eva02", "open_clip", "post_norm", "parallel_things", "cait"])
def test_what_goes_through_a_head_sums_to_what_it_writes(name):
    model, images = HookedViT(TINY_MODELS[name]().double()), images_for(name).double()
    direct, effects = decompose(model, images), second_order(model, images, through="head")
    for head in effects:
        assert effects[head].complete
        assert (effects[head].sum() - effects[head].total).abs().max() < 1e-12
        assert (effects[head].total - direct[head]).abs().max() < 1e-12


def test_windows_and_merged_patches_are_gone_through():
    model, images = shared("swin")
    effects = second_order(model, images, through="head")
    direct = decompose(model, images)
    for head in effects:
        assert (effects[head].sum() - direct[head]).abs().max() < 1e-12


def test_a_layer_is_the_sum_of_its_heads_and_all_of_them_sum_up():
    model, images = deep("class token")
    layers, heads = second_order(model, images), second_order(model, images, through="head")
    assert layers.labels == ("attn.0", "attn.1", "attn.2")
    for layer in range(3):
        summed = sum(heads[f"L{layer}H{head}"].values for head in range(4))
        assert (layers[f"attn.{layer}"].values - summed).abs().max() < 1e-12
    assert (heads.summed.values - layers.summed.values).abs().max() < 1e-12
    assert layers.summed.gap.max() < 1e-12
    assert layers.summed.metadata["through"] == "attn.0, attn.1, attn.2"
    both = second_order(model, images, through=["attn.2", "L1H0", "L2H1"])
    with pytest.raises(InputError, match=r"through L2H1 goes through attn.2, and would count twice"):
        _ = both.summed


def test_scores_are_those_of_the_vectors():
    model, images = deep("mean")
    directions = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vectors = second_order(model, images, by="neuron", through="head")
    scores = attribute_second_order(model, images, directions, by="neuron", through="head", names=["a", "b", "c"])
    for head in vectors:
        assert (scores[head].values - vectors[head].project(directions).values).abs().max() < 1e-12
    assert scores["L2H0"].directions == ("a", "b", "c")
    divided = attribute_second_order(model, images, directions, of="embedding")["attn.2"]
    norms = decompose(model, images).total.norm(dim=-1, keepdim=True)
    expected = second_order(model, images)["attn.2"]["mlp.0"] @ directions.T
    assert (divided["mlp.0"] * norms - expected).abs().max() < 1e-12


def test_chosen_components_pieces_and_single_precision():
    model, images = deep("class token")
    whole = second_order(model, images, through=["L2H1"])["L2H1"]
    some = second_order(model, images, through=["L2H1"], components=["mlp.1", "L0H0"], batch_size=1)["L2H1"]
    assert some.labels == ("mlp.1", "L0H0")
    assert not some.complete
    for label in some:
        assert (some[label] - whole[label]).abs().max() < 1e-12
    single = HookedViT(perturb(VisionTransformer(**{**TINY, "depth": 3})))
    assert second_order(single, images.float()).summed.complete


def test_what_hooks_add_on_the_way_is_a_component():
    model, images = deep("class token")
    with model.hooks([("blocks.1.hook_resid_mid", lambda value, hook: value + 1.5 * value.roll(1, -1))]):
        effects = second_order(model, images, through="head")
        direct = decompose(model, images)
    added = effects["L2H0"]["intervention@blocks.1.hook_resid_mid"]
    assert added.abs().max() > 1e-4
    assert (effects["L2H0"].sum() - direct["L2H0"]).abs().max() < 1e-12


def test_a_plain_module_is_gone_through_as_its_graph_tells_heads_apart():
    model, images = deep("class token")
    effects, hooked = second_order(model.original, images), second_order(model, images)
    assert len(effects) == 3
    for one, other in zip(effects.parts, hooked.parts, strict=True):
        assert (one.total - other.total).abs().max() < 1e-12
        assert one.gap.max() < 1e-10


def test_what_cannot_be_answered_is_refused():
    model, images = deep("class token")
    with pytest.raises(UnknownNameError, match=r"no head or attention 'L7H0' to go through"):
        second_order(model, images, through=["L7H0"])
    for through in ("heads", "", []):
        with pytest.raises(InputError, match=r"through= must be 'head', 'layer' or labels"):
            second_order(model, images, through=through)
    with pytest.raises(UnknownNameError, match=r"no component 'mlp.2' before any head"):
        second_order(model, images, components=["mlp.2"])
    with pytest.raises(CapacityError, match=r"carrier component batch direction"):
        second_order(model, images, by="neuron", max_bytes=1000)
    with model.hooks([("blocks.2.attn.hook_v", lambda value, hook: 2 * value)]):
        with pytest.raises(InputError, match=r"A hook stands at blocks.2.attn.hook_v"):
            second_order(model, images)
        assert second_order(model, images, through=["attn.1"]).labels == ("attn.1",)
    with pytest.raises(UnsupportedModelError, match=r"does not say where the values of its attention heads are"):
        second_order(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).double().eval(), images)
