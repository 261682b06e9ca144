"""What each operation is once frozen, and that replaying it equals an eager function with its statistics held."""

import doctest

import pytest
import torch
from frozen_samples import Lifted, images, model_of
from torch import nn

from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.frozen import adjoints, replay, rules
from vitdecomp_lens.frozen.adjoints import ADJOINTS, adjoint
from vitdecomp_lens.frozen.rules import RULES, Passage, classify, operation, rule
from vitdecomp_lens.frozen.trace import trace

functional = nn.functional


@torch.library.custom_op("vitdecomp_tests::halved", mutates_args=())
def halved(value: torch.Tensor) -> torch.Tensor:
    return value / 2


@halved.register_fake
def _(value):
    return torch.empty_like(value)


@pytest.fixture
def unregistered():
    """Registers may be added to; afterwards they are as before."""
    before = dict(RULES), dict(ADJOINTS)
    yield
    for register, kept in zip((RULES, ADJOINTS), before, strict=True):
        register.clear()
        register.update(kept)


def passage(run, *, shape=(4, 6), of):
    """What the last operation named ``of`` of a traced function is, and the names of what it is passed through."""
    model = Lifted(shape, lambda m, s, x: run(m, s, x).flatten(1))
    with torch.no_grad():
        model(images())
    graph = trace(model.double().eval(), images())
    node = next(n for n in reversed(graph.nodes) if operation(n) == of and n in graph.live and n.users)
    found = classify(node, graph.live)
    return found.kind, len(found.through), found.known


