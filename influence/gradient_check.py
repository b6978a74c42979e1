"""Are the gradients of *your* model right? Two questions, answered apart.

Is the engine right? The streamed gradients are compared with a plain loop that runs one example
alone, without taps, with the full logits, and lets autograd differentiate by the LoRA parameters.
Both round, so they agree as far as rounding lets them. A loop in 16 bits hides much behind its own
rounding: there the two are compared in float32 too.

Is the number type precise enough? The streamed gradients are compared with the loop in the next
wider type, with the weights as they are loaded, cast up for each product (`influence.precision`).

A leaf's rounding error is measured, not derived: it is how far the loop lies from the same loop in
the wider type. In a leaf where large terms cancel, as in the queries and keys of saturated
attention, that error is eps times the leaf's condition and may be larger than the gradient itself.
Such a leaf is held to its rounding error, every other one to the tolerance of its type.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence.adapter import AdaptedModel
from influence.errors import NumericalError
from influence.gradients import stream_gradients
from influence.loss import check_rows
from influence.manifest import PrecisionRecord
from influence.positions import documents, fresh_rope
from influence.precision import HALF, compute_type, computing_in, type_name
from influence.rows import Examples
from influence.tokens import Rendering, TokenizedExamples

#: Error of a row's gradient beyond which its number type is not precise enough. At 8 % in the worst
#: row gradient products kept their order (rank correlation 0.995 and more for each of 10 queries),
#: at 19 % no longer (0.905 for one): `benchmarks/precision.py`, 2026-11-28.
PRECISE = 0.1
#: Times a leaf's measured rounding error by which engine and loop may differ. Each of the two has
#: an error of that size; the rest is for a kernel that adds up in another order.
ROOM = 10.0
#: Rows whose gradients `fit` measures.
MEASURED_ROWS = 4
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2
_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class GradientCheck:
    """What `check_gradients` found.

    Attributes
    ----------
    errors : dict
        For each leaf the largest error of the streamed gradients against the loop in the same type,
        relative to the leaf's gradient, or to the size at which rounding alone makes `tolerance`.
    tolerance : float
        What `errors` may be.
    examples : int
        How many rows were run.
    computed, reference : str
        The type that the model computes in, and the wider one it is compared with (None: there is
        none).
    precision : float or None
        The largest relative error of a row's whole streamed gradient against the loop in
        `reference`.
    wide_errors : dict
        Where `computed` has 16 bits: `errors` of engine and loop computed in float32.
    wide_tolerance : float
        What `wide_errors` may be.
    """

    errors: dict[str, float]
    tolerance: float
    examples: int
    computed: str = "float64"
    reference: str | None = None
    precision: float | None = None
    wide_errors: dict[str, float] = field(default_factory=dict)
    wide_tolerance: float = _TOLERANCES[torch.float32]

    @property
    def ok(self) -> bool:
        """Whether the engine is right: every leaf's errors are within the tolerances."""
        same = all(error <= self.tolerance for error in self.errors.values())
        return same and all(error <= self.wide_tolerance for error in self.wide_errors.values())

    @property
    def precise(self) -> bool:
        """Whether the number type is precise enough: no row's gradient is off by more than a
        tenth.
        """
        return self.precision is None or self.precision <= PRECISE

    def as_json(self) -> dict[str, Any]:
        """The fields and both verdicts, for a program."""
        return {"ok": self.ok, "precise": self.precise, **asdict(self)}

    def __str__(self) -> str:
        """A sentence on the engine, with the worst leaf, and one on the number type."""
        worst = max(self.errors, key=lambda name: self.errors[name])
        verdict = "agree" if self.ok else "DISAGREE"
        text = (
            f"streamed and one-example gradients {verdict} on {self.examples} examples: worst "
            f"relative error {self.errors[worst]:.1e} at {worst} (tolerance {self.tolerance:.0e})"
        )
        if self.wide_errors:
            worst = max(self.wide_errors, key=lambda name: self.wide_errors[name])
            text += (
                f"; computed in float32 {self.wide_errors[worst]:.1e} at {worst} (tolerance "
                f"{self.wide_tolerance:.0e})"
            )
        if self.precision is not None:
            enough = "is precise enough" if self.precise else "is NOT precise enough"
            text += (
                f"\n{self.computed} {enough}: against {self.reference} a row's gradient is off by "
                f"at most {percent(self.precision)} (stated level {percent(PRECISE)})"
            )
        return text if self.precise else f"{text}: {remedy(self.computed)}"


