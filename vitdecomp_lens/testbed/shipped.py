"""The trained models that come with the package: what they are, and their weights, checked before use."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitdecomp_lens import storage
from vitdecomp_lens.errors import StoreError
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.testbed.models import BUILDERS, build
from vitdecomp_lens.testbed.training import Recipe
from vitdecomp_lens.weights import load_weights

WEIGHTS = Path(__file__).parent / "weights"
MANIFEST = "manifest.json"
PACKAGES = ("torch", "timm", "open_clip_torch", "vitdecomp-lens")


def load(name: str) -> HookedViT:
    """One of the trained models of the testbed, hooked.

    Args:
        name: ``"clip"``, ``"deit"``, ``"dino"``, ``"reg"``, ``"swin"`` or ``"maxvit"``. The whole CLIP, with its
            tower of texts, is ``load_original("clip")``; `tokenize` makes texts into its tokens.

    Returns:
        The model, in evaluation mode. `Scenes` of any split are images for it: ``model.preprocess`` takes them as
        PIL images, `normalised` as the bytes that they are.

    Raises:
        UnknownNameError: If there is no such model.
        StoreError: If its weights are not those that the manifest names.

    Example:
        >>> from vitdecomp_lens.testbed import CLASSES, Scenes, normalised
        >>> model = load("deit")
        >>> scene = Scenes("test")[0]
        >>> CLASSES[int(model(normalised(scene.image[None]))[0, :8].argmax())] == scene.attributes["shape"]
        True
    """
    return HookedViT(load_original(name))


def load_original(name: str) -> nn.Module:
    """The same model as an object of timm or open_clip, without hooks.

    Args:
        name: As for `load`.

    Raises:
        UnknownNameError: If there is no such model.
        StoreError: If its weights are not those that the manifest names.
    """
    model = build(name)
    path = WEIGHTS / manifest()[name]["file"]
    if not path.is_file() or sha256_of(path) != manifest()[name]["sha256"]:
        raise StoreError(
            f"The weights {str(path)!r} are not those of the testbed's manifest: the file is missing, damaged or"
            " another. Install the package again."
        )
    load_weights(model, path)
    return model.eval().requires_grad_(False)


def manifest(folder: Path | None = None) -> dict[str, Any]:
    """How each of the trained models was made, and how good it is, by name."""
    path = (folder or WEIGHTS) / MANIFEST
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"The testbed's manifest {str(path)!r} cannot be read: {error}.") from error
    return known


def ship(name: str, model: nn.Module, *, recipe: Recipe, seed: int, scenes: int, folder: Path = WEIGHTS) -> Path:
    """Write a trained model's weights in half precision, and what it is into the manifest.

    Args:
        name: Which model.
        model: The model, trained.
        recipe: How it was trained.
        seed: Of weights, scenes and their order.
        scenes: On how many it was trained.
        folder: Where to.

    Returns:
        The file of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    state = {key: _halved(value.detach()).contiguous().clone() for key, value in model.state_dict().items()}
    storage.write_tensors(path, state)
    entry = {
        "file": path.name,
        "sha256": sha256_of(path),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": seed,
        "scenes": scenes,
        "recipe": asdict(recipe),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }
    record(name, entry, folder=folder)
    return path


def record(name: str, entry: Mapping[str, Any], *, folder: Path = WEIGHTS) -> None:
    """Put something about a model into the manifest, beside what it already says of it.

    Args:
        name: Which model.
        entry: What is to be said; a new file takes all else away.
        folder: Where the manifest is.
    """
    path = folder / MANIFEST
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = dict(entry) if "sha256" in entry else known[name] | dict(entry)
    ordered = {known_name: known[known_name] for known_name in BUILDERS if known_name in known}
    path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def sha256_of(path: Path) -> str:
    """What tells a file from any other."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
