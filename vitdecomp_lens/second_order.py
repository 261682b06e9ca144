"""The second order: what components write through the values of later attention heads.

A component's direct effect is what it writes into the representation past everything later. Its second-order effect is
what later heads carry: it changes their values, and these the representation (Gandelsman, Efros and Steinhardt, arXiv
2406.04341, section 3). With patterns and normalisers frozen that is linear, so a head's own direct effect is the sum of
what all earlier components and constants write through it, exactly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.capture import Captured, changed_on_the_path
from vitdecomp_lens.components import By, Component
from vitdecomp_lens.decompose import TOLERANCES, is_exact
from vitdecomp_lens.decomposition import Attribution, Decomposition
from vitdecomp_lens.errors import (
    CapacityError,
    GapError,
    InputError,
    UnknownNameError,
    UnsupportedModelError,
    near_matches,
)
from vitdecomp_lens.frozen.hops import Carrier, Hops
from vitdecomp_lens.frozen.pairs import NoFastPathError
from vitdecomp_lens.frozen.rules import sizes
from vitdecomp_lens.frozen.trace import Read
from vitdecomp_lens.request import MAX_BYTES, Request, make_request, on_pieces, refuse_too_large
from vitdecomp_lens.selecting import position

L = TypeVar("L", Decomposition, Attribution)
ThroughWhat = Literal["head", "layer"] | Sequence[str]


@dataclass(frozen=True, eq=False)
class SecondOrder(Generic[L]):
    """What components write through each of several carriers: heads, or the attentions of layers.

    Attributes:
        carriers: What is written through.
        parts: For each carrier what every component writes through it. Its total is the carrier's own direct effect, of
            which a complete decomposition leaves nothing.

    Example:
        >>> one = Decomposition(torch.ones(1, 1, 2), ("mlp.0",), torch.ones(1, 2))
        >>> both = SecondOrder((Component("head", 1, 0), Component("head", 1, 1)), (one, one))
        >>> both["L1H1"]["mlp.0"], both.summed["mlp.0"]
        (tensor([[1., 1.]]), tensor([[2., 2.]]))
    """

    carriers: tuple[Component, ...]
    parts: tuple[L, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The carriers' labels."""
        return tuple(carrier.label for carrier in self.carriers)

    def __len__(self) -> int:
        return len(self.carriers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.labels)

    def __getitem__(self, carrier: str | Component) -> L:
        return self.parts[position({label: row for row, label in enumerate(self.labels)}, carrier)]

    @cached_property
    def summed(self) -> L:
        """What every component writes through any of the carriers, which sum to their direct effects.

        Raises:
            InputError: If a head and its layer's attention are both among the carriers, and would count twice.
        """
        layers = {(one.layer, one.name): one.label for one in self.carriers if one.kind == "attn"}
        for one in self.carriers:
            if one.kind == "head" and (one.layer, one.name) in layers:
                whole = layers[one.layer, one.name]
                raise InputError(
                    f"What goes through {one.label} goes through {whole}, and would count twice. Ask for one of them,"
                    " with through=, or add up those that you want."
                )
        through = {"through": ", ".join(self.labels)}
        values = torch.stack([part.values for part in self.parts]).sum(0)
        totals = [part.total for part in self.parts if part.total is not None]
        total = torch.stack(totals).sum(0) if totals else None
        return replace(self.parts[0], values=values, total=total, metadata={**self.parts[0].metadata, **through})


