"""The `influence` command: what it prints, how it exits, and what it leaves on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.conftest import rows
from tests.helpers import contents, untouched, write_rows
from tests.influence.toy_commands import fit_arguments, wrong

# ---- the happy path ------------------------------------------------------------------------------


def test_fit_says_what_it_did_and_a_second_one_returns_at_once(influence, at):
    first = influence(*fit_arguments(at))
    assert first.status == 0
    assert first.out.startswith(f"{at / 'new'}: ekfac on 20 rows (")
    assert "gradients stored" in first.out
    with untouched(at / "new"):
        again = influence(*fit_arguments(at), "--json")
    assert again.status == 0
    assert again.json()["manifest"]["complete"] is True
    assert again.json()["run"] == str(at / "new")


def test_the_base_defaults_to_the_one_the_adapter_records(influence, made):
    manifest = json.loads((made / "run" / "manifest.json").read_text())
    assert manifest["base"]["path"] == str(made / "base")


def test_an_option_that_changes_nothing_is_said(influence, at):
    for given, said in (
        ({"samples": 3, "curvature": "ggn"}, "--samples changes nothing with --curvature ggn"),
        ({"disk_budget": 9, "store": "none"}, "--disk-budget changes nothing with --store none"),
        ({"samples": 3}, ""),
        ({"disk_budget": 9}, ""),
    ):
        done = influence(*fit_arguments(at, **given), "--overwrite")
        assert done.status == 0, done.err
        assert said in done.err
        assert said or "changes nothing" not in done.err


@pytest.mark.parametrize("curvature", ["kfac", "fisher", "ggn", "hessian", "identity"])
def test_fit_and_score_with_every_curvature(influence, at, curvature):
    assert (
        influence(
            *fit_arguments(at, curvature=curvature, damping="mean:1000", dtype="float64")
        ).status
        == 0
    )
    solver = "cg" if curvature in ("ggn", "hessian") else "direct"
    result = influence(
        "score",
        "--run",
        at / "new",
        "--queries",
        at / "queries.jsonl",
        "--solver",
        solver,
        "--json",
    )
    assert result.status == 0, result.err
    assert result.json()["not_converged"] == 0
    with h5py.File(at / "new" / "scores.h5") as file:
        assert file["scores"].shape == (4, 20)
        assert file.attrs["curvature"] == curvature


def test_score_writes_into_the_run_and_prints_the_shape(influence, at):
    (at / "run" / "scores.h5").unlink()
    result = influence("score", "--run", at / "run", "--queries", at / "queries.jsonl")
    assert result.status == 0
    start = (
        f"{at / 'run' / 'scores.h5'}: scores [4 queries, 20 rows]; raw ekfac, damping mean:0.1, "
        "points 0.4, 0.8, credit "
    )
    assert result.out.startswith(start)
    assert "shared, size from the losses along the path; " in result.out
    out = ["--out", at / "additive.h5", "--credit", "additive"]
    result = influence("score", "--run", at / "run", "--queries", at / "queries.jsonl", *out)
    assert result.status == 0
    assert "credit additive, size calibrated by measured edits of 8 rows; " in result.out
    options = ["--measurement", "margin", "--solver", "pcg", "--damping", "top:0.1", "--json"]
    arguments = ["--run", at / "run", "--queries", at / "queries.jsonl", "--out", at / "a" / "b.h5"]
    result = influence("score", *arguments, *options)
    assert result.status == 0
    assert result.json()["shape"] == [4, 20]
    with h5py.File(at / "a" / "b.h5") as file:
        assert (file.attrs["measurement"], file.attrs["solver"], file.attrs["damping"]) == (
            "margin",
            "pcg",
            "top:0.1",
        )


def test_scores_are_made_within_bounds(influence, at):
    asked = (
        "score",
        "--run",
        at / "run",
        "--queries",
        at / "queries.jsonl",
        "--credit",
        "additive",
    )
    found = {}
    for name, bound in (("free", ()), ("bounded", ("--token-budget", 17, "--memory", 60))):
        out = at / f"{name}.h5"
        assert influence(*asked, "--out", out, *bound).status == 0
        with h5py.File(out) as file:
            found[name] = file["scores"][:]
    np.testing.assert_allclose(found["bounded"], found["free"], rtol=1e-4, atol=1e-6)
    assert not np.array_equal(found["bounded"], found["free"])  # other batches, other rounding
    refused = influence(*asked, "--out", at / "refused.h5", "--memory", 0.001)
    assert refused.status == 2
    assert "memory 0.001 GB was given, and the process with its model takes" in refused.err
    assert influence(*asked, "--out", at / "refused.h5", "--memory", 0).status == 2


def test_scores_of_other_queries_are_replaced_with_overwrite_only(influence, at):
    other = write_rows(at / "other.jsonl", rows(2, seed=5))
    with untouched(at):
        result = influence("score", "--run", at / "run", "--queries", other)
    assert result.status == 2
    assert "holds other scores (of other queries): give another --out, or --overwrite" in result.err
    assert influence("score", "--run", at / "run", "--queries", other, "--overwrite").status == 0
    with h5py.File(at / "run" / "scores.h5") as file:
        assert file["scores"].shape == (2, 20)
        assert file["self_influence"].shape == (20,)


def test_self_lists_the_highest_rows(influence, at):
    result = influence("self", "--run", at / "run", "-k", 3)
    assert result.status == 0
    assert "the 3 rows with the highest self-influence of 20" in " ".join(result.out.split())
    result = influence("self", "--run", at / "run", "-k", 3, "--json").json()
    with h5py.File(at / "run" / "scores.h5") as file:
        values, ids = file["self_influence"][()], file["train_ids"].asstr()[()]
    order = np.argsort(-values)[:3]
    assert [row["id"] for row in result["top"]] == [ids[i] for i in order]
    assert [row["self_influence"] for row in result["top"]] == [float(values[i]) for i in order]


def test_check_shows_what_is_supervised(influence, at):
    row = json.loads((at / "train.jsonl").read_text().splitlines()[0])
    arguments = ("check", "--adapter", at / "adapter", "--train", at / "train.jsonl", "--labels")
    result = influence(*arguments)
    assert result.status == 0
    assert f"{row['id']}: " in result.out
    assert result.out.count("⟦") == 3
    assert "agree" not in result.out
    found = influence(*arguments, "--supervise", "all", "--json").json()
    assert found["supervise"] == "all"
    assert len(found["rows"]) == 3
    entry = found["rows"][0]
    assert entry["supervised_tokens"] == entry["tokens"] - 1
    wrong = influence(*arguments, "--supervise", "some")
    assert wrong.status == 2
    assert "supervise 'some' was given; expected last, assistant or all" in wrong.err


def test_check_agrees(influence, at):
    result = influence(
        "check", "--adapter", at / "adapter", "--train", at / "train.jsonl", "--rows", 3
    )
    assert result.status == 0
    assert "agree on 3 examples" in result.out
    result = influence(
        "check",
        "--adapter",
        at / "adapter",
        "--train",
        at / "train.jsonl",
        "--json",
        "--dtype",
        "float64",
    )
    assert result.json()["ok"] is True
    assert len(result.json()["errors"]) == 4


# ---- work that fails: status 1 -------------------------------------------------------------------


def test_a_truncated_file_exits_with_one(influence, at):
    for name, command in (
        ("scores.h5", ["top", "--query", 0]),
        ("factors.h5", ["self"]),
        ("kernel.h5", ["self", "--out", at / "again.h5"]),
        ("gradients.h5", ["self", "--out", at / "again.h5", "--credit", "additive"]),
    ):
        path = at / "run" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:1000])
        sentence = f"{name} is damaged, truncated, or not an HDF5 file"
        wrong(influence, at, [*command, "--run", at / "run"], sentence, status=1)
        path.write_bytes(whole)


def test_columns_that_do_not_converge_exit_with_one_and_are_written(influence, at):
    assert (
        influence(
            *fit_arguments(at, curvature="hessian", damping="abs:1e-12", dtype="float32")
        ).status
        == 0
    )
    result = influence(
        "score", "--run", at / "new", "--queries", at / "queries.jsonl", "--solver", "cg", "--json"
    )
    assert result.status == 1
    assert result.json()["not_converged"] > 0
    assert "raise the damping" in result.err
    with h5py.File(at / "new" / "scores.h5") as file:
        assert not file["converged"][()].all()


def test_an_unwritable_place_exits_with_one(influence, at):
    (at / "file").touch()
    result = influence(
        "score",
        "--run",
        at / "run",
        "--queries",
        at / "queries.jsonl",
        "--out",
        at / "file" / "s.h5",
    )
    assert result.status == 1
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err


# ---- the process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["fit"], ["score"], ["self"], ["top"], ["check"]])
def test_help_does_not_wait_for_torch(command):
    code = (
        "import sys\n"
        "from influence.cli import main\n"
        f"sys.argv = ['influence', *{command!r}, '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "slow = {'torch', 'transformers', 'peft', 'datasets', 'scipy', 'h5py', 'numpy'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Usage: influence" in result.stdout
    if command:
        assert "--run" in result.stdout or command == ["check"]


@pytest.mark.slow
def test_the_console_script_and_the_module_are_the_command(made):
    script = Path(sys.executable).with_name("influence")
    outputs = []
    for start in ([str(script)], [sys.executable, "-m", "influence"]):
        if not Path(start[0]).exists():
            pytest.skip("the package is not installed with its scripts")
        arguments = ["top", "--run", made / "run", "--query", "nobody"]
        result = subprocess.run(
            [*start, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 2
        assert result.stderr.startswith(
            "error: query 'nobody' was given; there are 4 scored queries"
        )
        outputs.append((result.stdout, result.stderr))
    assert outputs[0] == outputs[1]


def test_json_is_all_there_is_on_standard_output(influence, at):
    for arguments in (
        fit_arguments(at),
        ["score", "--run", at / "new", "--queries", at / "queries.jsonl"],
        ["self", "--run", at / "new"],
        ["top", "--run", at / "new", "--query", 0],
        ["check", "--adapter", at / "adapter", "--train", at / "train.jsonl"],
    ):
        result = influence(*arguments, "--json")
        assert result.status == 0
        assert isinstance(result.json(), dict)
        assert result.out.count("\n") == 1
    numbered = [
        f"{name}{number}.h5" for name in ("factors", "gradients", "kernel") for number in ("-2", "")
    ]
    assert sorted(contents(at / "new")) == [*numbered, "manifest.json", "scores.h5"]


# ---- rows of every kind --------------------------------------------------------------------------


def test_rows_with_columns_of_other_names_from_fit_to_top(influence, at):
    """The run and its scores are those of the same rows under their own names."""
    for name in ("train", "queries"):
        lines = (at / f"{name}.jsonl").read_text().splitlines()
        named = [
            {"key": row["id"], "asked": row["prompt"], "said": row["completion"]}
            for row in map(json.loads, lines)
        ]
        write_rows(at / f"{name} asked.jsonl", named)
    columns = ["--columns", "id=key,prompt=asked,completion=said"]
    fitted = influence(*fit_arguments(at, train=at / "train asked.jsonl"), *columns, "--json")
    assert fitted.status == 0, fitted.err
    queries = at / "queries asked.jsonl"
    scored = influence("score", "--run", at / "new", "--queries", queries, *columns)
    assert scored.status == 0, scored.err
    with h5py.File(at / "run" / "scores.h5") as one, h5py.File(at / "new" / "scores.h5") as other:
        assert one.attrs["query_digest"] == other.attrs["query_digest"]
        assert np.array_equal(one["train_ids"][()], other["train_ids"][()])
        assert json.loads(other.attrs["query_columns"])["id"] == "key"
        assert "query_columns" not in one.attrs
    again = influence("score", "--run", at / "new", "--queries", at / "queries.jsonl")
    assert again.status == 0, again.err  # the same queries, wherever they are and however named
    shown = influence("top", "--run", at / "new", "--query", 0)
    assert shown.status == 0, shown.err
    assert " \u2192 " in shown.out
    check = influence("check", "--adapter", at / "adapter", "--train", queries, *columns)
    assert check.status == 0, check.err


def test_scores_of_a_moved_project_say_what_mends_the_run(influence, at):
    assert influence(*fit_arguments(at, run=at / "run")).status == 0  # whose paths were another's
    (at / "train.jsonl").rename(at / "moved.jsonl")
    result = influence("score", "--run", at / "run", "--queries", at / "queries.jsonl")
    assert result.status == 2
    assert "the same influence fit command with the new paths" in " ".join(result.err.split())
    moved = fit_arguments(at, run=at / "run", train=at / "moved.jsonl")
    assert influence(*moved).status == 0
    result = influence("score", "--run", at / "run", "--queries", at / "queries.jsonl")
    assert result.status == 0, result.err
