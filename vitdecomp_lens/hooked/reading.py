"""Where the components of a hooked tower are read: one table for all families."""

from collections.abc import Collection, Iterator

from vitdecomp_lens.components import By, Component, Point
from vitdecomp_lens.hooked.blocks import HookedBlock
from vitdecomp_lens.hooked.registry import Tower


def component_points(tower: Tower, by: By, spliced: Collection[str] = ()) -> tuple[Point, ...]:
    """Return the points of a cut: the embedding, each block's branches, the attention pool.

    Args:
        tower: The hooked tower.
        by: ``"layer"``, ``"head"`` (attention split by head), ``"neuron"`` (MLPs split by neuron) or ``"latent"``
            (where no module stands, as by head).
        spliced: Hooks at which modules stand: a branch that has one inside is read there, whatever the cut.
    """
    points = [_embedding(tower)]
    for layer, block in enumerate(tower.blocks):
        points += _convolution(layer, block)
        heads, neurons = _attention_heads(layer, block, "hook_z"), _neurons(layer, block)
        inside = any(f"blocks.{layer}.{name}.hook_z" in spliced for name in block.attentions)
        points += heads if inside or by in ("head", "latent") else _attention(layer, block)
        inside = any(f"blocks.{layer}.{name}.hook_post" in spliced for name in block.mlps_by_name)
        points += neurons if inside or by == "neuron" else _mlp(layer, block)
    return (*points, *_pool(tower, "hook_z"))


def token_points(tower: Tower, by: By, spliced: Collection[str] = ()) -> tuple[Point, ...]:
    """Return the points of a cut whose attention is read at the source tokens: at ``hook_v``, by head.

    Args:
        tower: The hooked tower.
        by: Whether MLPs are split by neuron. Attention is always split by head; for ``"layer"`` and
            ``"neuron"`` the caller sums over heads.
        spliced: As for `component_points`.
    """
    points = [_embedding(tower)]
    for layer, block in enumerate(tower.blocks):
        points += _convolution(layer, block)
        points += _attention_heads(layer, block, "hook_v")
        inside = any(f"blocks.{layer}.{name}.hook_post" in spliced for name in block.mlps_by_name)
        points += _neurons(layer, block) if inside or by == "neuron" else _mlp(layer, block)
    return (*points, *_pool(tower, "hook_v"))


def _embedding(tower: Tower) -> Point:
    return Point("hook_patch_embed", Component(kind="embed"), skipped_tokens=len(tower.prefix))


def _convolution(layer: int, block: HookedBlock) -> Iterator[Point]:
    if block.has_convolution:
        yield Point(f"blocks.{layer}.hook_conv_out", Component(kind="conv", layer=layer))


def _attention(layer: int, block: HookedBlock) -> Iterator[Point]:
    if block.attentions:
        yield Point(f"blocks.{layer}.hook_attn_out", Component(kind="attn", layer=layer))


def _mlp(layer: int, block: HookedBlock) -> Iterator[Point]:
    if block.mlps_by_name:
        yield Point(f"blocks.{layer}.hook_mlp_out", Component(kind="mlp", layer=layer))


def _attention_heads(layer: int, block: HookedBlock, hook: str) -> Iterator[Point]:
    first = 0
    for name, attn in block.attentions.items():
        yield Point(f"blocks.{layer}.{name}.{hook}", Component(kind="attn", layer=layer), axis=2, first=first)
        first += attn.heads


def _neurons(layer: int, block: HookedBlock) -> Iterator[Point]:
    first = 0
    for name, mlp in block.mlps_by_name.items():
        yield Point(f"blocks.{layer}.{name}.hook_post", Component(kind="mlp", layer=layer), axis=2, first=first)
        first += mlp.d_mlp


def _pool(tower: Tower, attention_hook: str) -> Iterator[Point]:
    """The pool's MLP; and its attention, unless the query is constant and the pattern merely frozen weights."""
    pool = tower.parts.get("attn_pool")
    if pool is None:
        return
    if not tower.constant_query:
        yield Point(f"attn_pool.{attention_hook}", Component(kind="pool", name="pool.attn"))
    if "hook_mlp_out" in pool._modules:
        yield Point("attn_pool.hook_mlp_out", Component(kind="pool", name="pool.mlp"), token_axis=None)
