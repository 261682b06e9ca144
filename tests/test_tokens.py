"""Laws of scores by token: what they sum to, and what selecting, grouping and storing keep."""

import dataclasses
import re

import pytest
import torch
from labelled_samples import (
    COARSE,
    COARSE_LABELS,
    COVERAGE,
    FINE_LABELS,
    assert_same_tokens,
    token_block,
    token_sample,
)

from vitdecomp_lens.components import Component, TokenGrid
from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.errors import GapError, InputError, UnknownNameError
from vitdecomp_lens.tokens import TokenAttribution, TokenBlock

# ---- sums


def test_scores_sum_to_the_total_over_tokens_and_components():
    tokens = token_sample()
    assert tokens.gap.shape == (3,)
    assert tokens.gap.max() < 1e-14
    assert tokens.check_gap() is tokens


def test_a_score_that_is_off_is_found_in_its_image():
    tokens = token_sample()
    values = tokens.blocks[1].values.clone()
    values[2, 1, 5, 1] += 0.5
    off = dataclasses.replace(tokens, blocks=(tokens.blocks[0], tokens.blocks[1].with_values(values)))
    torch.testing.assert_close(off.gap[1], 0.5 / tokens.total[1].abs().max(), atol=1e-13, rtol=0)
    with pytest.raises(GapError, match=r"The components of image 1 .* worst at direction 1"):
        off.check_gap()


def test_half_precision_is_summed_in_float32():
    constants = Attribution(torch.zeros(0, 1, 1, dtype=torch.bfloat16), ())
    ones = torch.ones(1, 1, 257, 1, dtype=torch.bfloat16)  # bfloat16 has no 257, only 256 and 258
    blocks = (TokenBlock(ones, ("embed",), TokenGrid(1, 257, (1, 257))),)
    tokens = TokenAttribution(blocks, constants, torch.full((1, 1), 257.0))
    assert tokens.gap.item() == 0.0
    assert tokens.gap.dtype == torch.float32
    assert tokens.sum_tokens().values.dtype == torch.bfloat16


def test_summing_tokens_gives_the_attribution_of_the_components():
    tokens = token_sample(coverage=COVERAGE, metadata={"model": "tiny"})
    scores = tokens.sum_tokens()
    assert scores.labels == (*FINE_LABELS, *COARSE_LABELS, "norm.bias", "head.bias")
    for label in tokens:
        torch.testing.assert_close(scores[label], tokens[label].sum(1), atol=1e-14, rtol=0)
    assert torch.equal(scores["norm.bias"], tokens.untokened["norm.bias"])
    assert (scores.coverage, scores.metadata) == (COVERAGE, {"model": "tiny"})
    assert scores.directions == tokens.directions == ("a dog", "a cat")
    assert torch.equal(scores.total, tokens.total)
    scores.check_gap()


# ---- looking, selecting, grouping


def test_labels_find_their_rows_in_every_block():
    tokens = token_sample()
    assert tokens.labels == tuple(tokens) == (*FINE_LABELS, *COARSE_LABELS)
    assert len(tokens) == 9
    assert "L1H2" in tokens
    assert "norm.bias" not in tokens
    assert torch.equal(tokens["L0N0"], tokens.blocks[0].values[3])
    assert torch.equal(tokens["L1H2"], tokens.blocks[1].values[2])


def test_a_component_without_tokens_is_named_as_such():
    with pytest.raises(UnknownNameError) as caught:
        token_sample()["norm.bias"]
    assert str(caught.value) == "The component 'norm.bias' has no tokens; read .untokened['norm.bias']."
    with pytest.raises(UnknownNameError, match=r"^There is no component 'L1H7'; did you mean"):
        token_sample()["L1H7"]


def test_one_block_lends_its_values_and_grid():
    tokens = token_sample(coarse_only=True)
    assert tokens.values is tokens.blocks[0].values
    assert tokens.grid == COARSE


