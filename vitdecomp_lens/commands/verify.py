"""``vitdecomp-lens verify``: check that a model is decomposed exactly."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from vitdecomp_lens.commands.models import add_weights, named_model, positive
from vitdecomp_lens.commands.showing import bar, tables
from vitdecomp_lens.commands.writing import write
from vitdecomp_lens.verify import NONE_STATED, verify


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "verify",
        help="check that a model is decomposed exactly",
        description="Measure a model and print its certificate: parity with the original, gaps of every cut in "
        "float32 and float64, coverage, live hooks, cost. Without weights, a model has its initial values, perturbed.",
    )
    parser.add_argument("name", metavar="NAME", help="name of a model of timm, such as test_vit")
    parser.add_argument("--open-clip", action="store_true", help="NAME is one of open_clip's, such as ViT-B-16")
    add_weights(parser)
    parser.add_argument("--images", type=positive, default=2, metavar="N", help="how many random images (2)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the certificate as JSON, too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Measure, and print the certificate; 1 for a model that is not supported."""
    with bar(errors, "loading") as (progress, task):
        model, origin = named_model(options.name, options, open_clip=options.open_clip)
        certificate = verify(
            model,
            name=options.name,
            weights=origin,
            licence=_licence(model, options),
            perturb=origin == "initial values",
            count=options.images,
            seed=options.seed,
            progress=lambda what, share: progress.update(task, description=what, completed=share),
        )
    tables().print(certificate)
    if options.json:
        write(options.json, certificate.to_json())
    return 0 if certificate.supported else 1


def _licence(model: nn.Module, options: argparse.Namespace) -> str:
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("license")
    if options.weights or not stated:
        return NONE_STATED
    return f"{stated}, as timm states it" if options.pretrained else f"{stated}, of timm's weights (not loaded)"
