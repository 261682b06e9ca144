"""A hooked model computes what the original computes, and leaves the original as it was."""

import copy

import pytest
import torch
from tiny_models import SIZES, TINY_MODELS, images_for
from torch import nn

from vitdecomp_lens.errors import UnsupportedModelError
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.points import LazyHookPoint

NAMES = list(TINY_MODELS)


def first(output):
    """The pooled output of a model that may return tokens as well."""
    return output[0] if isinstance(output, tuple) else output


def lazy_names(model):
    return [name for name, point in model.hook_dict.items() if isinstance(point, LazyHookPoint)]


def plain_names(model):
    return [name for name, point in model.hook_dict.items() if not isinstance(point, LazyHookPoint)]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return HookedViT(TINY_MODELS[name]())


@pytest.mark.parametrize("grad", [True, False])
def test_hooked_output_equals_the_original_bit_for_bit(name, model, grad):
    images = images_for(name)
    with torch.set_grad_enabled(grad):
        assert torch.equal(first(model(images)), first(model.original(images)))


@pytest.mark.parametrize("grad", [True, False])
def test_output_stays_equal_bit_for_bit_while_all_plain_hooks_are_read(name, model, grad):
    images = images_for(name)
    with torch.set_grad_enabled(grad):
        output, cache = model.run_with_cache(images, names_filter=plain_names(model))
        assert torch.equal(first(output), first(model.original(images)))
    assert set(cache.keys()) == set(plain_names(model))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_output_stays_equal_to_rounding_while_lazy_hooks_are_read(name, model, dtype, tolerance):
    model.to(dtype)
    images = images_for(name).to(dtype)
    with torch.no_grad():
        expected = first(model.original(images))
        output, cache = model.run_with_cache(images)
    assert (first(output) - expected).abs().max() <= tolerance * expected.abs().max()
    assert set(cache.keys()) == set(model.hook_dict)


def test_second_outputs_are_the_originals_too():
    model = HookedViT(TINY_MODELS["open_clip_tokens_out"]())
    images = images_for("open_clip_tokens_out")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model(images), model.original(images), strict=True))


def test_gradients_are_the_originals(name, model):
    images = images_for(name)
    first(model.original(images)).square().sum().backward()
    expected = {key: p.grad.clone() for key, p in model.original.named_parameters() if p.grad is not None}
    model.original.zero_grad()
    with model.hooks([(hook, lambda value, hook: value) for hook in plain_names(model)]):
        first(model(images)).square().sum().backward()
    for key, parameter in model.original.named_parameters():
        if key in expected:
            scale = expected[key].abs().max()
            assert (parameter.grad - expected[key]).abs().max() <= 1e-5 * scale + 1e-9, key


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_dynamic_sizes_are_the_originals_with_all_hooks(size):
    model = HookedViT(TINY_MODELS["dynamic_size"]())
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    output, cache = model.run_with_cache(images, names_filter=plain_names(model))
    assert torch.equal(output, model.original(images))
    assert cache["hook_patch_embed"].shape[1] == size[0] * size[1] // 64


def test_unfused_attention_of_the_library_is_matched_bit_for_bit():
    original = TINY_MODELS["class_token"]()
    for block in original.blocks:
        block.attn.fused_attn = False
    model, images = HookedViT(original), images_for("class_token")
    output, _ = model.run_with_cache(images, names_filter=lambda hook: ".attn." in hook)
    assert torch.equal(output, original(images))


def test_bfloat16_runs_hooked():
    model = HookedViT(TINY_MODELS["class_token"]()).to(torch.bfloat16)
    images = images_for("class_token").to(torch.bfloat16)
    output, _ = model.run_with_cache(images)
    assert output.dtype == torch.bfloat16
    assert torch.equal(model(images), model.original(images))


# The user's module ---------------------------------------------------------------------------------------


def test_wrapping_and_running_leave_the_users_module_alone(name):
    original = TINY_MODELS[name]()
    before = {path: (type(m), m.training, id(m)) for path, m in original.named_modules()}
    state = {key: value.clone() for key, value in original.state_dict().items()}
    model = HookedViT(original)
    model.run_with_cache(images_for(name))
    assert {path: (type(m), m.training, id(m)) for path, m in original.named_modules()} == before
    assert all(torch.equal(value, state[key]) for key, value in original.state_dict().items())
    for module in original.modules():
        assert "forward" not in vars(module)
        assert "_pos_embed" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_hooks_of_the_users_module_act_in_the_hooked_model_too():
    original = TINY_MODELS["parallel_things"]()
    things = TINY_MODELS["open_clip"]()
    original.blocks[0].attns[1].attn.register_forward_hook(lambda module, args, output: output * 2)
    original.blocks[1].register_forward_hook(lambda module, args, output: output + 1)
    original.blocks[1].ffns[0].register_forward_hook(lambda module, args, output: output * 3)
    original.norm.register_forward_hook(lambda module, args, output: output * 0.5)
    things.transformer.resblocks[0].attn.register_forward_hook(lambda m, args, output: (output[0] * 2, output[1]))
    for module, name in ((original, "parallel_things"), (things, "open_clip")):
        model, images = HookedViT(module), images_for(name)
        assert torch.equal(model(images), module(images))
        output, _ = model.run_with_cache(images, names_filter=plain_names(model))
        assert torch.equal(output, module(images))


