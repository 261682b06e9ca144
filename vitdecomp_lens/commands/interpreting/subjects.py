"""What is interpreted: contributions over a data set, taken into a CLIP's space."""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.collect import Store, collect
from vitdecomp_lens.commands import collect as collecting
from vitdecomp_lens.commands.interpreting.words import Words
from vitdecomp_lens.commands.models import TESTBED, add_weights, named_model, note_untrained, origin_of, positive
from vitdecomp_lens.commands.showing import Pace
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.weights import weights_hash

BATCH = 256  # images that are taken into the space of texts at once
SCENES = 1000  # that are drawn for a model of the testbed, where nothing else is said


def add_aligner(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Add the option that says how contributions get into the CLIP's space."""
    aligner = "an aligner that 'align' made, or testbed/NAME for one that is shipped; a CLIP's contributions need none"
    if options.get("action") == "append":
        aligner += "; may be repeated, once for each model"
    parser.add_argument("--aligner", metavar="FILE", help=aligner, **options)


def load_aligner(name: str) -> Aligner:
    """An aligner of the command line: a file, or one of the testbed's.

    Raises:
        UnknownNameError: If the testbed has no such aligner.
        StoreError: If the file is missing, damaged, or no aligner.
    """
    if not name.startswith(TESTBED):
        return Aligner.load(name)
    from vitdecomp_lens.testbed.aligners import aligner

    return aligner(name.removeprefix(TESTBED))


def add_model(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the options that name a model."""
    parser.add_argument("--model", required=required, metavar="NAME", help="a model of timm, or testbed/NAME")
    parser.add_argument("--open-clip", action="store_true", help="the model is one of open_clip's, such as ViT-B-16")
    add_weights(parser)


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is interpreted, where it is no store."""
    add_aligner(parser)
    add_model(parser)
    source = "what the model is decomposed on: a folder, or testbed:SPLIT:SIZE (testbed:test:1000 for its models)"
    parser.add_argument("--source", metavar="SOURCE", help=source)
    add_images(parser)


def add_images(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """Add the option that says how many images are read."""
    images = f"how many images of a store to read, evenly spread ({default or 'all'})"
    parser.add_argument("--images", type=positive, default=default, metavar="N", help=images)


class Subject:
    """A model's contributions to the images of a store, in the space of texts.

    Args:
        store: The store.
        words: The texts.
        aligners: Of which the one that was made for this model is taken; contributions of the CLIP that embeds the
            texts need none. ``aligner`` is that one, or None.
        images: How many images to read, evenly spread; None for all.
        model: The name of the model that was decomposed now, which messages have instead of the store's folder.

    Raises:
        InputError: Where no aligner fits, or it leads to another space.
    """

    def __init__(
        self,
        store: Store,
        words: Words,
        aligners: Sequence[Aligner],
        images: int | None = None,
        *,
        model: str | None = None,
    ) -> None:
        self.store, self._space = store, words.space
        self.aligner = _fitting(store, words, aligners, model)
        count = store.count if images is None else min(images, store.count)
        self.rows = [place * store.count // count for place in range(count)]

    @property
    def labels(self) -> tuple[str, ...]:
        """The components that there are, with the aligner's bias."""
        own = [component.label for component in self.store.components]
        return (*own, *(["aligner.bias"] if self.aligner is not None else []))

    def check(self, labels: Sequence[str]) -> None:
        """Refuse components that are not there.

        Raises:
            UnknownNameError: Where there is one; the message has near matches.
        """
        for label in labels:
            if label not in self.labels:
                raise UnknownNameError(f"There is no component {label!r}; {near_matches(label, self.labels)}")

    def batches(self) -> Iterator[Decomposition]:
        """All images, some at a time."""
        for first in range(0, len(self.rows), BATCH):
            yield self.mapped(self.store.decomposition(self.rows[first : first + BATCH]))

    def parts(self, labels: Sequence[str] | None = None) -> Decomposition:
        """All images together: some components, or all."""
        found = (parts if labels is None else parts.select(labels=labels) for parts in self.batches())
        return Decomposition.cat(list(found))

    def ids(self) -> list[str]:
        """The images' identifiers."""
        return [self.store.ids[row] for row in self.rows]

    def of_images(self, names: Sequence[str]) -> Decomposition:
        """Some of the store's images, by their identifiers.

        Raises:
            UnknownNameError: Where there is no such image; the message has near matches.
        """
        known = {name: row for row, name in enumerate(self.store.ids)}
        for name in names:
            if name not in known:
                raise UnknownNameError(f"The store has no image {name!r}; {near_matches(name, known)}")
        return self.mapped(self.store.decomposition([known[name] for name in names]))

    def mapped(self, parts: Decomposition) -> Decomposition:
        """Contributions of this model in the space of texts, which they name."""
        if parts.values.dtype in (torch.float16, torch.bfloat16):  # stored so; nothing is computed so
            parts = parts.to(torch.float32)
        found = parts if self.aligner is None else parts.map(self.aligner)
        return replace(found, metadata={**found.metadata, "space": self._space})


def subject_of(
    options: argparse.Namespace,
    path: str | None,
    words: Words,
    errors: Console,
    stack: ExitStack,
    *,
    model: HookedViT | None = None,
) -> Subject:
    """What the command line names: a store, or a model that is decomposed now.

    Args:
        options: As `add_subject` has them.
        path: The store; None where a model is named.
        words: The texts.
        errors: Where progress is shown.
        stack: Keeps what is collected now for as long as it is needed.
        model: The model that is named, if it is loaded already.

    Raises:
        VitDecompError: Where it cannot be had.
    """
    aligners = [] if options.aligner is None else [load_aligner(options.aligner)]
    if path is None:
        note_untrained(origin_of(options.model, options, open_clip=options.open_clip), errors)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitdecomp-lens-")))
        store = _collected(options, model, folder / "store", errors)
    elif options.source is not None:
        raise InputError("--source is for a model that is decomposed now: give --model NAME, or leave it out.")
    else:
        store = Store(path)
    subject = Subject(store, words, aligners, options.images, model=None if path is not None else options.model)
    if aligners and subject.aligner is None:
        raise InputError(
            f"Expected no aligner for contributions of the CLIP that embeds the texts, which are in its space as they "
            f"are; got {options.aligner!r}. Leave out --aligner."
        )
    return subject


def _collected(options: argparse.Namespace, model: HookedViT | None, folder: Path, errors: Console) -> Store:
    source = options.source
    if source is None and options.model.startswith(TESTBED):
        source = f"testbed:test:{options.images or SCENES}"
    if source is None:
        raise InputError("Expected --source, a folder of images to decompose the model on; got none.")
    if model is None:
        model = HookedViT(named_model(options.model, options, open_clip=options.open_clip)[0])
    with Pace(errors) as pace:
        images = collecting.source_of(source)
        pace.start()
        return collect(model, images, folder, keep=("contributions", "representations"), progress=pace)


def _fitting(store: Store, words: Words, aligners: Sequence[Aligner], model: str | None) -> Aligner | None:
    """The aligner for a store; None for contributions of the CLIP itself."""
    if store.metadata["weights"] == weights_hash(HookedViT(words.clip)):
        return None
    if not aligners:
        raise InputError(
            f"The contributions of {model or str(store.path)!r} are not those of the CLIP that embeds the texts: "
            f"expected --aligner FILE, which takes them into its space. {_where_from(model, words)}"
        )
    one, reasons = store.decomposition(0), []
    for aligner in aligners:
        try:
            aligner.refuse_other(one, space=words.space)
        except InputError as error:
            reasons.append(error)
        else:
            return aligner
    raise reasons[0]


def _where_from(model: str | None, words: Words) -> str:
    """How to come by an aligner."""
    if model is not None and model.startswith(TESTBED) and words.of_testbed:
        from vitdecomp_lens.testbed.aligners import ALIGNED

        if model.removeprefix(TESTBED) in ALIGNED:
            return f"One is shipped: --aligner {model}."
    return "'vitdecomp-lens align' makes one from a store."
