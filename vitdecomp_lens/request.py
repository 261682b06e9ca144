"""One request: a model, traced and compiled for what is asked of it, and run in pieces."""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.capture import Captured, Shelf, capture, changed_on_the_path, kept_size, repeated_error
from vitdecomp_lens.components import PLAIN, By, Component, Point
from vitdecomp_lens.coverage import Coverage, Stop, branch_of
from vitdecomp_lens.decomposable import Decomposable
from vitdecomp_lens.decomposition import ComponentMaps, Decomposition, OfOneModel, rows_of_maps
from vitdecomp_lens.errors import (
    CapacityError,
    IncompleteCutError,
    InputError,
    UnknownNameError,
    VitDecompWarning,
    near_matches,
)
from vitdecomp_lens.foreign import Foreign
from vitdecomp_lens.frozen.compiled import CompiledCut, OwnDirections, Reads, in_full_precision
from vitdecomp_lens.frozen.fingerprint import fingerprint
from vitdecomp_lens.frozen.graph import FrozenGraph, wide
from vitdecomp_lens.frozen.rules import sizes
from vitdecomp_lens.frozen.slow import ReplayedCut
from vitdecomp_lens.frozen.trace import Read, reading, trace
from vitdecomp_lens.frozen.walk import Cut
from vitdecomp_lens.hooked.checks import check_module
from vitdecomp_lens.hooked.splicing import splices_of
from vitdecomp_lens.points import hook_points, is_hooked
from vitdecomp_lens.traced import Traced, check_any_images
from vitdecomp_lens.weights import weights_hash

T = TypeVar("T")
MAX_BYTES = 512 << 20
SUPPORTED = 0.9  # the share of its branches that a model's components must be, to say something
KEPT_BYTES = {"cpu": 60 << 20}  # what may be kept of a run at once; more images are run in pieces
KEPT_BYTES_ELSEWHERE = 2 << 30
ALIGNED = 4  # products whose rows have a length that is no multiple of it take a fifth longer
FEW_IMAGES = 4  # with fewer, products take longer a row: so many may keep four times as much


BIAS = Component(kind="constant", name="aligner.bias")


