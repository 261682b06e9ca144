"""Texts that the testbed's CLIP can read, and their directions.

All are made of the values of `ATTRIBUTES` and the words of captions, so that `tokenize` knows each of them. Banks for
models that read any English are in `vitdecomp_lens.clip.banks`.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vitdecomp_lens.clip.text_bank import TextBank
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.testbed.captions import GROUNDS, NAMES, OPENINGS, PLACES, caption, described
from vitdecomp_lens.testbed.hashing import below, mixed
from vitdecomp_lens.testbed.scenes import ATTRIBUTES
from vitdecomp_lens.testbed.vocabulary import tokenize

TEMPLATES = tuple(f"{opening} {{}}".strip() for opening in OPENINGS)  # they take the texts of `features` and `objects`
OBJECT = NAMES[-1]
TRIES = 50  # scenes drawn for each caption asked for, before it is said that there are not so many


def features() -> Mapping[str, tuple[str, ...]]:
    """A text for each value of each attribute of scenes, in the order of `ATTRIBUTES`, and for each written word.

    Example:
        >>> features()["colour"][:2], features()["background"][0], features()["word"][0]
        (('a red object', 'an orange object'), 'an object on water', 'an object with the word circle')
    """
    told = {name: tuple(_told(name, value) for value in values) for name, values in ATTRIBUTES.items()}
    thing = described({}, set(), OBJECT)
    return MappingProxyType({**told, "word": tuple(f"{thing} with the word {shape}" for shape in ATTRIBUTES["shape"])})


def objects() -> tuple[str, ...]:
    """Every object that scenes can show, by colour, pattern and shape.

    Example:
        >>> len(objects()), objects()[1]
        (320, 'a red solid square')
    """
    names = ("colour", "pattern", "shape")
    combinations = product(*(ATTRIBUTES[name] for name in names))
    return tuple(described(dict(zip(names, one, strict=True)), set(names), OBJECT) for one in combinations)


def captions(count: int = 256, *, seed: int = 0) -> tuple[str, ...]:
    """Different captions of scenes drawn by chance, each telling some of their attributes.

    Args:
        count: How many.
        seed: What chooses them: the same for the same.

    Raises:
        InputError: Where there are not so many, or none is asked for.

    Example:
        >>> len(set(captions())), captions(3) == captions()[:3]
        (256, True)
    """
    if count < 1:
        raise InputError(f"Expected a count of captions of at least 1; got {count}.")
    keys = mixed(seed, torch.arange(TRIES * count))
    drawn = [below(mixed(keys, place), len(values)).tolist() for place, values in enumerate(ATTRIBUTES.values())]
    found: dict[str, None] = {}
    for key, *numbers in zip(keys.tolist(), *drawn, strict=True):
        scene = zip(ATTRIBUTES.items(), numbers, strict=True)
        found[caption({name: values[number] for (name, values), number in scene}, key)] = None
        if len(found) == count:
            return tuple(found)
    raise InputError(f"Expected a count of captions that there are; {TRIES * count} scenes have {len(found)} of them.")


def general() -> tuple[str, ...]:
    """All of `features` and `objects`, and the default number of `captions`: more than 600 texts.

    Example:
        >>> len(general()) == len(set(general())) > 600
        True
    """
    told = (text for texts in features().values() for text in texts)
    return tuple(dict.fromkeys([*told, *objects(), *captions()]))


def text_bank(
    clip: nn.Module, texts: Iterable[str] | None = None, *, templates: Sequence[str] | None = None, **options: Any
) -> TextBank:
    """Directions of texts in the space of the testbed's CLIP.

    Args:
        clip: The testbed's CLIP, whole.
        texts: Of words that it knows; None for `general`.
        templates: As for `TextBank.from_open_clip`; `TEMPLATES` fits the texts of `features` and `objects`.
        **options: Passed to `TextBank.from_open_clip`.

    Raises:
        UnknownNameError: If a word is none that it knows; it names them.
        InputError: As `TextBank.from_open_clip`.

    Example:
        >>> from vitdecomp_lens.testbed.models import build
        >>> bank = text_bank(build("clip"), features()["colour"], templates=TEMPLATES)
        >>> bank.directions.shape, bank.space[:8]
        (torch.Size([8, 64]), 'CLIP-64-')
    """
    texts = general() if texts is None else texts
    return TextBank.from_open_clip(clip, texts, templates=templates, tokenizer=tokenize, **options)


def _told(attribute: str, value: str) -> str:
    """An object of which only this is told."""
    place = {"position": PLACES, "background": GROUNDS}.get(attribute, {}).get(value, "")
    return f"{described({attribute: value}, {attribute}, OBJECT)} {place}".strip()
