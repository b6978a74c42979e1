"""What is measured before a fit: batches in a linear model, and the pieces that follow the pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from influence import EKFAC, Fisher, probe
from influence.batches import plan_batches
from influence.fit_plan import FitPlan
from influence.manifest import ROW_BYTES
from influence.prepared import DISK_BUDGET, prepare
from influence.probe import BatchTime, Memory, OneBlock, features, measure, tried
from tests.conftest import examples, tokens_of
from tests.influence.toy_runs import BUDGET, N_ROWS, small_model
from tests.influence.toy_tokenizers import random_tokens

CPU = torch.device("cpu")


def prepared_fit(curvature=None, **changes):
    """A fit of the small model that is about to begin, and its plan."""
    names = ("path", "optimizer", "max_length", "supervise", "trainer_output")
    options: dict[str, Any] = dict.fromkeys(names) | {
        "curvature": curvature or EKFAC(),
        "damping": "mean:0.1",
        "reduction": "token",
        "checkpoints": (),
        "geometry": "raw",
        "token_budget": BUDGET,
        "store": "always",
        "disk_budget": DISK_BUDGET,
        "row_bytes": ROW_BYTES,
        "seed": 0,
    }
    prepared = prepare(small_model(), examples(N_ROWS), **(options | changes))
    plan = FitPlan.of(
        prepared.model,
        prepared.tokens,
        prepared.curvature,
        points=len(prepared.places),
        store=prepared.manifest.store,
        disk_budget=DISK_BUDGET,
    )
    return prepared, plan


def test_the_seconds_of_batches_are_found_again():
    """Any non-negative mixture of the four parts, from five of the plan's batches."""
    tokens = random_tokens(0)
    plan = plan_batches(tokens, 600)
    true = np.array([0.01, 2e-4, 5e-4, 1e-7])
    seconds = features(tokens, plan) @ true
    some = [plan[number] for number in (0, 3, 6, 9, len(plan) - 1)]
    found = BatchTime.of(features(tokens, some), features(tokens, some) @ true)
    assert found.seconds(tokens, plan) == pytest.approx(seconds.sum(), rel=0.01)
    assert (found.each >= 0).all()
    assert found.seconds(tokens, []) == 0


def test_features_are_counted_row_by_row():
    tokens = random_tokens(1)
    rows = np.array([5, 2, 9])
    longest = max(len(tokens[i]) for i in rows)
    seen = sum(int(tokens[i].supervised.sum()) for i in rows)
    np.testing.assert_array_equal(
        features(tokens, [rows]), [[1, 3 * longest, seen, 3 * longest**2]]
    )


def test_the_largest_batch_is_tried_first_and_once_more():
    assert tried(100) == [0, 99, 0, 49, 24, 74, 12, 86]
    assert tried(1) == [0, 0, 0]
    assert tried(2) == [0, 1, 0]


class Clock:
    """Seconds that the model's own work makes: so many a token of each forward."""

    def __init__(self, monkeypatch, model, each: float) -> None:
        self.seconds, self.tokens = 0.0, 0
        base = model.model.get_base_model()
        forward = base.forward

        def counted(*args, **kwargs):
            count = kwargs["input_ids"].numel()
            self.tokens += count
            self.seconds += each * count
            return forward(*args, **kwargs)

        monkeypatch.setattr(base, "forward", counted)
        monkeypatch.setattr(probe, "CLOCK", lambda: self.seconds)


def test_the_first_pass_is_as_long_as_its_tokens(tmp_path, monkeypatch):
    """By a clock that the forwards turn. A row's last token is no input: hence the slack."""
    prepared, plan = prepared_fit()
    clock = Clock(monkeypatch, prepared.model, 1e-3)
    speeds = measure(prepared, plan, tmp_path)
    batches = plan.batches(prepared.model, prepared.tokens, BUDGET)
    seconds = speeds.batch.seconds(prepared.tokens, batches)
    inputs = sum(len(rows) * (int(prepared.tokens.lengths[rows].max()) - 1) for rows in batches)
    assert seconds == pytest.approx(1e-3 * inputs, rel=0.1)
    for name in ("gradients", "forward", "drawn", "stores", "again", "leaves"):
        assert getattr(speeds.ratios, name) == pytest.approx(1), name
    assert clock.tokens > 0


