"""Per-example gradients of the LoRA parameters, streamed.

At a site `y = W x + s B A x` with input x_t and output gradient d_t at token t, and `G = sum_t d_t
x_t^T`:

    grad_A = s B^T G = sum_t (s B^T d_t) x_t^T        [r, d_in]
    grad_B = s G A^T = sum_t (s d_t) (A x_t)^T        [d_out, r]

Both are a leaf's *output gradient* times its *input*, summed over the tokens of one example, and
the backward pass computes both factors anyway. So each leaf (`lora_A`, `lora_B`) is run through a
tap, an autograd function that hands `(input, output gradient)` to a sink in the backward pass and
asks for no weight gradient. G itself is never formed; base weights get no gradient; the backward
stops at the lowest adapted layer; merged projections, Conv1D and quantised bases need no case of
their own, and neither does gradient checkpointing, because the backward runs once whatever was
recomputed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from influence.adapter import AdaptedModel, ParamSpace
from influence.batches import Batch, collate, plan_batches
from influence.cost import Cost
from influence.errors import AdapterError, NumericalError
from influence.loss import (
    Supervised,
    check_rows,
    loss_gradient,
    probabilities,
    sample_labels,
    supervised_logits,
    token_losses,
)
from influence.measurements import MeanLoss, Measurement
from influence.rows import Examples
from influence.tokens import TokenizedExamples, tokenize

#: What a tap hands over: leaf number, inputs [b, T, d_in], output gradients [b, T, d_out], valid
#: tokens [b, T].
Sink = Callable[[int, Tensor, Tensor, Tensor], None]

#: Rows of a batch are limited so that their gradients take at most this many bytes.
GRADIENT_BYTES = 1 << 30


def per_example_gradient(x: Tensor, g: Tensor) -> Tensor:
    """Gradient of one linear leaf for each example, `[b, d_out, d_in]`.

    `x` [b, T, d_in] are its inputs, `g` [b, T, d_out] its output gradients.
    """
    return torch.bmm(g.mT, x)


class GradientSink:
    """Collects the per-example gradients of one batch as flat rows, `.rows` [b, P].

    `buffer` [at least b, P], where given, is written over instead of new memory.
    """

    def __init__(
        self,
        space: ParamSpace,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        buffer: Tensor | None = None,
    ) -> None:
        self.space = space
        self._rows = (
            torch.empty(size, space.size, dtype=dtype, device=device)
            if buffer is None
            else buffer[:size]
        )
        self._seen: set[int] = set()

    def __call__(self, leaf: int, x: Tensor, g: Tensor, valid: Tensor) -> None:
        """Take one leaf's gradients (a leaf used twice in a forward is summed)."""
        place = self._rows[:, self.space.leaves[leaf].slice].unflatten(
            1, self.space.leaves[leaf].shape
        )
        if leaf in self._seen:
            place += per_example_gradient(x, g)
        else:
            place.copy_(per_example_gradient(x, g))
            self._seen.add(leaf)

    @property
    def rows(self) -> Tensor:
        """The gradients `[b, P]`, with zeros for leaves that no loss reached."""
        for number, leaf in enumerate(self.space.leaves):
            if number not in self._seen:
                self._rows[:, leaf.slice] = 0
        return self._rows


