"""Traces and compiled cuts are used again as long as they are true, and not a moment longer."""

import copy
import gc
import pickle
import weakref
from types import MethodType

import pytest
import torch
from frozen_samples import images
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY, TINY_MODELS, images_for, perturb
from torch import nn

from vitdecomp_lens import HookedViT
from vitdecomp_lens.frozen.trace import MOST_KEPT, trace


@pytest.fixture
def model():
    return TINY_MODELS["layer_scale"]().double()


@pytest.fixture
def x():
    return images_for("layer_scale", 2).double()


def check(model, x, times=1):
    """The push of the default cut sums to what the model computes now, and is that of a fresh copy."""
    fresh = trace(copy.deepcopy(model), x)
    expected = fresh.push(fresh.cut(), x)
    with torch.no_grad():
        total = model.forward_head(model.forward_features(x), pre_logits=True)
    for _ in range(times):
        graph = trace(model, x)
        written = graph.push(graph.cut(), x)
        torch.testing.assert_close(sum(written.values()), total, rtol=0, atol=1e-11)
        for name, vectors in expected.items():
            torch.testing.assert_close(written[name], vectors, rtol=0, atol=1e-12)


def test_nothing_changed_means_nothing_done_again(model, x):
    graph = trace(model, x)
    assert trace(model, x) is graph
    assert trace(model, torch.rand_like(x[:1])) is graph
    cut, directions = graph.cut(), torch.eye(32, dtype=torch.float64)
    program = graph.program(cut, dtype=torch.float64)
    assert graph.program(graph.cut(), dtype=torch.float64) is program
    along = graph.program(cut, directions=directions, dtype=torch.float64)
    assert graph.program(cut, directions=directions.clone(), dtype=torch.float64) is along
    assert graph.program(cut, directions=2 * directions, dtype=torch.float64) is not along


def swap_rows(weight):
    """A change that no sum over a weight sees."""
    weight.data.copy_(weight.data.flip(0))


def load(model):
    state = {name: value + 0.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def new_norm(model):
    model.norm = perturb(nn.LayerNorm(32)).double()


def new_activation(model):
    model.blocks[0].mlp.act = nn.Tanh()


def new_parameter(model):
    model.blocks[1].attn.proj.weight = nn.Parameter(torch.randn(32, 32, dtype=torch.float64) / 6)


def drop_a_block(model):
    model.blocks = model.blocks[:1]


def swap_blocks(model):
    model.blocks = nn.Sequential(model.blocks[1], model.blocks[0])


def in_place(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(-1)


def by_a_step(model):
    loss = model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).square().sum()
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.01).step()


def to_and_back(model):
    model.float().double()


def new_forward(model):
    model.norm.forward = MethodType(lambda norm, value: 2 * nn.LayerNorm.forward(norm, value), model.norm)


def forward_hook(model):
    model.blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def forward_pre_hook(model):
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1,))


def attribute(path, name, value):
    def change(model):
        setattr(model.get_submodule(path), name, value)

    change.__name__ = f"{path}.{name}"
    return change


def data(path, edit):
    def change(model):
        edit(model.get_parameter(path))

    change.__name__ = f"data of {path} by {edit.__name__}"
    return change


def shift(weight):
    weight.data.add_(0.1)


def replace(weight):
    weight.data = weight.data.neg()


