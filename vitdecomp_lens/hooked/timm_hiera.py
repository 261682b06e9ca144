"""timm's ``Hiera``: attention in windows, then global; tokens merged by the maximum of four.

The library reorders ("unrolls") the tokens once, behind the embedding, so that those which a later stage merges lie a
fixed stride apart: of the token axis, the place of a token within its first merging runs slowest, then that within its
second, last the merged grid. Hooks see the tokens row by row where they are in the image, at every stage.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import ClNormMlpClassifierHead
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention, PatchEmbed, Unroll
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.errors import UnsupportedModelError
from vitdecomp_lens.hooked.attention import Heads
from vitdecomp_lens.hooked.blocks import SPLIT_HOOKS, TwoBranchBlock
from vitdecomp_lens.hooked.hook_points import (
    CopyingHookPoint,
    GridTap,
    InputTap,
    OutputTap,
    any_hooked,
    fire,
    lay_out,
)
from vitdecomp_lens.hooked.norms import HookedNorm, hooked_norm
from vitdecomp_lens.hooked.registry import ImageSpec, Tower, check_methods, find_part, register_adapter
from vitdecomp_lens.hooked.stages import Size, StageGrids
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_adapter import Classifier, TimmAdapter
from vitdecomp_lens.hooked.timm_attention import TimmPackedAttention
from vitdecomp_lens.hooked.timm_columns import hook_mlp

# Orders of tokens --------------------------------------------------------------------------------------------------


class Unrolled:
    """A grid of tokens in the library's order, for mergings that are still to come.

    Args:
        size: Rows and columns of the grid.
        strides: How many rows and columns each coming merging takes together, the next one first.
    """

    def __init__(self, size: Size, strides: Sequence[Size] = ()) -> None:
        self.size, self.strides = size, tuple(strides)
        self._lengths = tuple(length for stride in self.strides for length in stride) + _divided(size, self.strides)
        last = len(self._lengths)
        # What merges first is nearest in the image: rows and columns have the merged grid's first, then backwards.
        self._order = (*range(last - 2, -1, -2), *range(last - 1, 0, -2))

    @property
    def merged(self) -> "Unrolled":
        """The order behind the next merging."""
        return Unrolled(_divided(self.size, self.strides[:1]), self.strides[1:])

    def split(self, tokens: int) -> tuple["Unrolled", "Unrolled"]:
        """The orders of the tokens in a window and of the windows, for windows of so many tokens.

        Raises:
            UnsupportedModelError: If such a window is not what the next mergings take together, by rows and by columns.
        """
        strides = [one for rows, columns in self.strides for one in ((rows, 1), (1, columns))]
        for count in range(len(strides) + 1):
            if prod(map(prod, strides[:count])) == tokens:
                windows = _divided(self.size, strides[:count])
                window = _divided(self.size, (windows,))
                return Unrolled(window, strides[:count]), Unrolled(windows, strides[count:])
        raise UnsupportedModelError(
            f"Windows of {tokens} tokens, in which mergings take together {[*map(prod, self.strides)]}, are no "
            f"rectangles of the image. vitdecomp_lens.trace works for any module."
        )

    def show(self, value: Tensor, axis: int = 1) -> Tensor:
        """Put the tokens row by row as they are in the image."""
        return self._permuted(value, self._lengths, self._order, axis)

    def restore(self, shown: Tensor, like: Tensor, axis: int = 1) -> Tensor:
        """Put the tokens in the library's order again."""
        lengths = tuple(self._lengths[place] for place in self._order)
        back = sorted(range(len(lengths)), key=self._order.__getitem__)
        return self._permuted(shown, lengths, back, axis)

    def _permuted(self, value: Tensor, lengths: tuple[int, ...], order: Sequence[int], axis: int) -> Tensor:
        if not self.strides:
            return value
        parts = value.unflatten(axis, lengths)
        behind = range(axis + len(order), parts.dim())
        return parts.permute(*range(axis), *(axis + place for place in order), *behind).flatten(axis, behind.start - 1)


