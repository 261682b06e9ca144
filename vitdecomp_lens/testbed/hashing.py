"""Random numbers that are integer hashes: of the same keys the same, in any batch and on any machine."""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2⁶⁴/φ, as a signed number
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685  # the multipliers of splitmix64


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros, whatever the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mixed(*keys: Tensor | int) -> Tensor:
    """A hash of integers, by splitmix64; tensors are broadcast.

    >>> mixed(1, torch.arange(2)).tolist() == [mixed(1, 0).item(), mixed(1, 1).item()]
    True
    """
    found = torch.zeros((), dtype=torch.int64)
    for key in keys:
        found = found ^ torch.as_tensor(key, dtype=torch.int64)
        found += _GOLDEN
        found ^= _shifted(found, 30)
        found *= _FIRST
        found ^= _shifted(found, 27)
        found *= _SECOND
        found ^= _shifted(found, 31)
    return found


def uniform(keys: Tensor) -> Tensor:
    """Numbers in [0, 1) from hashes: their highest 24 bits, which float32 holds exactly."""
    return _shifted(keys, 40).to(torch.float32) / (1 << 24)


def below(keys: Tensor, count: int) -> Tensor:
    """Integers in [0, count) from hashes."""
    return _shifted(keys, 32) * count >> 32
