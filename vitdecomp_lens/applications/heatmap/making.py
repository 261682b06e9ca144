"""Heatmaps from contributions: the scores of tokens along texts or classes, summed over components.

The score of a text is the sum of what components write along it, and what a component writes the sum of what it reads
from tokens (attention at its values, with the pattern frozen). Summed over components, that is a number a token; over
patches, the class token and constants it is the score itself. Class tokens have no place and are left out.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vitdecomp_lens.applications.heatmap.carried import Carried, Spread
from vitdecomp_lens.applications.heatmap.maps import ANY, Heatmaps
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import By, Component, TokenGrid
from vitdecomp_lens.decomposable import Decomposable
from vitdecomp_lens.decompose import attribute_tokens
from vitdecomp_lens.decomposition import ComponentMaps, OfOneModel
from vitdecomp_lens.errors import InputError, VitDecompWarning
from vitdecomp_lens.explain import Explainer
from vitdecomp_lens.gap import accumulator
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.interpret.statistics import permutations
from vitdecomp_lens.request import MAX_BYTES
from vitdecomp_lens.token_block import TokenBlock
from vitdecomp_lens.tokens import TokenAttribution

__all__ = ["ATTENTION", "How", "from_tokens", "of_classes", "of_texts", "tokens_of_classes"]

ATTENTION = ("attn", "head", "pool")  # the kinds of components that read tokens by attention
METHOD = "decomposition"
How = Literal["signed", "positive", "strength"]
DRAWS = 200


def from_tokens(
    tokens: TokenAttribution, *, components: str | Collection[str] = "attention", how: How = "signed"
) -> Heatmaps:
    """The maps of scores by token, summed over components.

    A head may write against a text where another writes for it, from the same patch. In a signed sum, which is what the
    score is made of, they cancel; what is there, and read, is better seen without.

    Components that read coarser grids, as in later stages of Swin, are spread evenly over the patches of the finest.

    Args:
        tokens: Scores by token, as `attribute_tokens` gives them.
        components: ``"attention"`` for all heads, as the paper (arXiv 2406.01583, section 5) does; ``"all"``, with the
            embedding and MLPs, which are read at the tokens they write to; or labels, such as
            ``scores.select("colour")``. What has no tokens adds nothing.
        how: ``"signed"``, the share of the score, as in the paper; ``"positive"``, in which what a component writes
            against a text from a patch counts as 0 before components are summed; or ``"strength"``, one map for all
            directions together: the root of the sum of their squares, a component and patch at a time, summed over
            components. Of directions that are each taken against the others, it says from where anything is read
            that tells them apart, whichever it speaks for.

    Raises:
        UnknownNameError: Where a label is unknown.
        InputError: Where none of the components reads patches, or there is no such ``how``.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_tokens
        >>> planted = planted_tokens(images=2, noise=0.0)
        >>> maps = from_tokens(planted.tokens, components=[planted.carrier])
        >>> torch.equal(maps[planted.text] > 0, planted.masks)
        True
    """
    return _summed(_chosen(tokens, components), how)


def of_texts(
    model: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    bank: TextBank,
    *,
    through: ComponentMaps | None = None,
    components: str | Collection[str] = "attention",
    how: How = "signed",
    against: TextBank | None = None,
    null: TextBank | None = None,
    by: By = "head",
    batch_size: int = 32,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Heatmaps:
    """Where in each image the components read what they write along each text.

    It is one `attribute_tokens` and a sum over components: for 100 texts and a batch of a ViT-B a tenth more than the
    forward itself (``benchmarks/heatmaps.py``). With an aligner or a null, heads are read one by one, which is dearer.

    Args:
        model: As for `attribute_tokens`: a CLIP's image tower, or any model with an aligner.
        images: As the model takes them.
        bank: The texts.
        through: An aligner into the texts' space, made for this model and ``by``; None where the representation is in
            it, as a CLIP's is.
        components: As for `from_tokens`.
        how: The same.
        against: Other texts, whose mean is subtracted from each text; a text that is among them does not count against
            itself, so that ``against=bank`` holds the texts against each other.
        null: Random texts, to tell whether any component carries the texts asked for: many more, and as different as
            can be. At most 200 of them are drawn.
        by: As for `attribute_tokens`.
        batch_size: How many images to keep the scores of all components of at once.
        seed: Of which random texts are drawn.
        max_bytes: The largest scores of ``batch_size`` images to allow.

    Returns:
        Maps in units of the score: over its patches, a map sums to what the components read there.

    Raises:
        InputError: Where texts are of another space than the aligner leads to, or of another width than the
            representation; where none of the components reads patches; where there are too few random texts.
        UnknownNameError: Where a component's label is unknown.
        VitDecompError: As `attribute_tokens`.

    Warns:
        VitDecompWarning: Where no component carries a text more than random texts, and what these reach.

    Example:
        >>> from vitdecomp_lens import testbed
        >>> images = testbed.normalised(testbed.Scenes("pairs").images(range(2)))
        >>> bank = TextBank(["this", "that"], torch.randn(2, 64), space="drawn")
        >>> of_texts(testbed.load("clip"), images, bank, against=bank)
        Heatmaps(batch=2, text=2, 6 × 6 patches; decomposition)
    """
    if isinstance(through, OfOneModel) and through.space is not None:
        bank.check_space(through.space)
    directions = _without(bank, against)
    if null is not None:
        bank.check_space(null.space)
        directions = torch.cat([directions, _drawn(null, bank, against, seed).to(directions)])
    if null is None and through is None:
        by = _coarsest(by, model, components, how)
    options: dict[str, Any] = {"through": through, "by": by, "max_bytes": max_bytes, **_named(components)}
    maker = _Maker(bank.texts, components, how, with_null=null is not None)
    for part in _batches(images, batch_size):
        maker.add(attribute_tokens(model, part, directions.to(part.device), **options))
    return maker.result()


def of_classes(
    model: HookedViT,
    images: Float[Tensor, "batch channel height width"],
    classes: Sequence[int | str],
    *,
    components: str | Collection[str] = "attention",
    how: How = "signed",
    relative: bool = False,
    by: By = "head",
    batch_size: int = 32,
    max_bytes: int = MAX_BYTES,
) -> Heatmaps:
    """Where in each image the components read what they write along the logit of each class.

    Args:
        model: With a classifier.
        images: As the model takes them.
        classes: Their numbers or names.
        components: As for `from_tokens`.
        how: The same.
        relative: Whether to take the logit minus the mean over all classes that answer the same question, as `explain`
            does: what a component writes for all classes alike says nothing.
        by: As for `attribute_tokens`.
        batch_size: As for `of_texts`.
        max_bytes: As for `of_texts`.

    Returns:
        Maps in units of the logit.

    Raises:
        UnsupportedModelError: Where the model has no classifier.
        UnknownNameError: Where there is no such class or component.
        InputError: Where no class is asked for, or one twice, or none of the components reads patches.

    Example:
        >>> from vitdecomp_lens import testbed
        >>> images = testbed.normalised(testbed.Scenes("test").images(range(2)))
        >>> of_classes(testbed.load("deit"), images, ["circle", "red"], relative=True).texts
        ('circle', 'red')
    """
    by = _coarsest(by, model, components, how)
    options: dict[str, Any] = {"relative": relative, "by": by, "batch_size": batch_size, "max_bytes": max_bytes}
    batches = tokens_of_classes(model, images, classes, **options, **_named(components))
    _, names = _logits(model, classes, relative)
    maker = _Maker(names, components, how)
    for tokens in batches:
        maker.add(tokens)
    return maker.result()


def tokens_of_classes(
    model: HookedViT,
    images: Float[Tensor, "batch channel height width"],
    classes: Sequence[int | str],
    *,
    relative: bool = False,
    batch_size: int = 32,
    **options: Any,
) -> Iterator[TokenAttribution]:
    """Scores by token along the logit of each class, batch by batch: what `of_classes` sums.

    Args:
        model: With a classifier.
        images: As the model takes them.
        classes: Their numbers or names.
        relative: As for `of_classes`.
        batch_size: How many images a batch has; one, where there is an activation before the classifier.
        **options: Passed to `attribute_tokens`.

    Raises:
        VitDecompError: As `of_classes`.
    """
    rows, _ = _logits(model, classes, relative)
    curved = model.has_activation_before_classifier
    # The factor that stands for an activation before the classifier is each image's own.
    for part in _batches(images, 1 if curved else batch_size):
        directions = rows.to(part)
        if curved:
            _, cache = model.run_with_cache(part, names_filter="hook_representation")
            weight, _ = model.unembedding_at(cache["hook_representation"][0])
            yield attribute_tokens(model, part, directions @ weight.T, **options)
        else:
            yield attribute_tokens(model, part, directions, of="logits", **options)


# --- which directions -------------------------------------------------------------------------------------------------


def _logits(
    model: HookedViT, classes: Sequence[int | str], relative: bool
) -> tuple[Float[Tensor, "direction class"], tuple[str, ...]]:
    """The directions of logits that are classes', and the classes' names."""
    if isinstance(classes, str | int) or not len(classes):
        raise InputError(f"Expected classes as a list of at least one number or name; got {classes!r}.")
    found = [Explainer(model, class_=one) for one in classes]
    numbers = [one.wanted or 0 for one in found]
    names = tuple(one.names.short(number) for one, number in zip(found, numbers, strict=True))
    if len(set(numbers)) < len(numbers):
        raise InputError(f"Expected different classes; got {list(classes)!r}, which are {list(names)!r}.")
    if len(set(names)) < len(names):  # of ImageNet's classes, two are called crane
        names = tuple(f"{name} ({number})" for name, number in zip(names, numbers, strict=True))
    rows = functional.one_hot(torch.tensor(numbers), len(found[0].names.names)).double()
    for row, one in enumerate(found):
        answers = one.question.classes
        rows[row, list(answers)] -= relative / len(answers)
    return rows, names


def _without(bank: TextBank, against: TextBank | None) -> Float[Tensor, "text d_clip"]:
    """The directions of texts, minus the mean of other texts."""
    if against is None:
        return bank.directions
    bank.check_space(against.space)
    others = against.directions.to(bank.directions)
    among = torch.tensor([text in against for text in bank.texts])
    counts = len(against) - among.to(others)
    if not bool(counts.all()):
        raise InputError(f"Expected other texts to hold {bank.texts[0]!r} against; there are none.")
    own = torch.stack([others[against.texts.index(t)] if t in against else 0 * others[0] for t in bank.texts])
    return bank.directions - (others.sum(0) - own) / counts[:, None].to(others)


def _drawn(null: TextBank, bank: TextBank, against: TextBank | None, seed: int) -> Float[Tensor, "draw d_clip"]:
    """The directions of random texts: none of those asked for, read as these are."""
    others = [text for text in null.texts if text not in bank]
    if not others:
        raise InputError("Expected random texts beside those asked for; the null has none.")
    order = permutations(len(others), 1, seed)[0, :DRAWS].tolist()
    return _without(null.select([others[number] for number in order]), against)


# --- sums over components ---------------------------------------------------------------------------------------------


class _Maker:
    """Sums scores over components batch by batch, so that only one batch's are there at once."""

    def __init__(
        self, texts: Sequence[str], components: str | Collection[str], how: How, *, with_null: bool = False
    ) -> None:
        self.texts, self.components, self.how = tuple(texts), components, how
        self.pieces: list[Heatmaps] = []
        self.spread = Spread() if with_null else None

    def add(self, tokens: TokenAttribution) -> None:
        """Add a batch, of which the first directions are the texts'."""
        tokens = _chosen(tokens, self.components)
        if self.spread is not None:
            self.spread.add(tokens)
            asked = slice(len(self.texts))
            blocks = tuple(block.with_values(block.values[..., asked]) for block in tokens.blocks)
            untokened = replace(tokens.untokened, values=tokens.untokened.values[..., asked])
            tokens = replace(tokens, blocks=blocks, untokened=untokened, total=None)
        maps = _summed(tokens, self.how)
        self.pieces.append(maps if maps.texts == (ANY,) else replace(maps, texts=self.texts))

    def result(self) -> Heatmaps:
        """All maps; a warning names the texts that no component carries."""
        maps = Heatmaps.cat(self.pieces)
        if self.spread is None:
            return maps
        carried = self.spread.carried(self.texts)
        _warn(carried)
        return replace(maps, carried=carried)


