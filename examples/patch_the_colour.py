"""Which head carries the colour: patching between two scenes that differ in nothing else, and what the scenes say.

Each scene is drawn twice, the second time in another colour. *Patching* puts one head's output (``hook_z``, all tokens)
from one drawing into the run on the other, and measures how far the answer, the score of the one colour less that of
the other, moves: an intervention on the model. What it should find, the *scenes* tell: by how much a head's own
contribution to that answer changes when only the colour does, an intervention on the world, without patching anything.

Offline, with the testbed's models and drawn scenes::

    python examples/patch_the_colour.py
    python examples/patch_the_colour.py --model deit --attribute shape --scenes 128

With a CLIP of open_clip, from drawn scenes enlarged to its images; colours are then texts::

    python examples/patch_the_colour.py --model ViT-B-16 --pretrained laion2b_s34b_b88k
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

from vitdecomp_lens import HookedViT, attribute, testbed
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.testbed.banks import text_bank
from vitdecomp_lens.testbed.scenes import Scenes, paint

TEMPLATE = "a drawing of a {} object"
Z = 1.96  # of 95 %


@dataclass(frozen=True)
class Twins:
    """Scenes, and the same scenes with one attribute changed.

    Attributes:
        one: The scenes.
        other: The same but for the attribute.
        values: Which value the attribute has in the first, and in the second.
    """

    one: UInt8[Tensor, "batch 3 height width"]
    other: UInt8[Tensor, "batch 3 height width"]
    values: tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]


@dataclass(frozen=True)
class Ranking:
    """By how much each head moves an answer.

    Attributes:
        moved: In each scene.
    """

    moved: Float[Tensor, "layer head batch"]

    def top(self, count: int) -> list[str]:
        """The heads that move it most, on average over scenes."""
        heads = self.moved.shape[1]
        return [f"L{at // heads}H{at % heads}" for at in self._order(count).tolist()]

    @property
    def apart(self) -> bool:
        """Whether the first head moves it more than the second: a 95 % interval of the difference is above zero."""
        first, second = self._order(2)
        mean, error = interval(self.moved.flatten(0, 1)[first] - self.moved.flatten(0, 1)[second])
        return bool(mean > error)

    def show(self, count: int = 4) -> str:
        """The first heads, with 95 % intervals."""
        mean, error = interval(self.moved.flatten(0, 1)[self._order(count)])
        rows = zip(self.top(count), mean.tolist(), error.tolist(), strict=True)
        return ", ".join(f"{head} {middle:.2f} ± {width:.2f}" for head, middle, width in rows)

    def _order(self, count: int) -> Int[Tensor, "count"]:
        return self.moved.mean(-1).flatten().topk(count).indices


def interval(values: Float[Tensor, "*axes batch"]) -> tuple[Float[Tensor, "*axes"], Float[Tensor, "*axes"]]:
    """The mean over a batch, and half the width of its 95 % interval."""
    return values.mean(-1), Z * values.std(-1) / values.shape[-1] ** 0.5


def twins(attribute: str, count: int, seed: int) -> Twins:
    """Draw scenes twice: as they are, and with another value of one attribute."""
    drawn = Scenes("test", seed=seed, size=count).drawn(range(count))
    was, kinds = drawn.first[attribute], len(testbed.ATTRIBUTES[attribute])
    step = torch.randint(1, kinds, was.shape, generator=torch.Generator().manual_seed(seed))
    becomes = (was + step) % kinds
    changed = replace(drawn, first={**drawn.first, attribute: becomes})
    return Twins(paint(drawn)[0], paint(changed)[0], (was, becomes))


@dataclass(frozen=True)
class Subject:
    """A model, and how each value of an attribute is read off it.

    Attributes:
        model: The model.
        directions: Of the values, in the representation: those of texts, or of the classifier.
        classes: Which of the model's logits they are; None of a CLIP, whose output is its representation.
    """

    model: HookedViT
    directions: Float[Tensor, "value d_rep"]
    classes: Sequence[int] | None = None

    @classmethod
    def of_testbed(cls, name: str, attribute: str) -> "Subject":
        """One of the testbed's models."""
        model, values = testbed.load(name), testbed.ATTRIBUTES[attribute]
        if name == "clip":
            return cls(model, text_bank(testbed.load_original("clip"), list(values)).centred().directions)
        classes = [testbed.CLASSES.index(value) for value in values]
        return cls(model, model.W_U.T[classes], classes)

    @classmethod
    def of_clip(cls, clip: nn.Module, tokenizer: Callable[..., Any], attribute: str) -> "Subject":
        """Any CLIP of open_clip, by texts that name the values."""
        texts = [TEMPLATE.format(value) for value in testbed.ATTRIBUTES[attribute]]
        return cls(HookedViT(clip), TextBank.from_open_clip(clip, texts, tokenizer=tokenizer).centred().directions)

    def taken(self, scenes: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 rows columns"]:
        """Scenes as the model takes them."""
        if self.model.usual_size() == tuple(scenes.shape[-2:]):
            return testbed.normalised(scenes)
        return self.model.preprocess([Image.fromarray(scene.permute(1, 2, 0).numpy()) for scene in scenes])

    def scores(self, output: Float[Tensor, "batch output"]) -> Float[Tensor, "batch value"]:
        """The scores of all values."""
        return output @ self.directions.T if self.classes is None else output[:, self.classes]


def answers(
    scores: Float[Tensor, "*axes batch value"], pair: tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]
) -> Float[Tensor, "*axes batch"]:
    """The score of each image's first value less that of its second."""
    rows = torch.arange(len(pair[0]))
    return scores[..., rows, pair[0]] - scores[..., rows, pair[1]]


