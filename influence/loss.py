"""From token ids to supervised logits and losses: the only place that shifts and masks.

Token t is predicted from the tokens before it, so the logits of position t - 1 are matched with
token t, and only positions whose *next* token is supervised reach the LM head. All results are flat
over supervised positions, example after example: N of them in a batch of b examples, `counts[i]` of
them in example i.

Losses are cross-entropies in nats. `l_i` is the **sum** over example i's supervised tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel, accepts
from influence.batches import Batch, collate, plan_batches
from influence.errors import BadRow, DataError, NumericalError
from influence.halving import Steps, in_parts
from influence.positions import (
    length_of,
    most_positions,
    refuse_mixed_documents,
    rope_of_each_row,
)
from influence.tokens import TokenizedExamples

#: Numbers in what is held of a softmax at once: 67 MB in float32, 130 positions of 128,256 tokens.
CHUNK_NUMBERS = 1 << 24
#: Labels that are drawn from together, of large vocabularies.
LABEL_BLOCK = 256


@dataclass(frozen=True)
class Supervised:
    """The logits and targets at the supervised positions of a batch.

    `logits` [N, V] (attached to the graph), `targets` [N], `counts` [b] (sum N), in example order.
    """

    logits: Tensor
    targets: Tensor
    counts: list[int]

    def per_example(self, values: Tensor) -> Tensor:
        """Sum token values `[N]` over each example: `[b]`."""
        return torch.stack([part.sum() for part in values.split(self.counts)])


def supervised_logits(model: AdaptedModel, batch: Batch) -> Supervised:
    """Run the model on a batch and return the logits that predict its supervised tokens.

    Right padding needs no attention mask in a causal model (no real token sees it); left padding
    gets its mask and positions. Rows of several documents get positions and no mask, by which
    models keep documents apart (`check_rows` sees to it that this one does). Raises
    `NumericalError` if a logit is NaN.
    """
    inputs = {"input_ids": batch.input_ids[:, :-1]}
    if batch.packed:
        inputs["position_ids"] = batch.position_ids[:, :-1]
    elif not bool(batch.attention_mask[:, 0].all()):
        inputs["attention_mask"] = batch.attention_mask[:, :-1]
        if accepts(model.model, "position_ids"):
            inputs["position_ids"] = batch.position_ids[:, :-1]
    mask = batch.supervised[:, 1:]
    if accepts(model.model, "use_cache"):
        inputs["use_cache"] = False  # type: ignore[assignment]
    real = batch.attention_mask.bool()
    with (
        _only_supervised_reach_head(model, mask) as selected,
        rope_of_each_row(model, batch.position_ids, real),
    ):
        logits = model.model.get_base_model()(**inputs).logits
    logits = logits.flatten(0, -2) if selected else logits[mask]
    return Supervised(logits, batch.input_ids[:, 1:][mask], mask.sum(1).tolist())


@contextmanager
def _only_supervised_reach_head(model: AdaptedModel, mask: Tensor) -> Iterator[bool]:
    """Hand the LM head only the hidden states [b, T, d] under `mask` [b, T], as [1, N, d].

    What follows the head (soft-capping, scaling) acts element by element and is unchanged by this.
    """
    head = model.model.get_output_embeddings()
    if head is None:
        yield False
        return
    handle = head.register_forward_pre_hook(
        lambda _, args: (args[0][mask.to(args[0].device)].unsqueeze(0), *args[1:])
    )
    try:
        yield True
    finally:
        handle.remove()


def check_rows(model: AdaptedModel, tokens: TokenizedExamples) -> None:
    """Refuse rows that the model cannot take.

    These are rows longer than its positions and ids beyond its embedding, and rows of several
    documents where it does not keep these apart. Errors: DataError that lists all of them,
    AdapterError for documents.
    """
    positions = most_positions(model.model.get_base_model().config)
    vocabulary = model.model.get_input_embeddings().num_embeddings
    bad = []
    for number, (id, item) in enumerate(zip(tokens.ids, tokens, strict=True), start=1):
        if positions and length_of(item) > positions:
            reason = f"{len(item.input_ids)} tokens, and the model has {positions} positions"
            bad.append(BadRow(number, id, reason))
        elif int(item.input_ids.max()) >= vocabulary:
            token = _token_text(model, int(item.input_ids.max()))
            bad.append(BadRow(number, id, f"{token}, and the model embeds {vocabulary} tokens"))
    if bad:
        raise DataError(
            f"{len(bad)} of {len(tokens)} rows do not fit the model. {_advice(bad)}:", bad
        )
    refuse_mixed_documents(model, tokens)


def _token_text(model: AdaptedModel, number: int) -> str:
    """A token by its id and, where the tokenizer has it, its text."""
    try:
        text = model.tokenizer.convert_ids_to_tokens(number)
    except (AttributeError, IndexError, KeyError, OverflowError):
        text = None
    return f"token id {number}" if text is None else f"token id {number} ({text!r})"


def _advice(bad: Sequence[BadRow]) -> str:
    """What to do about rows that are too long, and about tokens that the model has not."""
    advice = []
    if any("positions" in row.reason for row in bad):
        advice.append("Truncate long ones with --max-length")
    if any("embeds" in row.reason for row in bad):
        advice.append(
            "The tokenizer has tokens that the base has no embedding for: if training added them, "
            "save the adapter with save_pretrained(..., save_embedding_layers=True), or pass the "
            "resized base (--model); else use the tokenizer that the model was trained with"
        )
    return ". ".join(advice)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each supervised token, `-log softmax(logits)[target]`, `[N]`.

    In nats, at least float32, attached to the graph. Without a graph no wide copy of all logits is
    made.
    """
    if logits.requires_grad and torch.is_grad_enabled():
        return _cross_entropy(logits, targets)
    parts = [_cross_entropy(logits[at], targets[at]) for at in position_chunks(logits)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@torch.no_grad()
def row_losses(part: Supervised) -> Tensor:
    """The summed cross-entropy `l_i` of every example of a batch, `[b]` float64, nats, detached."""
    return part.per_example(token_losses(part.logits, part.targets).double())


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(accurate(logits), targets, reduction="none")


def log_probabilities(logits: Tensor) -> Tensor:
    """`log softmax(logits)`, `[N, V]`, at least float32, attached to the graph."""
    return accurate(logits).log_softmax(-1)


def position_chunks(logits: Tensor) -> list[slice]:
    """Chunks of the positions of `logits` [N, V], one after the other, at least one.

    A batch of 4,096 positions of 128,256 tokens takes 2.1 GB in float32 each time that it is
    copied, so that what is made of logits is made of some positions at a time: `CHUNK_NUMBERS`.
    """
    step = max(1, CHUNK_NUMBERS // max(1, logits.shape[-1]))
    return [slice(start, start + step) for start in range(0, max(1, len(logits)), step)]


def probability_chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of positions and `softmax(logits)` there, `[n, V]`, at least float32, detached.

    The probabilities are the caller's to write over.
    """
    for at in position_chunks(logits):
        yield at, accurate(logits.detach()[at]).softmax(-1)


def loss_gradient(logits: Tensor, labels: Tensor, factors: Tensor | None = None) -> Tensor:
    """Gradient of the summed cross-entropy by the logits, `p - onehot(label)`, `[N, V]`.

    It has the logits' type, and is rounded to it at the end: `factors` [N], where given, multiply
    the positions before that.
    """
    out = torch.empty_like(logits)
    for at, probs in probability_chunks(logits):
        gradient = less_labels(probs, labels[at])
        out[at] = gradient if factors is None else gradient.mul_(factors[at, None].to(gradient))
    return out


def sampled_loss_gradient(logits: Tensor, uniforms: Tensor) -> Tensor:
    """`loss_gradient` of labels that are drawn from the model, `[N, V]` in the logits' type.

    `uniforms` [N] in [0, 1) draw them (`sample_labels`).
    """
    out, uniforms = torch.empty_like(logits), uniforms.to(logits.device)
    for at, probs in probability_chunks(logits):
        out[at] = less_labels(probs, sample_labels(probs, uniforms[at]))
    return out


def less_labels(probs: Tensor, labels: Tensor) -> Tensor:
    """`p - onehot(label)` in the place of `probs` [n, V]."""
    probs[torch.arange(len(labels), device=labels.device), labels] -= 1
    return probs


def sample_labels(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one label per position from the model's own distribution.

    Its cumulative sum is inverted: `probs` [n, V], `uniforms` [n] in [0, 1), label = the first v
    with cdf[v] > u. Returns `[n]`.
    """
    count = probs.shape[-1]
    if count < 4 * LABEL_BLOCK:
        return _drawn(probs, uniforms.double())[0]
    # which block of labels first, and then which of its labels: no sum over all of them is kept
    whole = count // LABEL_BLOCK * LABEL_BLOCK
    masses = probs[:, :whole].unflatten(1, (-1, LABEL_BLOCK)).sum(-1)
    if whole < count:
        masses = torch.cat([masses, probs[:, whole:].sum(-1, keepdim=True)], 1)
    block, within = _drawn(masses, uniforms.double())
    places = torch.arange(LABEL_BLOCK, device=probs.device) + LABEL_BLOCK * block[:, None]
    inside = probs.gather(1, places.clamp(max=count - 1)) * (places < count)
    return places[:, 0] + _drawn(inside, within)[0]


def _drawn(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first of `masses` [n, v] whose running sum, over that of all, exceeds `uniforms` [n], and
    how far through it they are, in [0, 1): both `[n]`.
    """
    # in float64, or rare labels of a large vocabulary would be lost
    cdf = masses.cumsum(-1, dtype=torch.float64)
    u = uniforms.to(cdf) * cdf[:, -1]
    found = torch.searchsorted(cdf, u.unsqueeze(-1), right=True).clamp_(max=masses.shape[-1] - 1)
    size = masses.gather(1, found).to(cdf)
    within = (u.unsqueeze(-1) - (cdf.gather(1, found) - size)) / size.clamp(min=1e-300)
    return found.squeeze(-1), within.clamp_(0, 1 - 1e-12).squeeze(-1)


def all_finite(logits: Tensor) -> bool:
    """Whether no logit is NaN or infinite. Of 16-bit logits no wider copy is made."""
    if not logits.numel():
        return True
    return bool(torch.stack(torch.aminmax(logits.detach())).isfinite().all())


def mean_losses(
    model: AdaptedModel, tokens: TokenizedExamples, *, token_budget: int = 4096
) -> np.ndarray:
    """Mean cross-entropy per supervised token of every example, `[n]` float64, nats."""
    out = np.empty(len(tokens))

    def run(rows: np.ndarray, _: Steps) -> np.ndarray:
        batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
        part = supervised_logits(model, batch)
        return row_losses(part).cpu().numpy()

    with model.evaluating(), torch.no_grad():
        for rows in plan_batches(tokens, token_budget):
            for part, sums in in_parts(model, tokens, rows, run):
                out[part] = sums / tokens.counts[part]
    if not np.isfinite(out).all():
        raise NumericalError(
            f"the loss of {int((~np.isfinite(out)).sum())} rows is NaN or infinite"
        )
    return out


def accurate(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 where they are: 16 bits are too few for a softmax."""
    return logits if logits.dtype == torch.float64 else logits.float()
