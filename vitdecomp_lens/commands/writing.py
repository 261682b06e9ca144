"""Files that commands write."""

from pathlib import Path

from vitdecomp_lens.errors import InputError


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
