"""The cotangent of a whole representation at a node, as a short sum of pairs.

At every node between a cut and the output the adjoint of *all* of z has the form::

    G[direction, dims] = Σ_r  A[r, dims] · M[r, direction, dims]

where each dimension of the node is *owned* by A (the batch, tokens: what differs from image to image), by M
(channels: what only weights decide), or, for heads read through a pattern, by both. M does not depend on the
images and is computed once. A is computed anew for each batch by a `Tape` of a few tiny operations, fed by the
frozen statistics. A dimension that a factor does not own has size 1 in it.

``adjoints/`` says how pairs pass each operation; this file has the two data structures and the three moves
that change who owns a dimension.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.errors import CapacityError, VitDecompError
from vitdecomp_lens.frozen.compiled import Leaf

Owner = Literal["A", "M", "both"]
MOST_PAIRS = 1024
MOST_BYTES = 2 << 30


class NoFastPathError(VitDecompError):
    """An operation that pairs cannot pass; the slow replay can."""


@dataclass(frozen=True)
class Pairs:
    """Σ_r A ⊗ M at one node.

    Attributes:
        weights: Slot of A on the tape; its value is ``[r, *dims]``.
        maps: M, ``[r, direction, *dims]``.
        owners: Who owns each dimension of the node.
        batch: Which dimension of the node is the batch (windows may be folded behind it).
    """

    weights: int
    maps: Tensor
    owners: tuple[Owner, ...]
    batch: int = 0

    @property
    def rank(self) -> int:
        """How many pairs there are."""
        return self.maps.shape[0]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for pairs whose M is the same memory, read the same way: their A may be added."""
        maps = self.maps
        place = (maps.untyped_storage().data_ptr(), maps.storage_offset(), tuple(maps.shape), maps.stride())
        return (*place, self.owners, self.batch)


