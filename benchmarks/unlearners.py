"""Rivals of edit by influences in `edits.py`: gradient steps, fine-tuning, a sign step, LLMEraser.

Every rival starts where the model is, and gives the LoRA parameters `[P]` it ends at and what it
cost, in row-gradients: a row run forward and backward is 1, forward alone 1/3. The rivals that take
steps look at the edited rows before each one and stop when the mean loss of the old contents F is
at its target or above and, for a relabelling or correction, that of the new contents L at its own
or below; or after `STEPS` steps. With CE the mean cross-entropy per token of a set of rows, R the
`RETAINED` untouched rows drawn anew for each step, and u(v) = v / |v|, a step moves the parameters
by

    ascent              0.1 u(grad E)
    ascent + descent    0.1 u(grad E - grad CE(R))              Yao et al. 2024, arXiv 2402.15159
    ascent + KL         0.1 u(grad E - grad KL(ref || p; R))
    NGDiff              0.1 (u(grad E) - u(grad CE(R)))         Bu et al. 2024, arXiv 2410.22086

where E = CE(F) - CE(L), without what is at its target, and ref is the adapter before, over the
completion tokens. Ascent + descent is 1:1, NGDiff at a fixed rate.

The first three are normalised here, so that one step length serves models of any size; the papers
tune a learning rate instead. NGDiff is the paper's own step without its learning-rate search (GeN).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.cost import Cost
from influence.gradients import loss_sum_gradient
from influence.loss import supervised_logits, token_losses
from influence.tokens import TokenizedExamples
from unlearn.retraining.recipe import Recipe

#: Length of a step, and how many there are at most.
STEP, STEPS = 0.1, 60
#: Untouched rows in a step.
RETAINED = 45
TOKEN_BUDGET = 4096


@dataclass(frozen=True, eq=False)
class Edited:
    """The rows that go or change, and the mean losses that they should reach, nats per token.

    `old` are their contents, `new` those that come instead (None: the rows go).
    """

    old: TokenizedExamples
    target: float
    new: TokenizedExamples | None = None
    new_target: float = float("inf")

    def __len__(self) -> int:
        return len(self.old) + (0 if self.new is None else len(self.new))

    def look(self, model: AdaptedModel, cost: Cost, *, whole: bool = False) -> tuple[Tensor, bool]:
        """`grad E` [P] where the model is, and whether all targets are reached.

        `whole`: E with its parts at target.
        """
        gradient, losses = mean_gradient(model, self.old, cost)
        missing = [bool(losses.mean() < self.target)]
        total = gradient * float(missing[0] or whole)
        if self.new is not None:
            gradient, losses = mean_gradient(model, self.new, cost)
            missing.append(bool(losses.mean() > self.new_target))
            total = total - gradient * float(missing[1] or whole)
        return total, not any(missing)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Where a rival ended, `theta` [P], at what cost, and whether the targets were reached."""

    theta: Tensor = field(repr=False)
    cost: Cost
    steps: int
    reached: bool | None = None


def mean_gradient(
    model: AdaptedModel, tokens: TokenizedExamples, cost: Cost
) -> tuple[Tensor, np.ndarray]:
    """`grad CE` [P] of some rows where the model is, and each row's mean loss `[n]`."""
    weights = np.full(len(tokens), 1 / tokens.counts.sum())
    return loss_sum_gradient(model, tokens, weights, token_budget=TOKEN_BUDGET, cost=cost)


def kl_gradient(
    model: AdaptedModel, tokens: TokenizedExamples, reference: Tensor, cost: Cost
) -> Tensor:
    """The gradient `[P]` of `KL(ref || p)`, meaned over completion tokens, where the model is."""
    total, count = torch.zeros_like(reference), int(tokens.counts.sum())
    cost.gradients += len(tokens)
    cost.forwards += len(tokens)
    for rows in plan_batches(tokens, TOKEN_BUDGET):
        batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
        with model.at(reference), model.evaluating(), torch.no_grad():
            log_q = supervised_logits(model, batch).logits.log_softmax(-1)
        with model.evaluating(model.parameters):
            log_p = supervised_logits(model, batch).logits.log_softmax(-1)
            divergence = (log_q.exp() * (log_q - log_p)).sum() / count
            total += model.space.flatten(list(torch.autograd.grad(divergence, model.parameters)))
    return total


