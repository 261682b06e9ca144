"""The optimisation: Adam on batches, from the best start, until images held out gain no more.

An epoch that gains nothing is taken back, and the rate lowered. What an epoch does depends on the seed, its number and
the maps only, so that a fit that was ended goes on as if it had not been, bit for bit.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens import storage
from vitdecomp_lens.clip.checkpoints import Checkpoint, FitProgress, Schedule, State
from vitdecomp_lens.clip.coordinates import Coordinates
from vitdecomp_lens.clip.moments import RANK_TOLERANCE, Spans, spans_of
from vitdecomp_lens.clip.objective import METHODS, Objective, retract
from vitdecomp_lens.clip.separating import SpanMaps, separated
from vitdecomp_lens.clip.sources import AlignmentSource, Summed, held_out_mask
from vitdecomp_lens.clip.starting import starts
from vitdecomp_lens.errors import InputError, near_matches

MAX_BYTES = 2 << 30
_ENOUGH = 2e-4  # a smaller relative gain is none
_LOWER = 0.5  # times the rate, after an epoch that gained nothing
_LEAST = {"seed": -(2**63), "epochs": 0, "batch_size": 1, "patience": 1, "max_rank": 1, "max_bytes": 1}


@dataclass(frozen=True)
class FitOptions:
    """What decides a fit, beside the images; see `vitdecomp_lens.clip.alignment.Aligner.fit_stream`.

    Raises:
        InputError: Where an option cannot be used.
    """

    method: str = "compalign"
    penalty: int | float = 1.0
    seed: int = 0
    epochs: int = 60
    batch_size: int | None = None
    learning_rate: float | None = None
    patience: int = 4
    rank_tolerance: int | float = RANK_TOLERANCE
    max_rank: int | None = None
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"There is no method {self.method!r} of alignment; {near_matches(self.method, METHODS)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and least <= value < 2**63
            self._expect(whole or value is getattr(FitOptions, name), name, f"a whole number of at least {least}")
        # So that what is not a number is refused too. No entry of an isometry is above 1, and Adam steps by its rate.
        rate = self.learning_rate
        self._expect(rate is None or 0 < rate <= 1, "learning_rate", "above 0 and at most 1")
        self._expect(0 <= self.penalty <= 1e6, "penalty", "of at least 0 and at most 1e6")
        self._expect(0 <= self.rank_tolerance < 1, "rank_tolerance", "of at least 0 and below 1")

    def _expect(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise InputError(f"Expected {name}= {what}; got {getattr(self, name)!r}.")

    def schedule(self, fitted: int, d_clip: int) -> Schedule:
        """How long and in which steps to optimise.

        A batch is a thirty-second of the images, from 32 to 1,024; Adam's rate a fiftieth of 1/√d_clip, the size of a
        typical entry of an isometry.
        """
        batch = min(max(fitted // 32, 32), 1024) if self.batch_size is None else self.batch_size
        rate = 0.02 / math.sqrt(d_clip) if self.learning_rate is None else self.learning_rate
        return Schedule(self.epochs, batch, rate, self.patience, self.seed)


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a fit has found.

    Attributes:
        maps: The components' spans, and their maps.
        bias: Of the sum.
        held_out: Which images were kept for choosing.
        how: Options and outcome, in what JSON holds.
    """

    maps: SpanMaps
    bias: Float[Tensor, "d_clip"]
    held_out: Tensor
    how: dict[str, Any]


def fitted(
    source: AlignmentSource,
    options: FitOptions,
    *,
    held_out: int | float | Sequence[int] | Tensor,
    checkpoint: str | os.PathLike[str] | None,
    progress: Callable[[FitProgress], None] | None,
) -> Fitted:
    """Spans, coordinates, a start and Adam, one after the other; from the checkpoint, where there is one."""
    mask = held_out_mask(source.count, held_out, options.seed)
    summed = Summed(source) if options.method == "shared" else source
    kept = Checkpoint(checkpoint, _identity(source, options, mask))
    found = kept.read()
    spans = found[1] if found else _spans(summed, mask, options)
    coordinates = Coordinates(summed, spans, mask, max_bytes=options.max_bytes, seed=options.seed)
    schedule = options.schedule(coordinates.fitted, coordinates.held.units.shape[1])
    objective = _objective(options, coordinates)

    def tell(state: State) -> None:
        if progress is not None:
            progress(state.progress(options.epochs))

    def keep_and_tell(state: State) -> None:
        kept.write(state, coordinates)
        tell(state)

    if found:
        kept.refuse_other_images(coordinates, found[2])
        state = found[0].to(coordinates.held.rows.device)
    else:
        candidates = starts(objective, coordinates, options.max_bytes)
        state = best_start(candidates, objective, coordinates, schedule.learning_rate, better=tell)
        kept.write(state, coordinates)
    optimise(state, objective, coordinates, schedule, after_epoch=keep_and_tell)
    how = asdict(options) | {"images": source.count, "held_out": int(mask.sum())}
    how |= {"epochs": state.epoch, "start": state.start, "history": state.history}
    maps, bias = separated(coordinates, state.best)
    return Fitted(maps, bias, mask, how)


