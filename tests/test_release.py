"""What is released: files, types, metadata; and that importing it is cheap and silent."""

import email
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
import typing
import zipfile
from pathlib import Path

import pytest

import vitdecomp_lens

ROOT = Path(vitdecomp_lens.__file__).parent.parent
CARRIED = {
    "py.typed",
    "report/page.css",
    "report/page.html",
    "report/page.js",
    "testbed/weights/clip.safetensors",
    "testbed/weights/deit.aligner.safetensors",
    "testbed/weights/deit.safetensors",
    "testbed/weights/manifest.json",
}
# What `transformer_lens` has not imported already, and ours may: small, or of Python itself.
MAY_IMPORT = {"vitdecomp_lens", "PIL", "rich", "safetensors"}
HEAVY = {"timm", "open_clip", "torchvision", "matplotlib", "faiss", "sklearn", "scipy"}


def built(source, folder, *targets):
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run([*command, *(option for target in targets for option in ("-t", target))], cwd=source, check=True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    built(ROOT, folder, "sdist")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that is built from the source distribution, as an installer builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    built(sdist, folder, "wheel")
    (archive,) = folder.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder)
    return folder


def python(code, *options, folder=ROOT):
    """What a new interpreter prints that finds the package in a folder."""
    path = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    run = subprocess.run(
        [sys.executable, *options, "-c", path + code], capture_output=True, text=True, cwd=Path(sys.prefix)
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def of_the_package(folder):
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_carries_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    version = vitdecomp_lens_version()
    info = f"vitdecomp_lens-{version}.dist-info"
    around = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    package = {name for name in names if name.startswith("vitdecomp_lens/")}
    assert names - package == around
    assert {name.removeprefix("vitdecomp_lens/") for name in package} == of_the_package(ROOT / "vitdecomp_lens")
    assert {f"vitdecomp_lens/{name}" for name in CARRIED} <= package


def test_every_weight_of_the_manifest_is_in_the_wheel(installed):
    folder = installed / "vitdecomp_lens" / "testbed" / "weights"
    listed = set(re.findall(r"[\w.]+\.safetensors", json.dumps(json.loads((folder / "manifest.json").read_text()))))
    listed |= {f"{path.name.split('.')[0]}.safetensors" for path in folder.glob("*.aligner.safetensors")}
    assert listed
    assert listed <= {path.name for path in folder.iterdir()}


def test_the_source_distribution_has_tests_and_documentation(sdist):
    names = {path.name for path in sdist.iterdir()}
    assert names >= {"vitdecomp_lens", "tests", "docs", "examples", "benchmarks", "pyproject.toml", "README.md"}
    assert names >= {"CHANGELOG.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md"}


def test_the_wheel_runs_where_it_is_installed(installed):
    code = """
import vitdecomp_lens, torch
from vitdecomp_lens import decompose, testbed
assert vitdecomp_lens.__file__.startswith(sys.path[0])
model = testbed.load("clip")
parts = decompose(model, torch.zeros(1, 3, *model.image_spec.size), by="head")
print(type(model).__name__, float(parts.gap.max()) < 1e-5)
"""
    assert python(code, folder=installed).split() == ["HookedViT", "True"]


def vitdecomp_lens_version():
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def test_the_metadata_says_what_the_project_says(wheel):
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(files.read(name))
    assert metadata["Version"] == vitdecomp_lens_version()
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert f"## {metadata['Version']}" in (ROOT / "CHANGELOG.md").read_text()
    cited = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {metadata['Version']}\n" in cited
    assert "\ncff-version: 1.2.0\n" in "\n" + cited
    assert "arxiv" in cited.lower()
    assert "2406.01583" in cited


def test_lowest_versions_are_those_that_the_page_says_were_tried():
    needed = re.search(
        r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )[1]
    page = (ROOT / "docs" / "versions.md").read_text()
    for name, lowest in re.findall(r'"([\w-]+)>=([\d.]+)', needed):
        assert re.search(rf"^\| {name} \| {re.escape(lowest)} \|", page, re.MULTILINE), name


# Importing -----------------------------------------------------------------------------------------------------------


def test_importing_adds_nothing_heavy_to_what_transformer_lens_imports():
    code = """
import transformer_lens
known = set(sys.modules)
import vitdecomp_lens
print(*{name.split(".")[0] for name in set(sys.modules) - known})
"""
    added = set(python(code).split())
    assert "vitdecomp_lens" in added
    assert not added & HEAVY
    assert added - set(sys.stdlib_module_names) - MAY_IMPORT == set()


def test_importing_takes_little_of_the_time_that_transformer_lens_takes():
    """A twentieth of it or so; measured in processor time, with room for a machine that is busy."""
    code = """
import time
start = time.process_time()
import transformer_lens
middle = time.process_time()
import vitdecomp_lens
print((time.process_time() - middle) / (middle - start))
"""
    assert min(float(python(code)) for _ in range(2)) < 0.25


def test_importing_is_silent():
    assert python("import vitdecomp_lens", "-W", "error") == ""


def test_the_two_main_ways_are_silent():
    """A model of timm by heads, and a CLIP of open_clip by tokens."""
    code = """
import torch
from vitdecomp_lens import HookedViT, attribute_tokens, decompose
torch.manual_seed(0)
vit = HookedViT.from_timm("test_vit", num_classes=5)
decompose(vit, torch.randn(1, 3, 160, 160), by="head").gap.max()
from vitdecomp_lens import testbed
clip = testbed.load("clip")
attribute_tokens(clip, torch.randn(1, 3, *clip.image_spec.size), torch.randn(2, clip.W_U.shape[1]))
"""
    assert python(code, "-W", "error") == ""


# Types ---------------------------------------------------------------------------------------------------------------


TYPED = """
import torch

from vitdecomp_lens import (
    Attribution, Component, Decomposition, HookedViT, TokenAttribution, TokenGrid, attribute, attribute_tokens,
    decompose, verify,
)

images = torch.randn(1, 3, 160, 160)
model = HookedViT.from_timm("test_vit")
reveal_type(model)
reveal_type(model.token_grid(images))
reveal_type(model.preprocess([]))
parts = decompose(model, images, by="head")
directions = torch.randn(2, parts.values.shape[-1])
reveal_type(parts)
reveal_type(parts.values)
reveal_type(parts.components)
reveal_type(parts.gap)
reveal_type(parts["L0H1"])
reveal_type(parts.select(kind="head"))
reveal_type(attribute(model, images, directions))
reveal_type(attribute_tokens(model, images, directions))
reveal_type(verify(model).failures)
"""
REVEALED = (
    "vitdecomp_lens.hooked.model.HookedViT",
    "vitdecomp_lens.components.TokenGrid",
    "torch._tensor.Tensor",
    "vitdecomp_lens.decomposition.Decomposition",
    "torch._tensor.Tensor",
    "tuple[vitdecomp_lens.components.Component, ...]",
    "torch._tensor.Tensor | None",
    "torch._tensor.Tensor",
    "vitdecomp_lens.decomposition.Decomposition",
    "vitdecomp_lens.decomposition.Attribution",
    "vitdecomp_lens.tokens.TokenAttribution",
    "tuple[str, ...]",
)


def public_functions():
    """Every function and method of a public name that is written here."""
    for name in vitdecomp_lens.__all__:
        thing = getattr(vitdecomp_lens, name)
        for key, member in vars(thing).items() if inspect.isclass(thing) else [("", thing)]:
            for inside in ("fget", "func", "__func__"):  # of properties, cached ones, class methods
                member = getattr(member, inside, member)
            here = inspect.isfunction(member) and member.__module__.startswith("vitdecomp_lens")
            if here and (not key.startswith("_") or key == "__getitem__"):
                yield pytest.param(member, id=f"{name}.{key}".rstrip("."))


@pytest.mark.parametrize("function", list(public_functions()))
def test_every_argument_and_return_of_a_public_name_has_a_type(function):
    hints = typing.get_type_hints(function)
    taken = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    assert set(taken) - hints.keys() == set()
    assert "return" in hints


@pytest.mark.sweep  # mypy reads timm and torch first: about a minute
def test_a_script_of_a_user_is_typed_strictly(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "--follow-imports=silent"]
    run = subprocess.run([*command, str(script)], cwd=tmp_path, capture_output=True, text=True, env=_with_package())
    revealed = re.findall(r'Revealed type is "([^"]+)"', run.stdout)
    assert tuple(_plain(name) for name in revealed) == REVEALED, run.stdout
    assert not re.search(r": error:", run.stdout), run.stdout


def _plain(name):
    return re.sub(r"^Union\[(.*), None\]$", r"\1 | None", name.replace("builtins.", ""))


def _with_package():
    return {**os.environ, "MYPYPATH": str(ROOT)}
