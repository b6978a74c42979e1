"""Many adapters in one batch against one-example loops with the parameters set one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import influence
from influence.errors import AdapterError
from influence.gradients import stream_gradients
from influence.loss import mean_losses
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, examples, tokens_of
from tests.influence.test_experts import fused
from tests.influence.test_gradients import pairs
from tests.unlearn.difficulty.helpers import plain_loss, weights_of
from unlearn.difficulty.copies import copy_gradients, copy_losses

LORA = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {".*0.*": 3}, "alpha_pattern": {".*1.*": 5}},
    "head": {"target_modules": "HEAD"},
}
#: One row, a group of rows of different lengths, a row that another copy has too, a pair, the same
#: row again.
MEMBERS = [np.array(rows) for rows in ([0], [1, 2, 3], [2], [4, 5], [0])]
PAIRS = pairs(LORA)
F64 = torch.float64


def targets(kind: str, option: str) -> dict:
    lora = dict(LORA[option])
    if option == "head":
        inner = {"gpt2": ["c_attn"], "phi": ["q_proj", "dense"]}.get(kind, ["q_proj", "v_proj"])
        lora["target_modules"] = [*inner, "lm_head"]
    return lora


def oracle(model, thetas, tokens, members) -> tuple[np.ndarray, Tensor]:
    """Every copy's loss [c] and gradient [c, P], its parameters put into the model one by one."""
    model.model.eval()
    leaves = weights_of(model)
    before = [w.detach().clone() for w in leaves]
    losses, gradients = [], []
    for theta, rows in zip(thetas, members, strict=True):
        start = 0
        for w in leaves:
            w.data = theta[start : start + w.numel()].reshape(w.shape).to(w.dtype)
            start += w.numel()
            w.requires_grad_(True)
        loss = torch.stack([plain_loss(model, tokens[int(row)]) for row in rows]).mean()
        gradient = torch.autograd.grad(loss, leaves)
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([g.ravel() for g in gradient]))
    for w, values in zip(leaves, before, strict=True):
        w.data = values
        w.requires_grad_(False)
    return np.array(losses), torch.stack(gradients)


def several(model, count: int, size: float = 0.1, seed: int = 0) -> Tensor:
    """Different parameters [count, P] around the adapter's own."""
    noise = torch.randn(
        count, model.space.size, dtype=F64, generator=torch.Generator().manual_seed(seed)
    )
    return model.snapshot() + (size * noise).to(model.dtype)


@pytest.mark.parametrize(("kind", "option"), PAIRS)
def test_copies_equal_loops_with_their_parameters_set_one_at_a_time(kind, option):
    model = build_model(kind, tie=option != "head", **targets(kind, option))
    tokens = tokens_of(model, examples(7))
    assert len(set(tokens.lengths[:6].tolist())) > 2
    thetas = several(model, len(MEMBERS))
    losses, gradients = oracle(model, thetas, tokens, MEMBERS)
    assert abs(losses[0] - losses[4]) > 1e-3  # the same row under two adapters
    assert gradients.norm(dim=1).min() > 1e-3
    for budget, most in (
        (1, 100),
        (30, 100),
        (1000, 100),
        (1000, 1),
        (1000, 3),
    ):  # 30 and 3 split the group of three
        options = {"token_budget": budget, "max_rows": most}
        copied, slopes = copy_gradients(model, thetas, tokens, MEMBERS, **options)
        assert np.abs(copied - losses).max() < 1e-10, (budget, most)
        assert (slopes - gradients).norm() / gradients.norm() < 1e-10, (budget, most)
        assert (
            np.abs(copy_losses(model, thetas, tokens, MEMBERS, **options) - losses).max() < 1e-10
        ), (budget, most)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "option"), PAIRS)
