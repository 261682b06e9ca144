"""Compiled cuts: push and pull equal the replay, part by part, whatever the model, the batch and the dtype."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import timm
import torch
from frozen_samples import Lifted, images
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.xcit import Xcit
from tiny_models import TINY_MODELS, images_for, perturb
from torch import nn

from vitdecomp_lens import HookedViT
from vitdecomp_lens.decompose import attribute, attribute_tokens, decompose
from vitdecomp_lens.errors import CapacityError, VitDecompWarning
from vitdecomp_lens.frozen import graph as graphs
from vitdecomp_lens.frozen import pairs
from vitdecomp_lens.frozen.graph import wide
from vitdecomp_lens.frozen.pairs import NoFastPathError, Pairs, Tape, matched_groups
from vitdecomp_lens.frozen.program import Program
from vitdecomp_lens.frozen.slow import ReplayedCut
from vitdecomp_lens.frozen.trace import trace
from vitdecomp_lens.request import make_request, on_pieces

functional = nn.functional
TINY = {"img_size": 32, "embed_dim": 16, "num_classes": 5}
WINDOWED = {**TINY, "patch_size": 4, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4)}
COLUMN = {**TINY, "patch_size": 8, "depth": 2, "num_heads": 2}
FAMILIES = {
    "swin": (lambda: SwinTransformer(**WINDOWED), 32),
    "swin_v2": (lambda: SwinTransformerV2(**WINDOWED), 32),
    "mixer": (lambda: MlpMixer(**TINY, patch_size=8, num_blocks=2), 32),
    "cait": (lambda: Cait(**COLUMN, depth_token_only=1), 32),
    "xcit": (lambda: Xcit(**COLUMN, cls_attn_layers=1), 32),
    "beit": (lambda: Beit(**COLUMN, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True), 32),
    "convnext": (lambda: timm.create_model("test_convnext2", num_classes=5), 32),
    "maxvit": (lambda: timm.create_model("test_maxvit", num_classes=5), 160),
    "efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=5), 32),
}


@cache  # tests leave models as they are, and what takes time is to trace them
def family(name):
    make, size = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = perturb(make())
    generator = torch.Generator().manual_seed(1)
    for buffer in model.buffers():  # running statistics
        if buffer.is_floating_point() and buffer.dim() == 1:
            buffer.add_(0.5 * torch.rand(buffer.shape, generator=generator))
    return model.double(), torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)


def alone(graph, cut, recorded, name, value):
    """What the replay gives with only one source, less what it gives without any."""
    return graph.replay(cut, recorded, {name: value}) - graph.replay(cut, recorded, {})


def close(found, expected, atol=1e-11):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", FAMILIES)
def test_contributions_of_the_default_cut_sum_to_the_representation_of(name):
    model, x = family(name)
    graph = trace(model, x)
    cut = graph.cut()
    assert not cut.unknown
    written, recorded = graph.push(cut, x), graph.record(x)
    with torch.no_grad():
        total = model.forward_head(model.forward_features(x), pre_logits=True)
    scale = total.abs().max()
    assert ((sum(written.values()) - total).abs().max() / scale) < 1e-10
    for point in list(cut.points)[:: max(1, len(cut.points) // 3)]:
        expected = alone(graph, cut, recorded, point, recorded[cut.points[point]])
        close(written[point] / scale, expected / scale)


HOOKED = [
    "class_token",
    "layer_scale",
    "siglip",
    "mean_pool_fc_norm",
    "swiglu",
    "rms_norm",
    "open_clip",
    "open_clip_pooler",
]


def fresh(name):
    return HookedViT(TINY_MODELS[name]().double()), images_for(name, 3).double()


hooked = cache(fresh)


@pytest.mark.parametrize("name", HOOKED)
def test_every_head_alone_is_what_the_replay_gives_for_it(name):
    model, x = hooked(name)
    graph = trace(model, x)
    points = {p.hook: p for p in model.component_points("head")}
    cut = graph.cut(points)
    splits = {hook: point.axis for hook, point in points.items()}
    program, recorded = graph.program(cut, splits=splits, dtype=torch.float64), graph.record(x)
    kept = {name: program.keep(name, recorded[node]) for name, node in cut.points.items()}
    found = program.contributions(kept, program.weights_at(recorded, len(x)), len(x))
    assert set(found) == set(cut.points)
    for hook, node in cut.points.items():
        axis, value = splits[hook], recorded[node]
        parts = [value] if axis is None else [keep_only(value, axis, n) for n in range(value.shape[axis])]
        expected = torch.stack([alone(graph, cut, recorded, hook, part) for part in parts])
        close(found[hook], expected.flatten(2))


def keep_only(value, axis, number):
    mask = torch.zeros(value.shape[axis], dtype=value.dtype)
    mask[number] = 1
    return value * mask.reshape([-1 if d == axis % value.dim() else 1 for d in range(value.dim())])


@pytest.mark.parametrize("name", ["layer_scale", "mean_pool_with_class_token", "dinov2_reg"])
def test_a_token_alone_is_what_the_replay_gives_for_it(name):
    model, x = hooked(name)
    points = {p.hook: p for p in model.token_points("head")}
    graph = trace(model, x, listened=list(points))
    cut = graph.cut(points)
    splits = {hook: point.axis for hook, point in points.items()}
    directions = torch.randn(3, graph.root.meta["val"].shape[-1], generator=torch.Generator().manual_seed(0)).double()
    program = graph.program(cut, splits=splits, directions=directions, dtype=torch.float64)
    recorded = graph.record(x)
    weights = program.weights_at(recorded, len(x))
    for hook, node in list(cut.points.items())[:3]:
        value, point = recorded[node], points[hook]
        heads = 1 if point.axis is None else value.shape[point.axis]
        out = torch.full((heads, len(x), value.shape[point.token_axis], 3), torch.nan, dtype=torch.float64)
        program.by_token(hook, program.keep(hook, value), weights, out, token_axis=point.token_axis)
        for token in (0, 1, value.shape[point.token_axis] - 1):
            part = keep_only(value, point.token_axis, token)
            parts = [part] if point.axis is None else [keep_only(part, point.axis, n) for n in range(heads)]
            expected = torch.stack([alone(graph, cut, recorded, hook, p) @ directions.T for p in parts])
            close(out[:, :, token], expected)


def test_pull_is_push_along_the_directions():
    model, x = family("swin")
    graph = trace(model, x)
    cut, directions = graph.cut(), torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pushed, pulled = graph.push(cut, x), graph.pull(cut, x, directions)
    assert pushed.keys() == pulled.keys()
    for name, vectors in pushed.items():
        close(pulled[name], vectors @ directions.T)


def test_a_constant_is_what_vanishes_when_its_parameter_is_zero():
    """The frozen statistics are those of the model as it was: an eager run of the frozen rest is the oracle."""
    model, x = family("mixer")
    graph = trace(model, x)
    cut = graph.cut()
    written, recorded = graph.push(cut, x), graph.record(x)
    constants = [name for name in written if name not in cut.points]
    biases = [name for name, parameter in model.named_parameters() if name.endswith("bias") and name in constants]
    assert len(biases) >= 5
    for name in biases:
        parameter = model.get_parameter(name)
        before = parameter.data.clone()
        node = next(n for n in graph.nodes if graph.parameters.get(n.name) == name)
        without = {**recorded, node: torch.zeros_like(before)}
        close(written[name], graph.replay(cut, recorded, {}) - graph.replay(cut, without, {}))
    close(sum(written[name] for name in constants), graph.replay(cut, recorded, {}))


def test_an_output_bias_is_itself_a_constant():
    model = Lifted((4,), lambda m, s, x: functional.linear(s.tanh(), m.bank("w", 3, 4), m.bank("b", 3)) + 0.5)
    with torch.no_grad():
        model(images())
    graph = trace(model.double().eval(), images())
    written = graph.push(graph.cut(), images(2))
    assert set(written) == {":tanh", "bank.made.b", ".shift"}
    close(written["bank.made.b"], model.bank("b").detach().expand(2, -1))
    close(written[".shift"], torch.full((2, 3), 0.5, dtype=torch.float64))


# --- batches, dtypes, derivatives ---


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_any_batch_is_the_images_one_by_one(batch):
    model, _ = family("swin")
    x = torch.randn(batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
    graph = trace(model, x[:1])
    cut = graph.cut()
    together = graph.push(cut, x)
    one_by_one = [graph.push(cut, image[None]) for image in x]
    for name, vectors in together.items():
        close(vectors, torch.cat([single[name] for single in one_by_one]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    model = TINY_MODELS["class_token"]().to(dtype)
    x = images_for("class_token", 2).to(dtype)
    graph = trace(model, x)
    cut = graph.cut()
    written = graph.push(cut, x)
    assert wide(dtype) == torch.float32
    assert {vectors.dtype for vectors in written.values()} == {torch.float32}
    recorded = graph.record(x)
    exact = {
        node: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for node, v in recorded.items()
    }
    for point, node in cut.points.items():
        expected = alone(graph, cut, exact, point, exact[node])
        torch.testing.assert_close(written[point], expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


def test_images_that_require_gradients_get_those_of_the_contributions():
    model, x = family("swin")
    graph = trace(model, x)
    cut = graph.cut()
    point = list(cut.points)[1]

    def score(image):
        return graph.push(cut, image)[point].square().sum()

    image = x[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(image), image)
    step = torch.randn(image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = [score(x[:1] + sign * 1e-5 * step) for sign in (1, -1)]
    assert not moved[0].requires_grad
    assert float((gradient * step).sum()) == pytest.approx(float(moved[0] - moved[1]) / 2e-5, rel=1e-6)


def test_inference_mode_changes_nothing():
    model, x = family("convnext")
    graph = trace(model, x)
    expected = graph.push(graph.cut(), x)
    with torch.inference_mode():
        graph = trace(model, x)
        found = graph.push(graph.cut(), x)
    for name, vectors in expected.items():
        close(found[name], vectors, atol=0)


# --- pairs ---


def test_pairs_that_share_their_maps_merge():
    """Two residual branches read one map: the stream's cotangent stays one pair."""
    model, x = family("mixer")
    graph = trace(model, x)
    cut = graph.cut()
    program = graph.program(cut, dtype=torch.float64)
    assert all(len(terms) == 1 for terms in program.terms.values())
    column = HookedViT(TINY_MODELS["class_token"]())
    graph = trace(column, images_for("class_token"))
    cut = graph.cut([p.hook for p in column.component_points("layer")])
    terms = graph.program(cut).terms
    assert not terms.pop("hook_patch_embed")  # the class token reads no patch
    assert {of_point[0].maps_number for of_point in terms.values()} == {0}


