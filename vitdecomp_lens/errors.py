"""What can go wrong, by name. Every message says what was expected, what came, and what to do next."""

import difflib
from collections.abc import Iterable


class VitDecompError(Exception):
    """The parent of every error that this package raises on purpose."""


class InputError(VitDecompError, ValueError):
    """Images, directions or options that cannot be used as they are."""


class UnknownNameError(VitDecompError, KeyError):
    """A hook, component or model name that nothing carries."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class UnsupportedModelError(VitDecompError, TypeError):
    """A model that cannot be hooked or traced as it is."""


class IncompleteCutError(VitDecompError):
    """A cut behind which the representation still depends on the input."""


class GapError(VitDecompError):
    """Contributions that do not sum to what the model itself computed."""


class CapacityError(VitDecompError):
    """A request that would need more memory, or more pairs, than allowed."""


class StoreError(VitDecompError):
    """A file that is damaged, half-written, or of another kind."""


class VitDecompWarning(UserWarning):
    """Something that works, but not as it might be expected to."""


def near_matches(name: str, known: Iterable[str], *, most: int = 5) -> str:
    """Return a phrase with the known names nearest to ``name``.

    >>> near_matches("blocks.0.attn.hook_zz", ["blocks.0.attn.hook_z", "hook_embed"])
    "did you mean 'blocks.0.attn.hook_z'?"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=most, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    shown = ", ".join(map(repr, known[:most]))
    return f"there are {len(known)}, such as {shown}" if known else "there are none"
