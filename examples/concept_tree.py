"""One picture as a tree of concepts: which share of its representation is what, ever finer, and which head writes it.

Offline, with the testbed's CLIP and a drawn scene::

    python examples/concept_tree.py

With a classifier of ImageNet, a photograph, and the hierarchy of WordNet (on Debian: ``apt install wordnet-base``). The
classifier's directions are the bank; FOLDER holds ``imagenet/*.jpg``, and, without ``--pretrained``, the weights::

    python examples/concept_tree.py --imagenet FOLDER --model deit_base_patch16_224 --pretrained
    python examples/concept_tree.py --imagenet FOLDER [--photograph FILE] [--wordnet /usr/share/wordnet]

With ``--table``, in place of one photograph all of them: how often the largest concept of a level is the right one::

    python examples/concept_tree.py --imagenet FOLDER --table
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitdecomp_lens import HookedViT, decompose, testbed
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.interpret.describing import describe
from vitdecomp_lens.interpret.hierarchy import SIGNS, ConceptTree, decompose_by_concepts
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank

MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
KINDS = {
    "shape": {"round": ("circle", "heart", "ring", "moon"), "angular": ("square", "triangle", "star", "cross")},
    "colour": {"warm": ("red", "orange", "yellow"), "cold": ("green", "blue", "purple"), "grey": ("white", "black")},
    "pattern": {},
    "background": {"natural": ("water", "grass", "sand"), "made": ("bricks", "plain")},
    "position": {"beside": ("left", "right"), "above or below": ("top", "bottom"), "middle": ("centre",)},
    "size": {},
}
NARROWER = 0.6  # a kind that holds more than this of the classes of what it is a kind of says little new
FEWEST = 3  # classes that make a kind
BATCH = 50  # photographs at a time


def scene_tree() -> ConceptTree:
    """The testbed's vocabulary: attributes, kinds of values, values; each value known by its text."""
    tree: dict[str, dict] = {}
    for attribute, values in testbed.ATTRIBUTES.items():
        texts = dict(zip(values, features()[attribute], strict=True))
        kinds = {kind: {value: texts[value] for value in of} for kind, of in KINDS[attribute].items()}
        tree[attribute] = kinds or texts
    return ConceptTree.of(tree)


def of_a_scene() -> None:
    """Decompose a drawn scene in the space of the testbed's CLIP."""
    bank = text_bank(testbed.load_original("clip"), sum(features().values(), ()), templates=TEMPLATES).centred()
    model = testbed.load("clip")
    scene = testbed.Scenes("test", seed=1, size=1)[0]
    others = testbed.Scenes("validation", size=200)
    parts = decompose(model, testbed.normalised(scene.image[None]), by="head")
    reference = decompose(model, testbed.normalised(others.images(range(len(others)))), by="head")
    print("A scene:", ", ".join(f"{name} {value}" for name, value in scene.attributes.items()))
    show(parts, reference, scene_tree(), bank)
    (description,) = describe(parts, bank, reference=reference)
    print(f"\nIn phrases:\n{description}")


def show(parts: Decomposition, reference: Decomposition, tree: ConceptTree, bank: TextBank) -> None:
    """Print a tree, how exact it is, and which components write the largest of its leaves."""
    found = decompose_by_concepts(parts, tree, bank, reference=reference, signs="positive")
    print(found.show(threshold=0.02))
    for level in range(1, tree.depth + 1):
        off = found.level(level).sum(0) + found.remainder(level) - found.vectors
        print(
            f"level {level}: {len(tree.level(level))} concepts and the remainder sum to it within {off.abs().max():.0e}"
        )
    leaves = [name for name in tree.names if not tree.children(name)]
    largest = max(leaves, key=lambda name: float(found.share(name).sum()))
    shares = found.share(largest)[:, 0]
    best = ", ".join(f"{found.labels[row]} {100 * shares[row]:+.1f} %" for row in shares.abs().topk(4).indices.tolist())
    print(f"{largest!r} is written by {best}")


def wordnet_tree(folder: Path, names: list[str], synsets: list[str]) -> ConceptTree:
    """ImageNet's classes under the nouns of WordNet 3.0.

    Above a class, the nouns that it is a kind of; of these are kept, from the most general down, those that hold at
    most `NARROWER` of the classes of the last one kept, and `FEWEST` at least.
    """
    above, called = {}, {}
    for line in (folder / "data.noun").read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):
            continue  # the licence
        fields = line.split(" | ")[0].split()
        after = 4 + 2 * int(fields[3], 16)  # the words, each with a number
        pointers = zip(fields[after + 1 :: 4], fields[after + 2 :: 4], strict=True)
        above[fields[0]] = next((number for symbol, number in pointers if symbol in ("@", "@i")), None)
        called[fields[0]] = fields[4].replace("_", " ")
    paths = {}
    for name, synset in zip(names, synsets, strict=True):
        here, path = above[synset[1:]], []
        while here is not None:
            path.append(here)
            here = above[here]
        paths[name] = path[::-1]
    classes = Counter(number for path in paths.values() for number in path)
    parents: dict[str, str | None] = {}
    taken = Counter(called[number] for number in classes) + Counter(names)
    for name, path in paths.items():
        last, count = None, len(names)
        for number in path:
            if FEWEST <= classes[number] <= NARROWER * count:
                kind = called[number] if taken[called[number]] == 1 else f"{called[number]} (n{number})"
                parents.setdefault(kind, last)
                last, count = kind, classes[number]
        parents[name] = last
    return ConceptTree.of_parents(parents)


