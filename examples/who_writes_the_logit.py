r"""Which heads write the evidence for a class, what happens without the strongest, and from which patches it comes.

Offline, with a small trained model and a drawn scene::

    python examples/who_writes_the_logit.py

With a model of timm and a photograph::

    python examples/who_writes_the_logit.py --model vit_base_patch16_224.augreg2_in21k_ft_in1k --pretrained \
        --photograph photograph.jpg
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose, testbed
from vitdecomp_lens.intervene import ablate_run


def loaded(options: argparse.Namespace) -> tuple[HookedViT, Tensor]:
    """The model and one image."""
    if options.model.startswith("testbed/"):
        scene = testbed.Scenes("test")[0]
        return testbed.load(options.model.removeprefix("testbed/")), testbed.normalised(scene.image[None])
    model = HookedViT.from_timm(options.model, pretrained=options.pretrained)
    return model, model.preprocess([options.photograph])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="testbed/deit", help="a model of timm, or testbed/NAME (testbed/deit)")
parser.add_argument("--pretrained", action="store_true", help="with timm's weights")
parser.add_argument("--photograph", type=Path, help="for a model of timm")
options = parser.parse_args()
if not options.model.startswith("testbed/") and options.photograph is None:
    parser.error("a model of timm needs --photograph FILE")

torch.manual_seed(0)
model, image = loaded(options)

# The logits as a sum over heads, MLPs, the embedding and the constants: exact, and checked.
parts = decompose(model, image, by="head", of="logits")
print(f"{len(parts)} components; they miss the model's logits by at most {float(parts.gap.max()):.0e} of the largest")

# Scores for one class, without the vectors.
predicted = int(parts.total[0].argmax())
one_hot = torch.eye(parts.total.shape[1])[[predicted]]
scores = attribute(model, image, one_hot, by="head", of="logits")
for label, score in scores.top(0, 5):
    print(f"{label:>12} {score:+.3f}")

# Without the strongest head: directly (all else as it was), and in a run in which later layers react.
strongest = scores.select(kind="head").top(0, 1)[0][0]
before = float(parts.total[0, predicted])
directly = float(parts.ablate(strongest, how="zero").sum()[0, predicted])
in_a_run = float(ablate_run(model, image, components=[strongest], how="zero", of="logits")[0, predicted])
print(f"without {strongest}: logit {before:.3f} → {directly:.3f} directly, {in_a_run:.3f} in a run")

# Where in the image it comes from.
tokens = attribute_tokens(model, image, one_hot, of="logits").select(labels=[strongest])
heatmap = tokens.to_pixels(*image.shape[2:])[0, 0, 0]
row, column = divmod(int(heatmap.argmax()), heatmap.shape[1])
print(f"{strongest} reads most of it at row {row}, column {column} of {heatmap.shape[0]} × {heatmap.shape[1]} pixels")
