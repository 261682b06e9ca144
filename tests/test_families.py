"""A small member of each family of timm: whatever its read-out passes is passed exactly, whichever way.

Two cuts: the default one, at what is nonlinear and met first, and one at every nonlinear output of the graph, for which
gates and maxima on the stream are passed too.
"""

import math
import warnings
from functools import lru_cache, partial

import pytest
import timm
import torch
from function_oracle import contributions
from timm.models.focalnet import FocalNet
from timm.models.gcvit import GlobalContextVit
from timm.models.levit import Levit
from timm.models.metaformer import (
    Attention,
    GroupNorm1,
    GroupNorm1NoBias,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    SepConv,
)
from timm.models.mlp_mixer import Affine, GatedMlp, GluMlp, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.nest import Nest
from timm.models.tnt import TNT
from timm.models.vitamin import VitCfg, VitConvCfg
from timm.models.volo import VOLO
from torch import nn

from vitdecomp_lens import attribute, decompose
from vitdecomp_lens.errors import VitDecompWarning
from vitdecomp_lens.frozen.rules import classify
from vitdecomp_lens.frozen.trace import trace
from vitdecomp_lens.frozen.walk import walk
from vitdecomp_lens.traced import Traced

TINY = {"img_size": 32, "embed_dim": 16}
COLUMN = {**TINY, "patch_size": 8, "depth": 2, "num_heads": 2}
WINDOWED = {**TINY, "patch_size": 4, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4)}
MIXER = {**TINY, "patch_size": 8, "num_blocks": 2}
PYRAMID = {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (1, 2), "mlp_ratios": (2, 2), "sr_ratios": (4, 2)}
INNER = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "inner_dim": 8, "num_heads_inner": 2}
LEVIT = {"img_size": 64, "embed_dim": (16, 24), "key_dim": 4, "depth": (1, 1), "num_heads": (2, 2)}
META = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 32)}
FOCAL = {"depths": (1, 1), "embed_dim": 8, "focal_levels": (2, 2), "focal_windows": (3, 3)}
COAT = {"img_size": 32, "patch_size": 4, "serial_depths": (1, 1, 1, 1), "num_heads": 8}
MERGING = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
WIDTHS = {"widths": (8, 8, 8, 16, 16), "depths": (1, 1, 1, 1, 1), "head_dim": 8, "head_widths": (32, 24)}
LISTS = {"width_list": (8, 8, 8, 16, 16), "depth_list": (0, 1, 1, 1, 1), "head_widths": (32, 24)}


def registered(name, size=32, **options):
    return partial(timm.create_model, name, num_classes=5, **options), size


def built(cls, size=32, *first, **options):
    return partial(cls, *first, num_classes=5, **options), size


def mvit(size, **options):
    def make():
        cfg = MultiScaleVitCfg(embed_dim=8, num_heads=1, stride_kv_adaptive=(2, 2), **options)
        return MultiScaleVit(cfg, img_size=(size, size), num_classes=5)

    return make, size


def naflex(**options):
    cfg = NaFlexVitCfg(patch_size=8, embed_dim=16, depth=2, num_heads=2, **options)
    return partial(NaFlexVit, cfg, num_classes=5), 32


def vitamin():
    conv = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    cfg = VitCfg(embed_dim=(8, 8, 16), depths=(1, 1, 1), stem_width=8, conv_cfg=conv, head_type="1d")
    return registered("vitamin_small_224", 64, img_size=64, embed_dim=16, depth=2, num_heads=2, embed_cfg=cfg)


