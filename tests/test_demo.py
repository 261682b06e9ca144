"""``vitdecomp-lens demo``: that it takes all steps, that its numbers hold, and what it leaves behind."""

import re

import pytest

from vitdecomp_lens.cli import main
from vitdecomp_lens.commands import demo

SIZE = 80
NAMES = ["decompose", "align", "score", "interpret", "retrieve", "segment", "repair", "report"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """By the name of each step, its rows; and the folder that was written to."""
    out = tmp_path_factory.mktemp("demo")
    world = demo.World(SIZE, 0, out)
    return {step.__doc__.partition(":")[0].lower(): list(step(world)) for step in demo.STEPS}, out


def number(text):
    return float(re.match(r"[-+.e\d]+", text)[0])


def test_it_takes_all_steps_and_says_where_the_page_is(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--out", str(out), "--size", str(SIZE), "--seed", "1"]) == 0
    printed = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == ["features.png", "heatmaps.png", "report.html"]
    assert all(path.stat().st_size > 10_000 for path in out.iterdir())
    cells = [line.split("│")[1:-1] for line in printed.out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in cells if row[0].strip()] == NAMES
    values = [row[2].strip() for row in cells if row[2].strip()]
    assert len(values) >= len(NAMES)
    assert all(re.fullmatch(r"\d+\.\d{3}|\de-\d\d", value) for value in values)
    assert "report.html in a browser" in " ".join(printed.out.split())
    told = printed.err.splitlines()
    assert [line.partition(" ")[0] for line in told] == ["Load", *(str(n) for n in range(1, 9))]
    assert all(re.search(r"\(\d+\.\d s\)$", line) for line in told)


def test_what_it_finds_holds(rows):
    found, _ = rows
    assert list(found) == NAMES
    assert all(0 < row.value < number(row.against) for row in found["decompose"])
    (aligned,) = found["align"]
    assert 0 < aligned.value < number(aligned.against) < 0.5  # fewer scenes, a worse map
    assert all(row.value > 2 * number(row.against) for row in found["score"])
    assert all(0.1 < row.value <= 1 for row in found["interpret"])
    assert all(row.value > 1.2 * number(row.against) for row in found["retrieve"])
    (segmented,) = found["segment"]
    assert number(segmented.against) + 0.05 < segmented.value < 1
    worst, average = found["repair"]
    assert worst.value <= average.value
    assert number(worst.against) <= number(average.against)
    assert worst.value > number(worst.against)
    (page,) = found["report"]
    assert page.what.startswith(f"{demo.SHOWN} scenes")


def test_the_size_that_it_tells_is_that_of_the_page(rows):
    found, out = rows
    assert found["report"][0].value == pytest.approx((out / demo.PAGE).stat().st_size / 1e6)
    assert "a circle" in (out / demo.PAGE).read_text(encoding="utf-8")


@pytest.mark.sweep
def test_a_seed_gives_the_same_numbers_again_and_another_seed_others(rows, tmp_path):
    def taken(seed):
        world = demo.World(SIZE, seed, tmp_path)
        return {name: list(step(world)) for name, step in zip(NAMES[:4], demo.STEPS[:4], strict=True)}

    again, other = taken(0), taken(1)
    assert again == {name: rows[0][name] for name in again}
    assert all(other[name] != again[name] for name in again)


def test_without_matplotlib_there_is_the_page_and_advice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "can_draw", lambda: False)
    monkeypatch.setattr(demo, "STEPS", (demo.aligning, demo.scoring, demo.segmenting, demo.reporting))
    assert main(["demo", "--out", str(tmp_path), "--size", str(demo.FEWEST)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "vitdecomp-lens[viz]" in capsys.readouterr().err


def test_what_it_cannot_do_is_said_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("here")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "--out must be a folder" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "new"), "--size", "49"]) == 2
    assert "--size of at least 50 scenes; got 49" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