class _Tap(torch.autograd.Function):
    """`y = x W^T` whose backward shows (x, grad y) to the tape and forms no weight gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, anchor: Tensor, tape: Tape, leaf: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.leaf = tape, leaf
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.tape.show(ctx.leaf, x, grads[0])
        return (grads[0] @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


class Tape:
    """The taps of one model: one forward per batch, then one backward per loss."""

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model
        self.anchor = torch.zeros((), device=model.device, requires_grad=True)
        self.sink: Sink | None = None
        self.valid = torch.empty(0)
        self.counts: list[int] = []

    def forward(self, batch: Batch) -> Supervised:
        """Supervised logits of a batch, with the taps in the graph."""
        real = batch.attention_mask.bool()
        # A position is valid if a token follows it: the last token of a row is an input in some
        # batches and cut off in others, and must count in none.
        self.valid = real[:, :-1] & real[:, 1:]
        with torch.enable_grad():
            part = supervised_logits(self.model, batch)
        self.counts = part.counts
        if not bool(torch.isfinite(part.logits.detach().sum(dtype=torch.float64))):
            raise NumericalError(
                "the model gives NaN or infinite logits on the training or query rows; load it "
                "with another --dtype, or check it on the rows' text"
            )
        return part

    def run(self, batch: Batch, measurement: Measurement | None) -> tuple[Tensor, np.ndarray]:
        """Gradients `[b, P]` and values `[b]` of one batch, whose graph is gone afterwards."""
        part = self.forward(batch)
        values, gradient = output_gradient(part, measurement)
        return self.gradients(part, gradient), values.double().cpu().numpy()

    def backward(self, logits: Tensor, gradient: Tensor, sink: Sink, *, last: bool = True) -> None:
        """Send `gradient` [N, V] back from the logits to a sink.

        Every leaf's (input, output gradient) is shown to `sink`. `last`: the graph is freed.
        """
        self.sink = sink
        torch.autograd.grad(
            logits, self.anchor, gradient.to(logits.dtype), retain_graph=not last, allow_unused=True
        )
        self.sink = None

    def new_sink(self, buffer: Tensor | None = None) -> GradientSink:
        """A gradient sink for the current batch."""
        return GradientSink(
            self.model.space, len(self.counts), self.model.dtype, self.model.device, buffer
        )

    def gradients(
        self, part: Supervised, gradient: Tensor, *, last: bool = True, buffer: Tensor | None = None
    ) -> Tensor:
        """Per-example gradients `[b, P]` for an output gradient `[N, V]`."""
        sink = self.new_sink(buffer)
        self.backward(part.logits, gradient, sink, last=last)
        return sink.rows

    def show(self, leaf: int, x: Tensor, g: Tensor) -> None:
        """Bring one leaf's tensors into the shape `[b, T, d]` and hand them to the sink."""
        assert self.sink is not None
        b, T = self.valid.shape
        valid = self.valid
        x, g = (
            x.to(valid.device),
            g.to(valid.device),
        )  # a device map may have put the layer elsewhere
        if x.dim() == 2 and x.shape[0] == b * T:  # some decoders flatten their tokens
            x, g = x.unflatten(0, (b, T)), g.unflatten(0, (b, T))
        elif x.shape[0] == 1 and x.shape[1] == sum(self.counts) and (b, T) != x.shape[:2]:
            # an adapted LM head sees supervised positions only, one example after the other
            x, g = (
                nn.utils.rnn.pad_sequence(list(t[0].split(self.counts)), batch_first=True)
                for t in (x, g)
            )
            valid = (
                torch.arange(x.shape[1], device=x.device)
                < torch.tensor(self.counts, device=x.device)[:, None]
            )
        if x.shape[:2] != valid.shape:
            raise AdapterError(
                f"{self.model.space.leaves[leaf].name} sees tokens of shape {tuple(x.shape)} "
                f"where {tuple(valid.shape)} + (width,) was expected: routed experts mix the "
                "tokens of different examples, so their per-example gradients are not supported; "
                "adapt attention and shared layers only"
            )
        self.sink(leaf, x, g, valid)


@contextmanager
def tape(model: AdaptedModel) -> Iterator[Tape]:
    """Put the taps in and switch weight gradients and dropout off within the block.

    Afterwards everything is put back.
    """
    recorder = Tape(model)
    leaves = [leaf for site in model.sites for leaf in (site.A, site.B)]
    forwards = {leaf: _tapped_forward(leaf, recorder, number) for number, leaf in enumerate(leaves)}
    forwards |= {
        layer: partial(checkpoint, layer.forward, use_reentrant=False)
        for layer in checkpointed_layers(model)
    }
    with model.evaluating(), replaced_forwards(forwards):
        yield recorder


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run other forwards in these modules within the block.

    Afterwards their own run again, also one that was set on the instance.
    """
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def checkpointed_layers(model: AdaptedModel) -> list[nn.Module]:
    """The decoder layers for which gradient checkpointing is enabled.

    transformers itself checkpoints in training mode only; here the layers are recomputed in
    evaluation mode too, so that memory holds one layer's activations instead of all, for about one
    more forward per backward.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [
        m
        for m in model.model.modules()
        if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]


