"""How time, memory and disk of `fit` and `score` grow with rows, parameters, queries, processes.

    python benchmarks/scale.py (rows | parameters | queries | processes | paper) --out DIR
        [--cases N] [--kronfluence PYTHON] [--bergson PYTHON] [--dattri PYTHON]

Each case runs in a process of its own, on random weights and rows that it reads from a folder, and
its record is kept in DIR: a killed call goes on. Time is that of the processor, summed over threads
and processes, so that other work on the machine counts little (`wall` is beside it); memory is the
most that the process held beyond what it held before the fit; disk is what the run directory takes.
The slope is that of the logarithms, between the second and the last case of a line.

With the interpreter of a peer (see `peers/README.md`), rows, parameters or queries are shown of
every library side by side: `ours` as without, `additive` on the peers' own work (the curvature of
all rows, whole gradients, every score, nothing prepared of the credit that rows share), and the
peers, with batches that are best here. A size that a library is expected to take more than 15
minutes for, by the sizes before it, is left out and said to be.

    rows         with rows kept in few bytes (`--store features`), the curvature of 512 of them, and
                 credit that rows share
    parameters   of the adapter, at 64 rows in few bytes: the width of the model grows and the rank
    queries      of a fitted run
    processes    under torchrun on this machine, one thread each: wall time of the fit counts
    paper        nothing is run: passes and bytes of Llama-3-8B by `influence.fit_plan`, time by the
                 operations of its passes at an assumed share of a GPU's peak

Figures are in benchmarks/README.md, "Growth".
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from beside import PEERS, add_interpreters, peer, run_command, write_tokens

#: Width of the Llama whose layers are adapted, and rank of the adapter, for `parameters`.
SIZES = ((32, 4), (128, 4), (128, 32), (512, 32), (512, 256), (1_024, 512))
ROWS = (100, 1_000, 10_000, 100_000)
QUERIES = (10, 100, 1_000)
PROCESSES = (1, 2, 3)
#: Rows that the curvature is formed of where rows grow.
CURVATURE_ROWS = 512
PARTS = ("fit", "score")
#: Batches of the peers that take the fewest processor seconds: at width 32, and from 128 on. Found on
#: 1,000 rows at width 32 and 64 at width 512, 2026-11-29 (benchmarks/README.md, "Growth").
BATCHES: dict[str, tuple[str, str]] = {
    "kronfluence": (
        "--fit-batch 64 --score-batch 64 --query-batch 8",
        "--fit-batch 16 --score-batch 16 --query-batch 20",
    ),
    "bergson": ("--token-batch 4096", "--token-batch 512"),
    "dattri": ("--batch 256", "--batch 16"),
}
#: Most processor seconds that a case may be expected to take beside the peers.
PATIENCE = 900
#: What paper assumes of one GPU: operations in 16 bits and in float64 a second, and the share of
#: them that is reached. An assumption, not measured: benchmarks/gpu.py measures it on a GPU.
PEAK, DOUBLE, SHARE = 989e12, 67e12, 0.35
#: Operations a second in float64 of the host's cores: assumed too.
HOST = 300e9
#: Llama-3-8B with LoRA of rank 16 on all linear layers.
PAPER = {"weights": 8.03e9, "parameters": 41_943_040, "leaves": 448, "tokens": 500, "r": 16}


# ---- one case, in a process of its own -----------------------------------------------------------


def base_of(width: int) -> Any:
    """A two-layer Llama, random, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,  # bergson takes no batch of more tokens
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def model_of(width: int, rank: int) -> Any:
    """LoRA on all linear layers of it."""
    import torch
    from gpu_shapes import build_tokenizer
    from peft import LoraConfig, get_peft_model

    import influence

    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base_of(width), lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return influence.from_peft(adapted.eval(), build_tokenizer(512))


def teach(model: Any, steps: int = 40) -> Any:
    """Train the adapter a little on rows of its own: credit is shared by how far the loss fell."""
    import torch

    optimizer = torch.optim.Adam(model.parameters, lr=2e-2)
    rows = rows_of(16 * steps, 2)
    with model.evaluating(model.parameters):
        for start in range(0, len(rows), 16):
            total = torch.zeros(())
            for row in rows[start : start + 16]:
                ids = torch.tensor([row.input_ids])
                logits = model.model(input_ids=ids).logits[0, :-1]
                total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:])
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    return model


