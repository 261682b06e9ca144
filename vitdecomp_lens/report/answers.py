"""What a report is about: classes of a classifier, or texts, and what every component writes for each of them.

A *question* is a group of answers of which one is right: probabilities are among these.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.class_match import class_bank
from vitdecomp_lens.class_names import ClassNames, Question
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.components import By, Component
from vitdecomp_lens.decompose import attribute_tokens, decompose
from vitdecomp_lens.decomposition import Attribution, Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explain import Explainer
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.tokens import TokenAttribution

ABOVE = " above the mean"  # of the answers to the same question
CLASSIFIERS = "the classifier's"  # the space of class vectors
BATCH = 32  # images that are decomposed at once

Images = Float[Tensor, "batch channel height width"]


@dataclass(frozen=True, eq=False)
class Scored:
    """What every component writes for every answer.

    Attributes:
        scores: By component, image and answer, with the model's own total.
        substitute: What is put in place of a component that is ablated by mean: one for all images, or one for each;
            None without reference images.
        gap: How far contributions are from what the model computed, by image.
        decomposed: Where the numbers are from: model, cut, coverage.
    """

    scores: Attribution
    substitute: Float[Tensor, "component #batch answer"] | None
    gap: Float[Tensor, "batch"]
    decomposed: Decomposition


class Answers(ABC):
    """Classes or texts, and how they are read from a model. Abstract.

    Attributes:
        model: The model.
        by: What the components are.
        names: What the answers are called, in full.
        short: The same in short.
        questions: Which of them answer the same question.
        unit: What a score is.
        digits: How many of them are shown behind the point.
        scale: What scores are multiplied by before they are made probabilities; None where that is not known.
    """

    model: HookedViT
    by: By
    names: tuple[str, ...]
    short: tuple[str, ...]
    questions: tuple[Question, ...]
    unit: str
    digits: int
    scale: float | None

    @abstractmethod
    def scored(self, images: Images, reference: Decomposition | None) -> Scored:
        """Scores for all answers.

        Args:
            images: As the model takes them.
            reference: What `mean_of` gave.
        """

    @abstractmethod
    def tokens(self, image: Images, number: int, scored: Scored, answers: Sequence[int]) -> TokenAttribution:
        """Scores of some answers by token.

        Args:
            image: One image.
            number: Which one it was of those that were scored.
            scored: These scores.
            answers: Which answers.
        """

    @abstractmethod
    def mean_of(self, images: Images, parts: Decomposition) -> Decomposition:
        """What components write on average, as one image, in the space that answers are read in.

        Args:
            images: Of which the mean is taken.
            parts: What components write into the representation of each.
        """


class Classes(Answers):
    """The classes of a classifier.

    Args:
        model: The model.
        by: What the components are.
        class_names: A name for each class, other than its own.
        relative: Whether the mean of all logits of a question is taken off.
    """

    def __init__(self, model: HookedViT, by: By, class_names: Sequence[str] | None, *, relative: bool) -> None:
        explainer = Explainer(model, by=by, class_names=class_names)
        known: ClassNames = explainer.names
        self.model, self.by, self.known = model, by, known
        self.names = known.names
        self.short = tuple(known.short(number) or name for number, name in enumerate(known.names))
        self.questions = explainer.questions
        self.relative = relative
        self.unit, self.digits, self.scale = f"logit{ABOVE * relative}", 2, 1.0

    @property
    def _curved(self) -> bool:
        """Whether the representation's way to the logits is frozen at each image."""
        return self.model.has_activation_before_classifier

    @torch.no_grad()
    def scored(self, images: Images, reference: Decomposition | None) -> Scored:
        """Logits; see `Answers.scored`."""
        parts = decomposed(self.model, images, self.by, "representation" if self._curved else "logits")
        assert parts.gap is not None
        gap, mean = parts.gap, None if reference is None else reference.values
        if self._curved:
            weights = [self.model.unembedding_at(h) for h in parts.total]  # type: ignore[union-attr]
            scores = _through(parts, weights)
            if reference is not None:
                mean = _through(_repeated(reference, len(images)), weights).values
        else:
            scores = Attribution(
                parts.values, parts.components, parts.total, complete=parts.complete, metadata=parts.metadata
            )
        if self.relative:
            assert scores.total is not None
            scores = replace(scores, values=self._above(scores.values), total=self._above(scores.total))
            mean = None if mean is None else self._above(mean)
        return Scored(scores, mean, gap, parts)

    def _above(self, scores: Float[Tensor, "*rows class"]) -> Float[Tensor, "*rows class"]:
        return above(scores, self.questions) if self.relative else scores

    def tokens(self, image: Images, number: int, scored: Scored, answers: Sequence[int]) -> TokenAttribution:
        """Logits by token; see `Answers.tokens`."""
        if not self._curved:
            directions = self._above(torch.eye(len(self.names)).to(image)).T[list(answers)]
            return attribute_tokens(self.model, image, directions, by=self.by, of="logits")
        assert scored.decomposed.total is not None
        weight, _ = self.model.unembedding_at(scored.decomposed.total[number])
        return attribute_tokens(self.model, image, self._above(weight).T[list(answers)], by=self.by)

    def mean_of(self, images: Images, parts: Decomposition) -> Decomposition:
        """See `Answers.mean_of`. Logits of some hundreds of images are gone through in batches, and not kept."""
        if self._curved:
            return _mean([parts])
        return _mean(_in_batches(self.model, images, self.by, "logits"))

    def bank(self, vectors: Float[Tensor, "class d_rep"]) -> TextBank:
        """The classes as directions of the representation.

        Args:
            vectors: The rows of the classifier's weight.
        """
        numbered = TextBank(tuple(map(str, range(len(vectors)))), vectors.float(), space=CLASSIFIERS)
        return class_bank([name.strip() or "(no name)" for name in self.short], numbered)


