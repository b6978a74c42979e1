"""Per-example gradients at labels sampled from the model, as the Fisher wants them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from influence.batches import collate
from influence.errors import memory_is_short
from influence.gradients import Tape, batch_uniforms
from influence.halving import Steps, fits, halve, in_parts
from influence.loss import sampled_loss_gradient
from influence.tokens import TokenizedExamples


def sampled_gradients(
    recorder: Tape, tokens: TokenizedExamples, rows: np.ndarray, seed: int, draws: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield `(rows [b], gradients [b, P])` of a batch at labels sampled from the model, draw after
    draw.

    One forward pass serves all draws, but where memory is too small for the batch: then each draw
    has the batch in parts, in its order, and forwards of its own.
    """
    model, given = recorder.model, 0

    def at_draws(rows: np.ndarray, some: range) -> Iterator[Tensor]:
        part = recorder.forward(collate(tokens, rows, pad_id=model.pad_id, device=model.device))
        for draw in some:
            uniforms = batch_uniforms(tokens, rows, seed, draw)
            gradient = sampled_loss_gradient(part.logits, uniforms)
            yield recorder.gradients(part, gradient, last=draw == some[-1])

    if draws > 1 and fits(model, tokens, rows):
        try:
            for gradients in at_draws(rows, range(draws)):
                given += 1
                yield rows, gradients
        except Exception as error:
            if not memory_is_short(error):
                raise
    if 1 < draws != given and len(rows) > 1 and fits(model, tokens, rows):
        halve(model, tokens, rows)
    for draw in range(given, draws):

        def run(rows: np.ndarray, _: Steps, draw: int = draw) -> Tensor:
            return next(at_draws(rows, range(draw, draw + 1)))

        yield from in_parts(model, tokens, rows, run)