def _divided(size: Size, strides: Sequence[Size]) -> Size:
    rows, columns = (length // prod(by) for length, by in zip(size, zip((1, 1), *strides, strict=True), strict=True))
    return rows, columns


class PatternOrder:
    """``batch head window query key``, or ``batch head query key``, in the library's order.

    Hooks see ``batch·window head query key``: windows row by row as they are in the image, those of an image behind
    each other; queries and keys row by row within their window.

    Args:
        windows: The order of the windows.
        queries: The order of the queries in a window.
        keys: The order of the keys in a window.
    """

    def __init__(self, windows: Unrolled, queries: Unrolled, keys: Unrolled) -> None:
        self._orders = ((1, windows), (3, queries), (4, keys))

    def show(self, value: Tensor) -> Tensor:
        """Put windows, queries and keys row by row."""
        shown = self._with_windows(value).transpose(1, 2)
        for axis, order in self._orders:
            shown = order.show(shown, axis)
        return shown.flatten(0, 1)

    def restore(self, shown: Tensor, like: Tensor) -> Tensor:
        """Put windows, queries and keys in the library's order again."""
        value = shown.unflatten(0, (-1, self._with_windows(like).shape[2]))
        for axis, order in self._orders:
            value = order.restore(value, value, axis)
        return value.transpose(1, 2).reshape(like.shape)

    @staticmethod
    def _with_windows(value: Tensor) -> Tensor:
        return value if value.dim() == 5 else value.unsqueeze(2)


# Blocks ------------------------------------------------------------------------------------------------------------


class HookedMaskUnitAttention(TimmPackedAttention):
    """timm's ``MaskUnitAttention``: within windows or global, and in the first block of a stage with fewer queries.

    There the queries of tokens that merge become one, by their maximum in each channel. ``hook_q`` comes after that:
    it shows what the scores are made of, ``batch token head d_head`` with the tokens behind the merging, as ``hook_z``
    and ``hook_result`` do; ``hook_k`` and ``hook_v`` have the tokens before it. See `PatternOrder` for ``hook_pattern``
    and ``hook_attn_scores``.

    Args:
        core: The (cloned) attention.
        before: The order of the tokens that it reads.
        tail: What the block does with the output before adding it (LayerScale).
    """

    def __init__(self, core: nn.Module, before: Unrolled, *, tail: Tail) -> None:
        super().__init__(core, tail=tail)
        self.after = before.merged if self.merges else before
        windows, queries, keys = Unrolled((1, 1)), self.after, before
        if core.use_mask_unit_attn:
            window = int(core.window_size)  # type: ignore[arg-type]
            queries, windows = self.after.split(window)
            keys, _ = before.split(window * self.merged)
        self._windows = prod(windows.size)
        lay_out((self.hook_q, self.hook_z), self.after)
        lay_out((self.hook_k, self.hook_v), before)
        lay_out((self.hook_attn_scores, self.hook_pattern), PatternOrder(windows, queries, keys))

    @property
    def merged(self) -> int:
        """How many tokens become one."""
        return int(self.core.q_stride)  # type: ignore[arg-type]

    @property
    def merges(self) -> bool:
        """Whether there are fewer queries than tokens."""
        return self.merged > 1

    @property
    def heads(self) -> int:
        """Number of heads."""
        return int(self.core.heads)  # type: ignore[arg-type]

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        """``proj``."""
        return (self.core.proj,)  # type: ignore[return-value]

    def use_result(self, use: bool) -> None:
        """Add or remove ``hook_result``."""
        super().use_result(use)
        if use:
            lay_out((self.hook_result,), self.after)

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries, keys and values."""
        q, k, v = self.project_in(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Merge queries; there is no norm."""
        return q.unflatten(2, (self.merged, -1)).amax(2) if self.merges else q, k

    def drop(self, pattern: Tensor) -> Tensor:
        """Return the pattern as it is."""
        return pattern

    def mix(
        self,
        q: Float[Tensor, "batch head query d_qk"],
        k: Float[Tensor, "batch head key d_qk"],
        v: Float[Tensor, "batch head key d_head"],
    ) -> Float[Tensor, "batch head query d_head"]:
        """Mix values by the pattern of each window, or of the whole image."""
        if not self.core.use_mask_unit_attn:
            return self._mixed(q.contiguous(), k.contiguous(), v.contiguous())
        # Of the token axis, the place within the window runs slower than the window.
        q, k, v = (value.unflatten(2, (-1, self._windows)).transpose(2, 3) for value in (q, k, v))
        return self._mixed(q, k, v).transpose(2, 3).flatten(2, 3)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused and not any_hooked((self.hook_attn_scores, self.hook_pattern)):
            return functional.scaled_dot_product_attention(q, k, v)
        scores = fire(self.hook_attn_scores, (q * self.scale) @ k.transpose(-2, -1))
        return fire(self.hook_pattern, scores.softmax(-1)) @ v

    def finish_heads(
        self, z: Float[Tensor, "batch token head d_head"], x: Float[Tensor, "batch token_before d_model"]
    ) -> Float[Tensor, "batch token head d_head"]:
        """Return the heads' outputs as they are."""
        return z

    def project_out(self, z: Float[Tensor, "batch token head d_head"]) -> Float[Tensor, "batch token d_model"]:
        """Apply the output projection."""
        return self.core.proj(z.flatten(2))  # type: ignore[operator]


class MergingBlock(TwoBranchBlock):
    """timm's ``HieraBlock``, which in the first block of a stage merges and widens the stream.

    There the stream that the attention is added to is the maximum, over the tokens that merge, of a projection of the
    *normed* stream; or, without that projection, the maximum and the mean of the stream itself, side by side.

    Args:
        core: The (cloned) block.
        before: The order of the tokens that it reads.
    """

    attn: HookedMaskUnitAttention

    def __init__(self, core: Any, before: Unrolled) -> None:
        attention = find_part({MaskUnitAttention: HookedMaskUnitAttention}, core.attn, "attention")
        super().__init__(
            core,
            ln1=hooked_norm(core.norm1),
            attn=attention(core.attn, before, tail=Tail(core.ls1)),
            ln2=hooked_norm(core.norm2),
            mlp=hook_mlp(core.mlp, Tail(core.ls2)),
            drop_path1=core.drop_path1,
            drop_path2=core.drop_path2,
        )
        self.before, self.after = before, self.attn.after
        lay_out((self.hook_resid_pre, *_points(self.ln1)), before)
        added = (self.hook_attn_out, self.hook_resid_mid, self.hook_mlp_out, self.hook_resid_post)
        lay_out((*added, *_points(self.ln2), *_points(self.mlp)), self.after)

    def is_before_merging(self, hook: str) -> bool:
        """Whether a hook of the block sees tokens from before the block merges them."""
        finer = ("hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized", "attn.hook_k", "attn.hook_v", *SPLIT_HOOKS)
        return self.attn.merges and hook in finer

    def add_branches(self, x: Float[Tensor, "batch token_before d_before"]) -> Float[Tensor, "batch token d_model"]:
        """Add attention to the (merged) stream, then MLP."""
        normed = self.ln1(x)
        added = self.drop_path1(self.attn(normed, split=self._split_inputs(x, self.ln1)))
        x = fire(self.hook_resid_mid, self.merge(x, normed) + fire(self.hook_attn_out, added))
        return x + fire(self.hook_mlp_out, self.drop_path2(self.mlp_branch(x)))

    def merge(
        self, x: Float[Tensor, "batch token_before d_before"], normed: Float[Tensor, "batch token_before d_before"]
    ) -> Float[Tensor, "batch token d_model"]:
        """The stream that attention is added to."""
        if not self.core.do_expand:
            return x
        projection = self.core.proj
        wide = x if projection is None else projection(normed)  # type: ignore[operator]
        merging = wide.unflatten(1, (self.attn.merged, -1))
        largest = merging.amax(1)
        return largest if projection is not None else torch.cat([largest, merging.mean(1)], dim=-1)

    def use_split_qkv_input(self, use: bool) -> None:
        """Add or remove ``hook_q_input``, ``hook_k_input`` and ``hook_v_input``: tokens before merging."""
        super().use_split_qkv_input(use)
        if use:
            lay_out([getattr(self, name) for name in SPLIT_HOOKS], self.before)


def _points(module: nn.Module) -> list[HookPoint]:
    return [child for child in module.modules() if isinstance(child, HookPoint)]


# The whole ---------------------------------------------------------------------------------------------------------


@register_adapter("timm.models.hiera:Hiera")
class TimmHieraAdapter(TimmAdapter):
    """Hooks timm's Hiera models. ``hook_full_embed`` has the tokens with their positions, ``hook_embed`` without."""

    def hook(self, clone: Any) -> Tower:
        """Put hook points into a cloned ``Hiera``."""
        _check(clone)
        clone.patch_embed.register_forward_pre_hook(_refuse_mask, with_kwargs=True)
        parts: dict[str, nn.Module] = {"hook_patch_embed": HookPoint(), "hook_embed": CopyingHookPoint()}
        for tap in parts.values():
            clone.patch_embed.register_forward_hook(GridTap(tap))  # type: ignore[arg-type]
        parts["hook_full_embed"] = full_embed = CopyingHookPoint()
        clone.unroll.register_forward_pre_hook(InputTap(full_embed))
        blocks = _hook_blocks(clone)
        parts["blocks"] = nn.ModuleList(blocks)
        pooled = bool(clone.head.pool_type)
        clone.head.norm = norm = hooked_norm(clone.head.norm)
        if isinstance(norm, HookedNorm):
            parts["ln_final"] = norm
        parts["hook_representation"] = point = CopyingHookPoint()
        clone.head.drop.register_forward_hook(OutputTap(point))
        if not pooled:
            lay_out((*_points(norm), point), blocks[-1].after)
        ends = sorted({min(end + 1, len(blocks)) for end in clone.stage_ends})  # later stages may be pruned
        stages = tuple(range(first, end) for first, end in zip((0, *ends), ends, strict=False))
        tokens = _grids(clone, blocks, stages)
        return Tower(
            module=clone,
            parts=parts,
            blocks=list(blocks),
            prefix=(),
            image=_image_spec(clone),
            patch_grid=tokens.patches,
            patch_size=tokens.patch_size,
            weights_out=None if clone.num_classes == 0 else Classifier(clone.head.fc),
            pooled=pooled,
            stages=stages,
            grid_of=tokens,
        )


def _check(clone: Any) -> None:
    """Refuse what the hooks would not be true for."""
    check_methods(clone, Hiera, ("forward_features", "forward_head"))
    find_part({PatchEmbed: None}, clone.patch_embed, "patch embedding")
    find_part({Unroll: None}, clone.unroll, "order of the tokens")
    find_part({ClNormMlpClassifierHead: None}, clone.head, "classifier")
    find_part({nn.Identity: None}, clone.head.pre_logits, "hidden layer of the classifier")
    if len(clone.unroll.size) != 2:
        raise UnsupportedModelError(
            f"This {type(clone).__name__} is for input with {len(clone.unroll.size)} axes; hooks exist for images, "
            f"which have two. vitdecomp_lens.trace works for any module."
        )


def _refuse_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse to run on part of an image, as a forward pre-hook of the patch embedding."""
    if (kwargs.get("mask") if len(args) < 2 else args[1]) is not None:
        raise UnsupportedModelError(
            "Hooks see all tokens of an image, so a hooked Hiera runs without mask=, and in training mode with "
            "patch_drop_rate=0."
        )


def _hook_blocks(clone: Any) -> list[MergingBlock]:
    """Hook the blocks, each for the order that the tokens have there."""
    rows, columns = clone.unroll.size
    order = Unrolled((rows, columns), [(height, width) for height, width in clone.unroll.schedule])
    blocks = []
    for number, core in enumerate(clone.blocks):
        clone.blocks[number] = block = find_part({HieraBlock: MergingBlock}, core, "block")(core, order)
        order = block.after
        blocks.append(block)
    return blocks


def _grids(clone: Any, blocks: Sequence[MergingBlock], stages: tuple[range, ...]) -> StageGrids:
    rows, columns = clone.unroll.size
    sizes = [blocks[numbers[-1]].after.size for numbers in stages]
    merged = [(rows // height, columns // width) for height, width in sizes]
    return StageGrids(partial(_patches, tuple(clone.patch_stride)), clone.patch_stride, blocks, stages, merged)


def _patches(stride: Size, size: Size) -> Size:
    return size[0] // stride[0], size[1] // stride[1]


def _image_spec(clone: Any) -> ImageSpec:
    rows, columns = (length * stride for length, stride in zip(clone.unroll.size, clone.patch_stride, strict=True))
    return ImageSpec(clone.in_chans, (rows, columns))
