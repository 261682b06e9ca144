"""Figures for papers and notebooks: each function returns a figure of matplotlib, or draws into an axis that is given.

Needs matplotlib, the optional extra ``viz``. No backend is chosen, no window opened, and no figure stays open:
``figure.savefig(path)`` writes it. Sizes are those of a column of a paper; what has two signs is red where it is
positive and blue where it is negative, on a scale with 0 in its middle that people see who are blind to red or green.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vitdecomp_lens.applications import ablation
from vitdecomp_lens.applications.ablation import AblationCurve
from vitdecomp_lens.applications.heatmap import Heatmaps
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.explanation import Heatmap, Rectangle, printable
from vitdecomp_lens.interpret import ConceptParts, ConceptTree, FeatureScores
from vitdecomp_lens.pictures import COLOURS, GREY, INSTALL, Photograph, can_draw, scale_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # matplotlib may not be installed

__all__ = ["ablation_curves", "component_feature_matrix", "concept_tree", "head_grid", "heatmap_overlays"]

WIDTH, WIDEST = 3.4, 7.0  # inches: a column, and a page
SMALL, SMALLER = 7, 6  # points
ROW = 0.16  # inches that a line of text needs
INDENT = 0.035  # of the width, by which a concept stands right of what it refines
NOTHING = "0.8"  # the hatching of cells for which there is no number
# By Okabe and Ito: people see them apart who are blind to red or green, and so does who prints in grey, mostly.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BRANCHES = {"attn": "attention", "mlp": "MLP", "conv": "convolution"}  # they stand beside the heads of their layer
UNITS = {
    "correlation": "correlation with the whole",
    "covariance": "covariance with the whole",
    "share": "share of the feature's variance",
}
REST, OWN = "(remainder)", "(own)"
LEAST = 5e-4  # of shares: less is written 0.0 %


# --- components by feature, and by layer and head ---------------------------------------------------------------------


def component_feature_matrix(
    scores: FeatureScores,
    *,
    by: str = "correlation",
    features: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    most: int = 30,
    numbers: bool | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Which components carry which feature: a row a component, a column a feature.

    Args:
        scores: Of every component for every feature.
        by: ``"correlation"``, ``"covariance"``, or ``"share"``: the covariance as a share of the feature's variance,
            which sums to 1 over all components.
        features: Which, in this order; None for all.
        components: Labels, in this order; None for the ``most`` that score highest for any of the features, in either
            direction, in the order of the model, constants left out.
        most: How many at most, where nobody names them.
        numbers: Whether to write numbers into the cells; None to do so for up to eight features.
        ax: Where to draw; None for a figure of its own.

    Returns:
        The figure that the axis is on.

    Raises:
        UnknownNameError: Where there is no such component or feature.
        InputError: Where matplotlib is not installed, or there is nothing to draw.

    Example:
        >>> from vitdecomp_lens.interpret import score_features
        >>> from vitdecomp_lens.clip import TextBank
        >>> from vitdecomp_lens.testbed.planted import planted_features
        >>> planted = planted_features(images=60, d_clip=16, features=2)
        >>> bank = TextBank(["red", "round"], planted.directions, space="planted")
        >>> features = {name: bank.select(name) for name in bank.texts}
        >>> figure = component_feature_matrix(score_features(planted.parts, features, bootstrap=0, permutations=0))
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['red', 'round']
    """
    if by not in UNITS:
        raise InputError(f"Expected by= to be one of {', '.join(map(repr, UNITS))}; got {by!r}.")
    names = list(scores.features if features is None else features)
    columns = [_number(name, scores.features, "feature") for name in names]
    values = (scores.covariance / scores.total if by == "share" else getattr(scores, by)).cpu().double().numpy()
    if components is None:
        if most < 1:
            raise InputError(f"Expected most= of at least 1; got {most}.")
        largest = np.abs(values[:, columns]).max(1, initial=0)
        able = [row for row, component in enumerate(scores.components) if component.kind != "constant"]
        rows = sorted(sorted(able, key=lambda row: -largest[row])[:most])
    else:
        rows = [_number(label, scores.labels, "component") for label in components]
    cells = values[np.ix_(rows, columns)]
    axes = _axis(ax, (WIDTH, ROW * len(rows) + 0.9))
    numbers = len(columns) <= 8 if numbers is None else numbers
    _draw_cells(axes, cells, [scores.labels[row] for row in rows], names, UNITS[by], numbers=numbers)
    if len(rows) < len(scores):
        axes.set_xlabel(f"{len(rows)} of {len(scores)} components", fontsize=SMALL, color=GREY)
    return axes.figure.figure


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
    rows = sorted({row for row, _ in placed.values()})
    heads = sorted({column for _, column in placed.values() if isinstance(column, int)})
    branches = [kind for kind in BRANCHES if any(column == kind for _, column in placed.values())]
    cells = np.full((len(rows), len(heads) + len(branches)), np.nan)
    for number, (row, column) in placed.items():
        cells[rows.index(row), [*heads, *branches].index(column)] = several[number]
    axes = _axis(ax, (WIDTH, 0.2 * len(rows) + 1.0))
    names = [*map(str, heads), *(BRANCHES[kind] for kind in branches)]
    _draw_cells(axes, cells, [name or str(layer) for layer, name in rows], names, unit or "score", numbers=False)
    if heads and branches:
        axes.axvline(len(heads) - 0.5, color="white", linewidth=4)
    axes.set_ylabel("layer", fontsize=SMALL)
    axes.set_xlabel("head" + (f"\n{note}" if note else ""), fontsize=SMALL)
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


