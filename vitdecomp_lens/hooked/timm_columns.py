"""What timm's columns share: patches with prefix tokens and positions, equal blocks, a read-out."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from timm.layers import AttentionPoolLatent, AttentionPoolPrr, GluMlp, Mlp, SwiGLU, resample_abs_pos_embed
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.hooked.attention import HookedAttention
from vitdecomp_lens.hooked.blocks import HookedBlock, PostNormBlock, TwoBranchBlock
from vitdecomp_lens.hooked.hook_points import CopyingHookPoint, GridTap, OutputTap, fire
from vitdecomp_lens.hooked.mlp import GatedMLP, HookedMLP, PlainMLP
from vitdecomp_lens.hooked.norms import hooked_norm
from vitdecomp_lens.hooked.registry import ImageSpec, Tower, check_methods, find_part
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_adapter import Classifier, TimmAdapter
from vitdecomp_lens.hooked.timm_pool import LatentPool, RefiningPool

PREFIX_PARAMETERS = ("cls_token", "dist_token", "reg_token")

# Blocks ------------------------------------------------------------------------------------------------------------


def _mlp(core: nn.Module, tail: Tail) -> HookedMLP:
    return PlainMLP(core, core.fc1, core.fc2, tail=tail)  # type: ignore[arg-type]


def _packed_glu(core: nn.Module, tail: Tail) -> HookedMLP:
    return GatedMLP(core, core.fc1, core.fc1, core.fc2, gate_first=not core.gate_last, tail=tail)  # type: ignore[arg-type]


def _swiglu(core: nn.Module, tail: Tail) -> HookedMLP:
    return GatedMLP(core, core.fc1_g, core.fc1_x, core.fc2, tail=tail)  # type: ignore[arg-type]


MLPS: dict[type, Callable[[nn.Module, Tail], HookedMLP]] = {Mlp: _mlp, GluMlp: _packed_glu, SwiGLU: _swiglu}


def hook_mlp(core: nn.Module, tail: Tail) -> HookedMLP:
    """Hook an MLP of timm."""
    return find_part(MLPS, core, "MLP")(core, tail)


def pre_norm_block(core: Any, attn: HookedAttention, mlp_tail: Tail) -> HookedBlock:
    """Hook a block of timm whose norms stand before its branches.

    Args:
        core: The (cloned) block.
        attn: Its hooked attention.
        mlp_tail: What the block does with the MLP's output before adding it.
    """
    return TwoBranchBlock(core, **_branches(core, attn, mlp_tail))


def post_norm_block(core: Any, attn: HookedAttention) -> HookedBlock:
    """Hook a block of timm whose norms stand behind its branches."""
    return PostNormBlock(core, **_branches(core, attn, Tail()))


def _branches(core: Any, attn: HookedAttention, mlp_tail: Tail) -> dict[str, Any]:
    return {
        "ln1": hooked_norm(core.norm1),
        "attn": attn,
        "ln2": hooked_norm(core.norm2),
        "mlp": hook_mlp(core.mlp, mlp_tail),
        "drop_path1": core.drop_path1,
        "drop_path2": core.drop_path2,
    }


# Embedding ---------------------------------------------------------------------------------------------------------


class ColumnEmbedding:
    """Patches become tokens: prefix tokens are put before them, and positions are added.

    Args:
        tower: The cloned model.
        parts: Gets the hook points: ``hook_embed`` sees patches with prefix tokens, before positions;
            ``hook_pos_embed``, where there are positions, what is added to that; ``hook_full_embed`` the sum.
    """

    def __init__(self, tower: Any, parts: dict[str, nn.Module]) -> None:
        self.tower = tower
        self.prefix = tuple(name for name in PREFIX_PARAMETERS if getattr(tower, name, None) is not None)
        has_positions = getattr(tower, "pos_embed", None) is not None
        # What is the very value of the hook before is handed out as a copy.
        parts["hook_embed"] = self.hook_embed = HookPoint() if self.prefix else CopyingHookPoint()
        self.hook_pos_embed: HookPoint | None = None
        if has_positions:
            parts["hook_pos_embed"] = self.hook_pos_embed = CopyingHookPoint()
        parts["hook_full_embed"] = self.hook_full_embed = HookPoint() if has_positions else CopyingHookPoint()
        self.points = tuple(point for point in (self.hook_embed, self.hook_pos_embed) if point is not None)

    @property
    def prefix_names(self) -> tuple[str, ...]:
        """Names of the prefix tokens."""
        registers = getattr(self.tower, "reg_token", None)
        named = {"cls_token": ["CLS"], "dist_token": ["DIST"]}
        named["reg_token"] = [] if registers is None else [f"reg{number}" for number in range(registers.shape[1])]
        return tuple(token for name in self.prefix for token in named[name])

    def join(
        self, x: Float[Tensor, "batch *grid d_model"], *, always_cat: bool = False
    ) -> Float[Tensor, "batch token d_model"]:
        """Put prefix tokens before the patches and add positions, each through its hook.

        Args:
            x: The patches.
            always_cat: Whether the library concatenates where there is nothing to put before: that changes the memory
                layout, and with it the rounding downstream.
        """
        tokens = [getattr(self.tower, name).expand(x.shape[0], -1, -1) for name in self.prefix]
        patches = x.flatten(1, -2)
        embed = fire(self.hook_embed, torch.cat([*tokens, patches], dim=1) if tokens or always_cat else patches)
        if self.hook_pos_embed is None:
            return embed
        # Expanded over the batch, because TransformerLens stacks it with the embedding.
        return embed + fire(self.hook_pos_embed, self.positions(x).expand(x.shape[0], -1, -1))

    def positions(self, x: Float[Tensor, "batch *grid d_model"]) -> Float[Tensor, "1 token d_model"]:
        """Position embeddings of all tokens, zero for prefix tokens that have none."""
        tower = self.tower
        positions: Tensor = tower.pos_embed
        bare_prefix = tower.num_prefix_tokens if getattr(tower, "no_embed_class", False) else 0
        if getattr(tower, "dynamic_img_size", False):
            positions = resample_abs_pos_embed(
                positions,
                new_size=tuple(x.shape[1:3]),
                old_size=tower.patch_embed.grid_size,
                num_prefix_tokens=tower.num_prefix_tokens - bare_prefix,
            )
        if bare_prefix:
            positions = torch.cat([positions.new_zeros(1, bare_prefix, positions.shape[-1]), positions], dim=1)
        return positions


# The whole ---------------------------------------------------------------------------------------------------------


class ColumnAdapter(TimmAdapter):
    """Hooks models with a patch embedding, one column of blocks and a read-out.

    Attributes:
        relied_on: The library's methods that a subclass of the model must not override.
    """

    relied_on: ClassVar[tuple[str, ...]] = ("forward_features", "forward_head")

    @abstractmethod
    def library_class(self, clone: nn.Module) -> type[nn.Module]:
        """Return the library's class that the adapter is written for."""

    @abstractmethod
    def hook_embedding(self, clone: nn.Module, parts: dict[str, nn.Module]) -> ColumnEmbedding:
        """Put hook points between patches and blocks; called when the blocks are hooked."""

    @abstractmethod
    def hook_block(self, clone: nn.Module, core: nn.Module) -> HookedBlock:
        """Hook one block."""

    def hook_representation(self, clone: Any, point: HookPoint) -> None:
        """Put the hook point of the representation where the library has it."""
        clone.head_drop.register_forward_hook(OutputTap(point))

    def hook(self, clone: Any) -> Tower:
        """Put hook points into a cloned model."""
        check_methods(clone, self.library_class(clone), self.relied_on)
        blocks = [self.hook_block(clone, block) for block in clone.blocks]
        for number, block in enumerate(blocks):
            clone.blocks[number] = block
        parts: dict[str, nn.Module] = {"hook_patch_embed": (patch_point := HookPoint())}
        clone.patch_embed.register_forward_hook(GridTap(patch_point))
        embedding = self.hook_embedding(clone, parts)
        _hook_norm(clone, "norm_pre", "ln_pre", parts)
        parts["blocks"] = nn.ModuleList(blocks)
        pooled = _hook_readout(clone, parts)
        parts["hook_representation"] = point = CopyingHookPoint()
        self.hook_representation(clone, point)
        embed = clone.patch_embed
        return Tower(
            module=clone,
            parts=parts,
            blocks=blocks,
            prefix=embedding.prefix_names,
            image=_image_spec(clone),
            patch_grid=PatchGrid(clone),
            patch_size=tuple(embed.feat_ratio(as_scalar=False)),
            weights_out=None if clone.num_classes == 0 else Classifier(*_classifiers(clone)),
            constant_query=isinstance(getattr(clone, "attn_pool", None), LatentPool),
            pooled=pooled,
        )


