"""How good an alignment is, measured on images that it was not fitted to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vitdecomp_lens.clip.moments import Layout
from vitdecomp_lens.clip.objective import small_gram

TOLERANCE = 0.01
_PAIRS = 20_000


@dataclass(frozen=True, eq=False)
class AlignmentReport:
    """Measures of an alignment over some images; unbiased where these had no part in the fit.

    Attributes:
        labels: The components'.
        ranks: How many dimensions each component's span has.
        distances: 1 − cosine of the aligned sum and the target, by image.
        scale: The k for which all ``WWᵀ``, W the map of a span, are nearest to kI: one for all components.
        isometry: ‖WWᵀ/k − I‖ / ‖I‖ by component: 0 for a map that keeps the order of norms within the component and
            with all others (arXiv 2406.01583, Theorem 1).
        co_isometric: The components of which ‖WᵀW/k − I‖ was taken instead, because their span has more dimensions
            than the target's space and no isometry exists.
        shares_before: The share of each component in the sum of all components' variances.
        shares_after: The same of the mapped components.
        outside: The share of each component's squared norm outside of its span, which is mapped to zero.
        within: Of pairs of images, how often the longer contribution of a component became the shorter, clearly.
        across: The same of pairs of components at an image.
        tolerance: Lengths that differ by less than this share of the longer are not told apart, before or after.
        match_rate: Of the classes that components tell apart for a classifier, which share CLIP's texts still find, on
            average (`vitdecomp_lens.class_match`); None where there is no classifier, or nobody asked.
        match_by_chance: What as many classes drawn at random would have.
    """

    labels: tuple[str, ...]
    ranks: tuple[int, ...]
    distances: Float[Tensor, "batch"]
    scale: float
    isometry: Float[Tensor, "component"]
    co_isometric: tuple[str, ...]
    shares_before: Float[Tensor, "component"]
    shares_after: Float[Tensor, "component"]
    outside: Float[Tensor, "component"]
    within: float
    across: float
    tolerance: int | float = TOLERANCE
    match_rate: float | None = None
    match_by_chance: float | None = None

    @property
    def cosine_distance(self) -> float:
        """The mean over images of 1 − cosine."""
        return float(self.distances.mean())

    @property
    def mean_isometry(self) -> float:
        """The mean of ``isometry`` over the components that write anything."""
        fitted = [float(one) for one, rank in zip(self.isometry, self.ranks, strict=True) if rank]
        return sum(fitted) / len(fitted) if fitted else 0.0

    def packed(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON holds of it, and its tensors."""
        entries = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
        return {name: entry for name, entry in entries.items() if name not in tensors}, tensors

    @classmethod
    def unpacked(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "AlignmentReport":
        """What `packed` packed; JSON has made lists of tuples."""
        entries: dict[str, Any] = dict(tensors)
        entries |= {name: tuple(entry) if isinstance(entry, list) else entry for name, entry in header.items()}
        return cls(**entries)

    def __repr__(self) -> str:
        matched = "" if self.match_rate is None else f"; match rate {self.match_rate:.3f}"
        matched += "" if self.match_by_chance is None else f", by chance {self.match_by_chance:.3f}"
        return (
            f"AlignmentReport({len(self.distances)} images: cosine distance {self.cosine_distance:.4g}; "
            f"{len(self.labels)} components: isometry residual {self.mean_isometry:.2g} on average; order of "
            f"norms changed in {self.within:.2%} of pairs of images, {self.across:.2%} of pairs of components{matched})"
        )


class Tally:
    """Sums over images that a report is made of.

    Args:
        basis: Of the components' spans, or of one span that all share.
        layout: Which columns of the basis are whose.
        weights: The maps of the spans.
        bias: Of the sum.
    """

    def __init__(
        self,
        basis: Float[Tensor, "d_rep coordinate"],
        layout: Layout,
        weights: Float[Tensor, "coordinate d_clip"],
        bias: Float[Tensor, "d_clip"],
    ) -> None:
        self.basis, self.layout, self.weights, self.bias = basis, layout, weights, bias
        self._sums: tuple[Tensor, Tensor] | None = None
        self._distances: list[Tensor] = []
        self._norms: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])

    def _columns(self, row: int) -> slice:
        return self.layout.slices[row if len(self.layout.ranks) > 1 else 0]

    def add(self, values: Float[Tensor, "component batch d_rep"], targets: Float[Tensor, "batch d_clip"]) -> None:
        """Add images."""
        basis, weights = self.basis.to(values), self.weights.to(values)
        mapped_sum, inside, after, means = self.bias.to(values).expand(targets.shape), [], [], []
        for row, vectors in enumerate(values):
            columns = self._columns(row)
            coordinates = vectors @ basis[:, columns]
            mapped = coordinates @ weights[columns]
            mapped_sum = mapped_sum + mapped
            inside.append(coordinates.norm(dim=-1))
            after.append(mapped.norm(dim=-1))
            means.append(mapped.sum(0, dtype=torch.float64))
        sums = (values.sum(1, dtype=torch.float64), torch.stack(means))
        self._sums = sums if self._sums is None else (self._sums[0] + sums[0], self._sums[1] + sums[1])
        self._distances.append(1 - cosine_similarity(mapped_sum, targets.to(values), dim=-1))
        for kept, norms in zip(self._norms, (values.norm(dim=-1), inside, after), strict=True):
            kept.append(norms if isinstance(norms, Tensor) else torch.stack(norms))

    def report(self, labels: Sequence[str], *, tolerance: int | float = TOLERANCE, seed: int = 0) -> AlignmentReport:
        """The report on all that was added.

        Args:
            labels: The components'.
            tolerance: From which relative difference on norms have an order.
            seed: Which pairs are drawn.
        """
        assert self._sums is not None
        before, inside, after = (torch.cat(norms, 1).double() for norms in self._norms)
        scale, isometry, co_isometric = self._isometry(len(labels))
        chance = torch.Generator().manual_seed(seed)
        power = before.square().sum(1)
        return AlignmentReport(
            labels=tuple(labels),
            ranks=tuple(self.layout.ranks[row if len(self.layout.ranks) > 1 else 0] for row in range(len(labels))),
            distances=torch.cat(self._distances),
            scale=scale,
            isometry=isometry,
            co_isometric=tuple(labels[row] for row in co_isometric),
            shares_before=_shares(before, self._sums[0]),
            shares_after=_shares(after, self._sums[1]),
            outside=(1 - inside.square().sum(1) / power).clamp_min(0).where(power > 0, 0.0),
            within=_changed(before, after, tolerance, chance, across=False),
            across=_changed(before, after, tolerance, chance, across=True),
            tolerance=tolerance,
        )

    def _isometry(self, components: int) -> tuple[float, Tensor, list[int]]:
        scale, found = isometry_residuals([self.weights[columns] for columns in self.layout.slices])
        wide = [row for row, rank in enumerate(self.layout.ranks) if rank > self.weights.shape[1]]
        if len(found) == components:
            return scale, found, wide
        return scale, found.expand(components).clone(), list(range(components)) if wide else []


