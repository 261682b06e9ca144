"""An image as a tree of concepts, on the command line."""

import argparse
import math
from pathlib import Path
from typing import Any

from rich.text import Text

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.commands.interpreting.words import Words
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import printable
from vitdecomp_lens.interpret.hierarchy import SIGNS, ConceptParts, ConceptTree

ABOUT = (
    "Share: of the squared length of the image's representation, minus the mean over {images} images; a concept's is "
    "what it has with all that refines it, (own) what it has beside them. Below the first level, "
    "shares under {threshold:g} % are counted together."
)

THRESHOLD = 3.0  # percent


def add_tree(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which concepts an image is split among."""
    tree = "a JSON file of concepts that refine each other, to split images among: nested objects, down to texts"
    parser.add_argument("--tree", type=Path, metavar="FILE", help=tree)
    signs = "whether amounts of concepts may be negative (any) or not (positive, the default)"
    parser.add_argument("--signs", choices=SIGNS, default="positive", help=signs)
    threshold = f"the share, in percent, below which concepts are counted together ({THRESHOLD:g})"
    parser.add_argument("--threshold", type=_percent, default=THRESHOLD, metavar="PERCENT", help=threshold)


def _percent(text: str) -> float:
    """A share in percent, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected a percentage from 0 to 100; got {text!r}")
    return value


def directions(tree: ConceptTree, words: Words) -> TextBank:
    """The directions of a tree's texts, without what all of them have in common.

    Raises:
        InputError: If texts cannot be embedded, or there is only one.
    """
    texts = list(dict.fromkeys(text for texts in tree.texts for text in texts))
    if len(texts) < 2:
        raise InputError(f"Expected a tree of concepts to tell apart, with at least two texts; got only {texts[0]!r}.")
    return words.embedded(texts).centred()


def shown(found: ConceptParts, image: int, name: str, others: int, threshold: float) -> Text:
    """The tree of an image; concepts of less than ``threshold`` percent are counted together."""
    whole = found.show(image, threshold=threshold / 100)
    lines = [printable(line) for line in whole.splitlines()[1:]]  # the first has the image's number
    title, about = f"What {printable(name)} is made of", ABOUT.format(images=others, threshold=threshold)
    return Text.assemble((title, "bold"), "\n", "\n".join(lines), "\n", (about, "dim"))


def packed(found: ConceptParts, image: int, top: int) -> dict[str, Any]:
    """The same as JSON has it: all concepts in their order, each with the components that add most to its share."""
    tree, shares, own = found.tree, found.shares[:, image], found.own_shares[:, image]
    best = shares.abs().topk(min(top, len(shares)), dim=0).indices
    concepts = [
        {
            "concept": name,
            "refines": None if parent < 0 else tree.names[parent],
            "share": float(shares[:, number].sum()),
            "own": float(own[:, number].sum()),
            "components": [
                {"component": found.labels[row], "share": float(shares[row, number])}
                for row in best[:, number].tolist()
            ],
        }
        for number, (name, parent) in enumerate(zip(tree.names, tree.parents, strict=True))
    ]
    return {"concepts": concepts, "remainder": float(found.remainder_share()[:, image].sum())}