class PatchGrid:
    """From height and width of an image to rows and columns of patches."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns."""
        embed = self.tower.patch_embed
        if not getattr(self.tower, "dynamic_img_size", False):
            return tuple(embed.grid_size)  # a stem's true output, which its rounded stride may miss
        return tuple(embed.dynamic_feat_size((height, width)))


def _classifiers(clone: Any) -> tuple[nn.Module, ...]:
    return (clone.head, clone.head_dist) if hasattr(clone, "head_dist") else (clone.head,)


def _latent_pool(core: Any) -> LatentPool:
    return LatentPool(core, None if core.mlp is None else hook_mlp(core.mlp, Tail()))


POOLS: dict[type, Callable[[Any], nn.Module]] = {AttentionPoolLatent: _latent_pool, AttentionPoolPrr: RefiningPool}


def _hook_norm(clone: Any, name: str, part: str, parts: dict[str, nn.Module]) -> None:
    core = getattr(clone, name, None)
    if core is not None and (norm := hooked_norm(core)) is not core:
        parts[part] = norm
        setattr(clone, name, norm)


def _hook_readout(clone: Any, parts: dict[str, nn.Module]) -> bool:
    """Hook the final norm and the pool; return whether that norm acts on pooled tokens."""
    pooled = type(clone.norm) is nn.Identity
    _hook_norm(clone, "fc_norm" if pooled else "norm", "ln_final", parts)
    if getattr(clone, "attn_pool", None) is not None:
        parts["attn_pool"] = clone.attn_pool = find_part(POOLS, clone.attn_pool, "attention pool")(clone.attn_pool)
    if not pooled:
        _hook_norm(clone, "fc_norm", "ln_pooled", parts)
    return pooled


def _image_spec(clone: Any) -> ImageSpec:
    embed = clone.patch_embed
    if not getattr(clone, "dynamic_img_size", False):
        return ImageSpec(clone.in_chans, tuple(embed.img_size))
    if not getattr(embed, "dynamic_img_pad", False):
        return ImageSpec(clone.in_chans, None, tuple(embed.feat_ratio(as_scalar=False)))
    # What is padded are the features of a stem, if there is one.
    return ImageSpec(clone.in_chans, None, tuple(getattr(embed, "feature_ratio", (1, 1))))
