"""open_clip's ``VisionTransformer``, whole CLIPs, and towers that open_clip takes from timm."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from open_clip.transformer import (
    Attention,
    AttentionalPooler,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.errors import UnsupportedModelError
from vitdecomp_lens.hooked.attention import HookedAttention
from vitdecomp_lens.hooked.blocks import HookedBlock, TwoBranchBlock
from vitdecomp_lens.hooked.hook_points import CopyingHookPoint, GridTap, InputTap, any_hooked, fire
from vitdecomp_lens.hooked.mlp import PlainMLP
from vitdecomp_lens.hooked.norms import hooked_norm
from vitdecomp_lens.hooked.open_clip_attention import OpenClipAttention, Pooler, TorchAttention
from vitdecomp_lens.hooked.registry import (
    Adapter,
    ImageSpec,
    Tower,
    check_methods,
    find_adapter,
    find_part,
    register_adapter,
)
from vitdecomp_lens.hooked.tail import Tail

ATTENTIONS: dict[type, type[HookedAttention]] = {nn.MultiheadAttention: TorchAttention, Attention: OpenClipAttention}


def _block(core: Any) -> HookedBlock:
    if "ln_1_kv" in core._modules:
        raise UnsupportedModelError(
            "A ResidualAttentionBlock with cross-attention cannot be hooked: image towers have none. "
            "vitdecomp_lens.trace works for any module."
        )
    after_attn = Tail(core.ln_attn, core.ls_1) if "ln_attn" in core._modules else Tail(core.ls_1)
    return TwoBranchBlock(
        core,
        ln1=hooked_norm(core.ln_1),
        attn=find_part(ATTENTIONS, core.attn, "attention")(core.attn, tail=after_attn),
        ln2=hooked_norm(core.ln_2),
        mlp=PlainMLP(core.mlp, core.mlp.c_fc, core.mlp.c_proj, tail=Tail(core.ls_2)),
        tokens_first=not getattr(core.attn, "batch_first", True),
    )


BLOCKS: dict[type, Callable[[Any], HookedBlock]] = {
    ResidualAttentionBlock: _block,
    CustomResidualAttentionBlock: _block,
}


class OpenClipEmbedding:
    """Stands in for ``_embeds``: the model's own while its hook points are unused.

    Args:
        tower: The cloned tower.
        hook_embed: Sees patches with the class token, before positions.
        hook_pos_embed: Sees what is added to that.
    """

    def __init__(self, tower: Any, hook_embed: HookPoint, hook_pos_embed: HookPoint) -> None:
        self.tower = tower
        self.hook_embed = hook_embed
        self.hook_pos_embed = hook_pos_embed

    def __call__(self, images: Tensor) -> Tensor:
        """Embed patches, add class token and positions, and norm."""
        tower = self.tower
        if not any_hooked((self.hook_embed, self.hook_pos_embed)):
            embedded: Tensor = type(tower)._embeds(tower, images)
            return embedded
        x = tower.conv1(images).flatten(2).transpose(1, 2)
        class_token = tower.class_embedding.view(1, 1, -1).expand(x.shape[0], -1, -1).to(x.dtype)
        embed = fire(self.hook_embed, torch.cat([class_token, x], dim=1))
        positions = tower.positional_embedding.to(x.dtype).unsqueeze(0).expand(x.shape[0], -1, -1)
        summed = embed + fire(self.hook_pos_embed, positions)
        return tower.ln_pre(tower.patch_dropout(summed))


class PooledTap:
    """A forward hook that passes a tower's pooled output through a hook point, alone or before the tokens."""

    def __init__(self, point: HookPoint) -> None:
        self.point = point

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output with its pooled part as the hook point leaves it."""
        if isinstance(output, tuple):
            return (fire(self.point, output[0]), *output[1:])
        return fire(self.point, output)


class Projection:
    """A projection's weights, live.

    Args:
        owner: The module that holds the weight.
        name: The weight's name.
        transposed: Whether the weight is ``out in``, as in a linear layer.
    """

    def __init__(self, owner: nn.Module, name: str, *, transposed: bool) -> None:
        self.owner = owner
        self.name = name
        self.transposed = transposed

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return the weight [d_in, d_rep] and the bias [d_rep], zero if there is none."""
        weight: Tensor = getattr(self.owner, self.name)
        weight = weight.T if self.transposed else weight
        bias: Tensor | None = getattr(self.owner, "bias", None)
        return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias


