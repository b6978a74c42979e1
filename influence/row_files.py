"""Rows out of files, folders and data sets of the Hugging Face hub.

A source is a file (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, each also `.gz`; `.parquet`), a
folder (of `Dataset.save_to_disk`, or of shards), or a data set of the hub:

::

    rows.jsonl                      a file
    folder                          a saved Dataset, or shards: train-00000-of-00002.parquet ...
    folder:SPLIT                    one split of a saved DatasetDict, or the shards of one name
    org/name[@revision][:SPLIT]     a data set of the hub, also with :CONFIGURATION:SPLIT

A reader of a format yields `(number, row)`: the number that a person sees (the line in JSON lines
and CSV) and the row as a mapping, or a `BadRow` where it cannot be decoded. A new format is one
more reader and one more line in `_file_rows`.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

from influence.errors import BadRow, DataError
from influence.messages import listed
from influence.row_forms import canonical_rows, checked_columns, read_columns
from influence.rows import Examples, arrow_rows, checked_examples, dataset_rows

#: Numbered rows, as a reader yields them.
Rows = Iterator[tuple[int | str, object]]

#: What may be given to `read_examples`, for messages.
FORMATS = (
    "a .jsonl, .json, .csv, .tsv or .parquet file (the first four also .gz), a folder of Parquet "
    "or .jsonl shards or of Dataset.save_to_disk, or a data set of the hub, org/name:split"
)
#: Suffixes by which a path that is not there is a slip, and no data set of the hub.
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".arrow")
#: Files that a folder may hold several of. A .json file beside data is mostly about it.
_SHARDS = (".jsonl", ".ndjson", ".parquet")
#: A data set of the hub. A split may be cut, as in train[:100].
_HUB = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^:@]+))?"
    r"(?::(?P<configuration>[^:\[\]]+)(?=:))?(?::(?P<split>[^:\[\]]+(?:\[[^\]]*\])?))?"
)
#: The name of a shard: train-00000-of-00002, also with a hash; part-0, 7; or Spark's part-00000-...
_SHARD = re.compile(
    r"(?P<name>.*?)[-_.]?\d+(?:-of-(?P<total>\d+)(?:-[0-9a-f]+)?)?|(?P<part>part)-\d+-.*"
)
_BLANK = re.compile(r"[ \t\n\r]*")


def read_examples(
    source: str | PathLike[str], *, columns: Mapping[str, str] | None = None
) -> Examples:
    """Read examples from a file, a folder or a data set of the hub.

    A row is `{"prompt", "completion"}`, or `{"messages": [{"role", "content"}, ...]}`, or
    `{"text"}`; `id` (string or integer) and `group` are optional, null means absent, and other keys
    are ignored, with a note where they change how a row is rendered or weighed. The forms of
    `influence.row_forms` (ShareGPT, alpaca, question and answer) are turned into these, with a note
    that says how. A row without an id gets its content hash as id, the second of equal rows the
    hash with `#2`, the third `#3`.

    Errors: DataError for a missing, empty or unreadable source and for an unknown format; one
    DataError that lists every unusable row (its line number in JSON lines and CSV, else its row
    number) with the reason.

    Parameters
    ----------
    source
        A path, `folder:split`, or `org/name`, `org/name:split`, `org/name@revision:split`. In CSV
        every cell is text, and an empty one is absent.
    columns
        The columns of other names, by key: `{"prompt": "question", "completion": "answer"}`. Where
        it names content, other content of a row is left out.
    """
    return _read(source, columns, again=False)


def read_again(source: str, columns: Mapping[str, str] | None = None) -> Examples:
    """Read rows that were read before, from `Examples.source`, as they were read then.

    Nothing is said of forms that are recognised, and a row with canonical keys is read by these
    whatever else it holds, as before there were forms.
    """
    return _read(source, columns, again=True)


def raw_rows(source: str | PathLike[str]) -> Iterator[object]:
    """Yield the rows of a source that `read_examples` reads, with all their keys, as written."""
    rows, _ = _rows_of(os.fspath(source), None)
    return (row for _, row in rows)


def place_of(source: str) -> Path | None:
    """Where rows lie on disk, whether or not they are still there; None: on the hub."""
    folder = source.rpartition(":")[0]
    if not Path(source).exists() and folder and Path(folder).is_dir():
        return Path(folder)
    return None if _hub_match(source) else Path(source)


def _read(
    source: str | PathLike[str], columns: Mapping[str, str] | None, *, again: bool
) -> Examples:
    if not isinstance(source, (str, PathLike)):
        raise DataError(
            f"a source of rows is a path or the name of a data set, not a {type(source).__name__}; "
            "rows in memory are read by influence.examples_from_rows"
        )
    text, named = os.fspath(source), checked_columns(columns)
    rows, resolved = _rows_of(text, named)
    where = f" of {text}"
    examples = checked_examples(canonical_rows(rows, named, where, again=again), where)
    return Examples(examples, source=resolved, columns=named or None)


def _rows_of(source: str, columns: Mapping[str, str] | None) -> tuple[Rows, str]:
    """The rows of a source, and how it can be opened again from anywhere."""
    path, (folder, _, split) = Path(source), source.rpartition(":")
    if path.is_dir():
        return _folder_rows(path, None, columns)
    if path.exists():
        return _file_rows(path, columns), str(path.resolve())
    if folder and Path(folder).is_dir():
        return _folder_rows(Path(folder), split, columns)
    hub = _hub_match(source)
    if hub is None:
        raise DataError(f"{source} does not exist; give {FORMATS}")
    return _hub_rows(source, hub, columns)


# ---- files -------------------------------------------------------------------------------------


def _file_rows(path: Path, columns: Mapping[str, str] | None) -> Rows:
    """The rows of one file, by its suffix."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        return _parquet_rows(path, columns)
    if suffix in (".csv", ".tsv"):
        return _readable(path, _csv_rows(path, "\t" if suffix == ".tsv" else ",", columns))
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _readable(path, _json_rows(path))
    raise DataError(f"{path} has the suffix {path.suffix!r}, which is not read; give {FORMATS}")


