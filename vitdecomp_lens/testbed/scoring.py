"""Do scores of components tell what components do? ``python -m vitdecomp_lens.testbed.scoring``.

Components are put in order by their score for a feature, and in order by what is found out about them in other ways.
Spearman's rank correlation of the two orders is what is reported, for each model and each attribute of scenes, beside
that of orders that know nothing of features or images. The features are the texts of the attributes' values.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from vitdecomp_lens.clip.text_bank import TextBank
from vitdecomp_lens.decompose import attribute, decompose
from vitdecomp_lens.decomposition import Attribution, ComponentMaps, Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.interpret.statistics import bootstrap_counts, spearman
from vitdecomp_lens.intervene import Reference, total_effects
from vitdecomp_lens.intervening.reference import Replacing
from vitdecomp_lens.selecting import Components
from vitdecomp_lens.testbed.aligners import aligner
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank
from vitdecomp_lens.testbed.models import BUILDERS, normalised
from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scenes
from vitdecomp_lens.testbed.shipped import load_original

SCORES = ("correlation", "covariance")
BASELINES = ("variance along texts", "variance", "norm", "random")
TRUTHS = ("total effect", "size of effect", "probe", "CLIP")
GROUPS = ("all components", "heads")
BY_FEATURE = "CLIP, features of a component"
OF_ONE_FEATURE = (*SCORES, "variance along texts", "random")  # the others order no features
CHUNK = 250  # scenes at a time
WITHIN = 1.96  # standard deviations, for intervals of 95 %
ROUNDING = 16  # steps of rounding, relative to a value's length, below which its deviations are nothing
SHRINKAGE = 0.01  # of the covariances that probes are made of

Agreements = dict[str, dict[str, Float[Tensor, "sample column"]]]  # by truth and order; the first sample is all images


# --- what is known of components -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of a model's components on some images. All but lengths and hits is centred over them.

    Attributes:
        components: Those that are put in order.
        own: What each of them writes along the features' bases.
        removed: What the read-out along the bases loses when the component is ablated.
        whole: The read-out.
        raw: What each of them writes, in the model's own space.
        lengths: The length of that.
        hits: Whether a linear probe of what the component writes tells the value of each feature's attribute.
        alike: Its cosines with the features' texts.
        wanted: The cosines of the CLIP's embedding.
        of_directions: Which feature each direction of the bases belongs to.
        of_texts: Which feature each text belongs to.
    """

    components: Components
    own: Float[Tensor, "component batch direction"]
    removed: Float[Tensor, "component batch direction"]
    whole: Float[Tensor, "1 batch direction"]
    raw: Float[Tensor, "component batch d_rep"]
    lengths: Float[Tensor, "component batch"]
    hits: Bool[Tensor, "component batch feature"]
    alike: Float[Tensor, "component batch text"]
    wanted: Float[Tensor, "1 batch text"]
    of_directions: Float[Tensor, "direction feature"]
    of_texts: Float[Tensor, "text feature"]

    def of_kind(self, kind: str) -> "Seen":
        """The components of one kind."""
        rows = [row for row, component in enumerate(self.components) if component.kind == kind]
        by_component = ("own", "removed", "raw", "lengths", "hits", "alike")
        kept: dict[str, Any] = {name: getattr(self, name)[rows] for name in by_component}
        return replace(self, components=tuple(self.components[row] for row in rows), **kept)


