"""`HookedViT`: TransformerLens hook points around an unmodified vision transformer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from vitdecomp_lens.components import By, Point, TokenGrid
from vitdecomp_lens.coverage import Stop
from vitdecomp_lens.errors import InputError, UnknownNameError, UnsupportedModelError, near_matches
from vitdecomp_lens.hooked import checks, preprocess, reading, splicing, stream
from vitdecomp_lens.hooked.activation_cache import ViTCache
from vitdecomp_lens.hooked.blocks import SPLIT_HOOKS, HookedBlock, PostNormBlock
from vitdecomp_lens.hooked.clone import StructureWatch, clone_tree
from vitdecomp_lens.hooked.config import HookedViTConfig, read_config
from vitdecomp_lens.hooked.image_tokens import ImageTokens
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
    training: bool

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
        self._take_mode(original)
        self.cfg: HookedViTConfig = read_config(self._tower, type(original).__name__)
        self.setup()

    def _take_mode(self, original: nn.Module) -> None:
        """Be in the original's mode, with all that was put around its modules."""
        self.training = original.training
        if not any(module.training for module in original.modules()):
            super().train(False)

    def setup(self) -> None:
        """Name the hooks. Separate inputs have TransformerLens' newer name, too: ``blocks.0.attn.hook_q_input``."""
        super().setup()
        for number, block in enumerate(self.hooked_blocks):
            for name in (name for name in SPLIT_HOOKS if name in block._modules):
                alias = f"blocks.{number}.attn.{name}"
                self.hook_dict[alias] = self.mod_dict[alias] = getattr(block, name)

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
            images: ``batch channel height width``, normalised as the model was trained; see `preprocess`. Or what
                `to_tokens` made of them.

        Raises:
            InputError: If the images have a wrong shape, dtype or device.
            UnsupportedModelError: If submodules or settings of the original were changed after wrapping.
        """
        if isinstance(images, ImageTokens):
            images = images.images
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
    ) -> tuple[Any, ViTCache]:
        """Run the model and keep the activations at its hook points.

        Args:
            images: A batch of images.
            names_filter: A hook name, several, or a predicate on names; None for all.
            remove_batch_dim: Whether to drop the batch axis of a single image.
            **options: ``device``, ``incl_bwd``, ``reset_hooks_end``, ``clear_contexts`` and ``pos_slice`` of
                ``HookedRootModule.run_with_cache``. ``pos_slice`` slices tokens; activations without a token
                axis, and the patch embedding, are kept whole.

        Returns:
            The output and an ``ActivationCache`` of TransformerLens.

        Raises:
            UnknownNameError: If the filter matches no hook.
        """
        output, cache = super().run_with_cache(
            images, names_filter=self._as_predicate(names_filter), remove_batch_dim=remove_batch_dim, **options
        )
        return output, ViTCache(cache, self, self._tower, has_batch_dim=not remove_batch_dim)

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

        def save(value: Tensor, hook: HookPoint, name: str, suffix: str) -> None:
            value = value.detach().to(device)
            if (axis := self._token_axis(name)) is not None:
                value = _sliced(tokens, value, axis, name)
            kept[f"{name}{suffix}"] = value[0] if remove_batch_dim and len(value) == 1 else value

        wanted = self._as_predicate(names_filter)
        self.is_caching = True
        names = [name for name in self.hook_dict if wanted(name)]
        forward = [(name, partial(save, name=name, suffix="")) for name in names]
        return kept, forward, [(name, partial(save, name=name, suffix="_grad")) for name in names if incl_bwd]

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

    @contextmanager
    def spliced(self, modules: Mapping[str, nn.Module], *, error: bool = True) -> Iterator["HookedViT"]:
        """Let modules, such as sparse autoencoders, stand at hook points for the length of a ``with`` block.

        The value x at a hook becomes ``decode(latents) + e`` with ``latents = encode(x)`` and
        ``e = x - decode(latents)``. Hooks at ``<hook>.hook_latents`` and ``<hook>.hook_error`` read and change them; a
        change of latents leaves e as it is. ``<hook>`` itself keeps its hooks, which see what the model goes on with.

        In `decompose` and the other requests latents and error are given, as nonlinear outputs are. With
        ``by="latent"`` each latent is a component, ``latent17@<hook>``, and heads are told apart elsewhere; otherwise
        those of a module are one, ``latents@<hook>``. The error is ``error@<hook>``, and the decoder's bias a constant.
        Blocks before a module at the residual stream write nothing directly any more.

        Args:
            modules: For each hook a module with ``encode(x)`` and ``decode(latents)``, of which the second is affine.
                It gets ``[batch, token, d]``; at ``hook_z`` the heads put together, ``d = heads · d_head``. The module
                itself stays as it is: a clone with the same parameters runs, in evaluation mode.
            error: Whether e is added. Without it the module's output takes the value's place, and the run changes.

        Raises:
            UnknownNameError: If there is no such hook.
            InputError: If a module cannot stand there; in a run, if it does not fit the value.

        Example:
            >>> class Halves(nn.Module):
            ...     def encode(self, x):
            ...         return torch.cat([x.relu(), (-x).relu()], -1)
            ...
            ...     def decode(self, latents):
            ...         positive, negative = latents.chunk(2, -1)
            ...         return positive - negative
            >>> model, images = HookedViT.from_timm("test_vit"), torch.randn(1, 3, 160, 160)
            >>> with model.spliced({"blocks.1.hook_mlp_out": Halves()}):
            ...     _, cache = model.run_with_cache(images)
            >>> cache["blocks.1.hook_mlp_out.hook_latents"].shape, cache["blocks.1.hook_mlp_out"].shape
            (torch.Size([1, 101, 128]), torch.Size([1, 101, 64]))
        """
        try:
            with splicing.splicing(self.hook_dict, modules, self._weight, error=error):
                self.setup()
                yield self
        finally:
            self.setup()

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

    def set_use_hook_mlp_in(self, use: bool) -> None:
        """Add or remove ``blocks.{i}.hook_mlp_in``: the stream as the MLP reads it.

        Raises:
            InputError: If attention and MLP share their input, or blocks have other tokens than the first.
        """
        if use:
            stream.check_stream(self._tower, "hook_mlp_in")
        for block in self.hooked_blocks:
            block.use_mlp_input(use)
        self.cfg.use_hook_mlp_in = use
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
        """Return where components are read, for a decomposition by layer, head, neuron or latent."""
        splices = splicing.splices_of(self.hook_dict)
        points = reading.component_points(self._tower, by, splices)
        return splicing.with_splices(points, splices, by, self._token_axis)

    def token_points(self, by: By) -> tuple[Point, ...]:
        """Return where components are read for maps over source tokens: attention at ``hook_v``, by head."""
        splices = splicing.splices_of(self.hook_dict)
        return splicing.with_splices(reading.token_points(self._tower, by, splices), splices, by, self._token_axis)

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
        at = next((name for name in splicing.splices_of(self.hook_dict) if hook.startswith(f"{name}.")), hook)
        grid = self._tower.grid_at(at, *size)
        return grid if grid.image_size == size else replace(grid, seen=size)

    @property
    def stages(self) -> tuple[range, ...]:
        """The numbers of the blocks of each stage: one stage, unless the model merges tokens between blocks."""
        return self._tower.stages or (range(len(self.hooked_blocks)),)

    @property
    def parameter_names(self) -> dict[int, str]:
        """Names in the original of its parameters and buffers, by ``id``; of spliced modules, behind their hooks'."""
        splices = splicing.splices_of(self.hook_dict).values()
        owners = {"": self.original, **{f"{splice.hook}.": splice.module for splice in splices}}
        return {
            id(tensor): f"{prefix}{name}"
            for prefix, owner in owners.items()
            for tensors in (owner.named_parameters, owner.named_buffers)
            for name, tensor in reversed(list(tensors(remove_duplicate=False)))
        }

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
        for module in (self.original, *(splice.module for splice in splicing.splices_of(self.hook_dict).values())):
            module._apply(fn, recurse)
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

    @property
    def unembed(self) -> stream.Unembedding:
        """The map from representation to output: ``unembed(h)`` is ``h @ W_U + b_U``."""
        return stream.Unembedding(*self._weights_out())

    def fold_ln(self) -> stream.Unembedding:
        """Return the map to the output with the final norm's gain γ and shift β in it; the model stays as it is.

        ``ln_final.hook_normalized`` of the tokens that are read is mapped to the output. So ``W_U`` of it has the
        directions of the stream along which the output changes, the norm's statistics frozen.

        Raises:
            InputError: If the read-out is not one norm and then linear.

        Example:
            >>> model = HookedViT.from_timm("test_vit", num_classes=5)
            >>> logits, cache = model.run_with_cache(torch.randn(1, 3, 160, 160))
            >>> folded = model.fold_ln()(cache["ln_final.hook_normalized"][:, 0])
            >>> torch.allclose(folded, logits, atol=1e-5)
            True
        """
        stream.check_final_norm(self._tower, "fold_ln")
        norm: Any = self._tower.parts["ln_final"]
        return self.unembed.behind(norm)

    def tokens_to_residual_directions(
        self, tokens: int | Int[Tensor, "*axes"] | Float[Tensor, "*axes d_out"]
    ) -> Float[Tensor, "*axes d_model"]:
        """Return the directions of the stream along which outputs change, the final norm's gain in them (`fold_ln`).

        Args:
            tokens: Classes, by number; or directions of the output space, such as those of texts.

        Raises:
            InputError: If the read-out is not one norm and then linear, or a class is named instead of numbered.
        """
        self.to_single_token(tokens)
        directions = self.fold_ln().W_U.T
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            return tokens @ directions
        return directions[tokens]

    def to_single_token(self, token: Any) -> Any:
        """Return a class number as it is.

        Raises:
            InputError: If the class is named.
        """
        if isinstance(token, str):
            raise InputError(f"Classes are numbers here; got {token!r}. Take its place among the model's classes.")
        return token

    def blocks_with(self, part: str) -> list[tuple[int, HookedBlock]]:
        """Return the blocks that have a part such as ``"attn"``, with their numbers.

        Raises:
            InputError: If not every block is one attention that adds to the same stream.
        """
        stream.check_heads(self._tower, "blocks_with")
        return [(number, block) for number, block in enumerate(self.hooked_blocks) if part in block._modules]

    def to_tokens(self, images: Any) -> ImageTokens:
        """Return images as tools take them that count tokens off their input; the model takes them so, too.

        Args:
            images: ``batch channel height width``.

        Raises:
            InputError: If these are no images, or blocks have other tokens, or another width, than the first.

        Example:
            >>> HookedViT.from_timm("test_vit").to_tokens(torch.zeros(2, 3, 160, 160)).shape
            torch.Size([2, 101])
        """
        stream.check_stream(self._tower, "to_tokens")
        checks.check_shape(images, self.image_spec)
        return ImageTokens(images, len(self.token_grid(images)))

    def to_str_tokens(self, images: Float[Tensor, "batch channel height width"]) -> list[str]:
        """Return names of the tokens that images have: ``["CLS", "r0c0", "r0c1", ...]``.

        Raises:
            InputError: If blocks have other tokens, or another width, than the first.
        """
        stream.check_stream(self._tower, "to_str_tokens")
        return list(self.token_grid(images).names)

    def tl_parameters(self) -> dict[str, Tensor]:
        """Return weights under TransformerLens' names, live; the final norm is folded into those of ``unembed``.

        Raises:
            InputError: If not every block is one attention and one MLP that add to the same stream, or the read-out is
                not one norm and then linear.
        """
        stream.check_heads(self._tower, "tl_parameters")
        stream.check_neurons(self._tower, "tl_parameters")
        unembed = self.fold_ln()
        found = {"unembed.W_U": unembed.W_U, "unembed.b_U": unembed.b_U}
        for number, block in enumerate(self.hooked_blocks):
            found |= {f"blocks.{number}.{name}": weight for name, weight in block.weights().items()}
        return found


def _sliced(tokens: Slice, value: Tensor, axis: int, name: str) -> Tensor:
    try:
        return tokens.apply(value, dim=axis)
    except IndexError as error:
        raise InputError(
            f"pos_slice does not fit {name}, which has {value.shape[axis]} tokens. Choose the hooks with names_filter=."
        ) from error
