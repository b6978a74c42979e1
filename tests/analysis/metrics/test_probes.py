"""Relearning and quantisation: against loops that hold every weight apart, and nothing left
behind.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from analysis.metrics.probes import crossing, quantise, relearn, rounded
from influence.errors import AdapterError, InputError
from influence.loss import mean_losses
from tests.conftest import build_model, examples, tokens_of


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def same_bits(before, model) -> bool:
    now = model.model.state_dict()
    return before.keys() == now.keys() and all(
        torch.equal(before[name], now[name]) for name in before
    )


def plain_loss(model, tokens, i: int) -> torch.Tensor:
    """Mean loss of one row by the whole model's own forward, nothing cut, nothing padded."""
    ids = torch.from_numpy(tokens[i].input_ids)
    supervised = torch.from_numpy(tokens[i].supervised)
    logits = model.model(input_ids=ids[None]).logits[0, :-1]
    picked = supervised[1:]
    return nn.functional.cross_entropy(logits[picked], ids[1:][picked])


# ---- relearning ----------------------------------------------------------------------------------


def adam_by_hand(model, tokens, rows: list[int], steps: int, lr: float) -> None:
    """Adam on the LoRA matrices as the paper writes it, one row at a time through autograd.

    Moves the model.
    """
    parameters = [p for name, p in model.model.named_parameters() if "lora_" in name]
    for p in parameters:
        p.requires_grad_(True)
    m, v = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    for t in range(1, steps + 1):
        loss = torch.stack([plain_loss(model, tokens, i) for i in rows]).mean()
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for j, (p, g) in enumerate(zip(parameters, grads, strict=True)):
                m[j] = 0.9 * m[j] + 0.1 * g
                v[j] = 0.999 * v[j] + 0.001 * g**2
                p -= lr * (m[j] / (1 - 0.9**t)) / ((v[j] / (1 - 0.999**t)).sqrt() + 1e-8)


def test_relearning_is_adam_on_the_chosen_rows():
    model, other = build_model(layers=1), build_model(layers=1)
    tokens = tokens_of(model, examples(6))
    found = relearn(model, tokens, k=2, steps=3, lr=0.02, seed=5, token_budget=20)
    chosen = [tokens.ids.index(id) for id in found.trained_ids]
    rest = [tokens.ids.index(id) for id in found.held_back_ids]
    assert sorted(chosen + rest) == list(range(6))
    assert len(chosen) == 2
    assert found.steps.tolist() == [0, 1, 2, 3]
    for point, step in enumerate(found.steps):
        with torch.no_grad():
            expected = [float(plain_loss(other, tokens, i)) for i in rest]
            own = np.mean([float(plain_loss(other, tokens, i)) for i in chosen])
        np.testing.assert_allclose(found.values[point], expected, rtol=1e-8)
        np.testing.assert_allclose(found.held_back[point], np.mean(expected), rtol=1e-8)
        np.testing.assert_allclose(found.trained[point], own, rtol=1e-8)
        if step < 3:
            start = build_model(layers=1)
            adam_by_hand(start, tokens, chosen, int(step) + 1, 0.02)
            other = start
    assert found.trained[-1] < found.trained[0]


def test_relearning_leaves_nothing_behind():
    model = build_model(layers=1)
    tokens, before = tokens_of(model, examples(5)), state(model)
    flags = [p.requires_grad for p in model.model.parameters()]
    first = relearn(model, tokens, steps=4, lr=0.05)
    assert same_bits(before, model)
    assert [p.requires_grad for p in model.model.parameters()] == flags
    assert all(p.grad is None for p in model.model.parameters())
    again = relearn(model, tokens, steps=4, lr=0.05)
    assert np.array_equal(first.values, again.values)
    assert len(first.trained_ids) == 1  # a fifth


def test_relearning_is_put_back_when_it_fails(monkeypatch):
    model = build_model(layers=1)
    tokens, before = tokens_of(model, examples(5)), state(model)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("analysis.metrics.probes.loss_sum_gradient", fails)
    with pytest.raises(RuntimeError):
        relearn(model, tokens, steps=2)
    assert same_bits(before, model)


