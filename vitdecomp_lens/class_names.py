"""Names of classes: ImageNet's, which timm carries, or one's own; finding a class; which question classes answer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate

from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches

SUGGESTED = 5


@dataclass(frozen=True)
class Question:
    """Classes of which one is the answer: probabilities are among these, and sum to 1.

    Most classifiers answer one question with all their classes. One that names an object's shape and its colour, say,
    answers several, and its logits of shapes say nothing of those of colours.

    Attributes:
        name: Such as ``"colour"``; empty where a classifier answers only one.
        classes: Their indices.
    """

    name: str
    classes: range

    @classmethod
    def of(cls, num_classes: int, sizes: Mapping[str, int] | None = None) -> "tuple[Question, ...]":
        """The questions of a classifier, whose classes come in their order.

        Args:
            num_classes: How many classes there are.
            sizes: How many of them answer each question. If they do not come to all classes, they are another
                classifier's, and this one has one question.

        Example:
            >>> Question.of(5, {"shape": 3, "colour": 2})
            (Question(name='shape', classes=range(0, 3)), Question(name='colour', classes=range(3, 5)))
            >>> Question.of(7, {"shape": 3, "colour": 2})
            (Question(name='', classes=range(0, 7)),)
        """
        if not sizes or min(sizes.values()) < 1 or sum(sizes.values()) != num_classes:
            return (cls("", range(num_classes)),)
        ends = list(accumulate(sizes.values()))
        return tuple(cls(name, range(end - size, end)) for (name, size), end in zip(sizes.items(), ends, strict=True))


@dataclass(frozen=True)
class ClassNames:
    """What the classes of a classifier are called.

    Attributes:
        names: One a class. Synonyms are separated by commas, the usual one first.
        synsets: WordNet's number of each class, where it has one.

    Example:
        >>> names = ClassNames(("tench, Tinca tinca", "crane", "crane"), ("n01440764", "n02012849", "n03126707"))
        >>> names.find("Tinca Tinca"), names.find("n03126707"), names.short(0)
        (0, 2, 'tench')
    """

    names: tuple[str, ...]
    synsets: tuple[str, ...] = ()

    @classmethod
    def of(cls, num_classes: int, given: Sequence[str] | None = None) -> "ClassNames":
        """The names given; else ImageNet's, if timm has a list of as many classes; else numbers.

        Raises:
            InputError: If the names given are not as many as the classes.
        """
        if given is not None:
            if isinstance(given, str) or len(given) != num_classes:
                came = "one text" if isinstance(given, str) else str(len(given))
                raise InputError(f"Expected a name for each of the {num_classes} classes; got {came}.")
            return cls(tuple(given))
        from timm.data import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset({"num_classes": num_classes})
        if not subset:
            return cls(tuple(f"class {number}" for number in range(num_classes)))
        info = ImageNetInfo(subset)
        return cls(
            tuple(info.index_to_description(number) for number in range(num_classes)),
            tuple(info.index_to_label_name(number) for number in range(num_classes)),
        )

    def short(self, index: int) -> str:
        """The first of a class's synonyms."""
        return self.names[index].split(",")[0].strip()

    def find(self, wanted: int | str) -> int:
        """The index of a class, by index, name, one of its synonyms, or synset; in any case of letters.

        Raises:
            UnknownNameError: If there is no such class, or several; the message names the nearest.
        """
        if isinstance(wanted, bool) or not isinstance(wanted, int | str):
            raise InputError(f"A class is named by its index or its name; got {type(wanted).__name__}.")
        if isinstance(wanted, int) or wanted.strip().removeprefix("-").isdecimal():
            index, count = int(wanted), len(self.names)
            if not 0 <= index < count:
                raise UnknownNameError(f"There is no class {index}; there are {count}, numbered from 0 to {count - 1}.")
            return index
        known: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            for alias in {_plain(name), *map(_plain, name.split(",")), *self.synsets[index : index + 1]}:
                known.setdefault(alias, []).append(index)
        return self._only(wanted, known)

    def _only(self, wanted: str, known: dict[str, list[int]]) -> int:
        found = known.get(_plain(wanted), [])
        # A class that is called just this comes before those that may also be called this.
        for name_of in (lambda index: self.names[index], self.short):
            found = [index for index in found if _plain(name_of(index)) == _plain(wanted)] or found
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(f"{index} ({self.names[index]})" for index in found)
            raise UnknownNameError(f"Several classes are called {wanted!r}: {listed}. Give the index.")
        raise UnknownNameError(f"There is no class {wanted!r}; {_suggested(_plain(wanted), known)}")


def _suggested(wanted: str, known: Iterable[str]) -> str:
    """As `near_matches`, but names that hold what is wanted as a word come first, the shortest before."""
    known = [name for name in known if "," not in name] or list(known)  # synonyms one by one
    word = re.compile(rf"(?<!\w){re.escape(wanted)}(?!\w)")
    holding = sorted((name for name in known if word.search(name)), key=len)[:SUGGESTED] if wanted else []
    if not holding:
        return near_matches(wanted, known)
    near = get_close_matches(wanted, sorted(set(known) - set(holding)), n=SUGGESTED - len(holding) or 1)
    return f"did you mean {' or '.join(map(repr, [*holding, *near][:SUGGESTED]))}?"


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())
