"""Edits by influence beside their rivals and beside retraining: one table for each of five tasks.

    python benchmarks/edits.py (--testbed DIR | --demo DIR) --out DIR [--seeds 0,1,2]
        [--tasks ...] [--quick] [--threads 1]

`--testbed` is the folder of the tofu-tiny testbed, `--demo` one made by `analysis demo`. The tasks
(`edit_cases.py` draws their rows):

    remove-1      one row; repeated for 4 rows of different groups
    remove-3      three rows of one group; repeated for 2 groups
    remove-group  all rows of a group: the first one, and another
    relabel       10 rows of different groups answer with each other's completions (rotated), and
                  get their own back
    correct       10 rows of different groups ask another group's question (also asked, and answered
                  rightly, by a row of that group), and get their own prompt back

For the last two an adapter is trained on the wrong rows first, by the recipe but with a seed of its
own (`WRONG_SEED`), so that no retrained adapter shares its initialisation. The truth is retraining
on the rows after the edit, once per seed. The last line of a table is retraining measured against
itself with another seed, below which no method can be told from it. Rivals get the edit's own
estimate of the loss to reach, for nothing.

Everything that is trained is kept under `--out`: a second call only edits. Results: `results.json`,
`tables.md` and the same on standard output. LOG.md has them (2026-11-21, "Relabelling and
correcting ten rows").
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unlearners
from edit_cases import SEED, TASKS, WRONG_SEED, Bed, Case, Truth, Watch, cases, retrained
from torch import Tensor
from unlearners import Edited, Outcome

import unlearn
from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.errors import NumericalError
from influence.loss import mean_losses, supervised_logits
from influence.progress import say
from influence.tokens import TokenizedExamples, tokenize
from unlearn.retraining.recipe import Recipe

#: The divergence from retraining is measured on every 6th untouched and every 10th held-out row.
EVERY_REST, EVERY_HELDOUT = 6, 10
#: NGDiff that stops when it has cost as much as the default edit.
WITHIN = "NGDiff, at most edit's work"
#: The adapter as it was, and further training on the rows as they are after the edit: the retained
#: rows, and the right ones where some change.
NOTHING, FINE_TUNING = "doing nothing", "fine-tuning on the rows after, edit's time"


# ---- what is measured ----------------------------------------------------------------------------


def log_probabilities(model: AdaptedModel, theta: Tensor, tokens: TokenizedExamples) -> Tensor:
    """Log-probabilities `[N, V]` at the rows' completion tokens, in the order of the batches."""
    log_p = []
    with model.at(theta), model.evaluating(), torch.no_grad():
        for rows in plan_batches(tokens, unlearners.TOKEN_BUDGET):
            part = supervised_logits(
                model, collate(tokens, rows, pad_id=model.pad_id, device=model.device)
            )
            log_p.append(part.logits.log_softmax(-1))
    return torch.cat(log_p)


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """`KL(p || q)` [N, V] in nats, mean over the tokens."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean())


def membership(members: np.ndarray, others: np.ndarray) -> float:
    """Signed AUC: the chance that an edited row has a *lower* loss than a held-out one.

    Ties count a half. Above 0.5: still known; 0.5: as if never seen; below: forgotten more than
    that, which also tells them apart.
    """
    return float(
        (members[:, None] < others[None]).mean() + 0.5 * (members[:, None] == others[None]).mean()
    )


@dataclass(frozen=True, eq=False)
class Ruler:
    """Everything that is measured of an adapter.

    `sets` of rows whose losses are measured, those that are `compared` in outputs, and the
    retrained adapters' `outputs` on these.
    """

    model: AdaptedModel
    sets: dict[str, TokenizedExamples]
    compared: dict[str, TokenizedExamples]
    outputs: list[dict[str, Tensor]] = field(repr=False)
    paraphrases: str

    @classmethod
    def of(cls, bed: Bed, case: Case, truth: Truth) -> Ruler:
        """The ruler of a case."""
        model, tokenizer = case.run.model, bed.model.tokenizer
        ids = set(case.ids)
        on_edited = [q for q in range(len(bed.queries)) if bed.sources(q) & ids]
        queries = bed.queries.select(on_edited) if on_edited else bed.queries
        paraphrases = f"all {len(bed.queries)} queries: none is on an edited row"
        if on_edited:
            paraphrases = f"{len(on_edited)} queries on edited rows"
        heldout = tokenize(bed.heldout, tokenizer)
        sets = {"old": case.old, "new": case.new, "retain": case.rest, "heldout": heldout}
        sets["paraphrase"] = tokenize(queries, tokenizer)
        compared = {"old": case.old, "new": case.new}
        compared["retain"] = case.rest.select(np.arange(0, len(case.rest), EVERY_REST))
        compared["heldout"] = heldout.select(np.arange(0, len(heldout), EVERY_HELDOUT))
        compared = {name: tokens for name, tokens in compared.items() if tokens is not None}
        outputs = [
            {name: log_probabilities(model, theta, tokens) for name, tokens in compared.items()}
            for theta in truth.thetas
        ]
        sets = {name: tokens for name, tokens in sets.items() if tokens is not None}
        return cls(model, sets, compared, outputs, paraphrases)

    def measure(self, theta: Tensor, leave_out: int | None = None) -> dict[str, float]:
        """Losses, divergences from the retrained adapters (but one), and membership at `theta`."""
        with self.model.at(theta):
            losses = {name: mean_losses(self.model, tokens) for name, tokens in self.sets.items()}
        measured = {name: float(values.mean()) for name, values in losses.items()}
        for name, tokens in self.compared.items():
            log_p = log_probabilities(self.model, theta, tokens)
            truths = [outputs[name] for k, outputs in enumerate(self.outputs) if k != leave_out]
            by_truth = [divergence(truth, log_p) for truth in truths]
            measured[f"KL {name}"] = float(np.mean(by_truth)) if by_truth else float("nan")
        return measured | {"AUC": membership(losses["old"], losses["heldout"])}


# ---- the methods ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Made:
    """What a method gave: parameters `[P]`, row-gradients, CPU and wall seconds, and a note."""

    theta: Tensor = field(repr=False)
    work: float
    seconds: tuple[float, float]
    note: str = ""


def edits(case: Case) -> dict[str, Callable[[], Made]]:
    """The edit by influences, first the default one."""

    def make(**options: Any) -> Made:
        watch = Watch()
        edit = unlearn.edit(case.run, **case.request, **options)
        report, seconds = edit.report, watch.read()
        target = report["losses"]["edited"]["target"]
        note = (
            f"{len(report['steps'])} steps to {target:.2f}: {report['stopped']}"
            if report["steps"]
            else report["stopped"]
        )
        return EditMade(edit.theta, report["cost"]["total"], seconds, note, report)

    return {
        "edit": make,
        "edit, rest=0": lambda: make(rest=0, max_damage=0.15),
        "one-shot": lambda: make(steps=1),
    }


@dataclass(frozen=True, eq=False)
class EditMade(Made):
    """An edit and its record."""

    report: dict[str, Any] = field(default_factory=dict, repr=False)


def rivals(case: Case, recipe: Recipe, default: EditMade) -> dict[str, Callable[[], Made]]:
    """The rivals, with the default edit's targets, norm, work and time."""
    rows = default.report["rows"]
    goal = float(np.mean([row.get("old_target", row["target"]) for row in rows]))
    new_goal = float("inf") if case.new is None else float(np.mean([row["target"] for row in rows]))
    edited = Edited(case.old, goal, case.new, new_goal)
    norm, model, rest = default.report["delta"]["norm"], case.run.model, case.rest

    def make(method: Callable[..., Outcome], **options: Any) -> Made:
        watch = Watch()
        outcome = method(model, edited, rest, np.random.default_rng(SEED), **options)
        missed = "" if outcome.reached in (None, True) else ", target not reached"
        note = f"{outcome.steps} steps{missed}"
        return Made(outcome.theta, outcome.cost.total, watch.read(), note)

    return {
        "ascent": lambda: make(unlearners.ascent),
        "ascent + descent": lambda: make(unlearners.ascent_descent),
        "ascent + KL": lambda: make(unlearners.ascent_kl),
        "NGDiff": lambda: make(unlearners.ngdiff),
        WITHIN: lambda: make(unlearners.ngdiff, budget=default.work),
        "sign step, edit's norm": lambda: make(unlearners.sign_step, norm=norm),
        FINE_TUNING: lambda: make(
            unlearners.finetune, seconds=default.seconds[0], recipe=recipe, clock=time.process_time
        ),
        "LLMEraser as released": lambda: make(unlearners.llmeraser),
    }


