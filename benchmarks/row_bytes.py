"""Scores from rows in few bytes beside those of whole gradients, on a testbed with retrained subsets.

    python benchmarks/row_bytes.py --testbed DIR --out DIR [--base BASE] [--row-bytes B ...]

DIR of the testbed has `base` (or BASE is given), `adapter`, `train.jsonl`, `query.jsonl` and
`truth.npz` (benchmarks/README.md says what it is). A run with whole gradients is fitted once, and one
with features for each B; all are kept in the output folder. For each: bytes of a row and point, the
rank correlation of its scores with the whole ones (mean over queries), the linear datamodeling score
of both, of shared and of additive credit, and the size of its scores over the whole ones' (least
squares). Figures are in benchmarks/README.md, "Rows in few bytes".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import influence
from analysis.metrics.lds import lds


def mean_rank(one: np.ndarray, other: np.ndarray) -> float:
    """Mean Spearman correlation of the rows of two arrays `[Q, n]`."""
    return float(np.mean([spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]))


def main() -> None:
    """Fit, score and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--row-bytes", type=int, nargs="+", default=[131_072])
    args = parser.parse_args()
    bed = args.testbed
    model = influence.load(args.base or bed / "base", bed / "adapter", device="cpu")
    train = influence.read_examples(bed / "train.jsonl")
    queries = influence.read_examples(bed / "query.jsonl")
    with np.load(bed / "truth.npz") as truth:
        masks, losses = truth["masks"].astype(bool), truth["query_loss"]
    whole = influence.fit(model, train, directory=args.out / "full", store="full")
    credits = ("shared", "additive")
    exact = {name: whole.score(queries, credit=name).values for name in credits}
    n, P = len(train), model.space.size
    print(f"whole: {4 * P / 1e3:.0f} KB a row; {len(train)} rows, {len(queries)} queries")
    for name in credits:
        print(f"  {name}: LDS {lds(exact[name], masks, losses).mean:.4f}")
    for row_bytes in args.row_bytes:
        run = influence.fit(
            model,
            train,
            directory=args.out / f"features-{row_bytes}",
            store="features",
            row_bytes=row_bytes,
        )
        size = run.points[0].file("features").stat().st_size / n
        print(f"{row_bytes}: {size / 1e3:.0f} KB a row and point, 1 : {4 * P / size:.0f}")
        for name in credits:
            found = run.score(queries, credit=name).values
            slope = float((found * exact[name]).sum() / (exact[name] ** 2).sum())
            rank, score = mean_rank(found, exact[name]), lds(found, masks, losses).mean
            print(f"  {name}: rank {rank:.4f}, LDS {score:.4f}, size {slope:.3f}", flush=True)


if __name__ == "__main__":
    main()
