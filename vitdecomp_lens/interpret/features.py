"""How much each component has to do with a feature: scores over images, and how sure they are.

A feature is a set of texts and the subspace they span. What a component writes into that subspace is compared with what
the whole representation has there, over images: by correlation, as the paper (arXiv 2406.01583) does, and by
covariance, which sums over components to the variance of the whole. Everything is projected onto the subspaces first,
so that resampling images costs little.
"""

from collections.abc import Mapping

import torch

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret import statistics
from vitdecomp_lens.interpret.feature_scores import BY, LEVEL, FeatureScore, FeatureScores, TextNull
from vitdecomp_lens.interpret.scoring import Parts, Request, refuse_features, scored
from vitdecomp_lens.selecting import Names

__all__ = ["FeatureScore", "FeatureScores", "TextNull", "probe", "score_features", "text_null"]


def score_features(
    parts: Parts,
    features: Mapping[str, TextBank],
    *,
    bootstrap: int = 200,
    permutations: int | None = None,
    level: float = LEVEL,
    seed: int = 0,
    max_bytes: int = 2**30,
) -> FeatureScores:
    """Score every component for every feature, with intervals and p-values.

    B is the symmetric orthonormal basis of a feature's texts (`TextBank.subspace`: it does not depend on their order),
    s_C = contribution Bᵀ and s_Z = Σ contributions Bᵀ. A score compares the two over images, along each basis vector:
    the *correlation* is averaged over these, the *covariance* summed, and sums over all components to the variance of
    s_Z. Where components are missing, as after ``parts.select``, the whole is the model's total, and ``rest`` is what
    the missing ones account for.

    *Intervals* are percentiles over images drawn with replacement. *p-values* hold a score against those that it would
    have if what the component writes had nothing to do with what all others write: its images are put into another
    order, in s_C and within s_Z alike, because a component is a part of the whole and so correlates with it in any
    case. The p-value is the share of orders whose score is as far from the mean of all, upwards or downwards, the true
    order being one of them. If images come independently of each other, it is exact for any number of them.

    A component that does not vary has scores of 0 and a p-value of 1: a constant, a position embedding.

    Args:
        parts: Contributions in the space of the texts, as ``parts.map(aligner)`` gives them; or several batches of
            them, each looked at once and let go: ``(store.decomposition(s).map(aligner) for s in slices)``.
        features: Texts for each feature's name: ``{"colour": bank.select([...])}``.
        bootstrap: How many resamples the intervals are from; 0 for none.
        permutations: How many orders the p-values are from, at least; 0 for none. There are as many as images if that
            is more. A p-value is never below 1 / orders: among n components `FeatureScores.significant` finds a single
            one only with 20 n orders. None is for so many, 1,000 at least and 65,536 at most (beyond 3,276 components,
            as of neurons, several have to stand out together). Cost is components · dimensions · orders:
            0.1 s for 170 components, 4 dimensions and 4,000 orders, some minutes for tens of thousands of components.
        level: Of the intervals.
        seed: Of resamples and orders.
        max_bytes: Memory for what all components write along the features. Of a decomposition, features are scored a
            few at a time to keep to it.

    Returns:
        On the device of the contributions, in their dtype, at least float32.

    Raises:
        InputError: Where parts and texts are not of one space, there is no feature or no component, there are fewer
            than 4 images, contributions have NaN or Inf, no total is known, or an option is out of range.
        CapacityError: Where more than ``max_bytes`` are needed.

    Warns:
        VitDecompWarning: Where a feature's texts span fewer dimensions than they are many.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_features
        >>> planted = planted_features(images=200, d_clip=16, components=8, features=2, dtype=torch.float64)
        >>> texts = TextBank(["red", "striped"], planted.directions, space="planted")
        >>> features = {"colour": texts.select("red"), "pattern": texts.select("striped")}
        >>> scores = score_features(planted.parts, features, bootstrap=50)
        >>> scores
        FeatureScores(component=8, feature=2: 8 head (layers 0, 1); 'planted', 200 images, 50 resamples, 1000 orders)
        >>> torch.allclose(scores.covariance.sum(0), scores.total)
        True
    """
    refuse_features(features)
    banks = list(features.values())
    bases = [bank.subspace() for bank in banks]
    request = Request(tuple(features), bases, banks[0], bootstrap, permutations, level, seed, max_bytes)
    return scored(parts, request)


