"""Adjoints of products with constant matrices: linear layers, matrix products and convolutions.

A matrix product of two tensors that depend on the images is an attention pattern with its values.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints.attention import through_pattern
from vitdecomp_lens.frozen.adjoints.moves import with_dim
from vitdecomp_lens.frozen.adjoints.registry import Adjoint, Passed, adjoint, aligned, by_derivative, input_of
from vitdecomp_lens.frozen.pairs import NoFastPathError, Owner, Pairs, Tape, check_bytes, check_rank, reshape, settle
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
        return [(right, _through_matrix_from_the_left(node, pairs, on, on.value(left)))]
    if len(sizes(node)) != 4 or sizes(left)[:2] != sizes(right)[:2]:
        raise NoFastPathError("a pattern whose heads are folded into the batch, or shared")
    return [(right, through_pattern(node, pairs, on, lambda rows, p: p[:, :, rows], [left]))]


def _through_matrix_from_the_left(node: Node, pairs: Pairs, on: Adjoint, matrix: Tensor) -> Pairs:
    """Pairs before ``matrix @ x``: it mixes the last dimension but one."""
    source, count = node.args[1], len(sizes(node))
    assert isinstance(source, Node)
    if matrix.dim() != 2 or len(sizes(source)) != count:
        raise NoFastPathError("a stack of constant matrices, or a vector, from the left")
    return by_derivative(pairs, on.tape, [count - 2], sizes(source), lambda x: matrix @ x)


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


@adjoint("aten::einsum")
def contracts(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A product with one constant: what it mixes goes to one factor, which is contracted with it."""
    factors = list(node.args[1])  # type: ignore[arg-type]
    if len(factors) != 2 or all(n in on.live for n in factors):
        raise NoFastPathError("not the product of one tensor with one constant")
    number = 0 if factors[0] in on.live else 1
    names, after = str(node.args[0]).replace(" ", "").split("->")
    before, constant = names.split(",")[number], names.split(",")[1 - number]
    _check_names(before, constant, after, after[pairs.batch])
    made = [d for d, name in enumerate(after) if name in constant and name not in before]
    shared = [d for d, name in enumerate(after) if name in constant and name in before]
    owner: Literal["A", "M"] = "A" if any(pairs.owners[d] == "A" for d in made) else "M"
    pairs = settle(pairs, on.tape, made if owner == "M" else [*made, *shared], owner)
    matrix = on.value(factors[1 - number])
    nothing = matrix.new_ones([1] * matrix.dim())

    def contracted(value: Tensor, leading: str, weight: Tensor) -> Tensor:
        return torch.einsum(f"{leading}{after},{constant}->{leading}{before}", value, weight)

    in_a, in_m = (matrix, nothing) if owner == "A" else (nothing, matrix)
    owners: dict[str, Owner] = dict(zip(after, pairs.owners, strict=True))
    owners.update({after[d]: "both" for d in shared if owner == "M" and pairs.owners[d] == "A"})
    return [
        (
            factors[number],
            Pairs(
                on.tape.step(lambda a: contracted(a, "Z", in_a), pairs.weights),
                contracted(pairs.maps, "YZ", in_m),
                tuple(owners.get(name, owner) for name in before),
                before.index(after[pairs.batch]),
            ),
        )
    ]


def _check_names(before: str, constant: str, after: str, batch: str) -> None:
    if not (before + constant + after).isalpha() or set("YZ") & set(before + constant + after):
        raise NoFastPathError("dimensions without names of their own")
    if len(set(before)) < len(before) or len(set(constant)) < len(constant):
        raise NoFastPathError("the diagonal of a tensor")
    if set(before) - set(after) - set(constant) or batch in constant:
        raise NoFastPathError("a sum that the constant has no part in, or a constant that differs along the batch")


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
    if _has_one_owner(pairs):
        return [(source, _convolved_as_a_whole(node, pairs, on, weight))]
    stride, dilation = _twice(stride), _twice(dilation)
    padding = _padding(padding, weight, dilation)
    return [(source, _by_taps(pairs, on.tape, weight, stride, padding, dilation, groups, sizes(source)[2:]))]


def _has_one_owner(pairs: Pairs) -> bool:
    """Whether channels and positions have the same owner, or A has the channels: no need then to part them."""
    return pairs.owners[1] == "A" or {"M"} == set(pairs.owners[1:])


def _convolved_as_a_whole(node: Node, pairs: Pairs, on: Adjoint, weight: Tensor) -> Pairs:
    """Pairs before a convolution of all that one factor owns."""
    dims = range(1, len(sizes(node)))

    def run(x: Tensor) -> Tensor:
        return node.target(x, weight, None, *node.args[3:], **{k: v for k, v in node.kwargs.items() if k != "bias"})  # type: ignore[operator]

    return by_derivative(pairs, on.tape, dims, sizes(input_of(node)), run)


