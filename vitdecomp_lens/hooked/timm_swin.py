"""timm's ``SwinTransformer``: attention in shifted windows, patches merged between stages."""

from typing import Any

import torch
from jaxtyping import Float
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.hooked.attention import Heads
from vitdecomp_lens.hooked.blocks import HookedBlock, TwoBranchBlock
from vitdecomp_lens.hooked.hook_points import CopyingHookPoint, Grid, GridTap, OutputTap, any_hooked, fire, lay_out
from vitdecomp_lens.hooked.mlp import PlainMLP
from vitdecomp_lens.hooked.norms import hooked_norm
from vitdecomp_lens.hooked.registry import Adapter, ImageSpec, Tower, check_methods, find_part, register_adapter
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_attention import TimmPackedAttention
from vitdecomp_lens.hooked.windows import Windows

APART = -100.0  # what the library adds to the scores of tokens that may not attend to each other


class HookedWindowAttention(TimmPackedAttention):
    """timm's ``WindowAttention``.

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

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries, keys and values."""
        qkv = self.core.qkv(x).unflatten(-1, (3, self.heads, -1))  # type: ignore[operator]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def finish_heads(
        self, z: Float[Tensor, "batch token head d_head"], x: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch token head d_head"]:
        """Return the heads' outputs as they are."""
        return z

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
        bias: Tensor = self.core._get_rel_pos_bias()  # type: ignore[operator]
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


