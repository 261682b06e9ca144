"""Which place of the image every entry of a traced value stands for, whatever the model did with it on the way.

The graph is run once for rows and once for columns, on *coordinates* in place of values: fractions of the image's
height and width, from pixel centres on. Entries that stand for no place (class tokens, registers, learned queries,
zeros of a padding) have NaN, which means leave out.

=================================  ========================================================================
operation                          the coordinates of what it gives
=================================  ========================================================================
moves, splits and joins entries    its own effect on coordinates; what no image changes is NaN, so is padding
averages or picks along axes       the mean
convolution, pooling               the centre of the window, where that is no padding; else the window's mean
product with weights               the mean over what is summed
attention, products of matrices    by row, those of the left factor; by column where only the right one varies
anything else                      those of the operands that have the shape of the result
=================================  ========================================================================

To add an operation, register a function that gets its node and what turns arguments into coordinates::

    @coordinates("my_library::my_shuffle")
    def my_shuffle(node, at):
        return my_shuffle_of_anything(at(node.args[0]))
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional

from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.frozen.graph import FrozenGraph
from vitdecomp_lens.frozen.rules import argument, aten, operation
from vitdecomp_lens.frozen.trace import EXAMPLES

Coordinates = Callable[[Node, Callable[[Any], Any]], Any]
COORDINATES: dict[str, Coordinates] = {}
SAME = 1e-6  # coordinates that differ by less are the same place: no image has a million rows
LARGE = 1 << 16  # bytes
PIXELS = 1e-2  # the same in pixels


def coordinates(*operations: str) -> Callable[[Coordinates], Coordinates]:
    """Register a function as what operations do to coordinates."""

    def register(function: Coordinates) -> Coordinates:
        COORDINATES.update(dict.fromkeys(operations, function))
        return function

    return register


# --- what is asked ------------------------------------------------------------------------------------------


def places(graph: FrozenGraph, nodes: Iterable[Node]) -> dict[Node, Float[Tensor, "2 *shape"]]:
    """The place of every entry of some values, for one image.

    Args:
        graph: A traced module.
        nodes: Operations of it that give one tensor each.

    Returns:
        For each the row and the column, as fractions of the image's height and width, of what its entries stand for;
        NaN where they stand for no place. Expanded tensors: do not write to them.
    """
    wanted = dict.fromkeys(nodes)
    rows, columns = (_Run(graph, axis).of(wanted) for axis in (2, 3))
    return {node: _stacked(rows[node], columns[node]) for node in wanted}


def token_places(placed: Float[Tensor, "2 *shape"], token_axes: Sequence[int]) -> Float[Tensor, "token 2"]:
    """The places of a value's tokens: the means over what is no token.

    Args:
        placed: What `places` gives for the value.
        token_axes: The axes of the value that run over tokens. Windows that are folded into the batch (axis 0) come
            before them.
    """
    axes = [axis % (placed.dim() - 1) + 1 for axis in token_axes]
    axes = axes if 1 in axes else [1, *axes]
    others = [axis for axis in range(1, placed.dim()) if axis not in axes]
    return _mean(placed.permute(0, *axes, *others), range(len(axes) + 1, placed.dim())).flatten(1).T


def varying_axes(placed: Float[Tensor, "2 *shape"]) -> tuple[int, ...]:
    """The axes of a value along which places differ."""
    least, largest = placed.nan_to_num(torch.inf), placed.nan_to_num(-torch.inf)
    axes = range(1, placed.dim() - 1)
    return tuple(d for d in axes if bool((largest.amax(d + 1) - least.amin(d + 1) > SAME).any()))


def lattice(found: Float[Tensor, "token 2"], image_size: tuple[int, int]) -> tuple[TokenGrid, tuple[int, ...]] | None:
    """The rows and columns in which tokens stand in the image.

    Args:
        found: The tokens' places.
        image_size: Height and width of the image in pixels.

    Returns:
        The grid, its prefix being the tokens without a place; and for each token of the grid, which one of those given
        it is. None where tokens share a place, leave one free, or do not stand at equal distances. Where no token
        has a place, the grid has no rows and columns.
    """
    placed = found.isfinite().all(1)
    pixels = found[placed].double() * torch.tensor(image_size, dtype=torch.float64)
    down, across = (_lines(pixels[:, axis], image_size[axis]) for axis in (0, 1))
    if down is None or across is None:
        return None
    (row, rows, height), (column, columns, width) = down, across
    cell = row * columns + column
    if not torch.equal(cell.sort()[0], torch.arange(rows * columns)):
        return None
    prefix = (~placed).nonzero().flatten()
    order = torch.cat([prefix, placed.nonzero().flatten()[cell.argsort()]])
    area, names = (height, width), tuple(f"token{number}" for number in range(len(prefix)))
    grid = TokenGrid(rows, columns, area, names, None if area == image_size else image_size)
    return grid, tuple(order.tolist())


def _lines(pixels: Tensor, length: int) -> tuple[Tensor, int, int] | None:
    """Along one axis, on which line each token stands; how many lines, and how many pixels they tile."""
    if not len(pixels):
        return pixels.long(), 0, length
    ordered, order = pixels.sort()
    new = ordered.diff(prepend=ordered[:1] - 1) > PIXELS
    number = torch.empty_like(order)
    number[order] = new.cumsum(0) - 1
    lines = ordered[new]
    count, gaps = len(lines), lines.diff()
    # A line at the edge may be thinner than the others: of what it merged, part was padding.
    pitch = float(gaps.max()) if count > 1 else float(length)
    irregular = (gaps[1:-1] < pitch - PIXELS).any() or (gaps < pitch / 2 - PIXELS).any()
    # Where patches overlap and nothing is padded, there is as much of a margin on both sides: they divide all of it.
    centred = bool((lines.mean() - length / 2).abs() < PIXELS)
    area = length if centred else round(count * pitch)
    middles = torch.arange(0.5, count, dtype=torch.float64) * area / count
    outside = ((lines - middles).abs() > area / count / 2 + PIXELS).any()
    return None if irregular or outside else (number, count, area)


# --- the run ------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One run of a graph on the coordinates along one axis of the images."""

    graph: FrozenGraph
    axis: int
    values: dict[Node, Any] = field(default_factory=dict)

    def of(self, wanted: Collection[Node]) -> dict[Node, Tensor]:
        """The coordinates of these values; the rest is freed on the way."""
        order = self._behind(wanted)
        last = {n: node for node in order for n in node.all_input_nodes}
        for node in order:
            self.values[node] = self._pixels() if node is self.graph.images else self._placed(node)
            for n in node.all_input_nodes:
                if last[n] is node and n not in wanted:
                    self.values.pop(n, None)
        return {n: self.values[n] if n in self.values else _nowhere(_shape(n.meta["val"])) for n in wanted}

    def _behind(self, wanted: Collection[Node]) -> list[Node]:
        needed, ahead = set(), list(wanted)
        while ahead:
            node = ahead.pop()
            if node in self.graph.from_images and node not in needed:
                needed.add(node)
                ahead += node.all_input_nodes
        return [node for node in self.graph.nodes if node in needed]

    def _pixels(self) -> Tensor:
        shape = _shape(self.graph.images.meta["val"])
        centres = (torch.arange(shape[self.axis], dtype=torch.float64) + 0.5) / shape[self.axis]
        return (centres[:, None] if self.axis == 2 else centres).expand(shape)

    def _placed(self, node: Node) -> Any:
        val = node.meta.get("val")
        several = isinstance(val, list | tuple)
        shapes = [_shape(v) for v in (val if several else [val])]  # type: ignore[union-attr]
        try:
            made = COORDINATES[operation(node)](node, self.at)
        except Exception:  # no rule, or a form of the operation that it is not for: a request must not fail by this
            made = None
        parts = list(made) if isinstance(made, list | tuple) else [made] * len(shapes)
        found = [
            _thinned(part if isinstance(part, Tensor) and part.shape == shape else self._of_the_operands(node, shape))
            for part, shape in zip(parts, shapes, strict=True)
        ]
        return found if several else found[0]

    def _of_the_operands(self, node: Node, shape: tuple[int, ...]) -> Tensor:
        operands = [self.values[n] for n in node.all_input_nodes if isinstance(self.values.get(n), Tensor)]
        found = [aligned for x in operands if (aligned := _aligned(x, shape)) is not None]
        return reduce(_agreed, found) if found else _nowhere(shape)

    def at(self, item: Any) -> Any:
        """Arguments of an operation, with coordinates in place of values; what no image changes has none."""
        return map_arg(item, self._argument)

    def _argument(self, node: Node) -> Any:
        if node in self.values:
            return self.values[node]
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            return _at_one_image(val)
        if val.is_floating_point() or val.is_complex():
            return _nowhere(_shape(val))
        images = self.graph.images.meta["val"]  # indices and masks are needed as they are
        stand_in = torch.zeros((), dtype=images.dtype, device=images.device).expand(_shape(images))
        return self.graph.evaluate([node], {self.graph.images: stand_in})[node].cpu()


