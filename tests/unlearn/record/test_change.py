"""What may be asked of an edit, and what is refused before any work, with which sentence."""

from __future__ import annotations

import numpy as np
import pytest

import influence
import unlearn
from influence.errors import DataError, InputError
from influence.rows import Examples
from influence.tokens import tokenize
from tests.conftest import build_model, examples, fit_end
from tests.helpers import untouched
from tests.unlearn.record.helpers import ROWS
from unlearn.record.change import plan, say_copies
from unlearn.record.version import version

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = build_model("gpt2", layers=1, target_modules=["mlp.c_proj"], r=1)
    model.tokenizer.chat_template = CHAT
    data = influence.examples_from_rows(ROWS)
    return fit_end(
        model,
        data,
        curvature=influence.Identity(),
        directory=tmp_path_factory.mktemp("requests") / "run",
    )


def refused(run, message, error=InputError, **changes):
    """The plan and the edit refuse the call with this sentence, and no file of the run changes."""
    with untouched(run.directory):
        with pytest.raises(error, match=message):
            plan(version(run), **changes)
        with pytest.raises(error, match=message):
            unlearn.edit(run, **changes)


def test_identical_copies_of_removed_rows_that_stay_are_named(tmp_path, capfd):
    model = build_model("gpt2", layers=1, target_modules=["mlp.c_proj"], r=1)
    model.tokenizer.chat_template = CHAT
    copies = [{**ROWS[0], "id": name} for name in ("copy", "copy 2")]
    data = influence.examples_from_rows([*ROWS, *copies])
    run = fit_end(model, data, curvature=influence.Identity(), directory=tmp_path / "run")
    start, first = version(run), data.ids[0]
    capfd.readouterr()
    say_copies(plan(start, [first, "copy"]))
    assert capfd.readouterr().err.splitlines() == [
        f"note: {id!r} is removed, and its identical copy 'copy 2' stays: the adapter is still "
        "trained on that content. Name both where the content is to go"
        for id in (first, "copy")
    ]
    say_copies(plan(start, [first, "copy", "copy 2"]))
    say_copies(plan(start, [data.ids[1]]))
    assert capfd.readouterr().err == ""
    unlearn.forecast(run, remove=["copy"])  # whoever edits is told
    assert f"its 2 identical copies {first!r}, 'copy 2' stay: " in capfd.readouterr().err


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, InputError, "no change was asked for: name at least one row"),
        ({"relabel": {}, "correct": {}}, InputError, "no change was asked for"),
        (
            {"remove": ["a11"]},
            DataError,
            r"no example has the id 'a11', among 5; the nearest are .*a1",
        ),
        ({"relabel": {"zzz": " runs"}}, DataError, "no example has the id 'zzz'"),
        (
            {"remove": ["a1", "a2", "a1"]},
            InputError,
            "ids are given more than once: 'a1'; name each row once",
        ),
        ({"remove": ["a1"], "relabel": {"a1": " sleep"}}, InputError, "given more than once: 'a1'"),
        (
            {"relabel": {"a1": " runs"}},
            InputError,
            "relabel of 'a1' changes nothing: the row has this content already",
        ),
        (
            {"correct": {"a1": {"prompt": "the red fox"}}},
            InputError,
            "correct of 'a1' changes nothing",
        ),
        (
            {"correct": {"t1": {"text": ROWS[3]["text"]}}},
            InputError,
            "correct of 't1' changes nothing",
        ),
        ({"relabel": {"a1": "   runs"}}, InputError, "the change of 'a1' changes no token"),
        ({"remove": ["a1", "a2", "7", "t1", "m1"]}, InputError, "all rows would be removed"),
        (
            {"relabel": {"t1": " sleep"}},
            InputError,
            r"'t1' is a text without a completion: correct it with .*\"text\"",
        ),
        ({"relabel": {"a1": 3}}, DataError, "the new completion of 'a1' is 3; expected a string"),
        (
            {"relabel": {"a1": None}},
            DataError,
            "the new completion of 'a1' is None; expected a string",
        ),
        (
            {"relabel": {"a1": ""}},
            DataError,
            "'completion' is empty; there is nothing to supervise",
        ),
        (
            {"correct": {"a1": {}}},
            DataError,
            "the change of 'a1' is {}; expected new prompt, completion, messages or text",
        ),
        ({"correct": {"a1": "text"}}, DataError, "the change of 'a1' is 'text'; expected new"),
        ({"correct": {"a1": {"text": "the"}}}, DataError, "ambiguous"),
        ({"correct": {"t1": {"prompt": "the"}}}, DataError, "has 'prompt' but no 'completion'"),
        (
            {"correct": {"m1": {"prompt": "the"}}},
            InputError,
            "'m1' is a conversation: give its new \"messages\"",
        ),
        ({"relabel": {"a1": " fox \ud800"}}, DataError, "Unicode|unicode|surrogate"),
        ({"correct": {"a1": {"prompt": "the " * 3000}}}, DataError, "rows do not fit the model"),
    ],
)
def test_wrong_requests_say_what_to_do_and_write_nothing(run, changes, error, message):
    refused(run, message, error, **changes)


