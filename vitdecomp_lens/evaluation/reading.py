"""Along which directions heatmaps are made: logits of classes, texts, or a probe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.applications import heatmap
from vitdecomp_lens.applications.heatmap.gradients import Of
from vitdecomp_lens.decompose import attribute_tokens
from vitdecomp_lens.evaluation.subjects import Question, Samples, Subject, contributions
from vitdecomp_lens.explain import Explainer
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.linear_classifier import LinearClassifier
from vitdecomp_lens.tokens import TokenAttribution

__all__ = ["Read", "Reading", "reading"]


@dataclass(frozen=True, eq=False)
class Reading:
    """Along which directions a model is read.

    Attributes:
        model: The model.
        tokens: Of a batch: scores by token along each direction; and along each direction less the mean of all others.
        rows: The directions, for gradients.
        against: The same, less their mean.
        scores_of: What is read along them.
        whole: Whether the directions are all answers to one question.
    """

    model: HookedViT
    tokens: Callable[[Tensor], tuple[TokenAttribution, TokenAttribution]]
    rows: Float[Tensor, "direction d_out"]
    against: Float[Tensor, "direction d_out"]
    scores_of: Of
    whole: bool = True

    @classmethod
    def of_classes(cls, model: HookedViT, columns: Sequence[int], *, whole: bool = True) -> "Reading":
        """Logits; against the others of these or, where they are not all answers, of all that answer the question."""

        def tokens(images: Tensor) -> tuple[TokenAttribution, TokenAttribution]:
            classes = list(columns)
            plain = TokenAttribution.cat(list(heatmap.tokens_of_classes(model, images, classes)))
            if whole:
                return plain, _against_others(plain)
            return plain, TokenAttribution.cat(list(heatmap.tokens_of_classes(model, images, classes, relative=True)))

        every = torch.eye(model.W_U.shape[1])
        rows = every[list(columns)]
        answers = columns if whole else Explainer(model, class_=columns[0]).question.classes
        return cls(model, tokens, rows, rows - every[list(answers)].mean(0), "logits", whole)

    @classmethod
    def of_directions(
        cls,
        subject: Subject,
        directions: Float[Tensor, "direction d_clip"],
        rows: Float[Tensor, "direction d_rep"],
        classes: Sequence[int],
        *,
        whole: bool = True,
    ) -> "Reading":
        """Some texts, against all; for gradients, the same directions of the representation, or what stands for them.

        Args:
            subject: The model.
            directions: Of all texts.
            rows: For all texts, what gradients are taken along.
            classes: Which texts are read.
            whole: Whether these are all.
        """
        model, own = subject.model, list(classes)
        some, against = directions[own], directions[own] - directions.mean(0)
        read: Callable[..., TokenAttribution] = partial(attribute_tokens, model, through=subject.aligner)

        def tokens(images: Tensor) -> tuple[TokenAttribution, TokenAttribution]:
            plain = read(images, some.to(images.device))
            return plain, _against_others(plain) if whole else read(images, against.to(images.device))

        return cls(model, tokens, rows[own], rows[own] - rows.mean(0), "representation", whole)


# Of a batch's answers: along what to read it, and which of these directions is each image's own.
Read = Callable[[Sequence[int]], tuple[Reading, Sequence[int]]]


def reading(subject: Subject, question: Question, training: Samples, *, together: int) -> Read:
    """A classifier is read along its logits, a CLIP along texts, any other model along texts by its aligner.

    Through an aligner a score is no function of the representation, so that there are no gradients of it. These are
    taken of a linear probe of the same classes, fitted on training images.

    Args:
        subject: The model.
        question: The classes.
        training: For a probe.
        together: How many classes are read together. Of more, only those of a batch are, and not the whole question.
    """
    make: Callable[..., Reading]
    if subject.classifier:
        make = lambda classes, whole: Reading.of_classes(  # noqa: E731
            subject.model, [question.columns[number] for number in classes], whole=whole
        )
    else:
        directions = rows = subject.texts(question.texts).directions
        if subject.aligner is not None:
            total = contributions(subject, training).total
            assert total is not None
            rows = LinearClassifier.fit(total, training.labels[question.label]).weight
        make = lambda classes, whole: Reading.of_directions(  # noqa: E731
            subject, directions, rows, classes, whole=whole
        )
    every = range(len(question.texts))
    if len(every) <= together:
        whole = make(every, True)
        return lambda own: (whole, own)

    def of_batch(own: Sequence[int]) -> tuple[Reading, Sequence[int]]:
        classes = sorted(set(own))
        return make(classes, False), [classes.index(number) for number in own]

    return of_batch


def _against_others(tokens: TokenAttribution) -> TokenAttribution:
    """Scores less the mean over all directions: up to a factor, that of all others."""
    blocks = tuple(block.with_values(block.values - block.values.mean(3, keepdim=True)) for block in tokens.blocks)
    values = tokens.untokened.values
    untokened = replace(tokens.untokened, values=values - values.mean(2, keepdim=True))
    return replace(tokens, blocks=blocks, untokened=untokened, total=None)
