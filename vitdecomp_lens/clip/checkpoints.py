"""What changes while an alignment is fitted, and the file from which a fit goes on."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens import storage
from vitdecomp_lens.clip.coordinates import Coordinates
from vitdecomp_lens.clip.inseparable import Inseparable
from vitdecomp_lens.clip.moments import Layout, Spans
from vitdecomp_lens.errors import StoreError

_KIND = "AlignmentCheckpoint"
_NOTHING = 1e-9  # an objective below it is zero but for rounding


@dataclass(frozen=True)
class FitProgress:
    """What a fit has come to.

    Attributes:
        epoch: How many epochs are done; 0 is the start, told whenever a better one is found.
        epochs: How many there are at most.
        cosine_distance: Over the images held out.
        penalty: The second term of the objective, with its weight.
        start: How the maps to start from were found.
    """

    epoch: int
    epochs: int
    cosine_distance: float
    penalty: float
    start: str

    @property
    def objective(self) -> float:
        """What is made small."""
        return self.cosine_distance + self.penalty


@dataclass(frozen=True)
class Schedule:
    """How long and in which steps to optimise.

    Attributes:
        epochs: How often to see all images at most.
        batch_size: How many images a step takes.
        learning_rate: Adam's, to begin with.
        patience: After how many epochs in a row without a gain to end.
        seed: Of the order of images.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    patience: int
    seed: int


@dataclass
class State:
    """Everything that changes while a fit goes on."""

    maps: Float[Tensor, "column d_clip"]
    best: Float[Tensor, "column d_clip"]
    start: str
    rate: float
    history: list[tuple[float, float]]
    epoch: int = 0
    stale: int = 0
    adam: dict[str, Tensor] = field(default_factory=dict)

    @property
    def least(self) -> float:
        """The best objective so far."""
        return min(distance + penalty for distance, penalty in self.history)

    def finished(self, schedule: Schedule, least: float) -> bool:
        """Whether nothing is left to do; ``least`` is what no maps have an objective below."""
        return self.epoch >= schedule.epochs or self.stale >= schedule.patience or self.least - least < _NOTHING

    def to(self, device: torch.device) -> "State":
        """The same on another device."""
        self.maps, self.best = self.maps.to(device), self.best.to(device)
        # Adam counts its steps on the CPU.
        self.adam = {name: t if name == "step" else t.to(device) for name, t in self.adam.items()}
        return self

    def progress(self, epochs: int) -> FitProgress:
        """For whoever is told."""
        return FitProgress(self.epoch, epochs, *self.history[-1], self.start)


@dataclass(frozen=True)
class Checkpoint:
    """A file that a fit writes after every epoch, and from which it goes on.

    Attributes:
        path: Where; None writes nothing.
        settings: What JSON holds of all that decides a fit. A file with other settings is refused.
    """

    path: str | os.PathLike[str] | None
    settings: Mapping[str, Any]

    def write(self, state: State, coordinates: Coordinates) -> None:
        """Replace the file, whole or not at all."""
        if self.path is None:
            return
        spans, digest = coordinates.spans, coordinates.digest
        tensors = {"basis": spans.basis, "maps": state.maps, "best": state.best}
        tensors |= {f"adam.{name}": tensor for name, tensor in state.adam.items()}
        header = {name: getattr(state, name) for name in ("start", "rate", "history", "epoch", "stale")}
        header |= {"ranks": spans.layout.ranks, "members": spans.members, "settings": self.settings, "digest": digest}
        header |= {"inseparable": [[group.rows, group.constant] for group in spans.inseparable]}
        tensors |= {f"inseparable.{number}": group.vectors for number, group in enumerate(spans.inseparable)}
        storage.write(self.path, kind=_KIND, tensors=tensors, header=header)

    def read(self) -> tuple[State, Spans, list[float]] | None:
        """What was written, or None where there is no file yet.

        Raises:
            StoreError: Where the file is damaged, or of a fit with other settings.
        """
        if self.path is None or not Path(self.path).exists():
            return None
        tensors, header = storage.read(self.path, kind=_KIND, needs=("basis", "maps", "best"))
        with storage.restoring(self.path, kind=_KIND):
            settings = storage.as_json("settings", dict(self.settings))
            differ = [name for name in settings if settings[name] != header["settings"].get(name)]
            adam = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("adam.")}
            history = [(distance, penalty) for distance, penalty in header["history"]]
            state = State(tensors["maps"], tensors["best"], header["start"], header["rate"], history)
            state.epoch, state.stale, state.adam = header["epoch"], header["stale"], adam
            spans = _spans(tensors, header)
        if differ:
            raise StoreError(
                f"Expected a checkpoint of this fit at {self.path}; it is of one with another {differ[0]}: "
                f"{header['settings'].get(differ[0])!r}, not {settings[differ[0]]!r}. Give checkpoint= another path."
            )
        return state, spans, header["digest"]

    def refuse_other_images(self, coordinates: Coordinates, written: list[float]) -> None:
        """Raise where the images are not those that the checkpoint was written for.

        Raises:
            StoreError: Then.
        """
        if any(not math.isclose(a, b, rel_tol=1e-5) for a, b in zip(coordinates.digest, written, strict=True)):
            raise StoreError(
                f"Expected the images that the checkpoint at {self.path} was written for; these contributions or "
                f"targets are others. Give checkpoint= another path."
            )


def _spans(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Spans:
    groups = tuple(
        Inseparable(tuple(rows), tensors[f"inseparable.{number}"], constant)
        for number, (rows, constant) in enumerate(header["inseparable"])
    )
    members = tuple(tuple(rows) for rows in header["members"])
    return Spans(Layout(tuple(header["ranks"])), tensors["basis"], members, groups)