PLACES = torch.tensor([2, 0, 1, 0])
LINEAR = ("linear", 1, True)
KINDS = {
    "product with a constant": (lambda m, s, x: s * 3, "aten::mul", ("linear", 1, True)),
    "sum of two": (lambda m, s, x: s + x.mean((1, 2, 3))[:, None, None], "aten::add", ("linear", 2, True)),
    "square": (lambda m, s, x: s * s, "aten::mul", ("source", 0, True)),
    "product of two": (lambda m, s, x: s * s.flip(1), "aten::mul", ("source", 0, True)),
    "quotient, live below": (lambda m, s, x: m.bank("c", 4, 6) / (s + 9), "aten::div", ("source", 0, True)),
    "quotient, rounded": (lambda m, s, x: torch.div(s, 0.3, rounding_mode="floor"), "aten::div", ("source", 0, True)),
    "quotient of two": (lambda m, s, x: s / (s.flip(1) + 3), "aten::div", ("source", 0, True)),
    "division by a norm": (lambda m, s, x: functional.normalize(s, dim=-1), "aten::div", ("normaliser", 1, True)),
    "product with 1/RMS": (lambda m, s, x: s * s.square().mean(-1, True).rsqrt(), "aten::mul", ("normaliser", 1, True)),
    "product with a root of each entry": (
        lambda m, s, x: s * (s.square() + 1).rsqrt(),
        "aten::mul",
        ("source", 0, True),
    ),
    "LayerNorm": (lambda m, s, x: functional.layer_norm(s, (6,)), "aten::layer_norm", ("normaliser", 1, True)),
    "RMSNorm": (lambda m, s, x: functional.rms_norm(s, (6,)), "aten::rms_norm", ("normaliser", 1, True)),
    "GroupNorm": (lambda m, s, x: functional.group_norm(s, 2), "aten::group_norm", ("normaliser", 1, True)),
    "squeeze-excite": (lambda m, s, x: s * s.mean(1, True).sigmoid(), "aten::mul", ("gate", 1, True)),
    "squeeze-excite from the left": (lambda m, s, x: s.mean(2, True).sigmoid() * s, "aten::mul", ("gate", 1, True)),
    "gate of another branch": (lambda m, s, x: s * m.lifted("g", x, 4, 6).sigmoid(), "aten::mul", ("gate", 1, True)),
    "SiLU by hand": (lambda m, s, x: s * s.sigmoid(), "aten::mul", ("source", 0, True)),
    "QuickGELU": (lambda m, s, x: s * (1.7 * s).sigmoid(), "aten::mul", ("source", 0, True)),
    "activation": (lambda m, s, x: functional.gelu(s), "aten::gelu", ("source", 0, True)),
    "pattern times values": (lambda m, s, x: (s @ s.mT).softmax(-1) @ s, "aten::matmul", ("pattern", 1, True)),
    "product of matrices": (lambda m, s, x: s @ s.mT, "aten::matmul", ("source", 0, True)),
    "product with a matrix": (lambda m, s, x: s @ m.bank("c", 6, 2), "aten::matmul", ("linear", 1, True)),
    "largest": (lambda m, s, x: s.amax(1), "aten::amax", ("gate", 1, True)),
    "largest, with its place": (lambda m, s, x: s.max(1)[0], "getitem", ("source", 0, True)),
    "one of a split": (lambda m, s, x: s.split(2, 1)[1], "getitem", ("linear", 1, True)),
    "places that depend on the images": (
        lambda m, s, x: s[:, s[0, :, 0].argsort()],
        "aten::index",
        ("source", 0, True),
    ),
    "constant places": (lambda m, s, x: s[:, torch.tensor([2, 0])], "aten::index", ("linear", 1, True)),
    "constant places of one dimension": (lambda m, s, x: s.index_select(1, PLACES), "aten::index_select", LINEAR),
    "written at constant places": (
        lambda m, s, x: s.index_put((torch.tensor([0]), PLACES), m.bank("c", 6)),
        "aten::index_put",
        LINEAR,
    ),
    "written at places that depend on the images": (
        lambda m, s, x: s.index_put((s[:, 0, 0].argsort(),), m.bank("c", 6)),
        "aten::index_put",
        ("source", 0, True),
    ),
    "a part replaced": (lambda m, s, x: s.select_scatter(s[:, 1], 1, 0), "aten::select_scatter", ("linear", 2, True)),
    "one or the other": (
        lambda m, s, x: torch.where(PLACES[:, None] > 0, s, 2 * s),
        "aten::where",
        ("linear", 2, True),
    ),
    "whichever is positive": (lambda m, s, x: torch.where(s > 0, s, 2 * s), "aten::where", ("source", 0, True)),
    "masked": (lambda m, s, x: s.masked_fill(PLACES[:, None] > 0, 3), "aten::masked_fill", LINEAR),
    "masked by its sign": (lambda m, s, x: s.masked_fill(s > 0, 3), "aten::masked_fill", ("source", 0, True)),
    "sum and product with a constant": (lambda m, s, x: torch.addcmul(s, s, m.bank("c", 6)), "aten::addcmul", LINEAR),
    "sum and square": (lambda m, s, x: torch.addcmul(s, s, s), "aten::addcmul", ("source", 0, True)),
    "sum and quotient": (lambda m, s, x: torch.addcdiv(s, s, m.bank("c", 6)), "aten::addcdiv", LINEAR),
    "sum and quotient, live below": (
        lambda m, s, x: torch.addcdiv(s, m.bank("c", 6), s + 9),
        "aten::addcdiv",
        ("source", 0, True),
    ),
    "mean of variance and mean": (lambda m, s, x: torch.var_mean(s, 1)[1], "getitem", LINEAR),
    "variance of variance and mean": (lambda m, s, x: torch.var_mean(s, 1)[0], "getitem", ("source", 0, True)),
    "contracted with a constant": (
        lambda m, s, x: torch.einsum("bnc,cd->bnd", s, m.bank("c", 6, 2)),
        "aten::einsum",
        LINEAR,
    ),
    "contracted with itself": (
        lambda m, s, x: torch.einsum("bnc,bmc->bnm", s, s),
        "aten::einsum",
        ("source", 0, True),
    ),
    "contracted with a pattern": (
        lambda m, s, x: torch.einsum("bnm,bmc->bnc", (s @ s.mT).softmax(-1), s),
        "aten::einsum",
        ("pattern", 1, True),
    ),
    "unknown": (lambda m, s, x: halved(s), "vitdecomp_tests::halved", ("source", 0, False)),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_operation_is_classified_as(name):
    run, of, expected = KINDS[name]
    assert passage(run, of=of) == expected


def test_a_fused_attention_is_a_pattern():
    run = lambda m, s, x: functional.scaled_dot_product_attention(s, s, s)  # noqa: E731
    assert passage(run, of="aten::scaled_dot_product_attention", shape=(2, 4, 6)) == ("pattern", 1, True)


def test_a_max_pool_is_a_gate_with_and_without_places():
    for run, of in (
        (lambda m, s, x: functional.max_pool2d(s, 2), "aten::max_pool2d"),
        (lambda m, s, x: functional.adaptive_max_pool2d(s, 2), "getitem"),
        (lambda m, s, x: functional.max_pool2d(s, 2, return_indices=True)[0], "getitem"),
    ):
        assert passage(run, of=of, shape=(2, 4, 4)) == ("gate", 1, True)


def test_active_dropout_and_batch_statistics_are_sources():
    dropped = lambda m, s, x: functional.dropout(s, 0.5, True)  # noqa: E731
    assert passage(dropped, of="aten::dropout") == ("source", 0, True)
    by_batch = lambda m, s, x: functional.batch_norm(s, None, None, training=True)  # noqa: E731
    assert passage(by_batch, of="aten::batch_norm") == ("source", 0, True)


def test_what_only_looks_at_shapes_or_types_does_not_depend_on_the_images():
    def run(m, s, x):
        constant = m.bank("c", 1, 6).type_as(s).expand_as(s[:, :1]) + torch.zeros_like(s) + s.new_ones(1)
        return s + constant

    model = model_of((4, 6), lambda p, m, s, x: run(m, s, x))
    graph = trace(model, images())
    cut = graph.cut(["hook_source"])
    assert cut.complete
    total = sum(graph.push(cut, images(4, seed=3)).values())
    torch.testing.assert_close(total, model(images(4, seed=3)), rtol=0, atol=1e-11)


# --- registers ---


def test_an_operation_without_a_rule_is_reported_by_name_and_module_path():
    class Halving(nn.Module):
        def forward(self, x):
            return halved(x)

    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Sequential(nn.Tanh(), Halving()), nn.Linear(4, 3)).eval()
    cut = trace(model, images(dtype=torch.float32)).cut()
    assert [(stop.operation, stop.module, stop.reason) for stop in cut.unknown] == [
        ("vitdecomp_tests::halved", "2.1", "unknown operation")
    ]
    assert list(cut.points) == ["2.1:vitdecomp_tests::halved"]