def test_a_long_curve_has_few_points():
    model = build_model(layers=1, target_modules=["q_proj"])
    found = relearn(model, tokens_of(model, examples(3)), k=1, steps=25, lr=1e-3)
    assert found.steps[0] == 0
    assert found.steps[-1] == 25
    assert len(found.steps) == 11
    assert len(found.held_back) == len(found.trained) == len(found.values) == 11
    assert found.value is None
    assert found.level is None


@pytest.mark.parametrize(
    ("steps", "losses", "level", "expected"),
    [
        ([0, 2, 4], [5.0, 3.0, 1.0], 2.0, 3.0),  # half of the way from 3 to 1, steps 2 to 4
        ([0, 2, 4], [5.0, 3.0, 1.0], 4.5, 0.5),
        ([0, 2, 4], [5.0, 3.0, 1.0], 3.0, 2.0),
        ([0, 2, 4], [5.0, 3.0, 1.0], 0.5, None),
        ([0, 2, 4], [5.0, 3.0, 1.0], 6.0, 0.0),  # it was never away
        ([0, 1, 2, 3], [5.0, 1.0, 5.0, 1.0], 3.0, 0.5),  # the first time
    ],
)
def test_the_crossing_is_linear_between_measurements(steps, losses, level, expected):
    assert crossing(steps, losses, level) == (None if expected is None else pytest.approx(expected))


def test_the_curve_knows_when_it_is_back():
    model = build_model(layers=1)
    tokens = tokens_of(model, examples(5))
    found = relearn(model, tokens, k=4, steps=6, lr=0.05, seed=1)
    half = (found.trained[0] + found.trained[-1]) / 2
    back = relearn(model, tokens, k=4, steps=6, lr=0.05, seed=1, level=float(found.held_back.min()))
    assert back.level == found.held_back.min()
    assert back.value == found.steps[found.held_back.argmin()]
    assert crossing(found.steps, found.trained, half) < 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 5}, "at least one to train on and one to hold back"),
        ({"k": 0}, "on 0 of 5 forget rows"),
        ({"steps": 0}, "for 0 steps"),
        ({"lr": 0.0}, "at a rate of 0.0"),
        ({"lr": float("nan")}, "at a rate of nan"),
    ],
)
def test_relearning_refuses(options, words):
    model = build_model(layers=1)
    with pytest.raises(InputError, match=words):
        relearn(model, tokens_of(model, examples(5)), **options)


@pytest.mark.parametrize("curve", [([], []), ([0, 1], [1.0]), ([0, 1], [1.0, float("nan")])])
def test_a_curve_without_sense_is_refused(curve):
    with pytest.raises(InputError, match="expected as many steps as losses"):
        crossing(*curve, 1.0)


# ---- quantisation --------------------------------------------------------------------------------


