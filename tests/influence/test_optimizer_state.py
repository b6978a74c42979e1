"""Adam's second moments in Trainer checkpoints, and everything that is refused."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from influence.errors import AdapterError, InputError, NumericalError
from influence.loading import from_peft
from influence.optimizer_state import (
    MOMENTS,
    live_second_moments,
    second_moments,
    write_second_moments,
)
from tests.conftest import add_lora, build_base, build_model, build_tokenizer
from tests.influence.toy_training import train, trainer_groups, write

FEW = {"layers": 1, "target_modules": ["q_proj", "down_proj"]}


def shapes(model):
    return [leaf.shape for leaf in model.space.leaves]


def adam_by_hand(history, beta2: float):
    """Bias-corrected second moments of a sequence of gradients: a weighted mean with weights
    beta2^(t-k).
    """
    weights = [beta2 ** (len(history) - 1 - k) for k in range(len(history))]
    return sum(w * g.double().square() for w, g in zip(weights, history, strict=True)) / sum(
        weights
    )


def test_second_moments_of_adamw(tmp_path):
    model = build_model("llama", r=3)
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3, betas=(0.8, 0.9))
    history = train(model, optimizer)
    log = {
        "global_step": 4,
        "log_history": [{"step": 1, "learning_rate": 0.4}, {"step": 3, "learning_rate": 0.2}],
    }
    log["log_history"].append({"step": 4, "eval_loss": 1.0})
    state = second_moments(write(tmp_path / "c", model, optimizer, log), model)
    torch.testing.assert_close(state.v, adam_by_hand(history, 0.9), rtol=1e-12, atol=0)
    assert state.steps == 3
    assert state.sum_lr == pytest.approx(0.4 + 0.3 + 0.2 + 0.2)
    (tmp_path / "c" / "trainer_state.json").unlink()
    assert second_moments(tmp_path / "c", model).sum_lr is None


def test_recorded_names_are_followed(tmp_path):
    model = build_model("llama", **FEW)
    named = [(name, p) for name, p in model.model.named_parameters() if "lora_" in name][::-1]
    optimizer = torch.optim.AdamW(named, lr=1e-3)
    assert "param_names" in optimizer.state_dict()["param_groups"][0]
    history = train(model, optimizer)
    state = second_moments(write(tmp_path / "c", model, optimizer), model)
    torch.testing.assert_close(state.v, adam_by_hand(history, 0.999), rtol=1e-12, atol=0)


def test_a_layer_that_looks_like_a_norm_is_in_the_second_group(tmp_path):
    """Its name holds `bias`, so the Trainer puts its LoRA matrices into the group without weight
    decay.
    """
    base = build_base_with_bias_layer()
    model = from_peft(
        add_lora(base, target_modules=["q_bias_proj", "v_proj"]).double(), build_tokenizer()
    )
    named = [(name, p) for name, p in model.model.named_parameters() if "lora_" in name]
    groups = [[p for name, p in named if ("bias" in name) == flag] for flag in (False, True)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-3)
    history = train(model, optimizer)
    state = second_moments(write(tmp_path / "c", model, optimizer), model)
    torch.testing.assert_close(state.v, adam_by_hand(history, 0.999), rtol=1e-12, atol=0)


def build_base_with_bias_layer():
    base = build_base("llama", layers=1)
    attention = base.model.layers[0].self_attn
    # registered in place of q_proj's name, in front of v_proj, with an alias that forward finds
    project = attention.q_proj
    del attention._modules["q_proj"]
    rest = dict(attention._modules)
    attention._modules.clear()
    attention._modules["q_bias_proj"] = project
    attention._modules.update(rest)
    type_ = type(
        "Attention",
        (type(attention),),
        {"q_proj": property(lambda self: self._modules["q_bias_proj"])},
    )
    attention.__class__ = type_
    return base


def test_lora_plus_of_peft_is_understood(tmp_path, capsys):
    """Its groups hold all A, then all B, at rates of their own; a layer with `bias` in its name last."""
    from peft.optimizers import create_loraplus_optimizer

    base = build_base_with_bias_layer()
    wrapped = add_lora(base, target_modules=["q_bias_proj", "v_proj"]).double()
    model = from_peft(wrapped, build_tokenizer())
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    optimizer = create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, betas=(0.8, 0.9)
    )
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 1, 1]
    history = train(model, optimizer)
    state = second_moments(write(tmp_path / "c", model, optimizer), model)
    torch.testing.assert_close(state.v, adam_by_hand(history, 0.9), rtol=1e-12, atol=0)
    assert "A and B at different learning rates (LoRA+)" in capsys.readouterr().err


def test_moments_of_a_live_optimizer_are_written_and_read(tmp_path):
    model = build_model("llama", **FEW)
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    named = dict(model.model.named_parameters())
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3, betas=(0.8, 0.9))
    assert live_second_moments(optimizer, model.model) == {}  # before its first step
    history = train(model, optimizer)
    folder = write(tmp_path / "c", model, optimizer, {"global_step": 3, "log_history": []})
    (folder / "optimizer.pt").unlink()
    moments = live_second_moments(optimizer, model.model)
    assert len(moments) == len([name for name in named if "lora_" in name])
    write_second_moments(folder / MOMENTS, moments)
    state = second_moments(folder, model)
    torch.testing.assert_close(state.v, adam_by_hand(history, 0.9), rtol=1e-12, atol=0)
    assert (state.steps, state.sum_lr) == (3, None)
    assert live_second_moments(torch.optim.SGD(model.parameters, lr=0.1), model.model) == {}
    first, *rest = moments
    write_second_moments(folder / MOMENTS, {name: moments[name] for name in rest})
    with pytest.raises(AdapterError, match="holds no second moments of exactly this adapter's"):
        second_moments(folder, model)
    bad = {name: (moment.clone(), step) for name, (moment, step) in moments.items()}
    bad[first][0][0, 0] = float("nan")
    write_second_moments(folder / MOMENTS, bad)
    with pytest.raises(NumericalError, match="NaN, infinity or negative"):
        second_moments(folder, model)
    (folder / MOMENTS).write_bytes(b"damaged")
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        second_moments(folder, model)


@pytest.mark.parametrize("wrapped", [True, False])
def test_second_moments_in_eight_bits(tmp_path, wrapped):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = build_model("llama", dtype=torch.float32, r=2, **FEW)
    optimizer = bitsandbytes.optim.AdamW8bit(trainer_groups(model), lr=1e-3, min_8bit_size=8)
    history = train(model, optimizer)
    folder = write(tmp_path / "c", model, optimizer)
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    if not wrapped:  # as versions before the wrapping wrote the same tensors
        content["state"] = {
            n: s.pop("__bnb_optimizer_quant_state__", {}) | s for n, s in content["state"].items()
        }
        torch.save(content, folder / "optimizer.pt")
    moments, expected = second_moments(folder, model).v, adam_by_hand(history, 0.999).float()
    assert (moments - expected).norm() / expected.norm() < 0.05  # 8 bits
    assert not torch.equal(moments, expected)
    for state in content["state"].values():
        state.get("__bnb_optimizer_quant_state__", state).pop("absmax2")
    torch.save(content, folder / "optimizer.pt")
    with pytest.raises(AdapterError, match="8-bit second moment without its table and scales"):
        second_moments(folder, model)


def test_blocks_of_eight_bit_states(tmp_path):
    """A hand-made state of more than one block: v = qmap[code] * absmax[position // 256]."""
    model = build_model("llama", r=20, **FEW)
    generator, states, expected = torch.Generator().manual_seed(2), {}, []
    names = [name for name, _ in model.model.named_parameters() if "lora_" in name]
    for number, shape in enumerate(shapes(model)):
        size = shape[0] * shape[1]
        assert size > 256
        code = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
        table, scale = torch.linspace(0, 1, 256), torch.rand(-(-size // 256), generator=generator)
        states[number] = {
            "step": 2,
            "state1": code.view(shape),
            "state2": code.view(shape),
            "qmap2": table,
        }
        states[number]["absmax2"] = scale
        values = [
            float(table[int(c)] * scale[i // 256]) / (1 - 0.99**2) for i, c in enumerate(code)
        ]
        expected += values
    group = {"betas": (0.9, 0.99), "weight_decay": 0.0, "params": list(range(len(names)))}
    folder = write(tmp_path / "c", model, {"state": states, "param_groups": [group]})
    torch.testing.assert_close(
        second_moments(folder, model).v, torch.tensor(expected), rtol=1e-5, atol=0
    )
    states[0]["absmax2"] = torch.ones(7)
    torch.save({"state": states, "param_groups": [group]}, folder / "optimizer.pt")
    with pytest.raises(AdapterError, match="with 7 scales"):
        second_moments(folder, model)


def test_a_real_trainer_writes_what_is_read(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = build_model("llama", dtype=torch.float32, lora_dropout=0.0, **FEW)
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    ids = torch.randint(3, 25, (6, 5), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        adam_beta2=0.95,
        logging_steps=1,
    )
    for name, value in {
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }.items():
        setattr(options, name, value)
    history = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure=None):
            history.append(model.space.flatten([p.grad.clone() for p in model.parameters]))
            return super().step(closure)

    class Recording(Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return Recorded, Trainer.get_optimizer_cls_and_kwargs(args, model)[1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Recording(model=model.model, args=options, train_dataset=data).train()
    state = second_moments(tmp_path / "checkpoint-3", model)
    torch.testing.assert_close(state.v, adam_by_hand(history, 0.95).float(), rtol=1e-5, atol=1e-12)
    assert state.steps == 3
    assert state.sum_lr == pytest.approx(
        0.01 + 0.01 * 2 / 3 + 0.01 / 3
    )  # linear decay from 0.01 to 0 in 3 steps


class Attack:
    """Unpickling one would make a folder."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_malicious_optimizer_is_not_run(tmp_path):
    model = build_model("llama", **FEW)
    folder = write(
        tmp_path / "c", model, {"state": {}, "param_groups": [Attack(str(tmp_path / "owned"))]}
    )
    with pytest.raises(AdapterError, match="nothing in it was run"):
        second_moments(folder, model)
    assert not (tmp_path / "owned").exists()
    torch.load(folder / "optimizer.pt", weights_only=False)
    assert (tmp_path / "owned").exists()  # it would have been


def test_what_cannot_be_used_is_refused_with_a_sentence(tmp_path):
    model = build_model("llama", **FEW)
    groups = trainer_groups(model)
    good = torch.optim.AdamW(groups, lr=1e-3)
    train(model, good)
    folder = write(tmp_path / "c", model, good)

    def refused(content, match):
        torch.save(content, folder / "optimizer.pt")
        with pytest.raises(AdapterError, match=match):
            second_moments(folder, model)

    sgd = torch.optim.SGD(model.parameters, lr=1e-3, momentum=0.9)
    train(model, sgd)
    refused(sgd.state_dict(), "not of Adam or AdamW.* found an optimiser with .*momentum")
    content = good.state_dict()
    lion = {
        number: {"step": 1, "exp_avg": state["exp_avg"]}
        for number, state in content["state"].items()
    }
    refused(content | {"state": lion}, "no second moment per parameter; found exp_avg, step")
    factored = {
        number: {"step": 1, "exp_avg_sq_row": 0, "exp_avg_sq_col": 0} for number in content["state"]
    }
    refused(content | {"state": factored}, "found exp_avg_sq_col, exp_avg_sq_row, step")
    swapped = content["state"] | {0: content["state"][1], 1: content["state"][0]}
    refused(
        content | {"state": swapped},
        r"q_proj.lora_A: shape \[16, 2\] there, \[2, 16\] in the model",
    )
    refused(content | {"state": {}}, "the optimiser has no state for it")
    refused(
        content | {"param_groups": [{**content["param_groups"][0], "params": [0, 1]}]},
        "holds 2 parameters",
    )
    halves = [{**content["param_groups"][0], "params": part} for part in ([0, 2], [1, 3])]
    refused(
        content | {"param_groups": halves},
        r"2 parameter groups of \[2, 2\] parameters without names",
    )
    refused([1, 2], "not a torch optimiser's state_dict")
    (folder / "optimizer.pt").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(AdapterError, match="damaged or holds more than tensors"):
        second_moments(folder, model)
    (folder / "optimizer.pt").unlink()
    with pytest.raises(AdapterError, match=r"has no optimizer\.pt"):
        second_moments(folder, model)
    other = build_model("llama", r=4, **FEW)
    with pytest.raises(
        AdapterError,
        match=r"another adapter than the model's.*\n.*lora_A: \[2, 20\] there, \[4, 20\]",
    ):
        second_moments(folder, other)
    torch.save(content, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text("[]")
    with pytest.raises(InputError, match="not a Trainer's state"):
        second_moments(folder, model)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        second_moments(folder, model)
    with pytest.raises(AdapterError, match="is not a folder"):
        second_moments(tmp_path / "nowhere", model)
