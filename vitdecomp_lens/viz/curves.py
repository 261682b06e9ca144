"""`ablation_curves`: what is left with more and more components ablated."""

from collections.abc import Sequence
from itertools import cycle

from vitdecomp_lens.applications import ablation
from vitdecomp_lens.applications.ablation import AblationCurve
from vitdecomp_lens.viz.axes import SMALL, SMALLER, WIDTH, Axes, Figure, axis_for, short

# By Okabe and Ito: people see them apart who are blind to red or green, and so does who prints in grey, mostly.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CHANCE = "0.6"  # grey
LONGEST, BESIDE = 56, 28  # characters of a name, and of one that another stands beside


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
    axes = axis_for(ax, (WIDTH, 2.4))
    from matplotlib import rcParams
    from matplotlib.ticker import MaxNLocator

    colours = cycle((*LINES, rcParams["text.color"]))
    drawn, called = [], [short(str(line.get_label()), LONGEST) for line in plotted.lines]
    for curve, line in zip(curves, plotted.lines, strict=True):
        drawn += axes.plot(
            *line.get_data(),
            linestyle=line.get_linestyle(),
            marker=line.get_marker(),
            markersize=4,
            linewidth=1.2,
            color=CHANCE if curve.order == "random" else next(colours),
        )
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel(plotted.get_xlabel(), fontsize=SMALL)
    axes.set_ylabel(plotted.get_ylabel(), fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    columns = 2 if max(map(len, called)) <= BESIDE else 1
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}  # no curve lies there
    small = {"fontsize": SMALLER, "frameon": False, "ncols": columns, "columnspacing": 1.2}
    for text in axes.legend(drawn, called, **above, **small).get_texts():
        text.set_parse_math(False)
    return axes.figure.figure
