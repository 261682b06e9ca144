"""timm's ``Eva``: EVA, EVA-02, DINOv3, Perception Encoder and other models with rotary positions."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from vitdecomp_lens.errors import UnsupportedModelError
from vitdecomp_lens.hooked.attention import Heads, HookedAttention
from vitdecomp_lens.hooked.blocks import HookedBlock
from vitdecomp_lens.hooked.hook_points import any_hooked, fire
from vitdecomp_lens.hooked.packed import by_head
from vitdecomp_lens.hooked.registry import find_part, register_adapter
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_attention import ThreeBiases, TimmAttention
from vitdecomp_lens.hooked.timm_columns import ColumnAdapter, ColumnEmbedding, post_norm_block, pre_norm_block


class RotaryAttention(TimmAttention):
    """timm's ``AttentionRope``: queries and keys of patches, not of prefix tokens, are rotated by position.

    The input projection is one packed layer or three.

    Args:
        core: The (cloned) attention.
        tail: What the block does with the output before adding it (LayerScale).
        rotary: Whether the model has rotary positions.
    """

    def __init__(self, core: Any, *, tail: Tail, rotary: bool) -> None:
        groups = getattr(core, "num_kv_groups", 1)
        if groups > 1:
            raise UnsupportedModelError(
                f"The attention {type(core).__name__} has {core.num_heads} heads for queries that share "
                f"{core.num_heads // groups} for keys and values, where hooks expect as many of each. "
                f"vitdecomp_lens.trace works for any module."
            )
        super().__init__(core, tail=tail, rotary=rotary)

    @property
    def _apart(self) -> tuple[Any, ...]:
        """The layers of queries, keys and values; none where one layer is packed."""
        core: Any = self.core
        return () if core.qkv is not None else (core.q_proj, core.k_proj, core.v_proj)

    def _weight(self, third: int, heads: int) -> Float[Tensor, "head d_model d_head"]:
        return by_head(self._apart[third].weight, heads) if self._apart else super()._weight(third, heads)

    def _bias(self, third: int, heads: int) -> Float[Tensor, "head d_head"]:
        if not self._apart:
            return super()._bias(third, heads)
        weight, bias = self._apart[third].weight, self._apart[third].bias
        return (weight.new_zeros(weight.shape[0]) if bias is None else bias).unflatten(0, (heads, -1))

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries, keys and values."""
        if not self._apart:
            return super().project(x)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self._apart)
        return q, k, v

    def rotate(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys of patches by their positions."""
        rotation = self.context.get("rope")
        if rotation is None:
            return q, k
        core: Any = self.core
        first, half = core.num_prefix_tokens, getattr(core, "rotate_half", False)

        def turned(heads: Tensor) -> Tensor:
            patches = apply_rot_embed_cat(heads[:, :, first:], rotation, half=half)
            return torch.cat([heads[:, :, :first], patches], dim=2).to(dtype)

        return turned(q), turned(k)


class EvaSelfAttention(ThreeBiases, RotaryAttention):
    """timm's ``EvaAttention``: like ``AttentionRope``, but for the bias of its packed layer."""


ATTENTIONS: dict[type, Callable[..., HookedAttention]] = {
    EvaAttention: EvaSelfAttention,
    AttentionRope: RotaryAttention,
}


def _attention(core: Any, tail: Tail, rotary: bool) -> HookedAttention:
    attn: HookedAttention = find_part(ATTENTIONS, core.attn, "attention")(core.attn, tail=tail, rotary=rotary)
    return attn


def _block(core: Any, rotary: bool) -> HookedBlock:
    attn = _attention(core, Tail.of_parameter(core, "gamma_1"), rotary)
    return pre_norm_block(core, attn, Tail.of_parameter(core, "gamma_2"))


def _post_norm_block(core: Any, rotary: bool) -> HookedBlock:
    return post_norm_block(core, _attention(core, Tail(), rotary))


BLOCKS: dict[type, Callable[[Any, bool], HookedBlock]] = {EvaBlock: _block, EvaBlockPostNorm: _post_norm_block}


class EvaEmbedding(ColumnEmbedding):
    """Stands in for ``_pos_embed``, which returns the rotations along with the tokens."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add prefix tokens and positions to the patches."""
        embedded, rotation = type(self.tower)._pos_embed(self.tower, x)
        if any_hooked(self.points):
            embedded = self.tower.pos_drop(self.join(x))
        return fire(self.hook_full_embed, embedded), rotation


@register_adapter("timm.models.eva:Eva")
class TimmEvaAdapter(ColumnAdapter):
    """Hooks timm's EVA models and their kin."""

    relied_on: ClassVar[tuple[str, ...]] = ("_pos_embed", "forward_head", "forward_features", "pool")

    def library_class(self, clone: nn.Module) -> type[nn.Module]:
        """Return timm's class."""
        return Eva

    def hook_embedding(self, clone: nn.Module, parts: dict[str, nn.Module]) -> ColumnEmbedding:
        """Stand in for ``_pos_embed``."""
        clone.__dict__["_pos_embed"] = embedding = EvaEmbedding(clone, parts)
        return embedding

    def hook_block(self, clone: Any, core: nn.Module) -> HookedBlock:
        """Hook one block."""
        block: HookedBlock = find_part(BLOCKS, core, "block")(core, clone.rope is not None)
        return block
