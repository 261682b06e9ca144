"""Token grids of models whose tokens are merged between stages."""

from collections.abc import Callable, Sequence

from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.hooked.blocks import HookedBlock

Size = tuple[int, int]
EMBEDDINGS = ("hook_patch_embed", "hook_embed", "hook_full_embed")


class StageGrids:
    """Which pixels the tokens of each stage stand for: side by side, and in each stage larger than before.

    Args:
        patches: From height and width of an image to rows and columns of patches.
        patch_size: Height and width of a patch in pixels.
        blocks: The hooked blocks.
        stages: The numbers of the blocks of each stage.
        merged: How many rows and columns of patches a token of each stage stands for; unless said, twice as many as in
            the stage before.
    """

    def __init__(
        self,
        patches: Callable[[Size], Sequence[int]],
        patch_size: Sequence[int],
        blocks: Sequence[HookedBlock],
        stages: tuple[range, ...],
        merged: Sequence[Size] | None = None,
    ) -> None:
        self._patches, self.blocks, self.stages = patches, blocks, stages
        self._merged = tuple(merged or [(2**stage, 2**stage) for stage in range(len(stages))])
        self.patch_size: Size = (patch_size[0], patch_size[1])

    def patches(self, height: int, width: int) -> Size:
        """Rows and columns of patches."""
        rows, columns = self._patches((height, width))
        return rows, columns

    def __call__(self, hook: str, height: int, width: int) -> TokenGrid:
        """Return the tokens of the value at a hook."""
        path = hook.split(".")
        number = int(path[1]) if path[0] == "blocks" else None
        stage = self._stage(number, hook if number is None else ".".join(path[2:]))
        down, right = (1, 1) if stage is None else self._merged[stage]
        rows, columns = self.patches(height, width)
        rows, columns = -(-rows // down), -(-columns // right)
        prefix: tuple[str, ...] = ()
        if number is not None and path[2] == "attn":
            prefix = tuple(f"pad{token}" for token in range(self.blocks[number].padding(rows, columns)))
        height, width = self.patch_size
        return TokenGrid(rows, columns, (rows * down * height, columns * right * width), prefix)

    def _stage(self, number: int | None, hook: str) -> int | None:
        """Of which stage the tokens at a hook are; behind the blocks, of the last, and before any, None."""
        if number is None:
            return None if hook in EMBEDDINGS else len(self.stages) - 1
        stage = next(stage for stage, numbers in enumerate(self.stages) if number in numbers)
        stage -= self.blocks[number].is_before_merging(hook)
        return None if stage < 0 else stage
