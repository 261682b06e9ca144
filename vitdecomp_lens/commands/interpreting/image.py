"""``vitdecomp-lens interpret image``: what an image shows, and which components say so."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

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
from vitdecomp_lens.commands.models import named_model, positive
from vitdecomp_lens.commands.showing import tables
from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.interpret.describing import Description, describe

ABOUT = (
    "Of the image's representation, minus the mean over {images} images. Share: of its squared length, by this text; "
    "with what no text accounts for, shares sum to 100 %. Amount: how much of the text there is. Components: what they "
    "add to the amount, the largest first."
)


def add_to(questions: Any) -> None:
    """Add the question."""
    parser = questions.add_parser(
        "image",
        help="what an image shows, and which components say so",
        description="A few texts that together say what is particular to an image, among the images of a store (or "
        "those of --source), and for each of them the components that write it.",
    )
    add_named(parser, "IMAGE", "images: their identifiers in the store, or with --model, files")
    add_subject(parser)
    add_clip(parser)
    add_texts(parser)
    parser.add_argument("--phrases", type=positive, default=5, metavar="N", help="how many texts at most (5)")
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="components to show for each text (5)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Say what images show, and print a table for each."""
    path, names = named_in(options)
    if not names:
        raise InputError("Expected images: identifiers in the store, or files for --model; got none.")
    with ExitStack() as stack:
        words = Words(options, errors)
        model = None if path is not None else _model(options)
        images = None if model is None else model.preprocess(names)  # before all that takes time
        subject = subject_of(options, path, words, errors, stack, model=model)
        bank = words.bank(options.texts).centred()
        reference = _mean(subject)
        if model is None or images is None:
            parts = subject.of_images(names)
        else:
            parts = subject.mapped(decompose(model, images, by="head"))
        others = len(subject.rows)
    found = describe(parts, bank, phrases=options.phrases, reference=reference)
    answer = {name: _told(description, options.top) for name, description in zip(names, found, strict=True)}
    console = tables()
    for name, phrases in answer.items():
        console.print(_table(name, phrases, others))
        console.print()
    facts = {"space": bank.space, "others": others, "texts": len(bank)}
    write_json(options.json, "image", {**facts, "images": answer})
    return 0


def _model(options: argparse.Namespace) -> HookedViT:
    model, _ = named_model(options.model, options, open_clip=options.open_clip)
    return HookedViT(model)


def _mean(subject: Subject) -> Decomposition:
    """What each component writes on average, as one image."""
    batches = iter(subject.batches())
    first = next(batches)
    sums = first.values.double().sum(1, keepdim=True)
    for parts in batches:
        sums += parts.values.double().sum(1, keepdim=True)
    return Decomposition(sums / len(subject.rows), first.components, metadata=first.metadata)


def _told(description: Description, top: int) -> list[dict[str, Any]]:
    """An image's texts, each with how much of it there is and which components add most to it."""
    rows = zip(description.phrases, description.amounts.tolist(), description.shares.tolist(), strict=True)
    return [
        {
            "text": text,
            "amount": amount,
            "share": share,
            "components": [{"component": label, "amount": part} for label, part in description.top(text, top)],
        }
        for text, amount, share in rows
    ]


def _table(name: str, phrases: Sequence[dict[str, Any]], others: int) -> Table | Text:
    if not phrases:
        return nothing(f"{name}: no text", "No text agrees with what tells the image from the others.")
    table = titled(f"What {name} shows", ABOUT.format(images=others))
    table.add_column("text")
    for heading in ("share", "amount"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("components")
    for one in phrases:
        components = ", ".join(f"{of['component']} {of['amount']:+.3f}" for of in one["components"])
        table.add_row(*cells(one["text"], f"{100 * one['share']:.1f} %", f"{one['amount']:.3f}", components))
    return table
