"""Planted truth: decompositions made by hand, of which the right answer is known. No model, no training.

Each function draws a *truth* (maps, weights, texts...) from its ``seed`` and the sizes, and images from that truth by
``draw``: another ``draw`` is held-out images of the same truth, and many of them are a data set drawn piece by piece.
All is computed in float64 and cast at the end. Components are heads, ``L0H0`` to ``L0H3``, ``L1H0`` and so on.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitdecomp_lens.components import Component, TokenGrid
from vitdecomp_lens.decomposition import Attribution, Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.testbed.hashing import mixed
from vitdecomp_lens.tokens import TokenAttribution, TokenBlock

_HEADS = 4  # how many a layer has
_PATCH = 8  # pixels along a side
_HUSHED = 0.0625  # how much of their noise components have along either direction if it is not theirs


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
    _expect_sizes(images=images, d_rep=d_rep, d_clip=d_clip, components=components)
    _expect("d_head", d_head, 1, min(d_rep, d_clip))
    _expect("noise", noise, 0)
    truth, chance = _chance(seed), _chance(seed, draw)
    spans, reached = (_orthonormal(truth, components, width, d_head) for width in (d_rep, d_clip))
    scales = torch.exp(2 * _uniform(truth, components, 1) - 1)
    means = scales * _normal(truth, components, d_head) / 2
    deviations = scales * torch.arange(1.0, d_head + 1) ** -0.7
    values = torch.empty(components, images, d_rep, dtype=dtype)
    total, targets = (torch.zeros(images, width, dtype=torch.float64) for width in (d_rep, d_clip))
    for row in range(components):  # one by one: in float64, all of them at once would be most of the memory
        codes = means[row] + deviations[row] * _normal(chance, images, d_head)
        vectors = codes @ spans[row].T
        values[row] = vectors
        total += vectors
        targets += codes @ reached[row].T
    targets += noise * math.sqrt(float(deviations.square().sum()) / d_clip) * _normal(chance, images, d_clip)
    parts = Decomposition(values, _heads(components), total.to(dtype))
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
    seed: int = 0,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PlantedFeatures:
    """Components that are weighted sums of features, a constant of their own and noise; one in five has no feature.

    Along a feature's direction, component i has variance w_i² + σ² (σ is the noise, factors have variance 1) and
    covariance w_i W + σ² with the sum of all n, whose variance is W² + nσ², W = Σ w_i. Their correlation rises with w_i
    as long as w_i < W, so that for a feature, scores have the order of the weights. For a weight of 0 they are small,
    not 0, as noise is a part of the sum too; among them, the order is chance, which a rank correlation over all
    components sees: over those with a weight it is nearly 1.

    Args:
        images: How many.
        d_clip: Width of the space.
        components: How many.
        features: How many; at most ``d_clip``.
        noise: Standard deviation of the noise in each dimension of each component. Without any, scores are 1 and 0.
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
    _expect_sizes(images=images, d_clip=d_clip, components=components)
    _expect("features", features, 1, d_clip)
    _expect("noise", noise, 0)
    truth, chance = _chance(seed), _chance(seed, draw)
    directions = _orthonormal(truth, 1, d_clip, features)[0].T
    weights = _sparse_weights(truth, components, features)
    factors = _normal(chance, images, features)
    values = _normal(truth, components, 1, d_clip) + noise * _normal(chance, components, images, d_clip)
    values += (weights[:, None] * factors) @ directions
    every = weights.sum(0)
    variances = (weights**2 + noise**2) * (every**2 + components * noise**2)
    scores = ((weights * every + noise**2) / variances.sqrt()).nan_to_num()
    facts = (tensor.to(dtype) for tensor in (directions, weights, factors, scores))
    return PlantedFeatures(_parts(values, dtype), *facts)


