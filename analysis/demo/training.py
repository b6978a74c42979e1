"""Training of the demo's base model and adapter, and losses under them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.demo.corpus import Row
from influence.progress import track
from influence.recipe import Recipe
from influence.store import write_json


def train_base(
    texts: Sequence[str],
    directory: str | Path,
    seed: int = 0,
    *,
    width: int = 128,
    layers: int = 4,
    vocabulary: int = 1200,
    epochs: float = 10.0,
    lr: float = 4e-3,
) -> None:
    """Train a small Llama from scratch on `texts` and save it with its tokenizer.

    The texts, each with an end token, are packed into blocks of 128 tokens. AdamW, batches of 8
    blocks, learning rate warmed up over 5 % of the steps and decayed linearly to zero.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer(texts, vocabulary)
    stream = [
        token
        for ids in tokenizer(list(texts))["input_ids"]
        for token in (*ids, tokenizer.eos_token_id)
    ]
    block = 128
    blocks = torch.tensor(stream[: len(stream) // block * block]).view(-1, block)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    batches = _batches(len(blocks), 8, epochs, seed)
    for step, batch in enumerate(track(batches, "training the base model")):
        warm = min(1.0, (step + 1) / (0.05 * len(batches)))
        _set_rate(optimizer, lr * warm * (1 - step / len(batches)))
        loss = model(input_ids=blocks[batch], labels=blocks[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_adapter(
    base: str | Path,
    rows: Sequence[Row],
    directory: str | Path,
    seed: int = 0,
    *,
    absent: Collection[str] = (),
    epochs: float = 15.0,
    lr: float = 5e-3,
    rank: int = 8,
    label: str = "training the adapter",
) -> None:
    """Fine-tune a LoRA adapter on `rows` and save it.

    AdamW (weight decay 0.01), batch 16, learning rate decayed linearly to zero; loss = sum of the
    supervised tokens' cross-entropy / number of supervised tokens in the batch.

    Parameters
    ----------
    base, rows, directory, seed
        The same four give the same adapter, to the bit, on the same machine.
    absent : ids
        Rows whose slot is left empty: they keep their place in the order and their tokens in the
        batch's denominator (weights are not renormalised after a removal) but add nothing to the
        loss. Against the adapter trained on all rows, initialisation, order and batches are the
        same, so what differs is due to these rows.
    """
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_base(base)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(model, config)
    model.train()
    data = [_encode(tokenizer, row) for row in rows]
    weights = torch.tensor([float(row["id"] not in absent) for row in rows])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01)
    batches = _batches(len(rows), 16, epochs, seed)
    for step, batch in enumerate(track(batches, label)):
        _set_rate(optimizer, lr * (1 - step / len(batches)))
        losses, counts = _row_losses(model, [data[i] for i in batch], tokenizer.pad_token_id)
        loss = (losses * weights[batch]).sum() / counts.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(str(directory), save_embedding_layers=False)
    if not absent and epochs == int(epochs):  # what the toolkit's own training would repeat
        recipe = Recipe(lr=lr, epochs=int(epochs), batch_size=16, seed=seed)
        write_json(Path(directory) / "recipe.json", recipe.as_json())


def mean_losses(base: str | Path, adapter: str | Path | None, rows: Sequence[Row]) -> list[float]:
    """Each row's mean cross-entropy over its completion and EOS, in nats.

    `adapter=None` for the base.

    Written without the toolkit's own loss, so that a check of its predictions shares no code with
    them.
    """
    from peft import PeftModel

    model, tokenizer = load_base(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    means: list[float] = []
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            data = [_encode(tokenizer, row) for row in rows[start : start + 32]]
            losses, counts = _row_losses(model, data, tokenizer.pad_token_id)
            means.extend((losses / counts).tolist())
    return means


def load_base(base: str | Path) -> tuple[Any, Any]:
    """The base model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(base))  # in float32, as saved
    return model, AutoTokenizer.from_pretrained(str(base))


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Byte-level BPE of at most `vocabulary` tokens, with an end and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=256
    )


def _encode(tokenizer: Any, row: Row) -> tuple[Tensor, Tensor]:
    """Token ids of prompt + completion + EOS, and which of them are supervised."""
    text = tokenizer(row["prompt"] + row["completion"], return_offsets_mapping=True)
    supervised = [end > len(row["prompt"]) for _, end in text["offset_mapping"]]
    return torch.tensor([*text["input_ids"], tokenizer.eos_token_id]), torch.tensor(
        [*supervised, True]
    )


def _row_losses(
    model: Any, data: Sequence[tuple[Tensor, Tensor]], pad: int
) -> tuple[Tensor, Tensor]:
    """Each row's summed cross-entropy over its supervised tokens, and how many these are."""
    pad_rows = torch.nn.utils.rnn.pad_sequence
    ids = pad_rows([tokens for tokens, _ in data], batch_first=True, padding_value=pad)
    mask = pad_rows([supervised for _, supervised in data], batch_first=True, padding_value=False)
    seen = pad_rows([torch.ones_like(tokens) for tokens, _ in data], batch_first=True)
    logits = model(input_ids=ids, attention_mask=seen).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * mask[:, 1:]).sum(1), mask[:, 1:].sum(1)


def _batches(count: int, size: int, epochs: float, seed: int) -> list[list[int]]:
    """A fresh permutation per epoch, cut into batches. A fractional last epoch is cut short."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(math.ceil(epochs)):
        order = torch.randperm(count, generator=generator).tolist()
        batches += [order[start : start + size] for start in range(0, count, size)]
    return batches[: max(1, round(math.ceil(count / size) * epochs))]


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
