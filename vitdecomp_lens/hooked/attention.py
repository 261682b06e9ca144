"""Multi-head self-attention with hook points, one class for all libraries.

A `HookedAttention` keeps the library's own attention module and calls it. Only while one of its hook points
is in use does that module's ``forward`` give way to the one written here, which runs the same operations in
the same order: fused, unless the scores or the pattern are hooked.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.hooked.hook_points import any_hooked, fire
from vitdecomp_lens.hooked.tail import Tail, check_plain
from vitdecomp_lens.points import LazyHookPoint, is_hooked

Heads = tuple[
    Float[Tensor, "batch q_head query d_qk"],
    Float[Tensor, "batch q_head key d_qk"],
    Float[Tensor, "batch head key d_head"],
]

# "batch token d_model", or "token batch d_model" in a library that runs tokens first.
Stream = Float[Tensor, "outer inner d_model"]
# The same of what is added: in class attention there are fewer tokens, and where tokens merge they are wider too.
Added = Float[Tensor, "outer_added inner_added d_added"]


class HookedHeads(nn.Module, ABC):
    """Hook points of attention heads, and the mixing of values by patterns between them.

    ``hook_q``, ``hook_k`` (after QK-norm), ``hook_v`` and ``hook_z`` are ``batch token head d_head``;
    ``hook_attn_scores`` and ``hook_pattern`` are ``batch head query key``. Where positions rotate queries and keys,
    ``hook_q`` and ``hook_k`` come before that, and ``hook_rot_q`` and ``hook_rot_k`` after it.

    Args:
        rotary: Whether positions rotate queries and keys.
    """

    hook_q: HookPoint
    hook_k: HookPoint
    hook_v: HookPoint
    hook_rot_q: HookPoint
    hook_rot_k: HookPoint
    hook_z: HookPoint
    hook_attn_scores: LazyHookPoint
    hook_pattern: LazyHookPoint

    def __init__(self, *, rotary: bool = False) -> None:
        super().__init__()
        self.rotary = rotary
        for name in ("hook_q", "hook_k", "hook_v", *(("hook_rot_q", "hook_rot_k") if rotary else ())):
            setattr(self, name, HookPoint())
        self.hook_attn_scores = LazyHookPoint()
        self.hook_pattern = LazyHookPoint()
        self.hook_z = HookPoint()
        self._points: tuple[HookPoint, ...] = tuple(m for m in self.children() if isinstance(m, HookPoint))

    @property
    @abstractmethod
    def fused(self) -> bool:
        """Whether the library would use a fused attention kernel."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """What dot products of queries and keys are multiplied with."""

    def drop(self, pattern: Tensor) -> Tensor:
        """Apply attention dropout; there is none unless overridden."""
        return pattern

    def rotate(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions; nothing does unless overridden.

        Args:
            q: Queries, heads before tokens.
            k: Keys, likewise.
            dtype: That of the values, which both are brought to.
        """
        return q, k

    def score_bias(self) -> Float[Tensor, "*#batch head query key"] | None:
        """What is added to the scores, such as a bias by relative position; nothing unless overridden."""
        return None

    def score(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
        """Attention scores: scaled dot products."""
        return (q * self.scale) @ k.transpose(-2, -1)

    def mix(
        self,
        q: Float[Tensor, "batch head query d_qk"],
        k: Float[Tensor, "batch head key d_qk"],
        v: Float[Tensor, "batch head key d_head"],
    ) -> Float[Tensor, "batch head query d_head"]:
        """Mix values by the attention pattern."""
        bias = self.score_bias()
        if self.fused and not any_hooked((self.hook_attn_scores, self.hook_pattern)):
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        scores = self.score(q, k)
        scores = fire(self.hook_attn_scores, scores if bias is None else scores + bias)
        return fire(self.hook_pattern, self.drop(scores.softmax(-1))) @ v

    def mix_hooked(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch query head d_head"]:
        """Pass queries, keys and values, heads before tokens, through their hooks; mix them, tokens before heads."""
        q, k, v = _show(self.hook_q, q), _show(self.hook_k, k), _show(self.hook_v, v)
        if self.rotary:
            q, k = self.rotate(q, k, v.dtype)
            q, k = _show(self.hook_rot_q, q), _show(self.hook_rot_k, k)
        return self.mix(q, k, v).transpose(1, 2)


def _show(point: HookPoint, heads: Tensor) -> Tensor:
    """Pass a value with heads before tokens through a hook that sees tokens before heads."""
    return fire(point, heads.transpose(1, 2)).transpose(1, 2)


class HookedAttention(HookedHeads):
    """Attention whose queries, keys, values, scores, pattern and head outputs can be read and changed.

    ``hook_z`` comes after any norm, gate or scale between mixing and projection, so that ``z @ W_O`` summed
    over heads, plus ``b_O``, is what is added to the stream. ``hook_result``, each head's share of that,
    exists after `use_result`. See `HookedHeads` for the other hooks.

    ``context`` holds what the library hands to the attention beside the stream, by the name of the argument: rotations,
    a position bias that blocks share. The block puts it there for the length of its forward.

    Args:
        core: The (cloned) attention module of the library.
        tail: What the block does with the output before adding it (LayerScale).
        rotary: Whether positions rotate queries and keys.
    """

    hook_result: LazyHookPoint
    core: nn.Module

    def __init__(self, core: nn.Module, *, tail: Tail | None = None, rotary: bool = False) -> None:
        super().__init__(rotary=rotary)
        self.context: Mapping[str, Any] = {}
        self._split: tuple[Tensor, Tensor, Tensor] | None = None
        self.tail = tail or Tail()
        self.stand_in_for(core)

    def stand_in_for(self, core: nn.Module) -> None:
        """Take over the library's ``forward``."""
        self.core = core
        # An instance attribute, so that hooks which the user put on the library's module still run around it.
        core.__dict__["forward"] = self.run

    # What differs between libraries ------------------------------------------------------------------

    @abstractmethod
    def project(self, x: Stream) -> Heads:
        """Queries, keys and values, heads before tokens, before QK-norm."""

    @abstractmethod
    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Apply QK-norm."""

    @abstractmethod
    def finish_heads(
        self, z: Float[Tensor, "batch query head d_head"], x: Stream
    ) -> Float[Tensor, "batch query head d_head"]:
        """Apply what stands between mixing and the output projection: norm, gate, head scale."""

    @abstractmethod
    def project_out(self, z: Float[Tensor, "batch token head d_head"]) -> Added:
        """Apply the output projection, without LayerScale."""

    # Weights -------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def W_Q(self) -> Float[Tensor, "q_head d_model d_qk"]:  # noqa: N802
        """Query weights, a live view."""

    @property
    @abstractmethod
    def W_K(self) -> Float[Tensor, "q_head d_model d_qk"]:  # noqa: N802
        """Key weights, a live view."""

    @property
    @abstractmethod
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:  # noqa: N802
        """Value weights, a live view."""

    @property
    @abstractmethod
    def b_Q(self) -> Float[Tensor, "q_head d_qk"]:  # noqa: N802
        """Query bias."""

    @property
    @abstractmethod
    def b_K(self) -> Float[Tensor, "q_head d_qk"]:  # noqa: N802
        """Key bias."""

    @property
    @abstractmethod
    def b_V(self) -> Float[Tensor, "head d_head"]:  # noqa: N802
        """Value bias."""

    @property
    @abstractmethod
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:  # noqa: N802
        """Output weights, with LayerScale folded in."""

    @property
    @abstractmethod
    def b_O(self) -> Float[Tensor, "d_model"]:  # noqa: N802
        """Output bias, with LayerScale folded in."""

    @property
    @abstractmethod
    def has_output_bias(self) -> bool:
        """Whether there is a ``b_O`` to add; where there is none, its view is zero."""

    @property
    @abstractmethod
    def output_layers(self) -> tuple[nn.Module, ...]:
        """The modules that the library calls between ``hook_z`` and the tail: a linear layer, a dropout."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Number of heads, as ``hook_z`` counts them."""

    # Running -------------------------------------------------------------------------------------------

    def check_result(self) -> None:
        """Raise `UnsupportedModelError` where the sum of ``hook_result`` would not be what is added to the stream."""
        folded = self.tail.modules if self.tail.folds else ()
        check_plain("hook_result", self.output_layers, around=(self.core, *folded))

    def use_result(self, use: bool) -> None:
        """Add or remove ``hook_result``."""
        if use and "hook_result" not in self._modules:
            self.hook_result = LazyHookPoint()
        elif not use and "hook_result" in self._modules:
            del self.hook_result

    def forward(
        self,
        x: Stream,
        *,
        split: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Added:
        """Return what the block adds to the stream, but for stochastic depth.

        Args:
            x: The normed stream.
            split: Inputs of queries, keys and values by head, ``batch token head d_model`` each.
        """
        if "hook_result" in self._modules and is_hooked(self.hook_result):
            return self.branch(self.head_outputs(x, split))
        self._split = split
        try:
            return self.tail(self.call_core(x))
        finally:
            self._split = None

    def branch(self, z: Float[Tensor, "batch token head d_head"]) -> Added:
        """Return what the block adds to the stream from the heads' outputs, through ``hook_result`` if it is used."""
        if "hook_result" not in self._modules or not is_hooked(self.hook_result):
            return self.tail(self.project_out(z))
        self.check_result()
        # Heads as a batch axis of the product: with tokens there too, torch would copy the weights for each token.
        shares = torch.matmul(z.transpose(1, 2), self.W_O).transpose(1, 2)
        result = fire(self.hook_result, shares).sum(2)
        if self.has_output_bias:
            result = result + self.b_O
        return result if self.tail.folds else self.tail(result)

    def call_core(self, x: Tensor) -> Tensor:
        """Call the library's module, whose ``forward`` is `run`."""
        out: Tensor = self.core(x, **self.context)
        return out

    def run(self, x: Tensor, *args: Any, **context: Any) -> Any:
        """Stand in for the library's ``forward``: the library's own while no hook is in use."""
        if self._split is None and not any_hooked(self._points):
            return type(self.core).forward(self.core, x, *args, **context)
        outer, self.context = self.context, context  # a hook of the user's on the library's module may have changed it
        try:
            return self.project_out(self.head_outputs(x, self._split))
        finally:
            self.context = outer

    def head_outputs(
        self, x: Stream, split: tuple[Tensor, Tensor, Tensor] | None
    ) -> Float[Tensor, "batch query head d_head"]:
        """Everything up to and with ``hook_z``."""
        q, k, v = self.project(x) if split is None else self.project_split(*split)
        q, k = self.norm_qk(q, k)
        return fire(self.hook_z, self.finish_heads(self.mix_hooked(q, k, v), x))

    def project_split(self, q_in: Tensor, k_in: Tensor, v_in: Tensor) -> Heads:
        """Queries, keys and values from inputs of their own, ``batch token head d_model`` each."""
        q, k, v = (
            torch.matmul(inputs.transpose(1, 2), weight) + bias.unsqueeze(1)
            for inputs, weight, bias in (
                (q_in, self.W_Q, self.b_Q),
                (k_in, self.W_K, self.b_K),
                (v_in, self.W_V, self.b_V),
            )
        )
        return q, k, v
