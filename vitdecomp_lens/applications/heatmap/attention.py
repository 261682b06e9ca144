"""Baselines that heatmaps are compared with, read off attention patterns: as they are, rolled out, with gradients.

For models in which every block has one attention from all tokens to all tokens. In those with windows or stages (Swin,
MaxViT), class attention or attention among channels, patterns say not which patches reach the representation.

All end in a row of relevance for each token that the representation is read from; these are averaged. Which
tokens it is read from is seen from its gradient: the class token, both of a distilled model's, or all patches. Where an
attention pool reads them, the row is its pattern's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.applications.heatmap.gradients import Of, Run, named, without_prefix
from vitdecomp_lens.applications.heatmap.maps import ANY, Heatmaps
from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.hooked import HookedViT

__all__ = ["attention_cam", "chefer", "raw_attention", "rollout"]

POOL = "attn_pool.hook_pattern"


def raw_attention(
    model: HookedViT, images: Float[Tensor, "batch channel height width"], *, layer: int = -1
) -> Heatmaps:
    """The attention pattern of one layer, heads averaged: from the tokens that the representation is read from.

    In a model with an attention pool, layer -1 is the pool itself.

    Args:
        model: With global attention.
        images: As the model takes them.
        layer: Which; the last one by default.

    Raises:
        UnsupportedModelError: Where attention is not global.
        InputError: Where there is no such layer.

    Example:
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> raw_attention(model, torch.randn(2, 3, 160, 160))
        Heatmaps(batch=2, text=1, 10 × 10 patches; attention)
    """
    found = _Patterns.of(model, images)
    patterns = found.patterns
    if not -len(patterns) <= layer < len(patterns):
        raise InputError(f"Expected a layer from {-len(patterns)} to {len(patterns) - 1}; got {layer}.")
    pattern = patterns[layer].mean(1)
    weights = pattern[:, 0] if pattern.shape[1] == 1 else _through(found.read, pattern)
    return found.agnostic(weights, "attention")


def rollout(
    model: HookedViT, images: Float[Tensor, "batch channel height width"], *, residual: float = 0.5
) -> Heatmaps:
    """Attention rollout (arXiv 2005.00928): patterns, heads averaged, mixed with the identity, multiplied over layers.

    Args:
        model: With global attention.
        images: As the model takes them.
        residual: The weight of the identity, which stands for the residual stream; a half in the paper.

    Raises:
        UnsupportedModelError: Where attention is not global.
        InputError: Where the weight is not between 0 and 1.

    Example:
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> rollout(model, torch.randn(2, 3, 160, 160)).texts
        ('any text',)
    """
    if not 0 <= residual <= 1:
        raise InputError(f"Expected residual= from 0 to 1; got {residual}.")
    found = _Patterns.of(model, images)
    weights = found.read if found.pool is None else found.pool.mean(1)[:, 0]
    for pattern in reversed(found.blocks):
        weights = residual * weights + (1 - residual) * _through(weights, pattern.mean(1))
    return found.agnostic(weights, "rollout")


def chefer(
    model: HookedViT,
    images: Float[Tensor, "batch channel height width"],
    directions: Float[Tensor, "direction d_out"],
    *,
    of: Of = "logits",
    names: Sequence[str] | None = None,
    own: Sequence[int] | None = None,
) -> Heatmaps:
    """The relevance of Chefer et al. (arXiv 2103.15679), for self-attention: R ← R + E_h[(∇A ⊙ A)⁺] R, layer by layer.

    R starts as the identity, A are the patterns, ∇A the gradient of the score y = ⟨u, output⟩, and the mean is over
    heads. An attention pool counts as a last layer, whose row is relevant to the score.

    Args:
        model: With global attention.
        images: As the model takes them.
        directions: As for `grad_cam`, like all that follow.
        of: ``"logits"`` or ``"representation"``.
        names: A name for each direction.
        own: For each image the number of its direction, if only that map is wanted.

    Raises:
        UnsupportedModelError: Where attention is not global.
        InputError: Where directions do not fit what is read.

    Example:
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> chefer(model, torch.randn(2, 3, 160, 160), torch.eye(5), own=[0, 3])
        Heatmaps(batch=2, text=1, 10 × 10 patches; Chefer)
    """
    found = _Patterns.of(model, images)

    def relevance(gradients: Sequence[Tensor]) -> Float[Tensor, "batch token"]:
        layers = [(a * g).clamp(min=0).mean(1) for a, g in zip(found.patterns, gradients, strict=True)]
        weights = found.read if found.pool is None else layers.pop()[:, 0]
        # A row of R at a time, from the output: r (1 + A_L) ... (1 + A_1).
        for layer in reversed(layers):
            weights = weights + _through(weights, layer)
        return weights

    steps = found.run.gradients(found.hooks, directions, of, own)
    return found.mapped(map(relevance, steps), named(names, len(directions), own), "Chefer")


def attention_cam(
    model: HookedViT,
    images: Float[Tensor, "batch channel height width"],
    directions: Float[Tensor, "direction d_out"],
    *,
    of: Of = "logits",
    names: Sequence[str] | None = None,
    own: Sequence[int] | None = None,
) -> Heatmaps:
    """GradCAM of the last attention pattern, heads as channels: what code after arXiv 2103.15679 calls GradCAM.

    ReLU(Σ_h (mean over patches of ∂y/∂A_h) A_h), with A_h from the tokens that the representation is read from. Tables
    of ViTs show this one; `grad_cam` takes activations for channels, as GradCAM does in convolutional networks.

    Args:
        model: With global attention.
        images: As the model takes them.
        directions: As for `grad_cam`, like all that follow.
        of: ``"logits"`` or ``"representation"``.
        names: A name for each direction.
        own: For each image the number of its direction, if only that map is wanted.

    Raises:
        UnsupportedModelError: Where attention is not global.
        InputError: Where directions do not fit what is read.

    Example:
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> attention_cam(model, torch.randn(2, 3, 160, 160), torch.eye(5), own=[0, 3])
        Heatmaps(batch=2, text=1, 10 × 10 patches; GradCAM of attention)
    """
    found = _Patterns.of(model, images)
    rows = torch.ones_like(found.read[:, :1]) if found.pool is not None else found.read
    pattern = einsum(found.patterns[-1], rows, "batch head query key, batch query -> batch head key")

    def weighted(gradients: Sequence[Tensor]) -> Float[Tensor, "batch token"]:
        (gradient,) = gradients
        slopes = einsum(gradient, (rows > 0).to(rows), "batch head query key, batch query -> batch head key")
        weights = slopes[:, :, len(found.grid.prefix) :].mean(2)
        return einsum(pattern, weights, "batch head key, batch head -> batch key").clamp(min=0)

    steps = found.run.gradients(found.hooks[-1:], directions, of, own)
    return found.mapped(map(weighted, steps), named(names, len(directions), own), "GradCAM of attention")


def _through(
    rows: Float[Tensor, "batch query"], pattern: Float[Tensor, "batch query key"]
) -> Float[Tensor, "batch key"]:
    return einsum(rows, pattern, "batch query, batch query key -> batch key")


@dataclass(frozen=True, eq=False)
class _Patterns:
    """The patterns of one run.

    Attributes:
        run: The run.
        hooks: Where patterns are, that of a pool last.
        grid: Of the tokens.
        blocks: One a block.
        pool: Of the attention pool, if there is one.
        read: By which weights the representation is read from the last block's tokens.
    """

    run: Run
    hooks: list[str]
    grid: TokenGrid
    blocks: list[Float[Tensor, "batch head query key"]]
    pool: Float[Tensor, "batch head 1 key"] | None
    read: Float[Tensor, "batch token"]

    @classmethod
    def of(cls, model: HookedViT, images: Tensor) -> "_Patterns":
        """Run a model.

        Raises:
            UnsupportedModelError: Where attention is not from all tokens to all tokens.
        """
        hooks = _hooks(model)
        last = f"blocks.{len(model.hooked_blocks) - 1}.hook_resid_post"
        grid, run = model.token_grid(images), Run(model, images, [*hooks, last])
        for name in hooks:
            pattern = run.values[name]
            queries = 1 if name == POOL else len(grid)
            if pattern.ndim != 4 or pattern.shape[0] != len(images) or pattern.shape[2:] != (queries, len(grid)):
                raise _not_global(model, f"{list(pattern.shape)} at {name}, for {len(grid)} tokens")
        blocks = [run.values[name].detach() for name in hooks if name != POOL]
        pool = run.values[POOL].detach() if POOL in hooks else None
        return cls(run, hooks, grid, blocks, pool, _read_from(run, last))

    @property
    def patterns(self) -> list[Tensor]:
        """All of them, that of the pool last."""
        return [*self.blocks, *([] if self.pool is None else [self.pool])]

    def agnostic(self, weights: Float[Tensor, "batch token"], method: str) -> Heatmaps:
        """Maps that no text changes."""
        return self.mapped([weights], (ANY,), method)

    def mapped(self, weights: Iterable[Float[Tensor, "batch token"]], texts: tuple[str, ...], method: str) -> Heatmaps:
        """Maps of weights by token, a text's at a time."""
        maps = torch.stack([without_prefix(one, self.grid) for one in weights], 1)
        return Heatmaps(maps.detach(), texts, replace(self.grid, prefix=()), method)


def _hooks(model: HookedViT) -> list[str]:
    """The hooks of the patterns, one a block, then that of a pool."""
    hooks = []
    for number, block in enumerate(model.hooked_blocks):
        if len(block.attentions) != 1 or block.has_convolution or len(model.stages) > 1:
            what = "stages" if len(model.stages) > 1 else f"{len(block.attentions)} attentions in block {number}"
            raise _not_global(model, "convolutions beside attention" if block.has_convolution else what)
        hooks.append(f"blocks.{number}.{next(iter(block.attentions))}.hook_pattern")
    return [*hooks, POOL] if POOL in model.hook_dict else hooks


def _not_global(model: HookedViT, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Expected a model in which every block has one attention from all tokens to all tokens; "
        f"{model.cfg.model_name} has {what}. GradCAM works for any model: grad_cam(model, images, directions)."
    )


def _read_from(run: Run, last: str) -> Float[Tensor, "batch token"]:
    """Equal weights for the tokens of the last block that reach the representation, which sum to 1."""
    reached = run.reached(last).to(run.values[last])
    return reached / reached.sum(1, keepdim=True).clamp(min=1)