def _suffix(path: Path) -> str:
    """What kind of file a name says, without `.gz`. Parquet is compressed by itself."""
    name = path.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    return Path(name).suffix if inner == ".parquet" else inner


def _open(path: Path) -> Any:
    """The bytes of a file, unpacked."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _readable(path: Path, rows: Rows) -> Rows:
    """The rows, or a DataError where the file cannot be read."""
    try:
        yield from rows
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _json_rows(path: Path) -> Rows:
    """Yield (line number, row), a BadRow in place of a line that does not decode.

    Blank lines are skipped and counted, so numbers are those of an editor. A file whose first line
    opens a list, or an object and nothing else, is one document (or several).
    """
    begun = False
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text and not begun and (text[0] == "[" or text == "{"):
                    yield from _document_rows(path)
                    return
                if text:
                    begun = True
                    yield number, json.loads(text)
                continue
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 (byte {error.start + 1}: {error.reason})"
            except json.JSONDecodeError as error:
                reason = f"not JSON ({error.msg}, at character {error.colno})"
            # a number of 5,000 digits, or 100,000 brackets
            except (ValueError, RecursionError) as error:
                reason = f"not JSON that can be read ({error})"
            begun = True
            yield number, BadRow(number, None, reason)


def _document_rows(path: Path) -> Rows:
    """Yield (row number, row) of lists of rows, and of rows over several lines.

    The text is held as a whole, its rows one at a time.
    """
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} is not UTF-8 (line {line}: {error.reason})") from error
    del data
    try:
        yield from enumerate(_values(text), start=1)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON ({error.msg}, at line {error.lineno}, character {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON that can be read ({error})") from error


def _values(text: str) -> Iterator[object]:
    """The values of a JSON text: those in its lists, and those beside them."""
    decode = json.JSONDecoder().raw_decode
    at, inside, separated = _after_blanks(text, 0), False, True
    while at < len(text):
        character = text[at]
        if not inside and character == "[":
            at, inside, separated = at + 1, True, True
        elif inside and character == "]":
            at, inside, separated = at + 1, False, True
        elif inside and character == "," and not separated:
            at, separated = at + 1, True
        elif separated:
            value, at = decode(text, at)
            yield value
            separated = not inside
        else:
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _after_blanks(text, at)
    if inside:
        raise json.JSONDecodeError("Expecting ']'", text, at)


def _after_blanks(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return at if found is None else found.end()


def _csv_rows(path: Path, delimiter: str, columns: Mapping[str, str] | None) -> Rows:
    """Yield (number of its first line, row) of a table with a header.

    Every cell is text as it stands, and an empty one is null.
    """
    before = csv.field_size_limit(2**31 - 1)  # a long text is one cell
    try:
        with _open(path) as file:
            table = csv.reader(_decoded_lines(path, file), delimiter=delimiter, strict=True)
            header = next(table, [])
            names = [name for name in header if name]
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise DataError(f"{path} has several columns {listed(repeated)}; keep one of each")
            wanted = {*read_columns(names, columns, f" of {path}")}
            line = table.line_num + 1
            for cells in table:
                if len(cells) == len(header):
                    pairs = zip(header, cells, strict=True)
                    yield line, {name: cell or None for name, cell in pairs if name in wanted}
                elif cells:
                    reason = f"has {len(cells)} cells, and the header has {len(header)}"
                    yield line, BadRow(line, None, reason)
                line = table.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} is not a readable table: {error}") from error
    finally:
        csv.field_size_limit(before)


def _decoded_lines(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 (line {number}, byte {error.start + 1}: {error.reason})"
            ) from error


def _parquet_rows(path: Path, columns: Mapping[str, str] | None) -> Rows:
    """Yield (row number, row) of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            wanted = read_columns(file.schema_arrow.names, columns, f" of {path}")
            yield from arrow_rows(file.iter_batches(batch_size=1000, columns=wanted))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


