"""What scoring components for features gives: the scores, how sure they are, and who scores highest.

`vitdecomp_lens.interpret.features` makes them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens import storage
from vitdecomp_lens.components import Component
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.interpret.statistics import false_discovery
from vitdecomp_lens.selecting import Components, Names, as_components, position, positions_of, summary

__all__ = ["BY", "LEVEL", "SIDES", "FeatureScore", "FeatureScores", "Side", "TextNull"]

Side = Literal["both", "above", "below"]
LEVEL = 0.95
BY = ("correlation", "covariance")
SIDES: tuple[str, ...] = get_args(Side)


@dataclass(frozen=True)
class FeatureScore:
    """One component's score for one feature: the value, the ends of its interval, and its p-value."""

    value: float
    low: float | None
    high: float | None
    p: float | None

    def __str__(self) -> str:
        ends = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{ends}{'' if self.p is None else f', p = {self.p:.2g}'}"


@dataclass(frozen=True, eq=False, repr=False)
class FeatureScores:
    """The score of every component for every feature.

    Attributes:
        components: What each row belongs to.
        features: The features' names.
        correlation: The mean over the basis of a feature's subspace of the correlation over images of component and
            whole; from -1 to 1.
        covariance: Their covariance, summed over the basis. Over all components it sums to ``total``.
        variance: The component's own variance within the subspace.
        total: The variance of the whole within the subspace.
        spread: The variance of a component along all dimensions.
        correlation_interval: Lower and upper ends, by resampling images; None where that was not asked for.
        covariance_interval: The same for covariances.
        correlation_p: How often chance does as much, the component's images being in another order; None where that
            was not asked for.
        covariance_p: The same for covariances.
        widths: The dimension of each feature's subspace.
        space: The space of texts and components.
        images: How many images there were.
        resamples: How many resamples the intervals are from.
        orders: How many orders of the images the p-values are from.
        level: Of the intervals.
        correlation_chance: What chance gives on average, as p-values see it: the mean over orders. It is not 0, because
            a component is a part of the whole. None where there are no p-values.
        covariance_chance: The same for covariances.
    """

    components: Components
    features: tuple[str, ...]
    correlation: Float[Tensor, "component feature"]
    covariance: Float[Tensor, "component feature"]
    variance: Float[Tensor, "component feature"]
    total: Float[Tensor, "feature"]
    spread: Float[Tensor, "component"]
    correlation_interval: Float[Tensor, "2 component feature"] | None
    covariance_interval: Float[Tensor, "2 component feature"] | None
    correlation_p: Float[Tensor, "component feature"] | None
    covariance_p: Float[Tensor, "component feature"] | None
    widths: tuple[int, ...]
    space: str
    images: int
    resamples: int
    orders: int
    level: float = LEVEL
    correlation_chance: Float[Tensor, "component feature"] | None = None
    covariance_chance: Float[Tensor, "component feature"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", as_components(self.components, len(self.correlation)))

    # ---- looking

    @cached_property
    def _positions(self) -> dict[str, int]:
        return positions_of(self.components)

    @property
    def labels(self) -> tuple[str, ...]:
        """The components' labels, in the order of the rows."""
        return tuple(self._positions)

    @property
    def rest(self) -> Float[Tensor, "feature"]:
        """The variance of the whole that no component here accounts for: total minus all covariances."""
        return self.total - self.covariance.sum(0)

    def __len__(self) -> int:
        return len(self.components)

    def __repr__(self) -> str:
        component, feature = self.correlation.shape
        sure = [f"{self.resamples} resamples"] if self.correlation_interval is not None else []
        sure += [f"{self.orders} orders"] if self.correlation_p is not None else []
        return (
            f"FeatureScores({component=}, {feature=}: {summary(self.components)}; {self.space!r}, {self.images} "
            f"images, {', '.join(sure) or 'no intervals'})"
        )

    def score(self, label: str | Component, feature: str, *, by: str = "correlation") -> FeatureScore:
        """One component's score for one feature, with its interval and p-value.

        Args:
            label: The component.
            feature: The feature.
            by: ``"correlation"`` or ``"covariance"``.

        Raises:
            UnknownNameError: Where there is no such component or feature.
        """
        row, column = position(self._positions, label), self._column(feature)
        values, ends, p = self._by(by), getattr(self, f"{by}_interval"), getattr(self, f"{by}_p")
        low, high = (None, None) if ends is None else ends[:, row, column].tolist()
        return FeatureScore(float(values[row, column]), low, high, None if p is None else float(p[row, column]))

    def top(self, feature: str, k: int = 10, *, by: str = "correlation") -> tuple[tuple[str, float], ...]:
        """The components that score highest for a feature.

        Args:
            feature: Its name.
            k: How many at most.
            by: ``"correlation"`` or ``"covariance"``.

        Returns:
            Labels and scores, highest first; of equal ones the first component first.

        Raises:
            UnknownNameError: Where there is no such feature.
            InputError: Where k is below 1.
        """
        return _highest(self._by(by)[:, self._column(feature)], self.labels, k)

    def top_features(
        self, label: str | Component, k: int = 10, *, by: str = "correlation"
    ) -> tuple[tuple[str, float], ...]:
        """The features for which a component scores highest; like `top`, read the other way."""
        return _highest(self._by(by)[position(self._positions, label)], self.features, k)

    def margins(
        self, feature: str, *, against: Names | None = None, by: str = "correlation"
    ) -> Float[Tensor, "component"]:
        """By how much each component scores higher for a feature than for any of the others.

        That is the smallest of s(feature) − s(other) over the others. For a part of the features only, a component
        may well score high for the rest.

        Args:
            feature: The one.
            against: The others; None for all.
            by: ``"correlation"`` or ``"covariance"``. Covariances are in units of the features' variances, which
                differ.

        Raises:
            UnknownNameError: Where there is no such feature.
            InputError: Where there are no others, or the feature is one of them.
        """
        against = [other for other in self.features if other != feature] if against is None else against
        against = [against] if isinstance(against, str) else list(against)
        others = [self._column(name) for name in against]
        column = self._column(feature)
        if not others or column in others:
            raise InputError(
                f"Expected other features than {feature!r} to hold it against; got {against!r}. Score several "
                f"features together, or rank by one alone with top({feature!r})."
            )
        values = self._by(by)
        return values[:, column] - values[:, others].amax(1)

    def select(
        self, feature: str, *, against: Names | None = None, k: int = 10, by: str = "correlation"
    ) -> tuple[str, ...]:
        """The components that are for one feature and not for others: those of the largest `margins`.

        The paper retrieves images by what these components write, ``parts.select(labels=scores.select("colour"))``,
        and ablates those it finds by ``select("spurious", against="core")``.

        Args:
            feature: The one.
            against: The others; None for all.
            k: How many components at most.
            by: ``"correlation"`` or ``"covariance"``.

        Returns:
            Labels, of the largest margin first.

        Raises:
            UnknownNameError: Where there is no such feature.
            InputError: Where there are no others, the feature is one of them, or k is below 1.
        """
        return tuple(label for label, _ in _highest(self.margins(feature, against=against, by=by), self.labels, k))

    def significant(
        self, feature: str, *, rate: float = 0.05, by: str = "correlation", side: Side = "both"
    ) -> tuple[str, ...]:
        """The components whose score is no chance, at a rate of false discoveries over all components.

        A p-value is never below 1 / ``orders``. So k of n components can be found together only where ``orders`` is at
        least n / (rate · k): with 1,000 orders, at a rate of .05, a single component among up to 50. Score with
        ``permutations=None``, the default, for as many orders as it takes to find a single one.

        Args:
            feature: Its name.
            rate: How many of those found may be expected to be false, as a share.
            by: ``"correlation"`` or ``"covariance"``.
            side: ``"above"`` for those that score higher than chance does on average, which write the feature where
                others do; ``"below"`` for those that score lower, which write against the others; ``"both"``. The rate
                is that of both together.

        Returns:
            Labels, of the highest score first.

        Raises:
            UnknownNameError: Where there is no such feature.
            InputError: Where there are no p-values.
        """
        column = self._column(feature)
        values, p, chance = self._by(by)[:, column], getattr(self, f"{by}_p"), getattr(self, f"{by}_chance")
        if side not in SIDES:
            raise InputError(f"Expected side= as one of {', '.join(map(repr, SIDES))}; got {side!r}.")
        if p is None or (chance is None and side != "both"):
            what = "p-values" if p is None else "what chance gives on average"
            raise InputError(f"Expected {what}; these scores have none. Score with permutations= above 0.")
        found = false_discovery(p[:, column]) <= rate
        if side != "both":
            found &= values > chance[:, column] if side == "above" else values < chance[:, column]
        return tuple(self.labels[row] for row in values.argsort(descending=True, stable=True).tolist() if found[row])

    def _by(self, by: str) -> Float[Tensor, "component feature"]:
        if by not in BY:
            raise InputError(f"Expected by='correlation' or by='covariance'; got by={by!r}.")
        found: Tensor = getattr(self, by)
        return found

    def _column(self, feature: str) -> int:
        if feature not in self.features:
            raise UnknownNameError(f"There is no feature {feature!r}; {near_matches(feature, self.features)}")
        return self.features.index(feature)

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all.

        Raises:
            StoreError: Where the file cannot be written.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "components"}
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        header = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
        header["components"] = storage.pack_components(self.components)
        storage.write(path, kind="FeatureScores", tensors=tensors, header=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FeatureScores":
        """Read what `save` wrote, onto the CPU. Nothing is unpickled.

        Raises:
            StoreError: Where the file is missing, damaged, half-written, or holds something else.
        """
        tensors, header = storage.read(path, kind="FeatureScores", needs=("correlation", "covariance"))
        with storage.restoring(path, kind="FeatureScores"):
            own: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in header.items()
            }
            own["components"] = storage.unpack_components(header["components"])
            return cls(**{**own, **tensors})


