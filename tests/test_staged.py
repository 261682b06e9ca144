"""Windows and stages: what holds for every model of the catalogue, whatever its family."""

import pytest
import torch
from PIL import Image
from staged_models import OVERLAP, STAGED_MODELS, images_for, parametrized, shared, size_of

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose, verify
from vitdecomp_lens.explain import explain
from vitdecomp_lens.frozen.trace import trace
from vitdecomp_lens.hooked.blocks import PostNormBlock

# With the scope of a module, all tests of one model come one after the other, whatever process they are given to.
each = pytest.mark.parametrize("name", parametrized(), scope="module")
one_of_each_kind = pytest.mark.parametrize("name", parametrized(swept=True), scope="module")
# Of what needs another trace of the model, with hooks or in another dtype.
some = pytest.mark.parametrize("name", parametrized(swept=True, of=("maxvit_tf", "hiera_not_square")), scope="module")


def model_and_images(name, dtype=torch.float64):
    return HookedViT(STAGED_MODELS[name]().to(dtype)), images_for(name, dtype=dtype)


def directions(model, images, count=2):
    d_rep = decompose(model, images[:1], by="layer").total.shape[1]
    return torch.randn(count, d_rep, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(images.dtype)


def components_alone(model, points, images):
    """What the replay gives for the first and the last component of each point of a cut, everything else being zero."""
    graph = trace(model, images[:1], listened=list(points))
    cut, recorded = graph.cut(points), graph.record(images)
    nothing = graph.replay(cut, recorded, {})
    for hook, node in cut.points.items():
        value, axis = recorded[node], points[hook].axis
        for part in sorted({0, 0 if axis is None else value.shape[axis] - 1}):  # the oracle's test has them all
            only = value if axis is None else torch.zeros_like(value)
            if axis is not None:
                only.select(axis, part).copy_(value.select(axis, part))
            yield hook, part, (graph.replay(cut, recorded, {hook: only}) - nothing).flatten(1)


@each
def test_outputs_are_the_originals(name):
    model, images = model_and_images(name, torch.float32)
    expected = model.original(images)
    assert torch.equal(model(images), expected)
    slower = ("hook_pattern", "hook_attn_scores", "hook_scale", "hook_normalized")
    plain = [hook for hook in model.hook_dict if not hook.endswith(slower)]
    assert torch.equal(model.run_with_cache(images, names_filter=plain)[0], expected)
    torch.testing.assert_close(model.run_with_cache(images)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(torch.float32, 1e-5, marks=pytest.mark.sweep), (torch.float64, 1e-10)],
    ids=["float32", "float64"],
)
@one_of_each_kind
def test_every_cut_is_complete_and_exact(name, dtype, tolerance):
    model, images = shared(name, dtype)
    u = directions(model, images)
    for by in ("layer", "head", "neuron"):
        parts = decompose(model, images, by=by)
        assert parts.complete
        assert parts.gap.max() < tolerance
        assert parts.coverage.share == 1
        scores = attribute_tokens(model, images, u, by=by)
        assert scores.coverage.share == 1
        expected = attribute(model, images, u, by=by).total
        torch.testing.assert_close(scores.sum_tokens().values.sum(0), expected, rtol=1e-4, atol=1e3 * tolerance)


@one_of_each_kind
def test_single_components_are_what_the_replay_gives(name):
    model, images = shared(name)
    points, parts = {p.hook: p for p in model.component_points("head")}, decompose(model, images)
    for hook, part, alone in components_alone(model, points, images):
        component = points[hook].components(part + 1)[part]
        torch.testing.assert_close(parts[component.label], alone, rtol=0, atol=1e-10)


@each
def test_every_hook_is_live(name):
    model, images = model_and_images(name)
    model.set_use_attn_result(True)
    expected = model(images)
    for hook in model.hook_dict:
        moved = lambda value, hook: value * 1.5 + 0.1 * torch.linspace(-1, 1, value.shape[-1]).to(value)  # noqa: E731
        changed = model.run_with_hooks(images, fwd_hooks=[(hook, moved)])
        assert not torch.allclose(changed, expected, rtol=0, atol=1e-9), hook


