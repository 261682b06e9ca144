"""Laws of files: store then load is identity, and a damaged file is an error and never a wrong number."""

import dataclasses
import json
import os
import pickle
import zlib

import pytest
import torch
from labelled_samples import COMPONENTS, COVERAGE, KINDS, assert_same, sample
from safetensors.torch import save_file

from vitdecomp_lens import storage
from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Attribution, Decomposition
from vitdecomp_lens.errors import InputError, StoreError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "parts.safetensors"


@pytest.fixture
def stored(path):
    """The bytes of a stored decomposition."""
    sample(coverage=COVERAGE).save(path)
    return path.read_bytes()


def refusal(path, kind=Decomposition):
    with pytest.raises(StoreError) as caught:
        kind.load(path)
    return str(caught.value)


# ---- identity


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@KINDS
def test_store_then_load_is_identity(path, kind, dtype):
    names = {"directions": ("dög", "犬", "a b", "d", "e")} if kind is Attribution else {}
    metadata = {"model": "tiny ünïcode", "size": [8, 8], "nested": {"share": 0.1, "none": None}}
    parts = sample(kind=kind, dtype=dtype, coverage=COVERAGE, metadata=metadata, complete=False, **names)
    parts.save(path)
    assert_same(kind.load(path), parts)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: dataclasses.replace(p, total=None),
        lambda p: p.images([]),
        lambda p: dataclasses.replace(p, values=p.values.transpose(0, 1).contiguous().transpose(0, 1)),
        lambda p: dataclasses.replace(p, values=p.values[:, :1].expand(-1, 3, -1)),
        lambda p: dataclasses.replace(p, total=p.values[3]),
        lambda p: dataclasses.replace(p, values=p.values.clone().requires_grad_()),
        lambda p: p.select(labels="embed"),
        lambda p: dataclasses.replace(p, values=p.values[:0], components=()),
        lambda p: dataclasses.replace(p, values=p.values * torch.nan),
    ],
    ids=["no total", "no images", "strided", "expanded", "shared", "live", "view", "no components", "nan"],
)
def test_any_layout_is_stored_as_it_reads(path, change):
    parts = change(sample())
    parts.save(path)
    loaded = Decomposition.load(path)
    torch.testing.assert_close(loaded.values, parts.values.detach(), atol=0, rtol=0, equal_nan=True)
    assert (loaded.total is None) == (parts.total is None)
    assert parts.total is None or torch.equal(loaded.total, parts.total)
    assert loaded.labels == parts.labels


def test_components_come_back_whole_and_not_only_their_labels(path):
    components = (
        Component("source", 3, name="blocks.3.gelü → 犬"),
        Component("constant", 2, name="blocks.2.attn.proj.bias"),
        Component("intervention", name="blocks.0.attn.hook_z"),
        Component("pool", name="attn_pool.mlp"),
    )
    Decomposition(torch.ones(4, 1, 2), components).save(path)
    assert Decomposition.load(path).components == components


def test_the_same_values_give_the_same_bytes(path, stored):
    sample(coverage=COVERAGE).save(path)
    assert path.read_bytes() == stored


def test_writing_leaves_nothing_but_the_file(path, stored):
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_what_was_there(path, stored, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError) as caught:
        sample(seed=1).save(path)
    assert str(caught.value) == (
        f"Could not write {path}: no space left on device. Expected a folder that exists, with room and the right to "
        f"write."
    )
    assert path.read_bytes() == stored
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"Expected a folder that exists"):
        sample().save(tmp_path / "nowhere" / "parts.safetensors")


def test_a_header_that_json_cannot_hold_is_refused(path):
    with pytest.raises(InputError, match=r"^Expected a header that JSON can hold .* Store tensors beside it"):
        storage.write(path, kind="Bank", tensors={}, header={"texts": {1, 2}})
    assert not path.exists()


# ---- damage


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(path, stored, share):
    path.write_bytes(stored[: int(len(stored) * share)])
    message = refusal(path)
    assert message.startswith(f"Expected a stored Decomposition at {path}; it is damaged, half-written, or not a")
    assert message.endswith("Write it again with .save(path).")


def test_random_bytes_are_refused(path):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        path.write_bytes(bytes(torch.randint(256, (1000,), generator=generator, dtype=torch.uint8).tolist()))
        assert refusal(path).startswith(f"Expected a stored Decomposition at {path}; it")


