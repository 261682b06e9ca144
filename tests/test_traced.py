"""Plain modules, decomposed by their graph alone: they say what the adapters say, and say so where they cannot."""

import json
from dataclasses import replace
from functools import cache, partial

import pytest
import staged_models
import timm
import torch
from einops import rearrange
from staged_models import STAGED_MODELS
from timm.models.mlp_mixer import MlpMixer
from tiny_models import TINY_MODELS, images_for, perturb
from torch import nn

from vitdecomp_lens import Decomposition, HookedViT, attribute, attribute_tokens, decompose, trace, verify
from vitdecomp_lens.certificate import GraphParity
from vitdecomp_lens.errors import InputError, UnsupportedModelError, VitDecompWarning
from vitdecomp_lens.traced import check_any_images

COLUMNS = ["class_token", "layer_scale", "dinov2_reg", "swiglu", "mean_pool_fc_norm", "open_clip", "cait", "xcit"]
STAGED = ["swin", "swin_v2", "maxvit", "coatnet"]
PARTS = ("embed", "attn", "mlp", "head", "neuron", "conv")


def made(name):
    return TINY_MODELS[name]().double(), images_for(name, 2).double()


@cache
def shared(name):
    """A plain model, the same hooked, and images, for tests that leave them as they are: to trace takes time."""
    if name in STAGED_MODELS:
        hooked, x = staged_models.shared(name)
        return hooked.original, hooked, x
    model, x = made(name)
    return model, HookedViT(model), x


def of_kind(parts, kind):
    return [value for value, component in zip(parts.values, parts.components, strict=True) if component.kind == kind]


SWEPT = ["dinov2_reg", "mean_pool_fc_norm", "xcit", "swin_v2", "coatnet"]


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] * (name in SWEPT)) for name in [*COLUMNS, *STAGED]]
)
def test_a_traced_model_and_its_adapter_agree_component_by_component(name, by):
    model, adapted, x = shared(name)
    hooked, traced = decompose(adapted, x, by=by), decompose(model, x, by=by)
    assert (traced.gap < 1e-10).all()
    torch.testing.assert_close(traced.total, hooked.total, rtol=0, atol=1e-12)
    for kind in PARTS:  # a block's branches may come in another order
        mine, theirs = of_kind(traced, kind), of_kind(hooked, kind)
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert (traced.coverage.found, traced.coverage.branches) == (hooked.coverage.found, hooked.coverage.branches)


TOKENS = ["layer_scale", "dinov2_reg", "open_clip", "swin", "swin_v2", "maxvit", "hiera_not_square"]


