"""Linear datamodeling score of the defaults beside kronfluence's and bergson's EK-FAC, on the same adapter in one run.

    python benchmarks/faithfulness.py --testbed DIR [--kronfluence PYTHON] [--bergson PYTHON] [--seeds 3]

The testbed has a base, an adapter, its rows, queries, and in truth.npz the query losses of adapters retrained on random
halves of the rows. Every method runs with as many seeds of its sampled labels; the table has the score of each, with
the bootstrap interval of the first over the retrained adapters, and the paired interval of ours minus the peer's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from speed import run_peer

import influence
from analysis.metrics.lds import lds, lds_difference, read_truth


def ours(testbed: Path, seeds: int) -> dict[str, np.ndarray]:
    """Scores of each seed `[seeds, query, train]`, of the defaults and of the baselines in the same runs."""
    model = influence.load(str(testbed / "base"), str(testbed / "adapter"))
    train = influence.read_examples(testbed / "train.jsonl")
    queries = influence.read_examples(testbed / "query.jsonl")
    found: dict[str, list[np.ndarray]] = {"ours, ekfac (default)": [], "ours, kfac": [], "ours, gradient dot": []}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            run = influence.fit(model, train, directory=Path(folder) / "run", seed=seed)
            for name, curvature in zip(found, ("ekfac", "kfac", "identity"), strict=True):
                found[name].append(run.score(queries, curvature=curvature).values)
    return {name: np.stack(values) for name, values in found.items()}


def main() -> None:
    """Run every method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument("--kronfluence", help="python of an environment with kronfluence")
    parser.add_argument("--bergson", help="python of an environment with bergson")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    truth = read_truth(args.testbed / "truth.npz")
    methods = ours(args.testbed, args.seeds)
    for name, python in (("kronfluence", args.kronfluence), ("bergson", args.bergson)):
        if python:
            # a peer's score is positive where including the row lowers the query's loss, as ours
            methods[f"{name}, ekfac"] = run_peer(name, python, args.testbed, args.seeds)["scores_per_run"]
    default = methods["ours, ekfac (default)"][0]
    print(f"{'':24} {'LDS of each seed':28} {'interval of the first':22} ours minus it")
    for name, scores in methods.items():
        each = [lds(values, truth.masks, truth.query_loss) for values in scores]
        low, high = each[0].interval.low, each[0].interval.high
        line = f"{name:24} {', '.join(f'{r.mean:.3f}' for r in each):28} [{low:.3f}, {high:.3f}]       "
        if not np.array_equal(scores[0], default):
            gap = lds_difference(default, scores[0], truth.masks, truth.query_loss)
            line += f"{gap.mean:+.3f} [{gap.interval.low:+.3f}, {gap.interval.high:+.3f}]"
        print(line)


if __name__ == "__main__":
    main()
