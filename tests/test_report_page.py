"""The report's page in a browser without network: what it computes, how it is used, and what hostile texts do to it.

Needs the packages ``playwright`` and ``axe-playwright-python`` (which brings axe-core), and a Chromium: the system's,
the one that the variable ``VITDECOMP_CHROMIUM`` names, or playwright's own.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import HOSTILE, bank_of, photographs, seeded
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY

from vitdecomp_lens import HookedViT, attribute_tokens, decompose
from vitdecomp_lens.report import making, report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'vitdecomp-lens[test]'")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
GROUPS = {"shape": 6, "colour": 4}
LABELS = [f"name {number}" for number in range(10)]
TOLERANCE = 1e-4
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        own = running.chromium.executable_path
        found = os.environ.get("VITDECOMP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
        if found is None and not Path(own).exists():
            pytest.skip("needs a Chromium: apt-get install chromium, or playwright install chromium")
        started = running.chromium.launch(executable_path=found or own, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def model():
    made = seeded(lambda: VisionTransformer(**TINY))
    made.pretrained_cfg = {"input_size": (3, 32, 32), "label_groups": GROUPS, "label_names": LABELS}
    return HookedViT(made)


@pytest.fixture(scope="module")
def images(model):
    return model.preprocess(photographs(3))


@pytest.fixture(scope="module")
def others():
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def parts(model, images):
    return decompose(model, images, of="logits")


@pytest.fixture(scope="module")
def made(model, others, tmp_path_factory):
    """A report of classes."""
    path = tmp_path_factory.mktemp("classes") / "page.html"
    return report(model, photographs(3), reference=others, words=2, resamples=4).save(path)


@pytest.fixture(scope="module")
def hostile(model, tmp_path_factory):
    """A report whose every text means harm."""
    path = tmp_path_factory.mktemp("hostile") / "page.html"
    texts = {HOSTILE[0]: bank_of(HOSTILE, 32), HOSTILE[4]: bank_of(["one", "two"], 32)}
    return report(model, photographs(5), texts=texts, names=HOSTILE, title=HOSTILE[0], words=3, scale=9.0).save(path)


class Opened:
    """A page, what it said, and what it asked for."""

    def __init__(self, browser, path, *, viewport=DESKTOP, axe=None, **options):
        self.context = browser.new_context(viewport=viewport, offline=True, **options)
        if axe is not None:
            self.context.add_init_script(path=axe)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#main:not([hidden])")

    def data(self, selector, name):
        return float(self.page.locator(selector).first.get_attribute(f"data-{name}"))

    def now(self):
        """The answers that are listed, with what is left of each and their probabilities."""
        rows = self.page.locator("#answers tr").all()
        names = ("answer", "now", "probability")
        return {
            int(a): (float(b), float(c)) for a, b, c in ([r.get_attribute(f"data-{n}") for n in names] for r in rows)
        }

    def row_of(self, parts, label):
        return self.page.locator(f'button.cell[data-component="{parts.labels.index(label)}"]')

    def text(self, selector):
        return " ".join(self.page.locator(selector).inner_text().replace("\u00a0", " ").split())


@pytest.fixture
def open_page(browser):
    opened = []

    def open_one(path, **options):
        opened.append(Opened(browser, path, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.context.close()
        assert not one.said, one.said
        assert all(url.startswith(("file:", "data:", "about:")) for url in one.asked), one.asked


def assert_left(opened, expected):
    """What is left of the answers that are listed, and their probabilities among the question's."""
    listed = opened.now()
    groups = [range(6), range(6, 10)]
    question = next(group for group in groups if next(iter(listed)) in group)
    chances = expected[list(question)].softmax(0)
    assert set(listed) == set(question)
    for answer, (value, chance) in listed.items():
        assert value == pytest.approx(float(expected[answer]), abs=TOLERANCE)
        assert chance == pytest.approx(float(chances[answer - question.start]), abs=TOLERANCE)


# --- it computes what Python computes ---------------------------------------------------------------------------


def test_it_opens_without_errors_and_shows_the_models_answers(open_page, made, parts):
    opened = open_page(made)
    assert_left(opened, parts.total[0])
    best = int(parts.total[0, :6].argmax())
    assert f"Likeliest: {LABELS[best]}" in opened.text("#said")
    assert opened.page.title().endswith("vitdecomp_lens report")


