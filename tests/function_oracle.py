"""An oracle for models of which nothing is known: the eager module itself, frozen where it calls torch's functions.

Patterns, activations, gates and the statistics of norms are detached as they are computed. What a component is read at
is known by its value alone: where a function of the forward returns that value, it is detached and scaled by an α.
The derivative by α is the component's direct effect, by definition. Nothing of the package takes part but its word on
where components are read; in particular no graph and no rule of how operations are passed.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What is taken as given wherever it is computed. In-place functions have an underscore more.
GIVEN = {
    "elu",
    "exp",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "lstm",
    "mish",
    "norm",
    "relu",
    "relu6",
    "rsqrt",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "sqrt",
    "std",
    "tanh",
    "var",
    "vector_norm",
}


def centred(x, dims):
    return x - x.mean(dims, keepdim=True)


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    dims = tuple(range(-len(normalized_shape), 0))
    inverse = (x.var(dims, unbiased=False, keepdim=True) + eps).rsqrt().detach()
    out = centred(x, dims) * inverse * (1 if weight is None else weight)
    return out if bias is None else out + bias


def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    groups = x.unflatten(1, (num_groups, -1))
    dims = tuple(range(2, groups.dim()))
    inverse = (groups.var(dims, unbiased=False, keepdim=True) + eps).rsqrt().detach()
    out = (centred(groups, dims) * inverse).flatten(1, 2).movedim(1, -1)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).movedim(-1, 1)


def rms_norm(x, normalized_shape, weight=None, eps=None):
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * (x.square().mean(dims, keepdim=True) + eps).rsqrt().detach() * (1 if weight is None else weight)


def normalize(x, p=2.0, dim=1, eps=1e-12, out=None):
    return x / x.norm(p, dim, keepdim=True).clamp_min(eps).detach()


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    assert (dropout_p, is_causal, enable_gqa) == (0.0, False, False)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    scores = q @ k.mT * scale + (0 if attn_mask is None else attn_mask)
    return scores.softmax(-1).detach() @ v


def product(x, y, **options):
    """A product in which the smaller of two factors that depend on the images is a gate."""
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.requires_grad and y.requires_grad:
        x, y = (x.detach() if x.numel() < y.numel() else x), (y.detach() if y.numel() < x.numel() else y)
    return torch.mul(x, y, **options)


SAME = {torch.float64: 1e-9, torch.float32: 1e-4}  # how near values are that are one
FROZEN = {
    "mul": product,
    "multiply": product,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "rms_norm": rms_norm,
    "normalize": normalize,
    "scaled_dot_product_attention": attention,
}


class Frozen(TorchFunctionMode):
    """While inside, a forward is frozen, and values that are named are detached and scaled.

    Args:
        places: By name a value, the axis that tells its components apart or None, and their leaves.
    """

    def __init__(self, places):
        super().__init__()
        self.met = set()
        self._of_shape = defaultdict(list)
        for name, (value, axis, alphas) in places.items():
            shape = [1] * value.dim()
            if axis is not None:
                shape[axis] = -1
            self._of_shape[value.shape].append((name, value, alphas.reshape(shape)))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "").rstrip("_")
        out = FROZEN.get(name, func)(*args, **(kwargs or {}))
        if isinstance(out, tuple | list):
            parts = [self._seen(part, name) for part in out]
            return type(out)(parts) if type(out) in (tuple, list) else out
        return self._seen(out, name)

    def _seen(self, out, function):
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        if function in GIVEN:
            out = out.detach()
        tolerance = SAME[out.dtype]
        for name, value, alphas in self._of_shape[out.shape]:
            if torch.allclose(out, value, rtol=tolerance, atol=tolerance * float(value.abs().max())):
                self.met.add(name)
                return out.detach() * alphas
        return out


def contributions(read, model, images, direction, places):
    """⟨direction, contribution⟩ of every component, [component, batch], by the name of where it is read.

    Args:
        read: Gets the model and images; returns one vector an image.
        model: An eager module.
        images: Images.
        direction: A vector.
        places: By name a value that the forward computes at these images, and the axis of its components or None.
    """
    counts = {name: 1 if axis is None else value.shape[axis] for name, (value, axis) in places.items()}
    alphas = {name: torch.ones(count, dtype=images.dtype, requires_grad=True) for name, count in counts.items()}
    with Frozen({name: (*place, alphas[name]) for name, place in places.items()}) as frozen:
        scores = read(model, images) @ direction
    assert frozen.met == places.keys(), f"not found in the eager forward: {sorted(places.keys() - frozen.met)}"
    with torch.no_grad():
        tolerance = SAME[images.dtype]
        torch.testing.assert_close(scores, read(model, images) @ direction, rtol=tolerance, atol=tolerance)
    again = {"retain_graph": True, "materialize_grads": True}
    found = [torch.autograd.grad(score, list(alphas.values()), **again) for score in scores]
    return {name: torch.stack(gradients, 1) for name, gradients in zip(alphas, zip(*found, strict=True), strict=True)}
