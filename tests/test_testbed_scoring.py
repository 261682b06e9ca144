"""The evaluation of scores on the testbed: against scikit-learn, SciPy, the package's own scores, and planted truth."""

import json
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from vitdecomp_lens import decompose
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.alignment import Aligner
from vitdecomp_lens.decomposition import Attribution, Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.interpret.causal import effects_table
from vitdecomp_lens.interpret.features import score_features
from vitdecomp_lens.intervene import ablating
from vitdecomp_lens.testbed import ATTRIBUTES, scoring
from vitdecomp_lens.testbed.models import build
from vitdecomp_lens.testbed.planted import planted_features
from vitdecomp_lens.testbed.scoring import BASELINES, BY_FEATURE, SCORES, TRUTHS, World, agreements, look, numbers, seen

LABELS = ("embed", "L0H0", "L0H1", "mlp.0", "L1H0")
WIDTHS = {"colour": 2, "size": 3}
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def banks(d_clip):
    """Texts that are not orthogonal, so that bases differ from them."""
    made = {}
    for number, (name, width) in enumerate(WIDTHS.items()):
        rows = normal(width, d_clip, seed=number) + 1
        made[name] = TextBank([f"{name} {n}" for n in range(width)], rows, space="some")
    return made


def random_case(images=30, d_clip=7):
    """Contributions, effects of ablating them, CLIP's embeddings, labels; the first component is a constant."""
    values = normal(len(LABELS), images, d_clip) * torch.tensor([0, 1, 3, 0.5, 1])[:, None, None] + 2
    parts = Decomposition(values, LABELS, values.sum(0))
    direct = parts.project(scoring.bases_of(banks(d_clip)))
    changes = -direct.values + normal(*direct.values.shape, seed=5)
    effects = Attribution(changes, LABELS, direct.total, complete=False, metadata={"effect": "total"})
    labels = torch.stack([torch.arange(images) % 2, torch.arange(images) % 3], -1)
    return parts, direct, effects, parts.total + normal(images, d_clip, seed=6), labels


def known_of(case):
    parts, _, effects, targets, labels = case
    return seen(parts, effects, banks(parts.values.shape[-1]), targets, labels, parts, labels)


def equal_weights(images):
    return torch.full((1, images), 1 / images, dtype=torch.float64)


def test_probes_are_those_of_scikit_learn():
    fitted, values = normal(3, 90, 5), normal(3, 40, 5, seed=1)
    labels = torch.arange(90) ** 2 % 5  # 0, 1 and 4
    fitted[:, labels == 4] += normal(3, 1, 5, seed=2)
    fitted[:, labels == 1] -= 0.5
    found = scoring.predicted(fitted, labels, values, shrinkage=0.2)
    for row in range(3):
        oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(fitted[row].numpy(), labels.numpy())
        np.testing.assert_array_equal(found[row], oracle.predict(values[row].numpy()))
    assert set(found.unique().tolist()) == {0, 1, 4}


def test_a_probe_of_a_constant_says_what_is_most_frequent():
    labels = torch.tensor([2, 0, 2, 2, 1, 0])
    constant = torch.ones(1, 1, 4, dtype=torch.float64)
    found = scoring.predicted(constant.expand(1, 6, 4), labels, constant.expand(1, 3, 4))
    assert found.tolist() == [[2, 2, 2]]


def test_numbers_are_those_of_the_package_and_of_numpy():
    case = random_case()
    parts, direct, effects, targets, _ = case
    found = numbers(known_of(case), equal_weights(30))
    scores = score_features(parts, banks(7), bootstrap=0, permutations=0)
    torch.testing.assert_close(found["correlation"][0], scores.correlation, **EXACT)
    torch.testing.assert_close(found["covariance"][0], scores.covariance / scores.total, **EXACT)
    torch.testing.assert_close(found["variance along texts"][0], scores.variance / scores.total, **EXACT)
    torch.testing.assert_close(found["variance"][0, :, 0], scores.spread, **EXACT)
    torch.testing.assert_close(found["norm"][0, :, 1], parts.values.norm(dim=-1).mean(1), **EXACT)
    start = 0
    for column, (name, width) in enumerate(WIDTHS.items()):
        which = slice(start, start + width)
        pair = [Attribution(a.values[..., which], LABELS, a.total[:, which], metadata=a.metadata) for a in case[1:3]]
        table = effects_table(*pair, resamples=0)
        torch.testing.assert_close(found["total effect"][0, :, column], table.total[0] / table.variance, **EXACT)
        size = effects.values[..., which].var(1, correction=0).sum(-1) / table.variance
        torch.testing.assert_close(found["size of effect"][0, :, column], size, **EXACT)
        texts = banks(7)[name].directions
        for row, values in enumerate(parts.values[1:], start=1):
            cosines = torch.nn.functional.cosine_similarity(values[:, None], texts, dim=-1)
            clips = torch.nn.functional.cosine_similarity(targets[:, None], texts, dim=-1)
            alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(cosines.T, clips.T, strict=True)]
            assert float(found["CLIP"][0, row, column]) == pytest.approx(np.mean(alike), abs=1e-12)
        start += width
    assert direct.values.shape[-1] == start


