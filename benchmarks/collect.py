"""What collecting costs beside its forwards, and whether its memory grows with the data set.

    python benchmarks/collect.py                                  # 2,000 and 20,000 scenes
    python benchmarks/collect.py --scenes 200 400 --json out.json

Throughput is the images a second of `collect` (drawing scenes, preprocessing and writing included), divided by that of
a bare loop over batches that are in memory: `decompose`, then the CLIP's image tower, nothing else. Both take turns,
and the ratio is the median over rounds. What happens once (tracing, hashing weights) is left out of both. Memory is
the highest resident set of a process of its own, for each number of scenes. Weights are random: cost does not depend on
them.
"""

import argparse
import json
import multiprocessing
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from vitdecomp_lens import HookedViT, decompose
from vitdecomp_lens.collect import Gather, collect
from vitdecomp_lens.testbed.models import BUILDERS, build, normalised
from vitdecomp_lens.testbed.scenes import Scenes


def bare(model: HookedViT, clip: HookedViT, batches: list[torch.Tensor]) -> float:
    """Images a second of the forwards alone."""
    start = time.perf_counter()
    for images in batches:
        decompose(model, images)
        with torch.no_grad():
            clip(images)
    return sum(map(len, batches)) / (time.perf_counter() - start)


def collected(model: HookedViT, clip: torch.nn.Module, scenes: Scenes, batch_size: int, gather: Gather | None) -> float:
    """Images a second of collecting, from the end of the first chunk to the end of the last."""
    told = []
    with tempfile.TemporaryDirectory() as folder:
        options = {"clip": clip, "batch_size": batch_size, "dtype": torch.float16, "gather": gather}
        tell = lambda done, *_: told.append((done, time.perf_counter()))  # noqa: E731
        collect(model, scenes, Path(folder) / "store", progress=tell, **options)
    (first, start), (last, end) = told[0], told[-1]
    return (last - first) / (end - start)


def throughput(name: str, *, count: int, batch_size: int, rounds: int, gather: Gather | None) -> dict:
    """Ratios of collecting to the bare loop, in turns."""
    model, clip = HookedViT(build(name).eval()), build("clip").eval()
    tower, scenes = HookedViT(clip), Scenes("train", size=count)
    numbers = torch.arange(count).split(batch_size)
    batches = [normalised(scenes.images(rows.tolist())) for rows in numbers]
    bare(model, tower, batches[:2])
    found = []
    for _ in range(rounds):
        alone = bare(model, tower, batches)
        found.append((alone, collected(model, clip, scenes, batch_size, gather)))
    ratios = [of_collect / alone for alone, of_collect in found]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "bare_images_per_second": statistics.median(alone for alone, _ in found),
        "collect_images_per_second": statistics.median(of_collect for _, of_collect in found),
    }


def highest() -> int:
    """The highest resident set of this process, in bytes, as the system has kept it."""
    status = Path("/proc/self/status")
    kept = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if kept is not None:  # Linux counts what the parent had before this process was one as ru_maxrss
        return int(kept[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak(name: str, count: int, batch_size: int, threads: int, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        model, clip = HookedViT(build(name).eval()), build("clip").eval()
        options = {"clip": clip, "batch_size": batch_size, "dtype": torch.float16}
        collect(model, Scenes("train", size=count), Path(folder) / "store", **options)
    queue.put(highest())


def peak(name: str, count: int, batch_size: int) -> int:
    """The highest resident set while scenes are collected, in bytes."""
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=_peak, args=(name, count, batch_size, torch.get_num_threads(), queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def main() -> None:
    """Measure, and print or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(BUILDERS), default="deit")
    parser.add_argument(
        "--scenes", type=int, nargs=2, default=(2_000, 20_000), help="for memory; throughput: the first"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gather", action="store_true", help="covariances, cross-moments and top images, too")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gather = Gather(covariance=True, cross=True, top=16) if options.gather else None
    few, many = options.scenes
    found = {
        "model": options.model,
        "batch_size": options.batch_size,
        "threads": torch.get_num_threads(),
        "machine": {"processor": platform.machine(), "cores": psutil.cpu_count()},
        "versions": {package: version(package) for package in ("vitdecomp-lens", "torch", "timm", "open_clip_torch")},
        "throughput": throughput(
            options.model, count=few, batch_size=options.batch_size, rounds=options.rounds, gather=gather
        ),
    }
    if not options.no_memory:
        peaks = {count: peak(options.model, count, options.batch_size) for count in (few, many)}
        found["memory"] = {"peak_bytes": peaks, "growth_bytes": peaks[many] - peaks[few]}
    text = json.dumps(found, indent=2)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
