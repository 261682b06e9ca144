"""Adjoints of products entry by entry: constant scales, frozen factors, and norms with their frozen statistics."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints.registry import Adjoint, Passed, adjoint, input_of
from vitdecomp_lens.frozen.pairs import NoFastPathError, Pairs, Tape, check_rank, length, settle
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
    """M owns what is normed together, or A does, where it owns some of it; and all else."""
    dims = len(sizes(node))
    normed = range(dims - len(norm_dims(node)), dims)
    mine = any(pairs.owners[d] == "A" and length(pairs, on.tape, d) > 1 for d in normed)
    pairs = settle(pairs, on.tape, normed, "A" if mine else "M")
    return settle(pairs, on.tape, range(normed.start), "A")


def _in_the_owner(node: Node, pairs: Pairs, on: Adjoint, function: Callable[[Tensor], Tensor]) -> Pairs:
    """Apply a function of what is normed together to the factor that owns it."""
    if pairs.owners[-1] == "A":
        return replace(pairs, weights=on.tape.step(function, pairs.weights))
    return replace(pairs, maps=function(pairs.maps))


@adjoint("aten::layer_norm")
def layer_norm(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A × 1/σ; M × γ, centred; β is a constant."""
    eps, weight, bias = argument(node, 4, "eps", 1e-5), argument(node, 2, "weight"), argument(node, 3, "bias")
    dims = norm_dims(node)
    pairs = _norm_owners(node, pairs, on)
    if bias is not None:
        on.constant(on.name_of(bias), node, pairs, on.value(bias))
    gain = None if weight is None else on.value(weight)

    def centred(factor: Tensor) -> Tensor:
        factor = factor if gain is None else factor * gain
        return factor - factor.mean(dims, keepdim=True)

    pairs = _in_the_owner(node, pairs, on, centred)
    return [(input_of(node), _norm_statistic(node, pairs, on, lambda x: inverse_deviation(x, dims, eps)))]


@adjoint("aten::rms_norm")
def rms_norm(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A × 1/RMS; M × γ."""
    eps, weight, dims = argument(node, 3, "eps"), argument(node, 2, "weight"), norm_dims(node)
    pairs = _norm_owners(node, pairs, on)
    if weight is not None:
        gain = on.value(weight)
        pairs = _in_the_owner(node, pairs, on, lambda factor: factor * gain)
    return [(input_of(node), _norm_statistic(node, pairs, on, lambda x: inverse_root_mean_square(x, dims, eps)))]


@adjoint("aten::group_norm")
def group_norm(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A × 1/σ, M × γ; and less the groups' means."""
    source, groups, eps = input_of(node), argument(node, 1, "num_groups"), argument(node, 4, "eps", 1e-5)
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    per_channel = (-1,) + (1,) * (len(sizes(node)) - 2)
    if pairs.batch != 0:
        raise NoFastPathError("a norm whose batch is not its first dimension")
    if bias is not None:
        on.constant(on.name_of(bias), node, pairs, on.value(bias).reshape(per_channel))
    if weight is not None:
        pairs = on.scaled(node, pairs, on.value(weight).reshape(per_channel))

    def inverse(x: Tensor) -> Tensor:
        return inverse_deviation(x.reshape(x.shape[0], groups, -1), (2,), eps)

    leaf = on.tape.leaf((source,), f"statistic of {node.name}", inverse, (sizes(source)[0], groups, 1))
    pairs = settle(pairs, on.tape, range(2, len(sizes(node))), "A")
    if pairs.owners[1] == "A":
        return [(source, replace(pairs, weights=on.tape.step(_centred_by_group, pairs.weights, leaf)))]
    return [(source, _parted_by_group(settle(pairs, on.tape, [1], "M"), on.tape, leaf, groups))]


def _centred_by_group(a: Tensor, inverse: Tensor) -> Tensor:
    by_group = a.reshape(*a.shape[:2], inverse.shape[1], -1)
    return ((by_group - by_group.mean(-1, keepdim=True)) * inverse).reshape(a.shape)


def _parted_by_group(pairs: Pairs, tape: Tape, leaf: int, groups: int) -> Pairs:
    """Two pairs for each group: A ⊗ M of its channels, less the mean of A over positions ⊗ that of M over channels."""
    check_rank(2 * pairs.rank * groups)
    shape = pairs.maps.shape
    by_group = pairs.maps.unflatten(3, (groups, -1))
    both = torch.cat([by_group, by_group.mean(4, keepdim=True).expand_as(by_group)])
    mask = torch.eye(groups, dtype=tape.dtype, device=tape.device)
    mask = mask.reshape(1, groups, 1, 1, groups, *[1] * (len(shape) - 3))
    maps = (both.unsqueeze(1) * mask).flatten(0, 1).reshape(-1, *shape[1:])

    def parted(a: Tensor, inverse: Tensor) -> Tensor:
        mean = a.unsqueeze(-1).flatten(3).mean(3).reshape(*a.shape[:3], *[1] * (a.dim() - 3)).expand_as(a)
        scales = inverse.movedim(1, 0).reshape(groups, -1, *[1] * (a.dim() - 2))
        return (torch.cat([a, -mean]).unsqueeze(1) * scales).flatten(0, 1)

    return replace(pairs, weights=tape.step(parted, pairs.weights, leaf), maps=maps)


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
