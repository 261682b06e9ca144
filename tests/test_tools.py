"""Each row of docs/tools.md: a tool of TransformerLens on hooked vision transformers, against ours or by hand."""

import re
from functools import partial
from pathlib import Path

import pandas
import pytest
import torch
from staged_models import STAGED_MODELS
from staged_models import images_for as staged_images_for
from tiny_models import TINY_MODELS, images_for
from transformer_lens import FactoredMatrix, SVDInterpreter, patching
from transformer_lens.head_detector import detect_head
from transformer_lens.tools import analysis

import vitdecomp_lens
from vitdecomp_lens import HookedViT, attribute, decompose, testbed
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.testbed.banks import text_bank

PAGE = Path(vitdecomp_lens.__file__).parent.parent / "docs" / "tools.md"
EXACT = {"rtol": 1e-10, "atol": 1e-10}
STORED = {"rtol": 1e-5, "atol": 1e-5}  # patching keeps what it measures in float32
LAST = "blocks.3.hook_resid_post"
Z = "blocks.0.attn.hook_z"
COLOURS = testbed.ATTRIBUTES["colour"]


def scenes(count=3, seed=0):
    return testbed.normalised(testbed.Scenes("test", seed=seed, size=count).images(range(count))).double()


@pytest.fixture(scope="module")
def models():
    return {name: testbed.load(name).double() for name in ("deit", "clip")}


@pytest.fixture(scope="module", params=["deit", "clip"])
def ran(request, models):
    """A model of the testbed, images, and the cache of its run."""
    model, images = models[request.param], scenes()
    return model, images, model.run_with_cache(images)[1]


@pytest.fixture(scope="module")
def directions():
    """Of texts, in the space of the testbed's CLIP."""
    bank = text_bank(testbed.load_original("clip"), [f"a {colour} star" for colour in COLOURS])
    return bank.directions.double()


@pytest.fixture
def tiny():
    """Two blocks of four heads, on 17 tokens, with LayerScale."""
    return HookedViT(TINY_MODELS["layer_scale"]()).double()


def pair():
    """Clean and corrupted images of the tiny model."""
    return images_for("layer_scale", 2).double(), images_for("layer_scale", 2, seed=2).double()


def read_out(model, cache, stack):
    """What a stack of the class token's stream writes into the representation, as `decompose` has it."""
    normalised = cache.apply_ln_to_stack(stack, pos_slice=0)
    is_clip = model.W_U.shape[1] == len(cache["hook_representation"][0])
    return normalised @ model.fold_ln().W_U if is_clip else normalised * model.ln_final.w


def third(logits):
    return logits[:, 3].mean()


def putting(source, *where):
    """A hook that puts a part of another value into a value."""

    def put(value, hook):
        value = value.clone()
        value[where] = source[where]
        return value

    return put


EVERY = slice(None)


# Running -----------------------------------------------------------------------------------------------------------


def test_hooks_and_contexts(tiny):
    images, _ = pair()
    expected, seen = tiny(images), []

    def note(value, hook):
        hook.ctx["shape"] = value.shape
        seen.append(hook.name)

    with tiny.hooks([(Z, note)]):
        assert torch.equal(tiny(images), expected)
    assert tiny.hook_dict[Z].ctx["shape"] == (2, 17, 4, 8)
    tiny.clear_contexts()
    assert not tiny.hook_dict[Z].ctx
    tiny.add_hook(lambda name: name.endswith("hook_z"), note)
    tiny.add_perma_hook("hook_representation", note)
    assert set(tiny.list_hooks()) == {Z, "blocks.1.attn.hook_z", "hook_representation"}
    tiny.reset_hooks()
    assert set(tiny.list_hooks()) == {"hook_representation"}
    tiny.reset_hooks(including_permanent=True)
    assert not tiny.list_hooks()
    assert seen == [Z]
    halved = tiny.run_with_hooks(images, fwd_hooks=[("hook_representation", lambda value, hook: value / 2)])
    torch.testing.assert_close(halved - tiny.b_U, (expected - tiny.b_U) / 2, **EXACT)


