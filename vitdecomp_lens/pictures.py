"""Explanations as pictures: the photograph, the evidence laid over it, and the maps of single components.

Needs matplotlib, the optional extra ``viz``. Nothing global is touched: no backend is chosen, no figure stays open.
"""

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import Explanation, Heatmap, printable

INSTALL = "Pictures need matplotlib: pip install 'vitdecomp-lens[viz]'."
COLOURS = "RdBu_r"
OPACITY = 0.9
FADED = 0.62  # how much of the photograph's contrast is left below a map
SATURATED = 99.5  # percentile of the scores that the scale ends at
LARGEST = 1200  # pixels of a photograph's longer side that are drawn
COLUMNS = 5
WIDTH, MARGIN = 11.0, 0.65  # inches
PHOTOGRAPH = 3.3  # inches that a photograph is wide, unless it is high
SHORTEST = 1.8  # inches that the rows of bars need
NAMED = {"mlp": "MLPs", "neuron": "neurons"}
GREY, OUTLINE = "0.35", "#f2b134"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def save_picture(explanation: Explanation, photograph: Image.Image, path: str | Path) -> None:
    """Draw an explanation, and write it as PNG.

    The maps show scores in units of the logit on a diverging scale with 0 in the middle, white; red writes for the
    class, blue against it. The maps of single components share one scale.

    Args:
        explanation: The explanation.
        photograph: Its photograph, upright; see `vitdecomp_lens.hooked.preprocess.open_upright`.
        path: Where to write.

    Raises:
        InputError: If matplotlib is not installed, or the photograph is another one.
    """
    if not can_draw():
        raise InputError(INSTALL)
    if photograph.size != explanation.size:
        raise InputError(f"Expected the photograph of {explanation.size} pixels; got one of {photograph.size}.")
    with warnings.catch_warnings():
        # File names and class names in scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = _Drawing(explanation, photograph).figure()
        figure.savefig(path, dpi=150, facecolor="white")


