"""The command line: what it prints, where, and with which exit code."""

import json
import logging
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import timm
import torch
from real_data import MODEL, PHOTOGRAPHS, WEIGHTS, needs_real_data, true_class
from safetensors.torch import save_file
from test_explain import photograph

from vitdecomp_lens import HookedViT
from vitdecomp_lens.cli import main
from vitdecomp_lens.commands import explain as explaining
from vitdecomp_lens.commands import verify as verifying
from vitdecomp_lens.commands.explain import PictureNames
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError
from vitdecomp_lens.explain import explain
from vitdecomp_lens.explanation import Explanation
from vitdecomp_lens.verify import verify as really_verify
from vitdecomp_lens.weights import create_open_clip, create_timm, load_weights


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = timm.create_model("test_vit")
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(module.state_dict(), path)
    return path


@pytest.fixture
def certified(monkeypatch):
    """`verify` of one block in place of six, and what it was asked for."""
    asked = {}

    def verify(model, **options):
        asked.update(options, model=model)
        model.blocks = model.blocks[:1]
        return really_verify(model, **options)

    monkeypatch.setattr(verifying, "verify", verify)
    return asked


# --- verify ---------------------------------------------------------------------------------------------------


def test_verify_prints_a_certificate_and_writes_it_as_json(certified, capsys, tmp_path):
    assert main(["verify", "test_vit", "--images", "1", "--seed", "3", "--json", str(tmp_path / "a" / "c.json")]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["model", "test_vit"]
    assert lines[-1].strip() == "Verdict: supported"
    assert "initial values; all parameters perturbed on a copy (seed 3)" in printed.out
    assert "apache-2.0, of timm's weights (not loaded)" in printed.out
    packed = json.loads((tmp_path / "a" / "c.json").read_text())
    assert packed["supported"]
    assert packed["model"] == "test_vit"
    assert (certified["count"], certified["seed"], certified["perturb"]) == (1, 3, True)


def test_what_libraries_log_is_not_shown_and_logging_is_as_before_afterwards(monkeypatch, capsys, caplog):
    def verify(_model, **_options):
        logging.getLogger("open_clip").warning("no weights")
        raise InputError("stop here")

    monkeypatch.setattr(verifying, "verify", verify)
    assert main(["verify", "test_vit"]) == 2
    assert capsys.readouterr().err == "Error: stop here\n"
    assert caplog.records == []
    assert logging.root.manager.disable == 0


def test_the_exit_code_says_whether_a_model_is_supported(monkeypatch, capsys):
    class Certificate:
        supported = False

        def __rich__(self):
            return "no"

    monkeypatch.setattr(verifying, "verify", lambda *_args, **_options: Certificate())
    assert main(["verify", "test_vit"]) == 1
    assert capsys.readouterr().out.strip() == "no"


def test_weights_of_a_file_are_not_perturbed_and_have_no_stated_licence(monkeypatch, weights_file, capsys):
    asked = {}

    class Certificate:
        supported = True

    monkeypatch.setattr(
        verifying, "verify", lambda model, **options: asked.update(options, model=model) or Certificate()
    )
    assert main(["verify", "test_vit", "--weights", str(weights_file)]) == 0
    capsys.readouterr()
    assert asked["perturb"] is False
    assert asked["weights"] == "the file test_vit.safetensors"
    assert asked["licence"] == "none stated"
    reference = timm.create_model("test_vit")
    load_weights(reference, weights_file)
    assert torch.equal(asked["model"].blocks[0].mlp.fc1.weight, reference.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "test_vitt"], "timm has no model 'test_vitt'; did you mean 'test_vit'"),
        (
            ["verify", "test_vit", "--pretrained", "r160"],
            "timm has no weights 'r160' for test_vit; did you mean 'r160_in1k'",
        ),
        (["verify", "test_vit.no_such_tag_at_all"], "timm has no weights 'no_such_tag_at_all' for test_vit"),
        (["verify", "ViT-B-61", "--open-clip"], "open_clip has no model 'ViT-B-61'; did you mean 'ViT-B-16'"),
        (["verify", "ViT-B-16", "--open-clip", "--pretrained", "openia"], "did you mean 'openai'?"),
        (["verify", "ViT-B-16", "--open-clip", "--pretrained"], "--pretrained TAG, such as --pretrained openai"),
        (["verify", "ViT-B-16", "--open-clip", "--num-classes", "3"], "a CLIP has none"),
        (["verify", "test_vit", "--pretrained", "--weights", "w"], "give one of them"),
        (["verify", "ViT-B-16"], "open_clip has a model of that name: add --open-clip."),
        (
            ["explain", "a.jpg", "--model", "test_vit", "--class", "-1"],
            "no class -1; there are 1000, numbered from 0 to",
        ),
        (["explain", "a.jpg", "--model", "test_resnet"], "There is no adapter for timm.models.resnet:ResNet"),
        (["explain", "none.jpg", "--model", "test_vit", "--class", "tensh"], "did you mean 'tench'"),
        (["explain", "none.jpg", "--model", "test_vit", "--class-names", "none.txt"], "class names cannot be read"),
        (["explain", "none.jpg", "--model", "test_vit", "--weights", "none.safetensors"], "cannot be read"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_an_error_of_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("arguments", [["verify", "ViT-B-61"], ["explain", "a.jpg", "--model", "ViT-B-16"]])
def test_open_clip_is_named_only_where_it_has_the_model_and_the_command_takes_it(arguments, capsys):
    assert main(arguments) == 2
    assert "--open-clip" not in capsys.readouterr().err


def test_an_adapter_is_called_the_nearest_only_where_it_is_near(capsys):
    assert main(["explain", "a.jpg", "--model", "test_resnet"]) == 2
    printed = capsys.readouterr().err
    assert "There is no adapter for timm.models.resnet:ResNet. Register one" in printed
    assert "nearest" not in printed


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"vitdecomp-lens {version('vitdecomp-lens')}\n"


@pytest.mark.parametrize("arguments", [[], ["verify"], ["explain", "a.jpg"], ["verify", "test_vit", "--images", "0"]])
def test_what_is_missing_is_said_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: vitdecomp-lens" in capsys.readouterr().err


def test_the_program_is_installed_and_runs_as_a_module():
    (entry,) = entry_points(group="console_scripts", name="vitdecomp-lens")
    assert entry.load() is main
    done = subprocess.run(
        [sys.executable, "-m", "vitdecomp_lens", "--help"], capture_output=True, text=True, check=True
    )
    assert "verify" in done.stdout
    assert "explain" in done.stdout
    assert done.stderr == ""


# --- weights ----------------------------------------------------------------------------------------------------


def test_a_weights_file_is_never_unpickled(tmp_path, weights_file):
    for name in ("weights.pth", "weights.bin", "weights"):
        with pytest.raises(InputError, match=r"must be a \.safetensors file.*save_file\("):
            load_weights(create_timm("test_vit"), tmp_path / name)
    pickled = tmp_path / "pickled.safetensors"
    torch.save(timm.create_model("test_vit").state_dict(), pickled)
    with pytest.raises(StoreError, match=r"pickled\.safetensors.*cannot be read"):
        load_weights(create_timm("test_vit"), pickled)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(StoreError, match="copy it again"):
        load_weights(create_timm("test_vit"), cut)


def test_weights_of_another_model_are_refused_and_the_first_keys_named(tmp_path, weights_file):
    with pytest.raises(InputError, match=r"2 of another shape \(head.weight \[1000, 64\] for \[7, 64\], head.bias"):
        load_weights(create_timm("test_vit", num_classes=7), weights_file)
    module = create_timm("test_vit")
    tensors = dict(module.state_dict())
    tensors["stem.weight"] = tensors.pop("norm.weight")
    for number in range(6):
        tensors[f"extra.{number}"] = torch.zeros(1)
    save_file(tensors, tmp_path / "other.safetensors")
    before = module.state_dict()["head.weight"].clone()
    with pytest.raises(InputError) as refused:
        load_weights(module, tmp_path / "other.safetensors")
    assert "1 missing (norm.weight)" in str(refused.value)
    assert "7 not in the model (" in str(refused.value)
    assert str(refused.value).count("extra.") <= 4
    assert torch.equal(module.state_dict()["head.weight"], before)


def test_models_are_made_by_name_in_evaluation_mode():
    assert not create_timm("test_vit", num_classes=3).training
    assert create_timm("test_vit.r160_in1k").num_classes == 1000
    with pytest.raises(UnknownNameError, match="open_clip has no model"):
        create_open_clip("nothing like it")


def test_weights_that_cannot_be_fetched_are_our_error(monkeypatch):
    def offline(*_args, **_options):
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"OSError: no network Without a network.*--weights FILE\.safetensors"):
        create_timm("test_vit", pretrained=True)


