"""``vitdecomp-lens align``: fit an aligner to a store."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from vitdecomp_lens import weights
from vitdecomp_lens.class_match import class_bank, class_match, class_vectors, matched
from vitdecomp_lens.class_names import ClassNames
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.alignment import Aligner, FitProgress
from vitdecomp_lens.clip.objective import METHODS
from vitdecomp_lens.clip.sources import held_out_mask
from vitdecomp_lens.clip.templates import SIMPLE
from vitdecomp_lens.clip.text_embedding import space_of
from vitdecomp_lens.collecting.models import weights_hash
from vitdecomp_lens.commands.models import TESTBED, add_weights, named_model, positive
from vitdecomp_lens.commands.showing import Pace
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import printable
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.store import Store

HELD_OUT = 0.1
MATCHED = 2000  # images that components are read from, of those held out


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "align",
        help="fit an aligner to a store",
        description="Fit a linear map for each component, from a store's contributions to its CLIP embeddings, and "
        "print how good they are on images held out. A run that was ended goes on with --resume. With --model and "
        "--clip, the two that the store was made with, it also says how many of the classes that components tell "
        "apart for the model's classifier CLIP's texts find in them: the match rate.",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="a folder that 'collect' made")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--method", choices=tuple(METHODS), default="compalign", help="how to fit (compalign)")
    parser.add_argument("--epochs", type=positive, default=20, metavar="N", help="passes over the images at most (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the images held out and of the order (0)")
    parser.add_argument("--resume", action="store_true", help="go on with the fit that was ended")
    parser.add_argument("--model", metavar="NAME", help="the store's model, of timm or testbed/NAME: for a match rate")
    add_weights(parser)
    parser.add_argument("--clip", metavar="NAME", help="the store's CLIP, of open_clip or testbed/clip: likewise")
    parser.add_argument("--clip-pretrained", metavar="TAG", help="the weights of that CLIP, such as openai")
    names = "a text file, one class a line; by default the names that the model brings along, or ImageNet's"
    parser.add_argument("--class-names", type=Path, metavar="FILE", help=names)
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
    classes = _classes(options, store, errors)
    with Pace(errors, "epochs") as pace:
        before: list[int] = []

        def show(state: FitProgress) -> None:
            before.append(max(state.epoch - 1, 0))  # told after an epoch, or of the start
            pace(state.epoch, state.epochs, before[0])

        aligner = Aligner.fit_stream(
            store,
            method=options.method,
            held_out=HELD_OUT,
            epochs=options.epochs,
            seed=options.seed,
            checkpoint=checkpoint,
            progress=show,
        )
    if classes is not None:
        aligner = classes.matched(aligner, store, options.seed)
    aligner.save(out)
    checkpoint.unlink(missing_ok=True)
    Console().print(Text(repr(aligner.fit_report)), soft_wrap=True)
    errors.print(Text(f"Written to {printable(str(out))}."), soft_wrap=True)
    return 0


@dataclass(frozen=True)
class _Classes:
    """The classes of a model, as its classifier and as a CLIP has them."""

    vectors: Tensor
    names: TextBank

    def matched(self, aligner: Aligner, store: Store, seed: int) -> Aligner:
        """The aligner with the match rate in its report, over images held out."""
        held_out = torch.nonzero(held_out_mask(store.count, HELD_OUT, seed))[:MATCHED, 0]
        parts = store.decomposition(held_out)
        return matched(aligner, class_match(parts, aligner, self.vectors, self.names))


def _classes(options: argparse.Namespace, store: Store, errors: Console) -> _Classes | None:
    """What a match rate needs; nothing where it was not asked for, or the model has no classifier."""
    if options.model is None and options.clip is None:
        if options.class_names or options.clip_pretrained or options.pretrained or options.weights:
            raise InputError("A match rate needs the two models of the store: give --model NAME and --clip NAME.")
        return None
    if options.model is None or options.clip is None:
        raise InputError("A match rate needs both models of the store: give --model NAME and --clip NAME.")
    model, _ = named_model(options.model, options)
    _refuse_other(store.metadata.get("weights"), weights_hash(HookedViT(model)), "--model", options.model)
    vectors = class_vectors(model)
    if vectors is None:
        errors.print(Text(f"{printable(options.model)} has no linear classifier: no match rate."), soft_wrap=True)
        return None
    names = _names(model, len(vectors), options.class_names)
    return _Classes(vectors, class_bank(names, _texts(names, options, store)))


def _refuse_other(wanted: str | None, found: str, option: str, name: str) -> None:
    if wanted != found:
        raise InputError(
            f"Expected {option} to be the model that the store was made with, {wanted!r}; {name} with these weights is "
            f"{found!r}. Give the same options as to 'collect'."
        )


def _names(model: nn.Module, count: int, file: Path | None) -> list[str]:
    given: Sequence[str] | None = None
    if file is not None:
        try:
            given = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The class names cannot be read: {error}. Give a text file, one name a line.") from error
    else:
        own = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
        given = own if len(own) == count else None  # a classifier may have been replaced
    names = ClassNames.of(count, given)
    if given is None and not names.synsets:
        raise InputError(f"The {count} classes have no known names. Give --class-names FILE, one name a line.")
    return [names.short(number) for number in range(count)]


def _texts(names: Sequence[str], options: argparse.Namespace, store: Store) -> TextBank:
    """A text for each class; of names that several classes have, one."""
    if not options.clip.startswith(TESTBED):
        clip = weights.create_open_clip(options.clip, pretrained=options.clip_pretrained)
        _refuse_other(store.space, space_of(clip), "--clip", options.clip)
        return TextBank.from_open_clip(clip, dict.fromkeys(names), templates=SIMPLE, tokenizer=_tokenizer(options.clip))
    from vitdecomp_lens import testbed
    from vitdecomp_lens.testbed import aligners

    clip = testbed.load_original(options.clip.removeprefix(TESTBED))
    _refuse_other(store.space, space_of(clip), "--clip", options.clip)
    if tuple(names) == testbed.CLASSES:
        return aligners.class_names(clip)  # what they are called in scenes
    return TextBank.from_open_clip(clip, dict.fromkeys(names), tokenizer=testbed.tokenize)


def _tokenizer(name: str) -> Any:
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except (OSError, ImportError, RuntimeError, ValueError) as error:  # some come from a hub
        raise InputError(f"The tokenizer of {name!r} cannot be had: {error}.") from error