class _Drawing:
    """One figure in the making."""

    def __init__(self, explanation: Explanation, photograph: Image.Image) -> None:
        self.explanation = explanation
        small = photograph.convert("RGB")
        small.thumbnail((LARGEST, LARGEST))
        self.photograph = np.asarray(small)
        # Lightened, because the middle of the scale is white: what writes nothing must not stand out.
        self.grey = (255 - FADED * (255 - np.asarray(small.convert("L"), dtype=np.float32))).astype(np.uint8)

    def figure(self) -> Any:
        """The finished figure."""
        from matplotlib.figure import Figure

        maps = self.explanation.top
        rows = -(-len(maps) // COLUMNS)
        heights = [self._panel_height() + MARGIN, *([self._map_height() * rows + 0.6] if rows else [])]
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.7), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # type: ignore[union-attr,call-arg]
        figure.suptitle(self._title(), fontsize=13, fontweight="bold", parse_math=False)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        self._draw_overview(parts[0])
        if rows:
            self._draw_maps(parts[1], maps, rows)
        return figure

    # Sizes ------------------------------------------------------------------------------------------------

    def _panel_height(self) -> float:
        width, height = self.explanation.size
        return float(np.clip(PHOTOGRAPH * height / width, SHORTEST, 4.6))

    def _map_height(self) -> float:
        left, top, right, bottom = self.explanation.seen
        return float(np.clip(1.9 * (bottom - top) / (right - left), 1.0, 3.5)) + 0.55

    # Texts ------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        one = self.explanation
        said = next((p for p in one.predictions if p.index == one.index), None)
        likely = "" if said is None else f", probability {100 * said.probability:.1f} %"
        what = "logit above the mean logit" if one.relative else "logit"
        name = textwrap.fill(one.answer, 90, max_lines=2, placeholder=" …")
        return f"{name}\n{what} {_signed(one.logit)}{likely}"

    def _places(self) -> str:
        one = self.explanation
        prefix = [f"{name}: {_signed(score)}" for name, score in one.prefix.items()]
        parts = [f"patches: {_signed(one.on_patches)}", *prefix, f"no token: {_signed(one.elsewhere)}"]
        return textwrap.fill(" · ".join(parts), 52, max_lines=3, placeholder=" …")

    def _sees(self) -> str:
        """Whether the model sees all of the photograph, but for less than a pixel."""
        (width, height), (left, top, right, bottom) = self.explanation.size, self.explanation.seen
        whole = left < 1 and top < 1 and right > width - 1 and bottom > height - 1
        return "The model sees all of it" if whole else "The model sees what is in the box"

    def _without_map(self) -> str:
        """Which components have no map, whatever they write, and why."""
        contributions, prefix = self.explanation.contributions, self.explanation.prefix
        of = {kind: [c.patches for c in contributions if c.kind == kind] for kind in NAMED}
        # Only where no component of the kind read a patch: what is small has a map, if a pale one.
        kinds = [NAMED[kind] for kind, read in of.items() if read and all(patches == 0 for patches in read)]
        tokens = next(iter(prefix)) if len(prefix) == 1 else "prefix tokens"
        told = [f"{' and '.join(kinds)} are read at {tokens} only"] if kinds and prefix else []
        return f"Without maps: {'; '.join([*told, 'constants come from no token'])}"

    # Panels -----------------------------------------------------------------------------------------------

    def _draw_overview(self, part: Any) -> None:
        photograph, evidence, bars = part.subplots(1, 3, width_ratios=[1, 1, 0.75])
        self._show(photograph, self.photograph)
        self._outline(photograph)
        name = textwrap.fill(printable(Path(self.explanation.image).name), 44, max_lines=2, placeholder=" …")
        _label(photograph, self._sees(), name)
        self._show(evidence, self.grey, cmap="gray", vmin=0, vmax=255)
        self._outline(evidence)
        heatmap = self.explanation.heatmap
        scale = _scale([heatmap])
        drawn = self._overlay(evidence, heatmap, scale)
        _label(evidence, "Where the logit comes from, all components", self._places())
        _colour_bar(part, drawn, _beyond([heatmap], scale), cax=evidence.inset_axes((1.03, 0, 0.045, 1)))
        self._draw_bars(bars)

    def _draw_bars(self, axes: Any) -> None:
        from matplotlib import colormaps

        one = self.explanation
        shown = one.strongest(10)
        others = [c.score for c in one.contributions if c.kind != "constant" and c not in shown]
        constants = [c.score for c in one.contributions if c.kind == "constant"]
        rows = [(c.component, c.score) for c in shown]
        rows += [(name, sum(scores)) for name, scores in (("others", others), ("constants", constants)) if scores]
        names, scores = [textwrap.shorten(printable(name), 24) for name, _ in rows], [score for _, score in rows]
        colours = colormaps[COLOURS]
        drawn = axes.barh(range(len(rows)), scores, color=[colours(0.85 if s > 0 else 0.15) for s in scores])
        axes.set_yticks(range(len(rows)), names, fontsize=8, parse_math=False)
        axes.bar_label(drawn, [_signed(score) for score in scores], fontsize=7.5, padding=2, color=GREY)
        axes.invert_yaxis()
        axes.axhline(len(shown) - 0.5, color="0.8", linewidth=0.8)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.margins(x=0.22)
        axes.tick_params(axis="x", labelsize=7.5)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        _label(axes, "What writes it", "score, in units of the logit")

    def _draw_maps(self, part: Any, maps: Sequence[Heatmap], rows: int) -> None:
        columns = min(COLUMNS, len(maps))
        grid = part.subplots(rows, columns, squeeze=False)
        contributions, scale = self.explanation.by_label, _scale(maps)
        names = list(self.explanation.prefix)
        source = names[0] if len(names) == 1 else "prefix tokens"
        drawn = None
        for place, axes in enumerate(grid.flat):
            if place >= len(maps):
                axes.set_axis_off()
                continue
            self._show(axes, self.grey, cmap="gray", vmin=0, vmax=255)
            drawn = self._overlay(axes, maps[place], scale)
            left, top, right, bottom = self.explanation.seen
            axes.set_xlim(left, right)
            axes.set_ylim(bottom, top)
            one = contributions[maps[place].of]
            held = one.prefix or 0.0
            prefix = f", {_signed(held)} of it from {source}" if abs(held) >= 0.005 else ""
            axes.set_title(printable(one.component), fontsize=9, fontweight="bold", parse_math=False)
            largest = f"largest patch {_largest([maps[place]]):+.3f}".replace("-", "−")
            axes.set_xlabel(f"{_signed(one.score)}{prefix}\n{largest}", fontsize=7.5, color=GREY)
        heading = "Components that write most from patches, on one scale"
        part.suptitle(f"{heading}\n{self._without_map()}", fontsize=10, color="0.2")
        _colour_bar(part, drawn, _beyond(maps, scale), ax=list(grid.flat), shrink=0.9, pad=0.02, aspect=22 * rows / 2)

    def _show(self, axes: Any, picture: Any, **options: Any) -> None:
        width, height = self.explanation.size
        axes.imshow(picture, extent=(0, width, height, 0), **options)
        axes.set_anchor("N")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)

    def _outline(self, axes: Any) -> None:
        from matplotlib.patches import Rectangle

        left, top, right, bottom = self.explanation.seen
        outline = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=OUTLINE, linewidth=2)
        outline.set_clip_on(False)
        axes.add_patch(outline)

    def _overlay(self, axes: Any, heatmap: Heatmap, scale: float) -> Any:
        """A map on the photograph: colour says how much, and the less it says the more the photograph shows."""
        values = heatmap.values.numpy()
        left, top, right, bottom = self.explanation.seen
        limits = axes.get_xlim(), axes.get_ylim()
        opacity = OPACITY * np.clip(1.5 * np.abs(values) / scale, 0, 1)
        drawn = axes.imshow(
            values,
            extent=(left, right, bottom, top),
            cmap=COLOURS,
            vmin=-scale,
            vmax=scale,
            alpha=opacity,
            interpolation="nearest",
        )
        axes.set_xlim(limits[0])
        axes.set_ylim(limits[1])
        return drawn


