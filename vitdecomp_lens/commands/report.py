"""``vitdecomp-lens report``: one page of HTML that shows what wrote a model's answers, and lets one try."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from rich.text import Text
from torch import Tensor

from vitdecomp_lens.class_match import class_vectors
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.collecting.images import images_from
from vitdecomp_lens.collecting.pictures import opened
from vitdecomp_lens.collecting.sources import Sample
from vitdecomp_lens.commands.collect import source_of
from vitdecomp_lens.commands.interpreting.subjects import add_aligner, add_model, load_aligner
from vitdecomp_lens.commands.interpreting.words import GENERAL, Words, add_clip
from vitdecomp_lens.commands.models import TESTBED, named_model, note_untrained, positive
from vitdecomp_lens.commands.showing import bar, say_error
from vitdecomp_lens.commands.writing import check_folder
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explanation import printable
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.preprocess import Photograph, open_upright
from vitdecomp_lens.report import Report, report

SCENES = 10  # that are shown where no photographs are given
FEATURES = "features"
REFERENCE = "testbed:validation"  # the scenes that words of the testbed's models are read from
AT_ONCE = 64  # pictures


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="make one page to look at: what wrote a model's answers, in words and on the image",
        description="Make one HTML page that needs no network: for each photograph the model's answers, what every "
        "component writes for them, the patches it comes from, what the components say, and switches that take "
        "components away. Answers are the classes of the model's classifier or, with --texts, texts.",
    )
    photographs = "a photograph; a model of the testbed has scenes of its own"
    parser.add_argument("photographs", nargs="*", metavar="IMAGE", help=photographs)
    add_model(parser, required=True)
    add_clip(parser)
    add_aligner(parser)
    texts = "score images with texts in place of classes: a file, one text a line; a bank; or features, by question"
    parser.add_argument("--texts", metavar="FILE|BANK", help=texts)
    words = f"the words that components are read in: a file or a bank ({GENERAL} where a CLIP embeds texts; else "
    parser.add_argument("--words", metavar="FILE|BANK", help=f"{words}the classes)")
    reference = "other images, which words are read from, and whose mean can be put in place of a component: a folder, "
    reference += f"or testbed:SPLIT:SIZE ({REFERENCE}:N for models of the testbed; else the photographs themselves)"
    parser.add_argument("--reference", metavar="SOURCE", help=reference)
    parser.add_argument("--images", type=positive, default=500, metavar="N", help="how many of these to read (500)")
    asked = "index, name or WordNet number of a class to have heatmaps besides the likeliest; may be repeated"
    parser.add_argument("--class", dest="classes", action="append", default=[], metavar="CLASS", help=asked)
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--by", choices=("layer", "head"), default="head", help="what components are (head)")
    top = "how many of a question's likeliest answers have heatmaps, where it has more than 12 (5)"
    parser.add_argument("--top", type=positive, default=5, metavar="K", help=top)
    parser.add_argument("--relative", action="store_true", help="show scores above the mean of all answers")
    parser.add_argument("--title", help="of the page (the model's name)")
    parser.add_argument("--seed", type=int, default=0, help="of the images drawn again, for words (0)")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page to write (report.html)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Make the page; 1 if a photograph could not be read."""
    check_folder(options.out.parent, "The folder of --out")
    if options.out.is_dir():
        raise InputError(f"--out must be a file; {str(options.out)!r} is a folder. Name a file in it.")
    if options.out.exists() and any(Path(one).exists() and options.out.samefile(one) for one in options.photographs):
        raise InputError(f"--out {str(options.out)!r} is one of the photographs. Name another file.")
    with bar(errors, "loading") as (progress, task):
        original, origin = named_model(options.model, options, open_clip=options.open_clip)
        note_untrained(origin, errors)
        model = HookedViT(original)
        images, names, failed = _images(options, progress.console)
        progress.update(task, description="reading texts", completed=0.1)
        asked = _Asked.of(options, model, errors)
        progress.update(task, description="reading reference images", completed=0.2)
        reference = _reference(options, model)
        progress.update(task, description="decomposing", completed=0.4)
        made = _made(options, model, images, names, asked, reference)
    path = made.save(options.out)
    told = f"{made.images} images, {made.components} components, {made.answers} answers, {made.size / 1e6:.1f} MB"
    errors.print(Text(f"Written to {printable(str(path))}: {told}. Open it in a browser."), soft_wrap=True)
    return 1 if failed else 0


def _made(
    options: argparse.Namespace,
    model: HookedViT,
    images: Sequence[Photograph],
    names: Sequence[str],
    asked: "_Asked",
    reference: Tensor | None,
) -> Report:
    return report(
        model,
        images,
        texts=asked.texts,
        aligner=asked.aligner,
        scale=asked.scale,
        classes=options.classes,
        class_names=_class_names(options.class_names),
        bank=asked.bank,
        reference=reference,
        by=options.by,
        names=names,
        title=options.title or options.model,
        relative=options.relative,
        top=options.top,
        seed=options.seed,
    )


