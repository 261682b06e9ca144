"""Attention of timm's ``MaxxVit`` models: in windows, in a grid spread over the image, or over the whole image."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vitdecomp_lens.hooked.attention import Heads
from vitdecomp_lens.hooked.hook_points import ChannelsFirst, Grid, Layout, any_hooked, lay_out
from vitdecomp_lens.hooked.packed import linear_out
from vitdecomp_lens.hooked.tail import Tail
from vitdecomp_lens.hooked.timm_attention import TimmPlainAttention
from vitdecomp_lens.hooked.windows import Windows
from vitdecomp_lens.points import is_hooked


class GridWindows(Windows):
    """How tokens lie where each attends to a grid that is spread over the image.

    Of ``rows × columns`` tokens a grid of ``height × width`` takes every ``rows / height``-th row and every
    ``columns / width``-th column; there are as many grids as fit between each other.
    """

    def show(self, value: Float[Tensor, "batch_window window_token *rest"]) -> Float[Tensor, "batch token *rest"]:
        """Return the tokens in their places in the image."""
        (rows, columns), (height, width) = self._size, self.window
        rest = value.shape[2:]
        grids = value.reshape(-1, rows // height, columns // width, height, width, *rest)
        order = (0, 3, 1, 4, 2, *range(5, grids.dim()))
        return grids.permute(order).reshape(-1, rows * columns, *rest)

    def restore(
        self, shown: Float[Tensor, "batch token *rest"], like: Float[Tensor, "batch_window window_token *rest"]
    ) -> Float[Tensor, "batch_window window_token *rest"]:
        """Take what `show` showed apart into grids again."""
        (rows, columns), (height, width) = self._size, self.window
        rest = shown.shape[2:]
        image = shown.reshape(-1, height, rows // height, width, columns // width, *rest)
        order = (0, 2, 4, 1, 3, *range(5, image.dim()))
        return image.permute(order).reshape(-1, height * width, *rest)


class Seen:
    """What a run has come across: not among a module's own attributes, for those are what a kept trace depends on.

    Attributes:
        size: Rows and columns that attend to each other, where channels come before them.
        channels_first: Whether heads' outputs, joined, lie in memory channels first.
    """

    size: tuple[int, ...] = ()
    channels_first = False


class HookedChannelsLast(TimmPlainAttention):
    """timm's ``AttentionCl``, which runs ``batch·window row column d_model``.

    ``hook_q``, ``hook_k``, ``hook_v``, ``hook_z`` and ``hook_result`` are ``batch token head d_head`` over the whole
    image; ``hook_attn_scores`` and ``hook_pattern`` are ``batch·window head query key``, in the order in which the
    library cuts the image, window by window or grid by grid.

    Args:
        core: The (cloned) attention.
        tail: See `HookedAttention`. The block applies it, where the image is in one piece again.
        windows: How the image lies in windows; None where all tokens attend to all.
    """

    axes: Layout = Grid()

    def __init__(self, core: nn.Module, *, tail: Tail, windows: Windows | None = None) -> None:
        super().__init__(core, tail=tail)
        self._windows = windows
        self._seen = Seen()
        self._lay_out(self.hook_q, self.hook_k, self.hook_v, self.hook_z)

    def _lay_out(self, *points: Any) -> None:
        if self._windows is not None:
            lay_out(points, self._windows)

    def use_result(self, use: bool) -> None:
        """Add or remove ``hook_result``."""
        super().use_result(use)
        if use:
            self._lay_out(self.hook_result)

    # Weights -------------------------------------------------------------------------------------------

    def _third(self, packed: Tensor, third: int) -> Tensor:
        """Queries', keys' or values' rows of what is packed: by head, or all heads' queries first."""
        if self.core.head_first:
            return packed.unflatten(0, (self.heads, 3, -1))[:, third]
        return packed.unflatten(0, (3, self.heads, -1))[third]

    def _weight(self, third: int, heads: int) -> Float[Tensor, "head d_model d_head"]:
        return self._third(self.packed_in[0].flatten(1), third).transpose(1, 2)

    def _bias(self, third: int, heads: int) -> Float[Tensor, "head d_head"]:
        weight, bias = self.packed_in
        return self._third(weight.new_zeros(weight.shape[0]) if bias is None else bias, third)

    @property
    def projection_out(self) -> tuple[Float[Tensor, "d_model d_attn"], Float[Tensor, "d_model"] | None]:
        """Weight and bias of ``proj``."""
        weight, bias = linear_out(self.core.proj)  # type: ignore[arg-type]
        return weight.flatten(1), bias

    # Running -------------------------------------------------------------------------------------------

    @property
    def shows_result(self) -> bool:
        """Whether ``hook_result`` is in use: then what `run` returns is what is added to the stream."""
        return "hook_result" in self._modules and is_hooked(self.hook_result)

    def run(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Stand in for the library's ``forward``: the library's own while no hook is in use."""
        if not self.shows_result and not any_hooked(self._points):
            out: Tensor = type(self.core).forward(self.core, x, shared_rel_pos)
            return out
        self.context, self._seen.size = {"shared_rel_pos": shared_rel_pos}, tuple(x.shape[2:])
        try:
            z = self.head_outputs(self.axes.show(x), None)
            return self.axes.restore(self.branch(z) if self.shows_result else self.project_out(z), x)
        finally:
            self.context = {}

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as they are."""
        return q, k

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries, keys and values."""
        packed = self.core.qkv(x)  # type: ignore[operator]
        if self.core.head_first:
            q, k, v = packed.unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, dim=3)
        else:
            q, k, v = packed.unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        return q, k, v

    def score_bias(self) -> Float[Tensor, "*#batch head query key"] | None:
        """What is added to the scores."""
        core: Any = self.core
        bias: Tensor | None = self.context["shared_rel_pos"] if core.rel_pos is None else core.rel_pos.get_bias()
        return bias


