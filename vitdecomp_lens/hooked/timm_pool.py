"""timm's attention pools with hook points."""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.hooked.attention import Heads, HookedHeads
from vitdecomp_lens.hooked.hook_points import CopyingHookPoint, OutputTap, any_hooked, fire
from vitdecomp_lens.hooked.mlp import HookedMLP, bias_or_zeros
from vitdecomp_lens.hooked.norms import hooked_norm
from vitdecomp_lens.hooked.packed import by_head


def pool_tokens(x: Float[Tensor, "batch token d_model"], how: str) -> Tensor:
    """Take the first token, the mean, or all tokens, as timm's attention pools do."""
    return {"token": lambda: x[:, 0], "avg": lambda: x.mean(1)}.get(how, lambda: x)()


class LatentPool(HookedHeads):
    """timm's ``AttentionPoolLatent``: learned queries attend to the tokens, then an MLP (SigLIP's pool).

    ``hook_attn_out`` is the projected mixture, ``hook_mlp_out`` what the MLP adds to it.

    Args:
        core: The (cloned) pool.
        mlp: Its hooked MLP, if it has one.
    """

    hook_attn_out: HookPoint
    hook_mlp_out: HookPoint

    def __init__(self, core: Any, mlp: HookedMLP | None) -> None:
        super().__init__()
        # The query is a view of a parameter, which a hook must not write into.
        self.hook_q = CopyingHookPoint()
        self._points = (self.hook_q, *self._points[1:])
        self.hook_attn_out = HookPoint()
        core.proj_drop.register_forward_hook(OutputTap(self.hook_attn_out))
        if mlp is not None:
            core.norm = self.ln = hooked_norm(core.norm)
            self.mlp = mlp
            self.hook_mlp_out = HookPoint()
            core.mlp.register_forward_hook(OutputTap(self.hook_mlp_out))
        self.core: Any = core
        core.__dict__["forward"] = self.run

    @property
    def fused(self) -> bool:
        """Whether the library would use a fused attention kernel."""
        return bool(self.core.fused_attn)

    @property
    def scale(self) -> float:
        """What dot products are multiplied with."""
        return float(self.core.scale)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:  # noqa: N802
        """Value weights."""
        return by_head(self.core.kv.weight.chunk(2)[1], self.core.num_heads)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:  # noqa: N802
        """Value bias."""
        return bias_or_zeros(self.core.kv).chunk(2)[1].unflatten(0, (self.core.num_heads, -1))

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:  # noqa: N802
        """Output weights."""
        return self.core.proj.weight.T.unflatten(0, (self.core.num_heads, -1))

    @property
    def b_O(self) -> Float[Tensor, "d_model"]:  # noqa: N802
        """Output bias."""
        return bias_or_zeros(self.core.proj)

    def forward(self, x: Float[Tensor, "batch token d_model"]) -> Tensor:
        """Pool the tokens."""
        pooled: Tensor = self.core(x)
        return pooled

    def run(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Stand in for the library's ``forward``: the library's own while no hook of the heads is in use."""
        core = self.core
        if attn_mask is not None or not any_hooked(self._points):
            pooled: Tensor = type(core).forward(core, x, attn_mask)
            return pooled
        z = fire(self.hook_z, self.mix_hooked(*self.project(x)))
        out = core.proj_drop(core.proj(z.flatten(2)))
        if core.mlp is not None:
            out = out + core.mlp(core.norm(out))
        return pool_tokens(out, core.pool)

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries from the latent tokens, keys and values from the image's."""
        core = self.core
        if core.pos_embed is not None:
            x = x + core.pos_embed.unsqueeze(0).to(x.dtype)
        q = core.q(core.latent.expand(x.shape[0], -1, -1)).unflatten(-1, (core.num_heads, -1)).transpose(1, 2)
        k, v = core.kv(x).unflatten(-1, (2, core.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return core.q_norm(q), core.k_norm(k), v


class RefiningPool(HookedHeads):
    """timm's ``AttentionPoolPrr``: the tokens attend to each other without weights, then one is taken.

    Queries, keys and values are the same tensor, which each hook gets a copy of.

    Args:
        core: The (cloned) pool.
    """

    def __init__(self, core: Any) -> None:
        super().__init__()
        for name in ("hook_q", "hook_k", "hook_v"):
            setattr(self, name, CopyingHookPoint())
        self._points = tuple(module for module in self.children() if isinstance(module, HookPoint))
        self.core: Any = core
        core.__dict__["forward"] = self.run

    @property
    def fused(self) -> bool:
        """Whether the library would use a fused attention kernel."""
        return bool(self.core.fused_attn)

    @property
    def scale(self) -> float:
        """What dot products are multiplied with."""
        return float(self.core.scale)

    def forward(self, x: Float[Tensor, "batch token d_model"]) -> Tensor:
        """Pool the tokens."""
        pooled: Tensor = self.core(x)
        return pooled

    def run(self, x: Tensor) -> Tensor:
        """Stand in for the library's ``forward``: the library's own while no hook is in use."""
        core = self.core
        if not any_hooked(self._points):
            pooled: Tensor = type(core).forward(core, x)
            return pooled
        heads = core.pre_norm(x).unflatten(-1, (core.num_heads, -1)).transpose(1, 2)
        z = fire(self.hook_z, self.mix_hooked(heads, heads, heads))
        return pool_tokens(core.post_norm(z.flatten(2)), core.pool)
