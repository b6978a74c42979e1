"""Training of the demo's adapter: the same seed gives the same, an empty slot changes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import influence
from analysis.demo.training import mean_losses, train_adapter


def tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_same_seed_same_adapter_and_an_empty_slot_changes_it(corpus, tiny_base, tmp_path):
    rows = corpus.train[:20]
    for name, options in {"a": {}, "b": {}, "without": {"absent": {rows[3]["id"]}}}.items():
        train_adapter(tiny_base, rows, tmp_path / name, 0, epochs=2, rank=2, **options)
    a, b, without = (tensors(tmp_path / name) for name in ("a", "b", "without"))
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert any(not np.array_equal(a[key], without[key]) for key in a)


def test_rows_all_absent_leave_the_base(corpus, tiny_base, tmp_path):
    rows = corpus.train[:20]
    train_adapter(
        tiny_base, rows, tmp_path / "none", 0, epochs=1, rank=2, absent={row["id"] for row in rows}
    )
    assert mean_losses(tiny_base, tmp_path / "none", rows) == mean_losses(tiny_base, None, rows)


def test_training_lowers_the_loss_and_the_toolkit_reads_the_adapter(corpus, tiny_base, tmp_path):
    rows = corpus.train[:20]
    train_adapter(tiny_base, rows, tmp_path / "adapter", 0, epochs=15, rank=2, lr=2e-2)
    before = mean_losses(tiny_base, None, rows)
    after = mean_losses(tiny_base, tmp_path / "adapter", rows)
    assert np.mean(after) < np.mean(before) - 0.1
    model = influence.load(str(tiny_base), str(tmp_path / "adapter"), device="cpu")
    found = influence.check_gradients(model, influence.examples_from_rows(rows[:3]))
    assert found.ok


def test_losses_do_not_depend_on_the_batch(corpus, tiny_base):
    rows = corpus.train[:5]
    together = mean_losses(tiny_base, None, rows)
    assert together == pytest.approx(
        [mean_losses(tiny_base, None, [row])[0] for row in rows], rel=1e-5
    )
