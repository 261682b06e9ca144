"""What an exported graph is rid of: contexts that are entered, and operations that work in place."""

from typing import Any

import torch
from torch.fx import Graph, Node

from vitdecomp_lens.errors import UnsupportedModelError
from vitdecomp_lens.frozen.rules import SPLITS, operation
from vitdecomp_lens.frozen.walk import module_path


def inline_contexts(graph: Graph) -> None:
    """Put the bodies of contexts (``torch.no_grad``, ``torch.autocast(enabled=False)``) where they are entered.

    Frozen graphs run without either anyway. An autocast that is on stays an operation of its own, a source.
    """
    for node in list(graph.nodes):
        name = operation(node)
        if name == "wrap_with_set_grad_enabled":
            body, inputs = node.args[1], node.args[2:]
        elif name == "wrap_with_autocast" and node.args[2] is False:
            body, inputs = node.args[4], node.args[5:]
        else:
            continue
        inner = getattr(graph.owning_module, body.target).graph
        known: dict[Node, Any] = dict(zip((n for n in inner.nodes if n.op == "placeholder"), inputs, strict=True))
        with graph.inserting_before(node):
            outputs = graph.graph_copy(inner, known)
        for user in list(node.users):  # each takes one of the outputs
            user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)


def make_functional(graph: Graph) -> None:
    """Turn operations that work in place into those that do not: values of a graph are looked at later.

    Raises:
        UnsupportedModelError: If something written in place is read afterwards through another view of it.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not is_in_place(node):
            continue
        changed = node.args[0]
        assert isinstance(changed, Node)
        for view in _sharing_memory(changed) - {changed}:
            if order[view] >= order[node] or operation(view) in SPLITS:  # of a split only its outputs are read
                continue
            late = next((user for user in view.users if order[user] > order[node] and user is not node), None)
            if late is not None and not (_apart(view, changed) or is_in_place(late)):
                raise UnsupportedModelError(
                    f"{operation(node)} in {module_path(node) or 'the model itself'} writes in place to memory that"
                    f" {operation(late)} reads afterwards through another view. Make it work on a copy: in place of"
                    " x[:, 0] = y, for example torch.cat([y[:, None], x[:, 1:]], dim=1)."
                )
        base = operation(node).removeprefix("aten::").removesuffix("_")
        node.target = getattr(getattr(torch.ops.aten, base), node.target._overloadname)
        for user in list(changed.users):
            if order[user] > order[node]:
                user.replace_input_with(changed, node)


def is_in_place(node: Node) -> bool:
    """Whether an operation writes to its first argument."""
    name = operation(node)
    return name.startswith("aten::") and name.endswith("_") and not name.endswith("__")


def _viewed(node: Node) -> Node | None:
    """What a node is a view of: by the aliases that its schema declares."""
    if operation(node) == "getitem":
        return _viewed(node.args[0])  # type: ignore[arg-type]
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments or schema.arguments[0].alias_info is None:
        return None
    return node.args[0] if isinstance(node.args[0], Node) else None


def _sharing_memory(node: Node) -> set[Node]:
    """All views of what a node is a view of."""
    found, ahead = set(), [node]
    while ahead:
        n = ahead.pop()
        if n in found:
            continue
        found.add(n)
        base = _viewed(n)
        ahead += [] if base is None else [base]
        several = [u for u in n.users if u.args and u.args[0] is n and _viewed(u) is n]
        ahead += several
        ahead += [item for u in several for item in u.users if operation(item) == "getitem"]
    return found


def _apart(one: Node, other: Node) -> bool:
    """Whether two views are different outputs of the same split."""
    both = [n for n in (one, other) if operation(n) == "getitem"]
    return len(both) == 2 and one.args[0] is other.args[0] and bool(one.args[1] != other.args[1])
