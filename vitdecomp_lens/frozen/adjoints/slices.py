"""Adjoints of what takes parts and puts parts together: select, slice, split, concatenation and padding."""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints.moves import with_dim
from vitdecomp_lens.frozen.adjoints.registry import Adjoint, Passed, adjoint, by_derivative, input_of
from vitdecomp_lens.frozen.adjoints.sums import averaged
from vitdecomp_lens.frozen.pairs import NoFastPathError, Pairs, Tape, reshape
from vitdecomp_lens.frozen.rules import SPLITS, argument, operation, sizes
from vitdecomp_lens.frozen.walk import module_path


def _cut_out(pairs: Pairs, tape: Tape, dim: int, where: slice, size: int) -> Pairs:
    """Pairs before a slice ``where`` of a dimension of length ``size``: zero outside of it."""

    def put(value: Tensor, axis: int) -> Tensor:
        whole = list(value.shape)
        whole[axis] = size
        out = value.new_zeros(whole)
        out[(slice(None),) * axis + (where,)] = value
        return out

    if pairs.batch == dim:
        raise NoFastPathError("a slice of the batch")
    weights, maps = pairs.weights, pairs.maps
    if pairs.owners[dim] != "M":
        weights = tape.step(lambda a: put(a, 1 + dim), weights)
    if pairs.owners[dim] != "A":
        maps = put(maps, 2 + dim)
    return replace(pairs, weights=weights, maps=maps)