def _identity(source: AlignmentSource, options: FitOptions, mask: Tensor) -> dict[str, Any]:
    """What has to be the same for a fit to go on: all but how long."""
    same = asdict(options) | {"space": source.space, "metadata": dict(source.metadata), "images": source.count}
    del same["epochs"]
    held_out = hashlib.sha256(bytes(mask.tolist())).hexdigest()
    return same | {"components": storage.pack_components(source.components), "held_out": held_out}


def _spans(source: AlignmentSource, mask: Tensor, options: FitOptions) -> Spans:
    return spans_of(
        source,
        mask,
        tolerance=options.rank_tolerance,
        max_rank=options.max_rank,
        max_bytes=options.max_bytes,
        seed=options.seed,
    )


def _objective(options: FitOptions, coordinates: Coordinates) -> Objective:
    spans, d_clip = coordinates.spans, coordinates.held.units.shape[1]
    return Objective(options.method, options.penalty, spans.layout, len(spans.basis), d_clip)


@torch.no_grad()
def best_start(
    candidates: Iterable[tuple[str, Tensor]],
    objective: Objective,
    coordinates: Coordinates,
    rate: float,
    *,
    better: Callable[[State], None],
) -> State:
    """The candidate of least objective over the images held out; of isometries only, where only they are allowed.

    ``better`` is called with the first, and with each that is better than those before.
    """
    found: State | None = None
    for name, maps in candidates:
        if objective.method == "orthogonal" and not name.startswith("isometries"):
            continue
        maps = maps.to(coordinates.held.rows)
        entry = _held_out(objective, maps, coordinates)
        if found is None or sum(entry) < found.least:
            found = State(maps, maps.clone(), name, rate, [entry])
            better(found)
    assert found is not None  # least squares always gives one, and isometries are made from it
    return found


def _held_out(objective: Objective, maps: Tensor, coordinates: Coordinates) -> tuple[float, float]:
    distance, penalty = objective(maps, coordinates.held.rows, coordinates.held.units)
    return float(distance), float(penalty)


def optimise(
    state: State,
    objective: Objective,
    coordinates: Coordinates,
    schedule: Schedule,
    *,
    after_epoch: Callable[[State], None],
) -> None:
    """Bring the state to the end of its schedule; ``after_epoch`` is called with it after each epoch."""
    while not state.finished(schedule, objective.least):
        _epoch(state, objective, coordinates, schedule)
        with torch.no_grad():
            entry = _held_out(objective, state.maps, coordinates)
        least, state.epoch = state.least, state.epoch + 1
        state.history.append(entry)
        gained = sum(entry) < least - _ENOUGH * (least - objective.least)
        if sum(entry) < least:
            state.best = state.maps.clone()
        state.stale = 0 if gained else state.stale + 1
        if not gained:
            state.maps, state.adam, state.rate = state.best.clone(), {}, state.rate * _LOWER
        after_epoch(state)


def _epoch(state: State, objective: Objective, coordinates: Coordinates, schedule: Schedule) -> None:
    maps = state.maps.detach().clone().requires_grad_()
    adam = torch.optim.Adam([maps], lr=state.rate)
    if state.adam:
        adam.state[maps] = {name: tensor.clone() for name, tensor in state.adam.items()}
    for number, (window, fitted_rows) in enumerate(coordinates.windows()):
        order = torch.randperm(len(fitted_rows), generator=_chance(schedule.seed, state.epoch, number))
        for picked in fitted_rows[order.to(maps.device)].split(schedule.batch_size):
            with torch.enable_grad():
                distance, penalty = objective(maps, window.rows[picked], window.units[picked])
                (distance + penalty).backward()
            adam.step()
            adam.zero_grad()
            if objective.method == "orthogonal":
                with torch.no_grad():
                    retract(maps[:-1], objective.layout)
    state.maps = maps.detach()
    if objective.method == "orthogonal":
        retract(state.maps[:-1], objective.layout, exactly=True)
    state.adam = dict(adam.state[maps])


def _chance(*numbers: int) -> torch.Generator:
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
