"""Aligners of the testbed's models: shipped with what they were fitted to, and compared with other methods."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from labelled_samples import as_users_run_it
from tiny_models import perturb

from vitdecomp_lens import Decomposition, HookedViT, attribute, attribute_tokens, decompose, testbed
from vitdecomp_lens.class_match import class_match, class_vectors
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.clip.text_embedding import space_of
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError
from vitdecomp_lens.testbed import align, aligners
from vitdecomp_lens.testbed.models import CLASSES, build
from vitdecomp_lens.testbed.shipped import MANIFEST, WEIGHTS, load_original, manifest


@pytest.fixture(scope="module")
def untrained():
    """A model and a CLIP without training, and what both make of some scenes."""
    model, clip = (perturb(build(name)).requires_grad_(False) for name in ("deit", "clip"))
    fitted = aligners.collected(model, clip, {"train": 120, "validation": 60})
    others = aligners.collected(model, clip, {"test": 60})
    return model, clip, fitted, others


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the manifest of the shipped models, and one aligner."""
    folder = tmp_path_factory.mktemp("weights")
    shutil.copy(WEIGHTS / MANIFEST, folder)
    aligners.ship_aligner("deit", scenes=120, tested=40, folder=folder)
    return folder


# ---- those that come with the package


@pytest.mark.parametrize("name", aligners.ALIGNED)
def test_shipped_aligners_fit_the_shipped_models(name):
    found = testbed.aligner(name)
    model, clip = load_original(name), load_original("clip")
    others = aligners.collected(model, clip, {"test": 100}, seed=7)
    assert found.space == others.space == space_of(clip)
    found.refuse_other(others.parts, space=others.space)
    report = found.report(others.parts, others.targets)
    # The mean embedding, which maps of zero and a bias would give, is what any map has to beat.
    constant = 1 - torch.cosine_similarity(others.targets.mean(0)[None], others.targets).mean()
    assert report.cosine_distance < 0.8 * float(constant)
    rate = aligners.match_of(model, clip, found, others.parts)
    assert (rate is None) == (name == "dino")
    if rate is not None:
        assert rate.mean > rate.mean_chance
        assert found.fit_report.match_rate is not None


def test_shipped_aligners_are_not_large():
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 15e6


# ---- shipping


def test_what_is_shipped_is_what_was_fitted(folder):
    entry = json.loads((folder / MANIFEST).read_text())["deit"]
    assert entry["sha256"] == manifest()["deit"]["sha256"]
    assert (folder / entry["aligner"]["file"]).stat().st_mode == (folder / MANIFEST).stat().st_mode
    assert entry["aligner"]["weights"] == {name: manifest()[name]["sha256"] for name in ("deit", "clip")}
    assert entry["aligner"]["scenes"] == {"train": 80, "validation": 40}
    found = aligners.aligner("deit", folder=folder)
    assert found.method == "compalign"
    assert len(found.fit_report.distances) == entry["aligner"]["measured on"] == 40
    assert set(entry["aligner"]["measured"]) == {
        "cosine distance",
        "isometry residual",
        "match rate",
        "match rate by chance",
    }
    assert found.fit_report.match_rate == pytest.approx(entry["aligner"]["measured"]["match rate"], abs=1e-4)
    again = aligners.collected(load_original("deit"), load_original("clip"), {"test": 40})
    assert aligners.match_of(load_original("deit"), load_original("clip"), found, again.parts).mean == pytest.approx(
        found.fit_report.match_rate
    )


def test_an_aligner_of_other_weights_or_another_file_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    known = json.loads((tmp_path / MANIFEST).read_text())

    def refused(message):
        (tmp_path / MANIFEST).write_text(json.dumps(known))
        with as_users_run_it(), pytest.raises(StoreError, match=message):
            aligners.aligner("deit", folder=tmp_path)

    for other in ("deit", "clip"):
        before, known[other]["sha256"] = known[other]["sha256"], "0"
        refused(f"fitted to other weights of {other!r}.*align --ship")
        known[other]["sha256"] = before
    path = tmp_path / known["deit"]["aligner"]["file"]
    path.write_bytes(path.read_bytes()[:-1])
    refused("is not that of the testbed's manifest")
    del known["deit"]["aligner"]
    refused("knows of no aligner of 'deit'")
    for name in ("clip", "dieit"):
        with pytest.raises(UnknownNameError, match="no aligner of"):
            aligners.aligner(name)


