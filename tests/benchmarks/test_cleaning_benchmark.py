"""Which rows the trainings of the cleaning benchmark leave out, and that none is trained twice."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cleaning as module  # noqa: E402  # pyright: ignore[reportMissingImports]

IDS = [f"r{place}" for place in range(30)]


def a_result():
    found = {
        "harms": SimpleNamespace(findings=[SimpleNamespace(row=4), SimpleNamespace(row=2)]),
        "label": SimpleNamespace(findings=[SimpleNamespace(row=2), SimpleNamespace(row=7)]),
    }
    run = SimpleNamespace(train=SimpleNamespace(ids=IDS))
    return SimpleNamespace(run=run, found=found, remove=[1, 2, 4, 7, 9], relabel={3: "better"})


@pytest.fixture
def sets():
    faults = SimpleNamespace(wrong=("r2", "r5"), contradictions=(("r7", "r8"),))
    return module.sets_of(a_result(), faults)


def test_a_control_is_as_many_rows_as_are_suggested(sets):
    assert sets["suggested"] == ["r1", "r2", "r4", "r7", "r9"]
    assert sets["planted wrong rows"] == ["r2", "r5", "r7"]
    assert sets["harms and label"] == ["r2", "r4", "r7"]
    drawn = [tuple(ids) for name, ids in sets.items() if name.startswith("random")]
    assert len(drawn) >= 3
    assert len(set(drawn)) == len(drawn)
    assert all(len(set(ids)) == 5 and set(ids) <= set(IDS) for ids in drawn)


def test_what_was_measured_is_read_again_and_the_list_is_put_back(
    sets, tmp_path, monkeypatch, capsys
):
    folder, trained = tmp_path / "list", []
    folder.mkdir()
    (folder / "rows.csv").write_text("as it was", encoding="utf-8")

    def measure(folder, run, **given):
        with (folder / "rows.csv").open(encoding="utf-8") as file:
            trained.append([line["id"] for line in csv.DictReader(file)])
        gains = [1.0, 2.0] if len(trained) <= 3 else [0.5, 0.25]
        part = {"gains": gains, "before": 3.0, "predicted": None}
        part |= {"gain": sum(gains) / 2, "low": 0.0, "high": 2.0}
        return {
            "removed": trained[-1],
            "seeds": given["seeds"],
            "sets": {"good": part, "heldout": part},
        }

    monkeypatch.setattr(module, "apply", measure)
    first = module.trainings(a_result(), sets, folder, None, None, 1)
    assert trained == list(sets.values())
    assert (folder / "rows.csv").read_text(encoding="utf-8") == "as it was"
    printed = capsys.readouterr().out
    assert "random rows, good: mean gain +0.3750 of +0.3750" in printed
    assert "suggested above random, heldout: +1.1250 [" in printed
    assert module.trainings(a_result(), sets, folder, None, None, 1) == first
    assert len(trained) == len(sets)
    other = {**sets, "suggested": ["r1"]}
    module.trainings(a_result(), other, folder, None, None, 1)
    assert trained[len(sets) :] == [["r1"]]
