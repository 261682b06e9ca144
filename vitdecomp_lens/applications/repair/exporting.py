"""A repaired model as an ordinary state dict."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitdecomp_lens.applications.repair.folding import Folding
from vitdecomp_lens.errors import GapError, InputError, UnsupportedModelError
from vitdecomp_lens.frozen.trace import trace
from vitdecomp_lens.hooked.model import HookedViT
from vitdecomp_lens.intervene import Reference, ablate_run
from vitdecomp_lens.intervening.reference import Images
from vitdecomp_lens.intervening.subject import Spot, Subject
from vitdecomp_lens.points import is_hooked

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
CHECKED = 4  # images on which the exported weights are held against the ablated run
WHY_NOT = {
    "position_mean": "it writes another vector at each token, and weights are shared by all tokens",
    "resample": "it writes what other images have, and weights hold no images",
}


def export(
    model: HookedViT,
    *,
    components: Sequence[str],
    how: str = "mean",
    reference: Reference | Images | Iterable[Images] | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Fold a total ablation into the weights: a model that is repaired for good, without hooks.

    A head's mean goes through its columns of the output projection into that layer's bias, and the columns become zero;
    a neuron's likewise. An attention, MLP or convolution branch ends in weights of zero and a bias that is, after
    LayerScale, its mean; where a norm stands behind the branch, that norm's gain and shift are those weights. The
    result is run on a few images, and has to give what `ablate_run` gives.

    Args:
        model: A hooked model without hooks of yours. It stays as it is.
        components: Labels, as for `vitdecomp_lens.intervene.ablate_run`.
        how: ``"mean"``, over images and tokens, or ``"zero"``. What differs by token or image cannot be folded.
        reference: For means: training images, batches of them, or a `Reference` made from them.
        tolerance: The largest gap to the ablated run, relative to its largest output; by default 1e-5 in float32 and
            1e-10 in float64. In half precision nothing is checked.

    Returns:
        A state dict of ``model.original``, the timm model or open_clip image tower that was wrapped, with its keys and
        shapes: ``fresh.load_state_dict(state)``; of a whole CLIP, ``clip.visual.load_state_dict(state)``.

    Raises:
        UnknownNameError: If there is no such component.
        InputError: If ``how`` cannot be folded, the reference is missing, a component is a constant, or hooks are on
            the model.
        UnsupportedModelError: If a component has no weights and bias of its own to be folded into; it says what is in
            the way.
        GapError: If the exported weights give something else than the ablated run.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> import timm
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> images, training = torch.randn(2, 3, 160, 160), torch.randn(4, 3, 160, 160)
        >>> state = export(model, components=["L1H0", "mlp.3"], reference=training)
        >>> plain = timm.create_model("test_vit", num_classes=5).eval()
        >>> plain.load_state_dict(state)
        <All keys matched successfully>
        >>> ablated = ablate_run(model, images, components=["L1H0", "mlp.3"], reference=training)
        >>> torch.allclose(plain(images), ablated, atol=1e-4)
        True
    """
    _refuse_unfit(model, how, components)
    example, reference = _example(model, reference)
    if how == "mean":
        if reference is None:
            raise InputError("how='mean' takes means from training images: expected reference=; got none.")
        if not isinstance(reference, Reference):
            reference = Reference.of(model, reference, components=list(components))
    subject = Subject.of(model, example, list(components), None)
    spots = subject.spots(list(components))
    hooks = {spot.point.hook for spot in spots}
    live = dict(model.original.state_dict(keep_vars=True))
    copies = {id(value): value.detach().clone() for value in live.values() if isinstance(value, Tensor)}
    with torch.no_grad():
        folding = Folding(trace(model, example, listened=hooks), copies, example)
        for several in _by_hook(spots):
            hook = several[0].point.hook
            value = reference.replacement(hook, "mean") if how == "mean" else example.new_zeros(())  # type: ignore[union-attr]
            if several[0].index is None:
                folding.fold_branch(several[0], value)
            else:
                folding.fold_entries(several, value)
        state = {key: copies[id(v)] if isinstance(v, Tensor) else v for key, v in live.items()}
        _check(model, state, example, components, how, reference, tolerance)
    return state


def _refuse_unfit(model: nn.Module, how: str, components: Sequence[str]) -> None:
    if isinstance(components, str):
        raise InputError(f"Expected components as a list of labels; got {components!r}.")
    if not isinstance(model, HookedViT):
        raise UnsupportedModelError(
            f"Weights are exported of a HookedViT, which knows what it wraps; got {type(model).__name__}. Wrap the"
            " model first: HookedViT(model)."
        )
    if how in WHY_NOT:
        raise InputError(f"how={how!r} cannot be folded into weights: {WHY_NOT[how]}. Use how='mean' or how='zero'.")
    if how not in ("mean", "zero"):
        raise InputError(f"Expected how='mean' or how='zero'; got how={how!r}.")
    if hooked := [name for name, point in model.hook_dict.items() if is_hooked(point)]:
        raise InputError(
            f"Hooks are on the model, such as at {hooked[0]!r}: a state dict has no place for them. Export without:"
            " model.reset_hooks()."
        )


def _example(model: HookedViT, reference: Any) -> tuple[Tensor, Any]:
    """A few images to trace and check with, and the reference, of which an iterator has lost nothing."""
    images = reference.images if isinstance(reference, Reference) else reference
    if images is not None and not isinstance(images, Tensor):
        batches: Iterator[Any] = iter(images)
        first = next(batches, None)
        if not isinstance(images, list | tuple):
            reference = chain([] if first is None else [first], batches)
        images = first
    if isinstance(images, Tensor) and len(images):
        return images[:CHECKED], reference
    size = model.usual_size()
    if size is None:
        raise InputError("The model does not say how large its images are: give reference= images.")
    chance = torch.Generator().manual_seed(0)
    weight = next(model.original.parameters())
    return torch.randn(CHECKED, model.image_spec.channels, *size, generator=chance).to(weight), reference


def _by_hook(spots: Sequence[Spot]) -> list[list[Spot]]:
    """Components of one hook together; parts of branches first, so that a whole branch has the last word."""
    found: dict[str, list[Spot]] = {}
    for spot in spots:
        found.setdefault(spot.point.hook, []).append(spot)
    return sorted(found.values(), key=lambda several: several[0].index is None)


def _check(
    model: HookedViT,
    state: dict[str, Any],
    images: Tensor,
    components: Sequence[str],
    how: Any,
    reference: Any,
    tolerance: float | None,
) -> None:
    """Hold a state dict against the ablated run."""
    allowed = TOLERANCES.get(images.dtype) if tolerance is None else tolerance
    if allowed is None:
        return
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    plain = _tensors(functional_call(model.original, tensors, (images,)))
    ablated = _tensors(ablate_run(model, images, components=list(components), how=how, reference=reference))
    for mine, theirs in zip(plain, ablated, strict=True):
        gap = float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny))
        if not gap <= allowed:  # so that a gap that is not a number fails too
            raise GapError(
                f"The exported weights give something else than the ablated run: gap {gap:.1e}, allowed is"
                f" {allowed:.1e} ({images.dtype}). Ablate in runs instead, or allow more with tolerance=."
            )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    several = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for one in several for tensor in _tensors(one)]
