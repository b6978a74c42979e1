"""Methods of `unlearn train`, edit by influences and retraining on the same removals, tuned equally.

    python benchmarks/unlearning.py --testbed DIR --out DIR [--percent 1,5,10] [--seeds 0,1,2]
                                    [--retrained 0,1,2] [--methods ga,npo,...]
                                    [--method FILE.py:NAME] [--budget 0.5] [--tofu DIR]
                                    [--threads 1] [--tables]

Forgotten are the first 1, 5 and 10 % of the rows, as in TOFU. *Rows of every table*: doing nothing,
retraining, fine-tuning on the retained rows (`FINE_TUNING`: training further on them alone), the
default edit, the same with `--rest 0`, and the methods of `unlearn train`.

*Goal*: the loss that a local retraining expects of a model which never saw the rows
(`unlearn.unseen`), by the recipe of the adapter. It is made once per removal and given to every
method as `--until loss=X`. The edit, and matching, need more of the local retraining than a number
and make it themselves.

*Tuning* (`tuning.py`): the rate of every method, a multiple of its own stride, is tuned with seed 0
on a grid that is widened until the kept rate is better than both neighbours. The kept rate is run
with the other seeds. The edit is not tuned: it has no rate, the constants of its steps are no
options (benchmarks/README.md says what they were found on), and `--max-damage`, which is one,
changes steps only where the retained loss has risen by more than half of it. The table has the
largest such rise of any edit; `--rest`, the other one, has a row.

*The most work*: a method may take as many steps as half (`--budget`) of retraining's row-gradients
buy, and not more than its own `steps` (200; task arithmetic 30), which is what a user gets. The
goal's work is not in that budget: with it a method may cost more than the edit does.

*Measured*: mean losses, nats per token, of forgotten, retained (all of them) and held-out rows; KL
of the outputs from retrained models (the mean over the seeds of `--retrained`), on forgotten, every
6th retained and every 10th held-out row; signed AUC of the forgotten rows' losses against the
held-out ones. *Work*, in row-gradients (a forward alone counts a third): of the goal, which is the
local retraining, and of the method itself; the sum over retraining's; the number of runs that
tuning took, and their work over retraining's. *Spread*: over the kept rate and its neighbours, the
difference of the largest and the least distance `|forget / retrained - 1| + |retained / retrained -
1|`. A second table applies the rule of tuning to those runs alone that raise the retained loss by
at most `ALLOWED`, as the edit's own guard does.

`--tofu`: the folder of the TOFU data, whose first authors the testbed's base was trained on: every
9th of their rows is what methods with general rows retain; without it they take the other rows.
`--method` adds one of your own. Each finished run is a line of `runs-P.jsonl`; a second call makes
what is missing. `--tables` only prints.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from edit_cases import SEED, Bed, Case, Truth, removal, retrained
from edits import EVERY_HELDOUT, EVERY_REST, divergence, log_probabilities, membership
from torch import Tensor
from tuning import FACTOR, Lines, at_edge, kept_power, tune

import influence
import unlearn
from influence.cost import Cost
from influence.errors import ToolkitError
from influence.loss import mean_losses
from influence.progress import say
from influence.rows import Examples
from influence.tokens import tokenize
from unlearn.methods import terms
from unlearn.methods.methods import METHODS, Method, method_of
from unlearn.record.change import plan
from unlearn.record.version import version
from unlearn.retraining.recipe import Recipe
from unlearn.unseen import expected_losses

#: The most that a method's steps may cost over retraining. A choice: more than the edit's own steps
#: cost (0.4 of it on 20 of 200 rows), and with the goal (0.8) more than retraining.
BUDGET = 0.5
#: Rows to unlearn, and retained rows, in a step: `unlearn train`'s own.
BATCH = 32
#: The edit by influences by name, with their options.
EDITS: dict[str, dict[str, Any]] = {
    "edit by influence": {},
    "edit by influence, --rest 0": {"rest": 0},
}
#: Rise of the retained loss that the second table allows: `--max-damage` of an edit.
ALLOWED = 0.1
RETRAINED, BEFORE = "retraining", "doing nothing"
#: Training further on the retained rows alone, at a method's usual stride.
FINE_TUNING = Method("fine-tuning on retained rows", retain=terms.descent)


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


@dataclass(frozen=True)
class Goal:
    """The loss that forgotten rows should reach, and what finding it cost.

    Attributes
    ----------
    loss, low, high : float
        The expected mean loss, and its interval under one retrained model, nats per token.
    work : float
        Row-gradients of the local retraining.
    """

    loss: float
    low: float
    high: float
    work: float


def goal_of(case: Case, recipe: Recipe) -> Goal:
    """The goal of a removal, as `unlearn train --until expected` finds it."""
    start, cost = version(case.run, "original"), Cost()
    change = plan(start, case.ids, None, None)
    with start.model.at(start.theta):
        now = mean_losses(start.model, change.old)
    found = expected_losses(change, recipe, now, np.zeros(0), cost, seed=SEED)
    rows = np.arange(len(now))
    low, high = found.interval(rows)
    return Goal(float(found.expected[rows].mean()), low, high, found.local.row_gradients)


def most_steps(method: Method, forgotten: int, retained: int, budget: float) -> int:
    """Steps that a method may take: what `budget` row-gradients buy, at most its own number."""
    of_forgotten, of_retained = method.cost
    price = of_forgotten * min(BATCH, forgotten) + of_retained * min(BATCH, retained)
    return max(1, min(method.steps, int(budget / price)))


def run_method(
    case: Case,
    method: Method,
    factor: float,
    seed: int,
    goal: float,
    general: Examples | None,
    recipe: Recipe,
    budget: float,
) -> unlearn.Edit:
    """One training that costs at most `budget` of retraining."""
    lr = None if method.lr is None else method.lr * factor
    scaled = replace(method, stride=method.stride * factor)
    retain = general if method.general else None
    retained = case.rows_after if retain is None else len(retain)
    return unlearn.train(
        case.run,
        scaled,
        case.ids,
        retain=retain,
        lr=lr,
        until=f"loss={goal:.6g}",
        steps=most_steps(method, len(case.ids), retained, budget * case.rows_after * recipe.epochs),
        batch_size=BATCH,
        recipe=recipe,
        seed=seed,
        start="original",
    )


def run_edit(case: Case, name: str, seed: int, recipe: Recipe) -> unlearn.Edit:
    """One edit by influence."""
    return unlearn.remove(
        case.run, case.ids, recipe=recipe, seed=seed, start="original", **EDITS[name]
    )


def line_of(edit: unlearn.Edit, ruler: Ruler, goal: float) -> dict[str, Any]:
    """What a run came to.

    `goal work` is what it spent on a local retraining of its own, `damage` the largest relative
    rise of the retained rows' loss that a step of an edit saw.
    """
    cost, expected = edit.report["cost"], edit.report["expected"]
    goal_work = 0 if expected is None else expected["row_gradients"]
    measured, steps = ruler.measure(edit.theta), edit.report["steps"] or ()
    damages = [step["damage"] for step in steps if step["damage"] is not None]
    return {
        **measured,
        "reached": measured["forget"] >= 0.97 * goal,
        "steps": len(edit.log) or len(steps),
        "damage": max(damages, default=None),
        "goal work": goal_work,
        "work": cost["total"] - goal_work,
        "seconds": cost["seconds"],
    }


@dataclass(frozen=True, eq=False)
class Study:
    """One removal: what is forgotten, how it is measured, and the runs so far."""

    case: Case
    recipe: Recipe
    ruler: Ruler
    lines: Lines
    goal: float
    general: Examples | None
    budget: float

    def compare(self, contenders: Sequence[Method], seeds: Sequence[int]) -> None:
        """Make the runs that are missing: the edits first, then every method."""
        case, recipe = self.case, self.recipe
        for name in EDITS:
            for seed in seeds:
                self.run(
                    name, lambda name=name, seed=seed: run_edit(case, name, seed, recipe), seed
                )
        for method in contenders:
            self.tuned(method, seeds)

    def tuned(self, method: Method, seeds: Sequence[int]) -> None:
        """Tune with the first seed, and run what is kept with the others."""
        case, recipe = self.case, self.recipe

        def run(power: int, seed: int) -> None:
            """One run of the method."""
            how = (FACTOR**power, seed, self.goal, self.general, recipe, self.budget)
            self.run(method.name, lambda: run_method(case, method, *how), seed, power=power)

        kept = tune(self.lines, method.name, seeds[0], lambda power: run(power, seeds[0]))
        for seed in seeds[1:]:
            run(kept, seed)

    def run(self, name: str, make: Callable[[], unlearn.Edit], seed: int, **further: int) -> None:
        """One run, if it is not there yet."""
        keys = {"method": name, "seed": seed, **further}
        if self.lines.of(**keys):
            return
        try:
            line = line_of(make(), self.ruler, self.goal)
        except ToolkitError as error:
            line = {"failed": str(error)}
        self.lines.add({**keys, **line})
        losses = f"{line.get('forget')}, {line.get('retained')}; {line.get('seconds')} s"
        say(f"{self.case.task}: {keys}: {losses}")


def study(bed: Bed, percent: int, args: argparse.Namespace) -> None:
    """All runs of one removal that are not there yet."""
    rows = np.arange(max(1, round(len(bed.rows) * percent / 100)))
    case = removal(bed, f"forget-{percent}", rows)
    lines = Lines(args.out / f"runs-{percent}.jsonl")
    truth = retrained(bed, case, args.retrained)
    ruler = Ruler(bed, case, truth)
    if not lines.of(method=BEFORE):
        goal = goal_of(case, bed.recipe)
        nothing = {"reached": False, "goal work": 0, "work": 0, "budget": args.budget}
        found = {"goal": goal.loss, "low": goal.low, "high": goal.high, "found by": goal.work}
        measured = ruler.measure(bed.model.snapshot())
        lines.add({"method": BEFORE, **found, **nothing, **measured})
    work = {"reached": True, "goal work": 0, "work": case.rows_after * bed.recipe.epochs}
    for place, seed in enumerate(args.retrained):
        if not lines.of(method=RETRAINED, seed=seed):
            measured = ruler.measure(truth.thetas[place], leave_out=place)
            lines.add({"method": RETRAINED, "seed": seed, **measured, **work})
    before = lines.of(method=BEFORE)[0]
    if before["budget"] != args.budget:
        raise SystemExit(
            f"{lines.path} has runs of a budget of {before['budget']}: give another --out"
        )
    general = None if args.tofu is None else general_rows(args.tofu)
    contenders = [FINE_TUNING, *methods(args.methods, args.method)]
    made = Study(case, bed.recipe, ruler, lines, before["goal"], general, args.budget)
    made.compare(contenders, args.seeds)


# ---- tables --------------------------------------------------------------------------------------

#: What is measured of a run, and the titles of the table and of the second one.
COLUMNS = ("forget", "retained", "heldout", "kl_forget", "kl_retained", "kl_heldout", "auc")
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
    "goal",
    "itself",
    "/ retraining",
    "runs",
    "all / retraining",
    "spread",
    "reached",
)
SECOND = ("method", "rate x", "forget", "retained", "held-out", "KL forget", "itself", "reached")


def runs_of(lines: Lines, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A method's runs at its kept rate, with every seed, and its grid, empty where it has none."""
    runs = lines.of(method=name)
    if not runs or "power" not in runs[0]:
        return runs, []
    grid = [line for line in runs if line["seed"] == runs[0]["seed"]]
    power = kept_power(grid)
    kept = [line for line in runs if line["power"] == power and "failed" not in line]
    return kept, grid


