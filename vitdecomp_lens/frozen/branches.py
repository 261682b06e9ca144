"""Which parts a traced graph consists of, found by its operations alone.

A *branch* is what a nonlinear operation writes: an attention's mixture, an MLP's activation, a convolution's. It is
found where a walk back from the output meets it first; branches behind another nonlinearity are hidden. Of each the
graph tells

- its **source**: the nonlinear value itself, and the axis that tells heads or neurons apart, by following its
  dimensions to the weights that read them: channels that are made of two dimensions are heads × d_head;
- its **output**: the last value on the path that no other branch enters, which is what is added to the stream;
- for attention, its **values**, one each source token.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.coverage import Stop
from vitdecomp_lens.frozen.pairs import matched_groups
from vitdecomp_lens.frozen.rules import Passage, argument, classify, has_learned_query, operation, sizes
from vitdecomp_lens.frozen.walk import Cut, module_path, walk

Where = Literal["output", "parts", "values"]
PARTS = frozenset({"attn", "mlp"})
BranchKind = Literal["embed", "attn", "mlp", "conv", "source"]
WEIGHTED = frozenset({"aten::linear", "aten::addmm", "aten::matmul", "aten::mm", "aten::bmm", "aten::baddbmm"})
CONVOLUTIONS = frozenset({"aten::conv1d", "aten::conv2d", "aten::conv3d"})
PRODUCTS = frozenset({"aten::matmul", "aten::bmm", "aten::mm", "aten::einsum"})
JOINS = frozenset({"aten::add", "aten::sub", "aten::cat", "aten::concat", "aten::stack"})


@dataclass(frozen=True)
class Branch:
    """A part of a traced graph that writes into its output.

    Attributes:
        kind: What it is, by its operations.
        name: Path of the module that holds its nonlinear operation and the weights that read it.
        source: The nonlinear value; of the embedding, the first value that reads the images.
        parts: The last value before the weights that read it in which heads or neurons have an axis of their own.
        output: What it adds to the stream, its biases included.
        channels: The dimensions of the parts that these weights read.
        source_channels: The same of the source.
        output_channels: The dimensions of the output that weights wrote.
        values: Of attention, the value of each source token; None otherwise.
    """

    kind: BranchKind
    name: str
    source: Node
    parts: Node
    output: Node
    channels: tuple[int, ...]
    source_channels: tuple[int, ...]
    output_channels: tuple[int, ...]
    values: Node | None

    def node(self, where: Where) -> Node | None:
        """The value itself; None where there is none."""
        return {"output": self.output, "parts": self.parts, "values": self.values}[where]

    def split(self, where: Where) -> int | None:
        """The axis of a value that tells heads or neurons apart; None where nothing shows it."""
        if where == "output" or len(self.channels) != (2 if self.kind == "attn" else 1) or self._head is None:
            return None
        return self.channels[self._head] if where == "parts" else self._split_of_values

    @property
    def _head(self) -> int | None:
        """Which of the channels' dimensions tells parts apart: of a product of matrices no row or column."""
        if self.kind != "attn":
            return 0 if self.kind in PARTS else None
        # An einsum lays dimensions as it likes; heads come before their channels.
        within = 0 if operation(self.source) == "aten::einsum" else 2
        last = len(sizes(self.source)) - within
        return next((number for number, axis in enumerate(self.source_channels) if axis < last), None)

    @property
    def _split_of_values(self) -> int | None:
        """The axis of attention's heads, where its values have as many dimensions as what it writes, and as many."""
        values, source = sizes(self.values), sizes(self.source)  # type: ignore[arg-type]
        axis = self.source_channels[self._head]  # type: ignore[index]
        return axis if axis >= 0 and len(values) == len(source) and values[axis] == source[axis] else None

    def token_axes(self, where: Where) -> tuple[int, ...]:
        """The axes of a value that run over tokens; windows may be folded into the batch besides."""
        if where == "output":
            return self._besides(self.output, self.output_channels)
        if where == "parts":
            return self._besides(self.parts, self.channels)
        count = len(sizes(self.values))  # type: ignore[arg-type]
        # Rows of the values are what the pattern weighs: tokens, or in channel attention channels.
        channel = count - 1 if not self.channels or len(sizes(self.source)) - 1 in self.source_channels else count - 2
        heads = self.split("values")
        return self._besides(self.values, (channel,) if heads is None else (heads, channel))

    def _besides(self, node: Node | None, channels: Collection[int]) -> tuple[int, ...]:
        return tuple(d for d in range(1, len(sizes(node))) if d not in channels)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Branches:
    """The branches of a graph.

    Attributes:
        found: Those that a walk from the output meets first, the embedding before all.
        hidden: How many lie behind another one.
        last: The source that all of the output passes, if there is one.
        stops: Where these others are.
    """

    found: tuple[Branch, ...]
    hidden: int
    stops: tuple[Stop, ...]
    last: Node | None


