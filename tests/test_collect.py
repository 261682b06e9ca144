"""Collecting: whatever happens on the way, the store is that of an undisturbed run."""

import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import accelerate
import datasets
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from tiny_models import perturb
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import FakeData, ImageFolder

from vitdecomp_lens import HookedViT, decompose
from vitdecomp_lens.clip.sources import AlignmentSource
from vitdecomp_lens.clip.text_embedding import space_of
from vitdecomp_lens.collect import Gather, ImageSource, Store, collect, images_from
from vitdecomp_lens.collecting.gathered import Gathered
from vitdecomp_lens.collecting.pictures import Preprocessor, content_hash
from vitdecomp_lens.collecting.reading import Reader
from vitdecomp_lens.collecting.sources import IN_A_ROW, spread
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError
from vitdecomp_lens.testbed.models import build, normalised
from vitdecomp_lens.testbed.scenes import Scenes
from vitdecomp_lens.weights import weights_hash

BATCH = 8
PREPROCESS = {"input_size": (3, 48, 48), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}


def tiny(**options):
    torch.manual_seed(0)
    made = {"img_size": 48, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3, **options}
    model = perturb(VisionTransformer(**made)).requires_grad_(False)
    model.pretrained_cfg = PREPROCESS
    return HookedViT(model)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def clip():
    return perturb(build("clip")).requires_grad_(False)


@pytest.fixture
def photographs(tmp_path):
    """A folder of pictures in two classes, of several formats and sizes."""
    generator = random.Random(0)
    folder = tmp_path / "photographs"
    for number in range(11):
        place = folder / ("cats" if number % 3 else "dogs") / "deep"
        place.mkdir(parents=True, exist_ok=True)
        size = (48, 48) if number % 2 else (60 + number, 50)
        picture = Image.effect_noise(size, 80).convert("RGB") if number % 4 else Image.new("RGB", size, "teal")
        picture.putpixel((0, 0), (generator.randrange(256), 0, 0))
        picture.save(place / f"{number:02d}.{'png' if number % 2 else 'jpg'}")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- values ---------------------------------------------------------------------------------------------------------


def test_a_store_holds_what_decompose_and_the_clip_give(model, clip, tmp_path):
    scenes = Scenes("test", seed=3, size=21)
    store = collect(model, scenes, tmp_path / "store", clip=clip, batch_size=8)
    images = normalised(scenes.images(range(21)))
    assert store.count == len(store) == 21
    assert isinstance(store, AlignmentSource)
    assert store.kept == ("contributions", "representations", "embeddings")
    assert store.space == space_of(clip)
    assert store.ids == tuple(f"test:3:{number}" for number in range(21))
    assert torch.equal(store.labels("shape"), scenes.labels("shape", range(21)))
    assert torch.equal(store.labels("group"), scenes.labels("group", range(21)))
    assert store.labels("word").tolist() == [-1] * 21
    stored = store.decomposition()
    sizes = []
    for first, (values, targets) in zip(range(0, 21, 8), store.chunks(), strict=True):
        parts = decompose(model, images[first : first + 8])
        assert parts.components == store.components
        assert {**parts.metadata, "weights": weights_hash(model)} == store.metadata
        assert torch.equal(values, parts.values)
        assert torch.equal(targets, clip.encode_image(images[first : first + 8]))
        assert torch.equal(stored.values[:, first : first + 8], parts.values)
        assert torch.equal(stored.total[first : first + 8], parts.total)
        sizes.append(len(targets))
    assert sizes == [8, 8, 5]
    assert stored.complete
    assert float(stored.gap.max()) < 1e-5
    assert store.verify() == ()
    assert store.embeddings().shape == (21, 64)
    assert torch.equal(store.representations(), stored.total)


def test_two_models_of_one_class_have_stores_that_differ(model, tmp_path):
    other = tiny()
    other.original.blocks[0].mlp.fc1.weight += 1
    one, two = (
        collect(each, Scenes("test", size=2), tmp_path / name, by="layer")
        for each, name in ((model, "one"), (other, "two"))
    )
    assert one.metadata["model"] == two.metadata["model"]
    assert one.metadata["weights"] == weights_hash(model)
    assert two.metadata["weights"] == weights_hash(other) != one.metadata["weights"]
    assert two.decomposition().metadata == two.metadata


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_contributions_have_the_precision_asked_for(model, tmp_path, dtype):
    scenes = Scenes("test", size=3)
    store = collect(model, scenes, tmp_path / "store", dtype=dtype, by="layer")
    parts = decompose(model, normalised(scenes.images(range(3))), by="layer")
    assert torch.equal(store.decomposition().values, parts.values.to(dtype))
    assert torch.equal(store.representations(), parts.total)
    assert store.kept == ("contributions", "representations")
    assert store.space is None


def test_a_clip_that_is_the_model_runs_once(clip, tmp_path):
    hooked, calls = HookedViT(clip), []
    hooked.add_hook("hook_embed", lambda value, hook: calls.append(len(value)), is_permanent=True)
    store = collect(hooked, Scenes("test", size=5), tmp_path / "store", clip=clip, batch_size=5)
    assert calls.count(5) == 1
    assert torch.equal(store.embeddings(), store.representations())
    images = normalised(Scenes("test").images(range(5)))
    torch.testing.assert_close(store.embeddings(), clip.encode_image(images), rtol=1e-5, atol=1e-6)
    # Here something else is decomposed: the tower embeds on its own, under a wrapper without hooks.
    store = collect(hooked, Scenes("test", size=5), tmp_path / "unit", clip=clip, batch_size=5, of="embedding")
    unit = torch.nn.functional.normalize(store.embeddings(), dim=-1)
    torch.testing.assert_close(store.representations(), unit, rtol=1e-5, atol=1e-6)
    assert calls.count(5) == 2


