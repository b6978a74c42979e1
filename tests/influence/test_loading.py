"""Loading from folders and live models, and every refused adapter with its sentence."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import influence
from influence.base_files import DTYPES
from influence.errors import AdapterError, InputError, NumericalError
from tests.conftest import (
    WORDS,
    add_lora,
    build_base,
    build_tokenizer,
    examples,
    tokens_of,
)
from tests.helpers import edit_config, edit_weights, save, save_base

Q = {"target_modules": ["q_proj"]}
LLAMA = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}


def wrapped(config, kind: str = "llama"):
    """A live PEFT model with any PEFT configuration."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(build_base(kind, layers=1), config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_saved_and_loaded_again_is_the_same_model(tmp_path, kind, dtype):
    base, adapter = save(tmp_path, kind)
    first = influence.load(base, adapter, dtype=dtype, device="cpu")
    stored = load_file(adapter / "adapter_model.safetensors")
    assert first.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert next(first.model.parameters()).dtype == DTYPES[dtype]
    assert first.space.size == sum(tensor.numel() for tensor in stored.values())
    for site in first.sites:
        for side in "AB":
            assert torch.equal(
                getattr(site, side).weight,
                stored[f"base_model.model.{site.name}.lora_{side}.weight"].to(first.dtype),
            )

    first.model.save_pretrained(tmp_path / "again")
    build_tokenizer().save_pretrained(tmp_path / "again")
    second = influence.load(
        None, tmp_path / "again", dtype=dtype, device="cpu"
    )  # the base it records
    assert (second.base_digest, second.adapter_digest) == (first.base_digest, first.adapter_digest)
    assert torch.equal(second.snapshot(), first.snapshot())
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(second.model(ids).logits, first.model(ids).logits)


def test_a_base_is_needed_when_the_adapter_records_none(tmp_path):
    _, adapter = save(tmp_path, layers=1)
    edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(
        AdapterError, match=r"does not record its base model: pass it \(--model BASE\)"
    ):
        influence.load(None, adapter)


def test_a_base_that_is_no_model_is_named(tmp_path):
    _, adapter = save(tmp_path, layers=1)
    with pytest.raises(AdapterError, match=r"there is no folder '.*nowhere'; .* has adapter, base"):
        influence.load(tmp_path / "nowhere", adapter)


def test_a_missing_tokenizer_is_named(tmp_path):
    base, adapter = save(tmp_path, layers=1)
    for file in base.glob("token*"):
        file.unlink()
    with pytest.raises(
        AdapterError, match=r"(?s)no tokenizer could be loaded from .*Save one beside the base"
    ):
        influence.load(base, adapter)


def test_rank_and_alpha_patterns_and_rslora_scale_as_peft_does(tmp_path):
    for number, (options, scaling) in enumerate(
        [
            ({"r": 2, "lora_alpha": 3}, 3 / 2),
            ({"r": 4, "lora_alpha": 3, "use_rslora": True}, 3 / math.sqrt(4)),
            (
                {
                    "r": 2,
                    "lora_alpha": 3,
                    "rank_pattern": {"v_proj": 5},
                    "alpha_pattern": {"v_proj": 8},
                },
                8 / 5,
            ),
            (
                {"r": 2, "lora_alpha": 3, "rank_pattern": {"v_proj": 4}, "use_rslora": True},
                3 / math.sqrt(4),
            ),
        ]
    ):
        model = influence.load(*save(tmp_path / str(number), **LLAMA, **options), dtype="float64")
        site = next(site for site in model.sites if site.name.endswith("v_proj"))
        assert site.scaling == pytest.approx(scaling)
        x = torch.randn(3, 16, dtype=torch.float64)
        expected = site.layer.get_base_layer()(x) + scaling * x @ site.A.weight.T @ site.B.weight.T
        assert torch.allclose(site.layer(x), expected, atol=1e-12)
        assert site.A.weight.shape[0] == options.get("rank_pattern", {}).get("v_proj", options["r"])


def test_a_fresh_adapter_warns():
    from peft import LoraConfig

    with pytest.warns(
        UserWarning, match=r"every B is zero: this adapter is fresh .* train the adapter first"
    ):
        influence.from_peft(wrapped(LoraConfig(target_modules=["q_proj"])), build_tokenizer())


