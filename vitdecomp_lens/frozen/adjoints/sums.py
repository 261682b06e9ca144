"""Adjoints of sums, differences, averages over dimensions, and pooling."""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints.moves import before_copies
from vitdecomp_lens.frozen.adjoints.registry import Adjoint, Passed, adjoint, input_of
from vitdecomp_lens.frozen.adjoints.slices import with_dim
from vitdecomp_lens.frozen.pairs import NoFastPathError, Pairs, Tape, settle
from vitdecomp_lens.frozen.rules import argument, operation, sizes
from vitdecomp_lens.frozen.walk import module_path


@adjoint("aten::add", "aten::sub", "aten::rsub")
def adds(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A sum passes to both sides; what does not depend on the images is a constant."""
    name, passed = operation(node), []
    alpha = argument(node, 2, "alpha", 1)
    signs = {"aten::add": (1, alpha), "aten::sub": (1, -alpha), "aten::rsub": (-alpha, 1)}[name]
    for part, sign in zip(node.args[:2], signs, strict=True):
        if isinstance(part, Node) and part in on.live:
            mine = pairs if sign == 1 else replace(pairs, maps=pairs.maps * sign)
            passed.append((part, mine if sizes(part) == sizes(node) else before_copies(node, part, mine, on)))
        else:
            label = on.name_of(part) if isinstance(part, Node) else f"{module_path(node)}.shift"
            on.constant(label, node, pairs, on.value(part) * sign)
    return passed


@adjoint("aten::neg")
def negates(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """-1 goes to M."""
    return [(input_of(node), replace(pairs, maps=-pairs.maps))]


@adjoint("aten::mean", "aten::sum")
def averages(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """The same weight for every entry of the dimensions that were averaged.

    M owns them if they are the last one, channels as a norm averages them; else A does.
    """
    source, mean = input_of(node), operation(node) == "aten::mean"
    shape, count = sizes(source), len(sizes(source))
    dims = sorted(d % count for d in (argument(node, 1, "dim") or range(count)))
    over_channels = dims == [count - 1] and pairs.batch != count - 1
    if not argument(node, 2, "keepdim", False):
        for dim in dims:
            pairs = with_dim(pairs, on.tape, dim, "M" if over_channels else "A")
    if over_channels:
        pairs = settle(pairs, on.tape, dims, "M")
        maps = pairs.maps.expand(*pairs.maps.shape[:-1], shape[-1])
        return [(source, replace(pairs, maps=maps / shape[-1] if mean else maps))]
    return [(source, _spread_evenly(pairs, on.tape, dims, shape, mean=mean))]


def _spread_evenly(pairs: Pairs, tape: Tape, dims: list[int], shape: tuple[int, ...], *, mean: bool) -> Pairs:
    if pairs.batch in dims:
        raise NoFastPathError("an average over the batch")
    pairs = settle(pairs, tape, dims, "A")
    factor = 1 / math.prod(shape[d] for d in dims) if mean else 1.0

    def grow(a: Tensor) -> Tensor:
        return a.expand([shape[d - 1] if d - 1 in dims else n for d, n in enumerate(a.shape)]) * factor

    return replace(pairs, weights=tape.step(grow, pairs.weights))


@adjoint("aten::adaptive_avg_pool2d", "aten::_adaptive_avg_pool2d")
def pools_to_one(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """To one position it is a mean; to more it is left to the replay."""
    source = input_of(node)
    if tuple(sizes(node)[-2:]) != (1, 1):
        raise NoFastPathError("adaptive pooling to more than one position")
    dims = [len(sizes(source)) - 2, len(sizes(source)) - 1]
    return [(source, _spread_evenly(pairs, on.tape, dims, sizes(source), mean=True))]


@adjoint("aten::avg_pool2d")
def pools(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Acts on A, position by position, by torch's own derivative."""
    source = input_of(node)
    pairs = settle(pairs, on.tape, (2, 3), "A")
    if pairs.owners[1] != "M":
        raise NoFastPathError("pooling where A owns the channels")
    height, width = sizes(source)[2:]

    def spread_out(a: Tensor) -> Tensor:
        flat = a.reshape(-1, 1, *a.shape[-2:])
        zero = flat.new_zeros(flat.shape[0], 1, height, width)
        back = torch.func.vjp(lambda x: node.target(x, *node.args[1:], **node.kwargs), zero)[1]  # type: ignore[operator]
        return back(flat)[0].reshape(*a.shape[:-2], height, width)

    return [(source, replace(pairs, weights=on.tape.step(spread_out, pairs.weights)))]
