"""The measurements behind a certificate: parity, gaps, live hooks, cost. `vitdecomp_lens.verify` puts them together."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vitdecomp_lens.certificate import Cost, CutCheck, GraphParity, HookCheck, Parity
from vitdecomp_lens.components import PLAIN
from vitdecomp_lens.coverage import Coverage
from vitdecomp_lens.decompose import attribute, attribute_tokens, decompose
from vitdecomp_lens.errors import CapacityError, VitDecompError
from vitdecomp_lens.frozen.trace import reading, trace
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.points import LazyHookPoint, hook_points

Progress = Callable[[str, float], None]
Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
DIRECTIONS = 16  # random ones, where whole vectors would take too much memory
TOKEN_DIRECTIONS = 2
COST_BATCH = 8
COST_SECONDS = 3.0
COST_ROUNDS = (5, 15)
HOOKS_AT_ONCE = 64  # patterns of a few blocks at a time: all of a large model's would fill the memory
SCORE_HOOKS = ("hook_q", "hook_k", "hook_rot_q", "hook_rot_k", "hook_attn_scores")


def original(model: nn.Module) -> nn.Module:
    """The module itself, hooked or not."""
    return model.original if isinstance(model, HookedViT) else model


def double(single: nn.Module) -> nn.Module:
    """A deep copy in float64, hooked where the model is."""
    module = copy.deepcopy(original(single))
    device = weight(module).device
    # Apple's GPUs have no float64.
    module = module.to("cpu" if device.type == "mps" else device, torch.float64)
    return HookedViT(module) if isinstance(single, HookedViT) else module


@torch.no_grad()
def graph_parity(module: nn.Module, images: Tensor) -> GraphParity:
    """Compare what the traced graph gives with what the module does."""
    read, _ = reading("representation", hook_points(module))
    graph = trace(module, images[:1])
    found: Tensor = graph.evaluate([graph.output], {graph.images: images})[graph.output]
    return GraphParity(_difference(read(module, images).flatten(1), found.flatten(1)))


def weight(model: nn.Module) -> Tensor:
    """A tensor with the model's device and dtype, for ``.to()``."""
    return next(model.parameters(), torch.zeros(()))