# ---- folders -----------------------------------------------------------------------------------


def _folder_rows(
    path: Path, split: str | None, columns: Mapping[str, str] | None
) -> tuple[Rows, str]:
    """The rows of a folder, of one split where it is named, and how to open them again."""
    if (path / "dataset_dict.json").exists():
        splits = _saved_splits(path)
        if split not in splits:
            first = f"; give one of them, for example {path / splits[0]}" if splits else ""
            raise DataError(f"{path} is a DatasetDict with the splits {listed(splits)}{first}")
        path, split = path / str(split), None
    if (path / "state.json").exists():
        if split is not None:
            raise DataError(f"{path} is one Dataset without splits; leave out :{split}")
        return _saved_rows(path, columns), str(path.resolve())
    groups = _shards(path)
    if split is None and len(groups) == 1:
        split_name, suffix = next(iter(groups)), ""
    else:
        split_name, suffix = split, f":{split}"
    if split_name not in groups:
        first = next(iter(groups))
        raise DataError(
            f"{path} has shards of the names {listed(groups)}; give one of them, for example "
            f"{path}:{first}"
        )
    files = _whole(path, split_name, groups[split_name])
    return _shard_rows(files, columns), f"{path.resolve()}{suffix}"


def _saved_splits(path: Path) -> list[str]:
    """The splits of a DatasetDict, as its file says, else its folders."""
    try:
        text = (path / "dataset_dict.json").read_text(encoding="utf-8")
        return [str(split) for split in json.loads(text)["splits"]]
    except (ValueError, KeyError, TypeError, OSError):
        return sorted(child.name for child in path.iterdir() if child.is_dir())


def _saved_rows(path: Path, columns: Mapping[str, str] | None) -> Rows:
    """Yield (row number, row) of a folder saved by `Dataset.save_to_disk`."""
    import datasets

    try:
        dataset = cast(datasets.Dataset, datasets.load_from_disk(str(path)))
    except Exception as error:  # whatever a damaged folder makes of `datasets`
        raise DataError(f"{path} is not a readable `datasets` folder: {error}") from error
    yield from dataset_rows(dataset, columns, f" of {path}")


