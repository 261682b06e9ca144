"""How a cotangent, as pairs, passes each operation: one registered function an operation.

A function gets the node, the pairs at its output, and the `Adjoint` that is being built. It returns the pairs
at each input through which the operation is affine, and hands over what the operation adds by itself
(biases, shifts) with `Adjoint.constant`. Each file here has the rules of one subject. All are imported below, so that
whoever can call `pass_back` has every rule. To add an operation::

    @adjoint("my_library::my_scale")
    def my_scale(node, pairs, on):
        return [(node.args[0], on.scaled(node, pairs, on.value(node.args[1])))]
"""

from vitdecomp_lens.frozen.adjoints import attention, derived, moves, norms, products, slices, sums
from vitdecomp_lens.frozen.adjoints.registry import ADJOINTS, Adjoint, adjoint, pass_back
from vitdecomp_lens.frozen.rules import SPLITS

__all__ = [
    "ADJOINTS",
    "Adjoint",
    "adjoint",
    "attention",
    "derived",
    "moves",
    "norms",
    "pass_back",
    "products",
    "slices",
    "sums",
]

assert not SPLITS & ADJOINTS.keys(), "walks pass a split by way of getitem"
