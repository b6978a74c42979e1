"""Closed-form edits beside their rivals and beside retraining: one table for each of five tasks.

    python benchmarks/edits.py (--testbed DIR | --demo DIR) --out DIR [--seeds 0,1,2] [--tasks ...] [--quick] [--threads 1]

`--testbed` is the folder of the tofu-tiny testbed, `--demo` one made by `analysis demo`. The tasks, with their rows drawn by
`numpy.random.default_rng(0)` and never by hand:

    remove-1      one row; repeated for 4 rows of different groups
    remove-3      three rows of one group; repeated for 2 groups
    remove-group  all rows of a group: the first one, and another
    relabel       10 rows of different groups answer with each other's completions (rotated), and get their own back
    correct       10 rows of different groups ask another group's question (also asked, and answered rightly, by a row of that
                  group), and get their own prompt back

For the last two an adapter is trained on the wrong rows first, by the recipe but with a seed of its own (`WRONG_SEED`), so that
no retrained adapter shares its initialisation. The truth is retraining on the rows after the edit, once per seed; the last line
of a table is retraining measured against itself with another seed, below which no method can be told from it. Rivals get
the edit's own estimate of the loss to reach, for nothing.

Everything that is trained is kept under `--out`: a second call only edits. Results: `results.json`, `tables.md` and the same on
standard output.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unlearners
from torch import Tensor
from unlearners import Edited, Outcome

import influence
import unlearn
from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.errors import NumericalError
from influence.loss import mean_losses, supervised_logits
from influence.path import read_parameters
from influence.progress import say
from influence.rows import Example, Examples
from influence.run import Run
from influence.tokens import TokenizedExamples, tokenize
from unlearn.retraining.recipe import Recipe
from unlearn.retraining.retrain import fresh_adapter, train

TASKS = ("remove-1", "remove-3", "remove-group", "relabel", "correct")
#: Repetitions of the removals of one row, of three, and of a group; rows that are changed.
SINGLES, TRIPLES, GROUPS, CHANGED = 4, 2, 2, 10
#: Seed of the adapters that are trained on wrong rows; of the draw of rows, the fit, and the rivals' draws.
WRONG_SEED, SEED = 100, 0
#: The divergence from retraining is measured on every 6th untouched and every 10th held-out row.
EVERY_REST, EVERY_HELDOUT = 6, 10
#: NGDiff that stops when it has cost as much as the default edit.
WITHIN = "NGDiff, at most edit's work"


# ---- what is edited ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bed:
    """A base, an adapter, its rows, paraphrases of some of them (queries), rows it never saw, its recipe; and a work folder."""

    folder: Path
    work: Path
    demo: bool

    @cached_property
    def model(self) -> AdaptedModel:
        """The adapter that all rows were trained into."""
        return influence.load(str(self.folder / "base"), str(self.folder / "adapter"), device="cpu")

    @cached_property
    def rows(self) -> Examples:
        """The rows that the adapter was trained on."""
        return influence.read_examples(self.folder / "train.jsonl")

    @cached_property
    def queries(self) -> Examples:
        """Questions on the rows' facts in other words."""
        return influence.read_examples(
            self.folder / ("queries.jsonl" if self.demo else "query.jsonl")
        )

    @cached_property
    def heldout(self) -> Examples:
        """Rows of the same kind that neither base nor adapter saw."""
        return influence.read_examples(self.folder / "heldout.jsonl")

    @cached_property
    def recipe(self) -> Recipe:
        """`recipe.json` of the adapter or the folder; else the defaults, by which both kinds of bed were trained."""
        places = [self.folder / "adapter" / "recipe.json", self.folder / "recipe.json"]
        return next((Recipe.read(path) for path in places if path.is_file()), Recipe())

    def sources(self, query: int) -> set[str]:
        """Ids of the rows that a query paraphrases: row 2 + 5 j of the testbed; in the demo those on the same fact."""
        if not self.demo:
            return {self.rows[2 + 5 * query].id}
        fact = "-".join(self.queries[query].id.split("-")[:2])
        return {row.id for row in self.rows if "-".join(row.id.split("-")[:2]) == fact}

    def fitted(self, name: str, model: AdaptedModel, rows: Examples) -> Run:
        """The run of an adapter with default settings, fitted once."""
        return influence.fit(model, rows, directory=self.work / "fits" / name, seed=SEED)

    @cached_property
    def run(self) -> Run:
        """The run of the bed's own adapter."""
        return self.fitted("right", self.model, self.rows)


