"""What a text bank's texts, templates and directions have to be."""

from collections.abc import Iterable, Sequence

from jaxtyping import Float, Int
from torch import Tensor, finfo

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.selecting import refuse_duplicates

AS_THEY_ARE = ("{}",)
NEARLY = 8  # how many roundings a unit row's length may be off


def checked(texts: Iterable[str]) -> tuple[str, ...]:
    """Texts that can name directions.

    Raises:
        InputError: Where there are none, or one is blank, given twice, or no text.

    >>> checked(["a cat", "a dog"])
    ('a cat', 'a dog')
    """
    if isinstance(texts, str):
        raise InputError(f"Expected several texts; got one, {texts!r}. Put it into a list.")
    texts = tuple(texts)
    if not texts:
        raise InputError("Expected at least one text; got none.")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"Expected texts that say something; text {number} is {text!r}. Leave it out.")
    refuse_duplicates(texts, of="texts", remedy="Give each text once, as list(dict.fromkeys(texts)) does.")
    return texts


def checked_templates(templates: Sequence[str] | None) -> tuple[str, ...]:
    """Templates that texts can be put into; None stands for the texts as they are.

    Raises:
        InputError: Where there are none, or one has no place for a text.

    >>> checked_templates(None), checked_templates("a photo of {}")
    (('{}',), ('a photo of {}',))
    """
    templates = AS_THEY_ARE if templates is None else (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates:
        raise InputError("Expected at least one template, or templates=None for the texts as they are; got none.")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(
                f"Expected templates with one {{}}, where the text goes, as in 'a photo of {{}}'; got {template!r}."
            )
    return templates


def unit_rows(directions: Float[Tensor, "text d_clip"], texts: Sequence[str]) -> Float[Tensor, "text d_clip"]:
    """Rows of unit length: as they are where that is so but for rounding, so that saving and loading changes nothing.

    Raises:
        InputError: Where there is not one for each text, or one is zero or not finite.
    """
    if directions.ndim != 2 or len(directions) != len(texts) or not directions.shape[1]:
        raise InputError(
            f'Expected directions as Float[Tensor, "text d_clip"] with a row for each of the {len(texts)} texts; got '
            f"shape {tuple(directions.shape)}."
        )
    if not directions.is_floating_point():
        raise InputError(f"Expected directions in a floating dtype; got {directions.dtype}.")
    wide = directions.cpu().double()  # not every device has float64
    lengths = wide.norm(dim=1, keepdim=True)
    sound = lengths.isfinite() & (lengths > 0)
    if not bool(sound.all()):
        row = int((~sound).nonzero()[0, 0])
        raise InputError(
            f"Expected directions that are finite and not zero; that of {texts[row]!r} has length "
            f"{float(lengths[row])}. Check how it was made, or leave it out."
        )
    if bool(((lengths - 1).abs() <= NEARLY * finfo(directions.dtype).eps).all()):
        return directions
    return (wide / lengths).to(directions)


def refuse_same_tokens(texts: Sequence[str], tokens: Int[Tensor, "text token"]) -> None:
    """Raise an InputError that names two texts to which a tokenizer gives the same tokens."""
    first: dict[bytes, str] = {}
    for text, row in zip(texts, tokens.cpu().numpy(), strict=True):
        other = first.setdefault(row.tobytes(), text)
        if other is not text:
            raise InputError(
                f"Expected texts that the tokenizer tells apart; {other!r} and {text!r} have the same tokens, and so "
                f"the same direction. Leave one out. (CLIP's own tokenizer does not see capitals.)"
            )
