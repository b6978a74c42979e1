"""Models of given shapes, rows of given lengths, and how much work a pass is."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from influence.tokens import tokenize

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_shapes  # pyright: ignore[reportMissingImports]

CPU = torch.device("cpu")


def test_a_shape_is_built_as_its_model_is_published():
    """Parameters of Llama-3.2-1B, 3B and Llama-3-8B, from their fields alone."""
    published = {"1b": 1_235_814_400, "3b": 3_212_749_824, "8b": 8_030_261_248}
    for shape, count in published.items():
        fields = gpu_shapes.LLAMA[shape]
        d, inner, layers = (
            fields[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
        )
        heads, keys, size = (
            fields[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        layer = 2 * d * size * (heads + keys) + 3 * d * inner + 2 * d
        tables = fields["vocab_size"] * d * (1 if fields["tie_word_embeddings"] else 2)
        assert layers * layer + tables + d == count


def test_the_tiny_shape_is_ready_to_be_differentiated():
    model = gpu_shapes.build("tiny", CPU, 4)
    base = model.model.get_base_model()
    assert len(model.sites) == 2 * 7
    assert next(base.parameters()).dtype == torch.bfloat16
    assert model.dtype == torch.float32
    assert all(site.B.weight.any() for site in model.sites)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    again = gpu_shapes.build("tiny", CPU, 4)
    assert torch.equal(model.snapshot(), again.snapshot())


def test_a_shape_in_four_bits_has_the_same_sites_and_a_head_that_is_whole():
    pytest.importorskip("bitsandbytes")
    model = gpu_shapes.build("tiny-4bit", CPU, 4)
    assert {type(site.layer.get_base_layer()).__name__ for site in model.sites} == {"Linear4bit"}
    assert len(model.sites) == 2 * 7
    assert type(model.model.get_output_embeddings()) is torch.nn.Linear
    whole = gpu_shapes.build("tiny", CPU, 4)
    for site, other in zip(model.sites, whole.sites, strict=True):
        x = torch.eye(other.A.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            got, expected = (s.layer.get_base_layer()(x).float() for s in (site, other))
        assert 0 < float((got - expected).norm() / expected.norm()) < 0.12  # nf4: 0.092


def test_rows_are_of_mixed_lengths_and_the_same_for_a_seed():
    rows = gpu_shapes.token_rows(300, 512, 0)
    model = gpu_shapes.build("tiny", CPU, 4)
    tokens = tokenize(rows, model.tokenizer)
    assert tokens.lengths.min() >= 50
    assert tokens.lengths.max() <= 1000
    assert 150 < np.median(tokens.lengths) < 260
    for row in list(tokens)[:20]:
        first = len(row) // 3
        assert not row.supervised[:first].any()
        assert row.supervised[first:].all()
    assert rows == gpu_shapes.token_rows(300, 512, 0) != gpu_shapes.token_rows(300, 512, 1)
    assert len({*rows.ids, *gpu_shapes.token_rows(300, 512, 1).ids}) == 600


def test_products_are_those_that_torch_counts():
    """Twice those of a forward of the base, without attention's own."""
    model = gpu_shapes.build("tiny", CPU, 4)
    ids = torch.arange(3, 20)[None]
    with model.model.disable_adapter(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids)
    by_name = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    forward = sum(count for name, count in by_name.items() if name in ("aten.mm", "aten.addmm"))
    assert gpu_shapes.products(model, 17, 17) == 2 * forward > 0
    assert gpu_shapes.products(model, 17, 5) == 2 * forward - 12 * 4 * 64 * 512


def test_a_device_knows_its_peak(monkeypatch):
    device = gpu_shapes.Device.of("cpu")
    assert (device.name, device.stated) == ("CPU", None)
    assert device.peak == device.measured > 1e6
    assert device.peak_bytes is None
