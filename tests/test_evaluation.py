"""What evaluations are made of: records and tables; photographs with masks, thirds and Waterbirds' list."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitdecomp_lens import HookedViT
from vitdecomp_lens.cli import main
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError
from vitdecomp_lens.evaluation.folders import class_folder, thirds, waterbirds
from vitdecomp_lens.evaluation.published import published
from vitdecomp_lens.evaluation.records import Record, Results, short


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
    samples, question = class_folder(folder, 1000)
    assert samples.labels["class"].tolist() == [1] * 4 + [0] * 4
    assert question.texts[:2] == ("tench", "goldfish")
    assert len(set(question.texts)) == 1000
    assert torch.cat(list(samples.batches(model))).shape == (8, 3, 160, 160)
    _, asked = class_folder(folder, None)
    assert (asked.texts, asked.columns) == (("goldfish", "tench"), (0, 1))
    photograph(folder / "no such fish" / "0.png")
    with pytest.raises(UnknownNameError, match="no class 'no such fish'"):
        class_folder(folder, 1000)
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
    samples, _ = class_folder(folder, 1000, masks)
    found = samples.masks(model)
    assert found.shape == (8, 160, 160)
    assert bool(found[:, :, :78].all())
    assert not bool(found[:, :, 82:].any())
    with pytest.raises(InputError, match="masks of the second"):
        samples.masks(model, "second")
    Image.new("L", (10, 10)).save(masks / "goldfish" / "2.png")
    with pytest.raises(InputError, match=r"10 × 10 pixels, and '2\.png' 60 × 40"):
        class_folder(folder, 1000, masks)[0].masks(model)
    (masks / "goldfish" / "2.png").unlink()
    with pytest.raises(InputError, match="a mask for each image"):
        class_folder(folder, 1000, masks)


def test_thirds_share_no_photograph_and_do_not_depend_on_where_they_lie(tmp_path):
    def split(where):
        for number in range(40):
            photograph(where / "tench" / f"{number}.png", size=(8, 8))
        found = thirds(class_folder(where, 1000)[0])
        return [[path.name for path in part.paths] for part in (found.training, found.validation, found.test)]

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
    write_list(tmp_path, [{**rows[0], "y": 3}, *rows[1:]])
    with pytest.raises(InputError, match="y and place 0 or 1"):
        waterbirds(tmp_path)
    write_list(tmp_path, [{**rows[0], "img_filename": "gone.png"}, *rows[1:]])
    with pytest.raises(InputError, match=r"no 'gone\.png'"):
        waterbirds(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        waterbirds(tmp_path / "nowhere")


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "test_vit"], "--model alone"),
        (["--images", "photographs"], "--images alone"),
        (["--model", "test_vit", "--images", "photographs", "--seeds", "1"], "--seeds is for the testbed"),
        (["--seeds", "1", "1"], "different seeds"),
    ],
)
def test_what_does_not_go_together_is_refused(options, said, tmp_path, capsys):
    assert main(["evaluate", *options, "--out", str(tmp_path)]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
