"""What cannot be hooked, and images that cannot be run, are refused by name and with advice."""

import copy
import re

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY, TINY_MODELS, images_for
from torch import nn
from torch.nn.utils import parametrize

from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.hooked import Adapter, HookedViT, register_adapter
from vitdecomp_lens.hooked.registry import ImageSpec, find_adapter


@pytest.fixture
def model():
    return HookedViT(TINY_MODELS["class_token"]())


@pytest.fixture
def images():
    return images_for("class_token")


# Models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "proj_drop_rate", "drop_path_rate", "patch_drop_rate"])
def test_training_mode_with_active_dropout_is_refused(rate):
    module = VisionTransformer(**TINY, **{rate: 0.3}).train()
    with pytest.raises(UnsupportedModelError, match=r"training mode.*rate 0\.[1-3].*\.eval\(\)"):
        HookedViT(module)
    model = HookedViT(module.eval())
    with pytest.raises(UnsupportedModelError, match="training mode"):
        model.train()
    assert not model.training


def test_training_mode_without_dropout_is_allowed(images):
    model = HookedViT(VisionTransformer(**TINY).train())
    assert model.training
    assert torch.equal(model(images), model.original(images))


def test_attention_dropout_of_torch_is_refused_in_training():
    module = TINY_MODELS["open_clip"]().train()
    module.transformer.resblocks[0].attn.dropout = 0.1
    with pytest.raises(UnsupportedModelError, match=r"'transformer\.resblocks\.0\.attn'"):
        HookedViT(module)


def test_compiled_modules_are_refused():
    module = TINY_MODELS["class_token"]()
    with pytest.raises(UnsupportedModelError, match=r"compiled.*_orig_mod"):
        HookedViT(torch.compile(module))
    module.blocks[0].compile()
    with pytest.raises(UnsupportedModelError, match="compiled"):
        HookedViT(module)


def test_replicated_modules_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"DataParallel.*HookedViT\(model\.module\)"):
        HookedViT(nn.DataParallel(TINY_MODELS["class_token"]()))


