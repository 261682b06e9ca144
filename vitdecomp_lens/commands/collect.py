"""``vitdecomp-lens collect``: contributions over a data set, into a store."""

import argparse
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from vitdecomp_lens.collect import KEEP, Gather, Store, collect
from vitdecomp_lens.commands.models import (
    TESTBED,
    UNTRAINED,
    add_weights,
    named_clip,
    named_model,
    note_untrained,
    positive,
)
from vitdecomp_lens.commands.showing import Pace
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import printable
from vitdecomp_lens.hooked import HookedViT

DTYPES = ("float16", "bfloat16", "float32", "float64")
LISTED = 20  # skipped images that are named; all of them stand in the store


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "collect",
        help="decompose every image of a data set into a store",
        description="Decompose every image of a folder into a store, with CLIP embeddings beside the contributions. A "
        "run that was ended goes on with --resume. To use several processes or GPUs, start the same command with "
        "'accelerate launch -m vitdecomp_lens' or 'torchrun -m vitdecomp_lens'.",
    )
    scenes = "a folder of images; or testbed:SPLIT:SIZE[:SEED], scenes that are drawn, such as testbed:train:20000:1 "
    scenes += "(seed 0, the default, of train gives the scenes that the testbed's models were trained on)"
    parser.add_argument("source", metavar="SOURCE", help=scenes)
    parser.add_argument("--model", required=True, metavar="NAME", help="a model of timm, or testbed/NAME")
    parser.add_argument("--open-clip", action="store_true", help="the model is one of open_clip's, such as ViT-B-16")
    add_weights(parser)
    parser.add_argument("--clip", metavar="NAME", help="a CLIP of open_clip, or testbed/clip, for embeddings")
    parser.add_argument("--clip-pretrained", metavar="TAG", help="the weights of that CLIP, such as openai")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the store")
    parser.add_argument("--by", choices=("layer", "head", "neuron"), default="head", help="what components are (head)")
    of = "what is decomposed: representation (the default), logits, embedding, or a hook's name"
    parser.add_argument("--of", default="representation", metavar="WHAT", help=of)
    parser.add_argument("--keep", nargs="*", choices=KEEP, help="what to store of every image; by default all there is")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of stored contributions (float32)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images a batch and chunk (64)")
    gathered = "gather statistics in the same pass: the mean, and what is named"
    parser.add_argument("--gather", nargs="*", choices=("covariance", "cross"), help=gathered)
    parser.add_argument("--top", type=positive, metavar="K", help="gather each component's K top images, too")
    parser.add_argument(
        "--unreadable", choices=("stop", "skip"), default="stop", help="what to do at an image that cannot be read"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the store that is there")
    parser.add_argument("--readers", type=positive, metavar="N", help="how many images to open at once")
    parser.add_argument("--device", metavar="DEVICE", help="such as cuda:1; by default a GPU where there is one")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Collect."""
    errors = errors if os.environ.get("RANK", "0") == "0" else Console(stderr=True, quiet=True)
    source = source_of(options.source)
    device = device_named(options.device)
    with Pace(errors) as pace:
        model, clip = _models(options, errors)
        for module in (model, clip):
            if module is not None:
                module.to(device)
        begun = time.monotonic()
        pace.start()
        store = collect(
            HookedViT(model),
            source,
            options.out,
            clip=clip,
            by=options.by,
            of=options.of,
            keep=options.keep,
            dtype=getattr(torch, options.dtype),
            batch_size=options.batch_size,
            gather=_gather(options),
            unreadable=options.unreadable,
            resume=options.resume,
            readers=options.readers,
            progress=pace,
        )
    _say(store, time.monotonic() - begun, errors)
    return 0


def _say(store: Store, seconds: float, errors: Console) -> None:
    said = f"{store.count} images in {seconds:.1f} s, {len(store.skipped)} skipped"
    errors.print(Text(f"Written to {printable(str(store.path))}: {said}."), soft_wrap=True)
    for name, reason in store.skipped[:LISTED]:
        errors.print(Text(f"Skipped {printable(name)}: {printable(reason)}"), soft_wrap=True)
    if len(store.skipped) > LISTED:
        errors.print(Text(f"and {len(store.skipped) - LISTED} more, listed in complete.json."), soft_wrap=True)


def source_of(name: str) -> Any:
    """What images a name on the command line stands for: a folder, or scenes of the testbed."""
    scenes = re.fullmatch(r"testbed:([^:]+):(\d{1,18})(?::(\d{1,18}))?", name, re.ASCII)
    if scenes is None:
        if name.startswith("testbed:"):
            raise InputError(f"Expected testbed:SPLIT:SIZE or testbed:SPLIT:SIZE:SEED, whole numbers; got {name!r}.")
        return Path(name)
    from vitdecomp_lens import testbed

    return testbed.Scenes(scenes[1], size=int(scenes[2]), seed=int(scenes[3] or 0))


def device_named(name: str | None) -> torch.device:
    """The device of that name; without one, a GPU where there is one: of several processes, each its own.

    Raises:
        InputError: Where this machine has none of that name.
    """
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:  # what torch raises for names and for GPUs that are not there
        raise InputError(f"Expected --device as a device of this machine; {name!r} is none: {error}.") from error


def _models(options: argparse.Namespace, errors: Console) -> tuple[nn.Module, nn.Module | None]:
    """The model, and the CLIP, which are one object where they are the same: then it runs once."""
    if options.clip is None and options.clip_pretrained:
        raise InputError("--clip-pretrained names the weights of a CLIP: give --clip NAME, too.")
    model, origin = named_model(options.model, options, open_clip=options.open_clip)
    note_untrained(origin, errors)
    if options.clip is None:
        return model, None
    from_testbed = options.clip.startswith(TESTBED)
    same = options.clip == options.model and options.clip_pretrained == options.pretrained and not options.weights
    if same and (from_testbed or options.open_clip) and origin != UNTRAINED:
        return model, model
    return model, named_clip(options.clip, options.clip_pretrained)


def _gather(options: argparse.Namespace) -> Gather | None:
    if options.gather is None and options.top is None:
        return None
    named: dict[str, Any] = dict.fromkeys(options.gather or (), True)
    return Gather(**named, top=options.top or 0)
