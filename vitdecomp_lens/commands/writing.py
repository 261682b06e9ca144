"""Files that commands write."""

import os
import re
from pathlib import Path

from vitdecomp_lens.errors import InputError

LONGEST_NAME = 100


def write(path: Path, text: str) -> None:
    """Write a file, and the folders that it needs.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> InputError:
    """What to raise where a file or folder cannot be written."""
    return InputError(f"{str(path)!r} cannot be written: {error}. Choose another place.")


def check_folder(folder: Path, option: str) -> None:
    """Refuse a place in which no folder can be made, before anything is computed.

    Args:
        folder: The place.
        option: Which names it.

    Raises:
        InputError: If there is a file.
    """
    nearest = next((path for path in (folder, *folder.parents) if os.path.exists(path)), folder)
    if os.path.exists(nearest) and not nearest.is_dir():
        raise InputError(f"{option} must be a folder; {str(nearest)!r} is a file. Choose another place.")


class PictureNames:
    """File names for pictures, made from those of photographs: harmless, and each only once.

    Args:
        folder: Where the pictures go.

    Example:
        >>> names = PictureNames(Path("explained"))
        >>> names.next("a/cat.jpg"), names.next("b/Cat.png"), names.next("-rf $(x).jpg")
        ('cat.png', 'Cat-2.png', 'rf_x.png')
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: set[str] = set()

    def next(self, photograph: str) -> str:
        """A name for the picture of a photograph."""
        stem = re.sub(r"[^\w.-]+", "_", Path(photograph).stem)[:LONGEST_NAME].strip("._-") or "photograph"
        name, number = f"{stem}.png", 2
        while name.casefold() in self.taken:  # not every file system tells cases apart
            name, number = f"{stem}-{number}.png", number + 1
        self.taken.add(name.casefold())
        return name
