"""Retrieval as a task: planted components are found without a miss, and nothing else along."""

from dataclasses import dataclass, field

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY

from vitdecomp_lens import HookedViT
from vitdecomp_lens.applications import retrieval
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.evaluation import retrieving
from vitdecomp_lens.evaluation.records import Results
from vitdecomp_lens.evaluation.retrieving import BY_IMAGE, BY_TEXT, CHANCE, CHOSEN, PROJECTED, RANDOM, WHOLE
from vitdecomp_lens.evaluation.subjects import Question, Splits, Subject
from vitdecomp_lens.interpret.features import score_features

VALUES = {"colour": ("red", "green", "blue"), "shape": ("round", "square", "long")}
WRITERS = {"L0H0": "shape", "L0H1": "shape", "L1H0": "colour", "L1H1": "shape"}
DIRECTIONS = torch.linalg.qr(torch.randn(16, 6, generator=torch.Generator().manual_seed(9))).Q.T
QUESTIONS = [Question(name, values, (0, 1, 2)) for name, values in VALUES.items()]


@dataclass(frozen=True, eq=False)
class Planted:
    """Images of a colour and a shape: contributions, with a constant and a component of noise."""

    seed: int
    size: int = 90
    labels: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self):
        chance = torch.Generator().manual_seed(self.seed)
        object.__setattr__(self, "labels", {name: torch.randint(3, (self.size,), generator=chance) for name in VALUES})

    def __len__(self):
        return self.size

    def batches(self, model):
        yield torch.randn(self.size, 3, 32, 32, generator=torch.Generator().manual_seed(self.seed))

    def masks(self, model, name="object"):
        raise AssertionError("there are none")

    @property
    def parts(self):
        noise = 0.02 * torch.randn(6, self.size, 16, generator=torch.Generator().manual_seed(100 + self.seed))
        rows = [*WRITERS, "mlp.0", "norm.bias"]
        noise[-1] = 0.5
        for row, name in enumerate(WRITERS.values()):
            noise[row] += DIRECTIONS[3 * list(VALUES).index(name) + self.labels[name]]
        return Decomposition(noise, tuple(rows), noise.sum(0), metadata={"space": "planted"})


def texts(several):
    known = [value for values in VALUES.values() for value in values]
    return TextBank(several, DIRECTIONS[[known.index(one) for one in several]], space="planted")


DATA = Splits(Planted(1), Planted(2), Planted(3))


@pytest.fixture(scope="module")
def subject():
    """Its model stands for a CLIP, which has only to embed images."""
    model = HookedViT(VisionTransformer(**{**TINY, "num_classes": 16}).eval().requires_grad_(False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieving, "contributions", lambda subject, samples: samples.parts)
        yield Subject("planted", model, texts)


@pytest.fixture(scope="module")
def found(subject):
    protocol = retrieving.RetrievalProtocol(queries=40, deep=20)
    return Results(tuple(retrieving.retrieved(subject, DATA, QUESTIONS, seed=0, protocol=protocol)), {})


def value(found, task, measure, method, of):
    (one,) = found.values(task=task, measure=measure, method=method, of=of)
    return one


def test_what_is_planted_is_found_by_image_and_nothing_else_along(found):
    for of in VALUES:
        assert value(found, BY_IMAGE, "precision at 10", CHOSEN, of) == 1
        assert value(found, BY_IMAGE, "components", CHOSEN, of) == 1  # one says it all
        assert abs(value(found, BY_IMAGE, "leakage", CHOSEN, of)) < 0.1
        assert value(found, BY_IMAGE, "precision at 10", PROJECTED, of) == 1
        assert value(found, BY_IMAGE, "precision at 10", RANDOM, of) < 0.9
        assert value(found, BY_IMAGE, "precision at 10", CHANCE, of) == pytest.approx(1 / 3, abs=0.1)
    assert value(found, BY_IMAGE, "precision at 10", WHOLE, "colour") < 0.99  # shapes are written thrice
    assert value(found, BY_IMAGE, "leakage", WHOLE, "colour") > 0.4


def test_what_is_planted_is_found_by_text(found):
    for of in VALUES:
        assert value(found, BY_TEXT, "precision at 10", CHOSEN, of) == 1
        assert value(found, BY_TEXT, "precision at 20", CHOSEN, of) == 1
        assert value(found, BY_TEXT, "precision at 10", RANDOM, of) < 0.9
        assert value(found, BY_TEXT, "Spearman's rho", "scores of components", of) > 0.5


def test_every_number_says_whose_it_is(found):
    assert found.names("model") == ("planted",)
    assert found.names("of") == tuple(VALUES)
    keys = [(r.task, r.measure, r.method, r.of) for r in found.records]
    assert len(set(keys)) == len(keys)
    (single,) = found.where(task=BY_IMAGE, measure="precision at 10", method=WHOLE, of="colour").records
    assert single.interval[0] <= single.value <= single.interval[1]


def test_the_papers_measure_is_against_the_clips_own_embeddings(subject, found):
    protocol = retrieving.RetrievalProtocol(queries=5, deep=20, random=1)
    records = tuple(retrieving.retrieved(subject, DATA, QUESTIONS, seed=0, clip=subject, protocol=protocol))
    bank = texts([value for values in VALUES.values() for value in values]).centred()
    banks = {name: bank.select(values) for name, values in VALUES.items()}
    parts = DATA.training.parts.select(labels=[*WRITERS, "mlp.0"])
    scores = score_features(parts, banks, bootstrap=0, permutations=0)
    (images,) = DATA.test.batches(subject.model)
    for embeddings, results in ((None, found), (subject.model(images), Results(records, {}))):
        expected = retrieval.text_agreement(DATA.test.parts, scores, banks, embeddings)
        assert results.values(measure="Spearman's rho") == pytest.approx(expected.spearman.tolist())
