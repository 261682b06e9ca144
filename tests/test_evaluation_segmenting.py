"""Segmentation under evaluation: both protocols hold for all methods, and photographs with outlines are read."""

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from real_data import FOLDER, MODEL, WEIGHTS
from safetensors.torch import load_file

from vitdecomp_lens import HookedViT, testbed
from vitdecomp_lens.applications import heatmap
from vitdecomp_lens.applications.heatmap import Heatmaps
from vitdecomp_lens.class_names import ClassNames
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.evaluation import coco, segmenting
from vitdecomp_lens.evaluation.folders import class_folder, thirds
from vitdecomp_lens.evaluation.records import Results
from vitdecomp_lens.evaluation.segmenting import CHOSEN, PUBLISHED, Protocol, pairs, photographs, single
from vitdecomp_lens.evaluation.subjects import Question, Splits, Subject
from vitdecomp_lens.hooked.preprocess import open_upright
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank

QUICK = Protocol(thresholds=(1.0, 2.0, "otsu"))
COUNT = 8
BASELINES = ("raw attention", "rollout", "Chefer", "GradCAM", "constant")


@dataclass(frozen=True, eq=False)
class Some:
    """Scenes, in batches of five; in some nothing is to be seen of the object."""

    scenes: testbed.Scenes
    hidden: tuple[int, ...] = ()
    labels: dict = field(init=False)

    def __post_init__(self):
        names = ("shape", "colour")
        object.__setattr__(self, "labels", {n: self.scenes.labels(n, range(len(self.scenes))) for n in names})

    def __len__(self):
        return len(self.scenes)

    def batches(self, model):
        for part in torch.arange(len(self)).split(5):
            yield testbed.normalised(self.scenes.images(part.tolist()))

    def masks(self, model, name="object"):
        found = torch.stack([scene.masks[name] for scene in self.scenes.scenes(range(len(self.scenes)))])
        found[list(self.hidden)] = False
        return found


def splits(kind="validation", *, hidden=()):
    training = Some(testbed.Scenes("train", seed=91, size=40))
    return Splits(training, *(Some(testbed.Scenes(kind, seed=seed, size=COUNT), hidden) for seed in (92, 93)))


def question(label="shape"):
    values = testbed.ATTRIBUTES[label]
    return Question(label, features()[label], tuple(testbed.CLASSES.index(value) for value in values))


@cache
def subject(name):
    clip = testbed.load_original("clip")
    aligner = None if name == "clip" else testbed.aligner(name)
    words = lambda texts: text_bank(clip, texts, templates=TEMPLATES)  # noqa: E731
    return Subject(name, testbed.load(name), words, aligner, classifier=name not in ("clip", "dino"))


def results(records):
    return Results(tuple(records), {})


# ---- what is measured


@pytest.mark.parametrize("name", ["clip", "dino"])
def test_single_objects_are_segmented_by_all_methods_under_both_protocols(name):
    found = results(single(subject(name), splits(), question(), seed=4, protocol=QUICK))
    assert found.names("method") == ("decomposition", "decomposition, any answer", *BASELINES)
    assert found.names("of") == (f"shape, {PUBLISHED}", f"shape, {CHOSEN}")
    assert found.names("measure") == tuple(segmenting.MEASURES)
    assert found.names("seed") == (4,)
    assert all(0 <= record.value <= 1 for record in found.records)
    assert found.mean(method="decomposition", measure="mIoU", of=f"shape, {CHOSEN}") > found.mean(
        method="constant", measure="mIoU", of=f"shape, {CHOSEN}"
    )


def test_a_method_that_refuses_a_model_is_not_reported():
    found = results(single(subject("swin"), splits(), question(), seed=0, protocol=QUICK))
    assert found.names("method") == ("decomposition", "decomposition, any answer", "GradCAM", "constant")


