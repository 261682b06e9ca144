"""Writing into a run, and reading from it: hooks that are gone when the ``with`` block ends, however it ends."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.components import Point
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.frozen.trace import Read, reading
from vitdecomp_lens.intervening.subject import Spot
from vitdecomp_lens.points import as_hooks_see_it, as_it_was, hook_points


@contextmanager
def listening(
    points: Mapping[str, HookPoint], hooks: Iterable[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While inside, see what a run has at hooks, after all hooks that are there already."""

    def listen(name: str, point: HookPoint, _inputs: Any, value: Tensor) -> None:
        see(name, as_hooks_see_it(point, value))

    with _registered((points[name], partial(listen, name)) for name in dict.fromkeys(hooks)):
        yield


@contextmanager
def editing(points: Mapping[str, HookPoint], spots: Sequence[Spot], values: Mapping[str, Tensor]) -> Iterator[set[str]]:
    """While inside, write values in place of what components have, after all hooks that are there already.

    Args:
        points: The model's hook points.
        spots: Which components.
        values: For each hook what to write, of a shape that broadcasts to that of the hook's value.

    Yields:
        The hooks that were passed so far.
    """
    at: dict[str, list[Spot]] = {}
    for spot in spots:
        at.setdefault(spot.point.hook, []).append(spot)
    passed: set[str] = set()

    def edit(name: str, point: HookPoint, _inputs: Any, value: Tensor) -> Tensor:
        passed.add(name)
        return as_it_was(point, written(as_hooks_see_it(point, value), at[name], values[name]))

    with _registered((points[name], partial(edit, name)) for name in at):
        yield passed


@contextmanager
def _registered(hooks: Iterable[tuple[HookPoint, Callable[..., Any]]]) -> Iterator[None]:
    handles = []
    try:
        for point, hook in hooks:
            handles.append(point.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def written(value: Tensor, spots: Sequence[Spot], replacement: Tensor) -> Tensor:
    """A hook's value with some components replaced; the value itself stays as it is."""
    point = spots[0].point
    _refuse_other_shape(value, replacement, point)
    full = replacement.to(value).expand_as(value)
    if any(spot.index is None for spot in spots):
        return full.clone()
    assert point.axis is not None
    for spot in spots:
        if spot.index is not None and spot.index >= value.shape[point.axis]:
            held = point.components(value.shape[point.axis])
            raise UnknownNameError(
                f"There is no component {spot.component.label!r}: {point.hook} has {len(held)}, from"
                f" {held[0].label!r} to {held[-1].label!r}."
            )
    rows = torch.tensor([spot.index for spot in spots], device=value.device)
    return value.index_copy(point.axis, rows, full.index_select(point.axis, rows))


def _refuse_other_shape(value: Tensor, replacement: Tensor, point: Point) -> None:
    sizes = zip(replacement.shape, value.shape, strict=False)
    if not replacement.dim() or (replacement.dim() == value.dim() and all(mine in (1, size) for mine, size in sizes)):
        return
    if replacement.shape[:1] not in ((1,), value.shape[:1]):
        what = "each image has a value of its own to be given, so run on all of the images at once"
    else:
        what = "give reference images of the same size, and statistics of the same model, or how='mean'"
    raise InputError(
        f"Expected at {point.hook} values {list(replacement.shape)}, as they are to be written; the run has"
        f" {list(value.shape)}: {what}."
    )


def refuse_unpassed(passed: Iterable[str], wanted: Iterable[str], module: nn.Module) -> None:
    """Refuse hooks that a run did not pass: nothing was edited there.

    Raises:
        InputError: Naming the first.
    """
    if missing := [hook for hook in dict.fromkeys(wanted) if hook not in set(passed)]:
        raise InputError(
            f"The forward of {type(module).__name__} never passes the hook {missing[0]!r}, so that nothing can be"
            " edited there. Name a hook that it passes."
        )


# --- what is read --------------------------------------------------------------------------------------------


def reader(module: nn.Module, of: Read | None) -> Callable[[Tensor], Any]:
    """A function that runs a model on images and returns what is asked for.

    Args:
        module: The model.
        of: As for `vitdecomp_lens.decompose.decompose`; None for what the model returns.

    Raises:
        UnknownNameError: If there is no such hook.
    """
    if of is None:
        return module
    points = hook_points(module)
    read, hook = reading("representation" if of == "embedding" else of, points)
    run = partial(read, module) if hook is None else partial(_read_at, module, points, hook)
    return run if of != "embedding" else lambda images: _of_unit_length(run(images))


def _read_at(module: nn.Module, points: Mapping[str, HookPoint], hook: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with listening(points, [hook], lambda _name, value: seen.append(value.clone())):  # a later hook may write in place
        module(images)
    refuse_unpassed([hook] if seen else [], [hook], module)
    return seen[-1]


def _of_unit_length(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def joined(outputs: Sequence[Any]) -> Any:
    """What micro-batches gave, as one: tensors, or tuples and lists of them, one behind the other.

    Raises:
        InputError: If it is something else.
    """
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if type(first) in (tuple, list):
        return type(first)(joined(several) for several in zip(*outputs, strict=True))
    raise InputError(
        f"Outputs of several micro-batches can be put together where they are tensors; the model returns"
        f" {type(first).__name__}. Leave batch_size= out, or name what to read with of=."
    )
