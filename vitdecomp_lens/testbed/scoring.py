"""Do scores of components tell what components do? ``python -m vitdecomp_lens.testbed.scoring``.

Components are put in order by their score for a feature, and in order by what is found out about them in other ways.
Spearman's rank correlation of the two orders is what is reported, for each model and each attribute of scenes, beside
that of orders that know nothing of features or images. The features are the texts of the attributes' values.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from vitdecomp_lens.clip.text_bank import TextBank
from vitdecomp_lens.decompose import attribute, decompose
from vitdecomp_lens.decomposition import Attribution, ComponentMaps, Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.interpret.statistics import bootstrap_counts, interval, spearman
from vitdecomp_lens.intervene import Reference, total_effects
from vitdecomp_lens.intervening.reference import Replacing
from vitdecomp_lens.testbed.aligners import aligner
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank
from vitdecomp_lens.testbed.models import BUILDERS, normalised
from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scenes
from vitdecomp_lens.testbed.shipped import load_original

SCORES = ("correlation", "covariance")
BASELINES = ("variance along texts", "variance", "norm", "random")
TRUTHS = ("total effect", "size of effect", "probe", "CLIP")
BY_FEATURE = "CLIP, features of a component"
OF_ONE_FEATURE = (*SCORES, "variance along texts", "random")  # the others order no features
CHUNK = 250  # scenes at a time
ROUNDING = 16  # steps of rounding, relative to a value's length, below which its deviations are nothing
SHRINKAGE = 0.01  # of the covariances that probes are made of

Rows = Float[Tensor, "component batch width"]
Agreements = dict[str, dict[str, Float[Tensor, "sample column"]]]  # by truth and order; the first sample is all images


# --- what is known of components -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of a model's components on some images. All but lengths and hits is centred over them.

    Attributes:
        labels: The components.
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

    labels: tuple[str, ...]
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
        labels=effects.labels,
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


def _centred(values: Rows, least: Float[Tensor, "component"]) -> Rows:
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
    means = einsum(fitted, classes / classes.sum(0), "component other d_rep, other class -> component class d_rep")
    rest = fitted - classes @ means
    covariance = rest.mT @ rest / len(labels)
    size = torch.diagonal(covariance, dim1=1, dim2=2).mean(1)
    identity = torch.eye(fitted.shape[-1]).to(fitted)
    # Of a component that does not vary, any covariance gives what is most frequent.
    shrunk = (1 - shrinkage) * covariance + shrinkage * size.where(size > 0, 1)[:, None, None] * identity
    weights = torch.linalg.solve(shrunk, means.mT)
    offsets = (classes.mean(0)).log() - einsum(means, weights, "component k d, component d k -> component k") / 2
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
        clip = load_original("clip")
        texts = {attribute: features()[attribute] for attribute in ATTRIBUTES}
        bank = text_bank(clip, sum(texts.values(), ()), templates=TEMPLATES)
        bank = bank.centred() if centred else bank
        found = []
        for split in ("test", "validation"):
            scenes = Scenes(split, seed=seed, size=images)
            labels = torch.stack([scenes.labels(attribute, range(images)) for attribute in ATTRIBUTES], -1)
            found += [normalised(scenes.images(range(images))), labels]
        with torch.no_grad():
            targets = torch.cat([clip.encode_image(piece) for piece in found[0].split(CHUNK)])
        return cls(*found, targets, {attribute: bank.select(of) for attribute, of in texts.items()})


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

    def read_out(model: HookedViT, images: Tensor) -> Tensor:
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
) -> dict[str, Agreements]:
    """How far orders agree for the testbed's models, the mean over several sets of scenes.

    Args:
        names: Of the models.
        seeds: How many sets.
        images: How many scenes of ``test``, and of ``validation``.
        how: What is written in place of a component.
        centred: As for `World.drawn`.
        resamples: As for `agreements`.

    Raises:
        InputError: Where there is nothing to evaluate.
    """
    names = tuple(names)
    if not names or seeds < 1:
        raise InputError(f"Expected at least one model and one set of scenes; got {len(names)} and {seeds}.")
    found: dict[str, list[Agreements]] = {name: [] for name in names}
    for seed in range(seeds):
        world = World.drawn(seed=seed, images=images, centred=centred)
        for name in names:
            maps = None if name == "clip" else aligner(name)
            known = look(HookedViT(load_original(name)), world, maps=maps, how=how, seed=seed)
            found[name].append(agreements(known, resamples=resamples, seed=seed))
            sys.stderr.write(f"{name} on scenes {seed}: {len(known.labels)} components\n")
    return {name: mean_of(several) for name, several in found.items()}


# --- telling ---------------------------------------------------------------------------------------------------------


def told(samples: Float[Tensor, "sample"]) -> tuple[float, float, float]:
    """The number for all images, and the ends of its interval."""
    value, *drawn = samples.tolist()
    low, high = interval(samples[1:]) if drawn else (samples[0], samples[0])
    return value, float(low), float(high)


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
    for truth in TRUTHS:
        for score in SCORES:
            cells = []
            for other in BASELINES:
                columns = torch.cat([one[truth][score] - one[truth][other] for one in found.values()], -1)
                won = sum(told(column)[1] > 0 for column in columns.T)
                lost = sum(told(column)[2] < 0 for column in columns.T)
                cells.append(f"{_cell(columns.mean(1))}; {won} : {lost} of {columns.shape[1]}")
            rows[f"{truth}: {score}"] = cells
    return _table("better than", list(BASELINES), rows)


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {title} | {' | '.join(columns)} |", "| " + " | ".join(["---"] * (len(columns) + 1)) + " |"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def _cell(samples: Float[Tensor, "sample"]) -> str:
    value, low, high = (f"{number:.2f}".replace("0.", ".", 1) for number in told(samples))
    return value if len(samples) == 1 else f"{value} [{low}, {high}]"


def as_json(found: Mapping[str, Agreements]) -> dict[str, dict[str, dict[str, dict[str, list[float]]]]]:
    """Every number with the ends of its interval: by model, truth, order, attribute."""
    return {
        name: {
            truth: {
                order: {
                    of: [round(number, 4) for number in told(column)]
                    for of, column in zip(ATTRIBUTES if samples.shape[1] > 1 else ("all",), samples.T, strict=True)
                }
                for order, samples in orders.items()
            }
            for truth, orders in agreed.items()
        }
        for name, agreed in found.items()
    }


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
    tables = [summary(found), duels(found), *(details(found, score) for score in SCORES)]
    sys.stdout.write("\n\n".join(tables) + "\n")
    if options.json:
        options.json.write_text(json.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
