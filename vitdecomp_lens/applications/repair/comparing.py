"""What else can be done about a spurious feature: what a repair by components is held against.

`Ranking.shuffled` and `Ranking.reversed` are two comparisons more.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.applications.repair.groups import Groups
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.linear_classifier import DECAY, LinearClassifier


def balanced_probe(
    representations: Float[Tensor, "batch d_rep"],
    labels: Int[Tensor, "_"],
    groups: Groups,
    *,
    decay: float | int = DECAY,
    seed: int = 0,
) -> LinearClassifier:
    """Fit the last layer again, on as many images of each group as the smallest one has.

    It needs to know the groups of training images, which a repair by components does not (deep feature reweighting,
    Kirichenko et al. 2023, arXiv 2204.02937).

    Args:
        representations: Of training images.
        labels: Their classes.
        groups: Their groups.
        decay: As for `LinearClassifier.fit`.
        seed: Of which images are taken.

    Raises:
        InputError: If a group has no images, or the lengths differ.

    Example:
        >>> x, labels = torch.tensor([[-1.0], [-2.0], [-2.0], [1.0]]), torch.tensor([0, 0, 0, 1])
        >>> balanced_probe(x, labels, Groups.crossing(label=labels))(x).argmax(1)
        tensor([0, 0, 0, 1])
    """
    if not len(representations) == len(labels) == len(groups):
        raise InputError(
            f"Expected a label and a group for each representation; got {len(representations)} representations,"
            f" {len(labels)} labels and {len(groups)} groups."
        )
    groups.refuse_empty()
    smallest, chance = int(groups.counts.min()), torch.Generator().manual_seed(seed)
    taken = []
    for number in range(len(groups.names)):
        rows = (groups.numbers.cpu() == number).nonzero().flatten()
        taken.append(rows[torch.randperm(len(rows), generator=chance)[:smallest]])
    which = torch.cat(taken).sort().values.to(representations.device)
    return LinearClassifier.fit(representations[which], labels[which.to(labels.device)], decay=decay)


def project_out(
    representations: Float[Tensor, "batch d_rep"],
    basis: Float[Tensor, "rank _"],
    *,
    mean: Float[Tensor, "d_rep"] | None = None,
) -> Float[Tensor, "batch d_rep"]:
    """Take a subspace out of representations, z − (z − mean) Bᵀ B: within it, all are at the mean.

    Args:
        representations: Of any images. In a CLIP's space, that of the texts; else see `span_that_predicts`.
        basis: Orthonormal rows, as ``bank.subspace()`` gives them.
        mean: Of training data; without it, zero.

    Raises:
        InputError: If the basis is of another width, or not orthonormal.

    Example:
        >>> project_out(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([[0., 1.]])
    """
    rows = basis.double()
    if rows.shape[1] != representations.shape[1]:
        raise InputError(
            f"Expected a basis of rows as wide as representations, {representations.shape[1]}; got {list(rows.shape)}."
        )
    if not torch.allclose(rows @ rows.T, torch.eye(len(rows)).to(rows), rtol=0, atol=1e-4):
        raise InputError("Expected a basis with orthonormal rows; make one with bank.subspace() or torch.linalg.qr.")
    rows = rows.to(representations)
    centred = representations if mean is None else representations - mean.to(representations)
    return representations - centred @ rows.T @ rows


def span_that_predicts(
    representations: Float[Tensor, "batch d_rep"],
    coordinates: Float[Tensor, "batch rank"],
    *,
    decay: float | int = 1e-3,
) -> Float[Tensor, "rank d_rep"]:
    """The directions of a representation from which coordinates along texts are best predicted.

    A model that is no CLIP has no texts in its own space, and its aligner maps each component by itself. So that a
    spurious subspace can be projected out of its representation too, this fits the texts' coordinates of the aligned
    representation, ``parts.map(aligner).total @ bank.subspace().T``, by ridge regression.

    Args:
        representations: Of training images.
        coordinates: The same images' along a basis of texts.
        decay: The penalty, as a share of the mean variance of the representation's coordinates.

    Returns:
        An orthonormal basis, for `project_out`.

    Raises:
        InputError: If coordinates do not vary, or the representation says nothing of one.

    Example:
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> span_that_predicts(x, 2 * x[:, :1]).abs().round(decimals=2)
        tensor([[1., 0., 0.]])
    """
    x = representations.double() - representations.double().mean(0)
    y = coordinates.double() - coordinates.double().mean(0)
    second = x.T @ x / len(x)
    weighed = second + decay * second.diagonal().mean() * torch.eye(len(second)).to(second)
    found = torch.linalg.solve(weighed, x.T @ y / len(x))
    left, lengths, _ = torch.linalg.svd(found, full_matrices=False)
    if not float(lengths[-1]) > 1e-10 * float(lengths[0]) or y.shape[1] > x.shape[1]:
        raise InputError(
            f"Expected {y.shape[1]} coordinates that vary by themselves; representations tell fewer apart. Take fewer"
            " texts, or more images."
        )
    return left.T.to(representations)
