"""What the tests of influence share."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

import influence
from tests.conftest import examples, rows
from tests.helpers import save
from tests.influence.toy_commands import make_folder
from tests.influence.toy_runs import N_ROWS


class Double:
    """numpy with float64 under the name of float32: scores that no storing has rounded."""

    float32 = np.float64

    def __getattr__(self, name):
        return getattr(np, name)


@pytest.fixture
def double(monkeypatch):
    """Scores in float64, to be compared with oracles as closely as that."""
    monkeypatch.setattr("influence.scores.np", Double())
    monkeypatch.setattr("influence.scorefile.np", Double())
    monkeypatch.setattr("influence.tokenwise.np", Double())


@pytest.fixture
def command(monkeypatch, run_main):
    """Call the `influence` command in this process: status, standard output, standard error."""
    from influence.cli import main

    for name in (
        "TOKENIZERS_PARALLELISM",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "TRANSFORMERS_VERBOSITY",
    ):
        monkeypatch.setenv(name, os.environ.get(name, "false" if name.startswith("TOK") else "1"))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    return lambda *arguments: run_main(main, "influence", *arguments)


@pytest.fixture(autouse=True)
def one_thread():
    """Bits are compared here, and these models are too small for threads to pay."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folders(tmp_path):
    """A base, an adapter and rows on disk, and a run made from them."""
    base, adapter = save(tmp_path, layers=1, target_modules=["q_proj", "v_proj"])
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(N_ROWS)))
    loaded = influence.load(base, adapter, device="cpu")
    influence.fit(loaded, influence.read_examples(data), directory=tmp_path / "run").score(
        examples(2, seed=9), out=tmp_path / "run" / "scores.h5"
    )
    return tmp_path


@pytest.fixture(name="influence")
def named_as_it_is_typed(command):
    """The `influence` command, under its own name."""
    return command


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder as users of the command have it, with a run that was scored."""
    return make_folder(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def at(made, tmp_path):
    """A copy of `made` to spoil. The manifest records the paths of the original."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"
