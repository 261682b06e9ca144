r"""Where is the object that is asked for? Contributions beside what else is shown, on scenes with two objects.

Offline, with the testbed's CLIP; with ``--out`` as a picture too::

    python examples/heatmaps_beside_each_other.py --out maps.jpg

With a pretrained CLIP of open_clip, a photograph and texts, of which every map is held against the others::

    python examples/heatmaps_beside_each_other.py --clip ViT-B-16 --pretrained laion2b_s34b_b88k \
        --photograph photograph.jpg --texts "a photo of a dog" "a photo of a cat" --out maps.jpg
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vitdecomp_lens import HookedViT, testbed
from vitdecomp_lens.applications import heatmap
from vitdecomp_lens.applications.heatmap import Heatmaps
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank

CROWDED = 60  # pixels of the second object at least


@dataclass(frozen=True)
class Asked:
    """What is asked for, once an image.

    Attributes:
        pictures: As the model sees them.
        images: The same as the model takes them.
        own: The number of each image's text.
        masks: Where what is asked for is, and where the other object is; None where nobody knows.
    """

    pictures: Sequence[Image.Image]
    images: Tensor
    own: Sequence[int]
    masks: tuple[Bool[Tensor, "batch height width"], Bool[Tensor, "batch height width"]] | None = None


def of_scenes(count: int) -> tuple[HookedViT, TextBank, Asked]:
    """The testbed's CLIP, and scenes that are asked for both of their objects, by colour."""
    bank = text_bank(testbed.load_original("clip"), features()["colour"], templates=TEMPLATES)
    several = testbed.Scenes("pairs", seed=20, size=40).scenes(range(40))
    several = [scene for scene in several if int(scene.masks["second"].sum()) > CROWDED][:count]
    asked = [(scene, *names) for scene in several for names in (("object", "colour"), ("second", "second colour"))]
    others = {"object": "second", "second": "object"}
    return (
        testbed.load("clip"),
        bank,
        Asked(
            [scene.picture for scene, _, _ in asked],
            testbed.normalised(torch.stack([scene.image for scene, _, _ in asked])),
            [testbed.ATTRIBUTES["colour"].index(scene.attributes[colour]) for scene, _, colour in asked],
            (
                torch.stack([scene.masks[name] for scene, name, _ in asked]),
                torch.stack([scene.masks[others[name]] for scene, name, _ in asked]),
            ),
        ),
    )


def of_photograph(options: argparse.Namespace) -> tuple[HookedViT, TextBank, Asked]:
    """A CLIP of open_clip, and one photograph that is asked for every text."""
    import open_clip

    clip = open_clip.create_model(options.clip, pretrained=options.pretrained).eval()
    bank = TextBank.from_open_clip(clip, options.texts)
    model, photograph = HookedViT(clip), Image.open(options.photograph).convert("RGB")
    images = model.preprocess([photograph])
    seen = photograph.resize(tuple(images.shape[:1:-1]), box=model.preprocess_geometry(photograph))
    return model, bank, Asked([seen] * len(bank), images.expand(len(bank), -1, -1, -1), range(len(bank)))


def maps_of(model: HookedViT, bank: TextBank, asked: Asked) -> dict[str, Heatmaps]:
    """One map an image, that of its own text, by each method."""
    images, own = asked.images, asked.own
    directions = bank.directions - bank.directions.mean(0)  # what all texts share says nothing
    contributions = heatmap.of_texts(model, images, bank, against=bank)
    return {
        "contributions": contributions.picked([bank.texts[row] for row in own]),
        "Chefer": heatmap.chefer(model, images, directions, of="representation", own=own),
        "GradCAM": heatmap.attention_cam(model, images, directions, of="representation", own=own),
        "raw attention": heatmap.raw_attention(model, images),
        "rollout": heatmap.rollout(model, images),
    }


def draw(maps: dict[str, Heatmaps], asked: Asked, texts: Sequence[str]) -> Figure:
    """Images, with the outline of what is asked for where it is known, and each map over them."""
    rows = len(asked.pictures)
    figure = Figure(figsize=(7.5, 1.36 * rows), layout="constrained")
    axes = figure.subplots(rows, len(maps) + 1, squeeze=False)
    for row, picture in enumerate(asked.pictures):
        axes[row, 0].imshow(picture)
        axes[row, 0].set_ylabel(texts[asked.own[row]].replace(" object", "\nobject"), fontsize=8)
        for column, found in enumerate(maps.values(), start=1):
            axes[row, column].imshow(picture.convert("L"), cmap="gray", vmin=-120, vmax=400)
            axes[row, column].imshow(found.to_pixels()[row, 0].clamp(min=0).numpy(), cmap="inferno", alpha=0.72)
        for axis in axes[row]:
            if asked.masks is not None:
                axis.contour(asked.masks[0][row].numpy(), [0.5], colors="white", linewidths=1)
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ["image", *maps], strict=True):
        axis.set_title(title, fontsize=9)
    return figure


def tell(maps: dict[str, Heatmaps], asked: Asked, texts: Sequence[str]) -> None:
    """Print how often each method is right, or where its largest patch is."""
    for name, found in maps.items():
        if asked.masks is not None:
            right = int(heatmap.prefers(found, *asked.masks).sum())
            print(f"{name}: {right} of {len(asked.own)} point at the object that is asked for")
            continue
        for text, one in zip(texts, found.values[:, 0], strict=True):
            row, column = divmod(int(one.argmax()), one.shape[1])
            print(f"{name}: {text} at row {row}, column {column} of {one.shape[0]} × {one.shape[1]} patches")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=3, help="how many (3)")
    parser.add_argument("--out", type=Path, help="a picture to write, such as maps.jpg")
    parser.add_argument("--clip", help="a CLIP of open_clip, such as ViT-B-16")
    parser.add_argument("--pretrained", metavar="TAG", help="its weights")
    parser.add_argument("--photograph", type=Path, help="for --clip")
    parser.add_argument("--texts", nargs="+", default=["a photo of a dog", "a photo of a cat"], help="for --clip")
    options = parser.parse_args()
    if (options.clip is None) != (options.photograph is None):
        parser.error("--clip and --photograph go together")
    if options.scenes < 1:
        parser.error(f"--scenes takes a number of at least 1; got {options.scenes}")
    model, bank, asked = of_scenes(options.scenes) if options.clip is None else of_photograph(options)
    maps = maps_of(model, bank, asked)
    tell(maps, asked, bank.texts)
    if options.out is not None:
        draw(maps, asked, bank.texts).savefig(options.out, dpi=90)
