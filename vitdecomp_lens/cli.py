"""The command line: ``vitdecomp-lens verify`` and ``vitdecomp-lens explain``.

Results go to standard output, progress and errors to standard error. The exit code is 0 if all is well, 1 if a model
is not supported or a photograph could not be explained, 2 if the request cannot be carried out as it is.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import nn

from vitdecomp_lens import weights
from vitdecomp_lens.certificate import WIDTH
from vitdecomp_lens.errors import InputError, UnknownNameError, VitDecompError
from vitdecomp_lens.explain import Explainer
from vitdecomp_lens.explanation import FORMAT, VERSION, Explanation, printable
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.preprocess import open_upright
from vitdecomp_lens.pictures import INSTALL, can_draw, save_picture
from vitdecomp_lens.verify import NONE_STATED, verify

LONGEST_NAME = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: As after the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    errors = Console(stderr=True)
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)  # libraries log that a model without weights has none
    try:
        code: int = options.run(options, errors)
    except VitDecompError as error:
        _say_error(errors, error)
        return 2
    except KeyboardInterrupt:
        errors.print("Stopped.")
        return 130
    finally:
        logging.disable(logged)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitdecomp-lens", description=__import__("vitdecomp_lens").__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('vitdecomp-lens')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "verify",
        help="check that a model is decomposed exactly",
        description="Measure a model and print its certificate: parity with the original, gaps of every cut in "
        "float32 and float64, coverage, live hooks, cost. Without weights, a model has its initial values, perturbed.",
    )
    check.add_argument("name", metavar="NAME", help="name of a model of timm, such as test_vit")
    check.add_argument("--open-clip", action="store_true", help="NAME is one of open_clip's, such as ViT-B-16")
    _add_weights(check)
    check.add_argument("--images", type=_positive, default=2, metavar="N", help="how many random images (2)")
    check.add_argument("--seed", type=int, default=0, help="of all random numbers (0)")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the certificate as JSON, too")
    check.set_defaults(run=_verify)
    tell = commands.add_parser(
        "explain",
        help="show what writes a class's logit for photographs",
        description="For each photograph: what the model says, the components that write the logit of the likeliest "
        "class (or of --class), and a picture of the patches it comes from. Tables are printed; pictures and one JSON "
        "file are written to --out.",
    )
    tell.add_argument("photographs", nargs="+", metavar="IMAGE", help="a photograph")
    tell.add_argument("--model", required=True, metavar="NAME", help="name of a model of timm, with a classifier")
    _add_weights(tell)
    tell.add_argument("--class", dest="class_", metavar="CLASS", help="index, name or WordNet number of a class")
    tell.add_argument("--class-names", type=Path, metavar="FILE", help="names of the classes, one a line")
    tell.add_argument("--by", choices=("layer", "head", "neuron"), default="head", help="what components are (head)")
    tell.add_argument("--top", type=_positive, default=10, metavar="K", help="how many components to show (10)")
    tell.add_argument("--relative", action="store_true", help="explain the logit minus the mean of all logits")
    tell.add_argument(
        "--out", type=Path, default=Path("explained"), metavar="DIR", help="folder to write to (explained)"
    )
    tell.set_defaults(run=_explain)
    return parser


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pretrained", nargs="?", const=True, metavar="TAG", help="load the library's weights, those of TAG if given"
    )
    command.add_argument("--weights", metavar="FILE", help="load a .safetensors file of the model's state dict")
    command.add_argument("--num-classes", type=_positive, metavar="N", help="classes of the classifier, for timm")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1; got {text!r}")
    return int(text)


@contextmanager
def _progress(console: Console, what: str) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar on standard error, gone once it is done; nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task(what, total=1.0)


# --- models -----------------------------------------------------------------------------------------------------


def _model(name: str, options: argparse.Namespace, *, open_clip: bool = False) -> tuple[nn.Module, str]:
    """The model by name with the weights asked for, and where they come from."""
    if options.pretrained and options.weights:
        raise InputError("--pretrained and --weights both say which weights to load; give one of them.")
    if open_clip:
        if options.pretrained is True:
            raise InputError("Weights of open_clip have tags: --pretrained TAG, such as --pretrained openai.")
        if options.num_classes:
            raise InputError("--num-classes is for classifiers of timm; a CLIP has none.")
        model = weights.create_open_clip(name, pretrained=options.pretrained)
    else:
        if isinstance(options.pretrained, str):
            name = f"{name.partition('.')[0]}.{options.pretrained}"
        classes = {} if options.num_classes is None else {"num_classes": options.num_classes}
        try:
            model = weights.create_timm(name, pretrained=bool(options.pretrained), **classes)
        except UnknownNameError as error:
            raise UnknownNameError(f"{error}{_open_clip_hint(options)}") from error
    if options.weights:
        weights.load_weights(model, options.weights)
        return model, f"the file {printable(Path(options.weights).name)}"
    if options.pretrained:
        return model, f"{'open_clip' if open_clip else 'timm'}'s, pretrained"
    return model, "initial values"


def _open_clip_hint(options: argparse.Namespace) -> str:
    """What to add to the message that timm has no such model, where the command takes models of open_clip too."""
    if not hasattr(options, "open_clip"):
        return ""
    import open_clip

    if options.name not in open_clip.list_models():
        return ""
    return " open_clip has a model of that name: add --open-clip."


def _licence(model: nn.Module, options: argparse.Namespace) -> str:
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("license")
    if options.weights or not stated:
        return NONE_STATED
    return f"{stated}, as timm states it" if options.pretrained else f"{stated}, of timm's weights (not loaded)"


# --- verify -----------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace, errors: Console) -> int:
    with _progress(errors, "loading") as (progress, task):
        model, origin = _model(options.name, options, open_clip=options.open_clip)
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
    _tables().print(certificate)
    if options.json:
        _write(options.json, certificate.to_json())
    return 0 if certificate.supported else 1


def _tables() -> Console:
    # Piped into a file, tables have the width that they are made for.
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{str(path)!r} cannot be written: {error}. Choose another place.")


def _say_error(errors: Console, error: VitDecompError) -> None:
    errors.print(Text.assemble(("Error: ", "bold red"), printable(str(error))), soft_wrap=True)


# --- explain ----------------------------------------------------------------------------------------------------


def _explain(options: argparse.Namespace, errors: Console) -> int:
    tables, draws, count = _tables(), can_draw(), len(options.photographs)
    _check_folder(options.out)
    names = PictureNames(options.out)
    failed = 0
    with _progress(errors, "loading") as (progress, task):
        explainer = _explainer(options, errors)
        with ExplanationsFile(options.out / "explanations.json") as file:
            for number, path in enumerate(options.photographs):
                progress.update(task, description=printable(Path(path).name)[:30], completed=number / count)
                try:
                    explanation = explainer.explain(path, name=path)
                except InputError as error:
                    failed += 1
                    _say_error(progress.console, error)
                    continue
                tables.print(explanation.table(options.top))
                tables.print()
                file.add(explanation, picture=_draw(explanation, names) if draws else None)
    if file.count:
        pictures = f"{file.count} {'picture' if file.count == 1 else 'pictures'} and " if draws else ""
        errors.print(Text(f"Written to {printable(str(options.out))}: {pictures}explanations.json."), soft_wrap=True)
    if not draws:
        errors.print(Text(INSTALL), soft_wrap=True)
    return 1 if failed else 0


def _check_folder(out: Path) -> None:
    """Refuse a place in which no folder can be made, before anything is computed."""
    nearest = next((path for path in (out, *out.parents) if os.path.exists(path)), out)
    if os.path.exists(nearest) and not nearest.is_dir():
        raise InputError(f"--out must be a folder; {str(nearest)!r} is a file. Choose another place.")


class ExplanationsFile:
    """One JSON file of explanations, written as they come; it has its name only once it is whole.

    Args:
        path: The file. Its folder is made with the first explanation.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.part = path.with_name(path.name + ".part")

    def __enter__(self) -> "ExplanationsFile":
        return self

    def add(self, explanation: Explanation, *, picture: str | None) -> None:
        """Write one more, with the name of its picture."""
        head = json.dumps({"format": FORMAT, "version": VERSION})[:-1] + ', "explanations": [\n'
        packed = explanation.as_dict() | {"picture": picture}
        text = json.dumps(packed, ensure_ascii=False, allow_nan=False)
        self._append((",\n" if self.count else head) + text, mode="a" if self.count else "w")
        self.count += 1

    def _append(self, text: str, *, mode: str = "a") -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.part.open(mode, encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.count and kind is None:
            self._append("\n]}\n")
            self.part.replace(self.path)
        elif self.count:
            self.part.unlink(missing_ok=True)


def _explainer(options: argparse.Namespace, errors: Console) -> Explainer:
    model, origin = _model(options.model, options)
    if origin == "initial values":
        note = (
            "Note: the model has random initial values. Give --pretrained, or --weights FILE, to explain a trained one."
        )
        errors.print(Text(note), soft_wrap=True)
    class_names = None
    if options.class_names:
        try:
            class_names = options.class_names.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The class names cannot be read: {error}. Give a text file, one name a line.") from error
    return Explainer(
        HookedViT(model),
        class_=options.class_,
        by=options.by,
        top=options.top,
        class_names=class_names,
        relative=options.relative,
    )


def _draw(explanation: Explanation, names: "PictureNames") -> str:
    name = names.next(explanation.image)
    try:
        names.folder.mkdir(parents=True, exist_ok=True)
        save_picture(explanation, open_upright(explanation.image), names.folder / name)
    except OSError as error:
        raise _unwritable(names.folder / name, error) from error
    return name


class PictureNames:
    """File names for pictures, made from those of photographs: harmless, and each only once.

    Args:
        folder: Where the pictures go.

    Example:
        >>> names = PictureNames(Path("explained"))
        >>> names.next("a/cat.jpg"), names.next("b/Cat.png"), names.next("-rf $(x).jpg")
        ('cat.png', 'Cat-2.png', 'rf_x.png')
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: set[str] = set()

    def next(self, photograph: str) -> str:
        """A name for the picture of a photograph."""
        stem = re.sub(r"[^\w.-]+", "_", Path(photograph).stem)[:LONGEST_NAME].strip("._-") or "photograph"
        name, number = f"{stem}.png", 2
        while name.casefold() in self.taken:  # not every file system tells cases apart
            name, number = f"{stem}-{number}.png", number + 1
        self.taken.add(name.casefold())
        return name