@dataclass(frozen=True)
class Mapped:
    """What scores through an aligner need besides a compiled cut that reads along its components' own directions.

    The cut reads one direction more, the last: one of the representation itself, which all components share. Scores
    along it sum to the model's own, or the decomposition is not exact; what maps make of components says nothing of it.

    Attributes:
        witness: This direction.
        bias: The scores of the aligner's bias along all directions.
        strangers: Hook points at which a change would be a component that the aligner has no map for.
    """

    witness: Float[Tensor, "1 d_rep"]
    bias: Float[Tensor, "direction"]
    strangers: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A model, traced and compiled for one request."""

    module: nn.Module
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
    mapped: Mapped | None = None

    @property
    def along(self) -> Tensor:
        """The directions, checked and where the images are."""
        assert self.directions is not None
        return self.directions

    @cached_property
    def met(self) -> tuple[Point, ...]:
        """The points that a walk from the output meets."""
        return tuple(point for point in self.points if point.hook in self.cut.points)

    def components_of(self, point: Point) -> tuple[Component, ...]:
        """Which components are read at a point."""
        apart = self.by in ("head", "latent")
        if self.tokens and point.axis is not None and point.component.kind == "attn" and not apart:
            return (point.component,)
        size = 1 if point.axis is None else sizes(self.graph.points[point.hook])[point.axis]
        return point.components(size)

    @cached_property
    def others(self) -> tuple[Component, ...]:
        """Components that are not read at a point: interventions and constants."""
        changed = tuple(Component(kind="intervention", name=name) for name in self.changed)
        constants = tuple(Component(kind="constant", name=name) for name in self.program.constants)
        return changed + constants + (() if self.mapped is None else (BIAS,))

    def of_constants(self, captured: Captured, weights: Any) -> Float[Tensor, "constant batch direction"]:
        """What the constants among `others` write along each direction."""
        batch = len(captured.total)
        written = self.program.shifted(weights, batch)
        if self.mapped is None:
            return written
        bias = self.mapped.bias.expand(1, batch, -1)
        if self.of == "embedding":  # all scores are going to be divided by it, and a bias is none of the model's
            bias = bias * captured.total.norm(dim=-1, keepdim=True)
        return torch.cat([written, bias])

    def refuse_strangers(self, captured: Captured) -> None:
        """Refuse what hooks changed and an aligner has no map for.

        Raises:
            InputError: Naming it.
        """
        for name in () if self.mapped is None else self.mapped.strangers:
            if bool(captured.kept[name].any()):
                raise InputError(
                    f"Expected an aligner with a map for each component; a hook at {name} changes the model's run, and"
                    f" through= has no map for 'intervention@{name}'. Remove the hook, or decompose and map without it."
                )

    @cached_property
    def everything(self) -> tuple[Component, ...]:
        """All components, those that are read at points first."""
        found = [c for point in self.met for c in self.components_of(point)]
        return (*dict.fromkeys(found), *self.others)

    def rows(self, components: Sequence[str] | None) -> list[int]:
        """Which of everything is asked for."""
        if components is None:
            return list(range(len(self.everything)))
        known = {component.label: row for row, component in enumerate(self.everything)}
        wanted = [components] if isinstance(components, str) else components
        for label in wanted:
            if label not in known:
                raise UnknownNameError(f"There is no component {label!r}; {near_matches(label, known)}")
        return [known[label] for label in dict.fromkeys(wanted)]

    def labelled(self, components: Sequence[str] | None) -> tuple[bool, tuple[Component, ...]]:
        """The components asked for, and whether they are all there are."""
        rows, everything = self.rows(components), self.everything
        return len(rows) == len(everything), tuple(everything[row] for row in rows)

    @property
    def coverage(self) -> Coverage:
        """How many branches are components of their own."""
        found = {branch for point in self.met if (branch := branch_of(point.component)) is not None}
        stops = (*self.cut.missing, *self.cut.unknown, *self.model.stops)
        return Coverage(len(found), self.model.branches, (*stops, *self._hidden_by_splices()))

    def _hidden_by_splices(self) -> list[Stop]:
        """Modules in the stream that is met: nothing behind them writes directly."""
        whole = [point.component for point in self.met if point.component.kind == "latent"]
        return [
            Stop("splice", str(component.name), "latents and error are given: nothing before it writes directly")
            for component in whole
            if branch_of(component) is None
        ]

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What was asked, of which model with which weights."""
        of = self.of if isinstance(self.of, str) else getattr(self.of, "__name__", "function")
        named = getattr(self.module, "cfg", None)  # third parties may have none
        model = getattr(named, "model_name", type(self.module).__name__)
        asked = {"by": self.by, "of": of, "model": model, "weights": weights_hash(self.module)}
        spliced = {
            hook: {"weights": weights_hash(splice.module), "error": splice.hook_error is not None}
            for hook, splice in splices_of(self.model.hook_dict).items()
        }
        return {**asked, "spliced": spliced} if spliced else asked


