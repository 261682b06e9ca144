"""``vitdecomp-lens interpret compare``: how models differ in what carries features, and whose heads are alike."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vitdecomp_lens.commands.interpreting.subjects import Subject, add_aligner, add_images, load_aligner
from vitdecomp_lens.commands.interpreting.telling import add_json, cells, titled, write_json
from vitdecomp_lens.commands.interpreting.words import Words, add_clip, add_texts
from vitdecomp_lens.commands.models import positive
from vitdecomp_lens.commands.showing import bar, tables
from vitdecomp_lens.commands.writing import unwritable
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.comparing import MATCHED_BY, Comparison, Concentration, Matching, compare_models
from vitdecomp_lens.pictures import INSTALL, can_draw
from vitdecomp_lens.store import Store

IMAGES = 500  # CKA takes a number for each pair of them


def add_to(questions: Any) -> None:
    """Add the question."""
    parser = questions.add_parser(
        "compare",
        help="how models differ, and whose heads are alike",
        description="For each feature, over how many components it is spread in each model, with intervals over "
        "images; and for each two models, how alike their best matching heads are, beside what chance gives. Images "
        "that all stores hold are compared.",
    )
    parser.add_argument("stores", nargs="+", metavar="STORE", help="folders that 'collect' made, or NAME=STORE")
    add_aligner(parser, action="append", default=[])
    add_clip(parser)
    add_texts(parser)
    features = "features by name, or NAME=FILE; all there are by default"
    parser.add_argument("--features", nargs="+", default=[], metavar="FEATURE", help=features)
    matched = "match heads by the images they tell apart (cka, the default) or by what they say of --texts"
    parser.add_argument("--by", choices=MATCHED_BY, default="cka", help=matched)
    add_images(parser, IMAGES)
    parser.add_argument("--resamples", type=positive, default=1000, metavar="N", help="that intervals are from (1000)")
    draws = "of chance, for matches (200; 20 a head of the model that has more, where that takes no more than minutes)"
    parser.add_argument("--draws", type=positive, metavar="N", help=draws)
    parser.add_argument("--seed", type=int, default=0, help="of resamples and chance (0)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw both as a picture, such as models.png")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Compare, and print a table of each kind."""
    if options.plot is not None and not can_draw():
        raise InputError(INSTALL)
    stores = _stores(options.stores)
    words = Words(options, errors)
    aligners = [load_aligner(name) for name in options.aligner]
    subjects = {name: Subject(store, words, aligners, options.images) for name, store in stores.items()}
    _share_images(list(subjects.values()), options)
    features = words.features(options.features)
    bank = words.bank(options.texts) if options.by == "texts" else None
    with bar(errors, "comparing"):
        found = compare_models(
            {name: subject.parts() for name, subject in subjects.items()},
            features,
            by=options.by,
            bank=bank,
            resamples=options.resamples,
            draws=options.draws,
            seed=options.seed,
        )
    console = tables()
    console.print(_concentrations(found))
    if found.matchings:
        console.print()
        console.print(_matchings(found))
    if options.plot is not None:
        _plot(found, options.plot)
    write_json(options.json, "compare", {"space": words.space, **_packed(found)})
    return 0


def _stores(named: Sequence[str]) -> dict[str, Store]:
    """Stores by name: the folder's, where no other is given."""
    found: dict[str, Store] = {}
    for one in named:
        name, separator, path = one.partition("=")
        if not separator or Path(one).is_dir():
            name, path = Path(one).resolve().name, one
        if name in found:
            raise InputError(f"Expected stores of different names; two are called {name!r}. Name them: NAME=STORE.")
        found[name] = Store(path)
    return found


def _share_images(subjects: Sequence[Subject], options: argparse.Namespace) -> None:
    """Have all read the images that all of them hold, so that what differs is the models."""
    places = [{name: row for row, name in reversed(list(enumerate(s.store.ids)))} for s in subjects]
    shared = [name for name in places[0] if all(name in other for other in places[1:])]
    if not shared:
        raise InputError(
            "Expected stores that hold the same images; no image is in all of them. Collect the same data set with "
            "each of the models."
        )
    shared.sort(key=places[0].__getitem__)
    count = min(options.images, len(shared))
    chosen = [shared[number * len(shared) // count] for number in range(count)]
    for subject, place in zip(subjects, places, strict=True):
        subject.rows = [place[name] for name in chosen]


def _concentrations(found: Comparison) -> Table:
    some = next(iter(found.concentrations.values()))
    table = titled(
        "Over how many components features are spread",
        f"Participation ratio of components' covariances with the whole, and its {100 * some.level:.0f} % interval "
        f"over {some.images} images: n where n components write the same, 1 where one writes all.",
    )
    table.add_column("feature")
    for name, one in found.concentrations.items():
        table.add_column(cells(f"{name} (of {len(one.scores)})")[0], justify="right")
    for feature in found.features:
        table.add_row(*cells(feature, *(one.told(feature) for one in found.concentrations.values())))
    return table


def _matchings(found: Comparison) -> Table:
    measure = next(iter(found.matchings.values())).measure
    table = titled(
        f"How alike heads are: {measure}",
        "Best: how alike a head and its most alike of the other model are, on average over both; by chance: the same "
        "for chance. Above chance: heads with a match that is more than chance, 5 % of these by mistake. Mutual: pairs "
        "that are each other's match.",
    )
    table.add_column("models")
    for heading in ("best", "by chance", "above chance", "mutual"):
        table.add_column(heading, justify="right")
    for (one, two), matching in found.matchings.items():
        sides = (matching, matching.flipped())
        above = ", ".join(f"{len(side.above_chance)} of {len(side)}" for side in sides)
        measured = (f"{matching.mean:.2f}", f"{matching.mean_chance:.2f}")
        table.add_row(*cells(f"{one}, {two}", *measured, above, str(len(matching.mutual))))
    return table


def _plot(found: Comparison, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.plot().savefig(path, dpi=150)
    except OSError as error:
        raise unwritable(path, error) from error
    except ValueError as error:  # a suffix that is no kind of picture
        raise InputError(f"Expected --plot as a picture such as models.png; got {str(path)!r}: {error}.") from error


def _packed(found: Comparison) -> dict[str, Any]:
    concentrations = {name: _concentration(one) for name, one in found.concentrations.items()}
    matchings = [{"models": list(pair), **_matching(one)} for pair, one in found.matchings.items()]
    return {"concentrations": concentrations, "matchings": matchings}


def _concentration(one: Concentration) -> dict[str, Any]:
    columns = (one.ratio, one.low, one.high, one.opposed)
    rows = zip(one.features, *(column.tolist() for column in columns), strict=True)
    features = {
        name: {"ratio": ratio, "low": low, "high": high, "opposed": opposed} for name, ratio, low, high, opposed in rows
    }
    return {"components": len(one.scores), "images": one.images, "features": features}


def _matching(one: Matching) -> dict[str, Any]:
    back = one.flipped()
    return {
        "measure": one.measure,
        "mean": one.mean,
        "by_chance": one.mean_chance,
        "matches": [vars(match) for match in one.matches],
        "of_second": [vars(match) for match in back.matches],
    }
