"""`concept_tree`: concepts, and the shares of an image that they account for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret import ConceptParts, ConceptTree
from vitdecomp_lens.pictures import COLOURS
from vitdecomp_lens.viz.axes import QUIET, ROW, SMALL, SMALLER, WIDTH, Axes, Figure, axis_for, number_of, short

INDENT = 0.035  # of the width, by which a concept stands right of what it refines
LONGEST, LEAST_LETTERS = 30, 8  # characters of a name at most, and of one that is far to the right at least
REST, OWN = "(remainder)", "(own)"
LEAST = 5e-4  # of shares: less is written 0.0 %


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
    axes = axis_for(ax, (WIDTH, ROW * len(lines) + 0.5))
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
    rows = slice(None) if component is None else [number_of(component, found.labels, "component")]
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
    return short(line.name, max(LONGEST - 2 * line.level, LEAST_LETTERS))


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
        weight, opacity = ("bold" if line.level == 1 else "normal"), (QUIET if line.name.startswith("(") else 1)
        axes.text(left, row, _named(line), va="center", fontsize=SMALL, weight=weight, alpha=opacity, parse_math=False)
    axes.set(xlim=(0, 1), ylim=(len(lines) - 0.5, -0.5))
    axes.set_axis_off()


def _draw_shares(axes: Any, shares: Sequence[float]) -> None:
    """A bar for each line, and its number."""
    from matplotlib import colormaps, rcParams

    colours = colormaps[COLOURS]
    percent = [100 * share for share in shares]
    drawn = axes.barh(range(len(percent)), percent, 0.7, color=[colours(0.85 if one > 0 else 0.15) for one in percent])
    axes.bar_label(drawn, [f"{one:.1f}".replace("-", "−") for one in percent], fontsize=SMALLER, padding=2, alpha=QUIET)
    axes.axvline(0, color=rcParams["axes.edgecolor"], linewidth=0.8)
    axes.set_ylim(len(percent) - 0.5, -0.5)
    axes.margins(x=0.25)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=SMALLER)
    axes.set_xlabel("share of the whole, %", fontsize=SMALL)
    axes.spines[["top", "right", "left"]].set_visible(False)
