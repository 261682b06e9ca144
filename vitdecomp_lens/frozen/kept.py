"""What is kept of a module's traces, and what makes a kept trace stale.

A trace is kept on its module, with all that steered it. It is stale once any of that is another thing, or was
changed in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.frozen.graph import FrozenGraph

MOST_KEPT = 16  # traces a module; each is a graph without weights


@dataclass
class Kept:
    """A trace, what it was asked for by, and what else steered it."""

    key: tuple[Any, ...]
    state: list[Any] = field(repr=False)
    graph: FrozenGraph


class Traces(list[Kept]):
    """Traces, kept on the module itself: both refer to each other, and go together.

    A copied or pickled module starts without any.
    """

    def __deepcopy__(self, memo: Any) -> "Traces":
        return Traces()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return list, ()


_ATTRIBUTE = "_vitdecomp_lens_traces"


def traces_of(module: nn.Module) -> Traces:
    """The traces that are kept on a module, oldest first."""
    kept = module.__dict__.get(_ATTRIBUTE)
    if not isinstance(kept, Traces):
        kept = module.__dict__[_ATTRIBUTE] = Traces()
    return kept


_HOOKS = frozenset({"_forward_pre_hooks", "_forward_hooks"})
_WEIGHTS = frozenset({"_parameters", "_buffers"})
_BOOKS = {_ATTRIBUTE, "context_level", "is_caching"}  # the last two TransformerLens keeps while hooks are on
_SIMPLE = frozenset({type(None), bool, int, float, str})
_STEERS_NOTHING = frozenset(nn.Module().__dict__) - {"training", *_HOOKS, *_WEIGHTS} | _BOOKS


def state_of(module: nn.Module) -> list[Any]:
    """All that steers a forward besides weights: modules, their hooks, and attributes (heads, scales, fused or not).

    The things themselves, not their ids: an id is given again once its owner is gone.
    """
    found: list[Any] = [module]
    ahead, seen = [module], {module}
    while ahead:  # as modules() does, without their names: this runs at every request
        child = ahead.pop()
        if child._modules:  # of a hook point, what stands there
            found += child._modules.values()  # where a module is used once more, too
            new = {m: None for m in child._modules.values() if m is not None and m not in seen}
            seen.update(new)
            ahead += new
        if isinstance(child, HookPoint):
            continue
        for name, value in child.__dict__.items():
            if name in _STEERS_NOTHING:  # nearly all names do
                continue
            if name in _HOOKS:
                found += value.values()
            elif name in _WEIGHTS:  # which there are; their values are read anew
                found += [item for key, tensor in value.items() for item in (key, tensor is None)]
            else:
                found.append(name)
                if type(value) in _SIMPLE:  # nearly all are
                    found.append(value)
                else:
                    _collect(value, found)
    return found


def closed_over(of: object) -> list[Any]:
    """What a function of the user's reads besides its arguments."""
    found: list[Any] = []
    if isinstance(of, FunctionType):
        _collect(of.__defaults__, found)
        _collect([cell.cell_contents for cell in of.__closure__ or ()], found)
        _collect([of.__globals__.get(name) for name in of.__code__.co_names], found)
    return found


_PLAIN = (type(None), bool, int, float, str, nn.Module, torch.dtype)


def _collect(value: Any, found: list[Any]) -> None:
    """Flatten containers, so that what is changed inside of them is seen."""
    if isinstance(value, _PLAIN):
        found.append(value)
    elif isinstance(value, Mapping):
        found.append(len(value))
        for name, item in value.items():
            found.append(name)
            _collect(item, found)
    elif isinstance(value, list | tuple):
        found.append(len(value))
        for item in value:
            _collect(item, found)
    elif isinstance(value, set | frozenset):
        found.append(frozenset(value))
    elif is_dataclass(value) and not isinstance(value, type):
        _collect(vars(value), found)
    elif isinstance(value, Tensor):
        found += (value, 0 if value.is_inference() else value._version)
    elif isinstance(value, MethodType):  # made anew at each access
        found += (value.__func__, value.__self__)
    else:
        found.append(value)


_COMPARED = (bool, int, float, complex, str, bytes, frozenset, torch.dtype, torch.device)


def same_state(kept: list[Any], now: list[Any]) -> bool:
    """Whether nothing that steered a trace has changed since."""
    return len(kept) == len(now) and all(map(_is_same, kept, now))


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, _COMPARED) and one == other)
