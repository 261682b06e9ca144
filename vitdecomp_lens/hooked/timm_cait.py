"""timm's ``Cait``: patches attend to each other with talking heads, then a class token attends to the patches.

What ``Cait`` shares with ``Xcit``, whose last blocks are of the same kind, stands here too: class attention, its
blocks, the tokens at each of its hooks, and the adapter's frame.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from timm.models.cait import Cait, ClassAttn, LayerScaleBlock, LayerScaleBlockClassAttn, TalkingHeadAttn
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.hooked.attention import Heads, HookedAttention
from vitdecomp_lens.hooked.blocks import SPLIT_HOOKS, HookedBlock, TwoBranchBlock
from vitdecomp_lens.hooked.hook_points import CopyingHookPoint, GridTap, OutputTap, any_hooked, fire
from vitdecomp_lens.hooked.norms import hooked_norm
from vitdecomp_lens.hooked.packed import by_head
from vitdecomp_lens.hooked.registry import ImageSpec, Tower, check_methods, find_part, register_adapter
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_adapter import Classifier, TimmAdapter
from vitdecomp_lens.hooked.timm_attention import TimmPlainAttention
from vitdecomp_lens.hooked.timm_columns import PatchGrid, hook_mlp

CLASS_TOKEN = "CLS"

# Attention ---------------------------------------------------------------------------------------------------------


class TalkingHeads(TimmPlainAttention):
    """timm's ``TalkingHeadAttn``, whose heads are mixed twice: their scores, then what the softmax makes of these.

    ``hook_attn_scores`` is what enters the softmax, with the heads' scores mixed; ``hook_pattern`` is what the values
    are mixed by, with the heads' softmaxes mixed: ``hook_pattern @ hook_v`` is ``hook_z``, head by head. Its rows need
    not sum to one, and it may be negative.
    """

    @property
    def fused(self) -> bool:
        """The library has no fused kernel for this."""
        return False

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as they are."""
        return q, k

    def mix(
        self,
        q: Float[Tensor, "batch head query d_qk"],
        k: Float[Tensor, "batch head key d_qk"],
        v: Float[Tensor, "batch head key d_head"],
    ) -> Float[Tensor, "batch head query d_head"]:
        """Mix values by the pattern, with heads mixed before the softmax and after it."""
        core: Any = self.core
        scores = fire(self.hook_attn_scores, _across_heads(core.proj_l, self.score(q, k)))
        pattern = self.drop(_across_heads(core.proj_w, scores.softmax(-1)))
        return fire(self.hook_pattern, pattern) @ v


