"""Retrieval: what is found, and how good that is; planted truth is found without a miss."""

import importlib.util
import sys

import pytest
import torch
from labelled_samples import as_users_run_it

from vitdecomp_lens import decompose, testbed
from vitdecomp_lens.applications import retrieval
from vitdecomp_lens.applications.retrieval import Gallery, by_image, by_text, gallery
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError
from vitdecomp_lens.interpret.features import score_features
from vitdecomp_lens.testbed import banks
from vitdecomp_lens.testbed.planted import planted_features

VALUES = {"colour": ("red", "green", "blue"), "shape": ("round", "square", "long")}
WRITERS = {"colour": ("L0H1", "L1H0"), "shape": ("L0H0", "L0H2", "L1H1")}


def planted(images=120, *, seed=0, noise=0.02):
    """Images of a colour and a shape; two components write the colour, three, and more loudly, the shape."""
    chance = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(16, 6, generator=torch.Generator().manual_seed(9))).Q.T
    banks = {
        name: TextBank(values, directions[3 * n : 3 * n + 3], space="planted")
        for n, (name, values) in enumerate(VALUES.items())
    }
    labels = {name: torch.randint(3, (images,), generator=chance) for name in VALUES}
    heads = [f"L{layer}H{head}" for layer in range(2) for head in range(3)]
    values = noise * torch.randn(len(heads), images, 16, generator=chance)
    for name, writers in WRITERS.items():
        for label in writers:
            values[heads.index(label)] += (1 if name == "colour" else 3) * banks[name].directions[labels[name]]
    parts = Decomposition(values, tuple(heads), values.sum(0), metadata={"space": "planted"})
    return parts, banks, labels


def scores_of(parts, banks):
    return score_features(parts, banks, bootstrap=0, permutations=0)


# ---- planted truth


def test_a_planted_property_is_found_without_a_miss_and_without_the_other():
    parts, banks, labels = planted()
    choice = retrieval.choose_count(parts, scores_of(parts, banks), "colour", labels["colour"], counts=(1, 2, 4, 6))
    assert set(choice.components) <= set(WRITERS["colour"])
    test, _, labels = planted(seed=1)
    found = by_image(Gallery.of(test, components=choice.components))
    whole = by_image(Gallery.of(test))
    assert retrieval.precision_at(found, labels["colour"]).mean == 1
    assert retrieval.precision_at(whole, labels["colour"]).mean < 1
    leaks = [retrieval.leakage(one, labels, sought="colour") for one in (found, whole)]
    assert abs(leaks[0].mean_excess) < 0.1
    assert leaks[1].mean_excess > 0.5
    assert leaks[0].shares["shape"].chance == pytest.approx(1 / 3, abs=0.05)


def test_the_number_of_components_is_that_of_the_best_precision_and_the_smallest_of_equals():
    parts, banks, labels = planted()
    choice = retrieval.choose_count(parts, scores_of(parts, banks), "colour", labels["colour"], counts=(6, 2, 1, 99))
    assert list(choice.tried) == [1, 2, 6]
    assert choice.count == 1  # one writer says it all
    assert choice.tried[2].mean == 1 > choice.whole.mean
    assert choice.tried[6].mean == pytest.approx(choice.whole.mean)


def test_texts_find_planted_images_without_a_miss():
    parts, banks, labels = planted()
    for name, bank in banks.items():
        found = by_text(Gallery.of(parts, components=WRITERS[name]), bank, k=10)
        assert retrieval.precision_at(found, labels[name], list(range(3))).mean == 1


def test_a_text_ranks_images_by_how_much_of_it_they_have():
    made = planted_features(images=80, d_clip=16, features=3, noise=0.0, dtype=torch.float64)
    bank = TextBank(["a", "b", "c"], made.directions, space="planted")
    for number, text in enumerate(bank.texts):
        writers = [row for row, weight in zip(made.parts.labels, made.weights[:, number], strict=True) if weight > 0]
        found = by_text(Gallery.of(made.parts, components=writers), bank.select(text), k=80)
        assert torch.equal(found.rows[0], made.factors[:, number].argsort(descending=True))


def test_scores_agree_with_what_planted_components_say():
    made = planted_features(images=4000, d_clip=16, components=20, features=3, sparse=False, dtype=torch.float64)
    bank = TextBank(["a", "b", "c"], made.directions, space="planted")
    features = {name: bank.select(name) for name in bank.texts}
    held_out = planted_features(
        images=4000, d_clip=16, components=20, features=3, sparse=False, draw=1, dtype=torch.float64
    )
    agreement = retrieval.text_agreement(held_out.parts, scores_of(made.parts, features), features, similarity="dot")
    assert agreement.spearman.min() > 0.95
    turned = retrieval.text_agreement(
        held_out.parts, scores_of(made.parts, features), features, -held_out.parts.total, similarity="dot"
    )
    torch.testing.assert_close(turned.spearman, -agreement.spearman)
    whole = held_out.parts.total @ made.directions.T
    one = torch.corrcoef(torch.stack([held_out.parts["L1H2"] @ made.directions[1], whole[:, 1]]))[0, 1]
    assert float(agreement.correlation[agreement.labels.index("L1H2"), 1]) == pytest.approx(float(one))


