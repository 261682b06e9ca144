"""Classes read before and after alignment: the same where nothing but a rotation lies between them."""

from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_models import perturb
from torch import nn

from vitdecomp_lens import HookedViT, testbed
from vitdecomp_lens.class_match import class_bank, class_match, class_vectors, matched
from vitdecomp_lens.cli import main
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.match_rate import match_rate
from vitdecomp_lens.interpret.text_span import text_span
from vitdecomp_lens.testbed.models import build


def drawn(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(classes=30):
    """Components, an aligner that rotates them all alike, and classes whose names are rotated likewise."""
    values = drawn(4, 200, 16) @ torch.diag_embed(drawn(4, 16, seed=1).exp())
    values[3] = values[3, :1]
    parts = Decomposition(values, ("L0H0", "L0H1", "mlp.0", "norm.bias"), values.sum(0))
    rotation = torch.linalg.qr(drawn(16, 16, seed=2)).Q
    basis = torch.eye(16, dtype=torch.float64).repeat(1, 4)
    aligner = Aligner(parts.components, (16,) * 4, basis, rotation.repeat(4, 1), torch.ones(16).double(), "clip-a")
    vectors = drawn(classes, 16, seed=3)
    texts = [f"class {number}" for number in range(classes)]
    return parts, aligner, vectors, TextBank(texts, vectors @ rotation, space="clip-a")


def test_through_a_rotation_every_class_is_read_again():
    parts, aligner, vectors, names = rotated()
    rate = class_match(parts, aligner, vectors, names)
    assert rate.labels == ("L0H0", "L0H1", "mlp.0")
    assert rate.rates.tolist() == [1, 1, 1]
    assert rate.chance.tolist() == pytest.approx([1 / 3] * 3)


def test_it_is_text_span_on_either_side():
    parts, aligner, vectors, names = rotated()
    strange = replace(names, directions=drawn(30, 16, seed=4))
    truth = text_span(parts, TextBank(names.texts, vectors, space="here"), steps=7)
    wanted = match_rate(truth, text_span(parts.map(aligner), strange, steps=7), steps=7)
    found = class_match(parts, aligner, vectors, strange, steps=7)
    assert found.rates.tolist() == wanted.rates.tolist()
    assert found.mean < 0.6


def test_of_few_classes_half_are_read():
    for classes, steps in ((20, 10), (7, 3), (2, 1), (1, 1)):
        parts, aligner, vectors, names = rotated(classes)
        assert class_match(parts, aligner, vectors, names).shared.tolist() == [steps] * 3


def test_what_does_not_fit_is_refused():
    parts, aligner, vectors, names = rotated()
    with pytest.raises(InputError, match=r"a row for each class name; got \(29, 16\)"):
        class_match(parts, aligner, vectors[1:], names)
    with pytest.raises(InputError, match=r"'clip-b'.*'clip-a'"):
        class_match(parts, aligner, vectors, replace(names, space="clip-b"))
    with pytest.raises(InputError, match="this aligner was made for"):
        class_match(replace(parts.select(kind="head"), complete=True), aligner, vectors, names)
    with pytest.raises(InputError, match="has none"):
        matched(aligner, class_match(parts, aligner, vectors, names))


def test_a_report_says_the_rate(tmp_path):
    parts, aligner, vectors, names = rotated()
    targets = parts.map(aligner).total
    aligner = Aligner.fit(parts, targets, space="clip-a", epochs=0)
    assert "match rate" not in repr(aligner.fit_report)
    told = matched(aligner, class_match(parts, aligner, vectors, names))
    assert told.fit_report.match_rate > told.fit_report.match_by_chance == pytest.approx(1 / 3)
    told.save(tmp_path / "aligner")
    loaded = Aligner.load(tmp_path / "aligner").fit_report
    assert loaded.match_rate == told.fit_report.match_rate
    assert repr(loaded).endswith(f"match rate {loaded.match_rate:.3f}, by chance 0.333)")


def test_class_vectors_are_the_classifiers():
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    for one in (model, HookedViT(model)):
        assert torch.equal(class_vectors(one), model.head.weight)
    model.head = nn.Conv2d(16, 3, 1)
    assert torch.equal(class_vectors(model), model.head.weight[:, :, 0, 0])
    model.head = nn.Conv2d(16, 3, 3)
    assert class_vectors(model) is None
    for name, classes in (("dino", None), ("clip", None), ("maxvit", 33), ("swin", 33)):
        found = class_vectors(build(name))
        assert (None if found is None else len(found)) == classes


def test_classes_of_one_name_are_told_apart():
    directions = drawn(3, 4)
    bank = TextBank(["crane", "ship", "dock"], directions, space="here")
    names = ["crane", "ship", "crane", "dock"]
    found = class_bank(names, bank)
    assert found.texts == ("crane", "ship", "crane (2)", "dock")
    torch.testing.assert_close(found.directions, bank.directions[[0, 1, 0, 2]])
    assert class_bank(["a", "b", "c"], bank).texts == ("a", "b", "c")
    with pytest.raises(InputError, match="each of the 5 classes"):
        class_bank([*names, "sea"], bank)


# ---- on the command line


@pytest.fixture
def store(monkeypatch, tmp_path, capsys):
    """A store of a model and a CLIP without training, and what the command is told."""
    seeds = {}

    def load(name):
        return perturb(build(name), seed=seeds.get(name, 0)).requires_grad_(False)

    monkeypatch.setattr(testbed, "load_original", load)
    made = tmp_path / "store"
    command = ["collect", "testbed:train:40", "--clip", "testbed/clip", "--by", "layer", "--out", str(made)]

    def collected(model):
        assert main([*command, "--model", f"testbed/{model}"]) == 0
        capsys.readouterr()
        return ["align", str(made), "--epochs", "1", "--out", str(tmp_path / "aligner")]

    return collected, seeds


def test_the_command_tells_the_match_rate(store, tmp_path, capsys):
    collected, seeds = store
    fit = collected("deit")
    for given, message in (
        (["--model", "testbed/deit"], "--model NAME and --clip NAME"),
        (["--clip", "testbed/clip"], "--model NAME and --clip NAME"),
        (["--class-names", "names"], "--model NAME and --clip NAME"),
        (["--model", "testbed/reg", "--clip", "testbed/clip"], "Expected --model to be the model that the store"),
        (["--model", "testbed/deit", "--clip", "testbed/clip", "--class-names", "nowhere"], "cannot be read"),
    ):
        assert main([*fit, *given]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    seeds["clip"] = 1
    both = ["--model", "testbed/deit", "--clip", "testbed/clip"]
    assert main([*fit, *both]) == 2
    assert "Expected --clip to be the model that the store" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "aligner").exists()
    seeds.clear()
    assert main([*fit, *both]) == 0
    report = Aligner.load(tmp_path / "aligner").fit_report
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    expected = f"{report.match_rate:.3f} classes found by texts; by chance {report.match_by_chance:.3f}"
    assert f"match rate {expected}" in said


def test_classes_of_ones_own_and_models_without(store, tmp_path, capsys):
    collected, _ = store
    fit = [*collected("dino"), "--model", "testbed/dino", "--clip", "testbed/clip"]
    assert main(fit) == 0
    said = capsys.readouterr()
    assert "testbed/dino has no linear classifier: no match rate" in " ".join(said.err.split())
    assert "match rate" not in said.out


def test_names_from_a_file_are_those_that_are_read(store, tmp_path, capsys):
    collected, _ = store
    fit = [*collected("deit"), "--model", "testbed/deit", "--clip", "testbed/clip"]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["red star", *["blue ring"] * 32]))
    assert main([*fit, "--class-names", str(names)]) == 0  # names that classes share are one text
    assert "match rate" in capsys.readouterr().out
    (tmp_path / "aligner").unlink()
    names.write_text("red star")
    assert main([*fit, "--class-names", str(names)]) == 2
    assert "a name for each of the 33 classes" in " ".join(capsys.readouterr().err.split())
