"""The example of a spliced autoencoder: it learns what it is shown, and its table says so."""

import importlib.util
from pathlib import Path

import pytest
import torch

import vitdecomp_lens
from vitdecomp_lens import Component, Decomposition
from vitdecomp_lens.clip import TextBank

PATH = Path(vitdecomp_lens.__file__).parent.parent / "examples" / "splice_a_sparse_autoencoder.py"
HOOK = "blocks.3.hook_mlp_out"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("splice_a_sparse_autoencoder", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_reconstructs_and_trades_that_for_fewer_latents(example):
    generator = torch.Generator().manual_seed(0)
    active = (torch.rand(2000, 6, generator=generator) < 0.2) * (1 + torch.rand(2000, 6, generator=generator))
    values = active @ torch.eye(6, 16)
    left, used = [], []
    for sparsity in (0.05, 0.4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = example.trained(values, 12, steps=400, sparsity=sparsity)
        with torch.no_grad():
            code = module.encode(values)
            error = (module.decode(code) - values).square().sum() / (values - values.mean(0)).square().sum()
        left.append(float(error))
        used.append(float((code > 0).double().sum(1).mean()))
        assert torch.allclose(module.W_dec.norm(dim=-1), torch.ones(12), atol=1e-5)
    assert left[0] < 0.05 < left[1] < 0.5
    assert used[1] < 0.8 * used[0]


def test_the_table_names_the_text_that_a_latent_writes(example):
    values = torch.zeros(4, 6, 3)
    values[0, :3, 0], values[1, :, 1], values[1, 0, 1], values[1, :, 2] = 2, 3, 9, 1
    values[3, :, 2] = 1
    components = [Component.from_label(f"latent{n}@{HOOK}") for n in range(2)]
    components += [Component.from_label(f"error@{HOOK}"), Component("constant", name="b")]
    parts = Decomposition(values, tuple(components), values.sum(0))
    bank = TextBank(["red", "round", "big"], torch.eye(3), space="planted")
    lines = example.in_words(parts, bank, HOOK, 2)
    assert lines[2] == f"| latent1@{HOOK} | 100% of images | round | 0.97 |"
    assert lines[3] == f"| latent0@{HOOK} | 50% of images | red | 1.00 |"
    assert lines[-1].startswith("\nthe error writes 0.00 of the representation's length; the gap is")
