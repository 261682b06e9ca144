"""Who writes what: `decompose` into vectors, `attribute` into scores, `attribute_tokens` into scores by token.

All three freeze a model at its input, trace it (once a shape), compile the cut that ``by=`` names (once), run
the model natively, and take what it computed through the compiled cut. They know of a model only what
`Decomposable` says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.capture import Captured
from vitdecomp_lens.components import By
from vitdecomp_lens.decomposition import Attribution, ComponentMaps, Decomposition
from vitdecomp_lens.errors import GapError, InputError
from vitdecomp_lens.frozen.trace import Read
from vitdecomp_lens.gap import summed
from vitdecomp_lens.request import MAX_BYTES, Mapped, Request, make_request, on_pieces, refuse_too_large
from vitdecomp_lens.token_maps import TokenMaps
from vitdecomp_lens.tokens import TokenAttribution

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def decompose(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    *,
    by: By = "head",
    of: Read = "representation",
    components: Sequence[str] | Mapping[str, str] | None = None,
    batch_size: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Decomposition:
    """The vector that every component writes into the representation.

    z = b + Σ_c A_c(a_c), exactly for these images: the model is frozen at each of them (1/σ of normalisers;
    nonlinear outputs are taken as given), and A_c carries only the paths through no other component, the
    direct effect (arXiv 2406.01583, section 3, RepDecompose).

    Args:
        model: A `HookedViT`, any module with TransformerLens hook points, or any other module. Hooks that are on it
            take part: the decomposition is that of the run with them, and what they change between the components and
            the representation is a component ``intervention@hook``.
        images: As the model takes them; see ``model.preprocess``.
        by: ``"layer"``, ``"head"`` (attention split by head) or ``"neuron"`` (MLPs split by neuron).
        of: ``"representation"``, ``"logits"``, ``"embedding"`` (the representation divided by its frozen norm),
            a hook with one vector an image, or a function of model and images.
        components: Labels to compute; without them, all. Of a module with hook points that is not ours also a mapping
            from labels to hooks, ``{"mixer.0": "layers.0.hook_mixed"}``: each is a component of its own, in place of
            those that the names of hooks, or else the graph, would tell apart there.
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
    labels, components = _split(components)
    request = make_request(model, images, by, of, None, tokens=False, labels=labels)
    values, _, total = _contributions(request, components, batch_size, max_bytes)
    whole, found = request.labelled(components)
    if of == "embedding":
        norm = total.norm(dim=-1, keepdim=True)
        values, total = values / norm, total / norm
    parts = Decomposition(values, found, total, complete=whole, coverage=request.coverage, metadata=request.metadata)
    parts = parts if components is not None else _without_idle_interventions(parts)
    return parts.check_gap() if whole and is_exact(images) else parts


