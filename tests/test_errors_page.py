"""The page of errors is true: each symptom on it is provoked, and has a cause and a fix."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from labelled_samples import as_users_run_it
from safetensors.torch import save_file
from torch import nn

import vitdecomp_lens
from vitdecomp_lens import Decomposition, HookedViT, attribute, decompose, errors, testbed, trace
from vitdecomp_lens.interpret import text_span
from vitdecomp_lens.store import Store
from vitdecomp_lens.testbed.banks import text_bank

PAGE = Path(vitdecomp_lens.__file__).parent.parent / "docs" / "errors.md"


@cache
def model():
    return testbed.load("deit")


@cache
def images():
    return testbed.normalised(testbed.Scenes("test").images(range(2)))


@cache
def parts(by="head"):
    return decompose(model(), images(), by=by)


@cache
def bank():
    return text_bank(testbed.load_original("clip"), ["a red object", "a blue object", "an object on grass"])


class Branching(nn.Module):
    """Goes two ways, by what it sees."""

    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Activated(nn.Module):
    """Its stream itself passes activation functions, as a ResNet's does."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return (x + self.body(x).relu()).relu().mean((2, 3))


class Largest(nn.Module):
    """A maximum for each channel lies between a branch and the output."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        return (x + nn.functional.gelu(self.body(x))).amax((2, 3))


class Narrow(nn.Module):
    """Takes values apart, and puts them together to half their width."""

    def encode(self, x):
        return x

    def decode(self, latents):
        return latents[..., : latents.shape[-1] // 2]


def spliced(module):
    with model().spliced({"blocks.3.hook_mlp_out": module}):
        decompose(model(), images(), by="latent")


def in_training():
    return HookedViT(testbed.load_original("deit").train().apply(drops))


def drops(module):
    if isinstance(module, nn.Dropout):
        module.p = 0.1


def a_file(folder, content):
    path = folder / "parts.safetensors"
    if content == "damaged":
        parts().save(path)
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file({"values": torch.zeros(2)}, path)
    return path


# By the headings of the page: what provokes the message. Each takes an empty folder.
CASES = {
    "Images of another size": lambda _: decompose(model(), torch.zeros(1, 3, 64, 64)),
    "Images as bytes": lambda _: decompose(model(), testbed.Scenes("test").images(range(2))),
    "One image without its batch axis": lambda _: decompose(model(), images()[0]),
    "Images in another precision": lambda _: decompose(model(), images().double()),
    "Directions of another width": lambda _: attribute(model(), images(), torch.zeros(2, 7)),
    "An aligner for another cut": lambda _: parts("layer").map(testbed.aligner("deit")),
    "An aligner for another model": lambda _: decompose(testbed.load("dino"), images()).map(testbed.aligner("deit")),
    "Texts of another CLIP": lambda _: bank().check_space("CLIP-512-0123456789abcdef"),
    "Latents where no module stands": lambda _: decompose(model(), images(), by="latent"),
    "An autoencoder that does not fit": lambda _: spliced(Narrow()),
    "A component that is not there": lambda _: parts()["L9H1"],
    "A hook that is not there": lambda _: model().run_with_cache(images(), names_filter="blocks.0.attn.hook_patern"),
    "A class without adapter": lambda _: HookedViT(nn.Linear(2, 2)),
    "Training mode": lambda _: in_training(),
    "A compiled module": lambda _: HookedViT(torch.compile(testbed.load_original("deit"))),
    "A module that is wrapped already": lambda _: HookedViT(model()),
    "A module that cannot be exported": lambda _: decompose(Branching().eval(), images()),
    "A cut that lets paths through": lambda _: (graph := trace(model(), images())).push(
        graph.cut(["blocks.3.hook_attn_out"]), images()
    ),
    "Contributions that miss the total": lambda _: replace(parts(), total=2 * parts().total).check_gap(),
    "Too much at once": lambda _: decompose(model(), images(), by="neuron", max_bytes=10_000),
    "A file that is not there": lambda folder: Decomposition.load(folder / "parts.safetensors"),
    "A damaged file": lambda folder: Decomposition.load(a_file(folder, "damaged")),
    "Somebody else's file": lambda folder: Decomposition.load(a_file(folder, "foreign")),
    "A folder that is no store": lambda folder: Store.open(folder),
    "Low coverage": lambda _: decompose(Activated().eval(), images(), by="layer"),
    "The slow way": lambda _: decompose(Largest().eval(), images(), by="layer"),
    "Words read without an aligner": lambda _: text_span(parts().select(kind="head"), bank(), steps=1),
    "Texts that depend on each other": lambda _: (
        text_bank(testbed.load_original("clip"), ["a red object", "a blue object"]).centred().subspace()
    ),
}


def sections():
    """For each symptom on the page its heading, the class of its error, and what is said of it."""
    for of_class in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        name, *symptoms = re.split(r"^### ", of_class, flags=re.MULTILINE)
        for symptom in symptoms:
            heading, _, words = symptom.partition("\n")
            yield heading, name.split("\n")[0].strip("`"), words


SECTIONS = list(sections())


def test_every_class_has_a_symptom_and_every_symptom_a_test():
    ours = [value for value in vars(errors).values() if getattr(value, "__module__", "") == errors.__name__]
    ours = [value for value in ours if isinstance(value, type)]
    assert {name for _, name, _ in SECTIONS} == {one.__name__ for one in ours} - {"VitDecompError"}
    assert [heading for heading, _, _ in SECTIONS] == list(CASES)


@pytest.mark.parametrize(("heading", "name", "words"), SECTIONS, ids=[heading for heading, _, _ in SECTIONS])
def test_a_symptom_is_what_is_seen(heading, name, words, tmp_path):
    with as_users_run_it():
        seen(heading, name, words, tmp_path)


def seen(heading, name, words, folder):
    error, provoke = getattr(errors, name), CASES[heading]
    if issubclass(error, Warning):
        with pytest.warns(error) as told:
            provoke(folder)
        (message,) = {str(one.message) for one in told}
    else:
        with pytest.raises(error) as caught:
            provoke(folder)
        assert caught.type is error
        message = str(caught.value)
    (shown,) = re.findall(r"```text\n(.*?)\n```", words, re.DOTALL)
    pattern = ".*".join(re.escape(" ".join(piece.split())) for piece in shown.split("[…]"))
    assert re.fullmatch(pattern, " ".join(message.split())), message
    assert "*Cause.*" in words
    assert "*Fix.*" in words
