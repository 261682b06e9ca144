"""What a component says, in words. Reads labelled values and text banks only; no model is needed.

`text_span` and `simultaneous_omp` read components, `omp` and `nonnegative_lasso` single contributions; `match_rate`
compares two readings. All of them speak of a `Reading`.
"""

from vitdecomp_lens.interpret.lasso import nonnegative_lasso
from vitdecomp_lens.interpret.match_rate import MatchRate, match_rate
from vitdecomp_lens.interpret.readings import Codes, Reading, Spans, representation
from vitdecomp_lens.interpret.sparse import omp, simultaneous_omp
from vitdecomp_lens.interpret.text_span import VARIANTS, text_span

__all__ = [
    "VARIANTS",
    "Codes",
    "MatchRate",
    "Reading",
    "Spans",
    "match_rate",
    "nonnegative_lasso",
    "omp",
    "representation",
    "simultaneous_omp",
    "text_span",
]