def _warn(carried: Carried) -> None:
    if carried.lacking:
        said = "; ".join(carried.say(text) for text in carried.lacking[:3])
        more = f"; and {len(carried.lacking) - 3} more" if len(carried.lacking) > 3 else ""
        warnings.warn(
            f"No component carries these texts more than random texts, and their heatmaps mean nothing: {said}{more}.",
            VitDecompWarning,
            stacklevel=4,
        )


def _batches(images: Tensor, size: int) -> Iterator[Tensor]:
    if size < 1:
        raise InputError(f"Expected batch_size= of at least 1; got {size}.")
    return iter(images.split(size))


def _coarsest(by: By, model: nn.Module, components: str | Collection[str], how: How) -> By:
    """Whole layers in place of heads, where all of these count alike and are read at the same places."""
    if by != "head" or how != "signed" or components not in ("attention", "all"):
        return by
    same = isinstance(model, Decomposable) and model.token_points("layer") == model.token_points("head")
    return "layer" if same else "head"


def _named(components: str | Collection[str]) -> dict[str, Any]:
    """Which components to compute: those that are named."""
    if isinstance(components, str):
        return {} if components in ("attention", "all") else {"components": [components]}
    if not components:
        raise InputError("Expected components: 'attention', 'all', or at least one label; got none.")
    return {"components": list(components)}


