"""Second moments of contributions, streamed: the span that each component writes into, and what all share there.

A head writes into d_head of the d_rep dimensions. In the coordinates of the components' spans, all that a linear fit
needs is one table of moments; it is summed in float64, piece by piece, and pieces can be summed in any order.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitdecomp_lens.clip.inseparable import Inseparable, Series
from vitdecomp_lens.clip.sources import AlignmentSource, Piece, checked, some_of
from vitdecomp_lens.errors import InputError

RANK_TOLERANCE = 1e-3
_LEAST_IMAGES, _IMAGES_PER_DIMENSION = 1024, 8  # that show a span
_ADDED = 512  # of them, at least, are added at a time
_AT_ONCE = 2**17  # numbers in the products that are made together
_ROUNDING = 16  # units in the last place that sums of products in at most single precision are taken to be off


class Moments:
    """Count, mean and centred scatter of every component, summed over whatever is added.

    Args:
        components: How many components.
        d_rep: How wide they are.
        device: Where the sums are kept.

    Example:
        >>> values = torch.randn(2, 5, 3, dtype=torch.float64)
        >>> one, two = Moments(2, 3), Moments(2, 3)
        >>> one.add(values[:, :2])
        >>> two.add(values[:, 2:])
        >>> one.merge(two)
        >>> one.count, torch.allclose(one.mean, values.mean(1))
        (5, True)
    """

    def __init__(self, components: int, d_rep: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(components, d_rep, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(components, d_rep, d_rep, dtype=torch.float64, device=device)

    def add(self, values: Float[Tensor, "component batch d_rep"]) -> None:
        """Add images. Products are made in the dtype of the values, once centred."""
        if not values.shape[1]:
            return
        mean = values.mean(1, dtype=torch.float64)
        group = max(1, _AT_ONCE // values.shape[2] ** 2)
        for first in range(0, len(values), group):  # few at a time: what they need stays in the processor's cache
            rows = slice(first, first + group)
            centred = values[rows] - mean[rows, None].to(values.dtype)
            self.scatter[rows] += centred.mT @ centred
        self._join(values.shape[1], mean)

    def merge(self, other: "Moments") -> None:
        """Add what another has summed."""
        self.scatter += other.scatter
        self._join(other.count, other.mean)

    def _join(self, count: int, mean: Tensor) -> None:
        """Take the two means for one: what lies between them is scatter too."""
        together = self.count + count
        if not together:
            return
        between = mean - self.mean
        weight = self.count * count / together
        self.scatter += weight * between[:, :, None] * between[:, None, :]
        self.mean += between * (count / together)
        self.count = together

    def bases(
        self, *, rounding: float, tolerance: float = RANK_TOLERANCE, max_rank: int | None = None
    ) -> list[Float[Tensor, "d_rep rank"]]:
        """An orthonormal basis of what each component writes into, as columns; float64.

        Directions of most variance come first. One counts if its standard deviation is above ``tolerance`` times the
        component's largest, and above rounding. What the mean has outside of them is a direction too, so that a
        constant spans one dimension; a component that writes nothing spans none.

        Args:
            rounding: The precision of the values, as `torch.finfo` gives it; of those that are half-precision, half's,
                although their sums were made in more.
            tolerance: From where on a direction counts.
            max_rank: How many directions to keep at most.
        """
        rounding, found = _summed(rounding), []
        group = max(1, _AT_ONCE // self.mean.shape[1] ** 2)  # small ones together; of large ones, one table at a time
        for first in range(0, len(self.mean), group):
            rows = slice(first, first + group)
            found += _bases(self.scatter[rows] / max(self.count, 1), self.mean[rows], rounding, tolerance)
        return [basis[:, :max_rank].clone() for basis in found]  # without what it is a view of


def _summed(rounding: float) -> float:
    """What rounding adds to a vector is at most half of this share of its length. Sums are off by more."""
    return max(rounding, _ROUNDING * min(rounding, torch.finfo(torch.float32).eps))


def _bases(covariances: Tensor, means: Tensor, rounding: float, tolerance: float) -> list[Tensor]:
    variances, directions = torch.linalg.eigh(covariances)
    variances, directions = variances.clamp_min(0).flip(1), directions.flip(2)
    deviations, sizes = variances.sqrt(), (means.square().sum(1) + variances.sum(1)).sqrt()
    ranks = (deviations > torch.maximum(tolerance * deviations[:, 0], rounding * sizes)[:, None]).sum(1).tolist()
    found = []
    for mean, axes, rank, size in zip(means, directions, ranks, sizes.tolist(), strict=True):
        basis = axes[:, :rank]
        outside = mean - basis @ (basis.T @ mean)
        if float(outside.norm()) > max(tolerance, rounding) * size and rank < len(mean):
            basis = torch.cat([basis, (outside / outside.norm())[:, None]], 1)
            basis = torch.linalg.qr(basis).Q  # being a remainder, it is not quite orthogonal
        found.append(basis)
    return found


@dataclass(frozen=True)
class Layout:
    """Which coordinates are whose. Components of equal rank stand together, so that they can be one stack of maps.

    Attributes:
        ranks: The dimension of each component's span.

    Example:
        >>> layout = Layout((3, 1, 3))
        >>> layout.slices, layout.width
        ((slice(1, 4, None), slice(0, 1, None), slice(4, 7, None)), 7)
    """

    ranks: tuple[int, ...]

    @property
    def width(self) -> int:
        """How many coordinates there are."""
        return sum(self.ranks)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The components in the order of their coordinates."""
        return tuple(sorted(range(len(self.ranks)), key=self.ranks.__getitem__))

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The coordinates of each component."""
        found, start = {}, 0
        for row in self.order:
            found[row] = slice(start, start + self.ranks[row])
            start += self.ranks[row]
        return tuple(found[row] for row in range(len(self.ranks)))

    @cached_property
    def stacks(self) -> tuple[tuple[int, int, slice], ...]:
        """Rank, number of components, and coordinates, for each rank above zero."""
        found = []
        for rank in sorted(set(self.ranks) - {0}):
            rows = [row for row in self.order if self.ranks[row] == rank]
            found.append((rank, len(rows), slice(self.slices[rows[0]].start, self.slices[rows[-1]].stop)))
        return tuple(found)

    def blocks(self, most: int) -> list[list[int]]:
        """Components in blocks of at most ``most`` coordinates (or one component), in their order."""
        blocks: list[list[int]] = [[]]
        for row in self.order:
            if blocks[-1] and sum(self.ranks[other] for other in blocks[-1]) + self.ranks[row] > most:
                blocks.append([])
            blocks[-1].append(row)
        return blocks


@dataclass(frozen=True, eq=False)
class Spans:
    """An orthonormal basis for each part that has a map of its own: a component, or the sum of inseparable ones.

    Attributes:
        layout: Which columns are whose.
        basis: All bases, side by side.
        members: Which components each part is the sum of. Those that the bias cannot be told from are in none.
        inseparable: The components that share a part, or the bias.
    """

    layout: Layout
    basis: Float[Tensor, "d_rep coordinate"]
    members: tuple[tuple[int, ...], ...]
    inseparable: tuple[Inseparable, ...] = ()

    @classmethod
    def of(
        cls,
        bases: Sequence[Tensor],
        dtype: torch.dtype,
        inseparable: Sequence[Inseparable] = (),
        least: float = RANK_TOLERANCE,
    ) -> "Spans":
        """Spans of the components' bases. A sum that is less than ``least`` of its terms spans nothing."""
        taken = {row for group in inseparable for row in group.rows}
        parts: dict[tuple[int, ...], Tensor] = {(row,): basis for row, basis in enumerate(bases) if row not in taken}
        parts |= {group.rows: group.basis(least) for group in inseparable if not group.constant}
        layout = Layout(tuple(basis.shape[1] for basis in parts.values()))
        found = list(parts.values())
        basis = torch.cat([found[part] for part in layout.order] or [bases[0][:, :0]], 1).to(dtype)
        return cls(layout, basis, tuple(parts), tuple(inseparable))

    def project(
        self, values: Float[Tensor, "component batch d_rep"], *, into: Float[Tensor, "batch coordinate"] | None = None
    ) -> Float[Tensor, "batch coordinate"]:
        """Each part's coordinates in its own span, all of them side by side; written into a table, if one is given."""
        basis = self.basis.to(values)
        into = values.new_empty(values.shape[1], self.layout.width) if into is None else into
        for rows, columns in zip(self.members, self.layout.slices, strict=True):
            vectors = values[rows[0]] if len(rows) == 1 else values[list(rows)].sum(0)
            torch.mm(vectors, basis[:, columns], out=into[:, columns])
        return into


