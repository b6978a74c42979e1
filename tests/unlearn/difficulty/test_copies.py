"""Many adapters in one batch against one-example loops with the parameters set one at a time; their ascent against torch.optim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import influence
from influence.errors import InputError
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, examples, tokens_of
from unlearn.difficulty.ascent import Climb
from unlearn.difficulty.copies import copy_gradients, copy_losses
from unlearn.difficulty.protocol import Protocol

ARCHITECTURES = ["llama", "qwen2", "gpt2", "mistral", "gemma", "phi"]
LORA = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {".*0.*": 3}, "alpha_pattern": {".*1.*": 5}},
    "head": {"target_modules": "HEAD"},
}
#: One row, a group of rows of different lengths, a row that another copy has too, a pair, the same row again.
MEMBERS = [np.array(rows) for rows in ([0], [1, 2, 3], [2], [4, 5], [0])]
F64 = torch.float64


def targets(kind: str, option: str) -> dict:
    lora = dict(LORA[option])
    if option == "head":
        inner = {"gpt2": ["c_attn"], "phi": ["q_proj", "dense"]}.get(kind, ["q_proj", "v_proj"])
        lora["target_modules"] = [*inner, "lm_head"]
    return lora


def weights_of(model) -> list[Tensor]:
    """The LoRA matrices as PEFT holds them, site after site, A before B."""
    return [
        w
        for s in model.sites
        for w in (s.layer.lora_A["default"].weight, s.layer.lora_B["default"].weight)
    ]


def plain_loss(model, item) -> Tensor:
    """Mean loss of one example, alone, through the whole PEFT model with all logits."""
    ids = torch.from_numpy(item.input_ids)[None]
    logp = model.model(input_ids=ids).logits[0].log_softmax(-1)
    own = [t for t in range(1, ids.shape[1]) if item.supervised[t]]
    return -sum(logp[t - 1, ids[0, t]] for t in own) / len(own)


def oracle(model, thetas, tokens, members) -> tuple[np.ndarray, Tensor]:
    """Every copy's loss [c] and gradient [c, P], its parameters put into the model, example by example."""
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
        found = torch.autograd.grad(loss, leaves)
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([g.ravel() for g in found]))
    for w, own in zip(leaves, before, strict=True):
        w.data = own
        w.requires_grad_(False)
    return np.array(losses), torch.stack(gradients)


def several(model, count: int, size: float = 0.1, seed: int = 0) -> Tensor:
    """Different parameters [count, P] around the adapter's own."""
    noise = torch.randn(
        count, model.space.size, dtype=F64, generator=torch.Generator().manual_seed(seed)
    )
    return model.snapshot() + (size * noise).to(model.dtype)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("option", LORA)
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
        found, slopes = copy_gradients(model, thetas, tokens, MEMBERS, **options)
        assert np.abs(found - losses).max() < 1e-10, (budget, most)
        assert (slopes - gradients).norm() / gradients.norm() < 1e-10, (budget, most)
        assert (
            np.abs(copy_losses(model, thetas, tokens, MEMBERS, **options) - losses).max() < 1e-10
        ), (budget, most)


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
    own = model.sites[0].A.forward
    model.sites[0].A.forward = own  # someone had set a forward on the instance
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
        found, _ = copy_gradients(model, thetas, tokens, MEMBERS, token_budget=30, max_rows=9)
        assert np.abs(found - expected).max() < 1e-10  # dropout was off
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
    found, slopes = copy_gradients(model, thetas, tokens, MEMBERS, token_budget=100, max_rows=9)
    assert found.dtype == np.float64
    assert slopes.dtype == thetas.dtype == torch.float32
    assert np.abs(found / losses - 1).max() < 0.02  # the sums' order alone differs
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
    found, slopes = copy_gradients(model, thetas, tokens, MEMBERS, token_budget=1000, max_rows=9)
    assert np.abs(found - losses).max() < 1e-10
    assert (slopes - gradients).norm() / gradients.norm() < 1e-10


# ---- the ascent ----------------------------------------------------------------------------------------------


class Plain:
    """One adapter and torch's own optimizer."""

    def __init__(self, theta: Tensor, optimizer: str, lr: float) -> None:
        self.theta = theta.clone().requires_grad_(True)
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
        self.optimizer = kind([self.theta], lr=lr, maximize=True)

    def step(self, gradient: Tensor) -> None:
        self.theta.grad = gradient.clone()
        self.optimizer.step()


