"""The texts of the command line: which CLIP embeds them, and which they are."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from vitdecomp_lens.clip import TextBank, banks, templates
from vitdecomp_lens.clip.text_embedding import space_of
from vitdecomp_lens.commands.models import TESTBED, named_clip
from vitdecomp_lens.commands.showing import bar
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches

GENERAL = "general"


def add_clip(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which CLIP embeds texts."""
    parser.add_argument(
        "--clip",
        metavar="NAME",
        help="the CLIP that embeds texts: a model of open_clip, or testbed/clip (testbed/clip)",
    )
    parser.add_argument("--clip-pretrained", metavar="TAG", help="the weights of that CLIP, such as openai")
    parser.add_argument("--text-cache", type=Path, metavar="DIR", help="a folder that keeps embedded texts")


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which texts there are to choose from."""
    texts = "a file of texts, one a line; or a bank: general (the default); with testbed/clip also objects or captions,"
    texts += " with a CLIP of open_clip also one of general's subjects, such as animals"
    parser.add_argument("--texts", default=GENERAL, metavar="FILE|BANK", help=texts)


class Words:
    """Texts as directions in a CLIP's space.

    Args:
        options: Of the command line, as `add_clip` has them.
        errors: Where progress is shown.

    Raises:
        UnknownNameError: If there is no such CLIP.
        InputError: If its weights are not named, or cannot be loaded.
    """

    def __init__(self, options: argparse.Namespace, errors: Console) -> None:
        self._name = options.clip or f"{TESTBED}clip"
        self._cache, self._errors = options.text_cache, errors
        self.of_testbed = self._name.startswith(TESTBED)
        self.clip = named_clip(self._name, options.clip_pretrained)

    @cached_property
    def space(self) -> str:
        """The space of the directions."""
        return space_of(self.clip)

    def bank(self, name: str) -> TextBank:
        """A bank by its name, or a file of texts.

        Raises:
            UnknownNameError: If it is neither.
            InputError: If texts cannot be read or embedded.
        """
        known = self._banks()
        if name in known:
            return self.embedded(known[name]())
        return self.embedded(_texts_of(name, known))

    def features(self, named: Sequence[str]) -> dict[str, TextBank]:
        """Features by name, or with a file of texts, as ``NAME=FILE``; all there are, if none is named.

        Raises:
            UnknownNameError: If there is no such feature or file.
            InputError: If texts cannot be read or embedded, a feature is named twice, or not at all.
        """
        known = self._features()
        found: dict[str, TextBank] = {}
        for one in named or known:
            name, separator, file = one.partition("=")
            if separator and not (name.strip() and file):
                raise InputError(f"Expected NAME=FILE, a name and a file of texts, one a line; got {one!r}.")
            if name in found:
                raise InputError(f"Expected every feature once; {name!r} is named twice.")
            if not file and name not in known:
                own = f"NAME={name}, with a name for it" if Path(name).is_file() else f"{name}=FILE"
                raise UnknownNameError(
                    f"There is no feature {name!r}; {_near(name, known)} For one of your own: {own}, a file of texts, "
                    f"one a line."
                )
            put_into = None if file else self.templates
            found[name] = self.embedded(_texts_of(file, ()) if file else known[name], put_into)
        return found

    def embedded(self, texts: Iterable[str], put_into: Sequence[str] | None = None) -> TextBank:
        """Any texts.

        Args:
            texts: The texts.
            put_into: Templates that they are put into.

        Raises:
            InputError: If they cannot be embedded.
        """
        with bar(self._errors, "embedding texts") as (progress, task):
            return TextBank.from_open_clip(
                self.clip,
                texts,
                templates=put_into,
                tokenizer=self._tokenizer,
                cache=self._cache,
                space=self.space,
                progress=lambda done, of: progress.update(task, completed=done / of),
            )

    def _banks(self) -> Mapping[str, Callable[[], Iterable[str]]]:
        if self.of_testbed:
            from vitdecomp_lens.testbed import banks as of_testbed

            return {GENERAL: of_testbed.general, "objects": of_testbed.objects, "captions": of_testbed.captions}
        subjects = {name: (lambda texts=texts: texts) for name, texts in banks.categories().items()}
        return {GENERAL: banks.general, **subjects}

    def _features(self) -> Mapping[str, tuple[str, ...]]:
        if self.of_testbed:
            from vitdecomp_lens.testbed import banks as of_testbed

            return of_testbed.features()
        return banks.paper_features()

    @property
    def templates(self) -> tuple[str, ...]:
        """What fits the texts of features."""
        if self.of_testbed:
            from vitdecomp_lens.testbed import banks as of_testbed

            return of_testbed.TEMPLATES
        return templates.imagenet()

    @cached_property
    def _tokenizer(self) -> Any:
        if self.of_testbed:
            from vitdecomp_lens.testbed import tokenize

            return tokenize
        import open_clip

        try:
            return open_clip.get_tokenizer(self._name)
        except (OSError, ImportError, RuntimeError, ValueError) as error:  # some come from a hub
            raise InputError(f"The tokenizer of {self._name!r} cannot be had: {error}.") from error


def _texts_of(file: str, known: Iterable[str]) -> list[str]:
    """The lines of a file that are not blank."""
    path = Path(file)
    if not path.is_file():
        hint = f" There is no bank of that name either; {_near(file, known)}" if known else ""
        raise UnknownNameError(f"Expected a file of texts, one a line; there is no file {file!r}.{hint}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The texts of {file!r} cannot be read: {error}. Give a text file, one text a line."
        ) from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if (text := line.strip()) and found.setdefault(text, number) != number:
            raise InputError(
                f"Expected each text once; lines {found[text]} and {number} of {file!r} are both {text!r}. Leave one "
                f"out."
            )
    if not found:
        raise InputError(f"Expected at least one text in {file!r}, one a line; got none.")
    return list(found)


def _near(name: str, known: Iterable[str]) -> str:
    """The known names nearest to one, as the end of a sentence."""
    phrase = near_matches(name, known)
    return phrase if phrase.endswith("?") else f"{phrase}."