CHANGES = [
    new_norm,
    new_activation,
    new_parameter,
    drop_a_block,
    swap_blocks,
    in_place,
    by_a_step,
    load,
    to_and_back,
    new_forward,
    forward_hook,
    forward_pre_hook,
    data("blocks.1.mlp.fc2.weight", shift),
    data("blocks.1.mlp.fc2.weight", swap_rows),
    data("blocks.1.attn.proj.bias", swap_rows),
    data("norm.weight", replace),
    data("pos_embed", shift),
    attribute("norm", "eps", 0.5),
    attribute("blocks.1.norm1", "eps", 0.5),
    attribute("blocks.0.attn", "scale", 1.0),
    attribute("blocks.0.attn", "fused_attn", False),
    attribute("", "global_pool", "avg"),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_after_a_change_nothing_is_stale(model, x, change):
    graph = trace(model, x)
    graph.push(graph.cut(), x)
    change(model)
    check(model, x, times=2)


def test_another_number_of_heads_is_traced_anew(model, x):
    graph = trace(model, x)
    graph.push(graph.cut(), x)
    for block in model.blocks:
        block.attn.num_heads, block.attn.head_dim, block.attn.scale = 2, 16, 16**-0.5
    assert trace(model, x) is not graph
    check(model, x)


def test_settings_that_only_look_alike_are_told_apart():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.dim, self.options, self.weight = -1, {"parts": [1, 2]}, torch.ones(3, dtype=torch.float64)

        def forward(self, x):
            return (
                x.flatten(2).mT[:, : sum(self.options["parts"])].mean((self.dim - 1 if self.dim == -2 else 1,))
                * self.weight
            )

    model = Averaging().eval()

    def now():
        graph = trace(model, images())
        return graph.record(images())[graph.root]

    before = now()
    torch.testing.assert_close(before, model(images()))
    model.options["parts"].append(4)
    torch.testing.assert_close(now(), model(images()))
    model.weight = torch.arange(3, dtype=torch.float64)
    torch.testing.assert_close(now(), model(images()))
    model.weight.mul_(3)
    torch.testing.assert_close(now(), model(images()))
    first = trace(model, images())
    model.dim = -2  # hash(-1) == hash(-2)
    assert trace(model, images()) is not first


def test_going_back_to_earlier_settings_finds_the_earlier_trace(model, x):
    fused = trace(model, x)
    model.blocks[0].attn.fused_attn = False
    by_hand = trace(model, x)
    assert by_hand is not fused
    model.blocks[0].attn.fused_attn = True
    assert trace(model, x) is fused


def test_other_image_sizes_and_dtypes_are_other_traces():
    torch.manual_seed(0)
    model = perturb(VisionTransformer(**TINY, dynamic_img_size=True)).double()
    small, large = (torch.randn(2, 3, size, size, dtype=torch.float64) for size in (32, 40))
    graphs = [trace(model, small), trace(model, large)]
    assert graphs[0] is not graphs[1]
    check(model, small)
    check(model, large)
    assert [trace(model, small), trace(model, large)] == graphs
    assert trace(model.float(), small.float()) not in graphs


def test_a_hook_on_a_lazy_point_is_another_trace():
    model, x = HookedViT(TINY_MODELS["layer_scale"]()), images_for("layer_scale")
    graph = trace(model, x)
    pattern = "blocks.0.attn.hook_pattern"
    assert pattern not in graph.points
    with model.hooks(fwd_hooks=[(pattern, lambda value, hook: value)]):
        looked_at = trace(model, x)
        assert pattern in looked_at.points
    assert trace(model, x) is graph
    assert trace(model, x, listened=[pattern]) is looked_at


def test_hooks_that_are_not_lazy_leave_the_trace():
    model, x = HookedViT(TINY_MODELS["layer_scale"]()), images_for("layer_scale")
    graph = trace(model, x)
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_mid", lambda value, hook: 2 * value)]):
        assert trace(model, x) is graph


def test_only_so_many_traces_are_kept(model, x):
    readers = [lambda m, v, k=k: m(v)[:, k:] for k in range(MOST_KEPT + 1)]
    small = nn.Sequential(nn.Flatten(), nn.Linear(48, MOST_KEPT + 3)).eval()
    graphs = [trace(small, images(dtype=torch.float32), of=of) for of in readers]
    assert trace(small, images(dtype=torch.float32), of=readers[-1]) is graphs[-1]
    assert trace(small, images(dtype=torch.float32), of=readers[0]) is not graphs[0]


def test_a_module_that_was_traced_can_be_forgotten():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    trace(model, images(dtype=torch.float32))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_graph_keeps_its_module():
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval(), images(dtype=torch.float32))
    gc.collect()
    assert graph.push(graph.cut(), images(dtype=torch.float32))


def test_copies_and_pickles_start_without_traces():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    x = images(dtype=torch.float32)
    graph = trace(model, x)
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert trace(other, x) is not graph
        assert trace(other, x).module is other
    assert trace(model, x) is graph
    assert list(model.state_dict()) == ["1.weight", "1.bias"]


def test_a_module_that_is_used_in_another_place_is_traced_anew():
    class Steps(nn.Module):
        def __init__(self, *steps):
            super().__init__()
            self.steps = nn.ModuleList(steps)

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    first, second = (nn.Linear(48, 48, dtype=torch.float64) for _ in range(2))
    model = nn.Sequential(nn.Flatten(), Steps(first), Steps(first, second)).eval()
    images = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    before = trace(model, images)
    model[1].steps[0] = second  # which was there already, elsewhere
    assert trace(model, images) is not before
    model[1].steps[0] = first
    assert trace(model, images) is before
