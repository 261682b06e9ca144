"""What a block does with a branch's output before it is added to the stream."""

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.errors import UnsupportedModelError

_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, nn.Dropout.forward, nn.Identity.forward)


def check_plain(what: str, layers: Iterable[nn.Module], around: Iterable[nn.Module] = ()) -> None:
    """Refuse modules that do more than their weights say, where these are used and the modules not called.

    Args:
        what: What is computed so.
        layers: Linear layers, convolutions of 1 × 1 and dropouts.
        around: Modules of any class, of which only forward hooks are refused.

    Raises:
        UnsupportedModelError: Naming the module's class, and what it does besides.
    """
    layers = tuple(layers)
    own = [layer for layer in layers if type(layer).forward not in _PLAIN_FORWARDS or "forward" in vars(layer)]
    hooked = [module for module in (*layers, *around) if module._forward_hooks or module._forward_pre_hooks]
    for modules, extra in ((own, "a forward of its own"), (hooked, "forward hooks")):
        if modules:
            raise UnsupportedModelError(
                f"{what} is computed from the weights of the output projection, without calling its modules; but "
                f"{type(modules[0]).__name__} has {extra}, which would not run. Wrap the model without it, or use "
                f"hook_z, which leaves the projection to the library."
            )


class ParameterScale(nn.Module):
    """LayerScale that is a plain parameter of the block, as in EVA and BEiT.

    Args:
        block: The (cloned) block. It stays the parameter's owner.
        name: The parameter's name.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, so that it is not registered here too
        self._name = name

    @property
    def gamma(self) -> Float[Tensor, "d_model"]:
        """The scale, live."""
        gamma: Tensor = getattr(self._block[0], self._name)
        return gamma

    def forward(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """Scale what the branch adds."""
        return self.gamma * x


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

    @classmethod
    def of_parameter(cls, block: nn.Module, name: str) -> "Tail":
        """Make the tail of a block whose LayerScale is a parameter, or None where it has none."""
        return cls() if getattr(block, name) is None else cls(ParameterScale(block, name))


def _gamma(module: nn.Module) -> Tensor | None:
    gamma = getattr(module, "gamma", None)  # an attribute, for that is what a parametrised one is
    return gamma if isinstance(gamma, Tensor) else None