def test_run_with_cache(tiny):
    images, _ = pair()
    logits, cache = tiny.run_with_cache(images)
    torch.testing.assert_close(logits, tiny(images), **EXACT)
    torch.testing.assert_close(cache["z", 0], cache[Z], rtol=0, atol=0)
    assert cache.stack_activation("z").shape == (2, 2, 17, 4, 8)
    part = cache.apply_slice_to_batch_dim([1])
    assert torch.equal(part[Z], cache[Z][1:])
    assert torch.equal(part.decompose_resid(), cache.decompose_resid()[:, 1:])
    with pytest.raises(UnknownNameError):
        tiny.run_with_cache(images, names_filter="hook_zz")


# The cache ---------------------------------------------------------------------------------------------------------


def test_decompose_resid(ran):
    model, images, cache = ran
    stack, labels = cache.decompose_resid(return_labels=True, pos_slice=0)
    torch.testing.assert_close(cache.decompose_resid().sum(0), cache[LAST], **EXACT)
    ours = decompose(model, images, by="layer")
    written = dict(zip(labels, read_out(model, cache, stack), strict=True))
    for layer in range(4):
        torch.testing.assert_close(written[f"{layer}_attn_out"], ours[f"attn.{layer}"], **EXACT)
        torch.testing.assert_close(written[f"{layer}_mlp_out"], ours[f"mlp.{layer}"], **EXACT)


def test_accumulated_resid(ran):
    _, _, cache = ran
    stream, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels[:3] == ["0_pre", "0_mid", "1_pre"]
    parts = cache.decompose_resid(incl_embeds=False)
    torch.testing.assert_close(stream[1:] - stream[:-1], parts, **EXACT)
    torch.testing.assert_close(stream[-1], cache[LAST], **EXACT)


def test_stack_head_results(ran):
    model, images, cache = ran
    stack, labels = cache.stack_head_results(pos_slice=0, return_labels=True)
    ours = decompose(model, images, by="head").select(kind="head")
    assert labels == list(ours.labels)
    torch.testing.assert_close(read_out(model, cache, stack), ours.values, **EXACT)


def test_stack_neuron_results(ran):
    model, images, cache = ran
    stack, labels = cache.stack_neuron_results(-1, pos_slice=0, return_labels=True)
    ours = decompose(model, images, by="neuron").select(kind="neuron")
    assert labels == [f"L{component.layer}N{component.neuron}" for component in ours.components]
    torch.testing.assert_close(read_out(model, cache, stack), ours.values, **EXACT)


@pytest.mark.parametrize("expand_neurons", [False, True])
def test_get_full_resid_decomposition(ran, expand_neurons):
    _, _, cache = ran
    stack, labels = cache.get_full_resid_decomposition(expand_neurons=expand_neurons, pos_slice=0, return_labels=True)
    assert len(stack) == len(labels) == len(set(labels))
    torch.testing.assert_close(stack.sum(0), cache[LAST][:, 0], **EXACT)


def test_apply_ln_to_stack(ran):
    _, _, cache = ran
    normalised = cache.apply_ln_to_stack(cache.decompose_resid(pos_slice=0), pos_slice=0)
    torch.testing.assert_close(normalised.sum(0), cache["ln_final.hook_normalized"][:, 0], **EXACT)


def test_logit_attrs(models):
    model, images = models["deit"], scenes()
    logits, cache = model.run_with_cache(images)
    stack, labels = cache.stack_head_results(pos_slice=0, incl_remainder=True, return_labels=True)
    for token in (3, torch.tensor([3, 9, 27])):
        scores = cache.logit_attrs(stack, token, pos_slice=0)
        of_each = torch.as_tensor(token).expand(3)
        ours = attribute(model, images, model.W_U.T, by="head").select(labels=labels[:-1])
        torch.testing.assert_close(scores[:-1], ours.values[:, torch.arange(3), of_each], **EXACT)
        constant = model.fold_ln().b_U[of_each]
        torch.testing.assert_close(scores.sum(0) + constant, logits[torch.arange(3), of_each], **EXACT)
    assert not torch.allclose(model.tokens_to_residual_directions(3), model.W_U[:, 3])
    with pytest.raises(InputError, match="Classes are numbers"):
        cache.logit_attrs(stack, "red", pos_slice=0)


