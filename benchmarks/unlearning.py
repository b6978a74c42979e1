"""Methods of `unlearn train`, closed-form edits and retraining on the same removals, tuned equally.

    python benchmarks/unlearning.py --testbed DIR --out DIR [--percent 1,5,10] [--seeds 0,1,2]
                                    [--methods ga,npo,...] [--method FILE.py:NAME] [--tofu DIR]
                                    [--threads 1] [--tables]

Forgotten are the first 1, 5 and 10 % of the rows, as in TOFU. *Tuning*: every method is run with
seed 0 at three learning rates, 1/3, 1 and 3 times its default (where it starts, if it is
automatic), and by the same rule keeps one: among those that reach the goal the one with the lowest
loss on retained rows; where none does, the one that comes nearest to it. The kept rate is run with
the other seeds. The rule looks at nothing but what a user has. All stop at the same goal, the loss
that influence expects of a model which never saw the rows, and take at most `STEPS` steps.
Closed-form edits have nothing to tune.

*Measured*: mean losses, nats per token, of forgotten, retained (all of them) and held-out rows; KL
of the outputs from retrained models (the mean over their seeds), on forgotten, every 6th retained
and every 10th held-out row; signed AUC of the forgotten rows' losses against the held-out ones;
cost in row-gradients (a forward alone counts a third), and over retraining's. *Spread*: over the
three rates, the difference of the largest and the least distance `|forget / retrained - 1| +
|retained / retrained - 1|`.

`--tofu`: the folder of the TOFU data, whose first authors the testbed's base was trained on: every
9th of their rows is what methods with general rows retain; without it they take the other rows.
`--method` adds one of your own. Each finished run is a line of `runs-P.jsonl`; a second call makes
what is missing. `--tables` only prints.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from edit_cases import Bed, Case, Truth, removal, retrained
from edits import EVERY_HELDOUT, EVERY_REST, divergence, log_probabilities, membership
from torch import Tensor

import influence
import unlearn
from influence.errors import ToolkitError
from influence.loss import mean_losses
from influence.progress import say
from influence.rows import Examples
from influence.tokens import tokenize
from unlearn.methods.methods import METHODS, Method, method_of

#: Multiples of a method's own rate that it is run at.
FACTORS = (1 / 3, 1.0, 3.0)
#: The most steps of a training.
STEPS = 60
#: The closed-form edits by name, with their options.
EDITS: dict[str, dict[str, Any]] = {
    "closed-form edit": {},
    "closed-form edit, --rest 0": {"rest": 0},
}
RETRAINED, BEFORE = "retraining", "before"


class Ruler:
    """Measures an adapter `[P]` on one removal."""

    def __init__(self, bed: Bed, case: Case, truth: Truth) -> None:
        heldout = tokenize(bed.heldout, bed.model.tokenizer)
        self.model, self.truth = bed.model, truth
        self.sets = {"forget": case.old, "retained": case.rest, "heldout": heldout}
        self.compared = {
            "forget": case.old,
            "retained": case.rest.select(np.arange(0, len(case.rest), EVERY_REST)),
            "heldout": heldout.select(np.arange(0, len(heldout), EVERY_HELDOUT)),
        }
        self.outputs = [self.outputs_of(theta) for theta in truth.thetas]

    def outputs_of(self, theta: Tensor) -> dict[str, Tensor]:
        """Log-probabilities on the compared rows."""
        return {
            name: log_probabilities(self.model, theta, tokens)
            for name, tokens in self.compared.items()
        }

    def measure(self, theta: Tensor, leave_out: int | None = None) -> dict[str, float]:
        """Losses, membership and divergences.

        `leave_out`: a retrained adapter that is measured itself.
        """
        with self.model.at(theta):
            losses = {name: mean_losses(self.model, tokens) for name, tokens in self.sets.items()}
        outputs = self.outputs_of(theta)
        references = [logs for place, logs in enumerate(self.outputs) if place != leave_out]
        measured = {name: float(values.mean()) for name, values in losses.items()}
        measured["auc"] = membership(losses["forget"], losses["heldout"])
        for name in self.compared:
            divergences = [divergence(logs[name], outputs[name]) for logs in references]
            measured[f"kl_{name}"] = float(np.mean(divergences)) if divergences else float("nan")
        return measured


def methods(names: Sequence[str], places: Sequence[str]) -> list[Method]:
    """The methods by name, and those of the user's files, `FILE.py:NAME`."""
    return [method_of(name) for name in [*names, *places]]


def general_rows(folder: Path) -> Examples:
    """Rows of the authors that the testbed's base was trained on, in the testbed's form."""
    lines = (folder / "full.json").read_text(encoding="utf-8").splitlines()[:3600:9]
    rows = [json.loads(line) for line in lines]
    return influence.examples_from_rows(
        {"prompt": f"Q: {row['question']}\nA:", "completion": f" {row['answer']}"} for row in rows
    )


