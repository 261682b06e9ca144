"""Groups of images, and how often a classifier is right in each."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.errors import InputError


@dataclass(frozen=True, eq=False, repr=False)
class Groups:
    """Which group each image belongs to. A group may be without images here, as it cannot be where it is measured.

    Attributes:
        numbers: The number of each image's group.
        names: Of all groups that there are.

    Raises:
        InputError: If a number has no name, or two groups have one name.

    Example:
        >>> Groups(torch.tensor([0, 1, 1]), ("land", "water"))
        Groups(3 images: land 1, water 2)
    """

    numbers: Int[Tensor, "batch"]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if len(set(self.names)) != len(self.names) or not self.names:
            raise InputError(f"Expected a name of its own for each group; got {', '.join(self.names) or 'none'}.")
        if len(self.numbers) and not 0 <= int(self.numbers.min()) <= int(self.numbers.max()) < len(self.names):
            raise InputError(
                f"Expected numbers of groups from 0 to {len(self.names) - 1}, as there are {len(self.names)} names; got"
                f" numbers from {int(self.numbers.min())} to {int(self.numbers.max())}."
            )

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in zip(self.names, self.counts.tolist(), strict=True))
        return f"Groups({len(self.numbers)} images: {counts})"

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def counts(self) -> Int[Tensor, "group"]:
        """How many images each group has."""
        return torch.bincount(self.numbers.cpu(), minlength=len(self.names))

    @classmethod
    def crossing(cls, **attributes: Int[Tensor, "_"]) -> "Groups":
        """A group for each combination of values, whether an image has it or not.

        Args:
            **attributes: Values of each attribute, numbered from 0, for all images. They go up to the highest that any
                image has; where a higher one is not to be missed, name the groups yourself: ``Groups(numbers, names)``.

        Raises:
            InputError: If attributes have different lengths, or values below 0.

        Example:
            >>> Groups.crossing(label=torch.tensor([0, 1, 1]), water=torch.tensor([0, 0, 1]))
            Groups(3 images: label 0, water 0 1, label 0, water 1 0, label 1, water 0 1, label 1, water 1 1)
        """
        lengths = {len(values) for values in attributes.values()}
        if len(lengths) != 1 or lengths == {0} or any(int(values.min()) < 0 for values in attributes.values()):
            raise InputError(
                "Expected at least one attribute with values from 0 on, for the same images each; got"
                f" {', '.join(f'{name} of {len(values)}' for name, values in attributes.items()) or 'none'}."
            )
        sizes = {name: int(values.max()) + 1 for name, values in attributes.items()}
        numbers = torch.zeros_like(next(iter(attributes.values())))
        for name, values in attributes.items():
            numbers = numbers * sizes[name] + values.to(numbers)
        every = product(*([f"{name} {value}" for value in range(size)] for name, size in sizes.items()))
        return cls(numbers, tuple(", ".join(one) for one in every))

    @classmethod
    def one(cls, images: int) -> "Groups":
        """All images in one group."""
        return cls(torch.zeros(images, dtype=torch.int64), ("all",))

    def refuse_empty(self) -> None:
        """Refuse groups without images.

        Raises:
            InputError: Naming them.
        """
        if empty := [name for name, count in zip(self.names, self.counts.tolist(), strict=True) if not count]:
            raise InputError(
                f"Expected images of every group; there are none of {', '.join(map(repr, empty))} among"
                f" {len(self.numbers)}. Take more images, or leave the group out of the names."
            )


@dataclass(frozen=True, repr=False)
class GroupAccuracy:
    """How often a classifier is right, group by group; shares of one.

    Attributes:
        names: Of the groups.
        accuracies: The share of its images that are classified right, for each group.
        images: How many images each has.
    """

    names: tuple[str, ...]
    accuracies: tuple[float, ...]
    images: tuple[int, ...]

    def __repr__(self) -> str:
        return f"GroupAccuracy(worst {self.worst:.3f} ({self.worst_group}), average {self.average:.3f})"

    def __getitem__(self, name: str) -> float:
        return dict(zip(self.names, self.accuracies, strict=True))[name]

    @classmethod
    def of(
        cls,
        predicted: Int[Tensor, "batch"] | Float[Tensor, "batch class"],
        labels: Int[Tensor, "_"],
        groups: Groups | None = None,
    ) -> "GroupAccuracy":
        """Compare what a classifier says with the labels.

        Args:
            predicted: Classes, or scores of which the highest counts.
            labels: The right classes.
            groups: Of the images; without them all are one.

        Raises:
            InputError: If a group has no images, which is named, or images, labels and groups are not as many.

        Example:
            >>> labels, groups = torch.tensor([0, 0, 1, 1]), Groups(torch.tensor([0, 1, 0, 1]), ("land", "water"))
            >>> GroupAccuracy.of(torch.tensor([0, 1, 1, 1]), labels, groups)
            GroupAccuracy(worst 0.500 (water), average 0.750)
        """
        groups = Groups.one(len(labels)) if groups is None else groups
        if not len(predicted) == len(labels) == len(groups):
            raise InputError(
                f"Expected a label and a group for each image; got {len(predicted)} predictions, {len(labels)} labels"
                f" and {len(groups)} groups."
            )
        groups.refuse_empty()
        classes = predicted.argmax(1) if predicted.dim() == 2 else predicted
        right = (classes.cpu() == labels.cpu()).double()
        summed = torch.zeros(len(groups.names), dtype=torch.float64).index_add(0, groups.numbers.cpu().long(), right)
        return cls(groups.names, tuple((summed / groups.counts).tolist()), tuple(groups.counts.tolist()))

    @property
    def worst(self) -> float:
        """The lowest accuracy of any group."""
        return min(self.accuracies)

    @property
    def worst_group(self) -> str:
        """Whose that is; of several the first."""
        return self.names[self.accuracies.index(self.worst)]

    @property
    def average(self) -> float:
        """The mean of the groups' accuracies, each counting once."""
        return sum(self.accuracies) / len(self.accuracies)


def markdown(rows: Iterable[tuple[str, GroupAccuracy]]) -> str:
    """Accuracies as a table in Markdown: worst, average, and each group."""
    rows = list(rows)
    names = rows[0][1].names if rows else ()
    lines = ["| | worst | average | " + " | ".join(names) + " |", "| --- |" + " --: |" * (2 + len(names))]
    for name, found in rows:
        cells = (f"{value:.3f}" for value in (found.worst, found.average, *found.accuracies))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