def test_the_published_protocol_is_that_of_the_functions_themselves():
    model, data = subject("deit"), splits()
    found = results(single(model, data, question(), seed=0, protocol=QUICK)).where(of=f"shape, {PUBLISHED}")
    images = torch.cat(list(data.test.batches(model.model)))
    shapes = list(testbed.ATTRIBUTES["shape"])
    own = data.test.labels["shape"].tolist()
    rows = torch.eye(len(testbed.CLASSES))
    expected = {
        "decomposition": heatmap.of_classes(model.model, images, shapes).picked([shapes[n] for n in own]),
        "raw attention": heatmap.raw_attention(model.model, images),
        "rollout": heatmap.rollout(model.model, images),
        "Chefer": heatmap.chefer(model.model, images, rows, own=own),
        "GradCAM": heatmap.attention_cam(model.model, images, rows, own=own),
    }
    for method, maps in expected.items():
        numbers = heatmap.segment(maps, data.test.masks(model.model)).numbers()
        for measure, name in segmenting.MEASURES.items():
            assert found.mean(method=method, measure=measure) == pytest.approx(numbers[name], abs=1e-4)


def test_what_is_chosen_is_chosen_on_validation_for_each_method():
    model = subject("clip")
    data = splits()
    swapped = Splits(data.training, data.validation, data.validation)
    found = results(single(model, swapped, question(), seed=0, protocol=QUICK))
    for method in found.names("method"):
        published, chosen = (found.mean(method=method, measure="mIoU", of=f"shape, {by}") for by in (PUBLISHED, CHOSEN))
        assert chosen >= published - 1e-6  # the published variant and threshold are among those tried
    fixed = Protocol(thresholds=(1.0,), components=("attention",), residuals=(0.5,), layers=(-1,))
    alone = results(single(model, data, question(), seed=0, protocol=fixed))
    for method in ("raw attention", "rollout", "constant"):
        values = {alone.mean(method=method, measure="mIoU", of=f"shape, {by}") for by in (PUBLISHED, CHOSEN)}
        assert len(values) == 1


def test_images_of_whose_object_nothing_is_seen_are_left_out():
    model = subject("deit")
    found = results(single(model, splits(hidden=(0, 5)), question(), seed=0, protocol=QUICK))
    masks = splits().test.masks(model.model)
    kept = [n for n in range(COUNT) if n not in (0, 5)]
    share = float(masks[kept].double().mean())
    constant = found.mean(method="constant", measure="pixel accuracy", of=f"shape, {PUBLISHED}")
    assert constant == pytest.approx(share)


def test_of_two_objects_a_prompt_points_at_the_one_that_is_asked_for():
    found = results(pairs(subject("clip"), splits("pairs"), question("colour"), seed=0, protocol=QUICK))
    points = found.where(measure="points at its object", of=f"colour, {PUBLISHED}")
    assert points.mean(method="decomposition") >= 0.8
    assert points.mean(method="decomposition") > points.mean(method="rollout")
    assert "constant" not in points.names("method")
    assert set(found.names("measure")) == {*segmenting.MEASURES, *segmenting.POINTING}


@pytest.mark.parametrize("name", ["dino", "deit"])
def test_of_many_classes_only_those_of_a_batch_are_read_and_nothing_changes(name):
    options = {"seed": 0, "protocol": replace(QUICK, thresholds=(1.0,), batch=4)}
    whole = results(single(subject(name), splits(), question(), **options))
    options["protocol"] = replace(options["protocol"], together=1)
    some = results(single(subject(name), splits(), question(), **options))
    assert set(whole.names("method")) - set(some.names("method")) == {"decomposition, any answer"}
    for record in some.records:
        (expected,) = whole.values(measure=record.measure, method=record.method, of=record.of)
        assert record.value == pytest.approx(expected, abs=1e-4)


# ---- photographs


def class_folders(folder, count):
    """Photographs of noise in folders of ImageNet's classes, each with a mask of a rectangle."""
    chance = np.random.default_rng(0)
    for number in range(count):
        path = folder / "{}" / ("tench", "goldfish", "hen")[number % 3] / f"{number}.png"
        mask = np.zeros((40, 60), dtype=np.uint8)
        mask[5:25, 10 + number : 40] = 255
        for kind, pixels in (("images", chance.integers(0, 255, (40, 60, 3), dtype=np.uint8)), ("masks", mask)):
            own = Path(str(path).format(kind))
            own.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(own)
    return folder / "images", folder / "masks"