def test_some_components_make_a_store_that_no_aligner_takes(model, clip, tmp_path):
    store = collect(model, Scenes("test", size=2), tmp_path / "store", clip=clip, components=["L1H0", "mlp.0"])
    assert [component.label for component in store.components] == ["L1H0", "mlp.0"]
    assert not store.decomposition().complete
    with pytest.raises(InputError, match="all components"):
        next(store.chunks())


def test_a_hook_that_changes_nothing_in_a_batch_has_written_zero(tmp_path):
    model, seen = tiny(), []

    def now_and_then(value, hook):
        seen.append(len(value))
        return value + 1 if len(value) != 4 else value

    model.add_hook("blocks.1.hook_resid_post", now_and_then, is_permanent=True)
    store = collect(model, Scenes("test", size=6), tmp_path / "store", batch_size=4)
    added = store.decomposition()["intervention@blocks.1.hook_resid_post"]
    assert bool((added[:4] == 0).all())
    assert bool((added[4:] != 0).any(1).all())


# --- ends and new beginnings ----------------------------------------------------------------------------------------


PRELOADED = ["accelerate", "datasets", "open_clip", "pytest", "timm", "torchvision.datasets", "vitdecomp_lens.collect"]


def _collect_all(model, folder, scenes):
    clip = perturb(build("clip")).requires_grad_(False)
    gather = Gather(covariance=True, cross=True, top=3)
    options = {"clip": clip, "batch_size": BATCH, "dtype": torch.float16, "gather": gather, "resume": True}
    return collect(model, Scenes("test", size=scenes), folder, **options)


def _collect_until_killed(folder, scenes):
    torch.set_num_threads(1)
    _collect_all(tiny(), folder, scenes)


@pytest.mark.parametrize(("kills", "scenes"), [(1, 60), pytest.param(3, 300, marks=pytest.mark.sweep)])
def test_a_run_that_is_killed_ends_in_the_same_bytes(model, tmp_path, kills, scenes):
    """SIGKILL, at moments that a seed draws: after some chunks, somewhere within the next."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOADED)
    moments, folder = random.Random(7), tmp_path / "killed"
    chunks = -(-scenes // BATCH)
    for number in range(kills):
        process = forks.Process(target=_collect_until_killed, args=(folder, scenes))
        process.start()
        wanted = moments.randrange(chunks * number // (kills + 1) + 1, chunks * (number + 1) // (kills + 1))
        deadline = time.monotonic() + 300
        while len(list(folder.glob("chunk-*"))) < wanted and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -9
        with pytest.raises(StoreError, match=r"unfinished: \d+ chunks"):
            Store.open(folder)
    assert _collect_all(model, folder, scenes).verify() == ()
    _collect_all(model, tmp_path / "undisturbed", scenes)
    undisturbed = contents(tmp_path / "undisturbed")
    assert contents(folder) == undisturbed
    assert {"manifest.json", "complete.json", "gathered-0000.safetensors"} < set(undisturbed)


def break_off(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [Path.unlink, break_off])
def test_resuming_makes_missing_and_truncated_chunks_anew(model, clip, tmp_path, damage):
    options = {"clip": clip, "batch_size": 4, "gather": Gather(top=2)}
    collect(model, Scenes("test", size=14), tmp_path / "store", **options)
    before = contents(tmp_path / "store")
    for name in ("chunk-000001.safetensors", "chunk-000003.safetensors"):
        damage(tmp_path / "store" / name)
    told = []
    again = {**options, "resume": True, "progress": lambda *now: told.append(now)}
    store = collect(model, Scenes("test", size=14), tmp_path / "store", **again)
    assert contents(tmp_path / "store") == before
    assert told[-1] == (14, 14, 8)
    assert len(told) == 2
    assert store.gathered.count == 14


def test_statistics_that_were_lost_are_gathered_again(model, tmp_path):
    options = {"batch_size": 4, "gather": Gather(covariance=True)}
    collect(model, Scenes("test", size=10), tmp_path / "store", **options)
    before = contents(tmp_path / "store")
    (tmp_path / "store" / "gathered-0000.safetensors").unlink()
    with pytest.raises(InputError, match="Nothing was gathered"):
        assert Store.open(tmp_path / "store").gathered
    collect(model, Scenes("test", size=10), tmp_path / "store", resume=True, **options)
    assert contents(tmp_path / "store") == before


@pytest.mark.parametrize("damage", [break_off, lambda path: path.write_bytes(b"no statistics")])
def test_damaged_statistics_are_named_and_can_be_gathered_again(model, tmp_path, damage):
    options = {"batch_size": 4, "gather": Gather(covariance=True), "by": "layer", "resume": True}
    collect(model, Scenes("test", size=6), tmp_path / "store", **options)
    before, path = contents(tmp_path / "store"), tmp_path / "store" / "gathered-0000.safetensors"
    damage(path)
    message = (
        r"gathered-0000\.safetensors(.|\n)*cannot be used\. (?!.*\.save)(.|\n)*Delete it; collecting again with resume"
    )
    with pytest.raises(StoreError, match=message):
        collect(model, Scenes("test", size=6), tmp_path / "store", **options)
    path.unlink()
    collect(model, Scenes("test", size=6), tmp_path / "store", **options)
    assert contents(tmp_path / "store") == before


@contextmanager
def room():
    """Gives a function that sets how many bytes a file may have from there on, as the system holds it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("chunks", "size", "keep", "gather", "what"),
    [
        (3, 1000, None, None, "chunk-000003"),
        (0, 20_000, [], Gather(covariance=True), "gathered-0000"),
        (5, 10, None, None, "complete"),
    ],
)
def test_a_full_disk_leaves_a_store_that_can_be_resumed(model, tmp_path, chunks, size, keep, gather, what):
    options = {"batch_size": 4, "by": "head", "keep": keep, "gather": gather, "readers": 1}
    done = 0
    with room() as limit:

        def count(*_):
            nonlocal done
            done += 1
            if done == max(chunks, 1):
                limit(size)

        with pytest.raises(StoreError, match=rf"{what}(.|\n)*can be resumed: \d chunks are there(.|\n)*resume"):
            collect(model, Scenes("test", size=20), tmp_path / "store", progress=count, **options)
    kept = [f"chunk-00000{n}.safetensors" for n in range(max(chunks, 1))]
    assert sorted(contents(tmp_path / "store")) == [*kept, "manifest.json"]
    collect(model, Scenes("test", size=20), tmp_path / "store", resume=True, **options)
    collect(model, Scenes("test", size=20), tmp_path / "undisturbed", **options)
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"by": "layer"}, "asked.by is 'head' there, and 'layer' is asked for"),
        ({"dtype": torch.float16}, "asked.dtype"),
        ({"batch_size": 5}, "asked.batch_size"),
        ({"source": Scenes("test", seed=1, size=6)}, "asked.images is 'scenes test:0'"),
        ({"source": Scenes("test", size=7)}, "asked.count is 6"),
        ({"keep": ["contributions"]}, "asked.keep"),
        ({"gather": Gather(top=1)}, "asked.gather"),
        ({"preprocess": lambda pictures: torch.zeros(len(pictures), 3, 48, 48)}, "asked.preprocess"),
    ],
)
def test_resuming_refuses_another_request_and_says_what_differs(model, tmp_path, change, named):
    request = {"source": Scenes("test", size=6), "by": "head", "batch_size": 4}
    collect(model, out=tmp_path / "store", **request)
    with pytest.raises(StoreError, match="of another request") as caught:
        collect(model, out=tmp_path / "store", resume=True, **{**request, **change})
    assert named in str(caught.value)


