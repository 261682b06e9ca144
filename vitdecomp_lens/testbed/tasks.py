"""What the testbed's models learn: names of attributes, captions, or which views are of one image."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from vitdecomp_lens.testbed.drawing import BACKGROUNDS, as_bytes, backgrounds
from vitdecomp_lens.testbed.hashing import mixed
from vitdecomp_lens.testbed.models import normalised
from vitdecomp_lens.testbed.scenes import ATTRIBUTES


@dataclass(frozen=True)
class Batch:
    """Scenes for one step.

    Attributes:
        images: As bytes.
        masks: Which pixels show the object.
        labels: Numbers of all attributes, in the order of `ATTRIBUTES`.
        tokens: Of the captions.
        random: For augmentations: seeded by the step, so that a run that was ended goes on as it would have.
    """

    images: UInt8[Tensor, "batch 3 height width"]
    masks: Bool[Tensor, "batch height width"]
    labels: Int[Tensor, "batch attribute"]
    tokens: Int[Tensor, "batch token"]
    random: torch.Generator


class Task(nn.Module, ABC):
    """A loss, with what it needs beside the model."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """What is made small."""


class Naming(Task):
    """One classifier over the classes of all attributes: the mean cross-entropy of the attributes."""

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """See the class."""
        logits = model(normalised(batch.images)).split([len(values) for values in ATTRIBUTES.values()], 1)
        losses = [functional.cross_entropy(scores, batch.labels[:, n]) for n, scores in enumerate(logits)]
        return torch.stack(losses).mean()


class Captioning(Task):
    """CLIP's symmetric contrast of images and captions (arXiv 2103.00020); equal captions are no negatives."""

    MOST = 100.0  # the largest scale, as CLIP's

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """See the class."""
        image, text, scale = model(normalised(batch.images), batch.tokens)[:3]
        logits = scale.clamp(max=self.MOST) * image @ text.T
        same = (batch.tokens[:, None] == batch.tokens[None]).all(-1)
        logits = logits.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool), float("-inf"))
        target = torch.arange(len(logits))
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


class Telling(Task):
    """SimCLR (arXiv 2002.05709): two views of an image find each other among the views of all others. No labels.

    Views are crops, mirrored, lighter or darker, slightly tinted, and on another background each (as in arXiv
    2103.12719): where the background is the same in both, it is all that a small model learns. Colours are kept, since
    they are to be seen in what is learned.
    """

    HIDDEN, NARROW, TEMPERATURE = 256, 64, 0.1
    PART = (0.65, 1.0)  # of a side, that a view shows
    POOL = 2000  # backgrounds

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        assert isinstance(model, VisionTransformer)
        self.head = nn.Sequential(
            nn.Linear(model.num_features, self.HIDDEN), nn.GELU(), nn.Linear(self.HIDDEN, self.NARROW)
        )
        numbers = torch.arange(self.POOL)
        self._grounds = as_bytes(backgrounds(numbers % len(BACKGROUNDS), mixed(0, numbers)), numbers)

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """See the class."""
        views = torch.cat([augmented(self._elsewhere(batch), self.PART, batch.random) for _ in range(2)])
        said = functional.normalize(self.head(model(views)), dim=-1)
        count = len(batch.images)
        alike = (said @ said.T / self.TEMPERATURE).fill_diagonal_(float("-inf"))
        return functional.cross_entropy(alike, torch.arange(2 * count).roll(count))

    def _elsewhere(self, batch: Batch) -> Float[Tensor, "batch 3 height width"]:
        """The objects on other backgrounds."""
        which = torch.randint(self.POOL, (len(batch.images),), generator=batch.random)
        return normalised(torch.where(batch.masks[:, None], batch.images, self._grounds[which]))


def augmented(images: Tensor, part: tuple[float, float], random: torch.Generator) -> Tensor:
    """A crop of each image, resized to its whole, maybe mirrored, lighter or darker, and slightly tinted."""
    count = len(images)

    def drawn(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=random)

    size = drawn(*part)
    mirrored = torch.where(drawn() < 0.5, -1.0, 1.0)
    crop = torch.zeros(count, 2, 3)
    crop[:, 0, 0], crop[:, 1, 1] = size * mirrored, size
    crop[:, 0, 2], crop[:, 1, 2] = drawn(-1.0, 1.0) * (1 - size), drawn(-1.0, 1.0) * (1 - size)
    grid = functional.affine_grid(crop, list(images.shape), align_corners=False)
    views = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    contrast, light = drawn(0.7, 1.3)[:, None, None, None], drawn(-0.3, 0.3)[:, None, None, None]
    tint = 0.8 + 0.4 * torch.rand(count, 3, 1, 1, generator=random)
    return views * contrast * tint + light


def task_of(name: str, model: nn.Module) -> Task:
    """What a model learns by."""
    if name == "dino":
        return Telling(model)
    return Captioning() if name == "clip" else Naming()
