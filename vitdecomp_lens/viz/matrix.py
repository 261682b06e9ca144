"""`component_feature_matrix`: which components carry which feature."""

from collections.abc import Sequence

import numpy as np

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret import FeatureScores
from vitdecomp_lens.viz.axes import QUIET, ROW, SMALL, Axes, Figure, axis_for, number_of
from vitdecomp_lens.viz.cells import draw_cells, size_of

UNITS = {
    "correlation": "correlation with the whole",
    "covariance": "covariance with the whole",
    "share": "share of the feature's variance",
}


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
        The figure that the axis is on. Hatched is where there is no number: shares of a feature that does not vary.

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
    columns = [number_of(name, scores.features, "feature") for name in names]
    several = scores.covariance / scores.total if by == "share" else getattr(scores, by)
    values = several.where(several.isfinite(), np.nan).cpu().double().numpy()
    if components is None:
        if most < 1:
            raise InputError(f"Expected most= of at least 1; got {most}.")
        largest = np.abs(np.nan_to_num(values[:, columns])).max(1, initial=0)
        able = [row for row, component in enumerate(scores.components) if component.kind != "constant"]
        rows = sorted(sorted(able, key=lambda row: -largest[row])[:most])
    else:
        rows = [number_of(label, scores.labels, "component") for label in components]
    cells = values[np.ix_(rows, columns)]
    axes = axis_for(ax, size_of(len(rows), ROW, names))
    numbers = len(columns) <= 8 if numbers is None else numbers
    draw_cells(axes, cells, [scores.labels[row] for row in rows], names, UNITS[by], numbers=numbers)
    if len(rows) < len(scores):
        axes.set_xlabel(f"{len(rows)} of {len(scores)} components", fontsize=SMALL, alpha=QUIET)
    return axes.figure.figure
