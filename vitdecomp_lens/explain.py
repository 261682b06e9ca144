"""`explain`: which components write what a model says of a photograph, and which patches they take it from.

For the logits of a classifier. For scores along other directions, such as texts, see `attribute_tokens`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitdecomp_lens.class_names import ClassNames, Question
from vitdecomp_lens.components import By, Component
from vitdecomp_lens.decompose import attribute, attribute_tokens
from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.explanation import Contribution, Explanation, Heatmap, Prediction, share_of
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.preprocess import Photograph, open_upright
from vitdecomp_lens.patch_maps import PatchMaps
from vitdecomp_lens.tokens import TokenAttribution

PREDICTIONS = 5


def explain(
    model: HookedViT,
    images: Sequence[Photograph],
    *,
    class_: int | str | None = None,
    by: By = "head",
    top: int = 10,
    class_names: Sequence[str] | None = None,
    relative: bool = False,
) -> tuple[Explanation, ...]:
    """Explain the logit of a class by what every component writes along it, for each photograph.

    logit_c = Σ_components ⟨e_c, A(a)⟩, exactly; with ``relative``, the direction e_c - 1/K in place of e_c, where K
    classes answer the question that c answers: mostly all of them. A classifier that answers several questions (shape,
    colour...) says so in its configuration by ``label_groups``, the number of classes of each by name. Where an
    activation function stands between the representation h and the classifier (MaxViT's tanh), it is frozen at each
    photograph as the factor tanh(h) / h. Photographs are made upright as their EXIF data say.

    Args:
        model: A `HookedViT` with a classifier.
        images: PIL images or paths.
        class_: Which class, by index or name; by default the likeliest of each photograph, of the first question.
        by: What the components are, as for `decompose`.
        top: How many components get a heatmap of their own.
        class_names: A name for each class; by default those that the model's configuration lists (timm's
            ``label_names``), or ImageNet's, where timm has a list of as many classes.
        relative: Whether to explain the logit minus the mean of all logits that answer the same question, which gives
            the same probabilities.

    Returns:
        An `Explanation` for each photograph, in order.

    Raises:
        UnsupportedModelError: If the model has no classifier.
        UnknownNameError: If there is no such class.
        InputError: If a photograph cannot be read; the message names it.

    Example:
        >>> model = HookedViT.from_timm("test_vit")
        >>> (explanation,) = explain(model, [Image.new("RGB", (200, 160), "green")], class_="tench", top=2)
        >>> explanation.name, len(explanation.top), round(sum(one.share for one in explanation.contributions), 3)
        ('tench, Tinca tinca', 2, 1.0)
    """
    if isinstance(images, str | Path | Image.Image):
        raise InputError("Photographs must come as a list; got a single one. Pass [photograph].")
    explainer = Explainer(model, class_=class_, by=by, top=top, class_names=class_names, relative=relative)
    return tuple(
        explainer.explain(image, name=str(image) if isinstance(image, str | Path) else f"image {number}")
        for number, image in enumerate(images)
    )


class Explainer:
    """Explains photographs one by one, so that memory stays the same however many there are.

    Args:
        model: As for `explain`, like the options.
        class_: As for `explain`.
        by: As for `explain`.
        top: As for `explain`.
        class_names: As for `explain`.
        relative: As for `explain`.
    """

    def __init__(
        self,
        model: HookedViT,
        *,
        class_: int | str | None = None,
        by: By = "head",
        top: int = 10,
        class_names: Sequence[str] | None = None,
        relative: bool = False,
    ) -> None:
        if top < 0:
            raise InputError(f"Expected top= of at least 0; got {top}.")
        self.model, self.by, self.top, self.relative = model, by, top, relative
        count = _num_classes(model)
        self.names = ClassNames.of(count, _label_names(model) if class_names is None else class_names)
        self.wanted = None if class_ is None else self.names.find(class_)
        self.questions = Question.of(count, _configured(model).get("label_groups"))
        self.question = next(one for one in self.questions if (self.wanted or 0) in one.classes)

    def explain(self, photograph: Photograph, *, name: str) -> Explanation:
        """Explain one photograph, under the name that it has in messages and results."""
        upright = open_upright(photograph)
        image = self.model.preprocess([upright])
        with torch.no_grad():
            logits = self.model(image)[0].double()
        answers = list(self.question.classes)
        index = answers[int(logits[answers].argmax())] if self.wanted is None else self.wanted
        direction = torch.zeros(1, len(logits), dtype=torch.float64)
        direction[0, index] = 1
        if self.relative:
            direction[0, answers] -= 1 / len(answers)
        with torch.no_grad():
            scores, tokens = self._read(image, direction.to(image))
        logit = float(scores.total)  # type: ignore[arg-type]
        maps = PatchMaps(tokens)
        contributions = tuple(_contributions(scores, maps, logit))
        return Explanation(
            image=name,
            size=upright.size,
            seen=maps.covered(self.model.preprocess_geometry(upright), *image.shape[2:]),
            model=model_name(self.model),
            by=self.by,
            relative=self.relative,
            index=index,
            name=self.names.names[index],
            question=self.question.name,
            logit=logit,
            predictions=tuple(self._predictions(logits)),
            contributions=contributions,
            prefix=maps.by_prefix(),
            heatmap=Heatmap("all", maps.of_all()),
            top=tuple(Heatmap(label, maps.of(label)) for label in _strongest(contributions, self.top)),
            gap=float(scores.rest.abs().max()) / float(logits.abs().max()),  # type: ignore[union-attr]
        )

    def _read(
        self, image: Float[Tensor, "1 channel height width"], direction: Float[Tensor, "1 class"]
    ) -> tuple[Attribution, TokenAttribution]:
        """The scores of one image along one direction of logits, whole and by token."""
        if not self.model.has_activation_before_classifier:
            scores = attribute(self.model, image, direction, by=self.by, of="logits").cpu()
            return scores, attribute_tokens(self.model, image, direction, by=self.by, of="logits").cpu()
        _, cache = self.model.run_with_cache(image, names_filter="hook_representation")
        weight, bias = self.model.unembedding_at(cache["hook_representation"][0])
        scores = attribute(self.model, image, direction @ weight.T, by=self.by).cpu()
        tokens = attribute_tokens(self.model, image, direction @ weight.T, by=self.by).cpu()
        return _with_constant(scores, "classifier's bias", (direction @ bias).cpu()), tokens

    def _predictions(self, logits: Float[Tensor, "class"]) -> Iterator[Prediction]:
        answers = self.question.classes
        logits = logits[list(answers)]
        probabilities = logits.softmax(0)
        for place in logits.topk(min(PREDICTIONS, len(answers))).indices.tolist():
            index = answers[place]
            yield Prediction(index, self.names.names[index], float(probabilities[place]), float(logits[place]))


def _num_classes(model: HookedViT) -> int:
    count = getattr(getattr(model, "original", None), "num_classes", 0)
    if not isinstance(model, HookedViT) or not isinstance(count, int) or count < 1:
        raise UnsupportedModelError(
            "Expected a HookedViT with a classifier, whose logits can be explained. For a CLIP, or a model without "
            "classifier, use attribute_tokens(model, images, directions) with the directions of your texts."
        )
    return count


def _label_names(model: HookedViT) -> Sequence[str] | None:
    """The names of classes that a timm model brings along, if they are those of its classifier."""
    names = _configured(model).get("label_names") or ()
    return names if len(names) == _num_classes(model) else None  # a classifier may have been replaced


def _configured(model: HookedViT) -> Mapping[str, Any]:
    return getattr(model.original, "pretrained_cfg", None) or {}


def _with_constant(scores: Attribution, name: str, value: Float[Tensor, "direction"]) -> Attribution:
    """Add what the same constant writes for every image."""
    assert scores.total is not None
    added = value.to(scores.values).expand_as(scores.total)
    return replace(
        scores,
        values=torch.cat([scores.values, added[None]]),
        components=(*scores.components, Component(kind="constant", name=name)),
        total=scores.total + added,
    )


def model_name(model: HookedViT) -> str:
    """What a model's configuration calls it, or else its class."""
    return str(_configured(model).get("architecture") or model.cfg.model_name)


def _contributions(scores: Attribution, maps: PatchMaps, logit: float) -> Iterator[Contribution]:
    for row in sorted(range(len(scores)), key=lambda row: -float(scores.values[row])):
        component, score = scores.components[row], float(scores.values[row])
        patches = prefix = None
        if component.label in maps:
            patches, prefix = float(maps.of(component.label).sum()), maps.prefix_of(component.label)
        yield Contribution(component.label, component.kind, score, share_of(score, logit), patches, prefix)


def _strongest(contributions: Sequence[Contribution], count: int) -> list[str]:
    """Labels of the components that write most from patches, in either direction; highest first."""
    scores = {one.component: one.patches for one in contributions if one.patches is not None}
    chosen = sorted(scores, key=lambda label: -abs(scores[label]))[:count]
    return sorted(chosen, key=lambda label: -scores[label])
