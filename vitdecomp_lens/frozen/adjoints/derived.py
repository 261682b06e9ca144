"""Adjoints of what mixes some dimensions alone, by torch's own derivative: pooling, interpolation, picking, repeating.

Whatever owns these dimensions is taken through the derivative as if it were the value itself; see `by_derivative`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints.moves import permuted_back
from vitdecomp_lens.frozen.adjoints.registry import Adjoint, Passed, adjoint, by_derivative, hand_over, input_of
from vitdecomp_lens.frozen.pairs import NoFastPathError, Pairs, Tape, reshape
from vitdecomp_lens.frozen.rules import argument, aten, operation, sizes


def _derived(node: Node, pairs: Pairs, on: Adjoint, dims: Sequence[int]) -> Passed:
    """Pairs before an operation that mixes ``dims`` and whose other arguments are numbers."""
    if len(node.all_input_nodes) > 1:
        raise NoFastPathError("its settings are computed")
    source, count = input_of(node), len(sizes(node))

    def run(x: Tensor) -> Tensor:
        return node.target(x, *node.args[1:], **node.kwargs)  # type: ignore[operator]

    return [(source, by_derivative(pairs, on.tape, [d % count for d in dims], sizes(source), run))]


@adjoint(
    *aten("avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d"),
    *aten("upsample_bilinear2d upsample_bicubic2d upsample_nearest2d"),
)
def resizes_images(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Pooling and interpolation of rows and columns."""
    return _derived(node, pairs, on, [-2, -1])


@adjoint("aten::avg_pool1d", "aten::adaptive_avg_pool1d")
def resizes_rows(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Pooling of the last dimension."""
    return _derived(node, pairs, on, [-1])


@adjoint("aten::cumsum")
def accumulates(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Sums of all that come before."""
    return _derived(node, pairs, on, [argument(node, 1, "dim")])


@adjoint("aten::repeat")
def repeats(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """What was copied is summed."""
    times = argument(node, 1, "repeats")
    if len(times) != len(sizes(input_of(node))):
        raise NoFastPathError("copies along a new dimension")
    return _derived(node, pairs, on, [d for d, n in enumerate(times) if n != 1])


@adjoint("aten::repeat_interleave")
def repeats_entries(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """What was copied is summed."""
    dim = argument(node, 2, "dim")
    if dim is None:
        raise NoFastPathError("copies of the flattened tensor")
    return _derived(node, pairs, on, [dim])


@adjoint("aten::index_select", "aten::index")
def picks(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Entries go back to their constant places."""
    source = input_of(node)
    shape = sizes(source)
    if operation(node) == "aten::index_select":
        places: list[Tensor | None] = [None] * len(shape)
        places[argument(node, 1, "dim")] = on.value_of(argument(node, 2, "index"))
    else:
        places = [None if n is None else on.value_of(n) for n in argument(node, 1, "indices")]
    dims = [d for d, n in enumerate(places) if n is not None]
    if len(sizes(node)) != len(shape) or len(dims) != 1:
        raise NoFastPathError("places in several dimensions")

    def run(x: Tensor) -> Tensor:
        return torch.ops.aten.index.Tensor(x, places)

    return [(source, by_derivative(pairs, on.tape, dims, shape, run))]


# --- pieces of images -----------------------------------------------------------------------------------------


@adjoint("aten::im2col")
def takes_pieces(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Channels times k × k entries of a piece: a pair for each of the k × k, as for a convolution."""
    source, settings = input_of(node), node.args[1:]
    batch, channels, *_ = sizes(source)
    apart = (batch, channels, sizes(node)[1] // channels, sizes(node)[2])

    def run(x: Tensor) -> Tensor:
        taken = torch.ops.aten.im2col.default(x.flatten(0, 1).unsqueeze(1), *settings)
        return taken.unflatten(0, x.shape[:2])

    pairs = reshape(pairs, on.tape, apart, sizes(node))
    return [(source, by_derivative(pairs, on.tape, [2, 3], sizes(source), run))]


@adjoint("aten::col2im")
def puts_pieces_together(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """The sum of overlapping pieces: a pair for each of the k × k entries of a piece."""
    source, settings = input_of(node), node.args[1:]
    batch, channels, *_ = sizes(node)
    apart = (batch, channels, sizes(source)[1] // channels, sizes(source)[2])

    def run(x: Tensor) -> Tensor:
        put = torch.ops.aten.col2im.default(x.flatten(0, 1), *settings)
        return put.reshape(*x.shape[:2], *put.shape[2:])

    pairs = by_derivative(pairs, on.tape, [2, 3], apart, run)
    return [(source, _folded(pairs, on.tape, sizes(source), apart, [2]))]


def _folded(pairs: Pairs, tape: Tape, inner: tuple[int, ...], outer: tuple[int, ...], few: Sequence[int]) -> Pairs:
    """Pairs before a reshape in which a ``few`` of A's entries come out of many channels: less to part than these."""
    channels = few[0] - 1
    return reshape(hand_over(pairs, tape, few) if pairs.owners[channels] == "M" else pairs, tape, inner, outer)


@adjoint("aten::pixel_shuffle")
def shuffles_pixels(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Groups of f × f channels become squares of pixels."""
    source, (batch, channels, height, width) = input_of(node), sizes(node)
    factor: int = node.args[1]  # type: ignore[assignment]
    rows, columns = height // factor, width // factor
    pairs = reshape(pairs, on.tape, (batch, channels, rows, factor, columns, factor), sizes(node))
    pairs = permuted_back(pairs, on.tape, [0, 1, 4, 2, 5, 3])
    return [(source, _folded(pairs, on.tape, sizes(source), (batch, channels, factor, factor, rows, columns), [2, 3]))]


@adjoint("aten::pixel_unshuffle")
def unshuffles_pixels(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Squares of f × f pixels become channels."""
    source, (batch, channels, height, width) = input_of(node), sizes(input_of(node))
    factor: int = node.args[1]  # type: ignore[assignment]
    rows, columns = height // factor, width // factor
    pairs = reshape(pairs, on.tape, (batch, channels, factor, factor, rows, columns), sizes(node))
    pairs = permuted_back(pairs, on.tape, [0, 1, 3, 5, 2, 4])
    return [(source, reshape(pairs, on.tape, sizes(source), (batch, channels, rows, factor, columns, factor)))]
