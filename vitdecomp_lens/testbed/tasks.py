"""What the testbed's models learn: names of attributes, captions, or to agree with themselves."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from vitdecomp_lens.testbed.models import normalised
from vitdecomp_lens.testbed.scenes import ATTRIBUTES


@dataclass(frozen=True)
class Batch:
    """Scenes for one step.

    Attributes:
        images: As bytes.
        labels: Numbers of all attributes, in the order of `ATTRIBUTES`.
        tokens: Of the captions.
        random: For augmentations: seeded by the step, so that a run that was ended goes on as it would have.
        progress: How much of the training is done, from 0 to 1.
    """

    images: UInt8[Tensor, "batch 3 height width"]
    labels: Int[Tensor, "batch attribute"]
    tokens: Int[Tensor, "batch token"]
    random: torch.Generator
    progress: float


class Task(nn.Module, ABC):
    """A loss, with what it needs beside the model."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """What is made small."""

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """What follows a step of the optimiser."""


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


class Agreeing(Task):
    """DINO (arXiv 2104.14294): a student agrees with its own running mean on other views of an image. No labels.

    Two large views for both and two small ones for the student; the teacher's outputs are centred and sharpened.
    Colours are kept, since they are to be seen in what is learned.
    """

    OUTPUTS, HIDDEN, NARROW = 256, 256, 64
    STUDENT, TEACHER = 0.1, 0.04  # temperatures
    CENTRE, FIRST_MEAN = 0.9, 0.99
    LARGE, SMALL = (0.6, 1.0), (0.3, 0.6)  # parts of a side

    centre: Tensor
    taught: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        assert isinstance(model, VisionTransformer)
        self.head = nn.Sequential(
            nn.Linear(model.num_features, self.HIDDEN), nn.GELU(), nn.Linear(self.HIDDEN, self.NARROW)
        )
        self.prototypes = nn.Parameter(torch.randn(self.OUTPUTS, self.NARROW))
        self.teacher: nn.Module = copy.deepcopy(model).requires_grad_(False)
        self.teachers_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("taught", self.prototypes.detach().clone())
        self.register_buffer("centre", torch.zeros(self.OUTPUTS))

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """See the class."""
        images = normalised(batch.images)
        views = [augmented(images, part, batch.random) for part in (self.LARGE, self.LARGE, self.SMALL, self.SMALL)]
        said = self._outputs(model, self.head, self.prototypes, torch.cat(views)) / self.STUDENT
        with torch.no_grad():
            taught = self._outputs(self.teacher, self.teachers_head, self.taught, torch.cat(views[:2]))
            target = ((taught - self.centre) / self.TEACHER).softmax(-1).chunk(2)
            self.centre.mul_(self.CENTRE).add_(taught.mean(0), alpha=1 - self.CENTRE)
        students = said.log_softmax(-1).chunk(4)
        losses = [
            -(teacher * student).sum(-1).mean()
            for t, teacher in enumerate(target)
            for s, student in enumerate(students)
            if s != t
        ]
        return torch.stack(losses).mean()

    def _outputs(self, model: nn.Module, head: nn.Module, prototypes: Tensor, views: Tensor) -> Tensor:
        found: Tensor = head(model(views))
        return functional.normalize(found, dim=-1) @ functional.normalize(prototypes, dim=-1).T

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """The teacher is the running mean of students."""
        keep = 1 - (1 - self.FIRST_MEAN) * (1 - batch.progress)
        with torch.no_grad():
            pairs = [
                *zip(self.teacher.parameters(), model.parameters(), strict=True),
                *zip(self.teachers_head.parameters(), self.head.parameters(), strict=True),
                (self.taught, self.prototypes),
            ]
            for mean, now in pairs:
                mean.lerp_(now.detach(), 1 - keep)


def augmented(images: Tensor, part: tuple[float, float], random: torch.Generator) -> Tensor:
    """A crop of each image, resized to its whole, maybe mirrored, lighter or darker."""
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
    return views * contrast + light


def task_of(name: str, model: nn.Module) -> Task:
    """What a model learns by."""
    if name == "dino":
        return Agreeing(model)
    return Captioning() if name == "clip" else Naming()
