"""How much of a model a decomposition tells apart, and where the walks through it stopped.

A gap of zero alone says little: one source that is all of the representation has it too. `Coverage` is the
other half of the certificate.
"""

import re
from dataclasses import dataclass

from vitdecomp_lens.components import Component
from vitdecomp_lens.errors import InputError

BRANCHES = ("attn", "mlp", "conv", "source")


def branch_of(component: Component) -> tuple[str, int | None, str | None] | None:
    """Which branch a component is, as a whole: kind, layer and name; None for what is none, such as constants.

    Latents of a module inside of a branch, or at its end, are that branch.

    >>> branch_of(Component.from_label("mlp.2")), branch_of(Component.from_label("latents@blocks.2.hook_mlp_out"))
    (('mlp', 2, None), ('mlp', 2, None))
    """
    if component.kind in BRANCHES:
        return component.kind, component.layer, component.name
    if component.kind == "latent":
        branch = re.match(r"blocks\.\d+\.(?:hook_)?(attn|mlp|conv)", component.name or "")
        return None if branch is None else (branch[1], component.layer, None)
    return None


@dataclass(frozen=True)
class Stop:
    """A place where a walk back from the representation stopped, its value taken as given.

    Attributes:
        operation: What stood there, such as ``"aten.tanh.default"``.
        module: Path of the module it belongs to, ``""`` for the model itself.
        reason: Why the walk could not, or need not, go on.

    Example:
        >>> print(Stop(operation="aten.tanh.default", module="head.pre_logits", reason="nonlinear"))
        aten.tanh.default in head.pre_logits: nonlinear
    """

    operation: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation} in {self.module or 'the model itself'}: {self.reason}"


@dataclass(frozen=True)
class Coverage:
    """How many of a model's branches are components of their own.

    Attributes:
        found: Attention, MLP and convolution branches that are components of their own.
        branches: All such branches of the model.
        stops: Where walks stopped before they had told their branches apart.

    Raises:
        InputError: Where ``found`` is negative or more than ``branches``.

    Example:
        >>> print(Coverage(found=23, branches=24, stops=(Stop("aten.tanh.default", "head", "nonlinear"),)))
        23 of 24 branches are components of their own (96 %); walks stopped at
          aten.tanh.default in head: nonlinear
    """

    found: int
    branches: int
    stops: tuple[Stop, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.found <= self.branches:
            raise InputError(
                f"Coverage counts found branches among all: expected 0 <= found <= branches, "
                f"got found={self.found}, branches={self.branches}."
            )
        object.__setattr__(self, "stops", tuple(self.stops))

    @property
    def share(self) -> float:
        """``found / branches``; 0 for a model without known branches, of which nothing was told apart."""
        return self.found / self.branches if self.branches else 0.0

    def __str__(self) -> str:
        head = f"{self.found} of {self.branches} branches are components of their own ({self.share:.0%})"
        head = head.replace("%", " %")
        return head + ("; walks stopped at\n  " + "\n  ".join(map(str, self.stops)) if self.stops else "")
