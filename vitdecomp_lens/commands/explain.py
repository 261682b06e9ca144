"""``vitdecomp-lens explain``: what writes a class's logit for photographs."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vitdecomp_lens.commands.models import TESTBED, add_weights, named_model, note_untrained, positive
from vitdecomp_lens.commands.showing import bar, say_error, tables
from vitdecomp_lens.commands.writing import PictureNames, check_folder, unwritable
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explain import Explainer
from vitdecomp_lens.explanation import FORMAT, VERSION, Explanation, printable
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.preprocess import open_upright
from vitdecomp_lens.pictures import INSTALL, can_draw, save_picture

SHOWN = range(4)  # scenes that are explained where no photographs are given


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "explain",
        help="show what writes a class's logit for photographs",
        description="For each photograph: what the model says, the components that write the logit of the likeliest "
        "class (or of --class), and a picture of the patches it comes from. Tables are printed; pictures and one JSON "
        "file are written to --out.",
    )
    photographs = "a photograph; a model of the testbed has scenes of its own"
    parser.add_argument("photographs", nargs="*", metavar="IMAGE", help=photographs)
    named = "name of a model of timm, with a classifier; or testbed/NAME"
    parser.add_argument("--model", required=True, metavar="NAME", help=named)
    add_weights(parser)
    parser.add_argument("--class", dest="class_", metavar="CLASS", help="index, name or WordNet number of a class")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--by", choices=("layer", "head", "neuron"), default="head", help="what components are (head)")
    parser.add_argument("--top", type=positive, default=10, metavar="K", help="how many components to show (10)")
    parser.add_argument("--relative", action="store_true", help="explain the logit minus the mean of all logits")
    parser.add_argument(
        "--out", type=Path, default=Path("explained"), metavar="DIR", help="folder to write to (explained)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, errors: Console) -> int:
    """Explain; 1 if a photograph could not be."""
    check_folder(options.out, "--out")
    photographs = options.photographs or _scenes(options)
    console, draws, count = tables(), can_draw(), len(photographs)
    names = PictureNames(options.out)
    failed = 0
    with bar(errors, "loading") as (progress, task):
        explainer = _explainer(options, errors)
        with ExplanationsFile(options.out / "explanations.json") as file:
            for number, path in enumerate(photographs):
                progress.update(task, description=printable(Path(path).name)[:30], completed=number / count)
                try:
                    explanation = explainer.explain(path, name=path)
                except InputError as error:
                    failed += 1
                    say_error(progress.console, error)
                    continue
                console.print(explanation.table(options.top))
                console.print()
                file.add(explanation, picture=_draw(explanation, names) if draws else None)
    if file.count:
        pictures = f"{file.count} {'picture' if file.count == 1 else 'pictures'} and " if draws else ""
        errors.print(Text(f"Written to {printable(str(options.out))}: {pictures}explanations.json."), soft_wrap=True)
    if not draws:
        errors.print(Text(INSTALL), soft_wrap=True)
    return 1 if failed else 0


def _scenes(options: argparse.Namespace) -> list[str]:
    """Drawn scenes as files, for a model of the testbed that is given no photographs."""
    if not options.model.startswith(TESTBED):
        raise InputError("Expected photographs to explain; got none. Models of the testbed bring scenes of their own.")
    from vitdecomp_lens import testbed

    folder, paths = options.out / "scenes", []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for scene in testbed.Scenes("test").scenes(SHOWN):
            path = folder / f"{'-'.join(scene.caption.split())}.png"
            scene.picture.save(path)
            paths.append(str(path))
    except OSError as error:
        raise unwritable(folder, error) from error
    return paths


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
            raise unwritable(self.path, error) from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.count and kind is None:
            self._append("\n]}\n")
            self.part.replace(self.path)
        elif self.count:
            self.part.unlink(missing_ok=True)


def _explainer(options: argparse.Namespace, errors: Console) -> Explainer:
    model, origin = named_model(options.model, options)
    note_untrained(origin, errors)
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


def _draw(explanation: Explanation, names: PictureNames) -> str:
    name = names.next(explanation.image)
    try:
        names.folder.mkdir(parents=True, exist_ok=True)
        save_picture(explanation, open_upright(explanation.image), names.folder / name)
    except OSError as error:
        raise unwritable(names.folder / name, error) from error
    return name