def summary(lines: Lines, name: str) -> dict[str, Any] | None:
    """A method's row: means over seeds at its kept rate, work, tuning, and the spread over rates.

    None where it has not run.
    """
    runs, grid = runs_of(lines, name)
    if not runs and not grid:
        return None
    before, true = lines.of(method=BEFORE)[0], lines.of(method=RETRAINED)
    row: dict[str, Any] = {"method": name, "rate": rate_text(grid), "seeds": len(runs)}
    for column in COLUMNS:
        row[column] = mean_and_range([line[column] for line in runs if column in line])
    whole = float(np.mean([line["work"] for line in true]))
    # Where a run made no local retraining, it was given what one found.
    given = 0 if name in (BEFORE, RETRAINED) else before["found by"]
    goals = [line["goal work"] or given for line in runs]
    row["goal"] = mean_and_range(goals)
    row["itself"] = mean_and_range([line["work"] for line in runs])
    sums = [goal + line["work"] for goal, line in zip(goals, runs, strict=True)]
    row["ratio"] = float(np.mean(sums)) / whole if sums else None
    tried = [line for line in grid if "failed" not in line]
    spent = sum(line["goal work"] + line["work"] for line in tried)
    once = 0 if any(line["goal work"] for line in tried) else given
    row["runs"], row["all"] = len(grid), (spent + once) / whole if grid else None
    distances = [
        distance(line, true) for line in grid if abs(line["power"] - kept_power(grid)) <= 1
    ]
    row["spread"] = max(distances) - min(distances) if distances else None
    row["reached"] = sum(line.get("reached", False) for line in runs)
    row["points"] = [(line["retained"], line["forget"]) for line in runs]
    return row


