"""One table of methods x questions with a known answer, on the same adapter in one run.

    python benchmarks/faithfulness.py --testbed DIR [--work DIR] [--kronfluence PYTHON] [--bergson
    PYTHON]
                                      [--astra-steps N] [--tasks lds,retrieval,mislabelled,loo]
                                      [--seeds 3] [--out table.json]

The testbed has a base, an adapter, its rows, queries of which number j paraphrases row 2 + 5 j, and
in truth.npz the query losses of adapters retrained on random halves of the rows. The questions are
those of `tasks.py`:

    lds          do the scores order the retrained halves as their measured losses do
    retrieval    is the row that a query paraphrases ranked first
    mislabelled  on an adapter trained with 20 wrong rows: are they found by how much they oppose
                 the clean queries about their own author; by self-influence, the score of a row for
                 itself
    loo          measured changes of the queries' losses when one of 12 rows is left out of the
                 training

The methods are settings of this project (`OURS`), the rivals of `rivals.py`, and peers (`PEERS`),
each in an environment of its own (`peers/README.md`). All are scores for a query's mean loss; a
peer, which works with summed ones, is divided by the query's number of tokens. Adapters that have
to be trained for the questions, and the peers' scores, are kept in the work folder: a killed run,
or one with more tasks, goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rivals import rival_scores
from tasks import (
    LEFT_OUT,
    Measured,
    Testbed,
    leave_one_out,
    left_out,
    mislabelled,
    opposition,
    plant,
    replayed,
    retrieval,
)

import influence
from analysis.metrics.lds import LDS, LDSDifference, Truth, lds, lds_difference, read_truth
from analysis.tune import tune
from influence.progress import say
from influence.rows import Examples
from influence.tokens import tokenize

HERE = Path(__file__).resolve().parent
TASKS = ("lds", "retrieval", "mislabelled", "loo")


@dataclass(frozen=True)
class Ours:
    """A setting of this project: options of `influence.fit` and of `run.score`.

    With `normalise`, every row's scores are divided by the square root of its self-influence. With
    `replay`, the run looks at the adapters after these epochs of the training repeated with seed
    `replay_seed` (0 is the adapter's own). With `tuned`, `analysis.tune` chooses the setting on one
    half of the truth's subsets; the column `LDS, other half` judges it.
    """

    label: str
    fit: dict[str, Any] = field(default_factory=dict)
    score: dict[str, Any] = field(default_factory=dict)
    normalise: bool = False
    replay: tuple[int, ...] = ()
    replay_seed: int = 0
    tuned: bool = False


@dataclass(frozen=True)
class Peer:
    """A script in `peers/` and its options."""

    label: str
    name: str
    options: tuple[str, ...] = ()


END = {"path": (1.0,)}  #: at the adapter itself, where every peer looks
OURS = (
    Ours("ours: default (EK-FAC, path 0.4,0.8, shared credit)", score={"credit": "shared"}),
    Ours("ours: default path, additive credit"),
    Ours("ours: at 0.6 only", {"path": (0.6,)}),
    Ours(
        "ours: path, function space, mean:0.01", {"geometry": "function"}, {"damping": "mean:0.01"}
    ),
    Ours("ours: path, Adam's metric, mean:0.01", {"geometry": "adam"}, {"damping": "mean:0.01"}),
    Ours("ours: checkpoints of epochs 1, 3, 6, 10", replay=(1, 3, 6, 10)),
    Ours("ours: epochs 1, 2, 3 replayed, other seed", replay=(1, 2, 3), replay_seed=1),
    Ours("ours: chosen by tune on half the subsets", tuned=True),
    Ours("ours: at the end (path 1.0)", END),
    Ours("ours: at the end / sqrt(self-influence)", END, normalise=True),
    Ours("ours: K-FAC at the end", END, {"curvature": "kfac"}),
)
REFERENCE = "kronfluence EK-FAC"  #: whose LDS the others' is compared with
PEERS = (
    Peer(REFERENCE, "kronfluence"),
    Peer("bergson EK-FAC", "bergson"),
)
#: Every method's scores, `[seeds, Q, n]`, or the sentence that says why there are none.
Scored = dict[str, np.ndarray | str]


def our_scores(bed: Testbed, seeds: int, truth: Truth | None) -> Scored:
    """Scores of every setting in `OURS`.

    Settings with the same options of `fit` share one run per seed.

    Without a `truth` nothing can be tuned against it, and those settings are left out.
    """
    settings = [ours for ours in OURS if truth is not None or not ours.tuned]
    model, train, queries = bed.load()
    scores: dict[str, list[np.ndarray]] = {ours.label: [] for ours in settings}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs: list[tuple[dict[str, Any], influence.Run]] = []
            for ours in settings:
                options = dict(ours.fit)
                if ours.replay:
                    options["checkpoints"] = replayed(bed, ours.replay, ours.replay_seed)
                run = next(
                    (run for fitted, run in runs if fitted == options and not ours.tuned), None
                )
                if run is None:
                    run = influence.fit(
                        model,
                        train,
                        directory=Path(folder) / ours.label.replace("/", "-"),
                        seed=seed,
                        **options,
                    )
                    if ours.tuned:
                        tune(run, truth=truth, queries=queries, geometries=("function", "adam"))
                    else:
                        runs.append((options, run))
                # the LDS adds scores of several rows up, which additive ones are made for
                values = run.score(queries, **{"credit": "additive", **ours.score}).values
                if ours.normalise:
                    given = {
                        key: ours.score[key]
                        for key in ("curvature", "damping")
                        if key in ours.score
                    }
                    values = values / np.sqrt(run.self_influence(credit="additive", **given).values)
                scores[ours.label].append(values)
    return {label: np.stack(values) for label, values in scores.items()}


def peer_scores(peer: Peer, python: str | None, bed: Testbed, seeds: int) -> np.ndarray | str:
    """A peer's scores `[seeds, Q, n]`, for mean losses of the queries.

    What went wrong where it gives none.
    """
    if python is None:
        return f"not run: give --{peer.name} PYTHON"
    script = HERE / "peers" / f"{peer.name}_ekfac.py"
    settings = [
        script.read_bytes().decode(),
        *peer.options,
        str(seeds),
        bed.queries.read_text(encoding="utf-8"),
    ]
    key = hashlib.sha256("\0".join(settings).encode()).hexdigest()[:12]
    out = bed.work / f"{peer.name}-{key}.npz"
    if not out.exists():
        say(f"{peer.label}, {seeds} seeds")
        partial = out.with_suffix(".partial.npz")
        command = [python, str(script), "--model", str(bed.base), "--adapter", str(bed.adapter)]
        command += ["--train", str(bed.train), "--queries", str(bed.queries), "--out", str(partial)]
        command += ["--repeat", str(seeds), "--threads", "1", *peer.options]
        try:
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            return f"failed: {error}"
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["(no message)"]
            return f"failed with status {done.returncode}: {lines[-1][:200]}"
        partial.rename(out)
    with np.load(out, allow_pickle=False) as arrays:
        scores = arrays["scores_per_run"]
    model, _, queries = bed.load()
    return scores / tokenize(queries, model.tokenizer).counts[:, None]


def every_score(bed: Testbed, clean: Testbed, args: argparse.Namespace, seeds: int) -> Scored:
    """Scores of every method on one adapter.

    ASTRA, which is slow, gets one seed and the queries of `clean` only.
    """
    pythons = {"kronfluence": args.kronfluence, "bergson": args.bergson}
    model, train, queries = bed.load()
    scored = our_scores(
        bed, seeds, read_truth(args.testbed / "truth.npz") if bed is clean else None
    )
    scored |= {name: values[None] for name, values in rival_scores(model, train, queries).items()}
    for peer in PEERS:
        scored[peer.label] = peer_scores(peer, pythons[peer.name], bed, seeds)
    scored["bergson ASTRA"] = (
        "not run: give --astra-steps N, at about 1.5 CPU seconds per query and step"
    )
    if args.astra_steps:
        astra = Peer("bergson ASTRA", "bergson", ("--astra-steps", str(args.astra_steps)))
        scored[astra.label] = peer_scores(
            astra, args.bergson, replace(bed, queries=clean.queries), 1
        )
    return scored


def summary(result: LDS | LDSDifference) -> Measured:
    """The mean and its interval."""
    return Measured(result.mean, result.interval.low, result.interval.high)


def ask(
    scored: Scored, question: Callable[[np.ndarray], dict[str, Measured]], table: dict[str, Any]
) -> None:
    """Put one question to every method's first seed. The answers go into `table[method]`."""
    for method, scores in scored.items():
        answers = table.setdefault(method, {})
        if isinstance(scores, str):
            answers["note"] = scores
        else:
            answers |= {name: asdict(value) for name, value in question(scores[0]).items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every answer, `[method][column]` = value, low, high.

    And `note` where a method gave no scores.
    """
    bed = Testbed.open(args.testbed, args.work)
    table: dict[str, Any] = {}
    _, train, queries = bed.load()
    paraphrased = 2 + 5 * np.arange(len(queries))
    if set(args.tasks) - {"mislabelled"}:
        scored = every_score(bed, bed, args, args.seeds if "lds" in args.tasks else 1)
        if "lds" in args.tasks:
            ask_lds(scored, args.testbed / "truth.npz", table)
        if "retrieval" in args.tasks:
            ask(scored, lambda scores: retrieval(scores, paraphrased), table)
        if "loo" in args.tasks:
            changes = left_out(bed, paraphrased, args.left_out)
            ask(scored, lambda scores: leave_one_out(scores, changes), table)
    if "mislabelled" in args.tasks:
        planted, wrong = plant(bed, paraphrased)
        scored = every_score(planted, bed, args, 1)
        ask(scored, lambda scores: find_wrong(scores, wrong, train, queries), table)
    return table


def ask_lds(scored: Scored, truth_file: Path, table: dict[str, Any]) -> None:
    """LDS of the first seed and of each, and its gain over the reference's."""
    truth = read_truth(truth_file)
    reference = scored[REFERENCE]

    def question(scores: np.ndarray) -> dict[str, Measured]:
        other = np.random.default_rng(0).permutation(len(truth.masks))[
            len(truth.masks) // 2 :
        ]  # as tune halves them
        answers = {
            "lds": summary(lds(scores, truth.masks, truth.query_loss)),
            "lds half": summary(lds(scores, truth.masks[other], truth.query_loss[other])),
        }
        if not isinstance(reference, str) and not np.shares_memory(scores, reference):
            answers["lds gain"] = summary(
                lds_difference(scores, reference[0], truth.masks, truth.query_loss)
            )
        return answers

    ask(scored, question, table)
    for method, scores in scored.items():
        if not isinstance(scores, str):
            each = [
                lds(values, truth.masks, truth.query_loss, resamples=1).mean for values in scores
            ]
            table[method]["lds of each seed"] = each


def find_wrong(
    scores: np.ndarray, wrong: np.ndarray, train: Examples, queries: Examples
) -> dict[str, Measured]:
    """Wrong rows found by opposition to their author's queries, and by self-influence.

    The latter where it was computed.
    """
    groups, query_groups = ([row.group for row in rows] for rows in (train, queries))
    by = {"opposition": opposition(scores[: len(queries)], groups, query_groups)}
    if len(scores) > len(queries):
        by["self"] = np.diagonal(scores[len(queries) :])
    return {
        f"{key} {name}": value
        for key, values in by.items()
        for name, value in mislabelled(values, wrong).items()
    }


COLUMNS = {
    "lds": "LDS",
    "lds gain": f"- {REFERENCE}",
    "lds half": "LDS, other half",
    "recall@1": "recall@1",
    "mrr": "mean rec. rank",
    "opposition ap": "wrong: AP",
    "opposition auc": "wrong: AUC",
    "self ap": "by self: AP",
    "self auc": "by self: AUC",
    "spearman": "LOO Spearman",
    "pearson": "LOO Pearson",
}
CAPTION = """
Brackets: 95 % bootstrap intervals, over the retrained halves (LDS and its paired difference), the
queries (retrieval), the rows (wrong), the rows left out (LOO). First seed of the sampled labels. By
chance: LDS and LOO 0, recall@1 0.005, mean reciprocal rank 0.03, AP about 0.12, AUC 0.5. `wrong`:
mislabelled rows found by how much they oppose the clean queries about their author; `by self`: by a
row's score for itself. A dash: not asked or undefined."""


def cell(answers: dict[str, Any], column: str) -> str:
    """One number with its interval, or a dash."""
    answer = answers.get(column)
    if answer is None or np.isnan(answer["value"]):
        return "-"
    sign = "+" if column == "lds gain" else ""
    return f"{answer['value']:{sign}.3f} [{answer['low']:.2f}, {answer['high']:.2f}]"


def render(table: dict[str, Any]) -> str:
    """The table as plain text."""
    columns = [column for column in COLUMNS if any(column in answers for answers in table.values())]
    lines = [["", *(COLUMNS[column] for column in columns), "LDS of each seed"]]
    for method, answers in table.items():
        seeds = " ".join(f"{value:.3f}" for value in answers.get("lds of each seed", []))
        lines.append([method, *(cell(answers, column) for column in columns), seeds])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    notes = [
        f"{method}: {answers['note']}" for method, answers in table.items() if "note" in answers
    ]
    return "\n".join([*text, CAPTION, *notes])


def main() -> None:
    """Ask every method every question and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("faithfulness-work"),
        help="kept adapters and peers' scores",
    )
    parser.add_argument("--kronfluence", help="python of an environment with kronfluence")
    parser.add_argument("--bergson", help="python of an environment with bergson")
    parser.add_argument(
        "--astra-steps",
        type=int,
        default=0,
        help="steps per query of bergson's ASTRA (0: leave it out)",
    )
    parser.add_argument(
        "--tasks", type=lambda text: text.split(","), default=list(TASKS), help=", ".join(TASKS)
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds of the sampled labels, for the LDS"
    )
    parser.add_argument(
        "--left-out", type=int, default=LEFT_OUT, help="rows left out, one retraining each"
    )
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    if unknown := sorted(set(args.tasks) - set(TASKS)):
        parser.error(f"--tasks {','.join(unknown)} was given; expected some of {','.join(TASKS)}")
    table = measure(args)
    if args.out:
        args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(render(table))


if __name__ == "__main__":
    main()
