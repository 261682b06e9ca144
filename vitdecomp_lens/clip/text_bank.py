"""Texts as unit directions of a CLIP's space: the words in which components are read.

Banks written for this package are in `vitdecomp_lens.clip.banks`, templates in `vitdecomp_lens.clip.templates`; the
banks of the testbed are in `vitdecomp_lens.testbed.banks`.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitdecomp_lens import storage
from vitdecomp_lens.clip.text_embedding import (
    Progress,
    Tokenizer,
    default_tokenizer,
    embedded,
    formatted,
    space_of,
    tokens_of,
    tower_of,
)
from vitdecomp_lens.clip.texts import checked, checked_templates, refuse_same_tokens, unit_rows
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError, VitDecompWarning, near_matches
from vitdecomp_lens.selecting import agreed

LEAST = 1e-6  # what is left of a unit row, where less is rounding
NORMALISATION = "each prompt to length 1, and their mean over templates again"
if TYPE_CHECKING:
    Texts = tuple[str, ...]
else:
    # A field holds a tuple; its constructor reads any sequence, which the checks at run time let through.
    Texts = Sequence[str]


@dataclass(frozen=True, eq=False, repr=False)
class TextBank:
    """Texts, and a unit direction for each in the space of one CLIP.

    Attributes:
        texts: All different.
        directions: A unit row for each text. Rows of other lengths are divided by them.
        space: Which space the directions live in, as `space_of` names it: model and weights. Embeddings count in it by
            their direction only.
        made: How the directions were made, in what JSON holds: ``"model"``, the class of the CLIP; ``"templates"``;
            ``"normalisation"``; ``"image_tower"``, the hash of the weights of the tower whose contributions are in this
            space as they are; and ``"mean"``, the direction that was taken off, if one was.

    Raises:
        InputError: Where there are no texts, texts that are blank or given twice, or rows that do not fit them, are
            zero or not finite.

    Example:
        >>> bank = TextBank(["a cat", "a dog"], torch.tensor([[2.0, 0.0], [3.0, 4.0]]), space="plane")
        >>> len(bank), bank["a dog"]
        (2, tensor([0.6000, 0.8000]))
        >>> bank.select("a dog").texts
        ('a dog',)
    """

    texts: Texts
    directions: Float[Tensor, "text d_clip"]
    _: KW_ONLY
    space: str
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", checked(self.texts))
        object.__setattr__(self, "directions", unit_rows(self.directions, self.texts))
        object.__setattr__(self, "made", storage.as_json("how texts were made", dict(self.made)))
        if not isinstance(self.space, str) or not self.space.strip():
            raise InputError(
                f"Expected space= as the name of the space that the directions live in; got {self.space!r}. For a CLIP "
                f"at hand, space_of(clip)."
            )

    @classmethod
    def from_open_clip(
        cls,
        clip: nn.Module,
        texts: Iterable[str],
        *,
        templates: Sequence[str] | None = None,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 256,
        cache: str | os.PathLike[str] | None = None,
        centre: bool = False,
        progress: Progress | None = None,
        space: str | None = None,
    ) -> "TextBank":
        """Embed texts as CLIP's zero-shot recipe has it.

        Every text is put into every template, embedded, divided by its length, averaged over templates, and divided by
        its length again. (The paper, arXiv 2406.01583, does so with the 80 templates of `templates.imagenet`.) It runs
        on the model's device and in its dtype, without gradients, and leaves the model as it was.

        Args:
            clip: An open_clip model, or any module with ``encode_text``.
            texts: All different, also to the tokenizer.
            templates: Each with ``{}`` where the text goes; None takes the texts as they are.
            tokenizer: The tokens of a list of texts: ``open_clip.get_tokenizer(NAME)``. Not needed for models with
                CLIP's own vocabulary.
            batch_size: How many prompts run at once; there is one for each text and template.
            cache: A folder. What was embedded before with the same weights, tokens, texts and templates is read from
                it, and anything else is written to it. It is made if it is not there.
            centre: Whether to take off the mean direction, as `centred` does.
            progress: Called with the number of prompts done, and of all prompts.
            space: A name for the space; None for `space_of`, which is a hash of the weights.

        Returns:
            On the CPU, in float32.

        Raises:
            InputError: Where texts or templates cannot be used, or the tokenizer does not fit the model.
            UnsupportedModelError: Where the module embeds no texts, or its text tower trains with dropout.
            UnknownNameError: Of the testbed's tokenizer, for words that it does not know.
            StoreError: Where the cache cannot be written.

        Warns:
            VitDecompWarning: Where a file of the cache is damaged. It is made again.

        Example:
            >>> from vitdecomp_lens.testbed.models import build
            >>> from vitdecomp_lens.testbed.vocabulary import tokenize
            >>> bank = TextBank.from_open_clip(build("clip"), ["a red star", "a blue ring"], tokenizer=tokenize)
            >>> bank.directions.shape, bank.made["model"], bank.made["templates"]
            (torch.Size([2, 64]), 'CLIP', ['{}'])
        """
        texts, templates = checked(texts), checked_templates(templates)
        tokenizer = default_tokenizer(clip) if tokenizer is None else tokenizer
        tokens = tokens_of([formatted(text, templates)[0] for text in texts], clip=clip, tokenizer=tokenizer)
        refuse_same_tokens(texts, tokens)
        weights = space_of(clip) if space is None or cache is not None else ""
        space = weights if space is None else space
        made: dict[str, Any] = {"model": type(clip).__name__, "image_tower": tower_of(clip)}
        made |= {"templates": list(templates), "normalisation": NORMALISATION}
        file = None if cache is None else _cache_file(Path(cache), clip, tokens, (weights, space, texts, made))
        bank = None if file is None else cls._cached(file, texts, space, made)
        if bank is None:
            rows = embedded(
                clip, texts, templates=templates, tokenizer=tokenizer, batch_size=batch_size, progress=progress
            )
            bank = cls(texts, rows.float(), space=space, made=made)
            if file is not None:
                bank.save(file)
        return bank.centred() if centre else bank

    @classmethod
    def _cached(cls, file: Path, texts: tuple[str, ...], space: str, made: Mapping[str, Any]) -> "TextBank | None":
        if not file.exists():
            return None
        try:
            bank = cls.load(file)
        except StoreError as error:
            warnings.warn(f"Texts are embedded again: {error}", VitDecompWarning, stacklevel=3)
            return None
        if (bank.texts, bank.space, bank.made) != (texts, space, made):
            warnings.warn(
                f"Texts are embedded again: {file} is named for them and holds others.", VitDecompWarning, stacklevel=3
            )
            return None
        return bank

    # ---- looking

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(self.texts)}

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __contains__(self, text: object) -> bool:
        return text in self._positions

    def __getitem__(self, text: str) -> Float[Tensor, "d_clip"]:
        return self.directions[self._position(text)]

    def __repr__(self) -> str:
        text, d_clip = self.directions.shape
        templates = self.made.get("templates")
        how = ["templates unknown" if templates is None else f"templates={len(templates)}"]
        how += ["centred"] if "mean" in self.made else []
        return (
            f"TextBank({text=}, {d_clip=}, {self.directions.dtype}, {self.directions.device}, space={self.space!r}: "
            f"{', '.join(how)})"
        )

    def _position(self, text: str) -> int:
        if text not in self._positions:
            raise UnknownNameError(f"The bank has no text {text!r}; {near_matches(text, self.texts)}")
        return self._positions[text]

    # ---- other banks from this one

    def select(self, texts: str | Iterable[str]) -> "TextBank":
        """Some of the texts, in the order asked for.

        Raises:
            UnknownNameError: Where a text is not in the bank; the message has near matches.
            InputError: Where none is asked for, or one twice.
        """
        texts = checked([texts] if isinstance(texts, str) else texts)
        rows = [self._position(text) for text in texts]
        return replace(self, texts=texts, directions=self.directions[rows])

    def centred(self, mean: Float[Tensor, "d_clip"] | None = None) -> "TextBank":
        """The directions minus their mean, of unit length again.

        Texts of one CLIP all point into one half of its space; without the mean, only what tells them apart is left.

        Args:
            mean: What to take off, such as another bank's ``directions.mean(0)``; None for this bank's own. It is kept
                in ``made["mean"]``.

        Raises:
            InputError: Where the bank is centred already, the mean does not fit, or nothing is left of a text.

        Example:
            >>> bank = TextBank(["a cat", "a dog"], torch.tensor([[0.6, 0.8], [0.8, 0.6]]), space="plane").centred()
            >>> bank.directions
            tensor([[-0.7071,  0.7071],
                    [ 0.7071, -0.7071]])
        """
        if "mean" in self.made:
            raise InputError("Expected a bank that is not centred; this one is. Centre the bank that it was made from.")
        wide = self.directions.cpu().double()  # not every device has float64
        mean = wide.mean(0) if mean is None else mean.to(wide)
        if mean.shape != wide.shape[1:] or not bool(mean.isfinite().all()):
            raise InputError(
                f'Expected a finite mean as Float[Tensor, "d_clip"] with d_clip={wide.shape[1]}; got shape '
                f"{tuple(mean.shape)}."
            )
        rest = wide - mean
        gone = rest.norm(dim=1) < LEAST
        if bool(gone.any()):
            raise InputError(
                f"Expected texts that differ from the mean; nothing is left of {self.texts[int(gone.nonzero()[0])]!r}. "
                f"Pass the mean of a larger bank: centred(mean=other.directions.mean(0))."
            )
        return replace(self, directions=rest.to(self.directions), made={**self.made, "mean": mean.detach().tolist()})

    def to(self, target: torch.device | torch.dtype | str) -> "TextBank":
        """The same on another device, or in another floating dtype."""
        return replace(self, directions=self.directions.to(target))

    @classmethod
    def cat(cls, several: Sequence["TextBank"]) -> "TextBank":
        """Several banks as one, on the first one's device and in its dtype.

        Of how they were made, it keeps what all agree on.

        Raises:
            InputError: Where there are none, they live in different spaces or have different means taken off, or a
                text is in two of them.
        """
        several = tuple(several)
        if not several:
            raise InputError("Expected at least one TextBank to concatenate; got none.")
        first = several[0]
        for number, other in enumerate(several[1:], start=1):
            first._refuse_other(other, number)
        directions = torch.cat([bank.directions.to(first.directions) for bank in several])
        texts = tuple(text for bank in several for text in bank.texts)
        return cls(texts, directions, space=first.space, made=agreed([bank.made for bank in several]))

    def _refuse_other(self, other: "TextBank", number: int) -> None:
        self.check_space(other.space)
        if other.directions.shape[1] != self.directions.shape[1]:
            raise InputError(
                f"Expected banks of one width; bank 0 has d_clip={self.directions.shape[1]}, bank {number} "
                f"d_clip={other.directions.shape[1]}."
            )
        if other.made.get("mean") != self.made.get("mean"):
            raise InputError(
                f"Expected banks centred alike; bank {number} has another mean taken off than bank 0, or none. "
                f"Concatenate them before centring."
            )

    # ---- the space

    def check_space(self, other: str) -> None:
        """Refuse what lives in another space.

        Args:
            other: The name of its space, as `space_of` gives it.

        Raises:
            InputError: Where it is not this bank's.
        """
        if other != self.space:
            raise InputError(
                f"Expected the space of this bank, {self.space!r}; got {other!r}. Directions of one model mean nothing "
                f"in another's space: embed the texts with the model that the other side was made with."
            )

    def subspace(
        self, texts: str | Iterable[str] | None = None, *, tolerance: float = 1e-5
    ) -> Float[Tensor, "direction d_clip"]:
        """An orthonormal basis of what some texts span, which does not depend on their order.

        With the texts' directions B as rows, it is V = (B Bᵀ)^(-1/2) B (Löwdin's symmetric basis): of all orthonormal
        bases, the one nearest to the texts in the sum of squared distances. Row k belongs to text k, and texts in
        another order have the same rows in that order. (The paper scores features along a QR basis, which depends on
        the order.)

        Texts that span fewer dimensions than they are many have no such basis. Theirs are the principal axes of B,
        strongest first, each with its largest entry positive; the projector VᵀV is always the texts' own.

        Args:
            texts: Some of the bank's texts; None for all.
            tolerance: Singular values below this share of the largest count as zero.

        Returns:
            As many rows as dimensions, on the bank's device and in its dtype; computed in float64 on the CPU.

        Raises:
            UnknownNameError: Where a text is not in the bank.
            InputError: Where the tolerance is not between 0 and 1.

        Warns:
            VitDecompWarning: Where the texts span fewer dimensions than they are many.

        Example:
            >>> bank = TextBank(["a cat", "a dog"], torch.tensor([[0.6, 0.8, 0.0], [0.8, 0.6, 0.0]]), space="example")
            >>> basis = bank.subspace()
            >>> basis.shape, torch.allclose(basis @ basis.T, torch.eye(2), atol=1e-6)
            (torch.Size([2, 3]), True)
        """
        if not 0 <= tolerance < 1:
            raise InputError(f"Expected a tolerance from 0 to below 1; got {tolerance}.")
        rows = self.directions if texts is None else self.select(texts).directions
        left, lengths, axes = torch.linalg.svd(rows.cpu().double(), full_matrices=False)
        rank = int((lengths > tolerance * lengths[0]).sum())
        if rank == len(rows):
            return (left @ axes).to(rows)
        warnings.warn(
            f"{len(rows)} texts span {rank} dimensions: the basis is their principal axes, and not one direction a "
            f"text. Select fewer texts for that.",
            VitDecompWarning,
            stacklevel=2,
        )
        axes = axes[:rank]
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        return (axes * largest.sign()).to(rows)

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all.

        Raises:
            StoreError: Where the file cannot be written.
        """
        header = {"texts": self.texts, "space": self.space, "made": self.made}
        storage.write(path, kind="TextBank", tensors={"directions": self.directions}, header=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TextBank":
        """Read what `save` wrote, onto the CPU. Nothing is unpickled.

        Raises:
            StoreError: Where the file is missing, damaged, half-written, or holds something else.
        """
        tensors, header = storage.read(path, kind="TextBank", needs=("directions",))
        with storage.restoring(path, kind="TextBank"):
            return cls(tuple(header["texts"]), tensors["directions"], space=header["space"], made=header["made"])


def _cache_file(folder: Path, clip: nn.Module, tokens: Int[Tensor, "text token"], content: Sequence[Any]) -> Path:
    """Where the cache keeps what these weights and tokens give; texts alone would not tell tokenizers apart."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"Expected cache= as a folder that can be written; got {folder}: {error}.") from error
    dtype = next(clip.parameters()).dtype
    seen = hashlib.sha256(tokens.long().cpu().contiguous().numpy().data).hexdigest()
    key = json.dumps([*content, seen, str(dtype)])
    return folder / f"text_bank-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
