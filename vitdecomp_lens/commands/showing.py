"""What commands show: tables, errors, and of a long run how much is done, how fast, and how long it will take."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from vitdecomp_lens.certificate import WIDTH
from vitdecomp_lens.errors import VitDecompError
from vitdecomp_lens.explanation import printable

EVERY = 30.0  # seconds between lines, where standard error is no terminal


def tables() -> Console:
    """Standard output. Piped into a file, tables have the width that they are made for."""
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def say_error(errors: Console, error: VitDecompError) -> None:
    """Print what went wrong, on one line."""
    errors.print(Text.assemble(("Error: ", "bold red"), printable(str(error))), soft_wrap=True)


@contextmanager
def bar(console: Console, what: str) -> Iterator[tuple[Progress, TaskID]]:
    """A bar that goes to 1 and is gone once it is done; nothing where the console is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task(what, total=1.0)


class Pace:
    """A bar on a terminal, and a line now and then elsewhere.

    Args:
        console: Where to.
        what: What is counted.
        clock: Seconds.
    """

    def __init__(self, console: Console, what: str = "images", *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._what, self._clock = console, what, clock
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=None)
        self._begun = self._said = clock()

    def __enter__(self) -> "Pace":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self) -> None:
        """Count the time from here: loading models is no part of it."""
        self._begun = self._said = self._clock()

    def __call__(self, done: int, of: int | None, before: int) -> None:
        """Show what is done, of how much, of which ``before`` had been there."""
        now = self._clock()
        text = self.text(done, of, before, now - self._begun)
        self._bar.update(self._task, description=text, completed=done, total=of)
        if not self._console.is_terminal and now - self._said >= EVERY:
            self._console.print(Text(text), soft_wrap=True)
            self._said = now

    def text(self, done: int, of: int | None, before: int, seconds: float) -> str:
        """The same in words.

        >>> Pace(Console()).text(150, 1000, 50, 4.0)
        '150 of 1000 images, 25.0 images/s, 0:00:34 left'
        """
        speed = (done - before) / seconds if seconds > 0 else 0.0
        said = f"{done}{'' if of is None else f' of {of}'} {self._what}, {speed:.1f} {self._what}/s"
        if of is None or not speed:
            return said
        return f"{said}, {timedelta(seconds=round((of - done) / speed))} left"
