"""What matching the components of two models gives, however they are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.statistics import false_discovery
from vitdecomp_lens.selecting import Components, as_components, position, positions_of

RATE = 0.05  # of false discoveries among the matches that are called more than chance
FEWEST = 200  # drawings of chance, where no number of them is given
OPERATIONS = 2**42  # that more drawings than these may take together


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
        similarity: Of each with each; 0 for a component that does not vary. Such a one is nobody's match.
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
        varying = _among_varying(self.similarity)
        best, found = self._best[0], varying.argmax(1)
        mutual = (varying.argmax(0)[found] == torch.arange(len(found), device=found.device)) & _varies(self.similarity)
        numbers = (found, best, self.null_first.mean(0), self._p, mutual)
        return tuple(
            Match(component.label, self.second[other].label, *told)
            for component, other, *told in zip(self.first, *(column.tolist() for column in numbers), strict=True)
        )

    @cached_property
    def _best(self) -> tuple[Float[Tensor, "first"], Float[Tensor, "second"]]:
        return _highest(self.similarity), _highest(self.similarity.T)

    @cached_property
    def _p(self) -> Float[Tensor, "first"]:
        # The similarity found is one of those that chance could have given.
        as_much = 1 + (self.null_first >= self._best[0]).sum(0)
        return as_much / self.null_first.new_tensor(1 + len(self.null_first))

    @property
    def mutual(self) -> tuple[Match, ...]:
        """The matches in which each is the other's."""
        return tuple(match for match in self.matches if match.mutual)

    @property
    def above_chance(self) -> tuple[Match, ...]:
        """The matches that are more than chance, of which no more than 5 % are expected to be false.

        A p-value is never below 1 / (draws + 1). So k of n components can be found together only where chance was drawn
        20 n / k times: with 200 draws a single one among up to 10, and a tenth of any number.
        """
        told = zip(self.matches, false_discovery(self._p).tolist(), strict=True)
        return tuple(match for match, rate in told if rate <= RATE)

    @property
    def mean(self) -> float:
        """How alike matches are, averaged over the components of both models that vary; NaN where none does."""
        kept = (_varies(self.similarity), _varies(self.similarity.T))
        return float(torch.cat([best[varies] for best, varies in zip(self._best, kept, strict=True)]).mean())

    @property
    def mean_chance(self) -> float:
        """The same by chance."""
        kept = torch.cat([_varies(self.similarity), _varies(self.similarity.T)])
        return float(torch.cat([self.null_first, self.null_second], 1)[:, kept].mean())

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, label: str) -> Match:
        return self.matches[position(positions_of(self.first), label)]

    def __repr__(self) -> str:
        return (
            f"Matching({len(self.first)} with {len(self.second)} components by {self.measure}: {self.mean:.3f}, by "
            f"chance {self.mean_chance:.3f}; {len(self.mutual)} mutual)"
        )


def _varies(similarity: Float[Tensor, "row other"]) -> Bool[Tensor, "row"]:
    """Which rows are of components that vary: the others are like no other at all."""
    return (similarity != 0).any(1)


def _among_varying(similarity: Float[Tensor, "row other"]) -> Float[Tensor, "row other"]:
    """The same, with no similarity at all where one of the two does not vary."""
    both = _varies(similarity)[:, None] & _varies(similarity.T)
    return similarity.masked_fill(~both, -torch.inf)


def _highest(similarity: Float[Tensor, "row other"]) -> Float[Tensor, "row"]:
    """Of each row with any that varies; 0 for a row that does not."""
    return _among_varying(similarity).amax(1).where(_varies(similarity), 0)


def refuse_draws(draws: int | None, option: str) -> None:
    """Refuse a number of drawings that is none.

    Raises:
        InputError: Then.
    """
    if draws is not None and draws < 1:
        raise InputError(f"Expected {option}= of at least 1, which is how often chance is drawn; got {draws}.")


def draws_for(components: int, each: int) -> int:
    """How often chance is drawn where nobody says.

    As often as lets a single component be found among all at a rate of false discoveries of 5 %, as far as
    `OPERATIONS` reach; `FEWEST` times at least.

    Args:
        components: How many the model has that has more.
        each: How many operations a drawing takes.
    """
    return max(FEWEST, min(round(components / RATE), OPERATIONS // max(1, each)))


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
    """
    similarity = compare(None)
    rows, columns = _varies(similarity), _varies(similarity.T)
    null = [compare(draw).where(rows[:, None] & columns, -torch.inf) for draw in range(draws)]
    return Matching(
        first=first.components,
        second=second.components,
        similarity=similarity,
        null_first=torch.stack([drawn.amax(1).where(rows, 0) for drawn in null]),
        null_second=torch.stack([drawn.amax(0).where(columns, 0) for drawn in null]),
        measure=measure,
        images=(first.values.shape[1], second.values.shape[1]),
    )
