"""What heads say, in words, and whether they say it again: TextSpan, its labels, and how stable these are.

Offline, with the testbed's CLIP and drawn scenes::

    python examples/read_real_heads.py

With a ViT-Tiny of ImageNet and photographs. The classifier's directions are the bank; FOLDER holds
``vit_tiny_patch16_224.safetensors`` and ``imagenet/*.jpg``::

    python examples/read_real_heads.py --real FOLDER

With a pretrained CLIP of open_clip and any folder of photographs, in the short descriptions of this package::

    python examples/read_real_heads.py --clip ViT-B-16 --pretrained laion2b_s34b_b88k --photographs FOLDER
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from vitdecomp_lens import HookedViT, decompose, testbed
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.interpret import text_span
from vitdecomp_lens.interpret.stability import bank_stability, label_stability
from vitdecomp_lens.testbed.banks import text_bank

VARIANTS = ("corrected", "published")
AT_ONCE = 50  # photographs


def of_scenes(images: int) -> tuple[Decomposition, TextBank, int]:
    """Heads of the testbed's CLIP on drawn scenes, and all texts of the testbed."""
    model, scenes = testbed.load("clip"), testbed.Scenes("test", seed=1, size=images)
    parts = decompose(model, testbed.normalised(scenes.images(range(images))), by="head")
    return parts.select(kind="head"), text_bank(testbed.load_original("clip")).centred(), 16


def of_photographs(folder: Path) -> tuple[Decomposition, TextBank, int]:
    """Heads of a ViT-Tiny on photographs, and the directions of its classifier."""
    import timm
    from safetensors.torch import load_file
    from timm.data import ImageNetInfo

    original = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False).eval()
    original.load_state_dict(load_file(folder / "vit_tiny_patch16_224.safetensors"))
    model, info = HookedViT(original), ImageNetInfo()
    short = [info.index_to_description(number).split(",")[0] for number in range(1000)]
    names = [
        name if short.count(name) == 1 else f"{name} ({info.index_to_label_name(number)})"
        for number, name in enumerate(short)
    ]
    # A vector that is added to all classes changes no probability: their mean says nothing.
    bank = TextBank(names, original.head.weight.detach(), space="ViT-Tiny's classifier").centred()
    photographs = sorted((folder / "imagenet").glob("*.jpg"))
    pieces = [
        decompose(model, model.preprocess(photographs[first : first + AT_ONCE]), by="head").select(kind="head")
        for first in range(0, len(photographs), AT_ONCE)
    ]
    return Decomposition.cat(pieces), bank, 64


def of_a_clip(name: str, pretrained: str | None, folder: Path) -> tuple[Decomposition, TextBank, int]:
    """Heads of a CLIP's image tower on photographs, and short descriptions."""
    import open_clip

    from vitdecomp_lens.clip.banks import general

    clip = open_clip.create_model(name, pretrained=pretrained).eval()
    model, bank = HookedViT(clip), TextBank.from_open_clip(clip, general()).centred()
    photographs = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pieces = [
        decompose(model, model.preprocess(photographs[first : first + AT_ONCE]), by="head").select(kind="head")
        for first in range(0, len(photographs), AT_ONCE)
    ]
    return Decomposition.cat(pieces), bank, 64


def read(options: argparse.Namespace) -> tuple[Decomposition, TextBank, int]:
    """What is asked for: contributions, texts, and the rank to read at."""
    if options.real is not None:
        return of_photographs(options.real)
    if options.clip is not None:
        return of_a_clip(options.clip, options.pretrained, options.photographs)
    return of_scenes(options.images)


def table(parts: Decomposition, bank: TextBank, rank: int, options: argparse.Namespace, variant: str) -> str:
    """A row for each head: its texts, what they explain, how often they are chosen again, and a second bank.

    The second bank is the half of the texts that the first one does not have: the overlap of what two such banks'
    texts span, and in brackets that of as many directions drawn at random within the head's own.
    """
    reading = partial(text_span, steps=options.steps, rank=rank, variant=variant)
    again = label_stability(parts, bank, reading, resamples=options.resamples)
    one, other = bank.select(bank.texts[::2]), bank.select(bank.texts[1::2])
    banks = bank_stability(parts, one, other, reading)
    low, high = again.jaccard_interval()
    lines = [
        f"| head | first {options.show} of {options.steps} texts, and how often each is chosen again | explained |"
        " Jaccard, 95 % | other bank (chance) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row, label in enumerate(again.labels):
        texts = ", ".join(f"{text} {share:.2f}" for text, share in again[label][: options.show])
        explained = float(again.reading.share_explained[row, -1])
        lines.append(
            f"| {label} | {texts} | {explained:.2f} | {float(low[row]):.2f} to {float(high[row]):.2f} |"
            f" {float(banks.overlap[row]):.2f} ({float(banks.chance[row]):.2f}) |"
        )
    first = sum(again[label][0][1] for label in again.labels) / len(again)
    return (
        f"**{variant}**, rank {rank}, {len(bank)} texts, {parts.values.shape[1]} images, {options.resamples} resamples:"
        f" a text is chosen again in {again.mean:.2f} of them (by chance {float(again.chance.mean()):.3f}), a head's"
        f" first in {first:.2f}; spans overlap by {float(again.overlap.mean()):.2f}.\n\n" + "\n".join(lines)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, metavar="FOLDER")
    parser.add_argument("--images", type=int, default=500, help="drawn scenes (500)")
    parser.add_argument("--steps", type=int, default=10, help="texts a head (10)")
    parser.add_argument("--show", type=int, default=3, help="of which so many are shown (3)")
    parser.add_argument("--resamples", type=int, default=20)
    parser.add_argument("--clip", help="a CLIP of open_clip, such as ViT-B-16")
    parser.add_argument("--pretrained", metavar="TAG", help="its weights")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="for --clip")
    options = parser.parse_args()
    if (options.clip is None) != (options.photographs is None):
        parser.error("--clip and --photographs go together")
    with torch.no_grad():
        parts, bank, rank = read(options)
        print("\n\n".join(table(parts, bank, rank, options, variant) for variant in VARIANTS))
