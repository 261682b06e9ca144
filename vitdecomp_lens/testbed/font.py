"""Capital letters five pixels high, as many as the names of shapes need."""

from functools import cache

import torch
from jaxtyping import Bool
from torch import Tensor

HEIGHT = 5
GLYPHS = {
    "A": (" ## ", "#  #", "####", "#  #", "#  #"),
    "C": (" ###", "#   ", "#   ", "#   ", " ###"),
    "E": ("####", "#   ", "### ", "#   ", "####"),
    "G": (" ###", "#   ", "# ##", "#  #", " ###"),
    "H": ("#  #", "#  #", "####", "#  #", "#  #"),
    "I": ("###", " # ", " # ", " # ", "###"),
    "L": ("#   ", "#   ", "#   ", "#   ", "####"),
    "M": ("#   #", "## ##", "# # #", "#   #", "#   #"),
    "N": ("#  #", "## #", "# ##", "#  #", "#  #"),
    "O": (" ## ", "#  #", "#  #", "#  #", " ## "),
    "Q": (" ## ", "#  #", "#  #", "# ##", " ###"),
    "R": ("### ", "#  #", "### ", "# # ", "#  #"),
    "S": (" ###", "#   ", " ## ", "   #", "### "),
    "T": ("###", " # ", " # ", " # ", " # "),
    "U": ("#  #", "#  #", "#  #", "#  #", " ## "),
}


@cache
def written(word: str) -> Bool[Tensor, "5 width"]:
    """Which pixels a word inks, a column apart between letters.

    >>> written("it").shape
    torch.Size([5, 7])
    """
    rows = [" ".join(GLYPHS[letter][row] for letter in word.upper()) for row in range(HEIGHT)]
    return torch.tensor([[pixel == "#" for pixel in row] for row in rows])
