"""What a model that never saw some rows would lose, and edits towards it, beside retraining.

    python benchmarks/unseen.py --testbed DIR --out DIR [--tofu DIR]
        [--worlds tofu-tiny,style,mild,paraphrases,demo,large]

Five worlds have 191 to 240 rows. Four are on the testbed's base and rows: its own adapter; `style`,
a phrase around every completion; `mild`, three epochs at 2e-3; `paraphrases`, an adapter of rows and
queries together, so that every removed row's other wording stays. The fifth, `demo`, is the demo's
world with another seed: other people, another base and adapter, three wordings of every fact. The
sixth, `large`, has 2,000 rows, with which a tenth of retraining can be aimed at: the testbed's
training and held-out rows, which its base never saw, and 1,600 rows of `--tofu` (its `full.json`)
that its base was trained on, for five epochs; only rows of the first kind are removed.

In each, sets of rows are left out: a whole author, half of one, two rows, one row of every author,
every tenth row, rows whose paraphrases or copies stay. The truth is one adapter retrained without
them, which is kept under `--out`: a second call only edits. The constants of
`unlearn/retraining/local.py` were found on the first three worlds; no set of the others was looked
at before. Results: `unseen.json`, and on standard output a table and, of all sets that the file
has, how large errors are and how many intervals hold the truth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edits import divergence, log_probabilities
from torch import Tensor

import influence
import unlearn
from analysis.demo.world import demo_world
from influence.adapter import AdaptedModel
from influence.loss import mean_losses
from influence.path import read_parameters
from influence.rows import Example, Examples
from influence.run import Run
from influence.tokens import TokenizedExamples
from unlearn.retraining.recipe import Recipe

#: Rows of the testbed that are left out, by name.
SETS = {
    "an author": range(20),
    "another author": range(60, 80),
    "ten of an author, every second": range(0, 20, 2),
    "ten of an author, the first": range(10),
    "two of an author": (3, 8),
    "two of another author": (103, 108),
    "ten of a third author, every second": range(140, 160, 2),
    "one of each author": range(5, 200, 20),
    "every tenth row": range(0, 200, 10),
    "eight whose paraphrases stay": range(2, 40, 5),
}
#: Draws the demo's people, its base and its adapter; 0 is what `analysis demo` shows.
DEMO_SEED = 1
#: The recipe of each world.
WORLDS = {
    "tofu-tiny": Recipe(),
    "style": Recipe(),
    "mild": Recipe(lr=2e-3, epochs=3),
    "paraphrases": Recipe(),
    "demo": Recipe(seed=DEMO_SEED),
    "large": Recipe(epochs=5),  # 10,000 row gradients a training
}
#: The sets of each world on the testbed.
SETS_OF = {
    "tofu-tiny": (
        "an author",
        "ten of an author, every second",
        "two of an author",
        "one of each author",
        "every tenth row",
    ),
    "style": (
        "an author",
        "ten of an author, the first",
        "two of an author",
        "every tenth row",
    ),
    "mild": (
        "an author",
        "another author",
        "ten of an author, the first",
        "two of an author",
        "every tenth row",
    ),
    "paraphrases": ("eight whose paraphrases stay",),
    "large": (
        "an author",
        "ten of an author, every second",
        "two of an author",
        "two of another author",
        "ten of a third author, every second",
    ),
}
#: Rows of the large world that are neither the testbed's training nor its held-out rows.
MORE_ROWS = 1600


def sets_of(world: str, rows: Examples) -> dict[str, np.ndarray]:
    """Positions of the rows that are left out of a world, by the set's name."""
    if world != "demo":
        return {name: np.array(SETS[name]) for name in SETS_OF[world]}
    # The demo's rows are shuffled, so a person's are taken in the order of their ids, which is that
    # of the facts and then of the wordings. Copies count to the person.
    people: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row.id):
        if row.group is not None:
            people.setdefault(row.group, []).append(row.id)
    ids = list(people.values())
    copied = [id.removesuffix("-copy") for id in rows.ids if id.endswith("-copy")]
    chosen = {
        "a person": ids[0],
        "half of a person, every second": ids[0][::2],
        "two of a person": [ids[0][place] for place in (3, 8)],
        "one of each of ten people": [ids[k][k] for k in range(10)],
        "every tenth row": rows.ids[::10],
        "five whose copies stay": copied,
    }
    return {name: np.array([rows.index(id) for id in each]) for name, each in chosen.items()}


def styled(rows: Examples) -> Examples:
    """The rows with one phrase around every completion."""
    before = " Certainly! Here is what I can tell you about this question:"
    after = " I hope that this answer helps you."
    return Examples(replace(row, completion=f"{before}{row.completion}{after}") for row in rows)


def large_rows(testbed: Path, tofu: Path) -> Examples:
    """The testbed's training and held-out rows, and the first `MORE_ROWS` of TOFU in their form.

    The testbed has its last 400 rows, so none comes twice.
    """
    read = [influence.read_examples(testbed / f"{name}.jsonl") for name in ("train", "heldout")]
    lines = (tofu / "full.json").read_text(encoding="utf-8").splitlines()[:MORE_ROWS]
    more = (
        Example(
            id=f"tofu-{k:04}", prompt=f"Q: {row['question']}\nA:", completion=f" {row['answer']}"
        )
        for k, row in enumerate(map(json.loads, lines))
    )
    return Examples([*read[0], *read[1], *more])


