"""What all figures share: the axis that is drawn into, sizes, names that fit, and colour bars."""

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.explanation import printable
from vitdecomp_lens.pictures import INSTALL, can_draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Axes = Figure = Any  # matplotlib may not be installed

WIDTH, WIDEST = 3.4, 7.0  # inches: a column, and a page
SMALL, SMALLER = 7, 6  # points
ROW = 0.16  # inches that a line of text needs
QUIET = 0.65  # the opacity of what is said beside


def axis_for(ax: Any, size: tuple[float, float]) -> Any:
    """The axis that is given, or that of a new figure which nobody else holds.

    Args:
        ax: What is given; None for a figure of its own.
        size: Inches of that figure.
    """
    if not can_draw():
        raise InputError(INSTALL)
    if ax is None:
        from matplotlib.figure import Figure

        return Figure(figsize=size, layout="constrained").add_subplot()
    if not hasattr(ax, "inset_axes"):
        raise InputError(f"Expected ax= as one axis of matplotlib, such as figure.subplots(); got {type(ax).__name__}.")
    return ax


def colour_bar(axes: Any, drawn: Any, unit: str, **options: Any) -> None:
    """A bar beside an axis, of the colours as they are, without the opacity of a map."""
    from matplotlib.cm import ScalarMappable

    bar = axes.figure.colorbar(ScalarMappable(drawn.norm, drawn.cmap), ax=axes, fraction=0.06, pad=0.03, **options)
    bar.ax.tick_params(labelsize=SMALLER, length=2)
    bar.set_label(folded(unit, 24), fontsize=SMALL, parse_math=False)
    bar.outline.set_visible(False)


def number_of(name: str, names: Sequence[str], what: str) -> int:
    """The place of a name among others."""
    if name not in names:
        raise UnknownNameError(f"There is no {what} {name!r}; {near_matches(name, names)}")
    return list(names).index(name)


def short(name: str, most: int) -> str:
    """A name that fits, printable."""
    shown = printable(name)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def folded(name: str, width: int) -> str:
    r"""A name in up to three lines, printable.

    >>> folded("a score of a text that has many words", 12)
    'a score of a\ntext that\nhas many …'
    """
    return fill(printable(name), width, max_lines=3, placeholder=" …")


def signed(value: float) -> str:
    """A number with its sign, and two digits."""
    return f"{value:+.2f}".replace("-", "−")