def _by_taps(
    pairs: Pairs,
    tape: Tape,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    size: Sequence[int],
) -> Pairs:
    pairs = settle(settle(pairs, tape, [2, 3], "A"), tape, [1], "M")
    taps = weight.shape[2] * weight.shape[3]
    check_rank(pairs.rank * taps)
    check_bytes(pairs.maps.numel() * pairs.maps.element_size() * taps * weight.shape[1] * groups // len(weight), "maps")
    height, width = size
    matrices = [_grouped(pairs.maps[..., 0, 0], weight[:, :, i, j], groups) for i, j in _taps(weight)]

    def moved(a: Tensor) -> Tensor:
        return torch.cat([_offset(a, i, j, stride, padding, dilation, height, width) for i, j in _taps(weight)])

    plain = taps == 1 and stride == [1, 1] and padding == [0, 0]
    weights = pairs.weights if plain else tape.step(moved, pairs.weights)
    return replace(pairs, weights=weights, maps=torch.cat(matrices)[..., None, None])


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


@adjoint("aten::conv1d")
def convolution_of_rows(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A convolution of images one pixel high."""
    source, weight, bias = input_of(node), on.value(node.args[1]), argument(node, 2, "bias")
    if bias is not None:
        on.constant(on.name_of(bias), node, pairs, on.value(bias).reshape(-1, 1))
    if pairs.batch != 0:
        raise NoFastPathError("a convolution whose batch is not its first dimension")
    if _has_one_owner(pairs):
        return [(source, _convolved_as_a_whole(node, pairs, on, weight))]
    (stride,), padding, (dilation,) = (
        argument(node, 3 + i, name, default) for i, (name, default) in enumerate(_CONV1D_DEFAULTS)
    )
    weight, length = weight.unsqueeze(2), sizes(source)[2]
    padding = _padding(padding if isinstance(padding, str) else [0, *padding], weight, [1, dilation])
    pairs = with_dim(pairs, on.tape, 2)
    groups = argument(node, 6, "groups", 1)
    pairs = _by_taps(pairs, on.tape, weight, [1, stride], padding, [1, dilation], groups, [1, length])
    return [(source, reshape(pairs, on.tape, sizes(source), (*sizes(source)[:2], 1, length)))]


_CONV1D_DEFAULTS = (("stride", [1]), ("padding", [0]), ("dilation", [1]))


@adjoint("aten::conv_transpose2d")
def transposed_convolution(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Each tap of the kernel reads A at one offset."""
    source, weight, bias = input_of(node), on.value(node.args[1]), argument(node, 2, "bias")
    if bias is not None:
        on.constant(on.name_of(bias), node, pairs, on.value(bias).reshape(-1, 1, 1))
    if pairs.batch != 0:
        raise NoFastPathError("a convolution whose batch is not its first dimension")
    if _has_one_owner(pairs):
        return [(source, _convolved_as_a_whole(node, pairs, on, weight))]
    pairs = settle(settle(pairs, on.tape, [2, 3], "A"), on.tape, [1], "M")
    check_rank(pairs.rank * weight.shape[2] * weight.shape[3])
    groups = argument(node, 6, "groups", 1)
    stride, padding, dilation = (
        _twice(argument(node, place, name, default))
        for place, name, default in ((3, "stride", [1]), (4, "padding", [0]), (7, "dilation", [1]))
    )
    # As a convolution's weight: a matrix [out, in of a group] each tap, in which out and in change places.
    turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    matrices = [_grouped(pairs.maps[..., 0, 0], turned[:, :, i, j], groups) for i, j in _taps(weight)]
    height, width = sizes(source)[2:]

    def read(a: Tensor) -> Tensor:
        return torch.cat([_read_at(a, i, j, stride, padding, dilation, height, width) for i, j in _taps(weight)])

    weights = on.tape.step(read, pairs.weights)
    return [(source, replace(pairs, weights=weights, maps=torch.cat(matrices)[..., None, None]))]


def _read_at(
    a: Tensor, i: int, j: int, stride: list[int], padding: list[int], dilation: list[int], height: int, width: int
) -> Tensor:
    """A at the output positions to which a tap (i, j) writes from each input position."""
    top, left = i * dilation[0], j * dilation[1]
    rows, columns = top + (height - 1) * stride[0] + 1, left + (width - 1) * stride[1] + 1
    below = max(0, rows - padding[0] - a.shape[-2])
    right = max(0, columns - padding[1] - a.shape[-1])
    a = torch.nn.functional.pad(a, (padding[1], right, padding[0], below))
    return a[..., top : rows : stride[0], left : columns : stride[1]]
