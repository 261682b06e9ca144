"""Components that no image tells from each other, or from the bias: constants that one norm divides by one number.

Each writes along one direction, and how much it writes is, from image to image, the same series for all of them but for
a factor. Whatever maps they have, images show the sum only, which is one vector: maps of single ones would drift apart
without a loss, and other components' maps would make up for what they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Inseparable:
    """Some components that write the same series of amounts, each along a direction of its own.

    Attributes:
        rows: Which components.
        vectors: What each writes where the series is 1; its mean square over images is 1.
        constant: Whether the series is the same number for all images: then the bias cannot be told from them either.
    """

    rows: tuple[int, ...]
    vectors: Float[Tensor, "member d_rep"]
    constant: bool

    def basis(self, least: float) -> Float[Tensor, "d_rep rank"]:
        """The direction of their sum; none where it is less than that share of what they write."""
        total = self.vectors.sum(0)
        if float(total.norm()) <= least * float(self.vectors.norm()):
            return total.new_empty(len(total), 0)
        return (total / total.norm())[:, None]


class Series:
    """How much each component writes along one of its own vectors, image by image: products summed over images."""

    def __init__(self) -> None:
        self.count = 0
        self._directions: Tensor | None = None
        self._products: Tensor | None = None

    def add(self, values: Float[Tensor, "component batch d_rep"]) -> None:
        """Add images. What is largest in the first ones is the direction for all."""
        if self._directions is None or self._products is None:
            largest = values[torch.arange(len(values)), values.norm(dim=-1).argmax(1)]
            self._directions = torch.nn.functional.normalize(largest, dim=-1)
            self._products = values.new_zeros(len(values) + 1, len(values) + 1, dtype=torch.float64)
        series = torch.bmm(values, self._directions[:, :, None])[..., 0]
        series = torch.cat([series, torch.ones_like(series[:1])]).double()
        self._products += series @ series.T
        self.count += series.shape[1]

    def inseparable(self, bases: Sequence[Tensor], least: float) -> tuple[Inseparable, ...]:
        """Which components cannot be told from each other; and, before them, which cannot from a bias.

        Args:
            bases: Of the components' spans, as columns. Only components with spans of one dimension are looked at.
            least: The share of a series that has to differ from a multiple of another one.
        """
        ones = len(bases)  # the last series is 1 everywhere
        together: dict[int, list[int]] = {ones: []}
        for row, basis in enumerate(bases):
            if basis.shape[1] == 1 and self._product(row, row) > 0:
                leader = next((other for other in together if self._apart(row, other) <= least), row)
                together.setdefault(leader, []).append(row)
        return tuple(
            Inseparable(tuple(rows), self._vectors(rows, leader, bases), leader == ones)
            for leader, rows in together.items()
            if len(rows) > 1 or (rows and leader == ones)
        )

    def _product(self, one: int, other: int) -> float:
        assert self._products is not None
        return float(self._products[one, other])

    def _apart(self, one: int, other: int) -> float:
        """How much of one series is no multiple of the other; the same for both."""
        squares = self._product(one, one) * self._product(other, other)
        return max(0.0, 1 - self._product(one, other) ** 2 / squares) ** 0.5

    def _vectors(self, rows: Sequence[int], leader: int, bases: Sequence[Tensor]) -> Tensor:
        assert self._directions is not None
        unit = (self._product(leader, leader) * self.count) ** 0.5
        vectors = []
        for row in rows:
            basis = bases[row][:, 0]  # more precise than what one image shows, but for the sign
            along = 1 if float(basis @ self._directions[row].to(basis)) > 0 else -1
            vectors.append(along * self._product(row, leader) / unit * basis)
        return torch.stack(vectors)
