"""Reading ahead: while a model runs on one chunk of images, the next is read, opened and preprocessed."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.collecting.files import RESUME
from vitdecomp_lens.collecting.images import ImageSource, Sample
from vitdecomp_lens.collecting.pictures import Preprocessor, check_bytes, opened
from vitdecomp_lens.errors import InputError

Images = Float[Tensor, "batch channel height width"]


@dataclass(frozen=True)
class Batch:
    """One chunk's images, ready for the models.

    Attributes:
        number: Which chunk.
        ids: Of the images that could be read.
        labels: Of these images, by name.
        images: As each of the models takes them; none where no image could be read.
        skipped: Identifier and reason of each image that could not be read.
        is_last: Whether the data set ended here.
    """

    number: int
    ids: tuple[str, ...]
    labels: dict[str, Int[Tensor, "batch"]]
    images: tuple[Images, ...]
    skipped: tuple[tuple[str, str], ...]
    is_last: bool


@dataclass(frozen=True)
class Reader:
    """Reads chunks of one size from a source.

    Attributes:
        source: Where images come from.
        size: How many images a chunk has.
        preprocessors: One for each model.
        skip: Whether to skip images that cannot be read; otherwise the first one is an error.
        threads: How many images are opened at once.
    """

    source: ImageSource
    size: int
    preprocessors: tuple[Preprocessor, ...]
    skip: bool
    threads: int

    def batches(self, numbers: Iterable[int]) -> Iterator[Batch]:
        """Chunks by their numbers, one read ahead, up to the data set's end.

        Raises:
            InputError: Where an image cannot be used.
        """
        with ThreadPoolExecutor(self.threads) as openers, ThreadPoolExecutor(1) as ahead:
            waiting: Future[Batch] | None = None
            for number in numbers:
                following = ahead.submit(self._batch, number, openers)
                if waiting is not None:
                    batch = waiting.result()
                    yield batch
                    if batch.is_last:
                        return
                waiting = following
            if waiting is not None:
                yield waiting.result()

    def _batch(self, number: int, openers: ThreadPoolExecutor) -> Batch:
        start = number * self.size
        samples = self.source.read(start, start + self.size)
        found = list(openers.map(self._opened, samples))
        skipped = tuple((s.id, one) for s, one in zip(samples, found, strict=True) if isinstance(one, str))
        if skipped and not self.skip:
            (name, reason), *_ = skipped
            raise InputError(
                f"The image {name!r} cannot be read: {reason.rstrip('.')}. Go on without it, with {RESUME} and "
                f'unreadable="skip" (--unreadable skip), which lists such images at the end; or mend it, which makes '
                f"another set of images, and collect that into another place."
            )
        kept = [(s, one) for s, one in zip(samples, found, strict=True) if not isinstance(one, str)]
        ids = tuple(sample.id for sample, _ in kept)
        images = self._batches([one for _, one in kept]) if kept else ()
        for place, batch in enumerate(images):
            if not place or batch is not images[0]:
                refuse_nonfinite(batch, ids, "pixels")
        labels = self._labels([sample for sample, _ in kept])
        return Batch(number, ids, labels, images, skipped, is_last=len(samples) < self.size)

    def _batches(self, several: list[tuple[Tensor, ...]]) -> tuple[Images, ...]:
        """The batch for each model; one for all that make the same of it."""
        first, *others = self.preprocessors
        batch = first.batch([one[0] for one in several])
        are_bytes = not any(one[0].is_floating_point() for one in several)
        return (
            batch,
            *(
                batch if are_bytes and other.takes_bytes_like(first) else other.batch([one[place] for one in several])
                for place, other in enumerate(others, start=1)
            ),
        )

    def _opened(self, sample: Sample) -> tuple[Tensor, ...] | str:
        """The picture for each model, or why it cannot be read."""
        check_bytes(sample.image, sample.id)
        try:
            picture = opened(sample.image)
        except InputError as error:
            return str(error)
        return tuple(preprocessor.one(picture) for preprocessor in self.preprocessors)

    def _labels(self, samples: list[Sample]) -> dict[str, Int[Tensor, "batch"]]:
        for sample in samples:
            if set(sample.labels) != set(self.source.labels):
                raise InputError(
                    f"Expected the labels {', '.join(map(repr, self.source.labels)) or '(none)'} of every image; "
                    f"{sample.id!r} has {', '.join(map(repr, sample.labels)) or 'none'}."
                )
        return {name: torch.tensor([s.labels[name] for s in samples]).long() for name in self.source.labels}


def refuse_nonfinite(values: Tensor, ids: tuple[str, ...], what: str, advice: Callable[[], str] | None = None) -> None:
    """Refuse values of which some are NaN or infinite, and name the first image that has them.

    Args:
        values: With one row for each image.
        ids: Of the images.
        what: What the values are.
        advice: What to do, where there is more to say than to look at the image.

    Raises:
        InputError: Naming the image.
    """
    if bool(values.sum().isfinite()):  # finite if all are, and needs no second tensor of this size
        return
    bad = ~values.flatten(1).isfinite().all(1)
    if bool(bad.any()):
        then = "Check how it was made and normalised, or leave it out." if advice is None else advice()
        raise InputError(f"Expected finite {what}; those of image {ids[int(bad.int().argmax())]!r} are not. {then}")
