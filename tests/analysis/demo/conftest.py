"""The demo's corpus, and a base of a few weights."""

from __future__ import annotations

import pytest

from analysis.demo.corpus import make_corpus
from analysis.demo.training import train_base


@pytest.fixture(scope="session")
def corpus():
    return make_corpus(0)


@pytest.fixture(scope="session")
def tiny_base(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "base"
    train_base(
        corpus.base_texts[:200], folder, 0, width=32, layers=1, vocabulary=400, epochs=6, lr=1e-2
    )
    return folder
