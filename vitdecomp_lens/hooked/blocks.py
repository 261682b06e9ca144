"""Transformer blocks with hook points on the residual stream and on what each branch adds to it."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked.attention import HookedAttention
from vitdecomp_lens.hooked.clone import adopt_hooks
from vitdecomp_lens.hooked.hook_points import CopyingHookPoint, any_hooked, fire, swap_tokens_first
from vitdecomp_lens.hooked.mlp import HookedMLP
from vitdecomp_lens.hooked.norms import HookedNorm

SPLIT_HOOKS = ("hook_q_input", "hook_k_input", "hook_v_input")
MLP_INPUT = "hook_mlp_in"
PARAMETERS = tuple(
    f"{letter}_{name}" for name in ("Q", "K", "V", "O", "in", "gate", "out") for letter in "Wb"
)  # as TransformerLens names weights


def not_one(what: str) -> property:
    """Stand in for ``attn`` or ``mlp`` in blocks that have none or several: tools take there to be one.

    Args:
        what: What there is instead.
    """

    def explain(block: nn.Module) -> None:
        raise InputError(
            f"Tools that take each block for one attention and one MLP do not fit this model: a {type(block).__name__} "
            f"has {what}. decompose and attribute have all of them; hooks on what list(model.hook_dict) names work."
        )

    return property(explain)


class HookedBlock(nn.Module, ABC):
    """A block that reads the residual stream and adds to it.

    Args:
        core: The (cloned) block of the library, whose submodules this block calls.
    """

    hook_resid_pre: HookPoint
    hook_resid_post: HookPoint
    hook_attn_out: HookPoint
    hook_mlp_out: HookPoint
    hook_out_is_single_residual_stream = True  # TransformerLens' logit lens asks

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.hook_resid_pre = CopyingHookPoint()
        adopt_hooks(self, core)

    @property
    def outputs_add_up(self) -> bool:
        """Whether heads and neurons, times output weights, are what is added: no norm stands behind them."""
        tails = [attn.tail for attn in self.attentions.values()] + [mlp.tail for mlp in self.mlps_by_name.values()]
        return all(tail.folds for tail in tails)

    @property
    def submodules(self) -> None:
        """What TransformerLens asks for before it takes heads for writers of the stream: nothing, or why they are not.

        Raises:
            InputError: If a norm stands between heads and stream.
        """
        if not self.outputs_add_up:
            raise InputError(
                f"In a {type(self).__name__} of this model a norm stands between the heads and the residual stream, so "
                f"that z @ W_O is not what a head adds. decompose(model, images, by='head') freezes that norm at each "
                f"image, and is exact; patching at hook_z works, too."
            )

    @property
    @abstractmethod
    def attentions(self) -> dict[str, HookedAttention]:
        """The block's attentions, by their name below the block."""

    @property
    @abstractmethod
    def mlps_by_name(self) -> dict[str, HookedMLP]:
        """The block's MLPs, by their name below the block."""

    @property
    def has_convolution(self) -> bool:
        """Whether a convolution adds to the stream, at ``hook_conv_out``."""
        return False

    def weights(self) -> dict[str, Tensor]:
        """The weights of its attentions, MLPs and norms, live, by the names that TransformerLens has for them."""
        found = {}
        for path, part in {**self.attentions, **self.mlps_by_name}.items():
            for name in PARAMETERS:
                if isinstance(getattr(type(part), name, None), property):
                    found[f"{path}.{name}"] = getattr(part, name)
        for name, norm in self.named_children():
            if isinstance(norm, HookedNorm):
                found |= {f"{name}.{key}": value for key, value in (("w", norm.w), ("b", norm.b)) if value is not None}
        return found

    def padding(self, rows: int, columns: int) -> int:
        """How many tokens of padding the attention sees, before those of a grid: none, unless overridden."""
        return 0

    def is_before_merging(self, hook: str) -> bool:
        """Whether a hook of the block sees tokens from before the block merges them: no block does, by default."""
        return False

    @abstractmethod
    def add_branches(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes_after d_model_after"]:
        """Return the stream after the block, which may have fewer and wider tokens."""

    def use_split_qkv_input(self, use: bool) -> None:
        """Add or remove separate inputs of queries, keys and values."""
        raise InputError(
            f"Separate inputs for queries, keys and values exist only in blocks with one attention after a "
            f"norm; this model has {type(self).__name__}s."
        )

    def use_mlp_input(self, use: bool) -> None:
        """Add or remove an input of the MLP that can be changed alone."""
        raise InputError(
            f"An input of its own has the MLP only in blocks where it follows the attention; this model has "
            f"{type(self).__name__}s."
        )

    def forward(
        self,
        x: Float[Tensor, "*axes d_model"],
        attn_mask: None = None,
        is_causal: bool = False,
        **context: Any,
    ) -> Float[Tensor, "*axes_after d_model_after"]:
        """Run the block.

        Args:
            x: The stream.
            attn_mask: None. Libraries pass a mask along, which image towers do not use.
            is_causal: False, likewise.
            **context: What the library gives its block for the attention: rotations, a shared position bias.
        """
        if attn_mask is not None or is_causal:
            raise InputError("Hooked models attend to all tokens: attn_mask must be None and is_causal False.")
        readers = tuple(self.attentions.values()) if context else ()
        for attn in readers:
            attn.context = context
        try:
            x = fire(self.hook_resid_pre, x)
            return fire(self.hook_resid_post, self.add_branches(x))
        finally:
            for attn in readers:
                attn.context = {}


class TwoBranchBlock(HookedBlock):
    """Attention, then an MLP, each added to the stream: the usual block.

    Args:
        core: The (cloned) block of the library.
        ln1: The norm of the attention branch.
        attn: The attention, with LayerScale in its tail.
        ln2: The norm of the MLP branch.
        mlp: The MLP, with LayerScale in its tail.
        drop_path1: Stochastic depth of the attention branch.
        drop_path2: Stochastic depth of the MLP branch.
        tokens_first: Whether the library runs the block on ``token batch d_model``.
    """

    hook_resid_mid: HookPoint
    hook_q_input: HookPoint
    hook_k_input: HookPoint
    hook_v_input: HookPoint
    hook_mlp_in: HookPoint

    def __init__(
        self,
        core: nn.Module,
        *,
        ln1: nn.Module,
        attn: HookedAttention,
        ln2: nn.Module,
        mlp: HookedMLP,
        drop_path1: nn.Module | None = None,
        drop_path2: nn.Module | None = None,
        tokens_first: bool = False,
    ) -> None:
        super().__init__(core)
        self.ln1 = ln1
        self.attn = attn
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.ln2 = ln2
        self.mlp = mlp
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()
        self.drop_path1 = drop_path1 or nn.Identity()
        self.drop_path2 = drop_path2 or nn.Identity()
        self.core = core
        self.tokens_first = tokens_first
        if tokens_first:
            own = [child for child in self.children() if isinstance(child, HookPoint)]
            inner = [m for part in (ln1, ln2, mlp) for m in part.modules() if isinstance(m, HookPoint)]
            swap_tokens_first(own + inner)

    @property
    def attentions(self) -> dict[str, HookedAttention]:
        """The attention."""
        return {"attn": self.attn}

    @property
    def mlps_by_name(self) -> dict[str, HookedMLP]:
        """The MLP."""
        return {"mlp": self.mlp}

    def attention_branch(self, x: Tensor) -> Tensor:
        """What the attention adds to the stream ``x``."""
        return self.attn(self.ln1(x), split=self._split_inputs(x, self.ln1))

    def mlp_branch(self, x: Tensor) -> Tensor:
        """What the MLP adds to the stream ``x``."""
        return self.mlp(self.ln2(x))

    def add_branches(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """Add attention, then MLP."""
        x = fire(self.hook_resid_mid, x + fire(self.hook_attn_out, self.drop_path1(self.attention_branch(x))))
        mlp_in = fire(self.hook_mlp_in, x) if MLP_INPUT in self._modules else x
        return x + fire(self.hook_mlp_out, self.drop_path2(self.mlp_branch(mlp_in)))

    def use_mlp_input(self, use: bool) -> None:
        """Add or remove ``hook_mlp_in``."""
        if use and MLP_INPUT not in self._modules:
            self.hook_mlp_in = CopyingHookPoint()
            if self.tokens_first:
                swap_tokens_first([self.hook_mlp_in])
        elif not use and MLP_INPUT in self._modules:
            del self.hook_mlp_in

    def use_split_qkv_input(self, use: bool) -> None:
        """Add or remove ``hook_q_input``, ``hook_k_input`` and ``hook_v_input``."""
        for name in SPLIT_HOOKS:
            if use and name not in self._modules:
                setattr(self, name, HookPoint())
                if self.tokens_first:
                    swap_tokens_first([getattr(self, name)])
            elif not use and name in self._modules:
                delattr(self, name)

    def _split_inputs(self, x: Tensor, norm: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """The stream once a head for queries, keys and values each, hooked and normed; None while unused."""
        if SPLIT_HOOKS[0] not in self._modules or not any_hooked(getattr(self, name) for name in SPLIT_HOOKS):
            return None
        heads = (self.attn.W_Q.shape[0], self.attn.W_K.shape[0], self.attn.W_V.shape[0])
        inputs = [
            fire(getattr(self, name), x.unsqueeze(2).repeat(1, 1, count, 1))
            for name, count in zip(SPLIT_HOOKS, heads, strict=True)
        ]
        if norm is not None:
            inputs = [norm(value) for value in inputs]
        q, k, v = (value.transpose(0, 1) if self.tokens_first else value for value in inputs)
        return q, k, v


class PostNormBlock(TwoBranchBlock):
    """A block whose norms act on what the branches return, before it is added."""

    outputs_add_up = False

    def attention_branch(self, x: Tensor) -> Tensor:
        """What the attention adds to the stream ``x``."""
        return self.ln1(self.attn(x, split=self._split_inputs(x)))

    def mlp_branch(self, x: Tensor) -> Tensor:
        """What the MLP adds to the stream ``x``."""
        return self.ln2(self.mlp(x))


def norms_of(block: HookedBlock) -> list[HookedNorm]:
    """The hooked norms of a block."""
    return [module for module in block.modules() if isinstance(module, HookedNorm)]
