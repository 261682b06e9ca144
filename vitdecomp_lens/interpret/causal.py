"""Do direct scores say what happens? Beside each component's direct score the total effect of ablating it.

A direct score is read off one run: what the component writes into the representation. The total effect comes
from runs without the component, in which later components react (`vitdecomp_lens.intervene.total_effects`). Both
arrive here as labelled values; no model is run.

What makes the two comparable. Let s_Z be the projections of the representation on the feature's orthonormal basis,
and r_c what is *removed* from them with component c: directly its own projections s_c, in total the clean read-out
minus the ablated one. Then one and the same function of r_c and s_Z is the score, and it looks at deviations from
the mean over images only:

- ``"covariance"``: Σ over the basis of cov(r_c, s_Z). Directly, it is the additive score, which sums over all
  components to the feature's variance. It is half the rate at which that variance falls as r_c is taken away
  little by little;
- ``"correlation"``: the mean over the basis of corr(r_c, s_Z), the paper's score;
- ``"variance"``: Σ var(s_Z) − Σ var(s_Z − r_c) = Σ (2 cov(r_c, s_Z) − var(r_c)), by how much the mean
  squared centred projection really falls once all of r_c is gone. It is the same in any orthonormal basis of the
  feature, as the first is.

Means over images are left out on purpose. A feature is what differs between images; an ablation also moves all images
alike, zero-ablation most of all, and the mean *square* of projections that are not centred is little else than that
move. So the direct score of a component is one number whether it is replaced by zero or by its mean: a constant has no
covariance. Its total effects differ, as later components react to where the constant lies; those of the mean over each
position (``how="position_mean"``) stay nearest to the inputs that the model knows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.statistics import bootstrap_counts, interval, spearman
from vitdecomp_lens.selecting import Components, as_components, summary

__all__ = ["EffectsTable", "effects_table"]

Score = Literal["covariance", "correlation", "variance"]
LEAST = 3  # components: a rank correlation of two is 1 or -1 whatever they are
SAME = 1e-2  # of what varies over images: two clean read-outs that differ by more are of other images or directions
ROUNDING = 64  # steps of rounding of the larger ones, within which read-outs are one however little varies
NUMBERS = 1 << 22  # that resampling works on at a time


@dataclass(frozen=True, eq=False, repr=False)
class EffectsTable:
    """Direct scores of components for one feature, and the total effects of ablating them, in the same units.

    Attributes:
        components: What each row belongs to.
        hows: How components were ablated.
        direct: Each component's direct score.
        total: The same score of what is removed when the component is ablated.
        agreement: For each ablation, Spearman's rank correlation over components of direct scores and total effects.
        direct_interval: Lower and upper ends, by resampling images; None where that was not asked for.
        total_interval: The same of total effects.
        agreement_interval: The same of the agreement. Components are not resampled.
        by: Which score: ``"covariance"``, ``"correlation"`` or ``"variance"``.
        variance: The feature's variance in the clean run: covariances and variances are parts of it.
        images: How many images there were.
        resamples: How many resamples the intervals are from.
        level: Of the intervals.
    """

    components: Components
    hows: tuple[str, ...]
    direct: Float[Tensor, "component"]
    total: Float[Tensor, "how component"]
    agreement: Float[Tensor, "how"]
    direct_interval: Float[Tensor, "2 component"] | None
    total_interval: Float[Tensor, "2 how component"] | None
    agreement_interval: Float[Tensor, "2 how"] | None
    by: str
    variance: float
    images: int
    resamples: int
    level: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", as_components(self.components, len(self.direct)))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The components' labels, in the order of the rows."""
        return tuple(component.label for component in self.components)

    def __len__(self) -> int:
        return len(self.components)

    def __repr__(self) -> str:
        agreed = ", ".join(f"{how} {self._agreement(column)}" for column, how in enumerate(self.hows))
        return (
            f"EffectsTable({len(self)} components: {summary(self.components)}; {self.by}, {self.images} images; "
            f"rank agreement of direct and total: {agreed})"
        )

    def table(self, k: int | None = None) -> str:
        """The table in Markdown, highest direct score first, with the rank agreement in its last row.

        Args:
            k: How many components at most; the agreement is that of all.

        Raises:
            InputError: Where k is below 1.
        """
        if k is not None and k < 1:
            raise InputError(f"Expected k= of at least 1; got {k}.")
        order = self.direct.argsort(descending=True, stable=True)[:k].tolist()
        lines = [
            ["component", f"direct {self.by}", *(f"total, {how}" for how in self.hows)],
            ["---"] * (2 + len(self.hows)),
        ]
        for row in order:
            direct = _cell(self.direct[row], None if self.direct_interval is None else self.direct_interval[:, row])
            lines.append([self.labels[row], direct, *(self._total(column, row) for column in range(len(self.hows)))])
        lines.append(["rank agreement", "", *(self._agreement(column) for column in range(len(self.hows)))])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def _total(self, column: int, row: int) -> str:
        ends = None if self.total_interval is None else self.total_interval[:, column, row]
        return _cell(self.total[column, row], ends)

    def _agreement(self, column: int) -> str:
        ends = None if self.agreement_interval is None else self.agreement_interval[:, column]
        return f"{float(self.agreement[column]):.2f}" + _ends(ends, ".2f")