def test_a_changed_byte_anywhere_is_refused_or_changes_nothing(path, stored):
    intact = Decomposition.load(path)
    refused = 0
    for position in range(0, len(stored), 7):
        path.write_bytes(stored[:position] + bytes([stored[position] ^ 1]) + stored[position + 1 :])
        try:
            loaded = Decomposition.load(path)
        except StoreError:
            refused += 1
        else:  # JSON has spaces that mean nothing
            assert_same(loaded, intact)
    assert refused >= 0.9 * len(range(0, len(stored), 7))


@pytest.mark.parametrize("protocol", [None, 0, 2, 4, 5])
def test_a_pickled_file_is_never_opened(path, protocol, tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "opened"),))

    if protocol is None:
        torch.save({"values": torch.ones(2), "payload": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(), protocol=protocol))
    message = refusal(path)
    assert not (tmp_path / "opened").exists()
    if protocol != 0:  # the oldest protocol is plain text without a mark
        assert message == (
            f"Expected a stored Decomposition at {path}; it looks like a pickled or zipped file, which is never "
            f"opened, because unpickling runs code. Load it yourself if you trust it, and write it with .save(path)."
        )


def test_a_file_of_another_kind_is_named(path):
    sample(kind=Attribution).save(path)
    assert refusal(path) == (
        f"Expected a stored Decomposition at {path}; it holds another kind. Use Attribution.load(path)."
    )


def test_a_chunk_of_a_store_is_no_file_of_its_own(path):
    storage.write(path, kind="chunk of a store", tensors={"values": torch.zeros(1)}, header={})
    assert refusal(path) == (
        f"Expected a stored Decomposition at {path}; it holds a chunk of a store. Name the store's folder instead, "
        f"which Store(folder) opens."
    )


def test_a_safetensors_file_of_others_is_named(path):
    save_file({"values": torch.ones(2, 1, 3)}, path)
    assert refusal(path) == (
        f"Expected a stored Decomposition at {path}; it is a safetensors file that this package did not write. "
        f"Read its tensors with safetensors, and build a Decomposition from them."
    )


def test_a_missing_file_and_a_folder_are_named(path, tmp_path):
    for absent in (path, tmp_path):
        assert refusal(absent) == (
            f"Expected a stored Decomposition at {absent}; there is no such file. Write one with .save(path)."
        )


def forged(path, *, tensors=None, checksums=None, version=1, header=None):
    """A file with a true checksum of its header, and whatever else."""
    tensors = {"values": torch.ones(14, 1, 2)} if tensors is None else tensors
    if header is None:
        header = storage.pack(complete=True, coverage=None, metadata={})
        header["components"] = storage.pack_components(COMPONENTS)
    if checksums is None:
        checksums = {name: zlib.crc32(tensor.numpy().tobytes()) for name, tensor in tensors.items()}
    text = json.dumps({"kind": "Decomposition", "version": version, "crc32": checksums, "header": header})
    save_file(tensors, path, metadata={"vitdecomp_lens": f"{zlib.crc32(text.encode()):08x} {text}"})


@pytest.mark.parametrize(
    ("forgery", "what"),
    [
        ({"tensors": {"total": torch.ones(1, 2)}}, "the tensor 'values' is missing"),
        ({"checksums": {"values": 0}}, "the tensor 'values' is not what was written"),
        ({"checksums": {}}, "the tensor 'values' is not what was written"),
        ({"header": {}}, "its parts do not fit ('components')"),
        (
            {"tensors": {"values": torch.ones(3, 1, 2)}},
            "its parts do not fit (Expected a component for each of the 3 rows of values (axis 0); got 14 components.)",
        ),
    ],
)
def test_parts_that_are_missing_or_do_not_fit_are_named(path, forgery, what):
    forged(path)
    assert len(Decomposition.load(path)) == 14
    forged(path, **forgery)
    assert refusal(path) == (
        f"Expected a stored Decomposition at {path}; it is damaged: {what}. Write it again with .save(path)."
    )


def test_a_changed_header_is_named(path, stored):
    path.write_bytes(stored.replace(b"norm.bias", b"form.bias"))
    assert refusal(path) == (
        f"Expected a stored Decomposition at {path}; it is damaged: its header is not what was written. "
        f"Write it again with .save(path)."
    )


def test_a_newer_version_is_named(path):
    forged(path, version=2)
    assert refusal(path) == (
        f"Expected a stored Decomposition of version 1 or older at {path}; it has version 2. "
        f"Read it with a newer vitdecomp_lens."
    )


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_may_be_read_by_whoever_may_read_other_new_files(tmp_path, mask):
    before = os.umask(mask)
    try:
        sample().save(tmp_path / "parts")
        (tmp_path / "other").touch()
        sample(seed=1).save(tmp_path / "parts")  # written over
    finally:
        os.umask(before)
    assert (tmp_path / "parts").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "parts"]
