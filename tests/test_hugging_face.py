"""Hugging Face's vision models: taken as they are, by their graphs alone."""

from functools import cache

import pytest
import torch
import transformers

from vitdecomp_lens import attribute, attribute_tokens, decompose
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.frozen.trace import trace
from vitdecomp_lens.traced import Traced

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*The slow replay takes its place",  # torch's own attention, pooled by a learned query
)
BYS = ("layer", "head", "neuron")
SMALL = {"image_size": 32, "patch_size": 8, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
COLUMN = {**SMALL, "intermediate_size": 20}
WINDOWED = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


def class_token(model, images):
    return model(images).last_hidden_state[:, 0]


MODELS = {
    "CLIPVisionModel": ("CLIPVisionConfig", COLUMN, "representation"),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", {**COLUMN, "projection_dim": 9}, "representation"),
    "Dinov2Model": ("Dinov2Config", {**SMALL, "mlp_ratio": 2}, "representation"),
    "SiglipVisionModel": ("SiglipVisionConfig", COLUMN, "representation"),
    "ViTModel": ("ViTConfig", COLUMN, class_token),
    "DeiTModel": ("DeiTConfig", COLUMN, class_token),
    "Swinv2Model": ("Swinv2Config", WINDOWED, "representation"),
    "ViTForImageClassification": ("ViTConfig", {**COLUMN, "num_labels": 5}, "logits"),
}
ASKED = ("CLIPVisionModel", "Dinov2Model", "SiglipVisionModel", "ViTModel", "Swinv2Model")


def made(name, dtype=torch.float64):
    """A small model from a configuration, all parameters moved off their initial values."""
    return _made(name, dtype)


@cache
def _made(name, dtype):
    config, options, of = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype), of


def photographs(count=2, dtype=torch.float64):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=dtype)


def output(model, x):
    """What the model itself gives for a representation."""
    given = model(x)
    fields = ("image_embeds", "logits", "pooler_output")
    first = next((getattr(given, f) for f in fields if getattr(given, f, None) is not None), None)
    return class_token(model, x) if type(model).__name__ in ("ViTModel", "DeiTModel") else first


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def branch_count(model):
    sizes = model.config.depths if hasattr(model.config, "depths") else (model.config.num_hidden_layers,)
    return 2 * sum(sizes) + ("Siglip" in type(model).__name__)  # SigLIP pools by an MLP too