def rows_of(count: int, seed: int) -> Any:
    """Rows of 12 to 24 token ids, small ones more often, of which the second half is supervised."""
    import influence

    generator = np.random.default_rng(seed)
    lengths = generator.integers(12, 25, count)
    rows = []
    for number, length in enumerate(lengths.tolist()):
        ids = 3 + (509 * generator.random(length) ** 2).astype(np.int64)
        labels = np.where(np.arange(length) < length // 2, -100, ids)
        rows.append({"id": f"r{number}", "input_ids": ids.tolist(), "labels": labels.tolist()})
    return influence.examples_from_rows(rows)


def world(asked: Mapping[str, Any], folder: Path) -> None:
    """A case's base, adapter, rows and queries, in files that every library reads."""
    from influence.tokens import tokenize

    model = model_of(asked["width"], asked["rank"])
    if asked["taught"]:
        teach(model)
    base_of(asked["width"]).save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")
    model.model.save_pretrained(str(folder / "adapter"))
    for seed, (name, count) in enumerate((("train", "rows"), ("query", "queries"))):
        tokens = tokenize(rows_of(asked[count], seed), model.tokenizer)
        write_tokens(tokens, folder / f"{name}.jsonl")


def case(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fit and score once, and measure."""
    import psutil
    import torch

    import influence
    from influence import distributed, fitting
    from influence.strongest import strongest

    torch.set_num_threads(1)
    distributed.join("cpu")
    if alike := asked["library"] == "additive":  # else a fit prepares what scores share
        fitting._prepare_credit = lambda run: None
    model = influence.load(str(folder / "base"), str(folder / "adapter"), device="cpu")
    train, queries = (
        influence.read_examples(folder / f"{name}.jsonl") for name in ("train", "query")
    )
    before = psutil.Process().memory_info().rss

    def timed(work: Any) -> tuple[Any, dict[str, float]]:
        wall, cpu = time.perf_counter(), time.process_time()
        found = work()
        return found, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    run, fit = timed(
        lambda: influence.fit(
            model,
            train,
            directory=folder / "run",
            curvature=influence.EKFAC(rows=asked["curvature_rows"]),
            path=(1.0,),
            store=asked["store"],
            token_budget=4096,
        )
    )
    credit = asked["credit"]
    _, score = timed(
        lambda: (
            run.score(queries, credit=credit, out=folder / "run" / "scores.h5")
            if alike
            else strongest(run, queries, 10, credit=credit)
        )
    )
    disk = sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file())
    found = {
        "parameters": model.space.size,
        "fit": fit,
        "score": score,
        "before": before,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "disk": disk,
    }
    rank = distributed.rank()
    distributed.leave()
    return {} if rank else found


def of_peer(asked: Mapping[str, Any], python: str, folder: Path) -> dict[str, Any]:
    """A peer's record, in the form of our own."""
    name = asked["library"]
    made = peer(
        name,
        python,
        base=folder / "base",
        adapter=folder / "adapter",
        tokens=folder,
        options=BATCHES[name][asked["width"] >= 128].split(),
    )
    each = {part: dict(zip(("wall", "cpu"), made[part][0], strict=True)) for part in PARTS}
    return made | each


def in_process(asked: Mapping[str, Any], out: Path, python: str | None = None) -> dict[str, Any]:
    """A case's record: kept, or made in processes of their own."""
    name = "-".join(f"{key}{value}" for key, value in sorted(asked.items()))
    record = out / f"{name}.json"
    if not record.exists():
        with tempfile.TemporaryDirectory(dir=out) as folder:
            given = [__file__, "--out", folder, "--asked", json.dumps(dict(asked))]
            run_command([sys.executable, *given, "world"])
            if asked["library"] in PEERS:
                assert python
                made = of_peer(asked, python, Path(folder))
            else:
                command = [sys.executable]
                if asked["processes"] > 1:
                    count = str(asked["processes"])
                    command += ["-m", "torch.distributed.run", "--nproc-per-node", count]
                run_command([*command, *given, "case"])
                made = json.loads((Path(folder) / "record.json").read_text())
        record.write_text(json.dumps(made))
        print(name, made, file=sys.stderr, flush=True)
    return json.loads(record.read_text())


# ---- lines of cases ------------------------------------------------------------------------------


def asked_of(**changes: Any) -> dict[str, Any]:
    """A case of everything small, but for what changes."""
    usual = {
        "rows": 64,
        "width": 32,
        "rank": 4,
        "queries": 20,
        "processes": 1,
        "store": "features",
        "credit": "additive",
        "curvature_rows": None,
        "taught": False,
        "library": "ours",
    }
    return usual | changes


def line(name: str) -> Iterable[tuple[float, dict[str, Any]]]:
    """What grows, and the cases of a line.

    Parameters: 17 times width x rank a layer, of which there are two.
    """
    if name == "rows":
        for rows in ROWS:
            yield (
                rows,
                asked_of(rows=rows, curvature_rows=CURVATURE_ROWS, credit="shared", taught=True),
            )
    elif name == "parameters":
        for width, rank in SIZES:
            yield 34 * width * rank, asked_of(width=width, rank=rank)
    elif name == "queries":
        for queries in QUERIES:
            yield queries, asked_of(queries=queries, rows=500)
    else:
        for processes in PROCESSES:
            yield processes, asked_of(processes=processes, rows=2_000, width=128, store="full")


def slope(sizes: Iterable[float], values: Iterable[float]) -> float:
    """Of the logarithms, from the first to the last."""
    sizes, values = list(sizes), list(values)
    return math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])


