"""A compiled cut without pairs: replay the frozen graph, once for each component or once for each direction.

Not for use where the structured adjoint works: it costs a replay a component or, where directions are fewer, a
derivative a direction. It is exact all the same, because the replay is affine in the values at the points: what one
component writes is the replay with it alone, without constants; and activation × gradient is its score, whatever
the values at which the gradient is taken. `FrozenGraph.program` takes this way, with a warning, where pairs cannot
pass an operation or would become too many.
"""

import math
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.compiled import CompiledCut, Leaf, OwnDirections
from vitdecomp_lens.frozen.replay import needs_the_recorded_input, replayed
from vitdecomp_lens.frozen.rules import SPLITS, operation, sizes
from vitdecomp_lens.frozen.walk import Cut


@dataclass(frozen=True)
class Replayed:
    """The output of a replay from zeros at all points, and these zeros, to be differentiated by.

    Attributes:
        output: What the constants alone write.
        moving: The value of every operation on the path, likewise.
        recorded: What the path is frozen at.
        zeros: By point.
        differentiable: Whether contributions are to be differentiated once more, by the images.
        arriving: Where the replay starts from zeros again: what arrives there.
    """

    output: Float[Tensor, "batch *ones d_rep"]
    moving: Mapping[Node, Tensor]
    recorded: Mapping[Node, Any]
    zeros: Mapping[str, Tensor]
    differentiable: bool
    arriving: Mapping[Node, Tensor] = field(default_factory=dict)


class _Zeros(dict[Node, Tensor]):
    """Zeros as large as some values, made as they are asked for."""

    def __init__(self, like: Mapping[Node, Tensor]) -> None:
        super().__init__()
        self._like = like

    def __missing__(self, node: Node) -> Tensor:
        return torch.zeros_like(self._like[node])