def find_branches(nodes: Sequence[Node], root: Node, live: Collection[Node]) -> Branches:
    """Find the branches of a graph from its output, and count those that are hidden behind them."""
    passages = {node: classify(node, live) for node in nodes if node in live}
    points = [node for node in passages if _is_a_point(node, passages)]
    cut = walk(nodes, root, live, {node.name: node for node in points})
    regions = _Regions(cut)
    behind = _Behind(passages, frozenset(points), root, regions)
    met = [node for node in nodes if node in regions.met]
    found = [_branch(node, passages, regions, node in behind.embeddings) for node in met]
    hidden = behind.hidden({branch.source: branch.name for branch in found})
    return Branches(_with_names(found), *hidden, regions.owner.get(root))


# --- where branches start ---------------------------------------------------------------------------------------


def _is_a_point(node: Node, passages: Mapping[Node, Passage]) -> bool:
    """Whether a walk from anywhere has to stop here: nonlinear, an attention, or the first to read the images."""
    passage, value = passages[node], node.meta.get("val")
    if node.op == "output" or not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if passage.kind == "pattern":
        return not has_learned_query(node, passages)
    if passage.kind == "gate":
        return sizes(passage.through[0]) == sizes(node) == _shape(_other(node, passage)) and not _is_gated(
            node, passages
        )
    return passage.kind == "source" or any(n.op == "placeholder" for n in passage.through)


def _other(node: Node, passage: Passage) -> Node | None:
    """The factor that a gate multiplies its input by."""
    return next((n for n in node.all_input_nodes if n is not passage.through[0]), None)


def _shape(node: Node | None) -> tuple[int, ...]:
    return () if node is None else sizes(node)


def _is_gated(node: Node, passages: Mapping[Node, Passage]) -> bool:
    """Whether what a gate multiplies is itself what a branch writes, so that the gate belongs to the branch."""
    while passages[node].kind in ("linear", "gate", "normaliser") and len(passages[node].through) == 1:
        node = passages[node].through[0]
        if node not in passages:
            return False
    return passages[node].kind in ("source", "pattern")


# --- where they end ---------------------------------------------------------------------------------------------


class _Regions:
    """For each node between a cut and the output, which branch alone enters it."""

    def __init__(self, cut: Cut) -> None:
        self.met = frozenset(cut.points.values())
        self.order = tuple(reversed(cut.order))
        self.through = cut.through
        self.readers: dict[Node, list[Node]] = {}
        self.owner: dict[Node, Node | None] = {}
        for node in self.order:
            inputs = cut.through.get(node, ())
            owners = {self.owner[n] for n in inputs}
            self.owner[node] = node if node in self.met else owners.pop() if len(owners) == 1 else None
            for n in inputs:
                self.readers.setdefault(n, []).append(node)

    def of(self, source: Node) -> list[Node]:
        """The nodes that one branch alone enters, its source first."""
        return [node for node in self.order if self.owner[node] is source]

    def end(self, inside: Sequence[Node]) -> Node | None:
        """The only node of some through which they are read from elsewhere, or that is the output."""
        ends = [n for n in inside if n not in self.readers or not set(self.readers[n]) <= set(inside)]
        return ends[0] if len(ends) == 1 else None


def _branch(source: Node, passages: Mapping[Node, Passage], regions: _Regions, embeds: bool) -> Branch:
    followed = _follow(regions.of(source), regions)
    weighted = followed.weights
    name = module_path(source) if weighted is None else _common(module_path(source), module_path(weighted))
    if embeds:
        name = name if weighted is not None else _parent(name)
        inside = _within(followed.dims, regions, name)
    else:
        inside = _until_others_join(followed.dims, regions, name)
    output = regions.end(inside) or source
    kind: BranchKind = "embed" if embeds else _kind(source, passages[source], weighted)
    return Branch(
        kind=kind,
        name=name,
        source=source,
        parts=followed.parts,
        output=output,
        channels=tuple(followed.dims[followed.parts].index((dim,)) for dim in followed.channels),
        source_channels=followed.channels,
        output_channels=_written_dims(followed.dims[output]),
        values=passages[source].through[0] if passages[source].kind == "pattern" else None,
    )


