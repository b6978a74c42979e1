"""Recipes, and what retraining wrote, read back."""

from __future__ import annotations

import numpy as np

import unlearn
from tests.conftest import build_base, examples

QUICK = {"epochs": 30, "batch_size": 4, "lr": 2e-2, "dropout": False}

SHORT = unlearn.Recipe(epochs=4, batch_size=4, lr=2e-2)  # with dropout

WEIGHTS = "adapter_model.safetensors"

TRAINER = {
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-7,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "max_steps": -1,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "seed": 42,
}


def load_back(folder):
    from peft import PeftModel

    model = PeftModel.from_pretrained(build_base("llama", layers=1), str(folder))
    model.double()
    return model


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def queries():
    return examples(3, seed=9)