@pytest.mark.filterwarnings("ignore:aten..(amax|scaled_dot):vitdecomp_lens.errors.VitDecompWarning")
@pytest.mark.parametrize("name", TOKENS)
def test_token_maps_of_a_traced_model_lie_where_its_adapter_says(name):
    model, hooked, x = shared(name)
    width = decompose(hooked, x[:1], by="layer").total.shape[-1]
    u = torch.randn(2, width, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    maps = []
    for one in (hooked, model):
        tokens = attribute_tokens(one, x, u, by="layer")
        order = {c.label: place for place, c in enumerate(decompose(one, x[:1], by="layer").components)}
        found = [(order[c.label], block, row) for block in tokens.blocks for row, c in enumerate(block.components)]
        maps.append([(block.grid, block.values[row]) for _, block, row in sorted(found, key=lambda f: f[0])])
        assert tokens.rest.abs().max() < 1e-10 * tokens.total.abs().max()
    assert len(maps[0]) == len(maps[1])
    for (grid, expected), (traced_grid, found) in zip(*maps, strict=True):
        assert (traced_grid.rows, traced_grid.columns) == (grid.rows, grid.columns)
        patches = grid.rows * grid.columns
        torch.testing.assert_close(found[:, -patches:], expected[:, -patches:], rtol=0, atol=1e-10)


def test_scores_of_a_traced_model_are_the_projections_of_its_vectors():
    model, _, x = shared("swin")
    u = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts, scores = decompose(model, x), attribute(model, x, u)
    assert scores.labels == parts.labels
    torch.testing.assert_close(scores.values, parts.values @ u.T, rtol=0, atol=1e-10)


def test_components_are_named_by_module_path(tmp_path):
    model, _, x = shared("layer_scale")
    parts = decompose(model, x)
    assert parts.labels[:3] == ("embed", "blocks.0.attn.H0", "blocks.0.attn.H1")
    assert "blocks.1.mlp" in parts
    assert "pos_embed" in parts
    assert parts.select(kind="head", layer=1).labels == tuple(f"blocks.1.attn.H{n}" for n in range(4))
    whole = parts.group(by="layer")
    torch.testing.assert_close(whole["blocks.0.attn"], parts.select(kind="head", layer=0).sum())
    parts.save(tmp_path / "parts.safetensors")
    assert Decomposition.load(tmp_path / "parts.safetensors").components == parts.components
    assert decompose(model, x, by="neuron").labels[2] == "blocks.0.mlp.N0"


def test_logits_functions_and_embeddings_of_a_traced_model_are_read():
    model, _, x = shared("class_token")
    torch.testing.assert_close(decompose(model, x, of="logits").total, model(x).detach(), rtol=0, atol=1e-12)
    parts = decompose(model, x, of=lambda module, images: module.forward_features(images)[:, 1:].mean(1))
    assert (parts.gap < 1e-10).all()
    torch.testing.assert_close(decompose(model, x, of="embedding").total.norm(dim=-1), torch.ones(2).double())


def test_torchs_own_hooks_and_new_weights_are_part_of_what_is_traced():
    model, x = made("class_token")
    before = decompose(model, x, by="layer")
    handle = model.blocks[1].mlp.register_forward_hook(lambda _module, _inputs, value: 2 * value)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    hooked = decompose(model, x, by="layer")
    torch.testing.assert_close(hooked.total, expected)
    assert (hooked.gap < 1e-10).all()
    handle.remove()
    torch.testing.assert_close(decompose(model, x, by="layer").values, before.values)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(2)
    assert not torch.allclose(decompose(model, x, by="layer")["blocks.1.mlp"], before["blocks.1.mlp"])


def test_gradients_reach_the_images_as_through_the_adapter():
    model, x = made("mean_pool_fc_norm")
    grads = []
    for one in (HookedViT(model), model):
        images = x.clone().requires_grad_()
        decompose(one, images, by="head").values[3].pow(2).sum().backward()
        grads.append(images.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)


def test_pieces_of_a_batch_give_what_the_whole_gives():
    model, _, x = shared("swin")
    x = torch.cat([x, x.flip(-1), x[:1]])
    whole, pieces = decompose(model, x), decompose(model, x, batch_size=2)
    torch.testing.assert_close(pieces.values, whole.values, rtol=0, atol=1e-12)


# --- what is hidden ---


NARROW_VGG = (8, "M", 8, "M", 16, 16, "M", 16, 16, "M", 16, 16, "M")


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (partial(timm.create_model, "resnet18"), "layer4.1.act2"),
        (partial(timm.models.vgg.VGG, NARROW_VGG, mlp_ratio=0.05), "pre_logits.act2"),
        (partial(timm.create_model, "mobilevit_xxs"), "final_conv.bn.act"),
    ],
    ids=["resnet", "vgg", "mobilevit"],
)
def test_a_nonlinearity_that_everything_passes_is_named_and_counted_against_coverage(make, where):
    model = perturb(make(num_classes=5))
    with pytest.warns(VitDecompWarning, match=f"(?s)1 of [0-9]+ branches.*{where}: only what follows it is linear"):
        parts = decompose(model, torch.rand(1, 3, 64, 64))
    assert parts.coverage.found == 1
    assert parts.coverage.share < 0.2
    assert parts.coverage.stops[0].module == where


def test_an_activation_inside_a_branch_hides_nothing():
    model = perturb(timm.create_model("efficientvit_b0", num_classes=5)).eval()  # two activations a branch
    graph = trace(model.stages, torch.rand(1, 8, 32, 32), of=lambda module, x: module(x).mean((2, 3)))
    named = [branch.name for branch in graph.branches.found]
    assert len(named) == len(set(named))


class Chain(nn.Module):
    """Residual convolutions with two activations each."""

    def __init__(self, *, after=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 16, 1),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1, groups=16),
                nn.ReLU(),
                nn.Conv2d(16, 8, 1),
            )
            for _ in range(3)
        )
        self.after = after

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
            x = x.relu() if self.after else x
        return x.mean((2, 3))


def test_two_activations_one_after_the_other_are_one_branch():
    x = torch.rand(2, 3, 16, 16)
    parts = decompose(perturb(Chain()), x)
    assert parts.coverage.found == parts.coverage.branches == 3
    assert [c.kind for c in parts.components][:4] == ["embed", "conv", "conv", "conv"]
    with pytest.warns(VitDecompWarning, match="1 of 6"):  # each block: a branch, and an activation of the stream
        decompose(perturb(Chain(after=True)), x)


