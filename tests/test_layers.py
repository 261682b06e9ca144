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
    {"weights"},
    {"hooked"},
    {"capture", "decomposable"},
    {"traced"},
    {"foreign"},
    {"request"},
    {"token_maps"},
    {"decompose"},
    {"second_order"},
    {"certificate"},
    {"measures"},
    {"verify"},
    {"class_names"},
    {"explanation", "patch_maps"},
    {"pictures"},
    {"explain"},
    {"intervening"},
    {"intervene"},
    {"clip"},
    {"collecting"},
    {"store"},
    {"collect"},
    {"interpret"},
    {"class_match"},
    {"linear_classifier"},
    {"cumulative"},
    {"applications"},
    {"viz"},
    {"report"},
    {"testbed"},
    {"evaluation"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
# Lowest first. A folder's ``__init__`` stands above its files: none of them may import from the folder itself.
FROZEN = (
    "fingerprint",
    "rules",
    "walk",
    "replay",
    "compiled",
    "pairs",
    "branches",
    "adjoints.registry",
    "adjoints.moves",
    "adjoints.sums",
    "adjoints.slices",
    "adjoints.attention",
    "adjoints.products",
    "adjoints.norms",
    "adjoints.derived",
    "adjoints.__init__",
    "program",
    "hops",
    "slow",
    "graph",
    "exported",
    "unfolded",
    "kept",
    "trace",
    "places",
)

# Lowest first: what siblings in ``interpret`` share. All else there, a file or a folder, is a sibling.
SHARED = (
    "statistics",
    "readings",
    "moments",
    "pursuit",
    "vectors",
    "feature_scores",
    "scoring",
    "concepts",
)
# What runs a model.
RUN_MODELS = tuple(
    f"vitdecomp_lens.{name}" for name in ("hooked", "decompose", "explain", "verify", "interven", "collect")
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
    for path in (ROOT / "frozen").rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] not in ("timm", "open_clip"), f"{path.name} imports {name}"


def files_of_the_physics():
    """The files under ``frozen/``, by their names in `FROZEN`."""
    paths = {path.relative_to(ROOT / "frozen"): path for path in (ROOT / "frozen").rglob("*.py")}
    return {".".join(short.with_suffix("").parts): path for short, path in paths.items() if str(short) != "__init__.py"}


def defining(name):
    """The file of `FROZEN` that an imported name stands in; for a folder's own names, its ``__init__``."""
    first, second = [*name.split(".")[2:], ""][:2]
    places = (f"{first}.{second}", first, f"{first}.__init__")
    return next((place for place in places if place in FROZEN), first)


def imports_within_the_physics(path):
    return {defining(name) for name in imports(path) if name.startswith("vitdecomp_lens.frozen.")}


def test_the_order_of_the_physics_names_its_files():
    assert sorted(FROZEN) == sorted(files_of_the_physics())


def test_within_the_physics_imports_go_one_way_too():
    for mine, path in files_of_the_physics().items():
        for other in imports_within_the_physics(path):
            if other == mine and mine.endswith("__init__"):
                continue  # ``from folder import file`` in the folder's own ``__init__`` names the folder as well
            assert FROZEN.index(other) < FROZEN.index(mine), f"{mine} imports {other}"


def test_whoever_imports_the_adjoints_has_all_of_them():
    files = files_of_the_physics()
    of_the_folder = {name for name in files if name.startswith("adjoints.")}
    assert of_the_folder <= imports_within_the_physics(files["adjoints.__init__"])


def siblings_of_interpretation():
    """The files of ``interpret``, each with the name of the file or folder there that it belongs to."""
    folder = ROOT / "interpret"
    paths = [path for path in folder.rglob("*.py") if path != folder / "__init__.py"]
    return [(path.relative_to(folder).with_suffix("").parts[0], path) for path in paths]


def test_ways_to_interpret_import_only_what_they_share():
    names = {mine for mine, _ in siblings_of_interpretation()}
    assert set(SHARED) < names
    for mine, path in siblings_of_interpretation():
        below = SHARED[: SHARED.index(mine)] if mine in SHARED else SHARED
        for name in imports(path):
            if name.startswith("vitdecomp_lens.interpret."):
                assert name.split(".")[2] in {mine, *below}, f"{path.name} imports {name}"


def test_interpretation_runs_no_model():
    for _, path in siblings_of_interpretation():
        for name in imports(path):
            assert not name.startswith(RUN_MODELS), f"{path.name} imports {name}"
