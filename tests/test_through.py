"""Scores through an aligner are those of mapped vectors, and by token those of each component's own directions."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from foreign_vit import ForeignViT, Shape
from labelled_samples import as_users_run_it
from staged_models import STAGED_MODELS
from staged_models import images_for as staged_images
from tiny_models import TINY_MODELS, images_for, perturb

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose, request
from vitdecomp_lens.clip import Aligner
from vitdecomp_lens.errors import GapError, InputError, VitDecompWarning
from vitdecomp_lens.frozen import graph as graphs
from vitdecomp_lens.frozen.pairs import NoFastPathError
from vitdecomp_lens.frozen.program import Program
from vitdecomp_lens.frozen.slow import ReplayedAlong
from vitdecomp_lens.request import make_request

D_CLIP = 7
MODELS = ("dinov2_reg", "distilled", "swin", "maxvit", "open_clip", "plain layer_scale")
CUTS = [(name, "head") for name in MODELS] + [(n, by) for n in ("dinov2_reg", "swin") for by in ("layer", "neuron")]
U = torch.randn(3, D_CLIP, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@dataclass
class Maps:
    """An aligner, as far as the package knows it."""

    components: tuple
    maps: torch.Tensor
    bias: torch.Tensor


def aligner_for(parts, *, seed=0):
    """Random maps for the components of a decomposition, in another order than theirs."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(len(parts), parts.values.shape[-1], D_CLIP, generator=generator, dtype=torch.float64)
    bias = torch.randn(D_CLIP, generator=generator, dtype=torch.float64)
    return Maps(parts.components[::-1], maps.to(parts.values), bias.to(parts.values))


@cache  # traces are kept on the model
def made(name):
    name, plain = name.removeprefix("plain "), name.startswith("plain ")
    model = (STAGED_MODELS if name in STAGED_MODELS else TINY_MODELS)[name]().double()
    images = staged_images(name, 3) if name in STAGED_MODELS else images_for(name, 3).double()
    return (model if plain else HookedViT(model)), images


@cache
def mapped(name, by):
    """A model, its images, an aligner, and the scores of its mapped vectors."""
    model, images = made(name)
    parts = decompose(model, images, by=by)
    aligner = aligner_for(parts)
    return model, images, aligner, parts.map(aligner).project(U)


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol * max(1.0, float(expected.abs().max())))


def directions_of(aligner, label):
    """The directions of a component in the representation."""
    row = [component.label for component in aligner.components].index(label)
    return U.to(aligner.maps) @ aligner.maps[row].T


@pytest.mark.parametrize(("name", "by"), CUTS)
def test_scores_are_those_of_mapped_vectors(name, by):
    model, images, aligner, expected = mapped(name, by)
    scores = attribute(model, images, U, through=aligner, by=by, names=["a", "b", "c"])
    assert scores.components == expected.components
    assert scores.labels[-1] == "aligner.bias"
    assert (scores.complete, scores.coverage, scores.metadata) == (True, expected.coverage, expected.metadata)
    assert scores.directions == ("a", "b", "c")
    close(scores.values, expected.values)
    close(scores.total, expected.total)
    assert scores.gap.max() < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_scores_by_token_are_those_of_each_component_along_its_own_directions(name):
    model, images, aligner, expected = mapped(name, "head")
    tokens = attribute_tokens(model, images, U, through=aligner)
    labels = [component.label for component in aligner.components]
    one_by_one = attribute_tokens(model, images, torch.cat([directions_of(aligner, label) for label in labels]))
    assert [block.grid for block in tokens.blocks] == [block.grid for block in one_by_one.blocks]
    assert tokens.labels == one_by_one.labels
    for number, label in enumerate(labels):
        mine = slice(3 * number, 3 * number + 3)
        of = one_by_one if label in one_by_one else one_by_one.untokened
        close((tokens if label in tokens else tokens.untokened)[label], of[label][..., mine])
    assert tokens.untokened.labels == (*one_by_one.untokened.labels, "aligner.bias")
    close(tokens.total, expected.total)
    summed = tokens.sum_tokens()
    assert set(summed.labels) == set(expected.labels)
    for label in expected.labels:
        close(summed[label], expected[label])
    assert tokens.complete
    assert tokens.gap.max() < 1e-12


