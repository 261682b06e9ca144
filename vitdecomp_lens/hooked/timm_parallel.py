"""timm's blocks whose attention and MLP run side by side."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.hooked.attention import Heads, HookedAttention
from vitdecomp_lens.hooked.blocks import HookedBlock, not_one
from vitdecomp_lens.hooked.hook_points import any_hooked, fire
from vitdecomp_lens.hooked.mlp import HookedMLP, bias_or_zeros
from vitdecomp_lens.hooked.norms import hooked_norm
from vitdecomp_lens.hooked.packed import linear_out
from vitdecomp_lens.hooked.tail import Tail, check_plain
from vitdecomp_lens.hooked.timm_attention import TimmPackedAttention, differential_mix
from vitdecomp_lens.points import LazyHookPoint


class ScalingAttention(TimmPackedAttention):
    """The attention inside timm's ``ParallelScalingBlock``, whose projections it shares with the MLP."""

    def stand_in_for(self, core: nn.Module) -> None:
        """Keep the block at hand; its forward is the hooked block's affair."""
        self.__dict__["core"] = core

    @property
    def packed_in(self) -> tuple[Tensor, Tensor | None]:
        """The attention's part of the input projection."""
        core: Any = self.core
        first, bias = core.in_split[0], core.in_proj.bias
        return core.in_proj.weight[first:], None if bias is None else bias[first:]

    @property
    def projection_out(self) -> tuple[Float[Tensor, "d_model d_attn"], Float[Tensor, "d_model"] | None]:
        """The attention's part of the output projection.

        Where one bias serves both branches, the MLP has it and the attention has none.
        """
        core: Any = self.core
        if core.out_proj is None:
            return linear_out(core.attn_out_proj)
        weight = core.out_proj.weight
        return weight[:, : core.in_split[1]], None

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        """The output projection: the attention's own, or the one that both branches share."""
        return (self.core.attn_out_proj if self.core.out_proj is None else self.core.out_proj,)  # type: ignore[return-value]

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Apply QK-norm, on tokens before heads as the library does."""
        core: Any = self.core
        return core.q_norm(q.transpose(1, 2)).transpose(1, 2), core.k_norm(k.transpose(1, 2)).transpose(1, 2)

    def split_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        """Queries, keys and values by head, from projections ``batch token d_model``."""
        counts = (self.q_heads, self.q_heads, self.heads)
        q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in zip((q, k, v), counts, strict=True))
        return q, k, v

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries, keys and values."""
        _, q, k, v = self.core.in_proj(x).split(self.core.in_split, dim=-1)  # type: ignore[operator]
        return self.split_heads(q, k, v)

    def finish_heads(
        self, z: Float[Tensor, "batch query head d_head"], x: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch query head d_head"]:
        """Nothing stands between mixing and projection."""
        return z

    def project_out(self, z: Float[Tensor, "batch token head d_head"]) -> Float[Tensor, "batch token d_model"]:
        """Apply the attention's part of the output projection."""
        return functional.linear(z.flatten(2), *self.projection_out)


class DiffScalingAttention(ScalingAttention):
    """The differential attention inside timm's ``DiffParallelScalingBlock``."""

    q_heads_per_head = 2

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Apply QK-norm."""
        return self.core.q_norm(q), self.core.k_norm(k)  # type: ignore[operator]

    def mix(
        self,
        q: Float[Tensor, "batch q_head query d_qk"],
        k: Float[Tensor, "batch q_head key d_qk"],
        v: Float[Tensor, "batch head key d_head"],
    ) -> Float[Tensor, "batch head query d_head"]:
        """Mix values by the difference of the two patterns, then apply each head's norm and constant scale."""
        return differential_mix(self, self.core, q, k, v)


class ScalingMLP(HookedMLP):
    """The MLP inside timm's parallel scaling blocks, whose projections it shares with the attention."""

    def __init__(self, core: nn.Module, *, tail: Tail) -> None:
        super().__init__(tail=tail)
        self.__dict__["core"] = core

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:  # noqa: N802
        """First weights."""
        core: Any = self.core
        return core.in_proj.weight[: core.in_split[0]].T

    @property
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        """First bias."""
        core: Any = self.core
        return core.in_proj.bias[: core.in_split[0]] if core.mlp_bias is None else core.mlp_bias

    @property
    def weight_out(self) -> Float[Tensor, "d_model d_mlp"]:
        """The MLP's part of the output projection."""
        core: Any = self.core
        if core.out_proj is None:
            return core.mlp_out_proj.weight
        return core.out_proj.weight[:, core.in_split[1] :]

    @property
    def bias_out(self) -> Float[Tensor, "d_model"]:
        """The MLP's output bias, which serves both branches where the projection is fused."""
        core: Any = self.core
        return bias_or_zeros(core.mlp_out_proj if core.out_proj is None else core.out_proj)

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:  # noqa: N802
        """Last weights, with LayerScale folded in."""
        return self.tail.fold(self.weight_out.T)

    @property
    def b_out(self) -> Float[Tensor, "d_model"]:
        """Last bias, with LayerScale folded in."""
        return self.tail.fold(self.bias_out)


class ScalingBlock(HookedBlock):
    """timm's ``ParallelScalingBlock`` and ``DiffParallelScalingBlock``: both branches in one pair of projections.

    ``hook_attn_out`` and ``hook_mlp_out`` are lazy: the library computes only their sum. A fused output bias
    belongs to the MLP. There is no ``hook_resid_mid``.

    Args:
        core: The (cloned) block of the library.
        attention: The class of its attention.
    """

    def __init__(self, core: Any, attention: type[ScalingAttention]) -> None:
        super().__init__(core)
        self.ln1 = hooked_norm(core.in_norm)
        core.in_norm = self.ln1
        self.attn = attention(core, tail=Tail(core.ls))
        self.mlp = ScalingMLP(core, tail=Tail(core.ls))
        self.hook_attn_out = LazyHookPoint()
        self.hook_mlp_out = LazyHookPoint()
        self.hook_resid_post = HookPoint()
        self.core: Any = core

    @property
    def attentions(self) -> dict[str, HookedAttention]:
        """The attention."""
        return {"attn": self.attn}

    @property
    def mlps_by_name(self) -> dict[str, HookedMLP]:
        """The MLP."""
        return {"mlp": self.mlp}

    def _apart(self) -> tuple[HookPoint, ...]:
        """The hook points for which the branches are computed apart."""
        result = self.attn._modules.get("hook_result")
        extra = () if result is None else (result,)
        return (self.hook_attn_out, self.hook_mlp_out, *extra)

    def add_branches(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        """Add both branches."""
        core, apart = self.core, any_hooked(self._apart())
        if not apart and not any_hooked((*self.attn._points, self.mlp.hook_pre, self.mlp.hook_post)):
            added: Tensor = type(core).forward(core, x)
            return added
        normed = self.ln1(x)
        neurons, q, k, v = core.in_proj(normed).split(core.in_split, dim=-1)
        if core.mlp_bias is not None:
            neurons = neurons + core.mlp_bias
        heads = self.attn.split_heads(q, k, v)
        z = fire(self.attn.hook_z, self.attn.mix_hooked(*self.attn.norm_qk(*heads[:2]), heads[2]))
        post = fire(self.mlp.hook_post, core.mlp_drop(core.mlp_act(fire(self.mlp.hook_pre, neurons))))
        if apart:
            # The MLP's own projection too is used without being called.
            layers = (core.out_proj,) if core.out_proj is not None else (core.attn_out_proj, core.mlp_out_proj)
            check_plain("Either branch of a parallel block", layers, around=(core.ls,))
            attn_out = fire(self.hook_attn_out, core.drop_path(self.attn.branch(z)))
            mlp_out = functional.linear(post, self.mlp.weight_out, self.mlp.bias_out)
            return x + attn_out + fire(self.hook_mlp_out, core.drop_path(core.ls(mlp_out)))
        if core.out_proj is None:
            y = core.attn_out_proj(z.flatten(2)) + core.mlp_out_proj(post)
        else:
            y = core.out_proj(torch.cat((z.flatten(2), post), dim=-1))
        return x + core.drop_path(core.ls(y))


class ThingsBlock(HookedBlock):
    """timm's ``ParallelThingsBlock``: several attentions side by side, then several MLPs.

    ``hook_attn_out`` and ``hook_mlp_out`` are the sums over what stands side by side. The parts are
    ``attns.{j}`` and ``mlps.{j}``, their norms ``ln1s.{j}`` and ``ln2s.{j}``.

    Args:
        core: The (cloned) block of the library.
        attentions: The hooked attentions, LayerScale in their tails.
        mlps: The hooked MLPs, likewise.
    """

    hook_resid_mid: HookPoint
    attn = not_one("several attentions")
    mlp = not_one("several MLPs")

    def __init__(self, core: Any, attentions: list[HookedAttention], mlps: list[HookedMLP]) -> None:
        super().__init__(core)
        self.ln1s = self._take_over(core.attns, "attn", attentions)
        self.attns = nn.ModuleList(attentions)
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.ln2s = self._take_over(core.ffns, "mlp", mlps)
        self.mlps = nn.ModuleList(mlps)
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()
        self.core: Any = core
        self._attentions = tuple(attentions)
        self._mlps = tuple(mlps)

    @staticmethod
    def _take_over(branches: Any, name: str, hooked: list[Any]) -> nn.ModuleList:
        """Put hooked parts and norms in the library's sequences; LayerScale is in the parts' tails already."""
        norms = []
        for branch, part in zip(branches, hooked, strict=True):
            branch.norm = hooked_norm(branch.norm)
            setattr(branch, name, part)
            branch.ls = nn.Identity()
            norms.append(branch.norm)
        return nn.ModuleList(norms)

    @property
    def attentions(self) -> dict[str, HookedAttention]:
        """The attentions."""
        return {f"attns.{number}": attn for number, attn in enumerate(self._attentions)}

    @property
    def mlps_by_name(self) -> dict[str, HookedMLP]:
        """The MLPs."""
        return {f"mlps.{number}": mlp for number, mlp in enumerate(self._mlps)}

    def add_branches(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        """Add all attentions, then all MLPs."""
        attn_out = torch.stack([branch(x) for branch in self.core.attns]).sum(dim=0)
        x = fire(self.hook_resid_mid, x + fire(self.hook_attn_out, attn_out))
        return x + fire(self.hook_mlp_out, torch.stack([branch(x) for branch in self.core.ffns]).sum(dim=0))
