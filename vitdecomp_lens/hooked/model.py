"""`HookedViT`: TransformerLens hook points around an unmodified vision transformer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from vitdecomp_lens.components import By, Point, TokenGrid
from vitdecomp_lens.coverage import Stop
from vitdecomp_lens.errors import InputError, UnknownNameError, UnsupportedModelError, near_matches
from vitdecomp_lens.hooked import checks, preprocess, reading
from vitdecomp_lens.hooked.blocks import HookedBlock, PostNormBlock
from vitdecomp_lens.hooked.clone import StructureWatch, clone_tree
from vitdecomp_lens.hooked.config import read_config
from vitdecomp_lens.hooked.registry import ImageSpec, find_adapter
from vitdecomp_lens.weights import create_open_clip, create_timm

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
HookList = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]


class HookedViT(HookedRootModule):
    """A vision transformer with TransformerLens' hook points; ``list(model.hook_dict)`` names them.

    The module given is not changed: it keeps its structure, hooks and mode. Parameters and buffers are
    shared, so ``.to()``, ``.half()`` and ``load_state_dict`` on either reach both. Without hooks the output
    is the original's, bit for bit, at its speed. ``forward`` returns what the original returns; for a CLIP,
    the image tower's projected embedding.

    Torch's forward hooks that the module and its submodules have when it is wrapped run here too; those that are
    registered on them later do not, nor do hooks of the hooked model run in the original. Submodules and settings
    (``global_pool``, ``norm.eps``) changed later are not followed either: the next run refuses, and says which.

    In models with stages ``cfg`` describes the first block, and the tools of TransformerLens that stack all layers
    (``cache.accumulated_resid``, ``stack_head_results``) do not fit, as widths and tokens differ: use `decompose`.

    Do not use it for a module without adapter: ``vitdecomp_lens.trace`` works for any.

    Args:
        module: A live model of timm (of one of the classes in README, "Which models"), an open_clip image tower or
            whole CLIP, or a module whose class has an adapter of your own (`register_adapter`).

    Raises:
        UnsupportedModelError: If the module has no adapter, or is wrapped already, compiled, replicated, quantised or
            training with dropout.

    Example:
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> logits, cache = model.run_with_cache(torch.randn(1, 3, 160, 160))
        >>> logits.shape, cache["blocks.0.attn.hook_z"].shape
        (torch.Size([1, 5]), torch.Size([1, 101, 2, 32]))
    """

    original: nn.Module
    tower: nn.Module
    blocks: nn.ModuleList

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._refuse_hooked(module)
        checks.check_module(module)
        self._adapter = find_adapter(module)
        original = self._adapter.tower_of(module)
        self._refuse_hooked(original)
        checks.check_module(original)
        # Not registered: the original keeps hooks and mode of its own, and state dicts speak its names.
        self.__dict__["original"] = original
        self._watch = StructureWatch(original)
        self._tower = self._adapter.hook(clone_tree(original))
        for name, part in self._tower.parts.items():
            self.add_module(name, part)
        self.tower = self._tower.module
        self.training = original.training
        self.cfg = read_config(self._tower, type(original).__name__)
        self.setup()

    @staticmethod
    def _refuse_hooked(module: nn.Module) -> None:
        if isinstance(module, HookedViT):
            raise UnsupportedModelError(
                "The module is wrapped already: a HookedViT is used as it is. For hooks of its own, or after a change "
                "of the module inside, wrap that one: HookedViT(model.original)."
            )

    @classmethod
    def from_timm(cls, name: str, *, pretrained: bool = False, **timm_kwargs: Any) -> "HookedViT":
        """Create a model of timm, in evaluation mode.

        Args:
            name: timm's name, such as ``"vit_base_patch16_224.dino"``.
            pretrained: Whether to load its weights.
            **timm_kwargs: Passed to ``timm.create_model``.

        Raises:
            UnknownNameError: If timm has no such model or weights; the message has near matches.
            InputError: If the weights cannot be loaded.
        """
        return cls(create_timm(name, pretrained=pretrained, **timm_kwargs))

    @classmethod
    def from_open_clip(cls, name: str, *, pretrained: str | None = None, **kwargs: Any) -> "HookedViT":
        """Create the image tower of an open_clip model, in evaluation mode.

        Args:
            name: open_clip's name, such as ``"ViT-B-16"``.
            pretrained: Tag or path of its weights, such as ``"laion2b_s34b_b88k"``.
            **kwargs: Passed to ``open_clip.create_model``.

        Raises:
            UnknownNameError: If open_clip has no such model or weights; the message has near matches.
            InputError: If the weights cannot be loaded.
        """
        return cls(create_open_clip(name, pretrained=pretrained, **kwargs))

    # Running -------------------------------------------------------------------------------------------

    def forward(self, images: Any) -> Any:
        """Return what the wrapped model returns.

        Args:
            images: ``batch channel height width``, normalised as the model was trained; see `preprocess`.

        Raises:
            InputError: If the images have a wrong shape, dtype or device.
            UnsupportedModelError: If submodules or settings of the original were changed after wrapping.
        """
        if not torch.compiler.is_compiling():
            self._watch.check()
            self._check_cheaply(images)
        return self.tower(images)

    def check_images(self, images: Any) -> None:
        """Raise `InputError` for images that the model cannot take, NaN and infinity included."""
        self._check_cheaply(images)
        checks.check_values(images)

    def _check_cheaply(self, images: Any) -> None:
        checks.check_shape(images, self.image_spec)
        checks.check_placement(images, self._weight)

    @property
    def _weight(self) -> Tensor:
        return next(self.original.parameters())

    def run_with_cache(  # type: ignore[override]
        self, images: Any, *, names_filter: NamesFilter = None, remove_batch_dim: bool = False, **options: Any
    ) -> tuple[Any, ActivationCache]:
        """Run the model and keep the activations at its hook points.

        Args:
            images: A batch of images.
            names_filter: A hook name, several, or a predicate on names; None for all.
            remove_batch_dim: Whether to drop the batch axis of a single image.
            **options: ``device``, ``incl_bwd``, ``reset_hooks_end``, ``clear_contexts`` and ``pos_slice`` of
                ``HookedRootModule.run_with_cache``. ``pos_slice`` slices tokens; activations without a token
                axis, and the patch embedding, are kept whole.

        Returns:
            The output and an ``ActivationCache``.

        Raises:
            UnknownNameError: If the filter matches no hook.
        """
        output, cache = super().run_with_cache(
            images, names_filter=self._as_predicate(names_filter), remove_batch_dim=remove_batch_dim, **options
        )
        return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """Make hooks that keep activations, without adding them.

        Raises:
            UnknownNameError: If the filter matches no hook.
        """
        kept: dict[str, Tensor] = {} if cache is None else cache
        tokens = Slice.unwrap(pos_slice)

        def save(value: Tensor, hook: HookPoint, suffix: str) -> None:
            value = value.detach().to(device)
            if (axis := self._token_axis(str(hook.name))) is not None:
                value = _sliced(tokens, value, axis, str(hook.name))
            kept[f"{hook.name}{suffix}"] = value[0] if remove_batch_dim and len(value) == 1 else value

        wanted = self._as_predicate(names_filter)
        self.is_caching = True
        names = [name for name in self.hook_dict if wanted(name)]
        forward = [(name, partial(save, suffix="")) for name in names]
        return kept, forward, [(name, partial(save, suffix="_grad")) for name in names if incl_bwd]

    def _token_axis(self, name: str) -> int | None:
        """Which axis of a hook's value runs over the tokens of the sequence."""
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            return 2
        in_sequence = name.startswith(("blocks.", "ln_pre.")) or name in (
            "hook_embed",
            "hook_pos_embed",
            "hook_full_embed",
        )
        return 1 if in_sequence or (name.startswith("ln_final.") and not self._tower.pooled) else None

    @contextmanager
    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["HookedViT"]:
        """Add hooks for the length of a ``with`` block.

        Args:
            fwd_hooks: Pairs of a hook name, or a predicate on names, and a function ``(value, hook)``; what
                it returns is what the model goes on with, None for the value as it is.
            bwd_hooks: The same for gradients.
            reset_hooks_end: Whether to remove them at the end.
            clear_contexts: Whether to clear the hook points' contexts then.

        Raises:
            UnknownNameError: If a name or predicate matches no hook.
        """
        for name, _ in (*fwd_hooks, *bwd_hooks):
            self._as_predicate(name)
        with super().hooks(list(fwd_hooks), list(bwd_hooks), reset_hooks_end, clear_contexts):
            yield self

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """Add a hook that stays until ``reset_hooks``.

        Raises:
            UnknownNameError: If the name or predicate matches no hook.
        """
        self._as_predicate(name)
        super().add_hook(name, *args, **kwargs)

    def _as_predicate(self, names: NamesFilter) -> Callable[[str], bool]:
        """Turn a filter into a predicate, and make sure that it matches something."""
        if names is None:
            return lambda name: True
        if callable(names):
            if not any(map(names, self.hook_dict)):
                raise UnknownNameError(
                    f"The filter matches none of the {len(self.hook_dict)} hooks, such as "
                    f"{', '.join(list(self.hook_dict)[:5])}. model.hook_dict has all names."
                )
            return names
        wanted = {names} if isinstance(names, str) else set(names)
        for name in wanted:
            if name not in self.hook_dict:
                raise UnknownNameError(f"There is no hook {name!r}; {near_matches(name, self.hook_dict)}")
        if not wanted:
            raise UnknownNameError("The filter names no hook. Pass None for all of them.")
        return wanted.__contains__

    # Options -------------------------------------------------------------------------------------------

    def set_use_attn_result(self, use: bool) -> None:
        """Add or remove ``blocks.{i}.attn.hook_result``: what each head adds to the stream.

        Raises:
            UnsupportedModelError: If an output projection is no plain linear layer, or has forward hooks.
        """
        attentions = [attn for block in self.hooked_blocks for attn in block.attentions.values()]
        if use:
            for attn in attentions:
                attn.check_result()
        for attn in attentions:
            attn.use_result(use)
        self.cfg.use_attn_result = use
        self.setup()

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Add or remove ``blocks.{i}.hook_{q,k,v}_input``: the stream as each head reads it."""
        for block in self.hooked_blocks:
            block.use_split_qkv_input(use)
        self.cfg.use_split_qkv_input = use
        self.setup()

    # What there is -------------------------------------------------------------------------------------

    @property
    def hooked_blocks(self) -> list[HookedBlock]:
        """The blocks, typed."""
        return self._tower.blocks

    @property
    def image_spec(self) -> ImageSpec:
        """What images the model takes: channels and size.

        Example:
            >>> HookedViT.from_timm("test_vit").image_spec
            ImageSpec(channels=3, size=None, multiple_of=(16, 16))
        """
        return self._tower.image

    stops: tuple[Stop, ...] = ()  # no branch of an adapter's is hidden

    def token_order(self, hook: str) -> None:
        """Tokens lie in their grid's order at every hook."""
        return None

    @property
    def branches(self) -> int:
        """Number of attention, MLP and convolution branches of the blocks."""
        return sum(bool(b.attentions) + bool(b.mlps_by_name) + b.has_convolution for b in self.hooked_blocks)

    def component_points(self, by: By) -> tuple[Point, ...]:
        """Return where components are read, for a decomposition by layer, head or neuron."""
        return reading.component_points(self._tower, by)

    def token_points(self, by: By) -> tuple[Point, ...]:
        """Return where components are read for maps over source tokens: attention at ``hook_v``, by head."""
        return reading.token_points(self._tower, by)

    def token_grid(
        self, images: Float[Tensor, "batch channel height width"], hook: str = "hook_patch_embed"
    ) -> TokenGrid:
        """Return which pixels of the images each token stands for.

        Args:
            images: A batch, of which only the size matters.
            hook: At which hook; models with stages have larger tokens in later ones.

        Raises:
            UnknownNameError: If there is no such hook.
            InputError: If the images have a wrong shape.
        """
        self._as_predicate(hook)
        checks.check_shape(images, self.image_spec)
        size = (images.shape[2], images.shape[3])
        grid = self._tower.grid_at(hook, *size)
        return grid if grid.image_size == size else replace(grid, seen=size)

    @property
    def stages(self) -> tuple[range, ...]:
        """The numbers of the blocks of each stage: one stage, unless the model merges tokens between blocks."""
        return self._tower.stages or (range(len(self.hooked_blocks)),)

    @property
    def parameter_names(self) -> dict[int, str]:
        """Names in the original of its parameters and buffers, by ``id``."""
        original = self.original
        tensors = [*original.named_buffers(remove_duplicate=False), *original.named_parameters(remove_duplicate=False)]
        return {id(tensor): name for name, tensor in reversed(tensors)}

    # Photographs ---------------------------------------------------------------------------------------

    def usual_size(self) -> tuple[int, int] | None:
        """Height and width that images have: the only ones, or those of timm's configuration that the model takes.

        None where it does not say.
        """
        spec = self.image_spec
        configured = (getattr(self.original, "pretrained_cfg", None) or {}).get("input_size")
        if spec.size is not None or configured is None:
            return spec.size
        height, width = (
            max(length // multiple, 1) * multiple
            for length, multiple in zip(configured[1:], spec.multiple_of, strict=True)
        )
        return height, width

    def _transform(self) -> Any:
        return self._adapter.transform(self.original, self.usual_size())

    def preprocess(self, images: Sequence[Image.Image | str | Path]) -> Float[Tensor, "batch channel height width"]:
        """Turn photographs, upright as their EXIF data say, into a batch, as the library does for evaluation.

        Args:
            images: PIL images or paths.

        Raises:
            InputError: If there are none, or a file cannot be read.
        """
        batch = preprocess.to_batch(images, self._transform())
        return batch.to(self._weight.device, self._weight.dtype)

    def preprocess_geometry(self, image: Image.Image | str | Path) -> tuple[float, float, float, float]:
        """Return the rectangle of an upright photograph that the model sees: left, top, right, bottom in pixels."""
        return preprocess.seen_rectangle(image, self._transform())

    # State, in the original's terms --------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state dict."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load into the original, and so into both."""
        return self.original.load_state_dict(state_dict, strict=strict, assign=assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HookedViT":
        self.original._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> "HookedViT":
        """Set the hooked model's mode; the original keeps its own.

        Raises:
            UnsupportedModelError: For training mode while dropout or stochastic depth is active.
        """
        if mode:
            checks.check_training(self.tower)
        super().train(mode)
        return self

    # What TransformerLens' tools read ------------------------------------------------------------------

    @property
    def W_U(self) -> Float[Tensor, "d_rep class"]:  # noqa: N802
        """Weights from the representation (for CLIP: from what is projected) to the output.

        The two classifiers of a distilled model read a token each: there it is their mean, by which the
        logits answer to a change of the representation.
        """
        return self._weights_out()[0]

    @property
    def b_U(self) -> Float[Tensor, "class"]:  # noqa: N802
        """Bias of that map."""
        return self._weights_out()[1]

    @property
    def has_activation_before_classifier(self) -> bool:
        """Whether an activation function stands between representation and output; then there is no ``W_U``."""
        return self._tower.curved

    def unembedding_at(
        self, representation: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "d_rep class"], Float[Tensor, "class"]]:
        """Return ``W_U`` and ``b_U``, whatever stands between representation h and classifier frozen at one image.

        An activation function f (MaxViT's tanh) is frozen as the factor f(h) / h, so that ``h @ W_U + b_U`` is what
        the model computes of h. Without one, these are ``W_U`` and ``b_U`` themselves.

        Args:
            representation: That of the image, a vector.

        Raises:
            InputError: If it is no vector, or the model has no classifier.
        """
        if representation.dim() != 1:
            raise InputError(f"Expected one image's vector, [d_rep]; got {list(representation.shape)}. Take one: h[0].")
        frozen = self._tower.frozen_weights_out
        return self._weights_out() if frozen is None else frozen(representation)

    def _weights_out(self) -> tuple[Tensor, Tensor]:
        if self._tower.weights_out is None:
            raise InputError(self._tower.no_weights_out)
        return self._tower.weights_out()

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "d_model"]:
        """Sum the output biases of the branches before a layer.

        Args:
            layer: The block before which to stop.
            mlp_input: Whether to include that block's attention.
            include_mlp_biases: Whether to include MLPs.
        """
        if not 0 <= layer <= len(self.hooked_blocks):
            raise InputError(f"Expected a layer from 0 to {len(self.hooked_blocks)}; got {layer}.")
        if self._tower.grid_of is not None:
            raise InputError(
                "The residual stream of this model has other tokens, or another width, in later blocks, so that biases "
                "of different blocks cannot be added up. decompose has them as components."
            )
        if any(isinstance(block, PostNormBlock) for block in self.hooked_blocks):
            raise InputError(
                "In this model a norm stands between a branch's bias and the stream, so that what the bias adds "
                "depends on the image. decompose has the norm's own shift as a component."
            )
        total = torch.zeros(self.cfg.d_model, device=self._weight.device, dtype=self._weight.dtype)
        for number, block in enumerate(self.hooked_blocks[: layer + mlp_input]):
            for attn in block.attentions.values():
                total = total + attn.b_O
            if include_mlp_biases and number < layer:
                for mlp in block.mlps_by_name.values():
                    total = total + mlp.b_out
        return total

    def tokens_to_residual_directions(self, tokens: int | Tensor) -> Float[Tensor, "*axes d_rep"]:
        """Return the classifier's directions of classes: what a vision model has in place of token directions."""
        return self.W_U.T[tokens]

    def to_single_token(self, token: int) -> int:
        """Return a class number as it is."""
        return token


def _sliced(tokens: Slice, value: Tensor, axis: int, name: str) -> Tensor:
    try:
        return tokens.apply(value, dim=axis)
    except IndexError as error:
        raise InputError(
            f"pos_slice does not fit {name}, which has {value.shape[axis]} tokens. Choose the hooks with names_filter=."
        ) from error
