"""timm's ``VisionTransformer``, with class token, mean or attention pooling, and its distilled sibling."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from timm.layers import Attention, DiffAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.hooked.attention import HookedAttention
from vitdecomp_lens.hooked.blocks import HookedBlock
from vitdecomp_lens.hooked.hook_points import any_hooked, fire
from vitdecomp_lens.hooked.registry import find_part, register_adapter
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_attention import TimmAttention, TimmDiffAttention
from vitdecomp_lens.hooked.timm_columns import (
    ColumnAdapter,
    ColumnEmbedding,
    hook_mlp,
    post_norm_block,
    pre_norm_block,
)
from vitdecomp_lens.hooked.timm_parallel import DiffScalingAttention, ScalingAttention, ScalingBlock, ThingsBlock

ATTENTIONS: dict[type, type[HookedAttention]] = {Attention: TimmAttention, DiffAttention: TimmDiffAttention}


def hook_attention(core: nn.Module, tail: Tail) -> HookedAttention:
    """Hook an attention module of timm."""
    return find_part(ATTENTIONS, core, "attention")(core, tail=tail)


def _block(core: Any) -> HookedBlock:
    return pre_norm_block(core, hook_attention(core.attn, Tail(core.ls1)), Tail(core.ls2))


def _res_post_block(core: Any) -> HookedBlock:
    return post_norm_block(core, hook_attention(core.attn, Tail()))


def _scaling_block(core: Any) -> HookedBlock:
    return ScalingBlock(core, ScalingAttention)


def _diff_scaling_block(core: Any) -> HookedBlock:
    return ScalingBlock(core, DiffScalingAttention)


def _things_block(core: Any) -> HookedBlock:
    attentions = [hook_attention(branch.attn, Tail(branch.ls)) for branch in core.attns]
    return ThingsBlock(core, attentions, [hook_mlp(branch.mlp, Tail(branch.ls)) for branch in core.ffns])


BLOCKS: dict[type, Callable[[Any], HookedBlock]] = {
    Block: _block,
    ResPostBlock: _res_post_block,
    ParallelScalingBlock: _scaling_block,
    DiffParallelScalingBlock: _diff_scaling_block,
    ParallelThingsBlock: _things_block,
}


class TimmEmbedding(ColumnEmbedding):
    """Stands in for ``_pos_embed``: the model's own while its hook points are unused."""

    def __call__(self, x: Tensor) -> Tensor:
        """Add prefix tokens and positions to the patches."""
        tower = self.tower
        if not any_hooked(self.points):
            embedded = type(tower)._pos_embed(tower, x)
        elif self.hook_pos_embed is None:
            embedded = self.join(x, always_cat=True)
        else:
            embedded = tower.pos_drop(self.join(x))
        return fire(self.hook_full_embed, embedded)


class DistilledHead:
    """Stands in for ``forward_head`` of a distilled model, whose representation is a mean of two tokens.

    A change of the mean is added to both tokens, so that the hook is live in the logits too.
    """

    def __init__(self, tower: Any, hook_representation: HookPoint) -> None:
        self.tower = tower
        self.hook_representation = hook_representation

    def __call__(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Read out the class and distillation tokens."""
        if any_hooked((self.hook_representation,)):
            mean = (x[:, 0] + x[:, 1]) / 2
            change = fire(self.hook_representation, mean) - mean
            x = torch.cat([x[:, :2] + change.unsqueeze(1), x[:, 2:]], dim=1)
        return type(self.tower).forward_head(self.tower, x, pre_logits=pre_logits)


@register_adapter("timm.models.vision_transformer:VisionTransformer", "timm.models.deit:VisionTransformerDistilled")
class TimmViTAdapter(ColumnAdapter):
    """Hooks timm's vision transformers."""

    relied_on: ClassVar[tuple[str, ...]] = ("_pos_embed", "forward_head", "forward_features", "pool")

    def library_class(self, clone: nn.Module) -> type[nn.Module]:
        """Return the distilled class, or the plain one."""
        return VisionTransformerDistilled if isinstance(clone, VisionTransformerDistilled) else VisionTransformer

    def hook_embedding(self, clone: nn.Module, parts: dict[str, nn.Module]) -> ColumnEmbedding:
        """Stand in for ``_pos_embed``."""
        clone.__dict__["_pos_embed"] = embedding = TimmEmbedding(clone, parts)
        return embedding

    def hook_block(self, clone: nn.Module, core: nn.Module) -> HookedBlock:
        """Hook one block."""
        block: HookedBlock = find_part(BLOCKS, core, "block")(core)
        return block

    def hook_representation(self, clone: Any, point: HookPoint) -> None:
        """Read the representation before the classifier; of a distilled model, stand in for its head."""
        if isinstance(clone, VisionTransformerDistilled):
            clone.__dict__["forward_head"] = DistilledHead(clone, point)
        else:
            super().hook_representation(clone, point)
