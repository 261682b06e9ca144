"""The sweep over all models: its own functions, and one small member of each family of timm."""

import importlib.util
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "supported.py"


def _script():
    spec = importlib.util.spec_from_file_location("supported", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["supported"] = module  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


supported = _script()


def _run(name, family):
    return supported.Run(supported.plan(name, family)).wait()


# Started while tests are collected: once a test has differentiated something, no fork of its process may.
_FRESH = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
_FRESH.submit(int).result()


def run(name, family):
    """A run from a process that has computed nothing."""
    return _FRESH.submit(_run, name, family).result()


# The smallest name of each module.
MEMBERS = {
    "beit": "beit_base_patch16_224",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "pit": "pit_ti_224",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "repvit": "repvit_m1",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "twins": "twins_svt_small",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "xcit": "xcit_nano_12_p8_224",
}
# Whose blocks hand on what an activation function returns, so that their branches lie behind it.
STOPPED = {
    "convmixer": "aten::relu",
    "cpubone": "aten::hardswish",
    "crossvit": "aten::gelu",
    "edgenext": "aten::gelu",
    "efficientvim": "aten::relu",
    "efficientvit_mit": "aten::hardswish",
    "efficientvit_msra": "aten::relu",
    "fastvit": "aten::gelu",
    "levit": "aten::hardswish",
    "lowformer": "aten::hardswish",
    "mobilenetv5": "aten::gelu",
    "mobilevit": "aten::silu",
    "shvit": "aten::relu",
    "tiny_vit": "aten::gelu",
}


def record(**found):
    usual = {"gap": 1e-7, "found": 10, "branches": 10, "stops": [], "warnings": [], "way": "traced", "seconds": 1.0}
    return {"key": "k", "run": "a_model", "step": "done", "cost": 1.5, "components": 12, "image": 128, **usual, **found}


def planned(name="a_model", family="beit", key="k", **found):
    return supported.Planned(name, family, key, **{"parameters": 10, "sizes": [128], **found})


# --- what there is ------------------------------------------------------------------------------------------------


def test_every_module_of_timm_is_swept_or_left_out_for_a_reason():
    swept = supported.MODULES.split()
    left_out = [module for modules in supported.LEFT_OUT.values() for module in modules.split()]
    listed = [*swept, *left_out]
    assert len(listed) == len(set(listed))
    of_timm = {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()}
    assert of_timm <= set(listed)
    assert all(timm.list_models(module=module) for module in swept)


def test_towers_of_open_clip_are_named_with_their_kind():
    families = supported.names()
    assert families["open_clip:ViT-B-16"] == "open_clip: ViT"
    assert families["open_clip:RN50"] == "open_clip: ResNet"
    assert families["open_clip:ViT-B-16-SigLIP"] == "open_clip: vision_transformer of timm"
    assert families["test_vit"] == "vision_transformer"


# --- plans --------------------------------------------------------------------------------------------------------


def test_a_model_is_what_its_settings_and_shapes_are_and_not_its_weights():
    def model(name, **options):
        return supported.build(name, **options)

    one = supported.fingerprint(model("test_vit"))
    assert supported.fingerprint(model("test_vit")) == one
    assert supported.fingerprint(model("test_vit2")) != one
    assert supported.fingerprint(model("test_vit", global_pool="avg")) != one
    swin = {"img_size": 64, "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
    windows = [model("swin_tiny_patch4_window7_224", window_size=size, **swin) for size in (4, 8)]
    assert len({supported.fingerprint(window) for window in windows}) == 2


def test_names_that_differ_in_image_size_alone_share_a_run():
    small, large = (
        supported.plan(name, "vision_transformer") for name in ("vit_tiny_patch16_224", "vit_tiny_patch16_384")
    )
    assert small.key == large.key
    assert (small.sizes[0], small.sized) == (128, True)
    assert small.sizes[-1] == 224
    assert supported.plan("deit_tiny_patch16_224", "deit").key == small.key
    assert supported.plan("vit_small_patch16_224", "vision_transformer").key != small.key


def test_images_have_whole_patches_and_may_be_small_where_any_size_will_do():
    dino = supported.plan("vit_small_patch14_dinov2", "vision_transformer")
    assert dino.sizes[0] == 140
    assert all(size % 14 == 0 for size in dino.sizes)
    pyramid = supported.plan("pvt_v2_b0", "pvt_v2")
    assert (pyramid.sizes[0], pyramid.sized) == (128, False)
    resnet = supported.plan("open_clip:RN50", "open_clip: ResNet")
    assert (resnet.sizes[0], resnet.sized) == (128, True)


def test_large_models_are_narrowed_or_left_out():
    giant = supported.plan("vit_giant_patch14_dinov2", "vision_transformer")
    assert giant.narrowed == 4
    assert giant.parameters <= supported.LARGE
    assert not giant.skipped
    xlarge = supported.plan("convnext_xxlarge", "convnext")
    assert "400 M" in xlarge.skipped


def test_a_name_that_cannot_be_made_is_said_and_not_raised():
    assert "cannot be made" in supported.plan("there_is_no_such_model", "beit").skipped


def test_everything_is_moved_off_its_initial_value():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    supported.move_off_initial_values(model)
    for name, value in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or not torch.isclose(value, before[name], atol=1e-6).any(), name


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), [("test_vit", "adapter"), ("test_convnext", "traced")])
def test_a_run_says_how_a_model_is_decomposed_how_exactly_and_how_much_of_it(name, way):
    found = run(name, "a family")
    assert found["way"] == way
    assert 0 < found["gap"] < 1e-5, found
    assert found["found"] == found["branches"] > 0
    assert found["components"] > found["found"]
    assert found["cost"] > 0
    assert supported.is_supported(found)
    json.dumps(found)


