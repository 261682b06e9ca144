"""What all of timm's families share: their transform of photographs, and their classifiers."""

from typing import Any

import torch
from jaxtyping import Float
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from vitdecomp_lens.hooked.mlp import bias_or_zeros
from vitdecomp_lens.hooked.registry import Adapter


class TimmAdapter(Adapter):
    """Hooks a family of timm's."""

    def transform(self, original: Any, size: tuple[int, int] | None) -> Any:
        """Return timm's evaluation transform for the model's configuration, and its images' size."""
        options = {} if size is None else {"input_size": (getattr(original, "in_chans", 3), *size)}
        return create_transform(**resolve_data_config(options, model=original), is_training=False)


class Classifier:
    """The classifier's weights, live; the mean of both classifiers of a distilled model.

    Args:
        *layers: Linear layers, or convolutions of 1 × 1.
    """

    def __init__(self, *layers: Any) -> None:
        self.layers = layers

    def __call__(self) -> tuple[Float[Tensor, "d_rep class"], Float[Tensor, "class"]]:
        """Return ``W_U`` and ``b_U``."""
        weights = torch.stack([layer.weight.flatten(1).T for layer in self.layers]).mean(0)
        return weights, torch.stack([bias_or_zeros(layer) for layer in self.layers]).mean(0)
