"""Does a change of the code change a number? Every kind of result on the demo (seed 0), bit for bit.

    python benchmarks/unchanged.py --work W --record before.json      # on the commit before
    python benchmarks/unchanged.py --work W --against before.json     # on the commit after

Runs the commands, each in a process of its own on one thread: the demo, scores with their parts by token and module,
self-influence, a removal, a relabelling, five steps of `ngdiff` and of `npo`, the forecast of ten rows, and the tables
of memorization and evaluation against three retrained halves. Keeps a SHA-256 of every array and every number of every
record; what is said of time, versions and places does not count. Records compare on one machine with one torch: other
kernels add up in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
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


def command(work: Path, *words: str | Path, may_fail: bool = False) -> dict[str, Any]:
    """Run `python -m PACKAGE ...` in the work folder and return its JSON; `may_fail`: exit status 1 is one of its answers."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    line = [sys.executable, "-m", *(str(word) for word in words), "--json"]
    done = subprocess.run(line, cwd=work, env=env, capture_output=True, text=True)
    if done.returncode > may_fail:
        raise SystemExit(f"{' '.join(line)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    print(f"done: {' '.join(line[2:])[:100]}", file=sys.stderr)
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
    found: dict[str, Any] = {"demo": command(work, "analysis", "demo", "--out", "demo")}
    for name in (
        "factors",
        "factors-2",
        "factors-3",
        "gradients",
        "gradients-2",
        "gradients-3",
        "scores",
    ):
        found[f"demo/{name}"] = arrays_of(work / "demo" / "run" / f"{name}.h5")
    rows = [json.loads(line) for line in (work / "demo" / "train.jsonl").read_text().splitlines()]
    some = [row["id"] for row in rows[:: len(rows) // ROWS][:ROWS]]
    run = ("--run", "run")
    command(
        work,
        "influence",
        "fit",
        "--model",
        "demo/base",
        "--adapter",
        "demo/adapter",
        "--train",
        "demo/train.jsonl",
        *run,
    )
    asked = ("--queries", "demo/queries.jsonl")
    command(
        work,
        "influence",
        "score",
        *run,
        *asked,
        "--per-token",
        "--per-module",
        "--out",
        "detail.h5",
    )
    first = (work / "demo" / "queries.jsonl").read_text().splitlines(keepends=True)[:3]
    (work / "three.jsonl").write_text("".join(first))
    exact = ("--curvature", "ggn", "--at", "0.6", "--solver", "pcg", "--max-iterations", "3")
    few = ("--queries", "three.jsonl", "--out", "ggn.h5")
    command(
        work, "influence", "score", *run, *few, *exact, may_fail=True
    )  # three products do not converge
    command(work, "influence", "self", *run)
    found["top"] = command(
        work, "influence", "top", "--run", "run", "--scores", "detail.h5", "--query", "0"
    )
    for name in ("detail.h5", "ggn.h5", "run/scores.h5", "run/factors.h5"):
        found[name] = arrays_of(work / name)

    changes = [{"id": id, "completion": " I will not say."} for id in some[2:5]]
    (work / "changes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changes))
    original = ("--start", "original", "--force")
    ids = ("--ids", ",".join(some[:2]))
    found["dry run"] = command(work, "unlearn", "remove", *run, *ids, "--dry-run")
    made = {
        "removed": ("remove", *ids, "--holdout", "demo/heldout.jsonl"),
        "relabelled": ("relabel", "--changes", "changes.jsonl"),
        "ngdiff": ("train", "--method", "ngdiff", *ids, "--until", "steps=5"),
        "npo": ("train", "--method", "npo", *ids, "--until", "steps=5"),
    }
    for name, words in made.items():
        found[name] = command(work, "unlearn", words[0], *run, *words[1:], *original, "--out", name)
        found[f"{name}/edit.json"] = json.loads((work / name / "edit.json").read_text())
        for file in ("adapter_model", "delta"):
            found[f"{name}/{file}"] = arrays_of(work / name / f"{file}.safetensors")
    found["verify"] = command(work, "unlearn", "verify", *run, "--apply")["passed"]
    found["forecast"] = command(
        work, "unlearn", "difficulty", *run, "--ids", ",".join(some), "--out", "forecast.csv"
    )
    found["forecast.csv"] = (work / "forecast.csv").read_text().splitlines()

    (work / "recipe.json").write_text(json.dumps({"epochs": 3, "lr": 0.005, "batch_size": 16}))
    command(
        work,
        "unlearn",
        "retrain",
        *run,
        "--subsets",
        "3",
        *asked,
        "--recipe",
        "recipe.json",
        "--out",
        "truth.npz",
    )
    with np.load(work / "truth.npz") as truth:
        found["truth.npz"] = {
            name: array(truth[name]) for name in sorted(truth) if truth[name].dtype.kind in "fib"
        }
    found["memorization"] = command(work, "analysis", "memorization", *run, "--truth", "truth.npz", "--out", "mem.csv",
                                    "--resamples", "50")  # fmt: skip
    found["memorization.csv"] = (work / "mem.csv").read_text().splitlines()
    parts = {"forget": rows[:8], "retain": rows[20:36]}
    for name, part in parts.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    sets = (
        "--forget",
        "forget.jsonl",
        "--retain",
        "retain.jsonl",
        "--holdout",
        "demo/heldout.jsonl",
    )
    found["evaluation"] = command(work, "analysis", "evaluate", "--adapter", "removed", *sets, "--reference", "demo/adapter",
                                  "--generate", "4")  # fmt: skip
    found["report"] = command(
        work, "analysis", "report", "--edit", "removed", "--out", "report.html"
    )
    return {name: said(value, work) for name, value in found.items()}


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
    """Record, or compare with a record; exit status 1 where something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="Folder to make everything in; it is replaced."
    )
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
