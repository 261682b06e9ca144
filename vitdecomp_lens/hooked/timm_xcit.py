"""timm's ``Xcit``: attention among channels, local convolutions, then a class token that attends to the patches."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from timm.models.cait import ClassAttn
from timm.models.xcit import LPI, XCA, ClassAttentionBlock, ConvPatchEmbed, XCABlock, Xcit
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.hooked.attention import HookedAttention
from vitdecomp_lens.hooked.blocks import HookedBlock, TwoBranchBlock
from vitdecomp_lens.hooked.hook_points import (
    ChannelsFirst,
    CopyingHookPoint,
    OutputTap,
    any_hooked,
    fire,
    lay_out,
)
from vitdecomp_lens.hooked.norms import hooked_norm
from vitdecomp_lens.hooked.registry import ImageSpec, find_part, register_adapter
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_attention import TimmPlainAttention
from vitdecomp_lens.hooked.timm_cait import ClassAttention, ClassAttentionAdapter, ClassBlock
from vitdecomp_lens.hooked.timm_columns import hook_mlp


class ChannelAttention(TimmPlainAttention):
    """timm's ``XCA``: the channels of a head attend to each other, and each token is mixed alone.

    ``hook_q``, ``hook_k`` (each channel of unit length over the tokens), ``hook_v`` and ``hook_z`` are
    ``batch token head d_head`` as ever. ``hook_attn_scores`` and ``hook_pattern`` are ``batch head d_head d_head``: a
    row for each channel that is written, a column for each that is read, and what a token's values write, they write at
    that very token.
    """

    @property
    def scale(self) -> float:
        """One: queries and keys are of unit length, and a head's temperature multiplies the scores."""
        return 1.0

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Bring each channel to unit length over the tokens."""
        # Tokens last, as the library has them: a norm along another axis might be rounded otherwise.
        q, k = (functional.normalize(x.transpose(-2, -1), dim=-1).transpose(-2, -1) for x in (q, k))
        return q, k

    def mix(
        self,
        q: Float[Tensor, "batch head token d_head"],
        k: Float[Tensor, "batch head token d_head"],
        v: Float[Tensor, "batch head token d_head"],
    ) -> Float[Tensor, "batch head token d_head"]:
        """Mix the channels of the values by the pattern."""
        temperature: Tensor = self.core.temperature  # type: ignore[assignment]
        q, k, v = (x.transpose(-2, -1) for x in (q, k, v))
        if self.fused and not any_hooked((self.hook_attn_scores, self.hook_pattern)):
            z = functional.scaled_dot_product_attention(q * temperature, k, v, scale=1.0)
        else:
            scores = fire(self.hook_attn_scores, (q @ k.transpose(-2, -1)) * temperature)
            z = fire(self.hook_pattern, self.drop(scores.softmax(-1))) @ v
        return z.transpose(-2, -1)


class ChannelBlock(TwoBranchBlock):
    """timm's ``XCABlock``: attention among channels, a convolution over neighbouring patches, then an MLP.

    ``hook_conv_out`` is what the convolution adds to the stream, ``ln3`` its norm; ``hook_resid_mid`` is the stream
    behind both, which ``ln2`` reads.
    """

    hook_conv_out: HookPoint

    def __init__(self, core: Any) -> None:
        attn: HookedAttention = find_part({XCA: ChannelAttention}, core.attn, "attention")(
            core.attn, tail=_tail(core, "gamma1")
        )
        super().__init__(core, **_branches(core, attn))
        self.ln3 = hooked_norm(core.norm3)
        self.conv = find_part({LPI: core.local_mp}, core.local_mp, "local patch interaction")
        self.hook_conv_out = HookPoint()
        self.drop_path3 = core.drop_path3
        self._conv_tail = _tail(core, "gamma3")
        for name in ("hook_resid_mid", "ln2", "mlp", "hook_mlp_out", "hook_resid_post", "core"):
            self._modules[name] = self._modules.pop(name)  # hooks are listed in the order in which they fire
        self._size: tuple[int, int] | None = None

    @property
    def has_convolution(self) -> bool:
        """There is one."""
        return True

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "batch patch d_model"], rows: int, columns: int
    ) -> Float[Tensor, "batch patch d_model"]:
        """Run the block.

        Args:
            x: The stream.
            rows: Rows of patches.
            columns: Columns of patches.
        """
        self._size = (rows, columns)
        try:
            out: Tensor = super().forward(x)
            return out
        finally:
            self._size = None

    def convolution_branch(self, x: Float[Tensor, "batch patch d_model"]) -> Float[Tensor, "batch patch d_model"]:
        """What the convolution adds to the stream."""
        assert self._size is not None
        return self._conv_tail(self.conv(self.ln3(x), *self._size))

    def add_branches(self, x: Float[Tensor, "batch patch d_model"]) -> Float[Tensor, "batch patch d_model"]:
        """Add attention, convolution, then MLP."""
        x = x + fire(self.hook_attn_out, self.drop_path1(self.attention_branch(x)))
        x = x + fire(self.hook_conv_out, self.drop_path3(self.convolution_branch(x)))
        x = fire(self.hook_resid_mid, x)
        return x + fire(self.hook_mlp_out, self.drop_path2(self.mlp_branch(x)))


class NormedClassBlock(ClassBlock):
    """timm's ``ClassAttentionBlock``, in which norms act on the stream itself, and patches change as well.

    The stream, at ``hook_resid_pre``, ``hook_resid_mid`` and ``hook_resid_post``, is the class token with the patches
    behind it. Of the class token, c' = c + ``hook_attn_out`` at ``hook_resid_mid`` and c'' = ln2(c') + ``hook_mlp_out``
    at ``hook_resid_post``: the MLP is added to the *normed* stream. Of a patch, p' = p + γ1 ln1(p), and p'' = 2 p', or
    2 ln2(p') in models with ``tokens_norm``; that is the stream's own way, and no part of ``hook_attn_out`` and
    ``hook_mlp_out``, which have the class token only. ``hook_attn_out`` is γ1 times what the attention returns,
    ``hook_mlp_out`` γ2 times what the MLP does; stochastic depth, which timm's models do not have here, comes behind.
    """

    def __init__(self, core: Any) -> None:
        attn: HookedAttention = find_part({ClassAttn: ClassAttention}, core.attn, "attention")(
            core.attn, tail=_tail(core, "gamma1")
        )
        super().__init__(core, **_branches(core, attn))

    @property
    def with_patches(self) -> tuple[str, ...]:
        """How the names of those hooks begin, below the block, that see the patches behind the class token."""
        return (*super().with_patches, "hook_resid_", *(("ln2.",) if self.core.tokens_norm else ()))

    def add_branches(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        """Add attention and MLP to the class token, and to the patches what the library adds there."""
        normed = self.ln1(x)
        attended = fire(self.hook_attn_out, self.attn(normed, split=self._split_inputs(x, self.ln1)))
        x = x + self.drop_path1(torch.cat([attended, self.attn.tail(normed[:, 1:])], dim=1))
        x = fire(self.hook_resid_mid, x)
        x = self.ln2(x) if self.core.tokens_norm else torch.cat([self.ln2(x[:, :1]), x[:, 1:]], dim=1)
        returned = fire(self.hook_mlp_out, self.mlp(x[:, :1]))
        return x + self.drop_path2(torch.cat([returned, x[:, 1:]], dim=1))


def _tail(core: nn.Module, name: str) -> Tail:
    """LayerScale; a plain number, which the library has for none, is one."""
    return Tail.of_parameter(core, name) if isinstance(getattr(core, name), Tensor) else Tail()


def _branches(core: Any, attn: HookedAttention) -> dict[str, Any]:
    return {
        "ln1": hooked_norm(core.norm1),
        "attn": attn,
        "ln2": hooked_norm(core.norm2),
        "mlp": hook_mlp(core.mlp, _tail(core, "gamma2")),
        "drop_path1": core.drop_path1,
        "drop_path2": core.drop_path2,
    }


class PatchTap:
    """A forward hook of the patch embedding, which returns the rows and columns along with the patches.

    Args:
        points: The hook points that the patches pass.
    """

    def __init__(self, *points: HookPoint) -> None:
        self.points = points

    def __call__(self, module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Return the patches as the hook points leave them, and the rest as it is."""
        patches, size = output
        for point in self.points:
            patches = fire(point, patches)
        return patches, size


class DividedGrid:
    """From height and width of an image to rows and columns of patches that tile it.

    Args:
        side: Height and width of a patch.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns."""
        return height // self.side, width // self.side


@register_adapter("timm.models.xcit:Xcit")
class TimmXcitAdapter(ClassAttentionAdapter):
    """Hooks timm's XCiT models.

    The convolutional patch embedding is one component. Images may have any size that patches tile.
    """

    def library_class(self) -> type[nn.Module]:
        """Return timm's class."""
        return Xcit

    def hook_embedding(self, clone: Any, parts: dict[str, nn.Module]) -> None:
        """Read patches, positions and their sum."""
        find_part({ConvPatchEmbed: None}, clone.patch_embed, "patch embedding")
        parts["hook_patch_embed"], parts["hook_embed"] = patches, embed = HookPoint(), CopyingHookPoint()
        clone.patch_embed.register_forward_hook(PatchTap(patches, embed))
        if clone.pos_embed is not None:
            parts["hook_pos_embed"] = positions = HookPoint()
            lay_out((positions,), ChannelsFirst())
            clone.pos_embed.register_forward_hook(OutputTap(positions))
        # Without positions it is the very value of the hook before, and handed out as a copy.
        parts["hook_full_embed"] = full = CopyingHookPoint() if clone.pos_embed is None else HookPoint()
        clone.pos_drop.register_forward_hook(OutputTap(full))

    def class_blocks(self, clone: Any) -> nn.ModuleList | None:
        """Return the blocks behind those of the patches."""
        blocks: nn.ModuleList | None = clone.cls_attn_blocks
        return blocks

    def hook_block(self, core: nn.Module) -> HookedBlock:
        """Hook one block of patches."""
        block: HookedBlock = find_part({XCABlock: ChannelBlock}, core, "block")(core)
        return block

    def hook_class_block(self, core: nn.Module) -> HookedBlock:
        """Hook one block with class attention."""
        block: HookedBlock = find_part({ClassAttentionBlock: NormedClassBlock}, core, "block")(core)
        return block

    def patches(self, clone: Any) -> tuple[ImageSpec, Callable[[int, int], tuple[int, int]], tuple[int, int]]:
        """Images may have any size that patches tile."""
        side = int(clone.patch_embed.patch_size)
        return ImageSpec(clone.in_chans, None, (side, side)), DividedGrid(side), (side, side)
