"""Whether a component is still called the same if it is read again: from other images, or with other texts.

It takes the reading as a function, and serves every method that gives each component one list of texts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.readings import Spans, refuse_other_space
from vitdecomp_lens.interpret.statistics import bootstrap_counts, interval
from vitdecomp_lens.selecting import position, positions_of, summary

__all__ = ["BankStability", "LabelStability", "bank_stability", "label_stability"]

Read = Callable[[Decomposition, TextBank], Spans]
LEAST = 4  # images: of fewer, resamples are mostly one image


@dataclass(frozen=True, eq=False, repr=False)
class LabelStability:
    """How often each component's texts are chosen again when images are resampled.

    Attributes:
        reading: That of all images, whose texts are looked for.
        shares: For each of its texts, the share of resamples in which it is chosen again, at whichever step; 0 beyond
            the last text.
        jaccard: Texts in both readings, as a share of those in either; 0 where there are none.
        overlap: How much of the smaller one of both readings' spans lies in the other: the mean squared cosine of the
            angles between them. Where a text gives way to one of nearly the same direction, it stays near 1.
        chance: The share to expect of as many texts drawn at random.
    """

    reading: Spans
    shares: Float[Tensor, "component step"]
    jaccard: Float[Tensor, "resample component"]
    overlap: Float[Tensor, "resample component"]
    chance: Float[Tensor, "component"]

    @property
    def labels(self) -> tuple[str, ...]:
        """The components' labels, in the order of the rows."""
        return self.reading.labels

    @property
    def mean(self) -> float:
        """The share of texts that are chosen again, over all texts of all components; 0 if there are none."""
        read = self.reading.chosen.to(self.shares.device) >= 0
        return float(self.shares[read].mean()) if bool(read.any()) else 0.0

    def jaccard_interval(self, level: float = 0.95) -> tuple[Float[Tensor, "component"], Float[Tensor, "component"]]:
        """Between which ends the Jaccard index of a component lies in a share of the resamples."""
        return interval(self.jaccard, level)

    def __len__(self) -> int:
        return len(self.reading)

    def __getitem__(self, label: str | Component) -> tuple[tuple[str, float], ...]:
        """A component's texts in the order in which they were chosen, each with its share."""
        row = position(positions_of(self.reading.components), label)
        texts = self.reading.texts[self.labels[row]]
        return tuple(zip(texts, self.shares[row].tolist(), strict=False))

    def __repr__(self) -> str:
        resample, component = self.jaccard.shape
        return (
            f"LabelStability({resample=}, {component=}: {summary(self.reading.components)}; texts chosen again "
            f"{self.mean:.3f}, by chance {float(self.chance.mean()):.3f})"
        )


@torch.no_grad()
def label_stability(
    parts: Decomposition, bank: TextBank, read: Read, *, resamples: int = 20, seed: int = 0
) -> LabelStability:
    """Read components again from images drawn with replacement, and see which texts stay.

    Args:
        parts: Contributions in the space of the texts.
        bank: The texts.
        read: What reads them: ``functools.partial(text_span, steps=20, rank=64)``, or any function of contributions
            and bank.
        resamples: How many times; each is a reading of as many images as there are, of which about 63 % differ.
        seed: Of what is drawn.

    Raises:
        InputError: Where there are fewer than 4 images, or no resamples are asked for; and what ``read`` raises.

    Example:
        >>> from functools import partial
        >>> from vitdecomp_lens.interpret.text_span import text_span
        >>> from vitdecomp_lens.testbed.planted import planted_spans
        >>> planted = planted_spans(images=60, d_clip=16, texts=20, components=2, per_component=2)
        >>> bank = TextBank(planted.texts, planted.directions, space="planted")
        >>> label_stability(planted.parts, bank, partial(text_span, steps=1), resamples=5)
        LabelStability(resample=5, component=2: 2 head (layer 0); texts chosen again 1.000, by chance 0.050)
    """
    images = parts.values.shape[1]
    if images < LEAST:
        raise InputError(
            f"Expected at least {LEAST} images to draw from; got {images}. Decomposition.cat([...]) joins batches; "
            f"some hundreds of images tell what holds for others."
        )
    if resamples < 1:
        raise InputError(f"Expected resamples= of at least 1; got {resamples}.")
    counts = bootstrap_counts(images, resamples, seed)
    reading = _read(read, parts, bank)
    directions = reading.directions
    found = directions.new_zeros(reading.chosen.shape)
    sizes = directions.new_zeros(len(reading))
    jaccard, overlap = [], []
    for drawn in counts:
        again = _read(read, parts.images(torch.arange(images).repeat_interleave(drawn)), bank)
        _refuse_other_components(reading, again)
        both = [(of, again.texts[label]) for label, of in reading.texts.items()]
        for row, (of, other) in enumerate(both):
            found[row, : len(of)] += directions.new_tensor([text in other for text in of])
        jaccard.append([_jaccard(set(of), set(other)) for of, other in both])
        sizes += directions.new_tensor([len(other) for _, other in both])
        overlap.append(_overlap(directions, again.directions))
    return LabelStability(
        reading=reading,
        shares=found / resamples,
        jaccard=directions.new_tensor(jaccard),
        overlap=torch.stack(overlap),
        chance=sizes / resamples / len(bank),
    )


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / max(1, len(one | other))


