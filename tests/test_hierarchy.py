"""A tree of concepts: every level sums to the vector, whatever the texts; trees that are none are refused."""

import itertools
import json

import pytest
import torch
from labelled_samples import as_users_run_it

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError
from vitdecomp_lens.interpret import hierarchy
from vitdecomp_lens.interpret.hierarchy import ConceptTree, decompose_by_concepts

NESTED = {
    "animal": {
        "texts": ["an animal", "a beast"],
        "children": {"dog": {"texts": ["a dog"], "children": ["a terrier", "a poodle"]}, "cat": None},
    },
    "artifact": {"vehicle": ["a car", "a ship"], "tool": "a hammer"},
    "sky": None,
}
TEXTS = ("an animal", "a beast", "a dog", "a terrier", "a poodle", "cat", "a car", "a ship", "a hammer", "sky")
WAYS = pytest.mark.parametrize(("signs", "ridge"), [("any", 0.0), ("any", 0.1), ("positive", 0.1)])


def bank_of(width, *, likeness=0.0, seed=0, texts=TEXTS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(texts), width, generator=generator, dtype=torch.float64)
    shared = torch.randn(width, generator=generator, dtype=torch.float64)
    return TextBank(texts, (rows + likeness * shared).to(dtype), space="here")


def parts_of(width, *, components=3, images=4, seed=1, dtype=torch.float64):
    values = torch.randn(components, images, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Decomposition(values.to(dtype), tuple(f"L0H{n}" for n in range(components)))


# --- sums -------------------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("width", [6, 10, 30])  # fewer dimensions than texts, as many, more
@pytest.mark.parametrize("likeness", [0.0, 20.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_parts_and_remainder_sum_at_every_level(signs, ridge, width, likeness, dtype, tolerance):
    tree, parts = ConceptTree.of(NESTED), parts_of(width, dtype=dtype)
    bank = bank_of(width, likeness=likeness, dtype=dtype)
    found = decompose_by_concepts(parts, tree, bank, signs=signs, ridge=ridge)
    size = max(1.0, float(found.amounts.abs().max()))
    for level in range(1, tree.depth + 1):
        whole = found.level(level).sum(0) + found.remainder(level)
        torch.testing.assert_close(whole, parts.values, atol=size * tolerance * 10, rtol=0)
    for name in tree.names:
        below = sum(found.part(child) for child in tree.children(name)) + found.own(name)
        torch.testing.assert_close(below, found.part(name), atol=size * tolerance * 10, rtol=0)
    assert found.vectors.dtype == dtype


@WAYS
def test_components_parts_sum_to_those_of_the_whole(signs, ridge):
    tree, parts, bank = ConceptTree.of(NESTED), parts_of(8), bank_of(8, likeness=1.0)
    apart = decompose_by_concepts(parts, tree, bank, signs=signs, ridge=ridge)
    together = decompose_by_concepts(parts.sum(), tree, bank, signs=signs, ridge=ridge)
    torch.testing.assert_close(apart.amounts.sum(0), together.amounts[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(apart.shares.sum(0), together.shares[0], atol=1e-10, rtol=0)


@WAYS
def test_shares_sum_to_one_and_are_those_of_the_parts(signs, ridge):
    tree, parts, bank = ConceptTree.of(NESTED), parts_of(8), bank_of(8, likeness=1.0)
    found = decompose_by_concepts(parts, tree, bank, signs=signs, ridge=ridge)
    squares = found.whole.square().sum(-1)
    for level in range(1, tree.depth + 1):
        shares = sum(found.share(name) for name in tree.level(level)) + found.remainder_share(level)
        torch.testing.assert_close(shares.sum(0), torch.ones_like(squares))
    for name in tree.names:
        torch.testing.assert_close(found.share(name), (found.part(name) * found.whole).sum(-1) / squares)


# --- what the split is ------------------------------------------------------------------------------------------------


def test_amounts_are_those_of_the_ridge_problem():
    """Against the normal equations over all texts, one amount each, penalised by how many texts its concept has."""
    tree, bank = ConceptTree.of(NESTED), bank_of(7, likeness=1.0)
    vectors = parts_of(7).values[0]
    found = decompose_by_concepts(vectors, tree, bank, ridge=0.3)
    counts = torch.bincount(found.owners)[found.owners].double()
    rows = found.directions
    noise = 0.3 * float((rows.square().sum(1) / counts).sum()) / 7
    oracle = torch.linalg.solve(rows @ rows.T + noise * torch.diag(counts), rows @ vectors.T).T
    torch.testing.assert_close(found.amounts[0], oracle, atol=1e-10, rtol=0)


def test_without_ridge_parts_are_what_fits_best_with_the_smallest_amounts():
    tree, bank = ConceptTree.of(dict.fromkeys(TEXTS)), bank_of(6)
    vectors = parts_of(6).values[0]
    found = decompose_by_concepts(vectors, tree, bank, ridge=0.0)
    smallest = torch.linalg.lstsq(bank.directions.T.contiguous(), vectors.T, driver="gelsd").solution.T
    torch.testing.assert_close(found.amounts[0], smallest, atol=1e-10, rtol=0)
    assert float(found.remainder().abs().max()) < 1e-10


def test_positive_amounts_meet_the_conditions_of_their_optimum():
    tree, bank = ConceptTree.of(dict.fromkeys(TEXTS)), bank_of(6, likeness=0.5)
    vectors = parts_of(6, images=20).values[0]
    found = decompose_by_concepts(vectors, tree, bank, signs="positive", ridge=0.1)
    noise = 0.1 * len(TEXTS) / 6
    amounts = found.amounts[0]
    slope = (vectors - amounts @ bank.directions) @ bank.directions.T - noise * amounts
    assert float(amounts.min()) >= -1e-12
    assert bool((amounts == 0).any())
    assert float(slope.max()) < 1e-9  # no text could have more
    assert float((slope * (amounts > 0)).abs().max()) < 1e-9  # nor another amount than it has


def test_amounts_that_do_not_settle_are_an_error(monkeypatch):
    tree, bank = ConceptTree.of(dict.fromkeys(TEXTS)), bank_of(6, likeness=0.5)
    monkeypatch.setattr(hierarchy, "_MOST", 1)
    with pytest.raises(InputError, match="after 1 steps they have not"):
        decompose_by_concepts(parts_of(6, images=20).values[0], tree, bank, signs="positive")


def test_siblings_in_another_order_have_the_same_parts():
    bank, vectors = bank_of(6, likeness=3.0), parts_of(6).values[0]
    several = []
    for order in itertools.permutations(NESTED):
        tree = ConceptTree.of({name: NESTED[name] for name in order})
        found = decompose_by_concepts(vectors, tree, bank)
        several.append(torch.stack([found.part(name) for name in sorted(tree.names)]))
    for other in several[1:]:
        torch.testing.assert_close(other, several[0], atol=1e-11, rtol=0)


def test_a_part_lies_in_the_span_of_its_own_texts_and_those_below():
    tree, bank = ConceptTree.of(NESTED), bank_of(30)
    found = decompose_by_concepts(parts_of(30), tree, bank)
    for name, texts in (("dog", TEXTS[2:5]), ("animal", TEXTS[:6]), ("vehicle", TEXTS[6:8]), ("sky", TEXTS[9:])):
        basis = bank.subspace(texts)
        part = found.part(name)
        torch.testing.assert_close(part @ basis.T @ basis, part, atol=1e-10, rtol=0)
        assert float(part.norm()) > 0.1


def test_a_part_splits_within_its_node_by_the_same_rule():
    tree, bank = ConceptTree.of(NESTED), bank_of(6, likeness=1.0)
    found = decompose_by_concepts(parts_of(6), tree, bank)

    def covariance(name):
        rows = found.directions[found.owners == tree.number(name)]
        return rows.T @ rows / len(rows) + sum(covariance(child) for child in tree.children(name))

    for name in ("animal", "dog", "artifact"):
        for child in tree.children(name):
            split = found.part(name) @ torch.linalg.pinv(covariance(name), rtol=1e-10) @ covariance(child)
            torch.testing.assert_close(split, found.part(child), atol=1e-8, rtol=0)


def test_a_name_said_in_several_texts_counts_once():
    once = bank_of(5, texts=("a dog", "a car"))
    twice = TextBank(("a dog", "the dog", "a car"), once.directions[[0, 0, 1]], space="here")
    vectors = parts_of(5).values[0]
    one = decompose_by_concepts(vectors, ConceptTree.of({"dog": "a dog", "car": "a car"}), once)
    two = decompose_by_concepts(
        vectors, ConceptTree.of({"dog": {"texts": ["a dog", "the dog"]}, "car": "a car"}), twice
    )
    torch.testing.assert_close(one.part("dog"), two.part("dog"), atol=1e-12, rtol=0)


def test_independent_concepts_are_told_apart():
    """Orthogonal texts: each part is the projection, shrunk by the ridge alone."""
    bank = TextBank(TEXTS, torch.eye(10, dtype=torch.float64), space="here")
    tree, vectors = ConceptTree.of(dict.fromkeys(TEXTS)), parts_of(10).values[0]
    found = decompose_by_concepts(vectors, tree, bank, ridge=0.25)
    torch.testing.assert_close(found.amounts[0], vectors / 1.25)
    torch.testing.assert_close(found.remainder()[0], vectors / 5)


@pytest.mark.parametrize("kind", ["tensor", "parts"])
def test_the_mean_of_a_reference_is_taken_off(kind):
    tree, bank, parts, others = ConceptTree.of(NESTED), bank_of(8), parts_of(8), parts_of(8, images=9, seed=5)
    given, reference = (parts, others) if kind == "parts" else (parts.sum(), others.sum())
    found = decompose_by_concepts(given, tree, bank, reference=reference)
    torch.testing.assert_close(found.whole, parts.sum() - others.sum().mean(0))


def test_a_zero_vector_has_no_shares():
    found = decompose_by_concepts(torch.zeros(1, 8), ConceptTree.of(NESTED), bank_of(8, dtype=torch.float32))
    assert float(found.shares.abs().max()) == 0
    assert float(found.remainder_share().abs().max()) == 0


# --- shown ------------------------------------------------------------------------------------------------------------


def test_a_tree_is_shown_with_what_matters():
    bank = TextBank(TEXTS, torch.eye(10, dtype=torch.float64), space="here")
    vector = torch.zeros(2, 10, dtype=torch.float64)
    vector[:, 2], vector[:, 3], vector[:, 9] = 3.0, 4.0, -5.0
    parts = Decomposition(vector[:, None], ("L0H0", "mlp.0"))
    found = decompose_by_concepts(parts, ConceptTree.of(NESTED), bank, ridge=0.0)
    assert (
        found.show()
        == str(found)
        == "\n".join(
            [
                "image 0: 100.0 % of the whole",
                "├─  50.0 % animal",
                "│  └─  50.0 % dog",
                "│     ├─  32.0 % a terrier",
                "│     └─  18.0 % (own)",
                "├─  50.0 % sky",
                "├─   0.0 % artifact",
                "└─   0.0 % (remainder)",
            ]
        )
    )
    assert found.show(component="mlp.0", levels=1).splitlines()[:2] == [
        "image 0, mlp.0: 50.0 % of the whole",
        "├─  25.0 % animal",
    ]
    with pytest.raises(InputError, match="image from 0 to 0; got 1"):
        found.show(1)
    with pytest.raises(UnknownNameError, match=r"mlp\.1"):
        found.show(component="mlp.1")


# --- trees ------------------------------------------------------------------------------------------------------------


def test_levels_refine_each_other():
    tree = ConceptTree.of(NESTED)
    assert tree.level(1) == ("animal", "artifact", "sky")
    assert tree.level(2) == ("dog", "cat", "vehicle", "tool", "sky")
    assert tree.level(3) == ("a terrier", "a poodle", "cat", "a car", "a ship", "tool", "sky")
    assert tree.path("a poodle") == ("animal", "dog", "a poodle")
    assert repr(tree) == "ConceptTree(11 concepts on 3 levels, 10 texts)"
    with pytest.raises(InputError, match="level from 1 to 3; got 4"):
        tree.level(4)
    with pytest.raises(UnknownNameError, match="did you mean 'dog'"):
        tree.number("dogs")


def test_a_tree_that_is_saved_and_loaded_is_the_same(tmp_path):
    tree = ConceptTree.of(NESTED)
    tree.save(tmp_path / "tree.json")
    assert ConceptTree.load(tmp_path / "tree.json") == tree
    (tmp_path / "nested.json").write_text(json.dumps(NESTED))
    assert ConceptTree.load(tmp_path / "nested.json") == tree


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ('{"concepts": [{"name": "a", "parent": "b"}, {"name": "b", "parent": "a"}]}', "'a' → 'b' → 'a'"),
        ('{"concepts": [{"name": "a", "parent": "a"}]}', "'a' → 'a'"),
        ('{"concepts": [{"name": "a"}, {"name": "a"}]}', "'a' is carried more than once: on the first level and on"),
        ('{"a": null, "x": null, "a": null}', "object with 'a', 'x', 'a' apart; 'a' is carried more than once"),
        ('{"a": {"c": null}, "b": {"c": null}}', "'c' is carried more than once: under 'a' and under 'b'. Leave all"),
        ('{"c": null, "b": {"c": null}}', "'c' is carried more than once: on the first level and under 'b'"),
        ('{"a": ["b", "b"]}', "'b' is carried more than once: under 'a' and under 'a'"),
        ('{"a": {"texts": ["b", "b"]}}', "texts of 'a' apart; 'b' is carried more than once. Leave all"),
        ('{"concepts": [{"name": "a", "parent": 5}]}', "that 'a' refines, or None for the first level; got 5"),
        ('{"concepts": [{"name": "a", "parent": ["b"]}]}', r"that 'a' refines, .* got \['b'\]"),
        ('{"concepts": [{"name": "a", "texts": 5}]}', "texts of 'a' as one text, or as a list of texts; got 5"),
        ('{"concepts": [{"name": "a", "texts": null}]}', "texts of 'a' as one text, or as a list of texts; got None"),
        ('{"a": {"texts": 5}}', "texts of 'a' as one text, or as a list of texts; got 5"),
        ('{"a": {"texts": {"b": null}}}', "texts of 'a' as one text, or as a list of texts; got {'b'"),
        ('{"a": {"texts": "b", "children": "c"}}', "under 'a' its children"),
        ('{"a": {"texts": "b", "children": 0}}', "under 'a' its children"),
        ('{"concepts": [{"name": "a", "parent": "b"}]}', "no concept 'b'"),
        ('{"concepts": [{"parent": "b"}]}', "concept 0 of the file"),
        ('{"a": 3}', "under 'a' its children"),
        ('{"a": {"texts": [" "]}}', "'a' has ' '"),
        ('{" ": null}', "concept 0 is called ' '"),
        ('{"concepts": []}', "at least one concept"),
        ("{}", "at least one concept"),
        ("[]", "JSON object"),
    ],
)
def test_a_file_that_holds_no_tree_is_refused(tmp_path, said, says):
    (tmp_path / "tree.json").write_text(said)
    with pytest.raises((InputError, UnknownNameError), match=says):
        ConceptTree.load(tmp_path / "tree.json")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "half.json").write_text('{"a": ')
    for name in ("half.json", "missing.json"):
        with pytest.raises(StoreError, match=name):
            ConceptTree.load(tmp_path / name)
    with pytest.raises(StoreError, match="Could not write"):
        ConceptTree.of(NESTED).save(tmp_path / "no folder" / "tree.json")


def test_children_may_be_called_what_fields_are():
    tree = ConceptTree.of({"a": {"children": {"texts": ["b", "c"]}}})
    assert (tree.names, tree.parents) == (("a", "texts", "b", "c"), (-1, 0, 1, 1))


def test_a_mapping_that_holds_itself_is_refused():
    circular = {"animal": {}}
    circular["animal"]["dog"] = circular
    with pytest.raises(InputError, match="holds itself"):
        ConceptTree.of(circular)


def test_arrays_that_are_no_tree_are_refused():
    with pytest.raises(InputError, match="after the one that it refines; 'a' stands at 0"):
        ConceptTree(("a", "b"), (1, -1), (("a",), ()))
    with pytest.raises(InputError, match="'a' has none"):
        ConceptTree(("a",), (-1,), ((),))
    with pytest.raises(InputError, match="a parent and texts for each"):
        ConceptTree(("a",), (), ())


# --- other bad input --------------------------------------------------------------------------------------------------


def test_all_texts_that_a_bank_lacks_are_named():
    with pytest.raises(UnknownNameError, match="lacks 3 of the tree's: 'a ship', 'a hammer', 'sky'"):
        decompose_by_concepts(parts_of(6), ConceptTree.of(NESTED), bank_of(6, texts=TEXTS[:7]))


def test_vectors_that_cannot_be_split_are_refused():
    tree, bank, parts = ConceptTree.of(NESTED), bank_of(6), parts_of(6)
    there = Decomposition(parts.values, parts.components, metadata={"space": "there"})
    with pytest.raises(InputError, match="'there', the texts of 'here'"):
        decompose_by_concepts(there, tree, bank)
    with pytest.raises(InputError, match="6 dimensions; got shape"):
        decompose_by_concepts(parts_of(7), tree, bank)
    with pytest.raises(InputError, match="at least one image"):
        decompose_by_concepts(torch.zeros(0, 6), tree, bank)
    for bad in (torch.nan, torch.inf):
        wrong = parts_of(6)
        wrong.values[1, 2, 3] = bad
        with pytest.raises(InputError, match="'L0H1' has NaN or Inf in image 2"):
            decompose_by_concepts(wrong, tree, bank)
        with pytest.raises(InputError, match="finite reference"):
            decompose_by_concepts(parts, tree, bank, reference=wrong)
    with pytest.raises(InputError, match="same kind"):
        decompose_by_concepts(parts, tree, bank, reference=parts.sum())
    with pytest.raises(UnknownNameError, match="L0H2"):
        decompose_by_concepts(parts, tree, bank, reference=parts.select(labels=["L0H0", "L0H1"]))
    with as_users_run_it(), pytest.raises(InputError, match="got shape"):
        decompose_by_concepts(parts.values, tree, bank)


def test_options_out_of_range_are_refused():
    tree, bank, parts = ConceptTree.of(NESTED), bank_of(6), parts_of(6)
    with as_users_run_it(), pytest.raises(InputError, match="'any', 'positive'; got 'sparse'"):
        decompose_by_concepts(parts, tree, bank, signs="sparse")
    for options in ({"ridge": -1.0}, {"ridge": float("nan")}, {"ridge": 0.0, "signs": "positive"}):
        with pytest.raises(InputError, match="ridge= of at least 0"):
            decompose_by_concepts(parts, tree, bank, **options)


def test_small_shares_are_named_on_the_first_level_and_where_one_is_alone():
    tree = ConceptTree.of({"thing": ["cup", "car", "key"], "animal": ["cat", "dog"], "sky": None})
    bank = TextBank(["cup", "car", "key", "cat", "dog", "sky"], torch.eye(6, dtype=torch.float64), space="planted")
    found = decompose_by_concepts(torch.tensor([[5.0, 1.0, 1.0, 5.0, 0.5, 1.0]]).double(), tree, bank, ridge=0.0)
    lines = [line.lstrip("│├└─ ") for line in found.show(threshold=0.05).splitlines()[1:]]
    names = [line.split(" % ")[1] for line in lines]
    assert [name for name in names if name != "(own)"] == [
        "thing", "cup", "(2 more)", "animal", "cat", "dog", "sky", "(remainder)",
    ]  # fmt: skip
    shares = {name: float(line.split(" % ")[0].replace("−", "-")) for name, line in zip(names, lines, strict=True)}
    assert shares["dog"] == pytest.approx(100 * float(found.share("dog").sum()), abs=0.05)
    assert shares["sky"] == pytest.approx(100 * float(found.share("sky").sum()), abs=0.05)
    assert max(shares["dog"], shares["sky"]) < 5
