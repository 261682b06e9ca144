"""The configuration that TransformerLens' tools read, filled in from the live modules."""

from collections.abc import Sequence
from typing import Any

from transformer_lens.config import TransformerBridgeConfig

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked.blocks import HookedBlock
from vitdecomp_lens.hooked.mlp import GatedMLP
from vitdecomp_lens.hooked.norms import HookedNorm
from vitdecomp_lens.hooked.registry import Tower


class HookedViTConfig(TransformerBridgeConfig):
    """TransformerLens' configuration of a vision transformer; of one with stages, that of the first block.

    Attributes:
        head_counts: How many heads blocks have, where not all have as many.
    """

    head_counts: tuple[int, ...] = ()

    @property
    def n_heads(self) -> int:
        """Number of heads of every block.

        Raises:
            InputError: If not all blocks have as many: who asks would leave out heads.
        """
        if self.head_counts:
            raise InputError(
                f"Blocks of this model have {', '.join(map(str, self.head_counts))} heads, so that there is no one "
                f"n_heads. Of each: model.blocks[i].attn.heads. For TransformerLens' patching give the heads as "
                f"index_df=, a table of layers and heads; decompose(model, images, by='head') has them all."
            )
        return int(self.__dict__["n_heads"])

    @n_heads.setter
    def n_heads(self, heads: int) -> None:
        self.__dict__["n_heads"] = heads


def read_config(tower: Tower, name: str) -> HookedViTConfig:
    """Read a configuration off a hooked tower.

    Args:
        tower: The hooked tower.
        name: The model's name.
    """
    first = next(block for block in tower.blocks if block.attentions)
    attn = next(iter(first.attentions.values()))
    mlp = next(iter(first.mlps_by_name.values()), None)
    norms = [module for block in tower.blocks for module in block.modules() if isinstance(module, HookedNorm)]
    size = tower.image.size
    rows, columns = tower.patch_grid(*size) if size else (0, 0)
    known: dict[str, Any] = {
        "d_mlp": None if mlp is None else mlp.d_mlp,
        "n_key_value_heads": None,
        "positional_embedding_type": "rotary" if attn.rotary else "standard",
    }
    config = HookedViTConfig(
        d_model=attn.W_O.shape[2],
        d_head=attn.W_O.shape[1],
        n_layers=len(tower.blocks),
        n_heads=attn.heads,
        n_ctx=len(tower.prefix) + rows * columns,
        d_vocab=-1 if tower.weights_out is None else tower.weights_out()[0].shape[1],
        model_name=name,
        architecture=type(tower.module).__name__,
        act_fn=_activation(first),
        eps=norms[0].eps if norms else 0.0,
        normalization_type=_normalization(norms),
        attention_dir="bidirectional",
        is_visual_model=True,
        gated_mlp=isinstance(mlp, GatedMLP),
        dtype=attn.W_O.dtype,
        default_prepend_bos=False,
        **known,
    )
    counts = [attn.heads for block in tower.blocks for attn in block.attentions.values()]
    config.head_counts = tuple(sorted(set(counts))) if len(set(counts)) > 1 else ()
    config.parallel_attn_mlp = "hook_resid_mid" not in first._modules
    return config


def _normalization(norms: Sequence[HookedNorm]) -> str | None:
    if not norms:
        return None
    return "LN" if norms[0].centred else "RMS"


def _activation(block: HookedBlock) -> str:
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in ("act", "mlp_act", "gelu"):
            return type(module).__name__.lower()
    return "gelu"