def _scores(
    values: Attribution, direction: int | str | None, image: int | None, unit: str | None
) -> tuple[list[float], str]:
    """A score for each component, and what it is."""
    batch, count = values.values.shape[1:]
    names = list(map(str, range(count))) if values.directions is None else list(values.directions)
    if direction is None and count > 1:
        raise InputError(f"Expected direction=, one of {', '.join(map(repr, names[:5]))}...; got none.")
    column = _number(direction, names, "direction") if isinstance(direction, str) else direction or 0
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
    return "without a layer: " + ", ".join(f"{kind} {_signed(value)}" for kind, value in sums.items()) if sums else ""


def _draw_cells(
    axes: Any, cells: np.ndarray, rows: Sequence[str], columns: Sequence[str], unit: str, *, numbers: bool
) -> None:
    """Cells in colours, 0 in the middle, with their names and a colour bar."""
    if not cells.size or not np.isfinite(cells).any():
        raise InputError(f"Expected numbers to draw; got {len(rows)} rows of {len(columns)} without any.")
    scale = max(float(np.nanmax(np.abs(cells))), 1e-12)
    axes.patch.set(hatch="/////", edgecolor=NOTHING, linewidth=0)
    drawn = axes.imshow(cells, cmap=COLOURS, vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, columns)) > 4 else {}
    names = [_short(name, 24) for name in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=SMALL, parse_math=False, **turned)
    axes.set_yticks(range(len(rows)), [_short(name, 24) for name in rows], fontsize=SMALL, parse_math=False)
    axes.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if numbers:
        for (row, column), value in np.ndenumerate(cells):
            colour = "white" if abs(value) > 0.65 * scale else "0.15"
            text = _bare(value) if np.isfinite(value) else ""
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALLER, color=colour)
    _colour_bar(axes, drawn, unit)


# --- curves -----------------------------------------------------------------------------------------------------------


