"""Sums of contributions, and how far they are from what the model itself computed.

Sums are accumulated in at least float32, whatever the dtype of the values, so that a gap in half precision
tells of the values and not of the summing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.components import Component
from vitdecomp_lens.errors import GapError, InputError
from vitdecomp_lens.selecting import taken

_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which values of these dtypes are summed: their own, but at least float32."""
    result = torch.float32
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


def summed(values: Float[Tensor, "row *rest"]) -> Float[Tensor, "*rest"]:
    """The sum over axis 0, accumulated and returned in at least float32."""
    return values.sum(0, dtype=accumulator(values.dtype))


def summed_groups(
    values: Float[Tensor, "row *rest"], groups: Mapping[Component, list[int]]
) -> Float[Tensor, "group *rest"]:
    """The rows of each group summed, accumulated in at least float32, in the dtype of the values."""
    return torch.stack([summed(taken(values, rows)).to(values.dtype) for rows in groups.values()])


def relative_gap(rest: Float[Tensor, "batch width"], total: Float[Tensor, "batch width"]) -> Float[Tensor, "batch"]:
    """``max|rest| / max|total|`` per image; 0 where both are zero, infinite where only the total is."""
    largest, scale = rest.detach().abs().amax(-1), total.detach().abs().amax(-1).to(rest.dtype)
    return torch.where(largest == 0, largest, largest / scale)


C = TypeVar("C", bound="Checked")


class Checked(ABC):
    """What has a total to be checked against. Abstract: a child says what it sums to."""

    total: Float[Tensor, "batch width"] | None
    complete: bool

    _axis: ClassVar[str]

    @abstractmethod
    def _summed(self) -> Float[Tensor, "batch width"]:
        """The sum over everything, accumulated and returned in at least float32."""

    @abstractmethod
    def _dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the values."""

    def _rest(self, total: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        dtype = accumulator(total.dtype, *self._dtypes())
        return total.to(dtype) - self._summed().to(dtype)

    @property
    def rest(self) -> Float[Tensor, "batch width"] | None:
        """Total minus sum: what none of the values accounts for. None without a total."""
        return None if self.total is None else self._rest(self.total).to(self._dtypes()[0])

    @property
    def gap(self) -> Float[Tensor, "batch"] | None:
        """Per image ``max|sum − total| / max|total|``, in at least float32. None if incomplete or without total."""
        return relative_gap(self._rest(self.total), self.total) if self.complete and self.total is not None else None

    def check_gap(self: C, tolerance: float | None = None) -> C:
        """Return these values if they sum to the total.

        Args:
            tolerance: The largest gap allowed. By default 1e-5 in float32 and 1e-10 in float64; in half precision
                a gap is only reported.

        Raises:
            GapError: Names the worst image, its gap and the tolerance.
            InputError: Where there is nothing to check: incomplete values, or no total.
        """
        if not self.complete or self.total is None:
            missing = "a total" if self.complete else "a component"
            raise InputError(
                f"Expected complete values with a total, to check their gap; {missing} is missing. See .rest."
            )
        coarsest = min((self.total.dtype, *self._dtypes()), key=lambda dtype: torch.finfo(dtype).bits)
        allowed = _TOLERANCES.get(coarsest) if tolerance is None else tolerance
        rest = self._rest(self.total).detach()
        gap = relative_gap(rest, self.total)
        # Not `gap > allowed`, so that a gap that is not a number fails too.
        if allowed is None or bool((gap <= allowed).all()):
            return self
        worst = _largest(gap)
        place = _largest(rest[worst])
        raise GapError(
            f"The components of image {worst} sum to something else than what the model computed: "
            f"gap {float(gap[worst]):.1e}, worst at {self._axis} {place}; allowed is {allowed:.1e} ({coarsest}). "
            f"Look at .coverage for where walks stopped, or allow more with check_gap(tolerance=...)."
        )


def _largest(values: Float[Tensor, "n"]) -> int:
    return int(values.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).argmax())
