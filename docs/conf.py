"""How the documentation site is built: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``.

Pages are Markdown that reads well on a forge, too: links between them are links to files, formulas are dollar signs.
Formulas become MathML, so that the site needs no network.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
SHOWN = {"overview": "README.md", "changelog": "CHANGELOG.md"}

project = "vitdecomp_lens"
author = "the authors of vitdecomp_lens"
release = version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]

autodoc_default_options = {
    "members": True,
    "inherited-members": "HookedRootModule, Module, BaseException, Protocol, Dataset, tuple",
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"vitdecomp_lens {release}"
html_math_renderer = "mathml"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]


def inline_formula(translator: Any, node: nodes.math) -> None:
    """Write a formula within a sentence."""
    translator.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def displayed_formula(translator: Any, node: nodes.math_block) -> None:
    """Write a formula on a line of its own."""
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def without_factories(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any) -> Any:
    """Write the defaults of fields that are made anew as an ellipsis, so that the signature can be parsed."""
    return signature and signature.replace("<factory>", "..."), returns


def readable_types(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Write types of fields without their modules; the asterisks of variadic axes are no emphasis."""
    for number, line in enumerate(lines):
        if line.startswith(":vartype"):
            lines[number] = re.sub(r"\b(jaxtyping|collections\.abc)\.", "", line).replace("*", r"\*")


def pages_of_the_root(app: Sphinx, name: str, source: list[str]) -> None:
    """Show README and changelog as pages of the site, and lead links to them there."""
    if name in SHOWN:
        path = ROOT / SHOWN[name]
        app.env.note_dependency(str(path), docname=name)
        text = re.sub(r"\]\((?!https?:|#)(?!docs/)", "](../", path.read_text())
        source[0] = text.replace("](docs/", "](")
    for page, path in SHOWN.items():
        source[0] = source[0].replace(f"](../{path}", f"]({page}.md")


def setup(app: Sphinx) -> dict[str, bool]:
    """Add what is particular to this site."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.connect("source-read", pages_of_the_root)
    app.connect("autodoc-process-signature", without_factories)
    app.connect("autodoc-process-docstring", readable_types, priority=900)  # after napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
