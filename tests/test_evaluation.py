"""What evaluations are made of: records and tables; photographs with masks, thirds and Waterbirds' list."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitdecomp_lens import HookedViT, testbed
from vitdecomp_lens.applications.repair import GroupAccuracy
from vitdecomp_lens.cli import main
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.commands import evaluate
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError
from vitdecomp_lens.evaluation import carrying
from vitdecomp_lens.evaluation.ablating import EFFECTS, ORDERS
from vitdecomp_lens.evaluation.folders import attacked, class_folder, thirds, waterbirds, words_to_write
from vitdecomp_lens.evaluation.intervals import of_groups, of_means
from vitdecomp_lens.evaluation.pages import page, write
from vitdecomp_lens.evaluation.published import published
from vitdecomp_lens.evaluation.records import Record, Results, short
from vitdecomp_lens.evaluation.running import Watch
from vitdecomp_lens.evaluation.subjects import Subject, contributions
from vitdecomp_lens.testbed.banks import objects


def records(**values):
    return tuple(
        Record("t", "m", model, method, seed, value)
        for method, models in values.items()
        for model, several in models.items()
        for seed, value in enumerate(several)
    )


def test_tables_have_means_and_deviations_over_seeds():
    found = Results(records(ours={"a": (0.1, 0.2, 0.3), "b": (1.0,)}, theirs={"b": (-0.25, 0.25)}), {})
    assert found.table().splitlines()[2:] == ["| ours | .200 ± .100 | 1.000 |", "| theirs |  | .000 ± .354 |"]
    assert found.mean(model="a", method="ours") == pytest.approx(0.2)
    with pytest.raises(InputError, match="Nothing was measured"):
        found.mean(model="c")


def test_results_come_back_from_disk(tmp_path):
    more = (Record("t", "m", "a", "ours", 0, 0.5, of="shape", step=2, interval=(0.4, 0.6)),)
    found = Results(records(ours={"a": (0.1, 0.2)}) + more, {"images": 3})
    found.save(tmp_path / "r.json")
    again = Results.load(tmp_path / "r.json")
    assert (again.records, dict(again.made)) == (found.records, found.made)
    (tmp_path / "bad.json").write_text(json.dumps({"records": [{"task": "t"}], "made": {}}))
    with pytest.raises(StoreError, match="does not hold results"):
        Results.load(tmp_path / "bad.json")


def test_runs_are_joined_once_each():
    one, other = (
        Results(records(ours={"a": (0.1,)}), {"seeds": [0]}),
        Results(records(ours={"b": (0.2,)}), {"seeds": [1]}),
    )
    assert dict((one + other).made) == {"seeds": [0, 1]}
    assert (one + other).names("model") == ("a", "b")
    with pytest.raises(InputError, match="different runs"):
        one + one
    again = Results(records(ours={"a": (0.3,)}), {"seeds": [0, 2]})
    anew = (one + other).without(again) + again
    assert (anew.mean(model="a"), anew.mean(model="b"), anew.made["seeds"]) == (0.3, 0.2, [0, 1, 2])


@pytest.mark.parametrize(("number", "said"), [(0.9996, "1.000"), (0.5, ".500"), (-0.25, "-.250"), (12.0, "12.000")])
def test_numbers_are_short(number, said):
    assert short(number) == said


def test_what_the_paper_published_is_there():
    assert published().mean(task="spurious correlation", measure="worst group", model="CLIP", method="before") == 0.507
    assert len(published().where(task="segmentation").records) == 3 * 10


# --- photographs ------------------------------------------------------------------------------------------------------


def photograph(path, size=(60, 40), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def model():
    return HookedViT(timm.create_model("test_vit", num_classes=1000).eval())


@pytest.fixture
def folder(tmp_path):
    for name in ("n01440764", "goldfish"):
        for number in range(4):
            photograph(tmp_path / "images" / name / f"{number}.png", seed=number)
    return tmp_path / "images"


def test_subfolders_are_classes_by_synset_or_name(folder, model):
    samples, question = class_folder(folder, model)
    assert samples.labels["class"].tolist() == [1] * 4 + [0] * 4
    assert question.texts[:2] == ("tench", "goldfish")
    assert len(set(question.texts)) == 1000
    assert torch.cat(list(samples.batches(model))).shape == (8, 3, 160, 160)
    _, asked = class_folder(folder, None)
    assert (asked.texts, asked.columns) == (("goldfish", "tench"), (0, 1))
    photograph(folder / "no such fish" / "0.png")
    with pytest.raises(UnknownNameError, match="no class 'no such fish'"):
        class_folder(folder, model)
    photograph(folder / "0.png")
    with pytest.raises(InputError, match="subfolder"):
        class_folder(folder, None)


def test_masks_are_cropped_like_photographs_and_have_their_size(folder, model, tmp_path):
    masks = tmp_path / "masks"
    for path in folder.rglob("*.png"):
        left = np.zeros((40, 60), dtype=np.uint8)
        left[:, :30] = 7
        (masks / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(left).save(masks / path.relative_to(folder))
    samples, _ = class_folder(folder, model, masks)
    samples.check_masks()
    found = samples.masks(model)
    assert found.shape == (8, 160, 160)
    assert bool(found[:, :, :78].all())
    assert not bool(found[:, :, 82:].any())
    with pytest.raises(InputError, match="masks of the second"):
        samples.masks(model, "second")
    Image.new("L", (10, 10)).save(masks / "goldfish" / "2.png")
    for look in (samples.check_masks, lambda: samples.masks(model)):
        with pytest.raises(InputError, match=r"10 × 10 pixels, and '2\.png' 60 × 40"):
            look()
    (masks / "goldfish" / "2.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"'2\.png' cannot be read"):
        samples.check_masks()
    (masks / "goldfish" / "2.png").unlink()
    with pytest.raises(InputError, match="a mask for each image"):
        class_folder(folder, model, masks)


def test_a_photograph_that_is_turned_has_an_upright_mask(tmp_path, model):
    path = photograph(tmp_path / "images" / "tench" / "0.jpg")
    picture, exif = Image.open(path), Image.Exif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)
    Image.new("L", (40, 60), 255).save(photograph(tmp_path / "masks" / "tench" / "0.png"))
    samples, _ = class_folder(tmp_path / "images", model, tmp_path / "masks")
    samples.check_masks()
    assert bool(samples.masks(model).all())


def named(count, **configured):
    original = timm.create_model("test_vit", num_classes=count).eval()
    original.pretrained_cfg = {**original.pretrained_cfg, **configured}
    return HookedViT(original)


def test_classes_are_called_what_the_configuration_says_or_what_the_folders_are(folder):
    _, question = class_folder(folder, named(3, label_names=["koi", "goldfish", "n01440764"]))
    assert question.texts == ("koi", "goldfish", "n01440764")
    samples, question = class_folder(folder, named(2))
    assert question.texts == ("goldfish", "n01440764")
    assert samples.labels["class"].tolist() == [0] * 4 + [1] * 4
    with pytest.raises(UnknownNameError, match="no class 'goldfish'"):
        class_folder(folder, named(3))


def test_of_a_classifier_of_several_questions_the_folders_are_one(folder):
    names = {"label_names": ["red", "blue", "n01440764", "goldfish"], "label_groups": {"colour": 2, "fish": 2}}
    samples, question = class_folder(folder, named(4, **names))
    assert (question.texts, question.columns) == (("n01440764", "goldfish"), (2, 3))
    assert samples.labels["class"].tolist() == [1] * 4 + [0] * 4
    photograph(folder / "red" / "0.png")
    with pytest.raises(InputError, match="'red' answers another than 'goldfish'"):
        class_folder(folder, named(4, **names))


def test_words_are_written_where_the_model_looks_and_are_never_the_right_ones(folder, model):
    samples, question = class_folder(folder, model)
    words = words_to_write(samples, question.texts)
    assert sorted(words) == ["goldfish", "tench"]
    both = attacked(samples, question.texts, words)
    assert both.labels["written"].tolist() == [0] * 8 + [1] * 8
    assert both.words == ("",) * 8 + ("tench",) * 4 + ("goldfish",) * 4
    images, plain = torch.cat(list(both.batches(model))), torch.cat(list(samples.batches(model)))
    assert torch.equal(images[:8], plain)
    changed = (images[8:] != plain).any(1).flatten(1).double().mean(1)
    assert bool((changed > 0.02).all())
    assert torch.equal(images, torch.cat(list(both.batches(model))))
    with pytest.raises(InputError, match="at least two classes"):
        words_to_write(samples.some([0, 1]), question.texts)


def test_thirds_share_no_photograph_and_do_not_depend_on_where_they_lie(tmp_path):
    def split(where):
        for number in range(40):
            photograph(where / "tench" / f"{number}.png", size=(8, 8))
        return [[path.name for path in part.paths] for part in thirds(class_folder(where, None)[0])]

    one, other = split(tmp_path / "a"), split(tmp_path / "b" / "c")
    assert one == other
    assert sorted(name for part in one for name in part) == sorted(f"{number}.png" for number in range(40))
    assert min(map(len, one)) > 4


def write_list(folder, rows, columns=("img_id", "img_filename", "y", "split", "place", "place_filename")):
    folder.mkdir(exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def test_waterbirds_comes_in_its_own_splits(tmp_path):
    rows = [
        {"img_filename": f"bird/{n}.png", "y": n % 2, "split": n % 3, "place": n // 2 % 2, "img_id": n}
        for n in range(12)
    ]
    for row in rows:
        photograph(tmp_path / row["img_filename"], size=(8, 8))
    write_list(tmp_path, rows)
    found = waterbirds(tmp_path)
    assert [len(part) for part in (found.training, found.validation, found.test)] == [4, 4, 4]
    assert found.test.labels["group"].tolist() == [0, 1, 0, 1]
    assert found.test.labels["water"].tolist() == [1, 0, 0, 1]
    write_list(tmp_path, rows, columns=("img_filename", "y", "split"))
    with pytest.raises(InputError, match="no 'place'"):
        waterbirds(tmp_path)
    write_list(tmp_path, [{**row, "split": 0} for row in rows])
    with pytest.raises(InputError, match="photographs for validation"):
        waterbirds(tmp_path)
    write_list(tmp_path, [row if row["split"] != 1 or row["place"] else {**row, "place": 1} for row in rows])
    with pytest.raises(InputError, match=r"for validation in .*every group; there are none of 'class 0, background 0'"):
        waterbirds(tmp_path)
    write_list(tmp_path, [{**rows[0], "y": 3}, *rows[1:]])
    with pytest.raises(InputError, match="y and place 0 or 1"):
        waterbirds(tmp_path)
    write_list(tmp_path, [{**rows[0], "img_filename": "gone.png"}, *rows[1:]])
    with pytest.raises(InputError, match=r"no 'gone\.png'"):
        waterbirds(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        waterbirds(tmp_path / "nowhere")


# --- one task after the other ---------------------------------------------------------------------------------------


def steps(*names):
    def task(name):
        if name == "bad":
            yield Record("t", "m", name, "ours", 0, 0.0)
            raise InputError("There is something wrong.")
        yield Record("t", "m", name, "ours", 0, 1.0)

    return [(name, lambda name=name: task(name)) for name in names]


def test_what_fails_leaves_no_numbers_and_loses_none():
    kept, failed = [], {}
    watch = Watch(keep=kept.append, failed=failed.__setitem__)
    found = watch.run(steps("one", "bad", "two"), 3, {})
    assert found.names("model") == ("one", "two")
    assert [some.names("model") for some in kept] == [("one",), ("one", "two")]
    assert list(map(str, failed.values())) == ["There is something wrong."]
    assert "**Failed: bad.** There is" in page(found, {name: str(error) for name, error in failed.items()})
    with pytest.raises(InputError, match="something wrong"):
        Watch().run(steps("bad"), 1, {})


class Noise:
    """One image, and how often it was asked for."""

    def __init__(self):
        self.labels, self.asked = {}, 0

    def __len__(self):
        return 1

    def batches(self, model):
        self.asked += 1
        yield torch.randn(1, 3, 160, 160)

    def masks(self, model, name="object"):
        raise AssertionError("there are none")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_images_go_where_the_model_is(device):
    subject = Subject("tiny", HookedViT(timm.create_model("test_vit").eval()).to(device), embedded)
    assert [images.device.type for images in subject.batches(Noise())] == [device]


def embedded(several):
    raise AssertionError("no texts are asked for")


def test_contributions_are_kept_by_the_subject_and_few_of_them(model):
    subject, several = Subject("tiny", model, embedded), [Noise() for _ in range(4)]
    first = contributions(subject, several[0])
    assert contributions(subject, several[0]) is first
    assert several[0].asked == 1
    for one in several[1:]:
        contributions(subject, one)
    assert list(subject.kept) == several[1:]
    assert not replace(subject).kept


# --- intervals and texts --------------------------------------------------------------------------------------------


def test_intervals_hold_the_mean_and_narrow_with_images():
    chance = torch.Generator().manual_seed(0)
    few, many = (torch.randint(2, (2, count), generator=chance).double() for count in (50, 1000))
    for values in (few, many):
        for (low, high), mean in zip(of_means(values), values.mean(1).tolist(), strict=True):
            assert low < mean < high
    width = lambda ends: ends[1] - ends[0]  # noqa: E731
    assert width(of_means(few)[0]) == pytest.approx(4 * 0.5 / 50**0.5, rel=0.15)
    assert width(of_means(many)[0]) == pytest.approx(4 * 0.5 / 1000**0.5, rel=0.15)


def test_intervals_of_groups_are_those_of_their_images():
    right = (torch.arange(200) < 60).double()
    found = of_groups(GroupAccuracy(("land", "water"), (0.3, 1.0), (200, 10)))
    assert found["land"] == pytest.approx(of_means(right[None])[0], abs=0.015)
    assert found["worst group"] == found["land"]
    assert found["water"] == (1.0, 1.0)
    assert found["average of groups"] == pytest.approx(tuple((1 + end) / 2 for end in found["land"]))


def test_texts_that_no_component_carries_are_told_with_the_nulls_level(monkeypatch, model):
    """One head writes along one text more than along any other direction; along another nothing is written."""
    chance = torch.Generator().manual_seed(0)
    random = [f"text {number}" for number in range(40)]
    rows = {text: torch.randn(16, generator=chance) for text in ("there", "nowhere", *random)}
    values = 0.5 * torch.randn(2, 60, 16, generator=chance)
    values[0] += 5 * torch.randn(60, 1, generator=chance) * rows["there"]
    nowhere = rows["nowhere"] / rows["nowhere"].norm()
    values -= (values @ nowhere)[..., None] * nowhere
    parts = Decomposition(values, ("L0H0", "L0H1"), values.sum(0))
    monkeypatch.setattr(carrying, "contributions", lambda subject, samples: parts)
    texts = lambda several: TextBank(several, torch.stack([rows[text] for text in several]), space="s")  # noqa: E731
    subject = Subject("planted", model, texts, random=random)
    found = Results(tuple(carrying.carried(subject, Noise(), {"things": ["there", "nowhere"], "more": ["there"]})), {})
    assert found.mean(measure="p", of="there", method="things") == pytest.approx(1 / 41)
    assert found.mean(measure="p", of="nowhere") > 0.05
    assert found.mean(measure="strength", of="nowhere") < found.mean(measure="null", of="nowhere")
    (said,) = carrying.lacking(found)
    assert said.startswith("planted: no component carries 1 of 2 texts more than random texts")
    level = found.mean(measure="null", of="nowhere")
    assert (
        f"'nowhere' ({found.mean(measure='strength', of='nowhere'):.1f}; 95 % of random texts stay below {level:.1f}"
        in said
    )
    assert said in page(found)


def test_each_question_has_a_picture_of_its_own(tmp_path):
    pytest.importorskip("matplotlib")
    curves = tuple(
        Record("ablation", "accuracy", "a", f"{effect}, {order}", 0, 0.5, of=of, step=step)
        for of in ("shape", "my class")
        for effect in EFFECTS
        for order in ORDERS
        for step in (0, 1)
    )
    text = write(Results(curves, {}), tmp_path).read_text()
    names = ["results_ablation_1_shape.png", "results_ablation_2_my_class.png"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names
    assert all(f"(pictures/{name})" in text for name in names)
    assert "(pictures/results_ablation.png)" in page(Results(curves, {}).where(of="shape"))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_tables_and_joins_what_several_runs_found(tmp_path, capsys):
    asked = ["evaluate", "--tasks", "typographic", "--models", "clip", "--size", "100", "--seeds"]
    for seed in ("7", "8"):
        assert main([*asked, seed, "--out", str(tmp_path / seed)]) == 0
    found = [str(tmp_path / seed / "results.json") for seed in ("7", "8")]
    assert main(["evaluate", "--join", *found, "--out", str(tmp_path / "both")]) == 0
    both = Results.load(tmp_path / "both" / "results.json")
    assert both.made["seeds"] == [7, 8]
    before = both.values(task="typographic attack", measure="clean", method="before")
    assert len(before) == 2
    assert min(before) > 0.8
    assert "| before | ." in (tmp_path / "both" / "results.md").read_text()
    assert main(["evaluate", "--join", found[0], found[0], "--out", str(tmp_path / "twice")]) == 2
    assert "different runs" in capsys.readouterr().err.replace("\n", " ")
    # What is made again takes the place of what is there.
    spoilt = tmp_path / "both" / "results.json"
    Results(tuple(replace(one, value=0.0) if one.seed == 7 else one for one in both.records), both.made).save(spoilt)
    assert main([*asked, "7", "--join", str(spoilt), "--out", str(tmp_path / "both")]) == 0
    found_again = Results.load(spoilt)
    assert sorted(found_again.records, key=repr) == sorted(both.records, key=repr)
    assert found_again.made["seeds"] == [7, 8]


@pytest.fixture
def scene_folder(tmp_path):
    """Scenes as photographs of one's own, with masks."""
    drawn = testbed.Scenes("validation", seed=97, size=60)
    for number, scene in enumerate(drawn.scenes(range(len(drawn)))):
        if scene.attributes["shape"] not in ("circle", "star", "heart"):
            continue
        for kind, picture in {
            "images": scene.picture,
            "masks": Image.fromarray(scene.masks["object"].numpy().astype(np.uint8) * 255),
        }.items():
            path = tmp_path / kind / scene.attributes["shape"] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return tmp_path