def refused(model, match: str) -> None:
    with pytest.raises(AdapterError, match=f"(?s){match}"):
        influence.from_peft(model, build_tokenizer())


def test_dora_is_refused():
    refused(
        add_lora(build_base(layers=1), use_dora=True),
        "use_dora: DoRA also trains a magnitude.*plain LoRA and rsLoRA",
    )


def test_a_merged_live_adapter_is_refused_and_unmerged_it_works():
    model = add_lora(build_base(layers=1), target_modules=["q_proj"])
    model.merge_adapter()
    refused(
        model, r"q_proj: the adapter is merged into the base; call model.unmerge_adapter\(\) first"
    )
    model.unmerge_adapter()
    influence.from_peft(model, build_tokenizer())


def test_a_merged_and_unloaded_model_is_refused():
    model = add_lora(build_base(layers=1)).merge_and_unload()
    refused(
        model,
        "a LlamaForCausalLM was given; expected a peft.PeftModel.*use the adapter from before "
        "merging",
    )


def test_several_active_adapters_are_refused_and_one_of_two_works():
    from peft import LoraConfig

    model = add_lora(build_base(layers=1), target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"]))
    first = influence.from_peft(model, build_tokenizer())
    assert [site.name for site in first.sites] == ["model.layers.0.self_attn.q_proj"]
    model.base_model.set_adapter(["default", "other"])
    refused(
        model, r"2 adapters are active \(default, other\).*call model.set_adapter\(NAME\) first"
    )


def test_lora_on_an_embedding_is_refused():
    model = add_lora(build_base(layers=1), target_modules=["embed_tokens", "q_proj"])
    refused(model, "embed_tokens: LoRA on an embedding is not supported; adapt linear layers only")


def test_modules_to_save_is_refused():
    model = add_lora(build_base(layers=1), target_modules=["q_proj"], modules_to_save=["lm_head"])
    refused(model, "modules_to_save trains whole modules whose influence would be missed")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused(bias):
    refused(
        add_lora(build_base("phi", layers=1), bias=bias),
        f"bias='{bias}' trains biases outside the LoRA sites",
    )


def test_trainable_parameters_outside_the_sites_are_refused():
    model = add_lora(build_base(layers=1), target_modules=["q_proj"])
    model.get_base_model().lm_head.weight.requires_grad_(True)
    refused(
        model,
        r"1 trainable parameters lie outside the LoRA sites \(base_model.model.lm_head.weight",
    )


def test_other_lora_shapes_are_refused_by_name():
    refused(
        add_lora(build_base(layers=1), target_modules=["q_proj"], lora_bias=True),
        "lora_bias trains a bias beside B",
    )
    refused(
        add_lora(build_base(layers=1), target_modules=["q_proj"], trainable_token_indices=[3]),
        "trainable token embeddings are not LoRA matrices",
    )


def test_all_reasons_come_at_once():
    model = add_lora(
        build_base("phi", layers=1), bias="all", use_dora=True, modules_to_save=["lm_head"]
    )
    refused(model, "use_dora.*modules_to_save.*bias='all'")


def test_other_peft_methods_are_refused():
    from peft import IA3Config, PromptTuningConfig

    ia3 = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    refused(wrapped(ia3), "it is a IA3 adapter; LoRA adapters are supported")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused(wrapped(prompt), "it is a PROMPT_TUNING adapter; LoRA adapters are supported")


def test_an_adapter_that_is_switched_off_is_refused():
    model = add_lora(build_base(layers=1), target_modules=["q_proj"])
    with model.disable_adapter():
        refused(model, r"is switched off.*enable_adapter_layers\(\)")
    influence.from_peft(model, build_tokenizer())


def test_weights_that_are_elsewhere_are_named():
    model = add_lora(build_base(layers=1), target_modules=["q_proj"])
    model.get_base_model().model.layers[0].mlp.to("meta")
    refused(model, r"3 weights are not in memory.*mlp\.down_proj\.weight")


def test_an_adapter_that_transformers_added_is_not_called_merged():
    from peft import LoraConfig

    model = build_base(layers=1)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="added by transformers itself") as caught:
        influence.from_peft(model, build_tokenizer())
    assert "merged" not in str(caught.value)


