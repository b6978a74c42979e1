"""Rows as they are written, and tokenizers trained here in an instant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from influence.tokens import TokenizedExamples, Tokens

CORPUS = [
    "Q: What is the capital of France? A: The capital of France is Paris.",
    "Q: What is the capital of Italy? A: The capital of Italy is Rome.",
    "user assistant system end Hello there, the answer is yes.",
]


SPECIALS = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# The generation prompt opens a thought that a finished answer does not have; the answer is
# stripped.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def trained(corpus=CORPUS, vocab=420) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


BACKEND = trained().to_str()


def make_tokenizer(
    *,
    template=None,
    added="$A",
    pad="<pad>",
    eos="<eos>",
    backend=BACKEND,
    cls=PreTrainedTokenizerFast,
):
    """Wrap a copy of the trained backend; `added` says which special tokens it adds by itself."""
    backend = Tokenizer.from_str(backend)
    backend.post_processor = processors.TemplateProcessing(
        single=added, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer = cls(tokenizer_object=backend, pad_token=pad, bos_token="<bos>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def pair(
    prompt="Q: What is the capital of France? A:",
    completion=" The capital of France is Paris.",
    **more,
):
    return {"prompt": prompt, "completion": completion, **more}


def chat(*turns, **more):
    roles = (
        ["user", "assistant"] * len(turns)
        if len(turns) % 2 == 0
        else ["assistant", "user"] * len(turns)
    )
    return {
        "messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)],
        **more,
    }


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def random_tokens(seed: int, n: int = 200, longest: int = 90) -> TokenizedExamples:
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(2, longest, size=n):
        supervised = np.arange(length) >= rng.integers(1, length)
        rows.append(Tokens(rng.integers(5, 100, size=length), supervised))
    return TokenizedExamples(rows, [f"r{i}" for i in range(n)])