OF_SCENES = ("--model", "testbed/deit", "--aligner", "testbed/deit", "--clip", "testbed/clip")


def test_the_command_takes_photographs_with_masks_and_writes_on_them(scene_folder, capsys, monkeypatch):
    known = evaluate._vocabulary
    monkeypatch.setattr(evaluate, "_vocabulary", lambda words: (known(words)[0], objects()))
    folders = ["--images", str(scene_folder / "images"), "--masks", str(scene_folder / "masks")]
    out = scene_folder / "out"
    asked = ["ablation", "segmentation", "typographic"]
    assert main(["evaluate", *OF_SCENES, *folders, "--tasks", *asked, "--device", "cpu", "--out", str(out)]) == 0
    found = Results.load(out / "results.json")
    assert found.names("task") == ("ablation", "segmentation", "typographic attack", "texts")
    (record,) = found.where(measure="mIoU", method="decomposition", of="class, chosen protocol").records
    assert record.interval[0] <= record.value <= record.interval[1]
    assert record.value > found.mean(measure="mIoU", method="constant", of="class, chosen protocol")
    (before,) = found.where(measure="written", method="before").records
    assert before.interval[0] <= before.value <= before.interval[1]
    assert {"written words", "their classes"} == set(found.where(task="texts").names("method"))
    assert "## Texts that no component carries" in (out / "results.md").read_text()
    assert "texts" in capsys.readouterr().out


