"""Where components and tokens of a hooked model are read."""

import pytest
import timm
import torch
from tiny_models import TINY_MODELS, images_for, swept

from vitdecomp_lens.components import Component, Point
from vitdecomp_lens.hooked import HookedViT


@pytest.fixture(params=swept(TINY_MODELS))
def name(request):
    return request.param


def labels_of(points, cache):
    return [c.label for p in points for c in p.components(1 if p.axis is None else cache[p.hook].shape[p.axis])]


def test_points_by_kind():
    model = HookedViT(TINY_MODELS["class_token"]())
    embed = Point("hook_patch_embed", Component(kind="embed"), skipped_tokens=1)
    attn, mlp = Component(kind="attn", layer=1), Component(kind="mlp", layer=1)
    assert model.component_points("layer")[0] == embed
    assert model.component_points("layer")[3:] == (
        Point("blocks.1.hook_attn_out", attn),
        Point("blocks.1.hook_mlp_out", mlp),
    )
    assert model.component_points("head")[3] == Point("blocks.1.attn.hook_z", attn, axis=2)
    assert model.component_points("neuron")[4] == Point("blocks.1.mlp.hook_post", mlp, axis=2)
    for by in ("layer", "head", "neuron"):
        assert model.token_points(by)[3] == Point("blocks.1.attn.hook_v", attn, axis=2)
    assert model.token_points("neuron")[4].hook == "blocks.1.mlp.hook_post"
    assert model.branches == 4


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
def test_points_read_hooks_that_exist_and_label_every_component_once(name, by):
    model, images = HookedViT(TINY_MODELS[name]()), images_for(name)
    for points in (model.component_points(by), model.token_points(by)):
        _, cache = model.run_with_cache(images, names_filter=[point.hook for point in points])
        labels = labels_of(points, cache)
        assert len(set(labels)) == len(labels)
        blocks = [p for p in points if p.hook.startswith("blocks.")]
        assert all(cache[p.hook].shape[p.token_axis] == len(model.token_grid(images, p.hook)) for p in blocks)
    if name != "parallel_things" or by == "layer":
        assert sum(p.hook.startswith("blocks.") for p in model.component_points(by)) == model.branches


def test_parallel_attentions_number_their_heads_through():
    model = HookedViT(TINY_MODELS["parallel_things"]())
    points = [point for point in model.component_points("head") if ".attns." in point.hook]
    assert [(p.hook, p.first) for p in points[:2]] == [("blocks.0.attns.0.hook_z", 0), ("blocks.0.attns.1.hook_z", 4)]
    _, cache = model.run_with_cache(images_for("parallel_things"))
    assert labels_of(points[:2], cache) == [f"L0H{head}" for head in range(8)]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("siglip", ["pool.mlp"]),
        ("prr_pool", ["pool.attn"]),
        ("open_clip_pooler", []),
        ("class_token", []),
    ],
)
def test_pools_are_components_where_the_map_stops_at_them(name, labels):
    points = HookedViT(TINY_MODELS[name]()).component_points("head")
    assert [p.component.label for p in points if p.component.kind == "pool"] == labels


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("class_token", ("CLS",)),
        ("dinov2_reg", ("CLS", "reg0", "reg1")),
        ("distilled", ("CLS", "DIST")),
        ("siglip", ()),
        ("open_clip", ("CLS",)),
    ],
)
def test_token_grids_name_prefix_tokens_and_patches(name, prefix):
    grid = HookedViT(TINY_MODELS[name]()).token_grid(images_for(name))
    assert grid.names == (*prefix, *(f"r{row}c{column}" for row in range(4) for column in range(4)))
    assert grid.rectangle(len(prefix) + 5) == (8.0, 8.0, 16.0, 16.0)


def test_token_grids_follow_the_image_size():
    grid = HookedViT(TINY_MODELS["dynamic_size"]()).token_grid(torch.zeros(1, 3, 48, 24))
    assert (grid.rows, grid.columns, grid.image_size) == (6, 3, (48, 24))
    padded = HookedViT(TINY_MODELS["dynamic_size_padded"]()).token_grid(torch.zeros(1, 3, 36, 30))
    assert (padded.rows, padded.columns, padded.image_size) == (5, 4, (40, 32))


OVERLAPPING = ("hybrid", "xcit")  # a pixel reaches patches beside its own


def check_patches(model, images):
    """At the first attention's values, pixels of a patch move the token whose rectangle they fill, and no other."""
    hook = next(point.hook for point in model.token_points("head") if point.hook.endswith("hook_v"))
    grid = model.token_grid(images, hook)
    for patch in (0, grid.columns + 1, grid.rows * grid.columns - 1):
        token = len(grid.prefix) + patch
        top, left, bottom, right = (int(edge) for edge in grid.rectangle(token))
        changed = images.clone()
        changed[:, :, top:bottom, left:right] += 1
        _, before = model.run_with_cache(images, names_filter=hook)
        _, after = model.run_with_cache(changed, names_filter=hook)
        moved = (before[hook] - after[hook]).abs().amax((0, 2, 3)) > 1e-6
        assert moved.nonzero().flatten().tolist() == [token]


def test_patches_are_where_the_grid_says(name):
    if not name.startswith(OVERLAPPING):
        check_patches(HookedViT(TINY_MODELS[name]()), images_for(name))


@pytest.mark.parametrize("name", ["dynamic_size", "dynamic_size_padded"])
def test_patches_are_where_the_grid_says_at_other_sizes(name):
    model = HookedViT(TINY_MODELS[name]())
    check_patches(model, torch.randn(1, 3, 48, 24, generator=torch.Generator().manual_seed(0)))
    dinov2 = HookedViT(
        timm.create_model("vit_small_patch14_dinov2", depth=1, img_size=70, dynamic_img_size=True).eval()
    )
    check_patches(dinov2, torch.randn(1, 3, 56, 84, generator=torch.Generator().manual_seed(0)))


def test_parameter_names_are_the_originals(name):
    model = HookedViT(TINY_MODELS[name]())
    for parameter in model.parameters():
        assert model.original.get_parameter(model.parameter_names[id(parameter)]) is parameter
    assert set(model.parameter_names.values()) == {
        *dict(model.original.named_parameters()),
        *dict(model.original.named_buffers()),
    }
