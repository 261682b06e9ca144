"""Components of which the vectors are known: their maps, the features that they write, the texts that span them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.testbed.planted.basics import (
    complete,
    expect,
    expect_sizes,
    generator,
    heads_of,
    normal,
    orthonormal,
    uniform,
)


@dataclass(frozen=True, eq=False)
class PlantedMaps:
    """Components and targets in another space, with the maps that lead there. It is an aligner: ``parts.map(it)``.

    Attributes:
        parts: Complete. Each component lies in a span of its own, with a mean and a falling spectrum.
        targets: The sum of all components, each through its map, and noise.
        spans: For each component an orthonormal basis of its span.
        reached: What the maps take these bases to; orthonormal too.
    """

    parts: Decomposition
    targets: Float[Tensor, "batch d_clip"]
    spans: Float[Tensor, "component d_rep d_head"]
    reached: Float[Tensor, "component d_clip d_head"]

    @property
    def components(self) -> tuple[Component, ...]:
        """Which component each map is for."""
        return tuple(self.parts.components)

    @cached_property
    def maps(self) -> Float[Tensor, "component d_rep d_clip"]:
        """Each keeps lengths and angles on its component's span, and takes the rest to zero."""
        return self.spans @ self.reached.mT

    @property
    def bias(self) -> Float[Tensor, "d_clip"]:
        """Zero."""
        return torch.zeros_like(self.targets[0])


