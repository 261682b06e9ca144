"""From a module to its graph: export once, name what the hooks name, keep it as long as it is true."""

import math
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.errors import InputError, UnknownNameError, UnsupportedModelError, VitDecompError, near_matches
from vitdecomp_lens.frozen.branches import JOINS
from vitdecomp_lens.frozen.exported import inline_contexts, make_functional
from vitdecomp_lens.frozen.graph import FrozenGraph
from vitdecomp_lens.frozen.kept import MOST_KEPT, Kept, closed_over, same_state, state_of, traces_of
from vitdecomp_lens.frozen.rules import ACTIVATIONS, operation, sizes
from vitdecomp_lens.frozen.unfolded import unfold_batches
from vitdecomp_lens.frozen.walk import module_path
from vitdecomp_lens.points import LazyHookPoint, as_hooks_see_it, as_it_was, hook_points, on_the_path

Read = str | Callable[[nn.Module, Tensor], Tensor]
REPRESENTATION_HOOK = "hook_representation"
ENCODERS = ("encode_image", "get_image_features")
FIELDS = ("image_embeds", "pooler_output", "logits", "last_hidden_state")
OURS = str(Path(__file__).parent.parent)
POOLINGS = frozenset({"aten::mean", "aten::adaptive_avg_pool2d", "aten::_adaptive_avg_pool2d"})
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
            projected embedding; otherwise the module's output; where a head of timm's ends in an activation function,
            what enters that), ``"logits"`` (the module's output), the name
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
    kept, state = traces_of(module), [*state_of(module), *closed_over(of)]
    for entry in kept:
        if entry.key == key and same_state(entry.state, state):
            return entry.graph
    graph = _export(module, images, of, points)
    kept.append(Kept(key, state, graph))
    del kept[:-MOST_KEPT]
    return graph


# --- what is read -------------------------------------------------------------------------------------------


class Representation:
    """Reads the representation of a module that has no hook for it: timm's, open_clip's, Hugging Face's, anything else.

    Attributes:
        field: Which of its outputs that is, where they have names.
        has_head: Whether a head of timm's was asked for what its classifier reads.
    """

    field: str | None = None
    has_head = False

    def __call__(self, module: nn.Module, images: Tensor) -> Any:
        """Run the module and read it."""
        if callable(getattr(module, "forward_features", None)) and callable(getattr(module, "forward_head", None)):
            self.has_head = True
            features = module.forward_features(images)  # type: ignore[operator]
            pooled = module.forward_head(features, pre_logits=True)  # type: ignore[operator]
            return torch.cat(list(pooled), dim=-1) if isinstance(pooled, list | tuple) else pooled
        encoders = (getattr(module, name, None) for name in ENCODERS)
        output = next(filter(callable, encoders), module)(images)
        found = {} if isinstance(output, Tensor) else {name: getattr(output, name, None) for name in FIELDS}
        self.field = next((name for name, value in found.items() if isinstance(value, Tensor)), None)
        return output if self.field is None else found[self.field]


class _Reader(nn.Module):
    """What is exported: a module, read in one way."""

    def __init__(self, module: nn.Module, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.read = read

    def forward(self, images: Tensor) -> Any:
        return self.read(self.module, images)


def reading(of: Read, points: Mapping[str, HookPoint]) -> tuple[Callable[[nn.Module, Tensor], Any], str | None]:
    """The function of module and images to export or to run, and the hook whose value is the root.

    Without a hook it is what the function returns.
    """
    if callable(of):
        return of, None
    if of == "logits":
        return _logits, None
    if of == "representation":
        return (_run, REPRESENTATION_HOOK) if REPRESENTATION_HOOK in points else (Representation(), None)
    if of not in points:
        raise UnknownNameError(
            f"of= must be 'representation', 'logits', 'embedding', a hook name or a function; got {of!r}:"
            f" {near_matches(of, ('representation', 'logits', 'embedding', *points))}"
        )
    return _run, of


def _run(module: nn.Module, images: Tensor) -> Any:
    return module(images)


def _logits(module: nn.Module, images: Tensor) -> Any:
    output = module(images)
    logits = None if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output


# --- the export ---------------------------------------------------------------------------------------------


def _tag_what_hooks_see(name: str, point: HookPoint, _inputs: Any, value: Tensor) -> Tensor:
    return as_it_was(point, tag(as_hooks_see_it(point, value), name))


@contextmanager
def _tagged(points: Mapping[str, HookPoint]) -> Iterator[None]:
    """While inside, each hook point tags its value, and no hook of the user's runs."""
    kept = {name: (p._forward_hooks, p._forward_pre_hooks) for name, p in points.items()}
    try:
        for name, point in points.items():
            point._forward_pre_hooks = type(point._forward_pre_hooks)()
            point._forward_hooks = type(point._forward_hooks)()
            point.register_forward_hook(partial(_tag_what_hooks_see, name))
        yield
    finally:
        for name, point in points.items():
            point._forward_hooks, point._forward_pre_hooks = kept[name]


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Put back what a forward writes on its modules: an export runs it on stand-ins for them and for their values."""
    attributes = [(child, dict(child.__dict__)) for child in module.modules()]
    held = [value for _, before in attributes for value in before.values()]
    dicts = [(value, value.copy()) for value in held if isinstance(value, dict)]  # hooks, and caches of all kinds
    lists = [(value, value.copy()) for value in held if type(value) is list]
    try:
        yield
    finally:
        for child, before in attributes:
            for name in child.__dict__.keys() - before.keys():
                del child.__dict__[name]
            child.__dict__.update(before)
        for cache, then in dicts:
            cache.clear()
            cache.update(then)
        for items, before_them in lists:
            items[:] = before_them


def _export(module: nn.Module, images: Tensor, of: Read, points: Mapping[str, HookPoint]) -> FrozenGraph:
    read, root_hook = reading(of, points)
    reader = _Reader(module, read)
    reader.training = False  # not eval(), which would reach into the module
    examples = images.new_zeros((EXAMPLES, *images.shape[1:]))
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    device = images.device.type
    plainly = torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False)
    with ExitStack() as stack:
        for context in (_left_as_it_was(module), _tagged(points), *plainly):
            stack.enter_context(context)
        try:
            with warnings.catch_warnings():  # of caches that a module keeps between calls: they are put back
                warnings.filterwarnings("ignore", "The tensor attributes? ")
                for of_our_tags in ("A forward hook edited", "A hook on .* returned a modified tensor"):  # by bridges
                    warnings.filterwarnings("ignore", of_our_tags)
                program = torch.export.export(reader, (examples,), dynamic_shapes={"images": {0: batch}}, strict=False)
        except VitDecompError:
            raise
        except Exception as error:  # whatever a module's forward may raise
            raise _untraceable(module, images, error) from error
    graph, names = program.graph, {}
    for signature in (program.graph_signature.inputs_to_parameters, program.graph_signature.inputs_to_buffers):
        names.update({name: target.removeprefix("module.") for name, target in signature.items()})
    constants = {
        name: program.constants[target]
        for name, target in program.graph_signature.inputs_to_lifted_tensor_constants.items()
    }
    _mend_users(graph)
    inline_contexts(graph)
    make_functional(graph)
    unfold_batches(graph)
    _refuse_numbers(module, images, graph)
    field = read.field if isinstance(read, Representation) else None
    root = _root(graph, root_hook, of, module, field)
    frozen = FrozenGraph(
        nodes=tuple(graph.nodes),
        root=root,
        output=root,
        module=module,
        parameters=names,
        constants=constants,
        owner=graph,
    )
    if field == "pooler_output":
        _refuse_bent(frozen)
    plain = isinstance(read, Representation) and read.has_head and not points
    return _before_activation(frozen) if plain else frozen


def _before_activation(frozen: FrozenGraph) -> FrozenGraph:
    """The graph of what enters an activation function of a head that all of the output passes, after the pooling."""
    bent = frozen.branches.last
    if bent is None or operation(bent) not in ACTIVATIONS:
        return frozen
    (enters,) = bent.all_input_nodes
    if not _is_pooled(enters):
        return frozen
    with frozen.owner.inserting_after(enters):
        root = frozen.owner.call_function(torch.ops.aten.flatten.using_ints, (enters, 1))
    root.meta = {**enters.meta, "val": enters.meta["val"].flatten(1)}
    return replace(
        frozen, nodes=tuple(frozen.owner.nodes), root=root, kept={}, _cuts={}, _programs={}, _hooked_graphs={}
    )


def _is_pooled(node: Node) -> bool:
    """Whether a value is a vector an image, or what weights made of one; a single pixel is none before the pooling."""
    while len(sizes(node)) > 2:
        if operation(node) in POOLINGS:
            return math.prod(sizes(node)[1:]) == max(sizes(node)[1:])
        if len(node.args) == 0 or not isinstance(node.args[0], Node) or operation(node) in JOINS:
            return False
        node = node.args[0]
    return True


def _mend_users(graph: Graph) -> None:
    """Put down who reads what: an export forgets it of outputs that are read inside of the graph too."""
    for node in graph.nodes:
        for read in node.all_input_nodes:
            read.users.setdefault(node)


def _refuse_bent(graph: FrozenGraph) -> None:
    """Refuse an output of a pooler that bends all of it: no part before it has a share of its own."""
    first = list(graph.cut().points.values())
    if len(first) == 1 and graph.branches.hidden:
        raise InputError(
            f"The pooler_output of {type(graph.module).__name__} is not affine in its last features: all of it passes"
            f" {operation(first[0])} in {module_path(first[0])}. Name what to decompose, for example"
            " of=lambda model, images: model(images).last_hidden_state[:, 0]."
        )


def _refuse_numbers(module: nn.Module, images: Tensor, graph: Graph) -> None:
    """Refuse numbers that are read from tensors: they are those of one batch, or mix its images."""
    for node in graph.nodes:
        if operation(node) in ("aten::item", "aten::_local_scalar_dense"):
            *_, place, line = ["", "", *str(node.meta.get("stack_trace", "")).strip().splitlines()]
            where = f" It stopped at {place.strip().replace(chr(34), '').removeprefix('File ')}: {line.strip()}."
            raise UnsupportedModelError(_cannot_trace(module, images, where, "A number is read from a tensor."))


def _untraceable(module: nn.Module, images: Tensor, error: Exception) -> UnsupportedModelError:
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return UnsupportedModelError(_cannot_trace(module, images, _where(error), said))


def _cannot_trace(module: nn.Module, images: Tensor, where: str, said: str) -> str:
    """What to say of a forward that cannot be exported: the line that stops it, and what to do."""
    return (
        f"{type(module).__name__} could not be traced on images of shape {tuple(images.shape)}.{where} {said}\n"
        "Tracing needs images that the module takes, and a forward whose branches depend neither on values of the"
        " images nor on the size of the batch, and that calls torch's operations only: no .item(), no NumPy, no custom"
        " kernels. Rewrite that line, or pass the part of the module that can be traced."
    )


def _where(error: BaseException) -> str:
    """The last line of a module's own code on the way to an error."""
    torchs = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((torchs, "<", OURS))]
    if not frames:
        return ""
    last = frames[-1]
    return f" It stopped in {last.name} ({Path(last.filename).name}, line {last.lineno}): {last.line}."


def _root(graph: Graph, hook: str | None, of: Read, module: nn.Module, field: str | None) -> Node:
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
        asked = f"of={getattr(of, '__name__', None) or repr(of)}"
        what, output = (asked, "") if field is None else (field, f".{field}")
        raise InputError(
            f"What is decomposed must be one vector an image, [batch, d]; {what} is [batch, {shape}]. Name a hook"
            " with one vector an image, such as hook_representation, or pass a function that pools, such as"
            f" of=lambda model, images: model(images){output}[:, 0]."
        )
    return root
