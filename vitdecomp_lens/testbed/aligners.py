"""Aligners of the testbed's models into the space of its CLIP: those that are shipped, and how they are made."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.class_match import class_bank, class_match, class_vectors, matched
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.clip.text_bank import TextBank
from vitdecomp_lens.clip.text_embedding import space_of
from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import StoreError, UnknownNameError, near_matches
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.interpret.match_rate import MatchRate
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank
from vitdecomp_lens.testbed.models import BUILDERS, CLASSES, normalised
from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scenes
from vitdecomp_lens.testbed.shipped import WEIGHTS, load_original, manifest, record, sha256_of

ALIGNED = tuple(name for name in BUILDERS if name != "clip")
AGAIN = "Fit them again: python -m vitdecomp_lens.testbed.align --ship"
FITTED = {"train": 2 / 3, "validation": 1 / 3}  # of the scenes for a fit; drawn by a seed that no training had
SEED = 1_000
CHUNK = 250  # scenes at a time


def aligner(name: str, *, folder: Path = WEIGHTS) -> Aligner:
    """The shipped aligner of one of the testbed's models, by head, into the space of its CLIP.

    Args:
        name: ``"deit"``, ``"dino"``, ``"reg"``, ``"swin"`` or ``"maxvit"``. The CLIP needs none: its contributions are
            in its space.
        folder: Where it is.

    Raises:
        UnknownNameError: If there is no such model.
        StoreError: If the aligner is not the one that the manifest names, or was fitted to other weights of the two
            models than those that come with the package.

    Example:
        >>> from vitdecomp_lens.testbed import load
        >>> parts = decompose(load("deit"), normalised(Scenes("test").images(range(2))), by="head")
        >>> parts.map(aligner("deit")).values.shape[-1]
        64
    """
    if name not in ALIGNED:
        raise UnknownNameError(f"The testbed has no aligner of {name!r}; {near_matches(name, ALIGNED)}")
    known = manifest(folder)
    entry = known[name].get("aligner")
    if entry is None:
        raise StoreError(f"The testbed's manifest knows of no aligner of {name!r}. {AGAIN}")
    path = folder / entry["file"]
    if not path.is_file() or sha256_of(path) != entry["sha256"]:
        raise StoreError(
            f"The aligner {str(path)!r} is not that of the testbed's manifest: the file is missing, damaged or another."
            f" Install the package again."
        )
    for other in (name, "clip"):
        if entry["weights"][other] != known[other]["sha256"]:
            raise StoreError(f"The aligner of {name!r} was fitted to other weights of {other!r}. {AGAIN}")
    return Aligner.load(path)


@dataclass(frozen=True, eq=False)
class Collected:
    """What a model and the CLIP make of the same scenes.

    Attributes:
        parts: By head.
        targets: The CLIP's embeddings.
        space: Of these.
    """

    parts: Decomposition
    targets: Float[Tensor, "batch d_clip"]
    space: str

    def images(self, numbers: Tensor) -> "Collected":
        """Some of the scenes."""
        rows = numbers.tolist()
        return Collected(self.parts.images(rows), self.targets[rows], self.space)


def collected(model: nn.Module, clip: Any, scenes: Mapping[str, int], *, seed: int = SEED) -> Collected:
    """Contributions and embeddings of scenes, in memory.

    Args:
        model: Of the testbed, without hooks.
        clip: The testbed's, whole.
        scenes: How many of each split.
        seed: Of the scenes.
    """
    hooked = HookedViT(model)
    parts, targets = [], []
    with torch.no_grad():
        for split, size in scenes.items():
            drawn = Scenes(split, seed=seed, size=size)
            for first in range(0, size, CHUNK):
                images = normalised(drawn.images(range(first, min(first + CHUNK, size))))
                parts.append(decompose(hooked, images, by="head"))
                targets.append(clip.encode_image(images))
    return Collected(Decomposition.cat(parts), torch.cat(targets), space_of(clip))


def split_sizes(scenes: int) -> dict[str, int]:
    """How many scenes of which split a fit is made on."""
    return {split: round(share * scenes) for split, share in FITTED.items()}


def class_names(clip: nn.Module) -> TextBank:
    """The values of all attributes in the CLIP's space, in the order and under the names of `CLASSES`."""
    texts = [text for attribute in ATTRIBUTES for text in features()[attribute]]
    return class_bank(CLASSES, text_bank(clip, texts, templates=TEMPLATES))


def match_of(model: nn.Module, clip: nn.Module, aligner: Aligner, parts: Decomposition) -> MatchRate | None:
    """The match rate of an aligner over some contributions; None where the model has no classifier."""
    vectors = class_vectors(model)
    return None if vectors is None else class_match(parts, aligner, vectors, class_names(clip))


def ship_aligner(name: str, *, scenes: int, tested: int, seed: int = 0, folder: Path = WEIGHTS) -> Aligner:
    """Fit an aligner of a shipped model, measure it on other scenes, write it, and say so in the manifest.

    Args:
        name: Which model.
        scenes: On how many it is fitted.
        tested: On how many scenes of ``test`` it is measured.
        seed: Of the fit.
        folder: Where to; the manifest is there.

    Returns:
        The aligner, with the report over the scenes that it was measured on.
    """
    model, clip = load_original(name), load_original("clip")
    fitted = collected(model, clip, split_sizes(scenes))
    others = collected(model, clip, {"test": tested})
    found = Aligner.fit(fitted.parts, fitted.targets, space=fitted.space, seed=seed)
    found = replace(found, fit_report=found.report(others.parts, others.targets))
    rate = match_of(model, clip, found, others.parts)
    found = found if rate is None else matched(found, rate)
    path = folder / f"{name}.aligner.safetensors"
    found.save(path)
    known = manifest(folder)
    entry = {
        "file": path.name,
        "sha256": sha256_of(path),
        "weights": {other: known[other]["sha256"] for other in (name, "clip")},
        "scenes": split_sizes(scenes),
        "seed": seed,
        "measured on": tested,
        "measured": _measured(found),
    }
    record(name, {"aligner": entry}, folder=folder)
    return found


def _measured(aligner: Aligner) -> dict[str, float]:
    report = aligner.fit_report
    assert report is not None
    numbers = {"cosine distance": report.cosine_distance, "isometry residual": report.mean_isometry}
    more = {"match rate": report.match_rate, "match rate by chance": report.match_by_chance}
    return {name: round(number, 4) for name, number in (numbers | more).items() if number is not None}
