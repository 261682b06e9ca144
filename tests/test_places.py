"""Where the entries of traced values stand: against derivatives, changed pixels, and what adapters say."""

from functools import cache, partial

import pytest
import staged_models
import tiny_models
import torch
from staged_models import STAGED_MODELS, SWIN, WIDE_SWIN
from timm.models.davit import DaVit
from timm.models.mlp_mixer import MlpMixer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from tiny_models import TINY, TINY_MODELS
from torch import nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens import HookedViT
from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.frozen.places import lattice, places, token_places
from vitdecomp_lens.frozen.rules import is_pattern, operation, sizes
from vitdecomp_lens.frozen.trace import trace

SIZE = (6, 8)


class Seen(nn.Module):
    """Functions of images, each with a hook on what it gives."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.seen = nn.ModuleList(HookPoint() for _ in functions)

    def forward(self, x):
        seen = (point(function(x)) for point, function in zip(self.seen, self.functions, strict=True))
        return x.flatten(1) + sum(value.sum() for value in seen)


def all_placed(functions):
    """The places of several functions' values, by one trace."""
    graph = trace(Seen(functions).eval(), torch.zeros(2, 3, *SIZE, dtype=torch.float64))
    nodes = [graph.points[f"seen.{number}"] for number in range(len(functions))]
    found = places(graph, nodes)
    return [found[node] for node in nodes]


def placed_by(function):
    return all_placed([function])[0]


# ---- operations that move or average: an entry stands at the mean of the pixels that it depends on


def derived(function, size=SIZE):
    """The mean place of the pixels that each entry depends on, weighted by how much it does."""
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.autograd.functional.jacobian(function, x).abs().sum((-4, -3))
    centres = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in size]
    return torch.stack([(weight * c).sum((-1, -2)) for c in (centres[0][:, None], centres[1])]) / weight.sum((-1, -2))


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


def patches(x):
    """Tokens of 2 × 2 pixels."""
    return functional.conv2d(x, ones(4, 3, 2, 2), stride=2).flatten(2).mT


def windows(x):
    return x.view(-1, 3, 2, 3, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 12, 3)


def merged(x):
    x = functional.pad(x[:, :, :5], (0, 0, 0, 1))
    return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


def through_windows(x):
    rolled = x.permute(0, 2, 3, 1).roll((-1, -2), (1, 2))
    cut = rolled.unflatten(2, (2, 4)).unflatten(1, (2, 3)).transpose(2, 3).reshape(-1, 12, 3)
    back = functional.gelu(cut).view(-1, 2, 2, 3, 4, 3).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return back.roll((1, 2), (1, 2))