def spans_of(
    source: AlignmentSource,
    held_out: Bool[Tensor, "image"],
    *,
    tolerance: float,
    max_rank: int | None,
    max_bytes: int,
    seed: int,
) -> Spans:
    """The spans of all components, over images that are not held out, and which of them no image tells apart.

    They are taken from 8 images a dimension, and 1,024 at least, drawn by the seed; a report tells what other images
    have outside. Where moments of all components at once would need more than ``max_bytes``, images are read once for
    each group of components that fits.

    Raises:
        InputError: Where images cannot be used, all targets are the same, or no component writes anything that is not
            the same for all images.
    """
    bases: list[Tensor] = []
    dtype, group, rounding, series = torch.float32, 0, 0.0, Series()
    while len(bases) < len(source.components):
        moments: Moments | None = None
        for values, targets, precision, last in _portions(source, held_out, seed):
            if moments is None:
                group = max(1, max_bytes // (8 * values.shape[2] ** 2))
                rows = slice(len(bases), min(len(bases) + group, len(source.components)))
                moments, dtype = Moments(rows.stop - rows.start, values.shape[2], values.device), values.dtype
                start, differ = targets[:1], False
            rounding = max(rounding, precision)
            differ = differ or bool((targets != start).any())
            moments.add(values[rows])
            if not bases:
                series.add(values)
            if differ and last:
                break
        if moments is None or not differ:
            raise InputError("Expected targets that differ from image to image; they are all the same.")
        bases += moments.bases(rounding=rounding, tolerance=tolerance, max_rank=max_rank)
    least = max(tolerance, _summed(rounding))
    spans = Spans.of(bases, dtype, series.inseparable(bases, least), least)
    if not spans.layout.width:
        what = "are the same for all images" if any(basis.shape[1] for basis in bases) else "of them are zero"
        raise InputError(f"Expected contributions to align; all {what}.")
    return spans


class _Portion(NamedTuple):
    """Images that show the spans, and the targets of all that were read for them."""

    values: Float[Tensor, "component batch d_rep"]
    targets: Float[Tensor, "image d_clip"]
    rounding: float
    last: bool  # whether no more of them come


def _portions(source: AlignmentSource, held_out: Bool[Tensor, "image"], seed: int) -> Iterator[_Portion]:
    """Some of the images that are not held out, as many at a time as components are wide, or more.

    Moments are as large for one image as for all: to add a few at a time would cost more than to make them.
    """
    chosen, left = held_out, 0
    waiting: list[Piece] = []
    for number, piece in enumerate(checked(source)):
        d_rep = piece.values.shape[2]
        if not number:
            chosen = some_of(~held_out, max(_LEAST_IMAGES, _IMAGES_PER_DIMENSION * d_rep), seed)
            left = int(chosen.sum())
        here = torch.nonzero(chosen[piece.first : piece.first + len(piece.targets)])[:, 0]
        waiting.append(piece._replace(values=piece.values[:, here.to(piece.values.device)]))
        left -= len(here)
        if not left or sum(one.values.shape[1] for one in waiting) >= max(_ADDED, d_rep):
            values = torch.cat([one.values for one in waiting], 1)
            targets = torch.cat([one.targets for one in waiting])
            yield _Portion(values, targets, max(one.rounding for one in waiting), not left)
            waiting = []


class JointMoments:
    """Second moments of coordinates, and their products with targets, summed over whatever is added.

    Args:
        width: How many coordinates.
        targets: How many columns the targets have.
        shift: About what the mean of the coordinates is: it is taken off before products are made, and put back, so
            that products in float32 do not lose what varies beside what does not.
    """

    def __init__(self, width: int, targets: int, shift: Float[Tensor, "coordinate"]) -> None:
        self.count = 0
        self.shift = shift
        self._offset = shift.new_zeros(width, dtype=torch.float64)
        self._products = shift.new_zeros(width, width, dtype=torch.float64)
        self._cross = shift.new_zeros(width, targets, dtype=torch.float64)
        self._sums = shift.new_zeros(targets, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "batch coordinate"], targets: Float[Tensor, "batch target"]) -> None:
        """Add images."""
        centred = rows - self.shift.to(rows)
        self.count += len(rows)
        self._offset += centred.sum(0, dtype=torch.float64)
        self._products += centred.T @ centred
        self._cross += centred.T @ targets
        self._sums += targets.sum(0, dtype=torch.float64)

    def merge(self, other: "JointMoments") -> None:
        """Add what another has summed, with the same shift.

        Raises:
            InputError: Where the shifts differ.
        """
        if not torch.equal(self.shift, other.shift):
            raise InputError("Expected moments with the same shift to merge; these have different ones.")
        self.count += other.count
        for mine, theirs in zip(self._tables(), other._tables(), strict=True):
            mine += theirs

    def _tables(self) -> Iterable[Tensor]:
        return self._offset, self._products, self._cross, self._sums

    def finished(self) -> tuple[Float[Tensor, "coordinate coordinate"], Float[Tensor, "coordinate target"]]:
        """Means over images of coordinate × coordinate and of coordinate × target, in the memory of the sums."""
        shift = self.shift.double()
        self._products.addr_(self._offset, shift).addr_(shift, self._offset).addr_(shift, shift, alpha=self.count)
        self._cross.addr_(shift, self._sums)
        return self._products.div_(self.count), self._cross.div_(self.count)
