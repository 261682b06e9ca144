"""Models of somebody else's with TransformerLens hook points: no code knows them but the protocol."""

from functools import cache, partial

import pytest
import torch
import transformers
from foreign_vit import ForeignViT, Shape
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.sources import build_bridge_from_module

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.foreign import Foreign
from vitdecomp_lens.frozen.trace import trace

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*The slow replay takes its place",  # products of two values by einsum
    "ignore:A forward hook edited",
)
BYS = ("layer", "head", "neuron")


def perturbed(module, dtype):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.requires_grad_(False).add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval().to(dtype)


def hooked(dtype=torch.float64, **shape):
    torch.manual_seed(0)
    return perturbed(ForeignViT(Shape(**shape)), dtype)


def bridge(name, dtype=torch.float64):
    """TransformerLens' bridge around a Hugging Face model."""
    torch.manual_seed(0)
    config = getattr(transformers, "DeiTConfig" if name.startswith("DeiT") else "ViTConfig")(
        image_size=24, patch_size=6, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
    )
    model = perturbed(getattr(transformers, name)(config), dtype)
    return build_bridge_from_module(model, name, hf_config=config).eval()


def class_token(model, images):
    return model(images)[:, 0]


MODELS = {
    "hooked": (hooked, "representation"),
    "ViTModel": (partial(bridge, "ViTModel"), class_token),
    "DeiTModel": (partial(bridge, "DeiTModel"), class_token),
    "ViTForImageClassification": (partial(bridge, "ViTForImageClassification"), "logits"),
}


def made(name, dtype=torch.float64):
    return _made(name, dtype)


@cache
def _made(name, dtype):
    make, of = MODELS[name]
    model = make(dtype)
    model(photographs(dtype=dtype))  # a bridge is wired when it first runs: else it is traced once more
    return model, of


def photographs(count=2, dtype=torch.float64):
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=dtype)


def output(model, of, x):
    return of(model, x) if callable(of) else model(x)


# ---- an oracle: everything is held by hooks at what it was, and one part is taken away


class Held:
    """A model run with hooks that give stored values; ``without`` takes something away from one of them."""

    def __init__(self, model, of, x):
        self.model, self.of, self.x = model, of, x
        self.stored = {}
        handles = [point.register_forward_hook(self.store(name)) for name, point in model.hook_dict.items()]
        self.total = output(model, of, x)
        for handle in handles:
            handle.remove()

    def store(self, name):
        def keep(point, _inputs, value):
            shown = value if point.hook_conversion is None else point.hook_conversion.convert(value)
            self.stored[name] = shown.clone()

        return keep

    def without(self, hook, taken, free=()):
        """What the output loses if ``taken(value)`` at one hook is zero and nothing else changes but ``free``."""
        endings = ("attn.hook_z", "mlp.hook_post", "attn.hook_q", "attn.hook_k", "ln_final.hook_scale", "hook_embed")
        names = [n for n in self.stored if n.endswith(endings) and n not in free]
        values = {name: self.stored[name] for name in names}
        values[hook] = self.stored[hook].clone()
        taken(values[hook]).zero_()
        try:
            for name, value in values.items():
                self.model.hook_dict[name].add_hook(lambda _v, hook, value=value: value.clone())
            return self.total - output(self.model, self.of, self.x)
        finally:
            for name in values:
                self.model.hook_dict[name].remove_hooks()


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# ---- exactness