def test_one_copy_alone_equals_the_loop_too(kind, option):
    model = build_model(kind, tie=option != "head", **targets(kind, option))
    tokens = tokens_of(model, examples(7))
    thetas = several(model, len(MEMBERS))
    losses, gradients = oracle(model, thetas, tokens, MEMBERS)
    for budget in (1, 30, 1000):  # 30 splits the group of three
        options = {"token_budget": budget, "max_rows": 1}
        for i, rows in enumerate(MEMBERS):
            copied, slope = copy_gradients(model, thetas[i : i + 1], tokens, [rows], **options)
            assert abs(copied[0] - losses[i]) < 1e-10, (budget, i)
            assert (slope[0] - gradients[i]).norm() / gradients[i].norm() < 1e-10, (budget, i)
            alone = copy_losses(model, thetas[i : i + 1], tokens, [rows], **options)
            assert abs(alone[0] - losses[i]) < 1e-10, (budget, i)


@pytest.mark.parametrize("count", [1, len(MEMBERS)])
def test_checkpointed_layers_run_again_in_the_backward_and_change_nothing(count):
    model = build_model("llama")
    tokens = tokens_of(model, examples(7))
    thetas = several(model, count)
    losses, gradients = oracle(model, thetas, tokens, MEMBERS[:count])
    base = model.model.get_base_model()
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    layer, ran = base.model.layers[1].mlp, []
    layer.register_forward_pre_hook(lambda *_: ran.append(1))
    options = {"token_budget": 1000, "max_rows": 9}
    copied, slopes = copy_gradients(model, thetas, tokens, MEMBERS[:count], **options)
    assert len(ran) == 2  # one batch, forward and again
    assert np.abs(copied - losses).max() < 1e-10
    assert (slopes - gradients).norm() / gradients.norm() < 1e-10
    copy_losses(model, thetas, tokens, MEMBERS[:count], **options)
    assert len(ran) == 3


def test_one_copy_alone_diverges_to_nan_as_many_do():
    model = build_model("llama")
    tokens = tokens_of(model, examples(7))
    thetas = several(model, 2) * 1e200
    options = {"token_budget": 1000, "max_rows": 9}
    many, _ = copy_gradients(model, thetas, tokens, MEMBERS[:2], **options)
    alone, _ = copy_gradients(model, thetas[:1], tokens, MEMBERS[:1], **options)
    assert np.isnan(
        [*many, *alone, *copy_losses(model, thetas[:1], tokens, MEMBERS[:1], **options)]
    ).all()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_experts_run_one_copy_at_a_time(kind):
    model = fused(kind)
    tokens = tokens_of(model, examples(7))
    thetas = several(model, 2)
    options = {"token_budget": 1000, "max_rows": 9}
    for i, rows in enumerate(MEMBERS[:2]):
        with model.at(thetas[i]):
            weights = np.full(len(rows), 1 / len(rows))
            expected = torch.zeros(model.space.size, dtype=F64)
            for row, weight in zip(rows, weights, strict=True):
                for _, gradient, _ in stream_gradients(model, tokens.select(np.array([row]))):
                    expected += weight * gradient[0] / int(tokens.counts[row])
            wanted = mean_losses(model, tokens.select(rows)).mean()
        copied, slope = copy_gradients(model, thetas[i : i + 1], tokens, [rows], **options)
        assert abs(copied[0] - wanted) < 1e-6  # their routers compute in float32
        assert (slope[0] - expected).norm() / expected.norm() < 1e-6
    with pytest.raises(AdapterError, match="cannot run side by side, only one at a time"):
        copy_losses(model, thetas, tokens, MEMBERS[:2], **options)


def test_a_group_weighs_its_rows_equally_and_not_its_tokens():
    model = build_model("gpt2", layers=1)
    tokens = tokens_of(model, examples(7))
    theta = several(model, 1)
    pair = [int(np.argmin(tokens.counts)), int(np.argmax(tokens.counts))]
    assert tokens.counts[pair[1]] >= 2 * tokens.counts[pair[0]]
    options = {"token_budget": 100, "max_rows": 9}
    each = copy_losses(
        model, theta.repeat(2, 1), tokens, [np.array([row]) for row in pair], **options
    )
    both = copy_losses(model, theta, tokens, [np.array(pair)], **options)
    assert abs(both[0] - each.mean()) < 1e-12
    assert abs(both[0] - each @ tokens.counts[pair] / tokens.counts[pair].sum()) > 1e-3


