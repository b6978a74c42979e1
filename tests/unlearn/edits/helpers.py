"""Edits of tiny models, and slow oracles of them that share no code with the edits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import influence
import unlearn
from influence.cost import Cost
from influence.tokens import TokenizedExamples
from tests.conftest import tokens_of
from tests.oracles import dense_objective, logits_fn, sampled_rows, summed_loss
from unlearn.edits.goals import Goals
from unlearn.record.version import Version
from unlearn.retraining.local import LocalRetraining
from unlearn.unseen_outputs import ExpectedOutputs

ANSWERS = {"r0-2": " warm songs at dawn", "r0-5": " birds sing loud"}
F64 = torch.float64


def options_of(**options):
    """Enough steps for these tests, no guard, unless other options are given."""
    return {"steps": 6, "rest": 4, "max_damage": 1e6} | options


def edit_of(run, **options):
    """An edit with those options, of two removed rows unless they name other changes."""
    names = ("remove", "relabel", "correct")
    changes = {name: options.pop(name) for name in names if name in options}
    return unlearn.edit(run, **(changes or {"remove": ["r0-0", "r0-3"]}), **options_of(**options))


def random(seed, *shape):
    """Normal numbers, float64."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def near(value, expected, tolerance):
    """Relative distance in the Euclidean norm."""
    assert float(expected.norm()) > 0
    assert float((value - expected).norm() / expected.norm()) < tolerance


#: Stopping rules that an edit has not, and what is said to them.
WRONG_RULES = [
    ("", "expected one of expected, loss=X"),
    ("soon", "expected one of expected, loss=X"),
    ("base", "expected one of expected, loss=X"),
    ("expected=3", "expected one of expected, loss=X"),
    ("converged=1", "expected one of expected, loss=X"),
    ("loss", "expected one of expected, loss=X"),
    ("loss=", "expected one of expected, loss=X"),
    ("loss=0", "expected one of expected, loss=X"),
    ("loss=-1", "expected one of expected, loss=X"),
    ("loss=nan", "expected one of expected, loss=X"),
    ("loss=inf", "with X above 0"),
    ("steps=inf", "N whole"),
    ("steps=2.5", "N whole"),
    ("steps=0", "N whole"),
    ("norm=", "N whole"),
    ("norm=x", "N whole"),
    ("Loss=2", "N whole"),
]


# ---- runs at the adapter itself, and what an edit of them should be ------------------------------

SPECS = {
    "ekfac": influence.EKFAC(samples=2),
    "fisher": influence.Fisher(samples=2),
    "empirical": influence.Fisher(samples=0),
    "ggn": influence.GGN(),
    "hessian": influence.Hessian(),
    "identity": influence.Identity(),
}


DAMPING = {"hessian": "abs:2.0"}


TASKS = {
    "remove": {"remove": ["r0-1", "r0-4"]},
    "relabel": {"relabel": {"r0-2": " warm songs at dawn"}},
    "correct": {
        "correct": {
            "r0-0": {"prompt": "the old fox"},
            "r0-5": {"prompt": "a", "completion": " dog"},
        }
    },
    "mixed": {
        "remove": ["r0-3"],
        "relabel": {"r0-5": " birds sing loud"},
        "correct": {"r0-1": {"prompt": "cats sleep in"}},
    },
}


def rows_after(run, task):
    """The rows after an edit, those that go and those that come, each as `(tokens, w)`, by hand."""
    request = {"remove": [], "relabel": {}, "correct": {}} | TASKS[task]
    changes = {id: {"completion": text} for id, text in request["relabel"].items()}
    changes |= request["correct"]
    old = [{"id": row.id, "prompt": row.prompt, "completion": row.completion} for row in run.train]
    new = [row | changes.get(row["id"], {}) for row in old if row["id"] not in request["remove"]]
    touched = {*request["remove"], *changes}

    def pack(rows):
        if not rows:
            return [], []
        tokens = tokens_of(run.model, influence.examples_from_rows(rows))
        return tokens, [weight(len(item.supervised.nonzero()[0])) for item in tokens]

    counts = [
        int(item.supervised.sum())
        for item in tokens_of(run.model, influence.examples_from_rows(old))
    ]
    per_token = run.manifest.objective.reduction == "token"
    weight = (lambda T: 1 / sum(counts)) if per_token else (lambda T: 1 / (len(old) * T))
    return (
        pack(new),
        pack([row for row in old if row["id"] in touched]),
        pack([r for r in new if r["id"] in touched]),
    )


