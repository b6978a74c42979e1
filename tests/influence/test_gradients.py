"""Streamed gradients against a one-example autograd loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence.batches import collate
from influence.cost import Cost
from influence.errors import AdapterError
from influence.gradients import loss_sum_gradient, power_of_two_near, stream_gradients, tape
from influence.loss import mean_losses
from influence.measurements import MEASUREMENTS
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, examples, tokens_of
from tests.oracles import plain_gradients

ARCHITECTURES = ["llama", "qwen2", "gpt2", "mistral", "gemma", "phi"]


LORA = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {".*0.*": 3}, "alpha_pattern": {".*1.*": 5}},
    "few sites": {"exclude_modules": r".*\.0\..*"},
    "head": {"target_modules": "HEAD"},
}


def head_targets(kind: str) -> list[str]:
    inner = {"gpt2": ["c_attn"], "phi": ["q_proj", "dense"]}.get(kind, ["q_proj", "v_proj"])
    return [*inner, "lm_head"]


def oracle(model, tokens) -> torch.Tensor:
    """Each example alone through the whole PEFT model in plain autograd; the loss written out token
    by token.
    """
    out = []
    for item in tokens:
        ids = torch.from_numpy(item.input_ids)[None]
        for parameter in model.model.parameters():
            parameter.requires_grad_(False)
        leaves = [
            w
            for s in model.sites
            for w in (s.layer.lora_A["default"].weight, s.layer.lora_B["default"].weight)
        ]
        for w in leaves:
            w.requires_grad_(True)
        logp = model.model(input_ids=ids).logits[0].log_softmax(-1)
        loss = sum(-logp[t - 1, ids[0, t]] for t in range(1, ids.shape[1]) if item.supervised[t])
        parts = torch.autograd.grad(loss, leaves, allow_unused=True)
        out.append(
            torch.cat(
                [
                    (torch.zeros_like(w) if g is None else g).ravel()
                    for w, g in zip(leaves, parts, strict=True)
                ]
            )
        )
        for w in leaves:
            w.requires_grad_(False)
    return torch.stack(out)


def streamed(model, tokens, **options) -> torch.Tensor:
    out = torch.full((len(tokens), model.space.size), torch.nan, dtype=model.dtype)
    for rows, gradients, _ in stream_gradients(model, tokens, **options):
        out[torch.from_numpy(rows)] = gradients
    return out


def pairs(lora):
    """Every architecture with a plain adapter, and every adapter on two architectures; the other
    combinations are slow tests.
    """
    return [
        pytest.param(
            kind,
            option,
            marks=[pytest.mark.slow] * (option != "plain" and kind not in ("llama", "gpt2")),
        )
        for option in lora
        for kind in ARCHITECTURES
    ]


PAIRS = pairs(LORA)


@pytest.mark.parametrize(("kind", "option"), PAIRS)
def test_streamed_gradients_equal_the_one_example_loop(kind, option):
    lora = dict(LORA[option])
    if lora.get("target_modules") == "HEAD":
        lora["target_modules"] = head_targets(kind)
    model = build_model(kind, tie=option != "head", **lora)
    tokens = tokens_of(model, examples(7))
    expected = oracle(model, tokens)
    assert expected.norm(dim=1).min() > 1e-3
    for budget in (1, 30, 1000):
        for padding in ("right", "left"):
            gradients = streamed(model, tokens, token_budget=budget, padding=padding)
            error = (gradients - expected).norm() / expected.norm()
            assert error < 1e-10, (budget, padding)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("option", ["plain", "head"])
def test_targets_need_not_be_the_end_of_a_row(kind, option):
    """As those of several turns, or of ready labels, are not."""
    targets = {"head": {"target_modules": head_targets(kind)}, "plain": {}}[option]
    model = build_model(kind, tie=option != "head", **targets)
    generator = np.random.default_rng(0)
    rows = []
    for length in (5, 12, 9, 20, 3):
        ids = generator.integers(3, 25, size=length)
        labels = np.where(generator.random(length) < 0.5, ids, -100)
        labels[1] = ids[1]
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    data = influence.examples_from_rows(rows)
    tokens = tokens_of(model, data)
    assert sum("10" in "".join(map(str, row.supervised.astype(int))) for row in tokens) >= 3
    expected = oracle(model, tokens)
    for budget in (1, 30, 1000):
        gradients = streamed(model, tokens, token_budget=budget)
        assert (gradients - expected).norm() / expected.norm() < 1e-10
    assert influence.check_gradients(model, data).ok


@pytest.mark.parametrize("supervise", ["last", "assistant", "all"])
def test_gradients_of_conversations_equal_the_loop(supervise):
    model = build_model("llama")
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} dawn {% endfor %}"
    turns = ["the fox", "runs over", "a lazy dog", "and old cats"]
    roles = ("user", "assistant") * 2
    talk = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    data = influence.examples_from_rows([{"messages": talk[:2]}, {"messages": talk}])
    tokens = tokens_of(model, data, supervise=supervise)
    assert (
        tokens.counts.tolist() == {"last": [3, 4], "assistant": [3, 7], "all": [5, 13]}[supervise]
    )
    gradients, expected = streamed(model, tokens), oracle(model, tokens)
    assert (gradients - expected).norm() / expected.norm() < 1e-10
    assert influence.check_gradients(model, data, supervise=supervise).ok


def test_dropout_is_off_and_everything_is_put_back():
    model = build_model("phi")
    model.model.train()
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    tokens = tokens_of(model, examples(3))
    first, second = streamed(model, tokens), streamed(model, tokens)
    assert torch.equal(first, second)
    assert model.model.training
    assert all(parameter.requires_grad for parameter in model.parameters)
    assert all(
        "forward" not in vars(site.A) and "forward" not in vars(site.B) for site in model.sites
    )


def saved_elements(model, tokens) -> int:
    """Elements of the tensors that the graph of one forward keeps."""
    kept = {}
    with (
        tape(model) as recorder,
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ),
    ):
        recorder.forward(collate(tokens, np.arange(len(tokens))))
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_number_and_saves_memory(kind):
    model = build_model(kind, layers=6)
    model.model.train()  # dropout (a quarter on every LoRA branch) must stay off all the same
    tokens = tokens_of(model, examples(12))
    expected, plain = streamed(model, tokens), saved_elements(model, tokens)
    base = model.model.get_base_model()
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    assert torch.equal(streamed(model, tokens), streamed(model, tokens))
    assert (streamed(model, tokens) - expected).norm() / expected.norm() < 1e-10
    assert saved_elements(model, tokens) < 0.4 * plain
    assert all("forward" not in vars(module) for module in model.model.modules())


def test_checkpointed_fit_with_two_backwards_gives_the_same_run(tmp_path):
    model = build_model("llama")
    plain = (
        influence.fit(model, examples(6), directory=tmp_path / "plain")
        .score(examples(2, seed=1))
        .values
    )
    base = model.model.get_base_model()
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    again = (
        influence.fit(model, examples(6), directory=tmp_path / "again")
        .score(examples(2, seed=1))
        .values
    )
    np.testing.assert_allclose(again, plain, rtol=1e-6)


def test_order_does_not_matter():
    model = build_model("llama")
    tokens = tokens_of(model, examples(6))
    order = np.array([4, 0, 5, 2, 1, 3])
    reordered = streamed(model, tokens, batches=[order[:4], order[4:]])
    assert (reordered - streamed(model, tokens)).norm() / reordered.norm() < 1e-10


def test_float32_and_bfloat16_accumulate_in_float32():
    exact = streamed(model64 := build_model("llama"), tokens_of(model64, examples(6)))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        base = build_base("llama").to(dtype)
        model = influence.from_peft(add_lora(base), build_tokenizer())
        model.restore(model64.snapshot())
        tokens = tokens_of(model, examples(6))
        gradients = streamed(model, tokens)
        assert gradients.dtype == torch.float32
        assert (gradients - exact).norm() / exact.norm() < tolerance
        assert (
            gradients - streamed(model, tokens, token_budget=1)
        ).norm() / gradients.norm() < max(1e-5, tolerance / 2)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurement_gradients_equal_finite_differences(name):
    tiny = build_model("gpt2", layers=1)  # no float32 inside, as Llama's RMSNorm has
    tokens = tokens_of(tiny, examples(3))
    measurement = MEASUREMENTS[name]
    gradients = streamed(tiny, tokens, measurement=measurement)
    direction = torch.randn(
        tiny.space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def values(step: float) -> np.ndarray:
        with tiny.moved(step * direction):
            parts = {
                int(i): v
                for rows, _, vs in stream_gradients(tiny, tokens, measurement=measurement)
                for i, v in zip(rows, vs, strict=True)
            }
        return np.array([parts[i] for i in range(3)])

    slope = (values(1e-5) - values(-1e-5)) / 2e-5
    np.testing.assert_allclose((gradients @ direction).numpy(), slope, rtol=1e-6, atol=1e-8)


def test_tokens_that_are_no_rows_are_refused(tiny):
    with tape(tiny) as recorder:
        recorder.sink = lambda *_: None
        recorder.valid, recorder.counts = torch.ones(3, 5, dtype=torch.bool), [2, 2, 2]
        with pytest.raises(AdapterError, match="gradients of single rows cannot be told apart"):
            recorder.show(0, torch.zeros(7, 16), torch.zeros(7, 2))


# ---- the gradient of a weighted sum --------------------------------------------------------------


@pytest.mark.parametrize("token_budget", [20, 4000])
def test_the_sum_of_losses_has_the_gradient_of_the_plain_loop(token_budget):
    model, data = build_model("gpt2", layers=1), examples(6)
    tokens, w, cost = tokens_of(model, data), np.linspace(-1, 2, 6), Cost()
    gradient, losses = loss_sum_gradient(model, tokens, w, token_budget=token_budget, cost=cost)
    expected = torch.from_numpy(w) @ plain_gradients(model, data)
    assert (gradient - expected).norm() / expected.norm() < 1e-10
    np.testing.assert_allclose(losses, mean_losses(model, tokens), rtol=1e-12)
    assert (cost.gradients, cost.forwards) == (6, 0)
    uncounted, _ = loss_sum_gradient(model, tokens, w, token_budget=token_budget)
    assert torch.equal(uncounted, gradient)


def test_the_sum_over_no_row_is_zero():
    model = build_model("gpt2", layers=1)
    tokens = tokens_of(model, examples(2)).select([])
    gradient, losses = loss_sum_gradient(model, tokens, np.zeros(0), token_budget=20)
    assert gradient.shape == (model.space.size,)
    assert not gradient.any()
    assert losses.shape == (0,)


@pytest.mark.parametrize(
    ("weight", "power"), [(1.0, 1.0), (1.9, 1.0), (2.0, 2.0), (1 / 3000, 2**-12), (0.0, 1.0)]
)
def test_the_power_of_two_near_a_weight_is_at_or_below_it(weight, power):
    assert power_of_two_near(weight) == power
