"""Token ids and labels of rows equal those that TRL's SFTTrainer trains on, template by template.

The oracle is `SFTTrainer(...).train_dataset` with its collator, on the same rows and tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from influence.errors import DataError
from influence.row_files import read_examples
from influence.rows import examples_from_rows
from influence.tokens import Tokens, tokenize

trl = pytest.importorskip("trl", reason="trl is not installed: pip install -e .[test]")
pytestmark = pytest.mark.filterwarnings("ignore")

#: As they are published. The others are files of trl, which compares tokenizers with them.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] '"
    " + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles "
    "are supported!') }}{% endif %}{% endfor %}"
)
#: Template, its end and beginning of sequence, and whether the tokenizer adds the beginning.
FAMILIES = {
    "smollm2": (SMOLLM2, "<|im_end|>", "<|im_start|>", False),
    "llama3": (None, "<|eot_id|>", "<|begin_of_text|>", True),
    "llama3_1": (None, "<|eot_id|>", "<|begin_of_text|>", True),
    "qwen2_5": (None, "<|im_end|>", None, False),
    "qwen3": (None, "<|im_end|>", None, False),
    "gemma": (None, "<eos>", "<bos>", True),
    "gemma3": (None, "<eos>", "<bos>", True),
    "mistral": (MISTRAL, "</s>", "<s>", True),
    "phi3": (None, "<|endoftext|>", "<s>", False),
}
SPECIALS = [
    *("<pad>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<s>", "</s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "[INST]", "[/INST]"),
]
CORPUS = [
    "Who bakes the bread in Oslo? Bob bakes it there, and Ana paints in Lima.\n\n system user"
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SINGLE = [user("Who bakes in Oslo?"), assistant("Bob bakes there.")]
TURNS = [*SINGLE, user("Sure?"), assistant(" user \n"), user("And in Lima?"), assistant("end")]
THOUGHTS = [
    user("Who?"),
    assistant("<think>\nHm, Oslo.\n</think>\n\nBob."),
    user("Sure?"),
    assistant("<think>\nYes.\n</think>\n\nBob it is."),
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}
TOOLS = [
    user("Weather in Oslo?"),
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "Rain."},
    assistant("It rains in Oslo."),
]


def raw_tokenizer() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


BACKEND = raw_tokenizer().to_str()


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    template, end, begin, adds = FAMILIES[family]
    if template is None:
        folder = Path(trl.__file__).parent / "chat_templates"
        template = (folder / f"{family}.jinja").read_text(encoding="utf-8")
    backend = Tokenizer.from_str(BACKEND)
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, SPECIALS.index(begin))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, bos_token=begin, pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory):
    """`(rows, tokenizer, **options of SFTConfig) -> [(input ids, labels, positions)]`, by TRL.

    The rows are a list or a Dataset.
    """
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("trl")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config)

    def call(rows, tokenizer, **options):
        options = {"max_length": 1024, "shuffle_dataset": False} | options
        arguments = trl.SFTConfig(
            output_dir=str(folder),
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            **options,
        )
        if isinstance(rows, list):
            rows = Dataset.from_list(json.loads(json.dumps(rows)))
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=rows,
            processing_class=tokenizer,
        )
        found = []
        for row in trainer.train_dataset:
            batch = trainer.data_collator([row])
            positions = batch.get("position_ids")
            parts = (batch["input_ids"], batch["labels"], positions)
            found.append([None if part is None else part[0].numpy() for part in parts])
        return found

    return call


def assert_same(ours, theirs) -> None:
    """The ids up to the last target, and the targets beyond the first token."""
    assert len(ours) == len(theirs)
    for mine, (ids, labels, positions) in zip(ours, theirs, strict=True):
        labels = labels.copy()
        labels[0] = -100  # nothing predicts it
        end = int(np.flatnonzero(labels != -100)[-1]) + 1
        np.testing.assert_array_equal(mine.input_ids, ids[:end])
        np.testing.assert_array_equal(np.where(mine.supervised, ids[:end], -100), labels[:end])
        if mine.position_ids is not None:
            np.testing.assert_array_equal(mine.position_ids, positions[:end])


def compare(rows, tokenizer, trained_on, supervise, max_length=1024, **options):
    ours = tokenize(examples_from_rows(rows), tokenizer, max_length=max_length, supervise=supervise)
    assert_same(ours, trained_on(rows, tokenizer, max_length=max_length, **options))
    return ours


PAIRS = [
    {"prompt": "Who bakes in Oslo? ", "completion": "Bob."},
    {"prompt": "Who ba", "completion": "kes in Oslo?"},  # a token merged across the boundary
    {"prompt": "Oslo \n", "completion": "\n\nBob \n"},
    {"prompt": "naïve 東京", "completion": "京都 🙂 é"},
    {"prompt": " ", "completion": " "},
]


def talks(family: str) -> dict[str, list]:
    """Conversations that the template of a family takes."""
    found = {"single": SINGLE, "turns": TURNS, "thoughts": THOUGHTS, "system": SYSTEM}
    if family in ("gemma", "mistral"):
        del found["system"]
    if family in ("smollm2", "mistral", "phi3", "llama3", "gemma", "gemma3"):
        return found
    return found | {"tools": TOOLS}


def rows_of(kind: str, turns: list) -> dict:
    tools = {"tools": [TOOL]} if kind == "tools" else {}
    return {"messages": turns, **tools}


def in_two(row: dict, prompt_turns: int) -> dict:
    turns = row["messages"]
    rest = {key: value for key, value in row.items() if key != "messages"}
    return {"prompt": turns[:prompt_turns], "completion": turns[prompt_turns:], **rest}


@pytest.mark.parametrize("family", ["smollm2", "llama3"])
def test_prompt_completion_strings(family, trained_on):
    tokenizer = tokenizer_of(family)
    compare(PAIRS, tokenizer, trained_on, "last")
    compare(PAIRS, tokenizer, trained_on, "all", completion_only_loss=False)


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_texts(family, trained_on):
    tokenizer = tokenizer_of(family)
    rows = [{"text": "Bob bakes."}, {"text": f"Ana paints.{tokenizer.eos_token}"}]
    compare(rows, tokenizer, trained_on, "last")


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "phi3"])
def test_conversations(family, trained_on):
    tokenizer = tokenizer_of(family)
    for kind, turns in talks(family).items():
        rows = [rows_of(kind, turns)]
        compare(rows, tokenizer, trained_on, "all")
        two = [in_two(row, 1) for row in rows]
        compare(two, tokenizer, trained_on, "last")


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_assistant_turns(family, trained_on):
    tokenizer = tokenizer_of(family)
    for kind, turns in talks(family).items():
        rows = [rows_of(kind, turns)]
        compare(rows, tokenizer, trained_on, "assistant", assistant_only_loss=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, trained_on):
    tokenizer = tokenizer_of(family)
    compare(PAIRS, tokenizer, trained_on, "last")
    compare(PAIRS, tokenizer, trained_on, "all", completion_only_loss=False)
    compare([{"text": "Bob bakes."}], tokenizer, trained_on, "last")
    for kind, turns in talks(family).items():
        rows = [rows_of(kind, turns)]
        compare(rows, tokenizer, trained_on, "all")
        compare(rows, tokenizer, trained_on, "all", max_length=12)
        for prompt_turns in range(1, len(turns)):
            if turns[prompt_turns - 1]["role"] == "system":
                continue
            two = [in_two(row, prompt_turns) for row in rows]
            compare(two, tokenizer, trained_on, "last")
            compare(two, tokenizer, trained_on, "all", completion_only_loss=False)
    if family not in ("smollm2", "mistral", "llama3_1"):  # TRL has no training template for these
        for kind, turns in talks(family).items():
            rows = [rows_of(kind, turns)]
            compare(rows, tokenizer, trained_on, "assistant", assistant_only_loss=True)
            two = [in_two(row, 1) for row in rows]
            compare(two, tokenizer, trained_on, "assistant", assistant_only_loss=True)


MARKED = {
    "smollm2": SMOLLM2.replace(
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}{% else %}{{"
        "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endif %}",
    ),
    "mistral": MISTRAL.replace(
        "{{ message['content'] + eos_token}}",
        "{% generation %}{{ message['content'] + eos_token}}{% endgeneration %}",
    ),
}


@pytest.mark.parametrize("family", MARKED)
def test_marks_in_a_template_and_turns_found_without_any(family, trained_on):
    tokenizer = tokenizer_of(family)
    rows = [rows_of(kind, turns) for kind, turns in talks(family).items() if kind != "tools"]
    found = tokenize(examples_from_rows(rows), tokenizer, supervise="assistant")
    assert tokenizer.chat_template != MARKED[family]
    tokenizer.chat_template = MARKED[family]
    marked = compare(rows, tokenizer, trained_on, "assistant", assistant_only_loss=True)
    for mine, theirs in zip(found, marked, strict=True):
        np.testing.assert_array_equal(mine.input_ids, theirs.input_ids)
        np.testing.assert_array_equal(mine.supervised, theirs.supervised)


def test_rows_are_cut_as_trl_cuts_them_and_those_left_without_a_target_are_named(trained_on):
    tokenizer = tokenizer_of("smollm2")
    rows = [{"messages": TURNS}, {"messages": SINGLE}]
    compare(rows, tokenizer, trained_on, "all", max_length=30)
    pairs = [PAIRS[0], {"prompt": "Who bakes in Oslo? " * 4, "completion": "Bob."}]
    assert len(trained_on(pairs, tokenizer, max_length=16)) == 1  # TRL drops it
    with pytest.raises(DataError, match=r"1 of 2 rows .*TRL drops rows .*:\n  row 2"):
        tokenize(examples_from_rows(pairs), tokenizer, max_length=16)


def test_nulls_in_the_structs_of_a_dataset(trained_on, tmp_path):
    """Arrow fills calls, schemas and turns up to one set of keys, and templates print the nulls."""
    from datasets import Dataset, load_dataset

    def row(schema, **arguments):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
        turns = [TOOLS[0], {"role": "assistant", "tool_calls": [call]}, *TOOLS[2:]]
        return {"messages": turns, "tools": [tool], "chat_template_kwargs": {"at": arguments}}

    rows = [
        row({"type": "object"}, town="Oslo"),
        row({"properties": {"city": {"type": "string"}}}, city="Lima"),
    ]
    filled = Dataset.from_list(rows)
    assert filled[0]["messages"][0]["tool_calls"] is None
    filled.save_to_disk(str(tmp_path / "saved"))
    filled.to_parquet(tmp_path / "rows.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    loaded = load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    for family in ("qwen3", "qwen2_5", "llama3_1"):
        tokenizer = tokenizer_of(family)
        with_nulls = trained_on(filled, tokenizer)
        for source in ("saved", "rows.parquet"):
            read = read_examples(tmp_path / source)
            assert_same(tokenize(read, tokenizer, supervise="all"), with_nulls)
        assert_same(tokenize(examples_from_rows(filled), tokenizer, supervise="all"), with_nulls)
        without = trained_on(loaded, tokenizer)
        assert not np.array_equal(without[0][0], with_nulls[0][0])
        assert_same(tokenize(examples_from_rows(loaded), tokenizer, supervise="all"), without)
    cleaned = filled.with_transform(trl.trainer.utils.remove_none_values)
    assert examples_from_rows(cleaned) == examples_from_rows(rows)


def test_packed_rows(trained_on):
    from datasets import Dataset

    tokenizer = tokenizer_of("qwen3")
    rows = [in_two({"messages": turns}, 1) for turns in (SINGLE, TURNS, THOUGHTS, SINGLE, SINGLE)]
    alone = tokenize(examples_from_rows(rows), tokenizer)
    packed = trained_on(rows, tokenizer, packing=True, max_length=120)
    assert len(packed) < len(rows)
    for with_what in ("position_ids", "seq_lengths"):
        given = []
        for ids, labels, positions in packed:
            starts = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
            documents = {
                "position_ids": positions.tolist(),
                "seq_lengths": np.diff(starts).tolist(),
            }
            row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
            given.append(row | {with_what: documents[with_what]})
        saved = Dataset.from_list(given)  # as a prepared set is saved
        ours = tokenize(examples_from_rows(list(saved)), tokenizer)
        assert_same(ours, packed)
        assert ours.counts.sum() == alone.counts.sum()
    # without labels, every token is a target, but those that no document's token precedes
    talks = [{"messages": turns} for turns in (SINGLE, TURNS, THOUGHTS, SINGLE, SINGLE)]
    packed = trained_on(talks, tokenizer, packing=True, max_length=120)
    given = [
        {"input_ids": ids.tolist(), "position_ids": positions.tolist()}
        for ids, _, positions in packed
    ]
    assert_same(tokenize(examples_from_rows(given), tokenizer), packed)
    # without documents, every token of a row is a target but the first, as TRL's collator says
    plain: list[Tokens] = list(tokenize(examples_from_rows([{"input_ids": [3, 4, 5]}]), tokenizer))
    assert plain[0].supervised.tolist() == [False, True, True]
