"""Images under the shape that tools for text ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """A batch of images that says how many tokens each becomes: for tools that count tokens off their input.

    A hooked model takes it wherever it takes images. Make it with ``model.to_tokens(images)``.

    Attributes:
        images: The batch.
        tokens: How many tokens an image has, prefix tokens among them.

    Example:
        >>> handle = ImageTokens(torch.zeros(4, 3, 32, 32), 17)
        >>> handle.shape, handle[1:3].shape
        (torch.Size([4, 17]), torch.Size([2, 17]))
    """

    images: Float[Tensor, "batch channel height width"]
    tokens: int
    ndim: ClassVar[int] = 2
    dtype: ClassVar[torch.dtype] = torch.int64  # what tools that check ask tokens to be

    @property
    def shape(self) -> torch.Size:
        """Images and tokens."""
        return torch.Size((len(self.images), self.tokens))

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def to(self, device: torch.device | str) -> "ImageTokens":
        """The same images elsewhere."""
        return ImageTokens(self.images.to(device), self.tokens)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> "ImageTokens":
        """Some of the images."""
        return ImageTokens(self.images[index], self.tokens)

    def __eq__(self, other: object) -> "Bool[Tensor, 'batch pixel']":  # type: ignore[override]
        """Where pixels are equal, as tools compare tokens."""
        if not isinstance(other, ImageTokens):
            return NotImplemented
        return self.images.flatten(1) == other.images.flatten(1)

    __hash__ = None  # type: ignore[assignment]