def unit(v: Tensor) -> Tensor:
    """`v / |v|`, where zero stays zero."""
    return v / v.norm().clamp(min=1e-30)


# ---- steps until the targets are reached ---------------------------------------------------------


def ascent(
    model: AdaptedModel, edited: Edited, rest: TokenizedExamples, rng: np.random.Generator
) -> Outcome:
    """Gradient ascent on the old contents and descent on the new ones, without retained rows."""
    return _walk(model, edited, lambda pull, _: unit(pull), Cost())


def ascent_descent(
    model: AdaptedModel, edited: Edited, rest: TokenizedExamples, rng: np.random.Generator
) -> Outcome:
    """Ascent on the edited rows, descent on as much of the retained ones' mean cross-entropy."""
    cost = Cost()
    return _walk(
        model,
        edited,
        lambda pull, _: unit(pull - mean_gradient(model, drawn(rest, rng), cost)[0]),
        cost,
    )


def ascent_kl(
    model: AdaptedModel, edited: Edited, rest: TokenizedExamples, rng: np.random.Generator
) -> Outcome:
    """Ascent on the edited rows, held to the adapter before by KL on retained rows."""
    cost, start = Cost(), model.snapshot()
    return _walk(
        model,
        edited,
        lambda pull, _: unit(pull - kl_gradient(model, drawn(rest, rng), start, cost)),
        cost,
    )


def ngdiff(
    model: AdaptedModel,
    edited: Edited,
    rest: TokenizedExamples,
    rng: np.random.Generator,
    *,
    budget: float = float("inf"),
) -> Outcome:
    """Normalised difference of the gradients, ended before it costs more than `budget`."""
    cost = Cost()

    def move(pull: Tensor, _: int) -> Tensor:
        """The normalised difference at a step."""
        return normalised_difference(pull, mean_gradient(model, drawn(rest, rng), cost)[0])

    return _walk(
        model, edited, move, cost, budget=budget, price=min(RETAINED, len(rest)) + len(edited)
    )


def normalised_difference(forget: Tensor, retain: Tensor) -> Tensor:
    """`d = u(g_F) - u(g_R)` [P], so that `<g_F, d> >= 0 >= <g_R, d>`.

    To first order F's loss rises and R's does not.
    """
    return unit(forget) - unit(retain)


def drawn(rest: TokenizedExamples, rng: np.random.Generator) -> TokenizedExamples:
    """`RETAINED` of the untouched rows, all where there are fewer."""
    return rest.select(rng.choice(len(rest), min(RETAINED, len(rest)), replace=False))


def _walk(
    model: AdaptedModel,
    edited: Edited,
    move: Callable[[Tensor, int], Tensor],
    cost: Cost,
    *,
    budget: float = float("inf"),
    price: float = 0.0,
) -> Outcome:
    """Steps of `STEP * move(grad E, number)`.

    `price` is the row-gradients of one more step and of the gradient after it.
    """
    theta = model.snapshot()
    for number in range(STEPS + 1):
        with model.at(theta):
            pull, reached = edited.look(model, cost)
            if reached or number == STEPS or cost.total + price > budget:
                return Outcome(theta, cost, number, reached)
            theta = theta + STEP * move(pull, number)
    raise AssertionError("unreachable")


# ---- without a target ----------------------------------------------------------------------------


def sign_step(
    model: AdaptedModel,
    edited: Edited,
    rest: TokenizedExamples,
    rng: np.random.Generator,
    *,
    norm: float,
) -> Outcome:
    """`theta + c sign(grad E)`, as long as an edit's delta: `|c sign(grad E)| = norm`."""
    cost = Cost()
    pull, _ = edited.look(model, cost, whole=True)
    return Outcome(model.snapshot() + norm * unit(pull.sign()), cost, 1)


