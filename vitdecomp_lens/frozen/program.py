"""A compiled cut: from the values at its points to their contributions, by the structured adjoint.

Compiling walks the cut once with pairs and keeps, for each point, its maps M laid out for one matrix product,
and the slot of its weights A. A call then runs the tape and does, for each point, ``bmm(A, X)`` over tokens
followed by one product with M. With the identity as directions the outcome is each component's vector (push);
with K directions it is K scores a component, and no vector is ever made (pull).
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.frozen.adjoints import Adjoint, pass_back
from vitdecomp_lens.frozen.compiled import CompiledCut, Leaf, OwnDirections, in_full_precision
from vitdecomp_lens.frozen.pairs import NoFastPathError, Owner, Pairs, Tape, check_bytes, check_rank, spread
from vitdecomp_lens.frozen.rules import sizes
from vitdecomp_lens.frozen.walk import Cut


@dataclass(frozen=True)
class Term:
    """One sum of pairs at a point, laid out: X as ``[batch, tokens, split, channels]``, M as one matrix a part.

    Attributes:
        weights: Slot of A.
        order: Permutation of the point's dimensions to batch, A's, the split one, M's.
        rows: Which range of one dimension of the value some path reads, where only this needs to be kept.
        split_in_a: Whether A differs along the split dimension.
        maps: ``[split or 1, r * channels, direction]``, channels fastest.
        maps_number: Equal for terms whose maps are the same.
        tokens: How many tokens the point's value has.
    """

    weights: int
    order: tuple[int, ...]
    batch: int
    a_dims: tuple[int, ...]
    split: int | None
    split_in_a: bool
    maps: Tensor
    rank: int
    rows: tuple[int, int, int] | None
    maps_number: int
    tokens: int


@dataclass(frozen=True)
class Shifted:
    """A constant's contribution: A summed over tokens, or token by token where the constant differs there."""

    name: str
    weights: int
    maps: Tensor
    by_token: bool
    batch: int


