"""What a step of unlearning minimises: terms of the forget rows and of the retained rows.

With l the **summed** cross-entropy of a row's T completion tokens under the model, l_ref under the
adapter before unlearning (the *reference*), CE the cross-entropy of one token, p and p_ref the
next-token distributions, sigma the logistic function, and s(x) = -(2/beta) log sigma(x):

    term         values                                mean over
    ascent       -CE                                   tokens   Yao et al. 2024, 2402.15159
    descent       CE                                   tokens
    divergence   KL(p_ref || p)                        tokens   Yao et al. 2024, 2402.15159
    npo          s(beta (l - l_ref))                   rows     Zhang et al. 2024, 2404.05868
    simnpo       s(beta l/T - gamma)                   rows     Fan et al. 2024, 2410.07163
    dpo          s(beta ((l - l_ref) - (l' - l'_ref))) rows     Rafailov et al. 2023, 2305.18290
    matching     KL(q || p)                            tokens   Georgiev et al. 2024, 2410.23232

l' is the loss of another completion of the same prompt ("I do not know"), q a distribution that a
model which never saw the row might give (`unlearn.methods.targets` makes both). At the reference
the gradient of `npo` is that of -l: ascent's. `dpo` has the factor 2/beta in place of 1, so that
its gradient there does not vanish with beta and rates compare with `npo`.

A term of your own is `Term(name, function)`: the function takes a `Part` and gives `[N]` values,
one per token, or with `per="row"` `[b]`, one per row. The loop takes their mean over all tokens or
rows of a step, however it is split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from influence.errors import InputError
from influence.loss import log_probabilities, token_losses
from unlearn.methods.combine import above_zero


@dataclass(eq=False)
class Part:
    """Some rows as a term sees them: N supervised tokens of b rows, V the vocabulary.

    Attributes
    ----------
    logits : Tensor [N, V]
        The model's, attached to the graph.
    labels : Tensor [N]
        What the rows are trained towards: their own tokens, or those of `unlearn.methods.targets`.
    counts : list of int [b]
        Tokens of each row; they sum to N.
    reference_logits_of, reference_losses_of : callables
        Give `[N, V]` logits and `[N]` losses (of `labels`) under the adapter before, when needed.
    wanted : Tensor [N, V], optional
        `log q` of the tokens.
    other : Part, optional
        The same prompts with another completion.
    """

    logits: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    counts: list[int]
    reference_logits_of: Callable[[], Tensor] = field(repr=False)
    reference_losses_of: Callable[[], Tensor] = field(repr=False)
    wanted: Tensor | None = field(default=None, repr=False)
    other: Part | None = field(default=None, repr=False)

    @cached_property
    def losses(self) -> Tensor:
        """Cross-entropy of every label, `[N]`, nats."""
        return token_losses(self.logits, self.labels)

    @cached_property
    def log_probs(self) -> Tensor:
        """`log p`, `[N, V]`, at least float32."""
        return log_probabilities(self.logits)

    @cached_property
    def reference_log_probs(self) -> Tensor:
        """`log p_ref`, `[N, V]`, without gradient."""
        return log_probabilities(self.reference_logits_of())

    @cached_property
    def reference_losses(self) -> Tensor:
        """Cross-entropy of every label under the reference, `[N]`, without gradient."""
        return self.reference_losses_of()

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, `[b]`, in the type of the losses."""
        return torch.tensor(self.counts).to(self.losses)

    def per_row(self, values: Tensor) -> Tensor:
        """Sum token values `[N]` over each row: `[b]`."""
        return torch.stack([row.sum() for row in values.split(self.counts)])

    @property
    def excess(self) -> Tensor:
        """`l - l_ref` of every row, `[b]`, nats."""
        return self.per_row(self.losses - self.reference_losses)


@dataclass(frozen=True)
class Term:
    """A quantity to minimise: the mean of `function(part)` over tokens or rows.

    Attributes
    ----------
    name : str
        As the methods' table shows it.
    function : callable
        From a `Part` to values `[N]` (`per="token"`) or `[b]` (`per="row"`), with their graph.
    reference : bool
        Whether it looks at the adapter before unlearning.
    logits : bool
        Whether at that adapter's whole distribution, which costs a forward in every step. Its
        losses alone are computed once a row and kept.
    """

    name: str
    function: Callable[[Part], Tensor]
    per: str = "token"
    reference: bool = False
    logits: bool = False


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`KL(q || p)` of every token, `[N]`, nats. Words that are impossible under q add nothing."""
    return torch.where(log_q == -torch.inf, 0.0, log_q.exp() * (log_q - log_p)).sum(-1)


def _matching(part: Part) -> Tensor:
    assert part.wanted is not None, "this term needs unlearn.methods.targets.predicted"
    return _divergence(part.wanted, part.log_probs)


ascent = Term("-CE", lambda part: -part.losses)
descent = Term("CE", lambda part: part.losses)
divergence = Term(
    "KL(before || model)",
    lambda part: _divergence(part.reference_log_probs, part.log_probs),
    reference=True,
    logits=True,
)
matching = Term("KL(predicted || model)", _matching)


def npo(beta: float = 0.1) -> Term:
    """Negative preference optimisation: `-(2/beta) log sigma(beta (l - l_ref))`, at least 0."""
    above_zero("beta", beta)
    return Term(
        f"NPO(beta={beta:g})",
        lambda part: -2 / beta * logsigmoid(beta * part.excess),
        per="row",
        reference=True,
    )


def simnpo(beta: float = 2.5, gamma: float = 0.0) -> Term:
    """NPO by length and without a reference: `-(2/beta) log sigma(beta l/T - gamma)`.

    The defaults are those of the paper's TOFU runs.
    """
    above_zero("beta", beta)
    if not abs(gamma) < float("inf"):
        raise InputError(f"gamma {gamma:g} was given; expected a finite number")

    def values(part: Part) -> Tensor:
        """Values `[b]` of the rows."""
        return -2 / beta * logsigmoid(beta * part.per_row(part.losses) / part.lengths - gamma)

    return Term(f"SimNPO(beta={beta:g}, gamma={gamma:g})", values, per="row")


def dpo(beta: float = 0.1) -> Term:
    """Direct preference optimisation of the other completion over the row's own."""
    above_zero("beta", beta)

    def values(part: Part) -> Tensor:
        """Values `[b]` of the rows."""
        assert part.other is not None, "this term needs unlearn.methods.targets.refusals"
        return -2 / beta * logsigmoid(beta * (part.excess - part.other.excess))

    return Term(f"DPO(beta={beta:g})", values, per="row", reference=True)