def state_of(model) -> tuple:
    """All that the outside can see of a model."""
    return (
        model.snapshot().tolist(),
        [m.training for m in model.model.modules()],
        [p.requires_grad for p in model.model.parameters()],
        [p.grad is None for p in model.model.parameters()],
        [vars(m).get("forward") for m in model.model.modules()],
        [len(m._forward_pre_hooks) for m in model.model.modules()],
    )


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(monkeypatch, failing):
    model = build_model("phi")  # with dropout in the base too
    tokens = tokens_of(model, examples(7))
    thetas = several(model, len(MEMBERS))
    expected, _ = oracle(model, thetas, tokens, MEMBERS)
    model.model.train()
    model.model.get_base_model().model.layers[0].eval()
    weights_of(model)[1].requires_grad_(True)
    forward = model.sites[0].A.forward
    model.sites[0].A.forward = forward  # someone had set a forward on the instance
    before, kept = state_of(model), thetas.clone()
    if failing:
        from unlearn.difficulty import copies

        real, calls = copies.token_losses, []

        def fails(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("memory ran out")
            return real(*arguments)

        monkeypatch.setattr(copies, "token_losses", fails)
        with pytest.raises(RuntimeError, match="memory ran out"):
            copy_gradients(model, thetas, tokens, MEMBERS, token_budget=1, max_rows=9)
        with pytest.raises(KeyError), copies.copies(model, thetas, [1] * len(thetas)):
            raise KeyError
    else:
        copied, _ = copy_gradients(model, thetas, tokens, MEMBERS, token_budget=30, max_rows=9)
        assert np.abs(copied - expected).max() < 1e-10  # dropout was off
    assert state_of(model) == before
    assert torch.equal(thetas, kept)
    assert not thetas.requires_grad


def test_losses_alone_keep_no_graph():
    model = build_model("gpt2", layers=1)
    tokens = tokens_of(model, examples(3))
    thetas = several(model, 3).requires_grad_(True)
    seen = []
    handle = model.sites[0].B.register_forward_hook(
        lambda *parts: seen.append(parts[2].requires_grad)
    )
    with torch.enable_grad():
        copy_losses(
            model, thetas, tokens, [np.array([i]) for i in range(3)], token_budget=100, max_rows=9
        )
    handle.remove()
    assert seen == [False]


def test_a_bfloat16_base_takes_float32_copies():
    model = influence.from_peft(add_lora(build_base("llama").to(torch.bfloat16)), build_tokenizer())
    tokens = tokens_of(model, examples(7))
    thetas = several(model, len(MEMBERS))
    losses, gradients = oracle(model, thetas, tokens, MEMBERS)
    copied, slopes = copy_gradients(model, thetas, tokens, MEMBERS, token_budget=100, max_rows=9)
    assert copied.dtype == np.float64
    assert slopes.dtype == thetas.dtype == torch.float32
    assert np.abs(copied / losses - 1).max() < 0.02  # the sums' order alone differs
    assert (slopes - gradients).norm() / gradients.norm() < 0.1


def test_decoders_that_flatten_their_tokens_work_as_they_do_for_influence():
    """OPT hands its feed-forward layers `[b * T, d]`; `influence.gradients` supports that."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import CONFIG_MAPPING

    config = CONFIG_MAPPING["opt"](
        vocab_size=25,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        ffn_dim=20,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=F64)
    model = influence.from_peft(add_lora(base).double(), build_tokenizer())
    assert influence.check_gradients(model, examples(4)).ok
    tokens = tokens_of(model, examples(7))
    thetas = several(model, len(MEMBERS))
    losses, gradients = oracle(model, thetas, tokens, MEMBERS)
    copied, slopes = copy_gradients(model, thetas, tokens, MEMBERS, token_budget=1000, max_rows=9)
    assert np.abs(copied - losses).max() < 1e-10
    assert (slopes - gradients).norm() / gradients.norm() < 1e-10