def test_the_command_fits_without_writing_into_the_package(monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in WEIGHTS.iterdir()}
    monkeypatch.setattr(sys, "argv", ["align", "dino", "--scenes", "60", "--tested", "20"])
    align.main()
    assert capsys.readouterr().out.startswith("dino: AlignmentReport(20 images: cosine distance ")
    assert {path: path.stat().st_mtime_ns for path in WEIGHTS.iterdir()} == before
    monkeypatch.setattr(sys, "argv", ["align", "clip"])
    with pytest.raises(SystemExit):
        align.main()
    assert "no model 'clip' to align; there are deit, dino" in capsys.readouterr().err


def images_of(seed=5):
    return testbed.normalised(testbed.Scenes("test", seed=seed, size=4).images(range(4)))


@as_users_run_it()
@pytest.mark.parametrize("kind", ["another training", "random weights", "weights that changed"])
def test_an_aligner_of_other_weights_of_the_same_kind_is_refused_wherever_it_is_used(kind, tmp_path):
    model, images = testbed.load("deit"), images_of()
    name = "dino" if kind == "another training" else "deit"
    aligner, own = aligners.aligner(name), decompose(model, images)
    if kind == "random weights":
        model = HookedViT(build("deit", seed=1).eval())
    if kind == "weights that changed":
        with torch.no_grad():
            model.original.blocks[0].mlp.fc1.weight[0, 0] += 1
    parts, bank = decompose(model, images), aligners.class_names(load_original("clip"))
    assert aligner.components == parts.components  # nothing but the weights tells them apart
    assert len(aligner.basis) == parts.values.shape[-1]
    aligner.save(tmp_path / "aligner")
    uses = [
        lambda: parts.map(aligner),
        lambda: aligner.report(parts, torch.ones(4, 64)),
        lambda: Aligner.load(tmp_path / "aligner", for_=parts),
        lambda: attribute(model, images, bank.directions, through=aligner),
        lambda: attribute_tokens(model, images, bank.directions, through=aligner),
        lambda: class_match(parts, aligner, torch.ones(len(bank), 64), bank),
    ]
    for use in uses:
        with pytest.raises(InputError, match=f"weights='{aligner.metadata['weights']}'; got one with weights='"):
            use()
    if name == "deit":
        assert own.map(aligner).complete


def test_what_batches_of_two_models_were_put_together_from_is_refused():
    images, other = images_of(), HookedViT(build("deit", seed=1).eval())
    both = Decomposition.cat([decompose(testbed.load("deit"), images), decompose(other, images)])
    with pytest.raises(InputError, match="does not say of which weights"):
        both.map(aligners.aligner("deit"))


def test_contributions_of_unknown_origin_are_known_by_their_components():
    parts = decompose(testbed.load("deit"), images_of())
    bare = Decomposition(parts.values, parts.components, parts.total)
    aligner = aligners.aligner("deit")
    assert torch.equal(bare.map(aligner).values, parts.map(aligner).values)
    with pytest.raises(InputError, match="is in only one"):
        Decomposition(parts.values[1:], parts.components[1:]).map(aligner)


# ---- what is fitted


