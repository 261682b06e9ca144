"""Adjoints of products with constant matrices: linear layers, matrix products and convolutions.

A matrix product of two tensors that depend on the images is an attention pattern with its values.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints.attention import through_pattern
from vitdecomp_lens.frozen.adjoints.registry import Adjoint, Passed, adjoint, aligned, input_of
from vitdecomp_lens.frozen.pairs import NoFastPathError, Pairs, Tape, check_rank, settle
from vitdecomp_lens.frozen.rules import argument, sizes


@adjoint("aten::linear")
def linear(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """M W where M owns the channels, A W where A does (token mixing)."""
    weight, bias = on.value(node.args[1]), argument(node, 2, "bias")
    if bias is not None:
        on.constant(on.name_of(bias), node, pairs, on.value(bias))
    return [(input_of(node), _through_matrix(pairs, on.tape, weight))]


def _through_matrix(pairs: Pairs, tape: Tape, weight: Tensor) -> Pairs:
    """Pairs before ``x @ weight.T`` on the last dimension."""
    last = len(pairs.owners) - 1
    if pairs.owners[last] == "A" and weight.shape[0] > 1:
        return replace(pairs, weights=tape.step(lambda a: a @ weight, pairs.weights))
    pairs = settle(pairs, tape, [last], "M")
    return replace(pairs, maps=pairs.maps @ weight)


@adjoint("aten::matmul", "aten::mm")
def multiplies_matrices(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A product with a constant matrix, or an attention pattern with its values."""
    left, right = node.args[:2]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    if right not in on.live:
        matrix = on.value(right)
        if matrix.dim() == 2:
            return [(left, _through_matrix(pairs, on.tape, matrix.t()))]
        return [(left, _through_matrices(node, pairs, on.tape, matrix))]
    if left not in on.live:
        raise NoFastPathError("a constant matrix from the left")
    if len(sizes(node)) != 4 or sizes(left)[:2] != sizes(right)[:2]:
        raise NoFastPathError("a pattern whose heads are folded into the batch, or shared")
    return [(right, through_pattern(node, pairs, on, lambda rows, p: p[:, :, rows], [left]))]


def _through_matrices(node: Node, pairs: Pairs, tape: Tape, stack: Tensor) -> Pairs:
    """Pairs before ``x @ stack``, one matrix for each index of some dimensions, such as a head's output weights.

    M then differs along these dimensions, whoever owns them: where A does, both do.
    """
    dims = len(sizes(node))
    pairs = settle(pairs, tape, [dims - 1], "M")
    stack = aligned(stack, dims)
    differing = [d for d in range(dims - 2) if stack.shape[d] > 1]
    if pairs.batch in differing or sizes(node)[:-1] != sizes(input_of(node))[:-1]:
        raise NoFastPathError("a stack of matrices that differs along the batch, or is broadcast")
    owners = tuple("both" if d in differing and o == "A" else o for d, o in enumerate(pairs.owners))
    maps = pairs.maps @ stack.transpose(-1, -2)
    return replace(pairs, maps=maps, owners=owners)


@adjoint("aten::conv2d")
def convolution(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Each of the k × k taps of the kernel gives a pair: it moves A by one offset and multiplies M by one matrix."""
    source, weight, bias = input_of(node), on.value(node.args[1]), argument(node, 2, "bias")
    if bias is not None:
        on.constant(on.name_of(bias), node, pairs, on.value(bias).reshape(-1, 1, 1))
    stride, padding, dilation = (
        argument(node, 3 + i, name, default) for i, (name, default) in enumerate(_CONV_DEFAULTS)
    )
    groups = argument(node, 6, "groups", 1)
    if pairs.batch != 0:
        raise NoFastPathError("a convolution whose batch is not its first dimension")
    stride, dilation = _twice(stride), _twice(dilation)
    padding = _padding(padding, weight, dilation)
    pairs = settle(settle(pairs, on.tape, [2, 3], "A"), on.tape, [1], "M")
    taps = weight.shape[2] * weight.shape[3]
    check_rank(pairs.rank * taps)
    height, width = sizes(source)[2:]
    matrices = [_grouped(pairs.maps[..., 0, 0], weight[:, :, i, j], groups) for i, j in _taps(weight)]

    def moved(a: Tensor) -> Tensor:
        return torch.cat([_offset(a, i, j, stride, padding, dilation, height, width) for i, j in _taps(weight)])

    plain = taps == 1 and stride == [1, 1] and padding == [0, 0]
    weights = pairs.weights if plain else on.tape.step(moved, pairs.weights)
    return [(source, replace(pairs, weights=weights, maps=torch.cat(matrices)[..., None, None]))]


_CONV_DEFAULTS = (("stride", [1, 1]), ("padding", [0, 0]), ("dilation", [1, 1]))


def _twice(value: Sequence[int]) -> list[int]:
    return list(value) * 2 if len(value) == 1 else list(value)


def _padding(padding: Sequence[int] | str, weight: Tensor, dilation: Sequence[int]) -> list[int]:
    """Rows above and columns to the left; what lies below and to the right shows in the sizes."""
    if padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return [0, 0] if isinstance(padding, str) else _twice(padding)


def _taps(weight: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(weight.shape[2]) for j in range(weight.shape[3])]


def _grouped(maps: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """[r, direction, 1, out] through a matrix [out, in / groups] of each group."""
    by_group = maps.unflatten(-1, (groups, -1))
    return torch.einsum("rdbgo,goi->rdbgi", by_group, matrix.unflatten(0, (groups, -1))).flatten(-2)


def _offset(
    a: Tensor, i: int, j: int, stride: list[int], padding: list[int], dilation: list[int], height: int, width: int
) -> Tensor:
    """A at the input positions that a kernel's tap (i, j) reads."""
    rows, columns = a.shape[-2:]
    # Wide enough for a last row or column that the stride leaves over.
    out = a.new_zeros(
        *a.shape[:-2],
        max(height + 2 * padding[0], i * dilation[0] + rows * stride[0]),
        max(width + 2 * padding[1], j * dilation[1] + columns * stride[1]),
    )
    top, left = i * dilation[0], j * dilation[1]
    out[..., top : top + rows * stride[0] : stride[0], left : left + columns * stride[1] : stride[1]] = a
    return out[..., padding[0] : padding[0] + height, padding[1] : padding[1] + width]
