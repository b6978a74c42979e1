"""A second way to every step of a training: PEFT's model, one row at a time, torch.optim."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import influence
import unlearn
from influence.adapter import AdaptedModel
from influence.errors import NumericalError
from influence.row_files import read_examples
from influence.rows import Examples
from influence.run import Run
from influence.tokens import Rendering, TokenizedExamples
from tests.conftest import WORDS, build_tokenizer, rows, tokens_of
from tests.helpers import write_rows
from tests.unlearn.local_oracle import expected, nearest, train_afresh
from unlearn.methods.methods import Method
from unlearn.methods.reference import frozen
from unlearn.methods.targets import Setup
from unlearn.methods.terms import Term, descent
from unlearn.retraining.recipe import Recipe


def some_slow(cases, quick):
    """The cases, those beyond `quick` marked as slow."""
    return [
        case
        if case in quick
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


ROWS, FORGET = 12, ["r0-1", "r0-4", "r0-6"]
#: Of a local retraining that a plain loop repeats, draws included; it hardly learns the rows.
RECIPE = Recipe(lr=1e-2, epochs=4, batch_size=4, dropout=False, seed=2)
KEPT = [f"r0-{i}" for i in range(ROWS) if f"r0-{i}" not in FORGET]


def opened(fitted, folder: Path, dtype: str) -> Run:
    """A copy of the run of a type, so that a test may change it."""
    home, models = fitted
    shutil.copytree(home / dtype, folder / f"run-{dtype}")
    return Run.open(folder / f"run-{dtype}", model=models[dtype])


def train(run, method: Any = "ga", ids=None, **options):
    """Three steps, unless told otherwise."""
    if "steps" not in options:
        options = {"until": "steps=3"} | options
    return unlearn.train(run, method, FORGET if ids is None else ids, **options)


def close(a, b, tolerance: float = 1e-9) -> None:
    """Equal up to a tolerance, relative and absolute."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class RowCounter:
    """Rows that the model runs forward, by a hook on its own forward.

    What goes on from keys and values that are kept is the same row still.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self.rows = 0
        base = model.model.get_base_model()
        self.handle = base.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module, args, kwargs) -> None:
        kept = kwargs.get("past_key_values")
        if kept is None or kept.get_seq_length() == 0:
            self.rows += len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])


class Oracle:
    """A second copy of the adapter, loaded by PEFT itself, trained row by row."""

    def __init__(self, run: Run) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        adapter = run.manifest.adapter.path
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
        sizes = [p.numel() for p in self.parameters]
        for p, part in zip(self.parameters, theta.split(sizes), strict=True):
            p.copy_(part.reshape(p.shape))

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
        """`(2/beta) log(1 + (p/p_ref)^beta)`, p of whole rows: as the paper writes it, by
        exponentials.
        """
        each = []
        for id in ids:
            ratio = (self.losses(id, self.before[id]).sum() - self.losses(id).sum()).exp()
            each.append(2 / beta * (1 + ratio**beta).log())
        return torch.stack(each).mean()

    def simnpo(self, ids, beta=2.5, gamma=0.0):
        each = [2 / beta * (1 + (gamma - beta * self.losses(id).mean()).exp()).log() for id in ids]
        return torch.stack(each).mean()

    def matching(self, ids, log_q):
        """KL(q || p)."""
        each = [(log_q[id].exp() * (log_q[id] - self.logs(id))).sum(-1) for id in ids]
        return torch.cat(each).mean()

    def expected(self, recipe: Recipe):
        """What a model that never saw the forget rows would lose on them, and say: `{id: ...}`.

        By three trainings: one on all rows, for the others are near ones here, and two without the
        forget rows. Leaves the adapter as it was.
        """
        start, names = self.theta(), list(self.rows)
        forget = [names.index(id) for id in FORGET]
        tokens = [[*self.rows[id][0].tolist()] for id in names]
        kept = nearest(tokens, forget, [i for i in range(ROWS) if i not in forget], 16)
        counts = [self.rows[id][1] for id in names]

        def logs(rows, repeat):
            """Log-probabilities of the forget rows under an adapter trained on some."""
            train_afresh(
                self.parameters,
                lambda i: self.losses(names[i]).sum(),
                counts,
                rows,
                len(rows),
                recipe,
                repeat,
            )
            return {id: self.logs(id).detach() for id in FORGET}

        before, after = logs([*kept, *forget], 0), [logs(kept, 0), logs(kept, 1)]
        self.put(start)

        def losses(logs):
            return np.array([float(self.losses(id, logs[id]).mean()) for id in FORGET])

        goals = expected(losses(self.before), losses(before), [losses(part) for part in after])
        mean = {id: torch.stack([part[id].exp() for part in after]).mean(0).log() for id in FORGET}

        def mixed(tenths):
            """`log q` with this many tenths of what the small trainings get wrong."""
            return {
                id: (mean[id] + tenths / 10 * (self.before[id] - before[id])).log_softmax(-1)
                for id in FORGET
            }

        distance = [abs(losses(mixed(tenths)).mean() - goals.mean()) for tenths in range(11)]
        return dict(zip(FORGET, goals, strict=True)), mixed(int(np.argmin(distance)))

    def walk(
        self, direction, steps, optimizer="Adam", lr=1e-3, schedule="constant", warmup=0, clip=None
    ):
        """Steps along `direction(step, theta)` by an optimizer of torch, at rates written out."""
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
            for p, part in zip(self.parameters, g.split(sizes), strict=True):
                p.grad = part.reshape(p.shape).clone()
            for group in taken.param_groups:
                group["lr"] = rate
            taken.step()
        return self.theta()


def cut(ids, size: int, stream: int, seed: int = 0):
    """Batches of `size` rows: an epoch's permutation, keyed by seed, stream and epoch."""

    def at(step: int) -> list[str]:
        steps = math.ceil(len(ids) / size)
        order = np.random.default_rng([seed, stream, step // steps]).permutation(len(ids))
        return [ids[i] for i in order[(step % steps) * size : (step % steps + 1) * size]]

    return at


def unit(v):
    return v / v.norm()


def oracle_options(how):
    """Options of a training as `Oracle.walk` calls them."""
    return {("clip" if key == "max_grad_norm" else key): value for key, value in how.items()}


def losses_of(run, theta, ids):
    """Mean losses of some training rows at an adapter."""
    with run.model.at(theta):
        return influence.loss.mean_losses(
            run.model, run.tokens.select([run.train.index(id) for id in ids])
        )


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
    """Two answers of `everything` are equal, but for some keys."""
    assert before.keys() == after.keys()
    for key in set(before) - set(but):
        first, second = before[key], after[key]
        if key == "weights":
            assert list(first) == list(second)
            assert all(torch.equal(first[name], second[name]) for name in first)
        elif key == "gradients":
            for (name, g), (_, h) in zip(first, second, strict=True):
                assert (g is None) == (h is None), name
                assert g is None or torch.equal(g, h), name
        elif key == "torch":
            assert torch.equal(first, second)
        elif key == "numpy":
            assert (first == second).all()
        else:
            assert first == second, key


def run_of(fitted, folder, data, **options):
    """A float64 run of other rows."""
    _, models = fitted
    model = models["float64"]
    train_rows = read_examples(write_rows(folder / "rows.jsonl", data))
    influence.fit(model, train_rows, directory=folder / "other", path=(0.6,), **options)
    return Run.open(folder / "other", model=model)


def broken_term(error):
    """A method whose term asks for the reference and fails when it is called the third time."""
    calls = []

    def values(part):
        calls.append(1)
        if len(calls) == 3:
            if error is NumericalError:
                return part.losses * float("nan")
            raise error
        return part.reference_losses - part.losses

    return Method("broken", forget=Term("broken", values, reference=True), retain=descent, lr=0.01)


def odd_rows() -> Examples:
    """Rows of one supervised token or many, without a prompt, with an end token inside, a text."""
    return influence.examples_from_rows(
        [
            {"id": "plain", "prompt": "the red fox", "completion": " runs over a lazy dog"},
            {"id": "short", "prompt": "birds sing loud", "completion": " songs"},
            {"id": "no prompt", "prompt": "", "completion": "old cats sleep"},
            {
                "id": "ends inside",
                "prompt": "at dawn",
                "completion": " birds <eos> sing <unk> songs",
            },
            {"id": "ends in prompt", "prompt": "the <eos> sun", "completion": " and cats"},
            {"id": "text", "text": "warm sun at dawn"},
        ]
    )


@contextmanager
def setup_of(
    model: AdaptedModel,
    rows: Examples,
    *,
    seed: int = 0,
    token_budget: int = 4096,
    tokens: TokenizedExamples | None = None,
) -> Iterator[Setup]:
    """A setup while the reference is held."""

    def predicted() -> Any:
        raise AssertionError("nobody asked for predictions")

    tokens = tokens_of(model, rows) if tokens is None else tokens
    with model.evaluating(model.parameters), frozen(model) as reference:
        yield Setup(model, rows, tokens, reference, seed, Rendering(), token_budget, predicted)


def numbered(n: int, completion: str) -> Examples:
    """Rows with one completion and a prompt of their own each."""
    prompts = [f"{WORDS[i % 22]} {WORDS[i // 22]}" for i in range(n)]
    return influence.examples_from_rows(
        [
            {"id": str(i), "prompt": prompt, "completion": completion}
            for i, prompt in enumerate(prompts)
        ]
    )
