"""Hook points, and the three ways in which a value reaches one.

`fire` passes a value through a hook point only while something is attached to it, so that an unused hook
costs a dictionary lookup. `OutputTap` and `InputTap` are module hooks that bring the output or input of a
library module to a hook point: the library's own ``forward`` stays in charge.
"""

from collections.abc import Iterable
from typing import Any

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


def any_hooked(points: Iterable[HookPoint]) -> bool:
    """Whether anything is attached to any of the hook points."""
    return any(map(is_hooked, points))


def fire(point: HookPoint, value: Tensor) -> Tensor:
    """Pass a value through a hook point, if anything is attached to it.

    Points of a model that runs tokens before batch carry ``tokens_first``: their hooks see the batch first.
    """
    if not is_hooked(point):
        return value
    if getattr(point, "tokens_first", False):
        swapped: Tensor = point(value.transpose(0, 1))
        return swapped.transpose(0, 1)
    result: Tensor = point(value)
    return result


def swap_tokens_first(points: Iterable[HookPoint]) -> None:
    """Mark hook points as owned by a module that runs tokens before batch."""
    for point in points:
        point.__dict__["tokens_first"] = True


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
        if not is_hooked(self.point):
            return output
        if self.channels_first:
            patches = fire(self.point, output.flatten(2).transpose(1, 2))
            return patches.transpose(1, 2).unflatten(2, output.shape[2:])
        return fire(self.point, output.flatten(1, -2)).unflatten(1, output.shape[1:-1])
