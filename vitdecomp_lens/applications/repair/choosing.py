"""How many components to take away, chosen on validation data; and what that is worth on others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

from jaxtyping import Float, Int
from torch import Tensor, nn

from vitdecomp_lens.applications.repair.groups import GroupAccuracy, Groups, markdown
from vitdecomp_lens.applications.repair.ranking import Ranking
from vitdecomp_lens.cumulative import Classifier, direct_steps, total_steps
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.frozen.trace import Read
from vitdecomp_lens.intervene import Reference
from vitdecomp_lens.intervening.reference import Images, Replacing

Effect = Literal["direct", "total"]
CRITERIA = ("worst", "average")
MOST = 10  # components, as in the paper
Scores = Callable[..., Float[Tensor, "step batch class"]]  # of components, and after how many of them to read


class InSum(TypedDict, total=False):
    """How components are ablated in the sum: see `vitdecomp_lens.cumulative.direct_steps`."""

    classifier: Classifier | None
    how: Replacing
    reference: Decomposition | None
    seed: int


class InRun(TypedDict, total=False):
    """How components are ablated in the run: see `vitdecomp_lens.cumulative.total_steps`."""

    classifier: Classifier | None
    of: Read | None
    how: Replacing
    reference: Reference | Images | Iterable[Images] | None
    seed: int
    batch_size: int | None


@dataclass(frozen=True, repr=False)
class Choice:
    """How many of some ranked components to ablate, and what each number is worth on validation data.

    Attributes:
        effect: ``"direct"`` or ``"total"``.
        how: What is written instead of a component.
        criterion: What was to be highest.
        ranking: How the components were ranked.
        candidates: Labels, in that order; with ``skipping``, those that were taken.
        steps: Accuracies with none, one, two... of them ablated.
        count: How many to ablate: as many as are best by the criterion, the fewest of equally good numbers.
    """

    effect: Effect
    how: str
    criterion: str
    ranking: str
    candidates: tuple[str, ...]
    steps: tuple[GroupAccuracy, ...]
    count: int

    def __repr__(self) -> str:
        return (
            f"Choice({self.effect}, {self.how}: {self.count} of {len(self.candidates)} by {self.ranking};"
            f" {self.criterion} {getattr(self.before, self.criterion):.3f} to"
            f" {getattr(self.after, self.criterion):.3f} on validation)"
        )

    @property
    def components(self) -> tuple[str, ...]:
        """What to ablate; nothing at all where no number of components is better than none."""
        return self.candidates[: self.count]

    @property
    def before(self) -> GroupAccuracy:
        """With none ablated, on validation data."""
        return self.steps[0]

    @property
    def after(self) -> GroupAccuracy:
        """With the chosen ones ablated, on validation data: what was chosen for, and so too good."""
        return self.steps[self.count]

    def table(self) -> str:
        """All steps as a table in Markdown."""
        names = ("none", *(f"{n} {label}" for n, label in enumerate(self.candidates, start=1)))
        return markdown(zip(names, self.steps, strict=True))


@dataclass(frozen=True, repr=False)
class Repaired:
    """What a repair is worth.

    Attributes:
        effect: ``"direct"`` or ``"total"``.
        how: What is written instead of the components.
        components: Their labels.
        before: Without.
        after: With the components ablated.
    """

    effect: Effect
    how: str
    components: tuple[str, ...]
    before: GroupAccuracy
    after: GroupAccuracy

    def __repr__(self) -> str:
        return (
            f"Repaired({self.effect}, {self.how}, {len(self.components)} components: worst {self.before.worst:.3f} to"
            f" {self.after.worst:.3f}, average {self.before.average:.3f} to {self.after.average:.3f})"
        )

    def table(self) -> str:
        """Before and after as a table in Markdown."""
        return markdown([("before", self.before), ("after", self.after)])


def choose_direct(
    parts: Decomposition,
    ranking: Ranking | Sequence[str],
    labels: Int[Tensor, "batch"],
    *,
    groups: Groups | None = None,
    most: int = MOST,
    criterion: str = "worst",
    slack: float | int = 0,
    sparing: Mapping[str, float] | None = None,
    skipping: bool = False,
    **ablation: Unpack[InSum],
) -> Choice:
    """Choose on validation data how many components to ablate in the sum: direct effects, all statistics frozen.

    Args:
        parts: Contributions of validation images.
        ranking: Components, the most suspicious first.
        labels: The right classes.
        groups: Of the images; without them all are one group, and the criterion is plain accuracy.
        most: How many components at most.
        criterion: ``"worst"`` group, or ``"average"`` of groups.
        slack: By how much less still counts as equally good, a share of one: among numbers of components that are
            equally good on as many images as there are, the highest is chance. Choose it before looking; the standard
            error of a group of n images is at most 1 / (2 √n).
        sparing: By how much ``"average"``, or a group by its name, may fall at most, such as ``{"average": 0.0}``:
            what makes it fall further is out of the question.
        skipping: Go down the ranking and take a component only where the criterion rises by more than the slack with
            it, not all up to the last one, as the paper does.
        **ablation: As for `vitdecomp_lens.cumulative.direct_steps`: ``classifier``, what reads the representation,
            fitted on training data or made of texts; ``reference``, contributions of *training* images, for means and
            resampling; ``how``, ``"mean"`` unless said; ``seed``.

    Raises:
        UnknownNameError: If there is no such component, or no such group to spare.
        InputError: If a group has no images, the reference is the validation data, or options do not fit.

    Example:
        >>> from vitdecomp_lens.linear_classifier import LinearClassifier
        >>> from vitdecomp_lens.testbed.planted import planted_groups
        >>> training, fair = planted_groups(images=400), planted_groups(images=400, agrees=0.5, draw=1)
        >>> classifier = LinearClassifier.fit(training.parts.total, training.label, decay=0.1)
        >>> groups = Groups.crossing(label=fair.label, water=fair.spurious)
        >>> choice = choose_direct(fair.parts, training.carriers, fair.label, groups=groups, classifier=classifier,
        ...                        reference=training.parts)
        >>> choice.count, choice.before.worst < 0.7, choice.after.worst > 0.9
        (3, True, True)
    """
    judged = _in_sum(parts, labels, groups, ablation)
    return judged.choose(ranking, _Aim(most, criterion, slack, sparing or {}, skipping))


def choose_total(
    model: nn.Module,
    images: Images | Iterable[Images],
    ranking: Ranking | Sequence[str],
    labels: Int[Tensor, "batch"],
    *,
    groups: Groups | None = None,
    most: int = MOST,
    criterion: str = "worst",
    slack: float | int = 0,
    sparing: Mapping[str, float] | None = None,
    skipping: bool = False,
    **ablation: Unpack[InRun],
) -> Choice:
    """Choose on validation data how many components to ablate in the run: total effects.

    Args:
        model: As for `vitdecomp_lens.intervene.ablate_run`.
        images: Validation images, a batch or batches. With ``skipping`` they are gone through once a component: give a
            tensor or a list of batches.
        ranking: As for `choose_direct`, like all that follows up to ``skipping``.
        labels: The right classes.
        groups: Of the images.
        most: How many components at most.
        criterion: What is to be highest.
        slack: By how much less still counts as equally good.
        sparing: What may fall by how much.
        skipping: Whether components that do not help are left as they are.
        **ablation: As for `vitdecomp_lens.cumulative.total_steps`: ``classifier``; ``of``, what it reads of a run,
            ``"representation"`` unless said, or ``"logits"`` without a classifier; ``reference``, *training* images, or
            a `Reference` made from them; ``how``, ``"mean"`` unless said; ``seed``; ``batch_size``.

    Raises:
        VitDecompError: As `ablate_run`, and as `choose_direct`.

    Example:
        >>> import torch
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=2)
        >>> images, labels = torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 0, 1])
        >>> training = torch.randn(4, 3, 160, 160)
        >>> len(choose_total(model, images, ["L1H0", "mlp.0"], labels, of="logits", reference=training).steps)
        3
    """
    for name, given in {"images": images, "reference=": ablation.get("reference")}.items():
        if skipping and not isinstance(given, Tensor | list | tuple | Reference | None):
            raise InputError(
                f"With skipping=True {name} are gone through many times: give a tensor or a list of batches; got"
                f" {type(given).__name__}."
            )
    judged = _in_run(model, images, labels, groups, ablation)
    return judged.choose(ranking, _Aim(most, criterion, slack, sparing or {}, skipping))


def measure_direct(
    parts: Decomposition,
    components: Sequence[str],
    labels: Int[Tensor, "batch"],
    *,
    groups: Groups | None = None,
    **ablation: Unpack[InSum],
) -> Repaired:
    """What ablating components in the sum is worth, on images that neither training nor validation has seen.

    Arguments and errors are those of `choose_direct`; ``parts`` and ``labels`` are of test images.
    """
    return _in_sum(parts, labels, groups, ablation).measure(components)


def measure_total(
    model: nn.Module,
    images: Images | Iterable[Images],
    components: Sequence[str],
    labels: Int[Tensor, "batch"],
    *,
    groups: Groups | None = None,
    **ablation: Unpack[InRun],
) -> Repaired:
    """What ablating components in the run is worth, on images that neither training nor validation has seen.

    Arguments and errors are those of `choose_total`; ``images`` and ``labels`` are those of a test.
    """
    return _in_run(model, images, labels, groups, ablation).measure(components)


# --- pieces -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Aim:
    """What is chosen, and by what: see `choose_direct`."""

    most: int
    criterion: str
    slack: float | int
    sparing: Mapping[str, float]
    skipping: bool

    def __post_init__(self) -> None:
        if self.most < 1:
            raise InputError(f"most= must be at least 1 component; got {self.most}.")
        if self.criterion not in CRITERIA or not 0 <= self.slack <= 1:
            raise InputError(
                f"Expected criterion='worst' or 'average', and slack= as a share of one; got {self.criterion!r} and"
                f" {self.slack}."
            )
        if odd := [name for name, loss in self.sparing.items() if not 0 <= loss <= 1]:
            raise InputError(f"Expected sparing= with shares of one; got {self.sparing[odd[0]]} for {odd[0]!r}.")

    def value(self, accuracy: GroupAccuracy, before: GroupAccuracy) -> float:
        """The criterion; minus infinity where what is to be spared has fallen too far."""
        for name, loss in self.sparing.items():
            if name != "average" and name not in accuracy.names:
                raise UnknownNameError(f"There is no group {name!r} to spare; {near_matches(name, accuracy.names)}")
            now, then = (a.average if name == "average" else a[name] for a in (accuracy, before))
            if now < then - loss - 1e-9:  # shares of counts are rounded
                return float("-inf")
        return float(getattr(accuracy, self.criterion))


@dataclass(frozen=True)
class _Judged:
    """What is read of images while components are ablated, and what is right."""

    effect: Effect
    how: str
    scores: Scores
    labels: Int[Tensor, "batch"]
    groups: Groups | None

    def accuracies(self, components: Sequence[str], at: Sequence[int] | None = None) -> list[GroupAccuracy]:
        return [GroupAccuracy.of(step, self.labels, self.groups) for step in self.scores(components, at)]

    def measure(self, components: Sequence[str]) -> Repaired:
        steps = self.accuracies(components, sorted({0, len(components)}))
        return Repaired(self.effect, self.how, tuple(components), steps[0], steps[-1])

    def choose(self, ranking: Ranking | Sequence[str], aim: _Aim) -> Choice:
        if isinstance(ranking, str):
            raise InputError(f"Expected a ranking or a list of labels; got {ranking!r}.")
        by = ranking.by if isinstance(ranking, Ranking) else "the order given"
        candidates = tuple(ranking.components if isinstance(ranking, Ranking) else ranking)[: aim.most]
        if aim.skipping:
            by, (candidates, steps) = f"{by}, skipping", self._walk(candidates, aim)
            count = len(candidates)
        else:
            steps = self.accuracies(candidates)
            reached = [aim.value(accuracy, steps[0]) for accuracy in steps]
            count = next(number for number, value in enumerate(reached) if value >= max(reached) - aim.slack)
        return Choice(self.effect, self.how, aim.criterion, by, candidates, tuple(steps), count)

    def _walk(self, candidates: Sequence[str], aim: _Aim) -> tuple[tuple[str, ...], list[GroupAccuracy]]:
        """Those that help, in their order, and what is reached with each."""
        taken: list[str] = []
        steps = self.accuracies([])
        for label in candidates:
            (tried,) = self.accuracies([*taken, label], [len(taken) + 1])
            if aim.value(tried, steps[0]) > aim.value(steps[-1], steps[0]) + aim.slack:
                taken.append(label)
                steps.append(tried)
        return tuple(taken), steps


def _in_sum(parts: Decomposition, labels: Tensor, groups: Groups | None, ablation: Mapping[str, Any]) -> _Judged:
    _refuse_same(ablation.get("reference"), parts)
    scores: Scores = lambda components, at: direct_steps(parts, components, at=at, **ablation)  # noqa: E731
    return _Judged("direct", ablation.get("how", "mean"), scores, labels, groups)


def _in_run(
    model: nn.Module, images: Any, labels: Tensor, groups: Groups | None, ablation: Mapping[str, Any]
) -> _Judged:
    _refuse_same(ablation.get("reference"), images)
    scores: Scores = lambda components, at: total_steps(model, images, components, at=at, **ablation)  # noqa: E731
    return _Judged("total", ablation.get("how", "mean"), scores, labels, groups)


def _refuse_same(reference: Any, judged: Any) -> None:
    """Refuse to take means from the very images that a repair is judged on."""
    own = reference.images if isinstance(reference, Reference) else reference
    if own is not None and own is judged:
        raise InputError(
            "Expected reference= of training data: it is what the repair is judged on. A mean of validation or test"
            " data tells the repaired model something about them."
        )
