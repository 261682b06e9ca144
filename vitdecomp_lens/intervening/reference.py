"""What is written in place of a component: zero, a mean over reference images, or what another image has there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.components import Point
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.intervening.edits import listening, refuse_unpassed
from vitdecomp_lens.intervening.subject import Subject

Replacing = Literal["mean", "position_mean", "zero", "resample"]
Images = Float[Tensor, "_ _ _ _"]  # batch, channel, height, width, not bound to those of the images that are run
AT_ONCE = 32  # reference images in one run, where nothing else is said


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """What components have on reference images, on average: gathered once, used by any number of ablations.

    Only sums are kept while images stream through the model, at every hook where components are: layers, heads and
    neurons. The means are those of the model as it was hooked then. For ``how="resample"`` the images
    themselves are kept, as they were given and without a copy; those of an iterator cannot be.

    Attributes:
        means: By hook, the mean over images and tokens (those of padding left out): one vector, or one a head. Axes
            over tokens have length 1, and so has the batch.
        position_means: By hook, the mean over images: one value a token.
        count: How many images there were.
        images: The images, a tensor or batches; None where they came from an iterator.

    Example:
        >>> from vitdecomp_lens import HookedViT
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> reference = Reference.of(model, torch.randn(4, 3, 160, 160))
        >>> reference, reference.means["blocks.0.attn.hook_z"].shape
        (Reference(4 images, 25 hooks), torch.Size([1, 1, 2, 32]))
    """

    means: Mapping[str, Tensor]
    position_means: Mapping[str, Tensor]
    count: int
    images: Tensor | Sequence[Tensor] | None = field(default=None)

    def __repr__(self) -> str:
        return f"Reference({self.count} images, {len(self.means)} hooks)"

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Images | Iterable[Images],
        *,
        components: Sequence[str] | Mapping[str, str] | None = None,
        batch_size: int | None = None,
    ) -> "Reference":
        """Run a model on reference images, and keep means.

        Args:
            model: As for `vitdecomp_lens.intervene.ablate_run`. Hooks that are on it take part.
            images: A batch, or any number of batches: a list, or a generator over a data set.
            components: The labels that are going to be ablated, or a mapping from labels to hooks; without
                them, all that there are.
            batch_size: How many images to run at once; 32 unless said. Batches that are larger are cut.

        Raises:
            InputError: If there are no images, or they cannot be used.
            UnknownNameError: If there is no such component.
        """
        batches = _batches(images, batch_size)
        first = next(batches)
        subject = Subject.of(model, first, components, None)
        points = [spot.point for spot in subject.spots(components)] if components is not None else subject.points
        kept = images if isinstance(images, Tensor | list | tuple) else None
        return gather(subject, points, chain([first], _checked(subject, batches)), images=kept)

    def replacement(self, hook: str, how: Literal["mean", "position_mean"]) -> Tensor:
        """What is written at a hook.

        Raises:
            InputError: If the reference has nothing of this hook.
        """
        known = self.means if how == "mean" else self.position_means
        if hook not in known:
            raise InputError(
                f"The reference has nothing of the hook {hook!r}; it has {len(known)}, such as"
                f" {', '.join(map(repr, list(known)[:3]))}. Make it with the same model and components:"
                " Reference.of(model, images, components=[...])."
            )
        return known[hook]


def gather(subject: Subject, points: Iterable[Point], batches: Iterable[Tensor], *, images: Any = None) -> Reference:
    """Means of what a model has at points, in one pass.

    Args:
        subject: The model.
        points: Where.
        batches: The images.
        images: What to keep of them for resampling.
    """
    at = {point.hook: point for point in points}
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        seen = seen_at(subject, at, batch)
        for hook, value in seen.items():
            if hook in sums and sums[hook].shape != value.shape:
                raise InputError(
                    f"Expected reference images of one size; at {hook} one batch has values"
                    f" {list(sums[hook].shape)} and another {list(value.shape)}. Resize them."
                )
            sums[hook] = value + sums[hook] if hook in sums else value
        count += len(batch)
    position_means = {hook: (value / count)[None] for hook, value in sums.items()}
    means = {hook: _over_tokens(subject, at[hook], value, batch) for hook, value in position_means.items()}
    return Reference(means, position_means, count, images)


def seen_at(subject: Subject, at: Mapping[str, Point], batch: Tensor) -> dict[str, Tensor]:
    """The sums over a batch of what a model has at hooks."""
    found: dict[str, Tensor] = {}

    def add_up(hook: str, value: Tensor) -> None:
        _refuse_odd(hook, value, batch, found)
        # Precise enough within a batch; sums of many batches would lose more in single precision.
        found[hook] = value.detach().sum(0, dtype=accumulator(value.dtype)).double()

    run(subject, batch, at, add_up)
    return found


def values_at(subject: Subject, at: Iterable[str], batch: Tensor) -> dict[str, Tensor]:
    """What a model has at hooks, for each image."""
    found: dict[str, Tensor] = {}

    def keep(hook: str, value: Tensor) -> None:
        _refuse_odd(hook, value, batch, found)
        found[hook] = value.detach().clone()  # a later hook may write in place

    run(subject, batch, at, keep)
    return found


def run(subject: Subject, batch: Tensor, at: Iterable[str], see: Any) -> None:
    """Run a model, and see what it has at hooks."""
    at, passed = tuple(at), set()

    def look(hook: str, value: Tensor) -> None:
        passed.add(hook)
        see(hook, value)

    with torch.no_grad(), listening(subject.hooks, at, look):
        subject.module(batch)
    refuse_unpassed(passed, at, subject.module)


def _refuse_odd(hook: str, value: Tensor, batch: Tensor, found: Mapping[str, Tensor]) -> None:
    if hook in found:
        raise InputError(
            f"A run passes the hook {hook!r} more than once: nothing says which of its values belongs to the component."
            " Put hook points at its uses."
        )
    if len(value) != len(batch):
        raise InputError(
            f"Expected at {hook} one entry an image along the first axis, {len(batch)} of them; got a value"
            f" {list(value.shape)}. Hook the value before it is cut into windows, or use how='zero'."
        )


def _over_tokens(subject: Subject, point: Point, position_mean: Tensor, images: Tensor) -> Tensor:
    axes = subject.token_axes(point, position_mean.shape)
    if not axes:
        return position_mean
    if padding := subject.padding(point, images):
        (axis,) = axes
        kept = [n for n in range(position_mean.shape[axis]) if n not in set(padding)]
        position_mean = position_mean.index_select(axis, torch.tensor(kept, device=position_mean.device))
    return position_mean.mean(axes, keepdim=True)


# --- images --------------------------------------------------------------------------------------------------


def _batches(images: Any, batch_size: int | None) -> Iterator[Tensor]:
    """Images in batches that are not too large."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size= must be at least 1; got {batch_size}. Leave it out to have it chosen.")
    several = [images] if isinstance(images, Tensor) else images
    empty = True
    for batch in several:
        if not isinstance(batch, Tensor):
            raise InputError(
                f"Expected reference images as a batch or batches, tensors [batch, channel, height, width]; got"
                f" {type(batch).__name__}. Of a loader of pairs: (images for images, labels in loader)."
            )
        for piece in batch.split(batch_size or AT_ONCE) if len(batch) else (batch,):
            empty = False
            yield piece
    if empty:
        raise InputError("Expected at least one reference image; got none.")


