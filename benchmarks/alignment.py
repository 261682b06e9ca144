"""What fitting an aligner costs: wall time to the loss on held-out images that the paper's recipe reaches.

    python benchmarks/alignment.py --size small            # contributions of a testbed model's size
    python benchmarks/alignment.py --size vit_b --json out.json
    python benchmarks/alignment.py --parts parts.safetensors --targets targets.safetensors

The recipe (arXiv 2406.01583, section 4, and its code): maps of all d_rep dimensions that start at 0.02 N(0, 1), one
bias, Adam with a rate of 3e-4 and a weight decay of 1e-6, batches of 32, two epochs; its loss is
1 − cos + Σ‖WᵀW − I‖² / (N d_clip). It runs first, in the same process, on the same images; its clock stops with its
last step, before it is evaluated. An aligner's clock runs from the first byte read until images held out are at least
as good, what it takes to evaluate them on the way among it: for "compalign", in cosine distance and in the penalty on
the components' spans; for "compalign_paper", in the recipe's own loss. Before both, a step of the recipe and a fit to a
few images are run that no clock sees. Times are medians over rounds, with the least and the most.
Contributions are planted (the maps are known, with noise), or a stored decomposition with its targets.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from cost import machine
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vitdecomp_lens import Decomposition
from vitdecomp_lens.clip.alignment import Aligner, FitProgress
from vitdecomp_lens.clip.moments import Layout
from vitdecomp_lens.clip.objective import Objective
from vitdecomp_lens.clip.sources import held_out_mask
from vitdecomp_lens.testbed.planted import planted_maps

SIZES = {
    "small": {"images": 8000, "components": 29, "d_rep": 64, "d_clip": 64, "d_head": 16},
    "vit_b": {"images": 20_000, "components": 157, "d_rep": 768, "d_clip": 512, "d_head": 64},
}
METHODS = ("compalign", "compalign_paper")
BATCH, EPOCHS, RATE, DECAY, SCALE = 32, 2, 3e-4, 1e-6, 0.02


@dataclass
class Recipe:
    """What the paper's recipe comes to."""

    maps: Tensor
    bias: Tensor
    seconds: float
    steps: int
    cosine_distance: float
    penalty: float


