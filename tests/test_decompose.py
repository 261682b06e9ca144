"""Decompositions are exact, for every variant and cut, and mean what they say."""

import re

import pytest
import torch
from eager_oracle import blocks_of, contribution, representation, value_scores
from tiny_models import TINY_MODELS, images_for, swept

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose
from vitdecomp_lens.errors import InputError

UNDEFINED = {"no_pool", "open_clip_no_pool"}  # several vectors an image: of= is needed
# What leaves the fast path somewhere, and says so: attention among channels does by token.
SLOW = {"max_pool", "gated_attention", "eva02_gated", *(name for name in TINY_MODELS if name.startswith("xcit"))}
LIVE_QUERY = {"prr_pool"}  # its pool attends with queries of the image: the pool is one component that hides the rest
EXACT = sorted(set(TINY_MODELS) - UNDEFINED - SLOW)
BY = ("layer", "head", "neuron")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def tiny(name, dtype=torch.float64):
    original = TINY_MODELS[name]().to(dtype)
    return HookedViT(original), original, images_for(name).to(dtype)


def directions_for(d_rep, count=3, dtype=torch.float64):
    return torch.randn(count, d_rep, generator=torch.Generator().manual_seed(5), dtype=dtype)


@pytest.mark.parametrize("name", swept(EXACT))
def test_contributions_sum_to_the_representation(name):
    check_sums(name, torch.float64)


@pytest.mark.parametrize("name", swept(EXACT))
def test_contributions_sum_to_the_representation_in_float32(name):
    check_sums(name, torch.float32)


def check_sums(name, dtype):
    model, _, images = tiny(name, dtype)
    expected_share = 0.0 if name in LIVE_QUERY else 1.0
    for by in BY:
        parts = decompose(model, images, by=by)
        assert parts.gap.max() < TOLERANCE[dtype]
        assert parts.coverage.share == expected_share, parts.coverage
        if by == "head":
            directions = directions_for(parts.values.shape[-1], dtype=dtype)
            tokens = attribute_tokens(model, images, directions)
            assert (tokens.sum_tokens().sum() - parts.total @ directions.T).abs().max() < (
                TOLERANCE[dtype] * parts.total.norm() * directions.norm()
            )


@pytest.mark.parametrize("name", ["class_token", "distilled", "siglip", "mean_pool_with_class_token"])
def test_contributions_sum_to_the_logits(name):
    model, original, images = tiny(name)
    for by in BY:
        parts = decompose(model, images, by=by, of="logits")
        assert parts.gap.max() < 1e-10
        torch.testing.assert_close(parts.total, original(images))


@pytest.mark.parametrize("name", ["class_token", "inner_norms", "parallel_things", "open_clip_custom_all", "siglip"])
def test_coarse_is_the_sum_of_fine(name):
    model, _, images = tiny(name)
    by_layer, by_head, by_neuron = (decompose(model, images, by=by) for by in BY)
    heads, neurons = by_head.group(by="layer"), by_neuron.group(by="layer")
    for layer in range(2):
        torch.testing.assert_close(heads[f"mlp.{layer}"], by_layer[f"mlp.{layer}"])
        torch.testing.assert_close(neurons[f"attn.{layer}"], by_layer[f"attn.{layer}"])
    torch.testing.assert_close(heads.sum(), by_layer.sum())
    torch.testing.assert_close(neurons.sum(), by_layer.sum())


def test_a_layer_is_its_heads_and_its_output_bias():
    model, _, images = tiny("layer_scale")
    by_layer, by_head = decompose(model, images, by="layer"), decompose(model, images, by="head")
    for layer in range(2):
        heads = by_head.select(kind="head", layer=layer).sum()
        torch.testing.assert_close(heads + by_head[f"blocks.{layer}.attn.proj.bias"], by_layer[f"attn.{layer}"])


NO_TOKEN_ORACLE = {"prr_pool": "its one component is the pool, whose queries are the image's: no head has a score"}


