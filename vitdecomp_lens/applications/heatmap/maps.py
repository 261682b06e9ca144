"""Heatmaps as values: a number for each image, text and patch, and how they lie over pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.applications.heatmap.carried import Carried
from vitdecomp_lens.components import Component, TokenGrid
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.selecting import rows_of_batch
from vitdecomp_lens.token_block import TokenBlock

__all__ = ["ANY", "OWN", "Heatmaps", "Resize"]

ANY, OWN = "any text", "its own"  # of maps that no text changes; of one map an image, each of another text
Resize = Literal["linear", "nearest", "density"]


@dataclass(frozen=True, eq=False, repr=False)
class Heatmaps:
    """How much each patch of each image has to do with each text (or class).

    What the numbers are depends on ``method``: contributions to the score of a text, attention probabilities, gradient
    times activation. Only their order and, for `segment`, their sign and their mean within a map are comparable.

    Attributes:
        values: A number a patch.
        texts: A name for each map of an image: a text or class; `ANY` alone where maps do not depend on a text, `OWN`
            alone where each image has the map of a text of its own.
        grid: Which pixels each patch stands for. It has no prefix tokens.
        method: How the maps were made.
        carried: Whether any component carries the texts at all, where that was asked for.

    Raises:
        InputError: Where values do not fit texts or grid, or are not finite.

    Example:
        >>> maps = Heatmaps(torch.eye(2)[None, None], ("a cat",), TokenGrid(2, 2, (8, 8)), "by hand")
        >>> maps
        Heatmaps(batch=1, text=1, 2 × 2 patches; by hand)
        >>> maps.to_pixels(4, 4, resize="nearest")[0, 0, 0]
        tensor([1., 1., 0., 0.])
    """

    values: Float[Tensor, "batch text row column"]
    texts: tuple[str, ...]
    grid: TokenGrid
    method: str
    carried: Carried | None = None

    def __post_init__(self) -> None:
        expected = (len(self.texts), self.grid.rows, self.grid.columns)
        if self.values.ndim != 4 or self.values.shape[1:] != expected or self.grid.prefix or 0 in expected:
            raise InputError(
                f'Expected values as Float[Tensor, "batch text row column"] with {expected[0]} texts and a grid of '
                f"{expected[1]} × {expected[2]} patches without prefix tokens; got shape {tuple(self.values.shape)}"
                f"{f' and prefix tokens {self.grid.prefix}' if self.grid.prefix else ''}."
            )
        if not bool(self.values.isfinite().all()):
            raise InputError("Expected finite values; some are NaN or Inf. Look at the model's own output first.")

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        batch, text, rows, columns = self.values.shape
        return f"Heatmaps({batch=}, {text=}, {rows} × {columns} patches; {self.method})"

    def __getitem__(self, text: str) -> Float[Tensor, "batch row column"]:
        return self.values[:, self._place(text)]

    def _place(self, text: str) -> int:
        if self.texts == (ANY,):
            return 0
        if text not in self.texts:
            raise UnknownNameError(f"There is no heatmap of {text!r}; {near_matches(text, self.texts)}")
        return self.texts.index(text)

    # ---- other maps

    def picked(self, wanted: Sequence[str]) -> "Heatmaps":
        """One map an image: that of its own text. Maps that do not depend on a text are what they were.

        Args:
            wanted: For each image its text.

        Raises:
            UnknownNameError: Where there is no map of one.
            InputError: Where they are not as many as images.

        Example:
            >>> maps = Heatmaps(torch.rand(2, 2, 3, 3), ("cat", "dog"), TokenGrid(3, 3, (6, 6)), "by hand")
            >>> torch.equal(maps.picked(["dog", "cat"]).values[1, 0], maps["cat"][1])
            True
        """
        if isinstance(wanted, str) or len(wanted) != len(self):
            raise InputError(f"Expected a text for each of the {len(self)} images; got {wanted!r}.")
        if self.texts in ((ANY,), (OWN,)):
            return replace(self, texts=(OWN,))
        places = [self._place(text) for text in wanted]
        return replace(self, values=self.values[range(len(self)), places][:, None], texts=(OWN,), carried=None)

    def relative(self) -> "Heatmaps":
        """Each map minus the mean of the same image's other maps: what speaks for a text rather than the others.

        Raises:
            InputError: Where there are no others.
        """
        count = len(self.texts)
        if count < 2:
            raise InputError(f"Expected maps of other texts to hold each against; there is only {self.texts[0]!r}.")
        others = (self.values.sum(1, keepdim=True) - self.values) / (count - 1)
        return replace(self, values=self.values - others, method=f"{self.method}, relative")

    def images(self, index: int | slice | Sequence[int] | Tensor) -> "Heatmaps":
        """Some images of the batch, by a number, a slice, their numbers, or a boolean mask.

        Raises:
            InputError: Where the batch has no such image.
        """
        rows = rows_of_batch(index, len(self))
        return replace(self, values=self.values[list(rows)])

    @classmethod
    def cat(cls, several: Sequence["Heatmaps"]) -> "Heatmaps":
        """Several batches of the same texts as one.

        Raises:
            InputError: Where there are none, or they differ in texts, grid or method.
        """
        several = tuple(several)
        if not several:
            raise InputError("Expected at least one batch of heatmaps to concatenate; got none.")
        first = several[0]
        for other in several[1:]:
            if (other.texts, other.grid, other.method) != (first.texts, first.grid, first.method):
                raise InputError(f"Expected heatmaps of the same texts, grid and method; got {first} and {other}.")
        return replace(first, values=torch.cat([one.values for one in several]))

    # ---- over the image

    def to_pixels(
        self, height: int | None = None, width: int | None = None, *, resize: Resize = "linear"
    ) -> Float[Tensor, "batch text height width"]:
        """The maps over the model's image.

        Args:
            height: In pixels; None for that of the image the model was given.
            width: The same.
            resize: ``"linear"`` interpolates between the centres of patches, as papers do; ``"nearest"`` shows in each
                pixel the patch that holds its centre; ``"density"`` spreads a patch over its area, so that sums stay.

        Raises:
            InputError: Where a size or the way to resize is none.
        """
        if resize not in get_args(Resize):
            raise InputError(f"Expected resize= to be one of {', '.join(get_args(Resize))}; got {resize!r}.")
        seen = self.grid.seen or self.grid.image_size
        height, width = seen[0] if height is None else height, seen[1] if width is None else width
        if resize != "linear":
            tokens = rearrange(self.values, "batch text row column -> 1 batch (row column) text")
            block = TokenBlock(tokens, (Component(kind="constant", name="all"),), self.grid)
            return block.to_pixels(height, width, mode=resize)[0]
        if height < 1 or width < 1:
            raise InputError(f"Expected a height and width of at least one pixel; got {height} × {width}.")
        down, across = (
            _between_centres(pixels, patches, covered, length).to(self.values)
            for pixels, patches, covered, length in zip(
                (height, width), (self.grid.rows, self.grid.columns), self.grid.image_size, seen, strict=True
            )
        )
        return einsum(down, self.values, across, "height row, ... row column, width column -> ... height width")

    def covered(self, seen: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """Where the patches lie on a photograph, of which the model sees a part: they may reach beyond that.

        Args:
            seen: Left, top, right and bottom of the part, in the photograph's pixels.

        Example:
            >>> grid = TokenGrid(2, 2, (8, 8), seen=(8, 6))
            >>> Heatmaps(torch.zeros(1, 1, 2, 2), ("a cat",), grid, "by hand").covered((10.0, 0.0, 70.0, 80.0))
            (10.0, 0.0, 90.0, 80.0)
        """
        (height, width), of = self.grid.image_size, self.grid.seen or self.grid.image_size
        left, top, right, bottom = seen
        return left, top, left + (right - left) * width / of[1], top + (bottom - top) * height / of[0]

    def on_photograph(
        self, image: int, size: tuple[int, int], seen: tuple[float, float, float, float], *, resize: Resize = "linear"
    ) -> Float[Tensor, "text height width"]:
        """One image's maps laid back through crop and resize onto the photograph; NaN where the model does not look.

        Args:
            image: Its number in the batch.
            size: Width and height of the photograph, upright, as PIL has it.
            seen: What the model sees of it, as ``model.preprocess_geometry(photograph)`` says.
            resize: ``"linear"`` or ``"nearest"``.

        Raises:
            InputError: Where the batch has no such image, or the size is none.
        """
        left, top, right, bottom = seen
        shape = (max(1, round(bottom - top)), max(1, round(right - left)))
        maps = self.images(image).to_pixels(*shape, resize=resize)[0]
        rows, columns = _places(size[1], top, bottom, shape[0]), _places(size[0], left, right, shape[1])
        laid = maps[:, rows.clamp(min=0)][:, :, columns.clamp(min=0)]
        return laid.masked_fill((rows < 0)[:, None] | (columns < 0), torch.nan)


def _between_centres(pixels: int, patches: int, covered: int, seen: int) -> Float[Tensor, "pixel patch"]:
    """Along one axis, the weights of the two patches between whose centres a pixel's centre lies; one at the edges."""
    place = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels * seen / covered * patches - 0.5
    place = place.clamp(0, patches - 1)
    return (1 - (place[:, None] - torch.arange(patches)).abs()).clamp(min=0)


def _places(pixels: int, start: float, end: float, cells: int) -> Tensor:
    """Along one axis, the cell that holds each pixel's centre; -1 outside."""
    place = (torch.arange(pixels, dtype=torch.float64) + 0.5 - start) / (end - start) * cells
    return torch.where((place >= 0) & (place < cells), place.floor(), -1).long()
