"""timm's MaxxVit models: what is particular to them beside what `test_staged` says of every family."""

import pytest
import torch
from PIL import Image
from staged_models import STAGED_MODELS, images_for, parametrized, shared
from timm.models.maxxvit import MaxxVit, MaxxVitCfg
from torch import nn

from vitdecomp_lens import HookedViT, decompose, verify
from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.explain import explain
from vitdecomp_lens.frozen.program import Program
from vitdecomp_lens.frozen.trace import trace

NAMES = [name for name in STAGED_MODELS if name.startswith(("max", "coat"))]
SWEPT = [name for name in parametrized(swept=True) if name.values[0] in NAMES]


# --- components and the representation ------------------------------------------------------------------------------


def test_convolutions_are_components_of_their_own():
    model, images = shared("maxvit")
    parts = decompose(model, images, by="layer")
    branches = [
        f"{kind}.{3 * unit + below}" for unit in range(3) for below, kind in enumerate(("conv", "attn", "attn"))
    ]
    assert set(branches) <= set(parts.labels)
    assert [c.layer for c in parts.components if c.kind == "conv"] == [0, 3, 6]
    assert {c.layer for c in parts.components if c.kind == "mlp"} == {1, 2, 4, 5, 7, 8}
    assert model.stages == (range(0, 3), range(3, 9))
    assert model.cfg.n_layers == 9


def test_two_attentions_side_by_side_number_their_heads_through():
    model, images = shared("maxvit_parallel")
    block = model.hooked_blocks[2]
    assert [attn.heads for attn in block.attentions.values()] == [2, 2]
    heads = [c.head for c in decompose(model, images).components if c.kind == "head" and c.layer == 2]
    assert heads == [0, 1, 2, 3]
    in_windows, in_grids = (attn.W_O for attn in block.attentions.values())
    assert in_windows[..., :4].all()
    assert not in_windows[..., 4:].any()
    assert in_grids[..., 4:].all()
    assert not in_grids[..., :4].any()


def test_the_representation_is_what_enters_the_hidden_layers_activation():
    model, images = shared("maxvit_tf")
    _, cache = model.run_with_cache(images, names_filter="hook_representation")
    original, seen = model.original, []
    handle = original.head.pre_logits.act.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    activated = original.forward_head(original.forward_features(images), pre_logits=True)
    handle.remove()
    assert torch.equal(cache["hook_representation"], seen[0])
    assert torch.equal(cache["hook_representation"].tanh(), activated)
    assert torch.equal(decompose(model, images).total, seen[0])
    assert model.run_with_cache(images)[1]["ln_final.hook_normalized"].shape == (2, 16)


def test_logits_behind_an_activation_are_refused():
    model, images = shared("maxvit_tf")
    with pytest.raises(InputError, match="activation function"):
        _ = model.W_U
    with pytest.raises(InputError, match="activation function"):
        _ = model.b_U
    with pytest.raises(InputError, match=r"activation function.*explain.*unembedding_at"):
        decompose(model, images, of="logits")


@pytest.mark.parametrize("name", ["maxvit", "coatnet"])
def test_the_classifier_reads_the_representation(name):
    model, images = shared(name)
    logits, cache = model.run_with_cache(images, names_filter="hook_representation")
    torch.testing.assert_close(cache["hook_representation"] @ model.W_U + model.b_U, logits)
    parts = decompose(model, images, by="layer", of="logits")
    assert parts.complete
    assert parts.gap.max() < 1e-10
    torch.testing.assert_close(parts.total, logits)


@pytest.mark.parametrize("name", SWEPT)
def test_the_fast_way_is_taken(name):
    model, images = shared(name)
    points = {point.hook: point.axis for point in model.component_points("head")}
    graph = trace(model, images[:1], listened=list(points))
    program = graph.program(graph.cut(list(points)), splits=points, dtype=torch.float64)
    assert type(program) is Program


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("maxvit", (48, 64)), ("maxvit", (64, 63)), ("maxvit_tf", (32, 40))])
def test_sizes_that_windows_do_not_divide_are_refused(name, size):
    model, images = shared(name)
    assert model.image_spec.multiple_of == (32, 32)
    with pytest.raises(InputError, match="multiples of 32 and 32"):
        model(images.new_zeros(1, 3, *size))


