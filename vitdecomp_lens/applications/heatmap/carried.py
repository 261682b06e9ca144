"""Whether any component carries a text at all: how much its scores vary over patches, beside random texts'."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.statistics import interval
from vitdecomp_lens.tokens import TokenAttribution

__all__ = ["LEVEL", "Carried", "Spread"]

LEVEL = 0.95
LEAST = 19  # random texts: with fewer, no p-value is at most 5 %


@dataclass(frozen=True, eq=False, repr=False)
class Carried:
    """Whether texts are carried by any component, beside random texts.

    A component's *spread* along a text is the standard deviation of its scores over the patches of all images. It is
    set in units in which random texts' spreads along the same component have mean 0 and deviation 1, the text being
    counted as one of them, so that components of any size compare; a text's *strength* is the largest over components.
    A random text's strength is the largest over components too: many components are no advantage.

    Attributes:
        texts: The texts.
        best: For each, the label of the component that carries it most.
        strength: For each, that component's spread in these units.
        null: For each, below which strength ``level`` of the random texts stay.
        p: For each, the share of random texts, itself being one, at least as strong: if the text were one of them, it
            would be below 0.05 in 5 % of cases.
        draws: How many random texts there were.
        level: The share.
    """

    texts: tuple[str, ...]
    best: tuple[str, ...]
    strength: Float[Tensor, "text"]
    null: Float[Tensor, "text"]
    p: Float[Tensor, "text"]
    draws: int
    level: float = LEVEL

    @property
    def lacking(self) -> tuple[str, ...]:
        """The texts that no component carries more than random texts."""
        return tuple(text for text, p in zip(self.texts, self.p.tolist(), strict=True) if p > 1 - self.level)

    def __repr__(self) -> str:
        text, draws = len(self.texts), self.draws
        return f"Carried({text=}, {draws=}, {len(self.lacking)} carried by no component)"

    def say(self, text: str) -> str:
        """What is known of one text, in a sentence."""
        row = self.texts.index(text)
        return (
            f"{text!r}: strongest in {self.best[row]} with {float(self.strength[row]):.1f}; "
            f"{100 * self.level:.0f} % of {self.draws} random texts stay below {float(self.null[row]):.1f}, "
            f"p = {float(self.p[row]):.2g}"
        )


class Spread:
    """Adds up how much scores vary over patches and images, batch by batch."""

    def __init__(self) -> None:
        self.labels: tuple[str, ...] = ()
        self._sums = self._squares = torch.zeros(())
        self._counts = torch.zeros(())

    def add(self, tokens: TokenAttribution) -> None:
        """Add a batch, of the same components as those before."""
        sums, squares, counts = [], [], []
        for block in tokens.blocks:
            patches = block.values[:, :, len(block.grid.prefix) :].double()
            sums.append(patches.sum((1, 2)))
            squares.append(patches.square().sum((1, 2)))
            counts += [patches.shape[1] * patches.shape[2]] * len(block)
        self.labels = tokens.labels
        self._sums = self._sums + torch.cat(sums).cpu()
        self._squares = self._squares + torch.cat(squares).cpu()
        self._counts = self._counts + torch.tensor(counts, dtype=torch.float64)[:, None]

    @property
    def deviations(self) -> Float[Tensor, "component direction"]:
        """The standard deviation of each component's scores along each direction; 0 for what has no patches."""
        counts = self._counts.clamp(min=1)
        return (self._squares / counts - (self._sums / counts).square()).clamp(min=0).sqrt()

    def carried(self, texts: Sequence[str]) -> Carried:
        """Hold the first directions, those of texts, against all others, those of random texts.

        Raises:
            InputError: Where there are too few random texts.
        """
        deviations = self.deviations
        own, random = deviations[:, : len(texts)], deviations[:, len(texts) :]
        draws = random.shape[1]
        if draws < LEAST:
            raise InputError(
                f"Expected a null of at least {LEAST} random texts beside those asked for; there are {draws}. "
                f"Pass a larger bank, such as that of general descriptions."
            )
        count = draws + 1
        mean = (random.sum(1, keepdim=True) + own) / count
        squares = (random[:, None] - mean[:, :, None]).square().sum(2) + (own - mean).square()
        unit = (squares / count).sqrt()
        # Along a component that writes nothing, no text is stronger than another.
        scale = torch.where(unit > 0, 1 / unit, 0)
        strength, best = ((own - mean) * scale).max(0)
        null = ((random[:, None] - mean[:, :, None]) * scale[:, :, None]).amax(0)
        at_least = (null >= strength[:, None]).sum(1)
        return Carried(
            texts=tuple(texts),
            best=tuple(self.labels[row] for row in best.tolist()),
            strength=strength,
            null=interval(null.T, 2 * LEVEL - 1)[1],
            p=(at_least + 1) / count,
            draws=draws,
        )
