"""The files of a store: a manifest, chunks, and what is written when all of them are there.

Every file has a checksum, carries the manifest's key, and has its name only once it is whole.
"""

import hashlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitdecomp_lens import storage
from vitdecomp_lens.errors import InputError, StoreError

FORMAT, VERSION = "vitdecomp_lens store", 1
KIND = "chunk of a store"
MANIFEST, COMPLETE = "manifest.json", "complete.json"
LABEL = "labels."  # what the names of labels' tensors begin with
RESUME = "resume=True (--resume on the command line)"
_ANEW = f"Delete it, if it is there, and collect again with {RESUME}, which makes it anew."
_UNFINISHED_MANIFEST = re.compile(rf"\.{re.escape(MANIFEST)}\.[0-9a-f]{{32}}\.unfinished")
# Ours, and what safetensors calls a file that it has not written to the end.
_UNFINISHED = re.compile(
    rf"\.({re.escape(MANIFEST)}|{re.escape(COMPLETE)}|(chunk|gathered)-\d+\.safetensors)\.[0-9a-f]{{32}}\.unfinished"
    r"|\.tmp[0-9A-Za-z]{6}"
)


@dataclass(frozen=True)
class StoreFiles:
    """Where the parts of a store are, and which manifest they belong to.

    Attributes:
        folder: The store.
        manifest: What was asked for, of what.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """A hash of the manifest, which every chunk repeats."""
        return hashlib.blake2b(_canonical(self.manifest).encode(), digest_size=8).hexdigest()

    def chunk(self, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"chunk-{number:06d}.safetensors"

    def numbers(self) -> list[int]:
        """Which chunks there are."""
        names = (path.stem.removeprefix("chunk-") for path in self.folder.glob("chunk-*.safetensors"))
        return sorted(int(name) for name in names if name.isdecimal())

    def write(self, number: int, tensors: Mapping[str, Tensor], ids: Sequence[str], skipped: Sequence[Any]) -> None:
        """Write a chunk.

        Raises:
            StoreError: Where there is no room for it.
        """
        header = {"store": self.key, "chunk": number, "ids": list(ids), "skipped": [list(one) for one in skipped]}
        storage.write(self.chunk(number), kind=KIND, tensors=tensors, header=header)

    def read(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a chunk, checked, and its header.

        Raises:
            StoreError: Where it is missing, damaged, or of another store.
        """
        path = self.chunk(number)
        try:
            tensors, header = storage.read(path, kind=KIND, needs=(), again=_ANEW)
        except StoreError as error:
            raise _unusable(path, str(error).removesuffix(_ANEW).rstrip()) from error
        return tensors, self._mine(header, number)

    def header(self, number: int) -> dict[str, Any]:
        """The header of a chunk, whose file is seen to be as long as it should, and whose tensors are not read.

        Raises:
            StoreError: Where it is missing, damaged, or of another store.
        """
        path = self.chunk(number)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                checksum, _, text = (file.metadata() or {})[storage.FORMAT].partition(" ")
            if checksum != f"{zlib.crc32(text.encode()):08x}":
                raise ValueError("its header is not what was written")
            header: dict[str, Any] = json.loads(text)["header"]
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise _unusable(path, f"It is missing, damaged or half-written ({error}).") from error
        return self._mine(header, number)

    def _mine(self, header: dict[str, Any], number: int) -> dict[str, Any]:
        if header.get("store") != self.key or header.get("chunk") != number:
            raise _unusable(self.chunk(number), "It belongs to another store, or the manifest beside it does.")
        return header

    def has(self, number: int) -> bool:
        """Whether a chunk is there and whole, as far as can be seen without reading its tensors."""
        try:
            self.header(number)
        except StoreError:
            return False
        return True

    def finish(self, count: int) -> None:
        """Say that all chunks are there.

        Raises:
            StoreError: Where one is missing or damaged.
            InputError: Where none holds an image.
        """
        sizes: list[int] = []
        skipped: list[list[str]] = []

        def ids() -> Iterator[Sequence[str]]:
            for header in map(self.header, range(count)):
                sizes.append(len(header["ids"]))
                skipped.extend(header["skipped"])
                yield header["ids"]

        found = ids_hash(ids())
        if not sum(sizes):
            first = f", such as {skipped[0][0]!r}: {skipped[0][1]}" if skipped else ""
            raise InputError(f"None of the {len(skipped)} images could be read{first}.")
        complete = {"store": self.key, "sizes": sizes, "ids": found, "skipped": skipped}
        with self.resumable():
            write_json(self.folder / COMPLETE, complete)

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Where something cannot be written, add what is there and how to go on.

        Raises:
            StoreError: Then.
        """
        try:
            yield
        except StoreError as error:
            raise StoreError(
                f"{error} The store can be resumed: {len(self.numbers())} chunks are there. Make room, and collect "
                f"again with {RESUME}."
            ) from error

    def tidy(self) -> None:
        """Remove what a killed process was writing into this store: our unfinished files, and those of safetensors."""
        self._remove(_UNFINISHED)

    def tidy_manifest(self) -> None:
        """Remove the manifest of a store that was killed before it was one; nothing else here is known to be ours."""
        self._remove(_UNFINISHED_MANIFEST)

    def _remove(self, names: re.Pattern[str]) -> None:
        for path in list(self.folder.iterdir()):
            if names.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)


def ids_hash(several: Iterable[Sequence[str]]) -> str:
    """A hash of identifiers in their order, however they are cut into chunks."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in several:
        for name in ids:
            digest.update(f"{name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _unusable(path: Path, why: str) -> StoreError:
    return StoreError(f"The chunk {path.name} of the store {str(path.parent)!r} cannot be used. {why} {_ANEW}")


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a manifest, so that ``path`` holds either what it held before or all of it.

    Raises:
        StoreError: Where it cannot be written.
    """
    content = storage.as_json("a manifest", dict(content))
    checksum = f"{zlib.crc32(_canonical(content).encode()):08x}"
    packed = {"format": FORMAT, "version": VERSION, "crc32": checksum, "content": content}
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")
    try:
        unfinished.write_text(json.dumps(packed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise StoreError(f"Could not write {path}: {error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        StoreError: Where it is missing, damaged, or of another version.
    """
    try:
        packed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"Expected a store's {path.name} at {str(path)!r}; it cannot be read: {error}.") from error
    if not isinstance(packed, dict) or packed.get("format") != FORMAT:
        raise StoreError(f"Expected a store's {path.name} at {str(path)!r}; this package did not write it.")
    if packed.get("version") != VERSION:
        raise StoreError(
            f"Expected a store of version {VERSION} at {str(path.parent)!r}; it has version {packed.get('version')}. "
            f"Read it with the vitdecomp_lens that wrote it, or collect again."
        )
    content = packed.get("content")
    if not isinstance(content, dict) or packed.get("crc32") != f"{zlib.crc32(_canonical(content).encode()):08x}":
        raise StoreError(f"The {path.name} of the store {str(path.parent)!r} is damaged: it is not what was written.")
    return content
