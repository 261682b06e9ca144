"""What reading in words gives: the texts, how much of each there is, and what they explain.

Every method gives a `Reading`. There are two of them. `Spans` have one list of texts a component: a rule that applies
to any images, of a size that does not grow with them. `Codes` have a list for each single vector, with its
coefficients: an answer for the images that were read, and for no others. Both are asked the same way.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, VitDecompWarning
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.selecting import Components, as_components, position, positions_of, summary

__all__ = ["Codes", "Reading", "Spans", "refuse_other_space", "representation"]


@dataclass(frozen=True, eq=False, repr=False)
class Reading(ABC):
    """What components say, in words. Abstract: `Spans` has a list of texts a component, `Codes` one a vector.

    A list has at most as many texts as there are steps. Beyond its last one `chosen` is -1 and `share_explained` stays
    where it was.

    Attributes:
        components: What each row belongs to.
        bank: The texts that there were to choose from.
        chosen: The numbers of the texts in the bank, the most important one first.
        share_explained: Cumulative: what the texts so far explain of the squared length around the mean.
        mean: What was taken off before: each component's mean over images, unless another one was asked for.
        method: Which algorithm chose.
        images: How many images were read.
    """

    components: Components
    bank: TextBank
    chosen: Int[Tensor, "component *image step"]
    share_explained: Float[Tensor, "component *image step"]
    mean: Float[Tensor, "component d_clip"]
    method: str
    images: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", as_components(self.components, len(self.chosen)))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The components' labels, in the order of the rows."""
        return tuple(component.label for component in self.components)

    @cached_property
    def texts(self) -> dict[str, list[Any]]:
        """By a component's label, its texts, or those of each image; an empty list where there was nothing to read."""
        return {label: self._named(row) for label, row in zip(self.labels, self.chosen.tolist(), strict=True)}

    def _named(self, numbers: list[Any]) -> list[Any]:
        if numbers and isinstance(numbers[0], list):
            return [self._named(row) for row in numbers]
        return [self.bank.texts[number] for number in numbers if number >= 0]

    def __len__(self) -> int:
        return len(self.components)

    def __repr__(self) -> str:
        component, step = self.chosen.shape[0], self.chosen.shape[-1]
        return (
            f"{type(self).__name__}({component=}, {step=}, {self.method}: {summary(self.components)}; "
            f"{len(self.bank)} texts of {self.bank.space!r}, {self.images} images)"
        )

    @abstractmethod
    def coefficients(self, parts: Decomposition) -> Float[Tensor, "component batch step"]:
        """How much of each chosen text a contribution has, once the mean is taken off.

        Args:
            parts: Contributions. For `Codes` those that were read; for `Spans` those of any images.

        Raises:
            InputError: Where the contributions are of another space, or of other images than `Codes` are for.
            UnknownNameError: Where a component that was read is missing.
        """

    def reconstruction(self, parts: Decomposition) -> Decomposition:
        """What the texts keep of each contribution: the mean, and the texts times their coefficients.

        Args:
            parts: Contributions, as for `coefficients`.

        Returns:
            The components that were read, in their order; incomplete, with the total of ``parts``.
        """
        return self._relabelled(parts, self._reconstructed(self._values(parts)))

    def residual(self, parts: Decomposition) -> Decomposition:
        """What the texts do not explain: each contribution minus its reconstruction."""
        values = self._values(parts)
        return self._relabelled(parts, values - self._reconstructed(values))

    def _reconstructed(
        self, values: Float[Tensor, "component batch d_clip"]
    ) -> Float[Tensor, "component batch d_clip"]:
        return self._explained(values) + self.mean.to(values)[:, None]

    @abstractmethod
    def _explained(self, values: Float[Tensor, "component batch d_clip"]) -> Float[Tensor, "component batch d_clip"]:
        """The texts times their coefficients."""

    def _values(self, parts: Decomposition) -> Float[Tensor, "component batch d_clip"]:
        refuse_other_space(parts.metadata, self.bank)
        if parts.values.shape[-1] != self.mean.shape[-1]:
            raise InputError(
                f"Expected contributions of the {self.mean.shape[-1]} dimensions that were read; got "
                f"{parts.values.shape[-1]}. Map them with the same aligner first."
            )
        values = parts.select(labels=self.labels).values
        return values.to(accumulator(values.dtype))

    def _relabelled(self, parts: Decomposition, values: Float[Tensor, "component batch d_clip"]) -> Decomposition:
        components: tuple[Component, ...] = self.components
        return replace(parts, values=values.to(parts.values.dtype), components=components, complete=False)