def test_quantised_modules_are_refused():
    class QuantisedLinear(nn.Linear):
        """Stands in for what quantisation libraries put in place of linear layers."""

    QuantisedLinear.__module__ = "torch.ao.nn.quantized.modules.linear"
    by_class, by_dtype = TINY_MODELS["class_token"](), TINY_MODELS["class_token"]()
    by_class.blocks[0].mlp.fc1 = QuantisedLinear(32, 128)
    by_dtype.head.weight = nn.Parameter(torch.zeros(10, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.0\.mlp\.fc1'.*quantised"):
        HookedViT(by_class)
    with pytest.raises(UnsupportedModelError, match=r"'head'.*quantised"):
        HookedViT(by_dtype)


@pytest.mark.parametrize(
    "module",
    [nn.Linear(2, 2), timm.create_model("test_resnet"), timm.create_model("hieradet_small", stages=(1, 1, 1, 1))],
)
def test_architectures_without_adapter_are_refused_with_the_nearest_and_trace(module):
    name = f"{type(module).__module__}:{type(module).__name__}"
    with pytest.raises(UnsupportedModelError, match=re.escape(name)) as caught:
        HookedViT(module)
    assert "decompose(module, images) works for any" in str(caught.value)
    if "HieraDet" in name:
        assert "the nearest is for timm.models.hiera:Hiera" in str(caught.value)


def test_unknown_parts_are_refused_by_name():
    class Strange(nn.Module):
        def forward(self, x, **kwargs):
            return x

    for part, owner in (("block", lambda m: m.blocks), ("attention", None), ("MLP", None)):
        module = TINY_MODELS["class_token"]()
        if part == "block":
            owner(module)[1] = Strange()
        else:
            setattr(module.blocks[1], {"attention": "attn", "MLP": "mlp"}[part], Strange())
        with pytest.raises(UnsupportedModelError, match=rf"The {part} .*Strange cannot be hooked"):
            HookedViT(module)


@pytest.mark.parametrize(
    ("path", "what"), [("", "model"), ("blocks.1", "block"), ("blocks.0.attn", "attention"), ("blocks.1.mlp", "MLP")]
)
def test_a_forward_that_was_put_on_one_module_is_refused_and_not_lost(path, what):
    model = TINY_MODELS["class_token"]()
    patched = model.get_submodule(path)
    forward = patched.forward
    patched.forward = lambda *args, **kwargs: forward(*args, **kwargs) + 1
    with pytest.raises(UnsupportedModelError, match=rf"^The {what} \w+ has a forward that was put on this very module"):
        HookedViT(model)
    assert "forward" in vars(patched)
    del patched.forward
    HookedViT(model)


def test_subclasses_that_override_what_hooking_relies_on_are_refused():
    class Changed(VisionTransformer):
        def _pos_embed(self, x):
            return super()._pos_embed(x) * 2

    class Renamed(VisionTransformer):
        """Changes nothing."""

    with pytest.raises(UnsupportedModelError, match="Changed overrides _pos_embed of VisionTransformer"):
        HookedViT(Changed(**TINY).eval())
    assert HookedViT(Renamed(**TINY).eval()).branches == 4


def test_a_subclass_with_a_forward_of_its_own_needs_an_adapter_of_its_own(images):
    class Doubled(VisionTransformer):
        def forward(self, x):
            return super().forward(x) * 2

    module = Doubled(**TINY).eval()
    with pytest.raises(UnsupportedModelError, match="no adapter for"):
        HookedViT(module)
    parent = type(find_adapter(TINY_MODELS["class_token"]()))
    register_adapter(f"{Doubled.__module__}:{Doubled.__qualname__}")(type("DoubledAdapter", (parent,), {}))
    assert torch.equal(HookedViT(module)(images), module(images))


def test_a_class_has_one_adapter():
    class Mine(Adapter):
        """Never used."""

    with pytest.raises(ValueError, match=r"has an adapter already.*subclass"):
        register_adapter("timm.models.vision_transformer:VisionTransformer")(Mine)
    register_adapter("a_package:A")(Mine)
    with pytest.raises(ValueError, match="Mine"):
        register_adapter("a_package:A")(type("Another", (Mine,), {}))


# Images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"\[batch, 3, 32, 32\]; got \[3, 32, 32\].*images\[None\]"),
        (lambda x: x[:0], "at least one image"),
        (lambda x: x[:, :1], "3 channels"),
        (lambda x: x.permute(0, 2, 3, 1), r"Channels come first: images\.permute"),
        (lambda x: x[..., :24], r"got \[3, 3, 32, 24\].*resize them to 32 × 32"),
        (lambda x: x.to(torch.uint8), r"floating point.*uint8.*model\.preprocess"),
        (lambda x: x.double(), r"model is torch\.float32.*images\.to\(torch\.float32\)"),
        (lambda x: x.to("meta"), r"model is on cpu and the images are on meta"),
        (lambda x: [x], r"must be a tensor.*got list"),
    ],
)
def test_bad_images_are_refused_with_advice(model, images, change, message):
    with pytest.raises(InputError, match=message):
        model(change(images))
    with pytest.raises(InputError, match=message):
        model.check_images(change(images))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused_by_number(model, images, value):
    images[1, 0, 3, 3] = value
    with pytest.raises(InputError, match="image 1 of 3 has NaN or infinite"):
        model.check_images(images)


def test_good_images_pass(model, images):
    model.check_images(images)


def test_dynamic_sizes_must_tile_into_patches():
    model = HookedViT(TINY_MODELS["dynamic_size"]())
    with pytest.raises(InputError, match="multiples of 8 and 8"):
        model(torch.zeros(1, 3, 36, 32))
    padded = HookedViT(TINY_MODELS["dynamic_size_padded"]())
    assert torch.equal(padded(torch.ones(1, 3, 36, 30)), padded.original(torch.ones(1, 3, 36, 30)))


def test_autocast_takes_images_of_another_dtype(model, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(images.to(torch.bfloat16)), model.original(images.to(torch.bfloat16)))


