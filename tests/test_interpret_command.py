"""``vitdecomp-lens interpret``."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from tiny_models import perturb

from vitdecomp_lens import HookedViT, testbed
from vitdecomp_lens.cli import main
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.collect import collect
from vitdecomp_lens.commands.interpreting import compare
from vitdecomp_lens.commands.interpreting.words import Words
from vitdecomp_lens.decompose import attribute_tokens, decompose
from vitdecomp_lens.interpret.comparing import participation_ratio
from vitdecomp_lens.interpret.describing import describe
from vitdecomp_lens.interpret.features import score_features
from vitdecomp_lens.interpret.hierarchy import ConceptTree, decompose_by_concepts
from vitdecomp_lens.interpret.text_span import text_span
from vitdecomp_lens.store import Store
from vitdecomp_lens.testbed.banks import TEMPLATES, features, objects, text_bank
from vitdecomp_lens.testbed.models import build, normalised
from vitdecomp_lens.testbed.scenes import Scenes

IMAGES = 24


def original(name):
    """Models of the testbed's kinds that need no training."""
    if name == "clip":
        return perturb(build("clip")).requires_grad_(False)
    torch.manual_seed(0)
    model = VisionTransformer(img_size=48, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    model.pretrained_cfg = build("deit").pretrained_cfg
    return perturb(model).requires_grad_(False)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores of two models over the same scenes, in another order of chunks, and the aligner for one of them."""
    folder = tmp_path_factory.mktemp("stores")
    clip = original("clip")
    scenes = Scenes("test", size=IMAGES)
    # The CLIP's own store needs no embeddings to be known as the CLIP's.
    collect(HookedViT(clip), scenes, folder / "clip", batch_size=10)
    store = collect(HookedViT(original("deit")), scenes, folder / "deit", clip=clip, batch_size=7, dtype=torch.float16)
    draw = torch.Generator().manual_seed(0)
    width, d_clip = store.representations().shape[1], store.embeddings().shape[1]
    weights, bias = torch.randn(width, d_clip, generator=draw), torch.randn(d_clip, generator=draw)
    one_map = Aligner(store.components, (width,), torch.eye(width), weights, bias, store.space, store.metadata)
    one_map.save(folder / "deit.safetensors")
    circle = [{"name": "a", "parent": "b"}, {"name": "b", "parent": "a"}]
    trees = {"circle": {"concepts": circle}, "one": {"red": "a red object"}, "strange": ["a zebra", "a red object"]}
    for name, tree in trees.items():
        (folder / f"{name}.json").write_text(json.dumps({"some": tree} if name == "strange" else tree))
    (folder / "twice.txt").write_text("a red object\n\na red object \n")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "texts.txt").write_text("a red object\n\n a blue star \nan object on water\n")
    return folder


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    monkeypatch.setattr(testbed, "load_original", original)


def in_clip(folder):
    """The contributions that the stores hold, in the CLIP's space, computed another way."""
    images = normalised(Scenes("test", size=IMAGES).read(range(IMAGES))[0])
    own = decompose(HookedViT(original("clip")), images, by="head")
    other = decompose(HookedViT(original("deit")), images, by="head")
    return own, other.to(torch.float16).to(torch.float32).map(Aligner.load(folder / "deit.safetensors"))


def answered(path, question):
    answer = json.loads(path.read_text())
    assert (answer["format"], answer["version"]) == ("vitdecomp_lens.interpretation", 1)
    assert answer["question"] == question
    return answer


# --- components -----------------------------------------------------------------------------------------------------


def test_components_say_what_text_span_finds(stores, tmp_path, capsys):
    own, other = in_clip(stores)
    bank = text_bank(original("clip"))
    asked = ["--resamples", "3", "--steps", "4", "--top-images", "2", "--json", str(tmp_path / "said.json")]
    assert main(["interpret", "component", str(stores / "clip"), "L3H1", "mlp.2", *asked]) == 0
    printed = capsys.readouterr().out
    spans = text_span(own.select(labels=["L3H1", "mlp.2"]), bank, steps=4, variant="corrected")
    said = answered(tmp_path / "said.json", "component")
    assert said["images"] == IMAGES
    assert said["texts"] == len(bank)
    assert said["space"] == bank.space
    for row, label in enumerate(("L3H1", "mlp.2")):
        one = said["components"][label]
        assert [text["text"] for text in one["texts"]] == spans.texts[label]
        shares = [text["share_explained"] for text in one["texts"]]
        assert shares == pytest.approx(spans.share_explained[row].tolist(), abs=1e-4)
        assert all(text["again"] * 3 == pytest.approx(round(text["again"] * 3)) for text in one["texts"])
        scores = spans.scores(own)[row, :, 0]
        assert [image["image"] for image in one["images"]] == [f"test:0:{n}" for n in scores.topk(2).indices.tolist()]
        assert f"What {label} says" in printed
        assert spans.texts[label][0] in printed
    aligner = ["--aligner", str(stores / "deit.safetensors"), "--texts", str(stores / "texts.txt"), "--resamples", "0"]
    assert main(["interpret", "component", str(stores / "deit"), "L1H0", *asked[2:], *aligner]) == 0
    said = answered(tmp_path / "said.json", "component")
    bank = text_bank(original("clip"), ["a red object", "a blue star", "an object on water"])
    spans = text_span(other.select(labels="L1H0"), bank, steps=4, variant="corrected")
    assert [text["text"] for text in said["components"]["L1H0"]["texts"]] == spans.texts["L1H0"]
    assert said["components"]["L1H0"]["texts"][0]["again"] is None
    assert "again" not in capsys.readouterr().out.lower()


def test_a_constant_says_nothing(stores, tmp_path, capsys):
    asked = ["--aligner", str(stores / "deit.safetensors"), "--texts", str(stores / "texts.txt"), "--resamples", "0"]
    answer = tmp_path / "said.json"
    command = ["interpret", "component", str(stores / "deit"), "aligner.bias", *asked, "--json", str(answer)]
    assert main([*command, "--top-images", "1"]) == 0
    assert "aligner.bias says nothing" in capsys.readouterr().out
    assert answered(answer, "component")["components"]["aligner.bias"]["texts"] == []


def test_what_a_constant_says_is_qualified(stores, capsys):
    asked = ["--texts", str(stores / "texts.txt"), "--resamples", "0", "--steps", "1"]
    constants = in_clip(stores)[0].select(kind="constant")
    varies = constants.labels[int(constants.values.var(1).sum(-1).argmax())]
    for label, constant in ((varies, True), ("L3H1", False)):
        assert main(["interpret", "component", str(stores / "clip"), label, *asked]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert f"What {label} says" in printed
        assert ("varies by the norm's 1/σ only" in printed) == constant


def test_a_model_is_decomposed_on_the_spot(stores, tmp_path):
    texts = ["a red object", "a blue star", "an object on water"]
    asked = ["--texts", str(stores / "texts.txt"), "--resamples", "0", "--json", str(tmp_path / "said.json")]
    source = ["--source", "testbed:test:9", "--aligner", str(stores / "deit.safetensors")]
    assert main(["interpret", "component", "L1H1", "--model", "testbed/deit", *asked, *source]) == 0
    of_model = answered(tmp_path / "said.json", "component")
    assert of_model["images"] == 9
    parts = in_clip(stores)[1].images(range(9))
    spans = text_span(parts.select(labels="L1H1"), text_bank(original("clip"), texts), variant="corrected", steps=10)
    assert [text["text"] for text in of_model["components"]["L1H1"]["texts"]] == spans.texts["L1H1"]
    assert main(["interpret", "component", "L3H1", "--model", "testbed/clip", *asked, "--images", "5"]) == 0
    assert answered(tmp_path / "said.json", "component")["images"] == 5


# --- features -------------------------------------------------------------------------------------------------------


def test_features_are_ranked(stores, tmp_path, capsys):
    _, other = in_clip(stores)
    asked = ["--aligner", str(stores / "deit.safetensors"), "--resamples", "40", "--json", str(tmp_path / "told.json")]
    mine = f"mine={stores / 'texts.txt'}"
    assert main(["interpret", "feature", str(stores / "deit"), "colour", mine, "--top", "3", *asked]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    clip = original("clip")
    banks = {
        "colour": text_bank(clip, features()["colour"], templates=TEMPLATES),
        "mine": text_bank(clip, ["a red object", "a blue star", "an object on water"]),
    }
    scores = score_features(other, banks, bootstrap=40, permutations=40)
    told = answered(tmp_path / "told.json", "feature")
    assert list(told["features"]) == ["colour", "mine"]
    assert told["orders"] == scores.orders == 48
    for name in banks:
        above, below = told["above_chance"][name], told["below_chance"][name]
        assert {*above, *below} == {*scores.significant(name)}
        assert f"Of {len(scores)} components {len(above)} correlate more than by chance, {len(below)} less" in printed
    for name, ranked in told["features"].items():
        assert f"Which components carry {name}" in printed
        assert [one["component"] for one in ranked] == [label for label, _ in scores.top(name, 3)]
        for one in ranked:
            expected = scores.score(one["component"], name)
            chance = scores.correlation_chance[scores.labels.index(one["component"]), scores.features.index(name)]
            assert one["correlation"]["chance"] == pytest.approx(float(chance), abs=1e-3)
            assert f" {one['correlation']['chance']:+.2f} " in printed
            assert "margin" not in one
            assert one["correlation"]["value"] == pytest.approx(expected.value, abs=1e-3)
            assert one["correlation"]["low"] == pytest.approx(expected.low, abs=1e-3)
            share = scores.score(one["component"], name, by="covariance").value / float(
                scores.total[list(banks).index(name)]
            )
            assert one["share"]["value"] == pytest.approx(share, abs=1e-3)


def test_the_least_p_value_is_told_as_a_bound(stores, capsys):
    """Of shuffled images none is as extreme as the true ones, so that p is 1 / orders, and no more is known."""
    assert main(["interpret", "feature", str(stores / "clip"), "colour", "--top", "30"]) == 0
    printed = capsys.readouterr().out
    scores = score_features(
        in_clip(stores)[0], {"colour": text_bank(original("clip"), features()["colour"], templates=TEMPLATES)}
    )
    least = int((scores.correlation_p * scores.orders).round().eq(1).sum())
    assert least > 0
    assert printed.count(f"≤ {1 / scores.orders:.2g} ") == least


def test_a_feature_is_held_against_others(stores, tmp_path, capsys):
    asked = ["--resamples", "20", "--json", str(tmp_path / "told.json"), "--top", "2", "--by", "covariance"]
    assert main(["interpret", "feature", str(stores / "clip"), "shape", "--against", "colour", "size", *asked]) == 0
    clip = original("clip")
    banks = {name: text_bank(clip, features()[name], templates=TEMPLATES) for name in ("shape", "colour", "size")}
    scores = score_features(in_clip(stores)[0], banks, bootstrap=0, permutations=0)
    told = answered(tmp_path / "told.json", "feature")
    assert list(told["features"]) == ["shape"]
    found = [one["component"] for one in told["features"]["shape"]]
    assert tuple(found) == scores.select("shape", k=2, by="covariance")
    margins = [one["margin"] for one in told["features"]["shape"]]
    expected = scores.margins("shape", by="covariance")
    assert margins == pytest.approx([float(expected[scores.labels.index(label)]) for label in found], rel=1e-3)
    printed = capsys.readouterr().out
    assert "Which components carry shape, more than colour or size" in printed
    assert "…" not in printed, "the table fits"
    assert all(f"\n{label} " in printed for label in found)
    assert "minus the largest of those for colour or size." in " ".join(printed.split())
    assert all(f" {margin:+.2g} " in printed for margin in margins)


def test_carriers_are_searched_for_on_both_sides_of_chance(stores, tmp_path, capsys):
    """What is counted as correlating less than by chance is not counted as correlating more."""
    asked = ["interpret", "feature", str(stores / "clip"), "colour", "--json", str(tmp_path / "told.json")]
    assert main(asked) == 0
    told, printed = answered(tmp_path / "told.json", "feature"), " ".join(capsys.readouterr().out.split())
    scores = score_features(
        in_clip(stores)[0], {"colour": text_bank(original("clip"), features()["colour"], templates=TEMPLATES)}
    )
    assert told["resamples"] == 1000
    assert told["orders"] == scores.orders >= 1000
    sides = [{*told[f"{side}_chance"]["colour"]} for side in ("above", "below")]
    assert not sides[0] & sides[1]
    for label in sides[0] | sides[1]:
        row = scores.labels.index(label)
        assert (label in sides[0]) == bool(scores.correlation[row, 0] > scores.correlation_chance[row, 0])
    assert f"{len(sides[0])} correlate more than by chance, {len(sides[1])} less" in printed


# --- images ---------------------------------------------------------------------------------------------------------


def test_images_are_described(stores, tmp_path, capsys):
    _, other = in_clip(stores)
    asked = ["--aligner", str(stores / "deit.safetensors"), "--texts", "objects", "--phrases", "3", "--top", "2"]
    asked += ["--json", str(tmp_path / "told.json")]
    assert main(["interpret", "image", str(stores / "deit"), "test:0:5", "test:0:2", *asked]) == 0
    printed = capsys.readouterr().out
    bank = text_bank(original("clip"), objects()).centred()
    found = describe(other.images([5, 2]), bank, phrases=3, reference=other)
    told = answered(tmp_path / "told.json", "image")
    assert told["others"] == IMAGES
    assert list(told["images"]) == ["test:0:5", "test:0:2"]
    for description, phrases in zip(found, told["images"].values(), strict=True):
        assert [one["text"] for one in phrases] == list(description.phrases)
        assert [one["share"] for one in phrases] == pytest.approx(description.shares.tolist(), abs=0.01)
        for one in phrases:
            expected = [label for label, _ in description.top(one["text"], 2)]
            assert [of["component"] for of in one["components"]] == expected
            assert one["text"] in printed
    assert "What test:0:5 shows" in printed


def test_files_are_read_by_the_model(stores, tmp_path):
    scenes = Scenes("test", size=3)
    paths = []
    for number, scene in enumerate(scenes.scenes(range(3))):
        paths.append(str(tmp_path / f"{number}.png"))
        scene.picture.save(paths[-1])
    answer = tmp_path / "told.json"
    asked = ["--model", "testbed/clip", "--source", "testbed:test:9", "--json", str(answer)]
    asked += ["--texts", str(stores / "texts.txt")]
    assert main(["interpret", "image", *paths, *asked]) == 0
    of_files = answered(answer, "image")
    collect(HookedViT(original("clip")), Scenes("test", size=9), tmp_path / "store")
    names = [f"test:0:{number}" for number in range(3)]
    asked = ["--json", str(answer), "--texts", str(stores / "texts.txt")]
    assert main(["interpret", "image", str(tmp_path / "store"), *names, *asked]) == 0
    of_store = answered(answer, "image")
    assert of_files["others"] == of_store["others"] == 9
    for path, name in zip(paths, names, strict=True):
        one, two = of_files["images"][path], of_store["images"][name]
        assert [phrase["text"] for phrase in one] == [phrase["text"] for phrase in two]


def test_patches_are_those_of_the_model(stores, tmp_path, capsys):
    model, aligner = HookedViT(original("deit")), Aligner.load(stores / "deit.safetensors")
    paths = [str(tmp_path / folder / "scene.png") for folder in ("one", "two")]
    for path, scene in zip(paths, Scenes("test", size=2).scenes(range(2)), strict=True):
        Path(path).parent.mkdir()
        scene.picture.save(path)
    answer, pictures = tmp_path / "told.json", tmp_path / "a" / "pictures"
    asked = ["--model", "testbed/deit", "--aligner", str(stores / "deit.safetensors"), "--source", "testbed:test:9"]
    asked += ["--texts", "objects", "--phrases", "2", "--json", str(answer), "--pictures", str(pictures)]
    assert main(["interpret", "image", *paths, *asked]) == 0
    printed, told = capsys.readouterr().out, answered(answer, "image")
    assert told["pictures"] == {paths[0]: "scene.png", paths[1]: "scene-2.png"}
    assert sorted(path.name for path in pictures.iterdir()) == ["scene-2.png", "scene.png"]
    bank, others = text_bank(original("clip"), objects()).centred(), in_clip(stores)[1].images(range(9))
    for path in paths:
        parts = decompose(model, model.preprocess([path]), by="head").map(aligner)
        (description,) = describe(parts, bank, phrases=2, reference=others)
        tokens = attribute_tokens(model, model.preprocess([path]), description.directions, by="head", through=aligner)
        expected = description.with_patches(tokens).patches
        for one, of in zip(told["images"][path], expected, strict=True):
            assert [patch["patch"] for patch in one["patches"]] == [patch.name for patch in of]
            amounts = [patch.amount for patch in of]
            assert [patch["amount"] for patch in one["patches"]] == pytest.approx(amounts, abs=1e-2 * max(amounts))
            assert one["patches"][0]["rectangle"] == list(of[0].rectangle)
            assert f"{of[0].name}:{amounts[0]:+.1f}" in " ".join(printed.replace("│", " ").split())


def test_an_image_is_split_among_concepts(stores, tmp_path, capsys):
    nested = {"colour": {"warm": ["a red object"], "cold": ["a blue object", "a green object"]}, "shape": "a star"}
    (tmp_path / "tree.json").write_text(json.dumps(nested))
    asked = ["--aligner", str(stores / "deit.safetensors"), "--tree", str(tmp_path / "tree.json"), "--top", "2"]
    asked += ["--texts", "objects", "--json", str(tmp_path / "told.json")]
    other, tree = in_clip(stores)[1], ConceptTree.of(nested)
    bank = text_bank(original("clip"), [text for texts in tree.texts for text in texts]).centred()
    for signs in ("positive", "any"):
        more = [] if signs == "positive" else ["--signs", "any"]
        assert main(["interpret", "image", str(stores / "deit"), "test:0:5", "test:0:2", *asked, *more]) == 0
        printed, told = capsys.readouterr().out, answered(tmp_path / "told.json", "image")
        assert told["signs"] == signs
        found = decompose_by_concepts(other.images([5, 2]), tree, bank, reference=other, signs=signs)
        for number, name in enumerate(("test:0:5", "test:0:2")):
            split = told["trees"][name]
            assert [one["concept"] for one in split["concepts"]] == list(tree.names)
            assert [one["refines"] for one in split["concepts"][:3]] == [None, "colour", "warm"]
            for column, one in enumerate(split["concepts"]):
                assert one["share"] == pytest.approx(float(found.shares[:, number, column].sum()), abs=2e-3)
                assert one["own"] == pytest.approx(float(found.own_shares[:, number, column].sum()), abs=2e-3)
                parts = {
                    label: float(share)
                    for label, share in zip(found.labels, found.shares[:, number, column], strict=True)
                }
                assert len(one["components"]) == 2
                for of in one["components"]:
                    assert of["share"] == pytest.approx(parts[of["component"]], abs=2e-3)
            assert sum(one["own"] for one in split["concepts"]) + split["remainder"] == pytest.approx(1, abs=1e-5)
            assert f"What {name} is made of" in printed
        assert "(remainder)" in printed
        assert "shares under 3 % are counted together" in " ".join(printed.split())
        asked_all = ["--threshold", "0.5", *asked, *more]
        assert main(["interpret", "image", str(stores / "deit"), "test:0:5", "test:0:2", *asked_all]) == 0
        trees = capsys.readouterr().out.split("is made of\n")[1:]
        for image, tree_shown in enumerate(trees):
            lines = tree_shown.split("\nShare:")[0].splitlines()
            expected = found.show(image, threshold=0.005).splitlines()[1:]
            assert [line.split(" % ")[1] for line in lines] == [line.split(" % ")[1] for line in expected]


@pytest.mark.parametrize("share", ["-1", "101", "nan", "few"])
def test_a_threshold_is_a_percentage(share, capsys):
    with pytest.raises(SystemExit):
        main(["interpret", "image", "store", "test:0:5", "--threshold", share])
    assert f"from 0 to 100; got '{share}'" in capsys.readouterr().err


# --- models ---------------------------------------------------------------------------------------------------------


def test_models_are_compared(stores, tmp_path, capsys):
    named = ["eye=" + str(stores / "clip"), str(stores / "deit")]
    asked = ["--aligner", str(stores / "deit.safetensors"), "--features", "colour", "size", "--images", "20"]
    asked += ["--resamples", "10", "--draws", "9", "--plot", str(tmp_path / "a" / "models.png")]
    assert main(["interpret", "compare", *named, *asked, "--json", str(tmp_path / "told.json")]) == 0
    printed = capsys.readouterr().out
    assert "Over how many components features are spread" in printed
    assert "How alike heads are: debiased CKA" in printed
    assert (tmp_path / "a" / "models.png").read_bytes()[:4] == b"\x89PNG"
    told = answered(tmp_path / "told.json", "compare")
    assert list(told["concentrations"]) == ["eye", "deit"]
    assert told["concentrations"]["eye"]["images"] == 20
    own = in_clip(stores)[0].images([number * IMAGES // 20 for number in range(20)])
    bank = text_bank(original("clip"), features()["size"], templates=TEMPLATES)
    scores = score_features(own, {"size": bank}, bootstrap=0, permutations=0).covariance[:, 0]
    ratio = told["concentrations"]["eye"]["features"]["size"]["ratio"]
    assert ratio == pytest.approx(float(participation_ratio(scores)), rel=1e-3)
    (pair,) = told["matchings"]
    assert pair["models"] == ["eye", "deit"]
    assert [match["component"] for match in pair["of_second"]] == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert (
        main(["interpret", "compare", *named, *asked[:-2], "--by", "texts", "--texts", str(stores / "texts.txt")]) == 0
    )
    assert "correlation with 3 texts" in capsys.readouterr().out


def test_images_are_paired_by_what_they_are_called(stores, tmp_path):
    scenes = Scenes("test", size=IMAGES)

    class Turned:
        """The same scenes in another order, and some of another kind."""

        identity, count, labels = "turned", 10, {}

        def read(self, start, stop):
            from vitdecomp_lens.collect import images_from

            samples = images_from(scenes).read(0, IMAGES)[::-1][:10]
            return [type(one)(one.id, one.image, {}) for one in samples[start:stop]]

    collect(HookedViT(original("clip")), Turned(), tmp_path / "turned", batch_size=4)
    subjects = compare._stores([str(stores / "clip"), str(tmp_path / "turned")])
    words = Words(argparse.Namespace(clip=None, clip_pretrained=None, text_cache=None), Console(stderr=True))
    some = [compare.Subject(store, words, []) for store in subjects.values()]
    compare._share_images(some, argparse.Namespace(images=500))
    assert some[0].ids() == some[1].ids() == [f"test:0:{n}" for n in range(14, 24)]
    torch.testing.assert_close(some[0].parts().values, some[1].parts().values, rtol=0, atol=1e-5)


# --- what cannot be answered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["component", "{}/clip"], "Expected components, such as L3H1"),
        (["feature"], "Expected a store"),
        (["component", "{}/clip", "L9H9"], "There is no component 'L9H9'"),
        (["component", "{}/nowhere", "L0H0"], "Expected a store"),
        (["component", "L3H1"], "Expected a store, a folder that 'vitdecomp-lens collect' made, before the components"),
        (["component", "L3H1", "mlp.2"], "Expected a store at 'L3H1'"),
        (["component", "{}/clip", "L0H0", "--aligner", "{}/deit.safetensors"], "Leave out --aligner"),
        (["component", "{}/clip", "L0H0", "--texts", "{}/twice.txt"], "lines 1 and 3 of"),
        (["component", "{}/deit", "L0H0"], "expected --aligner FILE"),
        (["component", "{}/clip", "L0H0", "--texts", "genral"], "did you mean 'general'"),
        (["component", "{}/clip", "L0H0", "--source", "testbed:test:9"], "give --model NAME"),
        (["component", "L0H0", "--model", "test_vit"], "Expected --source"),
        (["component", "{}/clip", "L0H0", "--clip", "ViT-B-17"], "did you mean 'ViT-B-1"),
        (["component", "{}/clip", "L0H0", "--clip-pretrained", "openai"], "leave out --clip-pretrained"),
        (["component", "{}/clip", "L0H0", "--clip", "ViT-B-32"], "Give --clip-pretrained TAG"),
        (["component", "L0H0", "--model", "testbed/deit", "--images", "2"], "of 'testbed/deit' are not those"),
        (["component", "L0H0", "--model", "testbed/deit", "--images", "2"], "shipped: --aligner testbed/deit."),
        (["component", "{}/deit", "L0H0", "--aligner", "{}/texts.txt"], "texts.txt"),
        (["component", "{}/clip", "L0H0", "--texts", "{}/empty.txt"], "empty.txt', one a line; got none"),
        (["feature", "{}/clip", "mine={}/empty.txt"], "empty.txt', one a line; got none"),
        (["feature", "{}/clip", "xyz"], ". For one of your own: xyz=FILE"),
        (["feature", "{}/clip", "{}/texts.txt"], "texts.txt, with a name for it"),
        (["feature", "{}/clip", "color"], "did you mean 'colour'"),
        (["feature", "{}/clip", "mine={}/none.txt"], "there is no file"),
        (["feature", "{}/clip", "colour", "colour"], "named twice"),
        (["feature", "{}/clip", "={}/texts.txt"], "Expected NAME=FILE, a name and a file"),
        (["feature", "{}/clip", "colour="], "Expected NAME=FILE, a name and a file"),
        (["feature", "{}/clip", "mine={}/twice.txt"], "lines 1 and 3 of"),
        (["feature", "{}/clip", "colour", "--against", "colour"], "Expected other features than 'colour'"),
        (["feature", "{}/clip", "colour", "--images", "3"], "at least 4 images"),
        (["image", "{}/clip"], "Expected images"),
        (["image", "{}/clip", "test:0:99"], "no image 'test:0:99'"),
        (["image", "{}/none.png", "--model", "testbed/clip"], "none.png"),
        (["image", "{}/clip", "test:0:1", "--aligner", "testbed/clop"], "no aligner of 'clop'"),
        (["image", "{}/clip", "test:0:1", "--pictures", "{}/shown"], "Name the model and files of images"),
        (["image", "a.png", "--model", "testbed/clip", "--pictures", "{}/texts.txt"], "--pictures must be a folder"),
        (["image", "{}/clip", "test:0:1", "--tree", "{}/none.json"], "Expected a tree of concepts"),
        (["image", "{}/clip", "test:0:1", "--tree", "{}/circle.json"], "in a circle"),
        (["image", "{}/clip", "test:0:1", "--tree", "{}/one.json"], "at least two texts"),
        (["image", "{}/clip", "test:0:1", "--tree", "{}/strange.json"], "'zebra'"),
        (["compare", "{}/clip", "{}/clip"], "two are called 'clip'"),
        (["compare", "{}/clip", "--features", "colour", "--plot", "{}/models.xyz"], "Expected --plot"),
    ],
)
def test_what_cannot_be_answered_is_said(stores, capsys, arguments, says):
    assert main(["interpret", *(one.replace("{}", str(stores)) for one in arguments)]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_options_of_the_command_line_are_explained(capsys):
    for question, says in (
        ("compare", "may be repeated, once for each model"),
        ("component", "with testbed/clip also objects or captions"),
    ):
        with pytest.raises(SystemExit):
            main(["interpret", question, "--help"])
        assert says in " ".join(capsys.readouterr().out.split())


def test_a_model_without_weights_is_told(stores, capsys):
    asked = ["interpret", "component", "L0H0", "--model", "test_vit", "--source", "testbed:test:2"]
    assert main(asked) == 2
    assert "Note: the model has random initial values." in " ".join(capsys.readouterr().err.split())


def test_an_aligner_of_another_model_is_refused(stores, tmp_path, capsys):
    collect(HookedViT(perturb(original("deit"), seed=5)), Scenes("test", size=4), tmp_path / "other")
    asked = ["--aligner", str(stores / "deit.safetensors")]
    assert main(["interpret", "component", str(tmp_path / "other"), "L0H0", *asked]) == 2
    assert "weights=" in capsys.readouterr().err


def test_stores_without_a_common_image_are_not_compared(stores, tmp_path, capsys):
    collect(HookedViT(original("clip")), Scenes("validation", size=4), tmp_path / "val")
    assert main(["interpret", "compare", str(stores / "clip"), str(tmp_path / "val")]) == 2
    assert "no image is in all of them" in " ".join(capsys.readouterr().err.split())


def test_the_clip_is_known_by_its_weights(stores):
    assert Store(stores / "clip").space is None
