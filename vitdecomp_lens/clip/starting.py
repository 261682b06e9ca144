"""Maps to start from, in closed form: least squares, and maps that are exact isometries, one after the other.

Both need only second moments. Where the moments of all coordinates at once are too large a table, components are taken
in blocks, each fitted to what the others leave, over and over (Gauss-Seidel).
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.clip.coordinates import Coordinates, Table
from vitdecomp_lens.clip.moments import JointMoments, Layout
from vitdecomp_lens.clip.objective import Objective, nearest_isometry, retract, small_gram

RIDGES = (1e-8, 1e-4, 1e-2, 1e-1)
_SWEEPS = 200
_MAPS = 8  # of float64, that are at hand at once
_BLOCK_SWEEPS = 20  # each reads the images once for every block
_ENOUGH = 1e-3  # a smaller relative gain, or change, ends a search
_GAIN = 1e-2  # the same for sweeps over the components, after which Adam goes on
_CONSTANT = 1e-10  # a component whose variance is a smaller share of its square is a constant
_FEW = 1024  # images that show isometries, each on its own
_NOTHING = 1e-9  # a distance below it is zero but for rounding

Maps = Float[Tensor, "column d_clip"]
# Targets count with the lengths that they were given with, with length 1, or with what maps write along them.
Lengths = Literal["given", "unit"] | Maps


class NormalEquations:
    """Second moments of coordinates, and their products with what maps of the other coordinates leave of the targets.

    Attributes:
        blocks: Which columns are solved for together: all, where a table of their moments and its factor, or
            products on their way into it, fit into ``max_bytes`` beside the maps. The last column of each is the bias.
    """

    def __init__(self, coordinates: Coordinates, max_bytes: int) -> None:
        self.coordinates, layout = coordinates, coordinates.spans.layout
        most = _columns(max_bytes, coordinates.held.units.shape[1])
        stops = sorted({layout.slices[rows[-1]].stop for rows in layout.blocks(most)} - {0})  # a span may be empty
        device = coordinates.held.rows.device
        self.blocks = [
            torch.tensor([*range(start, stop), layout.width], device=device)
            for start, stop in zip([0, *stops], stops, strict=False)
        ] or [torch.tensor([layout.width], device=device)]
        self.shift = coordinates.sample.rows.mean(0)
        self.kinds: tuple[Literal["given", "unit"], ...] = ("unit",)
        if coordinates.targets_differ_in_length:
            self.kinds = ("given", "unit")
        self._all = self._moments(self.blocks[0], self._both) if self.joint else None

    @property
    def joint(self) -> bool:
        """Whether all columns are solved for at once."""
        return len(self.blocks) == 1

    def targets(self, table: Table, lengths: Lengths) -> Float[Tensor, "batch d_clip"]:
        """Targets with the lengths that they are to count with."""
        if isinstance(lengths, Tensor):
            written = (table.rows @ lengths.to(table.rows) * table.units).sum(-1)
            return table.units * written.clamp_min(0)[:, None]
        return table.units * (table.norms / self.coordinates.mean_norm)[:, None] if lengths == "given" else table.units

    def _both(self, table: Table) -> Tensor:
        return torch.cat([self.targets(table, lengths) for lengths in self.kinds], 1)

    def _moments(self, block: Tensor, targets: Callable[[Table], Tensor]) -> tuple[Tensor, Tensor]:
        moments: JointMoments | None = None
        for piece in self.coordinates.pieces():
            wanted = targets(piece)
            if moments is None:
                moments = JointMoments(len(block), wanted.shape[1], self.shift[block])
            moments.add(piece.rows if self.joint else piece.rows[:, block], wanted)
        assert moments is not None  # some images are fitted
        return moments.finished()

    def of(self, block: Tensor, maps: Maps, *, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        """Moments of a block, and of it with what the rest leaves of the targets times ``scale``."""
        if self._all is None:
            rest = maps.clone()
            rest[block] = 0
            return self._moments(block, lambda t: scale * self.targets(t, lengths) - t.rows @ rest.to(t.rows))
        second, cross = self._all
        if isinstance(lengths, Tensor):
            return second, scale * self._cross(lengths)
        start = self.kinds.index(lengths) * maps.shape[1]
        return second, scale * cross[:, start : start + maps.shape[1]]

    def own(self, columns: slice) -> Tensor:
        """Moments of one component; of a sample, where those of all are not at hand."""
        if self._all is not None:
            return self._all[0][columns, columns]
        rows = self.coordinates.sample.rows[:, columns].double()
        return rows.T @ rows / len(rows)

    def _cross(self, lengths: Maps) -> Tensor:
        cross = torch.zeros_like(lengths)
        for piece in self.coordinates.pieces():
            cross += piece.rows.T @ self.targets(piece, lengths)
        return cross / self.coordinates.fitted


def _columns(max_bytes: int, d_clip: int) -> int:
    """How many columns can be solved for at once, the bias not counted; at least one.

    In float64, n columns take two tables of n × n, and of n × d_clip: two of products, what is solved for, and maps
    before, after and in between.
    """
    maps = _MAPS * d_clip
    return max(1, (math.isqrt(maps**2 + max_bytes) - maps) // 4 - 1)


def starts(objective: Objective, coordinates: Coordinates, max_bytes: int) -> Iterator[tuple[str, Maps]]:
    """Maps to choose from, with a name for how they were found.

    For methods that want isometries, first those that fit best each on its own, as if nothing else wrote: quickly had,
    and often near. Then least squares, with as much of a ridge as images held out ask for; the scale of the targets,
    which the cosine does not see, is such that the maps are nearest to isometries. For methods that want isometries
    also those that sweeps over the components lead to from there.
    """
    isometric = objective.method in ("compalign", "compalign_paper", "orthogonal")
    if isometric:
        yield "isometries, each on its own", each_alone(coordinates)
    equations = NormalEquations(coordinates, max_bytes)
    best, least, kind = None, math.inf, equations.kinds[0]
    for lengths in equations.kinds:
        before = math.inf
        for ridge in RIDGES:
            maps = _towards_isometries(least_squares(equations, ridge, lengths=lengths), equations)
            yield f"least squares, ridge {ridge:g}", maps
            distance = _distance(objective, maps, coordinates)
            if distance < least:
                best, least, kind = maps, distance, lengths
            if distance > (1 - _ENOUGH) * before:
                break
            before = distance
    if isometric and best is not None:
        yield "isometries, component by component", isometries(equations, objective, best, lengths=kind)


def _distance(objective: Objective, maps: Maps, coordinates: Coordinates) -> float:
    held = coordinates.held
    return float(objective(maps.to(held.rows), held.rows, held.units)[0])


def each_alone(coordinates: Coordinates) -> Maps:
    """For each span the isometry that fits the targets best without the others, on a few images; and a bias for all.

    It is the polar factor of the covariance of what is in the span with the targets.
    """
    table, layout = coordinates.sample, coordinates.spans.layout
    few = torch.linspace(0, len(table) - 1, min(len(table), _FEW), device=table.rows.device).long()
    table = table.some(few)  # the sample is in the source's order, which may be that of classes
    means, mean = table.rows[:, :-1].mean(0), table.units.mean(0)
    rows, units = table.rows[:, :-1] - means, table.units - mean
    maps = rows.T @ units
    retract(maps, layout, exactly=True)
    written = rows @ maps
    along = float((written * units).sum())
    scale = float(written.square().sum()) / along if along > 0 else 1.0
    bias = (scale * mean - means @ maps) / coordinates.unit
    return torch.cat([maps, bias[None]]).double()


def least_squares(equations: NormalEquations, ridge: float, *, lengths: Lengths = "unit") -> Maps:
    """Maps of least squared error, in float64.

    Args:
        equations: The moments.
        ridge: What is added to the moments' diagonal, in units of its mean.
        lengths: With which lengths the targets count.
    """
    width = equations.coordinates.spans.layout.width + 1
    units = equations.coordinates.held.units
    maps = torch.zeros(width, units.shape[1], dtype=torch.float64, device=units.device)
    for _ in range(1 if equations.joint else _BLOCK_SWEEPS):
        before = maps.clone()
        for block in equations.blocks:
            # Without names, so that one table of moments is gone before there is another.
            maps[block] = _solved(*equations.of(block, maps, lengths=lengths, scale=1.0), ridge)
        if float((maps - before).norm()) <= _ENOUGH * float(maps.norm()):
            break
    return maps


def _solved(second: Tensor, cross: Tensor, ridge: float) -> Tensor:
    mean = float(second.diagonal().mean())
    while True:
        factor = second.clone().mT  # the same table, but column by column, as it is factored in place
        factor.diagonal().add_(ridge * mean)
        failed = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not int(failed):
            half = torch.linalg.solve_triangular(factor, cross, upper=False)
            return torch.linalg.solve_triangular(factor.mT, half, upper=True)
        ridge = max(10 * ridge, 1e-12)  # rounding has made it indefinite


def _towards_isometries(maps: Maps, equations: NormalEquations) -> Maps:
    """Maps times the one number that brings what they write nearest to what the nearest isometries would write."""
    written, wanted = 0.0, 0.0
    for columns in equations.coordinates.spans.layout.slices:
        if columns.start < columns.stop:
            moved = equations.own(columns) @ maps[columns]
            written += float((maps[columns] * moved).sum())
            wanted += float(torch.linalg.eigvalsh(small_gram(moved[None])[0]).clamp_min(0).sqrt().sum())
    return maps * (wanted / written) if written > 0 else maps


def isometries(equations: NormalEquations, objective: Objective, maps: Maps, *, lengths: Lengths = "unit") -> Maps:
    """Maps that are isometries on the spans, from maps that need not be.

    Each in turn becomes the isometry that fits best what the others leave of the targets: in closed form, a polar
    factor, because an isometry does not change the norm of what it maps. (A co-isometry does; it takes a step that
    cannot make the fit worse.) The bias and the scale of the targets follow. When images held out gain no more, targets
    count with the lengths that the maps themselves write, which the cosine does not see, until again there is no gain.
    """
    layout, coordinates = objective.layout, equations.coordinates
    maps = maps.clone()
    retract(maps[:-1], layout, exactly=True)
    best, least, before = maps, math.inf, maps
    own_lengths, steps = False, 0
    for _ in range(_SWEEPS):
        wanted, scale = (maps, 1.0) if own_lengths else (lengths, _scale(equations, maps, lengths))
        after = maps.clone()
        for block in equations.blocks:
            _sweep(after, block, *equations.of(block, after, lengths=wanted, scale=scale), layout)
        distance = _distance(objective, after, coordinates)
        gained = distance < (1 - _GAIN) * least
        if distance < least:
            best, least = after, distance
        if least < _NOTHING or (own_lengths and not gained and not steps):
            break
        if gained:
            maps, steps = _ahead(before, after, steps, layout), steps + 1
        else:  # too far, or arrived
            maps, own_lengths, steps = best, own_lengths or not steps, 0
        before = after if gained else best
    return best


def _ahead(before: Maps, after: Maps, steps: int, layout: Layout) -> Maps:
    """Maps further along the way that a sweep has gone, the further the longer it went well (Nesterov)."""
    maps = after + steps / (steps + 3) * (after - before)
    if steps:
        retract(maps[:-1], layout, exactly=True)
    return maps


def _scale(equations: NormalEquations, maps: Maps, lengths: Lengths) -> float:
    """By how much targets have to be longer for the maps to fit them."""
    table = equations.coordinates.sample
    written = table.rows @ maps.to(table.rows)
    along = float((written * equations.targets(table, lengths)).sum())
    return float(written.square().sum()) / along if along > 0 else 1.0


def _sweep(maps: Maps, block: Tensor, second: Tensor, cross: Tensor, layout: Layout) -> None:
    """Each component of a block once, and the bias. Moments about the mean, as the bias takes what means leave."""
    first, last = int(block[0]), int(block[0]) + len(block) - 1
    table, means = second[:-1, :-1], second[-1, :-1] / second[-1, -1]
    shared = second[-1, :-1] @ maps[first:last]  # the bias column with what all components of the block write
    for row in layout.order:
        columns = layout.slices[row]
        if columns.start == columns.stop or not first <= columns.start < last:
            continue
        here, mine = slice(columns.start - first, columns.stop - first), maps[columns]
        own = table[here, here] - torch.outer(means[here], second[-1, :-1][here])
        if float(own.trace()) <= _CONSTANT * float(table[here, here].trace()):
            continue  # the bias makes up for whatever direction a constant has
        left = cross[here] - table[here] @ maps[first:last]
        left -= means[here, None] * (cross[-1] - shared)
        if len(mine) > maps.shape[1]:
            own = torch.linalg.matrix_norm(own, 2) * torch.eye(len(mine), dtype=own.dtype, device=own.device)
        new = nearest_isometry(left + own @ mine)
        shared += second[-1, :-1][here] @ (new - mine)
        maps[columns] = new
    maps[-1] = (cross[-1] - shared) / second[-1, -1]
