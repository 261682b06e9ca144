"""The page itself: three files of this folder, filled with what is to be shown.

Nothing that comes from outside is ever HTML: it is JSON, in which ``<`` is escaped, and the script writes it as text.
The page's own policy lets it run the one script and the one style that it brings, by their hashes, and ask nothing of
any network.
"""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from vitdecomp_lens.errors import InputError

FORMAT, VERSION = "vitdecomp_lens.report", 1
HEIGHT = 900  # pixels of the frame in a notebook


@dataclass(frozen=True, repr=False)
class Report:
    """A page that stands for itself. A notebook shows it inline, in a frame of its own.

    Attributes:
        html: The page.
        images: How many images it shows.
        components: How many components.
        answers: How many classes or texts.
    """

    html: str
    images: int
    components: int
    answers: int

    @property
    def size(self) -> int:
        """How many bytes the page has."""
        return len(self.html.encode())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, and the folders that it needs.

        Raises:
            InputError: If it cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.html, encoding="utf-8", newline="\n")
        except OSError as error:
            raise InputError(f"{str(path)!r} cannot be written: {error}. Choose another place.") from error
        return path

    def __repr__(self) -> str:
        return (
            f"Report({self.images} images, {self.components} components, {self.answers} answers; "
            f"{self.size / 1e6:.1f} MB)"
        )

    def _repr_html_(self) -> str:
        # A frame keeps styles and names of page and notebook apart; scripts run in it without the notebook's rights.
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" title="vitdecomp_lens report" sandbox="allow-scripts" '
            f'style="width:100%;height:{HEIGHT}px;border:0"></iframe>'
        )


def filled(content: Mapping[str, Any]) -> str:
    """The page that shows some content, as `vitdecomp_lens.report.making` makes it."""
    template, style, script = (_read(f"page.{kind}") for kind in ("html", "css", "js"))
    whole = {"format": FORMAT, "version": VERSION, **content}
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "content": json.dumps(whole, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # In one go, so that what is put in is not looked through for more places.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _read(name: str) -> str:
    return files("vitdecomp_lens.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What the policy knows a script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
