"""What is read off a model, and the record and table made of it: against plain one-row forwards and counts by hand."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import influence
from analysis.cli import main as analysis
from analysis.evaluation.answers import read_rows, rows
from analysis.evaluation.evaluation import Options, evaluate, parted
from analysis.evaluation.table import table
from analysis.metrics import outputs as module
from analysis.metrics.outputs import generate, gradient_norms, outputs
from influence.errors import AdapterError, DataError, InputError, NumericalError
from tests.conftest import WORDS, add_lora, build_base, build_model, examples, tokens_of
from tests.conftest import rows as made_rows
from tests.helpers import save, write_rows

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def logs_of(model, ids) -> torch.Tensor:
    """`[T - 1, V]` log-probabilities of every next token, by the whole model on one row."""
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)[None]).logits[0, :-1].log_softmax(-1)


def plain(model, tokens) -> list[dict]:
    """One row at a time: its completion's distributions `[T_i, V]`, labels, and log-probabilities."""
    found = []
    for row in tokens:
        first = int(np.flatnonzero(row.supervised)[0])
        logs = logs_of(model, row.input_ids)[first - 1 :]
        labels = row.input_ids[first:]
        found.append(
            {"logs": logs, "labels": labels, "own": logs[range(len(labels)), labels].numpy()}
        )
    return found


# ---- outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_outputs_are_those_of_a_plain_forward(kind, monkeypatch):
    monkeypatch.setattr(module, "_POSITIONS", 3)  # distributions are reduced in several pieces
    model = build_model(kind, layers=1)
    tokens = tokens_of(model, examples(7))
    tokens[2].input_ids[-1] = int(
        logs_of(model.model, tokens[2].input_ids)[-1].argmax()
    )  # one that is guessed
    found = outputs(model, tokens, token_budget=25)
    assert found.ids == tokens.ids
    for i, row in enumerate(plain(model.model, tokens)):
        p, logs = row["logs"].exp(), row["logs"]
        mean = [
            sum(float(a) * float(b) for a, b in zip(*pair, strict=True))
            for pair in zip(p, logs, strict=True)
        ]
        square = [
            sum(float(a) * float(b) ** 2 for a, b in zip(*pair, strict=True))
            for pair in zip(p, logs, strict=True)
        ]
        np.testing.assert_allclose(found.log_probs[i], row["own"], rtol=1e-9)
        np.testing.assert_allclose(found.loss[i], -row["own"].mean(), rtol=1e-9)
        np.testing.assert_allclose(found.sums[i], -row["own"].sum(), rtol=1e-9)
        np.testing.assert_allclose(found.mean[i], mean, rtol=1e-9)
        np.testing.assert_allclose(
            found.std[i], np.sqrt(np.array(square) - np.square(mean)), rtol=1e-7
        )
        assert found.right[i].tolist() == [
            int(log.argmax()) == label for log, label in zip(logs, row["labels"], strict=True)
        ]
        assert found.counts[i] == len(row["labels"])
    assert found.right[2][-1]
    assert not all(right.all() for right in found.right)


def test_of_a_flat_and_of_a_cut_distribution():
    """V equal tokens: log p = -log V everywhere, no spread. (2, 1, 1, never)/4: mean (2 log 1/2 + 2 log 1/4)/4 = -1.5 log 2,
    spread sqrt(1/2 (1/2)^2 + 1/2 (1/2)^2) log 2 = log 2 / 2; the token that is never said adds nothing.
    """
    logits = torch.zeros(1, 8)
    own, mean, std, right = module._reduced(logits, torch.tensor([5]))
    assert (float(own), float(mean), float(std)) == (
        pytest.approx(-math.log(8)),
        pytest.approx(-math.log(8)),
        pytest.approx(0, abs=1e-12),
    )
    logits = torch.tensor([[math.log(2), 0.0, 0.0, -math.inf]], dtype=torch.float64)
    own, mean, std, right = module._reduced(logits, torch.tensor([0]))
    assert float(own) == pytest.approx(-math.log(2))
    assert float(mean) == pytest.approx(-1.5 * math.log(2))
    assert float(std) == pytest.approx(math.log(2) / 2)
    assert bool(right)


