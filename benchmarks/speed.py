"""Speed and memory of EK-FAC scores beside kronfluence and bergson, and beside the bare work.

    python benchmarks/speed.py --testbed DIR [--kronfluence PYTHON] [--bergson PYTHON] [--repeat 3]
    [--out F.json]

The work: EK-FAC of a LoRA adapter on its training rows, and scores of every query against every
row; float32, CPU. Model loading and imports are left out of every time. `bare` is one forward and
backward of every training and query row by transformers and PEFT alone, in batches sorted by
length: what no method can do without. Each contender runs in a process of its own, one after the
other, `--repeat` times in it; medians are printed. The peers need environments of their own (see
`peers/README.md`); without their interpreters they are left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def ours(testbed: Path, repeat: int, token_budget: int) -> dict[str, Any]:
    """Fit, score, and score a second query set from the stored gradients."""
    import influence

    model = influence.load(str(testbed / "base"), str(testbed / "adapter"))
    train = influence.read_examples(testbed / "train.jsonl")
    queries = influence.read_examples(testbed / "query.jsonl")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times: dict[str, list[float]] = {
        "fit_seconds": [],
        "score_seconds": [],
        "second_seconds": [],
        "cpu_seconds": [],
    }
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "run"
            cpu, start = time.process_time(), time.perf_counter()
            run = influence.fit(
                model, train, directory=directory, token_budget=token_budget, path=(1.0,)
            )
            fitted = time.perf_counter()
            run.score(queries, out=directory / "scores.h5")
            scored = time.perf_counter()
            times["cpu_seconds"].append(time.process_time() - cpu)
            times["fit_seconds"].append(fitted - start)
            times["score_seconds"].append(scored - fitted)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            del run
            if (
                len(times["fit_seconds"]) == repeat
            ):  # the peers have no such step: it counts in no peak of ours either
                again = influence.Run.open(directory, model=model, train=train)
                for number in range(repeat):
                    start = time.perf_counter()
                    again.score(queries, out=Path(folder) / f"second{number}.h5")
                    times["second_seconds"].append(time.perf_counter() - start)
    return {**times, "peak_rss_bytes": peak, "rss_before_bytes": before}


def bare(testbed: Path, repeat: int, token_budget: int) -> dict[str, Any]:
    """One forward and backward of every training and query row by PEFT's own model and loss."""
    import torch

    import influence
    from influence.batches import collate, plan_batches
    from influence.tokens import tokenize

    model = influence.load(str(testbed / "base"), str(testbed / "adapter"))
    sets = [
        tokenize(influence.read_examples(testbed / f"{name}.jsonl"), model.tokenizer)
        for name in ("train", "query")
    ]
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        for tokens in sets:
            for rows in plan_batches(tokens, token_budget):
                batch = collate(tokens, rows)
                labels = torch.where(batch.supervised, batch.input_ids, -100)
                loss = model.model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
                ).loss
                torch.autograd.grad(loss, model.parameters)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def run_peer(name: str, python: str, testbed: Path, repeat: int) -> dict[str, Any]:
    """Run a peer's script in its own environment and return the arrays it saved."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        command = [
            python,
            str(HERE / "peers" / f"{name}_ekfac.py"),
            "--model",
            str(testbed / "base"),
        ]
        command += ["--adapter", str(testbed / "adapter"), "--train", str(testbed / "train.jsonl")]
        command += [
            "--queries",
            str(testbed / "query.jsonl"),
            "--out",
            str(out),
            "--repeat",
            str(repeat),
        ]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
        with np.load(out, allow_pickle=False) as data:
            return {key: data[key] for key in data.files}


def peer_times(name: str, python: str, testbed: Path, repeat: int) -> dict[str, Any]:
    """A peer's times and memory."""
    arrays = run_peer(name, python, testbed, repeat)
    return {
        key: value.tolist() for key, value in arrays.items() if "seconds" in key or "rss" in key
    }


def worker(name: str, testbed: Path, repeat: int, token_budget: int) -> dict[str, Any]:
    """Run one of our own contenders in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--testbed",
        str(testbed),
        "--repeat",
        str(repeat),
        "--worker",
        name,
    ]
    done = subprocess.run(
        [*command, "--token-budget", str(token_budget)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run every contender and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument("--kronfluence", help="python of an environment with kronfluence")
    parser.add_argument("--bergson", help="python of an environment with bergson")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=["ours", "bare"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(
            json.dumps(
                {"ours": ours, "bare": bare}[args.worker](
                    args.testbed, args.repeat, args.token_budget
                )
            )
        )
        return
    results = {
        name: worker(name, args.testbed, args.repeat, args.token_budget)
        for name in ("bare", "ours")
    }
    for name, python in (("kronfluence", args.kronfluence), ("bergson", args.bergson)):
        if python:
            results[name] = peer_times(name, python, args.testbed, args.repeat)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))
    floor = statistics.median(results["bare"]["seconds"])
    print(f"bare forward and backward of every row: {floor:.2f} s")
    print(f"{'':12} {'fit':>7} {'score':>7} {'sum':>7} {'x bare':>7} {'peak MB':>8} {'work MB':>8}")
    for name in [n for n in results if n != "bare"]:
        times = results[name]
        fit, score = (statistics.median(times[key]) for key in ("fit_seconds", "score_seconds"))
        peak, work = (
            times["peak_rss_bytes"] / 1e6,
            (times["peak_rss_bytes"] - times["rss_before_bytes"]) / 1e6,
        )
        total = fit + score
        print(
            f"{name:12} {fit:7.2f} {score:7.2f} {total:7.2f} {total / floor:7.2f} {peak:8.0f} "
            f"{work:8.0f}"
        )
    if "kronfluence" in results:
        mine = statistics.median(results["ours"]["fit_seconds"]) + statistics.median(
            results["ours"]["score_seconds"]
        )
        times = results["kronfluence"]
        theirs = statistics.median(times["fit_seconds"]) + statistics.median(times["score_seconds"])
        second = statistics.median(results["ours"]["second_seconds"])
        print(
            f"ours / kronfluence: {mine / theirs:.3f}; a second query set from stored gradients: "
            f"{second / theirs:.3f}"
        )


if __name__ == "__main__":
    main()
