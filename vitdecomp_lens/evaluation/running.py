"""All tasks, one after the other: on the testbed, or on a model and photographs of one's own."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vitdecomp_lens.clip.banks import paper_features, paper_waterbirds
from vitdecomp_lens.errors import InputError, UnknownNameError, VitDecompError, near_matches
from vitdecomp_lens.evaluation import ablating, carrying, repairing, retrieving, scenes, segmenting
from vitdecomp_lens.evaluation.folders import attacked, class_folder, thirds, waterbirds, words_to_write
from vitdecomp_lens.evaluation.records import Record, Results
from vitdecomp_lens.evaluation.subjects import Question, Samples, Splits, Subject
from vitdecomp_lens.testbed.banks import features
from vitdecomp_lens.testbed.scenes import ATTRIBUTES

__all__ = ["TASKS", "Photographs", "Vocabulary", "Watch", "on_photographs", "on_testbed"]

# What may go wrong with one task and not with the next; torch raises RuntimeErrors where memory is at an end.
FAILURES = (VitDecompError, OSError, MemoryError, RuntimeError)
Step = tuple[str, Callable[[], Iterator[Record]]]
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


@dataclass(frozen=True)
class Watch:
    """What is told while tasks run, which may take hours.

    Attributes:
        tell: Called with what is being done, and the share that is done.
        keep: Called after each task with all that was found so far.
        failed: Called with what failed and why; the other tasks go on. None to raise it.
    """

    tell: Callable[[str, float], None] = lambda what, done: None
    keep: Callable[[Results], None] = lambda found: None
    failed: Callable[[str, Exception], None] | None = None

    def run(self, steps: Iterable[Step], count: int, made: Mapping[str, Any]) -> Results:
        """All steps, one after the other. Of one that fails there are no numbers."""
        found = Results((), made)
        for done, (name, task) in enumerate(steps):
            self.tell(name, done / count)
            try:
                records = tuple(task())
            except FAILURES as error:
                if self.failed is None:
                    raise
                self.failed(name, error)
            else:
                found = replace(found, records=found.records + records)
                self.keep(found)
        return found


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
    device: torch.device | str = "cpu",
    watch: Watch = Watch(),
) -> Results:
    """Every table of the paper, on drawn scenes whose truth is known.

    Args:
        tasks: Some of `TASKS`.
        models: Some of the testbed's.
        seeds: Of scenes, from 0 to 9: each has its own for training, validation and test.
        size: How many scenes of each.
        device: Where models run.
        watch: What is told and kept meanwhile.

    Raises:
        UnknownNameError: If there is no such task or model.
        InputError: If a seed is none, or there are fewer than 100 scenes; for retrieval, not more than 100.
        VitDecompError: As a task that fails, unless the watch wants to be told.

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
    if "retrieval" in tasks and size <= (deep := retrieving.RetrievalProtocol().deep):
        raise InputError(
            f"Expected size= of more than {deep} scenes for retrieval, which looks at {deep} found; got {size}."
        )
    steps, count = _of_testbed(tasks, models, seeds, size, device), len(tasks) * len(models) * len(seeds)
    return watch.run(steps, count, {**_made(), "seeds": list(seeds), "scenes of each split": size})


def _of_testbed(
    tasks: Sequence[str], models: Sequence[str], seeds: Sequence[int], size: int, device: torch.device | str
) -> Iterator[Step]:
    scenes.subject("clip").model.to(device)
    for name in models:
        subject = replace(scenes.subject(name))  # what it keeps of scenes goes with it
        subject.model.to(device)
        for seed, task in product(seeds, tasks):  # tasks share what a model makes of the scenes of a seed
            yield f"{task}: {name}, seed {seed}", partial(TASKS[task], subject, seed, size)


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


@dataclass(frozen=True)
class Vocabulary:
    """The texts that tasks on photographs ask for; by default the paper's.

    Attributes:
        features: By name, for retrieval.
        birds: Of the ``"core"`` and of the ``"spurious"`` feature of Waterbirds.
        written: What says that a word is written somewhere.
    """

    features: Mapping[str, Sequence[str]] = field(default_factory=paper_features)
    birds: Mapping[str, Sequence[str]] = field(default_factory=paper_waterbirds)
    written: str = "text that says {}"