def memory_of(record: Mapping[str, Any]) -> int:
    """The most bytes held beyond those held before."""
    return record["peak"] - record["before"]


def show(name: str, out: Path, cases: int | None) -> None:
    """A table of a line, and its slopes from the second case on."""
    found = [(size, in_process(asked, out)) for size, asked in islice(line(name), cases)]
    print(f"| {name} | fit, s | score, s | memory, MB | disk, MB |")
    print("|---|---|---|---|---|")
    clock = "wall" if name == "processes" else "cpu"
    for size, record in found:
        memory, disk = memory_of(record) / 1e6, record["disk"] / 1e6
        fit, score = record["fit"][clock], record["score"][clock]
        print(f"| {size:,} | {fit:.2f} | {score:.2f} | {memory:.0f} | {disk:.1f} |")
    later = found[1:] if len(found) > 2 else found
    sizes = [size for size, _ in later]
    for part in ("fit", "score"):
        print(f"slope of {part}: {slope(sizes, [r[part][clock] for _, r in later]):.2f}")
    print(f"memory, last over second: {memory_of(later[-1][1]) / memory_of(later[0][1]):.2f}")


# ---- beside the peers ----------------------------------------------------------------------------


def projected(done: Sequence[tuple[float, float]], size: float) -> float:
    """Seconds that a size is expected to take by those before it: in proportion at least."""
    if not done:
        return 0.0
    steep = slope(*zip(*done[-2:], strict=True)) if len(done) > 1 else 1.0
    last, seconds = done[-1]
    return seconds * (size / last) ** max(1.0, steep)


def seconds_of(record: Mapping[str, Any]) -> float:
    """The processor's, of fit and score together."""
    return record["fit"]["cpu"] + record["score"]["cpu"]


def libraries(pythons: Mapping[str, str | None]) -> dict[str, dict[str, Any]]:
    """What is asked of each library otherwise than of ours."""
    alike = {"store": "auto", "credit": "additive", "curvature_rows": None}
    of_peers = {name: alike | {"library": name} for name in PEERS if pythons[name]}
    return {"additive": alike | {"library": "additive"}, "ours": {}} | of_peers


