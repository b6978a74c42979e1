"""The loop of gradient-based unlearning against plain torch: steps, stopping, resuming, processes, and what it leaves alone."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import influence
import unlearn
from influence.errors import InputError, MismatchError, NumericalError, StoreError
from influence.path import scaled
from influence.rows import read_examples
from influence.run import Run
from tests.conftest import build_tokenizer, rows
from tests.influence.test_adapter import save
from tests.influence.test_cli import write_rows
from tests.influence.test_store import untouched
from tests.unlearn.edits.test_edits import Counter
from unlearn.methods import automatic_rate, loop
from unlearn.methods.batches import TermBatches
from unlearn.methods.combine import Normalised, Step, Weighted
from unlearn.methods.methods import METHODS, Method, method_of
from unlearn.methods.targets import Target
from unlearn.methods.terms import Term, ascent, descent, divergence


def some_slow(cases, quick):
    """The cases, those beyond `quick` marked as slow."""
    return [
        case
        if case in quick
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


ROWS, FORGET = 12, ["r0-1", "r0-4", "r0-6"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base, adapter and train.jsonl; for each type the model and a run of it."""
    at = tmp_path_factory.mktemp("loop")
    base, adapter = save(at, layers=1, target_modules=["q_proj", "v_proj"])
    train = read_examples(write_rows(at / "train.jsonl", rows(ROWS)))
    models = {}
    for dtype in ("float64", "float32"):
        models[dtype] = influence.load(base, adapter, dtype=dtype, device="cpu")
        influence.fit(models[dtype], train, directory=at / dtype, path=(0.6,))
    return at, models


def opened(made, tmp_path, dtype: str) -> Run:
    at, models = made
    shutil.copytree(at / dtype, tmp_path / f"run-{dtype}")
    return Run.open(tmp_path / f"run-{dtype}", model=models[dtype])


@pytest.fixture
def run(made, tmp_path):
    """A float64 run of its own."""
    return opened(made, tmp_path, "float64")


@pytest.fixture
def single(made, tmp_path):
    """A float32 run of its own."""
    return opened(made, tmp_path, "float32")


def train(run, method: Any = "ga", ids=None, **options):
    """Three steps, unless told otherwise."""
    if "steps" not in options:
        options = {"until": "steps=3"} | options
    return unlearn.train(run, method, FORGET if ids is None else ids, **options)


