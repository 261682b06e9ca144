"""What matching the components of two models gives, however they are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.statistics import false_discovery
from vitdecomp_lens.selecting import Components, as_components, position, positions_of

RATE = 0.05  # of false discoveries among the matches that are called more than chance


@dataclass(frozen=True)
class Match:
    """Which of another model's components is the most alike.

    Attributes:
        component: Whose match it is.
        other: The match.
        similarity: How alike they are.
        chance: How alike the most alike of the other model's components is by chance, on average.
        p: How often chance gives one that is at least as alike.
        mutual: Whether the other's match is this component.
    """

    component: str
    other: str
    similarity: float
    chance: float
    p: float
    mutual: bool


@dataclass(frozen=True, eq=False, repr=False)
class Matching:
    """How alike the components of two models are.

    Attributes:
        first: The first model's components, without constants.
        second: The second's.
        similarity: Of each with each; 0 for a component that does not vary.
        null_first: For each first component its highest similarity with any of the second, each time that chance was
            drawn.
        null_second: The same for each second component.
        measure: What similarity is.
        images: How many images were read of each model.
    """

    first: Components
    second: Components
    similarity: Float[Tensor, "first second"]
    null_first: Float[Tensor, "draw first"]
    null_second: Float[Tensor, "draw second"]
    measure: str
    images: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", as_components(self.first, self.similarity.shape[0]))
        object.__setattr__(self, "second", as_components(self.second, self.similarity.shape[1]))

    def flipped(self) -> "Matching":
        """The same with the second model first."""
        return Matching(
            first=self.second,
            second=self.first,
            similarity=self.similarity.T,
            null_first=self.null_second,
            null_second=self.null_first,
            measure=self.measure,
            images=(self.images[1], self.images[0]),
        )

    @cached_property
    def matches(self) -> tuple[Match, ...]:
        """The match of each first component, in their order. ``flipped().matches`` has those of the second."""
        best, found = self.similarity.max(1)
        mutual = self.similarity.argmax(0)[found] == torch.arange(len(found), device=found.device)
        numbers = (found, best, self.null_first.mean(0), self._p, mutual)
        return tuple(
            Match(component.label, self.second[other].label, *told)
            for component, other, *told in zip(self.first, *(column.tolist() for column in numbers), strict=True)
        )

    @cached_property
    def _p(self) -> Float[Tensor, "first"]:
        # The similarity found is one of those that chance could have given.
        as_much = 1 + (self.null_first >= self.similarity.amax(1)).sum(0)
        return as_much / self.null_first.new_tensor(1 + len(self.null_first))

    @property
    def mutual(self) -> tuple[Match, ...]:
        """The matches in which each is the other's."""
        return tuple(match for match in self.matches if match.mutual)

    @property
    def above_chance(self) -> tuple[Match, ...]:
        """The matches that are more than chance, of which no more than 5 % are expected to be false."""
        told = zip(self.matches, false_discovery(self._p).tolist(), strict=True)
        return tuple(match for match, rate in told if rate <= RATE)

    @property
    def mean(self) -> float:
        """How alike matches are, averaged over the components of both models."""
        return float(torch.cat([self.similarity.amax(1), self.similarity.amax(0)]).mean())

    @property
    def mean_chance(self) -> float:
        """The same by chance."""
        return float(torch.cat([self.null_first, self.null_second], 1).mean())

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, label: str) -> Match:
        return self.matches[position(positions_of(self.first), label)]

    def __repr__(self) -> str:
        return (
            f"Matching({len(self.first)} with {len(self.second)} components by {self.measure}: {self.mean:.3f}, by "
            f"chance {self.mean_chance:.3f}; {len(self.mutual)} mutual)"
        )


def matched(
    first: Decomposition,
    second: Decomposition,
    measure: str,
    compare: Callable[[int | None], Float[Tensor, "first second"]],
    draws: int,
) -> Matching:
    """Match components, and see how alike they are by chance.

    Args:
        first: The first model's.
        second: The second's.
        measure: What similarity is.
        compare: The similarity of each with each; with a number, one drawing of chance.
        draws: How many drawings.

    Raises:
        InputError: Where there are none.
    """
    if draws < 1:
        raise InputError(f"Expected chance to be drawn at least once; got {draws}.")
    similarity = compare(None)
    null = [compare(draw) for draw in range(draws)]
    return Matching(
        first=first.components,
        second=second.components,
        similarity=similarity,
        null_first=torch.stack([drawn.amax(1) for drawn in null]),
        null_second=torch.stack([drawn.amax(0) for drawn in null]),
        measure=measure,
        images=(first.values.shape[1], second.values.shape[1]),
    )
