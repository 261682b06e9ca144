"""timm's ``SwinTransformerV2``: cosine attention in shifted windows, norms on what the branches return."""

import math
from typing import Any, ClassVar

from jaxtyping import Float
from timm.models.swin_transformer_v2 import (
    PatchMerging,
    SwinTransformerV2,
    SwinTransformerV2Block,
    SwinTransformerV2Stage,
    WindowAttention,
)
from torch import Tensor
from torch.nn import functional

from vitdecomp_lens.hooked.blocks import PostNormBlock
from vitdecomp_lens.hooked.registry import register_adapter
from vitdecomp_lens.hooked.timm_attention import ThreeBiases
from vitdecomp_lens.hooked.timm_swin import HookedWindowAttention, WindowAdapter, WindowBlock

STEEPEST = math.log(100)  # the logarithm of what a cosine is multiplied with is cut off here
HIGHEST = 16  # the bias by relative position lies between zero and this


class CosineWindowAttention(HookedWindowAttention):
    """Attention in windows whose scores are cosines, steeper or flatter by head.

    ``hook_q`` and ``hook_k`` are of unit length, as with any QK-norm. ``hook_attn_scores`` is what enters the softmax:
    cosines times each head's factor, with the bias by relative position and the mask of shifted windows.
    """

    @property
    def fused(self) -> bool:
        """The library has no fused kernel for it."""
        return False

    @property
    def scale(self) -> float:
        """Nothing that all heads share; see `score`."""
        return 1.0

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scale queries and keys to unit length."""
        return functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)

    def score(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
        """Attention scores: cosines, times each head's factor."""
        steepness: Tensor = self.core.logit_scale.view(-1, 1, 1)  # type: ignore[operator]
        return q @ k.transpose(-2, -1) * steepness.clamp(max=STEEPEST).exp()


class SwinV2Attention(ThreeBiases, CosineWindowAttention):
    """SwinV2's ``WindowAttention``, whose bias by relative position is an MLP of the offset's logarithm."""

    def score_bias(self) -> Float[Tensor, "*#batch head query key"]:
        """The bias by relative position."""
        core: Any = self.core
        by_offset = core.cpb_mlp(core.relative_coords_table).view(-1, self.heads)
        # Laid out before the sigmoid, as in the library: a vectorised sigmoid may round otherwise where it runs out.
        by_pair: Tensor = by_offset[core.relative_position_index].movedim(-1, 0).contiguous()
        return HIGHEST * by_pair.sigmoid()


class PostNormWindowBlock(WindowBlock, PostNormBlock):
    """A block with attention in windows whose norms act on what the branches return, before it is added.

    ``hook_attn_out`` and ``hook_mlp_out`` come after the norms; ``hook_result`` and ``b_O`` sum to what enters the
    first of them.
    """

    def attention_branch(self, x: Float[Tensor, "batch row column d_model"]) -> Tensor:
        """What the attention adds."""
        return self.ln1(self.attend(x))

    def mlp_branch(self, x: Float[Tensor, "batch row column d_model"]) -> Tensor:
        """What the MLP adds."""
        return self.ln2(self.mlp(x.flatten(1, 2))).unflatten(1, x.shape[1:3])


class SwinV2Block(PostNormWindowBlock):
    """timm's ``SwinTransformerV2Block``."""

    library = SwinTransformerV2Block
    attention_classes: ClassVar = {WindowAttention: SwinV2Attention}


@register_adapter("timm.models.swin_transformer_v2:SwinTransformerV2")
class TimmSwinV2Adapter(WindowAdapter):
    """Hooks timm's second Swin transformers."""

    library = SwinTransformerV2
    stage = SwinTransformerV2Stage
    blocks: ClassVar = {SwinTransformerV2Block: SwinV2Block}
    merging = PatchMerging
