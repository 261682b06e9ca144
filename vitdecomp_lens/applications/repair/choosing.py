"""How many components to take away, chosen on validation data; and what that is worth on others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from vitdecomp_lens.applications.repair.groups import GroupAccuracy, Groups, markdown
from vitdecomp_lens.applications.repair.ranking import Ranking
from vitdecomp_lens.cumulative import Classifier, direct_steps, total_steps
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.frozen.trace import Read
from vitdecomp_lens.intervene import Reference
from vitdecomp_lens.intervening.reference import Images, Replacing

Effect = Literal["direct", "total"]
CRITERIA = ("worst", "average")
MOST = 10  # components, as in the paper


@dataclass(frozen=True, repr=False)
class Choice:
    """How many of some ranked components to ablate, and what each number is worth on validation data.

    Attributes:
        effect: ``"direct"`` or ``"total"``.
        how: What is written instead of a component.
        criterion: What was to be highest.
        ranking: How the components were ranked.
        candidates: Labels, in that order.
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
    classifier: Classifier | None = None,
    reference: Decomposition | None = None,
    how: Replacing = "mean",
    most: int = MOST,
    criterion: str = "worst",
    slack: float | int = 0,
    seed: int = 0,
) -> Choice:
    """Choose on validation data how many components to ablate in the sum: direct effects, all statistics frozen.

    Args:
        parts: Contributions of validation images.
        ranking: Components, the most suspicious first.
        labels: The right classes.
        groups: Of the images; without them all are one group, and the criterion is plain accuracy.
        classifier: What reads the representation, fitted on training data or made of texts: a direction for each class
            or a function of representations.
        reference: Contributions of *training* images, for means and resampling.
        how: ``"mean"``, ``"zero"`` or ``"resample"``.
        most: How many components at most.
        criterion: ``"worst"`` group, or ``"average"`` of groups.
        slack: By how much less still counts as equally good, a share of one: among numbers of components that are
            equally good on as many images as there are, the highest is chance. Choose it before looking; the standard
            error of a group of n images is at most 1 / (2 √n).
        seed: Of resampling.

    Raises:
        UnknownNameError: If there is no such component.
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
    candidates, by = _candidates(ranking, most)
    _refuse_same(reference, parts)
    steps = direct_steps(parts, candidates, classifier=classifier, how=how, reference=reference, seed=seed)
    return _choice(steps, labels, groups, "direct", how, criterion, slack, by, candidates)


def choose_total(
    model: nn.Module,
    images: Images | Iterable[Images],
    ranking: Ranking | Sequence[str],
    labels: Int[Tensor, "batch"],
    *,
    groups: Groups | None = None,
    classifier: Classifier | None = None,
    of: Read | None = "representation",
    reference: Reference | Images | Iterable[Images] | None = None,
    how: Replacing = "mean",
    most: int = MOST,
    criterion: str = "worst",
    slack: float | int = 0,
    seed: int = 0,
    batch_size: int | None = None,
) -> Choice:
    """Choose on validation data how many components to ablate in the run: total effects.

    Args:
        model: As for `vitdecomp_lens.intervene.ablate_run`.
        images: Validation images, a batch or batches.
        ranking: As for `choose_direct`.
        labels: As for `choose_direct`, like groups and classifier.
        groups: Of the images.
        classifier: Of what ``of`` names.
        of: What to read of a run: ``"representation"``, or ``"logits"`` without a classifier.
        reference: *Training* images, or a `Reference` made from them.
        how: As for `ablate_run`.
        most: As for `choose_direct`, like criterion, slack and seed.
        criterion: What is to be highest.
        slack: By how much less still counts as equally good.
        seed: Of resampling.
        batch_size: How many images to run at once.

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
    candidates, by = _candidates(ranking, most)
    _refuse_same(reference, images)
    options: dict[str, Any] = {"how": how, "reference": reference, "seed": seed, "batch_size": batch_size}
    steps = total_steps(model, images, candidates, classifier=classifier, of=of, **options)
    return _choice(steps, labels, groups, "total", how, criterion, slack, by, candidates)