def _scale(maps: Sequence[Heatmap]) -> float:
    """Where the scale ends: at nearly the largest score, so that one patch does not leave all others pale."""
    sizes = np.abs(np.concatenate([one.values.numpy().ravel() for one in maps]))
    return max(float(np.percentile(sizes, SATURATED)), 1e-12)


def _largest(maps: Sequence[Heatmap]) -> float:
    """The score of the patch that writes most, in either direction."""
    values = np.concatenate([one.values.numpy().ravel() for one in maps])
    return float(values[np.abs(values).argmax()])


def _beyond(maps: Sequence[Heatmap], scale: float) -> str:
    """What to say of the largest score where the scale does not reach it."""
    largest = _largest(maps)
    return f"\n(largest: {_signed(largest)})" if abs(largest) > scale * 1.01 else ""


def _colour_bar(part: Any, drawn: Any, beyond: str, **where: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import MaxNLocator

    # Of the colours as they are without the opacity of a map.
    bar = part.colorbar(ScalarMappable(drawn.norm, drawn.cmap), extend="both", ticks=MaxNLocator(5), **where)
    bar.ax.tick_params(labelsize=7.5)
    bar.set_label(f"logit a patch{beyond}", fontsize=8)
    bar.outline.set_visible(False)


def _label(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, fontsize=10, color="0.2")
    axes.set_xlabel(below, fontsize=8, color=GREY, parse_math=False)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
