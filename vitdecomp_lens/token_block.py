"""The scores of the components that read one grid of tokens, and how they lie over the pixels of the image."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from vitdecomp_lens import storage
from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.errors import CapacityError, InputError
from vitdecomp_lens.gap import accumulator, summed_groups
from vitdecomp_lens.selecting import Components, as_components, grouped, summary, taken

PixelMode = Literal["nearest", "density"]
SHOWN_PREFIX = 9


@dataclass(frozen=True, eq=False, repr=False)
class TokenBlock:
    """The scores of components that read one grid of tokens.

    Attributes:
        values: Scores by component, image, token and direction.
        components: What each row belongs to; labels such as ``"L3H7"`` are read as well.
        grid: What each token stands for.

    Raises:
        InputError: Where shapes, components or grid do not fit each other.

    Example:
        >>> TokenBlock(torch.ones(1, 1, 5, 1), ("L0H0",), TokenGrid(2, 2, (8, 8), prefix=("CLS",)))
        TokenBlock(component=1, batch=1, token=5 (2 × 2 patches, prefix CLS), direction=1: 1 head (layer 0))
    """

    values: Float[Tensor, "component batch token direction"]
    components: Components
    grid: TokenGrid

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        if len(shape) != 4 or shape[2] != len(self.grid) or not shape[3]:
            raise InputError(
                f'Expected values as Float[Tensor, "component batch token direction"] with the {len(self.grid)} tokens '
                f"of {describe_grid(self.grid)}, and at least one direction; got shape {shape}."
            )
        object.__setattr__(self, "components", as_components(self.components, shape[0]))

    def __len__(self) -> int:
        return len(self.components)

    def __repr__(self) -> str:
        component, batch, token, direction = self.values.shape
        return (
            f"TokenBlock({component=}, {batch=}, {token=} ({describe_grid(self.grid)}), {direction=}: "
            f"{summary(self.components)})"
        )

    def sum_tokens(self) -> Float[Tensor, "component batch direction"]:
        """The scores summed over tokens, accumulated and returned in at least float32."""
        return self.values.sum(2, dtype=accumulator(self.values.dtype))

    def to_pixels(
        self, height: int, width: int, *, mode: PixelMode = "nearest"
    ) -> Float[Tensor, "component batch direction height width"]:
        """The scores of the patches laid over the image; see `TokenAttribution.to_pixels`."""
        if mode not in get_args(PixelMode):
            raise InputError(f"Expected mode='nearest' or mode='density'; got mode={mode!r}.")
        if height < 1 or width < 1:
            raise InputError(f"Expected a height and width of at least one pixel; got {height} × {width}.")
        if not self.grid.rows * self.grid.columns:  # prefix tokens only, as in class attention
            return self.values.new_zeros(*self.values.shape[:2], self.values.shape[3], height, width)
        patches = rearrange(
            self.values[:, :, len(self.grid.prefix) :],
            "component batch (row column) direction -> component batch direction row column",
            row=self.grid.rows,
        )
        covered, seen = self.grid.image_size, self.grid.seen or self.grid.image_size
        lay = _centres if mode == "nearest" else _shares
        down = lay(height, self.grid.rows, covered[0], seen[0]).to(patches)
        across = lay(width, self.grid.columns, covered[1], seen[1]).to(patches)
        return einsum(down, patches, across, "height row, ... row column, width column -> ... height width")

    def laid_on(self, canvas: TokenGrid) -> Float[Tensor, "component batch direction row column"]:
        """The scores by the patches of a finer grid, over which each token is spread evenly; padding is covered too.

        Example:
            >>> block = TokenBlock(torch.ones(1, 1, 1, 1), ("L0H0",), TokenGrid(1, 1, (8, 8)))
            >>> block.laid_on(TokenGrid(2, 2, (8, 8))).flatten()
            tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        sides = zip((canvas.rows, canvas.columns), self.grid.image_size, canvas.image_size, strict=True)
        rows, columns = (count * length // whole for count, length, whole in sides)
        if not self.grid.rows * self.grid.columns:  # prefix tokens only, as in class attention
            values = self.values.new_zeros(*self.values.shape[:2], self.values.shape[3], rows, columns)
        elif (rows, columns) == (self.grid.rows, self.grid.columns):
            patches = self.values[:, :, len(self.grid.prefix) :]
            pattern = "component batch (row column) direction -> component batch direction row column"
            values = rearrange(patches, pattern, row=rows)
        else:
            values = replace(self, grid=replace(self.grid, seen=None)).to_pixels(rows, columns, mode="density")
        return functional.pad(values, (0, canvas.columns - columns, 0, canvas.rows - rows))

    def with_values(self, values: Float[Tensor, "component batch token direction"]) -> "TokenBlock":
        """Other values of the same components on the same grid."""
        return replace(self, values=values)

    def take(self, rows: Sequence[int]) -> "TokenBlock":
        """Some of the components, by their rows."""
        return replace(self, values=taken(self.values, rows), components=tuple(self.components[row] for row in rows))

    def group(self, by: Literal["layer", "kind"]) -> "TokenBlock":
        """Components summed into coarser ones; see `vitdecomp_lens.decomposition.Attribution.group`."""
        groups = grouped(self.components, by)
        return replace(self, values=summed_groups(self.values, groups), components=tuple(groups)) if groups else self

    def pack(self) -> dict[str, Any]:
        """Components and grid as JSON."""
        return {"components": storage.pack_components(self.components), "grid": asdict(self.grid)}

    @classmethod
    def unpack(cls, values: Tensor, packed: Mapping[str, Any]) -> "TokenBlock":
        """The block of stored values, and what `pack` packed."""
        grid = packed["grid"]
        height, width = grid["image_size"]
        seen = None if grid["seen"] is None else (grid["seen"][0], grid["seen"][1])
        tokens = TokenGrid(grid["rows"], grid["columns"], (height, width), tuple(grid["prefix"]), seen)
        return cls(values, storage.unpack_components(packed["components"]), tokens)


def over_pixels(
    blocks: Sequence[TokenBlock], height: int, width: int, *, mode: PixelMode, max_bytes: int
) -> Float[Tensor, "component batch direction height width"]:
    """The scores of all blocks laid over one image; see `vitdecomp_lens.tokens.TokenAttribution.to_pixels`."""
    if not blocks:
        raise InputError("Expected components with tokens; there are none. Select some, or read .untokened.")
    components, (batch, _, directions) = sum(map(len, blocks)), blocks[0].values.shape[1:]
    size = components * batch * directions * height * width * blocks[0].values.element_size()
    if size > max_bytes:
        raise CapacityError(
            f"{components} components × {batch} images × {directions} directions × {height} × {width} pixels take "
            f"{size:,} bytes; allowed are {max_bytes:,}. Select components or images first, or raise max_bytes=."
        )
    return torch.cat([block.to_pixels(height, width, mode=mode) for block in blocks])


def _centres(pixels: int, patches: int, covered: int, seen: int) -> Float[Tensor, "pixel patch"]:
    """Along one axis, 1 at the patch that holds a pixel's centre: patches tile ``covered`` pixels of the model's image.

    Pixels lie over the ``seen`` ones that the image has; where patches cover less, those beyond have none.
    """
    # (pixel + 1/2) / pixels · seen / covered · patches in whole numbers: rounding must not move a centre over an edge.
    holds = (2 * torch.arange(pixels) + 1) * seen * patches // (2 * pixels * covered)
    return (holds[:, None] == torch.arange(patches)).to(torch.float64)


def _shares(pixels: int, patches: int, covered: int, seen: int) -> Float[Tensor, "pixel patch"]:
    """Along one axis, the share of what is seen of each patch that lies in each pixel.

    Each column sums to 1, but for those of patches of which nothing is seen.
    """
    length = seen / covered / pixels
    start_of_pixel = torch.arange(pixels, dtype=torch.float64)[:, None] * length
    start_of_patch = torch.arange(patches, dtype=torch.float64) / patches
    end = torch.minimum(start_of_pixel + length, start_of_patch + 1 / patches)
    shared = (end - torch.maximum(start_of_pixel, start_of_patch)).clamp(min=0)
    whole = shared.sum(0, keepdim=True)
    return shared / whole.where(whole > 0, 1)


def describe_grid(grid: TokenGrid) -> str:
    """A grid in words.

    >>> describe_grid(TokenGrid(2, 3, (8, 12), prefix=("CLS",)))
    '2 × 3 patches, prefix CLS'
    """
    names = grid.prefix if len(grid.prefix) <= SHOWN_PREFIX else (grid.prefix[0], "...", grid.prefix[-1])
    return f"{grid.rows} × {grid.columns} patches" + (f", prefix {', '.join(names)}" if names else "")
