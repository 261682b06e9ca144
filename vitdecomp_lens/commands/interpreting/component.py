"""``vitdecomp-lens interpret component``: the texts that a component says."""

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.commands.interpreting.subjects import Subject, add_subject, subject_of
from vitdecomp_lens.commands.interpreting.telling import (
    add_json,
    add_named,
    cells,
    named_in,
    nothing,
    titled,
    write_json,
)
from vitdecomp_lens.commands.interpreting.words import Words, add_clip, add_texts
from vitdecomp_lens.commands.models import positive
from vitdecomp_lens.commands.showing import bar, tables
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.readings import Spans
from vitdecomp_lens.interpret.stability import LabelStability, label_stability
from vitdecomp_lens.interpret.text_span import VARIANTS, text_span

ABOUT = "Share: of the component's variance over images, in the span of the texts so far."
OF_CONSTANTS = (
    "It is a constant, which varies by the norm's 1/σ only, so that one text may say all of it. Where constants go "
    "under an aligner is an assumption (docs/align.md)."
)
ABOUT_AGAIN = "Again: how often the text is chosen from images drawn again ({resamples} times); by chance {chance:.2f}."


def add_to(questions: Any) -> None:
    """Add the question."""
    parser = questions.add_parser(
        "component",
        help="what a component says",
        description="The texts that together span what a component writes, by TextSpan: how much of its variance over "
        "images they explain, and how often they are chosen again from other images.",
    )
    add_named(parser, "COMPONENT", "components, such as L3H1 or mlp.2")
    add_subject(parser)
    add_clip(parser)
    add_texts(parser)
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="how many texts (10)")
    variant = "of TextSpan: published, or corrected, which compares texts at unit length in each step (corrected)"
    parser.add_argument("--variant", choices=VARIANTS, default="corrected", help=variant)
    resamples = "how often images are drawn again, to see which texts stay; 0 for not at all (20)"
    parser.add_argument("--resamples", type=_count, default=20, metavar="N", help=resamples)
    top = "show the K images for which the component writes most along its first text"
    parser.add_argument("--top-images", type=_count, default=0, metavar="K", help=top)
    parser.add_argument("--seed", type=int, default=0, help="of the images drawn again (0)")
    add_json(parser)
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    """A whole number, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of at least 0; got {text!r}")
    return int(text)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Read components, and print a table for each."""
    path, labels = named_in(options)
    if not labels:
        raise InputError(_nothing_asked(path))
    with ExitStack() as stack:
        words = Words(options, errors)
        subject = subject_of(options, path, words, errors, stack)
        subject.check(labels)
        bank = words.bank(options.texts)
        with bar(errors, "reading"):
            parts = subject.parts(list(dict.fromkeys(labels)))
            spans, stability = _read(parts, bank, options)
        images = _top_images(spans, parts, subject, options.top_images)
    console = tables()
    answer = {label: _told(spans, stability, label, images[label]) for label in spans.labels}
    constants = {component.label for component in parts.components if component.kind == "constant"}
    for label, told in answer.items():
        console.print(_table(label, told, spans, stability, constant=label in constants))
        if told["images"]:
            console.print(_image_table(told))
        console.print()
    facts = {"space": spans.bank.space, "images": spans.images, "variant": options.variant, "texts": len(bank)}
    facts |= {"resamples": options.resamples}
    write_json(options.json, "component", {**facts, "components": answer})
    return 0


def _nothing_asked(path: str | None) -> str:
    if path is None or Path(path).exists():
        return "Expected components, such as L3H1, after the store if there is one; got none."
    return (
        f"Expected a store, a folder that 'vitdecomp-lens collect' made, before the components ('STORE {path}'), or "
        f"--model NAME; there is no folder {path!r}."
    )


def _read(parts: Decomposition, bank: TextBank, options: argparse.Namespace) -> tuple[Spans, LabelStability | None]:
    read = partial(text_span, steps=options.steps, variant=options.variant)
    if not options.resamples:
        return read(parts, bank), None
    stability = label_stability(parts, bank, read, resamples=options.resamples, seed=options.seed)
    return stability.reading, stability


def _top_images(spans: Spans, parts: Decomposition, subject: Subject, count: int) -> dict[str, list[dict[str, Any]]]:
    """For each component, the images with the highest score along its first direction."""
    if not count:
        return {label: [] for label in spans.labels}
    best = spans.scores(parts)[:, :, 0].topk(min(count, len(subject.rows)), dim=1)
    ids, found = subject.ids(), {}
    for label, scores, rows in zip(spans.labels, best.values.tolist(), best.indices.tolist(), strict=True):
        told = [{"image": ids[row], "score": score} for row, score in zip(rows, scores, strict=True)]
        found[label] = told if spans.texts[label] else []
    return found


def _told(spans: Spans, stability: LabelStability | None, label: str, images: list[dict[str, Any]]) -> dict[str, Any]:
    row = spans.labels.index(label)
    texts = spans.texts[label]
    shares = spans.share_explained[row].tolist()
    again = [None] * len(texts) if stability is None else [share for _, share in stability[label]]
    told = [
        {"text": text, "share_explained": share, "again": kept}
        for text, share, kept in zip(texts, shares, again, strict=False)
    ]
    chance = None if stability is None else float(stability.chance[row])
    return {"rank": int(spans.ranks[row]), "texts": told, "again_by_chance": chance, "images": images}


def _table(
    label: str, told: dict[str, Any], spans: Spans, stability: LabelStability | None, *, constant: bool
) -> Table | Text:
    if not told["texts"]:
        return nothing(f"{label} says nothing", "It does not vary over images.")
    about = ABOUT
    if stability is not None:
        about += " " + ABOUT_AGAIN.format(resamples=len(stability.jaccard), chance=told["again_by_chance"])
    if constant:
        about += " " + OF_CONSTANTS
    facts = f"{spans.images} images, {told['rank']} dimensions, {len(spans.bank)} texts. {about}"
    table = titled(f"What {label} says", facts)
    table.add_column("", justify="right")
    table.add_column("text")
    table.add_column("share", justify="right", no_wrap=True)
    if stability is not None:
        table.add_column("again", justify="right", no_wrap=True)
    for step, one in enumerate(told["texts"], start=1):
        again = [] if stability is None else [f"{one['again']:.2f}"]
        table.add_row(*cells(str(step), one["text"], f"{100 * one['share_explained']:.1f} %", *again))
    return table


def _image_table(told: dict[str, Any]) -> Table:
    table = titled(f"Where it writes most along {told['texts'][0]['text']!r}")
    table.add_column("image")
    table.add_column("score", justify="right", no_wrap=True)
    for one in told["images"]:
        table.add_row(*cells(one["image"], f"{one['score']:+.3f}"))
    return table
