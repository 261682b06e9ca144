"""Structural clones: a second module tree around the same parameters.

A clone has modules of its own, so that submodules can be replaced and hooks attached without touching the
user's model; but each pair of modules holds the *same* ``_parameters`` and ``_buffers`` dictionaries, so that
``.to()``, ``load_state_dict`` and a replaced parameter on either side reach both.
"""

from collections.abc import Callable, Mapping
from operator import is_, itemgetter
from types import MethodType
from typing import Any

from torch import nn

from vitdecomp_lens.errors import UnsupportedModelError

HOOK_DICTS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_OF_TORCH = frozenset(nn.Module().__dict__)  # `training` among them


def clone_tree(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """Copy a module tree, sharing parameters and buffers.

    A submodule that stands at several places is copied once, and instance attributes that are bound
    methods of a copied module are bound to its copy.

    Args:
        module: The root. It is not changed.
        memo: Filled with the copy of each module, by ``id`` of the original.
    """
    memo = {} if memo is None else memo
    copy = _clone(module, memo)
    for twin in list(memo.values()):
        for name, value in twin.__dict__.items():
            if isinstance(value, MethodType) and id(value.__self__) in memo:
                twin.__dict__[name] = MethodType(value.__func__, memo[id(value.__self__)])
    return copy


def _clone(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    copy = type(module).__new__(type(module))
    copy.__dict__ = dict(module.__dict__)  # the _parameters and _buffers dictionaries stay shared
    memo[id(module)] = copy
    for name in HOOK_DICTS:
        copy.__dict__[name] = module.__dict__[name].copy()
    copy.__dict__["_modules"] = {
        name: None if child is None else _clone(child, memo) for name, child in module._modules.items()
    }
    return copy


def adopt_hooks(wrapper: nn.Module, core: nn.Module) -> None:
    """Move the hooks that a user attached to ``core`` to the module that stands in for it."""
    for name in HOOK_DICTS:
        wrapper.__dict__[name] = core.__dict__[name]
        core.__dict__[name] = type(core.__dict__[name])()


class StructureWatch:
    """Notices when submodules or settings of the original have changed since it was cloned.

    Settings are the numbers, strings, booleans and Nones among a module's attributes, and tuples of those; but for
    ``training``, for the clone has a mode of its own.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> watch = StructureWatch(net)
        >>> watch.check()
        >>> net[1].eps = 0.1
        >>> watch.check()
        Traceback (most recent call last):
            ...
        vitdecomp_lens.errors.UnsupportedModelError: The attribute '1.eps' of the wrapped Sequential was changed ...
    """

    def __init__(self, original: nn.Module) -> None:
        self._root = type(original).__name__
        modules = list(original.named_modules())
        self._children = [
            (path, module._modules, tuple(module._modules), tuple(module._modules.values())) for path, module in modules
        ]
        # The module, not its __dict__: a deep copy of a module has a new one.
        self._settings = [(path, module, names) for path, module in modules if (names := _settings_of(module))]
        self._getters = [(module, _getter(names)) for _, module, names in self._settings]
        self._values = [get(module.__dict__) for module, get in self._getters]

    def check(self) -> None:
        """Raise `UnsupportedModelError` if the original no longer has the submodules and settings that it had.

        Runs before every forward pass, so it compares objects only, and looks closer where one is another.
        """
        for path, children, names, modules in self._children:
            if len(children) != len(names) or (
                names and (tuple(children) != names or not all(map(is_, children.values(), modules)))
            ):
                self._refuse_children(path, children, dict(zip(names, modules, strict=True)))
        try:
            same = all(
                all(map(is_, get(module.__dict__), values))
                for (module, get), values in zip(self._getters, self._values, strict=True)
            )
        except KeyError:  # an attribute that is gone
            same = False
        if not same:
            self._compare_settings()

    def _refuse_children(self, path: str, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
        for name in (*then, *now):
            if now.get(name, self) is not then.get(name, self):
                change = "removed" if name not in now else "replaced" if name in then else "added"
                raise self._error(f"submodule {_below(path, name)!r}", change)
        raise self._error(f"order of the submodules of {path!r}", "changed")

    def _compare_settings(self) -> None:
        """Raise for a setting that is not merely another object of the same value."""
        for (path, module, names), values in zip(self._settings, self._values, strict=True):
            for name, value in zip(names, values, strict=False):  # `_getter` gives one value more
                now = module.__dict__.get(name, self)
                if type(now) is not type(value) or now != value:
                    raise self._error(f"attribute {_below(path, name)!r}", "changed")

    def _error(self, what: str, change: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"The {what} of the wrapped {self._root} was {change} after wrapping, which the hooked model does not "
            f"follow. Wrap the changed module again: HookedViT(module)."
        )


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _settings_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the plain values among a module's attributes, without those that torch keeps for itself."""
    return tuple(name for name, value in module.__dict__.items() if name not in _OF_TORCH and _is_plain(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _getter(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    return itemgetter(*names, names[-1])  # of two names or more it makes a tuple
