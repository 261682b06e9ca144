"""What components say, in words, and how far to believe it. Reads labelled values and text banks only: no model is run.

- *What does a component say?* `text_span` and `simultaneous_omp` read components, `omp` and `nonnegative_lasso` single
  contributions; all give a `Reading`. `match_rate` compares two, `label_stability` and `bank_stability` read again.
- *Which components carry a feature?* `score_features`, `probe`; beside random texts, `text_null`; beside what happens
  without the component, `effects_table`.
- *What is an image made of?* `decompose_by_concepts` along a `ConceptTree`; `describe` in a few phrases.
- *How do models differ?* `compare_models`, from `concentration` and `match_by_cka` or `match_by_texts`.
"""

from vitdecomp_lens.interpret.causal import EffectsTable, effects_table
from vitdecomp_lens.interpret.comparing import (
    MATCHED_BY,
    PROFILES,
    Comparison,
    Concentration,
    Match,
    Matching,
    compare_models,
    concentration,
    linear_cka,
    match_by_cka,
    match_by_texts,
    participation_ratio,
    text_profiles,
)
from vitdecomp_lens.interpret.describing import Description, Patch, describe
from vitdecomp_lens.interpret.features import FeatureScore, FeatureScores, TextNull, probe, score_features, text_null
from vitdecomp_lens.interpret.hierarchy import SIGNS, ConceptParts, ConceptTree, decompose_by_concepts
from vitdecomp_lens.interpret.lasso import nonnegative_lasso
from vitdecomp_lens.interpret.match_rate import MatchRate, match_rate
from vitdecomp_lens.interpret.readings import Codes, Reading, Spans, representation
from vitdecomp_lens.interpret.sparse import omp, simultaneous_omp
from vitdecomp_lens.interpret.stability import BankStability, LabelStability, bank_stability, label_stability
from vitdecomp_lens.interpret.text_span import VARIANTS, text_span

__all__ = [
    "MATCHED_BY",
    "PROFILES",
    "SIGNS",
    "VARIANTS",
    "BankStability",
    "Codes",
    "Comparison",
    "Concentration",
    "ConceptParts",
    "ConceptTree",
    "Description",
    "EffectsTable",
    "FeatureScore",
    "FeatureScores",
    "LabelStability",
    "Match",
    "MatchRate",
    "Matching",
    "Patch",
    "Reading",
    "Spans",
    "TextNull",
    "bank_stability",
    "compare_models",
    "concentration",
    "decompose_by_concepts",
    "describe",
    "effects_table",
    "label_stability",
    "linear_cka",
    "match_by_cka",
    "match_by_texts",
    "match_rate",
    "nonnegative_lasso",
    "omp",
    "participation_ratio",
    "probe",
    "representation",
    "score_features",
    "simultaneous_omp",
    "text_null",
    "text_profiles",
    "text_span",
]
