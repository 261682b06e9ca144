"""An image in a few phrases, and for each phrase the components, and the patches, that carry it.

`describe` reads contributions and a text bank. Patches need scores by token along the phrases' directions, which only
the model can give: ``description.directions`` says along which, ``description.with_patches(tokens)`` adds them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.interpret.readings import refuse_other_space
from vitdecomp_lens.selecting import Components, as_components, position, positions_of, summary
from vitdecomp_lens.tokens import TokenAttribution

__all__ = ["Description", "Patch", "describe"]

_LEAST = 1e-6  # of an image's length: a text with which less of it agrees adds rounding
_AGREES = (
    1e-2  # of the largest amount: how far sums over tokens, in half precision too, may be from components' amounts
)


@dataclass(frozen=True)
class Patch:
    """A patch, and what it carries of a phrase.

    Attributes:
        name: Its row and column, such as ``"r2c3"``.
        rectangle: Top, left, bottom, right in pixels of the model's image.
        amount: Its scores summed over components, less those of the reference at the same place, where these are known.
    """

    name: str
    rectangle: tuple[float, float, float, float]
    amount: float


@dataclass(frozen=True, eq=False, repr=False)
class Description:
    """A few phrases for one image, and what carries them.

    With the image's representation v, less the mean of the reference if there is one, and the phrases' texts T as
    rows: amounts = T⁺ v, none of them negative. The same map T⁺ gives what each component adds to each amount, so that
    a row of ``by_component`` sums to the amount exactly.

    Attributes:
        phrases: The most telling first.
        amounts: How much of each phrase's unit direction the image has.
        shares: What each phrase accounts for of ‖v‖²: amount · ⟨text, v⟩ / ‖v‖². With the rest they sum to 1.
        by_component: What each component adds to each amount.
        components: Which components.
        directions: The rows of (T⁺)ᵀ: scores of contributions along these directions are amounts. (Along the text
            itself they would count again what other phrases say.)
        offsets: What of a component's score along each direction is the reference's mean, and not in the amounts.
        image: Which of the batch it is.
        space: The name of the space.
        patches: For each phrase the patches that carry most of it, or None before `with_patches`.
        beside_patches: What no patch has: tokens that are no patches, such as a class token, and components without
            tokens. With all patches it sums to the amount; see `with_patches`.
    """

    phrases: tuple[str, ...]
    amounts: Float[Tensor, "phrase"]
    shares: Float[Tensor, "phrase"]
    by_component: Float[Tensor, "phrase component"]
    components: Components
    directions: Float[Tensor, "phrase d_clip"]
    offsets: Float[Tensor, "phrase component"]
    image: int
    space: str
    patches: tuple[tuple[Patch, ...], ...] | None = None
    beside_patches: Float[Tensor, "phrase"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", as_components(self.components, self.by_component.shape[1]))

    def __len__(self) -> int:
        return len(self.phrases)

    def __repr__(self) -> str:
        said = ", ".join(
            f"{phrase!r} {share:.2f}" for phrase, share in zip(self.phrases, self.shares.tolist(), strict=True)
        )
        return f"Description(image {self.image}: {said or 'nothing'}; {summary(self.components)})"

    def __str__(self) -> str:
        return self.show()

    @property
    def labels(self) -> tuple[str, ...]:
        """The components' labels."""
        return tuple(component.label for component in self.components)

    def top(self, phrase: str, k: int = 3) -> tuple[tuple[str, float], ...]:
        """The components that add most to a phrase, in either direction, with what they add.

        Raises:
            UnknownNameError: Where the description has no such phrase.
        """
        row = self.by_component[self._number(phrase)]
        best = row.abs().topk(min(k, len(row))).indices.tolist()
        return tuple((self.labels[number], float(row[number])) for number in best)

    def _number(self, phrase: str) -> int:
        if phrase not in self.phrases:
            raise UnknownNameError(
                f"The description has no phrase {phrase!r}; it has {', '.join(map(repr, self.phrases)) or 'none'}."
            )
        return self.phrases.index(phrase)

    def show(self, *, components: int = 3) -> str:
        """A line for each phrase: its share, its amount, the components that add most, and the patches."""
        lines = [f"image {self.image}: {len(self)} phrases for {100 * float(self.shares.sum()):.0f} %"]
        for row, phrase in enumerate(self.phrases):
            carried = ", ".join(f"{label} {amount:+.2f}" for label, amount in self.top(phrase, components))
            line = f"  {100 * float(self.shares[row]):5.1f} %  {phrase}  ({float(self.amounts[row]):.2f}: {carried})"
            if self.patches is not None:
                line += f"  at {', '.join(f'{patch.name} {patch.amount:+.2f}' for patch in self.patches[row])}"
            lines.append(line.replace("-", "−") if "-" not in phrase else line)
        return "\n".join(lines)

    def with_patches(
        self, tokens: TokenAttribution, *, reference: TokenAttribution | None = None, k: int = 3
    ) -> "Description":
        """The same, with the patches that carry most of each phrase.

        With ``reference``, the mean of its images is taken off each token's score, as it was off the amounts: a
        phrase's patches (all of them, not only the k strongest) and its ``beside_patches`` sum to its amount. So they
        do for a description without a reference. A description with one that is given none here gets patches that hold
        the reference's mean too: they sum to the amount and its ``offsets``, and a patch may be strong because it is so
        in every image.

        Args:
            tokens: Scores along ``directions``, in their order, of this image; or of its whole batch. In CLIP space
                that is ``attribute_tokens(model, images, description.directions)``. Components that the description
                does not have are left out.
            reference: The same of the images that were the description's reference, all of them, along the same
                directions. Their mean over images, as one image, does as well.
            k: How many patches a phrase.

        Raises:
            InputError: Where directions, grids or images do not fit, a component of the description is missing (but for
                constants), or scores summed over tokens are not the amounts, so that they are of other directions or
                other images.

        Example:
            >>> from vitdecomp_lens import HookedViT, attribute_tokens, decompose
            >>> _ = torch.manual_seed(0)
            >>> model = HookedViT.from_timm("test_vit", num_classes=5)
            >>> images, others = torch.randn(1, 3, 160, 160), torch.randn(3, 3, 160, 160)
            >>> bank = TextBank(["up", "down"], torch.eye(64)[:2] - torch.eye(64)[2:4], space="example")
            >>> one = describe(decompose(model, images), bank, reference=decompose(model, others))[0]
            >>> tokens, mean = (attribute_tokens(model, batch, one.directions) for batch in (images, others))
            >>> one = one.with_patches(tokens, reference=mean, k=100)
            >>> sums = torch.tensor([sum(patch.amount for patch in of) for of in one.patches])
            >>> torch.allclose(sums + one.beside_patches, one.amounts, atol=1e-4)
            True
        """
        if k < 1:
            raise InputError(f"Expected k= of at least 1; got {k}.")
        tokens, expected = self._of_components(self._of_this_image(tokens)), self.by_component + self.offsets
        self._refuse_other_scores(tokens, expected, f"this image (image {self.image} of its batch)")
        if reference is not None:
            if len(self) and not bool(self.offsets.any()):
                raise InputError("Expected no reference: the description has none. Describe with reference= first.")
            reference = self._of_components(self._along_directions(reference))
            self._refuse_other_scores(reference, self.offsets, "all images of the description's reference")
            tokens, expected = _less_mean(tokens, reference), self.by_component
        patches = tuple(tuple(_strongest(tokens, row, k)) for row in range(len(self)))
        return replace(self, patches=patches, beside_patches=self._beside(tokens, expected))

    def _along_directions(self, tokens: TokenAttribution) -> TokenAttribution:
        count = tokens.untokened.values.shape[2]
        if count != len(self):
            raise InputError(
                f"Expected scores along the description's {len(self)} directions; got {count}. Attribute along "
                f"description.directions."
            )
        return tokens

    def _of_this_image(self, tokens: TokenAttribution) -> TokenAttribution:
        batch = self._along_directions(tokens).untokened.values.shape[1]
        if batch > 1 and self.image >= batch:
            raise InputError(f"Expected scores of this image, or of the batch with image {self.image}; got {batch}.")
        return tokens.images([0 if batch == 1 else self.image])

    def _of_components(self, tokens: TokenAttribution) -> TokenAttribution:
        """The scores of the description's components. Constants, such as an aligner's bias, may be missing."""
        there = (*tokens.components, *tokens.untokened.components)
        known = {component.label for component in there}
        missing = [one.label for one in self.components if one.label not in known and one.kind != "constant"]
        if missing or not known & set(self.labels):
            lacking = f"; {missing[0]!r} is missing" if missing else ""
            raise InputError(
                f"Expected scores of the description's components, {summary(self.components)}; got those of "
                f"{summary(there)}{lacking}. Decompose and attribute with the same by=."
            )
        return tokens.select(labels=[label for label in self.labels if label in known])

    def _refuse_other_scores(
        self, tokens: TokenAttribution, expected: Float[Tensor, "phrase component"], images: str
    ) -> None:
        """Refuse scores that, summed over tokens and averaged over images, are not those of the description."""
        scores = tokens.sum_tokens()
        means = scores.values.mean(1, dtype=accumulator(scores.values.dtype))
        known, rows = positions_of(scores.components), expected.T.to(means)
        size = float((self.by_component + self.offsets).abs().max()) if len(self) else 0.0
        for label, row in zip(self.labels, rows, strict=True):
            off = float((means[known[label]] - row).abs().amax()) if label in known and len(self) else 0.0
            if off > _AGREES * size:
                raise InputError(
                    f"Expected scores that sum over tokens to what components add to the phrases; those of {label!r} "
                    f"are off by {off:.2g}. Attribute {images} along description.directions, with the same model and "
                    f"cut."
                )

    def _beside(self, tokens: TokenAttribution, expected: Float[Tensor, "phrase component"]) -> Float[Tensor, "phrase"]:
        """What tokens that are no patches and components without tokens have, those included that were not scored."""
        wide = expected.double()
        found = tokens.untokened.values[:, 0].sum(0, dtype=torch.float64).to(wide.device)
        for block in tokens.blocks:
            found += block.values[:, 0, : len(block.grid.prefix)].sum((0, 1), dtype=torch.float64).to(wide.device)
        scored = {*tokens.labels, *tokens.untokened.labels}
        found += wide[:, [row for row, label in enumerate(self.labels) if label not in scored]].sum(1)
        return found.to(expected.dtype)


