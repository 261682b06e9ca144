"""The guide to adding a model is true: its adapter, run as it is written there, is held to what ours are held to."""

import json
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

import vitdecomp_lens
from vitdecomp_lens import HookedViT, attribute_tokens, cli, decompose, verify, weights
from vitdecomp_lens.certificate import TOLERANCES
from vitdecomp_lens.errors import InputError, UnsupportedModelError, VitDecompWarning
from vitdecomp_lens.hooked import Adapter, register_adapter, registry
from vitdecomp_lens.points import LazyHookPoint

GUIDE = Path(vitdecomp_lens.__file__).parent.parent / "docs" / "adding-a-model.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
(ADAPTER,) = (block for block in BLOCKS if "class PiTAdapter" in block)
SERVED = "timm.models.pit:PoolingVisionTransformer"
VIT = "timm.models.vision_transformer:VisionTransformer"
NAMES = ("pit_ti_224", "pit_ti_distilled_224")
SMALL = {"depth": (1, 1, 1), "img_size": 64}


def pit(name="pit_ti_224", *, seed=0, **options):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=5, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh norms and biases are nearly the identity, and hide errors
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def photographs(size=64):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_adapter_stays():
    before = dict(registry._ADAPTERS)
    yield
    for name in registry._ADAPTERS.keys() - before.keys() - registry._BUILT_IN.keys():
        del registry._ADAPTERS[name]


@pytest.fixture
def guide():
    """What is defined once the guide's adapter has run."""
    names = {"__name__": "pit_lens"}
    exec(compile(ADAPTER, str(GUIDE), "exec"), names)
    return names


# The guide's adapter -----------------------------------------------------------------------------------------------


def test_the_family_has_no_adapter_but_the_guides():
    assert SERVED not in registry._BUILT_IN
    assert not registry.has_adapter(pit(**SMALL))


def test_it_is_about_forty_lines():
    code = [line for line in ADAPTER.splitlines() if line.strip() and not re.match(r'(from|import) | *"""', line)]
    assert 35 <= len(code) <= 45


MODELS = {"whole": ("pit_ti_224", 224, {}), "small and distilled": ("pit_ti_distilled_224", 64, SMALL)}


@pytest.mark.parametrize(("name", "size", "options"), MODELS.values(), ids=MODELS)
def test_the_hooked_output_is_the_originals_bit_for_bit(guide, name, size, options):
    original, images = pit(name, **options), photographs(size)
    model = HookedViT(original)
    with torch.no_grad():
        expected = original(images)
        plain = [hook for hook, point in model.hook_dict.items() if not isinstance(point, LazyHookPoint)]
        seen = []
        hooks = [(hook, lambda value, hook: seen.append(hook.name)) for hook in plain]
        assert torch.equal(model(images), expected)
        assert torch.equal(model.run_with_hooks(images, fwd_hooks=hooks), expected)
    assert sorted(seen) == sorted(plain)


@pytest.mark.parametrize(("name", "size", "options"), MODELS.values(), ids=MODELS)
def test_heads_sum_to_what_the_model_computes(guide, name, size, options):
    original, images = pit(name, **options).double(), photographs(size).double()
    with torch.no_grad():
        expected = original.forward_head(original.forward_features(images), pre_logits=True)
    parts = decompose(HookedViT(original), images, by="head")
    depth = options.get("depth", (2, 6, 4))
    assert sum(c.head is not None for c in parts.components) == sum(
        d * h for d, h in zip(depth, (2, 4, 8), strict=True)
    )
    assert float((parts.values.sum(0) - expected).abs().max() / expected.abs().max()) < 1e-10
    assert float(parts.gap.max()) < 1e-10


def test_a_contribution_passes_the_linear_layers_between_the_stages(guide):
    """Into the class token a block of the first stage writes through both widenings, and the final norm, alone."""
    original, images = pit(**SMALL).double(), photographs().double()
    model = HookedViT(original)
    parts = decompose(model, images, by="layer")
    with torch.no_grad():
        _, cache = model.run_with_cache(images)
        written = cache["blocks.0.hook_mlp_out"][:, 0]
        for stage in original.transformers[1:]:
            written = written @ stage.pool.fc.weight.T
        centred = written - written.mean(-1, keepdim=True)
        expected = original.norm.weight * centred / cache["ln_final.hook_scale"][:, 0]
    assert float((parts["mlp.0"] - expected).abs().max() / expected.abs().max()) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_has_the_tokens_of_its_grid(guide, name):
    model, images = HookedViT(pit(name, **SMALL)), photographs()
    _, cache = model.run_with_cache(images)
    prefix = ("CLS", "DIST") if "distilled" in name else ("CLS",)
    for hook, value in cache.items():
        grid = model.token_grid(images, hook)
        assert grid.prefix == prefix
        if hook == "hook_patch_embed":
            assert value.shape[1] == len(grid) - len(prefix)
        elif hook.endswith(("hook_pattern", "hook_attn_scores")):
            assert value.shape[2:] == (len(grid), len(grid))
        elif hook != "hook_representation":
            assert value.shape[1] == len(grid)
    assert [(grid.rows, grid.columns) for grid in _grids(model, images)] == [(7, 7), (4, 4), (2, 2)]


