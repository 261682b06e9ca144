"""Retrieval: images ranked by what chosen components write, for a text, or like a reference image in one property.

`Gallery` holds a vector an image, `by_text` and `by_image` rank it, `choose_count` finds on validation data how many
components to take. `precision_at`, `leakage` and `text_agreement` measure.
"""

from vitdecomp_lens.applications.retrieval.choosing import Choice, choose_count
from vitdecomp_lens.applications.retrieval.gallery import Gallery, Ranking, vectors
from vitdecomp_lens.applications.retrieval.measuring import (
    Agreement,
    Leakage,
    Precision,
    leakage,
    precision_at,
    text_agreement,
)
from vitdecomp_lens.applications.retrieval.ranking import by_image, by_text

__all__ = [
    "Agreement",
    "Choice",
    "Gallery",
    "Leakage",
    "Precision",
    "Ranking",
    "by_image",
    "by_text",
    "choose_count",
    "leakage",
    "precision_at",
    "text_agreement",
    "vectors",
]