def test_hooks_of_the_hooked_model_do_not_reach_the_original():
    original = TINY_MODELS["class_token"]()
    model, images = HookedViT(original), images_for("class_token")
    expected = original(images)
    with model.hooks([(name, lambda value, hook: value * 0) for name in model.hook_dict]):
        assert torch.equal(original(images), expected)


def test_modes_are_separate():
    original = TINY_MODELS["class_token"]()
    model = HookedViT(original)
    model.train()
    assert not original.training
    original.train()
    model.eval()
    assert original.training
    assert original.blocks[0].training
    assert not any(module.training for module in model.modules())


# Shared parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["hooked", "original"])
def test_conversion_on_either_side_reaches_both(side):
    model = HookedViT(TINY_MODELS["siglip"]())
    (model if side == "hooked" else model.original).to(torch.float64)
    images = images_for("siglip").double()
    assert all(p.dtype == torch.float64 for p in [*model.parameters(), *model.original.parameters()])
    assert torch.equal(model(images), model.original(images))


@pytest.mark.parametrize("side", ["hooked", "original"])
def test_loading_on_either_side_reaches_both(side):
    model, images = HookedViT(TINY_MODELS["class_token"]()), images_for("class_token")
    before = model(images)
    state = {key: value + 0.1 for key, value in model.state_dict().items()}
    assert list(state) == list(model.original.state_dict())
    (model if side == "hooked" else model.original).load_state_dict(state)
    assert not torch.equal(model(images), before)
    assert torch.equal(model(images), model.original(images))


def test_a_replaced_parameter_reaches_both():
    model, images = HookedViT(TINY_MODELS["class_token"]()), images_for("class_token")
    before = model(images)
    model.original.blocks[0].attn.qkv.weight = nn.Parameter(torch.zeros(96, 32))
    model.blocks[1].mlp.core.fc1.weight = nn.Parameter(torch.zeros(128, 32))
    assert model.original.blocks[1].mlp.fc1.weight.abs().sum() == 0
    assert model.blocks[0].attn.W_Q.abs().sum() == 0
    assert not torch.equal(model(images), before)
    assert torch.equal(model(images), model.original(images))


def test_parameters_are_the_originals_own():
    model = HookedViT(TINY_MODELS["open_clip_whole"]())
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.original.parameters()}
    assert dict(model.named_parameters()).keys() == {name for name, _ in model.named_parameters()}


def test_a_replaced_submodule_is_refused_by_name():
    model, images = HookedViT(TINY_MODELS["class_token"]()), images_for("class_token")
    model.original.blocks[1].mlp.fc1 = nn.Linear(32, 128)
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.1\.mlp\.fc1'.*Wrap the changed module again"):
        model(images)


def test_a_deep_copy_is_a_model_of_its_own():
    model, images = HookedViT(TINY_MODELS["siglip"]()), images_for("siglip")
    twin = copy.deepcopy(model)
    expected = model(images)
    assert torch.equal(twin(images), expected)
    twin.add_hook("blocks.0.attn.hook_z", lambda value, hook: value * 0)
    twin.add_hook("blocks.0.mlp.hook_post", lambda value, hook: value * 0)
    assert not torch.equal(twin(images), expected)
    assert torch.equal(model(images), expected)
    with torch.no_grad():
        twin.original.pos_embed.zero_()
    assert torch.equal(model(images), expected)


# Export ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("vitdecomp_tests::mark", mutates_args=())
def mark(value: torch.Tensor, name: str) -> torch.Tensor:
    """The identity, with a name that stays in a graph."""
    return value.clone()


@mark.register_fake
def _(value, name):
    return torch.empty_like(value)


# An export takes a second. What the package makes of its own is tested for all models by decompositions.
EXPORTED = ("class_token", "siglip", "parallel_things", "eva02", "beit", "cait", "xcit_tokens_norm", "open_clip_whole")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.sweep] * (n not in EXPORTED)) for n in NAMES])
def test_exported_graphs_keep_every_hook_and_take_any_batch(name, model):
    images = images_for(name)
    with model.hooks([(hook, lambda value, hook: mark(value, hook.name)) for hook in plain_names(model)]):
        shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
        program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
    marks = {node.args[1] for node in program.graph.nodes if "vitdecomp_tests.mark" in str(node.target)}
    assert marks == set(plain_names(model))
    for batch in (1, 5):
        images = images_for(name, batch)
        expected = first(model.original(images))
        assert (first(program.module()(images)) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_catalogue_holds_small_models_in_evaluation_mode(name):
    module = TINY_MODELS[name]()
    assert 0.01e6 <= sum(p.numel() for p in module.parameters()) <= 0.5e6
    assert not any(child.training for child in module.modules())
    assert torch.equal(next(module.parameters()), next(TINY_MODELS[name]().parameters()))
    assert images_for(name).shape == (3, 3, SIZES.get(name, 32), SIZES.get(name, 32))
