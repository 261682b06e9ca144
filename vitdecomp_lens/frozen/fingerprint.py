"""Whether weights are what they were, at the speed of reading them once."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def fingerprint(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """What changes whenever one of the tensors does.

    Where they lie and their versions tell of every change but one, what is written through ``.data``. So each
    tensor's values count too: as the product u W v with two fixed vectors of arbitrary entries, which also sees
    entries that change places. A change that rounding hides there is one that rounding hides in a forward.

    >>> weight = torch.eye(3)
    >>> before = fingerprint([weight])
    >>> weight.data.copy_(weight.flip(0))[0].tolist()
    [0.0, 0.0, 1.0]
    >>> fingerprint([weight]) == before
    False
    """
    tensors = [tensor.detach() for tensor in tensors]
    places = tuple((t.data_ptr(), t.dtype, t.device, 0 if t.is_inference() else t._version) for t in tensors)
    if not tensors:
        return places, ()
    with torch.autocast(tensors[0].device.type, enabled=False):
        products = [_product(t) for t in tensors if t.numel()]
    return places, tuple(torch.stack(products).tolist()) if products else ()


def _product(tensor: Tensor) -> Float[Tensor, ""]:
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    rows = wide.reshape(wide.shape[0] if wide.dim() > 1 else 1, -1)
    left, right = (_arbitrary(n, seed, rows.dtype, rows.device) for seed, n in enumerate(rows.shape))
    return torch.dot(rows @ right, left).double()


@lru_cache(maxsize=128)
def _arbitrary(length: int, seed: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "length"]:
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):  # kept for calls outside of it
        return (torch.rand(length, generator=generator, dtype=dtype) + 0.5).to(device)
