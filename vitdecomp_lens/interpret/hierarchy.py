"""A vector as a tree of concepts: each level refines the one above it, and at every level the parts sum to the vector.

A `ConceptTree` says which concepts refine which, and by what texts each is known. `decompose_by_concepts` splits
contributions or representations of CLIP space among them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.interpret.concepts import ConceptTree
from vitdecomp_lens.interpret.readings import refuse_other_space
from vitdecomp_lens.selecting import position, positions_of

__all__ = ["SIGNS", "ConceptParts", "ConceptTree", "Signs", "decompose_by_concepts"]

Signs = Literal["any", "positive"]
SIGNS: tuple[str, ...] = get_args(Signs)
_REMAINDER = "(remainder)"
_SHOWN = 5e-4  # what is left of a branch is shown unless that rounds to 0.0 %
_MOST = 100  # steps of Newton's method; a piecewise quadratic function takes some ten
_LEAST = 1e-10  # of the largest eigenvalue: what is smaller is rounding


@dataclass(frozen=True, eq=False, repr=False)
class ConceptParts:
    """Vectors split among the concepts of a tree.

    A *part* of a concept is its *own* and all that its children have. The *remainder* of a level is the rest, which no
    concept has, and what concepts above the level have as their own. So at every level k

        Σ over concepts n of level k of part(n)  +  remainder(k)  =  vectors,

    and part(n) = own(n) + Σ over its children c of part(c). The *share* of a part is what of the whole's squared length
    it accounts for, ⟨part, whole⟩ / ‖whole‖²: signed, and with the remainder's they sum to 1.

    Attributes:
        tree: The concepts.
        labels: What each row of the vectors is; ``("whole",)`` where representations were given.
        vectors: What was split, without the mean of the reference, if one was given.
        amounts: How much of each direction each vector has.
        directions: The texts' directions; for a concept without texts, the mean of its children's.
        owners: To which concept each direction belongs.
        space: The name of the space.
    """

    tree: ConceptTree
    labels: tuple[str, ...]
    vectors: Float[Tensor, "component batch d_clip"]
    amounts: Float[Tensor, "component batch direction"]
    directions: Float[Tensor, "direction d_clip"]
    owners: Int[Tensor, "direction"]
    space: str

    def __repr__(self) -> str:
        component, batch, _ = self.vectors.shape
        return f"ConceptParts({component=}, {batch=}, {self.tree!r}, space={self.space!r})"

    def __str__(self) -> str:
        return self.show()

    @cached_property
    def whole(self) -> Float[Tensor, "batch d_clip"]:
        """The sum over components."""
        return self.vectors.sum(0)

    # ---- vectors

    def own(self, name: str) -> Float[Tensor, "component batch d_clip"]:
        """What a concept has that its children have not; all of it where nothing refines it."""
        return self._along(self.owners == self.tree.number(name))

    def part(self, name: str) -> Float[Tensor, "component batch d_clip"]:
        """What a concept has, with all that refines it."""
        return self._along(self._below[self.tree.number(name)][self.owners])

    def level(self, level: int) -> Float[Tensor, "concept component batch d_clip"]:
        """The parts of the concepts of a level, in the order of ``tree.level(level)``."""
        return torch.stack([self.part(name) for name in self.tree.level(level)])

    def remainder(self, level: int | None = None) -> Float[Tensor, "component batch d_clip"]:
        """What no concept of a level has; None for what no concept has at all.

        Raises:
            InputError: Where there is no such level.
        """
        rest = self.vectors - self.amounts @ self.directions
        if level is None:
            return rest
        shown = {self.tree.number(name) for name in self.tree.level(level)}
        above = [n for n, depth in enumerate(self.tree.depths) if depth < level and n not in shown]
        return rest + self._along(torch.isin(self.owners, torch.tensor(above, device=self.owners.device)))

    def _along(self, which: Bool[Tensor, "direction"]) -> Float[Tensor, "component batch d_clip"]:
        return self.amounts[..., which] @ self.directions[which]

    @cached_property
    def _below(self) -> Bool[Tensor, "concept concept"]:
        """Whether the second concept is the first, or refines it."""
        below = torch.eye(len(self.tree), dtype=torch.bool, device=self.owners.device)
        for number in range(len(self.tree) - 1, -1, -1):
            if (parent := self.tree.parents[number]) >= 0:
                below[parent] |= below[number]
        return below

    # ---- shares

    @cached_property
    def own_shares(self) -> Float[Tensor, "component batch concept"]:
        """What each concept's own accounts for, of the whole of each image."""
        whole = self.whole
        squares = whole.square().sum(-1, keepdim=True)
        each = self.amounts * (whole @ self.directions.T) / squares.where(squares > 0, 1)
        found = each.new_zeros(*each.shape[:2], len(self.tree))
        return found.index_add(2, self.owners, each)

    @cached_property
    def shares(self) -> Float[Tensor, "component batch concept"]:
        """What each concept's part accounts for, of the whole of each image; zero where the whole is."""
        return self.own_shares @ self._below.to(self.own_shares).T

    def share(self, name: str) -> Float[Tensor, "component batch"]:
        """What one concept's part accounts for."""
        return self.shares[..., self.tree.number(name)]

    def remainder_share(self, level: int | None = None) -> Float[Tensor, "component batch"]:
        """What the remainder of a level accounts for."""
        squares = self.whole.square().sum(-1)
        along = einsum(self.remainder(level), self.whole, "component batch d_clip, batch d_clip -> component batch")
        return along / squares.where(squares > 0, 1)

    # ---- shown

    def show(
        self, image: int = 0, *, component: str | None = None, threshold: float = 0.03, levels: int | None = None
    ) -> str:
        """The tree of one image, with shares; branches that account for little are counted together.

        Args:
            image: Which of the batch.
            component: The label of one component; None for the sum of all.
            threshold: Of shares, in either direction: below the first level, concepts of smaller ones are counted
                together, with all below them; a single one is named.
            levels: How many levels at most.

        Returns:
            Lines of text. Under each concept stands what refines it, the largest share first, and ``(own)``, what the
            concept has beside them.

        Raises:
            InputError: Where there is no such image.
            UnknownNameError: Where there is no such component.
        """
        batch = self.vectors.shape[1]
        if not -batch <= image < batch:
            raise InputError(f"Expected an image from 0 to {batch - 1}; got {image}.")
        known = {label: row for row, label in enumerate(self.labels)}
        rows = slice(None) if component is None else [position(known, component)]
        parts, own = (values[rows, image].sum(0).tolist() for values in (self.shares, self.own_shares))
        rest = float(self.remainder_share()[rows, image].sum())
        what = f"image {image}" + ("" if component is None else f", {component}")
        total = sum(own) + rest
        lines = [f"{what}: {_percent(total).strip()} of the whole"]
        tops = [number for number, parent in enumerate(self.tree.parents) if parent < 0]
        shown = _Shown(self.tree, parts, own, threshold, self.tree.depth if levels is None else levels)
        return "\n".join([*lines, *shown.branches(tops, [(_REMAINDER, rest)], "")])


