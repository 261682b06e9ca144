"""Photographs of one's own under evaluation: folders of classes, their masks, and Waterbirds' list."""

import csv
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import ExifTags, Image
from torch import Tensor

from vitdecomp_lens.applications.heatmap import as_seen
from vitdecomp_lens.class_names import ClassNames
from vitdecomp_lens.collecting.images import images_from
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.evaluation.repairing import four_groups
from vitdecomp_lens.evaluation.subjects import Question, Splits
from vitdecomp_lens.evaluation.writing import number_from, write
from vitdecomp_lens.explain import Explainer
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.preprocess import open_upright

__all__ = ["FileSamples", "attacked", "class_folder", "thirds", "waterbirds", "words_to_write"]

BATCH = 32
WORDS = 10  # that are written: a feature of many more texts would span all of a CLIP's space
METADATA = "metadata.csv"
COLUMNS = ("img_filename", "y", "split", "place")
SPLITS = {"training": "0", "validation": "1", "test": "2"}


@dataclass(frozen=True, eq=False)
class FileSamples:
    """Photographs with what is known of them: `Samples`.

    Attributes:
        paths: Of the photographs.
        labels: By name, a number for each.
        mask_paths: Of pictures as large as the photographs, in which what is not black is the object.
        words: What is written onto each photograph; empty for nothing.
    """

    paths: tuple[Path, ...]
    labels: Mapping[str, Int[Tensor, "_"]]
    mask_paths: tuple[Path, ...] = field(default=(), repr=False)
    words: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, model: HookedViT) -> Iterator[Float[Tensor, "batch channel height width"]]:
        """All photographs as the model takes them."""
        for first in range(0, len(self), BATCH):
            paths, words = self.paths[first : first + BATCH], self.words[first : first + BATCH]
            written = [_written(path, word, model) for path, word in zip(paths, words, strict=True)] if words else paths
            yield model.preprocess(written)

    def masks(self, model: HookedViT, name: str = "object") -> Bool[Tensor, "batch height width"]:
        """The masks as the model sees the photographs: cropped and resized like these.

        Raises:
            InputError: Where there are none, or one is not as large as its photograph.
        """
        if name != "object" or not self.mask_paths:
            raise InputError(f"Expected masks of the {name}; these photographs have none. Give --masks FOLDER.")
        height, width = model.preprocess(self.paths[:1]).shape[-2:]
        pairs = zip(self.paths, self.mask_paths, strict=True)
        return torch.stack([_mask(mask, photograph, model, (height, width)) for photograph, mask in pairs])

    def check_masks(self) -> None:
        """Look at all masks and the sizes of their photographs.

        Raises:
            InputError: Where a mask cannot be read, or is not as large as its photograph.
        """
        for photograph, path in zip(self.paths, self.mask_paths, strict=True):
            _check_mask(path, photograph)

    def some(self, rows: Sequence[int]) -> "FileSamples":
        """Some of the photographs."""
        numbers = torch.tensor(rows, dtype=torch.int64)
        return FileSamples(
            tuple(self.paths[row] for row in rows),
            {name: values[numbers] for name, values in self.labels.items()},
            tuple(self.mask_paths[row] for row in rows if self.mask_paths),
            tuple(self.words[row] for row in rows if self.words),
        )


def _written(path: Path, word: str, model: HookedViT) -> Image.Image:
    photograph = open_upright(path)
    return write(photograph, word, model.preprocess_geometry(photograph), _name(path)) if word else photograph


def _name(path: Path) -> str:
    """What a photograph is called wherever its folder lies."""
    return "/".join(path.parts[-2:])


def _mask(path: Path, photograph: Path, model: HookedViT, size: tuple[int, int]) -> Tensor:
    _check_mask(path, photograph)
    try:
        with Image.open(path) as opened:
            # A palette's numbers are what a mask means, and not its colours.
            levels = opened if opened.mode in ("P", "1", "L", "I;16", "I") else opened.convert("L")
            mask = torch.from_numpy(np.array(levels)) > 0
    except OSError as error:
        raise InputError(f"The mask {str(path)!r} of {photograph.name!r} cannot be read: {error}.") from error
    return as_seen(mask, model.preprocess_geometry(photograph), size)