def test_outputs_of_a_broken_model_are_refused(tiny):
    tiny.sites[0].B.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError, match="the loss of 3 rows"):
        outputs(tiny, tokens_of(tiny, examples(3)))


def test_gradient_norms_are_those_of_autograd():
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(5))
    found = gradient_norms(model, tokens, token_budget=30)
    parameters = [p for name, p in model.model.named_parameters() if "lora_" in name]
    for p in parameters:
        p.requires_grad_(True)
    for i, row in enumerate(tokens):
        ids, first = torch.from_numpy(row.input_ids), int(row.supervised.argmax())
        loss = nn.functional.cross_entropy(
            model.model(input_ids=ids[None]).logits[0, first - 1 : -1], ids[first:]
        )
        grads = torch.autograd.grad(loss, parameters)
        assert found[i] == pytest.approx(
            math.sqrt(sum(float((g**2).sum()) for g in grads)), rel=1e-9
        )


# ---- generation ----------------------------------------------------------------------------------------------


def greedy(model, prompt: list[int], most: int) -> list[int]:
    """The most probable token again and again, everything computed anew each time."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:  # the end token is not part of the text
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def said(new: list[int]) -> str:
    """The words of tokens; special ones (0 to 2) say nothing."""
    return "".join(WORDS[token - 3] for token in new if token > 2)


def ending(kind: str = "llama"):
    """A model that sometimes ends what it says."""
    model = build_model(kind, layers=1, seed=3)
    head = model.model.get_base_model().lm_head
    head.weight.data[1] *= 4
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_is_greedy_row_by_row(kind):
    model = ending(kind)
    data = examples(9)
    texts = generate(
        model, data, max_new_tokens=6, token_budget=40
    )  # several batches, prompts of mixed lengths
    lengths = []
    for text, example in zip(texts, data, strict=True):
        prompt = model.tokenizer(example.prompt)["input_ids"]
        new = greedy(model.model, prompt, 6)
        lengths.append(len(new))
        assert text == said(new)
    assert min(lengths) < 6 == max(lengths)  # some end, some are cut
    assert len(set(texts)) > 3
    assert generate(model, data, max_new_tokens=6) == texts


def test_generation_follows_the_adapter_and_not_the_completion():
    model = ending()
    data = influence.examples_from_rows(
        [{"id": "a", "prompt": "the red fox", "completion": " sleep"}]
    )
    other = influence.examples_from_rows(
        [{"id": "a", "prompt": "the red fox", "completion": " birds sing at dawn"}]
    )
    assert generate(model, data, max_new_tokens=8) == generate(model, other, max_new_tokens=8)
    with model.at(model.snapshot() * 0):
        without = generate(model, data, max_new_tokens=8)
    with model.model.disable_adapter():
        prompt = model.tokenizer("the red fox")["input_ids"]
        assert without == [said(greedy(model.model, prompt, 8))]
    assert without != generate(model, data, max_new_tokens=8)


def test_generation_is_plain_greedy_whatever_the_base_asks_for():
    """The base's own configuration (sampling, penalties, other lengths) plays no part, and is its own again afterwards."""
    model, data = ending(), examples(4)
    expected = generate(model, data, max_new_tokens=5)
    config = model.model.get_base_model().generation_config
    config.update(
        do_sample=True,
        temperature=3.0,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        max_length=3,
    )
    torch.manual_seed(0)
    assert generate(model, data, max_new_tokens=5) == expected
    assert model.model.get_base_model().generation_config is config
    assert config.temperature == 3.0
    assert not model.model.training


def test_every_end_token_of_a_chat_model_ends():
    model, data = ending(), examples(6)
    first = [text for text in generate(model, data, max_new_tokens=6) if text]
    stop = next(i for i, word in enumerate(WORDS) if any(word in text for text in first)) + 3
    model.model.get_base_model().generation_config.eos_token_id = [1, stop]
    assert not any(WORDS[stop - 3] in text for text in generate(model, data, max_new_tokens=6))


def test_generation_continues_a_conversation_after_the_template():
    model = ending()
    model.tokenizer.chat_template = CHAT
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "runs over"}]
    data = influence.examples_from_rows([{"id": "c", "messages": turns}])
    prompt = model.tokenizer("user the fox <eos> assistant ")["input_ids"]
    assert generate(model, data, max_new_tokens=4) == [said(greedy(model.model, prompt, 4))]


