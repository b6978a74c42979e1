"""Run directories of the explorer's tests, written without a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from influence.manifest import (
    FORMAT,
    AdapterSource,
    DataSource,
    Manifest,
    ObjectiveRecord,
    PointRecord,
    Source,
    TokenizerSource,
    digest_of,
    write_manifest,
)
from influence.row_files import read_examples
from influence.store import write_file
from influence.strongest import Strongest


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(count: int, kind: str = "row", groups: int = 3) -> list[dict]:
    """Rows that say which they are."""
    return [
        {
            "id": f"{kind}-{k}",
            "prompt": f"What is number {k} of the {kind}s?",
            "completion": f" It is {k * 7919 % 1009}, of kind {k % 5}.",
            "group": f"group {k % groups}",
        }
        for k in range(count)
    ]


def write_run(folder: Path, rows: list[dict]) -> Manifest:
    """A run directory of these rows, with a manifest and nothing else."""
    folder.mkdir(parents=True)
    train = read_examples(write_rows(folder.with_name(folder.name + "-train.jsonl"), rows))
    identity = {"data": train.digest}
    manifest = Manifest(
        format=FORMAT,
        digest=digest_of(identity),
        complete=True,
        identity=identity,
        base=Source("/nowhere/base", "b" * 64),
        adapter=AdapterSource("/nowhere/tiny-adapter", "a" * 64, 1234),
        data=DataSource(train.source, train.digest, len(train), 40 * len(train), 9 * len(train)),
        tokenizer=TokenizerSource("c" * 64),
        objective=ObjectiveRecord("token", None, 9 * len(train)),
        curvature={"name": "ekfac", "samples": 1},
        damping="mean:0.1",
        points=(PointRecord("0.4", 0.5, 0.4, None), PointRecord("0.8", 0.5, 0.8, None)),
        geometry="raw",
        optimizer=None,
        store="auto",
        disk_budget=5e10,
        seed=0,
        token_budget=1024,
        dtype="float32",
        versions={"lora-influence": "0.1.0"},
        created="2026-01-02T03:04:05Z",
    )
    write_manifest(folder, manifest)
    return manifest


def write_scores(
    folder: Path,
    values: np.ndarray,
    queries: list[dict],
    *,
    name: str = "scores.h5",
    self_influence: np.ndarray | None = None,
    modules: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
    token_ids: np.ndarray | None = None,
    offsets: np.ndarray | None = None,
    kept: int | None = None,
    **attributes,
) -> Path:
    """A score file of the run: whole, or with `kept` the strongest rows alone."""
    from influence.manifest import read_manifest
    from influence.scorefile import Scores

    manifest = read_manifest(folder)
    asked = read_examples(write_rows(folder.with_name(folder.name + f"-{name}.jsonl"), queries))
    train = read_examples(str(manifest.data.path))
    told = {
        "convention": "as told",
        "measurement": "loss",
        "unit": "nats per token",
        "rises": True,
        "credit": "shared",
        "curvature": "ekfac",
        "solver": "direct",
        "damping": "mean:0.1",
        "run_digest": manifest.digest,
        "query_digest": asked.digest,
        "queries": asked.source,
        "complete": True,
        **attributes,
    }
    strings = {"query_ids": list(asked.ids), "train_ids": list(train.ids)}
    count, path = len(asked), folder / name
    if kept is not None:
        whole = Scores(values, *strings.values(), np.zeros(count), np.ones(count, bool), told)
        found = Strongest.of(whole, kept)
        names = ("highest", "highest_scores", "lowest", "lowest_scores", "residuals", "converged")
        write_file(
            path,
            {each: np.asarray(getattr(found, each)) for each in names},
            attrs=told,
            strings=strings,
        )
        return path
    arrays = {"scores": values.astype(np.float32)}
    if self_influence is not None:
        arrays["self_influence"] = self_influence.astype(np.float32)
    if modules is not None:
        arrays["per_module"] = modules.astype(np.float32)
        strings["modules"] = [f"layers.{k}.q_proj" for k in range(modules.shape[1])]
    if tokens is not None:
        arrays |= {"per_token": tokens, "token_offsets": offsets, "token_ids": token_ids}
    write_file(path, arrays, attrs=told, strings=strings)
    return path


#: Texts that would do something if they were taken for markup or script, and hard ones.
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">",
    '</script><script>document.title="owned"</script>',
    "<a href='https://evil.example/'>click</a><b>bold</b><br><!--",
    "${document.title='owned'} {{ 7 * 7 }} %{x} $\\frac{1}{2}$",
    "‮txet desrever ​hidden\u0000\u0007\u001b[31m red  line ends",
    "مرحبا بالعالم، هذا نص عربي طويل مع 123 أرقام",
    "שלום עולם (עם סוגריים) and some English",
    "👩‍👩‍👧‍👦 漢字かな交じり文 ẅ̈́ide " + "verylongwordwithoutanybreak" * 12,
)


def hostile_rows(count: int = len(HOSTILE), kind: str = "row") -> list[dict]:
    """Rows whose ids, groups and texts are all hostile or hard. NUL is no part of an id or group."""
    rows = []
    for k in range(count):
        text = HOSTILE[k % len(HOSTILE)]
        label = text.replace("\u0000", "")
        rows.append(
            {
                "id": f"{kind} {k} {label}"[:300],
                "prompt": text,
                "completion": f" {text}\n{text}",
                "group": label[:120],
            }
        )
    return rows
