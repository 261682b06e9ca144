"""Hook points, and the three ways in which a value reaches one.

`fire` passes a value through a hook point only while something is attached to it, so that an unused hook
costs a dictionary lookup. `OutputTap` and `InputTap` are module hooks that bring the output or input of a
library module to a hook point: the library's own ``forward`` stays in charge.
"""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.points import is_hooked


class CopyingHookPoint(HookPoint):
    """A hook point that hands out a copy, for values that something else still holds.

    The residual stream before a block is the same tensor as after the one before it, and a position
    embedding is a parameter: a hook that writes in place must reach neither.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return a copy of the value."""
        return x.clone()


SPLICE = "splice"  # of a hook point's attributes: what stands there (`splicing`)


def is_used(point: HookPoint) -> bool:
    """Whether a value has to pass the hook point: something is attached to it, or a module stands there."""
    return is_hooked(point) or SPLICE in point.__dict__


def any_hooked(points: Iterable[HookPoint]) -> bool:
    """Whether a value has to pass any of the hook points."""
    return any(map(is_used, points))


@runtime_checkable
class Layout(Protocol):
    """How a library lays out values that hooks see as ``batch token ...``."""

    def show(self, value: Tensor) -> Tensor:
        """Return the value as hooks see it."""

    def restore(self, shown: Tensor, like: Tensor) -> Tensor:
        """Return what hooks saw, laid out as ``like``."""


class TokensFirst:
    """``token batch ...``."""

    def show(self, value: Tensor) -> Tensor:
        """Put the batch first."""
        return value.transpose(0, 1)

    def restore(self, shown: Tensor, like: Tensor) -> Tensor:
        """Put tokens first."""
        return shown.transpose(0, 1)


class Grid:
    """``batch row column ...``."""

    def show(self, value: Tensor) -> Tensor:
        """Put rows and columns behind each other, as tokens."""
        return value.flatten(1, 2)

    def restore(self, shown: Tensor, like: Tensor) -> Tensor:
        """Put tokens into rows and columns."""
        return shown.unflatten(1, like.shape[1:3])


class ChannelsFirst:
    """``batch channel row column``."""

    def show(self, value: Tensor) -> Tensor:
        """Put rows and columns behind each other, as tokens, and channels last."""
        return value.flatten(2).transpose(1, 2)

    def restore(self, shown: Tensor, like: Tensor) -> Tensor:
        """Put tokens into rows and columns, behind the channels."""
        return shown.transpose(1, 2).unflatten(2, like.shape[2:])


def lay_out(points: Iterable[HookPoint], layout: Layout) -> None:
    """Say how the values at hook points are laid out by the library."""
    for point in points:
        point.__dict__["layout"] = layout


def swap_tokens_first(points: Iterable[HookPoint]) -> None:
    """Mark hook points as owned by a module that runs tokens before batch."""
    lay_out(points, TokensFirst())


def fire(point: HookPoint, value: Tensor) -> Tensor:
    """Pass a value through a hook point, if anything is attached to it; its hooks see ``batch token ...``.

    A module that stands there comes before its hooks.
    """
    if not is_used(point):
        return value
    layout: Layout | None = point.__dict__.get("layout")
    shown, splice = value if layout is None else layout.show(value), point.__dict__.get(SPLICE)
    result: Tensor = point(shown if splice is None else splice(shown))
    return result if layout is None else layout.restore(result, value)


class OutputTap:
    """A forward hook that passes a module's output through a hook point."""

    def __init__(self, point: HookPoint) -> None:
        self.point = point

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Return the output as the hook point leaves it."""
        return fire(self.point, output)


class InputTap:
    """A forward pre-hook that passes a module's first input through a hook point."""

    def __init__(self, point: HookPoint) -> None:
        self.point = point

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the inputs, the first as the hook point leaves it."""
        return (fire(self.point, args[0]), *args[1:])


class HalvesTap:
    """A forward hook for a linear layer that computes two things packed along the last axis."""

    def __init__(self, first: HookPoint, second: HookPoint) -> None:
        self.points = (first, second)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Return the output with each half as its hook point leaves it."""
        if not any_hooked(self.points):
            return output
        halves = output.chunk(2, dim=-1)
        return torch.cat([fire(point, half) for point, half in zip(self.points, halves, strict=True)], dim=-1)


class GridTap:
    """A forward hook that shows a patch embedding as ``batch patch d_model``, whatever its layout.

    Args:
        point: The hook point.
        channels_first: Whether the output is ``batch d_model row column`` (a bare convolution); else the
            channels are last, after one axis of patches or after rows and columns.
    """

    def __init__(self, point: HookPoint, *, channels_first: bool = False) -> None:
        self.point = point
        self.channels_first = channels_first

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Return the output, in its own layout, as the hook point leaves it."""
        if not is_used(self.point):
            return output
        if self.channels_first:
            patches = fire(self.point, output.flatten(2).transpose(1, 2))
            return patches.transpose(1, 2).unflatten(2, output.shape[2:])
        return fire(self.point, output.flatten(1, -2)).unflatten(1, output.shape[1:-1])
