"""The example of concept trees: its table of photographs, on vectors of which the answer is known."""

import importlib.util
from pathlib import Path

import pytest
import torch

import vitdecomp_lens
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.interpret.hierarchy import ConceptTree, decompose_by_concepts

PATH = Path(vitdecomp_lens.__file__).parent.parent / "examples" / "concept_tree.py"
TEXTS = ["cat", "dog", "car", "cup"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("concept_tree", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def case():
    """Images of two of each text, one of which is called by its neighbour's name, and one by a stranger's."""
    bank = TextBank(TEXTS, torch.eye(4, 6), space="planted")
    tree = ConceptTree.of({"animal": ["cat", "dog"], "thing": ["car", "cup"]})
    shown = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    classes = torch.tensor([0, 1, 1, 1, 2, 2, 3, 0])
    return torch.eye(4, 6)[shown] * 3 + 0.5, classes, tree, bank


def test_what_is_right_is_counted_level_by_level(example, case):
    vectors, classes, tree, bank = case
    for signs in ("any", "positive"):
        one, two = example.by_level(*case, signs)
        assert (one[0], two[0]) == (7 / 8, 6 / 8)
        found = decompose_by_concepts(vectors, tree, bank, reference=vectors, signs=signs)
        for level, names in ((one, ["animal"] * 4 + ["thing"] * 3 + ["animal"]), (two, [TEXTS[n] for n in classes])):
            shares = torch.stack([found.share(name)[0] for name in names])  # of each image's concept, in all images
            assert level[1] == pytest.approx(float(shares.diagonal().mean()))
            assert level[2] == pytest.approx(float(shares.mean()))
        assert two[3] == pytest.approx(float(found.remainder_share(2).mean()))


def test_the_table_has_a_row_a_level(example, case):
    lines = example.table(*case).splitlines()
    assert lines[0].startswith("| level | concepts | right, any signs | share | in all | remainder | right, positive")
    assert len({line.count("|") for line in lines}) == 1
    assert [line[:15] for line in lines[2:]] == ["| 1 | 2 | .875 ", "| 2 | 4 | .750 "]


def test_shares_are_told_without_their_zero(example):
    assert [example.told(share) for share in (0.0625, 1.0, -0.5)] == [".062", "1.000", "-.500"]
