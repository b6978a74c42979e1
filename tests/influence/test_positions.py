"""Documents of a row stay apart, rows are as long as RoPE reaches, and each has its own RoPE."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import influence
from influence.batches import collate
from influence.errors import AdapterError, DataError
from influence.gradients import tape
from influence.loss import check_rows, mean_losses
from influence.positions import documents, length_of, most_positions
from influence.rows import examples_from_rows
from influence.tokens import tokenize
from tests.conftest import add_lora, build_base, build_model, build_tokenizer
from tests.influence.test_gradients import ARCHITECTURES, oracle, streamed

DOCUMENTS = [[4, 9, 11, 5], [7, 3, 3, 20, 8, 12, 6, 10], [13], [5, 6, 7]]


def packed_rows(order=(0, 1, 2, 3)) -> list[dict]:
    """One row of several documents with positions, one of two with lengths, and a plain one."""
    lists = [DOCUMENTS[i] for i in order]
    ids = [token for one in lists for token in one]
    labels = [-100 if i % 3 == 1 else token for i, token in enumerate(ids)]
    positions = [t for one in lists for t in range(len(one))]
    two = {"input_ids": lists[1] + lists[0], "seq_lengths": [len(lists[1]), len(lists[0])]}
    return [
        {"id": "four", "input_ids": ids, "labels": labels, "position_ids": positions},
        {"id": "two", **two},
        {"id": "plain", "input_ids": [4, 5, 6, 7, 8]},
    ]


def apart(rows) -> list[list[dict]]:
    """The documents of `packed_rows` as rows of their own, those of a row in one list."""
    out = []
    for row in rows:
        ids = row["input_ids"]
        labels = row.get("labels", ids)
        lengths = row.get("seq_lengths")
        if "position_ids" in row:
            starts = [t for t, p in enumerate(row["position_ids"]) if p == 0]
            lengths = np.diff([*starts, len(ids)]).tolist()
        parts, start = [], 0
        for size in lengths or [len(ids)]:
            part = slice(start, start + size)
            start += size
            if size > 1 and any(label != -100 for label in labels[part][1:]):
                parts.append({"input_ids": ids[part], "labels": labels[part]})
        out.append(parts)
    return out


def with_attention(kind: str, attention: str):
    base = build_base(kind)
    base.set_attn_implementation(attention)
    return influence.from_peft(add_lora(base).double(), build_tokenizer())


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_packed_rows_equal_the_documents_alone_summed(kind, attention):
    model = with_attention(kind, attention)
    rows = packed_rows()
    tokens = tokenize(examples_from_rows(rows), model.tokenizer)
    check_rows(model, tokens)
    expected = torch.stack(
        [
            oracle(model, tokenize(examples_from_rows(parts), model.tokenizer)).sum(0)
            for parts in apart(rows)
        ]
    )
    assert [len(documents(row)) for row in tokens] == [4, 2, 1]
    for budget in (1, 1000):
        gradients = streamed(model, tokens, token_budget=budget)
        assert (gradients - expected).norm() / expected.norm() < 1e-10
    assert influence.check_gradients(model, examples_from_rows(rows)).ok


def test_a_document_sees_no_other_one(tiny):
    losses = [
        mean_losses(tiny, tokenize(examples_from_rows(packed_rows(order)), tiny.tokenizer))
        for order in ((0, 1, 2, 3), (1, 0, 2, 3))
    ]
    assert abs(losses[0][1] - losses[1][1]) < 1e-12  # the same two documents, the other way round
    assert abs(losses[0][0] - losses[1][0]) > 1e-3  # here other tokens are masked
    unpacked = packed_rows()[1]
    del unpacked["seq_lengths"]
    one = mean_losses(tiny, tokenize(examples_from_rows([unpacked]), tiny.tokenizer))
    assert abs(one[0] - losses[0][1]) > 1e-3


def test_the_last_token_of_a_document_is_followed_by_none(tiny):
    """Its inputs count in no curvature, as those of a row's last token."""
    tokens = tokenize(examples_from_rows(packed_rows()), tiny.tokenizer)
    with tape(tiny) as recorder:
        recorder.forward(collate(tokens, [1]))
    assert recorder.valid[0].tolist() == [True] * 7 + [False] + [True] * 3


