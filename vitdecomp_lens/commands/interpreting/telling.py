"""What all questions have in common: what is named, and how answers are written."""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from vitdecomp_lens.commands.writing import write
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import printable

FORMAT, VERSION = "vitdecomp_lens.interpretation", 1


def add_named(parser: argparse.ArgumentParser, what: str, text: str) -> None:
    """Add a store and what is asked of it, as positional arguments."""
    where = "a folder that 'collect' made, to be left out for --model NAME"
    parser.add_argument("named", nargs="*", metavar=f"STORE|{what}", help=f"{where}; then {text}")


def named_in(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The store, where no model is named, and the rest.

    Raises:
        InputError: If there is neither store nor model.
    """
    if options.model is not None:
        return None, options.named
    if not options.named:
        raise InputError("Expected a store, a folder that 'vitdecomp-lens collect' made, or --model NAME; got neither.")
    store, *others = options.named
    return store, others


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option to write the answer for machines."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answer as JSON, too")


def write_json(path: Path | None, question: str, answer: Mapping[str, Any]) -> None:
    """Write an answer, if it is to be written."""
    if path is not None:
        whole = {"format": FORMAT, "version": VERSION, "question": question, **answer}
        write(path, json.dumps(_finite(whole), allow_nan=False))


def titled(title: str, caption: str | None = None) -> Table:
    """An empty table."""
    return Table(
        title=Text(printable(title), style="bold"),
        title_justify="left",
        caption=None if caption is None else Text(printable(caption)),
        caption_justify="left",
    )


def nothing(title: str, reason: str) -> Text:
    """What stands in place of a table that would be empty."""
    return Text.assemble((printable(title), "bold"), "\n", printable(reason))


def cells(*texts: str) -> tuple[Text, ...]:
    """Cells of a table, without what a terminal would act on."""
    return tuple(Text(printable(text)) for text in texts)


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for what is none."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
