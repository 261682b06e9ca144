"""Results as a page: tables in Markdown, every number in JSON, and pictures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitdecomp_lens.evaluation import ablating, carrying
from vitdecomp_lens.evaluation.published import published
from vitdecomp_lens.evaluation.records import Record, Results
from vitdecomp_lens.pictures import can_draw

__all__ = ["page", "write"]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Of the section.
        text: What was measured.
        measures: Those that have a table, in this order.
        more: Those whose tables are folded away.
        averaged: Whether questions are averaged, and each by itself folded away.
    """

    title: str
    text: str
    measures: tuple[str, ...]
    more: tuple[str, ...] = ()
    averaged: bool = False


_SEGMENTED = ("pixel accuracy", "foreground IoU", "mAP", "foreground AP")
SECTIONS: Mapping[str, Section] = {
    "ablation": Section(
        "Ablation curves", "What is left of the accuracy while one component after the other is ablated.", ("area",)
    ),
    "retrieval by text": Section(
        "Retrieval by text",
        "Images found by the texts of a property.",
        ("precision at 10", "precision at 100", "Spearman's rho", "components"),
        averaged=True,
    ),
    "retrieval by image": Section(
        "Retrieval by image",
        "Images found that are like a reference in one property. Leakage is better where it is lower.",
        ("precision at 10", "leakage", "components"),
        averaged=True,
    ),
    "segmentation": Section("Segmentation of single objects", "The object, by what it is.", ("mIoU",), _SEGMENTED),
    "photographs": Section(
        "Segmentation of photographs", "The object, by the class that it is of.", ("mIoU",), _SEGMENTED
    ),
    "pairs": Section(
        "Segmentation of one of two objects",
        "The object that a prompt asks for, where there is another one.",
        ("points at its object", "mIoU"),
        ("highest on it", *_SEGMENTED),
    ),
    "spurious correlation": Section(
        "Repair of a spurious correlation",
        "A classifier that leans on backgrounds, with components ablated.",
        ("worst group", "average of groups"),
        ("count",),
    ),
    "typographic attack": Section(
        "Repair of a typographic attack",
        "Accuracy without and with a wrong word on the image, with components ablated.",
        ("written", "clean", "regained"),
        ("count",),
    ),
}
PROTOCOL = "How each was made, and what was fixed before, stands in [how the tables are made](evaluation.md)."
PICTURE = "pictures/results_ablation"


def page(results: Results, failed: Mapping[str, str] | None = None) -> str:
    """Everything that was measured, as Markdown.

    Args:
        results: All numbers.
        failed: By task, why there are none.
    """
    lines = ["# Results", "", _made(results), PROTOCOL, ""]
    for task, why in (failed or {}).items():
        lines += [f"**Failed: {task}.** {why}", ""]
    known = published()
    for task, section in SECTIONS.items():
        found = results.where(task=task)
        if not found.records:
            continue
        lines += [f"## {section.title}", "", section.text, ""]
        if task == ablating.TASK and can_draw():
            names = _pictures(found)
            lines += [
                line for name in names.values() for line in (f"![Accuracy while components are ablated]({name})", "")
            ]
        for measure in section.measures:
            lines += _table(found.where(measure=measure), measure, section)
        folded = [line for measure in section.more for line in _table(found.where(measure=measure), measure, section)]
        lines += _folded("more measures", folded)
        lines += _published(known.where(task=task))
    if said := list(carrying.lacking(results)):
        lines += ["## Texts that no component carries", "", *(line for one in said for line in (one, ""))]
    return "\n".join(lines).rstrip() + "\n"


def write(results: Results, folder: Path, failed: Mapping[str, str] | None = None) -> Path:
    """Write ``results.md``, ``results.json`` and pictures into a folder; the page's path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder / "results.json")
    curves = results.where(task=ablating.TASK)
    for question, name in _pictures(curves).items() if can_draw() else ():
        (folder / name).parent.mkdir(exist_ok=True)
        ablating.plot(curves, of=question).savefig(folder / name, dpi=80)
    path = folder / "results.md"
    path.write_text(page(results, failed), encoding="utf-8")
    return path


def _pictures(curves: Results) -> dict[str, str]:
    """For each question of ablation curves, the name of its picture; numbered too, since letters may be left out."""
    questions = curves.names("of")
    if len(questions) == 1:
        return {questions[0]: f"{PICTURE}.png"}
    return {one: f"{PICTURE}_{n}_{re.sub(r'[^A-Za-z0-9]+', '_', one)}.png" for n, one in enumerate(questions, 1)}


def _table(found: Results, measure: str, section: Section) -> list[str]:
    """One table; where questions are averaged, their mean before each of them."""
    single = found.where(step=None)
    if not single.records:
        return []
    each = single.table(rows=("of", "method") if len(single.names("of")) > 1 else ("method",))
    if not section.averaged:
        return [f"**{measure}**", "", each, ""]
    head = f"**{measure}**, mean over {', '.join(single.names('of'))}"
    return [head, "", over_questions(single).table(), "", *_folded("each by itself", [each, ""])]


def _folded(title: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *lines, "</details>", ""] if lines else []


def over_questions(found: Results) -> Results:
    """The mean over the questions of a task, for each seed."""
    groups: dict[tuple[str, str, str, str, int], list[float]] = {}
    for one in found.records:
        groups.setdefault((one.task, one.measure, one.model, one.method, one.seed), []).append(one.value)
    means = (Record(*names, sum(values) / len(values)) for names, values in groups.items())
    return Results(tuple(means), found.made)


def _published(found: Results) -> list[str]:
    if not found.records:
        return []
    lines = ["Published, of large models on photographs (arXiv 2406.01583; no error bars were given):", ""]
    for measure in found.names("measure"):
        lines += [f"*{measure}*", "", found.where(measure=measure).table(), ""]
    return lines


def _made(results: Results) -> str:
    said = "; ".join(f"{name} {_listed(value)}" for name, value in results.made.items())
    return f"Written by `vitdecomp-lens evaluate` ({said}). Numbers are shares of one, but for counts of components."


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
