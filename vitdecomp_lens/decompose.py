"""Who writes what: `decompose` into vectors, `attribute` into scores, `attribute_tokens` into scores by token.

All three freeze a model at its input, trace it (once a shape), compile the cut that ``by=`` names (once), run
the model natively, and take what it computed through the compiled cut. They know of a model only what
`Decomposable` says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.capture import Captured, Shelf, capture, changed_on_the_path, kept_size
from vitdecomp_lens.components import By, Component, Point, TokenGrid
from vitdecomp_lens.decomposition import Attribution, Coverage, Decomposition
from vitdecomp_lens.errors import (
    CapacityError,
    GapError,
    InputError,
    UnknownNameError,
    UnsupportedModelError,
    near_matches,
)
from vitdecomp_lens.frozen.compiled import CompiledCut
from vitdecomp_lens.frozen.graph import FrozenGraph, wide
from vitdecomp_lens.frozen.rules import sizes
from vitdecomp_lens.frozen.trace import Read, trace
from vitdecomp_lens.frozen.walk import Cut
from vitdecomp_lens.points import is_hooked
from vitdecomp_lens.tokens import TokenAttribution, TokenBlock

T = TypeVar("T")
MAX_BYTES = 512 << 20
KEPT_BYTES = {"cpu": 48 << 20}  # what may be kept of a run at once; more images are run in pieces
KEPT_BYTES_ELSEWHERE = 2 << 30


@runtime_checkable
class Decomposable(Protocol):
    """What a model has to say of itself to be decomposed: where its components are read.

    `HookedViT` says it. ``hook_dict`` holds TransformerLens hook points by name, and calling the model passes
    them.
    """

    hook_dict: dict[str, HookPoint]

    def __call__(self, images: Tensor) -> Any:
        """Run the model."""

    def component_points(self, by: By) -> tuple[Point, ...]:
        """Where components are read."""

    def token_points(self, by: By) -> tuple[Point, ...]:
        """Where components are read by token."""

    def token_grid(self, images: Tensor) -> TokenGrid:
        """Which pixels each token stands for."""

    def check_images(self, images: Any) -> None:
        """Raise `InputError` for images that the model cannot take."""

    @property
    def branches(self) -> int:
        """How many attention, MLP and convolution branches there are."""


def decompose(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    *,
    by: By = "head",
    of: Read = "representation",
    components: Sequence[str] | None = None,
    batch_size: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Decomposition:
    """The vector that every component writes into the representation.

    z = b + Σ_c A_c(a_c), exactly for these images: the model is frozen at each of them (1/σ of normalisers;
    nonlinear outputs are taken as given), and A_c carries only the paths through no other component, the
    direct effect (arXiv 2406.01583, section 3, RepDecompose).

    Args:
        model: A `HookedViT`. Hooks that are on it take part: the decomposition is that of the run with them,
            and what they change between the components and the representation is a component
            ``intervention@hook``.
        images: As the model takes them; see ``model.preprocess``.
        by: ``"layer"``, ``"head"`` (attention split by head) or ``"neuron"`` (MLPs split by neuron).
        of: ``"representation"``, ``"logits"``, ``"embedding"`` (the representation divided by its frozen norm),
            a hook with one vector an image, or a function of model and images.
        components: Labels to compute; without them, all.
        batch_size: How many images to run at once; by default as many as keep memory small.
        max_bytes: The largest result to allow.

    Returns:
        Values ``[component, batch, d_rep]`` with their labels, total, gap and coverage. Half-precision models
        are decomposed in float32.

    Raises:
        InputError: If images or options cannot be used.
        UnsupportedModelError: If the model does not say where its components are.
        IncompleteCutError: If something between components and representation could not be frozen.
        GapError: If the components do not sum to what the model computed.
        CapacityError: If the result would be larger than ``max_bytes``.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> parts = decompose(model, torch.randn(2, 3, 160, 160))
        >>> parts["L1H0"].shape, bool((parts.gap < 1e-5).all())
        (torch.Size([2, 64]), True)
    """
    reading = _read(model, images, by, of, None, tokens=False)
    values, total = _contributions(reading, components, batch_size, max_bytes)
    whole, labels = reading.labelled(components)
    if of == "embedding":
        norm = total.norm(dim=-1, keepdim=True)
        values, total = values / norm, total / norm
    parts = Decomposition(values, labels, total, complete=whole, coverage=reading.coverage, metadata=reading.metadata)
    parts = parts if components is not None else _without_idle_interventions(parts)
    return parts.check_gap() if whole and _is_exact(images) else parts


def attribute(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    directions: Float[Tensor, "direction d_rep"],
    *,
    by: By = "head",
    of: Read = "representation",
    names: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    batch_size: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Attribution:
    """The score ⟨u, A_c(a_c)⟩ of every component along every direction u, without making the vectors.

    It is what ``decompose(...).project(directions)`` gives, at the cost of the directions only.

    Args:
        model: As for `decompose`.
        images: As for `decompose`.
        directions: Any vectors in the space of ``of``, as rows.
        by: As for `decompose`.
        of: As for `decompose`.
        names: A name for each direction.
        components: As for `decompose`.
        batch_size: As for `decompose`.
        max_bytes: As for `decompose`.

    Returns:
        Scores ``[component, batch, direction]``.

    Raises:
        InputError: Also if the directions do not fit the space.
        VitDecompError: As `decompose`.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> scores = attribute(model, torch.randn(2, 3, 160, 160), model.W_U.T)
        >>> scores.values.shape[1:]
        torch.Size([2, 5])
    """
    reading = _read(model, images, by, of, directions, tokens=False)
    directions = reading.along
    values, vectors = _contributions(reading, components, batch_size, max_bytes)
    vectors = vectors.to(values.dtype)
    whole, labels = reading.labelled(components)
    if of == "embedding":
        norm = vectors.norm(dim=-1, keepdim=True)
        values, vectors = values / norm, vectors / norm
    scores = Attribution(
        values,
        labels,
        vectors @ directions.T,
        complete=whole,
        coverage=reading.coverage,
        metadata=reading.metadata,
        directions=None if names is None else tuple(names),
    )
    scores = scores if components is not None else _without_idle_interventions(scores)
    if whole and _is_exact(images):
        _check_scores(scores, vectors, directions)
    return scores


def attribute_tokens(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    directions: Float[Tensor, "direction d_rep"],
    *,
    by: By = "head",
    of: Read = "representation",
    names: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    batch_size: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> TokenAttribution:
    """The score of every component along every direction, by the token that it came from.

    Attention is read at its values, with the pattern frozen: a token's score is what its value vector writes
    through the head, wherever it is written to. MLPs and the embedding are read at the tokens they write to.
    Only pattern rows that the representation reads are rebuilt.

    Args:
        model: As for `decompose`.
        images: As for `decompose`.
        directions: As for `attribute`.
        by: As for `decompose`; ``"layer"`` sums over heads.
        of: As for `decompose`.
        names: A name for each direction.
        components: As for `decompose`.
        batch_size: As for `decompose`.
        max_bytes: As for `decompose`.

    Returns:
        Scores ``[component, batch, token, direction]`` with their token grid; constants stand beside them.

    Raises:
        VitDecompError: As `attribute`.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> tokens = attribute_tokens(model, torch.randn(1, 3, 160, 160), model.W_U.T[:1])
        >>> tokens["L1H0"].shape, tokens.to_pixels(160, 160).shape[-2:]
        (torch.Size([1, 101, 1]), torch.Size([160, 160]))
    """
    reading = _read(model, images, by, of, directions, tokens=True)
    maps = _TokenMaps(reading, components, max_bytes)
    vectors = torch.cat(_on_pieces(reading, batch_size, maps.add, maps.at_once()))
    directions = reading.along
    if of == "embedding":
        norm = vectors.norm(dim=-1, keepdim=True)
        maps.divide(norm)
        vectors = vectors / norm
    scores = maps.result(vectors @ directions.T, names)
    if scores.complete and _is_exact(images):
        _check_scores(scores, vectors, directions)
    return scores


# --- what is read of a model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """A model, traced and compiled for one request."""

    model: Decomposable
    images: Tensor
    by: By
    of: Read
    points: tuple[Point, ...]
    changed: tuple[str, ...]
    graph: FrozenGraph
    cut: Cut
    program: CompiledCut
    directions: Tensor | None
    tokens: bool

    @property
    def along(self) -> Tensor:
        """The directions, checked and where the images are."""
        assert self.directions is not None
        return self.directions

    @property
    def met(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.hook in self.cut.points)

    def components_of(self, point: Point) -> tuple[Component, ...]:
        if self.tokens and point.axis is not None and point.component.kind == "attn" and self.by != "head":
            return (point.component,)
        size = 1 if point.axis is None else sizes(self.graph.points[point.hook])[point.axis]
        return point.components(size)

    @property
    def others(self) -> tuple[Component, ...]:
        """Components that are not read at a point: interventions and constants."""
        changed = tuple(Component(kind="intervention", name=name) for name in self.changed)
        return changed + tuple(Component(kind="constant", name=name) for name in self.program.constants)

    @property
    def everything(self) -> tuple[Component, ...]:
        found = [c for point in self.met for c in self.components_of(point)]
        return (*dict.fromkeys(found), *self.others)

    def rows(self, components: Sequence[str] | None) -> list[int]:
        """Which of everything is asked for."""
        if components is None:
            return list(range(len(self.everything)))
        known = {component.label: row for row, component in enumerate(self.everything)}
        for label in components:
            if label not in known:
                raise UnknownNameError(f"There is no component {label!r}; {near_matches(label, known)}")
        return [known[label] for label in dict.fromkeys(components)]

    def labelled(self, components: Sequence[str] | None) -> tuple[bool, tuple[Component, ...]]:
        rows, everything = self.rows(components), self.everything
        return len(rows) == len(everything), tuple(everything[row] for row in rows)

    @property
    def coverage(self) -> Coverage:
        found = {(p.component.kind, p.component.layer) for p in self.met if p.component.kind in ("attn", "mlp", "conv")}
        return Coverage(len(found), self.model.branches, (*self.cut.missing, *self.cut.unknown))

    @property
    def metadata(self) -> dict[str, Any]:
        of = self.of if isinstance(self.of, str) else getattr(self.of, "__name__", "function")
        named = getattr(self.model, "cfg", None)  # third parties may have none
        return {"by": self.by, "of": of, "model": getattr(named, "model_name", type(self.model).__name__)}


def _read(model: nn.Module, images: Any, by: By, of: Read, directions: Tensor | None, *, tokens: bool) -> _Reading:
    if not isinstance(model, Decomposable):
        raise UnsupportedModelError(
            f"Expected a model that says where its components are read, such as a HookedViT; got"
            f" {type(model).__name__}. Wrap it: HookedViT(model). For a module of any kind, trace(module, images)"
            " gives the graph itself, with cuts, push and pull."
        )
    if by not in ("layer", "head", "neuron"):
        raise InputError(f"by= must be 'layer', 'head' or 'neuron'; got {by!r}.")
    model.check_images(images)
    if len(images) == 0:
        raise InputError("Expected at least one image; got an empty batch.")
    points = model.token_points(by) if tokens else model.component_points(by)
    hooks = [point.hook for point in points]
    lazy = [of] if isinstance(of, str) and of in model.hook_dict else []
    graph = trace(model, images[:1], of="representation" if of == "embedding" else of, listened=[*hooks, *lazy])
    graph = graph.with_hooks(name for name, point in model.hook_dict.items() if is_hooked(point))
    if directions is not None:
        directions = _checked_directions(directions, sizes(graph.root)[-1], images)
    cut = graph.cut([hook for hook in hooks if hook in graph.points])
    changed = changed_on_the_path(graph, cut, model.hook_dict)
    dtype = wide(images.dtype if directions is None else directions.dtype)
    program = graph.program(
        cut, splits={p.hook: p.axis for p in points}, through=changed, directions=directions, dtype=dtype
    )
    return _Reading(model, images, by, of, points, changed, graph, cut, program, directions, tokens)


def _checked_directions(directions: Any, d_rep: int, images: Tensor) -> Tensor:
    if not isinstance(directions, Tensor) or not directions.is_floating_point():
        raise InputError(
            f"Expected directions as a floating tensor [direction, {d_rep}]; got {type(directions).__name__}."
        )
    if directions.dim() != 2 or directions.shape[1] != d_rep or not len(directions):
        fix = "For one direction, pass directions[None]." if directions.dim() == 1 else "They may be of another space."
        raise InputError(f"Expected directions [direction, {d_rep}]; got {tuple(directions.shape)}. {fix}")
    if not bool(directions.isfinite().all()):
        raise InputError("Expected finite directions; some entries are NaN or infinite.")
    return directions.detach().to(images.device, wide(images.dtype))


# --- running ----------------------------------------------------------------------------------------------------


def _on_pieces(
    reading: _Reading,
    batch_size: int | None,
    use: Callable[[int, Captured], T],
    at_once: Mapping[str, Callable[[int, Tensor], None]] | None = None,
) -> list[T]:
    """Run the model on pieces of the batch, and use what each leaves; none of it outlives its use.

    Args:
        reading: What is read.
        batch_size: How many images a piece has; by default as many as keep little.
        use: Gets the number of a piece's first image, and what its run left.
        at_once: What to do with the value at some points during the run, by the number of the piece's first image.
    """
    images, model, graph, program = reading.images, reading.model, reading.graph, reading.program
    at_once = at_once or {}
    size = kept_size(graph, program, at_once)
    batch_size = _piece(batch_size, images, size * program.dtype.itemsize)
    of = reading.of
    run: Callable[[Tensor], Any] = (lambda piece: of(model, piece)) if callable(of) else model  # type: ignore[arg-type]
    differentiable = torch.is_grad_enabled() and images.requires_grad
    shelf = None if differentiable else Shelf(size * batch_size, program.dtype, program.device)
    results = []
    with torch.set_grad_enabled(differentiable):
        for first in range(0, len(images), batch_size):
            here = {name: partial(work, first) for name, work in at_once.items()}
            piece = images[first : first + batch_size]
            captured = capture(run, piece, model.hook_dict, graph, program, reading.changed, at_once=here, shelf=shelf)
            results.append(use(first, captured))
            if shelf is not None:
                shelf.clear()
    return results


def _piece(batch_size: int | None, images: Tensor, bytes_of_one: int) -> int:
    """How many images to run at once."""
    if batch_size is None:
        budget = KEPT_BYTES.get(images.device.type, KEPT_BYTES_ELSEWHERE)
        most = max(1, budget // max(1, bytes_of_one))
        return -(-len(images) // -(-len(images) // most))  # even pieces
    if batch_size < 1:
        raise InputError(f"batch_size= must be at least 1; got {batch_size}.")
    return batch_size


def _contributions(
    reading: _Reading, components: Sequence[str] | None, batch_size: int | None, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """Values of the wanted components, and the model's own vectors."""
    wanted = reading.labelled(components)[1]
    places = {component: place for place, component in enumerate(wanted)}
    read = [p for p in reading.met if not places.keys().isdisjoint(reading.components_of(p))]
    program, count = reading.program, len(reading.images)
    # What a point holds is computed as a whole, wanted or not.
    rows = sum(len(reading.components_of(p)) for p in read) + len(reading.others)
    _refuse_too_large((rows, count, program.directions), program.dtype, max_bytes, "component batch direction")

    def use(_first: int, captured: Captured) -> tuple[Tensor, Tensor]:
        batch = len(captured.total)
        weights = program.weights(captured.read, batch)
        names = [p.hook for p in read] + list(reading.changed)
        written = program.contributions(captured.kept, weights, batch, only=names)
        values = torch.cat([*(written[name] for name in names), program.shifted(weights, batch)])
        found = [c for p in read for c in reading.components_of(p)] + list(reading.others)
        if found == list(wanted):
            return values, captured.total
        row_of = {component: row for row, component in enumerate(found)}
        return values[[row_of[component] for component in wanted]], captured.total

    pieces, totals = zip(*_on_pieces(reading, batch_size, use), strict=True)
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)), torch.cat(totals)