def measure_direct(
    parts: Decomposition,
    components: Sequence[str],
    labels: Int[Tensor, "batch"],
    *,
    groups: Groups | None = None,
    classifier: Classifier | None = None,
    reference: Decomposition | None = None,
    how: Replacing = "mean",
    seed: int = 0,
) -> Repaired:
    """What ablating components in the sum is worth, on images that neither training nor validation has seen.

    Arguments and errors are those of `choose_direct`; ``parts`` and ``labels`` are of test images.
    """
    _refuse_same(reference, parts)
    options: dict[str, Any] = {"how": how, "reference": reference, "seed": seed, "at": _ends(components)}
    steps = direct_steps(parts, components, classifier=classifier, **options)
    return _repaired(steps, labels, groups, "direct", how, components)


def measure_total(
    model: nn.Module,
    images: Images | Iterable[Images],
    components: Sequence[str],
    labels: Int[Tensor, "batch"],
    *,
    groups: Groups | None = None,
    classifier: Classifier | None = None,
    of: Read | None = "representation",
    reference: Reference | Images | Iterable[Images] | None = None,
    how: Replacing = "mean",
    seed: int = 0,
    batch_size: int | None = None,
) -> Repaired:
    """What ablating components in the run is worth, on images that neither training nor validation has seen.

    Arguments and errors are those of `choose_total`; ``images`` and ``labels`` are those of a test.
    """
    _refuse_same(reference, images)
    options: dict[str, Any] = {"how": how, "reference": reference, "seed": seed, "at": _ends(components)}
    steps = total_steps(model, images, components, classifier=classifier, of=of, batch_size=batch_size, **options)
    return _repaired(steps, labels, groups, "total", how, components)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _candidates(ranking: Ranking | Sequence[str], most: int) -> tuple[tuple[str, ...], str]:
    if most < 1:
        raise InputError(f"most= must be at least 1 component; got {most}.")
    if isinstance(ranking, Ranking):
        return ranking.components[:most], ranking.by
    if isinstance(ranking, str):
        raise InputError(f"Expected a ranking or a list of labels; got {ranking!r}.")
    return tuple(ranking)[:most], "the order given"


def _refuse_same(reference: Any, judged: Any) -> None:
    """Refuse to take means from the very images that a repair is judged on."""
    own = reference.images if isinstance(reference, Reference) else reference
    if own is not None and own is judged:
        raise InputError(
            "Expected reference= of training data: it is what the repair is judged on. A mean of validation or test"
            " data tells the repaired model something about them."
        )


def _ends(components: Sequence[str]) -> tuple[int, ...]:
    return tuple(sorted({0, len(components)}))


def _accuracies(
    steps: Float[Tensor, "step batch class"], labels: Int[Tensor, "batch"], groups: Groups | None
) -> tuple[GroupAccuracy, ...]:
    return tuple(GroupAccuracy.of(scores, labels, groups) for scores in steps)


def _choice(
    steps: Float[Tensor, "step batch class"],
    labels: Int[Tensor, "_"],
    groups: Groups | None,
    effect: Effect,
    how: str,
    criterion: str,
    slack: float | int,
    by: str,
    candidates: tuple[str, ...],
) -> Choice:
    if criterion not in CRITERIA or not 0 <= slack <= 1:
        raise InputError(
            f"Expected criterion='worst' or 'average', and slack= as a share of one; got {criterion!r} and {slack}."
        )
    found = _accuracies(steps, labels, groups)
    reached = [getattr(accuracy, criterion) for accuracy in found]
    count = next(number for number, value in enumerate(reached) if value >= max(reached) - slack)
    return Choice(effect, how, criterion, by, candidates, found, count)


def _repaired(
    steps: Float[Tensor, "step batch class"],
    labels: Int[Tensor, "_"],
    groups: Groups | None,
    effect: Effect,
    how: str,
    components: Sequence[str],
) -> Repaired:
    found = _accuracies(steps, labels, groups)
    return Repaired(effect, how, tuple(components), found[0], found[-1])
