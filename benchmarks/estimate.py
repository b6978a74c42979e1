"""What `influence.estimate` says beforehand, beside what the fit and the scores took.

    python benchmarks/estimate.py --testbed FOLDER [--rows 50,100,200,400] [--out F.json]

Each case is estimated in one fresh process and fitted and scored in another. Seconds are the
processor's (`time.process_time`, one thread), so that they can be told on a machine that does other
things too. Rows are those of the testbed, some of them several times as long, so that lengths mix.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import product
from pathlib import Path
from typing import Any

#: The bars: a ratio is met within 1 / (1 + bar) and 1 + bar.
BARS = {"seconds": 0.35, "memory": 0.20, "disk": 0.15, "kept": 0.15}
PATHS = {1: (1.0,), 2: (0.4, 0.8)}
QUERIES = 10


def rows_of(testbed: Path, n: int) -> list[dict[str, str]]:
    """So many rows of mixed lengths: every fourth is four times as long."""
    lines = (testbed / "train.jsonl").read_text(encoding="utf-8").splitlines()
    read = [json.loads(line) for line in lines]
    found = []
    for number in range(n):
        row = read[number % len(read)]
        times = 4 if number % 4 == 3 else 1
        found.append(
            {
                "id": f"r{number}",
                "prompt": row["prompt"],
                "completion": row["completion"] * times,
            }
        )
    return found


def begin(case: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The model, rows, queries and options of a case."""
    import torch

    import influence

    torch.set_num_threads(1)
    testbed = Path(case["testbed"])
    model = influence.load(testbed / "base", testbed / "adapter", device="cpu")
    made = rows_of(testbed, case["n"])
    file = Path(case["folder"]) / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    queries = influence.examples_from_rows(
        [{**row, "id": f"q{row['id']}"} for row in rows_of(testbed, QUERIES)]
    )
    rows = {"rows": case["sample"]} if case["sample"] else {}
    options = {
        "path": PATHS[case["points"]],
        "store": case["store"],
        "row_bytes": case["row_bytes"],
        "curvature": getattr(influence, case["curvature"])(**rows),
    }
    return model, influence.read_examples(file), queries, options


def estimated(case: dict[str, Any]) -> dict[str, Any]:
    """What is said beforehand."""
    from influence import probe
    from influence.estimating import estimate

    model, train, queries, options = begin(case)
    probe.CLOCK = time.process_time
    start = time.process_time()
    told = estimate(model, train, queries, directory=Path(case["folder"]) / "run", **options)
    return {**told.as_json(), "took": time.process_time() - start}


def happened(case: dict[str, Any]) -> dict[str, Any]:
    """What the fit and the scores took."""
    import influence
    from influence.probe import Memory

    model, train, queries, options = begin(case)
    directory, memory, most, ended = Path(case["folder"]) / "run", Memory(model.device), [0], []

    def size() -> int:
        total = 0
        for path in directory.rglob("*") if directory.exists() else []:
            try:
                total += path.stat().st_size
            except OSError:
                continue  # deleted meanwhile
        return total

    def watch() -> None:
        while not ended:
            most[0] = max(most[0], size())
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    memory.reset()
    start = time.process_time()
    run = influence.fit(model, train, directory=directory, **options)
    fit = {"seconds": time.process_time() - start, "memory": memory.most()}
    ended.append(True)
    watcher.join()
    fit |= {"disk": most[0], "kept": size()}
    before, start = size(), time.process_time()
    run.score(queries, out=directory / "scores.h5")
    score = {"seconds": time.process_time() - start, "kept": size() - before}
    return {"fit": fit, "score": score}


def worker(kind: str, case: dict[str, Any]) -> dict[str, Any]:
    """Run one side of a case in a fresh process."""
    command = [sys.executable, __file__, "--worker", kind, "--case", json.dumps(case)]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def ratios(told: dict[str, Any], took: dict[str, Any]) -> dict[str, float]:
    """What was told over what was."""
    names = {
        "seconds": "seconds",
        "memory": "memory_bytes",
        "disk": "disk_bytes",
        "kept": "kept_bytes",
    }
    found = {name: told["fit"][key] / took["fit"][name] for name, key in names.items()}
    found["score"] = told["score"]["seconds"] / took["score"]["seconds"]
    return found


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--testbed", type=Path)
    parser.add_argument("--rows", default="50,100,200,400")
    parser.add_argument("--stores", default="full,features,none")
    parser.add_argument("--points", default="1,2")
    parser.add_argument("--curvatures", default="EKFAC")
    parser.add_argument("--curvature-rows", default="0,40", help="0: of all rows")
    parser.add_argument("--row-bytes", type=int, default=131_072)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=["estimated", "happened"], help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side = {"estimated": estimated, "happened": happened}[args.worker]
        print(json.dumps(side(json.loads(args.case))))
        return
    if args.testbed is None:
        parser.error("give --testbed FOLDER, with base, adapter and train.jsonl")
    grid = product(
        args.curvatures.split(","),
        map(int, args.rows.split(",")),
        map(int, args.points.split(",")),
        args.stores.split(","),
        map(int, args.curvature_rows.split(",")),
    )
    results = []
    print("curvature   n  points  store     of   probe     fit    time  memory  disk  kept   score")
    for curvature, n, points, store, sample in grid:
        with tempfile.TemporaryDirectory() as folder:
            case: dict[str, Any] = {"curvature": curvature, "n": n, "points": points}
            case |= {"store": store, "sample": sample, "folder": folder}
            case |= {"row_bytes": args.row_bytes}
            case |= {"testbed": str(args.testbed.resolve())}
            told, took = worker("estimated", case), worker("happened", case)
        found = ratios(told, took)
        results.append({**case, "told": told, "took": took, "ratios": found})
        print(
            f"{curvature:9} {n:4} {points:5}   {store:8} {sample or n:4} {told['took']:6.2f}s "
            f"{took['fit']['seconds']:6.2f}s  {found['seconds']:5.2f}  {found['memory']:6.2f} "
            f"{found['disk']:5.2f} {found['kept']:5.2f}  {found['score']:6.2f}",
            flush=True,
        )
    for name, bar in BARS.items():
        values = [result["ratios"][name] for result in results]
        met = sum(1 / (1 + bar) <= value <= 1 + bar for value in values)
        print(
            f"{name}: {met} of {len(values)} within {bar:.0%}, from {min(values):.2f} to "
            f"{max(values):.2f}, median {statistics.median(values):.2f}"
        )
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
