"""A term's batches and gradient against plain loops, alone and shared out over processes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import influence
from influence import distributed
from influence.adapter import AdaptedModel
from influence.cost import Cost
from influence.errors import InputError, NumericalError
from influence.tokens import TokenizedExamples
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, examples, tokens_of
from tests.unlearn.methods.helpers import odd_rows, setup_of
from unlearn.methods import targets, terms
from unlearn.methods.batches import TermBatches
from unlearn.methods.reference import ReferenceAdapter, frozen
from unlearn.methods.targets import Setup, Target
from unlearn.methods.terms import Term


def plain_logits(model: AdaptedModel, item: Any) -> Tensor:
    """`[T_i, V]` of an unpadded row, attached to the graph, read where each token is predicted."""
    whole = model.model.get_base_model()(
        input_ids=torch.from_numpy(item.input_ids)[None], use_cache=False
    ).logits[0]
    return torch.stack([whole[t - 1] for t in range(1, len(item)) if item.supervised[t]])


def cross_entropy(logits: Tensor, labels: Any) -> Tensor:
    chosen = [row.logsumexp(0) - row[int(label)] for row, label in zip(logits, labels, strict=True)]
    return torch.stack(chosen)


def true_labels(item: Any) -> list[int]:
    return item.input_ids[item.supervised].tolist()


def log_sigma(x: Tensor) -> Tensor:
    return -(1 + (-x).exp()).log()


def plain_term(
    name: str, model: AdaptedModel, tokens: Any, target: Target, theta: Tensor
) -> Tensor:
    """The value of a term over all rows, row by row, the reference by really going back to it."""

    def losses_of(items: Any, labels: list[Any]) -> list[Tensor]:
        return [
            cross_entropy(plain_logits(model, item), row_labels)
            for item, row_labels in zip(items, labels, strict=True)
        ]

    labels = (
        [true_labels(item) for item in tokens]
        if target.labels is None
        else [row_labels.tolist() for row_labels in target.labels]
    )
    others = list(target.other or [])
    other_labels = [true_labels(item) for item in others]
    with model.at(theta), torch.no_grad():
        before, other_before = losses_of(tokens, labels), losses_of(others, other_labels)
        wanted = [plain_logits(model, item).log_softmax(-1) for item in tokens]
    n, total = len(tokens), sum(len(row_labels) for row_labels in labels)
    now, other_now = losses_of(tokens, labels), losses_of(others, other_labels)
    if name in ("ascent", "descent"):
        value = sum(losses.sum() for losses in now) / total
        return torch.as_tensor(-value if name == "ascent" else value)
    if name in ("divergence", "matching"):
        if target.wanted is not None:
            wanted = [target.wanted(np.array([i])) for i in range(n)]
        logs = [plain_logits(model, item).log_softmax(-1) for item in tokens]
        return torch.as_tensor(
            sum((q.exp() * (q - p)).sum() for q, p in zip(wanted, logs, strict=True)) / total
        )
    x = [a.sum() - b.sum() for a, b in zip(now, before, strict=True)]
    if name == "simnpo":
        x = [losses.mean() - 0.25 for losses in now]  # gamma / beta
    if name == "dpo":
        x = [a - (b.sum() - c.sum()) for a, b, c in zip(x, other_now, other_before, strict=True)]
    return torch.as_tensor(sum(-2 / 0.4 * log_sigma(0.4 * excess) for excess in x) / n)


TERMS: dict[str, tuple[Term, str]] = {
    "ascent": (terms.ascent, "own"),
    "descent to random labels": (terms.descent, "random"),
    "descent to adversarial labels": (terms.descent, "adversarial"),
    "divergence": (terms.divergence, "own"),
    "matching": (terms.matching, "predicted"),
    "npo": (terms.npo(0.4), "own"),
    "npo of random labels": (terms.npo(0.4), "random"),
    "simnpo": (terms.simnpo(0.4, 0.1), "own"),
    "dpo": (terms.dpo(0.4), "refusals"),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("token_budget", [12, 4096])
def test_a_terms_value_and_gradient_are_those_of_a_plain_loop(small, name, token_budget):
    """Away from the reference, in batches of a budget, in the order of a permutation."""
    model, rows = small, odd_rows()[:5]
    tokens = tokens_of(model, rows)
    term, kind = TERMS[name]
    generator = torch.Generator().manual_seed(0)
    logs = [
        torch.randn(int(c), 25, generator=generator, dtype=torch.float64).log_softmax(-1)
        for c in tokens.counts
    ]
    theta = model.snapshot()
    with setup_of(model, rows, tokens=tokens) as setup:
        setup = Setup(
            **{
                **vars(setup),
                "predicted": lambda: lambda some: torch.cat([logs[row] for row in some.tolist()]),
            }
        )
        target = getattr(targets, kind)(setup)
        batches = TermBatches(
            model, tokens, term, target, setup.reference, len(tokens), token_budget, 0, 31, Cost()
        )
        batches.gradient(0)  # the reference's losses are kept from here on
        with model.at(
            theta + 0.1 * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        ):
            value = plain_term(name.split()[0], model, tokens, target, theta)
            gradients = torch.autograd.grad(value, model.parameters)
            wanted = model.space.flatten(list(gradients))
            losses = np.array(
                [
                    cross_entropy(plain_logits(model, item), true_labels(item)).mean().item()
                    for item in tokens
                ]
            )
            for step in (1, 2):
                gradient = batches.gradient(step)
                assert gradient.value == pytest.approx(value.item(), rel=1e-10)
                assert float((gradient.vector - wanted).norm() / wanted.norm()) < 1e-10
                assert gradient.losses == pytest.approx(losses[gradient.rows], rel=1e-10)
                assert batches.mean_loss(gradient.rows) == pytest.approx(gradient.loss, rel=1e-10)


def test_the_references_losses_are_run_once_a_row(small):
    """NPO's reference costs one forward a row, KL's one a row and step."""
    tokens = tokens_of(small, odd_rows()[:5])
    rows_run = {}
    with small.evaluating(small.parameters), frozen(small) as reference:
        for name, term in (
            ("npo", terms.npo()),
            ("divergence", terms.divergence),
            ("ascent", terms.ascent),
        ):
            batches = TermBatches(small, tokens, term, Target(), reference, 2, 4096, 0, 31, Cost())
            start = reference.rows_run
            for step in range(6):  # two epochs
                batches.gradient(step)
            rows_run[name] = reference.rows_run - start
            assert batches.cost.forwards == rows_run[name]
            assert batches.cost.gradients == 10
    assert rows_run == {"npo": 5, "divergence": 10, "ascent": 0}


# ---- in the loop ---------------------------------------------------------------------------------


LN2 = math.log(2)


def batches_of(
    model: AdaptedModel,
    reference: ReferenceAdapter | None,
    term: Term,
    *,
    tokens: TokenizedExamples | None = None,
    target: Target | None = None,
    batch_size: int = 6,
    token_budget: int = 4096,
) -> TermBatches:
    tokens = tokens_of(model, examples(6)) if tokens is None else tokens
    return TermBatches(
        model, tokens, term, target or Target(), reference, batch_size, token_budget, 0, 1, Cost()
    )


# The norms of these keep float64, where Llama's round gradients to float32.
@pytest.mark.parametrize("kind", ["phi", "gpt2"])
def test_npo_in_the_loop_starts_along_gradient_ascent(kind):
    """ga is a mean over N_tok tokens, NPO one over n rows of sums.

    At the reference its gradient is N_tok / n times ga's.
    """
    model = build_model(kind, layers=1)
    with model.evaluating(model.parameters), frozen(model) as reference:
        ga = batches_of(model, reference, terms.ascent, token_budget=20).gradient(0)
        for beta in (0.1, 3.0):
            npo = batches_of(model, reference, terms.npo(beta), token_budget=20).gradient(0)
            tokens = int(tokens_of(model, examples(6)).counts.sum())
            wanted = ga.vector * tokens / 6
            assert float((npo.vector - wanted).norm() / wanted.norm()) < 1e-10
            assert npo.value == pytest.approx(2 / beta * LN2, rel=1e-10)
        kept = batches_of(model, reference, terms.divergence).gradient(0)
        assert abs(kept.value) < 1e-12
        assert float(kept.vector.norm()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_start_where_they_should(dtype):
    """Parameters and terms are float32. The reference runs the same operations, so KL is zero."""
    model = build_model("llama", layers=1, dtype=dtype)
    with model.evaluating(model.parameters), frozen(model) as reference:
        kept = batches_of(model, reference, terms.divergence).gradient(0)
        assert abs(kept.value) < 1e-6
        gradient = batches_of(model, reference, terms.npo(0.1)).gradient(0)
        assert gradient.value == pytest.approx(20 * LN2, rel=1e-5)
        ga = batches_of(model, reference, terms.ascent).gradient(0)
        cosine = (
            gradient.vector.double()
            @ ga.vector.double()
            / gradient.vector.double().norm()
            / ga.vector.double().norm()
        )
        assert float(cosine) > 0.999
        assert gradient.vector.dtype == torch.float32


def test_a_term_of_ones_own_is_checked():
    model = build_model("llama", layers=1)
    with model.evaluating(model.parameters):
        square = batches_of(model, None, Term("square", lambda part: part.losses**2)).gradient(0)
        assert square.value > 0
        wrong = [
            Term("one number", lambda part: part.losses.sum()),
            Term("by row", lambda part: part.per_row(part.losses)),
            Term("no such", lambda part: part.losses, per="word"),
        ]
        for term in wrong:
            with pytest.raises(InputError, match=f"the term {term.name} gave values of shape"):
                batches_of(model, None, term).gradient(0)
        with pytest.raises(
            NumericalError, match="the term nothing or its gradient is NaN or infinite in step 4"
        ):
            batches_of(
                model, None, Term("nothing", lambda part: part.losses * float("nan"))
            ).gradient(3)
        infinite = Term(
            "steep", lambda part: (part.losses - part.losses.detach()).abs().clamp(min=0).sqrt()
        )
        with pytest.raises(
            NumericalError, match="the term steep"
        ):  # a finite value, and a gradient that is not
            batches_of(model, None, infinite).gradient(0)


def test_the_losses_are_of_the_rows_own_tokens_whatever_the_term():
    """Stopping rules read them, also where the term is about other labels."""
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(6))
    labels = [torch.full((int(count),), 5) for count in tokens.counts]
    with model.evaluating(model.parameters):
        plain = batches_of(model, None, terms.descent, batch_size=4).gradient(0)
        labelled = batches_of(
            model, None, terms.descent, batch_size=4, token_budget=9, target=Target(labels=labels)
        ).gradient(0)
    assert labelled.rows.tolist() == plain.rows.tolist()
    assert labelled.losses == pytest.approx(plain.losses, rel=1e-12)
    assert plain.loss == pytest.approx(plain.value, rel=1e-12)
    assert labelled.loss == pytest.approx(plain.loss, rel=1e-12)
    assert abs(labelled.value - plain.value) > 1e-3


def test_a_matrix_that_no_row_reaches_has_a_zero_gradient():
    """An expert that no token is sent to, or a layer that this input skips."""
    base = build_base("gpt2", layers=1)
    base.transformer.h[0].unused = torch.nn.Linear(16, 16).double()
    peft = add_lora(base, target_modules=["c_attn", "unused"]).double()
    model = influence.from_peft(peft, build_tokenizer())
    with model.evaluating(model.parameters):
        gradient = batches_of(model, None, terms.ascent).gradient(0)
    by_matrix = dict(
        zip(
            (leaf.name for leaf in model.space.leaves),
            model.space.split(gradient.vector),
            strict=True,
        )
    )
    assert all(bool(part.any()) == ("unused" not in name) for name, part in by_matrix.items())


def test_rows_of_a_step_are_an_epochs_permutation_and_depend_on_the_seed_alone():
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(7))
    batches = batches_of(model, None, terms.ascent, tokens=tokens, batch_size=3)
    epoch = [batches.rows(step) for step in range(3)]
    assert [len(rows_) for rows_ in epoch] == [3, 3, 1]
    assert sorted(np.concatenate(epoch).tolist()) == list(range(7))
    assert np.array_equal(batches.rows(1), epoch[1])  # whatever was called before
    again = [batches.rows(step) for step in range(3, 6)]
    assert sorted(np.concatenate(again).tolist()) == list(range(7))
    assert not np.array_equal(np.concatenate(again), np.concatenate(epoch))
    for other in (replace(batches, seed=1), replace(batches, stream=2)):
        assert not np.array_equal(
            np.concatenate([other.rows(step) for step in range(3)]), np.concatenate(epoch)
        )
    assert sorted(replace(batches, batch_size=99).rows(5).tolist()) == list(range(7))


def test_processes_share_a_step_and_add_up_to_the_whole(monkeypatch):
    """Three processes with every third row each: gradients, values and losses sum to one's."""
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(5))
    with model.evaluating(model.parameters), frozen(model) as reference:
        moved = model.snapshot() * 1.2
        for term in (terms.ascent, terms.npo(0.5), terms.divergence):
            with model.at(moved):
                whole = batches_of(model, reference, term, tokens=tokens).gradient(2)
                sums_of_ranks: list[list[Tensor]] = []
                for rank in range(3):
                    sums: list[Tensor] = []
                    monkeypatch.setattr(
                        distributed, "shard", lambda rows_, rank=rank: rows_[rank::3]
                    )
                    monkeypatch.setattr(
                        distributed,
                        "add_up",
                        lambda tensor, sums=sums: (sums.append(tensor), tensor)[1],
                    )
                    batches_of(model, reference, term, tokens=tokens).gradient(2)
                    sums_of_ranks.append(sums)
                monkeypatch.undo()
            gradient, values = (sum(sums[i] for sums in sums_of_ranks) for i in (0, 1))
            assert isinstance(gradient, Tensor)
            assert isinstance(values, Tensor)
            assert torch.allclose(gradient, whole.vector, rtol=1e-10, atol=1e-14)
            assert values[-5:].tolist() == pytest.approx(whole.losses.tolist(), rel=1e-12)
            assert float(values[0]) == pytest.approx(whole.value, rel=1e-10, abs=1e-14)


def test_the_rows_above_are_of_mixed_lengths():
    assert len(set(tokens_of(build_model("gpt2", layers=1), examples(6)).counts.tolist())) > 2