def seen(
    parts: Decomposition,
    effects: Attribution,
    banks: Mapping[str, TextBank],
    targets: Float[Tensor, "batch d_clip"],
    labels: Int[Tensor, "batch feature"],
    fitted: Decomposition,
    fitted_labels: Int[Tensor, "other feature"],
    *,
    maps: ComponentMaps | None = None,
) -> Seen:
    """Put together what is known.

    Args:
        parts: Contributions, complete.
        effects: What the read-out along all features' bases, one after the other, changes by without a component.
            Its components are those that are put in order.
        banks: A feature's texts, by its name.
        targets: The CLIP's embeddings of the same images.
        labels: Of each feature's attribute, the number of the image's value.
        fitted: Contributions to other images, which probes are fitted on.
        fitted_labels: The values of these.
        maps: The aligner; None for contributions that are in the CLIP's space already.
    """
    inside = (parts if maps is None else parts.map(maps)).select(labels=effects.labels)
    raw = parts.select(labels=effects.labels).values.double()
    assert effects.total is not None
    texts = torch.cat([bank.directions for bank in banks.values()]).double()
    eps = ROUNDING * torch.finfo(parts.values.dtype).eps
    values, whole = inside.values.double(), effects.total.double()[None]
    lengths, length_of_whole = _rms(values.norm(dim=-1)), _rms(whole.norm(dim=-1))
    alike = functional.normalize(values, dim=-1) @ texts.T
    wanted = functional.normalize(targets.double(), dim=-1)[None] @ texts.T
    return Seen(
        components=effects.components,
        own=_centred(values @ bases_of(banks).double().T, eps * lengths),
        removed=_centred(-effects.values.double(), eps * length_of_whole),
        whole=_centred(whole, eps * length_of_whole),
        raw=_centred(raw, eps * _rms(raw.norm(dim=-1))),
        lengths=raw.norm(dim=-1),
        hits=_hits(raw, labels, fitted.select(labels=effects.labels).values.double(), fitted_labels),
        alike=_centred(alike, torch.full_like(lengths, eps)),
        wanted=_centred(wanted, torch.full_like(length_of_whole, eps)),
        of_directions=_owners([len(bank.subspace()) for bank in banks.values()]),
        of_texts=_owners([len(bank) for bank in banks.values()]),
    )


def bases_of(banks: Mapping[str, TextBank]) -> Float[Tensor, "direction d_clip"]:
    """The orthonormal bases of all features, one after the other."""
    return torch.cat([bank.subspace() for bank in banks.values()])


def _owners(widths: Sequence[int]) -> Float[Tensor, "row feature"]:
    return torch.eye(len(widths), dtype=torch.float64).repeat_interleave(torch.tensor(widths), 0)


def _rms(values: Float[Tensor, "row batch"]) -> Float[Tensor, "row"]:
    return values.square().mean(1).sqrt()


def _centred(
    values: Float[Tensor, "component batch width"], least: Float[Tensor, "#component"]
) -> Float[Tensor, "component batch width"]:
    """Around the mean; of a row whose deviations are all rounding, nothing is left."""
    centred = values - values.mean(1, keepdim=True)
    deviations = centred.square().mean(1).sqrt()
    return centred * (deviations > least[:, None])[:, None]


def _hits(
    values: Float[Tensor, "component batch d_rep"],
    labels: Int[Tensor, "batch feature"],
    fitted: Float[Tensor, "component other d_rep"],
    fitted_labels: Int[Tensor, "other feature"],
) -> Bool[Tensor, "component batch feature"]:
    told = [predicted(fitted, of, values) for of in fitted_labels.T]
    return torch.stack(told, -1) == labels


def predicted(
    fitted: Float[Tensor, "component other d_rep"],
    labels: Int[Tensor, "other"],
    values: Float[Tensor, "component batch d_rep"],
    *,
    shrinkage: float = SHRINKAGE,
) -> Int[Tensor, "component batch"]:
    """What a linear probe of each component says, by linear discriminant analysis: one covariance for all classes.

    Args:
        fitted: What it is fitted on.
        labels: The classes of these.
        values: What it is asked about.
        shrinkage: How much of the covariance gives way to a multiple of the identity of the same trace, since a head
            writes into few dimensions.
    """
    classes = functional.one_hot(labels).to(fitted)
    classes = classes[:, classes.any(0)]  # a class that was never seen is never said
    means = einsum(fitted, classes / classes.sum(0), "component other d_rep, other value -> component value d_rep")
    rest = fitted - classes @ means
    covariance = rest.mT @ rest / len(labels)
    size = torch.diagonal(covariance, dim1=1, dim2=2).mean(1)
    identity = torch.eye(fitted.shape[-1]).to(fitted)
    # Of a component that does not vary, any covariance gives what is most frequent.
    shrunk = (1 - shrinkage) * covariance + shrinkage * size.where(size > 0, 1)[:, None, None] * identity
    weights = torch.linalg.solve(shrunk, means.mT)
    offsets = (classes.mean(0)).log() - einsum(means, weights, "row value d_rep, row d_rep value -> row value") / 2
    numbers = labels.unique()
    return numbers[(values @ weights + offsets[:, None]).argmax(-1)]


# --- orders, and how far they agree ----------------------------------------------------------------------------------