class SwinBlock(TwoBranchBlock):
    """timm's ``SwinTransformerBlock``, which runs ``batch row column d_model``; hooks see ``batch token d_model``."""

    def __init__(self, core: Any) -> None:
        windows = Windows(tuple(core.window_size), tuple(core.shift_size))
        super().__init__(
            core,
            ln1=hooked_norm(core.norm1),
            attn=HookedWindowAttention(core.attn, windows),
            ln2=hooked_norm(core.norm2),
            mlp=PlainMLP(core.mlp, core.mlp.fc1, core.mlp.fc2, tail=Tail()),
            drop_path1=core.drop_path1,
            drop_path2=core.drop_path2,
        )
        self.windows = windows
        if core.dynamic_mask:  # the library makes it by writing in place, which cannot be traced
            core.__dict__["get_attn_mask"] = self._mask
        stream = (self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid, self.hook_mlp_out, self.hook_resid_post)
        lay_out(stream, Grid())
        lay_out([module for module in self.ln1.modules() if isinstance(module, HookPoint)], Grid())

    def attention_branch(self, x: Float[Tensor, "batch row column d_model"]) -> Tensor:
        """What the attention adds: the library rolls, cuts and puts together again."""
        self.windows.see((x.shape[1], x.shape[2]))
        out: Tensor = self.core._attn(self.ln1(x))  # type: ignore[operator]
        return out

    def _mask(self, x: Float[Tensor, "batch row column d_model"]) -> Float[Tensor, "window query key"] | None:
        """Keep apart tokens that came to lie in one window only because the image was rolled."""
        if not any(self.windows.shift):
            return None
        regions = [
            (index >= length - window).int() + (index >= length - shift).int()
            for length, window, shift in zip(x.shape[1:3], self.windows.window, self.windows.shift, strict=True)
            for index in [torch.arange(length, device=x.device)]
        ]
        region = (3 * regions[0][:, None] + regions[1]).to(x.dtype)
        (height, width), (rows, columns) = self.windows.window, region.shape
        cut = region.view(rows // height, height, columns // width, width).permute(0, 2, 1, 3)
        cut = cut.reshape(-1, height * width)
        return (cut[:, None] != cut[:, :, None]).to(x.dtype) * APART

    def mlp_branch(self, x: Float[Tensor, "batch row column d_model"]) -> Tensor:
        """What the MLP adds."""
        return self.mlp(self.ln2(x.flatten(1, 2))).unflatten(1, x.shape[1:3])

    def use_split_qkv_input(self, use: bool) -> None:
        """Refuse: the norm acts before the image is cut into windows."""
        HookedBlock.use_split_qkv_input(self, use)


BLOCKS: dict[type, Any] = {SwinTransformerBlock: SwinBlock}
ATTENTIONS: dict[type, Any] = {WindowAttention: HookedWindowAttention}


@register_adapter("timm.models.swin_transformer:SwinTransformer")
class TimmSwinAdapter(Adapter):
    """Hooks timm's Swin transformers."""

    def hook(self, clone: Any) -> Tower:
        """Put hook points into a cloned ``SwinTransformer``."""
        check_methods(clone, SwinTransformer, ("forward_features", "forward_head"))
        parts: dict[str, nn.Module] = {"hook_patch_embed": HookPoint(), "hook_embed": CopyingHookPoint()}
        for point in parts.values():
            clone.patch_embed.register_forward_hook(GridTap(point))  # type: ignore[arg-type]
        blocks: list[HookedBlock] = []
        stages = []
        for stage in clone.layers:
            first = len(blocks)
            for number, core in enumerate(stage.blocks):
                find_part(ATTENTIONS, core.attn, "attention")
                stage.blocks[number] = block = find_part(BLOCKS, core, "block")(core)
                blocks.append(block)
            stages.append(range(first, len(blocks)))
        parts["blocks"] = nn.ModuleList(blocks)
        parts["ln_final"] = clone.norm = hooked_norm(clone.norm)
        lay_out([module for module in clone.norm.modules() if isinstance(module, HookPoint)], Grid())
        parts["hook_representation"] = point = CopyingHookPoint()
        clone.head.drop.register_forward_hook(OutputTap(point))
        tokens = StageGrids(clone.patch_embed, blocks, tuple(stages))
        return Tower(
            module=clone,
            parts=parts,
            blocks=blocks,
            prefix=(),
            image=_image_spec(clone.patch_embed),
            patch_grid=tokens.patches,
            patch_size=tokens.patch_size,
            weights_out=None if clone.num_classes == 0 else Classifier(clone),
            stages=tuple(stages),
            grid_of=tokens,
        )

    def transform(self, original: Any) -> Any:
        """Return timm's evaluation transform for the model's configuration."""
        from timm.data import create_transform, resolve_data_config

        return create_transform(**resolve_data_config({}, model=original), is_training=False)


class StageGrids:
    """Which pixels the tokens of each stage stand for: side by side, each stage's twice as high and wide.

    Args:
        patch_embed: The model's patch embedding.
        blocks: The hooked blocks.
        stages: The numbers of the blocks of each stage.
    """

    def __init__(self, patch_embed: Any, blocks: list[HookedBlock], stages: tuple[range, ...]) -> None:
        self.patch_embed, self.blocks, self.stages = patch_embed, blocks, stages

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        height, width = self.patch_embed.feat_ratio(as_scalar=False)
        return height, width

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.patch_embed.dynamic_feat_size((height, width))
        return rows, columns

    def __call__(self, hook: str, height: int, width: int) -> TokenGrid:
        """Return the tokens of the value at a hook."""
        path = hook.split(".")
        number = int(path[1]) if path[0] == "blocks" else None
        merged = 2 ** next((stage for stage, numbers in enumerate(self.stages) if number in numbers), 0)
        rows, columns = (-(-length // merged) for length in self.patches(height, width))
        prefix: tuple[str, ...] = ()
        if number is not None and path[2] == "attn":
            padding = self.blocks[number].windows.padding((rows, columns))  # type: ignore[union-attr, operator]
            prefix = tuple(f"pad{token}" for token in range(padding))
        size = self.patch_size
        return TokenGrid(rows, columns, (rows * merged * size[0], columns * merged * size[1]), prefix)


class Classifier:
    """The classifier's weights, live."""

    def __init__(self, tower: Any) -> None:
        self.head = tower.head.fc

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return ``W_U`` [d_rep, class] and ``b_U`` [class]."""
        weight = self.head.weight
        return weight.T, torch.zeros_like(weight[:, 0]) if self.head.bias is None else self.head.bias


def _image_spec(patch_embed: Any) -> ImageSpec:
    channels = patch_embed.proj.in_channels
    if patch_embed.strict_img_size:
        return ImageSpec(channels, tuple(patch_embed.img_size))
    multiple = (1, 1) if patch_embed.dynamic_img_pad else tuple(patch_embed.feat_ratio(as_scalar=False))
    return ImageSpec(channels, None, multiple)