@dataclass(frozen=True, eq=False)
class Case:
    """One edit to be made: of a run, which rows, with what; and the rows' positions and the truth's name."""

    task: str
    label: str
    run: Run
    changed: np.ndarray
    request: dict[str, Any] = field(repr=False)
    new: TokenizedExamples | None = field(default=None, repr=False)

    @property
    def ids(self) -> list[str]:
        """The edited rows' ids."""
        return [self.run.train[int(row)].id for row in self.changed]

    @property
    def old(self) -> TokenizedExamples:
        """The edited rows as they are."""
        return self.run.tokens.select(self.changed)

    @property
    def rest(self) -> TokenizedExamples:
        """The untouched rows."""
        return self.run.tokens.select(np.setdiff1d(np.arange(len(self.run.train)), self.changed))

    @property
    def rows_after(self) -> int:
        """How many rows there are to train on afterwards."""
        return len(self.run.train) - (len(self.changed) if self.new is None else 0)


def members(rows: Examples) -> dict[str, np.ndarray]:
    """Positions of every group's rows, groups in the order of their first row; rows without a group are in none."""
    names = dict.fromkeys(row.group for row in rows if row.group is not None)
    return {
        name: np.array([i for i, row in enumerate(rows) if row.group == name]) for name in names
    }


def cases(bed: Bed, tasks: Sequence[str], quick: bool) -> list[Callable[[], Case]]:
    """The cases of the tasks, made when called (some train an adapter first); one of each task when `quick`."""
    found: list[Callable[[], Case]] = []
    groups = members(bed.rows)
    for task in tasks:
        rng = np.random.default_rng([SEED, TASKS.index(task)])
        names = list(groups)
        drawn = [names[i] for i in rng.permutation(len(names))]
        if task == "remove-1":
            sets = [rng.choice(groups[name], 1) for name in drawn[:SINGLES]]
        elif task == "remove-3":
            sets = [np.sort(rng.choice(groups[name], 3, replace=False)) for name in drawn[:TRIPLES]]
        elif task == "remove-group":
            others = [name for name in drawn if name != names[0]]
            sets = [groups[name] for name in (names[0], *others)][:GROUPS]
        else:
            rows = np.array([rng.choice(groups[name]) for name in drawn[:CHANGED]])
            found.append(
                lambda task=task, rows=rows, rng=rng: wrongly_trained(bed, task, rows, rng)
            )
            continue
        found += [
            lambda task=task, rows=rows: removal(bed, task, rows)
            for rows in (sets[:1] if quick else sets)
        ]
    return found


def removal(bed: Bed, task: str, rows: np.ndarray) -> Case:
    """The removal of these rows from the bed's own adapter."""
    ids = [bed.rows[int(row)].id for row in rows]
    group = bed.rows[int(rows[0])].group
    label = f"{group} ({len(ids)} rows)" if task == "remove-group" else ", ".join(ids)
    return Case(task, label, bed.run, rows, {"remove": ids})


def wrongly_trained(bed: Bed, task: str, rows: np.ndarray, rng: np.random.Generator) -> Case:
    """An adapter trained on the rows with wrong completions (`relabel`) or prompts (`correct`), and the edit that puts them right.

    `relabel`: row k of the drawn ones has the completion of row k + 1, all of other groups. `correct`: a drawn row has the
    prompt of a row of another group that is not drawn.
    """
    right, wrong = list(bed.rows), list(bed.rows)
    for place, row in enumerate(rows.tolist()):
        if task == "relabel":
            wrong[row] = replace(
                right[row], completion=right[int(rows[(place + 1) % len(rows)])].completion
            )
        else:
            others = [
                k
                for k, one in enumerate(right)
                if one.group not in (None, right[row].group) and k not in rows
            ]
            wrong[row] = replace(right[row], prompt=right[int(rng.choice(others))].prompt)
    folder = bed.work / "wrong" / task
    folder.mkdir(parents=True, exist_ok=True)
    write(wrong, folder / "train.jsonl")
    planted = influence.read_examples(folder / "train.jsonl")
    recipe = replace(bed.recipe, seed=WRONG_SEED)
    if not (folder / "adapter").exists():
        say(f"{task}: training an adapter with {len(rows)} wrong rows, seed {recipe.seed}")
        with torch.random.fork_rng(devices=[]):
            fresh = fresh_adapter(bed.model, recipe.seed)
            train(fresh, tokenize(planted, bed.model.tokenizer), recipe)
        shutil.rmtree(folder / "adapter.partial", ignore_errors=True)
        fresh.model.save_pretrained(str(folder / "adapter.partial"), save_embedding_layers=False)
        (folder / "adapter.partial").rename(folder / "adapter")
    model = influence.load(str(bed.folder / "base"), str(folder / "adapter"), device="cpu")
    run = bed.fitted(task, model, planted)
    if task == "relabel":
        request: dict[str, Any] = {right[row].id: right[row].completion for row in rows}
    else:
        request = {right[row].id: {"prompt": right[row].prompt} for row in rows}
    label = f"{len(rows)} rows: {', '.join(request)}"
    return Case(task, label, run, rows, {task: request}, bed.run.tokens.select(rows))