@dataclass(frozen=True)
class _Shown:
    """How a tree is drawn: shares of parts and of what is their own, the least share and the last level."""

    tree: ConceptTree
    parts: Sequence[float]
    own: Sequence[float]
    threshold: float
    levels: int

    def branches(self, numbers: Sequence[int], others: Sequence[tuple[str, float]], indent: str) -> Iterator[str]:
        """Lines for concepts that refine the same one, and for what stands beside them."""
        small = [n for n in numbers if abs(self.parts[n]) < self.threshold and self.tree.parents[n] >= 0]
        kept = sorted((n for n in numbers if n not in small), key=lambda n: -self.parts[n])
        rows: list[tuple[str, float, int | None]] = [(self.tree.names[n], self.parts[n], n) for n in kept]
        if small:
            name = self.tree.names[small[0]] if len(small) == 1 else f"({len(small)} more)"
            rows.append((name, sum(self.parts[n] for n in small), None))
        rows += [(name, share, None) for name, share in others]
        rows = [row for row in rows if row[2] is not None or row[0] == _REMAINDER or abs(row[1]) >= _SHOWN]
        for place, (name, share, number) in enumerate(rows):
            last = place == len(rows) - 1
            yield f"{indent}{'└─' if last else '├─'} {_percent(share)} {name}"
            if number is not None and self.tree.depths[number] < self.levels:
                below = self.tree.numbers_below[number]
                if any(abs(self.parts[child]) >= self.threshold for child in below):
                    yield from self.branches(below, [("(own)", self.own[number])], indent + ("   " if last else "│  "))