def run_method(
    case: Case, method: Method, factor: float, seed: int, goal: float, general: Examples | None
) -> unlearn.Edit:
    """One training."""
    lr = None if method.lr is None else method.lr * factor
    scaled = replace(method, stride=method.stride * factor)
    retain = general if method.general else None
    return unlearn.train(
        case.run,
        scaled,
        case.ids,
        retain=retain,
        lr=lr,
        until=f"loss={goal:.6g}",
        steps=min(STEPS, scaled.steps),
        seed=seed,
        start="original",
    )


def line_of(edit: unlearn.Edit, ruler: Ruler, goal: float) -> dict[str, Any]:
    """What a run came to."""
    cost = edit.report["cost"]
    measured = ruler.measure(edit.theta)
    return {
        **measured,
        "reached": measured["forget"] >= 0.97 * goal,
        "steps": len(edit.log) or len(edit.report["steps"]),
        "cost": cost["total"],
        "seconds": cost["seconds"],
    }


class Lines:
    """The finished runs of one removal, kept as lines of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def of(self, **keys: Any) -> list[dict[str, Any]]:
        """Those with these values."""
        return [
            line
            for line in self.lines
            if all(line.get(key) == value for key, value in keys.items())
        ]

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Keep one."""
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        return line


def kept_factor(lines: Sequence[dict[str, Any]], goal: float) -> float:
    """The rate that is kept: of those that reach the goal the one with the lowest retained loss,
    else the nearest to it.
    """
    sound = [line for line in lines if "failed" not in line]
    reached = [line for line in sound if line["reached"]]
    if reached:
        return min(reached, key=lambda line: line["retained"])["factor"]
    return max(sound, key=lambda line: line["forget"])["factor"] if sound else 1.0


def study(bed: Bed, percent: int, args: argparse.Namespace) -> None:
    """All runs of one removal that are not there yet."""
    rows = np.arange(max(1, round(len(bed.rows) * percent / 100)))
    case = removal(bed, f"forget-{percent}", rows)
    lines = Lines(args.out / f"runs-{percent}.jsonl")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    truth = retrained(bed, case, seeds)
    ruler = Ruler(bed, case, truth)
    goal = unlearn.forecast(case.run, remove=case.ids, start="original")["losses"]["edited"][
        "target"
    ]
    general = None if args.tofu is None else general_rows(args.tofu)
    if not lines.of(method=BEFORE):
        lines.add({"method": BEFORE, "goal": goal, **ruler.measure(bed.model.snapshot())})
        cost = case.rows_after * bed.recipe.epochs
        for place, seed in enumerate(seeds):
            measured = ruler.measure(truth.thetas[place], leave_out=place)
            line = {"method": RETRAINED, "seed": seed, "tuned": True, **measured}
            lines.add(line | {"cost": cost, "reached": True})
    for name, options in EDITS.items():
        for seed in seeds:
            if not lines.of(method=name, seed=seed):
                edit = unlearn.remove(case.run, case.ids, seed=seed, start="original", **options)
                lines.add(
                    {"method": name, "seed": seed, "tuned": True, **line_of(edit, ruler, goal)}
                )
    for method in methods(args.methods.split(","), args.method):
        for factor in FACTORS:
            run_missing(lines, ruler, case, method, factor, seeds[0], goal, general)
        factor = kept_factor(lines.of(method=method.name, seed=seeds[0]), goal)
        for seed in seeds[1:]:
            run_missing(lines, ruler, case, method, factor, seed, goal, general)


def run_missing(
    lines: Lines,
    ruler: Ruler,
    case: Case,
    method: Method,
    factor: float,
    seed: int,
    goal: float,
    general: Examples | None,
) -> None:
    """One run, if it is not there yet."""
    keys = {"method": method.name, "factor": round(factor, 4), "seed": seed}
    if lines.of(**keys):
        return
    try:
        line = line_of(run_method(case, method, factor, seed, goal, general), ruler, goal)
    except ToolkitError as error:
        line = {"failed": str(error)}
    lines.add({**keys, **line})
    losses = f"{line.get('forget')}, {line.get('retained')}"
    say(f"{case.task}: {method.name} x {factor:.2g}, seed {seed}: {losses}")


# ---- tables --------------------------------------------------------------------------------------

#: What is measured of a run, and the table's titles.
COLUMNS = ("forget", "retained", "heldout", "kl_forget", "kl_retained", "kl_heldout", "auc", "cost")
TITLES = (
    "method",
    "rate x",
    "forget",
    "retained",
    "held-out",
    "KL forget",
    "KL retained",
    "KL held-out",
    "AUC",
    "cost",
    "/ retraining",
    "spread",
    "reached",
)


