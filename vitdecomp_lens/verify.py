"""`verify`: check on a live model that its hooks are the model's own values and its contributions sum up.

It measures what the tests of this package hold for small models, on the very model that somebody works with.
What is required stands in `vitdecomp_lens.certificate`. The model given is only read: what needs other weights or
another dtype happens on a deep copy.
"""

import copy
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens import measures
from vitdecomp_lens.certificate import Certificate, GraphParity, HookCheck, Parity
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.registry import has_adapter
from vitdecomp_lens.request import MAX_BYTES
from vitdecomp_lens.traced import check_any_images

BEHIND_ACTIVATION = (
    "Logits were not decomposed: an activation function stands between representation\nand classifier. explain reads"
    " them with that function frozen as a factor."
)
NONE_STATED = "none stated"
LIBRARIES = ("vitdecomp-lens", "torch", "timm", "open_clip_torch", "transformer-lens")


def verify(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"] | None = None,
    *,
    name: str | None = None,
    weights: str = "as given",
    licence: str | None = None,
    perturb: bool | None = None,
    count: int = 2,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
    cost: bool = True,
    progress: measures.Progress | None = None,
) -> Certificate:
    """Measure whether a model is supported: parity, gaps of every cut, coverage, live hooks, cost.

    Gaps are those of ``by="layer"``, ``"head"`` and ``"neuron"``, read at the representation and at the logits, whole
    and by token, in float32 and in float64. A hook is live if the output has a derivative by a step at its value, in
    float64.

    Args:
        model: A `HookedViT`, or any module from images to a vector: hooked where it has an adapter, traced where it has
            none. It is not changed; hooks on a `HookedViT` take no part.
        images: As the model takes them; by default ``count`` random ones.
        name: What to call the model; by default the name that timm gave it, or its class.
        weights: Where its parameters come from, for the certificate.
        licence: Of the weights; by default what timm states for a model of this name.
        perturb: Whether to add noise to all parameters of a copy first. The initial values of norms, biases and
            LayerScale are nearly the identity, and hide errors. By default, whether all norms have initial values.
        count: How many random images.
        seed: Of all random numbers here.
        max_bytes: The largest result of one cut; what would be larger is measured along random directions only.
        cost: Whether to measure it; on a machine that is busy it says little.
        progress: Called with what comes next and the share that is done.

    Returns:
        The certificate; ``print(certificate)`` shows it.

    Raises:
        UnsupportedModelError: If the module cannot be hooked.
        InputError: If the images do not fit the model, or it does not say what images it takes.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> certificate = verify(HookedViT.from_timm("test_vit", num_classes=5, depth=1))
        >>> print(certificate.failures)
        ()
    """
    say = progress or (lambda _what, _share: None)
    subject = _subject(model, perturb, seed)
    hooked = HookedViT(subject.module) if has_adapter(subject.module) else None
    single = subject.module if hooked is None else hooked
    images = _random_images(single, count, seed) if images is None else images
    if not isinstance(images, Tensor):
        raise InputError(f"Images must be a tensor [batch, channel, height, width]; got {type(images).__name__}.")
    images = images.to(measures.weight(single))
    say("parity with the original", 0.0)
    if hooked is None:
        check_any_images(images, single)
        parity: Parity | GraphParity = measures.graph_parity(single, images)
    else:
        hooked.check_images(images)
        parity = measures.parity(hooked, images)
    cuts, coverage = measures.cut_checks(
        single, images, seed=seed, max_bytes=max_bytes, say=lambda what, share: say(what, 0.02 + 0.6 * share)
    )
    twice = measures.double(single)
    hooks: tuple[HookCheck, ...] = ()
    if isinstance(twice, HookedViT):
        hooks = measures.hook_checks(
            twice, images[:1], seed=seed, say=lambda what, share: say(what, 0.62 + 0.3 * share)
        )
    say("cost", 0.92)
    measured = measures.cost(single, images) if cost and coverage is not None else None
    say("done", 1.0)
    noise = f"; all parameters perturbed on a copy (seed {seed})" if subject.perturbed else ""
    return Certificate(
        model=name or _name(subject.module),
        weights=weights + noise,
        licence=_licence(subject.module) if licence is None else licence,
        versions={"Python": platform.python_version()} | dict(_versions()),
        images=f"{len(images)} of {' × '.join(map(str, images.shape[1:]))}",
        parity=parity,
        cuts=cuts,
        coverage=coverage,
        hooks=hooks,
        cost=measured,
        notes=(BEHIND_ACTIVATION,) if getattr(single, "has_activation_before_classifier", False) else (),
    )


# --- what is measured -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    module: nn.Module
    perturbed: bool


def _subject(model: nn.Module, perturb: bool | None, seed: int) -> _Subject:
    """The module to measure in float32: the user's own where nothing about it has to change."""
    module = measures.original(HookedViT(model) if has_adapter(model) else model)
    perturbed = looks_initial(module) if perturb is None else perturb
    dtype = next(module.parameters()).dtype
    if perturbed or dtype != torch.float32:
        module = copy.deepcopy(module).float()
    if perturbed:
        _perturb(module, seed)
    return _Subject(module, perturbed)


def looks_initial(module: nn.Module) -> bool:
    """Whether every norm still has the values that it was created with: gain 1 and shift 0.

    >>> looks_initial(nn.LayerNorm(4))
    True
    """
    norms = [child for child in module.modules() if "norm" in type(child).__name__.lower() and child._parameters]
    gains = [p for norm in norms if (p := norm._parameters.get("weight")) is not None]
    shifts = [p for norm in norms if (p := norm._parameters.get("bias")) is not None]
    return bool(gains) and all(bool((p == 1).all()) for p in gains) and not any(bool(p.any()) for p in shifts)


def _perturb(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            # Gains, shifts and LayerScale are vectors, of size 1 or 0; matrices are small random numbers already.
            amount = 0.1 if parameter.dim() < 2 else 0.02
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * noise.to(parameter))


def _random_images(model: nn.Module, count: int, seed: int) -> Tensor:
    if count < 1:
        raise InputError(f"Expected at least one random image; got count={count}.")
    shape = _usual_shape(model)
    if shape is None:
        raise InputError(
            "This model takes images of any size and does not say which is usual; pass images=, a batch to verify with."
        )
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def _usual_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Channels, height and width of the images that a model says it takes."""
    if isinstance(model, HookedViT):
        size = model.usual_size()
        return None if size is None else (model.image_spec.channels, *size)
    configured = getattr(model, "pretrained_cfg", None) or {}
    return configured.get("input_size")


# --- names ------------------------------------------------------------------------------------------------------


def _name(original: nn.Module) -> str:
    configured = getattr(original, "pretrained_cfg", None) or {}
    named = ".".join(part for part in (configured.get("architecture"), configured.get("tag")) if part)
    return named or type(original).__name__


def _licence(original: nn.Module) -> str:
    return (getattr(original, "pretrained_cfg", None) or {}).get("license") or NONE_STATED


def _versions() -> Iterator[tuple[str, str]]:
    for library in LIBRARIES:
        try:
            yield library, version(library)
        except PackageNotFoundError:
            yield library, "not installed as a package"