@pytest.mark.parametrize("name", ["values", "grid"])
def test_several_blocks_have_no_values_of_their_own(name):
    with pytest.raises(InputError) as caught:
        getattr(token_sample(), name)
    assert str(caught.value) == (
        "Expected one token grid; there are 2 (4 × 6 patches: 1 embed, 2 head (layer 0), 2 neuron (layer 0); "
        "2 × 3 patches, prefix CLS, reg0: 3 head (layer 1), 1 mlp (layer 1)). Read .blocks[i].values, or select "
        "components of one grid first."
    )
    assert torch.is_tensor(token_sample().select(layer=1).values)


@pytest.mark.parametrize(
    ("criteria", "labels", "untokened"),
    [
        ({"kind": "head"}, ("L0H0", "L0H1", "L1H0", "L1H1", "L1H2"), ()),
        ({"layer": 1}, COARSE_LABELS, ()),
        ({"labels": ["mlp.1", "head.bias", "L0N1", "embed"]}, ("L0N1", "embed", "mlp.1"), ("head.bias",)),
        ({"kind": "constant"}, (), ("norm.bias", "head.bias")),
    ],
)
def test_select_keeps_the_total_and_has_a_rest(criteria, labels, untokened):
    tokens = token_sample()
    selected = tokens.select(**criteria)
    assert set(selected.labels) == set(labels)
    assert selected.untokened.labels == untokened
    assert not selected.complete
    assert selected.gap is None
    assert all(len(b) for b in selected.blocks)
    for label in labels:
        assert torch.equal(selected[label], tokens[label])
    others = [label for label in tokens.sum_tokens() if label not in (*labels, *untokened)]
    torch.testing.assert_close(selected.rest, tokens.sum_tokens().select(labels=others).sum(), atol=1e-13, rtol=0)


def test_selecting_everything_stays_complete():
    tokens = token_sample()
    everything = tokens.select(labels=tokens.sum_tokens().labels)
    assert everything.complete
    assert_same_tokens(everything, tokens)


def test_selecting_nothing_says_what_there_is():
    with pytest.raises(UnknownNameError, match=r"^No component has kind='conv'; there are 1 embed, 5 head"):
        token_sample().select(kind="conv")


def test_coarse_is_the_sum_of_fine():
    tokens = token_sample()
    layers = tokens.group(by="layer")
    assert layers.labels == ("embed", "attn.0", "mlp.0", "attn.1", "mlp.1")
    torch.testing.assert_close(layers["attn.0"], tokens["L0H0"] + tokens["L0H1"], atol=1e-14, rtol=0)
    torch.testing.assert_close(layers["mlp.0"], tokens["L0N0"] + tokens["L0N1"], atol=1e-14, rtol=0)
    assert layers.check_gap().complete
    one, other = layers.sum_tokens(), tokens.sum_tokens().group(by="layer")
    assert one.labels == other.labels
    torch.testing.assert_close(one.values, other.values, atol=1e-13, rtol=0)


def test_groups_within_one_grid_may_be_kinds_and_over_several_may_not():
    kinds = token_sample(coarse_only=True).group(by="kind")
    assert kinds.labels == ("head", "mlp")
    assert kinds.untokened.labels == ("constant",)
    with pytest.raises(InputError) as caught:
        token_sample().group(by="kind")
    assert str(caught.value) == (
        "Expected groups within one token grid; by='kind' would put 'head' on several, or on one and on none. "
        "Sum the tokens first: sum_tokens().group(by='kind')."
    )


# ---- batches and files


def test_cat_of_slices_is_identity():
    tokens = token_sample(batch=5, coverage=COVERAGE, metadata={"model": "tiny"})
    parts = [tokens.images(slice(0, 2)), tokens.images([2]), tokens.images(slice(3, None))]
    assert [len(part.total) for part in parts] == [2, 1, 2]
    assert_same_tokens(TokenAttribution.cat(parts), tokens)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (token_sample(coarse_only=True), "token grids differ"),
        (token_sample().group(by="layer"), "components differ"),
        (dataclasses.replace(token_sample(), total=None), "only one has a total"),
    ],
)
def test_batches_that_do_not_fit_are_not_concatenated(other, what):
    with pytest.raises(InputError) as caught:
        TokenAttribution.cat([token_sample(), other])
    assert str(caught.value) == (
        f"Expected batches of the same components and grids to concatenate; in 0 and 1 {what}. Attribute both with "
        f"the same model, cut and image size."
    )