class Inline(nn.Module):
    """A block whose MLP is in its own forward, and whose attention lays channels out before heads."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.fc1, self.fc2 = nn.LayerNorm(8), Turned(), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(x)))


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (t h d) -> t b h n d", t=3, h=2)
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(z, "b h n d -> b n (d h)"))


class Inlined(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.ModuleList(Inline() for _ in range(2))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_parts_in_a_blocks_own_forward_have_names_of_their_own():
    model, x = perturb(Inlined()).double(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    parts = decompose(model, x)
    assert parts.labels[:4] == ("embed", "blocks.0.attn.H0", "blocks.0.attn.H1", "blocks.0.gelu")
    assert parts.select(layer=1).labels == ("blocks.1.attn.H0", "blocks.1.attn.H1", "blocks.1.gelu")
    assert parts.coverage.found == parts.coverage.branches == 4


def test_heads_are_those_of_attention_wherever_their_channels_are_laid():
    model, x = perturb(Inlined()).double(), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    whole = decompose(model, x)
    with torch.no_grad():  # the values of the second head
        model.blocks[1].attn.qkv.weight[20:24] = 0
        model.blocks[1].attn.qkv.bias[20:24] = 0
    without = decompose(model, x)
    assert not without["blocks.1.attn.H1"].abs().max() > 1e-12
    torch.testing.assert_close(without["blocks.1.attn.H0"], whole["blocks.1.attn.H0"])
    u = torch.randn(1, 8, dtype=torch.float64)
    tokens = attribute_tokens(model, x, u)
    torch.testing.assert_close(tokens["blocks.1.attn.H0"].sum(1), without["blocks.1.attn.H0"] @ u.T)


class Mixing(nn.Module):
    """An attention of two heads; something joins what it mixes before its weights read it."""

    def __init__(self, how):
        super().__init__()
        self.qkv, self.proj, self.how = nn.Linear(8, 24), nn.Linear(8, 8), how

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.how == "folded":  # heads behind the batch
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        mixed = (q @ k.mT).softmax(-1) @ v + q
        if self.how == "mean over heads":
            return self.proj(mixed.mean(1).repeat(1, 1, 2))
        mixed = mixed.unflatten(0, (-1, 2)) if self.how == "folded" else mixed
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Flat(nn.Module):
    """An attention of one head, of which weights read all tokens and channels as one."""

    def __init__(self, joined):
        super().__init__()
        self.q, self.v, self.out, self.joined = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16 * 8, 8), joined

    def forward(self, x):
        mixed = (self.q(x) @ x.mT).softmax(-1) @ self.v(x)
        return self.out((x + mixed if self.joined else mixed).flatten(1))[:, None]


class Mixed(nn.Module):
    def __init__(self, mixing):
        super().__init__()
        self.stem, self.mixing, self.norm = nn.Conv2d(3, 8, 4, 4), mixing, nn.LayerNorm(8)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.norm(x + self.mixing(x)).mean(1)


@pytest.mark.parametrize(
    ("mixing", "heads"),
    [
        (partial(Mixing, "pooled queries"), 2),
        (partial(Mixing, "folded"), 0),  # nothing before the join tells them apart
        (partial(Mixing, "mean over heads"), 0),
        (partial(Flat, True), 0),
        (partial(Flat, False), 0),
    ],
    ids=["pooled queries", "folded", "mean over heads", "flat joined", "flat"],
)
def test_heads_are_told_apart_where_something_joins_them_and_nothing_else_is_called_a_head(mixing, heads):
    model, x = perturb(Mixed(mixing())).double(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    found = tuple(label for label in decompose(model, x).labels if label.startswith("mixing.H"))
    assert found == tuple(f"mixing.H{head}" for head in range(heads))
    if heads:
        with torch.no_grad():  # what the second head writes
            model.mixing.proj.weight[:, 4:] = 0
        whole, without = decompose(model, x, by="layer")["mixing"], decompose(model, x)
        torch.testing.assert_close(without["mixing.H0"], whole)
        assert not without["mixing.H1"].any()


# --- bad input ---


class Stops(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(48, 4), how

    def forward(self, x):
        y = self.linear(x.flatten(1))
        if self.how == "branch" and y.sum() > 0:
            return -y
        if self.how == "numpy":
            return torch.from_numpy(y.numpy())
        return y * y.max().item() if self.how == "item" else y


@pytest.mark.parametrize(
    ("how", "line"),
    [("branch", r"if self.how == \"branch\" and y.sum\(\) > 0:"), ("numpy", "y.numpy"), ("item", r"y.max\(\).item")],
)
def test_a_module_that_cannot_be_exported_is_told_the_line_that_stops_it(how, line):
    with pytest.raises(UnsupportedModelError, match=f"(?s)could not be traced.*test_traced.py, line .*{line}.*Rewrite"):
        decompose(Stops(how).eval(), torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 16, 16), "images\\[None\\]"),
        (torch.rand(2, 3, 16, 16).to(torch.uint8), "floating tensor"),
        (torch.full((1, 3, 16, 16), torch.nan), "finite; image 0"),
        (torch.rand(1, 3, 16, 16).double(), "Convert them: images.to\\(torch.float32\\)"),
    ],
)
def test_images_that_no_model_takes_are_refused(images, message):
    with pytest.raises(InputError, match=message):
        check_any_images(images, Chain())


def test_wrong_channels_name_the_line_that_refused_them():
    with pytest.raises(UnsupportedModelError, match=r"expected input.* to have 3 channels, but got 4"):
        decompose(perturb(Chain()), torch.rand(1, 4, 16, 16))


def test_modules_that_are_training_or_wrapped_are_refused():
    chain = perturb(Chain())
    with pytest.raises(UnsupportedModelError, match="evaluation mode"):
        decompose(chain.train(), torch.rand(1, 3, 16, 16))
    with pytest.raises(UnsupportedModelError, match=r"model.module"):
        decompose(nn.DataParallel(chain.eval()), torch.rand(1, 3, 16, 16))
    with pytest.raises(InputError, match="at least one image"):
        decompose(chain.eval(), torch.rand(0, 3, 16, 16))


# --- certificates ---


def test_a_plain_module_is_certified():
    certificate = verify(Chain().eval(), torch.rand(2, 3, 16, 16), cost=False)
    assert certificate.supported
    assert certificate.hooks == ()
    assert certificate.parity == GraphParity(0.0)
    assert "traced, not hooked: within 0.0e+00 of the module itself" in str(certificate)
    assert not replace(certificate, parity=GraphParity(2e-5)).supported
    assert json.loads(certificate.to_json())["parity"] == {"difference": 0.0}


def test_a_module_whose_stream_is_bent_is_not():
    with pytest.warns(VitDecompWarning, match="lie behind it"):
        certificate = verify(Chain(after=True).eval(), torch.rand(1, 3, 16, 16), cost=False)
    assert not certificate.supported
    assert "coverage is below 90 %: 1 of 6 branches are components of their own (17 %)" in certificate.failures[0]
    assert "5 branches lie" in str(certificate)


def test_images_for_a_plain_module_have_the_size_that_it_names():
    with pytest.raises(InputError, match="pass images="):
        verify(Chain().eval())


def test_caches_that_a_module_keeps_are_left_as_they_were():
    model = perturb(timm.create_model("levit_128s", num_classes=5))
    x = torch.rand(1, 3, 224, 224)
    trace(model, x)
    with torch.no_grad():
        first, second = model(x), model(x)  # with an empty cache, and with a full one
    assert torch.equal(first, second)
    assert type(first) is torch.Tensor


def test_a_head_that_ends_in_an_activation_is_read_before_it():
    model, x = perturb(timm.create_model("fasternet_t0", num_classes=5)), torch.rand(2, 3, 64, 64)
    parts = decompose(model, x, by="layer")
    assert parts.coverage.share == 1
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(nn.functional.gelu(parts.total), features)
    single = perturb(timm.create_model("test_efficientnet", num_classes=5))  # one pixel, but not yet pooled
    with pytest.warns(VitDecompWarning, match="only what follows it is linear"):
        assert decompose(single, torch.rand(1, 3, 32, 32)).coverage.found == 1


def test_a_branch_that_mixes_tokens_has_none_of_its_own():
    model = MlpMixer(img_size=48, patch_size=8, embed_dim=48, num_blocks=2, num_classes=0).eval().double()
    images, direction = torch.randn(2, 3, 48, 48).double(), torch.randn(1, 48).double()
    for by in ("layer", "neuron"):
        scores, tokens = (ask(model, images, direction, by=by) for ask in (attribute, attribute_tokens))
        mixing = [c.label for c in tokens.untokened.components if c.kind in ("mlp", "neuron")]
        assert len(mixing) == (2 if by == "layer" else 2 * 24)
        assert all("mlp_tokens" in label for label in mixing)
        for label in scores.labels:
            found = tokens.untokened[label] if label in tokens.untokened.labels else tokens[label].sum(1)
            torch.testing.assert_close(found, scores[label], rtol=0, atol=1e-12)