@torch.no_grad()
def describe(
    parts: Decomposition,
    bank: TextBank,
    tokens: TokenAttribution | None = None,
    *,
    phrases: int = 5,
    reference: Decomposition | None = None,
) -> tuple[Description, ...]:
    """Describe each image in a few phrases, by non-negative orthogonal matching pursuit on its representation.

    The representation is the sum of the contributions, less the mean of the reference's. Each step takes the text that
    agrees best with what is left, and fits the amounts of all texts so far again, by least squares; one that would make
    an amount negative is passed over. It ends early where no text agrees with what is left. Which texts are chosen is
    decided by the whole; with that choice, what each component adds to each phrase is linear and exact.

    Args:
        parts: Contributions in the space of the texts, as ``parts.map(aligner)`` gives them.
        bank: The texts. Of a bank that is not centred, all texts agree with most images.
        tokens: Scores along the directions of all texts of the bank in their order, where they were computed before:
            patches are read off them, with the reference's mean in them if there is a reference. Else see
            `Description.with_patches`, which can take it off.
        phrases: How many at most.
        reference: Contributions of other images: the mean of their components is taken off, so that phrases say how an
            image differs from them.

    Returns:
        A description of each image of the batch.

    Raises:
        InputError: Where contributions are not of the bank's space, or have NaN or Inf; or an option is out of range.
        UnknownNameError: Where the reference lacks a component.

    Example:
        >>> bank = TextBank(["red", "blue", "star"], torch.eye(3), space="example")
        >>> parts = Decomposition(torch.tensor([[[2.0, 0.0, 0.0]], [[0.0, -1.0, 1.0]]]), ("L0H0", "mlp.0"))
        >>> (description,) = describe(parts, bank)
        >>> description
        Description(image 0: 'red' 0.67, 'star' 0.17; 1 head (layer 0), 1 mlp (layer 0))
        >>> description.top("star", 1)
        (('mlp.0', 1.0),)
    """
    _refuse(parts, bank, phrases)
    values = parts.values.detach().to(accumulator(parts.values.dtype))
    mean = torch.zeros_like(values[:, 0])
    if reference is not None:
        _refuse(reference, bank, phrases)
        known = positions_of(reference.components)
        rows = [position(known, label) for label in parts.labels]
        mean = reference.values.detach().to(values).mean(1)[rows]
    texts = bank.directions.detach().to(values.device, torch.float64)
    found = []
    for image in range(values.shape[1]):
        here = (values[:, image] - mean).double()
        description = _described(here, mean.double(), texts, phrases)
        found.append(_labelled(description, parts, bank, image, values.dtype))
    if tokens is None:
        return tuple(found)
    return tuple(_with_bank_tokens(one, bank, tokens) for one in found)