def compare(bed: Bed, case: Case, seeds: Sequence[int]) -> dict[str, Any]:
    """Every method on one case."""
    say(f"\n{case.task}: {case.label}")
    truth = retrained(bed, case, seeds)
    ruler = Ruler.of(bed, case, truth)
    whole, (took, wall) = (
        case.rows_after * bed.recipe.epochs,
        np.mean(truth.seconds, axis=0).tolist(),
    )
    table: dict[str, dict[str, Any]] = {
        NOTHING: ruler.measure(case.run.model.snapshot()) | {"work": 0.0, "seconds": 0.0}
    }

    def enter(name: str, method: Callable[[], Made]) -> Made | None:
        try:
            made = method()
            measured = ruler.measure(made.theta)
        except NumericalError as error:
            table[name] = {"note": f"failed: {error}"}
            return None
        costs = {
            "work": made.work,
            "work ratio": made.work / whole,
            "seconds": made.seconds[0],
            "wall": made.seconds[1],
        }
        table[name] = measured | costs | {"time ratio": made.seconds[0] / took, "note": made.note}
        say(f"  {name}: {made.work:.0f} row-gradients, {made.seconds[0]:.1f} CPU s; {made.note}")
        return made

    closed = edits(case)
    default = enter("edit", closed.pop("edit"))
    others = dict(closed)
    if isinstance(default, EditMade):
        others |= rivals(case, bed.recipe, default)
    for name, method in others.items():
        if (
            name == WITHIN
            and default is not None
            and table["NGDiff"].get("work", np.inf) <= default.work
        ):
            table[name] = table["NGDiff"] | {"note": "NGDiff itself costs no more than the edit"}
        else:
            enter(name, method)
    by_seed = [ruler.measure(theta, leave_out=k) for k, theta in enumerate(truth.thetas)]
    floor: dict[str, Any] = {
        key: float(np.mean([measured[key] for measured in by_seed])) for key in by_seed[0]
    }
    floor |= {
        "each seed": by_seed,
        "work": whole,
        "work ratio": 1.0,
        "seconds": took,
        "wall": wall,
        "time ratio": 1.0,
    }
    table["retrained"] = floor | {
        "note": f"seeds {', '.join(map(str, seeds))}; KL: each to the others"
    }
    edit = (
        {}
        if not isinstance(default, EditMade)
        else {key: default.report[key] for key in ("method", "guard", "rows")}
    )
    return {
        "task": case.task,
        "label": case.label,
        "ids": case.ids,
        "paraphrase": ruler.paraphrases,
        "edit": edit,
        "methods": table,
    }