def _percent(share: float) -> str:
    """A share as text.

    >>> _percent(-0.041), _percent(1.0)
    (' −4.1 %', '100.0 %')
    """
    return f"{100 * share:5.1f} %".replace("-", "−").rjust(7)


@torch.no_grad()
def decompose_by_concepts(
    vectors: Decomposition | Float[Tensor, "batch d_clip"],
    tree: ConceptTree,
    bank: TextBank,
    *,
    reference: Decomposition | Float[Tensor, "image d_clip"] | None = None,
    signs: Signs = "any",
    ridge: float = 0.1,
) -> ConceptParts:
    """Split vectors of CLIP space among the concepts of a tree, so that every level sums to them exactly.

    Concept n has directions d_t, one for each of its texts (without texts, one: the mean of its children's). With
    weights w_t = 1 / (how many it has), so that a concept counts once by however many texts it is known,

        C_n = Σ_{t of n} w_t d_t d_tᵀ,     C = Σ_n C_n,     λ = ridge · tr(C) / d_clip,
        u   = (C + λ I)⁻¹ v,
        own(n) = C_n u = Σ_{t of n} a_t d_t   with amounts a_t = w_t ⟨d_t, u⟩,
        part(n) = own(n) + Σ_{children c} part(c),     the rest = λ u.

    These solve: minimise ‖v − Σ_t a_t d_t‖² + λ Σ_t a_t² / w_t. (They are the expected values of independent Gaussian
    sources, C_n the covariance of n's and λ I that of noise, when their sum is v.) Therefore:

    - **Exact.** Own parts and the rest sum to v. Part(n) lies in the span of the texts of n and below it.
    - **Unique and without order.** The problem is strictly convex (for ``ridge=0`` it is its limit: of all amounts that
      fit best, the smallest). No concept goes first; siblings that are exchanged exchange their parts.
    - **The same step by step.** With S_n the sum of C_n and all C below it, part(n) = S_n u. So a part splits among its
      own and its children as part(c) = S_c S_n⁺ part(n), S_n = C_n + Σ_c S_c: the same rule once more, within the node.
    - **Linear** with ``signs="any"``: one map for all images, and what components have sums to what their sum has.

    *Correlated texts* share what they have in common, each in the measure of its likeness, in place of large amounts
    that cancel; the larger ``ridge``, the more equally. Where texts outnumber dimensions (1,000 classes in 192), every
    direction is one that many texts have a little of: a share counts against that of the same concept in other images,
    and is small for a single leaf. ``signs="positive"`` then says more: amounts of the *whole* (the sum over
    components) are not negative, so that most are zero and the others larger. Which are not zero is found for each
    image on its whole, and with that choice frozen the split is linear again: components' parts still sum to those of
    the whole, and may themselves be negative.

    Args:
        vectors: Contributions in the space of the texts, as ``parts.map(aligner)`` gives them; or representations.
        tree: The concepts.
        bank: Where their texts' directions are. Texts of one CLIP are alike; ``bank.centred()`` leaves what differs.
        reference: Of the same kind: its mean over images, each component's own, is taken off before.
        signs: ``"any"``, or ``"positive"``.
        ridge: λ relative to the mean square of all directions together along one dimension.

    Raises:
        UnknownNameError: Where texts of the tree are missing in the bank; all of them are named.
        InputError: Where vectors are not of the bank's space, or have NaN or Inf; an option is out of range; or amounts
            above zero do not settle, the texts being nearly dependent.

    Example:
        >>> bank = TextBank(["red", "blue", "star"], torch.eye(3), space="example")
        >>> tree = ConceptTree.of({"colour": ["red", "blue"], "shape": ["star"]})
        >>> print(decompose_by_concepts(torch.tensor([[2.0, 0.0, 1.0]]), tree, bank, ridge=0.0))
        image 0: 100.0 % of the whole
        ├─  80.0 % colour
        │  ├─  66.7 % red
        │  └─  13.3 % (own)
        ├─  20.0 % shape
        │  ├─  10.0 % star
        │  └─  10.0 % (own)
        └─   0.0 % (remainder)
    """
    if signs not in SIGNS:
        raise InputError(f"Expected signs= to be one of {', '.join(map(repr, SIGNS))}; got {signs!r}.")
    if not 0 <= ridge < float("inf") or (signs == "positive" and not ridge):
        raise InputError(
            f"Expected ridge= of at least 0, and above it with signs='positive', where else amounts would not be "
            f"unique; got {ridge}."
        )
    labels, values = _centred(vectors, reference, bank)
    rows, owners, weights = _directions(tree, bank)
    rows, weights = rows.to(values.device), weights.to(values.device)
    scaled = rows * weights.sqrt()[:, None]
    covariance = scaled.T @ scaled
    noise = ridge * float(covariance.trace()) / rows.shape[1]
    wide = values.double()
    if signs == "any":
        amounts = wide @ _inverse(covariance, noise) @ scaled.T
    else:
        amounts = torch.stack([_positive(wide[:, image], scaled, noise) for image in range(wide.shape[1])], 1)
    dtype = accumulator(values.dtype)
    return ConceptParts(
        tree=tree,
        labels=labels,
        vectors=values.to(dtype),
        amounts=(amounts * weights.sqrt()).to(dtype),
        directions=rows.to(dtype),
        owners=owners.to(values.device),
        space=bank.space,
    )


