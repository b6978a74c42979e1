"""Computing in a wider type than the weights are held in, against a copy of the model in that type."""

from __future__ import annotations

import copy
import json
import weakref

import numpy as np
import pytest
import torch

import influence
from influence.batches import collate
from influence.curvature.ggn import ggn_products
from influence.curvature.hessian import hessian_products
from influence.curvature.objective import Objective
from influence.errors import InputError, MismatchError
from influence.gradients import stream_gradients, tape
from influence.loading import computes_wide
from influence.precision import compute_in, compute_record, compute_type, computing_in, type_name
from tests.conftest import add_lora, build_base, build_tokenizer, examples, rows, tokens_of
from tests.helpers import save
from tests.influence.test_loading import quantised

pytestmark = pytest.mark.usefixtures("credit_when_asked_for")

KINDS = ["llama", "gpt2", "gemma", "phi", "mistral"]


def model_in(dtype, kind="llama", **lora):
    return influence.from_peft(add_lora(build_base(kind).to(dtype), **lora), build_tokenizer())


def wide_copy(model, dtype=torch.float32):
    """The same model with every weight in a wider type, by torch's own conversion."""
    peft = copy.deepcopy(model.model).to(dtype)
    for module in peft.modules():
        vars(module).pop("forward", None)
        vars(module).pop("_computes_in", None)
    return influence.from_peft(peft, model.tokenizer)


def streamed(model, data, **options):
    tokens = tokens_of(model, data)
    out = torch.empty(len(tokens), model.space.size, dtype=model.dtype)
    for positions, gradients, _ in stream_gradients(model, tokens, **options):
        out[torch.from_numpy(positions)] = gradients
    return out


def state(model):
    return [(name, id(p), p.dtype, p.clone()) for name, p in model.model.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_weights_give_the_gradients_of_a_float32_copy(kind):
    model = model_in(torch.bfloat16, kind)
    expected, rounded = streamed(wide_copy(model), examples(5)), streamed(model, examples(5))
    before = state(model)
    with computing_in(model, torch.float32):
        assert compute_type(model) == torch.float32
        wide = streamed(model, examples(5))
    assert (wide - expected).norm() / expected.norm() < 1e-6
    assert (rounded - expected).norm() / expected.norm() > 1e-3
    for (name, there, dtype, value), (_, now, other, after) in zip(
        before, state(model), strict=True
    ):
        assert (there, dtype) == (now, other), name
        assert torch.equal(value, after)
    assert compute_type(model) == torch.bfloat16
    assert torch.equal(streamed(model, examples(5)), rounded)
    assert not any("forward" in vars(m) or "_computes_in" in vars(m) for m in model.model.modules())


def test_a_float32_model_computes_in_float64_with_its_lora_branches():
    model = model_in(torch.float32)
    expected = streamed(wide_copy(model, torch.float64), examples(5))
    with computing_in(model, torch.float64):
        wide = streamed(model, examples(5))
    assert wide.dtype == torch.float64
    # rotary embeddings and normalisations stay in float32 inside, in either
    assert (wide - expected).norm() / expected.norm() < 1e-6
    assert model.dtype == torch.float32


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_weights_are_dequantised(kind):
    model = quantised(kind)
    rounded = streamed(model, examples(4))
    import bitsandbytes as bnb

    bare = copy.deepcopy(model.model)
    for name, module in list(bare.named_modules()):
        if not isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        plain, weight = torch.nn.Linear(64, 64, bias=False), module.weight
        plain.weight.data = (
            bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            if kind == "4bit"
            else weight.data.float() / 127 * module.state.SCB.float()[:, None]
        )
        bare.set_submodule(name, plain.requires_grad_(False))
    setattr(bare.get_base_model(), f"is_loaded_in_{kind}", False)
    expected = streamed(influence.from_peft(bare, model.tokenizer), examples(4))
    with computing_in(model, torch.float32):
        wide = streamed(model, examples(4))
    assert (wide - expected).norm() / expected.norm() < 1e-4
    assert torch.equal(streamed(model, examples(4)), rounded)


def test_the_graph_holds_no_wide_copy_of_the_weights(monkeypatch):
    model = model_in(torch.bfloat16)
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters() if p.dim() > 1}
    wide, own = [], torch.Tensor.to

    def casting(tensor, *args, **kwargs):
        out = own(tensor, *args, **kwargs)
        if tensor.untyped_storage().data_ptr() in weights:
            wide.append(weakref.ref(out))
        return out

    batch = collate(tokens_of(model, examples(2)), np.arange(2))
    with computing_in(model, torch.float32), tape(model) as recorder:
        monkeypatch.setattr(torch.Tensor, "to", casting)
        part = recorder.forward(batch)
        assert len(wide) == 15  # 14 projections and the head
        assert part.logits.requires_grad
        assert [copy for copy in wide if copy() is not None] == []


def test_checkpointed_layers_compute_wide_too():
    model = model_in(torch.bfloat16)
    expected = streamed(wide_copy(model), examples(5))
    compute_in(model.model.get_base_model(), torch.float32)
    model.model.get_base_model().gradient_checkpointing_enable()
    assert (streamed(model, examples(5)) - expected).norm() / expected.norm() < 1e-6


