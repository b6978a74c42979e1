"""Output directories that are refused, before anything is written."""

from __future__ import annotations

import pytest

from influence.errors import InputError
from unlearn.record.outputs import overlap, refuse_source, refuse_taken


def test_a_directory_that_holds_something_is_taken(tmp_path):
    refuse_taken(tmp_path / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    refuse_taken(tmp_path / "empty", overwrite=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(InputError, match="is not empty: give another directory, or --overwrite"):
        refuse_taken(tmp_path / "full", overwrite=False)
    refuse_taken(tmp_path / "full", overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is a file; an adapter is a directory"):
            refuse_taken(tmp_path / "full" / "mine", overwrite=overwrite)


def test_a_source_is_refused_from_inside_and_outside(tmp_path):
    source = tmp_path / "a" / "adapter"
    for out in (source, source / "out", tmp_path / "a", tmp_path, source / ".." / "adapter"):
        with pytest.raises(InputError, match=r"is, or holds, or lies in .*: give a new directory"):
            refuse_source(out, str(source))
    refuse_source(tmp_path / "a" / "other", str(source))
    refuse_source(tmp_path / "a" / "adapter-2", str(source))  # no path inside, whatever its name


def test_paths_overlap_through_links(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert overlap(tmp_path / "link" / "x", tmp_path / "a")
    assert overlap(tmp_path / "a", tmp_path / "link" / "x")
    assert not overlap(tmp_path / "a", tmp_path / "b")
