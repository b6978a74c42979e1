"""Which tokenizer is taken: that beside the adapter where it is whole, else the base's."""

from __future__ import annotations

import contextlib
import json

import pytest

import influence
from influence.errors import AdapterError, DataError
from influence.tokens import tokenize
from tests.conftest import build_tokenizer
from tests.helpers import save
from tests.influence.toy_loading import LLAMA, unloadable

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
MESSAGES = [
    {
        "id": "0",
        "messages": [
            {"role": "user", "content": "the red fox"},
            {"role": "assistant", "content": "runs"},
        ],
    }
]


def with_tokens(*new: str, template: str | None = None):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(new))
    tokenizer.chat_template = template
    return tokenizer


def test_the_tokenizer_beside_the_adapter_is_taken(tmp_path):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    assert len(influence.load(base, adapter, device="cpu").tokenizer) == 25
    with_tokens("<new>").save_pretrained(adapter)
    assert len(influence.load(base, adapter, device="cpu").tokenizer) == 26


def test_a_part_of_one_beside_the_adapter_leaves_that_of_the_base(tmp_path, capfd):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    with_tokens("<new>").save_pretrained(adapter)
    (adapter / "tokenizer.json").unlink()
    loaded = influence.load(base, adapter, device="cpu")
    assert len(loaded.tokenizer) == 25
    said = capfd.readouterr().err
    assert "a tokenizer_config.json without a vocabulary: the tokenizer of the base" in said


def test_a_template_that_only_the_base_has_is_said_and_not_taken(tmp_path, capfd):
    """Training may have rendered its rows otherwise, so none is put in the place of the other."""
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    with_tokens(template=CHAT).save_pretrained(base)
    with_tokens("<new>").save_pretrained(adapter)
    loaded = influence.load(base, adapter, device="cpu")
    assert "beside the adapter, which has no chat template; that of the base" in (
        capfd.readouterr().err
    )
    with pytest.raises(DataError, match="adapter has no chat template"):
        tokenize(influence.examples_from_rows(MESSAGES), loaded.tokenizer)
    with_tokens("<new>", template=CHAT).save_pretrained(adapter)
    influence.load(base, adapter, device="cpu")
    assert "chat template" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config.update(tokenizer_class="NoSuchTokenizer"),
        lambda config: config.update(added_tokens_decoder={"x": 3}),
        lambda config: config.update(eos_token=[1]),
    ],
)
def test_whatever_the_tokenizer_raises_is_a_sentence_or_it_works(tmp_path, spoil):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    spoil(config)
    path.write_text(json.dumps(config))
    with contextlib.suppress(AdapterError):
        influence.load(base, adapter, device="cpu")


def test_an_unreadable_tokenizer_is_a_sentence(tmp_path):
    base, adapter = save(tmp_path, layers=1, **LLAMA)
    (base / "tokenizer.json").write_text("{")
    unloadable(base, adapter, "no tokenizer could be loaded from .*Save one beside the base")
