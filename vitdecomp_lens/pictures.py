"""Explanations as pictures: the photograph, the evidence laid over it, and maps of components, or of phrases.

Needs matplotlib, the optional extra ``viz``. Nothing global is touched: no backend is chosen, no figure stays open.
"""

import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import Explanation, Heatmap, Rectangle, printable

INSTALL = "Pictures need matplotlib: pip install 'vitdecomp-lens[viz]'."
COLOURS = "RdBu_r"
OPACITY = 0.9
FADED = 0.62  # how much of the photograph's contrast is left below a map
SATURATED = 99.5  # percentile of the scores that the scale ends at
LARGEST = 1200  # pixels of a photograph's longer side that are drawn
COLUMNS = 5
WIDTH, MARGIN = 11.0, 0.65  # inches
PHOTOGRAPH = 3.3  # inches that a photograph is wide, unless it is high
NARROWEST = 6.0  # inches
SHORTEST = 1.8  # inches that the rows of bars need
UNIT = "logit a patch"
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
    if photograph.size != explanation.size:
        raise InputError(f"Expected the photograph of {explanation.size} pixels; got one of {photograph.size}.")
    save_figure(lambda: _Drawing(explanation, photograph).figure(), path)


def save_maps(
    maps: Sequence[Heatmap],
    photograph: Image.Image,
    path: str | Path,
    *,
    seen: Rectangle,
    title: str,
    notes: Sequence[str] = (),
    unit: str = "score a patch",
) -> None:
    """Draw a photograph and beside it several maps of it, on one scale as in `save_picture`, and write them as PNG.

    Args:
        maps: At least one; each is drawn under the name of what it is of.
        photograph: The photograph, upright.
        path: Where to write.
        seen: Left, top, right, bottom of what the maps cover, in pixels of the photograph.
        title: Of the whole.
        notes: What to say below each map.
        unit: Of the scores.

    Raises:
        InputError: If matplotlib is not installed, there is no map, or there are notes for others than the maps.
    """
    if not maps or len(notes) not in (0, len(maps)):
        raise InputError(f"Expected at least one map, and a note for each or none; got {len(maps)} and {len(notes)}.")
    save_figure(lambda: _maps_figure(maps, Photograph(photograph, seen), title, notes or [""] * len(maps), unit), path)


def save_figure(draw: Callable[[], Any], path: str | Path) -> None:
    """Draw a figure, and write it as PNG.

    Args:
        draw: Makes the figure.
        path: Where to write.

    Raises:
        InputError: If matplotlib is not installed.
    """
    if not can_draw():
        raise InputError(INSTALL)
    with warnings.catch_warnings():
        # File names and class names in scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        draw().savefig(path, dpi=150, facecolor="white")


class Photograph:
    """What maps are laid over.

    Args:
        photograph: The photograph, upright.
        seen: Left, top, right, bottom of what maps cover, in its pixels.
    """

    def __init__(self, photograph: Image.Image, seen: Rectangle) -> None:
        self.size, self.seen = photograph.size, seen
        small = photograph.convert("RGB")
        small.thumbnail((LARGEST, LARGEST))
        self.photograph = np.asarray(small)
        # Lightened, because the middle of the scale is white: what writes nothing must not stand out.
        self.grey = (255 - FADED * (255 - np.asarray(small.convert("L"), dtype=np.float32))).astype(np.uint8)

    def sees(self) -> str:
        """Whether the model sees all of the photograph, but for less than a pixel."""
        (width, height), (left, top, right, bottom) = self.size, self.seen
        whole = left < 1 and top < 1 and right > width - 1 and bottom > height - 1
        return "The model sees all of it" if whole else "The model sees what is in the box"

    def map_height(self) -> float:
        """Inches for a row of maps with what is written around them."""
        left, top, right, bottom = self.seen
        return float(np.clip(1.9 * (bottom - top) / (right - left), 1.0, 3.5)) + 0.55

    def show(self, axes: Any, *, grey: bool = False) -> None:
        """The photograph; without its colours, to lay a map over it."""
        width, height = self.size
        picture: Any = self.grey if grey else self.photograph
        options: Any = {"cmap": "gray", "vmin": 0, "vmax": 255} if grey else {}
        axes.imshow(picture, extent=(0, width, height, 0), **options)
        axes.set_anchor("N")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)

    def show_seen(self, axes: Any) -> None:
        """What the model sees of it, without its colours."""
        self.show(axes, grey=True)
        left, top, right, bottom = self.seen
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)

    def outline(self, axes: Any) -> None:
        """A box around what the model sees."""
        from matplotlib.patches import Rectangle

        left, top, right, bottom = self.seen
        outline = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=OUTLINE, linewidth=2)
        outline.set_clip_on(False)
        axes.add_patch(outline)

    def overlay(self, axes: Any, heatmap: Heatmap, scale: float) -> Any:
        """A map on the photograph: colour says how much, and the less it says the more the photograph shows."""
        values = heatmap.values.numpy()
        left, top, right, bottom = self.seen
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


