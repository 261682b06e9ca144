"""Under hooks the decomposition is that of the run with them."""

from functools import cache, partial

import pytest
import torch
from tiny_models import TINY_MODELS, _timm, images_for

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose


def fresh(name):
    return HookedViT(TINY_MODELS[name]().double()), images_for(name).double()


shared = cache(fresh)


def tiny(name="class_token"):
    """The same for tests that leave the model as it is: what takes time is to trace it."""
    return shared(name)


def direction(count=2):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def ablate_head(value, hook):
    value[:, :, 2] = 0
    return value


def test_an_ablated_head_writes_nothing_and_later_heads_react():
    model, images = tiny()
    before = decompose(model, images)
    with model.hooks([("blocks.0.attn.hook_z", ablate_head)]):
        after = decompose(model, images)
        output = model(images)
    assert not after["L0H2"].any()
    assert after.labels == before.labels
    assert not torch.allclose(after["L1H0"], before["L1H0"])
    assert not torch.allclose(after.total, before.total)
    torch.testing.assert_close(model.original.head(after.total), output)
    torch.testing.assert_close(decompose(model, images).values, before.values)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "hook", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_attn_out", "hook_full_embed"]
)
def test_what_a_hook_changes_on_the_path_is_a_component(hook, in_place):
    model, images = tiny()
    added = torch.randn(32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def add(value, hook):
        if in_place:
            value += added
            return value
        return value + added

    with model.hooks([(hook, add)]):
        parts = decompose(model, images, by="head")
        scores = attribute(model, images, direction())
        tokens = attribute_tokens(model, images, direction())
    label = f"intervention@{hook}"
    assert label in parts
    assert parts.gap.max() < 1e-10
    norm = model.original.norm
    # The vector goes through the frozen final norm of the changed run.
    centred = (added - added.mean()) * norm.weight
    ratio = parts[label] / centred
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))  # 1/σ of each image
    torch.testing.assert_close(scores[label], parts[label] @ direction().T)
    torch.testing.assert_close(tokens.sum_tokens()[label], scores[label])


def test_torchs_own_pre_hook_on_a_hook_point_counts_too():
    model, images = tiny()
    hook = "blocks.1.hook_resid_post"
    handle = model.hook_dict[hook].register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 1.5,))
    parts = decompose(model, images)
    handle.remove()
    with model.hooks([(hook, lambda value, hook: value * 1.5)]):
        expected = decompose(model, images)
    torch.testing.assert_close(parts.values, expected.values)
    assert f"intervention@{hook}" in parts


def test_a_hook_that_only_looks_is_no_component():
    model, images = tiny()
    seen = []
    with model.hooks([("blocks.0.hook_resid_post", lambda value, hook: seen.append(value.shape))]):
        parts = decompose(model, images)
    assert seen
    assert not parts.select(kind="head").complete
    assert all(component.kind != "intervention" for component in parts.components)
    assert parts.complete


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
def test_a_norms_statistic_that_a_hook_changes_is_frozen_as_changed(by):
    model, images = tiny()
    plain = decompose(model, images, by=by)
    with model.hooks([("ln_final.hook_scale", lambda value, hook: 2 * value)]):
        parts = decompose(model, images, by=by)
    assert parts.gap.max() < 1e-10
    torch.testing.assert_close(parts["embed"], plain["embed"] / 2)
    with model.hooks([("ln_final.hook_normalized", lambda value, hook: value + 1)]):
        parts = decompose(model, images, by=by)
    torch.testing.assert_close(parts["intervention@ln_final.hook_normalized"], model.original.norm.weight.expand(3, -1))
    assert parts.gap.max() < 1e-10


def test_a_changed_pattern_is_the_one_that_is_frozen():
    model, images = tiny()

    def only_the_first(pattern, hook):
        changed = torch.zeros_like(pattern)
        changed[..., 5] = 1
        return changed

    with model.hooks([("blocks.1.attn.hook_pattern", only_the_first)]):
        tokens = attribute_tokens(model, images, direction())
        scores = attribute(model, images, direction())
    assert tokens.gap.max() < 1e-10
    for head in range(4):
        by_token = tokens[f"L1H{head}"]
        assert not by_token[:, :5].any()
        assert not by_token[:, 6:].any()
        torch.testing.assert_close(by_token.sum(1), scores[f"L1H{head}"])


