"""timm's ``SwinTransformer``: attention in shifted windows, patches merged between stages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from timm.layers import ClassifierHead, PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.hooked.blocks import HookedBlock, TwoBranchBlock
from vitdecomp_lens.hooked.hook_points import CopyingHookPoint, Grid, GridTap, OutputTap, any_hooked, fire, lay_out
from vitdecomp_lens.hooked.norms import hooked_norm
from vitdecomp_lens.hooked.registry import ImageSpec, Tower, check_methods, find_part, register_adapter
from vitdecomp_lens.hooked.stages import StageGrids
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_adapter import Classifier, TimmAdapter
from vitdecomp_lens.hooked.timm_attention import TimmPlainAttention
from vitdecomp_lens.hooked.timm_columns import hook_mlp
from vitdecomp_lens.hooked.windows import Size, Windows

# Attention -----------------------------------------------------------------------------------------------------------


class HookedWindowAttention(TimmPlainAttention):
    """timm's ``WindowAttention``, and what all kinds of it share.

    ``hook_q``, ``hook_k``, ``hook_v``, ``hook_z`` and ``hook_result`` are ``batch token head d_head`` over the whole
    image, whatever the windows; ``hook_attn_scores`` and ``hook_pattern`` are ``batch·window head query key``, in the
    order in which the library cuts the (rolled) image, window by window.

    Args:
        core: The (cloned) attention.
        windows: How the image lies in windows.
    """

    def __init__(self, core: nn.Module, windows: Windows) -> None:
        super().__init__(core)
        self._mask: Tensor | None = None
        self._windows = windows
        lay_out((self.hook_q, self.hook_k, self.hook_v, self.hook_z), windows)

    def use_result(self, use: bool) -> None:
        """Add or remove ``hook_result``."""
        super().use_result(use)
        if use:
            lay_out((self.hook_result,), self._windows)

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as they are."""
        return q, k

    def score_bias(self) -> Float[Tensor, "*#batch head query key"]:
        """The bias by relative position."""
        bias: Tensor = self.core._get_rel_pos_bias()  # type: ignore[operator]
        return bias

    def run(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Stand in for the library's ``forward``: the library's own while no hook is in use."""
        points = (*self._points, *([self.hook_result] if "hook_result" in self._modules else []))
        if not any_hooked(points):
            out: Tensor = type(self.core).forward(self.core, x, mask)
            return out
        self._mask = mask
        try:
            return self.branch(self.head_outputs(x, None))
        finally:
            self._mask = None

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch head query d_head"]:
        """Mix values by the pattern, whose scores have a bias by relative position, and a mask in shifted windows."""
        bias = self.score_bias()
        if self.fused and not any_hooked((self.hook_attn_scores, self.hook_pattern)):
            mask = bias if self._mask is None else bias + self._of_each_window(q)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = self.score(q, k) + bias
        scores = scores if self._mask is None else scores + self._of_each_window(q)
        scores = fire(self.hook_attn_scores, scores)
        return fire(self.hook_pattern, self.drop(scores.softmax(-1))) @ v

    def _of_each_window(self, q: Tensor) -> Float[Tensor, "batch head query key"]:
        """The mask of each window, for every image and head."""
        assert self._mask is not None
        windows, tokens = self._mask.shape[:2]
        whole = self._mask.view(1, windows, 1, tokens, tokens)
        return whole.expand(q.shape[0] // windows, -1, self.heads, -1, -1).reshape(-1, self.heads, tokens, tokens)


# Blocks --------------------------------------------------------------------------------------------------------------


class WindowBlock(TwoBranchBlock):
    """A block with attention in windows, run on ``batch row column d_model``; hooks see ``batch token d_model``.

    Attributes:
        library: The library's class.
        relied_on: The library's methods that a subclass of it must not override; the first attends in windows.
        attention_classes: How the attention is hooked, by its class.

    Args:
        core: The (cloned) block.
    """

    library: ClassVar[type[nn.Module]]
    relied_on: ClassVar[tuple[str, ...]] = ("_attn", "get_attn_mask")
    attention_classes: ClassVar[Mapping[type, Callable[[nn.Module, Windows], HookedWindowAttention]]]

    def __init__(self, core: Any) -> None:
        check_methods(core, self.library, self.relied_on)
        windows = Windows(tuple(core.window_size), tuple(core.shift_size))
        super().__init__(
            core,
            ln1=hooked_norm(core.norm1),
            attn=find_part(dict(self.attention_classes), core.attn, "attention")(core.attn, windows),
            ln2=hooked_norm(core.norm2),
            mlp=hook_mlp(core.mlp, Tail()),
            drop_path1=core.drop_path1,
            drop_path2=core.drop_path2,
        )
        self.windows = windows
        if core.dynamic_mask:  # the library makes it by writing in place, which cannot be traced
            core.__dict__["get_attn_mask"] = windows.keep_apart
        stream = (self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid, self.hook_mlp_out, self.hook_resid_post)
        lay_out(stream, Grid())
        show_as_tokens(self.ln1)

    def attend(self, x: Float[Tensor, "batch row column d_model"]) -> Tensor:
        """Attend in windows: the library rolls, cuts and puts together again."""
        self.windows.see((x.shape[1], x.shape[2]))
        out: Tensor = getattr(self.core, self.relied_on[0])(x)
        return out

    def attention_branch(self, x: Float[Tensor, "batch row column d_model"]) -> Tensor:
        """What the attention adds."""
        return self.attend(self.ln1(x))

    def mlp_branch(self, x: Float[Tensor, "batch row column d_model"]) -> Tensor:
        """What the MLP adds."""
        return self.mlp(self.ln2(x.flatten(1, 2))).unflatten(1, x.shape[1:3])

    def padding(self, rows: int, columns: int) -> int:
        """How many tokens of padding the attention sees."""
        return self.windows.padding((rows, columns))

    def use_split_qkv_input(self, use: bool) -> None:
        """Refuse: the image is cut into windows between the stream and the heads."""
        HookedBlock.use_split_qkv_input(self, use)


class SwinBlock(WindowBlock):
    """timm's ``SwinTransformerBlock``."""

    library = SwinTransformerBlock
    attention_classes: ClassVar = {WindowAttention: HookedWindowAttention}


def show_as_tokens(norm: nn.Module) -> None:
    """Let the hooks of a norm that acts on rows and columns see tokens."""
    lay_out([module for module in norm.modules() if isinstance(module, HookPoint)], Grid())


# The whole -----------------------------------------------------------------------------------------------------------


class WindowAdapter(TimmAdapter):
    """Hooks models whose blocks attend in windows, and whose stages begin by merging patches.

    Attributes:
        library: The library's class of the model.
        embedding: That of its patch embedding.
        stage: That of its stages.
        merging: That of what merges patches.
        blocks: How a block is hooked, by its class.
        patches_channels_first: Whether patches are embedded as ``batch d_model row column``.
    """

    library: ClassVar[type[nn.Module]]
    embedding: ClassVar[type[nn.Module]] = PatchEmbed
    stage: ClassVar[type[nn.Module]]
    merging: ClassVar[type[nn.Module]]
    blocks: ClassVar[dict[type, Callable[[Any], HookedBlock]]]
    patches_channels_first: ClassVar[bool] = False

    def stages(self, clone: Any) -> Iterable[Any]:
        """Return the model's stages."""
        found: Iterable[Any] = clone.layers
        return found

    def patches(self, embed: Any) -> Callable[[Size], Sequence[int]]:
        """Return the way from height and width of an image to rows and columns of patches."""
        ways: Callable[[Size], Sequence[int]] = embed.dynamic_feat_size
        return ways

    def hook_final_norm(self, clone: Any, blocks: list[HookedBlock]) -> nn.Module:
        """Hook the norm behind the blocks and return it."""
        clone.norm = norm = hooked_norm(clone.norm)
        return norm

    def hook(self, clone: Any) -> Tower:
        """Put hook points into a cloned model."""
        check_methods(clone, self.library, ("forward_features", "forward_head"))
        find_part({self.embedding: None}, clone.patch_embed, "patch embedding")
        find_part({ClassifierHead: None}, clone.head, "head")
        parts: dict[str, nn.Module] = {"hook_patch_embed": HookPoint(), "hook_embed": CopyingHookPoint()}
        for point in parts.values():
            tap = GridTap(point, channels_first=self.patches_channels_first)  # type: ignore[arg-type]
            clone.patch_embed.register_forward_hook(tap)
        blocks, stages = self._hook_blocks(clone)
        parts["blocks"] = nn.ModuleList(blocks)
        parts["ln_final"] = norm = self.hook_final_norm(clone, blocks)
        show_as_tokens(norm)
        parts["hook_representation"] = representation = CopyingHookPoint()
        clone.head.drop.register_forward_hook(OutputTap(representation))
        tokens = StageGrids(self.patches(clone.patch_embed), clone.patch_embed.patch_size, blocks, stages)
        return Tower(
            module=clone,
            parts=parts,
            blocks=blocks,
            prefix=(),
            image=_image_spec(clone.patch_embed),
            patch_grid=tokens.patches,
            patch_size=tokens.patch_size,
            weights_out=None if isinstance(clone.head.fc, nn.Identity) else Classifier(clone.head.fc),
            stages=stages,
            grid_of=tokens,
        )

    def _hook_blocks(self, clone: Any) -> tuple[list[HookedBlock], tuple[range, ...]]:
        """Hook the blocks of each stage. Every stage but the first has to begin by merging patches."""
        blocks: list[HookedBlock] = []
        stages = []
        for stage in self.stages(clone):
            find_part({self.stage: None}, stage, "stage")
            find_part({self.merging if blocks else nn.Identity: None}, stage.downsample, "merging of patches")
            first = len(blocks)
            for number, core in enumerate(stage.blocks):
                stage.blocks[number] = block = find_part(self.blocks, core, "block")(core)
                blocks.append(block)
            stages.append(range(first, len(blocks)))
        return blocks, tuple(stages)


@register_adapter("timm.models.swin_transformer:SwinTransformer")
class TimmSwinAdapter(WindowAdapter):
    """Hooks timm's Swin transformers."""

    library = SwinTransformer
    stage = SwinTransformerStage
    blocks: ClassVar = {SwinTransformerBlock: SwinBlock}
    merging = PatchMerging


def _image_spec(patch_embed: Any) -> ImageSpec:
    channels = patch_embed.proj.in_channels
    if patch_embed.strict_img_size:
        return ImageSpec(channels, tuple(patch_embed.img_size))
    padded = getattr(patch_embed, "dynamic_img_pad", False)
    return ImageSpec(channels, None, (1, 1) if padded else tuple(patch_embed.patch_size))