def _cell(value: Float[Tensor, ""], ends: Float[Tensor, "2"] | None) -> str:
    return f"{float(value):.3g}" + _ends(ends, ".3g")


def _ends(ends: Float[Tensor, "2"] | None, spec: str) -> str:
    return "" if ends is None else f" [{float(ends[0]):{spec}}, {float(ends[1]):{spec}}]"


def effects_table(
    direct: Attribution,
    total: Attribution | Mapping[str, Attribution],
    *,
    by: Score = "covariance",
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> EffectsTable:
    """Put direct scores for a feature beside the total effects of ablating the same components.

    Args:
        direct: Projections of components on the feature's orthonormal basis, such as
            ``decompose(model, images).map(aligner).project(bank.subspace(texts))``. One direction is a basis of one.
        total: What ablating each component does to the same projections of the same images, from
            `vitdecomp_lens.intervene.total_effects`: one, or several by the names that their columns get. Rows of the
            table are the components that these have.
        by: The score; see the module.
        resamples: From how many resamples of the images the intervals are; 0 for none.
        seed: Of the resamples.
        level: Of the intervals.

    Raises:
        InputError: Where images, directions or components of the two do not fit, there are too few of them, or
            ``total`` does not say that it is of total effects, or ``direct`` does.

    Example:
        >>> from vitdecomp_lens import HookedViT, attribute
        >>> from vitdecomp_lens.intervene import total_effects
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> images, basis = torch.randn(6, 3, 160, 160), torch.eye(64)[:2]
        >>> direct = attribute(model, images, basis)
        >>> total = total_effects(model, images, how="zero", directions=basis)
        >>> effects_table(direct, total, resamples=20).hows
        ('zero',)
    """
    if by not in get_args(Score):
        raise InputError(f"Expected by='covariance', 'correlation' or 'variance'; got by={by!r}.")
    if resamples < 0:
        raise InputError(f"Expected resamples= of at least 0; got {resamples}. Without intervals: resamples=0.")
    totals = dict(total) if isinstance(total, Mapping) else {str(total.metadata.get("how", "total")): total}
    if not totals:
        raise InputError("Expected the total effects of at least one kind of ablation; got none.")
    labels = next(iter(totals.values())).labels
    for how, effects in totals.items():
        _refuse_unequal(direct, effects, how, labels)
    whole = _whole(direct, totals)
    whole = whole - whole.mean(0)
    removed = [direct.select(labels=labels).values.double()]
    removed += [-effects.select(labels=labels).values.double() for effects in totals.values()]
    of_all = torch.stack([one - one.mean(1, keepdim=True) for one in removed])
    images = len(whole)
    equal = torch.full((1, images), 1 / images, dtype=torch.float64, device=whole.device)
    (scores,) = _scores(of_all, whole, equal, by)
    scored, agreed = _intervals(of_all, whole, by, resamples, seed, level) if resamples else (None, None)
    return EffectsTable(
        components=tuple(direct.components[direct.labels.index(label)] for label in labels),
        hows=tuple(totals),
        direct=scores[0],
        total=scores[1:],
        agreement=spearman(scores[:1], scores[1:]),
        direct_interval=None if scored is None else scored[:, 0],
        total_interval=None if scored is None else scored[:, 1:],
        agreement_interval=agreed,
        by=by,
        variance=float(whole.square().mean(0).sum()),
        images=images,
        resamples=resamples,
        level=level,
    )


# --- computing -------------------------------------------------------------------------------------------------------


def _intervals(
    removed: Float[Tensor, "effect component batch direction"],
    whole: Float[Tensor, "batch direction"],
    by: Score,
    resamples: int,
    seed: int,
    level: float,
) -> tuple[Float[Tensor, "2 effect component"], Float[Tensor, "2 how"]]:
    counts = bootstrap_counts(len(whole), resamples, seed).to(whole)
    several, agreed = [], []
    for weights in _in_pieces(counts / len(whole), removed.numel() // len(whole)):
        scores = _scores(removed, whole, weights, by)
        several.append(scores)
        agreed.append(spearman(scores[:, :1], scores[:, 1:]))
    return torch.stack(interval(torch.cat(several), level)), torch.stack(interval(torch.cat(agreed), level))


def _in_pieces(weights: Float[Tensor, "resample batch"], numbers: int) -> Iterator[Float[Tensor, "some batch"]]:
    yield from weights.split(max(1, NUMBERS // max(1, numbers)))


def _scores(
    removed: Float[Tensor, "effect component batch direction"],
    whole: Float[Tensor, "batch direction"],
    weights: Float[Tensor, "resample batch"],
    by: Score,
) -> Float[Tensor, "resample effect component"]:
    """The score of what is removed, with images weighted; all come centred, so that little cancels."""
    mean = einsum(
        weights, removed, "resample batch, effect component batch direction -> resample effect component direction"
    )
    mean_whole = (weights @ whole)[:, None, None]
    if by == "covariance":
        products = einsum(removed, whole, "effect component batch direction, batch direction -> effect component batch")
        return einsum(weights, products, "r b, e c b -> r e c") - (mean * mean_whole).sum(-1)
    products = removed * whole
    covariance = einsum(weights, products, "r b, e c b d -> r e c d") - mean * mean_whole
    own = einsum(weights, removed.square(), "r b, e c b d -> r e c d") - mean.square()
    if by == "variance":
        return (2 * covariance - own).sum(-1)
    of_whole = (weights @ whole.square())[:, None, None] - mean_whole.square()
    rounding = torch.finfo(removed.dtype).eps * removed.square().mean(2)
    lengths = (own.clamp(min=0) * of_whole.clamp(min=0)).sqrt()
    varies = (own > 16 * rounding) & (lengths > 0)
    return torch.where(varies, covariance / lengths, 0).mean(-1)


# --- checks ----------------------------------------------------------------------------------------------------------


def _refuse_unequal(direct: Attribution, total: Attribution, how: str, labels: tuple[str, ...]) -> None:
    if direct.metadata.get("effect") == "total":
        raise InputError(
            "Expected direct scores first, as of attribute or project, and total effects second, as of total_effects;"
            " got total effects first."
        )
    if total.metadata.get("effect") != "total":
        raise InputError(
            f"Expected total effects second ({how}), as of total_effects, which say so in their metadata; these do not."
            ' Direct scores are none. Effects of your own: Attribution(..., metadata={"effect": "total"}).'
        )
    if total.values.shape[1:] != direct.values.shape[1:]:
        raise InputError(
            "Expected the same images and directions of both; [batch, direction] of direct scores is"
            f" {list(direct.values.shape[1:])}, of total effects ({how}) {list(total.values.shape[1:])}. Read both"
            " along one basis."
        )
    if total.values.shape[1] < 2:
        raise InputError("Expected at least 2 images: scores are over images.")
    if set(total.labels) != set(labels):
        strange = min({*total.labels} ^ {*labels})
        raise InputError(f"Expected total effects of the same components; {strange!r} is in only some of them ({how}).")
    if len(labels) < LEAST:
        raise InputError(f"Expected at least {LEAST} components, to compare their order; got {len(labels)}.")
    if missing := [label for label in labels if label not in direct]:
        raise InputError(
            f"Expected a direct score of every component that was ablated; there is none of {missing[0]!r}. Decompose"
            " with the same by=."
        )


def _whole(direct: Attribution, totals: Mapping[str, Attribution]) -> Float[Tensor, "batch direction"]:
    """The clean read-out, which all that have it have to agree on."""
    known = {"direct scores": direct.total, **{f"total effects ({how})": one.total for how, one in totals.items()}}
    found = {name: total.double() for name, total in known.items() if total is not None}
    if not found:
        raise InputError("Expected the projections of the whole, as the total of one of the two; got none.")
    (name, first), *others = found.items()
    varies, largest = float((first - first.mean(0)).abs().max()), float(first.abs().max())
    step = max(torch.finfo(total.dtype).eps for total in known.values() if total is not None)
    for other, whole in others:
        off = float((whole - first).abs().max())
        if not off <= SAME * varies + ROUNDING * step * largest:
            raise InputError(
                f"Expected one clean read-out; the totals of {name} and {other} differ by up to {off:.2g}, where they"
                f" vary by up to {varies:.2g} over images. Use the same images, in the same order, and the same"
                " directions."
            )
    return first