@pytest.mark.parametrize("ids", ["a1", "7"])
def test_ids_as_one_string_are_refused(run, ids):
    """'a1' would otherwise be read as the rows 'a' and '1'; '7' even as a row that there is."""
    for call in (unlearn.remove, lambda run, ids: unlearn.edit(run, remove=ids)):
        with (
            untouched(run.directory),
            pytest.raises(InputError, match=r"were given as one string; expected a list, as in"),
        ):
            call(run, ids)


def test_held_out_rows_that_are_training_rows_are_refused(run):
    holdout = Examples([*examples(2, seed=4), run.train[1]])
    with (
        untouched(run.directory),
        pytest.raises(
            InputError, match=r"1 held-out rows are training rows .or new contents. word for word"
        ),
    ):
        unlearn.remove(run, ["a1"], holdout=holdout)
    with pytest.raises(InputError, match="the held-out file has no rows"):
        unlearn.remove(run, ["a1"], holdout=Examples([]))


def test_held_out_rows_that_are_new_contents_are_refused(run):
    """A row that this very edit teaches was not held out."""
    holdout = influence.examples_from_rows([{"prompt": "the red fox", "completion": " and cats"}])
    with pytest.raises(InputError, match="training rows"):
        unlearn.relabel(run, {"a1": " and cats"}, holdout=holdout, steps=1)


# ---- what is understood --------------------------------------------------------------------------


def contents(change):
    return {request.before.id: request.after for request in change.requests}


def test_a_relabelled_row_keeps_id_group_and_prompt(run):
    after = contents(plan(version(run), relabel={"a1": " sleep"}))["a1"]
    assert (after.id, after.group, after.prompt, after.completion) == (
        "a1",
        "ann",
        "the red fox",
        " sleep",
    )


def test_a_correction_changes_what_it_names(run):
    changes = {
        "a1": {"prompt": "a dog"},
        "a2": {"prompt": "a", "completion": " fox"},
        "t1": {"text": "the sun"},
    }
    after = contents(plan(version(run), correct=changes | {"7": {"completion": " dawn"}}))
    assert (after["a1"].prompt, after["a1"].completion) == ("a dog", " runs")
    assert (after["a2"].prompt, after["a2"].completion) == ("a", " fox")
    assert after["t1"].text == "the sun"
    assert (after["7"].prompt, after["7"].completion, after["7"].group) == (
        "birds sing",
        " dawn",
        None,
    )