@each
def test_what_hooks_see_is_in_rows_of_tokens(name):
    """Every value has as many tokens as its grid says, and as many heads and channels as the configuration."""
    model, images = model_and_images(name)
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(images)
    for hook in model.hook_dict:
        kind = hook.split(".")[-1]
        if kind in ("hook_pattern", "hook_attn_scores", "hook_representation") or not hook.startswith("blocks."):
            continue
        value, grid = cache[hook], model.token_grid(images, hook)
        assert value.shape[:2] == (len(images), len(grid)), hook
        if kind in ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result"):
            assert value.dim() == 4, hook
        else:
            assert value.dim() == 3, hook


@each
def test_results_of_heads_sum_to_what_is_added(name):
    model, images = model_and_images(name)
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(images)
    for number, block in enumerate(model.hooked_blocks):
        if not block.attentions:
            continue
        result = sum(
            cache[f"blocks.{number}.{below}.hook_result"].sum(2) + attn.b_O for below, attn in block.attentions.items()
        )
        added = cache[f"blocks.{number}.hook_attn_out"]
        result = result[:, result.shape[1] - added.shape[1] :]
        # In post-norm blocks a norm stands between the heads and what is added.
        torch.testing.assert_close(block.ln1(result) if isinstance(block, PostNormBlock) else result, added)


@some
@pytest.mark.parametrize("kind", ["hook_scale", pytest.param("hook_pattern", marks=pytest.mark.sweep)])
def test_hooks_that_look_at_statistics_and_patterns_leave_requests_exact(name, kind):
    model, images = shared(name)
    u, looked = directions(model, images), []
    with model.hooks([(lambda hook: hook.endswith(kind), lambda value, hook: looked.append(hook.name))]):
        assert decompose(model, images).gap.max() < 1e-10
        scores = attribute_tokens(model, images, u)
    assert looked
    expected = attribute(model, images, u).total
    torch.testing.assert_close(scores.sum_tokens().values.sum(0), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["swin", "maxvit", "hiera_not_square"])
def test_photographs_get_the_size_that_the_model_takes(name):
    module = STAGED_MODELS[name]()
    module.pretrained_cfg = {"input_size": (3, 224, 224), "crop_pct": 0.9}
    model, photograph = HookedViT(module), Image.new("RGB", (120, 90), (200, 30, 90))
    images = model.preprocess([photograph])
    assert model(images).shape == (1, 5)
    assert name == "maxvit" or images.shape[2:] == size_of(name)
    left, top, right, bottom = model.preprocess_geometry(photograph)
    assert 0 <= left < right <= 120
    assert 0 <= top < bottom <= 90


# --- positions ------------------------------------------------------------------------------------------------------


def silenced(model, number):
    """Hooks that make blocks up to one pass on nothing but the stream itself."""
    branches = ("hook_attn_out", "hook_mlp_out", "hook_conv_out")
    names = [f"blocks.{block}.{branch}" for block in range(number + 1) for branch in branches]
    return [(name, lambda value, hook: value * 0) for name in names if name in model.hook_dict]


def seen_at(model, images, hook):
    with torch.no_grad():
        return model.run_with_cache(images, names_filter=hook)[1][hook]


def moved_patch(place):
    """A hook that changes the embedding of one patch."""

    def move(value, hook):
        value = value.clone()
        value[:, place] += torch.linspace(1, 2, value.shape[-1]).to(value)
        return value

    return [("hook_patch_embed", move)]


def values_of(name):
    """The hooks whose positions are tested: values of every attention, the stream before every block."""
    for number, block in enumerate(shared(name)[0].hooked_blocks):
        yield number, f"blocks.{number}.hook_resid_post"
        yield from ((number, f"blocks.{number}.{attn}.hook_v") for attn in block.attentions)