def test_no_batches_and_other_directions_are_not_concatenated():
    with pytest.raises(InputError, match=r"^Expected at least one TokenAttribution to concatenate; got none\."):
        TokenAttribution.cat([])
    renamed = dataclasses.replace(token_sample().untokened, directions=("a dog", "a cow"))
    with pytest.raises(InputError, match="in 0 and 1 directions differ"):
        TokenAttribution.cat([token_sample(), dataclasses.replace(token_sample(), untokened=renamed)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [True, False])
def test_store_then_load_is_identity(tmp_path, dtype, total):
    tokens = token_sample(dtype=dtype, coverage=COVERAGE, metadata={"model": "tiny"}, complete=False)
    tokens = tokens if total else dataclasses.replace(tokens, total=None)
    tokens.save(tmp_path / "tokens.safetensors")
    assert_same_tokens(TokenAttribution.load(tmp_path / "tokens.safetensors"), tokens)


def test_no_blocks_are_stored_too(tmp_path):
    tokens = token_sample().select(kind="constant")
    tokens.save(tmp_path / "tokens.safetensors")
    assert_same_tokens(TokenAttribution.load(tmp_path / "tokens.safetensors"), tokens)


def test_to_changes_the_dtype_of_everything():
    tokens = token_sample().to(torch.float32)
    assert {b.values.dtype for b in tokens.blocks} == {torch.float32}
    assert tokens.untokened.values.dtype == tokens.total.dtype == torch.float32
    assert_same_tokens(tokens.cpu(), tokens)


# ---- what is refused when it is made


def test_a_block_needs_a_value_for_each_token_of_its_grid():
    with pytest.raises(InputError) as caught:
        TokenBlock(torch.ones(1, 1, 6, 2), ("embed",), COARSE)
    assert str(caught.value) == (
        'Expected values as Float[Tensor, "component batch token direction"] with the 8 tokens of 2 × 3 patches, '
        "prefix CLS, reg0, and at least one direction; got shape (1, 1, 6, 2)."
    )


def test_blocks_of_another_batch_or_other_directions_are_refused():
    with pytest.raises(InputError) as caught:
        TokenAttribution((token_block(COARSE, COARSE_LABELS, batch=2),), token_sample().untokened)
    assert str(caught.value) == (
        "Expected one batch and one set of directions; the untokened components have (batch, direction) = (3, 2), "
        "block 0 has (2, 2)."
    )
    with pytest.raises(InputError, match=re.escape("(3, 2), the total has (3, 1).")):
        dataclasses.replace(token_sample(), total=torch.ones(3, 1))


def test_a_label_has_one_home():
    tokens = token_sample()
    twice = dataclasses.replace(tokens.untokened, components=(Component("head", 1, 0), Component("embed")))
    with pytest.raises(InputError, match=r"^Expected labels that tell components apart; 'embed', 'L1H0' are carried"):
        dataclasses.replace(tokens, untokened=twice)


def test_a_token_attribution_shows_what_it_holds():
    assert repr(token_sample()) == (
        "TokenAttribution(complete, with total:\n"
        "  TokenBlock(component=5, batch=3, token=24 (4 × 6 patches), direction=2: "
        "1 embed, 2 head (layer 0), 2 neuron (layer 0))\n"
        "  TokenBlock(component=4, batch=3, token=8 (2 × 3 patches, prefix CLS, reg0), direction=2: "
        "3 head (layer 1), 1 mlp (layer 1))\n"
        "  without tokens: 2 constant)"
    )
