"""What TextSpan costs: all heads at once, against the loop over heads, in one process, interleaved, medians.

    python benchmarks/text_span.py                      # 144 heads, 5,000 images, 3,498 texts: minutes, 4 GB
    python benchmarks/text_span.py --small --json out.json

The loop is the algorithm as it was published: a singular value decomposition of each head's values, then in each step
a product of all images with all texts. A round times it on a few of the heads, one by one, and `text_span` on all of
them; the loop's time for all is its median by head times the heads. Memory is what the allocator had handed out at the
peak, without what there was before. Heads are drawn: products of two matrices of the rank, with a mean.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.interpret import VARIANTS, text_span

MUST = 30  # times faster than the loop


@dataclass(frozen=True)
class Sizes:
    """How much there is to read."""

    heads: int = 144
    images: int = 5000
    width: int = 768
    rank: int = 64
    texts: int = 3498
    steps: int = 20


SMALL = Sizes(heads=12, images=1000, width=192, rank=32, texts=500, steps=10)


def drawn(sizes: Sizes) -> tuple[Decomposition, TextBank]:
    """Heads of the rank, and texts."""
    chance = torch.Generator().manual_seed(0)
    values = torch.empty(sizes.heads, sizes.images, sizes.width)
    for head in values:
        codes = torch.randn(sizes.images, sizes.rank, generator=chance) * 0.95 ** torch.arange(sizes.rank)
        codes += torch.randn(sizes.rank, generator=chance)
        torch.mm(codes, torch.randn(sizes.rank, sizes.width, generator=chance), out=head)
    directions = torch.randn(sizes.texts, sizes.width, generator=chance)
    bank = TextBank([f"text {number}" for number in range(sizes.texts)], directions, space="drawn")
    heads = tuple(Component("head", number // 12, number % 12) for number in range(sizes.heads))
    return Decomposition(values, heads), bank


def loop(outputs: Tensor, texts: Tensor, steps: int, rank: int) -> list[int]:
    """The published algorithm for one head, in the dtype of its values."""
    axes = torch.linalg.svd(outputs, full_matrices=False).Vh[:rank]
    texts = texts @ axes.T @ axes
    outputs = outputs - outputs.mean(0)
    chosen = []
    for _ in range(steps):
        best = int((outputs @ texts.T).std(0).argmax())
        text = texts[best].clone()
        squared = text @ text
        outputs = outputs - torch.outer(outputs @ text / squared, text)
        texts = texts - torch.outer(texts @ text / squared, text)
        chosen.append(best)
    return chosen


def seconds(work: Callable[[], object]) -> float:
    """Time of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that a run had allocated at once, its result with it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = (e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def measured(sizes: Sizes, rounds: int, looped: int, max_bytes: int) -> dict[str, object]:
    """Seconds, ratios, memory, and whether both choose alike."""
    parts, bank = drawn(sizes)
    options = {"steps": sizes.steps, "rank": sizes.rank, "max_bytes": max_bytes}
    spans = {variant: text_span(parts, bank, variant=variant, **options) for variant in VARIANTS}  # warms up, too
    few = [parts.values[head] for head in range(min(looped, sizes.heads))]
    alike = sum(
        loop(head.double(), bank.directions.double(), sizes.steps, sizes.rank)
        == spans["published"].chosen[row].tolist()
        for row, head in enumerate(few)
    )
    plain, ours = [], {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        plain += [seconds(lambda head=head: loop(head, bank.directions, sizes.steps, sizes.rank)) for head in few]
        for variant in VARIANTS:
            ours[variant].append(seconds(lambda variant=variant: text_span(parts, bank, variant=variant, **options)))
    of_loop = statistics.median(plain) * sizes.heads
    medians = {variant: statistics.median(times) for variant, times in ours.items()}
    return {
        "sizes": asdict(sizes),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "loop_seconds_by_head": statistics.median(plain),
        "loop_seconds": of_loop,
        "seconds": medians,
        "times_faster": {variant: of_loop / median for variant, median in medians.items()},
        "must_be_times_faster": MUST,
        "values_bytes": parts.values.nbytes,
        "peak_bytes": peak_bytes(lambda: text_span(parts, bank, **options)),
        "max_bytes": max_bytes,
        "heads_that_choose_as_the_loop_in_double": f"{alike} of {len(few)}",
    }


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="seconds in place of minutes; no measure of the aim")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--looped", type=int, default=2, help="how many heads the loop is timed on in each round")
    parser.add_argument("--max-bytes", type=int, default=2**29)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = SMALL if options.small else Sizes()
    result = json.dumps(measured(sizes, options.rounds, options.looped, options.max_bytes), indent=2)
    print(result)
    if options.json:
        options.json.write_text(result + "\n")


if __name__ == "__main__":
    main()