def test_an_initialisation_that_changed_the_live_base_is_refused():
    model = add_lora(build_base(layers=1, dtype=torch.float32), init_lora_weights="pissa", **Q)
    refused(model, "init_lora_weights='pissa' changed the base before training")
    model.peft_config["default"].init_lora_weights = True  # its residual is taken for the base
    influence.from_peft(model, build_tokenizer())


def test_other_tasks_are_refused_live_too():
    from peft import LoraConfig

    config = LoraConfig(task_type="FEATURE_EXTRACTION", **Q)
    refused(wrapped(config), "task_type='FEATURE_EXTRACTION'")


def test_sites_that_training_did_not_reach_are_said(capfd):
    model = add_lora(build_base(layers=2), **Q)
    model.get_base_model().model.layers[1].self_attn.q_proj.lora_B["default"].weight.data.zero_()
    influence.from_peft(model, build_tokenizer())
    said = capfd.readouterr().err
    assert "note: 1 of 2 sites have B = 0 (model.layers.1.self_attn.q_proj)" in said


def unloadable(base, adapter, match: str, error=AdapterError, **options) -> None:
    with pytest.raises(error, match=f"(?s){match}"):
        influence.load(base, adapter, **options)


def test_refusals_hold_for_folders_and_come_before_the_base_is_loaded(tmp_path):
    _, adapter = save(tmp_path, layers=1, use_dora=True)
    unloadable("no such base", adapter, "adapter '.*' cannot be used:.*use_dora")
    _, adapter = save(
        tmp_path / "b", layers=1, modules_to_save=["lm_head"], target_modules=["q_proj"]
    )
    unloadable("no such base", adapter, "modules_to_save")
    edit_config(adapter, peft_type="IA3")
    unloadable("no such base", adapter, "it is a IA3 adapter")


def test_an_embedding_adapter_in_a_folder_is_refused(tmp_path):
    base, adapter = save(tmp_path, layers=1, target_modules=["embed_tokens", "q_proj"])
    unloadable(base, adapter, "embed_tokens: LoRA on an embedding is not supported")


def test_a_merged_model_folder_is_refused(tmp_path):
    base = save_base(tmp_path / "merged", layers=1)
    unloadable(
        base,
        base,
        "is a full model .*a merged adapter has no LoRA parameters left; pass the adapter folder",
    )


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    unloadable(None, tmp_path / "nowhere", "there is no folder '.*nowhere'; .* has no folders")
    unloadable(None, tmp_path, "has no adapter_config.json: pass the folder of a PEFT adapter")


def test_an_adapter_for_another_base_is_told_by_names_whatever_path_it_records(tmp_path):
    _, adapter = save(tmp_path / "llama", layers=1, target_modules=["q_proj", "v_proj"])
    other = save_base(tmp_path / "gpt2", "gpt2", layers=1)
    edit_config(adapter, base_model_name_or_path=str(other))
    for base in (other, None):
        unloadable(base, adapter, "was not made for base.*q_proj: the base has no such layer")