def mean_and_range(values: Sequence[float]) -> list[float] | None:
    """Mean, least and largest; None of nothing."""
    if not values:
        return None
    return [float(np.mean(values)), float(np.min(values)), float(np.max(values))]


def rate_text(grid: Sequence[dict[str, Any]]) -> str:
    """The multiple of the kept rate, and whether it lies at the grid's edge."""
    if not grid:
        return ""
    return f"{FACTOR ** kept_power(grid):.2g}" + (" (edge)" if at_edge(grid) else "")


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
    """The tables of one removal as Markdown, and the first one's rows."""
    before = lines.of(method=BEFORE)[0]
    goal = f"goal {before['goal']:.2f} [{before['low']:.2f}, {before['high']:.2f}]"
    rows = [row for row in (summary(lines, name) for name in names) if row is not None]
    text = [f"### Forget {percent} % ({goal})", "", *head(TITLES)]
    for row in rows:
        cells = [row["method"], row["rate"]]
        cells += [cell(row[column]) for column in COLUMNS]
        cells += [cell(row[column], digits=0) for column in ("goal", "itself")]
        cells += ["" if row["ratio"] is None else f"{row['ratio']:.2f}"]
        cells += [f"{row['runs'] or ''}", "" if row["all"] is None else f"{row['all']:.1f}"]
        cells += ["" if row["spread"] is None else f"{row['spread']:.2f}"]
        text.append(f"| {' | '.join(cells)} | {row['reached']} of {row['seeds']} |")
    damages = [line["damage"] or 0.0 for name in EDITS for line in lines.of(method=name)]
    if damages:
        text += [
            "",
            f"The most that an edit's step saw its retained rows lose: {max(damages):.1%}.",
        ]
    text += ["", f"Of the runs that raise the retained loss by at most {ALLOWED:.0%}:", ""]
    text += head(SECOND)
    limit = (1 + ALLOWED) * before["retained"]
    for name in names:
        _, grid = runs_of(lines, name)
        if grid:
            text.append(f"| {' | '.join(undamaged(name, grid, limit))} |")
    return "\n".join(text), rows