def test_tokens_that_nothing_reads_are_not_kept():
    model, x = hooked("class_token")
    graph = trace(model, x)
    cut = graph.cut([p.hook for p in model.component_points("layer")])
    program = graph.program(cut, dtype=torch.float64)
    assert program.kept_rows("blocks.1.hook_mlp_out") == (1, 0, 1)
    assert program.keep("blocks.1.hook_mlp_out", torch.zeros(3, 17, 32)).shape == (3, 1, 32)


def pooled_then_normed(m, s, x):
    return functional.layer_norm(s.mean(1), (6,))


def pooled_twice(m, s, x):
    """Both halves have weights of one number an image, but not the same."""
    first, second = m.lifted("first", x, 1).sigmoid(), m.lifted("second", x, 1).sigmoid()
    return first * s[:, :2].mean(1) + second * s[:, 2:].mean(1)


@pytest.mark.parametrize(
    ("tail", "known"),
    [
        (pooled_then_normed, True),
        (lambda m, s, x: s.mean(1) + functional.rms_norm(s.mean(1), (6,)), False),
        (lambda m, s, x: m.lifted("gate", x, 1).sigmoid() * s.mean(1), True),
        (lambda m, s, x: functional.layer_norm(s, (6,)).mean(1), False),
        (pooled_twice, False),
        (lambda m, s, x: s.flatten(1), False),  # as many sums as tokens
    ],
    ids=["norm", "norm and skip", "gate", "norm before", "two gates", "no pooling"],
)
def test_tokens_are_summed_during_the_run_where_one_number_scales_their_weights(tail, known):
    model = Lifted((4, 6), tail)
    with torch.no_grad():
        model(images())
    graph, x = trace(model.double().eval(), images()), images(3, seed=1)
    cut = graph.cut(["hook_source"])
    program, recorded = graph.program(cut, dtype=torch.float64), graph.record(x)
    assert program.summed_first == ({"hook_source"} if known else set())
    if known:
        value = recorded[cut.points["hook_source"]]
        sums = {"hook_source": program.summed("hook_source", value, 3)}
        weights = program.weights_at(recorded, 3)
        found = program.contributions(sums, weights, 3, summed=sums)["hook_source"][0]
        close(found, alone(graph, cut, recorded, "hook_source", value))