def test_of_the_testbeds_clip_no_text_is_random(scene_folder):
    out = scene_folder / "out"
    folders = ["--images", str(scene_folder / "images"), "--out", str(out)]
    assert main(["evaluate", *OF_SCENES, *folders, "--tasks", "retrieval"]) == 0
    assert Results.load(out / "results.json").names("task") == ("retrieval by text",)


def test_a_classifier_is_segmented_without_texts(scene_folder):
    folders = ["--images", str(scene_folder / "images"), "--masks", str(scene_folder / "masks")]
    asked = ["--model", "testbed/deit", "--tasks", "segmentation", "--out", str(scene_folder / "out")]
    assert main(["evaluate", *asked, *folders]) == 0
    assert Results.load(scene_folder / "out" / "results.json").names("task") == ("segmentation",)


def test_a_task_that_fails_is_told_and_the_others_are_there(scene_folder, capsys, monkeypatch):
    monkeypatch.setattr("vitdecomp_lens.evaluation.running.retrieving.agreement", lambda *args, **options: 1 / 0)
    folders = ["--images", str(scene_folder / "images"), "--out", str(scene_folder / "out")]
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is no failure to go on from
        main(["evaluate", *OF_SCENES, *folders, "--tasks", "retrieval"])

    def refused(*args, **options):
        raise InputError("No texts today.")

    monkeypatch.setattr("vitdecomp_lens.evaluation.running.retrieving.agreement", refused)
    assert main(["evaluate", *OF_SCENES, *folders, "--tasks", "retrieval", "typographic"]) == 1
    assert "Failed: retrieval: No texts today." in " ".join(capsys.readouterr().err.split())
    found = Results.load(scene_folder / "out" / "results.json")
    assert found.names("task") == ("typographic attack",)
    assert "**Failed: retrieval.** No texts today." in (scene_folder / "out" / "results.md").read_text()


