"""The weights in the model are those of the file, or an error names the difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import influence
from influence.errors import AdapterError
from tests.conftest import build_tokenizer, examples, rows, tokens_of
from tests.helpers import edit_config, edit_weights, save, write_rows
from tests.influence.toy_loading import (
    IDS,
    LLAMA,
    by_peft,
    loop_gradients,
    rename,
    resized,
    saved_with_head,
    streamed,
    unloadable,
    weights_of,
)

# ---- file and configuration ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["v_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"layers_to_transform": [0]},
    ],
)
def test_matrices_that_the_configuration_does_not_make_are_an_error_by_name(tmp_path, changes):
    base, adapter = save(tmp_path, **LLAMA)
    edit_config(adapter, **changes)
    said = unloadable(base, adapter, "do not belong together")
    name = "1.self_attn.q_proj" if "layers_to_transform" in changes else "1.self_attn.v_proj"
    assert f"model.layers.{name}.lora_A: the file has it, the configuration does not" in said


def test_matrices_that_the_file_lacks_are_an_error_by_name(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    edit_config(adapter, target_modules=["q_proj", "v_proj", "o_proj"])
    said = unloadable(base, adapter, "do not belong together")
    assert "layers.0.self_attn.o_proj.lora_A: the configuration adapts it, it is missing" in said


def test_another_rank_is_named_with_that_of_the_file(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    edit_config(adapter, r=8)
    unloadable(base, adapter, r"q_proj.lora_A: the file has rank 2, the configuration gives 8")


def test_a_lost_rank_pattern_is_named(tmp_path):
    base, adapter = save(tmp_path, rank_pattern={"v_proj": 5}, **LLAMA)
    edit_config(adapter, rank_pattern={})
    said = unloadable(
        base, adapter, "v_proj.lora_A: the file has rank 5, the configuration gives 2"
    )
    assert "q_proj" not in said


def test_a_matrix_under_two_names_is_refused(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def twice(tensors):
        tensors[key.replace(".weight", ".default.weight")] = tensors[key] + 1

    edit_weights(weights_of(adapter), twice)
    unloadable(base, adapter, r"q_proj\.lora_A: is there twice")


def test_half_precision_files_are_read_bit_for_bit(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    for kind in (torch.bfloat16, torch.float16):

        def halve(tensors, kind=kind):
            tensors.update({key: tensor.to(kind) for key, tensor in tensors.items()})

        edit_weights(weights_of(adapter), halve)
        stored = load_file(weights_of(adapter))
        loaded = influence.load(base, adapter, device="cpu")
        for site in loaded.sites:
            key = f"base_model.model.{site.name}.lora_A.weight"
            assert torch.equal(site.A.weight, stored[key].float())


def test_names_with_pefts_own_adapter_name_load_as_in_peft(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    right = influence.load(base, adapter, device="cpu")
    rename(adapter, lambda key: key.replace(".weight", ".default.weight"))
    assert torch.equal(by_peft(base, adapter)(IDS).logits, right.model(IDS).logits)
    assert influence.load(base, adapter, device="cpu").adapter_digest == right.adapter_digest


def nemotron(folder: Path):
    """A base and an adapter of the architecture that called its body `backbone` before."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, NemotronHConfig

    config = NemotronHConfig(
        vocab_size=25,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=20,
        layers_block_type=["attention", "mlp"],
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    body = AutoModelForCausalLM.from_config(config).float()
    body.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    settings = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(body, settings)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder / "adapter")
    rename(
        folder / "adapter", lambda key: key.replace("model.model.layers", "model.backbone.layers")
    )
    assert all("backbone" in key for key in load_file(weights_of(folder / "adapter")))
    return folder / "base", folder / "adapter", model.eval()


def test_older_names_load_as_peft_loads_them(tmp_path):
    base, adapter, model = nemotron(tmp_path)
    loaded = influence.load(base, adapter, device="cpu")
    assert torch.equal(loaded.model(IDS).logits, by_peft(base, adapter)(IDS).logits)
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    rename(adapter, lambda key: key.replace("layers.1", "layers.7"))
    unloadable(base, adapter, r"layers\.7\.mixer\.up_proj: the base has no such layer")


def test_checkpoints_of_older_names_are_read_as_peft_reads_them(tmp_path):
    from influence.path import read_parameters

    base, adapter, _ = nemotron(tmp_path)
    loaded = influence.load(base, adapter, device="cpu")
    edit_weights(weights_of(adapter), lambda t: t.update({key: 2 * t[key] for key in t}))
    before = loaded.snapshot()
    assert torch.equal(read_parameters(loaded, adapter), 2 * before)
    assert torch.equal(loaded.snapshot(), before)
    rename(adapter, lambda key: key.replace("layers.1", "layers.7"))
    with pytest.raises(AdapterError, match=r"layers\.7\.mixer.* is not in the adapter"):
        read_parameters(loaded, adapter)


