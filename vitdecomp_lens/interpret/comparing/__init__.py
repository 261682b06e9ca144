"""Comparing models: over how many components a feature is spread, and which heads of two models are alike.

`concentration` counts the components that carry a feature. `match_by_texts` and `match_by_cka` find for each component
of one model the most alike of another, beside what chance gives. `compare_models` does both for several models.
"""

from vitdecomp_lens.interpret.comparing.cka import linear_cka, match_by_cka
from vitdecomp_lens.interpret.comparing.concentrations import Concentration, concentration, participation_ratio
from vitdecomp_lens.interpret.comparing.matches import Match, Matching
from vitdecomp_lens.interpret.comparing.models import MATCHED_BY, Comparison, compare_models
from vitdecomp_lens.interpret.comparing.profiles import PROFILES, match_by_texts, text_profiles

__all__ = [
    "MATCHED_BY",
    "PROFILES",
    "Comparison",
    "Concentration",
    "Match",
    "Matching",
    "compare_models",
    "concentration",
    "linear_cka",
    "match_by_cka",
    "match_by_texts",
    "participation_ratio",
    "text_profiles",
]
