"""MLPs with hook points at their neurons. The library's own ``forward`` runs; taps bring values to the hooks."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.hooked.hook_points import HalvesTap, InputTap, OutputTap
from vitdecomp_lens.hooked.tail import Tail


def bias_or_zeros(linear: nn.Module) -> Float[Tensor, "out"]:
    """Return a linear layer's bias, or zeros where it has none."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(linear, "bias", None)  # an attribute, for that is what a parametrised bias is
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


class HookedMLP(nn.Module, ABC):
    """An MLP whose neurons can be read and changed.

    ``hook_pre`` is what enters the activation function, ``hook_post`` what the last linear layer reads, after
    an inner norm: ``hook_post @ W_out + b_out`` is what is added to the stream. Gated MLPs multiply
    ``act(hook_pre)`` with ``hook_pre_linear``.

    Args:
        tail: What the block does with the output before adding it (LayerScale).
    """

    hook_pre: HookPoint
    hook_post: HookPoint

    def __init__(self, *, tail: Tail | None = None) -> None:
        super().__init__()
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()
        self.tail = tail or Tail()

    @property
    @abstractmethod
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:  # noqa: N802
        """First weights (of the ungated half, where there is a gate), a live view."""

    @property
    @abstractmethod
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        """First bias."""

    @property
    @abstractmethod
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:  # noqa: N802
        """Last weights, with LayerScale folded in."""

    @property
    @abstractmethod
    def b_out(self) -> Float[Tensor, "d_model"]:
        """Last bias, with LayerScale folded in."""

    @property
    def d_mlp(self) -> int:
        """Number of neurons."""
        return self.W_out.shape[0]


class TappedMLP(HookedMLP):
    """An MLP module of a library, which ends in a linear layer.

    Args:
        core: The (cloned) MLP.
        last: Its last linear layer.
        tail: See `HookedMLP`.
    """

    def __init__(self, core: nn.Module, last: nn.Module, *, tail: Tail | None = None) -> None:
        super().__init__(tail=tail)
        self.core = core
        self._last = (last,)  # registered with the core already
        last.register_forward_pre_hook(InputTap(self.hook_post))

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:  # noqa: N802
        """Last weights, with LayerScale folded in."""
        weight: Tensor = self._last[0].weight  # type: ignore[assignment]
        return self.tail.fold(weight.T)

    @property
    def b_out(self) -> Float[Tensor, "d_model"]:
        """Last bias, with LayerScale folded in."""
        return self.tail.fold(bias_or_zeros(self._last[0]))

    def forward(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """Run the library's MLP, then LayerScale."""
        return self.tail(self.core(x))


class PlainMLP(TappedMLP):
    """Two linear layers with an activation function between them.

    Args:
        core: The (cloned) MLP.
        first: Its first linear layer.
        last: Its last linear layer.
        tail: See `HookedMLP`.
    """

    def __init__(self, core: nn.Module, first: nn.Module, last: nn.Module, *, tail: Tail | None = None) -> None:
        super().__init__(core, last, tail=tail)
        self._first = (first,)
        first.register_forward_hook(OutputTap(self.hook_pre))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:  # noqa: N802
        """First weights."""
        weight: Tensor = self._first[0].weight  # type: ignore[assignment]
        return weight.T

    @property
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        """First bias."""
        return bias_or_zeros(self._first[0])


class GatedMLP(TappedMLP):
    """A gated MLP: ``act(x @ W_gate + b_gate) * (x @ W_in + b_in)`` are its neurons.

    Args:
        core: The (cloned) MLP.
        gate: The linear layer of the gate; the same as ``linear`` where one layer computes both, packed.
        linear: The linear layer of the ungated half.
        last: The last linear layer.
        gate_first: In a packed layer, whether the gate comes first.
        tail: See `HookedMLP`.
    """

    hook_pre_linear: HookPoint

    def __init__(
        self,
        core: nn.Module,
        gate: nn.Module,
        linear: nn.Module,
        last: nn.Module,
        *,
        gate_first: bool = True,
        tail: Tail | None = None,
    ) -> None:
        super().__init__(core, last, tail=tail)
        self.hook_pre_linear = HookPoint()
        self._in = (gate, linear)
        self._gate_first = gate_first
        if gate is linear:
            points = (self.hook_pre, self.hook_pre_linear)
            gate.register_forward_hook(HalvesTap(*(points if gate_first else points[::-1])))
        else:
            gate.register_forward_hook(OutputTap(self.hook_pre))
            linear.register_forward_hook(OutputTap(self.hook_pre_linear))

    def _halves(self, gate: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        if self._in[0] is not self._in[1]:
            return gate, linear
        first, second = torch.chunk(gate, 2)
        return (first, second) if self._gate_first else (second, first)

    def _weights(self) -> tuple[Tensor, Tensor]:
        return self._halves(*(layer.weight for layer in self._in))  # type: ignore[arg-type]

    def _biases(self) -> tuple[Tensor, Tensor]:
        return self._halves(*(bias_or_zeros(layer) for layer in self._in))

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:  # noqa: N802
        """Weights of the gate."""
        return self._weights()[0].T

    @property
    def b_gate(self) -> Float[Tensor, "d_mlp"]:
        """Bias of the gate."""
        return self._biases()[0]

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:  # noqa: N802
        """Weights of the ungated half."""
        return self._weights()[1].T

    @property
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        """Bias of the ungated half."""
        return self._biases()[1]
