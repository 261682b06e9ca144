"""Modules that stand at hook points: a value is taken apart into latents, and put together from them again.

`HookedViT.spliced` puts them in. A spliced hook point keeps its name and its hooks: what they see, and what the model
goes on with, is what the module makes of the value.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.components import By, Component, Point
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.hooked import checks
from vitdecomp_lens.hooked.clone import clone_tree
from vitdecomp_lens.hooked.hook_points import SPLICE, any_hooked, fire
from vitdecomp_lens.points import LazyHookPoint

LATENTS, ERROR, MODULE = "hook_latents", "hook_error", "spliced"  # below the hook point


@runtime_checkable
class Splicable(Protocol):
    """A module that can stand at a hook point: a sparse autoencoder, a transcoder of a value to itself, a basis."""

    def encode(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes latent"]:
        """From the value to the latents, in whatever way."""

    def decode(self, latents: Float[Tensor, "*axes latent"]) -> Float[Tensor, "*axes d_in"]:
        """From the latents to the value: a matrix and a bias."""


class Splice:
    """What a hook point does with its value while a module stands there.

    Args:
        point: The hook point.
        hook: Its name.
        module: The module. A clone of it is used, with parameters in common, in evaluation mode.
        error: Whether what the module leaves out is added again.
    """

    def __init__(self, point: HookPoint, hook: str, module: nn.Module, *, error: bool) -> None:
        self.hook, self.module = hook, clone_tree(module).eval()
        self.hook_latents, self.hook_error = HookPoint(), HookPoint() if error else None
        self._point = point
        self._points = (self.hook_latents, *(m for m in self.module.modules() if isinstance(m, HookPoint)))
        # The error is that of the module without hooks; those of its own are not met twice.
        self._unhooked = clone_tree(module).eval()

    def put_in(self) -> None:
        """Stand at the hook point."""
        self._point.add_module(MODULE, self.module)
        self._point.add_module(LATENTS, self.hook_latents)
        if self.hook_error is not None:
            self._point.add_module(ERROR, self.hook_error)
        self._point.__dict__[SPLICE] = self

    def take_out(self) -> None:
        """Leave the hook point as it was."""
        if self._point.__dict__.get(SPLICE) is self:
            del self._point.__dict__[SPLICE]
            for name in (MODULE, LATENTS, ERROR):
                self._point._modules.pop(name, None)

    def __call__(self, value: Float[Tensor, "batch *axes"]) -> Float[Tensor, "batch *axes"]:
        """The value, from its latents and the error; of heads put together to one vector a token."""
        whole = value.flatten(2) if value.dim() > 3 else value
        made = self._decoded(self.module, fire(self.hook_latents, self._encoded(self.module, whole)), whole)
        if self.hook_error is not None:
            unhooked, plain = self._unhooked, not any_hooked(self._points)
            given = made if plain else self._decoded(unhooked, self._encoded(unhooked, whole), whole)
            made = made + fire(self.hook_error, whole - given)
        return made.reshape(value.shape)

    def _encoded(self, module: nn.Module, value: Tensor) -> Tensor:
        latents = self._called(module, "encode", value, value)
        if latents.shape[:-1] != value.shape[:-1]:
            raise self._unfit("encode", value, f"it gave {_axes(latents)}, not latents of each token")
        return latents

    def _decoded(self, module: nn.Module, latents: Tensor, value: Tensor) -> Tensor:
        made = self._called(module, "decode", latents, value)
        if made.shape != value.shape:
            raise self._unfit("decode", value, f"it gave {_axes(made)}")
        return made

    def _called(self, module: nn.Module, name: str, given: Tensor, value: Tensor) -> Tensor:
        function: Callable[[Tensor], Any] = getattr(module, name)
        try:
            made = function(given)
        except RuntimeError as error:  # torch's, of widths that do not fit
            raise self._unfit(name, value, f"it failed: {str(error).strip().splitlines()[0].rstrip('.')}") from error
        if not isinstance(made, Tensor):
            raise self._unfit(name, value, f"it gave {type(made).__name__}, not a tensor")
        return made

    def _unfit(self, name: str, value: Tensor, what: str) -> InputError:
        return InputError(
            f"The {type(self.module).__name__} at {self.hook} must take values {_axes(value)} to latents [batch, ...,"
            f" latent] by encode(x), and back by decode(latents); of {name}, {what}. Splice a module that was made for"
            " this hook of this model (at hook_z, heads are put together to one vector a token)."
        )


def _axes(value: Tensor) -> str:
    return f"[batch, {', '.join(map(str, value.shape[1:]))}]"


@contextmanager
def splicing(
    points: Mapping[str, HookPoint], modules: Mapping[str, Any], weight: Tensor, *, error: bool
) -> Iterator[None]:
    """While inside, modules stand at hook points.

    Args:
        points: The model's hook points.
        modules: The modules by hook.
        weight: One of the model's, which has its device and dtype.
        error: Whether what a module leaves out is added again.

    Raises:
        UnknownNameError: If there is no such hook.
        InputError: If a module cannot stand there.
    """
    if not isinstance(modules, Mapping):
        raise InputError(
            f"Expected a mapping from hooks to modules, {{'blocks.2.hook_mlp_out': autoencoder}}; got"
            f" {type(modules).__name__}."
        )
    for hook, module in modules.items():
        _check_place(hook, points)
        _check_module(hook, module, weight)
    splices = [Splice(points[hook], hook, module, error=error) for hook, module in modules.items()]
    try:
        for splice in splices:
            splice.put_in()
        yield
    finally:
        for splice in splices:
            splice.take_out()


def _check_place(hook: str, points: Mapping[str, HookPoint]) -> None:
    if hook not in points:
        raise UnknownNameError(f"There is no hook {hook!r}; {near_matches(hook, points)}")
    others = splices_of(points)
    if hook in others:
        raise InputError(f"A module stands at {hook} already. Leave the block that put it there first.")
    if any(hook.startswith(f"{other}.") for other in others):
        raise InputError(f"{hook!r} is of a spliced module. Splice at a hook of the model itself.")
    if isinstance(points[hook], LazyHookPoint):
        raise InputError(
            f"The value at {hook} is computed only while somebody looks at it, so that no module can stand there."
            " Splice at the residual stream (hook_resid_pre, hook_resid_mid, hook_resid_post), at what is added to it"
            " (hook_attn_out, hook_mlp_out), at hook_z or hook_post."
        )


def _check_module(hook: str, module: Any, weight: Tensor) -> None:
    if not isinstance(module, nn.Module) or not isinstance(module, Splicable):
        raise InputError(
            f"Expected at {hook} a torch module with encode(x), which gives latents, and decode(latents), which gives x"
            f" back; got {type(module).__name__}. A class of your own: class SAE(nn.Module) with these two methods."
        )
    checks.check_module(clone_tree(module).eval())
    for name, own in module.named_parameters():
        if (own.dtype, own.device) != (weight.dtype, weight.device):
            raise InputError(
                f"The model is {weight.dtype} on {weight.device}; {name} of the {type(module).__name__} at {hook} is"
                f" {own.dtype} on {own.device}. Convert the module: module.to({str(weight.device)!r}, {weight.dtype})."
            )


def splices_of(points: Mapping[str, HookPoint]) -> dict[str, Splice]:
    """The modules that stand at hook points, by hook."""
    found: list[Splice] = [point.__dict__[SPLICE] for point in points.values() if SPLICE in point.__dict__]
    return {splice.hook: splice for splice in found}  # a point may have a second name


def with_splices(
    points: tuple[Point, ...], splices: Mapping[str, Splice], by: By, token_axis: Callable[[str], int | None]
) -> tuple[Point, ...]:
    """Points of a cut, with latents and error in place of what is read at a spliced hook, and of what lies behind it.

    Args:
        points: Where components are read when no module stands anywhere.
        splices: The modules by hook.
        by: ``"latent"`` tells latents apart; otherwise those of a module are one component.
        token_axis: Which axis of a hook's value runs over tokens.
    """
    found: list[Point] = []
    for point in points:
        found += _read(splices[point.hook], point, by) if point.hook in splices else [point]
    replaced = {point.hook for point in points}
    for hook, splice in splices.items():
        if hook not in replaced:
            found += _read(splice, Point(hook, Component(kind="source"), token_axis=token_axis(hook)), by)
    return tuple(found)


def _read(splice: Splice, point: Point, by: By) -> Iterator[Point]:
    latents, error = (Component.from_label(f"{what}@{splice.hook}") for what in ("latents", "error"))
    axis = -1 if by == "latent" else None
    yield replace(point, hook=f"{splice.hook}.{LATENTS}", component=latents, axis=axis, first=0)
    if splice.hook_error is not None:
        yield replace(point, hook=f"{splice.hook}.{ERROR}", component=error, axis=None, first=0)