class _Drawing:
    """One figure of an explanation in the making."""

    def __init__(self, explanation: Explanation, photograph: Image.Image) -> None:
        self.explanation = explanation
        self.on = Photograph(photograph, explanation.seen)

    def figure(self) -> Any:
        """The finished figure."""
        from matplotlib.figure import Figure

        maps = self.explanation.top
        rows = -(-len(maps) // COLUMNS)
        heights = [self._panel_height() + MARGIN, *([self.on.map_height() * rows + 0.6] if rows else [])]
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
        self.on.show(photograph)
        self.on.outline(photograph)
        name = textwrap.fill(printable(Path(self.explanation.image).name), 44, max_lines=2, placeholder=" …")
        _label(photograph, self.on.sees(), name)
        self.on.show(evidence, grey=True)
        self.on.outline(evidence)
        heatmap = self.explanation.heatmap
        scale = scale_of([heatmap])
        drawn = self.on.overlay(evidence, heatmap, scale)
        _label(evidence, "Where the logit comes from, all components", self._places())
        _colour_bar(part, drawn, UNIT + _beyond([heatmap], scale), cax=evidence.inset_axes((1.03, 0, 0.045, 1)))
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
        contributions, scale = self.explanation.by_label, scale_of(maps)
        names = list(self.explanation.prefix)
        source = names[0] if len(names) == 1 else "prefix tokens"
        drawn = None
        for place, axes in enumerate(grid.flat):
            if place >= len(maps):
                axes.set_axis_off()
                continue
            self.on.show_seen(axes)
            drawn = self.on.overlay(axes, maps[place], scale)
            one = contributions[maps[place].of]
            held = one.prefix or 0.0
            prefix = f", {_signed(held)} of it from {source}" if abs(held) >= 0.005 else ""
            axes.set_title(printable(one.component), fontsize=9, fontweight="bold", parse_math=False)
            largest = f"largest patch {_largest([maps[place]]):+.3f}".replace("-", "−")
            axes.set_xlabel(f"{_signed(one.score)}{prefix}\n{largest}", fontsize=7.5, color=GREY)
        heading = "Components that write most from patches, on one scale"
        part.suptitle(f"{heading}\n{self._without_map()}", fontsize=10, color="0.2")
        _colour_bar(
            part, drawn, UNIT + _beyond(maps, scale), ax=list(grid.flat), shrink=0.9, pad=0.02, aspect=22 * rows / 2
        )


def _maps_figure(maps: Sequence[Heatmap], on: Photograph, title: str, notes: Sequence[str], unit: str) -> Any:
    """The photograph, and what the model sees of it under each map."""
    from matplotlib.figure import Figure

    count = 1 + len(maps)
    rows = -(-count // (1 + COLUMNS))
    columns = -(-count // rows)
    width = max(WIDTH * columns / COLUMNS, NARROWEST)
    figure = Figure(figsize=(width, on.map_height() * rows + 0.9), layout="constrained")
    name = textwrap.fill(printable(title), 12 * columns + 18, max_lines=2, placeholder=" …")
    figure.suptitle(name, fontsize=13, fontweight="bold", parse_math=False)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    on.show(panels[0])
    on.outline(panels[0])
    panels[0].set_xlabel(on.sees(), fontsize=7.5, color=GREY)
    scale, drawn = scale_of(maps), None
    for axes, heatmap, note in zip(panels[1:], maps, notes, strict=False):
        on.show_seen(axes)
        drawn = on.overlay(axes, heatmap, scale)
        said = textwrap.fill(printable(heatmap.of), 24, max_lines=4, placeholder=" …")
        axes.set_title(said, fontsize=8.5, fontweight="bold", parse_math=False)
        axes.set_xlabel("\n".join(map(printable, note.splitlines())), fontsize=7.5, color=GREY, parse_math=False)
    for axes in panels[count:]:
        axes.set_axis_off()
    _colour_bar(figure, drawn, unit + _beyond(maps, scale), ax=panels, shrink=0.9, pad=0.02, aspect=22 * rows / 2)
    return figure


def scale_of(maps: Sequence[Heatmap]) -> float:
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


def _colour_bar(part: Any, drawn: Any, label: str, **where: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import MaxNLocator

    # Of the colours as they are without the opacity of a map.
    bar = part.colorbar(ScalarMappable(drawn.norm, drawn.cmap), extend="both", ticks=MaxNLocator(5), **where)
    bar.ax.tick_params(labelsize=7.5)
    bar.set_label(label, fontsize=8)
    bar.outline.set_visible(False)


def _label(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, fontsize=10, color="0.2")
    axes.set_xlabel(below, fontsize=8, color=GREY, parse_math=False)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
