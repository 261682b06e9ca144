"""What is left of a model while its components are mean-ablated one after the other, and a picture of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.applications import ablation
from vitdecomp_lens.cumulative import can_be_ablated, direct_steps, total_steps
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.evaluation.intervals import of_means
from vitdecomp_lens.evaluation.records import Record, Results
from vitdecomp_lens.evaluation.subjects import Question, Samples, Splits, Subject, class_scores, contributions
from vitdecomp_lens.interpret.features import score_features
from vitdecomp_lens.intervene import Reference
from vitdecomp_lens.intervening.reference import Replacing
from vitdecomp_lens.pictures import INSTALL, can_draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EFFECTS", "ORDERS", "CurveProtocol", "curves", "plot"]

TASK = "ablation"
ORDERS = ("last first", "first first", "by score", "random")
EFFECTS = ("direct, mean", "total, mean", "total, position_mean")
HOWS: tuple[Replacing, ...] = ("mean", "position_mean")
Read = Callable[[Tensor], Tensor]
# Of components in their order, whether each image is told right after each step.
Curve = Callable[[Sequence[str]], Float[Tensor, "step image"]]


@dataclass(frozen=True)
class CurveProtocol:
    """What is fixed before anything is measured.

    Attributes:
        random: How many random orders are averaged.
        images: On how many of the test images runs are edited; sums are on all of them.
        points: At how many numbers of components a run is looked at, none and all included.
        batch_size: How many images to run at once.
    """

    random: int = 3
    images: int = 250
    points: int = 6
    batch_size: int | None = None


def curves(
    subject: Subject, data: Splits, question: Question, *, seed: int, protocol: CurveProtocol = CurveProtocol()
) -> Iterator[Record]:
    """Accuracy with none, one, two... components ablated, and the area under each curve.

    Components are all but the embedding and constants: heads, MLPs, convolutions. What replaces them are means over
    training images, and scores are of training images too: nothing is chosen.

    Args:
        subject: The model.
        data: Training images for means, scores and a probe; test images to measure on.
        question: The classes that it tells apart.
        seed: Of random orders.
        protocol: What is fixed.

    Yields:
        ``accuracy`` by the number of components (`Record.step`), and ``area``, the mean height of the curve over that
        number, for each of `EFFECTS` and `ORDERS`: direct effects are of the sum, all statistics frozen, as in the
        paper; total ones of the run. Intervals are over test images.
    """
    training, labels = contributions(subject, data.training), data.test.labels[question.label]
    read = class_scores(subject, question, training, data.training.labels[question.label])
    orders = _orders(subject, question, training, seed, protocol.random)
    components = orders["last first"][0]
    of_sums = list(range(len(components) + 1))
    of_runs = sorted({round(point * len(components) / (protocol.points - 1)) for point in range(protocol.points)})
    found = {"direct, mean": (of_sums, _direct(contributions(subject, data.test), read, training, labels))}
    for how, curve in _total(subject, data, read, labels, components, of_runs, protocol).items():
        found[f"total, {how}"] = (of_runs, curve)
    for effect, (steps, curve) in found.items():
        for order, orderings in orders.items():
            right = torch.stack([curve(components) for components in orderings]).mean(0)
            numbers = torch.cat([right, _area(steps, right)[None]])
            measured = zip(("accuracy",) * len(steps) + ("area",), [*steps, None], strict=True)
            method = f"{effect}, {order}"
            for (measure, step), row, ends in zip(measured, numbers, of_means(numbers), strict=True):
                value = float(row.mean())
                yield Record(TASK, measure, subject.name, method, seed, value, question.label, step, ends)


def _orders(
    subject: Subject, question: Question, training: Decomposition, seed: int, random: int
) -> dict[str, list[tuple[str, ...]]]:
    """By name, one order of components, or several that are averaged."""
    able = [component for component in training.components if can_be_ablated(component) and component.kind != "embed"]
    feature = {question.label: subject.texts(question.texts)}
    scores = score_features(subject.in_words(training), feature, bootstrap=0, permutations=0)
    found = {order: [ablation.in_order(able, order)[0]] for order in ORDERS[:2]}
    found["by score"] = [ablation.in_order(able, scores)[0]]
    seeds = range(seed * random, (seed + 1) * random)
    return {**found, "random": [ablation.in_order(able, "random", seed=one)[0] for one in seeds]}


def _direct(test: Decomposition, read: Read, training: Decomposition, labels: Int[Tensor, "batch"]) -> Curve:
    return lambda components: _right(direct_steps(test, components, classifier=read, reference=training), labels)


def _right(scores: Float[Tensor, "step image class"], labels: Int[Tensor, "_"]) -> Float[Tensor, "step image"]:
    """1 where the highest score is that of the label; labels may be of more images."""
    return (scores.argmax(2).cpu() == labels[: scores.shape[1]].cpu()).double()


def _total(
    subject: Subject,
    data: Splits,
    read: Read,
    labels: Int[Tensor, "batch"],
    components: Sequence[str],
    at: Sequence[int],
    protocol: CurveProtocol,
) -> dict[Replacing, Curve]:
    model, size = subject.model, protocol.batch_size
    reference = Reference.of(model, subject.batches(data.training), batch_size=size)  # one pass for all curves
    batches = list(_first(data.test, subject, protocol.images))

    def of(how: Replacing) -> Curve:
        def measured(components: Sequence[str], at: Sequence[int]) -> Float[Tensor, "step image"]:
            options: dict[str, Any] = {"classifier": read, "how": how, "reference": reference, "batch_size": size}
            return _right(total_steps(model, batches, components, at=at, **options), labels)

        ends = measured(components, (0, len(components)))  # the same in any order
        return lambda components: torch.cat([ends[:1], measured(components, at[1:-1]), ends[1:]])

    return {how: of(how) for how in HOWS}


def _first(samples: Samples, subject: Subject, count: int) -> Iterator[Tensor]:
    """The first images, in batches."""
    for batch in subject.batches(samples):
        if count <= 0:
            return
        yield batch[:count]
        count -= len(batch)


def _area(steps: Sequence[int], values: Float[Tensor, "step image"]) -> Float[Tensor, "image"]:
    """The mean height, joined by straight lines."""
    widths = torch.tensor(steps, dtype=values.dtype).diff()
    return widths @ (values[1:] + values[:-1]) / 2 / widths.sum()


def plot(results: Results, *, of: str | None = None) -> "Figure":
    """The curves of several models side by side: a column a model, a row an effect.

    Args:
        results: With records of `curves`; lines are means over seeds, bands a standard deviation.
        of: Which question; needed where there are several.

    Raises:
        InputError: If matplotlib is not installed, there are no curves, or they are of several questions.
    """
    if not can_draw():
        raise InputError(INSTALL)
    from matplotlib.figure import Figure

    found = results.where(task=TASK, measure="accuracy", **({} if of is None else {"of": of}))
    questions, models = found.names("of"), found.names("model")
    if len(questions) != 1:
        raise InputError(f"Expected curves of one question; got {', '.join(map(repr, questions)) or 'none'}. Pass of=.")
    size = (1 + 2.1 * len(models), 1 + 1.9 * len(EFFECTS))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(EFFECTS), len(models), sharey=True, squeeze=False)
    for row, effect in enumerate(EFFECTS):
        for column, model in enumerate(models):
            _draw(grid[row, column], found.where(model=model), effect)
        grid[row, 0].set_ylabel(f"{effect}\naccuracy of {questions[0]}")
    for column, model in enumerate(models):
        grid[0, column].set_title(model)
        grid[-1, column].set_xlabel("components ablated")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ORDERS))
    return figure


def _draw(axes: "Axes", found: Results, effect: str) -> None:
    for order in ORDERS:
        one = found.where(method=f"{effect}, {order}")
        steps = sorted(one.names("step"))
        values = [one.values(step=step) for step in steps]
        means, spreads = [fmean(v) for v in values], [_spread(v) for v in values]
        axes.plot(steps, means, label=order, linestyle=":" if order == "random" else "-")
        axes.fill_between(steps, _added(means, spreads, -1), _added(means, spreads, 1), alpha=0.2)
    axes.set_ylim(0, 1)


def _spread(values: Sequence[float]) -> float:
    mean = fmean(values)
    return (sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)) ** 0.5


def _added(means: Iterable[float], spreads: Iterable[float], times: int) -> list[float]:
    return [mean + times * spread for mean, spread in zip(means, spreads, strict=True)]
