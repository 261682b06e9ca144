"""A catalogue of small random models whose tokens lie in windows or are merged between stages.

Each entry of `STAGED_MODELS` is a function without arguments that returns a model in evaluation mode, every parameter
and running statistic moved off its initial value. `SIZES` has the image size of each, `OVERLAP` by how many patches a
pixel may reach beyond its own where patch embeddings overlap.
"""

from collections.abc import Callable, Collection
from functools import cache, partial

import pytest
import torch
from timm.models.hiera import Hiera
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from tiny_models import perturb
from torch import nn

from vitdecomp_lens import HookedViT

SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
WIDE_SWIN = {**SWIN, "img_size": (36, 28), "depths": (2, 2, 2), "num_heads": (2, 2, 4)}  # merging pads, too
MAXVIT = {"embed_dim": (8, 16), "depths": (1, 2), "block_type": ("M", "M"), "stem_width": 8}
COATNET = {"embed_dim": (8, 12, 16), "depths": (1, 1, 2), "block_type": ("C", "C", "T"), "stem_width": 8}
HIERA = {
    "img_size": (64, 64),
    "embed_dim": 8,
    "num_heads": 1,
    "stages": (1, 1, 2),
    "q_pool": 2,
    "mask_unit_size": (4, 4),
}


def _made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = perturb(make()).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def _swin(cls: type[nn.Module] = SwinTransformer, **options) -> Callable[[], nn.Module]:
    return partial(_made, partial(cls, **{**SWIN, "num_classes": 5, **options}))


def _maxxvit(
    *,
    blocks: dict = MAXVIT,
    conv: dict | None = None,
    transformer: dict | None = None,
    head: int | None = None,
    size: int | tuple[int, int] = 64,
) -> Callable[[], nn.Module]:
    cfg = MaxxVitCfg(
        **blocks,
        conv_cfg=MaxxVitConvCfg(**(conv or {})),
        transformer_cfg=MaxxVitTransformerCfg(**{"dim_head": 4, "partition_ratio": 16, **(transformer or {})}),
        head_hidden_size=head,
    )
    return partial(_made, partial(MaxxVit, cfg, img_size=size, num_classes=5))


def _hiera(**options) -> Callable[[], nn.Module]:
    return partial(_made, partial(Hiera, **{**HIERA, "num_classes": 5, **options}))


STAGED_MODELS: dict[str, Callable[[], nn.Module]] = {
    "swin": _swin(),
    "swin_padded": _swin(img_size=28),
    "swin_padded_one_way": _swin(img_size=(32, 40)),
    "swin_merging_pads": _swin(**WIDE_SWIN),
    "swin_one_window": _swin(img_size=16, window_size=8),
    "swin_v2": _swin(SwinTransformerV2),
    "swin_v2_padded": _swin(SwinTransformerV2, img_size=28),
    "swin_v2_not_square": _swin(SwinTransformerV2, **{**SWIN, "img_size": (32, 48), "pretrained_window_sizes": (8, 8)}),
    "swin_v2_cr": _swin(SwinTransformerV2Cr),
    "swin_v2_cr_not_square": _swin(
        SwinTransformerV2Cr, img_size=(32, 64), extra_norm_stage=True, extra_norm_period=2, init_values=0.1
    ),
    "swin_v2_cr_by_ratio": _swin(SwinTransformerV2Cr, window_size=None, window_ratio=4, extra_norm_stage=True),
    "swin_v2_cr_any_size": _swin(SwinTransformerV2Cr, strict_img_size=False),
    "maxvit": _maxxvit(),
    "maxvit_tf": _maxxvit(
        conv={"padding": "same"}, transformer={"rel_pos_type": "bias_tf", "head_first": False}, head=16
    ),
    "maxvit_rmlp_not_square": _maxxvit(
        conv={"attn_layer": "se", "attn_early": False},
        transformer={"rel_pos_type": "mlp", "rel_pos_dim": 8, "init_values": 0.1, "partition_ratio": 16},
        size=(64, 96),
    ),
    "maxxvit_convnext": _maxxvit(conv={"block_type": "convnext", "init_values": 0.1}, transformer={"init_values": 0.1}),
    "maxvit_channels_first": _maxxvit(transformer={"use_nchw_attn": True, "head_first": False}),
    "maxvit_grid_only": _maxxvit(transformer={"no_block_attn": True}),
    "maxvit_parallel": _maxxvit(blocks={**MAXVIT, "block_type": ("PM", "PM")}),
    "coatnet": _maxxvit(blocks=COATNET, transformer={"window_size": (8, 8)}),
    "coatnet_rmlp": _maxxvit(
        blocks=COATNET,
        conv={"stride_mode": "pool", "attn_early": True},
        transformer={"rel_pos_type": "mlp", "rel_pos_dim": 8, "expand_first": False, "head_first": False},
    ),
    "hiera": _hiera(),
    "hiera_not_square": _hiera(img_size=(64, 96), init_values=0.1),
    "hiera_windowed_positions": _hiera(abs_win_pos_embed=True, global_pos_size=(7, 7)),
    "hiera_pooled_before": _hiera(use_expand_proj=False, mask_unit_attn=(True, False, False)),
}

SIZES = {
    "swin_padded": (28, 28),
    "swin_padded_one_way": (32, 40),
    "swin_merging_pads": (36, 28),
    "swin_one_window": (16, 16),
    "swin_v2_padded": (28, 28),
    "swin_v2_not_square": (32, 48),
    "swin_v2_cr_not_square": (32, 64),
    "maxvit_rmlp_not_square": (64, 96),
    "hiera_not_square": (64, 96),
}

# One of each kind of window, stage and read-out: what is slow runs over these, and over all with ``-m sweep``.
ONE_OF_EACH_KIND = frozenset(
    [
        "swin_padded",
        "swin_v2_padded",
        "swin_v2_cr_by_ratio",
        "maxvit_tf",
        "coatnet_rmlp",
        "hiera_not_square",
    ]
)

OVERLAP = {"max": 4, "coa": 4, "hie": 1}


# Hiera's pooling takes a maximum for each channel, which is exact by the slow way only, and said so.
_SLOW = pytest.mark.filterwarnings("ignore:aten..amax:vitdecomp_lens.errors.VitDecompWarning")


def parametrized(*, swept: bool = False, of: Collection[str] = ONE_OF_EACH_KIND) -> list:
    """All names as parameters of a test; of a slow one, those that are not one of each kind belong to the sweep."""
    return [
        pytest.param(
            name,
            marks=[
                *([_SLOW] if name.startswith("hiera") else []),
                *([pytest.mark.sweep] if swept and name not in of else []),
            ],
        )
        for name in sorted(STAGED_MODELS)
    ]


def size_of(name: str) -> tuple[int, int]:
    """Height and width of the images of a model."""
    return SIZES.get(name, (32, 32) if name.startswith("swin") else (64, 64))


def shared(name: str, dtype: torch.dtype = torch.float64) -> tuple[HookedViT, torch.Tensor]:
    """A hooked model and images, for tests that leave the model as it is: what takes time is to trace it."""
    return _shared(name, dtype)


@cache
def _shared(name: str, dtype: torch.dtype) -> tuple[HookedViT, torch.Tensor]:
    return HookedViT(STAGED_MODELS[name]().to(dtype)), images_for(name, dtype=dtype)


def images_for(name: str, batch: int = 2, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random images that a model of the catalogue takes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size_of(name), generator=generator, dtype=torch.float64).to(dtype)