def recipe_loss(values: Tensor, targets: Tensor, maps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the loss, as the paper's code has them."""
    aligned = torch.einsum("cbr,crd->bd", values, maps) + bias
    gram = maps.mT @ maps
    penalty = (gram - torch.eye(maps.shape[2], device=maps.device)).square().sum() / (len(maps) * maps.shape[2])
    return 1 - cosine_similarity(aligned, targets, dim=-1).mean(), penalty


def run_recipe(values: Tensor, targets: Tensor, held_out: Tensor, seed: int, *, epochs: int = EPOCHS) -> Recipe:
    """Fit by the recipe, and measure on the images held out."""
    chance = torch.Generator().manual_seed(seed)
    shape = (len(values), values.shape[2], targets.shape[1])
    maps = (SCALE * torch.randn(shape, generator=chance)).to(values.device).requires_grad_()
    bias = torch.zeros(shape[2], device=values.device, requires_grad=True)
    adam = torch.optim.Adam([maps, bias], lr=RATE, weight_decay=DECAY)
    fitted, steps = torch.nonzero(~held_out)[:, 0], 0
    _wait(values)
    start = time.perf_counter()
    for _ in range(epochs):
        for picked in fitted[torch.randperm(len(fitted), generator=chance)].to(values.device).split(BATCH):
            adam.zero_grad()
            sum(recipe_loss(values[:, picked], targets[picked], maps, bias)).backward()
            adam.step()
            steps += 1
    _wait(values)
    seconds = time.perf_counter() - start
    maps, bias = maps.detach(), bias.detach()
    held = torch.nonzero(held_out)[:, 0].to(values.device).split(256)
    terms = [recipe_loss(values[:, picked], targets[picked], maps, bias) for picked in held]
    weights = [len(picked) / int(held_out.sum()) for picked in held]
    distance = sum(weight * float(term[0]) for weight, term in zip(weights, terms, strict=True))
    return Recipe(maps, bias, seconds, steps, distance, float(terms[0][1]))


def on_spans(recipe: Recipe, aligner: Aligner) -> float:
    """The recipe's maps, restricted to the components' spans: how far they are from isometries."""
    layout = Layout(aligner.ranks)
    stack = torch.cat([aligner.basis[:, layout.slices[row]].T @ recipe.maps[row] for row in layout.order])
    objective = Objective("compalign", 1.0, layout, len(aligner.basis), len(aligner.bias))
    return float(objective.deviation(torch.cat([stack, recipe.bias[None]])))


def run_aligner(parts: Decomposition, targets: Tensor, held_out: Tensor, method: str) -> dict[str, object]:
    """Fit an aligner; what it had come to, and when."""
    told: list[tuple[float, FitProgress]] = []

    def tell(progress: FitProgress) -> None:
        _wait(targets)
        told.append((time.perf_counter() - start, progress))

    _wait(targets)
    start = time.perf_counter()
    aligner = Aligner.fit(parts, targets, method=method, held_out=held_out, progress=tell)
    _wait(targets)
    return {"aligner": aligner, "seconds": time.perf_counter() - start, "told": told}


def reached(found: dict, cosine_distance: float, penalty: float, *, together: bool) -> float | None:
    """The time when both were at least as good; or their sum."""
    for seconds, progress in found["told"]:
        if together and progress.objective <= cosine_distance + penalty:
            return seconds
        if not together and progress.cosine_distance <= cosine_distance and progress.penalty <= penalty:
            return seconds
    return None


def warm_up(parts: Decomposition, targets: Tensor, seed: int) -> None:
    """What is slow only the first time: one step of the recipe, and an aligner of a few images."""
    few = range(min(len(targets), 2 * BATCH))
    parts, targets = parts.images(few), targets[: len(few)]
    held_out = torch.arange(len(few)) >= min(BATCH, len(few) // 2)
    run_recipe(parts.values, targets, held_out, seed, epochs=1)
    for method in METHODS:
        Aligner.fit(parts, targets, method=method, held_out=held_out, epochs=1)


def measure(parts: Decomposition, targets: Tensor, rounds: int, seed: int) -> list[dict[str, object]]:
    """One row for each method, with the recipe beside it."""
    warm_up(parts, targets, seed)
    held_out = held_out_mask(len(targets), 0.1, seed)
    recipe = run_recipe(parts.values, targets, held_out, seed)
    rows: list[dict[str, object]] = []
    for method in METHODS:
        found = [run_aligner(parts, targets, held_out, method) for _ in range(rounds)]
        together = method == "compalign_paper"
        penalty = recipe.penalty if together else on_spans(recipe, found[0]["aligner"])
        times = [reached(one, recipe.cosine_distance, penalty, together=together) for one in found]
        whole = [one["seconds"] for one in found]
        last = min((progress for _, progress in found[0]["told"]), key=lambda progress: progress.objective)
        rows.append(
            {
                "method": method,
                "recipe": {"cosine_distance": recipe.cosine_distance, "penalty": penalty, "seconds": recipe.seconds},
                "recipe_steps": recipe.steps,
                "rounds": rounds,
                "seconds_to_recipe": None if None in times else statistics.median(times),
                "spread_to_recipe": None if None in times else [min(times), max(times)],
                "ratio": None if None in times else statistics.median(times) / recipe.seconds,
                "seconds": statistics.median(whole),
                "spread": [min(whole), max(whole)],
                "cosine_distance": last.cosine_distance,
                "penalty": last.penalty,
                "start": last.start,
                "epochs": found[0]["told"][-1][1].epoch,
            }
        )
    return rows


def table(rows: list[dict]) -> Table:
    """The figures for people."""
    shown = Table(title="wall time to the recipe's loss on images held out")
    for column in (
        "method",
        "recipe",
        "its distance, penalty",
        "time to it",
        "ratio",
        "whole fit",
        "distance, penalty",
    ):
        shown.add_column(column)
    for row in rows:
        recipe, reached_at = row["recipe"], row["seconds_to_recipe"]
        shown.add_row(
            row["method"],
            f"{recipe['seconds']:.2f} s",
            f"{recipe['cosine_distance']:.4f}, {recipe['penalty']:.4f}",
            "never" if reached_at is None else _seconds(reached_at, row["spread_to_recipe"]),
            "" if row["ratio"] is None else f"{row['ratio']:.3f}",
            f"{_seconds(row['seconds'], row['spread'])}, {row['epochs']} epochs",
            f"{row['cosine_distance']:.4f}, {row['penalty']:.4f}",
        )
    return shown


def _seconds(median: float, spread: list[float]) -> str:
    return f"{median:.2f} s ({spread[0]:.2f} to {spread[1]:.2f})"


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--images", type=int, help="in place of the size's")
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--parts", type=Path, help="a stored Decomposition, in place of a planted one")
    parser.add_argument("--targets", type=Path, help="a safetensors file with its targets, named 'targets'")
    parser.add_argument("--rounds", type=int, default=3, help="of each aligner; the recipe runs once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here, with machine and versions")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.parts:
        parts, targets = Decomposition.load(options.parts), load_file(options.targets)["targets"]
    else:
        size = SIZES[options.size] | ({"images": options.images} if options.images else {})
        planted = planted_maps(**size, noise=options.noise, seed=options.seed)
        parts, targets = planted.parts, planted.targets
    parts, targets = parts.to(device), targets.to(device)
    rows = measure(parts, targets, options.rounds, options.seed)
    shape = dict(zip(("component", "batch", "d_rep"), parts.values.shape, strict=True))
    Console(width=160).print(table(rows), shape, machine(device))
    if options.json:
        found = {"machine": machine(device), "shape": shape, "noise": options.noise, "results": rows}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