MEANS = {
    "pixels": lambda x: x * 2,
    "flip, transpose, select": lambda x: x.flip(2).transpose(2, 3)[:, 0],
    "narrow, stack, repeat": lambda x: torch.stack([x.narrow(3, 1, 4), x[..., ::2]], 1).repeat(1, 1, 2, 1, 1),
    "split": lambda x: x.split([1, 7], 3)[1] + 0,
    "chunk, unbind": lambda x: x.chunk(2, 2)[1].unbind(1)[2],
    "constant index": lambda x: x.flatten(2)[:, :, torch.tensor([5, 0, 40])],
    "padding": lambda x: functional.pad(x, (1, 0, 0, 2)),
    "mirrored padding": lambda x: functional.pad(x, (1, 0, 0, 2), mode="reflect"),
    "windows in the batch": windows,
    "shifted windows and back": through_windows,
    "merging in channels": merged,
    "merging by a product": lambda x: merged(x).permute(0, 2, 3, 1) @ ones(12, 5),
    "pixel unshuffle": lambda x: functional.pixel_unshuffle(x, 2),
    "pixel shuffle": lambda x: functional.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
    "unfold": lambda x: functional.unfold(x, 3, dilation=(1, 2), padding=1, stride=2),
    "unfold and a product": lambda x: functional.linear(functional.unfold(x, 2, stride=2).mT, ones(5, 12)),
    "fold": lambda x: functional.fold(functional.unfold(x, 2, stride=2), SIZE, 2, stride=2),
    "tensor.unfold": lambda x: x.unfold(2, 3, 3).unfold(3, 4, 2).flatten(4).mean(-1),
    "patches": patches,
    "rectangular patches": lambda x: functional.conv2d(x, ones(4, 3, 3, 2), stride=(3, 2)),
    "overlapping convolution": lambda x: functional.conv2d(x, ones(4, 3, 3, 4), stride=(1, 2)),
    "dilated convolution": lambda x: functional.conv2d(x, ones(4, 3, 2, 3), dilation=2),
    "convolution by channel": lambda x: functional.conv2d(x, ones(6, 1, 3, 3), groups=3),
    "convolution of merged channels": lambda x: functional.conv2d(functional.pixel_unshuffle(x, 2), ones(2, 12, 1, 1)),
    "convolution by group": lambda x: functional.conv2d(functional.pixel_unshuffle(x, 2), ones(6, 2, 1, 1), groups=6),
    "convolution along an axis": lambda x: functional.conv1d(x[:, :, 2], ones(4, 3, 2), stride=2),
    "average pooling": lambda x: functional.avg_pool2d(x, 2),
    "pooling to a size": lambda x: functional.adaptive_avg_pool2d(x, (4, 3)),
    "mean over rows": lambda x: x.mean(2, keepdim=True),
    "sum over rows and columns": lambda x: x.sum((2, 3)),
    "variance over channels": lambda x: x.var(1),
    "bilinear, corner to corner": lambda x: functional.interpolate(x, (9, 12), mode="bilinear", align_corners=True),
    "nearest": lambda x: functional.interpolate(x, (12, 16)),
    "linear over rows": lambda x: functional.linear(x.mT, ones(2, 6)),
    "product from the left": lambda x: ones(2, 6) @ x,
    "product by channel from the left": lambda x: ones(5, 3) @ x.flatten(2),
    "einsum over channels": lambda x: torch.einsum("bchw,cd->bhwd", x, ones(3, 5)),
    "einsum over rows": lambda x: torch.einsum("hk,bchw->bckw", ones(6, 2), x),
    "einsum of two with sums": lambda x: torch.einsum("bchw,cd->bdw", x, ones(3, 2)),
    "product with a vector": lambda x: x @ ones(8),
    "other moves": lambda x: torch.cat([x.rot90(1, (2, 3)).flatten(2), x.tile(1, 1, 2).flatten(2)], 2),
    "other copies": lambda x: torch.stack(
        [x.repeat_interleave(2, 1), x.index_select(1, torch.tensor([0, 2, 1, 0, 2, 1]))], 1
    ),
    "gather": lambda x: x.flatten(2).gather(2, torch.arange(24).view(1, 3, 8).expand(x.shape[0], -1, -1)),
    "convolution in three dimensions": lambda x: functional.conv3d(
        x[:, :, None], ones(4, 3, 1, 2, 2), stride=(1, 2, 2)
    ),
    "larger of two": lambda x: torch.max(x, ones(6, 8) * -9),
    "addmm": lambda x: torch.addmm(ones(2), x.permute(0, 2, 3, 1).flatten(0, 2), ones(3, 2)).view(-1, 48, 2),
    "norm of channels": lambda x: functional.layer_norm(x.permute(0, 2, 3, 1), (3,)),
    "activation": lambda x: functional.gelu(x).exp().clamp(min=0.1).softmax(1),
    "sum with constants": lambda x: x + ones(3, 1, 1) - ones(6, 8),
    "where": lambda x: torch.where(ones(6, 8) > 0, x, ones(6, 8)),
    "sum of two": lambda x: functional.gelu(x) + x,
    "class token": lambda x: torch.cat([ones(1, 2, 4).expand(x.shape[0], -1, -1), patches(x)], 1),
}


@cache
def placed_means():
    return dict(zip(MEANS, all_placed(list(MEANS.values())), strict=True))


