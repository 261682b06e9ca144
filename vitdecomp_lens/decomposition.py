"""What each component of a model writes: values that carry their labels, and the total they have to sum to.

`Decomposition` holds vectors in the space of the representation, `Attribution` their scores along directions.
Both are frozen: every method gives new values. They can be made from anyone's tensors. For scores by token, see
`vitdecomp_lens.tokens`; to have values computed from a model, see `vitdecomp_lens.decompose`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.components import Component
from vitdecomp_lens.coverage import Coverage, Stop
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.gap import summed
from vitdecomp_lens.labelled import Labelled
from vitdecomp_lens.selecting import Names, Numbers, chosen, position, refuse_duplicates

__all__ = ["Attribution", "ComponentMaps", "Coverage", "Decomposition", "How", "Stop"]

How = Literal["zero", "mean", "resample"]


@runtime_checkable
class ComponentMaps(Protocol):
    """A linear map for each component, and one bias for their sum: what an aligner is to a decomposition."""

    @property
    def components(self) -> Sequence[Component]:
        """Which component each map is for."""

    @property
    def maps(self) -> Float[Tensor, "component d_rep d_clip"]:
        """The maps."""

    @property
    def bias(self) -> Float[Tensor, "d_clip"]:
        """What is added once to the sum of mapped components."""


@runtime_checkable
class OfOneModel(Protocol):
    """Maps that know which model and cut they were made for, and which space they lead to."""

    @property
    def space(self) -> str | None:
        """The name of the space."""

    def refuse_other(self, parts: "Decomposition") -> None:
        """Raise where contributions are of another model or cut."""


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Labelled):
    """The score of every component along every direction, for every image.

    Attributes:
        values: Scores.
        components: What each row of the scores belongs to; labels such as ``"L3H7"`` are read as well.
        total: The scores of what the model itself computed.
        complete: Whether the components are all there are, so that their sum has to be the total.
        coverage: How much of the model the components tell apart.
        metadata: Anything that JSON holds: model, cut, data set.
        directions: A name for each direction.

    Raises:
        InputError: Where shapes, components or directions do not fit each other.

    Example:
        >>> scores = Attribution(torch.tensor([[[1.0]], [[2.0]]]), ("L0H0", "mlp.0"), torch.tensor([[3.0]]))
        >>> scores["mlp.0"], scores.gap
        (tensor([[2.]]), tensor([0.]))
    """

    values: Float[Tensor, "component batch direction"]
    total: Float[Tensor, "batch direction"] | None = None
    directions: tuple[str, ...] | None = None

    _axis: ClassVar[str] = "direction"

    def __post_init__(self) -> None:
        self._settle()
        if self.directions is None:
            return
        object.__setattr__(self, "directions", tuple(self.directions))
        if len(self.directions) != self.values.shape[-1]:
            raise InputError(
                f"Expected a name for each of the {self.values.shape[-1]} directions; got {len(self.directions)} names."
            )
        refuse_duplicates(self.directions, of="directions")

    def top(self, direction: int | str, k: int = 10) -> tuple[tuple[str, float], ...]:
        """The components that write most along a direction, and their scores averaged over the batch.

        Args:
            direction: Its number or name.
            k: How many components at most.

        Returns:
            Labels and mean scores, highest first.

        Raises:
            UnknownNameError: Where there is no such direction.

        Example:
            >>> Attribution(torch.tensor([[[1.0]], [[2.0]]]), ("L0H0", "mlp.0")).top(0, 1)
            (('mlp.0', 2.0),)
        """
        number = self._direction(direction)
        means = self.values.detach()[:, :, number].mean(1, dtype=torch.promote_types(self.values.dtype, torch.float32))
        best = means.topk(min(k, len(self)))
        return tuple((self.labels[row], score) for score, row in zip(*map(Tensor.tolist, best), strict=True))

    def _direction(self, direction: int | str) -> int:
        count = self.values.shape[-1]
        if isinstance(direction, str):
            names = self.directions or ()
            if direction not in names:
                raise UnknownNameError(f"There is no direction {direction!r}; {near_matches(direction, names)}")
            return names.index(direction)
        if not -count <= direction < count:
            raise UnknownNameError(f"There is no direction {direction}; there are {count}, numbered from 0.")
        return direction


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(Labelled):
    """What every component writes into the representation, for every image.

    The components of a complete decomposition sum to the total, the representation that the model computed;
    `gap` says how nearly. Constants are components too, and none is a remainder of the others.

    Attributes:
        values: The vectors that the components write.
        components: What each row of the vectors belongs to; labels such as ``"L3H7"`` are read as well.
        total: What the model itself computed.
        complete: Whether the components are all there are, so that their sum has to be the total.
        coverage: How much of the model the components tell apart.
        metadata: Anything that JSON holds: model, cut, data set.

    Raises:
        InputError: Where shapes or components do not fit each other.

    Example:
        >>> parts = Decomposition(torch.eye(3).reshape(3, 1, 3), ("L0H0", "L0H1", "mlp.0"), torch.ones(1, 3))
        >>> parts["L0H1"], parts.gap
        (tensor([[0., 1., 0.]]), tensor([0.]))
        >>> parts.select(kind="head").rest
        tensor([[0., 0., 1.]])
        >>> parts.group(by="layer").labels
        ('attn.0', 'mlp.0')
    """

    values: Float[Tensor, "component batch d_rep"]
    total: Float[Tensor, "batch d_rep"] | None = None

    _axis: ClassVar[str] = "d_rep"

    def __post_init__(self) -> None:
        self._settle()

    def project(
        self, directions: Float[Tensor, "direction d_rep"], *, names: Sequence[str] | None = None
    ) -> Attribution:
        """The score ⟨direction, vector⟩ of every component along every direction; the total's too.

        Args:
            directions: Any vectors in the space of the representation, as rows. They follow the values' device
                and dtype.
            names: A name for each direction.

        Raises:
            InputError: Where the directions are of another space.

        Example:
            >>> Decomposition(torch.ones(1, 1, 3), ("embed",)).project(torch.ones(2, 3)).values
            tensor([[[3., 3.]]])
        """
        d_rep = self.values.shape[-1]
        if directions.ndim != 2 or directions.shape[1] != d_rep or not len(directions):
            raise InputError(
                f'Expected directions as Float[Tensor, "direction d_rep"] with rows of d_rep={d_rep}; got shape '
                f"{tuple(directions.shape)}. For one direction, project(direction[None]); for directions of another "
                f"space, map(aligner) first."
            )
        return Attribution(
            values=_times(self.values, directions.T),
            components=self.components,
            total=None if self.total is None else _times(self.total, directions.T),
            complete=self.complete,
            coverage=self.coverage,
            metadata=self.metadata,
            directions=None if names is None else tuple(names),
        )

    def map(
        self, linear_map: Float[Tensor, "d_rep d_out"] | ComponentMaps | Callable[[Tensor], Tensor]
    ) -> "Decomposition":
        """Take every component through a linear map, and the total with them.

        Args:
            linear_map: A matrix, for all components; a function that is linear and acts on the last axis; or an
                aligner, with a map for each component and a bias for their sum. The bias becomes the constant
                ``aligner.bias``, and the total is by definition the sum of all that.

        Returns:
            Vectors in the space that the map leads to.

        Raises:
            InputError: Where the widths or the components do not fit, the function is not linear, or an aligner
                meets a decomposition that is not complete.

        Example:
            >>> Decomposition(torch.ones(1, 1, 3), ("embed",)).map(2 * torch.eye(3)).values
            tensor([[[2., 2., 2.]]])
        """
        if isinstance(linear_map, ComponentMaps):
            return self._aligned(linear_map)
        if isinstance(linear_map, Tensor):
            self._refuse_width(tuple(linear_map.shape), 0, 2)
            matrix = linear_map
            through: Callable[[Tensor], Tensor] = lambda vectors: _times(vectors, matrix)  # noqa: E731
        else:
            through = linear_map
            self._refuse_nonlinear(through)
        return replace(self, values=through(self.values), total=None if self.total is None else through(self.total))

    def _refuse_nonlinear(self, function: Callable[[Tensor], Tensor]) -> None:
        probe = torch.linspace(-1, 1, self.values.shape[-1]).to(self.values).expand(1, 1, -1)
        with torch.no_grad():
            offset = float(function(torch.zeros_like(probe)).abs().max())
            once, twice = function(probe), function(-2 * probe)  # rounding does not see a factor of -2
        if offset:
            raise InputError(
                f"Expected a linear map; this one takes zero to values up to {offset:.1e}, and would add them once "
                f"a component. Leave its bias out, as in map(layer.weight.T), or give map() an aligner."
            )
        if not torch.allclose(twice, -2 * once):
            raise InputError(
                "Expected a linear map; this one takes -2 x to something else than -2 times what it takes x to, and "
                "the components would no longer sum to the total. Freeze what is nonlinear in it."
            )

    def _refuse_width(self, shape: tuple[int, ...], axis: int, ndim: int) -> None:
        d_rep = self.values.shape[-1]
        if len(shape) != ndim or shape[axis] != d_rep:
            raise InputError(f"Expected maps from d_rep={d_rep} (axis {axis} of {ndim}); got maps of shape {shape}.")

    def _aligned(self, aligner: ComponentMaps) -> "Decomposition":
        if not self.complete:
            raise InputError(
                "Expected a complete decomposition, because an aligner's bias belongs to the sum of all components; "
                "this one is incomplete. Map first, then select or ablate."
            )
        metadata = self.metadata
        if isinstance(aligner, OfOneModel):
            aligner.refuse_other(self)
            metadata = metadata if aligner.space is None else {**metadata, "space": aligner.space}
        self._refuse_width(tuple(aligner.maps.shape), 1, 3)
        maps = aligner.maps[rows_of_maps(aligner, self.labels)].to(self.values)
        mapped = einsum(self.values, maps, "component batch d_rep, component d_rep d_clip -> component batch d_clip")
        bias = aligner.bias.to(mapped).expand(1, *mapped.shape[1:])
        values = torch.cat([mapped, bias])
        return replace(
            self,
            values=values,
            components=(*self.components, Component(kind="constant", name="aligner.bias")),
            total=summed(values).to(values.dtype),
            metadata=metadata,
        )

    def ablate(
        self,
        labels: Names | None = None,
        *,
        how: How = "zero",
        reference: "Decomposition | None" = None,
        generator: torch.Generator | None = None,
        kind: Names | None = None,
        layer: Numbers | None = None,
        head: Numbers | None = None,
        neuron: Numbers | None = None,
        name: Names | None = None,
    ) -> "Decomposition":
        """Replace what some components write: the direct effect, with all else as it was.

        The total stays the model's, so that `rest` is what was taken away. For the total effect, which lets later
        components react, run the model again under ``model.hooks(...)``.

        Args:
            labels: The label of a component, or several.
            how: ``"zero"``; the ``"mean"`` over the reference's images; or ``"resample"``, for each image what the
                components write for one of the reference's images, the same one for all of them.
            reference: Where mean and resample take their values from.
            generator: The source of chance for resample.
            kind: As in `select`, like the criteria that follow.
            layer: A block number, or a collection.
            head: A head number or several.
            neuron: A neuron number or several.
            name: A name or several.

        Returns:
            All components, incomplete.

        Raises:
            UnknownNameError: Where a component is unknown here or in the reference.
            InputError: Where what ``how`` needs is missing or does not fit.

        Example:
            >>> parts = Decomposition(torch.ones(2, 1, 3), ("L0H0", "mlp.0"), 2 * torch.ones(1, 3))
            >>> parts.ablate("mlp.0").rest
            tensor([[1., 1., 1.]])
        """
        criteria = {"kind": kind, "layer": layer, "head": head, "neuron": neuron, "name": name}
        if labels is None and all(wanted is None for wanted in criteria.values()):
            raise InputError('Expected the components to ablate, as in ablate("L3H7") or ablate(kind="head").')
        rows = chosen(self.components, labels, criteria)
        values = self.values.clone()
        values[rows] = self._substitute(rows, how, reference, generator)
        return replace(self, values=values, complete=False)

    def _substitute(
        self, rows: list[int], how: How, reference: "Decomposition | None", generator: torch.Generator | None
    ) -> Float[Tensor, "row #batch d_rep"]:
        if how not in get_args(How):
            raise InputError(f"Expected how='zero', 'mean' or 'resample'; got how={how!r}.")
        if how == "zero":
            return torch.zeros_like(self.values[rows][:, :1])
        if reference is None or reference.values.shape[1:2] == (0,):
            raise InputError(
                f"how={how!r} takes values from other images: expected reference=, a Decomposition of at least one "
                f"image; got {'none' if reference is None else 'one of no images'}. Or use how='zero'."
            )
        if reference.values.shape[-1] != self.values.shape[-1]:
            raise InputError(
                f"Expected a reference of the same space, d_rep={self.values.shape[-1]}; got "
                f"d_rep={reference.values.shape[-1]}. Decompose the reference images with the same model."
            )
        taken = reference.values[[position(reference._positions, self.labels[row]) for row in rows]].to(self.values)
        if how == "mean":
            return taken.mean(1, keepdim=True)
        if generator is None:
            raise InputError("how='resample' draws images: expected generator=, as torch.Generator().manual_seed(0).")
        size = (self.values.shape[1],)
        drawn = torch.randint(reference.values.shape[1], size, generator=generator, device=generator.device)
        return taken[:, drawn.to(taken.device)]


def rows_of_maps(aligner: ComponentMaps, labels: Sequence[str]) -> list[int]:
    """Which of an aligner's maps are whose.

    Raises:
        InputError: Where it was made for other components.
    """
    known = {component.label: row for row, component in enumerate(aligner.components)}
    if set(known) != set(labels):
        strange = next(label for label in (*labels, *known) if (label in known) != (label in labels))
        raise InputError(
            f"Expected an aligner made for these components; it has {len(known)}, the decomposition {len(labels)}, "
            f"and {strange!r} is in only one of them. Fit it on the same model and cut, or group(by=...) to its."
        )
    return [known[label] for label in labels]


def _times(vectors: Float[Tensor, "*axes d_rep"], matrix: Float[Tensor, "d_rep d_out"]) -> Any:
    return vectors @ matrix.to(vectors)
