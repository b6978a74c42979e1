"""Errors: exit statuses, and rows that are listed at once."""

from __future__ import annotations

import pytest

from influence import errors
from influence.errors import (
    AdapterError,
    BadRow,
    DataError,
    InputError,
    ToolkitError,
    WorkError,
    libraries_named,
    refuse,
)


@pytest.mark.parametrize("name", ["DataError", "AdapterError", "MismatchError"])
def test_a_wrong_call_exits_with_two(name):
    error = getattr(errors, name)("sentence")
    assert isinstance(error, InputError)
    assert isinstance(error, ToolkitError)
    assert error.exit_status == 2


@pytest.mark.parametrize("name", ["NumericalError", "StoreError"])
def test_work_that_fails_exits_with_one(name):
    error = getattr(errors, name)("sentence")
    assert isinstance(error, WorkError)
    assert not isinstance(error, InputError)
    assert error.exit_status == 1


def test_a_bad_row_is_named_by_its_number_and_its_id():
    assert str(BadRow(7, "a17", "it is empty")) == "row 7 (id 'a17'): it is empty"
    assert str(BadRow(7, None, "it is empty")) == "row 7: it is empty"


def test_fifty_bad_rows_are_shown_and_all_are_kept():
    error = DataError("none can be used:", [BadRow(i, None, "no") for i in range(1, 61)])
    lines = str(error).splitlines()
    assert len(error.rows) == 60
    assert lines[0] == "none can be used:"
    assert lines[1] == "  row 1: no"
    assert lines[50:] == ["  row 50: no", "  ... and 10 more"]


def test_reasons_come_at_once_and_none_is_no_error():
    refuse("cannot be used", [])
    with pytest.raises(AdapterError) as caught:
        refuse("cannot be used", [f"reason {i}" for i in range(12)])
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["cannot be used:", "  - reason 0"]
    assert lines[-1] == "  - ... and 2 more"


@pytest.mark.parametrize(
    "raised",
    [ImportError("a\nb"), KeyError("a"), TypeError("a"), AttributeError("a"), AssertionError("a")],
    ids=lambda error: type(error).__name__,
)
def test_what_a_library_raises_becomes_one_sentence_with_its_cause(raised):
    with (
        pytest.raises(AdapterError) as caught,
        libraries_named("it could not be loaded", "Do this"),
    ):
        raise raised
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"it could not be loaded: {type(raised).__name__}: ")
    assert second == "Do this"
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize(
    "raised",
    [
        DataError("ours"),
        MemoryError("none left"),
        KeyboardInterrupt(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_the_files_passes_through(raised):
    with (
        pytest.raises(type(raised)) as caught,
        libraries_named("it could not be loaded", "Do this"),
    ):
        raise raised
    assert caught.value is raised


def test_a_long_reason_is_cut():
    with pytest.raises(AdapterError) as caught, libraries_named("no", "Do this"):
        raise ValueError("x" * 10_000)
    assert len(str(caught.value)) < 600
