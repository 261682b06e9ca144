"""`report`: from a model, images and texts to a page."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitdecomp_lens.certificate import TOLERANCES
from vitdecomp_lens.class_match import class_vectors
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.components import By, TokenGrid
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explain import model_name
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.preprocess import Photograph, open_upright
from vitdecomp_lens.patch_maps import PatchMaps
from vitdecomp_lens.report.answers import CLASSIFIERS, Answers, Classes, Images, Scored, Texts, decomposed, in_space
from vitdecomp_lens.report.packing import fixed, picture
from vitdecomp_lens.report.page import Report, filled
from vitdecomp_lens.report.words import Words, words_of
from vitdecomp_lens.token_block import TokenBlock
from vitdecomp_lens.tokens import TokenAttribution
from vitdecomp_lens.verify import LIBRARIES

# Bytes an image: ten images stay below 5 MB, with their photographs and the page itself.
FOR_SCORES, FOR_MAPS = 262_000, 90_000
ALL = 12  # answers of a question, up to which all of them have heatmaps
SCORE, MAP = 3, 2  # bytes a number
BASE64 = 4 / 3
UNREAD = Words((), {}, {}, "No words: the classifier is no single linear map. Give a bank of texts.")


def report(
    model: HookedViT,
    images: Sequence[Photograph],
    *,
    texts: TextBank | Mapping[str, TextBank] | None = None,
    aligner: Aligner | None = None,
    scale: float | None = None,
    classes: Sequence[int | str] = (),
    class_names: Sequence[str] | None = None,
    bank: TextBank | None = None,
    reference: Sequence[Photograph] | Tensor | None = None,
    by: By = "head",
    names: Sequence[str] | None = None,
    title: str | None = None,
    relative: bool = False,
    top: int = 5,
    words: int = 5,
    resamples: int = 20,
    seed: int = 0,
) -> Report:
    """Make a page of what wrote the answers of a model to some images.

    Answers are the classes of the model's classifier or, with ``texts``, these. Every score on the page is the sum of
    what components write, exactly; components are switched off in it by taking what they write out of that sum (or
    putting the mean over reference images there), with all statistics frozen: the *direct* effect of
    `Decomposition.ablate`. For texts, scores are cosine similarities, whose norm is frozen as well.

    Args:
        model: The model.
        images: Photographs, or paths to them; ten make a page of at most 5 MB.
        texts: Texts to score the images with, in place of classes: of one question, or by the name of the question that
            they answer.
        aligner: What takes the contributions of a model into the texts' space; none for the image tower of the CLIP
            that embedded them.
        scale: What similarities are multiplied by before they are made probabilities among the texts of a question:
            that CLIP's ``logit_scale.exp()``. Without it, texts have no probabilities.
        classes: Classes, by index or name, to have heatmaps besides the likeliest ones.
        class_names: A name for each class; by default as for `explain`.
        bank: The words in which components are read; by default the texts, or else the class vectors.
        reference: Other images: photographs, or a batch as the model takes it. Words are read from them (some hundreds
            are needed for words that hold), and their mean can be put in place of a component. By default, words are
            read from the images themselves, and components are only switched off.
        by: What the components are: ``"head"`` or ``"layer"``. (Neurons are too many to look at.)
        names: A name for each image; by default the name of its file, or its number.
        title: The page's; by default the model's name.
        relative: Whether scores are those above the mean of all answers to the same question, which gives the same
            probabilities: what components write for all of them alike is then left out.
        top: How many of a question's likeliest answers have heatmaps, where it has more than 12.
        words: How many texts a component has at most.
        resamples: How often reference images are drawn again to see which words stay.
        seed: Of these.

    Returns:
        The page, which a notebook shows; ``.save("report.html")`` writes it.

    Raises:
        UnsupportedModelError: If the model has no classifier and there are no texts.
        UnknownNameError: If there is no such class.
        InputError: If images or options cannot be used, or contributions and texts are of different spaces.

    Example:
        >>> model = HookedViT.from_timm("test_vit", depth=1)
        >>> report(model, [Image.new("RGB", (200, 160), "green")], top=1).images
        1
    """
    _refuse(model, images, names, by=by, at_least={"top": top, "words": words, "resamples": resamples})
    photographs = [open_upright(image) for image in images]
    called = _names(images) if names is None else [str(name) for name in names]
    answers = _answers(model, by, texts, aligner, scale, class_names, relative=relative)
    asked = [answers.known.find(one) for one in classes] if isinstance(answers, Classes) else []
    if classes and not isinstance(answers, Classes):
        raise InputError("classes= names classes of a classifier; with texts=, these are what images are scored with.")
    batch = model.preprocess(photographs)
    others = _batch(model, reference)
    read = decomposed(model, batch if others is None else others, by)
    scored = answers.scored(batch, None if others is None else answers.mean_of(others, read))
    kept = Kept.of(answers, scored, asked, top)
    maker = _Maker(model, answers, scored, kept)
    shown = [
        maker.image(number, photograph, batch[number : number + 1], name)
        for number, (photograph, name) in enumerate(zip(photographs, called, strict=True))
    ]
    read_in = _bank(answers, bank)
    own = others is None
    said = UNREAD if read_in is None else _words(read, aligner, read_in, words, resamples, seed, own=own)
    content = {
        "title": title or model_name(model),
        **maker.shared(),
        "words": said.packed(),
        "images": shown,
        "certificate": list(_certificate(answers, scored, aligner, len(shown), others)),
        "notes": list(_notes(answers, kept)),
    }
    return Report(filled(content), len(shown), len(scored.scores), len(kept.answers))


# --- what comes in ----------------------------------------------------------------------------------------------


def _refuse(
    model: HookedViT, images: Any, names: Sequence[str] | None, *, by: str, at_least: Mapping[str, int]
) -> None:
    """Refuse what can be known not to go before anything is computed."""
    if isinstance(images, str | Path | Image.Image):
        raise InputError("Photographs must come as a list; got a single one. Pass [photograph].")
    if not len(images):
        raise InputError("There are no photographs to report on; pass at least one.")
    if by not in ("head", "layer"):
        raise InputError(f"Expected by='head' or by='layer', which can be looked at; got by={by!r}.")
    if names is not None and len(names) != len(images):
        raise InputError(f"Expected a name for each of the {len(images)} images; got {len(names)}.")
    for name, number in at_least.items():
        if number < 1:
            raise InputError(f"Expected {name}= of at least 1; got {number}.")


def _names(images: Sequence[Photograph]) -> list[str]:
    """The names of files, without the folders that they lie in."""
    return [
        Path(image).name if isinstance(image, str | Path) else f"image {number}"
        for number, image in enumerate(images, start=1)
    ]


def _answers(
    model: HookedViT,
    by: By,
    texts: TextBank | Mapping[str, TextBank] | None,
    aligner: Aligner | None,
    scale: float | None,
    class_names: Sequence[str] | None,
    *,
    relative: bool,
) -> Answers:
    if texts is None:
        return Classes(model, by, class_names, relative=relative)
    if isinstance(texts, TextBank):
        texts = {"": texts}
    if not texts:
        raise InputError("Expected texts of at least one question; got none.")
    return Texts(model, by, texts, aligner, scale, relative=relative)


def _batch(model: HookedViT, reference: Sequence[Photograph] | Tensor | None) -> Images | None:
    if reference is None:
        return None
    batch = reference if isinstance(reference, Tensor) else model.preprocess(reference)
    model.check_images(batch)
    return batch


def _bank(answers: Answers, bank: TextBank | None) -> TextBank | None:
    """The words that components are read in; None for a classifier that has no direction for each class."""
    if bank is not None:
        return bank
    if isinstance(answers, Texts):
        return answers.bank()
    assert isinstance(answers, Classes)
    vectors = class_vectors(answers.model)
    return None if vectors is None or len(vectors) != len(answers.names) else answers.bank(vectors.cpu())


def _words(
    parts: Decomposition,
    aligner: Aligner | None,
    bank: TextBank,
    steps: int,
    resamples: int,
    seed: int,
    *,
    own: bool,
) -> Words:
    if bank.space != CLASSIFIERS:
        parts = in_space(parts, aligner, space=bank.space, tower=bank.made.get("image_tower"))
    return words_of(parts, bank, steps=steps, resamples=resamples, seed=seed, own=own)


# --- what goes out ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Which answers a page has room for.

    Attributes:
        answers: Their numbers, question by question.
        questions: Of these: name, first and last place, and how many answers there were.
        mapped: Of each image, the places of answers that have heatmaps.
    """

    answers: tuple[int, ...]
    questions: tuple[tuple[str, range, int], ...]
    mapped: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, answers: Answers, scored: Scored, asked: Sequence[int], top: int) -> "Kept":
        """Choose the likeliest answers of any of the images, as many as there is room for."""
        total = scored.scores.total
        assert total is not None
        wanted = [set(asked) for _ in total]
        order = torch.empty_like(total)
        for question in answers.questions:
            columns = list(question.classes)
            order[:, columns] = (total[:, columns] * (answers.scale or 1.0)).log_softmax(1)
            most = len(columns) if len(columns) <= ALL else top
            for row, best in zip(wanted, total[:, columns].topk(min(most, len(columns))).indices.tolist(), strict=True):
                row |= {columns[place] for place in best}
        kept = _room(answers, scored, order.amax(0), set().union(*wanted))
        places = {number: place for place, number in enumerate(kept)}
        questions, first = [], 0
        for question in answers.questions:
            here = [number for number in kept if number in question.classes]
            questions.append((question.name, range(first, first + len(here)), len(question.classes)))
            first += len(here)
        return cls(tuple(kept), tuple(questions), tuple(tuple(sorted(places[n] for n in row)) for row in wanted))

    @property
    def whole(self) -> bool:
        """Whether that is all answers."""
        return len(self.answers) == sum(count for *_, count in self.questions)


