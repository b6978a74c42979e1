"""The parts of a study of planted rows that take long, each kept in its folder and used again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.studies.planting import Planted, write_rows
from influence.adapter import AdaptedModel
from influence.curvature import PLAIN, SPECIFICATIONS
from influence.errors import InputError, MismatchError, StoreError
from influence.fitting import fit
from influence.loss import mean_losses
from influence.path import END, read_parameters
from influence.progress import say
from influence.row_files import read_examples
from influence.rows import Examples
from influence.run import Run
from influence.store import read_json, write_json
from unlearn.retraining.recipe import Recipe, recorded_recipe
from unlearn.retraining.retrain import fresh_adapter, retrain, train

#: What a study makes in its folder, beside kinds.json and reference-1, reference-2 ...
PARTS = (
    "train.jsonl",
    "adapter",
    "run",
    "difficulty.h5",
    "groups.h5",
    "ood.csv",
    "ood.json",
    "ood.png",
)


def claim(out: Path, run: Run, planted: Planted, recipe: Recipe, overwrite: bool) -> None:
    """Write rows and kinds into the folder, or accept those of the same request.

    With `overwrite` what belongs to another request is cleared away; what is not a study's never
    is.
    """
    request = {"run": run.digest, "rows": planted.rows.digest, "recipe": recipe.as_json()}
    request = json.loads(json.dumps(request))  # as a file holds it
    path, kept_request = out / "kinds.json", None
    candidates = [*(out / name for name in PARTS), *out.glob("reference-*")]
    parts = [part for part in candidates if part.exists()]
    if path.exists():
        kept_request = read_json(path).get("request")
    if not isinstance(kept_request, dict):
        _refuse_foreign(out, [path] if path.exists() else parts, overwrite)
        kept_request = {}
    differing = [key for key, value in request.items() if kept_request.get(key) != value]
    if kept_request and differing and not overwrite:
        raise MismatchError(
            f"{out} is of another study: {', '.join(differing)} differ. Ask for the same one to go "
            "on, give another --out, or --overwrite"
        )
    if differing:
        for part in parts:
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        record = {"kinds": planted.kinds, "partners": planted.partners, "tokens": planted.tokens}
        write_json(path, {"request": request, **record})
    if not (out / "train.jsonl").exists():
        write_rows(planted.rows, out / "train.jsonl")


def _refuse_foreign(out: Path, parts: list[Path], overwrite: bool) -> None:
    """Refuse a folder that no study made: with files of a study's names, or, unasked, with any."""
    if parts:
        names = ", ".join(part.name for part in parts)
        raise InputError(
            f"{out} has {names} of something else, which a study would replace: give another --out"
        )
    if any(out.iterdir()) and not overwrite:
        raise InputError(
            f"{out} is not empty and holds no study: give another --out, or --overwrite"
        )


def planted_run(out: Path, run: Run, planted: Planted, recipe: Recipe) -> Run:
    """A run on the adapter trained with the planted rows, which is trained if it is not there."""
    folder, manifest = out / "adapter", run.manifest
    devices = [run.model.device] if run.model.device.type == "cuda" else []
    rows = read_examples(out / "train.jsonl")
    if rows.digest != planted.rows.digest:
        raise StoreError(
            f"{out / 'train.jsonl'} is not what was written there: give --overwrite after moving "
            f"{out} away"
        )
    with torch.random.fork_rng(devices=devices):
        model = fresh_adapter(run.model, recipe.seed)
        if not (folder / "retrain.json").exists():
            say(f"training the adapter with {len(planted.kinds)} planted rows")
            loss = train(model, run.tokenized(rows), recipe)
            _save(model, folder, rows, recipe, loss)
    model.restore(read_parameters(model, folder))
    return fit(
        replace(model, adapter=str(folder.resolve())),
        rows,
        directory=out / "run",
        curvature=SPECIFICATIONS[PLAIN](),  # a curvature would go unused: scores are not asked for
        path=END,
        reduction=manifest.objective.reduction,
        max_length=manifest.objective.max_length,
        supervise=manifest.objective.supervise,
        token_budget=run.token_budget,
        store="never",
    )


def _save(model: AdaptedModel, folder: Path, rows: Examples, recipe: Recipe, loss: object) -> None:
    """Write the adapter and how it was trained, whole or not at all."""
    partial = folder.with_name("adapter.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
    record = {"rows": len(rows), "epoch": recipe.last_epoch(len(rows)), "loss": loss}
    record["recipe"] = recipe.as_json()
    write_json(partial / "retrain.json", record)
    partial.rename(folder)


def reference_losses(
    out: Path, run: Run, planted: Planted, recipe: Recipe, references: int
) -> NDArray[np.float64]:
    """Losses [K, n] of the planted rows under adapters that never saw them.

    Adapters that are not there yet are trained.

    The run's own adapter is the first one if it is recorded to be the recipe's result.
    """
    tokens, budget = run.tokenized(planted.planted_rows), run.token_budget
    losses = []
    for k in range(references):
        folder = out / f"reference-{k + 1}"
        if k == 0 and recorded_recipe(run, exact=True) == recipe:
            theta = run.model.snapshot()
        else:
            if not (folder / "retrain.json").exists():
                say(f"training reference adapter {k + 1} of {references}")
                retrain(run, out=folder, recipe=replace(recipe, seed=recipe.seed + k))
            theta = read_parameters(run.model, folder)
        with run.model.at(theta):
            losses.append(mean_losses(run.model, tokens, token_budget=budget))
    return np.array(losses)