def _highest(values: Float[Tensor, "row"], names: Sequence[str], k: int) -> tuple[tuple[str, float], ...]:
    if k < 1:
        raise InputError(f"Expected k= of at least 1; got {k}.")
    order = values.argsort(descending=True, stable=True)[:k].tolist()
    return tuple((names[row], float(values[row])) for row in order)


@dataclass(frozen=True, eq=False, repr=False)
class TextNull:
    """How features score beside as many texts drawn at random.

    Attributes:
        components: What each row belongs to.
        features: The features' names.
        correlation: The scores of the random texts, as in `FeatureScores`.
        covariance: The same.
        correlation_p: The share of random texts that score at least as high as the feature's own, the feature being
            one of them.
        covariance_p: The same.
    """

    components: Components
    features: tuple[str, ...]
    correlation: Float[Tensor, "draw component feature"]
    covariance: Float[Tensor, "draw component feature"]
    correlation_p: Float[Tensor, "component feature"]
    covariance_p: Float[Tensor, "component feature"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", as_components(self.components, len(self.correlation_p)))

    @property
    def labels(self) -> tuple[str, ...]:
        """The components' labels, in the order of the rows."""
        return tuple(component.label for component in self.components)

    def __repr__(self) -> str:
        draw, component, feature = self.correlation.shape
        return f"TextNull({draw=}, {component=}, {feature=}: {summary(self.components)})"