def _images(options: argparse.Namespace, errors: Console) -> tuple[list[Image.Image], list[str], int]:
    """Photographs and their names, or drawn scenes and their captions; and how many could not be read."""
    if not options.photographs:
        if not options.model.startswith(TESTBED):
            raise InputError("Expected photographs to report on; got none. Models of the testbed bring scenes.")
        from vitdecomp_lens import testbed

        scenes = testbed.Scenes("test").scenes(range(SCENES))
        return [scene.picture for scene in scenes], [scene.caption for scene in scenes], 0
    found, names = [], []
    for path in options.photographs:
        try:
            found.append(open_upright(path))
            names.append(Path(path).name)
        except InputError as error:
            say_error(errors, error)
    if not found:
        raise InputError("Expected at least one photograph that can be read; there is none.")
    return found, names, len(options.photographs) - len(found)


@dataclass(frozen=True)
class _Asked:
    """What images are scored with, and what components are read in.

    Attributes:
        texts: Of each question; None for the model's own classes.
        bank: Words; None for the classes.
        aligner: What takes contributions into the texts' space.
        scale: Of the CLIP that embeds texts.
    """

    texts: Mapping[str, TextBank] | None = None
    bank: TextBank | None = None
    aligner: Aligner | None = None
    scale: float | None = None

    @classmethod
    def of(cls, options: argparse.Namespace, model: HookedViT, errors: Console) -> "_Asked":
        """As the command line names it, and for models of the testbed what comes with them."""
        aligner = _aligner(options)
        texts = options.texts or (None if class_vectors(model) is not None else _own_texts(options))
        if texts is None and options.words is None and aligner is None:
            return cls()
        if options.clip is None and options.open_clip:
            options.clip, options.clip_pretrained = options.model, options.pretrained
        named = (options.model, options.aligner or "")
        if options.clip is None and not any(name.startswith(TESTBED) for name in named):
            raise InputError(
                "Expected --clip NAME, the CLIP that embeds the texts, and --aligner FILE, which takes what this "
                "model's components write into its space: 'vitdecomp-lens align' makes one. Without --texts, --words "
                "and --aligner, the page is of the model's own classes."
            )
        words = Words(options, errors)
        bank = words.bank(options.words or GENERAL)
        if texts is None:
            return cls(bank=bank, aligner=aligner)
        several = words.features(()) if texts == FEATURES else {"": words.bank(texts)}
        return cls(several, bank, aligner, _scale(words.clip))


def _aligner(options: argparse.Namespace) -> Aligner | None:
    """The aligner that is named, or the one that is shipped for a model of the testbed."""
    if options.aligner is not None:
        return load_aligner(options.aligner)
    if not options.model.startswith(TESTBED) or options.by != "head" or options.clip not in (None, f"{TESTBED}clip"):
        return None
    from vitdecomp_lens.testbed.aligners import ALIGNED

    return load_aligner(options.model) if options.model.removeprefix(TESTBED) in ALIGNED else None


def _own_texts(options: argparse.Namespace) -> str:
    """What a model without classifier is asked where nobody says."""
    if options.model.startswith(TESTBED):
        return FEATURES
    raise InputError(
        "Expected --texts FILE, texts to score the images with, one a line: this model has no classifier, and so no "
        "classes of its own."
    )


def _scale(clip: Any) -> float | None:
    """What a CLIP multiplies similarities by before the softmax; None where it takes no softmax (SigLIP)."""
    scale = getattr(clip, "logit_scale", None)
    return None if scale is None or getattr(clip, "logit_bias", None) is not None else float(scale.detach().exp())


def _reference(options: argparse.Namespace, model: HookedViT) -> Float[Tensor, "batch channel height width"] | None:
    """Other images, evenly spread over their source, as the model takes them."""
    name = options.reference
    if name is None and options.model.startswith(TESTBED):
        name = f"{REFERENCE}:{options.images}"
    if name is None:
        return None
    source = images_from(source_of(name))
    assert source.count is not None
    count = min(options.images, source.count)
    rows = [place * source.count // count for place in range(count)]
    pictures = [_picture(source.read(row, row + 1)[0]) for row in rows]
    return torch.cat([model.preprocess(pictures[first : first + AT_ONCE]) for first in range(0, count, AT_ONCE)])


def _picture(sample: Sample) -> Image.Image:
    try:
        image = opened(sample.image)
    except InputError as error:
        raise InputError(f"The reference image {sample.id!r} cannot be read: {error}. Leave it out.") from error
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) if isinstance(image, Tensor) else image


def _class_names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The class names cannot be read: {error}. Give a text file, one name a line.") from error
