"""Hook points: TransformerLens' own, and one that changes how its owner computes.

Most hook points sit on values that a model computes anyway. A few sit on values that only exist on a slower
path (the attention pattern of a fused attention, the statistics of a native norm). Their owner takes that path
only while they are hooked, so the traced graph depends on which of them are.
"""

from collections.abc import Collection, Mapping

from torch import nn
from transformer_lens.hook_points import HookPoint


class LazyHookPoint(HookPoint):
    """A hook point whose owner takes another path of computation only while it is hooked."""


def is_hooked(point: HookPoint) -> bool:
    """Whether anything listens at ``point``.

    >>> is_hooked(HookPoint())
    False
    """
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks)


def hook_points(module: nn.Module) -> dict[str, HookPoint]:
    """Every hook point of ``module`` by its name, as TransformerLens names it."""
    return {name: child for name, child in module.named_modules() if isinstance(child, HookPoint)}


def on_the_path(points: Mapping[str, HookPoint], listened: Collection[str] = ()) -> dict[str, HookPoint]:
    """The points that a run passes: all but the lazy ones that nothing listens at, or is going to listen at."""
    return {
        name: point
        for name, point in points.items()
        if not isinstance(point, LazyHookPoint) or is_hooked(point) or name in listened
    }