@dataclass(frozen=True)
class _Found:
    """What was found for one image, by numbers of texts."""

    chosen: list[int]
    inverse: Float[Tensor, "phrase d_clip"]
    amounts: Float[Tensor, "phrase"]
    shares: Float[Tensor, "phrase"]
    by_component: Float[Tensor, "phrase component"]
    offsets: Float[Tensor, "phrase component"]


def _described(
    parts: Float[Tensor, "component d_clip"], mean: Float[Tensor, "component d_clip"], texts: Tensor, most: int
) -> _Found:
    whole = parts.sum(0)
    chosen = _pursued(whole, texts, most)
    rows = texts[chosen]
    inverse = torch.linalg.pinv(rows).T if chosen else rows
    amounts = inverse @ whole
    shares = amounts * (rows @ whole) / whole.square().sum().clamp(min=torch.finfo(whole.dtype).tiny)
    order = shares.argsort(descending=True, stable=True)
    numbers = [chosen[place] for place in order.tolist()]
    return _Found(
        numbers, inverse[order], amounts[order], shares[order], inverse[order] @ parts.T, inverse[order] @ mean.T
    )


def _pursued(whole: Float[Tensor, "d_clip"], texts: Float[Tensor, "text d_clip"], most: int) -> list[int]:
    """The numbers of the texts of a non-negative orthogonal matching pursuit."""
    chosen: list[int] = []
    left, passed = whole, torch.zeros(len(texts), dtype=torch.bool, device=texts.device)
    least = _LEAST * whole.norm()
    while len(chosen) < most:
        agrees = (texts @ left).masked_fill(passed, -torch.inf)
        best = int(agrees.argmax())
        if not bool(agrees[best] > least):
            break
        passed[best] = True
        rows = texts[[*chosen, best]]
        amounts = torch.linalg.pinv(rows).T @ whole
        if bool((amounts > 0).all()):
            chosen.append(best)
            left = whole - amounts @ rows
    return chosen