class OpenClipTransform(Adapter):
    """What open_clip's towers share: their evaluation transform."""

    def transform(self, original: Any, size: tuple[int, int] | None) -> Any:
        """open_clip's evaluation transform for the tower's configuration."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        settings = dict(getattr(original, "preprocess_cfg", None) or {"size": original.image_size})
        return image_transform_v2(PreprocessCfg(**settings), is_train=False)


@register_adapter("open_clip.transformer:VisionTransformer")
class OpenClipViTAdapter(OpenClipTransform):
    """Hooks open_clip's own vision transformers."""

    def hook(self, clone: Any) -> Tower:
        """Put hook points into a cloned ``VisionTransformer``."""
        check_methods(clone, VisionTransformer, ("_embeds", "_pool", "_global_pool"))
        parts: dict[str, nn.Module] = {name: HookPoint() for name in ("hook_patch_embed", "hook_embed")}
        parts |= {"hook_pos_embed": CopyingHookPoint(), "hook_full_embed": HookPoint()}
        clone.conv1.register_forward_hook(GridTap(parts["hook_patch_embed"], channels_first=True))  # type: ignore[arg-type]
        clone.patch_dropout.register_forward_pre_hook(InputTap(parts["hook_full_embed"]))  # type: ignore[arg-type]
        clone.__dict__["_embeds"] = OpenClipEmbedding(clone, parts["hook_embed"], parts["hook_pos_embed"])  # type: ignore[arg-type]
        if (ln_pre := hooked_norm(clone.ln_pre)) is not clone.ln_pre:
            parts["ln_pre"] = clone.ln_pre = ln_pre
        blocks = [find_part(BLOCKS, block, "block")(block) for block in clone.transformer.resblocks]
        for number, block in enumerate(blocks):
            clone.transformer.resblocks[number] = block
        parts["blocks"] = nn.ModuleList(blocks)
        for name in ("attn_pool", "attn_pool_contrastive"):
            if clone._modules.get(name) is not None:
                parts[name] = find_part({AttentionalPooler: Pooler}, getattr(clone, name), "attention pool")(
                    getattr(clone, name)
                )
                setattr(clone, name, parts[name])
        parts["ln_final"] = clone.ln_post = hooked_norm(clone.ln_post)
        parts["hook_representation"] = point = CopyingHookPoint()
        clone.register_forward_hook(PooledTap(point))
        height, width = clone.patch_size
        return Tower(
            module=clone,
            parts=parts,
            blocks=blocks,
            prefix=("CLS",),
            image=ImageSpec(clone.conv1.in_channels, tuple(clone.image_size)),
            patch_grid=lambda rows, columns: (rows // height, columns // width),
            patch_size=(height, width),
            weights_out=None if clone.proj is None else Projection(clone, "proj", transposed=False),
            pooled=clone.final_ln_after_pool or clone.attn_pool is not None,
        )


@register_adapter("open_clip.timm_model:TimmModel")
class OpenClipTimmAdapter(OpenClipTransform):
    """Hooks a timm trunk inside open_clip, with open_clip's projection after it."""

    def hook(self, clone: Any) -> Tower:
        """Hook the trunk by its own adapter; the representation is what comes after the projection."""
        trunk = find_adapter(clone.trunk).hook(clone.trunk)
        parts = {name: part for name, part in trunk.parts.items() if name != "hook_representation"}
        parts["hook_representation"] = point = CopyingHookPoint()
        clone.register_forward_hook(PooledTap(point))
        projection = clone.head._modules.get("proj")
        weights_out = trunk.weights_out if projection is None else Projection(projection, "weight", transposed=True)
        return replace(
            trunk, module=clone, parts=parts, weights_out=None if "mlp" in clone.head._modules else weights_out
        )


@register_adapter("open_clip.model:CLIP", "open_clip.model:CustomTextCLIP", "open_clip.coca_model:CoCa")
class WholeClipAdapter(Adapter):
    """Takes the image tower of a whole CLIP."""

    def tower_of(self, module: Any) -> nn.Module:
        """Return the image tower."""
        visual: nn.Module = module.visual
        return visual

    def hook(self, clone: nn.Module) -> Tower:
        """Hook the tower by its own adapter."""
        return find_adapter(clone).hook(clone)

    def transform(self, original: nn.Module, size: tuple[int, int] | None) -> Any:
        """Return the tower's transform."""
        return find_adapter(original).transform(original, size)
