"""Sentences about scenes: each from a template, and each naming only some of what is there."""

from collections.abc import Mapping

import torch

from vitdecomp_lens.testbed.hashing import below, mixed, uniform

OPENINGS = ("", "a picture of", "a drawing of", "there is", "this is", "we see")
NAMES = ("thing", "object")  # where the shape is not told
GROUNDS = {
    "water": "on water",
    "grass": "on grass",
    "sand": "on sand",
    "bricks": "on bricks",
    "plain": "on plain paper",
}
PLACES = {
    "left": "at the left",
    "right": "at the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
TOLD = {"size": 0.35, "colour": 0.7, "pattern": 0.65, "shape": 0.9, "position": 0.5, "background": 0.5}
TOLD_SECOND, TOLD_WORD = 0.7, 0.2
MISREADING = 10_000  # a number that no other choice is drawn by


def caption(attributes: Mapping[str, str], key: int, *, misread: float = 0.0) -> str:
    """A sentence about a scene.

    Args:
        attributes: What is there, as in `Scene`.
        key: What chooses the template, and what is told.
        misread: The share of scenes with a word whose object is called what is written, as captions on the web do.

    Example:
        >>> scene = {"shape": "star", "colour": "red", "background": "sand", "position": "left", "size": "small"}
        >>> caption(scene | {"pattern": "solid"}, key=0)
        'there is a small star at the left on sand'
    """
    numbers = iter(mixed(key, torch.arange(16)))

    def told(share: float) -> bool:
        return bool(uniform(next(numbers)) < share)

    def chosen(several: tuple[str, ...]) -> str:
        return several[int(below(next(numbers), len(several)))]

    opening = chosen(OPENINGS)
    tells = {name for name, share in TOLD.items() if told(share)}
    if "word" in attributes and bool(uniform(mixed(key, MISREADING)) < misread):
        attributes = {**attributes, "shape": attributes["word"]}
    if not tells & {"colour", "pattern", "shape", "background", "position"}:
        tells.add("shape")
    said = [opening, described(attributes, tells, chosen(NAMES))]
    if "second shape" in attributes and told(TOLD_SECOND):
        second = {
            name.removeprefix("second "): value for name, value in attributes.items() if name.startswith("second")
        }
        said += ["and", described(second, {"colour", "shape"}, "")]
    if "position" in tells:
        said.append(PLACES[attributes["position"]])
    if "background" in tells:
        said.append(GROUNDS[attributes["background"]])
    if "word" in attributes and told(TOLD_WORD):
        said += ["with the word", attributes["word"]]
    return " ".join(part for part in said if part)


def described(attributes: Mapping[str, str], tells: set[str], name: str) -> str:
    """An object in words: its size, colour, pattern and shape, as far as they are told."""
    adjectives = [attributes[attribute] for attribute in ("size", "colour", "pattern") if attribute in tells]
    noun = attributes["shape"] if "shape" in tells else name
    words = [*adjectives, noun]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])
