"""What TransformerLens' tools take for granted, checked: one residual stream, and heads and neurons that add to it."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked.norms import HookedNorm
from vitdecomp_lens.hooked.registry import Tower

ANY_MODEL = "decompose(model, images) and attribute(model, images, directions) take any model"


def check_stream(tower: Tower, tool: str) -> None:
    """Refuse models whose stream is not the same tokens, of one width, in all blocks.

    Raises:
        InputError: Saying what to use instead of the tool.
    """
    if tower.grid_of is not None:
        raise InputError(
            f"{tool} takes the residual stream for the same tokens, of one width, in all blocks; in this model later "
            f"blocks have other tokens or another width. {ANY_MODEL}, by layer, head or neuron; hooks, run_with_cache "
            f"and patching at one hook do, too."
        )


def check_heads(tower: Tower, tool: str) -> None:
    """Refuse models of which ``hook_z @ W_O`` is not what heads add to the stream.

    Raises:
        InputError: Saying what to use instead of the tool.
        UnsupportedModelError: If an output projection does more than its weights say.
    """
    check_stream(tower, tool)
    for block in tower.blocks:
        attn: Any = block.attn  # raises where it is not one, and says why
        _ = block.submodules  # raises where a norm stands behind it
        attn.check_result()


def check_neurons(tower: Tower, tool: str) -> None:
    """Refuse models of which ``hook_post @ W_out`` is not what neurons add to the stream.

    Raises:
        InputError: Saying what to use instead of the tool.
    """
    check_stream(tower, tool)
    for block in tower.blocks:
        _ = block.mlp, block.submodules  # either raises, and says why


def check_final_norm(tower: Tower, tool: str) -> None:
    """Refuse models of which the read-out is not one norm and then linear.

    Raises:
        InputError: Saying what stands there instead.
    """
    check_stream(tower, tool)
    parts = tower.parts
    if not isinstance(parts.get("ln_final"), HookedNorm):
        raise InputError(f"{tool} needs a final norm, and this model has none. {ANY_MODEL}.")
    for part, what in _NOT_LINEAR.items():
        if part in parts:
            raise InputError(
                f"{tool} takes what comes after the final norm for linear; this model has {what} there. {ANY_MODEL}: "
                f"they freeze it at each image."
            )


_NOT_LINEAR = {
    "attn_pool": "an attention pool",
    "attn_pool_contrastive": "an attention pool",
    "ln_pooled": "a second norm",
}


@dataclass(frozen=True)
class Unembedding:
    """The map from representation to output.

    Attributes:
        W_U: Its weights.
        b_U: Its bias.
    """

    W_U: Float[Tensor, "d_rep output"]
    b_U: Float[Tensor, "output"]  # noqa: N815

    def __call__(self, representation: Float[Tensor, "*axes d_rep"]) -> Float[Tensor, "*axes output"]:
        """Apply it."""
        return representation @ self.W_U + self.b_U

    def behind(self, norm: HookedNorm) -> "Unembedding":
        """The same map read before a norm's gain γ and shift β: ``γ ⊙ W_U`` and ``b_U + β W_U``."""
        weight = self.W_U if norm.w is None else norm.w.unsqueeze(-1) * self.W_U
        return Unembedding(weight, self.b_U if norm.b is None else self.b_U + norm.b @ self.W_U)
