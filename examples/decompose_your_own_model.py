r"""A model that no library knows, decomposed as it is, and read in words through an aligner that is fitted on the spot.

The model is written below, and trained in a few seconds to tell colours and backgrounds; nothing in it knows of this
package. Its parts are found in its graph, and bear the paths of its modules. Offline, with drawn scenes and the
testbed's CLIP::

    python examples/decompose_your_own_model.py

With any model of timm that has no adapter, a pretrained CLIP and a folder of photographs::

    python examples/decompose_your_own_model.py --model convnext_tiny.fb_in1k --pretrained \
        --clip ViT-B-16 --clip-pretrained openai --photographs FOLDER
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitdecomp_lens import attribute_tokens, decompose, testbed
from vitdecomp_lens.clip import Aligner, TextBank, space_of
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.interpret import score_features, text_span
from vitdecomp_lens.testbed.banks import features, text_bank

AT_ONCE = 50  # images
STEPS = 150


class Block(nn.Module):
    """Patches look at their neighbours, then each thinks by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_look, self.before_think = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look = nn.Sequential(nn.Conv2d(width, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, width, 1))
        self.think = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width))

    def forward(self, x: Tensor) -> Tensor:
        """Add what both write to ``batch row column channel``."""
        x = x + self.look(self.before_look(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.think(self.before_think(x))


class MyModel(nn.Module):
    """From an image of 48 × 48 pixels to a vector."""

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """The mean of the patches."""
        x = self.patches(images).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean((1, 2))


def trained(model: nn.Module, steps: int) -> nn.Module:
    """Teach a model the colours and backgrounds of scenes."""
    scenes = testbed.Scenes("train", seed=3, size=32 * steps)
    asked = {name: len(testbed.ATTRIBUTES[name]) for name in ("colour", "background")}
    heads = nn.ModuleDict({name: nn.Linear(48, count) for name, count in asked.items()})
    adam = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=2e-3)
    for step in range(steps):
        rows = range(32 * step, 32 * (step + 1))
        z = model(testbed.normalised(scenes.images(rows)))
        loss = sum(nn.functional.cross_entropy(heads[name](z), scenes.labels(name, rows)) for name in asked)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval().requires_grad_(False)


def of_scenes(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, dict[str, TextBank], str]:
    """The model, images, their embeddings by the testbed's CLIP, texts, and the space of these."""
    model, clip = trained(MyModel(), options.steps), testbed.load_original("clip")
    images = testbed.normalised(testbed.Scenes("train", seed=4, size=options.images).images(range(options.images)))
    mean = text_bank(clip).directions.mean(0)  # what all texts share is told of none of them
    banks = {name: text_bank(clip, features()[name]).centred(mean) for name in ("colour", "background", "shape")}
    with torch.no_grad():
        return model, images, clip.encode_image(images), banks, space_of(clip)


def of_photographs(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, dict[str, TextBank], str]:
    """The same of photographs, with a model of timm and a CLIP of open_clip."""
    import open_clip
    import timm
    from PIL import Image

    from vitdecomp_lens.clip.banks import paper_features

    model = timm.create_model(options.model, pretrained=options.pretrained, num_classes=0).eval()
    prepare: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    clip, _, clip_prepare = open_clip.create_model_and_transforms(options.clip, pretrained=options.clip_pretrained)
    clip.eval()
    files = sorted(path for path in options.photographs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pictures = [Image.open(path).convert("RGB") for path in files[: options.images]]
    images = torch.stack([prepare(picture) for picture in pictures])
    batches = torch.stack([clip_prepare(picture) for picture in pictures]).split(AT_ONCE)
    banks = {name: TextBank.from_open_clip(clip, texts) for name, texts in paper_features().items()}
    mean = torch.cat([bank.directions for bank in banks.values()]).mean(0)
    with torch.no_grad():
        embeddings = torch.cat([clip.encode_image(batch) for batch in batches])
    return model, images, embeddings, {name: bank.centred(mean) for name, bank in banks.items()}, space_of(clip)


def main(options: argparse.Namespace) -> None:
    """Decompose, align, and read."""
    torch.manual_seed(options.seed)
    model, images, embeddings, banks, space = (of_scenes if options.photographs is None else of_photographs)(options)
    pieces = [decompose(model, batch, by="layer") for batch in images.split(AT_ONCE)]
    parts = Decomposition.cat(pieces)
    print(f"{parts.coverage}; they miss the output by at most {float(parts.gap.max()):.0e}")

    fitted = len(images) * 3 // 4  # words are read in the rest
    aligner = Aligner.fit(parts.images(slice(0, fitted)), embeddings[:fitted], space=space)
    seen = parts.images(slice(fitted, None)).map(aligner)
    apart = aligner.report(parts.images(slice(fitted, None)), embeddings[fitted:])
    print(f"cosine distance to the CLIP {float(apart.cosine_distance):.3f}, on images that had no part in the fit")

    bank = TextBank.cat(list(banks.values()))
    branches = seen.select(labels=[label for label in seen.labels if label.startswith(("blocks", "stages"))])
    spans = text_span(branches, bank, steps=3, variant="corrected")
    scores = score_features(seen, banks, bootstrap=0, permutations=0)
    for row, label in enumerate(branches.labels):
        (feature, much), *_ = scores.top_features(label, 1)
        texts = f"{', '.join(spans.texts[label])} ({float(spans.share_explained[row, -1]):.2f} explained)"
        print(f"{label:>20}: most of {feature} ({much:+.2f}); {texts}")

    strongest = scores.select("colour" if "colour" in banks else next(iter(banks)), k=1)[0]
    if strongest in branches.labels:  # and not the embedding
        tokens = attribute_tokens(model, images[-1:], bank.directions, by="layer", through=aligner, names=bank.texts)
        text = bank.texts[int((seen[strongest][-1] @ bank.directions.T).argmax())]
        heatmap = tokens.select(labels=[strongest]).to_pixels(*images.shape[2:])[0, 0, bank.texts.index(text)]
        row, column = divmod(int(heatmap.argmax()), heatmap.shape[1])
        print(f"in the last image {strongest} writes most for {text!r}, and most of that at row {row}, column {column}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnext_tiny.fb_in1k", help="a model of timm, for --photographs")
    parser.add_argument("--pretrained", action="store_true", help="with timm's weights")
    parser.add_argument("--clip", default="ViT-B-16", help="a CLIP of open_clip, for --photographs (ViT-B-16)")
    parser.add_argument("--clip-pretrained", metavar="TAG", help="its weights, such as openai")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="photographs in place of drawn scenes")
    parser.add_argument("--images", type=int, default=800, help="at most so many (800)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training on drawn scenes ({STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
