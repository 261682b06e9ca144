"""Which models can be decomposed: every name of timm's transformer-like modules, and every image tower of open_clip.

    python benchmarks/supported.py --jobs 2                  # the whole sweep: hours; docs/supported-models.md
    python benchmarks/supported.py --only 'pvt_v2|open_clip:ViT-B' --page other.md
    python benchmarks/supported.py --page-only               # the page alone, from the checkpoint

Names whose models differ only in weights, classes or image size share a run. Each runs in a process of its own, at its
real depth, with random weights of which all are moved off their initial values, on small images where the model takes
them. Results are kept in a file, one line each, so that a sweep that was ended goes on where it was; delete the file
to begin anew.
"""

import argparse
import hashlib
import json
import multiprocessing
import platform
import re
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import open_clip
import psutil
import timm
import torch
from torch import nn

from vitdecomp_lens import HookedViT, decompose
from vitdecomp_lens.coverage import Stop
from vitdecomp_lens.errors import UnsupportedModelError, VitDecompError, VitDecompWarning
from vitdecomp_lens.frozen.trace import Read

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "supported-models.md"
CHECKPOINT = Path(__file__).with_suffix(".jsonl")

MODULES = """
    beit cait coat convit convmixer convnext cpubone crossvit csatv2 davit deepseek_vit deit edgenext
    efficientformer efficientformer_v2 efficientvim efficientvit_mit efficientvit_msra eva fasternet fastvit
    focalnet gcvit gemma4_vit hiera hieradet_sam2 iformer inception_next levit lowformer mambaout maxxvit metaformer
    mlp_mixer mobilenetv5 mobilevit mvitv2 naflexvit nest nextvit pit pvt_v2 qwen3_vit rdnet repvit sequencer shvit
    starnet swiftformer swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins visformer
    vision_transformer vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam vitamin volo xcit
"""
# Modules of timm that are not swept, by the reason.
ACTIVATED = """
    byoanet byobnet cspnet cspnext dla dpn efficientnet ghostnet hardcorenas hgnet hrnet lcnetv2 mobilenetv3 nfnet
    regnet repghost res2net resnest resnet resnetv2 rexnet selecsls senet sknet tresnet vgg vovnet
"""
NOT_SUMMED = """
    densenet inception_resnet_v2 inception_v3 inception_v4 nasnet pnasnet xception xception_aligned
"""
LEFT_OUT = {
    "An activation function acts on all that blocks hand on, behind each or behind the last": ACTIVATED,
    "No sum of branches runs through the model: values are concatenated, or handed on": NOT_SUMMED,
}

LARGE, LARGEST = 100_000_000, 400_000_000  # parameters: above the first, narrower models are run where there are any
CLASSES = 5
SIZES = (128, 160, 192, 224, 256)  # of images, the first that a model takes
SMALLEST_PATCH = 8  # smaller ones are merged later
FEW_PARAMETERS = 30_000_000  # of models that run two images
SECONDS, BYTES = 300, 10 << 30  # what a process may take
ROUNDS, ROUND_SECONDS = 3, 60
GAP, SHARE = 1e-5, 0.9  # what supported means


@dataclass(frozen=True)
class Planned:
    """How a model of some name is run.

    Attributes:
        name: timm's name, or open_clip's behind ``open_clip:``.
        family: The module of timm or the kind of tower.
        key: The same for names that share a run.
        parameters: How many there are, as it is run.
        sizes: Heights of images to try, in this order.
        options: What its constructor gets.
        sized: Whether the constructor gets the images' size.
        narrowed: By what its width was divided.
        skipped: Why it is not run.
    """

    name: str
    family: str
    key: str
    parameters: int
    sizes: Sequence[int]
    options: Mapping[str, Any] = field(default_factory=dict)
    sized: bool = False
    narrowed: int = 1
    skipped: str = ""


# --- what there is ------------------------------------------------------------------------------------------------


