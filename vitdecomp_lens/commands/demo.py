"""``vitdecomp-lens demo``: the whole way, on drawn scenes, offline, in about a minute. It can be read as a tour.

Scenes are drawn, so that it is known what is in them. ``deit`` is a small classifier of them that never saw a text,
``clip`` a small CLIP; both come with the package. Components are scored and read, and numbers of them chosen, on
validation scenes; what that is worth is measured on others.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vitdecomp_lens.applications import heatmap, repair, retrieval
from vitdecomp_lens.certificate import TOLERANCES
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.commands.models import positive
from vitdecomp_lens.commands.showing import tables
from vitdecomp_lens.commands.writing import check_folder, unwritable
from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import printable
from vitdecomp_lens.interpret import FeatureScores, score_features, text_span
from vitdecomp_lens.linear_classifier import LinearClassifier
from vitdecomp_lens.pictures import INSTALL, can_draw, save_figure
from vitdecomp_lens.report import report
from vitdecomp_lens.viz import component_feature_matrix, heatmap_overlays

PAGE = "report.html"
FEWEST = 50  # scenes: with fewer, some colour or group may be in none of them
FEATURES = ("shape", "colour", "background")
SHOWN, DRAWN, REFERENCE = 6, 3, 300  # scenes in the report, on the picture, and read for the report's words, at most


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="the whole way in a minute: decompose, align, interpret, score, retrieve, segment, repair, report",
        description="Show on drawn scenes, with small trained models that come with the package, what can be done: "
        "offline, in about a minute. Writes a page to look at (report.html) and pictures.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where to (demo)")
    parser.add_argument("--size", type=positive, default=500, metavar="N", help="scenes of each kind (500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the scenes, and of all chance (0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Take all steps, and show what came of each."""
    check_folder(options.out, "--out")
    if options.size < FEWEST:
        raise InputError(f"Expected --size of at least {FEWEST} scenes; got {options.size}.")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(options.out, error) from error
    with _one_thread():
        tables().print(_steps(options, errors))
    if not can_draw():
        errors.print(Text(INSTALL), soft_wrap=True)
    page = printable(str(options.out / PAGE))
    tables().print(Text(f"Now open {page} in a browser. Pictures lie beside it."), soft_wrap=True)
    return 0


def _steps(options: argparse.Namespace, errors: Console) -> Table:
    """All of them, one after the other."""
    table = Table("step", "what", "value", "held against")
    with _timed(errors, "Load two trained models, an aligner, and texts."):
        world = World(options.size, options.seed, options.out)
    for number, step in enumerate(STEPS, start=1):
        told = str(step.__doc__)
        with _timed(errors, f"{number} of {len(STEPS)}: {told}"):
            rows = list(step(world))
        for place, row in enumerate(rows):
            name = "" if place else told.partition(":")[0].lower()
            table.add_row(name, Text(row.what), _number(row.value), row.against)
    return table


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small win nothing by more; and on a busy machine, threads that wait for each other take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _timed(errors: Console, what: str) -> Iterator[None]:
    """Say what is being done, and then how long it took."""
    began = time.monotonic()
    with errors.status(what):
        yield
    errors.print(Text(f"{what} ({time.monotonic() - began:.1f} s)"), soft_wrap=True)


@dataclass(frozen=True)
class Row:
    """One number, and what to hold it against."""

    what: str
    value: float
    against: str = ""


def _number(value: float) -> str:
    return f"{value:.0e}" if 0 < value < 1e-3 else f"{value:.3f}"


