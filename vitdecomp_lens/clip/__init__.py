"""The space in which images and texts meet: texts as directions, and maps of components into it."""

from vitdecomp_lens.clip.alignment import Aligner, AlignmentReport, AlignmentSource
from vitdecomp_lens.clip.text_bank import TextBank
from vitdecomp_lens.clip.text_embedding import space_of

__all__ = ["Aligner", "AlignmentReport", "AlignmentSource", "TextBank", "space_of"]
