"""The adapter is what its two files say, or an error names the difference."""

from __future__ import annotations

import json

import pytest
import torch

import influence
from influence.adapter_files import adapter_folder
from influence.errors import AdapterError
from tests.conftest import build_base, build_tokenizer
from tests.helpers import edit_config, edit_weights, save
from tests.influence.toy_loading import (
    IDS,
    LLAMA,
    rename,
    unloadable,
    weights_of,
)

# ---- what renamed or emptied the weights ---------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda key: key.replace("base_model.model.", ""),
            r"do not begin with base_model\.model\.",
        ),
        (lambda key: f"base_model.model.{key}", "more than once"),
        (lambda key: key.replace("model.layers", "_orig_mod.model.layers"), "torch.compile"),
        (lambda key: key.replace(".weight", ".sft.weight"), r"the adapter's name \.sft"),
        (lambda key: key.replace("lora_", "loha_"), "the file holds no LoRA matrix, but"),
    ],
)
def test_names_that_peft_never_writes_are_explained(tmp_path, change, match):
    base, adapter = save(tmp_path, **LLAMA)
    rename(adapter, change)
    said = unloadable(base, adapter, match)
    assert "pass the base it was trained on" not in said


def test_empty_matrices_of_zero_3_are_explained(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)

    def emptied(tensors):
        tensors.update({key: torch.empty(0) for key in tensors})

    edit_weights(weights_of(adapter), emptied)
    unloadable(base, adapter, r"8 of 8 matrices are empty.*ZeRO-3 saved them without gathering")


def test_integers_are_no_matrices(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)

    def rounded(tensors):
        tensors.update({key: (tensor * 20).to(torch.int8) for key, tensor in tensors.items()})

    edit_weights(weights_of(adapter), rounded)
    unloadable(base, adapter, "is saved as I8, without the scales")


def test_experts_of_an_older_mixtral_are_explained(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    base, adapter = save(tmp_path, layers=1, target_modules=["q_proj"])
    config = MixtralConfig(
        vocab_size=25,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(base)
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_{}.weight"

    def expert(tensors):
        tensors[key.format("A")], tensors[key.format("B")] = torch.ones(2, 16), torch.ones(20, 2)

    edit_weights(weights_of(adapter), expert)
    unloadable(base, adapter, "experts")
    edit_config(adapter, target_modules=["q_proj", "w1"])
    unloadable(base, adapter, "experts")


# ---- the folder ----------------------------------------------------------------------------------


def test_the_folders_below_that_hold_an_adapter_are_named(tmp_path):
    _, adapter = save(tmp_path, layers=1, **LLAMA)
    (tmp_path / "out" / "empty").mkdir(parents=True)
    adapter.rename(tmp_path / "out" / "checkpoint-10")
    with pytest.raises(AdapterError, match=r"its folders checkpoint-10 have: pass one of them"):
        adapter_folder(tmp_path / "out")


def test_other_weights_than_pefts_are_named_for_what_they_are(tmp_path):
    _, adapter = save(tmp_path, layers=1, **LLAMA)
    weights = weights_of(adapter)
    for name, match in [
        ("adapters.safetensors", "an adapter of MLX"),
        ("adapter_model-00001-of-00002.safetensors", "1 parts of one .*join the tensors"),
        ("adapter_model.bin", r"pickled weights \(.bin\) are never loaded"),
        ("model.safetensors", "the weights of a full model"),
        ("other.txt", r"it holds .*other.txt.*copy the adapter again"),
    ]:
        weights = weights.rename(adapter / name)
        with pytest.raises(AdapterError, match=match):
            adapter_folder(adapter)


def test_the_configuration_of_mlx_is_told(tmp_path):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    settings = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 8}}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    unloadable(base, adapter, "it is an adapter of MLX")


