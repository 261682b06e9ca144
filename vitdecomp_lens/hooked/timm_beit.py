"""timm's ``Beit``: BEiT and BEiTv2, whose attention scores have a bias by relative position."""

from typing import Any

from jaxtyping import Float
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from vitdecomp_lens.hooked.attention import HookedAttention
from vitdecomp_lens.hooked.blocks import HookedBlock
from vitdecomp_lens.hooked.hook_points import OutputTap, any_hooked
from vitdecomp_lens.hooked.registry import find_part, register_adapter
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_attention import ThreeBiases, TimmPlainAttention
from vitdecomp_lens.hooked.timm_columns import ColumnAdapter, ColumnEmbedding, pre_norm_block


class BeitAttention(ThreeBiases, TimmPlainAttention):
    """BEiT's ``Attention``: its own bias by relative position, one that all blocks share, or neither."""

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as they are."""
        return q, k

    def score_bias(self) -> Float[Tensor, "*#batch head query key"] | None:
        """What is added to the scores."""
        core: Any = self.core
        shared: Tensor | None = self.context.get("shared_rel_pos_bias")
        if core.relative_position_bias_table is None:
            return shared
        own: Tensor = core._get_rel_pos_bias()
        return own if shared is None else own + shared


def _block(core: Any) -> HookedBlock:
    attn: HookedAttention = find_part({Attention: BeitAttention}, core.attn, "attention")(
        core.attn, tail=Tail.of_parameter(core, "gamma_1")
    )
    return pre_norm_block(core, attn, Tail.of_parameter(core, "gamma_2"))


class BeitEmbedding(ColumnEmbedding):
    """Embeds anew while its hook points are in use, in front of the dropout that the library's sum enters.

    The library embeds within ``forward_features``: of that only the patches on their way in can be had.
    """

    _patches: Tensor | None = None

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Keep the patches, as a forward hook of the patch embedding."""
        self._patches = output if any_hooked(self.points) else None

    def replace(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Put the hooked sum in place of the library's, as a forward pre-hook of the dropout after it."""
        patches, self._patches = self._patches, None
        return None if patches is None else (self.join(patches),)


@register_adapter("timm.models.beit:Beit")
class TimmBeitAdapter(ColumnAdapter):
    """Hooks timm's BEiT models."""

    def library_class(self, clone: nn.Module) -> type[nn.Module]:
        """Return timm's class."""
        return Beit

    def hook_embedding(self, clone: Any, parts: dict[str, nn.Module]) -> ColumnEmbedding:
        """Embed in front of ``pos_drop`` while a hook wants to see how."""
        embedding = BeitEmbedding(clone, parts)
        clone.patch_embed.register_forward_hook(embedding.keep)
        clone.pos_drop.register_forward_pre_hook(embedding.replace, prepend=True)
        clone.pos_drop.register_forward_hook(OutputTap(embedding.hook_full_embed))
        return embedding

    def hook_block(self, clone: nn.Module, core: nn.Module) -> HookedBlock:
        """Hook one block."""
        block: HookedBlock = find_part({Block: _block}, core, "block")(core)
        return block