def test_a_changed_representation_is_a_component():
    model, images = tiny()
    with model.hooks([("hook_representation", lambda value, hook: value + 3)]):
        parts = decompose(model, images)
        logits = decompose(model, images, of="logits")
    torch.testing.assert_close(parts["intervention@hook_representation"], torch.full((3, 32), 3.0, dtype=torch.float64))
    assert parts.gap.max() < 1e-10
    assert logits.gap.max() < 1e-10


@pytest.mark.parametrize(
    "name", ["distilled", "siglip", "open_clip", "parallel_scaling", "post_norm", "mean_pool_fc_norm"]
)
def test_interventions_compose_in_every_family(name):
    model, images = tiny(name)
    hook = "blocks.1.hook_resid_pre"
    with model.hooks([(hook, lambda value, hook: 1.5 * value), ("blocks.0.hook_mlp_out", lambda value, hook: -value)]):
        parts = decompose(model, images)
    assert parts.gap.max() < 1e-10
    assert f"intervention@{hook}" in parts
    assert "intervention@blocks.0.hook_mlp_out" not in parts  # a point of the cut: its value is the component


def test_no_hook_is_left_after_an_exception():
    model, images = tiny()

    def fail(value, hook):
        raise ArithmeticError("on purpose")

    with model.hooks([("blocks.1.hook_resid_pre", fail)]), pytest.raises(ArithmeticError):
        decompose(model, images)
    assert not any(point._forward_hooks or point._forward_pre_hooks for point in model.hook_dict.values())
    assert decompose(model, images).gap.max() < 1e-10


def one_block():
    """What takes time is to trace the model for each of the hooks that it calls only if they are listened at."""
    return HookedViT(_timm(depth=1)().double()), images_for("class_token").double()


@pytest.mark.parametrize(
    "make",
    [one_block, *(pytest.param(partial(fresh, name), marks=pytest.mark.sweep) for name in ("class_token", "siglip"))],
    ids=["one_block", "class_token", "siglip"],
)
def test_every_hook_may_change_its_value_in_every_cut(make):
    model, images = make()
    model.set_use_attn_result(True)
    for hook in model.hook_dict:
        with model.hooks([(hook, lambda value, hook: 1.25 * value)]):
            parts = decompose(model, images)
            assert parts.gap.max() < 1e-10, hook
            assert attribute_tokens(model, images, direction()).gap.max() < 1e-9, hook
            torch.testing.assert_close(model.original.head(parts.total), model(images))


def test_a_hook_on_position_embeddings_is_an_intervention_beside_the_constant():
    model, images = tiny()
    plain = decompose(model, images)
    with model.hooks([("hook_pos_embed", lambda value, hook: 2 * value)]):
        parts = decompose(model, images)
    torch.testing.assert_close(parts["intervention@hook_pos_embed"], parts["pos_embed"])
    assert not torch.allclose(parts.total, plain.total)
    torch.testing.assert_close(decompose(model, images).values, plain.values)


def test_a_changed_learned_query_changes_the_frozen_pattern():
    model, images = tiny("siglip")
    plain = decompose(model, images)
    with model.hooks([("attn_pool.hook_q", lambda value, hook: -value)]):
        parts = decompose(model, images)
    assert parts.gap.max() < 1e-10
    assert parts.coverage.share == 1
    assert not torch.allclose(parts["L1H0"], plain["L1H0"])


def test_an_intervention_that_was_asked_for_is_given_even_if_it_changes_nothing():
    model, images = tiny()
    label = "intervention@blocks.1.hook_resid_post"
    with model.hooks([("blocks.1.hook_resid_post", lambda value, hook: None)]):
        parts = decompose(model, images, components=[label, "L1H0"])
    assert parts.labels == (label, "L1H0")
    assert not parts[label].any()