def head(titles: Sequence[str]) -> list[str]:
    """The two lines that begin a table."""
    return [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]


def undamaged(name: str, grid: Sequence[dict[str, Any]], limit: float) -> list[str]:
    """A method's cells in the second table: what is kept of the runs below a retained loss."""
    sound = [line for line in grid if line.get("retained", float("inf")) <= limit]
    if not sound:
        return [name, "none", *[""] * (len(SECOND) - 2)]
    power = kept_power(sound)
    kept = next(line for line in sound if line["power"] == power)
    values = [f"{kept[key]:.2f}" for key in ("forget", "retained", "heldout", "kl_forget")]
    values.append(f"{kept['work']:.0f}")
    return [name, f"{FACTOR**power:.2g}", *values, "yes" if kept["reached"] else "no"]


def cell(values: list[float] | None, *, digits: int = 2) -> str:
    """Mean and, where seeds differ, the range."""
    if values is None or not np.isfinite(values).all():
        return "-"
    mean, low, high = values
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
    axes.scatter(*first["points"][0], marker="x", s=70, color="gray", label=BEFORE)
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
    parser.add_argument("--percent", type=numbers, default=[1, 5, 10])
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--retrained", type=numbers, default=[0, 1, 2], help="their seeds")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument(
        "--method", action="append", default=[], help="FILE.py:NAME, a method of your own"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="of retraining's work")
    parser.add_argument("--tofu", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    bed = Bed(args.testbed, args.out, False)
    further = [method.name for method in methods([], args.method)]
    names = [BEFORE, RETRAINED, FINE_TUNING.name, *EDITS, *args.methods, *further]
    for percent in args.percent:
        if not args.tables:
            study(bed, percent, args)
        lines = Lines(args.out / f"runs-{percent}.jsonl")
        if lines.lines:
            text, rows = table(lines, percent, names)
            print(text, "\n")
            (args.out / f"table-{percent}.md").write_text(text + "\n", encoding="utf-8")
            plot(rows, percent, args.out / f"pareto-{percent}.png")


def numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