def one_vector(name):
    """What to decompose of a model, and how the oracle reads the same of the original."""
    if name not in UNDEFINED:
        return "representation", representation
    of = lambda module, images: module(images)[:, 3]  # noqa: E731
    return of, of


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def sample(labels):
    """All layers and constants, and the first and last head and neuron; not what the slow way lumps together."""
    parts = [label for label in labels if re.fullmatch(r"L\d+[HN]\d+", label)]
    return [label for label in labels if label not in parts[1:-1] and label != "constants"]


@pytest.mark.filterwarnings("ignore::vitdecomp_lens.errors.VitDecompWarning")
@pytest.mark.parametrize("name", swept(TINY_MODELS))
def test_direct_effects_equal_the_derivative_of_the_frozen_eager_module(name):
    model, original, images = tiny(name)
    of, read = one_vector(name)
    seen = set()
    for by in BY:
        parts = decompose(model, images, by=by, of=of)
        direction = directions_for(parts.values.shape[-1])[0]
        for label in sample(parts.labels):
            if label not in seen:
                assert_same(parts[label] @ direction, contribution(original, images, direction, label, read))
        seen.update(parts.labels)
    assert seen - {"constants"}


@pytest.mark.filterwarnings("ignore::vitdecomp_lens.errors.VitDecompWarning")
@pytest.mark.parametrize("name", swept(set(TINY_MODELS) - set(NO_TOKEN_ORACLE)))
def test_token_scores_equal_the_effect_of_perturbing_value_vectors(name):
    model, original, images = tiny(name)
    of, read = one_vector(name)
    directions = directions_for(read(original, images).shape[-1], count=2)
    tokens = attribute_tokens(model, images, directions, of=of)
    heads = [label for label in tokens.labels if re.fullmatch(r"L\d+H\d+", label)]
    expected = {
        f"L{layer}H{head}": scores
        for layer in range(len(blocks_of(original)))
        for head, scores in enumerate(value_scores(original, images, directions[1], layer, read))
    }
    assert heads == list(expected)
    for label in heads:
        assert_same(tokens[label][..., 1], expected[label])


@pytest.mark.parametrize("name", sorted(NO_TOKEN_ORACLE))
def test_what_has_no_token_oracle_has_no_heads(name):
    model, _, images = tiny(name)
    assert attribute_tokens(model, images, directions_for(32)).labels == ("pool.attn",)


@pytest.mark.parametrize(
    "name", ["class_token", "siglip", "mean_pool_with_class_token", "parallel_things", "open_clip_pooler"]
)
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("of", ["representation", "embedding"])
def test_scores_are_projections_of_vectors(name, by, of):
    model, _, images = tiny(name)
    parts = decompose(model, images, by=by, of=of)
    directions = directions_for(parts.values.shape[-1])
    scores = attribute(model, images, directions, by=by, of=of, names=["a", "b", "c"])
    projected = parts.project(directions)
    assert scores.labels == projected.labels
    assert scores.directions == ("a", "b", "c")
    torch.testing.assert_close(scores.values, projected.values)
    torch.testing.assert_close(scores.total, projected.total)
    tokens = attribute_tokens(model, images, directions, by=by, of=of).sum_tokens()
    torch.testing.assert_close(tokens.total, projected.total)
    for label in projected.labels:
        if by == "head" or label.startswith(("mlp", "embed", "pool")):
            torch.testing.assert_close(tokens[label], projected[label])


def test_by_token_an_attentions_output_bias_is_a_constant_of_its_own():
    model, _, images = tiny("class_token")
    directions = directions_for(32)
    tokens = attribute_tokens(model, images, directions, by="layer").sum_tokens()
    whole = attribute(model, images, directions, by="layer")
    for layer in range(2):
        torch.testing.assert_close(
            tokens[f"attn.{layer}"] + tokens[f"blocks.{layer}.attn.proj.bias"], whole[f"attn.{layer}"]
        )


def test_the_embedding_is_the_representation_on_the_unit_sphere():
    model, original, images = tiny("open_clip")
    parts = decompose(model, images, of="embedding")
    torch.testing.assert_close(parts.total, torch.nn.functional.normalize(original(images), dim=-1))
    assert parts.gap.max() < 1e-10


