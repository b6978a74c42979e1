"""The public check: an engine that is right or wrong, a number type that is precise enough or not."""

from __future__ import annotations

import pytest
import torch

import influence
from influence.gradient_check import (
    PrecisionRecord,
    measure_precision,
    percent,
    precision_note,
    relative_errors,
)
from influence.gradients import GradientSink, per_example_gradient, stream_gradients
from influence.precision import compute_in
from tests.conftest import (
    add_lora,
    build_base,
    build_tokenizer,
    examples,
    rows,
    tokens_of,
)
from tests.helpers import save


def model_in(dtype, *, scales=None, **options):
    """A tiny Llama in a number type, with some LoRA matrices multiplied: `scales` by their names."""
    model = add_lora(build_base("llama", **options)).double()
    for name, parameter in model.named_parameters():
        for part, scale in (scales or {}).items():
            if "lora_" in name and part in name:
                parameter.data.mul_(scale)
    return influence.from_peft(model.to(dtype), build_tokenizer())


def faulty(monkeypatch, factor):
    """The engine's gradients times a factor."""
    monkeypatch.setattr(
        "influence.gradients.per_example_gradient", lambda x, g: per_example_gradient(x, g) * factor
    )


def streamed(model, data) -> torch.Tensor:
    """The engine's gradients `[n, P]`, in the rows' order."""
    tokens = tokens_of(model, data)
    out = torch.empty(len(tokens), model.space.size, dtype=model.dtype)
    for positions, gradients, _ in stream_gradients(model, tokens):
        out[torch.from_numpy(positions)] = gradients
    return out