@dataclass(frozen=True)
class ImageNet:
    """A model, its classifier's directions as a bank, the classes as a tree, and photographs."""

    original: Any
    bank: TextBank
    tree: ConceptTree
    photographs: Sequence[Path]

    @classmethod
    def of(cls, folder: Path, wordnet: Path, model: str, pretrained: bool) -> "ImageNet":
        """Read all of it; without timm's own weights, those in the folder."""
        import timm
        from safetensors.torch import load_file
        from timm.data import ImageNetInfo

        original = timm.create_model(model, pretrained=pretrained).eval()
        if not pretrained:
            original.load_state_dict(load_file(folder / f"{model.partition('.')[0]}.safetensors"))
        info = ImageNetInfo()
        synsets = [info.index_to_label_name(number) for number in range(1000)]
        short = [info.index_to_description(number).split(",")[0] for number in range(1000)]
        names = [
            f"{name} ({synset})" if short.count(name) > 1 else name for name, synset in zip(short, synsets, strict=True)
        ]
        bank = TextBank(names, original.get_classifier().weight.detach(), space=f"the classifier of {model}")
        photographs = sorted((folder / "imagenet").glob("*.jpg"))
        return cls(original, bank, wordnet_tree(wordnet, names, synsets), photographs)


def of_a_photograph(imagenet: ImageNet, photograph: Path | None) -> None:
    """Decompose a photograph along the directions of a classifier."""
    model, photographs = HookedViT(imagenet.original), imagenet.photographs
    photograph = photograph or photographs[len(photographs) // 10]
    with torch.no_grad():
        parts = decompose(model, model.preprocess([photograph]), by="head")
        reference = decompose(model, model.preprocess(photographs[::10]), by="head")
    print(f"{photograph.name}; {imagenet.tree}")
    show(parts, reference, imagenet.tree, imagenet.bank)


def of_all_photographs(imagenet: ImageNet) -> None:
    """How often the largest concept of each level is the photograph's own; its class is in its file's name."""
    model, photographs = HookedViT(imagenet.original), imagenet.photographs
    classes = torch.tensor([int(photograph.name.split("_")[0]) for photograph in photographs])
    found = []
    with torch.no_grad():
        for first in range(0, len(photographs), BATCH):
            found.append(decompose(model, model.preprocess(photographs[first : first + BATCH]), by="layer").total)
        vectors = torch.cat(found)
        right = (imagenet.original.get_classifier()(vectors).argmax(1) == classes).double().mean()
    print(f"{len(vectors)} photographs; the classifier is right on {told(float(right))} of them.\n")
    print(table(vectors, classes, imagenet.tree, imagenet.bank))


def table(
    vectors: Float[Tensor, "batch d_rep"], classes: Int[Tensor, "batch"], tree: ConceptTree, bank: TextBank
) -> str:
    """Markdown: for each level, what the concepts that the images' classes belong to account for, with either signs."""
    columns = ("right, {} signs", "share", "in all", "remainder")
    heads = ["level", "concepts", *(column.format(signs) for signs in SIGNS for column in columns)]
    lines = [heads, ["---"] * len(heads)]
    both = [list(by_level(vectors, classes, tree, bank, signs)) for signs in SIGNS]
    for level, measured in enumerate(zip(*both, strict=True), start=1):
        lines.append([f"{level}", f"{len(tree.level(level)):,}", *(told(number) for row in measured for number in row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_level(
    vectors: Float[Tensor, "batch d_rep"],
    classes: Int[Tensor, "batch"],
    tree: ConceptTree,
    bank: TextBank,
    signs: str,
) -> Iterator[tuple[float, float, float, float]]:
    """For each level four means over images.

    How often the concept of the largest share is the one that the image's class belongs to; the share of that concept;
    its share in all images; what the remainder accounts for.
    """
    found = decompose_by_concepts(vectors, tree, bank, reference=vectors, signs=signs)
    paths = [tree.path(bank.texts[number]) for number in classes.tolist()]
    for level in range(1, tree.depth + 1):
        place = {name: column for column, name in enumerate(tree.level(level))}
        own = torch.tensor([next(place[name] for name in path if name in place) for path in paths])
        shares = found.shares[0][:, [tree.number(name) for name in place]]
        right = (shares.argmax(1) == own).double().mean()
        means = (
            right,
            shares.gather(1, own[:, None]).mean(),
            shares[:, own].mean(),
            found.remainder_share(level).mean(),
        )
        yield tuple(float(mean) for mean in means)


def told(share: float) -> str:
    """A share with three decimals, without the zero before them."""
    return f"{share:.3f}".replace("0.", ".", 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", type=Path, metavar="FOLDER")
    parser.add_argument("--model", default=MODEL, help=f"a classifier of timm's, of ImageNet's classes ({MODEL})")
    parser.add_argument("--pretrained", action="store_true", help="with timm's weights")
    parser.add_argument("--photograph", type=Path, metavar="FILE")
    parser.add_argument("--wordnet", type=Path, metavar="FOLDER", default=Path("/usr/share/wordnet"))
    parser.add_argument("--table", action="store_true", help="of all photographs of FOLDER")
    options = parser.parse_args()
    if options.table and options.imagenet is None:
        parser.error("--table is of photographs: give --imagenet FOLDER")
    if options.imagenet is None:
        of_a_scene()
    else:
        imagenet = ImageNet.of(options.imagenet, options.wordnet, options.model, options.pretrained)
        if options.table:
            of_all_photographs(imagenet)
        else:
            of_a_photograph(imagenet, options.photograph)