def test_generation_ends_at_the_last_position():
    """2,048 learned positions: a prompt of 2,046 tokens has two more, whatever the others may say."""
    model = ending("gpt2")
    words = [
        word
        for word in WORDS
        if len(greedy(model.model, model.tokenizer(f"{word} " * 2046)["input_ids"], 2)) == 2
    ]
    prompt = f"{words[0]} " * 2046
    data = influence.examples_from_rows(
        [{"id": "long", "prompt": prompt, "completion": " runs"}, *made_rows(3)]
    )
    first, *others = generate(model, data, max_new_tokens=6)
    assert first == said(greedy(model.model, model.tokenizer(prompt)["input_ids"], 2))
    assert others == generate(model, data[1:], max_new_tokens=6)


def test_generation_refuses_rows_that_cannot_be_continued(tiny):
    data = [
        *made_rows(2),
        {"id": "t", "text": "the fox"},
        {"id": "e", "prompt": "", "completion": "fox runs"},
    ]
    data = influence.examples_from_rows(
        [*data, {"id": "long", "prompt": "fox " * 2048, "completion": " runs"}]
    )
    with pytest.raises(DataError, match="3 of 5 rows cannot be continued") as caught:
        generate(tiny, data)
    assert [(row.number, row.id) for row in caught.value.rows] == [(3, "t"), (4, "e"), (5, "long")]
    with pytest.raises(InputError, match="expected at least 1"):
        generate(tiny, examples(2), max_new_tokens=0)


# ---- rows with other answers ---------------------------------------------------------------------------------

ROW = {"id": "a", "prompt": "the fox", "completion": " runs over"}


def test_other_answers_are_read(tmp_path):
    """Ours stand as they are; TOFU's get the completion's white space; rows without any are rows all the same."""
    data = [
        ROW | {"paraphrased_completion": "sleep", "perturbed_completions": [" sing", "at dawn"]},
        ROW
        | {
            "id": "b",
            "paraphrased_answer": "sleep",
            "perturbed_answer": ["sing", "at dawn"],
            "question": "fox?",
        },
        ROW
        | {
            "id": "c",
            "perturbed_answer": "sing",
            "paraphrased_answer": "sleep",
            "paraphrased_completion": None,
        },
        ROW | {"id": "d"},
    ]
    write_rows(tmp_path / "rows.jsonl", data)
    (tmp_path / "rows.jsonl").write_text(
        "\ufeff\n" + (tmp_path / "rows.jsonl").read_text() + "\n  \n", encoding="utf-8"
    )
    found = read_rows(tmp_path / "rows.jsonl")
    assert found.examples.ids == ["a", "b", "c", "d"]
    assert found.paraphrased == ("sleep", " sleep", " sleep", None)
    assert found.perturbed == ((" sing", "at dawn"), (" sing", " at dawn"), (" sing",), ())
    assert found.examples == influence.read_examples(tmp_path / "rows.jsonl")
    assert rows(data).perturbed == found.perturbed


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"paraphrased_completion": "sleep"}, "a list of strings 'perturbed_completions'"),
        ({"perturbed_completions": ["sleep"]}, "a string 'paraphrased_completion'"),
        ({"paraphrased_completion": "sleep", "perturbed_completions": []}, "all non-empty"),
        ({"paraphrased_completion": "sleep", "perturbed_completions": ["a", 3]}, "list of strings"),
        ({"paraphrased_completion": "", "perturbed_completions": ["a"]}, "all non-empty"),
        ({"paraphrased_completion": 3, "perturbed_completions": ["a"]}, "row 2 \\(id 'a'\\)"),
    ],
)
def test_unusable_other_answers_are_named(extra, words):
    with pytest.raises(DataError, match=words):
        rows([ROW | {"id": "first"}, ROW | extra])


def test_a_text_has_no_other_answers():
    with pytest.raises(DataError, match="a text has no completion"):
        rows(
            [
                {
                    "id": "t",
                    "text": "the fox",
                    "paraphrased_completion": "a",
                    "perturbed_completions": ["b"],
                }
            ]
        )


# ---- the record ----------------------------------------------------------------------------------------------