def test_what_is_summed_during_the_run_is_not_kept():
    request = make_request(
        HookedViT(TINY_MODELS["mean_pool_fc_norm"]()),
        images_for("mean_pool_fc_norm", 3),
        "head",
        "representation",
        None,
        tokens=False,
    )
    kept = []
    on_pieces(
        request,
        [],
        lambda _images, captured: kept.append(captured.kept),
        dict.fromkeys(request.program.summed_first, lambda _images, _part: None),
        batch_size=None,
    )
    assert request.program.summed_first == {point.hook for point in request.met}
    assert kept == [{}]


def test_equal_weights_that_cancel_are_still_read():
    """A mean of centred tokens would read none of them, did not their frozen statistics differ."""

    def run(m, s, x):
        centred = functional.linear(s.transpose(1, 2), m.centring).transpose(1, 2)
        return functional.layer_norm(centred, (6,)).mean(1)

    model = Lifted((4, 6), run)
    model.register_buffer("centring", torch.eye(4, dtype=torch.float64) - 0.25)
    with torch.no_grad():
        model(images())
    graph = trace(model.double().eval(), images())
    cut, x = graph.cut(["hook_source"]), images(2, seed=1)
    close(graph.push(cut, x)["hook_source"], model(x).detach())
    assert model(x).abs().max() > 1e-2


