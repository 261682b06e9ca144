"""timm's ``SwinTransformerV2Cr``: an independent SwinV2, with norms of the stream itself at some blocks' ends."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from timm.models.swin_transformer_v2_cr import (
    PatchEmbed,
    PatchMerging,
    SwinTransformerV2Cr,
    SwinTransformerV2CrBlock,
    SwinTransformerV2CrStage,
    WindowMultiHeadAttention,
)
from torch import Tensor, nn

from vitdecomp_lens.hooked.blocks import HookedBlock
from vitdecomp_lens.hooked.norms import hooked_norm
from vitdecomp_lens.hooked.registry import register_adapter
from vitdecomp_lens.hooked.timm_swin import WindowAdapter, show_as_tokens
from vitdecomp_lens.hooked.timm_swin_v2 import CosineWindowAttention, PostNormWindowBlock
from vitdecomp_lens.hooked.windows import Size


class SwinV2CrAttention(CosineWindowAttention):
    """timm's ``WindowMultiHeadAttention``."""

    def score_bias(self) -> Float[Tensor, "*#batch head query key"]:
        """The bias by relative position."""
        bias: Tensor = self.core._relative_positional_encodings()  # type: ignore[operator]
        return bias


class SwinV2CrBlock(PostNormWindowBlock):
    """timm's ``SwinTransformerV2CrBlock``.

    Some blocks end with a norm of the stream, ``ln3``. ``hook_resid_post`` is the stream behind it, which is what the
    next block reads; in these blocks it is not the sum of ``hook_resid_mid`` and ``hook_mlp_out``. The norm at the end
    of the last block is the model's final norm: ``ln_final``, behind ``hook_resid_post``, as elsewhere.
    """

    library = SwinTransformerV2CrBlock
    relied_on: ClassVar = ("_shifted_window_attn", "get_attn_mask")
    attention_classes: ClassVar = {WindowMultiHeadAttention: SwinV2CrAttention}

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self._final_norm: tuple[nn.Module, ...] = ()
        self.ln3: nn.Module = hooked_norm(core.norm3)
        show_as_tokens(self.ln3)

    def give_away_norm(self) -> nn.Module:
        """Return the norm at the block's end, from now on behind its last hook point."""
        norm, self.ln3 = self.ln3, nn.Identity()
        self._final_norm = (norm,)  # in a tuple, so that it is not registered here too
        return norm

    def add_branches(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """Add attention, then MLP; then norm the stream in blocks that do."""
        return self.ln3(super().add_branches(x))

    def forward(self, x: Float[Tensor, "*axes d_model"], *args: Any, **context: Any) -> Float[Tensor, "*axes d_model"]:
        """Run the block, and behind the last one the final norm."""
        x = super().forward(x, *args, **context)
        for norm in self._final_norm:
            x = norm(x)
        return x


@register_adapter("timm.models.swin_transformer_v2_cr:SwinTransformerV2Cr")
class TimmSwinV2CrAdapter(WindowAdapter):
    """Hooks timm's ``SwinTransformerV2Cr`` models."""

    library = SwinTransformerV2Cr
    embedding = PatchEmbed
    stage = SwinTransformerV2CrStage
    blocks: ClassVar = {SwinTransformerV2CrBlock: SwinV2CrBlock}
    merging = PatchMerging
    patches_channels_first = True

    def stages(self, clone: Any) -> Iterable[Any]:
        """Return the model's stages."""
        found: Iterable[Any] = clone.stages
        return found

    def patches(self, embed: Any) -> Callable[[Size], Sequence[int]]:
        """Return the way from height and width of an image to rows and columns of patches."""
        height, width = embed.patch_size
        return lambda size: (size[0] // height, size[1] // width)

    def hook_final_norm(self, clone: Any, blocks: list[HookedBlock]) -> nn.Module:
        """Take the final norm, which is the last block's, and return it."""
        last = blocks[-1]
        assert isinstance(last, SwinV2CrBlock)
        return last.give_away_norm()