def test_a_slow_model_runs_few_batches(tmp_path, monkeypatch):
    prepared, plan = prepared_fit()
    for name in ("quick", "slow"):
        (tmp_path / name).mkdir()
    quick = Clock(monkeypatch, prepared.model, 1e-6)
    measure(prepared, plan, tmp_path / "quick")
    slow = Clock(monkeypatch, prepared.model, 10.0)
    speeds = measure(prepared, plan, tmp_path / "slow")
    assert slow.tokens < quick.tokens - 5 * BUDGET
    batches = plan.batches(prepared.model, prepared.tokens, BUDGET)
    inputs = sum(len(rows) * int(prepared.tokens.lengths[rows].max()) for rows in batches)
    assert speeds.batch.seconds(prepared.tokens, batches) == pytest.approx(10.0 * inputs, rel=0.3)


@pytest.mark.parametrize("curvature", [EKFAC(), Fisher()])
@pytest.mark.parametrize("store", ["always", "never"])
def test_the_adapter_is_where_it_was_and_every_speed_is_positive(tmp_path, curvature, store):
    prepared, plan = prepared_fit(curvature, store=store)
    before = prepared.model.snapshot()
    speeds = measure(prepared, plan, tmp_path)
    assert torch.equal(prepared.model.snapshot(), before)
    positive = ("finish", "row", "solve", "multiply", "invert", "read", "write", "memory")
    for name in positive:
        assert getattr(speeds, name) > 0, name
    for name in ("gradients", "forward", "leaves", "drawn"):
        assert getattr(speeds.ratios, name) > 0, name
    assert (speeds.ratios.again > 0) == plan.looks_again
    assert (speeds.ratios.stores > 0) == (plan.store == "full")
    few = speeds.features
    assert (few.keep > 0, few.decode > 0, few.coordinates > 0) == (plan.whitens,) * 3


def test_what_is_large_is_told_from_a_piece(tmp_path, monkeypatch):
    """Where decompositions would take too long they are not made, and their time is d^3's."""
    monkeypatch.setattr(probe, "FINISH_SECONDS", -1.0)
    monkeypatch.setattr(probe, "TRIED_ORDER", 8)
    prepared, plan = prepared_fit()
    orders = []
    eigh = torch.linalg.eigh

    def noted(matrix, *args, **kwargs):
        orders.append(len(matrix))
        return eigh(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", noted)
    speeds = measure(prepared, plan, tmp_path)
    assert max(orders) == 8 < max(speeds.after.decomposed)
    assert not list(tmp_path.glob("factors*"))
    assert speeds.finish > 0
    assert speeds.solve == speeds.after.solve_products / speeds.multiply


def test_a_block_is_timed_while_others_have_it(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(probe, "CLOCK", lambda: clock[0])
    rows = OneBlock(torch.zeros(4, 2), [])
    for number, block in enumerate(rows):
        assert block.shape == (4, 2)
        clock[0] += (5.0, 2.0, 3.0)[number]
    assert (rows.seconds, rows.total) == (2.0, 10.0)
    assert len(rows.weights) == 12


def test_memory_tells_what_was_held_in_between():
    memory = Memory(CPU)
    held = memory.now()
    memory.reset()
    torch.ones(16 << 20).sum()  # 64 MB that are gone again
    assert 60e6 < memory.most() - held < 150e6


def test_disk_speeds_leave_no_file(tmp_path):
    read, write = probe.disk_speeds(tmp_path / "disk")
    assert read > 1e6
    assert write > 1e5
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_the_toy_are_those_of_the_fit():
    prepared, _ = prepared_fit()
    tokens = tokens_of(prepared.model, examples(N_ROWS))
    assert prepared.tokens.digest == tokens.digest