@each
def test_a_patch_moves_the_tokens_that_hold_it_and_no_others(name):
    """Whatever the shift, the window, the grid: with all branches silent, one patch reaches the tokens that hold it."""
    model, images = shared(name)
    start = model.token_grid(images)
    rows, columns = start.rows, start.columns
    places = [(0, 0), (1, columns - 1), (rows // 2, columns // 3), (rows - 1, columns - 1), (rows - 1, 2)]
    for number, hook in values_of(name):
        grid = model.token_grid(images, hook)
        rectangles = [(place, grid.rectangle(place)) for place in range(len(grid))]
        with model.hooks(silenced(model, number if hook.endswith("resid_post") else number - 1)):
            before = seen_at(model, images, hook)
            for row, column in places:
                token = len(start) - rows * columns + row * columns + column
                top, left, bottom, right = start.rectangle(token)
                with model.hooks(moved_patch(row * columns + column)):
                    change = seen_at(model, images, hook) - before
                found = change.flatten(2).abs().sum((0, 2)).gt(1e-12).nonzero()[:, 0].tolist()
                held = [
                    p for p, r in rectangles if r and r[0] <= top and r[1] <= left and r[2] >= bottom and r[3] >= right
                ]
                assert len(held) == 1, hook
                assert found == held or not found, hook  # a max-pool may pass on another patch
                assert found or name.startswith("hiera"), hook


@each
def test_a_patch_of_pixels_moves_its_own_embedding(name):
    model, images = shared(name)
    grid, reach = model.token_grid(images), OVERLAP.get(name[:3], 0)
    before = model.run_with_cache(images)[1]["hook_patch_embed"]
    for row, column in [(0, 0), (grid.rows // 2, grid.columns // 3), (grid.rows - 1, grid.columns - 1)]:
        token = len(grid) - grid.rows * grid.columns + row * grid.columns + column
        top, left, bottom, right = map(int, grid.rectangle(token))
        moved = images.clone()
        moved[:, :, top:bottom, left:right] += 1
        after = model.run_with_cache(moved)[1]["hook_patch_embed"]
        change = (after - before).flatten(2).abs().sum((0, 2)).unflatten(0, (grid.rows, grid.columns))
        assert change[row, column] > 0
        change[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] = 0
        assert change.max() < 1e-12


@one_of_each_kind
def test_scores_by_token_are_those_of_the_token_that_is_moved(name):
    """The replay of the cut at ``hook_v`` with nothing but one token's values is the score of that token."""
    model, images = shared(name)
    points = {p.hook: p for p in model.token_points("head") if p.axis is not None}
    u = directions(model, images)
    graph = trace(model, images[:1], listened=[p.hook for p in model.token_points("head")])
    cut = graph.cut([p.hook for p in model.token_points("head")])
    recorded, scores = graph.record(images), attribute_tokens(model, images, u)
    nothing = graph.replay(cut, recorded, {})
    for hook, point in points.items():
        value = recorded[cut.points[hook]]
        for token in (0, value.shape[1] // 2, value.shape[1] - 1):
            head = token % value.shape[2]
            kept = torch.zeros_like(value)
            kept[:, token, head] = value[:, token, head]
            alone = (graph.replay(cut, recorded, {hook: kept}) - nothing).flatten(1) @ u.T
            label = point.components(value.shape[2])[head].label
            torch.testing.assert_close(scores[label][:, token], alone, rtol=0, atol=1e-10)


@each
def test_stages_are_said(name):
    model, images = shared(name)
    assert [number for stage in model.stages for number in stage] == list(range(len(model.hooked_blocks)))
    rows, columns = size_of(name)
    sizes = {model.token_grid(images, f"blocks.{stage[-1]}.hook_resid_post").rows for stage in model.stages}
    assert len(sizes) == len(model.stages)
    assert model.token_grid(images).image_size[0] >= rows - max(rows // 4, 1)
    assert model.token_grid(images).image_size[1] >= columns - max(columns // 4, 1)


# --- uses -----------------------------------------------------------------------------------------------------------


@some
def test_a_photograph_is_explained_on_one_canvas(name):
    module = STAGED_MODELS[name]()
    module.pretrained_cfg = {"input_size": (3, *size_of(name)), "crop_pct": 1.0}
    model, photograph = HookedViT(module), Image.new("RGB", (120, 90), (200, 30, 90))
    (found,) = explain(model, [photograph], class_=1, top=3, class_names=[*"abcde"])
    with torch.no_grad():
        logit = float(model(model.preprocess([photograph]))[0, 1])
    assert sum(one.score for one in found.contributions) == pytest.approx(logit, abs=1e-5)
    from_patches = sum(one.patches for one in found.contributions if one.patches is not None)
    assert float(found.heatmap.values.sum()) == pytest.approx(from_patches, abs=1e-5)
    assert found.gap < 1e-5


@pytest.mark.sweep
@each
def test_verify_certifies(name):
    certificate = verify(HookedViT(STAGED_MODELS[name]()), images_for(name, dtype=torch.float32))
    assert certificate.supported, certificate.failures
