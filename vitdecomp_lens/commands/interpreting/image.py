"""``vitdecomp-lens interpret image``: what an image shows, and which components and patches say so."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitdecomp_lens.commands.interpreting import concepts, patches
from vitdecomp_lens.commands.interpreting.patches import Seen
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
from vitdecomp_lens.commands.writing import PictureNames, check_folder
from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import printable
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.interpret.describing import Description, describe
from vitdecomp_lens.interpret.hierarchy import ConceptParts, ConceptTree, decompose_by_concepts
from vitdecomp_lens.pictures import INSTALL, can_draw

ABOUT = (
    "Of the image's representation, minus the mean over {images} images. Share: of its squared length, by this text; "
    "with what no text accounts for, shares sum to 100 %; they may be negative. Amount: coefficient of the unit text, "
    "in units of the CLIP's representation. Components: what they add to the amount, the largest first."
)
OF_PATCHES = (
    " Patches: what the three strongest hold along the text, all components together, the mean over images included; "
    "r2c3 is in row 2, column 3, from 0 at the top left."
)


def add_to(questions: Any) -> None:
    """Add the question."""
    parser = questions.add_parser(
        "image",
        help="what an image shows, and which components say so",
        description="A few texts that together say what is particular to an image, among the images of a store (or "
        "those of --source), and for each of them the components that write it; with --model, the patches too. With "
        "--tree, the image is also split among concepts that refine each other.",
    )
    add_named(parser, "IMAGE", "images: their identifiers in the store, or with --model, files")
    add_subject(parser)
    add_clip(parser)
    add_texts(parser)
    parser.add_argument("--phrases", type=positive, default=5, metavar="N", help="how many texts at most (5)")
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="components to show for each text (5)")
    pictures = "a folder to write a picture of each image to, with the patches that carry each text; needs --model"
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help=pictures)
    concepts.add_tree(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Say what images show, and print a table for each."""
    path, names = named_in(options)
    if not names:
        raise InputError("Expected images: identifiers in the store, or files for --model; got none.")
    if options.pictures is not None:
        _check_pictures(options.pictures, path)
    tree = None if options.tree is None else ConceptTree.load(options.tree)
    with ExitStack() as stack:
        words = Words(options, errors)
        leaves = None if tree is None else concepts.directions(tree, words)
        model = None if path is not None else _model(options)
        images = None if model is None else model.preprocess(names)  # before all that takes time
        subject = subject_of(options, path, words, errors, stack, model=model)
        bank = words.bank(options.texts).centred()
        reference, others = _mean(subject), len(subject.rows)
        if model is None or images is None:
            parts, seen = subject.of_images(names), None
        else:
            parts = subject.mapped(decompose(model, images, by="head"))
            seen = Seen(model, subject.aligner, names, images)
    found = describe(parts, bank, phrases=options.phrases, reference=reference)
    split = None
    if tree is not None and leaves is not None:
        split = decompose_by_concepts(parts, tree, leaves, reference=reference, signs=options.signs)
    pictures = None if options.pictures is None else PictureNames(options.pictures)
    console, answer = tables(), _Answer(options, others, seen, split, pictures)
    for name, description in zip(names, found, strict=True):
        for shown in answer.add(name, description):
            console.print(shown)
            console.print()
    if pictures is not None:
        errors.print(Text(f"Pictures are written to {printable(str(pictures.folder))}."), soft_wrap=True)
    write_json(options.json, "image", {"space": bank.space, "texts": len(bank), **answer.packed()})
    return 0


class _Answer:
    """What is said of images, one by one.

    Args:
        options: Of the command line.
        others: How many images the mean is of.
        seen: What the model is shown; None for images of a store.
        split: The images split among concepts, if they are.
        pictures: Names for pictures, if some are drawn.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        others: int,
        seen: Seen | None,
        split: ConceptParts | None,
        pictures: PictureNames | None,
    ) -> None:
        self._top, self._others, self._seen, self._split, self._names = options.top, others, seen, split, pictures
        self._signs: str = options.signs
        self._threshold: float = options.threshold
        self._images: dict[str, list[dict[str, Any]]] = {}
        self._pictures: dict[str, str] = {}
        self._trees: dict[str, dict[str, Any]] = {}

    def add(self, name: str, description: Description) -> Iterator[Table | Text]:
        """Say what one more shows, as tables; and draw it."""
        if self._seen is not None and len(description):
            tokens = self._seen.by_token(description)
            description = description.with_patches(tokens)
            if self._names is not None:
                self._pictures[name] = self._seen.draw(description, tokens, self._names)
        self._images[name] = _told(description, self._top)
        yield _table(name, self._images[name], self._others)
        if self._split is not None:
            self._trees[name] = concepts.packed(self._split, description.image, self._top)
            yield concepts.shown(self._split, description.image, name, self._others, self._threshold)

    def packed(self) -> dict[str, Any]:
        """All of it as JSON has it: phrases; the names of pictures and the concepts, where they were asked for."""
        pictures = {} if self._names is None else {"pictures": self._pictures}
        trees = {} if self._split is None else {"signs": self._signs, "trees": self._trees}
        return {"others": self._others, "images": self._images, **pictures, **trees}


def _check_pictures(folder: Path, store: str | None) -> None:
    """Refuse what can be known not to go before anything is computed."""
    if store is not None:
        raise InputError(
            f"--pictures shows patches, which only a run of the model tells; the store {store!r} holds sums over them. "
            f"Name the model and files of images: interpret image FILE --model NAME --source FOLDER."
        )
    if not can_draw():
        raise InputError(INSTALL)
    check_folder(folder, "--pictures")


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
    """An image's texts, each with how much of it there is, which components add most to it, and which patches do."""
    rows = zip(description.phrases, description.amounts.tolist(), description.shares.tolist(), strict=True)
    found = [
        {
            "text": text,
            "amount": amount,
            "share": share,
            "components": [{"component": label, "amount": part} for label, part in description.top(text, top)],
        }
        for text, amount, share in rows
    ]
    for one, strongest in zip(found, description.patches or (), strict=False):
        one["patches"] = [patches.packed(patch) for patch in strongest]
    return found


def _table(name: str, phrases: Sequence[dict[str, Any]], others: int) -> Table | Text:
    if not phrases:
        return nothing(f"{name}: no text", "No text agrees with what tells the image from the others.")
    with_patches = "patches" in phrases[0]
    about = ABOUT + OF_PATCHES if with_patches else ABOUT
    table = titled(f"What {name} shows", about.format(images=others))
    table.add_column("text")
    for heading in ("share", "amount"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("components", *(["patches"] if with_patches else [])):
        table.add_column(heading)
    for one in phrases:
        carried = [", ".join(f"{of['component']}:{of['amount']:+.3f}" for of in one["components"])]  # breaks at ", "
        if with_patches:
            carried.append(patches.told(one["patches"]))
        table.add_row(*cells(one["text"], f"{100 * one['share']:.1f} %", f"{one['amount']:.3f}", *carried))
    return table
