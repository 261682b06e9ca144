"""Which weights a model has: said by whatever is computed from it, found out once, and again where they change."""

import gc
import hashlib
import weakref

import pytest
import torch
from tiny_models import TINY_MODELS, images_for, perturb
from torch import nn

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose, weights
from vitdecomp_lens.weights import weights_hash


def tiny(name="dinov2_reg"):
    return perturb(TINY_MODELS[name]()).requires_grad_(False)


@pytest.fixture
def hashed(monkeypatch):
    """How many weights were hashed at each call that hashed any."""
    found, digest = [], weights._digest
    monkeypatch.setattr(weights, "_digest", lambda tensors: found.append(len(tensors)) or digest(tensors))
    return found


def by_hand(module):
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("name", ["dinov2_reg", "open_clip"])
def test_all_that_is_computed_of_a_model_says_with_which_weights(name):
    model, images = HookedViT(tiny(name)), images_for(name, 2)
    of, wanted = torch.randn(3, decompose(model, images).values.shape[-1]), by_hand(model.original)
    for parts in (decompose(model, images), attribute(model, images, of), attribute_tokens(model, images, of)):
        assert parts.metadata["weights"] == weights_hash(model) == wanted
    if name == "dinov2_reg":  # of open_clip the module is a whole CLIP, with texts
        assert decompose(model.original, images).metadata["weights"] == wanted


def test_weights_are_hashed_once_a_model_for_all_that_is_asked(hashed):
    model, images = HookedViT(tiny()), images_for("dinov2_reg", 2)
    for by in ("head", "layer"):
        decompose(model, images, by=by)
        for seed in range(2):  # directions change in every step of a loop
            attribute(model, images[:1], torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)), by=by)
    assert hashed == [len(model.state_dict())]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.bias.add_(1),
        lambda layer: layer.bias.data.add_(1),
        lambda layer: layer.weight.data[:, 200:220].zero_(),  # a head's columns
        lambda layer: layer.counted.add_(1),
        lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias + 1)),
        lambda layer: setattr(layer.bias, "data", layer.bias + 1),
        lambda layer: layer.load_state_dict({**layer.state_dict(), "bias": torch.ones(256)}),
        lambda layer: layer.load_state_dict({**layer.state_dict(), "bias": torch.ones(256)}, assign=True),
        lambda layer: layer.double(),
        lambda layer: torch.optim.SGD([layer.weight.requires_grad_()], lr=1).step() or layer.weight.mul_(2),
    ],
)
def test_what_changes_a_weight_is_seen(change, hashed):
    layer = nn.Linear(256, 256)
    layer.register_buffer("counted", torch.zeros((), dtype=torch.int64))
    layer.register_buffer("cache", torch.zeros(3), persistent=False)
    before = weights_hash(layer)
    layer.cache.add_(1)
    assert before == weights_hash(layer) == by_hand(layer)
    assert hashed == [3]
    with torch.no_grad():
        change(layer)
    assert weights_hash(layer) == by_hand(layer) != before
    assert hashed == [3, 3]


def test_nothing_keeps_a_model_that_was_hashed():
    layer = nn.Linear(2, 2)
    weights_hash(layer)
    there, tensor = weakref.ref(layer), weakref.ref(layer.weight)
    assert layer in weights._HASHES
    del layer
    gc.collect()
    assert there() is None
    assert tensor() is None


def test_weights_made_in_inference_mode_are_hashed_too():
    with torch.inference_mode():
        layer = nn.Linear(2, 2)
        inside = weights_hash(layer)
    assert inside == weights_hash(layer) == by_hand(layer)


def test_weights_without_entries_and_of_other_kinds_count():
    layer = nn.Module()
    for name, tensor in (("empty", torch.zeros(0, 3)), ("brain", torch.ones(2, dtype=torch.bfloat16))):
        layer.register_buffer(name, tensor)
    layer.register_buffer("flags", torch.tensor([True, False]))
    assert weights_hash(layer) == by_hand(layer)
    layer.flags.data[1] = True
    assert weights_hash(layer) == by_hand(layer)
