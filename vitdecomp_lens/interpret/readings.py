"""What reading components in words gives: the texts, and how much of a component each of them explains.

A method such as `vitdecomp_lens.interpret.text_span` makes a `Reading`; what compares readings takes them as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.selecting import Components, as_components, summary

__all__ = ["Reading", "refuse_other_space"]


@dataclass(frozen=True, eq=False, repr=False)
class Reading:
    """What components say, in words.

    Each component has its own texts, at most as many as there were steps. Beyond its last text `chosen` is -1,
    `directions` are zero and `share_explained` stays where it was.

    Attributes:
        components: What each row belongs to.
        bank_texts: All texts that there were to choose from.
        chosen: The numbers of the texts in the bank, in the order in which they were chosen.
        share_explained: Cumulative: the share of the component's variance over images, around its mean and summed over
            all directions, that lies in the span of the directions so far.
        directions: Orthogonal directions of unit length, one a step: the chosen text without what the texts before it
            explain.
        mean: Each component's mean over images.
        ranks: How many directions a component's texts were compared in: the numerical rank of its values, or the rank
            that was asked for where that is smaller.
        variant: Which algorithm chose.
        space: The name of the space in which texts and components were compared.
        images: How many images were read.
    """

    components: Components
    bank_texts: tuple[str, ...]
    chosen: Int[Tensor, "component step"]
    share_explained: Float[Tensor, "component step"]
    directions: Float[Tensor, "component step d_clip"]
    mean: Float[Tensor, "component d_clip"]
    ranks: Int[Tensor, "component"]
    variant: str
    space: str
    images: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", as_components(self.components, len(self.chosen)))
        object.__setattr__(self, "bank_texts", tuple(self.bank_texts))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The components' labels, in the order of the rows."""
        return tuple(component.label for component in self.components)

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        """Each component's texts, by its label, the first chosen first; an empty list where nothing varies."""
        rows = ([self.bank_texts[number] for number in row if number >= 0] for row in self.chosen.tolist())
        return dict(zip(self.labels, rows, strict=True))

    def __len__(self) -> int:
        return len(self.components)

    def __repr__(self) -> str:
        component, step = self.chosen.shape
        return (
            f"Reading({component=}, {step=}, {self.variant}: {summary(self.components)}; {len(self.bank_texts)} texts "
            f"of {self.space!r}, {self.images} images)"
        )

    def coefficients(self, parts: Decomposition) -> Float[Tensor, "component batch step"]:
        """How images load on each component's directions: ⟨direction, contribution − mean⟩.

        Args:
            parts: Contributions that were read, or those of other images.

        Raises:
            InputError: Where the contributions are of another space.
            UnknownNameError: Where a component that was read is missing.
        """
        values = self._values(parts)
        centred = values - self.mean.to(values)[:, None]
        return einsum(
            centred, self.directions.to(values), "component batch d_clip, component step d_clip -> component batch step"
        )

    def reconstruction(self, parts: Decomposition) -> Decomposition:
        """What the texts keep of each contribution: the component's mean, and what lies in the span of its directions.

        Args:
            parts: Contributions that were read, or those of other images.

        Returns:
            The components that were read, in their order; incomplete, with the total of ``parts``.
        """
        coefficients = self.coefficients(parts)
        spanned = einsum(
            coefficients,
            self.directions.to(coefficients),
            "component batch step, component step d_clip -> component batch d_clip",
        )
        return self._relabelled(parts, spanned + self.mean.to(spanned)[:, None])

    def residual(self, parts: Decomposition) -> Decomposition:
        """What the texts do not explain: each contribution minus its reconstruction."""
        return self._relabelled(parts, self._values(parts) - self.reconstruction(parts).values)

    def _values(self, parts: Decomposition) -> Float[Tensor, "component batch d_clip"]:
        refuse_other_space(parts.metadata, self.space)
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


def refuse_other_space(metadata: Mapping[str, Any], space: str) -> None:
    """Refuse contributions that say they are of another space than texts are.

    Args:
        metadata: What is known of the contributions; where they say so, their space is under ``"space"``.
        space: The texts' space.

    Raises:
        InputError: Names both spaces.
    """
    known = metadata.get("space")
    if known is not None and known != space:
        raise InputError(
            f"Expected contributions and texts of one space; the contributions are of {known!r}, the texts of "
            f"{space!r}. Embed the texts with the model that the aligner was fitted to."
        )
