"""Descriptions: phrases, the components that carry each exactly, the patches, and how much of a scene they tell."""

from dataclasses import replace

import pytest
import torch
from labelled_samples import as_users_run_it

from vitdecomp_lens import attribute_tokens, decompose, testbed
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.interpret.describing import describe
from vitdecomp_lens.testbed import banks
from vitdecomp_lens.testbed.describing import METHODS, attribute_recall, compare_descriptions, told
from vitdecomp_lens.testbed.models import build
from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scenes


def bank_of(count=40, width=12, *, seed=0):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TextBank([f"text {n}" for n in range(count)], rows, space="here")


def parts_of(width=12, *, components=5, images=6, seed=1):
    values = torch.randn(components, images, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Decomposition(values, tuple(f"L0H{n}" for n in range(components)))


# --- phrases and components -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_components_sum_to_the_amounts_and_these_fit_best(centred):
    bank, parts, others = bank_of(), parts_of(), parts_of(images=9, seed=3)
    reference = others if centred else None
    wholes = parts.sum() - (others.sum().mean(0) if centred else 0)
    for one, whole in zip(describe(parts, bank, reference=reference), wholes, strict=True):
        rows = bank.select(one.phrases).directions
        best = torch.linalg.lstsq(rows.T.contiguous(), whole[:, None]).solution[:, 0]
        torch.testing.assert_close(one.amounts, best, atol=1e-12, rtol=0)
        torch.testing.assert_close(one.by_component.sum(1), one.amounts, atol=1e-12, rtol=0)
        torch.testing.assert_close(one.shares, best * (rows @ whole) / whole.square().sum(), atol=1e-12, rtol=0)
        torch.testing.assert_close(one.shares.sum(), (best @ rows).square().sum() / whole.square().sum())
        assert len(one) == 5
        assert float(one.amounts.min()) > 0
        assert one.shares.tolist() == sorted(one.shares.tolist(), reverse=True)


def test_scores_along_the_directions_are_the_amounts():
    parts, others = parts_of(), parts_of(images=9, seed=3)
    for number, one in enumerate(describe(parts, bank_of(), reference=others)):
        scores = parts.images([number]).project(one.directions).values[:, 0].T
        torch.testing.assert_close(one.by_component + one.offsets, scores, atol=1e-12, rtol=0)
        means = Decomposition(others.values.mean(1, keepdim=True), others.components).project(one.directions)
        torch.testing.assert_close(one.offsets, means.values[:, 0].T, atol=1e-12, rtol=0)


def test_texts_that_an_image_is_made_of_are_found():
    bank = TextBank([f"text {n}" for n in range(12)], torch.eye(12, dtype=torch.float64), space="here")
    values = torch.zeros(2, 1, 12, dtype=torch.float64)
    values[0, 0, 3], values[1, 0, 7], values[1, 0, 5] = 2.0, 3.0, -4.0
    (one,) = describe(Decomposition(values, ("L0H0", "mlp.0")), bank)
    assert one.phrases == ("text 7", "text 3")
    assert one.top("text 7", 1) == (("mlp.0", 3.0),)
    assert one.shares.tolist() == [9 / 29, 4 / 29]
    assert str(one).splitlines() == [
        "image 0: 2 phrases for 45 %",
        "   31.0 %  text 7  (3.00: mlp.0 +3.00, L0H0 +0.00)",
        "   13.8 %  text 3  (2.00: L0H0 +2.00, mlp.0 +0.00)",
    ]


def test_the_first_phrase_of_all_is_the_nearest_text():
    bank, parts = bank_of(), parts_of()
    nearest = (parts.sum() @ bank.directions.T).argmax(1).tolist()
    assert [one.phrases for one in describe(parts, bank, phrases=1)] == [(bank.texts[n],) for n in nearest]


def test_an_image_that_no_text_agrees_with_has_no_phrases():
    bank = TextBank(["up"], torch.tensor([[1.0, 0.0]]), space="here")
    for vector in ([-1.0, 1.0], [0.0, 0.0]):
        (one,) = describe(Decomposition(torch.tensor([[vector]]), ("L0H0",)), bank)
        assert (len(one), one.directions.shape, one.by_component.shape) == (0, (0, 2), (0, 1))
        assert "nothing" in repr(one)


# --- patches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen():
    """An untrained CLIP's contributions to three scenes, in double precision, and a bank of its space."""
    from vitdecomp_lens import HookedViT

    model = HookedViT(build("clip").double().eval())
    images = testbed.normalised(Scenes("test", size=3).images(range(3))).double()
    return model, images, decompose(model, images, by="head"), bank_of(30, 64)


def test_patches_are_those_that_carry_most(seen):
    model, images, parts, bank = seen
    one = describe(parts, bank, phrases=3)[1]
    tokens = attribute_tokens(model, images, one.directions, by="head")
    described = one.with_patches(tokens, k=4)
    (block,) = tokens.blocks
    scores = block.values[:, 1, len(block.grid.prefix) :].sum(0)
    for row, patches in enumerate(described.patches):
        best = scores[:, row].topk(4)
        assert [patch.amount for patch in patches] == pytest.approx(best.values.tolist())
        names = [block.grid.names[len(block.grid.prefix) + n] for n in best.indices.tolist()]
        assert [patch.name for patch in patches] == names
    alone = one.with_patches(tokens.images([1]), k=4)
    assert alone.patches == described.patches
    assert f"at {described.patches[0][0].name}" in str(described)
    assert one.patches is None


def test_scores_along_all_texts_give_the_same_patches(seen):
    model, images, parts, bank = seen
    tokens = attribute_tokens(model, images, bank.directions, by="head")
    for number, one in enumerate(describe(parts, bank, tokens, phrases=3, reference=parts)):
        own = attribute_tokens(model, images[number : number + 1], one.directions, by="head")
        for mine, other in zip(one.patches, one.with_patches(own).patches, strict=True):
            assert [patch.name for patch in mine] == [patch.name for patch in other]
            assert [patch.amount for patch in mine] == pytest.approx([patch.amount for patch in other])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
def test_patches_and_what_is_beside_them_sum_to_the_amounts(seen, centred, averaged):
    model, images, parts, bank = seen
    number = 1
    one = describe(parts, bank, phrases=3, reference=parts if centred else None)[number]
    tokens = attribute_tokens(model, images, one.directions, by="head")
    reference = None
    if centred:
        reference = mean_of(tokens) if averaged else tokens
    described = one.with_patches(tokens, reference=reference, k=1000)
    count = tokens.grid.rows * tokens.grid.columns
    assert [len(patches) for patches in described.patches] == [count] * 3
    sums = torch.tensor([sum(patch.amount for patch in patches) for patches in described.patches], dtype=torch.float64)
    torch.testing.assert_close(sums + described.beside_patches, one.amounts, atol=1e-12, rtol=0)
    prefix = len(tokens.grid.prefix)
    scores = tokens.values.sum(0)[:, prefix:] - (tokens.values.sum(0)[:, prefix:].mean(0) if centred else 0)
    for row, patches in enumerate(described.patches):
        amounts = {patch.name: patch.amount for patch in patches}
        assert [amounts[name] for name in tokens.grid.names[prefix:]] == pytest.approx(scores[number, :, row].tolist())
    if centred:  # without the reference's scores, the mean is in
        whole = one.with_patches(tokens, k=1000)
        sums = torch.tensor([sum(patch.amount for patch in of) for of in whole.patches], dtype=torch.float64)
        torch.testing.assert_close(sums + whole.beside_patches, one.amounts + one.offsets.sum(1), atol=1e-12, rtol=0)
        assert whole.patches != described.patches


def mean_of(tokens):
    """Scores averaged over images, as those of one image."""
    blocks = tuple(block.with_values(block.values.mean(1, keepdim=True)) for block in tokens.blocks)
    untokened = replace(tokens.untokened, values=tokens.untokened.values.mean(1, keepdim=True))
    return replace(tokens, blocks=blocks, untokened=untokened, total=None)


def test_patches_are_those_of_the_descriptions_components(seen):
    """Of some components, and with a constant of an aligner, which the scores may lack."""
    model, images, parts, bank = seen
    some = parts.select(labels=["L2H1", "mlp.3", "embed"])
    bias = torch.randn(64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    values = torch.cat([some.values, bias.expand(1, 3, 64)])
    (one,) = describe(Decomposition(values, (*some.components, "aligner.bias")).images([0]), bank, phrases=2)
    tokens = attribute_tokens(model, images[:1], one.directions, by="head")
    described = one.with_patches(tokens, k=1000)
    sums = torch.tensor([sum(patch.amount for patch in of) for of in described.patches], dtype=torch.float64)
    torch.testing.assert_close(sums + described.beside_patches, one.amounts, atol=1e-12, rtol=0)
    with pytest.raises(InputError, match=r"'mlp\.3' is missing"):
        one.with_patches(tokens.select(labels=["L2H1", "embed"]))


def test_a_reference_of_something_else_is_refused(seen):
    model, images, parts, bank = seen
    plain, centred = (describe(parts, bank, phrases=2, reference=of)[0] for of in (None, parts))
    tokens = attribute_tokens(model, images, centred.directions, by="head")
    with pytest.raises(InputError, match="all images of the description's reference"):
        centred.with_patches(tokens, reference=tokens.images([0]))
    scores = attribute_tokens(model, images, plain.directions, by="head")
    with pytest.raises(InputError, match="the description has none"):
        plain.with_patches(scores, reference=scores)
    (block,) = tokens.blocks
    turned = replace(block, grid=replace(block.grid, image_size=(1, 1)))
    with pytest.raises(InputError, match="by the same tokens"):
        centred.with_patches(tokens, reference=replace(tokens, blocks=(turned,)))


def test_scores_of_something_else_are_refused(seen):
    model, images, parts, bank = seen
    first, second, third = describe(parts, bank, phrases=3)
    tokens = attribute_tokens(model, images, second.directions, by="head")
    with pytest.raises(InputError, match="are off by"):
        third.with_patches(tokens)
    with pytest.raises(InputError, match="are off by"):
        second.with_patches(tokens.images([0]))
    with pytest.raises(InputError, match="3 directions; got 30"):
        first.with_patches(attribute_tokens(model, images, bank.directions, by="head"))
    with pytest.raises(InputError, match="batch with image 2; got 2"):
        third.with_patches(tokens.images([0, 1]))
    with pytest.raises(InputError, match="k= of at least 1"):
        second.with_patches(tokens, k=0)
    with pytest.raises(InputError, match="30 texts of the bank"):
        describe(parts, bank, tokens)
    strange = replace(second, components=tuple(f"L7H{n}" for n in range(len(second.components))))
    with pytest.raises(InputError, match="scores of the description's components"):
        strange.with_patches(tokens)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    bank, parts = bank_of(), parts_of()
    with pytest.raises(InputError, match="phrases= of at least 1; got 0"):
        describe(parts, bank, phrases=0)
    with pytest.raises(InputError, match="12 dimensions; got shape"):
        describe(parts_of(11), bank)
    there = Decomposition(parts.values, parts.components, metadata={"space": "there"})
    with pytest.raises(InputError, match="'there', the texts of 'here'"):
        describe(there, bank)
    wrong = parts_of()
    wrong.values[2, 4, 0] = torch.nan
    for given, reference in ((wrong, None), (parts, wrong)):
        with pytest.raises(InputError, match="'L0H2' have NaN or Inf in image 4"):
            describe(given, bank, reference=reference)
    with pytest.raises(UnknownNameError, match="L0H0"):
        describe(parts, bank, reference=parts.select(labels=["L0H1"]))
    with pytest.raises(UnknownNameError, match="no phrase 'a text'"):
        describe(parts, bank)[0].top("a text")
    with as_users_run_it(), pytest.raises(InputError, match="got Tensor, TextBank"):
        describe(parts.values, bank)


# --- attribute recall -------------------------------------------------------------------------------------------------


def test_captions_tell_what_is_true_and_nothing_else():
    scenes = Scenes("test", size=200)
    found = attribute_recall([[caption] for caption in scenes.captions(range(200))], scenes)
    assert found.precision == 1
    assert 0.3 < found.recall < 1


def test_recall_counts_scenes_and_precision_what_is_told():
    scenes = Scenes("test", size=4)
    true = [scene.attributes for scene in scenes.scenes(range(4))]
    other = next(value for value in ATTRIBUTES["colour"] if value != true[3]["colour"])
    said = [
        [f"a {true[0]['colour']} {true[0]['shape']}", f"a {true[0]['colour']} thing"],
        [],
        ["a thing with the word circle"],
        [f"a {other} object"],
    ]
    found = attribute_recall(said, scenes)
    assert found.by_attribute == {**dict.fromkeys(ATTRIBUTES, 0.0), "colour": 0.25, "shape": 0.25}
    assert found.precision == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="got 1, 4"):
        attribute_recall([[]], scenes)


def test_every_value_is_told_by_its_text():
    for attribute, texts in banks.features().items():
        if attribute != "word":
            assert [told(text) for text in texts] == [{(attribute, value)} for value in ATTRIBUTES[attribute]]


def test_the_comparison_has_every_method():
    clip = testbed.load_original("clip")
    bank = banks.text_bank(clip, sum(testbed.banks.features().values(), ()))
    found = compare_descriptions(clip, bank, phrases=5, size=100)
    assert tuple(found) == METHODS
    assert max(one.recall for name, one in found.items() if name != "random") > 2 * found["random"].recall