def _across_heads(mixing: nn.Module, x: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Apply a linear layer over heads."""
    mixed: Tensor = mixing(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return mixed


class ClassAttention(TimmPlainAttention):
    """timm's ``ClassAttn``: the class token, the first of the tokens that come in, attends to all of them.

    ``hook_q``, ``hook_z`` and ``hook_result`` have the class token only, ``hook_k`` and ``hook_v`` the patches behind
    it too; ``hook_attn_scores`` and ``hook_pattern`` are ``batch head 1 key``.
    """

    @property
    def _layers(self) -> tuple[Any, ...]:
        """The layers of queries, keys and values."""
        core: Any = self.core
        return core.q, core.k, core.v

    def _weight(self, third: int, heads: int) -> Float[Tensor, "head d_model d_head"]:
        return by_head(self._layers[third].weight, heads)

    def _bias(self, third: int, heads: int) -> Float[Tensor, "head d_head"]:
        weight, bias = self._layers[third].weight, self._layers[third].bias
        return (weight.new_zeros(weight.shape[0]) if bias is None else bias).unflatten(0, (heads, -1))

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as they are."""
        return q, k

    def finish_heads(
        self, z: Float[Tensor, "batch 1 head d_head"], x: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch 1 head d_head"]:
        """Return the heads' outputs as they are."""
        return z

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """The query of the class token, keys and values of all tokens."""
        to_q, to_k, to_v = self._layers
        # The query's product is of two axes, as the library has it: with three it might be rounded otherwise.
        flat = (to_q(x[:, 0]).unsqueeze(1), to_k(x), to_v(x))
        q, k, v = (value.unflatten(-1, (self.heads, -1)).transpose(1, 2) for value in flat)
        return q, k, v


# Blocks ------------------------------------------------------------------------------------------------------------


class ClassBlock(TwoBranchBlock):
    """A block in which only the class token attends, and only to it branches add.

    ``hook_attn_out`` and ``hook_mlp_out`` are ``batch 1 d_model``; ``ln1`` acts on class token and patches.
    """

    @property
    def with_patches(self) -> tuple[str, ...]:
        """How the names of those hooks begin, below the block, that see the patches behind the class token.

        At scores and patterns these are the keys.
        """
        return ("ln1.", *(f"attn.hook_{name}" for name in ("k", "v", "attn_scores", "pattern")), *SPLIT_HOOKS[1:])

    def _split_inputs(self, x: Tensor, norm: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """As of any block, but that the query's is the class token's only."""
        if SPLIT_HOOKS[0] not in self._modules or not any_hooked(getattr(self, name) for name in SPLIT_HOOKS):
            return None
        assert norm is not None
        q, k, v = (
            norm(fire(getattr(self, name), tokens.unsqueeze(2).repeat(1, 1, self.attn.heads, 1)))
            for name, tokens in zip(SPLIT_HOOKS, (x[:, :1], x, x), strict=True)
        )
        return q, k, v


class ClassTokenBlock(ClassBlock):
    """timm's ``LayerScaleBlockClassAttn``: the stream is the class token alone, and the patches stay what they are."""

    def __init__(self, core: Any) -> None:
        attn = find_part({ClassAttn: ClassAttention}, core.attn, "attention")
        super().__init__(core, **_branches(core, attn))
        self._patches: Tensor | None = None

    def forward(  # type: ignore[override]
        self, patches: Float[Tensor, "batch patch d_model"], x: Float[Tensor, "batch 1 d_model"]
    ) -> Float[Tensor, "batch 1 d_model"]:
        """Run the block.

        Args:
            patches: What the class token attends to, beside itself.
            x: The stream.
        """
        self._patches = patches
        try:
            out: Tensor = super().forward(x)
            return out
        finally:
            self._patches = None

    def attention_branch(self, x: Float[Tensor, "batch 1 d_model"]) -> Float[Tensor, "batch 1 d_model"]:
        """What the attention adds to the class token."""
        assert self._patches is not None
        tokens = torch.cat((x, self._patches), dim=1)
        out: Tensor = self.attn(self.ln1(tokens), split=self._split_inputs(tokens, self.ln1))
        return out


def _branches(core: Any, attention: Callable[..., HookedAttention]) -> dict[str, Any]:
    return {
        "ln1": hooked_norm(core.norm1),
        "attn": attention(core.attn, tail=Tail.of_parameter(core, "gamma_1")),
        "ln2": hooked_norm(core.norm2),
        "mlp": hook_mlp(core.mlp, Tail.of_parameter(core, "gamma_2")),
        "drop_path1": core.drop_path,
        "drop_path2": core.drop_path,
    }


def _block(core: Any) -> HookedBlock:
    attn = find_part({TalkingHeadAttn: TalkingHeads}, core.attn, "attention")
    return TwoBranchBlock(core, **_branches(core, attn))


# Tokens ------------------------------------------------------------------------------------------------------------


class ClassGrids:
    """Which pixels tokens stand for in models whose class token comes in behind the blocks of the patches.

    What has the class token only has a grid without patches.

    Args:
        patches: From height and width of an image to rows and columns of patches.
        patch_size: Height and width of a patch in pixels.
        blocks: The hooked blocks.
    """

    def __init__(
        self,
        patches: Callable[[int, int], tuple[int, int]],
        patch_size: tuple[int, int],
        blocks: Sequence[HookedBlock],
    ) -> None:
        self.patches, self.patch_size, self.blocks = patches, patch_size, blocks

    def __call__(self, hook: str, height: int, width: int) -> TokenGrid:
        """Return the tokens of the value at a hook; at scores and patterns, those of the keys."""
        rows, columns = self.patches(height, width)
        size = (rows * self.patch_size[0], columns * self.patch_size[1])
        with_class, with_patches = self._seen_at(hook)
        prefix = (CLASS_TOKEN,) if with_class else ()
        return TokenGrid(rows, columns, size, prefix) if with_patches else TokenGrid(0, 0, size, prefix)

    def _seen_at(self, hook: str) -> tuple[bool, bool]:
        """Whether the value at a hook has the class token, and whether it has patches."""
        path = hook.split(".", 2)
        if path[0] != "blocks":
            has_class = bool(self.blocks) and isinstance(self.blocks[-1], ClassBlock)
            return has_class and path[0] in ("ln_final", "hook_representation"), True
        block = self.blocks[int(path[1])]
        if not isinstance(block, ClassBlock):
            return False, True
        return True, path[2].startswith(block.with_patches)


# The whole ---------------------------------------------------------------------------------------------------------


class ClassAttentionAdapter(TimmAdapter):
    """Hooks models with blocks of patches first, and then blocks in which a class token attends to them.

    Blocks are numbered through both kinds.

    Attributes:
        relied_on: The library's methods that a subclass of the model must not override.
    """

    relied_on: ClassVar[tuple[str, ...]] = ("forward_features", "forward_cls", "forward_head")

    @abstractmethod
    def library_class(self) -> type[nn.Module]:
        """Return the library's class that the adapter is written for."""

    @abstractmethod
    def hook_embedding(self, clone: Any, parts: dict[str, nn.Module]) -> None:
        """Put hook points between images and blocks."""

    @abstractmethod
    def class_blocks(self, clone: Any) -> nn.ModuleList | None:
        """Return the model's blocks with class attention; None where they were pruned."""

    @abstractmethod
    def hook_block(self, core: nn.Module) -> HookedBlock:
        """Hook one block of patches."""

    @abstractmethod
    def hook_class_block(self, core: nn.Module) -> HookedBlock:
        """Hook one block with class attention."""

    @abstractmethod
    def patches(self, clone: Any) -> tuple[ImageSpec, Callable[[int, int], tuple[int, int]], tuple[int, int]]:
        """Return what images the model takes, how many patches they have by their size, and the size of a patch."""

    def hook(self, clone: Any) -> Tower:
        """Put hook points into a cloned model."""
        known = self.library_class()
        check_methods(clone, known, tuple(name for name in self.relied_on if hasattr(known, name)))
        parts: dict[str, nn.Module] = {}
        self.hook_embedding(clone, parts)
        blocks: list[HookedBlock] = []
        for cores, hook_one in (
            (clone.blocks, self.hook_block),
            (self.class_blocks(clone) or nn.ModuleList(), self.hook_class_block),
        ):
            for number, core in enumerate(cores):
                cores[number] = block = hook_one(core)
                blocks.append(block)
        parts["blocks"] = nn.ModuleList(blocks)
        if (norm := hooked_norm(clone.norm)) is not clone.norm:
            parts["ln_final"] = clone.norm = norm
        parts["hook_representation"] = point = CopyingHookPoint()
        clone.head_drop.register_forward_hook(OutputTap(point))
        image, patch_grid, patch_size = self.patches(clone)
        return Tower(
            module=clone,
            parts=parts,
            blocks=blocks,
            prefix=(),
            image=image,
            patch_grid=patch_grid,
            patch_size=patch_size,
            weights_out=None if clone.num_classes == 0 else Classifier(clone.head),
            grid_of=ClassGrids(patch_grid, patch_size, blocks),
        )


class CaitEmbedding:
    """Adds positions anew while its hook points are in use, in front of the dropout that the library's sum enters.

    Args:
        tower: The cloned model.
        parts: Gets the hook points.
    """

    def __init__(self, tower: Any, parts: dict[str, nn.Module]) -> None:
        self.tower = tower
        parts["hook_patch_embed"] = patch_point = HookPoint()
        parts["hook_embed"] = self.hook_embed = CopyingHookPoint()
        parts["hook_pos_embed"] = self.hook_pos_embed = CopyingHookPoint()
        parts["hook_full_embed"] = full_point = HookPoint()
        self._patches: Tensor | None = None
        tower.patch_embed.register_forward_hook(GridTap(patch_point))
        tower.patch_embed.register_forward_hook(self.keep)
        tower.pos_drop.register_forward_pre_hook(self.replace, prepend=True)
        tower.pos_drop.register_forward_hook(OutputTap(full_point))

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Keep the patches, as a forward hook of the patch embedding."""
        self._patches = output if any_hooked((self.hook_embed, self.hook_pos_embed)) else None

    def replace(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Put the hooked sum in place of the library's, as a forward pre-hook of the dropout after it."""
        patches, self._patches = self._patches, None
        if patches is None:
            return None
        # Expanded over the batch, because TransformerLens stacks it with the embedding.
        positions = self.tower.pos_embed.expand(patches.shape[0], -1, -1)
        return (fire(self.hook_embed, patches) + fire(self.hook_pos_embed, positions),)


@register_adapter("timm.models.cait:Cait")
class TimmCaitAdapter(ClassAttentionAdapter):
    """Hooks timm's CaiT models.

    In the blocks with class attention the stream is the class token alone. It comes in there as a parameter, so that
    it is a constant.
    """

    def library_class(self) -> type[nn.Module]:
        """Return timm's class."""
        return Cait

    def hook_embedding(self, clone: Any, parts: dict[str, nn.Module]) -> None:
        """Read patches, positions and their sum."""
        CaitEmbedding(clone, parts)

    def class_blocks(self, clone: Any) -> nn.ModuleList | None:
        """Return the blocks behind those of the patches."""
        blocks: nn.ModuleList | None = clone.blocks_token_only
        return blocks

    def hook_block(self, core: nn.Module) -> HookedBlock:
        """Hook one block of patches."""
        block: HookedBlock = find_part({LayerScaleBlock: _block}, core, "block")(core)
        return block

    def hook_class_block(self, core: nn.Module) -> HookedBlock:
        """Hook one block with class attention."""
        block: HookedBlock = find_part({LayerScaleBlockClassAttn: ClassTokenBlock}, core, "block")(core)
        return block

    def patches(self, clone: Any) -> tuple[ImageSpec, Callable[[int, int], tuple[int, int]], tuple[int, int]]:
        """Images have the one size that the position embedding is for."""
        embed = clone.patch_embed
        image = ImageSpec(clone.in_chans, tuple(embed.img_size))
        return image, PatchGrid(clone), tuple(embed.feat_ratio(as_scalar=False))