def _within(nodes: Iterable[Node], regions: _Regions, place: str) -> list[Node]:
    """The nodes of an embedding inside its module, and what only lays them out; not a later shortcut."""
    found: list[Node] = []
    for node in nodes:
        mine = _is_inside(module_path(node), place) or operation(node) in LAYOUTS
        if not found or (mine and any(n in found for n in regions.through[node])):
            found.append(node)
    return found


def _until_others_join(nodes: Iterable[Node], regions: _Regions, place: str) -> list[Node]:
    """The nodes of a branch before constants join it that are not its own: class tokens, position embeddings."""
    found: list[Node] = []
    for node in nodes:
        joins = operation(node) in JOINS and not _is_inside(module_path(node), place)
        if not found or (not joins and any(n in found for n in regions.through[node])):
            found.append(node)
    return found


def _kind(source: Node, passage: Passage, read_by: Node | None) -> BranchKind:
    if passage.kind == "pattern" or operation(source) in PRODUCTS:
        return "attn"
    if read_by is None:
        return "source"
    if operation(read_by) not in CONVOLUTIONS:
        return "mlp"
    return "mlp" if _is_pointwise(read_by) and _is_pointwise(_written_by(source)) else "conv"


def _is_pointwise(node: Node | None) -> bool:
    """Whether weights mix channels only: a linear layer, or a convolution of one pixel."""
    if node is None:
        return False
    return operation(node) not in CONVOLUTIONS or all(size == 1 for size in sizes(node.args[1])[2:])  # type: ignore[arg-type]


def _written_by(node: Node) -> Node | None:
    """The weights whose output an activation bends."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if operation(node) in WEIGHTED or operation(node) in CONVOLUTIONS:
            return node
    return None


# --- following dimensions ---------------------------------------------------------------------------------------

Dims = tuple[tuple[int, ...], ...]  # for each dimension, which of the source's it is made of
WRITTEN = -1  # a dimension that weights wrote


@dataclass(frozen=True)
class _Followed:
    dims: Mapping[Node, Dims]
    parts: Node
    channels: tuple[int, ...]
    weights: Node | None


def _follow(inside: Sequence[Node], regions: _Regions) -> _Followed:
    """Follow a source's dimensions through a branch, to the weights that read it and beyond."""
    source = inside[0]
    start: Dims = tuple((dim,) for dim in range(len(sizes(source))))
    if operation(source) in WEIGHTED | CONVOLUTIONS and not _mixes_positions(source):
        start = _after_weights(source, start)
    dims: dict[Node, Dims] = {source: start}
    channels: tuple[int, ...] = ()
    read_by: Node | None = None
    weights: Node | None = None
    for node in inside[1:]:
        before = next((n for n in regions.through[node] if n in dims), None)
        if before is None:
            continue
        if weights is None and operation(node) in WEIGHTED | CONVOLUTIONS:
            weights = node
        if _mixes_channels(node):
            if read_by is None and WRITTEN not in dims[before][_contracted(node)]:
                read_by, channels = node, dims[before][_contracted(node)]
            dims[node] = _after_weights(node, dims[before])
        elif (moved := _moved(node, dims[before], before, source)) is not None:
            dims[node] = moved
    if read_by is None:
        channels = _read_after_joining(dims, regions, source)
    apart = [node for node in dims if all((dim,) in dims[node] for dim in channels) and node is not read_by]
    return _Followed(dims, apart[-1], channels, weights) if channels and apart else _Followed(dims, source, (), weights)


def _read_after_joining(dims: Mapping[Node, Dims], regions: _Regions, source: Node) -> tuple[int, ...]:
    """Which of a source's dimensions weights of its module read after something else was added: pooled queries."""
    dims, place = dict(dims), module_path(source)
    for node in regions.order:
        before = next((n for n in regions.through.get(node, ()) if n in dims), None)
        if before is None or node in dims or not _is_inside(module_path(node), place):
            continue
        if _mixes_channels(node):
            read = dims[before][_contracted(node)]
            return () if WRITTEN in read else read
        if (moved := _moved(node, dims[before], before, source)) is not None:
            dims[node] = moved
    return ()