def attribute(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    directions: Float[Tensor, "direction d_out"],
    *,
    through: ComponentMaps | None = None,
    by: By = "head",
    of: Read = "representation",
    names: Sequence[str] | None = None,
    components: Sequence[str] | Mapping[str, str] | None = None,
    batch_size: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Attribution:
    """The score ⟨u, A_c(a_c)⟩ of every component along every direction u, without making the vectors.

    It is what ``decompose(...).project(directions)`` gives, at the cost of the directions only; and through an
    aligner, with ⟨u, f_c(A_c(a_c))⟩, what ``decompose(...).map(aligner).project(directions)`` gives.

    Args:
        model: As for `decompose`.
        images: As for `decompose`.
        directions: Any vectors in the space of ``of``, as rows; through an aligner, in the space that it leads to.
        through: An aligner made for these components, such as `vitdecomp_lens.clip.Aligner`: a linear map f_c for each
            and one bias for their sum, which becomes the constant ``aligner.bias``. The total is then by definition the
            sum of all that; what is checked is that the components, before they are mapped, sum to what the model
            computed.
        by: As for `decompose`.
        of: As for `decompose`.
        names: A name for each direction.
        components: As for `decompose`.
        batch_size: As for `decompose`.
        max_bytes: As for `decompose`.

    Returns:
        Scores ``[component, batch, direction]``.

    Raises:
        InputError: Also if the directions do not fit the space, or the aligner not the model and cut.
        VitDecompError: As `decompose`.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> scores = attribute(model, torch.randn(2, 3, 160, 160), model.W_U.T)
        >>> scores.values.shape[1:]
        torch.Size([2, 5])
    """
    labels, components = _split(components)
    request = make_request(model, images, by, of, directions, tokens=False, labels=labels, through=through)
    directions, mapped = request.along, request.mapped
    values, vectors, total = _contributions(request, components, batch_size, max_bytes)
    vectors = vectors.to(values.dtype)
    whole, found = request.labelled(components)
    if of == "embedding":
        norm = vectors.norm(dim=-1, keepdim=True)
        values, vectors, total = values / norm, vectors / norm, total / norm
    if mapped is not None:
        if is_exact(images):
            _check_witness(total[:, -1:], vectors, mapped)
        asked = slice(len(directions))
        values, total = values[..., asked].contiguous(), total[:, asked]
    scores = Attribution(
        values,
        found,
        total,
        complete=whole,
        coverage=request.coverage,
        metadata=request.metadata,
        directions=None if names is None else tuple(names),
    )
    scores = scores if components is not None else _without_idle_interventions(scores)
    if mapped is None and whole and is_exact(images):
        _check_scores(scores, vectors.norm(dim=-1, keepdim=True), directions)
    return scores


def attribute_tokens(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    directions: Float[Tensor, "direction d_out"],
    *,
    through: ComponentMaps | None = None,
    by: By = "head",
    of: Read = "representation",
    names: Sequence[str] | None = None,
    components: Sequence[str] | Mapping[str, str] | None = None,
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
        through: As for `attribute`. Whatever a token writes through a component is read through that component's map,
            constants within the component (an attention's output bias, for ``by="layer"``) too.
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
    labels, components = _split(components)
    request = make_request(model, images, by, of, directions, tokens=True, labels=labels, through=through)
    maps = TokenMaps(request, components, max_bytes)
    on_pieces(request, maps.reads, maps.add, maps.at_once(), batch_size=batch_size)
    if of == "embedding":
        maps.normalize()
    scores = maps.result(names)
    if components is None:
        scores = replace(scores, untokened=_without_idle_interventions(scores.untokened))
    if request.mapped is not None and is_exact(images):
        _check_witness(maps.sums[:, -1:], maps.vectors, request.mapped)
    elif scores.complete and is_exact(images):
        _check_scores(scores, maps.vectors.norm(dim=-1, keepdim=True), request.along)
    return scores


def _split(
    components: Sequence[str] | Mapping[str, str] | None,
) -> tuple[Mapping[str, str] | None, Sequence[str] | None]:
    """Where components are read, and which are wanted."""
    if not isinstance(components, Mapping):
        return None, components
    if odd := [part for item in components.items() for part in item if not isinstance(part, str)]:
        raise InputError(f"components= maps labels to names of hooks, both of them strings; got {odd[0]!r}.")
    return components, None


# --- computing -------------------------------------------------------------------------------------------------------


def _contributions(
    request: Request, components: Sequence[str] | None, batch_size: int | None, max_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the wanted components, the model's own vectors, and the total of the values."""
    wanted = request.labelled(components)[1]
    places = {component: place for place, component in enumerate(wanted)}
    read = [p for p in request.met if request.mapped or not places.keys().isdisjoint(request.components_of(p))]
    program, count = request.program, len(request.images)
    # What a point holds is computed as a whole, wanted or not.
    rows = sum(len(request.components_of(p)) for p in read) + len(request.others)
    refuse_too_large((rows, count, program.directions), program.dtype, max_bytes, "component batch direction")

    sums: dict[str, Tensor] = {}

    def sum_at_once(hook: str, images: slice, part: Tensor) -> None:
        sums[hook] = program.summed(hook, part, images.stop - images.start)

    at_once = {p.hook: partial(sum_at_once, p.hook) for p in read if p.hook in program.summed_first}

    def use(_images: slice, captured: Captured) -> tuple[Tensor, Tensor, Tensor]:
        request.refuse_strangers(captured)
        batch = len(captured.total)
        weights = program.weights(captured.read, batch)
        names = [p.hook for p in read] + list(request.changed)
        written = program.contributions({**captured.kept, **sums}, weights, batch, only=names, summed=sums)
        values = torch.cat([*(written[name] for name in names), request.of_constants(captured, weights)])
        total = _total(request, values, captured.total)
        found = [c for p in read for c in request.components_of(p)] + list(request.others)
        if found == list(wanted):
            return values, captured.total, total
        row_of = {component: row for row, component in enumerate(found)}
        return values[[row_of[component] for component in wanted]], captured.total, total

    found = on_pieces(request, [p.hook for p in read], use, at_once, batch_size=batch_size)
    pieces, vectors, totals = zip(*found, strict=True)
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)), torch.cat(vectors), torch.cat(totals)


def _total(request: Request, values: Tensor, vectors: Tensor) -> Tensor:
    """What the model's own vectors give; through an aligner, by definition the sum of all components."""
    if request.mapped is not None:
        return summed(values)
    return vectors if request.directions is None else vectors.to(values.dtype) @ request.along.T


# --- afterwards ------------------------------------------------------------------------------------------------------


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


def is_exact(images: Tensor) -> bool:
    """Whether the model runs in a precision in which a gap is an error; in half precision it is only reported."""
    return images.dtype in TOLERANCES and not torch.is_autocast_enabled(images.device.type)


def _check_scores(
    scores: Attribution | TokenAttribution,
    norm: Float[Tensor, "batch 1"],
    directions: Float[Tensor, "direction d_rep"],
) -> None:
    """Check that scores sum to the total's, relative to ‖u‖‖z‖: a total near zero is no reason to doubt them.

    Raises:
        GapError: Names the worst image and direction.
    """
    rest = scores.rest
    tolerance = TOLERANCES[norm.dtype]
    assert rest is not None
    scale = norm * directions.norm(dim=-1)
    gap = (rest.abs() / scale).nan_to_num(nan=torch.inf).masked_fill(rest == 0, 0)
    if not bool((gap <= tolerance).all()):
        image, direction = divmod(int(gap.argmax()), gap.shape[1])
        raise GapError(
            f"The scores of image {image} along direction {direction} do not sum to the model's own: off by"
            f" {float(gap[image, direction]):.1e} of ‖u‖‖z‖; allowed is {tolerance:.1e}."
        )


def _check_witness(written: Float[Tensor, "batch 1"], vectors: Float[Tensor, "batch d_rep"], mapped: Mapped) -> None:
    """Check that before they are mapped components sum to what the model computed, along a direction of its own.

    Raises:
        GapError: Names the worst image.
    """
    rest = vectors @ mapped.witness.T - written
    gap = (rest / vectors.norm(dim=-1, keepdim=True)).abs().masked_fill(rest == 0, 0)
    tolerance = TOLERANCES[vectors.dtype]
    if not bool((gap <= tolerance).all()):
        image = int(gap.nan_to_num(nan=torch.inf).argmax())
        raise GapError(
            f"The components of image {image} do not sum to what the model computed: off by {float(gap[image]):.1e} of"
            f" ‖z‖; allowed is {tolerance:.1e}. What is mapped is not the whole."
        )
