"""Baselines that heatmaps are compared with: GradCAM, and foreground everywhere. All are `Heatmaps` too."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.applications.heatmap.maps import ANY, OWN, Heatmaps
from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.hooked import HookedViT

__all__ = ["Of", "Run", "constant", "grad_cam", "named", "wanted_rows"]

Of = Literal["representation", "logits"]
REPRESENTATION = "hook_representation"


def constant(model: HookedViT, images: Float[Tensor, "batch channel height width"]) -> Heatmaps:
    """Foreground everywhere: what any map has to do better than.

    Args:
        model: Of which the maps to compare with are.
        images: The same.
    """
    grid = replace(model.token_grid(images), prefix=())
    return Heatmaps(images.new_ones(len(images), 1, grid.rows, grid.columns), (ANY,), grid, "constant")


def grad_cam(
    model: HookedViT,
    images: Float[Tensor, "batch channel height width"],
    directions: Float[Tensor, "direction d_out"],
    *,
    of: Of = "logits",
    names: Sequence[str] | None = None,
    own: Sequence[int] | None = None,
    at: str | None = None,
) -> Heatmaps:
    """GradCAM (arXiv 1610.02391): channels weighted by their mean gradient, summed, and clipped at 0.

    With activations a at a hook and the score y = ⟨u, output⟩, the map is ReLU(Σ_k (mean over patches of ∂y/∂a_k) a_k).
    It takes a backward run for each direction.

    Args:
        model: Any hooked model, with stages or without.
        images: As the model takes them.
        directions: What is explained: rows of one-hot vectors for ``of="logits"``, texts for a CLIP's representation.
        of: ``"logits"``, the model's output; or ``"representation"``.
        names: A name for each direction.
        own: For each image the number of its direction, if only that map is wanted; that takes one backward run.
        at: The hook of the activations, with a token for each patch; None for the nearest place to the output from
            which all patches reach it: what leaves the last block where these are read (pooled, as in most models with
            stages), and what enters it where a class token is.

    Returns:
        Maps of at least 0, on the grid of the hook.

    Raises:
        InputError: Where directions do not fit what is read, or the hook has no patches.
        UnknownNameError: Where there is no such hook.

    Example:
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> grad_cam(model, torch.randn(2, 3, 160, 160), torch.eye(5))
        Heatmaps(batch=2, text=5, 10 × 10 patches; GradCAM)
    """
    last = f"blocks.{len(model.hooked_blocks) - 1}"
    run = Run(model, images, [f"{last}.hook_resid_pre", f"{last}.hook_resid_post"] if at is None else [at])
    if at is None:
        after = model.token_grid(images, f"{last}.hook_resid_post")
        reached = run.reached(f"{last}.hook_resid_post")[:, len(after.prefix) :]
        at = f"{last}.hook_resid_{'post' if bool(reached.all()) else 'pre'}"
    grid = model.token_grid(images, at)
    value = run.values[at]
    if value.ndim != 3 or value.shape[1] != len(grid) or not grid.rows * grid.columns:
        raise InputError(
            f"Expected a hook with a token for each patch, [batch, {len(grid)}, d_model]; {at!r} has "
            f"{list(value.shape)}. Hooks on the residual stream have."
        )
    maps = []
    for (gradient,) in run.gradients([at], directions, of, own):
        patches, slopes = (one[:, len(grid.prefix) :] for one in (value.detach(), gradient))
        found = (patches * slopes.mean(1, keepdim=True)).sum(2).clamp(min=0)
        maps.append(rearrange(found, "batch (row column) -> batch row column", row=grid.rows))
    return Heatmaps(torch.stack(maps, 1), named(names, len(directions), own), replace(grid, prefix=()), "GradCAM")


class Run:
    """One run of a model, with the values at some hooks, whose gradients are taken a direction at a time.

    Args:
        model: The model.
        images: The images.
        hooks: Where values are kept.
    """

    def __init__(
        self, model: HookedViT, images: Float[Tensor, "batch channel height width"], hooks: Sequence[str]
    ) -> None:
        model.check_images(images)
        self.values: dict[str, Tensor] = {}
        wanted = dict.fromkeys([*hooks, REPRESENTATION])
        # Parameters may need no gradients; then what is computed of the images has to.
        images = images.detach().clone().requires_grad_()
        with torch.enable_grad(), model.hooks(fwd_hooks=[(name, self._keep) for name in wanted]):
            self.output: Any = model(images)

    def _keep(self, value: Tensor, hook: HookPoint) -> None:
        self.values[str(hook.name)] = value

    def read(self, of: Of) -> Float[Tensor, "batch d_out"]:
        """What scores are of.

        Raises:
            InputError: Where ``of`` is neither.
            UnsupportedModelError: Where it is not one vector an image.
        """
        if of not in get_args(Of):
            raise InputError(f"Expected of='representation' or of='logits'; got of={of!r}.")
        read = self.values[REPRESENTATION] if of == "representation" else self.output
        if not isinstance(read, Tensor) or read.ndim != 2:
            shape = list(read.shape) if isinstance(read, Tensor) else type(read).__name__
            raise UnsupportedModelError(f"Expected {of} that are one vector an image; got {shape}.")
        return read

    def reached(self, hook: str) -> Bool[Tensor, "batch token"]:
        """Which tokens at a hook the representation is read from."""
        generator = torch.Generator().manual_seed(0)  # some direction, nothing's null space
        direction = torch.randn(1, self.read("representation").shape[1], generator=generator)
        ((gradient,),) = self.gradients([hook], direction, "representation")
        found: Tensor = (gradient != 0).any(2)
        return found

    def gradients(
        self,
        hooks: Sequence[str],
        directions: Float[Tensor, "direction d_out"],
        of: Of,
        own: Sequence[int] | None = None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """The gradients of scores at hooks: for each direction; or once, of each image's own direction.

        Raises:
            InputError: Where directions do not fit what is read.
        """
        read = self.read(of)
        if directions.ndim != 2 or directions.shape[1] != read.shape[1] or not len(directions):
            raise InputError(
                f'Expected directions as Float[Tensor, "direction d_out"] with rows of {read.shape[1]} for of={of!r}; '
                f"got shape {tuple(directions.shape)}."
            )
        rows = wanted_rows(own, len(directions), len(read))
        directions = directions.detach().to(read)
        kept = [self.values[name] for name in hooks]
        for wanted in directions[:, None] if rows is None else [directions[rows]]:
            # Images do not see each other: the gradient of the sum is each image's own.
            score = (read * wanted).sum()
            slopes = torch.autograd.grad(score, kept, retain_graph=True, allow_unused=True)
            yield tuple(torch.zeros_like(v) if s is None else s for v, s in zip(kept, slopes, strict=True))


def wanted_rows(own: Sequence[int] | None, directions: int, images: int) -> list[int] | None:
    """Each image's number of a direction.

    Raises:
        InputError: Where they are not as many as images, or there is no such direction.
    """
    if own is None:
        return None
    rows = [int(row) for row in own]
    if len(rows) != images or not all(0 <= row < directions for row in rows):
        raise InputError(
            f"Expected own= as a number from 0 to {directions - 1} for each of the {images} images; got {rows[:5]!r}..."
        )
    return rows


def named(names: Sequence[str] | None, count: int, own: Sequence[int] | None) -> tuple[str, ...]:
    """The names of maps.

    Raises:
        InputError: Where there are not as many as directions.
    """
    if names is not None and len(names) != count:
        raise InputError(f"Expected a name for each of the {count} directions; got {len(names)} names.")
    if own is not None:
        return (OWN,)
    return tuple(f"direction {number}" for number in range(count)) if names is None else tuple(names)


def without_prefix(weights: Float[Tensor, "batch token"], grid: TokenGrid) -> Float[Tensor, "batch row column"]:
    """A number a token, of the patches only."""
    return rearrange(weights[:, len(grid.prefix) :], "batch (row column) -> batch row column", row=grid.rows)
