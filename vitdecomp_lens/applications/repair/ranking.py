"""Which components to take away first: those that carry the spurious feature, and not the core one."""

from dataclasses import dataclass

import torch

from vitdecomp_lens.cumulative import can_be_ablated
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.feature_scores import FeatureScores
from vitdecomp_lens.selecting import Names


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
    margins = scores.margins(spurious, against=core, by=by).tolist()
    kinds = None if kind is None else {kind} if isinstance(kind, str) else set(kind)
    found = [
        (component.label, margin)
        for component, margin in zip(scores.components, margins, strict=True)
        if can_be_ablated(component) and (kinds is None or component.kind in kinds)
    ]
    if not found:
        raise InputError(f"Expected components to rank; none of {len(scores)} is of kind {kind!r}.")
    found.sort(key=lambda pair: -pair[1])
    labels, ordered = zip(*found, strict=True)
    against = core if isinstance(core, str) else ", ".join(core)
    return Ranking(labels, ordered, f"{spurious} minus {against}, {by}")