def test_resuming_refuses_other_weights_and_another_number_of_threads(model, tmp_path):
    scenes = Scenes("test", size=2)
    collect(model, scenes, tmp_path / "store")
    other = tiny()
    other.original.blocks[0].mlp.fc1.weight += 1
    with pytest.raises(StoreError, match=r"asked\.model"):
        collect(other, scenes, tmp_path / "store", resume=True)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["content"]["made_with"]["threads"] == torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(StoreError, match=r"made_with\.threads is 1 there, and 2"):
            collect(model, scenes, tmp_path / "store", resume=True)
    finally:
        torch.set_num_threads(1)


def test_what_is_there_is_not_written_over(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"empty folder.*notes\.txt"):
        collect(model, Scenes("test", size=2), tmp_path, resume=True)
    collect(model, Scenes("test", size=2), tmp_path / "store")
    with pytest.raises(StoreError, match="There is a store"):
        collect(model, Scenes("test", size=2), tmp_path / "store")
    with pytest.raises(StoreError, match="Choose another place"):
        collect(model, Scenes("test", size=2), tmp_path / "notes.txt" / "store")


def test_only_what_this_package_left_unfinished_is_tidied_and_only_in_its_store(model, tmp_path):
    request = {"source": Scenes("test", size=3), "by": "layer", "batch_size": 2}
    number = "0123456789abcdef" * 2
    ours = {".tmpA1b2C3", f".chunk-000001.safetensors.{number}.unfinished", f".complete.json.{number}.unfinished"}
    others = {".tmp", ".tmp_notes", ".tmpA1b2C3d", ".draft.unfinished", f".novel.txt.{number}.unfinished"}
    place = tmp_path / "place"
    place.mkdir()
    for name in ours | others:
        (place / name).write_text("somebody's")
    for resume in (False, True):
        with pytest.raises(StoreError, match="Expected an empty folder"):
            collect(model, out=place, resume=resume, **request)
        assert set(contents(place)) == ours | others
    manifest = tmp_path / "store" / f".manifest.json.{number}.unfinished"
    manifest.parent.mkdir()
    manifest.write_text("the beginning of")
    whole = contents(collect(model, out=tmp_path / "store", **request).path)
    assert manifest.name not in whole
    for name in ours | others:
        (tmp_path / "store" / name).write_text("somebody's")
    with pytest.raises(StoreError, match="There is a store"):
        collect(model, out=tmp_path / "store", **request)
    with pytest.raises(StoreError, match="another request"):
        collect(model, out=tmp_path / "store", resume=True, **{**request, "batch_size": 3})
    assert set(contents(tmp_path / "store")) == set(whole) | ours | others
    collect(model, out=tmp_path / "store", resume=True, **request)
    assert set(contents(tmp_path / "store")) == set(whole) | others


def test_the_threads_of_a_process_are_known_before_the_manifest_and_others_are_waited_for(model, tmp_path, monkeypatch):
    waits = []

    class State:
        process_index, num_processes = 0, 1

        def __init__(self, *, cpu, timeout):
            assert cpu
            waits.append(timeout)
            torch.set_num_threads(2)  # as accelerate does

        def wait_for_everyone(self):
            pass

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "PartialState", State)
    try:
        store = collect(model, Scenes("test", size=2), tmp_path / "store", by="layer")
    finally:
        torch.set_num_threads(1)
    assert store.manifest["made_with"]["threads"] == 2
    assert waits == [timedelta(days=7)]


