"""The base is what its files say, or an error names the difference."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import influence
from influence.base_files import grouped, not_loaded_so, resolve_device
from influence.errors import AdapterError, InputError, MismatchError
from influence.manifest import LoadingRecord
from tests.conftest import add_lora, build_base, build_tokenizer, examples, rows, tokens_of
from tests.helpers import edit_weights, save, save_base, write_rows
from tests.influence.toy_loading import (
    LLAMA,
    edit_base,
    loop_gradients,
    streamed,
    unloadable,
)


def renamed(base: Path, change) -> None:
    """The same weights in the base's file under other names."""

    def rename(tensors):
        held = {change(key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(held)

    edit_weights(base / "model.safetensors", rename)


def test_a_missing_weight_is_an_error_by_name(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    key = "model.layers.1.mlp.up_proj.weight"
    edit_weights(base / "model.safetensors", lambda tensors: tensors.pop(key))
    unloadable(base, adapter, rf"would be filled with random numbers.*{key} is missing")


def test_a_base_saved_while_lora_was_inside_is_named_so(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    inside = add_lora(build_base(dtype=torch.float32), **LLAMA)
    tensors = {
        key: tensor.contiguous() for key, tensor in inside.base_model.model.state_dict().items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    said = unloadable(base, adapter, "saved while an adapter was inside.*unload")
    assert "q_proj.weight (2 of them) is missing" in said


def test_a_base_saved_without_its_head_is_named_so(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    build_base(dtype=torch.float32).model.save_pretrained(base)
    edit_base(base, architectures=["LlamaForCausalLM"])
    unloadable(base, adapter, "saved without its head.*lm_head.weight is missing")


def test_a_tied_base_saved_without_its_head_is_whole(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    tied = build_base(dtype=torch.float32, tie=True)
    tied.save_pretrained(base)
    tied.model.save_pretrained(tmp_path / "body")
    for file in ("model.safetensors", "config.json"):
        (base / file).write_bytes((tmp_path / "body" / file).read_bytes())
    loaded = influence.load(base, adapter, device="cpu").model.get_base_model()
    assert torch.equal(loaded.lm_head.weight, tied.lm_head.weight)


def test_a_prefix_more_is_named_so(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    renamed(base, lambda key: f"module.{key}")
    unloadable(base, adapter, r"names begin with 'module\.' once more")


def test_another_shape_is_an_error_by_name(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    edit_base(base, intermediate_size=24)
    unloadable(
        base,
        adapter,
        r"down_proj.weight: the file has the shape \(16, 20\), config.json asks for \(16, 24\)",
    )


def test_whole_layers_that_the_configuration_leaves_out_are_an_error(tmp_path):
    base, adapter = save(tmp_path, layers=2, layers_to_transform=[0], **LLAMA)
    edit_base(base, num_hidden_layers=1)
    unloadable(
        base,
        adapter,
        r"without whole layers .*model\.layers\.1\.mlp\.down_proj\.weight is not used",
    )


def test_other_unused_weights_are_said(tmp_path, capfd):
    base, adapter = save(tmp_path, **LLAMA)
    first = influence.load(base, adapter, device="cpu")
    extra = {f"vision.layers.{i}.weight": torch.zeros(2) for i in range(3)}
    edit_weights(base / "model.safetensors", lambda tensors: tensors.update(extra))
    second = influence.load(base, adapter, device="cpu")
    said = capfd.readouterr().err
    assert "note: 3 weights of the base's file are not used by LlamaForCausalLM: vision" in said
    assert first.base_digest == second.base_digest


def test_two_layers_more_are_not_taken_for_later_token_heads(tmp_path):
    base, adapter = save(tmp_path, layers=2, layers_to_transform=[0], **LLAMA)
    edit_base(base, num_hidden_layers=1, num_nextn_predict_layers=1)
    influence.load(base, adapter, device="cpu")  # layer 1 predicts the token after the next


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_without_their_configuration_are_refused(tmp_path, kind):
    base, adapter = save(tmp_path, **LLAMA)
    key = "model.layers.0.mlp.up_proj.weight"

    def quantise(tensors):
        tensors[key] = (tensors[key] * 20).to(kind)

    edit_weights(base / "model.safetensors", quantise)
    with safe_open(base / "model.safetensors", framework="pt") as file:
        name = file.get_slice(key).get_dtype()
    unloadable(base, adapter, f"without their scales.*{key} is saved as {name}")


def test_sharded_bases_load_and_their_integers_are_refused(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    whole = influence.load(base, adapter, device="cpu")
    model = build_base(dtype=torch.float32)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="4KB")
    assert len(list(base.glob("model-*.safetensors"))) > 1
    assert influence.load(base, adapter, device="cpu").base_digest == whole.base_digest
    key = "model.layers.0.mlp.up_proj.weight"
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]

    def quantise(tensors):
        tensors[key] = tensors[key].to(torch.int8)

    edit_weights(base / weight_map[key], quantise)
    unloadable(base, adapter, f"{key} is saved as I8")


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_quantisation_whose_library_is_missing_is_a_sentence(tmp_path, method):
    base, adapter = save(tmp_path, **LLAMA)
    settings = {"quant_method": method, "bits": 4, "group_size": 8}
    edit_base(base, quantization_config=settings)
    said = unloadable(base, adapter, rf"could not be loaded: .*It is saved quantised \({method}\)")
    assert said.splitlines()[0].startswith("base model")


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_bitsandbytes_settings_over_plain_weights_are_refused(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    base, adapter = save(tmp_path, **LLAMA)
    edit_base(base, quantization_config={"quant_method": "bitsandbytes", bits: True})
    unloadable(base, adapter, "take quantization_config out.*is not quantised")


def test_an_attention_that_is_not_there_is_a_sentence_and_can_be_replaced(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    right = influence.load(base, adapter, device="cpu")
    edit_base(base, attn_implementation="flash_attention_2")
    unloadable(base, adapter, "ImportError.*--attn-implementation sdpa")
    loaded = influence.load(base, adapter, device="cpu", attn_implementation="sdpa")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded.model(ids).logits, right.model(ids).logits)
    unloadable(base, adapter, "could not be loaded", attn_implementation="abacus")


def test_an_encoder_decoder_is_refused_in_one_sentence(tmp_path):
    from transformers import T5Config

    _, adapter = save(tmp_path, **LLAMA)
    T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path / "t5")
    said = unloadable(tmp_path / "t5", adapter, r"is an encoder-decoder \(t5\)")
    assert len(said) < 400


def test_a_masked_language_model_is_refused(tmp_path):
    from transformers import BertConfig

    _, adapter = save(tmp_path, **LLAMA)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, architectures=["BertForMaskedLM"])
    config.save_pretrained(tmp_path / "bert")
    unloadable(tmp_path / "bert", adapter, "is a masked language model")


def test_a_type_that_has_no_causal_model_is_refused_in_one_sentence(tmp_path):
    from transformers import CLIPConfig

    _, adapter = save(tmp_path, **LLAMA)
    CLIPConfig().save_pretrained(tmp_path / "clip")
    said = unloadable(tmp_path / "clip", adapter, "is of the type 'clip'")
    assert len(said) < 400


def test_a_base_folder_that_holds_an_adapter_is_refused(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    unloadable(adapter, adapter, "is an adapter's folder: pass the model")
    for file in adapter.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    unloadable(base, adapter, "transformers loads that adapter into it")


def test_auto_is_the_type_that_the_base_is_saved_in(tmp_path):
    _, adapter = save(tmp_path, **LLAMA)
    base = tmp_path / "half"
    build_base(dtype=torch.bfloat16).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    loaded = influence.load(base, adapter, dtype="auto", device="cpu")
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert loaded.dtype == torch.float32


def test_devices_and_bits_that_contradict_each_other_are_refused(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    for options, match in [
        ({"load_in_4bit": True, "load_in_8bit": True}, "both 4 and 8 bits"),
        ({"load_in_4bit": True, "dtype": "float64"}, "at most float32"),
        ({"device_map": "auto", "device": "cpu"}, "leave one of them out"),
    ]:
        with pytest.raises(InputError, match=match):
            influence.load(base, adapter, **options)


def test_names_that_differ_in_numbers_are_one():
    names = ["a.0.w", "a.1.w", "a.10.w", "b.3.w", "c"]
    assert grouped(names) == ["a.*.w (3 of them)", "b.3.w", "c"]


def test_the_machine_is_asked_for_its_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="expected auto, cpu, cuda"):
        resolve_device("abacus")


def test_memory_that_is_too_small_is_not_called_a_bad_base(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    base, adapter = save(tmp_path, **LLAMA)

    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings():
        influence.load(base, adapter, device="cpu")


def test_a_base_of_the_hub_is_asked_for_with_the_recorded_revision(tmp_path, monkeypatch):
    """Only where it is the base that the adapter records."""
    from transformers import AutoConfig

    from tests.helpers import edit_config

    _, adapter = save(tmp_path, **LLAMA)
    edit_config(adapter, base_model_name_or_path="someone/base", revision="v2")
    asked = []

    def remember(place, **options):
        asked.append((place, options.get("revision")))
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", remember)
    for base in (None, "someone/base", "someone/other"):
        unloadable(base, adapter, "no network")
    assert asked == [("someone/base", "v2"), ("someone/base", "v2"), ("someone/other", None)]


def test_a_base_in_a_folder_takes_no_revision(tmp_path):
    from tests.helpers import edit_config

    base, adapter = save(tmp_path, **LLAMA)
    edit_config(adapter, revision="v2")
    assert influence.load(None, adapter, device="cpu").base == str(base.resolve())


def test_save_base_is_whole(tmp_path):
    """The fixture itself, so that refusals above are of what was spoiled."""
    base = save_base(tmp_path / "base")
    _, adapter = save(tmp_path / "other", **LLAMA)
    influence.load(base, adapter, device="cpu")


# ---- quantised while it is loaded ----------------------------------------------------------------


def qlora_by_hand(base, adapter, dtype):
    """The model of QLoRA: transformers' and PEFT's own loading, without this toolkit."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    body = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=settings, device_map={"": "cpu"}
    )
    model = PeftModel.from_pretrained(body, str(adapter)).eval()
    for module in model.modules():  # a kernel without a backward
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def test_a_base_in_4_bits_has_the_gradients_of_the_plain_loop(tmp_path):
    pytest.importorskip("bitsandbytes")
    base, adapter = save(tmp_path)
    loaded = influence.load(base, adapter, device="cpu", load_in_4bit=True)
    kinds = {type(site.layer.get_base_layer()).__name__ for site in loaded.sites}
    assert kinds == {"Linear4bit"}
    assert loaded.loading.load_in_4bit
    tokens = tokens_of(loaded, examples(5))
    expected = loop_gradients(qlora_by_hand(base, adapter, torch.float32), tokens)
    assert np.abs(streamed(loaded, tokens) - expected).max() < 1e-4 * np.abs(expected).max()
    whole = influence.load(base, adapter, device="cpu")
    assert np.abs(streamed(whole, tokens) - expected).max() > 1e-2 * np.abs(expected).max()


def test_a_base_in_8_bits_has_the_gradients_of_the_loop(tmp_path):
    pytest.importorskip("bitsandbytes")
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    loaded = influence.load(base, adapter, device="cpu", load_in_8bit=True)
    assert type(loaded.sites[0].layer.get_base_layer()).__name__ == "Linear8bitLt"
    assert influence.check_gradients(loaded, examples(3)).ok


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True},
        {"load_in_4bit": True, "dtype": "auto"},
        {"attn_implementation": "eager"},
        {"dtype": "auto"},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_run_is_opened_as_its_base_was_loaded(tmp_path, options):
    pytest.importorskip("bitsandbytes")
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    if options.get("dtype") == "auto":
        build_base(layers=1, dtype=torch.bfloat16).save_pretrained(base)
    data = influence.read_examples(write_rows(tmp_path / "rows.jsonl", rows(6)))
    loaded = influence.load(base, adapter, device="cpu", **options)
    influence.fit(
        loaded, data, directory=tmp_path / "run", path=(1.0,), curvature=influence.Identity()
    )
    opened = influence.Run.open(tmp_path / "run", device="cpu")
    assert opened.model.loading == loaded.loading == opened.manifest.loading
    assert opened.model.base_digest == loaded.base_digest
    attention = opened.model.model.get_base_model().config._attn_implementation
    assert attention == options.get("attn_implementation", "sdpa")
    again = influence.load(base, adapter, device="cpu")
    if options != {"dtype": "auto"}:
        with pytest.raises(InputError, match=r"base|attn_implementation"):
            influence.fit(again, data, directory=tmp_path / "run", curvature=influence.Identity())


def live(base, *, attention="sdpa", dtype=torch.bfloat16, **settings):
    """An adapted live model whose base is quantised while it is loaded, as trainers do it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = {"quantization_config": BitsAndBytesConfig(**settings)} if settings else {}
    body = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, device_map={"": "cpu"}, attn_implementation=attention, **how
    )
    return influence.from_peft(add_lora(body, **LLAMA), build_tokenizer(), base=str(base))


QLORA = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (QLORA, {"load_in_4bit": True}),
        ({"load_in_8bit": True}, {"load_in_8bit": True}),
        ({"attention": "eager"}, {"attn_implementation": "eager"}),
        ({}, {}),
    ],
    ids=["4bit", "8bit", "eager", "plain"],
)
def test_a_run_of_a_live_base_is_opened_as_that_was_loaded(tmp_path, settings, options):
    pytest.importorskip("bitsandbytes")
    base, _ = save(tmp_path, layers=1, **LLAMA)
    model = live(base, **settings)
    assert model.loading == LoadingRecord(**options)
    assert not_loaded_so(model.model.get_base_model()) is None
    how = {"path": (1.0,), "curvature": influence.Identity()}
    influence.fit(model, examples(4), directory=tmp_path / "run", **how)
    opened = influence.Run.open(tmp_path / "run", device="cpu")
    assert opened.model.base_digest == model.base_digest
    assert opened.model.loading == model.loading
    influence.Run.open(tmp_path / "run", model=model)
    if "attention" in settings:
        with pytest.raises(MismatchError, match="attn_implementation is eager there and null here"):
            influence.Run.open(tmp_path / "run", model=live(base))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type=fp4"),
        ({"bnb_4bit_use_double_quant": False}, "bnb_4bit_use_double_quant=False"),
        ({"bnb_4bit_compute_dtype": torch.float32}, "bnb_4bit_compute_dtype=float32"),
    ],
    ids=["fp4", "singly", "compute"],
)
def test_a_live_base_that_loading_does_not_quantise_so_is_said(tmp_path, capfd, change, words):
    pytest.importorskip("bitsandbytes")
    base, _ = save(tmp_path, layers=1, **LLAMA)
    model = live(base, **(QLORA | change))
    assert model.loading == LoadingRecord(load_in_4bit=True)
    influence.fit(
        model,
        examples(4),
        directory=tmp_path / "run",
        path=(1.0,),
        curvature=influence.Identity(),
    )
    assert f"the base was quantised with {words}, which" in capfd.readouterr().err
    with pytest.raises(InputError, match="pass it as model="):
        influence.Run.open(tmp_path / "run")
    influence.Run.open(tmp_path / "run", model=model)


def test_a_live_base_that_was_saved_quantised_is_not_quantised_by_loading(tmp_path):
    pytest.importorskip("bitsandbytes")
    base, _ = save(tmp_path, layers=1, **LLAMA)
    change = {"bnb_4bit_quant_type": "fp4"}
    live(base, **(QLORA | change)).model.unload().save_pretrained(tmp_path / "quantised")
    model = live(tmp_path / "quantised")
    assert model.loading == LoadingRecord()
    assert not_loaded_so(model.model.get_base_model()) is None


def test_a_run_of_transformers_own_attention_is_not_opened_with_another(tmp_path):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    how = {"path": (1.0,), "curvature": influence.Identity()}
    model = influence.load(base, adapter, device="cpu")
    influence.fit(model, examples(4), directory=tmp_path / "run", **how)
    eager = influence.load(base, adapter, device="cpu", attn_implementation="eager")
    with pytest.raises(MismatchError, match="attn_implementation is null there and eager here"):
        influence.Run.open(tmp_path / "run", model=eager)
    named = influence.load(base, adapter, device="cpu", attn_implementation="sdpa")
    influence.fit(named, examples(4), directory=tmp_path / "named", **how)
    # the same one, by its name
    influence.Run.open(tmp_path / "named", model=model)
    influence.Run.open(tmp_path / "run", model=named)


def test_the_commands_load_a_run_as_its_fit_did(command, tmp_path):
    pytest.importorskip("bitsandbytes")
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    data = write_rows(tmp_path / "rows.jsonl", rows(6))
    fit = ["fit", "--model", base, "--adapter", adapter, "--train", data, "--run", tmp_path / "run"]
    fit += ["--curvature", "identity", "--path", "1.0", "--load-in-4bit", "--device-map", "cpu"]
    assert command(*fit).status == 0
    score = ["score", "--run", tmp_path / "run", "--queries", data]
    assert command(*score, "--device", "cpu").status == 0
    again = command(*fit, "--device", "cpu")
    assert again.status == 2
    assert "leave one of them out" in again.err


def test_a_base_that_is_saved_quantised_is_not_quantised_again(tmp_path):
    pytest.importorskip("bitsandbytes")
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    loaded = influence.load(base, adapter, device="cpu", load_in_4bit=True)
    loaded.model.unload().save_pretrained(tmp_path / "quantised")
    build_tokenizer().save_pretrained(tmp_path / "quantised")
    saved = influence.load(tmp_path / "quantised", adapter, device="cpu")
    ids = torch.tensor([[3, 4, 5]])
    again = influence.load(base, adapter, device="cpu", load_in_4bit=True)
    assert torch.equal(saved.model(ids).logits, again.model(ids).logits)
    unloadable(tmp_path / "quantised", adapter, "saved quantised already", load_in_4bit=True)


def test_a_map_of_devices_is_that_of_transformers(tmp_path):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    plain = influence.load(base, adapter, device="auto")
    mapped = influence.load(base, adapter, device_map="auto")
    assert mapped.base_digest == plain.base_digest
    assert influence.check_gradients(mapped, examples(3)).ok


def test_weights_left_on_a_disk_are_refused(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    base, adapter = save(tmp_path, layers=1, **LLAMA)
    load = AutoModelForCausalLM.from_pretrained

    def offload(*arguments, **options):
        model, report = load(*arguments, **options)
        model.model.layers[0].mlp.to("meta")
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offload)
    with pytest.raises(AdapterError, match="3 of the base's weights found no room"):
        influence.load(base, adapter, device_map="auto")