def test_relabelling_a_conversation_replaces_its_last_answer(run):
    for changes in ({"relabel": {"m1": "sing"}}, {"correct": {"m1": {"completion": "sing"}}}):
        after = contents(plan(version(run), **changes))["m1"]
        assert [m["content"] for m in after.messages] == ["the fox", "runs", "and the dog", "sing"]
        assert [m["role"] for m in after.messages] == ["user", "assistant"] * 2
    messages = [{"role": "user", "content": "dawn"}, {"role": "assistant", "content": "sun"}]
    after = contents(plan(version(run), correct={"m1": {"messages": messages}}))["m1"]
    assert [dict(m) for m in after.messages] == messages


def test_changes_of_a_conversation_with_tools_and_of_token_ids(tmp_path):
    model = build_model("gpt2", layers=1, target_modules=["mlp.c_proj"], r=1)
    model.tokenizer.chat_template = "{% for t in tools or [] %}{{ t['n'] }} {% endfor %}" + CHAT
    talk = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "runs"}]
    rows = [
        {"id": "tools", "messages": talk, "tools": [{"n": "sun"}]},
        {"id": "two", "prompt": talk[:1], "completion": talk[1:]},
        {"id": "ids", "input_ids": [4, 5, 6, 7], "labels": [-100, 5, -100, 7]},
        {"id": "rest", "input_ids": [8, 9, 10]},
    ]
    options = {"curvature": influence.Identity(), "directory": tmp_path / "run"}
    run = fit_end(model, influence.examples_from_rows(rows), **options)
    after = contents(plan(version(run), relabel={"tools": "sing", "two": "sleep"}))
    assert after["tools"].tools == ({"n": "sun"},)
    assert after["tools"].answer == "sing"
    assert (after["two"].prompt_turns, after["two"].answer) == (1, "sleep")
    other = [{"role": "user", "content": "dog"}, talk[1]]
    kept = contents(plan(version(run), correct={"tools": {"messages": other}}))["tools"]
    assert (kept.tools, kept.messages) == (({"n": "sun"},), tuple(other))
    ids = {"input_ids": [4, 5, 6, 9], "labels": [-100, 5, -100, 9]}
    change = plan(version(run), correct={"ids": ids})
    assert contents(change)["ids"].input_ids == (4, 5, 6, 9)
    assert change.new.counts.tolist() == [2]
    refused(run, "'ids' is token ids without a completion", relabel={"ids": "sun"})


def test_the_parts_of_a_plan_fit_together(run):
    change = plan(
        version(run), remove=["7"], relabel={"a2": " sing"}, correct={"a1": {"prompt": "sun"}}
    )
    assert change.kind == "mixed"
    assert [(r.action, r.before.id) for r in change.requests] == [
        ("remove", "7"),
        ("relabel", "a2"),
        ("correct", "a1"),
    ]
    assert change.rows.tolist() == [2, 1, 0]
    assert change.replaced.tolist() == [False, True, True]
    assert change.old.ids == ["7", "a2", "a1"]
    assert change.new.ids == ["a2", "a1"]
    assert change.rest.tolist() == [3, 4]
    assert change.after.ids == ["a1", "a2", "t1", "m1"]
    assert change.tokens_after.ids == change.after.ids
    again = tokenize(change.after, run.model.tokenizer)
    for tokens_after, other in zip(change.tokens_after, again, strict=True):
        np.testing.assert_array_equal(tokens_after.input_ids, other.input_ids)
    for request, kept in zip(change.requests, (False, True, True), strict=True):
        record = request.record()
        assert set(record) == {"id", "action", "content_before", "content_after"}
        assert (record["content_after"] is not None) == kept
        assert len(record["content_before"]) == 16


def test_another_split_of_the_same_tokens_is_a_change(run):
    """`prompt` shorter, `completion` longer: other tokens are trained on."""
    change = plan(version(run), correct={"a1": {"prompt": "the red", "completion": " fox runs"}})
    assert change.new.counts[0] == change.old.counts[0] + 1


def test_removing_all_rows_but_relabelling_one_is_allowed(run):
    change = plan(version(run), remove=["a1", "a2", "t1", "m1"], relabel={"7": " at dawn"})
    assert change.after.ids == ["7"]
    assert len(change.rest) == 0
