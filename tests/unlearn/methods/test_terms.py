"""The terms of unlearning: numbers derived by hand, plain sums in float64, and their laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from unlearn.methods import terms
from unlearn.methods.terms import Part

LN2, LN3 = math.log(2), math.log(3)


def part_of(
    logits: Tensor,
    labels: list[int],
    counts: list[int],
    reference: Tensor | None = None,
    wanted: Tensor | None = None,
    other: Part | None = None,
) -> Part:
    """A part whose reference has these logits, and fails without them."""

    def reference_logits() -> Tensor:
        assert reference is not None, "nobody may ask"
        return reference

    def losses() -> Tensor:
        return torch.nn.functional.cross_entropy(
            reference_logits(), torch.tensor(labels), reduction="none"
        )

    return Part(logits, torch.tensor(labels), counts, reference_logits, losses, wanted, other)


def logits_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


# ---- numbers by hand -----------------------------------------------------------------------------


def test_ascent_and_descent_by_hand():
    """Two words, so that every number is a logarithm.

    Logits (0, 0): p = (1/2, 1/2), so word 0 costs ln 2. Logits (ln 3, 0): p = (3/4, 1/4), so word 1
    costs ln 4.
    """
    part = part_of(logits_of([0, 0], [LN3, 0]), [0, 1], [1, 1])
    assert terms.descent.function(part).tolist() == pytest.approx([LN2, 2 * LN2], abs=1e-14)
    assert terms.ascent.function(part).tolist() == pytest.approx([-LN2, -2 * LN2], abs=1e-14)


def test_divergence_by_hand():
    """p_ref = (1/2, 1/2), p = (3/4, 1/4): KL(p_ref || p) = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3).

    The other way round it would be 3/4 ln(3/2) + 1/4 ln(1/2) = 3/4 ln 3 - ln 2 = 0.1308, not
    0.1438. The gradient by the logits is p - p_ref = (1/4, -1/4).
    """
    logits = logits_of([LN3, 0])
    value = terms.divergence.function(
        part_of(logits, [0], [1], reference=torch.zeros(1, 2, dtype=torch.float64))
    )
    assert value.tolist() == pytest.approx([math.log(4 / 3) / 2], abs=1e-14)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([0.25, -0.25], abs=1e-14)


def test_matching_by_hand():
    """q = (1/4, 3/4), p = (1/2, 1/2): KL(q || p) = 1/4 ln(1/2) + 3/4 ln(3/2) = 3/4 ln 3 - ln 2.

    Gradient p - q = (1/4, -1/4).
    """
    logits = logits_of([0, 0])
    wanted = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    value = terms.matching.function(part_of(logits, [0], [1], wanted=wanted))
    assert value.tolist() == pytest.approx([0.75 * LN3 - LN2], abs=1e-14)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([0.25, -0.25], abs=1e-14)


@pytest.mark.parametrize(("beta", "wanted"), [(1.0, 2 * math.log(3 / 2)), (2.0, math.log(5 / 4))])
def test_npo_by_hand(beta, wanted):
    """One row of two tokens: l = ln 2 + ln 4 = ln 8 (sum, not mean).

    The reference says 1/2 to both, l_ref = ln 4. L - l_ref = ln 2.

    beta = 1: -2 log sigma(ln 2) = -2 ln(2/3) = 2 ln(3/2). beta = 2: -1 log sigma(ln 4) = -ln(4/5) =
    ln(5/4).
    """
    part = part_of(
        logits_of([0, 0], [LN3, 0]), [0, 1], [2], reference=torch.zeros(2, 2, dtype=torch.float64)
    )
    assert terms.npo(beta).function(part).tolist() == pytest.approx([wanted], abs=1e-14)


@pytest.mark.parametrize(("gamma", "wanted"), [(0.0, math.log(9 / 8)), (LN2, math.log(5 / 4))])
def test_simnpo_by_hand(gamma, wanted):
    """l / T = (ln 8) / 2 and beta = 2: beta l / T = ln 8.

    gamma = 0: -(2/2) log sigma(ln 8) = -ln(8/9) = ln(9/8). gamma = ln 2: -log sigma(ln 4) =
    ln(5/4).
    """
    part = part_of(logits_of([0, 0], [LN3, 0]), [0, 1], [2])
    assert terms.simnpo(2.0, gamma).function(part).tolist() == pytest.approx([wanted], abs=1e-14)


def test_dpo_by_hand():
    """l - l_ref = ln 2 as above.

    The other completion, one token: p' = 3/4, p'_ref = 1/4, so l' - l'_ref = ln(4/3) - ln 4
    = -ln 3.

    beta = 1: -2 log sigma(ln 2 + ln 3) = -2 ln(6/7) = 2 ln(7/6): less than at the reference (2 ln
    2), the other one is liked.
    """
    other = part_of(
        logits_of([LN3, 0]), [0], [1], reference=torch.tensor([[0, LN3]], dtype=torch.float64)
    )
    part = part_of(
        logits_of([0, 0], [LN3, 0]),
        [0, 1],
        [2],
        reference=torch.zeros(2, 2, dtype=torch.float64),
        other=other,
    )
    assert terms.dpo(1.0).function(part).tolist() == pytest.approx([2 * math.log(7 / 6)], abs=1e-14)


# ---- against plain sums --------------------------------------------------------------------------


def log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row.astype(np.float64) - row.max()
    return shifted - math.log(sum(math.exp(x) for x in shifted))


def summed(logits: np.ndarray, labels: list[int], counts: list[int]) -> list[float]:
    """`l` of every row, by a loop."""
    out, at = [], 0
    for count in counts:
        out.append(sum(-log_softmax(logits[t])[labels[t]] for t in range(at, at + count)))
        at += count
    return out


def kl(q: np.ndarray, logits: np.ndarray) -> float:
    p = np.exp(log_softmax(logits))
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)


def minus_log_sigma(x: float) -> float:
    return math.log1p(math.exp(-x))


CASES = {"mixed": [3, 1, 4], "one token each": [1, 1, 1, 1], "one row": [5], "one token": [1]}


def drawn(counts: list[int], seed: int = 0, scale: float = 2.0, vocabulary: int = 7) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def make(n: int) -> Tensor:
        return scale * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)

    n, others = sum(counts), [1 + i % 3 for i in range(len(counts))]
    label = lambda n: torch.randint(vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    return {
        "counts": counts,
        "logits": make(n),
        "labels": label(n),
        "reference": make(n),
        "wanted": make(n).log_softmax(-1),
        "other_counts": others,
        "other_logits": make(sum(others)),
        "other_labels": label(sum(others)),
        "other_reference": make(sum(others)),
    }


def part_drawn(case: dict, dtype: torch.dtype = torch.float64) -> Part:
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    logits, other_logits = (
        case[key].to(dtype).clone().requires_grad_() for key in ("logits", "other_logits")
    )
    reference, other_reference = (
        case[key].to(dtype).to(accurate) for key in ("reference", "other_reference")
    )
    other = part_of(
        other_logits, case["other_labels"], case["other_counts"], reference=other_reference
    )
    return part_of(
        logits,
        case["labels"],
        case["counts"],
        reference=reference,
        wanted=case["wanted"],
        other=other,
    )


def plain(name: str, case: dict) -> list[float]:
    """A term's values by loops over Python floats, with beta 0.3 and gamma 0.4."""
    logits, reference = case["logits"].numpy(), case["reference"].numpy()
    labels, counts, n = case["labels"], case["counts"], len(case["labels"])
    losses, before = summed(logits, labels, counts), summed(reference, labels, counts)
    excess = [a - b for a, b in zip(losses, before, strict=True)]
    if name == "npo":
        return [2 / 0.3 * minus_log_sigma(0.3 * x) for x in excess]
    if name == "simnpo":
        return [
            2 / 0.3 * minus_log_sigma(0.3 * a / t - 0.4)
            for a, t in zip(losses, counts, strict=True)
        ]
    if name == "dpo":
        rest = case["other_labels"], case["other_counts"]
        now, then = (
            summed(case["other_logits"].numpy(), *rest),
            summed(case["other_reference"].numpy(), *rest),
        )
        return [
            2 / 0.3 * minus_log_sigma(0.3 * (x - (a - b)))
            for x, a, b in zip(excess, now, then, strict=True)
        ]
    if name == "divergence":
        return [kl(np.exp(log_softmax(reference[t])), logits[t]) for t in range(n)]
    if name == "matching":
        return [kl(np.exp(case["wanted"].numpy()[t]), logits[t]) for t in range(n)]
    sign = {"ascent": 1, "descent": -1}[name]
    return [sign * float(log_softmax(logits[t])[labels[t]]) for t in range(n)]


