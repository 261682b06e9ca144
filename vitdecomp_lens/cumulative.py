"""One component after the other ablated: what can be read after each of them, in the sum and in the run.

The direct effect edits the sum: each step takes away what the next component writes and puts in what replaces it, so
that n steps cost as much as n sums of vectors. The total effect runs the model once a step on each batch; what is
written instead is computed once a batch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.frozen.trace import Read
from vitdecomp_lens.gap import summed
from vitdecomp_lens.intervene import Reference
from vitdecomp_lens.intervening.edits import editing, reader, refuse_unpassed
from vitdecomp_lens.intervening.reference import Images, Replacements, Replacing
from vitdecomp_lens.intervening.subject import Subject

__all__ = ["Classifier", "can_be_ablated", "direct_steps", "total_steps"]

Classifier = Float[Tensor, "class d_rep"] | Callable[[Tensor], Tensor]
AT_ONCE = 32  # images in one run, where nothing else is said


def can_be_ablated(component: Component) -> bool:
    """Whether it makes sense to ablate a component: constants have no other value to take."""
    return component.kind not in ("constant", "intervention")


def direct_steps(
    parts: Decomposition,
    components: Sequence[str],
    *,
    classifier: Classifier | None = None,
    how: Replacing = "mean",
    reference: Decomposition | None = None,
    seed: int = 0,
    at: Sequence[int] | None = None,
) -> Float[Tensor, "step batch class"]:
    """What is read of the sum with none, one, two... components ablated: direct effects, all statistics frozen.

    Args:
        parts: Contributions of the images.
        components: Labels, in the order in which they are ablated.
        classifier: What reads the representation: a direction for each class, or a function of representations;
            without it, the representation itself.
        how: ``"zero"``, ``"mean"`` or ``"resample"``, of contributions.
        reference: Contributions of other images, for means and resampling.
        seed: Which reference images are drawn.
        at: After how many components to read, ascending; by default after each, 0 included.

    Returns:
        As many steps as ``at`` has numbers.

    Raises:
        UnknownNameError: If there is no such component.
        InputError: If what ``how`` needs is missing, or is something that only a run has.

    Example:
        >>> parts = Decomposition(torch.eye(3)[:, None], ("L0H0", "L0H1", "mlp.0"), torch.ones(1, 3))
        >>> direct_steps(parts, ["mlp.0", "L0H0"], how="zero")[:, 0]
        tensor([[1., 1., 1.],
                [1., 1., 0.],
                [0., 1., 0.]])
    """
    steps = _steps(components, at)
    read = _reading(classifier)
    if how == "position_mean":
        raise InputError(
            "how='position_mean' is written in a run, token by token; a contribution is a sum over tokens, and its mean"
            " over images is how='mean': with all statistics frozen, both change the representation alike."
        )
    whole = summed(parts.values) if parts.total is None else parts.total
    current = whole.double()  # so that many small steps do not add up their rounding
    found = [read(whole.to(parts.values.dtype))] if 0 in steps else []
    if components:
        chance = torch.Generator().manual_seed(seed)
        selected = parts.select(labels=list(components))
        others = selected.ablate(list(components), how=how, reference=reference, generator=chance).values
        for number, (mine, instead) in enumerate(zip(selected.values, others, strict=True), start=1):
            current = current + (instead.double() - mine.double())
            if number in steps:
                found.append(read(current.to(parts.values.dtype)))
    return torch.stack(found)


def total_steps(
    model: nn.Module,
    images: Images | Iterable[Images],
    components: Sequence[str],
    *,
    classifier: Classifier | None = None,
    of: Read | None = "representation",
    how: Replacing = "mean",
    reference: Reference | Images | Iterable[Images] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    at: Sequence[int] | None = None,
) -> Float[Tensor, "step batch class"]:
    """What is read of runs with none, one, two... components ablated: total effects.

    Args:
        model: As for `vitdecomp_lens.intervene.ablate_run`.
        images: A batch, or any number of batches; each is gone through once.
        components: Labels, in the order in which they are ablated.
        classifier: What reads what ``of`` names; without it, that itself.
        of: What to read of a run, as for `ablate_run`: None for what the model returns.
        how: As for `ablate_run`.
        reference: As for `ablate_run`. Gathered once.
        seed: Which reference images are drawn; of several batches, each draws its own.
        batch_size: How many images to run at once; 32 unless said.
        at: As for `direct_steps`.

    Raises:
        VitDecompError: As `ablate_run`.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> total_steps(model, torch.randn(2, 3, 160, 160), ["mlp.0", "L1H0"], how="zero", of="logits").shape
        torch.Size([3, 2, 5])
    """
    steps, read = _steps(components, at), _reading(classifier)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size= must be at least 1; got {batch_size}. Leave it out to have it chosen.")
    run, found = reader(model, of), []
    for number, batch in enumerate([images] if isinstance(images, Tensor) else images):
        subject = Subject.of(model, batch, list(components), of)
        if how in ("mean", "position_mean") and reference is not None and not isinstance(reference, Reference):
            reference = Reference.of(model, reference, components=list(components), batch_size=batch_size)
        spots = subject.spots(list(components))
        points = [spot.point for spot in spots]
        replacements = Replacements.of(
            subject, points, batch, how, reference, seed=seed + number, batch_size=batch_size
        )
        for first in range(0, len(batch), batch_size or AT_ONCE):
            which = slice(first, min(first + (batch_size or AT_ONCE), len(batch)))
            piece = batch[which]
            with torch.no_grad():
                values, several = replacements.values(which, piece), []
                for count in steps:
                    with editing(subject.hooks, spots[:count], values) as passed:
                        several.append(_rows(read(_rows(run(piece)))))
                    refuse_unpassed(passed, (spot.point.hook for spot in spots[:count]), model)
            found.append(torch.stack(several))
    if not found:
        raise InputError("Expected at least one batch of images; got none.")
    return torch.cat(found, 1)


def _steps(components: Sequence[str], at: Sequence[int] | None) -> list[int]:
    if isinstance(components, str):
        raise InputError(f"Expected components as a list of labels, in their order; got {components!r}.")
    twice = next((label for label in components if list(components).count(label) > 1), None)
    if twice is not None:
        raise InputError(f"Expected each component once in the order in which they are ablated; {twice!r} comes twice.")
    steps = list(range(len(components) + 1)) if at is None else list(at)
    if not steps or steps != sorted(set(steps)) or steps[0] < 0 or steps[-1] > len(components):
        raise InputError(
            f"Expected at= as ascending numbers from 0 to {len(components)}, the number of components; got {at!r}."
        )
    return steps


def _reading(classifier: Classifier | None) -> Callable[[Tensor], Tensor]:
    if classifier is None:
        return lambda vectors: vectors
    if not isinstance(classifier, Tensor):
        return classifier
    directions = classifier
    return lambda vectors: _along(vectors, directions)


def _along(vectors: Tensor, directions: Tensor) -> Tensor:
    if vectors.shape[-1] != directions.shape[-1]:
        raise InputError(
            f"Expected a direction for each class in the space of what is read, of width {vectors.shape[-1]}; got"
            f" directions {list(directions.shape)}."
        )
    return vectors @ directions.T.to(vectors)


def _rows(output: Any) -> Float[Tensor, "batch width"]:
    if not isinstance(output, Tensor) or output.dim() != 2:
        came = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"What is read must be one vector an image, [batch, d]; got {came}. Say what to read with of=, a hook or a"
            " function of model and images."
        )
    return output
