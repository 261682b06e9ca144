"""Hook points: TransformerLens' own, and one that changes how its owner computes.

Most hook points sit on values that a model computes anyway. A few sit on values that only exist on a slower
path (the attention pattern of a fused attention, the statistics of a native norm). Their owner takes that path
only while they are hooked, so the traced graph depends on which of them are.
"""

from collections.abc import Collection, Mapping

from torch import Tensor, nn
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from transformer_lens.hook_points import HookPoint

OF_MODULES = ("hook_in", "hook_out")  # a bridge's names for what any module takes and gives


class LazyHookPoint(HookPoint):
    """A hook point whose owner takes another path of computation only while it is hooked."""


def is_hooked(point: HookPoint) -> bool:
    """Whether anything listens at ``point``.

    >>> is_hooked(HookPoint())
    False
    """
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks)


def hook_points(module: nn.Module) -> dict[str, HookPoint]:
    """Every hook point of ``module`` by its name, as TransformerLens names it.

    That is a module's path, but where ``hook_dict`` has other names: a bridge's hook points lie within the modules that
    it wraps. Of several, the first that says more than that a module takes or gives a value.
    """
    paths = {name: child for name, child in module.named_modules() if isinstance(child, HookPoint)}
    named = getattr(module, "hook_dict", None)
    if not isinstance(named, Mapping) or all(named.get(name) is point for name, point in paths.items()):
        return paths
    names: dict[int, str] = {}
    for name in sorted(named, key=lambda name: name.rpartition(".")[2] in OF_MODULES):
        if paths.get(name, named[name]) is named[name]:  # no two points may have one name
            names.setdefault(id(named[name]), name)
    return {names.get(id(point), path): point for path, point in paths.items()}


def as_hooks_see_it(point: HookPoint, value: Tensor) -> Tensor:
    """A value in the layout that TransformerLens shows to a point's hooks: a bridge's have heads apart."""
    converted = _invertible(point)
    return value if converted is None else converted.convert(value)


def as_it_was(point: HookPoint, shown: Tensor) -> Tensor:
    """What hooks saw, in the layout of the module."""
    converted = _invertible(point)
    return shown if converted is None else converted.revert(shown)


def _invertible(point: HookPoint) -> BaseTensorConversion | None:
    """A point's conversion, where it says how to go back; TransformerLens has others that only look."""
    conversion = point.hook_conversion
    if conversion is None or type(conversion).revert is BaseTensorConversion.revert:
        return None
    return conversion


def on_the_path(points: Mapping[str, HookPoint], listened: Collection[str] = ()) -> dict[str, HookPoint]:
    """The points that a run passes: all but the lazy ones that nothing listens at, or is going to listen at."""
    return {
        name: point
        for name, point in points.items()
        if not isinstance(point, LazyHookPoint) or is_hooked(point) or name in listened
    }
