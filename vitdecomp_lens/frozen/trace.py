"""From a module to its graph: export once, name what the hooks name, keep it as long as it is true."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.errors import InputError, UnknownNameError, UnsupportedModelError, near_matches
from vitdecomp_lens.frozen.graph import FrozenGraph
from vitdecomp_lens.frozen.rules import SPLITS, operation
from vitdecomp_lens.frozen.walk import module_path
from vitdecomp_lens.points import LazyHookPoint, hook_points, on_the_path

Read = str | Callable[[nn.Module, Tensor], Tensor]
REPRESENTATION_HOOK = "hook_representation"
EXAMPLES = 2  # a batch of one could not be told from a dimension of one


@torch.library.custom_op("vitdecomp_lens::tag", mutates_args=())
def tag(value: Tensor, name: str) -> Tensor:
    """The identity, under a name that survives the export."""
    return value.clone()


@tag.register_fake
def _(value: Tensor, name: str) -> Tensor:
    return torch.empty_like(value)


def trace(
    module: nn.Module, images: Tensor, *, of: Read = "representation", listened: Collection[str] = ()
) -> FrozenGraph:
    """Trace what a module computes from images, as a graph that is affine once frozen at an input.

    The batch dimension stays free. Every TransformerLens hook point that the run passes keeps its name. The
    graph is kept and used again until something that it depends on changes: image shape, dtype, device,
    the module's submodules, hooks and attributes, which lazy hook points are hooked, and ``of``. Weights are not part
    of it: they are read from the module at each use.

    Args:
        module: Any module that maps images to a tensor, in evaluation mode.
        images: An example, ``[batch, channel, height, width]``; only its shape, dtype and device matter.
        of: ``"representation"`` (timm: pooled and normed features before the classifier; open_clip: the
            projected embedding; otherwise the module's output), ``"logits"`` (the module's output), the name
            of a hook point, or a function of module and images.
        listened: Lazy hook points that are going to be listened at: the graph is that of a run with them.

    Raises:
        InputError: If what is traced is not one tensor ``[batch, d]``.
        UnknownNameError: If no hook point has that name.
        UnsupportedModelError: If the module is in training mode or cannot be exported.

    Example:
        >>> from torch import nn
        >>> graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval(), torch.rand(1, 3, 2, 2))
        >>> graph.cut().complete
        True
    """
    if module.training:
        raise UnsupportedModelError(
            f"Tracing needs {type(module).__name__} in evaluation mode, where dropout and batch statistics are"
            " fixed; it is in training mode. Call .eval() on it first."
        )
    points = on_the_path(hook_points(module), listened)
    lazy = frozenset(name for name, point in points.items() if isinstance(point, LazyHookPoint))
    key = (tuple(images.shape[1:]), images.dtype, images.device, of, lazy)
    kept, state = _traces_of(module), [*_state(module), *_closed_over(of)]
    for entry in kept:
        if entry.key == key and _same(entry.state, state):
            return entry.graph
    graph = _export(module, images, of, points)
    kept.append(_Kept(key, state, graph))
    del kept[:-MOST_KEPT]
    return graph


# --- what is kept -------------------------------------------------------------------------------------------

MOST_KEPT = 16  # traces a module; each is a graph without weights


@dataclass
class _Kept:
    key: tuple[Any, ...]
    state: list[Any] = field(repr=False)
    graph: FrozenGraph


class _Traces(list[_Kept]):
    """Traces, kept on the module itself: both refer to each other, and go together.

    A copied or pickled module starts without any.
    """

    def __deepcopy__(self, memo: Any) -> "_Traces":
        return _Traces()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return list, ()


_ATTRIBUTE = "_vitdecomp_lens_traces"


def _traces_of(module: nn.Module) -> _Traces:
    kept = module.__dict__.get(_ATTRIBUTE)
    if not isinstance(kept, _Traces):
        kept = module.__dict__[_ATTRIBUTE] = _Traces()
    return kept


# The last two are TransformerLens' book-keeping while hooks are on.
_STEERS_NOTHING = frozenset(nn.Module().__dict__) - {"training"} | {_ATTRIBUTE, "context_level", "is_caching"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def _state(module: nn.Module) -> list[Any]:
    """All that steers a forward besides weights: modules, their hooks, and attributes (heads, scales, fused or not).

    The things themselves, not their ids: an id is given again once its owner is gone.
    """
    found: list[Any] = []
    for child in module.modules():
        if isinstance(child, HookPoint):
            continue
        found.append(child)
        for name, value in child.__dict__.items():
            if name in _HOOKS:
                found += value.values()
            elif name in ("_parameters", "_buffers"):  # which there are; their values are read anew
                found += [item for key, tensor in value.items() for item in (key, tensor is None)]
            elif name not in _STEERS_NOTHING:
                found.append(name)
                _collect(value, found)
    return found


def _closed_over(of: Read) -> list[Any]:
    """What a function of the user's reads besides its arguments."""
    found: list[Any] = []
    if isinstance(of, FunctionType):
        _collect(of.__defaults__, found)
        _collect([cell.cell_contents for cell in of.__closure__ or ()], found)
        _collect([of.__globals__.get(name) for name in of.__code__.co_names], found)
    return found