class World:
    """What the steps share: drawn scenes, two models that see them, and texts that tell of them."""

    read: dict[str, Decomposition]  # what deit's components write to test and validation scenes, in the CLIP's space
    scores: FeatureScores  # of the validation scenes

    def __init__(self, size: int, seed: int, out: Path) -> None:
        from vitdecomp_lens import testbed  # not before it is needed: it imports open_clip
        from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank

        self.size, self.seed, self.out, self.testbed = size, seed, out, testbed
        self.deit, self.clip = testbed.load("deit"), testbed.load("clip")
        self.whole_clip: Any = testbed.load_original("clip")  # with its tower of texts
        self.aligner = testbed.aligner("deit")  # from what deit's components write to the CLIP's space
        texts = [text for several in features().values() for text in several]
        self.bank = text_bank(self.whole_clip, texts, templates=TEMPLATES).centred()  # what all share tells nothing
        self.banks = {name: self.bank.select(several) for name, several in features().items()}

    def scenes(self, split: str, *, draw: int = 0) -> Any:
        """Scenes of a kind; another draw has others."""
        return self.testbed.Scenes(split, seed=100 + 2 * self.seed + draw, size=self.size)

    def images(self, split: str, *, draw: int = 0) -> Float[Tensor, "batch channel height width"]:
        """The same as the models take them."""
        return self.testbed.normalised(self.scenes(split, draw=draw).images(range(self.size)))

    def labels(self, split: str, name: str, *, draw: int = 0) -> Int[Tensor, "batch"]:
        """The number of each scene's colour, shape..."""
        return self.scenes(split, draw=draw).labels(name, range(self.size))

    def parts(self, split: str, *, draw: int = 0) -> Decomposition:
        """What deit's components write."""
        return decompose(self.deit, self.images(split, draw=draw), by="head")


# --- the steps --------------------------------------------------------------------------------------------------------


def decomposing(world: World) -> Iterator[Row]:
    """Decompose: what a model computes is the sum of what its heads, MLPs and constants write."""
    for name, model in (("deit", world.deit), ("clip", world.clip)):
        parts = decompose(model, world.images("test"), by="head")
        assert parts.gap is not None  # what the model itself computed is known
        allowed = f"{TOLERANCES['float32']:.0e} is allowed"
        yield Row(f"{name}: {len(parts)} components; largest gap to the model", float(parts.gap.max()), allowed)


def aligning(world: World) -> Iterator[Row]:
    """Align: a linear map for each component takes what it writes into the CLIP's space."""

    def embedded(split: str) -> Float[Tensor, "batch d_clip"]:
        with torch.no_grad():
            return world.whole_clip.encode_image(world.images(split))

    fitted = Aligner.fit(world.parts("train"), embedded("train"), space=world.bank.space, seed=world.seed)
    parts, targets = world.parts("test"), embedded("test")
    shipped, own = (one.report(parts, targets).cosine_distance for one in (world.aligner, fitted))
    yield Row("deit: cosine distance to the CLIP, by the shipped aligner", shipped, f"{own:.3f} by a fit just now")
    world.read = {"test": parts.map(world.aligner), "validation": world.parts("validation").map(world.aligner)}


def scoring(world: World) -> Iterator[Row]:
    """Score: which of deit's components carry shape, colour, background."""
    features = {name: world.banks[name] for name in FEATURES}
    world.scores = score_features(world.read["validation"], features, bootstrap=0, permutations=0)
    for name, scores in zip(FEATURES, world.scores.correlation.T, strict=True):
        ((label, score),) = world.scores.top(name, 1)
        yield Row(f"{name}: {label} correlates most", score, f"{scores.median():.3f}, the median")
    if can_draw():
        save_figure(lambda: component_feature_matrix(world.scores, most=20), world.out / "features.png")


def interpreting(world: World) -> Iterator[Row]:
    """Interpret: the texts that span what components write that are for one of these more than for others."""
    labels = dict.fromkeys(world.scores.select(name, k=1)[0] for name in FEATURES)
    spans = text_span(world.read["validation"].select(labels=list(labels)), world.bank, steps=3, variant="corrected")
    for (label, texts), explained in zip(spans.texts.items(), spans.share_explained[:, -1].tolist(), strict=True):
        yield Row(f"{label}: {', '.join(texts)}; explained", explained)