class Program(CompiledCut):
    """What a cut writes along given directions, by pairs. Made by `compile_cut`.

    Attributes:
        splits: For each point, the axis of its value that tells components apart, and how many there are.
    """

    def __init__(
        self,
        terms: dict[str, list[Term]],
        splits: Mapping[str, tuple[int | None, int]],
        shifts: list[Shifted],
        tape: Tape,
        directions: int,
        outside: frozenset[str],
        again: "Callable[..., Program]",
    ) -> None:
        self.terms, self.splits, self.shifts, self.directions = terms, splits, shifts, directions
        self.outside, self._again = outside, again
        slots = [term.weights for several in terms.values() for term in several] + [s.weights for s in shifts]
        self.tape, self.dtype, self.device = tape, tape.dtype, tape.device
        self.points = tuple(terms)
        self.constants = tuple(dict.fromkeys(shift.name for shift in shifts))
        self.slots, self.leaves = tape.needed(slots)
        self._summed_first = frozenset(p for p, several in terms.items() if self._is_summed_first(several))
        self._known: tuple[int, dict[int, Tensor]] = 0, {}  # for the last size of a batch
        tape.forget_examples()

    def along(self, own: OwnDirections) -> "Program":
        """Walk the cut again, with whole vectors as far as the components and their own directions behind them."""
        with torch.inference_mode(False), torch.no_grad(), in_full_precision(self.device):
            return self._again(own=own)

    @property
    def summed_first(self) -> frozenset[str]:
        """Points whose tokens are pooled alike in all images, but for a scale: the norm comes after the pooling.

        Where there are as many sums as tokens, nothing is won.
        """
        return self._summed_first

    def _scale(self, term: Term, weights: Mapping[int, Tensor]) -> Float[Tensor, "batch 1"]:
        slot = self.tape.scale(term.weights)
        assert slot is not None
        return weights[slot].reshape(-1, 1)

    def _is_summed_first(self, terms: Sequence[Term]) -> bool:
        return [self.tape.scale(t.weights) is not None and 2 * t.rank <= t.tokens for t in terms] == [True]

    def _known_weights(self, batch: int) -> dict[int, Tensor]:
        """The weights A of `summed_first`, less their scales."""
        known_for, known = self._known
        if known_for != batch:
            slots = [self.terms[point][0].weights for point in self._summed_first]
            with torch.inference_mode(False), torch.no_grad():  # kept for calls outside of these too
                everything = self.tape.known(slots, batch)
            known = {slot: everything[slot] for slot in slots}
            self._known = batch, known
        return known

    def summed(self, point: str, part: Tensor, batch: int) -> Tensor:
        """Σ_tokens A X for the only term, less A's scale."""
        (term,) = self.terms[point]
        known = self._known_weights(batch)[term.weights]
        return self._summed(term, self.kept_rows(point), part, known, batch)

    def kept_rows(self, point: str) -> tuple[int, int, int] | None:
        """The rows that its only term reads; all where there are several, and none where nothing is read."""
        terms = self.terms[point]
        if not terms:
            axis, _ = self.splits[point]
            return (2 if axis == 1 else 1, 0, 0)
        return terms[0].rows if len(terms) == 1 else None

    def weights(self, read: Mapping[Leaf, Tensor], batch: int) -> dict[int, Tensor]:
        """Run the tape: the weights A of everything, for one batch."""
        return self.tape.run(self.slots, read, batch)

    def contributions(
        self,
        kept: Mapping[str, Tensor],
        weights: Mapping[int, Tensor],
        batch: int,
        *,
        only: Iterable[str] | None = None,
        summed: Collection[str] = (),
    ) -> dict[str, Float[Tensor, "split batch direction"]]:
        """What each point writes along each direction; at the points ``summed`` a scale and M are left to apply."""
        points = list(self.terms if only is None else only)
        found: dict[str, Tensor] = {}
        waiting: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
        for point in points:
            for term in self.terms[point]:
                if point in summed:
                    sums = kept[point] * self._scale(term, weights)
                else:
                    sums = self._summed(term, self.kept_rows(point), kept[point], weights[term.weights], batch)
                if term.split is None:  # many points share one M: one product for all of them
                    waiting.setdefault(term.maps_number, []).append((point, sums[0], term.maps[0]))
                else:
                    _add(found, point, torch.bmm(sums, term.maps))
        for several in waiting.values():
            products = torch.cat([sums for _, sums, _ in several]) @ several[0][2]
            for (point, _, _), product in zip(several, products.split(batch), strict=True):
                _add(found, point, product.unsqueeze(0))
        zeros = self.tape.ones(0, batch, self.directions)
        return {p: found[p] if p in found else zeros.new_zeros(self.splits[p][1], *zeros.shape[1:]) for p in points}

    def _summed(
        self, term: Term, rows: tuple[int, int, int] | None, value: Tensor, a: Tensor, batch: int
    ) -> Float[Tensor, "split batch weighted"]:
        """Σ_tokens A X, as ``[split, batch, r * channels]``."""
        x = _laid_out(term, value.to(self.tape.dtype), batch)
        a = _weights_of(term, a, rows, batch)  # [r, batch, token, split or 1]
        if term.split_in_a:
            sums = torch.einsum("rbts,btsc->sbrc", a, x)
        else:
            flat = torch.bmm(rearrange(a, "r b t 1 -> b r t"), rearrange(x, "b t s c -> b t (s c)"))
            sums = rearrange(flat, "b r (s c) -> s b r c", s=x.shape[2])
        return sums.flatten(2)

    def shifted(self, weights: Mapping[int, Tensor], batch: int) -> Float[Tensor, "constant batch direction"]:
        """What each constant writes along each direction."""
        found = dict.fromkeys(self.constants, 0)
        for shift in self.shifts:
            a = weights[shift.weights].movedim(1 + shift.batch, 1).flatten(2)
            a = a.unflatten(1, (batch, -1)).sum(2)  # windows that are folded behind the batch share the constant
            a = a if shift.by_token else a.sum(-1, keepdim=True)
            found[shift.name] = found[shift.name] + torch.einsum("rbt,rdt->bd", a, shift.maps)  # type: ignore[assignment]
        if not found:
            return self.tape.ones(0, batch, self.directions)
        return torch.stack(list(found.values()))  # type: ignore[arg-type]

    def by_token(
        self,
        point: str,
        kept: Tensor,
        weights: Mapping[int, Tensor],
        out: Float[Tensor, "split batch token direction"],
        *,
        token_axis: int = 1,
    ) -> None:
        """The sums of `contributions`, left apart by token; tokens are what A owns, wherever ``token_axis`` is."""
        if self.weighs_last(point):
            self.unweighted(point, kept, out)
            self.weigh(point, weights, out)
            return
        target, batch = self._read_part(point, out), out.shape[1]
        written = False
        for term in self.terms[point]:
            x = _laid_out(term, kept.to(self.tape.dtype), batch)
            a = _weights_of(term, weights[term.weights], self.kept_rows(point), batch)
            for pair, maps in zip(a, term.maps.unflatten(1, (term.rank, -1)).unbind(1), strict=True):
                _write(target, x * pair.unsqueeze(-1), maps, onto=written)
                written = True

    def together_by_token(
        self,
        point: str,
        kept: Tensor,
        weights: Mapping[int, Tensor],
        shape: tuple[int, int, int, int],
        *,
        token_axis: int = 1,
    ) -> Float[Tensor, "batch token direction"]:
        """The same summed over parts: one product over parts and channels at once."""
        out = torch.zeros(1, *shape[1:], dtype=self.dtype, device=self.device)
        target = self._read_part(point, out)[0]
        for term in self.terms[point]:
            x = _laid_out(term, kept.to(self.tape.dtype), shape[1])
            a = _weights_of(term, weights[term.weights], self.kept_rows(point), shape[1])
            for pair, maps in zip(a, term.maps.unflatten(1, (term.rank, -1)).unbind(1), strict=True):
                target += (x * pair.unsqueeze(-1)).flatten(2) @ maps.flatten(0, 1)
        return out[0]

    def runs_over_tokens(self, point: str, axis: int) -> bool:
        """Whether all A at a point own the axis."""
        return all(axis in term.a_dims for term in self.terms[point])

    def weighs_last(self, point: str) -> bool:
        """With one pair, (A X) M is A (X M)."""
        return [term.rank for term in self.terms[point]] == [1]

    def unweighted(self, point: str, value: Tensor, out: Float[Tensor, "split batch token direction"]) -> None:
        """X M, for the only pair."""
        (term,) = self.terms[point]
        _write(self._read_part(point, out), _laid_out(term, value.to(self.tape.dtype), out.shape[1]), term.maps)

    def weigh(
        self, point: str, weights: Mapping[int, Tensor], out: Float[Tensor, "split batch token direction"]
    ) -> None:
        """A X M from X M."""
        (term,), rows = self.terms[point], self.kept_rows(point)
        a = _weights_of(term, weights[term.weights], rows, out.shape[1])[0]
        target = out if rows is None else out.narrow(2, rows[1], rows[2])
        target.mul_(rearrange(a, "batch token split -> split batch token 1"))

    def _read_part(self, point: str, out: Tensor) -> Tensor:
        """The tokens of ``out`` that some path reads; the others are zero."""
        rows = self.kept_rows(point)
        return out if rows is None else out.zero_().narrow(2, rows[1], rows[2])