def test_photographs_with_masks_are_segmented_by_a_classifier_of_a_thousand_classes(tmp_path):
    images, masks = class_folders(tmp_path, 12)
    model = HookedViT(timm.create_model("test_vit", num_classes=1000).eval().requires_grad_(False))
    found, asked = class_folder(images, model, masks)
    data = Splits(*thirds(found))
    numbers = results(single(Subject("tiny", model, lambda texts: None), data, asked, seed=0, protocol=QUICK))
    assert numbers.names("method") == ("decomposition", *BASELINES)
    (pixels,) = data.test.batches(model)
    own = data.test.labels["class"].tolist()
    named = ((image[None], kind, ClassNames.of(1000).short(kind)) for image, kind in zip(pixels, own, strict=True))
    maps = [heatmap.of_classes(model, image, [kind]).picked([name]) for image, kind, name in named]
    expected = heatmap.segment(Heatmaps.cat(maps), data.test.masks(model)).numbers()
    for measure, name in segmenting.MEASURES.items():
        (record,) = numbers.where(method="decomposition", measure=measure, of=f"class, {PUBLISHED}").records
        assert record.value == pytest.approx(expected[name], abs=1e-4)
        assert record.interval[0] <= record.value <= record.interval[1]


def photograph_folder(folder, count):
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for number, scene in enumerate(testbed.Scenes("validation", seed=94, size=count).scenes(range(count))):
        scene.picture.save(folder / "images" / f"{number}.jpg", quality=95)
        rows, columns = scene.masks["object"].nonzero(as_tuple=True)
        left, right, top, bottom = (
            float(x) / 48 for x in (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1)
        )
        kind = testbed.CLASSES.index(scene.attributes["shape"])
        outline = f"{kind} {left} {top} {right} {top} {right} {bottom} {left} {bottom}\n"
        (folder / "labels" / f"{number}.txt").write_text(outline + "79 0 0 1 0 1 1 0 1\n")
    return folder / "images", folder / "labels"


def test_photographs_are_segmented_with_intervals(tmp_path):
    folders = photograph_folder(tmp_path, 6)
    kinds = {number: (number,) for number in range(len(testbed.ATTRIBUTES["shape"]))}
    found = results(photographs(subject("deit"), *folders, kinds=kinds, protocol=QUICK))
    assert found.names("of") == (PUBLISHED, CHOSEN)
    assert found.names("method") == ("decomposition", *BASELINES)
    for record in found.records:
        assert record.interval[0] <= record.value <= record.interval[1]
    ours = found.mean(method="decomposition", measure="mIoU", of=CHOSEN)
    assert ours > found.mean(method="constant", measure="mIoU", of=CHOSEN)


def test_without_photographs_of_known_classes_it_is_said(tmp_path):
    folders = photograph_folder(tmp_path, 2)
    with pytest.raises(InputError, match="at least two photographs"):
        list(photographs(subject("deit"), *folders, kinds={}))
    (tmp_path / "labels" / "0.txt").unlink()
    with pytest.raises(InputError, match="at least two photographs"):
        list(photographs(subject("deit"), *folders))
    with pytest.raises(InputError, match=r"there is no '.*elsewhere'"):
        list(photographs(subject("deit"), folders[0], tmp_path / "elsewhere"))


def test_outlines_are_filled(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("3 0 0 0.5 0 0.5 1 0 1\n7 0.5 0 1 0 1 1 0.5 1\n3 0.9 0 1 0 1 0.5 0.9 0.5\n")
    found = coco.outlines(path, (40, 20))
    assert sorted(found) == [3, 7]
    assert found[3].shape == (20, 40)
    assert found[3][:, :20].all()
    assert found[3][2, 38]
    assert not found[3][18, 22:].any()
    assert not found[7][:, :19].any()


@pytest.mark.parametrize("line", ["3 0 0 1 1", "3 0 0 1 0 1", "dog 0 0 1 0 1 1", "3 0 0 1 0 1 x"])
def test_lines_that_are_no_outlines_are_refused(tmp_path, line):
    path = tmp_path / "a.txt"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"outline.*a\.txt has"):
        coco.outlines(path, (40, 20))


