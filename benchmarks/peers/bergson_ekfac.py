"""EK-FAC influence scores of a LoRA adapter with bergson, timed.

With `--astra-steps`, refined by ASTRA.

Runs in an environment of its own (see README.md beside this file) and imports nothing of this
project.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bergson.build
import bergson.hessians.hessian_approximations
import bergson.hessians.pipeline
import bergson.score.score
import numpy as np
import psutil
import torch
from bergson.cli.commands import Ekfac
from bergson.config.config import (
    AstraConfig,
    DataConfig,
    DistributedConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import load_scores
from bergson.hessians.astra import Astra
from datasets import Dataset, disable_progress_bars
from shared import now, parser_of, read_rows, write_record
from transformers import AutoTokenizer


class Stopwatch:
    """Time spent in functions of a library, by label.

    Attributes
    ----------
    seconds
        Wall and CPU seconds so far, by label.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, np.ndarray] = {}
        self._running: list[str] = []

    def watch(self, module: Any, name: str, label: str) -> None:
        """Replace ``module.name`` by a version that adds its time to ``label``.

        Inside another watched function the label is followed by "/" and that function's label.
        """
        function: Callable[..., Any] = getattr(module, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._running.insert(0, label)
            key = "/".join(self._running)
            started = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[key] = self.seconds.get(key, 0.0) + now() - started
                self._running.pop(0)

        setattr(module, name, timed)


def write_rows(source: Path, tokenizer: Any, target: Path) -> None:
    """Tokenize a JSON lines file into a folder that bergson reads as it is.

    Rows that already have ``input_ids`` and ``labels`` are not put through a chat template, so the
    model sees prompt + completion + end of sequence as in training, and only the last two count.

    Parameters
    ----------
    source
        File whose rows have a ``prompt`` and a ``completion``, or ready ``input_ids`` and
        ``labels`` (-100: not supervised), which are taken as they are.
    tokenizer
        Fast tokenizer of the base model.
    target
        Folder to write.
    """
    rows = [row | {"length": len(row["input_ids"])} for row in read_rows(source, tokenizer)]
    Dataset.from_list(rows).save_to_disk(str(target))


def copy_adapter(adapter: Path, model: Path, target: Path) -> None:
    """Link an adapter's files into a folder, with the base model's path in the configuration.

    Parameters
    ----------
    adapter
        Folder of the PEFT adapter.
    model
        Folder of the base model: bergson takes it from the adapter's configuration only.
    target
        Folder to make.
    """
    target.mkdir()
    for file in adapter.iterdir():
        if file.name != "adapter_config.json":
            (target / file.name).symlink_to(file.resolve())
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(model.resolve())
    (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def pipeline(folder: Path, repeat: int, tokenizer: Path, args: argparse.Namespace) -> Ekfac:
    """Build what the command ``bergson ekfac`` builds from the options that `command` gives it."""
    return Ekfac(
        IndexConfig(
            str(folder / f"run{repeat}"),
            model=str(folder / "adapter"),
            tokenizer=str(tokenizer),
            precision="fp32",
            token_batch_size=args.token_batch,
            distributed=DistributedConfig(nproc_per_node=1),
            data=DataConfig(dataset=str(folder / "train")),
        ),
        HessianConfig(method="kfac", ev_correction=True),
        ScoreConfig(score="individual"),
        PreprocessConfig(),
        HessianPipelineConfig(
            query=QuerySetConfig(dataset=str(folder / "queries"), aggregation="none"),
            inversion_cfg=InversionConfig(apply_batch_size=args.apply_batch),
            astra=AstraConfig(
                num_steps=args.astra_steps,
                lr=args.astra_lr,
                batch_size=args.astra_batch,
                seed=args.seed + repeat,
            ),
        ),
    )


def command(folder: Path, run: str, tokenizer: Path, args: argparse.Namespace) -> list[str]:
    """Command line of the same run."""
    options = {
        "--model": folder / "adapter",
        "--tokenizer": tokenizer,
        "--index_cfg.precision": "fp32",
        "--token_batch_size": args.token_batch,
        "--nproc_per_node": 1,
        "--data.dataset": folder / "train",
        "--method": "kfac",
        "--hessian_cfg.ev_correction": True,
        "--score": "individual",
        "--query.dataset": folder / "queries",
        "--query.aggregation": "none",
        "--hessian_pipeline_cfg.inversion_cfg.apply_batch_size": args.apply_batch,
        "--hessian_pipeline_cfg.astra.num_steps": args.astra_steps,
        "--hessian_pipeline_cfg.astra.lr": args.astra_lr,
        "--hessian_pipeline_cfg.astra.batch_size": args.astra_batch,
    }
    flat = [str(part) for option in options.items() for part in option]
    return [sys.executable, "-m", "bergson", "ekfac", str(folder / run), *flat]


def copy_before_writing() -> None:
    """Let ASTRA work on copies of what it reads.

    bergson 2.5.1 updates its solutions in place, and on a CPU in float32 these are views of a file
    mapped for reading only: the process dies with a segmentation fault.
    """
    read = Astra._read_row

    def copied(*args: Any) -> dict[str, torch.Tensor]:
        return {name: row.clone() for name, row in read(*args).items()}

    Astra._read_row = copied


def read_scores(path: Path) -> np.ndarray:
    """Scores of a finished run, [query, train]."""
    return np.ascontiguousarray(load_scores(path)[:].T, dtype=np.float32)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeat", type=int, default=1, help="runs; run r has seed SEED + r")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--token-batch", type=int, default=512, help="tokens per batch, padding included"
    )
    parser.add_argument(
        "--apply-batch", type=int, default=40, help="query gradients inverted at a time"
    )
    parser.add_argument(
        "--astra-steps", type=int, default=0, help="steps of ASTRA per query (0: EK-FAC alone)"
    )
    parser.add_argument("--astra-lr", type=float, default=0.01, help="its step size (momentum 0.9)")
    parser.add_argument("--astra-batch", type=int, default=16, help="training rows per step of it")
    parser.add_argument(
        "--command", action="store_true", help="also time the command line, once per repeat"
    )
    return parser.parse_args()


def main() -> None:
    """Run the pipeline, and write scores and timings."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bars()
    logging.disable(logging.INFO)  # bergson logs to stdout
    copy_before_writing()
    modules = (bergson.build, bergson.hessians.hessian_approximations, bergson.score.score)

    all_scores, times, command_seconds = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        write_rows(args.train, tokenizer, folder / "train")
        write_rows(args.queries, tokenizer, folder / "queries")
        copy_adapter(args.adapter, args.model, folder / "adapter")

        watch = Stopwatch()
        watch.watch(bergson.hessians.pipeline, "approximate_hessians", "fit")
        for module in modules:
            watch.watch(module, "setup_model_and_peft", "load")
            watch.watch(module, "setup_data_pipeline", "load")

        rss_before = psutil.Process().memory_info().rss
        for run in range(args.repeat):
            torch.manual_seed(args.seed + run)
            watch.seconds.clear()
            started = now()
            with contextlib.redirect_stdout(sys.stderr):
                pipeline(folder, run, args.model, args).execute()
            all_scores.append(read_scores(folder / f"run{run}" / "scores"))
            total = now() - started
            fit = watch.seconds["fit"] - watch.seconds["load/fit"]
            load = watch.seconds["load/fit"] + watch.seconds["load"]
            times.append((fit, total - fit - load, load))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        files = [path.stat().st_size for path in folder.glob("run0/**/*") if path.is_file()]

        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        for run in range(args.repeat if args.command else 0):
            started = time.perf_counter()
            line = command(folder, f"command{run}", args.model, args)
            subprocess.run(line, check=True, stdout=sys.stderr, env=environment)
            command_seconds.append(time.perf_counter() - started)

    write_record(
        args.out,
        all_scores,
        [(fit, score) for fit, score, _ in times],
        load_seconds=[load[0] for _, _, load in times],
        peak=peak,
        before=rss_before,
        disk=sum(files),
        command_seconds=command_seconds,
    )


if __name__ == "__main__":
    main()
