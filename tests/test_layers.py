"""Imports go one way."""

import ast
from pathlib import Path

import vitdecomp_lens

ROOT = Path(vitdecomp_lens.__file__).parent
# Lowest first. A module may import from layers below its own; a package's modules, from each other too.
LAYERS = (
    {"errors"},
    {"components"},
    {"coverage"},
    {"selecting", "storage"},
    {"gap"},
    {"labelled"},
    {"decomposition"},
    {"token_block"},
    {"tokens"},
    {"points"},
    {"frozen"},
    {"hooked"},
    {"capture", "decomposable"},
    {"request"},
    {"token_maps"},
    {"decompose"},
    {"certificate"},
    {"measures"},
    {"verify"},
    {"class_names", "weights"},
    {"explanation"},
    {"pictures"},
    {"explain"},
    {"cli"},
    {"__main__"},
)
FROZEN = (
    "fingerprint",
    "rules",
    "walk",
    "replay",
    "compiled",
    "pairs",
    "adjoints",
    "program",
    "slow",
    "graph",
    "trace",
)


def imports(path):
    """Top-level imports of a file, and those within its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(module):
    return next((n for n, layer in enumerate(LAYERS) if module in layer), None)


def test_a_module_imports_only_from_layers_below_it():
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts == ("__init__",):
            continue
        assert place(parts[0]) is not None, f"{parts[0]} stands in no layer"
        for name in imports(path):
            if not name.startswith("vitdecomp_lens."):
                continue
            other = name.split(".")[1]
            if other == parts[0] or place(other) is None:
                continue
            assert place(other) < place(parts[0]), f"{'.'.join(parts)} imports {name}"


def test_the_physics_knows_nothing_of_models():
    for path in (ROOT / "frozen").glob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] not in ("timm", "open_clip"), f"{path.name} imports {name}"


def test_within_the_physics_imports_go_one_way_too():
    for path in (ROOT / "frozen").glob("*.py"):
        if path.stem == "__init__":
            continue
        mine = FROZEN.index(path.stem)
        for name in imports(path):
            if name.startswith("vitdecomp_lens.frozen."):
                other = name.split(".")[2]
                assert FROZEN.index(other) < mine, f"{path.stem} imports {other}"