def _grids(model, images):
    return [model.token_grid(images, f"blocks.{blocks[0]}.hook_resid_pre") for blocks in model.stages]


def _holds(certificate):
    assert certificate.failures == ()
    assert certificate.parity.plain
    assert certificate.parity.hooked
    assert certificate.coverage.share == 1
    assert all(hook.live for hook in certificate.hooks)
    for cut in certificate.cuts:
        assert cut.gap < TOLERANCES[cut.dtype]
    assert {cut.of for cut in certificate.cuts} == {"representation", "logits"}


def test_verify_certifies_it(guide):
    _holds(verify(pit("pit_ti_distilled_224", **SMALL), count=1, cost=False))


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_verify_certifies_whole_models(guide, name):
    _holds(verify(pit(name), count=1, cost=False))


# What the guide says of failures -----------------------------------------------------------------------------------

REPRESENTATION = "OutputTap(representation)"
PATCHES = "clone.patch_embed.register_forward_hook(GridTap(patch_point, channels_first=True))"
MISTAKES = {
    "the first stage is left out": (
        "in clone.transformers:",
        "in clone.transformers[1:]:",
        (r"it misses\n  aten::gelu in tower\.transformers\.0\.blocks\.0", "coverage is below 90 %"),
    ),
    "the clone runs its own blocks": (
        "blocks += column.blocks\n",
        "blocks += column.blocks; column.blocks = nn.Sequential(*(block.core for block in column.blocks))\n",
        ("it misses\n  aten::gelu in", "coverage is below 90 %", "hooks are not live: blocks.0.hook_resid_pre"),
    ),
    "no patches are tapped": (PATCHES, "pass", ("the images themselves", "1 hooks are not live: hook_patch_embed")),
    "the output is changed": (
        REPRESENTATION,
        "lambda module, args, output: OutputTap(representation)(module, args, 2 * output)",
        ("the hooked model's output is not the original's",),
    ),
}


SWEPT = set(MISTAKES) - {"no patches are tapped"}  # one is enough by default


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=pytest.mark.sweep if name in SWEPT else ()) for name in MISTAKES]
)
@pytest.mark.filterwarnings("ignore:aten.*the structured adjoint would need:vitdecomp_lens.errors.VitDecompWarning")
def test_a_mistake_fails_as_the_guide_says(mistake):
    right, wrong, messages = MISTAKES[mistake]
    assert right in ADAPTER
    exec(compile(ADAPTER.replace(right, wrong), mistake, "exec"), {"__name__": mistake})
    failures = "\n".join(verify(pit(**SMALL), count=1, cost=False).failures)
    for message in messages:
        assert re.search(message, failures), failures


def test_a_grid_of_other_tokens_is_refused_by_hook():
    for wrong in ("TokenGrid(rows + 1, columns, image, prefix)", "TokenGrid(rows, columns, image)"):
        code = ADAPTER.replace("TokenGrid(rows, columns, image, prefix)", wrong)
        assert code != ADAPTER
        exec(compile(code, wrong, "exec"), {"__name__": wrong})
        model = HookedViT(pit(**SMALL))
        registry._ADAPTERS.pop(SERVED)
        with pytest.raises(InputError, match=r"tokens that model.token_grid names there.*the value has (50|17|5)"):
            attribute_tokens(model, photographs(), torch.randn(1, 256))


def test_a_hook_whose_return_is_dropped_is_refused_by_name(guide):
    wrong = "lambda module, args, output: (OutputTap(representation)(module, args, output), None)[1]"
    exec(compile(ADAPTER.replace(REPRESENTATION, wrong), "dropped", "exec"), {"__name__": "pit_lens"})
    with pytest.raises(UnsupportedModelError, match="has the hook 'hook_representation', but its forward never calls"):
        verify(pit(**SMALL), count=1, cost=False)


# Registering -------------------------------------------------------------------------------------------------------


