"""The registry of adjoints, and what the rules share.

A rule is a function of a node, the pairs at its output, and the `Adjoint` that is being built; `adjoint` registers
it and `pass_back` looks it up. The rules themselves stand in the other files of this folder.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from vitdecomp_lens.errors import CapacityError, InputError
from vitdecomp_lens.frozen.pairs import NoFastPathError, Owner, Pairs, Tape, length, settle
from vitdecomp_lens.frozen.rules import operation, sizes
from vitdecomp_lens.frozen.walk import module_path

Passed = list[tuple[Node, Pairs]]
Rule = Callable[[Node, Pairs, "Adjoint"], Passed]
ADJOINTS: dict[str, Rule] = {}


@dataclass(frozen=True)
class Shift:
    """Something constant that is added at a node, and the pairs there."""

    name: str
    pairs: Pairs
    value: Tensor


@dataclass
class Adjoint:
    """What the rules share: the tape, the constants, and who depends on the images."""

    tape: Tape
    live: Collection[Node]
    value_of: Callable[[Node], Tensor]
    name_of: Callable[[Node], str]
    shifts: list[Shift] = field(default_factory=list)

    def value(self, item: Any) -> Tensor:
        """A constant operand as a tensor: a node that does not depend on the images, or a number."""
        if isinstance(item, Node) and item in self.live:
            raise NoFastPathError(f"{operation(item)}, which depends on the images, stands where weights are expected")
        value = self.value_of(item) if isinstance(item, Node) else item
        return torch.as_tensor(value, dtype=self.tape.dtype, device=self.tape.device)

    def constant(self, name: str, node: Node, pairs: Pairs, value: Tensor) -> None:
        """Note that ``value``, broadcast from the right, is added at ``node``."""
        value = aligned(value, len(sizes(node)))
        if value.shape[pairs.batch] > 1:
            raise NoFastPathError("a constant differs along the batch")
        self.shifts.append(Shift(name, pairs, value))

    def scaled(self, node: Node, pairs: Pairs, factor: Tensor) -> Pairs:
        """Pairs before a product with a constant."""
        factor = aligned(factor, len(sizes(node)))
        if factor.shape[pairs.batch] > 1:
            raise NoFastPathError("a constant factor differs along the batch")
        varying = [d for d, n in enumerate(factor.shape) if n > 1]
        if all(pairs.owners[d] != "A" for d in varying):
            return replace(pairs, maps=pairs.maps * factor)
        pairs = settle(pairs, self.tape, varying, "A")
        return replace(pairs, weights=self.tape.step(lambda a: a * factor, pairs.weights))

    def scaled_live(self, node: Node, pairs: Pairs, factor: Node, *, inverse: bool = False) -> Pairs:
        """Pairs before a product with a frozen factor that differs from image to image."""
        shape = aligned_shape(sizes(factor), len(sizes(node)))
        pairs = settle(pairs, self.tape, [d for d, n in enumerate(shape) if n > 1], "A")
        static = tuple(-1 if d == pairs.batch else n for d, n in enumerate(shape))

        def read(value: Tensor) -> Tensor:
            value = value.reshape(static)
            return value.reciprocal() if inverse else value

        leaf = self.tape.leaf((factor,), f"factor {inverse} {static}", read, shape)
        return replace(pairs, weights=self.tape.step(torch.mul, pairs.weights, leaf))


def adjoint(*operations: str) -> Callable[[Rule], Rule]:
    """Register a function as the adjoint of one or more operations.

    Raises:
        InputError: If an operation has one already.
    """

    def register(function: Rule) -> Rule:
        for name in operations:
            if name in ADJOINTS:
                raise InputError(f"The operation {name!r} has an adjoint already: {ADJOINTS[name].__name__}.")
            ADJOINTS[name] = function
        return function

    return register


def pass_back(node: Node, pairs: Pairs, on: Adjoint) -> Passed:
    """The pairs at the inputs of ``node``, from those at its output.

    Raises:
        NoFastPathError: If they cannot pass, naming the operation and the module that it is in.
        CapacityError: If they would become too many, naming the same.
    """
    found = ADJOINTS.get(operation(node))
    try:
        if found is None:
            raise NoFastPathError("it has no adjoint")
        return found(node, pairs, on)
    except (NoFastPathError, CapacityError) as error:
        raise type(error)(f"{operation(node)} in {module_path(node) or 'the model itself'}: {error}") from error


def aligned_shape(shape: tuple[int, ...], dims: int) -> tuple[int, ...]:
    """A shape with as many dimensions as ``dims``: dimensions of length one come first, as in broadcasting."""
    return (1,) * (dims - len(shape)) + tuple(shape)


def aligned(value: Tensor, dims: int) -> Tensor:
    """A tensor, reshaped to its `aligned_shape`."""
    return value.reshape(aligned_shape(tuple(value.shape), dims))


def input_of(node: Node) -> Node:
    """The first argument of a node, which is the tensor that it works on."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def by_derivative(
    pairs: Pairs, tape: Tape, dims: Sequence[int], inner: Sequence[int], run: Callable[[Tensor], Tensor]
) -> Pairs:
    """Pairs before a linear operation on some dimensions, alike for whatever else there is: torch's own derivative.

    It is taken of whichever factor owns these dimensions; where both do, they go to A.

    Args:
        pairs: Those after it.
        tape: For A.
        dims: The dimensions that it mixes.
        inner: Lengths of all dimensions before it, as many as after it.
        run: The operation, for any batch and for any lengths of the dimensions that it does not mix.
    """
    if pairs.batch in dims:
        raise NoFastPathError("it mixes the batch")
    owner: Literal["A", "M"] = "A" if any(pairs.owners[d] == "A" for d in dims) else "M"
    pairs = settle(pairs, tape, dims, owner)
    batch, lengths = pairs.batch, {d: inner[d] for d in dims}

    def back(value: Tensor, leading: int) -> Tensor:
        folded = value.movedim(tuple(range(leading)), tuple(range(batch, batch + leading)))
        sizes_before = folded.shape[batch : batch + leading + 1]
        folded = folded.flatten(batch, batch + leading)
        zero = folded.new_zeros([lengths.get(d, n) for d, n in enumerate(folded.shape)])
        (found,) = torch.func.vjp(run, zero)[1](folded)
        found = found.unflatten(batch, sizes_before)
        return found.movedim(tuple(range(batch, batch + leading)), tuple(range(leading)))

    if owner == "M":
        return replace(pairs, maps=back(pairs.maps, 2))
    return replace(pairs, weights=tape.step(lambda a: back(a, 1), pairs.weights))


def hand_over(pairs: Pairs, tape: Tape, dims: Sequence[int]) -> Pairs:
    """Give dimensions of A to M: each slice of A becomes a pair of its own, whose M is that slice alone."""
    for dim in dims:
        if pairs.owners[dim] == "A" and length(pairs, tape, dim) > 1:
            shape = list(pairs.maps.shape)
            shape[2 + dim] = length(pairs, tape, dim)
            both: list[Owner] = list(pairs.owners)
            both[dim] = "both"
            pairs = replace(pairs, maps=pairs.maps.expand(shape), owners=tuple(both))
    return settle(pairs, tape, dims, "M")
