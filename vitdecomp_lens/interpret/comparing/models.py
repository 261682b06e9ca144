"""Several models beside each other, as a table and as a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.comparing.cka import match_by_cka
from vitdecomp_lens.interpret.comparing.concentrations import Concentration, concentration
from vitdecomp_lens.interpret.comparing.matches import Matching, refuse_draws
from vitdecomp_lens.interpret.comparing.profiles import match_by_texts
from vitdecomp_lens.pictures import INSTALL, can_draw

MATCHED_BY = ("cka", "texts")


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Several models beside each other.

    Attributes:
        concentrations: By model, how many components carry each feature.
        matchings: By the names of two models, how alike their heads are.
    """

    concentrations: Mapping[str, Concentration]
    matchings: Mapping[tuple[str, str], Matching]

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names."""
        return tuple(self.concentrations)

    @property
    def features(self) -> tuple[str, ...]:
        """The features' names."""
        return next(iter(self.concentrations.values())).features

    def __repr__(self) -> str:
        pairs = len(self.matchings)
        return f"Comparison({', '.join(self.models)}: {len(self.features)} features, {pairs} pairs of models matched)"

    def table(self) -> str:
        """Both as tables in Markdown."""
        tables = [self._concentrated(), *([self._matched()] if self.matchings else [])]
        return "\n\n".join(tables)

    def _concentrated(self) -> str:
        of = [f"{name} (of {len(one.scores)})" for name, one in self.concentrations.items()]
        rows = [[feature, *(one.told(feature) for one in self.concentrations.values())] for feature in self.features]
        return _markdown(["components that carry", *of], rows)

    def _matched(self) -> str:
        rows = []
        for (one, two), found in self.matchings.items():
            mine, others = len(found.above_chance), len(found.flipped().above_chance)
            sizes = (len(found.first), len(found.second))
            measured = [f"{found.mean:.2f}", f"{found.mean_chance:.2f}"]
            counts = [f"{mine} of {sizes[0]}, {others} of {sizes[1]}", str(len(found.mutual))]
            rows.append([f"{one}, {two}", found.measure, *measured, *counts])
        return _markdown(["heads of", "similarity", "best", "by chance", "above chance", "mutual"], rows)

    def plot(self) -> Any:
        """Both as a figure of matplotlib, which has ``savefig``.

        Raises:
            InputError: Where matplotlib, the extra ``viz``, is not installed.
        """
        if not can_draw():
            raise InputError(INSTALL)
        from matplotlib.figure import Figure

        panels = 2 if self.matchings else 1
        height = max(3.0, 0.3 * len(self.features) * len(self.models) + 1)
        figure = Figure(figsize=(5.5 * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        self._draw_ratios(axes[0])
        if self.matchings:
            self._draw_matches(axes[1])
        return figure

    def _draw_ratios(self, axes: Any) -> None:
        """For each feature a row of intervals, one a model."""
        step = 0.8 / len(self.models)
        for number, (name, one) in enumerate(self.concentrations.items()):
            places = [row + step * (number - (len(self.models) - 1) / 2) for row in range(len(self.features))]
            low, ratio, high = (ends.tolist() for ends in (one.low, one.ratio, one.high))
            drawn = axes.plot(ratio, places, "o", markersize=4, label=f"{name} (of {len(one.scores)})")
            axes.hlines(places, low, high, color=drawn[0].get_color())
        axes.set_yticks(range(len(self.features)), self.features, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("components that carry the feature (participation ratio)")
        axes.legend(fontsize="small")

    def _draw_matches(self, axes: Any) -> None:
        """How alike the heads of each two models are, chance taken off."""
        from matplotlib.ticker import FixedLocator

        names = self.models
        grid = [[float("nan")] * len(names) for _ in names]
        for (one, two), found in self.matchings.items():
            row, column = names.index(one), names.index(two)
            grid[row][column] = grid[column][row] = found.mean - found.mean_chance
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="Blues")
        for row, cells in enumerate(grid):
            for column, value in enumerate(cells):
                if not math.isnan(value):
                    colour = "white" if value > 0.5 else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        axes.xaxis.set_major_locator(FixedLocator(range(len(names))))
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        measure = next(iter(self.matchings.values())).measure
        axes.set_title(f"Best matches of heads: best minus chance\n({measure})", fontsize="medium", parse_math=False)
        axes.figure.colorbar(image, ax=axes, shrink=0.8)


def compare_models(
    models: Mapping[str, Decomposition],
    features: Mapping[str, TextBank],
    *,
    by: str = "cka",
    bank: TextBank | None = None,
    resamples: int = 1000,
    draws: int | None = None,
    seed: int = 0,
    max_bytes: int = 2**30,
) -> Comparison:
    """How concentrated features are in several models, and how alike the heads of each two are.

    Args:
        models: By name, contributions in the space of the texts, with their total.
        features: The texts of each feature.
        by: Heads are matched by ``"cka"``, for which all models have to have seen the same images in the same order,
            or by ``"texts"``.
        bank: The texts to match by.
        resamples: Of images, for the intervals of `concentration`.
        draws: Of chance, for matches; None for as many as `match_by_cka` and `match_by_texts` take by themselves.
        seed: Of both.
        max_bytes: As for `match_by_cka`.

    Raises:
        InputError: Where there is no model, ``by`` is neither, or as `concentration`, `match_by_cka` and
            `match_by_texts`.
        UnknownNameError: Where a model has no heads to match.
        CapacityError: As `match_by_cka`.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_features
        >>> one, two = (planted_features(images=100, d_clip=8, components=4, seed=seed) for seed in (0, 1))
        >>> feature = TextBank(["a cat"], one.directions[:1], space="planted")
        >>> compare_models({"one": one.parts, "two": two.parts}, {"cats": feature}, draws=20)
        Comparison(one, two: 1 features, 1 pairs of models matched)
    """
    if not isinstance(models, Mapping) or not models:
        got = f"a {type(models).__name__}" if models else "none"
        raise InputError(f"Expected at least one model, as {{name: decomposition}}; got {got}.")
    if by not in MATCHED_BY or (by == "texts" and bank is None):
        expected = " or ".join(map(repr, MATCHED_BY))
        raise InputError(f"Expected by= as {expected}, the second with bank=, the texts to match by; got {by!r}.")
    refuse_draws(draws, "draws")
    found = {name: concentration(parts, features, resamples=resamples, seed=seed) for name, parts in models.items()}
    heads = {name: parts.select(kind="head") for name, parts in models.items()} if len(models) > 1 else {}
    matchings = {}
    for one, two in combinations(heads, 2):
        if bank is not None and by == "texts":
            matching = match_by_texts(heads[one], heads[two], bank, rotations=draws, seed=seed)
        else:
            matching = match_by_cka(heads[one], heads[two], permutations=draws, seed=seed, max_bytes=max_bytes)
        matchings[one, two] = matching
    return Comparison(found, matchings)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with columns of even width."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])