def test_switching_leaves_what_ablate_leaves(open_page, made, model, parts, others):
    opened, page = open_page(made), None
    page = opened.page
    opened.row_of(parts, "L1H2").focus()
    page.keyboard.press("x")
    assert_left(opened, parts.ablate("L1H2").sum()[0])
    opened.row_of(parts, "mlp.0").click()
    page.check("#card-on")
    assert_left(opened, parts.ablate(["L1H2", "mlp.0"]).sum()[0])
    assert "2 of" in opened.text("#said")
    page.check('input[name="how"][value="mean"]')
    mean = decompose(model, others, of="logits")
    assert_left(opened, parts.ablate(["L1H2", "mlp.0"], how="mean", reference=mean).sum()[0])
    page.check('input[name="question"][value="1"]', force=True)
    assert_left(opened, parts.ablate(["L1H2", "mlp.0"], how="mean", reference=mean).sum()[0])
    page.check('input[name="image"][value="2"]', force=True)
    assert_left(opened, parts.ablate(["L1H2", "mlp.0"], how="mean", reference=mean).sum()[2])
    page.click("#reset")
    assert_left(opened, parts.total[2])
    assert page.locator("#reset").is_disabled()


def test_kinds_and_layers_are_switched_together(open_page, made, parts):
    opened = open_page(made)
    page = opened.page
    page.get_by_label("heads (8)").check()
    assert_left(opened, parts.ablate(kind="head").sum()[0])
    layer = page.get_by_label("Switch off layer 1")
    assert layer.evaluate("box => box.indeterminate")
    layer.check()
    assert_left(opened, parts.ablate([*parts.select(kind="head").labels, "mlp.1"]).sum()[0])
    page.get_by_label("heads (8)").uncheck()
    assert_left(opened, parts.ablate("mlp.1").sum()[0])


def test_pointing_at_components_and_answers_changes_what_is_shown(open_page, made, model, images, parts):
    opened = open_page(made)
    page = opened.page
    tokens = attribute_tokens(model, images[:1], torch.eye(10), of="logits")
    best = int(parts.total[0, :6].argmax())
    worst = int(parts.total[0, :6].argmin())
    held = torch.stack([tokens[label][0, 1:] for label in tokens.labels])  # component patch answer
    assert opened.data("#shown-score", "value") == pytest.approx(float(parts.total[0, best]), abs=TOLERANCE)
    assert opened.data("#heatmap", "sum") == pytest.approx(float(held[..., best].sum()), abs=TOLERANCE)
    opened.row_of(parts, "L0H3").hover()
    assert opened.text("#shown-component") == "L0H3"
    assert opened.data("#shown-score", "value") == pytest.approx(float(parts["L0H3"][0, best]), abs=TOLERANCE)
    row = tokens.labels.index("L0H3")
    assert opened.data("#heatmap", "sum") == pytest.approx(float(held[row, :, best].sum()), abs=TOLERANCE)
    opened.row_of(parts, "L0H3").click()  # keeps it
    page.hover(f'#answers tr[data-answer="{worst}"] button')
    assert opened.text("#shown-answer") == LABELS[worst]
    assert opened.data("#shown-score", "value") == pytest.approx(float(parts["L0H3"][0, worst]), abs=TOLERANCE)
    assert opened.data("#heatmap", "sum") == pytest.approx(float(held[row, :, worst].sum()), abs=TOLERANCE)
    for label in ("L1H1", "mlp.1"):
        expected = float(parts[label][0, worst])
        cell = opened.row_of(parts, label)
        assert float(cell.get_attribute("data-score")) == pytest.approx(expected, abs=TOLERANCE)
    page.mouse.move(2, 2)
    assert opened.text("#shown-answer") == LABELS[best]
    assert opened.text("#shown-component") == "L0H3"
    page.click("#card-all")
    assert opened.text("#shown-component") == "All components"


def test_the_keyboard_does_what_the_pointer_does(open_page, made, parts):
    opened = open_page(made)
    page = opened.page
    best = int(parts.total[0, :6].argmax())
    first = page.locator("#grid .cell").first
    first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert opened.text("#shown-component") == "L1H1"
    assert opened.data("#shown-score", "value") == pytest.approx(float(parts["L1H1"][0, best]), abs=TOLERANCE)
    assert page.locator('#grid .cell[tabindex="0"]').count() == 1
    page.keyboard.press("Enter")
    assert page.locator("#grid .cell.kept").get_attribute("data-component") == str(parts.labels.index("L1H1"))
    page.keyboard.press("Escape")
    assert not page.locator("#grid .cell.kept").count()
    page.locator("#answers button").nth(3).focus()
    page.keyboard.press("Shift")  # makes the focus one of the keyboard
    assert opened.text("#shown-answer") == opened.text("#answers tr:nth-child(4) .name")
    page.keyboard.press("Enter")
    assert page.locator("#answers tr.kept").count() == 1
    page.locator('input[name="image"]').first.focus()
    page.keyboard.press("ArrowRight")
    assert_left(opened, parts.total[1])


