"""Certificates: what they say is what was measured, and what is wrong fails."""

import json
from dataclasses import replace

import pytest
import torch
from real_data import MODEL, WEIGHTS, needs_real_data
from timm.models.vision_transformer import VisionTransformer
from tiny_models import TINY, TINY_MODELS, _timm, images_for
from torch import nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens import HookedViT, decompose, measures, verify
from vitdecomp_lens.certificate import WIDTH, Cost, CutCheck, HookCheck, Parity
from vitdecomp_lens.coverage import Coverage
from vitdecomp_lens.errors import GapError, InputError
from vitdecomp_lens.verify import looks_initial
from vitdecomp_lens.weights import create_timm, load_weights


def silent(_what, _share):
    """No progress."""


@pytest.fixture(scope="module")
def module():
    """Of one block: a certificate traces a model eight times."""
    return _timm(depth=1)()


@pytest.fixture(scope="module")
def images():
    return images_for("class_token", 2)


@pytest.fixture(scope="module")
def certificate(module, images):
    return verify(module, images)


def test_a_supported_model_is_certified(certificate):
    assert certificate.failures == ()
    assert certificate.supported


def test_every_cut_is_measured_in_both_spaces_and_both_dtypes(certificate):
    measured = {(cut.by, cut.tokens, cut.of, cut.dtype) for cut in certificate.cuts}
    expected = {
        (by, tokens, of, dtype)
        for by in ("layer", "head", "neuron")
        for tokens in (False, True)
        for of in ("representation", "logits")
        for dtype in ("float32", "float64")
    }
    assert measured == expected
    assert len(certificate.cuts) == len(expected)


def test_the_gap_is_that_of_the_decomposition(module, certificate):
    images = images_for("class_token", 2)
    for of in ("representation", "logits"):
        parts = decompose(HookedViT(module), images, by="neuron", of=of)
        (cut,) = (c for c in certificate.cuts if (c.by, c.tokens, c.of, c.dtype) == ("neuron", False, of, "float32"))
        assert cut.gap == float(parts.gap.max())


def test_every_hook_of_the_model_is_in_the_certificate(module, certificate):
    assert [hook.name for hook in certificate.hooks] == list(HookedViT(module).hook_dict)
    assert all(hook.live for hook in certificate.hooks)


def test_the_module_given_is_left_as_it_was(images):
    module = VisionTransformer(**{**TINY, "depth": 1}).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    hooked = HookedViT(module)
    calls = []
    hooked.add_hook("hook_embed", lambda value, hook: calls.append(hook.name))
    certificate = verify(hooked, images)
    assert "perturbed on a copy" in certificate.weights
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module.training
    assert next(module.parameters()).dtype == torch.float32
    assert not calls, "the user's hooks take no part"
    assert not any(type(child)._forward_hooks for child in module.modules() if isinstance(child, HookPoint))


def test_initial_values_are_told_from_trained_ones(module):
    assert looks_initial(VisionTransformer(**TINY))
    assert not looks_initial(module)
    assert not looks_initial(nn.Linear(2, 2))


def test_only_initial_values_are_perturbed_unless_asked_for(certificate):
    assert "perturbed" not in certificate.weights


def test_a_model_without_classifier_is_measured_at_its_representation_only(certificate):
    model = HookedViT(_timm(depth=1, num_classes=0)())
    cuts, coverage = measures.cut_checks(model, images_for("no_classifier", 1), seed=0, max_bytes=1 << 29, say=silent)
    assert {cut.of for cut in cuts} == {"representation"}
    assert all(cut.passes for cut in cuts)
    assert coverage.share == 1
    assert "logits" in str(certificate)
    assert "logits" not in str(replace(certificate, cuts=cuts))


def test_what_takes_too_much_memory_is_measured_along_directions(module, images):
    cuts, _ = measures.cut_checks(HookedViT(module), images, seed=0, max_bytes=50_000, say=silent)
    (cut,) = (c for c in cuts if (c.by, c.tokens, c.of, c.dtype) == ("neuron", False, "representation", "float64"))
    assert "16 random directions" in cut.note
    (token_cut,) = (c for c in cuts if (c.by, c.tokens, c.of, c.dtype) == ("neuron", True, "logits", "float64"))
    assert "one image" in token_cut.note
    assert all(cut.passes for cut in cuts)


def test_an_error_of_a_cut_is_reported_and_fails_the_certificate(module, images, certificate, monkeypatch):
    def broken(*_args, **_options):
        raise GapError("off by much")

    monkeypatch.setattr(measures, "decompose", broken)
    cuts, _ = measures.cut_checks(HookedViT(module), images, seed=0, max_bytes=1 << 29, say=silent)
    failed = [cut for cut in cuts if not cut.passes]
    assert len(failed) == 12
    assert {cut.note for cut in failed} == {"off by much"}
    worse = replace(certificate, cuts=cuts)
    assert not worse.supported
    assert len(worse.failures) == 12
    assert 'by="layer", of="representation", float32: off by much' in worse.failures
    assert "Verdict: not supported" in str(worse)


