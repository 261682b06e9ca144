"""At which hook points a run is edited, and which part of the values there is which component."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.components import PLAIN, By, Component, Point
from vitdecomp_lens.decomposable import Decomposable
from vitdecomp_lens.errors import InputError, UnknownNameError, UnsupportedModelError, near_matches
from vitdecomp_lens.foreign import Foreign
from vitdecomp_lens.frozen.graph import FrozenGraph, NamesParameters
from vitdecomp_lens.frozen.places import places, varying_axes
from vitdecomp_lens.frozen.trace import Read, trace
from vitdecomp_lens.hooked.checks import check_module
from vitdecomp_lens.hooked.splicing import splices_of
from vitdecomp_lens.points import hook_points
from vitdecomp_lens.traced import check_any_images

SUMS_OF_CONSTANTS = ("constants", "aligner.bias")


@dataclass(frozen=True)
class Spot:
    """Where one component is edited.

    Attributes:
        component: Which.
        point: The hook, and the axis of its value that tells components apart.
        index: Which entry along that axis it is; None for the whole value.
    """

    component: Component
    point: Point
    index: int | None


@dataclass(frozen=True)
class Subject:
    """A model whose runs can be edited.

    Attributes:
        module: The model.
        hooks: Its hook points by name.
        by: For each kind of cut, where its components are.
        unhooked: Where components are that no hook point has.
        native: The model itself, where it says where its components are.
    """

    module: nn.Module
    hooks: Mapping[str, HookPoint] = field(repr=False)
    by: Mapping[By, tuple[Point, ...]]
    unhooked: tuple[Point, ...] = ()
    native: Decomposable | None = field(default=None, repr=False)
    _graph: Callable[[], FrozenGraph] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, module: nn.Module, images: Tensor, components: Sequence[str] | Mapping[str, str] | None, read: Read | None
    ) -> "Subject":
        """Find where a model's components are.

        Args:
            module: The model.
            images: What it is going to run on.
            components: A mapping from labels to hooks says itself where they are.
            read: What is read of the run, which a model that nothing is known of is traced for.

        Raises:
            InputError: If the images cannot be used, or a mapping is given to a model that says it itself.
            UnknownNameError: If there is no such hook.
            UnsupportedModelError: If a run passes no hook points.
        """
        if isinstance(module, Decomposable):
            module.check_images(images)
            if isinstance(components, Mapping):
                raise InputError(
                    f"{type(module).__name__} says itself at which hooks its components are: components= takes labels"
                    " of them, such as components=['attn.0']. A mapping from labels to hooks is for models that do not."
                )
            bys: tuple[By, ...] = (*PLAIN, "latent") if splices_of(module.hook_dict) else PLAIN
            by = {by: module.component_points(by) for by in bys}
            return cls(module, module.hook_dict, by, native=module)
        check_module(module)
        _check_any(images, module)
        graph = partial(trace, module, images[:1], of=_traceable(read))
        hooks = hook_points(module)
        if isinstance(components, Mapping):
            points = tuple(_given(label, hook, hooks, module) for label, hook in components.items())
            return cls(module, hooks, dict.fromkeys(PLAIN, points), _graph=graph)
        foreign = Foreign.of(module, graph()) if hooks else None
        if foreign is None:
            raise UnsupportedModelError(
                f"A run is edited at hook points, and the forward of {type(module).__name__} passes none. Wrap it:"
                " HookedViT(model), which takes timm's and open_clip's models; or put TransformerLens HookPoints into"
                " your own, and say components={label: hook}."
            )
        found = {by: foreign.component_points(by) for by in PLAIN}
        named = {by: tuple(p for p in points if p.hook in foreign.hook_dict) for by, points in found.items()}
        unhooked = dict.fromkeys(p for points in found.values() for p in points if p.hook not in foreign.hook_dict)
        return cls(module, foreign.hook_dict, named, unhooked=tuple(unhooked), _graph=graph)

    def check_images(self, images: Any) -> None:
        """Raise `InputError` for images that the model cannot take."""
        if self.native is not None:
            self.native.check_images(images)
        else:
            _check_any(images, self.module)

    @property
    def points(self) -> tuple[Point, ...]:
        """Where all components are, in all cuts."""
        return tuple(dict.fromkeys(point for points in self.by.values() for point in points))

    def spots(self, components: Sequence[str] | Mapping[str, str]) -> tuple[Spot, ...]:
        """Where components are, by their labels, each once.

        Raises:
            UnknownNameError: If there is no such component.
            InputError: If it is nothing that a run computes at a hook point.
        """
        wanted = [components] if isinstance(components, str) else components
        return tuple(self._spot(label) for label in dict.fromkeys(wanted))

    def all_spots(self, by: By, sizes: Mapping[str, int]) -> tuple[Spot, ...]:
        """Where all components of a cut are.

        Args:
            by: The cut.
            sizes: How many components each hook has that is split.
        """
        found = {}
        for point in self.by[by]:
            for index, component in enumerate(point.components(sizes.get(point.hook, 1))):
                found[component.label] = Spot(component, point, None if point.axis is None else index)
        return tuple(found.values())

    def _spot(self, label: str) -> Spot:
        if not isinstance(label, str):
            raise InputError(f"Expected labels of components, such as 'L9H1' or 'mlp.10'; got {label!r}.")
        found = [spot for point in self.points if (spot := _spot_at(point, label)) is not None]
        if found:
            return max(found, key=lambda spot: spot.point.first)  # parallel attentions number their heads on
        raise self._unknown(label)

    def _unknown(self, label: str) -> Exception:
        if any(_spot_at(point, label) for point in self.unhooked):
            return InputError(
                f"The component {label!r} is known from the traced graph, and no hook point has its value, so that a"
                " run cannot be edited there. Put a HookPoint there, and say components={label: hook}; attribute has"
                " its direct effect."
            )
        if label.startswith("intervention@"):
            return InputError(f"{label!r} is what a hook of yours changes. To be without it, run without that hook.")
        if label in (*self._parameters(), *SUMS_OF_CONSTANTS):
            return InputError(
                f"{label!r} is a constant: no image changes it, and no run computes it at a hook point. Mean and"
                " resampled constants are the constant itself; for a run without it, set the parameter to zero."
            )
        known = [point.components(1)[0].label for point in self.points]
        return UnknownNameError(f"There is no component {label!r} to ablate; {near_matches(label, known)}")

    def _parameters(self) -> Sequence[str]:
        if isinstance(self.module, NamesParameters):
            return list(self.module.parameter_names.values())
        return [name for name, _ in (*self.module.named_parameters(), *self.module.named_buffers())]

    # --- tokens ---------------------------------------------------------------------------------------------

    def token_axes(self, point: Point, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes of a point's value that run over tokens.

        Args:
            point: The point.
            shape: That of its value.
        """
        if point.token_axis is None or len(shape) == 2:
            return ()
        if self.native is not None or len(shape) - (point.axis is not None) == 3:
            return (point.token_axis,)
        assert self._graph is not None
        graph = self._graph()
        node = graph.points.get(point.hook)
        return () if node is None else varying_axes(places(graph, [node])[node])

    def padding(self, point: Point, images: Tensor) -> tuple[int, ...]:
        """Which tokens of a point's value are padding: they stand for nothing, and what is written there is dropped."""
        if self.native is None or point.token_axis is None:
            return ()
        names = self.native.token_grid(images, point.hook).prefix
        return tuple(number for number, name in enumerate(names) if name.startswith("pad"))


