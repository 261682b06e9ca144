"""The patches that carry an image's phrases: in words, and laid over the image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.commands.writing import PictureNames, unwritable
from vitdecomp_lens.decompose import attribute_tokens
from vitdecomp_lens.explanation import Heatmap
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.preprocess import open_upright
from vitdecomp_lens.interpret.describing import Description, Patch
from vitdecomp_lens.patch_maps import PatchMaps
from vitdecomp_lens.pictures import save_maps
from vitdecomp_lens.tokens import TokenAttribution


class Seen:
    """What a model is shown, and which of its patches carry a description's phrases.

    Args:
        model: The model.
        aligner: That takes its contributions into the space of the phrases; None for the CLIP's own.
        names: Files of images.
        images: The same as the model takes them.
    """

    def __init__(
        self,
        model: HookedViT,
        aligner: Aligner | None,
        names: Sequence[str],
        images: Float[Tensor, "batch channel height width"],
    ) -> None:
        self._model, self._aligner, self._names, self._images = model, aligner, names, images

    def by_token(self, description: Description) -> TokenAttribution:
        """Scores of an image's tokens along the directions of its phrases."""
        image = self._images[description.image][None]
        return attribute_tokens(self._model, image, description.directions, by="head", through=self._aligner).cpu()

    def draw(self, description: Description, tokens: TokenAttribution, pictures: PictureNames) -> str:
        """Lay the scores for each phrase over the image.

        Returns:
            The name of the file.

        Raises:
            InputError: If it cannot be written.
        """
        file = self._names[description.image]
        photograph = open_upright(file)
        maps = [PatchMaps(tokens, row) for row in range(len(description))]
        name = pictures.next(file)
        try:
            pictures.folder.mkdir(parents=True, exist_ok=True)
            save_maps(
                [Heatmap(text, one.of_all()) for text, one in zip(description.phrases, maps, strict=True)],
                photograph,
                pictures.folder / name,
                seen=maps[0].covered(self._model.preprocess_geometry(photograph), *self._images.shape[2:]),
                title=Path(file).name,
                notes=[_note(description, row, one) for row, one in enumerate(maps)],
                unit="amount a patch",
            )
        except OSError as error:
            raise unwritable(pictures.folder / name, error) from error
        return name


def told(patches: Sequence[Mapping[str, Any]]) -> str:
    """Patches, as `packed` has them, and what they carry, in words; without spaces where a line should not break.

    Example:
        >>> told([packed(Patch("r2c3", (16.0, 24.0, 24.0, 32.0), 0.25))])
        'r2c3:+0.25'
    """
    return ", ".join(f"{patch['patch']}:{patch['amount']:+.2f}" for patch in patches)


def packed(patch: Patch) -> dict[str, Any]:
    """A patch as JSON has it; its rectangle is in pixels of the model's image: top, left, bottom, right."""
    return {"patch": patch.name, "rectangle": list(patch.rectangle), "amount": patch.amount}


def _note(description: Description, row: int, maps: PatchMaps) -> str:
    """What is said below a map: what the phrase accounts for, and what of it came from where."""
    prefix = sum(maps.by_prefix().values())
    places = {"patches": float(maps.of_all().sum()), **({"prefix tokens": prefix} if prefix else {})}
    told = [f"{place} {amount:+.2f}" for place, amount in places.items()]
    return "\n".join([f"share {100 * float(description.shares[row]):.1f} %", *told]).replace("-", "−")