def _room(answers: Answers, scored: Scored, order: Float[Tensor, "answer"], needed: set[int]) -> list[int]:
    """The numbers of the answers that are sent, in their order."""
    several = scored.substitute is not None and scored.substitute.shape[1] > 1
    each = len(scored.scores) * SCORE * BASE64 * (2 if several else 1)
    count = max(len(needed), int(FOR_SCORES / each))
    ranked = sorted(range(len(order)), key=lambda number: (number not in needed, -float(order[number])))
    return sorted(ranked[:count])


class _Maker:
    """Makes images of a page out of scores.

    Args:
        model: The model.
        answers: What images are scored with.
        scored: The scores of all images.
        kept: Which answers are sent.
    """

    def __init__(self, model: HookedViT, answers: Answers, scored: Scored, kept: Kept) -> None:
        self._model, self._answers, self._scored, self._kept = model, answers, scored, kept
        self._columns = list(kept.answers)
        self._rows = {label: row for row, label in enumerate(scored.scores.labels)}

    def shared(self) -> dict[str, Any]:
        """What all images have in common."""
        answers, substitute = self._answers, self._scored.substitute
        components = [
            {"label": one.label, "kind": one.kind, "layer": one.layer, "head": one.head}
            for one in self._scored.scores.components
        ]
        together = substitute is not None and substitute.shape[1] == 1
        return {
            "unit": answers.unit,
            "digits": answers.digits,
            "scale": answers.scale,
            "components": components,
            "answers": [[answers.short[number], answers.names[number]] for number in self._columns],
            "questions": [
                {"name": name, "first": places.start, "count": len(places), "of": of}
                for name, places, of in self._kept.questions
            ],
            "hasMean": substitute is not None,
            "substitute": fixed(substitute[:, 0, self._columns], SCORE) if together else None,  # type: ignore[index]
        }

    def image(self, number: int, photograph: Image.Image, image: Images, name: str) -> dict[str, Any]:
        """One image: what is to be seen, its scores, and its heatmaps."""
        scores, substitute = self._scored.scores, self._scored.substitute
        assert scores.total is not None
        several = substitute is not None and substitute.shape[1] > 1
        return {
            "name": name,
            "width": photograph.width,
            "height": photograph.height,
            "picture": picture(photograph),
            "totals": fixed(scores.total[number, self._columns], SCORE),
            "scores": fixed(scores.values[:, number, self._columns], SCORE),
            "substitute": fixed(substitute[:, number, self._columns], SCORE) if several else None,  # type: ignore[index]
            "maps": self._maps(number, photograph, image),
        }

    def _maps(self, number: int, photograph: Image.Image, image: Images) -> dict[str, Any]:
        """Heatmaps of the strongest components for each answer that has some, and of all others together."""
        mapped = self._kept.mapped[number]
        with torch.no_grad():
            tokens = self._answers.tokens(image, number, self._scored, [self._columns[place] for place in mapped]).cpu()
        first = PatchMaps(tokens)
        laid, labels = _laid(tokens, first.canvas)
        count = _how_many(laid)
        sizes = laid.abs().sum((2, 3))  # answer component
        best = sizes.topk(count, dim=1).indices.sort(1).values
        rest = laid.sum(1) - torch.stack([one[rows].sum(0) for one, rows in zip(laid, best, strict=True)])
        chosen = [torch.cat([one[rows], left[None]]) for one, rows, left in zip(laid, best, rest, strict=True)]
        rows = [self._rows[label] for label in labels]
        return {
            "rows": laid.shape[2],
            "columns": laid.shape[3],
            "seen": list(first.covered(self._model.preprocess_geometry(photograph), *image.shape[2:])),
            "answers": list(mapped),
            "components": [[rows[place] for place in places] for places in best.tolist()],
            "reading": rows,
            "values": fixed(torch.stack(chosen).flatten(2), MAP),
        }