@dataclass(frozen=True, eq=False, repr=False)
class BankStability:
    """Whether two banks say the same of each component. Their texts differ, so that what these span is compared.

    Attributes:
        first: The reading with the first bank.
        second: The reading with the second.
        overlap: How much of the smaller span lies in the other: the mean squared cosine of the angles between them.
        cosine: Of what the two spans keep of the contributions, over all images, the means taken off: 1 where they
            keep the same. What varies most counts most.
        chance: The overlap to expect of spans drawn at random within the dimensions that hold the component's values.
    """

    first: Spans
    second: Spans
    overlap: Float[Tensor, "component"]
    cosine: Float[Tensor, "component"]
    chance: Float[Tensor, "component"]

    @property
    def labels(self) -> tuple[str, ...]:
        """The components' labels, in the order of the rows."""
        return self.first.labels

    def __len__(self) -> int:
        return len(self.first)

    def __repr__(self) -> str:
        return (
            f"BankStability({summary(self.first.components)}; overlap {float(self.overlap.mean()):.3f}, by chance "
            f"{float(self.chance.mean()):.3f}; cosine {float(self.cosine.mean()):.3f})"
        )


@torch.no_grad()
def bank_stability(parts: Decomposition, bank: TextBank, other: TextBank, read: Read) -> BankStability:
    """Read components with two banks, and compare what the texts span.

    Args:
        parts: Contributions in the space of the texts.
        bank: Some texts.
        other: Other texts, of the same space.
        read: What reads them, as for `label_stability`.

    Raises:
        InputError: Where the banks are of different spaces; and what ``read`` raises.

    Example:
        >>> from functools import partial
        >>> from vitdecomp_lens.interpret.text_span import text_span
        >>> from vitdecomp_lens.testbed.planted import planted_spans
        >>> planted = planted_spans(images=60, d_clip=16, texts=20, components=2, per_component=2)
        >>> bank = TextBank(planted.texts, planted.directions, space="planted")
        >>> renamed = TextBank([f"also {text}" for text in bank], bank.directions, space="planted")
        >>> bank_stability(planted.parts, bank, renamed, partial(text_span, steps=2))
        BankStability(2 head (layer 0); overlap 1.000, by chance 1.000; cosine 1.000)
    """
    bank.check_space(other.space)
    refuse_other_space(parts.metadata, bank)
    first, second = _read(read, parts, bank), _read(read, parts, other)
    _refuse_other_components(first, second)
    one, two = first.directions, second.directions
    smaller, larger = torch.stack([_dimensions(one), _dimensions(two)]).aminmax(dim=0)
    return BankStability(
        first=first,
        second=second,
        overlap=_overlap(one, two),
        cosine=_cosine(parts.select(labels=first.labels).values.detach(), one, two),
        chance=_ratio(larger, torch.maximum(first.ranks, second.ranks).to(one)).where(smaller > 0, 0),
    )


def _read(read: Read, parts: Decomposition, bank: TextBank) -> Spans:
    reading = read(parts, bank)
    if not isinstance(reading, Spans):
        raise InputError(
            f"Expected read= to give Spans, with a list of texts for each component, as text_span does; got a "
            f"{type(reading).__name__}."
        )
    return reading


def _refuse_other_components(one: Spans, other: Spans) -> None:
    if one.labels != other.labels:
        raise InputError("Expected read= to read the same components each time; two of its readings differ in them.")


def _dimensions(directions: Float[Tensor, "component step d_clip"]) -> Float[Tensor, "component"]:
    """How many directions there are: orthonormal ones, and zeros beyond."""
    return directions.square().sum((1, 2))


def _overlap(
    one: Float[Tensor, "component step d_clip"], other: Float[Tensor, "component other_step d_clip"]
) -> Float[Tensor, "component"]:
    cosines = one @ other.to(one).mT
    return _ratio(cosines.square().sum((1, 2)), torch.minimum(_dimensions(one), _dimensions(other.to(one))))


def _cosine(
    values: Float[Tensor, "component batch d_clip"],
    one: Float[Tensor, "component step d_clip"],
    other: Float[Tensor, "component other_step d_clip"],
) -> Float[Tensor, "component"]:
    """Of what the spans keep of values around their mean."""
    found = []
    for row, own in enumerate(values):  # one by one, since a copy of all values would be most of the memory
        centred = own.to(one) - own.to(one).mean(0)
        left, right = centred @ one[row].T @ one[row], centred @ other[row].T @ other[row]
        found.append(_ratio((left * right).sum(), left.norm() * right.norm()))
    return torch.stack(found)


def _ratio(values: Float[Tensor, "*axes"], sizes: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Values divided by sizes; 0 where a size is 0."""
    return torch.where(sizes > 0, values / sizes, 0)
