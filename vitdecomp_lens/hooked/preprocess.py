"""Photographs in and out: the library's own evaluation transform, and which part of a photograph it shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vitdecomp_lens.errors import InputError

_RESIZES = ("Resize", "ResizeKeepRatio", "ResizeLongest")
_CROPS = ("CenterCrop", "CenterCropOrPad")
_LAST_STEPS = ("ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor", "ToNumpy")  # tensors from here on


def open_image(image: Any) -> Image.Image:
    """Return an RGB image, reading it if a path is given.

    Raises:
        InputError: If the file cannot be read; the message names it.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, (str, Path)):
        raise InputError(f"Photographs must be PIL images or paths; got {type(image).__name__}.")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(
            f"The photograph {str(image)!r} cannot be read: {error}. Leave it out or replace it."
        ) from error


def to_batch(images: Any, transform: Callable[[Image.Image], Any]) -> Float[Tensor, "batch channel height width"]:
    """Apply an evaluation transform to photographs.

    Raises:
        InputError: If there are none, or a file cannot be read.
    """
    if isinstance(images, (str, Path, Image.Image)):
        raise InputError("Photographs must come as a list; got a single one. Pass [photograph].")
    if len(images) == 0:
        raise InputError("There are no photographs to preprocess; pass at least one.")
    return torch.stack([transform(open_image(image)) for image in images])


def seen_rectangle(image: Image.Image | str | Path, transform: Any) -> tuple[float, float, float, float]:
    """Return the rectangle of a photograph that survives resizing and cropping.

    Args:
        image: The photograph, or its path.
        transform: A composition of torchvision, timm or open_clip transforms.

    Returns:
        Left, top, right, bottom in pixels of the photograph. Outside of it where the transform pads.
    """
    opened = open_image(image)
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
