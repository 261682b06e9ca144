"""open_clip's attention modules, torch's ``MultiheadAttention`` among them, with hook points."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.errors import UnsupportedModelError
from vitdecomp_lens.hooked.attention import Heads, HookedHeads, Stream
from vitdecomp_lens.hooked.hook_points import any_hooked, fire
from vitdecomp_lens.hooked.packed import PackedAttention, by_head, linear_out
from vitdecomp_lens.hooked.tail import Tail


class TorchAttention(PackedAttention):
    """torch's ``MultiheadAttention`` as self-attention.

    torch computes it in two ways, and so does this: with gradients by fused attention on tokens before
    batch; without, on a CPU, by the operations of its native kernel in their order, so that the output is
    the same bit for bit.
    """

    def __init__(self, core: Any, *, tail: Tail | None = None) -> None:
        if core.bias_k is not None or core.add_zero_attn or not core._qkv_same_embed_dim:
            raise UnsupportedModelError(
                "A MultiheadAttention with bias_k, add_zero_attn or kdim/vdim other than embed_dim cannot be hooked. "
                "vitdecomp_lens.trace works for any module."
            )
        super().__init__(core, tail=tail)
        self._native = False

    @property
    def fused(self) -> bool:
        """Torch uses a fused kernel, but for the native one."""
        return not self._native

    @property
    def scale(self) -> float:
        """What dot products are multiplied with."""
        return float(self.core.head_dim) ** -0.5  # type: ignore[arg-type]

    @property
    def packed_in(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the input projection."""
        return self.core.in_proj_weight, self.core.in_proj_bias  # type: ignore[return-value]

    @property
    def projection_out(self) -> tuple[Float[Tensor, "d_model d_attn"], Float[Tensor, "d_model"] | None]:
        """Weight and bias of ``out_proj``."""
        return linear_out(self.core.out_proj)  # type: ignore[arg-type]

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        """None: torch reads the weights of ``out_proj`` and does not call it."""
        return ()

    def call_core(self, x: Tensor) -> Tensor:
        """Call the library's module as self-attention."""
        out: Tensor = self.core(x, x, x, need_weights=False)[0]
        return out

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the library's ``forward``, which returns a pair."""
        out = super().run(x, *args, **kwargs)
        return out if isinstance(out, tuple) else (out, None)

    def takes_native_path(self, x: Tensor) -> bool:
        """Whether torch would run its native kernel on ``x`` on a CPU."""
        core: Any = self.core
        weights = (core.in_proj_weight, core.in_proj_bias, core.out_proj.weight, core.out_proj.bias)
        return (
            x.device.type == "cpu"
            and torch.backends.mha.get_fastpath_enabled()
            and core.batch_first
            and not core.training
            and core.num_heads % 2 == 0
            and core.in_proj_bias is not None
            and x.dtype == core.in_proj_weight.dtype
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)))
        )

    def project(self, x: Stream) -> Heads:
        """Queries, keys and values."""
        core: Any = self.core
        self._native = self.takes_native_path(x)
        if self._native:
            packed = functional.linear(x, core.in_proj_weight) + core.in_proj_bias
            q, k, v = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        tokens_first = x.transpose(0, 1) if core.batch_first else x
        packed = functional.linear(tokens_first, core.in_proj_weight, core.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 1, 3, 0, 4).unbind(0)
        return q, k, v

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """There is no QK-norm."""
        return q, k

    def finish_heads(self, z: Float[Tensor, "batch query head d_head"], x: Stream) -> Tensor:
        """Nothing stands between mixing and projection."""
        return z

    def project_out(self, z: Float[Tensor, "batch token head d_head"]) -> Stream:
        """Apply the output projection, in the layout of the library."""
        out: Any = self.core.out_proj
        if self._native:
            return functional.linear(z.flatten(2), out.weight, out.bias)
        tokens_first = functional.linear(z.transpose(0, 1).flatten(2), out.weight, out.bias)
        return tokens_first.transpose(0, 1) if self.core.batch_first else tokens_first

    def branch(self, z: Float[Tensor, "batch token head d_head"]) -> Stream:
        """Return what the block adds to the stream, in the layout of the library."""
        out = super().branch(z)
        swapped = "hook_result" in self._modules and any_hooked((self.hook_result,)) and not self.core.batch_first
        return out.transpose(0, 1) if swapped else out


