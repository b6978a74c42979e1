"""Speed and memory of EK-FAC scores beside kronfluence and bergson, and beside the bare work.

    python benchmarks/speed.py --bed FOLDER [BASE] [--bed FOLDER [BASE]] [--kronfluence PYTHON]
        [--bergson PYTHON] [--dattri PYTHON] [--threads N] [--repeat N] [--rows N] [--only NAMES]
        [--out F.json]

The work: EK-FAC of a LoRA adapter on its training rows, at the adapter itself (`--path 1.0`), and
scores of every query against every row; float32, CPU, everything else by default. A bed is a folder
with `adapter/`, `train.jsonl` and `query.jsonl`, and its base model, by default `base/` in it. All
libraries get the same token ids and labels.

Model loading and imports are left out of every time. `bare` is one forward and backward of every
training and query row by transformers and PEFT alone, in batches sorted by length: what no method
can do without. `ours` prepares credit that rows share, which the peers do not make; `additive` is the
same without it: the peers' own work. Each contender runs in a process of its own, one after the other, `--repeat` times in
it; medians are printed, with the ratios that are aimed at. The peers need environments of their own
(see `peers/README.md`); without their interpreters they are left out. `--rows` takes the first rows
and queries only, for a trial.

Seconds are the clock's and the processor's. Those of the processor, with one thread, can be compared
on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beside import PEERS, add_interpreters, peer, run_command, write_tokens

OURS = ("bare", "ours", "additive")
#: The most that fit + score may take of each contender's time (of `bare`, a multiple).
AIMS = {"bare": 2.0, "kronfluence": 0.35, "bergson": 0.3}
BUDGET = 1024  # tokens a batch, as `fit` takes on a CPU


@dataclass(frozen=True)
class Bed:
    """A base model, an adapter, its rows and queries."""

    folder: Path
    base: Path

    @classmethod
    def of(cls, given: list[str]) -> Bed:
        """From the values of one `--bed`."""
        folder = Path(given[0]).resolve()
        return cls(folder, Path(given[1]).resolve() if len(given) > 1 else folder / "base")

    def load(self) -> Any:
        """The adapter on its base."""
        import influence

        return influence.load(str(self.base), str(self.folder / "adapter"), device="cpu")

    def rows(self, name: str, most: int | None) -> Any:
        """Rows of `train` or `query`."""
        import influence

        rows = influence.read_examples(self.folder / f"{name}.jsonl")
        return rows if most is None else rows.select(list(range(min(most, len(rows)))))


def peak() -> int:
    """The most memory that this process has held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now() -> tuple[float, float]:
    """The clock's and the processor's seconds."""
    return time.perf_counter(), time.process_time()


def since(begun: tuple[float, float]) -> list[float]:
    """Both, since then."""
    return [after - before for before, after in zip(begun, now(), strict=True)]


# ---- contenders, each in a process of its own ----------------------------------------------------


def ours(bed: Bed, args: argparse.Namespace, credit: str = "shared") -> dict[str, Any]:
    """Fit and score, and score a second query set from the stored gradients."""
    import influence
    from influence import fitting

    if credit == "additive":  # a fit prepares what scores share, whether these are asked for or not
        fitting._prepare_credit = lambda run: None
    model = bed.load()
    train, queries = bed.rows("train", args.rows), bed.rows("query", args.rows)
    found: dict[str, Any] = {"before": peak(), "fit": [], "score": [], "second": []}
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as folder:
            directory, begun = Path(folder) / "run", now()
            run = influence.fit(model, train, directory=directory, path=(1.0,))
            found["fit"].append(since(begun))
            begun = now()
            run.score(queries, credit=credit, out=Path(folder) / "scores.h5")
            found["score"].append(since(begun))
            found["peak"] = peak()
            del run
            again, begun = influence.Run.open(directory, model=model, train=train), now()
            again.score(queries, credit=credit, out=Path(folder) / "second.h5")
            found["second"].append(since(begun))
    return found


def additive(bed: Bed, args: argparse.Namespace) -> dict[str, Any]:
    """The same without the credit that rows share."""
    return ours(bed, args, "additive")


def bare(bed: Bed, args: argparse.Namespace) -> dict[str, Any]:
    """One forward and backward of every training and query row by PEFT's own model and loss."""
    import torch

    from influence.batches import collate, plan_batches
    from influence.tokens import tokenize

    model = bed.load()
    sets = [tokenize(bed.rows(name, args.rows), model.tokenizer) for name in ("train", "query")]
    found: dict[str, Any] = {"before": peak(), "fit": [], "score": []}
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    for _ in range(args.repeat):
        for name, tokens in zip(("fit", "score"), sets, strict=True):
            begun = now()
            for rows in plan_batches(tokens, BUDGET):
                batch = collate(tokens, rows)
                labels = torch.where(batch.supervised, batch.input_ids, -100)
                loss = model.model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
                ).loss
                torch.autograd.grad(loss, model.parameters)
            found[name].append(since(begun))
    return found | {"peak": peak()}


