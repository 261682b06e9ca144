"""Over how many components a feature is spread."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.interpret.comparing.inputs import refuse_parts, total_of, unvarying
from vitdecomp_lens.interpret.statistics import bootstrap_counts, interval
from vitdecomp_lens.selecting import Components, as_components

DRAWN = 2**24  # numbers that a piece of the resamples may make


def participation_ratio(scores: Float[Tensor, "component *feature"]) -> Float[Tensor, "*feature"]:
    """How many components carry a feature: 1 / Σ p², with each component's share p of all that is written for it.

    It is n where n components write the same, and 1 where a single one writes all. A score below 0 is of a component
    that writes against the feature. It counts as 0: shares are those among the components that carry the feature.

    Args:
        scores: Of each component; additive ones, such as covariances with the sum. One feature or several.

    Returns:
        NaN where no score is above 0.

    Example:
        >>> participation_ratio(torch.tensor([[1.0, 5.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, -1.0]])).round(decimals=3)
        tensor([3., 1., 2.])
    """
    carried = scores.clamp(min=0)
    return 1 / (carried / carried.sum(0)).square().sum(0)


@dataclass(frozen=True, eq=False, repr=False)
class Concentration:
    """How many components carry each feature in one model.

    Attributes:
        features: The features' names.
        components: What each row of the scores belongs to.
        scores: Covariance over images of what a component writes into a feature's subspace with what all write there.
            Where the components are all of the model's, their scores sum to the variance in that subspace.
        ratio: The participation ratio of the scores; NaN where nothing varies.
        low: Where its bootstrap interval over images begins.
        high: Where it ends.
        opposed: What is written against a feature, as a share of all that is written for it and against it. It has no
            part in the ratio.
        level: How much of the resamples lies in the interval.
        resamples: How often images were drawn again.
        images: How many there were.
    """

    features: tuple[str, ...]
    components: Components
    scores: Float[Tensor, "component feature"]
    ratio: Float[Tensor, "feature"]
    low: Float[Tensor, "feature"]
    high: Float[Tensor, "feature"]
    opposed: Float[Tensor, "feature"]
    level: float
    resamples: int
    images: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", as_components(self.components, len(self.scores)))

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, feature: str) -> float:
        if feature not in self.features:
            raise UnknownNameError(f"There is no feature {feature!r}; {near_matches(feature, self.features)}")
        return float(self.ratio[self.features.index(feature)])

    def told(self, feature: str) -> str:
        """A feature's ratio and its interval in words; a dash where nothing varies along it."""
        ratio, number = self[feature], self.features.index(feature)
        if math.isnan(ratio):
            return "–"
        return f"{ratio:.1f} [{float(self.low[number]):.1f}, {float(self.high[number]):.1f}]"

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {ratio:.1f}" for name, ratio in zip(self.features, self.ratio.tolist(), strict=True))
        return f"Concentration({told}; of {len(self.scores)} components, {self.images} images)"


@torch.no_grad()
def concentration(
    parts: Decomposition,
    features: Mapping[str, TextBank],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Concentration:
    """Over how many components each feature is spread, with a bootstrap interval over images.

    A component's score is the covariance over images of what it writes into the subspace of a feature's texts with
    what the whole model writes there, summed over the subspace. The ratio is the `participation_ratio` of the scores.

    Noise makes shares of components that write alike uneven, and so the ratio too low, near its largest value in all
    resamples: an interval does not reach n where n components write the same. Components that write nothing make it too
    high, as their noise counts where it is above 0. Both are small for some hundreds of images. Compare models on the
    same images; with the same seed, they are drawn alike.

    Args:
        parts: Contributions in the space of the texts, with their total, as ``parts.map(aligner)`` gives them.
        features: The texts of each feature.
        resamples: How often images are drawn again.
        level: Of the interval.
        seed: Of the drawing.

    Raises:
        InputError: Where there is no feature, contributions and texts are of different spaces, contributions have no
            total, NaN or Inf, there are fewer than two images, or an option is out of range.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_features
        >>> planted = planted_features(images=500, d_clip=8, components=10, features=1, noise=0.0)
        >>> cats = TextBank(["a cat"], planted.directions, space="planted")
        >>> found = concentration(planted.parts, {"cats": cats}, resamples=100)
        >>> round(found["cats"], 3) == round(float(participation_ratio(planted.weights)), 3)
        True
    """
    if not features:
        raise InputError("Expected at least one feature, as {name: TextBank}; got none.")
    if resamples < 1:
        raise InputError(f"Expected resamples= of at least 1, since intervals are from them; got {resamples}.")
    if not 0 < level < 1:
        raise InputError(f"Expected level= between 0 and 1; got {level}.")
    for bank in features.values():
        refuse_parts(parts, bank)
    total, images = total_of(parts).double(), parts.values.shape[1]
    weights = bootstrap_counts(images, resamples, seed).to(total) / images
    still = unvarying(parts.values)
    columns = [_scored(parts.values, total, bank, weights, still) for bank in features.values()]
    scores, samples = (torch.stack(several, -1) for several in zip(*columns, strict=True))
    low, high = interval(participation_ratio(samples.transpose(0, 1)), level=level)
    for_it, against = scores.clamp(min=0).sum(0), -scores.clamp(max=0).sum(0)
    return Concentration(
        features=tuple(features),
        components=parts.components,
        scores=scores,
        ratio=participation_ratio(scores),
        low=low,
        high=high,
        opposed=against / (for_it + against),
        level=level,
        resamples=resamples,
        images=images,
    )


def _scored(
    values: Float[Tensor, "component batch d_clip"],
    total: Float[Tensor, "batch d_clip"],
    bank: TextBank,
    weights: Float[Tensor, "resample batch"],
    still: Bool[Tensor, "component"],
) -> tuple[Float[Tensor, "component"], Float[Tensor, "resample component"]]:
    """Covariances with the total in the subspace of some texts: over all images, and over each resample."""
    basis = bank.subspace().to(total)
    # A component at a time, because in double precision all of them are large.
    written, whole = torch.stack([one.double() @ basis.T for one in values]), total @ basis.T
    # Around the mean of all images, so that each resample's own mean takes little off.
    written, whole = written - written.mean(1, keepdim=True), whole - whole.mean(0)
    written[still] = 0  # or rounding of constants would be a score
    products = einsum(written, whole, "component batch direction, batch direction -> batch component")
    size = max(1, DRAWN // (len(written) * len(basis)))
    drawn = [_covariances(some, products, written, whole) for some in weights.split(size)]
    return products.mean(0), torch.cat(drawn)


def _covariances(
    weights: Float[Tensor, "resample batch"],
    products: Float[Tensor, "batch component"],
    written: Float[Tensor, "component batch direction"],
    whole: Float[Tensor, "batch direction"],
) -> Float[Tensor, "resample component"]:
    means = einsum(weights, written, "resample batch, component batch direction -> resample component direction")
    of_means = einsum(means, weights @ whole, "resample component direction, resample direction -> resample component")
    return weights @ products - of_means
