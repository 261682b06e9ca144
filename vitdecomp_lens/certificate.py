"""The certificate of a model: what was measured, what is required, and the verdict. `vitdecomp_lens.verify` makes it.

Requirements: contributions sum to what the model computed within 1e-5 in float32 and 1e-10 in float64, for every
cut; at least 90 % of the branches are components of their own; the hooked model's output is the original's; every
hook is live, or cannot be for a reason that is stated.
"""

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from vitdecomp_lens.components import By
from vitdecomp_lens.coverage import Coverage

TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
MIN_COVERAGE = 0.9
WIDTH = 80


@dataclass(frozen=True)
class CutCheck:
    """One cut, decomposed: how far its contributions are from what the model computed.

    Attributes:
        by: What the components are.
        of: ``"representation"`` or ``"logits"``.
        tokens: Whether the scores were computed by token.
        dtype: ``"float32"`` or ``"float64"``.
        gap: The largest gap of all images, None where there is none.
        note: How it was measured, where that is not the usual way; or why there is no gap.

    Example:
        >>> CutCheck("head", "logits", False, "float32", 3e-7).passes
        True
    """

    by: By
    of: str
    tokens: bool
    dtype: str
    gap: float | None
    note: str = ""

    @property
    def passes(self) -> bool:
        """Whether there is a gap, and it is within the tolerance of its dtype."""
        return self.gap is not None and self.gap <= TOLERANCES[self.dtype]

    def __str__(self) -> str:
        scores = " by token" if self.tokens else ""
        return f'by="{self.by}"{scores}, of="{self.of}", {self.dtype}'


@dataclass(frozen=True)
class Parity:
    """How the hooked model's output compares with the original's.

    Attributes:
        plain: Whether they are equal bit for bit without hooks.
        hooked: Whether they are with a hook on every hook point that changes no path of computation.
        all_hooked: The largest relative difference with a hook on every hook point, patterns included: attention is
            then computed step by step in place of the fused kernel.
    """

    plain: bool
    hooked: bool
    all_hooked: float

    @property
    def passes(self) -> bool:
        """Whether both are equal bit for bit, and the difference with all hooks is one of rounding."""
        return self.plain and self.hooked and self.all_hooked <= TOLERANCES["float32"]


