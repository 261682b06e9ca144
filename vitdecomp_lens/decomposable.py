"""What a model has to say of itself to be decomposed."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.components import By, Point, TokenGrid
from vitdecomp_lens.coverage import Stop


@runtime_checkable
class Decomposable(Protocol):
    """What a model has to say of itself to be decomposed: where its components are read.

    `HookedViT` says it. ``hook_dict`` holds TransformerLens hook points by name, and calling the model passes
    them.
    """

    @property
    def hook_dict(self) -> Mapping[str, HookPoint]:
        """Hook points by name; none where the graph itself is run."""

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

    def token_order(self, hook: str) -> tuple[int, ...] | None:
        """For each token of the grid, which of the value's at a hook it is; None where they lie in the grid's order."""

    @property
    def branches(self) -> int:
        """How many attention, MLP and convolution branches there are."""

    @property
    def stops(self) -> tuple[Stop, ...]:
        """Behind what branches are hidden that no component can be told apart of."""