def test_a_hook_with_one_vector_an_image_and_a_function_can_be_decomposed():
    model, original, images = tiny("class_token")
    at_hook = decompose(model, images, of="hook_representation")
    by_function = decompose(model, images, of=lambda module, batch: module(batch)[:, :3])
    torch.testing.assert_close(at_hook.values, decompose(model, images).values)
    torch.testing.assert_close(by_function.total, original(images)[:, :3])
    assert by_function.gap.max() < 1e-10


def test_a_function_sees_what_it_reads_from_outside():
    model, original, images = tiny("class_token")
    column = [0]
    of = lambda module, batch: module(batch)[:, column[0], None]  # noqa: E731
    decompose(model, images, of=of)
    column[0] = 3
    torch.testing.assert_close(decompose(model, images, of=of).total, original(images)[:, 3:4])


def test_a_lazy_hook_can_be_decomposed():
    model, original, images = tiny("mean_pool_fc_norm")
    parts = decompose(model, images, of="ln_final.hook_normalized")
    assert parts.gap.max() < 1e-10
    torch.testing.assert_close(
        parts.total * original.fc_norm.weight + original.fc_norm.bias, decompose(model, images).total
    )


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_the_outcome_does_not_depend_on_the_batch(batch_size):
    model, _, images = tiny("mean_pool_with_class_token")
    directions = directions_for(32)
    whole = attribute_tokens(model, images, directions, batch_size=3)
    pieces = attribute_tokens(model, images, directions, batch_size=batch_size)
    torch.testing.assert_close(pieces.values, whole.values)
    alone = decompose(model, images[1:2])
    torch.testing.assert_close(alone.values[:, 0], decompose(model, images, batch_size=batch_size).values[:, 1])


def test_only_the_wanted_components_are_given_and_are_the_same():
    model, _, images = tiny("class_token")
    directions = directions_for(32)
    wanted = ["L1H2", "mlp.0", "norm.bias", "L0H3"]
    parts, scores = (
        decompose(model, images, components=wanted),
        attribute_tokens(model, images, directions, components=wanted),
    )
    whole, tokens = decompose(model, images), attribute_tokens(model, images, directions)
    assert parts.labels == tuple(wanted)
    assert not parts.complete
    for label in wanted:
        torch.testing.assert_close(parts[label], whole[label])
        torch.testing.assert_close(scores.sum_tokens()[label], tokens.sum_tokens()[label])
    torch.testing.assert_close(scores["L0H3"], tokens["L0H3"])


def test_prefix_tokens_have_scores_and_the_embedding_none_at_them():
    model, _, images = tiny("dinov2_reg")
    tokens = attribute_tokens(model, images, directions_for(32))
    assert tokens.grid.prefix == ("CLS", "reg0", "reg1")
    assert tokens["L1H0"].shape == (3, 3 + 16, 3)
    assert not tokens["embed"][:, :3].any()
    assert tokens["L1H0"][:, :3].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_float32_and_its_gap_only_reported(dtype):
    model, _, images = tiny("class_token", dtype)
    parts = decompose(model, images)
    assert parts.values.dtype == torch.float32
    assert 1e-5 < parts.gap.max() < 0.1


