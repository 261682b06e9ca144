"""Cuts: what a walk back from the output meets, passes and misses."""

import pytest
import torch
from frozen_samples import Lifted, images
from torch import nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.coverage import Stop
from vitdecomp_lens.errors import IncompleteCutError, InputError, UnknownNameError, UnsupportedModelError
from vitdecomp_lens.frozen.trace import trace

functional = nn.functional


class Block(nn.Module):
    """A branch with a norm and an activation, added to its input, with a hook on each."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 8),
            nn.GELU(),
            nn.Linear(8, width),
        )
        self.hook_post, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x):
        return x + self.hook_out(self.down(self.hook_post(self.act(self.up(self.norm(x))))))


class Stack(nn.Module):
    """An embedding, two blocks and a norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.norm = nn.Linear(48, 6), nn.ModuleList([Block(6), Block(6)]), nn.LayerNorm(6)
        self.hook_embed, self.hook_unused = HookPoint(), HookPoint()

    def forward(self, x):
        x = self.hook_embed(self.embed(x.flatten(1)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Attending(Lifted):
    """One attention over the source, with a hook on its values, read out at one token or by a learned query."""

    def __init__(self, tail):
        super().__init__((4, 6), tail)
        self.hook_v = HookPoint()


def stack():
    torch.manual_seed(0)
    return Stack().double().eval()


def made(model):
    with torch.no_grad():
        model(images())
    return model.double().eval().requires_grad_(False)


OUTS = ["hook_embed", "blocks.0.hook_out", "blocks.1.hook_out"]


def test_a_cut_that_meets_every_path_is_complete():
    graph = trace(stack(), images())
    cut = graph.cut(OUTS)
    assert cut.complete
    assert set(cut.points) == set(OUTS)
    assert cut.missing == cut.unknown == cut.unreached == ()
    assert cut.order[0] is cut.root
    assert not set(cut.points.values()) & set(cut.through)


def test_what_a_cut_misses_is_named_with_its_module_and_reason():
    graph = trace(stack(), images())
    cut = graph.cut(["hook_embed", "blocks.1.hook_out"])
    assert cut.missing == (Stop("aten::gelu", "blocks.0.act", "nonlinear"),)
    cut = graph.cut(["blocks.0.hook_out", "blocks.1.hook_out"])
    assert cut.missing == (Stop("placeholder", "", "the images themselves"),)


def test_an_incomplete_cut_is_refused_by_everything_that_needs_it():
    graph = trace(stack(), images())
    cut, message = (
        graph.cut(["hook_embed"]),
        "it misses\n  aten::gelu in blocks.1.act: nonlinear\n  aten::gelu in blocks.0.act",
    )
    for use in (
        lambda: graph.push(cut, images()),
        lambda: graph.pull(cut, images(), torch.eye(6, dtype=torch.float64)),
        lambda: graph.program(cut),
        lambda: graph.replay(cut, {}, {}),
    ):
        with pytest.raises(IncompleteCutError, match=message):
            use()


def test_points_behind_others_are_unreached():
    graph = trace(stack(), images())
    cut = graph.cut(["hook_embed", "blocks.0.hook_post", "blocks.0.hook_out", "blocks.1.hook_out"])
    assert cut.complete
    assert cut.unreached == ("blocks.0.hook_post",)
    assert "blocks.0.hook_post" not in cut.points


def test_the_default_cut_meets_each_nonlinear_output_and_the_embedding():
    cut = trace(stack(), images()).cut()
    assert cut.complete
    assert list(cut.points) == ["blocks.1.act:gelu", "blocks.0.act:gelu", ":flatten"]


def test_sources_of_the_default_cut_are_points_that_can_be_asked_for():
    graph = trace(stack(), images())
    cut = graph.cut(["hook_embed", "blocks.0.act:gelu", "blocks.1.hook_out"])
    assert cut.complete
    assert set(cut.points) == {"hook_embed", "blocks.0.act:gelu", "blocks.1.hook_out"}


def test_several_sources_of_a_module_are_numbered():
    model = made(Lifted((4,), lambda m, s, x: s.tanh() + s.flip(1).tanh() + s.roll(1, 1).tanh()))
    assert set(trace(model, images()).cut().points) == {":tanh", ":tanh#1", ":tanh#2"}


def test_an_unknown_point_is_refused_with_near_matches():
    graph = trace(stack(), images())
    with pytest.raises(UnknownNameError, match=r"no point 'blocks.0.hook_outt': did you mean 'blocks.0.hook_out'"):
        graph.cut(["blocks.0.hook_outt"])
    with pytest.raises(UnknownNameError, match=r"of= must be .*; got 'hook_embd': did you mean 'hook_embed'"):
        trace(stack(), images(), of="hook_embd")


def test_a_hook_that_the_forward_never_calls_is_no_root():
    with pytest.raises(UnsupportedModelError, match="Stack has the hook 'hook_unused', but its forward never calls it"):
        trace(stack(), images(), of="hook_unused")


# --- patterns and gates ---


def attend(m, s, x):
    v = m.hook_v(s @ m.bank("w_v", 6, 6))
    return ((s @ s.mT).softmax(-1) @ v).mean(1)


def test_a_pattern_is_passed_only_where_a_point_lies_behind_it():
    graph = trace(made(Attending(attend)), images())
    assert set(graph.cut().points) == {":matmul"}
    assert set(graph.cut(["hook_v"]).points) == {"hook_v"}
    assert set(graph.cut(["hook_source"]).points) == {"hook_source"}
    missing = graph.cut([]).missing
    assert [stop.reason for stop in missing] == ["pattern with no point of the cut behind it"]


def test_a_point_in_front_of_a_pattern_keeps_the_walk_from_passing_it():
    def run(m, s, x):
        return m.hook_v(attend(Attending_without(m), s, x))

    class Attending_without:  # noqa: N801
        def __init__(self, m):
            self.bank, self.hook_v = m.bank, nn.Identity()

    graph = trace(made(Attending(run)), images())
    cut = graph.cut(["hook_v", "hook_source"])
    assert set(cut.points) == {"hook_v"}
    assert cut.unreached == ("hook_source",)


def query_fused(m, s, x):
    q = m.bank("q", 1, 1, 2, 6).expand(s.shape[0], -1, -1, -1)
    k, v = s @ m.bank("w_k", 6, 6), (s @ m.bank("w_v", 6, 6)).tanh()
    return functional.scaled_dot_product_attention(q, k.unsqueeze(1), v.unsqueeze(1)).flatten(1)


def query_by_hand(m, s, x):
    k, v = s @ m.bank("w_k", 6, 6), (s @ m.bank("w_v", 6, 6)).tanh()
    return ((m.bank("q", 2, 6) * 0.4 @ k.mT + m.bank("bias", 4)).softmax(-1) @ v).flatten(1)


@pytest.mark.parametrize("run", [query_fused, query_by_hand])
def test_a_learned_query_is_passed_by_the_default_cut(run):
    assert set(trace(made(Attending(run)), images()).cut().points) == {":tanh"}


def test_a_gate_is_passed_only_where_a_point_lies_behind_it():
    graph = trace(made(Attending(lambda m, s, x: (s * s.mean(1, True).sigmoid()).mean(1))), images())
    assert set(graph.cut().points) == {":mul"}
    assert set(graph.cut(["hook_source"]).points) == {"hook_source"}


# --- operations in place ---


def in_place(m, s, x):
    y = s.clone()
    y += 1
    q, k = (y @ m.bank("w", 6, 6)).chunk(2, -1)
    q *= m.bank("scale", 3)
    return functional.relu(torch.cat([q, k], -1), inplace=True).mul_(2).mean(1)


def test_operations_in_place_become_values_of_their_own():
    model = made(Attending(in_place))
    graph, x = trace(model, images()), images(2, seed=1)
    recorded = graph.record(x)
    torch.testing.assert_close(recorded[graph.root], model(x), rtol=0, atol=0)
    torch.testing.assert_close(recorded[graph.points["hook_source"]], model.source(x), rtol=0, atol=0)
    cut = graph.cut()
    torch.testing.assert_close(sum(graph.push(cut, x).values()), model(x), rtol=0, atol=1e-12)


def write_a_part(m, s, x):
    y = s.clone()
    y[:, 0] = 3
    return y.mean(1)


def write_the_whole(m, s, x):
    y = s.clone()
    part = y[:, 0]
    y.mul_(2)
    return part + y.mean(1)


@pytest.mark.parametrize("run", [write_a_part, write_the_whole])
def test_memory_that_is_written_and_then_read_through_another_view_is_followed(run):
    model, x = made(Attending(run)), images(2, seed=1)
    graph = trace(model, x)
    torch.testing.assert_close(graph.record(x)[graph.root], model(x), rtol=0, atol=0)
    torch.testing.assert_close(sum(graph.push(graph.cut(), x).values()), model(x), rtol=0, atol=1e-12)


def test_contexts_in_a_forward_are_looked_into():
    def run(m, s, x):
        with torch.autocast("cpu", enabled=False):
            y = s.tanh() * m.bank("scale", 6)
        with torch.enable_grad(), torch.no_grad():
            return y.mean(1)

    model = made(Attending(run))
    graph, x = trace(model, images()), images(2, seed=1)
    assert set(graph.cut().points) == {":tanh"}
    torch.testing.assert_close(sum(graph.push(graph.cut(), x).values()), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(graph.record(x)[graph.root], model(x), rtol=0, atol=0)


# --- what can be read ---


class Several(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x.flatten(2).mT


def test_several_outputs_and_sequences_are_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"Several returns 2 tensors; name the one to decompose with of=, for"):
        trace(Several().eval(), images())
    of = lambda module, x: module(x)[1]  # noqa: E731
    with pytest.raises(
        InputError, match=r"must be one vector an image, \[batch, d\]; .* is \[batch, 16, 3\]. Name a hook"
    ):
        trace(Several().eval(), images(), of=of)


def test_of_chooses_what_is_read():
    model, x = stack(), images(2, seed=1)
    for of, expected in (
        ("logits", model(x)),
        ("representation", model(x)),
        ("blocks.0.hook_out", model.blocks[0].hook_out(model.blocks[0](e := model.embed(x.flatten(1))) - e)),
        (lambda module, images: 2 * module(images)[:, :3], 2 * model(x)[:, :3]),
    ):
        graph = trace(model, images(), of=of)
        torch.testing.assert_close(sum(graph.push(graph.cut(), x).values()), expected, rtol=0, atol=1e-12)


def test_training_mode_and_untraceable_forwards_are_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"Tracing needs Stack in evaluation mode.* Call .eval\(\) on it first"
    ):
        trace(Stack(), images(dtype=torch.float32))

    class Branching(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else -x.mean((2, 3))

    with pytest.raises(UnsupportedModelError, match=r"Branching could not be traced on images of shape \(3, 3, 4, 4\)"):
        trace(Branching().eval(), images())


def test_tracing_leaves_modes_and_hooks_as_they_were():
    model, seen = stack(), []
    model.blocks[0].act.train()
    model.hook_embed.add_hook(lambda value, hook: seen.append(hook.name))
    trace(model, images())
    assert not seen
    assert model.blocks[0].act.training
    assert not model.blocks[1].act.training
    model(images())
    assert len(seen) == 1
    assert not model.blocks[0].hook_out._forward_hooks
