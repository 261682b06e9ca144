"""The match rate: how many of the classes that components read in their own space are still read after alignment."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.readings import Spans
from vitdecomp_lens.selecting import Components, as_components, position, positions_of

__all__ = ["MatchRate", "match_rate"]


@dataclass(frozen=True, eq=False, repr=False)
class MatchRate:
    """For each component, how many of its true classes a second reading has.

    Attributes:
        components: What was compared: what is no constant and has classes in truth.
        shared: How many classes are in both readings.
        rates: The same, divided by how many there are in truth.
        chance: The rate to expect of as many classes drawn at random.
    """

    components: Components
    shared: Int[Tensor, "component"]
    rates: Float[Tensor, "component"]
    chance: Float[Tensor, "component"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", as_components(self.components, len(self.rates)))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The components' labels."""
        return tuple(component.label for component in self.components)

    @property
    def mean(self) -> float:
        """The rate averaged over components."""
        return float(self.rates.mean())

    @property
    def mean_chance(self) -> float:
        """What chance gives, averaged over components."""
        return float(self.chance.mean())

    def __len__(self) -> int:
        return len(self.components)

    def __getitem__(self, label: str) -> float:
        return float(self.rates[position(positions_of(self.components), label)])

    def __repr__(self) -> str:
        return f"MatchRate({self.mean:.3f} over {len(self)} components; by chance {self.mean_chance:.3f})"


def match_rate(truth: Spans, aligned: Spans, *, steps: int = 10) -> MatchRate:
    """Compare what components say of classes in their own space with what they say after alignment.

    Truth is a reading of contributions in the space of the representation by the classifier's class vectors. The other
    is one of the aligned contributions by the texts of the same classes. For both, a component's classes are its first
    ``steps``; their order does not matter. The paper reads with ``text_span(..., steps=10)``. (A `TextBank` of class
    vectors has them at unit length, with the length of a class's vector taken off.)

    Args:
        truth: By the classifier's class vectors.
        aligned: By the embedded class names; the same classes in the same order, by the same names.
        steps: How many classes a component.

    Returns:
        Rates of all components but constants and those that in truth do not vary.

    Raises:
        InputError: Where classes or components of the two differ, a reading has fewer steps, or nothing can be
            compared.

    Example:
        >>> from vitdecomp_lens.clip import TextBank
        >>> from vitdecomp_lens.interpret.text_span import text_span
        >>> from vitdecomp_lens.testbed.planted import planted_spans
        >>> planted = planted_spans(images=50, d_clip=16, texts=20)
        >>> bank = TextBank(planted.texts, planted.directions, space="planted")
        >>> spans = text_span(planted.parts, bank, steps=5)
        >>> match_rate(spans, spans, steps=5)
        MatchRate(1.000 over 8 components; by chance 0.250)
    """
    _refuse_unequal(truth, aligned, steps)
    found = positions_of(aligned.components)
    rows = [row for row, c in enumerate(truth.components) if c.kind != "constant" and truth.chosen[row, 0] >= 0]
    if not rows:
        raise InputError("Expected components that vary over images; all have no classes in truth, or are constants.")
    true = truth.chosen[rows, :steps].cpu()
    read = aligned.chosen[[found[truth.labels[row]] for row in rows], :steps].cpu()
    both = (true[:, :, None] == read[:, None]) & (true >= 0)[:, :, None]
    shared = both.sum((1, 2))
    return MatchRate(
        components=tuple(truth.components[row] for row in rows),
        shared=shared,
        rates=shared / (true >= 0).sum(1),
        # Of `read` classes drawn from all, each true one is among them with this probability.
        chance=(read >= 0).sum(1) / torch.tensor(len(truth.bank.texts), dtype=torch.get_default_dtype()),
    )


def _refuse_unequal(truth: Spans, aligned: Spans, steps: int) -> None:
    if steps < 1:
        raise InputError(f"Expected steps= of at least 1; got {steps}.")
    for name, reading in (("truth", truth), ("aligned", aligned)):
        if reading.chosen.shape[1] < steps:
            raise InputError(
                f"Expected readings of at least steps={steps} steps; {name} has {reading.chosen.shape[1]}. Read it "
                f"again with steps={steps}, or compare fewer."
            )
    if truth.bank.texts != aligned.bank.texts:
        pairs = zip(truth.bank.texts, aligned.bank.texts, strict=False)
        differ = next((f"{a!r} and {b!r}" for a, b in pairs if a != b), None)
        raise InputError(
            f"Expected the same classes by the same names in both readings; there are {len(truth.bank.texts)} and "
            f"{len(aligned.bank.texts)}{f', first different: {differ}' if differ else ''}."
        )
    here, there = ({c.label for c in reading.components if c.kind != "constant"} for reading in (truth, aligned))
    if here != there:
        strange = min(here ^ there)
        raise InputError(
            f"Expected readings of the same components; {strange!r} is in only one of them. Select the same labels "
            f"from both decompositions first."
        )