def _chosen(tokens: TokenAttribution, components: str | Collection[str]) -> TokenAttribution:
    """Some of the components."""
    if components == "all":
        return tokens
    if components == "attention":
        labels = [c.label for c in tokens.components if c.kind in ATTENTION]
        if not labels:
            raise InputError(
                f"Expected components that read tokens by attention; there are none among {list(tokens.labels[:5])!r}. "
                f"Pass components='all', or labels."
            )
        return tokens.select(labels=labels)
    named: list[str] = _named(components)["components"]
    return tokens.select(labels=named)


def _summed(tokens: TokenAttribution, how: How) -> Heatmaps:
    """The sum over components, on the finest grid of patches, over all that any grid covers."""
    if how not in get_args(How):
        raise InputError(f"Expected how= to be one of {', '.join(get_args(How))}; got {how!r}.")
    blocks = [_counted(block, how) for block in tokens.blocks if block.grid.rows * block.grid.columns]
    if not blocks:
        names = [c.label for c in (*tokens.components, *tokens.untokened.components)][:5]
        raise InputError(f"Expected components that read patches; none of {names!r} does.")
    canvas = _canvas([block.grid for block in blocks])
    values = torch.stack([_laid(block, canvas) for block in blocks]).sum(0) if len(blocks) > 1 else None
    values = _laid(blocks[0], canvas) if values is None else values
    if how == "strength":
        return Heatmaps(values, (ANY,), canvas, f"{METHOD}, strength")
    texts = tokens.directions or tuple(f"direction {number}" for number in range(values.shape[1]))
    return Heatmaps(values, texts, canvas, METHOD if how == "signed" else f"{METHOD}, {how}")


