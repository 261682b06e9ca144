"""What a set of images is, whatever it is read from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vitdecomp_lens.collecting.files import RESUME
from vitdecomp_lens.collecting.pictures import DAMAGED, Picture, Unreadable
from vitdecomp_lens.errors import InputError

LabelNames = Mapping[str, Sequence[str] | None]
SPREAD = 64  # how many images tell a data set from others
IN_A_ROW = 100  # items of a stream that cannot be read, after which it is given up
_END = object()


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


def spread(count: int) -> list[int]:
    """Some numbers of images, the first and the last among them, evenly between.

    >>> spread(3), len(spread(10_000)), spread(10_000)[-1]
    ([0, 1, 2], 64, 9999)
    """
    if count <= SPREAD:
        return list(range(count))
    return [place * (count - 1) // (SPREAD - 1) for place in range(SPREAD)]


def readable_or_not(read: Callable[[], Any]) -> Any:
    """What ``read`` gives, or why it gives nothing.

    Raises:
        InputError: Where it says itself what has to be done.
    """
    try:
        return read()
    except InputError:
        raise
    except DAMAGED as error:
        return Unreadable(f"{type(error).__name__}: {error}")


class Forward:
    """Reads something that can only be iterated; going back starts it again.

    Args:
        items: What is iterated.
    """

    def __init__(self, items: Any) -> None:
        self._items = items
        self._at, self._started = 0, False
        self._bad: list[str] = []  # why the last items could not be read, up to the one before this
        self._open: Iterator[Any] = iter(())

    def read(self, start: int, stop: int) -> list[Any]:
        """Items ``start`` to ``stop``, `Unreadable` in place of those that raise; fewer where they end before.

        Raises:
            InputError: Where an item that raises ends the stream, so that what follows it would be lost.
        """
        if not self._started or start < self._at:
            self._begin(start)
        found = []
        while self._at < stop:
            item = self._next()
            if item is _END:
                break
            if self._at >= start:
                found.append(item)
            self._at += 1
        return found

    def _begin(self, start: int) -> None:
        skip = getattr(self._items, "skip", None)  # data sets of Hugging Face may know a shorter way
        self._at, self._started, self._bad = start if skip is not None else 0, True, []
        opened = readable_or_not(lambda: iter(self._items) if skip is None or not start else iter(skip(start)))
        if isinstance(opened, Unreadable):
            self._started = False
            raise InputError(f"The stream of images cannot be opened: {opened.reason}.")
        self._open = opened

    def _next(self) -> Any:
        item = readable_or_not(lambda: next(self._open, _END))
        if isinstance(item, Unreadable):
            self._bad.append(item.reason)
            if len(self._bad) < IN_A_ROW:
                return item
        if self._bad and (item is _END or isinstance(item, Unreadable)):
            self._started = False
            # A generator that raises is at its end: the rest of the images would be missing, and nobody would know.
            raise InputError(
                f"The stream of images broke at item {self._at - len(self._bad) + (item is not _END)}: {self._bad[0]}. "
                f"What follows cannot be read. Mend the stream, or give a data set that can be indexed; a store that "
                f"was begun goes on with {RESUME}."
            )
        self._bad = []
        return item
