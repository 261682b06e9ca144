"""Modules that stand at hook points: what their latents write is exact, and the model is as it was afterwards."""

from functools import cache

import pytest
import torch
from labelled_samples import as_users_run_it
from tiny_models import TINY_MODELS, images_for
from torch import nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens import Component, Decomposition, HookedViT, attribute, attribute_tokens, decompose, testbed
from vitdecomp_lens.components import PLAIN
from vitdecomp_lens.errors import IncompleteCutError, InputError, UnknownNameError
from vitdecomp_lens.interpret import text_span
from vitdecomp_lens.intervene import ablate_run, total_effects
from vitdecomp_lens.testbed.banks import text_bank

MLP = "blocks.0.hook_mlp_out"
OF_TESTBED = {
    "clip": "blocks.1.hook_mlp_out",
    "deit": "blocks.2.attn.hook_z",
    "reg": "blocks.1.hook_resid_post",
    "swin": "blocks.1.hook_attn_out",
    "maxvit": "blocks.4.hook_mlp_out",
}


class Autoencoder(nn.Module):
    """A sparse autoencoder that was never trained: exactness asks for no more."""

    def __init__(self, d_in, latents=12, seed=0, dtype=torch.float64):
        super().__init__()
        self.name = "mine"
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype) / shape[-1] ** 0.5)

        self.W_enc, self.b_enc = parameter(d_in, latents), parameter(latents)
        self.W_dec, self.b_dec = parameter(latents, d_in), parameter(d_in)

    def encode(self, x):
        return ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()

    def decode(self, latents):
        return latents @ self.W_dec + self.b_dec


@cache
def tiny():
    return HookedViT(TINY_MODELS["class_token"]().double()), images_for("class_token").double()


def representation(model, images):
    return model.run_with_cache(images, names_filter="hook_representation")[1]["hook_representation"]


def width_at(model, images, hook):
    value = model.run_with_cache(images, names_filter=hook)[1][hook]
    return value.flatten(2).shape[-1] if value.dim() > 3 else value.shape[-1]


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_TESTBED)
def test_latents_sum_to_the_representation_with_error_and_without(name):
    model, hook, scenes = testbed.load(name), OF_TESTBED[name], testbed.Scenes("test", seed=3, size=2)
    images = testbed.normalised(scenes.images(range(2)))
    cases = [(torch.float64, 1e-10, True), (torch.float32, 1e-5, False)]
    for dtype, tolerance, error in cases if name in ("clip", "deit") else cases[:1]:
        model, images = model.to(dtype), images.to(dtype)
        module = Autoencoder(width_at(model, images, hook), dtype=dtype)
        plain = representation(model, images)
        with model.spliced({hook: module}, error=error):
            parts = decompose(model, images, by="latent")
            assert (representation(model, images) - parts.total).abs().max() < tolerance * parts.total.abs().max()
        assert parts.complete
        assert parts.gap.max() < tolerance
        assert sum(c.kind == "latent" for c in parts.components) == 12
        assert (f"error@{hook}" in parts.labels) == error
        assert f"{hook}.b_dec" in parts.labels
        changed = (parts.total - plain).abs().max() / plain.abs().max()
        assert changed < tolerance if error else changed > 1e-3


@pytest.mark.parametrize("hook", [MLP, "blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"])
def test_a_latent_writes_its_row_of_the_decoder_through_the_final_norm(hook):
    model, images = tiny()
    module = Autoencoder(width_at(model, images, hook))
    block = model.blocks[1]
    outwards = {"hook_z": block.attn.W_O.flatten(0, 1), "hook_post": block.mlp.W_out}
    to_stream = outwards.get(hook.rpartition(".")[2], torch.eye(32, dtype=torch.float64))
    with model.spliced({hook: module}):
        parts = decompose(model, images, by="latent")
        _, kept = model.run_with_cache(images)

    def written(vectors):
        centred = vectors - vectors.mean(-1, keepdim=True)
        return model.original.norm.weight * centred / kept["ln_final.hook_scale"][:, 0]

    latents, error = kept[f"{hook}.hook_latents"][:, 0], kept[f"{hook}.hook_error"][:, 0]
    assert latents.any()
    for number in range(12):
        expected = written(latents[:, number, None] * module.W_dec[number] @ to_stream)
        assert (parts[f"latent{number}@{hook}"] - expected).abs().max() < 1e-12
    assert (parts[f"error@{hook}"] - written(error @ to_stream)).abs().max() < 1e-12
    assert (parts[f"{hook}.b_dec"] - written(module.b_dec.expand(len(images), -1) @ to_stream)).abs().max() < 1e-12


