"""Every example runs as it is, offline; and with the switch that takes real models, here without their weights."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vitdecomp_lens
from vitdecomp_lens import testbed

ROOT = Path(vitdecomp_lens.__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PHOTOGRAPHS = 24
SMALL_CLIP = "ViT-S-32-alt"
# By name, options that take the way of real models; FOLDER holds photographs, and FILE is one of them.
REAL = {
    "who_writes_the_logit": ["--model", "test_vit", "--photograph", "FILE"],
    "decompose_your_own_model": ["--model", "test_convnext", "--clip", SMALL_CLIP, "--photographs", "FOLDER"],
    "heatmaps_beside_each_other": ["--clip", SMALL_CLIP, "--photograph", "FILE", "--out", "FOLDER/maps.png"],
    "splice_a_sparse_autoencoder": ["--model", "test_vit", "--photographs", "FOLDER"],
    "read_real_heads": ["--clip", SMALL_CLIP, "--photographs", "FOLDER", "--steps", "2", "--resamples", "2"],
}


def run(name, *options, monkeypatch, capsys):
    torch.manual_seed(0)  # of weights that nobody trained
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs: scenes, enlarged and not square."""
    made = tmp_path_factory.mktemp("photographs")
    for number, scene in enumerate(testbed.Scenes("test").scenes(range(PHOTOGRAPHS))):
        scene.picture.resize((180, 160), Image.Resampling.NEAREST).save(made / f"{number:02d}.png")
    return made


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_it_runs_offline(name, monkeypatch, capsys):
    assert run(name, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize("name", REAL)
def test_it_takes_real_models(name, folder, monkeypatch, capsys):
    options = [one.replace("FOLDER", str(folder)).replace("FILE", str(folder / "00.png")) for one in REAL[name]]
    if name == "read_real_heads":  # thousands of texts say no more here
        monkeypatch.setattr("vitdecomp_lens.clip.banks.general", lambda: [f"a photo of number {n}" for n in range(40)])
    told = run(name, *options, monkeypatch=monkeypatch, capsys=capsys)
    assert told
    assert "nan" not in told
    if "--out" in options:
        (folder / "maps.png").unlink()  # it was written, and is no photograph


def test_the_page_of_examples_names_them_all():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert {path.name for path in EXAMPLES} == set(re.findall(r"\]\(\.\./examples/(\w+\.py)\)", page))
    for row in re.findall(r"^\| \[.*\|$", page, re.MULTILINE):
        name = re.search(r"\[(\w+)\.py\]", row)[1]
        (options,) = re.findall(r"\| (`--.*`) \|$", row)
        source = (ROOT / "examples" / f"{name}.py").read_text()
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in source, (name, option)


def test_the_leading_words_of_each_say_how_to_run_it():
    for path in EXAMPLES:
        assert f"python examples/{path.name}" in path.read_text(), path.name
