"""TransformerLens' cache, which refuses what would be wrong for a model, and says what to use instead."""

from typing import Any

from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked.registry import Tower
from vitdecomp_lens.hooked.stream import check_final_norm, check_heads, check_neurons, check_stream


class ViTCache(ActivationCache):
    """Activations of a run, by hook name, with TransformerLens' methods.

    Where a norm stands between embedding and first block (CLIP's ``ln_pre``), stacks have in place of ``embed`` and
    ``pos_embed`` one ``embed``: what that norm makes of them, ``blocks.0.hook_resid_pre``. With it they sum to the
    stream.

    Do not use its stacks for models whose tokens are merged between blocks: they refuse, and `decompose` has the parts.

    Args:
        cache_dict: The activations.
        model: The hooked model.
        tower: Its tower.
        has_batch_dim: Whether the first axis is of images.
    """

    def __init__(self, cache_dict: dict[str, Tensor], model: Any, tower: Tower, has_batch_dim: bool = True) -> None:
        super().__init__(cache_dict, model, has_batch_dim=has_batch_dim)
        self.tower = tower

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "ViTCache":
        """Take some of the images."""
        part = super().apply_slice_to_batch_dim(batch_slice)
        return ViTCache(part.cache_dict, self.model, self.tower, part.has_batch_dim)

    def _stream(self) -> ActivationCache:
        """A cache whose embedding is what enters the first block."""
        entering = self.cache_dict.get("blocks.0.hook_resid_pre")
        if "ln_pre" not in self.tower.parts or entering is None or self.cache_dict.get("hook_embed") is entering:
            return self
        kept = {name: value for name, value in self.cache_dict.items() if name != "hook_pos_embed"}
        return ViTCache({**kept, "hook_embed": entering}, self.model, self.tower, self.has_batch_dim)

    def accumulated_resid(self, *args: Any, **options: Any) -> Any:
        """The stream after each block; see TransformerLens.

        Raises:
            InputError: If blocks have other tokens, or another width, than the first.
        """
        check_stream(self.tower, "accumulated_resid")
        return super().accumulated_resid(*args, **options)

    def decompose_resid(self, *args: Any, **options: Any) -> Any:
        """What embedding and branches add to the stream; see TransformerLens.

        Raises:
            InputError: If blocks have other tokens, or another width, than the first.
        """
        check_stream(self.tower, "decompose_resid")
        return ActivationCache.decompose_resid(self._stream(), *args, **options)

    def compute_head_results(self) -> None:
        """Keep what each head adds to the stream; see TransformerLens.

        Raises:
            InputError: If ``hook_z @ W_O`` is not that.
        """
        check_heads(self.tower, "compute_head_results")
        super().compute_head_results()

    def stack_head_results(self, *args: Any, **options: Any) -> Any:
        """What each head adds to the stream; see TransformerLens.

        Raises:
            InputError: If ``hook_z @ W_O`` is not that.
        """
        check_heads(self.tower, "stack_head_results")
        return super().stack_head_results(*args, **options)

    def stack_neuron_results(self, *args: Any, **options: Any) -> Any:
        """What each neuron adds to the stream; see TransformerLens.

        Raises:
            InputError: If ``hook_post @ W_out`` is not that.
        """
        check_neurons(self.tower, "stack_neuron_results")
        return super().stack_neuron_results(*args, **options)

    def get_full_resid_decomposition(self, *args: Any, **options: Any) -> Any:
        """What heads, neurons, embedding and biases add to the stream; see TransformerLens.

        Raises:
            InputError: If heads and neurons, times output weights, are not that.
        """
        check_heads(self.tower, "get_full_resid_decomposition")
        check_neurons(self.tower, "get_full_resid_decomposition")
        return ActivationCache.get_full_resid_decomposition(self._stream(), *args, **options)

    def apply_ln_to_stack(self, residual_stack: Tensor, layer: int | None = None, *args: Any, **options: Any) -> Tensor:
        """Center a stack and divide it by a norm's scale in this run; see TransformerLens.

        Raises:
            InputError: If the final norm acts on pooled tokens and the stack still has a token axis.
        """
        check_stream(self.tower, "apply_ln_to_stack")
        axes = 2 + self.has_batch_dim  # component, batch, d_model
        with_tokens = residual_stack.dim() > axes or _selects(options.get("pos_slice"))
        if layer in (None, -1, self.model.cfg.n_layers) and self.tower.pooled and with_tokens:
            raise InputError(
                f"The final norm of this model acts on pooled tokens, and the stack, {list(residual_stack.shape)}, is "
                f"of tokens. Pool it as the model does, and leave out pos_slice=; where that is the patches' mean: "
                f"stack[:, :, {len(self.tower.prefix)}:].mean(2)."
            )
        stacked: Tensor = super().apply_ln_to_stack(residual_stack, layer, *args, **options)
        return stacked

    def logit_attrs(self, residual_stack: Tensor, tokens: Any, *args: Any, **options: Any) -> Tensor:
        """What a stack's parts write into logits, scales frozen; see TransformerLens.

        ``tokens`` are classes, or directions of the output space [d_out], such as a text's. The final norm's gain is
        in the directions (`HookedViT.fold_ln`), so that nothing has to be folded beforehand; its shift and ``b_U`` are
        no part's.

        Raises:
            InputError: If the read-out is not one norm and then linear, or tokens are read at -1, the last patch.
        """
        check_final_norm(self.tower, "logit_attrs")
        _refuse_last_patch("logit_attrs", options.get("pos_slice"))
        attributed: Tensor = super().logit_attrs(residual_stack, tokens, *args, **options)
        return attributed

    def logit_lens(self, **options: Any) -> Any:
        """Read the stream after each block as if it were the last; see TransformerLens.

        Raises:
            InputError: If the read-out is not one norm and then linear, acts on pooled tokens, or tokens are read at
                -1, the last patch.
        """
        check_final_norm(self.tower, "logit_lens")
        if self.tower.pooled:
            raise InputError(
                "logit_lens reads single tokens; the final norm of this model acts on pooled ones. Pool the stream as "
                "the model does, and read it: model.unembed(model.ln_final(pooled)); where that is the mean of the "
                f"patches, pooled = cache.accumulated_resid()[:, :, {len(self.tower.prefix)}:].mean(2)."
            )
        _refuse_last_patch("logit_lens", options.get("positions", -1))
        return super().logit_lens(**options)


def _refuse_last_patch(tool: str, tokens: Any) -> None:
    """Refuse what tools for text do unless told otherwise: to read the last token, which is the last patch here."""
    chosen = tokens.slice if isinstance(tokens, Slice) else tokens
    if isinstance(chosen, int) and chosen == -1:
        raise InputError(
            f"{tool} was to read position -1, where models of text end; here it is the last patch. Say which tokens: "
            f"0 for the class token, None for all."
        )


def _selects(tokens: Any) -> bool:
    return tokens.mode != "identity" if isinstance(tokens, Slice) else tokens is not None
