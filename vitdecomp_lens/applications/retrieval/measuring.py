"""How good retrieval is: precision, what else the images found share with the reference, agreement with scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitdecomp_lens.applications.retrieval.gallery import Ranking, Similarity
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.interpret.feature_scores import FeatureScores
from vitdecomp_lens.interpret.readings import refuse_other_space
from vitdecomp_lens.interpret.statistics import bootstrap_counts, interval, pearson, spearman

__all__ = ["Agreement", "Labels", "Leakage", "Precision", "leakage", "precision_at", "text_agreement"]

Labels = Int[Tensor, "image"] | Sequence[str] | Sequence[int]


@dataclass(frozen=True, eq=False, repr=False)
class Precision:
    """The share of the images found that agree with their query.

    Attributes:
        values: By query.
        base: By query, the share of all images that may be found that agree with it: what chance finds.
        k: Of how many images found.
    """

    values: Float[Tensor, "query"]
    base: Float[Tensor, "query"]
    k: int

    @property
    def mean(self) -> float:
        """Over queries."""
        return float(self.values.mean())

    @property
    def chance(self) -> float:
        """The base rate, averaged over queries."""
        return float(self.base.mean())

    def interval(self, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """The ends of the mean's interval, by drawing as many queries with replacement; the gallery stays."""
        counts = bootstrap_counts(len(self.values), resamples, seed).double()
        low, high = interval(counts @ self.values / len(self.values), level)
        return float(low), float(high)

    def __repr__(self) -> str:
        return f"Precision(at {self.k}: {self.mean:.3f}, by chance {self.chance:.3f}, query={len(self.values)})"


@dataclass(frozen=True, eq=False, repr=False)
class Leakage:
    """How often images found agree with the reference in other attributes than the one they were sought by.

    Attributes:
        shares: By attribute.
    """

    shares: Mapping[str, Precision]

    @property
    def excess(self) -> dict[str, float]:
        """By attribute, the share above the base rate; 0 where nothing leaks."""
        return {name: one.mean - one.chance for name, one in self.shares.items()}

    @property
    def mean_excess(self) -> float:
        """Averaged over attributes."""
        return sum(self.excess.values()) / len(self.shares)

    def __repr__(self) -> str:
        said = ", ".join(f"{name} {one.mean:.3f} (by chance {one.chance:.3f})" for name, one in self.shares.items())
        return f"Leakage({said})"


def precision_at(
    ranking: Ranking, labels: Labels, query_labels: Labels | None = None, *, k: int | None = None
) -> Precision:
    """The share of the k best images of each query that have its label.

    Args:
        ranking: What was found.
        labels: Of each image of the gallery, in its order: numbers, or names.
        query_labels: Of each query: a text's value, a reference's; None where queries are images of the gallery.
        k: How many of the images found to count; None for all.

    Returns:
        By query, beside the base rate: the share of the gallery's images, but the query itself, that have its label.
        Where an approximate index finds too few, those missing count as wrong.

    Raises:
        InputError: Where labels are not as many as images or queries, or there are fewer than k found.
        UnknownNameError: Where a query is no image of the gallery; where no image of the gallery has its label.

    Example:
        >>> from vitdecomp_lens.applications.retrieval import Gallery, by_image
        >>> gallery = Gallery(["a", "b", "c"], torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]))
        >>> precision_at(by_image(gallery, k=1), ["red", "blue", "red"]).values
        tensor([1., 0., 1.], dtype=torch.float64)
    """
    k = ranking.rows.shape[1] if k is None else k
    if not 1 <= k <= ranking.rows.shape[1]:
        raise InputError(f"Expected k= from 1 to the {ranking.rows.shape[1]} images found; got {k}.")
    own = _own(ranking)
    of_gallery = _as_list(labels, len(ranking.ids), "image of the gallery")
    if query_labels is None:
        of_queries = [of_gallery[row] for row in _all_own(ranking, own)]
    else:
        of_queries = _as_list(query_labels, len(ranking.queries), "query")
    return _agreeing(ranking, of_gallery, of_queries, own, k)


