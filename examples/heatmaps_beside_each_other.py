"""Where is the object that is asked for? Contributions beside what else is shown, on scenes with two objects.

Offline, with the testbed's CLIP; with ``--out`` as a picture too::

    python examples/heatmaps_beside_each_other.py --out maps.jpg
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from vitdecomp_lens import testbed
from vitdecomp_lens.applications import heatmap
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank

CROWDED = 60  # pixels of the second object at least

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--scenes", type=int, default=3, help="how many (3)")
parser.add_argument("--out", type=Path, help="a picture to write, such as maps.jpg")
options = parser.parse_args()

model = testbed.load("clip")
bank = text_bank(testbed.load_original("clip"), features()["colour"], templates=TEMPLATES)
several = testbed.Scenes("pairs", seed=20, size=40).scenes(range(40))
several = [scene for scene in several if int(scene.masks["second"].sum()) > CROWDED][: options.scenes]

# Every scene is asked for both of its objects, by colour.
asked = [(scene, *names) for scene in several for names in (("object", "colour"), ("second", "second colour"))]
own = [testbed.ATTRIBUTES["colour"].index(scene.attributes[colour]) for scene, _, colour in asked]
images = testbed.normalised(torch.stack([scene.image for scene, _, _ in asked]))
directions = bank.directions - bank.directions.mean(0)  # what all colours share says nothing

maps = {
    "contributions": heatmap.of_texts(model, images, bank, against=bank).picked([bank.texts[row] for row in own]),
    "Chefer": heatmap.chefer(model, images, directions, of="representation", own=own),
    "GradCAM": heatmap.attention_cam(model, images, directions, of="representation", own=own),
    "raw attention": heatmap.raw_attention(model, images),
    "rollout": heatmap.rollout(model, images),
}

masks = torch.stack([scene.masks[name] for scene, name, _ in asked])
others = torch.stack([scene.masks["second" if name == "object" else "object"] for scene, name, _ in asked])
for name, found in maps.items():
    right = int(heatmap.prefers(found, masks, others).sum())
    print(f"{name}: {right} of {len(asked)} point at the object that is asked for")


def draw() -> Figure:
    """Scenes with the outline of what is asked for, and each map over them."""
    figure = Figure(figsize=(7.5, 1.36 * len(asked)), layout="constrained")
    axes = figure.subplots(len(asked), len(maps) + 1)
    for row, (scene, name, _) in enumerate(asked):
        axes[row, 0].imshow(scene.picture)
        axes[row, 0].set_ylabel(bank.texts[own[row]].replace(" object", "\nobject"), fontsize=8)
        for column, found in enumerate(maps.values(), start=1):
            axes[row, column].imshow(scene.picture.convert("L"), cmap="gray", vmin=-120, vmax=400)
            axes[row, column].imshow(found.to_pixels()[row, 0].clamp(min=0), cmap="inferno", alpha=0.72)
        for axis in axes[row]:
            axis.contour(scene.masks[name], [0.5], colors="white", linewidths=1)
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ["scene", *maps], strict=True):
        axis.set_title(title, fontsize=9)
    return figure


if options.out is not None:
    draw().savefig(options.out, dpi=90)
