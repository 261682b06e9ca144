"""Text banks: directions are what CLIP's zero-shot recipe gives, and bad ones are refused."""

import open_clip
import pytest
import torch
from labelled_samples import as_users_run_it
from torch import nn

from vitdecomp_lens import Decomposition
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.clip.templates import SIMPLE, imagenet
from vitdecomp_lens.clip.text_embedding import embedded, space_of
from vitdecomp_lens.errors import InputError, StoreError, UnknownNameError, UnsupportedModelError, VitDecompWarning
from vitdecomp_lens.testbed.models import build
from vitdecomp_lens.testbed.vocabulary import tokenize

TEXTS = ("a red star", "a blue ring", "a striped heart", "an object on sand", "a small thing at the left")
TEMPLATES = ("{}", "a picture of {}", "we see {}")


def perturbed(model, *, seed=0):
    """No parameter at its initial value: biases of zero and gains of one would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def clip_of_the_testbed(*, seed=0):
    return perturbed(build("clip").eval(), seed=seed)


def small_clip(*, custom=False, vocab_size=49408, quick_gelu=False, **text):
    """A CLIP of open_clip's that reads the vocabulary of CLIP's tokenizer."""
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(image_size=16, patch_size=8, width=16, layers=1, head_width=8)
    reads = open_clip.CLIPTextCfg(context_length=77, vocab_size=vocab_size, width=16, heads=2, layers=1, **text)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return kind(embed_dim=8, vision_cfg=vision, text_cfg=reads, quick_gelu=quick_gelu)


def bank_of(texts, *, d_clip=12, seed=0, dtype=torch.float64, space="made up"):
    rows = torch.randn(len(texts), d_clip, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return TextBank(texts, rows, space=space)


def bank(*, seed=0, dtype=torch.float64):
    return bank_of(TEXTS, seed=seed, dtype=dtype)


class Counted:
    """Counts the prompts that a model embeds."""

    def __init__(self, clip, monkeypatch):
        self.prompts, original = 0, clip.encode_text

        def encode_text(tokens, *args, **kwargs):
            self.prompts += len(tokens)
            return original(tokens, *args, **kwargs)

        monkeypatch.setattr(clip, "encode_text", encode_text)


# --- the recipe ---------------------------------------------------------------------------------------------------


def by_hand(clip, texts, templates, tokenizer):
    """One prompt at a time."""
    rows = []
    for text in texts:
        total = 0
        for template in templates:
            embedding = clip.encode_text(tokenizer([template.format(text)]))[0].detach()
            total = total + embedding / embedding.pow(2).sum().sqrt()
        mean = total / len(templates)
        rows.append(mean / mean.pow(2).sum().sqrt())
    return torch.stack(rows)


def test_directions_are_what_the_zero_shot_recipe_gives():
    clip = clip_of_the_testbed().double()
    wanted = by_hand(clip, TEXTS, TEMPLATES, tokenize)
    found = embedded(clip, TEXTS, templates=TEMPLATES, tokenizer=tokenize, batch_size=4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    found = TextBank.from_open_clip(clip, TEXTS, templates=TEMPLATES, tokenizer=tokenize)
    assert found.directions.dtype == torch.float32
    torch.testing.assert_close(found.directions.double(), wanted, rtol=0, atol=1e-7)
    # Averaging before or after normalising is not the same, nor are the templates idle.
    other = embedded(clip, TEXTS, templates=("{}",), tokenizer=tokenize)
    assert float((other - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("custom", [False, True])
def test_a_model_with_the_vocabulary_of_clip_needs_no_tokenizer(custom):
    clip = perturbed(small_clip(custom=custom)).eval().double()
    texts = ("a cat", "A photo of {braces}", "café")
    wanted = by_hand(clip, texts, ("{}", "this is {}."), open_clip.get_tokenizer("ViT-B-32"))
    found = TextBank.from_open_clip(clip, texts, templates=("{}", "this is {}."))
    torch.testing.assert_close(found.directions.double(), wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_size_of_batches_changes_nothing(batch_size):
    clip = clip_of_the_testbed().double()
    found = embedded(clip, TEXTS, templates=TEMPLATES, tokenizer=tokenize, batch_size=batch_size)
    torch.testing.assert_close(found, by_hand(clip, TEXTS, TEMPLATES, tokenize), rtol=0, atol=1e-13)


def test_progress_counts_prompts():
    told = []
    TextBank.from_open_clip(
        clip_of_the_testbed(),
        TEXTS,
        templates=TEMPLATES,
        tokenizer=tokenize,
        batch_size=6,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(6, 15), (12, 15), (15, 15)]


def test_the_model_is_left_as_it_was():
    clip = clip_of_the_testbed().train()
    clip.visual.eval()
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    modes = [module.training for module in clip.modules()]
    found = TextBank.from_open_clip(clip, TEXTS, tokenizer=tokenize)
    assert [module.training for module in clip.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in clip.parameters())
    assert not found.directions.requires_grad


def test_half_precision_runs_in_half_and_gives_float32():
    clip = clip_of_the_testbed().bfloat16()
    found = TextBank.from_open_clip(clip, TEXTS, tokenizer=tokenize)
    assert found.directions.dtype == torch.float32
    wanted = by_hand(clip, TEXTS, ("{}",), tokenize).float()
    assert float((found.directions - wanted).abs().max()) < 0.02


def test_what_was_made_how_is_remembered():
    clip = clip_of_the_testbed()
    found = TextBank.from_open_clip(clip, TEXTS, templates="a picture of {}", tokenizer=tokenize)
    assert found.made["templates"] == ["a picture of {}"]
    assert found.made["model"] == "CLIP"
    assert "length 1" in found.made["normalisation"]
    assert found.space == space_of(clip)
    named = TextBank.from_open_clip(clip, TEXTS, tokenizer=tokenize, space="mine")
    assert (named.space, named.made["templates"], named.made["model"]) == ("mine", ["{}"], "CLIP")
    assert "space='mine': templates=1)" in repr(named)
    assert "centred" in repr(named.centred())


# --- spaces -------------------------------------------------------------------------------------------------------


def test_a_space_is_its_weights_on_any_device_and_in_any_dtype_that_holds_them():
    clip = build("clip")
    name = space_of(clip)
    assert name == space_of(build("clip").train()) == space_of(build("clip").double())
    halved = build("clip").half()
    assert space_of(halved) != name
    assert space_of(halved) == space_of(build("clip").half().float())


@pytest.mark.parametrize("name", [name for name, _ in build("clip").named_parameters()])
def test_every_weight_but_those_of_logits_makes_another_space(name):
    clip = build("clip")
    before = space_of(clip)
    with torch.no_grad():
        clip.get_parameter(name).view(-1)[-1] += 1
    assert (space_of(clip) == before) == (name in ("logit_scale", "logit_bias"))


def test_weights_that_change_places_make_another_space():
    clip = build("clip")
    before = space_of(clip)
    with torch.no_grad():
        clip.text_projection.copy_(clip.text_projection.flip(0))
    assert space_of(clip) != before


def test_another_activation_function_makes_another_space():
    plain, quick = small_clip(), small_clip(quick_gelu=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), quick.parameters(), strict=True))
    assert space_of(plain) != space_of(quick)


def test_another_space_is_refused():
    clip, other = clip_of_the_testbed(), clip_of_the_testbed(seed=1)
    found = TextBank.from_open_clip(clip, TEXTS, tokenizer=tokenize)
    found.check_space(space_of(clip))
    with pytest.raises(InputError, match=r"Expected the space of this bank, 'CLIP-64-.*'; got 'CLIP-64-.*embed"):
        found.check_space(space_of(other))


# --- the cache ----------------------------------------------------------------------------------------------------


def test_what_was_embedded_before_is_read(tmp_path, monkeypatch):
    clip, options = clip_of_the_testbed(), {"tokenizer": tokenize, "cache": tmp_path / "new" / "folder"}
    plain = TextBank.from_open_clip(clip, TEXTS, templates=TEMPLATES, tokenizer=tokenize)
    first = TextBank.from_open_clip(clip, TEXTS, templates=TEMPLATES, **options)
    counted = Counted(clip, monkeypatch)
    again = TextBank.from_open_clip(clip, TEXTS, templates=TEMPLATES, batch_size=2, **options)
    centred = TextBank.from_open_clip(clip, TEXTS, templates=TEMPLATES, centre=True, **options)
    assert counted.prompts == 0
    assert torch.equal(first.directions, plain.directions)
    assert torch.equal(again.directions, first.directions)
    assert (again.texts, again.space, again.made) == (first.texts, first.space, first.made)
    assert torch.equal(centred.directions, first.centred().directions)
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 1


def test_what_is_not_the_same_is_embedded(tmp_path, monkeypatch):
    clip = clip_of_the_testbed()
    counted = Counted(clip, monkeypatch)

    def prompts(texts, templates, tokenizer=tokenize, **options):
        counted.prompts = 0
        TextBank.from_open_clip(clip, texts, templates=templates, tokenizer=tokenizer, cache=tmp_path, **options)
        return counted.prompts

    assert prompts(TEXTS, ("{}",)) == 5
    assert prompts(TEXTS, ("{}",)) == 0
    assert prompts(TEXTS[::-1], ("{}",)) == 5
    assert prompts(TEXTS, TEMPLATES) == 15
    assert prompts(TEXTS, ("{}",), lambda texts: tokenize([f"this is {text}" for text in texts])) == 5
    assert prompts(TEXTS, ("{}",), space="mine") == 5
    with torch.no_grad():
        clip.text_projection.mul_(torch.linspace(0.5, 1, 64))
    assert prompts(TEXTS, ("{}",)) == 5
    assert prompts(TEXTS, ("{}",), space="mine") == 5, "a name does not stand for weights"


@pytest.mark.parametrize("damage", [lambda found: found[:-9], lambda found: found[:-1] + b"?", lambda _: b"nothing"])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    clip, options = clip_of_the_testbed(), {"tokenizer": tokenize, "cache": tmp_path}
    wanted = TextBank.from_open_clip(clip, TEXTS, **options)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(VitDecompWarning, match=r"embedded again: .*damaged"):
        found = TextBank.from_open_clip(clip, TEXTS, **options)
    assert torch.equal(found.directions, wanted.directions)
    assert torch.equal(TextBank.load(file).directions, wanted.directions)


def test_a_file_of_the_cache_with_other_texts_is_made_again(tmp_path):
    clip, options = clip_of_the_testbed(), {"tokenizer": tokenize, "cache": tmp_path}
    wanted = TextBank.from_open_clip(clip, TEXTS, **options)
    (file,) = tmp_path.iterdir()
    bank().save(file)
    with pytest.warns(VitDecompWarning, match="is named for them and holds others"):
        found = TextBank.from_open_clip(clip, TEXTS, **options)
    assert torch.equal(found.directions, wanted.directions)


def test_a_cache_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Expected cache= as a folder"):
        TextBank.from_open_clip(clip_of_the_testbed(), TEXTS, tokenizer=tokenize, cache=tmp_path / "file")


# --- subspaces ----------------------------------------------------------------------------------------------------


def test_the_order_of_texts_only_orders_the_basis():
    found = bank()
    basis = found.subspace()
    order = [3, 0, 4, 2, 1]
    other = found.select([TEXTS[row] for row in order]).subspace()
    torch.testing.assert_close(basis @ basis.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(other, basis[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(other.T @ other, basis.T @ basis, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.subspace([TEXTS[row] for row in order]), other)


def test_the_basis_spans_the_texts_and_is_the_nearest_to_them():
    found = bank()
    basis = found.subspace()
    torch.testing.assert_close(found.directions @ basis.T @ basis, found.directions, rtol=0, atol=1e-12)
    # (B Bᵀ)^(-1/2) B, through the eigenvalues of the Gram matrix
    values, vectors = torch.linalg.eigh(found.directions @ found.directions.T)
    wanted = vectors @ torch.diag(values.rsqrt()) @ vectors.T @ found.directions
    torch.testing.assert_close(basis, wanted, rtol=0, atol=1e-12)
    distance = (basis - found.directions).square().sum()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        skew = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        turned = torch.linalg.matrix_exp(0.3 * (skew - skew.T)) @ basis
        assert float((turned - found.directions).square().sum()) > float(distance)


def deficient():
    rows = bank().directions.clone()
    rows[4] = rows[0] - 2 * rows[1]
    return TextBank(TEXTS, rows, space="made up")


def test_texts_that_span_less_get_principal_axes_and_a_warning():
    found = deficient()
    with pytest.warns(VitDecompWarning, match="5 texts span 4 dimensions"):
        basis = found.subspace()
    with pytest.warns(VitDecompWarning, match="5 texts span 4 dimensions"):
        other = found.select(TEXTS[::-1]).subspace()
    torch.testing.assert_close(basis @ basis.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.directions @ basis.T @ basis, found.directions, rtol=0, atol=1e-12)
    torch.testing.assert_close(other, basis, rtol=0, atol=1e-12)
    assert bool((basis.amax(1) == basis.abs().amax(1)).all()), "a sign that the order of texts does not decide"
    moments = basis @ found.directions.T @ found.directions @ basis.T
    torch.testing.assert_close(moments, moments.diagonal().sort(descending=True).values.diag(), rtol=0, atol=1e-12)


def test_more_texts_than_dimensions_span_all_of_them():
    texts = [f"text {number}" for number in range(30)]
    with pytest.warns(VitDecompWarning, match="30 texts span 12 dimensions"):
        basis = bank_of(texts).subspace()
    torch.testing.assert_close(basis.T @ basis, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_tolerance_says_what_counts_as_the_same():
    rows = bank().directions.clone()
    rows[4] = rows[0] + 1e-3 * rows[4]
    found = TextBank(TEXTS, rows, space="made up")
    assert len(found.subspace()) == 5
    with pytest.warns(VitDecompWarning, match="span 4"):
        assert len(found.subspace(tolerance=0.01)) == 4
    with pytest.raises(InputError, match=r"Expected a tolerance from 0 to below 1; got -0\.1"):
        found.subspace(tolerance=-0.1)


def test_subspaces_follow_the_dtype_and_serve_projections():
    basis = bank(dtype=torch.float32).subspace(TEXTS[0])
    assert basis.dtype == torch.float32
    assert torch.equal(basis, bank(dtype=torch.float32).directions[:1])
    Decomposition(torch.ones(1, 1, 12), ("embed",)).project(basis)


# --- centring -----------------------------------------------------------------------------------------------------


def test_centring_takes_the_mean_off():
    found = bank()
    centred = found.centred()
    rest = found.directions - found.directions.mean(0)
    torch.testing.assert_close(centred.directions, rest / rest.norm(dim=1, keepdim=True), rtol=0, atol=1e-12)
    assert centred.made["mean"] == found.directions.mean(0).tolist()
    assert (centred.texts, centred.space) == (found.texts, found.space)


def test_the_mean_may_be_that_of_another_bank():
    large, small = bank_of([f"text {n}" for n in range(50)], seed=1), bank()
    mean = large.directions.mean(0)
    rest = small.directions - mean
    torch.testing.assert_close(small.centred(mean).directions, rest / rest.norm(dim=1, keepdim=True))
    assert small.select(TEXTS[0]).centred(mean).texts == TEXTS[:1]


def test_what_cannot_be_centred_is_refused():
    found = bank()
    with pytest.raises(InputError, match=r"this one is\. Centre the bank that it was made from"):
        found.centred().centred()
    with pytest.raises(InputError, match=r"nothing is left of 'a red star'\. Pass the mean of a larger bank"):
        found.select("a red star").centred()
    with pytest.raises(InputError, match=r"with d_clip=12; got shape \(3,\)"):
        found.centred(torch.zeros(3))
    with pytest.raises(InputError, match="Expected a finite mean"):
        found.centred(torch.full((12,), torch.nan))


# --- banks from banks, and files ----------------------------------------------------------------------------------


def test_directions_are_made_unit_and_unit_ones_stay():
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = TextBank(["one", "two"], rows, space="plane")
    torch.testing.assert_close(found.directions, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        made = bank().to(dtype)
        assert made.directions.dtype == dtype
        assert TextBank(TEXTS, made.directions, space="made up").directions is made.directions


def test_looking_and_selecting():
    found = bank()
    assert (len(found), tuple(found), "a red star" in found, "a cat" in found) == (5, TEXTS, True, False)
    assert torch.equal(found["a blue ring"], found.directions[1])
    some = found.select(["a striped heart", "a red star"])
    assert some.texts == ("a striped heart", "a red star")
    assert torch.equal(some.directions, found.directions[[2, 0]])
    assert (some.space, some.made) == (found.space, found.made)


def test_one_bank_of_several():
    first, second = bank().select(TEXTS[:2]), bank().select(TEXTS[2:])
    both = TextBank.cat([first, second.to(torch.float32)])
    assert both.texts == TEXTS
    torch.testing.assert_close(both.directions, bank().directions, rtol=0, atol=1e-7)
    assert both.directions.dtype == torch.float64
    mean = bank().directions.mean(0)
    centred = TextBank.cat([first.centred(mean), second.centred(mean)])
    assert centred.made == bank().centred(mean).made
    made = [TextBank(TEXTS[:1], torch.ones(1, 2), space="s", made={"templates": ["{}"], "by": "me"})]
    made += [TextBank(TEXTS[1:2], torch.ones(1, 2), space="s", made={"templates": ["a {}"], "by": "me"})]
    assert TextBank.cat(made).made == {"by": "me"}


BAD_CATS = {
    "none": (list, "at least one TextBank to concatenate; got none"),
    "space": (lambda: [bank(), bank_of(["a cat"], space="other")], "the space of this bank, 'made up'; got 'other'"),
    "twice": (lambda: [bank(), bank()], "tell texts apart; 'a red star'.* carried more than once"),
    "width": (lambda: [bank(), bank_of(["a cat"], d_clip=3)], "bank 0 has d_clip=12, bank 1 d_clip=3"),
    "centred": (lambda: [bank(), bank_of(["x", "y"], seed=1).centred()], "bank 1 has another mean taken off"),
}


@pytest.mark.parametrize("several", BAD_CATS)
def test_banks_that_do_not_fit_are_refused(several):
    make, message = BAD_CATS[several]
    with pytest.raises(InputError, match=message):
        TextBank.cat(make())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_save_then_load_is_identity(tmp_path, dtype):
    found = bank().to(dtype).centred()
    found.save(tmp_path / "bank.safetensors")
    loaded = TextBank.load(tmp_path / "bank.safetensors")
    assert torch.equal(loaded.directions, found.directions)
    assert loaded.directions.dtype == dtype
    assert (loaded.texts, loaded.space, loaded.made) == (found.texts, found.space, found.made)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "bank.safetensors"
    bank().save(path)
    whole = path.read_bytes()
    for place in range(len(whole) - 200, len(whole), 17):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StoreError, match="damaged"):
            TextBank.load(path)
    path.write_bytes(whole.replace(b"a red star", b"a rad star"))
    with pytest.raises(StoreError, match="damaged"):
        TextBank.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match="damaged, half-written"):
        TextBank.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    Decomposition(torch.ones(1, 1, 3), ("embed",)).save(tmp_path / "parts")
    with pytest.raises(StoreError, match=r"holds another kind\. Use Decomposition\.load"):
        TextBank.load(tmp_path / "parts")
    bank().save(tmp_path / "bank")
    with pytest.raises(StoreError, match=r"holds another kind\. Use TextBank\.load"):
        Decomposition.load(tmp_path / "bank")
    torch.save({"texts": TEXTS}, tmp_path / "pickled")
    with pytest.raises(StoreError, match="never opened"):
        TextBank.load(tmp_path / "pickled")
    with pytest.raises(StoreError, match="there is no such file"):
        TextBank.load(tmp_path / "nowhere")


# --- what is refused ----------------------------------------------------------------------------------------------

NAN, ZERO = torch.ones(2, 3), torch.ones(2, 3)
NAN[1, 2], ZERO[1] = torch.nan, 0
BAD_BANKS = {
    "none": ((), torch.ones(0, 3), {}, "at least one text; got none"),
    "one text": ("a cat", torch.ones(5, 3), {}, "several texts; got one, 'a cat'. Put it into a list"),
    "blank": (("a cat", " "), torch.ones(2, 3), {}, "text 1 is ' '. Leave it out"),
    "number": (("a cat", 7), torch.ones(2, 3), {}, "text 1 is 7"),
    "twice": (("a cat", "a cat"), torch.ones(2, 3), {}, "'a cat' is carried more than once"),
    "count": (("a cat", "a dog"), torch.ones(3, 3), {}, r"each of the 2 texts; got shape \(3, 3\)"),
    "rank": (("a cat", "a dog"), torch.ones(2), {}, r"each of the 2 texts; got shape \(2,\)"),
    "width": (("a cat", "a dog"), torch.ones(2, 0), {}, r"got shape \(2, 0\)"),
    "integers": (("a cat", "a dog"), torch.ones(2, 3).int(), {}, "floating dtype; got torch.int32"),
    "nan": (("a cat", "a dog"), NAN, {}, "that of 'a dog' has length nan"),
    "infinite": (("a cat", "a dog"), NAN.nan_to_num(torch.inf), {}, "that of 'a dog' has length nan|inf"),
    "zero": (("a cat", "a dog"), ZERO, {}, "that of 'a dog' has length 0.0"),
    "space": (("a cat", "a dog"), torch.ones(2, 3), {"space": ""}, "space= as the name of the space .* got ''"),
    "made": (("a cat", "a dog"), torch.ones(2, 3), {"made": {"by": NAN}}, "how texts were made that JSON can hold"),
}


@pytest.mark.parametrize("what", BAD_BANKS)
def test_bad_texts_and_directions_are_refused(what):
    texts, directions, options, message = BAD_BANKS[what]
    with as_users_run_it(), pytest.raises(InputError, match=message):
        TextBank(texts, directions, **{"space": "made up", **options})


BAD_REQUESTS = {
    "none": ([], {}, "at least one text; got none"),
    "twice": (["a red star"] * 2, {}, "'a red star' is carried more than once. Give each text once"),
    "same tokens": (["a red star", "a RED star"], {}, "'a red star' and 'a RED star' have the same tokens"),
    "no template": (TEXTS, {"templates": ()}, "at least one template, or templates=None"),
    "template": (TEXTS, {"templates": ("a picture",)}, r"one \{\}, where the text goes, .* got 'a picture'"),
    "two places": (TEXTS, {"templates": ("{} {}",)}, r"one \{\}, where the text goes"),
    "batch size": (TEXTS, {"batch_size": 0}, "batch_size of at least 1; got 0"),
    "another tokenizer": (TEXTS, {"tokenizer": open_clip.SimpleTokenizer()}, "It belongs to another model"),
    "no tokens": (TEXTS, {"tokenizer": lambda texts: torch.zeros(1, 2)}, r"for 5 texts; got \(1, 2\) of torch.float32"),
    "a list": (TEXTS, {"tokenizer": lambda texts: [[1]]}, "for 5 texts; got list"),
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_bad_requests_are_refused(what):
    texts, options, message = BAD_REQUESTS[what]
    with as_users_run_it(), pytest.raises(InputError, match=message):
        TextBank.from_open_clip(clip_of_the_testbed(), texts, **{"tokenizer": tokenize, **options})


def test_unknown_words_are_refused():
    with pytest.raises(UnknownNameError, match=r"does not know the word 'cat'; .*[.?] It knows: [^.?]*\.$"):
        TextBank.from_open_clip(clip_of_the_testbed(), ["a cat"], tokenizer=tokenize)
    with pytest.raises(UnknownNameError, match=r"does not know the word 'photo'; .*[.?] It knows: [^.?]*\.$"):
        TextBank.from_open_clip(clip_of_the_testbed(), TEXTS, templates=("{}", "a photo of {}"), tokenizer=tokenize)


def test_unknown_texts_are_refused():
    for look in (bank().__getitem__, bank().select, bank().subspace):
        with pytest.raises(UnknownNameError, match="no text 'a red sta'; did you mean 'a red star'"):
            look("a red sta")
    with pytest.raises(InputError, match="at least one text"):
        bank().select([])


def test_a_model_of_another_vocabulary_needs_its_tokenizer():
    with pytest.raises(InputError, match=r"Expected tokenizer=, because CLIP reads .*testbed\.vocabulary\.tokenize"):
        TextBank.from_open_clip(clip_of_the_testbed(), TEXTS)


def test_texts_that_the_tokenizer_cuts_off_are_refused():
    clip = small_clip()
    fits = " ".join(["cat"] * 75)
    assert len(TextBank.from_open_clip(clip, [fits])) == 1
    for texts, templates in (([fits + " cat"], None), ([fits], ("the {}",))):
        with pytest.raises(InputError, match=r"Expected texts of at most 75 tokens .* cuts off"):
            TextBank.from_open_clip(clip, texts, templates=templates)


def test_training_with_dropout_is_refused():
    clip = clip_of_the_testbed()
    clip.transformer.resblocks[0].attn.dropout = 0.1
    wanted = TextBank.from_open_clip(clip, TEXTS, tokenizer=tokenize)
    clip.train()
    with pytest.raises(UnsupportedModelError, match=r"drops values at random at rate 0\.1.* Call \.eval\(\) first"):
        TextBank.from_open_clip(clip, TEXTS, tokenizer=tokenize)
    clip.transformer.resblocks[0].attn.dropout = 0.0
    torch.testing.assert_close(TextBank.from_open_clip(clip, TEXTS, tokenizer=tokenize).directions, wanted.directions)


def test_a_model_that_embeds_no_texts_is_refused():
    for ask in (space_of, lambda model: TextBank.from_open_clip(model, TEXTS)):
        with pytest.raises(UnsupportedModelError, match=r"with encode_text.* got Linear"):
            ask(nn.Linear(2, 2))


def test_a_model_that_gives_nan_is_refused():
    clip = clip_of_the_testbed()
    with torch.no_grad():
        clip.text_projection.fill_(torch.nan)
    with pytest.raises(InputError, match="the model gives 'a red star' one of length nan"):
        TextBank.from_open_clip(clip, TEXTS, tokenizer=tokenize)


# --- templates ----------------------------------------------------------------------------------------------------


def test_templates_have_one_place_for_a_text():
    ours = [template("a {b} c") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert [template.replace("{}", "a {b} c") for template in imagenet()] == ours
    for template in (*imagenet(), *SIMPLE):
        assert template.count("{}") == 1
    assert len(set(imagenet())) == 80