# ---- searching


def brute(vectors, queries, similarity):
    if similarity == "cosine":
        vectors, queries = (one / one.norm(dim=1, keepdim=True) for one in (vectors, queries))
    return queries @ vectors.T


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_an_exact_search_is_a_full_sort(monkeypatch, similarity, block):
    monkeypatch.setattr(gallery, "BLOCK", block)
    chance = torch.Generator().manual_seed(0)
    vectors, queries = (torch.randn(n, 5, generator=chance, dtype=torch.float64) for n in (40, 6))
    if similarity == "dot":  # whole numbers, of which products are exact, and many are equal: the first come first
        vectors, queries = vectors.round(), queries.round()
    found = Gallery([f"i{n}" for n in range(40)], vectors).search(queries, 12, similarity=similarity)
    scores, order = brute(vectors, queries, similarity).sort(descending=True, stable=True)
    torch.testing.assert_close(found.scores, scores[:, :12])
    assert torch.equal(found.rows, order[:, :12])


def test_of_equal_images_the_first_are_found_whatever_the_blocks(monkeypatch):
    many = Gallery([str(n) for n in range(50)], torch.ones(50, 3))
    for block in (1, 8, 100):
        monkeypatch.setattr(gallery, "BLOCK", block)
        assert many.search(torch.ones(1, 3), 4).rows.tolist() == [[0, 1, 2, 3]]


def test_no_image_is_found_for_itself_and_references_may_be_others():
    parts, _, labels = planted()
    whole = Gallery.of(parts, ids=[f"scene {n}" for n in range(120)])
    found = by_image(whole, k=119)
    assert not (found.rows == torch.arange(120)[:, None]).any()
    assert found.rows.shape == (120, 119)
    again = by_image(whole, ["scene 3"], k=5)["scene 3"]
    assert [one for one, _ in again] == [one for one, _ in found["scene 3"][:5]]
    other, _, other_labels = planted(seed=1)
    asked = by_image(whole, Gallery.of(other, ids=[f"query {n}" for n in range(120)]), k=1)
    assert retrieval.precision_at(asked, labels["shape"], other_labels["shape"]).mean == 1


def test_one_reference_is_one_id():
    gallery = Gallery(["a", "b", "ab"], torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]))
    assert by_image(gallery, "ab", k=1).queries == ("ab",)
    assert by_image(gallery, "ab", k=1)["ab"][0][0] == "a"


def test_batches_make_the_same_gallery():
    parts, _, _ = planted()
    pieces = (parts.images(slice(first, first + 50)) for first in (0, 50, 100))
    one, other = Gallery.of(parts, components=["L0H1"]), Gallery.of(pieces, components=["L0H1"])
    assert torch.equal(one.vectors, other.vectors)
    assert (one.ids, one.space) == (other.ids, other.space)


def test_a_gallery_comes_back_from_its_file(tmp_path):
    one = Gallery.of(planted()[0], components=["L0H1"])
    one.save(tmp_path / "gallery")
    back = Gallery.load(tmp_path / "gallery")
    assert torch.equal(back.vectors, one.vectors)
    assert (back.ids, back.space, back.components, back.index) == (one.ids, one.space, one.components, one.index)
    (tmp_path / "gallery").write_bytes((tmp_path / "gallery").read_bytes()[:-9])
    with pytest.raises(StoreError):
        Gallery.load(tmp_path / "gallery")


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs faiss-cpu")
@pytest.mark.parametrize("index", ["faiss", "faiss:IVF4,Flat"])
def test_an_index_of_faiss_finds_what_an_exact_search_finds(index):
    parts, _, labels = planted(400)
    exact, quick = (Gallery.of(parts, components=WRITERS["colour"], index=one) for one in ("exact", index))
    for similarity in ("cosine", "dot"):
        found, approximate = (by_image(one, k=7, similarity=similarity) for one in (exact, quick))
        assert not (approximate.rows == torch.arange(400)[:, None]).any()
        if index == "faiss":
            torch.testing.assert_close(approximate.scores, found.scores)
        assert retrieval.precision_at(approximate, labels["colour"]).mean > 0.99


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs faiss-cpu")
def test_an_index_that_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="faiss makes no index 'Nonsense'"):
        Gallery(["a", "b"], torch.eye(2), index="faiss:Nonsense").search(torch.eye(2), 1)


def test_without_faiss_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match="pip install faiss-cpu"):
        Gallery(["a", "b"], torch.eye(2), index="faiss").search(torch.eye(2), 1)


# ---- measures


