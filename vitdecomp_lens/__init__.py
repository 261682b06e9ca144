"""Which parts of a vision transformer write what into its image representation."""

from vitdecomp_lens.components import Component, TokenGrid
from vitdecomp_lens.decomposable import Decomposable
from vitdecomp_lens.decompose import attribute, attribute_tokens, decompose
from vitdecomp_lens.decomposition import Attribution, Coverage, Decomposition
from vitdecomp_lens.frozen.trace import trace
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.second_order import SecondOrder, attribute_second_order, second_order
from vitdecomp_lens.tokens import TokenAttribution
from vitdecomp_lens.verify import verify

__all__ = [
    "Attribution",
    "Component",
    "Coverage",
    "Decomposable",
    "Decomposition",
    "HookedViT",
    "SecondOrder",
    "TokenAttribution",
    "TokenGrid",
    "attribute",
    "attribute_second_order",
    "attribute_tokens",
    "decompose",
    "second_order",
    "trace",
    "verify",
]