def names() -> dict[str, str]:
    """Every name of the sweep, with its family."""
    of_timm = {name: module for module in MODULES.split() for name in timm.list_models(module=module)}
    return of_timm | {f"open_clip:{name}": _tower_family(name) for name in open_clip.list_models()}


def _tower_family(name: str) -> str:
    vision = open_clip.get_model_config(name)["vision_cfg"]
    if (trunk := vision.get("timm_model_name")) is not None:
        return f"open_clip: {_module_of(trunk)} of timm"
    return "open_clip: ResNet" if isinstance(vision["layers"], list) else "open_clip: ViT"


def _module_of(name: str) -> str:
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def build(name: str, **options: Any) -> nn.Module:
    """A model with random weights."""
    with warnings.catch_warnings():  # names and layers that timm calls old
        warnings.simplefilter("ignore")
        if not name.startswith("open_clip:"):
            return timm.create_model(name, num_classes=CLASSES, **options).eval()
        config = open_clip.get_model_config(name.partition(":")[2])
        vision = {**config["vision_cfg"], **options, "timm_model_pretrained": False}
        text = {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1}
        whole = open_clip.CLIP(config["embed_dim"], vision, text, config.get("quick_gelu", False))
        return whole.visual.eval()


def move_off_initial_values(model: nn.Module, seed: int = 0) -> None:
    """Add noise to all parameters and running statistics: initial values are nearly the identity, and hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            amount = 0.1 if parameter.numel() == max([1, *parameter.shape]) else 0.02  # vectors, whatever their axes
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))


def fingerprint(model: nn.Module) -> str:
    """What a model is, apart from its weights: classes, shapes and plain settings of all its modules."""
    found: list[Any] = []
    for path, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if _is_plain(value) and key != "training"}
        shapes = [
            (name, tuple(value.shape))
            for kept in (module._parameters, module._buffers)
            for name, value in kept.items()
            if value is not None
        ]
        found.append((path, type(module).__qualname__, module.extra_repr(), sorted(settings.items()), shapes))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | None) or (
        isinstance(value, tuple | list) and all(_is_plain(part) for part in value)
    )


# --- how it is run ------------------------------------------------------------------------------------------------


def plan(name: str, family: str) -> Planned:
    """Find out, without memory for weights, how a name is run."""
    try:
        return _plan_of_tower(name, family) if name.startswith("open_clip:") else _plan_of_timm(name, family)
    except Exception as error:  # whatever a constructor may raise
        return Planned(name, family, name, 0, (), skipped=f"cannot be made: {first_line(error)}")


def _plan_of_timm(name: str, family: str) -> Planned:
    usual = _on_meta(name)
    size = usual.pretrained_cfg["input_size"][-1]
    sizes = _sizes(size, _patch_size(usual))
    for first, smaller in enumerate(sizes):
        try:
            model = _on_meta(name, img_size=smaller)
        except TypeError:  # there is no such option
            return _planned(name, family, usual, sizes, sized=False)
        except Exception:  # not of this size
            continue
        return _planned(name, family, model, sizes[first:], sized=True)
    return _planned(name, family, usual, [size], sized=False)


def _plan_of_tower(name: str, family: str) -> Planned:
    vision = open_clip.get_model_config(name.partition(":")[2])["vision_cfg"]
    size = vision.get("image_size", 224)
    size = max(size) if isinstance(size, list | tuple) else size
    if "timm_model_name" in vision:  # made for one size
        return _planned(name, family, _on_meta(name), [size], sized=False)
    sizes = _sizes(size, vision.get("patch_size") or 32)  # ResNets have none
    return _planned(name, family, _on_meta(name, image_size=sizes[0]), sizes, sized=True)


def _planned(name: str, family: str, model: nn.Module, sizes: Sequence[int], *, sized: bool) -> Planned:
    """The plan of a model that was made: narrower where it is too large."""
    size = {_size_option(name): sizes[0]} if sized else {}
    chosen = Planned(name, family, fingerprint(model), _count(model), tuple(sizes), sized=sized)
    for narrowed in (2, 4):
        narrower = _narrower(name, model, narrowed)
        if chosen.parameters <= LARGE or not narrower:
            break
        try:
            tried = _on_meta(name, **size, **narrower)
        except Exception:  # this width cannot be had
            break
        chosen = replace(chosen, key=fingerprint(tried), parameters=_count(tried), options=narrower, narrowed=narrowed)
    if chosen.parameters <= LARGEST:
        return chosen
    return Planned(
        name, family, fingerprint(model), _count(model), tuple(sizes), skipped=f"over {LARGEST // 10**6} M parameters"
    )


def _narrower(name: str, model: nn.Module, by: int) -> dict[str, int]:
    """Options of a model with fewer heads of the same width; none where its constructor takes none."""
    if name.startswith("open_clip:"):
        vision = open_clip.get_model_config(name.partition(":")[2])["vision_cfg"]
        return {"width": vision["width"] // by} if "timm_model_name" not in vision else {}
    width = getattr(model, "embed_dim", None)
    heads = next((n for m in model.modules() if isinstance(n := getattr(m, "num_heads", None), int)), None)
    if not isinstance(width, int) or heads is None or heads % by:
        return {}
    return {"embed_dim": width // by, "num_heads": heads // by}


def _on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build(name, **options)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _size_option(name: str) -> str:
    return "image_size" if name.startswith("open_clip:") else "img_size"


def _patch_size(model: nn.Module) -> int:
    """What the sizes of images are multiples of: patches, or 32 pixels where a model has stages."""
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    size = max(size) if isinstance(size, tuple | list) else size
    return size if size is not None and size >= SMALLEST_PATCH else 32


def _sizes(usual: int, patch: int) -> list[int]:
    """Sizes of images to try: small ones of whole patches, then the usual one."""
    smaller = dict.fromkeys(-(-size // patch) * patch for size in SIZES)
    return [*(size for size in smaller if size < usual), usual]


# --- one model ----------------------------------------------------------------------------------------------------


def measure(planned: Planned, tell: Callable[[dict[str, Any]], None]) -> None:
    """Decompose one model, and tell of it step by step what was found."""
    tell({"step": "making the model"})
    model, images = _model_and_images(planned)
    try:
        subject: nn.Module = HookedViT(model)
        tell({"way": "adapter"})
    except UnsupportedModelError:
        subject = model
        tell({"way": "traced"})
    tell({"image": images.shape[-1], "images": len(images), "step": "first decomposition"})
    started = time.perf_counter()
    of = what_is_read(model, images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = decompose(subject, images, by="head", of=of)
    coverage = parts.coverage
    tell(
        {
            "first_use": time.perf_counter() - started,
            "gap": float(parts.gap.max()),
            "components": len(parts),
            "found": coverage.found,
            "branches": coverage.branches,
            "stops": _shortened(coverage.stops),
            "warnings": [first_line(w.message) for w in caught if issubclass(w.category, VitDecompWarning)],
            "step": "cost",
        }
    )
    tell({"cost": _cost(lambda: model(images), lambda: decompose(subject, images, by="head", of=of))})


def what_is_read(model: Any, images: torch.Tensor) -> Read:
    """What is decomposed: of encoders for language models, which have no head, what they give."""
    if hasattr(model, "forward_head"):
        try:
            model.forward_head(model.forward_features(images))
        except NotImplementedError:
            return given
    return "representation"


def given(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A model's output, the mean over its tokens or places where it gives these."""
    output: torch.Tensor = model(images)
    if output.dim() == 3:
        return output.mean(1)
    return output.mean((-2, -1)) if output.dim() == 4 else output


