"""How good the testbed's models are, and what is wrong with them that can be repaired."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from vitdecomp_lens.linear_classifier import LinearClassifier
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank
from vitdecomp_lens.testbed.models import normalised
from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scenes
from vitdecomp_lens.testbed.vocabulary import tokenize

CHUNK = 500  # scenes at a time
SPURIOUS = 2000  # scenes that the classifier of shape groups is fitted on
PROBED = 4000  # scenes that a probe is fitted on
AMONG = 64  # captions that the right one is to be found among
GROUP_DECAY = 10.0  # of classifiers of groups: so strong that they come near to the difference of the groups' means


@dataclass(frozen=True)
class Measured:
    """What was measured of a model on one set of scenes; shares of one.

    Attributes:
        accuracies: By attribute, on ``test``.
        worst: The accuracy of a linear classifier of round against angular shapes that was fitted on ``spurious``
            scenes: on the worst of the four groups of ``balanced``.
        average: The same classifier on all of ``balanced``.
        typographic: CLIP's accuracy of shapes where another one's name is written on the scenes of ``test``.
        retrieval: CLIP's recall at 1 of captions by images and of images by captions, among 64.
    """

    accuracies: Mapping[str, float]
    worst: float
    average: float
    typographic: float | None = None
    retrieval: float | None = None

    def numbers(self) -> dict[str, float]:
        """All of it by name."""
        found = {**self.accuracies, "worst group": self.worst, "average of groups": self.average}
        more = {"shape, typographic": self.typographic, "retrieval R@1 of 64": self.retrieval}
        return found | {name: value for name, value in more.items() if value is not None}


def measure(name: str, model: nn.Module, *, seed: int = 0, size: int = 2000) -> Measured:
    """Measure a model of the testbed.

    Args:
        name: Which it is.
        model: The model itself, without hooks.
        seed: Of the scenes.
        size: How many scenes of each split.
    """
    test = Scenes("test", seed=seed, size=size)
    worst, average = _groups(model, seed, size)
    if name == "dino":
        fitted = Scenes("validation", seed=seed, size=PROBED)
        return Measured(_probed(model, fitted, test), worst, average)
    if name != "clip":
        return Measured(_named(model, test), worst, average)
    written = Scenes("typographic", seed=seed, size=size)
    images, labels = embedded(model, test), _labels(test)
    classes = {a: text_bank(model, features()[a], templates=TEMPLATES).directions for a in ATTRIBUTES}
    found = {a: _accuracy(images @ classes[a].T, labels[a]) for a in ATTRIBUTES}
    fooled = _accuracy(embedded(model, written) @ classes["shape"].T, labels["shape"])
    return Measured(found, worst, average, fooled, _retrieved(model, images, test))


# --- what models say --------------------------------------------------------------------------------------------------


def embedded(model: Any, scenes: Scenes) -> Float[Tensor, "batch d_rep"]:
    """The representations of scenes: a CLIP's embeddings of length one, else what the classifier reads."""
    if hasattr(model, "encode_image"):
        return by_chunks(scenes, lambda images: functional.normalize(model.encode_image(images), dim=-1))
    return by_chunks(scenes, lambda images: model.forward_head(model.forward_features(images), pre_logits=True))


def by_chunks(scenes: Scenes, function: Callable[[Tensor], Tensor]) -> Float[Tensor, "batch found"]:
    """A function of images, of all scenes."""
    with torch.no_grad():
        starts = range(0, len(scenes), CHUNK)
        chunks = (range(first, min(first + CHUNK, len(scenes))) for first in starts)
        return torch.cat([function(normalised(scenes.images(which))) for which in chunks])


def _labels(scenes: Scenes) -> dict[str, Int[Tensor, "batch"]]:
    return {attribute: scenes.labels(attribute, range(len(scenes))) for attribute in ATTRIBUTES}


def _accuracy(scores: Float[Tensor, "batch value"], labels: Int[Tensor, "batch"]) -> float:
    return float((scores.argmax(1) == labels).double().mean())


def _named(model: nn.Module, test: Scenes) -> dict[str, float]:
    logits = by_chunks(test, model).split([len(values) for values in ATTRIBUTES.values()], 1)
    labels = _labels(test)
    return {a: _accuracy(scores, labels[a]) for a, scores in zip(ATTRIBUTES, logits, strict=True)}


def _retrieved(clip: Any, images: Float[Tensor, "batch d_clip"], test: Scenes) -> float:
    """Recall at 1, both ways; a caption that two scenes share counts for both."""
    captions = test.captions(range(len(test)))
    with torch.no_grad():
        texts = functional.normalize(clip.encode_text(tokenize(captions)), dim=-1)
    right = []
    for first in range(0, len(test) - AMONG + 1, AMONG):
        here = slice(first, first + AMONG)
        scores = images[here] @ texts[here].T
        for best in (scores.argmax(1), scores.argmax(0)):
            right += [captions[first + one] == captions[first + other] for one, other in enumerate(best.tolist())]
    return sum(right) / max(1, len(right))


# --- linear classifiers of representations ----------------------------------------------------------------------------


def _probed(model: nn.Module, fitted: Scenes, test: Scenes) -> dict[str, float]:
    """What linear classifiers of the representation tell of each attribute."""
    (seen, named), (others, wanted) = ((embedded(model, scenes), _labels(scenes)) for scenes in (fitted, test))
    return {a: _accuracy(LinearClassifier.fit(seen, named[a])(others), wanted[a]) for a in ATTRIBUTES}


def _groups(model: nn.Module, seed: int, size: int) -> tuple[float, float]:
    spurious = Scenes("spurious", seed=seed, size=SPURIOUS)
    labels = spurious.labels("group", range(SPURIOUS))
    classifier = LinearClassifier.fit(embedded(model, spurious), labels, decay=GROUP_DECAY)
    balanced = Scenes("balanced", seed=seed, size=size)
    right = classifier(embedded(model, balanced)).argmax(1) == balanced.labels("group", range(size))
    groups = 2 * balanced.labels("group", range(size)) + (balanced.labels("background", range(size)) > 0)
    means = [float(right[groups == group].double().mean()) for group in groups.unique().tolist()]
    return min(means), sum(means) / len(means)
