"""One run of a hooked model, and what a compiled cut reads from it.

The model runs natively, with the user's hooks. Listeners at the hook points keep the parts of the values that
the cut reads, as they are after those hooks; what a hook changed on the path is kept as a difference. Frozen
statistics are computed from the nearest hook points by the traced graph itself.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.frozen.compiled import Leaf, Reads, in_full_precision
from vitdecomp_lens.frozen.graph import FrozenGraph
from vitdecomp_lens.frozen.rules import sizes
from vitdecomp_lens.frozen.walk import Cut
from vitdecomp_lens.points import as_hooks_see_it, is_hooked


@dataclass(frozen=True)
class Captured:
    """What one run left.

    Attributes:
        kept: For each point of the program, the part of its value that some path reads; for what hooks changed
            on the path, the difference.
        read: What the leaves of the program read.
        total: What the model computed.
    """

    kept: Mapping[str, Tensor]
    read: Mapping[Leaf, Any]
    total: Float[Tensor, "batch d_rep"]


class Shelf:
    """One piece of memory, there before the run, for what is kept of it.

    Tensors that outlive the layer that made them come to lie between the large ones of the forward, and the allocator
    then has to ask for new pages in every layer: a copy costs less. And a view would keep all of a larger value.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._memory, self._used = torch.empty(size, dtype=dtype, device=device), 0

    def put(self, value: Tensor) -> Tensor:
        """A copy here; elsewhere where it is of another kind, or does not fit."""
        if not value.is_floating_point() or self._used + value.numel() > len(self._memory):
            return value.clone()
        place = self._memory[self._used : self._used + value.numel()].view(value.shape)
        self._used += value.numel()
        return place.copy_(value)

    def clear(self) -> None:
        """Make room for the next run."""
        self._used = 0


def changed_on_the_path(graph: FrozenGraph, cut: Cut, points: Mapping[str, HookPoint]) -> tuple[str, ...]:
    """Hook points between the cut and the output that somebody listens at: what they change is a component."""
    passed = set(cut.through)
    met = {name: node for name, node in graph.points.items() if name in points}
    return tuple(name for name, node in met.items() if node in passed and is_hooked(points[name]))


def capture(
    run: Callable[[Tensor], Any] | None,
    images: Float[Tensor, "batch channel height width"],
    points: Mapping[str, HookPoint],
    graph: FrozenGraph,
    program: Reads,
    reads: Collection[str],
    *,
    changed: Collection[str] = (),
    at_once: Mapping[str, Callable[[Tensor], None]] | None = None,
    shelf: Shelf | None = None,
) -> Captured:
    """Run a model once and keep what a program reads.

    Args:
        run: Runs the model; None where the graph itself is run.
        images: What it runs on.
        points: The model's hook points.
        graph: The model, traced as it is hooked.
        program: The compiled cut.
        reads: Points of it whose values to keep.
        changed: Hook points whose users' changes are components.
        at_once: What to do with the value at some points, in place of keeping it.
        shelf: Where what is kept goes.

    Raises:
        InputError: If a point is met twice: nothing says which of its values is meant.
    """
    at_once = at_once or {}
    kept: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    put = torch.clone if shelf is None else shelf.put  # a later hook may write in place
    hooked = graph.points if run is None else points
    root = next((name for name, node in graph.points.items() if node is graph.root and name in hooked), None)
    seen: list[Tensor] = []

    def keep_before(name: str, value: Tensor) -> None:
        before[name] = value.clone()  # a hook may write in place

    def keep(name: str, value: Tensor) -> None:
        if name not in waiting:
            raise repeated_error(name)
        waiting.remove(name)
        if name in changed:
            kept[name] = program.keep(name, value - before.pop(name))
        elif name in at_once:
            with in_full_precision(value.device):
                at_once[name](program.part(name, value))
        elif name in reads:
            kept[name] = program.keep(name, value) if shelf is None else put(program.part(name, value))
        if name == root:
            seen[:] = [value.flatten(1).clone()]  # often a row of all tokens' values; a later hook may write in place
        leaves.meet(name, value)

    computed = [Leaf((graph.points[name],), partial(keep, name), 0) for name in {*reads, *at_once} - hooked.keys()]
    leaves = _Leaves(graph, [*program.leaves, *computed], hooked, images, put)
    waiting = {*reads, *at_once, *leaves.points, *([root] if root else [])}
    if run is None:
        output = _run_graph(graph, images, tuple(waiting), keep)
    else:
        with _listening(points, tuple(waiting & points.keys()), keep, changed, keep_before):
            output = run(images)
    total = output.flatten(1).clone() if root is None else seen[0]
    read = leaves.all_read()
    return Captured(kept, {leaf: read[leaf] for leaf in program.leaves}, total)


