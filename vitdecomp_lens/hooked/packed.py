"""Attention whose queries, keys and values come from one packed linear map, as in timm and open_clip."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.hooked.attention import HookedAttention


def by_head(weight: Float[Tensor, "out d_model"], heads: int) -> Float[Tensor, "head d_model d_head"]:
    """View the weight of a linear layer as one matrix a head."""
    return weight.unflatten(0, (heads, -1)).transpose(1, 2)


class PackedAttention(HookedAttention):
    """Attention with one packed input projection and one output projection."""

    q_heads_per_head = 1

    @property
    @abstractmethod
    def packed_in(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the packed input projection: queries, keys, values."""

    @property
    @abstractmethod
    def projection_out(self) -> tuple[Float[Tensor, "d_model d_attn"], Float[Tensor, "d_model"] | None]:
        """Weight and bias of the output projection."""

    @property
    def heads(self) -> int:
        """Number of heads, as ``hook_v`` and ``hook_z`` count them."""
        return int(self.core.num_heads)  # type: ignore[arg-type]

    @property
    def q_heads(self) -> int:
        """Number of heads, as ``hook_q`` and ``hook_k`` count them."""
        return self.q_heads_per_head * self.heads

    def _weight(self, third: int, heads: int) -> Float[Tensor, "head d_model d_head"]:
        return by_head(torch.chunk(self.packed_in[0], 3)[third], heads)

    def _bias(self, third: int, heads: int) -> Float[Tensor, "head d_head"]:
        weight, bias = self.packed_in
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return torch.chunk(bias, 3)[third].unflatten(0, (heads, -1))

    @property
    def W_Q(self) -> Float[Tensor, "q_head d_model d_qk"]:  # noqa: N802
        """Query weights."""
        return self._weight(0, self.q_heads)

    @property
    def W_K(self) -> Float[Tensor, "q_head d_model d_qk"]:  # noqa: N802
        """Key weights."""
        return self._weight(1, self.q_heads)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:  # noqa: N802
        """Value weights."""
        return self._weight(2, self.heads)

    @property
    def b_Q(self) -> Float[Tensor, "q_head d_qk"]:  # noqa: N802
        """Query bias."""
        return self._bias(0, self.q_heads)

    @property
    def b_K(self) -> Float[Tensor, "q_head d_qk"]:  # noqa: N802
        """Key bias."""
        return self._bias(1, self.q_heads)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:  # noqa: N802
        """Value bias."""
        return self._bias(2, self.heads)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:  # noqa: N802
        """Output weights, with LayerScale folded in."""
        return self.tail.fold(self.projection_out[0].T.unflatten(0, (self.heads, -1)))

    @property
    def b_O(self) -> Float[Tensor, "d_model"]:  # noqa: N802
        """Output bias, with LayerScale folded in."""
        weight, bias = self.projection_out
        return self.tail.fold(weight.new_zeros(weight.shape[0]) if bias is None else bias)

    @property
    def has_output_bias(self) -> bool:
        """Whether the output projection has a bias."""
        return self.projection_out[1] is not None


def linear_out(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer."""
    return linear.weight, getattr(linear, "bias", None)  # type: ignore[return-value]