def _refuse_too_large(shape: tuple[int, ...], dtype: torch.dtype, max_bytes: int, axes: str) -> None:
    size = torch.Size(shape).numel() * dtype.itemsize
    if size > max_bytes:
        raise CapacityError(
            f"The result, [{axes}] = {list(shape)} of {dtype}, would take {size / 2**30:.2f} GiB, more than"
            f" max_bytes={max_bytes} allows. Use fewer images, components=[...], a coarser by=, or attribute() with few"
            " directions in place of whole vectors; or raise max_bytes=."
        )


class _TokenMaps:
    """The scores by token, written piece by piece into results that are there from the start."""

    def __init__(self, reading: _Reading, components: Sequence[str] | None, max_bytes: int) -> None:
        self.reading, program = reading, reading.program
        self.whole, wanted = reading.labelled(components)
        self.asked = components is not None
        self.tokened = [p for p in reading.met if p.token_axis is not None]
        with_tokens = {c for point in self.tokened for c in reading.components_of(point)}
        self.components = [c for c in wanted if c in with_tokens]
        self.others = [c for c in wanted if c not in with_tokens]
        self.grid = reading.model.token_grid(reading.images)
        batch, count = len(reading.images), program.directions
        shape = (len(self.components), batch, len(self.grid), count)
        _refuse_too_large(shape, program.dtype, max_bytes, "component batch token direction")
        # Not zeroed as a whole: nearly all of it is written once, and it is the largest tensor there is.
        self.values = torch.empty(shape, dtype=program.dtype, device=program.device)
        self.untokened = torch.empty(len(self.others), batch, count, dtype=self.values.dtype, device=self.values.device)
        self.place = {component: row for row, component in enumerate(self.components)}
        self.direct = [point for point in self.tokened if self._is_direct(point)]
        for point in self.tokened:
            rows = [self.place[c] for c in reading.components_of(point) if c in self.place]
            self.values[rows, :, : None if self._sums_heads(point) else point.skipped_tokens] = 0

    def _sums_heads(self, point: Point) -> bool:
        return point.axis is not None and len(self.reading.components_of(point)) == 1

    def add(self, first: int, captured: Captured) -> Tensor:
        """Write one piece of the batch; return the model's own vectors."""
        program, batch = self.reading.program, len(captured.total)
        weights = program.weights(captured.read, batch)
        images = slice(first, first + batch)
        for point in self.tokened:
            if point in self.direct:
                program.weigh(point.hook, weights, self._rows_of(point, images))
            else:
                self._add_point(point, captured.kept[point.hook], weights, images)
        if self.others:
            self._add_others(captured, weights, images)
        return captured.total.to(program.dtype)

    def at_once(self) -> dict[str, Callable[[int, Tensor], None]]:
        """What is written during the run, at points whose values need not be kept until the weights are known."""

        def write(point: Point, first: int, value: Tensor) -> None:
            images = slice(first, first + value.shape[0])
            self.reading.program.unweighted(point.hook, value, self._rows_of(point, images))

        return {point.hook: partial(write, point) for point in self.direct}

    def _is_direct(self, point: Point) -> bool:
        """Whether scores of a point are written where they belong, first unweighted."""
        if self._sums_heads(point) or not self.reading.program.weighs_last(point.hook):
            return False
        places = [self.place.get(c, -1) for c in self.reading.components_of(point)]
        return places[0] >= 0 and places == list(range(places[0], places[0] + len(places)))

    def _rows_of(self, point: Point, images: slice) -> Tensor:
        """Where the scores of a point's components go."""
        mine = self.reading.components_of(point)
        first = self.place[mine[0]]
        return self.values[first : first + len(mine), images, point.skipped_tokens :]

    def _add_point(self, point: Point, kept: Tensor, weights: Any, images: slice) -> None:
        mine = self.reading.components_of(point)
        chosen = [number for number, component in enumerate(mine) if component in self.place]
        if not chosen:
            return
        split = 1 if point.axis is None else kept.shape[point.axis]
        scratch = self.values.new_empty(split, *self.values[0, images, point.skipped_tokens :].shape)
        self.reading.program.by_token(point.hook, kept, weights, scratch, token_axis=point.token_axis or 1)
        places = [self.place[mine[number]] for number in chosen]
        if self._sums_heads(point):
            self.values[places[0], images, point.skipped_tokens :] += scratch.sum(0)
        else:
            self.values[places, images, point.skipped_tokens :] = scratch[chosen]

    def _add_others(self, captured: Captured, weights: Any, images: slice) -> None:
        reading, batch = self.reading, len(captured.total)
        without = [p for p in reading.met if p.token_axis is None]
        names = [p.hook for p in without] + list(reading.changed)
        written = reading.program.contributions(captured.kept, weights, batch, only=names)
        rows = torch.cat([*(written[name] for name in names), reading.program.shifted(weights, batch)])
        labels = [c for p in without for c in reading.components_of(p)] + list(reading.others)
        place = {component: row for row, component in enumerate(labels)}
        self.untokened[:, images] = rows[[place[c] for c in self.others]]

    def divide(self, norm: Float[Tensor, "batch 1"]) -> None:
        """Divide all scores of an image by its norm."""
        self.values = self.values / norm[:, :, None]
        self.untokened = self.untokened / norm

    def result(self, total: Tensor, names: Sequence[str] | None) -> TokenAttribution:
        """The scores with their labels."""
        directions = None if names is None else tuple(names)
        others = Attribution(self.untokened, tuple(self.others), directions=directions)
        blocks = (TokenBlock(self.values, tuple(self.components), self.grid),) if self.components else ()
        return TokenAttribution(
            blocks,
            others if self.asked else _without_idle_interventions(others),
            total,
            complete=self.whole,
            coverage=self.reading.coverage,
            metadata=self.reading.metadata,
        )