def test_what_is_collected_is_what_the_models_say(untrained):
    model, clip, fitted, others = untrained
    assert fitted.parts.values.shape[1] == len(fitted.targets) == 180
    images = testbed.normalised(testbed.Scenes("test", seed=aligners.SEED, size=60).images(range(60)))
    torch.testing.assert_close(others.targets, clip.encode_image(images))
    representation = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(others.parts.total, representation, rtol=1e-4, atol=1e-4)
    some = others.images(torch.tensor([3, 1]))
    torch.testing.assert_close(some.targets, others.targets[[3, 1]])
    torch.testing.assert_close(some.parts.total, others.parts.total[[3, 1]])
    one = Aligner.fit(fitted.parts, fitted.targets, epochs=0, space=fitted.space)
    other = replace(others.parts, metadata={**others.parts.metadata, "weights": "another"})
    with pytest.raises(InputError, match="weights="):
        one.refuse_other(other)


def test_methods_are_compared_on_the_same_scenes(untrained):
    model, clip, fitted, others = untrained
    methods = ("compalign", "orthogonal", "shared")
    found = align.compared(model, clip, fitted, others, methods=methods, seeds=(0, 1), scenes=90)
    assert set(found) == set(methods)
    for numbers in found.values():
        assert set(numbers) == {"cosine distance", "isometry residual", "match rate", "by chance"}
        assert all(len(column) == 2 for column in numbers.values())
        assert numbers["cosine distance"][0] != numbers["cosine distance"][1]
    assert max(found["orthogonal"]["isometry residual"]) < 1e-5
    order = torch.randperm(180, generator=torch.Generator().manual_seed(0))
    drawn = fitted.images(order[90:])  # the second fit has scenes of its own
    aligner = Aligner.fit(drawn.parts, drawn.targets, method="shared", space=drawn.space, seed=1)
    assert aligner.report(others.parts, others.targets).cosine_distance == pytest.approx(
        found["shared"]["cosine distance"][1]
    )
    rate = aligners.match_of(model, clip, aligner, others.parts)
    assert rate.mean == pytest.approx(found["shared"]["match rate"][1])


def test_class_names_are_those_of_the_classifier(untrained):
    model, clip, *_ = untrained
    names = aligners.class_names(clip)
    assert names.texts == CLASSES
    assert len(class_vectors(model)) == len(CLASSES)
    wanted = testbed.banks.text_bank(clip, ["a red object"], templates=testbed.banks.TEMPLATES)
    torch.testing.assert_close(names["red"], wanted.directions[0])


# ---- tables


def numbers(**rates):
    return {method: {"match rate": list(rate), "cosine distance": [0.25] * len(rate)} for method, rate in rates.items()}


def test_a_table_has_what_there_is():
    found = {"deit": numbers(compalign=(0.5, 0.6), shared=(0.25, 0.25)), "dino": {"shared": {"cosine distance": [1.5]}}}
    found["deit"]["compalign"]["by chance"] = [0.125, 0.125]
    assert align.table(found).splitlines() == [
        "| cosine distance | deit | dino |",
        "| --- | --- | --- |",
        "| compalign | .250 ± .000 | – |",
        "| shared | .250 ± .000 | 1.50 ± .000 |",
        "",
        "| match rate | deit | dino |",
        "| --- | --- | --- |",
        "| compalign | .550 ± .071 | – |",
        "| shared | .250 ± .000 | – |",
        "| by chance | .125 ± .000 | – |",
    ]


def test_the_papers_order_is_told_as_it_is():
    found = {
        "deit": numbers(compalign=(0.5, 0.6), unconstrained=(0.4, 0.4), shared=(0.1, 0.2)),
        "reg": numbers(compalign=(0.5, 0.6), unconstrained=(0.52, 0.57), shared=(0.1, 0.2)),
        "swin": numbers(compalign=(0.5, 0.6), unconstrained=(0.4, 0.4), shared=(0.4, 0.5)),
        "dino": {"shared": {"cosine distance": [1.5]}},
    }
    said = align.order(found).splitlines()
    assert said[0].endswith("compalign - unconstrained .150 ± .071, unconstrained - shared .250 ± .071: holds")
    assert said[1].endswith("holds, but not beyond the spread of seeds")
    assert said[2].endswith("unconstrained - shared -.050 ± .071: does not hold")
    assert said[3].endswith("holds in 2 of 3 models.")
    assert len(said) == 4
