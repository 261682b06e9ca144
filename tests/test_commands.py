"""The commands that work over data sets."""

import argparse
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from test_collect import contents, tiny
from timm.models.vision_transformer import VisionTransformer
from tiny_models import perturb

from vitdecomp_lens import HookedViT, testbed, weights
from vitdecomp_lens.certificate import WIDTH
from vitdecomp_lens.cli import main
from vitdecomp_lens.clip.alignment import Aligner, AlignmentReport
from vitdecomp_lens.collect import collect as collect_into
from vitdecomp_lens.commands import align
from vitdecomp_lens.commands.models import UNTRAINED, named_clip, origin_of
from vitdecomp_lens.commands.showing import Pace
from vitdecomp_lens.store import Store
from vitdecomp_lens.testbed.models import build
from vitdecomp_lens.testbed.scenes import Scenes


@pytest.fixture
def models(monkeypatch):
    """Models of the testbed's kinds that need no training, and how often each was asked for."""
    asked = []

    def load(name):
        asked.append(name)
        if name == "clip":
            return perturb(build("clip")).requires_grad_(False)
        torch.manual_seed(0)
        model = VisionTransformer(img_size=48, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=3)
        model.pretrained_cfg = build("deit").pretrained_cfg
        return perturb(model).requires_grad_(False)

    monkeypatch.setattr(testbed, "load_original", load)
    return asked


def test_scenes_are_collected_and_aligned(models, tmp_path, capsys):
    store, aligner = tmp_path / "store", tmp_path / "aligner.safetensors"
    collect = ["collect", "testbed:train:40", "--model", "testbed/deit", "--clip", "testbed/clip", "--out", str(store)]
    collect += ["--dtype", "float16", "--batch-size", "16", "--gather", "covariance", "--top", "2"]
    assert main(collect) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(r"Written to .*: 40 images in [\d.]+ s, 0 skipped\.", printed.err)
    assert models == ["deit", "clip"]
    collected = Store.open(store)
    assert collected.decomposition(slice(1)).values.dtype == torch.float16
    assert collected.gathered.covariance.shape[0] == len(collected.components)
    assert main(collect) == 2
    assert "There is a store" in capsys.readouterr().err
    before = contents(store)
    assert main([*collect, "--resume"]) == 0
    assert contents(store) == before
    capsys.readouterr()
    fit = ["align", str(store), "--out", str(aligner), "--method", "unconstrained", "--epochs", "2"]
    assert main(fit) == 0
    shown = capsys.readouterr().out
    fitted = Aligner.load(aligner)
    assert re.search(rf"cosine distance +│ +{fitted.fit_report.cosine_distance:.4g} │", shown)
    assert re.search(rf"norm order, images +│ +{fitted.fit_report.within:.2%} │", shown)
    assert "match rate" not in shown
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert fitted.components == collected.components
    assert fitted.space == collected.space
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["aligner.safetensors"]
    assert main(fit) == 2
    assert "already" in capsys.readouterr().err
    aligner.rename(tmp_path / "aligner.safetensors.checkpoint")
    assert main(fit) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_folder_with_an_unreadable_image(models, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.effect_noise((50, 50), 80).convert("RGB").save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    command = ["collect", str(tmp_path / "images"), "--model", "testbed/deit", "--out", str(tmp_path / "store")]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "'1.png' cannot be read" in said
    assert "(--unreadable skip)" in said
    assert "(--resume on the command line)" in said
    assert "Leave it out" not in said
    before = contents(tmp_path / "store")
    assert main([*command, "--unreadable", "skip"]) == 2
    assert "(--resume on the command line)" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--unreadable", "skip", "--resume"]) == 0
    assert "Skipped 1.png: " in capsys.readouterr().err
    assert contents(tmp_path / "store").items() > before.items()  # nothing was made anew
    command[-1] = str(tmp_path / "another")
    assert main([*command, "--unreadable", "skip", "--by", "layer", "--keep", "representations"]) == 0
    said = capsys.readouterr().err
    assert "2 images" in said
    assert "Skipped 1.png: " in said
    assert Store.open(tmp_path / "another").kept == ("representations",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["testbed:train", "--model", "testbed/deit"], "testbed:SPLIT:SIZE"),
        (["testbed:train:5:x", "--model", "testbed/deit"], "testbed:SPLIT:SIZE:SEED, whole numbers"),
        (["testbed:train:5:" + "9" * 20, "--model", "testbed/deit"], "testbed:SPLIT:SIZE:SEED, whole numbers"),
        (["testbed:test:0", "--model", "testbed/deit"], "at least one image; the Scenes is empty"),
        (["testbed:trian:5", "--model", "testbed/deit"], "did you mean 'train'"),
        (["nowhere", "--model", "testbed/deit"], "Expected a folder of images"),
        (["testbed:test:5", "--model", "ViT-B-16"], "add --open-clip"),
        (["testbed:test:5", "--model", "testbed/deit", "--clip-pretrained", "openai"], "give --clip NAME"),
        (["testbed:test:5", "--model", "testbed/deit", "--device", "cuda:77"], "is none"),
        (["testbed:test:5", "--model", "testbed/deit", "--clip", "ViT-B-32"], "Give --clip-pretrained TAG, such as"),
        (["testbed:test:5", "--model", "testbed/deit", "--clip", "ViT-B-33"], "did you mean 'ViT-B-3"),
        (
            ["testbed:test:5", "--model", "testbed/deit", "--clip", "testbed/clip", "--clip-pretrained", "openai"],
            "leave out --clip-pretrained",
        ),
        (["testbed:test:5", "--model", "testbed/deit", "--keep", "embeddings"], "expected clip="),
    ],
)
def test_what_cannot_be_collected_is_said(models, tmp_path, capsys, arguments, message):
    assert main(["collect", *arguments, "--out", str(tmp_path / "store")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "store").exists()


def test_a_model_without_weights_is_told(tmp_path, capsys):
    out = tmp_path / "store"
    assert main(["collect", "testbed:test:2", "--model", "test_vit", "--by", "layer", "--out", str(out)]) == 0
    assert "Note: the model has random initial values. Give --pretrained" in " ".join(capsys.readouterr().err.split())
    fit = ["align", str(out), "--out", str(tmp_path / "aligner"), "--model", "test_vit", "--clip", "ViT-B-32"]
    assert main(fit) == 2
    assert "Expected --model to be the model that the store" in " ".join(capsys.readouterr().err.split())


def test_random_weights_of_an_open_clip_are_no_clip_even_where_they_are_the_models(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "create_open_clip", lambda name, pretrained: build("clip"))
    asked = ["collect", "testbed:test:2", "--model", "ViT-B-32", "--open-clip", "--clip", "ViT-B-32"]
    assert main([*asked, "--out", str(tmp_path / "store")]) == 2
    assert "in the space of random ones texts mean nothing" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "store").exists()


