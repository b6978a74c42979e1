"""How time, memory and disk of `fit` and `score` grow with rows, parameters, queries, processes.

    python benchmarks/scale.py (rows | parameters | queries | processes | paper) --out DIR

Each case runs in a process of its own, on random weights and rows, and its record is kept in DIR: a
killed call goes on. Time is that of the processor, summed over threads and processes, so that other
work on the machine counts little (`wall` is beside it); memory is the most that the process held
beyond what it held before the fit; disk is what the run directory takes. The slope is that of the
logarithms, between the second and the last case of a line.

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gpu_shapes import build_tokenizer

#: Width of the Llama whose layers are adapted, and rank of the adapter, for `parameters`.
SIZES = ((32, 4), (128, 4), (128, 32), (512, 32), (512, 256), (1_024, 512))
ROWS = (100, 1_000, 10_000, 100_000)
QUERIES = (10, 100, 1_000)
PROCESSES = (1, 2, 3)
#: Rows that the curvature is formed of where rows grow.
CURVATURE_ROWS = 512
#: What paper assumes of one GPU: operations in 16 bits and in float64 a second, and the share of
#: them that is reached. An assumption, not measured: benchmarks/gpu.py measures it on a GPU.
PEAK, DOUBLE, SHARE = 989e12, 67e12, 0.35
#: Operations a second in float64 of the host's cores: assumed too.
HOST = 300e9
#: Llama-3-8B with LoRA of rank 16 on all linear layers.
PAPER = {"weights": 8.03e9, "parameters": 41_943_040, "leaves": 448, "tokens": 500, "r": 16}


# ---- one case, in a process of its own -----------------------------------------------------------


def model_of(width: int, rank: int) -> Any:
    """A two-layer Llama with LoRA on all its linear layers, random, float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import influence

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
    )
    base = LlamaForCausalLM(config)
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)
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


def case(asked: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Fit and score once, and measure."""
    import torch

    import influence
    from influence import distributed
    from influence.strongest import strongest

    torch.set_num_threads(1)
    distributed.join("cpu")
    model, train = model_of(asked["width"], asked["rank"]), rows_of(asked["rows"], 0)
    if asked["credit"] == "shared":
        teach(model)
    queries = rows_of(asked["queries"], 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def timed(work: Any) -> tuple[Any, dict[str, float]]:
        wall, cpu = time.perf_counter(), time.process_time()
        found = work()
        return found, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    drawn = asked["curvature_rows"]
    run, fit = timed(
        lambda: influence.fit(
            model,
            train,
            directory=directory / "run",
            curvature=influence.EKFAC(rows=drawn),
            path=(1.0,),
            store=asked["store"],
            token_budget=4096,
        )
    )
    _, score = timed(lambda: strongest(run, queries, 10, credit=asked["credit"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    disk = sum(path.stat().st_size for path in (directory / "run").rglob("*") if path.is_file())
    found = {
        "parameters": model.space.size,
        "fit": fit,
        "score": score,
        "memory": 1024 * (peak - before),
        "disk": disk,
    }
    rank = distributed.rank()
    distributed.leave()
    return {} if rank else found


def in_process(asked: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """A case's record: kept, or made in processes of their own."""
    name = "-".join(f"{key}{value}" for key, value in sorted(asked.items()))
    record = out / f"{name}.json"
    if not record.exists():
        with tempfile.TemporaryDirectory(dir=out) as folder:
            command = [sys.executable]
            if asked["processes"] > 1:
                count = str(asked["processes"])
                command += ["-m", "torch.distributed.run", "--nproc-per-node", count]
            command += [__file__, "case", "--out", folder, "--asked", json.dumps(dict(asked))]
            subprocess.run(command, check=True, stdout=sys.stderr)
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
    }
    return usual | changes


def line(name: str) -> Iterable[tuple[float, dict[str, Any]]]:
    """What grows, and the cases of a line."""
    if name == "rows":
        for rows in ROWS:
            yield rows, asked_of(rows=rows, curvature_rows=CURVATURE_ROWS, credit="shared")
    elif name == "parameters":
        for width, rank in SIZES:
            yield width * rank, asked_of(width=width, rank=rank)
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


def show(name: str, out: Path) -> None:
    """A table of a line, and its slopes from the second case on."""
    found = [(size, in_process(asked, out)) for size, asked in line(name)]
    if name == "parameters":
        found = [(record["parameters"], record) for _, record in found]
    print(f"| {name} | fit, s | score, s | memory, MB | disk, MB |")
    print("|---|---|---|---|---|")
    clock = "wall" if name == "processes" else "cpu"
    for size, record in found:
        memory, disk = record["memory"] / 1e6, record["disk"] / 1e6
        fit, score = record["fit"][clock], record["score"][clock]
        print(f"| {size:,} | {fit:.2f} | {score:.2f} | {memory:.0f} | {disk:.1f} |")
    later = found[1:] if len(found) > 2 else found
    sizes = [size for size, _ in later]
    for part in ("fit", "score"):
        print(f"slope of {part}: {slope(sizes, [r[part][clock] for _, r in later]):.2f}")
    print(f"memory, last over second: {later[-1][1]['memory'] / later[0][1]['memory']:.2f}")


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


def main() -> None:
    """Run a line of cases, or one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    lines = ("rows", "parameters", "queries", "processes")
    parser.add_argument("part", choices=(*lines, "paper", "case"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--asked", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "paper":
        paper()
    elif args.part == "case":
        found = case(args.asked, args.out)
        if found:
            (args.out / "record.json").write_text(json.dumps(found))
    else:
        show(args.part, args.out)


if __name__ == "__main__":
    main()
