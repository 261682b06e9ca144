"""What an explanation of one photograph says, as values, as a table, and as JSON. `vitdecomp_lens.explain` makes it.

The logit of a class is the sum of what every component writes along it, constants included. A component's *share*
is its score divided by that logit. Shares therefore sum to 1; a share is negative where a component writes against
the class (for a positive logit), and may exceed 1 where others take back what it writes. A relative explanation
explains the logit minus the mean of all logits, which softmax cannot tell from the logit, and drops what a
component writes for all classes alike. Where a classifier answers several questions (shape, colour...), probabilities
and that mean are of the classes that answer the same one.

The JSON of one explanation (`Explanation.as_dict`) has the fields of `Explanation` by name. The file that the command
line writes is ``{"format": "vitdecomp_lens.explanations", "version": 1, "explanations": [...]}``.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vitdecomp_lens.components import By

FORMAT, VERSION = "vitdecomp_lens.explanations", 1
NEAR_ZERO = 0.05  # of the largest score: a smaller logit is what is left of large scores, and shares of it say nothing
ABOUT_PLACES = (
    "Patches + prefix + no token = score. Prefix: from prefix tokens (class token, registers), which have no place on "
    "the image; MLPs are read at the tokens that they write to. No token: constants, and the output bias of an "
    "attention that is one component."
)
Rectangle = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prediction:
    """One of the classes that the model finds likeliest; the probability is among those of the same question."""

    index: int
    name: str
    probability: float
    logit: float


@dataclass(frozen=True)
class Contribution:
    """What one component writes along the class: a logit's worth, and its share of the whole.

    Attributes:
        component: Its label, such as ``"L3H7"``.
        kind: Its kind, such as ``"head"`` or ``"constant"``.
        score: What it adds to the logit.
        share: Score divided by the logit that is explained; None where that is zero.
        patches: What of the score came from patches; None for a component that has no tokens at all.
        prefix: What of the score came from prefix tokens (class token, registers), which have no place on the image.
    """

    component: str
    kind: str
    score: float
    share: float | None
    patches: float | None
    prefix: float | None

    @property
    def no_token(self) -> float:
        """What of the score came from no token: all of it for a component that has none.

        Where ``by`` leaves attention whole, its output bias is part of the score, and came from no token.

        >>> Contribution("attn.0", "attn", 3.0, 1.0, patches=2.0, prefix=0.5).no_token
        0.5
        """
        return self.score - (self.patches or 0.0) - (self.prefix or 0.0)


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Scores of patches.

    Attributes:
        of: Label of the component, or ``"all"`` for the sum over all that have tokens.
        values: A score a patch; they sum to the components' score but for prefix tokens.
    """

    of: str
    values: Float[Tensor, "row column"]


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What wrote the logit of one class, for one photograph.

    Attributes:
        image: Path of the photograph, or ``"image 0"``.
        size: Its width and height in pixels, upright.
        seen: Left, top, right, bottom of what the patches cover, in pixels of the photograph.
        model: Name of the model.
        by: What the components are.
        relative: Whether the mean of all logits of the question was subtracted.
        index: The class whose logit is explained.
        name: Its name.
        logit: What is explained: the sum of all contributions.
        predictions: The likeliest classes of the question, best first.
        contributions: Every component, constants included, highest score first.
        prefix: What came through each prefix token, summed over components.
        heatmap: The scores of the patches, summed over all components that have tokens.
        top: Heatmaps of single components: those that write most from patches, in either direction.
        gap: How far contributions are from the model's own logit, relative to the largest logit.
        question: What the class answers, such as ``"colour"``, where the classifier answers several questions.
    """

    image: str
    size: tuple[int, int]
    seen: Rectangle
    model: str
    by: By
    relative: bool
    index: int
    name: str
    logit: float
    predictions: tuple[Prediction, ...]
    contributions: tuple[Contribution, ...]
    prefix: dict[str, float]
    heatmap: Heatmap
    top: tuple[Heatmap, ...]
    gap: float
    question: str = ""

    def __repr__(self) -> str:
        most = ", ".join(f"{one.component} {one.score:+.2f}" for one in self.strongest(5))
        relative = " above the mean logit" if self.relative else ""
        return f"Explanation({printable(self.image)}: {self.answer}, logit {self.logit:+.2f}{relative}; {most})"

    @property
    def by_label(self) -> dict[str, Contribution]:
        """The contributions by the label of their component."""
        return {one.component: one for one in self.contributions}

    @property
    def answer(self) -> str:
        """The class as it is shown: with its question, if the classifier answers several, and its index."""
        return printable(f"{self.question}: " * bool(self.question) + f"{self.name} ({self.index})")

    @property
    def on_patches(self) -> float:
        """What came from patches: the sum of the heatmap."""
        return float(self.heatmap.values.double().sum())

    @property
    def elsewhere(self) -> float:
        """What came from no token: constants, components that read none, and what of the others did not."""
        return sum((one.no_token for one in self.contributions), 0.0)

    @property
    def has_shares(self) -> bool:
        """Whether the logit is large enough, beside the largest score, for shares of it to mean something."""
        largest = max((abs(one.score) for one in self.contributions), default=0.0)
        return self.logit != 0 and abs(self.logit) >= NEAR_ZERO * largest

    def strongest(self, count: int) -> tuple[Contribution, ...]:
        """The components that write most in either direction, highest score first; constants are left out."""
        others = [one for one in self.contributions if one.kind != "constant"]
        chosen = sorted(others, key=lambda one: -abs(one.score))[:count]
        return tuple(sorted(chosen, key=lambda one: -one.score))

    def on_photograph(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "height width"]:
        """Scores of patches laid back through crop and resize onto the photograph's pixels.

        Args:
            values: A score a patch, such as ``heatmap.values``.

        Returns:
            For each pixel the score of the patch that holds its centre; NaN where the model does not look.
        """
        width, height = self.size
        left, top, right, bottom = self.seen
        rows = _cells(height, top, bottom, values.shape[0])
        columns = _cells(width, left, right, values.shape[1])
        laid = values[rows.clamp(min=0)][:, columns.clamp(min=0)]
        return laid.masked_fill((rows < 0)[:, None] | (columns < 0), torch.nan)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it: numbers, texts, lists; heatmaps as rows of numbers."""
        maps = {"heatmap": _map(self.heatmap), "top": [_map(one) for one in self.top]}
        return {
            **{name: value for name, value in self.__dict__.items() if name not in maps},
            "size": list(self.size),
            "seen": list(self.seen),
            "predictions": [asdict(one) for one in self.predictions],
            "contributions": [asdict(one) for one in self.contributions],
            **maps,
        }

    @classmethod
    def from_dict(cls, packed: dict[str, Any]) -> "Explanation":
        """The explanation that `as_dict` packed."""
        left, top, right, bottom = packed["seen"]
        return cls(
            **{
                **packed,
                "size": (packed["size"][0], packed["size"][1]),
                "seen": (left, top, right, bottom),
                "predictions": tuple(Prediction(**one) for one in packed["predictions"]),
                "contributions": tuple(Contribution(**one) for one in packed["contributions"]),
                "heatmap": _unmap(packed["heatmap"]),
                "top": tuple(map(_unmap, packed["top"])),
            }
        )

    def table(self, count: int = 10) -> Group:
        """A report for the terminal: what the model says, and the components that write most."""
        return Group(self._title(), self._says(), Text(), self._wrote(count))

    def _title(self) -> Text:
        facts = f"{self.size[0]} × {self.size[1]} pixels, {self.model}"
        return Text.assemble((printable(self.image), "bold"), "\n", facts)

    def _says(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        # A long name of a class must not take the room of the numbers.
        table.add_column("probability", justify="right", no_wrap=True, min_width=11)
        table.add_column("logit", justify="right", no_wrap=True, min_width=6)
        table.add_column(printable(self.question) or "class")
        for one in self.predictions:
            style = "bold" if one.index == self.index else ""
            cells = (f"{100 * one.probability:.1f} %", f"{one.logit:+.2f}", f"{printable(one.name)} ({one.index})")
            table.add_row(*(Text(cell, style=style) for cell in cells))
        return table

    def _wrote(self, count: int) -> Table:
        what = "logit relative to the mean logit" if self.relative else "logit"
        table = Table(
            title=Text(f"What writes the {what} of {self.answer}", style="bold"),
            title_justify="left",
            caption=Text(f"{self._about_shares()} {ABOUT_PLACES}"),
            caption_justify="left",
        )
        table.add_column("component")
        for heading in ("score", "share", "patches", "prefix", "no token"):
            table.add_column(heading, justify="right")
        shown, whole = self.strongest(count), self.logit if self.has_shares else None
        for one in shown:
            table.add_row(*_row(one.component, [one], whole))
        rest = [one for one in self.contributions if one.kind != "constant" and one not in shown]
        constants = [one for one in self.contributions if one.kind == "constant"]
        table.add_section()
        if rest:
            table.add_row(*_row(f"{len(rest)} other components", rest, whole))
        table.add_row(*_row(f"{len(constants)} constants", constants, whole))
        table.add_section()
        table.add_row(*_row("total", list(self.contributions), whole), style="bold")
        return table

    def _about_shares(self) -> str:
        if self.has_shares:
            return (
                "Share: score / total. Shares sum to 1, constants included; one is below 0 where a component writes "
                "against the total, and may exceed 1."
            )
        advice = "" if self.relative else " --relative explains the logit minus the mean of all logits."
        return f"No shares: the total is less than {100 * NEAR_ZERO:.0f} % of the largest score.{advice}"


def share_of(score: float, logit: float) -> float | None:
    """Score divided by logit; None for a logit of zero, of which nothing is a share.

    >>> share_of(1.0, 4.0), share_of(1.0, 0.0)
    (0.25, None)
    """
    return score / logit if logit else None


def printable(text: str) -> str:
    r"""A text without characters that a terminal would act on.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _row(label: str, several: list[Contribution], whole: float | None) -> tuple[Text, ...]:
    score = sum((one.score for one in several), 0.0)
    tokened = [one for one in several if one.patches is not None]
    patches = sum((one.patches or 0.0 for one in tokened), 0.0)
    prefix = sum((one.prefix or 0.0 for one in tokened), 0.0)
    share = None if whole is None else share_of(score, whole)
    style = "green" if score > 0 else "red"
    return (
        Text(label),
        Text(_fine(score), style=style),
        Text("–" if share is None else f"{100 * share:+.1f} %"),
        Text(_fine(patches) if tokened else ""),
        Text(_fine(prefix) if tokened else ""),
        Text(_fine(score - patches - prefix)),
    )


def _fine(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # adding 0.0 takes the sign off a rounded zero


def _cells(pixels: int, start: float, end: float, cells: int) -> Tensor:
    """Along one axis, the cell that holds each pixel's centre; -1 outside."""
    place = (torch.arange(pixels, dtype=torch.float64) + 0.5 - start) / (end - start) * cells
    return torch.where((place >= 0) & (place < cells), place.floor(), -1).long()


def _map(heatmap: Heatmap) -> dict[str, Any]:
    return {"of": heatmap.of, "values": heatmap.values.tolist()}


def _unmap(packed: dict[str, Any]) -> Heatmap:
    return Heatmap(packed["of"], torch.tensor(packed["values"], dtype=torch.float64))