# --- afterwards ---------------------------------------------------------------------------------------------------


def _without_idle_interventions(parts: Any) -> Any:
    """Drop interventions that changed nothing: hooks that only look."""
    idle = {
        component.label
        for row, component in enumerate(parts.components)
        if component.kind == "intervention" and not bool(parts.values[row].any())
    }
    if not idle:
        return parts
    kept = parts.select(labels=[label for label in parts.labels if label not in idle])
    return replace(kept, complete=parts.complete)


def _is_exact(images: Tensor) -> bool:
    """Whether the model runs in a precision in which a gap is an error; in half precision it is only reported."""
    return images.dtype in TOLERANCES and not torch.is_autocast_enabled(images.device.type)


TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def _check_scores(
    scores: Attribution | TokenAttribution,
    vectors: Float[Tensor, "batch d_rep"],
    directions: Float[Tensor, "direction d_rep"],
) -> None:
    """Check that scores sum to the total's, relative to ‖u‖‖z‖: a total near zero is no reason to doubt them.

    Raises:
        GapError: Names the worst image and direction.
    """
    rest = scores.rest
    tolerance = TOLERANCES[vectors.dtype]
    assert rest is not None
    scale = vectors.norm(dim=-1)[:, None] * directions.norm(dim=-1)
    gap = (rest.abs() / scale).nan_to_num(nan=torch.inf).masked_fill(rest == 0, 0)
    if not bool((gap <= tolerance).all()):
        image, direction = divmod(int(gap.argmax()), gap.shape[1])
        raise GapError(
            f"The scores of image {image} along direction {direction} do not sum to the model's own: off by"
            f" {float(gap[image, direction]):.1e} of ‖u‖‖z‖; allowed is {tolerance:.1e}."
        )
