"""What components say in words, and how often they say it again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.interpret.stability import LEAST, label_stability
from vitdecomp_lens.interpret.text_span import text_span

VARIANT = "corrected"
FEW = 100  # images, below which words mostly tell of these images

Word = tuple[int, float, float]


@dataclass(frozen=True)
class Words:
    """The texts of components.

    Attributes:
        texts: All that are chosen by any.
        said: By a component's label, the number of each of its texts, the share of the component's variance that it
            adds to what those before explain, and how often it is chosen again from images drawn again.
        chance: By label, how often a text drawn at random would be.
        about: How they were read, in a sentence or two.
    """

    texts: tuple[str, ...]
    said: Mapping[str, tuple[Word, ...]]
    chance: Mapping[str, float]
    about: str

    def packed(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {"texts": list(self.texts), "said": dict(self.said), "chance": dict(self.chance), "about": self.about}


def words_of(parts: Decomposition, bank: TextBank, *, steps: int, resamples: int, seed: int, own: bool) -> Words:
    """Read all components but constants by corrected TextSpan, and again from images drawn again.

    Args:
        parts: Contributions to reference images, in the space of the texts.
        bank: The texts.
        steps: How many texts a component at most.
        resamples: How often images are drawn again.
        seed: Of what is drawn.
        own: Whether these images are the report's own, for want of others.
    """
    images = parts.values.shape[1]
    labels = [one.label for one in parts.components if one.kind != "constant"]
    if images < LEAST or not labels:
        return Words((), {}, {}, f"No words: they are read from at least {LEAST} images. Give reference images.")
    # Texts that merely repeat the mean are no news: TextSpan reads how components vary.
    some = replace(parts.select(labels=labels), metadata={**parts.metadata, "space": bank.space})
    read = partial(text_span, steps=min(steps, len(bank)), variant=VARIANT)
    stability = label_stability(some, bank, read, resamples=resamples, seed=seed)
    spans = stability.reading
    numbers: dict[str, int] = {}
    said, chance = {}, {}
    for row, label in enumerate(spans.labels):
        cumulative = [0.0, *spans.share_explained[row].tolist()]
        added = [after - before for before, after in pairwise(cumulative)]
        said[label] = tuple(
            (numbers.setdefault(text, len(numbers)), share, again)
            for (text, again), share in zip(stability[label], added, strict=False)
        )
        chance[label] = float(stability.chance[row])
    return Words(tuple(numbers), said, chance, _about(images, len(bank), resamples, own=own))


def _about(images: int, texts: int, resamples: int, *, own: bool) -> str:
    whose = "the images of this report" if own else f"{images:,} reference images"
    few = f" These are {images}: take the words as a hint only." if images < FEW else ""
    return (
        f"Of {texts:,} texts, those along which the component varies most over {whose} (TextSpan, {VARIANT}). "
        f"Explains: the share of its variance that the text adds. Again: how often the text is chosen when the images "
        f"are drawn again ({resamples} times).{few}"
    )