class ReplayedCut(CompiledCut):
    """A cut whose contributions are computed by replay, and by its derivatives."""

    def __init__(
        self,
        cut: Cut,
        *,
        splits: Mapping[str, int | None],
        through: Mapping[str, Node],
        directions: Float[Tensor, "direction d_rep"],
        live: frozenset[Node],
    ) -> None:
        self._cut, self._splits, self._live, self._along = cut, splits, live, directions
        self._reads: dict[str, Node] = {**cut.points, **through}
        self.points = tuple(name for name in splits if name in self._reads)
        frozen = dict.fromkeys(n for node in cut.through for n in _frozen_inputs(node, cut))
        self._starts: Collection[Node] = ()
        self.leaves: tuple[Leaf, ...] = tuple(
            Leaf((node,), _as_it_is, _size(node) // _traced_batch(cut)) for node in frozen
        )
        self.constants: tuple[str, ...] = ("constants",)
        self.directions = len(directions)
        self.dtype, self.device = directions.dtype, directions.device

    def along(self, own: OwnDirections, *, named: CompiledCut | None = None) -> "ReplayedAlong":
        """The same cut, with whole vectors as far as the components and their own directions behind them.

        Args:
            own: The directions.
            named: A cut at the components themselves, read along the same: its constants are taken in place of those
                that are met before any component, since it tells them apart.
        """
        through = {name: node for name, node in self._reads.items() if name not in self._cut.points}
        return ReplayedAlong(
            self._cut,
            splits=self._splits,
            through=through,
            directions=self._along,
            live=self._live,
            own=own,
            named=named,
        )

    def kept_rows(self, point: str) -> None:
        """All of a value is kept."""
        return None

    def weights(self, read: Mapping[Leaf, Any], batch: int) -> Any:
        """Replay from zeros."""
        differentiable = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            recorded = {
                node: self._frozen(value, differentiable and node in self._live)
                for (node,), value in ((leaf.nodes, value) for leaf, value in read.items())
            }
            zeros = {name: self._zeros(node, batch) for name, node in self._reads.items()}
            names = {node: name for name, node in self._reads.items()}
            moving: dict[Node, Tensor] = {node: zeros[name] for name, node in self._cut.points.items()}
            arriving: dict[Node, Tensor] = {}
            for node in reversed(self._cut.order):
                if node not in moving:
                    value = replayed(node, self._cut.through[node], moving, recorded)
                    moving[node] = value + zeros[names[node]] if node in names else value
                    if node in self._starts:
                        arriving[node], moving[node] = moving[node], torch.zeros_like(value).requires_grad_()
        return Replayed(moving[self._cut.root], moving, recorded, zeros, differentiable, arriving)

    def _frozen(self, value: Tensor | int, differentiable: bool) -> Tensor | int:
        if not isinstance(value, Tensor):
            return value
        value = value if differentiable else value.detach()
        value = value.clone() if value.is_inference() else value  # what inference mode made cannot be recorded
        return value.to(self.dtype) if value.is_floating_point() else value

    def _zeros(self, node: Node, batch: int) -> Tensor:
        shape = [
            size if isinstance(size, int) else int(size) // _traced_batch(self._cut) * batch for size in _shape(node)
        ]
        return torch.zeros(shape, dtype=self.dtype, device=self.device, requires_grad=True)

    def contributions(
        self,
        kept: Mapping[str, Tensor],
        weights: Replayed,
        batch: int,
        *,
        only: Iterable[str] | None = None,
        summed: Collection[str] = (),
    ) -> dict[str, Float[Tensor, "split batch direction"]]:
        """What a replay of each component alone gives; or activation × gradient, where directions are fewer."""
        points = list(self.points if only is None else only)
        if sum(self._parts(point) for point in points) < self.directions:
            return dict(zip(points, self._pushed(points, kept, weights), strict=True))
        return self._pulled(points, kept, weights, batch)

    def _pulled(
        self, points: list[str], kept: Mapping[str, Tensor], weights: Any, batch: int
    ) -> dict[str, Float[Tensor, "split batch direction"]]:
        """Activation × gradient."""
        columns: dict[str, list[Tensor]] = {point: [] for point in points}
        for gradients in self._gradients(weights, points):
            for point, gradient in zip(points, gradients, strict=True):
                written = self._laid_out(point, gradient * kept[point].to(self.dtype), batch)
                columns[point].append(written.flatten(2).sum(-1))
        return {point: torch.stack(several, -1) for point, several in columns.items()}

    def _parts(self, point: str) -> int:
        _, split = self._axes(point)
        return 1 if split is None else int(_shape(self._reads[point])[split])

    def _pushed(
        self, points: list[str], kept: Mapping[str, Tensor], weights: Replayed
    ) -> list[Float[Tensor, "split batch direction"]]:
        """What each part of each point writes alone."""
        with torch.inference_mode(False), torch.set_grad_enabled(weights.differentiable):
            still = self._still(weights)
            written = []
            for point in points:
                parts = self._apart(point, kept[point].to(self.dtype))
                moved = [self._moved(self._reads[point], part, weights, still) for part in parts]
                written.append(torch.stack([m.flatten(1) @ self._along.T for m in moved]))
        return written

    def _still(self, weights: Replayed) -> dict[Node, Tensor]:
        """What each operation makes of zeros: its constants alone. None for those that have none."""
        still = {}
        for node in self._cut.order:
            if inputs := self._cut.through.get(node, ()):
                value = replayed(node, inputs, _Zeros(weights.moving), weights.recorded)
                if bool(value.any()):
                    still[node] = value
        return still

    def _moved(
        self, start: Node, value: Tensor, weights: Replayed, still: Mapping[Node, Tensor]
    ) -> Float[Tensor, "batch *ones d_rep"]:
        """By how much the output moves if the value at a point does: only what is downstream is replayed.

        Constants are taken off at each operation. Taken off at the end, all of them would be rounded with it.
        """
        moved = {start: value}
        known: Mapping[Node, Tensor] = ChainMap(moved, _Zeros(weights.moving))
        for node in reversed(self._cut.order):
            inputs = self._cut.through.get(node, ())
            if node not in moved and any(n in moved for n in inputs):
                moves = replayed(node, inputs, known, weights.recorded)
                moved[node] = moves - still[node] if node in still else moves
        root = self._cut.root
        return moved[root] if root in moved else torch.zeros_like(weights.output)

    def _apart(self, point: str, value: Tensor) -> Iterator[Tensor]:
        """A point's value with all parts but one at zero, for each part."""
        value = value.clone() if value.is_inference() else value
        _, split = self._axes(point)
        if split is None:
            yield value
            return
        for part in range(self._parts(point)):
            place = torch.tensor([part], device=value.device)
            yield torch.zeros_like(value).index_copy(split, place, value.narrow(split, part, 1))

    def _gradients(self, weights: Any, points: list[str]) -> Iterator[tuple[Tensor, ...]]:
        """For each direction, the gradients by the values at ``points``."""
        inputs = [weights.zeros[point] for point in points]
        output, further = weights.output, weights.differentiable
        return (_gradient(output, inputs, u.expand_as(output), further) for u in self._along if inputs)

    def _laid_out(self, point: str, value: Tensor, batch: int) -> Float[Tensor, "split batch folded *rest"]:
        dim, split = self._axes(point)
        value = value.movedim(dim, 0).unsqueeze(0) if split is None else value.movedim((split, dim), (0, 1))
        return value.unflatten(1, (batch, -1))

    def _axes(self, point: str) -> tuple[int, int | None]:
        """The batch and the split axis of a point's value."""
        node, split = self._reads[point], self._splits[point]
        return _batch_axis(node), None if split is None else split % len(_shape(node))

    def shifted(self, weights: Replayed, batch: int) -> Float[Tensor, "constant batch direction"]:
        """What the replay from zeros gave: all constants together."""
        output = weights.output if weights.differentiable else weights.output.detach()
        return (output.flatten(1) @ self._along.T).unsqueeze(0)

    def by_token(
        self,
        point: str,
        kept: Tensor,
        weights: Any,
        out: Float[Tensor, "split batch token direction"],
        *,
        token_axis: int = 1,
    ) -> None:
        """Activation × gradient, summed over channels only."""
        dim, split = self._axes(point)
        rest = [d for d in range(kept.dim()) if d not in (dim, split)]
        first = rest.index(token_axis) if token_axis in rest else 0
        for number, (gradient,) in enumerate(self._gradients(weights, [point])):
            written = self._laid_out(point, gradient * kept.to(self.dtype), out.shape[1])
            last = next(n for n in range(2, written.dim()) if _tokens(written, first, n) == out.shape[2])
            written = written.movedim(tuple(range(3 + first, last + 1 + first)), tuple(range(3, last + 1)))
            # A component that is one channel has no axis of channels left.
            out[..., number] = written.flatten(2, last).unsqueeze(-1).flatten(3).sum(-1)


@dataclass(frozen=True)
class Pulled:
    """What directions of components' own read of the frozen map at one batch.

    Attributes:
        gradients: At each value that is read, the derivatives of what is read, ``[direction, *dims]``.
        constants: What each constant writes along each direction.
    """

    gradients: Mapping[Node, Tensor]
    constants: Float[Tensor, "constant batch direction"]


class ReplayedAlong(ReplayedCut):
    """A cut that is read along directions of each component's own, by derivatives of replays.

    The replay starts from zeros again at the components. The derivatives by these zeros, one for each dimension of the
    output, are read along each component's directions; what that gives goes on to the points of the cut.
    """

    def __init__(
        self,
        cut: Cut,
        *,
        splits: Mapping[str, int | None],
        through: Mapping[str, Node],
        directions: Float[Tensor, "direction d_rep"],
        live: frozenset[Node],
        own: OwnDirections,
        named: CompiledCut | None,
    ) -> None:
        super().__init__(cut, splits=splits, through=through, directions=directions, live=live)
        self._own, self._named, self._mine = own, named, self.leaves
        self.directions = len(own)
        self._starts = own.points.keys()
        outside = self.constants if named is None else named.constants
        if named is not None:
            self.leaves = (*self.leaves, *named.leaves)
            self.constants = (*named.constants, *self.constants)
        met = _before(self._starts, cut)
        self.outside = frozenset([*outside, *(name for name, node in self._reads.items() if node in met)])

    def weights(self, read: Mapping[Leaf, Any], batch: int) -> Any:
        """Replay from zeros, and pull the directions back."""
        at = super().weights({leaf: read[leaf] for leaf in self._mine}, batch)
        with torch.inference_mode(False), torch.set_grad_enabled(at.differentiable):
            gradients = self._pull(at)
            inside = torch.zeros(1, batch, self.directions, dtype=self.dtype, device=self.device)
            for node, value in at.arriving.items():
                written = (value * gradients[node]).movedim(1 + _batch_axis(node), 1)
                inside = inside + written.flatten(2).unflatten(1, (batch, -1)).sum((2, 3)).T
            if self._named is None:
                (lumped,) = self.constants
                constants = inside + at.output.flatten(1) @ self._own.of(lumped)[0].T
            else:
                others = self._named.shifted(self._named.weights(read, batch), batch)
                constants = torch.cat([others, inside])
        return Pulled(gradients, constants)

    def _pull(self, at: Replayed) -> dict[Node, Tensor]:
        """At the components and at whatever else is read, the derivative of what is read along each direction."""
        own, shared = self._own.points, {node: name for name, node in self._reads.items() if node not in self._starts}
        components = [node for node in self._cut.order if node in own]
        inputs = {node: at.moving[node] for node in components} | {n: at.zeros[name] for n, name in shared.items()}
        found = {node: value.new_zeros(self.directions, *value.shape) for node, value in inputs.items()}
        along = {n: self._own.at(n) if n in own else self._own.of(shared[n]) for n in inputs}
        for number, unit in enumerate(self._along):
            slopes = _gradient(at.output, [*inputs.values()], unit.expand_as(at.output), at.differentiable)
            for node, slope in zip(inputs, slopes, strict=True):
                axis = own[node][0] if node in own else None
                found[node] += _laid_along(along[node][:, :, number], axis, slope.dim()) * slope
        behind = dict(inputs)
        for node in components:  # the nearest to the output first
            del behind[node]
            if node in at.arriving and at.arriving[node].requires_grad and behind:
                for number, along_it in enumerate(found[node].unbind()):
                    slopes = _gradient(at.arriving[node], [*behind.values()], along_it, at.differentiable)
                    for other, slope in zip(behind, slopes, strict=True):
                        found[other][number] += slope
        return found

    def contributions(
        self,
        kept: Mapping[str, Tensor],
        weights: Any,
        batch: int,
        *,
        only: Iterable[str] | None = None,
        summed: Collection[str] = (),
    ) -> dict[str, Float[Tensor, "split batch direction"]]:
        """Activation × gradient."""
        return self._pulled(list(self.points if only is None else only), kept, weights, batch)

    def _gradients(self, weights: Any, points: list[str]) -> Iterator[tuple[Tensor, ...]]:
        found = [weights.gradients[self._reads[point]] for point in points]
        return (tuple(of_one[number] for of_one in found) for number in range(self.directions))

    def shifted(self, weights: Any, batch: int) -> Float[Tensor, "constant batch direction"]:
        """What constants write; those within components are one."""
        constants: Tensor = weights.constants
        return constants


def _laid_along(
    weights: Float[Tensor, "part direction"], axis: int | None, dims: int
) -> Float[Tensor, "direction *dims"]:
    """Factors by direction and part, laid along the axis that tells parts apart."""
    shape = [1] * dims
    if axis is not None and len(weights) > 1:
        shape[axis] = len(weights)
    return weights.T.reshape(-1, *shape)


def _before(starts: Collection[Node], cut: Cut) -> set[Node]:
    """What a walk from the output meets before any of some nodes."""
    met, ahead = set[Node](), [cut.root]
    while ahead:
        node = ahead.pop()
        if node not in met and node not in starts:
            met.add(node)
            ahead += cut.through.get(node, ())
    return met


def _gradient(output: Tensor, inputs: Sequence[Tensor], direction: Tensor, differentiable: bool) -> tuple[Tensor, ...]:
    with torch.inference_mode(False), torch.enable_grad():
        return torch.autograd.grad(
            output,
            inputs,
            direction.clone(),
            retain_graph=True,
            create_graph=differentiable,
            allow_unused=True,
            materialize_grads=True,
        )


def _tokens(written: Tensor, first: int, last: int) -> int:
    """How many tokens there are if they take the axes from 3 + ``first`` on, up to ``last`` of them folded or not."""
    return math.prod((written.shape[2], *written.shape[3 + first : last + 1 + first]))


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape  # the batch, and what is folded into it, is symbolic


def _batch_axis(node: Node) -> int:
    return next(dim for dim, size in enumerate(_shape(node)) if not isinstance(size, int))


def _as_it_is(value: Tensor | int) -> Tensor | int:
    return value


def _size(node: Node) -> int:
    value = node.meta["val"]
    return math.prod(sizes(node)) if isinstance(value, Tensor) else 0


def _traced_batch(cut: Cut) -> int:
    return int(_shape(cut.root)[0])


def _frozen_inputs(node: Node, cut: Cut) -> list[Node]:
    """The nodes whose recorded values the replay of ``node`` reads."""
    several = node.args[0] if operation(node) == "getitem" else node
    assert isinstance(several, Node)
    through = cut.through[node]
    frozen = [n for n in several.all_input_nodes if n not in through]
    if operation(several) not in SPLITS and needs_the_recorded_input(node):
        frozen.append(through[0])
    return frozen