def _at_one_image(size: Any) -> Any:
    """A size for a batch of one: those that are not fixed are multiples of the batch's."""
    return int(size) // EXAMPLES if isinstance(size, torch.SymInt) else size


def _shape(val: Any) -> tuple[int, ...]:
    """The shape of a traced value for one image; of several, of the first."""
    val = val[0] if isinstance(val, list | tuple) else val
    return tuple(map(_at_one_image, val.shape)) if isinstance(val, Tensor) else ()


def _nowhere(shape: Sequence[int]) -> Tensor:
    return torch.full((), math.nan, dtype=torch.float64).expand(*shape)


def _named(node: Node) -> dict[str, Any]:
    """All arguments of an operation by name."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return {a.name: argument(node, place, a.name, a.default_value) for place, a in enumerate(schema)}


# --- coordinates --------------------------------------------------------------------------------------------
# What is the same along a dimension is expanded along it (stride 0), so that coordinates stay far smaller than values.


def _once(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape, of which dimensions along which they are all expanded are taken once."""
    for dim in range(tensors[0].dim()):
        if all(t.stride(dim) == 0 for t in tensors) and tensors[0].shape[dim]:
            tensors = tuple(t.narrow(dim, 0, 1) for t in tensors)
    return list(tensors)


def _thinned(x: Tensor) -> Tensor:
    """The same, kept once along dimensions along which it is the same: many operations write out what was expanded."""
    if x.untyped_storage().nbytes() < LARGE:
        return x
    thin = _once(x)[0]
    for dim in range(x.dim()):
        first = thin.narrow(dim, 0, 1)
        if ((thin == first) | (thin.isnan() & first.isnan())).all():
            thin = first
    return x if thin.numel() == x.numel() else thin.clone().expand(x.shape)