def _sparse_weights(truth: torch.Generator, components: int, features: int) -> Float[Tensor, "component feature"]:
    """Weights from 0.25 to 1.25, or 0; each feature is written by at least one component."""
    writers = torch.randperm(components, generator=truth)[components // 5 :]
    writes = torch.zeros(components, features, dtype=torch.bool)
    writes[writers] = _uniform(truth, len(writers), features) < 0.5
    pairs = torch.arange(max(len(writers), features))
    writes[writers[pairs % len(writers)], pairs % features] = True
    return (0.25 + _uniform(truth, components, features)).where(writes, 0)


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
    _expect_sizes(components=components, per_component=per_component)
    _expect("images", images, per_component + 1)
    _expect("d_clip", d_clip, per_component + 1)
    _expect("texts", texts, per_component)
    _expect("coherence", coherence, 0, math.nextafter(1, 0))
    _expect("noise", noise, 0)
    truth, chance = _chance(seed), _chance(seed, draw)
    directions, sets = _bank(truth, texts, d_clip, per_component, coherence)
    orders = torch.stack([torch.randperm(per_component, generator=truth) for _ in range(components)])
    rows = sets[torch.arange(components) % len(sets)].gather(1, orders)
    scales = torch.exp(2 * _uniform(truth, components, 1) - 1)
    deviations = scales * 0.7 ** torch.arange(per_component)
    amounts = _uncorrelated(_normal(chance, components, images, per_component)) * deviations[:, None]
    amounts += _normal(truth, components, 1, per_component)
    values = amounts @ directions[rows] + noise * _normal(chance, components, images, d_clip)
    names = tuple(f"text {number}" for number in range(texts))
    chosen = {c.label: tuple(names[n] for n in of) for c, of in zip(_heads(components), rows.tolist(), strict=True)}
    return PlantedSpans(_parts(values, dtype), names, directions.to(dtype), chosen, deviations.to(dtype))


def _bank(
    truth: torch.Generator, texts: int, d_clip: int, together: int, coherence: float
) -> tuple[Float[Tensor, "text d_clip"], Int[Tensor, "set together"]]:
    """Texts in random order, made as sets that are orthonormal but for a common direction; and which are in a set."""
    common = _orthonormal(truth, 1, d_clip, 1)[0]
    raw = _normal(truth, math.ceil(texts / together), d_clip, together)
    own = torch.linalg.qr(raw - common @ (common.T @ raw)).Q.mT.reshape(-1, d_clip)[:texts]
    order = torch.randperm(texts, generator=truth)
    directions = torch.empty_like(own)
    directions[order] = math.sqrt(coherence) * common.T + math.sqrt(1 - coherence) * own
    return directions, order[: texts // together * together].reshape(-1, together)


def _uncorrelated(amounts: Float[Tensor, "component batch step"]) -> Float[Tensor, "component batch step"]:
    """The same, with mean 0, variance 1 and no correlation over the images."""
    return torch.linalg.qr(amounts - amounts.mean(1, keepdim=True)).Q * math.sqrt(amounts.shape[1])


@dataclass(frozen=True, eq=False)
class PlantedTokens:
    """Scores by token, of which one component's show where something is.

    Attributes:
        tokens: Complete; along the directions of all texts, with a prefix token ``CLS`` and a constant ``bias``.
        parts: The vectors behind the scores, summed over tokens.
        directions: Of the texts; orthonormal.
        carrier: The label of the component that writes ``text`` at the patches of the masks.
        text: Its name.
        masks: Which patches: one rectangle an image.
        strengths: How much the carrier writes along its text in all, without noise.
    """

    tokens: TokenAttribution
    parts: Decomposition
    directions: Float[Tensor, "text d_clip"]
    carrier: str
    text: str
    masks: Bool[Tensor, "batch row column"]
    strengths: Float[Tensor, "batch"]


def planted_tokens(
    *,
    images: int,
    grid: tuple[int, int] = (6, 6),
    d_clip: int = 16,
    components: int = 6,
    noise: float = 0.1,
    seed: int = 0,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PlantedTokens:
    """One component that writes a text at the patches of a rectangle, others that write theirs anywhere, or none.

    At each patch of an image's rectangle, the carrier writes one amount, from 0.5 to 1.5 by image. Half of the
    components, the carrier among them, have a text of their own; the rest are noise.

    Args:
        images: How many.
        grid: Rows and columns of patches; at least 2 of each.
        d_clip: Width of the space of texts; at least half of ``components``.
        components: How many, not counting the constant.
        noise: Standard deviation of the noise in each dimension of each component at each token.
        seed: Another truth.
        draw: Other images of the same truth.
        dtype: Of all that is returned.

    Raises:
        InputError: Where a size is no size, or there are more texts than dimensions.

    Example:
        >>> planted = planted_tokens(images=2, noise=0.0)
        >>> heat = planted.tokens[planted.carrier][:, 1:, 0].reshape(2, 6, 6)  # text 0; without the prefix token
        >>> torch.equal(heat > 0, planted.masks)
        True
    """
    _expect_sizes(images=images, components=components)
    _expect("grid", min(grid), 2)
    texts = (components + 1) // 2
    _expect("d_clip", d_clip, texts)
    _expect("noise", noise, 0)
    truth, chance = _chance(seed), _chance(seed, draw)
    directions = _orthonormal(truth, 1, d_clip, texts)[0].T
    places = torch.randperm(components, generator=truth)[:texts]
    constant = _normal(truth, 1, d_clip).expand(1, images, d_clip)
    masks = _rectangles(chance, images, *grid)
    shown = torch.cat([masks.flatten(1)[None], _uniform(chance, texts - 1, images, grid[0] * grid[1]) < 0.3])
    amounts = shown * (0.5 + _uniform(chance, texts, images, 1))
    vectors = noise * _normal(chance, components, images, 1 + grid[0] * grid[1], d_clip)
    vectors[places, :, 1:] += einsum(amounts, directions, "text batch token, text d -> text batch token d")
    names, heads = tuple(f"text {number}" for number in range(texts)), _heads(components)
    last = Component(kind="constant", name="bias")
    parts = _parts(torch.cat([vectors.sum(2), constant]), dtype, (*heads, last))
    cells = TokenGrid(*grid, image_size=(grid[0] * _PATCH, grid[1] * _PATCH), prefix=("CLS",))
    block = TokenBlock((vectors @ directions.T).to(dtype), heads, cells)
    bias = Attribution((constant @ directions.T).to(dtype), (last,), directions=names)
    total = (vectors.sum((0, 2)) + constant[0]) @ directions.T
    tokens = TokenAttribution((block,), bias, total.to(dtype))
    carrier, strengths = heads[int(places[0])].label, amounts[0].sum(-1).to(dtype)
    return PlantedTokens(tokens, parts, directions.to(dtype), carrier, names[0], masks, strengths)


def _rectangles(chance: torch.Generator, images: int, *sides: int) -> Bool[Tensor, "batch row column"]:
    """Rectangles of at least one patch, shorter along both sides than the grid."""
    spans = []
    for side in sides:
        length = 1 + (_uniform(chance, images, 1) * (side - 1)).long()
        first = (_uniform(chance, images, 1) * (side - length + 1)).long()
        spans.append((torch.arange(side) >= first) & (torch.arange(side) < first + length))
    return spans[0][:, :, None] & spans[1][:, None]


@dataclass(frozen=True, eq=False)
class PlantedGroups:
    """Components of which some write a label, and others an attribute that mostly goes with it.

    Attributes:
        parts: Complete.
        label: Of the images: 0 or 1.
        spurious: The attribute: 0 or 1.
        core: The labels of the components that write the images' label only.
        carriers: The labels of those that write the attribute only.
        directions: Along which the one is written, and the other; orthonormal.
    """

    parts: Decomposition
    label: Int[Tensor, "batch"]
    spurious: Int[Tensor, "batch"]
    core: tuple[str, ...]
    carriers: tuple[str, ...]
    directions: Float[Tensor, "2 d_rep"]


def planted_groups(
    *,
    images: int,
    d_rep: int = 32,
    components: int = 12,
    agrees: float = 0.9,
    noise: float = 0.5,
    seed: int = 0,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PlantedGroups:
    """Images of two classes and an attribute that mostly goes with them, and is seen more easily.

    A quarter of the components write the label, which is worth ±1 in their sum, a quarter the attribute, worth ±2; all
    have a constant of their own and noise, of which little lies along a direction that they do not write: to ablate
    components that write neither changes next to nothing. A linear classifier fitted where label and attribute mostly
    agree reads both, and fails where they do not. Carriers set to their mean, it is left with the label; set to zero,
    it has another threshold as well. For fair images of the same truth, ask for ``agrees=0.5`` and another ``draw``.

    Args:
        images: How many.
        d_rep: Width of the representation; at least 2.
        components: How many; at least 2.
        agrees: How probably attribute and label agree.
        noise: Standard deviation of the noise in each dimension of the sum of those that write the label.
        seed: Another truth.
        draw: Other images of the same truth.
        dtype: Of all that is returned.

    Raises:
        InputError: Where a size is no size, or ``agrees`` is no probability.

    Example:
        >>> planted = planted_groups(images=1000)
        >>> 0.85 < float((planted.label == planted.spurious).float().mean()) < 0.95
        True
    """
    _expect_sizes(images=images)
    _expect("d_rep", d_rep, 2)
    _expect("components", components, 2)
    _expect("agrees", agrees, 0, 1)
    _expect("noise", noise, 0)
    truth, chance = _chance(seed), _chance(seed, draw)
    directions = _orthonormal(truth, 1, d_rep, 2)[0].T
    count = max(1, components // 4)
    core, carriers = torch.randperm(components, generator=truth)[: 2 * count].reshape(2, count).sort().values
    label = torch.randint(2, (images,), generator=chance)
    spurious = torch.where(_uniform(chance, images) < agrees, label, 1 - label)
    noises = noise / math.sqrt(count) * _normal(chance, components, images, d_rep)
    damped = torch.full((components, 1, 2), 1 - _HUSHED, dtype=torch.float64)
    damped[core, :, 0] = damped[carriers, :, 1] = 0
    noises -= (noises @ directions.T * damped) @ directions
    values = _normal(truth, components, 1, d_rep) + noises
    values[core] += (2 * label - 1)[:, None] * directions[0] / count
    values[carriers] += 2 * (2 * spurious - 1)[:, None] * directions[1] / count
    parts = _parts(values, dtype)
    names_of_core, names_of_carriers = (tuple(parts.labels[row] for row in rows.tolist()) for rows in (core, carriers))
    return PlantedGroups(parts, label, spurious, names_of_core, names_of_carriers, directions.to(dtype))


def _parts(values: Tensor, dtype: torch.dtype, components: tuple[Component, ...] | None = None) -> Decomposition:
    return Decomposition(values.to(dtype), components or _heads(len(values)), values.sum(0).to(dtype))


def _heads(count: int) -> tuple[Component, ...]:
    return tuple(Component(kind="head", layer=n // _HEADS, head=n % _HEADS) for n in range(count))


def _chance(seed: int, *draw: int) -> torch.Generator:
    """The source of the truth; or, with ``draw``, of images."""
    return torch.Generator().manual_seed(int(mixed(seed, *draw)))


def _normal(generator: torch.Generator, *size: int) -> Float[Tensor, "..."]:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _uniform(generator: torch.Generator, *size: int) -> Float[Tensor, "..."]:
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _orthonormal(generator: torch.Generator, count: int, width: int, rank: int) -> Float[Tensor, "count width rank"]:
    return torch.linalg.qr(_normal(generator, count, width, rank)).Q


def _expect_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        _expect(name, size, 1)


def _expect(name: str, value: int | float, least: int | float, most: int | float = math.inf) -> None:
    if not least <= value <= most:  # so that what is not a number is refused too
        allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(f"Expected {name}= {allowed}; got {value}.")
