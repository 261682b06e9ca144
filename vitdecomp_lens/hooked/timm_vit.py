"""timm's ``VisionTransformer``, with class token, mean or attention pooling, and its distilled sibling."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionPoolPrr,
    DiffAttention,
    GluMlp,
    Mlp,
    SwiGLU,
    resample_abs_pos_embed,
)
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
from vitdecomp_lens.hooked.blocks import HookedBlock, PostNormBlock, TwoBranchBlock
from vitdecomp_lens.hooked.hook_points import CopyingHookPoint, GridTap, InputTap, OutputTap, any_hooked, fire
from vitdecomp_lens.hooked.mlp import GatedMLP, HookedMLP, PlainMLP
from vitdecomp_lens.hooked.norms import hooked_norm
from vitdecomp_lens.hooked.registry import Adapter, ImageSpec, Tower, check_methods, find_part, register_adapter
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_attention import TimmAttention, TimmDiffAttention
from vitdecomp_lens.hooked.timm_parallel import DiffScalingAttention, ScalingAttention, ScalingBlock, ThingsBlock
from vitdecomp_lens.hooked.timm_pool import LatentPool, RefiningPool

ATTENTIONS: dict[type, type[HookedAttention]] = {Attention: TimmAttention, DiffAttention: TimmDiffAttention}


def _mlp(core: nn.Module, tail: Tail) -> HookedMLP:
    return PlainMLP(core, core.fc1, core.fc2, tail=tail)  # type: ignore[arg-type]


def _packed_glu(core: nn.Module, tail: Tail) -> HookedMLP:
    return GatedMLP(core, core.fc1, core.fc1, core.fc2, gate_first=not core.gate_last, tail=tail)  # type: ignore[arg-type]


def _swiglu(core: nn.Module, tail: Tail) -> HookedMLP:
    return GatedMLP(core, core.fc1_g, core.fc1_x, core.fc2, tail=tail)  # type: ignore[arg-type]


MLPS: dict[type, Callable[[nn.Module, Tail], HookedMLP]] = {Mlp: _mlp, GluMlp: _packed_glu, SwiGLU: _swiglu}


def hook_attention(core: nn.Module, tail: Tail) -> HookedAttention:
    """Hook an attention module of timm."""
    return find_part(ATTENTIONS, core, "attention")(core, tail=tail)


def hook_mlp(core: nn.Module, tail: Tail) -> HookedMLP:
    """Hook an MLP of timm."""
    return find_part(MLPS, core, "MLP")(core, tail)


def _block(core: Any) -> HookedBlock:
    return TwoBranchBlock(
        core,
        ln1=hooked_norm(core.norm1),
        attn=hook_attention(core.attn, Tail(core.ls1)),
        ln2=hooked_norm(core.norm2),
        mlp=hook_mlp(core.mlp, Tail(core.ls2)),
        drop_path1=core.drop_path1,
        drop_path2=core.drop_path2,
    )


def _res_post_block(core: Any) -> HookedBlock:
    return PostNormBlock(
        core,
        ln1=hooked_norm(core.norm1),
        attn=hook_attention(core.attn, Tail()),
        ln2=hooked_norm(core.norm2),
        mlp=hook_mlp(core.mlp, Tail()),
        drop_path1=core.drop_path1,
        drop_path2=core.drop_path2,
    )


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


def _latent_pool(core: Any) -> LatentPool:
    return LatentPool(core, None if core.mlp is None else hook_mlp(core.mlp, Tail()))


POOLS: dict[type, Callable[[Any], nn.Module]] = {AttentionPoolLatent: _latent_pool, AttentionPoolPrr: RefiningPool}


class TimmEmbedding:
    """Stands in for ``_pos_embed``: the model's own while its hook points are unused.

    Args:
        tower: The cloned model.
        prefix: Names of the parameters that become prefix tokens.
        hook_embed: Sees patches with prefix tokens, before positions.
        hook_pos_embed: Sees what is added to that; None where the model has no position embedding.
    """

    def __init__(
        self, tower: Any, prefix: tuple[str, ...], hook_embed: HookPoint, hook_pos_embed: HookPoint | None
    ) -> None:
        self.tower = tower
        self.prefix = prefix
        self.hook_embed = hook_embed
        self.hook_pos_embed = hook_pos_embed
        self.points = tuple(point for point in (hook_embed, hook_pos_embed) if point is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """Add prefix tokens and positions to the patches."""
        tower = self.tower
        if not any_hooked(self.points):
            embedded: Tensor = type(tower)._pos_embed(tower, x)
            return embedded
        tokens = [getattr(tower, name).expand(x.shape[0], -1, -1) for name in self.prefix]
        patches = x.flatten(1, -2)
        # cat changes the memory layout, and with it the rounding downstream: only where the library has one too.
        joins = bool(tokens) or self.hook_pos_embed is None
        embed = fire(self.hook_embed, torch.cat([*tokens, patches], dim=1) if joins else patches)
        if self.hook_pos_embed is None:
            return embed
        # Expanded over the batch, because TransformerLens stacks it with the embedding.
        positions = self.positions(x).expand(x.shape[0], -1, -1)
        summed: Tensor = tower.pos_drop(embed + fire(self.hook_pos_embed, positions))
        return summed

    def positions(self, x: Tensor) -> Tensor:
        """Position embeddings of all tokens, zero for prefix tokens that have none."""
        tower = self.tower
        positions = tower.pos_embed
        if tower.dynamic_img_size:
            positions = resample_abs_pos_embed(
                positions,
                new_size=tuple(x.shape[1:3]),
                old_size=tower.patch_embed.grid_size,
                num_prefix_tokens=0 if tower.no_embed_class else tower.num_prefix_tokens,
            )
        if tower.no_embed_class and tower.num_prefix_tokens:
            nothing = positions.new_zeros(1, tower.num_prefix_tokens, positions.shape[-1])
            positions = torch.cat([nothing, positions], dim=1)
        return positions


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
class TimmViTAdapter(Adapter):
    """Hooks timm's vision transformers."""

    def hook(self, clone: Any) -> Tower:
        """Put hook points into a cloned ``VisionTransformer``."""
        distilled = isinstance(clone, VisionTransformerDistilled)
        known = VisionTransformerDistilled if distilled else VisionTransformer
        check_methods(clone, known, ("_pos_embed", "forward_head", "forward_features", "pool"))
        parts: dict[str, nn.Module] = {}
        parts["hook_patch_embed"] = patch_point = HookPoint()
        clone.patch_embed.register_forward_hook(GridTap(patch_point))
        _hook_embedding(clone, ("cls_token", "dist_token") if distilled else _prefix_parameters(clone), parts)
        if (ln_pre := hooked_norm(clone.norm_pre)) is not clone.norm_pre:
            parts["ln_pre"] = clone.norm_pre = ln_pre
        blocks = [find_part(BLOCKS, block, "block")(block) for block in clone.blocks]
        for number, block in enumerate(blocks):
            clone.blocks[number] = block
        parts["blocks"] = nn.ModuleList(blocks)
        pooled = _hook_readout(clone, parts, distilled)
        return Tower(
            module=clone,
            parts=parts,
            blocks=blocks,
            prefix=_prefix_names(clone, distilled),
            image=_image_spec(clone),
            patch_grid=lambda height, width: tuple(clone.patch_embed.dynamic_feat_size((height, width))),
            patch_size=tuple(clone.patch_embed.feat_ratio(as_scalar=False)),
            weights_out=None if clone.num_classes == 0 else Unembedding(clone, distilled),
            constant_query=isinstance(clone.attn_pool, LatentPool),
            pooled=pooled,
        )

    def transform(self, original: Any) -> Any:
        """Return timm's evaluation transform for the model's configuration."""
        from timm.data import create_transform, resolve_data_config

        return create_transform(**resolve_data_config({}, model=original), is_training=False)