def test_patches_have_the_colour_of_their_sign(open_page, made, model, images, parts):
    opened = open_page(made)
    best = int(parts.total[0, :6].argmax())
    tokens = attribute_tokens(model, images[:1], torch.eye(10)[[best]], of="logits")
    opened.row_of(parts, "L1H0").hover()
    read = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    pixels = np.array(opened.page.locator("#heatmap").evaluate(read)).reshape(-1, 4)
    values = tokens["L1H0"][0, 1:, 0].numpy()
    assert len(pixels) == len(values)
    for patch in (int(values.argmax()), int(values.argmin())):
        red, _, blue, opacity = pixels[patch]
        assert opacity > 0
        assert (red > blue) == (values[patch] > 0)


def test_the_map_of_all_leaves_out_what_is_off(open_page, made, model, images, parts):
    opened = open_page(made)
    best = int(parts.total[0, :6].argmax())
    tokens = attribute_tokens(model, images[:1], torch.eye(10)[[best]], of="logits")
    whole = sum(float(tokens[label][0, 1:].sum()) for label in tokens.labels)
    opened.page.get_by_label("Switch off layer 0").check()
    left = (
        whole - sum(float(tokens[f"L0H{head}"][0, 1:].sum()) for head in range(4)) - float(tokens["mlp.0"][0, 1:].sum())
    )
    assert opened.data("#heatmap", "sum") == pytest.approx(left, abs=TOLERANCE)
    assert opened.data("#shown-score", "value") == pytest.approx(
        float(parts.ablate(layer=0, kind=("head", "mlp")).sum()[0, best]), abs=TOLERANCE
    )


def test_layers_have_their_sums_in_numbers(open_page, made, parts):
    opened = open_page(made)
    best = int(parts.total[0, :6].argmax())
    told = opened.page.locator("#grid td.sum").all_inner_texts()
    for layer, text in enumerate(told):
        expected = float(parts.select(kind=("head", "mlp"), layer=layer).values[:, 0, best].sum())
        assert float(text.strip().replace("−", "-")) == pytest.approx(expected, abs=0.0051)
    assert len(told) == 2


def test_the_map_of_all_says_what_it_cannot_leave_out(open_page, model, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "FOR_MAPS", 10 * 4 * 16 * 2 * 4 / 3)  # three components have a map of their own
    opened = open_page(report(model, photographs(1), words=1).save(tmp_path / "page.html"))
    maps = opened.page.evaluate("JSON.parse(document.getElementById('content').textContent).images[0].maps")
    best = int(parts.total[0, :6].argmax())
    own = maps["components"][best]
    weak = [row for row in maps["reading"] if row not in own]
    assert len(own) == 3
    assert len(weak) >= 2
    held = opened.data("#heatmap", "sum")
    for row, said in zip(weak[:2], ("1 weak one that is off", "2 weak ones that are off"), strict=True):
        opened.page.locator(f'button.cell[data-component="{row}"]').focus()
        opened.page.keyboard.press("x")
        opened.page.evaluate("document.activeElement.blur()")
        assert f"still holds {said}" in opened.text("#shown-split")
    assert opened.data("#heatmap", "sum") == pytest.approx(held, abs=TOLERANCE)
    opened.page.click("#reset")
    assert "still" not in opened.text("#shown-split")


def test_words_are_told_with_what_chance_would_do(open_page, made, parts):
    opened = open_page(made)
    opened.row_of(parts, "L1H2").click()
    said = opened.page.evaluate("JSON.parse(document.getElementById('content').textContent).words")
    chance = said["chance"]["L1H2"]
    assert 0.01 < chance < 1
    told = opened.text("#card-words .chance")
    assert told == f"A text drawn at random would come again in {round(100 * chance)} %."
    assert opened.page.locator("#card-words li").count() == 1 + len(said["said"]["L1H2"])


def test_behind_the_pictures_there_are_tables(open_page, made, parts):
    opened = open_page(made)
    page = opened.page
    best = int(parts.total[0, :6].argmax())
    page.click("#all-components summary")
    page.wait_for_selector("#all-components tbody tr")
    rows = page.locator("#all-components tbody tr").all()
    assert len(rows) == len(parts)
    for row in (rows[0], rows[-1]):
        label, score = row.locator("th").inner_text(), row.locator("td").first.inner_text().replace("−", "-")
        assert float(score) == pytest.approx(float(parts[label][0, best]), abs=0.0051)
    opened.row_of(parts, "L1H0").click()
    page.click("#all-patches summary")
    page.wait_for_selector("#all-patches tbody tr")
    assert page.locator("#all-patches tbody tr").count() == page.locator("#all-patches thead th").count() == 4
    assert "Strongest patches: row" in page.locator("#heatmap").get_attribute("aria-label")


