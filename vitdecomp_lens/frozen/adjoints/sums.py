"""Adjoints of sums, differences, choices between two values, and averages over dimensions."""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints.moves import before_copies, with_dim
from vitdecomp_lens.frozen.adjoints.registry import Adjoint, Passed, adjoint, input_of
from vitdecomp_lens.frozen.pairs import NoFastPathError, Pairs, Tape, length, settle
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


@adjoint("aten::addcmul", "aten::addcdiv")
def adds_a_product(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A sum of x and a b, or a / b: the product is with a constant, or a constant itself."""
    total, left, right = node.args[:3]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    divides, alpha = operation(node) == "aten::addcdiv", argument(node, 3, "value", 1)
    passed, known = [], [None if n in on.live else on.value(n) for n in (left, right)]
    if known[1] is not None and divides:
        known[1] = known[1].reciprocal()
    for part, factor in ((total, None), (left, known[1]), (right, known[0])):
        if part in on.live:
            assert isinstance(part, Node)
            mine = pairs if part is total and factor is None else on.scaled(node, pairs, factor * alpha)
            passed.append((part, mine if sizes(part) == sizes(node) else before_copies(node, part, mine, on)))
    if total not in on.live:
        on.constant(on.name_of(total), node, pairs, on.value(total))  # type: ignore[arg-type]
    if known[0] is not None and known[1] is not None:
        on.constant(on.name_of(left), node, pairs, known[0] * known[1] * alpha)
    return passed


@adjoint("aten::where", "aten::masked_fill")
def chooses(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Each of two values where it was chosen."""
    if operation(node) == "aten::where":
        chosen, first, second = node.args[:3]
    else:
        second, chosen, first = node.args[:3]
    mask, passed = on.value(chosen), []
    for part, where in ((first, mask), (second, 1 - mask)):
        if isinstance(part, Node) and part in on.live:
            mine = on.scaled(node, pairs, where)
            passed.append((part, mine if sizes(part) == sizes(node) else before_copies(node, part, mine, on)))
        else:
            label = on.name_of(part) if isinstance(part, Node) else f"{module_path(node)}.filling"
            value = on.value(part)
            on.constant(label, node, pairs, torch.where(where > 0, value, torch.zeros_like(value)))
    return passed


@adjoint("aten::mean", "aten::sum")
def averages(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """The same weight for every entry of the dimensions that were averaged."""
    keepdim, mean = argument(node, 2, "keepdim", False), operation(node) == "aten::mean"
    return [(input_of(node), averaged(node, pairs, on, keepdim=keepdim, mean=mean))]


def averaged(node: Node, pairs: Pairs, on: Adjoint, *, keepdim: bool, mean: bool = True) -> Pairs:
    """Pairs before an average, or a sum.

    M owns the dimensions that were averaged if they are channels: the last one, as a norm averages them, or that of
    images. Else A does.
    """
    shape = sizes(input_of(node))
    count = len(shape)
    over = argument(node, 1, "dim")
    dims = sorted(d % count for d in (range(count) if over is None or over == [] else over))
    over_channels = (dims == [count - 1] or (dims == [1] and count == 4)) and pairs.batch not in dims
    if not keepdim:
        for dim in dims:
            pairs = with_dim(pairs, on.tape, dim, "M" if over_channels else "A")
    if not over_channels or any(pairs.owners[d] == "A" and length(pairs, on.tape, d) > 1 for d in dims):
        return _spread_evenly(pairs, on.tape, dims, shape, mean=mean)
    pairs = settle(pairs, on.tape, dims, "M")
    maps = pairs.maps.expand(*pairs.maps.shape[:2], *(n if d in dims else -1 for d, n in enumerate(shape)))
    return replace(pairs, maps=maps / shape[dims[0]] if mean else maps)


def _spread_evenly(pairs: Pairs, tape: Tape, dims: list[int], shape: tuple[int, ...], *, mean: bool) -> Pairs:
    if pairs.batch in dims:
        raise NoFastPathError("an average over the batch")
    pairs = settle(pairs, tape, dims, "A")
    factor = 1 / math.prod(shape[d] for d in dims) if mean else 1.0

    def grow(a: Tensor) -> Tensor:
        return a.expand([shape[d - 1] if d - 1 in dims else n for d, n in enumerate(a.shape)]) * factor

    return replace(pairs, weights=tape.step(grow, pairs.weights))
