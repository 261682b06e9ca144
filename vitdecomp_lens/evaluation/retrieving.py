"""Retrieval by text and by image: precision against what is known of images, and what else is found along."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.applications import retrieval
from vitdecomp_lens.applications.retrieval import Gallery, Precision, Ranking
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.cumulative import can_be_ablated
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.evaluation.records import Record
from vitdecomp_lens.evaluation.subjects import Question, Splits, Subject, contributions
from vitdecomp_lens.interpret.feature_scores import FeatureScores
from vitdecomp_lens.interpret.features import score_features

__all__ = ["BY_IMAGE", "BY_TEXT", "RetrievalProtocol", "agreement", "retrieved"]

BY_TEXT, BY_IMAGE = "retrieval by text", "retrieval by image"
CHOSEN, RANDOM, WHOLE = "chosen components", "random components", "full representation"
ALIGNED, PROJECTED, CHANCE = "full representation, aligned", "its projection on the property's texts", "by chance"


@dataclass(frozen=True)
class RetrievalProtocol:
    """What is fixed before anything is measured.

    Attributes:
        counts: Which numbers of components are tried on validation images.
        at: Precision is that of so many images found.
        deep: By text it is that of so many, too, and how many components are taken is chosen by it: that the first ten
            fit a text is true of almost any number.
        slack: How much less precision on validation images is as good: the fewest components of those are taken.
        queries: How many images of the gallery are sought by, the first ones.
        random: How many sets of as many random components are averaged.
        by: Which scores rank components.
    """

    counts: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    at: int = 10
    deep: int = 100
    slack: float = 0.01
    queries: int = 250
    random: int = 5
    by: str = "correlation"


def retrieved(
    subject: Subject,
    data: Splits,
    questions: Sequence[Question],
    *,
    seed: int,
    clip: Subject | None = None,
    protocol: RetrievalProtocol = RetrievalProtocol(),
) -> Iterator[Record]:
    """Images of a test gallery found by texts, and by other images with respect to one property.

    Components are scored on training images, how many of them are taken is chosen on validation images, and test
    images are the gallery.

    Args:
        subject: The model.
        data: Images.
        questions: The properties: a text for each of its values, and labels of images in it.
        seed: Of random components.
        clip: The CLIP that texts are of, for the paper's measure; without it, the aligned representation takes the
            place of its embeddings.
        protocol: What is fixed.

    Yields:
        By text, for each property, ``precision at 10`` and at 100 over its texts, and the paper's rank correlation
        ``Spearman's rho``. By image, ``precision at 10`` in the property, and ``leakage``: how much more often than by
        chance the other properties agree too, averaged over them. For both how many ``components`` were taken.
    """
    gathered = _Gathered.of(subject, data, questions, protocol)
    yield from _agreement(gathered, seed, clip)
    yield from _by_text(gathered, seed)
    yield from _by_image(gathered, seed)


def agreement(
    subject: Subject,
    data: Splits,
    questions: Sequence[Question],
    *,
    seed: int,
    clip: Subject | None = None,
    protocol: RetrievalProtocol = RetrievalProtocol(),
) -> Iterator[Record]:
    """The paper's measure of retrieval by text alone, which needs to know nothing of images; see `retrieved`."""
    yield from _agreement(_Gathered.of(subject, data, questions, protocol), seed, clip)


@dataclass(frozen=True, eq=False)
class _Gathered:
    """What a model makes of three sets of images."""

    subject: Subject
    data: Splits
    questions: Sequence[Question]
    protocol: RetrievalProtocol
    validation: Decomposition
    test: Decomposition
    scores: FeatureScores
    banks: Mapping[str, TextBank]
    mean: Float[Tensor, "d_clip"]  # of the aligned representation, over training images

    @classmethod
    def of(
        cls, subject: Subject, data: Splits, questions: Sequence[Question], protocol: RetrievalProtocol
    ) -> "_Gathered":
        bank = subject.texts([text for question in questions for text in question.texts]).centred()
        banks = {question.label: bank.select(question.texts) for question in questions}
        training = subject.in_words(contributions(subject, data.training))
        able = training.select(labels=[one.label for one in training.components if can_be_ablated(one)])
        scores = score_features(able, banks, bootstrap=0, permutations=0)
        validation, test = (contributions(subject, one) for one in (data.validation, data.test))
        return cls(subject, data, questions, protocol, validation, test, scores, banks, _whole(training).mean(0))

    @cached_property
    def test_in_words(self) -> Decomposition:
        return self.subject.in_words(self.test)

    def choice(self, label: str, *, by_texts: bool) -> tuple[str, ...]:
        """The components to find images by, the fewest that serve on validation images."""
        protocol = self.protocol
        tried = retrieval.choose_count(
            self.subject.in_words(self.validation) if by_texts else self.validation,
            self.scores,
            label,
            self.data.validation.labels[label],
            counts=protocol.counts,
            at=protocol.deep if by_texts else protocol.at,
            texts=self.banks[label] if by_texts else None,
            by=protocol.by,
        ).tried
        enough = max(one.mean for one in tried.values()) - protocol.slack
        count = min(count for count, one in tried.items() if one.mean >= enough)
        return self.scores.select(label, k=count, by=protocol.by)

    def random(self, count: int, seed: int) -> list[tuple[str, ...]]:
        """Sets of as many components."""
        chance, labels = torch.Generator().manual_seed(seed), self.scores.labels
        orders = (torch.randperm(len(labels), generator=chance).tolist() for _ in range(self.protocol.random))
        return [tuple(labels[row] for row in order[:count]) for order in orders]

    def recording(self, task: str, label: str, seed: int) -> Callable[..., Record]:
        def record(measure: str, method: str, value: float, interval: tuple[float, float] | None = None) -> Record:
            return Record(task, measure, self.subject.name, method, seed, value, of=label, interval=interval)

        return record