def check_gradients(
    model: AdaptedModel,
    examples: Examples,
    *,
    max_length: int | None = None,
    supervise: str | None = None,
    tolerance: float | None = None,
) -> GradientCheck:
    """Compare the streamed gradients of *your* model with a plain one-example autograd loop, and
    its number type with a wider one.

    The loop runs each example alone, without taps, with the full logits, and differentiates the
    summed cross-entropy by the LoRA parameters. The error of a leaf is `max_i |g_i - loop_i| /
    max_i |loop_i|` (Euclidean norms), except where the loop's own rounding error, times 10, is more
    than the tolerance of that: then that is what the difference is divided by, times the tolerance.
    Default tolerance: 1e-10 in float64, 1e-4 in float32 and 5e-2 where a base computes in 16 bits
    (bfloat16, float16, or 8-bit layers), which is compared at 1e-4 in float32 too.
    """
    rendering = Rendering.of_trainer(examples, max_length, supervise)
    tokens = rendering.tokenize(examples, model.tokenizer)
    check_rows(model, tokens)
    computed = compute_type(model)
    if tolerance is None:
        tolerance = _TOLERANCES.get(computed, _HALF_TOLERANCE)
    streamed, loop = _streamed(model, tokens), _loop(model, tokens)
    reference = _WIDER.get(computed)
    if reference is None:
        errors = _errors(model, streamed, loop, tolerance, torch.zeros(len(model.space.leaves)))
        if max(errors.values()) > tolerance:
            rounding = _narrow_rounding(model, tokens, loop)
            errors = _errors(model, streamed, loop, tolerance, rounding)
        return GradientCheck(errors, tolerance, len(tokens), type_name(computed))
    with computing_in(model, reference):
        right = _loop(model, tokens)
        wide = _streamed(model, tokens) if computed in HALF else None
    rounding = _leaf_norms(model, loop - right)
    wide_errors = {}
    if wide is not None:
        # a rounding error is eps times the condition, which is the same in both types
        narrower = torch.finfo(reference).eps / torch.finfo(computed).eps
        wide_tolerance = _TOLERANCES[reference]
        wide_errors = _errors(model, wide, right, wide_tolerance, rounding * narrower)
    return GradientCheck(
        _errors(model, streamed, loop, tolerance, rounding),
        tolerance,
        len(tokens),
        type_name(computed),
        type_name(reference),
        float(relative_errors(streamed, right).max()),
        wide_errors,
    )


