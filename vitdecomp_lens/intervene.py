"""Total effects: edit a run, and see what the model makes of it.

A direct effect (`vitdecomp_lens.decomposition.Decomposition.ablate`) edits a sum: what a component writes is
replaced, all else stays. Here the model runs again: later components react, and norms with them. What is written
instead of a component is

- ``"mean"``: one constant vector, its mean over reference images and tokens;
- ``"position_mean"``: one for each token, the mean over reference images. It is what the mean of a
  *contribution* is in a direct effect: with all statistics frozen, both change the representation alike;
- ``"zero"``: zeros;
- ``"resample"``: what it has on a reference image, drawn by a seed for each image, the same for all components.

A component is what it is in the cut that has it: a head is its entry of ``hook_z`` (its value bias with it, the
output bias not), ``attn.3`` and ``mlp.3`` are all that the branch adds to the stream (output bias included).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.components import By, Component
from vitdecomp_lens.decomposition import Attribution, Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.frozen.trace import Read
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.intervening.edits import editing, joined, listening, reader, refuse_unpassed
from vitdecomp_lens.intervening.reference import Images as ReferenceImages
from vitdecomp_lens.intervening.reference import Reference, Replacements, Replacing
from vitdecomp_lens.intervening.subject import Spot, Subject
from vitdecomp_lens.request import MAX_BYTES, refuse_too_large

__all__ = ["Reference", "ablate_run", "ablating", "total_effects"]

Images = Float[Tensor, "batch channel height width"]
Components = Sequence[str] | Mapping[str, str]
AT_ONCE = 32  # images in one run of total_effects, where nothing else is said


def ablate_run(
    model: nn.Module,
    images: Images,
    *,
    components: Components,
    how: Replacing = "mean",
    reference: Reference | ReferenceImages | Iterable[ReferenceImages] | None = None,
    of: Read | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Any:
    """What the model computes while some components are replaced: the total effect.

    Hooks that are on the model take part; at a hook that both change, the ablation comes last. No hook is left
    behind. Attention that is not hooked stays fused.

    Args:
        model: A `HookedViT`, or any module with TransformerLens hook points.
        images: As the model takes them.
        components: Labels, such as ``["L9H1", "mlp.10", "attn.3", "L3N12", "embed"]``: layers, heads and neurons
            may stand beside each other. None at all (``[]``) is the plain run. Of a module with hook points that is not
            ours also a mapping from labels to hooks.
        how: What is written instead: see the module.
        reference: Where means and resampled values come from: images, batches of them, or a `Reference`, which
            is gathered once for many ablations.
        of: What to return of the run: None for what the model returns; ``"representation"``,
            ``"logits"``, ``"embedding"`` (the representation of unit length, by its own norm), any hook, or
            a function of model and images.
        seed: Which reference images are drawn. ``parts.ablate(how="resample",
            generator=torch.Generator().manual_seed(seed))`` draws the same.
        batch_size: How many images to run at once; by default all.

    Returns:
        What was asked for.

    Raises:
        UnknownNameError: If there is no such component or hook.
        InputError: If images, components or reference cannot be used, or a component is a constant.
        UnsupportedModelError: If the model has no hook points.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> images = torch.randn(2, 3, 160, 160)
        >>> ablate_run(model, images, components=["L1H0", "mlp.0"], reference=torch.randn(4, 3, 160, 160)).shape
        torch.Size([2, 5])
    """
    subject = Subject.of(model, images, components, of)
    spots = subject.spots(components)
    replacements = _replacements(subject, spots, images, how, reference, seed, batch_size)
    read, outputs = reader(model, of), []
    with _grad_where_needed(images):
        for which in _pieces(len(images), len(images) if batch_size is None else batch_size):
            piece = images[which]
            with editing(subject.hooks, spots, replacements.values(which, piece)) as passed:
                outputs.append(read(piece))
            refuse_unpassed(passed, (spot.point.hook for spot in spots), model)
    return joined(outputs)


@contextmanager
def ablating(
    model: nn.Module,
    images: Images,
    *,
    components: Components,
    how: Replacing = "mean",
    reference: Reference | ReferenceImages | Iterable[ReferenceImages] | None = None,
    seed: int = 0,
) -> Iterator[nn.Module]:
    """Have some components replaced in every run inside of a ``with`` block.

    Whatever runs there sees the edited model: ``model(images)``, ``run_with_cache``, `decompose` (whose
    values at the ablated hooks are the replaced ones).

    Args:
        model: As for `ablate_run`.
        images: What is going to be run. With ``how="resample"`` these very images, all at once; otherwise any of
            the same size.
        components: As for `ablate_run`.
        how: As for `ablate_run`.
        reference: As for `ablate_run`.
        seed: As for `ablate_run`.

    Raises:
        VitDecompError: As `ablate_run`.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> images = torch.randn(2, 3, 160, 160)
        >>> with ablating(model, images, components=["L0H1"], how="zero"):
        ...     logits = model(images)
        >>> torch.equal(logits, ablate_run(model, images, components=["L0H1"], how="zero"))
        True
    """
    subject = Subject.of(model, images, components, None)
    spots = subject.spots(components)
    replacements = _replacements(subject, spots, images, how, reference, seed, None)
    with editing(subject.hooks, spots, replacements.values(slice(0, len(images)), images)):
        yield model


def total_effects(
    model: nn.Module,
    images: Images,
    components: Components | None = None,
    *,
    how: Replacing = "mean",
    reference: Reference | ReferenceImages | Iterable[ReferenceImages] | None = None,
    directions: Float[Tensor, "direction d_rep"] | None = None,
    names: Sequence[str] | None = None,
    of: Read = "representation",
    by: By = "head",
    seed: int = 0,
    batch_size: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Attribution:
    """How the read-out changes when a component is ablated, for each component by itself.

    ``values[c] = ⟨u, z without c⟩ − ⟨u, z⟩``, ablated minus clean: negative where the component carries what u reads.
    The direct effect of the same is −(score − score of what replaces it), with the scores of
    `vitdecomp_lens.decompose.attribute`; the two differ by how later components and norms react. The sum over
    components is nothing in particular. One run a component and batch, and one without.

    Args:
        model: As for `ablate_run`.
        images: As the model takes them.
        components: Labels, or a mapping from labels to hooks; without them, all of the cut that ``by`` names that are
            read at a hook. Constants are not.
        how: As for `ablate_run`.
        reference: As for `ablate_run`.
        directions: Any vectors in the space of ``of``, as rows; without them, its coordinates.
        names: A name for each direction, or coordinate.
        of: As for `ablate_run`, one vector an image. For what an aligner makes of the run, a function:
            ``of=lambda model, images: decompose(model, images).map(aligner).total``.
        by: ``"layer"``, ``"head"``, ``"neuron"``, or while a module is spliced ``"latent"``.
        seed: As for `ablate_run`: all components are resampled from the same images.
        batch_size: How many images to run at once; 32 unless said. With ``how="resample"`` the reference's
            values at all components are kept for so many.
        max_bytes: The largest result to allow.

    Returns:
        Effects ``[component, batch, direction]``, incomplete; ``total`` is the clean read-out. Metadata say
        ``"effect": "total"`` and how components were ablated.

    Raises:
        VitDecompError: As `ablate_run`.
        CapacityError: If the result would be larger than ``max_bytes``.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> images = torch.randn(2, 3, 160, 160)
        >>> effects = total_effects(model, images, how="zero", directions=model.W_U.T)
        >>> effects["L1H0"].shape, effects.metadata["how"]
        (torch.Size([2, 5]), 'zero')
    """
    subject = Subject.of(model, images, components, of)
    if by not in subject.by:
        raise InputError(
            f"by= must be {', '.join(map(repr, subject.by))}; got {by!r}. 'latent' needs a module that stands in the"
            " model: model.spliced(...)."
        )
    size = _at_once(batch_size, len(images))
    with _grad_where_needed(images):
        if components is not None:
            spots = subject.spots(components)
        else:
            spots = subject.all_spots(by, _counted(subject, by, images[:size]))
        if not spots:
            raise InputError("Expected at least one component to ablate; got none.")
        replacements = _replacements(subject, spots, images, how, reference, seed, batch_size)
        metadata = {
            "effect": "total",
            "how": how,
            "by": by,
            "of": of if isinstance(of, str) else getattr(of, "__name__", "function"),
            "model": getattr(getattr(model, "cfg", None), "model_name", type(model).__name__),
        }
        read, several = reader(model, of), []
        for which in _pieces(len(images), size):
            piece = images[which]
            clean = _vectors(read(piece))
            width = clean.shape[1] if directions is None else len(directions)
            refuse_too_large((len(spots), len(images), width), clean.dtype, max_bytes, "component batch direction")
            values = replacements.values(which, piece)
            changes = []
            for spot in spots:
                with editing(subject.hooks, [spot], values) as passed:
                    changes.append(_vectors(read(piece)) - clean)
                refuse_unpassed(passed, [spot.point.hook], model)
            labels = tuple(spot.component for spot in spots)
            several.append(_along(directions, names, torch.stack(changes), labels, clean, metadata))
    return Attribution.cat(several)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _replacements(
    subject: Subject, spots: Sequence[Spot], images: Tensor, how: Any, reference: Any, seed: int, batch_size: int | None
) -> Replacements:
    points = [spot.point for spot in spots]
    return Replacements.of(subject, points, images, how, reference, seed=seed, batch_size=batch_size)


def _grad_where_needed(images: Tensor) -> torch.set_grad_enabled:
    return torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad)


def _at_once(batch_size: int | None, count: int) -> int:
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size= must be at least 1; got {batch_size}. Leave it out to have it chosen.")
    return min(batch_size or AT_ONCE, count)


def _pieces(count: int, size: int) -> Iterator[slice]:
    size = _at_once(size, count)
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def _counted(subject: Subject, by: By, images: Tensor) -> dict[str, int]:
    """How many components each hook has that is split."""
    axes = {point.hook: point.axis for point in subject.by[by] if point.axis is not None}
    counts: dict[str, int] = {}

    def count(hook: str, value: Tensor) -> None:
        counts[hook] = value.shape[axes[hook]]

    with listening(subject.hooks, axes, count):
        subject.module(images)
    return counts


def _vectors(output: Any) -> Float[Tensor, "batch d_rep"]:
    """What was read, as one vector an image, in at least single precision."""
    if not isinstance(output, Tensor) or output.dim() < 2 or output[0].numel() != output.shape[-1]:
        came = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"What is read must be one vector an image, [batch, d]; got {came}. Name a hook with one vector an image,"
            " or pass a function that pools, such as of=lambda model, images: model(images)[:, 0]."
        )
    return output.flatten(1).to(accumulator(output.dtype))


def _along(
    directions: Tensor | None,
    names: Sequence[str] | None,
    changes: Float[Tensor, "component batch d_rep"],
    components: tuple[Component, ...],
    clean: Float[Tensor, "batch d_rep"],
    metadata: Mapping[str, Any],
) -> Attribution:
    if directions is None:
        named = None if names is None else tuple(names)
        return Attribution(changes, components, clean, complete=False, metadata=metadata, directions=named)
    parts = Decomposition(changes, components, clean, complete=False, metadata=metadata)
    return parts.project(directions, names=names)
