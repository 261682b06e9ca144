"""Maps for every component, of maps for the parts that were fitted.

Images say nothing of components that they do not tell apart (`vitdecomp_lens.clip.inseparable`), but for where their
sum goes. Together they are mapped as one rigid body: an isometry of what they span, the one nearest to what the other
components' maps have in common, turned as little as it takes for the sum to go where it was fitted, and made longer or
shorter with it. So their lengths and angles among each other are kept, and the sum of all maps is what it was.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.clip.coordinates import Coordinates
from vitdecomp_lens.clip.inseparable import Inseparable
from vitdecomp_lens.clip.moments import Layout, Spans
from vitdecomp_lens.clip.objective import nearest_isometry

_IMAGES = 1024  # that say how much components write along which directions
_RIDGE = 1e-6  # for directions in which none writes
_RANK = 1e-6  # a smaller share of the largest is no direction
_OPPOSITE = 1e-6  # nearer to each other's opposites, there is no one way to turn


@dataclass(frozen=True, eq=False)
class SpanMaps:
    """A span for each component, and a map of it; in the order of `Layout`."""

    ranks: tuple[int, ...]
    basis: Float[Tensor, "d_rep coordinate"]
    weights: Float[Tensor, "coordinate d_clip"]


def separated(
    coordinates: Coordinates, maps: Float[Tensor, "column d_clip"]
) -> tuple[SpanMaps, Float[Tensor, "d_clip"]]:
    """The maps of all components, and the bias.

    Args:
        coordinates: Of the parts that were fitted.
        maps: Of these parts; the last row is the map of the column for the bias.
    """
    spans, weights, bias = coordinates.spans, maps[:-1], maps[-1].double() * coordinates.unit
    pairs = {rows[0]: _part(spans, weights, part) for part, rows in enumerate(spans.members) if len(rows) == 1}
    if spans.inseparable:
        common, size = _common(spans, weights.double(), coordinates.sample.rows[:_IMAGES, :-1].double())
        body = _rigid(torch.cat([group.vectors for group in spans.inseparable]).to(common.device), common)
        for group in spans.inseparable:
            vectors = group.vectors.to(common.device)
            written = _turned(vectors, vectors @ body, _wanted(spans, weights.double(), group), size)
            lengths = vectors.norm(dim=1, keepdim=True)
            units = zip(group.rows, vectors / lengths, written / lengths, strict=True)
            pairs |= {row: (vector[:, None], image[None]) for row, vector, image in units}
            if group.constant:
                bias = bias - written.sum(0)
    layout = Layout(tuple(pairs[row][0].shape[1] for row in range(len(pairs))))
    basis = torch.cat([pairs[row][0].to(maps) for row in layout.order], 1)
    found = torch.cat([pairs[row][1].to(maps) for row in layout.order])
    return SpanMaps(layout.ranks, basis, found), bias.to(maps)


def _part(spans: Spans, weights: Tensor, part: int) -> tuple[Tensor, Tensor]:
    columns = spans.layout.slices[part]
    return spans.basis[:, columns], weights[columns]


def _wanted(spans: Spans, weights: Tensor, group: Inseparable) -> Tensor | None:
    """Where the sum of a group's vectors was fitted to go, if it was."""
    if group.rows not in spans.members:
        return None
    basis, image = _part(spans, weights, spans.members.index(group.rows))
    return (group.vectors.sum(0).to(basis) @ basis).to(image) @ image if len(image) else None


def _common(
    spans: Spans, weights: Float[Tensor, "coordinate d_clip"], rows: Float[Tensor, "batch coordinate"]
) -> tuple[Float[Tensor, "d_rep d_clip"], float]:
    """The one map that would write most nearly what the maps of single components write, and how much these stretch."""
    d_rep, d_clip = len(spans.basis), weights.shape[1]
    second, cross = (weights.new_zeros(d_rep, width) for width in (d_rep, d_clip))
    before = after = 0.0
    for part, members in enumerate(spans.members):
        basis, image = (tensor.to(weights) for tensor in _part(spans, weights, part))
        if len(members) > 1 or not len(image):
            continue
        mine = rows[:, spans.layout.slices[part]]
        moved = basis @ (mine.T @ mine)
        second.addmm_(moved, basis.T)
        cross.addmm_(moved, image)
        if len(image) <= d_clip:  # a co-isometry shortens
            before, after = before + float(mine.square().sum()), after + float((mine @ image).square().sum())
    second.diagonal().add_(_RIDGE * float(second.diagonal().mean()) or 1.0)
    return torch.linalg.solve(second, cross), (after / before) ** 0.5 if before else 1.0


def _rigid(vectors: Float[Tensor, "member d_rep"], common: Tensor) -> Float[Tensor, "d_rep d_clip"]:
    """On what the vectors span, the isometry nearest to the common map; zero on all else."""
    _, sizes, directions = torch.linalg.svd(vectors, full_matrices=False)
    basis = directions[sizes > _RANK * sizes[0]].T
    return basis @ nearest_isometry(basis.T @ common)


def _turned(
    vectors: Float[Tensor, "member d_rep"], written: Float[Tensor, "member d_clip"], wanted: Tensor | None, size: float
) -> Float[Tensor, "member d_clip"]:
    """What a rigid body writes, turned and sized so that the sum is what is wanted; where nothing is, sized only."""
    if wanted is None:
        return size * written
    total = written.sum(0)
    length = total.norm()
    if not float(length) or not float(wanted.norm()):
        return written + (wanted - total) * (vectors.square().sum(1, keepdim=True) / vectors.square().sum())
    start, end = total / length, wanted / wanted.norm()
    along, cosine = written @ start, float(start @ end)
    if 1 + cosine < _OPPOSITE:
        turned = written - 2 * along[:, None] * start  # a reflection
    else:
        between = start + end
        turned = written - (written @ between / (1 + cosine))[:, None] * between + 2 * along[:, None] * end
    return turned * (wanted.norm() / length)
