"""What was measured, a number a record; and tables of many."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vitdecomp_lens.errors import InputError, StoreError

__all__ = ["Record", "Results", "cell"]

COUNTS = ("count", "components")  # measures that are no shares


@dataclass(frozen=True)
class Record:
    """One number.

    Attributes:
        task: Such as ``"segmentation"``.
        measure: Such as ``"mIoU"``; shares are shares of one.
        model: Whose.
        method: Such as ``"rollout"``, or ``"total effect"``.
        seed: Of what was drawn. Real data have one.
        value: The number.
        of: Which of several questions of the task, such as an attribute; empty where there is one.
        step: Where along a curve, such as the number of components ablated; None for a number by itself.
        interval: Of 95 % over images, where there is one.
    """

    task: str
    measure: str
    model: str
    method: str
    seed: int
    value: float
    of: str = ""
    step: int | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, repr=False)
class Results:
    """Many records, and how they came about.

    Attributes:
        records: All numbers.
        made: Versions, sizes, seeds: what is to be known of them.
    """

    records: tuple[Record, ...]
    made: Mapping[str, Any]

    def __repr__(self) -> str:
        tasks = ", ".join(dict.fromkeys(record.task for record in self.records))
        return f"Results({len(self.records)} numbers: {tasks})"

    def __add__(self, other: "Results") -> "Results":
        """Both; what is said of how they were made differently is said of both."""
        if twice := {_named(one) for one in self.records} & {_named(one) for one in other.records}:
            raise InputError(f"Expected results of different runs; both hold {sorted(map(str, twice))[0]}.")
        made = {
            name: list(dict.fromkeys([*_several(known), *_several(new)]))
            for name, new in other.made.items()
            if (known := self.made.get(name, new)) != new
        }
        return Results(self.records + other.records, {**self.made, **other.made, **made})

    def without(self, other: "Results") -> "Results":
        """Those records of which the other results hold none of the same name, whatever the numbers."""
        held = {_named(one) for one in other.records}
        return replace(self, records=tuple(one for one in self.records if _named(one) not in held))

    def where(self, **wanted: Any) -> "Results":
        """Those records whose fields are these.

        Example:
            >>> records = tuple(Record("t", "m", model, "ours", 0, 1.0) for model in ("deit", "reg"))
            >>> Results(records, {}).where(model="reg").names("model")
            ('reg',)
        """
        fits = (all(getattr(record, name) == value for name, value in wanted.items()) for record in self.records)
        return replace(self, records=tuple(record for record, fit in zip(self.records, fits, strict=True) if fit))

    def names(self, field: str) -> tuple[Any, ...]:
        """The values of a field, in the order of the records."""
        return tuple(dict.fromkeys(getattr(record, field) for record in self.records))

    def values(self, **wanted: Any) -> tuple[float, ...]:
        """The numbers of those records, one a seed."""
        return tuple(record.value for record in self.where(**wanted).records)

    def mean(self, **wanted: Any) -> float:
        """The mean of those numbers.

        Raises:
            InputError: If there are none.
        """
        if not (values := self.values(**wanted)):
            raise InputError(f"Nothing was measured of {wanted}.")
        return statistics.fmean(values)

    def table(
        self,
        *,
        rows: Sequence[str] = ("method",),
        published: Mapping[tuple[str, str], float] | None = None,
        **wanted: Any,
    ) -> str:
        """A table in Markdown with a column for each model: means and standard deviations over seeds.

        Args:
            rows: The fields that a row is named by.
            published: Figures to show in brackets, by method and model.
            **wanted: Which records, such as ``task="segmentation"``.

        Example:
            >>> records = tuple(Record("t", "mIoU", "deit", "ours", seed, 0.5 + seed / 10) for seed in range(3))
            >>> print(Results(records, {}).table(measure="mIoU", published={("ours", "deit"): 0.5291}))
            | | deit |
            | --- | --: |
            | ours | .600 ± .100 (.529) |
        """
        chosen = self.where(**wanted)
        models = chosen.names("model")
        named: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
        for record in chosen.records:
            row = named.setdefault(tuple(getattr(record, field) for field in rows), {})
            row.setdefault(record.model, []).append(record)
        lines = ["| | " + " | ".join(models) + " |", "| --- |" + " --: |" * len(models)]
        for names, row in named.items():
            cells = [cell(row[model]) if model in row else "" for model in models]
            if published:
                known = [published.get((str(names[0]), model)) for model in models]
                cells = [
                    f"{one} ({short(figure)})" if figure else one for one, figure in zip(cells, known, strict=True)
                ]
            lines.append(f"| {', '.join(str(name) for name in names if name != '')} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        records = ",\n".join(json.dumps(_packed(record), allow_nan=False) for record in self.records)
        part = path.with_suffix(".part")
        part.write_text(f'{{"made": {json.dumps(dict(self.made))}, "records": [\n{records}\n]}}\n', encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what `save` wrote.

        Raises:
            StoreError: If it is no such file.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(_unpacked(record) for record in content["records"]), content["made"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{str(path)!r} does not hold results: {error}.") from error


def cell(records: Sequence[Record]) -> str:
    """Mean and standard deviation over seeds; of a single one, its interval.

    Example:
        >>> cell([Record("t", "m", "deit", "ours", 0, 0.25, interval=(0.2, 0.3))])
        '.250 [.200, .300]'
    """
    values = [record.value for record in records]
    said = "{:.1f}".format if records[0].measure in COUNTS else short
    if len(values) > 1:
        return f"{said(statistics.fmean(values))} ± {said(statistics.stdev(values))}"
    interval = records[0].interval
    return said(values[0]) + (f" [{said(interval[0])}, {said(interval[1])}]" if interval else "")


def short(number: float) -> str:
    """Three decimals, without a leading zero."""
    said = f"{number:.3f}"
    return said.replace("0.", ".", 1) if abs(number) < 1 and not said.lstrip("-").startswith("1") else said


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _named(record: Record) -> tuple[Any, ...]:
    """What a number is of."""
    return record.task, record.measure, record.model, record.method, record.of, record.seed, record.step


def _packed(record: Record) -> dict[str, Any]:
    """Without what says nothing; seven digits are more than any of it means."""
    known = {name: value for name, value in asdict(record).items() if value not in ("", None)}
    known["value"] = _rounded(record.value)
    return known if record.interval is None else {**known, "interval": list(map(_rounded, record.interval))}


def _rounded(number: float) -> float:
    return float(f"{number:.7g}")


def _unpacked(content: Mapping[str, Any]) -> Record:
    interval = content.get("interval")
    return Record(**{**content, "interval": tuple(interval) if interval else None})
