"""A small trained adapter, oracle loops on the PEFT model's own weights, and shared checks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import influence
from tests.conftest import build_model, rows, tokens_of
from unlearn.difficulty.calibration import FEATURES
from unlearn.difficulty.measured import Measured
from unlearn.difficulty.protocol import Protocol

#: Ascents that are forecast, and the shorter ones that are measured step by step.
ADAM, SGD = Protocol("adam", 3e-3, steps=40), Protocol("sgd", 0.02, steps=60)
SHORT_ADAM, SHORT_SGD = Protocol("adam", 3e-3, steps=20), Protocol("sgd", 0.02, steps=20)
HOLDOUT = influence.examples_from_rows(rows(3, seed=7))
#: Options of most measurements: six training rows tell the damage.
SMALL = {"sample_rows": 6, "holdout": HOLDOUT}


def weights_of(model) -> list[torch.Tensor]:
    """The LoRA matrices as PEFT holds them, site after site, A before B."""
    return [
        w
        for s in model.sites
        for w in (s.layer.lora_A["default"].weight, s.layer.lora_B["default"].weight)
    ]


def plain_loss(model, item) -> torch.Tensor:
    """Mean loss of one example, alone, through the whole PEFT model with all logits."""
    ids = torch.from_numpy(item.input_ids)[None]
    logp = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
    places = [t for t in range(1, ids.shape[1]) if item.supervised[t]]
    return -sum(logp[t - 1, ids[0, t]] for t in places) / len(places)


def base_loss(model, item) -> float:
    with model.model.disable_adapter(), torch.no_grad():
        return float(plain_loss(model, item))


def losses_of(model, items) -> np.ndarray:
    with torch.no_grad():
        return np.array([float(plain_loss(model, item)) for item in items])


def gradient_of(run, members) -> torch.Tensor:
    """Gradient [P] of the mean of some rows' mean losses, where the model is, in plain autograd."""
    leaves = weights_of(run.model)
    for w in leaves:
        w.requires_grad_(True)
    loss = torch.stack([plain_loss(run.model, run.tokens[int(i)]) for i in members]).mean()
    out = torch.cat([g.ravel() for g in torch.autograd.grad(loss, leaves)])
    for w in leaves:
        w.requires_grad_(False)
    return out


def data(n: int = 9) -> list[dict]:
    """Rows of which the last has the words of the third under another id."""
    plain = rows(n)
    return [*plain, plain[2] | {"id": "twin"}]


def trained(train, steps: int = 40, **options):
    """A one-layer GPT-2 (no float32 inside) whose adapter has learnt the rows a little.

    Most of them are then below the base's loss.
    """
    options = {"layers": 1, "target_modules": ["attn.c_attn", "mlp.c_proj"]} | options
    model = build_model("gpt2", **options)
    tokens, leaves = tokens_of(model, train), weights_of(model)
    for w in leaves:
        w.requires_grad_(True)
    optimizer = torch.optim.Adam(leaves, lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([plain_loss(model, item) for item in tokens]).mean().backward()
        optimizer.step()
    for w in leaves:
        w.requires_grad_(False)
        w.grad = None
    return model


def in_order(table: pd.DataFrame) -> None:
    """Every forecast lies between the ends of its interval."""
    ok = np.isfinite(table["damage"])
    assert (table["steps"] >= 0).all()
    assert (table["steps_low"] <= table["steps"]).all()
    assert (table["steps"] <= table["steps_high"]).all()
    assert (table["damage_low"] <= table["damage"])[ok].all()
    assert (table["damage"] <= table["damage_high"])[ok].all()


class Allocations(TorchDispatchMode):
    """Watches tensors of `least` bytes or more: the largest one, and the most that live together."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.largest, self.together = least, 0, 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.least:
                    self.largest = max(self.largest, storage.nbytes())
                    reference = StorageWeakRef(storage)
                    self._live[reference.cdata] = reference, storage.nbytes()
        self._live = {key: each for key, each in self._live.items() if not each[0].expired()}
        self.together = max(self.together, sum(size for _, size in self._live.values()))
        return out


class Forwards:
    """Counts forwards of the base model, and kills at the n-th."""

    def __init__(self, run, kill: int | None = None) -> None:
        self.count, self.graph, self.kill = 0, 0, kill
        self._handle = run.model.model.get_base_model().register_forward_pre_hook(
            self._seen, with_kwargs=True
        )

    def _seen(self, module, args, kwargs) -> None:
        self.count += 1
        self.graph += torch.is_grad_enabled()
        if self.count == self.kill:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._handle.remove()


def equal(first: Measured, second: Measured) -> None:
    """Both measurements are the same, bit for bit."""
    for name in vars(first):
        a, b = getattr(first, name), getattr(second, name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b, equal_nan=True), name
        else:
            assert a == b, name


def synthetic(n: int, seed: int = 0) -> pd.DataFrame:
    """A forecast's table of features that have nothing to do with each other."""
    random = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"id": [f"r{i}" for i in range(n)], "steps": np.exp(random.normal(2.5, 0.6, n))}
    )
    table["damage"] = np.exp(random.normal(-2, 0.7, n))
    for name in FEATURES:
        if name not in table:
            table[name] = np.exp(random.normal(0, 0.5, n))
    table["steps_low"], table["steps_high"] = table["steps"] * 0.8, table["steps"] * 1.2
    table["damage_low"], table["damage_high"] = table["damage"] * 0.3, table["damage"] * 3
    table["share"] = 1 / n
    return table