@pytest.mark.parametrize("name", MEANS)
def test_an_entry_stands_where_the_pixels_are_that_it_depends_on(name):
    found, expected = placed_means()[name], derived(MEANS[name])
    assert found.shape[1:] == MEANS[name](torch.zeros(1, 3, *SIZE, dtype=torch.float64)).shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)


def test_coordinates_are_kept_once_where_they_are_the_same():
    found = placed_by(lambda x: functional.layer_norm(patches(x), (4,)) @ ones(4, 500))
    assert found.shape == (2, 1, 12, 500)
    assert found.untyped_storage().nbytes() == 2 * 12 * 8


# ---- windows at the edge


def centres(step, first, count, length):
    return (first + step * torch.arange(count, dtype=torch.float64)) / length


AT_THE_EDGE = {
    "same": (lambda x: functional.conv2d(x, ones(2, 3, 3, 5), padding="same"), (1, 0.5), (1, 0.5)),
    "strided": (lambda x: functional.conv2d(x, ones(2, 3, 3, 3), stride=2, padding=1), (2, 0.5), (2, 0.5)),
    "even": (lambda x: functional.conv2d(x, ones(2, 3, 4, 4), stride=2, padding=1), (2, 1), (2, 1)),
    "average": (lambda x: functional.avg_pool2d(x, 3, 1, 1), (1, 0.5), (1, 0.5)),
    "maximum": (lambda x: functional.max_pool2d(x, 3, 2, 1), (2, 0.5), (2, 0.5)),
    "maximum with places": (
        lambda x: functional.max_pool2d(x, (2, 4), return_indices=True)[0],
        (2, 1),
        (4, 2),
    ),
    "maximum of regions": (lambda x: functional.adaptive_max_pool2d(x, (3, 2)), (2, 1), (4, 2)),
    "maximum of each": (lambda x: x.unflatten(2, (3, 2)).amax(3).unflatten(3, (4, 2)).max(4)[0], (2, 1), (2, 1)),
    "bilinear": (lambda x: functional.interpolate(x, (9, 16), mode="bilinear"), (2 / 3, 1 / 3), (1 / 2, 1 / 4)),
    "bicubic": (lambda x: functional.interpolate(x, (3, 4), mode="bicubic", antialias=True), (2, 1), (2, 1)),
    "many": (
        lambda x: [x := x + functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for _ in range(9)][-1],
        (1, 0.5),
        (1, 0.5),
    ),
}


@pytest.mark.parametrize("name", AT_THE_EDGE)
def test_windows_stand_at_their_centres_also_at_the_edge(name):
    run, rows, columns = AT_THE_EDGE[name]
    found = placed_by(run)
    expected = torch.stack(
        torch.broadcast_tensors(
            centres(*rows, found.shape[-2], SIZE[0])[:, None], centres(*columns, found.shape[-1], SIZE[1])
        )
    )
    torch.testing.assert_close(found, expected[:, None, None].expand_as(found), rtol=0, atol=1e-12)


def test_a_window_whose_centre_is_padding_stands_at_what_it_has_of_the_image():
    found = placed_by(lambda x: functional.conv2d(functional.pad(x, (0, 6, 0, 3)), ones(2, 3, 3, 7), stride=(3, 7)))
    torch.testing.assert_close(
        found[0, 0, 0, :, 0] * 6, torch.tensor([1.5, 4.5, torch.nan], dtype=torch.float64), equal_nan=True
    )
    torch.testing.assert_close(found[1, 0, 0, 0] * 8, torch.tensor([3.5, 7.5], dtype=torch.float64))
    found = placed_by(lambda x: functional.avg_pool2d(x, 5, ceil_mode=True))
    torch.testing.assert_close(found[0, 0, 0, :, 0] * 6, torch.tensor([2.5, 5.5], dtype=torch.float64))


# ---- attention, gates, mixing: by what stands at the same place


def with_class(x):
    return torch.cat([ones(1, 1, 4).expand(x.shape[0], -1, -1), patches(x)], 1)