def test_autocast_is_decomposed_and_its_gap_only_reported():
    model, _, images = tiny("class_token", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        parts = decompose(model, images)
    assert parts.gap.max() < 0.1


def test_autocast_rounds_what_the_model_computes_and_not_what_is_read_from_it():
    model, images = HookedViT(TINY_MODELS["class_token"]()), images_for("class_token")
    u = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        parts, scores = decompose(model, images), attribute(model, images, u)
    torch.testing.assert_close(scores.values, parts.project(u).values, rtol=1e-5, atol=1e-5)


def test_a_function_may_run_the_model_once():
    model, _, images = tiny("class_token")
    for twice in (
        lambda model, images: model(images) + model(images.flip(-1)),
        lambda model, images: (model.tower.forward_features(images)[:, 0], model(images.flip(-1)))[0],
    ):
        with pytest.raises(InputError, match=r"ran more than once: hook_patch_embed was met twice.*by itself"):
            decompose(model, images, of=twice)


@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize("of", ["representation", "embedding"])
@pytest.mark.parametrize("name", ["class_token", "siglip", "mean_pool_with_class_token"])
def test_gradients_of_scores_by_token_are_finite_differences(name, of, batch_size):
    model, _, images = tiny(name)
    u = torch.randn(2, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def score(x):  # weighs every score differently, so that no two can be exchanged
        tokens = attribute_tokens(model, x, u, of=of, batch_size=batch_size)
        values = torch.cat([*(block.values.flatten() for block in tokens.blocks), tokens.untokened.values.flatten()])
        return (values**2 * torch.linspace(1, 2, len(values), dtype=values.dtype)).sum()

    step = torch.randn(images.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(x), x)
    found = float((gradient * step).sum())
    moved = [float(score(images + sign * 1e-5 * step)) for sign in (1, -1)]
    assert found == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_what_is_kept_outlives_a_later_hook_that_writes_to_it(wants_gradient):
    model, _, images = tiny("class_token")
    expected, seen = decompose(model, images, by="layer"), []
    look = ("blocks.1.hook_attn_out", lambda value, hook: seen.append(value.detach()))

    def overwrite(value, hook):
        seen.pop().zero_()

    with model.hooks([look, ("blocks.1.hook_resid_post", overwrite)]):
        parts = decompose(model, images.requires_grad_(wants_gradient), by="layer")
    assert not seen
    torch.testing.assert_close(parts["attn.1"].detach(), expected["attn.1"])


def test_no_gradient_is_kept_unless_the_images_want_one():
    model, _, images = tiny("class_token")
    assert not decompose(model, images).values.requires_grad
    images.requires_grad_()
    parts = decompose(model, images)
    score = attribute(model, images, directions_for(32)).values[0].sum() + parts["mlp.1"].sum()
    (gradient,) = torch.autograd.grad(score, images)
    assert gradient.abs().max() > 0


def test_it_runs_in_inference_mode_and_after_it():
    model, _, images = tiny("class_token")
    with torch.inference_mode():
        inside = decompose(model, images)
    torch.testing.assert_close(decompose(model, images).values, inside.values)
    assert decompose(model, images.clone().requires_grad_()).values.requires_grad


@pytest.mark.parametrize("change", ["in_place", "data", "state_dict", "replaced", "no_bias", "dtype"])
def test_weights_that_change_are_seen(change):
    model, original, images = tiny("class_token")
    decompose(model, images)
    weight = original.blocks[0].attn.proj.weight
    if change == "in_place":
        with torch.no_grad():
            weight.mul_(2)
    elif change == "data":
        weight.data.mul_(2)
    elif change == "state_dict":
        model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})
    elif change == "replaced":
        original.blocks[0].attn.proj.weight = torch.nn.Parameter(2 * weight.detach())
    elif change == "no_bias":
        original.blocks[0].attn.proj.bias = None
    else:
        model.to(torch.float32)
        images = images.to(torch.float32)
    parts = decompose(model, images)
    torch.testing.assert_close(parts.total, original.forward_head(original.forward_features(images), pre_logits=True))
    assert parts.gap.max() < TOLERANCE[images.dtype]


def test_all_is_traced_and_compiled_once(monkeypatch):
    model, _, images = tiny("class_token")
    first = decompose(model, images)
    monkeypatch.setattr("torch.export.export", lambda *a, **k: pytest.fail("traced again"))
    monkeypatch.setattr("vitdecomp_lens.frozen.graph.compile_cut", lambda *a, **k: pytest.fail("compiled again"))
    torch.testing.assert_close(decompose(model, images).values, first.values)
    assert decompose(model, images[:2]).values.shape[1] == 2


@pytest.mark.filterwarnings("ignore::vitdecomp_lens.errors.VitDecompWarning")
@pytest.mark.parametrize("name", sorted(SLOW))
def test_the_slow_way_is_exact_too(name):
    model, _, images = tiny(name)
    directions = directions_for(32)
    for by in BY:
        parts = decompose(model, images, by=by)
        assert parts.gap.max() < 1e-10
        assert parts.coverage.share == 1
    assert attribute_tokens(model, images, directions).gap.max() < 1e-9
