"""One table: what a frozen operation is linear in.

Freezing a model at one input leaves each operation of its graph one of five kinds:

===========  ==================================================  =================================
kind         what it is                                          what is frozen
===========  ==================================================  =================================
linear       sums, products with constants, reshapes, pooling    nothing
normaliser   LayerNorm, RMSNorm, division by a norm              1/σ, or the norm; μ stays linear
pattern      attention: a softmax times values                   the softmax
gate         squeeze-excite products, max-pool                   the gate, the arg-max
source       every other nonlinearity                            its value
===========  ==================================================  =================================

A walk from the output towards the input passes linear operations and normalisers; it passes a pattern or a
gate only where a cut lies behind it, and never a source. What an operation is linear *in* is all that this
file says; how a cotangent passes it stands in ``adjoints/``, how the frozen operation is replayed in
``replay.py``.

To add an operation, register a function that gets its node and the set of nodes that depend on the images,
and returns a `Passage`::

    @rule("my_library::my_scale")
    def my_scale(node, live):
        return Passage("linear", (node.args[0],))

An operation without a rule is a source, and every walk that meets it reports it as unknown.
"""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from vitdecomp_lens.errors import InputError

Kind = Literal["linear", "normaliser", "pattern", "gate", "source"]


@dataclass(frozen=True)
class Passage:
    """What a frozen operation is, and the inputs in which it is affine.

    Attributes:
        kind: One of the five kinds above.
        through: Inputs through which a walk goes on; empty for a source.
        known: False for an operation without a rule.
    """

    kind: Kind
    through: tuple[Node, ...] = ()
    known: bool = True


Rule = Callable[[Node, Container[Node]], Passage]
RULES: dict[str, Rule] = {}
SOURCE = Passage("source")