def show_beside(name: str, out: Path, cases: int | None, pythons: Mapping[str, str | None]) -> None:
    """A table of a line, every library beside ours, and their slopes."""
    changes = libraries(pythons)
    records: dict[str, list[tuple[float, dict[str, Any]]]] = {library: [] for library in changes}
    gone: set[str] = set()
    print(
        f"| {name} | library | fit, s | score, s | sum, s | over additive | peak (before), MB | disk, MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size, asked in islice(line(name), cases):
        for library, change in changes.items():
            found = records[library]
            expected = projected([(each, seconds_of(record)) for each, record in found], size)
            if library in gone or expected > PATIENCE:
                gone.add(library)  # nor a later size, which would be told by sizes too far away
                print(f"| {size:,} | {library} | not run: {expected:.0f} s expected | | | | | |")
                continue
            found.append((size, in_process(asked | change, out, pythons.get(library))))
            print(f"| {size:,} | {library} | {cells(found[-1], records['additive'])} |", flush=True)
    print("\n| slopes | fit | score | sum | memory | disk |\n|---|---|---|---|---|---|")
    for library, found in records.items():
        print(f"| {library} | {slopes(found[1:] if len(found) > 2 else found)} |")


def cells(found: tuple[float, Mapping[str, Any]], additive: Sequence[tuple[float, Any]]) -> str:
    """A record's figures, its sum over that of `additive` at the same size."""
    size, record = found
    floor = dict(additive).get(size)
    over = f"{seconds_of(record) / seconds_of(floor):.2f}" if floor else ""
    memory = f"{record['peak'] / 1e6:.0f} ({record['before'] / 1e6:.0f})"
    times = [record["fit"]["cpu"], record["score"]["cpu"], seconds_of(record)]
    return " | ".join(
        [*(f"{each:.2f}" for each in times), over, memory, f"{record['disk'] / 1e6:.1f}"]
    )


def slopes(found: Sequence[tuple[float, Mapping[str, Any]]]) -> str:
    """Of fit, score, their sum, memory beyond that before, and disk, from the first to the last."""
    if len(found) < 2:
        return " | ".join(["-"] * 5)
    sizes = [size for size, _ in found]
    lines = [[record[part]["cpu"] for _, record in found] for part in PARTS]
    lines.append([seconds_of(record) for _, record in found])
    lines.append([memory_of(record) for _, record in found])
    lines.append([record["disk"] for _, record in found])
    return " | ".join(f"{slope(sizes, values):.2f}" for values in lines)


# ---- on paper ------------------------------------------------------------------------------------


def paper() -> None:
    """Llama-3-8B, rank 16: hours and bytes by what the passes compute."""
    from influence.features import bytes_of_row
    from influence.kernel import LANDMARKS, MOST_ROWS, bytes_of_files

    weights, P, tokens = PAPER["weights"], PAPER["parameters"], PAPER["tokens"]
    forward = 2 * weights * tokens  # operations of a row
    backward = forward  # by the inputs alone: base weights get no gradient
    rotation = 2 * 2 * P * 3_300  # two products of a leaf [r, d] with [d, d], d = 3,300 on average
    print("| rows | points | GPUs | fit, h | disk, GB | 1,000 queries, min |")
    print("|---|---|---|---|---|---|")
    for rows in (50_000, 1_000_000):
        for points in (1, 2):
            for gpus in (1, 8):
                sample = min(rows, 4_096)
                curvature = sample * (2 * (forward + backward) + 2 * rotation)
                features = rows * (forward + backward + 2 * rotation)
                landmarks = 0 if rows <= MOST_ROWS else LANDMARKS  # a pass costs more than n^3
                kernel = rows * (2 * landmarks or rows) * 524_288
                fit = points * (curvature + features + kernel) / (PEAK * SHARE * gpus)
                # the inverse, in float64 on one GPU
                fit += points * 2 / 3 * (landmarks or rows) ** 3 / (DOUBLE * SHARE)
                fit += points * 300  # eigendecompositions: 130 of orders to 4,096 in float64
                disk = rows * bytes_of_row(int(P), int(PAPER["leaves"]), 131_072)
                disk = points * (disk + bytes_of_files(rows, landmarks, 4))
                score = 1_000 * (forward + backward + rotation) + 1_000 * rows * 2 * 524_288
                score = points * score / (PEAK * SHARE * gpus) + disk / 2e9 / gpus
                # shared credit, on the host's cores
                score += points * 1_000 * 2 * rows * (2 * landmarks or rows) / HOST
                print(
                    f"| {rows:,} | {points} | {gpus} | {fit / 3600:.2f} | {disk / 1e9:.0f} | "
                    f"{score / 60:.1f} |"
                )


def main(given: Sequence[str] | None = None) -> None:
    """Run a line of cases, or one case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("rows", "parameters", "queries", "processes", "paper")
    inner = ("world", "case")  # what a line calls for each of its cases
    parser.add_argument("part", choices=(*parts, *inner), metavar=f"{{{','.join(parts)}}}")
    parser.add_argument("--out", type=Path, required=True, help="where records are kept")
    parser.add_argument("--asked", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=int, help="take the first so many cases of a line")
    add_interpreters(parser)
    args = parser.parse_args(given)
    if args.part in inner and args.asked is None:
        parser.error(f"{args.part} is called by the others: take one of {', '.join(parts)}")
    pythons = {name: getattr(args, name) for name in PEERS}
    if args.part == "processes" and any(pythons.values()):
        parser.error("the peers are measured in one process: take rows, parameters or queries")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "paper":
        paper()
    elif args.part == "world":
        world(args.asked, args.out)
    elif args.part == "case":
        found = case(args.asked, args.out)
        if found:
            (args.out / "record.json").write_text(json.dumps(found))
    elif any(pythons.values()):
        show_beside(args.part, args.out, args.cases, pythons)
    else:
        show(args.part, args.out, args.cases)


if __name__ == "__main__":
    main()