def finetune(
    model: AdaptedModel,
    edited: Edited,
    rest: TokenizedExamples,
    rng: np.random.Generator,
    *,
    seconds: float,
    recipe: Recipe,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Further training by AdamW on the rows after the edit, for as long as an edit took.

    The recipe's learning rate falls linearly to zero over the time. Epochs are shuffled by `rng`;
    dropout is off.
    """
    rows = list(rest) if edited.new is None else [*rest, *edited.new]
    tokens = TokenizedExamples(rows, [str(number) for number in range(len(rows))])
    cost, steps, before = Cost(), 0, model.snapshot()
    with model.at(before), model.evaluating(model.parameters):
        optimizer = torch.optim.AdamW(
            model.parameters,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            betas=recipe.betas,
            eps=recipe.eps,
        )
        begun, order = clock(), np.zeros(0, dtype=int)
        while (past := clock() - begun) < seconds:
            if len(order) == 0:
                order = rng.permutation(len(tokens))
            some, order = order[: recipe.batch_size], order[recipe.batch_size :]
            part = supervised_logits(
                model, collate(tokens, some, pad_id=model.pad_id, device=model.device)
            )
            optimizer.param_groups[0]["lr"] = recipe.lr * (1 - past / seconds)
            optimizer.zero_grad()
            token_losses(part.logits, part.targets).mean().backward()
            optimizer.step()
            cost.gradients += len(some)
            steps += 1
        optimizer.zero_grad()
        theta = model.snapshot()
    return Outcome(theta, cost, steps)


def llmeraser(
    model: AdaptedModel, edited: Edited, rest: TokenizedExamples, rng: np.random.Generator
) -> Outcome:
    """LLMEraser as released (Ding et al. 2024, arXiv 2412.00383).

    The script is attack_demo.py of github.com/oceanoceanna/LLMEraser.

    `min_x 1/2 x^T (H + lambda) x - b^T x`, `b = (sum_F grad CE_i - sum_L grad CE_i) / n`, by 20
    steps of Adam at 1e-5 from x = 1e-5 in every coordinate, and theta + x. Imitated with the
    numbers of its script: one row a step, drawn from the training rows without repetition; the
    product H x is taken without `create_graph`, so the gradient that Adam sees is `1/2 H x + lambda
    x - b` and the optimum twice the solution; lambda = 1e-5 is Adam's weight decay. Each coordinate
    moves by at most 2e-4: this is a step along signs, no solve. There dropout stays on; here it is
    off (the testbeds' adapters have none).

    What could not be known: which of the 20 iterates was reported (here: the last), and the files
    of rows before and after (their code says that F is what the adapter was trained on and L what
    should have been there, as here; for a removal there L keeps the row with part of its prompt cut
    off, here L is empty). Work: 2 row-gradients a product.
    """
    cost, rows = Cost(), [*rest, *edited.old]
    tokens = TokenizedExamples(rows, [str(number) for number in range(len(rows))])
    b = torch.zeros_like(model.snapshot())
    for some, sign in ((edited.old, 1.0), (edited.new, -1.0)):
        if some is not None:
            weights = sign / (some.counts * len(rows))
            b += loss_sum_gradient(model, some, weights, token_budget=TOKEN_BUDGET, cost=cost)[0]
    x = torch.full_like(b, 1e-5).requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=1e-5, weight_decay=1e-5)
    order = rng.permutation(len(tokens))
    for number in range(20):
        row = order[number % len(order)]
        x.grad = hessian_product(model, tokens.select([int(row)]), x.detach()) / 2 - b
        optimizer.step()
        cost.gradients += 2
    return Outcome(model.snapshot() + x.detach(), cost, 20)


def hessian_product(model: AdaptedModel, tokens: TokenizedExamples, v: Tensor) -> Tensor:
    """`H v` [P], H the Hessian of the rows' mean cross-entropy per token (Pearlmutter 1994)."""
    batch = collate(tokens, np.arange(len(tokens)), pad_id=model.pad_id, device=model.device)
    # The other kernels of attention have no second derivative.
    with model.evaluating(model.parameters), sdpa_kernel(SDPBackend.MATH):
        part = supervised_logits(model, batch)
        loss = token_losses(part.logits, part.targets).mean()
        first = model.space.flatten(
            list(torch.autograd.grad(loss, model.parameters, create_graph=True))
        )
        return model.space.flatten(
            list(torch.autograd.grad(first @ v, model.parameters, materialize_grads=True))
        )
