"""What components say of a classifier's classes, in their own space and after alignment, compared.

The protocol of arXiv 2406.01583 (section 4): TextSpan over the classifier's class vectors, of contributions in the
model's own space, says which classes a component tells apart. TextSpan over CLIP's embeddings of the class names, of
the aligned contributions, should say the same. `vitdecomp_lens.interpret.match_rate` compares the two.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.interpret.match_rate import MatchRate, match_rate
from vitdecomp_lens.interpret.text_span import text_span

__all__ = ["class_bank", "class_match", "class_vectors", "matched"]

STEPS = 10  # the paper's


def class_vectors(model: nn.Module) -> Float[Tensor, "class d_rep"] | None:
    """The rows of a classifier's weight: the directions of the representation that its logits are read along.

    Args:
        model: A model of timm, hooked or not.

    Returns:
        None where there is no classifier, or none that is a single linear map.
    """
    original: Any = model.original if isinstance(model, HookedViT) else model
    classifier = original.get_classifier() if hasattr(original, "get_classifier") else None
    if not isinstance(classifier, nn.Linear | nn.Conv2d) or classifier.weight[0, 0].numel() != 1:
        return None
    return classifier.weight.detach().flatten(1)


def class_bank(names: Sequence[str], bank: TextBank) -> TextBank:
    """The texts of classes under the classes' names.

    Args:
        names: One a class. Several classes may have the same name: of ImageNet's, two are called crane.
        bank: A text for each class, in their order; or, of names given once only, a text for each.

    Raises:
        InputError: Where there are neither as many texts as classes, nor as different names.
    """
    different = {name: row for row, name in enumerate(dict.fromkeys(names))}
    if len(bank) not in (len(names), len(different)):
        raise InputError(f"Expected a text for each of the {len(names)} classes; got a bank of {len(bank)}.")
    rows = list(range(len(names))) if len(bank) == len(names) else [different[name] for name in names]
    seen: dict[str, int] = {}
    texts = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        texts.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return TextBank(tuple(texts), bank.directions[rows], space=bank.space, made=bank.made)


def class_match(
    parts: Decomposition,
    aligner: Aligner,
    vectors: Float[Tensor, "class d_rep"],
    names: TextBank,
    *,
    steps: int = STEPS,
) -> MatchRate:
    """For each component, how many of the classes that it tells apart are still read from it after alignment.

    Args:
        parts: Contributions to images that had no part in the fit; complete.
        aligner: Of this model and cut.
        vectors: The classifier's, as `class_vectors` gives them.
        names: The class names in CLIP's space, in the order of the vectors.
        steps: How many classes a component; where there are fewer than twice as many classes, half of them, because a
            list of all classes has any other in it. The rate to expect by chance is told beside it.

    Raises:
        InputError: Where aligner, vectors or names do not fit the contributions or each other.

    Example:
        >>> import torch
        >>> from vitdecomp_lens.testbed.planted import planted_maps
        >>> planted = planted_maps(images=300, d_rep=24, d_clip=32, components=3)
        >>> aligner = Aligner.fit(planted.parts, planted.targets)
        >>> vectors = torch.randn(20, 24, generator=torch.Generator().manual_seed(0))
        >>> names = TextBank([f"class {n}" for n in range(20)], vectors @ planted.maps.sum(0), space="planted")
        >>> class_match(planted.parts, aligner, vectors, names, steps=5).chance
        tensor([0.2500, 0.2500, 0.2500])
    """
    d_rep = parts.values.shape[-1]
    if vectors.shape != (len(names), d_rep):
        raise InputError(
            f'Expected class vectors as Float[Tensor, "class d_rep"] of shape {(len(names), d_rep)}, a row for each '
            f"class name; got {tuple(vectors.shape)}."
        )
    aligner.refuse_other(parts, space=names.space)
    steps = min(steps, max(1, len(names) // 2))
    truth = TextBank(names.texts, vectors.detach().float(), space="the classifier's")
    return match_rate(
        text_span(parts, truth, steps=steps), text_span(parts.map(aligner), names, steps=steps), steps=steps
    )


def matched(aligner: Aligner, rate: MatchRate) -> Aligner:
    """The same aligner, whose report says the match rate.

    Raises:
        InputError: Where there is no report.
    """
    if aligner.fit_report is None:
        raise InputError("Expected an aligner that was fitted, with a report; this one has none.")
    report = replace(aligner.fit_report, match_rate=rate.mean, match_by_chance=rate.mean_chance)
    return replace(aligner, fit_report=report)