def test_direct_logit_attribution(models, directions):
    images = scenes()
    found = analysis.direct_logit_attribution(models["deit"], images, 3, pos=0, unit="head")
    ours = attribute(models["deit"], images, models["deit"].W_U.T[[3]], by="head").select(kind="head")
    torch.testing.assert_close(found.attribution[:-1], ours.values[..., 0], **EXACT)
    found = analysis.direct_logit_attribution(models["clip"], images, directions[2], pos=0)
    ours = attribute(models["clip"], images, directions[[2]], by="layer")
    torch.testing.assert_close(found.attribution[found.labels.index("2_mlp_out")], ours["mlp.2"][..., 0], **EXACT)
    with pytest.raises(InputError, match="here it is the last patch"):
        analysis.direct_logit_attribution(models["deit"], images, 3)


def test_logit_lens(models):
    model, images = models["deit"], scenes()
    logits, cache = model.run_with_cache(images)
    lens = cache.logit_lens(positions=0)
    torch.testing.assert_close(lens.values[-1], logits, **EXACT)
    by_hand = model.original.head(model.original.norm(cache["blocks.2.hook_resid_pre"][:, 0]))
    torch.testing.assert_close(lens.values[lens.labels.index("2_pre")], by_hand, **EXACT)
    ranks = cache.logit_lens(positions=0, targets=3).rank_trajectory()
    assert torch.equal(ranks[-1], (logits > logits[:, [3]]).sum(1))
    with pytest.raises(InputError, match="here it is the last patch"):
        cache.logit_lens()


def test_logit_lens_with_frozen_scale(models):
    """With the statistics of the last layer, each step of the lens is what `attribute` says that a branch writes."""
    model, images = models["deit"], scenes()
    _, cache = model.run_with_cache(images)
    steps = cache.logit_attrs(cache.accumulated_resid(incl_mid=True, pos_slice=0), 3, pos_slice=0).diff(dim=0)
    ours = attribute(model, images, model.W_U.T[[3]], by="layer")
    branches = [f"{kind}.{layer}" for layer in range(4) for kind in ("attn", "mlp")]
    torch.testing.assert_close(steps, torch.stack([ours[label][:, 0] for label in branches]), **EXACT)


def test_logit_lens_on_texts(models, directions):
    model, images = models["clip"], scenes()
    embedding, cache = model.run_with_cache(images)
    lens = cache.logit_lens(positions=0)
    torch.testing.assert_close(lens.values[-1] @ directions.T, embedding @ directions.T, **EXACT)
    tower = model.original
    by_hand = tower.ln_post(cache["blocks.2.hook_resid_pre"][:, 0]) @ tower.proj
    torch.testing.assert_close(lens.values[2] @ directions.T, by_hand @ directions.T, **EXACT)
    attributed = cache.logit_attrs(cache.stack_head_results(pos_slice=0), directions[4], pos_slice=0)
    ours = attribute(model, images, directions[[4]], by="head").select(kind="head")
    torch.testing.assert_close(attributed, ours.values[..., 0], **EXACT)


def test_logit_readout(models):
    model, vectors = models["deit"], torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).double()
    found = analysis.logit_readout(model, vectors).values
    torch.testing.assert_close(found, model.original.head(model.original.norm(vectors)), **EXACT)


# Patching ----------------------------------------------------------------------------------------------------------


def test_patching_of_all_positions(tiny):
    clean, corrupted = pair()
    _, cache = tiny.run_with_cache(clean)
    found = patching.get_act_patch_attn_head_all_pos_every(tiny, corrupted, cache, third)
    assert found.shape == (5, 2, 4)
    for row, name in enumerate(("z", "q", "k", "v", "pattern")):
        for layer, head in ((0, 1), (1, 3)):
            hook = f"blocks.{layer}.attn.hook_{name}"
            where = (EVERY, head) if name == "pattern" else (EVERY, EVERY, head)
            by_hand = third(tiny.run_with_hooks(corrupted, fwd_hooks=[(hook, putting(cache[hook], *where))]))
            torch.testing.assert_close(found[row, layer, head].double(), by_hand, **STORED)


