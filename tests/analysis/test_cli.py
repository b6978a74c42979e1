"""The `analysis` command as a whole: its help, and what is refused before anything is loaded.

What the commands do is tested beside what they do it with.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from analysis.cli import Evaluate, Lds, Report, Tune, main, paths
from influence.errors import InputError

SLOW = {"torch", "transformers", "peft", "pandas", "scipy", "datasets", "numpy", "h5py"}
COMMANDS = ["evaluate", "lds", "removal", "tune", "clean", "memorization", "ood"]
COMMANDS += ["report", "serve", "demo"]
FOLDER = Path("no folder")


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from analysis.cli import main\n"
        f"for command in {[[], *([name] for name in COMMANDS)]!r}:\n"
        "    sys.argv = ['analysis', *command, '--help']\n"
        "    try:\n        main()\n    except SystemExit as end:\n        assert not end.code\n"
        f"slow = {SLOW | {'matplotlib', 'jinja2'}!r} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: analysis") == 1 + len(COMMANDS)


def test_the_commands_are_listed_in_order(run_main):
    text = run_main(main, "analysis", "--help").out
    listed = [line.split()[0] for line in text.split("Commands:")[1].splitlines() if line.strip()]
    assert listed == COMMANDS


@pytest.mark.parametrize("command", ["memorization", "ood"])
@pytest.mark.parametrize("flag", ["--holdout", "--heldout"])
def test_held_out_rows_may_be_called_as_they_were(run_main, tmp_path, command, flag):
    """Both spellings reach the same option: the missing file is what is wrong."""
    typed = ["--run", tmp_path / "run", flag, tmp_path / "rows.jsonl"]
    if command == "ood":
        typed += ["--other", tmp_path / "other.jsonl", "--out", tmp_path / "out"]
    result = run_main(main, "analysis", command, *typed)
    assert result.status == 2
    assert "rows.jsonl does not exist" in result.err
    text = run_main(main, "analysis", command, "--help").out
    assert "--holdout <path>" in text
    assert "heldout" not in text


# ---- what does not go together -------------------------------------------------------------------


def test_a_record_is_replaced_only_when_asked(tmp_path):
    rows = {"adapter": "a", "forget": Path("f.jsonl")}
    out = tmp_path / "record.json"
    Evaluate(**rows, out=out)
    out.touch()
    with pytest.raises(InputError, match=r"record.json exists and would be replaced: give another"):
        Evaluate(**rows, out=out)
    Evaluate(**rows, out=out, overwrite=True)
    with pytest.raises(InputError, match=r"there is no folder .* to write record.json into"):
        Evaluate(**rows, out=tmp_path / "no" / "record.json")
    with pytest.raises(InputError, match=r"--texts goes into the record: give --out FILE.json, or"):
        Evaluate(**rows, texts=True)
    Evaluate(**rows, texts=True, json=True)


def test_the_options_of_an_evaluation_are_checked_with_the_command():
    with pytest.raises(InputError, match="probe 'guess' was given; expected relearn or quantise"):
        Evaluate(adapter="a", forget=Path("f.jsonl"), probes=("guess",))


WITH_RUN = {"run": Path("run"), "queries": Path("q.jsonl")}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give either --truth FILE.npz .ready losses. or --run RUN --queries FILE"),
        (WITH_RUN | {"truth": Path("t.npz")}, "give either --truth FILE.npz"),
        (
            {"truth": Path("t.npz"), "subsets": 3, "subset_seed": 0},
            "--subsets, --subset-seed goes with --run only, and --truth was given",
        ),
        (
            {"truth": Path("t.npz"), "truth_out": Path("o.npz")},
            "--truth-out goes with --run only, and --truth was given: leave one of them out",
        ),
        ({"run": Path("run")}, "--run retrains and measures the losses of queries: name the"),
        (WITH_RUN | {"plot": Path(__file__)}, "test_cli.py exists and would be replaced: give"),
    ],
)
def test_lds_takes_losses_or_a_run(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Lds(scores=Path("scores.h5"), **options)


def test_lds_takes_either():
    Lds(scores=Path("scores.h5"), truth=Path("t.npz"))
    Lds(scores=Path("scores.h5"), **WITH_RUN, subsets=3, subset_seed=0, recipe=Path("r.json"))
    Lds(scores=Path("s.h5"), truth=Path("t.npz"), plot=Path(__file__), overwrite=True)


def test_tune_needs_a_truth_for_queries_and_shows_a_row():
    with pytest.raises(InputError, match="--queries was given without --truth; the local checks"):
        Tune(run=Path("run"), queries=Path("q.jsonl"))
    with pytest.raises(InputError, match="-k 0 was given; expected at least 1"):
        Tune(run=Path("run"), k=0)
    Tune(run=Path("run"), queries=Path("q.jsonl"), truth=Path("t.npz"), k=1)


def test_paths_are_numbers_between_commas():
    assert paths(["0.4,0.6", "1"]) == ((0.4, 0.6), (1.0,))
    with pytest.raises(InputError, match=r"--path '0.4;0.6' was given; expected numbers"):
        paths(["1", "0.4;0.6"])


def test_held_out_rows_of_a_report_go_with_a_retrained_adapter():
    with pytest.raises(InputError, match="--holdout goes with --retrained DIR: leave it out"):
        Report(edit=Path("e"), out=Path("o.html"), holdout=Path("h.jsonl"))
    Report(edit=Path("e"), out=Path("o.html"), holdout=Path("h.jsonl"), retrained=Path("r"))
