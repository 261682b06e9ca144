"""``vitdecomp-lens evaluate``: the paper's tables, on the testbed or on a model and photographs of one's own."""

import argparse
import functools
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from vitdecomp_lens.clip import TextBank, banks
from vitdecomp_lens.commands.collect import device_named
from vitdecomp_lens.commands.interpreting.subjects import add_aligner, add_model, load_aligner
from vitdecomp_lens.commands.interpreting.words import Words, add_clip
from vitdecomp_lens.commands.models import TESTBED, named_model, note_untrained, positive
from vitdecomp_lens.commands.showing import bar, tables
from vitdecomp_lens.commands.writing import check_folder
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import printable
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.weights import weights_hash

if TYPE_CHECKING:
    from vitdecomp_lens.evaluation.records import Results
    from vitdecomp_lens.evaluation.running import Vocabulary, Watch

TASKS = ("ablation", "retrieval", "segmentation", "spurious", "typographic")
DRAWN = ("models", "seeds", "size")  # options that say what is drawn of the testbed
# Options that say how the model is made, and read.
MADE = ("open_clip", "pretrained", "weights", "num_classes", "clip", "clip_pretrained", "text_cache", "aligner")
OWN = ("images", "masks", "waterbirds", "outlines")  # options that name data of one's own


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="the paper's tables, on the testbed or on your model and photographs",
        description="Ablation curves, retrieval, segmentation and repair, each beside what it is compared with. "
        "Without --model, six models of the testbed are evaluated on drawn scenes, of which all is known; all of it "
        "takes well over half an hour. Writes results.json after each task, and results.md and pictures at the end. A "
        "task that fails does not end the others; the exit code is 1 then.",
    )
    parser.add_argument("--out", type=Path, default=Path("evaluated"), metavar="DIR", help="where to (evaluated)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="which; all that there are photographs for")
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
    parser.add_argument("--device", metavar="DEVICE", help="where models run, such as cuda:1 (cpu)")
    joined = (
        "results.json of earlier runs, to put into the same tables, but for what is measured again; alone, nothing "
        "else is evaluated"
    )
    parser.add_argument("--join", type=Path, nargs="+", default=[], metavar="FILE", help=joined)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Evaluate, and say where the results are."""
    from vitdecomp_lens.evaluation import carrying, pages  # not before it is needed: it imports open_clip
    from vitdecomp_lens.evaluation.records import Results

    check_folder(options.out, "--out")
    own, drawn = ([name for name in names if getattr(options, name) is not None] for names in (OWN, DRAWN))
    if bool(own) != (options.model is not None):
        raise InputError(
            f"Expected --model with photographs to evaluate it on (--images, --waterbirds), or neither for the "
            f"testbed; got {'--' + own[0] if own else '--model'} alone."
        )
    if options.model is None and (made := [name for name in MADE if getattr(options, name) not in (None, False)]):
        raise InputError(
            f"--{made[0].replace('_', '-')} is for a model of your own: expected --model and photographs with it."
        )
    if own and drawn:
        raise InputError(
            f"--{drawn[0]} is for the testbed, and --{own[0]} for photographs of your own; give one of them."
        )
    earlier = functools.reduce(operator.add, map(Results.load, options.join), Results((), {}))
    failed: dict[str, str] = {}
    if options.join and not (own or drawn or options.tasks):
        found = earlier
    else:
        found = _found(options, earlier, failed, errors)
    out = tables()
    out.print(Text(f"Results: {pages.write(found, options.out, failed)}"), soft_wrap=True)
    for said in carrying.lacking(found):
        out.print(Text(printable(said)), soft_wrap=True)
    for task, why in failed.items():
        errors.print(Text(f"Failed: {task}: {printable(why)}"), soft_wrap=True)
    return 1 if failed else 0


def _found(options: argparse.Namespace, earlier: "Results", failed: dict[str, str], errors: Console) -> "Results":
    """What is measured now, beside what was before and is not measured again; both are kept after each task."""
    from vitdecomp_lens.evaluation import running

    def joined(found: "Results") -> "Results":
        return earlier.without(found) + found

    def keep(found: "Results") -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        joined(found).save(options.out / "results.json")

    with bar(errors, "evaluating") as (progress, task):

        def tell(what: str, done: float) -> None:
            progress.update(task, description=what, completed=done)
            if not errors.is_terminal:
                errors.print(Text(f"{done:4.0%} {what}"), soft_wrap=True)

        def fail(what: str, error: Exception) -> None:
            failed[what] = str(error) or type(error).__name__

        watch = running.Watch(tell, keep, fail)
        if options.model is not None:
            return joined(_of_ones_own(options, errors, watch))
        asked = {name: value for name in (*DRAWN, "tasks") if (value := getattr(options, name)) is not None}
        return joined(running.on_testbed(**asked, device=device_named(options.device or "cpu"), watch=watch))


def _of_ones_own(options: argparse.Namespace, errors: Console, watch: "Watch") -> "Results":
    from vitdecomp_lens.evaluation.running import Photographs, on_photographs
    from vitdecomp_lens.evaluation.subjects import Subject

    device = device_named(options.device or "cpu")
    original, origin = named_model(options.model, options, open_clip=options.open_clip)
    note_untrained(origin, errors)
    model, name = HookedViT(original.to(device)), options.model
    photographs = Photographs(options.images, options.masks, options.waterbirds, options.outlines)
    asked: dict[str, Any] = {"tasks": options.tasks or TASKS, "watch": watch}
    classes = getattr(original, "num_classes", 0)
    classifier = isinstance(classes, int) and classes > 0
    of_logits = classifier and set(asked["tasks"]) == {"segmentation"}
    if of_logits or not (photographs.images or photographs.waterbirds):
        return on_photographs(Subject(name, model, _no_texts, classifier=classifier), photographs, **asked)
    words = Words(options, errors)
    clip = HookedViT(words.clip.to(device))
    itself = weights_hash(model) == weights_hash(clip)
    if itself == (options.aligner is not None):
        wanted = "no aligner for the CLIP itself" if itself else "--aligner FILE, which takes contributions to the CLIP"
        raise InputError(f"Expected {wanted}; got {options.aligner or 'none'}. 'vitdecomp-lens align' makes one.")
    aligner = None if itself else load_aligner(options.aligner)

    def texts(several: Sequence[str]) -> TextBank:
        return words.embedded(several, put_into=words.templates).to("cpu")

    vocabulary, random = _vocabulary(words)
    subject = Subject(name, model, texts, aligner, classifier, random)
    eye = Subject(options.clip or f"{TESTBED}clip", clip, texts, None, classifier=False)
    return on_photographs(subject, photographs, clip=eye, vocabulary=vocabulary, **asked)


def _vocabulary(words: Words) -> "tuple[Vocabulary, Sequence[str]]":
    """The texts that tasks ask for, and random ones, of words that the CLIP knows.

    The testbed's CLIP knows no words but those that scenes show: none of them is random.
    """
    from vitdecomp_lens.evaluation.running import Vocabulary

    if not words.of_testbed:
        # Templates bring their own articles.
        return Vocabulary(), [re.sub("^an? ", "", text) for text in banks.general()]
    from vitdecomp_lens.testbed import banks as of_testbed

    known = dict(of_testbed.features())
    birds = {"core": known["shape"], "spurious": known["background"]}
    written = known.pop("word")[0].rpartition(" ")[0]
    return Vocabulary(known, birds, f"{written} {{}}"), ()


def _no_texts(several: Sequence[str]) -> TextBank:
    raise InputError(f"Expected --clip, to embed {several[0]!r}; got none.")