def test_a_registered_operation_is_passed(unregistered):
    @rule("vitdecomp_tests::halved")
    def halves(node, live):
        return Passage("linear", (node.args[0],))

    model = model_of((4, 6), lambda p, m, s, x: halved(s))
    graph = trace(model, images())
    cut = graph.cut(["hook_source"])
    assert cut.complete
    assert not cut.unknown

    @adjoint("vitdecomp_tests::halved")
    def halves_back(node, pairs, on):
        return [(node.args[0], on.scaled(node, pairs, torch.tensor(0.5)))]

    x = images(2, seed=4)
    torch.testing.assert_close(sum(graph.push(cut, x).values()), model(x), rtol=0, atol=1e-11)


def test_an_operation_is_registered_once(unregistered):
    with pytest.raises(InputError, match=r"The operation 'aten::mul' has a rule already: scales\."):
        rule("aten::mul")(lambda node, live: rules.SOURCE)
    with pytest.raises(InputError, match=r"The operation 'aten::mul' has an adjoint already: scales\."):
        adjoint("aten::mul")(lambda node, pairs, on: [])


@torch.library.custom_op("my_library::my_scale", mutates_args=())
def my_scale(value: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return value * factor


@my_scale.register_fake
def _(value, factor):
    return torch.empty_like(value)


def indented_example(text):
    """The indented lines after the last ``::`` of a docstring."""
    lines = text.split("::\n")[-1].splitlines()
    kept = [line[4:] for line in lines if line.startswith("    ")]
    return "\n".join(kept)


def test_the_documented_examples_of_new_operations_work(unregistered):
    exec(indented_example(rules.__doc__), vars(rules).copy())
    exec(indented_example(adjoints.__doc__), vars(adjoints).copy())
    model = model_of((4, 6), lambda p, m, s, x: my_scale(s, p("factor", 6)))
    graph = trace(model, images())
    cut, x = graph.cut(["hook_source"]), images(2, seed=4)
    torch.testing.assert_close(sum(graph.push(cut, x).values()), model(x), rtol=0, atol=1e-11)


def test_every_adjoint_has_a_rule():
    assert set(ADJOINTS) <= set(RULES)
    assert doctest.testmod(rules).failed == 0


# --- replay ---


def layer_norm(s, seen, weight, bias):
    y = (s - s.mean(-1, keepdim=True)) / (seen.var(-1, keepdim=True, unbiased=False) + 1e-3).sqrt()
    return y * weight + bias


def group_norm(s, seen, weight, bias):
    s, seen = (v.reshape(-1, 2, 2 * 16) for v in (s, seen))
    y = (s - s.mean(-1, keepdim=True)) / (seen.var(-1, keepdim=True, unbiased=False) + 1e-3).sqrt()
    return y.reshape(-1, 4, 4, 4) * weight[:, None, None] + bias[:, None, None]


def largest(s, seen, pool):
    """The derivative of a max-pool at ``seen`` picks its entries: its transpose, transposed again."""
    pooled, pull = torch.func.vjp(pool, seen)
    return torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(pooled))[1](s)[0]


