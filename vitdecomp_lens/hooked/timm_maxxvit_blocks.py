"""The blocks of timm's ``MaxxVit`` models: convolutions, and attention on grids of tokens."""

from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from timm.layers import (
    ConvMlp,
    LayerNorm2d,
    LayerNorm2dFp32,
    LayerScale,
    LayerScale2d,
    Mlp,
    RmsNorm2d,
    RmsNorm2dFp32,
)
from timm.models.maxxvit import (
    Attention2d,
    AttentionCl,
    ConvNeXtBlock,
    Downsample2d,
    MaxxVitBlock,
    MbConvBlock,
    ParallelMaxxVitBlock,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
    TransformerBlock2d,
)
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.hooked.attention import HookedAttention
from vitdecomp_lens.hooked.blocks import HookedBlock, TwoBranchBlock, not_one
from vitdecomp_lens.hooked.hook_points import ChannelsFirst, Grid, Layout, OutputTap, any_hooked, fire, lay_out
from vitdecomp_lens.hooked.mlp import HookedMLP, PlainMLP
from vitdecomp_lens.hooked.norms import HookedNorm, hooked_norm
from vitdecomp_lens.hooked.registry import check_methods, find_part
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_maxxvit_attention import (
    GridWindows,
    HookedChannelsFirst,
    HookedChannelsLast,
    HookedHalf,
)
from vitdecomp_lens.hooked.windows import Windows

# The norms of channels that come first: whether the mean is subtracted.
CENTRED: dict[type, bool] = {LayerNorm2d: True, LayerNorm2dFp32: True, RmsNorm2d: False, RmsNorm2dFp32: False}


class ChannelsFirstNorm(HookedNorm):
    """A norm over the channels of ``batch d_model row column``, which its hooks see last."""

    def forward(self, x: Float[Tensor, "batch d_model row column"]) -> Float[Tensor, "batch d_model row column"]:
        """Normalise over channels."""
        if not any_hooked(self._points):
            normed: Tensor = self.core(x)
            return normed
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def points_of(module: nn.Module) -> list[HookPoint]:
    """The hook points below a module."""
    return [point for point in module.modules() if isinstance(point, HookPoint)]


def grid_norm(core: nn.Module, layout: Layout | None = None) -> nn.Module:
    """Hook a norm of a grid of tokens, whether its channels come first or last."""
    centred = CENTRED.get(type(core))
    norm = hooked_norm(core) if centred is None else ChannelsFirstNorm(core, centred=centred)
    if norm is not core:
        lay_out(points_of(norm), layout or Grid())
    return norm


class ConvMLP(PlainMLP):
    """timm's ``ConvMlp``, whose linear layers are 1 × 1 convolutions."""

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:  # noqa: N802
        """First weights."""
        weight: Tensor = self._first[0].weight  # type: ignore[assignment]
        return weight.flatten(1).T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:  # noqa: N802
        """Last weights, with LayerScale folded in."""
        weight: Tensor = self._last[0].weight  # type: ignore[assignment]
        return self.tail.fold(weight.flatten(1).T)


class ConvBlock(HookedBlock):
    """A convolutional block, which the library runs as it is: one branch beside a shortcut.

    Where it halves rows and columns, the shortcut is pooled and brought to the new width.
    """

    hook_conv_out: HookPoint
    attn = not_one("a convolution")

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        self.hook_conv_out = HookPoint()
        self.hook_resid_post = HookPoint()
        self.core = core
        core.drop_path.register_forward_hook(OutputTap(self.hook_conv_out))
        lay_out((self.hook_resid_pre, self.hook_conv_out, self.hook_resid_post), ChannelsFirst())

    @property
    def attentions(self) -> dict[str, HookedAttention]:
        """None."""
        return {}

    @property
    def mlps_by_name(self) -> dict[str, HookedMLP]:
        """None: what the branch computes between its convolutions is part of it."""
        return {}

    @property
    def has_convolution(self) -> bool:
        """Whether a convolution adds to the stream: it does."""
        return True

    def is_before_merging(self, hook: str) -> bool:
        """Whether a hook sees the tokens from before the block."""
        return hook == "hook_resid_pre" and halves(self.core)

    def add_branches(
        self, x: Float[Tensor, "batch d_in rows_in columns_in"]
    ) -> Float[Tensor, "batch d_model row column"]:
        """Run the library's block."""
        out: Tensor = self.core(x)
        return out


