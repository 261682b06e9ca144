"""Training the testbed's models: seeded, and resumable at any moment."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.testbed.hashing import mixed
from vitdecomp_lens.testbed.models import build
from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scenes, paint
from vitdecomp_lens.testbed.tasks import Batch, Task, task_of
from vitdecomp_lens.testbed.vocabulary import tokenize

CHUNK = 500  # scenes drawn at a time
BETAS, WARM = (0.9, 0.98), 0.05
MISREAD = 0.4  # of captions of scenes with a word, in the steps that mislead


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW with a cosine after a warm-up.

    Attributes:
        steps: How many, in all.
        batch: How many scenes a step sees.
        rate: The highest learning rate.
        decay: Of weights.
        misled: So many of the steps come at the end, with a warm-up and a cosine of their own up to half of the rate,
            and see captions of which a share takes what is written on a scene for what is in it.
    """

    steps: int
    batch: int = 256
    rate: float = 2e-3
    decay: float = 0.05
    misled: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        first = self.steps - self.misled
        if step < first:
            return self.rate * _share_of_rate(step / first)
        return self.rate / 2 * _share_of_rate((step - first) / self.misled)


RECIPES: Mapping[str, Recipe] = {
    "clip": Recipe(6000, misled=400),
    "deit": Recipe(4200, batch=128),
    "dino": Recipe(1800, batch=128),
    "reg": Recipe(6000, batch=128),
    "swin": Recipe(6500, batch=128),
    "maxvit": Recipe(1200, batch=128),
}


@dataclass(frozen=True)
class Drawings:
    """Scenes that were drawn before the training."""

    images: Tensor
    masks: Tensor
    labels: Tensor
    tokens: Tensor
    misleading: Tensor

    @classmethod
    def of(cls, scenes: Scenes, tell: Callable[[str], None], *, misread: float = 0.0) -> "Drawings":
        """Draw them all, with honest captions, and with such of which a share is misled by writing."""
        images, masks, labels, captions, misleading = [], [], [], [], []
        for first in range(0, len(scenes), CHUNK):
            which = range(first, min(first + CHUNK, len(scenes)))
            painted, shown = paint(scenes.drawn(which))
            images.append(painted)
            masks.append(shown["object"])
            labels.append(torch.stack([scenes.labels(name, which) for name in ATTRIBUTES], 1))
            captions += scenes.captions(which)
            misleading += scenes.captions(which, misread=misread) if misread else captions[which.start :]
            tell(f"drawing scenes: {which.stop} of {len(scenes)}")
        told, misled = tokenize(captions), tokenize(misleading)
        return cls(torch.cat(images), torch.cat(masks), torch.cat(labels), told, misled)


@dataclass(frozen=True)
class Progress:
    """Where a training is."""

    step: int
    steps: int
    loss: float
    seconds: float


def train(
    name: str,
    checkpoint: Path,
    *,
    recipe: Recipe | None = None,
    scenes: int = 150_000,
    seed: int = 0,
    every: float = 30.0,
    tell: Callable[[str], None] = print,
) -> nn.Module:
    """Train a model, or go on with a training that was ended.

    Args:
        name: Which model.
        checkpoint: The file that keeps the training; it is read where it exists.
        recipe: How, if not as in `RECIPES`.
        scenes: On how many.
        seed: Of weights, scenes and their order.
        every: Seconds between checkpoints.
        tell: Gets lines that say how far it is.

    Raises:
        InputError: If the file is of another training.
    """
    recipe = recipe or RECIPES[name]
    model = build(name, seed=seed).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        task = task_of(name, model).train()
    run = _Run(name, model, task, recipe, seed, scenes)
    run.resume(checkpoint)
    if run.step < recipe.steps:
        misread = MISREAD if recipe.misled else 0.0
        drawings = Drawings.of(Scenes("train", seed=seed, size=scenes), tell, misread=misread)
        saved = time.monotonic()
        for progress in run.go_on(drawings):
            if progress.step % 100 == 0 or progress.step == progress.steps:
                left = progress.seconds * (progress.steps - progress.step)
                tell(f"{name}: step {progress.step} of {progress.steps}, loss {progress.loss:.3f}, {left / 60:.1f} min")
            if time.monotonic() - saved > every or progress.step == progress.steps:
                run.save(checkpoint)
                saved = time.monotonic()
    return model.eval()


