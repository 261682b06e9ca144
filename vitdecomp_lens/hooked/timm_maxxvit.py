"""timm's ``MaxxVit``: convolutions, then attention in windows and spread-out grids (MaxViT) or in whole (CoAtNet)."""

from math import lcm
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import ClassifierHead, NormMlpClassifierHead
from timm.models.maxxvit import MaxxVit, MaxxVitStage, Stem
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.errors import UnsupportedModelError
from vitdecomp_lens.hooked.blocks import HookedBlock
from vitdecomp_lens.hooked.hook_points import CopyingHookPoint, Grid, GridTap, OutputTap
from vitdecomp_lens.hooked.registry import ImageSpec, Tower, check_methods, find_part, register_adapter
from vitdecomp_lens.hooked.stages import StageGrids
from vitdecomp_lens.hooked.timm_adapter import Classifier, TimmAdapter
from vitdecomp_lens.hooked.timm_maxxvit_blocks import WholeBlock, grid_norm, hook_blocks

STEM_STRIDE = 2
BEHIND_ACTIVATION = (
    "This model has no linear map from its representation to its output: an activation function (tanh) stands between "
    "the two. Its representation is what enters that. explain reads logits; so do, for one image, directions of "
    "model.unembedding_at(cache['hook_representation'][0])."
)


@register_adapter("timm.models.maxxvit:MaxxVit")
class TimmMaxxVitAdapter(TimmAdapter):
    """Hooks timm's MaxViT, MaxxViT and CoAtNet models."""

    def hook(self, clone: Any) -> Tower:
        """Put hook points into a cloned ``MaxxVit``."""
        check_methods(clone, MaxxVit, ("forward", "forward_features", "forward_head"))
        find_part({Stem: None}, clone.stem, "stem")
        parts: dict[str, nn.Module] = {"hook_patch_embed": HookPoint(), "hook_embed": CopyingHookPoint()}
        for point in parts.values():
            clone.stem.register_forward_hook(GridTap(point, channels_first=True))  # type: ignore[arg-type]
        blocks: list[HookedBlock] = []
        stages = []
        for stage in clone.stages:
            find_part({MaxxVitStage: None}, stage, "stage")
            first = len(blocks)
            blocks += hook_blocks(stage, "blocks")
            stages.append(range(first, len(blocks)))
        if not any(block.attentions for block in blocks):
            raise UnsupportedModelError(
                "This MaxxVit has no attention, only convolutions. vitdecomp_lens.trace works for any module."
            )
        parts["blocks"] = nn.ModuleList(blocks)
        pooled, hidden = _hook_read_out(clone, parts), _has_hidden_layer(clone.head)
        merged = [(2 ** (stage + 1),) * 2 for stage in range(len(stages))]
        tokens = StageGrids(_stem_grid, (STEM_STRIDE, STEM_STRIDE), blocks, tuple(stages), merged)
        tower = Tower(
            module=clone,
            parts=parts,
            blocks=blocks,
            prefix=(),
            image=_image_spec(clone, blocks, tuple(stages)),
            patch_grid=tokens.patches,
            patch_size=tokens.patch_size,
            weights_out=None if hidden or clone.num_classes == 0 else Classifier(clone.head.fc),
            pooled=pooled,
            stages=tuple(stages),
            grid_of=tokens,
        )
        if hidden:
            tower.curved, tower.no_weights_out = True, BEHIND_ACTIVATION
            tower.frozen_weights_out = None if clone.num_classes == 0 else FrozenClassifier(clone.head)
        return tower


class Pooled:
    """``batch 1 1 d_model``: one token, in a row and a column."""

    def show(self, value: Float[Tensor, "batch 1 1 width"]) -> Float[Tensor, "batch width"]:
        """Drop row and column."""
        return value.flatten(1)

    def restore(self, shown: Float[Tensor, "batch width"], like: Tensor) -> Float[Tensor, "batch 1 1 width"]:
        """Put row and column back."""
        return shown[:, None, None]


def _hook_read_out(clone: Any, parts: dict[str, nn.Module]) -> bool:
    """Hook the last norm and the representation; say whether that norm comes after pooling."""
    head = clone.head
    find_part({ClassifierHead: None, NormMlpClassifierHead: None}, head, "head")
    in_head = isinstance(head, NormMlpClassifierHead)
    pooled = in_head and not head.use_conv
    owner = head if in_head else clone
    parts["ln_final"] = owner.norm = grid_norm(owner.norm, Pooled() if pooled else Grid())
    parts["hook_representation"] = point = CopyingHookPoint()
    last = head.pre_logits.fc if _has_hidden_layer(head) else head.drop
    last.register_forward_hook(OutputTap(point))
    return pooled


class FrozenClassifier:
    """The classifier behind an activation function f of the representation h, frozen as the factor f(h) / h."""

    def __init__(self, head: Any) -> None:
        self.classifier, self.activation = Classifier(head.fc), head.pre_logits.act

    def __call__(self, representation: Float[Tensor, "d_rep"]) -> tuple[Tensor, Tensor]:
        """Return weights [d_rep, class] and biases [class] at one representation."""
        weight, bias = self.classifier()
        moved = representation != 0
        factor = torch.where(moved, self.activation(representation) / representation.where(moved, 1), 0)
        return factor[:, None] * weight, bias


def _has_hidden_layer(head: Any) -> bool:
    return bool(getattr(head, "hidden_size", None))


def _stem_grid(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns behind the stem, which pads."""
    return -(-size[0] // STEM_STRIDE), -(-size[1] // STEM_STRIDE)


def _image_spec(clone: Any, blocks: list[HookedBlock], stages: tuple[range, ...]) -> ImageSpec:
    """What sizes of images there is a position bias for, and that windows divide."""
    channels = clone.stem.conv1.in_channels
    if any(isinstance(block, WholeBlock) and block.has_positions for block in blocks):
        return ImageSpec(channels, tuple(clone.img_size))
    multiples = [(STEM_STRIDE * 2 ** len(stages),) * 2]
    for number, stage in enumerate(stages):
        stride = STEM_STRIDE * 2 ** (number + 1)
        for block in (blocks[index] for index in stage):
            windows = getattr(block, "windows", ())
            multiples += [(stride * w.window[0], stride * w.window[1]) for w in windows]
    rows, columns = zip(*multiples, strict=True)
    return ImageSpec(channels, None, (lcm(*rows), lcm(*columns)))
