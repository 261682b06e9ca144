"""A catalogue of small random vision transformers, one for each variant that is supported.

Each entry of `TINY_MODELS` is a function without arguments that returns a model in evaluation mode. Every
parameter is moved off its initial value, so that norms, LayerScale, biases and position embeddings matter.
`SIZES` has the image size of each.
"""

from collections.abc import Callable, Iterable
from functools import partial

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import QuickGELU
from open_clip.transformer import Transformer as OpenClipTransformer
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.layers import Attention as TimmAttention
from timm.layers import DiffAttention, GluMlp, HybridEmbed, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from timm.models.xcit import Xcit
from torch import nn

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}


def perturb(model: nn.Module, *, seed: int = 0, amount: float = 0.1) -> nn.Module:
    """Add noise to every parameter, with a generator of its own, and return the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return perturb(make())


def _timm(cls: type[nn.Module] = VisionTransformer, **options) -> Callable[[], nn.Module]:
    return partial(_seeded, partial(cls, **{**TINY, **options}))


def _xcit(**options) -> nn.Module:
    """An XCiT whose batch norms have running statistics of their own, as no fresh model has."""
    model = Xcit(**{**TINY, "cls_attn_layers": 2, "eta": 0.1, **options})
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def _open_clip(**options) -> Callable[[], nn.Module]:
    defaults = {
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "mlp_ratio": 2.0,
        "output_dim": 24,
        "attn_pooler_queries": 6,
        "attn_pooler_heads": 4,
    }
    return partial(_seeded, partial(OpenClipViT, **{**defaults, **options}))


def _tokens_first() -> nn.Module:
    model = _open_clip()()
    model.transformer = OpenClipTransformer(32, 2, 4, 2.0, batch_first=False)
    return perturb(model)


def _clip(vision: dict, *, quick_gelu: bool = False) -> nn.Module:
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu)


_CLIP_VISION = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32, "mlp_ratio": 2.0}
_TIMM_VISION = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": "linear"}


class GatedAttention(TimmAttention):
    """timm's attention with its gate on, which ``VisionTransformer`` has no option for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, gated=True, **kwargs)


class DualLambdaAttention(DiffAttention):
    """timm's differential attention with two scalars for λ, which ``VisionTransformer`` has no option for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, dual_lambda=True, **kwargs)


def _gated_eva() -> nn.Module:
    """EVA-02 with gated attention, which timm's blocks have an option for and ``Eva`` has none."""
    model = Eva(**TINY, use_rot_pos_emb=True)
    for number in range(2):
        model.blocks[number] = EvaBlock(32, 4, gated_attn=True, scale_attn_inner=True)
    return model


def _separate_bias_eva() -> nn.Module:
    """EVA whose attention adds its biases after the product, which timm's attention has an option for."""
    model = Eva(**TINY, use_post_norm=True)
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    return model


def _hybrid(**options) -> nn.Module:
    """A vision transformer behind a convolutional stem of stride 4, whose features are cut in patches of 2 × 2."""
    stem = ConvStem(channels=(8, 16), depth=2, kernel_size=3, stride=(2, 2), padding=1)
    return VisionTransformer(**{**TINY, "patch_size": 2, "embed_layer": partial(HybridEmbed, backbone=stem), **options})


_EVA02 = {"use_rot_pos_emb": True, "ref_feat_shape": (2, 2), "swiglu_mlp": True}
_DINOV3 = {
    "attn_type": "rope",
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "num_reg_tokens": 2,
    "init_values": 0.1,
    "use_fc_norm": False,
}