def by_patching(subject: Subject, pictures: Twins) -> Ranking:
    """How far the answer moves when one head's output is that of the other drawing; mean of both ways."""
    model, (was, becomes) = subject.model, pictures.values
    one, other = subject.taken(pictures.one), subject.taken(pictures.other)
    hooks = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    effects = []
    for source, base, pair in ((one, other, (was, becomes)), (other, one, (becomes, was))):
        _, cache = model.run_with_cache(source, names_filter=hooks)
        measure = partial(answer_of, subject, pair=pair)
        patched = get_act_patch_attn_head_out_all_pos(model, base, cache, measure, reduce="none", baseline=True)
        effects.append(patched.effect())
    return Ranking(torch.stack(effects).mean(0))


def answer_of(
    subject: Subject, output: Float[Tensor, "batch output"], *, pair: tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]
) -> Float[Tensor, "batch"]:
    """The answer that an output of the model is."""
    return answers(subject.scores(output), pair)


def by_scenes(subject: Subject, pictures: Twins) -> Ranking:
    """By how much a head's own contribution to the answer changes when only the scene does."""
    written = []
    for scenes in (pictures.one, pictures.other):
        parts = attribute(subject.model, subject.taken(scenes), subject.directions, by="head").select(kind="head")
        written.append(answers(parts.values, pictures.values))
    return Ranking((written[0] - written[1]).unflatten(0, (subject.model.cfg.n_layers, -1)))


def main() -> None:
    """Print both rankings, and whether they begin with the same head."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--model", default="clip", help="of the testbed, with heads of its own; or of open_clip")
    arguments.add_argument("--pretrained", help="tag or path of the weights of an open_clip model")
    arguments.add_argument("--attribute", choices=list(testbed.ATTRIBUTES), default="colour")
    arguments.add_argument("--scenes", type=int, default=64)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    if options.pretrained is None:
        subject = Subject.of_testbed(options.model, options.attribute)
    else:
        import open_clip

        clip = open_clip.create_model(options.model, pretrained=options.pretrained).eval()
        subject = Subject.of_clip(clip, open_clip.get_tokenizer(options.model), options.attribute)
    pictures = twins(options.attribute, options.scenes, options.seed)
    with torch.no_grad():
        patched, changed = by_patching(subject, pictures), by_scenes(subject, pictures)
    print(f"{options.scenes} scenes, each with two values of {options.attribute}; mean and 95 % interval")
    print("patching one head moves the answer by     ", patched.show())
    print("its contribution changes with the scene by", changed.show())
    one, other = patched.top(1)[0], changed.top(1)[0]
    sure = "" if patched.apart and changed.apart else "; but no one head stands out: the second may be the first"
    print(f"patching finds {one}, the scenes say {other}{sure}")


if __name__ == "__main__":
    main()