class Texts(Answers):
    """Texts in the space of a CLIP: scores are cosine similarities, their norm frozen.

    Args:
        model: The model.
        by: What the components are.
        texts: The texts of each question.
        aligner: What takes the model's contributions to the texts' space; None for the image tower of their CLIP.
        scale: What similarities are multiplied by before they are made probabilities.
        relative: Whether the mean of all similarities of a question is taken off.
    """

    def __init__(
        self,
        model: HookedViT,
        by: By,
        texts: Mapping[str, TextBank],
        aligner: Aligner | None,
        scale: float | None,
        *,
        relative: bool,
    ) -> None:
        self.model, self.by, self.aligner = model, by, aligner
        self.names = self.short = tuple(text for bank in texts.values() for text in bank.texts)
        first = next(iter(texts.values()))
        for bank in texts.values():
            first.check_space(bank.space)
        self.space, self.tower = first.space, first.made.get("image_tower")
        self._banks = tuple(texts.values())
        self.directions = torch.cat([bank.directions.to(first.directions) for bank in texts.values()])
        sizes = {name: len(bank) for name, bank in texts.items()}
        self.questions = Question.of(len(self.names), sizes)
        if relative:
            self.directions = above(self.directions.T, self.questions).T
        self.unit, self.digits, self.scale = f"cosine similarity{ABOVE * relative}", 3, scale

    def bank(self) -> TextBank:
        """All texts, each once."""
        rows = {text: bank[text] for bank in reversed(self._banks) for text in bank.texts}
        texts = tuple(dict.fromkeys(self.names))
        return TextBank(texts, torch.stack([rows[text].float() for text in texts]), space=self.space)

    @torch.no_grad()
    def scored(self, images: Images, reference: Decomposition | None) -> Scored:
        """Similarities; see `Answers.scored`."""
        own = decomposed(self.model, images, self.by)
        assert own.gap is not None
        parts = in_space(own, self.aligner, space=self.space, tower=self.tower)
        assert parts.total is not None
        norms = parts.total.norm(dim=-1, keepdim=True)
        scores = parts.project(self.directions)
        scores = replace(scores, values=scores.values / norms, total=scores.total / norms)
        mean = None if reference is None else reference.project(self.directions).values / norms
        return Scored(scores, mean, own.gap, parts)

    def tokens(self, image: Images, number: int, scored: Scored, answers: Sequence[int]) -> TokenAttribution:
        """Similarities by token; see `Answers.tokens`."""
        assert scored.decomposed.total is not None
        directions = self.directions[list(answers)].to(image) / scored.decomposed.total[number].norm()
        return attribute_tokens(self.model, image, directions, through=self.aligner, by=self.by)

    def mean_of(self, images: Images, parts: Decomposition) -> Decomposition:
        """See `Answers.mean_of`."""
        return in_space(_mean([parts]), self.aligner, space=self.space, tower=self.tower)


