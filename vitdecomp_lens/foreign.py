"""A module of somebody else's with TransformerLens hook points: what `decompose` asks of a `Decomposable`.

Which hook points a run passes, and what lies between them and the output, the traced graph says. Components are read at
hooks of TransformerLens' names (``blocks.3.hook_attn_out``, ``blocks.3.attn.hook_z``, ...) and bear its labels, or
where labels are given, at these. The graph's other branches are components by their modules' paths, computed from the
hook points around them. The module itself is run, so what a user's hooks change takes part.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.fx import Node
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.components import By, Component, Point, TokenGrid
from vitdecomp_lens.coverage import Stop
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.frozen.branches import Branch, Where
from vitdecomp_lens.frozen.graph import FrozenGraph
from vitdecomp_lens.frozen.places import lattice, places, token_places, varying_axes
from vitdecomp_lens.frozen.rules import sizes
from vitdecomp_lens.frozen.walk import walk
from vitdecomp_lens.points import hook_points
from vitdecomp_lens.traced import SPLIT, Traced, check_any_images, without_places

EMBEDDINGS = ("hook_patch_embed", "hook_embed")
IN_BLOCKS: Mapping[Literal["attn", "mlp"], Mapping[Where, str]] = {
    "attn": {"output": "hook_attn_out", "parts": "attn.hook_z", "values": "attn.hook_v"},
    "mlp": {"output": "hook_mlp_out", "parts": "mlp.hook_post"},
}
HEADS = 2  # the axis of heads in ``batch token head d_head``
LABELLED = {"attn", "mlp", "conv", "source"}


@dataclass(frozen=True)
class _Part:
    """A component as a whole.

    Attributes:
        component: Its label.
        hooks: At which hooks it is read.
        branch: The number of the branch of the graph that it is; None where it is several, or none.
        given: Whether the user said where it is read.
    """

    component: Component
    hooks: Mapping[Where, str]
    branch: int | None
    given: bool = False


@dataclass(frozen=True)
class Foreign:
    """A module with hook points that does not say itself where its components are.

    Attributes:
        module: The module.
        graph: Its graph, in which the branches have names too.
        hook_dict: The hook points that a run passes, by name.
        parts: What is read at hooks.
        traced: The module as its graph alone tells it apart.
    """

    module: nn.Module
    graph: FrozenGraph
    hook_dict: dict[str, HookPoint] = field(repr=False)
    parts: tuple[_Part, ...]
    traced: Traced
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, module: nn.Module, graph: FrozenGraph, labels: Mapping[str, str] | None = None) -> "Foreign | None":
        """Find where a module's components are read; None for one whose run passes no hook points.

        Args:
            module: The module.
            graph: Its trace.
            labels: Hooks by the labels of the components that are read there.

        Raises:
            UnknownNameError: If there is no such hook.
            InputError: If components cannot be read there.
        """
        passed = {name: point for name, point in hook_points(module).items() if name in graph.points}
        if not passed:
            if labels is not None:
                raise InputError(
                    f"components= is a mapping from labels to hooks, and the forward of {type(module).__name__} passes"
                    " no TransformerLens hook points. Leave it out: components are then told apart by the traced graph."
                )
            return None
        key = (cls, None if labels is None else tuple(labels.items()))
        if key not in graph.kept:
            traced = Traced.of(module, graph)
            points = [p for by in ("layer", "head", "neuron") for p in _all_points(traced, by)]
            named = graph.with_points({point.hook: traced.graph.points[point.hook] for point in points})
            parts = tuple(_Finder(module, graph, passed, traced).parts(labels or {}))
            made = cls(module, named, passed, parts, traced)
            made._refuse_hidden()
            graph.kept[key] = made
        found: Foreign = graph.kept[key]
        return found if found.hook_dict == passed else replace(found, hook_dict=passed)

    def __call__(self, images: Tensor) -> Any:
        """Run the module itself."""
        return self.module(images)

    # --- where components are read --------------------------------------------------------------------------

    def component_points(self, by: By) -> tuple[Point, ...]:
        """Where components are read."""
        return self._points(by, self.traced.component_points(by), tokens=False)

    def token_points(self, by: By) -> tuple[Point, ...]:
        """The same by token: attention at its values, by head."""
        return self._points(by, self.traced.token_points(by), tokens=True)

    def _points(self, by: By, traced: tuple[Point, ...], *, tokens: bool) -> tuple[Point, ...]:
        key = (by, tokens)
        if key not in self._kept:
            mine = [self._point(part, by, traced, tokens) for part in self.parts]
            taken = {part.branch for part in self.parts}
            others = [number for number in range(len(traced)) if number not in taken]
            met = self._met_by_a_walk({p.hook: self.graph.points[p.hook] for p in mine}, others)
            found = [p for p in mine if p.hook in met] + [traced[n] for n in others if str(n) in met]
            place = {node: number for number, node in enumerate(self.graph.nodes)}
            self._kept[key] = tuple(sorted(found, key=lambda point: place[self.graph.points[point.hook]]))
        points: tuple[Point, ...] = self._kept[key]
        return points

    def _met_by_a_walk(self, hooks: Mapping[str, Node], others: Iterable[int]) -> Collection[str]:
        """Which hooks and which other branches, by number, a walk from the output meets first."""
        graph, branches = self.graph, self.graph.branches.found
        ends = {**hooks, **{str(number): branches[number].source for number in others}}
        return walk(graph.nodes, graph.root, graph.live, ends, from_images=graph.from_images).points.keys()

    def _point(self, part: _Part, by: By, traced: tuple[Point, ...], tokens: bool) -> Point:
        where = "output" if part.given else self._where(part, by, tokens)
        if where not in part.hooks and part.branch is not None:
            return replace(traced[part.branch], component=part.component)
        hook = part.hooks.get(where) or next(iter(part.hooks.values()))
        count = len(sizes(self.graph.points[hook]))
        axis = {"parts": HEADS if part.component.kind == "attn" else count - 1, "values": HEADS}.get(where)
        axes = self._token_axes(hook)
        return Point(hook, part.component, axis=axis, token_axis=axes[0] if axes else None)

    def _where(self, part: _Part, by: By, tokens: bool) -> Where:
        """In which form a component is read, at a hook or by the graph."""
        branch = None if part.branch is None else self.graph.branches.found[part.branch]
        if tokens and ("values" in part.hooks or (branch is not None and branch.values is not None)):
            return "values"
        splits = "parts" in part.hooks or (branch is not None and branch.split("parts") is not None)
        return "parts" if (by, part.component.kind) in SPLIT and splits else "output"

    def _refuse_hidden(self) -> None:
        """Refuse what the user wants to be read where nothing comes to the output directly."""
        read = {point.hook for point in self.component_points("layer")}
        for part in self.parts:
            if part.given and part.hooks["output"] not in read:
                raise InputError(
                    f"Nothing of {part.component.label!r} comes to the output from the hook {part.hooks['output']!r}"
                    " directly: other components, or a nonlinearity, lie on every way. Leave it out, or give labels"
                    " only to the hooks that are met first on the way back from the output."
                )

    # --- tokens ---------------------------------------------------------------------------------------------

    def _token_axes(self, hook: str) -> tuple[int, ...]:
        """The axes of a hook's value that run over tokens: the one behind the batch of a sequence of vectors.

        Of other values those along which entries stand at different places of the image.
        """
        node = self.graph.points[hook]
        if len(sizes(node)) == 3 or any(hook in p.hooks.values() and not p.given for p in self.parts):
            return (1,)
        return varying_axes(places(self.graph, [node])[node])

    def token_grid(self, images: Tensor, hook: str) -> TokenGrid:
        """Which pixels each token stands for, found by following places through the graph."""
        return self.traced.token_grid(images, hook) if hook not in self.hook_dict else self._grids[hook][0]

    def token_order(self, hook: str) -> tuple[int, ...]:
        """For each token of the grid, which of the value's it is."""
        return self.traced.token_order(hook) if hook not in self.hook_dict else self._grids[hook][1]

    @property
    def _grids(self) -> Mapping[str, tuple[TokenGrid, tuple[int, ...]]]:
        if "grids" not in self._kept:
            height, width = sizes(self.graph.images)[-2:]
            hooks = {hook: self.graph.points[hook] for part in self.parts for hook in part.hooks.values()}
            placed, grids = places(self.graph, hooks.values()), {}
            for hook, node in hooks.items():
                found = token_places(placed[node], self._token_axes(hook))
                grids[hook] = lattice(found, (height, width)) or without_places(len(found), (height, width))
            self._kept["grids"] = grids
        kept: Mapping[str, tuple[TokenGrid, tuple[int, ...]]] = self._kept["grids"]
        return kept

    # --- checks ---------------------------------------------------------------------------------------------

    def check_images(self, images: Any) -> None:
        """Raise `InputError` for images that no model of images takes."""
        check_any_images(images, self.module)

    @property
    def branches(self) -> int:
        """How many branches there are, hidden ones besides; one that is read at several hooks counts for each."""
        read = {p.component.label for p in self.component_points("layer") if p.component.kind in LABELLED}
        hidden = self.graph.branches.hidden
        return max(len(read), self.traced.branches - hidden) + hidden

    @property
    def stops(self) -> tuple[Stop, ...]:
        """Behind what branches are hidden."""
        return self.traced.stops


