"""A real pretrained model with a LoRA adapter and ground truth: what this project promises, on it.

    python benchmarks/real.py (speed | lds | retrieval | removal | difficulty) --out DIR
        [--bed DIR] [--base DIR] [--kronfluence PYTHON] [--bergson PYTHON] [--threads N]
        [--retrained DIR] [--rows N] [--only NAMES]

Each part can be run alone, prints what it found and writes it to DIR/PART.json:

    speed        fit + score: seconds, CPU seconds and peak memory, beside the bare forward and
                 backward of the same rows, kronfluence and bergson (`--only` names some of them)
    lds          do the scores order adapters retrained on random halves as their losses do
    retrieval    is the row that a query paraphrases, or its author, ranked first
    removal      one author's rows removed by `unlearn remove` and by NGDiff, beside retraining
    difficulty   forecast steps and damage of ascent on single rows, beside the measured ones

The folder --bed has `adapter/`, `train.jsonl`, `query.jsonl`, `heldout.jsonl` and `truth.npz`;
--base is the base model. Without them the variables LORA_INFLUENCE_REAL and
LORA_INFLUENCE_REAL_BASE name both. Fits, scores and what is trained are kept in DIR: a killed call,
or another part, goes on where it was. Peers need environments of their own (`peers/README.md`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from difficulty import rho
from edits import divergence, log_probabilities
from real_bed import RECIPE, RealBed, kept_scores, methods, peer_arrays
from tasks import measured
from torch import Tensor

import influence
import unlearn
from analysis.metrics.lds import Truth, lds, lds_difference
from analysis.stats import bootstrap_interval
from influence.batches import collate, plan_batches
from influence.credit import credited
from influence.loss import mean_losses
from influence.measurements import MeanLoss
from influence.path import read_parameters
from influence.progress import say
from influence.scores import raw_parts
from influence.tokens import TokenizedExamples
from unlearn.difficulty import Protocol, measure, predict

#: Every method's LDS is compared with these ones'.
REFERENCES = tuple(
    f"{peer}, at {scale}" for scale in ("1.0", "0.6") for peer in ("kronfluence", "bergson")
)
#: The author that is removed.
REMOVED = "author-0"
#: Outputs are compared on every so-manyth of the untouched and of the held-out rows.
EVERY = 4
#: Rows whose answers are shown: two removed, two others.
SHOWN = (2, 7, 22, 47)

# ---- speed ---------------------------------------------------------------------------------------


class Watch:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.begun = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Both, so far."""
        wall, cpu = self.begun
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def bare(bed: RealBed) -> dict[str, float]:
    """Seconds of one forward and backward of every training and query row by PEFT's own model and
    loss, in batches as ours: what no method can do without.
    """
    model = bed.model
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    sets, watch = [bed.tokens("train"), bed.tokens("query")], Watch()
    for tokens in sets:
        for rows in plan_batches(tokens, 1024):
            batch = collate(tokens, rows)
            labels = torch.where(batch.supervised, batch.input_ids, -100)
            loss = model.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
            ).loss
            torch.autograd.grad(loss, model.parameters)
    found = watch.read()
    for parameter in model.parameters:
        parameter.requires_grad_(False)
    return found