_PLAIN = (type(None), bool, int, float, str, nn.Module, torch.dtype)


def _collect(value: Any, found: list[Any]) -> None:
    """Flatten containers, so that what is changed inside of them is seen."""
    if isinstance(value, _PLAIN):  # nearly all are
        found.append(value)
    elif isinstance(value, Mapping):
        found.append(len(value))
        for name, item in value.items():
            found.append(name)
            _collect(item, found)
    elif isinstance(value, list | tuple):
        found.append(len(value))
        for item in value:
            _collect(item, found)
    elif isinstance(value, set | frozenset):
        found.append(frozenset(value))
    elif is_dataclass(value) and not isinstance(value, type):
        _collect(vars(value), found)
    elif isinstance(value, Tensor):
        found += (value, 0 if value.is_inference() else value._version)
    elif isinstance(value, MethodType):  # made anew at each access
        found += (value.__func__, value.__self__)
    else:
        found.append(value)


_COMPARED = (bool, int, float, complex, str, bytes, frozenset, torch.dtype, torch.device)


def _same(kept: list[Any], now: list[Any]) -> bool:
    return len(kept) == len(now) and all(map(_is_same, kept, now))


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, _COMPARED) and one == other)


# --- what is read -------------------------------------------------------------------------------------------


def representation(module: nn.Module, images: Tensor) -> Any:
    """The representation of a module that has no hook for it (design: timm, open_clip, anything else)."""
    if callable(getattr(module, "forward_features", None)) and callable(getattr(module, "forward_head", None)):
        features = module.forward_features(images)  # type: ignore[operator]
        pooled = module.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return torch.cat(list(pooled), dim=-1) if isinstance(pooled, list | tuple) else pooled
    if callable(getattr(module, "encode_image", None)):
        return module.encode_image(images)  # type: ignore[operator]
    return module(images)


class _Reader(nn.Module):
    """What is exported: a module, read in one way."""

    def __init__(self, module: nn.Module, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.read = read

    def forward(self, images: Tensor) -> Any:
        return self.read(self.module, images)


def _reading(of: Read, points: Mapping[str, HookPoint]) -> tuple[Callable[[nn.Module, Tensor], Any], str | None]:
    """The function to export, and the hook whose value is the root (None: what the function returns)."""
    if callable(of):
        return of, None
    if of == "logits":
        return _run, None
    if of == "representation":
        return (_run, REPRESENTATION_HOOK) if REPRESENTATION_HOOK in points else (representation, None)
    if of not in points:
        raise UnknownNameError(
            f"of= must be 'representation', 'logits', a hook name or a function; got {of!r}: {near_matches(of, points)}"
        )
    return _run, of


def _run(module: nn.Module, images: Tensor) -> Any:
    return module(images)


# --- the export ---------------------------------------------------------------------------------------------


@contextmanager
def _tagged(points: Mapping[str, HookPoint]) -> Iterator[None]:
    """While inside, each hook point tags its value, and no hook of the user's runs."""
    kept = {name: (p._forward_hooks, p._forward_pre_hooks) for name, p in points.items()}
    try:
        for name, point in points.items():
            point._forward_pre_hooks = type(point._forward_pre_hooks)()
            point._forward_hooks = type(point._forward_hooks)()
            point.register_forward_hook(lambda _module, _inputs, value, name=name: tag(value, name))
        yield
    finally:
        for name, point in points.items():
            point._forward_hooks, point._forward_pre_hooks = kept[name]


def _export(module: nn.Module, images: Tensor, of: Read, points: Mapping[str, HookPoint]) -> FrozenGraph:
    read, root_hook = _reading(of, points)
    reader = _Reader(module, read)
    reader.training = False  # not eval(), which would reach into the module
    examples = images.new_zeros((EXAMPLES, *images.shape[1:]))
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    device = images.device.type
    with _tagged(points), torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        try:
            program = torch.export.export(reader, (examples,), dynamic_shapes={"images": {0: batch}}, strict=False)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            NotImplementedError,
            torch._dynamo.exc.TorchDynamoException,
        ) as error:
            raise UnsupportedModelError(
                f"{type(module).__name__} could not be traced on images of shape {tuple(images.shape)}:"
                f" {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Tracing needs a"
                " forward without branches that depend on values of the images or on the size of the batch."
            ) from error
    graph, names = program.graph, {}
    for signature in (program.graph_signature.inputs_to_parameters, program.graph_signature.inputs_to_buffers):
        names.update({name: target.removeprefix("module.") for name, target in signature.items()})
    constants = {
        name: program.constants[target]
        for name, target in program.graph_signature.inputs_to_lifted_tensor_constants.items()
    }
    _inline(graph)
    _make_functional(graph)
    return FrozenGraph(
        nodes=tuple(graph.nodes),
        root=_root(graph, root_hook, of, module),
        module=module,
        parameters=names,
        constants=constants,
        owner=graph,
    )