TERMS = {
    "ascent": terms.ascent,
    "descent": terms.descent,
    "divergence": terms.divergence,
    "matching": terms.matching,
    "npo": terms.npo(0.3),
    "simnpo": terms.simnpo(0.3, 0.4),
    "dpo": terms.dpo(0.3),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("kind", CASES)
def test_values_are_those_of_plain_loops(name, kind):
    case = drawn(CASES[kind], seed=len(kind))
    values = TERMS[name].function(part_drawn(case))
    assert values.tolist() == pytest.approx(plain(name, case), rel=1e-12, abs=1e-13)
    assert len(values) == (len(case["counts"]) if TERMS[name].per == "row" else len(case["labels"]))


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_are_worked_on_in_float32(name, dtype):
    """A model in half precision rounds its logits.

    Nothing after that may lose more than float32 does.
    """
    case = drawn([40, 3, 1], seed=1, vocabulary=50)
    rounded = {
        key: value.to(dtype).double() if isinstance(value, Tensor) and key != "wanted" else value
        for key, value in case.items()
    }
    part = part_drawn(case, dtype)
    values = TERMS[name].function(part)
    assert values.dtype in (torch.float32, torch.float64)
    assert values.tolist() == pytest.approx(plain(name, rounded), rel=3e-6, abs=3e-6)
    (gradient,) = torch.autograd.grad(values.sum(), part.logits)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("name", TERMS)
def test_a_rows_value_does_not_depend_on_the_rows_beside_it(name):
    together = drawn([3, 1, 4])
    values = TERMS[name].function(part_drawn(together))
    alone = dict(together, counts=[1], other_counts=[2], labels=together["labels"][3:4])
    alone |= {key: together[key][3:4] for key in ("logits", "reference", "wanted")}
    alone |= {
        key: together[key][1:3] for key in ("other_logits", "other_labels", "other_reference")
    }
    at = 1 if TERMS[name].per == "row" else 3
    assert TERMS[name].function(part_drawn(alone)).tolist() == pytest.approx(
        [values[at].item()], rel=1e-13
    )


# ---- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
def test_a_term_asks_what_it_says_it_asks(name):
    """`reference` and `logits` decide what a method costs and whether it needs the reference."""
    case, run = drawn([3, 1, 4]), set()
    part = part_drawn(case)
    for each in (part, part.other):
        assert each is not None
        logits, losses = each.reference_logits_of, each.reference_losses_of
        each.reference_logits_of = lambda logits=logits: (run.add("logits"), logits())[1]
        each.reference_losses_of = lambda losses=losses: (run.add("losses"), losses())[1]
    term = TERMS[name]
    term.function(part)
    assert term.reference == bool(run)
    assert term.logits == ("logits" in run)


def test_terms_that_need_a_target_say_which():
    part = part_of(logits_of([0, 1]), [0], [1], reference=torch.zeros(1, 2))
    for term, target in ((terms.matching, "predicted"), (terms.dpo(), "refusals")):
        with pytest.raises(AssertionError, match=target):
            term.function(part)


# ---- laws ----------------------------------------------------------------------------------------


def at_reference(case: dict) -> dict:
    return case | {
        "reference": case["logits"].clone(),
        "other_reference": case["other_logits"].clone(),
    }


def by_logits(values: Tensor, part: Part) -> Tensor:
    return torch.autograd.grad(values.sum(), part.logits, retain_graph=True)[0]


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 20.0])
def test_npos_gradient_at_the_reference_is_that_of_minus_the_summed_loss(beta):
    """d/dx of -(2/beta) log sigma(beta x) is -2 (1 - sigma(beta x)) = -1 at x = 0, whatever beta.

    The value there is (2/beta) ln 2.
    """
    part = part_drawn(at_reference(drawn([3, 1, 4])))
    values = terms.npo(beta).function(part)
    assert values.tolist() == pytest.approx([2 / beta * LN2] * 3, rel=1e-12)
    ascending = by_logits(-part.per_row(part.losses), part)
    assert float((by_logits(values, part) - ascending).abs().max()) < 1e-10
    assert float((by_logits(terms.ascent.function(part), part) - ascending).abs().max()) < 1e-10


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npos_gradient_elsewhere_is_ascents_with_the_papers_weight(beta):
    """Zhang et al., eq. 4: each row's ascent gradient times 2 p^beta / (p^beta + p_ref^beta), p the
    probability of the whole row.
    """
    case = drawn([3, 1, 4])
    part = part_drawn(case)
    losses = [
        summed(case[key].numpy(), case["labels"], case["counts"]) for key in ("logits", "reference")
    ]
    p, p_ref = (np.exp(-np.array(loss) * beta) for loss in losses)
    weight = np.repeat(2 * p / (p + p_ref), case["counts"])
    wanted = torch.from_numpy(weight)[:, None] * by_logits(terms.ascent.function(part), part)
    assert float((by_logits(terms.npo(beta).function(part), part) - wanted).abs().max()) < 1e-12


