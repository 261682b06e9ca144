"""Banks written for this package: what they hold is distinct, and can be read by the models it is for."""

import re

import open_clip
import pytest
import torch

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.banks import categories, general, paper_features, paper_waterbirds
from vitdecomp_lens.clip.texts import refuse_same_tokens
from vitdecomp_lens.testbed import banks
from vitdecomp_lens.testbed.models import build
from vitdecomp_lens.testbed.scenes import ATTRIBUTES
from vitdecomp_lens.testbed.vocabulary import tokenize


def test_the_general_bank_is_large_distinct_and_short():
    texts = general()
    assert len(texts) >= 3000
    assert len({text.casefold() for text in texts}) == len(texts)
    for text in texts:
        assert re.fullmatch(r"[A-Za-z0-9\"' -]+", text), text
        assert text == " ".join(text.split()), text
        assert len(text.split()) <= 10, text


def test_the_general_bank_is_always_the_same():
    assert general() == tuple(text for texts in categories().values() for text in texts)
    categories.cache_clear()
    before = general()
    categories.cache_clear()
    assert general() == before
    assert all(categories().values())


def test_the_general_bank_has_many_single_things():
    texts = general()
    things = [text for text in texts if re.fullmatch(r"an? [\w'-]+", text)]
    assert len(things) >= 700


def test_texts_of_the_general_bank_are_tokens_apart_and_fit_the_context():
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    tokens = tokenizer(list(general()))
    refuse_same_tokens(general(), tokens)
    assert not bool(tokens[:, 20:].any()), "there is room for any template"


def test_articles_are_as_spoken():
    silent = ("hour",)
    spoken = ("uni", "uk", "eu", "one", "use")
    for text in general():
        for article, word in re.findall(r"\b(an?) ([\w-]+)", text):
            vowel = word[0] in "aeiouAEIOU" and not word.lower().startswith(spoken)
            vowel = vowel or word.startswith((*silent, "X-"))
            assert (article == "an") == vowel, text
        assert not re.search(r"\ban? (an?|the|some) ", text), text


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("a man riding a bicycle", "actions"),
        ("a close-up of rusty metal", "camera"),
        ("striped fabric", "patterns"),
        ("a cat in a box", "relations"),
        ("the letter A", "writing"),
        ("a photo taken in Japan", "places"),
        ("the color turquoise", "colours"),
        ("a wooden bridge", "materials"),
        ("an oil painting of a horse", "style"),
    ],
)
def test_subjects_are_in_their_categories(text, category):
    assert text in categories()[category]


def test_what_does_not_go_together_is_not_said():
    texts = " | ".join(general())
    for nonsense in (
        "furry glass",
        "knitted marble",
        "child driving",
        "baby driving",
        "jungle in winter",
        "sliced cat",
    ):
        assert nonsense not in texts


def test_the_features_of_the_paper():
    features = paper_features()
    assert list(features) == ["colour", "texture", "animal", "person", "location", "pattern", "shape", "fabric"]
    assert [len(texts) for texts in features.values()] == [6, 7, 7, 7, 7, 5, 4, 5]
    assert features["colour"] == tuple(f"{c} color" for c in ("blue", "green", "red", "yellow", "black", "white"))
    assert features["pattern"][2] == "polka dot pattern"
    assert features["shape"][2:] == ("circular shape", "octagon")
    waterbirds = paper_waterbirds()
    assert {name: len(texts) for name, texts in waterbirds.items()} == {"spurious": 9, "core": 8}


def test_the_features_of_the_paper_are_a_bank_each():
    for texts in [*paper_features().values(), *paper_waterbirds().values()]:
        rows = torch.randn(len(texts), 16, generator=torch.Generator().manual_seed(0))
        assert TextBank(texts, rows, space="made up").subspace().shape == (len(texts), 16)


# --- of the testbed -----------------------------------------------------------------------------------------------


def test_every_value_has_a_text_that_names_it():
    features = banks.features()
    assert list(features) == [*ATTRIBUTES, "word"]
    for name, values in ATTRIBUTES.items():
        assert len(features[name]) == len(values)
        for value, text in zip(values, features[name], strict=True):
            assert value in text.split()
    assert features["word"][3] == f"an object with the word {ATTRIBUTES['shape'][3]}"


def test_the_testbed_knows_every_word_of_its_banks():
    texts = banks.general()
    refuse_same_tokens(texts, tokenize(texts))
    of_templates = [template.replace("{}", text) for template in banks.TEMPLATES for text in texts[:60]]
    assert len(tokenize(of_templates)) == len(of_templates)


def test_captions_are_distinct_varied_and_the_same_every_time():
    texts = banks.captions(300)
    assert len(set(texts)) == 300
    assert texts == banks.captions(300)
    assert len(set(texts) & set(banks.captions(300, seed=1))) < 100
    for values in ATTRIBUTES.values():
        for value in set(values) - {"solid", "plain"}:
            assert any(value in text.split() for text in texts), value


def test_the_bank_of_the_testbed():
    clip = build("clip").eval()
    bank = banks.text_bank(clip, centre=True)
    assert bank.texts == banks.general()
    assert "mean" in bank.made
    some = banks.text_bank(clip, banks.features()["shape"], templates=banks.TEMPLATES)
    wanted = TextBank.from_open_clip(clip, banks.features()["shape"], templates=banks.TEMPLATES, tokenizer=tokenize)
    assert torch.equal(some.directions, wanted.directions)
    assert some.subspace().shape == (8, 64)
