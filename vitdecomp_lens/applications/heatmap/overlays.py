"""Heatmaps laid over their photographs: a row an image, a column a text. Needs matplotlib, the extra ``viz``."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vitdecomp_lens.applications.heatmap.maps import Heatmaps
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import Heatmap, Rectangle, printable
from vitdecomp_lens.pictures import Photograph, save_figure, scale_of

__all__ = ["save_overlays"]

SIDE, GAP = 2.4, 0.45  # inches of a panel, and of what stands above it


def save_overlays(
    maps: Heatmaps,
    photographs: Sequence[Image.Image],
    path: str | Path,
    *,
    seen: Sequence[Rectangle] | None = None,
) -> None:
    """Draw maps over photographs, and write them as PNG, in the colours of `vitdecomp_lens.pictures`.

    The first column is the photograph, then one for each text. Red writes for the text, blue against it, on one scale
    for all maps of an image, which ends at nearly the largest number.

    Args:
        maps: The maps.
        photographs: One an image, upright; or the images as the model was given them.
        path: Where to write.
        seen: What the model sees of each, as ``model.preprocess_geometry(photograph)`` says; None for all of it.

    Raises:
        InputError: If matplotlib is not installed, or photographs or rectangles are not as many as images.
    """
    whole = [(0.0, 0.0, float(one.width), float(one.height)) for one in photographs]
    rectangles = whole if seen is None else list(seen)
    if not len(maps) or (len(photographs), len(rectangles)) != (len(maps), len(maps)):
        raise InputError(
            f"Expected a photograph, and what is seen of it, for each of the {len(maps)} images, at least one; got "
            f"{len(photographs)} and {len(rectangles)}."
        )
    save_figure(lambda: _figure(maps, photographs, rectangles), path)


def _figure(maps: Heatmaps, photographs: Sequence[Image.Image], seen: Sequence[Rectangle]) -> Any:
    from matplotlib.figure import Figure

    rows, columns = len(maps), 1 + len(maps.texts)
    figure = Figure(figsize=(SIDE * columns, (SIDE + GAP) * rows), layout="constrained")
    panels, values = figure.subplots(rows, columns, squeeze=False), maps.values.detach().double().cpu()
    for row, photograph, rectangle, numbers in zip(panels, photographs, seen, values, strict=True):
        on = Photograph(photograph, maps.covered(rectangle))
        on.show(row[0])
        _name(row[0], "the photograph")
        of_image = [Heatmap(text, one) for text, one in zip(maps.texts, numbers, strict=True)]
        for axes, one in zip(row[1:], of_image, strict=True):
            on.show(axes, grey=True)
            on.overlay(axes, one, scale_of(of_image))
            _name(axes, one.of)
    return figure


def _name(axes: Any, title: str) -> None:
    axes.set_title(textwrap.fill(printable(title), 30, max_lines=2, placeholder=" …"), fontsize=8, parse_math=False)
