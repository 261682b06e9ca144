"""Structural clones: a second module tree around the same parameters.

A clone has modules of its own, so that submodules can be replaced and hooks attached without touching the
user's model; but each pair of modules holds the *same* ``_parameters`` and ``_buffers`` dictionaries, so that
``.to()``, ``load_state_dict`` and a replaced parameter on either side reach both.
"""

from types import MethodType

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
    """Notices when a submodule of the original has been replaced since it was cloned.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> watch = StructureWatch(net)
        >>> watch.check()
        >>> net[0] = nn.Identity()
        >>> watch.check()
        Traceback (most recent call last):
            ...
        vitdecomp_lens.errors.UnsupportedModelError: The submodule '0' of the wrapped Sequential was ...
    """

    def __init__(self, original: nn.Module) -> None:
        self._root = type(original).__name__
        self._seen = [
            (parent._modules, name, child, f"{path}.{name}" if path else name)
            for path, parent in original.named_modules()
            for name, child in parent._modules.items()
        ]

    def check(self) -> None:
        """Raise `UnsupportedModelError` if the original no longer has the submodules it had."""
        for children, name, child, path in self._seen:
            if children.get(name) is not child:
                raise UnsupportedModelError(
                    f"The submodule {path!r} of the wrapped {self._root} was replaced after wrapping, so the "
                    f"hooked model would still run the old one. Wrap the changed module again: HookedViT(module)."
                )
