"""LoRA on experts: gradients of single rows against plain autograd, and what is made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import influence
from influence.batches import collate
from influence.cost import Cost
from influence.curvature.ggn import ggn_products
from influence.curvature.objective import Objective
from influence.errors import AdapterError, InputError
from influence.experts import delta_weight, outermost, refusal, wrappers
from influence.gradients import loss_sum_gradient, output_gradient, stream_gradients, tape
from influence.loss import mean_losses
from influence.precision import compute_in, compute_type, computing_in
from tests.conftest import (
    WORDS,
    add_lora,
    build_base,
    build_tokenizer,
    examples,
    fit_end,
    tokens_of,
)
from tests.oracles import differentiable, plain_log_probs, plain_loss
from tests.watching import HostReads

pytestmark = pytest.mark.usefixtures("credit_when_asked_for")

FUSED = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def build_moe(kind: str, *, dtype=torch.float64, layers: int = 2, experts: int = 4):
    """A causal language model with routed experts, of weights that nothing is near linear in."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import CONFIG_MAPPING

    common = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
    }
    common |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    special = {
        "mixtral": {"num_local_experts": experts},
        "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "qwen3_moe": {"moe_intermediate_size": 16, "head_dim": 4},
        "gpt_oss": {
            "num_local_experts": experts,
            "head_dim": 4,
            "layer_types": ["sliding_attention", "full_attention"][:layers],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }[kind]
    if kind.startswith("qwen"):
        special["num_experts"] = experts
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[kind](**(common | special)), dtype=dtype
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.3 * noise + (parameter.dim() == 1))
    return model.eval()


def fused(kind: str = "mixtral", *, dtype=torch.float64, parameters=BOTH, **options):
    model = add_lora(
        build_moe(kind, dtype=dtype, **options),
        target_modules=["q_proj"],
        target_parameters=parameters,
        lora_dropout=0.0,
    )
    return influence.from_peft(
        model.to(dtype) if dtype == torch.float64 else model, build_tokenizer()
    )


class Expert(nn.Module):
    """One expert as a module of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, 12, bias=False), nn.Linear(12, width, bias=False)

    def forward(self, x):
        return self.w2(torch.tanh(self.w1(x)))


class Routed(nn.Module):
    """A block of such experts, called on the tokens that are sent to each, as older models do."""

    def __init__(self, width: int, count: int, name: str) -> None:
        super().__init__()
        self.name, self.gate = name, nn.Linear(width, count, bias=False)
        setattr(self, name, nn.ModuleList(Expert(width) for _ in range(count)))

    def forward(self, hidden):
        x = hidden.flatten(0, 1)
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(getattr(self, self.name)):
            # slot by slot, so that tokens come in another order than the batch's
            slots, places = torch.where((chosen == number).T)
            if len(places):
                out = out.index_add(0, places, expert(x[places]) * weights[places, slots, None])
        return out.unflatten(0, hidden.shape[:2])


def listed(*, name: str = "experts", count: int = 4, dtype=torch.float64, checkpointing=False):
    base = build_base("llama", dtype=dtype)
    torch.manual_seed(3)
    for layer in base.model.layers:
        layer.mlp = Routed(16, count, name).to(dtype)
    model = add_lora(base, target_modules=["q_proj", "w1", "w2"], lora_dropout=0.0).to(dtype)
    if checkpointing:
        base.gradient_checkpointing_enable()
    return influence.from_peft(model, build_tokenizer())


def streamed(model, data, **options) -> torch.Tensor:
    tokens = tokens_of(model, data)
    out = torch.full((len(tokens), model.space.size), torch.nan, dtype=model.dtype)
    for positions, gradients, _ in stream_gradients(model, tokens, **options):
        out[torch.from_numpy(positions)] = gradients
    return out


def plain_gradients(model, data) -> torch.Tensor:
    """Gradients `[n, P]` of the summed losses, one row after the other, by plain autograd."""
    rows = []
    with differentiable(model):
        for item in tokens_of(model, data):
            loss = plain_loss(*plain_log_probs(model, item))
            # an expert that no token is sent to has no gradient
            grads = torch.autograd.grad(loss, model.parameters, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def each_leaf_agrees(model, found, expected, tolerance=1e-10):
    for leaf in model.space.leaves:
        scale = expected[:, leaf.slice].norm()
        assert scale > 1e-6, leaf.name
        assert (found - expected)[:, leaf.slice].norm() / scale < tolerance, leaf.name


# ---- fused experts -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "first", "second"])
def test_gradients_of_fused_experts_are_those_of_the_loop(kind, parameters):
    model = fused(kind, parameters=parameters)
    assert [site.parameter for site in model.sites].count("") == 2  # the queries'
    expected = plain_gradients(model, examples(6))
    for options in ({"token_budget": 1}, {"token_budget": 60}, {"padding": "left"}):
        each_leaf_agrees(model, streamed(model, examples(6), **options), expected)
    assert all("forward" not in vars(layer) for layer in outermost(model.model))


def test_slots_of_padding_are_not_valid():
    """Inputs of K-FAC's moments are cut to valid tokens, of which each has k slots in a row."""
    model = fused(layers=1)
    tokens, seen = tokens_of(model, examples(4)), {}
    with tape(model) as recorder:
        part = recorder.forward(collate(tokens, np.arange(4)))
        recorder.backward(
            part.logits,
            torch.ones_like(part.logits),
            lambda leaf, x, g, valid: seen.update({model.space.leaves[leaf].name: (x, g, valid)}),
        )
        real = recorder.valid
    assert not real.all()
    x, g, valid = seen["model.layers.0.mlp.experts.base_layer.lora_A"]
    assert torch.equal(valid[:, ::2], real)
    assert torch.equal(valid[:, 1::2], real)
    assert torch.equal(x[:, ::2], x[:, 1::2])  # a token's two slots have the token's input
    assert not g[~valid].any()
    assert (g != 0).sum(-1).max() <= 2  # of the 8 coordinates those of the slot's expert


