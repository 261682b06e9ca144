"""``vitdecomp-lens align``: fit an aligner to a store."""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from vitdecomp_lens.class_match import class_bank, class_match, class_vectors, matched
from vitdecomp_lens.class_names import ClassNames
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.alignment import Aligner, AlignmentReport, FitProgress
from vitdecomp_lens.clip.fitting import MAX_BYTES
from vitdecomp_lens.clip.objective import METHODS
from vitdecomp_lens.clip.sources import Chunk, held_out_mask
from vitdecomp_lens.clip.templates import SIMPLE
from vitdecomp_lens.clip.text_embedding import space_of
from vitdecomp_lens.commands.collect import device_named
from vitdecomp_lens.commands.models import TESTBED, add_weights, named_clip, named_model, note_untrained, positive
from vitdecomp_lens.commands.showing import Pace, bar, tables
from vitdecomp_lens.components import Component
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import printable
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.store import Store
from vitdecomp_lens.weights import weights_hash

HELD_OUT = 0.1
FEW = 30  # images held out, below which what they say is mostly chance
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
    parser.add_argument("--epochs", type=positive, default=60, metavar="N", help="passes over the images at most (60)")
    penalty = "the weight of what keeps maps near isometries (1, the paper's)"
    parser.add_argument("--penalty", type=float, default=1.0, metavar="W", help=penalty)
    steps = "images a step takes; by default a thirty-second of them, from 32 to 1,024"
    parser.add_argument("--batch-size", type=positive, metavar="N", help=steps)
    table = "the largest table to keep (2 GiB); beyond it, the store is read again in every epoch"
    parser.add_argument("--max-bytes", type=positive, default=MAX_BYTES, metavar="N", help=table)
    parser.add_argument("--device", metavar="DEVICE", help="where to fit, such as cuda:1; by default the CPU")
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
    store, device = Store(options.store), device_named(options.device or "cpu")
    classes = _classes(options, store, errors)
    errors.print(Text(f"Reading {store.count} images of {printable(str(store.path))}."), soft_wrap=True)
    begun = time.monotonic()
    with _Shown(errors, store.count) as shown:
        aligner = Aligner.fit_stream(
            _Source(store, device, shown),
            method=options.method,
            penalty=options.penalty,
            held_out=HELD_OUT,
            epochs=options.epochs,
            batch_size=options.batch_size,
            max_bytes=options.max_bytes,
            seed=options.seed,
            checkpoint=checkpoint,
            progress=shown.fitting,
        )
    seconds = time.monotonic() - begun
    aligner = _on_the_cpu(aligner)
    if classes is not None:
        aligner = classes.matched(aligner, store, options.seed)
    aligner.save(out)
    checkpoint.unlink(missing_ok=True)
    assert aligner.fit_report is not None
    tables().print(_table(aligner.fit_report))
    _warn_of_few(aligner, errors)
    errors.print(Text(f"Written to {printable(str(out))}: fitted in {seconds:.1f} s."), soft_wrap=True)
    return 0


def _table(report: AlignmentReport) -> Table:
    """What was found on the images held out, as a few lines that say what is good."""
    count, components = len(report.distances), len(report.labels)
    title = f"The aligner on {count} {'image' if count == 1 else 'images'} held out"
    table = Table(title=Text(title, style="bold"), title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("meaning")
    table.add_row("cosine distance", f"{report.cosine_distance:.4g}", "from CLIP's embeddings; 0 is best")
    residual = f"on average over {components} components; 0 is best"
    table.add_row("isometry residual", f"{report.mean_isometry:.2g}", residual)
    table.add_row("norm order, images", f"{report.within:.2%}", "pairs of images whose order changed")
    table.add_row("norm order, components", f"{report.across:.2%}", "pairs of components whose order changed")
    if report.match_rate is not None:
        by_chance = "" if report.match_by_chance is None else f"; by chance {report.match_by_chance:.3f}"
        table.add_row("match rate", f"{report.match_rate:.3f}", f"classes found by texts{by_chance}")
    return table


def _warn_of_few(aligner: Aligner, errors: Console) -> None:
    """Say so where the report, and when the fit ended, hang on very few images."""
    assert aligner.fit_report is not None
    if (count := len(aligner.fit_report.distances)) < FEW:
        what = f"Only {count} image{' was' if count == 1 else 's were'} held out: what the report says is mostly chance"
        errors.print(Text(f"Warning: {what}. Collect more images, {round(FEW / HELD_OUT)} at least."), soft_wrap=True)


class _Shown:
    """What a fit is at: reading the store, or which of its epochs.

    Args:
        errors: Where to.
        count: How many images there are.
    """

    def __init__(self, errors: Console, count: int) -> None:
        self._count, self._pace = count, Pace(errors, "epochs")
        self._before: int | None = None
        self._open, self._reading = ExitStack(), ExitStack()
        self._bar, self._task = self._reading.enter_context(bar(errors, "reading the store"))

    def __enter__(self) -> "_Shown":
        return self

    def __exit__(self, *error: object) -> None:
        self._reading.close()
        self._open.close()

    def read(self, images: int) -> None:
        """So many images have been read of the store, from its beginning."""
        self._bar.update(self._task, completed=images / self._count)

    def fitting(self, state: FitProgress) -> None:
        """A start was found, or an epoch is over."""
        if self._before is None:
            self._reading.close()  # a terminal shows one bar at a time
            self._open.enter_context(self._pace)
            self._before = max(state.epoch - 1, 0)
            if not state.epoch:
                self._pace.start()
        self._pace(state.epoch, state.epochs, self._before)


@dataclass(frozen=True)
class _Source:
    """A store whose chunks come to a device, and that says how far it has been read."""

    store: Store
    device: torch.device
    shown: _Shown

    @property
    def components(self) -> Sequence[Component]:
        """The store's."""
        return self.store.components

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The store's."""
        return self.store.metadata

    @property
    def space(self) -> str | None:
        """The store's."""
        return self.store.space

    @property
    def count(self) -> int:
        """How many images there are."""
        return self.store.count

    def chunks(self) -> Iterator[Chunk]:
        """The store's."""
        done = 0
        for values, targets in self.store.chunks():
            done += len(targets)
            self.shown.read(done)
            yield values.to(self.device), targets.to(self.device)


def _on_the_cpu(aligner: Aligner) -> Aligner:
    assert aligner.fit_report is not None
    entries, tensors = aligner.fit_report.packed()
    return replace(
        aligner,
        basis=aligner.basis.cpu(),
        weights=aligner.weights.cpu(),
        bias=aligner.bias.cpu(),
        fit_report=AlignmentReport.unpacked(entries, {name: tensor.cpu() for name, tensor in tensors.items()}),
    )


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
    model, origin = named_model(options.model, options)
    note_untrained(origin, errors)
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
    clip = named_clip(options.clip, options.clip_pretrained)
    _refuse_other(store.space, space_of(clip), "--clip", options.clip)
    if not options.clip.startswith(TESTBED):
        return TextBank.from_open_clip(clip, dict.fromkeys(names), templates=SIMPLE, tokenizer=_tokenizer(options.clip))
    from vitdecomp_lens import testbed
    from vitdecomp_lens.testbed import aligners

    if tuple(names) == testbed.CLASSES:
        return aligners.class_names(clip)  # what they are called in scenes
    return TextBank.from_open_clip(clip, dict.fromkeys(names), tokenizer=testbed.tokenize)


def _tokenizer(name: str) -> Any:
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except (OSError, ImportError, RuntimeError, ValueError) as error:  # some come from a hub
        raise InputError(f"The tokenizer of {name!r} cannot be had: {error}.") from error