def _mixes_positions(node: Node) -> bool:
    """Whether an operation's operands both depend on the images."""
    return operation(node) in PRODUCTS


def _mixes_channels(node: Node) -> bool:
    if operation(node) in CONVOLUTIONS:
        groups = argument(node, 6, "groups", 1)
        return bool(groups == 1 or sizes(node.args[1])[1] > 1)  # type: ignore[arg-type]
    return operation(node) in WEIGHTED


def _contracted(node: Node) -> int:
    return 1 if operation(node) in CONVOLUTIONS else -1


def _after_weights(node: Node, dims: Dims) -> Dims:
    channel = _contracted(node) % len(dims)
    return (*dims[:channel], (WRITTEN,), *dims[channel + 1 :])


def _written_dims(dims: Dims) -> tuple[int, ...]:
    """The dimensions that weights wrote; the last where none did."""
    return tuple(dim for dim, made_of in enumerate(dims) if WRITTEN in made_of) or (len(dims) - 1,)


TRANSPOSES = frozenset({"aten::permute", "aten::transpose", "aten::t", "aten::mT", "aten::numpy_T", "aten::swapaxes"})
RESHAPES = frozenset(
    f"aten::{name}" for name in ["view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"]
)


LAYOUTS = RESHAPES | TRANSPOSES


def _moved(node: Node, dims: Dims, before: Node, source: Node) -> Dims | None:
    """A source's dimensions after an operation that moves them; None where that is not known."""
    name, count = operation(node), len(dims)
    if name == "aten::permute":
        return tuple(dims[d] for d in node.args[1])  # type: ignore[union-attr, index]
    if name in TRANSPOSES:
        one, other = (node.args[1:3] if len(node.args) > 2 else (-2, -1)) if name != "aten::t" else (0, 1)
        return _swapped(dims, int(one) % count, int(other) % count)  # type: ignore[arg-type]
    if name in RESHAPES:
        return _reshaped(dims, sizes(before), sizes(node), sizes(source))
    if name == "aten::select":
        gone = int(argument(node, 1, "dim", 0)) % count
        return (*dims[:gone], *dims[gone + 1 :])
    if len(sizes(node)) == count:
        return dims
    if name in ("aten::mean", "aten::sum"):
        gone_dims = {d % count for d in argument(node, 1, "dim") or ()}
        return tuple(made_of for d, made_of in enumerate(dims) if d not in gone_dims)
    return None


def _swapped(dims: Dims, one: int, other: int) -> Dims:
    order = list(range(len(dims)))
    order[one], order[other] = other, one
    return tuple(dims[d] for d in order)


def _reshaped(dims: Dims, inner: Sequence[int], outer: Sequence[int], source: Sequence[int]) -> Dims:
    found: list[tuple[int, ...]] = [()] * len(outer)
    for left, right in matched_groups(inner, outer):
        parts = [dims[d] for d in left if inner[d] > 1]
        wide = [d for d in right if outer[d] > 1]
        atoms = tuple(atom for part in parts for atom in part)
        if atoms == (0,) and len(wide) > 1:  # heads or windows that were folded into the batch get numbers of their own
            parts = [(0,), *((-1 - d,) for d in wide[1:])]
        elif min(atoms, default=0) >= 0 and [source[atom] for atom in atoms] == [outer[d] for d in wide]:
            parts = [(atom,) for atom in atoms]  # heads that were folded with their channels, told apart again
        if len(parts) == len(wide):
            for d, made_of in zip(wide, parts, strict=True):
                found[d] = made_of
        else:  # several become one, or one becomes several, each of them a part of it
            for d in wide:
                found[d] = atoms
    return tuple(found)


# --- what lies behind -------------------------------------------------------------------------------------------