def test_shapes_are_matched_into_the_finest_groups():
    assert matched_groups((2, 4, 8, 6), (2, 32, 2, 3)) == [([0], [0]), ([1, 2], [1]), ([3], [2, 3])]
    assert matched_groups((2, 3, 1), (2, 1, 3)) == [([0], [0]), ([1], [1, 2]), ([2], [])]
    assert matched_groups((6,), (2, 3)) == [([0], [0, 1])]


def test_too_many_pairs_are_refused_with_their_number():
    tape = Tape(torch.float64, torch.device("cpu"))
    many = Pairs(tape.start(2, 2), torch.ones(40, 3, 1, 50, dtype=torch.float64), ("A", "M"))
    with pytest.raises(CapacityError, match="would need 2000 pairs, more than 1024"):
        pairs.demote(many, tape, 1)


# --- the slow way ---


class ConvHead(nn.Module):
    """A convolution on the path, with so many taps that pairs would be too many."""

    def __init__(self):
        super().__init__()
        self.stem, self.far = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 40, padding=20)

    def forward(self, x):
        return self.far(self.stem(x).tanh()).mean((2, 3))


def scaled(m, s, x):
    return functional.max_pool2d(s * m.bank("g", 4, 1, 1), 3, 2, 1).mean((2, 3)) + m.bank("b", 4)


def pooled(m, s, x):
    return functional.max_pool2d(s, 3, 2, 1).flatten(1)


def excited(m, s, x):
    """Squeeze-excite of more channels than there may be pairs."""
    gate = functional.conv2d(s.mean((2, 3), keepdim=True), m.bank("gate", 300, 300, 1, 1) / 17).sigmoid()
    return functional.linear((s * gate).mean((2, 3)), m.bank("out", 3, 300))


SLOW = {
    "scaled": (scaled, "aten::max_pool2d in the model itself: it has no adjoint"),
    "max_pool": (pooled, "aten::max_pool2d in the model itself: it has no adjoint"),
    "amax": (lambda m, s, x: s.amax(3).flatten(1), "aten::amax in the model itself: it has no adjoint"),
}


def slow_sample(name):
    run, message = SLOW[name]
    model = Lifted((4, 4, 6), run)
    with torch.no_grad():
        model(images())
    return model.double().eval().requires_grad_(False), message


