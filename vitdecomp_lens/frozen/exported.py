"""What an exported graph is rid of: contexts that are entered, and operations that work in place."""

from typing import Any

import torch
from torch.fx import Graph, Node

from vitdecomp_lens.errors import UnsupportedModelError
from vitdecomp_lens.frozen.rules import SPLITS, argument, operation
from vitdecomp_lens.frozen.walk import module_path

aten = torch.ops.aten


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

    What is written through a view (``x[:, 0] = y``) becomes a new value of what it is a view of, and other views that
    are read afterwards are taken of that.

    Raises:
        UnsupportedModelError: If something is written through what may be a view or a copy, and read afterwards.
    """
    order = {node: float(place) for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if is_in_place(node):
            _Write(graph, node, order).replace()


class _Write:
    """One operation that works in place, ``node``, and what becomes of the views that share its memory."""

    def __init__(self, graph: Graph, node: Node, order: dict[Node, float]) -> None:
        self.graph, self.node, self.order, self.last = graph, node, order, node
        changed = node.args[0]
        assert isinstance(changed, Node)
        self.changed = changed
        self.new = {changed: node}
        self.inserted: set[Node] = set()

    def replace(self) -> None:
        """Do without the write."""
        shared = [v for v in _sharing_memory(self.changed) if self.order[v] < self.order[self.node]]
        read = [v for v in shared if operation(v) not in SPLITS and self._later(v)]
        elsewhere = [v for v in read if v is not self.changed and not _apart(v, self.changed)]
        _without_writing(self.graph, self.node, self.order)
        if elsewhere:
            self._write_back()
            for view in read:  # views of one value, so that a later write through any of them reaches the others
                self._renewed(view)
            if self._later(self.node):  # it returned what it changed
                self.new[self.node] = self._renewed(self.changed)
        for view, value in self.new.items():
            for user in self._later(view):
                user.replace_input_with(view, value)

    def _later(self, view: Node) -> list[Node]:
        after = self.order[self.node]
        return [user for user in view.users if self.order[user] > after and user not in self.inserted]

    def _write_back(self) -> None:
        """The new value of what was written to, from view to view."""
        view, value = self.changed, self.node
        while (base := _viewed(view)) is not None:
            view, value = base, self._insert(*self._put_back(view, base, value), like=base)
        self.new = {view: value}

    def _renewed(self, view: Node) -> Node:
        """A view of what was written, taken again."""
        if view not in self.new:
            base = view.args[0]
            assert isinstance(base, Node)
            self.new[view] = self._insert(view.target, (self._renewed(base), *view.args[1:]), view.kwargs, like=view)
        return self.new[view]

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: Any = None, *, like: Node) -> Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_function(target, args, kwargs)
        self.last.meta = {**self.node.meta, "val": like.meta["val"]}
        self.inserted.add(self.last)
        self.order[self.last] = self.order[self.node] + len(self.inserted) / 1024
        return self.last

    def _put_back(self, view: Node, base: Node, value: Node) -> tuple[Any, tuple[Any, ...]]:
        """The operation that makes the new value of ``base`` from that of a view of it."""
        name, rest = operation(view).removeprefix("aten::"), view.args[1:]
        if name == "getitem":
            return _put_back_one_of_several(view, base, value)
        if name in ("select", "slice"):
            target = aten.select_scatter.default if name == "select" else aten.slice_scatter.default
            return target, (base, value, *rest)
        if name == "permute":
            order = [dim % len(rest[0]) for dim in rest[0]]  # type: ignore[arg-type, operator, union-attr]
            return view.target, (value, [order.index(dim) for dim in range(len(order))])
        if name in ("transpose", "swapaxes", "t", "mT", "numpy_T"):
            return view.target, (value, *rest)
        if name in ("view", "view_as", "reshape_as", "squeeze", "unsqueeze", "unflatten"):
            return aten.reshape_as.default, (value, base)
        if name in ("alias", "detach"):
            return aten.alias.default, (value,)
        raise UnsupportedModelError(
            f"{operation(self.node)} in {module_path(self.node) or 'the model itself'} writes in place to what"
            f" {operation(view)} gave, which may share memory with what is read afterwards. Make it work on a copy:"
            " in place of x[:, 0] = y, for example torch.cat([y[:, None], x[:, 1:]], dim=1)."
        )


def _put_back_one_of_several(view: Node, base: Node, value: Node) -> tuple[Any, tuple[Any, ...]]:
    several, number = view.args
    assert isinstance(several, Node)
    if operation(several) == "aten::unbind":
        return aten.select_scatter.default, (base, value, argument(several, 1, "dim", 0), number)
    dim = argument(several, 2, "dim", 0) % base.meta["val"].dim()
    outputs = several.meta["val"]
    first = sum(int(o.shape[dim]) for o in outputs[:number])
    last = first + int(outputs[number].shape[dim])
    return aten.slice_scatter.default, (base, value, dim, first, last)


def _without_writing(graph: Graph, node: Node, order: dict[Node, float]) -> None:
    """Replace an operation in place by the one that only returns its outcome."""
    base, changed = operation(node).removeprefix("aten::").removesuffix("_"), node.args[0]
    assert isinstance(changed, Node)
    if base == "zero":
        node.target = aten.zeros_like.default
    elif base == "fill" and not isinstance(node.args[1], Node):
        node.target = aten.full_like.default
    elif base in ("copy", "fill"):  # only the shape and the dtype of what was there matter
        source = node.args[1]
        assert isinstance(source, Node)
        if source.meta["val"].dtype != changed.meta["val"].dtype:
            with graph.inserting_before(node):
                cast = graph.call_function(aten.type_as.default, (source, changed))
            cast.meta = dict(source.meta)
            order[cast] = order[node] - 1 / 2
            source = cast
        node.target, node.args, node.kwargs = aten.expand_as.default, (source, changed), {}
    else:
        node.target = getattr(getattr(aten, base), node.target._overloadname)  # type: ignore[union-attr]


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