@pytest.mark.parametrize("by", ["layer", "neuron"])
def test_by_token_constants_within_an_attention_are_read_through_its_map(by):
    model, images, aligner, expected = mapped("dinov2_reg", by)
    tokens = attribute_tokens(model, images, U, through=aligner, by=by).sum_tokens()
    plain = attribute_tokens(model, images, torch.eye(32, dtype=torch.float64), by=by).sum_tokens()
    for layer in range(2):
        attention, bias = f"attn.{layer}", f"blocks.{layer}.attn.proj.bias"
        close(tokens[bias], plain[bias] @ directions_of(aligner, attention).T)
        close(tokens[attention] + tokens[bias], expected[attention])
    close(tokens.total, expected.total)
    assert tokens.complete


def test_where_a_norm_mixes_heads_by_token_every_path_is_read_through_the_head_that_it_passes():
    model, images, aligner, expected = mapped("inner_norms", "head")
    tokens = attribute_tokens(model, images, U, through=aligner)
    close(tokens.total, expected.total)
    assert tokens.gap.max() < 1e-12
    for layer in range(2):  # a head's values reach the normed values of all: the heads' sum is the same, no head is
        inner = f"blocks.{layer}.attn.norm.bias"
        found = sum(tokens[f"L{layer}H{head}"].sum(1) for head in range(4)) + tokens.untokened[inner]
        close(found, sum(expected[f"L{layer}H{head}"] for head in range(4)))


# --- what may be asked besides ---


@pytest.mark.parametrize("name", ["dinov2_reg", "swin"])
def test_wanted_components_are_the_same_and_the_total_is_that_of_all(name):
    model, images, aligner, expected = mapped(name, "head")
    wanted = ["L1H1", "aligner.bias", "mlp.0", next(label for label in expected.labels if label.endswith("bias"))]
    scores = attribute(model, images, U, through=aligner, components=wanted)
    tokens = attribute_tokens(model, images, U, through=aligner, components=wanted)
    whole = attribute_tokens(model, images, U, through=aligner)
    assert scores.labels == tuple(wanted)
    assert not scores.complete
    assert not tokens.complete
    for label in wanted:
        close(scores[label], expected[label])
        close(tokens.sum_tokens()[label], expected[label])
    close(tokens["L1H1"], whole["L1H1"])
    close(scores.total, expected.total)
    close(tokens.total, expected.total)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_outcome_does_not_depend_on_the_batch(batch_size):
    model, images, aligner, expected = mapped("dinov2_reg", "head")
    close(attribute(model, images, U, through=aligner, batch_size=batch_size).values, expected.values)
    tokens = attribute_tokens(model, images, U, through=aligner, batch_size=batch_size)
    close(tokens.values, attribute_tokens(model, images, U, through=aligner).values)
    close(tokens.total, expected.total)


