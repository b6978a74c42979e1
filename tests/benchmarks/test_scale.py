"""Growth beside the peers: the table's arithmetic, the rows that all read, and the smallest case."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import influence
from influence import fitting

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import beside  # pyright: ignore[reportMissingImports]
import scale  # pyright: ignore[reportMissingImports]

NOBODY = dict.fromkeys(beside.PEERS)
#: Interpreters of the peers' environments, where this machine has them.
PYTHONS = {name: os.environ.get(f"LORA_INFLUENCE_{name.upper()}") for name in beside.PEERS}


def record(fit: float, score: float = 0.0, **changes: int):
    """A record of a case that took so many seconds."""
    times = {"fit": {"wall": 9.0, "cpu": fit}, "score": {"wall": 9.0, "cpu": score}}
    return times | {"before": 400_000_000, "peak": 500_000_000, "disk": 2_000_000} | changes


# ---- arithmetic ----------------------------------------------------------------------------------


def test_a_slope_is_that_of_the_logarithms():
    assert scale.slope([10, 1_000], [3, 3 * 100**1.5]) == pytest.approx(1.5)
    assert scale.slope([1, 5, 10], [2, 99, 2]) == 0


def test_a_size_is_expected_in_proportion_at_least():
    assert scale.projected([], 100) == 0
    assert scale.projected([(100, 2.0)], 1_000) == pytest.approx(20)
    assert scale.projected([(10, 4.0), (100, 5.0)], 1_000) == pytest.approx(50)  # calls cost most
    assert scale.projected([(10, 1.0), (100, 100.0)], 1_000) == pytest.approx(10_000)
    assert scale.projected([(1, 9.0), (10, 1.0), (100, 10.0)], 1_000) == pytest.approx(100)


def test_parameters_are_those_of_the_model():
    for size, asked in list(scale.line("parameters"))[:2]:
        assert size == scale.model_of(asked["width"], asked["rank"]).space.size


def test_cells_and_slopes_are_of_processor_seconds():
    found = scale.cells((100, record(3.0, 1.0)), [(100, record(1.5, 0.5))])
    assert found == "3.00 | 1.00 | 4.00 | 2.00 | 500 (400) | 2.0"
    assert scale.cells((100, record(3.0, 1.0)), []).split(" | ")[3] == ""
    two = [(10, record(1.0, 1.0)), (100, record(10.0, 1.0, peak=1_400_000_000, disk=20_000))]
    assert scale.slopes(two) == "1.00 | 0.00 | 0.74 | 1.00 | -2.00"
    assert scale.slopes(two[:1]) == "- | - | - | - | -"


def test_only_peers_with_an_interpreter_are_asked():
    assert list(scale.libraries(NOBODY)) == ["additive", "ours"]
    asked = scale.libraries(NOBODY | {"bergson": "python"})
    assert list(asked) == ["additive", "ours", "bergson"]
    assert asked["ours"] == {}
    assert asked["bergson"] | {"library": "additive"} == asked["additive"]
    assert set(scale.BATCHES) == set(beside.PEERS)
    for name in beside.PEERS:
        assert (beside.HERE / "peers" / f"{name}_ekfac.py").is_file()


# ---- the table -----------------------------------------------------------------------------------


def test_a_library_that_would_take_too_long_is_left_out_and_said_to_be(
    tmp_path, monkeypatch, capsys
):
    """kronfluence takes 100 s for 100 rows: 1,000 s for 1,000, and none of a later size."""
    made = []

    def quick(asked, out, python=None):
        made.append((asked["library"], asked["rows"], python))
        seconds = asked["rows"] * (1.0 if asked["library"] == "kronfluence" else 0.001)
        return record(0.75 * seconds, 0.25 * seconds)

    monkeypatch.setattr(scale, "in_process", quick)
    scale.show_beside("rows", tmp_path, None, NOBODY | {"kronfluence": "its python"})
    assert [each for each in made if each[0] == "kronfluence"] == [
        ("kronfluence", 100, "its python")
    ]
    assert tuple(rows for library, rows, _ in made if library == "ours") == scale.ROWS
    said = capsys.readouterr().out
    assert "| 1,000 | kronfluence | not run: 1000 s expected | | | | | |" in said
    assert "| 10,000 | kronfluence | not run" in said
    assert "| ours | 1.00 | 1.00 | 1.00 | 0.00 | 0.00 |" in said
    assert "| kronfluence | - | - | - | - | - |" in said


def test_peers_are_not_measured_in_several_processes(tmp_path):
    with pytest.raises(SystemExit):
        scale.main(["processes", "--out", str(tmp_path), "--bergson", "python"])


def test_the_command_line_hands_on_the_interpreters_and_how_many_cases(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(scale, "show", lambda *given: asked.append(given))
    monkeypatch.setattr(scale, "show_beside", lambda *given: asked.append(given))
    scale.main(["queries", "--out", str(tmp_path)])
    scale.main(["rows", "--out", str(tmp_path), "--cases", "3", "--dattri", "a python"])
    interpreters = NOBODY | {"dattri": "a python"}
    assert asked == [("queries", tmp_path, None), ("rows", tmp_path, 3, interpreters)]


# ---- a peer's program ----------------------------------------------------------------------------


PROGRAM = """
import sys, numpy as np
assert sys.argv[-1] == "--quickly", sys.argv
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["--train"].endswith("train.jsonl") and options["--model"] == "the base"
ones = np.arange(int(options["--repeat"]))
times = {f"{part}{clock}_seconds": ones + i for i, part in enumerate(("fit", "score"))
         for clock in ("", "_cpu")}