def test_other_sizes_that_windows_divide():
    model, _ = shared("maxvit")
    images = torch.randn(1, 3, 32, 96, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.equal(model(images), model.original(images))
    parts = decompose(model, images)
    assert parts.complete
    assert parts.gap.max() < 1e-10
    grid = model.token_grid(images, "blocks.4.attn.hook_v")
    assert (grid.rows, grid.columns, grid.image_size) == (4, 12, (32, 96))


def test_positions_of_a_whole_image_fix_its_size():
    model, images = shared("coatnet")
    assert model.image_spec.size == (64, 64)
    with pytest.raises(InputError, match="64"):
        model(images[:, :, :32])


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maxvit", "maxvit_channels_first", "maxvit_rmlp_not_square", "maxvit_parallel"])
def test_tokens_attend_within_their_window_or_their_grid(name):
    """A token's values reach the tokens of its window, or those a fixed number of rows and columns apart."""
    model, images = shared(name)
    attentions = [
        (f"blocks.{number}.{below}", kind)
        for number, block in enumerate(model.hooked_blocks)
        for (below, _), kind in zip(block.attentions.items(), _kinds(block), strict=True)
    ]
    assert {kind for _, kind in attentions} == {"Windows", "GridWindows"}
    for attn, kind in attentions:
        grid = model.token_grid(images, f"{attn}.hook_v")
        height, width = (64 // 16, images.shape[3] // 16)
        for row, column in [(0, 0), (grid.rows - 1, 1), (grid.rows // 2, grid.columns - 2)]:
            token = row * grid.columns + column

            def one(value, hook, token=token):
                value[:, token] += 1

            z = f"{attn}.hook_z"
            before = model.run_with_cache(images, names_filter=z)[1][z]
            with model.hooks([(f"{attn}.hook_v", one)]):
                after = model.run_with_cache(images, names_filter=z)[1][z]
            reached = (after - before).abs().sum((0, 2, 3)).unflatten(0, (grid.rows, grid.columns)) > 1e-9
            rows, columns = torch.arange(grid.rows)[:, None], torch.arange(grid.columns)[None]
            if kind == "Windows":
                expected = (rows // height == row // height) & (columns // width == column // width)
            else:
                apart = (grid.rows // height, grid.columns // width)
                expected = (rows % apart[0] == row % apart[0]) & (columns % apart[1] == column % apart[1])
            assert torch.equal(reached, expected), (attn, kind, row, column)


def _kinds(block):
    return [type(windows).__name__ for windows in block.windows] if block.attentions else []


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_what_the_hooks_show(name):
    model, images = shared(name)
    _, cache = model.run_with_cache(images)
    for number, block in enumerate(model.hooked_blocks):
        if not block.attentions:
            continue
        here = lambda hook, number=number: cache[f"blocks.{number}.{hook}"]  # noqa: E731
        first = here("ln1.hook_normalized") * block.ln1.w + block.ln1.b
        second = here("ln2.hook_normalized") * block.ln2.w + block.ln2.b
        for below, attn in block.attentions.items():
            if first.shape[1] != here(f"{below}.hook_q").shape[1]:
                continue  # tokens are pooled between the norm and the attention
            for kind, weight, bias in (("q", attn.W_Q, attn.b_Q), ("k", attn.W_K, attn.b_K), ("v", attn.W_V, attn.b_V)):
                expected = torch.einsum("btm,hmd->bthd", first, weight) + bias
                torch.testing.assert_close(here(f"{below}.hook_{kind}"), expected)
        written = sum(
            torch.einsum("bthd,hdm->btm", here(f"{below}.hook_z"), attn.W_O) + attn.b_O
            for below, attn in block.attentions.items()
        )
        torch.testing.assert_close(here("hook_attn_out"), written)
        mlp = block.mlps_by_name["mlp"]
        torch.testing.assert_close(here("mlp.hook_pre"), second @ mlp.W_in + mlp.b_in)
        torch.testing.assert_close(here("hook_mlp_out"), here("mlp.hook_post") @ mlp.W_out + mlp.b_out)
        assert mlp.d_mlp == here("mlp.hook_post").shape[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_is_the_sum_of_what_is_added(name):
    model, images = shared(name)
    _, cache = model.run_with_cache(images)
    for number, block in enumerate(model.hooked_blocks):
        here = lambda hook, number=number: cache[f"blocks.{number}.{hook}"]  # noqa: E731
        before, after = here("hook_resid_pre"), here("hook_resid_post")
        if before.shape == after.shape and block.attentions:
            torch.testing.assert_close(after, before + here("hook_attn_out") + here("hook_mlp_out"))
        elif before.shape == after.shape:
            torch.testing.assert_close(after, before + here("hook_conv_out"))
        else:
            assert 4 * after.shape[1] == before.shape[1]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_separate_inputs_of_heads_are_refused():
    model, _ = shared("maxvit")
    with pytest.raises(InputError, match="Separate inputs"):
        model.set_use_split_qkv_input(True)


def test_a_model_of_convolutions_alone_is_refused():
    cfg = MaxxVitCfg(embed_dim=(8, 16), depths=(1, 1), block_type=("C", "C"), stem_width=8)
    with pytest.raises(UnsupportedModelError, match="no attention"):
        HookedViT(MaxxVit(cfg, img_size=32).eval())


def test_an_unknown_part_is_refused_by_name():
    class OwnAttention(nn.Module):
        def forward(self, x, shared_rel_pos=None):
            return x

    model = STAGED_MODELS["maxvit"]()
    model.stages[1].blocks[0].attn_grid.attn = OwnAttention()
    with pytest.raises(UnsupportedModelError, match="OwnAttention"):
        HookedViT(model)


@pytest.mark.sweep
def test_a_logit_behind_an_activation_function_is_explained_with_that_frozen(tmp_path):
    module = STAGED_MODELS["maxvit_tf"]().float()
    module.pretrained_cfg = {"input_size": (3, 64, 64), "crop_pct": 1.0}
    model, photograph = HookedViT(module), Image.new("RGB", (80, 70), (200, 30, 90))
    for relative in (False, True):
        (found,) = explain(model, [photograph], class_=3, relative=relative, class_names=[*"abcde"])
        logits = model(model.preprocess([photograph]))[0]
        expected = logits[3] - (logits.mean() if relative else 0)
        assert found.logit == pytest.approx(float(expected), rel=1e-5)
        assert sum(one.score for one in found.contributions) == pytest.approx(float(expected), rel=1e-4)
        assert "classifier's bias" in [one.component for one in found.contributions]
        assert found.gap < 1e-5


def test_the_frozen_classifier_is_the_classifier_at_its_image_and_only_there():
    model, images = shared("maxvit_tf")
    logits, cache = model.run_with_cache(images, names_filter="hook_representation")
    first, second = cache["hook_representation"]
    weight, bias = model.unembedding_at(first)
    torch.testing.assert_close(first @ weight + bias, logits[0])
    assert not torch.allclose(second @ weight + bias, logits[1])
    torch.testing.assert_close(torch.zeros_like(first) @ model.unembedding_at(torch.zeros_like(first))[0] + bias, bias)


@pytest.mark.sweep
def test_a_certificate_says_that_logits_behind_an_activation_function_were_not_decomposed():
    certificate = verify(HookedViT(STAGED_MODELS["maxvit_tf"]().float()), images_for("maxvit_tf", dtype=torch.float32))
    assert certificate.supported
    assert {cut.of for cut in certificate.cuts} == {"representation"}
    assert "Logits were not decomposed" in str(certificate)


def test_without_a_classifier_the_activation_function_is_still_behind_the_representation():
    module = STAGED_MODELS["maxvit_tf"]()
    module.reset_classifier(0)
    model = HookedViT(module)
    assert model.has_activation_before_classifier == (module.head.hidden_size is not None)