# --- images ---------------------------------------------------------------------------------------------------------


def test_an_unreadable_image_stops_or_is_skipped_and_listed(model, photographs, tmp_path):
    broken = photographs / "cats" / "deep" / "05.png"
    broken.write_bytes(broken.read_bytes()[:90])
    with pytest.raises(InputError, match=r"cats/deep/05\.png.*cannot be read"):
        collect(model, photographs, tmp_path / "stopped", batch_size=4)
    assert sorted(contents(tmp_path / "stopped")) == ["manifest.json"]
    store = collect(model, photographs, tmp_path / "skipped", batch_size=4, unreadable="skip")
    ((name, reason),) = store.skipped
    assert name == "cats/deep/05.png"
    assert "image file" in reason
    assert "Leave it out" not in reason  # it was left out
    assert store.count == 10
    assert name not in store.ids
    broken.unlink()
    rest = collect(model, photographs, tmp_path / "without", batch_size=11)
    assert rest.ids == store.ids
    torch.testing.assert_close(rest.decomposition().values, store.decomposition().values, rtol=1e-4, atol=1e-5)


def test_what_was_done_before_an_unreadable_image_stopped_a_run_is_kept_where_it_is_then_skipped(
    model, photographs, tmp_path
):
    options = {"batch_size": 2, "by": "layer", "gather": Gather(top=1)}
    (photographs / "dogs" / "deep" / "00.jpg").write_bytes(b"no picture")
    undisturbed = collect(model, photographs, tmp_path / "undisturbed", unreadable="skip", **options)
    with pytest.raises(InputError, match=r'resume=True.*--resume.*unreadable="skip" \(--unreadable skip\)'):
        collect(model, photographs, tmp_path / "store", **options)
    before = contents(tmp_path / "store")
    assert len([name for name in before if name.startswith("chunk")]) == 3
    store = collect(model, photographs, tmp_path / "store", unreadable="skip", resume=True, **options)
    assert [name for name, _ in store.skipped] == ["dogs/deep/00.jpg"]
    assert contents(store.path) == contents(undisturbed.path)
    # What was skipped stays so: nothing is read again.
    collect(model, photographs, store.path, resume=True, **options)
    assert contents(store.path) == contents(undisturbed.path)


def test_new_files_are_as_readable_as_others(model, tmp_path):
    before = os.umask(0o027)
    try:
        store = collect(model, Scenes("test", size=3), tmp_path / "store", batch_size=2, gather=Gather(top=1))
        (tmp_path / "store" / "other").touch()
    finally:
        os.umask(before)
    assert store.count == 3
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "store").iterdir()} == {0o640}


@pytest.mark.parametrize("empty", [Scenes("test", size=0), [], "its own"])
def test_no_images_are_refused_before_anything_is_made(model, tmp_path, empty):
    if empty == "its own":
        empty = images_from(Scenes("test", size=1))
        empty.count = 0
    with pytest.raises(InputError, match=r"^Expected at least one image; the"):
        collect(model, empty, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_chunk_without_a_readable_image_is_none_the_less_done(model, photographs, tmp_path):
    for name in ("01", "02", "04", "05"):
        next(photographs.glob(f"cats/deep/{name}.*")).write_bytes(b"no picture")
    options = {"batch_size": 2, "unreadable": "skip", "gather": Gather(top=1)}
    store = collect(model, photographs, tmp_path / "store", **options)
    assert len(store.skipped) == 4
    assert store.count == store.gathered.count == 7
    assert store.decomposition([0, 6]).values.shape[1] == 2
    assert store.verify() == ()
    before = contents(tmp_path / "store")
    collect(model, photographs, tmp_path / "store", resume=True, **options)
    assert contents(tmp_path / "store") == before
    for path in photographs.rglob("*.*"):
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match="None of the 11 images could be read"):
        collect(model, photographs, tmp_path / "none", unreadable="skip")


def test_identifiers_do_not_depend_on_the_order_of_a_listing_or_on_the_place(photographs, tmp_path, monkeypatch):
    first = images_from(photographs)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top: [(a, b, c[::-1]) for a, b, c in walk(top)][::-1])
    moved = shutil.copytree(photographs, tmp_path / "elsewhere")
    second = images_from(str(moved))
    assert [sample.id for sample in first.read(0, 99)] == [sample.id for sample in second.read(0, 99)]
    assert first.read(0, 1)[0].id == "cats/deep/01.png"
    assert first.identity == second.identity
    assert second.labels == {"class": ["cats", "dogs"]}
    next(moved.glob("dogs/deep/*")).unlink()
    assert images_from(moved).identity != first.identity


def test_files_and_torchvision_folders_have_the_names_of_their_files(photographs):
    folder = images_from(ImageFolder(str(photographs)))
    assert [s.id for s in folder.read(0, 99)] == [s.id for s in images_from(photographs).read(0, 99)]
    assert [s.labels for s in folder.read(0, 99)] == [s.labels for s in images_from(photographs).read(0, 99)]
    files = sorted(photographs.rglob("*.png"))
    assert [s.id for s in images_from(files).read(1, 3)] == [path.as_posix() for path in files[1:3]]
    with pytest.raises(InputError, match="without transform"):
        images_from(ImageFolder(str(photographs), transform=lambda image: image))


def test_data_sets_of_torchvision_are_named_by_content(model, tmp_path):
    fake = FakeData(size=7, image_size=(3, 48, 48), num_classes=4)
    store = collect(model, fake, tmp_path / "store", batch_size=4)
    backwards = [fake[number] for number in reversed(range(7))]
    assert store.ids[::-1] == tuple(sample.id for sample in images_from(backwards).read(0, 9))
    assert store.labels("label").tolist() == [fake[number][1] for number in range(7)]
    parts = decompose(model, model.preprocess([fake[number][0] for number in range(4)]))
    assert torch.equal(store.decomposition(slice(4)).values, parts.values)


