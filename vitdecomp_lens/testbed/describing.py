"""How much of a scene descriptions tell: attribute recall, beside plain retrieval from the bank and chance.

Measure again with ``python -m vitdecomp_lens.testbed.describing``.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.describing import describe
from vitdecomp_lens.testbed.banks import captions, features, general, text_bank
from vitdecomp_lens.testbed.captions import GROUNDS, PLACES
from vitdecomp_lens.testbed.evaluate import Spread, table
from vitdecomp_lens.testbed.evaluation import embedded
from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scenes
from vitdecomp_lens.testbed.shipped import load_original

METHODS = ("pursuit", "retrieval", "pursuit, centred", "retrieval, centred", "random")


@dataclass(frozen=True)
class AttributeRecall:
    """How much of what is true of scenes their descriptions tell, and how much of what they tell is true.

    Attributes:
        by_attribute: For each attribute, the share of scenes whose value is told by any of their phrases.
        precision: The share of told values (each counted once a scene) that are the scene's. A description that tells
            every value recalls all and has a low one.
        scenes: How many.
    """

    by_attribute: Mapping[str, float]
    precision: float
    scenes: int

    @property
    def recall(self) -> float:
        """The mean over attributes."""
        return sum(self.by_attribute.values()) / len(self.by_attribute)

    def numbers(self) -> dict[str, float]:
        """All of it by name."""
        return {**self.by_attribute, "recall": self.recall, "precision": self.precision}

    def __repr__(self) -> str:
        return f"AttributeRecall(recall={self.recall:.3f}, precision={self.precision:.3f}, {self.scenes} scenes)"


def told(text: str) -> frozenset[tuple[str, str]]:
    """The attributes and values that a text of the testbed tells; a word that is written on a scene is none.

    Example:
        >>> sorted(told("a drawing of a small red object at the left with the word circle"))
        [('colour', 'red'), ('position', 'left'), ('size', 'small')]
    """
    text, found = f" {text} ".split(" with the word ")[0] + " ", set()
    for attribute, phrases in (("background", GROUNDS), ("position", PLACES)):
        for value, phrase in phrases.items():
            if f" {phrase} " in text:
                found.add((attribute, value))
                text = text.replace(f" {phrase} ", " ")
    words = text.split()
    for attribute in ("shape", "colour", "pattern", "size"):
        found |= {(attribute, value) for value in ATTRIBUTES[attribute] if value in words}
    return frozenset(found)


def attribute_recall(phrases: Sequence[Sequence[str]], scenes: Scenes) -> AttributeRecall:
    """Compare the phrases that describe scenes with what is true of them.

    Args:
        phrases: For each scene, its description.
        scenes: The scenes, in this order.

    Raises:
        InputError: Where there is not one description for each scene, or no scene.

    Example:
        >>> scenes = Scenes("test", size=2)
        >>> attribute_recall([[scene.attributes["shape"]] for scene in scenes.scenes(range(2))], scenes).by_attribute
        {'shape': 1.0, 'colour': 0.0, 'pattern': 0.0, 'background': 0.0, 'position': 0.0, 'size': 0.0}
    """
    if len(phrases) != len(scenes) or not len(scenes):
        raise InputError(f"Expected a description for each of at least one scene; got {len(phrases)}, {len(scenes)}.")
    labels = {name: scenes.labels(name, range(len(scenes))).tolist() for name in ATTRIBUTES}
    hits, right, all_told = dict.fromkeys(ATTRIBUTES, 0), 0, 0
    for number, description in enumerate(phrases):
        says = frozenset[tuple[str, str]]().union(*map(told, description))
        true = {(name, values[labels[name][number]]) for name, values in ATTRIBUTES.items()}
        for name, _ in says & true:
            hits[name] += 1
        right, all_told = right + len(says & true), all_told + len(says)
    shares = {name: count / len(scenes) for name, count in hits.items()}
    return AttributeRecall(shares, right / max(1, all_told), len(scenes))


def compare_descriptions(
    clip: nn.Module, bank: TextBank, *, phrases: int = 5, seed: int = 0, size: int = 500
) -> dict[str, AttributeRecall]:
    """Attribute recall of `describe`, of the texts of highest cosine, and of texts drawn by chance, on ``test`` scenes.

    Args:
        clip: The testbed's CLIP, whole.
        bank: Texts that are not centred; for the methods that centre, the mean of its texts and the mean image of as
            many ``validation`` scenes are taken off.
        phrases: How many phrases a scene.
        seed: Of scenes and of chance.
        size: How many scenes.

    Returns:
        Of each of `METHODS`.
    """
    scenes, others = (Scenes(split, seed=seed, size=size) for split in ("test", "validation"))
    images, reference = embedded(clip, scenes), embedded(clip, others)
    centred, centre = bank.centred(), reference.mean(0)
    drawn = torch.Generator().manual_seed(seed)
    chance = torch.rand(size, len(bank), generator=drawn).topk(phrases).indices
    told_by = {
        "pursuit": _pursuit(images, bank, phrases, None),
        "retrieval": _nearest(images @ bank.directions.T, bank, phrases),
        "pursuit, centred": _pursuit(images, centred, phrases, reference),
        "retrieval, centred": _nearest((images - centre) @ centred.directions.T, bank, phrases),
        "random": [[bank.texts[number] for number in row] for row in chance.tolist()],
    }
    return {method: attribute_recall(told_by[method], scenes) for method in METHODS}


def _nearest(scores: Float[Tensor, "batch text"], bank: TextBank, phrases: int) -> list[list[str]]:
    return [[bank.texts[number] for number in row] for row in scores.topk(phrases).indices.tolist()]


def _pursuit(
    images: Float[Tensor, "batch d_clip"], bank: TextBank, phrases: int, reference: Float[Tensor, "image d_clip"] | None
) -> list[list[str]]:
    one = (Component(kind="source", name="representation"),)
    whole = Decomposition(images[None], one)
    mean = None if reference is None else Decomposition(reference[None], one)
    return [list(description.phrases) for description in describe(whole, bank, phrases=phrases, reference=mean)]


def _over_seeds(measured: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    columns = {name: [one[name] for one in measured] for name in measured[0]}
    return {name: (statistics.fmean(column), statistics.stdev(column)) for name, column in columns.items()}


def main() -> None:
    """Print the table of the documentation."""
    clip = load_original("clip")
    banks = {
        "features": sum(features().values(), ()),
        "captions": captions(),
        "general": general(),
    }
    for name, texts in banks.items():
        bank = text_bank(clip, texts)
        for phrases in (1, 3, 5):
            runs = [compare_descriptions(clip, bank, phrases=phrases, seed=seed) for seed in (0, 1, 2)]
            found: dict[str, dict[str, Spread]] = {
                method: _over_seeds([run[method].numbers() for run in runs]) for method in METHODS
            }
            sys.stdout.write(f"\n{name}, {len(bank)} texts, {phrases} phrases\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