def _checked(subject: Subject, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        subject.check_images(batch)
        yield batch


def taken(images: Tensor | Sequence[Tensor], numbers: Tensor) -> Tensor:
    """Images by their numbers, counted through all batches."""
    if isinstance(images, Tensor):
        return images[numbers.to(images.device)]
    starts = torch.tensor([0, *(len(batch) for batch in images)]).cumsum(0)
    batches = torch.searchsorted(starts, numbers, right=True) - 1
    rows = zip(batches.tolist(), (numbers - starts[batches]).tolist(), strict=True)
    return torch.stack([images[batch][row] for batch, row in rows])


# --- replacements --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Replacements:
    """What to write at hooks for images of one request.

    Attributes:
        subject: The model.
        points: Where.
        how: What is written.
        reference: Means, where they are asked for.
        pool: The images to draw from, where images are drawn.
        drawn: Which of these is drawn for each image.
    """

    subject: Subject
    points: tuple[Point, ...]
    how: Replacing
    reference: Reference | None = None
    pool: Tensor | Sequence[Tensor] | None = None
    drawn: Tensor | None = None

    @classmethod
    def of(
        cls,
        subject: Subject,
        points: Iterable[Point],
        images: Tensor,
        how: Replacing,
        reference: Reference | Images | Iterable[Images] | None,
        *,
        seed: int,
        batch_size: int | None,
    ) -> "Replacements":
        """Gather what is needed of the reference.

        Raises:
            InputError: If it is missing, or does not have what is needed.
        """
        points = tuple(dict.fromkeys(points))
        if how not in get_args(Replacing):
            raise InputError(f"Expected how='mean', 'position_mean', 'zero' or 'resample'; got how={how!r}.")
        if how == "zero" or not points:
            return cls(subject, points, how)
        if reference is None:
            raise InputError(
                f"how={how!r} takes values from other images: expected reference=, images or Reference.of(model,"
                " images); got none. Or use how='zero'."
            )
        if how != "resample":
            if not isinstance(reference, Reference):
                reference = gather(subject, points, _checked(subject, _batches(reference, batch_size)))
            return cls(subject, points, how, reference=reference)
        pool = reference.images if isinstance(reference, Reference) else reference
        if not isinstance(pool, Tensor | list | tuple):
            raise InputError(
                "how='resample' runs the model on reference images again, and those of an iterator are gone. Give"
                " reference= a tensor or a list of batches."
            )
        if isinstance(reference, Reference):
            count = reference.count
        else:
            count = sum(map(len, _checked(subject, _batches(pool, None))))
        drawn = torch.randint(count, (len(images),), generator=torch.Generator().manual_seed(seed))
        return cls(subject, points, how, pool=pool, drawn=drawn)

    def values(self, which: slice, images: Tensor) -> dict[str, Tensor]:
        """What to write at each hook.

        Args:
            which: For which images of the request.
            images: These images.
        """
        if self.how == "resample" and self.points:
            assert self.pool is not None
            assert self.drawn is not None
            others = taken(self.pool, self.drawn[which]).to(images.device)
            return values_at(self.subject, [point.hook for point in self.points], others)
        if self.how == "zero" or self.reference is None:
            return {point.hook: images.new_zeros(()) for point in self.points}
        how: Any = self.how
        return {point.hook: self.reference.replacement(point.hook, how) for point in self.points}
