"""The testbed's models beside each other: over how many components attributes are spread, and whose heads are alike.

Measure again with ``python -m vitdecomp_lens.testbed.comparing``.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.clip.text_bank import TextBank
from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.comparing import Comparison, compare_models
from vitdecomp_lens.pictures import INSTALL, can_draw
from vitdecomp_lens.testbed.aligners import aligner
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank
from vitdecomp_lens.testbed.models import BUILDERS, normalised
from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scenes
from vitdecomp_lens.testbed.shipped import load, load_original

CHUNK = 250  # scenes at a time
DPI, HIGHEST = 75, 6.5  # of the plot: a row of intervals each for six attributes and six models, in inches


def contributions(name: str, images: Float[Tensor, "batch channel height width"]) -> Decomposition:
    """What a model's components write, by head, in the space of the testbed's CLIP.

    Args:
        name: Of the testbed's models; all but the CLIP are taken there by their shipped aligners.
        images: As models take them.

    Raises:
        UnknownNameError: If there is no such model.
        StoreError: If the aligner was fitted to other weights.
    """
    model = load(name)
    with torch.no_grad():
        parts = Decomposition.cat([decompose(model, piece, by="head") for piece in images.split(CHUNK)])
    return parts if name == "clip" else parts.map(aligner(name))


def attributes() -> dict[str, TextBank]:
    """The texts of each attribute's values."""
    clip = load_original("clip")
    return {name: text_bank(clip, features()[name], templates=TEMPLATES) for name in ATTRIBUTES}


def compare(
    names: Iterable[str] = tuple(BUILDERS),
    *,
    images: int = 1000,
    seed: int = 0,
    resamples: int = 1000,
    draws: int | None = None,
) -> Comparison:
    """Compare models of the testbed on ``test`` scenes: all attributes, and heads by CKA.

    Args:
        names: Of the models.
        images: How many scenes.
        seed: Of scenes, resamples and chance.
        resamples: As for `compare_models`.
        draws: As for `compare_models`.

    Raises:
        InputError: Where there are no models, or fewer than four scenes.
        UnknownNameError: If there is no such model.
        StoreError: If an aligner was fitted to other weights.
    """
    scenes = normalised(Scenes("test", seed=seed, size=images).images(range(images)))
    models = {name: contributions(name, scenes) for name in names}
    return compare_models(models, attributes(), resamples=resamples, draws=draws, seed=seed)


def as_json(found: Comparison) -> dict[str, Any]:
    """Every number: ratios with the ends of their intervals by model and attribute; matches by pair of models."""
    ratios: dict[str, Mapping[str, Any]] = {}
    for name, one in found.concentrations.items():
        rows = zip(one.features, *(ends.tolist() for ends in (one.ratio, one.low, one.high)), strict=True)
        opposed = dict(zip(one.features, _rounded(one.opposed), strict=True))
        ratios[name] = {
            "components": len(one.scores),
            "ratio": {feature: [round(number, 4) for number in numbers] for feature, *numbers in rows},
            "opposed": opposed,
        }
    matches = [
        {
            "models": list(pair),
            "heads": list(one.similarity.shape),
            "best": round(one.mean, 4),
            "by chance": round(one.mean_chance, 4),
            "above chance": [len(side.above_chance) for side in (one, one.flipped())],
            "mutual": [[match.component, match.other] for match in one.mutual],
        }
        for pair, one in found.matchings.items()
    ]
    return {"concentrations": ratios, "matches": matches}


def _rounded(numbers: Float[Tensor, "feature"]) -> list[float]:
    return [round(number, 4) for number in numbers.tolist()]


def draw(found: Comparison, path: Path) -> None:
    """Write the plot of the documentation."""
    figure = found.plot()
    figure.set_figheight(min(figure.get_figheight(), HIGHEST))
    figure.savefig(path, dpi=DPI)


def main() -> None:
    """Compare, print the tables of the documentation, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BUILDERS), default=list(BUILDERS), help="by default all")
    parser.add_argument("--images", type=int, default=1000, help="scenes (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, resamples and chance (0)")
    parser.add_argument("--resamples", type=int, default=1000, help="of images, for intervals (1000)")
    parser.add_argument("--draws", type=int, help="of chance, for matches (by default as many as heads ask for)")
    parser.add_argument("--plot", type=Path, help="draw both there, such as models.png")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args()
    if options.plot and not can_draw():
        raise InputError(INSTALL)  # before all that takes time
    found = compare(
        options.models, images=options.images, seed=options.seed, resamples=options.resamples, draws=options.draws
    )
    sys.stdout.write(found.table() + "\n")
    if options.plot:
        draw(found, options.plot)
    if options.json:
        options.json.write_text(json.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
