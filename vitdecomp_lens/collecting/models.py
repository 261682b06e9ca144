"""What collecting asks of the two models: who they are, how they preprocess, and what the CLIP makes of images."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.clip.text_embedding import space_of
from vitdecomp_lens.collecting.pictures import Preprocess, Preprocessor
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked import HookedViT

__all__ = ["Eye", "preprocess_of"]


def preprocess_of(model: nn.Module, given: Preprocess | None) -> Preprocess:
    """How a model's pictures are preprocessed.

    Raises:
        InputError: If nobody says it.
    """
    own: Any = given or getattr(model, "preprocess", None)
    if not callable(own):
        raise InputError(
            f"Expected preprocess=, a function from a list of PIL images to a batch, because {type(model).__name__} "
            f"has none of its own. Or wrap a model of timm or open_clip: HookedViT(model)."
        )
    found: Preprocess = own
    return found


@dataclass(frozen=True)
class Eye:
    """The image tower whose embeddings contributions are aligned to.

    Attributes:
        tower: The tower.
        space: Which space its embeddings live in.
        is_model: Whether it is the very model that is decomposed, whose representation is the embedding.
    """

    tower: HookedViT
    space: str
    is_model: bool

    @classmethod
    def of(cls, clip: nn.Module, model: nn.Module, *, of: str, space: str | None) -> "Eye":
        """The image tower of a CLIP.

        Args:
            clip: A whole CLIP, or the hooked tower of one.
            model: What is decomposed.
            of: What of it is decomposed.
            space: The name of the space; a whole CLIP says it itself.

        Raises:
            InputError: If the space has no name.
            UnsupportedModelError: If the CLIP has no image tower with an adapter.
        """
        if space is None and not callable(getattr(clip, "encode_text", None)):
            raise InputError(
                "Expected clip= as a whole CLIP, whose weights name its space, or the name itself as space=, the same "
                f"that the text bank has; got {type(clip).__name__} alone."
            )
        tower = clip if isinstance(clip, HookedViT) else HookedViT(clip)
        same = isinstance(model, HookedViT) and tower.original is model.original
        return cls(tower, space_of(clip) if space is None else space, same and of == "representation")

    def preprocessor(self) -> Preprocessor:
        """The tower's own."""
        return Preprocessor(self.tower.preprocess)

    def __call__(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch d_clip"]:
        """The embeddings, not normalised."""
        with torch.no_grad():
            found: Tensor = self.tower(images)
        return found
