"""The report: its numbers, its size, what it escapes, and what it refuses. How the page behaves: test_report_page."""

import base64
import hashlib
import html
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from labelled_samples import as_users_run_it
from PIL import Image
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY, perturb

from vitdecomp_lens import HookedViT, attribute_tokens, decompose
from vitdecomp_lens.cli import main
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.errors import InputError, UnknownNameError, UnsupportedModelError
from vitdecomp_lens.interpret import label_stability, text_span
from vitdecomp_lens.patch_maps import PatchMaps
from vitdecomp_lens.report import making, report
from vitdecomp_lens.report.packing import fixed, picture, unfixed

HOSTILE = (
    "</script><script>document.title='caught'</script>",
    "\"quotes' & <b>tags</b>\u2028",
    "\u202eright to left\u202c שלום",
    "👩‍🚀 emoji",
    "x" * 10_000,
)
GROUPS = {"shape": 6, "colour": 4}


def photograph(seed=0, width=40, height=32):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def photographs(count):
    return [photograph(seed) for seed in range(count)]


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return perturb(make())


def shown(page):
    """What the page is given."""
    return json.loads(re.search(r'<script id="content" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def model():
    made = seeded(partial(VisionTransformer, **TINY))
    made.pretrained_cfg = {"input_size": (3, 32, 32), "label_groups": GROUPS, "label_names": list("abcdefghij")}
    return HookedViT(made)


@pytest.fixture(scope="module")
def curved():
    cfg = MaxxVitCfg(
        embed_dim=(16, 16),
        depths=(1, 1),
        stem_width=8,
        block_type=("M", "M"),
        transformer_cfg=MaxxVitTransformerCfg(window_size=(4, 4), grid_size=(4, 4), dim_head=8),
        head_hidden_size=16,
    )
    made = seeded(partial(MaxxVit, cfg, img_size=64, num_classes=5))
    made.pretrained_cfg = {"input_size": (3, 64, 64)}
    return HookedViT(made)


def aligner_of(model, width=12):
    parts = decompose(model, torch.zeros(1, 3, 32, 32))
    draw = torch.Generator().manual_seed(1)
    d_rep = parts.values.shape[-1]
    weights, bias = torch.randn(d_rep, width, generator=draw), torch.randn(width, generator=draw)
    return Aligner(parts.components, (d_rep,), torch.eye(d_rep), weights, bias, "planted", parts.metadata)


def bank_of(texts, width=12, seed=2):
    directions = torch.randn(len(texts), width, generator=torch.Generator().manual_seed(seed))
    return TextBank(texts, directions, space="planted")


# --- numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "step"), [(2, 1 / 32767), (3, 1 / 8388607)])
def test_fixed_numbers_are_right_to_half_a_step(size, step):
    values = torch.randn(3, 4, 50, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e5]).double()[:, None, None]
    values[1, 2] = 0
    error = (unfixed(fixed(values, size)) - values).abs()
    assert (error <= 0.5001 * step * values.abs().amax(-1, keepdim=True)).all()
    assert not unfixed(fixed(values, size))[1, 2].any()


def test_scores_are_contributions_to_logits(model):
    images = photographs(3)
    found = shown(report(model, images, words=1).html)
    parts = decompose(model, model.preprocess(images), of="logits")
    assert [one["label"] for one in found["components"]] == list(parts.labels)
    for number, image in enumerate(found["images"]):
        torch.testing.assert_close(unfixed(image["scores"]), parts.values[:, number].double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(unfixed(image["totals"]), parts.total[number].double(), atol=1e-5, rtol=0)
    assert [(one["name"], one["count"]) for one in found["questions"]] == list(GROUPS.items())


def test_what_is_left_is_what_ablate_leaves(model):
    images, others = photographs(2), torch.randn(9, 3, 32, 32)
    found = shown(report(model, images, reference=others, words=1).html)
    parts = decompose(model, model.preprocess(images), of="logits")
    rows = [0, 3, 8]
    labels = [found["components"][row]["label"] for row in rows]
    mean = parts.ablate(labels, how="mean", reference=decompose(model, others, of="logits")).sum()
    zero = parts.ablate(labels).sum()
    substitute = unfixed(found["substitute"])
    for number, image in enumerate(found["images"]):
        left = unfixed(image["totals"]) - unfixed(image["scores"])[rows].sum(0)
        torch.testing.assert_close(left, zero[number].double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(left + substitute[rows].sum(0), mean[number].double(), atol=1e-4, rtol=0)


def test_heatmaps_are_scores_of_patches_and_sum_to_the_whole(model):
    images = photographs(2)
    found = shown(report(model, images, words=1).html)
    for number, image in enumerate(found["images"]):
        maps = image["maps"]
        assert maps["answers"] == list(range(10))
        tokens = attribute_tokens(model, model.preprocess(images[number : number + 1]), torch.eye(10), of="logits")
        values = unfixed(maps["values"]).reshape(10, -1, maps["rows"], maps["columns"])
        for answer in (0, 7):
            oracle = PatchMaps(tokens, answer)
            for place, row in enumerate(maps["components"][answer]):
                label = found["components"][row]["label"]
                torch.testing.assert_close(values[answer, place], oracle.of(label), atol=1e-4, rtol=0)
            torch.testing.assert_close(values[answer].sum(0), oracle.of_all(), atol=1e-4, rtol=0)
        # The photograph is 40 × 32, and the model sees a square in its middle.
        assert image["maps"]["seen"] == pytest.approx(model.preprocess_geometry(images[number]))


def test_weak_components_share_one_heatmap_where_there_is_no_room(model, monkeypatch):
    monkeypatch.setattr(making, "FOR_MAPS", 10 * 4 * 16 * 2 * 4 / 3)  # four maps of 4 × 4 patches for each answer
    images = photographs(1)
    maps = shown(report(model, images, words=1).html)["images"][0]["maps"]
    assert {len(rows) for rows in maps["components"]} == {3}
    assert len(maps["reading"]) > 3
    tokens = attribute_tokens(model, model.preprocess(images), torch.eye(10), of="logits")
    values = unfixed(maps["values"]).reshape(10, 4, 4, 4)
    torch.testing.assert_close(values[2].sum(0), PatchMaps(tokens, 2).of_all(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("aligned", [True, False])
def test_texts_are_scored_by_cosine_similarity(model, aligned):
    images, others = photographs(2), torch.randn(6, 3, 32, 32)
    aligner = aligner_of(model) if aligned else None
    width = 12 if aligned else 32
    banks = {"one": bank_of(["a", "b", "c"], width), "two": bank_of(["d", "a"], width, seed=3)}
    found = shown(report(model, images, texts=banks, aligner=aligner, scale=50.0, reference=others, words=1).html)
    parts, mean = (decompose(model, batch) for batch in (model.preprocess(images), others))
    if aligned:
        parts, mean = parts.map(aligner), mean.map(aligner)
    directions = torch.cat([bank.directions for bank in banks.values()])
    cosines = torch.nn.functional.cosine_similarity(parts.total[:, None], directions, dim=-1)
    left = parts.ablate("L1H2", how="mean", reference=mean).project(directions).sum() / parts.total.norm(
        dim=-1, keepdim=True
    )
    row = parts.labels.index("L1H2")
    for number, image in enumerate(found["images"]):
        torch.testing.assert_close(unfixed(image["totals"]).float(), cosines[number], atol=1e-5, rtol=0)
        torch.testing.assert_close(unfixed(image["scores"]).sum(0).float(), cosines[number], atol=1e-4, rtol=0)
        edited = unfixed(image["totals"]) - unfixed(image["scores"])[row] + unfixed(image["substitute"])[row]
        torch.testing.assert_close(edited.float(), left[number], atol=1e-4, rtol=0)
        maps = image["maps"]
        held = unfixed(maps["values"]).reshape(5, len(maps["components"][0]) + 1, -1)
        place = maps["components"][4].index(row)
        tokens = attribute_tokens(model, model.preprocess(images[number : number + 1]), directions, through=aligner)
        expected = tokens["L1H2"][0, 1:, 4] / parts.total[number].norm()
        torch.testing.assert_close(held[4, place].float(), expected, atol=1e-5, rtol=0)
    assert found["scale"] == 50.0
    assert [one["name"] for one in found["questions"]] == ["one", "two"]


@pytest.mark.parametrize("of_texts", [True, False])
def test_relative_scores_give_the_same_probabilities(model, of_texts):
    images, others = photographs(1), torch.randn(5, 3, 32, 32)
    asked = {"texts": {"one": bank_of(list("abc"), 32), "two": bank_of(list("de"), 32)}} if of_texts else {}
    made = [
        shown(report(model, images, reference=others, words=1, relative=relative, **asked).html)
        for relative in (False, True)
    ]
    plain, above = ([unfixed(one["images"][0][name]) for name in ("totals", "scores")] for one in made)
    for question in made[0]["questions"]:
        here = slice(question["first"], question["first"] + question["count"])
        for one, other in zip(plain, above, strict=True):
            expected = one[..., here] - one[..., here].mean(-1, keepdim=True)
            torch.testing.assert_close(other[..., here], expected, atol=1e-4, rtol=0)
        heat, heat_above = (unfixed(one["images"][0]["maps"]["values"])[here].sum(1) for one in made)
        torch.testing.assert_close(heat_above, heat - heat.mean(0), atol=1e-4, rtol=0)
    assert made[1]["unit"].endswith("above the mean")


def test_an_activation_before_the_classifier_is_frozen_at_each_image(curved):
    assert curved.has_activation_before_classifier
    images, others = photographs(2), torch.randn(4, 3, 64, 64)
    found = shown(report(curved, images, reference=others, words=1).html)
    batch = curved.preprocess(images)
    logits = curved(batch).detach()
    parts, mean = decompose(curved, batch), decompose(curved, others).values.mean(1)
    for number, image in enumerate(found["images"]):
        scores = unfixed(image["scores"])
        torch.testing.assert_close(scores.sum(0).float(), logits[number], atol=1e-4, rtol=1e-4)
        weight = curved.unembedding_at(parts.total[number])[0].detach()
        torch.testing.assert_close(unfixed(image["substitute"])[:-1].float(), mean @ weight, atol=1e-4, rtol=1e-4)
        values = unfixed(image["maps"]["values"])
        tokens = attribute_tokens(curved, batch[number : number + 1], weight.T)
        torch.testing.assert_close(values[1].sum(0), PatchMaps(tokens, 1).of_all().flatten(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by", ["layer", "head"])
def test_components_are_layers_or_heads(model, by):
    found = shown(report(model, photographs(1), by=by, words=1).html)
    kinds = {one["kind"] for one in found["components"]}
    assert ("head" in kinds) == (by == "head")
    total = unfixed(found["images"][0]["scores"]).sum(0)
    torch.testing.assert_close(total, unfixed(found["images"][0]["totals"]), atol=1e-4, rtol=0)


# --- what there is room for -----------------------------------------------------------------------------------


def test_the_likeliest_of_many_classes_are_sent_and_those_asked_for(monkeypatch):
    model = HookedViT(seeded(partial(VisionTransformer, **{**TINY, "num_classes": 60})))
    images = photographs(2)
    logits = model(model.preprocess(images)).detach()
    unlikely = int(logits.amax(0).argmin())
    monkeypatch.setattr(making, "FOR_SCORES", 20 * len(decompose(model, torch.zeros(1, 3, 32, 32), of="logits")) * 4)
    made = report(model, images, top=3, classes=[unlikely], words=1)
    found = shown(made.html)
    assert made.answers == len(found["answers"]) == 20
    best = set(logits.log_softmax(1).amax(0).topk(19).indices.tolist())
    sent = [int(full.removeprefix("class ")) for _, full in found["answers"]]
    assert set(sent) == best | {unlikely}
    assert found["questions"] == [{"name": "", "first": 0, "count": 20, "of": 60}]
    assert any("20 of 60" in note for note in found["notes"])
    for number, image in enumerate(found["images"]):
        top = set(logits[number].topk(3).indices.tolist()) | {unlikely}
        assert {sent[place] for place in image["maps"]["answers"]} == top


def test_ten_photographs_and_a_thousand_classes_stay_below_5_mb():
    wide = seeded(partial(VisionTransformer, img_size=112, patch_size=8, embed_dim=48, depth=3, num_heads=12))
    images = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (900, 1200, 3), np.uint8)) for n in range(10)]
    made = report(HookedViT(wide), images, words=1, resamples=1)
    assert made.size < 5e6, repr(made)
    assert made.images == 10


def test_pictures_are_small_and_keep_their_shape():
    assert picture(photograph()).startswith("data:image/png;base64,")
    packed = picture(photograph(0, 1200, 30))
    assert packed.startswith("data:image/jpeg;base64,")
    assert len(packed) < 10_000
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    assert len(picture(Image.fromarray(noise))) < 62_000  # what no quality makes small is coarse


# --- words ----------------------------------------------------------------------------------------------------


def test_words_are_those_of_text_span_with_their_stability(model):
    others, aligner, bank = torch.randn(12, 3, 32, 32), aligner_of(model), bank_of([f"text {n}" for n in range(20)])
    found = shown(report(model, photographs(1), aligner=aligner, bank=bank, reference=others, words=2).html)["words"]
    parts = decompose(model, others).map(aligner)
    heads = parts.select(labels=[one.label for one in parts.components if one.kind != "constant"])
    read = label_stability(heads, bank, partial(text_span, steps=2, variant="corrected"), resamples=20)
    for label in ("L0H1", "L1H3", "mlp.1"):
        said = [(found["texts"][number], again) for number, _, again in found["said"][label]]
        assert said == [(text, pytest.approx(again)) for text, again in read[label]]
        row = read.reading.labels.index(label)
        shares = [share for _, share, _ in found["said"][label]]
        assert sum(shares) == pytest.approx(float(read.reading.share_explained[row, -1]), abs=1e-5)
        assert found["chance"][label] == pytest.approx(float(read.chance[row]))
    assert "norm.bias" not in found["said"]
    assert "12 reference images" in found["about"]
    assert "hint only" in found["about"]


def test_the_words_of_a_classifier_are_its_classes(model):
    others = torch.randn(12, 3, 32, 32)
    found = shown(report(model, photographs(1), reference=others, words=2).html)["words"]
    bank = TextBank(list("abcdefghij"), model.W_U.T.detach(), space="the classifier's")
    expected = text_span(decompose(model, others), bank, steps=2, variant="corrected")
    assert [found["texts"][number] for number, *_ in found["said"]["L1H0"]] == expected.texts["L1H0"]


def test_without_reference_words_are_of_the_images_if_they_are_enough(model):
    few, enough = (shown(report(model, photographs(count), words=1).html)["words"] for count in (3, 5))
    assert not few["said"]
    assert "at least 4 images" in few["about"]
    assert enough["said"]
    assert "images of this report" in enough["about"]


# --- the page -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(model):
    bank = bank_of(HOSTILE, 32)
    return report(model, photographs(2), texts={HOSTILE[0]: bank}, names=HOSTILE[:2], title=HOSTILE[0], words=2)


def test_what_comes_from_outside_is_never_markup(hostile):
    page = hostile.html
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "caught</" not in page
    found = shown(page)
    assert found["title"] == HOSTILE[0]
    assert [name for name, _ in found["answers"]] == list(HOSTILE)
    assert [one["name"] for one in found["images"]] == list(HOSTILE[:2])


def test_names_that_are_no_text_are_shown_all_the_same(model, tmp_path):
    odd = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    made = report(model, [photograph()], names=[odd], words=1)
    made.save(tmp_path / "page.html")
    assert shown((tmp_path / "page.html").read_text(encoding="utf-8"))["images"][0]["name"] == odd


def test_the_page_asks_nothing_of_any_network(hostile):
    page = hostile.html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        inside = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    without = page.replace(json.dumps(HOSTILE[0])[1:-1], "")
    assert not re.search(r"https?://|@import|url\(", without)
    assert "{{" not in re.sub(r'<script id="content".*?</script>', "", page, flags=re.DOTALL)


def test_names_lose_their_folders(model, tmp_path):
    path = tmp_path / "secret" / "cat.png"
    path.parent.mkdir()
    photograph().save(path)
    found = shown(report(model, [path, photograph(1)], words=1).html)
    assert [one["name"] for one in found["images"]] == ["cat.png", "image 2"]


def test_a_notebook_shows_it_in_a_frame_of_its_own(hostile):
    frame = hostile._repr_html_()
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == hostile.html
    assert 'sandbox="allow-scripts"' in frame
    assert 'title="vitdecomp_lens report"' in frame


def test_the_certificate_says_what_was_summed(model):
    certificate = dict(
        shown(report(model, photographs(2), words=1, reference=torch.randn(5, 3, 32, 32)).html)["certificate"]
    )
    assert {"Model", "Weights", "Components", "Gap", "Coverage", "Effect", "Reference", "Versions"} == set(certificate)
    assert float(certificate["Gap"].split(",")[0]) < 1e-5
    assert certificate["Reference"] == "5 images"
    assert "torch" in certificate["Versions"]


# --- what it refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "neuron"}, "by='head' or by='layer'"),
        ({"names": ["one", "two"]}, "name for each of the 1 images"),
        ({"top": 0}, "top= of at least 1"),
        ({"words": 0}, "words= of at least 1"),
        ({"resamples": 0}, "resamples= of at least 1"),
        ({"texts": {}}, "texts of at least one question"),
        ({"texts": bank_of(["a", "b"], 32), "classes": [1]}, "classes= names classes of a classifier"),
        ({"texts": bank_of(["a", "b"], 7)}, "d_rep"),
        ({"class_names": ["one"]}, "name for each of the 10 classes"),
        ({"reference": torch.zeros(2, 3, 8, 8)}, "32"),
        (
            {"texts": {"one": bank_of(["a", "b"], 32), "two": TextBank(["c", "d"], torch.eye(2, 32), space="other")}},
            "space",
        ),
        ({"texts": TextBank(["a", "b"], torch.eye(2, 32), space="s", made={"image_tower": "another"})}, "aligner="),
    ],
)
def test_what_cannot_be_used_is_refused(model, options, said):
    with pytest.raises(InputError, match=re.escape(said)):
        report(model, [photograph()], **options)


def test_images_have_to_come_as_a_list_and_be_there(model, tmp_path):
    with pytest.raises(InputError, match="as a list"), as_users_run_it():
        report(model, photograph())
    with pytest.raises(InputError, match="at least one"):
        report(model, [])
    with pytest.raises(InputError, match="cannot be read"):
        report(model, [tmp_path / "none.jpg"])


def test_unknown_classes_and_models_without_any_are_refused(model):
    with pytest.raises(UnknownNameError, match="no class"):
        report(model, [photograph()], classes=["zebra"])
    bare = HookedViT(seeded(partial(VisionTransformer, **{**TINY, "num_classes": 0})))
    with pytest.raises(UnsupportedModelError, match="classifier"):
        report(bare, [photograph()])
    other = aligner_of(HookedViT(seeded(partial(VisionTransformer, **{**TINY, "depth": 1}))))
    with pytest.raises(InputError, match="aligner was made for"):
        report(model, [photograph()], texts=bank_of(["a", "b"]), aligner=other)


def test_a_page_that_cannot_be_written_says_so(hostile, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        hostile.save(tmp_path)
    assert hostile.save(tmp_path / "new" / "page.html").read_text(encoding="utf-8") == hostile.html


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with photographs, one of which is none, and texts."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, image in enumerate(photographs(5)):
        image.save(folder / f"{number}.png")
    (folder / "broken.txt").write_text("no picture")
    (folder / "texts.txt").write_text("a red object\na blue star\n")
    return folder


def test_the_command_shows_scenes_of_the_testbed_by_itself(tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    assert main(["report", "--model", "testbed/deit", "--images", "40", "--out", str(out)]) == 0
    found = shown(out.read_text(encoding="utf-8"))
    assert len(found["images"]) == 10
    assert found["title"] == "testbed/deit"
    assert [one["name"] for one in found["questions"]][:2] == ["shape", "colour"]
    assert "Aligner" in dict(found["certificate"])  # words are a CLIP's, through the aligner that is shipped
    assert found["hasMean"]
    assert f"Written to {out}" in " ".join(capsys.readouterr().err.split()).replace(" /", " /")


@pytest.mark.parametrize("asked", [["--texts", "texts.txt"], []])
def test_the_command_scores_with_texts(asked, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    out = tmp_path / "page.html"
    options = ["--model", "testbed/clip", "--images", "30", "--relative", "--out", str(out)]
    assert main(["report", "0.png", "1.png", "broken.txt", *options, *asked]) == 1, "one is no photograph"
    found = shown(out.read_text(encoding="utf-8"))
    assert [one["name"] for one in found["images"]] == ["0.png", "1.png"]
    assert found["unit"] == "cosine similarity above the mean"
    assert found["scale"] > 1
    assert [name for name, _ in found["answers"]][:2] == (
        ["a red object", "a blue star"] if asked else ["a circle", "a square"]
    )


def test_the_command_takes_any_classifier(tiny, tmp_path, capsys):
    out = tmp_path / "page.html"
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"name {number}" for number in range(7)))
    options = ["--model", "test_vit", "--num-classes", "7", "--class-names", str(names), "--reference", str(tiny)]
    assert (
        main(["report", str(tiny / "0.png"), *options, "--class", "name 3", "--title", "Mine", "--out", str(out)]) == 0
    )
    found = shown(out.read_text(encoding="utf-8"))
    assert found["title"] == "Mine"
    assert found["answers"][3] == ["name 3", "name 3"]
    assert dict(found["certificate"])["Reference"] == "5 images"
    assert "random initial values" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--model", "test_vit"], "Expected photographs"),
        (["broken.txt", "--model", "test_vit"], "there is none"),
        (["0.png", "--model", "test_vit", "--num-classes", "3", "--out", "."], "is a folder"),
        (["0.png", "--model", "test_vit", "--num-classes", "3", "--class-names", "none.txt"], "cannot be read"),
        (["0.png", "--model", "testbed/deit", "--reference", "testbed:some"], "testbed:SPLIT:SIZE"),
        (["0.png", "--model", "test_vit", "--num-classes", "3", "--texts", "texts.txt"], "Expected --clip NAME"),
        (["0.png", "--model", "test_vit", "--num-classes", "3", "--out", "0.png"], "is one of the photographs"),
    ],
)
def test_the_command_refuses(asked, said, tiny, monkeypatch, capsys):
    monkeypatch.chdir(tiny)
    assert main(["report", *asked]) == 2
    assert said in capsys.readouterr().err


def test_a_reference_image_that_cannot_be_read_is_named(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny)
    photograph().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    assert main(["report", "0.png", "--model", "test_vit", "--num-classes", "3", "--reference", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "b.png" in said
    assert "cannot be read" in said
    assert "Leave it out" in said


def test_the_files_of_the_page_are_part_of_the_package():
    from importlib.resources import files

    here = files("vitdecomp_lens.report")
    assert all(here.joinpath(f"page.{kind}").is_file() for kind in ("html", "css", "js"))
