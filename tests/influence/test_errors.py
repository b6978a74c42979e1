"""Errors: exit statuses, and rows that are listed at once."""

from __future__ import annotations

import pytest

from influence import errors
from influence.errors import BadRow, DataError, InputError, ToolkitError, WorkError


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