def make_request(
    model: nn.Module,
    images: Any,
    by: By,
    of: Read,
    directions: Tensor | None,
    *,
    tokens: bool,
    labels: Mapping[str, str] | None = None,
    through: ComponentMaps | None = None,
) -> Request:
    """Check what is asked, trace the model and compile the cut.

    Args:
        model: What to run.
        images: On what.
        by: How fine components are.
        of: What is decomposed.
        directions: What to read of it.
        tokens: Whether components are told apart by token.
        labels: Of a model of somebody else's, the hooks at which components are read, by the components' labels.
        through: What takes the components into the space of the directions.

    Raises:
        VitDecompError: Where something cannot be used; see `vitdecomp_lens.decompose.decompose`.
    """
    if by not in (*PLAIN, "latent"):
        raise InputError(f"by= must be 'layer', 'head', 'neuron' or 'latent'; got {by!r}.")
    if by == "latent" and not splices_of(hook_points(model)):
        raise InputError(
            "by='latent' needs a module whose latents are components, and none stands in this model. Put one in:"
            " with model.spliced({'blocks.2.hook_mlp_out': autoencoder}): decompose(model, images, by='latent'). A"
            " HookedViT has that; wrap another module first, HookedViT(module)."
        )
    if isinstance(model, Decomposable):
        model.check_images(images)
    else:
        check_module(model)
        check_any_images(images, model)
    if len(images) == 0:
        raise InputError("Expected at least one image; got an empty batch.")
    if of == "logits" and getattr(model, "has_activation_before_classifier", False):
        raise InputError(
            "An activation function stands between this model's representation and its logits, so that no part has a "
            "share of its own in a logit. Use explain, which freezes that function at each photograph; or, for one "
            "image, W, b = model.unembedding_at(cache['hook_representation'][0]), and attribute(model, image, W.T)."
        )
    of_what = "representation" if of == "embedding" else of
    subject, graph = _described(model, images[:1], by, of_what, tokens, labels, mapped=through is not None)
    points = subject.token_points(by) if tokens else subject.component_points(by)
    if directions is not None:
        width = sizes(graph.root)[-1] if through is None else _width_behind(through, sizes(graph.root)[-1])
        directions = _checked_directions(directions, width, images, "of=" if through is None else "through=")
    cut = _cut(graph, points)
    if by == "latent" and cut.complete:
        _refuse_unread(cut, points)
    changed = changed_on_the_path(graph, cut, subject.hook_dict)
    dtype = wide(images.dtype if directions is None else directions.dtype)
    splits = {p.hook: p.axis for p in points}
    whole = None if through is not None else directions
    try:
        program = graph.program(cut, splits=splits, through=changed, directions=whole, dtype=dtype)
    except IncompleteCutError as error:
        if not (spliced := splices_of(subject.hook_dict)):
            raise
        raise IncompleteCutError(
            f"{error} A module stands at {', '.join(spliced)}: what its decode makes must be affine in the latents, a"
            " matrix and a bias."
        ) from error
    request = Request(model, subject, images, by, of, points, changed, graph, cut, program, directions, tokens)
    if through is not None:
        request = _read_through(through, request)
    if subject.stops and request.coverage.share < SUPPORTED:
        warnings.warn(f"{type(model).__name__}: {request.coverage}.", VitDecompWarning, stacklevel=3)
    return request


def _cut(graph: FrozenGraph, points: Sequence[Point]) -> Cut:
    return graph.cut([point.hook for point in points if point.hook in graph.points])


def _refuse_unread(cut: Cut, points: Sequence[Point]) -> None:
    """Refuse latents of which none writes directly.

    Raises:
        InputError: Naming where they are.
    """
    latents = [point for point in points if point.component.kind == "latent"]
    if not any(point.hook in cut.points for point in latents):
        hooks = ", ".join(dict.fromkeys(str(point.component.name) for point in latents))
        raise InputError(
            f"No latent at {hooks} writes directly: other components, a pattern or a nonlinearity lie on every way to"
            " the output. Splice at the residual stream, at hook_attn_out, hook_mlp_out, hook_z or hook_post; total"
            " effects are had by ablate_run."
        )