@pytest.mark.parametrize("revision", [None, "refs/pr/1"])
def test_an_adapter_of_the_hub_may_lie_in_a_folder(tmp_path, monkeypatch, revision):
    import huggingface_hub

    _, adapter = save(tmp_path, layers=1, **LLAMA)
    asked = []

    def download(id, revision, allow_patterns):
        asked.append((id, allow_patterns[0], revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    name = "someone/name/adapter" + (f"@{revision}" if revision else "")
    assert adapter_folder(name) == adapter
    assert asked == [("someone/name", "adapter/adapter_config.json", revision)]


def test_all_files_of_a_tokenizer_on_the_hub_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    _, adapter = save(tmp_path, layers=1, **LLAMA)
    wanted = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "vocab.json"]
    wanted += ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    wanted += ["merges.txt", "vocab.txt", "spiece.model", "qwen.tiktoken", "tekken.json"]
    wanted += ["chat_template.jinja"]
    fetched = []

    def download(id, revision, allow_patterns):
        fetched.extend(
            filter_repo_objects(
                [*wanted, "adapter_model.bin", "optimizer.pt", "tokenization.py"],
                allow_patterns=allow_patterns,
            )
        )
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    adapter_folder("someone/name")
    assert fetched == wanted


# ---- the configuration ---------------------------------------------------------------------------


def test_fields_that_peft_does_not_know_are_said(tmp_path, capfd):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    edit_config(adapter, use_superlora=True, superlora_gate=0.5, later_default=None)
    influence.load(base, adapter, device="cpu")
    said = capfd.readouterr().err
    assert "does not know and ignores superlora_gate, use_superlora of adapter_config.json" in said
    edit_config(adapter, use_superlora=False, superlora_gate=0)
    influence.load(base, adapter, device="cpu")
    assert "does not know" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "task", ["FEATURE_EXTRACTION", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS"]
)
def test_other_tasks_are_refused(tmp_path, task):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    edit_config(adapter, task_type=task)
    unloadable(base, adapter, f"task_type='{task}': it was trained for .*another loss")


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha_pattern": None},
        {"rank_pattern": 3},
        {"arrow_config": {}},
        {"r": "4"},
        {"r": 0},
        {"lora_alpha": None},
        {"target_modules": []},
        {"target_modules": ["("]},
        {"target_modules": "("},
        {"task_type": "SINGING"},
        {"bias": None},
        {"layers_to_transform": "one"},
    ],
    ids=str,
)
def test_whatever_peft_raises_is_a_sentence(tmp_path, changes):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    edit_config(adapter, **changes)
    said = unloadable(base, adapter, "adapter '.*'")
    assert said.splitlines()[0].startswith("adapter ")


INITS = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]


@pytest.mark.parametrize("init", INITS)
def test_initialisations_that_change_the_base_are_refused(tmp_path, init):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    edit_config(adapter, init_lora_weights=init)
    unloadable(
        base, adapter, f"init_lora_weights='{init}' changed the base.*path_initial_model_for_weight"
    )


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_base_alone_are_fine(tmp_path, init):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    right = influence.load(base, adapter, device="cpu")
    edit_config(adapter, init_lora_weights=init)
    loaded = influence.load(base, adapter, device="cpu")
    assert (loaded.base_digest, loaded.adapter_digest) == (right.base_digest, right.adapter_digest)


@pytest.mark.parametrize("kept", [True, False], ids=["initial-kept", "initial-made-again"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_recipe_that_makes_plain_lora_of_pissa_is_right(tmp_path, init, kept, monkeypatch):
    """That of docs/choosing.md. The converted adapter on the base is the trained model."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def fresh():
        return AutoModelForCausalLM.from_pretrained("base")

    def initialised():
        settings = {"init_lora_weights": init, "task_type": "CAUSAL_LM", **LLAMA}
        return get_peft_model(fresh(), LoraConfig(r=2, **settings))

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    build_base(layers=1, dtype=torch.float32).save_pretrained("base")
    build_tokenizer().save_pretrained("base")
    model = initialised()
    with pytest.raises(AdapterError, match="changed the base before training"):
        influence.from_peft(model, build_tokenizer())
    if kept:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained("initial")
    for name, weight in model.named_parameters():  # as training moves them
        if "lora_" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    right = model.eval()(IDS).logits
    if not kept:
        model.save_pretrained("trained")
        model = PeftModel.from_pretrained(fresh(), "trained")
        model.peft_config["default"].init_lora_weights = True
        first = initialised()
        first.peft_config["default"].init_lora_weights = True
        first.save_pretrained("initial")
    model.save_pretrained("plain", path_initial_model_for_weight_conversion="initial")
    loaded = influence.load("base", "plain", device="cpu")
    assert torch.allclose(loaded.model(IDS).logits, right, atol=1e-4)
    base = loaded.model.unload()
    for name, weight in fresh().named_parameters():
        assert torch.equal(weight, base.get_parameter(name))
