"""What a compiled cut can be asked: one interface, a fast way (``program.py``) and a slow one (``slow.py``)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True, eq=False)
class OwnDirections:
    """Directions of each component's own: those of another space, pulled back through a map for each component.

    A path from the output back reads along the directions of whatever comes first: a value that components are read at,
    a constant, or what a hook adds. Behind that value it goes on reading along these.

    Attributes:
        maps: A map for each component, or one for all of them.
        directions: In the space that the maps lead to.
        shared: More directions, of the output itself, which are the same for all components. They come last.
        points: The values that components are read at: the axis that tells several apart, and whose maps are theirs.
        others: Whose maps are those of constants and of what hooks add, by name. What is in neither reads as zero along
            all directions but those that are shared.
    """

    maps: Float[Tensor, "component d_rep d_out"]
    directions: Float[Tensor, "direction d_out"]
    shared: Float[Tensor, "shared d_rep"]
    points: Mapping[Node, tuple[int | None, Sequence[int]]]
    others: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.directions) + len(self.shared)

    def at(self, node: Node) -> Float[Tensor, "part direction d_rep"]:
        """The directions of the components at a value; a single part where they are the same for all."""
        return self._of(self.points[node][1])

    def of(self, name: str) -> Float[Tensor, "1 direction d_rep"]:
        """The directions of a constant, or of what a hook adds."""
        return self._of([self.others[name]] if name in self.others else [])

    def _of(self, rows: Sequence[int]) -> Float[Tensor, "part direction d_rep"]:
        if not rows:
            own = self.shared.new_zeros(1, len(self.directions), self.shared.shape[1])
        else:
            maps = self.maps if len(self.maps) == 1 else self.maps[_range(rows)]
            own = self.directions @ maps.to(self.directions).mT
        return torch.cat([own, self.shared.expand(len(own), -1, -1)], 1)


def _range(rows: Sequence[int]) -> slice | list[int]:
    """Rows, without a copy where they follow each other."""
    first, last = rows[0], rows[-1] + 1
    return slice(first, last) if list(rows) == list(range(first, last)) else list(rows)


@dataclass(frozen=True, eq=False)
class Leaf:
    """Something that the frozen map is computed from: a reading of the values of some nodes.

    Attributes:
        nodes: Whose values are read.
        read: From their values to what is kept of them, such as a norm's 1/σ.
        size: How many numbers of that there are for an image.
    """

    nodes: tuple[Node, ...]
    read: Callable[..., Any]
    size: int


def in_full_precision(device: torch.device) -> torch.autocast:
    """A context for what is computed of a run, whatever autocast the run itself is under."""
    return torch.autocast(device.type, enabled=False)


class Reads(ABC):
    """What has to be kept of a run.

    Attributes:
        leaves: What the frozen map is computed from.
        dtype: In which contributions are computed: at least float32.
        device: Where.
    """

    leaves: Sequence[Leaf]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def kept_rows(self, point: str) -> tuple[int, int, int] | None:
        """Which part of a point's value some path reads: a dimension, the first row and how many; None for all."""

    def part(self, point: str, value: Tensor) -> Tensor:
        """The part of a point's value that some path reads."""
        rows = self.kept_rows(point)
        return value if rows is None else value.narrow(*rows)

    def keep(self, point: str, value: Tensor) -> Tensor:
        """A copy of that part: the rest is freed, and a later hook may write in place."""
        return self.part(point, value).clone()


class CompiledCut(Reads):
    """From the values at the points of a cut to their contributions along given directions.

    Attributes:
        points: Names of the points that are read.
        constants: Names of what no image changes, each once.
        directions: How many directions are read.
        outside: With directions of components' own: the constants and points that are met before any of these.
    """

    points: tuple[str, ...]
    constants: tuple[str, ...]
    directions: int
    outside: frozenset[str] = frozenset()

    @abstractmethod
    def along(self, own: OwnDirections) -> "CompiledCut":
        """The same cut, read along directions of each component's own. Only of one that reads whole vectors.

        Raises:
            NoFastPathError: As `compile_cut`.
            CapacityError: As `compile_cut`.
        """

    @property
    def summed_first(self) -> frozenset[str]:
        """Points of whose values `summed` keeps little: their weights are known before the run, but for a scale."""
        return frozenset()

    def summed(self, point: str, part: Tensor, batch: int) -> Tensor:
        """What `contributions` takes of a point in place of a part of its value. Only for `summed_first`."""
        raise NotImplementedError

    @abstractmethod
    def weights(self, read: Mapping[Leaf, Any], batch: int) -> Any:
        """The frozen map at one batch, from what the leaves read: what the methods below take as ``weights``."""

    @property
    def nodes(self) -> list[Node]:
        """The nodes whose values the leaves read, each once."""
        return list(dict.fromkeys(node for leaf in self.leaves for node in leaf.nodes))

    def weights_at(self, values: Mapping[Node, Any], batch: int) -> Any:
        """`weights`, from the values of nodes."""
        return self.weights({leaf: leaf.read(*(values[n] for n in leaf.nodes)) for leaf in self.leaves}, batch)

    @abstractmethod
    def contributions(
        self,
        kept: Mapping[str, Tensor],
        weights: Any,
        batch: int,
        *,
        only: Iterable[str] | None = None,
        summed: Collection[str] = (),
    ) -> dict[str, Float[Tensor, "split batch direction"]]:
        """What each point writes along each direction, from the parts of its value that `keep` gave.

        At the points ``summed``, from what `summed` gave.
        """

    @abstractmethod
    def shifted(self, weights: Any, batch: int) -> Float[Tensor, "constant batch direction"]:
        """What each constant writes along each direction."""

    @abstractmethod
    def by_token(
        self,
        point: str,
        kept: Tensor,
        weights: Any,
        out: Float[Tensor, "split batch token direction"],
        *,
        token_axis: int = 1,
    ) -> None:
        """Write what a point writes from each of its tokens along each direction into ``out``.

        Args:
            point: Name of the point.
            kept: What `keep` gave for it.
            weights: What `weights` gave.
            out: Where to write; its number of tokens is that of the point's value.
            token_axis: The first axis of the point's value that runs over tokens.
        """

    def together_by_token(
        self, point: str, kept: Tensor, weights: Any, shape: tuple[int, int, int, int], *, token_axis: int = 1
    ) -> Float[Tensor, "batch token direction"]:
        """What `by_token` writes into an ``out`` of a shape, summed over the point's parts."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.by_token(point, kept, weights, out, token_axis=token_axis)
        return out.sum(0)

    def runs_over_tokens(self, point: str, axis: int) -> bool:
        """Whether an axis of a point's value can be told apart by token: not where a branch has mixed tokens."""
        return True

    def weighs_last(self, point: str) -> bool:
        """Whether `by_token` of a point is `unweighted`, which needs its value only, and then `weigh`."""
        return False

    def unweighted(self, point: str, value: Tensor, out: Float[Tensor, "split batch token direction"]) -> None:
        """Write what the part of a value gives before it is weighted. Only where `weighs_last`."""
        raise NotImplementedError

    def weigh(self, point: str, weights: Any, out: Float[Tensor, "split batch token direction"]) -> None:
        """Weight what `unweighted` wrote. Only where `weighs_last`."""
        raise NotImplementedError