def test_a_tower_of_open_clip_is_run_by_itself(monkeypatch):
    vision = {"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {"width": 1 << 20}}
    monkeypatch.setattr(supported.open_clip, "get_model_config", {"small": config}.__getitem__)
    found = _run("open_clip:small", "open_clip: ViT")
    assert found["way"] == "adapter"
    assert found["branches"] == 4
    assert supported.is_supported(found)


def test_what_stops_a_model_is_said():
    found = run("test_resnet", "resnet")
    assert not supported.is_supported(found)
    assert "aten::relu" in supported.reason(found)


def test_a_process_that_takes_too_much_is_ended_and_the_sweep_goes_on(monkeypatch):
    monkeypatch.setattr(supported, "measure", lambda planned, tell: time.sleep(60))
    started = time.perf_counter()
    found = supported.Run(planned(), seconds=0.2).wait()
    assert time.perf_counter() - started < 30
    assert "longer than 0.2 s" in found["error"]
    assert "more than" in supported.Run(planned(), most_bytes=1).wait()["error"]


def test_a_process_that_dies_is_reported_with_the_step_it_had_reached(monkeypatch):
    def dies(planned, tell):
        tell({"step": "cost", "gap": 1e-7, "found": 10, "branches": 10})
        sys.exit(3)

    monkeypatch.setattr(supported, "measure", dies)
    found = supported.Run(planned()).wait()
    assert "code 3 (cost)" in found["error"]
    assert supported.is_supported(found)  # gap and coverage were measured before


def test_an_error_of_a_models_code_is_one_line(monkeypatch):
    def raises(planned, tell):
        raise ValueError("no\nsecond line")

    monkeypatch.setattr(supported, "measure", raises)
    assert supported.Run(planned()).wait()["error"] == "ValueError: no"


# --- checkpoint and page ------------------------------------------------------------------------------------------


def test_a_sweep_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(supported, "measure", lambda planned, tell: tell(record(key=planned.key, run=planned.name)))
    checkpoint = supported.Checkpoint(tmp_path / "found.jsonl")
    for name, key, parameters in [
        ("large", "a", 30),
        ("small", "b", 10),
        ("same_as_small", "b", 10),
        ("other", "c", 20),
    ]:
        checkpoint.add(plan=asdict(planned(name, key=key, parameters=parameters)))
    checkpoint.add(plan=asdict(planned("huge", key="d", skipped="over 400 M parameters")))
    assert [p.name for p in checkpoint.missing()] == ["small", "other", "large"]
    assert next(supported.sweep(checkpoint))["key"] == "b"
    with checkpoint.path.open("a") as file:
        file.write('{"record": {"key": "c", "ga')  # ended while writing
    again = supported.Checkpoint.read(checkpoint.path)
    assert [p.name for p in again.missing()] == ["other", "large"]
    assert [p.name for p in again.missing("lar")] == ["large"]
    assert len(list(supported.sweep(again, jobs=2))) == 2
    assert not supported.Checkpoint.read(checkpoint.path).missing()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, None),
        ({"gap": 2e-5}, "gap 2.0e-05"),
        ({"found": 8, "stops": ["aten::gelu in act: nonlinear"]}, "8 of 10 branches: aten::gelu in act: nonlinear"),
        ({"gap": float("nan")}, "gap nan"),
        ({"branches": 0, "found": 0}, "0 of 0 branches"),
    ],
)
def test_supported_means_gap_and_coverage(found, said):
    found = record(**found)
    assert supported.is_supported(found) == (said is None)
    assert said is None or supported.reason(found) == said


