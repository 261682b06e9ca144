"""Any set of images as one thing: pictures and labels under identifiers that no loader's order changes.

`images_from` finds the adapter. To add a kind of data set of your own, write a class that satisfies `ImageSource`.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from vitdecomp_lens.collecting.files import ids_hash
from vitdecomp_lens.collecting.pictures import Unreadable, content_hash
from vitdecomp_lens.collecting.rows import RowImages
from vitdecomp_lens.collecting.sources import (
    IN_A_ROW,
    Forward,
    ImageSource,
    LabelNames,
    Sample,
    readable_or_not,
    spread,
    whole_number,
)
from vitdecomp_lens.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def images_from(source: Any, *, image: str | None = None, id: str | None = None) -> ImageSource:
    """Any set of images as an `ImageSource`.

    Args:
        source: A folder; a list of files; a data set of torch or torchvision that gives a picture, or a picture and its
            class; one of Hugging Face's ``datasets``, streaming too; the testbed's ``Scenes``; or an `ImageSource`.
        image: Of a Hugging Face data set, the column of the pictures; by default the only one there is.
        id: Of a Hugging Face data set, a column of identifiers; by default they are hashes of the pictures.

    Raises:
        InputError: Where there are no images, or they cannot be told.

    Example:
        >>> pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        >>> source = images_from([(picture, number) for number, picture in enumerate(pictures)])
        >>> source.count, [sample.labels for sample in source.read(1, 9)]
        (2, [{'label': 1}])
    """
    found = source if isinstance(source, ImageSource) else _adapted(source, image=image, id=id)
    if found.count == 0:
        raise InputError(f"Expected at least one image; the {type(source).__name__} is empty.")
    return found


def _adapted(source: Any, *, image: str | None, id: str | None) -> ImageSource:
    """Images behind the adapter for where they come from."""
    if isinstance(source, str | Path):
        return _folder(Path(source))
    if hasattr(source, "features") and hasattr(source, "column_names"):
        return RowImages(source, image=image, id=id)
    if all(hasattr(source, name) for name in ("split", "seed", "size", "drawn", "read")):
        return SceneImages(source)
    if _names_files(source):
        return _listed(source)
    if isinstance(source, Sequence) and all(isinstance(entry, str | Path) for entry in source):
        return FileImages([Path(entry) for entry in source], [Path(entry).as_posix() for entry in source])
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return ItemImages(source)
    if isinstance(source, Iterable) and not isinstance(source, Iterator):  # iterators cannot be read again
        return StreamImages(source)
    raise InputError(
        f"Expected images as a folder, a list of files, a data set of torch or of Hugging Face, or an ImageSource; got "
        f"{type(source).__name__}."
    )


# --- files ----------------------------------------------------------------------------------------------------------


class FileImages:
    """Files, under names of their own.

    Args:
        paths: Where they are.
        names: What they are called: paths that do not change when all of them are moved.
        classes: The number of each file's class.
        class_names: What classes are called.

    Raises:
        InputError: If there are none.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        names: Sequence[str],
        classes: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if not paths:
            raise InputError("Expected at least one image; the list of files is empty.")
        self.paths, self.names, self.classes = paths, names, classes
        self.labels: LabelNames = {} if classes is None else {"class": class_names}
        self.count = len(paths)
        digest = hashlib.blake2b(digest_size=16)
        for path, name in zip(paths, names, strict=True):
            digest.update(f"{name}\n{_size(path)}\n".encode("utf-8", "surrogateescape"))
        self.identity = f"{len(paths)} files {digest.hexdigest()}"

    def read(self, start: int, stop: int) -> list[Sample]:
        """The files, not opened yet."""
        rows = range(start, min(stop, len(self.paths)))
        labels = [{} if self.classes is None else {"class": self.classes[row]} for row in rows]
        return [Sample(self.names[row], self.paths[row], of) for row, of in zip(rows, labels, strict=True)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1  # unreadable: reading it says so


def _folder(folder: Path) -> FileImages:
    """All images below a folder; where all lie in subfolders, those are their classes."""
    if not folder.is_dir():
        raise InputError(f"Expected a folder of images at {str(folder)!r}; there is none.")
    found = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    images = [p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    paths = sorted(images, key=lambda path: path.relative_to(folder).as_posix())
    if not paths:
        raise InputError(f"Expected images below {str(folder)!r}; there are no files ending in {', '.join(SUFFIXES)}.")
    relative = [path.relative_to(folder) for path in paths]
    names = [path.as_posix() for path in relative]
    if any(len(path.parts) == 1 for path in relative):
        return FileImages(paths, names)
    class_names = sorted({path.parts[0] for path in relative})
    number = {name: n for n, name in enumerate(class_names)}
    return FileImages(paths, names, [number[path.parts[0]] for path in relative], class_names)


def _names_files(source: Any) -> bool:
    """Whether a data set lists its files, as torchvision's folders do."""
    listed = getattr(source, "samples", None)
    if not isinstance(listed, list) or not listed or not hasattr(source, "root"):
        return False
    first = listed[0]
    return isinstance(first, tuple) and isinstance(first[0], str) and first[0].lower().endswith(SUFFIXES)


def _listed(source: Any) -> FileImages:
    if getattr(source, "transform", None) is not None:
        raise InputError(
            "Expected a data set without transform, because every model's own is applied; got one with "
            f"{type(source.transform).__name__}. Make it again without."
        )
    paths = [Path(path) for path, _ in source.samples]
    names = [path.relative_to(source.root).as_posix() for path in paths]
    return FileImages(paths, names, [number for _, number in source.samples], getattr(source, "classes", None))


# --- the testbed ----------------------------------------------------------------------------------------------------


class SceneImages:
    """Drawn scenes: numbers of their attributes are labels, -1 where a scene lacks one.

    Args:
        scenes: As `vitdecomp_lens.testbed.Scenes`.
    """

    def __init__(self, scenes: Any) -> None:
        self.scenes, self.count = scenes, scenes.size
        self.identity = f"scenes {scenes.split}:{scenes.seed}"
        self.labels: LabelNames = dict.fromkeys(scenes.read(range(1))[1])

    def read(self, start: int, stop: int) -> list[Sample]:
        """Scenes, drawn together."""
        rows = range(start, min(stop, self.count))
        if not rows:
            return []
        images, known = self.scenes.read(rows)
        numbers = {name: column.tolist() for name, column in known.items()}
        found = []
        for place, (row, image) in enumerate(zip(rows, images, strict=True)):
            labels = {name: column[place] for name, column in numbers.items()}
            found.append(Sample(f"{self.scenes.split}:{self.scenes.seed}:{row}", image, labels))
        return found


# --- data sets of torch ---------------------------------------------------------------------------------------------


class ItemImages:
    """A data set of numbered items: pictures, or pictures with the number of their class. Hashes are identifiers.

    Args:
        dataset: As torch has it.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.count = dataset, len(dataset)
        if not self.count:
            raise InputError(f"Expected at least one image; the {type(dataset).__name__} is empty.")
        some = self._samples(spread(self.count))
        others = (sample for number in range(self.count) for sample in self._samples([number]))
        readable = (sample for sample in chain(some, others) if not _is_bad(sample))
        self.labels: LabelNames = {
            name: getattr(dataset, "classes", None) for sample in islice(readable, 1) for name in sample.labels
        }
        self.identity = f"{type(dataset).__name__} of {self.count}, {ids_hash([[sample.id for sample in some]])}"

    def _item(self, number: int) -> Any:
        return readable_or_not(lambda: self.dataset[number])

    def _samples(self, numbers: Sequence[int]) -> list[Sample]:
        # One by one, because data sets need not bear several threads; opening and hashing can take several at once.
        return _samples([self._item(number) for number in numbers], numbers)

    def read(self, start: int, stop: int) -> list[Sample]:
        """Items, in their order."""
        return self._samples(range(start, min(stop, self.count)))


def _samples(items: Sequence[Any], numbers: Sequence[int]) -> list[Sample]:
    """Several items of a data set, hashed at once."""
    pictures = {id(item[0] if isinstance(item, tuple | list) and item else item) for item in items}
    # One object under several numbers is not to be opened by two threads.
    threads = min(8, os.cpu_count() or 1) if len(pictures) == len(items) > 1 else 1
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(_sample, items, numbers))


def _sample(item: Any, number: int) -> Sample:
    """One item of a data set, which may be a picture alone."""
    if isinstance(item, Unreadable):
        return Sample(f"item {number}", item, {})
    picture, *labels = item if isinstance(item, tuple | list) else (item,)
    if not isinstance(picture, Image.Image | Tensor | Path) or len(labels) > 1:
        shown = ", ".join(type(part).__name__ for part in (picture, *labels))
        raise InputError(
            f"Expected a picture, or a picture and the number of its class, as item {number} of the data set; got "
            f"({shown}). Wrap the data set in one that gives these two, or write an ImageSource."
        )
    numbers = {"label": whole_number(labels[0], f"item {number}")} if labels else {}
    name = readable_or_not(lambda: content_hash(picture))  # pictures may be opened only here
    if isinstance(name, Unreadable):
        return Sample(f"item {number}", name, {})
    return Sample(name, picture, numbers)


class StreamImages:
    """A data set that can only be iterated, from the beginning; items are as for `ItemImages`.

    Args:
        dataset: Gives the same items in the same order whenever it is iterated.
    """

    def __init__(self, dataset: Any) -> None:
        self._rows, self.count = Forward(dataset), None
        first = self.read(0, 1)
        if not first:
            raise InputError(f"Expected at least one image; the {type(dataset).__name__} is empty.")
        readable = next((s for n in range(IN_A_ROW) for s in self.read(n, n + 1) if not _is_bad(s)), first[0])
        self.labels: LabelNames = dict.fromkeys(readable.labels)
        self.identity = f"{type(dataset).__name__} from {first[0].id}"

    def read(self, start: int, stop: int) -> list[Sample]:
        """The next items."""
        items = self._rows.read(start, stop)
        return _samples(items, range(start, start + len(items)))


def _is_bad(sample: Sample) -> bool:
    return isinstance(sample.image, Unreadable)