def test_names_that_bring_weights_along_need_no_others(monkeypatch):
    asked = []

    def create(name, pretrained):
        asked.append((name, pretrained))
        return build("clip")

    monkeypatch.setattr(weights, "create_open_clip", create)
    for name, tag in (("hf-hub:some/clip", None), ("ViT-B-32", "openai")):
        named_clip(name, tag)
    assert asked == [("hf-hub:some/clip", None), ("ViT-B-32", "openai")]
    options = argparse.Namespace(weights=None, pretrained=None)
    assert origin_of("hf-hub:some/clip", options, open_clip=True) == "open_clip's, pretrained"
    assert origin_of("ViT-B-32", options, open_clip=True) == UNTRAINED
    assert origin_of("testbed/deit", options) != UNTRAINED


def test_a_clip_that_is_the_model_is_loaded_once(models, tmp_path):
    out = ["--out", str(tmp_path / "store"), "--by", "layer"]
    assert main(["collect", "testbed:test:3", "--model", "testbed/clip", "--clip", "testbed/clip", *out]) == 0
    assert models == ["clip"]
    store = Store.open(tmp_path / "store")
    assert torch.equal(store.embeddings(), store.representations())


def test_a_fit_that_was_ended_goes_on(tmp_path, capsys, monkeypatch):
    clip = perturb(build("clip")).requires_grad_(False)
    collect_into(tiny(), Scenes("test", size=40), tmp_path / "store", clip=clip, by="layer")
    fit = ["align", str(tmp_path / "store"), "--method", "unconstrained", "--epochs", "4", "--out"]
    assert main([*fit, str(tmp_path / "undisturbed")]) == 0
    out, told = tmp_path / "aligner", []

    class Ended(Pace):
        def __call__(self, done, of, before):
            told.append((done, before))
            if told.count((2, 0)) and len(told) == told.index((2, 0)) + 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(align, "Pace", Ended)
    assert main([*fit, str(out)]) == 130
    assert not out.exists()
    assert main([*fit, str(out)]) == 2
    assert told.pop() == (2, 0)
    told.clear()
    assert main([*fit, str(out), "--resume"]) == 0
    assert told == [(3, 2), (4, 2)]  # counted from where it goes on
    assert {path.name for path in tmp_path.iterdir()} == {"store", "undisturbed", "aligner"}
    one, two = (Aligner.load(path) for path in (out, tmp_path / "undisturbed"))
    assert torch.equal(one.weights, two.weights)


