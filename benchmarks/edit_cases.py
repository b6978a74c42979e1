"""The cases of `edits.py`: what is edited on a bed, and adapters retrained on the rows after.

A bed is the folder of a testbed or of a demo (`analysis demo`). Rows are drawn by `numpy`'s default
generator from `SEED` and the task, never by hand. What is trained is kept in the work folder.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import influence
import unlearn
from influence.adapter import AdaptedModel
from influence.path import read_parameters
from influence.progress import say
from influence.rows import Example, Examples
from influence.run import Run
from influence.store import write_json
from influence.tokens import TokenizedExamples, tokenize
from unlearn.retraining.recipe import Recipe
from unlearn.retraining.retrain import fresh_adapter, train

TASKS = ("remove-1", "remove-3", "remove-group", "relabel", "correct")

#: Repetitions of the removals of one row, of three, of a group; rows that are changed. A choice.
SINGLES, TRIPLES, GROUPS, CHANGED = 4, 2, 2, 10

#: Seed of the adapters that are trained on wrong rows, which no retrained adapter has; seed of the
#: draw of rows, of the fit, and of the rivals' draws.
WRONG_SEED, SEED = 100, 0


@dataclass(frozen=True)
class Bed:
    """A base, an adapter, its rows, paraphrases of some, rows it never saw, and a work folder."""

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
        """`recipe.json` of the adapter or the folder, else the defaults.

        Both kinds of bed were trained by the defaults.
        """
        places = [self.folder / "adapter" / "recipe.json", self.folder / "recipe.json"]
        return next((Recipe.read(path) for path in places if path.is_file()), Recipe())

    def sources(self, query: int) -> set[str]:
        """Ids of the rows that a query paraphrases.

        Row 2 + 5 j of the testbed for query j; in the demo those on the same fact.
        """
        if not self.demo:
            return {self.rows[2 + 5 * query].id}
        fact = "-".join(self.queries[query].id.split("-")[:2])
        return {row.id for row in self.rows if "-".join(row.id.split("-")[:2]) == fact}

    def fitted(self, name: str, model: AdaptedModel, rows: Examples) -> Run:
        """The run of an adapter with default settings and its recipe, fitted once."""
        run = influence.fit(model, rows, directory=self.work / "fits" / name, seed=SEED)
        write_json(run.directory / "recipe.json", self.recipe.as_json())
        return run

    @cached_property
    def run(self) -> Run:
        """The run of the bed's own adapter."""
        return self.fitted("right", self.model, self.rows)


@dataclass(frozen=True, eq=False)
class Case:
    """One edit to be made: of which run, which rows (`changed`, positions), with what request."""

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
    """Positions of every group's rows, groups in the order of their first row.

    Rows without a group are in none.
    """
    names = dict.fromkeys(row.group for row in rows if row.group is not None)
    return {
        name: np.array([i for i, row in enumerate(rows) if row.group == name]) for name in names
    }


def cases(bed: Bed, tasks: Sequence[str], quick: bool) -> list[Callable[[], Case]]:
    """The cases of the tasks, made when called, because some train an adapter first.

    One of each task when `quick`.
    """
    makers: list[Callable[[], Case]] = []
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
            makers.append(
                lambda task=task, rows=rows, rng=rng: wrongly_trained(bed, task, rows, rng)
            )
            continue
        makers += [
            lambda task=task, rows=rows: removal(bed, task, rows)
            for rows in (sets[:1] if quick else sets)
        ]
    return makers


def removal(bed: Bed, task: str, rows: np.ndarray) -> Case:
    """The removal of these rows from the bed's own adapter."""
    ids = [bed.rows[int(row)].id for row in rows]
    group = bed.rows[int(rows[0])].group
    label = f"{group} ({len(ids)} rows)" if task == "remove-group" else ", ".join(ids)
    return Case(task, label, bed.run, rows, {"remove": ids})


def wrongly_trained(bed: Bed, task: str, rows: np.ndarray, rng: np.random.Generator) -> Case:
    """An adapter trained on some wrong rows, and the edit that puts them right.

    `relabel`: row k of the drawn ones has the completion of row k + 1, all of other groups.
    `correct`: a drawn row has the prompt of a row of another group that is not drawn.
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
                for k, other in enumerate(right)
                if other.group not in (None, right[row].group) and k not in rows
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
    """Retrained adapters `[P]`, one per seed, and CPU and wall seconds of each, `[seeds, 2]`."""

    thetas: list[Tensor]
    seconds: list[list[float]]


def retrained(bed: Bed, case: Case, seeds: Sequence[int]) -> Truth:
    """Adapters trained on the rows after the edit, each made once.

    These are the rows without those that go, or the right ones.
    """
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
        record = json.loads((out / "retrain.json").read_text(encoding="utf-8"))
        recipe = json.loads(json.dumps(replace(bed.recipe, seed=seed).as_json()))
        if record["removed"] != removed or record["recipe"] != recipe:
            raise SystemExit(f"{out} was trained for something else: give another --out")
        thetas.append(read_parameters(bed.model, out))
        seconds.append(json.loads(clock.read_text()))
    return Truth(thetas, seconds)


class Watch:
    """CPU seconds of this process, and seconds on the wall, since it was made.

    Other work on the machine stretches both.
    """

    def __init__(self) -> None:
        self.begun = time.process_time(), time.monotonic()

    def read(self) -> tuple[float, float]:
        """Both, so far."""
        return time.process_time() - self.begun[0], time.monotonic() - self.begun[1]