class OpenClipAttention(PackedAttention):
    """open_clip's own ``Attention``: QK-norm or scaled cosine, head scale, inner norm."""

    @property
    def fused(self) -> bool:
        """Whether the library would use a fused attention kernel."""
        return bool(self.core.use_fsdpa) and self.core.logit_scale is None

    @property
    def scale(self) -> float:
        """What dot products are multiplied with."""
        return float(self.core.scale)  # type: ignore[arg-type]

    @property
    def packed_in(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the input projection."""
        return self.core.in_proj_weight, self.core.in_proj_bias  # type: ignore[return-value]

    @property
    def projection_out(self) -> tuple[Float[Tensor, "d_model d_attn"], Float[Tensor, "d_model"] | None]:
        """Weight and bias of ``out_proj``."""
        return linear_out(self.core.out_proj)  # type: ignore[arg-type]

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        """``out_proj`` and its dropout."""
        return self.core.out_proj, self.core.out_drop  # type: ignore[return-value]

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries, keys and values."""
        thirds = functional.linear(x, *self.packed_in).chunk(3, dim=-1)
        q, k, v = (third.unflatten(-1, (self.heads, -1)).transpose(1, 2) for third in thirds)
        return q, k, v

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Apply QK-norm; for cosine attention, scale to unit length."""
        core: Any = self.core
        if core.logit_scale is not None:
            return functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        return core.ln_q(q), core.ln_k(k)

    def score(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
        """Scaled dot products, or cosines times a learned scale."""
        core: Any = self.core
        if core.logit_scale is None:
            return super().score(q, k)
        return (q @ k.transpose(-1, -2)) * torch.clamp(core.logit_scale, max=core.logit_scale_max).exp()

    def drop(self, pattern: Tensor) -> Tensor:
        """Apply attention dropout."""
        return self.core.attn_drop(pattern)  # type: ignore[operator]

    def finish_heads(
        self, z: Float[Tensor, "batch query head d_head"], x: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch query head d_head"]:
        """Apply the head scale, then the inner norm."""
        core: Any = self.core
        if core.head_scale is not None:
            z = z * core.head_scale.squeeze(-1)
        if type(core.ln_inner) is nn.Identity:
            return z
        return core.ln_inner(z.flatten(2)).unflatten(-1, (self.heads, -1))

    def project_out(self, z: Float[Tensor, "batch token head d_head"]) -> Float[Tensor, "batch token d_model"]:
        """Apply the output projection."""
        return self.core.out_drop(self.core.out_proj(z.flatten(2)))  # type: ignore[operator]


class Pooler(HookedHeads):
    """open_clip's ``AttentionalPooler``: learned queries attend to the normed tokens.

    Args:
        core: The (cloned) pooler.
    """

    hook_attn_out: HookPoint

    def __init__(self, core: Any) -> None:
        super().__init__()
        self.hook_attn_out = HookPoint()
        self.core: Any = core
        core.__dict__["forward"] = self.run

    @property
    def fused(self) -> bool:
        """Torch uses a fused kernel for cross-attention."""
        return True

    @property
    def scale(self) -> float:
        """What dot products are multiplied with."""
        return float(self.core.attn.head_dim) ** -0.5

    @property
    def weights_in(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value weights, ``out d_in`` each."""
        attn = self.core.attn
        if attn._qkv_same_embed_dim:
            q, k, v = attn.in_proj_weight.chunk(3)
            return q, k, v
        return attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:  # noqa: N802
        """Value weights."""
        return by_head(self.weights_in[2], self.core.attn.num_heads)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_rep"]:  # noqa: N802
        """Output weights."""
        return self.core.attn.out_proj.weight.T.unflatten(0, (self.core.attn.num_heads, -1))

    def forward(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch query d_rep"]:
        """Pool the tokens."""
        pooled: Tensor = self.core(x)
        return pooled

    def run(self, x: Tensor) -> Tensor:
        """Stand in for the library's ``forward``: the library's own while no hook of the heads is in use."""
        core = self.core
        if not any_hooked(self._points):
            return fire(self.hook_attn_out, type(core).forward(core, x))
        z = fire(self.hook_z, self.mix_hooked(*self.project(core.ln_k(x))))
        out = functional.linear(z.transpose(0, 1).flatten(2), core.attn.out_proj.weight, core.attn.out_proj.bias)
        return fire(self.hook_attn_out, out.transpose(0, 1))

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries from the learned ones, keys and values from the tokens; tokens run before batch, as in torch."""
        core, attn = self.core, self.core.attn
        queries = core.ln_q(core.query).unsqueeze(0).expand(x.shape[0], -1, -1).transpose(0, 1)
        tokens = x.transpose(0, 1)
        b_q, b_k, b_v = attn.in_proj_bias.chunk(3)
        w_q, w_k, w_v = self.weights_in
        q = functional.linear(queries, w_q, b_q)
        if attn._qkv_same_embed_dim:
            d_model = attn.embed_dim
            packed = functional.linear(tokens, attn.in_proj_weight[d_model:], attn.in_proj_bias[d_model:])
            k, v = packed.chunk(2, dim=-1)
        else:
            k, v = functional.linear(tokens, w_k, b_k), functional.linear(tokens, w_v, b_v)
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).permute(1, 2, 0, 3) for part in (q, k, v))
        return q, k, v