def _inverse(covariance: Float[Tensor, "d_clip d_clip"], noise: float) -> Float[Tensor, "d_clip d_clip"]:
    """Of the covariance and the noise; without noise, on the texts' span only."""
    squares, axes = torch.linalg.eigh(covariance)
    held = squares > _LEAST * squares[-1]
    inverted = torch.where(held, 1 / (squares.clamp(min=0) + noise).where(held, 1), 1 / noise if noise else 0.0)
    return (axes * inverted) @ axes.T


def _positive(
    parts: Float[Tensor, "component d_clip"], rows: Float[Tensor, "direction d_clip"], noise: float
) -> Float[Tensor, "component direction"]:
    """Amounts of scaled directions that are not negative for the sum of parts, and linear in the parts.

    The dual of the problem has as many unknowns as dimensions: minimise λ‖u‖² / 2 + Σ_t max(0, ⟨d_t, u⟩)² / 2 − ⟨u, v⟩,
    and a_t = max(0, ⟨d_t, u⟩). It is strictly convex, and quadratic wherever no sign changes: Newton's method ends.
    """
    whole = parts.sum(0)
    eye = noise * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    ahead = torch.linalg.solve(rows.T @ rows + eye, whole)
    held = rows @ ahead > 0

    def cost(u: Tensor) -> float:
        return float(noise * u.square().sum() + (rows @ u).clamp(min=0).square().sum() - 2 * u @ whole)

    def curvature() -> Tensor:
        return rows[held].T @ rows[held] + eye

    for _ in range(_MOST):
        target = torch.linalg.solve(curvature(), whole)
        if bool(((rows @ target > 0) == held).all()):
            break
        step = 1.0
        while step > _LEAST and cost(ahead + step * (target - ahead)) >= cost(ahead):
            step /= 2
        if step <= _LEAST:  # what is left to gain is rounding
            break
        ahead = ahead + step * (target - ahead)
        held = rows @ ahead > 0
    else:
        raise InputError(
            f"Expected amounts above zero to settle; after {_MOST} steps they have not. Raise ridge=, or leave out "
            f"texts that are nearly sums of others."
        )
    return torch.linalg.solve(curvature(), parts.T).T @ (rows * held[:, None]).T