def _check_mask(path: Path, photograph: Path) -> None:
    found, wanted = (_upright_size(one, f"of {photograph.name!r}") for one in (path, photograph))
    if found != wanted:
        raise InputError(
            f"Expected masks as large as their photographs; {str(path)!r} has {found[0]} × {found[1]} pixels, and "
            f"{photograph.name!r} {wanted[0]} × {wanted[1]}."
        )


def _upright_size(path: Path, what: str) -> tuple[int, int]:
    """Width and height, as a viewer shows the picture."""
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"The picture {str(path)!r} {what} cannot be read: {error}.") from error
    return (height, width) if turned else (width, height)


def class_folder(folder: Path, model: HookedViT | None, masks: Path | None = None) -> tuple[FileSamples, Question]:
    """A folder with a subfolder for each class, as ImageNet's validation images come.

    Args:
        folder: Its subfolders are named by synsets (``n01440764``), names or numbers of classes.
        model: With a classifier, of whose classes subfolders name some; None where a model has no classifier: then the
            classes are the subfolders, and their names the texts. Classes are called what the model's configuration
            says (timm's ``label_names``), else by ImageNet's names where they are as many; else, where there are as
            many subfolders, by these: the first in the order of letters is class 0, as torchvision counts them.
        masks: A folder with a ``.png`` for each image, under the same path.

    Raises:
        UnknownNameError: If the classifier has no such class.
        InputError: If there are no images, images lie outside of subfolders, a mask is missing, or classes answer
            different questions.
    """
    source = images_from(folder)
    names = source.labels.get("class")
    if not names:
        raise InputError(f"Expected a subfolder of {str(folder)!r} for each class; images lie beside subfolders.")
    samples = source.read(0, source.count or 0)  # a folder's files are counted
    own = torch.tensor([sample.labels["class"] for sample in samples])
    paths = tuple(Path(str(sample.image)) for sample in samples)
    of_masks = () if masks is None else tuple(_beside(masks, path.relative_to(folder)) for path in paths)
    if model is None:
        known = ClassNames.of(1000)
        texts = tuple(known.short(known.synsets.index(name)) if name in known.synsets else name for name in names)
        return FileSamples(paths, {"class": own}, of_masks), Question("class", texts, tuple(range(len(names))))
    known = _class_names(model, names)
    numbers = [known.find(name) for name in names]
    answers = Explainer(model, class_=numbers[0]).question.classes
    if other := [name for name, number in zip(names, numbers, strict=True) if number not in answers]:
        raise InputError(f"Expected classes that answer one question; {other[0]!r} answers another than {names[0]!r}.")
    short = [known.short(number) for number in answers]
    # Of ImageNet's classes two are called crane: those are told by all of their names, or by number.
    full = [known.names[answers[n]] if short.count(name) > 1 else name for n, name in enumerate(short)]
    texts = tuple(f"{name} ({answers[n]})" if full.count(name) > 1 else name for n, name in enumerate(full))
    labels = torch.tensor(numbers)[own] - answers.start
    return FileSamples(paths, {"class": labels}, of_masks), Question("class", texts, tuple(answers))


def _class_names(model: HookedViT, folders: Sequence[str]) -> ClassNames:
    """What a classifier's classes are called; if nothing says so, what the folders are, where there are as many."""
    known = Explainer(model).names
    unnamed = known.names == tuple(f"class {number}" for number in range(len(known.names)))
    if unnamed and len(folders) == len(known.names) and not all(name.isdecimal() for name in folders):
        return ClassNames(tuple(folders))
    return known


def _beside(folder: Path, name: Path) -> Path:
    path = folder / name.with_suffix(".png")
    if not path.is_file():
        raise InputError(f"Expected a mask for each image; there is none at {str(path)!r}.")
    return path