def close(a, b, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the oracle: PEFT's model, one row at a time, torch.optim ------------------------------------------------


class Oracle:
    """A second copy of the adapter, loaded by PEFT itself, trained row by row."""

    def __init__(self, run: Run) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        adapter = run.manifest["adapter"]["path"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = AutoModelForCausalLM.from_pretrained(
                Path(adapter).parent / "base", dtype=torch.float64
            )
            self.model = PeftModel.from_pretrained(base, adapter, is_trainable=True).double().eval()
        named = dict(self.model.named_parameters())
        self.parameters = [
            named[f"base_model.model.{leaf.name}.default.weight"] for leaf in run.model.space.leaves
        ]
        assert sum(p.numel() for p in self.parameters) == sum(
            p.numel() for p in named.values() if p.requires_grad
        )
        vocabulary = build_tokenizer().get_vocab()
        self.rows = {}
        for row in rows(ROWS):
            prompt, answer = (
                [vocabulary[word] for word in row[key].split()] for key in ("prompt", "completion")
            )
            self.rows[row["id"]] = (torch.tensor([*prompt, *answer, 1]), len(answer) + 1)
        self.before = {id: self.logs(id).detach() for id in self.rows}

    def logs(self, id: str) -> torch.Tensor:
        """Log-probabilities `[T, V]` at the completion's tokens."""
        ids, count = self.rows[id]
        return self.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[-count:]

    def labels(self, id: str) -> torch.Tensor:
        ids, count = self.rows[id]
        return ids[-count:]

    def losses(self, id: str, logs=None) -> torch.Tensor:
        return -(self.logs(id) if logs is None else logs).gather(1, self.labels(id)[:, None])[:, 0]

    def mean(self, ids) -> torch.Tensor:
        return torch.cat([self.losses(id) for id in ids]).mean()

    def theta(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])

    @torch.no_grad()
    def put(self, theta) -> None:
        for p, own in zip(
            self.parameters, theta.split([p.numel() for p in self.parameters]), strict=True
        ):
            p.copy_(own.reshape(p.shape))

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, self.parameters)])

    # terms

    def descent(self, ids):
        return self.mean(ids)

    def ascent(self, ids):
        return -self.mean(ids)

    def divergence(self, ids):
        """KL(before || model)."""
        each = [(self.before[id].exp() * (self.before[id] - self.logs(id))).sum(-1) for id in ids]
        return torch.cat(each).mean()

    def npo(self, ids, beta=0.1):
        """`(2/beta) log(1 + (p/p_ref)^beta)`, p of whole rows: as the paper writes it, by exponentials."""
        each = []
        for id in ids:
            ratio = (self.losses(id, self.before[id]).sum() - self.losses(id).sum()).exp()
            each.append(2 / beta * (1 + ratio**beta).log())
        return torch.stack(each).mean()

    def simnpo(self, ids, beta=2.5, gamma=0.0):
        each = [2 / beta * (1 + (gamma - beta * self.losses(id).mean()).exp()).log() for id in ids]
        return torch.stack(each).mean()

    def matching(self, ids, goals):
        """KL(q || p), q between the base's and the adapter's logits such that the row's loss is its goal."""
        each = []
        for id in ids:
            q = self.predicted(id, goals[id])
            each.append((q.exp() * (q - self.logs(id))).sum(-1))
        return torch.cat(each).mean()

    @torch.no_grad()
    def predicted(self, id, goal):
        ids, count = self.rows[id]
        with self.model.disable_adapter():
            base = self.model(input_ids=ids[None]).logits[0, :-1][-count:]
        adapter = self.before[id]  # up to a constant of each token, which no softmax sees
        low, high = -1.0, 1.0
        for _ in range(20):
            half = (low + high) / 2
            mixed = (base + half * (adapter - base)).log_softmax(-1)
            above = self.losses(id, mixed).mean() > goal
            low, high = (half, high) if above else (low, half)
        return (base + high * (adapter - base)).log_softmax(-1)

    def walk(
        self, direction, steps, optimizer="Adam", lr=1e-3, schedule="constant", warmup=0, clip=None
    ):
        """Gradients of `direction(step, theta)` through an optimizer of torch at rates written out."""
        taken = getattr(torch.optim, optimizer)(self.parameters, lr=lr)
        for k in range(steps):
            rate = lr
            if k < warmup:
                rate = lr * (k + 1) / warmup
            elif schedule != "constant":
                done = (k - warmup) / (steps - warmup)
                rate = (
                    lr
                    * {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[schedule]
                )
            g = direction(k, self.theta())
            if clip is not None and g.norm() > clip:
                g = clip * g / g.norm()
            sizes = [p.numel() for p in self.parameters]
            for p, own in zip(self.parameters, g.split(sizes), strict=True):
                p.grad = own.reshape(p.shape).clone()
            for group in taken.param_groups:
                group["lr"] = rate
            taken.step()
        return self.theta()


KEPT = [f"r0-{i}" for i in range(ROWS) if f"r0-{i}" not in FORGET]


def cut(ids, size: int, stream: int, seed: int = 0):
    """Batches of `size` rows: an epoch's permutation, keyed by seed, side and epoch."""

    def at(step: int) -> list[str]:
        each = math.ceil(len(ids) / size)
        order = np.random.default_rng([seed, stream, step // each]).permutation(len(ids))
        return [ids[i] for i in order[(step % each) * size : (step % each + 1) * size]]

    return at


def unit(v):
    return v / v.norm()


COMPOSED = {
    "ga": ("ascent", None),
    "ga-gd": ("ascent", "descent"),
    "ga-kl": ("ascent", "divergence"),
    "npo": ("npo", "descent"),
    "simnpo": ("simnpo", "descent"),
}
HOW = [
    {"lr": 0.01},
    {"lr": 0.3, "optimizer": "SGD", "schedule": "cosine", "warmup": 2, "max_grad_norm": 0.7},
    {"lr": 0.02, "optimizer": "AdamW", "schedule": "linear", "warmup": 1, "max_grad_norm": 0.1},
]


def oracle_options(how):
    return {("clip" if key == "max_grad_norm" else key): value for key, value in how.items()}


@pytest.mark.parametrize("how", HOW, ids=["Adam", "SGD", "AdamW"])
@pytest.mark.parametrize("name", COMPOSED)
def test_steps_are_those_of_plain_torch(run, name, how):
    """Five steps on two forget rows of three and four kept rows of nine, beyond the end of the forget rows' epochs."""
    found = train(run, name, until="steps=5", batch_size=2, retain_batch_size=4, **how)
    oracle = Oracle(run)
    forget, retain = COMPOSED[name]
    some, kept, seen = cut(FORGET, 2, 31), cut(KEPT, 4, 32), []

    def direction(step, theta):
        value = getattr(oracle, forget)(some(step))
        g = oracle.gradient(value)
        other = None
        if retain is not None:
            other = getattr(oracle, retain)(kept(step))
            h = oracle.gradient(other)
            g = g + h
        seen.append(
            (
                float(value.detach()),
                None if other is None else float(other.detach()),
                float(g.norm()),
            )
        )
        return g

    start = oracle.theta()
    end = oracle.walk(direction, 5, **oracle_options(how))
    assert float((end - start).norm()) > 1e-3
    close(found.theta, end)
    close(found.delta, end - start)
    for entry, (value, other, norm) in zip(found.log, seen, strict=True):
        assert entry["forget_term"] == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert entry["retain_term"] == (
            None if other is None else pytest.approx(other, rel=1e-9, abs=1e-12)
        )
        clip = how.get("max_grad_norm") or math.inf
        assert entry["direction_norm"] == pytest.approx(min(norm, clip), rel=1e-9)


@pytest.mark.parametrize("seed", [0, 5])
def test_ngdiff_at_a_fixed_rate_is_plain_torch(run, seed):
    found = train(
        run, "ngdiff", until="steps=4", lr=0.1, batch_size=2, retain_batch_size=4, seed=seed
    )
    oracle = Oracle(run)
    some, kept = cut(FORGET, 2, 31, seed), cut(KEPT, 4, 32, seed)
    norms, cosines = [], []

    def direction(step, theta):
        g_f, g_r = (
            oracle.gradient(oracle.descent(some(step))),
            oracle.gradient(oracle.descent(kept(step))),
        )
        norms.append((float(g_f.norm()), float(g_r.norm())))
        cosines.append(-float(unit(g_f) @ unit(g_r)))
        return unit(g_r) - unit(g_f)

    close(found.theta, oracle.walk(direction, 4, "SGD", 0.1))
    assert [(e["forget_norm"], e["retain_norm"]) for e in found.log] == [
        pytest.approx(pair) for pair in norms
    ]
    assert [e["cosine"] for e in found.log] == pytest.approx(cosines)


def test_ngdiff_with_its_automatic_rate_is_plain_torch(run):
    """Twelve steps: the rate, at first such that the move has `stride`, is found at the first and the eleventh step."""
    found = train(run, "ngdiff", until="steps=12", batch_size=2, retain_batch_size=4)
    oracle = Oracle(run)
    some, kept = cut(FORGET, 2, 31), cut(KEPT, 4, 32)
    rate, rates = None, []
    for step in range(12):
        g_f, g_r = (
            oracle.gradient(oracle.descent(some(step))),
            oracle.gradient(oracle.descent(kept(step))),
        )
        theta, u = oracle.theta(), -(unit(g_r) - unit(g_f))
        if rate is None:
            rate = METHODS["ngdiff"]().stride * float(theta.norm() / u.norm())
        if step % 10 == 0:
            points, losses = np.array([-1, -0.5, 0, 0.5, 1]), []
            for s in points:
                oracle.put(theta + s * rate * u)
                losses.append(float(oracle.mean(kept(step)).detach()))
            c, b, a = np.polyfit(points, losses, 2)
            explained = 1 - ((losses - np.polyval([c, b, a], points)) ** 2).sum() / (
                5 * np.var(losses)
            )
            if b < 0 < c and explained >= 0.95:
                rate *= math.sqrt(min(max(-b / (2 * c), 0.5), 2.0))
        rates.append(rate)
        oracle.put(theta + rate * u)
    assert len(set(rates)) > 1
    assert [entry["lr"] for entry in found.log] == pytest.approx(rates, rel=1e-9)
    close(found.theta, oracle.theta())
    assert found.report["method"]["lr"] == "auto"


def test_l1_sparse_is_plain_torch(run):
    """No forget row is run; the penalty of step t of T is c (1 - t/T)."""
    method = method_of("l1-sparse", penalty=0.05)
    found = train(run, method, until="steps=4", lr=0.02, optimizer="SGD", retain_batch_size=4)
    oracle, kept = Oracle(run), cut(KEPT, 4, 32)
    end = oracle.walk(
        lambda k, theta: (
            oracle.gradient(oracle.descent(kept(k))) + 0.05 * (1 - k / 4) * torch.sign(theta)
        ),
        4,
        "SGD",
        0.02,
    )
    close(found.theta, end)
    assert all(entry["forget_rows"] == 0 and entry["forget_term"] is None for entry in found.log)


def test_datamodel_matching_is_plain_torch(run):
    """The goals are the record's; q, both terms and the steps are the oracle's own."""
    found = train(
        run, "datamodel-matching", until="steps=4", lr=0.02, batch_size=2, retain_batch_size=4
    )
    oracle = Oracle(run)
    some, kept = cut(FORGET, 2, 31), cut(KEPT, 4, 32)
    rho, goals = found.report["method"]["rho"], {}
    for row in found.report["rows"]:
        rise = max(0.0, rho * row["base"] - row["before"])
        goals[row["id"]] = row["before"] + rise * row["share"]
    assert any(goals[row["id"]] > row["before"] + 0.01 for row in found.report["rows"])

    def direction(step, theta):
        return oracle.gradient(oracle.matching(some(step), goals)) + oracle.gradient(
            oracle.divergence(kept(step))
        )

    close(found.theta, oracle.walk(direction, 4, lr=0.02))


def test_task_arithmetic_goes_the_other_way(run):
    """As far as brings the forget rows to the base's loss (here by halves of 1/128), or by a number."""
    fixed = train(run, method_of("task-arithmetic", scale=0.7), until="steps=3", lr=0.02)
    oracle = Oracle(run)
    start = oracle.theta()
    tuned = oracle.walk(lambda k, _: oracle.gradient(oracle.descent(FORGET)), 3, lr=0.02) - start
    close(fixed.delta, -0.7 * tuned)
    found = train(run, "task-arithmetic", until="steps=3", lr=0.02)
    share = -float(found.delta @ tuned / (tuned @ tuned))
    close(found.delta, -share * tuned, 1e-8)
    goal = np.mean([max(row["before"], row["base"]) for row in found.report["rows"]])

    def loss(a):
        oracle.put(start - a * tuned)
        with torch.no_grad():
            return np.mean([float(oracle.losses(id).mean()) for id in FORGET])

    step = 1 / 128 if share <= 1 else 2 ** (math.ceil(math.log2(share)) - 1) / 128
    assert loss(share) >= goal - 1e-6 or share == 16
    assert loss(share - 1.01 * step) < goal or share == 16


def test_control_keeps_the_retained_likelihood(run):
    """Ascent far enough to break the bar, mixed back until it just holds."""
    free = train(run, "ga", until="steps=6", lr=0.05)
    found = train(run, "ga", until="steps=6", lr=0.05, control=0.97)
    share = float(found.delta @ free.delta / (free.delta @ free.delta))
    close(found.delta, share * free.delta, 1e-8)
    allowed = found.report["losses"]["retained"]["before"] - math.log(0.97)
    assert free.report["losses"]["retained"]["after"] > allowed
    assert 0 < share < 1
    assert found.report["losses"]["retained"]["after"] <= allowed
    with run.model.at(run.model.snapshot() + (share + 1.01 / 128) * free.delta):
        tokens = run.tokens.select([i for i, id in enumerate(run.train.ids) if id in KEPT])
        assert influence.loss.mean_losses(run.model, tokens).mean() > allowed


def test_an_optimizer_of_ones_own_and_a_callable(run):
    """`optimizer` may make anything that takes parameters and lr."""
    make = partial(torch.optim.SGD, momentum=0.9)
    found = train(run, "ga", until="steps=4", lr=0.05, optimizer=make)
    oracle = Oracle(run)
    v, theta = 0, oracle.theta()
    for _ in range(4):
        v = 0.9 * v + oracle.gradient(oracle.ascent(FORGET))
        theta = theta - 0.05 * v
        oracle.put(theta)
    close(found.theta, theta)


@pytest.mark.parametrize(
    "optimizer",
    some_slow(
        ["Adam", "AdamW", "SGD", "RMSprop", "Adadelta", "Adagrad", "NAdam", "Adamax"],
        ["Adam", "SGD"],
    ),
)
def test_a_stride_is_the_first_moves_share_of_the_adapters_length(run, optimizer):
    """Whatever the optimizer does with a gradient; the steps after it run at the rate that was found."""
    found = train(run, "ga", until="steps=3", optimizer=optimizer, stride=0.02)
    length = float(run.model.snapshot().norm())
    assert found.log[0]["move_norm"] == pytest.approx(0.02 * length, rel=1e-9)
    assert len({entry["lr"] for entry in found.log}) == 1
    oracle = Oracle(run)
    end = oracle.walk(
        lambda k, _: oracle.gradient(oracle.ascent(FORGET)), 3, optimizer, found.log[0]["lr"]
    )
    close(found.theta, end)


@pytest.mark.parametrize(
    "name", some_slow([name for name in METHODS if name != "ngdiff"], ["ga", "npo"])
)
def test_without_a_rate_the_methods_own_stride_is_taken(run, name):
    found = train(run, name, until="steps=1")
    stride = METHODS[name]().stride
    assert found.log[0]["move_norm"] == pytest.approx(
        stride * float(run.model.snapshot().norm()), rel=1e-9
    )
    assert found.report["method"]["stride"] == stride
    assert found.report["method"]["lr"] is None


def test_a_stride_is_the_whole_rates_where_it_warms_up(run):
    """The schedule multiplies the rate whose first move would have the stride."""
    plain = train(run, "ga", until="steps=4", stride=0.02)
    found = train(run, "ga", until="steps=4", stride=0.02, schedule="linear", warmup=2)
    rate = plain.log[0]["lr"]
    assert [entry["lr"] for entry in found.log] == pytest.approx([rate / 2, rate, rate, rate / 2])


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_where_nothing_pulls_nothing_is_thrown_far_off(run, optimizer):
    """KL on its own has no gradient at the adapter before: wherever a training goes, it does not go many lengths away."""
    found = train(run, Method("still", retain=divergence, optimizer=optimizer), until="steps=3")
    assert float(found.delta.norm()) < float(run.model.snapshot().norm())


# ---- what changes nothing ------------------------------------------------------------------------------------

CASES = [
    "ga-gd",
    "ga-kl",
    "npo",
    "idk-dpo",
    "adversarial-labels",
    "random-labels",
    "datamodel-matching",
    "ngdiff",
]


@pytest.mark.parametrize("name", some_slow(CASES, ["ga-kl", "idk-dpo", "datamodel-matching"]))
def test_parts_and_order_change_nothing(run, name, monkeypatch):
    """One row at a time, or all at once; kept rows and forget rows in another order, where a step runs all of them."""
    options = {"until": "steps=3", "batch_size": 32, "lr": 0.02}
    whole = train(run, name, **options).delta
    assert float(whole.norm()) > 1e-3
    parts = []
    each = loop.Side._part
    monkeypatch.setattr(
        loop.TermBatches,
        "_part",
        lambda self, own, *a: (parts.append(len(own)), each(self, own, *a))[1],
    )
    run.manifest["token_budget"] = 1
    close(train(run, name, **options).delta, whole)
    assert set(parts) == {1}
    run.manifest["token_budget"] = 4096
    monkeypatch.setattr(
        loop.TermBatches, "rows", lambda self, step: np.arange(len(self.tokens))[::-1].copy()
    )
    close(train(run, name, **options).delta, whole)


@pytest.mark.parametrize("name", ["ga", "npo", "datamodel-matching"])
def test_the_order_of_the_ids_changes_nothing(run, name):
    close(train(run, name, FORGET[::-1]).delta, train(run, name).delta)


@pytest.mark.parametrize("name", ["random-labels", "idk-dpo"])
def test_what_is_drawn_for_a_row_depends_on_the_seed_and_the_row_alone(run, name):
    close(train(run, name, FORGET[::-1]).delta, train(run, name).delta)


def test_left_padding_changes_nothing(run, monkeypatch):
    expected = train(run, "ga-kl", lr=0.02).delta
    from influence.batches import collate
    from unlearn.methods import batches, reference

    def left(tokens, own, *, pad_id, device):
        batch = collate(tokens, own, pad_id=pad_id, device=device)
        lengths = batch.attention_mask.sum(1)
        width = batch.attention_mask.shape[1]
        places = (torch.arange(width)[None] - (width - lengths)[:, None]) % width
        moved = {
            name: getattr(batch, name).gather(1, places)
            for name in ("input_ids", "attention_mask", "supervised")
        }
        positions = (moved["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        return replace(batch, **moved, position_ids=positions)

    for module in (batches, reference):
        monkeypatch.setattr(module, "collate", left)
    close(train(run, "ga-kl", lr=0.02).delta, expected)


def in_two_processes(work, folder: Path) -> None:
    """Call `work` in two forked processes that talk by gloo; each process's failure is ours."""
    fork = multiprocessing.get_context("fork")

    def one(rank: int) -> None:
        torch.distributed.init_process_group(
            "gloo", f"file://{folder}/meet", rank=rank, world_size=2
        )
        work(rank)
        torch.distributed.destroy_process_group()

    children = [fork.Process(target=one, args=(rank,)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
    assert [child.exitcode for child in children] == [0, 0]


SHARED = [
    ("ga", {"ids": ["r0-1"]}),  # one row: the second process has none
    ("ga-gd", {"batch_size": 2, "retain_batch_size": 1}),
    ("ga-kl", {"batch_size": 1, "retain_batch_size": 4}),
    ("npo", {"batch_size": 2, "retain_batch_size": 5}),
    ("idk-dpo", {"batch_size": 3, "retain_batch_size": 3}),
    ("ngdiff", {"until": "steps=12", "batch_size": 2, "retain_batch_size": 4}),
    ("ngdiff", {"until": "steps=2", "ids": ["r0-1"], "retain_batch_size": 1}),
    ("l1-sparse", {"retain_batch_size": 3}),
    ("datamodel-matching", {"batch_size": 1, "retain_batch_size": 2}),
    ("control", {"until": "steps=4", "lr": 0.05}),
    ("ga", {"until": "base", "steps": 30, "lr": 0.05}),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), some_slow([("float64", 1e-9), ("float32", 1e-5)], [("float64", 1e-9)])
)
def test_two_processes_change_nothing(made, tmp_path, dtype, tolerance):
    run = opened(made, tmp_path, dtype)

    def work(rank):
        for number, (name, options) in enumerate(SHARED):
            found = train(run, name, **options)
            text = json.dumps(
                {
                    "log": found.log,
                    "stopped": found.report["stopped"],
                    "losses": found.report["losses"],
                }
            )
            (tmp_path / f"{number}.{rank}.json").write_text(text)
            torch.save(found.delta, tmp_path / f"{number}.{rank}.pt")

    in_two_processes(work, tmp_path)
    for number, (name, options) in enumerate(SHARED):
        alone = train(run, name, **options)
        first, second = (
            torch.load(tmp_path / f"{number}.{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert torch.equal(first, second), name
        torch.testing.assert_close(
            first, alone.delta, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text
        )
        there = json.loads((tmp_path / f"{number}.0.json").read_text())
        assert there["stopped"] == alone.report["stopped"]
        assert len(there["log"]) == len(alone.log)
        for one, other in zip(there["log"], alone.log, strict=True):
            for key in (
                "forget_term",
                "retain_term",
                "forget_loss",
                "retain_loss",
                "forget_norm",
                "lr",
                "forget_rows",
            ):
                if other[key] is None:
                    assert one[key] is None
                else:
                    assert one[key] == pytest.approx(
                        other[key], rel=100 * tolerance, abs=100 * tolerance
                    ), (name, key)


@pytest.mark.parametrize(
    "name",
    some_slow(["ga-gd", "ga-kl", "ngdiff", "adversarial-labels", "datamodel-matching"], ["ga-kl"]),
)
def test_two_processes_cost_what_one_does(run, tmp_path, name):
    def work(rank):
        (tmp_path / f"{rank}.json").write_text(json.dumps(train(run, name).report["cost"]["total"]))

    in_two_processes(work, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == pytest.approx(train(run, name).report["cost"]["total"])


@pytest.mark.parametrize(
    "name", some_slow(list(METHODS), ["ga-kl", "npo", "ngdiff", "idk-dpo", "task-arithmetic"])
)
def test_the_cost_is_the_rows_that_were_run(run, name):
    options = {"until": "steps=2"} if name != "ngdiff" else {"until": "steps=11"}
    run.points  # noqa: B018
    counter = Counter(run.model)
    try:
        found = train(run, name, batch_size=2, retain_batch_size=3, **options)
    finally:
        counter.handle.remove()
    cost = found.report["cost"]
    assert cost["row_gradients"] + cost["row_forwards"] == counter.rows
    assert cost["total"] == pytest.approx(cost["row_gradients"] + cost["row_forwards"] / 3)
    assert found.log[-1]["row_gradients"] < cost["total"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("task-arithmetic", "control")]
)
def test_the_methods_table_tells_the_cost_of_a_step(run, name):
    """Between the second step and the twelfth: ten steps, in which targets and references are known already."""
    found = train(
        run,
        name,
        until="steps=13",
        lr=None if name == "ngdiff" else 1e-4,
        batch_size=3,
        retain_batch_size=3,
    )
    spent = found.log[12]["row_gradients"] - found.log[2]["row_gradients"]
    forget, retain = METHODS[name]().cost
    assert spent / 10 == pytest.approx(forget * 3 + retain * 3, rel=1e-6)


# ---- stopping ------------------------------------------------------------------------------------------------


def own_losses(run, theta, ids):
    with run.model.at(theta):
        return influence.loss.mean_losses(
            run.model, run.tokens.select([run.train.index(id) for id in ids])
        )


def last_step(run, found, **options):
    """The share of its last step that a training kept, checked against the trainings that end before and after that step."""
    taken, share = len(found.log), found.log[-1]["share"]
    before = (
        train(run, "ga", until=f"steps={taken - 1}", **options).delta
        if taken > 1
        else torch.zeros_like(found.delta)
    )
    whole = train(run, "ga", until=f"steps={taken}", **options).delta
    close(found.delta, before + share * (whole - before))
    assert all(entry["share"] == 1 for entry in found.log[:-1])
    start = run.model.snapshot()
    return share, lambda part: own_losses(
        run, start + before + part * (whole - before), FORGET
    ).mean()


def test_it_stops_at_the_goal_within_a_step(run):
    """Base: the mean of the rows' losses under the base, of rows that lie below it; the last step is as long as it takes."""
    found = train(run, "ga", until="base", steps=60, lr=0.01)
    oracle = Oracle(run)
    with oracle.model.disable_adapter(), torch.no_grad():
        base = [float(oracle.losses(id).mean()) for id in FORGET]
    goal = np.mean(np.maximum(base, [row["before"] for row in found.report["rows"]]))
    assert found.report["losses"]["edited"]["target"] == pytest.approx(goal)
    assert found.report["reached"]
    taken = len(found.log)
    assert 1 < taken < 60
    assert f"reached its goal, {goal:.2f}, in step {taken}" in found.report["stopped"]
    assert found.report["method"]["steps_taken"] == taken
    share, loss = last_step(run, found, lr=0.01)
    assert goal <= loss(share) <= goal * (1 + loop.CLOSE)
    assert loss(0.0) < goal
    assert found.report["losses"]["edited"]["after"] == pytest.approx(loss(share))


@pytest.mark.parametrize("until", ["loss", "expected"])
def test_other_goals(run, until):
    goal = float(own_losses(run, run.model.snapshot(), FORGET).mean()) + 0.4
    found = train(run, "ga", until=f"loss={goal}" if until == "loss" else until, steps=100, lr=0.01)
    target = found.report["losses"]["edited"]["target"]
    if until == "loss":
        assert target == pytest.approx(goal)
    else:
        rise = [
            max(0, found.report["method"]["rho"] * row["base"] - row["before"])
            for row in found.report["rows"]
        ]
        own = [
            row["before"] + r * row["share"]
            for row, r in zip(found.report["rows"], rise, strict=True)
        ]
        assert target == pytest.approx(np.mean(own))
    after = own_losses(run, found.theta, FORGET).mean()
    assert found.report["reached"]
    assert after >= target
    assert found.log[-1]["forget_loss"] < target


def test_steps_asked_for_are_steps_taken(run):
    for count in (1, 4):
        found = train(run, "ga", until=f"steps={count}")
        assert [entry["step"] for entry in found.log] == list(range(1, count + 1))
        assert found.report["stopped"] == f"{count} steps were taken"
        assert found.report["reached"] is None  # no goal was asked for
        assert found.report["losses"]["edited"]["target"] is None
    assert len(train(run, "task-arithmetic", steps=2).log) == 2
    assert all(entry["share"] == 1 for entry in found.log)


def test_a_goal_that_is_not_reached_is_said(run):
    found = train(run, "ga", until="loss=30", steps=2, lr=1e-4)
    assert not found.report["reached"]
    assert found.report["stopped"] == "2 steps were taken"
    edited = found.report["losses"]["edited"]
    goal = 0.1 * edited["before"] + 0.9 * edited["after"]
    last = train(run, "ga", until=f"loss={goal}", steps=2, lr=1e-4)
    assert last.report["reached"]  # reached by the last step that was allowed
    assert "goal" in last.report["stopped"]


@pytest.mark.parametrize(
    "name",
    some_slow(
        ["ga", "ga-gd", "npo", "ngdiff", "control", "datamodel-matching", "l1-sparse"],
        ["ga", "ngdiff"],
    ),
)
def test_rows_at_their_goal_are_nothing_to_do(run, name):
    """No adapter is made that would stand as an unlearned one; the model is as before."""
    before = run.model.snapshot()
    low = float(own_losses(run, before, FORGET).mean()) / 2
    with pytest.raises(InputError, match="nothing to do: the forget rows' mean loss is"):
        train(run, name, until=f"loss={low}", steps=5)
    assert torch.equal(run.model.snapshot(), before)


def test_damage_stops_it(run):
    """The step that takes the sample beyond what is allowed is the last, and is cut so that it just does not."""
    free = train(run, "ga", until="steps=40", lr=0.02)
    rises = []
    for count in (10, 11, 12):
        theta = train(run, "ga", until=f"steps={count}", lr=0.02).theta
        before = own_losses(run, run.model.snapshot(), KEPT).mean()
        rises.append(own_losses(run, theta, KEPT).mean() / before - 1)
    assert rises == sorted(rises)
    allowed = (rises[0] + rises[1]) / 2
    found = train(run, "ga", until="steps=40", lr=0.02, stop_damage=allowed)
    assert len(found.log) == 11
    assert found.report["stopped"] == (
        f"the retained rows' mean loss has risen by {allowed:.1%}, all that is allowed, in step 11"
    )
    assert (1 + allowed) * (1 - loop.CLOSE) <= 1 + found.report["guard"]["damage"] < 1 + allowed
    assert 0 < found.log[-1]["share"] < 1
    assert len(free.log) == 40
    early = train(run, "ga", until="loss=50", steps=40, lr=0.02, stop_damage=allowed)
    assert not early.report["reached"]
    assert torch.equal(early.delta, found.delta)


def test_a_forget_set_larger_than_the_batch_ends_just_at_its_goal(run):
    """Looked at every ten steps and when a step's own row is at its goal; then back along the way since the last look."""
    goal = float(own_losses(run, run.model.snapshot(), FORGET).mean()) + 0.3
    found = train(run, "ga", until=f"loss={goal}", steps=100, lr=0.01, batch_size=1)
    taken = len(found.log)
    assert found.report["reached"]
    assert 1 < taken < 100
    after = own_losses(run, found.theta, FORGET).mean()
    assert goal <= after <= goal * (1 + loop.CLOSE)


def test_a_sample_of_forget_rows_is_held_against_its_own_goal(run, monkeypatch):
    """Of two rows below the base's loss the one that is looked at lies above the mean goal of both; neither is at its own."""
    monkeypatch.setattr(loop, "CHECK_ROWS", 1)
    now = own_losses(run, run.model.snapshot(), run.train.ids)
    base = own_losses(run, scaled(run.model, 0.0), run.train.ids)
    pairs = [
        (i, j) for i in range(ROWS) for j in range(ROWS) if now[i] < base[i] and now[j] < base[j]
    ]
    i, j = next((i, j) for i, j in pairs if now[i] > (base[i] + base[j]) / 2)
    ids = [run.train.ids[k] for k in ((i, j) if loop.spaced(2, 1)[0] == 0 else (j, i))]
    assert len(train(run, "ga", ids, until="base", steps=1, batch_size=1).log) == 1


# ---- killed and resumed --------------------------------------------------------------------------------------

RESUMED = [
    ("ga", {"until": "steps=9", "schedule": "cosine", "warmup": 3, "lr": 0.01, "batch_size": 2}),
    ("ngdiff", {"until": "steps=23", "batch_size": 2, "retain_batch_size": 4}),
    (
        "npo",
        {
            "until": "steps=9",
            "lr": 0.01,
            "batch_size": 1,
            "retain_batch_size": 2,
            "optimizer": "AdamW",
        },
    ),
    ("datamodel-matching", {"until": "steps=6", "lr": 0.01}),
    ("idk-dpo", {"until": "loss=3.5", "steps": 12, "lr": 0.01, "stop_damage": 5.0}),
    ("ga", {"until": "base", "steps": 30, "stride": 0.003}),
    ("task-arithmetic", {"until": "steps=6", "lr": 0.01}),
]


def stripped(log):
    return [{key: value for key, value in entry.items() if key != "row_gradients"} for entry in log]


@pytest.mark.parametrize(
    ("name", "options"),
    some_slow(RESUMED, RESUMED[:2]),
    ids=[f"{name} {options['until']}" for name, options in RESUMED],
)
def test_stopped_at_any_step_and_resumed_is_the_same_bit_for_bit(
    single, tmp_path, monkeypatch, name, options
):
    whole = train(single, name, **options)
    total = len(whole.log)
    for stop_at in sorted({1, 2, total // 2 + 1, total - 1}):
        folder = tmp_path / f"state {stop_at}"
        with monkeypatch.context() as patch:
            moved, seen = loop._moved, []

            def interrupted(*arguments, seen=seen, moved=moved, stop_at=stop_at):
                seen.append(1)
                if len(seen) > stop_at:
                    raise KeyboardInterrupt
                return moved(*arguments)

            patch.setattr(loop, "_moved", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(
                    single, name, checkpoint=folder, save_every=2 if stop_at > 2 else 1, **options
                )
        again = train(single, name, checkpoint=folder, **options)
        assert torch.equal(again.delta, whole.delta)
        assert stripped(again.log) == stripped(whole.log)
        assert again.report["losses"] == whole.report["losses"]
        assert again.report["stopped"] == whole.report["stopped"]


@pytest.mark.parametrize("name", ["npo", "datamodel-matching"])
def test_resumed_in_the_middle_of_an_epoch_it_is_the_same_bit_for_bit(
    single, tmp_path, monkeypatch, name
):
    """Batches of two of three forget rows: the rows that are looked at first together differ after a resume."""
    options = {"until": "steps=9", "lr": 0.01, "batch_size": 2}
    whole = train(single, name, **options)
    for stop_at in (1, 2, 4, 5, 7):
        moved, seen = loop._moved, []

        def interrupted(*arguments, seen=seen, moved=moved, stop_at=stop_at):
            seen.append(1)
            if len(seen) > stop_at:
                raise KeyboardInterrupt
            return moved(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_moved", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(single, name, checkpoint=tmp_path / str(stop_at), save_every=1, **options)
        assert torch.equal(
            train(single, name, checkpoint=tmp_path / str(stop_at), **options).delta, whole.delta
        )


def test_a_resumed_training_does_not_begin_anew(single, tmp_path, monkeypatch, capfd):
    options = {"until": "steps=9", "lr": 0.01}
    moved, seen = loop._moved, []
    with monkeypatch.context() as patch:

        def count(*arguments):
            seen.append(1)
            if len(seen) == 6:
                raise KeyboardInterrupt
            return moved(*arguments)

        patch.setattr(loop, "_moved", count)
        with pytest.raises(KeyboardInterrupt):
            train(single, checkpoint=tmp_path / "state", save_every=2, **options)
        capfd.readouterr()
        train(single, checkpoint=tmp_path / "state", save_every=2, **options)
    assert "going on after step 4 of 9" in capfd.readouterr().err
    assert len(seen) == 6 + 5


@pytest.mark.parametrize("where", ["replace", "fsync", "save"])
def test_killed_in_a_save_it_goes_on_from_the_one_before(single, tmp_path, where):
    """A process of its own ends by SIGKILL in its third save: at its start, before the file is moved, before it is on disk."""
    options = {
        "until": "steps=8",
        "lr": 0.01,
        "schedule": "linear",
        "save_every": 2,
        "checkpoint": tmp_path / "state",
    }
    whole = train(single, **{**options, "checkpoint": None})

    def killed():
        owner, name = {"replace": (os, "replace"), "fsync": (os, "fsync"), "save": (torch, "save")}[
            where
        ]
        real, seen = getattr(owner, name), []

        def dies(*arguments, **named):
            seen.append(1)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        setattr(owner, name, dies)
        train(single, **options)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    state = torch.load(tmp_path / "state" / "state.pt", weights_only=True)
    assert state["done"] == 4
    again = train(single, **options)
    assert torch.equal(again.delta, whole.delta)
    assert stripped(again.log) == stripped(whole.log)


@pytest.fixture
def halfway(single, tmp_path):
    """A folder with the state of four steps of eight, and the call that made it."""
    options = {"until": "steps=8", "lr": 0.01, "save_every": 4, "checkpoint": tmp_path / "state"}
    train(single, **options)
    assert (tmp_path / "state" / "state.pt").exists()
    return options


OTHER = [
    ({"lr": 0.02}, "lr"),
    ({"lr": None, "stride": 0.02}, "lr, stride"),
    ({"until": "steps=9"}, "steps, until"),
    ({"until": "base"}, "steps, until"),
    ({"batch_size": 2}, "batch_size"),
    ({"seed": 1}, "seed"),
    ({"optimizer": "SGD"}, "optimizer"),
    ({"schedule": "cosine"}, "schedule"),
    ({"warmup": 2}, "warmup"),
    ({"max_grad_norm": 1.0}, "max_grad_norm"),
    ({"stop_damage": 1.0}, "stop_damage"),
    ({"control": 0.5}, "finish"),
    ({"method": "ga-gd"}, "name"),
    ({"method": "npo"}, "forget"),
    ({"ids": ["r0-1", "r0-4"]}, "rows"),
]


@pytest.mark.parametrize(("change", "named"), OTHER)
def test_the_state_of_another_training_is_refused_by_what_differs(single, halfway, change, named):
    with (
        untouched(halfway["checkpoint"]),
        pytest.raises(MismatchError, match="holds another training: it differs in") as told,
    ):
        train(single, **{**halfway, **change})
    listed = str(told.value).split("differs in ")[1].split(". Ask")[0]
    assert set(named.split(", ")) <= set(listed.split(", "))
    began = train(single, **{**halfway, **change}, restart=True)
    assert torch.equal(
        began.delta, train(single, **{**halfway, **change, "checkpoint": None}).delta
    )


def test_what_does_not_matter_is_not_compared(single, halfway, capfd):
    train(single, **{**halfway, "save_every": 3, "max_damage": 0.5})
    assert "going on after step 8" in capfd.readouterr().err


def test_other_held_out_rows_make_another_training(single, tmp_path):
    options = {
        "until": "expected",
        "steps": 4,
        "save_every": 2,
        "lr": 1e-4,
        "checkpoint": tmp_path / "state",
    }
    train(single, holdout=influence.examples_from_rows(rows(9, seed=9)), **options)
    with pytest.raises(MismatchError, match="differs in"):
        train(single, holdout=influence.examples_from_rows(rows(9, seed=8)), **options)


def test_other_retained_rows_make_another_training(single, tmp_path):
    options = {
        "until": "steps=4",
        "save_every": 2,
        "checkpoint": tmp_path / "state",
        "method": "ga-gd",
    }
    train(single, retain=influence.examples_from_rows(rows(9, seed=9)), **options)
    for retain in (None, influence.examples_from_rows(rows(9, seed=8))):
        with pytest.raises(MismatchError, match=r"differs in .*retain"):
            train(single, retain=retain, **options)


class Evil:
    """Would run code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "flipped", "json", "evil", "lacking"])
def test_a_damaged_state_is_refused_or_begun_anew(single, halfway, tmp_path, damage):
    path = halfway["checkpoint"] / "state.pt"
    data = path.read_bytes()
    trap = tmp_path / "trap"
    if damage == "evil":
        torch.save({"request": Evil(trap)}, path)
    elif damage == "lacking":
        torch.save({"request": "{}"}, path)
    elif damage == "flipped":
        place = data.index(b"archive/data.pkl") if b"archive/data.pkl" in data else len(data) // 3
        path.write_bytes(data[:place] + bytes(64) + data[place + 64 :])
    else:
        damaged = {
            "empty": b"",
            "cut": data[: len(data) // 2],
            "noise": os.urandom(500),
            "json": b'{"request": 1}',
        }
        path.write_bytes(damaged[damage])
    with pytest.raises(StoreError, match=r"(?s)state.pt is damaged.*or --overwrite, to begin anew"):
        train(single, **halfway)
    again = train(single, **halfway, restart=True)
    assert torch.equal(again.delta, train(single, **{**halfway, "checkpoint": None}).delta)
    assert not trap.exists()


def test_nobody_is_told_to_unpickle_a_damaged_state(single, halfway, tmp_path):
    torch.save({"request": Evil(tmp_path / "trap")}, halfway["checkpoint"] / "state.pt")
    with pytest.raises(StoreError) as told:
        train(single, **halfway)
    assert "weights_only" not in str(told.value)
    assert "\x1b" not in str(told.value)


LOST = "a state that is sound as a file but lacks its parts ends in a KeyError or TypeError"


@pytest.mark.parametrize(
    "lost",
    ["theta"] + [pytest.param(name) for name in ("optimizer", "log")],
)
def test_a_state_with_the_wrong_parts_is_refused_in_a_sentence(single, halfway, lost):
    """Sound as a file, of the same request, but of another shape."""
    path = halfway["checkpoint"] / "state.pt"
    state = torch.load(path, weights_only=True)
    state |= {
        "theta": {"theta": torch.zeros(3)},
        "optimizer": {"optimizer": {}},
        "log": {"log": "7"},
    }[lost]
    torch.save(state, path)
    with pytest.raises((StoreError, MismatchError, InputError)):
        train(single, **halfway)


def test_discard_takes_the_state_away(single, halfway):
    loop.discard(halfway["checkpoint"])
    assert not halfway["checkpoint"].exists()
    loop.discard(halfway["checkpoint"])


# ---- what is left alone --------------------------------------------------------------------------------------


def everything(model):
    """Weights, flags, gradients, modes, adapters and the state of both random generators."""
    named = list(model.model.named_parameters())
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in named},
        "flags": [(name, parameter.requires_grad) for name, parameter in named],
        "gradients": [(name, None if p.grad is None else p.grad.clone()) for name, p in named],
        "modes": [(name, module.training) for name, module in model.model.named_modules()],
        "adapters": (list(model.model.peft_config), list(model.model.active_adapters)),
        "layers": [
            (sorted(site.layer.lora_A), sorted(site.layer.scaling), site.layer.active_adapters)
            for site in model.sites
        ],
        "torch": torch.get_rng_state().clone(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
        "hooks": [
            len(module._forward_pre_hooks) + len(module._forward_hooks)
            for module in model.model.modules()
        ],
    }


def assert_same(before, after, but=()):
    assert before.keys() == after.keys()
    for key in set(before) - set(but):
        one, other = before[key], after[key]
        if key == "weights":
            assert list(one) == list(other)
            assert all(torch.equal(one[name], other[name]) for name in one)
        elif key == "gradients":
            for (name, g), (_, h) in zip(one, other, strict=True):
                assert (g is None) == (h is None), name
                assert g is None or torch.equal(g, h), name
        elif key == "torch":
            assert torch.equal(one, other)
        elif key == "numpy":
            assert (one == other).all()
        else:
            assert one == other, key


@pytest.fixture
def disturbed(run):
    """The model in training mode, with one flag set and one not, as a user's own loop may have it."""
    run.points  # noqa: B018
    run.model.model.train()
    next(iter(run.model.parameters)).requires_grad_(True)
    yield run
    run.model.model.eval()
    for parameter in run.model.parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


@pytest.mark.parametrize(
    "name", some_slow(list(METHODS), ["ga-kl", "ngdiff", "idk-dpo", "control"])
)
def test_the_model_is_as_before_after_a_training(disturbed, name):
    before = everything(disturbed.model)
    found = train(disturbed, name, until="steps=2", lr=0.01)
    assert found.delta.any()
    assert_same(before, everything(disturbed.model))


def broken_term(error):
    calls = []

    def values(part):
        calls.append(1)
        if len(calls) == 3:
            if error is NumericalError:
                return part.losses * float("nan")
            raise error
        return part.reference_losses - part.losses

    return Method("broken", forget=Term("broken", values, reference=True), retain=descent, lr=0.01)


@pytest.mark.parametrize("error", [NumericalError, KeyboardInterrupt, ZeroDivisionError])
def test_the_model_is_as_before_after_an_exception_in_a_term(disturbed, error, tmp_path):
    before = everything(disturbed.model)
    with untouched(disturbed.directory), pytest.raises(error):
        train(disturbed, broken_term(error), until="steps=9", checkpoint=tmp_path / "state")
    assert_same(before, everything(disturbed.model))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("error", [NumericalError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["step", "combine", "look ahead", "reference", "finish", "save"])
def test_the_model_is_as_before_after_an_exception_anywhere(
    disturbed, monkeypatch, tmp_path, error, place
):
    def fail(*_a, **_k):
        raise error("on purpose")

    before, method = everything(disturbed.model), method_of("ngdiff")
    options = {"until": "steps=3", "checkpoint": tmp_path / "state", "save_every": 1}
    if place == "step":
        monkeypatch.setattr(torch.optim.SGD, "step", fail)
    elif place == "combine":
        method = replace(method, combine=fail)
    elif place == "look ahead":
        error = (
            ZeroDivisionError if error is NumericalError else error
        )  # a loss that is no number is taken as a bad rate
        monkeypatch.setattr(loop.TermBatches, "mean_loss", fail)
    elif place == "reference":
        method = method_of("npo")
        monkeypatch.setattr(loop.TermBatches, "_kept_losses", fail)
    elif place == "finish":
        method = replace(
            method, finish=lambda trained: (trained.forget_loss(trained.after), fail())[1]
        )
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error, match="on purpose"):
        train(disturbed, method, **options)
    assert_same(before, everything(disturbed.model), but=("gradients",))


def test_no_gradient_is_left_behind_by_an_interrupt(disturbed, monkeypatch):
    def fail(*_a, **_k):
        raise KeyboardInterrupt

    before = everything(disturbed.model)
    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        train(disturbed)
    assert_same(before, everything(disturbed.model))


def test_a_gradient_of_the_users_own_is_left_alone(disturbed):
    first = disturbed.model.parameters[0]
    first.grad = torch.ones_like(first)
    before = everything(disturbed.model)
    train(disturbed)
    assert_same(before, everything(disturbed.model))


def test_nan_is_named_with_its_step(run):
    with pytest.raises(
        NumericalError,
        match=r"the term broken or its gradient is NaN or infinite in step 3: lower the rate",
    ):
        train(run, broken_term(NumericalError), until="steps=9")


def test_a_rate_that_is_far_too_high_ends_in_a_sentence(run):
    with pytest.raises(NumericalError):
        train(run, "ga", until="steps=3", lr=1e300, optimizer="SGD")


def test_dropout_is_off(made, tmp_path):
    """The adapter has a dropout of a quarter; two seeds of torch give one training, bit for bit."""
    run = opened(made, tmp_path, "float32")
    assert run.model.sites[0].layer.lora_dropout["default"].p == 0.25
    torch.manual_seed(0)
    one = train(run, "ga-kl").delta
    torch.manual_seed(1)
    run.model.model.train()
    try:
        assert torch.equal(train(run, "ga-kl").delta, one)
    finally:
        run.model.model.eval()


# ---- types and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", some_slow(["ga-kl", "npo", "ngdiff", "datamodel-matching"], ["ga-kl"])
)
def test_a_bfloat16_base_trains_float32_matrices(made, tmp_path, name):
    at, _ = made
    half = influence.load(at / "base", at / "adapter", dtype="bfloat16", device="cpu")
    influence.fit(half, read_examples(at / "train.jsonl"), directory=tmp_path / "half", path=(0.6,))
    run = Run.open(tmp_path / "half", model=half)
    weights = {key: value.clone() for key, value in half.model.state_dict().items()}
    found = train(run, name, until="steps=4", lr=0.01)
    assert found.delta.dtype == torch.float32
    assert bool(torch.isfinite(found.delta).all())
    assert all(torch.equal(value, weights[key]) for key, value in half.model.state_dict().items())
    full = train(opened(made, tmp_path, "float32"), name, until="steps=4", lr=0.01)
    cosine = float(found.delta @ full.delta / (found.delta.norm() * full.delta.norm()))
    assert cosine > 0.8, cosine
    for entry in found.log:
        assert all(value is None or math.isfinite(value) for value in entry.values())


@pytest.mark.parametrize("name", some_slow(["ga-kl", "npo", "idk-dpo", "ngdiff"], ["ga-kl"]))
def test_activation_checkpointing_changes_nothing(made, tmp_path, monkeypatch, name):
    at, _ = made
    run = opened(made, tmp_path, "float32")
    plain = train(run, name, until="steps=3", lr=0.01)
    model = influence.load(at / "base", at / "adapter", device="cpu", checkpointing=True)
    other = Run.open(run.directory, model=model)
    calls, inside = [], []
    layer = type(model.model.get_base_model().model.layers[0])
    real, add = layer.forward, TermBatches._add

    def counted(
        side, *arguments
    ):  # in the steps alone: what is measured before and after has a tape of its own
        inside.append(1)
        try:
            return add(side, *arguments)
        finally:
            inside.pop()

    monkeypatch.setattr(
        layer, "forward", lambda self, *a, **k: (calls.append(len(inside)), real(self, *a, **k))[1]
    )
    monkeypatch.setattr(TermBatches, "_add", counted)
    found = train(other, name, until="steps=3", lr=0.01)
    again = sum(calls)
    calls.clear()
    train(run, name, until="steps=3", lr=0.01)
    assert again > sum(calls) > 0  # layers are run again in the backward
    torch.testing.assert_close(found.delta, plain.delta, rtol=0, atol=1e-6)


# ---- rows and methods of other kinds -------------------------------------------------------------------------


def fitted(made, folder, data, **options):
    _, models = made
    model = models["float64"]
    train_rows = read_examples(write_rows(folder / "rows.jsonl", data))
    influence.fit(model, train_rows, directory=folder / "other", path=(0.6,), **options)
    return Run.open(folder / "other", model=model)


def test_text_rows_are_trained_on_and_have_no_refusal(made, tmp_path):
    run = fitted(
        made,
        tmp_path,
        [
            {"id": f"t{i}", "text": row["prompt"] + row["completion"]}
            for i, row in enumerate(rows(6))
        ],
    )
    assert train(run, "ga-gd", ["t0", "t3"]).delta.any()
    with (
        untouched(run.directory),
        pytest.raises(
            InputError, match=r"row 't0' is one text without a prompt.*use another method"
        ),
    ):
        train(run, "idk-dpo", ["t0", "t3"])


def test_messages_get_a_refusal_in_the_assistants_place(made, tmp_path, monkeypatch):
    _, models = made
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    monkeypatch.setattr(models["float64"].tokenizer, "chat_template", template, raising=False)
    data = [
        {
            "id": f"m{i}",
            "messages": [
                {"role": "user", "content": row["prompt"].strip()},
                {"role": "assistant", "content": row["completion"].strip()},
            ],
        }
        for i, row in enumerate(rows(6))
    ]
    run = fitted(made, tmp_path, data)
    seen = []
    each = loop.Side._part

    def part(self, own, wanted):
        found = each(self, own, wanted)
        if self.target.other is not None:
            seen.extend(self.target.other)
        return found

    monkeypatch.setattr(loop.TermBatches, "_part", part)
    found = train(run, "idk-dpo", ["m0", "m3"])
    assert found.delta.any()
    vocabulary = run.model.tokenizer.get_vocab()
    for item, row in zip(seen[:2], (rows(6)[0], rows(6)[3]), strict=True):
        prompt = [vocabulary[word] for word in row["prompt"].split()]
        assert list(item.input_ids[: len(prompt)]) == prompt
        assert (
            2 in item.input_ids[len(prompt) :]
        )  # words of the refusal are unknown to this tokenizer


def test_retained_rows_of_a_file_are_those_that_are_run(run):
    given = influence.examples_from_rows(rows(3, seed=7))
    found = train(run, "ga-gd", retain=given, lr=0.02)
    seen = found.report["method"]["retain"]
    assert (seen["rows"], seen["digest"]) == (3, given.digest)
    assert all(entry["retain_rows"] == 3 for entry in found.log)
    assert float((found.delta - train(run, "ga-gd", lr=0.02).delta).norm()) > 1e-3
    oracle = Oracle(run)
    vocabulary = build_tokenizer().get_vocab()
    for row in rows(3, seed=7):
        prompt, answer = (
            [vocabulary[word] for word in row[key].split()] for key in ("prompt", "completion")
        )
        oracle.rows[row["id"]] = (torch.tensor([*prompt, *answer, 1]), len(answer) + 1)
    direction = lambda k, _: oracle.gradient(oracle.ascent(FORGET) + oracle.descent(given.ids))  # noqa: E731
    close(found.theta, oracle.walk(direction, 3, lr=0.02))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ids": ["r0-99"]}, "no example has the id 'r0-99'"),
        ({"ids": ["r0-1", "r0-1"]}, "given more than once: 'r0-1'"),
        ({"ids": "r0-1"}, "were given as one string; expected a list"),
        ({"ids": []}, "name at least one row"),
        ({"ids": [f"r0-{i}" for i in range(ROWS)]}, "all rows would be removed"),
        ({"method": "gaa"}, "method 'gaa' was given"),
        ({"method": "nowhere.py:mine"}, "there is no file nowhere.py"),
        ({"lr": 0}, "expected a number above 0, or auto"),
        ({"lr": "fast"}, "expected a number above 0, or auto"),
        ({"lr": float("nan")}, "expected a number above 0, or auto"),
        ({"lr": "auto"}, "lr auto reads the retained rows' loss, and method ga runs none"),
        ({"method": "ngdiff", "schedule": "linear"}, "lr auto and schedule 'linear' were given"),
        ({"stride": 0}, "stride 0 was given; expected a number above 0, as in 0.015"),
        ({"stride": float("nan")}, "stride nan was given"),
        (
            {"stride": 0.01, "lr": 0.1},
            "lr 0.1 and stride 0.01 were given, and one follows from the other: give one",
        ),
        ({"optimizer": "LBFGS"}, "optimizer 'LBFGS' was given"),
        ({"optimizer": "lr_scheduler"}, "expected a class of torch.optim"),
        ({"schedule": "steps"}, "schedule 'steps' was given"),
        ({"warmup": -1}, "warmup"),
        ({"batch_size": 0}, "batch_size 0 was given"),
        ({"save_every": 0}, "save_every 0 was given"),
        ({"seed": -1}, "seed -1 was given"),
        ({"control": 1.5}, "expected a share of the likelihood between 0 and 1"),
        ({"stop_damage": -0.1}, "stop_damage -0.1 was given"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm inf was given"),
        ({"until": "soon"}, "stopping rule 'soon' was given"),
        ({"until": "steps=2.5"}, "N whole"),
        ({"until": "loss=-1"}, "X above 0"),
        ({"until": "base=3"}, "stopping rule 'base=3' was given"),
        ({"start": "nowhere"}, "nowhere is no adapter of the run"),
    ],
)
def test_wrong_calls_are_refused(run, options, sentence):
    before = everything(run.model)
    with untouched(run.directory), pytest.raises(InputError) as told:
        train(run, **options)
    assert sentence in str(told.value)
    assert_same(before, everything(run.model))


def test_retained_rows_that_are_forget_rows_are_refused(run):
    data = [*rows(3, seed=7), rows(ROWS)[4] | {"id": "another-name"}]
    with pytest.raises(
        InputError, match=r"1 retained rows are rows to unlearn, word for word \(r0-4\)"
    ):
        train(run, "ga-gd", retain=influence.examples_from_rows(data))
    with pytest.raises(InputError, match="the file of retained rows has no rows"):
        train(run, "ga-gd", retain=influence.Examples([]))
    with pytest.raises(
        InputError, match="method ga looks at no retained rows, and some were given: leave them out"
    ):
        train(run, "ga", retain=influence.examples_from_rows(rows(3, seed=7)))


def test_held_out_rows_that_are_retained_rows_are_refused(run):
    same = influence.examples_from_rows(rows(5, seed=9))
    with pytest.raises(InputError, match="held-out"):
        train(run, "ga-gd", retain=same, holdout=same)


def test_two_numbers_of_steps_are_refused(run):
    with pytest.raises(InputError):
        train(run, "ga", until="steps=2", steps=5)


def test_a_method_of_ones_own(run):
    """Any composition runs: here a capped ascent, with the retain gradient's share along it taken away."""
    capped = Term("capped", lambda part: -part.losses.clamp(max=3.0))

    def combine(forget, retain, step):
        return forget + (1 + step.number / step.steps) * retain

    found = train(run, Method("mine", forget=capped, retain=descent, combine=combine, lr=0.02))
    oracle = Oracle(run)

    def direction(k, _):
        losses = torch.cat([oracle.losses(id) for id in FORGET]).clamp(max=3.0)
        return oracle.gradient(-losses.mean()) + (1 + k / 3) * oracle.gradient(oracle.descent(KEPT))

    close(found.theta, oracle.walk(direction, 3, lr=0.02))
    assert found.report["method"]["name"] == "mine"


@dataclass(frozen=True)
class Shifted:
    """A target that is a value, as the package's own parts are."""

    by: int = 1

    def __call__(self, setup) -> Target:
        counts = setup.tokens.counts
        return Target(labels=[torch.full((int(count),), self.by) for count in counts])


def test_a_target_may_be_a_value(run):
    method = Method("mine", forget=descent, target=Shifted(3), lr=0.02)
    assert train(run, method).delta.any()


@pytest.mark.parametrize(
    "values",
    [lambda part: part.losses[:-1], lambda part: part.losses.sum(), lambda part: part.logits],
)
def test_a_term_of_the_wrong_shape_is_told(run, values):
    with pytest.raises(
        InputError, match=r"the term odd gave values of shape .*; expected \[\d+\], one per token"
    ):
        train(run, Method("mine", forget=Term("odd", values)))


def test_a_term_that_asks_for_nothing_it_said_is_served_all_the_same(run):
    """`reference` tells the cost; the adapter before is there for every term."""
    quiet = Term("quiet", lambda part: part.reference_losses - part.losses)
    assert (
        float((train(run, Method("mine", forget=quiet)).delta - train(run, "ga").delta).norm())
        < 1e-12
    )


def test_both_combinations_are_what_they_are_called():
    forget, retain, step = (
        torch.tensor([3.0, 4.0]),
        torch.tensor([0.0, 2.0]),
        Step(0, 1, torch.zeros(2)),
    )
    assert torch.equal(Weighted(0.5)(forget, retain, step), torch.tensor([3.0, 5.0]))
    close(Normalised()(forget, retain, step), torch.tensor([0.6, 1.8]), 1e-6)
    assert ascent.per == descent.per == "token"
    assert automatic_rate.EVERY == 10


def test_copies_of_rows_to_unlearn_are_not_retained(made, tmp_path, capfd):
    """Of 6 rows two have the text of the first: 3 are retained, a warning names the copies; with nothing else left it is an error."""
    data = rows(6)
    copies = [{**data[0], "id": name} for name in ("copy-a", "copy-b")]
    run = fitted(made, tmp_path, [*data[:4], *copies])
    found = train(run, "ga-gd", [data[0]["id"]], until="steps=1")
    assert found.report["method"]["retain"]["rows"] == 3
    assert "stands in 2 other rows too (copy-a, copy-b)" in capfd.readouterr().err
    with pytest.raises(InputError, match="every other row is a row to unlearn word for word"):
        train(run, "ga-gd", [row["id"] for row in data[:4]], until="steps=1")