def test_dpos_gradient_at_the_reference_prefers_the_other_completion():
    """At the reference it is -(grad l - grad l'), whatever beta: rates compare with NPO's."""
    for beta in (0.01, 0.1, 5.0):
        case = at_reference(drawn([3, 1, 4]))
        part = part_drawn(case)
        assert part.other is not None
        values = terms.dpo(beta).function(part).sum()
        away, other = torch.autograd.grad(
            values, (part.logits, part.other.logits), retain_graph=True
        )
        towards = torch.autograd.grad(part.other.losses.sum(), part.other.logits)[0]
        assert float((away - by_logits(terms.ascent.function(part), part)).abs().max()) < 1e-12
        assert float((other - towards).abs().max()) < 1e-12


def test_npo_is_at_least_zero_and_falls_as_the_loss_rises():
    losses = torch.linspace(-500, 500, 101, dtype=torch.float64)
    for beta in (0.01, 0.1, 1.0):
        part = part_of(torch.zeros(101, 2), [0] * 101, [1] * 101, reference=torch.zeros(101, 2))
        part.losses = losses  # type: ignore[misc]
        part.reference_losses = torch.zeros(101, dtype=torch.float64)  # type: ignore[misc]
        values = terms.npo(beta).function(part)
        assert bool((values >= 0).all())
        assert bool((values.diff() <= 0).all())
        assert float(values[-1]) <= 2 / beta * math.exp(-500 * beta)
        assert values[0].item() == pytest.approx(
            2 * 500, abs=2 / beta * math.exp(-500 * beta)
        )  # far below the reference it is a line of slope -2


