"""What a compiled cut can be asked: one interface, a fast way (``program.py``) and a slow one (``slow.py``)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node


class CompiledCut(ABC):
    """From the values at the points of a cut to their contributions along given directions.

    Attributes:
        points: Names of the points that are read.
        leaves: Nodes whose values `weights` needs.
        constants: Names of what no image changes, each once.
        directions: How many directions are read.
        dtype: In which contributions are computed: at least float32.
        device: Where.
    """

    points: tuple[str, ...]
    leaves: Sequence[Node]
    constants: tuple[str, ...]
    directions: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def kept_rows(self, point: str) -> tuple[int, int, int] | None:
        """Which part of a point's value some path reads: a dimension, the first row and how many; None for all."""

    @abstractmethod
    def keep(self, point: str, value: Tensor) -> Tensor:
        """The part of a point's value that some path reads; a small part is copied so that the rest is freed."""

    @abstractmethod
    def weights(self, leaves: Mapping[Node, Any], batch: int) -> Any:
        """The frozen map at one batch, from the values of ``leaves``: what the methods below take as ``weights``."""

    @abstractmethod
    def contributions(
        self, kept: Mapping[str, Tensor], weights: Any, batch: int, *, only: Iterable[str] | None = None
    ) -> dict[str, Float[Tensor, "split batch direction"]]:
        """What each point writes along each direction, from the parts of its value that `keep` gave."""

    @abstractmethod
    def shifted(self, weights: Any, batch: int) -> Float[Tensor, "constant batch direction"]:
        """What each constant writes along each direction."""

    @abstractmethod
    def by_token(
        self,
        point: str,
        kept: Tensor,
        weights: Any,
        out: Float[Tensor, "split batch token direction"],
        *,
        token_axis: int = 1,
    ) -> None:
        """Write what a point writes from each of its tokens along each direction into ``out``.

        Args:
            point: Name of the point.
            kept: What `keep` gave for it.
            weights: What `weights` gave.
            out: Where to write; its number of tokens is that of the point's value.
            token_axis: The first axis of the point's value that runs over tokens.
        """
