"""The documentation is true: its code runs, and it names every public name."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

import vitdecomp_lens

ROOT = Path(vitdecomp_lens.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = (
    "applications.ablation",
    "applications.heatmap",
    "applications.repair",
    "applications.retrieval",
    "clip",
    "cumulative",
    "interpret",
    "interpret.comparing",
    "intervene",
    "linear_classifier",
    "report",
    "testbed",
    "testbed.planted",
    "viz",
)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_every_block_of_python_on_a_page_runs(page):
    names = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs(example, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(example)])
    exec(compile(example.read_text(), str(example), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    for name in vitdecomp_lens.__all__:
        assert f"`{name}`" in reference, name
        assert getattr(vitdecomp_lens, name).__doc__, name


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_of_a_module_is_in_the_reference(module):
    code = " ".join(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "reference.md").read_text()))
    names = import_module(f"vitdecomp_lens.{module}").__all__
    assert not [name for name in names if not re.search(rf"\b{name}\b", code)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