def test_public_check_passes_and_can_fail(tiny, monkeypatch):
    result = influence.check_gradients(tiny, examples(4))
    assert result.ok
    assert "agree" in str(result)
    assert (result.computed, result.reference, result.precision) == ("float64", None, None)
    faulty(monkeypatch, 1.001)
    broken = influence.check_gradients(tiny, examples(4))
    assert not broken.ok
    assert "DISAGREE" in str(broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fault_is_seen_in_every_type(dtype, monkeypatch):
    model = model_in(dtype)
    result = influence.check_gradients(model, examples(4))
    assert result.ok, str(result)
    assert result.precise
    faulty(monkeypatch, 1.01)  # far below the tolerance of 16 bits, which alone would not see it
    broken = influence.check_gradients(model, examples(4))
    assert not broken.ok
    assert "DISAGREE" in str(broken)


# ---- the rounding of small leaves ----------------------------------------------------------------

# attention to one position, whose derivative vanishes; with larger logits their own rounding, which
# engine and loop do not share, reaches the other leaves (at 30 times 1.6e-9 in float64)
SATURATED = {"q_proj": 12, "k_proj": 12}


def largest(model, reference):
    """Each leaf's largest gradient relative to the whole, from the given gradients."""
    whole = reference.norm(dim=1).max()
    return {
        leaf.name: reference[:, leaf.slice].norm(dim=1).max() / whole for leaf in model.space.leaves
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leaves_whose_gradient_is_rounding_raise_no_alarm(dtype):
    model = model_in(dtype, scales=SATURATED)
    exact_model = model_in(torch.float64, scales=SATURATED)
    exact = streamed(exact_model, examples(4))
    assert min(largest(exact_model, exact).values()) < 1e-12  # below the rounding of either type
    result = influence.check_gradients(model, examples(4))
    assert result.ok, str(result)


def test_a_fault_of_one_small_leaf_is_seen(monkeypatch):
    """Its gradient is a billionth of the whole, but right to rounding: it is held to that."""
    model = model_in(torch.float32, scales={"layers.0.self_attn.q_proj.lora_B": 1e-9})
    small = model.space.leaves[0]
    assert small.name.endswith("layers.0.self_attn.q_proj.lora_A")
    assert influence.check_gradients(model, examples(4)).ok
    right = GradientSink.__call__

    def wrong(sink, leaf, x, g, valid):
        right(sink, leaf, x, g * (1.01 if leaf == 0 else 1), valid)

    monkeypatch.setattr(GradientSink, "__call__", wrong)
    broken = influence.check_gradients(model, examples(4))
    assert not broken.ok
    assert [name for name, error in broken.errors.items() if error > broken.tolerance] == [
        small.name
    ]
    assert largest(model, streamed(model, examples(4)))[small.name] < 1e-8


# ---- is the number type precise enough -----------------------------------------------------------


def learnt(dtype):
    """A base in 16 bits with an adapter that has learnt four rows: what is left of the gradient is
    a small difference of large numbers.
    """
    model = influence.from_peft(
        add_lora(build_base("llama").to(torch.bfloat16), r=8), build_tokenizer()
    )
    compute_in(model.model, torch.float32)
    tokens = tokens_of(model, examples(4))
    optimizer = torch.optim.Adam(model.parameters, lr=0.02)
    for _ in range(60):
        gradient = sum(g.sum(0) for _, g, _ in stream_gradients(model, tokens))
        for parameter, part in zip(model.parameters, model.space.split(gradient), strict=True):
            parameter.grad = part.clone()
        optimizer.step()
    again = influence.from_peft(add_lora(build_base("llama").to(dtype), r=8), build_tokenizer())
    again.restore(model.snapshot())
    return again


@pytest.fixture(scope="module")
def learnt_bfloat16():
    return learnt(torch.bfloat16)


def test_bfloat16_that_is_not_precise_enough_is_told(learnt_bfloat16):
    result = influence.check_gradients(learnt_bfloat16, examples(4))
    assert result.ok, str(result)  # the engine is right: the type is not
    assert not result.precise
    assert (result.computed, result.reference) == ("bfloat16", "float32")
    # the figure, from a float32 copy of the model that shares no code with the check's
    copy = learnt(torch.float32)
    for mine, other in zip(
        copy.model.parameters(), learnt_bfloat16.model.parameters(), strict=True
    ):
        mine.data.copy_(other.data)
    exact, rounded = (streamed(m, examples(4)) for m in (copy, learnt_bfloat16))
    expected = ((rounded - exact).norm(dim=1) / exact.norm(dim=1)).max()
    assert result.precision == pytest.approx(float(expected), rel=1e-3)
    assert "bfloat16 is NOT precise enough" in str(result)
    assert "--compute float32" in str(result)


def test_the_record_of_a_fit_is_the_error_of_its_rows(learnt_bfloat16):
    tokens = tokens_of(learnt_bfloat16, examples(4))
    record = measure_precision(learnt_bfloat16, tokens, token_budget=1024)
    result = influence.check_gradients(learnt_bfloat16, examples(4))
    assert (record.computed, record.reference, record.rows) == ("bfloat16", "float32", 4)
    assert record.worst == pytest.approx(result.precision, rel=1e-3)
    assert record.median <= record.worst
    assert f"off by up to {percent(record.worst)}" in precision_note(record)


def test_only_rows_that_leave_room_for_float32_are_measured(learnt_bfloat16):
    tokens = tokens_of(learnt_bfloat16, examples(12))
    budget = 2 * int(sorted(tokens.lengths)[1])
    record = measure_precision(learnt_bfloat16, tokens, token_budget=budget)
    assert record.rows == min(4, int((tokens.lengths <= budget // 2).sum()))
    assert measure_precision(learnt_bfloat16, tokens, token_budget=1).rows >= 1


def test_a_precise_type_is_not_talked_about():
    model = model_in(torch.float32)
    tokens = tokens_of(model, examples(3))
    assert measure_precision(model, tokens, token_budget=99) is None
    assert precision_note(PrecisionRecord("bfloat16", "float32", 4, 0.1, 0.05)) is None


def test_a_share_is_told_with_two_digits():
    assert [percent(x) for x in (0.854, 0.00021, 1.0, 2.74)] == [
        "85 %",
        "0.021 %",
        "100 %",
        "274 %",
    ]
    g = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert relative_errors(g * 1.5, g).tolist() == [0.5, 0.5]


# ---- what fit says of it -------------------------------------------------------------------------


def test_a_fit_measures_says_and_keeps_the_error(learnt_bfloat16, tmp_path, capsys):
    run = influence.fit(learnt_bfloat16, examples(6), directory=tmp_path / "run", path=(1.0,))
    record = run.manifest.precision
    assert record.worst > 0.1
    assert precision_note(record) in capsys.readouterr().err
    opened = influence.Run.open(tmp_path / "run", model=learnt_bfloat16, train=examples(6))
    assert opened.manifest.precision == record
    assert opened.manifest.compute == "own"


def test_a_float32_fit_has_no_record(tiny, tmp_path, capsys):
    run = influence.fit(tiny, examples(3), directory=tmp_path / "run", path=(1.0,))
    assert run.manifest.precision is None
    assert not {"precision", "compute"} & set(run.manifest.as_json())
    assert "compute" not in run.manifest.identity
    assert "gradients are off" not in capsys.readouterr().err


def test_the_command_tells_both_figures(tmp_path, command):
    import json

    base, adapter = save(tmp_path, layers=1, target_modules=["q_proj", "v_proj"])
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    call = ("check", "--adapter", adapter, "--model", base, "--train", data, "--dtype", "bfloat16")
    own = command(*call, "--compute", "own", "--json")
    assert own.status == 0
    record = own.json()
    assert (record["computed"], record["reference"], record["precise"]) == (
        "bfloat16",
        "float32",
        True,
    )
    assert 1e-4 < record["precision"] < 0.1
    assert max(record["wide_errors"].values()) <= record["wide_tolerance"]
    wide = command(*call, "--json").json()
    assert (wide["computed"], wide["reference"]) == ("float32", "float64")
    assert wide["precision"] < 1e-5
    assert "is precise enough" in command(*call).out