def test_another_batch_may_run_while_the_tape_is_in():
    """As an edit's goals do, between a batch's forward and its backward."""
    model = fused(layers=1)
    tokens, others = tokens_of(model, examples(4)), tokens_of(model, examples(3, seed=5))
    expected, losses = streamed(model, examples(4)), mean_losses(model, others)
    with tape(model) as recorder:
        part = recorder.forward(collate(tokens, np.arange(4)))
        np.testing.assert_allclose(mean_losses(model, others), losses, rtol=1e-12)
        found = recorder.gradients(part, output_gradient(part, None)[1])
    assert (found - expected).norm() / expected.norm() < 1e-10


def test_checkpointed_fused_experts_give_the_same():
    model = fused()
    expected = plain_gradients(model, examples(5))
    model.model.get_base_model().gradient_checkpointing_enable()
    each_leaf_agrees(model, streamed(model, examples(5)), expected)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_sum_that_peft_forms_is_ours(kind):
    model = fused(kind)
    (outer, *_) = outermost(model.model)
    _, found = wrappers(outer)
    assert set(found) == {"gate_up_proj", "down_proj"}
    for layer in found.values():
        expected = layer.get_delta_weight("default")
        assert torch.allclose(delta_weight(layer, "default", torch.float64), expected, atol=1e-14)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_fused_experts_in_sixteen_bits_compute_in_float32(kind):
    model = fused(kind, dtype=torch.bfloat16)
    exact = fused(kind)
    for mine, other in zip(exact.model.parameters(), model.model.parameters(), strict=True):
        mine.data.copy_(other.data)
    expected = plain_gradients(exact, examples(4))
    with computing_in(model, torch.float32):
        each_leaf_agrees(model, streamed(model, examples(4)), expected, 1e-4)
    compute_in(model.model.get_base_model(), torch.float32)
    assert compute_type(model) == torch.float32
    result = influence.check_gradients(model, examples(4))
    assert result.ok, str(result)
    assert result.precision < 1e-4  # the plain forward computes so too