class Numbers(torch.utils.data.IterableDataset):
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        yield from (Scenes("test")[number].picture for number in range(self.size))


@pytest.mark.parametrize("size", [8, 10])
def test_a_stream_of_unknown_length_gives_the_same_as_a_list(model, tmp_path, size):
    listed = collect(model, list(Numbers(size)), tmp_path / "listed", batch_size=4)
    told = []
    streamed = collect(
        model, Numbers(size), tmp_path / "streamed", batch_size=4, progress=lambda *now: told.append(now)
    )
    assert streamed.ids == listed.ids
    assert torch.equal(streamed.decomposition().values, listed.decomposition().values)
    assert told[-1] == (size, None, 0)
    before = contents(tmp_path / "streamed")
    (tmp_path / "streamed" / "chunk-000001.safetensors").unlink()
    (tmp_path / "streamed" / "complete.json").unlink()
    collect(model, Numbers(size), tmp_path / "streamed", batch_size=4, resume=True)
    assert contents(tmp_path / "streamed") == before


class Hiccups(torch.utils.data.IterableDataset):
    """Raises at some places, and goes on."""

    def __init__(self, size, bad):
        self.size, self.bad = size, bad

    def __iter__(self):
        return map(self._item, range(self.size))

    def _item(self, number):
        if number in self.bad:
            raise OSError("the connection was lost")
        return Scenes("test")[number].picture


@pytest.mark.parametrize("bad", [(2, 3, 5), (0, 4)])
def test_items_of_a_stream_that_raise_stop_or_are_skipped(model, tmp_path, bad):
    with pytest.raises(InputError, match=f"image 'item {bad[0]}' cannot be read: OSError: the connection was lost"):
        collect(model, Hiccups(9, bad), tmp_path / "stopped", batch_size=4, by="layer")
    store = collect(model, Hiccups(9, bad), tmp_path / "store", batch_size=4, by="layer", unreadable="skip")
    assert [name for name, _ in store.skipped] == [f"item {number}" for number in bad]
    good = [content_hash(Scenes("test")[number].picture) for number in range(9) if number not in bad]
    assert list(store.ids) == good
    (store.path / "complete.json").unlink()
    (store.path / "chunk-000001.safetensors").unlink()
    again = collect(model, Hiccups(9, bad), store.path, batch_size=4, by="layer", unreadable="skip", resume=True)
    assert list(again.ids) == good


class Breaks(Numbers):
    def __iter__(self):
        yield from super().__iter__()
        raise ValueError("no more")


@pytest.mark.parametrize("size", [6, 7, 8])
def test_a_stream_that_breaks_is_never_taken_for_one_that_ends(model, tmp_path, size):
    message = f"broke at item {size}: ValueError: no more.*resume"
    with pytest.raises(InputError, match=message):
        collect(model, Breaks(size), tmp_path / "store", batch_size=4, by="layer", unreadable="skip")
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path / "store")
    store = collect(model, Numbers(9), tmp_path / "whole", batch_size=4, by="layer")
    assert store.count == 9
    source = images_from(Hiccups(300, range(1, 300)))
    with pytest.raises(InputError, match="broke at item 1: OSError"):
        source.read(0, IN_A_ROW + 2)
    assert len(images_from(Hiccups(300, range(1, 300))).read(0, IN_A_ROW)) == IN_A_ROW


def test_data_sets_that_differ_anywhere_among_some_have_other_identities():
    pictures = [Scenes("test")[number].picture for number in range(5)]
    for number in range(5):
        changed = [*pictures[:number], Image.new("RGB", (48, 48), "teal"), *pictures[number + 1 :]]
        assert images_from(changed).identity != images_from(pictures).identity
    assert images_from(list(pictures)).identity == images_from(pictures).identity
    table, columns = rows(5), rows(5).to_dict()
    columns["picture"][2] = columns["picture"][0]
    other = datasets.Dataset.from_dict(columns, features=table.features)
    assert images_from(other).identity != images_from(table).identity == images_from(rows(5)).identity
    assert len(set(spread(1000))) == 64
    assert (spread(65)[0], spread(65)[-1], spread(64)) == (0, 64, list(range(64)))


def test_items_are_asked_for_one_by_one_and_hashed_at_once_in_their_order(photographs):
    asked, files = [], sorted(photographs.rglob("*.*"))

    class Lazy(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, number):
            asked.append((threading.get_ident(), number))
            return Image.open(files[number])

    source = images_from(Lazy())
    asked.clear()
    assert [sample.id for sample in source.read(2, 99)] == [content_hash(Image.open(path)) for path in files[2:]]
    assert asked == [(threading.get_ident(), number) for number in range(2, len(files))]


