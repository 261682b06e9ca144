"""Ranking a gallery: by a text, or by how like a reference image it is in what the gallery's components write."""

from collections.abc import Sequence

from vitdecomp_lens.applications.retrieval.gallery import Gallery, Ranking, Similarity
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.errors import InputError

__all__ = ["by_image", "by_text"]


def by_text(gallery: Gallery, bank: TextBank, k: int = 10, *, similarity: Similarity = "dot") -> Ranking:
    """Rank images by ⟨Σ of chosen components, text⟩ (arXiv 2406.01583, section 5).

    Args:
        gallery: Of contributions in the space of texts: ``Gallery.of(parts.map(aligner), components=...)``.
        bank: A query for each text.
        k: How many images for each.
        similarity: ``"dot"`` is the paper's; ``"cosine"`` does not count how much is written in all.

    Raises:
        InputError: Where texts and images are of different spaces, or k is below 1.

    Example:
        >>> import torch
        >>> from vitdecomp_lens.testbed.planted import planted_features
        >>> planted = planted_features(images=50, d_clip=16, features=2, noise=0.0)
        >>> bank = TextBank(["striped", "red"], planted.directions, space="planted")
        >>> found = by_text(Gallery.of(planted.parts), bank, k=1)["red"][0][0]
        >>> int(found) == int(planted.factors[:, 1].argmax())
        True
    """
    gallery.refuse_other(bank.space, bank.directions.shape[1])
    return gallery.search(bank.directions, k, similarity=similarity, names=bank.texts)


def by_image(
    gallery: Gallery,
    references: Gallery | Sequence[str] | None = None,
    k: int = 10,
    *,
    similarity: Similarity = "cosine",
) -> Ranking:
    """Rank images by how like reference images they are, in what the chosen components write.

    For one property p, take the components that are for p and not for others (arXiv 2406.01583, section 5), in all of
    it: ``Gallery.of(parts, components=scores.select("colour", k=8))``; z_p is their sum, and the similarity its cosine.

    Args:
        gallery: Where to look.
        references: A gallery of the same components, of other images or of some that the first has too; or ids of
            images of the gallery; None for all of them. No image is found for itself.
        k: How many images for each.
        similarity: ``"cosine"`` is the paper's.

    Raises:
        InputError: Where the references are of another space or other components, or there is nothing to find.
        UnknownNameError: Where there is no such image.

    Example:
        >>> import torch
        >>> gallery = Gallery(["a", "b", "c"], torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]))
        >>> by_image(gallery, ["a"], k=1)["a"][0][0]
        'c'
    """
    others = gallery if references is None else references
    others = others if isinstance(others, Gallery) else gallery.images(others)
    if others.components != gallery.components:
        raise InputError(
            f"Expected references of the gallery's components, {_said(gallery)}; got {_said(others)}. Sum the same for "
            f"both."
        )
    gallery.refuse_other(others.space, others.vectors.shape[1])
    known = {one: place for place, one in enumerate(gallery.ids)}
    own = [known.get(one) for one in others.ids]
    return gallery.search(others.vectors, k, similarity=similarity, without=own, names=others.ids)


def _said(gallery: Gallery) -> str:
    return "the whole representation" if gallery.components is None else f"{list(gallery.components[:5])!r}"