def test_probes_are_of_what_components_write():
    case = random_case()
    found = numbers(known_of(case), equal_weights(30))["probe"][0]
    parts, labels = case[0].values, case[-1]
    for column in range(2):
        told = scoring.predicted(parts, labels[:, column], parts)
        torch.testing.assert_close(found[:, column], (told == labels[:, column]).double().mean(1))
    assert float(found[0, 1]) == pytest.approx(1 / 3)  # the constant's
    assert float(found[1:].min()) > 0.4


def test_weights_are_as_many_of_an_image():
    parts, _, effects, targets, labels = random_case()
    counts = torch.randint(4, (30,), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(30).repeat_interleave(counts)
    made = banks(7)
    weighted = numbers(seen(parts, effects, made, targets, labels, parts, labels), counts[None] / counts.sum().double())
    again = seen(parts.images(rows), effects.images(rows), made, targets[rows], labels[rows], parts, labels)
    repeated = numbers(again, equal_weights(len(rows)))
    for name, values in weighted.items():
        torch.testing.assert_close(values, repeated[name], msg=name, **EXACT)


def test_a_constant_scores_nothing():
    found = numbers(known_of(random_case()), equal_weights(30))
    for name in ("correlation", "covariance", "variance along texts", "variance", "CLIP"):
        assert not found[name][:, 0].any(), name


def test_agreement_is_spearmans():
    known = known_of(random_case())
    found, of = agreements(known, resamples=8), numbers(known, equal_weights(30))
    assert set(found) == {*TRUTHS, BY_FEATURE}
    for truth in TRUTHS:
        for order in (*SCORES, "variance", "norm"):
            for column in range(2):
                oracle = scipy.stats.spearmanr(of[order][0, :, column], of[truth][0, :, column]).statistic
                assert float(found[truth][order][0, column]) == pytest.approx(oracle, abs=1e-12)
        random = found[truth]["random"]
        torch.testing.assert_close(random[0], random[1:].mean(0), atol=1 / 8, rtol=0)
    over = [scipy.stats.spearmanr(of["covariance"][0, row], of["CLIP"][0, row]).statistic for row in range(1, 5)]
    assert float(found[BY_FEATURE]["covariance"][0, 0]) == pytest.approx(np.mean(over))


def planted_case(images=1500):
    """Components that write known amounts of features, and do nothing else: without one, its share is missing."""
    planted, others = (planted_features(images=images, d_clip=16, draw=d, dtype=torch.float64) for d in (0, 1))
    names = [f"feature {number}" for number in range(planted.directions.shape[0])]
    made = {
        name: TextBank([name], row[None], space="planted") for name, row in zip(names, planted.directions, strict=True)
    }
    direct = planted.parts.project(planted.directions)
    effects = Attribution(-direct.values, direct.components, direct.total, complete=False)
    labels, other_labels = ((p.factors > 0).long() for p in (planted, others))
    known = seen(planted.parts, effects, made, planted.parts.total, labels, others.parts, other_labels)
    return planted, known


def test_planted_weights_are_found():
    planted, known = planted_case()
    of = numbers(known, equal_weights(1500))
    for column, weights in enumerate(planted.weights.T):
        writes = weights > 0
        for name in ("correlation", "covariance", "total effect"):
            found = scipy.stats.spearmanr(of[name][0, writes, column], weights[writes]).statistic
            assert found >= 0.95, (name, column)
    # Accuracies of large weights are near each other; they are comparable across features, which all vary alike.
    writes = planted.weights > 0
    assert scipy.stats.spearmanr(of["probe"][0][writes], planted.weights[writes]).statistic >= 0.95
    found = agreements(known, resamples=20)
    for score in SCORES:
        assert float(found["total effect"][score][0].min()) > 0.95
        assert float(found["total effect"][score][0].mean() - found["total effect"]["norm"][0].mean()) > 0.3
    torch.testing.assert_close(found["total effect"]["covariance"], torch.ones_like(found["CLIP"]["covariance"]))


def test_intervals_are_around_the_number():
    samples = torch.tensor([0.5, 0.2, 0.4], dtype=torch.float64)
    value, low, high = scoring.told(samples)
    assert value == 0.5
    assert high - value == pytest.approx(value - low) == pytest.approx(1.96 * np.std([0.2, 0.4], ddof=1))
    assert scoring.told(samples[:1]) == (0.5, 0.5, 0.5)


def agreed(value, *, columns=6):
    """Agreements that are all one, but for the orders that know nothing."""
    samples = {order: torch.zeros(4, columns, dtype=torch.float64) for order in (*SCORES, *BASELINES)}
    samples["correlation"] += value + torch.tensor([0.0, 0.01, -0.01, 0.0])[:, None]
    return {truth: {order: s.clone() for order, s in samples.items()} for truth in TRUTHS} | {
        BY_FEATURE: {"correlation": samples["correlation"][:, :1]}
    }


def test_tables_say_who_wins_and_who_loses():
    found = {"clip": agreed(0.5), "deit": agreed(-0.25)}
    lines = scoring.summary(found).splitlines()
    assert lines[0] == "| total effect | clip | deit | all |"
    assert lines[2] == "| correlation | .50 [.48, .52] | -.25 [-.27, -.23] | .12 [.11, .14] |"
    duel = scoring.duels(found).splitlines()[2]
    assert duel.startswith("| total effect: correlation | .12 [.11, .14]; 6 : 6 of 12 |")
    details = scoring.details(found, "correlation").splitlines()
    assert details[0] == "| correlation and total effect | clip | deit |"
    assert details[2] == "| shape | .50 [.48, .52] | -.25 [-.27, -.23] |"
    said = scoring.as_json(found)
    assert list(said["deit"]["probe"]["correlation"]) == list(ATTRIBUTES)
    assert said["deit"]["probe"]["correlation"]["size"][0] == -0.25
    assert list(said["clip"][BY_FEATURE]["correlation"]) == ["all"]


def test_nothing_to_evaluate_is_refused():
    for names, seeds in (([], 1), (["clip"], 0)):
        with pytest.raises(InputError, match="at least one model"):
            scoring.evaluate(names, seeds=seeds)


@pytest.fixture(scope="module")
def world():
    return World.drawn(images=20)


def test_a_model_is_run_without_each_component(world):
    model = HookedViT(build("deit", seed=1).eval())
    parts = decompose(model, world.images)
    maps = Aligner.fit(parts, world.targets, method="unconstrained")
    found = look(model, world, maps=maps)
    labels = [component.label for component in found.components]
    assert labels == [component.label for component in parts.components if component.kind != "constant"]
    bases = scoring.bases_of(world.banks)
    aligned = parts.map(maps)
    clean = aligned.total @ bases.T
    torch.testing.assert_close(found.whole[0], (clean - clean.mean(0)).double(), rtol=0, atol=1e-4)
    own = aligned.select(labels=labels).project(bases).values
    torch.testing.assert_close(found.own, (own - own.mean(1, keepdim=True)).double(), rtol=0, atol=1e-4)
    with ablating(model, world.images, components=["mlp.1"], reference=world.others):
        removed = clean - decompose(model, world.images).map(maps).total @ bases.T
    expected = (removed - removed.mean(0)).double()
    torch.testing.assert_close(found.removed[labels.index("mlp.1")], expected, rtol=0, atol=1e-4)
    assert float(expected.abs().max()) > 1e-2
    heads = found.of_kind("head")
    assert [c.kind for c in heads.components] == ["head"] * 16
    torch.testing.assert_close(heads.hits, found.hits[[row for row, label in enumerate(labels) if "H" in label]])


def test_the_command_prints_tables_and_writes_numbers(tmp_path, monkeypatch, capsys):
    arguments = ["--models", "clip", "--seeds", "1", "--images", "20", "--resamples", "5", "--json"]
    monkeypatch.setattr(sys, "argv", ["scoring", *arguments, str(tmp_path / "found.json")])
    scoring.main()
    printed = capsys.readouterr().out
    for title in ("**all components**", "**heads**", "| total effect | clip | all |", "| better than |"):
        assert title in printed
    said = json.loads((tmp_path / "found.json").read_text())
    assert list(said) == ["all components", "heads"]
    for agreed in said.values():
        assert list(agreed["clip"]) == [*TRUTHS, BY_FEATURE]
        values = agreed["clip"]["total effect"]["covariance"]
        assert all(low < value < high for value, low, high in values.values())
        mean = f"{np.mean([value for value, _, _ in values.values()]):.2f}".replace("0.", ".", 1)
        assert f"| covariance | {mean} [" in printed
    assert said["heads"] != said["all components"]
