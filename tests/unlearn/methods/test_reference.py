"""The adapter before unlearning, held beside the one that moves, and what it leaves alone."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import influence
from influence.adapter import AdaptedModel
from influence.batches import collate
from influence.loss import supervised_logits
from influence.tokens import TokenizedExamples
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, tokens_of
from tests.unlearn.methods.helpers import odd_rows
from unlearn.methods.reference import ReferenceAdapter, frozen


def state(model: AdaptedModel) -> dict[str, Any]:
    """All that must be as it was: names, bits, flags, modes, adapters, random numbers, the
    parameters' identity.
    """
    peft = model.model
    return {
        "keys": list(peft.state_dict()),
        "bits": {key: value.clone() for key, value in peft.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in peft.named_parameters()},
        "modes": {name: module.training for name, module in peft.named_modules()},
        "configurations": {name: config.to_dict() for name, config in peft.peft_config.items()},
        "adapters": (list(peft.peft_config), peft.active_adapter, list(peft.active_adapters)),
        "layers": [
            (list(site.layer.active_adapters), dict(site.layer.scaling)) for site in model.sites
        ],
        "parameters": [id(parameter) for parameter in model.parameters],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before.pop("random"), after.pop("random"))
    bits, bits_after = before.pop("bits"), after.pop("bits")
    assert all(torch.equal(bits[key], bits_after[key]) for key in bits)
    assert before == after


ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4},
    "patterns": {
        "rank_pattern": {"q_proj": 3, "c_attn": 4},
        "alpha_pattern": {"v_proj": 7, "c_attn": 9},
    },
    "some layers": {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*(q_proj|v_proj|c_attn).*"},
    "heavy dropout": {"lora_dropout": 0.9},
    "tied": {"tie": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_held_adapter_is_the_model_before_while_the_other_moves(kind, name):
    """Bit for bit, even with a graph of the moved one alive, whose gradient afterwards is what it
    would have been.
    """
    model = build_model(kind, **ADAPTERS[name])
    tokens, some = tokens_of(model, odd_rows()), np.array([3, 0, 5, 1])
    batch = collate(tokens, some, pad_id=model.pad_id)
    model.model.train()  # so that dropout and modes are at stake
    for parameter in model.parameters[::2]:
        parameter.requires_grad_(False)
    begun = state(model)
    with model.evaluating(model.parameters):
        then = supervised_logits(model, batch).logits.detach()
        theta = model.snapshot()
        with model.at(theta * 1.3):
            now = supervised_logits(model, batch).logits
            plain = torch.autograd.grad(now.double().logsumexp(-1).sum(), model.parameters)
        with frozen(model) as reference:
            assert all(
                parameter.requires_grad for parameter in model.parameters
            )  # of methods that never ask, too
            assert torch.equal(supervised_logits(model, batch).logits, then)
            assert torch.equal(reference.logits(tokens, some)[0], then)
            model.restore(theta * 1.3)
            alive = supervised_logits(model, batch).logits
            logits, true, counts = reference.logits(tokens, some)
            assert torch.equal(logits, then)
            assert not logits.requires_grad
            assert counts == tokens.counts[some].tolist()
            assert (
                true.tolist()
                == np.concatenate(
                    [tokens[i].input_ids[tokens[i].supervised] for i in some]
                ).tolist()
            )
            wanted = torch.nn.functional.cross_entropy(
                then if then.dtype == torch.float64 else then.float(), true, reduction="none"
            )
            assert torch.equal(torch.cat(reference.losses(tokens, some, true)), wanted)
            assert torch.equal(alive, now)
            assert all(parameter.requires_grad for parameter in model.parameters)
            moved = torch.autograd.grad(alive.double().logsumexp(-1).sum(), model.parameters)
            assert all(torch.equal(a, b) for a, b in zip(moved, plain, strict=True))
            assert torch.equal(supervised_logits(model, batch).logits, now)
            assert reference.rows_run == 3 * len(some)
            model.restore(theta)
    assert_same(begun, state(model))


def fail_inside(model: AdaptedModel, tokens: TokenizedExamples, while_asked: bool) -> None:
    with model.evaluating(model.parameters), frozen(model) as reference:
        reference.logits(tokens, np.arange(2))
        if while_asked:
            with reference._active():
                raise RuntimeError("stop")
        raise RuntimeError("stop")


def test_the_model_is_as_before_after_an_exception():
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, odd_rows())
    begun = state(model)
    for while_asked in (False, True):
        with pytest.raises(RuntimeError, match="stop"):
            fail_inside(model, tokens, while_asked)
        assert_same(dict(begun), state(model))
    with model.evaluating(model.parameters), frozen(model) as reference:  # and can be held again
        assert reference.rows_run == 0


def test_a_failed_question_leaves_the_trained_adapter_active(monkeypatch):
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, odd_rows())
    with model.evaluating(model.parameters), frozen(model) as reference:
        now = supervised_logits(model, collate(tokens, np.arange(2), pad_id=0)).logits.detach()
        monkeypatch.setattr("unlearn.methods.reference.supervised_logits", _stop)
        with pytest.raises(RuntimeError, match="stop"):
            reference.logits(tokens, np.arange(2))
        with model.at(model.snapshot() * 2):
            later = supervised_logits(model, collate(tokens, np.arange(2), pad_id=0)).logits
        assert not torch.equal(later, now)
        assert later.requires_grad


def _stop(*_: Any) -> Any:
    raise RuntimeError("stop")


def test_an_adapter_beside_others_is_held_alone():
    """A model with a second adapter that is not active: it is neither asked nor changed."""
    from peft import LoraConfig

    base = build_base("llama", layers=1)
    peft = add_lora(base, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.add_adapter(
            "second", LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
    for name, parameter in peft.named_parameters():
        if ".second." in name:
            torch.nn.init.normal_(parameter)
    peft.set_adapter("default")
    model = influence.from_peft(peft.double(), build_tokenizer())
    tokens = tokens_of(model, odd_rows())
    begun = state(model)
    with model.evaluating(model.parameters):
        then = supervised_logits(model, collate(tokens, np.arange(3), pad_id=0)).logits.detach()
        with frozen(model) as reference, model.at(model.snapshot() * 2):
            assert torch.equal(reference.logits(tokens, np.arange(3))[0], then)
    assert_same(begun, state(model))


def test_a_scaling_that_was_set_by_hand_is_held_too():
    """PEFT's `set_scale` and its kin change the layer, not the configuration.

    Sites and digests read the layer.
    """
    model = build_model("llama", layers=1)
    for site in model.sites:
        site.layer.scaling["default"] *= 2
    tokens = tokens_of(model, odd_rows())
    with model.evaluating(model.parameters):
        then = supervised_logits(model, collate(tokens, np.arange(3), pad_id=0)).logits.detach()
        with frozen(model) as reference:
            assert torch.equal(reference.logits(tokens, np.arange(3))[0], then)


def test_a_reference_counts_in_rows(small):
    with small.evaluating(small.parameters), frozen(small) as reference:
        assert isinstance(reference, ReferenceAdapter)
        reference.logits(tokens_of(small, odd_rows()), np.array([0, 0, 3]))
        assert reference.rows_run == 3
