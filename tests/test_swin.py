"""Swin: attention in shifted windows and merged patches, read where they are in the image."""

import pytest
import torch
from PIL import Image
from timm.models.swin_transformer import SwinTransformer
from tiny_models import perturb

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explain import explain
from vitdecomp_lens.frozen.trace import trace
from vitdecomp_lens.hooked.windows import Windows

TINY = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
SHAPES = {
    "windows_divide": {},
    "padded_both_ways": {"img_size": 28},
    "padded_one_way": {"img_size": (32, 40)},
    "merging_pads": {"img_size": (36, 28), "depths": (2, 2, 2), "num_heads": (2, 2, 4)},
    "window_of_the_whole_grid": {"img_size": 16, "window_size": 8},
}


def model_and_images(name, dtype=torch.float64, batch=2):
    options = {**TINY, "num_classes": 5, **SHAPES[name]}
    torch.manual_seed(0)
    module = perturb(SwinTransformer(**options).eval().requires_grad_(False)).to(dtype)
    images = torch.randn(
        batch, 3, *module.patch_embed.img_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return HookedViT(module), images.to(dtype)


def directions(model, count=2):
    return torch.randn(count, model.W_U.shape[0], generator=torch.Generator().manual_seed(2), dtype=model.W_U.dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_the_originals(name):
    model, images = model_and_images(name, torch.float32)
    expected = model.original(images)
    assert torch.equal(model(images), expected)
    plain = [hook for hook in model.hook_dict if not hook.endswith(("pattern", "attn_scores", "scale", "normalized"))]
    assert torch.equal(model.run_with_cache(images, names_filter=plain)[0], expected)
    torch.testing.assert_close(model.run_with_cache(images)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", SHAPES)
def test_every_cut_is_complete_and_exact(name, dtype, tolerance):
    model, images = model_and_images(name, dtype)
    for by in ("layer", "head", "neuron"):
        for of in ("representation", "logits"):
            parts = decompose(model, images, by=by, of=of)
            assert parts.complete
            assert parts.gap.max() < tolerance
            assert parts.coverage.share == 1
        scores = attribute_tokens(model, images, directions(model), by=by)
        assert scores.gap.max() < 100 * tolerance  # relative to a score, which may be near zero
        torch.testing.assert_close(
            scores.sum_tokens().values.sum(0),
            attribute(model, images, directions(model), by=by).total,
            rtol=1e-4,
            atol=1e3 * tolerance,
        )


@pytest.mark.parametrize("name", ["windows_divide", "padded_both_ways", "merging_pads"])
def test_single_components_are_what_the_replay_gives(name):
    model, images = model_and_images(name)
    points = {p.hook: p for p in model.component_points("head")}
    graph = trace(model, images[:1], listened=list(points))
    cut, recorded = graph.cut(points), graph.record(images)
    parts = decompose(model, images)
    nothing = graph.replay(cut, recorded, {})
    for hook, node in cut.points.items():
        value = recorded[node]
        heads = range(value.shape[2]) if points[hook].axis is not None else [None]
        for head in heads:
            kept = (
                value
                if head is None
                else torch.zeros_like(value).index_copy(2, torch.tensor([head]), value[:, :, [head]])
            )
            alone = graph.replay(cut, recorded, {hook: kept}) - nothing
            component = points[hook].components(len(heads))[head or 0]
            torch.testing.assert_close(parts[component.label], alone.flatten(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_every_hook_is_live(name):
    model, images = model_and_images(name)
    model.set_use_attn_result(True)
    expected = model(images)
    for hook in model.hook_dict:
        changed = model.run_with_hooks(images, fwd_hooks=[(hook, lambda value, hook: value * 1.5 + 0.1)])
        assert not torch.allclose(changed, expected, rtol=0, atol=1e-9) or hook.endswith(("attn_scores",)), hook


def test_results_of_heads_sum_to_what_is_added():
    model, images = model_and_images("padded_both_ways")
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(images)
    for number, block in enumerate(model.hooked_blocks):
        result = cache[f"blocks.{number}.attn.hook_result"].sum(2) + block.attn.b_O
        padding = result.shape[1] - cache[f"blocks.{number}.hook_attn_out"].shape[1]
        torch.testing.assert_close(result[:, padding:], cache[f"blocks.{number}.hook_attn_out"])


def influence_of_a_pixel(model, images, hook, row, column):
    """At which tokens of a hook's value (a grid) a pixel of the image shows, blocks in between left out."""
    moved = images.clone()
    moved[:, :, row, column] += 1
    changed = model.run_with_cache(moved)[1][hook] - model.run_with_cache(images)[1][hook]
    return changed.flatten(2).abs().sum((0, 2)).nonzero()[:, 0].tolist()


def check_places(model, images, hook, pixels):
    """Each pixel shows at one token, whose rectangle holds it."""
    grid = model.token_grid(images, hook)
    for row, column in pixels:
        (token,) = influence_of_a_pixel(model, images, hook, row, column)
        top, left, bottom, right = grid.rectangle(token)
        assert top <= row < bottom
        assert left <= column < right


@pytest.mark.parametrize("name", SHAPES)
def test_a_value_stands_where_its_patch_is_whatever_the_windows(name):
    """In block 1 (shifted), values of the first stage: one pixel moves the value of the one token that holds it.

    All attention and MLPs before are silenced, so that nothing else can carry the pixel.
    """
    model, images = model_and_images(name)
    silent = [(f"blocks.0.{branch}", lambda value, hook: value * 0) for branch in ("hook_attn_out", "hook_mlp_out")]
    hook = "blocks.1.attn.hook_v"
    with model.hooks(silent):
        check_places(model, images, hook, [(0, 0), (3, 9), (images.shape[2] - 1, images.shape[3] - 1), (13, 2)])


@pytest.mark.parametrize("name", ["windows_divide", "padded_one_way", "merging_pads"])
def test_a_token_of_a_merged_stage_stands_for_the_pixels_that_reach_it(name):
    model, images = model_and_images(name)
    first = model.stages[1].start
    silent = [
        (f"blocks.{number}.{branch}", lambda value, hook: value * 0)
        for number in range(first)
        for branch in ("hook_attn_out", "hook_mlp_out")
    ]
    hook = f"blocks.{first}.hook_resid_pre"
    with model.hooks(silent):
        check_places(model, images, hook, [(0, 0), (7, 18), (images.shape[2] - 1, images.shape[3] - 1)])


@pytest.mark.parametrize("name", ["windows_divide", "padded_both_ways", "merging_pads"])
def test_scores_by_token_are_those_of_the_token_that_is_moved(name):
    """Moving one token's values along what frozen patterns pass on changes the frozen score as the map says.

    The replay of the cut at ``hook_v`` with nothing but one token's values is the score of that token.
    """
    model, images = model_and_images(name)
    points = {p.hook: p for p in model.token_points("head")}
    graph = trace(model, images[:1], listened=list(points))
    cut, recorded, u = graph.cut(points), graph.record(images), directions(model)
    scores = attribute_tokens(model, images, u)
    nothing = graph.replay(cut, recorded, {})
    for number in range(len(model.hooked_blocks)):
        hook = f"blocks.{number}.attn.hook_v"
        value = recorded[cut.points[hook]]
        for token in (0, value.shape[1] // 2, value.shape[1] - 1):
            kept = torch.zeros_like(value)
            kept[:, token, 1] = value[:, token, 1]
            alone = (graph.replay(cut, recorded, {hook: kept}) - nothing).flatten(1) @ u.T
            torch.testing.assert_close(scores[f"L{number}H1"][:, token], alone, rtol=0, atol=1e-10)


def test_windows_undo_what_the_library_does():
    for window, shift, size in [((4, 4), (2, 2), (8, 8)), ((4, 2), (1, 0), (7, 5)), ((3, 3), (1, 1), (9, 7))]:
        windows = Windows(window, shift)
        windows.see(size)
        padding = windows.padding(size)
        tokens = torch.arange(padding + size[0] * size[1]).double().expand(2, -1).unsqueeze(-1)
        like = torch.zeros(tokens.shape[1] * 2 // (window[0] * window[1]), window[0] * window[1], 1).double()
        cut = windows.restore(tokens, like)
        assert cut.shape == like.shape
        assert torch.equal(windows.show(cut), tokens)


def test_a_shifted_mask_for_any_size_is_the_librarys():
    options = {**TINY, "strict_img_size": False, "num_classes": 5}
    torch.manual_seed(0)
    module = perturb(SwinTransformer(**options).eval().requires_grad_(False)).double()
    model = HookedViT(module)
    for size in ((32, 32), (40, 24), (36, 28)):
        images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(model(images), module(images))
        assert decompose(model, images).gap.max() < 1e-10
    with pytest.raises(InputError, match="multiples of 2"):
        model(torch.zeros(1, 3, 33, 32, dtype=torch.float64))


def test_a_fixed_size_is_said():
    model, _ = model_and_images("windows_divide")
    with pytest.raises(InputError, match=r"32"):
        decompose(model, torch.zeros(1, 3, 40, 32, dtype=torch.float64))


def test_what_has_no_meaning_across_stages_says_so():
    model, _ = model_and_images("windows_divide")
    assert model.stages == (range(2), range(2, 4))
    with pytest.raises(InputError, match="another width in each stage"):
        model.accumulated_bias(3)
    with pytest.raises(InputError, match="this model has SwinBlocks"):
        model.set_use_split_qkv_input(True)


def test_explain_lays_all_grids_over_the_photograph(tmp_path):
    module = SwinTransformer(
        **{**TINY, "img_size": (36, 28), "depths": (2, 2, 2), "num_heads": (2, 2, 4)}, num_classes=5
    )
    module.pretrained_cfg = {"input_size": (3, 36, 28), "crop_pct": 1.0}
    model = HookedViT(perturb(module.eval().requires_grad_(False)))
    photograph = tmp_path / "photograph.png"
    Image.new("RGB", (60, 80), (200, 30, 90)).save(photograph)
    (found,) = explain(model, [photograph], class_=1)
    whole = sum(one.patches for one in found.contributions if one.patches is not None)
    assert float(found.heatmap.values.sum()) == pytest.approx(whole, abs=1e-5)
    assert list(found.prefix) == ["padding"]
    assert found.gap < 1e-5
