"""``vitdecomp-lens interpret feature``: which components carry a feature."""

import argparse
from contextlib import ExitStack
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vitdecomp_lens.commands.interpreting.subjects import add_subject, subject_of
from vitdecomp_lens.commands.interpreting.telling import add_json, add_named, cells, named_in, titled, write_json
from vitdecomp_lens.commands.interpreting.words import Words, add_clip
from vitdecomp_lens.commands.models import positive
from vitdecomp_lens.commands.showing import tables
from vitdecomp_lens.interpret.feature_scores import Side
from vitdecomp_lens.interpret.features import FeatureScores, score_features

ABOUT = (
    "Correlation: over images, of what the component writes along the feature with what the whole model writes there. "
    "Chance: what it is on average with images in another order; a large part of the whole correlates with it in any "
    "case. Share: of the variance along the feature, by covariance; the shares of all components sum to 100 %. p: how "
    "often chance is as far from its average, above it or below."
)
MARGIN = "Margin: its {by} minus the largest of those for {others}."
BESIDE: tuple[Side, ...] = ("above", "below")
RESAMPLES = 1000


def add_to(questions: Any) -> None:
    """Add the question."""
    parser = questions.add_parser(
        "feature",
        help="which components carry a feature",
        description="Rank components by their score for a feature, with intervals over images and p-values. Features "
        "are the testbed's for its CLIP (colour, shape, ...), the paper's for others (colour, texture, ...), and "
        "NAME=FILE for texts of your own.",
    )
    add_named(parser, "FEATURE", "features by name, or NAME=FILE; all there are by default")
    add_subject(parser)
    add_clip(parser)
    against = "rank by how much more a component scores for the feature than for any of these"
    parser.add_argument("--against", nargs="+", default=[], metavar="FEATURE", help=against)
    parser.add_argument(
        "--by", choices=("correlation", "covariance"), default="correlation", help="rank by (correlation)"
    )
    parser.add_argument("--top", type=positive, default=10, metavar="K", help="how many components to show (10)")
    resamples = (
        f"resamples that intervals are from, and orders that p-values are from, at least ({RESAMPLES}; orders, where "
        "that is more, 20 a component, without which a single one would not be found among all)"
    )
    parser.add_argument("--resamples", type=positive, metavar="N", help=resamples)
    parser.add_argument("--seed", type=int, default=0, help="of resamples and orders (0)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Score, and print a ranking for each feature."""
    path, named = named_in(options)
    with ExitStack() as stack:
        words = Words(options, errors)
        features = words.features(named)
        others = words.features(options.against) if options.against else {}
        subject = subject_of(options, path, words, errors, stack)
        scores = score_features(
            subject.batches(),
            features | others,
            bootstrap=options.resamples or RESAMPLES,
            permutations=options.resamples,
            seed=options.seed,
        )
    shown = {name: _ranked(scores, name, options) for name in features}
    console = tables()
    for name, ranked in shown.items():
        console.print(_table(scores, name, ranked, len(features[name]), options))
        console.print()
    answer = {name: [_told(scores, name, label, options) for label in ranked] for name, ranked in shown.items()}
    facts = {"space": scores.space, "images": scores.images, "by": options.by, "against": options.against}
    facts |= {"resamples": scores.resamples, "orders": scores.orders}
    beside = {f"{side}_chance": {name: scores.significant(name, side=side) for name in features} for side in BESIDE}
    write_json(options.json, "feature", {**facts, "features": answer, **beside})
    return 0


def _ranked(scores: FeatureScores, feature: str, options: argparse.Namespace) -> tuple[str, ...]:
    if options.against:
        return scores.select(feature, against=options.against, k=options.top, by=options.by)
    return tuple(label for label, _ in scores.top(feature, options.top, by=options.by))


def _table(
    scores: FeatureScores, feature: str, ranked: tuple[str, ...], texts: int, options: argparse.Namespace
) -> Table:
    above, below = (len(scores.significant(feature, side=side)) for side in BESIDE)
    found = f"Of {len(scores)} components {above} correlate more than by chance, {below} less, 5 % of these by mistake"
    facts, others = f"{texts} texts, {scores.images} images. {found}. {ABOUT}", " or ".join(options.against)
    title = f"Which components carry {feature}"
    if others:
        title, facts = f"{title}, more than {others}", f"{facts} {MARGIN.format(by=options.by, others=others)}"
    table = titled(title, facts)
    table.add_column("component")
    table.box, table.show_edge, table.padding = box.SIMPLE_HEAD, False, (0, 0)  # so that 80 characters are enough
    for heading in (*(["margin"] if others else []), "corre-\nlation", "interval", "chance", "p", "share", "interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label in ranked:
        one = _told(scores, feature, label, options)
        correlation, share = one["correlation"], one["share"]
        table.add_row(
            *cells(
                label,
                *([f"{one['margin']:+.2{'f' if options.by == 'correlation' else 'g'}}"] if others else []),
                f"{correlation['value']:+.2f}",
                f"{correlation['low']:+.2f} to {correlation['high']:+.2f}",
                f"{correlation['chance']:+.2f}",
                _p(correlation["p"], scores.orders),
                f"{100 * share['value']:.1f} %",
                f"{100 * share['low']:.1f} to {100 * share['high']:.1f}",
            )
        )
    return table


def _p(value: float, orders: int) -> str:
    """A p-value as text; there is none below 1 / orders, so that the least one is only a bound.

    >>> _p(0.25, 1000), _p(0.001, 1000)
    ('0.250', '≤ 0.001')
    """
    return f"≤ {1 / orders:.2g}" if value * orders < 1.5 else f"{value:.3f}"


def _told(scores: FeatureScores, feature: str, label: str, options: argparse.Namespace) -> dict[str, Any]:
    """One component's scores; covariances as shares of the variance of the whole."""
    correlation, covariance = scores.score(label, feature), scores.score(label, feature, by="covariance")
    whole = float(scores.total[scores.features.index(feature)])
    share = {name: _of(getattr(covariance, name), whole) for name in ("value", "low", "high")}
    row = scores.labels.index(label)
    told: dict[str, Any] = {"component": label, "correlation": vars(correlation), "share": {**share, "p": covariance.p}}
    if scores.correlation_chance is not None:
        chance = scores.correlation_chance[row, scores.features.index(feature)]
        told["correlation"] = {**vars(correlation), "chance": float(chance)}
    if options.against:
        told["margin"] = float(scores.margins(feature, against=options.against, by=options.by)[row])
    return told


def _of(value: float, whole: float) -> float:
    return value / whole if whole else float("nan")