def test_kinds_are_classes_of_imagenet_by_their_names():
    names = ClassNames.of(1000)
    assert len(coco.NAMES) == len(set(coco.NAMES)) == 80
    everything = [kind for kinds in coco.IMAGENET_KINDS.values() for kind in kinds]
    assert len(everything) == len(set(everything))
    known = {
        "zebra": "zebra",
        "pizza": "pizza",
        "bench": "park bench",
        "parking meter": "parking meter",
        "tv": "television",
        "teddy bear": "teddy",
        "broccoli": "broccoli",
    }
    for name, wanted in known.items():
        assert wanted in {names.short(kind) for kind in coco.IMAGENET_KINDS[coco.NAMES.index(name)]}
    dogs = {names.short(kind) for kind in coco.IMAGENET_KINDS[coco.NAMES.index("dog")]}
    assert len(dogs) == 118
    assert {"Chihuahua", "Mexican hairless"} <= dogs
    assert coco.NAMES.index("person") not in coco.IMAGENET_KINDS


def trained():
    original = timm.create_model(MODEL, pretrained=False)
    original.load_state_dict(load_file(WEIGHTS))
    return HookedViT(original.eval().requires_grad_(False))


needs_outlines = pytest.mark.skipif(
    not (WEIGHTS.is_file() and (FOLDER / "coco").is_dir()), reason=f"needs photographs in {FOLDER}"
)


@needs_outlines
def test_outlines_serve_as_masks_of_a_trained_classifier(tmp_path):
    count = 0
    for path in sorted((FOLDER / "coco" / "images").glob("*.jpg")):
        labels = FOLDER / "coco" / "labels" / f"{path.stem}.txt"
        photograph = open_upright(path)
        drawn = coco.outlines(labels, photograph.size) if labels.is_file() else {}
        known = {number: mask for number, mask in drawn.items() if number in coco.IMAGENET_KINDS}
        if not known or count == 12:
            continue
        number = max(known, key=lambda one: int(known[one].sum()))
        for kind, picture in (("images", photograph), ("masks", Image.fromarray(known[number].numpy()))):
            own = tmp_path / kind / str(coco.IMAGENET_KINDS[number][0]) / f"{path.stem}.png"
            own.parent.mkdir(parents=True, exist_ok=True)
            picture.save(own)
        count += 1
    model = trained()
    found, asked = class_folder(tmp_path / "images", model, tmp_path / "masks")
    found.check_masks()
    data = Splits(*thirds(found))
    quick = replace(QUICK, batch=4)
    numbers = results(single(Subject("tiny", model, lambda texts: None), data, asked, seed=0, protocol=quick))
    assert numbers.names("method") == ("decomposition", *BASELINES)
    ours, constant = (
        numbers.mean(method=method, measure="mIoU", of=f"class, {CHOSEN}") for method in ("decomposition", "constant")
    )
    assert ours > constant


@needs_outlines
def test_a_photograph_with_its_outline_is_read():
    model = trained()
    images, labels = FOLDER / "coco" / "images", FOLDER / "coco" / "labels"
    read = (
        (path, segmenting._Shown.of(model, path, labels, coco.IMAGENET_KINDS, Protocol()))
        for path in sorted(images.glob("*.jpg"))
    )
    path, shown = next((path, one) for path, one in read if one is not None)
    outlined = coco.outlines(labels / f"{path.stem}.txt", open_upright(path).size)
    assert shown.mask.shape == (224, 224)
    assert 0.01 <= float(shown.mask.double().mean()) < 1
    assert shown.kind in {kind for number in outlined for kind in coco.IMAGENET_KINDS.get(number, ())}
