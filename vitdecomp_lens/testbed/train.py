"""Train one of the testbed's models: ``python -m vitdecomp_lens.testbed.train NAME``."""

import argparse
import sys
from pathlib import Path

from vitdecomp_lens.testbed.models import BUILDERS
from vitdecomp_lens.testbed.shipped import ship
from vitdecomp_lens.testbed.training import RECIPES, Recipe, train


def main() -> None:
    """Train, or go on where a former run ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(BUILDERS))
    parser.add_argument("--checkpoint", type=Path, help="by default NAME.safetensors in this folder")
    parser.add_argument("--steps", type=int, help="in place of the recipe's")
    parser.add_argument("--scenes", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ship", action="store_true", help="write the trained weights into the package")
    options = parser.parse_args()
    recipe = RECIPES[options.name]
    if options.steps is not None:
        recipe = Recipe(**{**vars(recipe), "steps": options.steps})
    checkpoint = options.checkpoint or Path(f"{options.name}.safetensors")
    model = train(options.name, checkpoint, recipe=recipe, scenes=options.scenes, seed=options.seed)
    sys.stdout.write(f"{checkpoint}\n")
    if options.ship:
        shipped = ship(options.name, model, recipe=recipe, seed=options.seed, scenes=options.scenes)
        sys.stdout.write(f"{shipped}\n")


if __name__ == "__main__":
    main()
