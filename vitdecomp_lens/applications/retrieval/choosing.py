"""How many components to take for a property: chosen on validation data."""

from collections.abc import Sequence
from dataclasses import dataclass

from vitdecomp_lens.applications.retrieval.gallery import Gallery
from vitdecomp_lens.applications.retrieval.measuring import Labels, Precision, precision_at
from vitdecomp_lens.applications.retrieval.ranking import by_image, by_text
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.feature_scores import FeatureScores
from vitdecomp_lens.selecting import Names

__all__ = ["COUNTS", "Choice", "choose_count"]

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, eq=False, repr=False)
class Choice:
    """Which components to retrieve by, and how that was found.

    Attributes:
        feature: The property.
        components: The chosen ones, of the largest margin first.
        tried: The precision of each number of components tried, on validation data.
        whole: The precision of the full representation there.
    """

    feature: str
    components: tuple[str, ...]
    tried: dict[int, Precision]
    whole: Precision

    @property
    def count(self) -> int:
        """How many."""
        return len(self.components)

    def __repr__(self) -> str:
        said = ", ".join(f"{count}: {one.mean:.3f}" for count, one in self.tried.items())
        return f"Choice({self.feature!r}: {self.count} components; {said}; the whole: {self.whole.mean:.3f})"


def choose_count(
    parts: Decomposition,
    scores: FeatureScores,
    feature: str,
    labels: Labels,
    *,
    counts: Sequence[int] = COUNTS,
    at: int = 10,
    texts: TextBank | None = None,
    against: Names | None = None,
    by: str = "correlation",
) -> Choice:
    """How many of the components that are for a property and not for others serve best, on validation images.

    The components are ``scores.select(feature, k=count)``: those of the largest smallest difference of scores for this
    feature and the others (arXiv 2406.01583, section 5). Each image is sought by all others in turn, or all by texts.

    Args:
        parts: Contributions to validation images, which are not those that results are reported on.
        scores: Of these components.
        feature: The property.
        labels: Of the validation images, in the property.
        counts: Those to try; those beyond the number of components count as all of them.
        at: Of how many images found the precision is.
        texts: What to seek by instead of images: one for each label, in their order.
        against: As for `FeatureScores.select`.
        by: The same.

    Returns:
        The number of the highest precision, of equal ones the smallest.

    Raises:
        InputError: Where there are no counts, or one below 1; where labels are not as many as images, or there are not
            more than ``at``.
        UnknownNameError: Where there is no such feature or component.

    Example:
        >>> import torch
        >>> from vitdecomp_lens.clip import TextBank
        >>> from vitdecomp_lens.interpret.features import score_features
        >>> from vitdecomp_lens.testbed.planted import planted_features
        >>> planted = planted_features(images=60, d_clip=16, features=2, noise=0.0)
        >>> bank = TextBank(["red", "round"], planted.directions, space="planted")
        >>> features = {name: bank.select(name) for name in bank.texts}
        >>> scores = score_features(planted.parts, features, bootstrap=0, permutations=0)
        >>> choose_count(planted.parts, scores, "red", (planted.factors[:, 0] > 0).long(), counts=(1, 2), at=5).count
        1
    """
    tried_counts = sorted({min(count, len(scores)) for count in counts})
    if not tried_counts or tried_counts[0] < 1:
        raise InputError(f"Expected counts= of at least 1, at least one of them; got {list(counts)!r}.")
    if not 1 <= at < parts.values.shape[1]:
        raise InputError(f"Expected at= from 1 to below the {parts.values.shape[1]} images; got {at}.")
    ranked = scores.select(feature, against=against, k=tried_counts[-1], by=by)

    def precision(components: Sequence[str] | None) -> Precision:
        gallery = Gallery.of(parts, components=components)
        if texts is None:
            return precision_at(by_image(gallery, k=at), labels)
        return precision_at(by_text(gallery, texts, k=at), labels, range(len(texts)))

    tried = {count: precision(ranked[:count]) for count in tried_counts}
    best = max(tried_counts, key=lambda count: (tried[count].mean, -count))
    return Choice(feature, ranked[:best], tried, precision(None))