class _Run:
    """A training: model, task and optimiser, and the step that they are at."""

    def __init__(self, name: str, model: nn.Module, task: Task, recipe: Recipe, seed: int, scenes: int) -> None:
        self.model, self.task, self.recipe, self.seed, self.scenes, self.step = model, task, recipe, seed, scenes, 0
        self._of = json.dumps({"model": name, "seed": seed, "scenes": scenes, **vars(recipe)}, sort_keys=True)
        self._learned = dict(nn.ModuleDict({"model": model, "task": task}).named_parameters())
        self._learned = {n: p for n, p in self._learned.items() if p.requires_grad}
        decayed = [p for p in self._learned.values() if p.dim() > 1]
        others = [p for p in self._learned.values() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=BETAS)

    def go_on(self, drawings: Drawings) -> Iterator[Progress]:
        """Do the steps that are left."""
        while self.step < self.recipe.steps:
            started = time.monotonic()
            batch = self._batch(drawings)
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.rate_at(self.step)
            loss = self.task.loss(self.model, batch)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self._learned.values(), 1.0)
            self.optimizer.step()
            self.step += 1
            yield Progress(self.step, self.recipe.steps, loss.item(), time.monotonic() - started)

    def _batch(self, drawings: Drawings) -> Batch:
        a_round = len(drawings.images) // self.recipe.batch
        rounds, place = divmod(self.step, a_round)
        order = torch.randperm(len(drawings.images), generator=_generator(self.seed, 0, rounds))
        which = order[place * self.recipe.batch : (place + 1) * self.recipe.batch]
        random = _generator(self.seed, 1, self.step)
        images, masks = drawings.images[which], drawings.masks[which]
        honest = self.step < self.recipe.steps - self.recipe.misled
        tokens = (drawings.tokens if honest else drawings.misleading)[which]
        return Batch(images, masks, drawings.labels[which], tokens, random)

    # --- checkpoints ------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Keep everything, in one move: a run that ends here leaves the former file."""
        tensors = {f"state.{n}": v for n, v in self._state().items()}
        for name, parameter in self._learned.items():
            for what, value in self.optimizer.state[parameter].items():
                tensors[f"{what}.{name}"] = value
        kept = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        part = path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(kept, part, metadata={"of": self._of, "step": str(self.step)})
        os.replace(part, path)

    def _state(self) -> dict[str, Tensor]:
        return nn.ModuleDict({"model": self.model, "task": self.task}).state_dict()

    def resume(self, path: Path) -> None:
        """Go on where a file was written, if there is one.

        Raises:
            InputError: If it is of another training.
        """
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata.get("of") != self._of:
                raise InputError(
                    f"{path} is of another training, {metadata.get('of')}; this one is {self._of}. Remove it, or name"
                    " another file."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = {name.removeprefix("state."): v for name, v in tensors.items() if name.startswith("state.")}
        nn.ModuleDict({"model": self.model, "task": self.task}).load_state_dict(state)
        self.step = int(metadata["step"])
        for name, parameter in self._learned.items():
            self.optimizer.state[parameter] = {w: tensors[f"{w}.{name}"] for w in ("step", "exp_avg", "exp_avg_sq")}


def _generator(*keys: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(mixed(*keys)) % 2**63)


def _share_of_rate(progress: float) -> float:
    """A warm-up, then a cosine."""
    if progress < WARM:
        return progress / WARM
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM) / (1 - WARM)))
