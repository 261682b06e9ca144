"""How a cotangent, as pairs, passes each operation: one registered function an operation.

A function gets the node, the pairs at its output, and the `Adjoint` that is being built. It returns the pairs
at each input through which the operation is affine, and hands over what the operation adds by itself
(biases, shifts) with `Adjoint.constant`. To add an operation::

    @adjoint("my_library::my_scale")
    def my_scale(node, pairs, on):
        return [(node.args[0], on.scaled(node, pairs, on.value(node.args[1])))]
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.errors import CapacityError, InputError
from vitdecomp_lens.frozen.pairs import NoFastPathError, Pairs, Tape, check_rank, reshape, settle
from vitdecomp_lens.frozen.replay import inverse_deviation, inverse_root_mean_square, norm_dims
from vitdecomp_lens.frozen.rules import SPLITS, argument, aten, classify, operation, sizes
from vitdecomp_lens.frozen.walk import module_path

Passed = list[tuple[Node, Pairs]]
Rule = Callable[[Node, Pairs, "Adjoint"], Passed]
ADJOINTS: dict[str, Rule] = {}


@dataclass(frozen=True)
class Shift:
    """Something constant that is added at a node, and the pairs there."""

    name: str
    pairs: Pairs
    value: Tensor


@dataclass
class Adjoint:
    """What the rules share: the tape, the constants, and who depends on the images."""

    tape: Tape
    live: Collection[Node]
    value_of: Callable[[Node], Tensor]
    name_of: Callable[[Node], str]
    shifts: list[Shift] = field(default_factory=list)

    def value(self, item: Any) -> Tensor:
        """A constant operand as a tensor: a node that does not depend on the images, or a number."""
        if isinstance(item, Node) and item in self.live:
            raise NoFastPathError(f"{operation(item)}, which depends on the images, stands where weights are expected")
        value = self.value_of(item) if isinstance(item, Node) else item
        return torch.as_tensor(value, dtype=self.tape.dtype, device=self.tape.device)

    def constant(self, name: str, node: Node, pairs: Pairs, value: Tensor) -> None:
        """Note that ``value``, broadcast from the right, is added at ``node``."""
        value = _aligned(value, len(sizes(node)))
        if value.shape[pairs.batch] > 1:
            raise NoFastPathError("a constant differs along the batch")
        self.shifts.append(Shift(name, pairs, value))

    def scaled(self, node: Node, pairs: Pairs, factor: Tensor) -> Pairs:
        """Pairs before a product with a constant."""
        factor = _aligned(factor, len(sizes(node)))
        if factor.shape[pairs.batch] > 1:
            raise NoFastPathError("a constant factor differs along the batch")
        varying = [d for d, n in enumerate(factor.shape) if n > 1]
        if all(pairs.owners[d] != "A" for d in varying):
            return replace(pairs, maps=pairs.maps * factor)
        pairs = settle(pairs, self.tape, varying, "A")
        return replace(pairs, weights=self.tape.step(lambda a: a * factor, pairs.weights))

    def scaled_live(self, node: Node, pairs: Pairs, factor: Node, *, inverse: bool = False) -> Pairs:
        """Pairs before a product with a frozen factor that differs from image to image."""
        shape = _aligned_shape(sizes(factor), len(sizes(node)))
        pairs = settle(pairs, self.tape, [d for d, n in enumerate(shape) if n > 1], "A")
        static = tuple(-1 if d == pairs.batch else n for d, n in enumerate(shape))

        def read(value: Tensor) -> Tensor:
            value = value.reshape(static)
            return value.reciprocal() if inverse else value

        leaf = self.tape.leaf((factor,), f"factor {inverse} {static}", read, shape)
        return replace(pairs, weights=self.tape.step(torch.mul, pairs.weights, leaf))


def adjoint(*operations: str) -> Callable[[Rule], Rule]:
    """Register a function as the adjoint of one or more operations.

    Raises:
        InputError: If an operation has one already.
    """

    def register(function: Rule) -> Rule:
        for name in operations:
            if name in ADJOINTS:
                raise InputError(f"The operation {name!r} has an adjoint already: {ADJOINTS[name].__name__}.")
            ADJOINTS[name] = function
        return function

    return register


def pass_back(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """The pairs at the inputs of ``node``, from those at its output.

    Raises:
        NoFastPathError: If they cannot pass, naming the operation and the module that it is in.
        CapacityError: If they would become too many, naming the same.
    """
    found = ADJOINTS.get(operation(node))
    try:
        if found is None:
            raise NoFastPathError("it has no adjoint")
        return found(node, pairs, on)
    except (NoFastPathError, CapacityError) as error:
        raise type(error)(f"{operation(node)} in {module_path(node) or 'the model itself'}: {error}") from error


def _aligned_shape(shape: tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (1,) * (dims - len(shape)) + tuple(shape)


def _aligned(value: Tensor, dims: int) -> Tensor:
    return value.reshape(_aligned_shape(tuple(value.shape), dims))


def _input(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


# --- moving entries -----------------------------------------------------------------------------------------


@adjoint(
    *aten("alias contiguous clone dropout feature_dropout to _to_copy detach type_as"),
    "aten::lift_fresh_copy",
    "vitdecomp_lens::tag",
)
def nothing(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """The identity."""
    return [(_input(node), pairs)]


@adjoint(*aten("view _unsafe_view reshape flatten unflatten squeeze unsqueeze view_as reshape_as"))
def reshapes(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Dimension groups are matched; see `reshape`."""
    source = _input(node)
    return [(source, reshape(pairs, on.tape, sizes(source), sizes(node)))]