def truth_of(
    table: pd.DataFrame, noise: float = 0.0, seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """True steps and damage of a synthetic table, with log-normal noise.

    Steps = forecast x 1.7 base_loss^0.6 / tokens^0.3, damage = arcsinh-linear in sqrt(damage).
    """
    random = np.random.default_rng(seed)
    steps = table["steps"] * 1.7 * table["base_loss"] ** 0.6 / table["tokens"] ** 0.3
    damage = 0.2 * np.sinh(
        2 * np.sqrt(table["damage"])
        - 0.3 * np.log(table["gap"])
        - 0.2
        + noise * random.normal(size=len(table))
    )
    return (
        steps * np.exp(noise * random.normal(size=len(table)))
    ).to_numpy().copy(), damage.to_numpy().copy()


def climbed(run, members, target, protocol, sample, holdout):
    """The definition, one unit alone: torch.optim on the model's own weights.

    Crossings between two steps are told by a straight line. Returns steps, losses [steps + 1], and
    at the levels the sample's losses [levels, m] and held-out losses [levels, h].
    """
    model, leaves = run.model, weights_of(run.model)
    before = [w.detach().clone() for w in leaves]
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[protocol.optimizer]
    for w in leaves:
        w.requires_grad_(True)
    optimizer = kind(leaves, lr=protocol.rate, maximize=True)
    losses, steps = np.full(protocol.steps + 1, np.nan), np.inf
    at_levels = [np.full((4, len(items)), np.nan) for items in (sample, holdout)]
    passed, previous = 0, None
    for k in range(protocol.steps + 1):
        loss = torch.stack([plain_loss(model, run.tokens[int(row)]) for row in members]).mean()
        losses[k] = float(loss.detach())
        here = [w.detach().clone() for w in leaves]
        while passed < 4 and losses[k] >= losses[0] + (0.25, 0.5, 0.75, 1.0)[passed] * (
            target - losses[0]
        ):
            wanted = losses[0] + (0.25, 0.5, 0.75, 1.0)[passed] * (target - losses[0])
            share = 0.0 if k == 0 else (wanted - losses[k - 1]) / (losses[k] - losses[k - 1])
            if k > 0:
                for w, a, b in zip(leaves, previous, here, strict=True):
                    w.data = a + share * (b - a)
            for losses_there, items in zip(at_levels, (sample, holdout), strict=True):
                losses_there[passed] = losses_of(model, items)
            for w, values in zip(leaves, here, strict=True):
                w.data = values.clone()
            passed += 1
            steps = np.inf if passed < 4 else max(k - 1 + share, 0.0)
        if passed == 4 or k == protocol.steps:
            break
        previous = here
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for w, values in zip(leaves, before, strict=True):
        w.data = values
        w.requires_grad_(False)
        w.grad = None
    return steps, losses, *at_levels


def check(result: Measured, run, members, protocol, holdout=HOLDOUT, targets=None) -> None:
    """Every number of a measurement against the plain loop."""
    model = run.model
    unseen = [] if holdout is None else list(tokens_of(model, holdout))
    places = [run.train.index(id) for id in result.sample]
    sample = [run.tokens[i] for i in places]
    words = [(row.prompt, row.completion) for row in run.train]
    np.testing.assert_allclose(result.retained_before, losses_of(model, sample), rtol=1e-12)
    np.testing.assert_allclose(result.heldout_before, losses_of(model, unseen), rtol=1e-12)
    for i, unit in enumerate(members):
        target = (
            np.mean([base_loss(model, run.tokens[j]) for j in unit])
            if targets is None
            else targets[i]
        )
        steps, losses, retained, heldout = climbed(run, unit, target, protocol, sample, unseen)
        rises = retained - losses_of(model, sample)
        rises[:, [words[j] in [words[k] for k in unit] for j in places]] = np.nan
        assert result.target[i] == pytest.approx(target, rel=1e-12)
        assert result.start[i] == pytest.approx(losses[0], rel=1e-12)
        np.testing.assert_allclose(result.steps[i], steps, rtol=1e-8)
        np.testing.assert_allclose(result.losses[i], losses, rtol=1e-9)
        np.testing.assert_allclose(result.retained[i], rises, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(result.heldout[i], heldout, rtol=1e-8)
        curve = [float("nan") if np.isnan(r).all() else np.nanmean(r) for r in rises]
        np.testing.assert_allclose(result.curve[i], curve, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(result.damage[i], curve[3], rtol=1e-6, atol=1e-9)


def same(first: Measured, second: Measured, rows_=slice(None), **options) -> None:
    """The units `rows_` of the first measurement are those of the second, within tolerances."""
    for name in ("start", "target", "steps", "losses", "retained", "heldout"):
        np.testing.assert_allclose(
            getattr(first, name)[rows_], getattr(second, name), equal_nan=True, **options
        )