def fused(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v)


def slow(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def by_einsum(q, k, v):
    return torch.einsum("b j d, b i j -> b i d", v, torch.einsum("bid,bjd->bij", q, k).softmax(-1))


def by_bmm(q, k, v):
    return torch.bmm(torch.baddbmm(ones(1, 1, 1), q, k.transpose(1, 2)).softmax(-1), v)


def coarse(t):
    return functional.avg_pool1d(t.mT, 2).mT


def query(x):
    return ones(1, 1, 4).expand(x.shape[0], -1, -1)


def channels(attend, t):
    return attend(t.mT, t.mT, t.mT).mT


@torch.library.custom_op("vitdecomp_tests::widened", mutates_args=())
def widened(value: torch.Tensor) -> torch.Tensor:
    return torch.cat([value, value], -1)


@widened.register_fake
def _(value):
    return value.new_empty(*value.shape[:-1], 2 * value.shape[-1])


@torch.library.custom_op("vitdecomp_tests::lost", mutates_args=())
def lost(value: torch.Tensor) -> list[torch.Tensor]:
    return [value.flatten(), value.clone()]


@lost.register_fake
def _(value):
    return [value.new_empty(value.numel()), torch.empty_like(value)]


def mixed(t):
    hidden = functional.linear(t.mT, ones(5, t.shape[1]))
    return functional.linear(functional.gelu(hidden), ones(t.shape[1], 5)).mT


KEEPING = {
    "{} attention": lambda attend, t: attend(t, t, t),
    "{} attention to fewer": lambda attend, t: attend(t, coarse(t), coarse(t)),
    "{} attention of channels": channels,
    "{} attention added": lambda attend, t: t + attend(t, t, t),
}
KEEPS = {
    name.format(a.__name__): partial(run, a) for name, run in KEEPING.items() for a in (fused, slow, by_einsum, by_bmm)
}
KEEPS |= {
    "mixing added": lambda t: t + mixed(t),
    "gate": lambda t: t.mean(1, True).sigmoid() * t,
    "difference from the mean": lambda t: t - t.mean(1, True),
    "cosine": lambda t: functional.normalize(t, dim=1) * functional.normalize(t, dim=-1),
    "positions": lambda t: t + torch.linspace(0, 1, t.shape[1] * 4, dtype=torch.float64).view(1, -1, 4),
    "rotation": lambda t: t * 0.5 + torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(2) * 0.2,
    "complex rotation": lambda t: torch.view_as_real(
        torch.view_as_complex(t.contiguous().unflatten(-1, (2, 2))) * 1j
    ).flatten(2),
    "an unknown operation": lambda t: widened(t)[..., :4],
    "an unknown operation with several outputs": lambda t: lost(t)[1],
    "gated unit": lambda t: functional.glu(torch.cat([t, t], -1)),
    "heads": lambda t: (
        fused(*(t.repeat(1, 1, 3).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0))).transpose(1, 2).flatten(2)
    ),
    "masked": lambda t: (t @ t.mT).masked_fill(ones(t.shape[1], t.shape[1]).tril() == 0, -1e9).softmax(-1) @ t,
}


@cache
def placed_keeps():
    """What stands where in the tokens themselves, and behind each operation; without and with a class token."""
    runs = {(tokens, name): lambda x, t=tokens, run=run: run(t(x)) for tokens in TOKENS for name, run in KEEPS.items()}
    runs |= {tokens: tokens for tokens in TOKENS}
    return dict(zip(runs, all_placed(list(runs.values())), strict=True))


