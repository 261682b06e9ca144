"""Every adjoint alone, against the derivative of the eager function with its statistics held fixed by hand."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from frozen_samples import images, model_of, read_out
from torch import nn

from vitdecomp_lens.frozen.adjoints import ADJOINTS
from vitdecomp_lens.frozen.program import Program
from vitdecomp_lens.frozen.rules import operation
from vitdecomp_lens.frozen.trace import trace

aten, functional = torch.ops.aten, nn.functional


@dataclass(frozen=True)
class Case:
    """One operation: ``run(bank, model, source, images)``, and with frozen statistics ``frozen(..., seen)``."""

    name: str
    covers: str
    shape: tuple[int, ...]
    run: Any
    frozen: Any = None
    skip: tuple[str, ...] = ()


CASES: list[Case] = []


def case(name, covers, shape, run, frozen=None, skip=()):
    CASES.append(Case(name, covers, shape, run, frozen, skip))


def plain(name, covers, shape, run, skip=()):
    """An operation that does without parameters and other inputs."""
    case(name, covers, shape, lambda p, m, s, x: run(s), skip=skip)


# --- moving entries ---

for name in ("alias", "contiguous", "clone", "lift_fresh_copy"):
    plain(name, f"aten::{name}", (4, 6), getattr(aten, name).default)
case("detach", "aten::detach", (4, 6), lambda p, m, s, x: aten.detach.default(s), lambda p, m, s, x, seen: s)
case(
    "tag",
    "vitdecomp_lens::tag",
    (4, 6),
    lambda p, m, s, x: torch.ops.vitdecomp_lens.tag(s, "inner"),
    lambda p, m, s, x, seen: s,
)
plain("to", "aten::to", (4, 6), lambda s: aten.to.dtype(s, torch.float64))
plain("_to_copy", "aten::_to_copy", (4, 6), lambda s: aten._to_copy.default(s, dtype=torch.float64))
case("type_as", "aten::type_as", (4, 6), lambda p, m, s, x: s.type_as(x))
plain("dropout", "aten::dropout", (4, 6), lambda s: functional.dropout(s, 0.5, False))
plain("feature_dropout", "aten::feature_dropout", (4, 3, 2), lambda s: aten.feature_dropout.default(s, 0.5, False))

plain("view, channels split", "aten::view", (4, 6), lambda s: s.view(-1, 4, 2, 3))
plain("view, tokens to a grid", "aten::view", (4, 6), lambda s: s.view(-1, 2, 2, 6))
plain("view, grid merged with channels", "aten::view", (2, 2, 6), lambda s: s.view(-1, 2, 12))
plain("view, tokens split unevenly", "aten::view", (6, 4), lambda s: s.view(-1, 4, 6))
plain("_unsafe_view", "aten::_unsafe_view", (4, 6), lambda s: aten._unsafe_view.default(s, [-1, 2, 12]))
plain("reshape of what was permuted", "aten::reshape", (4, 2, 3), lambda s: s.transpose(1, 2).reshape(-1, 12, 2))
plain("reshape back and forth", "aten::reshape", (4, 6), lambda s: s.reshape(-1, 24).reshape(-1, 2, 12))
plain("flatten", "aten::flatten", (2, 3, 4), lambda s: s.flatten(2))
plain("flatten, negative", "aten::flatten", (2, 3, 4), lambda s: s.flatten(-3, -2))
plain("unflatten", "aten::unflatten", (4, 6), lambda s: s.unflatten(-1, (3, 2)))
plain("squeeze", "aten::squeeze", (4, 1, 6), lambda s: s.squeeze(2))
plain("squeeze all", "aten::squeeze", (1, 4, 6), lambda s: s.squeeze())
plain("unsqueeze", "aten::unsqueeze", (4, 6), lambda s: s.unsqueeze(-2))
case("view_as", "aten::view_as", (4, 6), lambda p, m, s, x: s.view_as(m.lifted("o", x, 2, 12)))
case("reshape_as", "aten::reshape_as", (4, 6), lambda p, m, s, x: s.reshape_as(m.lifted("o", x, 2, 12)))
plain(
    "windows folded into the batch",
    "aten::view aten::permute",
    (4, 4, 2),
    lambda s: (
        s.view(-1, 2, 2, 2, 2, 2).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 2).mul(2.0).view(-1, 4, 4, 2).flatten(2)
    ),
)

plain("permute", "aten::permute", (2, 3, 4), lambda s: s.permute(0, 3, -3, 2))
plain(
    "permute, batch in the middle",
    "aten::permute",
    (2, 3, 4),
    lambda s: (s.permute(1, 2, 0, 3) * 2).permute(2, 1, 0, 3),
)
plain("transpose", "aten::transpose", (3, 4), lambda s: s.transpose(-1, 1))
plain("transpose of the batch", "aten::transpose", (4, 6), lambda s: (s.transpose(0, 1) * 3).transpose(0, 1))
plain("swapaxes", "aten::swapaxes", (3, 4), lambda s: aten.swapaxes.default(s, 1, 2))
plain("movedim", "aten::movedim", (2, 3, 4), lambda s: aten.movedim.int(s, 1, -1))
plain("movedim of several", "aten::movedim", (2, 3, 4), lambda s: aten.movedim.intlist(s, [3, 1], [1, 2]))
plain("t", "aten::t", (5,), lambda s: s.t().mul(2).t())
plain("numpy_T", "aten::numpy_T", (5,), lambda s: s.T.mul(2).T)
plain("mT", "aten::mT", (3, 4), lambda s: s.mT)

plain("expand", "aten::expand", (1, 4), lambda s: s.expand(-1, 6, -1))
plain("expand to more dimensions", "aten::expand", (1, 1), lambda s: s.expand(-1, 2, 3))
plain("expand of channels", "aten::expand", (4, 1), lambda s: s.expand(-1, 4, 6))
case("expand_as", "aten::expand_as", (4, 1), lambda p, m, s, x: s.expand_as(m.lifted("o", x, 4, 6)))

plain("roll of several", "aten::roll", (4, 3, 2), lambda s: s.roll((1, -2), (1, 2)))
plain("roll, negative dim", "aten::roll", (4, 6), lambda s: s.roll(2, -1))
plain("roll of one twice", "aten::roll", (4, 6), lambda s: s.roll((1, 2), (1, 1)))
plain("flip", "aten::flip", (4, 6), lambda s: s.flip(1, -1))

plain("select of a token", "aten::select", (4, 6), lambda s: s[:, 1])
plain("select, negative", "aten::select", (4, 6), lambda s: s[:, :, -2])
plain("select before the batch", "aten::select", (4, 3, 2), lambda s: s.permute(2, 0, 1, 3)[1])
plain("select of the values", "aten::select", (4, 3, 2, 2), lambda s: s[:, :, 2].transpose(1, 2))
plain("slice with a step", "aten::slice", (7, 4), lambda s: s[:, 1:6:2])
plain("slice, negative", "aten::slice", (4, 6), lambda s: s[:, -3:, :-2])
plain("slice of everything", "aten::slice", (4, 6), lambda s: aten.slice.Tensor(s, 1, 0, 9))
plain("narrow", "aten::narrow", (5, 4), lambda s: aten.narrow.default(s, 1, 1, 2))
plain("narrow, negative", "aten::narrow", (5, 4), lambda s: aten.narrow.default(s, -2, -2, 2))
plain("unbind, first", "getitem", (3, 4, 6), lambda s: s.permute(1, 0, 2, 3).unbind(0)[2])
plain("unbind", "getitem", (4, 3, 6), lambda s: s.unbind(2)[1])
plain("unbind of tokens", "getitem", (4, 6), lambda s: torch.stack(s.unbind(1)[1:], 1))
plain("split", "getitem", (5, 6), lambda s: s.split(2, 1)[1])
plain("split, last smaller", "getitem", (5, 6), lambda s: s.split(2, -2)[2].expand(-1, 4, -1))
plain("split with sizes", "getitem", (4, 6), lambda s: s.split([1, 3, 2], dim=2)[1])
plain("chunk", "getitem", (4, 6), lambda s: s.chunk(3, -1)[2])
plain("tensor_split", "getitem", (4, 7), lambda s: s.tensor_split(2, 2)[0])
plain("pad", "aten::pad", (4, 3), lambda s: functional.pad(s, (1, 2)))
plain("pad of several", "aten::pad", (3, 4, 2), lambda s: functional.pad(s, (0, 0, 1, 2, 2, 0)))
plain("pad by nothing", "aten::pad", (4, 3), lambda s: functional.pad(s, (0, 0), mode="constant"))
plain("constant_pad_nd", "aten::constant_pad_nd", (4, 3), lambda s: aten.constant_pad_nd.default(s, [1, 0, 0, 2], 0.0))
plain("pad with a value", "aten::pad", (4, 3), lambda s: functional.pad(s, (1, 0, 0, 2), value=1.5))
plain("constant_pad_nd with a value", "aten::constant_pad_nd", (4, 3), lambda s: aten.constant_pad_nd(s, [1, 2], 1.5))
plain("pad that cuts", "aten::pad", (4, 5), lambda s: functional.pad(s, (-2, 1, 2, 0), value=0.5))
plain("pad that reflects", "aten::pad", (4, 5), lambda s: functional.pad(s, (2, 1), mode="reflect"))
plain("pad that repeats", "aten::pad", (2, 3, 4), lambda s: functional.pad(s, (2, 1, 0, 1), mode="replicate"))

plain("repeat", "aten::repeat", (4, 3), lambda s: s.repeat(1, 1, 2))
plain("repeat of several", "aten::repeat", (2, 3, 4), lambda s: s.repeat(1, 2, 1, 3))
plain("repeat_interleave", "aten::repeat_interleave", (2, 4, 3), lambda s: s.repeat_interleave(2, 1))
plain("repeat_interleave, negative", "aten::repeat_interleave", (4, 3), lambda s: s.repeat_interleave(2, dim=-1))
PLACES = torch.tensor([2, 0, 2, 1])
plain("index of tokens", "aten::index", (4, 6), lambda s: s[:, PLACES])
plain("index of channels", "aten::index", (4, 6), lambda s: s[..., PLACES])
plain("index by a mask", "aten::index", (4, 6), lambda s: s[:, torch.tensor([True, False, True, True])])
plain("index_select", "aten::index_select", (4, 6), lambda s: s.index_select(-1, PLACES))
plain("cumsum", "aten::cumsum", (4, 6), lambda s: s.cumsum(1))
plain("cumsum of channels", "aten::cumsum", (4, 6), lambda s: s.cumsum(-1))

# --- joining ---


def with_token(place):
    def run(p, m, s, x):
        parts = [s, 2 * s[:, :2]]
        parts.insert(place, p("token", 1, 1, s.shape[2]).expand(s.shape[0], -1, -1))
        return torch.cat(parts, 1)

    return run


for place in range(3):
    case(f"cat, constant at {place}", "aten::cat", (3, 4), with_token(place))
case(
    "cat of channels",
    "aten::cat",
    (4, 3),
    lambda p, m, s, x: torch.cat([s, p("c", 1, 4, 1).expand(x.shape[0], -1, -1), s], -1),
)
plain("concat", "aten::concat", (4, 3), lambda s: aten.concat.default([s, s.flip(1)], 1))
plain("stack", "aten::stack", (4, 3), lambda s: torch.stack([s, s.flip(1)], 1))
plain("stack, last", "aten::stack", (4, 3), lambda s: torch.stack([s, 2 * s], -1))
plain("stack before the batch", "aten::stack", (4, 3), lambda s: torch.stack([s, s.flip(1)], 0).permute(1, 0, 2, 3))
case(
    "stack with a constant",
    "aten::stack",
    (3,),
    lambda p, m, s, x: torch.stack([p("c", 1, 3).expand(x.shape[0], -1), s], 1),
)

case("select_scatter", "aten::select_scatter", (4, 6), lambda p, m, s, x: s.select_scatter(s[:, 3] * p("w", 6), 1, -3))
case(
    "select_scatter of a constant",
    "aten::select_scatter",
    (4, 3),
    lambda p, m, s, x: s.select_scatter(s[:, :, 0] * 0, 2, 1),
)
case(
    "select_scatter into a constant",
    "aten::select_scatter",
    (6,),
    lambda p, m, s, x: p("c", 1, 4, 6).expand(x.shape[0], -1, -1).select_scatter(s, 1, 2),
)
case(
    "slice_scatter",
    "aten::slice_scatter",
    (5, 6),
    lambda p, m, s, x: s.slice_scatter(p("c", 1, 5, 2).expand(x.shape[0], -1, -1), 2, 1, 5, 2),
)
plain("slice_scatter of tokens", "aten::slice_scatter", (4, 6), lambda s: s.slice_scatter(s[:, :2], 1, -3, -1))

# --- sums ---

case("add of a constant", "aten::add", (4, 6), lambda p, m, s, x: s + p("c", 4, 6))
case("add with alpha", "aten::add", (4, 6), lambda p, m, s, x: torch.add(s, s.roll(1, 1), alpha=2.5))
case("add of a constant with alpha", "aten::add", (4, 6), lambda p, m, s, x: torch.add(s, p("c", 6), alpha=0.5))
case("add from the left", "aten::add", (4, 6), lambda p, m, s, x: p("c", 4, 1) + s)
plain("add of a number", "aten::add", (4, 6), lambda s: s + 1.5)
plain("add to itself", "aten::add", (4, 6), lambda s: s + s)
plain("add, one broadcast", "aten::add", (4, 6), lambda s: s + s.mean(1, keepdim=True))
plain("add, a dimension fewer", "aten::add", (2, 3, 4), lambda s: s + s.sum((1, 2, 3))[:, None, None, None])
case("add, live broadcast by a constant", "aten::add", (1, 6), lambda p, m, s, x: s + p("c", 4, 1))
case("sub", "aten::sub", (4, 6), lambda p, m, s, x: s.flip(1) - s * p("c", 6))
case("sub from a constant", "aten::sub", (4, 6), lambda p, m, s, x: p("c", 6) - s)
plain("sub with alpha", "aten::sub", (4, 6), lambda s: torch.sub(s, s.flip(2), alpha=0.3))
plain("rsub", "aten::rsub", (4, 6), lambda s: 2.5 - s)
case("rsub with alpha", "aten::rsub", (4, 6), lambda p, m, s, x: aten.rsub.Tensor(s, p("c", 6), alpha=1.5))
plain("rsub of a number with alpha", "aten::rsub", (4, 6), lambda s: aten.rsub.Scalar(s, 2.5, 1.5))
plain("neg", "aten::neg", (4, 6), lambda s: -s)
case("addcmul", "aten::addcmul", (4, 6), lambda p, m, s, x: torch.addcmul(p("b", 6), p("w", 4, 1), s, value=0.5))
case("addcmul of a constant", "aten::addcmul", (4, 6), lambda p, m, s, x: torch.addcmul(s, p("w", 6), p("v", 4, 1)))
case("addcmul to itself", "aten::addcmul", (4, 6), lambda p, m, s, x: torch.addcmul(s, s.flip(1), p("w", 6)))
case("addcmul, broadcast", "aten::addcmul", (1, 6), lambda p, m, s, x: torch.addcmul(p("b", 6), s, p("w", 4, 6)))
case("addcdiv", "aten::addcdiv", (4, 6), lambda p, m, s, x: torch.addcdiv(p("b", 6), s, p("w", 4, 6), value=0.5))
case("addcdiv of constants", "aten::addcdiv", (4, 6), lambda p, m, s, x: torch.addcdiv(s, p("v", 4, 1), p("w", 6)))

CHOSEN = torch.tensor([True, False, True, False])
case("where", "aten::where", (4, 6), lambda p, m, s, x: torch.where(CHOSEN[:, None], s, s.flip(1)))
case("where, constant", "aten::where", (4, 6), lambda p, m, s, x: torch.where(CHOSEN[:, None], p("c", 6), s))
case("where, number", "aten::where", (4, 6), lambda p, m, s, x: torch.where(CHOSEN[:, None], s, 1.5))
case("where, broadcast", "aten::where", (1, 6), lambda p, m, s, x: torch.where(CHOSEN[:, None], s, p("c", 4, 6)))
plain("masked_fill", "aten::masked_fill", (4, 6), lambda s: s.masked_fill(CHOSEN[:, None], 1.5))
plain("masked_fill, of channels", "aten::masked_fill", (3, 4), lambda s: s.masked_fill(CHOSEN, 1.5))

plain("mean", "aten::mean", (4, 6), lambda s: s.mean(1))
plain("mean, keepdim", "aten::mean", (4, 6), lambda s: s.mean(-1, keepdim=True))
plain("mean of several", "aten::mean", (2, 3, 4), lambda s: s.mean((-1, 1)))
plain("mean of several, keepdim", "aten::mean", (2, 3, 4), lambda s: s.mean((2, 3), keepdim=True))
plain("sum", "aten::sum", (4, 6), lambda s: s.sum(-1))
plain("sum of several, keepdim", "aten::sum", (2, 3, 4), lambda s: s.sum((1, 2), keepdim=True))
plain("mean subtracted", "aten::mean", (4, 6), lambda s: s - s.mean(1, keepdim=True))

plain("adaptive pool", "aten::adaptive_avg_pool2d", (2, 3, 4), lambda s: functional.adaptive_avg_pool2d(s, 1))
plain("_adaptive pool", "aten::_adaptive_avg_pool2d", (2, 3, 4), lambda s: aten._adaptive_avg_pool2d.default(s, [1, 1]))
plain(
    "adaptive pool to more", "aten::adaptive_avg_pool2d", (2, 5, 4), lambda s: functional.adaptive_avg_pool2d(s, (3, 2))
)
plain("pool", "aten::avg_pool2d", (2, 4, 6), lambda s: functional.avg_pool2d(s, 2))
plain(
    "pool with padding",
    "aten::avg_pool2d",
    (2, 5, 4),
    lambda s: functional.avg_pool2d(s, (3, 2), stride=2, padding=(1, 0), ceil_mode=True, count_include_pad=False),
)
plain(
    "pool with a divisor",
    "aten::avg_pool2d",
    (2, 4, 4),
    lambda s: functional.avg_pool2d(s, 3, 1, 1, count_include_pad=True, divisor_override=4),
)
plain("pool of rows", "aten::avg_pool1d", (4, 6), lambda s: functional.avg_pool1d(s, 2))
plain("adaptive pool of rows", "aten::adaptive_avg_pool1d", (4, 6), lambda s: functional.adaptive_avg_pool1d(s, 4))
for mode in ("bilinear", "bicubic", "nearest"):
    plain(
        f"{mode}",
        f"aten::upsample_{mode}2d",
        (2, 3, 4),
        lambda s, mode=mode: functional.interpolate(s, (5, 6), mode=mode),
    )
plain("im2col", "aten::im2col", (2, 3, 4), lambda s: functional.unfold(s, (2, 3), stride=1, padding=(1, 0)))
plain("col2im", "aten::col2im", (8, 6), lambda s: functional.fold(s, (3, 4), 2))
plain("col2im of patches", "aten::col2im", (8, 4), lambda s: functional.fold(s, (4, 4), 2, stride=2))
plain("pixel_shuffle", "aten::pixel_shuffle", (8, 2, 3), lambda s: functional.pixel_shuffle(s, 2))
plain("pixel_unshuffle", "aten::pixel_unshuffle", (2, 4, 6), lambda s: functional.pixel_unshuffle(s, 2))
plain("mean over images' channels", "aten::mean", (3, 2, 4), lambda s: s - s.mean(1, keepdim=True))
plain("mean, of two", "getitem", (4, 6), lambda s: s - torch.var_mean(s, dim=1, keepdim=True)[1])
plain("mean, of two, without keepdim", "getitem", (4, 6), lambda s: s * 2 + torch.var_mean(s, 1)[1].unsqueeze(1))

# --- products with weights ---

case("linear", "aten::linear", (4, 6), lambda p, m, s, x: functional.linear(s, p("w", 5, 6), p("b", 5)))
case("linear to even", "aten::linear", (4, 6), lambda p, m, s, x: functional.linear(s, p("w", 4, 6)))
case(
    "linear of tokens",
    "aten::linear",
    (4, 6),
    lambda p, m, s, x: functional.linear(s.mT.contiguous(), p("w", 4, 4), p("b", 4)).transpose(1, 2),
)
case("linear to one", "aten::linear", (4, 6), lambda p, m, s, x: functional.linear(s, p("w", 1, 6), p("b", 1)))
case("linear of heads", "aten::linear", (2, 3, 4), lambda p, m, s, x: functional.linear(s, p("w", 4, 4), p("b", 4)))
case("matmul", "aten::matmul", (4, 6), lambda p, m, s, x: s @ p("w", 6, 4))
case("mm", "aten::mm", (6,), lambda p, m, s, x: torch.mm(s, p("w", 6, 4)))
case("matmul from the left", "aten::matmul", (4, 6), lambda p, m, s, x: p("w", 6, 4) @ s)
for equation, shape, weight in (
    ("bnc,dc->bnd", (4, 6), (4, 6)),
    ("bnc,nm->bmc", (4, 6), (4, 2)),
    ("bnhv,dhv->bdn", (4, 2, 3), (4, 2, 3)),
    ("bhnc,hcd->bhnd", (2, 4, 3), (2, 3, 2)),
    ("bhnc,hn->bcn", (2, 4, 3), (2, 4)),
):
    case(
        f"einsum {equation}",
        "aten::einsum",
        shape,
        lambda p, m, s, x, e=equation, w=weight: torch.einsum(e, s, p("w", *w)),
    )
case(
    "einsum from the left",
    "aten::einsum",
    (4, 6),
    lambda p, m, s, x: torch.einsum("cd, b n c -> b n d", p("w", 6, 4), s),
)


def conv(out, per_group, kernel, *, bias=True, name="", shape=(4, 5, 6), function=functional.conv2d, **options):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel

    def run(p, m, s, x):
        y = function(s, p("w", out, per_group, *kernel), None, **options)
        return y + p("b", y.shape[1], *[1] * len(kernel)) if bias else y

    name = f"{function.__name__} {name or kernel} {options}"
    case(name, f"aten::{function.__name__}", shape, run)


conv(4, 4, 1)
conv(3, 4, 1, bias=False, stride=2)
conv(3, 4, 3)
conv(3, 4, 3, padding=1, stride=2)
conv(2, 4, (2, 3), padding=(1, 2), dilation=(2, 1), stride=(1, 2))
conv(4, 1, 3, name="depthwise", groups=4, padding=1)
conv(8, 1, 2, name="depthwise with more outputs", groups=4)
conv(6, 2, 3, name="grouped", groups=2, padding=1, dilation=2)
conv(4, 4, (3, 5), name="same", padding="same", dilation=(2, 1))
conv(4, 4, 2, name="valid", padding="valid", stride=2)
conv(4, 4, 2, name="patchify", stride=2, shape=(4, 5, 7))
rows = {"function": functional.conv1d, "shape": (4, 6)}
conv(4, 4, (1,), **rows)
conv(2, 4, (3,), padding=1, stride=2, **rows)
conv(4, 1, (3,), name="depthwise", groups=4, padding="same", dilation=2, bias=False, **rows)
back = {"function": torch.conv_transpose2d, "shape": (4, 3, 2)}
conv(4, 2, 2, stride=2, **back)
conv(4, 3, (3, 2), stride=2, padding=(1, 0), output_padding=1, bias=False, **back)
conv(4, 1, 3, name="depthwise", groups=4, padding=1, dilation=(1, 2), **back)
conv(4, 3, 3, name="grouped", groups=2, stride=(1, 2), padding=2, **back)

# --- constant and frozen factors ---

case("mul by channel", "aten::mul", (4, 6), lambda p, m, s, x: s * p("c", 6))
case("mul by token", "aten::mul", (4, 6), lambda p, m, s, x: p("c", 4, 1) * s)
case("mul by entry", "aten::mul", (4, 6), lambda p, m, s, x: s * p("c", 4, 6))
case("mul by scalar tensor", "aten::mul", (4, 6), lambda p, m, s, x: s * p("c", 1).sum())
case("mul by head", "aten::mul", (2, 4, 3), lambda p, m, s, x: s * p("c", 2, 1, 1))
plain("mul by a number", "aten::mul", (4, 6), lambda s: 2.5 * s)
case("div", "aten::div", (4, 6), lambda p, m, s, x: s / p("c", 6))
plain("div by a number", "aten::div", (4, 6), lambda s: s / 2.5)


def gated(p, m, s, x):
    return s * torch.sigmoid(m.lifted("gate", x, 4, 1))


case("gate by token", "aten::mul", (4, 6), gated)
case("gate from the left", "aten::mul", (4, 6), lambda p, m, s, x: m.lifted("gate", x, 1, 6) * s)
case("gate by entry", "aten::mul", (4, 6), lambda p, m, s, x: s * torch.sigmoid(m.lifted("gate", x, 4, 6)))
case(
    "gate, batch not first",
    "aten::mul",
    (4, 6),
    lambda p, m, s, x: (s.transpose(0, 1) * m.lifted("gate", x, 4, 1).transpose(0, 1)).transpose(0, 1),
)
case(
    "gate that is also added",
    "aten::mul",
    (4, 6),
    lambda p, m, s, x: (g := s.mean(1, keepdim=True)) + s * g,
    lambda p, m, s, x, seen: s.mean(1, keepdim=True) + s * seen.mean(1, keepdim=True),
)


def normalised(seen, s, dims, eps=1e-12):
    return s / seen.norm(dim=dims, keepdim=True).clamp_min(eps)


case(
    "divided by its norm",
    "aten::div",
    (4, 6),
    lambda p, m, s, x: functional.normalize(s, dim=-1),
    lambda p, m, s, x, seen: normalised(seen, s, -1),
)
case(
    "divided by a norm of tokens",
    "aten::div",
    (4, 6),
    lambda p, m, s, x: functional.normalize(s, dim=1),
    lambda p, m, s, x, seen: normalised(seen, s, 1),
)


def by_hand_rms(p, m, s, x, seen=None):
    seen = s if seen is None else seen
    return s * torch.rsqrt(seen.pow(2).mean(-1, keepdim=True) + 1e-3) * p("c", s.shape[-1])


case("RMS by hand", "aten::mul", (4, 6), by_hand_rms, by_hand_rms)
case(
    "LayerNorm by hand",
    "aten::div aten::sub",
    (4, 6),
    lambda p, m, s, x: (s - s.mean(-1, keepdim=True)) / torch.sqrt(s.var(-1, keepdim=True, unbiased=False) + 1e-3),
    lambda p, m, s, x, seen: (
        (s - s.mean(-1, keepdim=True)) / torch.sqrt(seen.var(-1, keepdim=True, unbiased=False) + 1e-3)
    ),
)


def layer_norm(dims, affine, eps=1e-3):
    def parameters(p, s):
        shape = s.shape[-dims:]
        return (p("g", *shape), p("b", *shape)) if affine else (None, None)

    def run(p, m, s, x):
        return functional.layer_norm(s, s.shape[-dims:], *parameters(p, s), eps)

    def frozen(p, m, s, x, seen):
        axes = tuple(range(-dims, 0))
        weight, bias = parameters(p, s)
        y = (s - s.mean(axes, keepdim=True)) / (seen.var(axes, keepdim=True, unbiased=False) + eps).sqrt()
        return y if weight is None else y * weight + bias

    return run, frozen


case("LayerNorm", "aten::layer_norm", (4, 6), *layer_norm(1, True))
case("LayerNorm without weights", "aten::layer_norm", (4, 6), *layer_norm(1, False))
case("LayerNorm of heads", "aten::layer_norm", (2, 4, 6), *layer_norm(1, True))
case("LayerNorm of two dimensions", "aten::layer_norm", (3, 4), *layer_norm(2, True))


def rms_norm(affine, eps):
    def run(p, m, s, x):
        return functional.rms_norm(s, s.shape[-1:], p("g", s.shape[-1]) if affine else None, eps)

    def frozen(p, m, s, x, seen):
        e = torch.finfo(torch.float64).eps if eps is None else eps
        y = s / (seen.pow(2).mean(-1, keepdim=True) + e).sqrt()
        return y * p("g", s.shape[-1]) if affine else y

    return run, frozen


case("RMSNorm", "aten::rms_norm", (4, 6), *rms_norm(True, 1e-2))
case("RMSNorm without weights or eps", "aten::rms_norm", (4, 6), *rms_norm(False, None))


def batch_norm(affine):
    def run(p, m, s, x):
        c = s.shape[1]
        weights = (p("g", c), p("b", c)) if affine else (None, None)
        return functional.batch_norm(s, p("mean", c), p("var", c).square(), *weights, eps=1e-2)

    return run


def group_norm(groups, affine):
    def parameters(p, s):
        return (p("g", s.shape[1]), p("b", s.shape[1])) if affine else (None, None)

    def run(p, m, s, x):
        return functional.group_norm(s, groups, *parameters(p, s), eps=1e-2)

    def frozen(p, m, s, x, seen):
        split, per_channel = (s.shape[0], groups, -1), (-1,) + (1,) * (s.dim() - 2)
        s_, seen_ = s.reshape(split), seen.reshape(split)
        y = (s_ - s_.mean(2, keepdim=True)) / (seen_.var(2, keepdim=True, unbiased=False) + 1e-2).sqrt()
        weight, bias = parameters(p, s)
        y = y.reshape(s.shape)
        return y if weight is None else y * weight.reshape(per_channel) + bias.reshape(per_channel)

    return run, frozen


case("GroupNorm", "aten::group_norm", (4, 3, 2), *group_norm(2, True))
case("GroupNorm, one group", "aten::group_norm", (4, 3, 2), *group_norm(1, True))
case("GroupNorm of rows", "aten::group_norm", (6, 4), *group_norm(3, False))
case("GroupNorm of one row", "aten::group_norm", (6,), *group_norm(2, True))

for dims in ((5,), (4, 6), (3, 2, 4)):
    case(f"BatchNorm of {1 + len(dims)}", "aten::batch_norm", dims, batch_norm(True))
case("BatchNorm without weights", "aten::batch_norm", (3, 2, 4), batch_norm(False))

# --- attention: linear in the values ---


def q_and_k(m, x, h, n, d):
    return m.lifted("q", x, h, n, d), m.lifted("k", x, h, n, d)


def fused(mask=None, **options):
    def run(p, m, s, x):
        q, k = q_and_k(m, x, *s.shape[1:])
        return functional.scaled_dot_product_attention(q, k, s, attn_mask=mask(p, m, x) if mask else None, **options)

    return run


TRIANGLE = torch.ones(4, 4).tril().bool()
CAUSAL = {"float mask": lambda p, m, x: p("mask", 4, 4), "mask by head": lambda p, m, x: p("mask", 2, 4, 4)}
CAUSAL["mask by image"] = lambda p, m, x: m.lifted("mask", x, 2, 4, 4)
CAUSAL["mask of keys"] = lambda p, m, x: p("mask", 1, 1, 1, 4)
CAUSAL["bool mask"] = lambda p, m, x: p("mask", 4, 4) * 0 + TRIANGLE > 0
case("fused", "aten::scaled_dot_product_attention", (2, 4, 3), fused(), skip=("columns",))
case("fused with a scale", "aten::scaled_dot_product_attention", (2, 4, 3), fused(scale=0.3), skip=("columns",))
for name, mask in CAUSAL.items():
    case(f"fused, {name}", "aten::scaled_dot_product_attention", (2, 4, 3), fused(mask), skip=("columns",))


def learned_query(p, m, s, x):
    n, c = s.shape[1:]
    k = m.lifted("k", x, 2, n, c // 2)
    v = s.reshape(-1, n, 2, c // 2).transpose(1, 2)
    q = p("q", 1, 2, 3, c // 2).expand(s.shape[0], -1, -1, -1)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 3, c)


def by_hand(p, m, s, x):
    q, k = q_and_k(m, x, *s.shape[1:])
    return (q @ k.transpose(-1, -2) * 0.5 + p("bias", 2, 4, 4)).softmax(-1) @ s


def twice(p, m, s, x):
    q, k = q_and_k(m, x, *s.shape[1:])
    return functional.scaled_dot_product_attention(k, q, (q @ k.transpose(-1, -2)).softmax(-1) @ s)


def windows_with_masks(p, m, s, x):
    """[batch * 2 windows, head, token, d]: a mask for each window, the same for each image."""
    v = s.view(-1, 2, 4, 3).reshape(-1, 2, 4, 3)
    q, k = (m.lifted(n, x, 2, 2, 4, 3).view(-1, 2, 4, 3) for n in ("q", "k"))
    mask = p("mask", 1, 2, 2, 4, 4).expand(s.shape[0], -1, -1, -1, -1).reshape(-1, 2, 4, 4)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(-1, 2, 2, 4, 3).flatten(1, 2)


case("learned query", "aten::scaled_dot_product_attention", (4, 6), learned_query, skip=("mixed",))
case("by hand", "aten::matmul", (2, 4, 3), by_hand, skip=("columns",))
case("attention of attention", "aten::matmul aten::scaled_dot_product_attention", (2, 4, 3), twice, skip=("columns",))
case("windows with masks", "aten::scaled_dot_product_attention", (2, 2, 4, 3), windows_with_masks, skip=("columns",))


def oracle(model, case, x):
    """Activation × derivative by the source, ``[direction, batch, *dims]``, and what is left without a source."""
    seen = model.source(x).detach()

    def frozen(s):
        y = case.frozen(model.bank, model, s, x, seen) if case.frozen else case.run(model.bank, model, s, x)
        return read_out(model, y, x, case.skip)

    out, pull = torch.func.vjp(frozen, seen)
    directions = torch.eye(out.shape[1], dtype=out.dtype)
    products = torch.stack([pull(u.expand_as(out))[0] * seen for u in directions])
    return products.detach(), frozen(torch.zeros_like(seen)).detach()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_an_adjoint_is_the_derivative_of_the_eager_frozen_operation(case):
    model = model_of(case.shape, case.run, skip=case.skip)
    graph = trace(model, images())
    cut = graph.cut(["hook_source"])
    assert set(case.covers.split()) <= {operation(node) for node in cut.through}
    x = images(3, seed=1)  # not the number that traces are made with
    products, left = oracle(model, case, x)
    for split in (None, *range(1, products.dim() - 1)):
        program = graph.program(cut, splits={"hook_source": split}, dtype=torch.float64)
        assert isinstance(program, Program)
        found, constants = contributions(graph, program, cut, x)
        others = [d for d in range(2, products.dim()) if d - 1 != split]
        expected = products.sum(others).unsqueeze(2) if split is None else products.sum(others) if others else products
        torch.testing.assert_close(found, expected.permute(2, 1, 0), rtol=0, atol=1e-11)
        torch.testing.assert_close(constants.sum(0), left, rtol=0, atol=1e-11)


def contributions(graph, program, cut, x):
    point = cut.points["hook_source"]
    values = graph.evaluate([point, *program.nodes], {graph.images: x})
    weights = program.weights_at(values, len(x))
    kept = {"hook_source": program.keep("hook_source", values[point])}
    with torch.no_grad():
        return program.contributions(kept, weights, len(x))["hook_source"], program.shifted(weights, len(x))


def test_every_adjoint_is_tested():
    assert {name for case in CASES for name in case.covers.split()} == set(ADJOINTS)