@dataclass(frozen=True, eq=False, repr=False)
class Spans(Reading):
    """One list of texts for all images of a component, and the directions that they span.

    Attributes:
        chosen: In the order in which they were chosen.
        share_explained: The share of the component's variance over images, around its mean and summed over all
            directions, that lies in the span of the directions so far.
        directions: Orthogonal directions of unit length, one a step: the chosen text without what the texts before it
            explain. Beyond a component's last text they are zero.
        ranks: How many directions hold a component's values: their numerical rank, or for TextSpan the rank that was
            asked for, where that is smaller.
    """

    chosen: Int[Tensor, "component step"]
    share_explained: Float[Tensor, "component step"]
    directions: Float[Tensor, "component step d_clip"]
    ranks: Int[Tensor, "component"]

    def scores(self, parts: Decomposition) -> Float[Tensor, "component batch step"]:
        """Along each component's orthogonal directions: ⟨direction, contribution − mean⟩.

        Their variances over the images that were read, divided by the component's, are the shares of the single steps.

        Args:
            parts: Contributions of any images, as for `coefficients`.
        """
        return self._scores(self._values(parts))

    def coefficients(self, parts: Decomposition) -> Float[Tensor, "component batch step"]:
        """The combination of texts that is nearest to each contribution, once the mean is taken off.

        TextSpan's texts count as it compared them: as far as they lie in the component's own directions. Those of
        simultaneous OMP count as they are.

        Args:
            parts: Contributions of any images.

        Raises:
            InputError: Where the contributions are of another space.
            UnknownNameError: Where a component that was read is missing.
        """
        scores = self.scores(parts)
        directions = self.directions.to(scores)
        texts = self.bank.directions.to(scores)[self.chosen.clamp(min=0)]
        return on_texts(scores, texts @ directions.mT, self.chosen)

    def _scores(self, values: Float[Tensor, "component batch d_clip"]) -> Float[Tensor, "component batch step"]:
        centred = values - self.mean.to(values)[:, None]
        return einsum(
            centred, self.directions.to(values), "component batch d_clip, component step d_clip -> component batch step"
        )

    def _explained(self, values: Float[Tensor, "component batch d_clip"]) -> Float[Tensor, "component batch d_clip"]:
        return einsum(
            self._scores(values),
            self.directions.to(values),
            "component batch step, component step d_clip -> component batch d_clip",
        )


@dataclass(frozen=True, eq=False, repr=False)
class Codes(Reading):
    """A list of texts for each single vector, and how much of each the vector has.

    Attributes:
        chosen: OMP's in the order in which they were chosen; the lasso's with the largest amount first.
        share_explained: The share of the vector's squared length, around the mean, that the texts so far explain: with
            OMP at their best, with the lasso in the amounts that they have.
        amounts: How much of each text; beyond a vector's last text, 0.
    """

    chosen: Int[Tensor, "component image step"]
    share_explained: Float[Tensor, "component image step"]
    amounts: Float[Tensor, "component image step"]

    def code(self, label: str | Component, image: int = 0) -> tuple[tuple[str, float], ...]:
        """The texts of one vector, and how much of each it has.

        Args:
            label: The component's.
            image: The image's number.

        Raises:
            UnknownNameError: Where the component was not read.
            InputError: Where there is no such image.
        """
        row = position(positions_of(self.components), label)
        if not -self.images <= image < self.images:
            raise InputError(f"Expected an image from 0 to {self.images - 1}; got {image}.")
        pairs = zip(self.chosen[row, image].tolist(), self.amounts[row, image].tolist(), strict=True)
        return tuple((self.bank.texts[number], amount) for number, amount in pairs if number >= 0)

    def coefficients(self, parts: Decomposition) -> Float[Tensor, "component batch step"]:
        """The amounts, for the contributions that were read.

        Args:
            parts: These contributions.

        Raises:
            InputError: Where the contributions are of another space, or not as many as were read.
            UnknownNameError: Where a component that was read is missing.
        """
        return self.amounts.to(self._values(parts))

    def _values(self, parts: Decomposition) -> Float[Tensor, "component batch d_clip"]:
        if parts.values.shape[1] != self.images:
            raise InputError(
                f"Expected the {self.images} images that were read, as every vector has texts of its own; got "
                f"{parts.values.shape[1]}. Read the others too, or read spans, which apply to any images."
            )
        return super()._values(parts)

    def _explained(self, values: Float[Tensor, "component batch d_clip"]) -> Float[Tensor, "component batch d_clip"]:
        summed = combined(self.chosen.flatten(0, 1), self.amounts.flatten(0, 1).to(values), self.bank.directions)
        return summed.unflatten(0, self.chosen.shape[:2])


@dataclass(frozen=True)
class Piece:
    """The spans of some components, of which ``rows`` are the numbers."""

    rows: list[int]
    chosen: Int[Tensor, "component step"]
    share: Float[Tensor, "component step"]
    directions: Float[Tensor, "component step d_clip"]
    mean: Float[Tensor, "component d_clip"]
    ranks: Int[Tensor, "component"]


