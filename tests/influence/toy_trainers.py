"""Trainers of transformers and TRL on a tiny model, for a few steps on a CPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.conftest import build_base, build_tokenizer, rows

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


def base_of(folder: Path | None = None):
    """A tiny base in float32, from a folder where one is given: then it has a name."""
    if folder is None:
        return build_base("llama", layers=1, dtype=torch.float32)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def sft_trainer(out: Path, data=None, *, base=None, lora=None, callbacks=(), **arguments):
    """A TRL SFTTrainer on prompt-completion rows, twelve unless others are given."""
    trl = pytest.importorskip("trl", reason="trl is what is attributed here; install it to test so")
    from datasets import Dataset
    from peft import LoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.SFTTrainer(
            model=base_of() if base is None else base,
            args=trl.SFTConfig(str(out), **(ARGUMENTS | arguments)),
            train_dataset=Dataset.from_list(rows(12) if data is None else data),
            processing_class=build_tokenizer(),
            peft_config=LoraConfig(**(LORA | (lora or {}))),
            callbacks=list(callbacks),
        )


def plain_trainer(
    out: Path, data, *, base=None, collator=None, kind=None, callbacks=(), more=None, **options
):
    """A transformers Trainer of a LoRA model on rows that are token ids already."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (kind or Trainer)(
            model=get_peft_model(base or base_of(), LoraConfig(**LORA)),
            args=TrainingArguments(str(out), **(ARGUMENTS | options)),
            train_dataset=data,
            data_collator=collator,
            processing_class=build_tokenizer(),
            callbacks=list(callbacks),
            **(more or {}),
        )


def train(trainer):
    """Train without its tables and warnings."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    """The LoRA matrices by name."""
    named = trainer.model.named_parameters()
    return {name: value.detach().clone() for name, value in named if "lora_" in name}
