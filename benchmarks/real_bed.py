"""The real model of `real.py`: a pretrained chat model, its adapter, rows and truth, and what is
made of them once and kept in a work folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rivals import bm25, hidden_states, repsim
from safetensors.torch import load_file, save_file

import influence
from analysis.metrics.lds import Truth, read_truth
from influence.adapter import AdaptedModel
from influence.progress import say
from influence.rows import Examples
from influence.run import Run
from influence.text_search import standardised, text_of
from influence.tokens import TokenizedExamples, tokenize
from unlearn.retraining.recipe import Recipe
from unlearn.retraining.retrain import fresh_adapter, train

HERE = Path(__file__).resolve().parent
#: How the adapter was trained: the README of its folder.
RECIPE = Recipe(lr=1e-3, weight_decay=0.01, epochs=6, batch_size=10, seed=0)
#: Scales of the path that are looked at one by one: the adapter itself, where every peer looks, and
#: one further back.
SCALES = (1.0, 0.6)


@dataclass(frozen=True)
class RealBed:
    """A pretrained base, and a folder with `adapter/`, `train.jsonl`, `query.jsonl` (query j
    paraphrases row 2 + 5 j), `heldout.jsonl` and `truth.npz`; `work` keeps what is made of them.
    """

    folder: Path
    base: Path
    work: Path

    @cached_property
    def model(self) -> AdaptedModel:
        """The adapter on its base, float32 on the CPU."""
        return influence.load(str(self.base), str(self.folder / "adapter"), device="cpu")

    def rows(self, name: str) -> Examples:
        """The rows of `train`, `query` or `heldout`."""
        return influence.read_examples(self.folder / f"{name}.jsonl")

    def tokens(self, name: str) -> TokenizedExamples:
        """The same as tokens."""
        return tokenize(self.rows(name), self.model.tokenizer)

    @property
    def truth(self) -> Truth:
        """Losses of the adapters that were retrained on random halves."""
        return read_truth(self.folder / "truth.npz")

    @property
    def paraphrased(self) -> np.ndarray:
        """The training row that each query paraphrases, `[Q]`."""
        return 2 + 5 * np.arange(len(self.rows("query")))

    def run(self, path: tuple[float, ...] | None = None) -> Run:
        """The fit at some points of the path (None: the default ones), made once."""
        name = "run" if path is None else "run-" + "-".join(f"{scale:g}" for scale in path)
        rows = self.rows("train")
        return influence.fit(self.model, rows, directory=self.work / name, path=path)

    def scaled_adapter(self, scale: float) -> Path:
        """A folder with the adapter whose every B is multiplied by a scale."""
        return scaled_copy(self.folder / "adapter", self.work / f"adapter-{scale:g}", scale)

    def retrained_without(self, group: str, kept: Path | None) -> tuple[Path, dict[str, float]]:
        """The adapter trained again without a group, and the seconds that took.

        Read from the folder `kept` where one is given, else trained once.
        """
        out = kept or self.work / f"retrained-without-{group}"
        if not out.exists():
            tokens, rows = self.tokens("train"), self.rows("train")
            left = np.array([i for i, row in enumerate(rows) if row.group != group])
            say(f"training again on {len(left)} rows")
            begun = time.process_time(), time.monotonic()
            fresh = fresh_adapter(self.model, RECIPE.seed)
            train(fresh, tokens.select(left), RECIPE)
            partial = out.with_name(out.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            fresh.model.save_pretrained(str(partial), save_embedding_layers=False)
            took = {"cpu": time.process_time() - begun[0], "wall": time.monotonic() - begun[1]}
            (partial / "time.json").write_text(json.dumps(took))
            partial.rename(out)
        return out, json.loads((out / "time.json").read_text())


def scaled_copy(adapter: Path, out: Path, scale: float) -> Path:
    """Copy an adapter's folder with every B matrix multiplied by a scale, once."""
    if not out.exists():
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(adapter, partial)
        file = partial / "adapter_model.safetensors"
        file.chmod(0o644)
        tensors = load_file(file)
        tensors = {key: t * scale if "lora_B" in key else t for key, t in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        partial.rename(out)
    return out


# ---- peers ---------------------------------------------------------------------------------------


def ready_rows(tokens: TokenizedExamples) -> list[dict[str, list[int]]]:
    """Rows as the peers' scripts take them: token ids, and labels that are -100 where nothing is
    supervised.
    """
    return [
        {
            "input_ids": item.input_ids.tolist(),
            "labels": np.where(item.supervised, item.input_ids, -100).tolist(),
        }
        for item in tokens
    ]


def peer_arrays(
    bed: RealBed, name: str, python: str, adapter: Path, out: Path, *options: str
) -> dict[str, np.ndarray]:
    """Run a peer's script in its own environment on this project's tokens, once, and return what
    it saved. The scores `[Q, n]` are for the queries' mean losses.
    """
    if not out.exists():
        command = [python, str(HERE / "peers" / f"{name}_ekfac.py"), "--model", str(bed.base)]
        command += ["--adapter", str(adapter), "--out", str(partial := out.with_suffix(".new.npz"))]
        for option, rows in (("--train", "train"), ("--queries", "query")):
            file = bed.work / f"{rows}-tokens.jsonl"
            lines = [json.dumps(row) + "\n" for row in ready_rows(bed.tokens(rows))]
            file.write_text("".join(lines), encoding="utf-8")
            command += [option, str(file)]
        say(f"{name} on {adapter}")
        done = subprocess.run(
            [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        partial.rename(out)
    with np.load(out, allow_pickle=False) as arrays:
        found = {key: arrays[key] for key in arrays.files}
    return found | {"scores": found["scores"] / bed.tokens("query").counts[:, None]}


# ---- every method's scores -----------------------------------------------------------------------


def methods(bed: RealBed, pythons: dict[str, str | None]) -> dict[str, Callable[[], np.ndarray]]:
    """What gives each method's scores `[Q, n]`, by the method's name.

    `pythons` are the interpreters of the peers' environments; those without are left out, but where
    their scores are kept.
    """
    queries, train = bed.rows("query"), bed.rows("train")

    def ours(scale: float | None = None, **options: Any) -> np.ndarray:
        run = bed.run() if scale is None else bed.run((scale,))
        name = "-".join([run.directory.name, *options.values()])
        return run.score(queries, out=bed.work / f"{name}.h5", **options).values

    def words_too() -> np.ndarray:
        effect, words = ours(), bm25(texts(queries), texts(train))
        return np.stack(
            [standardised(a) + standardised(b) for a, b in zip(effect, words, strict=True)]
        )

    def texts(rows: Examples) -> list[str]:
        return [text_of(row) for row in rows]

    def states(rows: str) -> Any:
        return hidden_states(bed.model, bed.tokens(rows))

    found: dict[str, Callable[[], np.ndarray]] = {
        "ours": ours,
        "ours, additive": lambda: ours(credit="additive"),
        "ours, additive, at 1.0": lambda: ours(1.0, credit="additive"),
        "ours and BM25": words_too,
        "gradient dot": lambda: ours(1.0, curvature="identity"),
        "BM25": lambda: bm25(texts(queries), texts(train)),
        "hidden states": lambda: repsim(states("query"), states("train")),
    }
    for scale in SCALES:
        adapter = bed.folder / "adapter" if scale == 1 else bed.scaled_adapter(scale)
        for name, python in pythons.items():
            out = bed.work / f"{name}-{scale:g}.npz"
            if python is not None or out.exists():
                found[f"{name}, at {scale:.1f}"] = (
                    lambda name=name, python=python, adapter=adapter, out=out: peer_arrays(
                        bed, name, python or "", adapter, out
                    )["scores"]
                )
    return found


def kept_scores(bed: RealBed, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """A method's scores, made once."""
    file = bed.work / "scores" / f"{name.replace('/', 'over').replace(' ', '-')}.npy"
    if not file.exists():
        say(f"scores of {name}")
        file.parent.mkdir(exist_ok=True)
        np.save(partial := file.with_suffix(".new.npy"), make())
        partial.rename(file)
    return np.load(file, allow_pickle=False)