@adjoint("aten::select")
def selects(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """One entry of a dimension: zero elsewhere."""
    source = input_of(node)
    dim = argument(node, 1, "dim") % len(sizes(source))
    size = sizes(source)[dim]
    index = argument(node, 2, "index") % size
    # What lies before the batch, or before heads, is a group of channels (query, key or value); what lies last, a
    # channel; else it is a token.
    before_heads = dim < len(pairs.owners) and pairs.owners[dim] == "both"
    last = dim == len(sizes(source)) - 1
    owner: Literal["A", "M"] = "M" if dim <= pairs.batch or before_heads or last else "A"
    return [(source, _cut_out(with_dim(pairs, on.tape, dim, owner), on.tape, dim, slice(index, index + 1), size))]


@adjoint("aten::slice", "aten::narrow")
def slices(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Some entries of a dimension: zero elsewhere."""
    source = input_of(node)
    dim = argument(node, 1, "dim", 0) % len(sizes(source))
    size = sizes(source)[dim]
    if sizes(source) == sizes(node):
        return [(source, pairs)]
    first = argument(node, 2, "start", 0) or 0
    if operation(node) == "aten::narrow":
        first %= size
        where = slice(first, first + argument(node, 3, "length"))
    else:
        where = slice(*slice(first, argument(node, 3, "end", size), argument(node, 4, "step", 1)).indices(size))
    return [(source, _cut_out(pairs, on.tape, dim, where, size))]


@adjoint("getitem")
def takes_one_of_several(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """One output of a split or an unbind: its slice of what was split."""
    several, number = node.args[0], argument(node, 1, "index")
    assert isinstance(several, Node)
    if operation(several) == "aten::var_mean":
        return [(input_of(several), averaged(several, pairs, on, keepdim=argument(several, 3, "keepdim", False)))]
    if operation(several) not in SPLITS:
        raise NoFastPathError(f"{operation(several)} has no adjoint")
    source, outputs = input_of(several), several.meta["val"]
    place = 1 if operation(several) == "aten::unbind" else 2
    dim = argument(several, place, "dim", 0) % len(sizes(source))
    if operation(several) == "aten::unbind":
        pairs, first, count = with_dim(pairs, on.tape, dim, "M"), number, 1
    else:
        first = sum(int(o.shape[dim]) for o in outputs[:number])
        count = int(outputs[number].shape[dim])
    return [(source, _cut_out(pairs, on.tape, dim, slice(first, first + count), sizes(source)[dim]))]


@adjoint("aten::cat", "aten::concat", "aten::stack")
def joins(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Each part gets its slice; a part that does not depend on the images is a constant."""
    stacked = operation(node) == "aten::stack"
    dim = argument(node, 1, "dim", 0) % len(sizes(node))
    if pairs.batch == dim:
        raise NoFastPathError("a concatenation along the batch")
    passed, first = [], 0
    for part in node.args[0]:  # type: ignore[union-attr]
        assert isinstance(part, Node)
        count = 1 if stacked else sizes(part)[dim]
        mine = _narrowed(pairs, on.tape, dim, first, count)
        first += count
        if part not in on.live:
            value = on.value(part)
            on.constant(on.name_of(part), node, mine, value.unsqueeze(dim) if stacked else value)
        elif stacked:
            whole = (*sizes(part)[:dim], 1, *sizes(part)[dim:])
            passed.append((part, reshape(mine, on.tape, sizes(part), whole)))
        else:
            passed.append((part, mine))
    return passed


@adjoint("aten::select_scatter", "aten::slice_scatter")
def replaces_a_part(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """The part gets its slice, the rest what is left."""
    base, part = node.args[:2]
    assert isinstance(base, Node)
    assert isinstance(part, Node)
    selects = operation(node) == "aten::select_scatter"
    dim = argument(node, 2, "dim", 0) % len(sizes(node))
    if pairs.batch == dim:
        raise NoFastPathError("a part of the batch")
    size = sizes(node)[dim]
    if selects:
        first = argument(node, 3, "index") % size
        where = slice(first, first + 1)
    else:
        where = slice(argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1))
    left = on.tape.ones(size).clone()
    left[where] = 0
    left = left.reshape([size if d == dim else 1 for d in range(len(sizes(node)))])
    passed = []
    for source, mine in ((base, on.scaled(node, pairs, left)), (part, _taken(pairs, on.tape, dim, where))):
        if source not in on.live:
            value = on.value(source)
            on.constant(on.name_of(source), node, mine, value.unsqueeze(dim) if source is part and selects else value)
        elif source is part and selects:
            whole = (*sizes(part)[:dim], 1, *sizes(part)[dim:])
            passed.append((source, reshape(mine, on.tape, sizes(part), whole)))
        else:
            passed.append((source, mine))
    return passed


def _taken(pairs: Pairs, tape: Tape, dim: int, where: slice) -> Pairs:
    weights, maps = pairs.weights, pairs.maps
    if pairs.owners[dim] != "M":
        weights = tape.step(lambda a: a[(slice(None),) * (1 + dim) + (where,)], weights)
    if pairs.owners[dim] != "A":
        maps = maps[(slice(None),) * (2 + dim) + (where,)]
    return replace(pairs, weights=weights, maps=maps)


def _narrowed(pairs: Pairs, tape: Tape, dim: int, first: int, count: int) -> Pairs:
    weights, maps = pairs.weights, pairs.maps
    if pairs.owners[dim] != "M":
        weights = tape.step(lambda a: a.narrow(1 + dim, first, count), weights)
    if pairs.owners[dim] != "A":
        maps = maps.narrow(2 + dim, first, count)
    return replace(pairs, weights=weights, maps=maps)


@adjoint("aten::pad", "aten::constant_pad_nd")
def pads(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """What was padded is dropped; a padding other than zero is a constant of its own."""
    source, amounts = input_of(node), list(node.args[1])  # type: ignore[arg-type]
    padded = {len(sizes(node)) - 1 - n // 2: amounts[n : n + 2] for n in range(0, len(amounts), 2)}
    padded = {dim: around for dim, around in padded.items() if any(around)}
    mode, value = "constant", argument(node, 3, "value")
    if operation(node) == "aten::constant_pad_nd":
        value = argument(node, 2, "value", 0)
    else:
        mode = argument(node, 2, "mode", "constant")
    if value and padded:
        shape = [1 if dim == pairs.batch else size for dim, size in enumerate(sizes(source))]
        around = torch.nn.functional.pad(on.tape.ones(*shape) * 0, amounts, value=value)
        on.constant(f"{module_path(node)}.padding", node, pairs, around)
    if padded and (mode != "constant" or min(amounts) < 0):  # entries are repeated, or cut off
        run = partial(torch.nn.functional.pad, pad=amounts, mode=mode)
        return [(source, by_derivative(pairs, on.tape, list(padded), sizes(source), run))]
    for dim, (before, _) in padded.items():
        pairs = _narrowed(pairs, on.tape, dim, before, sizes(source)[dim])
    return [(source, pairs)]
