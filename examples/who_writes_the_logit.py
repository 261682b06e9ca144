"""Which heads write the evidence for a class, what happens without the strongest, and from which patches it comes.

Runs offline on a small model with random weights. For a trained one, use its name and ``pretrained=True``::

    model = HookedViT.from_timm("vit_base_patch16_224.augreg2_in21k_ft_in1k", pretrained=True)
    images = model.preprocess(["photograph.jpg"])
"""

import torch

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose

torch.manual_seed(0)
model = HookedViT.from_timm("test_vit", num_classes=10)
images = torch.randn(2, 3, 160, 160)

# The logits as a sum over heads, MLPs, the embedding and the constants: exact, and checked.
parts = decompose(model, images, by="head", of="logits")
print(f"{len(parts)} components; they miss the model's logits by at most {parts.gap.max():.0e}")

# Scores for one class, without the vectors.
predicted = int(parts.total[0].argmax())
one_hot = torch.nn.functional.one_hot(torch.tensor([predicted]), 10).float()
scores = attribute(model, images, one_hot, by="head", of="logits")
for label, score in scores.top(0, 5):
    print(f"{label:>12} {score:+.3f}")

# Without the strongest head: directly (all else as it was), and in a run in which later layers react.
strongest = scores.select(kind="head").top(0, 1)[0][0]
directly = parts.ablate(strongest, how="zero").sum()[:, predicted]
head = int(strongest.split("H")[1])


def without_it(z: torch.Tensor, hook: object) -> torch.Tensor:
    """Set the head's output to zero."""
    z[:, :, head] = 0
    return z


with model.hooks([(f"blocks.{strongest[1]}.attn.hook_z", without_it)]):
    in_a_run = model(images)[:, predicted]
before, after = parts.total[0, predicted], directly[0]
print(f"without {strongest}: logit {before:.3f} → {after:.3f} directly, {in_a_run[0]:.3f} in a run")

# Where in the image it comes from.
tokens = attribute_tokens(model, images, one_hot, of="logits")
heatmap = tokens.select(labels=[strongest]).to_pixels(160, 160)
print(f"heatmap of {strongest}: {tuple(heatmap.shape)}; from the class token: {tokens[strongest][0, 0, 0]:+.3f}")