def test_scenes_of_another_seed_are_others_than_models_were_trained_on(models, tmp_path):
    out = ["--model", "testbed/deit", "--by", "layer", "--out"]
    for name, source in (("default", "testbed:train:3"), ("zero", "testbed:train:3:0"), ("other", "testbed:train:3:7")):
        assert main(["collect", source, *out, str(tmp_path / name)]) == 0
    stores = {path.name: Store.open(path) for path in tmp_path.iterdir()}
    assert stores["default"].ids == stores["zero"].ids == ("train:0:0", "train:0:1", "train:0:2")
    assert stores["other"].ids == tuple(f"train:7:{number}" for number in range(3))
    assert torch.equal(stores["default"].decomposition().values, stores["zero"].decomposition().values)
    assert not torch.equal(stores["default"].decomposition().values, stores["other"].decomposition().values)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    path = tmp_path_factory.mktemp("aligned") / "store"
    clip = perturb(build("clip")).requires_grad_(False)
    return collect_into(tiny(), Scenes("test", size=40), path, clip=clip, by="layer", batch_size=8)


def test_a_fit_takes_its_options_from_the_command_line(collected, tmp_path):
    fit = ["align", str(collected.path), "--epochs", "2", "--out"]
    assert main([*fit, str(tmp_path / "plain"), "--device", "cpu"]) == 0
    asked = ["--penalty", "0.25", "--max-bytes", "4000", "--batch-size", "9"]
    assert main([*fit, str(tmp_path / "asked"), *asked]) == 0
    plain, other = (Aligner.load(tmp_path / name, space=collected.space) for name in ("plain", "asked"))
    names = ("penalty", "max_bytes", "batch_size")
    assert [plain.metadata["alignment"][name] for name in names] == [1.0, 2 << 30, None]
    assert [other.metadata["alignment"][name] for name in names] == [0.25, 4000, 9]
    expected = Aligner.fit_stream(collected, epochs=2)
    assert torch.equal(plain.weights, expected.weights)
    assert not torch.equal(plain.weights, other.weights)