def measure_precision(
    model: AdaptedModel, tokens: TokenizedExamples, *, token_budget: int
) -> PrecisionRecord | None:
    """How far 16-bit gradients of a few training rows are from float32's, where the model is now.

    The rows are spread over the lengths of those that leave room for float32 in the memory of a
    batch. None where the model computes in 32 bits or more. Errors: `NumericalError` where a
    gradient is NaN or infinite.
    """
    computed = compute_type(model)
    if computed not in HALF:
        return None
    order = np.argsort(tokens.lengths, kind="stable")
    room = int((tokens.lengths[order] <= max(token_budget // 2, tokens.lengths.min())).sum())
    places = np.unique(np.linspace(0, room - 1, MEASURED_ROWS).round().astype(int))
    few = tokens.select([int(i) for i in order[places]])
    narrow = _streamed(model, few)
    with computing_in(model, torch.float32):
        errors = relative_errors(narrow, _streamed(model, few))
    if not bool(torch.isfinite(errors).all()):
        raise NumericalError(
            f"gradients computed in {type_name(computed)} are NaN or infinite: "
            f"{remedy(type_name(computed))}"
        )
    return PrecisionRecord(
        type_name(computed), "float32", len(few), float(errors.max()), float(errors.median())
    )


def precision_note(record: PrecisionRecord) -> str | None:
    """What a user must know of the precision of a fit. None where it is precise enough."""
    if record.worst <= PRECISE:
        return None
    return (
        f"note: {record.computed} gradients are off by up to {percent(record.worst)} "
        f"(median {percent(record.median)}) on {record.rows} training rows, against "
        f"{record.reference}: scores and edits made of them are no better. "
        f"{remedy(record.computed)}"
    )


def remedy(computed: str) -> str:
    """What to do where a number type is not precise enough."""
    if computed in map(type_name, HALF):
        return (
            "take --compute float32, which casts the weights up layer by layer (no more memory; "
            "slower on a GPU), or --dtype float32"
        )
    return "take --dtype float64"


def percent(share: float) -> str:
    """A share in words: `85 %`, `0.02 %`."""
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def relative_errors(gradients: Tensor, reference: Tensor) -> Tensor:
    """Each row's `|g_i - r_i| / |r_i|`, `[n]`, of stacks `[n, P]`."""
    reference = reference.double()
    difference = (gradients.double() - reference).norm(dim=1)
    return difference / reference.norm(dim=1).clamp(min=1e-30)


def _leaf_norms(model: AdaptedModel, gradients: Tensor) -> Tensor:
    """Largest norm of each leaf's part over the rows, `[leaves]` float64."""
    leaves = model.space.leaves
    return torch.stack([gradients[:, leaf.slice].double().norm(dim=1).max() for leaf in leaves])


def _errors(
    model: AdaptedModel, gradients: Tensor, loop: Tensor, tolerance: float, rounding: Tensor
) -> dict[str, float]:
    """Each leaf's error, relative to the larger of its gradient and what rounding makes of it."""
    difference = _leaf_norms(model, gradients.double() - loop.double())
    by_rounding = ROOM * rounding.to(difference) / max(tolerance, 1e-300)
    scale = torch.maximum(_leaf_norms(model, loop), by_rounding)
    errors = difference / scale.clamp(min=1e-30)
    names = (leaf.name for leaf in model.space.leaves)
    return dict(zip(names, errors.tolist(), strict=True))


def _narrow_rounding(model: AdaptedModel, tokens: TokenizedExamples, loop: Tensor) -> Tensor:
    """The rounding error of each leaf in float64, from that in float32: there is nothing wider."""
    with computing_in(model, torch.float32):
        narrow = _loop(model, tokens)
    shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return _leaf_norms(model, narrow.double() - loop) * shrink


def _streamed(model: AdaptedModel, tokens: TokenizedExamples) -> Tensor:
    """The engine's gradients `[n, P]`, in the rows' order."""
    out = torch.empty(len(tokens), model.space.size, dtype=model.dtype, device=model.device)
    for rows, gradients, _ in stream_gradients(model, tokens):
        out[torch.from_numpy(rows)] = gradients
    return out


def _loop(model: AdaptedModel, tokens: TokenizedExamples) -> Tensor:
    """The plain gradients `[n, P]`, one example after the other."""
    return torch.stack([_loop_gradient(model, tokens, i) for i in range(len(tokens))])


def _loop_gradient(model: AdaptedModel, tokens: TokenizedExamples, index: int) -> Tensor:
    """Gradient `[P]` of one example's summed loss by plain autograd, without taps.

    Documents of one row run apart.
    """
    ids = torch.from_numpy(tokens[index].input_ids).to(model.device)
    targets = torch.where(torch.from_numpy(tokens[index].supervised).to(model.device), ids, -100)
    with model.evaluating(model.parameters), torch.enable_grad():
        loss = torch.zeros((), device=model.device)
        for part in documents(tokens[index]):
            fresh_rope(model.model)
            logits = model.model(input_ids=ids[None, part]).logits[0, :-1]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss = loss + nn.functional.cross_entropy(
                logits, targets[part][1:], ignore_index=-100, reduction="sum"
            )
        parts = torch.autograd.grad(loss, model.parameters, allow_unused=True)
    return model.space.flatten(
        [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(model.parameters, parts, strict=True)
        ]
    )