np.savez(options["--out"], peak_rss_bytes=9, rss_before_bytes=7, disk_bytes=5, **times)
"""


def test_what_a_peers_program_measures_is_read(tmp_path, monkeypatch):
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "kronfluence_ekfac.py").write_text(PROGRAM)
    monkeypatch.setattr(beside, "HERE", tmp_path)
    given = {"base": Path("the base"), "adapter": Path("an adapter"), "tokens": tmp_path}
    found = beside.peer("kronfluence", sys.executable, **given, repeat=2, options=["--quickly"])
    times = {"fit": [[0, 0], [1, 1]], "score": [[1, 1], [2, 2]]}
    assert found == times | {"peak": 9, "before": 7, "disk": 5}


def test_what_went_wrong_in_a_process_is_told(capsys):
    with pytest.raises(SystemExit, match="no such thing"):
        beside.run_command([sys.executable, "-c", "raise ValueError('no such thing')"])


# ---- what every library reads, and the smallest case ---------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The world of 6 rows and 2 queries, in files."""
    folder = tmp_path_factory.mktemp("world")
    asked = scale.asked_of(rows=6, queries=2, width=8)
    scale.world(asked, folder)
    return folder, asked


def test_the_world_in_files_is_the_one_in_memory(world):
    folder, asked = world
    model = influence.load(str(folder / "base"), str(folder / "adapter"), device="cpu")
    built = scale.model_of(asked["width"], asked["rank"])
    for mine, read in zip(built.parameters, model.parameters, strict=True):
        np.testing.assert_array_equal(mine.detach().numpy(), read.detach().numpy())
    for seed, (name, count) in enumerate((("train", 6), ("query", 2))):
        read = influence.read_examples(folder / f"{name}.jsonl")
        for mine, row in zip(scale.rows_of(count, seed), read, strict=True):
            assert list(row.input_ids) == list(mine.input_ids)
            # the first token is predicted by nothing
            assert list(row.targets)[1:] == list(mine.targets)[1:]


@pytest.mark.parametrize("library", ["ours", "additive"])
def test_the_smallest_case_of_ours_is_measured(world, tmp_path, monkeypatch, library):
    """Only where rows share nothing is nothing of that prepared, and every score written."""
    folder, asked = world
    for name in ("base", "adapter", "train.jsonl", "query.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.setattr(fitting, "_prepare_credit", fitting._prepare_credit)  # put back after
    found = scale.case(asked | scale.libraries(NOBODY)[library], tmp_path)
    assert found["parameters"] == 34 * 8 * 4
    assert min(found["peak"], found["before"]) > 0  # of a process that ran other tests before
    assert found["fit"]["cpu"] > 0
    assert found["disk"] == sum(path.stat().st_size for path in (tmp_path / "run").iterdir())
    assert (tmp_path / "run" / "scores.h5").exists() == (library == "additive")


@pytest.mark.slow
def test_cases_run_in_processes_of_their_own_and_are_kept(tmp_path, monkeypatch, capsys):
    small = scale.asked_of(rows=6, queries=2, width=8)
    monkeypatch.setattr(scale, "line", lambda name: [(6, small), (7, small | {"rows": 7})])
    for _ in range(2):
        scale.show_beside("rows", tmp_path, 1, NOBODY)
        said = capsys.readouterr()
        lines = [line.split(" | ") for line in said.out.splitlines() if line.startswith("| 6 ")]
        assert [line[1] for line in lines] == ["additive", "ours"]
        assert lines[0][5] == "1.00"
        assert len(list(tmp_path.glob("*.json"))) == 2
    assert said.err == ""  # nothing is made anew


@pytest.mark.slow
@pytest.mark.parametrize("name", beside.PEERS)
def test_a_peer_scores_what_ours_scores(tmp_path, name):
    """In the same order of rows and queries, and of the same sign; labels are drawn anew by each."""
    if not PYTHONS[name]:
        pytest.skip(f"set LORA_INFLUENCE_{name.upper()} to the python of an environment with it")
    folder = tmp_path
    asked = scale.asked_of(rows=200, queries=2, width=8, library=name)
    scale.world(asked, folder)
    found = scale.of_peer(asked, PYTHONS[name], folder)
    assert found["peak"] > found["before"] > 0
    assert found["fit"]["cpu"] > 0
    assert found["disk"] > 0
    model = influence.load(str(folder / "base"), str(folder / "adapter"), device="cpu")
    train, queries = (
        influence.read_examples(folder / f"{part}.jsonl") for part in ("train", "query")
    )
    run = influence.fit(model, train, directory=tmp_path / "run", path=(1.0,))
    mine = run.score(queries, credit="additive").values
    with np.load(folder / f"{name}.npz") as arrays:
        theirs = arrays["scores"]
    for one, other in zip(mine, theirs, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.8