def above(scores: Float[Tensor, "*rows answer"], questions: Sequence[Question]) -> Float[Tensor, "*rows answer"]:
    """Scores minus the mean over the answers of their question, which gives the same probabilities."""
    found = torch.empty_like(scores)
    for question in questions:
        columns = slice(question.classes.start, question.classes.stop)
        found[..., columns] = scores[..., columns] - scores[..., columns].mean(-1, keepdim=True)
    return found


def in_space(parts: Decomposition, aligner: Aligner | None, *, space: str, tower: str | None) -> Decomposition:
    """Contributions in the space of texts.

    Args:
        parts: Contributions of a model.
        aligner: Takes them there; None where they are there.
        space: The texts'.
        tower: The hash of the image tower whose contributions are there, where it is known.

    Raises:
        InputError: Where they are not, and there is no aligner, or it leads elsewhere.
    """
    if aligner is not None:
        aligner.refuse_other(parts, space=space)
        return parts.map(aligner)
    weights = parts.metadata.get("weights")
    if tower is not None and weights is not None and weights != tower:
        raise InputError(
            f"Expected aligner=, which takes the contributions of this model into the space of the texts, {space!r}: "
            f"it is not the CLIP that embedded them. Fit one (docs/align.md), or report on the model's own classes."
        )
    return parts


def decomposed(model: HookedViT, images: Images, by: By, of: Any = "representation") -> Decomposition:
    """Contributions to images, on the CPU."""
    return Decomposition.cat(list(_in_batches(model, images, by, of)))


def _in_batches(model: HookedViT, images: Images, by: By, of: Any) -> Iterator[Decomposition]:
    for batch in images.split(BATCH):
        with torch.no_grad():
            yield decompose(model, batch, by=by, of=of).cpu()


def _mean(batches: Iterable[Decomposition]) -> Decomposition:
    """What components write on average, as one image."""
    sums, count = torch.zeros(()), 0
    for parts in batches:
        sums, count = sums + parts.values.double().sum(1, keepdim=True), count + parts.values.shape[1]
    values = (sums / count).to(parts.values.dtype)
    return Decomposition(values, parts.components, values.sum(0), metadata=parts.metadata)


def _repeated(parts: Decomposition, count: int) -> Decomposition:
    return parts.images([0] * count)


def _through(parts: Decomposition, weights: Sequence[tuple[Tensor, Tensor]]) -> Attribution:
    """Logits of contributions, each image through weights of its own, the bias as a constant."""
    assert parts.total is not None
    several = [
        torch.cat([parts.values[:, number] @ weight.to(parts.values), bias.to(parts.values)[None]])
        for number, (weight, bias) in enumerate(weights)
    ]
    total = torch.stack([h @ weight.to(h) + bias.to(h) for h, (weight, bias) in zip(parts.total, weights, strict=True)])
    constant = Component(kind="constant", name="classifier's bias")
    return Attribution(
        torch.stack(several, 1), (*parts.components, constant), total, complete=parts.complete, metadata=parts.metadata
    )
