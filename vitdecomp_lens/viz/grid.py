"""`head_grid`: a number for every head."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.viz.axes import SMALL, Axes, Figure, axis_for, number_of, signed
from vitdecomp_lens.viz.cells import draw_cells, size_of

LAYER = 0.2  # inches of a row
BRANCHES = {"attn": "attention", "mlp": "MLP", "conv": "convolution"}  # they stand beside the heads of their layer


def head_grid(
    values: Attribution | Mapping[str, float | int],
    *,
    direction: int | str | None = None,
    image: int | None = None,
    unit: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A number for every head: a row a layer, a column a head, with the layer's MLP beside them.

    Args:
        values: Scores; or a number for each label, such as ``dict(scores.top("colour", len(scores)))`` of
            `FeatureScores`. What has no layer (embedding, constants) is not drawn; of scores, it is told what it sums
            to.
        direction: Of scores along several directions: which, by its number or name.
        image: Of scores: which image; None for the mean over all.
        unit: What the numbers are, for the colour bar; None for the score of the direction.
        ax: Where to draw; None for a figure of its own.

    Returns:
        The figure that the axis is on. Hatched is where there is no component.

    Raises:
        UnknownNameError: Where there is no such direction.
        InputError: Where matplotlib is not installed, there is no such image, or nothing that has a layer; for neurons,
            which are too many to look at: ``values.group(by="layer")``.

    Example:
        >>> figure = head_grid({"L0H0": 0.5, "L0H1": -0.1, "L1H0": 0.2, "mlp.1": 0.3, "embed": 1.0}, unit="logit")
        >>> figure.axes[0].images[0].get_array().shape  # layers, heads and MLPs
        (2, 3)
    """
    if isinstance(values, Attribution):
        several, unit = _scores(values, direction, image, unit)
        components: Sequence[Component] = values.components
        note = _without_place(components, several)
    elif direction is not None or image is not None:
        raise InputError("direction= and image= are for an Attribution; here each component has one number.")
    else:
        components, note = [Component.from_label(label) for label in values], ""
        several = [float(value) for value in values.values()]
    placed = _placed(components)
    if not placed:
        raise InputError("Expected at least one head, MLP or attention to draw; got none.")
    rows = sorted({row for row, _ in placed.values()}, key=_in_order)
    heads = sorted({column for _, column in placed.values() if isinstance(column, int)})
    branches = [kind for kind in BRANCHES if any(column == kind for _, column in placed.values())]
    cells = np.full((len(rows), len(heads) + len(branches)), np.nan)
    for number, (row, column) in placed.items():
        cells[rows.index(row), [*heads, *branches].index(column)] = several[number]
    names = [*map(str, heads), *(BRANCHES[kind] for kind in branches)]
    axes = axis_for(ax, size_of(len(rows), LAYER, names))
    draw_cells(axes, cells, [name or str(layer) for layer, name in rows], names, unit or "score", numbers=False)
    if heads and branches:
        axes.axvline(len(heads) - 0.5, color=axes.get_facecolor(), linewidth=4)
    axes.set_ylabel("layer", fontsize=SMALL)
    axes.set_xlabel("\n".join(["head"] * bool(heads) + [note] * bool(note)), fontsize=SMALL)
    return axes.figure.figure


def _column(component: Component) -> int | str | None:
    """The column of a component; None where it has none."""
    if component.kind == "neuron":
        raise InputError(f"{component.label!r} is a neuron: too many to look at. Take values.group(by='layer').")
    if component.kind == "head":
        return component.head
    return component.kind if component.kind in BRANCHES else None


def _placed(components: Sequence[Component]) -> dict[int, tuple[tuple[int, str], int | str]]:
    """The row and the column of those that have some, by their numbers.

    A row is a layer; where a layer has several of a kind, or nobody knows of layers, a module's name tells rows apart.
    """
    columns = {n: column for n, one in enumerate(components) if (column := _column(one)) is not None}
    layers = [(components[number].layer, column) for number, column in columns.items()]
    named = len(set(layers)) < len(layers) or None in {layer for layer, _ in layers}
    rows = {n: (components[n].layer, components[n].name or "") for n in columns}
    return {
        n: ((-1 if layer is None else layer, name if named else ""), columns[n]) for n, (layer, name) in rows.items()
    }


def _in_order(row: tuple[int, str]) -> tuple[int, list[str | int]]:
    """What rows are sorted by: numbers within names count as numbers."""
    layer, name = row
    return layer, [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _scores(
    values: Attribution, direction: int | str | None, image: int | None, unit: str | None
) -> tuple[list[float], str]:
    """A score for each component, and what it is."""
    batch, count = values.values.shape[1:]
    names = list(map(str, range(count))) if values.directions is None else list(values.directions)
    if direction is None and count > 1:
        raise InputError(f"Expected direction=, one of {', '.join(map(repr, names[:5]))}...; got none.")
    column = number_of(direction, names, "direction") if isinstance(direction, str) else direction or 0
    if not -count <= column < count:
        raise UnknownNameError(f"There is no direction {direction}; there are {count}, numbered from 0.")
    if image is not None and not -batch <= image < batch:
        raise InputError(f"Expected an image from 0 to {batch - 1}; got {image}.")
    chosen = values.values.detach()[:, :, column].double()
    unit = unit or ("score" if values.directions is None else f"score of {names[column]}")
    if image is not None:
        return chosen[:, image].tolist(), unit
    return chosen.mean(1).tolist(), unit + (f", mean of {batch} images" if batch > 1 else "")


def _without_place(components: Sequence[Component], values: Sequence[float]) -> str:
    """What components that are not drawn sum to, by kind."""
    sums: dict[str, float] = {}
    for component, value in zip(components, values, strict=True):
        if _column(component) is None:
            sums[component.kind] = sums.get(component.kind, 0.0) + value
    return "without a layer: " + ", ".join(f"{kind} {signed(value)}" for kind, value in sums.items()) if sums else ""
