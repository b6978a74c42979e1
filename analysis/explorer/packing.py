"""What a file of the page holds, packed: JSON that no browser takes for markup, numbers in few bytes.

A block is deflated and written as base64. Its script, `templates/file_source.js`, unpacks it when
it is first asked for.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np

from analysis.explorer import contract
from analysis.explorer.blocks import rounded
from analysis.explorer.data import Explored
from analysis.explorer.options import DETAIL
from analysis.explorer.sections import present
from analysis.explorer.texts import Texts
from influence.store import open_file

#: Scores that are kept as they are, and as bytes, at most; of more only the strongest are.
EXACT, BYTES = 1_000_000, 12_000_000
#: Rows of either end of each query whose scores are exact where the others are bytes.
STRONGEST = 50
#: Steps of a byte: score = sign * largest * (step / STEPS)^POWER.
STEPS, POWER = 127, 3


def embedded_json(value: Any) -> str:
    """JSON for a script element: nothing in it ends the element or begins markup."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # all others of HTML and JavaScript's are escaped by ensure_ascii
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def packed(data: bytes) -> str:
    """Bytes, deflated (zlib), in base64."""
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")


def packed_json(value: Any) -> str:
    """A JSON value, packed."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return packed(text.encode("utf-8", "surrogatepass"))


def blocks(explored: Explored, *, detail: int = DETAIL) -> tuple[dict[str, Any], dict[str, str]]:
    """`contract.meta` of what a file keeps, and its packed blocks by name.

    `detail`: rows of either end of each query whose scores are split.
    """
    meta, found = contract.meta(explored), {}
    found["rows"] = packed_json(_texts(explored.rows))
    found["facts"] = packed_json(_facts(explored))
    if explored.table is not None:
        found["queries"] = packed_json(_texts(explored.queries))
        form, arrays, meta["exactness"] = _scores(explored)
        meta["form"], meta["kept"] = form, form.get("kept")
        found |= arrays
        found["pairs"] = packed_json(_pairs(explored, detail))
    meta["why"] = explored.how_to_split
    for name in present(explored):
        if name != "queries":
            found[f"section-{name}"] = packed_json(contract.section(explored, name))
    return meta, found


def _texts(texts: Texts) -> list[list[Any]]:
    """Rows as `[id, group, preview, parts]`."""
    return [
        [texts.ids[k], texts.groups[k], texts.preview(k), texts.parts(k)] for k in range(len(texts))
    ]


def _facts(explored: Explored) -> dict[str, Any]:
    """The facts of every row: `kinds` are (label, help), `rows` have (kind, value) pairs."""
    kinds: dict[tuple[str, str], int] = {}
    rows = [
        [
            [kinds.setdefault((fact["label"], fact["help"]), len(kinds)), fact["value"]]
            for fact in explored.facts_of(row)
        ]
        for row in range(len(explored.rows))
    ]
    return {"kinds": [list(kind) for kind in kinds], "rows": rows}


def _scores(explored: Explored) -> tuple[dict[str, Any], dict[str, str], str]:
    """How scores are kept, the blocks that hold them, and a sentence on how exact they are."""
    table = explored.table
    assert table is not None
    count = len(explored.queries) * len(explored.rows)
    if table.kept is not None or count > BYTES:
        kept = table.kept or STRONGEST
        rows, scores = _strongest(explored, kept)
        sentence = f"The {kept} strongest rows of either end of each query are kept, to 5 digits."
        if table.kept is None:
            sentence += " analysis serve shows all."
        listed = {"rows": rows, "scores": scores}
        return {"name": "strongest", "kept": kept}, {"scores": packed_json(listed)}, sentence
    values = np.ascontiguousarray(table.matrix(), "<f4")
    if count <= EXACT:
        form = {"name": "float32", "kept": None}
        return form, {"scores": packed(values.tobytes())}, "Scores are kept to 5 digits."
    codes, largest = as_bytes(values)
    rows, scores = _strongest(explored, STRONGEST)
    form = {
        "name": "bytes",
        "kept": None,
        "largest": rounded(largest, 8),
        "steps": STEPS,
        "power": POWER,
    }
    sentence = (
        f"The {STRONGEST} strongest rows of either end of each query have their score to 5 digits. "
        "All others are rounded to a byte: within 1.2 % where a score is as large as the query's "
        "largest, within 15 % where it is 2,000 times smaller, shown with ≈."
    )
    listed = {"rows": rows, "scores": scores}
    return form, {"scores": packed(codes.tobytes()), "strongest": packed_json(listed)}, sentence


def as_bytes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 of scores `[Q, n]`, and the largest absolute score of each query `[Q]`."""
    largest = np.abs(np.nan_to_num(values)).max(1, initial=0).astype(np.float64)
    shares = np.nan_to_num(values) / np.where(largest > 0, largest, 1)[:, None]
    codes = np.sign(shares) * np.rint(STEPS * np.abs(shares) ** (1 / POWER))
    return codes.astype(np.int8), largest


def _ends(rows: np.ndarray, count: int) -> np.ndarray:
    """The first and last `count` places of a ranking."""
    return rows if len(rows) <= 2 * count else np.concatenate([rows[:count], rows[-count:]])


def _strongest(explored: Explored, count: int) -> tuple[list[list[int]], list[list[float | None]]]:
    """The rows of either end of every query, and their scores."""
    assert explored.table is not None
    rows, scores = [], []
    for query in range(len(explored.queries)):
        places, values = explored.table.query(query)
        rows.append(_ends(places, count).tolist())
        scores.append(rounded(_ends(values, count)))
    return rows, scores


def _pairs(explored: Explored, detail: int) -> dict[str, Any]:
    """Split scores of each query's strongest rows.

    `words` are token texts, `tokens` of a row their places among these, and `queries` have for each
    row the parts as shares, in thousandths, of the largest.
    """
    table, words = explored.table, {}
    assert table is not None
    tokens: dict[int, list[int]] = {}
    queries: dict[int, dict[int, Any]] = {}
    with open_file(table.path):  # held: each pair below opens it again, which then costs little
        for query in range(len(explored.queries) if table.splits else 0):
            own: dict[int, Any] = {}
            for row in _ends(table.query(query)[0], detail).tolist():
                split = table.detail(query, row)
                entry: list[Any] = [None, None]
                if split.tokens is not None and explored.tokens is not None:
                    texts = [explored.tokens(id) for id, _ in split.tokens]
                    tokens[row] = [words.setdefault(text, len(words)) for text in texts]
                    entry[0] = _shares([value for _, value in split.tokens])
                if split.modules is not None:
                    entry[1] = _shares([value for _, value in split.modules])
                own[row] = entry
            queries[query] = own
    modules = table.module_names if "modules" in table.splits else []
    return {"words": list(words), "modules": modules, "tokens": tokens, "queries": queries}


def _shares(values: list[float]) -> list[Any]:
    """Numbers as the largest absolute one and shares of it in thousandths."""
    array = np.nan_to_num(np.array(values, np.float64))
    largest = float(np.abs(array).max(initial=0))
    shares = np.rint(1000 * array / (largest or 1)).astype(int).tolist()
    return [float(f"{largest:.4e}"), shares]
