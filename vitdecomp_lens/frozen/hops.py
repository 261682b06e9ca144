"""What goes through the values of an attention on its way to the output: the second order.

A cut that stops at each component has direct effects. This walk goes on through attentions, whose patterns are frozen:
in hop 0 from the output to the values of an attention, in hop 1 from these values to the components. Hop 1 is told
apart by the head whose values it went through, and attentions end it: exactly one head is passed.

What a head writes lies in few dimensions. Where these are fewer than directions, hop 1 is read along them, and what is
read is taken to the directions at the end: a ViT-B's maps are a twelfth as large.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints import Adjoint, pass_back
from vitdecomp_lens.frozen.compiled import Leaf, Reads
from vitdecomp_lens.frozen.pairs import Owner, Pairs, Tape, check_bytes, check_rank
from vitdecomp_lens.frozen.program import LaidOut, Program, Shifted, Term, merge, shifted_by, size_of, start, term_of
from vitdecomp_lens.frozen.rules import sizes
from vitdecomp_lens.frozen.walk import Cut


@dataclass(frozen=True)
class Carrier:
    """A head's values, which are passed through.

    Attributes:
        hook: The point of the values.
        axis: The axis of heads there.
        part: Which head.
    """

    hook: str
    axis: int
    part: int


class Hops(Reads):
    """What is written through carriers. Made by `compile_hops`.

    Attributes:
        through: For each carrier that is met, what is read through it.
        bases: For each carrier from the dimensions along which it is read to the directions; None where these are read.
        carried: What the carriers' values themselves write, by head.
    """

    def __init__(
        self,
        through: Mapping[Carrier, Program],
        bases: Mapping[Carrier, Float[Tensor, "direction dimension"] | None],
        carried: Program,
        tape: Tape,
    ) -> None:
        self.through, self.bases, self.carried, self._tape = through, bases, carried, tape
        self.dtype, self.device = tape.dtype, tape.device
        slots = [slot for program in (*through.values(), carried) for slot in program.slots]
        self._slots, self.leaves = tape.needed(slots)

    def kept_rows(self, point: str) -> None:
        """All of a value is read: patterns read all tokens."""

    def weights(self, read: Mapping[Leaf, Any], batch: int) -> dict[int, Tensor]:
        """The weights A of everything, for one batch: what the programs' methods take."""
        return self._tape.run(self._slots, read, batch)

    def totals(
        self, kept: Mapping[str, Tensor], weights: Mapping[int, Tensor], batch: int
    ) -> dict[Carrier, Float[Tensor, "batch direction"]]:
        """What each carrier's values write to the output."""
        written = self.carried.contributions(kept, weights, batch)
        return {carrier: written[carrier.hook][carrier.part] for carrier in self.through}

    def written(
        self,
        carrier: Carrier,
        kept: Mapping[str, Tensor],
        weights: Mapping[int, Tensor],
        batch: int,
        only: Sequence[str],
    ) -> dict[str, Float[Tensor, "split batch direction"]]:
        """What some points, and the constants, write through a carrier."""
        program, basis = self.through[carrier], self.bases[carrier]
        found = program.contributions(kept, weights, batch, only=[name for name in only if name in program.terms])
        shifts = program.shifted(weights, batch).unsqueeze(1)
        found |= dict(zip(program.constants, shifts, strict=True))
        return found if basis is None else {name: value @ basis.T for name, value in found.items()}


