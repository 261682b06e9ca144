"""What fitting an aligner costs: wall time to the loss on held-out images that the paper's recipe reaches.

    python benchmarks/alignment.py --size testbed          # contributions of the testbed's deit to 8,000 scenes
    python benchmarks/alignment.py --size vit_b --json out.json
    python benchmarks/alignment.py --parts parts.safetensors --targets targets.safetensors

The recipe (arXiv 2406.01583, section 4, and its code): maps of all d_rep dimensions that start at 0.02 N(0, 1), one
bias, Adam with a rate of 3e-4 and a weight decay of 1e-6, batches of 32, two epochs; its loss is
1 − cos + Σ‖WᵀW − I‖² / (N d_clip). It runs first, in the same process, on the same images; its clock runs in its steps
only, not while a batch is made or images held out are looked at. An aligner's clock runs from the first byte read until
its loss on images held out is at most the recipe's, what it takes to evaluate them on the way among it; and, told
beside it, until both terms are at most the recipe's. The second term is for "compalign" the one on the components'
spans, for "compalign_paper" the recipe's own. Before both, a step of the recipe and a fit to a few images are run that
no clock sees. Times are medians over rounds.

Where the recipe would take too long (--size vit_b: 80 minutes), it runs for --minutes. Its steps cost the same from
the first to the last, so that its time is told by those that ran. What its loss comes to in the end is not known, but
is bounded from below, if the loss goes on to fall ever more slowly: by the straight line through the last two
measurements. The aligner's time to *that* loss (the sum of both terms), over the recipe's whole time, is what is
printed: the true ratio is smaller. Beside it stands what was measured on both sides alone: the time to the loss that
the recipe had when it was stopped, over the time that it had run.

Contributions are those of the testbed's deit to training scenes, with the testbed's CLIP for targets; or planted (the
maps are known, with noise); or a stored decomposition with its targets. Planted ones are kept as coordinates of their
spans, and made where they are read: 1 GB in place of 10 for a ViT-B's size; making them counts for the aligner.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cost import machine
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vitdecomp_lens import Decomposition, decompose, testbed
from vitdecomp_lens.clip.alignment import Aligner, FitProgress
from vitdecomp_lens.clip.moments import RANK_TOLERANCE, Spans, spans_of
from vitdecomp_lens.clip.objective import Objective
from vitdecomp_lens.clip.sources import held_out_mask
from vitdecomp_lens.components import Component
from vitdecomp_lens.testbed.planted import planted_maps

SIZES: dict[str, dict[str, Any]] = {
    "testbed": {"images": 8000},
    "vit_b": {"images": 20_000, "components": 157, "d_rep": 768, "d_clip": 512, "d_head": 64},
}
MINUTES = {"testbed": 60.0, "vit_b": 10.0}
ROUNDS = {"testbed": 9, "vit_b": 1}
METHODS = ("compalign", "compalign_paper")
BATCH, EPOCHS, RATE, DECAY, SCALE = 32, 2, 3e-4, 1e-6, 0.02
LOOKS = 12  # at images held out, while the recipe runs
CHUNK, MADE, DRAWN = 1024, 256, 1000  # images that are read at a time (as from memory); made; and planted


@dataclass(frozen=True)
class Images:
    """Contributions as coordinates of spans, and targets: an `AlignmentSource`."""

    codes: Tensor  # [component, batch, rank]
    spans: Tensor | None  # [component, d_rep, rank]; none where codes are contributions
    targets: Tensor
    components: tuple[Component, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    space: str | None = None

    @classmethod
    def planted(cls, *, images: int, noise: float, seed: int, **size: int) -> "Images":
        """Planted maps, a few images at a time."""
        codes, targets = [], []
        for draw, first in enumerate(range(0, images, DRAWN)):
            found = planted_maps(images=min(DRAWN, images - first), noise=noise, seed=seed, draw=draw, **size)
            codes.append(found.parts.values @ found.spans)
            targets.append(found.targets)
        return cls(torch.cat(codes, 1), found.spans, torch.cat(targets), tuple(found.parts.components))

    @classmethod
    def of_testbed(cls, *, images: int, seed: int) -> "Images":
        """What the testbed's deit writes, and its CLIP says, of training scenes."""
        model, clip = testbed.load("deit"), testbed.load_original("clip")
        scenes, found, targets = testbed.Scenes("train", seed=seed, size=images), [], []
        for first in range(0, images, DRAWN):
            batch = testbed.normalised(scenes.images(range(first, min(first + DRAWN, images))))
            found.append(decompose(model, batch, by="head"))
            with torch.no_grad():
                targets.append(clip.encode_image(batch))
        parts = Decomposition.cat(found)
        return cls(parts.values, None, torch.cat(targets), tuple(parts.components))

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.targets)

    def values(self, picked: Tensor | slice) -> Tensor:
        """The contributions to some images."""
        codes = self.codes[:, picked]
        return codes if self.spans is None else codes @ self.spans.mT

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them, in pieces."""
        chunk = CHUNK if self.spans is None else MADE
        for first in range(0, self.count, chunk):
            rows = slice(first, first + chunk)
            yield self.values(rows), self.targets[rows]

    def first(self, count: int) -> "Images":
        """A few of them."""
        return Images(self.codes[:, :count], self.spans, self.targets[:count], self.components)

    def to(self, device: torch.device) -> "Images":
        """The same on another device."""
        spans = None if self.spans is None else self.spans.to(device)
        return Images(self.codes.to(device), spans, self.targets.to(device), self.components)


@dataclass(frozen=True)
class Look:
    """What the recipe had come to, and when."""

    steps: int
    seconds: float
    cosine_distance: float
    penalty: dict[str, float]  # of each method

    def loss(self, method: str) -> float:
        """The sum of both terms."""
        return self.cosine_distance + self.penalty[method]


@dataclass(frozen=True)
class Recipe:
    """What the paper's recipe comes to."""

    looks: list[Look]
    steps: int  # that it has in all

    @property
    def last(self) -> Look:
        """Where it ended."""
        return self.looks[-1]

    @property
    def complete(self) -> bool:
        """Whether it ran to its end."""
        return self.last.steps == self.steps

    @property
    def seconds(self) -> float:
        """Of all its steps, by those that ran."""
        return self.last.seconds / self.last.steps * self.steps

    def least_loss(self, method: str) -> float:
        """What its loss comes to at least in the end: it is measured, or on the line through the last two looks."""
        if self.complete:
            return self.last.loss(method)
        before, last = self.looks[-2:]
        slope = (last.loss(method) - before.loss(method)) / (last.steps - before.steps)
        return last.loss(method) + min(slope, 0.0) * (self.steps - last.steps)