def test_hooks_of_a_device_map_stay():
    """accelerate's, which bring the inputs of a layer to the device that its weights lie on."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = []

    class Moving(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model = model_in(torch.bfloat16)
    expected = streamed(wide_copy(model), examples(3))
    head = model.model.get_output_embeddings()
    add_hook_to_module(head, Moving())
    plain = streamed(model, examples(3))
    calls.clear()
    with computing_in(model, torch.float32):
        wide = streamed(model, examples(3))
    assert calls
    assert (wide - expected).norm() / expected.norm() < 1e-6
    assert torch.equal(streamed(model, examples(3)), plain)
    compute_in(model.model.get_base_model(), torch.float32)
    calls.clear()
    assert torch.equal(streamed(model, examples(3)), wide)
    assert calls


@pytest.mark.parametrize("products", [ggn_products, hessian_products])
def test_second_derivatives_are_those_of_a_float32_copy(products, tmp_path):
    model = model_in(torch.bfloat16, target_modules=["q_proj", "v_proj"])
    compute_in(model.model.get_base_model(), torch.float32)
    found = []
    for each in (model, wide_copy(model)):
        tokens = tokens_of(each, examples(4))
        objective = Objective(each, tokens, np.full(4, 0.25), torch.ones(4))
        v = torch.ones(1, each.space.size)
        found.append(objective.product(v, products))
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-5


def test_a_note_on_second_derivatives_is_of_what_is_computed_in():
    model = model_in(torch.bfloat16)
    assert "computed in bfloat16 carry its rounding" in influence.GGN().caution(model)
    compute_in(model.model.get_base_model(), torch.float32)
    assert influence.GGN().caution(model) is None


def test_a_copy_computes_with_its_own_weights():
    model = model_in(torch.bfloat16)
    compute_in(model.model.get_base_model(), torch.float32)
    twin = copy.deepcopy(model.model)
    ids = torch.tensor([[3, 4, 5]])
    before = model.model(ids).logits
    assert before.dtype == torch.float32
    assert torch.equal(twin(ids).logits, before)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not twin(ids).logits.any()
    assert torch.equal(model.model(ids).logits, before)


def test_types_by_name():
    assert type_name(torch.bfloat16) == "bfloat16"
    assert compute_type(model_in(torch.float16)) == torch.float16
    assert compute_type(quantised("8bit")) == torch.float16


# ---- how `load` and runs use it ------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    base, adapter = save(tmp_path, layers=1, target_modules=["q_proj", "v_proj"])
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    return base, adapter, data


@pytest.mark.parametrize(
    ("dtype", "compute", "expected"),
    [
        ("bfloat16", "auto", torch.float32),
        ("float16", "auto", torch.float32),
        ("bfloat16", "own", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "auto", torch.float32),
        ("float64", "auto", torch.float64),
        ("float64", "float32", torch.float64),
    ],
)
def test_what_a_loaded_base_computes_in(folder, dtype, compute, expected):
    base, adapter, _ = folder
    model = influence.load(base, adapter, dtype=dtype, compute=compute, device="cpu")
    assert compute_type(model) == expected
    assert type_name(next(model.model.parameters()).dtype) == dtype
    wide = expected == torch.float32 and dtype != "float32"
    assert compute_record(model) == ("float32" if wide else "own")


def test_a_base_saved_in_16_bits_stays_so_and_gives_the_numbers_of_float32(folder, capfd):
    base, adapter, data = folder
    build_base(layers=1, dtype=torch.bfloat16).save_pretrained(base)
    model = influence.load(base, adapter, device="cpu")
    wide = influence.load(base, adapter, dtype="float32", device="cpu")
    assert "--dtype auto takes half the memory" in capfd.readouterr().err
    assert next(model.model.parameters()).dtype == torch.bfloat16
    assert (compute_type(model), compute_record(model)) == (torch.float32, "float32")
    train, values = influence.read_examples(data), []
    for each in (model, wide):
        gradients = list(influence.stream_gradients(each, tokens_of(each, train)))
        values.append(torch.cat([rows for _, rows, _ in gradients]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)
    run = influence.fit(model, train, directory=data.parent / "run", curvature=influence.Identity())
    assert run.manifest.dtype == "bfloat16"
    assert influence.Run.open(data.parent / "run", device="cpu").digest == run.digest
    with pytest.raises(InputError, match="float32"):  # other bits are another base
        influence.fit(wide, train, directory=data.parent / "run", curvature=influence.Identity())


@pytest.mark.parametrize(
    ("asked", "wide"),
    [
        (("auto", "auto", "cuda", False, False), True),  # nobody asked for rounded gradients
        (("auto", "bfloat16", "cuda", False, False), False),
        (("auto", "bfloat16", "cpu", False, False), True),
        (("auto", "auto", "cuda", True, False), True),
        (("auto", "auto", "cuda", True, True), False),  # its own number type, as it was saved
        (("own", "auto", "cpu", False, False), False),
        (("float32", "bfloat16", "cuda", True, True), True),
    ],
)
def test_who_computes_in_float32(asked, wide):
    assert computes_wide(*asked) == wide


def test_another_word_for_what_is_computed_in_is_refused(folder):
    with pytest.raises(InputError, match="compute 'tf32' was given; expected one of auto, float32"):
        influence.load(*folder[:2], compute="tf32")


def test_a_run_is_opened_with_what_it_was_fitted_in(folder, tmp_path):
    base, adapter, data = folder
    train, queries = influence.read_examples(data), examples(2, seed=9)
    for compute in ("float32", "own"):
        model = influence.load(base, adapter, dtype="bfloat16", compute=compute, device="cpu")
        run = influence.fit(model, train, directory=tmp_path / compute)
        assert run.manifest.compute == compute
        opened = influence.Run.open(tmp_path / compute, device="cpu")
        assert compute_record(opened.model) == compute
        assert np.array_equal(opened.score(queries).values, run.score(queries).values)
    wide = influence.load(base, adapter, dtype="bfloat16", device="cpu")
    with pytest.raises(MismatchError, match="compute is null there and float32 here"):
        influence.Run.open(tmp_path / "own", model=wide)