def rule(*operations: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of one or more operations, named as ``"aten::linear"``.

    Raises:
        InputError: If an operation has a rule already.
    """

    def register(function: Rule) -> Rule:
        for operation in operations:
            if operation in RULES:
                raise InputError(f"The operation {operation!r} has a rule already: {RULES[operation].__name__}.")
            RULES[operation] = function
        return function

    return register


def aten(names: str) -> list[str]:
    """Full names of several operations.

    >>> aten("view roll")
    ['aten::view', 'aten::roll']
    """
    return [f"aten::{name}" for name in names.split()]


def operation(node: Node) -> str:
    """The name of a node's operation: ``aten::linear``, ``getitem``, or the kind of node."""
    if node.op != "call_function":
        return node.op
    schema = getattr(node.target, "_schema", None)  # built-in functions such as getitem have none
    return schema.name if schema is not None else node.target.__name__  # type: ignore[union-attr]


def classify(node: Node, live: Container[Node]) -> Passage:
    """What ``node`` is, given the nodes that depend on the images (``live``)."""
    found = RULES.get(operation(node))
    return found(node, live) if found else Passage("source", known=False)


def sizes(node: Node) -> tuple[int, ...]:
    """Shape of a node's value when the batch holds the two images that it was traced with."""
    return tuple(int(size) for size in node.meta["val"].shape)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an operation by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


# The value is the first argument's; the second only lends its shape or its dtype.
_VALUES_OF_THE_FIRST = frozenset(aten("expand_as view_as reshape_as type_as to"))
_SHAPES_ONLY = frozenset(
    aten("sym_size zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty")
)


def depends(node: Node, live: Container[Node]) -> bool:
    """Whether a value depends on the images, not only on their shape, given which of its inputs do."""
    name = operation(node)
    if name in _SHAPES_ONLY:
        return False
    if name in _VALUES_OF_THE_FIRST:
        return node.args[0] in live
    return any(n in live for n in node.all_input_nodes)


def _live_inputs(node: Node, live: Container[Node]) -> tuple[Node, ...]:
    return tuple(dict.fromkeys(n for n in node.all_input_nodes if n in live))


# --- linear -----------------------------------------------------------------------------------------------


@rule(
    *aten(
        "view _unsafe_view reshape flatten unflatten squeeze unsqueeze permute transpose t numpy_T mT movedim swapaxes"
        " expand expand_as view_as reshape_as repeat alias contiguous clone detach lift_fresh_copy to _to_copy type_as"
        " slice select narrow roll flip pad constant_pad_nd unfold im2col col2im pixel_shuffle pixel_unshuffle"
        " repeat_interleave mean sum cumsum avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d"
        " _adaptive_avg_pool2d upsample_bilinear2d upsample_bicubic2d upsample_nearest2d neg"
    ),
    "vitdecomp_lens::tag",
)
def moves_or_averages(node: Node, live: Container[Node]) -> Passage:
    """Operations that move, copy or average entries of their first argument."""
    return Passage("linear", (node.args[0],))  # type: ignore[arg-type]


@rule("aten::dropout", "aten::feature_dropout")
def dropout(node: Node, live: Container[Node]) -> Passage:
    """The identity in evaluation mode; active dropout is random."""
    active = argument(node, 2, "train", False) and argument(node, 1, "p", 0.5) > 0
    return SOURCE if active else Passage("linear", (node.args[0],))  # type: ignore[arg-type]


@rule("aten::index", "aten::index_select", "aten::gather")
def picks(node: Node, live: Container[Node]) -> Passage:
    """Entries at constant places; places that depend on the images are a choice, not a linear map."""
    inputs = _live_inputs(node, live)
    return Passage("linear", inputs) if inputs == (node.args[0],) else SOURCE


@rule(*aten("add sub rsub cat concat stack select_scatter slice_scatter"))
def joins(node: Node, live: Container[Node]) -> Passage:
    """Sums, concatenations, and values with parts replaced are linear in all that they join."""
    return Passage("linear", _live_inputs(node, live))


@rule("aten::index_put")
def puts(node: Node, live: Container[Node]) -> Passage:
    """Values at constant places; linear in these and in what else there is."""
    places = [n for n in node.args[1] if n is not None]  # type: ignore[union-attr]
    return SOURCE if any(n in live for n in places) else Passage("linear", _live_inputs(node, live))


@rule("aten::where", "aten::masked_fill")
def chooses(node: Node, live: Container[Node]) -> Passage:
    """Entries of one or the other value; linear in both where what is chosen is constant."""
    chosen = node.args[0 if operation(node) == "aten::where" else 1]
    return SOURCE if chosen in live else Passage("linear", _live_inputs(node, live))


@rule("aten::addcmul", "aten::addcdiv")
def adds_a_product(node: Node, live: Container[Node]) -> Passage:
    """A sum x + a b, or x + a / b: linear in x, and in a or b where the other is constant."""
    _, left, right = node.args[:3]
    divided_by = right in live and operation(node) == "aten::addcdiv"
    bends = divided_by or (left in live and right in live)
    return SOURCE if bends else Passage("linear", _live_inputs(node, live))


@rule("getitem")
def takes_one_of_several(node: Node, live: Container[Node]) -> Passage:
    """One output of a split goes on to what was split, the values of a max-pool to what was pooled."""
    several = node.args[0]
    assert isinstance(several, Node)
    if operation(several) in SPLITS or (operation(several) == "aten::var_mean" and node.args[1] == 1):
        return Passage("linear", (several.args[0],))  # type: ignore[arg-type]
    if operation(several) in POOLS_WITH_PLACES and node.args[1] == 0:
        return Passage("gate", (several.args[0],))  # type: ignore[arg-type]
    return Passage("source", known=operation(several) in RULES)


POOLS_WITH_PLACES = frozenset({"aten::adaptive_max_pool2d", "aten::max_pool2d_with_indices"})
SPLITS = frozenset({"aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::tensor_split"})


@rule(*SPLITS, *POOLS_WITH_PLACES, "aten::var_mean")
def several_at_once(node: Node, live: Container[Node]) -> Passage:
    """What gives several outputs is passed by way of ``getitem``; a walk never meets it itself."""
    return SOURCE


@rule(*aten("linear addmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d baddbmm"))
def weighs(node: Node, live: Container[Node]) -> Passage:
    """Products with weights, where only the data depends on the images."""
    inputs = _live_inputs(node, live)
    return Passage("linear", inputs) if len(inputs) == 1 else SOURCE


@rule("aten::batch_norm")
def batch_norm(node: Node, live: Container[Node]) -> Passage:
    """Affine with running statistics; with those of the batch it mixes images."""
    uses_the_batch = node.args[5]
    return SOURCE if uses_the_batch else Passage("linear", (node.args[0],))  # type: ignore[arg-type]


# --- normalisers ------------------------------------------------------------------------------------------


@rule("aten::layer_norm", "aten::rms_norm", "aten::group_norm")
def norm(node: Node, live: Container[Node]) -> Passage:
    """Linear once 1/σ is frozen; subtracting the mean is linear anyway."""
    return Passage("normaliser", (node.args[0],))  # type: ignore[arg-type]


STATISTICS = frozenset(
    {"aten::rsqrt", "aten::sqrt", "aten::linalg_vector_norm", "aten::norm", "aten::var", "aten::std"}
)
KEEPS_A_STATISTIC = frozenset(
    aten(
        "expand expand_as clamp_min clamp add unsqueeze reciprocal to _to_copy view reshape flatten unflatten permute"
        " transpose alias clone"
    )
) | {"vitdecomp_lens::tag"}


def is_statistic(node: Any, kept: Any) -> bool:
    """Whether a value is a norm or a standard deviation of several entries of ``kept``, or its inverse.

    Several: a root of every single entry is a nonlinearity like any other.
    """
    node = _behind(node, KEEPS_A_STATISTIC)
    if not isinstance(node, Node) or operation(node) not in STATISTICS:
        return False
    return math.prod(sizes(node)) < math.prod(sizes(kept))


def is_gate(factor: Any, kept: Any) -> bool:
    """Whether a factor is a sigmoid of something else than what it multiplies (QuickGELU is no gate)."""
    if not isinstance(factor, Node) or operation(factor) != "aten::sigmoid":
        return False
    ahead, seen = list(factor.all_input_nodes), set()
    while ahead:
        node = ahead.pop()
        if node is kept:
            return False
        if node not in seen:
            seen.add(node)
            ahead += node.all_input_nodes
    return True


# --- products of two values that both depend on the images ---------------------------------------------------


@rule("aten::mul", "aten::div")
def scales(node: Node, live: Container[Node]) -> Passage:
    """A product with a constant, with a norm's statistic, or with a gate (broadcast, or a sigmoid); else a source."""
    left, right = node.args[:2]
    inputs = _live_inputs(node, live)
    divides = operation(node) == "aten::div"
    if len(inputs) == 1:
        linear = left is not right and (inputs[0] is left or not divides) and not node.kwargs.get("rounding_mode")
        return Passage("linear", inputs) if linear else SOURCE
    for kept, factor in ((left, right),) if divides else ((left, right), (right, left)):
        if is_statistic(factor, kept):
            return Passage("normaliser", (kept,))  # type: ignore[arg-type]
        broadcast = sizes(kept) == sizes(node) != sizes(factor)  # type: ignore[arg-type]
        if not divides and (broadcast or is_gate(factor, kept)):
            return Passage("gate", (kept,))  # type: ignore[arg-type]
    return SOURCE


@rule("aten::matmul", "aten::bmm", "aten::mm")
def multiplies_matrices(node: Node, live: Container[Node]) -> Passage:
    """A product with a constant, or an attention pattern with its values."""
    inputs = _live_inputs(node, live)
    if len(inputs) == 1 and node.args[0] is not node.args[1]:
        return Passage("linear", inputs)
    return Passage("pattern", (node.args[1],)) if is_pattern(node.args[0]) else SOURCE  # type: ignore[arg-type]


@rule("aten::einsum")
def contracts(node: Node, live: Container[Node]) -> Passage:
    """A product with constants, or an attention pattern with its values."""
    inputs, factors = _live_inputs(node, live), list(node.args[1])  # type: ignore[arg-type]
    if len(inputs) == 1 and factors.count(inputs[0]) == 1:
        return Passage("linear", inputs)
    if len(factors) == 2 and factors[0] is not factors[1] and is_pattern(factors[0]):
        return Passage("pattern", (factors[1],))
    return SOURCE


@rule("aten::scaled_dot_product_attention")
def attention(node: Node, live: Container[Node]) -> Passage:
    """Linear in the values once the pattern is frozen."""
    return Passage("pattern", (node.args[2],))  # type: ignore[arg-type]


KEEPS_A_PATTERN = KEEPS_A_STATISTIC | frozenset(aten("dropout mul sub select slice contiguous linear"))


def is_pattern(node: Any) -> bool:
    """Whether a value is a softmax, or a mixture of softmaxes: differential attention, talking heads."""
    node = _behind(node, KEEPS_A_PATTERN)
    return isinstance(node, Node) and operation(node) in SOFTMAXES


def has_learned_query(node: Node, live: Container[Node]) -> bool:
    """Whether an attention reads its tokens with a query that does not depend on the images."""
    if operation(node) == "aten::scaled_dot_product_attention":
        return node.args[0] not in live
    pattern = _behind(node.args[0], KEEPS_A_PATTERN)
    if not isinstance(pattern, Node) or operation(pattern) not in SOFTMAXES:
        return False
    scores = _behind(pattern.args[0], KEEPS_A_PATTERN | {"aten::div", "aten::masked_fill"})
    return isinstance(scores, Node) and operation(scores) in PRODUCTS and len(_live_inputs(scores, live)) == 1


SOFTMAXES = frozenset({"aten::softmax", "aten::_softmax"})
PRODUCTS = frozenset({"aten::matmul", "aten::bmm", "aten::mm"})


def _behind(node: Any, keeping: Container[str]) -> Any:
    """What a value is made of, looking through operations that keep its meaning."""
    while isinstance(node, Node) and operation(node) in keeping:
        node = node.args[0]
    return node


# --- gates and sources ---------------------------------------------------------------------------------------


@rule("aten::max_pool2d", "aten::amax")
def max_pool(node: Node, live: Container[Node]) -> Passage:
    """Picks entries; which ones is frozen."""
    return Passage("gate", (node.args[0],))  # type: ignore[arg-type]


ACTIVATIONS = frozenset(
    aten(
        "gelu silu relu relu6 leaky_relu elu celu selu mish hardswish hardsigmoid hardtanh sigmoid log_sigmoid tanh"
        " softplus"
    )
)


@rule(
    *ACTIVATIONS,
    *aten(
        "softmax _softmax log_softmax exp log erf erfc sin cos pow square sqrt rsqrt reciprocal abs clamp"
        " clamp_min clamp_max minimum maximum amin max min var std linalg_vector_norm norm prod"
        " prelu rrelu glu lstm gru topk sort argsort argmax argmin"
    ),
)
def bends(node: Node, live: Container[Node]) -> Passage:
    """Nonlinearities, and what is rarely on a path: their value is taken as given."""
    return SOURCE
