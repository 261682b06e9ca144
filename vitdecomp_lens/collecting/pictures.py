"""Pictures before a model sees them: opening one, naming one by its content, and preprocessing many fast."""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked.preprocess import open_upright

# What readers of files raise for damaged ones.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
Preprocess = Callable[[list[Image.Image]], Tensor]


@dataclass(frozen=True)
class Unreadable:
    """What stands in place of a picture that cannot be read."""

    reason: str


Picture = Image.Image | Tensor | Path | bytes | Unreadable


def content_hash(picture: Picture) -> str:
    """A name for a picture by what is in it, the same wherever it comes from: a file by its bytes.

    >>> content_hash(b"a picture") == content_hash(b"a picture"), len(content_hash(b"a picture"))
    (True, 32)
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(picture, Image.Image):
        digest.update(f"{picture.mode} {picture.size}".encode())
        digest.update(picture.tobytes())
    elif isinstance(picture, Tensor):
        digest.update(f"{picture.dtype} {tuple(picture.shape)}".encode())
        digest.update(picture.detach().cpu().contiguous().numpy().tobytes())
    elif isinstance(picture, bytes | Path):
        digest.update(picture if isinstance(picture, bytes) else picture.read_bytes())
    else:
        raise InputError(picture.reason)
    return digest.hexdigest()


def opened(picture: Picture) -> Image.Image | UInt8[Tensor, "3 height width"]:
    """A picture in RGB, upright; tensors of bytes are taken as they are.

    Raises:
        InputError: If it cannot be read.
    """
    if isinstance(picture, Tensor):
        return picture
    if isinstance(picture, Unreadable):
        raise InputError(picture.reason)
    if isinstance(picture, Image.Image):
        return open_upright(picture)
    try:
        with Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture) as file:
            return open_upright(file)
    except DAMAGED as error:
        raise InputError(str(error)) from error


def check_bytes(picture: Picture, name: str) -> None:
    """Refuse tensors that are no bytes: another image would not help.

    Raises:
        InputError: Naming the image.
    """
    if isinstance(picture, Tensor) and (picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) != 3):
        raise InputError(
            f'Expected pictures, or tensors UInt8[Tensor, "3 height width"], because every model has a transform of '
            f"its own; image {name!r} is {tuple(picture.shape)} of {picture.dtype}. Make the data set without its own."
        )


class Preprocessor:
    """A model's preprocessing of pictures, with a short way for those that have the model's size already.

    Evaluation transforms do not resample such a picture, so that every byte becomes a number that depends on its
    channel only: a table of 3 × 256, read off the transform itself. Where two pictures show that it does more (crops,
    say), there is no table.

    Args:
        preprocess: From PIL images to a batch, such as ``model.preprocess``.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self._preprocess = preprocess
        self.size = tuple(preprocess([Image.new("RGB", (256, 256))]).shape[-2:])
        self._table = self._found()

    def _found(self) -> Float[Tensor, "3 256"] | None:
        height, width = self.size
        if height * width < 256:
            return None
        level = torch.arange(height * width, dtype=torch.int64).remainder(256).to(torch.uint8)
        levels = level.reshape(1, height, width).expand(3, -1, -1)
        values = self._preprocess([_as_image(levels)])
        if values.shape[1:] != (3, height, width):
            return None
        table = values[0].flatten(1)[:, :256].contiguous()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        for picture, known in ((levels, values), (noise, self._preprocess([_as_image(noise)]))):
            if not torch.equal(_looked_up(table, picture[None]), known):
                return None
        return table

    @property
    def fingerprint(self) -> str:
        """A hash of what becomes of one picture, to tell transforms apart."""
        x = np.arange(96 * 64 * 3, dtype=np.int64)
        picture = Image.fromarray((x * x // 7 % 251).astype(np.uint8).reshape(64, 96, 3))
        values = self._preprocess([picture]).cpu().double()
        return hashlib.blake2b(values.numpy().tobytes(), digest_size=8).hexdigest()

    def takes_bytes_like(self, other: "Preprocessor") -> bool:
        """Whether what `one` gives as bytes becomes the same batch here and there."""
        if self._table is None or other._table is None or self.size != other.size:
            return False
        return self._table.device == other._table.device and torch.equal(self._table, other._table)

    def one(self, picture: Image.Image | Tensor) -> Tensor:
        """One picture: its bytes if the table will do, else what the model takes."""
        if isinstance(picture, Tensor):
            if self._table is not None and tuple(picture.shape[1:]) == self.size:
                return picture
            picture = _as_image(picture)
        if self._table is not None and picture.size == self.size[::-1]:
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return self._preprocess([picture])[0]

    def batch(self, several: Sequence[Tensor]) -> Float[Tensor, "batch channel height width"]:
        """What `one` gave of each, as the model takes it.

        Raises:
            InputError: Where the transform leaves images of several sizes.
        """
        if len({tuple(image.shape) for image in several}) > 1:
            raise InputError(
                f"Expected a transform that makes all images one size; got "
                f"{' and '.join(map(str, sorted({tuple(image.shape[1:]) for image in several})[:2]))}."
            )
        if self._table is None or any(image.is_floating_point() for image in several):
            return torch.stack([self._numbers(image) for image in several])
        return _looked_up(self._table, torch.stack(list(several)))

    def _numbers(self, image: Tensor) -> Tensor:
        if image.is_floating_point() or self._table is None:
            return image
        return _looked_up(self._table, image[None])[0]


def _looked_up(table: Tensor, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    images = images.to(table.device)
    return torch.stack([of[images[:, channel].long()] for channel, of in enumerate(table)], 1)


def _as_image(picture: UInt8[Tensor, "3 height width"]) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
