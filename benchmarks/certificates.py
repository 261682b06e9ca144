"""The certificates of full-size models, as docs/certificates.md has them.

    python benchmarks/certificates.py                       # every model of the page, anew
    python benchmarks/certificates.py deit_base_patch16_224 # one of them, to the terminal

Weights are random and every parameter is moved off its initial value: what is certified is the architecture. A trained
checkpoint is certified by ``vitdecomp-lens verify NAME --pretrained``.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

from vitdecomp_lens import HookedViT, verify

PAGE = Path(__file__).parent.parent / "docs" / "certificates.md"
MODELS = (
    "deit_base_patch16_224",
    "vit_base_patch16_224",
    "vit_base_patch14_dinov2",
    "swin_base_patch4_window7_224",
    "maxvit_small_tf_224",
    "open_clip:ViT-B-16",
    "open_clip:ViT-L-14",
)
INTRODUCTION = """# Certificates

What `vitdecomp-lens verify` says of the full-size models of the paper: the hooked model against the original, the gap
of every cut in float32 and float64, coverage, live hooks. Made by `python benchmarks/certificates.py`, with random
weights of which every parameter was moved off its initial value; costs stand in the [README](../README.md).
"""


def certify(name: str) -> tuple[str, bool]:
    """The certificate of a model as text, and whether the model is supported."""
    model = HookedViT.from_open_clip(name.split(":")[1]) if ":" in name else HookedViT.from_timm(name)
    certificate = verify(model, name=name, weights="random", count=1, perturb=True, cost=False)
    return str(certificate), certificate.supported


def main() -> None:
    """Print certificates, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of timm, or open_clip:NAME; without any, the page is written")
    options = parser.parse_args()
    sections, supported = [INTRODUCTION], True
    for name in options.models or MODELS:
        started = time.perf_counter()
        # A process for each model, so that memory is given back.
        with multiprocessing.get_context("spawn").Pool(1) as process:
            text, passes = process.apply(certify, (name,))
        supported &= passes
        print(f"{text}\n({time.perf_counter() - started:.0f} s)\n", flush=True)
        sections.append(f"## {name}\n\n```text\n{text}\n```\n")
    if not options.models:
        PAGE.write_text("\n".join(sections))
    sys.exit(not supported)


if __name__ == "__main__":
    main()