def test_masks_are_refused(model, images):
    with pytest.raises(InputError, match="attn_mask must be None"):
        model.tower(images, is_causal=True)


# Results of heads ------------------------------------------------------------------------------------------


class LoudLinear(nn.Linear):
    """A projection whose ``forward`` does more than its weights say."""

    def forward(self, x):
        return 2 * super().forward(x)


def _hook(attn):
    attn.register_forward_hook(lambda module, args, output: 2 * output)


def _hook_projection(attn):
    attn.proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _hook_dropout(attn):
    attn.proj_drop.register_forward_hook(lambda module, args, output: 2 * output)


def _replace_projection(attn):
    attn.proj = LoudLinear(32, 32)


def _patch_projection(attn):
    attn.proj.forward = lambda x: 2 * nn.Linear.forward(attn.proj, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_hook, "Attention has forward hooks"),
        (_hook_projection, "Linear has forward hooks"),
        (_hook_dropout, "Dropout has forward hooks"),
        (_replace_projection, "LoudLinear has a forward of its own"),
        (_patch_projection, "Linear has a forward of its own"),
    ],
)
def test_results_of_heads_are_refused_where_the_projection_is_not_plain(images, change, message):
    module = TINY_MODELS["class_token"]()
    change(module.blocks[1].attn)
    model = HookedViT(module)
    before = set(model.hook_dict)
    with pytest.raises(UnsupportedModelError, match=f"hook_result.*{message}.*use hook_z"):
        model.set_use_attn_result(True)
    assert set(model.hook_dict) == before, "no block has it then"
    assert torch.equal(model(images), module(images))


def test_results_of_heads_are_refused_where_layer_scale_has_hooks():
    module = TINY_MODELS["layer_scale"]()
    module.blocks[0].ls1.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UnsupportedModelError, match="LayerScale has forward hooks"):
        HookedViT(module).set_use_attn_result(True)


def test_hooks_put_on_the_projection_later_are_seen(images):
    model = HookedViT(TINY_MODELS["class_token"]())
    model.set_use_attn_result(True)
    _hook(model.blocks[0].attn.core)
    with pytest.raises(UnsupportedModelError, match="Attention has forward hooks"):
        model.run_with_cache(images, names_filter="blocks.0.attn.hook_result")


@pytest.mark.parametrize("name", ["parallel_scaling", "parallel_scaling_fused"])
def test_branches_of_parallel_blocks_are_refused_where_the_projection_is_not_plain(name, images):
    module = TINY_MODELS[name]()
    projection = module.blocks[0].out_proj or module.blocks[0].mlp_out_proj
    projection.register_forward_hook(lambda module, args, output: 2 * output)
    model = HookedViT(module)
    assert torch.equal(model(images), module(images))
    with pytest.raises(UnsupportedModelError, match=r"parallel block.*Linear has forward hooks"):
        model.run_with_cache(images, names_filter="blocks.0.hook_mlp_out")


def test_looking_at_results_leaves_the_output_of_a_parametrised_projection(images):
    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

    module = TINY_MODELS["layer_scale"]()
    for name in ("bias", "weight"):
        parametrize.register_parametrization(module.blocks[0].attn.proj, name, Doubled())
    parametrize.register_parametrization(module.blocks[0].ls1, "gamma", Doubled())
    model = HookedViT(module)
    model.set_use_attn_result(True)
    expected, proj = module(images), module.blocks[0].attn.proj
    output, cache = model.run_with_cache(images)
    assert torch.equal(model(images), expected)
    assert (output - expected).abs().max() < 1e-5
    attn = model.blocks[0].attn
    assert torch.equal(attn.b_O, proj.bias * module.blocks[0].ls1.gamma)
    added = cache["blocks.0.attn.hook_result"].sum(2) + attn.b_O
    assert torch.allclose(added, cache["blocks.0.hook_attn_out"], atol=1e-5)


# Changes after wrapping ------------------------------------------------------------------------------------