def write(rows: Sequence[Example], path: Path) -> None:
    """Write prompt-completion rows as JSON lines."""
    lines = []
    for row in rows:
        named = {"id": row.id, "prompt": row.prompt, "completion": row.completion}
        lines.append(
            json.dumps(
                named | ({} if row.group is None else {"group": row.group}), ensure_ascii=False
            )
            + "\n"
        )
    path.write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Truth:
    """Retrained adapters `[P]`, one per seed, and the CPU and wall seconds that each training took, `[seeds, 2]`."""

    thetas: list[Tensor]
    seconds: list[list[float]]


def retrained(bed: Bed, case: Case, seeds: Sequence[int]) -> Truth:
    """Adapters trained on the rows after the edit: without those that go, or on the right ones; each made once."""
    removed = case.ids if case.new is None else []
    name = "-".join([case.task, *case.ids[:3]]) if removed else "right"
    thetas, seconds = [], []
    for seed in seeds:
        out = bed.work / "retrained" / name / f"seed-{seed}"
        clock = out.with_suffix(".seconds")
        if not (out.exists() and clock.exists()):
            watch, recipe = Watch(), replace(bed.recipe, seed=seed)
            unlearn.retrain(bed.run, removed, out=out, recipe=recipe, overwrite=True)
            clock.write_text(json.dumps(watch.read()) + "\n")
            say(f"{case.task}: retrained with seed {seed} in {watch.read()[0]:.1f} CPU seconds")
        found = json.loads((out / "retrain.json").read_text(encoding="utf-8"))
        if found["removed"] != removed or found["recipe"] != json.loads(
            json.dumps(asdict(replace(bed.recipe, seed=seed)))
        ):
            raise SystemExit(f"{out} was trained for something else: give another --out")
        thetas.append(read_parameters(bed.model, out))
        seconds.append(json.loads(clock.read_text()))
    return Truth(thetas, seconds)


class Watch:
    """CPU seconds of this process, and seconds on the wall, since it was made. Other work on the machine stretches both."""

    def __init__(self) -> None:
        self.begun = time.process_time(), time.monotonic()

    def read(self) -> tuple[float, float]:
        """Both, so far."""
        return time.process_time() - self.begun[0], time.monotonic() - self.begun[1]


# ---- what is measured ----------------------------------------------------------------------------------------


def log_probabilities(model: AdaptedModel, theta: Tensor, tokens: TokenizedExamples) -> Tensor:
    """Log-probabilities `[N, V]` at the completion tokens of all rows, in the order of the batches."""
    found = []
    with model.at(theta), model.evaluating(), torch.no_grad():
        for rows in plan_batches(tokens, unlearners.TOKEN_BUDGET):
            part = supervised_logits(
                model, collate(tokens, rows, pad_id=model.pad_id, device=model.device)
            )
            found.append(part.logits.log_softmax(-1))
    return torch.cat(found)


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """`KL(p || q)` [N, V] in nats, mean over the tokens."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean())


def membership(members: np.ndarray, others: np.ndarray) -> float:
    """Signed AUC: the chance that an edited row has a *lower* loss than a held-out one (ties: a half).

    Above 0.5: still known; 0.5: as if never seen; below: forgotten more than that, which also tells them apart.
    """
    return float(
        (members[:, None] < others[None]).mean() + 0.5 * (members[:, None] == others[None]).mean()
    )


@dataclass(frozen=True, eq=False)
class Ruler:
    """Everything that is measured of an adapter: sets of rows, and the retrained adapters' outputs on some of them."""

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
        asked = [q for q in range(len(bed.queries)) if bed.sources(q) & ids]
        said = (
            f"{len(asked)} queries on edited rows"
            if asked
            else f"all {len(bed.queries)} queries: none is on an edited row"
        )
        queries = bed.queries.select(asked) if asked else bed.queries
        heldout = tokenize(bed.heldout, tokenizer)
        sets = {"old": case.old, "new": case.new, "retain": case.rest, "heldout": heldout}
        sets["paraphrase"] = tokenize(queries, tokenizer)
        compared = {"old": case.old, "new": case.new}
        compared["retain"] = case.rest.select(np.arange(0, len(case.rest), EVERY_REST))
        compared["heldout"] = heldout.select(np.arange(0, len(heldout), EVERY_HELDOUT))
        some = {name: tokens for name, tokens in compared.items() if tokens is not None}
        outputs = [
            {name: log_probabilities(model, theta, tokens) for name, tokens in some.items()}
            for theta in truth.thetas
        ]
        return cls(model, {k: v for k, v in sets.items() if v is not None}, some, outputs, said)

    def measure(self, theta: Tensor, leave_out: int | None = None) -> dict[str, float]:
        """Losses, divergences from the retrained adapters (but one), and membership at some parameters."""
        with self.model.at(theta):
            losses = {name: mean_losses(self.model, tokens) for name, tokens in self.sets.items()}
        found = {name: float(values.mean()) for name, values in losses.items()}
        for name, tokens in self.compared.items():
            own = log_probabilities(self.model, theta, tokens)
            truths = [outputs[name] for k, outputs in enumerate(self.outputs) if k != leave_out]
            each = [divergence(truth, own) for truth in truths]
            found[f"KL {name}"] = float(np.mean(each)) if each else float("nan")
        return found | {"AUC": membership(losses["old"], losses["heldout"])}