def _agreement(gathered: _Gathered, seed: int, clip: Subject | None) -> Iterator[Record]:
    embeddings = None if clip is None else _embeddings(clip, gathered.data)
    parts, scores = gathered.test_in_words, gathered.scores
    found = retrieval.text_agreement(parts, scores, gathered.banks, embeddings, by=gathered.protocol.by)
    for label, rho in zip(found.features, found.spearman.tolist(), strict=True):
        yield gathered.recording(BY_TEXT, label, seed)("Spearman's rho", "scores of components", rho)


def _by_text(gathered: _Gathered, seed: int) -> Iterator[Record]:
    parts, protocol = gathered.test_in_words, gathered.protocol
    for label, bank in gathered.banks.items():
        record = gathered.recording(BY_TEXT, label, seed)
        chosen, labels = gathered.choice(label, by_texts=True), gathered.data.test.labels[label]
        others = gathered.random(len(chosen), seed)
        sets: Mapping[str, Sequence[Sequence[str] | None]] = {CHOSEN: [chosen], RANDOM: others, WHOLE: [None]}
        galleries = {name: [Gallery.of(parts, components=one) for one in several] for name, several in sets.items()}
        for at in (protocol.at, protocol.deep):
            found = {
                name: [
                    retrieval.precision_at(retrieval.by_text(one, bank, at), labels, range(len(bank)))
                    for one in several
                ]
                for name, several in galleries.items()
            }
            yield from _precisions(record, at, found)
        yield record("components", CHOSEN, float(len(chosen)))


def _by_image(gathered: _Gathered, seed: int) -> Iterator[Record]:
    protocol, labels = gathered.protocol, gathered.data.test.labels
    known = {question.label: labels[question.label] for question in gathered.questions}
    aligned = _whole(gathered.test_in_words) - gathered.mean

    def found(gallery: Gallery) -> Ranking:
        return retrieval.by_image(gallery, gallery.ids[: protocol.queries], protocol.at)

    fixed = {WHOLE: [found(Gallery.of(gathered.test))]}
    if gathered.subject.aligner is not None:
        fixed[ALIGNED] = [found(Gallery.of(gathered.test_in_words))]
    for question in gathered.questions:
        label, basis = question.label, gathered.banks[question.label].subspace()
        chosen = gathered.choice(label, by_texts=False)
        sets = {CHOSEN: [chosen], RANDOM: gathered.random(len(chosen), seed)}
        rankings = {
            name: [found(Gallery.of(gathered.test, components=one)) for one in several]
            for name, several in sets.items()
        }
        rankings |= fixed
        rankings[PROJECTED] = [found(Gallery(tuple(map(str, range(len(aligned)))), aligned @ basis.T.to(aligned)))]
        record = gathered.recording(BY_IMAGE, label, seed)
        several = {n: [retrieval.precision_at(one, known[label]) for one in ones] for n, ones in rankings.items()}
        yield from _precisions(record, protocol.at, several)
        for name, ones in rankings.items():
            leaks = [retrieval.leakage(one, known, sought=label).mean_excess for one in ones]
            yield record("leakage", name, fmean(leaks))
        yield record("components", CHOSEN, float(len(chosen)))


def _precisions(record: Callable[..., Record], at: int, found: Mapping[str, Sequence[Precision]]) -> Iterator[Record]:
    """Means; of a single ranking with its interval over queries."""
    measure = f"precision at {at}"
    for name, several in found.items():
        interval = several[0].interval() if len(several) == 1 else None
        yield record(measure, name, fmean(one.mean for one in several), interval)
    yield record(measure, CHANCE, next(iter(found.values()))[0].chance)


def _whole(parts: Decomposition) -> Float[Tensor, "batch d_rep"]:
    return retrieval.vectors(parts)


def _embeddings(clip: Subject, data: Splits) -> Float[Tensor, "batch d_clip"]:
    """What the CLIP itself makes of test images."""
    with torch.no_grad():
        return torch.cat([clip.model(images).cpu() for images in clip.batches(data.test)])