def test_all_folders_are_looked_at_before_anything_is_computed(scene_folder, capsys, monkeypatch):
    def computed(*args, **options):
        raise AssertionError("too early")

    monkeypatch.setattr("vitdecomp_lens.evaluation.subjects.decompose", computed)
    folders = ["--images", str(scene_folder / "images"), "--masks", str(scene_folder / "masks")]
    folders += ["--out", str(scene_folder / "out")]
    write_list(scene_folder / "birds", [])
    assert main(["evaluate", *OF_SCENES, *folders, "--waterbirds", str(scene_folder / "birds")]) == 2
    assert "photographs for training" in " ".join(capsys.readouterr().err.split())
    mask = next((scene_folder / "masks" / "star").iterdir())
    Image.new("L", (10, 10)).save(mask)
    assert main(["evaluate", *OF_SCENES, *folders]) == 2
    assert "masks as large as their photographs" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", *OF_SCENES, *folders[:2], "--tasks", "spurious"]) == 2
    assert "photographs for one of the tasks (spurious)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "test_vit"], "--model alone"),
        (["--device", "nowhere", "--seeds", "1"], "--device as a device"),
        (["--images", "photographs"], "--images alone"),
        (["--model", "test_vit", "--images", "photographs", "--seeds", "1"], "--seeds is for the testbed"),
        (["--seeds", "1", "1"], "different seeds"),
        (["--seeds", "1", "--clip-pretrained", "openai"], "--clip-pretrained is for a model of your own"),
        (["--tasks", "segmentation", "--pretrained"], "--pretrained is for a model of your own"),
        (["--tasks", "retrieval", "--size", "100"], "more than 100 scenes for retrieval"),
    ],
)
def test_what_does_not_go_together_is_refused(options, said, tmp_path, capsys):
    assert main(["evaluate", *options, "--out", str(tmp_path)]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