def test_a_backward_through_frozen_fused_experts_is_through_the_adapter_too():
    """What is kept for it of a sum W + s B A is the sum, whether or not A and B are trained."""

    def input_gradient(model):
        base = model.model.get_base_model()
        with model.evaluating(), torch.enable_grad():
            inputs = base.get_input_embeddings()(torch.tensor([[3, 4, 5, 6]])).double()
            inputs = inputs.detach().requires_grad_(True)
            out = base(inputs_embeds=inputs).logits.logsumexp(-1).sum()
            return torch.autograd.grad(out, inputs)[0]

    exact, held = fused(layers=1), fused(layers=1)
    held.model.get_base_model().float()
    for mine, other in zip(exact.model.parameters(), held.model.parameters(), strict=True):
        mine.data.copy_(other.data)
    compute_in(held.model.get_base_model(), torch.float64)
    expected = input_gradient(exact)
    assert (input_gradient(held) - expected).norm() / expected.norm() < 1e-6


def test_a_batch_waits_for_the_device_no_oftener_with_more_experts():
    def reads(experts: int) -> int:
        model = fused(experts=experts)
        tokens = tokens_of(model, examples(4))
        batch = collate(tokens, np.arange(4), pad_id=model.pad_id)
        with tape(model) as recorder:
            recorder.run(batch, None)
            with HostReads() as found:
                recorder.run(batch, None)
        return found.count

    assert reads(8) == reads(4) > 0


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "fisher", "identity"])
def test_runs_of_fused_experts_score(curvature, tmp_path):
    from influence.curvature import SPECIFICATIONS

    model = fused(layers=1)
    run = fit_end(
        model, examples(5), directory=tmp_path / "run", curvature=SPECIFICATIONS[curvature]()
    )
    scores = run.score(examples(2, seed=1), per_token=True, out=tmp_path / "s.h5")
    assert np.isfinite(scores.values).all()
    if curvature == "identity":
        queries = plain_gradients(model, examples(2, seed=1))
        products = queries @ plain_gradients(model, examples(5)).T
        tokens = tokens_of(model, examples(2, seed=1)).counts
        expected = products.numpy() * run.weights / tokens[:, None]
        np.testing.assert_allclose(scores.values, expected, rtol=1e-5)
    per_row = [[scores.tokens.row(q, i)[1].sum() for i in range(5)] for q in range(2)]
    np.testing.assert_allclose(per_row, scores.values, rtol=1e-4)


def test_products_of_fused_experts_are_those_of_the_dense_matrix():
    model = fused(layers=1, experts=2, parameters=BOTH[1:])
    tokens, weights = tokens_of(model, examples(2)), np.array([0.3, 0.7])
    objective = Objective(model, tokens, weights, torch.ones(len(model.space.leaves)))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, model.space.size, dtype=torch.float64, generator=generator)
    dense = torch.zeros(model.space.size, model.space.size, dtype=torch.float64)
    with differentiable(model):
        for item, weight in zip(tokens, weights, strict=True):
            for log_p in plain_log_probs(model, item)[0]:
                rows = [
                    torch.autograd.grad(each, model.parameters, retain_graph=True) for each in log_p
                ]
                J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
                # at log-probabilities, whose gradients average to 0, the GGN is diagonal
                dense += weight * J.T @ (log_p.detach().exp()[:, None] * J)
    expected = v @ dense
    found = objective.product(v, ggn_products)
    assert (found - expected).norm() / expected.norm() < 1e-6  # the router is a float32 softmax


def test_what_fused_experts_cannot_have_is_refused_before_work(tmp_path):
    model = fused(layers=1)
    with pytest.raises(InputError, match="geometry function was given, and this adapter has fused"):
        influence.fit(model, examples(3), directory=tmp_path / "run", geometry="function")
    assert not (tmp_path / "run").exists()
    from unlearn.difficulty.copies import copies

    refused = pytest.raises(AdapterError, match="copies of such an adapter cannot run side by side")
    with refused, copies(model, model.snapshot()[None], [1]):
        pass