def test_other_cuts_sum_the_latents_of_a_module_and_leave_the_rest_alone():
    model, images = tiny()
    plain = {by: decompose(model, images, by=by) for by in PLAIN}
    with model.spliced({MLP: Autoencoder(32)}):
        fine = decompose(model, images, by="latent")
        coarse = {by: decompose(model, images, by=by) for by in PLAIN}
    for by in PLAIN:
        whole = coarse[by]
        assert (whole[f"latents@{MLP}"] - fine.select(kind="latent").sum()).abs().max() < 1e-12
        of_module = whole[f"latents@{MLP}"] + whole[f"error@{MLP}"] + whole[f"{MLP}.b_dec"]
        before = plain[by].group(by="layer")["mlp.0"]
        if by == "neuron":
            before = before + plain[by]["blocks.0.mlp.fc2.bias"]
        assert (of_module - before).abs().max() < 1e-12
        shared = [label for label in whole if label in plain[by]]
        assert max((whole[label] - plain[by][label]).abs().max() for label in shared) < 1e-12
        assert whole.coverage.share == 1
    assert fine.group(by="layer").labels == coarse["head"].group(by="layer").labels


def test_scores_and_scores_by_token_are_those_of_the_vectors():
    model, images = tiny()
    directions = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with model.spliced({"blocks.1.hook_attn_out": Autoencoder(32)}):
        vectors = decompose(model, images, by="latent").project(directions)
        scores = attribute(model, images, directions, by="latent")
        tokens = attribute_tokens(model, images, directions, by="latent")
    assert scores.labels == vectors.labels
    assert (scores.values - vectors.values).abs().max() < 1e-12
    for label in scores:
        assert (tokens.sum_tokens()[label] - scores[label]).abs().max() < 1e-12
    read = tokens["latent0@blocks.1.hook_attn_out"]
    assert read[:, 1:].abs().max() == 0  # the class token alone is read of what is behind the last attention
    assert tokens["L0H0"].shape == read.shape


def test_behind_a_module_in_the_stream_nothing_writes_directly():
    model, images = tiny()
    with model.spliced({"blocks.0.hook_resid_post": Autoencoder(32)}):
        parts = decompose(model, images, by="latent")
    assert {c.layer for c in parts.components if c.kind == "head"} == {1}
    assert (parts.coverage.found, parts.coverage.branches) == (2, 4)
    assert [stop.module for stop in parts.coverage.stops] == ["blocks.0.hook_resid_post"]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_without_its_error_the_module_takes_the_values_place():
    model, images = tiny()
    module = Autoencoder(32)
    with model.hooks([(MLP, lambda value, hook: module.decode(module.encode(value)))]):
        expected = representation(model, images)
    with model.spliced({MLP: module}, error=False):
        assert f"{MLP}.hook_error" not in model.hook_dict
        assert (representation(model, images) - expected).abs().max() < 1e-12


