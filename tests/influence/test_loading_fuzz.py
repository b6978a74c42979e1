"""Folders that were spoiled at random: an error of ours, or the very model that the files hold.

Each case changes one thing of a tiny base or adapter. What loads must be what PEFT's own loading
gives (whatever the seed of torch, so that nothing is filled in at random), must hold every tensor
of both files unless a note names those it does not use, and must have the gradients of a loop over
single examples.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import influence
from influence.errors import ToolkitError
from influence.loss import check_rows
from tests.conftest import examples, tokens_of
from tests.helpers import save
from tests.influence.toy_loading import IDS, by_peft, loop_gradients, streamed

FEW, MANY = 48, 2500
#: Values of any type, small enough that no model of them fills the memory.
VALUES: list[Any] = [None, True, False, 0, 1, 2, 3, -1, 7, 0.5, 1e-30, "", "x", "4", "none", "all"]
VALUES += [[], ["q_proj"], ["v_proj"], ["q_proj", "v_proj", "o_proj"], ["lm_head"], [0], [1], ["("]]
VALUES += [{}, {"q_proj": 3}, {"v_proj": 2}, {"rope_type": "yarn", "factor": 2.0}, [[]], {"a": {}}]
VALUES += [
    "all-linear",
    ".*q_proj",
    "(",
    "pissa",
    "olora",
    "eva",
    "gaussian",
    "SEQ_CLS",
    "CAUSAL_LM",
]
VALUES += ["bfloat16", "float16", "gelu", "mistral", "gpt2", "llama", "flash_attention_2", "layers"]
LORA_FIELDS = ["r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform"]
LORA_FIELDS += ["layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"]
LORA_FIELDS += [
    "init_lora_weights",
    "bias",
    "task_type",
    "modules_to_save",
    "use_dora",
    "peft_type",
]
LORA_FIELDS += ["layer_replication", "lora_dropout", "inference_mode", "revision", "lora_bias"]
BASE_FIELDS = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"]
BASE_FIELDS += ["num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "dtype"]
BASE_FIELDS += ["architectures", "model_type", "hidden_act", "rope_parameters", "rms_norm_eps"]
BASE_FIELDS += ["attention_bias", "quantization_config", "attn_implementation", "auto_map"]
NAMES: list[tuple[str, str]] = [
    (".weight", ".default.weight"),
    (".weight", ".other.weight"),
    ("base_model.model.", ""),
    ("base_model.model.", "base_model.model.base_model.model."),
    ("model.layers", "_orig_mod.model.layers"),
    ("model.layers", "model.model.layers"),
    ("layers.1", "layers.2"),
    ("q_proj", "Q_proj"),
    ("q_proj", "k_proj"),
    ("lora_A", "lora_B"),
    ("lora_A", "lora_embedding_A"),
    (".self_attn", ""),
    ("weight", "weights"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save(folder, target_modules=["q_proj", "v_proj"])
    return folder


# ---- one change ----------------------------------------------------------------------------------


def change_json(draw: random.Random, path: Path, fields: list[str]) -> None:
    record = json.loads(path.read_text())
    field = draw.choice([*fields, *record])
    if draw.random() < 0.15:
        record.pop(field, None)
    elif draw.random() < 0.1:
        record[f"new_{field}"] = draw.choice(VALUES)
    else:
        record[field] = draw.choice(VALUES)
    path.write_text(json.dumps(record))


def change_tensor(draw: random.Random, path: Path) -> None:
    tensors = load_file(path)
    key = draw.choice(sorted(tensors))
    tensor = tensors[key]
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn]
    changes: list[Callable[[], Any]] = [
        lambda: tensors.pop(key),
        lambda: tensors.update({key: tensor.permute(*range(tensor.dim())[::-1]).contiguous()}),
        lambda: tensors.update({key: tensor[:-1].contiguous()}),
        lambda: tensors.update({key: torch.cat([tensor, tensor[:1]])}),
        lambda: tensors.update({key: torch.empty(0)}),
        lambda: tensors.update({key: tensor[None].contiguous()}),
        lambda: tensors.update({key: tensor * float("nan")}),
        lambda: tensors.update({key: torch.zeros_like(tensor)}),
        lambda: tensors.update({key: tensor.to(draw.choice(kinds))}),
        lambda: tensors.update({f"more.{key}": tensor + 1}),
        lambda: tensors.update({key.replace(".weight", ".default.weight"): tensor + 1}),
        lambda: tensors.clear(),
    ]
    draw.choice(changes)()
    save_file(tensors, path, metadata={"format": "pt"})


def change_names(draw: random.Random, path: Path) -> None:
    tensors = load_file(path)
    old, new = draw.choice(NAMES)
    chosen = set(tensors) if draw.random() < 0.6 else {draw.choice(sorted(tensors))}
    renamed = {key.replace(old, new) if key in chosen else key: t for key, t in tensors.items()}
    save_file(renamed, path, metadata={"format": "pt"})


def change_bytes(draw: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    change = draw.randrange(4)
    if change == 0:
        data = data[:place]
    elif change == 1:
        data[place : place + draw.randrange(1, 9)] = b""
    elif change == 2:
        data[place] ^= 1 << draw.randrange(8)
    else:
        data[place:place] = draw.choice([b"{", b'"', b"null", b"\x00", b"\xff"])
    path.write_bytes(bytes(data))


def spoil(draw: random.Random, folder: Path) -> str:
    """Change one thing of the folder, and say what."""
    base, adapter = folder / "base", folder / "adapter"
    settings = [path for path in (base, adapter) for path in sorted(path.glob("*.json"))]
    weights = [base / "model.safetensors", adapter / "adapter_model.safetensors"]
    tokenizer = [base / "tokenizer.json", base / "tokenizer_config.json"]
    kind = draw.randrange(8)
    if kind < 2:
        change_json(draw, adapter / "adapter_config.json", LORA_FIELDS)
    elif kind == 2:
        change_json(draw, base / "config.json", BASE_FIELDS)
    elif kind == 3:
        change_json(draw, draw.choice(tokenizer), ["tokenizer_class", "added_tokens", "model"])
    elif kind == 4:
        change_tensor(draw, draw.choice(weights))
    elif kind == 5:
        change_names(draw, draw.choice(weights))
    elif kind == 6:
        change_bytes(draw, draw.choice([*settings, *weights]))
    else:
        draw.choice([*settings, *weights]).unlink()
    return f"kind {kind}"


# ---- what must hold ------------------------------------------------------------------------------


def held(model: Any) -> set[bytes]:
    """The bits of every weight of a model, in each floating type, without their shapes."""
    out = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            if tensor.is_floating_point():
                out.add(tensor.detach().to(kind).contiguous().view(torch.uint8).numpy().tobytes())
    return out


def refuse_silence(folder: Path, model: Any, said: str) -> None:
    """Every tensor of both files is in the model, or a note names those that are not used."""
    inside = held(model)
    for file in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        for key, tensor in load_file(folder / file).items():
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert data in inside or "are not used by" in said, f"{key} is not in the model"


def right_or_refused(folder: Path, capfd) -> str:
    """Load the folder: `refused`, or `right` once everything that must hold was found to."""
    base, adapter = folder / "base", folder / "adapter"
    capfd.readouterr()
    try:
        loaded = influence.load(base, adapter, device="cpu")
    except ToolkitError:
        return "refused"
    said = capfd.readouterr().err
    refuse_silence(folder, loaded.model, said)
    logits = loaded.model(IDS).logits
    for seed in (1, 2):
        torch.manual_seed(seed)
        peft = by_peft(base, adapter)
        assert torch.equal(peft(IDS).logits, logits)
    try:
        tokens = tokens_of(loaded, examples(2))
        check_rows(loaded, tokens)  # as every command does
        gradients = streamed(loaded, tokens)
    except ToolkitError:
        return "refused"
    expected = loop_gradients(peft, tokens)
    assert np.abs(gradients - expected).max() <= 1e-4 * np.abs(expected).max()
    return "right"


def run(seeds: range, whole: Path, place: Path, capfd) -> dict[str, int]:
    counts = {"right": 0, "refused": 0}
    for seed in seeds:
        draw = random.Random(seed)
        folder = place / str(seed)
        shutil.copytree(whole, folder)
        what = spoil(draw, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                counts[right_or_refused(folder, capfd)] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed} ({what}): {error!r}") from error
        shutil.rmtree(folder)
    return counts


@pytest.mark.slow
def test_spoiled_folders_are_refused_or_right(whole, tmp_path, capfd):
    counts = run(range(FEW), whole, tmp_path, capfd)
    assert min(counts.values()) > FEW // 8, counts  # both are looked at


@pytest.mark.slow
def test_thousands_of_spoiled_folders_are_refused_or_right(whole, tmp_path, capfd):
    run(range(FEW, FEW + MANY), whole, tmp_path, capfd)


def test_the_folder_before_it_is_spoiled_is_right(whole, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert right_or_refused(whole, capfd) == "right"


def test_a_model_with_a_tensor_less_is_noticed(whole):
    """What the fuzz rests on: silence with another model does not pass."""
    model = by_peft(whole / "base", whole / "adapter")
    refuse_silence(whole, model, "")
    model.get_base_model().lm_head.weight.data += 1
    with pytest.raises(AssertionError, match=r"lm_head\.weight is not in the model"):
        refuse_silence(whole, model, "")
