"""What a component says, in words. Reads labelled values and text banks only; no model is needed.

`text_span` reads components, `match_rate` compares two readings, `Reading` is what both speak of.
"""

from vitdecomp_lens.interpret.match_rate import MatchRate, match_rate
from vitdecomp_lens.interpret.readings import Reading
from vitdecomp_lens.interpret.text_span import VARIANTS, text_span

__all__ = ["VARIANTS", "MatchRate", "Reading", "match_rate", "text_span"]