def _stacked(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.stack(_once(rows, columns)).expand(2, *rows.shape)


def _mean(x: Tensor, dims: int | Iterable[int], *, keep: bool = False) -> Tensor:
    """The mean of what has coordinates."""
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    for dim in dims:
        x = x.narrow(dim, 0, 1) if x.stride(dim) == 0 else x
    x = x.nanmean(dims, keepdim=True) if any(x.shape[d] != 1 for d in dims) else x
    return x if keep else x.squeeze(dims)


def _varies(x: Tensor, dim: int) -> Tensor:
    """Whether coordinates differ along a dimension, which is kept."""
    x = x.narrow(dim, 0, 1) if x.stride(dim) == 0 else x
    largest, least = x.nan_to_num(-math.inf).amax(dim, keepdim=True), x.nan_to_num(math.inf).amin(dim, keepdim=True)
    return largest - least > SAME


def _agreed(one: Tensor, other: Tensor) -> Tensor:
    """What two operands of one shape say: the one that tells more places apart, as a gate by channel tells none."""
    both = _once(one, other)
    told, by_other = (torch.unique((x[x.isfinite()] / SAME).round()).numel() for x in both)
    if told != by_other:
        return one if told > by_other else other
    return torch.stack(both).nanmean(0).expand(one.shape)


def _aligned(x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The coordinates of an operand for a result: broadcast, or by all dimensions but the last of either."""
    if all(mine in (1, size) for mine, size in zip(x.shape[::-1], shape[::-1], strict=False)) and x.dim() <= len(shape):
        return x.expand(shape)
    shared = next((n for n in (len(shape), len(shape) - 1) if n > 0 and x.shape[:n] == shape[:n]), 0)
    if not shared:
        return None
    x = _mean(x, range(shared, x.dim()))
    return (x if shared == len(shape) else x.unsqueeze(-1)).expand(shape)


# --- operations that move or average entries ------------------------------------------------------------------


@coordinates(
    "getitem",
    *aten(
        "permute transpose t numpy_T mT movedim swapaxes repeat tile repeat_interleave slice select narrow roll flip"
        " rot90 unfold pixel_shuffle pixel_unshuffle channel_shuffle cat concat stack split split_with_sizes chunk"
        " unbind tensor_split index index_select gather upsample_nearest1d upsample_nearest2d"
    ),
)
def moves(node: Node, at: Callable[[Any], Any]) -> Any:
    """The operation itself."""
    args, kwargs = at((node.args, node.kwargs))
    return node.target(*args, **kwargs)  # type: ignore[operator]


@coordinates(*aten("view _unsafe_view reshape flatten unflatten squeeze unsqueeze view_as reshape_as"))
def reshapes(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """A reshape: coordinates may lie otherwise in memory than values."""
    return at(node.args[0]).reshape(_shape(node.meta["val"]))


@coordinates(*aten("expand expand_as to _to_copy type_as"))
def first(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """The first argument's; another one only lends its shape or its dtype."""
    return at(node.args[0]).expand(_shape(node.meta["val"]))


@coordinates("aten::pad", "aten::constant_pad_nd")
def pads(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """Zeros stand for no place; what is mirrored or repeated stands for its own."""
    mode = _named(node).get("mode", "constant")
    x, widths = at(node.args[:2])
    return functional.pad(x, list(widths), mode, math.nan if mode == "constant" else None)


@coordinates("aten::im2col")
def unfolds(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """Windows side by side, around which is padding."""
    x, kernel, dilation, (down, across), stride = at(node.args)
    return functional.unfold(
        functional.pad(x, (across, across, down, down), value=math.nan), kernel, dilation, 0, stride
    )


@coordinates(*aten("adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d col2im"))
def averages(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """The weighted mean of what has coordinates."""
    x, *settings = at(node.args)
    total, weight = (node.target(part, *settings) for part in (x.nan_to_num(0), x.isfinite().to(x)))  # type: ignore[operator]
    return total / weight


@coordinates("aten::adaptive_max_pool2d")
def pools_to_a_size(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """The mean of each region, as for an average."""
    x = at(node.args[0])
    rows, columns = _shape(node.meta["val"])[-2:]
    total, weight = (
        functional.adaptive_avg_pool2d(part, (rows, columns)) for part in (x.nan_to_num(0), x.isfinite().to(x))
    )
    return total / weight


@coordinates(*aten("mean sum amax amin max min logsumexp linalg_vector_norm norm var std prod argmax argmin"))
def reduces(node: Node, at: Callable[[Any], Any]) -> Tensor | None:
    """The mean over the dimensions that go, whatever is made of the values."""
    given = _named(node)
    if "other" in given:  # the larger of two
        return None
    x, dims = at(given["self"]), given.get("dim")
    dims = range(x.dim()) if dims is None or dims == [] else dims
    return _mean(x, dims, keep=bool(given.get("keepdim")))


@coordinates(
    *aten("upsample_linear1d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa")
)
def resamples(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """Evenly over the same area: at edges too, where values are merely repeated."""
    given, size = _named(node), _shape(node.meta["val"])
    x = at(given["self" if "self" in given else "input"])
    for dim in range(2, len(size)):
        old, new = x.shape[dim], size[dim]
        at_old = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
        if given["align_corners"]:
            at_old = torch.linspace(0, old - 1, new, dtype=torch.float64)
        below = at_old.floor().clamp(0, max(old - 2, 0)).long()
        share = (at_old - below).view(-1, *[1] * (len(size) - 1 - dim))
        low, high = (x.index_select(dim, i) for i in (below, (below + 1).clamp(max=old - 1)))
        x = low + (high - low) * share
    return x


# --- windows --------------------------------------------------------------------------------------------------


@coordinates(*aten("conv1d conv2d conv3d"))
def convolves(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """Of each group's channels the mean, then by window."""
    given = _named(node)
    shape, kernel = _shape(node.meta["val"]), _shape(given["weight"].meta["val"])[2:]
    x = _mean(at(given["input"]).unflatten(1, (given["groups"], -1)), 2, keep=True)
    settings = (given[name] for name in ("stride", "padding", "dilation"))
    x = _windows(x, shape[2:], kernel, *settings)
    return x.expand(-1, -1, shape[1] // given["groups"], *shape[2:]).flatten(1, 2)


@coordinates(*aten("avg_pool1d avg_pool2d max_pool1d max_pool2d max_pool2d_with_indices"))
def pools(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """By window."""
    given, size = _named(node), _shape(node.meta["val"])
    axes = int(re.findall(r"\d", operation(node))[0])
    kernel, stride, padding = given["kernel_size"], given["stride"], given["padding"]
    return _windows(at(given["self"]), size[-axes:], kernel, stride or kernel, padding, given.get("dilation", 1))


def _windows(x: Tensor, size: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """The places of windows along the last dimensions.

    A window stands where its centre stands, which is the mean of all of it except at edges: the mean without the
    padding would move inwards there, further with each layer, until tokens leave their own pixels.

    Args:
        x: The coordinates.
        size: How many windows there are along each of the dimensions.
        kernel: Settings of a convolution or a pooling, as torch takes them.
        stride: Likewise.
        padding: Likewise.
        dilation: Likewise.
    """
    whole, axes = x.shape, len(size)
    kernel, stride, dilation = (_for_each(setting, axes) for setting in (kernel, stride, dilation))
    before: Sequence[int] = (0,) * axes
    if padding == "same":
        before = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    elif padding != "valid":
        before = _for_each(padding, axes)
    x = _once(x)[0]
    x = x.expand(*x.shape[:-axes], *whole[-axes:])
    for dim, (n, k, s, p, d) in enumerate(zip(size, kernel, stride, before, dilation, strict=True), x.dim() - axes):
        span = d * (k - 1) + 1
        after = max((n - 1) * s + span - p - x.shape[dim], 0)
        x = functional.pad(x.movedim(dim, -1), (p, after), value=math.nan)
        taps = x.unfold(-1, span, s).narrow(-2, 0, n)[..., ::d]
        centre = taps[..., (k - 1) // 2 : k // 2 + 1].nanmean(-1)
        x = torch.where(centre.isnan(), taps.nanmean(-1), centre).movedim(-1, dim)
    return x.expand(*whole[:-axes], *size)


def _for_each(setting: int | Sequence[int], axes: int) -> Sequence[int]:
    each = [setting] if isinstance(setting, int) else list(setting)
    return each * axes if len(each) == 1 else each


# --- products -------------------------------------------------------------------------------------------------


@coordinates(*aten("linear matmul mm bmm addmm baddbmm"))
def multiplies(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """A product of matrices, or with weights."""
    name, shape = operation(node), _shape(node.meta["val"])
    left, right = at(node.args[1:3] if name in ("aten::addmm", "aten::baddbmm") else node.args[:2])
    return _product(left, right.mT if name == "aten::linear" else right).expand(shape)


@coordinates("aten::scaled_dot_product_attention")
def attends(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """The places of the queries; where those are channels, as in a transposed attention, of the values' columns."""
    q, _, v = at(node.args[:3])
    return _by_row(_mean(q, -1, keep=True), _mean(v, -2, keep=True)).expand(_shape(node.meta["val"]))


@coordinates("aten::einsum")
def contracts(node: Node, at: Callable[[Any], Any]) -> Tensor:
    """A product of two, laid out as one of matrices."""
    equation, operands = at(node.args[:2])
    factors, out = equation.replace(" ", "").split("->")
    one, other = factors.split(",")
    sizes = {
        letter: n
        for names, x in zip((one, other), operands, strict=True)
        for letter, n in zip(names, x.shape, strict=True)
    }
    shared = [letter for letter in out if letter in one and letter in other]
    left, right = ([c for c in out if c in mine and c not in shared] for mine in (one, other))
    summed = [letter for letter in one if letter in other and letter not in out]

    def matrices(x: Tensor, names: str, *sides: list[str]) -> Tensor:
        alone = [names.index(c) for c in names if c not in (*shared, *sides[0], *sides[1])]
        x = _mean(x, alone, keep=True) if alone else x
        x = x.permute([names.index(c) for c in (*shared, *sides[0], *sides[1])] + alone)
        return x.reshape([sizes[c] for c in shared] + [math.prod(sizes[c] for c in side) for side in sides])

    y = _product(matrices(operands[0], one, left, summed), matrices(operands[1], other, summed, right))
    letters = [*shared, *left, *right]
    y = y.expand(*y.shape[:-2], math.prod(sizes[c] for c in left), math.prod(sizes[c] for c in right))
    return y.reshape([sizes[c] for c in letters]).permute([letters.index(c) for c in out])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The places of a product of matrices; where it sums over tokens of both, what is left is of no place."""
    rows, columns = _mean(left, -1, keep=True), _mean(right, -2, keep=True)
    if not rows.isfinite().any() or not columns.isfinite().any():  # one of them is weights
        return rows if rows.isfinite().any() else columns
    return torch.where(_varies(left, -1) & _varies(right, -2), math.nan, _by_row(rows, columns))


def _by_row(rows: Tensor, columns: Tensor) -> Tensor:
    """The places of rows; of columns where only those differ."""
    same = rows.isnan() if rows.shape[-2] == 1 else rows.isnan() | ~_varies(rows, -2)
    by_column = same & _varies(columns, -1)
    return torch.where(by_column, columns, rows) if by_column.any() else rows