def isometry_residuals(maps: Sequence[Float[Tensor, "_r d_clip"]]) -> tuple[float, Float[Tensor, "map"]]:
    """One scale k for all maps, and ‖WWᵀ/k − I‖ / ‖I‖ for each: WᵀW where a map has more rows than columns.

    A map of no rows has a residual of 0. k is the one of least squared residuals.
    """
    grams = [small_gram(one.double()[None])[0] for one in maps]
    sizes = [max(1, len(gram)) for gram in grams]
    traces = sum(float(gram.trace()) / size for gram, size in zip(grams, sizes, strict=True))
    squares = sum(float(gram.square().sum()) / size for gram, size in zip(grams, sizes, strict=True))
    scale = squares / traces if traces else 1.0
    found = [float((gram / (scale or 1.0) - torch.eye(len(gram)).to(gram)).norm()) for gram in grams]
    return scale, torch.tensor(found, dtype=torch.float64) / torch.tensor(sizes, dtype=torch.float64).sqrt()


def _shares(norms: Float[Tensor, "component batch"], sums: Float[Tensor, "component width"]) -> Tensor:
    count = norms.shape[1]
    variances = (norms.square().mean(1) - (sums / count).square().sum(1)).clamp_min(0)
    return variances / variances.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _changed(before: Tensor, after: Tensor, tolerance: int | float, chance: torch.Generator, *, across: bool) -> float:
    """Of pairs whose norms have a clear order before, the share that has clearly the other one after."""
    components, images = before.shape
    if (components if across else images) < 2:
        return 0.0
    rows = torch.randint(components, (2, _PAIRS), generator=chance)
    columns = torch.randint(images, (2, _PAIRS), generator=chance)
    rows[1], columns[1] = (rows[1], columns[0]) if across else (rows[0], columns[1])
    rows, columns = rows.to(before.device), columns.to(before.device)
    first, second = (_difference(norms[rows, columns], tolerance) for norms in (before, after))
    ordered = first != 0
    return float((first * second)[ordered].lt(0).double().mean()) if bool(ordered.any()) else 0.0


def _difference(norms: Float[Tensor, "2 pair"], tolerance: int | float) -> Tensor:
    """1 or −1 for which of two norms is larger; 0 where that is not clear."""
    larger = norms.amax(0)
    return torch.sign(norms[0] - norms[1]).where((norms[0] - norms[1]).abs() > tolerance * larger, 0.0)