def second_order(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    *,
    by: By = "head",
    through: ThroughWhat = "layer",
    of: Read = "representation",
    components: Sequence[str] | None = None,
    batch_size: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> SecondOrder[Decomposition]:
    """The vector that every component writes into the representation through the values of each later attention.

    The path is component → residual stream → norm, values, pattern and output weights of one later head →
    representation. Given are each image's patterns, normalisers, and all else that later components do: other heads and
    MLPs write what they write. Exactly one head is passed; what goes through two of them is in neither's effect. Direct
    and second-order effects of a component are different paths; their sum is not its total effect
    (`vitdecomp_lens.intervene`), in which patterns, norms and later MLPs react.

    Args:
        model: A `HookedViT`, or another module whose attention is read at its values; hooks that are on it take part,
            but for those at values.
        images: As the model takes them.
        by: As for `decompose`: ``"neuron"`` for MLPs by neuron, ``"head"``, ``"layer"``, ``"latent"``.
        through: ``"layer"`` tells apart through which layer's attention, ``"head"`` through which head; or labels of
            both kinds, such as ``["L10H3", "attn.11"]``, for these only.
        of: As for `decompose`.
        components: Labels to compute; without them, all that stand before any of the carriers.
        batch_size: How many images to run at once; by default as many as keep memory small.
        max_bytes: The largest result to allow.

    Returns:
        For each carrier a `Decomposition` of its own direct effect, constants included.

    Raises:
        UnknownNameError: If there is no such carrier or component.
        UnsupportedModelError: If attention is not read at values, or these are reached in no way that is linear.
        GapError: If what goes through a carrier does not sum to its direct effect.
        CapacityError: If the result would be larger than ``max_bytes``.
        VitDecompError: As `decompose`.

    Example:
        >>> from vitdecomp_lens import HookedViT, decompose
        >>> model, images = HookedViT.from_timm("test_vit"), torch.randn(2, 3, 160, 160)
        >>> effects = second_order(model, images, through=["L5H0", "L5H1"])
        >>> effects["L5H1"]["mlp.2"].shape
        torch.Size([2, 64])
        >>> direct = decompose(model, images)["L5H1"]
        >>> torch.allclose(effects["L5H1"].sum(), direct, atol=1e-5)
        True
    """
    found, request = _second_order(model, images, None, by, through, of, components, batch_size, max_bytes)
    parts = tuple(
        Decomposition(values, found.components, total, **_said(request, carrier, components))
        for carrier, values, total in found.each()
    )
    return _checked(SecondOrder(found.carriers, parts), found.vectors.abs().amax(-1, keepdim=True), images)


def attribute_second_order(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    directions: Float[Tensor, "direction d_out"],
    *,
    by: By = "head",
    through: ThroughWhat = "layer",
    of: Read = "representation",
    names: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    batch_size: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> SecondOrder[Attribution]:
    """The scores of `second_order`'s vectors along directions, without making the vectors: for neurons by the thousand.

    Args:
        model: As for `second_order`.
        images: As for `second_order`.
        directions: Any vectors in the space of ``of``, as rows.
        by: As for `second_order`.
        through: As for `second_order`.
        of: As for `second_order`.
        names: A name for each direction.
        components: As for `second_order`.
        batch_size: As for `second_order`.
        max_bytes: As for `second_order`.

    Returns:
        For each carrier an `Attribution` ``[component, batch, direction]``.

    Raises:
        VitDecompError: As `second_order`; `InputError` if the directions do not fit the space.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> images = torch.randn(1, 3, 160, 160)
        >>> effects = attribute_second_order(model, images, model.W_U.T, by="neuron", components=["L3N7"])
        >>> effects.labels[-1], effects["attn.5"]["L3N7"].shape
        ('attn.5', torch.Size([1, 5]))
    """
    found, request = _second_order(model, images, directions, by, through, of, components, batch_size, max_bytes)
    named = None if names is None else tuple(names)
    parts = tuple(
        Attribution(values, found.components, total, directions=named, **_said(request, carrier, components))
        for carrier, values, total in found.each()
    )
    norms = found.vectors.norm(dim=-1, keepdim=True) * request.along.norm(dim=-1)
    return _checked(SecondOrder(found.carriers, parts), norms, images)


@dataclass(frozen=True)
class _Found:
    """What is written.

    Attributes:
        carriers: Through what.
        components: By what.
        values: What each component writes through each carrier.
        totals: What each carrier writes.
        vectors: What the model itself computed.
    """

    carriers: tuple[Component, ...]
    components: tuple[Component, ...]
    values: Float[Tensor, "carrier component batch direction"]
    totals: Float[Tensor, "carrier batch direction"]
    vectors: Float[Tensor, "batch d_rep"]

    def each(self) -> Iterator[tuple[Component, Tensor, Tensor]]:
        """Each carrier, what is written through it, and what it writes."""
        return zip(self.carriers, self.values, self.totals, strict=True)


def _second_order(
    model: nn.Module,
    images: Tensor,
    directions: Tensor | None,
    by: By,
    through: ThroughWhat,
    of: Read,
    components: Sequence[str] | None,
    batch_size: int | None,
    max_bytes: int,
) -> tuple[_Found, Request]:
    """What is written, by carriers and components."""
    request = make_request(model, images, by, of, directions, tokens=False)
    called = _carriers(request, through)
    hops, changed = _compiled(request, list(called))
    if not hops.through:
        raise UnsupportedModelError(
            "Nothing goes from the values of these attentions to the output directly, with all else given. Name others"
            " with through=, or another output with of=."
        )
    met = dict.fromkeys(component for carrier in hops.through for component in called[carrier])
    carriers = {component: row for row, component in enumerate(met)}
    rows = _rows(request, hops, changed)
    wanted = _wanted(rows, components)
    shape = (len(carriers), len(wanted), len(images), hops.carried.directions)
    refuse_too_large(shape, hops.dtype, max_bytes, "carrier component batch direction")
    values = torch.zeros(shape, dtype=hops.dtype, device=hops.device)
    totals, vectors = values.new_zeros(shape[0], *shape[2:]), []
    read = [name for name, mine in rows.items() if not wanted.keys().isdisjoint(mine)]

    def use(which: slice, captured: Captured) -> None:
        batch = len(captured.total)
        weights = hops.weights(captured.read, batch)
        for carrier, total in hops.totals(captured.kept, weights, batch).items():
            written = hops.written(carrier, captured.kept, weights, batch, read)
            for row in (carriers[component] for component in called[carrier]):
                totals[row, which] += total
                for name, several in written.items():
                    for component, one in zip(rows[name], several, strict=True):
                        if component in wanted:
                            values[row, wanted[component], which] += one
        vectors.append(captured.total.to(hops.dtype))

    kept = [name for name in read if any(name in program.terms for program in hops.through.values())]
    on_pieces(
        replace(request, changed=changed), [*kept, *hops.carried.points], use, batch_size=batch_size, program=hops
    )
    whole = torch.cat(vectors)
    if of == "embedding":
        norm = whole.norm(dim=-1, keepdim=True)
        values, totals, whole = values / norm, totals / norm, whole / norm
    return _Found(tuple(carriers), tuple(wanted), values, totals, whole), request


# --- what is passed, and what is read --------------------------------------------------------------------------------


def _carriers(request: Request, through: ThroughWhat) -> dict[Carrier, list[Component]]:
    """The heads' values that are passed through, and to what is counted what goes through them: heads, layers.

    Raises:
        UnsupportedModelError: If attention is nowhere read at values.
        UnknownNameError: If there is no such head or layer.
        InputError: If none is named.
    """
    heads: dict[Carrier, Component] = {}
    layers: dict[Carrier, Component] = {}
    for point in request.model.token_points("head"):
        if point.component.kind != "attn" or point.axis is None or point.hook not in request.graph.points:
            continue
        for part, head in enumerate(point.components(sizes(request.graph.points[point.hook])[point.axis])):
            carrier = Carrier(point.hook, point.axis, part)
            heads[carrier], layers[carrier] = head, point.component
    if not heads:
        raise UnsupportedModelError(
            f"{type(request.module).__name__} does not say where the values of its attention heads are. If it has"
            " attention, wrap it: HookedViT(model); or give your own HookPoints TransformerLens' names,"
            " blocks.0.attn.hook_v."
        )
    if not through or (isinstance(through, str) and through not in ("head", "layer")):
        raise InputError(f"through= must be 'head', 'layer' or labels of these, such as ['L3H1']; got {through!r}.")
    if isinstance(through, str):
        return {carrier: [one] for carrier, one in (heads if through == "head" else layers).items()}
    known = {component.label for component in (*heads.values(), *layers.values())}
    for label in through:
        if label not in known:
            near = near_matches(label, known)
            raise UnknownNameError(f"There is no head or attention {label!r} to go through; {near}")
    found = {
        carrier: [one for one in (head, layers[carrier]) if one.label in through] for carrier, head in heads.items()
    }
    return {carrier: counted for carrier, counted in found.items() if counted}


def _compiled(request: Request, carriers: Sequence[Carrier]) -> tuple[Hops, tuple[str, ...]]:
    """What goes through carriers; and at which hooks on the way hop 1 meets changes.

    Raises:
        InputError: If somebody hooks the values.
        UnsupportedModelError: If pairs cannot pass an operation.
    """
    graph = request.graph
    points = [point for point in request.points if point.hook in graph.points]
    cut = graph.cut([point.hook for point in points if point.component.kind != "attn"])
    changed = changed_on_the_path(graph, cut, request.model.hook_dict)
    at_values = [carrier.hook for carrier in carriers if carrier.hook in changed]
    if at_values:
        raise InputError(
            f"A hook stands at {at_values[0]}, so that the values which components write are not those that go on."
            " Remove it, or go through other heads with through=."
        )
    changed = tuple(hook for hook in changed if hook not in {point.hook for point in points})
    try:
        hops = graph.hops(
            cut,
            carriers,
            components=[point.hook for point in points],
            splits={point.hook: point.axis for point in points},
            changed=changed,
            directions=request.directions,
            dtype=request.program.dtype,
        )
    except (NoFastPathError, CapacityError) as error:
        raise UnsupportedModelError(
            f"What goes through the values of this model's heads cannot be told apart: {error}. Name fewer with"
            " through=, or fewer directions (attribute_second_order)."
        ) from error
    return hops, tuple(hook for hook in changed if any(hook in program.points for program in hops.through.values()))


def _rows(request: Request, hops: Hops, changed: Sequence[str]) -> dict[str, tuple[Component, ...]]:
    """The components at each point, hook and constant that is read through any carrier."""
    programs = hops.through.values()
    points = [point for point in request.points if any(point.hook in program.terms for program in programs)]
    constants = dict.fromkeys(name for program in programs for name in program.constants)
    return {
        **{point.hook: request.components_of(point) for point in points},
        **{hook: (Component(kind="intervention", name=hook),) for hook in changed},
        **{name: (Component(kind="constant", name=name),) for name in constants},
    }


def _wanted(rows: Mapping[str, tuple[Component, ...]], components: Sequence[str] | None) -> dict[Component, int]:
    """The components asked for, and their rows.

    Raises:
        UnknownNameError: If one stands before none of the carriers.
    """
    everything = dict.fromkeys(component for mine in rows.values() for component in mine)
    if components is not None:
        known = {component.label: component for component in everything}
        asked = [components] if isinstance(components, str) else components
        for label in asked:
            if label not in known:
                near = near_matches(label, known)
                raise UnknownNameError(f"There is no component {label!r} before any head that is gone through; {near}")
        everything = dict.fromkeys(known[label] for label in asked)
    return {component: row for row, component in enumerate(everything)}


# --- afterwards ------------------------------------------------------------------------------------------------------


def _said(request: Request, carrier: Component, components: Sequence[str] | None) -> dict[str, Any]:
    metadata = {**request.metadata, "effect": "second order", "through": carrier.label}
    return {"complete": components is None, "metadata": metadata}


def _checked(effects: SecondOrder[L], scale: Float[Tensor, "batch #width"], images: Tensor) -> SecondOrder[L]:
    """Check that what goes through a carrier sums to what it writes, relative to the whole representation.

    Raises:
        GapError: Naming the carrier and the image.
    """
    for carrier, part in zip(effects.labels, effects.parts, strict=True):
        if not part.complete or not is_exact(images):
            continue
        tolerance = TOLERANCES[images.dtype]
        assert part.rest is not None
        gap = (part.rest.abs() / scale).nan_to_num(nan=torch.inf).masked_fill(part.rest == 0, 0).amax(-1)
        if not bool((gap <= tolerance).all()):
            image = int(gap.argmax())
            raise GapError(
                f"What goes through {carrier} in image {image} does not sum to what {carrier} writes: off by"
                f" {float(gap[image]):.1e} of the representation; allowed is {tolerance:.1e}."
            )
    return effects