TOKENS = (patches, with_class)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", KEEPS)
def test_tokens_keep_their_places_through(name, tokens):
    expected, first = placed_keeps()[tokens], int(tokens is with_class)
    assert expected[:, 0, first:].isfinite().all()
    assert expected[:, 0, :first].isnan().all()
    torch.testing.assert_close(placed_keeps()[tokens, name], expected, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("attend", [fused, slow, by_einsum, by_bmm])
def test_what_a_learned_query_reads_has_no_place(attend):
    assert placed_by(lambda x: attend(query(x), patches(x), patches(x))).isnan().all()
    class_first = placed_by(lambda x: attend(with_class(x)[:, :1], with_class(x), with_class(x)))
    assert class_first.isnan().all()


@pytest.mark.parametrize("attend", [fused, slow, by_einsum, by_bmm])
def test_fewer_queries_keep_their_places(attend):
    expected = placed_by(lambda x: coarse(patches(x)))
    torch.testing.assert_close(placed_by(lambda x: attend(coarse(patches(x)), patches(x), patches(x))), expected)


def test_patterns_stand_at_their_queries():
    found = placed_by(lambda x: (patches(x) @ patches(x).mT).softmax(-1))
    torch.testing.assert_close(found, placed_by(patches)[..., :1].expand(2, 1, 12, 12))


def test_what_an_operation_loses_has_no_place_and_no_request_fails():
    assert placed_by(lambda x: lost(patches(x))[0][None]).isnan().all()
    assert placed_by(lambda x: patches(x)[:, patches(x)[0, :, 0].argsort()[:3]]).shape == (2, 1, 3, 4)


def test_a_value_that_no_image_changes_has_no_place():
    graph = trace(Seen([lambda x: patches(x) + ones(12, 4)]).eval(), torch.zeros(2, 3, *SIZE, dtype=torch.float64))
    constants = [n for n in graph.nodes if n.op == "call_function" and n not in graph.from_images]
    assert all(found.isnan().all() for found in places(graph, constants).values())


# ---- tokens


def test_tokens_are_windows_first_then_token_axes():
    found = placed_by(lambda x: windows(x).unflatten(1, (3, 4)))
    tokens = token_places(found, (1, 2))
    torch.testing.assert_close(tokens, found.flatten(1, 3)[..., 0].T)
    torch.testing.assert_close(token_places(found, (2, -3)), found.transpose(2, 3).flatten(1, 3)[..., 0].T)
    by_row = token_places(found, (1,))
    torch.testing.assert_close(by_row, found.mean((3, 4)).flatten(1).T)


def test_tokens_may_come_before_the_batch():
    tokens = token_places(placed_by(lambda x: windows(x).transpose(0, 1)), (0,))
    assert tokens.shape == (12, 2)
    tokens = token_places(placed_by(lambda x: patches(x).transpose(0, 1)), (0,))
    torch.testing.assert_close(tokens, placed_by(patches)[:, 0, :, 0].T)


# ---- lattices


def grid_of(rows, columns, size):
    """Places of tokens that tile an image, row by row."""
    ys, xs = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (rows, columns))
    return torch.cartesian_prod(ys, xs), size


def test_tokens_in_any_order_form_their_lattice():
    found, size = grid_of(3, 5, (30, 60))
    shuffled = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    grid, order = lattice(found[shuffled], size)
    assert grid == TokenGrid(3, 5, size)
    assert torch.equal(found[shuffled][list(order)], found)


def test_tokens_without_a_place_come_first():
    found, size = grid_of(2, 2, (4, 6))
    nowhere = torch.full((1, 2), torch.nan)
    grid, order = lattice(torch.cat([found[2:], nowhere, found[:2], nowhere]), size)
    assert grid == TokenGrid(2, 2, size, ("token0", "token1"))
    assert order == (2, 5, 3, 4, 0, 1)
    assert lattice(nowhere, size) == (TokenGrid(0, 0, size, ("token0",)), (0,))


def test_one_row_one_column_one_token():
    for rows, columns in ((1, 4), (4, 1), (1, 1)):
        grid, order = lattice(*grid_of(rows, columns, (7, 9)))
        assert (grid, order) == (TokenGrid(rows, columns, (7, 9)), tuple(range(rows * columns)))


