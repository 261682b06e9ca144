"""Which rows of labelled values are meant: looking up, selecting and grouping components.

The functions look at components alone, so that they serve values of any layout.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vitdecomp_lens.components import Component
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches

AT_HOOKS = ("intervention", "latent", "error")  # whose names are those of hooks
Numbers = int | Collection[int]
Names = str | Collection[str]
if TYPE_CHECKING:
    Components = tuple[Component, ...]
else:
    # A field holds components; its constructor reads labels as well, which the checks at run time let through.
    Components = Sequence[Component | str]


def as_components(components: Sequence[Component | str], size: int) -> tuple[Component, ...]:
    """Components for ``size`` rows of values, labels read by `Component.from_label`.

    Raises:
        InputError: Where their number is not ``size``, or two carry the same label.
    """
    result = tuple(Component.from_label(c) if isinstance(c, str) else c for c in components)
    if len(result) != size:
        raise InputError(
            f"Expected a component for each of the {size} rows of values (axis 0); got {len(result)} components."
        )
    refuse_duplicates([c.label for c in result])
    return result


def refuse_duplicates(
    labels: Sequence[str], *, of: str = "components", remedy: str = "Sum such rows, or give them names."
) -> None:
    """Raise an InputError that names the labels carried more than once.

    Args:
        labels: What has to differ.
        of: What carries it.
        remedy: What to do then.

    Raises:
        InputError: Where a label stands there twice.
    """
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise InputError(
            f"Expected labels that tell {of} apart; {', '.join(map(repr, twice[:5]))} "
            f"{'is' if len(twice) == 1 else 'are'} carried more than once. {remedy}"
        )


def summary(components: Sequence[Component]) -> str:
    """Components counted by kind, with their layers.

    Example:
        >>> summary([Component("head", 0, 0), Component("head", 1, 0), Component("embed")])
        '2 head (layers 0, 1), 1 embed'
    """
    layers: dict[str, set[int]] = {}
    for c in components:
        layers.setdefault(c.kind, set()).update(() if c.layer is None else (c.layer,))
    counts: Counter[str] = Counter(c.kind for c in components)
    return ", ".join(f"{counts[kind]} {kind}{_layers(sorted(of))}" for kind, of in layers.items()) or "no components"


def _layers(layers: list[int]) -> str:
    if len(layers) < 2:
        return f" (layer {layers[0]})" if layers else ""
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f" (layers {layers[0]} to {layers[-1]})"
    return f" (layers {', '.join(map(str, layers))})"


def positions_of(components: Sequence[Component]) -> dict[str, int]:
    """Each label's row."""
    return {c.label: position for position, c in enumerate(components)}


def position(known: Mapping[str, int], label: str | Component) -> int:
    """The row of a label, or of a component.

    Raises:
        UnknownNameError: If it is not among the known ones; the message has near matches.
        InputError: If it is no label.
    """
    label = label.label if isinstance(label, Component) else label
    if not isinstance(label, str):
        raise InputError(
            f"Expected a label such as 'L3H7' or a Component; got {label!r}. For rows by number, use .values[row]; for "
            f"several components, .select(...)."
        )
    if label not in known:
        raise UnknownNameError(f"There is no component {label!r}; {near_matches(label, known)}")
    return known[label]


def chosen(components: Sequence[Component], labels: Names | None, criteria: Mapping[str, Any]) -> list[int]:
    """The rows that carry one of the labels, in the labels' order, and meet every criterion that is not None.

    Raises:
        UnknownNameError: Where a label is unknown, or nothing is left.
    """
    rows: Collection[int] = range(len(components))
    if labels is not None:
        known = positions_of(components)
        rows = [position(known, label) for label in ([labels] if isinstance(labels, str) else labels)]
    asked = {name: wanted for name, wanted in criteria.items() if wanted is not None}
    found = [row for row in rows if components[row].matches(**asked)]
    if not found:
        asked = asked if labels is None else {"labels": labels, **asked}
        phrase = ", ".join(f"{name}={wanted!r}" for name, wanted in asked.items())
        raise UnknownNameError(f"No component has {phrase or 'any label'}; there are {summary(components)}.")
    return found


def grouped(components: Sequence[Component], by: Literal["layer", "kind"]) -> dict[Component, list[int]]:
    """Coarser components, and the rows that each of them sums.

    Args:
        components: The rows' components.
        by: ``"layer"`` sums the heads of a layer into ``attn.L``, its neurons into ``mlp.L``, the latents of a spliced
            module into ``latents@hook``, and leaves the rest; ``"kind"`` makes one component of each kind, labelled
            with the kind (``intervention@all``, ``latents@all`` and ``error@all`` for what was put in at hooks).
    """
    if by not in ("layer", "kind"):
        raise InputError(f"Expected by='layer' or by='kind'; got by={by!r}.")
    groups: dict[Component, list[int]] = {}
    for row, component in enumerate(components):
        groups.setdefault(_of_layer(component) if by == "layer" else _of_kind(component), []).append(row)
    return groups


def _of_layer(component: Component) -> Component:
    if component.kind == "head":
        return Component(kind="attn", layer=component.layer, name=component.name)
    if component.kind == "neuron":
        return Component(kind="mlp", layer=component.layer, name=component.name)
    return replace(component, latent=None)


def _of_kind(component: Component) -> Component:
    # A head and a neuron need a number, which their sum over all layers has not.
    if component.kind == "head":
        return Component(kind="attn", name="head")
    if component.kind == "neuron":
        return Component(kind="mlp", name="neuron")
    return Component(kind=component.kind, name="all" if component.kind in AT_HOOKS else None)


def taken(values: Tensor, rows: Sequence[int], axis: int = 0) -> Tensor:
    """Rows along an axis: a view where they follow each other, else a copy."""
    first, last = (rows[0], rows[-1]) if rows else (0, -1)
    if list(rows) == list(range(first, last + 1)):
        return values.narrow(axis, first, len(rows))
    return values.index_select(axis, torch.tensor(rows, device=values.device))


def rows_of_batch(index: int | slice | Sequence[int] | Tensor, batch: int) -> list[int]:
    """The images that an index means.

    Args:
        index: A number, a slice, numbers (negative ones count from the end), or a boolean mask over the batch.
        batch: How many images there are.

    Raises:
        InputError: Where there is no such image.
    """
    if isinstance(index, slice):
        return list(range(batch))[index]
    index = [index] if isinstance(index, int) else index
    try:
        return torch.arange(batch)[torch.as_tensor(index).cpu() if len(index) else []].reshape(-1).tolist()
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"Expected a slice, image numbers from 0 to {batch - 1}, or a mask of length {batch}; got {index!r}."
        ) from error


def agreed(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that all mappings share."""
    return {key: value for key, value in several[0].items() if all(key in m and m[key] == value for m in several)}