def recipe_loss(values: Tensor, targets: Tensor, maps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the loss, as the paper's code has them."""
    aligned = torch.einsum("cbr,crd->bd", values, maps) + bias
    gram = maps.mT @ maps
    penalty = (gram - torch.eye(maps.shape[2], device=maps.device)).square().sum() / (len(maps) * maps.shape[2])
    return 1 - cosine_similarity(aligned, targets, dim=-1).mean(), penalty


def run_recipe(
    images: Images, held_out: Tensor, spans: Spans, seed: int, *, minutes: float, epochs: int = EPOCHS
) -> Recipe:
    """Fit by the recipe for some time, and measure on the images held out now and then."""
    chance = torch.Generator().manual_seed(seed)
    device = images.targets.device
    shape = (len(images.codes), len(spans.basis), images.targets.shape[1])
    maps = (SCALE * torch.randn(shape, generator=chance)).to(device).requires_grad_()
    bias = torch.zeros(shape[2], device=device, requires_grad=True)
    adam = torch.optim.Adam([maps, bias], lr=RATE, weight_decay=DECAY)
    fitted = torch.nonzero(~held_out)[:, 0]
    orders = [fitted[torch.randperm(len(fitted), generator=chance)].split(BATCH) for _ in range(epochs)]
    batches = [picked for order in orders for picked in order]
    looks: list[Look] = []
    seconds = 0.0
    for step, picked in enumerate(batches, 1):
        values, targets = images.values(picked.to(device)), images.targets[picked.to(device)]
        _wait(values)
        start = time.perf_counter()
        adam.zero_grad()
        sum(recipe_loss(values, targets, maps, bias)).backward()
        adam.step()
        _wait(values)
        seconds += time.perf_counter() - start
        over = seconds > 60 * minutes and len(looks) > 0
        if over or step == len(batches) or step % max(1, len(batches) // LOOKS) == 0 or _due(looks, seconds, minutes):
            looks.append(_look(images, held_out, spans, maps.detach(), bias.detach(), step, seconds))
        if over:
            break
    return Recipe(looks, len(batches))


def _due(looks: list[Look], seconds: float, minutes: float) -> bool:
    """Whether a part of the time that it has is over since the last look."""
    return seconds - (looks[-1].seconds if looks else 0.0) > 60 * minutes / LOOKS


def _look(
    images: Images, held_out: Tensor, spans: Spans, maps: Tensor, bias: Tensor, step: int, seconds: float
) -> Look:
    held = torch.nonzero(held_out)[:, 0].to(maps.device).split(MADE)
    total = 0.0
    with torch.no_grad():
        for picked in held:
            aligned = torch.einsum("cbr,crd->bd", images.values(picked), maps) + bias
            total += float((1 - cosine_similarity(aligned, images.targets[picked], dim=-1)).sum())
        penalties = {
            "compalign": on_spans(maps, spans),
            "compalign_paper": float(recipe_loss(images.values(held[0]), images.targets[held[0]], maps, bias)[1]),
        }
    return Look(step, seconds, total / int(held_out.sum()), penalties)


def on_spans(maps: Tensor, spans: Spans) -> float:
    """The recipe's maps on the spans of what an aligner has maps for: how far they are from isometries."""
    layout, pieces = spans.layout, []
    for part in layout.order:
        basis, rows = spans.basis[:, layout.slices[part]].to(maps), spans.members[part]
        if len(rows) == 1:
            pieces.append(basis.T @ maps[rows[0]])
            continue
        group = next(one for one in spans.inseparable if one.rows == rows)
        vectors = group.vectors.to(maps)  # their sum goes to the sum of where they go
        image = torch.einsum("md,mde->e", vectors, maps[list(rows)])
        pieces.append(image[None] / vectors.sum(0).norm())
    stack = torch.cat([*pieces, maps.new_zeros(1, maps.shape[2])])
    return float(Objective("compalign", 1.0, layout, len(spans.basis), maps.shape[2]).deviation(stack))


def run_aligner(images: Images, held_out: Tensor, method: str, **options: Any) -> dict[str, Any]:
    """Fit an aligner; what it had come to, and when."""
    told: list[tuple[float, FitProgress]] = []

    def tell(progress: FitProgress) -> None:
        _wait(images.targets)
        told.append((time.perf_counter() - start, progress))

    _wait(images.targets)
    start = time.perf_counter()
    Aligner.fit_stream(images, method=method, held_out=held_out, progress=tell, **options)
    _wait(images.targets)
    return {"seconds": time.perf_counter() - start, "told": told}


def reached(found: dict[str, Any], good_enough: Callable[[FitProgress], bool]) -> float | None:
    """The time when it was."""
    return next((seconds for seconds, progress in found["told"] if good_enough(progress)), None)


def warm_up(images: Images, spans: Spans, seed: int) -> None:
    """What is slow only the first time: one step of the recipe, and an aligner of a few images."""
    few = images.first(2 * BATCH)
    held_out = torch.arange(few.count) >= min(BATCH, few.count // 2)
    run_recipe(few, held_out, spans, seed, minutes=1.0, epochs=1)
    for method in METHODS:
        run_aligner(few, held_out, method, epochs=1, max_rank=8)


def measure(images: Images, *, rounds: int, minutes: float, seed: int) -> list[dict[str, Any]]:
    """One row for each method, with the recipe beside it."""
    held_out = held_out_mask(images.count, 0.1, seed)
    spans = spans_of(images, held_out, tolerance=RANK_TOLERANCE, max_rank=None, max_bytes=2 << 30, seed=seed)
    warm_up(images, spans, seed)
    recipe = run_recipe(images, held_out, spans, seed, minutes=minutes)
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        found = [run_aligner(images, held_out, method) for _ in range(rounds)]
        whole = [one["seconds"] for one in found]
        end = min((progress for _, progress in found[0]["told"]), key=lambda progress: progress.objective)
        least, partly = recipe.least_loss(method), recipe.last.loss(method)
        distance, penalty = recipe.last.cosine_distance, recipe.last.penalty[method]
        rows.append(
            {
                "method": method,
                "recipe": {
                    "complete": recipe.complete,
                    "steps": [recipe.last.steps, recipe.steps],
                    "seconds": recipe.seconds,
                    "seconds that it ran": recipe.last.seconds,
                    "cosine_distance": distance,
                    "penalty": penalty,
                    "least loss in the end": least,
                    "looks": [[look.steps, look.seconds, look.loss(method)] for look in recipe.looks],
                },
                "rounds": rounds,
                "to the recipe's loss": _times(found, lambda p, most=least: p.objective <= most, recipe.seconds),
                "to both of its terms": _times(
                    found,
                    lambda p, d=distance, q=penalty: p.cosine_distance <= d and p.penalty <= q,
                    recipe.last.seconds,
                ),
                "to where it was stopped": _times(
                    found, lambda p, most=partly: p.objective <= most, recipe.last.seconds
                ),
                "seconds": statistics.median(whole),
                "spread": [min(whole), max(whole)],
                "cosine_distance": end.cosine_distance,
                "penalty": end.penalty,
                "start": end.start,
                "epochs": found[0]["told"][-1][1].epoch,
            }
        )
    return rows


def _times(found: list[dict[str, Any]], good_enough: Callable[[FitProgress], bool], of: float) -> dict[str, Any] | None:
    """When it was as good, over rounds, and as a share of the recipe's time; None where it never was."""
    times = [time for one in found if (time := reached(one, good_enough)) is not None]
    if len(times) < len(found):
        return None
    median = statistics.median(times)
    return {"seconds": median, "spread": [min(times), max(times)], "ratio": median / of}


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for people."""
    shown = Table(title="wall time to the recipe's loss on images held out")
    for column in (
        "method",
        "recipe",
        "its distance, penalty",
        "time to its loss",
        "to both terms",
        "to where it was stopped",
    ):
        shown.add_column(column)
    shown.add_column("whole fit")
    shown.add_column("distance, penalty")
    for row in rows:
        recipe = row["recipe"]
        done, steps = recipe["steps"]
        ran = "" if recipe["complete"] else f" ({done} of {steps} steps: {recipe['seconds that it ran']:.0f} s)"
        end = "" if recipe["complete"] else f"; in the end at least {recipe['least loss in the end']:.4f}"
        shown.add_row(
            row["method"],
            f"{recipe['seconds']:.2f} s{ran}",
            f"{recipe['cosine_distance']:.4f}, {recipe['penalty']:.4f}{end}",
            _told(row["to the recipe's loss"]),
            _told(row["to both of its terms"]) if recipe["complete"] else "",
            "" if recipe["complete"] else _told(row["to where it was stopped"]),
            f"{_seconds(row['seconds'], row['spread'])}, {row['epochs']} epochs",
            f"{row['cosine_distance']:.4f}, {row['penalty']:.4f}",
        )
    return shown


def _told(times: dict[str, Any] | None) -> str:
    return "never" if times is None else f"{_seconds(times['seconds'], times['spread'])}: {times['ratio']:.3f}"


def _seconds(median: float, spread: list[float]) -> str:
    return f"{median:.2f} s ({spread[0]:.2f} to {spread[1]:.2f})"


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="testbed")
    parser.add_argument("--images", type=int, help="in place of the size's")
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--parts", type=Path, help="a stored Decomposition, in place of a planted one")
    parser.add_argument("--targets", type=Path, help="a safetensors file with its targets, named 'targets'")
    parser.add_argument("--rounds", type=int, help="of each aligner (9; of a ViT-B's size 1); the recipe runs once")
    parser.add_argument("--minutes", type=float, help="of the recipe's at most (60; of a ViT-B's size 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here, with machine and versions")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.parts:
        parts, targets = Decomposition.load(options.parts), load_file(options.targets)["targets"]
        images = Images(parts.values, None, targets, tuple(parts.components))
    else:
        size = SIZES[options.size] | ({"images": options.images} if options.images else {})
        if options.size == "testbed":
            images = Images.of_testbed(**size, seed=options.seed)
        else:
            images = Images.planted(**size, noise=options.noise, seed=options.seed)
    rounds = ROUNDS[options.size] if options.rounds is None else options.rounds
    minutes = MINUTES[options.size] if options.minutes is None else options.minutes
    rows = measure(images.to(device), rounds=rounds, minutes=minutes, seed=options.seed)
    d_rep = images.values(slice(1)).shape[2]
    shape = {"component": len(images.codes), "batch": images.count, "d_rep": d_rep, "d_clip": images.targets.shape[1]}
    Console(width=180).print(table(rows), shape, machine(device))
    if options.json:
        found = {"machine": machine(device), "of": str(options.parts or options.size), "shape": shape, "results": rows}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
