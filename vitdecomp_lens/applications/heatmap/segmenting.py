"""Heatmaps held against masks: zero-shot segmentation, and which of two objects a map points at.

The protocol is that of arXiv 2406.01583 (section 5, Table 5), which follows arXiv 2103.15679's: a map is resized to
pixels, clipped at 0, and its foreground are the pixels above its mean. (Where an object is small, that mean is low, and
noise around the object lies above it: Otsu's threshold, an option here, does not mind.)

Measures over a data set: *pixel accuracy*, the share of all pixels that are right; *IoU* of a class, how many pixels
are of it in both map and mask, divided by how many are in either, counted over all images together; *mIoU*, the mean
over the two classes, foreground and background; *mAP*, the mean over images of the average precision of pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitdecomp_lens.applications.heatmap.maps import Heatmaps, Resize
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.statistics import bootstrap_counts, interval

__all__ = [
    "MEASURES",
    "Segmentation",
    "as_seen",
    "average_precision",
    "choose_threshold",
    "foreground",
    "hits",
    "prefers",
    "segment",
]

MEASURES = ("pixel_accuracy", "miou", "foreground_iou", "mean_average_precision", "two_class_average_precision")
THRESHOLDS: tuple["Threshold", ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, "otsu")
OTSU = "otsu"
ROUNDING = 1e-6  # relative to the threshold: a map that is the same everywhere lies on it

Threshold = float | Literal["otsu"]
Maps = Heatmaps | Float[Tensor, "batch row column"]


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """How well maps segment, over a data set; what is counted image by image.

    Attributes:
        both: Pixels that are foreground in map and mask, and pixels that are background in both.
        either: Pixels that are foreground in map or mask, and that are background in either.
        pixels: How many an image has.
        precision: The average precision of the foreground's pixels. A map that says nothing has that of chance, the
            share of pixels that are foreground.
        pooled: The average precision over pixels and both classes together, the map m, from 0 to 1, being the score of
            the foreground and 1 − m that of the background: what published tables (of code after arXiv 2103.15679) call
            mAP. A small object costs it little.
        threshold: In units of a map's mean, or ``"otsu"``; None where not all images had the same.

    Example:
        >>> mask = torch.tensor([[[True, False], [False, False]]])
        >>> found = segment(torch.tensor([[[3.0, 0.5], [0.0, -1.0]]]), mask)
        >>> found.pixel_accuracy, found.foreground_iou, found.mean_average_precision
        (1.0, 1.0, 1.0)
    """

    both: Float[Tensor, "batch 2"]
    either: Float[Tensor, "batch 2"]
    pixels: Float[Tensor, "batch"]
    precision: Float[Tensor, "batch"]
    pooled: Float[Tensor, "batch"]
    threshold: Threshold | None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def pixel_accuracy(self) -> float:
        """The share of all pixels that are right."""
        return float(self._of("pixel_accuracy", self._once))

    @property
    def miou(self) -> float:
        """The mean of the IoU of foreground and background, each over all images together."""
        return float(self._of("miou", self._once))

    @property
    def foreground_iou(self) -> float:
        """The IoU of the foreground, over all images together."""
        return float(self._of("foreground_iou", self._once))

    @property
    def mean_average_precision(self) -> float:
        """The mean over images of ``precision``."""
        return float(self._of("mean_average_precision", self._once))

    @property
    def two_class_average_precision(self) -> float:
        """The mean over images of ``pooled``: the number to hold beside published ones."""
        return float(self._of("two_class_average_precision", self._once))

    def numbers(self) -> dict[str, float]:
        """All measures by name."""
        return {name: float(self._of(name, self._once)) for name in MEASURES}

    def interval(
        self, measure: str, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
    ) -> tuple[float, float]:
        """The ends of a measure's interval, by drawing as many images with replacement.

        Args:
            measure: One of `MEASURES`.
            resamples: How many times.
            level: The share of resamples between the ends.
            seed: Of the draws.

        Raises:
            InputError: Where there is no such measure, or a number is out of range.
        """
        counts = bootstrap_counts(len(self), resamples, seed).double()
        low, high = interval(self._of(measure, counts), level)
        return float(low), float(high)

    @property
    def _once(self) -> Float[Tensor, "1 batch"]:
        return torch.ones(1, len(self), dtype=torch.float64)

    def _of(self, measure: str, counts: Float[Tensor, "resample batch"]) -> Float[Tensor, "resample"]:
        """A measure of images that are counted so often each."""
        if measure == "pixel_accuracy":
            return counts @ self.both.sum(1) / (counts @ self.pixels)
        if measure in ("miou", "foreground_iou"):
            both, either = counts @ self.both, counts @ self.either
            shares = torch.where(either > 0, both / either, 1.0)  # a class that is nowhere, and found nowhere
            return shares.mean(1) if measure == "miou" else shares[:, 0]
        if measure in MEASURES:
            values = self.precision if measure == "mean_average_precision" else self.pooled
            return counts @ values / counts.sum(1)
        raise InputError(f"Expected one of {', '.join(MEASURES)}; got {measure!r}.")

    @classmethod
    def cat(cls, several: Sequence["Segmentation"]) -> "Segmentation":
        """Several batches as one.

        Raises:
            InputError: Where there are none.
        """
        several = tuple(several)
        if not several:
            raise InputError("Expected at least one batch of segmentations to concatenate; got none.")
        names = [f.name for f in fields(cls) if f.name != "threshold"]
        joined: dict[str, Any] = {name: torch.cat([getattr(one, name) for one in several]) for name in names}
        thresholds = {one.threshold for one in several}
        return cls(**joined, threshold=thresholds.pop() if len(thresholds) == 1 else None)

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value:.3f}" for name, value in self.numbers().items())
        return f"Segmentation(batch={len(self)}, threshold={self.threshold}: {said})"


def segment(
    maps: Maps,
    masks: Bool[Tensor, "batch height width"],
    *,
    threshold: Threshold = 1.0,
    resize: Resize = "linear",
    clip: bool = True,
) -> Segmentation:
    """Hold one map an image against its mask, by the paper's protocol.

    Args:
        maps: One map an image: ``of_texts(...).picked(texts)``, any of the baselines', or numbers by pixel.
        masks: Where each image shows what its map is of, in pixels of the image that the model was given; see
            `as_seen` for masks of photographs.
        threshold: From which on a pixel is foreground, in units of the map's mean; 1 is the paper's. Or ``"otsu"``: by
            Otsu's method (1979) the one that parts a map's pixels into two lots with means as far apart as can be,
            weighed by their sizes. Others than the paper's are to be chosen on other images, by `choose_threshold`.
        resize: As for `Heatmaps.to_pixels`.
        clip: Whether what is negative counts as 0, as in the paper; else the map is taken from its smallest value.

    Returns:
        Counts by image, from which all measures follow.

    Raises:
        InputError: Where masks are of another size than the image or another number, or show nothing; where an image
            has several maps.

    Example:
        >>> from vitdecomp_lens.applications.heatmap import from_tokens
        >>> from vitdecomp_lens.testbed.planted import planted_tokens
        >>> planted = planted_tokens(images=4, noise=0.0)
        >>> maps = from_tokens(planted.tokens, components=[planted.carrier]).picked([planted.text] * 4)
        >>> masks = planted.masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
        >>> segment(maps, masks, resize="nearest").miou
        1.0
    """
    pixels = _pixels(maps, masks, resize)
    _refuse_empty(masks)
    masks = masks.to(pixels.device)
    both, either = _shared(foreground(pixels, threshold=threshold, clip=clip), masks)
    flat, hit = _based(pixels, clip).flatten(1), masks.flatten(1)
    unit = _from_0_to_1(flat)
    return Segmentation(
        both=both,
        either=either,
        pixels=torch.full((len(masks),), float(hit.shape[1]), dtype=torch.float64),
        precision=average_precision(flat, hit).cpu(),
        pooled=average_precision(torch.cat([1 - unit, unit], 1), torch.cat([~hit, hit], 1)).cpu(),
        threshold=threshold,
    )


def foreground(
    pixels: Float[Tensor, "batch height width"], *, threshold: Threshold = 1.0, clip: bool = True
) -> Bool[Tensor, "batch height width"]:
    """Which pixels are foreground: those that reach ``threshold`` times the map's mean, and are above 0.

    A map that is the same everywhere is foreground everywhere, at a threshold of 1 and by Otsu's method.

    Args:
        pixels: Maps.
        threshold: As for `segment`.
        clip: Whether what is negative counts as 0; else the map is taken from its smallest value.

    Raises:
        InputError: Where the threshold is none.

    Example:
        >>> foreground(torch.tensor([[[3.0, 2.0], [0.5, -8.0]]]))
        tensor([[[ True,  True],
                 [False, False]]])
    """
    based = _based(pixels, clip)
    if threshold != OTSU and (isinstance(threshold, str) or not 0 <= threshold < float("inf")):
        raise InputError(f"Expected threshold= as a number of at least 0, or 'otsu'; got {threshold!r}.")
    if isinstance(threshold, str):
        level = _otsu(based.flatten(1))[:, None, None]
    else:
        level = threshold * based.mean((1, 2), keepdim=True)
    return (based > 0) & (based >= level * (1 - ROUNDING))


def choose_threshold(
    maps: Maps,
    masks: Bool[Tensor, "batch height width"],
    *,
    thresholds: Sequence[Threshold] = THRESHOLDS,
    measure: str = "miou",
    resize: Resize = "linear",
    clip: bool = True,
) -> Threshold:
    """The threshold of the best segmentation of images that are not those reported on; of equal ones the nearest to 1.

    Args:
        maps: As for `segment`.
        masks: The same.
        thresholds: Those tried, as for `segment`.
        measure: One of `MEASURES` that a threshold changes.
        resize: As for `segment`.
        clip: The same.

    Raises:
        InputError: As `segment`; where there is nothing to try, or a threshold does not change the measure.
    """
    if not thresholds or measure not in MEASURES[:3]:
        raise InputError(f"Expected thresholds, and measure= one of {', '.join(MEASURES[:3])}; got {measure!r}.")
    numbers = sorted((one for one in thresholds if not isinstance(one, str)), key=lambda one: (abs(one - 1), one))
    ordered: list[Threshold] = [*numbers, *(one for one in thresholds if isinstance(one, str))]
    pixels = _pixels(maps, masks, resize)
    first = segment(pixels, masks, threshold=ordered[0], clip=clip)
    tried = []
    for one in ordered:
        both, either = _shared(foreground(pixels, threshold=one, clip=clip), masks.to(pixels.device))
        tried.append(getattr(replace(first, both=both, either=either, threshold=one), measure))
    return ordered[tried.index(max(tried))]


def average_precision(scores: Float[Tensor, "batch item"], right: Bool[Tensor, "batch item"]) -> Float[Tensor, "batch"]:
    """The mean over right items of the precision at each: of all items with a score as high, how many are right.

    Of a map that says nothing it is the share of right items. It is scikit-learn's ``average_precision_score``.

    Raises:
        InputError: Where nothing is right, or shapes differ.

    Example:
        >>> average_precision(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[True, False, True]]))
        tensor([0.8333], dtype=torch.float64)
    """
    if scores.shape != right.shape or not bool(right.any(1).all()):
        raise InputError(
            f"Expected scores and what is right alike, and something right in each row; got {scores.shape}."
        )
    ordered, order = scores.sort(1, descending=True)
    hit = right.gather(1, order).double()
    falling = (-ordered).contiguous()
    last = torch.searchsorted(falling, falling, right=True)  # how many items have a score as high
    precision = hit.cumsum(1).gather(1, last - 1) / last
    return (hit * precision).sum(1) / hit.sum(1)


def hits(maps: Maps, masks: Bool[Tensor, "batch height width"], *, resize: Resize = "linear") -> Bool[Tensor, "batch"]:
    """Whether the map's highest pixel is in the mask: the pointing game of arXiv 1608.00507.

    Args:
        maps: As for `segment`, like the masks.
        masks: Where the object is.
        resize: As for `segment`.

    Raises:
        InputError: As `segment`.
    """
    pixels = _pixels(maps, masks, resize)
    _refuse_empty(masks)
    best = pixels.flatten(1).argmax(1, keepdim=True)
    return masks.to(best.device).flatten(1).gather(1, best)[:, 0]


def prefers(
    maps: Maps,
    masks: Bool[Tensor, "batch height width"],
    others: Bool[Tensor, "batch height width"],
    *,
    resize: Resize = "linear",
) -> Bool[Tensor, "batch"]:
    """Whether the map is higher on one object than on the other, in the mean over their pixels.

    Args:
        maps: As for `segment`, like the masks.
        masks: Where the object is that the map is of.
        others: Where the other one is.
        resize: As for `segment`.

    Raises:
        InputError: As `segment`.

    Example:
        >>> mask = torch.tensor([[[True, False]]])
        >>> prefers(torch.tensor([[[2.0, 1.0]]]), mask, ~mask)
        tensor([True])
    """
    pixels = _pixels(maps, masks, resize)
    _pixels(maps, others, resize)
    _refuse_empty(masks)
    _refuse_empty(others)
    mean, other = ((pixels * m.to(pixels)).sum((1, 2)) / m.to(pixels).sum((1, 2)) for m in (masks, others))
    return mean > other


def as_seen(
    mask: Bool[Tensor, "height width"],
    seen: tuple[float, float, float, float],
    size: tuple[int, int],
) -> Bool[Tensor, "height_seen width_seen"]:
    """A photograph's mask as the model sees the photograph: cropped, and resized to the model's image.

    Args:
        mask: Of the photograph, upright.
        seen: What the model sees of it, as ``model.preprocess_geometry(photograph)`` says.
        size: Height and width of the model's image.

    Raises:
        InputError: Where the rectangle or the size is none.

    Example:
        >>> as_seen(torch.eye(4).bool(), (0.0, 0.0, 2.0, 2.0), (2, 2))
        tensor([[ True, False],
                [False,  True]])
    """
    left, top, right, bottom = seen
    if not (right > left and bottom > top and min(size) > 0):
        raise InputError(f"Expected a rectangle left, top, right, bottom, and a size; got {seen} and {size}.")
    rows, columns = (
        (start + (torch.arange(count, dtype=torch.float64) + 0.5) * (end - start) / count).floor().long()
        for start, end, count in ((top, bottom, size[0]), (left, right, size[1]))
    )
    height, width = mask.shape
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    return mask[rows.clamp(0, height - 1)][:, columns.clamp(0, width - 1)] & inside.to(mask.device)


# --- what is compared -------------------------------------------------------------------------------------------------


def _based(pixels: Float[Tensor, "batch height width"], clip: bool) -> Float[Tensor, "batch height width"]:
    """Maps in double precision, from 0 up."""
    wide = pixels.double()
    return wide.clamp(min=0) if clip else wide - wide.amin((1, 2), keepdim=True)


def _shared(
    found: Bool[Tensor, "batch height width"], masks: Bool[Tensor, "batch height width"]
) -> tuple[Float[Tensor, "batch 2"], Float[Tensor, "batch 2"]]:
    """How many pixels are foreground, and background: in both; in either."""
    both = torch.stack([found & masks, ~found & ~masks], 1).flatten(2).sum(2)
    either = torch.stack([found | masks, ~found | ~masks], 1).flatten(2).sum(2)
    return both.double().cpu(), either.double().cpu()


def _otsu(flat: Float[Tensor, "batch pixel"]) -> Float[Tensor, "batch"]:
    """The smallest value of the upper lot, where lots are parted so that w₀ w₁ (μ₁ − μ₀)² is largest."""
    ordered, count = flat.sort(1).values, flat.shape[1]
    below = torch.arange(1, count, dtype=flat.dtype, device=flat.device)
    sums = ordered.cumsum(1)
    lower, upper = sums[:, :-1] / below, (sums[:, -1:] - sums[:, :-1]) / (count - below)
    between = below * (count - below) * (upper - lower).square()
    # Equal values are never parted.
    between = between.masked_fill(ordered[:, 1:] == ordered[:, :-1], -1)
    best = torch.nn.functional.pad(between, (1, 0), value=0).argmax(1, keepdim=True)
    return ordered.gather(1, best)[:, 0]


def _from_0_to_1(flat: Float[Tensor, "batch pixel"]) -> Float[Tensor, "batch pixel"]:
    """Maps from 0 to 1; one that is the same everywhere is 1, or 0 where it is nothing."""
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return torch.where(high > low, (flat - low) / (high - low), (flat > 0).to(flat))


def _pixels(maps: Maps, masks: Tensor, resize: Resize) -> Float[Tensor, "batch height width"]:
    """One map an image over the pixels of its mask; masks of another size are refused, and not resized unasked."""
    if isinstance(maps, Heatmaps):
        if len(maps.texts) != 1:
            raise InputError(
                f"Expected one map an image; there are {len(maps.texts)}, of {list(maps.texts[:3])!r}... Pick each "
                f"image's own: maps.picked(texts)."
            )
        if resize not in get_args(Resize):
            raise InputError(f"Expected resize= to be one of {', '.join(get_args(Resize))}; got {resize!r}.")
        shape: tuple[int, ...] = (len(maps), *(maps.grid.seen or maps.grid.image_size))
    else:
        shape = tuple(maps.shape)
    if masks.dtype != torch.bool or tuple(masks.shape) != shape:
        raise InputError(
            f'Expected masks as Bool[Tensor, "batch height width"] of shape {shape}, that of the images the maps are '
            f"of; got {masks.dtype} of shape {tuple(masks.shape)}. For masks of photographs, as_seen(mask, seen, size)."
        )
    return maps.to_pixels(resize=resize)[:, 0] if isinstance(maps, Heatmaps) else maps


def _refuse_empty(masks: Bool[Tensor, "batch height width"]) -> None:
    if not len(masks):
        raise InputError("Expected at least one image with its mask; got none.")
    empty: Int[Tensor, "image"] = (~masks.flatten(1).any(1)).nonzero()[:, 0]
    if len(empty):
        raise InputError(
            f"Expected masks that show something; {len(empty)} are empty, such as that of image {int(empty[0])}. "
            f"Leave those images out."
        )
