"""Cumulative ablation: how much of what a model can do is left, one component after the other taken away.

The paper (arXiv 2406.01583, "Component ablation") sets components to their mean from the last layer on, and watches
accuracy. `direct` does that in the sum, with all statistics frozen; `total` in the run, where later components and
norms react. Every curve says which it is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitdecomp_lens.components import By, Component
from vitdecomp_lens.cumulative import Classifier, can_be_ablated, direct_steps, total_steps
from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.frozen.trace import Read
from vitdecomp_lens.interpret.feature_scores import FeatureScores
from vitdecomp_lens.intervene import Reference
from vitdecomp_lens.intervening.reference import Images, Replacing
from vitdecomp_lens.pictures import INSTALL, can_draw
from vitdecomp_lens.selecting import Names, Numbers, chosen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AblationCurve", "accuracy", "direct", "in_order", "plot", "table", "total"]

Measure = Callable[[Tensor, Tensor], float]
Order = str | Sequence[str] | Mapping[str, float | int] | FeatureScores
ORDERS = ("last first", "first first", "random")


@dataclass(frozen=True)
class AblationCurve:
    """What is left with none, one, two... components ablated.

    Attributes:
        components: Labels, in the order in which they were ablated.
        values: What was measured: before, and after each of them.
        effect: ``"direct"``: the sum was edited, statistics frozen; ``"total"``: the run was.
        how: What was written instead.
        order: By what the order came: ``"last first"``, ``"first first"``, ``"random"``, ``"by score"``, ``"given"``.
        seed: Of a random order, and of what is drawn where values are resampled.
        measure: The name of what was measured.
        images: On how many images.
    """

    components: tuple[str, ...]
    values: tuple[float, ...]
    effect: Literal["direct", "total"]
    how: str
    order: str
    seed: int
    measure: str
    images: int

    def __repr__(self) -> str:
        return (
            f"AblationCurve({self.name}: {self.measure} {self.values[0]:.3f} to {self.values[-1]:.3f} over"
            f" {len(self.components)} components, {self.images} images)"
        )

    @property
    def name(self) -> str:
        """Effect, how and order in a few words."""
        seed = f", seed {self.seed}" if self.order == "random" else ""
        return f"{self.effect}, {self.how}, {self.order}{seed}"

    @property
    def area(self) -> float:
        """The mean height of the curve, joined by straight lines: one number for how slowly it falls."""
        if len(self.values) == 1:
            return self.values[0]
        return sum(self.values, -(self.values[0] + self.values[-1]) / 2) / (len(self.values) - 1)

    def table(self) -> str:
        """The curve as a table in Markdown."""
        rows = ["| ablated | component | " + self.measure + " |", "| --: | --- | --: |"]
        names = ("", *self.components)
        rows += [f"| {n} | {name} | {v:.4f} |" for n, (name, v) in enumerate(zip(names, self.values, strict=True))]
        return "\n".join(rows)

    def plot(self) -> "Figure":
        """The curve as a picture; for several in one, `plot`."""
        return plot([self])


def accuracy(scores: Float[Tensor, "batch class"], labels: Int[Tensor, "batch"]) -> float:
    """The share of images whose highest score is that of their label.

    Example:
        >>> accuracy(torch.eye(3), torch.tensor([0, 1, 0]))
        0.6666666666666666
    """
    return float((scores.argmax(1) == labels.to(scores.device)).double().mean())


def direct(
    parts: Decomposition,
    labels: Tensor,
    *,
    classifier: Classifier | None = None,
    measure: Measure = accuracy,
    order: Order = "last first",
    feature: str | None = None,
    components: Names | None = None,
    kind: Names | None = None,
    layer: Numbers | None = None,
    most: int | None = None,
    how: Replacing = "mean",
    reference: Decomposition | None = None,
    seed: int = 0,
) -> AblationCurve:
    """Ablate components in the sum, one after the other: direct effects, all statistics frozen, as in the paper.

    Args:
        parts: Contributions of the images, by layer, head or neuron.
        labels: Of the images; whatever ``measure`` takes.
        classifier: What reads the representation: a direction for each class (a bias does not depend on what is
            ablated, but moves borders: then give a function), or a function of representations such as an
            ``nn.Linear``; without it the representation itself is measured, as with ``of="logits"``.
        measure: A function of what is read, ``[batch, class]``, and the labels.
        order: ``"last first"`` and ``"first first"`` by layer; ``"random"``; a number for each label (highest first);
            `FeatureScores`; or labels in their order.
        feature: Of feature scores, by which one; needed where there are several.
        components: Of which labels; with ``kind`` and ``layer``, what meets all that is asked. Without any of them
            all but the embedding, constants and interventions.
        kind: Such as ``"head"``, ``"mlp"``, ``("attn", "mlp")``.
        layer: A block number, or several.
        most: How many components at most.
        how: ``"zero"``, ``"mean"``, ``"resample"``. (A mean for each position exists in a run only: in a sum it is the
            mean.)
        reference: Contributions of other images, whose means and values are taken.
        seed: Of the random order and of resampling.

    Raises:
        UnknownNameError: If a component or feature is unknown.
        InputError: If options do not fit.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_groups
        >>> planted = planted_groups(images=200)
        >>> curve = direct(planted.parts, planted.label, classifier=torch.stack([-planted.directions[0],
        ...                planted.directions[0]]), order=planted.core, reference=planted.parts)
        >>> curve.values[0] > 0.9, curve.values[-1] < 0.7, curve.effect
        (True, True, 'direct')
    """
    taken = _chosen(parts.components, components, kind, layer)
    labels_in_order, by = in_order(taken, order, feature=feature, seed=seed)
    ordered = _first(labels_in_order, most)
    _refuse_unlabelled(labels, parts.values.shape[1])
    steps = direct_steps(parts, ordered, classifier=classifier, how=how, reference=reference, seed=seed)
    return _curve(steps, labels, measure, ordered, "direct", how, by, seed)


def total(
    model: nn.Module,
    images: Images | Iterable[Images],
    labels: Tensor,
    *,
    classifier: Classifier | None = None,
    of: Read | None = "representation",
    measure: Measure = accuracy,
    by: By = "head",
    order: Order = "last first",
    feature: str | None = None,
    components: Names | None = None,
    kind: Names | None = None,
    layer: Numbers | None = None,
    most: int | None = None,
    how: Replacing = "mean",
    reference: Reference | Images | Iterable[Images] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> AblationCurve:
    """Ablate components in the run, one after the other: total effects, to which later components and norms react.

    Every batch is run once for each number of components, with what replaces them computed once.

    Args:
        model: As for `vitdecomp_lens.intervene.ablate_run`.
        images: A batch, or a list of batches.
        labels: Of all the images.
        classifier: As for `direct`, of what ``of`` names.
        of: What to read of a run: ``"representation"``, ``"logits"`` (without a classifier), a hook, a function.
        measure: As for `direct`.
        by: Which cut the components are of: ``"layer"``, ``"head"``, ``"neuron"``.
        order: As for `direct`, like the five that follow.
        feature: Of feature scores, by which one.
        components: Of which labels.
        kind: Which kinds.
        layer: Which layers.
        most: How many at most.
        how: ``"zero"``, ``"mean"`` (one vector for all tokens), ``"position_mean"`` (one for each), ``"resample"``.
        reference: Where means and values come from; gathered once.
        seed: Of the random order and of resampling.
        batch_size: How many images to run at once; 32 unless said.

    Raises:
        VitDecompError: As `ablate_run`, and as `direct`.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> images, labels = torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 2, 3])
        >>> total(model, images, labels, of="logits", kind="mlp", layer=range(4, 6), how="zero").components
        ('mlp.5', 'mlp.4')
    """
    batches = [images] if isinstance(images, Tensor) else list(images)
    if not batches:
        raise InputError("Expected at least one batch of images; got none.")
    known = decompose(model, batches[0][:1], by=by).components
    labels_in_order, ordered_by = in_order(_chosen(known, components, kind, layer), order, feature=feature, seed=seed)
    ordered = _first(labels_in_order, most)
    _refuse_unlabelled(labels, sum(map(len, batches)))
    options: dict[str, Any] = {"how": how, "reference": reference, "seed": seed, "batch_size": batch_size}
    steps = total_steps(model, batches, ordered, classifier=classifier, of=of, **options)
    return _curve(steps, labels, measure, ordered, "total", how, ordered_by, seed)


def in_order(
    components: Sequence[Component], order: Order, *, feature: str | None = None, seed: int = 0
) -> tuple[tuple[str, ...], str]:
    """Labels in the order in which to ablate them, and what kind of order it is.

    Args:
        components: Which, in the order of a decomposition.
        order: As for `direct`.
        feature: By which feature's scores.
        seed: Of a random order.

    Raises:
        UnknownNameError: If there is no such feature, or a component that is named.
        InputError: If a component has no score, or the order is none of these.

    Example:
        >>> in_order([Component("head", 0, 0), Component("mlp", 0), Component("head", 1, 0)], "last first")
        (('L1H0', 'mlp.0', 'L0H0'), 'last first')
    """
    labels = [component.label for component in components]
    if isinstance(order, FeatureScores):
        return _by_score(labels, _of_feature(order, feature)), "by score"
    if feature is not None:
        raise InputError(f"feature={feature!r} is for an order by FeatureScores; got order={order!r}.")
    if isinstance(order, Mapping):
        return _by_score(labels, order), "by score"
    if isinstance(order, str):
        if order == "random":
            shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
            return tuple(labels[row] for row in shuffled), order
        if order not in ORDERS:
            raise InputError(
                f"Expected order= 'last first', 'first first', 'random', scores by label, or labels; got {order!r}."
            )
        first_first = [component.label for component in sorted(components, key=_depth)]
        return tuple(first_first if order == "first first" else reversed(first_first)), order
    if unknown := [label for label in order if label not in labels]:
        raise UnknownNameError(f"There is no component {unknown[0]!r} to ablate; {near_matches(unknown[0], labels)}")
    return tuple(order), "given"


def _depth(component: Component) -> int:
    """Where a component stands: what has no layer comes before all blocks, pooling after them."""
    if component.kind == "pool":
        return 1 << 30
    return -1 if component.layer is None else component.layer


def _by_score(labels: Sequence[str], scores: Mapping[str, float | int]) -> tuple[str, ...]:
    if missing := [label for label in labels if label not in scores]:
        raise InputError(
            f"Expected a score for each component that is to be ablated; {missing[0]!r} has none. Choose those that"
            " have, with components= or kind=."
        )
    return tuple(sorted(labels, key=lambda label: -float(scores[label])))


def _of_feature(scores: FeatureScores, feature: str | None) -> dict[str, float]:
    if feature is None and len(scores.features) > 1:
        raise InputError(f"Expected feature=, one of {', '.join(map(repr, scores.features))}; got none.")
    return dict(scores.top(feature or scores.features[0], len(scores)))


def _chosen(
    components: Sequence[Component], labels: Names | None, kind: Names | None, layer: Numbers | None
) -> list[Component]:
    able = [component for component in components if can_be_ablated(component)]
    if labels is None and kind is None:
        able = [component for component in able if component.kind != "embed"]
    return [able[row] for row in chosen(able, labels, {"kind": kind, "layer": layer})]


def _first(labels: tuple[str, ...], most: int | None) -> tuple[str, ...]:
    if most is not None and most < 0:
        raise InputError(f"Expected most= as a number of components, from 0 on; got {most}.")
    return labels[:most]


def _refuse_unlabelled(labels: Tensor, images: int) -> None:
    if len(labels) != images:
        raise InputError(f"Expected a label for each of the {images} images; got {len(labels)}.")


def _curve(
    steps: Float[Tensor, "step batch class"],
    labels: Tensor,
    measure: Measure,
    components: Sequence[str],
    effect: Literal["direct", "total"],
    how: str,
    order: str,
    seed: int,
) -> AblationCurve:
    values = tuple(float(measure(step, labels)) for step in steps)
    name = getattr(measure, "__name__", type(measure).__name__)
    return AblationCurve(tuple(components), values, effect, how, order, seed, name, steps.shape[1])


# --- several curves ---------------------------------------------------------------------------------------------------


def table(curves: Sequence[AblationCurve]) -> str:
    """Several curves side by side, as a table in Markdown.

    Example:
        >>> curve = AblationCurve(("mlp.0",), (1.0, 0.5), "direct", "mean", "last first", 0, "accuracy", 8)
        >>> print(table([curve]))
        | ablated | direct, mean, last first |
        | --: | --: |
        | 0 | 1.0000 |
        | 1 | 0.5000 |
    """
    _refuse_none(curves)
    rows = ["| ablated | " + " | ".join(curve.name for curve in curves) + " |"]
    rows.append("| --: |" + " --: |" * len(curves))
    for number, values in enumerate(zip_longest(*(curve.values for curve in curves))):
        cells = ("" if value is None else f"{value:.4f}" for value in values)
        rows.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(curves: Sequence[AblationCurve], *, names: Sequence[str] | None = None) -> "Figure":
    """Several curves in one picture: direct effects in full lines, total effects in broken ones.

    Args:
        curves: The curves, of one measure.
        names: What to call them; by default their effect, how and order.

    Returns:
        A figure of matplotlib: ``figure.savefig(path)``. No backend is chosen, no figure stays open.

    Raises:
        InputError: If matplotlib is not installed, there is no curve, or they are of different measures.

    Example:
        >>> curve = AblationCurve(("mlp.0",), (1.0, 0.5), "direct", "mean", "last first", 0, "accuracy", 8)
        >>> plot([curve]).axes[0].get_ylabel()
        'accuracy'
    """
    _refuse_none(curves)
    if not can_draw():
        raise InputError(INSTALL)
    from matplotlib.figure import Figure

    measures = {curve.measure for curve in curves}
    names = [curve.name for curve in curves] if names is None else names
    if len(measures) > 1 or len(names) != len(curves):
        raise InputError(
            f"Expected curves of one measure, with a name each; got {len(curves)} of {', '.join(sorted(measures))}, and"
            f" {len(names)} names."
        )
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for curve, name in zip(curves, names, strict=True):
        style = "-" if curve.effect == "direct" else "--"
        axes.plot(
            range(len(curve.values)), curve.values, style, marker="." if len(curve.values) < 40 else "", label=name
        )
    axes.set_xlabel("components ablated")
    axes.set_ylabel(curves[0].measure)
    axes.legend()
    return figure


def _refuse_none(curves: Sequence[AblationCurve]) -> None:
    if not curves:
        raise InputError("Expected at least one curve; got none.")
