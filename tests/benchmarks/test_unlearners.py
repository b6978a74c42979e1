"""The rivals of an edit: each first step against plain autograd, and what it cost."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import build_model, examples, tokens_of
from unlearn.retraining.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import edits  # pyright: ignore[reportMissingImports]
import unlearners  # pyright: ignore[reportMissingImports]
from unlearners import Edited  # pyright: ignore[reportMissingImports]

STEP, RETAINED = 0.1, 4


@pytest.fixture
def case(monkeypatch):
    """Three old contents, two new ones, six untouched rows. Four of these in a step."""
    monkeypatch.setattr(unlearners, "RETAINED", RETAINED)
    model = build_model("llama", layers=1, target_modules=["q_proj", "v_proj"])
    old, new, rest = (
        tokens_of(model, examples(n, seed=seed)) for seed, n in ((0, 3), (1, 2), (2, 6))
    )
    return model, old, new, rest


def token_logs(model, item) -> torch.Tensor:
    """Log-probabilities `[T, V]` at a row's completion tokens, by the model's own forward."""
    ids = torch.as_tensor(np.array(item.input_ids))
    return (
        model.model(input_ids=ids[None])
        .logits[0, :-1]
        .log_softmax(-1)[-int(item.supervised.sum()) :]
    )


def targets(item) -> torch.Tensor:
    return torch.as_tensor(np.array(item.input_ids))[-int(item.supervised.sum()) :]


def cross_entropy(model, rows: Iterable) -> torch.Tensor:
    """Mean over all completion tokens, one row at a time."""
    each = [-token_logs(model, row).gather(1, targets(row)[:, None]) for row in rows]
    return torch.cat(each).mean()


def gradient(model, value) -> torch.Tensor:
    """Flat gradient of `value()` by the LoRA parameters."""
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    gradients = torch.autograd.grad(value(), model.parameters)
    for parameter in model.parameters:
        parameter.requires_grad_(False)
    return torch.cat([part.flatten() for part in gradients])


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / v.norm()


def drawn(rest, seed: int = 0) -> list:
    """The rows that the first step draws."""
    return [
        rest[int(i)] for i in np.random.default_rng(seed).choice(len(rest), RETAINED, replace=False)
    ]


def after_steps(monkeypatch, number: int) -> None:
    monkeypatch.setattr(unlearners, "STEPS", number)


@pytest.mark.parametrize("changed", [False, True], ids=["removed", "changed"])
@pytest.mark.parametrize("name", ["ascent", "ascent_descent", "ascent_kl", "ngdiff"])
def test_first_step_is_the_oracles(case, monkeypatch, name, changed):
    """From the same start, one step: E = CE(old) - CE(new) raised, with each method's own retained
    term.
    """
    model, old, new, rest = case
    after_steps(monkeypatch, 1)
    start = model.snapshot()
    edited = Edited(old, 99.0, new, 0.0) if changed else Edited(old, 99.0)
    outcome = getattr(unlearners, name)(model, edited, rest, np.random.default_rng(0))
    pull = gradient(
        model, lambda: cross_entropy(model, old) - (cross_entropy(model, new) if changed else 0)
    )
    keep = gradient(model, lambda: cross_entropy(model, drawn(rest)))
    expected = {
        "ascent": unit(pull),
        "ascent_descent": unit(pull - keep),
        "ascent_kl": unit(pull),  # at the reference itself the divergence is least
        "ngdiff": unit(pull) - unit(keep),
    }[name]
    torch.testing.assert_close(outcome.theta - start, STEP * expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(model.snapshot(), start)
    assert (outcome.steps, outcome.reached) == (1, False)


def test_gradient_of_the_divergence_from_the_adapter_before(case):
    model, _, _, rest = case
    start = model.snapshot()
    before = [token_logs(model, row).detach() for row in rest]
    there = start + 0.1 * torch.randn(
        len(start), dtype=start.dtype, generator=torch.Generator().manual_seed(0)
    )

    def divergence():
        pairs = zip(before, rest, strict=True)
        return torch.cat(
            [(q.exp() * (q - token_logs(model, row))).sum(-1) for q, row in pairs]
        ).mean()

    cost = unlearners.Cost()
    with model.at(there):
        expected = gradient(model, divergence)
        kl_gradient = unlearners.kl_gradient(model, rest, start, cost)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(kl_gradient, expected, rtol=1e-8, atol=1e-10)
    assert (cost.gradients, cost.forwards) == (6, 6)


def test_second_step_of_ascent_and_kl(case, monkeypatch):
    """The divergence is from the adapter before, on rows drawn anew."""
    model, old, _, rest = case
    after_steps(monkeypatch, 2)
    start = model.snapshot()
    outcome = unlearners.ascent_kl(model, Edited(old, 99.0), rest, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    _, second = (rng.choice(6, RETAINED, replace=False) for _ in range(2))
    rows = [rest[int(i)] for i in second]
    before = [token_logs(model, row).detach() for row in rows]
    with model.at(start + STEP * unit(gradient(model, lambda: cross_entropy(model, old)))):
        middle = model.snapshot()
        value = [(q.exp() * q).sum(-1) for q in before]
        held = gradient(
            model,
            lambda: torch.cat(
                [
                    v - (q.exp() * token_logs(model, row)).sum(-1)
                    for v, q, row in zip(value, before, rows, strict=True)
                ]
            ).mean(),
        )
        pull = gradient(model, lambda: cross_entropy(model, old))
    torch.testing.assert_close(
        outcome.theta, middle + STEP * unit(pull - held), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("seed", range(5))
def test_ngdiff_raises_one_loss_and_not_the_other(seed):
    """`<g_F, d> >= 0 >= <g_R, d>`, whatever the lengths.

    Zero only where both point the same way.
    """
    generator = torch.Generator().manual_seed(seed)
    forget, retain = torch.randn(2, 20, dtype=torch.float64, generator=generator)
    move = unlearners.normalised_difference(1e3 * forget, 1e-3 * (retain + 2 * forget))
    assert forget @ move > 0 > (retain + 2 * forget) @ move
    assert unlearners.normalised_difference(forget, 7 * forget).norm() < 1e-12


def test_costs_are_counted(case, monkeypatch):
    """k steps: k + 1 looks at the edited rows, k times the retained ones.

    KL costs a reference forward, a third, as well.
    """
    model, old, new, rest = case
    after_steps(monkeypatch, 2)
    edited, rng = Edited(old, 99.0, new, 0.0), np.random.default_rng(0)
    assert unlearners.ascent(model, edited, rest, rng).cost.total == 3 * 5
    assert unlearners.ascent_descent(model, edited, rest, rng).cost.total == 3 * 5 + 2 * 4
    assert unlearners.ngdiff(model, edited, rest, rng).cost.total == 3 * 5 + 2 * 4
    kl = unlearners.ascent_kl(model, edited, rest, rng).cost
    assert (kl.gradients, kl.forwards, kl.total) == (23, 8, pytest.approx(23 + 8 / 3))
    assert unlearners.sign_step(model, edited, rest, rng, norm=1.0).cost.total == 5
    assert unlearners.llmeraser(model, edited, rest, rng).cost.total == 5 + 2 * 20


@pytest.mark.parametrize(
    ("budget", "steps", "spent"),
    [(14.9, 1, 10), (17, 2, 17), (23.9, 2, 17), (24, 3, 24), (2, 0, 3)],
)
def test_ngdiff_stays_within_its_budget(case, budget, steps, spent):
    """A look costs 3, each step with the look after it 4 + 3.

    Only the first look is made in any case.
    """
    model, old, _, rest = case
    outcome = unlearners.ngdiff(
        model, Edited(old, 99.0), rest, np.random.default_rng(0), budget=budget
    )
    assert (outcome.steps, outcome.cost.total, outcome.reached) == (steps, spent, False)


def test_steps_end_at_the_target(case):
    """The last step is the first after which the mean loss is high enough.

    At the target nothing is done.
    """
    model, old, _, rest = case

    def loss(theta) -> float:
        with model.at(theta), torch.no_grad():
            return float(np.mean([float(cross_entropy(model, [row])) for row in old]))

    target = loss(model.snapshot()) + 0.3
    outcome = unlearners.ascent(model, Edited(old, target), rest, np.random.default_rng(0))
    assert outcome.reached
    assert outcome.steps > 1
    assert loss(outcome.theta) >= target
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearners, "STEPS", outcome.steps - 1)
        assert (
            loss(
                unlearners.ascent(model, Edited(old, target), rest, np.random.default_rng(0)).theta
            )
            < target
        )
    there = unlearners.ngdiff(model, Edited(old, 0.0), rest, np.random.default_rng(0))
    assert (there.steps, there.reached, there.cost.total) == (0, True, 3)
    assert torch.equal(there.theta, model.snapshot())


def test_what_is_at_its_target_pulls_no_more(case, monkeypatch):
    model, old, new, rest = case
    after_steps(monkeypatch, 1)
    start = model.snapshot()
    outcome = unlearners.ascent(model, Edited(old, 0.0, new, 0.0), rest, np.random.default_rng(0))
    expected = -unit(gradient(model, lambda: cross_entropy(model, new)))
    torch.testing.assert_close(outcome.theta - start, STEP * expected, rtol=1e-8, atol=1e-10)


def test_sign_step_has_the_norm_that_was_asked_for(case):
    """Along the signs of the whole E, also where its targets are reached."""
    model, old, new, rest = case
    start = model.snapshot()
    outcome = unlearners.sign_step(
        model, Edited(old, 0.0, new, 99.0), rest, np.random.default_rng(0), norm=0.7
    )
    delta = outcome.theta - start
    pull = gradient(model, lambda: cross_entropy(model, old) - cross_entropy(model, new))
    assert float(delta.norm()) == pytest.approx(0.7, rel=1e-12)
    clear = pull.abs() > 1e-12
    assert torch.equal(delta.sign()[clear], pull.sign()[clear])
    assert float(delta[clear].abs().max() / delta[clear].abs().min()) == pytest.approx(1)


def test_finetuning_is_adamw_on_the_rows_after_the_edit(case):
    """Three steps by a clock that ticks a quarter of the time: 3/4, 1/2, 1/4 of the rate."""
    model, old, new, rest = case
    recipe, start, ticks = Recipe(lr=0.01, batch_size=5), model.snapshot(), itertools.count()
    outcome = unlearners.finetune(
        model,
        Edited(old, 99.0, new, 0.0),
        rest,
        np.random.default_rng(3),
        seconds=4.0,
        recipe=recipe,
        clock=lambda: float(next(ticks)),
    )
    rows, rng = [*rest, *new], np.random.default_rng(3)
    order = rng.permutation(8)
    theta = start.clone().requires_grad_(True)
    m = v = torch.zeros_like(start)
    values = start.clone()
    batches = [order[:5], order[5:], rng.permutation(8)[:5]]
    for k, batch in enumerate(batches, start=1):
        with model.at(values):
            g = gradient(model, lambda batch=batch: cross_entropy(model, [rows[i] for i in batch]))
        rate = 0.01 * (1 - k / 4)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
        values = values * (1 - rate * 0.01) - rate * step
    assert theta.grad is None
    torch.testing.assert_close(outcome.theta, values, rtol=1e-8, atol=1e-10)
    assert (outcome.steps, outcome.cost.total) == (3, 13)
    assert torch.equal(model.snapshot(), start)


def test_llmeraser_is_the_loop_of_the_released_code(case):
    """Adam written out, the product by a dense Hessian.

    Its first step is the sign of b, for 1/2 H x is small.
    """
    model, old, new, rest = case
    start = model.snapshot()
    outcome = unlearners.llmeraser(
        model, Edited(old, 99.0, new, 0.0), rest, np.random.default_rng(5)
    )
    rows = [*rest, *old]

    def mean_of_each(some):
        return sum(cross_entropy(model, [row]) for row in some)

    b = gradient(model, lambda: (mean_of_each(old) - mean_of_each(new)) / len(rows))
    shapes = [leaf.shape for leaf in model.space.leaves]
    names = [
        name
        for name, p in model.model.named_parameters()
        if any(p is parameter for parameter in model.parameters)
    ]
    assert [tuple(dict(model.model.named_parameters())[name].shape) for name in names] == [
        tuple(s) for s in shapes
    ]

    def loss_at(flat, row):
        values = dict(zip(names, model.space.split(flat), strict=True))
        ids = torch.as_tensor(np.array(row.input_ids))
        logits = torch.func.functional_call(
            model.model, values, kwargs={"input_ids": ids[None]}
        ).logits[0, :-1]
        logs = logits.log_softmax(-1)[-int(row.supervised.sum()) :]
        return -logs.gather(1, targets(row)[:, None]).mean()

    x = torch.full_like(start, 1e-5)
    m = v = torch.zeros_like(start)
    order = np.random.default_rng(5).permutation(len(rows))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for k in range(1, 21):
            row = rows[order[(k - 1) % len(rows)]]
            product = torch.func.jvp(
                torch.func.grad(lambda flat, row=row: loss_at(flat, row)), (start,), (x,)
            )[1]
            g = product / 2 - b + 1e-5 * x
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            x = x - 1e-5 * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    torch.testing.assert_close(outcome.theta - start, x, rtol=1e-6, atol=1e-10)
    assert torch.equal(model.snapshot(), start)


# ---- what edits.py measures ----------------------------------------------------------------------


def test_membership_is_signed():
    """Of 2 x 3 pairs: known rows are below all others. One tie counts a half."""
    others = np.array([2.0, 3.0, 4.0])
    assert edits.membership(np.array([0.5, 1.0]), others) == 1
    assert edits.membership(np.array([9.0, 9.0]), others) == 0
    assert edits.membership(np.array([3.0, 5.0]), others) == pytest.approx(1.5 / 6)


def test_divergence_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2, and zero at the second token: half of
    it.
    """
    p, q = (
        torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log(),
        torch.tensor([[0.25, 0.75], [0.1, 0.9]]).log(),
    )
    assert edits.divergence(p, q) == pytest.approx((np.log(2) + np.log(2 / 3)) / 4, rel=1e-5)


def test_a_cell_says_how_many_cases_it_is_of():
    rows = [{"old": 1.0}, {"old": 2.0}, {"note": "failed"}]
    assert edits.cell(rows, "old") == "1.50 [1.00, 2.00] (2 of 3)"
    assert edits.cell([{"note": "failed"}], "old") == "-"