def test_precision_and_its_base_rate_by_hand():
    line = Gallery(["a", "b", "c", "d"], torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.1, 1.0], [0.0, 1.0]]))
    found = by_image(line, k=2)
    precision = retrieval.precision_at(found, ["x", "x", "x", "y"])
    assert precision.values.tolist() == [1.0, 1.0, 0.5, 0.0]
    assert precision.base.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0])
    assert retrieval.precision_at(found, ["x", "x", "x", "y"], k=1).values.tolist() == [1, 1, 0, 0]
    low, high = precision.interval()
    assert low <= precision.mean <= high


def test_the_vectors_of_all_components_are_the_total():
    parts, _, _ = planted()
    torch.testing.assert_close(retrieval.vectors(parts, parts.labels), retrieval.vectors(parts))
    assert torch.equal(retrieval.vectors(parts), parts.total)


def test_the_testbeds_clip_finds_colours_by_text():
    scenes = testbed.Scenes("test", size=64)
    images = testbed.normalised(scenes.images(range(64)))
    clip = testbed.load_original("clip")
    bank = banks.text_bank(clip, banks.features()["colour"], templates=banks.TEMPLATES[:2])
    parts = decompose(testbed.load("clip"), images, by="layer")
    found = by_text(Gallery.of(parts), bank, k=3)
    precision = retrieval.precision_at(found, scenes.labels("colour", range(64)), list(range(len(bank))))
    assert precision.mean > 0.8 > 3 * precision.chance


# ---- what cannot be


CASES = {
    "an empty gallery": (lambda p, b, y: Gallery([], torch.zeros(0, 3)), InputError, "this one is empty"),
    "no batches": (lambda p, b, y: Gallery.of(iter(())), InputError, "this one is empty"),
    "ids twice": (lambda p, b, y: Gallery(["a", "a"], torch.eye(2)), InputError, "carried more than once"),
    "ids that do not fit": (lambda p, b, y: Gallery(["a"], torch.eye(2)), InputError, "an id for each of the 2"),
    "NaN": (lambda p, b, y: Gallery(["a", "b"], torch.tensor([[0.0], [torch.nan]])), InputError, "that of 'b' is not"),
    "another index": (lambda p, b, y: Gallery(["a"], torch.ones(1, 1), index="annoy"), InputError, "index='exact'"),
    "another space": (
        lambda p, b, y: by_text(Gallery.of(p), TextBank(["a"], torch.ones(1, 16), space="other")),
        InputError,
        "Expected the space of this gallery, 'planted'; got 'other'",
    ),
    "another width": (
        lambda p, b, y: by_text(Gallery.of(p), TextBank(["a"], torch.ones(1, 8), space="planted")),
        InputError,
        "the gallery's width, 16; got 8",
    ),
    "other components": (
        lambda p, b, y: by_image(Gallery.of(p), Gallery.of(p, components=["L0H1"])),
        InputError,
        "references of the gallery's components",
    ),
    "no components": (lambda p, b, y: Gallery.of(p, components=[]), InputError, "at least one component"),
    "an unknown component": (lambda p, b, y: Gallery.of(p, components=["L7H7"]), UnknownNameError, "L7H7"),
    "an unknown image": (lambda p, b, y: by_image(Gallery.of(p), ["x"]), UnknownNameError, "no image 'x'"),
    "no k": (lambda p, b, y: by_image(Gallery.of(p), k=0), InputError, "k= of at least 1"),
    "one image alone": (lambda p, b, y: by_image(Gallery.of(p.images([0]))), InputError, "got k=10 and 0 images"),
    "too few labels": (
        lambda p, b, y: retrieval.precision_at(by_image(Gallery.of(p)), y["colour"][:-1]),
        InputError,
        "a label for each image of the gallery, 120 of them; got 119",
    ),
    "an unknown label": (
        lambda p, b, y: retrieval.precision_at(
            by_text(Gallery.of(p), b["colour"]), ["red"] * 120, ["red", "pink", "red"]
        ),
        UnknownNameError,
        "No image of the gallery has the label 'pink'",
    ),
    "an unknown attribute": (
        lambda p, b, y: retrieval.leakage(by_image(Gallery.of(p)), y, sought="size"),
        UnknownNameError,
        "no labels of 'size'",
    ),
    "no labels of queries": (
        lambda p, b, y: retrieval.precision_at(by_text(Gallery.of(p), b["colour"]), y["colour"]),
        UnknownNameError,
        "Pass query_labels=",
    ),
    "an unknown feature": (
        lambda p, b, y: retrieval.choose_count(p, scores_of(p, b), "size", y["colour"]),
        UnknownNameError,
        "no feature 'size'",
    ),
    "no counts": (
        lambda p, b, y: retrieval.choose_count(p, scores_of(p, b), "colour", y["colour"], counts=()),
        InputError,
        "counts= of at least 1",
    ),
}


@pytest.mark.parametrize("case", CASES)
@as_users_run_it()
def test_what_cannot_be_is_refused(case):
    call, error, message = CASES[case]
    with pytest.raises(error) as caught:
        call(*planted())
    assert message in str(caught.value)
