"""Measured ascents by hand, and a study asked for in Python."""

from __future__ import annotations

import numpy as np

import influence
import unlearn
from analysis.studies.ood import study
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


def ask(made, out, **options):
    run = influence.Run.open(made / "run", device="cpu")
    files = [influence.read_examples(made / f"{name}.jsonl") for name in ("heldout", "other")]
    options = {
        "recipe": unlearn.Recipe.read(made / "recipe.json"),
        "per_kind": 3,
        "resamples": 50,
    } | options
    return study(run, *files, out, **options)