def numbers(
    found: Seen, weights: Float[Tensor, "sample batch"], *, seed: int = 0
) -> dict[str, Float[Tensor, "sample component feature"]]:
    """All that components are put in order by, for each feature, with images weighted.

    Args:
        found: What is known.
        weights: They sum to one in each sample.
        seed: Of the order by chance.
    """
    varies = _covariance(weights, found.whole, found.whole)
    total = (varies @ found.of_directions).clamp_min(torch.finfo(varies.dtype).tiny)
    along = _covariance(weights, found.own, found.own) @ found.of_directions
    near = _correlation(weights, found.alike, found.wanted) @ (found.of_texts / found.of_texts.sum(0))
    shape = along.shape
    return {
        "correlation": _correlation(weights, found.own, found.whole)
        @ (found.of_directions / found.of_directions.sum(0)),
        "covariance": _covariance(weights, found.own, found.whole) @ found.of_directions / total,
        "variance along texts": along / total,
        "variance": _covariance(weights, found.raw, found.raw).sum(-1, keepdim=True).expand(shape),
        "norm": (weights @ found.lengths.T)[..., None].expand(shape),
        "random": torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=along.dtype),
        "total effect": _covariance(weights, found.removed, found.whole) @ found.of_directions / total,
        "size of effect": _covariance(weights, found.removed, found.removed) @ found.of_directions / total,
        "probe": einsum(weights, found.hits.to(weights), "sample batch, row batch feature -> sample row feature"),
        "CLIP": near,
    }


def _covariance(
    weights: Float[Tensor, "sample batch"],
    one: Float[Tensor, "component batch width"],
    other: Float[Tensor, "some batch width"],
) -> Float[Tensor, "sample component width"]:
    """For each row and column; what comes is centred, so that little cancels."""
    mean, mean_other, products = (
        einsum(weights, each, "sample batch, row batch width -> sample row width") for each in (one, other, one * other)
    )
    return products - mean * mean_other


def _correlation(
    weights: Float[Tensor, "sample batch"],
    one: Float[Tensor, "component batch width"],
    other: Float[Tensor, "some batch width"],
) -> Float[Tensor, "sample component width"]:
    lengths = (_covariance(weights, one, one).clamp(min=0) * _covariance(weights, other, other).clamp(min=0)).sqrt()
    return torch.where(lengths > 0, _covariance(weights, one, other) / lengths, 0)


def agreements(found: Seen, *, resamples: int = 200, seed: int = 0) -> Agreements:
    """How far each order of components agrees with each truth, for all images and for resampled ones.

    Args:
        found: What is known.
        resamples: How many times images are drawn with replacement. Components are not: they are all there are.
        seed: Of what is drawn.

    Returns:
        For each of `TRUTHS` and each of `SCORES` and `BASELINES` Spearman's rank correlation over components, a column
        for each feature. Under `BY_FEATURE` that over features, its mean over components that vary.
    """
    images = found.whole.shape[1]
    drawn = bootstrap_counts(images, resamples, seed).double() / images
    weights = torch.cat([torch.full((1, images), 1 / images, dtype=torch.float64), drawn])
    known = numbers(found, weights, seed=seed)
    agreed: Agreements = {
        truth: {order: spearman(known[order].mT, known[truth].mT) for order in (*SCORES, *BASELINES)}
        for truth in TRUTHS
    }
    rows = found.alike.any(1).any(1)
    agreed[BY_FEATURE] = {
        order: spearman(known[order][:, rows], known["CLIP"][:, rows]).mean(1, keepdim=True) for order in OF_ONE_FEATURE
    }
    for of in agreed.values():  # by chance there is no agreement; one draw would have some
        of["random"][0] = of["random"].mean(0)
    return agreed


def mean_of(several: Sequence[Agreements]) -> Agreements:
    """The mean over seeds or models, sample by sample."""
    return {
        truth: {order: torch.stack([one[truth][order] for one in several]).mean(0) for order in orders}
        for truth, orders in several[0].items()
    }