def test_a_latent_can_be_ablated_in_a_run():
    model, images = tiny()
    module = Autoencoder(32)
    with model.hooks([(MLP, lambda value, hook: value - module.encode(value)[..., 3:4] * module.W_dec[3])]):
        expected = representation(model, images)

    def in_place(latents, hook):
        latents[..., 3] = 0

    of = "representation"
    label = f"latent3@{MLP}"
    with model.spliced({MLP: module}):
        for hook in (in_place, lambda latents, hook: latents.index_fill(2, torch.tensor([3]), 0)):
            with model.hooks([(f"{MLP}.hook_latents", hook)]):
                assert (representation(model, images) - expected).abs().max() < 1e-12
                parts = decompose(model, images, by="latent")
                assert parts[label].abs().max() == 0
                assert parts.gap.max() < 1e-10
        clean = representation(model, images)
        ablated = ablate_run(model, images, components=[label, "L1H0"], how="zero", of=of)
        assert (ablated - expected).abs().max() > 1e-6
        assert (ablate_run(model, images, components=[label], how="zero", of=of) - expected).abs().max() < 1e-12
        effects = total_effects(model, images, how="zero", by="latent", of=of)
        assert (effects[label] - (expected - clean)).abs().max() < 1e-12
        assert f"error@{MLP}" in effects.labels
        mean = ablate_run(model, images, components=[label], how="mean", reference=images, of=of)
        assert mean.isfinite().all()
    with pytest.raises(InputError, match=r"'latent' needs a module that stands"):
        total_effects(model, images, how="zero", by="latent")


def test_what_hooks_change_at_a_spliced_hook_is_an_intervention():
    model, images = tiny()
    with model.spliced({MLP: Autoencoder(32)}):
        plain = decompose(model, images, by="latent")
        with model.hooks([(MLP, lambda value, hook: value.roll(1, -1))]):
            parts = decompose(model, images, by="latent")
    assert f"intervention@{MLP}" in parts.labels
    assert plain.labels == tuple(label for label in parts.labels if label != f"intervention@{MLP}")
    assert parts.gap.max() < 1e-10


def test_values_stay_readable_and_the_model_is_as_it_was_afterwards():
    model, images = tiny()
    module, hooks, before = Autoencoder(32), list(model.hook_dict), representation(model, images)
    names = list(module.__dict__)
    with model.spliced({MLP: module}), model.spliced({"blocks.1.attn.hook_z": Autoencoder(32)}):
        _, kept = model.run_with_cache(images)
        assert kept[MLP].shape == kept[f"{MLP}.hook_error"].shape
        made = module.decode(kept[f"{MLP}.hook_latents"]) + kept[f"{MLP}.hook_error"]
        assert (kept[MLP] - made).abs().max() < 1e-12
        assert model.token_grid(images, f"{MLP}.hook_latents") == model.token_grid(images, MLP)
    with pytest.raises(ZeroDivisionError), model.spliced({MLP: module}):
        raise ZeroDivisionError
    assert list(model.hook_dict) == hooks
    assert torch.equal(representation(model, images), before)
    assert (list(module.__dict__), module.name, module.training) == (names, "mine", True)
    assert not hasattr(module.encode, "hook")


