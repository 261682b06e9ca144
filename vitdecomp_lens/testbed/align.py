"""Fit aligners of the testbed's models: ``python -m vitdecomp_lens.testbed.align [NAME ...] [--ship | --table]``.

Without options, it fits and says how good the aligners are; ``--ship`` also writes them into the package. ``--table``
compares all methods of alignment.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.clip.moments import Layout
from vitdecomp_lens.clip.objective import METHODS
from vitdecomp_lens.clip.reports import isometry_residuals
from vitdecomp_lens.testbed.aligners import ALIGNED, Collected, collected, match_of, ship_aligner, split_sizes
from vitdecomp_lens.testbed.shipped import MANIFEST, WEIGHTS, load_original

MEASURES = ("cosine distance", "match rate", "isometry residual")
ORDER = ("compalign", "unconstrained", "shared")  # the paper's, by match rate

Numbers = dict[str, list[float]]  # of each measure, one for each seed


def compared(
    model: nn.Module,
    clip: nn.Module,
    fitted: Collected,
    others: Collected,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    scenes: int,
) -> dict[str, Numbers]:
    """Every method's measures on scenes that had no part in a fit, for each seed.

    How far maps are from isometries is measured on the components' own spans, as the first of the methods has found
    them, for all methods alike: one shared map has a span of its own, which is the sum's.

    Args:
        model: Without hooks.
        clip: Whole.
        fitted: What fits take their scenes from, each its own where there are enough for all.
        others: What they are measured on.
        methods: Which.
        seeds: Each draws the scenes held out of a fit, and the order of the others.
        scenes: How many a fit takes.
    """
    found: dict[str, Numbers] = {method: {} for method in methods}
    shuffled = torch.randperm(len(fitted.targets), generator=torch.Generator().manual_seed(0))
    for place, seed in enumerate(seeds):
        drawn = fitted.images(shuffled.roll(-place * scenes)[:scenes])
        spans: list[Tensor] = []
        for method in methods:
            aligner = Aligner.fit(drawn.parts, drawn.targets, method=method, space=drawn.space, seed=seed)
            spans = spans or [aligner.basis[:, columns] for columns in Layout(aligner.ranks).slices]
            report = aligner.report(others.parts, others.targets)
            rate = match_of(model, clip, aligner, others.parts)
            numbers = {"cosine distance": report.cosine_distance, "isometry residual": _isometry(aligner, spans)}
            if rate is not None:
                numbers |= {"match rate": rate.mean, "by chance": rate.mean_chance}
            for name, figure in numbers.items():
                found[method].setdefault(name, []).append(figure)
    return found


def _isometry(aligner: Aligner, spans: Sequence[Tensor]) -> float:
    """How far the maps are from isometries of the spans, on average over those that have a dimension."""
    maps = [basis.T @ whole for basis, whole in zip(spans, aligner.maps, strict=True)]
    residuals = isometry_residuals(maps)[1]
    return float(residuals[[row for row, one in enumerate(maps) if len(one)]].mean())


def table(found: Mapping[str, Mapping[str, Numbers]]) -> str:
    """Markdown: for each measure a table, a row for each method and a column for each model.

    Example:
        >>> print(table({"deit": {"compalign": {"match rate": [0.5, 0.7]}}}))
        | match rate | deit |
        | --- | --- |
        | compalign | .600 ± .141 |
    """
    tables = []
    for measure in MEASURES:
        methods = [method for method in METHODS if any(measure in one.get(method, {}) for one in found.values())]
        rows = {method: [one.get(method, {}).get(measure) for one in found.values()] for method in methods}
        if measure == "match rate":  # chance is the same for all methods
            chances = [next(iter(one.values())).get("by chance") for one in found.values()]
            rows |= {"by chance": chances} if any(chances) else {}
        lines = [f"| {measure} | {' | '.join(found)} |", "| " + " | ".join(["---"] * (len(found) + 1)) + " |"]
        lines += [f"| {name} | {' | '.join(map(_cell, cells))} |" for name, cells in rows.items()]
        tables += ["\n".join(lines)] if methods else []
    return "\n\n".join(tables)


def _cell(numbers: Sequence[float] | None) -> str:
    if numbers is None:
        return "–"
    return " ± ".join(_short(number) for number in _spread(numbers))


def _short(number: float) -> str:
    return f"{number:.3f}".replace("0.", ".", 1) if abs(number) < 1 else f"{number:.2f}"


def _spread(numbers: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def order(found: Mapping[str, Mapping[str, Numbers]]) -> str:
    """Whether the paper's order of match rates holds: a line for each model, with differences paired by seed.

    Example:
        >>> rates = {"compalign": [0.5, 0.6], "unconstrained": [0.4, 0.4], "shared": [0.4, 0.5]}
        >>> print(order({"deit": {method: {"match rate": rate} for method, rate in rates.items()}}))
        deit: compalign - unconstrained .150 ± .071, unconstrained - shared -.050 ± .071: does not hold
        The paper's order (compalign > unconstrained > shared in match rate) holds in 0 of 1 models.
    """
    lines, holding = [], 0
    for name, methods in found.items():
        if not all("match rate" in methods.get(method, {}) for method in ORDER):
            continue
        steps = [_step(methods, better, worse) for better, worse in pairwise(ORDER)]
        holds, clear = all(mean > 0 for _, mean, _ in steps), all(mean > spread for _, mean, spread in steps)
        said = ", ".join(f"{of} {_short(mean)} ± {_short(spread)}" for of, mean, spread in steps)
        verdict = "does not hold" if not holds else "holds" if clear else "holds, but not beyond the spread of seeds"
        lines.append(f"{name}: {said}: {verdict}")
        holding += holds
    whole = f"The paper's order ({' > '.join(ORDER)} in match rate) holds in {holding} of {len(lines)} models."
    return "\n".join([*lines, whole])


def _step(methods: Mapping[str, Numbers], better: str, worse: str) -> tuple[str, float, float]:
    """How much higher the match rate of one method is than another's: mean and standard deviation over seeds."""
    pairs = zip(methods[better]["match rate"], methods[worse]["match rate"], strict=True)
    return f"{better} - {worse}", *_spread([one - other for one, other in pairs])