def _root(graph: Graph, hook: str | None, of: Read, module: nn.Module) -> Node:
    if hook is not None:
        root = next((n for n in graph.nodes if operation(n) == "vitdecomp_lens::tag" and n.args[1] == hook), None)
        if root is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has the hook {hook!r}, but its forward never calls it."
            )
    else:
        outputs = graph.output_node().all_input_nodes
        if len(outputs) != 1:
            raise InputError(
                f"{type(module).__name__} returns {len(outputs)} tensors; name the one to decompose with of=, for"
                " example of=lambda module, images: module(images)[0]."
            )
        root = outputs[0]
    if any(size != 1 for size in root.meta["val"].shape[1:-1]) or root.meta["val"].dim() < 2:
        shape = ", ".join(map(str, root.meta["val"].shape[1:]))
        raise InputError(
            f"What is decomposed must be one vector an image, [batch, d]; of={of!r} is [batch, {shape}]. Pool it, for"
            " example with of=lambda module, images: module(images).mean(1)."
        )
    return root


def _inline(graph: Graph) -> None:
    """Put the bodies of contexts (``torch.no_grad``, ``torch.autocast(enabled=False)``) where they are entered.

    Frozen graphs run without either anyway. An autocast that is on stays an operation of its own, a source.
    """
    for node in list(graph.nodes):
        name = operation(node)
        if name == "wrap_with_set_grad_enabled":
            body, inputs = node.args[1], node.args[2:]
        elif name == "wrap_with_autocast" and node.args[2] is False:
            body, inputs = node.args[4], node.args[5:]
        else:
            continue
        inner = getattr(graph.owning_module, body.target).graph
        known: dict[Node, Any] = dict(zip((n for n in inner.nodes if n.op == "placeholder"), inputs, strict=True))
        with graph.inserting_before(node):
            outputs = graph.graph_copy(inner, known)
        for user in list(node.users):  # each takes one of the outputs
            user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)


def _make_functional(graph: Graph) -> None:
    """Turn operations that work in place into those that do not: values of a graph are looked at later.

    Raises:
        UnsupportedModelError: If something written in place is read afterwards through another view of it.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not is_in_place(node):
            continue
        changed = node.args[0]
        assert isinstance(changed, Node)
        for view in _sharing_memory(changed) - {changed}:
            if order[view] >= order[node] or operation(view) in SPLITS:  # of a split only its outputs are read
                continue
            late = next((user for user in view.users if order[user] > order[node] and user is not node), None)
            if late is not None and not (_apart(view, changed) or is_in_place(late)):
                raise UnsupportedModelError(
                    f"{operation(node)} in {module_path(node) or 'the model itself'} writes in place to memory that"
                    f" {operation(late)} reads afterwards through another view. Make it work on a copy: in place of"
                    " x[:, 0] = y, for example torch.cat([y[:, None], x[:, 1:]], dim=1)."
                )
        base = operation(node).removeprefix("aten::").removesuffix("_")
        node.target = getattr(getattr(torch.ops.aten, base), node.target._overloadname)
        for user in list(changed.users):
            if order[user] > order[node]:
                user.replace_input_with(changed, node)


def is_in_place(node: Node) -> bool:
    """Whether an operation writes to its first argument."""
    name = operation(node)
    return name.startswith("aten::") and name.endswith("_") and not name.endswith("__")


def _viewed(node: Node) -> Node | None:
    """What a node is a view of: by the aliases that its schema declares."""
    if operation(node) == "getitem":
        return _viewed(node.args[0])  # type: ignore[arg-type]
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments or schema.arguments[0].alias_info is None:
        return None
    return node.args[0] if isinstance(node.args[0], Node) else None


def _sharing_memory(node: Node) -> set[Node]:
    """All views of what a node is a view of."""
    found, ahead = set(), [node]
    while ahead:
        n = ahead.pop()
        if n in found:
            continue
        found.add(n)
        base = _viewed(n)
        ahead += [] if base is None else [base]
        several = [u for u in n.users if u.args and u.args[0] is n and _viewed(u) is n]
        ahead += several
        ahead += [item for u in several for item in u.users if operation(item) == "getitem"]
    return found


def _apart(one: Node, other: Node) -> bool:
    """Whether two views are different outputs of the same split."""
    both = [n for n in (one, other) if operation(n) == "getitem"]
    return len(both) == 2 and one.args[0] is other.args[0] and bool(one.args[1] != other.args[1])