def tokens(bed: Bed, args: argparse.Namespace) -> dict[str, Any]:
    """Write the rows as the peers take them."""
    from influence.tokens import tokenize

    tokenizer = bed.load().tokenizer
    for name in ("train", "query"):
        rows = tokenize(bed.rows(name, args.rows), tokenizer)
        write_tokens(rows, args.tokens / f"{name}.jsonl")
    return {}


WORKERS = {"ours": ours, "additive": additive, "bare": bare, "tokens": tokens}


def own(bed: Bed, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One of our own contenders in a fresh process."""
    command = [sys.executable, __file__, "--worker", name, "--bed", str(bed.folder), str(bed.base)]
    command += ["--repeat", str(args.repeat), "--threads", str(args.threads)]
    command += ["--tokens", str(args.tokens)]
    command += [] if args.rows is None else ["--rows", str(args.rows)]
    return json.loads(run_command(command).splitlines()[-1])


# ---- the table -----------------------------------------------------------------------------------


def medians(times: list[list[float]]) -> list[float]:
    """Median seconds of the clock and of the processor."""
    return [statistics.median(each) for each in zip(*times, strict=True)]


def total(times: dict[str, Any]) -> list[float]:
    """Fit and score together."""
    return [a + b for a, b in zip(medians(times["fit"]), medians(times["score"]), strict=True)]


def table(bed: Bed, results: dict[str, Any]) -> None:
    """Print what was measured on a bed, and the ratios that are aimed at."""
    print(f"\n{bed.folder.name}")
    print("| | fit | score | sum | x bare | processor | x bare | peak MB | of it before |")
    print("|---|---|---|---|---|---|---|---|---|")
    floor = total(results["bare"]) if "bare" in results else [float("nan")] * 2
    for name, times in results.items():
        (wall, cpu), fit, score = total(times), medians(times["fit"])[0], medians(times["score"])[0]
        print(
            f"| {name} | {fit:.2f} | {score:.2f} | {wall:.2f} | {wall / floor[0]:.2f} | {cpu:.2f} | "
            f"{cpu / floor[1]:.2f} | {times['peak'] / 1e6:.0f} | {times['before'] / 1e6:.0f} |"
        )
    for mine in [name for name in ("ours", "additive") if name in results]:
        for name, aim in AIMS.items():
            if name not in results:
                continue
            each = zip(total(results[mine]), total(results[name]), strict=True)
            wall, cpu = (a / b for a, b in each)
            line = f"{mine} / {name}: {wall:.3f} (processor {cpu:.3f}), aimed at {aim:.2f} at most"
            if name != "bare":
                line += f"; memory {results[mine]['peak'] / results[name]['peak']:.2f}, at most 1"
            print(line)
        second = medians(results[mine]["second"])
        print(f"{mine}, a second query set: {second[0]:.2f} s, processor {second[1]:.2f} s")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bed", nargs="+", action="append", required=True)
    add_interpreters(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", type=int, help="rows and queries taken, for a trial")
    parser.add_argument("--only", help="contenders, separated by commas")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run every contender on every bed and print the tables."""
    args = parse_args()
    beds = [Bed.of(given) for given in args.bed]
    if args.worker:
        import torch

        torch.set_num_threads(args.threads)
        print(json.dumps(WORKERS[args.worker](beds[0], args)))
        return
    chosen = args.only.split(",") if args.only else [*OURS, *PEERS]
    found: dict[str, Any] = {"threads": args.threads}
    for bed in beds:
        results = found[bed.folder.name] = {}
        with tempfile.TemporaryDirectory() as folder:
            args.tokens = Path(folder)
            own(bed, "tokens", args)
            for name in chosen:
                if name in OURS:
                    results[name] = own(bed, name, args)
                elif python := getattr(args, name):
                    results[name] = peer(
                        name,
                        python,
                        base=bed.base,
                        adapter=bed.folder / "adapter",
                        tokens=args.tokens,
                        repeat=args.repeat,
                        threads=args.threads,
                    )
                print(f"{bed.folder.name}: {name} done", file=sys.stderr, flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))
        table(bed, results)


if __name__ == "__main__":
    main()
