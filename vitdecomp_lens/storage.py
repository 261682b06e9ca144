"""One file of labelled tensors: safetensors, with a JSON header of ours, written whole or not at all.

Nothing is ever unpickled. Every tensor and the header carry a checksum, so that a damaged file is an error and
never a wrong number. Use `write` and `read` for values that fit into memory; a stream over a data set is another
matter.
"""

import json
import os
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitdecomp_lens.components import Component
from vitdecomp_lens.coverage import Coverage, Stop
from vitdecomp_lens.errors import InputError, StoreError

FORMAT = "vitdecomp_lens"
VERSION = 1
AGAIN = "Write it again with .save(path)."
# torch.save writes a zip archive; a pickle starts with its protocol, where a header's length would have zeros.
_PICKLED = re.compile(rb"PK\x03\x04|\x80[\x02-\x05][^\x00]")


def as_json(what: str, value: Any) -> Any:
    """Return ``value`` as JSON gives it back (tuples become lists), or refuse it.

    Args:
        what: What the value is, for the message.
        value: Strings, finite numbers, booleans, None, and lists and dictionaries of them.

    Raises:
        InputError: Where JSON cannot hold the value.

    Example:
        >>> as_json("metadata", {"image_size": (224, 224)})
        {'image_size': [224, 224]}
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Expected {what} that JSON can hold (strings, finite numbers, booleans, None, lists, dictionaries): "
            f"{error}. Store tensors beside it, in a file of their own."
        ) from error


def write(path: str | os.PathLike[str], *, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header, so that ``path`` holds either what it held before or all of it.

    Args:
        path: Where to. An existing file is replaced.
        kind: What the file holds, such as ``"Decomposition"``; `read` asks for it.
        tensors: Tensors of any dtype and layout; they are stored contiguous, without gradients, as CPU tensors.
        header: What JSON can hold.

    Raises:
        StoreError: Where the file cannot be written.
        InputError: Where JSON cannot hold the header.
    """
    path = Path(path)
    stored = _unshared(tensors)
    checksums = {name: _checksum(tensor) for name, tensor in stored.items()}
    text = json.dumps(
        {"kind": kind, "version": VERSION, "crc32": checksums, "header": as_json("a header", dict(header))}
    )
    # One entry, because safetensors writes several in any order, and the same values should give the same bytes.
    metadata = {FORMAT: f"{zlib.crc32(text.encode()):08x} {text}"}
    # Beside its target, because os.replace is atomic within one file system only.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")
    try:
        write_tensors(unfinished, stored, metadata=metadata)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"Could not write {path}: {error}. Expected a folder that exists, with room and the right to write."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that whoever may read other new files may read: safetensors' own are their owner's only.

    Args:
        path: Where to.
        tensors: Contiguous ones that share no memory.
        metadata: What stands in its header.

    Raises:
        OSError: Where it cannot be written; of safetensors it may be a SafetensorError too.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777  # what the umask, or the folder, gives to new files
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


def read(
    path: str | os.PathLike[str], *, kind: str, needs: Iterable[str] = ("values",), again: str = AGAIN
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote.

    Args:
        path: The file.
        kind: What it is expected to hold.
        needs: Names of the tensors that must be there.
        again: What to do where it is damaged.

    Returns:
        The tensors by name, on the CPU, and the header.

    Raises:
        StoreError: Where there is no such file, or it is damaged, half-written, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        then = "Write one with .save(path)." if again == AGAIN else again
        raise StoreError(f"Expected a stored {kind} at {path}; there is no such file. {then}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header, checksums = _header(path, kind, file.metadata() or {}, again)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(_unreadable(path, kind, error, again)) from error
    for name in needs:
        if name not in tensors:
            raise damaged(path, kind, f"the tensor {name!r} is missing", again)
    for name, tensor in tensors.items():
        if checksums.get(name) != _checksum(tensor):
            raise damaged(path, kind, f"the tensor {name!r} is not what was written", again)
    return tensors, header


def damaged(path: str | os.PathLike[str], kind: str, what: str, again: str = AGAIN) -> StoreError:
    """The error for a file of ours whose content is wrong, for the caller to raise."""
    return StoreError(f"Expected a stored {kind} at {path}; it is damaged: {what}. {again}")


def pack_components(components: Iterable[Component]) -> list[list[Any]]:
    """Components as JSON: kind, layer, head, neuron, name and latent of each. A label alone would lose some of it."""
    return [list(astuple(component)) for component in components]


def unpack_components(packed: Iterable[Sequence[Any]]) -> tuple[Component, ...]:
    """What `pack_components` packed."""
    return tuple(Component(*entries) for entries in packed)


def pack(*, complete: bool, coverage: Coverage | None, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Completeness, coverage and metadata of labelled values as JSON."""
    return {"complete": complete, "coverage": None if coverage is None else asdict(coverage), "metadata": metadata}


def unpack(header: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that `pack` packed."""
    coverage = header["coverage"]
    if coverage is not None:
        coverage = Coverage(coverage["found"], coverage["branches"], tuple(Stop(**stop) for stop in coverage["stops"]))
    return {"complete": header["complete"], "coverage": coverage, "metadata": header["metadata"]}


@contextmanager
def restoring(path: str | os.PathLike[str], *, kind: str, again: str = AGAIN) -> Iterator[None]:
    """Turn what goes wrong while values are rebuilt from a file into a StoreError."""
    try:
        yield
    except (InputError, KeyError, TypeError) as error:
        raise damaged(path, kind, f"its parts do not fit ({error})", again) from error


def _header(path: Path, kind: str, metadata: Mapping[str, str], again: str) -> tuple[dict[str, Any], dict[str, int]]:
    if FORMAT not in metadata:
        raise StoreError(
            f"Expected a stored {kind} at {path}; it is a safetensors file that this package did not write. "
            f"Read its tensors with safetensors, and build a {kind} from them."
        )
    checksum, _, text = metadata[FORMAT].partition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        raise damaged(path, kind, "its header is not what was written", again)
    content = json.loads(text)
    if content["version"] > VERSION:
        raise StoreError(
            f"Expected a stored {kind} of version {VERSION} or older at {path}; it has version {content['version']}. "
            f"Read it with a newer vitdecomp_lens."
        )
    if (found := content["kind"]) != kind:
        if found.endswith("of a store"):  # a part, which is no class that could load it
            raise StoreError(
                f"Expected a stored {kind} at {path}; it holds a {found}. Name the store's folder instead, which "
                f"Store(folder) opens."
            )
        raise StoreError(f"Expected a stored {kind} at {path}; it holds another kind. Use {found}.load(path).")
    return content["header"], content["crc32"]


def _unreadable(path: Path, kind: str, error: Exception, again: str) -> str:
    with path.open("rb") as file:
        pickled = _PICKLED.match(file.read(4))
    if pickled:
        return (
            f"Expected a stored {kind} at {path}; it looks like a pickled or zipped file, which is never opened, "
            f"because unpickling runs code. Load it yourself if you trust it, and write it with .save(path)."
        )
    return (
        f"Expected a stored {kind} at {path}; it is damaged, half-written, or not a safetensors file ({error}). {again}"
    )


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share memory (safetensors refuses those that do)."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return stored


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