def _model_and_images(planned: Planned) -> tuple[nn.Module, torch.Tensor]:
    """The model with the smallest images that it takes."""
    count = 2 if planned.parameters < FEW_PARAMETERS else 1
    model: nn.Module | None = None
    for size in planned.sizes:
        images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            if model is None or planned.sized:
                torch.manual_seed(0)
                sized = {_size_option(planned.name): size} if planned.sized else {}
                model = build(planned.name, **sized, **planned.options).requires_grad_(False)
                move_off_initial_values(model)
            model(images)
        except Exception:
            if size == planned.sizes[-1]:
                raise
            continue
        return model, images
    raise ValueError(f"No sizes of images are planned for {planned.name}.")


def _cost(plain: Callable[[], object], looking: Callable[[], object]) -> float:
    """The median ratio of interleaved runs."""
    ratios: list[float] = []
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VitDecompWarning)
        while len(ratios) < ROUNDS and (not ratios or time.perf_counter() - began < ROUND_SECONDS):
            taken = [_seconds(plain), _seconds(looking)]
            ratios.append(taken[1] / taken[0])
    return statistics.median(ratios)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def first_line(error: object) -> str:
    """An error in one line, its kind before it where that is not one of ours."""
    said = next(iter(str(error).strip().splitlines()), "")
    ours = type(error).__module__.startswith("vitdecomp_lens")
    return said if ours or not isinstance(error, BaseException) else f"{type(error).__name__}: {said}"