class TransformerBlock(TwoBranchBlock):
    """Attention, then an MLP, on a grid of tokens.

    Args:
        core: The (cloned) block of the library.
        layout: How the library lays out the stream.
        windows: How the image lies in windows, if it does.
    """

    def __init__(self, core: Any, layout: Layout, windows: tuple[Windows, ...] = ()) -> None:
        attention = find_part(ATTENTIONS, core.attn, "attention")
        super().__init__(
            core,
            ln1=_hook_norm1(core),
            attn=attention(core.attn, tail=_tail(core.ls1), windows=next(iter(windows), None)),
            ln2=grid_norm(core.norm2),
            mlp=_mlp(core, layout),
            drop_path1=core.drop_path1,
            drop_path2=core.drop_path2,
        )
        self.windows = windows
        own = (self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid, self.hook_mlp_out, self.hook_resid_post)
        lay_out(own, layout)

    def attend(self, normed: Tensor) -> Tensor:
        """Run the library's attention."""
        out: Tensor = self.core.attn(normed)  # type: ignore[operator]
        return out

    def attention_branch(self, x: Tensor) -> Tensor:
        """What the attention adds to the stream."""
        out = self.attend(self.core.norm1(x))  # type: ignore[operator]
        attn: Any = self.attn
        return out if attn.shows_result else attn.tail(out)

    def use_split_qkv_input(self, use: bool) -> None:
        """Refuse: what lies between the norm and the attention moves tokens."""
        HookedBlock.use_split_qkv_input(self, use)


class WholeBlock(TransformerBlock):
    """timm's ``TransformerBlock2d``: attention over the whole image, which it may halve in rows and columns first."""

    def __init__(self, core: Any) -> None:
        super().__init__(core, ChannelsFirst())

    @property
    def has_positions(self) -> bool:
        """Whether the attention has a bias by relative position, made for images of one size."""
        attn: Any = self.attn.core
        return attn.rel_pos is not None

    def is_before_merging(self, hook: str) -> bool:
        """Whether a hook sees the tokens from before the block: those up to the first norm do."""
        return hook.startswith(("hook_resid_pre", "ln1")) and halves(self.core)

    def add_branches(
        self, x: Float[Tensor, "batch d_in rows_in columns_in"]
    ) -> Float[Tensor, "batch d_model row column"]:
        """Add attention to the shortcut, then the MLP."""
        shortcut: Tensor = self.core.shortcut(x)  # type: ignore[operator]
        x = fire(self.hook_resid_mid, shortcut + fire(self.hook_attn_out, self.drop_path1(self.attention_branch(x))))
        return x + fire(self.hook_mlp_out, self.drop_path2(self.mlp_branch(x)))


class PartitionBlock(TransformerBlock):
    """timm's ``PartitionAttentionCl``: attention in windows, or in grids that are spread over the image."""

    layout: Layout = Grid()
    library_class: type[nn.Module] = PartitionAttentionCl

    def __init__(self, core: Any) -> None:
        check_methods(core, self.library_class, ("_partition_attn",))
        kind = Windows if core.partition_block else GridWindows
        super().__init__(core, self.layout, (kind(tuple(core.partition_size)),))

    def attend(self, normed: Tensor) -> Tensor:
        """Run the library's attention, which cuts the image and puts it together again."""
        _see(self.windows, normed, self.layout)
        out: Tensor = self.core._partition_attn(normed)  # type: ignore[operator]
        return out


class PartitionBlock2d(PartitionBlock):
    """timm's ``PartitionAttention2d``: the same with channels first."""

    layout: Layout = ChannelsFirst()
    library_class = PartitionAttention2d