def _described(
    model: nn.Module,
    image: Tensor,
    by: By,
    of: Read,
    tokens: bool,
    labels: Mapping[str, str] | None,
    *,
    mapped: bool,
) -> tuple[Decomposable, FrozenGraph]:
    """A model that says where its components are, and its graph; of another one its hooks and its graph say it."""
    if not isinstance(model, Decomposable):
        graph = trace(model, image, of=of)
        foreign = Foreign.of(model, graph, labels)
        if foreign is None:
            traced = Traced.of(model, graph)
            return traced, traced.graph
        if graph.repeated is not None:
            raise repeated_error(graph.repeated)
        return foreign, foreign.graph.with_hooks(n for n, point in foreign.hook_dict.items() if is_hooked(point))
    if labels is not None:
        raise InputError(
            f"{type(model).__name__} says itself at which hooks its components are read: components= takes labels of"
            " them, such as components=['attn.0']. A mapping from labels to hooks is for models that do not."
        )
    points = [
        *(model.token_points(by) if tokens else ()),
        *(model.component_points(by) if mapped or not tokens else ()),
    ]
    read = [of] if isinstance(of, str) and of in model.hook_dict else []
    graph = trace(model, image, of=of, listened=[*(point.hook for point in points), *read])
    if graph.repeated is not None:
        raise repeated_error(graph.repeated)
    return model, graph.with_hooks(name for name, point in model.hook_dict.items() if is_hooked(point))


def _checked_directions(directions: Any, width: int, images: Tensor, space: str) -> Tensor:
    if not isinstance(directions, Tensor) or not directions.is_floating_point():
        came = f"a tensor of {directions.dtype}" if isinstance(directions, Tensor) else type(directions).__name__
        raise InputError(
            f"Expected directions as a floating tensor [direction, {width}]; got {came}. Convert them:"
            " torch.as_tensor(directions).float()."
        )
    if directions.dim() != 2 or directions.shape[1] != width or not len(directions):
        fix = f"They may be of another space: make them for the space of {space}."
        if directions.dim() == 1:
            fix = "For one direction, pass directions[None]."
        elif not len(directions):
            fix = "Pass at least one direction."
        raise InputError(f"Expected directions [direction, {width}]; got {tuple(directions.shape)}. {fix}")
    if not bool((finite := directions.isfinite().all(1)).all()):
        first = int((~finite).nonzero()[0])
        raise InputError(
            f"Expected finite directions; direction {first} of {len(directions)} has NaN or infinite entries. Check how"
            " it was made."
        )
    return directions.detach().to(images.device, wide(images.dtype))


# --- through an aligner ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ReadThrough:
    """A cut that was compiled for an aligner and directions, and what it was compiled from.

    Attributes:
        program: The cut.
        whole: The same for whole vectors; of a replay, also the cut at the components that tells its constants apart.
        maps: The maps' components and fingerprint.
        directions: The directions.
    """

    program: CompiledCut
    whole: Sequence[CompiledCut]
    maps: tuple[Any, ...]
    directions: Tensor

    def holds(self, whole: Sequence[CompiledCut], maps: tuple[Any, ...], directions: Tensor) -> bool:
        """Whether it is what would be compiled now."""
        same = len(self.whole) == len(whole) and all(a is b for a, b in zip(self.whole, whole, strict=True))
        return same and self.maps == maps and torch.equal(self.directions, directions)


def _width_behind(aligner: Any, d_rep: int) -> int:
    """The width of the space that an aligner leads to.

    Raises:
        InputError: Where it is none, or its maps do not fit.
    """
    if not isinstance(aligner, ComponentMaps):
        raise InputError(
            f"through= expects an aligner: components, a map for each, and a bias; got {type(aligner).__name__}. For"
            " one matrix for all components, leave it out and pass directions @ matrix.T."
        )
    rows, maps, bias = len(aligner.components), tuple(aligner.maps.shape), tuple(aligner.bias.shape)
    if len(maps) != 3 or maps[0] != rows or bias != maps[2:]:
        raise InputError(
            f"Expected an aligner with maps [component, d_rep, d_clip], one for each of its {rows} components, and a"
            f" bias [d_clip]; got maps of shape {maps} and a bias of shape {bias}."
        )
    if maps[1] != d_rep:
        raise InputError(f"Expected maps from d_rep={d_rep} (axis 1 of 3); got maps of shape {maps}.")
    return maps[2]