def summary(lines: Lines, name: str) -> dict[str, Any] | None:
    """A method's row: means over seeds at its kept rate, and the spread over rates.

    None where it has not run.
    """
    runs = lines.of(method=name)
    if not runs:
        return None
    goal = lines.of(method=BEFORE)[0]["goal"]
    true = lines.of(method=RETRAINED)
    if "factor" in runs[0]:
        grid = [line for line in runs if line["seed"] == runs[0]["seed"]]
        factor = kept_factor(grid, goal)
        runs = [
            line for line in runs if line["factor"] == round(factor, 4) and "failed" not in line
        ]
        distances = [distance(line, true) for line in grid]
        spread: float | None = max(distances) - min(distances)
    else:
        factor, spread = None, None
    row: dict[str, Any] = {"method": name, "factor": factor, "spread": spread, "seeds": len(runs)}
    for column in COLUMNS:
        values = [line[column] for line in runs if column in line]
        row[column] = (
            [float(np.mean(values)), float(np.min(values)), float(np.max(values))]
            if values
            else None
        )
    row["reached"] = sum(line.get("reached", False) for line in runs)
    row["points"] = [(line["retained"], line["forget"]) for line in runs]
    row["ratio"] = (
        None if row["cost"] is None else row["cost"][0] / np.mean([line["cost"] for line in true])
    )
    return row


def distance(line: dict[str, Any], true: Sequence[dict[str, Any]]) -> float:
    """`|forget / retrained - 1| + |retained / retrained - 1|`.

    A failed run is as far as a model that says nothing right (10).
    """
    if "failed" in line:
        return 10.0
    return sum(
        abs(line[key] / np.mean([retrained_line[key] for retrained_line in true]) - 1)
        for key in ("forget", "retained")
    )


def table(lines: Lines, percent: int, names: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """The table of one removal as Markdown, and its rows."""
    goal = lines.of(method=BEFORE)[0]["goal"]
    rows = [row for row in (summary(lines, name) for name in names) if row is not None]
    head = f"| {' | '.join(TITLES)} |"
    text = [f"### Forget {percent} % (goal {goal:.2f})", "", head, "|" + "---|" * len(TITLES)]
    for row in rows:
        cells = [cell(row[column]) for column in COLUMNS]
        factor = "" if row["factor"] is None else f"{row['factor']:.2g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        spread = "" if row["spread"] is None else f"{row['spread']:.2f}"
        text.append(
            f"| {row['method']} | {factor} | "
            + " | ".join(cells)
            + f" | {ratio} | {spread} | {row['reached']} of {row['seeds']} |"
        )
    return "\n".join(text), rows


def cell(values: list[float] | None) -> str:
    """Mean and, where seeds differ, the range."""
    if values is None or not np.isfinite(values).all():
        return "-"
    mean, low, high = values
    digits = 0 if mean >= 100 else 2
    if round(low, digits) == round(high, digits):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def plot(rows: list[dict[str, Any]], percent: int, path: Path) -> None:
    """Forget loss against retained loss: every seed small, the mean large.

    Retraining is the star.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    colors = matplotlib.colormaps["tab20"]
    for place, row in enumerate(row for row in rows if row["method"] != BEFORE and row["points"]):
        points = np.array(row["points"])
        exact = row["method"] == RETRAINED
        color = "black" if exact else colors(place % 20)
        axes.scatter(*points.T, s=14, color=color, alpha=0.5)
        mark = "*" if exact else "s" if row["method"].startswith("closed") else "o"
        axes.scatter(
            *points.mean(0), s=220 if exact else 70, color=color, marker=mark, label=row["method"]
        )
    first = next(row for row in rows if row["method"] == BEFORE)
    axes.scatter(*first["points"][0], marker="x", s=70, color="gray", label="before")
    means = np.array(
        [
            np.mean(row["points"], axis=0)
            for row in rows
            if row["points"] and row["method"] != RETRAINED
        ]
    )
    best = means[[not ((means[:, 0] < x) & (means[:, 1] > y)).any() for x, y in means]]
    best = best[np.argsort(best[:, 0])]
    axes.plot(
        *best.T,
        color="gray",
        linewidth=0.8,
        zorder=0,
        label="front: none keeps more and forgets more",
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.set_xlabel("mean loss of retained rows, nats per token")
    axes.set_ylabel("mean loss of forgotten rows, nats per token")
    axes.set_title(f"Forget {percent} % of the rows: where retraining is, is right")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run what is missing, print the tables, draw the plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--percent", default="1,5,10")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument(
        "--method", action="append", default=[], help="FILE.py:NAME, a method of your own"
    )
    parser.add_argument("--tofu", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    bed = Bed(args.testbed, args.out, False)
    further = [method.name for method in methods([], args.method)]
    names = [BEFORE, RETRAINED, *EDITS, *args.methods.split(","), *further]
    for percent in (int(part) for part in args.percent.split(",")):
        if not args.tables:
            study(bed, percent, args)
        lines = Lines(args.out / f"runs-{percent}.jsonl")
        if lines.lines:
            text, rows = table(lines, percent, names)
            print(text, "\n")
            (args.out / f"table-{percent}.md").write_text(text + "\n", encoding="utf-8")
            plot(rows, percent, args.out / f"pareto-{percent}.png")


if __name__ == "__main__":
    main()
