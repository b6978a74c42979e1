"""Sealed edits and chains that no model was needed for, and ways to damage them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from influence.errors import StoreError
from unlearn.record import chain, plain
from unlearn.record import folder as checks
from unlearn.record.chain import append
from unlearn.record.folder import seal
from unlearn.record.verify import verify
from unlearn.retraining.recipe import Recipe

KEYS = [
    f"base_model.model.layers.{layer}.q_proj.lora_{side}.weight"
    for layer in range(2)
    for side in "AB"
]

BEFORE = "b" * 64

#: Of few steps at a high rate: the runs' adapter, which is random, is below what it expects.
RECIPE = Recipe(lr=0.1, epochs=5, batch_size=2, dropout=False)


def digest(number: int) -> str:
    """Stands for an adapter's digest: the record's word, which only a loaded model could check."""
    return f"{number:064x}"


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(3, 2, generator=generator) for key in KEYS}


def save(folder: Path, tensors: dict[str, torch.Tensor], name: str = checks.WEIGHTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "rank_pattern": {}}
    (folder / checks.CONFIG).write_text(json.dumps(config))


def edit(
    place: SimpleNamespace,
    name: str,
    *,
    before: tuple[Path, str] | None = None,
    seed: int = 1,
    **record,
) -> Path:
    """A sealed edit directory that no model was needed for."""
    old, old_digest = before or (place.adapter, BEFORE)
    folder = place.root / name
    delta = {key: 0.01 * value for key, value in weights(100 + seed).items()}
    save(
        folder, {key: value + delta[key] for key, value in load_file(old / checks.WEIGHTS).items()}
    )
    save_file(delta, folder / checks.DELTA)
    (folder / "README.md").write_text("an edited adapter")
    full = {
        "format": 1,
        "kind": "remove",
        "run": {"path": str(place.run), "digest": place.digest},
        "adapter": {
            "before": {"path": str(old), "digest": old_digest},
            "after": {"digest": digest(seed)},
        },
        "requests": [
            {
                "id": f"row {seed} äé東",
                "action": "remove",
                "content_before": "0" * 16,
                "content_after": None,
            }
        ],
        "losses": {"edited": {"before": 0.25, "after": float("nan"), "target": float("inf")}},
    }
    seal(folder, full | record)
    return folder


def problems(*arguments, **options) -> str:
    result = verify(*arguments, **options)
    assert result.passed == (not result.problems)
    return "\n".join(result.problems)


def lines(place) -> list[bytes]:
    return place.chain.read_bytes().splitlines(keepends=True)


def refuses_to_append(place) -> bool:
    """Whether nothing goes into the chain as it is."""
    before = place.chain.read_bytes()
    folder = edit(place, "one more", seed=9)
    with pytest.raises(StoreError):
        append(place.run, folder)
    return place.chain.read_bytes() == before


def forge(place, entry: dict, **changes) -> None:
    """A chain of one line that says something else, with hashes and manifest computed to fit."""
    forged = {key: value for key, value in (entry | changes).items() if key != "hash"}
    forged["hash"] = hashlib.sha256(plain.canonical(forged)).hexdigest()
    place.chain.write_bytes(plain.canonical(forged) + b"\n")
    chain._settle(place.run, 1, forged["hash"], forged)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def flips(path: Path, positions=None):
    """Each byte of a file changed in turn; the file is whole again afterwards."""
    data = path.read_bytes()
    for at in range(len(data)) if positions is None else positions:
        for flip in (1, 0x20, 0x80):
            path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at:][1:])
            yield at
    path.write_bytes(data)


def reseal(folder: Path) -> None:
    seal(folder, json.loads((folder / "edit.json").read_text()))


HOSTILE = {
    "empty": b"",
    "no UTF-8": b"\xff\xfe\x00",
    "UTF-16": '{"number": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "deep but complete": b'{"format":1,"number":' + b"[" * 900 + b"]" * 900 + b"}",
    "huge number": b'{"number":' + b"9" * 5000 + b"}",
    "long number": b'{"format":1,"number":' + b"9" * 4300 + b"}",
    "infinite": b'{"number":1e999,"format":NaN}',
    "list": b"[1,2]",
    "null": b"null",
    "surrogate": b'{"kind":"\\ud800","format":1}',
    "control": b'{"\\u001b[2J":"\\u202e","format":1}',
    "nul path": b'{"format":1,"run":{"path":"a\\u0000b","digest":"x"},"files":{"a\\u0000b":3}}',
    "wrong types": b'{"format":1,"kind":[],"requests":{"id":1},"adapter":3,"run":[],"files":[1]}',
}


def replaced(path: Path, how: str) -> None:
    """Something in place of a file that is no file."""
    path.unlink(missing_ok=True)
    if how == "directory":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.parent / "nowhere")


#: Rows of every kind, for requests.
ROWS = [
    {"id": "a1", "group": "ann", "prompt": "the red fox", "completion": " runs"},
    {"id": "a2", "group": "ann", "prompt": "a lazy dog", "completion": " and cats sleep"},
    {"id": "7", "prompt": "birds sing", "completion": " loud songs at dawn"},
    {"id": "t1", "text": "old cats sleep in warm sun"},
    {
        "id": "m1",
        "messages": [
            {"role": "user", "content": "the fox"},
            {"role": "assistant", "content": "runs"},
            {"role": "user", "content": "and the dog"},
            {"role": "assistant", "content": "sleep"},
        ],
    },
]
