"""Trees of concepts: which concepts refine which, and by what texts each is known. `hierarchy` decomposes by them."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError, near_matches
from vitdecomp_lens.selecting import refuse_duplicates

__all__ = ["ConceptTree"]

_FIELDS = {"texts", "children"}  # of a node that is written out
ONE = "Leave all but one out, or give them other names."


@dataclass(frozen=True, repr=False)
class ConceptTree:
    """Concepts, each with the one that it refines and with the texts it is known by.

    A concept without texts is known by those below it: its direction is the mean of its children's.

    Attributes:
        names: All different; a concept after the one that it refines.
        parents: For each, the number of the concept that it refines; -1 for those of the first level.
        texts: For each, its own texts.

    Raises:
        InputError: Where there is no concept, a name is blank or repeated, concepts refine each other in a circle, or
            one has neither texts nor children.

    Example:
        >>> tree = ConceptTree.of({"colour": {"warm": ["red", "orange"], "cold": ["blue"]}, "sea": "on water"})
        >>> tree
        ConceptTree(7 concepts on 3 levels, 4 texts)
        >>> tree.level(2), tree.children("warm"), tree.path("red")
        (('warm', 'cold', 'sea'), ('red', 'orange'), ('colour', 'warm', 'red'))
    """

    names: tuple[str, ...]
    parents: tuple[int, ...]
    texts: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise InputError("Expected a tree of at least one concept; got none.")
        if not len(self.names) == len(self.parents) == len(self.texts):
            raise InputError(
                f"Expected a parent and texts for each of the {len(self.names)} concepts; got {len(self.parents)} and "
                f"{len(self.texts)}."
            )
        for number, name in enumerate(self.names):
            if not isinstance(name, str) or not name.strip():
                raise InputError(f"Expected concepts with names; concept {number} is called {name!r}.")
        _refuse_repeated(zip(self.names, map(self._above, self.parents), strict=True))
        for name, parent, number in zip(self.names, self.parents, range(len(self.names)), strict=True):
            if not -1 <= parent < number:
                raise InputError(
                    f"Expected each concept after the one that it refines; {name!r} stands at {number}, what it "
                    f"refines at {parent}. ConceptTree.of_parents puts them in order."
                )
        for number, name in enumerate(self.names):
            self._check_texts(name, self.texts[number], bool(self.numbers_below[number]))

    def _above(self, parent: int) -> str | None:
        return self.names[parent] if 0 <= parent < len(self.names) else None

    @staticmethod
    def _check_texts(name: str, texts: Sequence[str], has_children: bool) -> None:
        if not texts and not has_children:
            raise InputError(f"Expected a text for each concept without children; {name!r} has none.")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"Expected texts that say something; {name!r} has {text!r}.")
        refuse_duplicates(texts, of=f"texts of {name!r}", remedy=ONE)

    # ---- making

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> "ConceptTree":
        """A tree from nested mappings.

        What stands under a name is: a mapping of its children; a list of the names of its children; a text; None for a
        concept whose text is its name; or ``{"texts": [...], "children": ...}``, either of which may be missing. In
        lists and under None, the name is the text.

        Raises:
            InputError: As for the class; or where a mapping holds itself, or something else stands there.

        Example:
            >>> ConceptTree.of({"dog": {"texts": ["a dog"], "children": ["a terrier", "a poodle"]}}).texts
            (('a dog',), ('a terrier',), ('a poodle',))
        """
        if not isinstance(mapping, Mapping):
            raise InputError(f"Expected a mapping of names to what refines them; got {type(mapping).__name__}.")
        found = list(_nodes(mapping, -1, (), [0]))
        return cls(*(tuple(column) for column in zip(*found, strict=True))) if found else cls((), (), ())

    @classmethod
    def of_parents(
        cls, parents: Mapping[str, str | None], texts: Mapping[str, Sequence[str]] | None = None
    ) -> "ConceptTree":
        """A tree from the name of the concept that each refines.

        Args:
            parents: For each concept the name of the one that it refines; None for those of the first level.
            texts: For some, their own texts. Where a concept has no children and no texts, its name is its text.

        Raises:
            InputError: As for the class; a circle is told by its names.
            UnknownNameError: Where a concept refines one that is not there, or texts are given for one.

        Example:
            >>> ConceptTree.of_parents({"red": "colour", "colour": None}).names
            ('colour', 'red')
        """
        texts = {} if texts is None else texts
        for name, parent in parents.items():
            _refuse_parent(name, parent)
        for name in [*(parent for parent in parents.values() if parent is not None), *texts]:
            if name not in parents:
                raise UnknownNameError(f"There is no concept {name!r} in the tree; {near_matches(name, parents)}")
        below: dict[str | None, list[str]] = {}
        for name, parent in parents.items():
            _refuse_circle(name, parents)
            below.setdefault(parent, []).append(name)
        order: list[str] = []
        waiting = below.get(None, [])[::-1]
        while waiting:
            order.append(waiting.pop())
            waiting += below.get(order[-1], [])[::-1]
        number = {name: place for place, name in enumerate(order)}
        own = (texts.get(name, () if name in below else (name,)) for name in order)
        above = (parents[name] for name in order)
        return cls(
            tuple(order),
            tuple(-1 if parent is None else number[parent] for parent in above),
            tuple(_texts(name, one) for name, one in zip(order, own, strict=True)),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ConceptTree":
        """Read a JSON file: what `save` wrote, or nested objects as `of` takes them.

        Raises:
            StoreError: Where it cannot be read, or is no JSON.
            InputError: Where what it says is no tree.
        """
        try:
            said = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_told_once)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise StoreError(f"Expected a tree of concepts as JSON at {path}: {error}.") from error
        if not isinstance(said, dict):
            raise InputError(f"Expected a JSON object of concepts at {path}; got a {type(said).__name__}.")
        return cls._from_list(said["concepts"]) if isinstance(said.get("concepts"), list) else cls.of(said)

    @classmethod
    def _from_list(cls, listed: list[Any]) -> "ConceptTree":
        for number, one in enumerate(listed):
            if not isinstance(one, dict) or not isinstance(one.get("name"), str):
                raise InputError(f"Expected concepts with a name each; concept {number} of the file is {one!r}.")
            _refuse_parent(one["name"], one.get("parent"))
        _refuse_repeated((one["name"], one.get("parent")) for one in listed)
        parents = {one["name"]: one.get("parent") for one in listed}
        return cls.of_parents(
            parents, {one["name"]: _texts(one["name"], one["texts"]) for one in listed if "texts" in one}
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file: ``{"concepts": [{"name": ..., "parent": ..., "texts": [...]}, ...]}``.

        Raises:
            StoreError: Where the file cannot be written.
        """
        above = (None if parent < 0 else self.names[parent] for parent in self.parents)
        rows = zip(self.names, above, self.texts, strict=True)
        concepts = [{"name": name, "parent": parent, "texts": list(texts)} for name, parent, texts in rows]
        try:
            Path(path).write_text(json.dumps({"concepts": concepts}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"Could not write {path}: {error}. Expected a folder that can be written to.") from error

    # ---- looking

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def numbers_below(self) -> tuple[tuple[int, ...], ...]:
        """For each concept, the numbers of those that refine it."""
        found: list[list[int]] = [[] for _ in self.names]
        for number, parent in enumerate(self.parents):
            if parent >= 0:
                found[parent].append(number)
        return tuple(map(tuple, found))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """On which level each concept stands, from 1."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent < 0 else found[parent] + 1)
        return tuple(found)

    @property
    def depth(self) -> int:
        """How many levels there are."""
        return max(self.depths)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __repr__(self) -> str:
        return f"ConceptTree({len(self)} concepts on {self.depth} levels, {sum(map(len, self.texts))} texts)"

    def number(self, name: str) -> int:
        """The number of a concept.

        Raises:
            UnknownNameError: Where there is none of this name.
        """
        if name not in self._numbers:
            raise UnknownNameError(f"The tree has no concept {name!r}; {near_matches(name, self.names)}")
        return self._numbers[name]

    def children(self, name: str) -> tuple[str, ...]:
        """The concepts that refine one."""
        return tuple(self.names[child] for child in self.numbers_below[self.number(name)])

    def path(self, name: str) -> tuple[str, ...]:
        """What a concept refines, from the first level down to itself."""
        number, found = self.number(name), []
        while number >= 0:
            found.append(self.names[number])
            number = self.parents[number]
        return tuple(found[::-1])

    def level(self, level: int) -> tuple[str, ...]:
        """The concepts of a level, with those above it that nothing refines further.

        Raises:
            InputError: Where there is no such level.
        """
        if not 1 <= level <= self.depth:
            raise InputError(f"Expected a level from 1 to {self.depth}; got {level}.")
        return tuple(
            name
            for name, depth, below in zip(self.names, self.depths, self.numbers_below, strict=True)
            if depth == level or (depth < level and not below)
        )


def _nodes(
    mapping: Mapping[str, Any], parent: int, above: tuple[int, ...], count: list[int]
) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Names, parents and texts of nested mappings, in order; ``above`` are the mappings that this one lies in."""
    if id(mapping) in above:
        raise InputError("Expected a tree; a mapping holds itself, so that its concepts would have no end.")
    for name, said in mapping.items():
        number = count[0]
        count[0] += 1
        texts, below = _told(name, said)
        yield name, parent, texts
        yield from _nodes(below, number, (*above, id(mapping)), count)


def _told(name: Any, said: Any) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The texts and the children of a concept."""
    if said is None:
        return (name,), {}
    if isinstance(said, str):
        return (said,), {}
    if isinstance(said, Mapping) and said and set(said) <= _FIELDS:
        texts, inner = _texts(name, said.get("texts", ())), said.get("children")
        below = {} if inner is None else _children(name, inner)
        return (texts if texts or below else (name,)), below
    below = _children(name, said)
    return (() if below else (name,)), below


def _children(name: Any, said: Any) -> Mapping[str, Any]:
    """The children of a concept, each with what stands under it."""
    if isinstance(said, list | tuple) and all(isinstance(child, str) for child in said):
        _refuse_repeated((child, name) for child in said)
        return dict.fromkeys(said)
    if isinstance(said, Mapping):
        return said
    raise InputError(
        f"Expected under {name!r} its children (a mapping, or a list of names), a text, None, or {{'texts': [...], "
        f"'children': ...}}; got {said!r}."
    )


def _texts(name: Any, said: Any) -> tuple[str, ...]:
    """The texts of a concept, which are one or several."""
    if isinstance(said, str):
        return (said,)
    if isinstance(said, list | tuple):
        return tuple(said)
    raise InputError(f"Expected the texts of {name!r} as one text, or as a list of texts; got {said!r}.")


def _refuse_parent(name: str, parent: Any) -> None:
    if not isinstance(parent, str | None):
        raise InputError(
            f"Expected the name of the concept that {name!r} refines, or None for the first level; got {parent!r}."
        )


def _refuse_repeated(placed: Iterable[tuple[str, Any]]) -> None:
    """Refuse a concept that is there twice; ``placed`` are names, and which each refines."""
    places: dict[str, list[str]] = {}
    for name, above in placed:
        places.setdefault(name, []).append("on the first level" if above is None else f"under {above!r}")
    for name, several in places.items():
        if len(several) > 1:
            raise InputError(
                f"Expected each concept once; {name!r} is carried more than once: {' and '.join(several)}. {ONE}"
            )


def _refuse_circle(name: str, parents: Mapping[str, str | None]) -> None:
    seen, here = [name], parents[name]
    while here is not None:
        seen.append(here)
        if here in seen[:-1]:
            circle = seen[seen.index(here) :]
            raise InputError(
                f"Expected a tree; these concepts refine each other in a circle: {' → '.join(map(repr, circle))}. One "
                f"of them has to be on the first level, or to refine another."
            )
        here = parents[here]


def _told_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, in which JSON itself would let the last of two equal names win."""
    names = [name for name, _ in pairs]
    refuse_duplicates(names, of=f"the entries of the object with {', '.join(map(repr, names[:5]))}", remedy=ONE)
    return dict(pairs)