def _write(
    out: Float[Tensor, "split batch token direction"],
    x: Float[Tensor, "batch token split channel"],
    maps: Float[Tensor, "split channel direction"],
    *,
    onto: bool = False,
) -> None:
    beta = 1 if onto else 0
    if out.stride(1) == out.shape[2] * out.stride(2):  # images and tokens lie as one: one product for all parts
        out.flatten(1, 2).baddbmm_(x.flatten(0, 1).transpose(0, 1), maps, beta=beta)
        return
    for part, matrix in enumerate(maps):
        out[part].baddbmm_(x[:, :, part], matrix.expand(len(x), -1, -1), beta=beta)


def _add(found: dict[str, Tensor], point: str, value: Tensor) -> None:
    found[point] = found[point] + value if point in found else value


def _laid_out(term: Term, value: Tensor, batch: int) -> Float[Tensor, "batch token split channel"]:
    x = value.permute(term.order)
    tokens = 1 + len(term.a_dims)
    split = 1 if term.split is None else x.shape[tokens]
    return x.reshape(batch, -1, split, int(torch.Size(x.shape[tokens:]).numel()) // split)


def _weights_of(
    term: Term, a: Tensor, rows: tuple[int, int, int] | None, batch: int
) -> Float[Tensor, "r batch token split"]:
    """A as ``[r, batch, token, split or 1]``, restricted to the tokens that were kept."""
    if rows is not None:
        a = a.narrow(1 + rows[0], rows[1], rows[2])
    order = (0, 1 + term.batch, *(1 + d for d in term.a_dims))
    rest = [d for d in range(a.dim()) if d not in order]
    a = a.permute(*order, *rest)
    return a.reshape(term.rank, batch, -1, a.shape[len(order) :].numel())


LaidOut = dict[tuple[object, ...], tuple[int, Tensor, Tensor]]


# --- compiling ------------------------------------------------------------------------------------------------


def compile_cut(
    cut: Cut,
    *,
    splits: Mapping[str, int | None],
    through: Mapping[str, Node],
    directions: Float[Tensor, "direction d_rep"],
    live: frozenset[Node],
    value_of: Callable[[Node], Tensor],
    name_of: Callable[[Node], str],
    own: OwnDirections | None = None,
) -> Program:
    """Compile a cut.

    Args:
        cut: A complete cut.
        splits: For each point, the axis of its value that tells components apart, or None.
        through: More nodes to read that the walk goes on through (what hooks added on the path).
        directions: What is read at the output; the identity for vectors.
        live: Nodes that depend on the images.
        value_of: The value of a node that does not.
        name_of: A name for such a value, as a constant.
        own: With the identity for directions, what is read in its place, by components.

    Raises:
        NoFastPathError: If pairs cannot pass an operation.
        CapacityError: If there would be too many pairs.
    """
    again = partial(
        compile_cut,
        cut,
        splits=splits,
        through=through,
        directions=directions,
        live=live,
        value_of=value_of,
        name_of=name_of,
    )
    tape = Tape(directions.dtype, directions.device)
    on = Adjoint(tape, live, value_of, name_of)
    at: _At = {(cut.root, own is None): [start(cut.root, tape, directions)]}
    reads = {node: name for name, node in {**cut.points, **through}.items()}
    terms: dict[str, list[Term]] = {}
    laid_out: LaidOut = {}
    outside: set[str] = set()
    for node in cut.order:
        whole, arrived = _arrived(node, at, tape, own)
        if node in reads:
            name = reads[node]
            outside.update([name] if whole else [])
            read = [_along(pairs, own.of(name)) for pairs in whole if own is not None] + arrived
            terms[name] = [term_of(node, pairs, splits.get(name), tape, laid_out) for pairs in read]
        if node not in cut.through:
            continue
        check_rank(sum(pairs.rank for pairs in (*whole, *arrived)))
        check_bytes(size_of([pairs.maps for pairs in (*whole, *arrived)], laid_out), "maps")
        _pass(node, arrived, True, at, on)
        met = len(on.shifts)
        _pass(node, whole, False, at, on)
        if own is not None:
            outside.update(shift.name for shift in on.shifts[met:])
            on.shifts[met:] = [replace(s, pairs=_along(s.pairs, own.of(s.name))) for s in on.shifts[met:]]
    parts = {
        name: (None, 1) if (axis := splits.get(name)) is None else (axis % len(sizes(node)), sizes(node)[axis])
        for node, name in reads.items()
        if name in terms
    }
    shifts = [shifted_by(shift.name, shift.pairs, shift.value, tape) for shift in on.shifts]
    terms = {name: terms[name] for name in splits if name in terms}
    count = len(directions) if own is None else len(own)
    return Program(terms, parts, shifts, tape, count, frozenset(outside), again)


_At = dict[tuple[Node, bool], list[Pairs]]  # by node, and whether they read along what is asked for, or whole vectors


def _arrived(node: Node, at: _At, tape: Tape, own: OwnDirections | None) -> tuple[list[Pairs], list[Pairs]]:
    """The pairs at a node: those that read whole vectors still, and those that read along what is asked for.

    What is read nowhere, such as patches where a class token alone is, ends here.
    """
    whole, arrived = (
        [pairs for pairs in at.pop((node, along), []) if bool(tape.examples[pairs.weights].any())]
        for along in (False, True)
    )
    if own is None or node not in own.points or not whole:
        return whole, arrived
    directions = own.at(node)
    return [], [*arrived, *(_along(pairs, directions, own.points[node][0]) for pairs in whole)]


def _pass(node: Node, arrived: Iterable[Pairs], along: bool, at: _At, on: Adjoint) -> None:
    """Pass pairs to the inputs of a node."""
    for pairs in arrived:
        for source, passed in pass_back(node, pairs, on):
            if source in on.live:
                merge(at.setdefault((source, along), []), passed, on.tape)
            else:  # a constant that a hook may change
                on.constant(on.name_of(source), source, passed, on.value(source))


def _along(pairs: Pairs, own: Float[Tensor, "part direction d_rep"], split: int | None = None) -> Pairs:
    """Pairs of whole vectors, read along directions; where there are several parts, each along its own."""
    maps = pairs.maps
    if len(own) == 1:
        return replace(pairs, maps=(own[0] @ maps.flatten(2)).unflatten(2, maps.shape[2:]))
    assert split is not None
    split %= len(pairs.owners)
    maps = maps.movedim(2 + split, 0)
    maps = (own.unsqueeze(1) @ maps.flatten(3)).unflatten(3, maps.shape[3:]).movedim(0, 2 + split)
    owners: list[Owner] = list(pairs.owners)
    owners[split] = "both" if owners[split] == "A" else owners[split]
    return replace(pairs, maps=maps, owners=tuple(owners))


def size_of(arrived: Iterable[Tensor], laid_out: LaidOut) -> int:
    """How many bytes maps take."""
    return sum(m.numel() * m.element_size() for m in [*arrived, *(maps for _, _, maps in laid_out.values())])


def start(root: Node, tape: Tape, directions: Float[Tensor, "direction d_rep"]) -> Pairs:
    """One pair at the output ``[batch, 1, ..., d_rep]``: A is one, M the directions."""
    shape = sizes(root)
    between = (1,) * (len(shape) - 1)
    owners: list[Owner] = ["A"] * len(between)
    maps = directions.reshape(1, directions.shape[0], *between, shape[-1])
    return Pairs(tape.start(shape[0], len(shape)), maps, (*owners, "M"))


def merge(known: list[Pairs], pairs: Pairs, tape: Tape) -> None:
    """Pairs that share M become one by adding their A."""
    for place, other in enumerate(known):
        if other.key == pairs.key:
            weights = tape.step(torch.add, other.weights, pairs.weights)
            known[place] = Pairs(weights, other.maps, other.owners, other.batch)
            return
    known.append(pairs)


def term_of(node: Node, pairs: Pairs, split: int | None, tape: Tape, laid_out: LaidOut) -> Term:
    """Pairs at a point, laid out for the products of a call; those with the same maps share them."""
    dims = len(pairs.owners)
    split = None if split is None else split % dims
    for dim, owner in enumerate(pairs.owners):
        if owner == "both" and dim != split:
            pairs = spread(pairs, tape, dim)
    if split == pairs.batch:
        raise NoFastPathError("components along the batch")
    a_dims = tuple(d for d in range(dims) if d not in (pairs.batch, split) and pairs.owners[d] != "M")
    m_dims = tuple(d for d in range(dims) if d not in (pairs.batch, split) and pairs.owners[d] == "M")
    split_in_a = split is not None and pairs.owners[split] != "M"
    key = (*pairs.key, split, m_dims)
    if key not in laid_out:
        order = (split,) if split is not None else ()
        maps = pairs.maps.permute(
            *(2 + d for d in order), 0, *(2 + d for d in m_dims), 1, 2 + pairs.batch, *(2 + d for d in a_dims)
        )
        whole = maps.reshape(maps.shape[0] if order else 1, -1, pairs.maps.shape[1])
        if split is not None and whole.shape[0] == 1:
            whole = whole.expand(sizes(node)[split], -1, -1)
        # The pairs' own maps are kept as long as their key is in use: freed memory is given to others.
        laid_out[key] = (len(laid_out), pairs.maps, whole.contiguous())
    number, _, maps = laid_out[key]
    order = (pairs.batch, *a_dims, *(() if split is None else (split,)), *m_dims)
    rows = _rows(tape.examples[pairs.weights], pairs.batch, a_dims, sizes(node))
    tokens = math.prod(sizes(node)[d] for d in a_dims)
    return Term(pairs.weights, order, pairs.batch, a_dims, split, split_in_a, maps, pairs.rank, rows, number, tokens)


def _rows(a: Tensor, batch: int, a_dims: Sequence[int], shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """The range of tokens that some path reads, where it is less than half of the only token dimension."""
    if len(a_dims) != 1 or shape[batch] != a.shape[1 + batch] or batch != 0:
        return None
    dim = a_dims[0]
    others = [d for d in range(a.dim()) if d != 1 + dim]
    read = a.ne(0).sum(others).nonzero()[:, 0]
    if len(read) == 0:
        return (dim, 0, 0)
    first, count = int(read[0]), int(read[-1] - read[0]) + 1
    return (dim, first, count) if 2 * count <= shape[dim] else None


def shifted_by(name: str, pairs: Pairs, value: Tensor, tape: Tape) -> Shifted:
    """What a constant writes by the pairs at the node where it is added, but for A."""
    written = _summed_over_channels(pairs, value)
    if all(size == 1 for size in written.shape[2:]):
        return Shifted(name, pairs.weights, written.flatten(2), False, pairs.batch)
    a = tape.examples[pairs.weights]
    shape = [a.shape[1 + d] for d in range(len(pairs.owners)) if d != pairs.batch]
    return Shifted(name, pairs.weights, written.expand(*written.shape[:2], *shape).flatten(2), True, pairs.batch)


def _summed_over_channels(pairs: Pairs, value: Tensor) -> Float[Tensor, "r direction *dims"]:
    """M times a constant, summed over M's dimensions and without the batch's, never made as a whole."""
    mine = [d for d, owner in enumerate(pairs.owners) if owner == "M" and d != pairs.batch]
    others = [d for d in range(len(pairs.owners)) if d not in (*mine, pairs.batch)]
    if any(pairs.maps.shape[2 + d] > 1 for d in others):  # both factors own a dimension
        written = pairs.maps * value
        return (written.sum([2 + d for d in mine], keepdim=True) if mine else written).squeeze(2 + pairs.batch)
    shape = [pairs.maps.shape[2 + d] if d in mine else value.shape[d] for d in range(len(pairs.owners))]
    constant = value.expand(shape).permute(pairs.batch, *others, *mine)
    constant = constant.reshape(-1, int(torch.Size(shape[d] for d in mine).numel()))
    written = pairs.maps.flatten(2) @ constant.T
    whole = [1 if d in mine else shape[d] for d in range(len(shape)) if d != pairs.batch]
    return written.reshape(*written.shape[:2], *whole)
