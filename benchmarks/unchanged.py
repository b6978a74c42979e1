"""Whether a change of the code changes any number on the demo (seed 0), to the last bit.

    python benchmarks/unchanged.py --work W --record before.json      # on the commit before
    python benchmarks/unchanged.py --work W --against before.json     # on the commit after

Runs the commands, each in a process of its own on one thread: the demo, scores with their parts by
token and module, self-influence, a removal, a relabelling, five steps of `ngdiff` and of `npo`, the
forecast of ten rows, and the tables of memorization and evaluation against three retrained halves.
Keeps a SHA-256 of every array and every number of every record; what is said of time, versions and
places does not count. Records compare on one machine with one torch: other kernels add up in
another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from safetensors.numpy import load_file

#: Keys whose values are times, versions or places.
NOT_COMPARED = {
    "seconds",
    "created",
    "time",
    "versions",
    "version",
    "path",
    "out",
    "files",
    "queries",
}
#: Ids of rows that the demo's training set has, one for each question asked here.
ROWS = 10
DEMO = "--model demo/base --adapter demo/adapter --train demo/train.jsonl"


def command(work: Path, line: str, *, may_fail: bool = False) -> dict[str, Any]:
    """Run `python -m LINE --json` in the work folder and return its JSON.

    `may_fail`: exit status 1 is one of its answers.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    words = [sys.executable, "-m", *shlex.split(line), "--json"]
    done = subprocess.run(words, cwd=work, env=env, capture_output=True, text=True)
    if done.returncode > may_fail:
        raise SystemExit(f"{line} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    print(f"done: {line[:100]}", file=sys.stderr)
    return json.loads(done.stdout)


def said(value: Any, work: Path) -> Any:
    """A record without what is not compared, its numbers to the last bit."""
    if isinstance(value, dict):
        return {key: said(part, work) for key, part in value.items() if key not in NOT_COMPARED}
    if isinstance(value, list):
        return [said(part, work) for part in value]
    if isinstance(value, float):
        return value.hex()
    return value.replace(str(work), "WORK") if isinstance(value, str) else value


def array(values: np.ndarray) -> str:
    """Type, shape and SHA-256 of an array."""
    values = np.ascontiguousarray(values)
    return f"{values.dtype.str} {list(values.shape)} {hashlib.sha256(values.tobytes()).hexdigest()}"


def arrays_of(path: Path) -> dict[str, str]:
    """Every numeric dataset of an HDF5 or safetensors file."""
    if path.suffix == ".safetensors":
        return {name: array(tensor) for name, tensor in sorted(load_file(path).items())}
    found: dict[str, str] = {}

    def look(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiub":
            found[name] = array(item[()])

    with h5py.File(path, "r") as file:
        file.visititems(look)
    return found


def record(work: Path) -> dict[str, Any]:
    """Everything that is compared, made anew in an empty work folder."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    values: dict[str, Any] = {"demo": command(work, "analysis demo --out demo")}
    rows = read_lines(work / "demo" / "train.jsonl")
    ids = [row["id"] for row in rows[:: len(rows) // ROWS][:ROWS]]
    values |= scores(work)
    values |= edits_and_trainings(work, ids)
    values |= forecast(work, ids)
    values |= tables(work, rows)
    return {name: said(value, work) for name, value in values.items()}


def scores(work: Path) -> dict[str, Any]:
    """The demo's own run, and another: scores by token and module, by the GGN, self-influence."""
    files = [f"{name}{number}" for name in ("factors", "gradients") for number in ("", "-2")]
    folder = work / "demo" / "run"
    values: dict[str, Any] = {
        f"demo/{name}": arrays_of(folder / f"{name}.h5") for name in [*files, "scores"]
    }
    command(work, f"influence fit {DEMO} --run run")
    detail = "--per-token --per-module --out detail.h5"
    command(work, f"influence score --run run --queries demo/queries.jsonl {detail}")
    first = read_lines(work / "demo" / "queries.jsonl")[:3]
    write_lines(work / "three.jsonl", first)
    # three products do not converge
    exact = "--curvature ggn --at 0.8 --solver pcg --max-iterations 3 --out ggn.h5"
    command(work, f"influence score --run run --queries three.jsonl {exact}", may_fail=True)
    command(work, "influence self --run run")
    values["top"] = command(work, "influence top --run run --scores detail.h5 --query 0")
    for name in ("detail.h5", "ggn.h5", "run/scores.h5", "run/factors.h5"):
        values[name] = arrays_of(work / name)
    return values


def edits_and_trainings(work: Path, ids: Sequence[str]) -> dict[str, Any]:
    """A removal of two rows, a relabelling of three, five steps of two methods; all verified."""
    changes = [{"id": id, "completion": " I will not say."} for id in ids[2:5]]
    write_lines(work / "changes.jsonl", changes)
    two = f"--ids {','.join(ids[:2])}"
    values: dict[str, Any] = {"dry run": command(work, f"unlearn remove --run run {two} --dry-run")}
    made = {
        "removed": f"remove {two} --holdout demo/heldout.jsonl",
        "relabelled": "relabel --changes changes.jsonl",
        "ngdiff": f"train --method ngdiff {two} --until steps=5",
        "npo": f"train --method npo {two} --until steps=5",
    }
    for name, line in made.items():
        line = f"unlearn {line} --run run --start original --force --out {name}"
        values[name] = command(work, line)
        values[f"{name}/edit.json"] = json.loads((work / name / "edit.json").read_text())
        for file in ("adapter_model", "delta"):
            values[f"{name}/{file}"] = arrays_of(work / name / f"{file}.safetensors")
    values["verify"] = command(work, "unlearn verify --run run --apply")["passed"]
    return values


def forecast(work: Path, ids: Sequence[str]) -> dict[str, Any]:
    """The forecast of ten rows."""
    line = f"unlearn difficulty --run run --ids {','.join(ids)} --out forecast.csv"
    made = command(work, line)
    return {"forecast": made, "forecast.csv": (work / "forecast.csv").read_text().splitlines()}


def tables(work: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Memorization against three retrained halves, and the evaluation of the removal."""
    (work / "recipe.json").write_text(json.dumps({"epochs": 3, "lr": 0.005, "batch_size": 16}))
    halves = "--subsets 3 --recipe recipe.json --out truth.npz"
    command(work, f"unlearn retrain --run run --queries demo/queries.jsonl {halves}")
    with np.load(work / "truth.npz") as truth:
        numeric = [name for name in sorted(truth) if truth[name].dtype.kind in "fib"]
        values: dict[str, Any] = {"truth.npz": {name: array(truth[name]) for name in numeric}}
    measured = "--truth truth.npz --out mem.csv --resamples 50"
    values["memorization"] = command(work, f"analysis memorization --run run {measured}")
    values["memorization.csv"] = (work / "mem.csv").read_text().splitlines()
    write_lines(work / "forget.jsonl", rows[:8])
    write_lines(work / "retain.jsonl", rows[20:36])
    sets = "--forget forget.jsonl --retain retain.jsonl --holdout demo/heldout.jsonl"
    options = "--reference demo/adapter --generate 4"
    values["evaluation"] = command(work, f"analysis evaluate --adapter removed {sets} {options}")
    values["report"] = command(work, "analysis report --edit removed --out report.html")
    return values


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two records differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        missing = object()
        parts = (
            differences(one.get(key, missing), other.get(key, missing), f"{place}/{key}")
            for key in keys
        )
        return [line for part in parts for line in part]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return [
            line for i, (a, b) in enumerate(pairs) for line in differences(a, b, f"{place}[{i}]")
        ]
    return [] if one == other else [f"{place}: {str(one)[:120]} there, {str(other)[:120]} here"]


def count(value: Any) -> int:
    """How many arrays and values a record holds."""
    if isinstance(value, dict | list):
        return sum(count(part) for part in (value.values() if isinstance(value, dict) else value))
    return 1


def main() -> None:
    """Record, or compare with a record.

    Exit status 1 where something differs.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "Folder to make everything in; it is replaced."
    parser.add_argument("--work", type=Path, required=True, help=about)
    parser.add_argument("--record", type=Path, help="File to write the record to.")
    parser.add_argument("--against", type=Path, help="Record to compare with.")
    options = parser.parse_args()
    found = json.loads(json.dumps(record(options.work.resolve())))
    if options.record is not None:
        options.record.write_text(json.dumps(found, indent=1, ensure_ascii=False))
        print(f"{count(found)} values recorded in {options.record}")
    if options.against is not None:
        different = differences(json.loads(options.against.read_text()), found)
        print("\n".join(different[:50]))
        print(f"{len(different)} of {count(found)} values differ")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
