"""Explanations: shares, tables, heatmaps on the photograph, JSON, pictures."""

import io
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import timm
import torch
from labelled_samples import as_users_run_it
from matplotlib.text import Text
from PIL import Image, ImageOps
from real_data import MODEL, PHOTOGRAPHS, WEIGHTS, needs_real_data, true_class
from rich.console import Console
from tiny_models import TINY_MODELS, perturb

from vitdecomp_lens import HookedViT, attribute, decompose
from vitdecomp_lens.class_names import ClassNames, Question
from vitdecomp_lens.errors import InputError, UnknownNameError, UnsupportedModelError
from vitdecomp_lens.explain import Explainer, explain, open_upright
from vitdecomp_lens.explanation import Explanation, Heatmap, printable
from vitdecomp_lens.pictures import _Drawing, save_picture
from vitdecomp_lens.testbed.models import CLASSES, build
from vitdecomp_lens.testbed.scenes import ATTRIBUTES
from vitdecomp_lens.weights import create_timm, load_weights


def photograph(width=200, height=160, *, seed=0, mode="RGB"):
    """A photograph with something to see everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HookedViT(perturb(timm.create_model("test_vit", depth=2), amount=0.05))


@pytest.fixture(scope="module")
def explanation(model):
    return explain(model, [photograph()], top=4)[0]


# --- scores ---------------------------------------------------------------------------------------------------


def test_shares_sum_to_one_with_constants(explanation):
    assert sum(one.share for one in explanation.contributions) == pytest.approx(1, abs=1e-5)
    assert {one.kind for one in explanation.contributions} == {"embed", "head", "mlp", "constant"}


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
@pytest.mark.parametrize("relative", [False, True])
def test_scores_are_those_of_attribute(model, by, relative):
    (explanation,) = explain(model, [photograph()], class_=7, by=by, relative=relative, top=1)
    direction = torch.zeros(1, 1000)
    direction[0, 7] = 1
    if relative:
        direction -= 1 / 1000
    scores = attribute(model, model.preprocess([photograph()]), direction, by=by, of="logits")
    assert set(explanation.by_label) == set(scores.labels)
    size = float(scores.values.abs().max())
    for label, one in explanation.by_label.items():
        assert one.score == pytest.approx(float(scores[label]), abs=1e-5 * size)
    biases = sum(one.score - one.patches - one.prefix for one in explanation.contributions if one.patches is not None)
    assert (abs(biases) < 1e-5 * size) == (by == "head"), "attention left whole has its output bias, from no token"
    parts = explanation.on_patches + sum(explanation.prefix.values()) + explanation.elsewhere
    assert parts == pytest.approx(explanation.logit, abs=1e-4 * size)
    assert explanation.logit == pytest.approx(float(scores.total), abs=1e-5 * size)


def test_a_relative_logit_is_the_logit_minus_the_mean(model):
    logits = model(model.preprocess([photograph()]))[0].detach()
    (absolute,) = explain(model, [photograph()], class_=3)
    (relative,) = explain(model, [photograph()], class_=3, relative=True)
    assert absolute.logit == pytest.approx(float(logits[3]), abs=1e-5)
    assert relative.logit == pytest.approx(float(logits[3] - logits.mean()), abs=1e-5)
    assert relative.predictions == absolute.predictions


def test_the_likeliest_class_is_explained_unless_another_is_named(model, explanation):
    logits = model(model.preprocess([photograph()]))[0].detach()
    assert explanation.index == int(logits.argmax())
    assert [p.index for p in explanation.predictions] == logits.topk(5).indices.tolist()
    assert explanation.predictions[0].probability == pytest.approx(float(logits.softmax(0).max()), abs=1e-6)
    assert explain(model, [photograph()], class_="goldfish")[0].index == 1


def test_patches_prefix_and_the_rest_sum_to_the_logit(explanation):
    parts = explanation.on_patches + sum(explanation.prefix.values()) + explanation.elsewhere
    assert parts == pytest.approx(explanation.logit, abs=1e-5)
    assert list(explanation.prefix) == ["CLS"]
    assert sum(one.prefix or 0 for one in explanation.contributions) == pytest.approx(
        explanation.prefix["CLS"], abs=1e-6
    )


def test_a_heatmap_and_the_prefix_sum_to_the_component(explanation):
    assert len(explanation.top) == 4
    for heatmap in explanation.top:
        one = explanation.by_label[heatmap.of]
        assert float(heatmap.values.sum()) + one.prefix == pytest.approx(one.score, abs=1e-6)


def test_the_components_with_heatmaps_write_most_from_patches(explanation):
    sizes = {one.component: abs(one.patches) for one in explanation.contributions if one.patches is not None}
    chosen = {heatmap.of for heatmap in explanation.top}
    assert min(sizes[label] for label in chosen) >= max(sizes[label] for label in sizes.keys() - chosen)


def test_all_heatmaps_sum_to_the_heatmap_of_all(model):
    (explanation,) = explain(model, [photograph()], top=1000)
    assert torch.allclose(sum(one.values for one in explanation.top), explanation.heatmap.values, atol=1e-6)


def test_a_pool_that_reads_all_tokens_is_explained_too():
    model = HookedViT(TINY_MODELS["siglip"]())
    model.preprocess = lambda photographs: torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (explanation,) = explain(model, [photograph(224, 224)])
    assert explanation.prefix == {}
    assert sum(one.share for one in explanation.contributions) == pytest.approx(1, abs=1e-4)
    assert explanation.by_label["pool.mlp"].prefix is None
    assert explanation.on_patches + explanation.elsewhere == pytest.approx(explanation.logit, abs=1e-5)


# --- where --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(200, 160), (160, 160), (90, 300), (400, 170)])
def test_the_heatmap_covers_exactly_what_the_model_sees(model, size):
    (explanation,) = explain(model, [photograph(*size)], top=0)
    laid = explanation.on_photograph(explanation.heatmap.values)
    assert tuple(laid.shape) == size[::-1]
    left, top, right, bottom = explanation.seen
    assert (left, top, right, bottom) == pytest.approx(model.preprocess_geometry(photograph(*size)))
    for y in range(size[1]):
        for x in range(size[0]):
            inside = left <= x + 0.5 < right and top <= y + 0.5 < bottom
            assert bool(laid[y, x].isnan()) != inside
    rows, columns = explanation.heatmap.values.shape
    y, x = size[1] // 2, size[0] // 2 + 7
    row, column = int((y + 0.5 - top) / (bottom - top) * rows), int((x + 0.5 - left) / (right - left) * columns)
    assert laid[y, x] == explanation.heatmap.values[row, column]


def test_what_lies_outside_of_the_outline_does_not_reach_the_model(model):
    original = photograph(300, 160)
    (explanation,) = explain(model, [original], top=0)
    left, right = explanation.seen[0], explanation.seen[2]
    outside, inside = original.copy(), original.copy()
    outside.paste("white", (0, 0, int(left) - 4, 160))  # resizing looks a few pixels around
    outside.paste("white", (int(right) + 5, 0, 300, 160))
    inside.paste("white", (int(left) + 2, 0, int(left) + 6, 160))
    seen = model.preprocess([original, outside, inside])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_a_photograph_is_turned_as_its_camera_says(model, tmp_path):
    upright = photograph(120, 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter to show
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).size == (120, 200)
    (turned,) = explain(model, [tmp_path / "turned.png"], top=0)
    (plain,) = explain(model, [upright], top=0)
    assert turned.size == (120, 200)
    assert turned.logit == plain.logit
    assert torch.equal(turned.heatmap.values, plain.heatmap.values)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_any_kind_of_photograph_becomes_rgb(mode, tmp_path):
    grey = photograph(mode="L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
        assert image.mode == mode
    else:
        image = (grey if mode in ("L", "1", "LA") else photograph()).convert(mode)
    path = tmp_path / ("photograph.tif" if mode in ("CMYK", "YCbCr", "I;16") else "photograph.png")
    image.save(path)
    rgb = open_upright(path)
    assert (rgb.mode, rgb.size) == ("RGB", (200, 160))
    reference = photograph() if mode in ("P", "RGBA", "CMYK", "YCbCr") else grey
    difference = np.abs(np.asarray(rgb.convert("L"), dtype=float) - np.asarray(reference.convert("L"), dtype=float))
    assert difference.mean() < (128 if mode == "1" else 12), "it shows the same"


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    photograph().convert("P").save(tmp_path / "palette.png", transparency=bytes(range(256)))
    assert open_upright(tmp_path / "palette.png").mode == "RGB"


# --- bad input ----------------------------------------------------------------------------------------------------


def test_what_is_no_photograph_is_named(model, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a photograph")
    whole = io.BytesIO()
    photograph().save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:200])
    for name in ("broken.jpg", "cut.png", "none.jpg"):
        with pytest.raises(InputError, match=f"{name}.*cannot be read"):
            explain(model, [tmp_path / name])
    with pytest.raises(InputError, match=r"is a folder\. Name the files in it"):
        explain(model, [tmp_path])
    with as_users_run_it(), pytest.raises(InputError, match=re.escape("Pass [photograph].")):
        explain(model, tmp_path / "broken.jpg")


def test_a_model_without_classes_is_refused():
    for name in ("no_classifier", "open_clip_whole"):
        with pytest.raises(UnsupportedModelError, match=r"with a classifier.*attribute_tokens"):
            explain(HookedViT(TINY_MODELS[name]()), [photograph()])
    with as_users_run_it(), pytest.raises(UnsupportedModelError, match="Expected a HookedViT"):
        explain(TINY_MODELS["class_token"](), [photograph()])


def test_options_that_cannot_be_are_refused(model):
    with pytest.raises(InputError, match="at least 0; got -1"):
        explain(model, [photograph()], top=-1)
    with pytest.raises(InputError, match="each of the 1000 classes; got 2"):
        explain(model, [photograph()], class_names=["a", "b"])
    with pytest.raises(UnknownNameError, match=r"no class 'tensh'; did you mean 'tench'"):
        explain(model, [photograph()], class_="tensh")


# --- names of classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (5, 5),
        ("5", 5),
        ("tench", 0),
        ("TENCH, tinca Tinca", 0),
        ("Tinca tinca", 0),
        ("great_white-shark", 2),
        ("n01440764", 0),
        ("maillot", 638),
        ("maillot, tank suit", 639),
    ],
)
def test_a_class_is_found_by_what_it_is_called(wanted, index):
    assert ClassNames.of(1000).find(wanted) == index


def test_a_class_that_is_not_one_is_refused():
    names = ClassNames.of(1000)
    with pytest.raises(UnknownNameError, match=r"Several classes are called 'crane': 134 \(crane\), 517 \(crane\)"):
        names.find("crane")
    for wanted in (1000, "1000", -1, "-1"):
        with pytest.raises(UnknownNameError, match=f"no class {wanted}; there are 1000, numbered from 0 to 999"):
            names.find(wanted)
    with pytest.raises(InputError, match="index or its name; got bool"):
        names.find(True)


def test_names_that_hold_the_word_are_suggested_first():
    with pytest.raises(UnknownNameError, match=r"did you mean 'bald eagle' or 'american eagle' or 'beagle'"):
        ClassNames.of(1000).find("Eagle")
    with pytest.raises(UnknownNameError, match=r"did you mean '[\w' ]*\bshark'"):
        ClassNames.of(1000).find("shark")
    with pytest.raises(UnknownNameError, match=r"no class ''; there are \d+, such as"):
        ClassNames.of(1000).find("")


def test_classes_of_other_models_are_numbers_unless_named():
    assert ClassNames.of(3).names == ("class 0", "class 1", "class 2")
    assert ClassNames.of(2, ["cat", "dog"]).find("Dog") == 1
    with as_users_run_it(), pytest.raises(InputError, match="got one text"):
        ClassNames.of(2, "ab")


# --- classifiers that answer several questions ----------------------------------------------------------------


@pytest.fixture(scope="module")
def of_two_questions():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = perturb(timm.create_model("test_vit", depth=1, num_classes=5), amount=0.05)
    model.pretrained_cfg |= {"label_names": ["star", "ring", "moon", "red", "blue"]}
    model.pretrained_cfg |= {"label_groups": {"shape": 3, "colour": 2}}
    return HookedViT(model)


@pytest.mark.parametrize(("wanted", "question", "answers"), [(None, "shape", [0, 1, 2]), ("blue", "colour", [3, 4])])
def test_probabilities_are_among_the_classes_that_answer_the_same_question(of_two_questions, wanted, question, answers):
    model = of_two_questions
    logits = model(model.preprocess([photograph()]))[0].detach().double()[answers]
    (one,) = explain(model, [photograph()], class_=wanted)
    assert one.question == question
    assert one.index == (4 if wanted else answers[int(logits.argmax())])
    assert [said.index for said in one.predictions] == [answers[n] for n in logits.argsort(descending=True)]
    for said in one.predictions:
        assert said.probability == pytest.approx(float(logits.softmax(0)[said.index - answers[0]]), abs=1e-6)
        assert said.logit == pytest.approx(float(logits[said.index - answers[0]]), abs=1e-6)
    assert sum(said.probability for said in one.predictions) == pytest.approx(1)


def test_a_relative_logit_is_relative_to_those_of_the_same_question(of_two_questions):
    model = of_two_questions
    logits = model(model.preprocess([photograph()]))[0].detach().double()
    (one,) = explain(model, [photograph()], class_="red", relative=True)
    assert one.logit == pytest.approx(float(logits[3] - logits[3:].mean()), abs=1e-5)
    assert sum(c.score for c in one.contributions) == pytest.approx(one.logit, abs=1e-5)


def test_the_question_is_shown_and_kept(of_two_questions, explanation):
    (one,) = explain(of_two_questions, [photograph()], class_="blue", top=1)
    text = shown(one)
    assert "What writes the logit of colour: blue (4)" in text
    assert re.search(r"probability +logit +colour *\n", text)
    assert "colour: blue (4)" in texts_of(one, (200, 160))
    assert Explanation.from_dict(json.loads(json.dumps(one.as_dict()))).question == "colour"
    before = {name: value for name, value in one.as_dict().items() if name != "question"}
    assert Explanation.from_dict(before).question == "", "files of before there were questions"
    assert re.search(r"probability +logit +class *\n", shown(explanation))


def test_a_classifier_that_was_replaced_answers_one_question():
    model = timm.create_model("test_vit", depth=1, num_classes=6).eval()
    model.pretrained_cfg["label_groups"] = {"shape": 3, "colour": 2}
    assert Explainer(HookedViT(model)).question == Question("", range(6))
    assert Question.of(5, {"none": 0, "all": 5}) == (Question("", range(5)),)


def test_each_attribute_of_the_testbed_is_a_question():
    model = HookedViT(build("deit"))
    for question, values in ATTRIBUTES.items():
        for value in values:
            explainer = Explainer(model, class_=value)
            assert explainer.question.name == question
            assert tuple(CLASSES[n] for n in explainer.question.classes) == values
    assert Explainer(model).question.name == "shape"


# --- tables and JSON ------------------------------------------------------------------------------------------


def shown(explanation, count=10):
    out = io.StringIO()
    Console(file=out, width=80).print(explanation.table(count))
    return out.getvalue()


def test_the_table_has_the_scores_of_the_strongest_and_sums_of_the_rest(explanation):
    text = shown(explanation, 2)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    strongest = explanation.strongest(2)
    assert [row[0] for row in rows[:2]] == [one.component for one in strongest]
    for row, one in zip(rows, strongest, strict=False):
        assert float(row[1]) == pytest.approx(one.score, abs=6e-4)
        assert float(row[2].rstrip(" %")) == pytest.approx(100 * one.share, abs=0.06)
        assert float(row[3]) + float(row[4]) == pytest.approx(one.score, abs=2e-3)
    assert rows[2][0] == "5 other components"
    assert sum(float(row[1]) for row in rows[:-1]) == pytest.approx(explanation.logit, abs=3e-3)
    assert rows[-1][:3] == ["total", f"{explanation.logit:+.3f}", "+100.0 %"]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
@pytest.mark.parametrize("count", [2, 1000])
def test_patches_prefix_and_no_token_add_up_in_every_row(model, by, count):
    (explanation,) = explain(model, [photograph()], by=by, top=0)
    rows = [
        [c.strip() for c in line.split("│")[1:-1]] for line in shown(explanation, count).splitlines() if "│" in line
    ]
    assert len(rows) == len(explanation.strongest(count)) + 2 + (count == 2)
    assert rows[-1][0] == "total"
    for row in rows:
        assert sum(float(cell or 0) for cell in row[3:6]) == pytest.approx(float(row[1]), abs=2.1e-3)
    assert float(rows[-1][5]) == pytest.approx(explanation.elsewhere, abs=6e-4)
    biased = [abs(one.no_token) for one in explanation.contributions if one.patches is not None]
    assert (max(biased) > 1e-3) == (by != "head")


def test_an_explanation_is_short(explanation):
    told = repr(explanation)
    assert len(told) < 300
    assert f"{explanation.name} ({explanation.index}), logit {explanation.logit:+.2f};" in told
    most = sorted((one for one in explanation.contributions if one.kind != "constant"), key=lambda one: -abs(one.score))
    assert all(f"{one.component} {one.score:+.2f}" in told for one in most[:5])
    assert f"{most[5].component} " not in told.split(";")[1]


def test_shares_of_what_is_nearly_zero_are_not_shown(explanation):
    largest = max(abs(one.score) for one in explanation.contributions)
    for share, told in ((0.049, False), (-0.049, False), (0.0, False), (0.051, True), (-0.051, True)):
        for relative in (False, True):
            changed = {"logit": share * largest, "relative": relative}
            text = shown(Explanation(**{**explanation.__dict__, **changed}))
            plain = " ".join(text.split())
            cells = [line.split("│")[3].strip() for line in text.splitlines() if line.startswith("│")]
            assert all((cell == "–") != told for cell in cells)
            assert ("less than 5 % of the largest score" in plain) != told
            assert ("--relative explains" in plain) == (not told and not relative)


def test_a_long_name_takes_no_room_from_the_numbers(model):
    (explanation,) = explain(model, [photograph()], class_names=[f"{'name ' * 30}{n}" for n in range(1000)], top=0)
    said = shown(explanation).split("What writes")[0]
    for one in explanation.predictions:
        assert f"{100 * one.probability:.1f} %" in said
        assert f"{one.logit:+.2f}" in said
        assert f"({one.index})" in said


def test_what_a_terminal_would_act_on_is_shown_as_text(model):
    (explanation,) = explain(model, [photograph()], class_names=[f"[red]{n}\x1b[2J" for n in range(1000)])
    text = shown(explanation)
    assert "\x1b" not in text
    assert "[red]" in text
    assert printable("café\n") == "café\\n"


def test_an_explanation_survives_json(explanation):
    packed = json.loads(json.dumps(explanation.as_dict(), allow_nan=False))
    back = Explanation.from_dict(packed)
    assert back.as_dict() == explanation.as_dict()
    assert torch.equal(back.heatmap.values, explanation.heatmap.values)
    assert back.contributions == explanation.contributions
    assert back.seen == explanation.seen


# --- pictures -------------------------------------------------------------------------------------------------


def colours_of(path):
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.shape[1] == 1650
    return pixels


ALL_SHAPES = list(itertools.product([0, 1, 7], [(200, 160), (60, 300), (600, 90)]))


@pytest.mark.parametrize(
    ("top", "size"),
    [pytest.param(*shape, marks=[pytest.mark.sweep] * (number % 4 > 0)) for number, shape in enumerate(ALL_SHAPES)],
)
def test_a_picture_is_drawn_without_warnings_at_any_shape(model, tmp_path, top, size):
    (explanation,) = explain(model, [photograph(*size)], top=top)
    save_picture(explanation, photograph(*size), tmp_path / "picture.png")
    assert colours_of(tmp_path / "picture.png").std() > 0.05


def test_nothing_of_a_picture_is_cut_off(model, tmp_path):
    names = [f"a class with a name that goes on and on, number {n}, " + "word " * 60 for n in range(1000)]
    (explanation,) = explain(model, [photograph()], class_names=names)
    save_picture(explanation, photograph(), tmp_path / "picture.png")
    pixels = colours_of(tmp_path / "picture.png")
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    assert (border == 1).all(), "the edges are white"


def texts_of(explanation, size):
    """Everything that a picture says."""
    figure = _Drawing(explanation, photograph(*size)).figure()
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_a_picture_says_whether_the_model_sees_all_of_the_photograph(model):
    for size in ((200, 160), (160, 200)):
        (explanation,) = explain(model, [photograph(*size)], top=0)
        assert "The model sees what is in the box" in texts_of(explanation, size)
        inside = Explanation(**{**explanation.__dict__, "seen": (0.0, 0.0, *map(float, size))})
        assert "The model sees all of it" in texts_of(inside, size)


def test_a_picture_says_what_its_scale_does_not_reach(explanation):
    values = torch.full((30, 30), 0.01, dtype=torch.float64)
    values[3, 4] = -0.87
    for one, beyond in ((values, True), (torch.full_like(values, 0.01), False)):
        changed = Explanation(**{**explanation.__dict__, "heatmap": Heatmap("all", one), "top": ()})
        assert ("(largest: −0.87)" in texts_of(changed, (200, 160))) == beyond
        assert ("largest" in texts_of(changed, (200, 160))) == beyond


def test_a_picture_says_what_has_no_map_and_how_large_each_map_is(explanation):
    said = texts_of(explanation, (200, 160))
    assert "Without maps: MLPs are read at CLS only; constants come from no token" in said
    for one in explanation.top:
        largest = max(one.values.flatten().tolist(), key=abs)
        assert f"largest patch {largest:+.3f}".replace("-", "−") in said
    read = tuple(replace(one, patches=1.0) if one.kind == "mlp" else one for one in explanation.contributions)
    changed = Explanation(**{**explanation.__dict__, "contributions": read})
    assert "Without maps: constants come from no token" in texts_of(changed, (200, 160))


def test_a_landscape_leaves_no_blank_band_above_the_maps(model, tmp_path):
    (explanation,) = explain(model, [photograph(416, 256)], top=5)
    save_picture(explanation, photograph(416, 256), tmp_path / "picture.png")
    left = colours_of(tmp_path / "picture.png")[:, :800]
    blank, longest = (left == 1).all(axis=(1, 2)), 0
    run = 0
    for row in blank:
        run = run + 1 if row else 0
        longest = max(longest, run)
    assert longest < 0.6 * 150, "of 150 pixels an inch"


def test_formulas_and_foreign_scripts_in_names_are_drawn_as_they_are(model, tmp_path):
    names = [f"$\\frac{{{n}$ 魚_^" for n in range(1000)]
    (explanation,) = (Explainer(model, class_names=names, top=1).explain(photograph(), name="$x^{.jpg"),)
    save_picture(explanation, photograph(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_red_is_for_the_class_and_blue_against_it(model, tmp_path):
    (explanation,) = explain(model, [Image.new("RGB", (160, 160), "gray")], top=0)
    signs = torch.ones(10, 10)
    for sign, warmer in ((1, True), (-1, False)):
        changed = Explanation(**{**explanation.__dict__, "heatmap": Heatmap("all", sign * signs.double())})
        save_picture(changed, Image.new("RGB", (160, 160), "gray"), tmp_path / "picture.png")
        pixels = colours_of(tmp_path / "picture.png")
        middle = pixels[:, int(0.36 * pixels.shape[1]) : int(0.55 * pixels.shape[1])]
        coloured = middle[np.ptp(middle, axis=2) > 0.3]
        red = (coloured[:, 0] > coloured[:, 2]).mean()
        assert (red > 0.8) == warmer
        assert (red < 0.4) != warmer


def test_a_picture_needs_its_own_photograph_and_matplotlib(explanation, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"photograph of \(200, 160\) pixels; got one of \(50, 50\)"):
        save_picture(explanation, photograph(50, 50), tmp_path / "picture.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("vitdecomp_lens.pictures.can_draw", lambda: False)
    with pytest.raises(InputError, match=re.escape("pip install 'vitdecomp-lens[viz]'")):
        save_picture(explanation, photograph(), tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


# --- real ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    module = create_timm(MODEL)
    load_weights(module, WEIGHTS)
    return HookedViT(module)


@needs_real_data
@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.sweep)])
def test_on_real_photographs_the_hooked_model_says_what_timm_says_and_contributions_sum_to_it(trained, every):
    plain = timm.create_model(MODEL).eval()
    load_weights(plain, WEIGHTS)
    photographs, right, worst = PHOTOGRAPHS[::every], 0, 0.0
    with torch.no_grad():
        for first in range(0, len(photographs), 25):
            batch = photographs[first : first + 25]
            images = trained.preprocess(batch)
            logits = plain(images)
            parts = decompose(trained, images, by="head", of="logits")
            worst = max(worst, float(parts.gap.max()))
            assert torch.equal(trained(images), logits)
            assert torch.equal(parts.total.argmax(1), logits.argmax(1))
            assert torch.equal(parts.sum().argmax(1), logits.argmax(1))
            right += sum(int(c) == true_class(p) for c, p in zip(logits.argmax(1), batch, strict=True))
    assert worst < 1e-5
    assert right / len(photographs) > 0.75, "the weights and the transform are those of a trained model"


@needs_real_data
def test_a_real_photograph_is_explained(trained, tmp_path):
    chosen = [p for p in PHOTOGRAPHS if true_class(p) in (0, 546, 798)]
    explanations = explain(trained, chosen, top=5)
    assert [one.index for one in explanations] == [0, 546, 798]
    for one in explanations:
        assert one.predictions[0].probability > 0.5
        assert sum(c.share for c in one.contributions) == pytest.approx(1, abs=1e-4)
        assert one.gap < 1e-5
        save_picture(one, open_upright(one.image), tmp_path / Path(one.image).with_suffix(".png").name)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_names_that_a_model_brings_along_are_used_where_they_are_those_of_its_classifier():
    model = timm.create_model("test_vit", num_classes=3).eval()
    model.pretrained_cfg["label_names"] = ["one", "two", "three"]
    assert Explainer(HookedViT(model)).names.names == ("one", "two", "three")
    assert Explainer(HookedViT(model), class_names=["a", "b", "c"]).names.names == ("a", "b", "c")
    model.pretrained_cfg["label_names"] = ["one", "two"]  # the classifier was replaced
    assert Explainer(HookedViT(model)).names.names == ("class 0", "class 1", "class 2")
