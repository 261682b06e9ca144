"""Numbers and pictures as text that is short, and read back by the page."""

import base64
import io
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

LARGEST = 448  # pixels of a photograph's longer side
SMALL = 96  # pixels of a picture that is sent as it is
QUALITIES = (82, 65, 45, 25)
ROOM = 45_000  # bytes of a photograph, for which quality is given up


def fixed(values: Float[Tensor, "*rows width"], size: int) -> dict[str, Any]:
    """Numbers as whole ones of some bytes, in units of their row's own.

    With two bytes a number is right to 1.6e-5 of the largest of its row, with three to 6e-8.

    Args:
        values: Finite.
        size: How many bytes each.

    Returns:
        ``{"shape", "bytes", "units", "numbers"}``: a unit a row, and the numbers in base64, the lowest byte first.

    Example:
        >>> packed = fixed(torch.tensor([[1.0, -0.5]]), 2)
        >>> packed["shape"], packed["numbers"], round(32767 * packed["units"][0], 6)
        ([1, 2], '/38AwA==', 1.0)
    """
    rows = values.detach().cpu().double().reshape(-1, values.shape[-1])
    units = rows.abs().amax(1) / (2 ** (8 * size - 1) - 1)
    whole = torch.where(units[:, None] > 0, rows / units[:, None], 0).round().to(torch.int32)
    numbers = whole.contiguous().view(torch.uint8).reshape(*rows.shape, 4)[..., :size]
    return {
        "shape": list(values.shape),
        "bytes": size,
        "units": units.tolist(),
        "numbers": base64.b64encode(numbers.contiguous().numpy().tobytes()).decode(),
    }


def unfixed(packed: dict[str, Any]) -> Float[Tensor, "..."]:
    """The numbers that `fixed` packed, as the page reads them.

    >>> unfixed(fixed(torch.tensor([[1.0, -0.5], [0.0, 0.0]]), 3))[0]
    tensor([ 1.0000, -0.5000], dtype=torch.float64)
    """
    size, shape = packed["bytes"], packed["shape"]
    raw = torch.frombuffer(bytearray(base64.b64decode(packed["numbers"])), dtype=torch.uint8).long()
    raw = raw.reshape(-1, size)
    whole = sum(raw[:, place] << 8 * place for place in range(size))
    whole = torch.where(raw[:, -1] > 127, whole - 2 ** (8 * size), whole)
    units = torch.tensor(packed["units"], dtype=torch.float64)
    return (whole.reshape(len(units), -1) * units[:, None]).reshape(shape)


def picture(photograph: Image.Image) -> str:
    """A photograph as an address that holds it: small ones as they are, others made smaller."""
    small = photograph.convert("RGB")
    small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    if max(photograph.size) <= SMALL:
        kind, written = "png", _written(small, "png")
    else:
        kind = "jpeg"
        for quality in QUALITIES:
            written = _written(small, kind, quality=quality, optimize=True)
            if len(written) <= ROOM:
                break
    return f"data:image/{kind};base64,{base64.b64encode(written).decode()}"


def _written(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
