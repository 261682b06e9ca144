"""The words that the testbed's CLIP knows, and its tokens."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from vitdecomp_lens.errors import InputError, UnknownNameError, near_matches
from vitdecomp_lens.testbed.captions import GROUNDS, NAMES, OPENINGS, PLACES
from vitdecomp_lens.testbed.scenes import ATTRIBUTES

CONTEXT = 24  # tokens of a text, the first and the last included
_FIXED = "a an and with the word"
WORDS = tuple(
    sorted(
        {
            word
            for phrase in (
                _FIXED,
                *OPENINGS,
                *NAMES,
                *GROUNDS.values(),
                *PLACES.values(),
                *sum(ATTRIBUTES.values(), ()),
            )
            for word in phrase.split()
        }
    )
)
START = 1  # zero pads
# open_clip's text tower reads at the highest number, so the end must have it.
END = START + len(WORDS) + 1
_NUMBERS = {word: START + 1 + number for number, word in enumerate(WORDS)}


def tokenize(texts: str | Iterable[str]) -> Int[Tensor, "text token"]:
    """The tokens of texts, as the testbed's CLIP takes them.

    Raises:
        UnknownNameError: If a word is none of `WORDS`; it names them.
        InputError: If a text has no words, or too many.

    Example:
        >>> tokenize("a red star").shape
        torch.Size([1, 24])
    """
    rows = [_row(text) for text in ([texts] if isinstance(texts, str) else texts)]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, CONTEXT)


def _row(text: str) -> list[int]:
    words = text.lower().replace(",", " ").replace(".", " ").split()
    if not words or len(words) > CONTEXT - 2:
        raise InputError(f"A text must have between 1 and {CONTEXT - 2} words; {text!r} has {len(words)}.")
    for word in words:
        if word not in _NUMBERS:
            near = near_matches(word, WORDS)
            raise UnknownNameError(
                f"The testbed's CLIP does not know the word {word!r}; {near}{'' if near.endswith('?') else '.'} It"
                f" knows: {', '.join(WORDS)}."
            )
    numbers = [START, *(_NUMBERS[word] for word in words), END]
    return numbers + [0] * (CONTEXT - len(numbers))