def retrieving(world: World) -> Iterator[Row]:
    """Retrieve: scenes by a text, and scenes that are alike in one property."""
    colours, bank, parts = world.labels("test", "colour"), world.banks["colour"], world.read["test"]
    found = retrieval.precision_at(retrieval.by_text(retrieval.Gallery.of(parts), bank), colours, range(len(bank)))
    yield Row("by a text, such as “a red object”: precision at 10", found.mean, f"{found.chance:.3f} by chance")
    known = world.labels("validation", "colour")
    choice = retrieval.choose_count(world.read["validation"], world.scores, "colour", known)
    some, all_of_it = (
        retrieval.precision_at(retrieval.by_image(retrieval.Gallery.of(parts, components=which)), colours).mean
        for which in (choice.components, None)
    )
    what = f"by a scene, alike in colour, {choice.count} components: precision at 10"
    yield Row(what, some, f"{all_of_it:.3f} by all components")


def segmenting(world: World) -> Iterator[Row]:
    """Segment: from where components read what they write along a text."""
    names, bank = world.testbed.ATTRIBUTES["colour"], world.banks["colour"]
    scenes = world.scenes("pairs").scenes(range(world.size))
    images, masks = world.images("pairs"), torch.stack([scene.masks["object"] for scene in scenes])
    texts = [bank.texts[names.index(scene.attributes["colour"])] for scene in scenes]
    maps = heatmap.of_texts(world.deit, images, bank, against=bank, through=world.aligner)
    found, raw = (
        heatmap.segment(one.picked(texts), masks).miou for one in (maps, heatmap.raw_attention(world.deit, images))
    )
    yield Row("one object of two, by the text of its colour: mIoU", found, f"{raw:.3f} by raw attention")
    if can_draw():
        shown = bank.select(dict.fromkeys(texts[:DRAWN]))
        maps = heatmap.of_texts(world.deit, images[:DRAWN], shown, against=bank, through=world.aligner)
        pictures = [scene.picture for scene in scenes[:DRAWN]]
        save_figure(lambda: heatmap_overlays(maps, pictures), world.out / "heatmaps.png")


def repairing(world: World) -> Iterator[Row]:
    """Repair: a classifier of round and angular shapes that goes by what they mostly lie on."""
    water = world.testbed.ATTRIBUTES["background"].index("water")

    def drawn(split: str, draw: int) -> tuple[Decomposition, Tensor, repair.Groups]:
        label, ground = (world.labels(split, name, draw=draw) for name in ("group", "background"))
        return world.parts(split, draw=draw), label, repair.Groups.crossing(round=label, water=(ground == water).long())

    (training, label, _), tuned, judged = drawn("spurious", 0), drawn("balanced", 0), drawn("balanced", 1)
    assert training.total is not None
    classifier = LinearClassifier.fit(training.total, label, decay=0.1)
    common: Any = {"classifier": classifier, "reference": training}
    ranking = repair.rank(world.scores, "background", "shape", kind=("head", "mlp"))
    choice = repair.choose_direct(tuned[0], ranking, tuned[1], groups=tuned[2], slack=0.01, **common)
    repaired = repair.measure_direct(judged[0], choice.components, judged[1], groups=judged[2], **common)
    before, after = repaired.before, repaired.after
    what = f"accuracy, worst group, {choice.count} ablated in the sum (direct)"
    yield Row(what, after.worst, f"{before.worst:.3f} before")
    yield Row("average of groups", after.average, f"{before.average:.3f} before")


def reporting(world: World) -> Iterator[Row]:
    """Report: one page to look at, to try, and to pass on."""
    scenes = world.scenes("test").scenes(range(SHOWN))
    page = report(
        world.deit,
        [scene.picture for scene in scenes],
        texts={name: world.banks[name] for name in FEATURES},
        aligner=world.aligner,
        scale=float(world.whole_clip.logit_scale.exp()),
        bank=world.bank,
        reference=world.images("validation")[:REFERENCE],
        names=[scene.caption for scene in scenes],
        title="A classifier of drawn scenes, read in words",
        seed=world.seed,
    )
    page.save(world.out / PAGE)
    yield Row(f"{page.images} scenes, {page.answers} texts: MB", page.size / 1e6)


STEPS: tuple[Callable[[World], Iterator[Row]], ...] = (
    *(decomposing, aligning, scoring, interpreting),
    *(retrieving, segmenting, repairing, reporting),
)
