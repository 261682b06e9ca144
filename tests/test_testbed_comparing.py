"""The testbed's models beside each other."""

import json
import sys

import pytest

from vitdecomp_lens import testbed
from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.comparing import concentration, match_by_cka
from vitdecomp_lens.testbed import comparing
from vitdecomp_lens.testbed.banks import TEMPLATES, features, text_bank


@pytest.mark.sweep
def test_the_command_prints_tables_and_writes_numbers_and_a_plot(tmp_path, monkeypatch, capsys):
    """Two models, and their numbers as they come out of a way of their own."""
    plot, path = tmp_path / "models.png", tmp_path / "found.json"
    asked = ["--models", "clip", "swin", "--images", "20", "--resamples", "10", "--draws", "9", "--seed", "2"]
    monkeypatch.setattr(sys, "argv", ["comparing", *asked, "--plot", str(plot), "--json", str(path)])
    comparing.main()
    printed, said = capsys.readouterr().out, json.loads(path.read_text())
    assert plot.read_bytes()[:4] == b"\x89PNG"
    images = testbed.normalised(testbed.Scenes("test", seed=2, size=20).images(range(20)))
    clip, swin = (decompose(testbed.load(name), images, by="head") for name in ("clip", "swin"))
    bank = text_bank(testbed.load_original("clip"), features()["pattern"], templates=TEMPLATES)
    parts = {"clip": clip, "swin": swin.map(testbed.aligner("swin"))}
    assert list(said["concentrations"]) == ["clip", "swin"]
    for name, one in said["concentrations"].items():
        expected = concentration(parts[name], {"pattern": bank}, resamples=10, seed=2)
        assert list(one["ratio"]) == list(testbed.ATTRIBUTES)
        assert one["components"] == len(parts[name])
        ends = [float(number) for number in (expected.ratio, expected.low, expected.high)]
        assert one["ratio"]["pattern"] == pytest.approx(ends, rel=1e-3)
        assert one["opposed"]["pattern"] == pytest.approx(float(expected.opposed), abs=1e-3)
        assert expected.told("pattern") in next(line for line in printed.splitlines() if line.startswith("| pattern"))
    # The aligner takes each head's contributions to another place each; CKA is of what they are there.
    heads = [one.select(kind="head") for one in parts.values()]
    match = match_by_cka(*heads, permutations=9, seed=2)
    (found,) = said["matches"]
    assert found["models"] == ["clip", "swin"]
    assert found["heads"] == [16, 18]
    assert found["best"] == pytest.approx(match.mean, abs=1e-3)
    assert found["by chance"] == pytest.approx(match.mean_chance, abs=1e-3)
    assert found["mutual"] == [[one.component, one.other] for one in match.mutual]
    assert f"| clip, swin | debiased CKA | {match.mean:.2f} | {match.mean_chance:.2f}" in " ".join(printed.split())


def test_what_takes_no_comparing_is_refused():
    with pytest.raises(InputError, match="at least one model"):
        comparing.compare([], images=4)
