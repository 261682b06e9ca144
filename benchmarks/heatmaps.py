"""What heatmaps cost: 100 texts' for a batch, as multiples of the plain forward; in one process a model, interleaved.

    python benchmarks/heatmaps.py                   # the models of the table
    python benchmarks/heatmaps.py deit_base_patch16_224 --rounds 9 --json heatmaps.json

A round runs the plain forward, the heatmaps, and the plain forward again, whose ratio to the first is the noise. A
ratio is the median over rounds of times in the same round: by the clock, and of the processor's time, which other
programs disturb less. Weights are random and moved off their initial values; they do not matter for cost.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cost import image_size, machine, make, peak_bytes
from rich.console import Console
from rich.table import Table

from vitdecomp_lens.applications import heatmap
from vitdecomp_lens.clip import TextBank

MODELS = ("deit_base_patch16_224", "vit_base_patch16_siglip_gap_224")
TEXTS = 100
BAR = 1.15


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and of the processor; what came out is freed outside."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = time.perf_counter() - clock, time.process_time() - processor
    del result
    return spent


def measure(name: str, batch: int, rounds: int, device: torch.device) -> dict[str, object]:
    """All figures of one model."""
    model = make(name).to(device)
    images = torch.rand(batch, *image_size(model), device=device)
    with torch.no_grad():
        _, cache = model.run_with_cache(images[:1], names_filter="hook_representation")
        width = cache["hook_representation"].shape[1]
        directions = torch.randn(TEXTS, width, device=device)
        bank = TextBank([f"text {number}" for number in range(TEXTS)], directions, space="drawn")
        works: dict[str, Callable[[], object]] = {
            "plain": lambda: model.original(images),
            "heatmaps": lambda: heatmap.of_texts(model, images, bank, against=bank),
            "plain again": lambda: model.original(images),
        }
        for work in works.values():  # the first call traces the model
            work()
        times: dict[str, list[tuple[float, float]]] = {work: [] for work in works}
        for _ in range(rounds):
            for work, run in works.items():
                times[work].append(timed(run, device))
        memory = {work: peak_bytes(works[work], device) for work in ("plain", "heatmaps")}
    found: dict[str, object] = {"model": name, "batch": batch, "texts": TEXTS, "rounds": rounds}
    for place, kind in enumerate(("clock", "processor")):
        ratios = {
            work: [t[place] / p[place] for t, p in zip(times[work], times["plain"], strict=True)]
            for work in ("heatmaps", "plain again")
        }
        found[kind] = {
            "plain_seconds": statistics.median(spent[place] for spent in times["plain"]),
            "ratio": {work: statistics.median(several) for work, several in ratios.items()},
            "spread": {work: [min(several), max(several)] for work, several in ratios.items()},
        }
    return {**found, "plain_peak_mib": memory["plain"] / 2**20, "memory": memory["heatmaps"] / memory["plain"]}


def table(results: list[dict]) -> Table:
    """The figures for people."""
    shown = Table(title=f"{TEXTS} heatmaps as multiples of the plain forward (bar: {BAR}): median [smallest, largest]")
    for column in ("model, batch", "plain", "clock", "plain again", "processor", "plain again", "memory"):
        shown.add_column(column)
    for found in results:
        cells = [
            f"{found[kind]['ratio'][work]:.3f} [{found[kind]['spread'][work][0]:.2f}, "
            f"{found[kind]['spread'][work][1]:.2f}]"
            for kind in ("clock", "processor")
            for work in ("heatmaps", "plain again")
        ]
        plain = f"{found['clock']['plain_seconds']:.3f} s"
        shown.add_row(f"{found['model']}, {found['batch']}", plain, *cells, f"{found['memory']:.2f}")
    return shown


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="names of timm, or open_clip:NAME")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here, with machine and versions")
    options = parser.parse_args()
    device, console = torch.device(options.device), Console(width=200 if not sys.stdout.isatty() else None)
    results = []
    for name in options.models:
        # A process for each model: what one leaves in the allocator is not another's cost.
        with multiprocessing.get_context("spawn").Pool(1) as process:
            results.append(process.apply(measure, (name, options.batch, options.rounds, device)))
    console.print(table(results))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(device), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
