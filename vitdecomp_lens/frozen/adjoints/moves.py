"""Adjoints of what only moves or copies entries: the identity, reshape, permute, expand, roll and flip."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints.registry import Adjoint, Passed, adjoint, aligned_shape, input_of
from vitdecomp_lens.frozen.pairs import NoFastPathError, Pairs, Tape, reshape, settle
from vitdecomp_lens.frozen.rules import argument, aten, sizes


@adjoint(
    *aten("alias contiguous clone dropout feature_dropout to _to_copy detach type_as"),
    "aten::lift_fresh_copy",
    "vitdecomp_lens::tag",
)
def nothing(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """The identity."""
    return [(input_of(node), pairs)]


@adjoint(*aten("view _unsafe_view reshape flatten unflatten squeeze unsqueeze view_as reshape_as"))
def reshapes(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Dimension groups are matched; see `reshape`."""
    source = input_of(node)
    return [(source, reshape(pairs, on.tape, sizes(source), sizes(node)))]


@adjoint("aten::permute", "aten::transpose", "aten::swapaxes", "aten::t", "aten::numpy_T", "aten::mT", "aten::movedim")
def permutes(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Both factors are permuted back; the order is found by permuting the numbers of the dimensions."""
    source, dims = input_of(node), len(sizes(node))
    # The dimensions' numbers as lengths of a tensor without memory: whatever the operation, it tells its order.
    probe = torch.empty(0, device="meta").new_empty(tuple(range(2, dims + 2)))
    moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [(source, permuted_back(pairs, on.tape, [n - 2 for n in moved.shape]))]


def permuted_back(pairs: Pairs, tape: Tape, order: Sequence[int]) -> Pairs:
    """Pairs before a permutation whose dimension ``d`` is dimension ``order[d]`` of its input."""
    back = [order.index(d) for d in range(len(order))]
    weights = tape.step(lambda a: a.permute(0, *(1 + d for d in back)), pairs.weights)
    maps = pairs.maps.permute(0, 1, *(2 + d for d in back))
    return Pairs(weights, maps, tuple(pairs.owners[d] for d in back), order[pairs.batch])


@adjoint("aten::expand", "aten::expand_as")
def expands(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """What was copied is summed."""
    return [(input_of(node), before_copies(node, input_of(node), pairs, on))]


def before_copies(node: Node, source: Node, pairs: Pairs, on: Adjoint) -> Pairs:
    """Pairs before ``source`` is broadcast to the shape of ``node``."""
    inner, outer = aligned_shape(sizes(source), len(sizes(node))), sizes(node)
    copied = [d for d, (i, o) in enumerate(zip(inner, outer, strict=True)) if i != o]
    pairs = settle(pairs, on.tape, [d for d in copied if pairs.owners[d] == "both"], "M")
    weights, maps = pairs.weights, pairs.maps
    if mine := [1 + d for d in copied if pairs.owners[d] == "A"]:
        weights = on.tape.step(lambda a: a.sum(mine, keepdim=True), weights)
    if pairs.batch in copied:
        raise NoFastPathError("an expansion over the batch")
    if theirs := [2 + d for d in copied if pairs.owners[d] == "M"]:
        maps = maps.sum(theirs, keepdim=True)
    return reshape(replace(pairs, weights=weights, maps=maps), on.tape, sizes(source), inner)


def with_dim(pairs: Pairs, tape: Tape, dim: int, owner: Literal["A", "M"] = "A") -> Pairs:
    """Pairs with a dimension of length one put in at ``dim``."""
    return Pairs(
        tape.step(lambda a: a.unsqueeze(1 + dim), pairs.weights),
        pairs.maps.unsqueeze(2 + dim),
        (*pairs.owners[:dim], owner, *pairs.owners[dim:]),
        pairs.batch + (dim <= pairs.batch),
    )


@adjoint("aten::roll")
def rolls(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Rolled back, in whichever factor owns the dimension."""
    shifts, dims = list(node.args[1]), [d % len(sizes(node)) for d in argument(node, 2, "dims", [])]  # type: ignore[arg-type]
    if not dims:
        raise NoFastPathError("a roll of the flattened tensor")
    in_a = [(-s, 1 + d) for s, d in zip(shifts, dims, strict=True) if pairs.owners[d] != "M"]
    in_m = [(-s, 2 + d) for s, d in zip(shifts, dims, strict=True) if pairs.owners[d] != "A"]
    weights = pairs.weights
    if in_a:
        weights = on.tape.step(lambda a: a.roll(*map(list, zip(*in_a, strict=True))), weights)
    maps = pairs.maps.roll(*map(list, zip(*in_m, strict=True))) if in_m else pairs.maps
    return [(input_of(node), replace(pairs, weights=weights, maps=maps))]


@adjoint("aten::flip")
def flips(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Its own inverse."""
    dims = [d % len(sizes(node)) for d in argument(node, 1, "dims")]
    in_a, in_m = ([d for d in dims if pairs.owners[d] != other] for other in ("M", "A"))
    weights = on.tape.step(lambda a: a.flip([1 + d for d in in_a]), pairs.weights) if in_a else pairs.weights
    maps = pairs.maps.flip([2 + d for d in in_m]) if in_m else pairs.maps
    return [(input_of(node), replace(pairs, weights=weights, maps=maps))]
