"""Measure the testbed's trained models: ``python -m vitdecomp_lens.testbed.evaluate``."""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitdecomp_lens.testbed.evaluation import Measured, measure
from vitdecomp_lens.testbed.models import BUILDERS
from vitdecomp_lens.testbed.shipped import load_original, record

Spread = tuple[float, float]  # mean and standard deviation over sets of scenes


def over_seeds(measured: Sequence[Measured]) -> dict[str, Spread]:
    """Mean and standard deviation of each number."""
    columns = {name: [one.numbers()[name] for one in measured] for name in measured[0].numbers()}
    return {
        name: (statistics.fmean(column), statistics.stdev(column) if len(column) > 1 else 0.0)
        for name, column in columns.items()
    }


def table(found: Mapping[str, Mapping[str, Spread]]) -> str:
    """A Markdown table, a column for each model.

    Example:
        >>> print(table({"deit": {"shape": (0.987, 0.001)}}))
        |  | deit |
        | --- | --- |
        | shape | .987 ± .001 |
    """
    names = list(dict.fromkeys(name for numbers in found.values() for name in numbers))
    lines = [f"|  | {' | '.join(found)} |", "| " + " | ".join(["---"] * (len(found) + 1)) + " |"]
    for name in names:
        cells = [_cell(numbers[name]) if name in numbers else "" for numbers in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(spread: Spread) -> str:
    return " ± ".join(f"{number:.3f}".removeprefix("0") for number in spread)


def main() -> None:
    """Measure, print a table, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which models; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the scenes (0 1 2)")
    parser.add_argument("--size", type=int, default=2000, help="scenes of each split (2000)")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument("--record", action="store_true", help="put them into the manifest of the shipped models")
    options = parser.parse_args()
    found: dict[str, dict[str, Spread]] = {}
    for name in options.names or BUILDERS:
        model = load_original(name)
        measured = [measure(name, model, seed=seed, size=options.size) for seed in options.seeds]
        found[name] = over_seeds(measured)
        if options.record:
            rounded = {of: [round(number, 4) for number in spread] for of, spread in found[name].items()}
            record(name, {"measured": {"seeds": options.seeds, "size": options.size, "mean and sd": rounded}})
    sys.stdout.write(table(found) + "\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
