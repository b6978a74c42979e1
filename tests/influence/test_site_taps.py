"""Whole layers as one step of the graph: where, and that they compute what PEFT does."""

from __future__ import annotations

import pytest
import torch

from influence.batches import collate
from influence.gradients import tape
from influence.precision import compute_in
from influence.site_taps import is_plain
from tests.conftest import build_model, examples, tokens_of


def shown(model, tokens, monkeypatch, *, plain: bool) -> dict[int, list[torch.Tensor]]:
    """What the taps show of a batch, leaf by leaf, with plain sites as one step or by PEFT."""
    monkeypatch.setattr("influence.gradients.is_plain", is_plain if plain else lambda _: False)
    found: dict[int, list[torch.Tensor]] = {}

    def sink(leaf: int, x: torch.Tensor, g: torch.Tensor, _: torch.Tensor) -> None:
        found[leaf] = [x.detach(), g]

    with tape(model) as recorder:
        part = recorder.forward(collate(tokens, range(len(tokens)), pad_id=model.pad_id))
        weights = torch.linspace(-1, 1, part.logits.numel())
        recorder.backward(part.logits, weights.view_as(part.logits), sink)
    return found | {-1: [part.logits.detach()]}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("alpha", [8, 3])
def test_plain_sites_show_what_pefts_own_layers_do(kind, alpha, monkeypatch):
    """Qwen's projections have biases; the scaling is 1 and another number."""
    model = build_model(kind, r=8, lora_alpha=alpha)
    assert all(map(is_plain, model.sites))
    tokens = tokens_of(model, examples(3))
    one = shown(model, tokens, monkeypatch, plain=True)
    other = shown(model, tokens, monkeypatch, plain=False)
    assert one.keys() == other.keys()
    assert len(one) == 1 + 2 * len(model.sites)
    for leaf, tensors in one.items():
        for a, b in zip(tensors, other[leaf], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_is_not_the_usual_layer_runs_as_peft_has_it():
    conv = build_model("gpt2", target_modules=["c_attn"])
    assert not any(map(is_plain, conv.sites))
    model = build_model(layers=1)
    site = model.sites[0]
    assert is_plain(site)
    handle = site.layer.base_layer.register_forward_hook(lambda *_: None)
    assert not is_plain(site)
    handle.remove()
    assert is_plain(site)
    with tape(model) as recorder:  # a watch that begins meanwhile
        seen = []
        handle = site.A.register_forward_pre_hook(lambda *_: seen.append(True))
        recorder.forward(collate(tokens_of(model, examples(2)), range(2), pad_id=model.pad_id))
        handle.remove()
    assert seen == [True]
    site.layer.base_layer.to(torch.bfloat16)
    assert not is_plain(site)
    compute_in(model.model.get_base_model(), torch.float64)
    assert not any(map(is_plain, model.sites))