# --- the testbed's models --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class World:
    """Scenes, what is true of them, and what the CLIP makes of them.

    Attributes:
        images: Scenes of ``test``, as models take them.
        labels: The number of each attribute's value.
        others: Scenes of ``validation``: probes are fitted on them, and components ablated to their means there.
        other_labels: Theirs.
        targets: The CLIP's embeddings.
        banks: The texts of each attribute's values.
    """

    images: Float[Tensor, "batch channel height width"]
    labels: Int[Tensor, "batch feature"]
    others: Float[Tensor, "other channel height width"]
    other_labels: Int[Tensor, "other feature"]
    targets: Float[Tensor, "batch d_clip"]
    banks: Mapping[str, TextBank]

    @classmethod
    def drawn(cls, *, seed: int = 0, images: int = 1000, centred: bool = False) -> "World":
        """Draw scenes.

        Args:
            seed: Of both splits.
            images: How many of each.
            centred: Whether to take the mean of all texts off each of them.
        """
        clip: Any = load_original("clip")
        texts = {attribute: features()[attribute] for attribute in ATTRIBUTES}
        bank = text_bank(clip, sum(texts.values(), ()), templates=TEMPLATES)
        bank = bank.centred() if centred else bank
        found: list[Tensor] = []
        for split in ("test", "validation"):
            scenes = Scenes(split, seed=seed, size=images)
            labels = torch.stack([scenes.labels(attribute, range(images)) for attribute in ATTRIBUTES], -1)
            found += [normalised(scenes.images(range(images))), labels]
        with torch.no_grad():
            targets = torch.cat([clip.encode_image(piece) for piece in found[0].split(CHUNK)])
        banks = {attribute: bank.select(of) for attribute, of in texts.items()}
        return cls(found[0], found[1], found[2], found[3], targets, banks)


def look(
    model: HookedViT, world: World, *, maps: ComponentMaps | None = None, how: Replacing = "mean", seed: int = 0
) -> Seen:
    """Run a model on scenes, and without each of its components.

    Args:
        model: Of the testbed.
        world: The scenes.
        maps: The model's aligner; None for the CLIP.
        how: What is written in place of a component that is ablated.
        seed: Of scenes to resample from.
    """
    bases = bases_of(world.banks)

    def read_out(model: nn.Module, images: Tensor) -> Tensor:
        total = attribute(model, images, bases, through=maps, by="head").total
        assert total is not None
        return total

    with torch.no_grad():
        parts, fitted = (
            Decomposition.cat([decompose(model, piece, by="head") for piece in images.split(CHUNK)])
            for images in (world.images, world.others)
        )
        labels = [c.label for c in parts.components if c.kind != "constant"]
        effects = total_effects(
            model,
            world.images,
            labels,
            how=how,
            reference=Reference.of(model, world.others, components=labels, batch_size=CHUNK),
            of=read_out,
            seed=seed,
            batch_size=CHUNK,
        )
    return seen(parts, effects, world.banks, world.targets, world.labels, fitted, world.other_labels, maps=maps)


def evaluate(
    names: Iterable[str],
    *,
    seeds: int = 3,
    images: int = 1000,
    how: Replacing = "mean",
    centred: bool = False,
    resamples: int = 200,
) -> dict[str, dict[str, Agreements]]:
    """How far orders agree for the testbed's models, the mean over several sets of scenes.

    Args:
        names: Of the models.
        seeds: How many sets.
        images: How many scenes of ``test``, and of ``validation``.
        how: What is written in place of a component.
        centred: As for `World.drawn`.
        resamples: As for `agreements`.

    Returns:
        For each of `GROUPS`, that of each model.

    Raises:
        InputError: Where there is nothing to evaluate.
    """
    names = tuple(names)
    if not names or seeds < 1:
        raise InputError(f"Expected at least one model and one set of scenes; got {len(names)} and {seeds}.")
    worlds = [World.drawn(seed=seed, images=images, centred=centred) for seed in range(seeds)]
    found: dict[str, dict[str, Agreements]] = {group: {} for group in GROUPS}
    for name in names:
        model, maps = HookedViT(load_original(name)), None if name == "clip" else aligner(name)
        known = [look(model, world, maps=maps, how=how, seed=seed) for seed, world in enumerate(worlds)]
        for group, of in zip(GROUPS, (known, [one.of_kind("head") for one in known]), strict=True):
            several = [agreements(one, resamples=resamples, seed=seed) for seed, one in enumerate(of)]
            found[group][name] = mean_of(several)
        sys.stderr.write(f"{name} is done\n")
    return found


# --- telling ---------------------------------------------------------------------------------------------------------


