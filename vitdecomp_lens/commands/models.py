"""Models by the names and options of the command line."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import nn

from vitdecomp_lens import weights
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.explanation import printable

TESTBED = "testbed/"  # what the names of the testbed's models begin with
UNTRAINED = "initial values"


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1; got {text!r}")
    return int(text)


def add_weights(command: argparse.ArgumentParser) -> None:
    """Add the options that say which weights a model has."""
    command.add_argument(
        "--pretrained", nargs="?", const=True, metavar="TAG", help="load the library's weights, those of TAG if given"
    )
    command.add_argument("--weights", metavar="FILE", help="load a .safetensors file of the model's state dict")
    command.add_argument("--num-classes", type=positive, metavar="N", help="classes of the classifier, for timm")


def origin_of(name: str, options: argparse.Namespace, *, open_clip: bool = False) -> str:
    """Where the weights of a model come from that the options name."""
    if name.startswith(TESTBED):
        return "the testbed's"
    if options.weights:
        return f"the file {printable(Path(options.weights).name)}"
    if options.pretrained or (open_clip and _brings_weights(name)):
        return f"{'open_clip' if open_clip else 'timm'}'s, pretrained"
    return UNTRAINED


def note_untrained(origin: str, errors: Console) -> None:
    """Say so where a model has no weights but random ones, as `origin_of` tells."""
    if origin == UNTRAINED:
        note = "Note: the model has random initial values. Give --pretrained, or --weights FILE, for a trained one."
        errors.print(Text(note), soft_wrap=True)


def named_clip(name: str, pretrained: str | None) -> nn.Module:
    """A CLIP by name, with trained weights: in the space of random ones texts mean nothing.

    Raises:
        UnknownNameError: If there is no such CLIP.
        InputError: If no weights are named, or they cannot be loaded.
    """
    if name.startswith(TESTBED):
        if pretrained:
            raise InputError("Models of the testbed come with their weights: leave out --clip-pretrained.")
        from vitdecomp_lens import testbed  # not before it is needed: it imports open_clip

        return testbed.load_original(name.removeprefix(TESTBED))
    import open_clip

    if not pretrained and not _brings_weights(name) and name in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(name)
        such = f", such as --clip-pretrained {tags[0]}" if tags else ""
        raise InputError(
            f"Expected the weights of the CLIP {name}; got none, and in the space of random ones texts mean nothing. "
            f"Give --clip-pretrained TAG{such}."
        )
    return weights.create_open_clip(name, pretrained=pretrained)


def _brings_weights(name: str) -> bool:
    """Whether a name of open_clip stands for weights, too, such as hf-hub:OWNER/NAME."""
    return ":" in name


def named_model(name: str, options: argparse.Namespace, *, open_clip: bool = False) -> tuple[nn.Module, str]:
    """The model by name with the weights asked for, and where they come from."""
    origin = origin_of(name, options, open_clip=open_clip)
    if name.startswith(TESTBED):
        if options.pretrained or options.weights or options.num_classes:
            raise InputError("Models of the testbed come with their weights: leave out the options that name others.")
        from vitdecomp_lens import testbed  # not before it is needed: it imports open_clip

        return testbed.load_original(name.removeprefix(TESTBED)), origin
    if options.pretrained and options.weights:
        raise InputError("--pretrained and --weights both say which weights to load; give one of them.")
    if open_clip:
        if options.pretrained is True:
            raise InputError("Weights of open_clip have tags: --pretrained TAG, such as --pretrained openai.")
        if options.num_classes:
            raise InputError("--num-classes is for classifiers of timm; a CLIP has none.")
        model = weights.create_open_clip(name, pretrained=options.pretrained)
    else:
        tagged = f"{name.partition('.')[0]}.{options.pretrained}" if isinstance(options.pretrained, str) else name
        classes: dict[str, Any] = {} if options.num_classes is None else {"num_classes": options.num_classes}
        try:
            model = weights.create_timm(tagged, pretrained=bool(options.pretrained), **classes)
        except UnknownNameError as error:
            raise UnknownNameError(f"{error}{_open_clip_hint(name, options)}") from error
    if options.weights:
        weights.load_weights(model, options.weights)
    return model, origin


def _open_clip_hint(name: str, options: argparse.Namespace) -> str:
    """What to add to the message that timm has no such model, where the command takes models of open_clip too."""
    if not hasattr(options, "open_clip"):
        return ""
    import open_clip

    if name not in open_clip.list_models():
        return ""
    return " open_clip has a model of that name: add --open-clip."