def peak() -> int:
    """The most memory that this process has held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(bed: RealBed, name: str) -> dict[str, Any]:
    """Seconds and memory of one of our contenders, in a fresh process.

    The bare work of the same process comes last, where it does not enter the peak.
    """
    _ = bed.model
    before = peak()
    if name == "bare":
        return {"bare": bare(bed), "peak": peak(), "before": before}
    path = (1.0,) if name == "ours, one point" else None
    with tempfile.TemporaryDirectory(dir=bed.work) as folder:
        watch = Watch()
        run = influence.fit(bed.model, bed.rows("train"), directory=Path(folder) / "run", path=path)
        fitted = watch.read()
        again, queries = Watch(), bed.rows("query")
        run.score(queries, out=Path(folder) / "scores.h5")
        scored, highest = again.read(), peak()
        size = sum(file.stat().st_size for file in (Path(folder) / "run").iterdir())
    found = {"fit": fitted, "score": scored, "peak": highest, "before": before, "disk": size}
    return found | {"bare": bare(bed)}


def peer_times(bed: RealBed, name: str, python: str, threads: int) -> dict[str, Any]:
    """The same of a peer."""
    out = bed.work / f"speed-{name}-{threads}-{os.getpid()}.npz"
    options = ("--threads", str(threads))
    arrays = peer_arrays(bed, name, python, bed.folder / "adapter", out, *options)
    out.unlink()
    found: dict[str, Any] = {
        part: {
            "wall": float(arrays[f"{part}_seconds"][0]),
            "cpu": float(arrays[f"{part}_cpu_seconds"][0]),
        }
        for part in ("fit", "score")
    }
    memory = {"peak": "peak_rss_bytes", "before": "rss_before_bytes"}
    return found | {key: int(arrays[array]) for key, array in memory.items()}


def speed(bed: RealBed, args: argparse.Namespace) -> dict[str, Any]:
    """Every contender, one after the other, each in a process of its own."""
    found: dict[str, Any] = {"threads": args.threads}
    contenders = ["bare", "ours, one point", "ours", "kronfluence", "bergson"]
    chosen = args.only.split(";") if args.only else contenders
    for name in chosen:
        if name in ("kronfluence", "bergson"):
            if python := getattr(args, name):
                found[name] = peer_times(bed, name, python, args.threads)
        else:
            command = [sys.executable, __file__, "worker", "--only", name, "--out", str(args.out)]
            command += ["--bed", str(bed.folder), "--base", str(bed.base)]
            command += ["--threads", str(args.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
        say(f"{name}: {json.dumps(found.get(name))}")
    ratios(found)
    return found


def ratios(found: dict[str, Any]) -> None:
    """Add to every contender its fit + score over the bare work: of its own process, or of the
    process of its own that the bare work had.
    """
    for times in found.values():
        if not isinstance(times, dict) or "fit" not in times:
            continue
        floor = times.get("bare") or found.get("bare", {}).get("bare")
        for clock in ("wall", "cpu") if floor else ():
            total = times["fit"][clock] + times["score"][clock]
            times[f"{clock} over bare"] = total / floor[clock]


# ---- scores against retraining, and against paraphrases ------------------------------------------


def pythons(args: argparse.Namespace) -> dict[str, str | None]:
    """The interpreters of the peers' environments."""
    return {"kronfluence": args.kronfluence, "bergson": args.bergson}


def faithfulness(scores: np.ndarray, truth: Truth) -> dict[str, Any]:
    """LDS with its interval over the halves and over the queries, and the size of the scores.

    Size: mean absolute predicted over measured deviation of a query's loss from its mean over the
    halves.
    """
    result = lds(scores, truth.masks, truth.query_loss)
    of_queries = result.per_query
    over = bootstrap_interval(lambda rows: float(np.nanmean(of_queries[rows])), len(of_queries))
    predicted, real = -truth.masks.astype(float) @ scores.T.astype(float), truth.query_loss
    deviations = [np.abs(values - values.mean(0)).mean() for values in (predicted, real)]
    return {
        "lds": result.mean,
        "over halves": [result.interval.low, result.interval.high],
        "over queries": [over.low, over.high],
        "size": float(deviations[0] / deviations[1]),
    }


def lds_part(bed: RealBed, args: argparse.Namespace) -> dict[str, Any]:
    """LDS of every method, and its gain over the references' where these are there; of ours also the
    size of what is predicted for each half together.
    """
    truth, every = bed.truth, methods(bed, pythons(args))
    scores = {name: kept_scores(bed, name, make) for name, make in every.items()}
    found: dict[str, Any] = {name: faithfulness(values, truth) for name, values in scores.items()}
    for reference in REFERENCES:
        for name in found if reference in scores else ():
            gain = lds_difference(scores[name], scores[reference], truth.masks, truth.query_loss)
            ends = [gain.mean, gain.interval.low, gain.interval.high]
            found[name][f"gain over {reference}"] = ends
    found["ours"]["size, together"] = size_together(bed, truth)
    return found


def size_together(bed: RealBed, truth: Truth) -> float:
    """Mean absolute predicted over measured change of a query's loss when half of the rows go
    together, by `run.without`, over the halves.
    """
    run, queries = bed.run(), bed.rows("query")
    before = mean_losses(bed.model, run.query_tokens(queries))
    setting, credit = credited(run)
    assert credit is not None
    parts = raw_parts(setting, run.query_tokens(queries), MeanLoss())
    predicted = [credit.together(parts, np.flatnonzero(~mask)) for mask in truth.masks]
    return float(np.abs(predicted).mean() / np.abs(truth.query_loss - before).mean())