def _compare(options: argparse.Namespace) -> None:
    found = {}
    clip = load_original("clip")
    for name in options.names:
        model = load_original(name)
        fitted = collected(model, clip, split_sizes(len(options.seeds) * options.scenes))
        others = collected(model, clip, {"test": options.tested})
        found[name] = compared(model, clip, fitted, others, seeds=options.seeds, scenes=options.scenes)
        sys.stderr.write(f"{name} is done\n")
    sys.stdout.write(f"{table(found)}\n\n{order(found)}\n")
    if options.json:
        said = {"scenes": options.scenes, "tested": options.tested, "seeds": options.seeds, "found": found}
        options.json.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _fit(options: argparse.Namespace) -> None:
    with TemporaryDirectory() as other:
        folder = WEIGHTS if options.ship else Path(other)
        if not options.ship:
            copy(WEIGHTS / MANIFEST, folder)
        for name in options.names:
            found = ship_aligner(
                name, scenes=options.scenes, tested=options.tested, seed=options.seeds[0], folder=folder
            )
            sys.stdout.write(f"{name}: {found.fit_report!r}\n")


def main() -> None:
    """Fit, and print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which models, of {', '.join(ALIGNED)}; by default all"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ship", action="store_true", help="write the aligners into the package")
    what.add_argument("--table", action="store_true", help="compare the methods of alignment, as a Markdown table")
    parser.add_argument("--json", type=Path, help="with --table: write the numbers there, too")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of fits (0 1 2); --ship takes the first"
    )
    parser.add_argument("--scenes", type=int, default=6000, help="to fit on (6000)")
    parser.add_argument("--tested", type=int, default=2000, help="scenes of test to measure on (2000)")
    options = parser.parse_args()
    options.names = options.names or list(ALIGNED)
    for name in options.names:
        if name not in ALIGNED:
            parser.error(f"there is no model {name!r} to align; there are {', '.join(ALIGNED)}")
    (_compare if options.table else _fit)(options)


if __name__ == "__main__":
    main()
