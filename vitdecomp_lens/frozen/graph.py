"""A traced module, frozen at an input: cuts, push, pull, and the slow replay that checks them."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from vitdecomp_lens.errors import CapacityError, IncompleteCutError, UnknownNameError, VitDecompWarning, near_matches
from vitdecomp_lens.frozen.branches import Branches, find_branches
from vitdecomp_lens.frozen.compiled import CompiledCut, in_full_precision
from vitdecomp_lens.frozen.fingerprint import fingerprint
from vitdecomp_lens.frozen.hops import Carrier, Hops, compile_hops
from vitdecomp_lens.frozen.pairs import NoFastPathError
from vitdecomp_lens.frozen.program import compile_cut
from vitdecomp_lens.frozen.replay import replayed
from vitdecomp_lens.frozen.rules import depends, operation, sizes
from vitdecomp_lens.frozen.slow import ReplayedCut
from vitdecomp_lens.frozen.walk import Cut, module_path, walk


@runtime_checkable
class NamesParameters(Protocol):
    """A wrapper that knows what its parameters are called in the model that it wraps."""

    @property
    def parameter_names(self) -> Mapping[int, str]:
        """Names by ``id``."""


TAG = "vitdecomp_lens::tag"
MOST_PROGRAMS = 8


@dataclass(eq=False)
class FrozenGraph:
    """The graph of a module, with the batch free and the weights read from the live module at each use.

    Attributes:
        nodes: Operations in order.
        root: What is decomposed, ``[batch, d_rep]``.
        output: What the module was read to give: the root, or what an activation function makes of it.
        module: The module that was traced.
        parameters: Dotted name of the parameter or buffer behind each placeholder.
        constants: Tensors that the forward made by itself.
        owner: The graph that the nodes belong to.
        hooked: Points whose values would be constants if no hook listened there.
        named: More points, by name.
        kept: What is worked out from the graph, as long as it lives.
        points: The node of each hook point that is met; of one that is met more than once, the last.
        repeated: One such, if there is any.
    """

    nodes: tuple[Node, ...]
    root: Node
    output: Node
    module: nn.Module
    parameters: Mapping[str, str]
    constants: Mapping[str, Tensor]
    owner: Graph
    hooked: frozenset[str] = frozenset()
    named: Mapping[str, Node] = field(default_factory=dict, repr=False)
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)
    _hooked_graphs: "dict[frozenset[str], FrozenGraph]" = field(default_factory=dict, repr=False)
    _cuts: dict[tuple[str, ...] | None, Cut] = field(default_factory=dict, repr=False)
    _programs: dict[Any, "_Compiled"] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        known = self.parameters.keys() | self.constants.keys()
        self.images: Node = next(n for n in self.nodes if n.op == "placeholder" and n.name not in known)
        tagged = [(str(n.args[1]), n) for n in self.nodes if operation(n) == TAG]
        self.points: dict[str, Node] = {**dict(tagged), **self.named}
        self.repeated: str | None = next((name for name, node in tagged if dict(tagged)[name] is not node), None)
        self._order = {node: number for number, node in enumerate(self.nodes)}
        self.from_images: frozenset[Node] = self._depending_on({self.images})
        self.live: frozenset[Node] = self._depending_on({self.images, *(self.points[name] for name in self.hooked)})

    def _depending_on(self, found: set[Node]) -> frozenset[Node]:
        for node in self.nodes:
            if depends(node, found):
                found.add(node)
        return frozenset(found)

    def with_hooks(self, names: Iterable[str]) -> "FrozenGraph":
        """The graph of a run in which hooks listen at these points: their values may be anybody's.

        Values that no image changes (position embeddings, a learned query) are constants only while nobody can
        change them.
        """
        hooked = frozenset(name for name in names if name in self.points and self.points[name] not in self.from_images)
        if hooked == self.hooked:
            return self
        if hooked not in self._hooked_graphs:
            self._hooked_graphs[hooked] = replace(
                self, hooked=hooked, kept={}, _cuts={}, _programs={}, _hooked_graphs=self._hooked_graphs
            )
        return self._hooked_graphs[hooked]

    def with_points(self, named: Mapping[str, Node]) -> "FrozenGraph":
        """The graph with more points, which have names of one's own."""
        return replace(self, named=named, kept={}, _cuts={}, _programs={}, _hooked_graphs={})

    @cached_property
    def branches(self) -> Branches:
        """The parts that the graph consists of, found by its operations."""
        return find_branches(self.nodes, self.root, self.live)

    # --- cuts ---------------------------------------------------------------------------------------------

    def cut(self, points: Iterable[str] | None = None) -> Cut:
        """The cut at the named points; by default at every nonlinear output that a walk meets first.

        Args:
            points: Names of hook points, or of sources as the default cut names them.

        Raises:
            UnknownNameError: If the graph has no such point.
        """
        key = None if points is None else tuple(points)
        if key not in self._cuts:
            named = None if key is None else {name: self._node(name) for name in key}
            self._cuts[key] = walk(self.nodes, self.root, self.live, named, from_images=self.from_images)
        return self._cuts[key]

    def _node(self, name: str) -> Node:
        if name in self.points:
            return self.points[name]
        sources = self.cut().points
        if name in sources:
            return sources[name]
        known = [*self.points, *sources]
        raise UnknownNameError(f"The graph has no point {name!r}: {near_matches(name, known)}")

    # --- values -------------------------------------------------------------------------------------------

    def evaluate(
        self,
        wanted: Iterable[Node],
        given: Mapping[Node, Any],
        *,
        at_once: Mapping[Node, Callable[[Any], None]] | None = None,
    ) -> dict[Node, Any]:
        """Values of ``wanted``, computed from ``given`` and the live weights; the rest is freed on the way.

        Values of the nodes ``at_once`` are handed over as soon as they are there.
        """
        wanted, at_once = list(wanted), at_once or {}
        needed: set[Node] = set()
        ahead = [n for n in (*wanted, *at_once) if n not in given]
        while ahead:
            node = ahead.pop()
            if node not in needed:
                needed.add(node)
                ahead += [n for n in node.all_input_nodes if n not in given and n not in needed]
        uses: dict[Node, int] = dict.fromkeys(wanted, 1)
        for node in needed:
            for n in node.all_input_nodes:
                uses[n] = uses.get(n, 0) + 1
        values = dict(given)
        for node in sorted(needed, key=self._order.__getitem__):
            values[node] = self._run(node, values)
            if node in at_once:
                at_once[node](values[node])
            for n in node.all_input_nodes:
                uses[n] -= 1
                if not uses[n] and n in needed:
                    del values[n]
        return {node: values[node] for node in wanted}

    def _run(self, node: Node, values: Mapping[Node, Any]) -> Any:
        if node.op == "placeholder":
            return self.weight(node)
        if node.op == "get_attr":  # the body of a context
            return getattr(self.owner.owning_module, str(node.target))
        if operation(node) == TAG:
            return values[node.args[0]]  # type: ignore[index]
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def weight(self, node: Node) -> Tensor:
        """The live parameter, buffer or constant behind a placeholder."""
        if node.name in self.constants:
            return self.constants[node.name]
        *path, name = self.parameters[node.name].split(".")
        owner = self.module.get_submodule(".".join(path))
        return getattr(owner, name)

    def record(self, images: Float[Tensor, "batch channel height width"]) -> dict[Node, Any]:
        """The value of every operation at ``images``, by running the graph."""
        return self.evaluate([n for n in self.nodes if n.op != "output"], {self.images: images})

    def _constant(self, node: Node, like: Tensor) -> Tensor:
        # The batch enters constants through its size only; with one image nothing is expanded over it.
        shape = (1, *sizes(self.images)[1:])
        stand_in = torch.zeros((), dtype=self.images.meta["val"].dtype, device=like.device).expand(shape)
        return self.evaluate([node], {self.images: stand_in})[node].detach()

    def constant_name(self, node: Node) -> str:
        """The parameters that a constant is made of."""
        found: list[str] = []
        names = self.module.parameter_names if isinstance(self.module, NamesParameters) else {}
        ahead, seen = [node], set()
        while ahead:
            n = ahead.pop(0)
            if n.name in self.constants:
                found.append(n.name.removeprefix("c_").removeprefix("module_"))
            if n.name in self.parameters:
                found.append(names.get(id(self.weight(n)), self.parameters[n.name]))
            ahead += [i for i in n.all_input_nodes if i not in seen and i not in self.live]
            seen.update(n.all_input_nodes)
        return "+".join(dict.fromkeys(found)) or f"{module_path(node)}:{operation(node).removeprefix('aten::')}"

    # --- the fast way -------------------------------------------------------------------------------------

    def program(
        self,
        cut: Cut,
        *,
        splits: Mapping[str, int | None] | None = None,
        through: Sequence[str] = (),
        directions: Float[Tensor, "direction d_rep"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> CompiledCut:
        """The compiled cut; kept until a weight that it was made from changes.

        Where pairs cannot pass an operation, or would become too many, it is compiled to a slow replay instead,
        with a `VitDecompWarning` that names the operation.

        Args:
            cut: A complete cut.
            splits: Axis of a point's value along which components lie. Points without one are components.
            through: Hook points on the path that are read too although the walk passes them.
            directions: What to read; without them, whole vectors.
            dtype: In what to compute.

        Raises:
            IncompleteCutError: If the output is not affine in the points of the cut.
        """
        check_complete(cut)
        splits = {name: (splits or {}).get(name) for name in (*cut.points, *through)}
        key = (tuple(splits.items()), tuple(cut.points), dtype, None if directions is None else tuple(directions.shape))
        kept = self._programs.get(key)
        if kept is None or not kept.holds(self, directions):
            kept = self._programs[key] = self._compile(cut, splits, through, directions, dtype)
            self._forget_old()
        return kept.program

    def _compile(
        self,
        cut: Cut,
        splits: Mapping[str, int | None],
        through: Sequence[str],
        directions: Tensor | None,
        dtype: torch.dtype,
    ) -> "_Compiled":
        read, weights, value_of = self._reading(directions, dtype)
        val = self.images.meta["val"]
        met = set(cut.order)
        nodes = {name: self.points[name] for name in through if self.points[name] in met}
        program: CompiledCut
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(val.device.type, enabled=False):
                program = compile_cut(
                    cut,
                    splits=splits,
                    through=nodes,
                    directions=read,
                    live=self.live,
                    value_of=value_of,
                    name_of=self.constant_name,
                )
        except (NoFastPathError, CapacityError) as error:
            _warn_of_the_slow_way(error)
            weights.clear()  # a replay reads them anew each time
            program = ReplayedCut(cut, splits=splits, through=nodes, directions=read, live=self.live)
        state = self._state(list(weights))
        return _Compiled(program, list(weights), state, None if directions is None else directions.detach().clone())

    def _reading(
        self, directions: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, dict[Node, None], Callable[[Node], Tensor]]:
        """What is read at the output; the weights that are used, filled in by what gives constants their values."""
        weights: dict[Node, None] = {}

        def value_of(node: Node) -> Tensor:
            weights.update(dict.fromkeys(self._behind(node)))
            return self._constant(node, read)

        read = (
            torch.eye(sizes(self.root)[-1], dtype=dtype, device=self.images.meta["val"].device)
            if directions is None
            else directions.to(dtype)
        )
        with torch.inference_mode(False):  # what is compiled in inference mode serves outside of it too
            read = read.detach().clone()
        return read, weights, value_of

    def hops(
        self,
        cut: Cut,
        carriers: Sequence[Carrier],
        *,
        components: Sequence[str],
        splits: Mapping[str, int | None],
        changed: Sequence[str] = (),
        directions: Float[Tensor, "direction d_rep"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Hops:
        """What goes through carriers, compiled; kept as `program` keeps a cut.

        Args:
            cut: A complete cut that goes on through the carriers' attentions.
            carriers: The values that are passed through.
            components: The points that are read behind them.
            splits: Axis of a point's value along which components lie.
            changed: Hook points behind them that are read too although the walk passes them.
            directions: What to read; without them, whole vectors.
            dtype: In what to compute.

        Raises:
            IncompleteCutError: If the output is not affine in the points of the cut.
            NoFastPathError: If pairs cannot pass an operation.
            CapacityError: If there would be too many pairs.
        """
        check_complete(cut)
        shape = None if directions is None else tuple(directions.shape)
        key = (Hops, tuple(carriers), tuple(components), tuple(splits.items()), tuple(changed), dtype, shape)
        kept = self._programs.get(key)
        if kept is None or not kept.holds(self, directions):
            read, weights, value_of = self._reading(directions, dtype)
            met = set(cut.order)
            nodes = [
                {name: self.points[name] for name in names if self.points[name] in met}
                for names in (components, changed, dict.fromkeys(carrier.hook for carrier in carriers))
            ]
            device = read.device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                hops = compile_hops(
                    cut,
                    carriers,
                    components=nodes[0],
                    splits=splits,
                    values=nodes[2],
                    changed=nodes[1],
                    directions=read,
                    live=self.live,
                    value_of=value_of,
                    name_of=self.constant_name,
                )
            directions = None if directions is None else directions.detach().clone()
            kept = self._programs[key] = _Compiled(hops, list(weights), self._state(list(weights)), directions)
            self._forget_old()
        return kept.program

    def _forget_old(self) -> None:
        while len(self._programs) > MOST_PROGRAMS:
            self._programs.pop(next(iter(self._programs)))

    def _behind(self, node: Node) -> list[Node]:
        found, ahead = [], [node]
        while ahead:
            n = ahead.pop()
            if n.op == "placeholder" and n is not self.images:
                found.append(n)
            ahead += n.all_input_nodes
        return found

    def _state(self, weights: Sequence[Node]) -> tuple[Any, ...]:
        return fingerprint(self.weight(node) for node in weights)

    # --- the slow way -------------------------------------------------------------------------------------

    def replay(
        self, cut: Cut, recorded: Mapping[Node, Any], sources: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch d_rep"]:
        """Run the frozen graph again from values at the cut's points; those not given are zero.

        The oracle of the fast way: it shares nothing with it but the walk. With no sources it gives the
        constants' contribution.
        """
        check_complete(cut)
        moving = {node: sources.get(name, torch.zeros_like(recorded[node])) for name, node in cut.points.items()}
        for node in reversed(cut.order):
            if node not in moving:
                moving[node] = replayed(node, cut.through[node], moving, recorded)
        return moving[cut.root]

    def push(self, cut: Cut, images: Float[Tensor, "batch channel height width"]) -> dict[str, Tensor]:
        """The vector that each point of a cut writes at ``images``, and the constants', by name.

        Returns:
            For each point and each constant ``[batch, d_rep]``; all of them sum to the output.
        """
        return self._through_program(cut, images, None)

    def pull(
        self,
        cut: Cut,
        images: Float[Tensor, "batch channel height width"],
        directions: Float[Tensor, "direction d_rep"],
    ) -> dict[str, Tensor]:
        """The score ⟨u, contribution⟩ of each point and constant, ``[batch, direction]``, without the vectors."""
        return self._through_program(cut, images, directions)

    def _through_program(self, cut: Cut, images: Tensor, directions: Tensor | None) -> dict[str, Tensor]:
        program = self.program(cut, directions=directions, dtype=wide(images.dtype))
        batch = len(images)
        with torch.set_grad_enabled(images.requires_grad and torch.is_grad_enabled()):
            values = self.evaluate([*cut.points.values(), *program.nodes], {self.images: images})
            with in_full_precision(images.device):
                weights = program.weights_at(values, batch)
                kept = {name: program.keep(name, values[node]) for name, node in cut.points.items()}
                written = {name: value[0] for name, value in program.contributions(kept, weights, batch).items()}
                return {**written, **dict(zip(program.constants, program.shifted(weights, batch), strict=True))}


@dataclass
class _Compiled:
    program: Any  # a compiled cut, or what goes through values
    weights: list[Node]
    state: tuple[Any, ...]
    directions: Tensor | None

    def holds(self, graph: FrozenGraph, directions: Tensor | None) -> bool:
        same = directions is None or (
            self.directions is not None
            and directions.device == self.directions.device
            and directions.dtype == self.directions.dtype
            and torch.equal(directions, self.directions)
        )
        return same and self.state == graph._state(self.weights)


def _warn_of_the_slow_way(error: Exception) -> None:
    message = (
        f"{error}. The slow replay takes its place: as exact, but slower, and all constants are one component named"
        " 'constants'."
    )
    warnings.warn(message, VitDecompWarning, stacklevel=4)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which contributions of values of ``dtype`` are computed: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_complete(cut: Cut) -> None:
    """Refuse a cut behind which the output still depends on the images.

    Raises:
        IncompleteCutError: Naming every place where the walk had to stop.
    """
    if cut.missing:
        places = "\n  ".join(map(str, cut.missing[:10]))
        more = f"\n  and {len(cut.missing) - 10} more" if len(cut.missing) > 10 else ""
        raise IncompleteCutError(
            "The cut must meet every path from the output before a nonlinearity or the images; it misses"
            f"\n  {places}{more}\nAdd points in front of these, or take the default cut."
        )
