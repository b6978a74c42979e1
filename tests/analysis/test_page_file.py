"""The file of a page: refused names, and nothing lost where writing fails."""

from __future__ import annotations

import pytest

from analysis.page_file import checked_page, write_page
from influence.errors import InputError, StoreError


def test_other_endings_folders_and_files_that_are_there_are_refused(tmp_path):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "there.html").write_text("old")
    for name in ("page.txt", "folder.html"):
        with pytest.raises(InputError, match=r"ends in \.html"):
            checked_page(tmp_path / name, True)
    with pytest.raises(InputError, match="--overwrite"):
        checked_page(tmp_path / "there.html", False)
    assert checked_page(str(tmp_path / "there.html"), True) == tmp_path / "there.html"
    assert checked_page(tmp_path / "NEW.HTM", False) == tmp_path / "NEW.HTM"


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "new" / "page.html"
    write_page(out, "é\n")
    assert out.read_bytes() == "é\n".encode()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("influence.store.os.replace", full)
    with pytest.raises(StoreError, match=r"page\.html could not be written: no space left"):
        write_page(out, "other")
    assert out.read_bytes() == "é\n".encode()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
