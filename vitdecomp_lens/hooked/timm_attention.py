"""timm's attention modules with hook points."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vitdecomp_lens.hooked.attention import Heads, HookedAttention
from vitdecomp_lens.hooked.hook_points import any_hooked, fire
from vitdecomp_lens.hooked.packed import PackedAttention, linear_out


def differential_mix(
    attn: HookedAttention,
    core: nn.Module,
    q: Float[Tensor, "batch q_head query d_qk"],
    k: Float[Tensor, "batch q_head key d_qk"],
    v: Float[Tensor, "batch head key d_head"],
) -> Float[Tensor, "batch head query d_head"]:
    """Mix values by pattern₁ − λ pattern₂, then apply each head's norm and constant scale.

    Args:
        attn: Whose hook points and settings apply.
        core: The library's module that holds λ and the norm.
        q: Queries, two heads for each head of ``v``.
        k: Keys.
        v: Values.
    """
    factor = core._compute_lambda().type_as(q)  # type: ignore[operator]
    if attn.fused and not any_hooked((attn.hook_attn_scores, attn.hook_pattern)):
        (q1, q2), (k1, k2) = (heads.unflatten(1, (-1, 2)).unbind(2) for heads in (q, k))
        attend = functional.scaled_dot_product_attention
        z = attend(q1, k1, v) - factor * attend(q2, k2, v)
    else:
        scores = fire(attn.hook_attn_scores, attn.score(q, k))
        first, second = attn.drop(scores.softmax(-1)).unflatten(1, (-1, 2)).unbind(2)
        z = fire(attn.hook_pattern, first - factor * second) @ v
    return core.sub_norm(z) * (1 - core.lambda_init)  # type: ignore[operator]


class TimmPackedAttention(PackedAttention):
    """An attention module of timm's with one linear layer ``qkv`` and an output layer ``proj``."""

    @property
    def fused(self) -> bool:
        """Whether the library would use a fused attention kernel."""
        return bool(self.core.fused_attn)

    @property
    def scale(self) -> float:
        """What dot products are multiplied with."""
        return float(self.core.scale)  # type: ignore[arg-type]

    @property
    def packed_in(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of ``qkv``."""
        return self.core.qkv.weight, self.core.qkv.bias  # type: ignore[union-attr, return-value]

    @property
    def projection_out(self) -> tuple[Float[Tensor, "d_model d_attn"], Float[Tensor, "d_model"] | None]:
        """Weight and bias of ``proj``."""
        return linear_out(self.core.proj)  # type: ignore[arg-type]

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        """``proj`` and its dropout."""
        return self.core.proj, self.core.proj_drop  # type: ignore[return-value]

    def project_in(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_qkv"]:
        """Apply ``qkv``."""
        return self.core.qkv(x)  # type: ignore[operator]

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Apply QK-norm."""
        return self.core.q_norm(q), self.core.k_norm(k)  # type: ignore[operator]

    def drop(self, pattern: Tensor) -> Tensor:
        """Apply attention dropout."""
        return self.core.attn_drop(pattern)  # type: ignore[operator]

    def project_out(self, z: Float[Tensor, "batch token head d_head"]) -> Float[Tensor, "batch token d_model"]:
        """Apply the output projection."""
        return self.core.proj_drop(self.core.proj(z.flatten(2)))  # type: ignore[operator]


class TimmPlainAttention(TimmPackedAttention):
    """An attention module of timm's with nothing between mixing and projection."""

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries, keys and values."""
        q, k, v = self.project_in(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def finish_heads(
        self, z: Float[Tensor, "batch token head d_head"], x: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch token head d_head"]:
        """Return the heads' outputs as they are."""
        return z


class TimmAttention(TimmPlainAttention):
    """timm's ``Attention``, with its QK-norm, inner norm and gate where present."""

    def finish_heads(
        self, z: Float[Tensor, "batch token head d_head"], x: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch token head d_head"]:
        """Apply the inner norm, then the gate."""
        gate = self.core.gate
        if gate is None and type(self.core.norm) is nn.Identity:
            return z
        z = self.core.norm(z.flatten(2))  # type: ignore[operator]
        if gate is not None:
            z = z * gate(x).sigmoid()  # type: ignore[operator]
        return z.unflatten(-1, (self.heads, -1))


class ThreeBiases(TimmPackedAttention):
    """The bias of ``qkv`` as EVA and BEiT have it: a parameter for queries, one for values, a constant for keys."""

    @property
    def packed_in(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of ``qkv``."""
        core = self.core
        parts = (core.q_bias, core.k_bias, core.v_bias)
        return core.qkv.weight, None if core.q_bias is None else torch.cat(parts)  # type: ignore[union-attr, arg-type, return-value]

    def project_in(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_qkv"]:
        """Apply ``qkv``, with the bias within the product or added to it, as the library does."""
        weight, bias = self.packed_in
        if bias is None:
            return super().project_in(x)
        return super().project_in(x) + bias if self.core.qkv_bias_separate else functional.linear(x, weight, bias)


class TimmDiffAttention(TimmPackedAttention):
    """timm's ``DiffAttention``: two patterns a head, the second subtracted from the first λ times.

    ``hook_q``, ``hook_k`` and ``hook_attn_scores`` have two heads for each of ``hook_v`` and ``hook_z``;
    ``hook_pattern`` is the difference, which the values are mixed by.
    """

    q_heads_per_head = 2

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries, keys and values."""
        q, k, v = self.core.qkv(x).chunk(3, dim=2)  # type: ignore[operator]
        return (
            q.unflatten(-1, (self.q_heads, -1)).transpose(1, 2),
            k.unflatten(-1, (self.q_heads, -1)).transpose(1, 2),
            v.unflatten(-1, (self.heads, -1)).transpose(1, 2),
        )

    def mix(
        self,
        q: Float[Tensor, "batch q_head query d_qk"],
        k: Float[Tensor, "batch q_head key d_qk"],
        v: Float[Tensor, "batch head key d_head"],
    ) -> Float[Tensor, "batch head query d_head"]:
        """Mix values by the difference of the two patterns, then apply each head's norm and constant scale."""
        return differential_mix(self, self.core, q, k, v)

    def finish_heads(
        self, z: Float[Tensor, "batch token head d_head"], x: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch token head d_head"]:
        """Apply the inner norm."""
        if type(self.core.norm) is nn.Identity:
            return z
        return self.core.norm(z.flatten(2)).unflatten(-1, (self.heads, -1))  # type: ignore[operator]