def _read_through(aligner: ComponentMaps, request: Request) -> Request:
    """The same request, along directions that are pulled back through an aligner's maps."""
    graph, along, points = request.graph, request.along, request.model.component_points(request.by)
    cut = _cut(graph, points)
    met = [point for point in points if point.hook in cut.points]
    labels, maps = tuple(component.label for component in aligner.components), aligner.maps.detach()
    maps = maps[:1] if maps.stride(0) == 0 else maps  # all components share one
    state = labels, fingerprint([maps])
    _, (_, products) = state
    if not all(map(math.isfinite, products)):  # quicker than a look at each entry
        _refuse_not_finite("maps", maps)
    _refuse_not_finite("bias", aligner.bias)
    with in_full_precision(along.device):
        whole = [request.program, *_naming_constants(request, cut, points)]
        key = (_ReadThrough, request.tokens, request.points, request.changed, request.program.dtype)
        kept: _ReadThrough | None = graph.kept.get(key)
        if kept is None or not kept.holds(whole, state, along):
            own = _own_directions(labels, maps.to(along.device), request, cut, met)
            kept = graph.kept[key] = _ReadThrough(_along(own, *whole), whole, state, along.clone())
        bias = along @ aligner.bias.detach().to(along)
    program = kept.program
    _refuse_other(aligner, request, program, [c for point in met for c in _components(graph, point)])
    strangers = tuple(h for h in request.changed if h in program.outside and f"intervention@{h}" not in labels)
    bias = torch.cat([bias, bias.new_zeros(program.directions - len(bias))])
    return replace(request, program=program, mapped=Mapped(_witness(request)[-1:], bias, strangers))


def _naming_constants(request: Request, cut: Cut, points: Sequence[Point]) -> list[CompiledCut]:
    """Of a replay by token, which lumps constants, the cut at the components: where that needs none, it names them."""
    if not request.tokens or not isinstance(request.program, ReplayedCut):
        return []
    splits, dtype = {point.hook: point.axis for point in points}, request.program.dtype
    whole = request.graph.program(cut, splits=splits, through=request.changed, dtype=dtype)
    return [] if isinstance(whole, ReplayedCut) else [whole]


def _along(own: OwnDirections, whole: CompiledCut, *naming: CompiledCut) -> CompiledCut:
    if isinstance(whole, ReplayedCut):
        return whole.along(own, named=naming[0].along(own) if naming else None)
    return whole.along(own)