def _shards(path: Path) -> dict[str, list[Path]]:
    """The shards of a folder, or of `data` in it, by what their names begin with."""
    groups: dict[str, list[Path]] = {}
    for folder in (path, path / "data"):
        for file in sorted(folder.iterdir() if folder.is_dir() else (), key=_in_order):
            if _suffix(file) in _SHARDS and file.name[0] not in "._" and file.is_file():
                found = _SHARD.fullmatch(_stem(file))
                name = _stem(file) if found is None else found["part"] or found["name"]
                groups.setdefault(name, []).append(file)
        if groups:
            return groups
    raise DataError(
        f"{path} is a folder without a saved dataset (it has no state.json) and without .parquet "
        f"or .jsonl files; give {FORMATS}"
    )


def _whole(path: Path, name: str, files: list[Path]) -> list[Path]:
    """The shards of one name, or a DataError where they are not all there, or not of one kind."""
    matches = [_SHARD.fullmatch(_stem(file)) for file in files]
    totals = {None if found is None else found["total"] for found in matches}
    total = next(iter(totals))
    if len(totals) > 1 or (total is not None and int(total) != len(files)):
        raise DataError(
            f"{path} has {len(files)} shards {name!r}, which say that there are "
            f"{' or '.join(str(total) for total in totals)}: put all of one set there, and no other"
        )
    if len({file.name.removeprefix(_stem(file)) for file in files}) > 1:
        raise DataError(
            f"{path} has {listed(file.name for file in files[:10])}, files of several kinds: the "
            "same rows twice, or two sets? Give one file, or a folder with one set"
        )
    return files


def _stem(file: Path) -> str:
    """A file's name without its suffixes."""
    name = file.name.removesuffix(".gz")
    return name.removesuffix(Path(name).suffix)


def _in_order(file: Path) -> list[tuple[int, str]]:
    """What shards are ordered by: part-10 is after part-9."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", file.name)]


def _shard_rows(files: list[Path], columns: Mapping[str, str] | None) -> Rows:
    """The rows of all shards, numbered by file where there are several."""
    for file in files:
        for number, row in _file_rows(file, columns):
            place = number if len(files) == 1 else f"{file.name}:{number}"
            yield place, row


# ---- the hub -----------------------------------------------------------------------------------


def _hub_match(source: str) -> re.Match[str] | None:
    """The parts of a name on the hub; None where it must be a path that is not there."""
    found = _HUB.fullmatch(source)
    if found is None or Path(found["name"]).suffix.lower() in _SUFFIXES:
        return None
    # beside a folder of that name it is rather a slip; what a run recorded names its commit
    slip = found["revision"] is None and Path(found["name"]).parent.is_dir()
    return None if slip else found


def _hub_rows(
    source: str, hub: re.Match[str], columns: Mapping[str, str] | None
) -> tuple[Rows, str]:
    """The rows of a data set of the hub, and its name with the commit that was loaded."""
    import datasets

    name, revision, configuration, split = hub.group("name", "revision", "configuration", "split")
    try:
        loaded: Any = datasets.load_dataset(name, configuration, split=split, revision=revision)
    except Exception as error:  # the network's, the hub's, and whatever a file makes of `datasets`
        raise DataError(
            f"{source} is no file or folder here, and could not be read as a data set of the hub: "
            f"{error}"
        ) from error
    if isinstance(loaded, Mapping):
        if len(loaded) != 1:
            raise DataError(
                f"{source} has the splits {listed(loaded)}; give one of them, for example "
                f"{source}:{next(iter(loaded), 'train')}"
            )
        ((split, loaded),) = loaded.items()
    commit = _commit(loaded) or revision
    parts = [f"@{commit}" if commit else "", f":{configuration}" if configuration else ""]
    return dataset_rows(loaded, columns, f" of {source}"), f"{name}{''.join(parts)}:{split}"


def _commit(dataset: Any) -> str | None:
    """The commit that a data set was loaded from: the folder that `datasets` caches it in."""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    commits = {name for name in folders if re.fullmatch("[0-9a-f]{40}", name)}
    return commits.pop() if len(commits) == len(folders) == 1 else None
