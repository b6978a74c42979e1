"""Models of real shapes with random weights, rows of token ids, and what a device can do.

Nothing is downloaded and nothing large is written: weights are drawn on the device.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import influence
from influence.adapter import AdaptedModel

#: Fields of LlamaConfig: of Llama-3.2-1B and 3B, of Llama-3-8B, and of one for tests.
LLAMA = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    },
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "3b": {
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
#: A shape's name with this at its end: the same in 4 bits, by bitsandbytes.
QUANTISED = "-4bit"
SHAPES = (*LLAMA, *(name + QUANTISED for name in LLAMA))

#: Products in 16 bits a second, dense, by the makers' data sheets.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def build(shape: str, device: torch.device, r: int, seed: int = 0) -> AdaptedModel:
    """A Llama of this shape in bfloat16 with a LoRA adapter on all its linear layers.

    A and B are both random, so that no gradient vanishes.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    fields: dict[str, Any] = dict(LLAMA[shape.removesuffix(QUANTISED)])
    config = LlamaConfig(
        **fields,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    base.requires_grad_(False)
    if shape.endswith(QUANTISED):
        quantise(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            base,
            LoraConfig(
                r=r,
                lora_alpha=2 * r,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return influence.from_peft(adapted, build_tokenizer(config.vocab_size))


def quantise(base: Any) -> None:
    """Put the linear layers but the head into 4 bits (nf4, doubly), as QLoRA does, in their place.

    One after the other, so that no second model is ever there.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig

    names = [name for name, layer in base.named_modules() if type(layer) is nn.Linear]
    for name in names:
        layer = base.get_submodule(name)
        if layer is base.get_output_embeddings():
            continue
        place = layer.weight.device
        small = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        make: Any = Params4bit
        small.weight = make(
            layer.weight.data,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=small,
        )
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, small.to(place))  # which quantises it
    base.is_loaded_in_4bit = True
    base.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def build_tokenizer(size: int) -> Any:
    """A tokenizer of `size` words, of which nothing is asked but to be there."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, size)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def token_rows(
    n: int, vocabulary: int, seed: int, *, shortest: int = 50, longest: int = 1000
) -> influence.Examples:
    """Rows of random tokens, lognormal in length (median 4 x shortest), of which the first third
    is no target.
    """
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.normal(np.log(4 * shortest), 0.7, n)).round().astype(int)
    rows = []
    for number, length in enumerate(lengths.clip(shortest, longest).tolist()):
        ids = generator.integers(3, vocabulary, length).tolist()
        labels = [-100] * (length // 3) + ids[length // 3 :]
        rows.append({"id": f"s{seed}-{number}", "input_ids": ids, "labels": labels})
    return influence.examples_from_rows(rows)


# ---- the device ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Where everything runs, its name, and its products in 16 bits a second: by its data sheet
    (None where it is not known), and as a large product measures them.
    """

    place: torch.device
    name: str
    stated: float | None
    measured: float

    @classmethod
    def of(cls, name: str) -> Device:
        """Look at a device and run one product there."""
        place = torch.device(name)
        title = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
        stated = next((peak for key, peak in PEAKS.items() if key in title), None)
        return cls(place, title, stated, measured_peak(place))

    @property
    def peak(self) -> float:
        """The stated peak, else the measured one."""
        return self.stated or self.measured

    def wait(self) -> None:
        """Until everything that was asked of it is done."""
        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)

    def forget(self) -> None:
        """Begin a new peak of memory, with nothing kept that is not held."""
        if self.place.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.place)

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that tensors took since `forget`. None on a CPU."""
        return torch.cuda.max_memory_allocated(self.place) if self.place.type == "cuda" else None


def measured_peak(place: torch.device) -> float:
    """Operations a second of a product of square bfloat16 matrices (float32 on a CPU)."""
    gpu = place.type == "cuda"
    width, dtype = (8192, torch.bfloat16) if gpu else (256, torch.float32)
    x = torch.randn(width, width, dtype=dtype, device=place)
    return 2 * width**3 / seconds_of(lambda: x @ x, place, repeat=10)


def seconds_of(work: Any, place: torch.device, repeat: int = 1) -> float:
    """Seconds of one call, after one that warms up."""
    work()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return (time.perf_counter() - start) / repeat


def products(model: AdaptedModel, tokens: int, targets: int) -> float:
    """Operations of one forward and one backward without weight gradients, attention left out.

    `tokens` pass through the layers' matrices and `targets` through the head. LoRA's own products,
    a hundredth of these, are left out.
    """
    base = model.model.get_base_model()
    config, head = base.config, base.get_output_embeddings()
    width, inner = config.hidden_size, config.intermediate_size
    size = width // config.num_attention_heads if config.head_dim is None else config.head_dim
    attention = 2 * width * size * (config.num_attention_heads + config.num_key_value_heads)
    body = config.num_hidden_layers * (attention + 3 * width * inner)
    return 4.0 * (body * tokens + head.weight.numel() * targets)


def eigen_seconds(width: int, place: torch.device) -> float:
    """Seconds of the eigendecomposition of a float64 matrix `[width, width]`."""
    x: Tensor = torch.randn(width, width, dtype=torch.float64, device=place)
    matrix = x @ x.T
    return seconds_of(lambda: torch.linalg.eigh(matrix, UPLO="L"), place)
