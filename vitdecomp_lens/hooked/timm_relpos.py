"""timm's ``VisionTransformerRelPos``, whose only positions are a bias of the attention scores."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from vitdecomp_lens.hooked.attention import HookedAttention
from vitdecomp_lens.hooked.blocks import HookedBlock
from vitdecomp_lens.hooked.hook_points import InputTap
from vitdecomp_lens.hooked.registry import find_part, register_adapter
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_attention import TimmPlainAttention
from vitdecomp_lens.hooked.timm_columns import ColumnAdapter, ColumnEmbedding, post_norm_block, pre_norm_block


class BiasedAttention(TimmPlainAttention):
    """timm's ``RelPosAttention``: its own bias by relative position (a table or an MLP), or one that blocks share."""

    def score_bias(self) -> Float[Tensor, "*#batch head query key"] | None:
        """What is added to the scores."""
        core: Any = self.core
        bias: Tensor | None = self.context.get("shared_rel_pos") if core.rel_pos is None else core.rel_pos.get_bias()
        return bias


def _attention(core: Any, tail: Tail) -> HookedAttention:
    attn: HookedAttention = find_part({RelPosAttention: BiasedAttention}, core.attn, "attention")(core.attn, tail=tail)
    return attn


def _block(core: Any) -> HookedBlock:
    return pre_norm_block(core, _attention(core, Tail(core.ls1)), Tail(core.ls2))


def _res_post_block(core: Any) -> HookedBlock:
    return post_norm_block(core, _attention(core, Tail()))


BLOCKS: dict[type, Callable[[Any], HookedBlock]] = {RelPosBlock: _block, ResPostRelPosBlock: _res_post_block}


@register_adapter("timm.models.vision_transformer_relpos:VisionTransformerRelPos")
class TimmRelPosAdapter(ColumnAdapter):
    """Hooks timm's vision transformers with relative positions."""

    def library_class(self, clone: nn.Module) -> type[nn.Module]:
        """Return timm's class."""
        return VisionTransformerRelPos

    def hook_embedding(self, clone: Any, parts: dict[str, nn.Module]) -> ColumnEmbedding:
        """Read the tokens, which get no positions, as the first block gets them."""
        embedding = ColumnEmbedding(clone, parts)
        for point in (embedding.hook_embed, embedding.hook_full_embed):
            clone.blocks[0].register_forward_pre_hook(InputTap(point))
        return embedding

    def hook_block(self, clone: nn.Module, core: nn.Module) -> HookedBlock:
        """Hook one block."""
        block: HookedBlock = find_part(BLOCKS, core, "block")(core)
        return block