def ablation_curves(
    curves: Sequence[AblationCurve], *, names: Sequence[str] | None = None, ax: Axes | None = None
) -> Figure:
    """What is left with none, one, two... components ablated: `ablation.plot`, at the width of a column.

    Direct effects are full lines, total effects broken ones; orders by chance are grey.

    Args:
        curves: The curves, of one measure.
        names: What to call them; None for their effect, how and order.
        ax: Where to draw; None for a figure of its own.

    Returns:
        The figure that the axis is on.

    Raises:
        InputError: Where matplotlib is not installed, there is no curve, or they are of different measures.

    Example:
        >>> curve = AblationCurve(("mlp.0",), (1.0, 0.5), "direct", "mean", "last first", 0, "accuracy", 8)
        >>> ablation_curves([curve]).axes[0].get_ylabel()
        'accuracy'
    """
    plotted = ablation.plot(curves, names=names).axes[0]
    axes, coloured = _axis(ax, (WIDTH, 2.4)), 0
    for curve, line in zip(curves, plotted.lines, strict=True):
        by_chance = curve.order == "random"
        axes.plot(
            *line.get_data(),
            linestyle=line.get_linestyle(),
            marker=line.get_marker(),
            markersize=4,
            linewidth=1.2,
            color="0.6" if by_chance else LINES[coloured % len(LINES)],
            label=line.get_label(),
        )
        coloured += not by_chance
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(plotted.get_xlabel(), fontsize=SMALL)
    axes.set_ylabel(plotted.get_ylabel(), fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": 2}  # no curve lies there
    for text in axes.legend(fontsize=SMALLER, frameon=False, **above).get_texts():
        text.set_parse_math(False)
    return axes.figure.figure


# --- heatmaps ---------------------------------------------------------------------------------------------------------


def heatmap_overlays(
    maps: Heatmaps,
    pictures: Sequence[Image.Image],
    *,
    seen: Sequence[Rectangle] | None = None,
    names: Sequence[str] | None = None,
    unit: str = "score a patch",
    ax: Axes | None = None,
) -> Figure:
    """Maps laid over their photographs: a row an image, first the photograph, then a column for each text.

    All maps are on one scale, which ends at nearly the largest number, so that one patch does not leave the others
    pale. (`heatmap.save_overlays` has a scale for each image.)

    Args:
        maps: A number for each image, text and patch.
        pictures: A photograph for each image, upright; or the images as the model was given them.
        seen: What the model sees of each, as ``model.preprocess_geometry(photograph)`` says; None for all of it.
        names: What to write beside each image.
        unit: Of the maps, for the colour bar.
        ax: Where to draw, as panels within its place; None for a figure of its own.

    Returns:
        The figure that the axis is on.

    Raises:
        InputError: Where matplotlib is not installed, or photographs, rectangles or names are not as many as images.

    Example:
        >>> import torch
        >>> from vitdecomp_lens.components import TokenGrid
        >>> maps = Heatmaps(torch.eye(2)[None, None], ("a cat",), TokenGrid(2, 2, (8, 8)), "by hand")
        >>> figure = heatmap_overlays(maps, [Image.new("RGB", (8, 8), "green")])
        >>> [panel.get_title() for panel in figure.axes[0].child_axes]
        ['image', 'a cat']
    """
    whole = [(0.0, 0.0, float(one.width), float(one.height)) for one in pictures]
    rectangles = whole if seen is None else list(seen)
    names = [""] * len(maps) if names is None else list(names)
    if not len(maps) or {len(pictures), len(rectangles), len(names)} != {len(maps)}:
        raise InputError(
            f"Expected a photograph, what is seen of it and a name for each of the {len(maps)} images, at least one; "
            f"got {len(pictures)}, {len(rectangles)} and {len(names)}."
        )
    columns = ("image", *maps.texts)
    width = float(np.clip(0.9 * len(columns) + 0.6, WIDTH, WIDEST))
    height = (width - 0.8) / len(columns) * float(np.mean([one.height / one.width for one in pictures])) * len(maps)
    axes = _axis(ax, (width, height + 0.5))
    panels = _panels(axes, len(maps), len(columns))
    several = [Heatmap("", one) for of_image in maps.values.detach().double().cpu() for one in of_image]
    scale, drawn = scale_of(several), None
    for row, (picture, rectangle) in enumerate(zip(pictures, rectangles, strict=True)):
        on = Photograph(picture, _covered(maps, rectangle))
        on.show(panels[row][0])
        panels[row][0].set_ylabel(fill(printable(names[row]), 18), fontsize=SMALLER, parse_math=False)
        for column, panel in enumerate(panels[row][1:]):
            on.show(panel, grey=True)
            drawn = on.overlay(panel, several[row * len(maps.texts) + column], scale)
    for panel, name in zip(panels[0], columns, strict=True):
        panel.set_title(fill(printable(name), 14, max_lines=3, placeholder=" …"), fontsize=SMALL, parse_math=False)
    _colour_bar(axes, drawn, unit, extend="both", aspect=30)
    return axes.figure.figure


def _covered(maps: Heatmaps, seen: Rectangle) -> Rectangle:
    """Where the patches lie on the photograph: they may reach beyond what the model sees."""
    (height, width), of = maps.grid.image_size, maps.grid.seen or maps.grid.image_size
    left, top, right, bottom = seen
    return left, top, left + (right - left) * width / of[1], top + (bottom - top) * height / of[0]


def _panels(axes: Any, rows: int, columns: int) -> list[list[Any]]:
    """A grid of axes in the place of one."""
    axes.set_axis_off()
    wide, high = 1 / columns, 1 / rows
    return [
        [axes.inset_axes((wide * column, 1 - high * (row + 1), wide * 0.95, high * 0.95)) for column in range(columns)]
        for row in range(rows)
    ]


# --- trees ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Branch:
    """A line of a drawn tree: a concept, or several small ones together.

    Attributes:
        name: What it says.
        level: From 1.
        share: Of the whole; None where only the tree is drawn.
        above: The line of what it refines; -1 on the first level.
    """

    name: str
    level: int
    share: float | None
    above: int


def concept_tree(
    of: ConceptParts | ConceptTree,
    *,
    image: int = 0,
    component: str | None = None,
    threshold: float | int = 0.03,
    levels: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A tree of concepts, and beside each concept the share of an image that it accounts for.

    What refines a concept stands below it, the largest share first, and ``(own)``, what it has beside them; with
    ``(remainder)``, shares of a level sum to 1. A share is signed.

    Args:
        of: An image among the concepts of a tree, as `decompose_by_concepts` gives it; or the tree alone.
        image: Which of the batch.
        component: The label of one component; None for the sum of all.
        threshold: Of shares, in either direction: below the first level, smaller ones are counted together.
        levels: How many levels at most; None for all.
        ax: Where to draw, as two panels within its place; None for a figure of its own.

    Returns:
        The figure that the axis is on.

    Raises:
        UnknownNameError: Where there is no such component.
        InputError: Where matplotlib is not installed, or there is no such image.

    Example:
        >>> figure = concept_tree(ConceptTree.of({"colour": ["red", "blue"], "sea": "on water"}))
        >>> [text.get_text() for text in figure.axes[0].child_axes[0].texts]
        ['colour', 'red', 'blue', 'sea']
    """
    tree = of if isinstance(of, ConceptTree) else of.tree
    levels = tree.depth if levels is None else levels
    if isinstance(of, ConceptTree):
        lines = list(_all_branches(tree, levels))
    else:
        lines = _largest_branches(of, image, component, threshold, levels)
    axes = _axis(ax, (WIDTH, ROW * len(lines) + 0.5))
    axes.set_axis_off()
    longest = max(len(_named(line)) + 2 * line.level for line in lines)
    split = 1.0 if isinstance(of, ConceptTree) else float(np.clip(0.022 * longest, 0.25, 0.6))
    _draw_branches(axes.inset_axes((0, 0, split, 1)), lines, INDENT / split)
    if not isinstance(of, ConceptTree):
        _draw_shares(axes.inset_axes((split, 0, 1 - split, 1)), [line.share or 0.0 for line in lines])
    return axes.figure.figure


def _all_branches(tree: ConceptTree, levels: int) -> Iterator[_Branch]:
    """All concepts, each before those that refine it."""
    place: dict[int, int] = {}
    waiting = [number for number, parent in enumerate(tree.parents) if parent < 0][::-1]
    while waiting:
        number = waiting.pop()
        place[number] = len(place)
        yield _Branch(tree.names[number], tree.depths[number], None, place.get(tree.parents[number], -1))
        if tree.depths[number] < levels:
            waiting += tree.numbers_below[number][::-1]


def _largest_branches(
    found: ConceptParts, image: int, component: str | None, threshold: float, levels: int
) -> list[_Branch]:
    """The concepts of one image that `ConceptParts.show` tells."""
    tree, batch = found.tree, found.vectors.shape[1]
    if not -batch <= image < batch:
        raise InputError(f"Expected an image from 0 to {batch - 1}; got {image}.")
    rows = slice(None) if component is None else [_number(component, found.labels, "component")]
    parts, own = (values[rows, image].sum(0).tolist() for values in (found.shares, found.own_shares))
    lines: list[_Branch] = []

    def add(numbers: Sequence[int], level: int, above: int) -> None:
        small = [number for number in numbers if level > 1 and abs(parts[number]) < threshold]
        for number in sorted(set(numbers) - set(small), key=lambda number: -parts[number]):
            lines.append(_Branch(tree.names[number], level, parts[number], above))
            below, place = tree.numbers_below[number], len(lines) - 1
            if below and level < levels and any(abs(parts[child]) >= threshold for child in below):
                add(below, level + 1, place)
                add_unless_nothing(OWN, level + 1, own[number], place)
        if small:
            name = tree.names[small[0]] if len(small) == 1 else f"({len(small)} more)"
            add_unless_nothing(name, level, sum(parts[number] for number in small), above)

    def add_unless_nothing(name: str, level: int, share: float, above: int) -> None:
        if abs(share) >= LEAST:
            lines.append(_Branch(name, level, share, above))

    add([number for number, parent in enumerate(tree.parents) if parent < 0], 1, -1)
    lines.append(_Branch(REST, 1, float(found.remainder_share()[rows, image].sum()), -1))
    return lines


def _named(line: _Branch) -> str:
    return _short(line.name, 30 - 2 * line.level)


def _draw_branches(axes: Any, lines: Sequence[_Branch], step: float) -> None:
    """Names, indented by a step a level, joined to what they refine."""
    last = {line.above: row for row, line in enumerate(lines)}
    for row, line in enumerate(lines):
        left = step * (line.level - 1)
        if line.above >= 0:
            stem = left - step * 0.7
            axes.plot([stem, left - step * 0.15], [row, row], color="0.7", linewidth=0.7)
            if last[line.above] == row:
                axes.plot([stem, stem], [line.above + 0.45, row], color="0.7", linewidth=0.7)
        weight, colour = ("bold" if line.level == 1 else "normal"), (GREY if line.name.startswith("(") else "black")
        axes.text(left, row, _named(line), va="center", fontsize=SMALL, weight=weight, color=colour, parse_math=False)
    axes.set(xlim=(0, 1), ylim=(len(lines) - 0.5, -0.5))
    axes.set_axis_off()


def _draw_shares(axes: Any, shares: Sequence[float]) -> None:
    """A bar for each line, and its number."""
    from matplotlib import colormaps

    colours = colormaps[COLOURS]
    percent = [100 * share for share in shares]
    drawn = axes.barh(range(len(percent)), percent, 0.7, color=[colours(0.85 if one > 0 else 0.15) for one in percent])
    axes.bar_label(drawn, [f"{one:.1f}".replace("-", "−") for one in percent], fontsize=SMALLER, padding=2, color=GREY)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_ylim(len(percent) - 0.5, -0.5)
    axes.margins(x=0.25)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=SMALLER)
    axes.set_xlabel("share of the whole, %", fontsize=SMALL)
    axes.spines[["top", "right", "left"]].set_visible(False)


# --- what all share ---------------------------------------------------------------------------------------------------


def _axis(ax: Any, size: tuple[float, float]) -> Any:
    """The axis that is given, or that of a new figure which nobody else holds."""
    if not can_draw():
        raise InputError(INSTALL)
    if ax is None:
        from matplotlib.figure import Figure

        return Figure(figsize=size, layout="constrained").add_subplot()
    if not hasattr(ax, "inset_axes"):
        raise InputError(f"Expected ax= as one axis of matplotlib, such as figure.subplots(); got {type(ax).__name__}.")
    return ax


def _colour_bar(axes: Any, drawn: Any, unit: str, **options: Any) -> None:
    from matplotlib.cm import ScalarMappable

    # Of the colours as they are, without the opacity of a map.
    bar = axes.figure.colorbar(ScalarMappable(drawn.norm, drawn.cmap), ax=axes, fraction=0.06, pad=0.03, **options)
    bar.ax.tick_params(labelsize=SMALLER, length=2)
    bar.set_label(fill(printable(unit), 24), fontsize=SMALL, parse_math=False)
    bar.outline.set_visible(False)


def _number(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        raise UnknownNameError(f"There is no {what} {name!r}; {near_matches(name, names)}")
    return list(names).index(name)


def _short(name: str, most: int) -> str:
    """A name that fits, printable."""
    shown = printable(name)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _bare(value: float) -> str:
    """A number as short as can be.

    >>> _bare(0.126), _bare(-0.5), _bare(12.31), _bare(0.001)
    ('.13', '−.50', '12.3', '0')
    """
    text = f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    bare = text.replace("0.", ".", 1) if abs(value) < 0.995 else text
    return "0" if bare in (".00", "-.00") else bare.replace("-", "−")