def test_a_hook_that_the_model_does_not_go_on_with_is_not_live(module, images, certificate):
    model = HookedViT(module)
    model.hook_dead = HookPoint()
    model.setup()
    hooks = measures.hook_checks(model, images[:1], seed=0, say=silent)
    assert [hook.name for hook in hooks if not hook.live] == ["hook_dead"]
    assert replace(certificate, hooks=hooks).failures == ("1 hooks are not live: hook_dead",)


def test_hooks_that_cannot_be_live_in_principle_are_explained():
    model = VisionTransformer(**{**TINY, "img_size": 8, "global_pool": "avg", "class_token": False}).eval()
    hooks = measures.hook_checks(HookedViT(model).double(), torch.randn(1, 3, 8, 8), seed=0, say=silent)
    dull = {hook.name: hook.reason for hook in hooks if not hook.live}
    kinds = ("hook_q", "hook_k", "hook_attn_scores")
    assert set(dull) == {f"blocks.{layer}.attn.{kind}" for layer in range(2) for kind in kinds}
    assert set(dull.values()) == {"there is one key only, whose pattern is 1 whatever the scores"}


def test_an_output_that_is_not_the_originals_is_seen(module, images):
    model = HookedViT(module)
    assert measures.parity(model, images).passes
    model.tower.head = nn.Linear(32, 10)
    parity = measures.parity(model, images)
    assert not parity.plain
    assert not parity.hooked
    assert not parity.passes


def test_each_requirement_alone_can_fail(certificate):
    low = replace(certificate, coverage=Coverage(8, 10))
    assert low.failures[0].startswith("coverage is below 90 %: 8 of 10")
    assert replace(certificate, coverage=Coverage(9, 10)).supported
    assert not replace(certificate, coverage=None).supported
    assert not replace(certificate, cuts=()).supported
    assert not replace(certificate, parity=Parity(True, True, 2e-5)).supported
    assert not replace(certificate, parity=Parity(True, True, float("nan"))).supported
    wide = CutCheck("head", "logits", False, "float64", 2e-10)
    assert replace(certificate, cuts=(wide,)).failures == (
        'by="head", of="logits", float64: gap 2.0e-10, allowed is 1e-10',
    )
    assert replace(certificate, cuts=(replace(wide, dtype="float32"),)).supported
    assert not CutCheck("head", "logits", False, "float32", float("nan")).passes
    assert replace(certificate, hooks=(HookCheck("hook_q", False, "one key"),)).supported


def test_the_report_fits_into_80_columns(certificate):
    worse = replace(certificate, hooks=(HookCheck("blocks.0.attn.hook_q", False, "x" * 90),), cost=None)
    for shown in (certificate, worse):
        assert max(map(len, str(shown).splitlines())) <= WIDTH
    assert "Verdict: supported" in str(certificate)
    assert "2 of 3 × 32 × 32" in str(certificate)
    assert f"{len(certificate.hooks)} of {len(certificate.hooks)} are live" in str(certificate)


def test_the_json_says_what_the_certificate_says(certificate):
    packed = json.loads(certificate.to_json())
    assert packed["supported"] is True
    assert packed["failures"] == []
    assert [cut["gap"] for cut in packed["cuts"]] == [cut.gap for cut in certificate.cuts]
    assert packed["coverage"] == {"found": 2, "branches": 2, "stops": [], "share": 1.0}
    assert packed["cost"]["plain"] == certificate.cost.plain
    strange = replace(certificate, parity=Parity(False, False, float("nan")))
    assert json.loads(strange.to_json())["parity"]["all_hooked"] is None


def test_cost_is_of_the_plain_forward_and_the_decomposition(certificate):
    cost = certificate.cost
    assert isinstance(cost, Cost)
    assert 0 < cost.plain <= cost.decompose
    assert f"{cost.decompose / cost.plain:.2f} times the plain forward" in str(certificate)


def test_random_images_have_the_size_of_the_model_and_follow_the_seed():
    from vitdecomp_lens.verify import _random_images

    model = HookedViT(TINY_MODELS["class_token"]())
    assert _random_images(model, 3, 0).shape == (3, 3, 32, 32)
    assert torch.equal(_random_images(model, 3, 0), _random_images(model, 3, 0))
    assert not torch.equal(_random_images(model, 3, 0), _random_images(model, 3, 1))
    with pytest.raises(InputError, match="at least one random image; got count=0"):
        verify(model, count=0)
    with pytest.raises(InputError, match=r"images of any size.*pass images="):
        verify(TINY_MODELS["dynamic_size"]())


def test_images_that_do_not_fit_are_refused_before_anything_runs(module):
    with pytest.raises(InputError, match="32, 32"):
        verify(module, torch.randn(1, 3, 16, 16))


@pytest.mark.sweep
@needs_real_data
def test_a_trained_model_is_supported():
    model = create_timm(MODEL)
    load_weights(model, WEIGHTS)
    certificate = verify(model, count=1, weights=WEIGHTS.name)
    assert certificate.failures == ()
    assert "perturbed" not in certificate.weights
    assert certificate.coverage.share == 1