@pytest.mark.parametrize("count", [1, 16, 18])
def test_any_number_of_directions(count):
    model, images, aligner, _ = mapped("dinov2_reg", "head")
    directions = torch.randn(count, D_CLIP, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = decompose(model, images).map(aligner).project(directions)
    close(attribute(model, images, directions, through=aligner).values, expected.values)
    tokens = attribute_tokens(model, images, directions, through=aligner)
    close(tokens["L1H3"].sum(1), expected["L1H3"])
    close(tokens.total, expected.total)


@pytest.mark.parametrize("of", ["embedding", "logits"])
def test_an_aligner_for_what_else_can_be_read(of):
    model, images = made("dinov2_reg")
    parts = decompose(model, images, of=of)
    aligner = aligner_for(parts)
    expected = parts.map(aligner).project(U)
    scores = attribute(model, images, U, through=aligner, of=of)
    tokens = attribute_tokens(model, images, U, through=aligner, of=of)
    close(scores.values, expected.values)
    close(scores.total, expected.total)
    close(tokens.total, expected.total)
    close(tokens.untokened["aligner.bias"], expected["aligner.bias"])


def test_one_map_for_all_components_is_never_copied():
    model, images = made("dinov2_reg")
    parts = decompose(model, images, by="neuron")
    aligner = aligner_for(parts)
    shared = replace(aligner, maps=aligner.maps[:1].expand(len(parts), -1, -1))
    expected = parts.map(shared).project(U)
    close(attribute(model, images, U, through=shared, by="neuron").values, expected.values)
    close(attribute_tokens(model, images, U, through=shared, by="neuron").total, expected.total)


@pytest.mark.filterwarnings("ignore:.*The slow replay takes its place:vitdecomp_lens.errors.VitDecompWarning")
def test_somebody_elses_hooked_model_goes_the_slow_way_by_token():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = perturb(ForeignViT(Shape())).double()
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    aligner = aligner_for(decompose(model, images))

    def check():
        expected = decompose(model, images).map(aligner).project(U)
        close(attribute(model, images, U, through=aligner).values, expected.values)
        tokens = attribute_tokens(model, images, U, through=aligner)
        close(tokens.total, expected.total)
        for label in expected.labels:
            close(tokens.sum_tokens()[label], expected[label])

    check()
    made = make_request(model, images, "head", "representation", U, tokens=True, through=aligner)
    assert type(made.program) is ReplayedAlong
    image, found = images[:1].clone().requires_grad_(), []
    for scores in (
        decompose(model, image).map(aligner).project(U)["L1H1"],
        attribute_tokens(model, image, U, through=aligner)["L1H1"].sum(1),
    ):
        found += torch.autograd.grad(scores.square().sum(), image)
    close(found[1], found[0])
    for parameter in model.parameters():  # what a replay reads anew, and the constants that another program names
        parameter.data.mul_(1.5)
    check()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_other_precisions(dtype, tolerance):
    model, images = HookedViT(TINY_MODELS["class_token"]().to(dtype)), images_for("class_token").to(dtype)
    parts = decompose(model, images)
    aligner = aligner_for(parts)
    expected = parts.map(aligner).project(U)
    with torch.inference_mode():
        scores = attribute(model, images, U, through=aligner)
        tokens = attribute_tokens(model, images, U, through=aligner)
    assert scores.values.dtype == tokens.values.dtype == torch.float32
    close(scores.values, expected.values, tolerance)
    close(tokens.total, expected.total, tolerance)


def test_gradients_by_the_images_are_those_of_mapped_vectors():
    model, images, aligner, _ = mapped("dinov2_reg", "head")
    image, found = images[:1].clone().requires_grad_(), []
    for ask in (
        lambda: decompose(model, image).map(aligner).project(U)["L1H2"],
        lambda: attribute(model, image, U, through=aligner)["L1H2"],
        lambda: attribute_tokens(model, image, U, through=aligner)["L1H2"].sum(1),
    ):
        found += torch.autograd.grad(ask().square().sum(), image)
    close(found[1], found[0])
    close(found[2], found[0])


# --- what is kept ---


def test_what_is_compiled_is_kept_until_something_changes(monkeypatch):
    original, images = TINY_MODELS["class_token"]().double(), images_for("class_token").double()
    model = HookedViT(original)
    parts = decompose(model, images)
    aligner, other = aligner_for(parts), aligner_for(parts, seed=1)
    compiled = []
    along = Program.along
    monkeypatch.setattr(Program, "along", lambda self, own: compiled.append(own) or along(self, own))

    def check(aligner, directions, times):
        expected = decompose(model, images).map(aligner).project(directions)
        for ask in (attribute, attribute_tokens):
            close(ask(model, images, directions, through=aligner).total, expected.total)
        assert len(compiled) == times

    check(aligner, U, 2)
    check(aligner, U.clone(), 2)
    check(other, U, 4)
    check(other, -U, 6)
    other.maps.data[0] += 1
    check(other, -U, 8)
    other.bias += 1
    check(other, -U, 8)
    with torch.no_grad():
        original.norm.weight.mul_(2)
    check(other, -U, 10)


# --- hooks ---


def doubled(value, hook):
    return 2 * value


def test_hooks_that_only_look_change_nothing():
    model, images, aligner, expected = mapped("dinov2_reg", "head")
    with model.hooks([("blocks.1.hook_resid_mid", lambda value, hook: None)]):
        scores = attribute(model, images, U, through=aligner)
        tokens = attribute_tokens(model, images, U, through=aligner)
    assert scores.labels == expected.labels
    close(scores.values, expected.values)
    close(tokens.total, expected.total)


@pytest.mark.parametrize("ask", [attribute, attribute_tokens])
def test_what_a_hook_changes_needs_a_map(ask):
    model, images, aligner, _ = mapped("dinov2_reg", "head")
    with model.hooks([("blocks.1.hook_resid_mid", doubled)]):
        with pytest.raises(InputError, match=r"has no map for 'intervention@blocks.1.hook_resid_mid'. Remove the hook"):
            ask(model, images, U, through=aligner)
        parts = decompose(model, images)
        aligner = aligner_for(parts)
        expected = parts.map(aligner).project(U)
        scores = ask(model, images, U, through=aligner)
    scores = scores.sum_tokens() if ask is attribute_tokens else scores
    assert set(scores.labels) == set(expected.labels)
    for label in expected.labels:
        close(scores[label], expected[label])


def test_what_a_hook_changes_within_a_component_is_read_through_its_map():
    model, images = made("dinov2_reg")
    with model.hooks([("blocks.1.attn.hook_z", doubled)]):
        parts = decompose(model, images, by="layer")
        aligner = aligner_for(parts)
        expected = parts.map(aligner).project(U)
        tokens = attribute_tokens(model, images, U, through=aligner, by="layer")
    summed, changed = tokens.sum_tokens(), "intervention@blocks.1.attn.hook_z"
    close(summed["attn.1"] + summed[changed] + summed["blocks.1.attn.proj.bias"], expected["attn.1"])
    assert summed[changed].abs().min() > 0
    close(tokens.total, expected.total)


# --- the slow way ---


def refusing(where):
    compile_cut = graphs.compile_cut

    def refuse(cut, **options):
        if any(where in name for name in cut.points):
            raise NoFastPathError("not today")
        return compile_cut(cut, **options)

    return refuse


@pytest.mark.parametrize(("name", "by"), [("inner_norms", "layer"), ("inner_norms", "head"), ("siglip", "head")])
def test_the_slow_way_is_the_fast_way(name, by, monkeypatch):
    """By token, with constants of the components that the fast way tells apart; and for all, with one for them all."""
    model, images, aligner, expected = mapped(name, by)
    fast = attribute_tokens(model, images, U, through=aligner, by=by)

    def forget():
        for entry in model.__dict__["_vitdecomp_lens_traces"]:
            entry.graph._programs.clear()

    forget()
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "compile_cut", refusing("hook_v"))
        with pytest.warns(VitDecompWarning, match="not today"):
            slow = attribute_tokens(model, images, U, through=aligner, by=by)
    for one, other in zip(fast.blocks, slow.blocks, strict=True):
        assert one.components == other.components
        close(other.values, one.values)
    for label in set(slow.untokened.labels) - {"constants"}:
        close(slow.untokened[label], fast.untokened[label])
    within = [label for label in fast.untokened.labels if label not in slow.untokened]
    close(slow.untokened["constants"], sum((fast.untokened[label] for label in within), 0 * expected.total))
    close(slow.total, expected.total)

    forget()
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "compile_cut", refusing(""))
        with pytest.warns(VitDecompWarning, match="not today"):
            parts = decompose(model, images, by=by)
        aligner = aligner_for(parts)
        expected = parts.map(aligner).project(U)
        scores = attribute(model, images, U, through=aligner, by=by, batch_size=1)
        with pytest.warns(VitDecompWarning, match="not today"):
            tokens = attribute_tokens(model, images, U, through=aligner, by=by)
    close(tokens.total, expected.total)
    assert scores.labels == expected.labels
    close(scores.values, expected.values)
    forget()


