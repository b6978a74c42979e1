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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from influence.experts import SlotForward, outermost, tokens_in_order
from influence.halving import Steps, in_parts
from influence.loss import (
    Supervised,
    all_finite,
    loss_gradient,
    supervised_logits,
    token_losses,
)
from influence.measurements import Measurement, output_gradient
from influence.memory import block_bytes
from influence.precision import computes_in
from influence.progress import say
from influence.site_taps import is_plain, site_forward
from influence.tokens import TokenizedExamples

#: What a tap hands over: leaf number, inputs [b, T, d_in], output gradients [b, T, d_out], valid
#: tokens [b, T].
Sink = Callable[[int, Tensor, Tensor, Tensor], None]

#: Rows of a batch are limited so that their gradients take at most this many bytes.
GRADIENT_BYTES = 1 << 30


def per_example_gradient(x: Tensor, g: Tensor) -> Tensor:
    """Gradient of one linear leaf for each example, `[b, d_out, d_in]`.

    `x` [b, T, d_in] are its inputs, `g` [b, T, d_out] its output gradients.
    """
    if g.shape[-1] > x.shape[-1]:  # of a B: several times as fast on a CPU
        return torch.bmm(x.mT, g).mT
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
        ctx.tape, ctx.leaf, ctx.row = tape, leaf, tape.row
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.tape.show(ctx.leaf, x, grads[0], ctx.row)
        return (grads[0] @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


class Tape:
    """The taps of one model: one forward per batch, then one backward per loss.

    A layer that sees the tokens of a batch neither by example nor in order, as an expert that is a
    module of its own does, tells nothing of whose they are. Then the examples of a batch run one by
    one (`apart`): slower, and right for every layer.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model
        leaves = [(2 * i + side, site) for i, site in enumerate(model.sites) for side in (0, 1)]
        #: leaves of fused experts, which see k slots for every token (`influence.experts`)
        self.slots = {number for number, site in leaves if site.parameter}
        self.apart = any(not site.parameter for site in model.routed) or not all(
            model.in_order.values()
        )
        self.flat: set[int] = set()  # leaves that see tokens flat, in an order not known yet
        self.row: int | None = None  # the example that runs, where they run one by one
        #: whether the tape's own batch runs, and not one that others run meanwhile
        self.runs = False
        self._pieces: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        self.anchor = torch.zeros((), device=model.device, requires_grad=True)
        self.sink: Sink | None = None
        self.valid = torch.empty(0)
        self._slots_of: dict[int, Tensor] = {}
        self.counts: list[int] = []
        self.uses: dict[int, int] = {}  # how often each leaf ran in the last forward
        self.counting = False

    def forward(self, batch: Batch) -> Supervised:
        """Supervised logits of a batch, with the taps in the graph."""
        real = batch.attention_mask.bool()
        # A position is valid if a token follows it: the last token of a row is an input in some
        # batches and cut off in others, and must count in none.
        # The last of a document is followed by a token of another one.
        self.valid = real[:, :-1] & real[:, 1:] & (batch.position_ids[:, 1:] > 0)
        self._slots_of = {}
        self._pieces.clear()  # of a batch that memory was too small for
        self.counts = batch.supervised[:, 1:].sum(1).tolist()
        self.uses.clear()
        self.counting = True
        with torch.enable_grad(), self.own_batch():
            part = None if self.apart else supervised_logits(self.model, batch)
        self._prove_order()
        with torch.enable_grad(), self.own_batch():
            if self.apart or part is None:  # a tap may just have found that they must
                part = self._one_by_one(batch)
        self.counting = False
        if not all_finite(part.logits):
            raise NumericalError(
                "the model gives NaN or infinite logits on the training or query rows; load it "
                "with another --dtype, or check it on the rows' text"
            )
        return part

    def _one_by_one(self, batch: Batch) -> Supervised:
        """The logits of a batch whose examples run alone, without padding."""
        parts = []
        for row, real in enumerate(batch.attention_mask.bool()):
            alone = replace(
                batch,
                **{
                    name: getattr(batch, name)[row : row + 1, real]
                    for name in ("input_ids", "attention_mask", "supervised", "position_ids")
                },
                indices=batch.indices[row : row + 1],
            )
            with self.running(row):
                parts.append(supervised_logits(self.model, alone))
        logits, targets = (torch.cat([getattr(p, n) for p in parts]) for n in ("logits", "targets"))
        return Supervised(logits, targets, [p.counts[0] for p in parts])

    @contextmanager
    def own_batch(self) -> Iterator[None]:
        """Within the block it is the tape's batch that runs."""
        self.runs = True
        try:
            yield
        finally:
            self.runs = False

    @contextmanager
    def running(self, row: int | None) -> Iterator[None]:
        """Within the block taps belong to the example at place `row` of the batch."""
        before, self.row = self.row, row
        try:
            yield
        finally:
            self.row = before

    @property
    def examples(self) -> int:
        """How many examples the forward that runs now has."""
        return len(self.valid) if self.runs and self.row is None else 1

    def look(self, leaf: int, x: Tensor) -> None:
        """Note whether a leaf's input `x` tells whose its tokens are."""
        if not self.runs:
            return
        if self.counting:  # not where a layer is recomputed in the backward
            self.uses[leaf] = self.uses.get(leaf, 0) + 1
        b, T = self.valid.shape
        shapes = [(b, T), (1, sum(self.counts))] if x.dim() == 3 else [(b * T,)]
        known = x.shape[:-1] in shapes or leaf in self.slots
        if self.row is not None or self.apart:
            return
        if not known:
            what = f"{tuple(x.shape[:-1])} tokens of {b} rows of {T} and not whose they are"
            self._run_apart(leaf, what)
        elif x.dim() == 2 and leaf not in self.slots and leaf not in self.model.in_order:
            self.flat.add(leaf)

    def _prove_order(self) -> None:
        """Find out, once for a model, whether flat tokens come in the batch's order."""
        found = tokens_in_order(self.model, self.flat) if self.flat and not self.apart else {}
        self.flat.clear()
        self.model.in_order.update(found)
        if other := [leaf for leaf, in_order in found.items() if not in_order]:
            self._run_apart(other[0], "tokens in another order than the rows have them")

    def _run_apart(self, leaf: int, what: str) -> None:
        self.apart, self.model.in_order[leaf] = True, False
        name = self.model.space.leaves[leaf].name
        say(f"note: {name} sees {what}: rows run one by one from here on")

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
        gradient = gradient.to(logits.dtype)
        with self.own_batch():
            torch.autograd.grad(
                logits, self.anchor, gradient, retain_graph=not last, allow_unused=True
            )
        self._show_pieces()
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

    def show(self, leaf: int, x: Tensor, g: Tensor, row: int | None = None) -> None:
        """Bring one leaf's tensors into the shape `[b, T, d]` and hand them to the sink.

        Those of one example alone wait for the others'.
        """
        assert self.sink is not None
        if row is not None:
            piece = (x.detach().reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))
            self._pieces.setdefault((leaf, row), []).append(piece)
            return
        b, T = self.valid.shape
        valid = self.valid
        # a device map may have put the layer elsewhere
        x, g = x.to(valid.device), g.to(valid.device)
        if leaf in self.slots:
            valid = self._valid_slots(x.shape[1] // T)
        elif x.dim() == 2 and x.shape[0] == b * T:  # some decoders flatten their tokens
            x, g = x.unflatten(0, (b, T)), g.unflatten(0, (b, T))
        elif x.shape[0] == 1 and x.shape[1] == sum(self.counts) and (b, T) != x.shape[:2]:
            # an adapted LM head sees supervised positions only, one example after the other
            x, g, valid = _padded([t[0].split(self.counts) for t in (x, g)])
        if x.shape[:-1] != valid.shape:
            raise AdapterError(
                f"{self.model.space.leaves[leaf].name} sees tokens of shape {tuple(x.shape)} "
                f"where {tuple(valid.shape)} + (width,) was expected, and the gradients of single "
                "rows cannot be told apart there; adapt other layers"
            )
        self.sink(leaf, x, g, valid)

    def _valid_slots(self, k: int) -> Tensor:
        """`valid` for k slots a token, `[b, T k]`: one tensor for all leaves of a batch, which what
        reads it may therefore look at once.
        """
        if k not in self._slots_of:
            self._slots_of[k] = self.valid.repeat_interleave(k, 1)
        return self._slots_of[k]

    def _show_pieces(self) -> None:
        """Hand over what the leaves saw of examples that ran alone."""
        assert self.sink is not None
        rows = range(len(self.counts))
        for leaf in sorted({leaf for leaf, _ in self._pieces}, reverse=True):
            found = [self._pieces.pop((leaf, row), []) for row in rows]
            like = next(piece for pieces in found for piece in pieces)
            sides = [
                [torch.cat([p[side] for p in pieces] or [like[side][:0]]) for pieces in found]
                for side in (0, 1)
            ]
            self.sink(leaf, *_padded(sides))


def _padded(sides: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and output gradients of each example, padded with zeros to `[b, T, d]`, and which of
    the tokens are valid `[b, T]`.
    """
    x, g = (nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in sides)
    lengths = torch.tensor([len(part) for part in sides[0]], device=x.device)
    return x, g, torch.arange(x.shape[1], device=x.device) < lengths[:, None]


@contextmanager
def tape(model: AdaptedModel) -> Iterator[Tape]:
    """Put the taps in and switch weight gradients and dropout off within the block.

    Afterwards everything is put back.
    """
    recorder = Tape(model)
    leaves = [leaf for site in model.sites for leaf in (site.A, site.B)]
    forwards: dict[nn.Module, Callable[..., Any]] = {
        leaf: _tapped_forward(leaf, recorder, number) for number, leaf in enumerate(leaves)
    }
    forwards |= {
        site.layer: site_forward(site, recorder, 2 * number)
        for number, site in enumerate(model.sites)
        if is_plain(site)
    }
    forwards |= {
        layer: _recomputed(layer.forward, recorder) for layer in checkpointed_layers(model)
    }
    if recorder.slots:
        forwards |= {
            layer: SlotForward(layer, recorder, computes_in(layer))
            for layer in outermost(model.model)
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
    def forward(x: Tensor) -> Tensor:
        recorder.look(number, x)
        return _Tap.apply(x, leaf.weight, recorder.anchor, recorder, number)  # type: ignore[no-any-return]

    return forward


def _recomputed(forward: Callable[..., Any], recorder: Tape) -> Callable[..., Any]:
    """A layer's forward that is run again in the backward, for the same example."""

    def run(*args: Any, **kwargs: Any) -> Any:
        row = recorder.row

        def again(*args: Any, **kwargs: Any) -> Any:
            with recorder.running(row):
                return forward(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    return run


def max_rows(space: ParamSpace) -> int:
    """Rows per batch such that their gradients take at most `GRADIENT_BYTES`."""
    return max(1, block_bytes(GRADIENT_BYTES) // (4 * space.size))


def stream_gradients(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    *,
    measurement: Measurement | None = None,
    token_budget: int = 4096,
    batches: Iterable[np.ndarray] | None = None,
    padding: str = "right",
) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
    """Yield `(indices [b], gradients [b, P], values [b])`, batch after batch.

    Without `measurement`: the gradient and value of `l_i`, the **summed** cross-entropy in nats.
    With one: of m(q). Gradients have the LoRA parameters' type. One example's gradient does not
    depend on its batch, its padding or the order.

    A batch that memory is too small for comes in parts, in its order.

    `batches` overrides the length-bucketed plan; `padding` is `right` or `left` (with eager
    attention and left padding some models give NaN at padded positions; right padding needs no mask
    at all).
    """
    if batches is None:
        batches = plan_batches(tokens, token_budget, max_rows=max_rows(model.space))

    def run(rows: np.ndarray, _: Steps) -> tuple[Tensor, np.ndarray]:
        batch = collate(tokens, rows, pad_id=model.pad_id, padding=padding, device=model.device)  # type: ignore[arg-type]
        return recorder.run(batch, measurement)

    with tape(model) as recorder:
        for rows in batches:
            for part, found in in_parts(model, tokens, rows, run):
                yield part, *found
                del found  # the next batch needs its memory


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

    def add(steps: Steps, leaf: int, x: Tensor, g: Tensor, valid: Tensor) -> None:
        place = total[space.leaves[leaf].slice].unflatten(0, space.leaves[leaf].shape)
        steps.once(leaf, lambda: place.add_(g.flatten(0, 1).T @ x.flatten(0, 1)))

    def run(rows: np.ndarray, steps: Steps) -> None:
        if before_batch is not None:
            before_batch(rows)
        _send_back(recorder, tokens, rows, by_logits, partial(add, steps))

    with tape(model) as recorder:
        for rows in plan_batches(tokens, token_budget) if len(tokens) else []:
            for _ in in_parts(model, tokens, rows, run):
                pass
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
        factors = repeated_over_tokens(weights[rows] / unit, part)
        return loss_gradient(part.logits, part.targets, factors)

    gradient = summed_gradient(model, tokens, by_logits, token_budget=token_budget, cost=cost)
    return gradient * unit, losses


def power_of_two_near(weight: float) -> float:
    """The power of 2 at or below a weight, and 1 for a weight of 0.

    It is taken out of the weights before a backward and multiplied in again afterwards, which
    changes no digit: 16-bit bases cannot hold weights of 1 / N_tok.
    """
    return 2.0 ** np.floor(np.log2(weight)) if weight > 0 else 1.0


def repeated_over_tokens(values: np.ndarray, part: Supervised) -> Tensor:
    """Numbers of the rows `[b]` repeated over their tokens, `[N]` float64, where the logits are."""
    repeated = np.repeat(np.asarray(values, dtype=np.float64), part.counts)
    return torch.from_numpy(repeated).to(part.logits.device)