REPLAYS = {
    "layer_norm": (
        lambda p, s: functional.layer_norm(s, (4,), p("g", 4), p("b", 4), 1e-3),
        lambda p, s, seen: layer_norm(s, seen, p("g", 4), p("b", 4)),
    ),
    "rms_norm": (
        lambda p, s: functional.rms_norm(s, (4,), p("g", 4), 1e-3),
        lambda p, s, seen: s / (seen.square().mean(-1, keepdim=True) + 1e-3).sqrt() * p("g", 4),
    ),
    "group_norm": (
        lambda p, s: functional.group_norm(s, 2, p("g", 4), p("b", 4), 1e-3),
        lambda p, s, seen: group_norm(s, seen, p("g", 4), p("b", 4)),
    ),
    "max_pool2d": (
        lambda p, s: functional.max_pool2d(s, 3, 2, 1),
        lambda p, s, seen: largest(s, seen, lambda v: functional.max_pool2d(v, 3, 2, 1)),
    ),
    "adaptive_max_pool2d": (
        lambda p, s: functional.adaptive_max_pool2d(s, 2),
        lambda p, s, seen: largest(s, seen, lambda v: functional.adaptive_max_pool2d(v, 2)),
    ),
    "amax": (lambda p, s: s.amax((2, 3)), lambda p, s, seen: largest(s, seen, lambda v: v.amax((2, 3)))),
    "squeeze-excite": (
        lambda p, s: s * (s.mean((2, 3), keepdim=True) * p("g", 4, 1, 1)).sigmoid(),
        lambda p, s, seen: s * (seen.mean((2, 3), keepdim=True) * p("g", 4, 1, 1)).sigmoid(),
    ),
    "a gate that is on the path too": (
        lambda p, s: (g := s.mean((2, 3), keepdim=True)) + g * s,
        lambda p, s, seen: s.mean((2, 3), keepdim=True) + seen.mean((2, 3), keepdim=True) * s,
    ),
    "var_mean": (
        lambda p, s: s - torch.var_mean(s, (2, 3), keepdim=True)[1],
        lambda p, s, seen: s - s.mean((2, 3), keepdim=True),
    ),
    "contracted with a pattern": (
        lambda p, s: torch.einsum("bhnm,bhmc->bhnc", (s @ s.mT).softmax(-1), s),
        lambda p, s, seen: (seen @ seen.mT).softmax(-1) @ s,
    ),
    "written at constant places": (
        lambda p, s: s.index_put((torch.arange(s.shape[0]), torch.tensor([1])), p("g", 4, 4)),
        lambda p, s, seen: torch.stack([s[:, 0], p("g", 4, 4).expand(len(s), -1, -1), s[:, 2], s[:, 3]], 1),
    ),
    "a view of what lies otherwise in memory": (
        lambda p, s: functional.layer_norm(s.permute(0, 2, 3, 1), (4,), eps=1e-3).view(-1, 16, 4).view(-1, 8, 8),
        lambda p, s, seen: layer_norm(s.permute(0, 2, 3, 1), seen.permute(0, 2, 3, 1), 1, 0).reshape(-1, 8, 8),
    ),
}


