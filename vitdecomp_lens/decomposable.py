"""What a model has to say of itself to be decomposed."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.components import By, Point, TokenGrid


@runtime_checkable
class Decomposable(Protocol):
    """What a model has to say of itself to be decomposed: where its components are read.

    `HookedViT` says it. ``hook_dict`` holds TransformerLens hook points by name, and calling the model passes
    them.
    """

    hook_dict: dict[str, HookPoint]

    def __call__(self, images: Tensor) -> Any:
        """Run the model."""

    def component_points(self, by: By) -> tuple[Point, ...]:
        """Where components are read."""

    def token_points(self, by: By) -> tuple[Point, ...]:
        """Where components are read by token."""

    def token_grid(self, images: Tensor, hook: str) -> TokenGrid:
        """Which pixels each token stands for of the value at a hook."""

    def check_images(self, images: Any) -> None:
        """Raise `InputError` for images that the model cannot take."""

    @property
    def branches(self) -> int:
        """How many attention, MLP and convolution branches there are."""
