"""What a model that never saw some rows would lose, and edits towards it, beside retraining.

    python benchmarks/unseen.py --testbed DIR --out DIR [--worlds tofu-tiny,style,mild,paraphrases]

Four worlds on the testbed's base and rows: its own adapter; `style`, a phrase around every
completion; `mild`, three epochs at 2e-3; `paraphrases`, an adapter of rows and queries together, so
that every removed row's other wording stays. In each, sets of rows are left out: a whole author,
half of one, two rows, one row of every author, every tenth row, rows whose paraphrases stay. The
truth is one adapter retrained without them, which is kept under `--out`: a second call only edits.
The constants of `unlearn/retraining/local.py` were found on the first three worlds; no set of the
fourth was looked at before. Results: `unseen.json`, and a table on standard output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edits import divergence, log_probabilities
from torch import Tensor

import influence
import unlearn
from influence.adapter import AdaptedModel
from influence.loss import mean_losses
from influence.path import read_parameters
from influence.rows import Examples
from influence.run import Run
from influence.tokens import TokenizedExamples
from unlearn.retraining.recipe import Recipe

#: Rows that are left out, by name.
SETS = {
    "an author": range(20),
    "another author": range(60, 80),
    "ten of an author, every second": range(0, 20, 2),
    "ten of an author, the first": range(10),
    "two of an author": (3, 8),
    "one of each author": range(5, 200, 20),
    "every tenth row": range(0, 200, 10),
    "eight whose paraphrases stay": range(2, 40, 5),
}
#: The sets of each world, and its recipe.
WORLDS: dict[str, tuple[Sequence[str], Recipe]] = {
    "tofu-tiny": (list(SETS)[:1] + list(SETS)[2:3] + list(SETS)[4:7], Recipe()),
    "style": (list(SETS)[:1] + list(SETS)[3:5] + list(SETS)[6:7], Recipe()),
    "mild": (list(SETS)[:2] + list(SETS)[3:5] + list(SETS)[6:7], Recipe(lr=2e-3, epochs=3)),
    "paraphrases": (list(SETS)[7:], Recipe()),
}


def styled(rows: Examples) -> Examples:
    """The rows with one phrase around every completion."""
    before = " Certainly! Here is what I can tell you about this question:"
    after = " I hope that this answer helps you."
    return Examples(replace(row, completion=f"{before}{row.completion}{after}") for row in rows)


def run_of(world: str, testbed: Path, out: Path) -> Run:
    """The fitted run of a world."""
    rows = influence.read_examples(testbed / "train.jsonl")
    adapter = testbed / "adapter"
    if world in ("style", "mild"):
        adapter = testbed / "regimes" / world / "adapter"
    if world == "style":
        rows = styled(rows)
    folder = out / world
    if world == "paraphrases":
        rows = Examples([*rows, *influence.read_examples(testbed / "query.jsonl")])
        adapter = folder / "adapter"
        if not adapter.exists():
            # the rows alone decide what is trained, so any adapter of the shape may start it
            model = influence.load(testbed / "base", testbed / "adapter")
            start = influence.fit(model, rows, path=(1.0,), directory=folder / "start")
            unlearn.retrain(start, out=adapter, recipe=WORLDS[world][1])
    if (folder / "run" / "manifest.json").exists():
        return Run.open(folder / "run", train=rows)
    model = influence.load(testbed / "base", adapter)
    return influence.fit(model, rows, directory=folder / "run")


def truth(run: Run, ids: Sequence[str], recipe: Recipe, place: Path) -> Tensor:
    """The parameters of an adapter retrained without some rows."""
    if not place.exists():
        unlearn.retrain(run, ids, out=place, recipe=recipe)
    return read_parameters(run.model, place)


def mean_loss(model: AdaptedModel, theta: Tensor, tokens: TokenizedExamples) -> float:
    """Mean loss of some rows, nats per token."""
    with model.at(theta):
        return float(mean_losses(model, tokens).mean())


def measured(run: Run, name: str, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """One set: what is expected, what retraining gives, and what the edit does."""
    model, rows = run.model, np.array(SETS[name])
    ids = [run.train.ids[row] for row in rows]
    removed = run.tokens.select(rows)
    others = run.tokens.select(np.setdiff1d(np.arange(len(run.tokens)), rows))
    start = model.snapshot()
    retrained = truth(run, ids, recipe, folder / name.replace(" ", "-"))
    edit = unlearn.remove(run, ids, recipe=recipe, start="original", max_damage=9.0)
    found, edited = edit.record.expected, start + edit.delta
    assert found is not None
    places = {"before": start, "edited": edited, "retrained": retrained}
    outputs = {place: log_probabilities(model, theta, removed) for place, theta in places.items()}
    return {
        "set": name,
        "rows": len(rows),
        "base": float(np.mean([row.base or 0.0 for row in edit.record.rows])),
        "expected": [found.loss, found.low, found.high],
        "faithfulness": found.faithfulness,
        "forget": {place: mean_loss(model, theta, removed) for place, theta in places.items()},
        "retained": {place: mean_loss(model, theta, others) for place, theta in places.items()},
        "KL": {
            place: divergence(outputs["retrained"], outputs[place])
            for place in ("before", "edited")
        },
        "move": edit.record.delta.relative,
        "steps": len(edit.record.steps or ()),
        "work": [edit.record.cost.total, found.row_gradients, edit.record.cost.retraining],
    }


def table(world: str, entries: Sequence[dict[str, Any]]) -> str:
    """A world's sets as a table."""
    lines = [
        f"**{world}**",
        "",
        "| removed | before | expected | retrained | edited | KL before, edited | retained |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        loss, low, high = entry["expected"]
        forget, kept, kl = entry["forget"], entry["retained"], entry["KL"]
        error = loss / forget["retrained"] - 1
        change = kept["edited"] / kept["before"] - 1
        lines.append(
            f"| {entry['set']} | {forget['before']:.2f} | {loss:.2f} [{low:.2f}, {high:.2f}] | "
            f"{forget['retrained']:.2f} ({error:+.0%}) | {forget['edited']:.2f} | "
            f"{kl['before']:.2f}, {kl['edited']:.2f} | {change:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the worlds that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worlds", default=",".join(WORLDS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, list[dict[str, Any]]] = {}
    for world in options.worlds.split(","):
        sets, recipe = WORLDS[world]
        run = run_of(world, options.testbed, options.out)
        results[world] = [measured(run, name, recipe, options.out / world) for name in sets]
        print(table(world, results[world]), flush=True)
        (options.out / "unseen.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