def test_models_that_mix_documents_are_refused(tiny, monkeypatch):
    tokens = tokenize(examples_from_rows(packed_rows()), tiny.tokenizer)
    check_rows(tiny, tokens)
    base = tiny.model.get_base_model()
    own = type(base).forward

    def forgetful(self, input_ids=None, position_ids=None, **rest):
        return own(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(base), "forward", forgetful)
    with pytest.raises(AdapterError, match=r"several documents .* does not keep apart .with one"):
        check_rows(tiny, tokens)
    check_rows(tiny, tokens[2:])
    monkeypatch.setattr(type(base), "forward", lambda self, input_ids=None, **rest: None)
    monkeypatch.setattr("influence.positions.accepts", lambda *_: False)
    with pytest.raises(AdapterError, match="its forward takes no position_ids"):
        check_rows(tiny, tokens)


# ---- how long rows may be ------------------------------------------------------------------------

SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.0],
        "long_factor": [1.5, 3.0],
    },
}


def scaled_model(rope: str | None, positions: int = 8):
    from transformers import LlamaConfig, LlamaForCausalLM

    more = {} if rope is None else {"rope_parameters": {"rope_theta": 100.0, **SCALED[rope]}}
    if rope == "longrope":
        more["rope_parameters"]["original_max_position_embeddings"] = positions
    config = LlamaConfig(
        vocab_size=25,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=positions,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).double()
    for parameter in base.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return influence.from_peft(add_lora(base.eval()).double(), build_tokenizer())


def long_rows(*lengths: int):
    generator = np.random.default_rng(0)
    return examples_from_rows(
        [{"input_ids": generator.integers(3, 25, size=length).tolist()} for length in lengths]
    )


@pytest.mark.parametrize(
    ("rope", "most"), [(None, 8), ("linear", 32), ("yarn", 32), ("longrope", 32), ("dynamic", None)]
)
def test_rows_are_as_long_as_rope_reaches(rope, most):
    model = scaled_model(rope)
    assert most_positions(model.model.get_base_model().config) == most
    fits = 60 if most is None else most + 1  # the last token is only a target
    check_rows(model, tokenize(long_rows(fits), model.tokenizer))
    if most is not None:
        with pytest.raises(DataError, match=f"{most + 2} tokens, and the model has {most} pos"):
            check_rows(model, tokenize(long_rows(fits + 1), model.tokenizer))


def test_a_longer_context_than_the_factor_says_is_the_limit():
    config = scaled_model("yarn").model.get_base_model().config
    config.max_position_embeddings = 100  # as llama3's: 131072 where 8 times 8192 were said
    assert most_positions(config) == 100
    assert most_positions(build_model("gpt2").model.get_base_model().config) == 2048
    assert most_positions(SimpleNamespace()) is None


@pytest.mark.parametrize("rope", SCALED)
def test_each_row_has_the_rope_that_it_has_alone(rope):
    """Rows below and beyond the 8 positions of the base, in one batch and one after the other."""
    data = long_rows(20, 5, 9, 30, 7, 8)
    expected = []
    for place in range(len(data)):
        fresh = scaled_model(rope)  # its RoPE has seen no other row
        expected.append(oracle(fresh, tokenize(data.select([place]), fresh.tokenizer))[0])
    model = scaled_model(rope)
    tokens = tokenize(data, model.tokenizer)
    for budget in (1, 1000):
        gradients = streamed(model, tokens, token_budget=budget)
        assert (gradients - torch.stack(expected)).norm() / torch.stack(expected).norm() < 1e-10
    assert influence.check_gradients(model, data).ok
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_the_longest_document_counts_not_the_row():
    (row,) = tokenize(examples_from_rows(packed_rows()[:1]), build_tokenizer())
    assert length_of(row) == max(map(len, DOCUMENTS))