def probe(
    parts: Parts,
    bank: TextBank,
    *,
    texts: Names | None = None,
    bootstrap: int = 200,
    permutations: int | None = None,
    level: float = LEVEL,
    seed: int = 0,
    max_bytes: int = 2**30,
) -> FeatureScores:
    """Score every component for every text: a feature of its own each.

    It answers both ways round: ``probe(...).top("a cat")`` is which components are for a text, and
    ``probe(...).top_features("L3H7")`` which texts are for a component. For one component only, select it from the
    contributions first (the whole is then their total); for a large bank without intervals, pass ``bootstrap=0`` and
    ``permutations=0``.

    Args:
        parts: As for `score_features`.
        bank: The texts.
        texts: Some of them; None for all.
        bootstrap: As for `score_features`, like all that follow.
        permutations: How many orders at least; 0 for none, None for as many as components need.
        level: Of the intervals.
        seed: Of resamples and orders.
        max_bytes: Memory for what all components write along the texts.

    Raises:
        InputError: As `score_features`.
        UnknownNameError: Where a text is not in the bank.
        CapacityError: Where more than ``max_bytes`` are needed.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_spans
        >>> planted = planted_spans(images=50, d_clip=16, texts=20, components=2)
        >>> bank = TextBank(planted.texts, planted.directions, space="planted")
        >>> scores = probe(planted.parts, bank, texts=planted.chosen["L0H1"])
        >>> scores.top_features("L0H1", 1, by="covariance")[0][0] == planted.chosen["L0H1"][0]
        True
    """
    if not isinstance(bank, TextBank):
        raise InputError(f"Expected a TextBank; got {type(bank).__name__}.")
    bank = bank if texts is None else bank.select(texts)
    bases = list(bank.directions[:, None])
    return scored(parts, Request(bank.texts, bases, bank, bootstrap, permutations, level, seed, max_bytes))


def text_null(
    parts: Decomposition,
    features: Mapping[str, TextBank],
    bank: TextBank,
    *,
    draws: int = 200,
    seed: int = 0,
    max_bytes: int = 2**30,
) -> TextNull:
    """Hold features against random texts: would any others of a bank score as high?

    A component that varies much may score high for whatever is asked, and texts of one model all point into one half
    of its space. Each draw is as many texts of the bank as the feature has, without replacement, scored alike. It
    costs a projection of all contributions onto ``draws`` times the feature's texts, once for each number of texts
    that features have.

    Args:
        parts: As for `score_features`.
        features: As for `score_features`.
        bank: Where the random texts are from; many more than a feature has. If the features' banks were centred, it
            should be, by the same mean.
        draws: How many sets of texts.
        seed: Of what is drawn.
        max_bytes: As for `score_features`.

    Raises:
        InputError: As `score_features`; and where the bank is of another space, or has no more texts than a feature.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_spans
        >>> planted = planted_spans(images=50, d_clip=64, texts=60, components=2)
        >>> bank = TextBank(planted.texts, planted.directions, space="planted")
        >>> null = text_null(planted.parts, {"its own": bank.select(planted.chosen["L0H1"])}, bank, draws=99)
        >>> null.correlation_p[1]
        tensor([0.0100])
    """
    if not isinstance(parts, Decomposition):
        raise InputError(f"Expected a Decomposition, since it is read several times; got {type(parts).__name__}.")
    if draws < 1:
        raise InputError(f"Expected draws= of at least 1; got {draws}.")
    refuse_features({**features, "the bank of random texts": bank})
    sizes = [len(of) for of in features.values()]
    if max(sizes, default=0) >= len(bank):
        raise InputError(
            f"Expected a bank of more texts than a feature has, which are up to {max(sizes)}; got {len(bank)}."
        )
    plain = {"bootstrap": 0, "permutations": 0, "seed": seed, "max_bytes": max_bytes}
    own = score_features(parts, features, **plain)
    found = {}
    for size in set(sizes):
        drawn = statistics.permutations(len(bank), draws, seed)[:, :size].tolist()
        bases = [bank.select([bank.texts[number] for number in numbers]).subspace() for numbers in drawn]
        names = tuple(f"draw {number}" for number in range(draws))
        found[size] = scored(parts, Request(names, bases, bank, 0, 0, LEVEL, seed, max_bytes))
    by = {name: torch.stack([getattr(found[size], name).T for size in sizes], -1) for name in BY}
    p = {f"{name}_p": ((by[name] >= getattr(own, name)).sum(0) + 1) / (draws + 1) for name in BY}
    return TextNull(
        components=own.components, features=own.features, **by, **{n: v.to(own.total) for n, v in p.items()}
    )