def _check_any(images: Any, module: nn.Module) -> None:
    check_any_images(images, module)
    if not len(images):
        raise InputError("Expected at least one image; got an empty batch.")


def _traceable(read: Read | None) -> Read:
    return "representation" if read is None or read == "embedding" else read


def _given(label: str, hook: str, hooks: Mapping[str, HookPoint], module: nn.Module) -> Point:
    for what in (label, hook):
        if not isinstance(what, str):
            raise InputError(f"components= maps labels to names of hooks, both of them strings; got {what!r}.")
    if hook not in hooks:
        raise UnknownNameError(f"{type(module).__name__} has no hook {hook!r}; {near_matches(hook, hooks)}")
    component = Component.from_label(label)
    if component.kind in ("constant", "intervention"):  # any other label
        component = Component(kind="source", name=label)
    return Point(hook, component)


def _spot_at(point: Point, label: str) -> Spot | None:
    """A component at a point, by its label, as far as can be told without knowing how many there are."""
    if point.axis is None:
        return Spot(point.component, point, None) if point.component.label == label else None
    digits = re.search(r"(?<=^latent)\d+(?=@)|\d+$", label)
    if digits is None or int(digits[0]) < point.first:
        return None
    (component,) = replace(point, first=int(digits[0])).components(1)
    return Spot(component, point, int(digits[0]) - point.first) if component.label == label else None
