"""Texts that no component carries: what is measured along them means nothing, and is said to.

`vitdecomp_lens.applications.heatmap.Carried` says what is measured; here an image counts as one patch, since scores by
image are what is retrieved, ranked and repaired by.
"""

from collections.abc import Iterator, Mapping, Sequence

from vitdecomp_lens.applications.heatmap.carried import LEVEL, Carried, Spread
from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.cumulative import can_be_ablated
from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.evaluation.records import Record, Results
from vitdecomp_lens.evaluation.subjects import Samples, Subject, contributions
from vitdecomp_lens.interpret.statistics import permutations
from vitdecomp_lens.token_block import TokenBlock
from vitdecomp_lens.tokens import TokenAttribution

__all__ = ["TASK", "carried", "lacking"]

TASK = "texts"
DRAWS = 200
WHOLE = TokenGrid(1, 1, (1, 1))


def carried(subject: Subject, samples: Samples, asked: Mapping[str, Sequence[str]]) -> Iterator[Record]:
    """Whether any component carries each text more than random texts.

    Args:
        subject: With random texts, of which at most 200 are drawn. All texts are read less the mean of these.
        samples: Images.
        asked: Texts, by what they are asked for.

    Yields:
        For each text its ``strength``, the ``null`` below which 95 % of the random texts' stay, and ``p``.

    Raises:
        InputError: Where there are fewer than 19 random texts that are not asked for.
    """
    texts = tuple(dict.fromkeys(text for several in asked.values() for text in several))
    found = _held(subject, samples, texts)
    numbers = {"strength": found.strength, "null": found.null, "p": found.p}
    for name, several in asked.items():
        for text in dict.fromkeys(several):
            for measure, values in numbers.items():
                yield Record(TASK, measure, subject.name, name, 0, float(values[texts.index(text)]), of=text)


def _held(subject: Subject, samples: Samples, texts: tuple[str, ...]) -> Carried:
    others = [text for text in subject.random if text not in texts]
    drawn = [others[row] for row in permutations(len(others), 1, 0)[0, :DRAWS].tolist()] if others else []
    directions = subject.texts([*texts, *drawn]).directions
    directions = directions - directions[len(texts) :].mean(0)
    parts = subject.in_words(contributions(subject, samples))
    parts = parts.select(labels=[one.label for one in parts.components if can_be_ablated(one)])
    values = parts.values @ directions.T.to(parts.values)
    block = TokenBlock(values[:, :, None], parts.components, WHOLE)
    spread = Spread()
    spread.add(TokenAttribution((block,), Attribution(values[:0], ()), complete=False))
    return spread.carried(texts)


def lacking(results: Results) -> Iterator[str]:
    """Sentences: which texts no component carries more than random ones, and the null's level."""
    found = results.where(task=TASK)
    for model in found.names("model"):
        several = found.where(model=model)
        texts = several.names("of")
        # One text may be asked for by several tasks, of other images.
        known = {(one.method, one.of, one.measure): one.value for one in several.records}
        told = {
            f"{text!r} ({known[name, text, 'strength']:.1f}; 95 % of random texts stay below "
            f"{known[name, text, 'null']:.1f}, p = {p:.2g})": text
            for (name, text, measure), p in known.items()
            if measure == "p" and p > 1 - LEVEL
        }
        if told:
            count = len(set(told.values()))
            yield (
                f"{model}: no component carries {count} of {len(texts)} texts more than random texts, and what is "
                f"measured along them means nothing: {'; '.join(told)}."
            )
        else:
            yield f"{model}: each of {len(texts)} texts is carried by some component more than random texts."