def test_hook_points_of_the_module_itself_are_live_too():
    class Hooked(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.inner, self.hook_sae_acts_post, self.hook_sae_recons = Autoencoder(32), HookPoint(), HookPoint()
            self.setup()

        def encode(self, x):
            return self.hook_sae_acts_post(self.inner.encode(x))

        def decode(self, latents):
            return self.hook_sae_recons(self.inner.decode(latents))

    model, images = tiny()
    module, name = Hooked(), f"{MLP}.spliced.hook_sae_acts_post"
    found = []
    with model.spliced({MLP: module}):
        _, kept = model.run_with_cache(images)
        assert torch.equal(kept[name], kept[f"{MLP}.hook_latents"])
        for hook in (name, f"{MLP}.hook_latents"):
            with model.hooks([(hook, lambda latents, hook: 2 * latents)]):
                found.append(decompose(model, images, by="latent"))
    assert (found[0].values - found[1].values).abs().max() < 1e-12
    assert max(parts.gap.max() for parts in found) < 1e-10
    assert (found[0].total - kept["hook_representation"]).abs().max() > 1e-3
    assert module.hook_sae_acts_post.name == "hook_sae_acts_post"


def test_conversion_of_the_model_reaches_modules_that_stand_in_it():
    model = HookedViT(TINY_MODELS["class_token"]())
    images, module = images_for("class_token"), Autoencoder(32, dtype=torch.float32)
    with model.spliced({MLP: module}):
        model.double()
        assert module.W_dec.dtype == torch.float64
        assert decompose(model, images.double(), by="latent").gap.max() < 1e-10


# --- values ----------------------------------------------------------------------------------------------------------


def test_labels_are_read_back():
    for component in (
        Component("latent", 2, name=MLP.replace("0", "2"), latent=17),
        Component("latent", 2, name="blocks.2.attn.hook_z"),
        Component("error", name="hook_patch_embed"),
    ):
        assert Component.from_label(component.label) == component
    assert Component.from_label("latent17@blocks.2.hook_mlp_out").layer == 2
    with pytest.raises(InputError, match=r"kind 'latent' needs name="):
        Component("latent", latent=3)


def test_latents_are_stored_and_read_in_words_like_heads(tmp_path):
    model, scenes = testbed.load("clip"), testbed.Scenes("test", seed=5, size=40)
    hook = "blocks.3.hook_mlp_out"
    images = testbed.normalised(scenes.images(range(40)))
    with model.spliced({hook: Autoencoder(width_at(model, images[:1], hook), latents=6, dtype=torch.float32)}):
        parts = decompose(model, images, by="latent")
    assert parts.metadata["spliced"][hook]["error"]
    parts.save(tmp_path / "parts.safetensors")
    assert Decomposition.load(tmp_path / "parts.safetensors").components == parts.components
    bank = text_bank(testbed.load_original("clip"), ["a red circle", "a blue square", "a green star"])
    spans = text_span(parts.select(kind=["latent", "head"]), bank, steps=1, rank=3)
    assert set(spans.texts[f"latent2@{hook}"]) <= set(bank.texts)
    assert "L3H0" in spans.texts


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_stand_in_a_model_is_refused():
    model, images = tiny()
    cases = {
        r"no hook 'blocks.9.hook_mlp_out'": (UnknownNameError, {"blocks.9.hook_mlp_out": Autoencoder(32)}),
        r"encode\(x\), which gives latents.*got Linear": (InputError, {MLP: nn.Linear(32, 32)}),
        r"b_dec of the Autoencoder|W_enc of the Autoencoder": (InputError, {MLP: Autoencoder(32).float()}),
        r"computed only while somebody looks": (InputError, {"blocks.0.attn.hook_pattern": Autoencoder(32)}),
    }
    for message, (error, modules) in cases.items():
        with pytest.raises(error, match=message), model.spliced(modules):
            pass
    unfit = pytest.raises(InputError, match=r"Expected a mapping from hooks to modules.*got list")
    with as_users_run_it(), unfit, model.spliced([(MLP, Autoencoder(32))]):
        pass
    with model.spliced({MLP: Autoencoder(32)}):
        for hook, message in ((MLP, "stands at .* already"), (f"{MLP}.hook_latents", "is of a spliced module")):
            with pytest.raises(InputError, match=message), model.spliced({hook: Autoencoder(32)}):
                pass
    with model.spliced({MLP: Autoencoder(31)}):
        with pytest.raises(InputError, match=r"Autoencoder at blocks.0.hook_mlp_out must take values \[batch, 17, 32"):
            model(images)
        with pytest.raises(InputError, match=r"Autoencoder at blocks.0.hook_mlp_out must take values"):
            decompose(model, images)


def test_latents_that_write_nothing_directly_are_refused():
    model, images = tiny()
    with pytest.raises(InputError, match=r"by='latent' needs a module.*with model.spliced\("):
        decompose(model, images, by="latent")
    with model.spliced({"blocks.0.mlp.hook_pre": Autoencoder(128)}):
        with pytest.raises(InputError, match=r"No latent at blocks.0.mlp.hook_pre writes directly"):
            decompose(model, images, by="latent")
        assert decompose(model, images).complete


def test_a_decoder_that_is_not_affine_is_refused():
    class Bent(Autoencoder):
        def decode(self, latents):
            return super().decode(latents).tanh()

    model, images = tiny()
    with (
        model.spliced({MLP: Bent(32)}),
        pytest.raises(IncompleteCutError, match=rf"(?s)tanh.*at {MLP}: what its decode makes must be affine"),
    ):
        decompose(model, images, by="latent")