def _witness(request: Request) -> Float[Tensor, "shared d_rep"]:
    """The witness, behind as many zeros as make products of many directions as quick as if it were not there."""
    width, asked = sizes(request.graph.root)[-1], len(request.along)
    witness = torch.randn(1, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    between = -(asked + 1) % ALIGNED if asked >= ALIGNED**2 else 0
    return torch.cat([witness.new_zeros(between, width), witness / witness.norm()]).to(request.along)


def _own_directions(
    labels: Sequence[str], maps: Tensor, request: Request, cut: Cut, met: Sequence[Point]
) -> OwnDirections:
    """Whose maps are whose."""
    graph, rows, read = request.graph, {label: row for row, label in enumerate(labels)}, {}
    for point in met:
        mine = [c.label for c in _components(graph, point)]
        node, known = cut.points[point.hook], all(label in rows for label in mine)  # the others are refused later
        axis = None if point.axis is None else point.axis % len(sizes(node))
        read[node] = axis, [rows[label] for label in mine] if known else []
    others = rows | {h: rows[label] for h in request.changed if (label := f"intervention@{h}") in rows}
    return OwnDirections(maps, request.along, _witness(request), read, others)


def _refuse_other(
    aligner: ComponentMaps, request: Request, program: CompiledCut, components: Sequence[Component]
) -> None:
    """Refuse an aligner of another model or another cut.

    Raises:
        InputError: Then.
    """
    known = {component.label for component in aligner.components}
    changed = [Component(kind="intervention", name=hook) for hook in request.changed if hook in program.outside]
    changed = [component for component in changed if component.label in known]  # others may have changed nothing
    others = sorted(program.outside.difference(request.changed))
    found = dict.fromkeys([*components, *changed, *(Component(kind="constant", name=name) for name in others)])
    if isinstance(aligner, OfOneModel):
        none = torch.empty(len(found), 0, sizes(request.graph.root)[-1])
        aligner.refuse_other(Decomposition(none, tuple(found), metadata=request.metadata))
    rows_of_maps(aligner, [component.label for component in found])


def _components(graph: FrozenGraph, point: Point) -> tuple[Component, ...]:
    """The components at a point of the cut that an aligner was made for."""
    return point.components(1 if point.axis is None else sizes(graph.points[point.hook])[point.axis])


def _refuse_not_finite(what: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise InputError(f"Expected an aligner with finite maps and bias; its {what} has NaN or infinite entries.")


def on_pieces(
    request: Request,
    reads: Collection[str],
    use: Callable[[slice, Captured], T],
    at_once: Mapping[str, Callable[[slice, Tensor], None]] | None = None,
    *,
    batch_size: int | None,
    program: Reads | None = None,
) -> list[T]:
    """Run the model on pieces of the batch, and use what each leaves; none of it outlives its use.

    Args:
        request: What is asked for.
        reads: At which points.
        use: Gets which images a piece has, and what its run left.
        at_once: What to do during the run with what is read at some of the points, in place of keeping it; gets which
            images the piece has.
        batch_size: How many images a piece has; by default as many as keep little.
        program: What is kept; by default what the request's cut reads.
    """
    images, model, graph, program = request.images, request.model, request.graph, program or request.program
    at_once = at_once or {}
    kept = {*reads, *request.changed} - at_once.keys()
    size = kept_size(graph, program, kept)
    batch_size = _piece(batch_size, images, size * program.dtype.itemsize)
    of = "representation" if request.of == "embedding" else request.of
    read, _ = reading(of, hook_points(request.module))
    # Where nothing is hooked, the graph itself is run.
    run: Callable[[Tensor], Any] | None = partial(read, request.module) if model.hook_dict else None
    differentiable = torch.is_grad_enabled() and images.requires_grad
    shelf = None if differentiable else Shelf(size * batch_size, program.dtype, program.device)
    results = []
    with torch.set_grad_enabled(differentiable):
        for first in range(0, len(images), batch_size):
            which = slice(first, min(first + batch_size, len(images)))
            here = {name: partial(function, which) for name, function in at_once.items()}
            captured = capture(
                run,
                images[which],
                model.hook_dict,
                graph,
                program,
                kept,
                changed=request.changed,
                at_once=here,
                shelf=shelf,
            )
            with in_full_precision(images.device):
                results.append(use(which, captured))
            del captured  # or it would outlive the next run
            if shelf is not None:
                shelf.clear()
    return results


def _piece(batch_size: int | None, images: Tensor, bytes_of_one: int) -> int:
    """How many images to run at once."""
    if batch_size is None:
        budget = KEPT_BYTES.get(images.device.type, KEPT_BYTES_ELSEWHERE)
        many = budget // max(1, bytes_of_one)
        most = max(1, many, min(FEW_IMAGES, 4 * many))
        return -(-len(images) // -(-len(images) // most))  # even pieces
    if batch_size < 1:
        raise InputError(f"batch_size= must be at least 1; got {batch_size}. Leave it out to have it chosen.")
    return min(batch_size, len(images))


def refuse_too_large(shape: tuple[int, ...], dtype: torch.dtype, max_bytes: int, axes: str) -> None:
    """Refuse results above ``max_bytes`` before anything is computed.

    Raises:
        CapacityError: Says what to ask for instead.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size > max_bytes:
        raise CapacityError(
            f"The result, [{axes}] = {list(shape)} of {dtype}, would take {size:,} bytes, more than"
            f" max_bytes={max_bytes} allows. Use fewer images, components=[...], a coarser by=, or attribute() with few"
            " directions in place of whole vectors; or raise max_bytes=."
        )