@pytest.mark.parametrize("beta", [1e-1, 1e-2, 1e-3, 1e-4])
def test_npo_tends_to_ascent_as_beta_falls(beta):
    """-(2/beta) log sigma(beta x) = (2/beta) ln 2 - x + beta x^2 / 4 - ...

    The series alternates, so the error is below its term.
    """
    case = drawn([3, 1, 4])
    part = part_drawn(case)
    x = part.excess.detach()
    values = (terms.npo(beta).function(part) - 2 / beta * LN2).detach()
    assert bool(((values + x).abs() <= beta * x**2 / 4 + 1e-9).all())
    difference = by_logits(terms.npo(beta).function(part), part) - by_logits(
        terms.ascent.function(part), part
    )
    assert float(difference.abs().max()) <= beta * float(x.abs().max()) / 2 + 1e-12


def test_npo_and_simnpo_stay_finite_where_a_row_is_far_from_the_reference():
    far = torch.tensor([[1e4, 0.0], [0.0, 1e4]], dtype=torch.float32, requires_grad=True)
    for term in (terms.npo(1.0), terms.simnpo(1.0)):
        part = part_of(far, [0, 0], [1, 1], reference=torch.tensor([[0.0, 1e4], [1e4, 0.0]]))
        values = term.function(part)
        assert bool(torch.isfinite(values).all())
        assert bool(torch.isfinite(by_logits(values, part)).all())