def thirds(samples: FileSamples) -> tuple[FileSamples, FileSamples, FileSamples]:
    """Photographs for three purposes, by a hash of the last two parts of their paths: the same wherever they lie.

    Returns:
        Those for training, for validation, and for test.

    Raises:
        InputError: If there are too few to have some for each.
    """
    rows: tuple[list[int], ...] = ([], [], [])
    digests: dict[int, bytes] = {}
    for row, path in enumerate(samples.paths):
        digests[row] = hashlib.sha256(_name(path).encode("utf-8", "surrogateescape")).digest()
        rows[digests[row][0] % 3].append(row)
    if not all(rows):
        raise InputError(f"Expected images for training, validation and test; {len(samples)} are too few.")
    # In an order that is not that of classes, so that the first some are of all.
    training, validation, test = (samples.some(sorted(some, key=digests.__getitem__)) for some in rows)
    return training, validation, test


def words_to_write(samples: FileSamples, texts: Sequence[str]) -> tuple[str, ...]:
    """Some of the classes that there are photographs of, by a hash of their names.

    Args:
        samples: With the number of each one's ``class``.
        texts: What classes are called.

    Raises:
        InputError: If all are of one class, so that no wrong one can be written.
    """
    there = [texts[number] for number in samples.labels["class"].unique().tolist()]
    if len(there) < 2:
        raise InputError(f"Expected photographs of at least two classes, to write a wrong one; all are {there[0]!r}.")
    return tuple(sorted(there, key=number_from)[:WORDS])


def attacked(samples: FileSamples, texts: Sequence[str], words: Sequence[str]) -> FileSamples:
    """All photographs as they are, and then each with a wrong class written onto it.

    Args:
        samples: With the number of each one's ``class``.
        texts: What classes are called.
        words: Those that are written.

    Returns:
        With the label ``written``, 0 and 1.
    """
    wrong = []
    for path, number in zip(samples.paths, samples.labels["class"].tolist(), strict=True):
        others = [word for word in words if word != texts[number]]
        wrong.append(others[int(number_from(_name(path), "word") * len(others))])
    labels = {name: torch.cat([values, values]) for name, values in samples.labels.items()}
    written = torch.arange(2).repeat_interleave(len(samples))
    return FileSamples(samples.paths * 2, {**labels, "written": written}, words=("",) * len(samples) + tuple(wrong))


def waterbirds(folder: Path) -> Splits:
    """Waterbirds as it is published: ``metadata.csv`` and the photographs that it lists.

    Labels are ``group``, the class (1 for waterbirds), and ``water``, the background (1 for water).

    Raises:
        InputError: If the list, a column of it, a photograph or a split is missing, or a split has a group without
            photographs.
    """
    path = folder / METADATA
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Waterbirds' list {str(path)!r} cannot be read: {error}.") from error
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise InputError(f"Expected the columns {', '.join(COLUMNS)} in {str(path)!r}; it has no {missing[0]!r}.")
    for row in rows:
        if any(row[name] not in allowed for name, allowed in (("y", "01"), ("place", "01"), ("split", "012"))):
            raise InputError(f"Expected y and place 0 or 1, and split 0, 1 or 2, in {str(path)!r}; got {dict(row)}.")
        if not (folder / row["img_filename"]).is_file():
            raise InputError(f"Expected the photographs that {str(path)!r} lists; there is no {row['img_filename']!r}.")
    return Splits(
        *(_listed(folder, [row for row in rows if row["split"] == split], name) for name, split in SPLITS.items())
    )


def _listed(folder: Path, rows: Sequence[Mapping[str, str]], name: str) -> FileSamples:
    if not rows:
        raise InputError(f"Expected photographs for {name} in {str(folder / METADATA)!r}; there are none.")
    labels = {"group": "y", "water": "place"}
    found = FileSamples(
        tuple(folder / row["img_filename"] for row in rows),
        {name: torch.tensor([int(row[column]) for row in rows]) for name, column in labels.items()},
    )
    try:
        four_groups(found).refuse_empty()
    except InputError as error:
        raise InputError(f"The photographs for {name} in {str(folder / METADATA)!r}: {error}") from error
    return found