def _directions(
    tree: ConceptTree, bank: TextBank
) -> tuple[Float[Tensor, "direction d_clip"], Int[Tensor, "direction"], Float[Tensor, "direction"]]:
    """The directions of all concepts, whose each is, and its weight."""
    missing = list(dict.fromkeys(text for texts in tree.texts for text in texts if text not in bank))
    if missing:
        raise UnknownNameError(
            f"The bank of {len(bank)} texts lacks {len(missing)} of the tree's: {', '.join(map(repr, missing))}. "
            f"Make a bank that has them, or change the tree's texts; {near_matches(missing[0], bank.texts)}"
        )
    number = {text: row for row, text in enumerate(bank.texts)}
    known = bank.directions.detach().double()
    centres = known.new_zeros(len(tree), known.shape[1])
    rows: list[Tensor] = [known.new_zeros(0)] * len(tree)
    for node in range(len(tree) - 1, -1, -1):  # children first
        if texts := tree.texts[node]:
            rows[node] = known[[number[text] for text in texts]]
        else:
            rows[node] = centres[list(tree.numbers_below[node])].mean(0, keepdim=True)
        centres[node] = rows[node].mean(0)
    counts = torch.tensor([len(own) for own in rows])
    owners = torch.arange(len(tree)).repeat_interleave(counts)
    return torch.cat(rows), owners, (1 / counts.double())[owners].to(known.device)


def _centred(
    vectors: Decomposition | Tensor, reference: Decomposition | Tensor | None, bank: TextBank
) -> tuple[tuple[str, ...], Float[Tensor, "component batch d_clip"]]:
    """Labels and values, with the mean of a reference taken off."""
    labels, values = _values(vectors, bank, "vectors")
    if reference is None:
        return labels, values
    if isinstance(reference, Decomposition) != isinstance(vectors, Decomposition):
        raise InputError(
            f"Expected a reference of the same kind as the vectors; got {type(reference).__name__} for "
            f"{type(vectors).__name__}."
        )
    if isinstance(reference, Decomposition):
        known = positions_of(reference.components)
        rows = [position(known, label) for label in labels]
        return labels, values - _values(reference, bank, "reference")[1][rows].mean(1, keepdim=True).to(values)
    return labels, values - _values(reference, bank, "reference")[1].mean(1, keepdim=True).to(values)


def _values(vectors: Decomposition | Tensor, bank: TextBank, what: str) -> tuple[tuple[str, ...], Tensor]:
    labels: tuple[str, ...] = ("whole",)
    if isinstance(vectors, Decomposition):
        refuse_other_space(vectors.metadata, bank)
        labels, values = vectors.labels, vectors.values.detach()
    elif isinstance(vectors, Tensor) and vectors.ndim == 2 and vectors.is_floating_point():
        values = vectors.detach()[None]
    else:
        shape = f"shape {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise InputError(f'Expected {what} as a Decomposition, or as Float[Tensor, "batch d_clip"]; got {shape}.')
    if values.shape[-1] != bank.directions.shape[1] or not values.numel():
        raise InputError(
            f"Expected {what} of at least one image in the space of the texts, {bank.space!r}, with "
            f"{bank.directions.shape[1]} dimensions; got shape {tuple(values.shape)}. Take contributions there with "
            f"parts.map(aligner) first."
        )
    for label, row in zip(labels, values.isfinite().all(-1), strict=True):
        if not bool(row.all()):
            raise InputError(
                f"Expected finite {what}; {label!r} has NaN or Inf in image {int((~row).nonzero()[0])}. Look where it "
                f"comes from, or leave that image out."
            )
    return labels, values.to(accumulator(values.dtype))