def test_patching_by_patch(tiny):
    clean, corrupted = pair()
    _, cache = tiny.run_with_cache(clean)
    handle = tiny.to_tokens(corrupted)
    assert torch.equal(tiny(handle), tiny(corrupted))
    heads = patching.get_act_patch_attn_head_out_by_pos(tiny, handle, cache, third)
    stream = patching.get_act_patch_resid_pre(tiny, handle, cache, third)
    assert (heads.shape, stream.shape) == ((2, 17, 4), (2, 17))
    for layer, token, head in ((0, 5, 2), (1, 0, 3)):
        hook = f"blocks.{layer}.attn.hook_z"
        run = partial(tiny.run_with_hooks, corrupted)
        by_hand = third(run(fwd_hooks=[(hook, putting(cache[hook], EVERY, token, head))]))
        torch.testing.assert_close(heads[layer, token, head].double(), by_hand, **STORED)
        hook = f"blocks.{layer}.hook_resid_pre"
        by_hand = third(run(fwd_hooks=[(hook, putting(cache[hook], EVERY, token))]))
        torch.testing.assert_close(stream[layer, token].double(), by_hand, **STORED)
    assert tiny.to_str_tokens(corrupted)[:3] == ["CLS", "r0c0", "r0c1"]


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_path_patching(tiny, component):
    clean, corrupted = pair()
    _, there = tiny.run_with_cache(clean)
    _, here = tiny.run_with_cache(corrupted)
    found = patching.get_act_patch_direct_path(tiny, corrupted, there, here, third, 0, 1, component, verbose=False)
    assert "blocks.0.hook_q_input" not in tiny.hook_dict  # as it was
    first, second = tiny.blocks[0].attn, tiny.blocks[1]
    change = (there[Z] - here[Z])[:, :, 1] @ first.W_O[1]
    moved = second.ln1(here["blocks.1.hook_resid_pre"] + change)
    letter = component.upper()
    weight, bias = getattr(second.attn, f"W_{letter}"), getattr(second.attn, f"b_{letter}")
    values = torch.einsum("btd,hde->bthe", moved, weight) + bias
    hook = f"blocks.1.attn.hook_{component}"
    for head in range(4):
        by_hand = third(tiny.run_with_hooks(corrupted, fwd_hooks=[(hook, putting(values, EVERY, EVERY, head))]))
        torch.testing.assert_close(found[1, head].double(), by_hand, **STORED)


def slope(model, corrupted, hook, change):
    """How fast the answer changes when a value is moved along a change, by a derivative in forward mode."""

    def at(step):
        return third(model.run_with_hooks(corrupted, fwd_hooks=[(hook, lambda value, hook: value + step * change)]))

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(at(step), step)[0]


def test_attribution_patching(tiny):
    clean, corrupted = (tiny.to_tokens(images[:1]) for images in pair())
    found = analysis.attribution_patch(tiny, clean, corrupted, third).node_scores
    assert len(found) == 17 * (1 + 2 * 5)
    change = tiny.run_with_cache(clean)[1][Z] - tiny.run_with_cache(corrupted)[1][Z]
    for token, head in ((0, 2), (7, 1)):
        alone = torch.zeros_like(change)
        alone[:, token, head] = change[:, token, head]
        node = analysis.Node("attn_head_out", token, layer=0, head=head)
        assert found[node] == pytest.approx(float(slope(tiny, corrupted, Z, alone)), rel=1e-9, abs=1e-12)