def found_rows(
    scores: np.ndarray, wanted: np.ndarray, groups: list[str | None], asked: list[str | None]
) -> dict[str, list[float]]:
    """Shares of the queries whose `wanted` [Q] row is first, or among five; whose first row is of
    their own group; and the mean reciprocal rank. Each with its interval over the queries.

    Rows with the same score share the lowest rank among them.
    """
    own = scores[np.arange(len(scores)), wanted]
    ranks = (scores >= own[:, None]).sum(1)
    author = np.array(
        [groups[row] == group for row, group in zip(scores.argmax(1), asked, strict=True)]
    )
    values = {"row first": ranks == 1, "row in five": ranks <= 5, "author first": author}
    values["reciprocal rank"] = 1 / ranks
    answers = {
        name: measured(lambda rows, each=each: float(each[rows].mean()), len(each))
        for name, each in values.items()
    }
    return {name: [answer.value, answer.low, answer.high] for name, answer in answers.items()}


def retrieval_part(bed: RealBed, args: argparse.Namespace) -> dict[str, Any]:
    """Rows found by every method."""
    groups, asked = ([row.group for row in bed.rows(name)] for name in ("train", "query"))
    return {
        name: found_rows(kept_scores(bed, name, make), bed.paraphrased, groups, asked)
        for name, make in methods(bed, pythons(args)).items()
    }


# ---- removal -------------------------------------------------------------------------------------


class Judge:
    """Measures adapters `[P]` against the retrained one."""

    def __init__(self, bed: RealBed, group: str, retrained: Tensor) -> None:
        self.model, train = bed.model, bed.tokens("train")
        self.theta = self.model.snapshot()
        removed = np.array([row.group == group for row in bed.rows("train")])
        heldout, rest = bed.tokens("heldout"), np.flatnonzero(~removed)
        self.sets = {
            "forget": train.select(np.flatnonzero(removed)),
            "retained": train.select(rest),
            "held-out": heldout,
        }
        self.compared = self.sets | {
            "retained": train.select(rest[::EVERY]),
            "held-out": heldout.select(np.arange(0, len(heldout), EVERY)),
        }
        self.truth = {
            name: log_probabilities(self.model, retrained, tokens)
            for name, tokens in self.compared.items()
        }
        self.shown = train.select(np.array(SHOWN))

    def measure(self, theta: Tensor) -> dict[str, Any]:
        """Mean losses, `KL(retrained || this)` in nats a token, the move's length over the
        adapter's, and some answers.
        """
        with self.model.at(theta):
            losses = {
                name: float(mean_losses(self.model, tokens).mean())
                for name, tokens in self.sets.items()
            }
            answers = greedy_answers(self.model, self.shown)
        kl = {
            name: divergence(self.truth[name], log_probabilities(self.model, theta, tokens))
            for name, tokens in self.compared.items()
        }
        moved = float((theta - self.theta).norm() / self.theta.norm())
        return {"loss": losses, "KL": kl, "moved": moved, "answers": answers}


def greedy_answers(
    model: influence.AdaptedModel, tokens: TokenizedExamples, most: int = 40
) -> list[str]:
    """What the model says to each row's prompt, the likeliest token at a time."""
    texts = []
    with model.evaluating(), torch.no_grad():
        for item in tokens:
            prompt = torch.from_numpy(item.input_ids[: int(np.argmax(item.supervised))])[None]
            said = model.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=model.pad_id,
            )
            texts.append(model.tokenizer.decode(said[0, prompt.shape[1] :]))
    return texts