def _shortened(stops: Iterable[Stop]) -> list[str]:
    """The first stop at each operation, and how many more there are."""
    first: dict[str, Stop] = {}
    counts = Counter(stop.operation for stop in stops)
    for stop in stops:
        first.setdefault(stop.operation, stop)
    return [f"{stop}{f' (and at {counts[name] - 1} more)' if counts[name] > 1 else ''}" for name, stop in first.items()]


# --- in a process of its own --------------------------------------------------------------------------------------


def _child(planned: Planned, pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        measure(planned, pipe.send)
        pipe.send({"step": "done"})
    except VitDecompError as error:
        pipe.send({"error": first_line(error), "step": "done"})
    except Exception as error:  # whatever a model's code may raise
        traceback.print_exc()  # nobody expected it
        pipe.send({"error": first_line(error), "step": "done"})


class Run:
    """A model that is measured in a process of its own, which is ended when it takes too much."""

    def __init__(self, planned: Planned, seconds: float = SECONDS, most_bytes: int = BYTES) -> None:
        self.planned, self.seconds, self.most_bytes = planned, seconds, most_bytes
        self.record: dict[str, Any] = {"key": planned.key, "run": planned.name, "step": "start"}
        self.started = time.perf_counter()
        self._pipe, theirs = multiprocessing.Pipe(duplex=False)
        # Forked: the libraries are imported already, and nothing was computed yet that a fork would break.
        self._process = multiprocessing.get_context("fork").Process(target=_child, args=(planned, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def finished(self) -> bool:
        """Hear what there is to hear, look at what is taken, and say whether it is over."""
        alive = self._process.is_alive()
        self._listen()
        if self.record["step"] != "done" and alive:
            too_much = self._too_much()
            if too_much is None:
                return False
            self._process.kill()
            self._fail(too_much)
        elif self.record["step"] != "done":
            self._fail(f"the process ended with code {self._process.exitcode}")
        self._process.join()
        self.record["seconds"] = time.perf_counter() - self.started
        return True

    def _listen(self) -> None:
        try:
            while self._pipe.poll():
                self.record.update(self._pipe.recv())
        except EOFError:
            pass

    def _too_much(self) -> str | None:
        if time.perf_counter() - self.started > self.seconds:
            return f"took longer than {self.seconds:g} s"
        try:
            taken = psutil.Process(self._process.pid).memory_info().rss
        except psutil.Error:  # it has just ended
            return None
        return f"needed more than {self.most_bytes / 2**30:g} GiB" if taken > self.most_bytes else None

    def _fail(self, reason: str) -> None:
        self.record["error"] = f"{reason} ({self.record['step']})"

    def wait(self) -> dict[str, Any]:
        """What was found, once it is over."""
        while not self.finished():
            time.sleep(0.05)
        return self.record


# --- the sweep ----------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """What is known so far: plans by name, records by key, and with what they were made."""

    path: Path
    plans: dict[str, Planned] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read a file, the later lines over the earlier; a last line that was cut off is ended and left out."""
        found = cls(path)
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):
            path.write_text(f"{text}\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            found._take(entry)
        return found

    def add(self, **entry: Any) -> None:
        """Keep an entry, on disk too."""
        self._take(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _take(self, entry: dict[str, Any]) -> None:
        if "plan" in entry:
            self.plans[entry["plan"]["name"]] = Planned(**entry["plan"])
        elif "record" in entry:
            self.records[entry["record"]["key"]] = entry["record"]
        else:
            self.machine = entry["machine"]

    def missing(self, only: str = "") -> list[Planned]:
        """One plan for each key that was not run yet, the smallest models first."""
        wanted: dict[str, Planned] = {}
        for planned in self.plans.values():
            if re.search(only, planned.name) and not planned.skipped and planned.key not in self.records:
                wanted.setdefault(planned.key, planned)
        return sorted(wanted.values(), key=lambda planned: (planned.parameters, planned.name))


def make_plans(checkpoint: Checkpoint, only: str = "") -> None:
    """Plan all names that are not planned yet."""
    for name, family in names().items():
        if re.search(only, name) and name not in checkpoint.plans:
            checkpoint.add(plan=asdict(plan(name, family)))


def sweep(checkpoint: Checkpoint, jobs: int = 1, only: str = "") -> Iterator[dict[str, Any]]:
    """Run what is missing, several at a time."""
    waiting, running = checkpoint.missing(only)[::-1], []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Run(waiting.pop()))
        time.sleep(0.05)
        for run in [run for run in running if run.finished()]:
            running.remove(run)
            checkpoint.add(record=run.record)
            yield run.record


def machine() -> dict[str, Any]:
    """Where and with what the sweep ran."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "timm", "open_clip_torch", "transformer-lens", "vitdecomp-lens")
    return {
        "device": found[0] if found else platform.processor(),
        "threads": 1,
        "versions": {"Python": platform.python_version()} | {package: version(package) for package in packages},
    }


# --- the page -----------------------------------------------------------------------------------------------------

OPENING = f"""\
Which models `decompose(model, images, by="head")` takes apart: every name that timm registers in its transformer-like
modules, and every image tower of open_clip. *Supported* means that the components sum to what the model computed (gap
below {GAP:.0e} in float32) **and** that at least {100 * SHARE:.0f} % of its attention, MLP and convolution branches are
components of their own (coverage).
"""
METHOD = f"""
Names whose models differ only in weights, classes or image size share a run. Each was run at its real depth, with
random weights of which all were moved off their initial values, on images as small as it takes. Models of more than
{LARGE // 10**6} M parameters were run narrower where their constructor takes a width, to save time; those that still
had more than {LARGEST // 10**6} M are left out and not counted. Of encoders for language models, which have no head,
the mean token was read. *Adapter*: a `HookedViT`, with TransformerLens hooks. *Traced*: the plain module. *Slow*:
contributions were replayed one by one, which is exact all the same. Cost: `decompose` as a multiple of the plain
forward, the median of three interleaved runs on one or two small images, where fixed costs weigh most; what full-size
images cost stands in the [README](../README.md).
"""


def share(record: Mapping[str, Any]) -> float:
    """Which part of a model's branches are components of their own."""
    return record["found"] / record["branches"] if record.get("branches") else 0.0


def is_supported(record: Mapping[str, Any]) -> bool:
    """Whether a model's gap and coverage are what is required; cost has no part in it."""
    return record.get("gap", float("inf")) < GAP and share(record) >= SHARE


def reason(record: Mapping[str, Any]) -> str:
    """What stops a model that is not supported."""
    if "gap" not in record:
        return record.get("error", "it was not run to its end")
    said = [f"gap {record['gap']:.1e}"] if not record["gap"] < GAP else []
    if share(record) < SHARE:
        where = "; ".join(record["stops"])
        said.append(f"{record['found']} of {record['branches']} branches{f': {where}' if where else ''}")
    return "; ".join(said)


def page(checkpoint: Checkpoint) -> str:
    """The page: totals, families, what stops the others, and each configuration."""
    ran = {name: planned for name, planned in checkpoint.plans.items() if planned.key in checkpoint.records}
    families: dict[str, list[Planned]] = defaultdict(list)
    for planned in checkpoint.plans.values():
        families[planned.family].append(planned)
    order = sorted(families, key=lambda family: (family.startswith("open_clip"), family))
    supported = {name for name, planned in ran.items() if is_supported(checkpoint.records[planned.key])}
    return "\n".join(
        [
            *_introduction(checkpoint, ran, supported, order),
            *_summary(checkpoint, families, order, supported),
            *_failures(checkpoint, ran, supported),
            *(line for family in order for line in _family(checkpoint, family, families[family])),
            *_left_out(),
        ]
    )


def _introduction(
    checkpoint: Checkpoint, ran: Mapping[str, Planned], supported: set[str], families: Sequence[str]
) -> Iterator[str]:
    of_timm = [name for name in ran if not name.startswith("open_clip:")]
    towers = [name for name in ran if name.startswith("open_clip:")]
    whole = [f for f in families if any(ran[n].family == f for n in supported)]
    pending = sum(not p.skipped and p.key not in checkpoint.records for p in checkpoint.plans.values())
    yield "# Supported models\n"
    yield OPENING
    for what, listed in (("names of timm", of_timm), ("image towers of open_clip", towers)):
        good = sum(name in supported for name in listed)
        yield f"- {good} of {len(listed)} {what} are supported ({good / max(1, len(listed)):.1%}).".replace("%", " %")
    yield f"- {len(whole)} of {len(families)} families have supported members."
    if pending:
        yield f"- Not run yet: {pending} name{'s' if pending > 1 else ''}."
    yield METHOD
    used = checkpoint.machine
    versions = ", ".join(f"{package} {number}" for package, number in used.get("versions", {}).items())
    where = f"{used.get('device')}, {used.get('threads')} thread"
    yield f"Made by `python benchmarks/supported.py` on {where}; {versions}.\n"


def _summary(
    checkpoint: Checkpoint, families: Mapping[str, Sequence[Planned]], order: Sequence[str], supported: set[str]
) -> Iterator[str]:
    yield "## Families\n"
    yield "| family | supported names | configurations | left out as too large | how |"
    yield "| --- | --- | --- | --- | --- |"
    for family in order:
        members = families[family]
        ran = [planned for planned in members if planned.key in checkpoint.records]
        good = sum(planned.name in supported for planned in ran)
        ways = Counter(way for p in ran if (way := checkpoint.records[p.key].get("way")) is not None)
        large = sum(planned.skipped.startswith("over") for planned in members)
        mark = "" if good == len(ran) else " ⚠"
        yield (
            f"| [{family}](#{_anchor(family)}) | {good} of {len(ran)}{mark} | {len({p.key for p in ran})} | "
            f"{large or ''} | {', '.join(ways)} |"
        )
    yield ""


def _failures(checkpoint: Checkpoint, ran: Mapping[str, Planned], supported: set[str]) -> Iterator[str]:
    by_key: dict[str, list[str]] = defaultdict(list)
    for name, planned in ran.items():
        if name not in supported:
            by_key[planned.key].append(name)
    failed = [p for p in checkpoint.plans.values() if p.skipped.startswith("cannot")]
    yield "## What stops the others\n"
    if not by_key and not failed:
        yield "Nothing: all are supported.\n"
        return
    yield "| names | what stops them |"
    yield "| --- | --- |"
    for key, listed in by_key.items():
        yield f"| {', '.join(listed)} | {_cell(reason(checkpoint.records[key]))} |"
    for planned in failed:
        yield f"| {planned.name} | {_cell(planned.skipped)} |"
    yield ""


def _family(checkpoint: Checkpoint, family: str, members: Sequence[Planned]) -> Iterator[str]:
    groups: dict[str, list[Planned]] = defaultdict(list)
    for planned in members:
        if planned.key in checkpoint.records:
            groups[planned.key].append(planned)
    yield f"## {family}\n"
    if groups:
        yield "| model | supported | how | million parameters | image | components | coverage | gap | cost |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for key, sharing in sorted(groups.items(), key=lambda item: item[1][0].name):
        yield _row(sharing, checkpoint.records[key])
    yield ""
    shared = [[p.name for p in sharing] for sharing in groups.values() if len(sharing) > 1]
    if shared:
        yield "<details><summary>Names that share a run</summary>\n"
        yield from (f"- {first}: {', '.join(others)}" for first, *others in sorted(shared))
        yield "\n</details>\n"
    if large := [planned.name for planned in members if planned.skipped.startswith("over")]:
        yield f"Over {LARGEST // 10**6} M parameters: {', '.join(large)}.\n"


def _row(sharing: Sequence[Planned], record: Mapping[str, Any]) -> str:
    first = min(sharing, key=lambda planned: planned.narrowed)
    others = f" + {len(sharing) - 1}" if len(sharing) > 1 else ""
    narrowed = f", width / {first.narrowed}" if first.narrowed > 1 else ""
    slow = ", slow" if record.get("warnings") and is_supported(record) else ""
    cells = [
        first.name.removeprefix("open_clip:") + others + narrowed,
        "yes" if is_supported(record) else "no",
        record.get("way", "") + slow,
        f"{first.parameters / 1e6:.1f}",
        str(record.get("image", "")),
        str(record.get("components", "")),
        f"{record['found']} / {record['branches']}" if "found" in record else "",
        f"{record['gap']:.0e}" if "gap" in record else "",
        f"{record['cost']:.2f}" if "cost" in record else "",
    ]
    return f"| {' | '.join(cells)} |"


def _left_out() -> Iterator[str]:
    yield "## Modules of timm that are not in the sweep\n"
    for why, modules in LEFT_OUT.items():
        yield f"- {why}: {', '.join(modules.split())}."
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- the command line ---------------------------------------------------------------------------------------------


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="results so far, one line each")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page is written")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="how many models at a time, one thread each")
    parser.add_argument("--only", default="", help="names that this regular expression is found in")
    options = parser.parse_args()
    checkpoint = Checkpoint.read(options.checkpoint)
    if not options.page_only:
        make_plans(checkpoint, options.only)
        checkpoint.add(machine=machine())
        count = len(checkpoint.missing(options.only))
        for number, record in enumerate(sweep(checkpoint, options.jobs, options.only), 1):
            print(f"{number} of {count}: {said(record)}", flush=True)
    options.page.write_text(page(checkpoint))


def said(record: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    if not is_supported(record):
        return f"{record['run']} NOT SUPPORTED, {record['seconds']:.0f} s: {reason(record)}"
    cost = f"cost {record['cost']:.2f}" if "cost" in record else record.get("error", "")
    return (
        f"{record['run']} {record['way']}, gap {record['gap']:.0e}, {record['found']} / {record['branches']} branches, "
        f"{cost}, {record['seconds']:.0f} s{' slow' if record['warnings'] else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