def test_attribution_patching_of_edges(tiny):
    clean, corrupted = (tiny.to_tokens(images[:1]) for images in pair())
    edges = analysis.EdgeAttributionConfig(granularity="edge")
    found = analysis.attribution_patch(tiny, clean, corrupted, third, edges)
    nodes = analysis.attribution_patch(tiny, clean, corrupted, third).node_scores
    assert found.node_scores.keys() == nodes.keys()
    for node, score in found.node_scores.items():
        assert score == pytest.approx(nodes[node], rel=1e-8, abs=1e-10)
    everything = list(found.edge_scores)
    whole = analysis.faithfulness(tiny, clean, corrupted, third, everything)
    assert whole.recovered == pytest.approx(1, abs=1e-9)
    assert analysis.faithfulness(tiny, clean, corrupted, third, []).recovered == pytest.approx(0, abs=1e-9)
    held_out = tiny.to_tokens(images_for("layer_scale", 2, seed=5).double())
    mean = analysis.FaithfulnessConfig("mean")
    kept = analysis.faithfulness(tiny, clean, corrupted, third, everything, mean, mean_tokens=held_out)
    assert kept.recovered == pytest.approx(1, abs=1e-9)
    assert not {"blocks.0.hook_mlp_in", "blocks.0.attn.hook_result"} & set(tiny.hook_dict)  # as it was


def test_edges_of_the_embedding_before_a_norm():
    """Where a norm follows the embedding, all edges but those from it add up."""
    model = HookedViT(TINY_MODELS["open_clip"]()).double()
    clean, corrupted = (model.to_tokens(images[:1]) for images in pair())
    edges = analysis.EdgeAttributionConfig(granularity="edge")
    found = analysis.attribution_patch(model, clean, corrupted, third, edges).node_scores
    nodes = analysis.attribution_patch(model, clean, corrupted, third).node_scores
    off = {node.kind for node, score in found.items() if score != pytest.approx(nodes[node], rel=1e-8, abs=1e-10)}
    assert off == {"embed"}


# Weights -----------------------------------------------------------------------------------------------------------


def test_svd_interpreter(models):
    model = models["deit"]
    attn, mlp = model.blocks[3].attn, model.blocks[3].mlp
    interpreter = SVDInterpreter(model)
    values = torch.linalg.svdvals(attn.W_V[1] @ attn.W_O[1])[:16]
    torch.testing.assert_close(FactoredMatrix(attn.W_V[1], attn.W_O[1]).S, values, **EXACT)
    for kind, matrix in (
        ("OV", attn.W_V[1] @ attn.W_O[1]),
        ("w_in", mlp.W_in.T * model.blocks[3].ln2.w),
        ("w_out", mlp.W_out),
    ):
        found = interpreter.get_singular_vectors(kind, 3, 4, head_index=1)[:, 0]
        right = torch.linalg.svd(matrix).Vh[:4]
        torch.testing.assert_close(found.abs(), (right @ model.fold_ln().W_U).abs().T, **EXACT)


def test_head_subspace_affinity(models):
    model = models["deit"]
    found = analysis.attention_head_subspace_affinity(model, target_role="V")
    written = torch.linalg.qr(model.blocks[1].attn.W_O[2].T).Q
    read = torch.linalg.qr(model.blocks[3].attn.W_V[0]).Q
    torch.testing.assert_close(found.scores[1, 2, 3, 0], (written.T @ read).square().sum(), **EXACT)


# Subspaces ---------------------------------------------------------------------------------------------------------


def test_interchange(tiny):
    images, source = pair()
    hook, first = "blocks.0.hook_resid_post", torch.zeros(2, dtype=torch.long)
    there = analysis.collect_activations(tiny, hook, source, tiny, positions=first)
    torch.testing.assert_close(there, tiny.run_with_cache(source)[1][hook][:, 0], **EXACT)
    basis = analysis.random_basis(32, 3, seed=0).double()
    step = analysis.SubspaceInterchange(basis)
    found = analysis.intervened_logits(tiny, hook, step, images, there, tiny, positions=first)

    def by_hand(value, hook):
        value = value.clone()
        value[:, 0] += (there - value[:, 0]) @ basis @ basis.T
        return value

    expected = tiny.run_with_hooks(images, fwd_hooks=[(hook, by_hand)])
    torch.testing.assert_close(found, expected, **EXACT)
    assert (found - tiny(images)).abs().max() > 1e-3
    targets = tiny(source).argmax(1)
    learned = analysis.fit_das(tiny, "hook_representation", images, source, targets, tiny, rank=8, epochs=10)
    assert learned.losses[-1] < learned.losses[0]


