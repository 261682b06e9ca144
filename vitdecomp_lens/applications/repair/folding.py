"""A component's constant value folded into weights, wherever a model keeps them: read off the traced graph.

Two walks from a component's hook point find what to change, whatever the family of the model:

- *forward* from the heads of ``hook_z`` and the neurons of ``hook_post``, through operations that only move entries, to
  the linear layer that reads them. Its columns for a component become zero, and what they made of the value goes into
  its bias;
- *back* from what a branch adds to the stream, through what is linear by constants (LayerScale, windows, a crop), to
  the last operation with a weight and a bias: a linear layer, a convolution, a norm. Its weight becomes zero, and its
  bias what gives the value at the hook.

Which entries of one end stand where at the other is found by running the operations in between on probes, so that
nothing here knows of heads' layouts, windows or scales.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.errors import UnknownNameError, UnsupportedModelError
from vitdecomp_lens.frozen.graph import FrozenGraph
from vitdecomp_lens.frozen.rules import argument, aten, classify, operation, sizes
from vitdecomp_lens.frozen.walk import module_path
from vitdecomp_lens.intervening.subject import Spot

# Where weight and bias are among the arguments, and along which axis of the result channels lie.
FOLDED = {
    "aten::linear": (1, 2, -1),
    "aten::conv1d": (1, 2, 1),
    "aten::conv2d": (1, 2, 1),
    "aten::layer_norm": (2, 3, -1),
    "aten::group_norm": (2, 3, 1),
    "aten::batch_norm": (1, 2, 1),
    "aten::rms_norm": (2, 3, -1),  # its schema ends with a number in the place of a bias
}
READERS = ("aten::linear", "aten::conv1d", "aten::conv2d")  # what may read heads or neurons
# Products with weights, which mix channels: what cannot be folded into is not passed either.
WEIGHING = frozenset({*FOLDED, *aten("addmm baddbmm conv3d conv_transpose1d conv_transpose2d matmul bmm mm einsum")})
VIEWS = frozenset(aten("slice select narrow t transpose permute view unsqueeze squeeze alias detach"))
SHAPES = frozenset(aten("sym_size sym_numel _assert_tensor_metadata"))  # read no value
SAME = 1e-5  # what probes differ by through rounding in single precision


@dataclass(frozen=True)
class Folding:
    """Weights of a model, copied, into which values of components are folded.

    Attributes:
        graph: The model's traced graph, with all hook points that are asked for.
        copies: A copy of each of its parameters and buffers, by the ``id`` of the live one.
        images: An example.
    """

    graph: FrozenGraph
    copies: Mapping[int, Tensor]
    images: Tensor

    def fold_entries(self, spots: Sequence[Spot], value: Float[Tensor, "..."]) -> None:
        """Fold components of one hook that is split, heads or neurons, into the layer that reads them.

        Args:
            spots: The components.
            value: What each entry of the hook's value is to be; broadcasts to it.

        Raises:
            UnknownNameError: If there is no such component.
            UnsupportedModelError: If there is no such layer, or it cannot hold the value.
        """
        point = spots[0].point
        tag = self._at(point.hook, spots)
        assert point.axis is not None
        for spot in spots:
            if spot.index is not None and spot.index >= sizes(tag)[point.axis]:
                held = [component.label for component in point.components(sizes(tag)[point.axis])]
                raise UnknownNameError(
                    f"There is no component {spot.component.label!r}: {point.hook} has {len(held)}, from {held[0]!r} to"
                    f" {held[-1]!r}."
                )
        layer = self._reader(tag, spots)
        rows = torch.tensor([spot.index for spot in spots], device=tag.meta["val"].device)
        mine = _filled(tag, 0).index_fill(point.axis, rows, 1)
        entering = [mine, value.to(mine) * mine]
        axis = FOLDED[operation(layer)][2]
        nothing, reached, given = (
            _by_channel(self._run(layer.args[0], {tag: probe}), axis)  # type: ignore[arg-type]
            for probe in (torch.zeros_like(mine), *entering)
        )
        reached, given = reached - nothing, (given - nothing)[0].double()
        if not _constant(reached):
            raise self._refused(spots, f"what it writes reaches {_named(layer)} at some tokens only")
        columns = reached[0] != 0
        weight, bias = self._weight(layer, spots), self._bias(layer, spots)
        kernel = weight.flatten(2).squeeze(2) if weight.dim() > 2 else weight
        live = kernel[:, columns].double() @ given[columns]
        kernel[:, columns] = 0
        if bias is not None:
            bias += live.to(bias)
        elif bool(live.any()):
            raise self._refused(spots, f"{_named(layer)} has no bias to hold its mean; how='zero' needs none")

    def fold_branch(self, spot: Spot, value: Float[Tensor, "..."]) -> None:
        """Fold a whole branch, all that is added to the stream at a hook.

        Args:
            spot: The component.
            value: What is to be there; broadcasts to the hook's value.

        Raises:
            UnsupportedModelError: If something stands between the branch and its last weights that is not linear by
                constants, or nothing there has a bias.
        """
        tag = self._at(spot.point.hook, [spot])
        ends = self._ends(tag, spot)
        weights = [(self._weight(end, [spot]), self._bias(end, [spot])) for end in ends]
        for weight, bias in weights:
            weight.zero_()
            if bias is not None:
                bias.zero_()
        silent = {end: _filled(end, 0) for end in ends}
        shift = _by_channel(self._run(tag, silent), -1)
        wanted = value.to(shift).double().expand(sizes(tag)).flatten(0, -2) - shift.double()
        if not _constant(wanted):
            raise self._refused([spot], "a constant that differs by token is added to it behind its last weights")
        left, reasons = wanted[0], []
        for end, (_, bias) in zip(ends, weights, strict=True):
            if bias is None:
                reasons.append(f"{_named(end)} has no bias to hold its mean; how='zero' needs none")
            elif (placed := self._placed(tag, end, silent, shift)) is None:
                reasons.append(f"channels of {_named(end)} are not those of the hook, times a constant each")
            else:
                channels, scale = placed
                reached = scale != 0
                bias[channels] = (left[reached] / scale[reached]).to(bias)
                left = left.masked_fill(reached, 0)
        if left.any():
            reasons.append("some of its channels are scaled by zero, and the mean is not zero there")
            raise self._refused([spot], reasons[0])

    def _placed(
        self, tag: Node, end: Node, silent: Mapping[Node, Tensor], shift: Tensor
    ) -> tuple[Int[Tensor, "reached"], Float[Tensor, "channel"]] | None:
        """How channels of an operation become those of a hook's value: one for one, times a constant each.

        Returns:
            For the channels of the hook that it reaches, which channel of the operation each is; and by what each
            channel of the hook is scaled, zero where it is not reached. None where channels are mixed.
        """
        axis = FOLDED[operation(end)][2]
        shape = [1] * len(sizes(end))
        shape[axis] = sizes(end)[axis]
        marks = torch.linspace(1, 2, shape[axis], dtype=torch.float64, device=shift.device).to(shift.dtype).double()
        one, marked, squared = (
            (
                _by_channel(self._run(tag, {**silent, end: _filled(end, 1) * by.to(shift).view(shape)}), -1) - shift
            ).double()
            for by in (torch.ones_like(marks), marks, marks.square())
        )
        if not (_constant(one) and _constant(marked)):
            return None
        scale, reached = one[0], one[0] != 0
        channels = (marked[0, reached, None] / scale[reached, None] - marks).abs().argmin(1)
        found = [scale[reached] * by[channels] for by in (marks, marks.square())]
        alike = all(_close(was[0, reached], mine) for was, mine in zip((marked, squared), found, strict=True))
        return (channels, scale) if alike and len(channels.unique()) == len(channels) else None

    # ---- walks

    def _at(self, hook: str, spots: Sequence[Spot]) -> Node:
        if hook not in self.graph.points:
            raise self._refused(spots, f"the traced run does not pass the hook {hook!r}")
        return self.graph.points[hook]

    def _reader(self, tag: Node, spots: Sequence[Spot]) -> Node:
        """The layer that reads a hook's value."""
        ends: dict[Node, None] = {}
        ahead = [tag]
        while ahead:
            node = ahead.pop()
            for user in node.users:
                if operation(user) in SHAPES:
                    continue
                if operation(user) in READERS and user.args[0] is node:
                    ends[user] = None
                elif self._moves(user):
                    ahead.append(user)
                else:
                    raise self._refused(spots, f"{_named(user)} stands between it and an output projection")
        if len(ends) != 1:
            raise self._refused(spots, f"{len(ends)} layers read it, and one is needed")
        (layer,) = ends
        kernel = sizes(layer.args[1])[2:]  # type: ignore[arg-type]
        if any(size != 1 for size in kernel) or argument(layer, 6, "groups", 1) != 1:
            raise self._refused(spots, f"{_named(layer)} reads several places, or some of its channels only")
        return layer

    def _moves(self, node: Node) -> bool:
        live = [n for n in node.all_input_nodes if n in self.graph.from_images]
        joins = len(live) > 1 and operation(node) not in ("aten::cat", "aten::concat")
        return self._is_linear(node) and not joins

    def _is_linear(self, node: Node) -> bool:
        return operation(node) not in WEIGHING and classify(node, self.graph.from_images).kind == "linear"

    def _ends(self, tag: Node, spot: Spot) -> tuple[Node, ...]:
        """The last operations with weights before a hook, on all paths."""
        ends: dict[Node, None] = {}
        passed: dict[Node, None] = {}
        ahead = [tag]
        while ahead:
            node = ahead.pop()
            if node in passed or node in ends or node not in self.graph.from_images:
                continue
            if operation(node) in FOLDED:
                ends[node] = None
            elif self._is_linear(node):
                passed[node] = None
                ahead += classify(node, self.graph.from_images).through
                if operation(node) == "getitem":
                    passed[node.args[0]] = None  # type: ignore[index]
            else:
                raise self._refused([spot], f"{_named(node)} stands between it and its last weights")
        for node in (*passed, *ends):
            others = [n for n in node.users if n not in passed and operation(n) not in SHAPES]
            if node is not tag and others:
                raise self._refused([spot], f"what {_named(node)} gives is read by {_named(others[0])} too")
        return tuple(ends)

    # ---- values and weights

    def _run(self, node: Node, given: Mapping[Node, Tensor]) -> Tensor:
        examples = self.images[:1].expand(sizes(self.graph.images))
        value: Tensor = self.graph.evaluate([node], {self.graph.images: examples, **given})[node]
        return value

    def _weight(self, layer: Node, spots: Sequence[Spot]) -> Tensor:
        weight = self._copy(argument(layer, FOLDED[operation(layer)][0], "weight"), layer, spots)
        if weight is None:
            raise self._refused(spots, f"{_named(layer)} has no weight to set to zero")
        return weight

    def _bias(self, layer: Node, spots: Sequence[Spot]) -> Tensor | None:
        found = argument(layer, FOLDED[operation(layer)][1], "bias")
        return self._copy(found, layer, spots) if isinstance(found, Node) else None

    def _copy(self, node: Node | None, layer: Node, spots: Sequence[Spot]) -> Tensor | None:
        """The copy of a parameter, or a view of a part of it, as a layer reads it."""
        if node is None:
            return None
        root = node
        while operation(root) in VIEWS and isinstance(root.args[0], Node):
            root = root.args[0]
        live = self.graph.weight(root) if root.name in self.graph.parameters else None
        if live is None or id(live) not in self.copies:
            raise self._refused(
                spots, f"weights of {_named(layer)} are computed, and stand in no state dict as they are"
            )
        if root is node and self._uses(live) > 1:
            raise self._refused(spots, f"other parts of the model share the weights of {_named(layer)}")
        copy: Tensor = self.graph.evaluate([node], {root: self.copies[id(live)]})[node]
        return copy

    def _uses(self, live: Tensor) -> int:
        """How many operations read a parameter, under any of its names."""
        graph = self.graph
        own = [n for n in graph.nodes if n.name in graph.parameters and graph.weight(n) is live]
        return sum(operation(user) not in SHAPES for node in own for user in node.users)

    def _refused(self, spots: Sequence[Spot], why: str) -> UnsupportedModelError:
        labels = ", ".join(repr(spot.component.label) for spot in spots[:3])
        return UnsupportedModelError(
            f"The component {labels} cannot be folded into the weights of {type(self.graph.module).__name__}: {why}."
            " Ablate it in runs instead: vitdecomp_lens.intervene.ablating."
        )


# --- pieces -----------------------------------------------------------------------------------------------------------


def _named(node: Node) -> str:
    return f"{operation(node).removeprefix('aten::')} in {module_path(node) or 'the model'}"


def _filled(node: Node, value: float | int) -> Tensor:
    """A value for an operation, everywhere the same."""
    val = node.meta["val"]
    return torch.full(sizes(node), value, dtype=val.dtype, device=val.device)


def _by_channel(value: Shaped[Tensor, "..."], axis: int) -> Shaped[Tensor, "place channel"]:
    return value.movedim(axis, -1).flatten(0, -2)


def _constant(rows: Shaped[Tensor, "place channel"]) -> bool:
    return _close(rows, rows[:1].expand_as(rows))


def _close(one: Tensor, other: Tensor) -> bool:
    return not one.numel() or bool((one - other).abs().max() <= SAME * other.abs().max())
