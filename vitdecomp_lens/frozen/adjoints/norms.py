"""Adjoints of products entry by entry: constant scales, frozen factors, and norms with their frozen statistics."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints.registry import Adjoint, Passed, adjoint, input_of
from vitdecomp_lens.frozen.pairs import Pairs, settle
from vitdecomp_lens.frozen.replay import inverse_deviation, inverse_root_mean_square, norm_dims
from vitdecomp_lens.frozen.rules import argument, classify, operation, sizes
from vitdecomp_lens.frozen.walk import module_path


@adjoint("aten::mul", "aten::div")
def scales(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A constant factor, or a frozen one: a norm's statistic or a gate."""
    left, right = node.args[:2]
    divides = operation(node) == "aten::div"
    live = [n for n in (left, right) if isinstance(n, Node) and n in on.live]
    if len(live) == 1:
        other = on.value(right if live[0] is left else left)
        return [(live[0], on.scaled(node, pairs, other.reciprocal() if divides else other))]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    kept = classify(node, on.live).through[0]
    factor = right if kept is left else left
    while operation(factor) in ("aten::expand", "aten::expand_as"):
        factor = input_of(factor)  # a copied statistic would seem to differ along the channels
    return [(kept, on.scaled_live(node, pairs, factor, inverse=divides))]


def _norm_statistic(node: Node, pairs: Pairs, on: Adjoint, inverse: Callable[[Tensor], Tensor]) -> Pairs:
    shape = list(sizes(input_of(node)))
    for dim in norm_dims(node):
        shape[dim] = 1
    leaf = on.tape.leaf((input_of(node),), f"statistic of {node.name}", inverse, shape)
    return replace(pairs, weights=on.tape.step(torch.mul, pairs.weights, leaf))


def _norm_owners(node: Node, pairs: Pairs, on: Adjoint) -> Pairs:
    dims = len(sizes(node))
    first = dims - len(norm_dims(node))
    pairs = settle(pairs, on.tape, range(first, dims), "M")
    return settle(pairs, on.tape, range(first), "A")


@adjoint("aten::layer_norm")
def layer_norm(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A × 1/σ; M × γ, centred; β is a constant."""
    eps, weight, bias = argument(node, 4, "eps", 1e-5), argument(node, 2, "weight"), argument(node, 3, "bias")
    dims = norm_dims(node)
    pairs = _norm_owners(node, pairs, on)
    if bias is not None:
        on.constant(on.name_of(bias), node, pairs, on.value(bias))
    maps = pairs.maps if weight is None else pairs.maps * on.value(weight)
    pairs = replace(pairs, maps=maps - maps.mean(dims, keepdim=True))
    return [(input_of(node), _norm_statistic(node, pairs, on, lambda x: inverse_deviation(x, dims, eps)))]


@adjoint("aten::rms_norm")
def rms_norm(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A × 1/RMS; M × γ."""
    eps, weight, dims = argument(node, 3, "eps"), argument(node, 2, "weight"), norm_dims(node)
    pairs = _norm_owners(node, pairs, on)
    maps = pairs.maps if weight is None else pairs.maps * on.value(weight)
    pairs = replace(pairs, maps=maps)
    return [(input_of(node), _norm_statistic(node, pairs, on, lambda x: inverse_root_mean_square(x, dims, eps)))]


@adjoint("aten::batch_norm")
def batch_norm(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """In evaluation mode a constant scale and shift a channel."""
    eps = node.args[7]
    weight, bias, mean, variance = (None if n is None else on.value(n) for n in node.args[1:5])
    assert mean is not None
    assert variance is not None
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)  # type: ignore[operator]
    shift = (0 if bias is None else bias) - mean * scale
    per_channel = (-1,) + (1,) * (len(sizes(node)) - 2)
    on.constant(f"{module_path(node)}.shift", node, pairs, shift.reshape(per_channel))
    return [(input_of(node), on.scaled(node, pairs, scale.reshape(per_channel)))]