def test_a_layer_of_another_name_is_pointed_to(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    rename(adapter, lambda key: key.replace("model.layers", "model.text.layers"))
    unloadable(
        base,
        adapter,
        r"model\.text\.layers\.0\.self_attn\.q_proj: the base has no such layer, but "
        r"model\.layers\.0\.self_attn\.q_proj",
    )


# ---- the base's weights in the adapter's file ----------------------------------------------------


@pytest.mark.parametrize(
    "targets", [["q_proj", "lm_head"], r".*\.q_proj|lm_head"], ids=["list", "re"]
)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_an_adapted_head_as_peft_saves_it_is_right(tmp_path, tie, targets):
    base, adapter, model = saved_with_head(tmp_path, tie, target_modules=targets)
    stored = load_file(weights_of(adapter))
    assert any("base_layer" in key for key in stored)
    loaded = influence.load(base, adapter, device="cpu")
    assert [site.name for site in loaded.sites][-1] == "lm_head"
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    tokens = tokens_of(loaded, examples(4))
    expected = loop_gradients(model, tokens)
    assert np.abs(streamed(loaded, tokens) - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_adapted_head_in_half_precision_leaves_the_base_as_its_own_file(tmp_path):
    """A file in bfloat16 agrees with the base to its own precision and is not put into it."""
    base, adapter, _ = saved_with_head(tmp_path, False)
    right = influence.load(base, adapter, device="cpu")

    def halve(tensors):
        key = next(key for key in tensors if "base_layer" in key)
        tensors[key] = tensors[key].bfloat16()

    edit_weights(weights_of(adapter), halve)
    assert influence.load(base, adapter, device="cpu").base_digest == right.base_digest


def test_a_head_that_was_trained_is_an_error_by_name(tmp_path):
    base, adapter, _ = saved_with_head(tmp_path, False)

    def move(tensors):
        tensors[next(key for key in tensors if "base_layer" in key)][0, 0] += 0.5

    edit_weights(weights_of(adapter), move)
    unloadable(base, adapter, r"lm_head\.weight: it is not that of the base \(trained")


def test_another_weight_in_the_file_is_an_error_by_name(tmp_path):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    edit_weights(weights_of(adapter), lambda t: t.update({"base_model.model.gate": torch.ones(2)}))
    unloadable(base, adapter, r"base_model\.model\.gate: it is neither a LoRA matrix nor a weight")


# ---- more tokens than the base has ---------------------------------------------------------------


@pytest.mark.parametrize("count", [27, 20])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_base_is_resized_where_the_file_holds_the_rows(tmp_path, tie, count, capfd):
    base, adapter, model = resized(tmp_path, tie, count)
    assert any("embed_tokens" in key for key in load_file(weights_of(adapter)))
    loaded = influence.load(base, adapter, device="cpu")
    assert f"the base has 25 tokens and is resized to {count}" in capfd.readouterr().err
    ids = torch.tensor([[3, 4, count - 1, 5]])
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert loaded.model.get_input_embeddings().num_embeddings == count


def test_rows_of_known_tokens_that_were_trained_are_an_error(tmp_path):
    base, adapter, _ = resized(tmp_path, True, 27)

    def move(tensors):
        tensors[next(key for key in tensors if "embed_tokens" in key)][3, 0] += 0.5

    edit_weights(weights_of(adapter), move)
    unloadable(base, adapter, "embed_tokens.weight: its first 25 rows are not those of the base")


def test_rows_for_one_end_alone_do_not_determine_the_resize(tmp_path):
    base, adapter, _ = resized(tmp_path, False, 27)
    key = "base_model.model.lm_head.weight"
    edit_weights(weights_of(adapter), lambda tensors: tensors.pop(key))
    unloadable(base, adapter, "lm_head.weight: its rows of the new tokens are missing")


def test_tokens_that_no_row_has_need_no_resize(tmp_path):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    more = build_tokenizer()
    more.add_tokens(["<new>", "<other>"])
    more.save_pretrained(adapter)
    loaded = influence.load(base, adapter, device="cpu")
    assert len(loaded.tokenizer) == 27
    data = influence.read_examples(write_rows(tmp_path / "rows.jsonl", rows(3)))
    assert influence.check_gradients(loaded, data).ok
