"""Models by name, and their weights: from the library, or from a safetensors file. Nothing is unpickled.

For a live module of your own, none of this is needed: `HookedViT(module)`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError, near_matches

SHOWN = 4  # how many keys a message names


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
