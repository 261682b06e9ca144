"""Adjoint of attention: values that are read through a frozen pattern.

Only the rows of the pattern that A reads are made: kept where they are few, else made again in pieces at each use.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints.registry import Adjoint, Passed, adjoint, aligned
from vitdecomp_lens.frozen.pairs import NoFastPathError, Pairs, settle
from vitdecomp_lens.frozen.rules import argument, sizes


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
    return [(value, through_pattern(node, pairs, on, rows_of, operands))]  # type: ignore[list-item, arg-type]


def _repeated(constant: Tensor, like: Tensor) -> Tensor:
    """A constant that was made for one image, where windows are folded behind the batch: the same for each."""
    windows = constant.shape[0]
    return constant if windows in (1, like.shape[0]) else constant.repeat(like.shape[0] // windows, 1, 1, 1)


MOST_ROWS_BYTES = 16 << 20  # the pattern is rebuilt in pieces of at most this size


def through_pattern(
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
        shape = (batch, heads, rows, keys)
        slots = [_leaf_of_rows(on, operands, f"rows {read} of {node.name}", rows_of, read, shape)]
    else:
        slots = [_leaf_or_constant(on, operand) for operand in operands]

    def mixed(a: Tensor, *values: Tensor) -> Tensor:
        weights = a[:, :, :, read, 0].unsqueeze(3)  # [r, batch, head or 1, 1, query]
        step = max(1, MOST_ROWS_BYTES // (a.element_size() * weights.shape[1] * max(1, rows * keys)))
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
    value = aligned(on.value(operand), 4)
    return on.tape.step(lambda: value)


def _leaf_of_rows(
    on: Adjoint,
    operands: Sequence[Node],
    what: str,
    rows_of: Callable[..., Tensor],
    read: slice,
    shape: Sequence[int],
) -> int:
    constants = [None if n in on.live else aligned(on.value(n), 4) for n in operands]

    def rows(*values: Tensor) -> Tensor:
        several = iter(values)
        return rows_of(read, *(next(several) if constant is None else constant for constant in constants))

    return on.tape.leaf(tuple(n for n in operands if n in on.live), what, rows, shape)


def _read_rows(a: Tensor) -> slice:
    """The queries that A, ``[r, batch, head, query, 1]``, reads: from the first to the last."""
    read = a.flatten(0, 2)[..., 0].ne(0).any(0).nonzero()[:, 0]
    return slice(int(read[0]), int(read[-1]) + 1) if len(read) else slice(0, 0)
