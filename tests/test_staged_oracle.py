"""Models with windows and stages: contributions and scores by token are those of the frozen eager module.

Where the oracle's tokens are in the image, the library says: its own code cuts an image of token numbers into windows.
"""

import re
from contextlib import ExitStack
from unittest import mock

import pytest
import staged_models
import tiny_models
import torch
from eager_oracle import attentions_of, blocks_of, contributions, derivatives, representation, value_scores
from staged_models import STAGED_MODELS, parametrized, shared

from vitdecomp_lens import attribute_tokens, decompose

# Max-pools have no fast way.
pytestmark = pytest.mark.filterwarnings("ignore:aten..amax:vitdecomp_lens.errors.VitDecompWarning")

NAMES = sorted(STAGED_MODELS)
# The names of parameters that add to what they meet end with these; the projection makes positions of fixed waves.
ADDED = ("bias", "pos_embed", "pos_embed_win", "cls_token", "token_projection.weight")
EAGER = {name: (staged_models, STAGED_MODELS[name]) for name in NAMES}
EAGER |= {
    name: (tiny_models, make) for name, make in tiny_models.TINY_MODELS.items() if name.startswith(("cait", "xcit"))
}


@pytest.fixture(scope="module", params=parametrized(swept=True))
def made(request):
    """A hooked model, the eager one, and images."""
    model, images = shared(request.param)
    return model, model.original, images


def direction_for(original, images):
    d_rep = representation(original, images[:1]).shape[1]
    return torch.randn(d_rep, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def branches_of(original):
    """The labels of all layers, as the blocks of the eager model say."""
    yield "embed"
    for number, block in enumerate(blocks_of(original)):
        yield from (f"attn.{number}", f"mlp.{number}") if attentions_of(block) else ()
        yield from () if attentions_of(block) and not hasattr(block, "local_mp") else (f"conv.{number}",)


# --- the oracle alone -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=EAGER)
def eager(request):
    """An eager model, images and a direction."""
    catalogue, make = EAGER[request.param]
    original, images = make().double().requires_grad_(False), catalogue.images_for(request.param).double()
    return original, images, direction_for(original, images)


def test_the_oracle_finds_all_of_the_score(eager):
    """What the branches and the parameters beside them contribute is the score: the oracle leaves nothing out."""
    original, images, direction = eager
    branches = contributions(original, images, direction, list(branches_of(original)))
    added = {label: p for label, p in original.named_parameters() if label.endswith(ADDED)}
    constants = derivatives(original, images, direction, representation, added)
    found = sum(branches.values()) + sum(constants.values())
    assert_same(found, representation(original, images) @ direction)


def test_the_oracles_heads_are_what_their_values_write(eager):
    original, images, direction = eager
    for number, block in enumerate(blocks_of(original)):
        if attentions_of(block):
            by_token = value_scores(original, images, direction, number)
            heads = contributions(original, images, direction, [f"L{number}H{head}" for head in range(len(by_token))])
            for head, scores in zip(heads.values(), by_token, strict=True):
                assert_same(scores.reshape(len(images), -1).sum(1), head)


# --- contributions --------------------------------------------------------------------------------------------------


def test_direct_effects_equal_the_derivative_of_the_frozen_eager_module(made):
    model, original, images = made
    direction = direction_for(original, images)
    for by in ("layer", "head", "neuron"):
        parts = decompose(model, images, by=by)
        labels = [label for label in parts.labels if label != "constants"]  # what the slow way lumps together
        assert by != "layer" or set(branches_of(original)) <= set(labels)
        expected = contributions(original, images, direction, labels)
        for label in labels:
            assert_same(parts[label] @ direction, expected[label])


# --- scores by token ------------------------------------------------------------------------------------------------


def size_before(original, images, block):
    """Rows, columns and channels of what a block is given."""
    seen = []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        original(images[:1])
    hook.remove()
    return seen[0]


def cut_by(block, grid):
    """The windows into which the library's own code cuts a grid of numbers [row, column], one tensor an attention."""
    cut = next(
        getattr(block, name) for name in ("_attn", "_shifted_window_attn", "_partition_attn") if hasattr(block, name)
    )
    channels_first = type(block).__name__ == "PartitionAttention2d"
    seen = []

    def note(x, mask=None):
        seen.append(x)
        return x

    with ExitStack() as stack:
        for attn in attentions_of(block):
            stack.enter_context(mock.patch.object(attn, "forward", note))
        cut(grid[None, None] if channels_first else grid[None, :, :, None])
    return [windows.flatten(1).long() for windows in seen]


def numbers_in_windows(original, images, number):
    """Which token of the package each token of each window is: one tensor [window, token] for every attention.

    The package numbers the tokens of the image row by row. Those of a padding come before: first what is to the right
    of the image, then what is below it.
    """
    block = blocks_of(original)[number]
    shape = size_before(original, images, block)
    kind = type(block).__name__
    if kind == "HieraBlock":
        return [rolled(original, number, shape[1])]
    if kind == "TransformerBlock2d":  # all of the image is one window; what goes in is pooled
        rows, columns = size_before(original, images, block.attn)[2:]
        return [torch.arange(rows * columns)[None]]
    rows, columns = shape[2:] if kind == "PartitionAttention2d" else shape[1:3]
    image = torch.arange(1, rows * columns + 1, dtype=torch.float64).view(rows, columns)
    inside = cut_by(block, image)
    padding = [windows == 0 for windows in inside]
    if not padding[0].any():
        return [windows - 1 for windows in inside]
    height, width = (
        -(-length // window) * window for length, window in zip((rows, columns), block.window_size, strict=True)
    )
    padded = torch.arange(height * width, dtype=torch.float64).view(height, width)
    places = cut_by(block, padded.roll(block.shift_size, (0, 1)))[0]  # the library rolls it back
    below, right = places // width >= rows, places % width >= columns
    assert torch.equal(below | right, padding[0])
    count = int(padding[0].sum())
    order = places + height * width * below
    numbers = inside[0] - 1 + count
    numbers[padding[0]] = order[padding[0]].argsort().argsort()
    return [numbers]


def rolled(original, number, tokens):
    """Which token of the image each token of each of Hiera's windows is."""
    block = blocks_of(original)[number]
    stream = torch.arange(tokens, dtype=torch.float64)
    in_image = original.reroll(stream[None, :, None], max(number - 1, 0)).flatten().long()
    numbers = in_image.argsort()
    if not block.attn.use_mask_unit_attn:
        return numbers[None]
    return numbers.view(block.attn.window_size * block.attn.q_stride, -1).T


def test_token_scores_equal_the_effect_of_perturbing_value_vectors(made):
    model, original, images = made
    direction = direction_for(original, images)
    tokens = attribute_tokens(model, images, torch.stack([direction.flip(0), direction]))
    heads = [label for label in tokens.labels if re.fullmatch(r"L\d+H\d+", label)]
    compared = []
    for number, block in enumerate(blocks_of(original)):
        if not attentions_of(block):
            continue
        scores = value_scores(original, images, direction, number)
        numbers = numbers_in_windows(original, images, number)
        each = len(scores) // len(numbers)
        for head, of_head in enumerate(scores):
            places = numbers[head // each].flatten()
            assert torch.equal(places.sort()[0], torch.arange(len(places)))
            expected = torch.empty(len(images), len(places), dtype=torch.float64)
            expected[:, places] = of_head.reshape(len(images), -1)
            assert_same(tokens[f"L{number}H{head}"][..., 1], expected)
            compared.append(f"L{number}H{head}")
    assert heads == compared