def test_an_incomplete_or_irregular_lattice_is_none():
    found, size = grid_of(3, 4, (48, 64))
    assert lattice(found[1:], size) is None
    assert lattice(torch.cat([found, found[:1]]), size) is None
    assert lattice(torch.cat([found, found.mean(0, keepdim=True)]), size) is None
    assert lattice(found[found[:, 0] > 0.4], size) is None  # not from the image's edge on
    assert lattice(torch.full((3, 2), 0.5), size) is None
    found, size = grid_of(2, 6, (20, 60))
    assert lattice(found[(found[:, 1] < 0.5) | (found[:, 1] > 0.6)], size) is None  # a column is missing


def test_a_lattice_may_cover_less_or_more_than_the_image():
    found, size = grid_of(3, 4, (48, 64))
    spread = 8 * (torch.arange(1, 28, dtype=torch.float64)) / 224  # patches of 16 pixels, 8 pixels apart
    assert lattice(torch.cartesian_prod(spread, spread), (224, 224))[0] == TokenGrid(27, 27, (224, 224))
    assert lattice(found[found[:, 0] < 0.6], size)[0] == TokenGrid(2, 4, (32, 64), (), size)
    thin = found.clone()
    thin[8:, 0] -= 4 / 48  # half of the last row was padding
    grid, order = lattice(thin * torch.tensor([48 / 40, 1]), (40, 64))
    assert (grid, order) == (TokenGrid(3, 4, (48, 64), (), (40, 64)), tuple(range(12)))


# ---- models without hooks: the tokens that change are those that stand where pixels change


def unmixed(model, *names):
    """The model, in which nothing passes from token to token but by convolutions of the named parts."""
    for name, parameter in model.named_parameters():
        if name.endswith(names):
            parameter.data.zero_()
    return model


def seeded(make, *names):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return unmixed(tiny_models.perturb(make()), *names).double()


def values(graph):
    """The values of every attention, with the axis of their tokens."""
    for node in graph.nodes:
        if node not in graph.from_images:
            continue
        if operation(node) == "aten::scaled_dot_product_attention":
            yield node.args[2], 2
        if operation(node) in ("aten::matmul", "aten::bmm") and is_pattern(node.args[0]):
            yield node.args[1], 2


def transposed_values(graph):
    """The same where the attention is one of channels."""
    yield from ((node, 3) for node, _ in values(graph) if operation(node) != "aten::linear" and sizes(node)[2] == 8)


def normed(graph):
    """What norms of tokens give, in models without attention."""
    yield from ((n, 1) for n in graph.nodes if operation(n) == "aten::layer_norm" and len(sizes(n)) == 3)


