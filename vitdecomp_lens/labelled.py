"""What all labelled values share: their labels, the check against the total, selecting, summing, storing.

`Labelled` is the abstract parent of the values whose axes are component, batch and one more. To use them, see
`vitdecomp_lens.decomposition`.
"""

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens import storage
from vitdecomp_lens.components import Component
from vitdecomp_lens.coverage import Coverage
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.gap import Checked, summed, summed_groups
from vitdecomp_lens.selecting import (
    Components,
    Names,
    Numbers,
    agreed,
    as_components,
    chosen,
    grouped,
    position,
    positions_of,
    rows_of_batch,
    summary,
    taken,
)

L = TypeVar("L", bound="Labelled")


def said_of_all(several: Sequence[Any]) -> dict[str, Any]:
    """Total, completeness, coverage and metadata of batches that are concatenated: what they agree on."""
    first, totals = several[0], [one.total for one in several if one.total is not None]
    return {
        "total": torch.cat(totals) if totals else None,
        "complete": all(one.complete for one in several),
        "coverage": first.coverage if all(one.coverage == first.coverage for one in several) else None,
        "metadata": agreed([one.metadata for one in several]),
    }


@dataclass(frozen=True, eq=False, repr=False)
class Labelled(Checked):
    """Values by component and image, and what the model itself computed. Abstract: see its two children."""

    values: Float[Tensor, "component batch width"]
    components: Components
    total: Float[Tensor, "batch width"] | None = None
    _: KW_ONLY
    complete: bool = True
    coverage: Coverage | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @abstractmethod
    def __post_init__(self) -> None:
        """Check what was given: call `_settle`, then look at the fields of one's own."""

    def _settle(self) -> None:
        values, total, axis = self.values, self.total, self._axis
        if values.ndim != 3 or not values.is_floating_point() or not values.shape[-1]:
            raise InputError(
                f'Expected values as Float[Tensor, "component batch {axis}"] with at least one {axis}; '
                f"got shape {tuple(values.shape)} of {values.dtype}."
            )
        if total is not None and (total.shape != values.shape[1:] or not total.is_floating_point()):
            raise InputError(
                f'Expected total as Float[Tensor, "batch {axis}"] of shape {tuple(values.shape[1:])}, as the values '
                f"have it; got shape {tuple(total.shape)} of {total.dtype}."
            )
        if total is not None and total.device != values.device:
            raise InputError(f"Expected values and total on one device; got {values.device} and {total.device}.")
        object.__setattr__(self, "components", as_components(self.components, len(values)))
        object.__setattr__(self, "metadata", storage.as_json("metadata", dict(self.metadata)))

    # ---- looking

    @cached_property
    def _positions(self) -> dict[str, int]:
        return positions_of(self.components)

    @property
    def labels(self) -> tuple[str, ...]:
        """The components' labels, in the order of the values."""
        return tuple(self._positions)

    def __len__(self) -> int:
        return len(self.components)

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __contains__(self, label: object) -> bool:
        return (label.label if isinstance(label, Component) else label) in self._positions

    def __getitem__(self, label: str | Component) -> Float[Tensor, "batch width"]:
        return self.values[position(self._positions, label)]

    def __repr__(self) -> str:
        component, batch, width = self.values.shape
        state = "complete" if self.complete else "incomplete"
        return (
            f"{type(self).__name__}({component=}, {batch=}, {self._axis}={width}, {self.values.dtype}, "
            f"{self.values.device}: {summary(self.components)}; {state}, "
            f"{'without' if self.total is None else 'with'} total)"
        )

    def sum(self) -> Float[Tensor, "batch width"]:
        """The sum over components, accumulated in at least float32, in the dtype of the values."""
        return summed(self.values).to(self.values.dtype)

    def _summed(self) -> Float[Tensor, "batch width"]:
        return summed(self.values)

    def _dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.values.dtype,)

    # ---- other values of the same kind

    def select(
        self: L,
        *,
        labels: Names | None = None,
        kind: Names | None = None,
        layer: Numbers | None = None,
        head: Numbers | None = None,
        neuron: Numbers | None = None,
        name: Names | None = None,
    ) -> L:
        """Keep the components that meet every criterion; the total stays the model's.

        Args:
            labels: A label or several; the result is in their order.
            kind: A kind of component or several.
            layer: A block number, or a collection such as ``range(8, 12)``.
            head: A head number or several.
            neuron: A neuron number or several.
            name: A name or several.

        Returns:
            Values that are complete only if everything was selected.

        Raises:
            UnknownNameError: Where nothing meets the criteria, or a label is unknown.
        """
        criteria = {"kind": kind, "layer": layer, "head": head, "neuron": neuron, "name": name}
        rows = chosen(self.components, labels, criteria)
        return replace(
            self,
            values=taken(self.values, rows),
            components=tuple(self.components[row] for row in rows),
            complete=self.complete and len(rows) == len(self),
        )

    def group(self: L, by: Literal["layer", "kind"]) -> L:
        """Sum components into coarser ones; the sum over all, the total and completeness stay as they are.

        Args:
            by: ``"layer"`` sums the heads of a layer into ``attn.L``, its neurons into ``mlp.L``, and leaves the
                rest as it is; ``"kind"`` makes one component of each kind, labelled with the kind
                (``intervention@all`` for interventions).
        """
        groups = grouped(self.components, by)
        return replace(self, values=summed_groups(self.values, groups), components=tuple(groups)) if groups else self

    def spread_constants(self: L) -> L:
        """Constants spread evenly over the other components, as some papers count them.

        A view for comparison with published numbers only: what a constant writes is known, and belongs to no head.

        Raises:
            InputError: Where there are only constants.
        """
        constant = [row for row, c in enumerate(self.components) if c.kind == "constant"]
        others = [row for row, c in enumerate(self.components) if c.kind != "constant"]
        if not others:
            raise InputError("Expected components to spread the constants over; there are only constants.")
        share = (summed(taken(self.values, constant)) / len(others)).to(self.values.dtype)
        return replace(
            self,
            values=taken(self.values, others) + share,
            components=tuple(self.components[row] for row in others),
        )

    def images(self: L, index: int | slice | Sequence[int] | Tensor) -> L:
        """Some images of the batch, by a number, a slice, their numbers, or a boolean mask.

        Raises:
            InputError: Where the batch has no such image.
        """
        rows = rows_of_batch(index, self.values.shape[1])
        total = None if self.total is None else taken(self.total, rows)
        return replace(self, values=taken(self.values, rows, axis=1), total=total)

    def to(self: L, target: torch.device | torch.dtype | str) -> L:
        """The same on another device, or in another floating dtype."""
        return replace(self, values=self.values.to(target), total=None if self.total is None else self.total.to(target))

    def cpu(self: L) -> L:
        """The same on the CPU."""
        return self.to("cpu")

    @classmethod
    def cat(cls: type[L], several: Sequence[L]) -> L:
        """Several batches of the same components as one batch.

        The result is complete if all are. Of the coverage and the metadata it keeps what all agree on.

        Raises:
            InputError: Where there are none, or they differ in components, width, or in having a total.
        """
        several = tuple(several)
        if not several:
            raise InputError(f"Expected at least one {cls.__name__} to concatenate; got none.")
        first = several[0]
        for number, other in enumerate(several[1:], start=1):
            first._refuse_other(other, number)
        return replace(first, values=torch.cat([one.values for one in several], dim=1), **said_of_all(several))

    def _refuse_other(self, other: "Labelled", number: int) -> None:
        here, there = self.labels, other.labels
        differ = [f"{a!r} and {b!r}" for a, b in zip(here, there, strict=False) if a != b]
        if differ or len(here) != len(there):
            what = f"components differ ({differ[0] if differ else f'{len(here)} and {len(there)} of them'})"
        elif self.values.shape[-1] != other.values.shape[-1]:
            what = f"{self._axis} differs ({self.values.shape[-1]} and {other.values.shape[-1]})"
        elif (self.total is None) != (other.total is None):
            what = "only one has a total"
        elif different := [name for name in self._own_fields() if getattr(self, name) != getattr(other, name)]:
            what = f"{different[0]} differ"
        else:
            return
        raise InputError(
            f"Expected batches of the same components to concatenate; in 0 and {number} {what}. "
            f"Decompose both with the same model and cut, or select the same labels from both."
        )

    # ---- on disk

    @classmethod
    def _own_fields(cls) -> tuple[str, ...]:
        shared = {f.name for f in fields(Labelled)}
        return tuple(f.name for f in fields(cls) if f.name not in shared)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all.

        Raises:
            StoreError: Where the file cannot be written.
        """
        tensors = {"values": self.values} if self.total is None else {"values": self.values, "total": self.total}
        header = storage.pack(complete=self.complete, coverage=self.coverage, metadata=self.metadata)
        header |= {"components": storage.pack_components(self.components)}
        header |= {name: getattr(self, name) for name in self._own_fields()}
        storage.write(path, kind=type(self).__name__, tensors=tensors, header=header)

    @classmethod
    def load(cls: type[L], path: str | os.PathLike[str]) -> L:
        """Read what `save` wrote, onto the CPU. Nothing is unpickled.

        Raises:
            StoreError: Where the file is missing, damaged, half-written, or holds something else.
        """
        tensors, header = storage.read(path, kind=cls.__name__)
        with storage.restoring(path, kind=cls.__name__):
            # JSON has lists only; a field of a frozen value is a tuple.
            own: dict[str, Any] = {
                name: tuple(header[name]) if isinstance(header[name], list) else header[name]
                for name in cls._own_fields()
            }
            return cls(
                values=tensors["values"],
                components=storage.unpack_components(header["components"]),
                total=tensors.get("total"),
                **storage.unpack(header),
                **own,
            )