def joined(pieces: Sequence[Piece], parts: Decomposition, bank: TextBank, method: str) -> Spans:
    """The spans of all components, in the order of the contributions and in their dtype."""
    order = torch.tensor([row for piece in pieces for row in piece.rows], device=parts.values.device).argsort()
    dtype = accumulator(parts.values.dtype)
    return Spans(
        components=parts.components,
        bank=bank,
        chosen=torch.cat([piece.chosen for piece in pieces])[order],
        share_explained=torch.cat([piece.share for piece in pieces])[order].to(dtype),
        mean=torch.cat([piece.mean for piece in pieces])[order].to(dtype),
        method=method,
        images=parts.values.shape[1],
        directions=torch.cat([piece.directions for piece in pieces])[order].to(dtype),
        ranks=torch.cat([piece.ranks for piece in pieces])[order],
    )


def on_texts(
    scores: Float[Tensor, "row vector step"],
    within: Float[Tensor, "row step step"],
    chosen: Int[Tensor, "row step"],
) -> Float[Tensor, "row vector step"]:
    """Amounts of the texts from amounts of the orthogonal directions that were made of them, one after the other.

    Args:
        scores: Along the directions.
        within: ⟨text, direction⟩. A text has nothing along the directions that came after it.
        chosen: Below 0 where there is no text.
    """
    there = chosen >= 0
    within = within.tril() * there[:, :, None] + torch.diag_embed((~there).to(within))
    return torch.linalg.solve_triangular(within, scores, upper=False, left=False)


def combined(
    chosen: Int[Tensor, "vector step"], amounts: Float[Tensor, "vector step"], directions: Float[Tensor, "text d_clip"]
) -> Float[Tensor, "vector d_clip"]:
    """Σ amount × text for every vector, in the amounts' dtype. The texts of all vectors are not copied for that."""
    return torch.nn.functional.embedding_bag(
        chosen.clamp(min=0), directions.to(amounts), per_sample_weights=amounts, mode="sum"
    )


def representation(parts: Decomposition) -> Decomposition:
    """The total as the one component of a decomposition, ``"representation"``, to be read as components are.

    Args:
        parts: A decomposition that knows its total.

    Raises:
        InputError: Where it has none.

    Example:
        >>> parts = Decomposition(torch.ones(2, 1, 3), ("L0H0", "mlp.0"), 2 * torch.ones(1, 3))
        >>> representation(parts)["representation"]
        tensor([[2., 2., 2.]])
    """
    if parts.total is None:
        raise InputError("Expected a decomposition with a total; this one has none. Build it with total=.")
    component = Component(kind="source", name="representation")
    return Decomposition(parts.total[None], (component,), parts.total, metadata=parts.metadata)


def refuse_parts(parts: Decomposition, bank: TextBank, *, images: int = 1) -> None:
    """Refuse what cannot be read by a bank.

    Args:
        parts: Contributions.
        bank: The texts.
        images: How many images there have to be at least.

    Raises:
        InputError: Says what was expected.
    """
    if not isinstance(parts, Decomposition) or not isinstance(bank, TextBank):
        raise InputError(f"Expected a Decomposition and a TextBank; got {type(parts).__name__}, {type(bank).__name__}.")
    component, batch, width = parts.values.shape
    if not component:
        raise InputError("Expected at least one component to read; the decomposition has none.")
    if batch < images:
        raise InputError(
            f"Expected at least {images} image{'' if images == 1 else 's'}"
            f"{'' if images == 1 else ', since what is read is how components vary over them'}; got {batch}. "
            f"Decomposition.cat([...]) joins batches."
        )
    refuse_other_space(parts.metadata, bank)
    if width != bank.directions.shape[1]:
        raise InputError(
            f"Expected contributions and texts of one space; the contributions have {width} dimensions, the texts of "
            f"{bank.space!r} {bank.directions.shape[1]}. Take them there with parts.map(aligner) first."
        )


def refuse_other_space(metadata: Mapping[str, Any], bank: TextBank) -> None:
    """Refuse contributions that say they are of another space than texts are.

    Args:
        metadata: What is known of the contributions; where they say so, their space is under ``"space"``, and under
            ``"weights"`` of which model they are.
        bank: The texts.

    Raises:
        InputError: Names both spaces.

    Warns:
        VitDecompWarning: Where nothing says which space they are of, and they are not the CLIP's own that embedded the
            texts: then they are most probably of their model's.
    """
    known, tower = metadata.get("space"), bank.made.get("image_tower")
    if known is not None and known != bank.space:
        raise InputError(
            f"Expected contributions and texts of one space; the contributions are of {known!r}, the texts of "
            f"{bank.space!r}. Embed the texts with the model that the aligner was fitted to."
        )
    if known is None and tower is not None and metadata.get("weights", tower) != tower:
        warnings.warn(
            f"Expected contributions in the space of the texts, {bank.space!r}; these are a {metadata.get('model')}'s, "
            f"and not of the CLIP that embedded the texts, so that words read in them mean nothing. Take them there "
            f"with parts.map(aligner). (If it is that CLIP in another precision, embed the texts with it as it is.)",
            VitDecompWarning,
            stacklevel=4,
        )