@adjoint("aten::permute", "aten::transpose", "aten::swapaxes", "aten::t", "aten::numpy_T", "aten::mT", "aten::movedim")
def permutes(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Both factors are permuted back; the order is found by permuting the numbers of the dimensions."""
    source, dims = _input(node), len(sizes(node))
    # The dimensions' numbers as lengths of a tensor without memory: whatever the operation, it tells its order.
    probe = torch.empty(0, device="meta").new_empty(tuple(range(2, dims + 2)))
    moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    order = [n - 2 for n in moved.shape]
    back = [order.index(d) for d in range(dims)]
    weights = on.tape.step(lambda a: a.permute(0, *(1 + d for d in back)), pairs.weights)
    maps = pairs.maps.permute(0, 1, *(2 + d for d in back))
    return [(source, Pairs(weights, maps, tuple(pairs.owners[d] for d in back), order[pairs.batch]))]


@adjoint("aten::expand", "aten::expand_as")
def expands(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """What was copied is summed."""
    return [(_input(node), _before_copies(node, _input(node), pairs, on))]


def _before_copies(node: Node, source: Node, pairs: Pairs, on: Adjoint) -> Pairs:
    """Pairs before ``source`` is broadcast to the shape of ``node``."""
    inner, outer = _aligned_shape(sizes(source), len(sizes(node))), sizes(node)
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
    return [(_input(node), replace(pairs, weights=weights, maps=maps))]


@adjoint("aten::flip")
def flips(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Its own inverse."""
    dims = [d % len(sizes(node)) for d in argument(node, 1, "dims")]
    in_a, in_m = ([d for d in dims if pairs.owners[d] != other] for other in ("M", "A"))
    weights = on.tape.step(lambda a: a.flip([1 + d for d in in_a]), pairs.weights) if in_a else pairs.weights
    maps = pairs.maps.flip([2 + d for d in in_m]) if in_m else pairs.maps
    return [(_input(node), replace(pairs, weights=weights, maps=maps))]


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


def _with_dim(pairs: Pairs, tape: Tape, dim: int, owner: Literal["A", "M"] = "A") -> Pairs:
    """Pairs with a dimension of length one put in at ``dim``."""
    return Pairs(
        tape.step(lambda a: a.unsqueeze(1 + dim), pairs.weights),
        pairs.maps.unsqueeze(2 + dim),
        (*pairs.owners[:dim], owner, *pairs.owners[dim:]),
        pairs.batch + (dim <= pairs.batch),
    )


@adjoint("aten::select")
def selects(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """One entry of a dimension: zero elsewhere."""
    source = _input(node)
    dim = argument(node, 1, "dim") % len(sizes(source))
    size = sizes(source)[dim]
    index = argument(node, 2, "index") % size
    # What lies before the batch, or before heads, is a group of channels (query, key or value); what lies last, a
    # channel; else it is a token.
    before_heads = dim < len(pairs.owners) and pairs.owners[dim] == "both"
    last = dim == len(sizes(source)) - 1
    owner: Literal["A", "M"] = "M" if dim <= pairs.batch or before_heads or last else "A"
    return [(source, _cut_out(_with_dim(pairs, on.tape, dim, owner), on.tape, dim, slice(index, index + 1), size))]


@adjoint("aten::slice", "aten::narrow")
def slices(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Some entries of a dimension: zero elsewhere."""
    source = _input(node)
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
    if operation(several) not in SPLITS:
        raise NoFastPathError(f"{operation(several)} has no adjoint")
    source, outputs = _input(several), several.meta["val"]
    place = 1 if operation(several) == "aten::unbind" else 2
    dim = argument(several, place, "dim", 0) % len(sizes(source))
    if operation(several) == "aten::unbind":
        pairs, first, count = _with_dim(pairs, on.tape, dim, "M"), number, 1
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
    source, amounts = _input(node), list(node.args[1])  # type: ignore[arg-type]
    if any(amounts) and argument(node, 2, "mode", "constant") not in ("constant", 0, 0.0):
        raise NoFastPathError("a padding that repeats entries")
    if any(amounts) and argument(node, 3, "value"):
        raise NoFastPathError("a padding other than zero")
    dims = len(sizes(node))
    for place in range(len(amounts) // 2):
        dim, before = dims - 1 - place, amounts[2 * place]
        size = sizes(source)[dim]
        if before < 0 or amounts[2 * place + 1] < 0:
            raise NoFastPathError("a negative padding")
        if sizes(node)[dim] != size:
            pairs = _narrowed(pairs, on.tape, dim, before, size)
    return [(source, pairs)]


# --- sums and averages ----------------------------------------------------------------------------------------


@adjoint("aten::add", "aten::sub", "aten::rsub")
def adds(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A sum passes to both sides; what does not depend on the images is a constant."""
    name, passed = operation(node), []
    alpha = argument(node, 2, "alpha", 1)
    signs = {"aten::add": (1, alpha), "aten::sub": (1, -alpha), "aten::rsub": (-alpha, 1)}[name]
    for part, sign in zip(node.args[:2], signs, strict=True):
        if isinstance(part, Node) and part in on.live:
            mine = pairs if sign == 1 else replace(pairs, maps=pairs.maps * sign)
            passed.append((part, mine if sizes(part) == sizes(node) else _before_copies(node, part, mine, on)))
        else:
            label = on.name_of(part) if isinstance(part, Node) else f"{module_path(node)}.shift"
            on.constant(label, node, pairs, on.value(part) * sign)
    return passed


@adjoint("aten::neg")
def negates(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """-1 goes to M."""
    return [(_input(node), replace(pairs, maps=-pairs.maps))]


@adjoint("aten::mean", "aten::sum")
def averages(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """The same weight for every entry of the dimensions that were averaged.

    M owns them if they are the last one, channels as a norm averages them; else A does.
    """
    source, mean = _input(node), operation(node) == "aten::mean"
    shape, count = sizes(source), len(sizes(source))
    dims = sorted(d % count for d in (argument(node, 1, "dim") or range(count)))
    over_channels = dims == [count - 1] and pairs.batch != count - 1
    if not argument(node, 2, "keepdim", False):
        for dim in dims:
            pairs = _with_dim(pairs, on.tape, dim, "M" if over_channels else "A")
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
    source = _input(node)
    if tuple(sizes(node)[-2:]) != (1, 1):
        raise NoFastPathError("adaptive pooling to more than one position")
    dims = [len(sizes(source)) - 2, len(sizes(source)) - 1]
    return [(source, _spread_evenly(pairs, on.tape, dims, sizes(source), mean=True))]


@adjoint("aten::avg_pool2d")
def pools(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Acts on A, position by position, by torch's own derivative."""
    source = _input(node)
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


# --- products with weights --------------------------------------------------------------------------------------


@adjoint("aten::linear")
def linear(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """M W where M owns the channels, A W where A does (token mixing)."""
    weight, bias = on.value(node.args[1]), argument(node, 2, "bias")
    if bias is not None:
        on.constant(on.name_of(bias), node, pairs, on.value(bias))
    return [(_input(node), _through_matrix(pairs, on.tape, weight))]


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
    return [(right, _through_pattern(node, pairs, on, lambda rows, p: p[:, :, rows], [left]))]


def _through_matrices(node: Node, pairs: Pairs, tape: Tape, stack: Tensor) -> Pairs:
    """Pairs before ``x @ stack``, one matrix for each index of some dimensions, such as a head's output weights.

    M then differs along these dimensions, whoever owns them: where A does, both do.
    """
    dims = len(sizes(node))
    pairs = settle(pairs, tape, [dims - 1], "M")
    stack = _aligned(stack, dims)
    differing = [d for d in range(dims - 2) if stack.shape[d] > 1]
    if pairs.batch in differing or sizes(node)[:-1] != sizes(_input(node))[:-1]:
        raise NoFastPathError("a stack of matrices that differs along the batch, or is broadcast")
    owners = tuple("both" if d in differing and o == "A" else o for d, o in enumerate(pairs.owners))
    maps = pairs.maps @ stack.transpose(-1, -2)
    return replace(pairs, maps=maps, owners=owners)


@adjoint("aten::scaled_dot_product_attention")
def attention(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """The pattern's rows, weighted by A: only for the queries that A reads."""
    query, key, value = node.args[:3]
    mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
    scale: Any = node.kwargs.get("scale")
    scale = sizes(query)[-1] ** -0.5 if scale is None else scale  # type: ignore[arg-type]
    if len(sizes(node)) != 4 or causal or node.kwargs.get("enable_gqa", False):
        raise NoFastPathError("causal, grouped-query or three-dimensional attention")
    operands = [query, key] if mask is None else [query, key, mask]

    def rows_of(rows: slice, q: Tensor, k: Tensor, m: Tensor | None = None) -> Tensor:
        scores = (q[:, :, rows] * scale) @ k.transpose(-1, -2)
        if m is not None:
            m = _repeated(m, scores)
            m = m[..., rows, :] if m.shape[-2] > 1 else m
            scores = scores.masked_fill(m == 0, -torch.inf) if boolean else scores + m
        return scores.softmax(-1)

    boolean = mask is not None and mask.meta["val"].dtype == torch.bool
    return [(value, _through_pattern(node, pairs, on, rows_of, operands))]  # type: ignore[list-item, arg-type]


def _repeated(constant: Tensor, like: Tensor) -> Tensor:
    """A constant that was made for one image, where windows are folded behind the batch: the same for each."""
    windows = constant.shape[0]
    return constant if windows in (1, like.shape[0]) else constant.repeat(like.shape[0] // windows, 1, 1, 1)


MOST_ROWS_BYTES = 16 << 20  # the pattern is rebuilt in pieces of at most this size


def _through_pattern(
    node: Node, pairs: Pairs, on: Adjoint, rows_of: Callable[..., Tensor], operands: Sequence[Node]
) -> Pairs:
    """Pairs at the values [batch, head, key, d_head]: A[r, b, h, k] = Σ_q A[r, b, h, q] pattern[b, h, q, k]."""
    pairs = settle(settle(pairs, on.tape, [2], "A"), on.tape, [3], "M")
    if pairs.batch != 0:
        raise NoFastPathError("attention whose batch is not its first dimension")
    read = _read_rows(on.tape.examples[pairs.weights])
    batch, heads, _, d_head = sizes(node)
    keys = sizes(node.args[2] if len(node.args) > 2 else node.args[1])[2]  # type: ignore[arg-type]
    rows = read.stop - read.start
    if few := rows < d_head:  # then the pattern's rows are less to keep than queries and keys
        slots = [_leaf_of_rows(on, operands, rows_of, read, (batch, heads, rows, keys))]
    else:
        slots = [_leaf_or_constant(on, operand) for operand in operands]

    def mixed(a: Tensor, *values: Tensor) -> Tensor:
        weights = a[:, :, :, read, 0].unsqueeze(3)  # [r, batch, head or 1, 1, query]
        step = max(1, MOST_ROWS_BYTES // (a.element_size() * weights.shape[1] * rows * keys))
        pieces = []
        for first in range(0, heads, step):
            part = slice(first, min(first + step, heads))
            mine = [v[:, part] if v.dim() == 4 and v.shape[1] == heads else v for v in values]
            some = weights if weights.shape[2] == 1 else weights[:, :, part]
            pieces.append((some @ (mine[0] if few else rows_of(read, *mine))).squeeze(3))
        return torch.cat(pieces, dim=2).unsqueeze(-1)

    weights = on.tape.step(mixed, pairs.weights, *slots)
    owners = (pairs.owners[0], "both" if pairs.owners[1] != "A" else "A", "A", "M")
    return replace(pairs, weights=weights, owners=owners)  # type: ignore[arg-type]


def _leaf_or_constant(on: Adjoint, operand: Node) -> int:
    if operand in on.live:
        return on.tape.leaf((operand,), "operand", lambda v: v, sizes(operand))
    value = _aligned(on.value(operand), 4)
    return on.tape.step(lambda: value)


def _leaf_of_rows(
    on: Adjoint, operands: Sequence[Node], rows_of: Callable[..., Tensor], read: slice, shape: Sequence[int]
) -> int:
    constants = [None if n in on.live else _aligned(on.value(n), 4) for n in operands]

    def rows(*values: Tensor) -> Tensor:
        several = iter(values)
        return rows_of(read, *(next(several) if constant is None else constant for constant in constants))

    return on.tape.leaf(tuple(n for n in operands if n in on.live), f"rows {read}", rows, shape)


def _read_rows(a: Tensor) -> slice:
    """The queries that A, ``[r, batch, head, query, 1]``, reads: from the first to the last."""
    read = a.flatten(0, 2)[..., 0].ne(0).any(0).nonzero()[:, 0]
    return slice(int(read[0]), int(read[-1]) + 1) if len(read) else slice(0, 0)


@adjoint("aten::conv2d")
def convolution(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """Each of the k × k taps of the kernel gives a pair: it moves A by one offset and multiplies M by one matrix."""
    source, weight, bias = _input(node), on.value(node.args[1]), argument(node, 2, "bias")
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


# --- normalisers and frozen factors -----------------------------------------------------------------------------


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
        factor = _input(factor)  # a copied statistic would seem to differ along the channels
    return [(kept, on.scaled_live(node, pairs, factor, inverse=divides))]


def _norm_statistic(node: Node, pairs: Pairs, on: Adjoint, inverse: Callable[[Tensor], Tensor]) -> Pairs:
    shape = list(sizes(_input(node)))
    for dim in norm_dims(node):
        shape[dim] = 1
    leaf = on.tape.leaf((_input(node),), f"statistic of {node.name}", inverse, shape)
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
    maps = maps - maps.mean(dims, keepdim=True)
    return [
        (_input(node), _norm_statistic(node, replace(pairs, maps=maps), on, lambda x: inverse_deviation(x, dims, eps)))
    ]


@adjoint("aten::rms_norm")
def rms_norm(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """A × 1/RMS; M × γ."""
    eps, weight, dims = argument(node, 3, "eps"), argument(node, 2, "weight"), norm_dims(node)
    pairs = _norm_owners(node, pairs, on)
    maps = pairs.maps if weight is None else pairs.maps * on.value(weight)
    pairs = replace(pairs, maps=maps)
    return [(_input(node), _norm_statistic(node, pairs, on, lambda x: inverse_root_mean_square(x, dims, eps)))]


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
    return [(_input(node), on.scaled(node, pairs, scale.reshape(per_channel)))]


assert not SPLITS & ADJOINTS.keys(), "walks pass a split by way of getitem"