def rows(size=9):
    features = {
        "picture": datasets.Image(),
        "kind": datasets.ClassLabel(names=["x", "y"]),
        "year": datasets.Value("int64"),
        "name": datasets.Value("string"),
    }
    columns = {
        "picture": [Scenes("test")[number].picture for number in range(size)],
        "kind": [number % 2 for number in range(size)],
        "year": [1990 + number for number in range(size)],
        "name": [f"picture {number}" for number in range(size)],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_data_sets_of_hugging_face_in_memory_and_streamed(model, tmp_path):
    table = rows()
    stores = {
        name: collect(model, source, tmp_path / name, batch_size=4)
        for name, source in (("table", table), ("stream", table.to_iterable_dataset()))
    }
    assert stores["table"].ids == stores["stream"].ids
    assert torch.equal(stores["table"].decomposition().values, stores["stream"].decomposition().values)
    assert stores["table"].label_names == {"kind": ["x", "y"], "year": None}
    assert stores["stream"].labels("year").tolist() == list(range(1990, 1999))
    images = normalised(Scenes("test").images(range(4)))
    assert torch.equal(stores["table"].decomposition(slice(4)).values, decompose(model, images).values)
    shuffled = images_from(table.shuffle(seed=1)).read(0, 9)
    assert {s.id: s.labels["year"] for s in shuffled} == dict(zip(stores["table"].ids, range(1990, 1999), strict=True))
    named = images_from(table, id="name").read(2, 4)
    assert [sample.id for sample in named] == ["picture 2", "picture 3"]
    assert "name" not in named[0].labels
    before = contents(tmp_path / "stream")
    (tmp_path / "stream" / "chunk-000002.safetensors").unlink()
    collect(model, table.to_iterable_dataset(), tmp_path / "stream", batch_size=4, resume=True)
    assert contents(tmp_path / "stream") == before


def test_a_stream_without_features_is_understood_by_its_first_row():
    made = ({"image": scene.picture, "label": 1} for scene in Scenes("test").scenes(range(3)))
    kept = list(made)
    stream = datasets.IterableDataset.from_generator(lambda: iter(kept))
    source = images_from(stream)
    assert source.count is None
    assert [sample.labels for sample in source.read(0, 9)] == [{"label": 1}] * 3
    assert len({sample.id for sample in source.read(0, 9)}) == 3


def test_a_damaged_row_can_be_skipped(model, tmp_path):
    buffer = io.BytesIO()
    Scenes("test")[0].picture.save(buffer, "PNG")
    kept = [{"bytes": content, "path": None} for content in (buffer.getvalue(), b"nothing", buffer.getvalue()[:60])]
    table = datasets.Dataset.from_dict({"image": kept}).cast_column("image", datasets.Image())
    with pytest.raises(InputError, match="cannot be read"):
        collect(model, table, tmp_path / "stopped")
    store = collect(model, table, tmp_path / "skipped", unreadable="skip")
    assert store.count == 1
    assert len(store.skipped) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [], "at least one image"),
        (lambda: 7, "Expected images as a folder"),
        (lambda: iter([Image.new("RGB", (4, 4))]), "Expected images as a folder"),
        (lambda: "nowhere", "Expected a folder of images"),
        (lambda: [(Image.new("RGB", (4, 4)), "cat")], "whole number as 'label' of item 0; got 'cat'"),
        (lambda: [(Image.new("RGB", (4, 4)), 1, 2)], "a picture and the number of its class"),
        (lambda: [({"image": 1}, 1)], "a picture and the number of its class"),
        (lambda: rows().rename_column("picture", "year2").cast_column("year2", datasets.Image()), None),
        (lambda: rows().remove_columns("picture"), "one column of images; the data set has 0"),
        (lambda: rows().select([]), "at least one image"),
    ],
)
def test_what_is_no_set_of_images_is_refused(make, message):
    if message is None:
        assert images_from(make()).count == 9
        return
    with pytest.raises(InputError, match=message):
        images_from(make())


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(UnknownNameError, match="did you mean 'picture'"):
        images_from(rows(), image="pictur")


def test_missing_labels_are_refused_and_the_image_is_named(model, tmp_path):
    pictures = [Scenes("test")[number].picture for number in range(3)]
    with pytest.raises(InputError, match=r"Expected the labels 'label' of every image; .* has none"):
        collect(model, [(pictures[0], 1), pictures[1]], tmp_path / "one")
    table = rows(2).add_column("age", [1, None])
    with pytest.raises(InputError, match="whole number as 'age' of row 1; got None"):
        collect(model, table, tmp_path / "two")
    store = collect(model, pictures, tmp_path / "none")
    with pytest.raises(UnknownNameError, match="no label 'label'"):
        store.labels("label")


def test_a_source_of_ones_own_is_taken_as_it_is():
    source = images_from(Scenes("test", size=2))
    assert isinstance(source, ImageSource)
    assert images_from(source) is source


# --- numbers that are none ------------------------------------------------------------------------------------------


def test_nan_pixels_are_refused_with_the_image(model, tmp_path):
    def preprocess(pictures):
        images = model.preprocess(pictures)
        return torch.where(images.mean((1, 2, 3), keepdim=True) > 1.5, torch.nan, images)

    pictures = [Image.new("RGB", (50, 50), colour) for colour in ("black", "white")]
    source = images_from(pictures)
    with pytest.raises(InputError, match=f"finite pixels; those of image '{source.read(1, 2)[0].id}'"):
        collect(model, source, tmp_path / "store", preprocess=preprocess)


def test_tensors_that_are_no_bytes_are_refused_even_if_unreadable_images_are_skipped(model, tmp_path):
    with pytest.raises(InputError, match="without its own"):
        collect(model, [torch.rand(3, 48, 48)], tmp_path / "store", unreadable="skip")


def test_nan_embeddings_are_refused_with_the_image(model, tmp_path):
    clip = perturb(build("clip")).requires_grad_(False)
    clip.visual.proj.fill_(torch.nan)
    with pytest.raises(InputError, match="finite embeddings; those of image 'test:0:0'"):
        collect(model, Scenes("test", size=2), tmp_path / "store", clip=clip)


