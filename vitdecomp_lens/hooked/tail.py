"""What a block does with a branch's output before it is added to the stream."""

from jaxtyping import Float
from torch import Tensor, nn


class Tail:
    """The modules between a branch's last linear layer and the residual stream.

    Where they are LayerScale (and identities) they fold into the last weights and bias. A norm there does
    not: then `fold` leaves the weights as they are, and they describe what enters that norm.

    Args:
        *modules: The (cloned) modules, in order. They stay registered with the block that owns them.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = tuple(module for module in modules if type(module) is not nn.Identity)
        self.folds = all(_gamma(module) is not None for module in self.modules)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the modules."""
        for module in self.modules:
            x = module(x)
        return x

    def fold(self, weights: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """Scale weights or a bias as the tail scales the output."""
        if self.folds:
            for module in self.modules:
                gamma = _gamma(module)
                weights = weights if gamma is None else weights * gamma
        return weights


def _gamma(module: nn.Module) -> Tensor | None:
    gamma = getattr(module, "gamma", None)  # an attribute, for that is what a parametrised one is
    return gamma if isinstance(gamma, Tensor) else None
