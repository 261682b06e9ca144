"""Is a model better without the components that carry what it should not go by? Backgrounds, and written words.

Components are ranked on training images, how many are ablated (or which of them) is chosen on validation images, means
are those of training images, and all that is reported is of test images.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from vitdecomp_lens.applications import repair
from vitdecomp_lens.applications.repair import Choice, GroupAccuracy, Groups, Ranking
from vitdecomp_lens.cumulative import direct_steps, total_steps
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import GapError, UnsupportedModelError, VitDecompWarning
from vitdecomp_lens.evaluation.intervals import of_groups
from vitdecomp_lens.evaluation.records import Record
from vitdecomp_lens.evaluation.subjects import Question, Samples, Splits, Subject, class_scores, contributions
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.interpret.features import score_features
from vitdecomp_lens.intervene import Reference
from vitdecomp_lens.intervening.reference import Replacing
from vitdecomp_lens.linear_classifier import LinearClassifier

__all__ = ["RepairProtocol", "four_groups", "spurious", "typographic"]

SPURIOUS, TYPOGRAPHIC = "spurious correlation", "typographic attack"
HOWS: tuple[Replacing, ...] = ("mean", "position_mean")
BOTH = tuple(f"class {one}, background {other}" for one in (0, 1) for other in (0, 1))
LOST = 0.02  # what is worth bringing back


@dataclass(frozen=True)
class RepairProtocol:
    """What is fixed before anything is measured.

    Attributes:
        by: How components are scored, ``"covariance"`` or, as in the paper, ``"correlation"``.
        most: How many components are ablated at most, where none is skipped: the paper's number.
        share: That number as a share of the components that the paper ranks.
        slack: Numbers of components count as equally good within this; a component is skipped that adds no more.
        average: By how much the average of groups may fall on validation images.
        clean: By how much accuracy without writing may fall there.
        decay: Of classifiers of biased groups: so strong that they lean on what differs most.
        probe: Of the balanced probe.
        kinds: Which components are ablated in runs. Later ones are computed from what the others write.
        images: On how many validation images runs are chosen by; sums are on all.
        orders: How many orders by chance are averaged.
        batch_size: How many images to run at once.
    """

    by: str = "covariance"
    most: int = 10
    share: float = 10 / 65
    slack: float = 0.01
    average: float = 0.0
    clean: float = 0.01
    decay: float = 10.0
    probe: float = 0.1
    kinds: tuple[str, ...] = ("head",)
    images: int = 500
    orders: int = 3
    batch_size: int = 100


def spurious(
    subject: Subject,
    data: Splits,
    *,
    core: Sequence[str],
    background: Sequence[str],
    label: str = "group",
    attribute: str = "water",
    seed: int,
    protocol: RepairProtocol = RepairProtocol(),
) -> Iterator[Record]:
    """A classifier that was fitted where a background mostly goes with the class, repaired.

    Args:
        subject: The model.
        data: Training images where the two mostly agree; validation and test images where they do not.
        core: Texts of what the classifier should go by.
        background: Texts of what it should not.
        label: The name of the classes among the labels of samples.
        attribute: That of the backgrounds; groups are the combinations of both.
        seed: Of orders by chance.
        protocol: What is fixed.

    Yields:
        ``worst group``, ``average of groups`` and, where components are ablated, ``count``, for each method: see
        `_Repair.methods`, and two that ablate nothing: ``balanced probe``, fitted again on as many training images of
        each group, and ``subspace projection``. Intervals are over the test images of each group, where it is not
        several orders that are averaged.
    """
    training = contributions(subject, data.training)
    assert training.total is not None
    classifier = LinearClassifier.fit(training.total, data.training.labels[label], decay=protocol.decay)
    groups, sparing = partial(four_groups, label=label, attribute=attribute), {"average": protocol.average}
    read: Callable[[Tensor], Tensor] = lambda z: classifier(z.cpu())  # noqa: E731
    bench = _Repair(subject, data, protocol, training, read, label, groups, sparing, seed)
    for method, found, count in (*bench.methods(background, core, read=True), *bench.comparisons(background)):
        numbers: dict[str, float] = {
            "worst group": fmean(one.worst for one in found),
            "average of groups": fmean(one.average for one in found),
        }
        ends = _ends(found)
        for measure, value in {**numbers, **({} if count is None else {"count": count})}.items():
            yield Record(SPURIOUS, measure, subject.name, method, seed, float(value), interval=ends.get(measure))


def four_groups(samples: Samples, *, label: str = "group", attribute: str = "water") -> Groups:
    """Class by background, all four, whether there are images of each or not."""
    return Groups(2 * samples.labels[label] + samples.labels[attribute], BOTH)


def _ends(found: Sequence[GroupAccuracy]) -> dict[str, tuple[float, float]]:
    """Intervals, of one accuracy by groups; there are none of the mean of several."""
    return of_groups(found[0]) if len(found) == 1 else {}


def typographic(
    subject: Subject,
    data: Splits,
    question: Question,
    *,
    words: Sequence[str],
    core: Sequence[str] | None = None,
    label: str = "written",
    seed: int,
    protocol: RepairProtocol = RepairProtocol(),
) -> Iterator[Record]:
    """What a model makes of images on which a wrong word is written, repaired.

    Args:
        subject: The model.
        data: Validation and test images without and with a wrong word.
        question: Which classes it is to tell apart.
        words: Texts of what it should not go by.
        core: Texts of what it should; None for those of all classes. Of more classes than a CLIP's space has
            dimensions, these would span all of it.
        label: The name, among the labels of samples, of whether there is a wrong word: 0 or 1.
        seed: Of orders by chance.
        protocol: What is fixed.

    Yields:
        Accuracy ``clean`` and ``written``, ``count``, and ``regained``: of what a model loses by a wrong word, the
        share that comes back; that only where it loses a fiftieth or more. Intervals are those of `spurious`.
    """
    training = contributions(subject, data.training)
    read = class_scores(subject, question, training, data.training.labels[question.label])

    def groups(samples: Samples) -> Groups:
        return Groups(samples.labels[label], ("clean", "written"))

    sparing = {"clean": protocol.clean}
    bench = _Repair(subject, data, protocol, training, read, question.label, groups, sparing, seed)
    lost, before = 0.0, 0.0
    for method, found, count in bench.methods(words, question.texts if core is None else core):
        clean, written = (fmean(one[name] for one in found) for name in ("clean", "written"))
        numbers = {"clean": clean, "written": written, "count": count or 0}
        if method == "before":
            lost, before = clean - written, written
        elif lost >= LOST:
            numbers["regained"] = (written - before) / lost
        ends = _ends(found)
        for measure, value in numbers.items():
            yield Record(TYPOGRAPHIC, measure, subject.name, method, seed, float(value), interval=ends.get(measure))


# --- methods ----------------------------------------------------------------------------------------------------------

# A method, what it reaches on test images (by chance, with each of several orders), and how many components it ablates.
Found = tuple[str, list[GroupAccuracy], int | None]


@dataclass(frozen=True)
class _Repair:
    """Everything that methods share.

    Attributes:
        subject: The model.
        data: Images.
        protocol: What is fixed.
        training: Contributions to training images.
        read: Scores of classes, of representations.
        label: The name of the classes among the labels of samples.
        groups: Of samples.
        sparing: What may fall by how much on validation images.
        seed: Of orders by chance.
    """

    subject: Subject
    data: Splits
    protocol: RepairProtocol
    training: Decomposition
    read_scores: Callable[[Tensor], Tensor]
    label: str
    groups: Callable[[Samples], Groups]
    sparing: Mapping[str, float]
    seed: int

    def methods(self, wrong: Sequence[str], right: Sequence[str], *, read: bool = False) -> Iterator[Found]:
        """Each method, what it reaches on test images, and how many components it ablates.

        ``before``; then, *direct*, in the sum: as many components of the ranking as are best on validation images, the
        other way round and by chance with as many; the paper's ranking with the paper's number of them, and its share;
        and down the ranking with those skipped that do not help, or down any order. *Total*, in the run, for both
        means: the first ones, and skipping. With ``read``, by what the classifier reads as well (`repair.rank_read`).
        """
        features = {"wrong": self.subject.texts(wrong), "right": self.subject.texts(right)}
        aligned, kinds, by = self.subject.in_words(self.training), self.protocol.kinds, self.protocol.by
        scores = score_features(aligned, features, bootstrap=0, permutations=0)
        rank = partial(repair.rank, scores, "wrong", "right")
        yield "before", [self.direct([])], 0
        yield from self._direct(rank(by=by))
        yield from self._fixed(rank(by="correlation"))
        yield from self._total(rank(by=by, kind=kinds))
        if read:
            asked = partial(repair.rank_read, self.training, aligned, self.read_scores, *features.values())
            ranking, name = asked(), "by what is read"
            chosen = self._choose_direct(ranking)
            yield f"direct, {name}", [self.direct(chosen.components)], chosen.count
            yield from self._controls(f"direct, {name}", ranking, chosen.count, self.direct)
            skipped = self._choose_total(asked(kind=kinds), "mean", skipping=True)
            yield f"total, mean, {name}, skipping", [self.total(skipped.components, "mean")], skipped.count

    def _direct(self, ranking: Ranking) -> Iterator[Found]:
        chosen = self._choose_direct(ranking)
        yield "direct", [self.direct(chosen.components)], chosen.count
        yield from self._controls("direct", ranking, chosen.count, self.direct)
        for name, order in {"": ranking, " random": ranking.shuffled(self.seed)}.items():
            chosen = self._choose_direct(order, most=len(order), skipping=True)
            yield f"direct,{name} skipping", [self.direct(chosen.components)], chosen.count

    def _fixed(self, ranking: Ranking) -> Iterator[Found]:
        most, share = self.protocol.most, max(1, round(self.protocol.share * len(ranking)))
        yield "direct, the paper's share", [self.direct(ranking.components[:share])], share
        if len(ranking) > most:
            yield "direct, the paper's 10", [self.direct(ranking.components[:most])], most

    def _total(self, ranking: Ranking) -> Iterator[Found]:
        for how in HOWS:
            measured = partial(self.total, how=how)
            chosen = self._choose_total(ranking, how)
            yield f"total, {how}", [measured(chosen.components)], chosen.count
            skipped = self._choose_total(ranking, how, skipping=True)
            yield f"total, {how}, skipping", [measured(skipped.components)], skipped.count
            if how == "mean":
                yield from self._controls(f"total, {how}, skipping", ranking, skipped.count, measured)
                yield from self._exported(skipped.components)
                chance = self._choose_total(ranking.shuffled(self.seed), how, skipping=True)
                yield f"total, {how}, random skipping", [measured(chance.components)], chance.count

    def _controls(
        self, method: str, ranking: Ranking, count: int, measured: Callable[[Sequence[str]], GroupAccuracy]
    ) -> Iterator[Found]:
        """As many components, of other orders."""
        yield f"{method}, reversed", [measured(ranking.reversed().components[:count])], count
        seeds = range(self.seed * self.protocol.orders, (self.seed + 1) * self.protocol.orders)
        several = [measured(ranking.shuffled(seed).components[:count]) for seed in seeds]
        yield f"{method}, random", several, count

    def comparisons(self, wrong: Sequence[str]) -> Iterator[Found]:
        """What ablates nothing."""
        samples, training, total = self.data.training, self.training.total, self.test.total
        assert training is not None
        assert total is not None
        labels, groups = self._known(samples)
        probe = repair.balanced_probe(training, labels, groups, decay=self.protocol.probe, seed=self.seed)
        yield "balanced probe", [self._judged(probe(total))], None
        basis, aligned = self.subject.texts(wrong).subspace(), self.subject.in_words(self.training).total
        if self.subject.aligner is not None:
            assert aligned is not None
            basis = repair.span_that_predicts(training, aligned @ basis.to(aligned).T)
        projected = repair.project_out(total, basis, mean=training.mean(0))
        yield "subspace projection", [self._judged(self.read_scores(projected))], None

    def _exported(self, components: Sequence[str]) -> Iterator[Found]:
        """The same components folded into weights; a warning where they cannot be."""
        model = self.subject.model
        try:
            state = repair.export(model, components=components, reference=self.reference)
        except (UnsupportedModelError, GapError) as error:
            warnings.warn(f"{self.subject.name} is not exported: {error}", VitDecompWarning, stacklevel=2)
            return
        plain = copy.deepcopy(model.original)
        plain.load_state_dict(state)
        yield "total, mean, skipping, exported", [self.total([], "mean", HookedViT(plain))], len(components)

    # ---- on validation images

    def _choose_direct(self, order: Ranking, **aim: Any) -> Choice:
        options: dict[str, Any] = {"classifier": self.read_scores, "reference": self.training, **self._aim, **aim}
        labels, groups = self._known(self.data.validation)
        return repair.choose_direct(self.validation, order, labels, groups=groups, **options)

    def _choose_total(self, order: Ranking, how: Replacing, **aim: Any) -> Choice:
        options: dict[str, Any] = {**self._running(how), **self._aim, **aim}
        which, images = self._few
        labels, groups = self._known(self.data.validation)
        some = Groups(groups.numbers[which], groups.names)
        return repair.choose_total(self.subject.model, images, order, labels[which], groups=some, **options)

    @property
    def _aim(self) -> dict[str, Any]:
        return {"most": self.protocol.most, "slack": self.protocol.slack, "sparing": self.sparing}

    @cached_property
    def validation(self) -> Decomposition:
        """Contributions to validation images."""
        return contributions(self.subject, self.data.validation)

    @cached_property
    def _few(self) -> tuple[Tensor, list[Tensor]]:
        """Some validation images, evenly spread, and their numbers."""
        count = len(self.data.validation)
        which = torch.linspace(0, count - 1, min(count, self.protocol.images)).round().long()
        kept, first = [], 0
        for batch in self.subject.batches(self.data.validation):
            here = which[(which >= first) & (which < first + len(batch))] - first
            kept += [batch[here.to(batch.device)]] if len(here) else []
            first += len(batch)
        return which, kept

    # ---- on test images

    def direct(self, components: Sequence[str]) -> GroupAccuracy:
        """With components ablated in the sum."""
        read, at = self.read_scores, [len(components)]
        return self._judged(direct_steps(self.test, components, classifier=read, reference=self.training, at=at)[0])

    def total(self, components: Sequence[str], how: Replacing, model: HookedViT | None = None) -> GroupAccuracy:
        """With components ablated in the run."""
        model, at = self.subject.model if model is None else model, [len(components)]
        images = self.subject.batches(self.data.test)
        return self._judged(total_steps(model, images, components, at=at, **self._running(how))[0])

    def _judged(self, scores: Tensor) -> GroupAccuracy:
        labels, groups = self._known(self.data.test)
        return GroupAccuracy.of(scores, labels, groups)

    @cached_property
    def test(self) -> Decomposition:
        """Contributions to test images."""
        return contributions(self.subject, self.data.test)

    # ---- shared

    def _known(self, samples: Samples) -> tuple[Tensor, Groups]:
        return samples.labels[self.label], self.groups(samples)

    def _running(self, how: Replacing) -> dict[str, Any]:
        size = self.protocol.batch_size
        return {"classifier": self.read_scores, "reference": self.reference, "how": how, "batch_size": size}

    @cached_property
    def reference(self) -> Reference:
        """Means of training images."""
        model = self.subject.model
        able = [c.label for c in self.training.components if c.kind in self.protocol.kinds]
        images = self.subject.batches(self.data.training)
        return Reference.of(model, images, components=able, batch_size=self.protocol.batch_size)