def check_slow(graph, cut, x, message):
    with pytest.warns(VitDecompWarning, match=message):
        program = graph.program(cut, dtype=torch.float64)
    assert isinstance(program, ReplayedCut)
    written, recorded = graph.push(cut, x), graph.record(x)
    for point, node in cut.points.items():
        close(written[point], alone(graph, cut, recorded, point, recorded[node]))
    close(written["constants"], graph.replay(cut, recorded, {}))
    close(sum(written.values()), recorded[graph.root])
    return written


@pytest.mark.parametrize("name", SLOW)
def test_what_pairs_cannot_pass_is_replayed_exactly_with_a_warning(name):
    model, message = slow_sample(name)
    graph, x = trace(model, images()), images(3, seed=2)
    cut = graph.cut(["hook_source"])
    written = check_slow(graph, cut, x, message)
    directions = torch.randn(2, written["constants"].shape[1], dtype=torch.float64)
    with pytest.warns(VitDecompWarning, match=message):
        pulled = graph.pull(cut, x, directions)
    for name, vectors in written.items():
        close(pulled[name], vectors @ directions.T)


def test_the_slow_way_tells_tokens_apart_wherever_they_are():
    model, message = slow_sample("max_pool")
    graph, x = trace(model, images()), images(3, seed=2)
    cut = graph.cut(["hook_source"])
    with pytest.warns(VitDecompWarning, match=message):
        program = graph.program(cut, dtype=torch.float64)
    recorded = graph.record(x)
    value, weights = recorded[cut.points["hook_source"]], program.weights_at(recorded, len(x))
    for axis, count in ((2, 24), (1, 4), (3, 6)):  # rows × columns, channels, columns
        out = torch.full((1, len(x), count, program.directions), torch.nan, dtype=torch.float64)
        program.by_token("hook_source", value, weights, out, token_axis=axis)
        for token in range(0, count, 3):
            mask = torch.zeros(count, dtype=torch.float64)
            mask[token] = 1
            part = value * mask.reshape({2: (4, 6), 1: (4, 1, 1), 3: (6,)}[axis])
            close(out[0, :, token], alone(graph, cut, recorded, "hook_source", part))


def test_too_many_pairs_are_replayed_exactly_with_a_warning():
    torch.manual_seed(0)
    model = ConvHead().double().eval()
    check_slow(graph := trace(model, images()), graph.cut(), images(2), "aten::conv2d in far: .* would need 1600 pairs")


def test_a_gate_of_many_channels_is_replayed_exactly_with_a_warning():
    model = Lifted((300, 2, 2), excited)
    with torch.no_grad():
        model(images())
    graph = trace(model.double().eval().requires_grad_(False), images())
    x, cut = images(2, seed=3), graph.cut(["hook_source"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "MOST_PAIRS", 256)
        written = check_slow(graph, cut, x, "aten::mul in the model itself: .* would need 300 pairs")
    graph._programs.clear()
    assert isinstance(graph.program(cut, dtype=torch.float64), Program)
    close(graph.push(cut, x)["hook_source"], written["hook_source"])


def test_the_warning_comes_once_for_a_compiled_cut():
    model, message = slow_sample("max_pool")
    graph = trace(model, images())
    cut = graph.cut(["hook_source"])
    with pytest.warns(VitDecompWarning, match=message):
        program = graph.program(cut)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graph.program(cut) is program


def test_the_slow_way_reads_weights_anew():
    model, message = slow_sample("scaled")
    graph, x = trace(model, images()), images(2, seed=2)
    cut = graph.cut(["hook_source"])
    with pytest.warns(VitDecompWarning, match=message):
        graph.push(cut, x)
    model.bank("g").data.mul_(-2)
    close(sum(graph.push(cut, x).values()), model(x))


def test_the_slow_way_is_the_fast_way(monkeypatch):
    """The same cuts by both, through `decompose`, `attribute` and `attribute_tokens`, with a hook on the path."""

    def refuse(*_args, **_options):
        raise NoFastPathError("not today")

    for name in ("layer_scale", "siglip"):
        model, x = fresh(name)
        directions = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def ask(model=model, x=x, directions=directions):
            with model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda value, hook: value * 1.1)]):
                return (
                    decompose(model, x, by="head"),
                    attribute(model, x, directions, by="neuron"),
                    attribute_tokens(model, x, directions, by="head"),
                )

        fast = ask()
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "compile_cut", refuse)
            for entry in model.__dict__["_vitdecomp_lens_traces"]:
                entry.graph._programs.clear()
            with pytest.warns(VitDecompWarning, match="not today. The slow replay takes its place"):
                slow = ask()
        for one, other in zip(fast[:2], slow[:2], strict=True):
            constants = [c.label for c in one.components if c.kind == "constant"]
            for label in (c.label for c in one.components if c.kind != "constant"):
                close(other[label], one[label])
            close(other["constants"], one.select(labels=constants).sum())
        for one, other in zip(fast[2].blocks, slow[2].blocks, strict=True):
            assert one.components == other.components
            close(other.values, one.values)