VIT = {**TINY, "img_size": (32, 48)}
SWIN_PARTS = ("attn.proj.weight", "attn.proj.bias")
PVT = {"embed_dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
# How many tokens further a pixel may reach, where patches overlap.
PLAIN = {
    "class token": (partial(VisionTransformer, **VIT), SWIN_PARTS, values, (32, 48), 0),
    "registers": (
        partial(VisionTransformer, **VIT, reg_tokens=3, class_token=False, global_pool="avg"),
        SWIN_PARTS,
        values,
        (32, 48),
        0,
    ),
    "padded patches": (
        partial(VisionTransformer, **TINY, dynamic_img_size=True, dynamic_img_pad=True),
        SWIN_PARTS,
        values,
        (27, 42),
        0,
    ),
    "swin": (partial(SwinTransformer, **SWIN, num_classes=5), SWIN_PARTS, values, (32, 32), 0),
    "swin, not square": (
        partial(SwinTransformer, **{**SWIN, "img_size": (32, 48), "depths": (2, 1)}, num_classes=5),
        SWIN_PARTS,
        values,
        (32, 48),
        0,
    ),
    "swin, padded": (
        partial(SwinTransformer, **{**SWIN, "img_size": 28}, num_classes=5),
        SWIN_PARTS,
        values,
        (28, 28),
        0,
    ),
    "swin, merging pads": (partial(SwinTransformer, **WIDE_SWIN, num_classes=5), SWIN_PARTS, values, (36, 28), 0),
    "pvt": (
        partial(PyramidVisionTransformerV2, **PVT, sr_ratios=(1, 1, 1, 1)),
        ("attn.proj.weight", "mlp.fc2.weight"),
        values,
        (64, 96),
        1,
    ),
    "pvt, fewer keys": (
        partial(PyramidVisionTransformerV2, **PVT, sr_ratios=(4, 2, 1, 1)),
        ("attn.proj.weight", "mlp.fc2.weight"),
        values,
        (64, 128),
        1,
    ),
    "xcit": (
        partial(Xcit, **{**TINY, "cls_attn_layers": 1}),
        ("attn.proj.weight", "local_mp.conv2.weight"),
        transposed_values,
        (32, 48),
        2,
    ),
    "mixer": (
        partial(MlpMixer, img_size=32, patch_size=8, num_blocks=2, embed_dim=16),
        ("mlp_tokens.fc2.weight",),
        normed,
        (32, 32),
        0,
    ),
    "hybrid": (TINY_MODELS["hybrid_dynamic"], SWIN_PARTS, values, (40, 56), 1),
}


SLOWER = ("swin", "swin, merging pads", "pvt")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.sweep] if n in SLOWER else []) for n in PLAIN])
def test_changed_pixels_change_the_tokens_that_stand_there(name):
    make, cut, looked_at, size, reach = PLAIN[name]
    model = seeded(make, *cut)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    graph = trace(model, images)
    looked = [(node, axis) for node, axis in looked_at(graph)]
    placed = places(graph, [node for node, _ in looked])
    met = 0
    for node, axis in looked:
        found = lattice(token_places(placed[node], (axis,)), size)
        assert found is not None, node
        grid, order = found
        if grid.rows * grid.columns < 2:
            continue
        for token in {len(grid.prefix), len(grid.prefix) + grid.columns + 1, len(grid) - 1} & set(range(len(grid))):
            top, left, bottom, right = map(int, grid.rectangle(token))
            changed = images[:1].repeat(2, 1, 1, 1)
            area = changed[1, :, top:bottom, left:right]
            area += torch.randn(area.shape, generator=generator, dtype=torch.float64)
            value = graph.evaluate([node], {graph.images: changed})[node]
            value = value.movedim(axis, 1).unflatten(0, (2, -1)).flatten(3)
            moved = set(((value[0] - value[1]).abs() > 1e-9).any(-1).flatten().nonzero().flatten().tolist())
            row, column = divmod(token - len(grid.prefix), grid.columns)
            near = {
                order[len(grid.prefix) + r * grid.columns + c]
                for r in range(max(row - reach, 0), min(row + reach + 1, grid.rows))
                for c in range(max(column - reach, 0), min(column + reach + 1, grid.columns))
            }
            assert order[token] in moved
            assert moved <= near
            met += 1
    assert met >= 4


def test_attention_of_channels_stands_at_tokens():
    """DaViT: windows, convolutions and attention of channels; at the end every token stands in its place."""
    with torch.random.fork_rng(devices=[]):
        model = DaVit(depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2), window_size=4, num_classes=3).eval()
    images = torch.zeros(2, 3, 64, 96)
    graph = trace(model, images)
    nodes = [n for n in graph.nodes if operation(n) == "aten::linear" and len(sizes(n)) == 3 and sizes(n)[0] == 2]
    grids = {lattice(token_places(found, (1,)), (64, 96))[0] for found in places(graph, nodes).values()}
    assert grids == {TokenGrid(16, 24, (64, 96)), TokenGrid(8, 12, (64, 96))}


# ---- hooked models: what adapters say


HOOKED = {
    **{name: (STAGED_MODELS[name], staged_models.size_of(name)) for name in STAGED_MODELS},
    **{
        name: (TINY_MODELS[name], (tiny_models.SIZES.get(name, 32),) * 2)
        for name in (
            *("class_token", "distilled", "dinov2_reg", "siglip", "parallel_things", "diff_attention", "hybrid"),
            *("eva02", "dinov3", "beit", "relpos_table", "cait", "xcit_tokens_norm", "xcit_patch16"),
            *("open_clip", "open_clip_tokens_first", "open_clip_custom_all"),
        )
    },
}
DEFAULT = ("swin_padded", "maxvit_grid_only", "dinov2_reg", "open_clip_tokens_first")