class _Leaves:
    """Reads each leaf of a program as soon as all points have been met that it is computed from."""

    def __init__(
        self,
        graph: FrozenGraph,
        leaves: Sequence[Leaf],
        hooked: Collection[str],
        images: Tensor,
        put: Callable[[Tensor], Tensor],
    ) -> None:
        self._graph, self._images, self._put = graph, images, put
        self._needs = {leaf: frozenset(_nearest_points(graph, leaf.nodes, hooked)) for leaf in leaves}
        self._of: dict[str, list[Leaf]] = {}
        for leaf, names in self._needs.items():
            for name in names:
                self._of.setdefault(name, []).append(leaf)
        self._met: dict[str, Tensor] = {}
        self._read: dict[Leaf, Any] = {}

    @property
    def points(self) -> Iterable[str]:
        return self._of

    def meet(self, name: str, value: Tensor) -> None:
        if name not in self._of:
            return
        self._met[name] = value
        self._compute([leaf for leaf in self._of[name] if self._needs[leaf] <= self._met.keys()])
        for met in [met for met in self._met if all(leaf in self._read for leaf in self._of[met])]:
            del self._met[met]  # a large value; who still needs it keeps it
        if name in self._met:
            self._met[name] = value.clone()  # a stream may be added to in place

    def _compute(self, leaves: Sequence[Leaf]) -> None:
        given = {self._graph.images: self._images, **{self._graph.points[n]: value for n, value in self._met.items()}}
        values = self._graph.evaluate([node for leaf in leaves for node in leaf.nodes], given)
        for leaf in leaves:
            with in_full_precision(self._images.device):
                read = leaf.read(*(values[node] for node in leaf.nodes))
            self._read[leaf] = self._put(read) if isinstance(read, Tensor) else read

    def all_read(self) -> Mapping[Leaf, Any]:
        self._compute([leaf for leaf in self._needs if leaf not in self._read])  # those that need no point
        return self._read


def repeated_error(name: str) -> InputError:
    """What to say where the model runs twice."""
    return InputError(
        f"The model ran more than once: {name} was met twice. Decompose each run by itself, and add up what they give:"
        " of= may run the model once. (With split inputs of queries, keys and values, norms cannot be hooked too.)"
    )


def _run_graph(graph: FrozenGraph, images: Tensor, names: Iterable[str], keep: Callable[[str, Tensor], None]) -> Tensor:
    at: dict[Node, list[str]] = {}
    for name in names:
        at.setdefault(graph.points[name], []).append(name)

    def met(of_node: Sequence[str], value: Tensor) -> None:
        for name in of_node:
            keep(name, value)

    at_once = {node: partial(met, of_node) for node, of_node in at.items()}
    output: Tensor = graph.evaluate([graph.root], {graph.images: images}, at_once=at_once)[graph.root]
    return output


@contextmanager
def _listening(
    points: Mapping[str, HookPoint],
    names: Iterable[str],
    keep: Callable[[str, Tensor], None],
    changed: Iterable[str],
    keep_before: Callable[[str, Tensor], None],
) -> Iterator[None]:
    handles = []
    try:
        for name in names:  # registered last: they see what the user's hooks return
            listener = lambda p, _i, value, name=name: keep(name, as_hooks_see_it(p, value))  # noqa: E731
            handles.append(points[name].register_forward_hook(listener))
        for name in changed:
            before = lambda p, inputs, name=name: keep_before(name, as_hooks_see_it(p, inputs[0]))  # noqa: E731
            handles.append(points[name].register_forward_pre_hook(before, prepend=True))  # before the user's
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nearest_points(graph: FrozenGraph, nodes: Iterable[Node], hooked: Collection[str]) -> list[str]:
    """The hook points from which values can be computed without going further back."""
    tags = {node: name for name, node in graph.points.items() if name in hooked}
    found: dict[str, None] = {}
    ahead, seen = list(nodes), set()
    while ahead:
        node = ahead.pop()
        if node in seen or node not in graph.live:
            continue
        seen.add(node)
        if node in tags:
            found[tags[node]] = None
        else:
            ahead += node.all_input_nodes
    return list(found)


def kept_size(graph: FrozenGraph, program: Reads, reads: Iterable[str]) -> int:
    """How many numbers a run keeps of one image."""
    size = sum(leaf.size for leaf in program.leaves)
    for name in reads:
        shape = list(sizes(graph.points[name]))
        if (rows := program.kept_rows(name)) is not None:
            shape[rows[0]] = rows[2]
        size += math.prod(shape) // sizes(graph.images)[0]  # windows may be folded behind the batch
    return size
