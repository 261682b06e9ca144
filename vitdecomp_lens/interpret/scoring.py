"""How components are scored for features: project first, then resample what is left, a few numbers an image.

`vitdecomp_lens.interpret.features` says what the scores are.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import CapacityError, InputError
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.interpret.feature_scores import BY, FeatureScores
from vitdecomp_lens.interpret.readings import refuse_other_space
from vitdecomp_lens.interpret.statistics import bootstrap_counts, interval, permutations

__all__ = ["Parts", "Request", "refuse_features", "scored"]

LEAST = 4  # images: fewer have not the 20 orders that a test at 5 % takes
WORKING = 2**27  # bytes that projecting and resampling work in at a time
# Relative to the length of a component's values, deviations smaller than so many steps of rounding are nothing.
ROUNDING = 16
CIRCLES = 4096  # orders that are looked at together, where there are no more images than that
# Orders where no number of them is given: so many, or as many a component as let a single one be found among all at a
# rate of false discoveries of 5 %. Cost is components times orders, hence at most so many.
FEWEST_ORDERS, ORDERS_EACH, MOST_ORDERS = 1000, 20, 2**16
TIED = 256  # steps of rounding within which two scores are one
Parts = Decomposition | Iterable[Decomposition]


# ---- what cannot be scored


def refuse_features(features: Mapping[str, TextBank]) -> None:
    """Refuse what are no features, or are of different spaces."""
    if not isinstance(features, Mapping) or not features:
        got = f"a {type(features).__name__}" if features else "none"
        raise InputError(f"Expected at least one feature, as {{'colour': bank.select([...])}}; got {got}.")
    for name, bank in features.items():
        if not isinstance(bank, TextBank):
            raise InputError(f"Expected a TextBank for each feature; that of {name!r} is a {type(bank).__name__}.")
    first = next(iter(features.values()))
    for name, bank in features.items():
        if (bank.space, bank.directions.shape[1]) != (first.space, first.directions.shape[1]):
            raise InputError(
                f"Expected features of one space; {next(iter(features))!r} is of {first.space!r}, {name!r} of "
                f"{bank.space!r}. Embed all texts with the same model."
            )


@dataclass(frozen=True)
class Request:
    """What is scored, and how. A basis for each feature, as rows."""

    features: tuple[str, ...]
    bases: list[Float[Tensor, "_ d_clip"]]
    bank: TextBank  # one of those that the bases are of
    bootstrap: int
    permutations: int | None
    level: float
    seed: int
    max_bytes: int

    def __post_init__(self) -> None:
        for name in ("bootstrap", "permutations"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"Expected {name}= of at least 0; got {value}.")
        if not 0 < self.level < 1:
            raise InputError(f"Expected level= between 0 and 1; got {self.level}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """The dimension of each feature's subspace."""
        return tuple(len(basis) for basis in self.bases)

    def orders(self, components: int) -> int:
        """How many orders p-values are from, at least."""
        if self.permutations is not None:
            return self.permutations
        return max(FEWEST_ORDERS, min(ORDERS_EACH * components, MOST_ORDERS))

    def groups(self, one: int) -> Iterator["Request"]:
        """The same for some of the features at a time; ``one`` is how many bytes a direction takes."""
        most = max(1, self.max_bytes // max(1, one))
        start, width = 0, 0
        for number, more in enumerate(self.widths):
            if width + more > most and number > start:
                yield self._some(slice(start, number))
                start, width = number, 0
            width += more
        yield self._some(slice(start, None))

    def _some(self, which: slice) -> "Request":
        return replace(self, features=self.features[which], bases=self.bases[which])


def _refuse_parts(parts: Decomposition, request: Request) -> None:
    if not isinstance(parts, Decomposition):
        raise InputError(f"Expected a Decomposition, or several; got {type(parts).__name__}.")
    if not len(parts):
        raise InputError("Expected at least one component to score; the decomposition has none.")
    refuse_other_space(parts.metadata, request.bank)
    width, d_clip = parts.values.shape[-1], request.bases[0].shape[1]
    if width != d_clip:
        raise InputError(
            f"Expected contributions and texts of one space; the contributions have {width} dimensions, the texts of "
            f"{request.bank.space!r} {d_clip}. Take them there with parts.map(aligner) first."
        )
    if not parts.complete and parts.total is None:
        raise InputError(
            "Expected a total, or all components: what a component writes is compared with the whole. Select from a "
            "decomposition that has a total."
        )


def refuse_few(images: int) -> None:
    if images < LEAST:
        raise InputError(
            f"Expected at least {LEAST} images, since scores are correlations over images; got {images}. "
            f"Decomposition.cat([...]) joins batches; some hundreds give useful intervals."
        )


# ---- what components write along the features


@dataclass(frozen=True)
class _Written:
    """What components and the whole have along the basis vectors of all features, over images.

    Attributes:
        components: The components.
        own: What each of them writes; centred over images, and zero where it does not vary.
        whole: What the whole has; centred too.
        spread: The variance of each component along all dimensions.
    """

    components: tuple[Component, ...]
    own: Float[Tensor, "component direction image"]
    whole: Float[Tensor, "direction image"]
    spread: Float[Tensor, "component"]


class _Projecting:
    """Projects batches, one after the other.

    The first image is taken off all others before: of a component that does not vary nothing is left then, however
    long it is, and of one that varies little around a large mean the rounding is as small.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.first: Decomposition | None = None
        self.images = 0
        self.own: list[Tensor] = []
        self.whole: list[Tensor] = []

    def _start(self, parts: Decomposition) -> None:
        self.first = parts.images(slice(0, 1))
        self.dtype = accumulator(parts.values.dtype)
        self.origin = self.first.values.detach().to(self.dtype)
        self.basis = torch.cat(self.request.bases).detach().to(self.origin)
        self.sums = self.origin.new_zeros(len(parts), parts.values.shape[-1], dtype=torch.float64)
        self.squares = self.sums.new_zeros(len(parts))
        self.lengths = self.sums.new_zeros(len(parts))
        self.length_of_total = 0.0

    def add(self, parts: Decomposition) -> None:
        """Take in a batch."""
        _refuse_parts(parts, self.request)
        if not parts.values.shape[1]:
            return
        if self.first is None:
            self._start(parts)
        assert self.first is not None
        self.first._refuse_other(parts, number=len(self.own))
        self.images += parts.values.shape[1]
        self._refuse_large(len(parts))
        size = max(1, WORKING // (parts.values[:, 0].numel() * self.dtype.itemsize))
        for block in parts.values.detach().split(size, dim=1):
            self._project(block.to(self.dtype), parts.labels)
        if not self.first.complete:
            self._project_total(parts.total)

    def _refuse_large(self, components: int) -> None:
        needed = components * self.images * len(self.basis) * self.dtype.itemsize
        if needed > self.request.max_bytes:
            raise CapacityError(
                f"What {components} components write for {self.images:,} images along {len(self.basis)} directions "
                f"takes {needed:,} bytes, more than max_bytes={self.request.max_bytes:,} allows. Raise max_bytes=, or "
                f"score fewer components, features or images."
            )

    def _project(self, values: Float[Tensor, "component block d_clip"], labels: tuple[str, ...]) -> None:
        self.lengths += values.square().sum((1, 2), dtype=torch.float64)
        finite = self.lengths.isfinite().tolist()
        if not all(finite):
            label = labels[finite.index(False)]
            raise InputError(
                f"Expected finite contributions; those of {label!r} have NaN or Inf, or are too large to be squared. "
                f"Look at the images with parts[{label!r}]."
            )
        shifted = values - self.origin
        self.sums += shifted.sum(1, dtype=torch.float64)
        self.squares += shifted.square().sum((1, 2), dtype=torch.float64)
        self.own.append((shifted @ self.basis.T).mT)

    def _project_total(self, total: Float[Tensor, "batch d_clip"] | None) -> None:
        assert total is not None
        assert self.first is not None
        assert self.first.total is not None
        wide = total.detach().double()
        if not bool(wide.isfinite().all()):
            raise InputError("Expected a finite total; it has NaN or Inf. Look at the images with parts.total.")
        self.length_of_total += float(wide.square().sum())
        self.whole.append((wide - self.first.total.double()) @ self.basis.double().T)

    def written(self) -> _Written:
        """All batches together."""
        refuse_few(self.images)
        assert self.first is not None
        own = torch.cat(self.own, -1)
        self.own.clear()
        rounding = max(ROUNDING * torch.finfo(self.dtype).eps, torch.finfo(self.first.values.dtype).eps)
        own -= own.mean(-1, keepdim=True, dtype=torch.float64).to(own)
        least = rounding * (self.lengths / self.images).sqrt()
        varies = _deviations(own) > least[:, None]
        own *= varies[..., None]
        if self.first.complete:
            whole, size = own.sum(0, dtype=torch.float64), _deviations(own).square().sum(0).sqrt()
        else:
            whole, size = torch.cat(self.whole).T, torch.tensor(self.length_of_total / self.images).sqrt()
        whole = whole - whole.mean(-1, keepdim=True)
        whole = whole * (_deviations(whole) > rounding * size.to(whole))[:, None]
        spread = self.squares / self.images - (self.sums / self.images).square().sum(1)
        spread = spread.where(spread > least.square(), 0)
        return _Written(tuple(self.first.components), own, whole.to(own), spread)


def _deviations(centred: Float[Tensor, "*axes image"]) -> Float[Tensor, "*axes"]:
    """Standard deviations of what has a mean of 0."""
    return torch.linalg.vector_norm(centred, dim=-1, dtype=torch.float64) / centred.shape[-1] ** 0.5


# ---- scores, and how sure they are


@torch.no_grad()
def scored(parts: Parts, request: Request) -> FeatureScores:
    """The scores that were asked for; of a decomposition, some features at a time where memory is short."""
    if not isinstance(parts, Decomposition):
        return _of_batches(parts, request)
    _refuse_parts(parts, request)
    refuse_few(parts.values.shape[1])
    one = parts.values[..., 0].numel() * accumulator(parts.values.dtype).itemsize
    return _together([_of_batches([parts], group) for group in request.groups(one)], request)


def _together(found: list[FeatureScores], request: Request) -> FeatureScores:
    """The scores of some features each, as one."""
    names = [f.name for f in fields(FeatureScores) if f.name not in ("components", "spread")]
    several = [name for name in names if isinstance(getattr(found[0], name), Tensor)]
    joined: dict[str, Any] = {name: torch.cat([getattr(one, name) for one in found], -1) for name in several}
    return replace(found[0], features=request.features, widths=request.widths, **joined)


def _of_batches(batches: Iterable[Decomposition], request: Request) -> FeatureScores:
    projecting = _Projecting(request)
    for batch in batches:
        projecting.add(batch)
    written = projecting.written()
    scoring = _Scoring(written, request)
    pieces = [scoring.piece(own) for own in written.own.split(scoring.size)]
    joined: dict[str, Any] = {
        name: None if value is None else torch.cat([piece[name] for piece in pieces], -2).to(written.own)
        for name, value in pieces[0].items()
    }
    return FeatureScores(
        components=written.components,
        features=request.features,
        total=scoring.total.to(written.own),
        spread=written.spread.to(written.own),
        widths=request.widths,
        space=request.bank.space,
        images=written.whole.shape[-1],
        resamples=request.bootstrap,
        orders=scoring.orders.numel(),
        level=request.level,
        **joined,
    )


class _Scoring:
    """Scores components, some at a time, from what they write along the features."""

    def __init__(self, written: _Written, request: Request) -> None:
        self.request, self.whole = request, written.whole
        direction, self.images = written.whole.shape
        widths = torch.tensor(request.widths)
        owner = torch.arange(len(widths)).repeat_interleave(widths)
        self.sums = torch.nn.functional.one_hot(owner, len(widths)).to(written.own)
        self.means = self.sums / self.sums.sum(0)
        self.deviations = _deviations(written.whole)
        self.total = self.deviations.square() @ self.sums.double()
        counts = bootstrap_counts(self.images, request.bootstrap, request.seed)
        self.weights = counts.to(written.own) / self.images
        blocks = -(-request.orders(len(written.components)) // self.images)
        self.orders = permutations(self.images, blocks, request.seed).to(written.own.device)
        # About so many tensors are there at once, of double the size where they are complex or in double precision.
        row = (
            direction * (6 * request.bootstrap + 12 * max(self.images, CIRCLES)) + 4 * len(widths) * self.orders.numel()
        )
        self.size = max(1, WORKING // (row * written.own.element_size()))

    def piece(self, own: Float[Tensor, "row direction image"]) -> dict[str, Any]:
        """The fields of `FeatureScores` that have a component axis, for some components."""
        deviations = _deviations(own)
        covariances = einsum(own.double(), self.whole.double(), "row direction image, direction image -> row direction")
        covariances /= self.images
        correlations = _ratio(covariances, deviations * self.deviations)
        found = {
            "correlation": correlations.clamp(-1, 1) @ self.means.double(),
            "covariance": covariances @ self.sums.double(),
            "variance": deviations.square() @ self.sums.double(),
        }
        ends = self._intervals(own, deviations) if self.request.bootstrap else (None, None)
        p, chance = self._p_values(own, deviations) if len(self.orders) else ((None, None), (None, None))
        return {**found, **_named("interval", ends), **_named("p", p), **_named("chance", chance)}

    def _intervals(
        self, own: Float[Tensor, "row direction image"], deviations: Float[Tensor, "row direction"]
    ) -> tuple[Float[Tensor, "2 row feature"], Float[Tensor, "2 row feature"]]:
        """Of correlations and covariances: weighted means of values, squares and products, as products of matrices."""
        # Scaled, so that single precision does: scores do not depend on it.
        own, whole = _ratio(own, deviations[..., None]), _ratio(self.whole, self.deviations[:, None])
        mean, mean_whole = self._resampled(own), self._resampled(whole)[:, None]
        covariances = self._resampled(own * whole) - mean * mean_whole
        variances = self._resampled(own.square()) - mean.square()
        variances_whole = self._resampled(whole.square())[:, None] - mean_whole.square()
        # A resample may lack every image in which a value differs from the others.
        rounding = ROUNDING * torch.finfo(own.dtype).eps
        lengths = (
            variances.where(variances > rounding, 0) * variances_whole.where(variances_whole > rounding, 0)
        ).sqrt()
        correlations = _ratio(covariances, lengths).clamp(-1, 1)
        covariances = covariances * (deviations * self.deviations).to(own)
        samples = (correlations @ self.means, covariances @ self.sums)
        first, second = (torch.stack(interval(one, self.request.level)) for one in samples)
        return first, second

    def _resampled(self, values: Float[Tensor, "*rows image"]) -> Float[Tensor, "resample *rows"]:
        return torch.tensordot(self.weights, values, dims=([1], [values.ndim - 1]))

    def _p_values(
        self, own: Float[Tensor, "row direction image"], deviations: Float[Tensor, "row direction"]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of correlations and covariances, and what these are on average, each ``[row, feature]``.

        The whole is the component and the rest. With the component's images in another order, its covariance with that
        whole is its variance plus its covariance with the rest, and that is all that depends on the order. In every
        order drawn, images are also shifted in a circle by each number of places, which one Fourier transform does for
        all of them. The true order is one of a random circle's, so that it is one of all these at random if order means
        nothing, however few images there are: the share of those at least as far out is an exact p-value.
        """
        rest = self.whole - own
        scale = (deviations.square() + _deviations(rest).square()).sqrt()
        own, rest = _ratio(own, scale[..., None]), _ratio(rest, scale[..., None])
        alone, without = _deviations(own).square()[..., None], _deviations(rest).square()[..., None]
        waves = torch.fft.rfft(rest[..., self.orders[0]]).conj()[..., None, :]
        by_order: tuple[list[Tensor], list[Tensor]] = ([], [])
        for orders in self.orders.split(max(1, CIRCLES // self.images)):
            both = torch.fft.irfft(torch.fft.rfft(own[..., orders]) * waves, n=self.images).flatten(2) / self.images
            covariances = alone.to(both) + both
            lengths = (alone * (alone + without)).to(both) + 2 * alone.to(both) * both
            correlations = _ratio(covariances, lengths.clamp(min=0).sqrt())
            by_order[0].append(_by_feature(correlations, self.means))
            by_order[1].append(_by_feature(covariances * scale.square()[..., None].to(both), self.sums))
        tied = TIED * torch.finfo(own.dtype).eps
        sizes = (self.means.new_ones(()), (scale.square() @ self.sums.double())[..., None])
        found = [_as_far(torch.cat(d, -1), tied * size) for d, size in zip(by_order, sizes, strict=True)]
        p, chance = zip(*found, strict=True)
        return (p[0], p[1]), (chance[0], chance[1])


def _named(what: str, pair: tuple[Tensor | None, Tensor | None]) -> dict[str, Tensor | None]:
    return {f"{name}_{what}": value for name, value in zip(BY, pair, strict=True)}


def _by_feature(
    values: Float[Tensor, "row direction order"], weights: Float[Tensor, "direction feature"]
) -> Float[Tensor, "row feature order"]:
    return einsum(values, weights, "row direction order, direction feature -> row feature order")


def _as_far(
    scores: Float[Tensor, "row feature order"], tied: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "row feature"], Float[Tensor, "row feature"]]:
    """The share of orders whose score is as far from their mean as the first, which is the true one; and the mean."""
    mean = scores.mean(-1, keepdim=True, dtype=torch.float64)
    far = (scores - mean.to(scores)).abs()
    return (far >= far[..., :1] - tied.to(far)).double().mean(-1), mean[..., 0]


def _ratio(values: Tensor, sizes: Tensor) -> Tensor:
    """Values divided by sizes; 0 where a size is 0."""
    return torch.where(sizes > 0, values / sizes.to(values), 0)
