"""Heatmaps held against masks: single objects, one of two objects, and photographs with outlines.

What is compared are *methods*, such as GradCAM, each in several *variants*, such as the layer it is taken at. All are
reported under two protocols: the published one is that of arXiv 2406.01583 (section 5, Table 5), one variant of each
method, foreground above the map's mean; in the chosen one, each method has the variant and the threshold that gave the
best mIoU on validation images. So whatever is chosen, is chosen for all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitdecomp_lens.applications import heatmap
from vitdecomp_lens.applications.heatmap import Heatmaps, Segmentation
from vitdecomp_lens.applications.heatmap.segmenting import Threshold
from vitdecomp_lens.collecting.images import SUFFIXES
from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.evaluation.coco import IMAGENET_KINDS, outlines
from vitdecomp_lens.evaluation.reading import Read, Reading, reading
from vitdecomp_lens.evaluation.records import Record
from vitdecomp_lens.evaluation.subjects import Question, Samples, Splits, Subject
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.preprocess import open_upright

__all__ = ["CHOSEN", "MEASURES", "PUBLISHED", "Protocol", "check_outlines", "pairs", "photographs", "single"]

PUBLISHED, CHOSEN = "published protocol", "chosen protocol"
IMAGENET = 1000  # classes
DECOMPOSITION, ANY_ANSWER, CONSTANT = "decomposition", "decomposition, any answer", "constant"
MEASURES = {
    "pixel accuracy": "pixel_accuracy",
    "mIoU": "miou",
    "foreground IoU": "foreground_iou",
    "mAP": "two_class_average_precision",  # what published tables call so: both classes pooled
    "foreground AP": "mean_average_precision",
}
POINTING = ("points at its object", "highest on it")

# By method and variant, one map an image; the first variant is the published one.
Made = Mapping[str, Mapping[str, Heatmaps]]


@dataclass(frozen=True)
class Protocol:
    """What is fixed in advance.

    Attributes:
        published: The published threshold, in units of a map's mean.
        thresholds: Those that are tried on validation images.
        components: Of which components the maps of the decomposition are tried; the first is the published choice.
        residuals: Weights of the identity in rollout; the first is the published one.
        layers: Layers of raw attention; the first is the published one.
        least: Objects in photographs that cover a smaller share of the image are left out.
        batch: How many images at a time.
        together: Of at most so many classes all maps are made at once. Of more, as of ImageNet's, only those of a
            batch's own classes, and none of the whole question.
    """

    published: Threshold = 1.0
    thresholds: tuple[Threshold, ...] = (0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, "otsu")
    components: tuple[str, ...] = ("attention", "all")
    residuals: tuple[float, ...] = (0.5, 0.7)
    layers: tuple[int, ...] = (-1, -2)
    least: float = 0.01
    batch: int = 32
    together: int = 50


PROTOCOL = Protocol()


def single(
    subject: Subject, data: Splits, question: Question, *, seed: int, protocol: Protocol = PROTOCOL
) -> Iterator[Record]:
    """Zero-shot segmentation of the object that an image shows, by the class that it is of; intervals are over images.

    Args:
        subject: The model.
        data: Images with a mask of their object.
        question: What the object is.
        seed: Of what was drawn.
        protocol: What is fixed in advance.
    """
    read = reading(subject, question, data.training, together=protocol.together)
    options: tuple[Any, ...] = (question, protocol)
    validation, test = (_Held.of(subject, read, samples, *options) for samples in (data.validation, data.test))
    for by, method, found in _segmented(validation, test, protocol):
        yield from _records("segmentation", subject, method, seed, found, f"{question.label}, {by}")


def pairs(
    subject: Subject, data: Splits, question: Question, *, seed: int, protocol: Protocol = PROTOCOL
) -> Iterator[Record]:
    """The same where there is a second object: is the one segmented, and pointed at, that is asked for?

    *Points at its object*: in how many images the map is higher on the object asked for than on the other one, in the
    mean over their pixels. *Highest on it*: in how many its highest pixel lies on the object asked for. Neither has a
    threshold; the variant chosen is that of the largest share on validation images.

    Args:
        subject: The model.
        data: Images with masks of their object and of a ``second`` one, whose answer is another.
        question: What is asked for: the answer of the object.
        seed: Of what was drawn.
        protocol: What is fixed in advance.
    """
    read = reading(subject, question, data.training, together=protocol.together)
    options: tuple[Any, ...] = (question, protocol, "second")
    validation, test = (_Held.of(subject, read, samples, *options) for samples in (data.validation, data.test))
    for by, method, found in _segmented(validation, test, protocol):
        yield from _records("pairs", subject, method, seed, found, f"{question.label}, {by}")
    for by, method, measure, value in _pointed(validation, test):
        yield Record("pairs", measure, subject.name, method, seed, value, f"{question.label}, {by}")


def photographs(
    subject: Subject,
    images: Path,
    labels: Path,
    *,
    kinds: Mapping[int, Sequence[int]] = IMAGENET_KINDS,
    protocol: Protocol = PROTOCOL,
) -> Iterator[Record]:
    """Segmentation of photographs with outlines, by a classifier: of each photograph, the class that covers most of it.

    What is explained is the logit of that one of its kinds that the model itself finds likeliest. Photographs are few:
    what is chosen is chosen on every other one, and measured on those between; and the other way round. Intervals are
    over photographs.

    Args:
        subject: With a classifier.
        images: A folder of photographs.
        labels: A folder of files of the same names, but ending in ``.txt``: a line an object, the number of its class
            and then its outline, x and y in turn, as shares of width and height (YOLO's form).
        kinds: For each class, the classes of the model that are kinds of it; others are left out.
        protocol: What is fixed in advance.

    Raises:
        InputError: Where fewer than two photographs are left, or an outline is none.
    """
    check_outlines(subject.model, images, labels, kinds=kinds)
    read = (_Shown.of(subject.model, path, labels, kinds, protocol) for path in _outlined(images, labels))
    shown = [one for one in read if one is not None]
    if len(shown) < 2:
        raise InputError(f"Expected at least two photographs in {str(images)!r} that show enough of a known class.")
    halves = [_Held.of_photographs(subject.model, shown[first::2], protocol) for first in (0, 1)]
    found: dict[tuple[str, str], list[Segmentation]] = {}
    for validation, test in (halves, halves[::-1]):
        for by, method, segmentation in _segmented(validation, test, protocol):
            found.setdefault((by, method), []).append(segmentation)
    for (by, method), several in found.items():
        yield from _records("photographs", subject, method, 0, Segmentation.cat(several), by)


def check_outlines(
    model: HookedViT, images: Path, labels: Path, *, kinds: Mapping[int, Sequence[int]] = IMAGENET_KINDS
) -> None:
    """Look at all outlines, and whether the model can tell their classes.

    Args:
        model: With a classifier.
        images: As for `photographs`, like the other two.
        labels: The outlines.
        kinds: Which of the model's classes they are.

    Raises:
        InputError: Where a folder is missing, fewer than two photographs have outlines of known classes, an outline is
            none, or the model has not those classes.
    """
    if missing := [folder for folder in (images, labels) if not folder.is_dir()]:
        raise InputError(
            f"Expected a folder with images and labels, outlines under the same names; there is no {str(missing[0])!r}."
        )
    known = [path for path in _outlined(images, labels) if outlines(labels / f"{path.stem}.txt", (1, 1)).keys() & kinds]
    if len(known) < 2:
        raise InputError(f"Expected at least two photographs in {str(images)!r} with outlines of known classes.")
    if getattr(model.original, "num_classes", 0) != IMAGENET and kinds is IMAGENET_KINDS:
        raise InputError(f"Expected a classifier of ImageNet's {IMAGENET} classes, or kinds= of one's own.")


def _outlined(images: Path, labels: Path) -> list[Path]:
    """The photographs that have a file of outlines."""
    pictures = (path for path in sorted(images.iterdir()) if path.suffix.lower() in SUFFIXES)
    return [path for path in pictures if (labels / f"{path.stem}.txt").is_file()]


# --- maps -------------------------------------------------------------------------------------------------------------


def _made(along: Reading, images: Tensor, own: Sequence[int], protocol: Protocol) -> Made:
    """All methods' maps of a batch, of each image's own direction."""
    with torch.no_grad():
        plain, against = along.tokens(images)
    first = heatmap.from_tokens(plain, components=protocol.components[0])
    made: dict[str, dict[str, Heatmaps]] = {DECOMPOSITION: {f"{protocol.components[0]}, as it is": first}}
    for components in protocol.components:
        for how in ("signed", "positive"):
            maps = heatmap.from_tokens(against, components=components, how=how)
            made[DECOMPOSITION][f"{components}, {how}, against others"] = maps
        if along.whole:
            maps = heatmap.from_tokens(against, components=components, how="strength")
            made.setdefault(ANY_ANSWER, {})[components] = maps
    for method, variant, make in _baselines(along, images, own, protocol):
        try:
            made.setdefault(method, {})[variant] = make()
        except UnsupportedModelError:
            continue  # there is no such method for this model
    wanted = [first.texts[row] for row in own]
    return {
        method: {name: _on_cpu(maps.picked(wanted)) for name, maps in variants.items()}
        for method, variants in made.items()
        if variants
    }


def _on_cpu(maps: Heatmaps) -> Heatmaps:
    return replace(maps, values=maps.values.cpu())


def _baselines(
    along: Reading, images: Tensor, own: Sequence[int], protocol: Protocol
) -> Iterator[tuple[str, str, Callable[[], Heatmaps]]]:
    """What is compared with: method, variant, and what makes the maps."""
    model = along.model
    for layer in protocol.layers:
        yield "raw attention", f"layer {layer}", partial(heatmap.raw_attention, model, images, layer=layer)
    for residual in protocol.residuals:
        yield "rollout", f"residual {residual}", partial(heatmap.rollout, model, images, residual=residual)
    last = f"blocks.{len(model.hooked_blocks) - 1}"
    places: dict[str, str | None] = {"activations": None, "what enters the last block": f"{last}.hook_resid_pre"}
    norm = f"{last}.ln1.hook_normalized"
    if len(model.stages) == 1 and norm in model.hook_dict:
        places["its norm"] = norm
    for name, rows in {"": along.rows, ", against others": along.against}.items():
        options: dict[str, Any] = {"of": along.scores_of, "own": own}
        yield "Chefer", f"relevance{name}", partial(heatmap.chefer, model, images, rows, **options)
        yield "GradCAM", f"attention{name}", partial(heatmap.attention_cam, model, images, rows, **options)
        for place, at in places.items():
            yield "GradCAM", f"{place}{name}", partial(heatmap.grad_cam, model, images, rows, at=at, **options)
    yield CONSTANT, "", partial(heatmap.constant, model, images)


@dataclass(frozen=True, eq=False)
class _Held:
    """Maps, and the masks they are held against.

    Attributes:
        made: All methods' maps.
        masks: Of the object.
        others: Of the other one, where there is one.
    """

    made: Made
    masks: Bool[Tensor, "batch height width"]
    others: Bool[Tensor, "batch height width"] | None = None

    @classmethod
    def of(
        cls,
        subject: Subject,
        read: Read,
        samples: Samples,
        question: Question,
        protocol: Protocol,
        other: str | None = None,
    ) -> "_Held":
        """Maps of samples. Those of whose object (or other object) nothing is to be seen are left out."""
        masks = samples.masks(subject.model)
        others = samples.masks(subject.model, other) if other else None
        seen = masks.flatten(1).any(1) & (True if others is None else others.flatten(1).any(1))
        answers, made, first = samples.labels[question.label], [], 0
        for images in subject.batches(samples):
            chosen = seen[first : first + len(images)].nonzero()[:, 0]
            for part in chosen.split(protocol.batch) if len(chosen) else ():
                along, own = read(answers[first + part].tolist())
                made.append(_made(along, images[part.to(images.device)], own, protocol))
            first += len(images)
        if not made:
            raise InputError(f"Expected masks of what is to be seen; in all of the {len(samples)} they are empty.")
        return cls(_joined(made), masks[seen], None if others is None else others[seen])

    @classmethod
    def of_photographs(cls, model: HookedViT, shown: "Sequence[_Shown]", protocol: Protocol) -> "_Held":
        """Maps of photographs, each of its own class's logit."""
        made = []
        for first in range(0, len(shown), protocol.batch):
            part = shown[first : first + protocol.batch]
            classes = sorted({one.kind for one in part})
            along = Reading.of_classes(model, classes, whole=False)
            images = torch.cat([one.image for one in part])
            made.append(_made(along, images, [classes.index(one.kind) for one in part], protocol))
        return cls(_joined(made), torch.stack([one.mask for one in shown]))

    def shares(self, method: str, measure: str) -> dict[str, float]:
        """By variant, the share of images in which maps point at the object asked for."""
        others = self.others
        assert others is not None
        points: dict[str, Callable[[Heatmaps], Tensor]] = {
            POINTING[0]: lambda maps: heatmap.prefers(maps, self.masks, others),
            POINTING[1]: lambda maps: heatmap.hits(maps, self.masks),
        }
        return {name: float(points[measure](maps).double().mean()) for name, maps in self.made[method].items()}


def _joined(several: Sequence[Made]) -> Made:
    """Batches as one."""
    return {
        method: {name: Heatmaps.cat([made[method][name] for made in several]) for name in variants}
        for method, variants in several[0].items()
    }


@dataclass(frozen=True, eq=False)
class _Shown:
    """A photograph as the model sees it.

    Attributes:
        image: What the model takes.
        mask: Where the objects of one class are.
        kind: Of the model's classes that are kinds of it, the likeliest.
    """

    image: Float[Tensor, "1 channel height width"]
    mask: Bool[Tensor, "height width"]
    kind: int

    @classmethod
    def of(
        cls, model: HookedViT, path: Path, labels: Path, kinds: Mapping[int, Sequence[int]], protocol: Protocol
    ) -> "_Shown | None":
        """A photograph, if it shows enough of a known class."""
        photograph = open_upright(path)
        seen, image = model.preprocess_geometry(photograph), model.preprocess([photograph])
        size = (image.shape[2], image.shape[3])
        masks = {
            number: heatmap.as_seen(mask, seen, size)
            for number, mask in outlines(labels / f"{path.stem}.txt", photograph.size).items()
            if number in kinds
        }
        if not masks:
            return None
        number = max(masks, key=lambda one: int(masks[one].sum()))
        if float(masks[number].double().mean()) < protocol.least:
            return None
        with torch.no_grad():
            logits = model(image)[0, list(kinds[number])]
        return cls(image, masks[number], kinds[number][int(logits.argmax())])


# --- held against masks -----------------------------------------------------------------------------------------------


def _segmented(validation: _Held, test: _Held, protocol: Protocol) -> Iterator[tuple[str, str, Segmentation]]:
    """By protocol and method, how well maps segment."""
    for method, variants in test.made.items():
        name, threshold = _chosen(validation, method, protocol)
        first = next(iter(variants))
        for by, variant, level in ((PUBLISHED, first, protocol.published), (CHOSEN, name, threshold)):
            yield by, method, heatmap.segment(variants[variant], test.masks, threshold=level)


def _pointed(validation: _Held, test: _Held) -> Iterator[tuple[str, str, str, float]]:
    """By protocol, method and measure, how often maps point at the object asked for; of a constant map none does."""
    for method in test.made:
        for measure in POINTING if method != CONSTANT else ():
            of_validation, of_test = (held.shares(method, measure) for held in (validation, test))
            first, best = next(iter(of_test)), max(of_validation, key=of_validation.__getitem__)
            yield PUBLISHED, method, measure, of_test[first]
            yield CHOSEN, method, measure, of_test[best]


def _chosen(validation: _Held, method: str, protocol: Protocol) -> tuple[str, Threshold]:
    """The variant and threshold of a method with the best mIoU; of equal ones the first."""
    best: tuple[str, Threshold, float] | None = None
    for name, maps in validation.made[method].items():
        pixels = maps.to_pixels()[:, 0]
        for threshold in protocol.thresholds:
            found = heatmap.foreground(pixels, threshold=threshold)
            reached = _miou(found, validation.masks)
            if best is None or reached > best[2]:
                best = name, threshold, reached
    assert best is not None
    return best[0], best[1]


def _miou(found: Bool[Tensor, "batch height width"], masks: Bool[Tensor, "batch height width"]) -> float:
    """The mean over foreground and background of what both share, by what either has, over all images together."""
    ious = [(one & other).sum() / (one | other).sum().clamp(min=1) for one, other in ((found, masks), (~found, ~masks))]
    return float(sum(ious)) / 2


def _records(task: str, subject: Subject, method: str, seed: int, found: Segmentation, of: str) -> Iterator[Record]:
    for measure, name in MEASURES.items():
        value = float(getattr(found, name))
        yield Record(task, measure, subject.name, method, seed, value, of, interval=found.interval(name))
