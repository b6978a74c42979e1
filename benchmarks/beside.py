"""What the programs that stand beside the peers share: rows as these take them, and a peer's run.

Imports neither torch nor `influence`: a process that starts others hands the most memory that it has
held itself on to them (Linux counts it as theirs), and so must hold less than they do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Libraries that `peers/` has a program for, each in an environment of its own.
PEERS = ("kronfluence", "bergson", "dattri")
HERE = Path(__file__).resolve().parent


def add_interpreters(parser: argparse.ArgumentParser) -> None:
    """Options that name the interpreter of every peer."""
    for name in PEERS:
        parser.add_argument(f"--{name}", help=f"python of an environment with {name}")


def write_tokens(tokens: Any, path: Path) -> None:
    """Rows as the peers take them: token ids, and labels that are -100 where nothing is supervised."""
    lines = [
        json.dumps(
            {
                "input_ids": item.input_ids.tolist(),
                "labels": np.where(item.supervised, item.input_ids, -100).tolist(),
            }
        )
        for item in tokens
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def run_command(command: Sequence[str]) -> str:
    """Run a process and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def peer(
    name: str,
    python: str,
    *,
    base: Path,
    adapter: Path,
    tokens: Path,
    repeat: int = 1,
    threads: int = 1,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """What a peer's program measures, on `train.jsonl` and `query.jsonl` of the folder `tokens`.

    `fit` and `score`: the clock's and the processor's seconds of every repeat; `before`, `peak` and
    `disk`: bytes held before the work, at most, and left in files by one repeat.
    """
    out = tokens / f"{name}.npz"
    command = [python, str(HERE / "peers" / f"{name}_ekfac.py"), "--model", str(base)]
    command += ["--adapter", str(adapter), "--out", str(out)]
    command += ["--train", str(tokens / "train.jsonl")]
    command += ["--queries", str(tokens / "query.jsonl"), "--repeat", str(repeat)]
    run_command([*command, "--threads", str(threads), *options])
    with np.load(out, allow_pickle=False) as arrays:
        found: dict[str, Any] = {
            part: np.stack([arrays[f"{part}_seconds"], arrays[f"{part}_cpu_seconds"]], 1).tolist()
            for part in ("fit", "score")
        }
        bytes_of = {"peak": "peak_rss_bytes", "before": "rss_before_bytes", "disk": "disk_bytes"}
        return found | {key: int(arrays[array]) for key, array in bytes_of.items()}