def test_the_slow_way_serves_gradients_half_precision_and_inference_mode():
    model, message = slow_sample("scaled")
    graph, x = trace(model, images()), images(1, seed=2)
    cut = graph.cut(["hook_source"])
    with pytest.warns(VitDecompWarning, match=message):
        expected = graph.push(cut, x)["hook_source"]
    with torch.inference_mode():
        close(graph.push(cut, x)["hook_source"], expected)
    image = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(graph.push(cut, image)["hook_source"].square().sum(), image)
    step = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = [graph.push(cut, x + sign * 1e-5 * step)["hook_source"].square().sum() for sign in (1, -1)]
    assert float((gradient * step).sum()) == pytest.approx(float(moved[0] - moved[1]) / 2e-5, rel=1e-6)
    half = trace(model.bfloat16(), x.bfloat16())
    with pytest.warns(VitDecompWarning, match=message):
        written = half.push(half.cut(["hook_source"]), x.bfloat16())
    assert written["hook_source"].dtype == torch.float32
    torch.testing.assert_close(
        written["hook_source"].double(), expected, rtol=0, atol=0.05 * float(expected.abs().max())
    )


def test_the_slow_way_serves_several_threads():
    models = [slow_sample("scaled")[0] for _ in range(2)]
    graphs_of, x = [trace(model, images()) for model in models], images(2, seed=2)
    with pytest.warns(VitDecompWarning):
        expected = [graph.push(graph.cut(["hook_source"]), x)["hook_source"] for graph in graphs_of]

    def again(number):
        graph = graphs_of[number % 2]
        return graph.push(graph.cut(["hook_source"]), x)["hook_source"]

    with ThreadPoolExecutor(2) as pool:
        for number, found in enumerate(pool.map(again, range(20))):
            close(found, expected[number % 2])


def test_what_the_slow_way_compiled_in_inference_mode_has_gradients_outside_of_it():
    model, message = slow_sample("scaled")
    x = images(1, seed=2).requires_grad_()
    graph = trace(model, x)
    cut = graph.cut(["hook_source"])
    with torch.inference_mode(), pytest.warns(VitDecompWarning, match=message):
        expected = graph.push(cut, x.detach())
    found = graph.push(cut, x)
    close(found["hook_source"], expected["hook_source"])
    (gradient,) = torch.autograd.grad(sum(found.values()).sum(), x)
    (of_total,) = torch.autograd.grad(model(x).sum(), x)
    close(gradient, of_total)


def test_a_hook_on_a_constant_is_a_component_of_the_slow_way_too(monkeypatch):
    def refuse(*_args, **_options):
        raise NoFastPathError("not today")

    model, x = fresh("layer_scale")
    with model.hooks([("hook_pos_embed", lambda value, hook: 3 * value)]):
        fast = decompose(model, x)
        monkeypatch.setattr(graphs, "compile_cut", refuse)
        for entry in model.__dict__["_vitdecomp_lens_traces"]:
            for graph in (entry.graph, *entry.graph._hooked_graphs.values()):
                graph._programs.clear()
        with pytest.warns(VitDecompWarning, match="not today"):
            slow = decompose(model, x)
    for label in ("embed", "L1H0", "mlp.0", "intervention@hook_pos_embed"):
        close(slow[label], fast[label])
    assert float(slow.gap.max()) < 1e-10
