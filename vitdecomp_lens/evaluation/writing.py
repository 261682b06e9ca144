"""A word written onto a photograph: a typographic attack (Goh et al. 2021, "Multimodal Neurons")."""

import hashlib

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Rectangle", "number_from", "write"]

Rectangle = tuple[float, float, float, float]
SMALLEST, LARGEST = 0.1, 0.2  # letters, as shares of the height of what is seen
OUTLINE = 0.08  # of the letters, as a share of their size


def number_from(*parts: object) -> float:
    """A number from 0 to 1, 1 excluded, by a hash: the same for the same parts, on any machine.

    Example:
        >>> number_from("a", 0) == number_from("a", 0) != number_from("a", 1)
        True
    """
    told = "/".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(told).digest()[:6], "big") / 2**48


def write(photograph: Image.Image, word: str, seen: Rectangle, key: str) -> Image.Image:
    """A copy with a word on it, in white letters with a black outline, in Pillow's own font.

    Args:
        photograph: Upright, RGB.
        word: What to write.
        seen: Left, top, right and bottom of what the model sees of it, within which the word lies.
        key: Size and place come from a hash of it.

    Example:
        >>> plain = Image.new("RGB", (200, 160), "green")
        >>> written = write(plain, "tench", (20.0, 0.0, 180.0, 160.0), "some photograph")
        >>> len(plain.getcolors()), (255, 255, 255) in {colour for _, colour in written.getcolors(2**15)}
        (1, True)
    """
    left, top = max(seen[0], 0.0), max(seen[1], 0.0)
    width, height = min(seen[2], photograph.width) - left, min(seen[3], photograph.height) - top
    size = height * (SMALLEST + (LARGEST - SMALLEST) * number_from(key, "size"))
    box = _box(word, size)
    if (too_wide := (box[2] - box[0]) / width) > 1:
        size /= too_wide
        box = _box(word, size)
    x = left + number_from(key, "x") * max(width - (box[2] - box[0]), 0) - box[0]
    y = top + number_from(key, "y") * max(height - (box[3] - box[1]), 0) - box[1]
    found = photograph.copy()
    canvas, font, stroke = ImageDraw.Draw(found), _font(size), _stroke(size)
    canvas.text((x, y), word, fill="white", font=font, stroke_width=stroke, stroke_fill="black")
    return found


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(size, 1))


def _stroke(size: float) -> int:
    return max(1, round(size * OUTLINE))


def _box(word: str, size: float) -> Rectangle:
    canvas = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = canvas.textbbox((0, 0), word, font=_font(size), stroke_width=_stroke(size))
    return float(left), float(top), float(right), float(bottom)