# --- explain --------------------------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [tmp_path / "a" / "cat.jpg", tmp_path / "b" / "Cat.png", tmp_path / "a" / "$x [red] -rf;..jpg"]
    for seed, path in enumerate(paths):
        photograph(seed=seed).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def one_block(monkeypatch):
    """`explain` of one block in place of six: what takes time is to trace them."""

    def shallow(model):
        model.blocks = model.blocks[:1]
        return HookedViT(model)

    monkeypatch.setattr(explaining, "HookedViT", shallow)
    return shallow


def test_explain_prints_a_table_and_writes_pictures_and_json(one_block, photographs, weights_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "--model",
        "test_vit",
        "--weights",
        str(weights_file),
        "--class",
        "tench",
        "--top",
        "3",
        "--out",
        str(out),
    ]
    assert main(["explain", *photographs, *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("What writes the logit of tench, Tinca tinca (0)") == 3
    assert "[red]" in printed.out.replace("\n", "")
    assert "3 pictures and explanations.json" in printed.err
    packed = json.loads((out / "explanations.json").read_text(encoding="utf-8"))
    assert (packed["format"], packed["version"]) == ("vitdecomp_lens.explanations", 1)
    pictures = [one.pop("picture") for one in packed["explanations"]]
    assert pictures == ["cat.png", "Cat-2.png", "x_red_-rf.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*pictures, "explanations.json"])
    module = create_timm("test_vit")
    load_weights(module, weights_file)
    expected = explain(one_block(module), photographs, class_=0, top=3)
    for one, other in zip(packed["explanations"], expected, strict=True):
        assert Explanation.from_dict(one).image == other.image
        assert one["logit"] == pytest.approx(other.logit, rel=1e-5)
        assert [c["component"] for c in one["contributions"]] == [c.component for c in other.contributions]


def test_photographs_that_cannot_be_read_are_named_and_the_others_explained(one_block, photographs, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no photograph")
    bad = [str(tmp_path / "broken.jpg"), str(tmp_path), str(tmp_path / "missing.jpg")]
    out = tmp_path / "out"
    assert main(["explain", *bad, photographs[0], "--model", "test_vit", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    for path in bad:
        assert path in printed.err.replace("\n", "")
    assert "random initial values" in printed.err
    assert len(json.loads((out / "explanations.json").read_text())["explanations"]) == 1
    assert (out / "cat.png").is_file()


def test_without_matplotlib_there_are_tables_and_json_and_advice(one_block, photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(explaining, "can_draw", lambda: False)
    out = tmp_path / "out"
    assert main(["explain", photographs[0], "--model", "test_vit", "--relative", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "pip install 'vitdecomp-lens[viz]'" in printed.err
    assert "logit relative to the mean logit" in printed.out
    assert [path.name for path in out.iterdir()] == ["explanations.json"]
    assert json.loads((out / "explanations.json").read_text())["explanations"][0]["picture"] is None


def test_classes_can_be_named_by_a_file(one_block, photographs, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("cat\ndog\nfish\n", encoding="utf-8")
    options = ["--model", "test_vit", "--num-classes", "3", "--class-names", str(tmp_path / "names.txt")]
    assert main(["explain", photographs[0], *options, "--class", "DOG", "--out", str(tmp_path / "out")]) == 0
    assert "What writes the logit of dog (1)" in capsys.readouterr().out


def test_a_file_of_explanations_that_is_not_whole_does_not_stay(one_block, photographs, tmp_path, monkeypatch, capsys):
    drawn = []

    def stop_at_the_second(explanation, *_args):
        drawn.append(explanation)
        if len(drawn) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(explaining, "save_picture", stop_at_the_second)
    out = tmp_path / "out"
    assert main(["explain", *photographs, "--model", "test_vit", "--out", str(out)]) == 130
    assert "Stopped." in capsys.readouterr().err
    assert len(drawn) == 2
    assert not list(out.iterdir())


def test_a_folder_that_cannot_be_written_is_our_error(photographs, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["explain", photographs[0], "--model", "test_vit", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "Choose another" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_in_place_of_the_folder_is_said_before_a_model_is_loaded(inside, tmp_path, capsys, monkeypatch):
    def load(*_args, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(explaining, "named_model", load)
    (tmp_path / "afile").write_text("in the way")
    out = tmp_path / "afile" / "out" if inside else tmp_path / "afile"
    assert main(["explain", "a.jpg", "--model", "test_vit", "--out", str(out)]) == 2
    assert f"Error: --out must be a folder; '{tmp_path / 'afile'}' is a file." in capsys.readouterr().err
    assert (tmp_path / "afile").read_text() == "in the way"


def test_names_of_pictures_are_harmless_and_differ():
    names = PictureNames(Path("out"))
    given = [
        "../../etc/passwd",
        "a/b\x00c.jpg",
        "...jpg",
        ".hidden.jpg",
        "-rf.jpg",
        "x" * 500 + ".jpg",
        "猫.jpg",
        "CON ?*.png",
    ]
    made = [names.next(name) for name in given]
    assert made[0] == "passwd.png"
    assert made[6] == "猫.png"
    for name in made:
        assert Path(name).name == name
        assert not name.startswith((".", "-"))
        assert len(name) <= 110
        assert name.isprintable()
    again = [names.next(name.upper()) for name in given]
    assert len({name.casefold() for name in made + again}) == 2 * len(given)


@needs_real_data
def test_a_real_photograph_is_explained_on_the_command_line(tmp_path, capsys):
    tench = next(p for p in PHOTOGRAPHS if true_class(p) == 0)
    assert main(["explain", str(tench), "--model", MODEL, "--weights", str(WEIGHTS), "--out", str(tmp_path)]) == 0
    assert "What writes the logit of tench, Tinca tinca (0)" in capsys.readouterr().out
    assert (tmp_path / "0000_tench.png").stat().st_size > 100_000
