"""The scores by token, written piece by piece into results that are there from the start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.capture import Captured
from vitdecomp_lens.components import Component, Point, TokenGrid
from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.frozen.rules import sizes
from vitdecomp_lens.gap import summed
from vitdecomp_lens.request import Request, refuse_too_large
from vitdecomp_lens.tokens import TokenAttribution, TokenBlock


@dataclass
class _Block:
    """The results of the components that read one grid of tokens."""

    grid: TokenGrid
    place: dict[Component, int]
    values: Float[Tensor, "component batch token direction"]


class TokenMaps:
    """The scores by token, written piece by piece into results that are there from the start."""

    def __init__(self, request: Request, components: Sequence[str] | None, max_bytes: int) -> None:
        self.request, program = request, request.program
        self.whole, wanted = request.labelled(components)
        tokened = [
            p for p in request.met if p.token_axis is not None and program.runs_over_tokens(p.hook, p.token_axis)
        ]
        with_tokens = {c for point in tokened for c in request.components_of(point)}
        self.without = [p for p in request.met if p not in tokened]
        self.tokened = [p for p in tokened if not set(wanted).isdisjoint(request.components_of(p))]
        self.others = [c for c in wanted if c not in with_tokens]
        self.blocks, self.home = self._empty_blocks(wanted, max_bytes)
        self.untokened = torch.empty(
            len(self.others), len(request.images), program.directions, dtype=program.dtype, device=program.device
        )
        self.vectors = self.untokened.new_empty(len(request.images), sizes(request.graph.root)[-1])
        # Through an aligner, what is not asked for: the total is what everything sums to.
        self.elsewhere = self.untokened.new_zeros(len(request.images), program.directions)
        self.direct = [point for point in self.tokened if self._is_direct(point)]
        for point in self.tokened:
            block = self.home[point.hook]
            rows = [block.place[c] for c in request.components_of(point) if c in block.place]
            block.values[rows, :, : None if self._sums_heads(point) else point.skipped_tokens] = 0

    def _empty_blocks(
        self, wanted: Sequence[Component], max_bytes: int
    ) -> tuple[dict[TokenGrid, _Block], dict[str, _Block]]:
        """Room for the scores, by token grid; and where those of a point go."""
        request, program = self.request, self.request.program
        grids = {point.hook: self._grid_at(point) for point in self.tokened}
        rows: dict[TokenGrid, list[Component]] = {grid: [] for grid in grids.values()}
        grid_of = {c: grids[point.hook] for point in self.tokened for c in request.components_of(point)}
        for component in wanted:
            if component in grid_of:
                rows[grid_of[component]].append(component)
        batch, count = len(request.images), program.directions
        tokens = sum(len(components) * len(grid) for grid, components in rows.items())
        refuse_too_large((tokens, batch, count), program.dtype, max_bytes, "component·token batch direction")
        blocks = {}
        for grid, components in rows.items():
            # Not zeroed as a whole: nearly all of it is written once, and it is the largest tensor there is.
            values = torch.empty(len(components), batch, len(grid), count, dtype=program.dtype, device=program.device)
            blocks[grid] = _Block(grid, {component: row for row, component in enumerate(components)}, values)
        return blocks, {hook: blocks[grid] for hook, grid in grids.items()}

    def _grid_at(self, point: Point) -> TokenGrid:
        """The tokens of a point's value.

        Raises:
            InputError: If an adapter names others than the value has.
        """
        model, graph, axis = self.request.model, self.request.graph, point.token_axis or 1
        grid = model.token_grid(self.request.images, point.hook)
        found = sizes(graph.points[point.hook])[axis] + point.skipped_tokens
        if model.token_order(point.hook) is None and found != len(grid):  # else the grid was found in the graph
            raise InputError(
                f"Expected at {point.hook} the {len(grid)} tokens that model.token_grid names there,"
                f" {len(grid.prefix)} and then {grid.rows} × {grid.columns} patches; the value has {found}. Correct"
                " prefix, patch_grid or grid_of in the model's adapter."
            )
        return grid

    @property
    def reads(self) -> list[str]:
        """Where something is read that is wanted."""
        if self.request.mapped is not None:
            return [p.hook for p in self.request.met]
        return [p.hook for p in (*self.tokened, *(self.without if self.others else ()))]

    def _sums_heads(self, point: Point) -> bool:
        return point.axis is not None and len(self.request.components_of(point)) == 1

    def add(self, images: slice, captured: Captured) -> None:
        """Write one piece of the batch."""
        self.request.refuse_strangers(captured)
        program, batch = self.request.program, len(captured.total)
        weights = program.weights(captured.read, batch)
        for point in self.tokened:
            if point in self.direct:
                program.weigh(point.hook, weights, self._rows_of(point, images))
            else:
                self._add_point(point, captured.kept[point.hook], weights, images)
        if self.others or self.request.mapped is not None:
            self._add_others(captured, weights, images)
        self.vectors[images] = captured.total.to(program.dtype)

    def at_once(self) -> dict[str, Callable[[slice, Tensor], None]]:
        """What is written during the run, at points whose values need not be kept until the weights are known."""

        def write(point: Point, images: slice, part: Tensor) -> None:
            self.request.program.unweighted(point.hook, part, self._rows_of(point, images))

        return {point.hook: partial(write, point) for point in self.direct}

    def _is_direct(self, point: Point) -> bool:
        """Whether scores of a point are written where they belong, first unweighted."""
        if self._sums_heads(point) or not self.request.program.weighs_last(point.hook):
            return False
        place = self.home[point.hook].place
        places = [place.get(c, -1) for c in self.request.components_of(point)]
        return places[0] >= 0 and places == list(range(places[0], places[0] + len(places)))

    def _rows_of(self, point: Point, images: slice) -> Tensor:
        """Where the scores of a point's components go."""
        mine, block = self.request.components_of(point), self.home[point.hook]
        first = block.place[mine[0]]
        return block.values[first : first + len(mine), images, point.skipped_tokens :]

    def _add_point(self, point: Point, kept: Tensor, weights: Any, images: slice) -> None:
        mine, block, program = self.request.components_of(point), self.home[point.hook], self.request.program
        split = 1 if point.axis is None else kept.shape[point.axis]
        shape = (split, *block.values[0, images, point.skipped_tokens :].shape)
        token_axis = point.token_axis or 1
        if self._sums_heads(point):
            written = program.together_by_token(point.hook, kept, weights, shape, token_axis=token_axis)
            block.values[block.place[mine[0]], images, point.skipped_tokens :] += written
            return
        scratch = block.values.new_empty(shape)
        program.by_token(point.hook, kept, weights, scratch, token_axis=token_axis)
        chosen = [number for number, component in enumerate(mine) if component in block.place]
        if len(chosen) < len(mine) and self.request.mapped is not None:
            unasked = [number for number in range(len(mine)) if number not in chosen]
            self.elsewhere[images] += scratch[unasked].sum((0, 2))
        places = [block.place[mine[number]] for number in chosen]
        block.values[places, images, point.skipped_tokens :] = scratch[chosen]

    def _add_others(self, captured: Captured, weights: Any, images: slice) -> None:
        request, batch = self.request, len(captured.total)
        unasked = [p for p in request.met if p not in self.without and p not in self.tokened]
        unasked = unasked if request.mapped is not None else []
        names = [p.hook for p in self.without] + list(request.changed)
        read = [*names, *(p.hook for p in unasked)]
        written = request.program.contributions(captured.kept, weights, batch, only=read)
        rows = torch.cat([*(written[name] for name in names), request.of_constants(captured, weights)])
        labels = [c for p in self.without for c in request.components_of(p)] + list(request.others)
        place = {component: row for row, component in enumerate(labels)}
        self.untokened[:, images] = rows[[place[c] for c in self.others]]
        if request.mapped is not None:
            others = [row for component, row in place.items() if component not in self.others]
            self.elsewhere[images] += rows[others].sum(0)
            self.elsewhere[images] += sum(written[p.hook].sum(0) for p in unasked)

    def normalize(self) -> None:
        """Divide all scores of an image by the norm of what the model computed."""
        norm = self.vectors.norm(dim=-1, keepdim=True)
        for block in self.blocks.values():
            block.values.div_(norm[:, :, None])
        self.untokened, self.elsewhere = self.untokened / norm, self.elsewhere / norm
        self.vectors = self.vectors / norm

    def _lay_in_order(self) -> None:
        """Bring tokens of windows and the like into the order of their grid."""
        for point in self.tokened:
            order = self.request.model.token_order(point.hook)
            block = self.home[point.hook]
            if order is not None and order != tuple(range(len(block.grid))):
                rows = [block.place[c] for c in self.request.components_of(point) if c in block.place]
                block.values[rows] = block.values[rows][:, :, list(order)]

    @cached_property
    def sums(self) -> Float[Tensor, "batch direction"]:
        """What all scores sum to."""
        found = self.elsewhere + summed(self.untokened)
        for block in self.blocks.values():
            found = found + summed(block.values.sum(2))
        return found

    def result(self, names: Sequence[str] | None) -> TokenAttribution:
        """The scores with their labels."""
        self._lay_in_order()
        total = self.vectors @ self.request.along.T if self.request.mapped is None else self.sums
        asked = slice(len(self.request.along))  # without the witness
        directions = None if names is None else tuple(names)
        others = Attribution(self.untokened[..., asked], tuple(self.others), directions=directions)
        blocks = (TokenBlock(b.values[..., asked], tuple(b.place), b.grid) for b in self.blocks.values())
        return TokenAttribution(
            tuple(blocks),
            others,
            total[:, asked],
            complete=self.whole,
            coverage=self.request.coverage,
            metadata=self.request.metadata,
        )
