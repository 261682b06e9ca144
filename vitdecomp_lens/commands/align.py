"""``vitdecomp-lens align``: fit an aligner to a store."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vitdecomp_lens.clip.alignment import Aligner, FitProgress
from vitdecomp_lens.clip.objective import METHODS
from vitdecomp_lens.commands.models import positive
from vitdecomp_lens.commands.showing import Pace
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import printable
from vitdecomp_lens.store import Store


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "align",
        help="fit an aligner to a store",
        description="Fit a linear map for each component, from a store's contributions to its CLIP embeddings, and "
        "print how good they are on images held out. A run that was ended goes on with --resume.",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="a folder that 'collect' made")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--method", choices=tuple(METHODS), default="compalign", help="how to fit (compalign)")
    parser.add_argument("--epochs", type=positive, default=20, metavar="N", help="passes over the images at most (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the images held out and of the order (0)")
    parser.add_argument("--resume", action="store_true", help="go on with the fit that was ended")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Fit, and write the aligner."""
    out: Path = options.out
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    if out.exists():
        raise InputError(f"There is a file {str(out)!r} already. Choose another place, or take it away.")
    if checkpoint.exists() and not options.resume:
        raise InputError(f"There is a fit at {str(checkpoint)!r}. Go on with it with --resume, or take it away.")
    if not out.parent.is_dir():
        raise InputError(f"Expected a folder for {out.name} that exists; {str(out.parent)!r} does not.")
    store = Store(options.store)
    with Pace(errors, "epochs") as pace:
        before: list[int] = []

        def show(state: FitProgress) -> None:
            before.append(max(state.epoch - 1, 0))  # told after an epoch, or of the start
            pace(state.epoch, state.epochs, before[0])

        aligner = Aligner.fit_stream(
            store,
            method=options.method,
            epochs=options.epochs,
            seed=options.seed,
            checkpoint=checkpoint,
            progress=show,
        )
    aligner.save(out)
    checkpoint.unlink(missing_ok=True)
    Console().print(Text(repr(aligner.fit_report)), soft_wrap=True)
    errors.print(Text(f"Written to {printable(str(out))}."), soft_wrap=True)
    return 0
