"""The slow way: run the frozen graph again from given source values. The oracle for everything fast.

An operation on the path is replayed on the values that arrive, with everything frozen taken from a recorded
run: the other factor of a product by the recorded value, 1/σ and the arg-max from the recorded input.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vitdecomp_lens.frozen.rules import SPLITS, argument, operation

Replay = Callable[[Node, Tensor, Tensor, Callable[[Any], Any]], Tensor]
REPLAYS: dict[str, Replay] = {}


def replay(*names: str) -> Callable[[Replay], Replay]:
    """Register how operations are replayed where running them again would unfreeze them."""

    def register(function: Replay) -> Replay:
        REPLAYS.update(dict.fromkeys(names, function))
        return function

    return register


# What keeps values as they are. Run again, a change of dtype would round and a detach would stop derivatives.
_KEEPS_VALUES = frozenset({"aten::to", "aten::_to_copy", "aten::type_as", "aten::detach", "vitdecomp_lens::tag"})


def replayed(node: Node, through: Sequence[Node], moving: Mapping[Node, Tensor], recorded: Mapping[Node, Any]) -> Any:
    """The value of one frozen operation: ``moving`` at ``through``, everything else as ``recorded``.

    An input may be on the path elsewhere and yet be frozen here, such as a gate that is also added.
    """

    def value(item: Any) -> Any:
        return map_arg(item, lambda n: moving[n] if n in through else recorded[n])

    name = operation(node)
    if name in _KEEPS_VALUES:  # a constant at which somebody's hook listens is passed from nowhere
        return moving[through[0]] if through else recorded[node.all_input_nodes[0]]
    several = node.args[0] if name == "getitem" else None
    if isinstance(several, Node) and operation(several) in SPLITS:
        return several.target(*value(several.args), **value(several.kwargs))[node.args[1]]  # type: ignore[operator]
    special = REPLAYS.get(name if several is None else operation(several))  # type: ignore[arg-type]
    if special is not None:
        frozen = node if several is None else several
        return special(frozen, moving[through[0]], recorded.get(through[0]), value)  # type: ignore[arg-type]
    return node.target(*value(node.args), **value(node.kwargs))  # type: ignore[operator]


def needs_the_recorded_input(node: Node) -> bool:
    """Whether `replayed` looks at the recorded value of what the operation is passed through."""
    name = operation(node.args[0]) if operation(node) == "getitem" else operation(node)  # type: ignore[arg-type]
    return name in REPLAYS and name not in _WITHOUT_STATISTICS


def inverse_deviation(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """1/σ with the biased variance, at least in float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide.var(dims, unbiased=False, keepdim=True) + eps).rsqrt()


def inverse_root_mean_square(x: Tensor, dims: tuple[int, ...], eps: float | None) -> Tensor:
    """1/RMS, at least in float32; without an eps, torch's own default."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide.square().mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()


def norm_dims(node: Node) -> tuple[int, ...]:
    """The trailing dimensions that a LayerNorm or RMSNorm works on."""
    return tuple(range(-len(node.args[1]), 0))  # type: ignore[arg-type]


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@replay("aten::layer_norm")
def layer_norm(node: Node, x: Tensor, seen: Tensor, value: Callable[[Any], Any]) -> Tensor:
    """(x - mean x) / σ(seen) γ + β."""
    dims = norm_dims(node)
    inverse = inverse_deviation(seen, dims, argument(node, 4, "eps", 1e-5))
    weight, bias = value(argument(node, 2, "weight")), value(argument(node, 3, "bias"))
    return _affine((x - x.mean(dims, keepdim=True)) * inverse, weight, bias)


@replay("aten::rms_norm")
def rms_norm(node: Node, x: Tensor, seen: Tensor, value: Callable[[Any], Any]) -> Tensor:
    """X / RMS(seen) γ."""
    inverse = inverse_root_mean_square(seen, norm_dims(node), argument(node, 3, "eps"))
    return _affine(x * inverse, value(argument(node, 2, "weight")), None)


@replay("aten::group_norm")
def group_norm(node: Node, x: Tensor, seen: Tensor, value: Callable[[Any], Any]) -> Tensor:
    """LayerNorm over the channels and positions of each group."""
    groups, eps = argument(node, 1, "num_groups"), argument(node, 4, "eps", 1e-5)
    split = (x.shape[0], groups, -1)
    inverse = inverse_deviation(seen.reshape(split), (-1,), eps)
    moved = x.reshape(split)
    y = ((moved - moved.mean(-1, keepdim=True)) * inverse).reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    weight, bias = (value(argument(node, place, name)) for place, name in ((2, "weight"), (3, "bias")))
    return _affine(y, *(None if p is None else p.reshape(per_channel) for p in (weight, bias)))


@replay("aten::max_pool2d", "aten::max_pool2d_with_indices")
def max_pool2d(node: Node, x: Tensor, seen: Tensor, value: Callable[[Any], Any]) -> Tensor:
    """The entries that were largest in ``seen``."""
    settings = [value(a) for a in node.args[1:]]
    return _picked(x, *torch.ops.aten.max_pool2d_with_indices(seen, *settings))


@replay("aten::adaptive_max_pool2d")
def adaptive_max_pool2d(node: Node, x: Tensor, seen: Tensor, value: Callable[[Any], Any]) -> Tensor:
    """The entries that were largest in ``seen``."""
    return _picked(x, *torch.ops.aten.adaptive_max_pool2d(seen, node.args[1]))


def _picked(x: Tensor, pooled: Tensor, places: Tensor) -> Tensor:
    return x.flatten(2).gather(2, places.flatten(2)).reshape(pooled.shape)


_MERE_RESHAPES = frozenset({"aten::view", "aten::_unsafe_view"})
_WITHOUT_STATISTICS = _MERE_RESHAPES | {"aten::var_mean"}


@replay("aten::var_mean")
def mean_of_several(node: Node, x: Tensor, seen: Tensor | None, value: Callable[[Any], Any]) -> Tensor:
    """Of variance and mean the mean, which is linear."""
    dims, keep = argument(node, 1, "dim"), argument(node, 3, "keepdim", False)
    return x.mean(dims, keepdim=keep)


@replay(*_MERE_RESHAPES)
def view(node: Node, x: Tensor, seen: Tensor | None, value: Callable[[Any], Any]) -> Tensor:
    """A reshape: what is replayed may lie otherwise in memory than what was recorded."""
    return x.reshape(value(argument(node, 1, "size")))


@replay("aten::amax")
def amax(node: Node, x: Tensor, seen: Tensor, value: Callable[[Any], Any]) -> Tensor:
    """The entries that were largest in ``seen``; the mean of those that tie, as torch's derivative has it."""
    dims, keep = argument(node, 1, "dim", []) or tuple(range(seen.dim())), argument(node, 2, "keepdim", False)
    largest = (seen == seen.amax(dims, keepdim=True)).to(x.dtype)
    return (x * largest / largest.sum(dims, keepdim=True)).sum(dims, keepdim=keep)