def leakage(
    ranking: Ranking,
    labels: Mapping[str, Labels],
    query_labels: Mapping[str, Labels] | None = None,
    *,
    sought: str,
    k: int | None = None,
) -> Leakage:
    """How often the images found for a reference share its other attributes too, beside how often any image does.

    What represents one property only finds images that agree in it and are as any others else.

    Args:
        ranking: What was found by reference images.
        labels: For each attribute the labels of the gallery's images.
        query_labels: For each the labels of the queries; None where they are images of the gallery.
        sought: The attribute that was sought, which is left out.
        k: As for `precision_at`.

    Raises:
        UnknownNameError: Where the attribute sought is not among those with labels, or queries lack an attribute.
        InputError: As `precision_at`; where there are no other attributes.
    """
    if sought not in labels:
        raise UnknownNameError(f"There are no labels of {sought!r}; {near_matches(sought, labels)}")
    others = [name for name in labels if name != sought]
    if not others:
        raise InputError(f"Expected labels of other attributes than {sought!r}; there are none.")
    for name in others:
        if query_labels is not None and name not in query_labels:
            raise UnknownNameError(f"The queries have no labels of {name!r}; {near_matches(name, query_labels)}")
    of_queries = dict.fromkeys(others) if query_labels is None else query_labels
    return Leakage({name: precision_at(ranking, labels[name], of_queries[name], k=k) for name in others})


def _own(ranking: Ranking) -> list[int | None]:
    """For each query its own number in the gallery, where it is an image of it."""
    known = {one: place for place, one in enumerate(ranking.ids)}
    return [known.get(query) for query in ranking.queries]


def _all_own(ranking: Ranking, own: Sequence[int | None]) -> list[int]:
    missing = [query for query, row in zip(ranking.queries, own, strict=True) if row is None]
    if missing:
        raise UnknownNameError(
            f"The query {missing[0]!r} is no image of the gallery, whose labels are known. Pass query_labels=."
        )
    return [row for row in own if row is not None]


def _as_list(labels: Labels, count: int, of: str) -> list[int | str]:
    found = list(labels.tolist() if isinstance(labels, Tensor) else labels)
    if isinstance(labels, str) or len(found) != count:
        raise InputError(f"Expected a label for each {of}, {count} of them; got {len(found)}.")
    return found


def _agreeing(
    ranking: Ranking, of_gallery: list[int | str], of_queries: list[int | str], own: Sequence[int | None], k: int
) -> Precision:
    codes: dict[int | str, int] = {}
    gallery = torch.tensor([codes.setdefault(label, len(codes)) for label in of_gallery])
    if unknown := [label for label in of_queries if label not in codes]:
        known = sorted(map(str, codes))
        raise UnknownNameError(
            f"No image of the gallery has the label {unknown[0]!r} of a query; {near_matches(str(unknown[0]), known)}"
        )
    queries = torch.tensor([codes[label] for label in of_queries])
    rows = ranking.rows[:, :k].cpu()
    right: Bool[Tensor, "query found"] = (gallery[rows.clamp(min=0)] == queries[:, None]) & (rows >= 0)
    itself = torch.tensor([row is not None and of_gallery[row] == of_queries[q] for q, row in enumerate(own)])
    there = torch.tensor([len(gallery) - (row is not None) for row in own])
    alike = torch.bincount(gallery, minlength=len(codes))[queries] - itself.long()
    return Precision(right.double().mean(1), alike.double() / there.clamp(min=1), k)