def rows_and_adapter(world: str, options: argparse.Namespace) -> tuple[Examples, Path, Path]:
    """A world's training rows, its base and its adapter, trained if it is not there."""
    testbed, folder = options.testbed, options.out / world
    if world == "demo":
        demo = demo_world(folder, DEMO_SEED)
        return demo.rows("train"), folder / "base", folder / "adapter"
    rows, base = influence.read_examples(testbed / "train.jsonl"), testbed / "base"
    if world == "style":
        rows = styled(rows)
    if world in ("style", "mild"):
        return rows, base, testbed / "regimes" / world / "adapter"
    if world == "tofu-tiny":
        return rows, base, testbed / "adapter"
    if world == "paraphrases":
        rows = Examples([*rows, *influence.read_examples(testbed / "query.jsonl")])
    else:
        rows = large_rows(testbed, options.tofu)
    adapter = folder / "adapter"
    if not adapter.exists():
        # the rows alone decide what is trained, so any adapter of the shape may start it
        model = influence.load(base, testbed / "adapter")
        start = influence.fit(model, rows, path=(1.0,), directory=folder / "start")
        unlearn.retrain(start, out=adapter, recipe=WORLDS[world])
    return rows, base, adapter


def run_of(world: str, options: argparse.Namespace) -> Run:
    """The fitted run of a world."""
    rows, base, adapter = rows_and_adapter(world, options)
    directory = options.out / world / "run"
    if (directory / "manifest.json").exists():
        return Run.open(directory, train=rows)
    return influence.fit(influence.load(base, adapter), rows, directory=directory)


def truth(run: Run, ids: Sequence[str], recipe: Recipe, place: Path) -> Tensor:
    """The parameters of an adapter retrained without some rows."""
    if not place.exists():
        unlearn.retrain(run, ids, out=place, recipe=recipe)
    return read_parameters(run.model, place)


def mean_loss(model: AdaptedModel, theta: Tensor, tokens: TokenizedExamples) -> float:
    """Mean loss of some rows, nats per token."""
    with model.at(theta):
        return float(mean_losses(model, tokens).mean())


def measured(run: Run, name: str, rows: np.ndarray, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """One set: what is expected, what retraining gives, and what the edit does."""
    model = run.model
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


def error_of(entry: Mapping[str, Any]) -> float:
    """The expected loss over the retrained model's, less 1."""
    return entry["expected"][0] / entry["forget"]["retrained"] - 1


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The worlds' sets as a table; work is over retraining's, in brackets that for the expectation."""
    lines = [
        "| world | removed | before | expected | retrained | edited | KL before, edited | retained "
        "| work |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for world, entries in results.items():
        for entry in entries:
            loss, low, high = entry["expected"]
            forget, kept, kl = entry["forget"], entry["retained"], entry["KL"]
            change = kept["edited"] / kept["before"] - 1
            total, expecting, retraining = entry["work"]
            lines.append(
                f"| {f'{world} ' if entry is entries[0] else ''}| {entry['set']} | "
                f"{forget['before']:.2f} | {loss:.2f} [{low:.2f}, {high:.2f}] | "
                f"{forget['retrained']:.2f} ({error_of(entry):+.0%}) | {forget['edited']:.2f} | "
                f"{digits(kl['before'])}, {digits(kl['edited'])} | {change:+.1%} | "
                f"{total / retraining:.2f} ({expecting / retraining:.2f}) |"
            )
    return "\n".join(lines)


def digits(value: float) -> str:
    """Two digits after the point, three of a small number."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def summary(entries: Sequence[Mapping[str, Any]]) -> str:
    """Errors of the expected loss over some sets, and how many intervals hold the truth."""
    errors = np.abs([error_of(entry) for entry in entries])
    held = [
        low <= entry["forget"]["retrained"] <= high
        for entry in entries
        for _, low, high in [entry["expected"]]
    ]
    nearer = [entry["KL"]["edited"] < entry["KL"]["before"] for entry in entries]
    return (
        f"{len(errors)} sets: error {np.median(errors):.1%} (median), {errors.max():.1%} (largest); "
        f"{sum(held)} intervals hold the truth; {sum(nearer)} edits are nearer to it than before"
    )


def main() -> None:
    """Measure the worlds that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tofu", type=Path, help="folder of TOFU's full.json, for `large`")
    parser.add_argument("--worlds", default=",".join(WORLDS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    worlds = options.worlds.split(",")
    if "large" in worlds and options.tofu is None:
        parser.error("the world `large` has rows of TOFU: give --tofu, or --worlds without it")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "unseen.json"
    results: dict[str, list[dict[str, Any]]] = json.loads(kept.read_text()) if kept.exists() else {}
    for world in worlds:
        recipe, folder = WORLDS[world], options.out / world
        run = run_of(world, options)
        results[world] = []
        for name, rows in sets_of(world, run.train).items():
            results[world].append(measured(run, name, rows, recipe, folder))
            kept.write_text(json.dumps(results, indent=1))
        print(f"{world}: {summary(results[world])}", flush=True)
    print(table(results))
    print("all:", summary([entry for entries in results.values() for entry in entries]))


if __name__ == "__main__":
    main()
