"""What the command lines share: exit statuses, errors in one line, what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from influence import console
from influence.errors import InputError, WorkError


@pytest.fixture
def ended(capfd, monkeypatch):
    """Call an entry point whose command does `work`: exit status, standard output and error."""
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(sys, "argv", ["toys"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(work) -> tuple[int, str, str]:
        app = console.app("toys")
        app.command()(work)
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            console.main(app)()
        return (end.value.code or 0, *capfd.readouterr())

    return call


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InputError("name a file"), 2, "error: name a file\n"),
        (WorkError("the loss is NaN"), 1, "error: the loss is NaN\n"),
        (InputError("row '\x1b[2J'"), 2, "error: row ' [2J'\n"),
        (OSError("disk full"), 1, "error: OSError: disk full\n(LORA_INFLUENCE_DEBUG=1 shows"),
        (RuntimeError("odd"), 1, "error: RuntimeError: odd\n(LORA_INFLUENCE_DEBUG=1 shows where)"),
        (
            MemoryError("no more"),
            1,
            "(lower --token-budget or --memory, or load the base with --dtype bfloat16",
        ),
        (KeyboardInterrupt(), 1, "interrupted; what fit, score, train and retrain --subsets had"),
    ],
)
def test_an_error_is_a_sentence_and_an_exit_status(ended, error, status, text):
    code, out, err = ended(raising(error))
    assert code == status
    assert out == ""
    assert text in err
    assert "Traceback" not in err


def test_a_fault_of_the_program_is_not_hidden(ended, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toys"])
    app = console.app("toys")
    app.command()(raising(KeyError("x")))
    with pytest.raises(KeyError):
        console.main(app)()
    monkeypatch.setenv("LORA_INFLUENCE_DEBUG", "1")
    app = console.app("toys")
    app.command()(raising(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        console.main(app)()


def test_a_command_that_works_exits_with_zero(ended):
    assert ended(lambda: print("done")) == (0, "done\n", "")


def test_warnings_are_one_line_without_markup(ended):
    def work() -> None:
        warnings.simplefilter("always")
        warnings.warn("few\x07 rows", UserWarning, stacklevel=1)
        warnings.warn("old name", DeprecationWarning, stacklevel=1)

    with warnings.catch_warnings():
        assert ended(work) == (0, "", "warning: few  rows\n")


def test_a_reader_that_has_gone_is_no_error():
    """As in `influence top ... | head -1`."""
    code = (
        "from influence import console\n"
        "app = console.app('toys')\n"
        "@app.command()\n"
        "def work():\n"
        "    for _ in range(100000):\n"
        "        print('row')\n"
        "console.main(app)()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 1
    child.stderr.close()


def test_json_is_one_line_that_any_parser_takes(capsys):
    result = {
        "nan": float("nan"),
        "rows": [np.float64("inf"), np.array([1.0, np.nan])],
        "pair": (1, None),
        "path": os.fspath("a"),
        "word": "Ω",
    }
    console.emit(result, "for a person", True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "Ω" in out
    assert json.loads(out) == {
        "nan": None,
        "rows": [None, [1.0, None]],
        "pair": [1, None],
        "path": "a",
        "word": "Ω",
    }
    console.emit(result, "for a person", False)
    assert capsys.readouterr().out == "for a person\n"


def test_text_is_shown_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    text = "[bold]markup[/bold] is not read, and this is long"
    console.show(text, wrap=False)
    assert capsys.readouterr().out == text + "\n"
    console.show(text)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert " ".join(line.strip() for line in lines) == text


def test_control_characters_become_spaces():
    assert console.printable("a\x1b[2J\r\nb\u202ec") == "a [2J \nb c"


@pytest.mark.parametrize(
    ("value", "least", "sentence"),
    [
        (0, 1, "-k 0 was given; expected at least 1"),
        (-12345678, 1, "-k -12345678 was given; expected at least 1"),
        (-0.5, 0, "-k -0.5 was given; expected at least 0"),
        (-1.0, 0, "-k -1 was given; expected at least 0"),
        (float("nan"), 0, "-k nan was given; expected at least 0"),
    ],
)
def test_numbers_that_are_too_low_are_refused(value, least, sentence):
    with pytest.raises(InputError) as error:
        console.at_least("-k", value, least)
    assert str(error.value) == sentence
    console.at_least("-k", 1, 1)


def test_output_that_cannot_be_encoded_is_escaped(tmp_path):
    """A pipe on a machine whose encoding has few characters."""
    code = "from influence import console\nconsole.main(lambda: print('\\u27e6 \\u4e1c'))()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0
    assert done.stdout.split() == [b"\\u27e6", b"\\u4e1c"]
