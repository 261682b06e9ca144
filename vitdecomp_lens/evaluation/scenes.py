"""The testbed under evaluation: its six models, and scenes that are drawn for one purpose each.

Seeds keep purposes apart: those of scenes for a test are no others' scenes, whatever else was drawn before.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitdecomp_lens import testbed
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.evaluation.subjects import Question, Samples, Splits, Subject
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank
from vitdecomp_lens.testbed.models import BUILDERS
from vitdecomp_lens.testbed.shipped import load, load_original

__all__ = ["KINDS", "NAMES", "SceneSamples", "question", "splits", "subject"]

NAMES = tuple(BUILDERS)
TEST, VALIDATION, TRAINING = 10, 20, 30  # the first seed of each purpose
BATCH = 250
# By kind of data, the split of scenes for training, validation and test.
KINDS: Mapping[str, tuple[str, str, str]] = {
    "plain": ("train", "validation", "test"),
    "pairs": ("train", "pairs", "pairs"),
    "spurious": ("spurious", "balanced", "balanced"),
    "typographic": ("train", "typographic", "typographic"),
}


@dataclass(frozen=True, eq=False)
class SceneSamples:
    """Scenes with all that is known of them: `Samples`.

    Attributes:
        scenes: One split; or two of as many scenes, one after the other, labelled ``written`` 0 and 1.
    """

    scenes: tuple[testbed.Scenes, ...]

    def __len__(self) -> int:
        return sum(map(len, self.scenes))

    @cached_property
    def labels(self) -> Mapping[str, Int[Tensor, "_"]]:
        """Of each attribute; ``group`` of shapes (1 for round ones), ``water`` (1 on water); ``written`` (1 if so)."""
        found = {
            name: torch.cat([one.labels(name, range(len(one))) for one in self.scenes])
            for name in (*testbed.ATTRIBUTES, "group")
        }
        water = testbed.ATTRIBUTES["background"].index("water")
        written = torch.cat([torch.full((len(one),), number) for number, one in enumerate(self.scenes)])
        return {**found, "water": (found["background"] == water).long(), "written": written}

    def batches(self, model: HookedViT) -> Iterator[Float[Tensor, "batch channel height width"]]:
        """All scenes, drawn as they are asked for."""
        for one in self.scenes:
            for first in range(0, len(one), BATCH):
                yield testbed.normalised(one.images(range(first, min(first + BATCH, len(one)))))

    def masks(self, model: HookedViT, name: str = "object") -> Bool[Tensor, "batch height width"]:
        """Of the object, the ``second`` object, or the ``word``."""
        return torch.stack([s.masks[name] for one in self.scenes for s in one.scenes(range(len(one)))])


@lru_cache(maxsize=len(NAMES))
def subject(name: str) -> Subject:
    """One of the six models with its shipped weights and aligner.

    Raises:
        UnknownNameError: If there is no such model.
    """
    model, clip = load(name), load_original("clip")

    def texts(several: Sequence[str]) -> TextBank:
        return text_bank(clip, several, templates=TEMPLATES)

    aligner = None if name == "clip" else testbed.aligner(name)
    return Subject(name, model, texts, aligner, classifier=name not in ("clip", "dino"))


@lru_cache(maxsize=len(KINDS))
def splits(kind: str, *, seed: int, size: int) -> Splits:
    """Scenes for training, validation and test, of each ``size``.

    Args:
        kind: One of `KINDS`.
        seed: From 0 to 9.
        size: How many scenes of each.
    """
    names, seeds = KINDS[kind], (TRAINING + seed, VALIDATION + seed, TEST + seed)
    training, *others = (testbed.Scenes(split, seed=s, size=size) for split, s in zip(names, seeds, strict=True))
    if kind != "typographic":
        return Splits(*(SceneSamples((scenes,)) for scenes in (training, *others)))
    clean = (testbed.Scenes("test", seed=scenes.seed, size=size) for scenes in others)
    both: list[Samples] = [SceneSamples(pair) for pair in zip(clean, others, strict=True)]
    return Splits(SceneSamples((training,)), *both)


def question(attribute: str) -> Question:
    """Which value of an attribute a scene has."""
    values = testbed.ATTRIBUTES[attribute]
    first = testbed.CLASSES.index(values[0])
    return Question(attribute, features()[attribute], tuple(range(first, first + len(values))))