def told(samples: Float[Tensor, "sample"]) -> tuple[float, float, float]:
    """The number for all images, and the ends of its interval of 95 %.

    The interval is as wide as resamples spread, around the number. In a resample some images are there twice and others
    missing, so that near ranks change places and rank correlations are a little lower: percentiles of resamples would
    be too low, at times all of them below the number itself.
    """
    value, deviation = float(samples[0]), float(samples[1:].std()) if len(samples) > 2 else 0.0
    return value, value - WITHIN * deviation, value + WITHIN * deviation


def summary(found: Mapping[str, Agreements]) -> str:
    """Markdown: for each truth a table, a row for each order, a column for each model, means over attributes."""
    tables = []
    whole = {**found, "all": mean_of(list(found.values()))}
    for truth, orders in whole["all"].items():
        rows = {order: [_cell(one[truth][order].mean(1)) for one in whole.values()] for order in orders}
        tables.append(_table(truth, list(whole), rows))
    return "\n\n".join(tables)


def details(found: Mapping[str, Agreements], order: str) -> str:
    """Markdown: the agreement of one order with each truth, a row for each attribute, a column for each model."""
    tables = []
    for truth in TRUTHS:
        rows = {
            attribute: [_cell(one[truth][order][:, column]) for one in found.values()]
            for column, attribute in enumerate(ATTRIBUTES)
        }
        tables.append(_table(f"{order} and {truth}", list(found), rows))
    return "\n\n".join(tables)


def duels(found: Mapping[str, Agreements]) -> str:
    """Markdown: by how much each score agrees better than each baseline, and for how many models and attributes.

    A pair of a model and an attribute is won or lost where the interval of the difference is on one side of zero.
    """
    rows: dict[str, list[str]] = {}
    for truth, score in product(TRUTHS, SCORES):
        against = [[one[truth][score] - one[truth][other] for one in found.values()] for other in BASELINES]
        rows[f"{truth}: {score}"] = [_duel(torch.cat(columns, -1)) for columns in against]
    return _table("better than", list(BASELINES), rows)


def _duel(differences: Float[Tensor, "sample pair"]) -> str:
    ends = [told(column)[1:] for column in differences.T]
    won, lost = sum(low > 0 for low, _ in ends), sum(high < 0 for _, high in ends)
    return f"{_cell(differences.mean(1))}; {won} : {lost} of {len(ends)}"


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {title} | {' | '.join(columns)} |", "| " + " | ".join(["---"] * (len(columns) + 1)) + " |"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def _cell(samples: Float[Tensor, "sample"]) -> str:
    value, low, high = (f"{round(number, 2) + 0.0:.2f}".replace("0.", ".", 1) for number in told(samples))  # no -.00
    return value if len(samples) < 3 else f"{value} [{low}, {high}]"


def as_json(found: Mapping[str, Agreements]) -> dict[str, Any]:
    """Every number with the ends of its interval: by model, truth, order, attribute."""
    return {
        name: {truth: {order: _ends(samples) for order, samples in of.items()} for truth, of in agreed.items()}
        for name, agreed in found.items()
    }


def _ends(samples: Float[Tensor, "sample column"]) -> dict[str, list[float]]:
    columns = ATTRIBUTES if samples.shape[1] == len(ATTRIBUTES) else ("all",)
    return {of: [round(one, 4) for one in told(column)] for of, column in zip(columns, samples.T, strict=True)}


def main() -> None:
    """Evaluate, print tables, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BUILDERS), default=list(BUILDERS), help="by default all")
    parser.add_argument("--seeds", type=int, default=3, help="how many sets of scenes (3)")
    parser.add_argument("--images", type=int, default=1000, help="scenes in each, and as many for probes (1000)")
    parser.add_argument(
        "--how",
        choices=("mean", "position_mean", "zero", "resample"),
        default="mean",
        help="what is written in place of a component (mean)",
    )
    parser.add_argument("--centred", action="store_true", help="take the mean of all texts off each text")
    parser.add_argument("--resamples", type=int, default=200, help="of images, for intervals (200)")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args()
    found = evaluate(
        options.models,
        seeds=options.seeds,
        images=options.images,
        how=options.how,
        centred=options.centred,
        resamples=options.resamples,
    )
    for group, agreed in found.items():
        tables = [f"**{group}**", summary(agreed), duels(agreed), *(details(agreed, score) for score in SCORES)]
        sys.stdout.write("\n\n".join(tables) + "\n\n")
    if options.json:
        numbers_of = {group: as_json(agreed) for group, agreed in found.items()}
        options.json.write_text(json.dumps(numbers_of, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