def _swap_blocks(module):
    module.blocks[0], module.blocks[1] = module.blocks[1], module.blocks[0]


def _move_first_block_last(module):
    first = module.blocks._modules.pop("0")
    module.blocks._modules["0"] = first


CHANGES = {
    "blocks.2' of the wrapped VisionTransformer was added": lambda m: m.blocks.append(m.blocks[0]),
    "blocks.1' of the wrapped VisionTransformer was removed": lambda m: m.blocks._modules.pop("1"),
    "norm' of the wrapped VisionTransformer was replaced": lambda m: setattr(m, "norm", nn.Identity()),
    "blocks.0' of the wrapped VisionTransformer was replaced": _swap_blocks,
    "order of the submodules of 'blocks'": _move_first_block_last,
    "blocks.0.mlp.act.extra' of the wrapped VisionTransformer was added": lambda m: m.blocks[0].mlp.act.add_module(
        "extra", nn.Identity()
    ),
    "attribute 'global_pool' of the wrapped VisionTransformer was changed": lambda m: setattr(m, "global_pool", "avg"),
    "attribute 'blocks.1.norm1.eps'": lambda m: setattr(m.blocks[1].norm1, "eps", 1.0),
    "attribute 'blocks.1.attn.scale'": lambda m: setattr(m.blocks[1].attn, "scale", torch.tensor([1.0, 2.0])),
    "attribute 'blocks.0.attn.fused_attn'": lambda m: setattr(m.blocks[0].attn, "fused_attn", 1),
    "attribute 'norm.normalized_shape'": lambda m: setattr(m.norm, "normalized_shape", (16,)),
    "attribute 'blocks.0.attn.num_heads'": lambda m: delattr(m.blocks[0].attn, "num_heads"),
}


@pytest.mark.parametrize("message", list(CHANGES))
def test_what_was_changed_after_wrapping_is_refused_by_name(images, message):
    module = TINY_MODELS["class_token"]()
    model = HookedViT(module)
    model(images)
    CHANGES[message](module)
    with pytest.raises(UnsupportedModelError, match=re.escape(message) + r".*Wrap the changed module again"):
        model(images)


def test_changes_that_change_nothing_pass(images):
    module = TINY_MODELS["class_token"]()
    model = HookedViT(module)
    module.train()
    module.blocks[0].norm1.eps = float(str(module.blocks[0].norm1.eps))
    module.norm = module.norm
    module.remark = "of the user's own"
    assert torch.equal(model(images), module(images))
    assert not model.training


def test_a_deep_copy_is_watched_too(images):
    model = copy.deepcopy(HookedViT(TINY_MODELS["class_token"]()))
    model(images)
    model.original.blocks[0].norm1.eps = 1.0
    with pytest.raises(UnsupportedModelError, match=r"attribute 'blocks\.0\.norm1\.eps'"):
        model(images)


def test_hooks_put_on_the_original_later_are_not_followed(images):
    module = TINY_MODELS["class_token"]()
    model = HookedViT(module)
    expected = module(images)
    module.blocks[0].register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(model(images), expected)
    assert not torch.equal(module(images), expected)


def test_a_wrapped_model_is_not_wrapped_again(model):
    with pytest.raises(UnsupportedModelError, match=r"wrapped already.*HookedViT\(model\.original\)"):
        HookedViT(model)
    assert HookedViT(model.original).original is model.original


def test_a_clip_whose_tower_is_wrapped_is_not_wrapped_again():
    clip = TINY_MODELS["open_clip_whole"]()
    clip.visual = HookedViT(clip.visual)
    with pytest.raises(UnsupportedModelError, match="wrapped already"):
        HookedViT(clip)


@pytest.mark.parametrize(
    ("name", "size", "multiple_of"),
    [("class_token", (32, 32), (1, 1)), ("dynamic_size", None, (8, 8)), ("open_clip", (32, 32), (1, 1))],
)
def test_a_model_says_what_images_it_takes(name, size, multiple_of):
    assert HookedViT(TINY_MODELS[name]()).image_spec == ImageSpec(3, size, multiple_of)