# --- it is for everybody ----------------------------------------------------------------------------------------


def axe():
    """Where the axe-core of an installed package is."""
    found = find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("needs axe-core: pip install 'vitdecomp-lens[test]'")
    return Path(found.origin).parent / "axe.min.js"


@pytest.mark.parametrize("which", ["made", "hostile"])
@pytest.mark.parametrize(
    ("viewport", "scheme"), [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light"), (PHONE, "dark")]
)
def test_axe_finds_no_serious_fault(open_page, which, viewport, scheme, request):
    path = request.getfixturevalue(which)
    opened = open_page(path, viewport=viewport, color_scheme=scheme, axe=axe(), reduced_motion="reduce")
    page = opened.page
    page.locator("#grid .cell").nth(6).click()
    page.keyboard.press("x")
    page.click("#all-components summary")
    found = page.evaluate("() => axe.run()")
    grave = [
        (one["id"], one["help"], [node["target"] for node in one["nodes"]][:3], one["nodes"][0]["failureSummary"])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert len(found["passes"]) > 20
    assert not grave, grave


@pytest.mark.parametrize("which", ["made", "hostile"])
def test_a_phone_shows_all_of_its_width_and_keeps_the_image_in_view(open_page, which, request):
    opened = open_page(request.getfixturevalue(which), viewport=PHONE, has_touch=True)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.locator("#grid .cell").nth(5).tap()
    page.locator("#grid").evaluate("grid => grid.scrollIntoView({block: 'end'})")
    box = page.locator("#frame").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] < PHONE["height"] / 2
    assert opened.text("#shown-component") == "L1H0"


def test_a_wide_grid_moves_beside_its_layers(open_page, tmp_path):
    wide = HookedViT(seeded(lambda: VisionTransformer(**{**TINY, "embed_dim": 64, "num_heads": 16, "depth": 1})))
    page = open_page(report(wide, photographs(1), words=1).save(tmp_path / "page.html"), viewport=PHONE).page
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    moved = "grid => [grid.scrollWidth > grid.clientWidth, grid.scrollLeft = 9999, grid.scrollLeft > 100]"
    assert page.locator("#grid-scroll").evaluate(moved) == [True, 9999, True]
    assert page.locator('#grid th[scope="row"]').bounding_box()["x"] >= 0


def test_the_theme_is_the_systems_until_one_is_chosen(open_page, made):
    opened = open_page(made, color_scheme="dark")
    page = opened.page
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme")
    assert opened.text("#theme") == "Theme: light"
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) == dark != light
    page.click("#theme")
    assert opened.text("#theme") == "Theme: system"


# --- nobody's text does harm ------------------------------------------------------------------------------------


def test_hostile_texts_and_names_show_as_text(open_page, hostile):
    opened = open_page(hostile)
    page = opened.page
    assert page.title().startswith(HOSTILE[0])
    assert page.locator("h1").text_content() == HOSTILE[0]
    assert page.locator("#thumbnails .name").all_text_contents() == list(HOSTILE)
    assert sorted(page.locator("#answers .name").all_text_contents()) == sorted(HOSTILE)
    assert page.locator("#questions label").first.text_content() == HOSTILE[0]
    assert page.locator("b").count() == 0
    assert page.locator("script").count() == 2
    assert len(page.locator("#said").inner_text()) < 500, "what is read aloud stays short"
    said = set(page.locator("#strongest bdi").all_text_contents())
    assert said & set(HOSTILE)
    for number in range(5):
        page.check(f'input[name="image"][value="{number}"]', force=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= DESKTOP["width"]
    # Its direction stays with it.
    assert page.locator("#answers .name", has_text="שלום").evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate"


def test_a_notebook_shows_the_page_in_its_frame(browser, model, parts):
    shown = report(model, photographs(3), words=1)
    context = browser.new_context(offline=True, viewport=DESKTOP)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_content(f"<h1>Notebook</h1>{shown._repr_html_()}")
    inside = page.frame_locator("iframe")
    inside.locator("#main:not([hidden])").wait_for()
    row = inside.locator("#answers tr").first
    best = int(parts.total[0, :6].argmax())
    assert int(row.get_attribute("data-answer")) == best
    assert not errors
    context.close()


def test_a_single_photograph_of_any_shape_is_shown(open_page, model, tmp_path):
    long = Image.new("RGB", (1200, 60), "green")
    opened = open_page(report(model, [long], words=1).save(tmp_path / "page.html"), viewport=PHONE)
    assert opened.page.locator("#images").is_hidden()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert "No words" in opened.text("#words-about")