@pytest.mark.parametrize(
    ("option", "message"), [(["--device", "cuda:77"], "is none"), (["--penalty", "nan"], "Expected penalty=")]
)
def test_options_that_cannot_be_are_refused_by_align(collected, tmp_path, capsys, option, message):
    assert main(["align", str(collected.path), "--out", str(tmp_path / "aligner"), *option]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_terminal_a_fit_says_when_it_begins_and_ends(collected, tmp_path, capsys):
    assert main(["align", str(collected.path), "--epochs", "1", "--out", str(tmp_path / "aligner")]) == 0
    first, warning, last = capsys.readouterr().err.splitlines()
    assert first == f"Reading 40 images of {collected.path}."
    assert warning.startswith("Warning: Only 4 images were held out: what the report says is mostly chance.")
    assert re.fullmatch(rf"Written to {re.escape(str(tmp_path / 'aligner'))}: fitted in [\d.]+ s\.", last)


def test_on_a_terminal_a_fit_shows_how_far_the_store_is_read_and_then_its_epochs(collected, tmp_path, monkeypatch):
    console, seen = Console(force_terminal=True, width=100, record=True), []

    class Watched(align._Shown):
        def read(self, images):
            super().read(images)
            seen.append((self._bar.live.is_started, self._bar.tasks[0].completed))

        def fitting(self, state):
            super().fitting(state)
            seen.append((self._bar.live.is_started, self._pace._bar.tasks[0].description))

    monkeypatch.setattr(align, "_Shown", Watched)
    options = argparse.ArgumentParser()
    align.add_to(options.add_subparsers())
    asked = ["align", str(collected.path), "--epochs", "2", "--out", str(tmp_path / "aligner")]
    assert align.run(options.parse_args(asked), console) == 0
    started = [entry for entry in seen if entry[0]]
    assert started[:2] == [(True, 0.2), (True, 0.4)]  # the first two of five chunks
    assert (True, 1.0) in started
    assert seen[len(started)][1].startswith("0 of 2 epochs")
    assert not any(entry[0] for entry in seen[len(started) :])  # the bar of reading is gone
    assert any(str(entry[1]).startswith("2 of 2 epochs") for entry in seen)


def test_many_images_held_out_need_no_warning(capsys):
    one = torch.ones(1)
    report = AlignmentReport(("a",), (1,), torch.zeros(30), 1.0, one, (), one, one, one, 0.0, 0.0)
    aligner = Aligner(("mlp.0",), (1,), torch.eye(1), torch.eye(1), torch.zeros(1), fit_report=report)
    align._warn_of_few(aligner, Console(stderr=True))
    assert capsys.readouterr().err == ""
    align._warn_of_few(replace(aligner, fit_report=replace(report, distances=torch.zeros(1))), Console(stderr=True))
    assert "Only 1 image was held out" in capsys.readouterr().err


@pytest.mark.sweep
def test_several_processes_make_the_store_that_one_makes(tmp_path):
    """With torchrun, because `accelerate launch` starts several on CPUs under MPI only."""
    model = weights.create_timm("test_vit", num_classes=3)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitdecomp_lens"]
    asked = ["collect", "testbed:test:20", "--model", "test_vit", "--num-classes", "3", "--batch-size", "4"]
    asked += ["--weights", str(tmp_path / "weights.safetensors"), "--device", "cpu", "--by", "layer", "--top", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, *asked, "--out", str(tmp_path / "two")]
    subprocess.run(command, env=environment, check=True, timeout=600, cwd=tmp_path)
    one = collect_into(HookedViT(model), Scenes("test", size=20), tmp_path / "one", batch_size=4, by="layer")
    two = Store.open(tmp_path / "two")
    assert one.ids == two.ids
    torch.testing.assert_close(one.decomposition().values, two.decomposition().values, rtol=0, atol=1e-6)
    assert len(list((tmp_path / "two").glob("gathered-*"))) == 2


def test_an_aligner_needs_a_store(tmp_path, capsys):
    assert main(["align", str(tmp_path), "--out", str(tmp_path / "aligner.safetensors")]) == 2
    assert "there is no manifest.json" in capsys.readouterr().err
    assert main(["align", str(tmp_path), "--out", str(tmp_path / "a" / "aligner.safetensors")]) == 2
    assert "does not" in capsys.readouterr().err


def test_where_there_is_no_terminal_a_line_is_printed_now_and_then(capsys):
    seconds = iter([0.0, 0.0, 10.0, 31.0, 40.0, 62.0])
    with Pace(Console(stderr=True), clock=lambda: next(seconds)) as pace:
        pace.start()
        for done in (100, 310, 400, 620):
            pace(done, 1000, 0)
    assert capsys.readouterr().err.splitlines() == [
        "310 of 1000 images, 10.0 images/s, 0:01:09 left",
        "620 of 1000 images, 10.0 images/s, 0:00:38 left",
    ]


def test_on_a_terminal_there_is_a_bar():
    console = Console(force_terminal=True, width=100, record=True)
    with Pace(console) as pace:
        pace(5, None, 0)
        assert "5 images, " in pace._bar.tasks[0].description
        assert pace.text(5, None, 0, 2.0) == "5 images, 2.5 images/s"
        assert pace.text(5, 10, 5, 2.0) == "5 of 10 images, 0.0 images/s"