def _counted(block: TokenBlock, how: How) -> TokenBlock:
    """What counts of the scores of each component, before they are summed."""
    if how == "strength":
        values = torch.linalg.vector_norm(block.values, dim=3, keepdim=True)
        return TokenBlock(values, block.components, block.grid)
    return block if how == "signed" else block.with_values(block.values.clamp(min=0))


def _canvas(grids: Sequence[TokenGrid]) -> TokenGrid:
    """The finest of some grids, over all that any of them covers."""
    finest = max(grids, key=lambda grid: grid.rows * grid.columns)
    height, width = (max(grid.image_size[axis] for grid in grids) for axis in (0, 1))
    rows, columns = height * finest.rows // finest.image_size[0], width * finest.columns // finest.image_size[1]
    seen = finest.seen or finest.image_size
    return TokenGrid(rows, columns, (height, width), seen=None if seen == (height, width) else seen)


def _laid(block: TokenBlock, canvas: TokenGrid) -> Float[Tensor, "batch text row column"]:
    """The sum over a block's components, its tokens spread evenly over the canvas's patches."""
    whole = block.values.sum(0, keepdim=True, dtype=accumulator(block.values.dtype))
    return TokenBlock(whole, (Component(kind="constant", name="all"),), block.grid).laid_on(canvas)[0]