class _Behind:
    """Which sources lie behind others, and which of them are branches of their own.

    A source is part of a branch behind it (the first activation of two in a convolution branch, a gate of an MLP) where
    nothing joins it on the way to the branch's own source, or where it stands in the branch's own module.
    """

    def __init__(
        self, passages: Mapping[Node, Passage], points: frozenset[Node], root: Node, regions: _Regions
    ) -> None:
        self._passages, self._points, self._regions = passages, points, regions
        self._last = regions.owner.get(root)
        self._reads: dict[Node, list[tuple[Node, bool]]] = {}
        ahead = list(regions.met)
        while ahead:
            source = ahead.pop()
            if source not in self._reads:
                self._reads[source] = list(self._sources_behind(source))
                ahead += [found for found, _ in self._reads[source]]
        self.embeddings = frozenset(source for source in regions.met if self._embeds(source))

    def _sources_behind(self, source: Node) -> Iterator[tuple[Node, bool]]:
        """The sources that a walk from a source's inputs meets, and whether something joined on the way."""
        passage = self._passages[source]
        if self._reads_images(source):
            return
        starts = passage.through or source.all_input_nodes
        ahead = [(node, False) for node in starts if node in self._passages]
        seen = set()
        while ahead:
            node, joined = ahead.pop()
            if (node, joined) in seen:
                continue
            seen.add((node, joined))
            if node in self._points:
                yield node, joined
                continue
            behind = [n for n in self._inputs(node) if n in self._passages]
            joined = joined or (operation(node) in JOINS and len(behind) > 1)
            ahead += [(n, joined) for n in behind]

    def _inputs(self, node: Node) -> Sequence[Node]:
        several = node.args[0] if operation(node) == "getitem" else node
        return self._passages[node].through or several.all_input_nodes  # type: ignore[union-attr]

    def _reads_images(self, source: Node) -> bool:
        return any(n.op == "placeholder" and n in self._passages for n in source.all_input_nodes)

    def _embeds(self, source: Node) -> bool:
        """Whether only the images lie behind a source, or a stem of operations one after the other."""
        if source is self._last:  # then it is no stem but all there is
            return False
        behind = self._reads[source]
        return all(not joined and found not in self._regions.met and self._embeds(found) for found, joined in behind)

    def hidden(self, modules: Mapping[Node, str]) -> tuple[int, tuple[Stop, ...]]:
        """How many branches are hidden, and behind what, given the modules of those that are found."""
        readers: dict[Node, list[tuple[Node, bool]]] = {}
        for source, behind in self._reads.items():
            for found, joined in behind:
                readers.setdefault(found, []).append((source, joined))
        joins = {source: source is not self._last for source in self._regions.met}
        hiders: dict[Node, frozenset[Node]] = {source: frozenset({source}) for source in self._regions.met}
        module = {
            # A module that holds other branches, too, is nobody's own.
            source: module_path(source)
            if any(_is_inside(other, name) and other != name for other in modules.values())
            else name
            for source, name in modules.items()
        }
        count: dict[Node, int] = {}
        total = 0
        for source in sorted(self._reads.keys() - self._regions.met, reverse=True):
            inner = all(
                joins[reader] and (not joined or _is_inside(module_path(source), module[reader]))
                for reader, joined in readers[source]
            )
            module[source] = module[readers[source][0][0]] if inner else module_path(source)
            joins[source] = inner or any(joined for _, joined in readers[source])
            hiders[source] = frozenset().union(*(hiders[reader] for reader, _ in readers[source]))
            if not inner and not self._reads_images(source):
                total += 1
                for hider in hiders[source]:
                    count[hider] = count.get(hider, 0) + 1
        stops = (
            Stop(operation(node), module_path(node), f"only what follows it is linear; {_counted(number)} behind it")
            for node, number in count.items()
        )
        return total, tuple(stops)


def _counted(number: int) -> str:
    return "1 branch lies" if number == 1 else f"{number} branches lie"


# --- names ------------------------------------------------------------------------------------------------------


def _common(one: str, other: str) -> str:
    """The path of the module that holds both; the first where only the model does."""
    shared = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared) or one


def _is_inside(path: str, place: str) -> bool:
    """Whether a module is another or lies in it; nothing is told by lying in the whole model."""
    return bool(place) and (path == place or path.startswith(f"{place}."))


def _parent(path: str) -> str:
    return path.rpartition(".")[0] or path


def _with_names(branches: Sequence[Branch]) -> tuple[Branch, ...]:
    """Names that tell branches apart: a block that holds several is not the name of one of them."""
    names = [branch.name for branch in branches]
    found: list[Branch] = []
    taken: dict[str, int] = {}
    for branch in branches:
        name = branch.name
        path, what = module_path(branch.source), operation(branch.source).removeprefix("aten::")
        if any(other != name and _is_inside(other, name) for other in names):
            inner = [place for place in (path.rpartition(".")[0], path) if place != name and _is_inside(place, name)]
            name = inner[0] if inner else f"{name}.{what}"
        name = name or what
        taken[name] = number = taken.get(name, -1) + 1
        found.append(replace(branch, name=f"{name}#{number}" if number else name))
    return tuple(found)