class ParallelBlock(HookedBlock):
    """timm's ``ParallelPartitionAttention``: attention in windows writes half of the channels, in grids the other half.

    Its heads are numbered through: those in windows come first. ``W_O``, ``b_O`` and ``hook_result`` are as wide as the
    stream, zero in the half that an attention does not write to.
    """

    hook_resid_mid: HookPoint
    attn = not_one("two attentions")
    attn_block: HookedHalf
    attn_grid: HookedHalf

    def __init__(self, core: Any) -> None:
        super().__init__(core)
        check_methods(core, ParallelPartitionAttention, ("_partition_attn",))
        self.ln1 = _hook_norm1(core)
        self.windows = (Windows(tuple(core.partition_size)), GridWindows(tuple(core.partition_size)))
        first, last = core.attn_block.proj.out_features, core.attn_grid.proj.out_features
        places = zip(("attn_block", "attn_grid"), self.windows, ((0, last), (first, 0)), strict=True)
        for name, windows, beside in places:
            attn = getattr(core, name)
            hooked = find_part({AttentionCl: HookedHalf}, attn, "attention")
            setattr(self, name, hooked(attn, tail=_tail(core.ls1), windows=windows, beside=beside))
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.ln2 = grid_norm(core.norm2)
        self.mlp = _mlp(core, Grid())
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()
        self.core = core
        lay_out([point for point in self.children() if isinstance(point, HookPoint)], Grid())

    @property
    def attentions(self) -> dict[str, HookedAttention]:
        """In windows, and in grids."""
        return {"attn_block": self.attn_block, "attn_grid": self.attn_grid}

    @property
    def mlps_by_name(self) -> dict[str, HookedMLP]:
        """The MLP."""
        return {"mlp": self.mlp}

    def attention_branch(self, x: Float[Tensor, "batch row column d_model"]) -> Tensor:
        """What both attentions add to the stream."""
        core: Any = self.core
        attentions = (self.attn_block, self.attn_grid)
        _see(self.windows, x, Grid())
        out: Tensor = core._partition_attn(self.ln1(x))
        if not any(attn.shows_result for attn in attentions):
            scaled: Tensor = core.ls1(out)
            return scaled
        shares = out.split([attn.width for attn in attentions], dim=-1)
        in_windows, in_grids = (attn.added(share) for attn, share in zip(attentions, shares, strict=True))
        return in_windows + in_grids

    def add_branches(self, x: Float[Tensor, "batch row column d_model"]) -> Float[Tensor, "batch row column d_model"]:
        """Add attention, then MLP."""
        core: Any = self.core
        x = fire(self.hook_resid_mid, x + fire(self.hook_attn_out, core.drop_path1(self.attention_branch(x))))
        return x + fire(self.hook_mlp_out, core.drop_path2(self.mlp(self.ln2(x))))


ATTENTIONS: dict[type, Any] = {AttentionCl: HookedChannelsLast, Attention2d: HookedChannelsFirst}
MLPS: dict[type, Any] = {Mlp: PlainMLP, ConvMlp: ConvMLP}
SCALES: dict[type, bool] = {LayerScale: True, LayerScale2d: True, nn.Identity: True}
BLOCKS: dict[type, Any] = {
    MbConvBlock: ConvBlock,
    ConvNeXtBlock: ConvBlock,
    TransformerBlock2d: WholeBlock,
    PartitionAttentionCl: PartitionBlock,
    PartitionAttention2d: PartitionBlock2d,
    ParallelPartitionAttention: ParallelBlock,
}
GROUPS: tuple[type, ...] = (MaxxVitBlock, ParallelMaxxVitBlock, nn.Sequential)  # of blocks, one after the other


def halves(core: Any) -> bool:
    """Whether a block of the library halves the rows and columns of its tokens."""
    return isinstance(core.shortcut, Downsample2d)


def _hook_norm1(core: Any) -> nn.Module:
    """Hook the first norm of a block, which a pooling may come after."""
    if type(core.norm1) is nn.Sequential:
        core.norm1.norm = norm = grid_norm(core.norm1.get_submodule("norm"))
    else:
        core.norm1 = norm = grid_norm(core.norm1)
    return norm


def _tail(scale: nn.Module) -> Tail:
    find_part(SCALES, scale, "scale of a branch")
    return Tail(scale)


def _mlp(core: Any, layout: Layout) -> HookedMLP:
    mlp: HookedMLP = find_part(MLPS, core.mlp, "MLP")(core.mlp, core.mlp.fc1, core.mlp.fc2, tail=_tail(core.ls2))
    lay_out(points_of(mlp), layout)
    return mlp


def _see(windows: tuple[Windows, ...], x: Tensor, layout: Layout) -> None:
    rows, columns = x.shape[1:3] if isinstance(layout, Grid) else x.shape[2:]
    for kind in windows:
        kind.see((rows, columns))


def hook_blocks(owner: nn.Module, name: str) -> Iterator[HookedBlock]:
    """Put hooked blocks in the places of the library's, in the order in which they run."""
    core = getattr(owner, name)
    kind = find_part({**BLOCKS, **dict.fromkeys(GROUPS)}, core, "block")
    if kind is None:
        for below, _ in list(core.named_children()):
            yield from hook_blocks(core, below)
        return
    block = kind(core)
    setattr(owner, name, block)
    yield block
