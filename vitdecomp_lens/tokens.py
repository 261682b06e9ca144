"""Scores by token: how much of a component's score came from each token of the sequence it reads.

A model has one token grid (a plain vision transformer) or several (one a stage); components that share a grid
stand in one `TokenBlock`, what has no tokens (constants) stands beside them. For scores without tokens use
`vitdecomp_lens.decomposition.Attribution`, which is smaller by the number of tokens.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens import storage
from vitdecomp_lens.components import Component, TokenGrid
from vitdecomp_lens.coverage import Coverage
from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.gap import Checked, summed
from vitdecomp_lens.labelled import said_of_all
from vitdecomp_lens.selecting import (
    Names,
    Numbers,
    chosen,
    position,
    positions_of,
    refuse_duplicates,
    rows_of_batch,
    summary,
    taken,
)
from vitdecomp_lens.token_block import PixelMode, TokenBlock, describe_grid, over_pixels

__all__ = ["PixelMode", "TokenAttribution", "TokenBlock"]


@dataclass(frozen=True, eq=False, repr=False)
class TokenAttribution(Checked):
    """The score of every component and token along every direction, for every image.

    Attributes:
        blocks: One block a token grid.
        untokened: The components that no token owns, such as constants; it may be empty. What is said of the whole
            (total, completeness, coverage, metadata) is not repeated in it.
        total: The scores of what the model itself computed.
        complete: Whether the components are all there are, so that their sum has to be the total.
        coverage: How much of the model the components tell apart.
        metadata: Anything that JSON holds: model, cut, data set.

    Raises:
        InputError: Where batches, directions or labels of the blocks do not fit each other.

    Example:
        >>> block = TokenBlock(torch.ones(1, 1, 4, 1), ("L0H0",), TokenGrid(2, 2, (8, 8)))
        >>> constants = Attribution(torch.ones(1, 1, 1), ("head.bias",))
        >>> tokens = TokenAttribution((block,), constants, total=torch.tensor([[5.0]]))
        >>> tokens.gap, tokens.sum_tokens()["L0H0"]
        (tensor([0.]), tensor([[4.]]))
        >>> tokens.to_pixels(4, 4)[0, 0, 0, 0]
        tensor([1., 1., 1., 1.])
    """

    blocks: tuple[TokenBlock, ...]
    untokened: Attribution
    total: Float[Tensor, "batch direction"] | None = None
    _: KW_ONLY
    complete: bool = True
    coverage: Coverage | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    _axis: ClassVar[str] = "direction"

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        expected = tuple(self.untokened.values.shape[1:])
        shapes: dict[str, tuple[int, ...]] = {
            f"block {i}": (b.values.shape[1], b.values.shape[3]) for i, b in enumerate(self.blocks)
        }
        if self.total is not None:
            shapes["the total"] = tuple(self.total.shape)
        for what, shape in shapes.items():
            if tuple(shape) != expected:
                raise InputError(
                    f"Expected one batch and one set of directions; the untokened components have (batch, direction) = "
                    f"{expected}, {what} has {tuple(shape)}."
                )
        alone = replace(self.untokened, total=None, complete=False, coverage=None, metadata={})
        object.__setattr__(self, "untokened", alone)
        refuse_duplicates([c.label for c in (*self.components, *self.untokened.components)])
        object.__setattr__(self, "metadata", storage.as_json("metadata", dict(self.metadata)))

    # ---- looking

    @property
    def components(self) -> tuple[Component, ...]:
        """The components that have tokens, block by block."""
        return tuple(component for block in self.blocks for component in block.components)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the components that have tokens, block by block."""
        return tuple(component.label for component in self.components)

    @property
    def directions(self) -> tuple[str, ...] | None:
        """A name for each direction, where they have names."""
        return self.untokened.directions

    @property
    def values(self) -> Float[Tensor, "component batch token direction"]:
        """The scores of the only block. Raises an InputError where there are several."""
        return self._only_block().values

    @property
    def grid(self) -> TokenGrid:
        """The grid of the only block. Raises an InputError where there are several."""
        return self._only_block().grid

    def _only_block(self) -> TokenBlock:
        if len(self.blocks) != 1:
            listed = "; ".join(f"{describe_grid(b.grid)}: {summary(b.components)}" for b in self.blocks)
            raise InputError(
                f"Expected one token grid; there are {len(self.blocks)} ({listed or 'none'}). Read .blocks[i].values, "
                f"or select components of one grid first."
            )
        return self.blocks[0]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return positions_of(self.components)

    def __len__(self) -> int:
        return len(self.components)

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __contains__(self, label: object) -> bool:
        return (label.label if isinstance(label, Component) else label) in self._positions

    def __getitem__(self, label: str | Component) -> Float[Tensor, "batch token direction"]:
        if label in self.untokened:
            label = label.label if isinstance(label, Component) else label
            raise UnknownNameError(f"The component {label!r} has no tokens; read .untokened[{label!r}].")
        row = position(self._positions, label)
        for block in self.blocks:
            if row < len(block):
                break
            row -= len(block)
        return block.values[row]

    def __repr__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        total = "without" if self.total is None else "with"
        inside = [*map(repr, self.blocks), f"without tokens: {summary(self.untokened.components)}"]
        return "\n  ".join([f"TokenAttribution({state}, {total} total:", *inside]) + ")"

    def sum_tokens(self) -> Attribution:
        """The scores of the components: each summed over its tokens, and then those without tokens."""
        summed_blocks = [block.sum_tokens().to(block.values.dtype) for block in self.blocks]
        return Attribution(
            values=torch.cat([*summed_blocks, self.untokened.values]),
            components=(*self.components, *self.untokened.components),
            total=self.total,
            directions=self.directions,
            complete=self.complete,
            coverage=self.coverage,
            metadata=self.metadata,
        )

    def _summed(self) -> Float[Tensor, "batch direction"]:
        # Not by way of sum_tokens(), which rounds to the dtype of the values.
        result = summed(self.untokened.values)
        for block in self.blocks:
            result = result + summed(block.sum_tokens())
        return result

    def _dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.untokened.values.dtype, *(block.values.dtype for block in self.blocks))

    # ---- other token attributions

    def select(
        self,
        *,
        labels: Names | None = None,
        kind: Names | None = None,
        layer: Numbers | None = None,
        head: Numbers | None = None,
        neuron: Numbers | None = None,
        name: Names | None = None,
    ) -> "TokenAttribution":
        """Keep the components that meet every criterion, as `Attribution.select` does; empty blocks go.

        Raises:
            UnknownNameError: Where nothing meets the criteria, or a label is unknown.
        """
        everything = (*self.components, *self.untokened.components)
        criteria = {"kind": kind, "layer": layer, "head": head, "neuron": neuron, "name": name}
        rows = chosen(everything, labels, criteria)
        blocks, first = [], 0
        for block in self.blocks:
            here = [row - first for row in rows if first <= row < first + len(block)]
            if here:
                blocks.append(block.take(here))
            first += len(block)
        here = [row - first for row in rows if row >= first]
        untokened = replace(
            self.untokened,
            values=taken(self.untokened.values, here),
            components=tuple(self.untokened.components[row] for row in here),
        )
        complete = self.complete and len(rows) == len(everything)
        return replace(self, blocks=tuple(blocks), untokened=untokened, complete=complete)

    def group(self, by: Literal["layer", "kind"]) -> "TokenAttribution":
        """Sum components into coarser ones, grid by grid, as `Attribution.group` does.

        Raises:
            InputError: Where a coarser component would have tokens of several grids, or tokens and none.
        """
        blocks = tuple(block.group(by) for block in self.blocks)
        untokened = self.untokened.group(by)
        homes = Counter([c.label for block in blocks for c in block.components] + list(untokened.labels))
        if torn := [label for label, count in homes.items() if count > 1]:
            raise InputError(
                f"Expected groups within one token grid; by={by!r} would put {', '.join(map(repr, torn))} on several, "
                f"or on one and on none. Sum the tokens first: sum_tokens().group(by={by!r})."
            )
        return replace(self, blocks=blocks, untokened=untokened)

    def images(self, index: int | slice | Sequence[int] | Tensor) -> "TokenAttribution":
        """Some images of the batch, by a number, a slice, their numbers, or a boolean mask.

        Raises:
            InputError: Where the batch has no such image.
        """
        rows = rows_of_batch(index, self.untokened.values.shape[1])
        return replace(
            self,
            blocks=tuple(block.with_values(taken(block.values, rows, axis=1)) for block in self.blocks),
            untokened=self.untokened.images(rows),
            total=None if self.total is None else taken(self.total, rows),
        )

    def to(self, target: torch.device | torch.dtype | str) -> "TokenAttribution":
        """The same on another device, or in another floating dtype."""
        return replace(
            self,
            blocks=tuple(block.with_values(block.values.to(target)) for block in self.blocks),
            untokened=self.untokened.to(target),
            total=None if self.total is None else self.total.to(target),
        )

    def cpu(self) -> "TokenAttribution":
        """The same on the CPU."""
        return self.to("cpu")

    @classmethod
    def cat(cls, several: "Sequence[TokenAttribution]") -> "TokenAttribution":
        """Several batches of the same components and grids as one batch, as `Attribution.cat` does.

        Raises:
            InputError: Where there are none, or they differ in components, grids, directions, or in having a total.
        """
        several = tuple(several)
        if not several:
            raise InputError("Expected at least one TokenAttribution to concatenate; got none.")
        first = several[0]
        for number, other in enumerate(several[1:], start=1):
            first._refuse_other(other, number)
        return replace(
            first,
            blocks=tuple(
                block.with_values(torch.cat([one.blocks[i].values for one in several], dim=1))
                for i, block in enumerate(first.blocks)
            ),
            untokened=Attribution.cat([one.untokened for one in several]),
            **said_of_all(several),
        )

    def _refuse_other(self, other: "TokenAttribution", number: int) -> None:
        if [b.grid for b in self.blocks] != [b.grid for b in other.blocks]:
            what = "token grids differ"
        elif [b.components for b in self.blocks] != [b.components for b in other.blocks]:
            what = "components differ"
        elif (self.total is None) != (other.total is None):
            what = "only one has a total"
        else:
            return
        raise InputError(
            f"Expected batches of the same components and grids to concatenate; in 0 and {number} {what}. "
            f"Attribute both with the same model, cut and image size."
        )

    # ---- over the image

    def to_pixels(
        self, height: int, width: int, *, mode: PixelMode = "nearest", max_bytes: int = 4 * 2**30
    ) -> Float[Tensor, "component batch direction height width"]:
        """The scores of the patches laid over the image that they tile. Prefix tokens have no pixels.

        Args:
            height: Height of the result, which shows all of the model's image, whatever its size. Where a model pads,
                its last patches reach beyond it.
            width: Width of the result.
            mode: ``"nearest"`` shows in each pixel the score of the patch that holds its centre. ``"density"``
                spreads a patch's score evenly over its area, so that the sum over pixels is the sum over patches,
                but for those that lie in padding.
            max_bytes: How large the result may be.

        Returns:
            A map for each component that has tokens, in the order of `components`.

        Raises:
            CapacityError: Where the result would be larger than ``max_bytes``.
            InputError: Where no component has tokens, or a size or mode is none.
        """
        return over_pixels(self.blocks, height, width, mode=mode, max_bytes=max_bytes)

    # ---- on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all.

        Raises:
            StoreError: Where the file cannot be written.
        """
        tensors = {f"blocks.{i}": block.values for i, block in enumerate(self.blocks)}
        tensors |= {"untokened": self.untokened.values} | ({} if self.total is None else {"total": self.total})
        header = storage.pack(complete=self.complete, coverage=self.coverage, metadata=self.metadata)
        header["directions"] = self.directions
        header["untokened"] = storage.pack_components(self.untokened.components)
        header["blocks"] = [block.pack() for block in self.blocks]
        storage.write(path, kind="TokenAttribution", tensors=tensors, header=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenAttribution":
        """Read what `save` wrote, onto the CPU. Nothing is unpickled.

        Raises:
            StoreError: Where the file is missing, damaged, half-written, or holds something else.
        """
        tensors, header = storage.read(path, kind="TokenAttribution", needs=["untokened"])
        with storage.restoring(path, kind="TokenAttribution"):
            blocks = tuple(TokenBlock.unpack(tensors[f"blocks.{i}"], of) for i, of in enumerate(header["blocks"]))
            names = header["directions"]
            untokened = Attribution(
                values=tensors["untokened"],
                components=storage.unpack_components(header["untokened"]),
                directions=None if names is None else tuple(names),
            )
            return cls(blocks, untokened, tensors.get("total"), **storage.unpack(header))
