"""Who is evaluated, and on what: models with the words to read them in, images with what is known of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitdecomp_lens.clip import Aligner, TextBank
from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.linear_classifier import LinearClassifier

__all__ = ["Question", "Samples", "Splits", "Subject", "class_scores", "contributions"]


KEPT = 3  # sets of contributions: a task's splits


@runtime_checkable
class Samples(Protocol):
    """Images with what is known of them. They come in batches, always the same ones in the same order.

    Attributes:
        labels: By name, a number for each image.
    """

    @property
    def labels(self) -> Mapping[str, Int[Tensor, "_"]]:
        """By name, a number for each image."""

    def __len__(self) -> int:
        """How many images."""

    def __hash__(self) -> int:
        """By identity: what a model makes of them is kept under it."""

    def batches(self, model: HookedViT) -> Iterator[Float[Tensor, "batch channel height width"]]:
        """All images, as the model takes them."""

    def masks(self, model: HookedViT, name: str = "object") -> Bool[Tensor, "batch height width"]:
        """Which pixels of the images that the model takes show something."""


@dataclass(frozen=True)
class Splits:
    """Images for three purposes, which share none.

    Attributes:
        training: Classifiers are fitted on these, and means taken from them.
        validation: What is chosen is chosen on these.
        test: What is reported is measured on these.
    """

    training: Samples
    validation: Samples
    test: Samples


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and how it is read in words.

    Attributes:
        name: What tables call it.
        model: The model.
        texts: Embeds texts as directions of the CLIP's space, a mean over templates each.
        aligner: Takes contributions, by head, to that space; None for the CLIP itself, whose contributions are there.
        classifier: Whether its logits are of classes.
        random: Texts that mostly mean nothing for the images: beside them it is told whether any component carries
            the texts that are asked for. Without them it is not told.
        kept: Contributions to the last `KEPT` samples.
    """

    name: str
    model: HookedViT
    texts: Callable[[Sequence[str]], TextBank]
    aligner: Aligner | None = None
    classifier: bool = True
    random: Sequence[str] = field(default=(), repr=False)
    kept: dict[Samples, Decomposition] = field(default_factory=dict, init=False, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the model is, and where its images go. What it makes of them comes back to the CPU."""
        return next(self.model.parameters()).device

    def batches(self, samples: Samples) -> Iterator[Float[Tensor, "batch channel height width"]]:
        """All images, where the model is."""
        for images in samples.batches(self.model):
            yield images.to(self.device)

    def in_words(self, parts: Decomposition) -> Decomposition:
        """Contributions in the space of texts."""
        return parts if self.aligner is None else parts.map(self.aligner)


@dataclass(frozen=True)
class Question:
    """What there is to be told of an image: which of several classes it is.

    Attributes:
        label: The name of the right answers among the labels of samples.
        texts: For each class.
        columns: For each class, its column among a classifier's logits.
    """

    label: str
    texts: tuple[str, ...]
    columns: tuple[int, ...]


def contributions(subject: Subject, samples: Samples) -> Decomposition:
    """What the model's components write, by head, in its own space, of all samples; kept for the next task."""
    kept = subject.kept
    if samples in kept:
        kept[samples] = kept.pop(samples)  # the last one asked for is the last one to go
        return kept[samples]
    while len(kept) >= KEPT:
        del kept[next(iter(kept))]
    with torch.no_grad():
        several = [decompose(subject.model, images, by="head").cpu() for images in subject.batches(samples)]
    return kept.setdefault(samples, Decomposition.cat(several))


def class_scores(
    subject: Subject, question: Question, training: Decomposition, labels: Int[Tensor, "batch"]
) -> Callable[[Tensor], Tensor]:
    """What tells the classes, as a function of representations.

    A CLIP's texts; a classifier's logits of them; for a model that has neither, a linear probe.

    Args:
        subject: The model.
        question: The classes.
        training: Contributions to training images, for a probe.
        labels: Their classes.
    """
    if subject.aligner is None:
        directions = subject.texts(question.texts).directions
        return lambda z: z @ directions.to(z).T
    if not subject.classifier:
        assert training.total is not None
        probe = LinearClassifier.fit(training.total, labels)
        return lambda z: probe(z.cpu())
    columns = list(question.columns)
    return lambda z: logits_of(subject.model, z)[:, columns]


def logits_of(model: HookedViT, z: Float[Tensor, "batch d_rep"]) -> Float[Tensor, "batch class"]:
    """The logits of representations, through an activation function before the classifier where there is one."""
    if not model.has_activation_before_classifier:
        return z @ model.W_U.to(z) + model.b_U.to(z)
    weights = (model.unembedding_at(one.to(model.W_U.device)) for one in z)
    return torch.stack([one @ w.to(z) + b.to(z) for one, (w, b) in zip(z, weights, strict=True)])
