"""Where real photographs and weights are: the folder that ``VITDECOMP_REAL_DATA`` names, or one beside the checkout."""

import os
from pathlib import Path

import pytest

VARIABLE = "VITDECOMP_REAL_DATA"
FOLDER = Path(os.environ.get(VARIABLE) or Path(__file__).parents[2] / "shared" / "real")
MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
WEIGHTS = FOLDER / "vit_tiny_patch16_224.safetensors"
PHOTOGRAPHS = sorted((FOLDER / "imagenet").glob("*.jpg"))

needs_real_data = pytest.mark.skipif(
    not (WEIGHTS.is_file() and PHOTOGRAPHS),
    reason=f"needs trained weights and photographs in {FOLDER}; set {VARIABLE} to their folder",
)


def true_class(photograph: Path) -> int:
    """The class that a photograph's file name states."""
    return int(photograph.name.split("_")[0])
