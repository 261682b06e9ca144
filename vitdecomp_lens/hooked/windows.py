"""Attention in windows whose hooks see the whole image: tokens in rows and columns, shifts undone."""

import torch
from jaxtyping import Float
from torch import Tensor

Size = tuple[int, int]
APART = -100.0  # what the library adds to the scores of tokens that may not attend to each other


class Windows:
    """How a grid of tokens lies in windows: rolled, padded below and to the right, then cut.

    Hooks see ``batch token ...``: the tokens of the image, row by row where they are in the image. Where the windows
    do not divide the grid, the padding's tokens come first: they are attended to like others, but stand for no pixels.

    Args:
        window: Height and width of a window in tokens.
        shift: By how many rows and columns the grid is rolled up and to the left before it is cut.
    """

    def __init__(self, window: Size, shift: Size = (0, 0)) -> None:
        self.window, self.shift = window, shift
        self._size: Size = (0, 0)

    def see(self, size: Size) -> None:
        """Take note of rows and columns of the grid that is about to be cut."""
        self._size = size

    def padding(self, size: Size) -> int:
        """How many tokens of padding a grid gets."""
        rows, columns = self._padded(size)
        return rows * columns - size[0] * size[1]

    def keep_apart(self, grid: Float[Tensor, "batch row column d_model"]) -> Float[Tensor, "window query key"] | None:
        """Return what to add to the scores of tokens that lie in one window only because the grid was rolled.

        Args:
            grid: The rolled and padded grid.
        """
        if not any(self.shift):
            return None
        regions = [
            (index >= length - window).int() + (index >= length - shift).int()
            for length, window, shift in zip(grid.shape[1:3], self.window, self.shift, strict=True)
            for index in [torch.arange(length, device=grid.device)]
        ]
        region = (3 * regions[0][:, None] + regions[1]).to(grid.dtype)
        (height, width), (rows, columns) = self.window, region.shape
        cut = region.view(rows // height, height, columns // width, width).permute(0, 2, 1, 3)
        cut = cut.reshape(-1, height * width)
        return (cut[:, None] != cut[:, :, None]).to(grid.dtype) * APART

    def _padded(self, size: Size) -> Size:
        rows, columns = (-(-length // window) * window for length, window in zip(size, self.window, strict=True))
        return rows, columns

    def show(self, value: Float[Tensor, "batch_window window_token *rest"]) -> Float[Tensor, "batch token *rest"]:
        """Return the tokens in their places in the image, those of the padding first."""
        (rows, columns), (height, width) = self._size, self.window
        padded_rows, padded_columns = self._padded(self._size)
        rest = value.shape[2:]
        windows = value.reshape(-1, padded_rows // height, padded_columns // width, height, width, *rest)
        order = (0, 1, 3, 2, 4, *range(5, windows.dim()))
        grid = windows.permute(order).reshape(-1, padded_rows, padded_columns, *rest)
        parts = []
        if columns < padded_columns:
            parts.append(grid[:, :rows, columns:].flatten(1, 2))
        if rows < padded_rows:
            parts.append(grid[:, rows:].flatten(1, 2))
        inside = self._rolled(grid[:, :rows, :columns] if parts else grid, 1).flatten(1, 2)
        return torch.cat([*parts, inside], dim=1) if parts else inside

    def restore(
        self, shown: Float[Tensor, "batch token *rest"], like: Float[Tensor, "batch_window window_token *rest"]
    ) -> Float[Tensor, "batch_window window_token *rest"]:
        """Cut what `show` showed into windows again."""
        (rows, columns), (height, width) = self._size, self.window
        padded_rows, padded_columns = self._padded(self._size)
        right, below = rows * (padded_columns - columns), (padded_rows - rows) * padded_columns
        grid = self._rolled(shown[:, right + below :].unflatten(1, (rows, columns)), -1)
        if right:
            beside = shown[:, :right].unflatten(1, (rows, padded_columns - columns))
            grid = torch.cat([grid, beside], dim=2)
        if below:
            under = shown[:, right : right + below].unflatten(1, (padded_rows - rows, padded_columns))
            grid = torch.cat([grid, under], dim=1)
        rest = grid.shape[3:]
        cut = grid.reshape(-1, padded_rows // height, height, padded_columns // width, width, *rest)
        order = (0, 1, 3, 2, 4, *range(5, cut.dim()))
        return cut.permute(order).reshape(-1, height * width, *rest)

    def _rolled(self, grid: Tensor, sign: int) -> Tensor:
        if not any(self.shift):
            return grid
        return grid.roll((sign * self.shift[0], sign * self.shift[1]), (1, 2))
