"""The site builds without a warning, its links lead somewhere, and every public name is in its API reference."""

import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_docs import MODULES

import vitdecomp_lens

for _module in ("sphinx", "myst_parser", "furo", "latex2mathml"):
    pytest.importorskip(_module, reason="the site needs the docs extra: pip install 'vitdecomp-lens[docs]'")

DOCS = Path(vitdecomp_lens.__file__).parent.parent / "docs"
DOCUMENTED = [
    module
    for page in sorted((DOCS / "api").glob("*.md"))
    for module in re.findall(r"automodule:: (\S+)", page.read_text())
]


class Page(HTMLParser):
    """What a page of HTML links to, and what can be linked to in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.loaded = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors.update(values[key] for key in ("id", "name") if key in values)
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        loads = {"img": "src", "script": "src", "link": "href"}.get(tag)
        if loads and values.get(loads):
            self.loaded.add(values[loads])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, by path."""
    out = tmp_path_factory.mktemp("site")
    # In a process of its own: the type checks of the tests would stand in signatures.
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(out / "html")]
    built = subprocess.run([*command, "-d", str(out / "doctrees")], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return {path: Page(path.read_text()) for path in sorted((out / "html").rglob("*.html"))}


def test_every_link_leads_somewhere(site):
    assert len(site) > 30
    lost = []
    for path, page in site.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = target.exists()
            if known and parts.fragment and target in site:
                known = unquote(parts.fragment) in site[target].anchors
            if not known:
                lost.append((path.name, link))
    assert not lost


def test_nothing_is_loaded_from_elsewhere(site):
    for path, page in site.items():
        assert not [one for one in page.loaded if urlsplit(one).netloc], path


def test_formulas_are_mathml(site):
    (concepts,) = (path for path in site if (path.parent.name, path.name) == ("html", "concepts.html"))
    text = concepts.read_text()
    assert text.count("<math") > 20
    assert "$" not in re.sub(r"<(script|pre)\b.*?</\1>", "", text, flags=re.DOTALL)


def public(module):
    """The names that a module offers: those of ``__all__``, or what is defined there."""
    found = import_module(module)
    offered = getattr(found, "__all__", None)
    if offered is None:
        offered = [name for name, value in vars(found).items() if getattr(value, "__module__", None) == module]
    values = {name: getattr(found, name) for name in offered if not name.startswith("_")}
    return [name for name, value in values.items() if inspect.isclass(value) or inspect.isroutine(value)]


def test_every_public_name_is_in_the_api_reference(site):
    anchors = set().union(*(page.anchors for path, page in site.items() if path.parent.name == "api"))
    short = {anchor.rpartition(".")[2] for anchor in anchors if anchor.startswith("vitdecomp_lens.")}
    for module in DOCUMENTED:
        missing = [name for name in public(module) if f"{module}.{name}" not in anchors and name not in short]
        assert not missing, (module, missing)
    for name in vitdecomp_lens.__all__:
        assert f"vitdecomp_lens.{name}" in anchors


def test_every_public_module_is_in_the_api_reference():
    names = {f"vitdecomp_lens.{module}" for module in MODULES} - {"vitdecomp_lens.interpret.comparing"}
    assert {"vitdecomp_lens", *names} <= set(DOCUMENTED)  # what is left out, interpret offers, too
    whole, part = (import_module(f"vitdecomp_lens.interpret{name}").__all__ for name in ("", ".comparing"))
    assert set(part) <= set(whole)
