"""From a module to its graph: export once, name what the hooks name, keep it as long as it is true."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.errors import InputError, UnknownNameError, UnsupportedModelError, near_matches
from vitdecomp_lens.frozen.exported import inline_contexts, make_functional
from vitdecomp_lens.frozen.graph import FrozenGraph
from vitdecomp_lens.frozen.kept import MOST_KEPT, Kept, closed_over, same_state, state_of, traces_of
from vitdecomp_lens.frozen.rules import operation
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
    kept, state = traces_of(module), [*state_of(module), *closed_over(of)]
    for entry in kept:
        if entry.key == key and same_state(entry.state, state):
            return entry.graph
    graph = _export(module, images, of, points)
    kept.append(Kept(key, state, graph))
    del kept[:-MOST_KEPT]
    return graph


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
            f"of= must be 'representation', 'logits', 'embedding', a hook name or a function; got {of!r}:"
            f" {near_matches(of, ('representation', 'logits', 'embedding', *points))}"
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
    inline_contexts(graph)
    make_functional(graph)
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
            f"What is decomposed must be one vector an image, [batch, d]; of={of!r} is [batch, {shape}]. Name a hook"
            " with one vector an image, such as hook_representation, or pass a function that pools."
        )
    return root