class Tape:
    """A little program for the weights A, recorded once and run for each batch.

    A slot is either a leaf, a function of some nodes' values, or a step, a function of earlier slots; every step is
    linear in the weights that it passes on, its first slot. While the tape is recorded every slot has an example,
    computed from arbitrary leaves: its zeros are the tokens that no path reads. (Leaves of ones would show more zeros,
    where equal weights cancel.)

    Weights that pass a single number an image, as at a pooled vector, are that number times weights that no image
    changes: its slot is their scale.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.examples: list[Tensor] = []
        self._steps: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []
        self._leaves: dict[int, Leaf] = {}
        self._leaf_slots: dict[tuple[tuple[Node, ...], str], int] = {}
        self._scales: list[int | None] = []
        self._numbers: dict[int, tuple[int, ...]] = {}  # shapes of slots with one number an image; the batch is -1
        self._generator = torch.Generator().manual_seed(0)
        self._bytes = 0

    def ones(self, *size: int) -> Tensor:
        """Ones of the dtype in which the tape computes; they share one number's memory."""
        return torch.ones((), dtype=self.dtype, device=self.device).expand(size)

    def start(self, batch: int, dims: int) -> int:
        """The first slot, at an output of ``dims`` dimensions: one an image, ``[1, batch, 1, ...]``."""
        return self._add(self.ones(1, batch, *[1] * (dims - 1)), self.ones, ())

    def leaf(self, nodes: tuple[Node, ...], what: str, read: Callable[..., Tensor], shape: Sequence[int]) -> int:
        """The slot of ``read(values of nodes)``; ``what`` tells different readings of the same nodes apart."""
        if (nodes, what) not in self._leaf_slots:
            slot = self._leaf_slots[nodes, what] = self._add(self._arbitrary(shape), read, ())
            self._leaves[slot] = Leaf(nodes, self._in_dtype(read), math.prod(shape) // self.examples[0].numel())
        return self._leaf_slots[nodes, what]

    def _in_dtype(self, read: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *values: read(*(value.to(self.dtype) for value in values))

    def _arbitrary(self, shape: Sequence[int]) -> Tensor:
        values = torch.rand(shape, generator=self._generator, dtype=self.dtype) + 0.5
        return values.to(self.device)

    def step(self, function: Callable[..., Tensor], *slots: int) -> int:
        """The slot of ``function(values of slots)``."""
        return self._add(function(*(self.examples[slot] for slot in slots)), function, slots)

    def _add(self, example: Tensor, function: Callable[..., Tensor], slots: tuple[int, ...]) -> int:
        slot = len(self._steps)
        self._bytes += _bytes_beside(example, [self.examples[s] for s in slots])
        check_bytes(self._bytes, "weights")
        self.examples.append(example)
        self._steps.append((function, slots))
        self._scales.append(self._scale_of(slot, function, slots))
        return slot

    def _scale_of(self, slot: int, function: Callable[..., Tensor], slots: tuple[int, ...]) -> int | None:
        if (slots or slot == 0) and self.examples[slot].numel() == self.examples[0].numel():
            self._numbers[slot] = tuple(1 if size == 1 else -1 for size in self.examples[slot].shape)
            return slot
        scales = {self._scales[s] for s in slots}
        return scales.pop() if len(scales) == 1 and (len(slots) == 1 or function is torch.add) else None

    def scale(self, slot: int) -> int | None:
        """The slot of the one number an image that weights are scaled by; None where more tells images apart."""
        return self._scales[slot]

    def needed(self, outputs: Sequence[int], *, given: Collection[int] = ()) -> tuple[list[int], list[Leaf]]:
        """The slots that ``outputs`` are computed from, in order, as far back as ``given``; the leaves among them."""
        slots: set[int] = set()
        ahead = list(outputs)
        while ahead:
            slot = ahead.pop()
            if slot not in slots:
                slots.add(slot)
                ahead += self._steps[slot][1] if slot not in given else ()
        return sorted(slots), [self._leaves[s] for s in sorted(slots) if s in self._leaves]

    def known(self, outputs: Sequence[int], batch: int) -> dict[int, Tensor]:
        """What ``outputs`` are, less their scales."""
        scales = {scale for slot in outputs if (scale := self._scales[slot]) is not None}
        slots, _ = self.needed(outputs, given=scales)
        return self._run(slots, {scale: self._ones_an_image(scale, batch) for scale in scales})

    def run(self, slots: Sequence[int], read: Mapping[Leaf, Tensor], batch: int) -> dict[int, Tensor]:
        """Compute the slots for a batch from what its leaves read."""
        given = {slot: read[self._leaves[slot]] for slot in slots if slot in self._leaves}
        return self._run(slots, {0: self._ones_an_image(0, batch), **given})

    def _ones_an_image(self, slot: int, batch: int) -> Tensor:
        return self.ones(*(batch if size < 0 else size for size in self._numbers[slot]))

    def _run(self, slots: Sequence[int], given: Mapping[int, Tensor]) -> dict[int, Tensor]:
        found = dict(given)
        for slot in slots:
            if slot not in found:
                function, inputs = self._steps[slot]
                found[slot] = function(*(found[i] for i in inputs))
        return found

    def forget_examples(self) -> None:
        """Drop what only recording needs."""
        self.examples.clear()


def _bytes_beside(value: Tensor, inputs: Sequence[Tensor]) -> int:
    """What a value takes of its own: nothing where it is a view of an input."""
    memory = value.untyped_storage()
    return 0 if memory.data_ptr() in {i.untyped_storage().data_ptr() for i in inputs} else memory.nbytes()


def check_bytes(size: int, what: str) -> None:
    """Refuse weights or maps that take more than `MOST_BYTES` together.

    Raises:
        CapacityError: If they do.
    """
    if size > MOST_BYTES:
        raise CapacityError(f"the structured adjoint's {what} would take {size:,} bytes, more than {MOST_BYTES:,}")


def length(pairs: Pairs, tape: Tape, dim: int) -> int:
    """Length of a dimension, whoever owns it."""
    return max(tape.examples[pairs.weights].shape[1 + dim], pairs.maps.shape[2 + dim])


def check_rank(rank: int) -> None:
    """Refuse more pairs than `MOST_PAIRS`.

    Raises:
        CapacityError: If there are more.
    """
    if rank > MOST_PAIRS:
        raise CapacityError(
            f"the structured adjoint would need {rank} pairs, more than {MOST_PAIRS}, because channels and positions"
            " are mixed too finely"
        )


def demote(pairs: Pairs, tape: Tape, dim: int) -> Pairs:
    """Give a dimension of M to A: each of its ``j`` slices of M becomes a pair of its own, r → r·j."""
    j, dims = pairs.maps.shape[2 + dim], len(pairs.owners)
    check_rank(pairs.rank * j)
    mask = torch.eye(j, dtype=tape.dtype, device=tape.device).reshape(
        [1, j] + [j if d == dim else 1 for d in range(dims)]
    )
    weights = tape.step(lambda a: (a.unsqueeze(1) * mask).flatten(0, 1), pairs.weights)
    maps = pairs.maps.movedim(2 + dim, 1).unsqueeze(3 + dim).flatten(0, 1)
    return replace(pairs, weights=weights, maps=maps, owners=_with(pairs.owners, dim, "A"))


def spread(pairs: Pairs, tape: Tape, dim: int) -> Pairs:
    """Give a dimension owned by both to M alone: r → r·j, block by block."""
    j, dims = pairs.maps.shape[2 + dim], len(pairs.owners)
    check_rank(pairs.rank * j)
    weights = tape.step(lambda a: a.movedim(1 + dim, 1).unsqueeze(2 + dim).flatten(0, 1), pairs.weights)
    mask = torch.eye(j, dtype=pairs.maps.dtype, device=pairs.maps.device)
    mask = mask.reshape([1, j, 1] + [j if d == dim else 1 for d in range(dims)])
    maps = (pairs.maps.unsqueeze(1) * mask).flatten(0, 1)
    return replace(pairs, weights=weights, maps=maps, owners=_with(pairs.owners, dim, "M"))


def settle(pairs: Pairs, tape: Tape, dims: Sequence[int], owner: Literal["A", "M"]) -> Pairs:
    """Make ``owner`` own each of ``dims``; M cannot be given what differs from image to image."""
    for dim in dims:
        has = pairs.owners[dim]
        if has == owner:
            continue
        if length(pairs, tape, dim) == 1:
            pairs = replace(pairs, owners=_with(pairs.owners, dim, owner))
        elif owner == "A":
            pairs = demote(pairs, tape, dim)
        elif has == "both":
            pairs = spread(pairs, tape, dim)
        else:
            raise NoFastPathError(f"dimension {dim} differs from image to image where weights must own it")
    return pairs


def _with(owners: tuple[Owner, ...], dim: int, owner: Owner) -> tuple[Owner, ...]:
    return (*owners[:dim], owner, *owners[dim + 1 :])


def matched_groups(inner: Sequence[int], outer: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Match the dimensions of two shapes of one tensor into the finest groups of equal length.

    >>> matched_groups((2, 4, 8, 6), (2, 32, 2, 3))
    [([0], [0]), ([1, 2], [1]), ([3], [2, 3])]
    """
    groups, i, o = [], 0, 0
    while i < len(inner) or o < len(outer):
        left, right = list(range(i, min(i + 1, len(inner)))), list(range(o, min(o + 1, len(outer))))
        i, o = i + len(left), o + len(right)
        while (a := math.prod(inner[k] for k in left)) != (b := math.prod(outer[k] for k in right)):
            if a < b:
                left.append(i)
                i += 1
            else:
                right.append(o)
                o += 1
        groups.append((left, right))
    return groups


def reshape(pairs: Pairs, tape: Tape, inner: Sequence[int], outer: Sequence[int]) -> Pairs:
    """Pass a reshape from ``inner`` (its input) to ``outer`` (its output), towards the input.

    A group of dimensions that both factors own parts of goes to A as a whole: this is where patch merging
    turns channels into pairs.
    """
    if tuple(inner) == tuple(outer):
        return pairs
    groups = matched_groups(inner, outer)
    owners: list[Owner] = ["A"] * len(inner)
    batch = 0
    for left, right in groups:
        pairs, kind = _one_owner(pairs, tape, [k for k in right if outer[k] > 1])
        for k in left:
            owners[k] = kind
        if pairs.batch in right:
            batch = _new_batch(pairs.batch, left, right, inner, outer)
    a_shape = [n if own != "M" else 1 for n, own in zip(inner, owners, strict=True)]
    a_shape[batch] = -1
    m_shape = [n if own != "A" else 1 for n, own in zip(inner, owners, strict=True)]
    weights = tape.step(lambda a: a.reshape(a.shape[0], *a_shape), pairs.weights)
    return Pairs(weights, pairs.maps.reshape(*pairs.maps.shape[:2], *m_shape), tuple(owners), batch)


def _one_owner(pairs: Pairs, tape: Tape, dims: list[int]) -> tuple[Pairs, Owner]:
    kinds = {pairs.owners[k] for k in dims}
    if len(kinds) <= 1:
        return pairs, (kinds.pop() if kinds else "A")
    owner: Literal["A", "M"] = "A" if "A" in kinds else "M"
    return settle(pairs, tape, dims, owner), owner


def _new_batch(batch: int, left: list[int], right: list[int], inner: Sequence[int], outer: Sequence[int]) -> int:
    if any(outer[k] > 1 for k in right if k < batch):
        raise NoFastPathError("a reshape folds other dimensions before the batch")
    return next(k for k in left if inner[k] > 1)
