"""A module that nothing is known of, by its traced graph alone: what `decompose` asks of a `Decomposable`.

Components are the graph's branches (``frozen/branches.py``), named by the module that holds them: ``blocks.3.attn``,
``blocks.3.attn.H5``, ``blocks.3.mlp.N12``. Nothing is hooked: the graph itself is run. Hooks that a user has put on
the module (torch's own) are part of what was traced.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.components import By, Component, Point, TokenGrid
from vitdecomp_lens.coverage import Stop
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.frozen.branches import Branch, Where
from vitdecomp_lens.frozen.graph import FrozenGraph
from vitdecomp_lens.frozen.places import lattice, places, token_places
from vitdecomp_lens.frozen.rules import sizes
from vitdecomp_lens.hooked.checks import check_placement, check_values

WHERE: tuple[Where, ...] = ("output", "parts", "values")
SPLIT = {("head", "attn"), ("neuron", "mlp")}


@dataclass(frozen=True)
class Traced:
    """A plain module, decomposed by its graph.

    Attributes:
        module: The module.
        graph: Its graph, in which every value is a point, the branches' by name.
    """

    module: nn.Module
    graph: FrozenGraph

    @classmethod
    def of(cls, module: nn.Module, graph: FrozenGraph) -> "Traced":
        """Name what the graph's branches write."""
        if cls not in graph.kept:
            points = {node.name: node for node in graph.nodes if node in graph.live and node.op != "output"}
            for branch in graph.branches.found:
                points |= {_name(branch, where): node for where in WHERE if (node := branch.node(where)) is not None}
            graph.kept[cls] = cls(module, graph.with_points(points))
        traced: Traced = graph.kept[cls]
        return traced

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """No hooks: values are read while the graph runs."""
        return {}

    def __call__(self, images: Tensor) -> Any:
        """Run the module itself."""
        return self.module(images)

    @cached_property
    def _found(self) -> tuple[Branch, ...]:
        return self.graph.branches.found

    @cached_property
    def _layers(self) -> dict[str, int]:
        """A flat number for each block: the paths of branches up to their last number."""
        blocks = dict.fromkeys(_block(branch) for branch in self._found if branch.kind != "embed")
        return {block: number for number, block in enumerate(blocks)}

    def _component(self, branch: Branch) -> Component:
        if branch.kind == "embed":
            several = sum(other.kind == "embed" for other in self._found) > 1
            return Component(kind="embed", name=branch.name if several else None)
        return Component(kind=branch.kind, layer=self._layers[_block(branch)], name=branch.name)

    def component_points(self, by: By) -> tuple[Point, ...]:
        """Where components are read: each branch at its output, or split at its source."""
        return tuple(self._point(branch, self._whole_or_split(branch, by)) for branch in self._found)

    def token_points(self, by: By) -> tuple[Point, ...]:
        """The same by token: attention at its values, by head."""
        return tuple(
            self._point(branch, "values" if branch.values else self._whole_or_split(branch, by))
            for branch in self._found
        )

    def _whole_or_split(self, branch: Branch, by: By) -> Where:
        return "parts" if (by, branch.kind) in SPLIT and branch.split("parts") is not None else "output"

    def _point(self, branch: Branch, where: Where) -> Point:
        tokens = branch.token_axes(where)
        first = tokens[0] if tokens else None
        return Point(_name(branch, where), self._component(branch), axis=branch.split(where), token_axis=first)

    def token_grid(self, images: Tensor, hook: str) -> TokenGrid:
        """Which pixels each token stands for, found by following places through the graph."""
        return self._grids[hook][0]

    def token_order(self, hook: str) -> tuple[int, ...]:
        """For each token of the grid, which of the value's it is: windows come one after the other there."""
        return self._grids[hook][1]

    @cached_property
    def _grids(self) -> Mapping[str, tuple[TokenGrid, tuple[int, ...]]]:
        height, width = sizes(self.graph.images)[-2:]
        read = [(b, where, node) for b in self._found for where in WHERE if (node := b.node(where)) is not None]
        placed = places(self.graph, [node for _, _, node in read])
        grids = {}
        for branch, where, node in read:
            found = token_places(placed[node], branch.token_axes(where))
            grid = lattice(found, (height, width)) or without_places(len(found), (height, width))
            grids[_name(branch, where)] = grid
        return grids

    def check_images(self, images: Any) -> None:
        """Raise `InputError` for images that no model of images takes."""
        check_any_images(images, self.module)

    @property
    def branches(self) -> int:
        """How many branches there are, hidden ones included."""
        return sum(branch.kind != "embed" for branch in self._found) + self.graph.branches.hidden

    @property
    def stops(self) -> tuple[Stop, ...]:
        """Behind what branches are hidden."""
        return self.graph.branches.stops


def check_any_images(images: Any, module: nn.Module) -> None:
    """Refuse what is no batch of images for any model, or lies elsewhere than this one.

    Raises:
        InputError: Saying what was expected and what came.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4:
        came = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"Images must be a floating tensor [batch, channel, height, width]; got {came}. Scale and normalise them"
            " as the model was trained, and add the batch axis where it is missing: images[None]."
        )
    if (weight := next(module.parameters(), None)) is not None:
        check_placement(images, weight)
    check_values(images)


def _name(branch: Branch, where: Where) -> str:
    """The name of a value of a branch: none of the graph's own, which have no colon."""
    return f"{branch.name}:{where}"


def _block(branch: Branch) -> str:
    """The path of a branch's block, up to its last number."""
    parts = branch.name.partition("#")[0].split(".")
    parents = parts if parts[-1].isdigit() else parts[:-1]
    last = max((place for place, part in enumerate(parents) if part.isdigit()), default=-1)
    return ".".join(parents[: last + 1]) if last >= 0 else branch.name


def without_places(count: int, size: tuple[int, int]) -> tuple[TokenGrid, tuple[int, ...]]:
    """Tokens that tile no image: each has a number only."""
    return TokenGrid(0, 0, size, prefix=tuple(f"token{n}" for n in range(count))), tuple(range(count))