def removal_part(bed: RealBed, args: argparse.Namespace) -> dict[str, Any]:
    """One author removed by an edit, by NGDiff to the same loss, by retraining, and not at all."""
    run, heldout = bed.run(), bed.rows("heldout")
    ids = [row.id for row in run.train if row.group == REMOVED]
    folder, took = bed.retrained_without(REMOVED, args.retrained)
    retrained = read_parameters(bed.model, folder)
    judge, theta = Judge(bed, REMOVED, retrained), bed.model.snapshot()
    trained_on = RECIPE.epochs * (len(run.train) - len(ids))

    def edited() -> dict[str, Any]:
        watch, options = Watch(), {"start": "original", "recipe": RECIPE}
        return by_edit(judge, unlearn.remove(run, ids, holdout=heldout, **options), watch)

    def ascended() -> dict[str, Any]:
        watch, until = Watch(), f"loss={found['unlearn remove']['goal']:.6f}"
        return by_edit(
            judge, unlearn.train(run, "ngdiff", ids, until=until, start="original"), watch
        )

    ways = {
        "nothing": lambda: judge.measure(theta),
        "retraining": lambda: (
            judge.measure(retrained) | {"row-gradients": trained_on, "seconds": took}
        ),
        "unlearn remove": edited,
        "ngdiff": ascended,
    }
    found: dict[str, Any] = {}
    for name, make in ways.items():
        found[name] = kept(bed.work / f"removal-{name.replace(' ', '-')}.json", make)
    return {"removed": len(ids), "ways": found}


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found, made once: a killed call goes on behind it."""
    if not file.exists():
        say(f"making {file.name}")
        (partial := file.with_suffix(".partial")).write_text(json.dumps(make()))
        partial.rename(file)
    return json.loads(file.read_text())


def by_edit(judge: Judge, edit: unlearn.Edit, watch: Watch) -> dict[str, Any]:
    """What is measured of an edit, with what it took: all that its record counts."""
    seconds = watch.read()
    cost = {"row-gradients": edit.report["cost"]["total"], "seconds": seconds}
    stopped = {"reached": edit.report["reached"], "stopped": edit.report["stopped"]}
    stopped |= {"goal": edit.report["losses"]["edited"]["target"]}
    return judge.measure(edit.theta) | cost | stopped


# ---- difficulty ----------------------------------------------------------------------------------


def difficulty_part(bed: RealBed, args: argparse.Namespace) -> dict[str, Any]:
    """Forecasts of evenly spaced rows, and what ascent on each of them then took."""
    run, protocol = bed.run(), Protocol()
    rows = np.unique(np.linspace(0, len(run.train) - 1, args.rows).round().astype(int))
    ids = [run.train.ids[row] for row in rows]
    watch = Watch()
    forecast = predict(run, ids, protocol=protocol)
    seconds = watch.read()
    watch = Watch()
    real = measure(run, ids, protocol=protocol, out=bed.work / f"difficulty-{len(ids)}.h5")
    took = watch.read()
    table = forecast.table
    usable = np.isfinite(real.steps) & (real.steps > 0) & np.isfinite(real.damage)
    found: dict[str, Any] = {"rows": len(ids), "reached": int(usable.sum())}
    for name, values in (("steps", real.steps), ("damage", real.damage)):
        ends = [table[f"{name}_{end}"].to_numpy()[usable] for end in ("low", "high")]
        found[name] = judged_forecast(table[name].to_numpy()[usable], values[usable], *ends)
    for baseline in ("gap", "loss", "gradient_norm", "tokens"):
        values = table[baseline].to_numpy()[usable]
        found[baseline] = {
            name: rho(values, measured_values[usable])
            for name, measured_values in (("steps", real.steps), ("damage", real.damage))
        }
    return found | {"forecast seconds": seconds, "measured seconds": took}


def judged_forecast(
    forecast: np.ndarray, real: np.ndarray, low: np.ndarray, high: np.ndarray
) -> dict[str, Any]:
    """Rank correlation, median relative error, median ratio, and the share that the intervals
    hold.
    """
    forecast = np.nan_to_num(forecast, nan=np.inf)
    return rho(forecast, real) | {
        "median relative error": float(np.median(np.abs(forecast / real - 1))),
        "median of measured over forecast": float(np.median(real / forecast)),
        "inside the interval": float(((real >= low) & (real <= high)).mean()),
        "quartiles measured": np.quantile(real, [0.25, 0.5, 0.75]).tolist(),
    }


# ---- the command ---------------------------------------------------------------------------------

PARTS = {
    "speed": speed,
    "lds": lds_part,
    "retrieval": retrieval_part,
    "removal": removal_part,
    "difficulty": difficulty_part,
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "worker"])
    for name, variable in (("bed", "LORA_INFLUENCE_REAL"), ("base", "LORA_INFLUENCE_REAL_BASE")):
        given = os.environ.get(variable)
        parser.add_argument(f"--{name}", type=Path, default=given, required=not given)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kronfluence", help="python of an environment with kronfluence")
    parser.add_argument("--bergson", help="python of an environment with bergson")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--retrained", type=Path, help="adapter trained without the author")
    parser.add_argument("--rows", type=int, default=20, help="rows of `difficulty`")
    parser.add_argument("--only", default="", help="contenders of `speed`, separated by ;")
    return parser.parse_args()


def main() -> None:
    """Run one part."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    bed = RealBed(Path(args.bed).resolve(), Path(args.base).resolve(), args.out.resolve())
    if args.part == "worker":
        print(json.dumps(timed(bed, args.only)))
        return
    found = PARTS[args.part](bed, args)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (args.out / f"{args.part}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
