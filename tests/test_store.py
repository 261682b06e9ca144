"""A store on disk: what is read is what was written, and damage is named."""

import json
import shutil
import zlib
from importlib.metadata import version

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_collect import break_off, clip, contents, model, tiny  # noqa: F401  (fixtures)

from vitdecomp_lens import storage
from vitdecomp_lens.collect import Gather, collect
from vitdecomp_lens.collecting.files import VERSION
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError
from vitdecomp_lens.store import Store
from vitdecomp_lens.testbed.scenes import Scenes


@pytest.fixture(scope="module")
def whole(model, clip, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("stores") / "whole"
    return collect(model, Scenes("test", size=14), folder, clip=clip, batch_size=4, gather=Gather(top=2))


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of a store, to be damaged."""
    return shutil.copytree(whole.path, tmp_path / "store")


def refusal(folder):
    with pytest.raises(StoreError) as caught:
        Store.open(folder)
    return str(caught.value)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [slice(None), slice(2, 11, 3), [5, 0, 13, 5], 7, -1, torch.arange(14) % 3 == 0])
def test_some_images_are_the_same_as_all_of_them_and_then_some(whole, images):
    parts, everything = whole.decomposition(images), whole.decomposition().images(images)
    assert torch.equal(parts.values, everything.values)
    assert torch.equal(parts.total, everything.total)
    assert parts.components == everything.components
    assert parts.metadata == everything.metadata
    assert parts.coverage == everything.coverage


def test_images_that_are_not_there_are_refused(whole):
    for images in ([14], [], slice(20, 30)):
        with pytest.raises(InputError):
            whole.decomposition(images)


def test_chunks_can_be_read_again_and_again(whole):
    first, second = list(whole.chunks()), list(whole.chunks())
    assert [len(targets) for _, targets in first] == [4, 4, 4, 2]
    for (values, targets), (again, targets_again) in zip(first, second, strict=True):
        assert torch.equal(values, again)
        assert torch.equal(targets, targets_again)
    assert torch.equal(torch.cat([targets for _, targets in first]), whole.embeddings())


def test_a_store_says_what_it_is(whole):
    assert "14 images in 4 chunks, contributions, representations, embeddings" in repr(whole)
    assert whole.manifest["asked"]["batch_size"] == 4
    assert whole.manifest["made_with"]["threads"] == torch.get_num_threads()
    assert whole.manifest["made_with"]["torch"] == version("torch")
    with pytest.raises(UnknownNameError, match="did you mean 'shape'"):
        whole.labels("shapes")
    with pytest.raises(InputError, match="Expected the space of the store's embeddings"):
        whole.check_space("another")
    with pytest.raises(InputError, match="no direction 1"):
        whole.top_images("L0H0", 1)


def test_what_was_not_kept_is_said(model, tmp_path):  # noqa: F811
    store = collect(model, Scenes("test", size=2), tmp_path / "store", keep=["representations"])
    for read in (store.decomposition, store.embeddings, lambda: next(store.chunks())):
        with pytest.raises(InputError, match="only representations"):
            read()
    assert store.representations().shape == (2, 32)
    with pytest.raises(InputError, match="Nothing was gathered"):
        assert store.gathered


# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_truncated_chunk_is_named(folder):
    break_off(folder / "chunk-000002.safetensors")
    store = Store.open(folder)
    for read in (store.decomposition, store.embeddings, lambda: store.ids, lambda: list(store.chunks())):
        with pytest.raises(StoreError, match=r"chunk-000002\.safetensors.*resume=True \(--resume on") as caught:
            read()
        assert ".save(path)" not in str(caught.value)
        assert str(caught.value).count("Delete it") == 1
    assert store.decomposition(slice(8)).values.shape[1] == 8
    (problem,) = store.verify()
    assert "chunk-000002.safetensors" in problem


def test_a_flipped_byte_is_named(folder):
    path = folder / "chunk-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    (problem,) = Store.open(folder).verify()
    assert "chunk-000001.safetensors" in problem
    assert "is not what was written" in problem


def test_a_missing_chunk_is_named_at_once(folder):
    (folder / "chunk-000003.safetensors").unlink()
    assert "chunk-000003.safetensors" in refusal(folder)


def test_chunks_that_changed_places_or_stores_are_named(folder, model, tmp_path):  # noqa: F811
    one, two = folder / "chunk-000000.safetensors", folder / "chunk-000001.safetensors"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    other = collect(model, Scenes("test", size=14), tmp_path / "other", batch_size=4, by="layer")
    shutil.copy(other.path / two.name, two)
    problems = Store.open(folder).verify()
    assert ["another store" in problem for problem in problems] == [True, True]
    one.write_bytes(content)
    assert len(Store.open(folder).verify()) == 1


def test_a_chunk_of_a_newer_version_is_named(folder):
    path = folder / "chunk-000000.safetensors"
    with safe_open(path, framework="pt") as file:
        text = file.metadata()[storage.FORMAT].partition(" ")[2]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = json.dumps({**json.loads(text), "version": storage.VERSION + 1})
    save_file(tensors, path, metadata={storage.FORMAT: f"{zlib.crc32(text.encode()):08x} {text}"})
    (problem,) = Store.open(folder).verify()
    assert f"it has version {storage.VERSION + 1}" in problem


@pytest.mark.parametrize("name", ["manifest.json", "complete.json"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-9], "cannot be read"),
        (lambda text: text.replace('"store', '"stare', 1).replace('"by": "head"', '"by": "layer"'), "is damaged"),
        (lambda text: text.replace(f'"version": {VERSION}', f'"version": {VERSION + 1}', 1), "it has version 2"),
        (lambda text: json.dumps({"format": "something else"}), "did not write it"),
        (lambda text: "[]", "did not write it"),
    ],
)
def test_a_wrong_manifest_is_named(folder, name, change, message):
    path = folder / name
    path.write_text(change(path.read_text()))
    said = refusal(folder)
    assert name in said or "it has version 2" in said
    assert message in said


def test_the_manifest_of_another_store_is_named(folder, model, tmp_path):  # noqa: F811
    other = collect(model, Scenes("test", size=14), tmp_path / "other", batch_size=4, by="layer")
    shutil.copy(other.path / "manifest.json", folder)
    assert "The manifest.json of the store" in refusal(folder)
    shutil.copy(other.path / "complete.json", folder)
    assert len(Store.open(folder).verify()) == 4


def test_statistics_of_another_store_are_named(folder, model, tmp_path):  # noqa: F811
    other = collect(model, Scenes("test", size=4), tmp_path / "other", batch_size=4, gather=Gather(top=2))
    shutil.copy(other.path / "gathered-0000.safetensors", folder / "gathered-0001.safetensors")
    store = Store.open(folder)
    with pytest.raises(StoreError, match="belongs to another store"):
        assert store.gathered
    assert len(store.verify()) == 1
    shutil.copy(folder / "gathered-0000.safetensors", folder / "gathered-0001.safetensors")
    assert "every chunk once" in Store.open(folder).verify()[0]


def test_what_is_no_store_is_said(tmp_path, folder):
    assert "there is no manifest.json" in refusal(tmp_path / "nowhere")
    assert "there is no manifest.json" in refusal(tmp_path)
    (folder / "complete.json").unlink()
    assert "unfinished: 4 chunks are there" in refusal(folder)


def test_nothing_of_a_store_is_pickled(whole):
    for name, content in contents(whole.path).items():
        assert name.endswith((".json", ".safetensors"))
        assert b"PK\x03\x04" not in content[:4]