def _laid(
    tokens: TokenAttribution, canvas: TokenGrid
) -> tuple[Float[Tensor, "answer component row column"], list[str]]:
    """Maps of all components that read patches, on one grid, and their labels."""
    laid = torch.cat([_on(canvas, block) for block in tokens.blocks])
    read = [row for row in range(len(tokens.labels)) if bool(laid[row].any())]
    return laid[read].transpose(0, 1), [tokens.labels[row] for row in read]


def _on(canvas: TokenGrid, block: TokenBlock) -> Float[Tensor, "component answer row column"]:
    """As `PatchMaps` lays one component of one direction: a token that stands for several patches is spread evenly."""
    return block.with_values(block.values.double()).laid_on(canvas)[:, 0]


def _how_many(laid: Float[Tensor, "answer component row column"]) -> int:
    """How many components have a map of their own."""
    answers, components, rows, columns = laid.shape
    room = FOR_MAPS / BASE64 / MAP / max(1, answers * rows * columns)
    return min(components, max(1, int(room) - 1))


# --- what is said of it -----------------------------------------------------------------------------------------


def _certificate(
    answers: Answers, scored: Scored, aligner: Aligner | None, count: int, reference: Images | None
) -> Iterator[tuple[str, str]]:
    """What was summed to what, and how nearly."""
    parts, dtype = scored.decomposed, str(scored.decomposed.values.dtype).removeprefix("torch.")
    kinds = Counter(one.kind for one in scored.scores.components)
    yield "Model", model_name(answers.model)
    if weights := parts.metadata.get("weights"):
        yield "Weights", f"hash {weights}"
    yield "Components", f"{len(scored.scores)}: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}"
    allowed = f"; allowed is {TOLERANCES[dtype]:.0e}" if dtype in TOLERANCES else ""
    gap = f"{float(scored.gap.max()):.1e}, the largest of {count} images ({dtype}{allowed})"
    yield "Gap", f"{gap}: how far the sum of contributions is from what the model computed"
    if parts.coverage is not None:
        yield "Coverage", str(parts.coverage)
    yield "Effect", "direct: the sum is edited, statistics of norms are frozen; later components do not react"
    yield "Reference", "none" if reference is None else f"{len(reference):,} images"
    if isinstance(answers, Texts):
        yield "Space of texts", answers.space
    if aligner is not None:
        yield "Aligner", _aligner(aligner)
    yield "Versions", ", ".join(_versions())


def _aligner(aligner: Aligner) -> str:
    known = aligner.fit_report
    how = "" if known is None else f", cosine distance {known.cosine_distance:.3f} over {len(known.distances):,} images"
    return f"{aligner.method or 'given'}{how}"


def _versions() -> Iterator[str]:
    for library in LIBRARIES:
        try:
            yield f"{library} {version(library)}"
        except PackageNotFoundError:
            continue


def _notes(answers: Answers, kept: Kept) -> Iterator[str]:
    """What is to be known of the page's numbers."""
    if not kept.whole:
        yield (
            f"{len(kept.answers):,} of {len(answers.names):,} answers are on this page: the likeliest for any of these "
            f"images. Probabilities are among them."
        )
    if answers.scale is None:
        yield "Texts have scores only: probabilities need the factor that similarities are multiplied by."
