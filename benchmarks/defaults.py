"""Where the defaults come from: `analysis tune`'s grid against retraining, on two models.

    python benchmarks/defaults.py --testbed T [--demo DIR] [--out table.json]

`--testbed` is the folder of the tofu-tiny testbed with its `truth.npz`; `--demo` a folder made by
`analysis demo`, whose truth (40 random halves, 15 epochs each) is made there first, which takes
some minutes and resumes when killed. For each setting: the linear datamodeling score over all
halves, and what `tune` finds of it without retraining. At the end, how well these local checks
order the settings (Spearman), and what tune would have chosen by them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

import influence
from analysis.metrics.lds import Truth, lds, read_truth
from analysis.tune import tune
from influence.rows import Examples
from unlearn import Recipe, random_halves, retrain_subsets

GEOMETRIES = ("function", "adam")
PATHS = ((1.0,), (0.6,), (0.3, 0.6, 0.9))


def table(
    base: Path, rows: Path, queries_file: Path, truth_file: Path, seed: int, make_truth: bool
) -> dict[str, Any]:
    """Every setting's LDS and local checks on one model, best LDS first."""
    model, train, queries = (
        influence.load(base / "base", base / "adapter"),
        *map(influence.read_examples, (rows, queries_file)),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = influence.fit(model, train, directory=Path(folder) / "run", seed=seed)
        if make_truth and not truth_file.exists():
            retrain_subsets(
                run, random_halves(len(train), 40), queries, out=truth_file, recipe=Recipe()
            )
        truth = read_truth(truth_file)
        return judged(run, truth, queries)


def judged(run: influence.Run, truth: Truth, queries: Examples) -> dict[str, Any]:
    """The grid on one run."""
    grid: dict[str, Any] = {"geometries": GEOMETRIES, "paths": PATHS, "keep": False}
    by_truth, by_checks = tune(run, truth=truth, queries=queries, **grid), tune(run, **grid)
    scored = {(setting.run, setting.name): setting.scores for setting in by_truth.judged}
    rows = []
    for setting in by_checks.judged:
        scores = scored[setting.run, setting.name]
        assert scores is not None
        result = lds(scores, truth.masks, truth.query_loss)
        rows.append(
            {
                "setting": setting.name,
                "factors": setting.run or "default path",
                "lds": result.mean,
                "low": result.interval.low,
                "high": result.interval.high,
                "concentration": setting.concentration,
                "selectivity": setting.selectivity,
                "agreement": setting.agreement,
                "chosen": setting is by_checks.chosen,
            }
        )
    rows.sort(key=lambda row: -row["lds"])
    checks = ("concentration", "selectivity", "agreement")
    order = {
        key: float(spearmanr([r["lds"] for r in rows], [r[key] for r in rows])[0]) for key in checks
    }  # pyright: ignore[reportArgumentType]
    return {"rows": rows, "rank correlation with the LDS": order}


def render(name: str, result: dict[str, Any]) -> str:
    """One model's table as text."""
    lines = [
        f"\n{name}",
        f"{'setting':44} {'factors':24} LDS    interval        conc.  select. agree.",
    ]
    for row in result["rows"]:
        mark = "  <- chosen without retraining" if row["chosen"] else ""
        lines.append(
            f"{row['setting']:44} {row['factors']:24} {row['lds']:.3f}  [{row['low']:.3f}, "
            f"{row['high']:.3f}]  {row['concentration']:.3f}  {row['selectivity']:6.2f}  "
            f"{row['agreement']:.3f}{mark}"
        )
    order = ", ".join(
        f"{key} {value:.2f}" for key, value in result["rank correlation with the LDS"].items()
    )
    return "\n".join(
        [*lines, f"Spearman of the LDS over the {len(result['rows'])} settings with: {order}"]
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the sampled labels")
    parser.add_argument("--out", type=Path, help="write the tables as JSON")
    args = parser.parse_args()
    T = args.testbed
    results = {
        "testbed": table(T, T / "train.jsonl", T / "query.jsonl", T / "truth.npz", args.seed, False)
    }
    if args.demo:
        D = args.demo
        results["demo"] = table(
            D, D / "train.jsonl", D / "queries.jsonl", D / "truth.npz", args.seed, True
        )
    for name, result in results.items():
        print(render(name, result))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
