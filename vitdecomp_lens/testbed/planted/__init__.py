"""Planted truth: decompositions made by hand, of which the right answer is known. No model, no training.

Each function draws a *truth* (maps, weights, texts...) from its ``seed`` and the sizes, and images from that truth by
``draw``: another ``draw`` is held-out images of the same truth, and many of them are a data set drawn piece by piece.
All is computed in float64 and cast at the end. Components are heads, ``L0H0`` to ``L0H3``, ``L1H0`` and so on.
"""

from vitdecomp_lens.testbed.planted.groups import PlantedGroups, planted_groups
from vitdecomp_lens.testbed.planted.tokens import PlantedTokens, planted_tokens
from vitdecomp_lens.testbed.planted.vectors import (
    PlantedFeatures,
    PlantedMaps,
    PlantedSpans,
    planted_features,
    planted_maps,
    planted_spans,
)

__all__ = [
    "PlantedFeatures",
    "PlantedGroups",
    "PlantedMaps",
    "PlantedSpans",
    "PlantedTokens",
    "planted_features",
    "planted_groups",
    "planted_maps",
    "planted_spans",
    "planted_tokens",
]