FAMILIES = {
    "vision_transformer": registered("vit_tiny_patch16_224", **COLUMN),
    "vision_transformer_hybrid": registered("vit_tiny_r_s16_p8_224", 64, img_size=64, embed_dim=24, depth=2),
    "vision_transformer_relpos": registered("vit_relpos_small_patch16_224", **COLUMN),
    "vision_transformer_sam": registered(
        "samvit_base_patch16",
        64,
        **{**COLUMN, "img_size": 64},
        window_size=4,
        neck_chans=12,
        global_attn_indexes=(1,),
    ),
    "deit": registered("deit_tiny_distilled_patch16_224", **COLUMN),
    "eva": registered("eva02_tiny_patch14_224", **COLUMN),
    "beit": registered("beit_base_patch16_224", **COLUMN),
    "swin_transformer": registered("swin_tiny_patch4_window7_224", **WINDOWED),
    "swin_transformer_v2": registered("swinv2_tiny_window8_256", **WINDOWED),
    "swin_transformer_v2_cr": registered("swinv2_cr_tiny_224", **WINDOWED),
    "maxxvit": registered("test_maxvit", 160),
    "coatnet": registered("coatnet_pico_rw_224", 64, img_size=64),
    "cait": registered("cait_xxs24_224", **COLUMN, depth_token_only=1),
    "xcit": registered("xcit_nano_12_p16_224", **COLUMN, cls_attn_layers=1),
    "crossvit": registered(
        "crossvit_tiny_240",
        48,
        img_size=48,
        img_scale=(1.0, 1.0),
        patch_size=(8, 16),
        embed_dim=(16, 32),
        num_heads=(2, 2),
        depth=((1, 1, 0), (1, 1, 0)),
    ),
    "mvitv2": mvit(64, depths=(1, 1, 1), stride_q=((1, 1), (2, 2), (2, 2))),
    "mvitv2 with a class token": mvit(32, depths=(1, 1), stride_q=((1, 1), (2, 2)), use_cls_token=True),
    "hiera": registered(
        "hiera_tiny_224", 64, img_size=64, embed_dim=8, stages=(1, 1, 2), q_pool=2, mask_unit_size=(4, 4)
    ),
    "hieradet_sam2": registered(
        "sam2_hiera_tiny",
        64,
        embed_dim=8,
        stages=(1, 1, 2, 1),
        global_att_blocks=(3,),
        window_spec=(8, 4, 4, 2),
        global_pos_size=(4, 4),
    ),
    "davit": registered("davit_tiny", 64, depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2), window_size=4),
    "twins pcpvt": registered("twins_pcpvt_small", 64, img_size=64, **PYRAMID),
    "twins svt": registered("twins_svt_small", 64, img_size=64, **{**PYRAMID, "depths": (2, 2)}, wss=(4, 4)),
    "pvt_v2": registered("pvt_v2_b0", 64, **PYRAMID),
    "pvt_v2 linear": registered("pvt_v2_b2_li", 64, **PYRAMID),
    "naflexvit": naflex(global_pool="avg", pos_embed="factorized", class_token=True, reg_tokens=2),
    "naflexvit pooled by attention": naflex(global_pool="map"),
    "pit": registered("pit_ti_224", img_size=32, patch_size=8, stride=4, base_dims=(8, 8), depth=(1, 1), heads=(1, 2)),
    "tiny_vit": registered(
        "tiny_vit_5m_224", 64, embed_dims=(8, 16), depths=(1, 2), num_heads=(2, 2), window_sizes=(4, 4)
    ),
    "volo": built(
        VOLO,
        32,
        (1, 1),
        img_size=32,
        stem_hidden_dim=8,
        embed_dims=(16, 16),
        num_heads=(2, 2),
        downsamples=(True, False),
        outlook_attention=(True, False),
    ),
    "nest": built(Nest, img_size=32, num_levels=2, embed_dims=(8, 16), num_heads=(2, 2), depths=(1, 1)),
    "coat lite": registered("coat_lite_tiny", **COAT, embed_dims=(8, 8, 16, 16)),
    "coat": registered("coat_tiny", **COAT, embed_dims=(8, 8, 8, 8), parallel_depth=1),
    "convit": registered("convit_tiny", **{**COLUMN, "embed_dim": 32, "num_heads": 4}, local_up_to_layer=1),
    "tnt": built(TNT, **INNER, num_heads_outer=2),
    "tnt legacy": built(TNT, **INNER, num_heads_outer=2, legacy=True),
    "levit": built(Levit, 64, **LEVIT),
    "levit of convolutions": built(Levit, 64, **LEVIT, use_conv=True),
    "gcvit": built(
        GlobalContextVit,
        64,
        img_size=64,
        depths=(1, 1, 1, 1),
        embed_dim=8,
        num_heads=(1, 2, 2, 2),
        window_ratio=None,
        window_size=(4, 4, 4, 2),
        layer_scale=0.1,
    ),
    "focalnet": built(FocalNet, **FOCAL),
    "focalnet, norms behind": built(
        FocalNet, **FOCAL, use_post_norm=True, use_overlap_down=True, normalize_modulator=True, layerscale_value=0.1
    ),
    "poolformer": built(
        MetaFormer,
        64,
        **META,
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=0.1,
        res_scale_init_values=None,
        use_mlp_head=False,
    ),
    "poolformer v2": built(MetaFormer, 64, **META, norm_layers=GroupNorm1NoBias, use_mlp_head=False),
    "convformer": built(MetaFormer, 64, **META, token_mixers=SepConv, norm_layers=LayerNorm2dNoBias),
    "caformer": built(
        MetaFormer,
        64,
        **{**META, "dims": (8, 8, 32, 32)},
        token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
    ),
    "mixer": built(MlpMixer, **MIXER),
    "gmixer": built(MlpMixer, **MIXER, mlp_ratio=(1.0, 4.0), mlp_layer=GluMlp, act_layer=nn.SiLU),
    "resmlp": built(MlpMixer, **MIXER, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine),
    "gmlp": built(MlpMixer, **MIXER, mlp_ratio=6, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp),
    "vitamin": vitamin(),
    "efficientformer": registered("efficientformer_l1", 224, depths=(1, 1, 1, 2), embed_dims=(8, 8, 8, 16), num_vit=1),
    "efficientformer_v2": registered(
        "efficientformerv2_s0",
        64,
        img_size=64,
        depths=(1, 1, 1, 2),
        embed_dims=(8, 8, 16, 16),
        num_vit=1,
        mlp_ratios=(2.0, 2.0, 2.0, 2.0),
    ),
    "mobilevit": registered("mobilevit_xxs", 64),
    "mobilevit v2": registered("mobilevitv2_050", 64),
    "edgenext": registered("edgenext_xx_small", 64, depths=(1, 1, 2, 1), dims=(8, 16, 16, 32), heads=(2, 2, 2, 2)),
    "convnext": registered("test_convnext", 64),
    "convnext v2": registered("convnextv2_atto", 64, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "convnext of RMS norms": registered("convnext_atto_rms", 64, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "fastvit": registered(
        "fastvit_mci0",
        64,
        layers=(1, 1),
        embed_dims=(16, 32),
        mlp_ratios=(2, 2),
        token_mixers=("repmixer", "attention"),
        downsamples=(False, True),
        se_downsamples=(False, True),
        pos_embs=(None, None),
    ),
    "repvit": registered("repvit_m0_9", 64, embed_dim=(8, 16), depth=(1, 1)),
    "efficientvit_mit": registered("efficientvit_b0", 64, **WIDTHS),
    "efficientvit_mit large": registered("efficientvit_l1", 64, **WIDTHS),
    "efficientvit_msra": registered(
        "efficientvit_m0",
        64,
        img_size=64,
        embed_dim=(8, 16, 16),
        key_dim=(4, 4, 4),
        depth=(1, 1, 1),
        num_heads=(2, 2, 2),
        window_size=(4, 4, 4),
    ),
    "inception_next": registered("inception_next_atto", 64, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "rdnet": registered(
        "rdnet_tiny",
        64,
        growth_rates=(8, 8),
        num_blocks_list=(2, 2),
        block_type=("Block", "BlockESE"),
        is_downsample_block=(None, True),
        num_init_features=8,
    ),
    "nextvit": registered("nextvit_small", 64, depths=(1, 1, 5, 2)),
    "shvit": registered("shvit_s1", 64, embed_dim=(16, 16, 32), depth=(1, 1, 1), partial_dim=(8, 8, 8)),
    "starnet": registered("starnet_s050", 64, depths=(1, 1, 1, 1), base_dim=8),
    "swiftformer": registered("swiftformer_xs", 64, layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16)),
    "csatv2": registered("csatv2", 64, dims=(8, 8, 16, 16), depths=(1, 1, 2, 2), transformer_depths=(0, 0, 1, 1)),
    "gemma4_vit": registered(
        "gemma4_vit_167m",
        48,
        **{**COLUMN, "img_size": 48},
        head_dim=8,
        intermediate_size=24,
        position_embedding_size=64,
    ),
    "qwen3_vit": registered("qwen3_vit_88m", **MERGING, pos_embed_grid_size=8),
    "qwen3_vit, merged": registered("qwen3_vit_88m_merge", **MERGING, pos_embed_grid_size=8),
    "deepseek_vit": registered("deepseek_vit_412m", 48, **{**COLUMN, "img_size": 48}),
    "visformer": registered(
        "visformer_tiny", 64, img_size=64, init_channels=8, embed_dim=16, depth=(1, 1, 1), num_heads=2
    ),
    "sequencer": registered(
        "sequencer2d_s",
        64,
        img_size=64,
        layers=(1, 1, 1, 1),
        embed_dims=(8, 16, 16, 16),
        hidden_sizes=(4, 8, 8, 8),
    ),
    "mambaout": registered("test_mambaout", 64),
    "iformer": registered("iformer_t", 64, dims=(8, 8, 16, 16), depths=(1, 1, 10, 6)),
    "lowformer": registered("lowformer_b0", 64, **LISTS),
    "cpubone": registered("cpubone_nano", 64, **LISTS),
    "efficientvim": registered("efficientvim_m1", 64, embed_dim=(16, 16, 32), depths=(1, 1, 1), state_dim=(9, 4, 4)),
    "fasternet": registered("fasternet_t0", 64, embed_dim=8, depths=(1, 1, 1, 1), feature_dim=24),
    "convmixer": built(timm.models.convmixer.ConvMixer, dim=16, depth=2, kernel_size=5, patch_size=4),
    "resnet": registered("test_resnet", 64),
    "efficientnet": registered("test_efficientnet", 64),
    "byobnet": registered("test_byobnet", 64),
    "byoanet": registered("sebotnet33ts_256", 256),
    "nfnet": registered("test_nfnet", 64),
}

QUICK = [
    "mvitv2 with a class token",
    "hieradet_sam2",
    "volo",
    "convit",
    "tnt",
    "resmlp",
    "gmlp",
    "sequencer",
]
# Whose heads end in an activation function: with it, nothing before has a share of its own.
BENT = {"fasternet": "act", "inception_next": "head.act", "mambaout": "head.pre_logits.act"}
# Computes norms in single precision whatever it is asked for: in double precision it rounds, which no map does.
SINGLE = {"deepseek_vit"}
# Whose pairs become too many, or meet a maximum: at every cut, and at that of all nonlinear outputs besides.
ALWAYS_SLOW = {
    "convformer",
    "csatv2",
    "davit",
    "efficientformer",
    "efficientvim",
    "gcvit",
    "iformer",
    "mvitv2",
    "poolformer",
    "poolformer v2",
    "starnet",
    "swiftformer",
}
SLOW = {
    "default": ALWAYS_SLOW,
    "everything": ALWAYS_SLOW | {"coatnet", "convnext v2", "hiera", "hieradet_sam2", "nest", "shvit"},
}


@lru_cache(maxsize=1)
def member(name):
    """A model with parameters and running statistics moved off their initial values, and two images."""
    make, size = FAMILIES[name]
    dtype = torch.float32 if name in SINGLE else torch.float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        amount = 0.1 if parameter.numel() == max([1, *parameter.shape]) else 0.02
        parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
        if buffer_name.endswith("running_var"):
            buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.to(dtype), torch.randn(2, 3, size, size, generator=generator).to(dtype)


def at_all_nonlinear_outputs(graph):
    """The cut whose points are all sources and patterns, and what reads the images."""
    passages = {n: classify(n, graph.live) for n in graph.nodes if n in graph.live and n.op == "call_function"}
    points = {
        f"{number}": node
        for number, (node, passage) in enumerate(passages.items())
        if isinstance(node.meta.get("val"), torch.Tensor)
        and (passage.kind in ("source", "pattern") or graph.images in passage.through)
    }
    return walk(graph.nodes, graph.root, graph.live, points, from_images=graph.from_images)


def check(graph, cut, x, total, *, slow):
    """Contributions sum to the whole, and some of them alone are what the replay gives for them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        written = graph.push(cut, x)
    assert any(issubclass(w.category, VitDecompWarning) for w in caught) == slow
    tolerance = (1e-5 if x.dtype == torch.float32 else 1e-10) * float(total.abs().max())
    assert math.isfinite(tolerance)
    torch.testing.assert_close(sum(written.values()), total, rtol=0, atol=tolerance)
    recorded = graph.record(x)
    nothing = graph.replay(cut, recorded, {})
    for name in list(cut.points)[:: max(1, len(cut.points) // 4)]:
        alone = graph.replay(cut, recorded, {name: recorded[cut.points[name]]}) - nothing
        torch.testing.assert_close(written[name], alone.flatten(1), rtol=0, atol=tolerance)
    constants = [value for name, value in written.items() if name not in cut.points]
    torch.testing.assert_close(sum(constants, torch.zeros_like(total)), nothing.flatten(1), rtol=0, atol=tolerance)


def features(model, images):
    """What the classifier reads."""
    found = model.forward_head(model.forward_features(images), pre_logits=True)
    return torch.cat(found, -1) if isinstance(found, list | tuple) else found


each_family = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.sweep) for name in FAMILIES],
    scope="module",  # all tests of one come one after the other: what takes time is to trace it
)


@each_family
def test_a_family_is_decomposed_exactly_at_what_is_met_first_and_at_everything_nonlinear(name):
    model, x = member(name)
    graph = trace(model, x, of=features)  # not what enters an activation that these may end in
    total = features(model, x)
    cut = graph.cut()
    assert cut.complete
    assert not cut.unknown
    check(graph, cut, x, total, slow=name in SLOW["default"])
    everything = at_all_nonlinear_outputs(graph)
    assert everything.complete
    check(graph, everything, x, total, slow=name in SLOW["everything"])


def before(path, model, images):
    """What enters one of the modules behind the pooling."""
    entered = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    features(model, images)
    handle.remove()
    return entered[0].flatten(1)


@each_family
@pytest.mark.parametrize("by", ["layer", "head"])
def test_scores_are_derivatives_of_the_eager_original(name, by):
    model, x = member(name)
    read = partial(before, BENT[name]) if name in BENT else features
    direction = torch.randn(read(model, x).shape[-1], generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VitDecompWarning)  # slow ones, and those whose stream is bent
        scores = attribute(model, x, direction[None], by=by, of=read)
        vectors = decompose(model, x, by=by, of=read)  # the slow way makes them otherwise
    traced = Traced.of(model, trace(model, x, of=read))
    recorded = traced.graph.record(x)
    points = traced.component_points(by)
    places = {point.hook: (recorded[traced.graph.points[point.hook]], point.axis) for point in points}
    expected = contributions(read, model, x, direction, places)
    tolerance = (1e-5 if name in SINGLE else 1e-10) * float(scores.total.abs().max() + scores.values.abs().max())
    for found in (scores, vectors.project(direction[None])):
        for point in points:
            several = expected[point.hook]
            alone = torch.stack([found[component.label][:, 0] for component in point.components(len(several))])
            torch.testing.assert_close(alone, several, rtol=0, atol=tolerance)