def plain_gradient(model, tokens, w, theta=None):
    """`sum_i w_i grad l_i` by autograd, one row at a time, with the full logits."""
    total = torch.zeros(model.space.size, dtype=F64)
    for item, weight in zip(tokens, w, strict=True):
        f, targets = logits_fn(model, item)
        at = (model.snapshot() if theta is None else theta).clone().requires_grad_(True)
        total += weight * torch.autograd.grad(summed_loss(f, targets)(at), at)[0]
    return total


def ekfac_after(run, tokens, w):
    """Eigenvalues in the same bases, leaf by leaf, from every row after, and the dense matrix."""
    samples = run.manifest.curvature["samples"]
    rows = torch.stack(sampled_rows(run.model, tokens, samples)).view(len(tokens), samples, -1)
    matrix, eigenvalues = torch.zeros(run.model.space.size, run.model.space.size, dtype=F64), []
    for block in run.curvature("ekfac").leaf_blocks:
        values = torch.zeros_like(block.eigenvalues)
        basis = torch.kron(block.narrow, block.wide)  # columns: narrow-major, as the values
        for draws, weight in zip(rows, w, strict=True):
            for row in draws:
                G = row[block.leaf.slice].view(block.leaf.shape)
                G = G if block.leaf.is_A else G.T
                values += weight / samples * (block.narrow.T @ G @ block.wide) ** 2
        dense = (basis * values.ravel()) @ basis.T
        if not block.leaf.is_A:
            r, d = values.shape
            dense = dense.view(r, d, r, d).permute(1, 0, 3, 2).reshape(r * d, r * d)
        matrix[block.leaf.slice, block.leaf.slice] = dense
        eigenvalues.append(values)
    return eigenvalues, matrix


def dense_after(run, name, tokens, w):
    """C after the edit, from every row that there is then."""
    if name in ("ggn", "hessian"):
        return dense_objective(run.model, tokens, w, name)
    if name == "ekfac":
        return ekfac_after(run, tokens, w)[1]
    if name == "identity":
        return torch.zeros(run.model.space.size, run.model.space.size, dtype=F64)
    draws = max(1, run.manifest.curvature["samples"])
    if name == "fisher":
        rows = torch.stack(sampled_rows(run.model, tokens, draws))
    else:
        rows = torch.stack([plain_gradient(run.model, [item], [1.0]) for item in tokens])
    return rows.T @ (torch.tensor(np.repeat(w, draws) / draws)[:, None] * rows)


def lambda_of(operator):
    """The fit's lambda over the coordinates, block by block."""
    lam = torch.zeros(operator.curvature.size, dtype=F64)
    for block, value in zip(operator.curvature.blocks, operator.lam.tolist(), strict=True):
        lam[block] = value
    return lam


def expected_delta(run, name, task):
    """The one-shot edit, from dense matrices."""
    (tokens, w), gone, come = rows_after(run, task)
    rhs = plain_gradient(run.model, *gone) - plain_gradient(run.model, *come)
    C = dense_after(run, name, tokens, w)
    return torch.linalg.solve(C + torch.diag(lambda_of(run.operator())), rhs)


# ---- the merit of an edit ------------------------------------------------------------------------


@dataclass(frozen=True)
class GoalRows:
    """Seven rows with goals: old and new, some above, some below, some far off.

    `local` holds adapters that were drawn near the start, not trained.
    """

    start: Version
    tokens: TokenizedExamples
    targets: np.ndarray
    rises: np.ndarray
    local: LocalRetraining
    tolerance: float

    def goals(self):
        """The goals, their expected outputs not computed yet."""
        outputs = ExpectedOutputs(self.start, self.tokens, self.targets, self.local, Cost())
        return Goals(self.tokens, self.targets, self.rises, outputs)


def hinge(x, s):
    """0, then a parabola up to s, then a line."""
    return torch.where(x <= 0, torch.zeros_like(x), torch.where(x < s, x**2 / (2 * s), x - s / 2))


def hand_made_merit(rows, log_q):
    """M as a function of the flat parameters, row by row, with `log_q` of each."""
    counts = [int(item.supervised.sum()) for item in rows.tokens]

    def merit(theta):
        total = torch.zeros((), dtype=theta.dtype)
        for i, item in enumerate(rows.tokens):
            f, labels = logits_fn(rows.start.model, item)
            log_p = f(theta).log_softmax(-1)
            loss = torch.nn.functional.nll_loss(log_p, labels)
            sign = 1 if rows.rises[i] else -1
            term = hinge(sign * (rows.targets[i] - loss), 0.5 * rows.targets[i])
            term = term + (log_q[i].exp() * (log_q[i] - log_p)).sum(-1).mean()
            total = total + counts[i] / sum(counts) * term
        return total

    return merit
