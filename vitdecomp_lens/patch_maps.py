"""The scores of one image by patch, where components may read different grids of tokens."""

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.tokens import TokenAttribution, TokenBlock


class PatchMaps:
    """The scores of one image by patch, all on one grid: the finest, over all that any grid of tokens covers.

    A token that stands for several of its patches is spread evenly over them.

    Args:
        scores: Of one image.
        direction: Along which of the directions.
    """

    def __init__(self, scores: TokenAttribution, direction: int = 0) -> None:
        grids = [block.grid for block in scores.blocks]
        finest = max(grids, key=lambda grid: grid.rows * grid.columns)
        height, width = (max(grid.image_size[axis] for grid in grids) for axis in (0, 1))
        rows, columns = height * finest.rows // finest.image_size[0], width * finest.columns // finest.image_size[1]
        self.scores, self.direction = scores, direction
        self.canvas = TokenGrid(rows, columns, (height, width))
        self._rows = {c.label: (block, row) for block in scores.blocks for row, c in enumerate(block.components)}

    def __contains__(self, label: object) -> bool:
        return label in self._rows

    def of(self, label: str) -> Float[Tensor, "row column"]:
        """A component's scores by patch."""
        block, row = self._rows[label]
        return self._laid(block.take([row]))

    def of_all(self) -> Float[Tensor, "row column"]:
        """The sum over components."""
        empty = torch.zeros(self.canvas.rows, self.canvas.columns, dtype=torch.float64)
        whole = (b.take([0]).with_values(b.values.double().sum(0, keepdim=True)) for b in self.scores.blocks)
        return sum(map(self._laid, whole), empty)

    def _laid(self, block: TokenBlock) -> Float[Tensor, "row column"]:
        return block.with_values(block.values.double()).laid_on(self.canvas)[0, 0, self.direction]

    def prefix_of(self, label: str) -> float:
        """What of a component's score came from prefix tokens."""
        block, row = self._rows[label]
        return float(block.values[row, 0, : len(block.grid.prefix), self.direction].double().sum())

    def by_prefix(self) -> dict[str, float]:
        """What came through each prefix token; the tokens of windows' padding count as one."""
        totals: dict[str, float] = {}
        for block in self.scores.blocks:
            values = block.values[:, 0, : len(block.grid.prefix), self.direction].double().sum(0).tolist()
            for name, value in zip(block.grid.prefix, values, strict=True):
                shown = "padding" if name.startswith("pad") else name
                totals[shown] = totals.get(shown, 0.0) + value
        return totals

    def covered(
        self, seen: tuple[float, float, float, float], height: int, width: int
    ) -> tuple[float, float, float, float]:
        """Where the patches lie on a photograph: they may cover more than the input (padding), or less.

        Args:
            seen: Left, top, right, bottom of what the input shows, in pixels of the photograph.
            height: Of the input.
            width: Of the input.
        """
        left, top, right, bottom = seen
        rows, columns = self.canvas.image_size
        return left, top, left + (right - left) * columns / width, top + (bottom - top) * rows / height