def _labelled(found: _Found, parts: Decomposition, bank: TextBank, image: int, dtype: torch.dtype) -> Description:
    return Description(
        phrases=tuple(bank.texts[number] for number in found.chosen),
        amounts=found.amounts.to(dtype),
        shares=found.shares.to(dtype),
        by_component=found.by_component.to(dtype),
        components=parts.components,
        directions=found.inverse.to(dtype),
        offsets=found.offsets.to(dtype),
        image=image,
        space=bank.space,
    )


def _with_bank_tokens(description: Description, bank: TextBank, tokens: TokenAttribution) -> Description:
    """Scores along a description's directions from those along the texts: (T⁺)ᵀ = (T Tᵀ)⁺ T, and scores are linear."""
    count = tokens.untokened.values.shape[2]
    if count != len(bank):
        raise InputError(
            f"Expected scores by token along the {len(bank)} texts of the bank, in their order; got {count} "
            f"directions. Or pass none, and add them with description.with_patches."
        )
    number = {text: row for row, text in enumerate(bank.texts)}
    chosen: Int[Tensor, "phrase"] = torch.tensor([number[phrase] for phrase in description.phrases], dtype=torch.int64)
    rows = bank.directions[chosen].double()
    mixing = torch.linalg.pinv(rows @ rows.T)

    def along(values: Tensor) -> Tensor:
        return values[..., chosen.to(values.device)] @ mixing.to(values)

    blocks = tuple(block.with_values(along(block.values)) for block in tokens.blocks)
    untokened = replace(tokens.untokened, values=along(tokens.untokened.values), directions=None)
    return description.with_patches(replace(tokens, blocks=blocks, untokened=untokened, total=None, complete=False))