def every(names=ASKED):
    """All models; those named by default, the others in the sweep."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.sweep) for name in MODELS]


@pytest.mark.parametrize("name", every())
def test_components_sum_to_what_the_model_computes_and_cover_it(name):
    for by, dtype in (*((by, torch.float64) for by in BYS), ("head", torch.float32)):
        model, of = made(name, dtype)
        x = photographs(dtype=dtype)
        parts = decompose(model, x, by=by, of=of)
        assert parts.gap.max() < (1e-5 if dtype == torch.float32 else 1e-10)
        torch.testing.assert_close(parts.total, output(model, x))
        assert parts.coverage.found == parts.coverage.branches == branch_count(model)
        assert parts.metadata["model"] == name
        counts = [2, 2, 4, 4] if name == "Swinv2Model" else [3, 3]
        if by == "head":
            numbers = [int(label.rpartition("H")[2]) for label in parts.select(kind="head").labels]
            assert numbers == [number for count in counts for number in range(count)]
        if by == "neuron":
            first = [label for label in parts.select(kind="neuron").labels if label.endswith("N0")]
            assert len(first) == branch_count(model) - len(counts)


@pytest.mark.parametrize("name", ASKED)
def test_single_components_are_what_the_slow_replay_gives(name):
    model, of = made(name)
    x = photographs()
    traced = Traced.of(model, trace(model, x[:1], of=of))
    graph = traced.graph
    recorded = graph.record(x)
    for by in BYS:
        parts, points = decompose(model, x, by=by, of=of), traced.component_points(by)
        cut = graph.cut([point.hook for point in points])
        nothing = graph.replay(cut, recorded, {})
        for point in points[:: max(1, len(points) // 4)]:
            value = recorded[graph.points[point.hook]]
            count = 1 if point.axis is None else value.shape[point.axis]
            number = count - 1
            alone = value
            if point.axis is not None:
                alone = torch.zeros_like(value)
                alone.narrow(point.axis, number, 1).copy_(value.narrow(point.axis, number, 1))
            label = point.components(count)[number].label
            close(parts[label], graph.replay(cut, recorded, {point.hook: alone}) - nothing)
        close(sum(parts.values[row] for row, c in enumerate(parts.components) if c.kind == "constant"), nothing)


@pytest.mark.parametrize("name", every())
def test_scores_are_those_of_the_vectors_and_sum_over_tokens(name):
    model, of = made(name)
    x = photographs()
    width = output(model, x).shape[1]
    u = torch.randn(2, width, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    parts = decompose(model, x, of=of)
    scores, tokens = attribute(model, x, u, of=of), attribute_tokens(model, x, u, of=of)
    assert scores.labels == parts.labels
    close(scores.values, parts.values @ u.T)
    close(tokens.total, scores.total)
    close(tokens.rest, torch.zeros_like(scores.total))
    for block in tokens.blocks:
        for row, component in enumerate(block.components):
            if component.kind in ("mlp", "embed"):
                close(block.values[row].sum(1), scores[component.label])
    by_prefix = {len(block.grid.prefix): block.grid for block in tokens.blocks if block.grid.rows}
    grid = by_prefix[{"SiglipVisionModel": 0, "DeiTModel": 2, "Swinv2Model": 0}.get(name, 1)]
    assert (grid.rows, grid.columns) in ([(8, 8), (4, 4)] if name == "Swinv2Model" else [(4, 4)])


def test_a_token_of_an_attention_gives_what_its_value_writes():
    model, of = made("CLIPVisionModel")
    x = photographs()
    attention = model.encoder.layers[1].self_attn
    u = torch.eye(12, dtype=x.dtype)
    head = attribute_tokens(model, x, u, of=of)["encoder.layers.1.self_attn.H2"]
    kept, norm = {}, {}
    handles = [
        attention.v_proj.register_forward_hook(lambda _m, _i, value: kept.update(v=value.clone())),
        attention.k_proj.register_forward_hook(lambda _m, _i, value: kept.update(k=value.clone())),
        attention.q_proj.register_forward_hook(lambda _m, _i, value: kept.update(q=value.clone())),
        model.post_layernorm.register_forward_hook(lambda _m, i, _o: norm.update(x=i[0].clone())),
    ]
    model(x)
    for handle in handles:
        handle.remove()
    q, k, v = (kept[n].unflatten(-1, (3, 4))[:, :, 2] for n in "qkv")
    pattern = (q[:, :1] @ k.mT / 2).softmax(-1)
    written = (pattern[:, 0, :, None] * v) @ attention.out_proj.weight[:, 8:].T
    centred = written - written.mean(-1, keepdim=True)
    scale = (norm["x"].var(-1, unbiased=False) + model.post_layernorm.eps).rsqrt()
    close(head, centred * scale[:, None, None] * model.post_layernorm.weight)


# ---- what is decomposed


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel"])
def test_a_pooler_that_bends_everything_is_refused_and_named(name):
    model, _ = made(name)
    for call in (decompose, trace):
        with pytest.raises(InputError, match=r"aten::tanh in pooler.*last_hidden_state\[:, 0\]"):
            call(model, photographs())


def test_a_model_that_gives_all_tokens_asks_for_one_vector():
    config = transformers.ViTConfig(**COLUMN)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    with pytest.raises(InputError, match=r"last_hidden_state is \[batch, 17, 12\].*last_hidden_state\[:, 0\]"):
        decompose(model, torch.randn(1, 3, 32, 32))
    parts = decompose(model, torch.randn(1, 3, 32, 32), of=class_token)
    assert parts.coverage.share == 1


def test_a_classifier_is_decomposed_into_its_logits_by_itself():
    model, _ = made("ViTForImageClassification")
    x = photographs()
    parts, logits = decompose(model, x), decompose(model, x, of="logits")
    close(parts.values, logits.values)
    close(logits.total, model(x).logits)


def test_the_image_tower_of_a_whole_clip_is_what_is_decomposed():
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    config = transformers.CLIPConfig(vision_config=COLUMN, text_config=text, projection_dim=6)
    model, x = transformers.CLIPModel(config).eval().double(), photographs()
    parts = decompose(model, x)
    assert parts.total.shape == (2, 6)
    assert parts.coverage.share == 1
    close(parts.total, model.visual_projection(model.vision_model(x).pooler_output))
    direct = decompose(model, x, of="embedding")
    close(direct.total.norm(dim=-1), torch.ones(2, dtype=x.dtype))


def test_hooks_of_torch_on_a_plain_model_are_part_of_what_is_decomposed():
    model, of = made("Dinov2Model")
    x = photographs()
    handle = model.encoder.layer[1].mlp.register_forward_hook(lambda _m, _i, value: value * 0)
    try:
        parts = decompose(model, x, of=of)
        close(parts.total, model(x).pooler_output)
        assert parts.gap.max() < 1e-10
    finally:
        handle.remove()
    assert decompose(model, x, of=of)["encoder.layer.1.mlp"].abs().max() > 1e-3
