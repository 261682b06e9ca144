"""Six small models of the paper's families: how they are built, and what their classifiers say."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import open_clip
import torch
from timm.layers import HybridEmbed
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from vitdecomp_lens.errors import UnknownNameError, near_matches
from vitdecomp_lens.testbed.drawing import SIDE
from vitdecomp_lens.testbed.scenes import ATTRIBUTES
from vitdecomp_lens.testbed.vocabulary import CONTEXT, END

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CLASSES = tuple(value for values in ATTRIBUTES.values() for value in values)  # of all attributes, in this order
GROUPS = {attribute: len(values) for attribute, values in ATTRIBUTES.items()}  # each attribute is a question of its own
COLUMN: dict[str, Any] = {
    "img_size": SIDE,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "num_classes": len(CLASSES),
}


def _clip() -> nn.Module:
    vision = open_clip.CLIPVisionCfg(image_size=SIDE, patch_size=8, width=64, layers=4, head_width=16)
    text = open_clip.CLIPTextCfg(context_length=CONTEXT, vocab_size=END + 1, width=64, heads=4, layers=2)
    model = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)
    open_clip.set_model_preprocess_cfg(model, {"size": SIDE, "mean": MEAN, "std": STD, "mode": "RGB"})
    return model


def _dino() -> nn.Module:
    """Three convolutions make its patches, as in timm's ViTs for MobileCLIP.

    Without labels, shapes are what is learned last; such a stem sees edges from the start (arXiv 2106.14881).
    """
    stem = ConvStem(
        channels=(24, 48, 64), stride=(2, 2, 2), kernel_size=(3, 3, 3), padding=(1, 1, 1), act_layer=nn.GELU
    )
    patches = partial(HybridEmbed, backbone=stem, proj=False)
    # The stem halves three times: its pixels are the patches, of 8 × 8 in the image.
    return VisionTransformer(**{**COLUMN, "num_classes": 0, "patch_size": 1}, embed_layer=patches)


def _swin() -> nn.Module:
    options: dict[str, Any] = {"img_size": SIDE, "patch_size": 4, "window_size": 6, "num_classes": len(CLASSES)}
    return SwinTransformer(embed_dim=48, depths=(2, 2), num_heads=(3, 6), drop_path_rate=0.0, **options)


def _maxvit() -> nn.Module:
    cfg = MaxxVitCfg(
        embed_dim=(32, 64),
        depths=(1, 2),
        stem_width=16,
        block_type=("M", "M"),
        conv_cfg=MaxxVitConvCfg(expand_ratio=2),
        transformer_cfg=MaxxVitTransformerCfg(window_size=(6, 6), grid_size=(6, 6), dim_head=16, expand_ratio=2),
    )
    return MaxxVit(cfg, img_size=SIDE, num_classes=len(CLASSES))


BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "clip": _clip,
    "deit": lambda: VisionTransformer(**COLUMN),
    "dino": _dino,
    "reg": lambda: VisionTransformer(**COLUMN, class_token=False, reg_tokens=4, global_pool="avg"),
    "swin": _swin,
    "maxvit": _maxvit,
}


def build(name: str, *, seed: int = 0) -> nn.Module:
    """One of the models before its training.

    Raises:
        UnknownNameError: If there is no such model.
    """
    if name not in BUILDERS:
        raise UnknownNameError(f"The testbed has no model {name!r}; {near_matches(name, BUILDERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = BUILDERS[name]()
    if name != "clip":
        model.pretrained_cfg = {
            "input_size": (3, SIDE, SIDE),
            "mean": MEAN,
            "std": STD,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "num_classes": model.num_classes,
            "label_names": list(CLASSES) if name != "dino" else [],
            "label_groups": GROUPS if name != "dino" else {},
        }
    built: nn.Module = model
    return built


def normalised(images: Tensor) -> Tensor:
    """Bytes as the models take them."""
    return (images.float() / 255 - MEAN[0]) / STD[0]