def test_an_adapter_for_another_base_is_told_by_widths_whatever_path_it_records(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    base, adapter = save(tmp_path, layers=1, target_modules=["q_proj", "down_proj"])
    config = LlamaConfig.from_pretrained(base)
    config.hidden_size, config.intermediate_size, config.head_dim = 32, 24, 8
    AutoModelForCausalLM.from_config(config).save_pretrained(
        base
    )  # at the very path the adapter records
    unloadable(
        None,
        adapter,
        "was not made for base.*down_proj: the adapter expects 20 inputs, the base's layer has 24"
        ".*q_proj: the adapter expects 16 inputs, the base's layer has 32",
    )


def test_an_adapter_for_a_deeper_base_is_refused(tmp_path):
    _, adapter = save(tmp_path / "deep", layers=2, target_modules=["q_proj"])
    shallow = save_base(tmp_path / "shallow", layers=1)
    unloadable(shallow, adapter, r"model\.layers\.1\.self_attn\.q_proj: the base has no such layer")


def test_an_adapter_that_lacks_the_weights_of_a_configured_site_is_refused(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    gone = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    edit_weights(adapter / "adapter_model.safetensors", lambda t: t.pop(gone))
    unloadable(base, adapter, "v_proj")  # else PEFT fills it in: a random A, or B = 0


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_never_loaded(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "exploded")}, adapter / "adapter_model.bin")
    unloadable(
        base,
        adapter,
        r"has no adapter_model.safetensors; pickled weights \(.bin\) are never loaded: save",
    )
    assert not (tmp_path / "exploded").exists()

    base, adapter = save(tmp_path / "2", **LLAMA)
    (base / "model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "exploded")}, base / "pytorch_model.bin")
    unloadable(base, adapter, "base model '.*' could not be loaded.*saved as safetensors")
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_safetensors_file_is_named(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    unloadable(
        base,
        adapter,
        r"adapter_model.safetensors cannot be read as safetensors: SafetensorError.*Copy the adapter again",
    )


def test_a_damaged_base_is_named(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    unloadable(base, adapter, "base model '.*' could not be loaded")


def test_a_damaged_adapter_config_is_named(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    (adapter / "adapter_config.json").write_text("{")
    unloadable(base, adapter, "adapter_config.json")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_weights_are_refused_and_named(tmp_path, value):
    base, adapter = save(tmp_path, **LLAMA)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def spoil(tensors, name):
        tensors[name][0, 0] = value

    shutil.copytree(adapter, tmp_path / "bad")
    edit_weights(tmp_path / "bad" / "adapter_model.safetensors", lambda t: spoil(t, key))
    unloadable(
        base, tmp_path / "bad", "1 weights hold NaN or infinity .*q_proj.*lora_B", NumericalError
    )
    edit_weights(base / "model.safetensors", lambda t: spoil(t, "lm_head.weight"))
    unloadable(base, adapter, r"1 weights hold NaN or infinity \(lm_head.weight\)", NumericalError)


def test_an_unknown_dtype_or_device_is_refused(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    unloadable(
        base,
        adapter,
        "dtype 'float8' was given; expected one of float32, bfloat16, float16, float64",
        InputError,
        dtype="float8",
    )
    unloadable(
        base, adapter, "device 'abacus' was given; expected auto, cpu", InputError, device="abacus"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    unloadable(base, adapter, "device 'cuda' .*", InputError, device="cuda")


def quantised(kind: str):
    """A tiny Llama whose inner layers are bitsandbytes' 4- or 8-bit linears, with LoRA on all of
    them.
    """
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, LlamaConfig

    widths = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    ids = {"vocab_size": len(WORDS) + 3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        LlamaConfig(num_hidden_layers=2, max_position_embeddings=64, **widths, **ids)
    )
    for name, module in list(base.model.named_modules()):
        if type(module) is not torch.nn.Linear:
            continue
        shape, weight = (module.in_features, module.out_features), module.weight.data
        if kind == "4bit":
            new = bnb.nn.Linear4bit(*shape, bias=False, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", module=new
            )
        else:
            new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        base.model.set_submodule(name, new.to("cpu"))
    setattr(base, f"is_loaded_in_{kind}", True)
    return influence.from_peft(add_lora(base.eval()), build_tokenizer())


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base_is_read_through_pefts_layer(kind):
    model = quantised(kind)
    assert len(model.sites) == 14
    assert not any(type(site.layer.get_base_layer()) is torch.nn.Linear for site in model.sites)
    result = influence.check_gradients(model, examples(4))
    assert result.ok, str(result)


def test_a_quantised_base_is_not_changed_by_a_forward():
    """On some CPUs bitsandbytes repacks 4-bit weights for inference, after which they pass no
    gradient on.
    """
    from influence.gradients import stream_gradients

    model = quantised("4bit")
    tokens = tokens_of(model, examples(4))
    digest = model.base_digest
    before = torch.cat([gradients for _, gradients, _ in stream_gradients(model, tokens)])
    with torch.no_grad():
        model.model(torch.tensor([[3, 4, 5, 6]]))
    after = torch.cat([gradients for _, gradients, _ in stream_gradients(model, tokens)])
    model.__dict__.pop("base_digest")
    assert torch.allclose(after, before, rtol=1e-2, atol=1e-2 * float(before.abs().max()))
    assert model.base_digest == digest
