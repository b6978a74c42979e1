"""Small runs to interrupt, to resume, and to compare bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import influence
import influence.fitted_point as fitting
from influence import CG, EKFAC, GGN, KFAC, Fisher, Identity, Run
from tests.conftest import build_model, examples, teach

N_ROWS, BUDGET = 24, 30


KINDS = {
    "ekfac": (EKFAC(), "always"),
    "ekfac, two draws": (EKFAC(samples=2), "auto"),
    "ekfac, nothing stored": (EKFAC(), "never"),
    "kfac": (KFAC(), "always"),
    "kfac, nothing stored": (KFAC(samples=2), "never"),
    "fisher": (Fisher(), "always"),
    "fisher of the data's labels": (Fisher(samples=0), "never"),
    "ggn": (GGN(), "always"),
    "ggn, nothing stored": (GGN(), "never"),
    "identity": (Identity(), "always"),
    "ekfac, features": (EKFAC(), "features"),
    "ekfac, some rows": (EKFAC(rows=14), "full"),
    "ekfac, some rows, nothing stored": (EKFAC(rows=14, samples=2), "none"),
    "kfac, some rows, features": (KFAC(rows=14), "features"),
    "ekfac, two points": (EKFAC(), "always"),
    "fisher, two points": (Fisher(), "always"),
}


#: Every curvature, and every way to store or to look again, once; the other kinds are slow tests.
QUICK = [
    "ekfac, two draws",
    "ekfac, nothing stored",
    "kfac",
    "fisher of the data's labels",
    "ggn",
    "identity",
    "ekfac, features",
    "ekfac, some rows",
    "fisher, two points",
]
EVERY_KIND = [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in QUICK)) for kind in KINDS]


class Interruption(Exception):
    """Stands for a kill between two batches."""


@cache
def small_model():
    """One model for all tests, a little trained on its rows, so that they share credit; no test
    changes it.
    """
    options = {"layers": 1, "target_modules": ["q_proj", "v_proj"], "dtype": torch.float32}
    return teach(build_model("llama", **options), examples(N_ROWS), steps=5)


def fit(directory: Path, kind: str = "ekfac", **options) -> Run:
    curvature, store = KINDS[kind]
    path = (0.5, 0.9) if kind.endswith("two points") else (1.0,)
    options = {
        "curvature": curvature,
        "store": store,
        "token_budget": BUDGET,
        "path": path,
    } | options
    return influence.fit(
        options.pop("model", small_model()),
        options.pop("train", examples(N_ROWS)),
        directory=directory,
        **options,
    )


def interrupt_after(monkeypatch, batches: int) -> None:
    """Make the given number of further batches succeed and the next one fail."""
    real, left = fitting.collate, batches

    def collate(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise Interruption
        return real(*arguments, **options)

    monkeypatch.setattr(fitting, "collate", collate)


def interrupted_fit(monkeypatch, directory: Path, batches: int, **options) -> None:
    """A fit that ends after so many batches."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, batches)
        with pytest.raises(Interruption):
            fit(directory, **options)


def times(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*"))}


def arrays(path: Path) -> dict[str, bytes]:
    """Every dataset and attribute of a file, bit for bit (HDF5 may note the time of day beside
    them).
    """

    def bits(value) -> bytes:
        value = np.asarray(value)
        return b"|".join(value.ravel()) if value.dtype == object else value.tobytes()

    contents = {}
    with h5py.File(path) as file:
        contents |= {f"@{name}": bits(value) for name, value in file.attrs.items()}
        file.visititems(
            lambda name, item: contents.update({name: bits(item)} if hasattr(item, "dtype") else {})
        )
    return contents


def same_files(one: Path, other: Path, *names: str) -> None:
    """These files are in both directories with the same arrays, or in neither."""
    for name in names:
        assert (one / name).exists() == (other / name).exists(), name
        if (one / name).exists():
            first, second = arrays(one / name), arrays(other / name)
            assert list(first) == list(second), name
            assert [key for key in first if first[key] != second[key]] == [], name


def solver_of(kind: str):
    """Direct where there is a closed form, else a few steps of CG: enough to compare bits."""
    return CG(max_iterations=2) if kind.startswith(("ggn", "hessian")) else "direct"
