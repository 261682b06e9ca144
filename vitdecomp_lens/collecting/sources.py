"""What a set of images is, whatever it is read from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from vitdecomp_lens.collecting.pictures import Picture
from vitdecomp_lens.errors import InputError

LabelNames = Mapping[str, Sequence[str] | None]


@dataclass(frozen=True)
class Sample:
    """One image before it is opened.

    Attributes:
        id: What it is called, wherever and in whatever order it comes.
        image: The picture, a file, the bytes of a file, or why there is none.
        labels: Numbers of its labels, by name.
    """

    id: str
    image: Picture
    labels: Mapping[str, int]


@runtime_checkable
class ImageSource(Protocol):
    """Images in a fixed order."""

    @property
    def identity(self) -> str:
        """Which images these are: another set has another identity, the same set in another place the same."""

    @property
    def count(self) -> int | None:
        """How many there are; None where that shows only at the end."""

    @property
    def labels(self) -> LabelNames:
        """The labels that every image carries, and the names of their values, where they have names."""

    def read(self, start: int, stop: int) -> list[Sample]:
        """Images ``start`` to ``stop``; fewer where they end before."""


def whole_number(label: Any, whose: str, name: str = "label") -> int:
    """A label as a number.

    Args:
        label: What a data set gives.
        whose: Which image's, for the message.
        name: The label's name.

    Raises:
        InputError: If it is none, missing, or no whole number.
    """
    try:
        if isinstance(label, str | bytes) or int(label) != label:
            raise ValueError
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Expected a whole number as {name!r} of {whose}; got {label!r}. Leave the image out, or number its label."
        ) from error
    return int(label)


class Forward:
    """Reads something that can only be iterated; going back starts it again.

    Args:
        items: What is iterated.
    """

    def __init__(self, items: Any) -> None:
        self._items = items
        self._at, self._started = 0, False
        self._open: Iterator[Any] = iter(())

    def read(self, start: int, stop: int) -> list[Any]:
        """Items ``start`` to ``stop``; fewer where they end before."""
        if not self._started or start < self._at:
            skip = getattr(self._items, "skip", None)  # data sets of Hugging Face may know a shorter way
            self._open = iter(self._items) if skip is None or not start else iter(skip(start))
            self._at, self._started = 0 if skip is None else start, True
        missed = sum(1 for _ in islice(self._open, start - self._at))
        self._at += missed
        found = list(islice(self._open, stop - start)) if self._at == start else []
        self._at += len(found)
        return found