def test_the_page_counts_names_and_says_what_stops_them(tmp_path):
    checkpoint = supported.Checkpoint(tmp_path / "found.jsonl")
    names = [
        ("beit_a", "beit", "a"),
        ("beit_b", "beit", "a"),
        ("volo_a", "volo", "b"),
        ("open_clip:V", "open_clip: ViT", "c"),
    ]
    for name, family, key in names:
        checkpoint.add(plan=asdict(planned(name, family, key)))
    checkpoint.add(plan=asdict(replace(planned("beit_huge", key="h"), skipped="over 400 M parameters")))
    checkpoint.add(plan=asdict(planned("volo_later", "volo", "z")))
    checkpoint.add(record=record(key="a", warnings=["slow"]))
    checkpoint.add(record=record(key="b", found=3, stops=["aten::relu in act: nonlinear"]))
    checkpoint.add(record=record(key="c", way="adapter"))
    page = supported.page(checkpoint)
    assert "2 of 3 names of timm are supported (66.7 %)" in page
    assert "1 of 1 image towers of open_clip are supported (100.0 %)" in page
    assert "2 of 3 families" in page
    assert "Not run yet: 1 name" in page
    assert "| [beit](#beit) | 2 of 2 | 1 | 1 | traced |" in page
    assert "| volo_a | 3 of 10 branches: aten::relu in act: nonlinear |" in page
    assert "| beit_a + 1 | yes | traced, slow |" in page
    assert "- beit_a: beit_b" in page
    assert "Over 400 M parameters: beit_huge." in page
    assert f"](#{supported._anchor('open_clip: ViT')})" in page


# --- the families -------------------------------------------------------------------------------------------------


@pytest.mark.sweep
def test_there_is_a_member_of_each_module():
    assert sorted(MEMBERS) == sorted(supported.MODULES.split())
    assert all(name in timm.list_models(module=module) for module, name in MEMBERS.items())


@pytest.mark.sweep
@pytest.mark.parametrize("module", sorted(MEMBERS))
def test_a_small_member_of_each_family_is_supported(module):
    found = run(MEMBERS[module], module)
    assert "gap" in found, found
    assert found["gap"] < supported.GAP
    if module in STOPPED:
        assert not supported.is_supported(found)
        assert STOPPED[module] in supported.reason(found)
    else:
        assert supported.is_supported(found), supported.reason(found)