def _leaves(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [leaf for item in output or () for leaf in _leaves(item)] if isinstance(output, list | tuple) else []


@torch.no_grad()
def parity(model: HookedViT, images: Tensor) -> Parity:
    """Compare the hooked model's output with the original's."""
    expected = _leaves(model.original(images))
    look: Callable[..., None] = lambda _value, hook: None  # noqa: E731
    eager: Hooks = [(name, look) for name, point in model.hook_dict.items() if not isinstance(point, LazyHookPoint)]
    plain, hooked = model(images), model.run_with_hooks(images, fwd_hooks=eager)
    everything = model.run_with_hooks(images, fwd_hooks=[(name, look) for name in model.hook_dict])
    return Parity(
        plain=_equal(expected, _leaves(plain)),
        hooked=_equal(expected, _leaves(hooked)),
        all_hooked=max(_difference(a, b) for a, b in zip(expected, _leaves(everything), strict=True)),
    )


def _equal(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(map(torch.equal, these, those))


def _difference(expected: Tensor, value: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


# --- gaps -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cut_checks(
    single: nn.Module, images: Tensor, *, seed: int, max_bytes: int, say: Progress
) -> tuple[tuple[CutCheck, ...], Coverage | None]:
    """Decompose by every cut, in float32 and float64; the coverage is the lowest of all."""
    spaces = _spaces(single, images[:1])
    requests = [(by, of, tokens) for of in spaces for by in PLAIN for tokens in (False, True)]
    checks: list[CutCheck] = []
    coverage: Coverage | None = None
    for number, dtype in enumerate(("float32", "float64")):
        model = single if dtype == "float32" else double(single)
        for place, (by, of, tokens) in enumerate(requests):
            cut = CutCheck(by, of, tokens, dtype, None)
            say(str(cut), (number + place / len(requests)) / 2)
            check = _TokenGap(model, cut, seed, max_bytes) if tokens else _WholeGap(model, cut, seed, max_bytes)
            checks.append(check.run(images.to(weight(model))))
            coverage = _worst(coverage, check.coverage)
    return tuple(checks), coverage


def _worst(one: Coverage | None, other: Coverage | None) -> Coverage | None:
    known = [coverage for coverage in (one, other) if coverage is not None]
    return min(known, key=lambda coverage: coverage.share, default=None)


def _spaces(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Representation and logits, unless they are the same, or something nonlinear stands between them."""
    if getattr(model, "has_activation_before_classifier", False):
        return ("representation",)
    images = images.to(weight(model))
    with torch.no_grad():
        output = _leaves(original(model)(images))
    if not isinstance(model, HookedViT) and (len(output) != 1 or output[0].dim() != 2):
        return ("representation",)  # more than one output, or none that is a vector: no logits of an unknown model
    same = _equal([vectors(model, images, "representation")], output)
    return ("representation",) if same else ("representation", "logits")


class _WholeGap:
    """Decomposes images, and keeps the largest gap."""

    def __init__(self, model: nn.Module, cut: CutCheck, seed: int, max_bytes: int) -> None:
        self.model, self.cut, self.seed = model, cut, seed
        self.options: dict[str, Any] = {"by": cut.by, "of": cut.of, "max_bytes": max_bytes}
        self.coverage: Coverage | None = None
        self.note = ""

    def run(self, images: Tensor) -> CutCheck:
        """Return the check with its gap, or with the reason why there is none."""
        try:
            gap = self.gap(images)
        except VitDecompError as error:
            return replace(self.cut, note=str(error))
        if not math.isfinite(gap):
            return replace(self.cut, note="the gap is not a finite number")
        return replace(self.cut, gap=gap, note=self.note)

    def gap(self, images: Tensor) -> float:
        """The largest gap of some images."""
        try:
            parts = decompose(self.model, images, **self.options)
        except CapacityError:
            self.note = f"along {DIRECTIONS} random directions, as whole vectors would take too much memory"
            return self.along(attribute, images, DIRECTIONS)
        self.coverage = parts.coverage
        assert parts.gap is not None  # all components were asked for
        return float(parts.gap.max())

    def along(self, read: Callable[..., Any], images: Tensor, count: int) -> float:
        """The largest gap along random unit directions, relative to the length of an image's vector."""
        whole = vectors(self.model, images, self.cut.of)
        noise = torch.randn(count - 1, whole.shape[1], generator=torch.Generator().manual_seed(self.seed))
        directions = torch.cat([whole[:1], noise.to(whole)])
        scores = read(self.model, images, nn.functional.normalize(directions, dim=1), **self.options)
        self.coverage = scores.coverage
        return float((scores.rest.abs().amax(1) / whole.norm(dim=1)).max())


class _TokenGap(_WholeGap):
    """The same by token, along a few directions."""

    def gap(self, images: Tensor) -> float:
        """The largest gap of some images."""
        try:
            return self.along(attribute_tokens, images, TOKEN_DIRECTIONS)
        except CapacityError:
            self.note = "of one image along one direction, as more would take too much memory"
            return self.along(attribute_tokens, images[:1], 1)


@torch.no_grad()
def vectors(model: nn.Module, images: Tensor, of: str) -> Float[Tensor, "batch d_rep"]:
    """What is decomposed, by the traced graph."""
    graph = trace(model, images[:1], of=of)
    found: Tensor = graph.evaluate([graph.root], {graph.images: images})[graph.root]
    return found.flatten(1)


# --- hooks ------------------------------------------------------------------------------------------------------


def hook_checks(model: HookedViT, images: Tensor, *, seed: int, say: Progress) -> tuple[HookCheck, ...]:
    """Move the value at each hook in a random direction, and see whether the output moves: by its derivative."""
    images, generator = images.to(weight(model)), torch.Generator().manual_seed(seed)
    names, shapes, live = list(model.hook_dict), dict[str, torch.Size](), list[bool]()
    for first in range(0, len(names), HOOKS_AT_ONCE):
        say(f"hooks from {names[first]}", first / len(names))
        some = names[first : first + HOOKS_AT_ONCE]
        live += _moves_output(model, images, some, generator, shapes)
    excuses = ("" if moves else _excuse(name, shapes) for name, moves in zip(names, live, strict=True))
    return tuple(map(HookCheck, names, live, excuses))


@torch.enable_grad()
def _moves_output(
    model: HookedViT, images: Tensor, names: list[str], generator: torch.Generator, shapes: dict[str, torch.Size]
) -> list[bool]:
    """For each hook, whether some output has a derivative by a step at it."""
    steps = {name: torch.zeros((), dtype=images.dtype, device=images.device, requires_grad=True) for name in names}

    def noise(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like) - 0.5

    def move(value: Tensor, hook: HookPoint) -> Tensor:
        shapes[str(hook.name)] = value.shape
        return value + steps[str(hook.name)] * noise(value)

    outputs = _leaves(model.run_with_hooks(images, fwd_hooks=[(name, move) for name in names]))
    read = sum((output * noise(output)).sum() for output in outputs)
    if not isinstance(read, Tensor) or not read.requires_grad:
        return [False] * len(names)
    derivatives = torch.autograd.grad(read, list(steps.values()), allow_unused=True)
    return [found is not None and bool(found.abs() > 0) for found in derivatives]


def _excuse(name: str, shapes: dict[str, torch.Size]) -> str:
    """Why nothing at a hook could change the output, where that is a matter of principle."""
    owner, _, kind = name.rpartition(".")
    keys = shapes.get(f"{owner}.hook_k")
    if keys is not None and keys[1] == 1 and kind in SCORE_HOOKS:
        return "there is one key only, whose pattern is 1 whatever the scores"
    return ""


# --- cost -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cost(model: nn.Module, images: Tensor) -> Cost | None:
    """Time ``decompose(by="head")`` beside the plain forward; None where nothing can be decomposed."""
    batch = images[torch.arange(COST_BATCH) % len(images)].to(weight(model))
    plain = original(model)
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(batch),
        "decompose": lambda: decompose(model, batch, by="head"),
        "again": lambda: plain(batch),
    }
    times: dict[str, list[float]] = {what: [] for what in runs}
    try:
        for run in runs.values():
            run()  # compile and warm up
    except VitDecompError:
        return None
    started = time.perf_counter()
    for number in range(COST_ROUNDS[1]):
        if number >= COST_ROUNDS[0] and time.perf_counter() - started > COST_SECONDS:
            break
        # In turning order, so that none always follows the same other.
        for what, run in list(runs.items())[number % 3 :] + list(runs.items())[: number % 3]:
            times[what].append(_timed(run, batch.device))
    medians = {what: statistics.median(taken) for what, taken in times.items()}
    return Cost(COST_BATCH, **medians)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    accelerator = torch.accelerator if device.type != "cpu" and torch.accelerator.is_available() else None
    started = time.perf_counter()
    run()
    if accelerator is not None:
        accelerator.synchronize()
    return time.perf_counter() - started