def every(*names):
    """All models; those named by default, the others in the sweep."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.sweep) for name in MODELS]


@pytest.mark.parametrize("name", every("hooked", "ViTModel", "DeiTModel"))
def test_components_sum_to_what_the_model_computes(name):
    for by, dtype in (*((by, torch.float64) for by in BYS), ("head", torch.float32)):
        model, of = made(name, dtype)
        x = photographs(dtype=dtype)
        parts = decompose(model, x, by=by, of=of)
        assert parts.gap.max() < (1e-5 if dtype == torch.float32 else 1e-10)
        torch.testing.assert_close(parts.total, output(model, of, x))
        assert parts.coverage.share == 1
        assert parts.complete


def test_labels_are_those_of_transformer_lens_names():
    model, x = made("hooked")[0], photographs()
    constants = ("b_U", "ln_final.b", "W_pos", "cls")
    layers = ("attn.0", "mlp.0", "attn.1", "mlp.1", "attn.2", "mlp.2")
    assert decompose(model, x, by="layer").labels == ("embed", *layers, *constants)
    heads = decompose(model, x).select(kind="head").labels
    assert heads == tuple(f"L{layer}H{head}" for layer in range(3) for head in range(3))
    neurons = decompose(model, x, by="neuron").select(kind="neuron").labels
    assert neurons == tuple(f"L{layer}N{neuron}" for layer in range(3) for neuron in range(20))


def test_heads_of_a_bridge_are_told_apart_as_its_hooks_show_them():
    model, of = made("ViTModel")
    parts = decompose(model, photographs(), of=of)
    assert parts.select(kind="head").labels == tuple(f"L{layer}H{head}" for layer in range(2) for head in range(3))
    assert parts.metadata["model"] == model.cfg.model_name


@pytest.mark.parametrize("name", every("hooked", "ViTModel"))
def test_a_head_a_neuron_and_the_embedding_write_what_the_output_loses_without_them(name):
    model, of = made(name)
    x = photographs()
    held = Held(model, of, x)
    heads, neurons = decompose(model, x, of=of), decompose(model, x, of=of, by="neuron")
    for layer, number in ((0, 2), (1, 0)):
        lost = held.without(f"blocks.{layer}.attn.hook_z", lambda z, n=number: z[:, :, n])
        close(heads[f"L{layer}H{number}"], lost)
        lost = held.without(f"blocks.{layer}.mlp.hook_post", lambda post, n=number: post[..., n])
        close(neurons[f"L{layer}N{number}"], lost)
    close(heads["embed"], held.without("hook_embed", lambda value: value))
    assert heads["L0H2"].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["hooked", "ViTModel"])
def test_whole_layers_are_what_the_slow_replay_gives(name):
    model, of = made(name)
    x = photographs()
    parts = decompose(model, x, by="layer", of=of)
    graph = trace(model, x[:1], of=of)
    hooks = {f"{kind}.{n}": f"blocks.{n}.hook_{kind}_out" for n in range(2) for kind in ("attn", "mlp")}
    cut = graph.cut([point.hook for point in Foreign.of(model, graph).component_points("layer")])
    recorded = graph.record(x)
    nothing = graph.replay(cut, recorded, {})
    for label, hook in hooks.items():
        close(parts[label], graph.replay(cut, recorded, {hook: recorded[graph.points[hook]]}) - nothing)
    close(sum(parts.values[row] for row, c in enumerate(parts.components) if c.kind == "constant"), nothing)


# ---- scores


@pytest.mark.parametrize("name", every("hooked", "ViTModel"))
def test_scores_are_those_of_the_vectors_and_sum_over_tokens(name):
    model, of = made(name)
    x = photographs()
    width = output(model, of, x).shape[1]
    u = torch.randn(2, width, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    parts = decompose(model, x, of=of)
    scores = attribute(model, x, u, of=of)
    assert scores.labels == parts.labels
    close(scores.values, parts.values @ u.T)
    tokens = attribute_tokens(model, x, u, of=of)
    close(tokens.total, scores.total)
    close(tokens.rest, torch.zeros_like(scores.total))
    close(tokens["mlp.0"].sum(1), scores["mlp.0"])
    assert tokens.coverage.share == 1


@pytest.mark.parametrize("name", every("hooked", "ViTModel"))
def test_a_token_gives_what_its_values_write_through_the_frozen_pattern(name):
    model, of = made(name)
    x = photographs()
    held = Held(model, of, x)
    u = torch.eye(held.total.shape[1], dtype=x.dtype)[:2]
    tokens = attribute_tokens(model, x, u, of=of)
    scores = tokens["L1H2"]
    z, v = "blocks.1.attn.hook_z", "blocks.1.attn.hook_v"
    for token in (0, 5):
        lost = held.without(v, lambda values, t=token: values[:, t, 2], free=(z,))
        close(scores[:, token], lost @ u.T)
    prefix = 2 if name == "DeiTModel" else 1
    grid = tokens.blocks[-1].grid
    assert (grid.rows, grid.columns, len(grid.prefix)) == (4, 4, prefix)


# ---- hooks of the user's


def zero_head(value, hook, head=1):
    value = value.clone()
    value[:, :, head] = 0
    return value


def test_a_head_that_is_ablated_writes_nothing_and_the_run_is_that_with_the_hook():
    for name in ("hooked", "ViTModel"):
        model, of = made(name)
        x = photographs()
        before = decompose(model, x, of=of)
        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", zero_head)]):
            parts, total = decompose(model, x, of=of), output(model, of, x)
        close(parts.total, total)
        assert parts.gap.max() < 1e-10
        assert not parts["L1H1"].any()
        assert before["L1H1"].abs().max() > 1e-3
        assert not any(component.kind == "intervention" for component in parts.components)


def test_what_a_hook_changes_on_the_way_to_the_output_is_a_component():
    for name in ("hooked", "ViTModel"):
        model, of = made(name)
        x = photographs()
        hook = "blocks.1.hook_resid_pre"
        with model.hooks(fwd_hooks=[(hook, lambda value, hook: value * 1.5)]):
            parts, total = decompose(model, x, of=of), output(model, of, x)
            tokens = attribute_tokens(model, x, torch.eye(total.shape[1], dtype=x.dtype), of=of)
        close(parts.total, total)
        assert parts.gap.max() < 1e-10
        written = parts[f"intervention@{hook}"]
        assert written.abs().max() > 1e-3
        close(tokens.total, total)
        before = decompose(model, x, of=of)
        assert f"intervention@{hook}" not in before.labels
        close(before.total, output(model, of, x))


def test_hooks_that_only_look_leave_everything_as_it_is():
    model, x, seen = made("hooked")[0], photographs(), []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda value, hook: seen.append(hook.name))]):
        parts = decompose(model, x)
    assert seen
    assert parts.labels == decompose(model, x).labels


# ---- labels of the user's


def test_components_are_read_where_the_user_says():
    model, x = made("hooked")[0], photographs()
    parts = decompose(model, x, components={"first layers": "blocks.1.hook_resid_post"})
    names = ("first layers", "L2H0", "L2H1", "L2H2", "mlp.2")
    assert parts.labels[:5] == names
    assert parts.gap.max() < 1e-10
    assert (parts.coverage.found, parts.coverage.branches) == (3, 6)
    whole = decompose(model, x)
    close(parts["L2H1"], whole["L2H1"])
    behind = ("attn.0", "mlp.0", "attn.1", "mlp.1")
    coarse = decompose(model, x, by="layer")
    stream = sum(coarse[label] for label in ("embed", "W_pos", "cls", *behind))
    close(parts["first layers"], stream)


def test_a_label_takes_the_place_of_the_component_that_is_read_there():
    model, x = made("hooked")[0], photographs()
    mapping = {"patches": "hook_embed", "attn.1": "blocks.1.attn.hook_z", "mixer": "blocks.0.hook_attn_out"}
    parts, whole = decompose(model, x, components=mapping), decompose(model, x)
    assert parts.labels[:3] == ("patches", "mixer", "mlp.0")
    assert parts.coverage.share == 1
    close(parts["attn.1"], whole.select(kind="head", layer=1).values.sum(0))
    close(parts["patches"], whole["embed"])
    u = torch.randn(2, 7, dtype=x.dtype)
    close(attribute(model, x, u, components=mapping)["mixer"], parts["mixer"] @ u.T)
    tokens = attribute_tokens(model, x, u, components=mapping)
    close(tokens["attn.1"].sum(1), parts["attn.1"] @ u.T)
    close(tokens["patches"].sum(1), parts["patches"] @ u.T)


def test_a_bridge_takes_any_of_a_hooks_names():
    model, of = made("ViTModel")
    x = photographs()
    parts = decompose(model, x, of=of, components={"first": "blocks.0.attn.hook_out"})
    close(parts["first"], decompose(model, x, of=of, by="layer")["attn.0"])


WRONG = {
    "no such hook": ({"a": "blocks.0.hook_atn_out"}, UnknownNameError, "blocks.0.hook_attn_out"),
    "never passed": ({"a": "hook_unused"}, InputError, "never passes"),
    "never passed, canonical": ({"a": "blocks.0.attn.hook_result"}, InputError, "never passes"),
    "behind a nonlinearity": ({"a": "blocks.2.attn.hook_q"}, InputError, "nonlinearity"),
    "behind another": ({"a": "blocks.1.hook_resid_post", "b": "blocks.0.hook_attn_out"}, InputError, "'b'"),
    "twice": ({"a": "hook_embed", "b": "hook_embed"}, InputError, "once"),
    "reserved": ({"intervention@a": "hook_embed"}, InputError, "label"),
}


@pytest.mark.parametrize("case", WRONG)
def test_where_nothing_can_be_read_is_said(case):
    mapping, error, said = WRONG[case]
    with pytest.raises(error, match=said):
        decompose(made("hooked")[0], photographs(), components=mapping)


def test_a_mapping_is_for_models_with_hooks_that_do_not_say_themselves():
    ours = HookedViT.from_timm("test_vit", num_classes=3)
    with pytest.raises(InputError, match="says itself"):
        decompose(ours, torch.randn(1, 3, 160, 160), components={"a": "hook_embed"})
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    with pytest.raises(InputError, match="no TransformerLens hook points"):
        decompose(plain, torch.randn(1, 3, 2, 2), components={"a": "hook_embed"})


# ---- fewer hooks


def without(model, *names):
    """The model without some of its hooks."""
    for module in list(model.modules()):
        for name in names:
            if isinstance(getattr(module, name, None), HookPoint):
                setattr(module, name, nn.Identity())
    model.setup()
    return model


@pytest.mark.parametrize(
    "missing",
    [
        ("hook_z", "hook_post", "hook_v"),
        ("hook_attn_out", "hook_mlp_out"),
        ("hook_embed",),
        ("hook_scale", "hook_normalized", "hook_resid_pre", "hook_resid_mid", "hook_resid_post"),
    ],
    ids=["parts", "outputs", "embedding", "stream"],
)
def test_what_has_no_hook_is_computed_from_the_hooks_around_it(missing):
    model, whole, x = without(hooked(), *missing), made("hooked")[0], photographs()
    for by in BYS:
        parts, expected = decompose(model, x, by=by), decompose(whole, x, by=by)
        assert parts.gap.max() < 1e-10
        labels = [c.label for c in expected.components if c.kind != "constant" and c.label in parts.labels]
        assert len(labels) >= 7
        close(parts.select(labels=labels).values, expected.select(labels=labels).values)
        assert parts.coverage.share == 1
    u = torch.randn(2, 7, dtype=x.dtype)
    scores, expected = attribute_tokens(model, x, u), attribute_tokens(whole, x, u)
    for label in ("L0H1", "L2H2", "mlp.1"):
        close(scores[label], expected[label])
    close(scores["embed"].sum(1), expected["embed"].sum(1))
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_q", lambda value, hook: value * 2)]):
        parts, total = decompose(model, x), model(x)
    close(parts.total, total)
    assert parts.gap.max() < 1e-10


def test_a_model_with_other_names_is_told_apart_by_its_modules_and_run_with_its_hooks():
    model = without(hooked(), "hook_attn_out", "hook_mlp_out", "hook_z", "hook_post", "hook_v", "hook_embed")
    for block in model.blocks:
        block.peek = block.hook_resid_mid
        block.hook_resid_mid = nn.Identity()
        block.ln2 = nn.Sequential(block.peek, block.ln2)
    model.setup()
    x, expected = photographs(), decompose(made("hooked")[0], photographs())
    parts = decompose(model, x)
    assert parts.coverage.share == 1
    assert {"blocks.1.attn.H2", "blocks.1.mlp"} <= set(parts.labels)
    close(parts["blocks.1.attn.H2"], expected["L1H2"])
    close(parts["blocks.1.mlp"], expected["mlp.1"])
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda value, hook: value * 0)]):
        parts = decompose(model, x)
    assert not parts["blocks.1.attn.H2"].any()
    assert parts.gap.max() < 1e-10


# ---- what is decomposed


def test_any_hook_with_one_vector_and_any_function_can_be_decomposed():
    model, of = made("ViTForImageClassification")
    x = photographs()
    parts = decompose(model, x, of="unembed.hook_in")
    assert parts.gap.max() < 1e-10
    assert parts.total.shape == (2, 12)
    scores = attribute(model, x, torch.eye(2, dtype=x.dtype), of=of)
    classifier = model.unembed.original_component
    close(parts.values[:7] @ classifier.weight.T, scores.values[:7])


def test_a_bridge_that_gives_all_tokens_asks_for_one_vector():
    with pytest.raises(InputError, match=r"of=lambda model, images: model\(images\)\[:, 0\]"):
        decompose(made("ViTModel")[0], photographs())


def test_a_bridge_is_traced_before_it_ever_ran_and_runs_afterwards():
    model, x = bridge("ViTForImageClassification"), photographs()
    graph = trace(model, x)
    parts = decompose(model, x)
    close(parts.total, model(x))
    assert graph.cut().complete
    assert parts.gap.max() < 1e-10
    close(decompose(model, x).values, parts.values)


def test_gradients_reach_the_images():
    model, x = made("hooked")[0], photographs(1).requires_grad_()
    attribute(model, x, torch.eye(7, dtype=x.dtype)[:1], by="layer")["attn.1"].sum().backward()
    assert x.grad.abs().max() > 0