class Distributions:
    """Distributions in a folder on ``sys.path``, as an installer leaves them there."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, name, adapter, *, of=SERVED, **files):
        info = self.folder / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[vitdecomp_lens.adapters]\n{of} = {adapter}\n")
        for module, code in files.items():
            (self.folder / f"{module}.py").write_text(code)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield Distributions(tmp_path)
    for module in set(sys.modules) - modules:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


WITHOUT_DECORATOR = ADAPTER.replace("@register_adapter(", "# (")


def test_an_adapter_defined_again_replaces_the_one_before(guide):
    before = registry.find_adapter(pit(**SMALL))
    exec(compile(ADAPTER, str(GUIDE), "exec"), {"__name__": "pit_lens"})
    after = registry.find_adapter(pit(**SMALL))
    assert type(after) is not type(before)
    assert type(after).__qualname__ == type(before).__qualname__
    with pytest.raises(ValueError, match="has an adapter already: PiTAdapter"):
        register_adapter(SERVED)(type("Another", (Adapter,), {}))


def test_an_entry_point_is_found_by_the_command(installed, tmp_path, monkeypatch, capsys):
    installed.add("pit-lens", "pit_lens:PiTAdapter", pit_lens=WITHOUT_DECORATOR)
    monkeypatch.setattr(weights, "create_timm", partial(weights.create_timm, **SMALL))
    assert cli.main(["verify", "pit_ti_224", "--images", "1", "--json", str(tmp_path / "pit.json")]) == 0
    assert "Verdict: supported" in capsys.readouterr().out
    certificate = json.loads((tmp_path / "pit.json").read_text())
    assert (certificate["coverage"]["found"], certificate["coverage"]["branches"]) == (6, 6)
    assert {hook["name"] for hook in certificate["hooks"]} >= {"hook_patch_embed", "blocks.2.attn.hook_z"}


def test_an_entry_point_is_loaded_when_its_class_is_wrapped(installed):
    installed.add("pit-lens", "pit_lens:PiTAdapter", pit_lens=ADAPTER)
    script = """
import sys, timm
from vitdecomp_lens import HookedViT
HookedViT(timm.create_model("test_vit").eval())
before = "pit_lens" in sys.modules
HookedViT(timm.create_model("pit_ti_224", depth=(1, 1, 1)).eval())
print(before, "pit_lens" in sys.modules)
"""
    paths = f"import sys; sys.path[:0] = [{str(installed.folder)!r}, {str(GUIDE.parent.parent)!r}]\n"
    run = subprocess.run([sys.executable, "-c", paths + script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    ("adapter", "code", "message"),
    [
        ("gone:PiTAdapter", "", "ModuleNotFoundError: No module named 'gone'"),
        ("pit_lens:PiTAdapter", "import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("pit_lens:PiTAdapter", "1 / 0", "ZeroDivisionError"),
        ("pit_lens:PiTAdapter", "", "AttributeError.*PiTAdapter"),
        ("pit_lens:PiTAdapter", "PiTAdapter = 3", "expected a subclass of Adapter there; got 3"),
    ],
    ids=["no module", "no library", "raises", "no class", "no adapter"],
)
def test_a_broken_entry_point_names_its_distribution(installed, adapter, code, message):
    installed.add("pit-lens", adapter, pit_lens=code)
    vit, served = timm.create_model("test_vit").eval(), pit(**SMALL)
    HookedViT(vit)  # nobody else's concern
    for ask in (HookedViT, registry.has_adapter, verify):
        with pytest.raises(
            UnsupportedModelError, match=rf"(?s)^pit-lens 1\.2 announces {adapter} as .*{message}.*Upgrade"
        ):
            ask(served)


def test_two_distributions_for_one_class_are_both_named(installed):
    installed.add("pit-lens", "pit_lens:PiTAdapter", pit_lens=ADAPTER)
    installed.add("other-lens", "other_lens:PiTAdapter", other_lens=ADAPTER)
    with pytest.raises(
        UnsupportedModelError, match=r"(?=.*pit-lens 1\.2)(?=.*other-lens 1\.2).* announce an adapter of"
    ):
        HookedViT(pit(**SMALL))


def test_what_is_registered_comes_before_what_is_announced(installed, guide):
    installed.add("pit-lens", "gone:PiTAdapter")
    assert type(registry.find_adapter(pit(**SMALL))) is guide["PiTAdapter"]


def test_what_is_built_in_comes_before_what_is_announced(installed):
    installed.add("vit-lens", "gone:Mine", of=VIT)
    vit = timm.create_model("test_vit").eval()
    with pytest.warns(VitDecompWarning, match=r"vit-lens 1\.2 announces gone:Mine as an adapter of .*built-in one"):
        found = registry.find_adapter(vit)
    assert type(found).__module__ == "vitdecomp_lens.hooked.timm_vit"


def test_a_subclass_of_what_is_built_in_may_be_announced(installed):
    code = """
from timm.models.vision_transformer import VisionTransformer
from vitdecomp_lens.hooked.timm_vit import TimmViTAdapter
class Mine(VisionTransformer): pass
class MineAdapter(TimmViTAdapter): pass
"""
    installed.add("mine-lens", "mine_lens:MineAdapter", of="mine_lens:Mine", mine_lens=code)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from mine_lens import Mine, MineAdapter

        assert type(registry.find_adapter(Mine(depth=1, embed_dim=32, num_heads=2).eval())) is MineAdapter


def test_what_is_announced_is_near_too(installed):
    installed.add("pit-lens", "gone:PiTAdapter", of=SERVED + "s")
    with pytest.raises(UnsupportedModelError, match=rf"There is no adapter for {SERVED}; the nearest is for {SERVED}s"):
        HookedViT(pit(**SMALL))
