"""What all planted truth is made of: random numbers by seed and draw, components, checks of sizes."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.components import Component
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.testbed.hashing import mixed

HEADS = 4  # how many a layer has


def complete(values: Tensor, dtype: torch.dtype, components: tuple[Component, ...] | None = None) -> Decomposition:
    """A complete decomposition; of heads, unless said otherwise."""
    return Decomposition(values.to(dtype), components or heads_of(len(values)), values.sum(0).to(dtype))


def heads_of(count: int) -> tuple[Component, ...]:
    """So many heads, by layer."""
    return tuple(Component(kind="head", layer=n // HEADS, head=n % HEADS) for n in range(count))


def generator(seed: int, *draw: int) -> torch.Generator:
    """The source of the truth; or, with ``draw``, of images."""
    return torch.Generator().manual_seed(int(mixed(seed, *draw)))


def normal(chance: torch.Generator, *size: int) -> Float[Tensor, "..."]:
    """Normal numbers."""
    return torch.randn(size, generator=chance, dtype=torch.float64)


def uniform(chance: torch.Generator, *size: int) -> Float[Tensor, "..."]:
    """Numbers from 0 to 1."""
    return torch.rand(size, generator=chance, dtype=torch.float64)


def orthonormal(chance: torch.Generator, count: int, width: int, rank: int) -> Float[Tensor, "count width rank"]:
    """Bases of random spans: orthonormal columns."""
    return torch.linalg.qr(normal(chance, count, width, rank)).Q


def expect_sizes(**sizes: int) -> None:
    """Refuse a size below 1, by its name."""
    for name, size in sizes.items():
        expect(name, size, 1)


def expect(name: str, value: int | float, least: int | float, most: int | float = math.inf) -> None:
    """Refuse a number that is not from ``least`` to ``most``, by its name.

    Raises:
        InputError: If it is not.
    """
    if not least <= value <= most:  # so that what is not a number is refused too
        allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(f"Expected {name}= {allowed}; got {value}.")
