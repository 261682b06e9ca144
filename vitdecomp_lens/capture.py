"""One run of a hooked model, and what a compiled cut reads from it.

The model runs natively, with the user's hooks. Listeners at the hook points keep the parts of the values that
the cut reads, as they are after those hooks; what a hook changed on the path is kept as a difference. Frozen
statistics are computed from the nearest hook points by the traced graph itself.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.frozen.compiled import CompiledCut
from vitdecomp_lens.frozen.graph import FrozenGraph
from vitdecomp_lens.frozen.rules import sizes
from vitdecomp_lens.frozen.walk import Cut
from vitdecomp_lens.points import is_hooked


@dataclass(frozen=True)
class Captured:
    """What one run left.

    Attributes:
        kept: For each point of the program, the part of its value that some path reads; for what hooks changed
            on the path, the difference.
        leaves: Values of the nodes that the weights are computed from.
        total: What the model computed.
    """

    kept: Mapping[str, Tensor]
    leaves: Mapping[Node, Tensor]
    total: Float[Tensor, "batch d_rep"]


def changed_on_the_path(graph: FrozenGraph, cut: Cut, points: Mapping[str, HookPoint]) -> tuple[str, ...]:
    """Hook points between the cut and the output that somebody listens at: what they change is a component."""
    passed = set(cut.through)
    return tuple(name for name, node in graph.points.items() if node in passed and is_hooked(points[name]))


def capture(
    run: Callable[[Tensor], Any],
    images: Float[Tensor, "batch channel height width"],
    points: Mapping[str, HookPoint],
    graph: FrozenGraph,
    program: CompiledCut,
    changed: Iterable[str],
) -> Captured:
    """Run a model once and keep what a program reads.

    Args:
        run: Runs the model.
        images: What it runs on.
        points: The model's hook points.
        graph: The model, traced as it is hooked.
        program: The compiled cut.
        changed: Hook points whose users' changes are components.
    """
    changed = set(changed)
    values: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    reads = set(program.points)
    wanted = {str(node.args[1]) for node in _nearest_points(graph, program.leaves)}
    root = next((name for name, node in graph.points.items() if node is graph.root), None)

    def keep_before(name: str, value: Tensor) -> None:
        before[name] = value.clone()  # a hook may write in place

    places = {} if torch.is_grad_enabled() else _places_for_rows(graph, program, len(images))

    def keep(name: str, value: Tensor) -> None:
        if name in changed:
            kept[name] = program.keep(name, value - before.pop(name))
        elif name in places:
            dim, first, count = program.kept_rows(name)  # type: ignore[misc]
            kept[name] = places[name].copy_(value.narrow(dim, first, count))
        elif name in reads:
            kept[name] = program.keep(name, value)
        if name in wanted or name == root:
            values[name] = value

    with _listening(points, reads | wanted | ({root} if root else set()), keep, changed, keep_before):
        output = run(images)
    total = (output if root is None else values[root]).flatten(1).clone()  # often a row of all tokens' values
    given: dict[Node, Any] = {graph.points[name]: value for name, value in values.items() if name in wanted}
    leaves = graph.evaluate(program.leaves, {**given, graph.images: images})
    return Captured(kept, leaves, total)


def _places_for_rows(graph: FrozenGraph, program: CompiledCut, batch: int) -> dict[str, Tensor]:
    """Where the rows that are kept of large values go.

    They are made before the run. Small tensors that are made during it come to lie between the large ones of the
    forward, and the allocator then has to ask for new pages in every layer.
    """
    places = {}
    for name in program.points:
        if (rows := program.kept_rows(name)) is not None:
            shape = [batch, *sizes(graph.points[name])[1:]]
            shape[rows[0]] = rows[2]
            places[name] = torch.empty(shape, dtype=program.dtype, device=program.device)
    return places


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
            handles.append(points[name].register_forward_hook(lambda _m, _i, value, name=name: keep(name, value)))
        for name in changed:
            listener = lambda _m, inputs, name=name: keep_before(name, inputs[0])  # noqa: E731
            handles.append(points[name].register_forward_pre_hook(listener))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nearest_points(graph: FrozenGraph, nodes: Iterable[Node]) -> list[Node]:
    """The hook points from which values can be computed without going further back."""
    tags = set(graph.points.values())
    found: dict[Node, None] = {}
    ahead, seen = list(nodes), set()
    while ahead:
        node = ahead.pop()
        if node in seen or node not in graph.live:
            continue
        seen.add(node)
        if node in tags:
            found[node] = None
        else:
            ahead += node.all_input_nodes
    return list(found)


def kept_bytes(graph: FrozenGraph, program: CompiledCut) -> int:
    """Bytes that one image leaves while a program reads it."""
    elements = 0
    for name in program.points:
        shape = list(sizes(graph.points[name])[1:])
        rows = program.kept_rows(name)
        if rows is not None:
            shape[rows[0] - 1] = rows[2]
        elements += torch.Size(shape).numel()
    elements += sum(torch.Size(sizes(node)[1:]).numel() for node in _nearest_points(graph, program.leaves))
    return elements * program.dtype.itemsize