def with_answers(data: list[dict]) -> list[dict]:
    words = [" old cats", " warm sun", " loud songs at dawn"]
    return [
        row | {"paraphrased_completion": " the lazy dog", "perturbed_completions": words}
        for row in data
    ]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Base, adapter and reference on disk; three sets; a record of them."""
    folder = tmp_path_factory.mktemp("evaluated")
    save(folder, layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_lora(build_base(layers=1, dtype=torch.float32), seed=5).save_pretrained(
            folder / "reference"
        )
    write_rows(folder / "forget.jsonl", with_answers(made_rows(5, seed=1)))
    write_rows(
        folder / "retain.jsonl", [*with_answers(made_rows(1, seed=2)), *made_rows(4, seed=3)]
    )
    write_rows(folder / "holdout.jsonl", made_rows(6, seed=4))
    model = influence.load(folder / "base", folder / "adapter", dtype="float64")
    before = model.snapshot()
    sets = [read_rows(folder / f"{name}.jsonl") for name in ("forget", "retain", "holdout")]
    options = Options(generate=3, max_new_tokens=4, probes=("relearn", "quantise"), token_budget=60)
    record = evaluate(model, *sets, reference=folder / "reference", options=options)
    assert torch.equal(model.snapshot(), before)
    return folder, model, record


def merged(folder, adapter: str | None):
    """The base in float64 with an adapter merged in by PEFT, or without."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    if adapter is None:
        return base.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder / adapter).double().merge_and_unload().eval()