def _all_points(traced: Traced, by: Any) -> tuple[Point, ...]:
    return traced.component_points(by) + traced.token_points(by)


# --- which hooks ------------------------------------------------------------------------------------------------


class _Finder:
    """Finds of each component the hooks that lie on its way to the output."""

    def __init__(self, module: nn.Module, graph: FrozenGraph, passed: Mapping[str, HookPoint], traced: Traced) -> None:
        self.module, self.graph, self.passed, self.traced = module, graph, passed, traced
        self.branches = graph.branches.found
        self.owner = _owners(graph)

    def parts(self, labels: Mapping[str, str]) -> Iterator[_Part]:
        """What is read at hooks: where the user says, and where hooks have TransformerLens' names."""
        given = [self._given(label, name) for label, name in labels.items()]
        hooks = [part.hooks["output"] for part in given]
        if len(set(hooks)) < len(hooks):
            raise InputError(f"components= must name each hook once; got {dict(labels)}.")
        yield from given
        labelled = {part.component for part in given}
        taken = {part.branch for part in given} - {None}
        for part in self._canonical():
            if part.component not in labelled and part.branch not in taken and not set(hooks) & {*part.hooks.values()}:
                yield part

    def _given(self, label: str, name: str) -> _Part:
        component, hook = Component.from_label(label), self._hook(name)
        branch = self._branch([hook])
        if component.kind == "intervention":
            raise InputError(f"{label!r} is the label of what a hook changes; give another one to what is read there.")
        if component.kind == "constant":  # any other label
            component = Component(kind="source" if branch is None else self.branches[branch].kind, name=label)
        return _Part(component, {"output": hook}, branch, given=True)

    def _hook(self, name: str) -> str:
        """The name of a passed hook point by any of its names."""
        if name in self.passed:
            return name
        known = getattr(self.module, "hook_dict", {})
        same = next((hook for hook, point in self.passed.items() if point is known.get(name)), None)
        if same is not None:
            return same
        if name in known:
            raise InputError(
                f"Nothing can be read at the hook {name!r}: the forward of {type(self.module).__name__} never passes"
                " it, or discards what its hooks return."
            )
        raise UnknownNameError(
            f"{type(self.module).__name__} has no hook {name!r}; {near_matches(name, {**known, **self.passed})}"
        )

    def _canonical(self) -> Iterator[_Part]:
        for name in EMBEDDINGS:
            if name in self.passed and self.graph.points[name] in self.owner:
                yield _Part(Component(kind="embed"), {"output": name}, self._branch([name]))
                break
        numbers = {int(found[1]) for name in self.passed if (found := re.match(r"blocks\.(\d+)\.", name))}
        for number in sorted(numbers):
            for kind, names in IN_BLOCKS.items():
                whole = {where: f"blocks.{number}.{name}" for where, name in names.items()}
                hooks = {where: hook for where, hook in whole.items() if self._is_on_the_path(where, hook, kind)}
                if hooks:
                    branch = self._branch(hooks.values())
                    if branch is not None and self._are_its_values(whole, self.branches[branch]):
                        hooks["values"] = whole["values"]
                    yield _Part(Component(kind=kind, layer=number), hooks, branch)

    def _is_on_the_path(self, where: Where, hook: str, kind: str) -> bool:
        """Whether a hook's value is part of what comes to the output, in the shape that its name promises."""
        if where == "values" or hook not in self.passed or (node := self.graph.points[hook]) not in self.owner:
            return False
        return where == "output" or len(sizes(node)) == (4 if kind == "attn" else 3)

    def _branch(self, hooks: Iterable[str]) -> int | None:
        """The branch that alone writes all these values."""
        owners = {self.owner.get(self.graph.points[hook]) for hook in hooks}
        owner = owners.pop() if len(owners) == 1 else None
        return next((number for number, branch in enumerate(self.branches) if branch.source is owner), None)

    def _are_its_values(self, hooks: Mapping[Where, str], branch: Branch) -> bool:
        """Whether the hook of values has what an attention weighs, with as many heads as it writes."""
        hook, graph = hooks.get("values"), self.graph
        if hook is None or hook not in self.passed or branch.values is None:
            return False
        node, mixed = graph.points[hook], graph.points.get(hooks["parts"])
        shape, heads = sizes(node), self._heads(branch) if mixed is None else sizes(mixed)[HEADS:]
        met = walk(graph.nodes, branch.values, graph.live, {hook: node}, from_images=graph.from_images)
        return len(shape) == 4 and shape[HEADS:] == heads and met.complete and hook in met.points

    def _heads(self, branch: Branch) -> tuple[int, ...]:
        """Number and width of a branch's heads, as far as the graph shows them."""
        return tuple(sizes(branch.parts)[axis] for axis in branch.channels)


def _owners(graph: FrozenGraph) -> dict[Node, Node | None]:
    """Of each value on the way from branches to the output, the source of the branch that alone enters it."""
    sources = {branch.name: branch.source for branch in graph.branches.found}
    cut = walk(graph.nodes, graph.root, graph.live, sources, from_images=graph.from_images)
    met, owner = set(cut.points.values()), dict[Node, Node | None]()
    for node in reversed(cut.order):
        behind = {owner[n] for n in cut.through.get(node, ())}
        owner[node] = node if node in met else behind.pop() if len(behind) == 1 else None
    return owner
