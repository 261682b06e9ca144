"""The documentation is true: its code runs, and it names every public name."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import vitdecomp_lens
from vitdecomp_lens.frozen.adjoints import ADJOINTS
from vitdecomp_lens.frozen.rules import RULES
from vitdecomp_lens.hooked import registry

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


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def registers_of_a_page():
    """What a page registers ends with it: other tests know models and operations without."""
    before = [(register, set(register)) for register in (RULES, ADJOINTS, registry._ADAPTERS)]
    yield
    for register, known in before:
        for name in register.keys() - known - registry._BUILT_IN.keys():
            del register[name]


@pytest.mark.usefixtures("registers_of_a_page")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_every_block_of_python_on_a_page_runs(page):
    names = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


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
