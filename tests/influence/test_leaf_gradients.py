"""Leaf by leaf the gradients are those of whole rows, also of leaves that run twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from influence.batches import collate
from influence.gradients import stream_gradients, tape
from influence.leaf_gradients import LeafGradients
from influence.measurements import output_gradient
from influence.tokens import tokenize
from tests.conftest import build_model, examples


def by_leaf(model, tokens, rows: np.ndarray) -> tuple[Tensor, list[int]]:
    """Gradients `[b, P]` put together from leaves, and how often each leaf was handed over."""
    out, taken = torch.zeros(len(rows), model.space.size, dtype=model.dtype), []

    def take(leaf: int, gradients: Tensor) -> None:
        taken.append(leaf)
        out[:, model.space.leaves[leaf].slice] = gradients.flatten(1)

    with tape(model) as recorder:
        part = recorder.forward(collate(tokens, rows, pad_id=model.pad_id))
        _, gradient = output_gradient(part, None)
        sink = LeafGradients(recorder, take)
        recorder.backward(part.logits, gradient, sink)
        sink.finish()
    return out, taken


def run_twice(model) -> None:
    """Let the first layer's MLP run twice: its output is added once more, halved."""
    mlp = model.model.get_base_model().model.layers[0].mlp
    once = mlp.forward
    mlp.forward = lambda x: once(x) + 0.5 * once(x * 0.5)


@pytest.mark.parametrize("change", ["plain", "twice", "checkpointed"])
def test_leaves_handed_over_once_are_the_rows_gradients(change):
    model = build_model("llama")
    if change == "twice":
        run_twice(model)
    if change == "checkpointed":
        model.model.get_base_model().gradient_checkpointing_enable()
    tokens = tokenize(examples(5), model.tokenizer)
    expected = torch.zeros(5, model.space.size, dtype=model.dtype)
    for row in range(5):
        ((_, gradient, _),) = stream_gradients(model, tokens, batches=[np.array([row])])
        expected[row] = gradient[0]
    found, taken = by_leaf(model, tokens, np.arange(5))
    assert taken != sorted(taken)  # while the backward goes on, not all of them at its end
    assert sorted(taken) == list(range(len(model.space.leaves)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_second_backward_of_recomputed_layers_waits_for_nothing():
    """Layers that are run again in a first backward are no further uses for a second one."""
    model = build_model("llama")
    model.model.get_base_model().gradient_checkpointing_enable()
    tokens = tokenize(examples(3), model.tokenizer)
    with tape(model) as recorder:
        part = recorder.forward(collate(tokens, np.arange(3), pad_id=model.pad_id))
        _, gradient = output_gradient(part, None)
        for last in (False, True):
            sink = LeafGradients(recorder, lambda leaf, gradients: None)
            recorder.backward(part.logits, gradient, sink, last=last)
            assert not sink.waiting