def test_other_bare_parameters_are_refused():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        target_modules=[], target_parameters=["q_proj.weight"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(build_base("llama"), config)
    with pytest.raises(AdapterError, match="LoRA on the bare parameter weight of Linear is not"):
        influence.from_peft(model, build_tokenizer())
    assert refusal(outermost(fused(layers=1).model)[0]) is None


def test_an_adapter_of_fused_experts_is_loaded_and_told_from_a_foreign_one(tmp_path):
    model = fused(layers=1, dtype=torch.float32)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.model.save_pretrained(adapter)
    build_moe("mixtral", dtype=torch.float32, layers=1).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    loaded = influence.load(base, adapter, device="cpu")
    assert loaded.adapter_digest == model.adapter_digest
    assert torch.allclose(
        streamed(loaded, examples(3)), streamed(model, examples(3)), rtol=1e-4, atol=1e-4
    )
    build_moe("mixtral", dtype=torch.float32, layers=1, experts=3).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(AdapterError, match="was not made for base"):
        influence.load(tmp_path / "other", adapter, device="cpu")


# ---- experts that are modules of their own -------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "count"), [("experts", 4), ("experts", 2), ("branches", 4), ("branches", 2)]
)
def test_gradients_of_listed_experts_are_those_of_the_loop(name, count, checkpointing, capsys):
    """With two experts of two each sees as many tokens as the batch has, in another order."""
    model = listed(name=name, count=count, checkpointing=checkpointing)
    expected = plain_gradients(model, examples(6))
    for options in ({"token_budget": 1}, {"token_budget": 60}, {"padding": "left"}):
        found = streamed(model, examples(6), **options)
        assert (found - expected).norm() / expected.norm() < 1e-10
    told = "rows run one by one from here on" in capsys.readouterr().err
    assert told == (name == "branches")


def test_the_weighted_sum_over_listed_experts_is_that_of_the_loop():
    model, weights, cost = listed(), np.linspace(-1, 2, 5), Cost()
    found, _ = loss_sum_gradient(
        model, tokens_of(model, examples(5)), weights, token_budget=40, cost=cost
    )
    expected = torch.from_numpy(weights) @ plain_gradients(model, examples(5))
    # Llama's normalisation is in float32 inside, and rounds other weights otherwise
    assert (found - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("count", [2, 4])
def test_experts_of_another_name_have_no_scores_per_token(count, tmp_path):
    """Also where it is scoring that finds out, on a model that nothing has run on before."""
    run = fit_end(listed(name="branches", count=count), examples(5), directory=tmp_path / "run")
    run.model.in_order.clear()
    with pytest.raises(AdapterError, match="experts that see tokens without their places"):
        run.score(examples(2, seed=1), per_token=True, out=tmp_path / "s.h5")


class Flat(nn.Module):
    """A block that sees tokens flat and in order, as some decoders' do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden):
        return self.block(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def test_flat_tokens_in_order_run_together_and_are_asked_for_once(monkeypatch, capsys):
    base = build_base("llama", dtype=torch.float64)
    for layer in base.model.layers:
        layer.mlp = Flat(Expert(16).double())
    model = influence.from_peft(
        add_lora(base, target_modules=["w1", "w2"], lora_dropout=0.0).double(), build_tokenizer()
    )
    found = streamed(model, examples(6), token_budget=60)
    expected = plain_gradients(model, examples(6))
    assert (found - expected).norm() / expected.norm() < 1e-10
    assert model.in_order == dict.fromkeys(range(len(model.space.leaves)), True)
    monkeypatch.setattr("influence.gradients.tokens_in_order", None)
    assert torch.equal(streamed(model, examples(6), token_budget=60), found)
    assert "one by one" not in capsys.readouterr().err


@pytest.mark.parametrize("curvature", ["ekfac", "fisher"])
def test_runs_of_listed_experts_score(curvature, tmp_path):
    from influence.curvature import SPECIFICATIONS

    run = fit_end(
        listed(), examples(5), directory=tmp_path / "run", curvature=SPECIFICATIONS[curvature]()
    )
    scores = run.score(examples(2, seed=1))
    assert np.isfinite(scores.values).all()
    if curvature == "fisher":
        with pytest.raises(AdapterError, match="experts that see tokens without their places"):
            run.score(examples(2, seed=1), per_token=True, out=tmp_path / "s.h5")