def test_simnpo_sees_means_and_npo_sums():
    """A row and the same row ten times as long: SimNPO says the same of both, and pulls each token
    a tenth as hard.

    NPO without a reference (l_ref = 0) would say sigma(10 beta l): of a long row it has long let
    go.
    """
    short, long = logits_of([0.5, -0.5]), logits_of(*[[0.5, -0.5]] * 10)
    short_part, long_part = part_of(short, [0], [1]), part_of(long, [0] * 10, [10])
    term = terms.simnpo(2.0, 0.1)
    short_value, long_value = term.function(short_part), term.function(long_part)
    assert short_value.item() == pytest.approx(long_value.item(), rel=1e-14)
    short_gradient, long_gradient = (
        by_logits(short_value, short_part),
        by_logits(long_value, long_part),
    )
    assert torch.allclose(short_gradient / 10, long_gradient[3:4], rtol=1e-12, atol=0)
    for part in (short_part, long_part):
        zeros = torch.zeros(len(part.labels), dtype=torch.float64)
        part.reference_losses = zeros  # type: ignore[misc]
    weights = [
        by_logits(terms.npo(2.0).function(part), part)[0, 0] for part in (short_part, long_part)
    ]
    assert 0 < float(weights[1]) < 0.05 * float(weights[0])


def test_divergence_and_its_gradient_vanish_at_the_reference():
    part = part_drawn(at_reference(drawn([3, 1, 4])))
    values = terms.divergence.function(part)
    assert values.abs().max() == 0
    assert float(by_logits(values, part).abs().max()) < 1e-15


def test_divergences_are_at_least_zero():
    for seed in range(30):
        case = drawn([5, 2], seed=seed, scale=0.01 if seed % 2 else 8.0)
        for name in ("divergence", "matching"):
            assert float(TERMS[name].function(part_drawn(case)).detach().min()) >= -1e-15


def test_impossible_words_are_harmless():
    """A word with logit -inf before (p_ref = 0) adds nothing to KL(p_ref || p), and pulls its logit
    by p alone.

    By hand: p_ref = (1/2, 1/2, 0), p = (1/4, 1/4, 1/2): KL = ln 2, gradient p - p_ref = (-1/4,
    -1/4, 1/2).
    """
    logits = logits_of([0, 0, LN2])
    gone = torch.tensor([[0, 0, -torch.inf]], dtype=torch.float64)
    for part, term in (
        (part_of(logits, [0], [1], reference=gone), terms.divergence),
        (part_of(logits, [0], [1], wanted=gone.log_softmax(-1)), terms.matching),
    ):
        values = term.function(part)
        assert values.item() == pytest.approx(LN2, abs=1e-14)
        assert by_logits(values, part)[0].tolist() == pytest.approx([-0.25, -0.25, 0.5], abs=1e-14)


@pytest.mark.parametrize("name", TERMS)
def test_words_that_are_impossible_before_and_now_are_harmless(name):
    """Some models mask part of their vocabulary with -inf, at all times.

    No label is one of them.
    """
    case = drawn([3, 1, 4])
    masked = {
        key: case[key].clone()
        for key in ("logits", "reference", "other_logits", "other_reference", "wanted")
    }
    for value in masked.values():
        value[:, 6] = -torch.inf
    masked["wanted"] = masked["wanted"].log_softmax(-1)
    case |= masked | {"labels": [label % 6 for label in case["labels"]]}
    case |= {"other_labels": [label % 6 for label in case["other_labels"]]}
    part = part_drawn(case)
    values = TERMS[name].function(part)
    assert bool(torch.isfinite(values).all())
    gradient = by_logits(values, part)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[:, 6].abs().max()) == 0
