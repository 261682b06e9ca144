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

    In each view the object is somewhere else, larger or smaller, maybe mirrored, and on another background, the whole
    lighter or darker and slightly tinted. (Crops that know of objects: arXiv 2112.00319; other backgrounds: arXiv
    2103.12719. There masks are estimated, here they are known.) Where the background is the same in both, it is all
    that a small model learns. Colours are kept, since they are to be seen in what is learned. The head normalises over
    the batch, as SimCLR's does: else what is told first, colours, hides what is told later, shapes.
    """

    HIDDEN, NARROW, TEMPERATURE = 256, 64, 0.1
    ZOOM = (0.8, 1.25)  # of an object's sides
    ROOM = 0.98  # of the image's sides, that an object takes at most
    POOL = 2000  # backgrounds

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        assert isinstance(model, VisionTransformer)
        self.head = nn.Sequential(
            nn.Linear(model.num_features, self.HIDDEN, bias=False),
            nn.BatchNorm1d(self.HIDDEN),
            nn.GELU(),
            nn.Linear(self.HIDDEN, self.NARROW, bias=False),
            nn.BatchNorm1d(self.NARROW, affine=False),
        )
        numbers = torch.arange(self.POOL)
        self._grounds = as_bytes(backgrounds(numbers % len(BACKGROUNDS), mixed(0, numbers)), numbers)

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """See the class."""
        views = torch.cat([relit(self._elsewhere(batch), batch.random) for _ in range(2)])
        said = functional.normalize(self.head(model(views)), dim=-1)
        count = len(batch.images)
        alike = (said @ said.T / self.TEMPERATURE).fill_diagonal_(float("-inf"))
        return functional.cross_entropy(alike, torch.arange(2 * count).roll(count))

    def _elsewhere(self, batch: Batch) -> Float[Tensor, "batch 3 height width"]:
        """The objects in other places, on other backgrounds."""
        which = torch.randint(self.POOL, (len(batch.images),), generator=batch.random)
        masks = batch.masks[:, None].float()
        cut = torch.cat([normalised(batch.images) * masks, masks], 1)
        grid = functional.affine_grid(self._moves(batch), list(cut.shape), align_corners=False)
        moved = functional.grid_sample(cut, grid, align_corners=False)
        return moved[:, :3] + (1 - moved[:, 3:]) * normalised(self._grounds[which])

    def _moves(self, batch: Batch) -> Float[Tensor, "batch 2 3"]:
        """Where each place of a view is taken from, so that the whole object is seen."""
        middle, half = _boxes(batch.masks)
        count = len(middle)
        zoom = _drawn(count, *self.ZOOM, batch.random).minimum(self.ROOM / half.amax(1))
        place = _drawn(2 * count, -1.0, 1.0, batch.random).view(count, 2) * (1 - half * zoom[:, None]).clamp(min=0)
        side = torch.ones(count, 2)
        side[:, 0] -= 2 * (_drawn(count, 0.0, 1.0, batch.random) < 0.5).float()  # mirrored, or not
        scale = side / zoom[:, None]
        return torch.cat([torch.diag_embed(scale), (middle - scale * place)[..., None]], 2)


def _boxes(
    masks: Bool[Tensor, "batch height width"],
) -> tuple[Float[Tensor, "batch 2"], Float[Tensor, "batch 2"]]:
    """The middles of objects and half of their sides, across and down, in units in which an image goes from -1 to 1."""
    found = []
    for lines in (masks.any(1), masks.any(2)):
        size = lines.shape[1]
        edges = torch.linspace(-1, 1, size + 1)
        low = torch.where(lines, edges[:-1], 1.0).amin(1)
        high = torch.where(lines, edges[1:], -1.0).amax(1)
        found.append(((low + high) / 2, (high - low) / 2))
    middles, halves = zip(*found, strict=True)
    return torch.stack(middles, 1), torch.stack(halves, 1)


def _drawn(count: int, low: float, high: float, random: torch.Generator) -> Float[Tensor, "count"]:
    return low + (high - low) * torch.rand(count, generator=random)


def relit(
    images: Float[Tensor, "batch 3 height width"], random: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """Images lighter or darker, with more or less contrast, and slightly tinted."""
    count = len(images)
    contrast, light = _drawn(count, 0.7, 1.3, random), _drawn(count, -0.3, 0.3, random)
    tint = _drawn(3 * count, 0.8, 1.2, random).view(count, 3, 1, 1)
    return images * contrast[:, None, None, None] * tint + light[:, None, None, None]


def task_of(name: str, model: nn.Module) -> Task:
    """What a model learns by."""
    if name == "dino":
        return Telling(model)
    return Captioning() if name == "clip" else Naming()
