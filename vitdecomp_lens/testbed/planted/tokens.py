"""Scores by token, of which it is known where they belong."""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from vitdecomp_lens.components import Component, TokenGrid
from vitdecomp_lens.decomposition import Attribution, Decomposition
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
from vitdecomp_lens.tokens import TokenAttribution, TokenBlock

PATCH = 8  # pixels along a side


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
    expect_sizes(images=images, components=components)
    expect("grid", min(grid), 2)
    texts = (components + 1) // 2
    expect("d_clip", d_clip, texts)
    expect("noise", noise, 0)
    truth, chance = generator(seed), generator(seed, draw)
    directions = orthonormal(truth, 1, d_clip, texts)[0].T
    places = torch.randperm(components, generator=truth)[:texts]
    constant = normal(truth, 1, d_clip).expand(1, images, d_clip)
    masks = _rectangles(chance, images, *grid)
    shown = torch.cat([masks.flatten(1)[None], uniform(chance, texts - 1, images, grid[0] * grid[1]) < 0.3])
    amounts = shown * (0.5 + uniform(chance, texts, images, 1))
    vectors = noise * normal(chance, components, images, 1 + grid[0] * grid[1], d_clip)
    vectors[places, :, 1:] += einsum(amounts, directions, "text batch token, text d -> text batch token d")
    names, heads = tuple(f"text {number}" for number in range(texts)), heads_of(components)
    last = Component(kind="constant", name="bias")
    parts = complete(torch.cat([vectors.sum(2), constant]), dtype, (*heads, last))
    cells = TokenGrid(*grid, image_size=(grid[0] * PATCH, grid[1] * PATCH), prefix=("CLS",))
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
        length = 1 + (uniform(chance, images, 1) * (side - 1)).long()
        first = (uniform(chance, images, 1) * (side - length + 1)).long()
        spans.append((torch.arange(side) >= first) & (torch.arange(side) < first + length))
    return spans[0][:, :, None] & spans[1][:, None]