def test_sparse_probing(models):
    pictures = testbed.Scenes("test", seed=3, size=200)
    red = pictures.labels("colour", range(200)) == COLOURS.index("red")
    images = testbed.normalised(pictures.images(range(200))).double()
    hook = "blocks.3.mlp.hook_post"
    with torch.no_grad():
        _, cache = models["deit"].run_with_cache(images, names_filter=hook)
    found = analysis.fit_sparse_probe(cache[hook][:, 0], red, k=3)
    assert len(found.selected_features) == 3
    assert found.metrics.roc_auc > 0.75


# What is for text --------------------------------------------------------------------------------------------------


def test_tools_for_text(tiny):
    with pytest.raises(InputError, match="Images must be a tensor"):
        detect_head(tiny, "a text", "previous_token_head")
    with pytest.raises(TypeError, match="TransformerBridge"):
        analysis.JacobianLens.fit(tiny, ["a text"], corpus="none")
    assert not hasattr(tiny, "generate")


# Models that a tool does not fit -----------------------------------------------------------------------------------

STAGED = ("swin", "maxvit", "hiera")
OF_ONE_WIDTH = {
    "decompose_resid": lambda model, images, cache: cache.decompose_resid(),
    "accumulated_resid": lambda model, images, cache: cache.accumulated_resid(),
    "stack_head_results": lambda model, images, cache: cache.stack_head_results(),
    "compute_head_results": lambda model, images, cache: cache.compute_head_results(),
    "stack_neuron_results": lambda model, images, cache: cache.stack_neuron_results(-1),
    "get_full_resid_decomposition": lambda model, images, cache: cache.get_full_resid_decomposition(),
    "apply_ln_to_stack": lambda model, images, cache: cache.apply_ln_to_stack(torch.zeros(1)),
    "logit_attrs": lambda model, images, cache: cache.logit_attrs(torch.zeros(1), 0),
    "logit_lens": lambda model, images, cache: cache.logit_lens(positions=0),
    "fold_ln": lambda model, images, cache: model.fold_ln(),
    "to_tokens": lambda model, images, cache: model.to_tokens(images),
    "to_str_tokens": lambda model, images, cache: model.to_str_tokens(images),
    "tl_parameters": lambda model, images, cache: SVDInterpreter(model),
    "blocks_with": lambda model, images, cache: analysis.attention_head_subspace_affinity(model, target_role="V"),
    "hook_mlp_in": lambda model, images, cache: model.set_use_hook_mlp_in(True),
}


@pytest.fixture(scope="module", params=STAGED)
def staged(request):
    model, images = HookedViT(STAGED_MODELS[request.param]()).double(), staged_images_for(request.param)
    return model, images, model.run_with_cache(images)[1]


@pytest.mark.parametrize("tool", OF_ONE_WIDTH)
def test_tools_that_want_one_width_say_what_to_use_instead(staged, tool):
    with pytest.raises(InputError, match=rf"{tool} takes the residual stream .* decompose\(model, images\)"):
        OF_ONE_WIDTH[tool](*staged)


def test_patching_of_models_with_stages_says_how(staged):
    model, images, cache = staged
    patch = patching.get_act_patch_attn_head_out_all_pos
    with pytest.raises(InputError, match=r"no one n_heads.*index_df="):
        patch(model, images, cache, third)
    with pytest.raises(InputError, match=r"n_heads|takes? each block for one attention|Separate inputs"):
        patching.get_act_patch_direct_path(model, images, cache, cache, third, 0, 0)
    layer = max(number for number, block in enumerate(model.blocks) if "attn" in block._modules)
    heads = pandas.DataFrame({"layer": [layer] * 2, "head": [0, model.blocks[layer].attn.heads - 1]})
    other = model.run_with_cache(images.flip(0))[1]
    found = partial(patch.func, patch_setter=patching.layer_head_vector_patch_setter, activation_name="z")(
        model, images, other, third, index_df=heads
    )
    hook = f"blocks.{layer}.attn.hook_z"
    last = (EVERY, EVERY, model.blocks[layer].attn.heads - 1)
    by_hand = third(model.run_with_hooks(images, fwd_hooks=[(hook, putting(other[hook], *last))]))
    torch.testing.assert_close(found[1].double(), by_hand, **STORED)