@dataclass(frozen=True)
class GraphParity:
    """How the traced graph of a model that is not hooked compares with the model itself.

    Attributes:
        difference: The largest relative difference of what is decomposed.
    """

    difference: float

    @property
    def passes(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.difference <= TOLERANCES["float32"]


@dataclass(frozen=True)
class HookCheck:
    """Whether the model goes on with what a hook returns.

    Attributes:
        name: The hook.
        live: Whether another value there changed the output.
        reason: Why no value could, where that is known; ``""`` otherwise.
    """

    name: str
    live: bool
    reason: str = ""


@dataclass(frozen=True)
class Cost:
    """Medians of interleaved runs, in seconds.

    Attributes:
        batch: Images at once.
        plain: The original's forward.
        again: The same once more: the noise of this measurement.
        decompose: ``decompose(by="head")`` with its forward.
    """

    batch: int
    plain: float
    again: float
    decompose: float


@dataclass(frozen=True)
class Certificate:
    """What was measured of one model. Its text is a report of 80 columns; see the attributes for the numbers.

    Attributes:
        model: Its name.
        weights: What the parameters were.
        licence: Of the weights, where the library states one.
        versions: Of Python and the libraries.
        images: How many, and of what kind.
        parity: Hooked, or traced, against the original.
        cuts: One check a cut, dtype and space.
        coverage: How many branches are components of their own; None where no cut could be made.
        hooks: One check a hook.
        cost: Time, None where it was not measured.
        notes: What else there is to know.

    Example:
        >>> hook = HookCheck("hook_embed", live=False)
        >>> parity = Parity(plain=True, hooked=True, all_hooked=0.0)
        >>> cut = CutCheck("head", "logits", False, "float32", 3e-7)
        >>> certificate = Certificate("vit", "", "", {}, "", parity, (cut,), Coverage(24, 24), (hook,), None)
        >>> certificate.supported, certificate.failures
        (False, ('1 hooks are not live: hook_embed',))
    """

    model: str
    weights: str
    licence: str
    versions: Mapping[str, str]
    images: str
    parity: Parity | GraphParity
    cuts: tuple[CutCheck, ...]
    coverage: Coverage | None
    hooks: tuple[HookCheck, ...]
    cost: Cost | None
    notes: tuple[str, ...] = ()

    @property
    def dead(self) -> tuple[HookCheck, ...]:
        """Hooks that should be live and are not."""
        return tuple(hook for hook in self.hooks if not hook.live and not hook.reason)

    @property
    def failures(self) -> tuple[str, ...]:
        """What is required and not so, one sentence each."""
        return tuple(self._failures())

    def _failures(self) -> Iterator[str]:
        for cut in self.cuts:
            if cut.gap is None:
                yield f"{cut}: {cut.note}"
            elif not cut.passes:
                yield f"{cut}: gap {cut.gap:.1e}, allowed is {TOLERANCES[cut.dtype]:.0e}"
        if not self.cuts:
            yield "no cut was checked"
        if self.coverage is None or self.coverage.share < MIN_COVERAGE:
            yield f"coverage is below {100 * MIN_COVERAGE:.0f} %: {self.coverage or 'none'}"
        if not self.parity.passes:
            made = "hooked" if isinstance(self.parity, Parity) else "traced"
            yield f"the {made} model's output is not the original's"
        if self.dead:
            yield f"{len(self.dead)} hooks are not live: {', '.join(hook.name for hook in self.dead[:5])}"

    @property
    def supported(self) -> bool:
        """Whether everything that is required is so."""
        return not self.failures

    def to_json(self) -> str:
        """All of it as JSON: the attributes by name, and ``supported`` and ``failures``."""
        share = None if self.coverage is None else self.coverage.share
        values: dict[str, Any] = asdict(self) | {"supported": self.supported, "failures": self.failures}
        if self.coverage is not None:
            values["coverage"]["share"] = share
        return json.dumps(_finite(values), indent=2, ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self._facts()
        yield Text()
        yield self._gaps()
        yield Text()
        yield from self._verdict()

    def _facts(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in (
            ("model", Text(self.model, style="bold")),
            ("weights", Text(self.weights)),
            ("licence", Text(self.licence)),
            ("images", Text(self.images)),
            ("versions", Text(", ".join(f"{name} {version}" for name, version in self.versions.items()))),
            ("parity", self._parity()),
            ("coverage", Text(str(self.coverage or "none: nothing could be decomposed"))),
            ("hooks", self._hooks()),
            ("cost", self._cost()),
        ):
            table.add_row(name, value)
        return table

    def _parity(self) -> Text:
        def said(same: bool) -> tuple[str, str]:
            return ("bit for bit", "green") if same else ("DIFFERS", "bold red")

        if isinstance(self.parity, GraphParity):
            return Text(f"traced, not hooked: within {self.parity.difference:.1e} of the module itself")
        return Text.assemble(
            "without hooks ",
            said(self.parity.plain),
            "; with hooks ",
            said(self.parity.hooked),
            f";\nwith patterns and norms hooked too, within {self.parity.all_hooked:.1e}",
        )

    def _hooks(self) -> Text:
        if not self.hooks:
            return Text("none: there is no adapter; components are named by module path")
        live = sum(hook.live for hook in self.hooks)
        lines = [f"{live} of {len(self.hooks)} are live"]
        reasons: dict[str, list[str]] = {}
        for hook in self.hooks:
            if not hook.live:
                reasons.setdefault(hook.reason or "NOT LIVE", []).append(hook.name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{', '.join(names[:3])}{more}: {reason}")
        return Text("\n".join(lines))

    def _cost(self) -> RenderableType:
        if self.cost is None:
            return Text("not measured")
        cost = self.cost
        return Text(
            f'decompose(by="head") takes {cost.decompose / cost.plain:.2f} times the plain forward\n'
            f"({_seconds(cost.decompose)} against {_seconds(cost.plain)}, batch of {cost.batch}; "
            f"plain against plain {cost.again / cost.plain:.2f})"
        )

    def _gaps(self) -> Table:
        table = Table(
            title="Gap: max|sum of contributions − model's own| / max|model's own|",
            title_style="",
            title_justify="left",
            caption="Allowed: "
            + ", ".join(f"{allowed:.0e} in {dtype}" for dtype, allowed in TOLERANCES.items())
            + ". By token: along unit directions,\nrelative to the length of the model's own.",
            caption_justify="left",
        )
        table.add_column("components")
        table.add_column("read")
        columns = [(of, dtype) for of in self._spaces() for dtype in TOLERANCES]
        for of, dtype in columns:
            table.add_column(f"{of}\n{dtype}", justify="right", no_wrap=True)
        cuts = {(cut.by, cut.tokens, cut.of, cut.dtype): cut for cut in self.cuts}
        for by, tokens in dict.fromkeys((cut.by, cut.tokens) for cut in self.cuts):
            cells = [_cell(cuts.get((by, tokens, *column))) for column in columns]
            table.add_row(by, "by token" if tokens else "whole", *cells)
        return table

    def _spaces(self) -> tuple[str, ...]:
        """What was read; a model whose output is its representation has no logits."""
        return tuple(dict.fromkeys(cut.of for cut in self.cuts))

    def _verdict(self) -> Iterator[Text]:
        notes = dict.fromkeys(f'by="{cut.by}": {cut.note}' for cut in self.cuts if cut.note and cut.gap is not None)
        for note in (*notes, *self.notes):
            yield Text(note)
        if self.supported:
            yield Text("Verdict: supported", style="bold green")
            return
        yield Text("Verdict: not supported", style="bold red")
        for failure in self.failures:
            yield Text(f"  {failure}")


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(cut: CutCheck | None) -> Text:
    if cut is None:
        return Text("")
    if cut.gap is None:
        return Text("none", style="bold red")
    return Text(f"{cut.gap:.1e}", style="green" if cut.passes else "bold red")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