def test_what_float16_cannot_hold_is_refused(tmp_path):
    model = tiny()
    model.original.norm.weight.fill_(1e5)
    with pytest.raises(InputError, match=r"contributions in torch.float16; those of image 'test:0:0'.*bfloat16"):
        collect(model, Scenes("test", size=2), tmp_path / "half", dtype=torch.float16)
    assert collect(model, Scenes("test", size=2), tmp_path / "whole", dtype=torch.bfloat16).count == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": ["contribution"]}, "Expected keep="),
        ({"keep": "embeddings"}, "Expected keep= as a list"),
        ({"keep": ["embeddings"]}, "expected clip="),
        ({"gather": Gather(cross=True)}, "Embeddings are a CLIP's"),
        ({"gather": Gather(top=1, directions=torch.ones(1, 5))}, "They are of another space"),
        ({"dtype": torch.int8}, "Expected dtype="),
        ({"batch_size": 0}, "batch_size= of at least 1"),
        ({"readers": 0}, "readers= of at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_made(model, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        collect(model, Scenes("test", size=2), tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_the_space_of_a_tower_alone_has_to_be_named(model, clip, tmp_path):
    with pytest.raises(InputError, match="space="):
        collect(model, Scenes("test", size=2), tmp_path / "store", clip=HookedViT(clip))
    store = collect(model, Scenes("test", size=2), tmp_path / "store", clip=HookedViT(clip), space="mine")
    store.check_space("mine")
    with pytest.raises(InputError, match="'mine'; got 'CLIP-64"):
        store.check_space(space_of(clip))


def test_a_model_that_does_not_preprocess_is_told_how(model, tmp_path):
    plain = model.original
    with pytest.raises(InputError, match="preprocess="):
        collect(plain, Scenes("test", size=2), tmp_path / "store")
    store = collect(plain, Scenes("test", size=2), tmp_path / "store", preprocess=model.preprocess, by="layer")
    assert store.count == 2


# --- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [1.0, 0.8])
def test_pictures_of_the_models_size_come_out_as_the_transform_makes_them(crop):
    model = tiny()
    model.original.pretrained_cfg = {**PREPROCESS, "crop_pct": crop, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    preprocessor = Preprocessor(model.preprocess)
    assert (preprocessor._table is not None) == (crop == 1.0)
    scenes = Scenes("train").scenes(range(3))
    wanted = model.preprocess([scene.picture for scene in scenes])
    other = Image.effect_noise((70, 60), 90).convert("RGB")
    for pictures in ([scene.image for scene in scenes], [scene.picture for scene in scenes]):
        assert torch.equal(preprocessor.batch([preprocessor.one(picture) for picture in pictures]), wanted)
        mixed = preprocessor.batch([preprocessor.one(picture) for picture in (pictures[0], other)])
        assert torch.equal(mixed, torch.cat([wanted[:1], model.preprocess([other])]))


def test_models_that_preprocess_alike_share_one_batch():
    scenes, other = images_from(Scenes("test", size=4)), tiny()
    other.original.pretrained_cfg = {**PREPROCESS, "mean": (0.4, 0.5, 0.6)}
    alike, differs = (Preprocessor(tiny().preprocess), Preprocessor(tiny().preprocess)), Preprocessor(other.preprocess)
    batch = next(Reader(scenes, 4, (*alike, differs), skip=False, threads=1).batches([0]))
    assert batch.images[1] is batch.images[0]
    assert torch.equal(batch.images[0], normalised(Scenes("test").images(range(4))))
    assert torch.equal(batch.images[2], other.preprocess([scene.picture for scene in Scenes("test").scenes(range(4))]))
    # Tables tell nothing of how transforms resample.
    nearest = tiny()
    nearest.original.pretrained_cfg = {**PREPROCESS, "interpolation": "nearest"}
    large = images_from([Image.effect_noise((70, 60), 90).convert("RGB")])
    both = (alike[0], Preprocessor(nearest.preprocess))
    assert both[1].takes_bytes_like(both[0])
    batch = next(Reader(large, 4, both, skip=False, threads=1).batches([0]))
    assert not torch.equal(batch.images[1], batch.images[0])


def test_scenes_are_drawn_once(monkeypatch):
    source, drawn, calls = images_from(Scenes("train", size=9)), Scenes.drawn, []
    monkeypatch.setattr(Scenes, "drawn", lambda self, rows: calls.append(list(rows)) or drawn(self, rows))
    samples = source.read(2, 6)
    assert calls == [[2, 3, 4, 5]]
    monkeypatch.undo()
    assert torch.equal(torch.stack([s.image for s in samples]), Scenes("train").images(range(2, 6)))
    for name in ("shape", "group"):
        assert [s.labels[name] for s in samples] == Scenes("train").labels(name, range(2, 6)).tolist()


# --- statistics -----------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is newly made."""

    def __init__(self, known):
        super().__init__()
        self.known, self.found = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self.known:
            self.found = max(self.found, made.untyped_storage().nbytes() // 8)
        return made


def test_cross_moments_are_joined_in_place():
    values, targets = torch.randn(20, 3, 40, dtype=torch.float64), torch.randn(3, 50, dtype=torch.float64)
    found = Gathered(20, 40, Gather(cross=True), 50)
    found.add(values, targets, first=0)
    with Largest([found.scatter]) as largest:
        found.add(values, targets, first=3)
    assert 0 < largest.found <= 20 * 3 * 40


def test_statistics_are_those_of_the_contributions(model, clip, tmp_path):
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    gather = Gather(covariance=True, cross=True, top=3, directions=directions)
    options = {"clip": clip, "batch_size": 8, "gather": gather}
    whole = collect(model, Scenes("test", size=21), tmp_path / "whole", **options)
    values, targets = whole.decomposition().values.double(), whole.embeddings().double()
    none = collect(model, Scenes("test", size=21), tmp_path / "none", keep=(), **options)
    assert sum(path.stat().st_size for path in (tmp_path / "none").glob("chunk-*")) < 10_000
    with pytest.raises(InputError, match="holds no contributions"):
        none.decomposition()
    for store in (whole, none):
        found = store.gathered
        assert found.count == 21
        centred = values - values.mean(1, keepdim=True)
        torch.testing.assert_close(found.mean, values.mean(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.covariance, centred.mT @ centred / 21, rtol=1e-4, atol=1e-7)
        crossed = centred.mT @ (targets - targets.mean(0)) / 21
        torch.testing.assert_close(found.cross, crossed, rtol=1e-4, atol=1e-7)
        scores = values[store.components.index(store.components[3])] @ directions[1].double()
        best = scores.topk(3)
        top = store.top_images(store.components[3].label, 1)
        assert [name for name, _ in top] == [f"test:0:{number}" for number in best.indices.tolist()]
        torch.testing.assert_close(torch.tensor([s for _, s in top]).double(), best.values, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnknownNameError, match="no component 'L1H9'"):
        whole.top_images("L1H9")
    with pytest.raises(InputError, match="no direction 2"):
        whole.top_images("L1H0", 2)


@pytest.mark.parametrize("cuts", [(0, 3, 40), (0, 1, 17, 40), (0, 40)])
def test_shards_merge_into_what_one_pass_gathers(cuts):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 40, 5, generator=generator, dtype=torch.float64) + 3
    values[:, 30] = values[:, 2]  # the same length twice: the first one comes first
    targets = torch.randn(40, 6, generator=generator, dtype=torch.float64) - 2
    gather = Gather(covariance=True, cross=True, top=7)
    shards = []
    for start, stop in pairwise(cuts):
        shard = Gathered(4, 5, gather, 6)
        for first in range(start, stop, 2):
            last = min(first + 2, stop)
            shard.add(values[:, first:last], targets[first:last], first=first)
        shards.append(shard)
    merged = Gathered(4, 5, gather, 6)
    for shard in reversed(shards):
        merged.merge(shard)
    centred, away = values - values.mean(1, keepdim=True), targets - targets.mean(0)
    for found, wanted in (
        (merged.mean, values.mean(1)),
        (merged.covariance, centred.mT @ centred / 40),
        (merged.cross, centred.mT @ away / 40),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    order = values.norm(dim=-1).sort(stable=True, descending=True, dim=-1)
    assert torch.equal(merged.top_numbers[:, 0], order.indices[:, :7])
    assert torch.equal(merged.top_scores[:, 0], order.values[:, :7])


def test_statistics_of_another_kind_do_not_merge():
    with pytest.raises(InputError, match="same kind to merge"):
        Gathered(2, 3, Gather(top=1)).merge(Gathered(2, 3, Gather(top=2)))
    with pytest.raises(InputError, match="Expected top="):
        Gather(directions=torch.ones(1, 3))
    empty = Gathered(2, 3, Gather())
    for name in ("covariance", "cross"):
        with pytest.raises(InputError, match="not gathered"):
            getattr(empty, name)


# --- scale ----------------------------------------------------------------------------------------------------------


def _peak_of(scenes, folder, queue):
    torch.set_num_threads(1)
    options = {"clip": build("clip").eval(), "dtype": torch.float16}
    collect(tiny(), Scenes("test", size=scenes), folder, **options)
    status = Path("/proc/self/status")
    kept = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if kept is not None:  # Linux counts what the parent had before this process was one as ru_maxrss
        queue.put(int(kept[1]) * 1024)
        return
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put(highest if sys.platform == "darwin" else highest * 1024)


@pytest.mark.sweep
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    spawn, peaks = multiprocessing.get_context("spawn"), []
    for scenes in (2_000, 20_000):
        queue = spawn.Queue()
        process = spawn.Process(target=_peak_of, args=(scenes, tmp_path / str(scenes), queue))
        process.start()
        peaks.append(queue.get(timeout=3000))
        process.join()
    assert peaks[1] - peaks[0] < 30e6


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from test_collect import Gather, Scenes, build, collect, perturb, tiny
clip = perturb(build("clip")).requires_grad_(False)
options = {"clip": clip, "batch_size": 8, "gather": Gather(covariance=True, top=2), "resume": True}
collect(tiny(), Scenes("test", size=100), sys.argv[1], **options)
"""


@pytest.mark.sweep
def test_two_processes_make_the_store_that_one_makes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, how in (("one", []), ("two", launched)):
        command = [sys.executable, *how, str(script), str(tmp_path / name)]
        subprocess.run(command, env=environment, check=True, timeout=600)
    one, two = Store.open(tmp_path / "one"), Store.open(tmp_path / "two")
    assert one.ids == two.ids
    assert one.count == 100
    torch.testing.assert_close(one.decomposition().values, two.decomposition().values, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.embeddings(), two.embeddings(), rtol=0, atol=1e-6)
    torch.testing.assert_close(one.gathered.covariance, two.gathered.covariance, rtol=1e-10, atol=1e-12)
    assert one.top_images("L1H0") == two.top_images("L1H0")
    assert len(list((tmp_path / "two").glob("gathered-*"))) == 2
    # One process goes on with what two have left.
    for number in (3, 4):
        (tmp_path / "two" / f"chunk-{number:06d}.safetensors").unlink()
    subprocess.run([sys.executable, str(script), str(tmp_path / "two")], env=environment, check=True, timeout=600)
    assert Store.open(tmp_path / "two").verify() == ()
    assert Store.open(tmp_path / "two").ids == one.ids