TINY_MODELS: dict[str, Callable[[], nn.Module]] = {
    "class_token": _timm(),
    "layer_scale": _timm(init_values=0.1),
    "mean_pool_fc_norm": _timm(global_pool="avg", class_token=False),
    "mean_pool_with_class_token": _timm(global_pool="avg", fc_norm=False),
    "max_pool": _timm(global_pool="max"),
    "no_pool": _timm(global_pool=""),
    "no_classifier": _timm(num_classes=0),
    "no_final_norm": _timm(final_norm=False),
    "no_biases": _timm(qkv_bias=False, proj_bias=False),
    "siglip": _timm(global_pool="map", class_token=False),
    "siglip_with_class_token": _timm(global_pool="map"),
    "prr_pool": _timm(global_pool="prr"),
    "distilled": _timm(VisionTransformerDistilled),
    "deit3": _timm(init_values=0.1, no_embed_class=True),
    "dinov2": _timm(init_values=0.1, mlp_layer=SwiGLUPacked, mlp_ratio=2.66667 * 2),
    "dinov2_reg": _timm(init_values=0.1, reg_tokens=2, no_embed_class=True),
    "swiglu": _timm(mlp_layer=SwiGLU, scale_mlp_norm=True),
    "glu": _timm(mlp_layer=GluMlp),
    "timm_clip": _timm(pre_norm=True, act_layer="quick_gelu"),
    "qk_norm": _timm(qk_norm=True),
    "inner_norms": _timm(scale_attn_norm=True, scale_mlp_norm=True, init_values=0.1),
    "gated_attention": _timm(attn_layer=GatedAttention, scale_attn_norm=True),
    "rms_norm": _timm(norm_layer=RmsNorm),
    "dynamic_size": _timm(dynamic_img_size=True),
    "dynamic_size_padded": _timm(dynamic_img_size=True, dynamic_img_pad=True),
    "no_positions": _timm(pos_embed="none"),
    "no_prefix_no_norm": _timm(global_pool="avg", class_token=False, fc_norm=False, final_norm=False),
    "post_norm": _timm(block_fn=ResPostBlock, init_values=0.1),
    "parallel_scaling": _timm(block_fn=ParallelScalingBlock, qk_norm=True, init_values=0.1),
    "parallel_scaling_no_bias": _timm(block_fn=ParallelScalingBlock, qkv_bias=False),
    "parallel_scaling_fused": _timm(block_fn=partial(ParallelScalingBlock, fuse_out_proj=True), init_values=0.1),
    "diff_parallel_scaling": _timm(block_fn=DiffParallelScalingBlock, qk_norm=True),
    "parallel_things": _timm(block_fn=ParallelThingsBlock, init_values=0.1),
    "diff_attention": _timm(attn_layer=DiffAttention, qk_norm=True, scale_attn_norm=True),
    "diff_attention_dual": _timm(attn_layer=DualLambdaAttention),
    "hybrid": partial(_seeded, _hybrid),
    "hybrid_dynamic": partial(_seeded, partial(_hybrid, dynamic_img_size=True, dynamic_img_pad=True)),
    "eva": _timm(Eva),
    "eva_post_norm": partial(_seeded, _separate_bias_eva),
    "eva_attention_pool": _timm(
        Eva,
        **{"attn_type": "rope", "use_rot_pos_emb": True, "rope_grid_indexing": "xy"},
        **{"global_pool": "map", "use_pre_transformer_norm": True, "use_fc_norm": False, "class_token": False},
    ),
    "eva_two_norms": _timm(Eva, use_fc_norm=True, use_post_transformer_norm=True, qkv_bias=False),
    "eva_no_positions": _timm(Eva, use_abs_pos_emb=False, class_token=False),
    "eva02": _timm(Eva, **_EVA02, scale_mlp=True, global_pool="token"),
    "eva02_clip": _timm(Eva, **_EVA02, scale_mlp=True, qkv_fused=False, scale_attn_inner=True),
    "eva02_dynamic": _timm(Eva, **_EVA02, dynamic_img_size=True, dynamic_img_pad=True),
    "eva02_gated": partial(_seeded, _gated_eva),
    "dinov3": _timm(Eva, **_DINOV3, qkv_bias=False),
    "dinov3_swiglu": _timm(Eva, **{**_DINOV3, "attn_type": "eva"}, swiglu_mlp=True, swiglu_align_to=8),
    "dinov3_dynamic": _timm(Eva, **_DINOV3, dynamic_img_size=True, attn_only_layer_scale=True),
    "rope_mixed": _timm(
        Eva, attn_type="rope", use_rot_pos_emb=True, rope_type="mixed", init_values=0.1, no_embed_class=True
    ),
    "rope_three_axes": _timm(
        Eva,
        attn_type="rope",
        use_rot_pos_emb=True,
        rope_type="mrope",
        qk_norm=True,
        norm_layer=RmsNorm,
        qkv_fused=False,
    ),
    "beit": _timm(Beit, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "beit_shared_bias": _timm(Beit, use_shared_rel_pos_bias=True, global_pool="token", qkv_bias=False),
    "beit_both_biases": _timm(
        Beit, use_rel_pos_bias=True, use_shared_rel_pos_bias=True, init_values=0.1, swiglu_mlp=True, scale_mlp=True
    ),
    "beit_no_bias": _timm(Beit, use_abs_pos_emb=True, scale_mlp=True),
    "relpos_mlp": _timm(VisionTransformerRelPos, init_values=0.1),
    "relpos_mlp_swin": _timm(VisionTransformerRelPos, rel_pos_type="mlp-swin", class_token=True, qk_norm=True),
    "relpos_table": _timm(VisionTransformerRelPos, rel_pos_type="bias", class_token=True, global_pool="token"),
    "relpos_shared": _timm(VisionTransformerRelPos, shared_rel_pos=True, fc_norm=True, init_values=None),
    "relpos_post_norm": _timm(
        VisionTransformerRelPos, block_fn=ResPostRelPosBlock, rel_pos_type="bias", init_values=0.1
    ),
    "cait": _timm(Cait, init_values=0.8),
    "cait_mean_pool": _timm(Cait, init_values=0.8, global_pool="avg"),
    "cait_no_biases": _timm(Cait, init_values=0.8, qkv_bias=False, depth_token_only=1),
    "xcit": partial(_seeded, _xcit),
    "xcit_tokens_norm": partial(_seeded, partial(_xcit, tokens_norm=True, qkv_bias=False)),
    "xcit_no_positions": partial(_seeded, partial(_xcit, use_pos_embed=False, cls_attn_layers=1)),
    "xcit_patch16": partial(_seeded, partial(_xcit, img_size=64, patch_size=16)),
    "xcit_mean_pool": partial(_seeded, partial(_xcit, global_pool="avg", tokens_norm=True)),
    "open_clip": _open_clip(),
    "open_clip_quick_gelu": _open_clip(act_layer=QuickGELU, ls_init_value=0.1),
    "open_clip_tokens_first": _tokens_first,
    "open_clip_mean_pool": _open_clip(pool_type="avg", final_ln_after_pool=True),
    "open_clip_no_pool": _open_clip(pool_type="none"),
    "open_clip_tokens_out": _open_clip(output_tokens=True, no_ln_pre=True),
    "open_clip_sin_cos": _open_clip(pos_embed_type="sin_cos_2d"),
    "open_clip_custom": _open_clip(block_type="custom"),
    "open_clip_custom_all": _open_clip(
        qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True, ls_init_value=0.1
    ),
    "open_clip_head_scale": _open_clip(scale_heads=True, scale_attn_inner=True, ls_init_value=0.1),
    "open_clip_pooler": _open_clip(attentional_pool=True),
    "open_clip_pooler_same_width": _open_clip(attentional_pool=True, output_dim=32),
    "open_clip_pooler_parallel": _open_clip(attentional_pool="parallel", output_dim=32),
    "open_clip_pooler_cascade": _open_clip(attentional_pool="cascade", output_dim=32),
    "open_clip_whole": partial(_seeded, partial(_clip, _CLIP_VISION, quick_gelu=True)),
    "open_clip_timm": partial(_seeded, partial(_clip, _TIMM_VISION)),
    "timm_test_vit": partial(_seeded, partial(timm.create_model, "test_vit", num_classes=10)),
}

SIZES = {"timm_test_vit": 160, "open_clip_timm": 160, "xcit_patch16": 64}


# One of each kind. What is slow runs over these by default, and over all with ``-m sweep``.
ONE_OF_EACH_KIND = frozenset(
    [
        "class_token",
        "mean_pool_with_class_token",
        "siglip",
        "distilled",
        "dinov2_reg",
        "swiglu",
        "qk_norm",
        "inner_norms",
        "gated_attention",
        "post_norm",
        "parallel_scaling",
        "parallel_things",
        "diff_attention",
        "rms_norm",
        "hybrid",
        "eva_post_norm",
        "eva02",
        "dinov3",
        "beit",
        "relpos_table",
        "cait",
        "xcit_tokens_norm",
        "open_clip",
        "open_clip_pooler",
        "open_clip_custom_all",
        "open_clip_tokens_first",
        "open_clip_whole",
    ]
)


def swept(names: Iterable[str]) -> list:
    """Names as parameters of a slow test: those that are not one of each kind belong to the sweep."""
    return [pytest.param(name, marks=() if name in ONE_OF_EACH_KIND else pytest.mark.sweep) for name in sorted(names)]


def images_for(name: str, batch: int = 3, *, seed: int = 1) -> torch.Tensor:
    """Random images that a model of the catalogue takes."""
    size = SIZES.get(name, 32)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