# --- what is refused ---


def test_a_run_that_is_not_what_was_traced_is_found_out(monkeypatch):
    model, images, aligner, _ = mapped("dinov2_reg", "head")
    capture = request.capture

    def other(*args, **options):
        captured = capture(*args, **options)
        return replace(captured, total=captured.total + 1e-6 * captured.total.abs().max())

    monkeypatch.setattr(request, "capture", other)
    for ask in (attribute, attribute_tokens):
        with pytest.raises(GapError, match=r"do not sum to what the model computed: off by \d.\de-\d+ of ‖z‖; allowed"):
            ask(model, images, U, through=aligner)
        with pytest.raises(GapError):
            ask(model, images, U, through=aligner, components=["L1H0"])


@pytest.mark.parametrize("ask", [attribute, attribute_tokens])
def test_what_does_not_fit_is_refused(ask):
    model, images, aligner, _ = mapped("dinov2_reg", "head")
    maps, bias, components = aligner.maps, aligner.bias, aligner.components
    not_a_number = maps.clone()
    not_a_number[3, 1, 2] = torch.nan
    for wrong, message in (
        (
            replace(aligner, maps=maps[:, 1:]),
            r"^Expected maps from d_rep=32 \(axis 1 of 3\); got maps of shape \(\d+, 31",
        ),
        (
            replace(aligner, maps=maps[1:]),
            rf"one for each of its {len(components)} components, and a bias \[d_clip\]; got",
        ),
        (
            replace(aligner, bias=bias[1:]),
            r"and a bias \[d_clip\]; got maps of shape \(\d+, 32, 7\) and a bias of shape \(6,",
        ),
        (
            replace(aligner, maps=not_a_number),
            r"^Expected an aligner with finite maps and bias; its maps has NaN or inf",
        ),
        (replace(aligner, bias=bias / 0), r"^Expected an aligner with finite maps and bias; its bias has NaN or inf"),
        (
            replace(aligner, maps=maps[1:], components=components[1:]),
            rf"it has {len(components) - 1}, the decomposition {len(components)}, and '{components[0].label}' is in",
        ),
        (aligner_for(decompose(model, images, by="layer")), r"^Expected an aligner made for these components; it has"),
    ):
        with pytest.raises(InputError, match=message):
            ask(model, images, U, through=wrong)
    with pytest.raises(InputError, match=r"^Expected directions \[direction, 7\]; got \(2, 32\)\. .* through="):
        ask(model, images, torch.ones(2, 32, dtype=torch.float64), through=aligner)
    with pytest.raises(InputError, match=r"^Expected finite directions; direction 1 of 3"):
        ask(model, images, U / torch.tensor([1.0, 0.0, 1.0]).double()[:, None], through=aligner)


@as_users_run_it()
def test_what_is_no_aligner_is_refused():
    model, images = made("dinov2_reg")
    with pytest.raises(
        InputError, match=r"^through= expects an aligner: components, a map for each, and a bias; got Ten"
    ):
        attribute(model, images, U, through=torch.ones(32, D_CLIP))


def test_an_aligner_that_knows_its_model_refuses_another():
    model, images = made("dinov2_reg")
    parts = decompose(model, torch.cat([images] * 4))
    targets = torch.randn(12, D_CLIP, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    aligner = Aligner.fit(parts, targets, method="unconstrained", epochs=0)
    expected = decompose(model, images).map(aligner).project(U)
    close(attribute(model, images, U, through=aligner).values, expected.values, 1e-9)
    elsewhere = replace(aligner, metadata={**aligner.metadata, "model": "another"})
    with pytest.raises(InputError, match=r"this aligner was made for, with model='another'; got one with model="):
        attribute_tokens(model, images, U, through=elsewhere)