# ---- the methods ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Made:
    """What a method gave: parameters `[P]`, row-gradients, CPU and wall seconds; what else is worth noting."""

    theta: Tensor = field(repr=False)
    work: float
    seconds: tuple[float, float]
    note: str = ""


def edits(case: Case) -> dict[str, Callable[[], Made]]:
    """The closed-form edits, first the default one."""

    def make(**options: Any) -> Made:
        watch = Watch()
        found = unlearn.edit(case.run, **case.request, **options)
        report, seconds = found.report, watch.read()
        target = report["losses"]["edited"]["target"]
        note = (
            f"{len(report['steps'])} steps to {target:.2f}: {report['stopped']}"
            if report["steps"]
            else report["stopped"]
        )
        return EditMade(found.theta, report["cost"]["total"], seconds, note, report)

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
        found = method(model, edited, rest, np.random.default_rng(SEED), **options)
        missed = "" if found.reached in (None, True) else ", target not reached"
        return Made(found.theta, found.cost.total, watch.read(), f"{found.steps} steps{missed}")

    return {
        "ascent": lambda: make(unlearners.ascent),
        "ascent + descent": lambda: make(unlearners.ascent_descent),
        "ascent + KL": lambda: make(unlearners.ascent_kl),
        "NGDiff": lambda: make(unlearners.ngdiff),
        WITHIN: lambda: make(unlearners.ngdiff, budget=default.work),
        "sign step, edit's norm": lambda: make(unlearners.sign_step, norm=norm),
        "fine-tuning, edit's time": lambda: make(
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
        "before": ruler.measure(case.run.model.snapshot()) | {"work": 0.0, "seconds": 0.0}
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
    own = [ruler.measure(theta, leave_out=k) for k, theta in enumerate(truth.thetas)]
    floor: dict[str, Any] = {key: float(np.mean([one[key] for one in own])) for key in own[0]}
    floor |= {
        "each seed": own,
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


# ---- tables --------------------------------------------------------------------------------------------------

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
CAPTION = """Losses: nats per completion token. forget: the edited rows' old contents; new: what they were changed to; retain: all
untouched rows. KL: of the method's outputs from the retrained adapters', nats per token, mean over their seeds, on the edited rows,
every 6th untouched and every 10th held-out row. AUC: chance that a forget row has a lower loss than a held-out one (above 0.5: still
known; 0.5: as if never seen; below: over-forgotten). work: row-gradients after the fit (a forward counts 1/3); `/ retr.`: over
retraining's; CPU s: seconds of this process (`results.json` has the wall's, too); both are longer while others work on
the machine, so only an idle one gives times. Brackets: lowest and highest of the repetitions. The last row is
retraining against itself with other seeds."""


def tables(results: Sequence[dict[str, Any]]) -> str:
    """A markdown table for each task, the mean over its cases."""
    parts = []
    for task in dict.fromkeys(result["task"] for result in results):
        own = [result for result in results if result["task"] == task]
        columns = [
            key
            for key in COLUMNS
            if any(key in row for one in own for row in one["methods"].values())
        ]
        lines = [f"### {task}", ""]
        lines += [f"* {result['label']}; paraphr.: {result['paraphrase']}" for result in own]
        lines += ["", "| " + " | ".join(["method", *(COLUMNS[key] for key in columns)]) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for method in dict.fromkeys(name for one in own for name in one["methods"]):
            rows = [one["methods"].get(method, {}) for one in own]
            lines.append("| " + " | ".join([method, *(cell(rows, key) for key in columns)]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, CAPTION]) + "\n"


def cell(rows: Sequence[dict[str, Any]], key: str) -> str:
    """The mean over the cases that have the number, with its range where there are several; failures are counted."""
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