@pytest.mark.parametrize("name", REPLAYS)
def test_a_replay_is_the_eager_frozen_function(name):
    run, frozen = REPLAYS[name]
    model = Lifted((4, 4, 4), lambda m, s, x: run(m.bank, s).flatten(1))
    with torch.no_grad():
        model(images())
    model.double().eval().requires_grad_(False)
    graph = trace(model, images())
    cut, x = graph.cut(["hook_source"]), images(2, seed=2)
    recorded = graph.record(x)
    other = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = graph.replay(cut, recorded, {"hook_source": other})
    expected = frozen(model.bank, other, recorded[cut.points["hook_source"]]).flatten(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(recorded[graph.root], model(x), rtol=0, atol=0)


# --- what is written in place ---


def write_through_views(s):
    """Views of views, taken before and after, and read in between."""
    y = s.clone()
    first, turned, apart = y[:, 0], y.transpose(1, 2), y.view(-1, 2, 2, 4, 4)
    first += 1
    before = turned.sum((1, 2, 3))
    turned[:, 1:3, 2] = first[:, :2] * 2
    apart.unbind(2)[1].mul_(3)
    y[:, :, 0].zero_()
    y[:, 3, 1].fill_(2)
    return torch.cat([y.flatten(1), first.flatten(1), apart.flatten(1), before[:, None]], 1)


def write_to_parts(s):
    y = s.clone()
    left, right = y.split([1, 3], 2)
    right.permute(0, 2, 3, 1).squeeze().masked_fill_(torch.tensor([True, False, False, True]), 0.5)
    left.copy_(s[:, :, 3:] * 2)
    return torch.cat([y.flatten(1), right.flatten(1)], 1)


@pytest.mark.parametrize("run", [write_through_views, write_to_parts])
def test_what_is_written_through_a_view_is_seen_through_others(run):
    model = Lifted((4, 4, 4), lambda m, s, x: functional.linear(run(s), m.bank("w", 3, run(s).shape[1])))
    with torch.no_grad():
        model(images())
    graph = trace(model.double().eval().requires_grad_(False), images())
    x = images(3, seed=5)
    recorded = graph.record(x)
    torch.testing.assert_close(recorded[graph.root], model(x), rtol=0, atol=0)
    torch.testing.assert_close(recorded[graph.points["hook_source"]], model.source(x), rtol=0, atol=0)
    cut = graph.cut(["hook_source"])
    assert cut.complete
    torch.testing.assert_close(sum(graph.push(cut, x).values()), model(x), rtol=0, atol=1e-11)


def test_what_may_be_a_copy_must_not_be_written_to():
    def run(m, s, x):
        y = s.clone()
        y.reshape(-1, 24)[:, 0] = 3
        return y.mean(1)

    model = Lifted((4, 6), run)
    with pytest.raises(
        UnsupportedModelError, match="writes in place to what aten::reshape gave, which may share memory"
    ):
        trace(model.double().eval(), images())


def test_replay_of_half_precision_norms_computes_their_statistics_in_float32():
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).half()
    for function in (replay.inverse_deviation, replay.inverse_root_mean_square):
        assert function(x, (-1,), 1e-5).dtype == torch.float32
