"""Cells in colours, with names beside and below them: what matrix and grid share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.pictures import COLOURS
from vitdecomp_lens.viz.axes import SMALL, SMALLER, WIDEST, WIDTH, colour_bar, short

NOTHING = "0.8"  # the hatching of cells for which there is no number
LONGEST, UPRIGHT = 24, 4  # characters of a name, and of one that is not turned
LOWEST = 1.2  # inches of all rows, in which the name of the colours has room
COLUMN, SLANTED, BELOW = 0.2, 0.042, 0.4  # inches of a column, of a letter of a turned name, and below the names


def size_of(rows: int, row: float, columns: Sequence[str]) -> tuple[float, float]:
    """Inches of a figure in which cells and names have room.

    Args:
        rows: How many.
        row: Inches of one.
        columns: Their names.
    """
    longest = max(map(len, columns), default=0)
    below = SLANTED * min(longest, LONGEST) if longest > UPRIGHT else SLANTED * UPRIGHT
    width = min(max(COLUMN * len(columns) + 0.9, WIDTH), WIDEST)
    return width, max(row * rows, LOWEST) + below + BELOW


def draw_cells(
    axes: Any, cells: np.ndarray, rows: Sequence[str], columns: Sequence[str], unit: str, *, numbers: bool
) -> None:
    """Draw numbers as colours, 0 in the middle, with their names and a colour bar; NaN is hatched."""
    if not cells.size or not np.isfinite(cells).any():
        raise InputError(f"Expected numbers to draw; got {len(rows)} rows of {len(columns)} without any.")
    scale = max(float(np.nanmax(np.abs(cells))), 1e-12)
    axes.patch.set(hatch="/////", edgecolor=NOTHING, linewidth=0)
    drawn = axes.imshow(cells, cmap=COLOURS, vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, columns)) > UPRIGHT else {}
    names = [short(name, LONGEST) for name in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=SMALL, parse_math=False, **turned)
    axes.set_yticks(range(len(rows)), [short(name, LONGEST) for name in rows], fontsize=SMALL, parse_math=False)
    axes.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    axes.grid(which="major", visible=False)
    axes.grid(which="minor", color=axes.get_facecolor(), linestyle="-", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if numbers:
        for (row, column), value in np.ndenumerate(cells):
            colour = "white" if abs(value) > 0.65 * scale else "0.15"
            text = _bare(value) if np.isfinite(value) else ""
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALLER, color=colour)
    colour_bar(axes, drawn, unit)


def _bare(value: float) -> str:
    """A number as short as can be.

    >>> _bare(0.126), _bare(-0.5), _bare(12.31), _bare(0.001)
    ('.13', '−.50', '12.3', '0')
    """
    text = f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    bare = text.replace("0.", ".", 1) if abs(value) < 0.995 else text
    return "0" if bare in (".00", "-.00") else bare.replace("-", "−")