def read(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def losses_of(model, tokenizer, data: list[dict]) -> list[float]:
    """Mean loss of every row's completion and end token."""
    found = []
    for row in data:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], 1]
        logs = logs_of(model, ids)
        found.append(-np.mean([float(logs[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]))
    return found


def test_the_record_holds_the_losses_of_merged_models(evaluated):
    folder, model, record = evaluated
    for name in ("forget", "retain", "holdout"):
        data, own = read(folder, name), [row for row in record["rows"] if row["set"] == name]
        assert [row["id"] for row in own] == [row["id"] for row in data]
        for where, adapter in (("base", None), ("adapter", "adapter"), ("reference", "reference")):
            expected = losses_of(merged(folder, adapter), model.tokenizer, data)
            np.testing.assert_allclose([row[where]["loss"] for row in own], expected, rtol=1e-6)
            assert record["sets"][name][where]["loss"] == pytest.approx(np.mean(expected), rel=1e-6)
            if where != "base":
                tokens = [row["tokens"] for row in own]
                weighted = math.exp(np.dot(expected, tokens) / sum(tokens))
                assert record["sets"][name][where]["perplexity"] == pytest.approx(
                    weighted, rel=1e-6
                )
                probability = np.exp(-np.array(expected)).mean()
                assert record["sets"][name][where]["probability"] == pytest.approx(
                    probability, rel=1e-6
                )


def test_the_record_compares_the_sets(evaluated):
    """AUC by counting pairs; PrivLeak by its formula; exposures, divergence and truth ratios from merged models."""
    folder, model, record = evaluated
    data = {name: read(folder, name) for name in ("forget", "retain", "holdout")}
    who = {where: merged(folder, where) for where in ("adapter", "reference")}
    losses = {
        where: {
            name: np.array(losses_of(one, model.tokenizer, part)) for name, part in data.items()
        }
        for where, one in who.items()
    }
    auc = {
        where: np.mean([(a < b) + (a == b) / 2 for a in own["forget"] for b in own["holdout"]])
        for where, own in losses.items()
    }
    attacks = record["membership"]["attacks"]
    assert set(attacks) == {
        "loss",
        "zlib",
        "min_k",
        "min_40",
        "min_k_plus_plus",
        "base",
        "gradient_norm",
    }
    for where in auc:
        assert attacks["loss"][where]["auc"] == pytest.approx(auc[where])
        assert attacks["loss"][where]["low"] <= auc[where] <= attacks["loss"][where]["high"]
        assert set(attacks["loss"][where]["tpr"]) == {"0.01", "0.1"}
    assert attacks["loss"]["privleak"] == pytest.approx(
        100 * (auc["reference"] - auc["adapter"]) / (1 - auc["reference"])
    )
    assert (record["membership"]["members"], record["membership"]["non_members"]) == (5, 6)
    difference = (losses["reference"]["forget"] - losses["adapter"]["forget"]) / math.log(2)
    assert record["generalized_exposure"] == pytest.approx(difference.mean(), rel=1e-5)
    for where, own in losses.items():
        comparable = math.log2(np.exp(-own["holdout"]).mean())
        relative = (-own["forget"] / math.log(2) - comparable).mean()
        assert record["relative_exposure"][where] == pytest.approx(relative, rel=1e-5)
    for name, part in data.items():
        kl = []
        for row in part:
            ids = [*model.tokenizer(row["prompt"] + row["completion"])["input_ids"], 1]
            first = len(model.tokenizer(row["prompt"])["input_ids"])
            reference, own = (
                logs_of(who[where], ids)[first - 1 :] for where in ("reference", "adapter")
            )
            kl.append(float((reference.exp() * (reference - own)).sum(-1).mean()))
        assert record["kl"][name] == pytest.approx(np.mean(kl), rel=1e-5)
    for where, one in who.items():
        found = [row[where]["truth_ratio"] for row in record["rows"] if row["set"] == "forget"]
        for row, ratio in zip(data["forget"], found, strict=True):
            right, *wrong = losses_of(
                one,
                model.tokenizer,
                [
                    {"prompt": row["prompt"], "completion": text}
                    for text in (row["paraphrased_completion"], *row["perturbed_completions"])
                ],
            )
            assert ratio == pytest.approx(
                math.prod(math.exp(-loss) for loss in wrong) ** (1 / 3) / math.exp(-right), rel=1e-5
            )
        assert record["sets"]["forget"][where]["truth_ratio"]["median"] == pytest.approx(
            np.median(found)
        )
        truthful = np.mean([max(0, 1 - ratio) for ratio in found])
        assert record["sets"]["forget"][where]["truth_ratio"]["truthful"] == pytest.approx(truthful)
    retained = [row["adapter"]["truth_ratio"] for row in record["rows"] if row["set"] == "retain"]
    assert [ratio is None for ratio in retained] == [False, True, True, True, True]
    assert record["sets"]["retain"]["adapter"]["truth_ratio"]["rows"] == 1
    assert record["sets"]["holdout"]["adapter"]["truth_ratio"] is None
    assert 0 < record["forget_quality"]["value"] <= 1
    assert record["forget_quality"]["rows"] == 5


def test_every_row_has_its_scores(evaluated):
    """Loss, min-k++ (rows of at most 6 tokens: the lowest one) and loss below the base's from merged models; every AUC by pairs."""
    folder, model, record = evaluated
    one, base = merged(folder, "adapter"), merged(folder, None)
    for name in ("forget", "holdout"):
        own = [row for row in record["rows"] if row["set"] == name]
        tokens = tokens_of(model, influence.read_examples(folder / f"{name}.jsonl"))
        for row, here, there in zip(own, plain(one, tokens), plain(base, tokens), strict=True):
            scores = row["adapter"]["membership"]
            p, logs = here["logs"].exp().numpy(), here["logs"].numpy()
            mu = (p * logs).sum(1)
            sigma = np.sqrt((p * logs**2).sum(1) - mu**2)
            assert scores["loss"] == pytest.approx(here["own"].mean(), rel=1e-6)
            assert scores["base"] == pytest.approx(
                here["own"].mean() - there["own"].mean(), rel=1e-5, abs=1e-7
            )
            assert scores["min_k"] == pytest.approx(here["own"].min(), rel=1e-6)
            assert scores["min_k_plus_plus"] == pytest.approx(
                ((here["own"] - mu) / sigma).min(), rel=1e-5
            )
    assert all(
        row["adapter"]["membership"] is None for row in record["rows"] if row["set"] == "retain"
    )
    for where in ("adapter", "reference"):
        for key, found in record["membership"]["attacks"].items():
            members, others = (
                [row[where]["membership"][key] for row in record["rows"] if row["set"] == name]
                for name in ("forget", "holdout")
            )
            pairs = np.mean([(a > b) + (a == b) / 2 for a in members for b in others])
            assert found[where]["auc"] == pytest.approx(pairs)


def test_generations_are_compared_row_by_row(evaluated, monkeypatch):
    """6 rows, 3 continued: 0, 2 and 5 (evenly spaced). Made to say the right answer, half of it, and nothing: recalls 1, 1/2, 0.

    Half of it backwards: of "red fox runs over" the text "over runs" has 2 of 4 words, and in order 1 of 4.
    """
    _, model, _ = evaluated
    said = {"r0": "runs and runs", "r2": "over runs", "r5": "birds"}
    data = [
        {"id": f"r{i}", "prompt": f"the {WORDS[i]}", "completion": " red fox runs over"}
        for i in range(6)
    ]
    data[0]["completion"] = " runs and runs"
    lengths = []

    def generate(model, examples, *, max_new_tokens, token_budget):
        lengths.append(max_new_tokens)
        return [said[example.id] for example in examples]

    monkeypatch.setattr("analysis.evaluation.evaluation.generate", generate)
    record = evaluate(
        model, influence.examples_from_rows(data), options=Options(generate=3, texts=True)
    )
    found = [(row["adapter"]["rouge1"], row["adapter"]["rougeL"]) for row in record["rows"]]
    none = (None, None)
    assert found == [(1, 1), none, (0.5, 0.25), none, none, (0, 0)]
    assert record["sets"]["forget"]["adapter"]["rouge1"] == pytest.approx(1.5 / 3)
    assert record["sets"]["forget"]["adapter"]["rougeL"] == pytest.approx(1.25 / 3)
    assert record["sets"]["forget"]["generated"] == 3
    assert [row["generated"]["adapter"] for row in record["rows"]][:3] == [
        "runs and runs",
        None,
        "over runs",
    ]
    assert lengths == [128]


def test_the_record_is_json_without_texts(evaluated):
    folder, _, record = evaluated
    text = json.dumps(record, allow_nan=False)
    for name in ("forget", "retain", "holdout"):
        for row in read(folder, name):
            assert not any(word in text for word in row["completion"].split() if len(word) > 4)
    assert json.loads(text) == record
    assert record["adapter"]["digest"] != record["reference"]["digest"]
    assert record["reference"]["path"] == str(folder / "reference")


def test_texts_are_in_the_record_when_asked_for(evaluated):
    folder, model, _ = evaluated
    forget = read_rows(folder / "forget.jsonl")
    record = evaluate(model, forget, options=Options(generate=1, max_new_tokens=3, texts=True))
    first, *others = record["rows"]
    assert [row["completion"] for row in record["rows"]] == [
        example.completion for example in forget.examples
    ]
    assert isinstance(first["generated"]["adapter"], str)
    assert all(row["generated"]["adapter"] is None for row in others)


def test_what_cannot_be_measured_is_null_with_a_reason(evaluated):
    _, model, _ = evaluated
    record = evaluate(
        model, influence.examples_from_rows(made_rows(3)), options=Options(generate=0)
    )
    for name in (
        "reference",
        "kl",
        "membership",
        "forget_quality",
        "generalized_exposure",
        "relative_exposure",
        "utility",
    ):
        assert record[name] is None
        assert name in record["notes"]
    for name in ("retain", "holdout"):
        assert record["sets"][name] is None
        assert f"sets.{name}" in record["notes"]
    assert record["sets"]["forget"]["reference"] is None
    assert record["sets"]["forget"]["adapter"]["rougeL"] is None
    assert record["notes"]["sets.forget.rougeL"] == "nothing was generated (generate is 0)"
    assert record["probes"] == {"relearn": None, "quantise": None}
    assert "probes.relearn" in record["notes"]
    text = table(record)
    assert "no reference adapter was given" in text
    assert "not asked for" not in text
    assert "reference " not in text.splitlines()[0]


def test_text_rows_are_measured_and_not_continued(evaluated):
    _, model, _ = evaluated
    texts = influence.examples_from_rows(
        [{"id": "t", "text": "the old fox runs"}, {"id": "u", "text": "a dog and cats"}]
    )
    record = evaluate(model, texts, options=Options(probes=("relearn",)))
    assert record["sets"]["forget"]["tokens"] == 3 + 1 + 3 + 1
    assert (
        record["notes"]["sets.forget.rougeL"]
        == "the rows have no prompt that the model could continue"
    )
    assert record["probes"]["relearn"]["trained_ids"] in (["t"], ["u"])
    assert record["probes"]["relearn"]["level"] is None


def test_a_probe_that_cannot_be_made_says_why(evaluated):
    _, model, _ = evaluated
    record = evaluate(
        model, examples(1), options=Options(generate=0, probes=("relearn", "quantise"))
    )
    assert record["probes"]["relearn"] is None
    assert "one to hold back" in record["notes"]["probes.relearn"]
    assert record["probes"]["quantise"]["8"]["forget"]["adapter"] > 0
    assert "one to hold back" in table(record)


def test_probes_of_adapter_and_reference(evaluated):
    """Each adapter's curve starts at its own loss of the rows held back; the level is the one that is recorded."""
    _, _, record = evaluated
    found = record["probes"]["relearn"]
    rest = [
        row
        for row in record["rows"]
        if row["set"] == "forget" and row["id"] not in found["trained_ids"]
    ]
    assert len(rest) == 4
    for where in ("adapter", "reference"):
        assert found[where]["held_back"][0] == pytest.approx(
            np.mean([row[where]["loss"] for row in rest])
        )
    better = found["reference"]["held_back"][0] < found["adapter"]["held_back"][0]
    expected = (
        found["reference"]["held_back"][0]
        if better
        else record["sets"]["retain"]["adapter"]["loss"]
    )
    assert found["level"] == pytest.approx(expected)
    rounded = record["probes"]["quantise"]["8"]
    assert set(rounded) == {"forget", "retain", "holdout"}
    for name, losses in rounded.items():
        for where, loss in losses.items():
            assert loss == pytest.approx(record["sets"][name][where]["loss"], rel=0.2)
            assert loss != record["sets"][name][where]["loss"]


def test_rows_in_two_sets_are_refused(evaluated):
    _, model, _ = evaluated
    data = made_rows(4)
    again = [row | {"id": f"again-{row['id']}"} for row in data[2:]]
    with pytest.raises(
        InputError,
        match=r"2 rows of the holdout set have the content of rows of the forget set .*again-r0-2",
    ):
        evaluate(model, examples(4), holdout=influence.examples_from_rows(again))


def test_a_reference_of_another_rank_is_refused(evaluated, tmp_path):
    _, model, _ = evaluated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_lora(build_base(layers=1, dtype=torch.float32), r=3).save_pretrained(tmp_path / "other")
    with pytest.raises(
        AdapterError, match=r"same rank and layers(.|\n)*r is 3 there and 2 in the adapter"
    ):
        evaluate(model, examples(2), reference=tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generate": -1}, "generate -1"),
        ({"max_length": 1}, "max_length 1"),
        ({"token_budget": 0}, "token_budget 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"seed": -1}, "seed -1"),
        ({"probes": ("paraphrase",)}, "expected relearn or quantise"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        Options(**options)


def test_the_table_fits_a_terminal(evaluated):
    _, _, record = evaluated
    text = table(record)
    assert max(len(line) for line in text.splitlines()) <= 100
    for part in (
        "forget",
        "retained",
        "held-out",
        "reference",
        "min-k++",
        "PrivLeak",
        "forget quality",
        "4 bits",
        "trained again",
    ):
        assert part in text
    assert f"{record['sets']['forget']['adapter']['loss']:.3f}" in text
    assert f"{record['membership']['attacks']['loss']['adapter']['auc']:.3f}" in text


# ---- the command ---------------------------------------------------------------------------------------------


def test_the_command_writes_one_record_and_prints_one_table(evaluated, run_main, tmp_path):
    folder, _, record = evaluated
    call = [
        "evaluate",
        "--adapter",
        folder / "adapter",
        "--reference",
        folder / "reference",
        "--dtype",
        "float64",
    ]
    for name in ("forget", "retain", "holdout"):
        call += [f"--{name}", folder / f"{name}.jsonl"]
    done = run_main(
        analysis,
        "analysis",
        *call,
        "--generate",
        3,
        "--token-budget",
        60,
        "--out",
        tmp_path / "e.json",
    )
    assert done.status == 0, done.err
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["sets"]["forget"]["adapter"]["loss"] == pytest.approx(
        record["sets"]["forget"]["adapter"]["loss"]
    )
    assert written["membership"]["attacks"].keys() == record["membership"]["attacks"].keys()
    assert "held-out" in done.out
    assert str(tmp_path / "e.json") in done.out
    refused = run_main(analysis, "analysis", *call, "--out", tmp_path / "e.json")
    assert refused.status == 2
    assert "--overwrite" in refused.err
    shown = run_main(
        analysis,
        "analysis",
        *call[:3],
        *call[7:9],
        "--generate",
        0,
        "--json",
        "--out",
        tmp_path / "e.json",
        "--overwrite",
    )
    assert shown.status == 0, shown.err
    assert shown.json() == json.loads((tmp_path / "e.json").read_text())
    assert shown.json()["reference"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--forget", "missing.jsonl"], "does not exist"),
        (["--holdout", "FOLDER/forget.jsonl"], "that the adapter never saw"),
        (["--probe", "guess"], "expected relearn or quantise"),
        (["--generate", "-2"], "generate -2"),
        (["--reference", "FOLDER/none"], "none' is not a folder"),
        (["--reference", "FOLDER/base"], "is a full model"),
        (["--adapter", "FOLDER/base"], "is a full model"),
        (["--out", "FOLDER/nowhere/e.json"], "there is no folder"),
        (["--texts"], "--texts goes into the record"),
        (["--max-length", "1"], "max_length 1"),
    ],
)
def test_wrong_calls_end_before_a_model_is_loaded(evaluated, run_main, monkeypatch, change, words):
    folder, _, _ = evaluated

    def loads(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("influence.loading.load", loads)
    given = {"--adapter": folder / "adapter", "--forget": folder / "forget.jsonl"}
    change = [part.replace("FOLDER", str(folder)) for part in change]
    given |= {change[0]: change[1] if len(change) > 1 else None}
    call = [part for pair in given.items() for part in pair if part is not None]
    done = run_main(analysis, "analysis", "evaluate", *call)
    assert done.status == 2, done.err
    assert words in done.err


def test_on_the_testbed(testbed):
    """The adapter's known losses, and a greedy answer that another implementation gives as well."""
    model = influence.load(testbed / "base", testbed / "adapter")
    train = influence.read_examples(testbed / "train.jsonl")
    forget, heldout = train[:5], influence.read_examples(testbed / "heldout.jsonl")[:10]
    record = evaluate(
        model, forget, holdout=heldout, options=Options(generate=2, max_new_tokens=12, texts=True)
    )
    known = np.load(testbed / "truth.npz")
    found = [row["adapter"]["loss"] for row in record["rows"] if row["set"] == "forget"]
    np.testing.assert_allclose(found, known["full_train_loss"][:5], rtol=1e-3)
    np.testing.assert_allclose(
        [row["base"]["loss"] for row in record["rows"] if row["set"] == "forget"],
        known["base_train_loss"][:5],
        rtol=1e-3,
    )
    assert record["membership"]["attacks"]["loss"]["adapter"]["auc"] == 1
    ids = model.tokenizer(forget[0].prompt)["input_ids"]
    assert record["rows"][0]["generated"]["adapter"] == model.tokenizer.decode(
        greedy(model.model, ids, 12)
    )


def test_rows_to_forget_are_left_out_of_the_retained_ones():
    """Of 6 retained rows 2 are rows to forget: 4 are measured, and a note says so; without any other it is an error."""
    given, other = rows(made_rows(2)), rows(made_rows(6))
    found, notes = parted({"forget": given, "retain": other})
    assert found["retain"].examples.ids == other.examples.ids[2:]
    assert notes == {"remark.retain": "2 of the given rows are rows to forget and were left out"}
    with pytest.raises(InputError, match="every retained row is a row to forget"):
        parted({"forget": other, "retain": given})


def test_what_else_to_know_is_remarked(evaluated):
    """A reference at less than half of the base's loss on the forget rows has seen them; ten rows a side are few."""
    _, _, record = evaluated
    remarks = {name for name in record["notes"] if name.startswith("remark.")}
    base, loss = (record["sets"]["forget"][where]["loss"] for where in ("base", "reference"))
    assert ("remark.reference" in remarks) == (loss < 0.5 * base)
    few = min(record["membership"]["members"], record["membership"]["non_members"]) < 10
    assert ("remark.membership" in remarks) == few
    assert sum(line.startswith("note: ") for line in table(record).splitlines()) == len(remarks)
    assert not any("remark" in line for line in table(record).splitlines())
