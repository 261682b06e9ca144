"""Components: the parts of a model that write into its representation, and where they are read.

A `Component` is a label. A `Point` says at which hook a model's components are read and which axis tells
them apart. A `TokenGrid` says which pixels each token stands for. None of them holds a tensor.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from vitdecomp_lens.errors import InputError

By = Literal["layer", "head", "neuron", "latent"]
PLAIN: tuple[By, ...] = ("layer", "head", "neuron")  # those of any model; latents are of modules that are put in
Kind = Literal[
    "embed", "attn", "head", "mlp", "neuron", "conv", "pool", "constant", "intervention", "source", "latent", "error"
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Component:
    """One part of a model that writes into its representation.

    Attributes:
        kind: What it is; ``"head"`` is an attention head, ``"attn"`` all heads of a layer together,
            ``"pool"`` the MLP or attention of an attention pool, ``"constant"`` what no image changes,
            ``"intervention"`` what a hook changed, ``"source"`` a nonlinear output found by tracing, ``"latent"`` a
            latent of a spliced module (without a number, all of them together), ``"error"`` what it leaves out.
        layer: Flat block number, where there is one.
        head: Index of the head in its layer, for ``kind="head"``.
        neuron: Index of the neuron in its layer's MLP, for ``kind="neuron"``.
        name: For what has no number: a constant's parameter, an intervention's or a splice's hook, a traced source.
        latent: Index of the latent in its module, for ``kind="latent"``.

    Example:
        >>> Component(kind="head", layer=3, head=7).label
        'L3H7'
        >>> Component.from_label("mlp.4")
        Component(kind='mlp', layer=4, head=None, neuron=None, name=None, latent=None)
    """

    kind: Kind
    layer: int | None = None
    head: int | None = None
    neuron: int | None = None
    name: str | None = None
    latent: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"A component's kind must be one of {', '.join(KINDS)}; got {self.kind!r}.")
        needed: dict[str, tuple[str, ...]] = {
            "head": ("layer", "head"),
            "neuron": ("layer", "neuron"),
            "latent": ("name",),
            "error": ("name",),
        }
        for field in needed.get(self.kind, ()):
            if getattr(self, field) is None:
                raise InputError(f"A component of kind {self.kind!r} needs {field}=.")

    @property
    def label(self) -> str:
        """A short name: ``L3H7``, ``L3N12``, ``attn.3``, ``mlp.3``, ``embed``, or the name as it is.

        Of what was put in at a hook: ``intervention@hook``, ``latent17@hook``, ``latents@hook``, ``error@hook``.
        """
        if self.kind == "head":
            return f"L{self.layer}H{self.head}" if self.name is None else f"{self.name}.H{self.head}"
        if self.kind == "neuron":
            return f"L{self.layer}N{self.neuron}" if self.name is None else f"{self.name}.N{self.neuron}"
        if self.kind in ("intervention", "error"):
            return f"{self.kind}@{self.name}"
        if self.kind == "latent":
            return f"{'latents' if self.latent is None else f'latent{self.latent}'}@{self.name}"
        if self.name is not None:
            return self.name
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    @classmethod
    def from_label(cls, label: str) -> "Component":
        """Read a label back: ``L3H7``, ``L3N12``, ``attn.3``, ``mlp.3``, ``conv.3``, ``embed``, ``intervention@hook``.

        Also ``latent17@hook``, ``latents@hook`` and ``error@hook``, whose layer is that of the hook.

        Anything else is a constant of that name, since constants bear the names of parameters.
        """
        if match := re.fullmatch(r"L(\d+)H(\d+)", label):
            return cls(kind="head", layer=int(match[1]), head=int(match[2]))
        if match := re.fullmatch(r"L(\d+)N(\d+)", label):
            return cls(kind="neuron", layer=int(match[1]), neuron=int(match[2]))
        if match := re.fullmatch(r"(attn|mlp|conv)\.(\d+)", label):
            return cls(kind=match[1], layer=int(match[2]))  # type: ignore[arg-type]
        if match := re.fullmatch(r"intervention@(.+)", label):
            return cls(kind="intervention", name=match[1])
        if match := re.fullmatch(r"(?:latents|latent(\d+)|(error))@(.+)", label):
            block = re.match(r"blocks\.(\d+)\.", match[3])
            return cls(
                kind="error" if match[2] else "latent",
                layer=int(block[1]) if block else None,
                name=match[3],
                latent=int(match[1]) if match[1] else None,
            )
        return cls(kind="embed") if label == "embed" else cls(kind="constant", name=label)

    def matches(self, **criteria: Any) -> bool:
        """Whether every criterion holds: a value equals the field, a collection (range, set...) contains it."""
        return all(_matches(getattr(self, field), wanted) for field, wanted in criteria.items())


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Iterable) and not isinstance(wanted, str):
        return value in wanted
    return bool(value == wanted)


@dataclass(frozen=True)
class Point:
    """Where components are read: a hook, and the axis of its value that tells them apart.

    Attributes:
        hook: Name of the hook point (or of the traced value). Its value has the batch as axis 0.
        component: The component as a whole; with ``axis``, the pattern that `components` numbers.
        axis: Axis of the value along which components are split (heads, neurons, latents), or None.
        first: Number of the first component along ``axis`` (parallel attentions share a layer).
        token_axis: Axis of the value that runs over tokens, or None.
        skipped_tokens: How many leading tokens of the grid's sequence the value lacks (the patch
            embedding has no prefix tokens).
    """

    hook: str
    component: Component
    axis: int | None = None
    first: int = 0
    token_axis: int | None = 1
    skipped_tokens: int = 0

    def components(self, size: int) -> tuple[Component, ...]:
        """The components that this point holds, ``size`` being the length of ``axis`` (1 without one)."""
        whole = self.component
        if self.axis is None:
            return (whole,)
        numbers = range(self.first, self.first + size)
        if whole.kind == "attn":
            return tuple(Component(kind="head", layer=whole.layer, head=n, name=whole.name) for n in numbers)
        if whole.kind == "latent":
            return tuple(replace(whole, latent=n) for n in numbers)
        return tuple(Component(kind="neuron", layer=whole.layer, neuron=n, name=whole.name) for n in numbers)


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of a sequence: first the prefix tokens, then rows × columns of patches.

    Attributes:
        rows: Patches down the image.
        columns: Patches across the image.
        image_size: Height and width, in pixels, of the area that the patches tile.
        prefix: Names of the prefix tokens, such as ``("CLS", "reg0")``. They stand for no pixels.
        seen: Height and width of the model's image, where the area is another: larger where the model pads.
    """

    rows: int
    columns: int
    image_size: tuple[int, int]
    prefix: tuple[str, ...] = ()
    seen: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.prefix) + self.rows * self.columns

    @property
    def names(self) -> tuple[str, ...]:
        """A name a token: the prefix, then ``r0c0``, ``r0c1``, ..."""
        return self.prefix + tuple(f"r{r}c{c}" for r in range(self.rows) for c in range(self.columns))

    def rectangle(self, token: int) -> tuple[float, float, float, float] | None:
        """Top, left, bottom, right of a token in pixels of the image; None for a prefix token."""
        patch = token - len(self.prefix)
        if not 0 <= token < len(self):
            raise InputError(f"The grid has tokens 0 to {len(self) - 1}; got {token}.")
        if patch < 0:
            return None
        height, width = self.image_size[0] / self.rows, self.image_size[1] / self.columns
        row, column = divmod(patch, self.columns)
        return row * height, column * width, (row + 1) * height, (column + 1) * width
