"""Measured ascents by hand, and a study asked for in Python."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import influence
import unlearn
from analysis.studies.ood import study
from tests.conftest import add_lora, build_base, build_tokenizer, rows
from unlearn.difficulty.measured import Measured

HOSTILE = "evil\x1b[2J[red] </script> {{prompt}} <eos> \u202e$\\frac{\n\nforged  "


def measured(
    start, target, losses, retained=None, heldout=None, levels=(0.5, 1.0), names=None
) -> Measured:
    n, c = len(start), len(levels)
    retained = np.zeros((n, c, 2)) if retained is None else np.asarray(retained, dtype=float)
    heldout = np.zeros((n, c, 0)) if heldout is None else np.asarray(heldout, dtype=float)
    before = np.full(heldout.shape[2], 2.0)
    sample = tuple(f"t{j}" for j in range(retained.shape[2]))
    arrays = (np.asarray(one, dtype=float) for one in (start, target, np.zeros(n), losses, levels))
    names = tuple(f"r{i}" for i in range(n)) if names is None else names
    return Measured(names, *arrays, retained, heldout, np.zeros(len(sample)), before, sample, {})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base/, adapter/, run/ and rows. The recipe takes two epochs."""
    at = tmp_path_factory.mktemp("ood")
    base = build_base("llama", layers=1, dtype=torch.float32)
    base.save_pretrained(at / "base")
    build_tokenizer().save_pretrained(at / "base")
    add_lora(base).save_pretrained(at / "adapter")
    for name, seed, count in (("train", 0, 10), ("heldout", 1, 12), ("other", 2, 8)):
        items = rows(count, seed=seed)
        items[1]["id"] = f"{HOSTILE.strip()}{name}"
        (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    (at / "recipe.json").write_text(json.dumps({"epochs": 2, "batch_size": 8, "lr": 3e-4}))
    model = influence.load(at / "base", at / "adapter", device="cpu")
    influence.fit(
        model, influence.read_examples(at / "train.jsonl"), path=(1.0,), directory=at / "run"
    )
    return at


def ask(made, out, **options):
    run = influence.Run.open(made / "run", device="cpu")
    files = [influence.read_examples(made / f"{name}.jsonl") for name in ("heldout", "other")]
    options = {
        "recipe": unlearn.Recipe.read(made / "recipe.json"),
        "per_kind": 3,
        "resamples": 50,
    } | options
    return study(run, *files, out, **options)