def _tapped_forward(leaf: nn.Linear, recorder: Tape, number: int) -> Callable[[Tensor], Tensor]:
    return lambda x: _Tap.apply(x, leaf.weight, recorder.anchor, recorder, number)  # type: ignore[no-any-return]


def max_rows(space: ParamSpace) -> int:
    """Rows per batch such that their gradients take at most `GRADIENT_BYTES`."""
    return max(1, GRADIENT_BYTES // (4 * space.size))


def stream_gradients(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    *,
    measurement: Measurement | None = None,
    token_budget: int = 4096,
    batches: Sequence[np.ndarray] | None = None,
    padding: str = "right",
) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
    """Yield `(indices [b], gradients [b, P], values [b])`, batch after batch.

    Without `measurement`: the gradient and value of `l_i`, the **summed** cross-entropy in nats.
    With one: of m(q). Gradients have the LoRA parameters' type. One example's gradient does not
    depend on its batch, its padding or the order.

    `batches` overrides the length-bucketed plan; `padding` is `right` or `left` (with eager
    attention and left padding some models give NaN at padded positions; right padding needs no mask
    at all).
    """
    if batches is None:
        batches = plan_batches(tokens, token_budget, max_rows=max_rows(model.space))
    with tape(model) as recorder:
        for rows in batches:
            batch = collate(tokens, rows, pad_id=model.pad_id, padding=padding, device=model.device)  # type: ignore[arg-type]
            yield rows, *recorder.run(batch, measurement)


def output_gradient(part: Supervised, measurement: Measurement | None) -> tuple[Tensor, Tensor]:
    """Value `[b]` and gradient by the logits `[N, V]` of a measurement.

    None is the summed loss.
    """
    if measurement is None or isinstance(measurement, MeanLoss):  # without a graph
        sums = part.per_example(token_losses(part.logits.detach(), part.targets))
        gradient = loss_gradient(probabilities(part.logits), part.targets)
        if measurement is None:
            return sums, gradient
        lengths = torch.tensor(part.counts, device=part.logits.device)
        share = torch.repeat_interleave(1 / lengths.double(), lengths)
        return sums / lengths.to(sums), gradient * share.to(gradient)[:, None]
    logits = part.logits.detach().requires_grad_(True)
    with torch.enable_grad():
        values = measurement.values(Supervised(logits, part.targets, part.counts))
        (gradient,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), gradient


def sampled_gradient(part: Supervised, probs: Tensor, uniforms: Tensor) -> Tensor:
    """Gradient by the logits `[N, V]` of the summed loss of labels drawn from the model."""
    return loss_gradient(probs, sample_labels(probs, uniforms.to(probs.device)))


def label_uniforms(seed: int, draw: int, id: str, count: int) -> np.ndarray:
    """The uniforms `[count]` that draw example `id`'s labels.

    The stream is keyed by seed, draw and example alone, so labels do not depend on batches.
    """
    key = hashlib.sha256(f"{seed}/{draw}/{id}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(
        count
    )


def batch_uniforms(tokens: TokenizedExamples, rows: np.ndarray, seed: int, draw: int) -> Tensor:
    """The uniforms `[N]` that draw the labels of the examples `rows`, one after the other."""
    streams = [label_uniforms(seed, draw, tokens.ids[i], int(tokens.counts[i])) for i in rows]
    return torch.from_numpy(np.concatenate(streams))


def sampled_gradients(
    recorder: Tape, batch: Batch, tokens: TokenizedExamples, seed: int, draws: int
) -> Iterator[Tensor]:
    """The gradients `[b, P]` of a batch of `tokens` at labels sampled from the model, draw after
    draw. One forward pass serves all draws.
    """
    part = recorder.forward(batch)
    probs = probabilities(part.logits)
    for draw in range(draws):
        gradient = sampled_gradient(part, probs, batch_uniforms(tokens, batch.indices, seed, draw))
        yield recorder.gradients(part, gradient, last=draw == draws - 1)


# ---- the public self-check -----------------------------------------------------------------------


@dataclass(frozen=True)
class GradientCheck:
    """Largest relative error of each leaf in `check_gradients`, and the verdict."""

    errors: dict[str, float]
    tolerance: float
    examples: int

    @property
    def ok(self) -> bool:
        """Whether every leaf's error is within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())

    def __str__(self) -> str:
        """One sentence, with the worst leaf."""
        worst = max(self.errors, key=lambda name: self.errors[name])
        verdict = "agree" if self.ok else "DISAGREE"
        return (
            f"streamed and one-example gradients {verdict} on {self.examples} examples: worst "
            f"relative error {self.errors[worst]:.1e} at {worst} (tolerance {self.tolerance:.0e})"
        )


def check_gradients(
    model: AdaptedModel,
    examples: Examples,
    *,
    max_length: int | None = None,
    tolerance: float | None = None,
) -> GradientCheck:
    """Compare the streamed gradients of *your* model with a plain one-example autograd loop.

    The loop runs each example alone, without taps, with the full logits, and differentiates the
    summed cross-entropy by the LoRA parameters. The error of a leaf is `max_i |g_i - loop_i| /
    max_i |loop_i|` (Euclidean norms; a leaf whose gradient vanishes is measured against 1e-6 of the
    whole gradient's). Default tolerance: 1e-10 in float64, 1e-4 in float32 and 5e-2 where a base
    computes in 16 bits (bfloat16, float16, or 8-bit layers).
    """
    tokens = tokenize(examples, model.tokenizer, max_length=max_length)
    check_rows(model, tokens)
    streamed = torch.empty(len(tokens), model.space.size, dtype=model.dtype, device=model.device)
    for rows, gradients, _ in stream_gradients(model, tokens):
        streamed[torch.from_numpy(rows)] = gradients
    loop = torch.stack([_loop_gradient(model, tokens, i) for i in range(len(tokens))])
    errors = {}
    for leaf in model.space.leaves:
        difference = (streamed - loop)[:, leaf.slice].norm(dim=1).max()
        scale = (
            loop[:, leaf.slice]
            .norm(dim=1)
            .max()
            .clamp(min=1e-6 * float(loop.norm(dim=1).max()) + 1e-30)
        )
        errors[leaf.name] = float(difference / scale)
    if tolerance is None:
        base_dtype = next(model.model.parameters()).dtype
        if any(type(module).__name__ == "Linear8bitLt" for module in model.model.modules()):
            base_dtype = torch.float16  # bitsandbytes casts the inputs of 8-bit layers to it
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(base_dtype, 5e-2)
    return GradientCheck(errors, tolerance, len(tokens))


def _loop_gradient(model: AdaptedModel, tokens: TokenizedExamples, index: int) -> Tensor:
    """Gradient `[P]` of one example's summed loss by plain autograd, without taps."""
    ids = torch.from_numpy(tokens[index].input_ids).to(model.device)
    targets = torch.where(torch.from_numpy(tokens[index].supervised).to(model.device), ids, -100)
    with model.evaluating(model.parameters), torch.enable_grad():
        logits = model.model(input_ids=ids[None]).logits[0, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(logits, targets[1:], ignore_index=-100, reduction="sum")
        parts = torch.autograd.grad(loss, model.parameters, allow_unused=True)
    return model.space.flatten(
        [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(model.parameters, parts, strict=True)
        ]
    )


# ---- the gradient of a weighted sum --------------------------------------------------------------


def summed_gradient(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    by_logits: Callable[[np.ndarray, Supervised], Tensor],
    *,
    token_budget: int,
    cost: Cost | None = None,
    before_batch: Callable[[np.ndarray], None] | None = None,
) -> Tensor:
    """Gradient `[P]` of a sum over rows, where the model is now.

    At a leaf with inputs x_t and output gradients d_t this is `sum_t d_t x_t^T` over the tokens of
    all rows at once: no row's own gradient is formed.

    Parameters
    ----------
    model, tokens
        The n rows are run in batches of at most `token_budget` tokens.
    by_logits
        Gives, for a batch's rows `[b]` and its supervised logits `[N, V]` (without a graph), the
        sum's gradient by these logits, `[N, V]`.
    cost
        Counts each row once, as forward and backward.
    before_batch
        Is called with a batch's rows before the batch runs, and may move the model meanwhile, which
        `by_logits` must not: a graph is alive then.
    """
    space = model.space
    total = torch.zeros(space.size, dtype=model.dtype, device=model.device)
    if cost is not None:
        cost.gradients += len(tokens)

    def add(leaf: int, x: Tensor, g: Tensor, valid: Tensor) -> None:
        place = total[space.leaves[leaf].slice].unflatten(0, space.leaves[leaf].shape)
        place += g.flatten(0, 1).T @ x.flatten(0, 1)

    with tape(model) as recorder:
        for rows in plan_batches(tokens, token_budget) if len(tokens) else []:
            if before_batch is not None:
                before_batch(rows)
            _send_back(recorder, tokens, rows, by_logits, add)
    return total


def _send_back(
    recorder: Tape,
    tokens: TokenizedExamples,
    rows: np.ndarray,
    by_logits: Callable[[np.ndarray, Supervised], Tensor],
    add: Sink,
) -> None:
    """Run one batch forward and backward. A function, so that its graph is gone when it returns."""
    model = recorder.model
    part = recorder.forward(collate(tokens, rows, pad_id=model.pad_id, device=model.device))
    with torch.no_grad():
        gradient = by_logits(rows, Supervised(part.logits.detach(), part.targets, part.counts))
    recorder.backward(part.logits, gradient, add)


def loss_sum_gradient(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    weights: np.ndarray,
    *,
    token_budget: int,
    cost: Cost | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Gradient `[P]` of `sum_i weights_i l_i`, and the rows' mean losses `[n]`.

    Both are taken where the model is now. `l_i` is the summed cross-entropy of row i in nats, and
    `weights` [n] may be negative. The mean losses are in nats per completion token. `cost` counts
    each row once, as forward and backward.
    """
    losses = np.zeros(len(tokens))
    unit = power_of_two_near(float(np.abs(weights).max()) if len(weights) else 1.0)

    def by_logits(rows: np.ndarray, part: Supervised) -> Tensor:
        sums = part.per_example(token_losses(part.logits, part.targets)).double()
        losses[rows] = sums.cpu().numpy() / tokens.counts[rows]
        gradient = loss_gradient(probabilities(part.logits), part.targets)
        return gradient * repeated_over_tokens(weights[rows] / unit, part, gradient)

    gradient = summed_gradient(model, tokens, by_logits, token_budget=token_budget, cost=cost)
    return gradient * unit, losses


def power_of_two_near(weight: float) -> float:
    """The power of 2 at or below a weight, and 1 for a weight of 0.

    It is taken out of the weights before a backward and multiplied in again afterwards, which
    changes no digit: 16-bit bases cannot hold weights of 1 / N_tok.
    """
    return 2.0 ** np.floor(np.log2(weight)) if weight > 0 else 1.0


def repeated_over_tokens(values: np.ndarray, part: Supervised, like: Tensor) -> Tensor:
    """Numbers of the rows `[b]` repeated over their tokens, `[N, 1]`, of the type of `like`."""
    repeated = np.repeat(np.asarray(values, dtype=np.float64), part.counts)
    return torch.from_numpy(repeated).to(like)[:, None]
