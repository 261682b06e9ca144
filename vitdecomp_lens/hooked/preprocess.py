"""Photographs in and out: the library's own evaluation transform, and which part of a photograph it shows."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from vitdecomp_lens.errors import InputError

Photograph = Image.Image | str | Path

_RESIZES = ("Resize", "ResizeKeepRatio", "ResizeLongest")
_CROPS = ("CenterCrop", "CenterCropOrPad")
_LAST_STEPS = ("ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor", "ToNumpy")  # tensors from here on


def open_upright(photograph: Any) -> Image.Image:
    """Return an RGB image, turned as its EXIF data say; reading it if a path is given.

    Raises:
        InputError: If it is no photograph or cannot be read; the message names the file.

    Example:
        >>> open_upright(Image.new("L", (4, 3), 128)).getpixel((0, 0))
        (128, 128, 128)
    """
    if isinstance(photograph, Image.Image):
        return _as_rgb(ImageOps.exif_transpose(photograph))
    if not isinstance(photograph, (str, Path)):
        raise InputError(f"Photographs must be PIL images or paths; got {type(photograph).__name__}.")
    path = Path(photograph)
    if path.is_dir():
        raise InputError(f"The photograph {str(path)!r} is a folder. Name the files in it, as in {path.name}/*.jpg.")
    try:
        with Image.open(path) as opened:
            return _as_rgb(ImageOps.exif_transpose(opened))
    # What Pillow's readers raise for damaged files of one format or another.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(
            f"The photograph {str(path)!r} cannot be read: {error}. Leave it out or replace it."
        ) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")  # Pillow's own conversion cuts off at 255
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_batch(images: Any, transform: Callable[[Image.Image], Any]) -> Float[Tensor, "batch channel height width"]:
    """Apply an evaluation transform to photographs.

    Raises:
        InputError: If there are none, or a file cannot be read.
    """
    if isinstance(images, (str, Path, Image.Image)):
        raise InputError("Photographs must come as a list; got a single one. Pass [photograph].")
    if len(images) == 0:
        raise InputError("There are no photographs to preprocess; pass at least one.")
    return torch.stack([transform(open_upright(image)) for image in images])


def seen_rectangle(image: Photograph, transform: Any) -> tuple[float, float, float, float]:
    """Return the rectangle of a photograph that survives resizing and cropping.

    Args:
        image: The photograph, or its path; it is made upright first.
        transform: A composition of torchvision, timm or open_clip transforms.

    Returns:
        Left, top, right, bottom in pixels of the photograph. Outside of it where the transform pads.
    """
    opened = open_upright(image)
    axes = [(0.0, 1.0), (0.0, 1.0)]  # of the current image, in x and y: offset and pixels of the photograph per pixel
    for step in getattr(transform, "transforms", [transform]):
        name = type(step).__name__
        if name in _LAST_STEPS:
            break
        before, opened = opened.size, step(opened)
        if name in _CROPS:
            axes = [_cropped(*axis, old, new) for axis, old, new in zip(axes, before, opened.size, strict=True)]
        elif name in _RESIZES:
            axes = [
                (offset, pitch * old / new) for (offset, pitch), old, new in zip(axes, before, opened.size, strict=True)
            ]
        elif opened.size != before:
            raise InputError(
                f"The transform {name} changes the size of photographs in a way that is not known here (known: "
                f"{', '.join((*_RESIZES, *_CROPS))}), so where the model looks cannot be told."
            )
    (left, across), (top, down) = axes
    width, height = opened.size
    return left, top, left + across * width, top + down * height


def _cropped(offset: float, pitch: float, old: int, new: int) -> tuple[float, float]:
    """Move an axis by a centred crop, or by padding where the image is smaller than the crop."""
    removed = round((old - new) / 2) if old >= new else -((new - old) // 2)
    return offset + pitch * removed, pitch
