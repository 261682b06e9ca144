"""Shapes, patterns and backgrounds as pictures, in batches.

Only additions, products, quotients, roots and comparisons are used, which every machine rounds alike; so are tables of
constants. Coordinates are in pixels, y downwards.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from vitdecomp_lens.testbed.font import HEIGHT, written
from vitdecomp_lens.testbed.hashing import mixed, uniform

SIDE = 48  # pixels of a scene, in height and width
Plane = Float[Tensor, "batch height width"]
Picture = Float[Tensor, "batch 3 height width"]

# --- shapes: distances to their borders, negative inside; a shape fits a circle of radius one -------------------------


def _halfplanes(x: Plane, y: Plane, corners: int, inner: float) -> Float[Tensor, "side batch height width"]:
    """Distances to the sides of a regular polygon that points upwards."""
    angles = [2 * math.pi * (side + 0.5) / corners - math.pi / 2 for side in range(corners)]
    return torch.stack([x * math.cos(angle) + y * math.sin(angle) - inner for angle in angles])


def _circle(x: Plane, y: Plane) -> Plane:
    return (x * x + y * y).sqrt() - 0.95


def _square(x: Plane, y: Plane) -> Plane:
    return torch.maximum(x.abs(), y.abs()) - 0.85


def _triangle(x: Plane, y: Plane) -> Plane:
    return _halfplanes(x, y - 0.15, 3, 0.55).amax(0)


def _star(x: Plane, y: Plane) -> Plane:
    # The tips lie outside of one of the five lines, all else inside of all.
    return _halfplanes(x, -y, 5, 0.31).sort(dim=0).values[-2]


def _cross(x: Plane, y: Plane) -> Plane:
    far, near = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(far - 0.95, near - 0.3)


def _ring(x: Plane, y: Plane) -> Plane:
    return ((x * x + y * y).sqrt() - 0.7).abs() - 0.27


def _heart(x: Plane, y: Plane) -> Plane:
    side, y = x.abs(), y + 0.1
    lobe = ((side - 0.45) * (side - 0.45) + (y + 0.3) * (y + 0.3)).sqrt() - 0.5
    point = torch.maximum((side + y) / math.sqrt(2) - 0.6, -y - 0.3)
    return torch.minimum(lobe, point)


def _moon(x: Plane, y: Plane) -> Plane:
    x = x - 0.4  # its middle is not that of its circle
    away = x - 0.45
    return torch.maximum(_circle(x, y), 0.78 - (away * away + y * y).sqrt())


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}

# --- patterns: how much of the second colour, by pixel ----------------------------------------------------------------


def _wave(x: Plane, period: float) -> Plane:
    """A triangle between zero and one."""
    phase = x / period
    return (2 * (phase - phase.floor()) - 1).abs()


def _sharp(x: Plane) -> Plane:
    return ((x - 0.5) * 4 + 0.5).clamp(0, 1)


def _solid(x: Plane, y: Plane, radius: Plane) -> Plane:
    return torch.zeros_like(x)


def _striped(x: Plane, y: Plane, radius: Plane) -> Plane:
    return _sharp(_wave(x + y, 7.0))


def _spotted(x: Plane, y: Plane, radius: Plane) -> Plane:
    across, down = _wave(x, 6.0), _wave(y, 6.0)
    return _sharp(1.05 - (across * across + down * down).sqrt())


def _checkered(x: Plane, y: Plane, radius: Plane) -> Plane:
    odd = (x / 4.0).floor() + (y / 4.0).floor()
    return odd - 2 * (odd / 2).floor()


def _shaded(x: Plane, y: Plane, radius: Plane) -> Plane:
    return (0.5 + 0.6 * y / radius).clamp(0, 1)


PATTERNS: dict[str, Callable[[Plane, Plane, Plane], Plane]] = {
    "solid": _solid,
    "striped": _striped,
    "spotted": _spotted,
    "checkered": _checkered,
    "shaded": _shaded,
}
COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "orange": (0.98, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.10, 0.60, 0.15),
    "blue": (0.10, 0.20, 0.85),
    "purple": (0.55, 0.15, 0.70),
    "white": (0.97, 0.97, 0.97),
    "black": (0.08, 0.08, 0.08),
}

# --- backgrounds ------------------------------------------------------------------------------------------------------


def _grid(batch: int) -> tuple[Plane, Plane]:
    line = torch.arange(SIDE, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x.expand(batch, -1, -1), y.expand(batch, -1, -1)


def _noise(keys: Int[Tensor, "batch"], x: Plane, y: Plane) -> Plane:
    """Smooth numbers in [0, 1): random ones on whole coordinates, and linear between them.

    ``x`` depends on the column alone and ``y`` on the row, so that each whole coordinate is hashed once.
    """
    left, top = x[0, 0].floor().long(), y[0, :, 0].floor().long()
    columns, rows = torch.arange(int(left[0]), int(left[-1]) + 2), torch.arange(int(top[0]), int(top[-1]) + 2)
    drawn = uniform(mixed(keys[:, None, None], columns, rows[:, None]))
    across, down = x - x.floor(), y - y.floor()

    def corner(dx: int, dy: int) -> Plane:
        return drawn[:, top - top[0] + dy][:, :, left - left[0] + dx]

    upper = corner(0, 0) * (1 - across) + corner(1, 0) * across
    lower = corner(0, 1) * (1 - across) + corner(1, 1) * across
    return upper * (1 - down) + lower * down


def _between(amount: Plane, low: tuple[float, ...], high: tuple[float, ...]) -> Picture:
    first, second = (torch.tensor(colour)[:, None, None] for colour in (low, high))
    return first + (second - first) * amount[:, None]


def _water(keys: Int[Tensor, "batch"], x: Plane, y: Plane) -> Picture:
    bent = y + 3 * _noise(keys, x / 9, y / 9)
    crest = _wave(bent + 6 * uniform(mixed(keys, 1))[:, None, None], 6.0)
    return _between(crest * crest, (0.08, 0.33, 0.62), (0.45, 0.72, 0.88))


def _grass(keys: Int[Tensor, "batch"], x: Plane, y: Plane) -> Picture:
    blades = 0.7 * _noise(keys, x / 1.3, y / 6) + 0.3 * _noise(mixed(keys, 1), x / 12, y / 12)
    return _between(blades, (0.05, 0.28, 0.04), (0.48, 0.72, 0.22))


def _sand(keys: Int[Tensor, "batch"], x: Plane, y: Plane) -> Picture:
    grains = 0.5 * _noise(keys, x, y) + 0.5 * _noise(mixed(keys, 1), x / 10, y / 5)
    return _between(grains, (0.70, 0.55, 0.34), (0.95, 0.86, 0.64))


def _bricks(keys: Int[Tensor, "batch"], x: Plane, y: Plane) -> Picture:
    y = y + 8 * uniform(mixed(keys, 1))[:, None, None]
    row = (y / 8).floor()
    x = x + 7 * (row - 2 * (row / 2).floor()) + 14 * uniform(mixed(keys, 2))[:, None, None]
    column = (x / 14).floor()
    shade = uniform(mixed(keys[:, None, None], row.long(), column.long()))
    brick = _between(shade, (0.48, 0.18, 0.12), (0.68, 0.30, 0.20))
    mortar = ((y - 8 * row < 1.5) | (x - 14 * column < 1.5))[:, None]
    return torch.where(mortar, torch.tensor([0.72, 0.70, 0.66])[:, None, None], brick)


def _plain(keys: Int[Tensor, "batch"], x: Plane, y: Plane) -> Picture:
    grey = 0.35 + 0.45 * uniform(mixed(keys, 1))[:, None, None, None]
    tint = 0.06 * uniform(mixed(keys[:, None], 2, torch.arange(3)))[:, :, None, None]
    return (grey + tint).expand(-1, -1, SIDE, SIDE)


BACKGROUNDS: dict[str, Callable[[Int[Tensor, "batch"], Plane, Plane], Picture]] = {
    "water": _water,
    "grass": _grass,
    "sand": _sand,
    "bricks": _bricks,
    "plain": _plain,
}


def _by_kind(kinds: Int[Tensor, "batch"], draw: Callable[[int, Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """What is drawn in as many ways as there are kinds, each for the pictures of its kind."""
    found = torch.empty(len(kinds), *shape)
    for kind in kinds.unique().tolist():
        which = (kinds == kind).nonzero()[:, 0]
        found[which] = draw(kind, which)
    return found


def backgrounds(kinds: Int[Tensor, "batch"], keys: Int[Tensor, "batch"]) -> Picture:
    """Backgrounds by their numbers, each as its key has it."""
    draw = list(BACKGROUNDS.values())
    return _by_kind(kinds, lambda kind, which: draw[kind](keys[which], *_grid(len(which))), (3, SIDE, SIDE))


# --- what lies on them ------------------------------------------------------------------------------------------------

TURNS = [(math.cos(math.radians(angle)), math.sin(math.radians(angle))) for angle in range(-10, 11, 5)]


def objects(
    kinds: dict[str, Int[Tensor, "batch"]],
    centre: Float[Tensor, "batch 2"],
    radius: Float[Tensor, "batch"],
    turn: Int[Tensor, "batch"],
) -> tuple[Picture, Plane]:
    """Objects in colour, and how much of each pixel they cover.

    Args:
        kinds: Numbers of ``shape``, ``colour`` and ``pattern``.
        centre: Where, as x and y.
        radius: How large.
        turn: By which of `TURNS` they are turned.
    """
    x, y = _grid(len(radius))
    x, y = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    cosine, sine = torch.tensor(TURNS)[turn].unbind(-1)
    x, y = (
        x * cosine[:, None, None] + y * sine[:, None, None],
        y * cosine[:, None, None] - x * sine[:, None, None],
    )
    size = radius[:, None, None].expand_as(x)
    shapes, patterns = list(SHAPES.values()), list(PATTERNS.values())
    border = size * _by_kind(kinds["shape"], lambda kind, w: shapes[kind](x[w] / size[w], y[w] / size[w]), (SIDE, SIDE))
    second = _by_kind(kinds["pattern"], lambda kind, w: patterns[kind](x[w], y[w], size[w]), (SIDE, SIDE))
    colour = torch.tensor(list(COLOURS.values()))[kinds["colour"]]
    bright = (colour.sum(1, keepdim=True) > 1.2).float()
    other = 0.35 * colour + 0.65 * (1 - bright) * 0.9  # darker of a bright colour, lighter of a dark one
    fill = colour[:, :, None, None] + (other - colour)[:, :, None, None] * second[:, None]
    inside = (-border).clamp(0, 1)[:, None]  # a dark line runs along the border
    return 0.12 + (fill - 0.12) * inside, (0.5 - border).clamp(0, 1)


def words(
    text: Int[Tensor, "batch"], place: Int[Tensor, "batch 2"], names: list[str]
) -> tuple[Bool[Tensor, "batch height width"], Bool[Tensor, "batch height width"]]:
    """Plates for words, and the ink on them; no word where the number is negative.

    Args:
        text: Which of the names.
        place: The plate's left and upper edge, as x and y; it is moved into the picture where it would not fit.
        names: The words.
    """
    plate = torch.zeros(len(text), SIDE, SIDE, dtype=torch.bool)
    ink = plate.clone()
    for number, (which, (x, y)) in enumerate(zip(text.tolist(), place.tolist(), strict=True)):
        if which >= 0:
            word = written(names[which])
            width = word.shape[1]
            x, y = min(x, SIDE - width - 2), min(y, SIDE - HEIGHT - 2)
            plate[number, y : y + HEIGHT + 2, x : x + width + 2] = True
            ink[number, y + 1 : y + 1 + HEIGHT, x + 1 : x + 1 + width] = word
    return plate, ink


def laid_over(below: Picture, above: Picture | float, cover: Plane) -> Picture:
    """One picture over another, as far as it covers it."""
    return below + (above - below) * rearrange(cover, "batch height width -> batch 1 height width")


def as_bytes(picture: Picture, keys: Int[Tensor, "batch"]) -> UInt8[Tensor, "batch 3 height width"]:
    """Eight bits a channel, with a little noise by pixel."""
    numbers = torch.arange(3 * SIDE * SIDE).reshape(3, SIDE, SIDE)
    noise = uniform(mixed(keys[:, None, None, None], numbers)) - 0.5
    return ((picture + 0.04 * noise).clamp(0, 1) * 255 + 0.5).floor().to(torch.uint8)
