"""Data sets of Hugging Face, by what they have in common: features, columns, rows."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from vitdecomp_lens.collecting.files import ids_hash
from vitdecomp_lens.collecting.pictures import DAMAGED, Picture, Unreadable, content_hash
from vitdecomp_lens.collecting.sources import Forward, LabelNames, Sample, readable_or_not, spread, whole_number
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches


class RowImages:
    """A data set of Hugging Face's ``datasets``, in memory or streamed. Pictures are hashed as they are stored.

    Args:
        dataset: With one column of images, or several of which one is named.
        image: The column of pictures.
        id: A column of identifiers.

    Raises:
        InputError: Where there is no such column, or it is not clear which one holds the pictures.
    """

    def __init__(self, dataset: Any, *, image: str | None = None, id: str | None = None) -> None:
        self._id = id
        features = dict(dataset.features or {})
        peek = features or _first(dataset)
        self._image = image or _only_image(peek)
        for column in filter(None, (self._image, id)):
            if column not in peek:
                raise UnknownNameError(f"The data set has no column {column!r}; {near_matches(column, peek)}")
        if getattr(features.get(self._image), "decode", False):  # decoding here can fail image by image
            dataset = dataset.cast_column(self._image, replace(features[self._image], decode=False))
        self.labels: LabelNames = {
            name: getattr(kind, "names", None) for name, kind in peek.items() if name != id and _is_label(kind)
        }
        self.count = len(dataset) if hasattr(dataset, "__len__") else None
        self._dataset = dataset
        self._rows = None if self.count is not None else Forward(dataset)
        self.identity = self._identify()

    def _identify(self) -> str:
        some = [0] if self.count is None else spread(self.count)
        ids = [sample.id for row in some for sample in self.read(row, row + 1)]
        if not ids:
            raise InputError("Expected at least one image; the data set is empty.")
        size = "a stream" if self.count is None else f"{self.count} rows"
        return f"{size} of {self._image!r}, {ids_hash([ids])}"

    def read(self, start: int, stop: int) -> list[Sample]:
        """Rows, their pictures not decoded yet."""
        if self._rows is None:
            numbers = range(start, min(stop, self.count or 0))
            rows = [readable_or_not(functools.partial(self._dataset.__getitem__, number)) for number in numbers]
        else:
            rows = self._rows.read(start, stop)
        return [self._sample(row, start + place) for place, row in enumerate(rows)]

    def _sample(self, row: Mapping[str, Any] | Unreadable, number: int) -> Sample:
        if isinstance(row, Unreadable):
            return Sample(f"row {number}", row, {})
        labels = {name: whole_number(row.get(name), f"row {number}", name) for name in self.labels}
        try:
            picture = _stored(row[self._image])
            found = str(row[self._id]) if self._id else content_hash(picture)
        except DAMAGED as error:
            return Sample(f"row {number}", Unreadable(str(error)), labels)
        return Sample(found, picture, labels)


def _first(dataset: Any) -> dict[str, Any]:
    """The first row of a stream without features, for the names of its columns."""
    for row in Forward(dataset).read(0, 1):
        if isinstance(row, Unreadable):
            raise InputError(f"The first row of the data set cannot be read: {row.reason}. Name features, or mend it.")
        return dict(row)
    return {}


def _stored(value: Any) -> Picture:
    """A picture as a row holds it: decoded, or the bytes of its file, or where that is."""
    if isinstance(value, Mapping):
        stored = value.get("bytes")
        if stored is not None:
            return bytes(stored)
        value = value.get("path")
    if isinstance(value, str | Path):
        return Path(value).read_bytes()
    if isinstance(value, Image.Image | Tensor):
        return value
    raise InputError(f"Expected a picture; got {type(value).__name__}.")


def _only_image(columns: Mapping[str, Any]) -> str:
    named = [name for name, kind in columns.items() if type(kind).__name__ == "Image" or isinstance(kind, Image.Image)]
    if len(named) != 1:
        raise InputError(
            f"Expected one column of images; the data set has {len(named)} ({', '.join(named) or 'none'}) among "
            f"{', '.join(columns) or 'no columns'}. Name it: images_from(dataset, image=COLUMN)."
        )
    return named[0]


def _is_label(kind: Any) -> bool:
    """Whether a column, or a value of it, is a class or a whole number."""
    if isinstance(kind, int):
        return not isinstance(kind, bool)
    dtype = getattr(kind, "dtype", None)
    return type(kind).__name__ in ("ClassLabel", "Value") and str(dtype).lstrip("u").startswith("int")