class HookedChannelsFirst(HookedChannelsLast):
    """timm's ``Attention2d``, which runs ``batch·window d_model row column``; hooks as in `HookedChannelsLast`."""

    axes: Layout = ChannelsFirst()

    def project(self, x: Float[Tensor, "batch token d_model"]) -> Heads:
        """Queries, keys and values."""
        packed = self.core.qkv(x.transpose(1, 2).unflatten(2, self._seen.size)).flatten(2)  # type: ignore[operator]
        if self.core.head_first:
            heads = packed.unflatten(1, (self.heads, -1)).chunk(3, dim=2)
        else:
            heads = packed.unflatten(1, (3, self.heads, -1)).unbind(1)
        q, k, v = (part.transpose(-1, -2) for part in heads)
        return q, k, v

    def mix(
        self,
        q: Float[Tensor, "batch head query d_qk"],
        k: Float[Tensor, "batch head key d_qk"],
        v: Float[Tensor, "batch head key d_head"],
    ) -> Float[Tensor, "batch head query d_head"]:
        """Mix values by the pattern; a fused kernel gets them contiguous, as the library gives them to it."""
        z = super().mix(*((part.contiguous() for part in (q, k, v)) if self.fused else (q, k, v)))
        self._seen.channels_first = z.is_contiguous() and (z.shape[1] > 1 or not self.fused)
        return z

    def project_out(self, z: Float[Tensor, "batch token head d_head"]) -> Float[Tensor, "batch token d_model"]:
        """Apply the output projection."""
        core: Any = self.core
        joined = z.permute(0, 2, 3, 1).reshape(z.shape[0], -1, *self._seen.size)
        # How values lie in memory decides how torch computes a convolution: as they do in the library.
        out: Tensor = core.proj_drop(core.proj(joined.contiguous() if self._seen.channels_first else joined))
        return out.flatten(2).transpose(1, 2)


class HookedHalf(HookedChannelsLast):
    """An ``AttentionCl`` that writes to some channels of the residual stream, while another writes to the rest.

    ``W_O``, ``b_O`` and ``hook_result`` are as wide as the stream, zero in the other's channels.

    Args:
        core: See `HookedChannelsLast`.
        tail: See there.
        windows: See there.
        beside: How many channels of the stream come before and after those that are written to.
    """

    def __init__(self, core: nn.Module, *, tail: Tail, windows: Windows, beside: tuple[int, int]) -> None:
        super().__init__(core, tail=tail, windows=windows)
        self._beside = beside

    @property
    def projection_out(self) -> tuple[Float[Tensor, "d_model d_attn"], Float[Tensor, "d_model"] | None]:
        """Weight and bias of ``proj``, zero in the other's channels."""
        weight, bias = super().projection_out
        return functional.pad(weight, (0, 0, *self._beside)), None if bias is None else functional.pad(
            bias, self._beside
        )

    @property
    def width(self) -> int:
        """How wide the output of `run` is: with ``hook_result`` in use, as wide as the stream."""
        return int(self.core.proj.out_features) + (sum(self._beside) if self.shows_result else 0)  # type: ignore[union-attr, arg-type]

    def added(self, out: Float[Tensor, "batch row column width"]) -> Float[Tensor, "batch row column d_model"]:
        """Return what is added to the stream, given the output of `run`."""
        return out if self.shows_result else self.tail(functional.pad(out, self._beside))