def slopes(seed: int, *shape: int) -> Tensor:
    """Gradients of very different sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(*shape, dtype=F64, generator=generator) * 10.0 ** torch.randint(
        -9, 3, shape[-1:], generator=generator
    )
    found[..., 0] = 0
    return found


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_climb_is_torch_optim_step_by_step(optimizer):
    """Steps of all copies, of some only, a copy that goes another way, and copies that are left behind."""
    start, lr = slopes(1, 12), 0.03
    climb = Climb(start, 5, Protocol(optimizer, lr))
    plain = [Plain(start, optimizer, lr) for _ in range(5)]

    def same(found: Climb, expected: list[Plain], taken: list[int]) -> None:
        for theta, own in zip(found.theta, expected, strict=True):
            torch.testing.assert_close(theta, own.theta.detach(), rtol=1e-12, atol=1e-15)
        assert found.taken.tolist() == taken

    for number in range(4):
        gradient = slopes(10 + number, 5, 12)
        climb.step(gradient)
        for own, g in zip(plain, gradient, strict=True):
            own.step(g)
    same(climb, plain, [4] * 5)
    for number in range(3):
        gradient = slopes(20 + number, 2, 12)
        climb.step(gradient, np.array([3, 1]))
        for own, g in zip((plain[3], plain[1]), gradient, strict=True):
            own.step(g)
    same(climb, plain, [4, 7, 4, 7, 4])
    climb.keep(np.array([0, 1, 3]))
    plain = [plain[0], plain[1], plain[3]]
    same(climb, plain, [4, 7, 7])
    for number in range(3):
        gradient = slopes(40 + number, 3, 12)
        climb.step(gradient)
        for own, g in zip(plain, gradient, strict=True):
            own.step(g)
    same(climb, plain, [7, 10, 10])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_first_rate_is_what_a_first_step_gains_to_first_order(optimizer):
    gradient = slopes(5, 3, 12).clamp(min=-50, max=50)
    gradient[gradient.abs() < 1e-4] = 0  # Adam's epsilon is far below the rest
    climb = Climb(slopes(1, 12), 3, Protocol(optimizer, 1e-3))
    rate, before = climb.first_rate(gradient), climb.theta.clone()
    climb.step(gradient)
    np.testing.assert_allclose(rate, ((climb.theta - before) * gradient).sum(1).numpy(), rtol=1e-3)


def test_float32_steps_are_those_of_torch_optim():
    """The bias corrections, of numbers near 1, cost float32 a few digits: 1 - 0.999 is off by 1.3e-5 of itself, its root by half."""
    start = torch.zeros(12)
    climb, plain = Climb(start, 1, Protocol("adam", 1.0)), Plain(start, "adam", 1.0)
    gradient = slopes(2, 1, 12).float()
    climb.step(gradient)
    plain.step(gradient[0])
    assert (climb.theta[0] - plain.theta.detach()).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"optimizer": "adamw"}, "optimizer 'adamw' was given; expected adam or sgd"),
        ({"lr": 0.0}, "lr 0.0 was given; expected a number above 0"),
        ({"lr": float("nan")}, "lr nan was given"),
        ({"lr": float("inf")}, "lr inf was given"),
        ({"target": "zero"}, "target 'zero' was given; expected base or unseen"),
        ({"steps": 0}, "steps 0 was given; expected a whole number of at least 1"),
        ({"steps": True}, "steps True was given"),
        ({"steps": 2.0}, "steps 2.0 was given"),
    ],
)
def test_wrong_protocols_are_refused(given, sentence):
    with pytest.raises(InputError, match=sentence.replace(".", r"\.")):
        Protocol(**given)


def test_the_record_says_the_rate_that_is_used():
    assert Protocol().record() == {"optimizer": "adam", "lr": 1e-4, "target": "base", "steps": 200}
    assert Protocol("sgd").record()["lr"] == 5e-3
    assert Protocol("sgd", 0.5, "unseen", 7).record() == {
        "optimizer": "sgd",
        "lr": 0.5,
        "target": "unseen",
        "steps": 7,
    }
