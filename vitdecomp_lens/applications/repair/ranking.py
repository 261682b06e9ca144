"""Which components to take away first: those that carry the spurious feature, and not the core one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component
from vitdecomp_lens.cumulative import Classifier, can_be_ablated
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.feature_scores import FeatureScores
from vitdecomp_lens.selecting import Names

LEAST = 0.01  # of a classifier's scores, what it goes by
SAME = 1e-5  # less than this from 1, a cosine is 1 but for rounding


@dataclass(frozen=True, repr=False)
class Ranking:
    """Components in the order in which they are suspected.

    Attributes:
        components: Labels, the most suspicious first.
        margins: By how much each scores higher for the spurious feature than for the core one.
        by: How the order came about.
    """

    components: tuple[str, ...]
    margins: tuple[float, ...]
    by: str

    def __repr__(self) -> str:
        pairs = zip(self.components[:3], self.margins, strict=False)
        first = ", ".join(f"{label} {margin:+.3f}" for label, margin in pairs)
        return f"Ranking({len(self.components)} components by {self.by}: {first}{', ...' * (len(self.components) > 3)})"

    def __len__(self) -> int:
        return len(self.components)

    def reversed(self) -> "Ranking":
        """The other way round: what a ranking has to be better than."""
        return Ranking(self.components[::-1], self.margins[::-1], f"{self.by}, reversed")

    def shuffled(self, seed: int) -> "Ranking":
        """The same components in an order by chance: what a ranking has to be better than."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        components, margins = tuple(self.components[n] for n in order), tuple(self.margins[n] for n in order)
        return Ranking(components, margins, f"chance, seed {seed}")


def rank(
    scores: FeatureScores,
    spurious: str,
    core: Names,
    *,
    by: str = "correlation",
    kind: Names | None = None,
) -> Ranking:
    """Rank components by their score for a spurious feature minus that for a core one (paper, Table 3).

    Args:
        scores: Of all components for both features, from other images than those on which the repair is judged.
        spurious: The feature that the model should not go by.
        core: The one that it should; of several the one that a component scores highest for.
        by: ``"correlation"`` or ``"covariance"``.
        kind: Only components of some kinds, such as ``"head"``. Constants and interventions are left out in any case.

    Returns:
        Labels and margins, highest first; of equal ones the first component first.

    Raises:
        UnknownNameError: If there is no such feature.
        InputError: If there is no core feature, or nothing to rank.

    Example:
        >>> from vitdecomp_lens.clip import TextBank
        >>> from vitdecomp_lens.interpret.features import score_features
        >>> from vitdecomp_lens.testbed.planted import planted_groups
        >>> planted = planted_groups(images=400)
        >>> texts = TextBank(["round", "water"], planted.directions, space="planted")
        >>> features = {"core": texts.select("round"), "spurious": texts.select("water")}
        >>> ranking = rank(score_features(planted.parts, features, bootstrap=0, permutations=0), "spurious", "core")
        >>> set(ranking.components[:3]) == set(planted.carriers)
        True
    """
    margins = scores.margins(spurious, against=core, by=by)
    against = core if isinstance(core, str) else ", ".join(core)
    return _ranked(scores.components, margins, kind, f"{spurious} minus {against}, {by}")


def rank_read(
    parts: Decomposition,
    aligned: Decomposition,
    classifier: Classifier,
    spurious: TextBank,
    core: TextBank,
    *,
    kind: Names | None = None,
    decay: float | int = 1e-3,
) -> Ranking:
    """Rank components by how much of what a classifier reads as spurious they write.

    A score does not know of the classifier. It is low for a component that writes a background against all others,
    though the classifier may read that one most. Here the classifier's scores, y = W Σ c, are first split: y = y_s +
    y_c + rest by linear regression (with a slight ridge) on what the representation has along both features' texts.
    Then W c ≈ a y_s + b y_c for each component, by least squares; it is ranked by a − b, its share of y_s minus its
    share of y_c. Classes of images are not needed, nor groups.

    Args:
        parts: Contributions of training images.
        aligned: The same in the space of texts; of a CLIP the same.
        classifier: What reads the representation: linear, such as `LinearClassifier` or a direction for each class.
        spurious: Texts of what it should not go by.
        core: Texts of what it should. Not those that it is made of: these tell all of its scores.
        kind: As for `rank`.
        decay: The penalty, as a share of the mean variance of the coordinates.

    Raises:
        InputError: If a total is missing, there is nothing to rank, one feature's texts are spanned by the other's, or
            the classifier reads nothing along one feature's texts that the other's do not tell.

    Example:
        >>> from vitdecomp_lens.linear_classifier import LinearClassifier
        >>> from vitdecomp_lens.testbed.planted import planted_groups
        >>> planted = planted_groups(images=400)
        >>> texts = TextBank(["round", "water"], planted.directions, space="planted")
        >>> classifier = LinearClassifier.fit(planted.parts.total, planted.label)
        >>> ranking = rank_read(planted.parts, planted.parts, classifier, texts.select("water"), texts.select("round"))
        >>> set(ranking.components[:3]) == set(planted.carriers)
        True
    """
    if parts.total is None or aligned.total is None:
        raise InputError("Expected contributions with their total, which the classifier reads.")
    read = classifier if callable(classifier) else lambda vectors: vectors @ classifier.T.to(vectors)
    scores = torch.stack([read(vectors) for vectors in parts.values]).double()
    scores = _centred(scores - scores.mean(2, keepdim=True), 1)  # what moves no border does not count
    whole = _centred(read(parts.total).double(), 0)
    whole = whole - whole.mean(1, keepdim=True)
    bases = [bank.subspace().to(aligned.total).double() for bank in (spurious, core)]
    if float(torch.linalg.svdvals(bases[0] @ bases[1].T).min()) > 1 - SAME:
        raise InputError("Expected texts of two features; those of one are spanned by those of the other.")
    along = [_centred(aligned.total.double() @ basis.T, 0) for basis in bases]
    both = torch.cat(along, 1)
    second = both.T @ both
    ridge = decay * second.diagonal().mean() * torch.eye(len(second)).to(second)
    weights = torch.linalg.solve(second + ridge, both.T @ whole).split([len(basis) for basis in bases])
    told = torch.stack([(x @ w).flatten() for x, w in zip(along, weights, strict=True)], 1)
    if not bool((told.norm(dim=0) > LEAST * whole.norm()).all()):
        raise InputError(
            "Expected a classifier that goes by both features; of one it reads next to nothing that the other does not"
            " tell. Rank by scores."
        )
    shares = torch.linalg.lstsq(told, scores.flatten(1).T).solution
    return _ranked(parts.components, shares[0] - shares[1], kind, "what the classifier reads")


def _centred(values: Tensor, axis: int) -> Tensor:
    return values - values.mean(axis, keepdim=True)


def _ranked(components: Sequence[Component], margins: Tensor, kind: Names | None, by: str) -> Ranking:
    kinds = None if kind is None else {kind} if isinstance(kind, str) else set(kind)
    found = [
        (component.label, margin)
        for component, margin in zip(components, margins.tolist(), strict=True)
        if can_be_ablated(component) and (kinds is None or component.kind in kinds)
    ]
    if not found:
        raise InputError(f"Expected components to rank; none of {len(components)} is of kind {kind!r}.")
    found.sort(key=lambda pair: -pair[1])
    labels, ordered = zip(*found, strict=True)
    return Ranking(labels, ordered, by)
