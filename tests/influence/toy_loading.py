"""Folders that were spoiled, and what PEFT and a plain loop make of a base and an adapter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import influence
from influence.errors import AdapterError
from tests.conftest import add_lora, build_base, build_tokenizer
from tests.helpers import edit_config, edit_weights

LLAMA = {"target_modules": ["q_proj", "v_proj"]}
IDS = torch.tensor([[3, 4, 5, 6, 7]])


def unloadable(base, adapter, match: str, **options) -> str:
    """The text of the `AdapterError` that loading the two folders must raise."""
    with pytest.raises(AdapterError, match=f"(?s){match}") as caught:
        influence.load(base, adapter, device="cpu", **options)
    return str(caught.value)


def edit_base(base: Path, **changes) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(adapter: Path) -> Path:
    return adapter / "adapter_model.safetensors"


def rename(adapter: Path, change) -> None:
    def renamed(tensors):
        held = {change(key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(held)

    edit_weights(weights_of(adapter), renamed)


def by_peft(base, adapter, dtype=torch.float32):
    """The model that PEFT's own loading makes of the two folders."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        return PeftModel.from_pretrained(body, str(adapter)).eval()


def loop_gradients(model, tokens) -> np.ndarray:
    """`[n, P]`: the gradient of each row's summed loss, one row at a time, by name order."""
    matrices = [weight for name, weight in model.named_parameters() if ".lora_" in name]
    for weight in matrices:
        weight.requires_grad_(True)
    out = []
    for row in tokens:
        ids = torch.from_numpy(row.input_ids)
        targets = torch.where(torch.from_numpy(row.supervised), ids, -100)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits, targets, ignore_index=-100, reduction="sum"
        )
        parts = torch.autograd.grad(loss, matrices)
        out.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(out).double().numpy()


def streamed(model, tokens) -> np.ndarray:
    from influence.gradients import stream_gradients

    out = np.zeros((len(tokens), model.space.size))
    for numbers, gradients, _ in stream_gradients(model, tokens):
        out[numbers] = gradients.double().numpy()
    return out


def saved_with_head(folder: Path, tie: bool, **options):
    """A base and an adapter of its head, as PEFT itself saves them."""
    base = build_base(layers=1, dtype=torch.float32, tie=tie)
    base.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    options = {"target_modules": ["q_proj", "lm_head"]} | options
    base.config._name_or_path = base.name_or_path = str(folder / "base")
    model = add_lora(base, **options).float().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "adapter")
    edit_config(folder / "adapter", base_model_name_or_path=str(folder / "base"))
    return folder / "base", folder / "adapter", model


def resized(folder: Path, tie: bool, count: int, **options):
    """A base and an adapter trained on it with other than its own number of tokens."""
    base = build_base(layers=1, dtype=torch.float32, tie=tie)
    base.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    base.resize_token_embeddings(count, mean_resizing=False)
    base.config._name_or_path = base.name_or_path = str(folder / "base")
    model = add_lora(base, **(LLAMA | options)).float().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "adapter")
    edit_config(folder / "adapter", base_model_name_or_path=str(folder / "base"))
    return folder / "base", folder / "adapter", model