def swept(names):
    return [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.sweep) for name in sorted(names)]


NO_TOKENS = ("hook_pattern", "hook_attn_scores", "hook_representation", "hook_scale")


@cache
def traced(name):
    make, size = HOOKED[name]
    model = HookedViT(make())
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return model, images, trace(model, images)


@pytest.mark.parametrize("name", swept(HOOKED))
def test_hooks_see_tokens_in_the_places_that_the_adapter_says(name):
    model, images, graph = traced(name)
    size, met = tuple(images.shape[2:]), 0
    hooks = {
        hook: node
        for hook, node in graph.points.items()
        if node in graph.from_images and not hook.endswith(NO_TOKENS) and not hook.startswith("attn_pool")
    }
    placed = places(graph, hooks.values())
    for hook, node in hooks.items():
        grid = model.token_grid(images, hook)
        if len(sizes(node)) < 3 or sizes(node)[1] != len(grid) - (hook == "hook_patch_embed") * len(grid.prefix):
            assert not hook.startswith("blocks."), hook
            continue
        met += 1
        found, order = lattice(token_places(placed[node], (1,)), size)
        prefix = 0 if hook == "hook_patch_embed" else len(grid.prefix)
        assert (found.rows, found.columns, len(found.prefix)) == (grid.rows, grid.columns, prefix), hook
        assert order == tuple(range(len(found))), hook
        assert (found.image_size, found.seen) == (grid.image_size, grid.seen), hook
    assert met >= 10


MOVES = (
    "view",
    "reshape",
    "permute",
    "transpose",
    "roll",
    "slice",
    "cat",
    "flatten",
    "clone",
    "contiguous",
    "unflatten",
)


def is_move(node):
    return operation(node).removeprefix("aten::").removeprefix("_unsafe_") in MOVES


def in_windows(node):
    """The value, with windows folded into its batch, that a hook shows in image coordinates."""
    node = node.args[0]
    while is_move(node) and sizes(node)[0] == 2:
        node = node.args[0][-1] if isinstance(node.args[0], list | tuple) else node.args[0]
    return node


@pytest.mark.parametrize(
    "name", swept(n for n in STAGED_MODELS if n.startswith(("swin", "max")) and n != "swin_one_window")
)
def test_the_order_undoes_windows(name):
    _, images, graph = traced(name)
    size, met = tuple(images.shape[2:]), 0
    shown = [node for hook, node in graph.points.items() if hook.endswith(("hook_v", "hook_q", "hook_z"))]
    inner = [in_windows(node) for node in shown]
    placed = places(graph, inner)
    recorded = graph.evaluate([*shown, *inner], {graph.images: images})
    for node, within in zip(shown, inner, strict=True):
        grid, order = lattice(token_places(placed[within], (1,)), size)
        tokens = recorded[within].unflatten(0, (2, -1)).flatten(1, 2)[:, list(order)]
        first = len(grid.prefix)
        assert torch.equal(tokens[:, first:], recorded[node][:, first:])
        assert tokens.shape == recorded[node].shape
        met += order != tuple(range(len(grid)))
    assert met


@pytest.mark.sweep
def test_the_order_undoes_unrolled_mask_units():
    _, images, graph = traced("hiera_not_square")
    size, met = tuple(images.shape[2:]), 0
    for hook, node in graph.points.items():
        if not hook.endswith("hook_resid_pre"):
            continue
        within = node
        while len(within.users) == 1 and is_move(next(iter(within.users))):
            within = next(iter(within.users))
        grid, order = lattice(token_places(places(graph, [within])[within], (1,)), size)
        recorded = graph.evaluate([node, within], {graph.images: images})
        assert torch.equal(recorded[within].flatten(1, -2)[:, list(order)], recorded[node])
        met += order != tuple(range(len(grid)))
    assert met
