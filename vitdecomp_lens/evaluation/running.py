"""All tasks, one after the other: on the testbed, or on a model and photographs of one's own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vitdecomp_lens.clip.banks import paper_features, paper_waterbirds
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.evaluation import ablating, repairing, retrieving, scenes, segmenting
from vitdecomp_lens.evaluation.folders import class_folder, thirds, waterbirds
from vitdecomp_lens.evaluation.records import Record, Results
from vitdecomp_lens.evaluation.subjects import Question, Subject
from vitdecomp_lens.testbed.banks import features
from vitdecomp_lens.testbed.scenes import ATTRIBUTES

__all__ = ["TASKS", "Tell", "on_photographs", "on_testbed"]

Tell = Callable[[str, float], None]  # what is being done, and the share that is
Task = Callable[[Subject, int, int], Iterator[Record]]  # of a model, a seed, and how many scenes
BATCH = 250  # scenes in one run
SEGMENTED = 200  # scenes that are segmented at most: each has thousands of pixels


def _ablation(subject: Subject, seed: int, size: int) -> Iterator[Record]:
    data, protocol = scenes.splits("plain", seed=seed, size=size), ablating.CurveProtocol(batch_size=BATCH)
    return ablating.curves(subject, data, scenes.question("shape"), seed=seed, protocol=protocol)


def _retrieval(subject: Subject, seed: int, size: int) -> Iterator[Record]:
    questions = [scenes.question(name) for name in ATTRIBUTES]
    data = scenes.splits("plain", seed=seed, size=size)
    return retrieving.retrieved(subject, data, questions, seed=seed, clip=scenes.subject("clip"))


def _segmentation(subject: Subject, seed: int, size: int) -> Iterator[Record]:
    plain, two = (scenes.splits(kind, seed=seed, size=min(size, SEGMENTED)) for kind in ("plain", "pairs"))
    yield from segmenting.single(subject, plain, scenes.question("shape"), seed=seed)
    for name in ("shape", "colour"):
        yield from segmenting.pairs(subject, two, scenes.question(name), seed=seed)


def _spurious(subject: Subject, seed: int, size: int) -> Iterator[Record]:
    data = scenes.splits("spurious", seed=seed, size=2 * size)  # in four groups
    core, background = features()["shape"], features()["background"]
    return repairing.spurious(subject, data, core=core, background=background, seed=seed)


def _typographic(subject: Subject, seed: int, size: int) -> Iterator[Record]:
    data = scenes.splits("typographic", seed=seed, size=size)
    return repairing.typographic(subject, data, scenes.question("shape"), words=features()["word"], seed=seed)


TASKS: Mapping[str, Task] = {
    "ablation": _ablation,
    "retrieval": _retrieval,
    "segmentation": _segmentation,
    "spurious": _spurious,
    "typographic": _typographic,
}


def on_testbed(
    tasks: Sequence[str] = tuple(TASKS),
    *,
    models: Sequence[str] = scenes.NAMES,
    seeds: Sequence[int] = (0, 1, 2),
    size: int = 1000,
    tell: Tell = lambda what, done: None,
) -> Results:
    """Every table of the paper, on drawn scenes whose truth is known.

    Args:
        tasks: Some of `TASKS`.
        models: Some of the testbed's.
        seeds: Of scenes, from 0 to 9: each has its own for training, validation and test.
        size: How many scenes of each.
        tell: Called with what is being done, and the share that is done.

    Raises:
        UnknownNameError: If there is no such task or model.
        InputError: If a seed is none, or there are fewer than 100 scenes.

    Example:
        >>> on_testbed(["typographic"], models=["clip"], seeds=[0], size=100).names("measure")[:2]
        ('clean', 'written')
    """
    _refuse_unknown(tasks, TASKS, "task")
    _refuse_unknown(models, scenes.NAMES, "model")
    if size < 100 or not seeds or len(set(seeds)) < len(seeds) or any(not 0 <= seed <= 9 for seed in seeds):
        raise InputError(
            f"Expected size= of at least 100 scenes and different seeds from 0 to 9; got {size} and {list(seeds)}."
        )
    records: list[Record] = []
    runs = list(product(models, seeds, tasks))  # tasks share what a model makes of the scenes of a seed
    for done, (name, seed, task) in enumerate(runs):
        tell(f"{task}: {name}, seed {seed}", done / len(runs))
        records += TASKS[task](scenes.subject(name), seed, size)
    return Results(tuple(records), {**_made(), "seeds": list(seeds), "scenes of each split": size})


@dataclass(frozen=True)
class Photographs:
    """Where photographs are.

    Attributes:
        images: A folder with a subfolder for each class, as ImageNet's validation images come.
        masks: A folder of masks of these.
        waterbirds: The folder of Waterbirds.
        outlines: A folder with ``images`` and ``labels``, outlines of COCO's classes in YOLO's form, for a classifier
            of ImageNet's classes.
    """

    images: Path | None = None
    masks: Path | None = None
    waterbirds: Path | None = None
    outlines: Path | None = None

    @property
    def need_texts(self) -> bool:
        """Whether a task reads components in words."""
        return self.images is not None or self.waterbirds is not None


def on_photographs(
    subject: Subject, data: Photographs, *, clip: Subject | None = None, tell: Tell = lambda what, done: None
) -> Results:
    """The same tasks as far as there are data for them: photographs are parted for three purposes, once.

    Args:
        subject: The model, with an aligner, or the CLIP itself.
        data: Which photographs there are: classes are needed for ablation curves and the paper's measure of retrieval,
            masks or outlines for segmentation, Waterbirds for repair.
        clip: The CLIP that texts are of.
        tell: Called with what is being done, and the share that is done.

    Raises:
        InputError: If there are none, or they cannot be used.
    """
    tasks = list(_of_photographs(subject, data, clip))
    if not tasks:
        raise InputError("Expected photographs to evaluate a model on: a folder of classes, or Waterbirds; got none.")
    records: list[Record] = []
    for done, (name, task) in enumerate(tasks):
        tell(f"{name}: {subject.name}", done / len(tasks))
        records += task()
    return Results(tuple(records), _made())


def _of_photographs(
    subject: Subject, data: Photographs, clip: Subject | None
) -> Iterator[tuple[str, Callable[[], Iterator[Record]]]]:
    if data.images is not None:
        classes = getattr(subject.model.original, "num_classes", None) if subject.classifier else None
        found, question = class_folder(data.images, classes, data.masks)
        splits = thirds(found)
        yield "ablation", lambda: ablating.curves(subject, splits, question, seed=0)
        asked = [Question(name, texts, ()) for name, texts in paper_features().items()]
        yield "retrieval", lambda: retrieving.agreement(subject, splits, asked, clip=clip, seed=0)
        if data.masks is not None:
            yield "segmentation", lambda: segmenting.single(subject, splits, question, seed=0)
    elif data.masks is not None:
        raise InputError("Expected --images with --masks, the photographs that they are of; got only masks.")
    if data.waterbirds is not None:
        birds, texts = waterbirds(data.waterbirds), paper_waterbirds()
        options: dict[str, Any] = {"core": texts["core"], "background": texts["spurious"], "seed": 0}
        yield "spurious", lambda: repairing.spurious(subject, birds, **options)
    if data.outlines is not None:
        images, labels = (data.outlines / name for name in ("images", "labels"))
        yield "photographs", lambda: segmenting.photographs(subject, images, labels)


def _refuse_unknown(names: Sequence[str], known: Sequence[str] | Mapping[str, Any], what: str) -> None:
    for name in names:
        if name not in known:
            raise UnknownNameError(f"There is no {what} {name!r}; {near_matches(name, known)}")


def _made() -> dict[str, Any]:
    return {"vitdecomp-lens": version("vitdecomp-lens"), "torch": torch.__version__}