# ---- tables --------------------------------------------------------------------------------------

COLUMNS = {
    "old": "forget",
    "new": "new",
    "retain": "retain",
    "heldout": "held-out",
    "paraphrase": "paraphr.",
    "KL old": "KL forget",
    "KL new": "KL new",
    "KL retain": "KL retain",
    "KL heldout": "KL held-out",
    "AUC": "AUC",
    "work": "work",
    "work ratio": "/ retr.",
    "seconds": "CPU s",
    "time ratio": "/ retr.",
}
CAPTION = """Losses: nats per completion token. forget: the edited rows' old contents; new: what
they were changed to; retain: all untouched rows. KL: of the method's outputs from the retrained
adapters', nats per token, mean over their seeds, on the edited rows, every 6th untouched and
every 10th held-out row. AUC: chance that a forget row has a lower loss than a held-out one
(above 0.5: still known; 0.5: as if never seen; below: over-forgotten). work: row-gradients after
the fit (a forward counts 1/3); `/ retr.`: over retraining's; CPU s: seconds of this process
(`results.json` has the wall's, too); both are longer while others work on the machine, so only
an idle one gives times. Brackets: lowest and highest of the repetitions. The last row is
retraining against itself with other seeds."""


def tables(results: Sequence[dict[str, Any]]) -> str:
    """A markdown table for each task, the mean over its cases."""
    parts = []
    for task in dict.fromkeys(result["task"] for result in results):
        of_task = [result for result in results if result["task"] == task]
        columns = [
            key
            for key in COLUMNS
            if any(key in row for case in of_task for row in case["methods"].values())
        ]
        lines = [f"### {task}", ""]
        lines += [f"* {case['label']}; paraphr.: {case['paraphrase']}" for case in of_task]
        lines += ["", "| " + " | ".join(["method", *(COLUMNS[key] for key in columns)]) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for method in dict.fromkeys(name for case in of_task for name in case["methods"]):
            rows = [case["methods"].get(method, {}) for case in of_task]
            lines.append("| " + " | ".join([method, *(cell(rows, key) for key in columns)]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, CAPTION]) + "\n"


def cell(rows: Sequence[dict[str, Any]], key: str) -> str:
    """The mean over the cases that have the number, with its range where there are several.

    Failures are counted.
    """
    values = np.array([row[key] for row in rows if key in row])
    if len(values) == 0 or not np.isfinite(values).any():
        return "-"
    form = (
        "{:.0f}"
        if key == "work"
        else "{:.1f}"
        if key == "seconds"
        else "{:.3f}"
        if "ratio" in key
        else "{:.2f}"
    )
    text = form.format(values.mean())
    ranged = len(values) > 1 and key not in ("work ratio", "seconds", "time ratio")
    text += f" [{form.format(values.min())}, {form.format(values.max())}]" if ranged else ""
    return text + (f" ({len(values)} of {len(rows)})" if len(values) < len(rows) else "")


def main() -> None:
    """Run the cases and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--testbed", type=Path)
    place.add_argument("--demo", type=Path)
    parser.add_argument(
        "--out", type=Path, required=True, help="fits, trained adapters and results"
    )
    parser.add_argument("--seeds", default="0,1,2", help="of the retrained adapters")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--quick", action="store_true", help="one case of each task")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    tasks, seeds = args.tasks.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := sorted(set(tasks) - set(TASKS)):
        parser.error(f"unknown tasks {', '.join(unknown)}; expected some of {', '.join(TASKS)}")
    torch.set_num_threads(args.threads)
    bed = Bed(args.testbed or args.demo, args.out, args.demo is not None)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "bed": bed.folder.name,
        "recipe": asdict(bed.recipe),
        "seeds": seeds,
        "wrong seed": WRONG_SEED,
        "seed": SEED,
        "tasks": tasks,
        "quick": args.quick,
        "threads": args.threads,
        "rivals": {
            "step": unlearners.STEP,
            "steps": unlearners.STEPS,
            "retained rows": unlearners.RETAINED,
        },
        "edit": {
            "options": "defaults, no held-out rows",
            "rest=0": {"rest": 0, "max_damage": 0.15},
            "one-shot": {"steps": 1},
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(json.dumps(settings), flush=True)
    results: list[dict[str, Any]] = []
    for make in cases(bed, tasks, args.quick):
        results.append(compare(bed, make(), seeds))
        text = json.dumps({"settings": settings, "cases": results}, indent=1)
        (args.out / "results.json").write_text(text + "\n", encoding="utf-8")
        (args.out / "tables.md").write_text(tables(results), encoding="utf-8")
    print(tables(results))


if __name__ == "__main__":
    main()