def _less_mean(tokens: TokenAttribution, reference: TokenAttribution) -> TokenAttribution:
    """The scores of one image less the mean of a reference's, token by token."""
    if [(block.components, block.grid) for block in tokens.blocks] != [
        (block.components, block.grid) for block in reference.blocks
    ] or tokens.untokened.components != reference.untokened.components:
        raise InputError(
            "Expected scores of image and reference by the same tokens; their components or grids differ. Attribute "
            "both with the same model, cut and image size."
        )

    def less(values: Tensor, others: Tensor) -> Tensor:
        wide = accumulator(values.dtype, others.dtype)
        return values.to(wide) - others.mean(1, keepdim=True, dtype=wide).to(values.device)

    pairs = zip(tokens.blocks, reference.blocks, strict=True)
    blocks = tuple(block.with_values(less(block.values, of.values)) for block, of in pairs)
    untokened = replace(tokens.untokened, values=less(tokens.untokened.values, reference.untokened.values))
    return replace(tokens, blocks=blocks, untokened=untokened, total=None, complete=False)


def _strongest(tokens: TokenAttribution, direction: int, k: int) -> Iterator[Patch]:
    """The patches of highest score summed over components, of all grids together."""
    patches = []
    for block in tokens.blocks:
        scores = block.values[:, 0, :, direction].sum(0, dtype=accumulator(block.values.dtype))
        for token in range(len(block.grid.prefix), len(block.grid)):
            rectangle = block.grid.rectangle(token)
            assert rectangle is not None  # only prefix tokens have none
            patches.append(Patch(block.grid.names[token], rectangle, float(scores[token])))
    yield from sorted(patches, key=lambda patch: -patch.amount)[:k]


def _refuse(parts: Decomposition, bank: TextBank, phrases: int) -> None:
    if phrases < 1:
        raise InputError(f"Expected phrases= of at least 1; got {phrases}.")
    if not isinstance(parts, Decomposition) or not isinstance(bank, TextBank):
        raise InputError(f"Expected a Decomposition and a TextBank; got {type(parts).__name__}, {type(bank).__name__}.")
    refuse_other_space(parts.metadata, bank)
    if parts.values.shape[-1] != bank.directions.shape[1] or not parts.values.numel():
        raise InputError(
            f"Expected contributions of at least one image in the space of the texts, {bank.space!r}, with "
            f"{bank.directions.shape[1]} dimensions; got shape {tuple(parts.values.shape)}. Take them there with "
            f"parts.map(aligner) first."
        )
    for label, row in zip(parts.labels, parts.values.isfinite().all(-1), strict=True):
        if not bool(row.all()):
            raise InputError(
                f"Expected finite contributions; those of {label!r} have NaN or Inf in image "
                f"{int((~row).nonzero()[0])}. Look where they come from, or leave that image out."
            )
