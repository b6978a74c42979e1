"""Runs that the tests of edits, of their records and of their estimates share, each fitted once."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch

import influence
from influence.adapter import AdaptedModel
from influence.row_files import read_examples
from influence.run import Run
from tests.conftest import build_model, examples, fit_end, rows, teach
from tests.helpers import save, write_rows
from tests.unlearn.edits.helpers import DAMPING, SPECS, GoalRows, random
from unlearn.record.losses import measure
from unlearn.record.version import version
from unlearn.retraining.local import LocalRetraining
from unlearn.retraining.recipe import Recipe


@pytest.fixture(autouse=True, scope="module")
def no_credit_is_prepared(credit_when_asked_for):
    """Few tests here ask for scores."""


class Folder(NamedTuple):
    """A folder with base, adapter, train.jsonl and run, as a user has them, and the model."""

    path: object
    model: AdaptedModel


@pytest.fixture(scope="session")
def fitted_folder(tmp_path_factory) -> Folder:
    """Twelve rows, GPT-2 with one layer in float32, the defaults of `fit`."""
    folder = tmp_path_factory.mktemp("edits")
    base, adapter = save(folder, "gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])
    train = read_examples(write_rows(folder / "train.jsonl", rows(12)))
    # what rows are expected to lose unseen is above what they lose now only if they were learnt
    model = teach(influence.load(base, adapter, device="cpu"), train)
    model.model.save_pretrained(str(adapter))
    model = influence.load(base, adapter, device="cpu")
    influence.fit(model, train, directory=folder / "run")
    return Folder(folder, model)


@pytest.fixture
def run(fitted_folder, tmp_path) -> Run:
    """A copy of that run, to edit and to save to."""
    shutil.copytree(fitted_folder.path / "run", tmp_path / "run")
    return Run.open(tmp_path / "run", model=fitted_folder.model)


@pytest.fixture(scope="session")
def small() -> AdaptedModel:
    """GPT-2 (no float32 inside), one layer, LoRA on its attention input and MLP output."""
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


@pytest.fixture(scope="session")
def mini() -> AdaptedModel:
    """Less than a hundred parameters, for what forms a dense matrix many times."""
    return build_model("gpt2", layers=1, r=1, target_modules=["mlp.c_proj"])


@pytest.fixture(scope="session")
def runs(small, tmp_path_factory):
    """Runs at the adapter itself, by curvature and reduction, each fitted when it is asked for.

    Nothing is saved to them, and no test changes them.
    """
    folder, fitted = tmp_path_factory.mktemp("runs"), {}

    def get(name: str, reduction: str = "token") -> Run:
        if (name, reduction) not in fitted:
            fitted[name, reduction] = fit_end(
                small,
                examples(6),
                curvature=SPECS[name],
                damping=DAMPING.get(name, "mean:0.5"),
                reduction=reduction,
                token_budget=40,
                directory=folder / f"{name}-{reduction}",
            )
        return fitted[name, reduction]

    return get


@pytest.fixture(scope="session", params=["float64", "float32"])
def goal_rows(request, tmp_path_factory) -> GoalRows:
    """Rows with goals, of a run of their own in either precision."""
    dtype = getattr(torch, request.param)
    run = fit_end(
        build_model("gpt2", layers=1, dtype=dtype),
        examples(7),
        curvature=influence.EKFAC(),
        directory=tmp_path_factory.mktemp("goals") / "run",
    )
    start = version(run)
    tokens = start.tokens.select([0, 1, 2, 3, 4, 5, 6])
    factors = np.array([1.05, 1.9, 0.7, 1.3, 1.4, 0.8, 1.2])
    return GoalRows(
        start=start,
        tokens=tokens,
        targets=measure(run.model, tokens).loss * factors,
        rises=np.arange(7) < 5,
        local=LocalRetraining(
            before=start.theta + 0.1 * random(1, len(start.theta)).to(start.theta),
            after=[start.theta + 0.2 * random(i, len(start.theta)).to(start.theta) for i in (2, 3)],
            near=np.zeros(0, dtype=int),
            others=np.zeros(0, dtype=int),
            recipe=Recipe(),
            row_gradients=0,
        ),
        tolerance=1e-10 if dtype == torch.float64 else 1e-5,
    )
