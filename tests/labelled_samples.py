"""What the tests of labelled values share: a decomposition with every kind of component, and its comparison."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from jaxtyping import config

from vitdecomp_lens.components import Component, TokenGrid
from vitdecomp_lens.decomposition import Attribution, Coverage, Decomposition, Stop
from vitdecomp_lens.tokens import TokenAttribution, TokenBlock

COMPONENTS = (
    Component("embed"),
    *(Component("head", layer, head) for layer in range(2) for head in range(3)),
    *(Component("neuron", 0, neuron=neuron) for neuron in range(4)),
    Component("mlp", 1),
    Component("constant", 1, name="blocks.1.attn.proj.bias"),
    Component("constant", name="norm.bias"),
)
COVERAGE = Coverage(3, 4, (Stop("aten.tanh.default", "head", "nonlinear"),))


def sample(*, batch=3, width=5, seed=0, dtype=torch.float64, kind=Decomposition, **options):
    values = torch.randn(len(COMPONENTS), batch, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    total = values.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    return kind(values=values, components=COMPONENTS, total=total, **options)


def assert_same(one, other):
    """Every field equal, bit for bit."""
    assert type(one) is type(other)
    for f in dataclasses.fields(one):
        left, right = getattr(one, f.name), getattr(other, f.name)
        if dataclasses.is_dataclass(left) and not isinstance(left, Coverage):
            assert_same(left, right)
        elif isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right), f.name
        else:
            assert left == right, f.name


@contextmanager
def as_users_run_it():
    """Without the checks at run time, which tests switch on and which would speak first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


KINDS = pytest.mark.parametrize("kind", [Decomposition, Attribution])


FINE = TokenGrid(4, 6, (32, 48))
COARSE = TokenGrid(2, 3, (32, 48), prefix=("CLS", "reg0"))
FINE_LABELS = ("embed", "L0H0", "L0H1", "L0N0", "L0N1")
COARSE_LABELS = ("L1H0", "L1H1", "L1H2", "mlp.1")


def token_block(grid, labels, *, batch=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return TokenBlock(torch.randn(len(labels), batch, len(grid), 2, generator=generator, dtype=dtype), labels, grid)


def token_sample(*, batch=3, seed=0, dtype=torch.float64, coarse_only=False, **options):
    blocks = (token_block(COARSE, COARSE_LABELS, batch=batch, seed=seed, dtype=dtype),)
    if not coarse_only:
        blocks = (token_block(FINE, FINE_LABELS, batch=batch, seed=seed + 1, dtype=dtype), *blocks)
    constants = torch.randn(2, batch, 2, generator=torch.Generator().manual_seed(seed + 2), dtype=dtype)
    untokened = Attribution(constants, ("norm.bias", "head.bias"), directions=("a dog", "a cat"))
    total = constants.double().sum(0) + sum(b.values.double().sum((0, 2)) for b in blocks)
    return TokenAttribution(blocks, untokened, total.to(dtype), **options)


def assert_same_tokens(one, other):
    """Every field equal, bit for bit."""
    assert len(one.blocks) == len(other.blocks)
    for left, right in zip(one.blocks, other.blocks, strict=True):
        assert (left.components, left.grid) == (right.components, right.grid)
        assert left.values.dtype == right.values.dtype
        assert torch.equal(left.values, right.values)
    assert_same(one.untokened, other.untokened)
    assert (one.total is None) == (other.total is None)
    assert one.total is None or torch.equal(one.total, other.total)
    assert (one.complete, one.coverage, one.metadata) == (other.complete, other.coverage, other.metadata)
