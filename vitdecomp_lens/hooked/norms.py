"""Layer and RMS norms with hook points at their scale and at what they normalise to."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.hooked.clone import adopt_hooks
from vitdecomp_lens.hooked.hook_points import any_hooked, fire
from vitdecomp_lens.points import LazyHookPoint

RMS_NORMS = ("RMSNorm", "RmsNorm", "RmsNormFp32")


def norm_kind(module: nn.Module) -> str | None:
    """Return ``"LN"`` or ``"RMS"`` for a norm over the last axis, None for anything else.

    >>> norm_kind(nn.LayerNorm(4)), norm_kind(nn.Identity())
    ('LN', None)
    """
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm) and not name.endswith(("2d", "2dFp32")) and len(module.normalized_shape) == 1:
        return "LN"
    return "RMS" if name in RMS_NORMS else None


class HookedNorm(nn.Module):
    """A norm whose denominator and normalised value can be read and changed.

        scale = sqrt(var + eps)        normalized = (x - mean) / scale        output = γ ⊙ normalized + β

    with the biased variance; for RMS norms the mean is not subtracted and there is no β. Without a hook the
    library's own norm runs.

    Args:
        core: The (cloned) norm of the library.
        centred: Whether the mean is subtracted.
    """

    hook_scale: LazyHookPoint
    hook_normalized: LazyHookPoint

    def __init__(self, core: nn.Module, *, centred: bool) -> None:
        super().__init__()
        self.hook_scale = LazyHookPoint()
        self.hook_normalized = LazyHookPoint()
        self.core = core
        self.centred = centred
        self._points = (self.hook_scale, self.hook_normalized)
        adopt_hooks(self, core)

    @property
    def w(self) -> Tensor | None:
        """The norm's gain γ."""
        return getattr(self.core, "weight", None)

    @property
    def b(self) -> Tensor | None:
        """The norm's shift β."""
        return getattr(self.core, "bias", None)

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return float(self.core.eps)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """Normalise over the last axis."""
        if not any_hooked(self._points):
            normed: Tensor = self.core(x)
            return normed
        wide = x if x.dtype == torch.float64 else x.float()
        centred = wide - wide.mean(-1, keepdim=True) if self.centred else wide
        scale = fire(self.hook_scale, (centred.square().mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = fire(self.hook_normalized, centred / scale)
        if self.w is not None:
            normalized = normalized * self.w
        if self.b is not None:
            normalized = normalized + self.b
        return normalized.to(x.dtype)


def hooked_norm(core: nn.Module) -> nn.Module:
    """Wrap a norm; what is no layer or RMS norm (an identity, a batch norm) is returned as it is."""
    kind = norm_kind(core)
    return core if kind is None else HookedNorm(core, centred=kind == "LN")
