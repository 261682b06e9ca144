"""Models by name, and their weights: from the library, or from a safetensors file. Nothing is unpickled.

For a live module of your own, none of this is needed: `HookedViT(module)`. What tells its weights from others is
`weights_hash`.
"""

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError, near_matches

SHOWN = 4  # how many keys a message names
LOOKED_AT = 64  # entries of each weight, to see what was written through ``.data``
_HASHES: "WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]]" = WeakKeyDictionary()


def create_timm(name: str, *, pretrained: bool = False, **timm_kwargs: Any) -> nn.Module:
    """Create a model of timm by name, in evaluation mode.

    Args:
        name: timm's name, with or without the tag of its weights, or ``hf-hub:OWNER/NAME``.
        pretrained: Whether to load its weights.
        **timm_kwargs: Passed to ``timm.create_model``.

    Raises:
        UnknownNameError: If timm has no such model or tag; the message has near matches.
        InputError: If its weights cannot be loaded.

    Example:
        >>> create_timm("test_vitt")
        Traceback (most recent call last):
            ...
        vitdecomp_lens.errors.UnknownNameError: timm has no model 'test_vitt'; did you mean 'test_vit' ...
    """
    import timm

    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            raise UnknownNameError(f"timm has no model {name!r}; {near_matches(architecture, timm.list_models())}")
        known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in known:
            raise UnknownNameError(f"timm has no weights {tag!r} for {architecture}; {near_matches(tag, known)}")
        if pretrained and not known:
            raise InputError(f"timm has no weights for {architecture}. Make it without, or load a file.")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **timm_kwargs)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unloadable(name, error) from error
    return model.eval()


def create_open_clip(name: str, *, pretrained: str | None = None, **kwargs: Any) -> nn.Module:
    """Create a model of open_clip by name, in evaluation mode.

    Args:
        name: open_clip's name, such as ``"ViT-B-16"``.
        pretrained: Tag or file of its weights.
        **kwargs: Passed to ``open_clip.create_model``.

    Raises:
        UnknownNameError: If open_clip has no such model or tag; the message has near matches.
        InputError: If its weights cannot be loaded.
    """
    import open_clip

    known = open_clip.list_models()
    if name not in known and ":" not in name:  # such as hf-hub:OWNER/NAME
        raise UnknownNameError(f"open_clip has no model {name!r}; {near_matches(name, known)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None and pretrained not in tags and not Path(pretrained).exists():
        raise UnknownNameError(f"open_clip has no weights {pretrained!r} for {name}; {near_matches(pretrained, tags)}")
    try:
        model: nn.Module = open_clip.create_model(name, pretrained=pretrained, **kwargs)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unloadable(name, error) from error
    return model.eval()


def _unloadable(name: str, error: Exception) -> InputError:
    first = next(iter(str(error).splitlines()), "")
    return InputError(
        f"The model {name!r} could not be made, or its weights not loaded: {type(error).__name__}: {first} Without a "
        f"network, make it without pretrained weights and load a file: load_weights(module, 'weights.safetensors'), or "
        f"--weights FILE.safetensors on the command line."
    )


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file of a module's own state dict into it.

    Args:
        module: The module, whose parameters are overwritten.
        path: The file, with exactly the keys and shapes of ``module.state_dict()``.

    Raises:
        InputError: If the file is not a safetensors file, or has other keys or shapes than the module.
        StoreError: If it is missing or damaged.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(
            f"Weights must be a .safetensors file, which holds tensors only; got {path.name!r}, and other formats may "
            f"run code while they are read. Convert a file that you trust: safetensors.torch.save_file("
            f"torch.load({path.name!r}, weights_only=True), 'weights.safetensors')."
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"The weights {str(path)!r} cannot be read: {error}. Check the path, or copy it again."
        ) from error
    _check_fits(module, tensors, path)
    module.load_state_dict(tensors)


def _check_fits(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    own: Mapping[str, Any] = module.state_dict()
    wrong = {
        "missing": [key for key in own if key not in tensors],
        "not in the model": [key for key in tensors if key not in own],
        "of another shape": [
            f"{key} {list(tensors[key].shape)} for {list(own[key].shape)}"
            for key in own
            if key in tensors and own[key].shape != tensors[key].shape
        ],
    }
    found = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in wrong.items() if keys]
    if found:
        raise InputError(
            f"The weights {path.name!r} are not those of this {type(module).__name__}: {'; '.join(found)}. Name the "
            f"model that they were saved from; another number of classes is --num-classes N."
        )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")


# --- which weights a model has ---------------------------------------------------------------------------------------


def weights_hash(module: nn.Module) -> str:
    """A hash of names, shapes, dtypes and values of all parameters and stored buffers, as ``state_dict()`` has them.

    It is worked out once a model (a fifth of a second for a ViT-B), and again after a weight has changed: it then lies
    elsewhere or has another version. What is written through ``.data`` leaves no version; it is seen by entries at 64
    places of each weight, so that a change of a few entries only can be missed.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = weights_hash(layer)
        >>> with torch.no_grad():
        ...     _ = layer.weight.add_(1)
        >>> len(before), weights_hash(layer) == before
        (16, False)
    """
    weights = {name: tensor for name, tensor in sorted(module.state_dict().items()) if isinstance(tensor, Tensor)}
    state = _state(weights)
    known = _HASHES.get(module)
    if known is None or known[0] != state:
        known = _HASHES[module] = state, _digest(weights)
    return known[1]


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _state(weights: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """What changes with the weights, and costs little to look at."""
    tensors = [tensor.detach() for tensor in weights.values()]
    places = [(t.data_ptr(), t.shape, t.dtype, t.device, 0 if t.is_inference() else t._version) for t in tensors]
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            some = torch.take(tensor, _some_places(tensor.numel(), tensor.device))
            alike.setdefault((tensor.dtype, tensor.device), []).append(some)
    return tuple(weights), places, [bytes(_bytes(torch.cat(several))) for several in alike.values()]


@lru_cache(maxsize=512)
def _some_places(size: int, device: torch.device) -> Int[Tensor, "place"]:
    generator = torch.Generator().manual_seed(size)
    with torch.inference_mode(False):  # kept for calls outside of it
        return torch.randint(size, (min(size, LOOKED_AT),), generator=generator).to(device)
