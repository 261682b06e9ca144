"""Cuts: from the output back to the points whose values are taken as given."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch.fx import Node

from vitdecomp_lens.coverage import Stop
from vitdecomp_lens.frozen.rules import Passage, classify, has_learned_query, operation


@dataclass(frozen=True)
class Cut:
    """A set of points, and the affine map from their values to the output.

    Attributes:
        root: The output.
        points: The points that the walk met, by name.
        unreached: Names that were asked for and that no path meets before another point of the cut.
        missing: Where the walk stopped although no point of the cut lay there. Empty for a complete cut.
        unknown: Operations without a rule at which the walk stopped: they are sources, and there may be more
            to tell apart behind them.
        order: Every node that the walk passed or stopped at, output first.
        through: For each node that was passed, the inputs in which it is affine and that depend on the images.
    """

    root: Node
    points: Mapping[str, Node]
    unreached: tuple[str, ...]
    missing: tuple[Stop, ...]
    unknown: tuple[Stop, ...]
    order: tuple[Node, ...]
    through: Mapping[Node, tuple[Node, ...]]

    @property
    def complete(self) -> bool:
        """Whether the output is an affine function of the points' values, with everything else frozen."""
        return not self.missing


def module_path(node: Node) -> str:
    """Dotted path of the module in whose forward an operation was traced."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix("module").removeprefix(".")


def walk(
    nodes: Iterable[Node],
    root: Node,
    live: Collection[Node],
    points: Mapping[str, Node] | None,
    *,
    from_images: Collection[Node] | None = None,
) -> Cut:
    """Walk back from ``root`` to the points of a cut; without points, to whatever is nonlinear or reads the images.

    A pattern or a gate is passed only where a point of the cut lies behind it, or where a learned query reads
    the tokens (attention pooling); otherwise it is where the walk stops.

    Args:
        nodes: The graph's, in order.
        root: The output.
        live: Nodes whose values may differ from run to run.
        points: The points of the cut.
        from_images: Nodes that images change, where that is fewer: a learned query that somebody's hook may
            change is a learned query all the same.
    """
    nodes, from_images = list(nodes), live if from_images is None else from_images
    passages = {node: classify(node, live) for node in nodes if node in live}
    wanted = {} if points is None else {node: name for name, node in points.items()}
    behind = _with_a_point_behind(nodes, passages, live, wanted)
    through: dict[Node, tuple[Node, ...]] = {}
    met: dict[str, Node] = {}
    missing: list[Stop] = []
    unknown: list[Stop] = []
    seen = {root}
    for node in reversed(nodes):
        if node not in seen or node not in live:
            continue
        if node in wanted:
            met[wanted[node]] = node
            continue
        passage = passages[node]
        if _stops(node, passage, from_images, behind) or (points is None and _reads_images(passage)):
            stop = Stop(_reported(node), module_path(node), _reason(node, passage))
            if points is None:
                met[_source_name(node, met)] = node
            else:
                missing.append(stop)
            if not passage.known and node.op != "placeholder":
                unknown.append(stop)
            continue
        through[node] = tuple(n for n in passage.through if n in live)
        seen.update(through[node])
    order = tuple(node for node in reversed(nodes) if node in seen and node in live)
    unreached = tuple(name for name in (points or {}) if name not in met)
    return Cut(root, met, unreached, tuple(missing), tuple(unknown), order, through)


def _with_a_point_behind(
    nodes: list[Node], passages: Mapping[Node, Passage], live: Collection[Node], wanted: Mapping[Node, str]
) -> set[Node]:
    """Nodes from which a point of the cut can be reached when patterns and gates are passed."""
    behind = set(wanted)
    for node in nodes:
        if node in passages and node not in behind and any(n in behind for n in passages[node].through):
            behind.add(node)
    return behind


def _stops(node: Node, passage: Passage, from_images: Collection[Node], behind: Collection[Node]) -> bool:
    if passage.kind == "source":
        return True
    if passage.kind in ("pattern", "gate"):
        learned = passage.kind == "pattern" and has_learned_query(node, from_images)
        return not (learned or any(n in behind for n in passage.through))
    return False


def _reads_images(passage: Passage) -> bool:
    # The embedding as a source of its own tells more, and is far smaller, than the pixels behind it.
    return any(n.op == "placeholder" for n in passage.through)


def _reported(node: Node) -> str:
    """The operation; of one of several outputs, the operation that gave them."""
    several = node.args[0] if operation(node) == "getitem" else node
    return operation(several) if isinstance(several, Node) else operation(node)


def _reason(node: Node, passage: Passage) -> str:
    if node.op == "placeholder":
        return "the images themselves"
    if not passage.known:
        return "unknown operation"
    return "nonlinear" if passage.kind == "source" else f"{passage.kind} with no point of the cut behind it"


def _source_name(node: Node, taken: Collection[str]) -> str:
    """A name for a source: module path and operation, numbered where a module has several."""
    if node.op == "placeholder":
        return "images"
    name = f"{module_path(node)}:{operation(node).removeprefix('aten::')}"
    number = sum(1 for other in taken if other == name or other.startswith(f"{name}#"))
    return f"{name}#{number}" if number else name
