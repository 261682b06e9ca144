"""What looking costs: ratios to the plain forward, in one process a model, interleaved, medians.

    python benchmarks/cost.py                       # every model of the table
    python benchmarks/cost.py deit_tiny_patch16_224 --rounds 5 --json out.json

A round runs every kind of work once, one after the other; a ratio is the median over rounds of a work's time
divided by the plain forward's time in the same round. "plain again" is the plain forward a second time: the
noise; "traced" is the decomposition of the plain module, without its adapter. Memory is what the allocator had handed
out at the peak, weights and results not counted, divided by the plain forward's. Weights are random and moved off
their initial values; they do not matter for cost.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose

# Model, batch. The name of open_clip's has a prefix.
MODELS = {
    "deit_tiny_patch16_224": 8,
    "deit_base_patch16_224": 8,
    "vit_base_patch14_reg4_dinov2": 2,
    "vit_base_patch16_siglip_gap_224": 8,
    "open_clip:ViT-B-16": 8,
    "swin_base_patch4_window7_224": 4,
    "maxvit_small_tf_224": 4,
}
DIRECTIONS = 100


def make(name: str) -> HookedViT:
    """A model with random weights, none at its initial value."""
    torch.manual_seed(0)
    model = HookedViT.from_open_clip(name.split(":")[1]) if ":" in name else HookedViT.from_timm(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter)).requires_grad_(False)
    return model


def image_size(model: HookedViT) -> tuple[int, ...]:
    """Channels, height and width that the model takes."""
    spec = model.image_spec
    return (spec.channels, *(spec.size or (224, 224)))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one run; its result is freed outside of the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = time.perf_counter() - start
    del result
    return spent


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most memory that a run had allocated at once, not counting what outlives it: the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    events = [
        e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]" and e.device_type() == kind
    ]
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    del result  # after the recording: what is alive now is the result
    return _peak_of_what_is_freed(sizes)


def _peak_of_what_is_freed(sizes: list[int]) -> int:
    """The peak over allocations, and frees as negative sizes, of all that is freed in the end."""
    waiting: dict[int, list[int]] = {}
    freed_at: dict[int, int] = {}
    for moment, size in enumerate(sizes):
        if size > 0:
            waiting.setdefault(size, []).append(moment)
        elif waiting.get(-size):
            freed_at[waiting[-size].pop()] = moment
    changes = [0] * len(sizes)
    for start, end in freed_at.items():
        changes[start] += sizes[start]
        changes[end] -= sizes[start]
    return max(accumulate(changes), default=0)


def measure(name: str, batch: int, rounds: int, device: torch.device) -> dict[str, object]:
    """All figures of one model."""
    model = make(name).to(device)
    plain: nn.Module = model.original
    images = torch.rand(batch, *image_size(model), device=device)
    with torch.inference_mode():
        start = time.perf_counter()
        parts = decompose(model, images[:1])
        first_use = time.perf_counter() - start
        directions = nn.functional.normalize(torch.randn(DIRECTIONS, parts.values.shape[-1], device=device), dim=-1)
        works: dict[str, Callable[[], object]] = {
            "plain": lambda: plain(images),
            "plain again": lambda: plain(images),
            "hooked": lambda: model(images),
            "decompose": lambda: decompose(model, images),
            "traced": lambda: decompose(plain, images),
            "attribute": lambda: attribute(model, images, directions),
            "attribute_tokens": lambda: attribute_tokens(model, images, directions),
        }
        first_tokens = seconds(works["attribute_tokens"], device)
        for work in works.values():
            seconds(work, device)
        times: dict[str, list[float]] = {work: [] for work in works}
        for _ in range(rounds):
            for work, run in works.items():
                times[work].append(seconds(run, device))
        memory = {work: peak_bytes(works[work], device) for work in ("plain", "decompose", "attribute_tokens")}
    ratios = {
        work: [t / p for t, p in zip(times[work], times["plain"], strict=True)] for work in works if work != "plain"
    }
    return {
        "model": name,
        "batch": batch,
        "rounds": rounds,
        "plain_seconds": statistics.median(times["plain"]),
        "ratio": {work: statistics.median(found) for work, found in ratios.items()},
        "spread": {work: [min(found), max(found)] for work, found in ratios.items()},
        "plain_peak_mib": memory["plain"] / 2**20,
        "memory": {work: peak / memory["plain"] for work, peak in memory.items() if work != "plain"},
        "first_decompose_seconds": first_use,
        "first_attribute_tokens_seconds": first_tokens,
        "gap": float(parts.gap.max()),
    }


def table(results: list[dict]) -> Table:
    """The figures for people."""
    shown = Table(title="times as multiples of the plain forward: median [smallest, largest]")
    works = ["plain again", "hooked", "decompose", "traced", "attribute", "attribute_tokens"]
    for column in ("model, batch", "plain", *works, "memory: decompose", "memory: tokens", "first use"):
        shown.add_column(column)
    for found in results:
        cells = [
            f"{found['ratio'][work]:.3f} [{found['spread'][work][0]:.2f}, {found['spread'][work][1]:.2f}]"
            for work in works
        ]
        shown.add_row(
            f"{found['model']}, {found['batch']}",
            f"{found['plain_seconds']:.3f} s",
            *cells,
            *(f"{found['memory'][work]:.2f}" for work in ("decompose", "attribute_tokens")),
            f"{found['first_decompose_seconds']:.1f} s",
        )
    return shown


def machine(device: torch.device) -> dict[str, object]:
    """Where and with what it was measured."""
    packages = ("torch", "timm", "open_clip_torch", "transformer-lens", "vitdecomp-lens")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="names of timm, or open_clip:NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="in place of the table's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here, with machine and versions")
    options = parser.parse_args()
    device, console = torch.device(options.device), Console(width=200 if not sys.stdout.isatty() else None)
    results = []
    for name in options.models:
        # A process for each model: what one leaves in the allocator is not another's cost.
        with multiprocessing.get_context("spawn").Pool(1) as process:
            batch = options.batch or MODELS.get(name, 8)
            results.append(process.apply(measure, (name, batch, options.rounds, device)))
        console.print(table(results[-1:]))
    if len(results) > 1:
        console.print(table(results))
    console.print(machine(device))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(device), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
