"""Products with weights that fold the batch away, done without."""

import torch
from torch.fx import Graph, Node

from vitdecomp_lens.frozen.rules import operation, sizes

FOLDS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape"})


def unfold_batches(graph: Graph) -> None:
    """Turn fold, linear, unfold into the linear alone: it reads the last dimension, whatever the others are.

    torch's own multi-head attention folds tokens *before* the batch, where no pair of the adjoint could tell images
    apart.
    """
    for node in list(graph.nodes):
        if operation(node) == "aten::linear" and _folds(node.args[0]):
            for user in list(node.users):
                _without_folding(graph, node, user)
    graph.eliminate_dead_code()


def _folds(value: object) -> bool:
    return isinstance(value, Node) and operation(value) in FOLDS and len(sizes(value)) == 2


def _without_folding(graph: Graph, linear: Node, user: Node) -> None:
    folded, *weights = linear.args
    source = folded.args[0]  # type: ignore[union-attr]
    leading = sizes(user)[:-1]
    same_rows = operation(user) in FOLDS and sizes(source)[: len(leading)] == leading  # type: ignore[arg-type]
    if not same_rows or sizes(user)[-1] != sizes(linear)[-1]:
        return
    width = sizes(folded)[-1]  # type: ignore[arg-type]
    value = folded.meta["val"]  # type: ignore[union-attr]
    leading_sizes = list(user.args[1])[:-1]  # type: ignore[arg-type]
    with graph.inserting_before(user):
        rows = graph.call_function(torch.ops.aten.reshape.default, (source, [*leading_sizes, width]))
        whole = graph.call_function(torch.ops.aten.linear.default, (rows, *weights), linear.kwargs)
    rows.meta = {**folded.meta, "val": value.new_empty((*user.meta["val"].shape[:-1], width))}  # type: ignore[union-attr]
    whole.meta = {**linear.meta, "val": user.meta["val"]}
    user.replace_all_uses_with(whole)