@pytest.mark.parametrize("name", ["cait", "xcit_tokens_norm"])
def test_class_attention_is_not_one_stream(name):
    model, images = HookedViT(TINY_MODELS[name]()), images_for(name)
    _, cache = model.run_with_cache(images)
    with pytest.raises(InputError, match="decompose_resid takes the residual stream"):
        cache.decompose_resid()
    with pytest.raises(InputError, match="to_tokens takes the residual stream"):
        model.to_tokens(images)


@pytest.mark.parametrize("name", ["post_norm", "eva_post_norm", "open_clip_custom_all"])
def test_heads_behind_a_norm_are_not_taken_for_writers(name):
    model, images = HookedViT(TINY_MODELS[name]()), images_for(name, 1)
    _, cache = model.run_with_cache(images)
    clean, edges = model.to_tokens(images), analysis.EdgeAttributionConfig(granularity="edge")
    torch.testing.assert_close(cache.decompose_resid().sum(0), cache["blocks.1.hook_resid_post"], rtol=1e-4, atol=1e-4)
    for tool in (
        cache.stack_head_results,
        cache.get_full_resid_decomposition,
        partial(cache.stack_neuron_results, -1),
        partial(patching.get_act_patch_direct_path, model, images, cache, cache, third, 0, 0, verbose=False),
        partial(analysis.attribution_patch, model, clean, clean, third, edges),
        partial(SVDInterpreter, model),
    ):
        with pytest.raises(InputError, match="a norm stands between"):
            tool()


def test_several_attentions_are_not_taken_for_one():
    model, images = HookedViT(TINY_MODELS["parallel_things"]()).double(), images_for("parallel_things").double()
    _, cache = model.run_with_cache(images)
    torch.testing.assert_close(cache.decompose_resid().sum(0), cache["blocks.1.hook_resid_post"], **EXACT)
    with pytest.raises(InputError, match="a ThingsBlock has several attentions"):
        cache.stack_head_results()


@pytest.mark.parametrize(
    ("name", "what"),
    [("siglip", "an attention pool"), ("open_clip_pooler", "an attention pool"), ("no_final_norm", "no|none")],
)
def test_read_outs_that_are_not_one_norm_say_so(name, what):
    model, images = HookedViT(TINY_MODELS[name]()), images_for(name)
    _, cache = model.run_with_cache(images)
    for tool in (model.fold_ln, partial(cache.logit_lens, positions=0), lambda: cache.logit_attrs(torch.zeros(1), 0)):
        with pytest.raises(InputError, match=what):
            tool()


def test_norms_of_pooled_tokens_want_pooled_stacks():
    model, images = (
        HookedViT(TINY_MODELS["mean_pool_fc_norm"]()).double(),
        images_for("mean_pool_fc_norm").double(),
    )
    logits, cache = model.run_with_cache(images)
    stack = cache.decompose_resid()
    for tool in (
        partial(cache.logit_attrs, stack, 3),
        partial(cache.logit_attrs, stack[:, :, 0], 3, pos_slice=0),
        partial(cache.logit_lens, positions=0),
    ):
        with pytest.raises(InputError, match="pooled"):
            tool()
    scores = cache.logit_attrs(stack.mean(2), 3)
    torch.testing.assert_close(scores.sum(0) + model.fold_ln().b_U[3], logits[:, 3], **EXACT)


def test_a_model_in_training_mode_keeps_it(tiny):
    assert not any(module.training for module in tiny.modules())
    assert HookedViT(TINY_MODELS["class_token"]().train()).training


# The page ----------------------------------------------------------------------------------------------------------


def test_the_page_has_a_row_for_each_test():
    rows = re.findall(r"^\|.*\| `(test_\w+)` \|$", PAGE.read_text(), re.MULTILINE)
    assert rows
    assert len(rows) == len(set(rows))
    assert set(rows) == {name for name in globals() if name.startswith("test_")} - {
        "test_the_page_has_a_row_for_each_test",
        "test_a_model_in_training_mode_keeps_it",
    }