def planted_maps(
    *,
    images: int,
    d_rep: int,
    d_clip: int,
    components: int = 12,
    d_head: int = 8,
    noise: float = 0.0,
    seed: int = 0,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PlantedMaps:
    """Components whose sum, each through a map that is an isometry on its span, is the target.

    Components vary independently of each other and along all of their span, so that without noise, from more than
    ``components * d_head`` images, least squares finds the maps (the smallest ones: zero off the spans).

    Args:
        images: How many.
        d_rep: Width of the representation; below, equal to or above ``d_clip``.
        d_clip: Width of the space of the targets.
        components: How many.
        d_head: Width of the components' spans.
        noise: Standard deviation of the noise, in units of that of the targets without it.
        seed: Another truth.
        draw: Other images of the same truth.
        dtype: Of all that is returned.

    Raises:
        InputError: Where a size is no size, or a span does not fit into one of the spaces.

    Example:
        >>> planted = planted_maps(images=3, d_rep=16, d_clip=12, dtype=torch.float64)
        >>> torch.allclose(planted.parts.map(planted).total, planted.targets)
        True
    """
    expect_sizes(images=images, d_rep=d_rep, d_clip=d_clip, components=components)
    expect("d_head", d_head, 1, min(d_rep, d_clip))
    expect("noise", noise, 0)
    truth, chance = generator(seed), generator(seed, draw)
    spans, reached = (orthonormal(truth, components, width, d_head) for width in (d_rep, d_clip))
    scales = torch.exp(2 * uniform(truth, components, 1) - 1)
    means = scales * normal(truth, components, d_head) / 2
    deviations = scales * torch.arange(1.0, d_head + 1) ** -0.7
    values = torch.empty(components, images, d_rep, dtype=dtype)
    total, targets = (torch.zeros(images, width, dtype=torch.float64) for width in (d_rep, d_clip))
    for row in range(components):  # one by one: in float64, all of them at once would be most of the memory
        codes = means[row] + deviations[row] * normal(chance, images, d_head)
        vectors = codes @ spans[row].T
        values[row] = vectors
        total += vectors
        targets += codes @ reached[row].T
    targets += noise * math.sqrt(float(deviations.square().sum()) / d_clip) * normal(chance, images, d_clip)
    parts = Decomposition(values, heads_of(components), total.to(dtype))
    return PlantedMaps(parts, targets.to(dtype), spans.to(dtype), reached.to(dtype))


@dataclass(frozen=True, eq=False)
class PlantedFeatures:
    """Components in the space of texts that write known amounts of known features.

    Attributes:
        parts: Complete.
        directions: Of the features; orthonormal.
        weights: How much of a feature a component writes: from 0.25 to 1.25, or 0 as for more than half.
        factors: How much of a feature an image has.
        scores: What the correlation over images of a component with the sum, both along a feature's direction,
            comes to with ever more images.
    """

    parts: Decomposition
    directions: Float[Tensor, "feature d_clip"]
    weights: Float[Tensor, "component feature"]
    factors: Float[Tensor, "batch feature"]
    scores: Float[Tensor, "component feature"]


def planted_features(
    *,
    images: int,
    d_clip: int,
    components: int = 20,
    features: int = 6,
    noise: float = 0.3,
    sparse: bool = True,
    seed: int = 0,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PlantedFeatures:
    """Components that are weighted sums of features, a constant of their own and noise.

    Along a feature's direction, component i has variance w_i² + σ² (σ is the noise, factors have variance 1) and
    covariance w_i W + σ² with the sum of all n, whose variance is W² + nσ², W = Σ w_i. Their correlation rises with w_i
    as long as w_i < W, so that for a feature, scores have the order of the weights. For a weight of 0 they are small,
    not 0, as noise is a part of the sum too; among them, the order is chance, which a rank correlation over all
    components sees. Where it is to be nearly 1 over all, no weights may be alike: ``sparse=False``.

    Args:
        images: How many.
        d_clip: Width of the space.
        components: How many.
        features: How many; at most ``d_clip``.
        noise: Standard deviation of the noise in each dimension of each component. Without any, scores are 1 and 0.
        sparse: Whether a feature is in about half of the components only, with a weight from 0.25 to 1.25, and one
            component in five has none; else all have all, with weights from 0 to 1.25.
        seed: Another truth.
        draw: Other images of the same truth.
        dtype: Of all that is returned.

    Raises:
        InputError: Where a size is no size, or there are more features than dimensions.

    Example:
        >>> planted = planted_features(images=100, d_clip=8)
        >>> planted.scores[planted.weights > 0].min() > planted.scores[planted.weights == 0].max()
        tensor(True)
    """
    expect_sizes(images=images, d_clip=d_clip, components=components)
    expect("features", features, 1, d_clip)
    expect("noise", noise, 0)
    truth, chance = generator(seed), generator(seed, draw)
    directions = orthonormal(truth, 1, d_clip, features)[0].T
    drawn = _sparse_weights if sparse else _dense_weights
    weights = drawn(truth, components, features)
    factors = normal(chance, images, features)
    values = normal(truth, components, 1, d_clip) + noise * normal(chance, components, images, d_clip)
    values += (weights[:, None] * factors) @ directions
    every = weights.sum(0)
    variances = (weights**2 + noise**2) * (every**2 + components * noise**2)
    scores = ((weights * every + noise**2) / variances.sqrt()).nan_to_num()
    facts = (tensor.to(dtype) for tensor in (directions, weights, factors, scores))
    return PlantedFeatures(complete(values, dtype), *facts)


def _sparse_weights(truth: torch.Generator, components: int, features: int) -> Float[Tensor, "component feature"]:
    """Weights from 0.25 to 1.25, or 0; each feature is written by at least one component."""
    writers = torch.randperm(components, generator=truth)[components // 5 :]
    writes = torch.zeros(components, features, dtype=torch.bool)
    writes[writers] = uniform(truth, len(writers), features) < 0.5
    pairs = torch.arange(max(len(writers), features))
    writes[writers[pairs % len(writers)], pairs % features] = True
    return (0.25 + uniform(truth, components, features)).where(writes, 0)


def _dense_weights(truth: torch.Generator, components: int, features: int) -> Float[Tensor, "component feature"]:
    """Weights between 0 and 1.25, no two of them alike."""
    return 1.25 * uniform(truth, components, features)


@dataclass(frozen=True, eq=False)
class PlantedSpans:
    """Components in the space of texts, each spanned by a few known texts of a bank.

    Attributes:
        parts: Complete.
        texts: The bank: ``text 0``, ``text 1``, ...
        directions: Of the texts; unit rows.
        chosen: For each component, by its label, the texts that span it, the one of most variance first.
        deviations: The standard deviation along each of these.
    """

    parts: Decomposition
    texts: tuple[str, ...]
    directions: Float[Tensor, "text d_clip"]
    chosen: Mapping[str, tuple[str, ...]]
    deviations: Float[Tensor, "component step"]


def planted_spans(
    *,
    images: int,
    d_clip: int,
    texts: int = 200,
    components: int = 8,
    per_component: int = 5,
    coherence: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PlantedSpans:
    """Components that are sums of a few texts, in amounts that are exactly uncorrelated over the images.

    The texts of a component have ``coherence`` as the cosine of any two of them. Where it and the noise are 0, the
    first text is the direction of most variance there is, each next one that of the most that is left, and each takes
    its deviation squared with it: a greedy method has to find them in their order, from however few images. (But where
    texts are projected onto a component's span and made unit, all are one in the last dimension that is left.) With
    more coherence or noise they are what was planted, and another text of the bank may serve a greedy method better.

    Args:
        images: How many; more than ``per_component``.
        d_clip: Width of the space; more than ``per_component``.
        texts: How many are in the bank; at least ``per_component``. If too few, components share theirs.
        components: How many.
        per_component: How many texts span a component.
        coherence: The share of a direction common to all texts, from 0 to less than 1.
        noise: Standard deviation of the noise in each dimension of each component.
        seed: Another truth.
        draw: Other images of the same truth.
        dtype: Of all that is returned.

    Raises:
        InputError: Where a size is no size, or too small for ``per_component`` texts.

    Example:
        >>> planted = planted_spans(images=6, d_clip=16, texts=20, components=1)
        >>> first = planted.texts.index(planted.chosen["L0H0"][0])
        >>> int((planted.parts["L0H0"] @ planted.directions.T).std(0).argmax()) == first
        True
    """
    expect_sizes(components=components, per_component=per_component)
    expect("images", images, per_component + 1)
    expect("d_clip", d_clip, per_component + 1)
    expect("texts", texts, per_component)
    expect("coherence", coherence, 0, math.nextafter(1, 0))
    expect("noise", noise, 0)
    truth, chance = generator(seed), generator(seed, draw)
    directions, sets = _bank(truth, texts, d_clip, per_component, coherence)
    orders = torch.stack([torch.randperm(per_component, generator=truth) for _ in range(components)])
    rows = sets[torch.arange(components) % len(sets)].gather(1, orders)
    scales = torch.exp(2 * uniform(truth, components, 1) - 1)
    deviations = scales * 0.7 ** torch.arange(per_component)
    amounts = _uncorrelated(normal(chance, components, images, per_component)) * deviations[:, None]
    amounts += normal(truth, components, 1, per_component)
    values = amounts @ directions[rows] + noise * normal(chance, components, images, d_clip)
    names = tuple(f"text {number}" for number in range(texts))
    chosen = {c.label: tuple(names[n] for n in of) for c, of in zip(heads_of(components), rows.tolist(), strict=True)}
    return PlantedSpans(complete(values, dtype), names, directions.to(dtype), chosen, deviations.to(dtype))


def _bank(
    truth: torch.Generator, texts: int, d_clip: int, together: int, coherence: float
) -> tuple[Float[Tensor, "text d_clip"], Int[Tensor, "set together"]]:
    """Texts in random order, made as sets that are orthonormal but for a common direction; and which are in a set."""
    common = orthonormal(truth, 1, d_clip, 1)[0]
    raw = normal(truth, math.ceil(texts / together), d_clip, together)
    own = torch.linalg.qr(raw - common @ (common.T @ raw)).Q.mT.reshape(-1, d_clip)[:texts]
    order = torch.randperm(texts, generator=truth)
    directions = torch.empty_like(own)
    directions[order] = math.sqrt(coherence) * common.T + math.sqrt(1 - coherence) * own
    return directions, order[: texts // together * together].reshape(-1, together)


def _uncorrelated(amounts: Float[Tensor, "component batch step"]) -> Float[Tensor, "component batch step"]:
    """The same, with mean 0, variance 1 and no correlation over the images."""
    return torch.linalg.qr(amounts - amounts.mean(1, keepdim=True)).Q * math.sqrt(amounts.shape[1])
