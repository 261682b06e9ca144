"""``vitdecomp-lens evaluate``: the paper's tables, on the testbed or on a model and photographs of one's own."""

import argparse
import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.commands.interpreting.subjects import add_aligner, add_model, load_aligner
from vitdecomp_lens.commands.interpreting.words import Words, add_clip
from vitdecomp_lens.commands.models import TESTBED, named_model, note_untrained, positive
from vitdecomp_lens.commands.showing import bar, tables
from vitdecomp_lens.commands.writing import check_folder
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.weights import weights_hash

if TYPE_CHECKING:
    from vitdecomp_lens.evaluation.records import Results
    from vitdecomp_lens.evaluation.running import Tell

TASKS = ("ablation", "retrieval", "segmentation", "spurious", "typographic")
DRAWN = ("tasks", "models", "seeds", "size")  # options that say what is drawn of the testbed
OWN = ("images", "masks", "waterbirds", "outlines")  # options that name data of one's own


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="the paper's tables, on the testbed or on your model and photographs",
        description="Ablation curves, retrieval, segmentation and repair, each beside what it is compared with. "
        "Without --model, six models of the testbed are evaluated on drawn scenes, of which all is known; all of it "
        "takes well over half an hour. Writes results.md, results.json and pictures.",
    )
    parser.add_argument("--out", type=Path, default=Path("evaluated"), metavar="DIR", help="where to (evaluated)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="on the testbed: which; all")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="on the testbed: which; all six")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="on the testbed: of scenes (0 1 2)")
    parser.add_argument("--size", type=positive, metavar="N", help="on the testbed: scenes of each split (1000)")
    add_model(parser)
    add_clip(parser)
    add_aligner(parser)
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs, a subfolder for each class")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="for each a mask under the same path, ending in .png")
    parser.add_argument("--waterbirds", type=Path, metavar="DIR", help="the folder with Waterbirds' metadata.csv")
    outlines = "images and labels: outlines of COCO's classes in YOLO's form, for a classifier of ImageNet's"
    parser.add_argument("--outlines", type=Path, metavar="DIR", help=outlines)
    joined = "results.json of earlier runs, to put into the same tables; alone, nothing else is evaluated"
    parser.add_argument("--join", type=Path, nargs="+", default=[], metavar="FILE", help=joined)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Evaluate, and say where the results are."""
    from vitdecomp_lens.evaluation import pages  # not before it is needed: it imports open_clip
    from vitdecomp_lens.evaluation.records import Results

    check_folder(options.out, "--out")
    own, drawn = ([name for name in names if getattr(options, name) is not None] for names in (OWN, DRAWN))
    if bool(own) != (options.model is not None):
        raise InputError(
            f"Expected --model with photographs to evaluate it on (--images, --waterbirds), or neither for the "
            f"testbed; got {'--' + own[0] if own else '--model'} alone."
        )
    if own and drawn:
        raise InputError(
            f"--{drawn[0]} is for the testbed, and --{own[0]} for photographs of your own; give one of them."
        )
    earlier = [Results.load(path) for path in options.join]
    if earlier and not own and not drawn:
        found = functools.reduce(operator.add, earlier)
    else:
        found = functools.reduce(operator.add, [*earlier, _found(options, errors)])
    path = pages.write(found, options.out)
    tables().print(Text(f"Results: {path}"), soft_wrap=True)
    return 0


def _found(options: argparse.Namespace, errors: Console) -> "Results":
    from vitdecomp_lens.evaluation import running

    with bar(errors, "evaluating") as (progress, task):

        def tell(what: str, done: float) -> None:
            progress.update(task, description=what, completed=done)
            if not errors.is_terminal:
                errors.print(Text(f"{done:4.0%} {what}"), soft_wrap=True)

        if options.model is not None:
            return _of_ones_own(options, errors, tell)
        chosen = {name: value for name in DRAWN if (value := getattr(options, name)) is not None}
        return running.on_testbed(**chosen, tell=tell)


def _of_ones_own(options: argparse.Namespace, errors: Console, tell: "Tell") -> "Results":
    from vitdecomp_lens.evaluation.running import Photographs, on_photographs
    from vitdecomp_lens.evaluation.subjects import Subject

    original, origin = named_model(options.model, options, open_clip=options.open_clip)
    note_untrained(origin, errors)
    model, name = HookedViT(original), options.model
    data = Photographs(options.images, options.masks, options.waterbirds, options.outlines)
    if not data.need_texts:
        return on_photographs(Subject(name, model, _no_texts), data, tell=tell)
    words = Words(options, errors)
    clip = HookedViT(words.clip)
    itself = weights_hash(model) == weights_hash(clip)
    if itself == (options.aligner is not None):
        wanted = "no aligner for the CLIP itself" if itself else "--aligner FILE, which takes contributions to the CLIP"
        raise InputError(f"Expected {wanted}; got {options.aligner!r}. 'vitdecomp-lens align' makes one.")
    aligner = None if itself else load_aligner(options.aligner)

    def texts(several: Sequence[str]) -> TextBank:
        return words.embedded(several, put_into=words.templates)

    classes = getattr(original, "num_classes", 0)
    subject = Subject(name, model, texts, aligner, classifier=isinstance(classes, int) and classes > 0)
    eye = Subject(options.clip or f"{TESTBED}clip", clip, texts, None, classifier=False)
    return on_photographs(subject, data, clip=eye, tell=tell)


def _no_texts(several: Sequence[str]) -> TextBank:
    raise InputError(f"Expected --clip, to embed {several[0]!r}; got none.")