def test_rounding_by_hand():
    """3 bits: whole numbers -3 ... 3.

    Row 1: d = 6/3 = 2: 6, -1.2, 0.8, 3.1 are 3, -0.6, 0.4, 1.55 steps: 6, -2, 0, 4.

    In groups of 2: row 1's second group has d = 3.1/3: 0.8 is 0.774 steps, so 1.0333 and 3.1. Row 2
    is zero.
    """
    w = torch.tensor([[6.0, -1.2, 0.8, 3.1], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert rounded(w, 3).tolist() == [[6.0, -2.0, 0.0, 4.0], [0.0] * 4]
    torch.testing.assert_close(
        rounded(w, 3, 2)[0], torch.tensor([6.0, -2.0, 3.1 / 3, 3.1], dtype=torch.float64)
    )
    torch.testing.assert_close(
        rounded(w, 3, 3)[0, 3], w[0, 3]
    )  # a last group of one is its own maximum


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_grid(bits):
    """At most 2^bits - 1 values per channel, none further off than half a step, and rounding twice
    is rounding once.
    """
    w = torch.randn(7, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = rounded(w, bits)
    step = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert max(len(row.unique()) for row in q) <= 2**bits - 1
    assert bool(((q - w).abs() <= step / 2 * (1 + 1e-12)).all())
    torch.testing.assert_close(rounded(q, bits), q, rtol=1e-13, atol=0)
    torch.testing.assert_close(rounded(-w, bits), -q, rtol=0, atol=0)


def biased(kind: str, **lora):
    """A model whose biases are not zero, as they are when it is made."""
    model = build_model(kind, layers=1, **lora)
    for number, (name, parameter) in enumerate(model.model.named_parameters()):
        if name.endswith(".bias"):
            parameter.data.copy_(torch.linspace(-1, 1 + number, len(parameter)))
    return model


def oracle(kind: str, bits: int, group: int | None, **lora):
    """The same model with PEFT's own merge and every adapted weight then rounded number by number,
    in place.
    """
    model = biased(kind, **lora)
    names = {site.name for site in model.sites}
    merged = model.model.merge_and_unload()
    for name, module in merged.named_modules():
        if name not in names:
            continue
        conv = type(module).__name__ == "Conv1D"
        w = module.weight.data.T.clone() if conv else module.weight.data.clone()
        width, most = w.shape[1] if group is None else group, 2 ** (bits - 1) - 1
        for row in w:
            for start in range(0, w.shape[1], width):
                part = row[start : start + width]
                step = float(part.abs().max()) / most
                for j in range(len(part)):
                    part[j] = round(float(part[j]) / step) * step
        module.weight.data = w.T.contiguous() if conv else w
    return merged


@pytest.mark.parametrize(
    ("kind", "bits", "group"),
    [("llama", 4, None), ("llama", 8, 5), ("gpt2", 4, None), ("gpt2", 3, 4), ("qwen2", 4, None)],
)
def test_quantised_losses_are_those_of_a_merged_and_rounded_model(kind, bits, group):
    model = biased(kind)
    tokens = tokens_of(model, examples(4))
    merged = oracle(kind, bits, group)
    expected = []
    for row in tokens:
        ids = torch.from_numpy(row.input_ids)
        with torch.no_grad():
            logits = merged(input_ids=ids[None]).logits[0]
        first = int(row.supervised.argmax())
        expected.append(float(nn.functional.cross_entropy(logits[first - 1 : -1], ids[first:])))
    plain = mean_losses(model, tokens)
    with quantise(model, bits=bits, group=group) as inside:
        found = mean_losses(inside, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.abs(found - plain).max() > 1e-4
    assert np.array_equal(mean_losses(model, tokens), plain)


def test_quantising_leaves_nothing_behind():
    model = build_model(layers=1)
    before, modules = state(model), [vars(m).get("forward") for m in model.model.modules()]

    def breaks_off():
        with quantise(model, bits=4):
            assert same_bits(before, model)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        breaks_off()
    assert same_bits(before, model)
    assert [vars(m).get("forward") for m in model.model.modules()] == modules


def test_quantised_layers_follow_the_adapter():
    """The rounding is of where the adapter is inside the block, so a reference can be put in its
    place.
    """
    model = build_model(layers=1)
    tokens, theta = tokens_of(model, examples(3)), model.snapshot() * 0.5
    with model.at(theta), quantise(model, bits=4):
        one = mean_losses(model, tokens)
    with quantise(model, bits=4), model.at(theta):
        assert np.array_equal(mean_losses(model, tokens), one)


def test_eight_bits_change_less_than_three(tiny):
    tokens = tokens_of(tiny, examples(6))
    plain, off = mean_losses(tiny, tokens), []
    for bits in (8, 3):
        with quantise(tiny, bits=bits):
            off.append(np.abs(mean_losses(tiny, tokens) - plain).mean())
    assert off[0] < off[1] / 4


def test_an_adapted_head_is_rounded_too():
    model = build_model(layers=1, target_modules=["q_proj", "lm_head"])
    tokens = tokens_of(model, examples(3))
    merged = oracle("llama", 3, None, target_modules=["q_proj", "lm_head"])
    ids = torch.from_numpy(tokens[0].input_ids)
    first = int(tokens[0].supervised.argmax())
    with torch.no_grad():
        expected = nn.functional.cross_entropy(
            merged(input_ids=ids[None]).logits[0, first - 1 : -1], ids[first:]
        )
    with quantise(model, bits=3):
        np.testing.assert_allclose(mean_losses(model, tokens)[0], float(expected), rtol=1e-9)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 16}, {"bits": 4, "group": 0}])
def test_quantising_refuses_grids_without_sense(options, tiny):
    with pytest.raises(InputError, match="expected 2 to 8 bits"), quantise(tiny, **options):
        pass


def test_quantising_refuses_weights_that_are_quantised(tiny):
    weight = tiny.sites[0].layer.get_base_layer().weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(AdapterError, match="float8_e4m3fn already"), quantise(tiny):
        pass
