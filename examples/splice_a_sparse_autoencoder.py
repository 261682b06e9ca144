r"""A sparse autoencoder, trained in seconds and put in at a hook: its latents are components, and say what they write.

Offline, with the testbed's CLIP and drawn scenes::

    python examples/splice_a_sparse_autoencoder.py

With a model of timm and photographs; the directions of its classifier are then the texts::

    python examples/splice_a_sparse_autoencoder.py --model vit_base_patch16_224.augreg2_in21k_ft_in1k --pretrained \
        --photographs FOLDER --hook blocks.11.hook_mlp_out
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from vitdecomp_lens import Decomposition, HookedViT, decompose, testbed
from vitdecomp_lens.class_names import ClassNames
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.interpret import text_span
from vitdecomp_lens.testbed.banks import features, text_bank

AT_ONCE = 50  # images


class SparseAutoencoder(nn.Module):
    """Few latents at a time, each with a direction of its own: relu(W(x - b) + c), and back by a matrix and b."""

    def __init__(self, d_in: int, latents: int) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(latents, d_in), dim=-1))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(latents)), nn.Parameter(torch.zeros(d_in))

    def encode(self, x: Tensor) -> Tensor:
        """Latents of values."""
        return ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()

    def decode(self, latents: Tensor) -> Tensor:
        """Values of latents."""
        return latents @ self.W_dec + self.b_dec


def trained(values: Tensor, latents: int, *, steps: int = 600, sparsity: float = 0.1) -> SparseAutoencoder:
    """An autoencoder of values ``[value, d_in]``: squared error in units of their variance, and L1 on the latents.

    The rows of the decoder keep unit length, or else the L1 could be made small by small latents.
    """
    module = SparseAutoencoder(values.shape[1], latents)
    scale = values.var(0).sum().sqrt()
    with torch.no_grad():
        module.b_dec.copy_(values.mean(0))
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(steps):
        x = values[torch.randint(len(values), (512,))]
        code = module.encode(x)
        error = (module.decode(code) - x).square().sum(-1).mean() / scale**2
        loss = error + sparsity * code.sum(-1).mean() / scale
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            module.W_dec.copy_(nn.functional.normalize(module.W_dec, dim=-1))
    return module


@torch.no_grad()
def values_at(model: HookedViT, images: Tensor, hook: str) -> Tensor:
    """The values at a hook of all tokens of all images, ``[value, d_in]``."""
    kept = [model.run_with_cache(some, names_filter=hook)[1][hook] for some in images.split(AT_ONCE)]
    return torch.cat([value.flatten(0, 1).flatten(1) for value in kept])


def in_words(parts: Decomposition, bank: TextBank, hook: str, show: int) -> list[str]:
    """The latents that write most, each with its text and how often it is active; the error as a whole.

    A latent writes along one direction. Its text is the nearest to that, by TextSpan's rule; the cosine says how near,
    and below zero that the latent writes against it.
    """
    latents = parts.select(kind="latent", name=hook)
    written = latents.values.norm(dim=-1)
    active = (written > 1e-6 * written.amax()).double().mean(1)
    strength = (latents.values - latents.values.mean(1, keepdim=True)).square().sum(-1).mean(1)
    strongest = latents.select(labels=[latents.labels[row] for row in strength.topk(min(show, len(latents))).indices])
    spans = text_span(strongest, bank, steps=1, rank=1, variant="corrected")
    lines = ["| latent | active in | its text | cosine |", "| --- | --- | --- | --- |"]
    for label in strongest.labels:
        share, text = float(active[latents.labels.index(label)]), spans.texts[label][0]
        direction = nn.functional.normalize(strongest[label].mean(0), dim=0)
        cosine = float(bank.directions[bank.texts.index(text)] @ direction)
        lines.append(f"| {label} | {share:.0%} of images | {text} | {cosine:.2f} |")
    error = float(parts[f"error@{hook}"].norm(dim=-1).mean() / parts.total.norm(dim=-1).mean())
    return [*lines, f"\nthe error writes {error:.2f} of the representation's length; the gap is {parts.gap.max():.0e}"]


def loaded(options: argparse.Namespace) -> tuple[HookedViT, Tensor, TextBank]:
    """A model, images, and texts with directions in its space."""
    if options.model == "testbed/clip":
        scenes = testbed.Scenes("train", seed=1, size=options.images)
        texts = [text for several in features().values() for text in several]
        bank = text_bank(testbed.load_original("clip"), texts).centred()
        return testbed.load("clip"), testbed.normalised(scenes.images(range(options.images))), bank
    model = HookedViT.from_timm(options.model, pretrained=options.pretrained)
    files = sorted(path for path in options.photographs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    names = ClassNames.of(model.W_U.shape[1]).names
    texts = [f"{name} ({number})" for number, name in enumerate(names)]  # two classes may share a name
    bank = TextBank(texts, model.W_U.T.detach(), space="classifier").centred()
    return model, model.preprocess(files[: options.images]), bank


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed/clip", help="testbed/clip, or a model of timm (testbed/clip)")
    parser.add_argument("--pretrained", action="store_true", help="with timm's weights")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="for a model of timm")
    parser.add_argument("--hook", default="blocks.3.hook_mlp_out", help="where (blocks.3.hook_mlp_out)")
    parser.add_argument("--images", type=int, default=300, help="train on so many (300)")
    parser.add_argument("--latents", type=int, default=128, help="of the autoencoder (128)")
    parser.add_argument("--show", type=int, default=8, help="of which so many are shown (8)")
    options = parser.parse_args()
    if options.model != "testbed/clip" and options.photographs is None:
        parser.error("a model of timm needs --photographs FOLDER")
    torch.manual_seed(0)
    model, images, bank = loaded(options)
    autoencoder = trained(values_at(model, images, options.hook), options.latents)
    with model.spliced({options.hook: autoencoder}), torch.no_grad():
        pieces = [decompose(model, some, by="latent") for some in images.split(AT_ONCE)]
    print("\n".join(in_words(Decomposition.cat(pieces), bank, options.hook, options.show)))