# --- agreement of scores with what components say ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Agreement:
    """Whether components that score high for a feature are those whose similarities to its texts go with the whole's.

    Attributes:
        features: Their names.
        labels: The components'.
        correlation: Of each component's similarity to a feature's texts with that of the CLIP's own embedding, over
            images, averaged over texts.
        spearman: For each feature the rank correlation over components of its score and that.
    """

    features: tuple[str, ...]
    labels: tuple[str, ...]
    correlation: Float[Tensor, "component feature"]
    spearman: Float[Tensor, "feature"]

    @property
    def mean(self) -> float:
        """The rank correlation averaged over features."""
        return float(self.spearman.mean())

    def __repr__(self) -> str:
        said = ", ".join(
            f"{name} {value:.3f}" for name, value in zip(self.features, self.spearman.tolist(), strict=True)
        )
        return f"Agreement({len(self.labels)} components; Spearman: {said}; mean {self.mean:.3f})"


def text_agreement(
    parts: Decomposition,
    scores: FeatureScores,
    features: Mapping[str, TextBank],
    embeddings: Float[Tensor, "batch d_clip"] | None = None,
    *,
    similarity: Similarity = "cosine",
    by: str = "correlation",
) -> Agreement:
    """The paper's measure of retrieval by text (arXiv 2406.01583, section 5).

    For each component i and text t, over images: the correlation of sim(f_i(c_i), t) with sim(z_CLIP, t); averaged over
    a feature's texts. Spearman's correlation over components compares that with score(i, feature).

    Args:
        parts: Contributions in the space of the texts, to images that had no part in scoring if that is to be fair.
        scores: Of the same components and features.
        features: The features' texts.
        embeddings: The CLIP's own of the same images; None for the whole of ``parts``.
        similarity: ``"cosine"``, as in the paper, or ``"dot"``.
        by: Which scores, ``"correlation"`` or ``"covariance"``.

    Returns:
        For the components that the scores have.

    Raises:
        InputError: Where spaces or numbers of images differ, or there are fewer than two images or components.
        UnknownNameError: Where the scores lack a feature, or the parts a component.
    """
    for name, bank in features.items():
        if name not in scores.features:
            raise UnknownNameError(f"The scores have no feature {name!r}; {near_matches(name, scores.features)}")
        refuse_other_space(parts.metadata, bank)
        if bank.space != scores.space:
            raise InputError(f"Expected texts of the space of the scores, {scores.space!r}; got {bank.space!r}.")
    if not features:
        raise InputError("Expected at least one feature; got none.")
    whole = parts.total if embeddings is None else embeddings
    values = parts.select(labels=scores.labels).values.double()
    if whole is None or len(whole) != values.shape[1]:
        raise InputError(
            f"Expected the CLIP's embeddings of the {values.shape[1]} images; got "
            f"{'none, and the total is not known' if whole is None else len(whole)}."
        )
    table = getattr(scores, by) if by in ("correlation", "covariance") else None
    if table is None:
        raise InputError(f"Expected by='correlation' or by='covariance'; got by={by!r}.")
    found = []
    for bank in features.values():
        of_parts = _similar(values, bank.directions, similarity)
        of_whole = _similar(whole.to(values)[None], bank.directions, similarity)
        found.append(pearson(of_parts, of_whole).mean(1))
    correlation = torch.stack(found, 1)
    columns = [scores.features.index(name) for name in features]
    agreement = spearman(table[:, columns].T.to(correlation), correlation.T)
    return Agreement(tuple(features), scores.labels, correlation, agreement)


def _similar(
    values: Float[Tensor, "component batch d_clip"], texts: Float[Tensor, "text d_clip"], similarity: Similarity
) -> Float[Tensor, "component text batch"]:
    if values.shape[-1] != texts.shape[1]:
        raise InputError(f"Expected vectors of the texts' width, {texts.shape[1]}; got {values.shape[-1]}.")
    if similarity == "cosine":
        values = torch.nn.functional.normalize(values, dim=-1)
    return einsum(values, texts.to(values), "component batch d_clip, text d_clip -> component text batch")