class Unembedding:
    """The classifier's weights, live; the mean of both classifiers of a distilled model."""

    def __init__(self, tower: Any, distilled: bool) -> None:
        self.heads = (tower.head, tower.head_dist) if distilled else (tower.head,)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return ``W_U`` [d_rep, class] and ``b_U`` [class]."""
        weights = torch.stack([head.weight.T for head in self.heads]).mean(0)
        zeros = weights.new_zeros(weights.shape[1])
        biases = torch.stack([zeros if head.bias is None else head.bias for head in self.heads]).mean(0)
        return weights, biases


def _prefix_parameters(clone: Any) -> tuple[str, ...]:
    return tuple(name for name in ("cls_token", "reg_token") if getattr(clone, name) is not None)


def _prefix_names(clone: Any, distilled: bool) -> tuple[str, ...]:
    if distilled:
        return "CLS", "DIST"
    return ("CLS",) * clone.has_class_token + tuple(f"reg{n}" for n in range(clone.num_reg_tokens))


def _hook_embedding(clone: Any, prefix: tuple[str, ...], parts: dict[str, nn.Module]) -> None:
    parts["hook_embed"] = hook_embed = HookPoint() if prefix else CopyingHookPoint()
    hook_pos_embed = None
    if clone.pos_embed is not None:
        parts["hook_pos_embed"] = hook_pos_embed = CopyingHookPoint()
    parts["hook_full_embed"] = hook_full_embed = HookPoint()
    clone.__dict__["_pos_embed"] = TimmEmbedding(clone, prefix, hook_embed, hook_pos_embed)
    clone.patch_drop.register_forward_pre_hook(InputTap(hook_full_embed))


def _hook_readout(clone: Any, parts: dict[str, nn.Module], distilled: bool) -> bool:
    """Hook the final norm, the pool and the representation; return whether the norm acts on pooled tokens."""
    pooled = type(clone.norm) is nn.Identity
    name = "fc_norm" if pooled else "norm"
    if (ln_final := hooked_norm(getattr(clone, name))) is not getattr(clone, name):
        parts["ln_final"] = ln_final
        setattr(clone, name, ln_final)
    if clone.attn_pool is not None:
        parts["attn_pool"] = clone.attn_pool = find_part(POOLS, clone.attn_pool, "attention pool")(clone.attn_pool)
    parts["hook_representation"] = point = CopyingHookPoint()
    if distilled:
        clone.__dict__["forward_head"] = DistilledHead(clone, point)
    else:
        clone.head_drop.register_forward_hook(OutputTap(point))
    return pooled


def _image_spec(clone: Any) -> ImageSpec:
    embed = clone.patch_embed
    if not clone.dynamic_img_size:
        return ImageSpec(clone.in_chans, tuple(embed.img_size))
    pads = getattr(embed, "dynamic_img_pad", False)
    return ImageSpec(clone.in_chans, None, (1, 1) if pads else tuple(embed.feat_ratio(as_scalar=False)))
