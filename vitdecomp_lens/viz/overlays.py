"""`heatmap_overlays`: maps laid over their photographs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vitdecomp_lens.applications.heatmap import Heatmaps
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import Heatmap, Rectangle
from vitdecomp_lens.pictures import Photograph, scale_of
from vitdecomp_lens.viz.axes import SMALL, SMALLER, WIDEST, WIDTH, Axes, Figure, axis_for, colour_bar, folded

LETTER = 0.055  # inches that a letter of a title needs


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
    axes = axis_for(ax, (width, height + 0.5))
    panels = _panels(axes, len(maps), len(columns))
    several = [Heatmap("", one) for of_image in maps.values.detach().double().cpu() for one in of_image]
    scale, drawn = scale_of(several), None
    for row, (picture, rectangle) in enumerate(zip(pictures, rectangles, strict=True)):
        on = Photograph(picture, maps.covered(rectangle))
        on.show(panels[row][0])
        panels[row][0].set_ylabel(folded(names[row], 18), fontsize=SMALLER, parse_math=False)
        for column, panel in enumerate(panels[row][1:]):
            on.show(panel, grey=True)
            drawn = on.overlay(panel, several[row * len(maps.texts) + column], scale)
    for panel, name in zip(panels[0], columns, strict=True):
        panel.set_title(folded(name, _letters(axes, len(columns))), fontsize=SMALL, parse_math=False)
    colour_bar(axes, drawn, unit, extend="both", aspect=30)
    return axes.figure.figure


def _panels(axes: Any, rows: int, columns: int) -> list[list[Any]]:
    """A grid of axes in the place of one."""
    axes.set_axis_off()
    wide, high = 1 / columns, 1 / rows
    return [
        [axes.inset_axes((wide * column, 1 - high * (row + 1), wide * 0.95, high * 0.95)) for column in range(columns)]
        for row in range(rows)
    ]


def _letters(axes: Any, columns: int) -> int:
    """How many letters of a title have room above a panel."""
    return max(6, int(axes.bbox.width / axes.figure.figure.dpi / columns / LETTER))