def compile_hops(
    cut: Cut,
    carriers: Sequence[Carrier],
    *,
    components: Mapping[str, Node],
    splits: Mapping[str, int | None],
    values: Mapping[str, Node],
    changed: Mapping[str, Node],
    directions: Float[Tensor, "direction d_rep"],
    live: frozenset[Node],
    value_of: Callable[[Node], Tensor],
    name_of: Callable[[Node], str],
) -> Hops:
    """Compile what goes through carriers.

    Args:
        cut: A complete cut that goes on through the carriers' attentions.
        carriers: What hop 1 is told apart by.
        components: The points that are read in hop 1, and end it.
        splits: The axis along which components lie at a point, or None.
        values: The points of the carriers.
        changed: Points that are read in hop 1 and passed: what hooks added there.
        directions: What is read at the output; the identity for vectors.
        live: Nodes that depend on the images.
        value_of: The value of a node that does not.
        name_of: A name for such a value, as a constant.

    Raises:
        NoFastPathError: If pairs cannot pass an operation.
        CapacityError: If there would be too many pairs.
    """
    tape = Tape(directions.dtype, directions.device)
    on = Adjoint(tape, live, value_of, name_of)
    names = {node: name for name, node in {**components, **changed}.items()}
    hooks, ends = {node: hook for hook, node in values.items()}, set(components.values())
    at: dict[Node, _Here] = {cut.root: {None: [start(cut.root, tape, directions)]}}
    terms: dict[Carrier, dict[str, list[Term]]] = {carrier: {} for carrier in carriers}
    shifts: dict[Carrier, list[Shifted]] = {carrier: [] for carrier in carriers}
    carried: dict[str, list[Term]] = {}
    bases: dict[Carrier, Tensor | None] = {}
    laid_out: LaidOut = {}
    for node in cut.order:
        here = {carrier: _read_somewhere(pairs, tape) for carrier, pairs in at.pop(node, {}).items()}
        here = {carrier: pairs for carrier, pairs in here.items() if pairs}
        if node in names:
            name = names[node]
            for carrier, pairs in here.items():
                if carrier is not None:
                    terms[carrier][name] = [term_of(node, one, splits.get(name), tape, laid_out) for one in pairs]
        if node in ends:
            here = {carrier: pairs for carrier, pairs in here.items() if carrier is None}
        if node in hooks and None in here:
            mine = [carrier for carrier in carriers if carrier.hook == hooks[node]]
            whole = here.pop(None)
            if mine:
                carried[hooks[node]] = [term_of(node, one, mine[0].axis, tape, laid_out) for one in whole]
            for carrier in mine:
                here[carrier], bases[carrier] = _of_head(whole, carrier, sizes(node))
        if node not in cut.through:
            continue
        check_rank(max((sum(one.rank for one in pairs) for pairs in here.values()), default=0))
        check_bytes(size_of([one.maps for pairs in here.values() for one in pairs], laid_out), "maps")
        for carrier, pairs in here.items():
            for one in pairs:
                _pass(node, one, carrier, at, on)
            if carrier is not None:
                shifts[carrier] += [shifted_by(shift.name, shift.pairs, shift.value, tape) for shift in on.shifts]
            on.shifts.clear()
    met = [carrier for carrier in carriers if carrier.hook in carried]
    parts = {name: _split(node, splits.get(name)) for name, node in {**components, **changed}.items()}
    parts |= {carrier.hook: _split(values[carrier.hook], carrier.axis) for carrier in met}

    def program(terms: dict[str, list[Term]], shifts: list[Shifted], basis: Tensor | None) -> Program:
        count = len(directions) if basis is None else basis.shape[1]
        return Program(terms, parts, shifts, tape, count, frozenset(), _not_again)

    through = {carrier: program(terms[carrier], shifts[carrier], bases[carrier]) for carrier in met}
    return Hops(through, bases, program(carried, [], None), tape)


_Here = dict[Carrier | None, list[Pairs]]  # what arrives at a node: in hop 0, and through each carrier


def _not_again(**_: Any) -> Program:
    raise NotImplementedError("what goes through values is read along directions that all components share")


def _split(node: Node, axis: int | None) -> tuple[int | None, int]:
    return (None, 1) if axis is None else (axis % len(sizes(node)), sizes(node)[axis])


def _pass(node: Node, pairs: Pairs, carrier: Carrier | None, at: dict[Node, _Here], on: Adjoint) -> None:
    for source, passed in pass_back(node, pairs, on):
        if source in on.live:
            merge(at.setdefault(source, {}).setdefault(carrier, []), _without_zeros(passed, on.tape), on.tape)
        else:  # a constant that a hook may change
            on.constant(on.name_of(source), source, passed, on.value(source))


def _read_somewhere(pairs: list[Pairs], tape: Tape) -> list[Pairs]:
    return [one for one in pairs if bool(tape.examples[one.weights].any()) and bool(one.maps.any())]


def _of_head(
    whole: Sequence[Pairs], carrier: Carrier, shape: tuple[int, ...]
) -> tuple[list[Pairs], Float[Tensor, "direction dimension"] | None]:
    """Pairs at values that read one head only; and what takes them to the directions, if they read its dimensions."""
    axis = 2 + carrier.axis % len(shape)
    mine = [one.maps.narrow(axis, carrier.part if one.maps.shape[axis] > 1 else 0, 1) for one in whole]
    widths = [len(maps) * maps[0, 0].numel() for maps in mine]
    basis = None
    if sum(widths) < mine[0].shape[1]:
        basis = torch.cat([maps.flatten(2).movedim(1, 0).flatten(1) for maps in mine], 1)
        blocks = torch.eye(sum(widths), dtype=basis.dtype, device=basis.device).split(widths, 1)
        mine = [
            block.unflatten(1, (len(maps), -1)).movedim(1, 0).unflatten(2, maps.shape[2:])
            for block, maps in zip(blocks, mine, strict=True)
        ]
    return [_put_back(one, maps, carrier, axis, shape) for one, maps in zip(whole, mine, strict=True)], basis


def _put_back(one: Pairs, maps: Tensor, carrier: Carrier, axis: int, shape: tuple[int, ...]) -> Pairs:
    """The pairs with these maps for the head, and zero for the others."""
    heads = shape[axis - 2]
    full = maps.new_zeros([heads if d == axis else n for d, n in enumerate(maps.shape)])
    full.narrow(axis, carrier.part, 1).copy_(maps)
    owners: list[Owner] = list(one.owners)
    owners[axis - 2] = "both" if owners[axis - 2] == "A" else owners[axis - 2]
    return replace(one, maps=full, owners=tuple(owners))


def _without_zeros(pairs: Pairs, tape: Tape) -> Pairs:
    """Less the pairs whose M is zero: those of the other heads, once heads are told apart by pairs."""
    if pairs.rank == 1:
        return pairs
    kept = pairs.maps.flatten(1).any(1)
    if bool(kept.all()) or not bool(kept.any()):
        return pairs
    return replace(pairs, weights=tape.step(lambda a: a[kept], pairs.weights), maps=pairs.maps[kept])