def on_photographs(
    subject: Subject,
    photographs: Photographs,
    *,
    clip: Subject | None = None,
    tasks: Sequence[str] = tuple(TASKS),
    vocabulary: Vocabulary = Vocabulary(),
    watch: Watch = Watch(),
) -> Results:
    """The same tasks as far as there are photographs for them: these are parted for three purposes, once.

    All folders are looked at before anything is computed: lists, groups, masks and their sizes, outlines.

    Args:
        subject: The model, with an aligner, or the CLIP itself.
        photographs: Which there are: classes are needed for ablation curves, the paper's measure of retrieval and
            typographic attacks, masks or outlines for segmentation, Waterbirds for repair.
        clip: The CLIP that texts are of.
        tasks: Some of `TASKS`.
        vocabulary: The texts.
        watch: What is told and kept meanwhile.

    Raises:
        UnknownNameError: If there is no such task.
        InputError: If there are no photographs for any of the tasks, or they cannot be used.
        VitDecompError: As a task that fails, unless the watch wants to be told.
    """
    _refuse_unknown(tasks, TASKS, "task")
    steps: list[Step] = []
    if photographs.images is not None:
        steps += _of_classes(subject, photographs.images, photographs.masks, clip, tasks, vocabulary)
    elif photographs.masks is not None:
        raise InputError("Expected --images with --masks, the photographs that they are of; got only masks.")
    if photographs.waterbirds is not None:
        steps += _of_birds(subject, photographs.waterbirds, tasks, vocabulary)
    if photographs.outlines is not None:
        steps += _of_outlines(subject, photographs.outlines, tasks)
    if not steps:
        raise InputError(
            f"Expected photographs for one of the tasks ({', '.join(tasks)}): a folder of classes, with masks for "
            f"segmentation, or outlines, or Waterbirds for repair; got none."
        )
    return watch.run(steps, len(steps), _made())


def _of_classes(
    subject: Subject,
    folder: Path,
    masks: Path | None,
    clip: Subject | None,
    tasks: Sequence[str],
    vocabulary: Vocabulary,
) -> Iterator[Step]:
    found, question = class_folder(folder, subject.model if subject.classifier else None, masks)
    if masks is not None:
        found.check_masks()
    training, validation, test = thirds(found)
    splits = Splits(training, validation, test)
    asked: dict[str, Sequence[str]] = {}
    if subject.aligner is not None and not subject.classifier:
        _refuse_unseen(training, question)
    if "ablation" in tasks:
        yield "ablation", partial(ablating.curves, subject, splits, question, seed=0)
    if "retrieval" in tasks:
        asked |= vocabulary.features
        several = [Question(name, tuple(texts), ()) for name, texts in vocabulary.features.items()]
        yield "retrieval", partial(retrieving.agreement, subject, splits, several, clip=clip, seed=0)
    if "segmentation" in tasks and masks is not None:
        asked |= {} if subject.classifier else {"classes": question.texts}
        yield "segmentation", partial(segmenting.single, subject, splits, question, seed=0)
    if "typographic" in tasks:
        words = words_to_write(found, question.texts)
        both = Splits(training, *(attacked(part, question.texts, words) for part in (validation, test)))
        told = [vocabulary.written.format(word) for word in words]
        asked |= {"written words": told, "their classes": words}
        options: dict[str, Any] = {"words": told, "core": words, "seed": 0}
        yield "typographic", partial(repairing.typographic, subject, both, question, **options)
    yield from _told(subject, training, asked)


def _of_birds(subject: Subject, folder: Path, tasks: Sequence[str], vocabulary: Vocabulary) -> Iterator[Step]:
    birds = waterbirds(folder)
    core, background = vocabulary.birds["core"], vocabulary.birds["spurious"]
    if "spurious" in tasks:
        yield "spurious", partial(repairing.spurious, subject, birds, core=core, background=background, seed=0)
        yield from _told(subject, birds.training, {"Waterbirds: core": core, "Waterbirds: background": background})


def _told(subject: Subject, samples: Samples, asked: Mapping[str, Sequence[str]]) -> Iterator[Step]:
    """Which of the texts no component carries, where there are random ones to tell."""
    if asked and subject.random:
        yield "texts that no component carries", partial(carrying.carried, subject, samples, asked)


def _of_outlines(subject: Subject, folder: Path, tasks: Sequence[str]) -> Iterator[Step]:
    images, labels = (folder / name for name in ("images", "labels"))
    segmenting.check_outlines(subject.model, images, labels)
    if "segmentation" in tasks:
        yield "segmentation of photographs", partial(segmenting.photographs, subject, images, labels)


def _refuse_unseen(training: Samples, question: Question) -> None:
    """Refuse classes that a probe would never see."""
    seen = set(training.labels[question.label].tolist())
    if unseen := [text for number, text in enumerate(question.texts) if number not in seen]:
        raise InputError(
            f"Expected photographs of every class in the third for training, on which a linear probe is fitted; there "
            f"are none of {', '.join(map(repr, unseen[:5]))}. Give more photographs, or leave those classes out."
        )


def _refuse_unknown(names: Sequence[str], known: Sequence[str] | Mapping[str, Any], what: str) -> None:
    for name in names:
        if name not in known:
            raise UnknownNameError(f"There is no {what} {name!r}; {near_matches(name, known)}")


def _made() -> dict[str, Any]:
    return {"vitdecomp-lens": version("vitdecomp-lens"), "torch": torch.__version__}
