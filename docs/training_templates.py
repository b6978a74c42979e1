"""Write `influence/training_templates.json` from the chat templates of the installed trl.

    python docs/training_templates.py

For each template that TRL swaps for training on assistant turns alone: the SHA-256 of the model's
template, and the edits that make TRL's of it, as `[from character, to character, new text]`. The
templates are of the TRL team, under the Apache License 2.0.
"""

from __future__ import annotations

import hashlib
import json
from difflib import SequenceMatcher
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "influence" / "training_templates.json"


def edits_between(old: str, new: str) -> list[list[int | str]]:
    """The edits that make `new` of `old`, line by line, the last one first."""
    before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
    starts = [0]
    for line in before:
        starts.append(starts[-1] + len(line))
    found: list[list[int | str]] = [
        [starts[a], starts[b], "".join(after[c:d])]
        for kind, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
        if kind != "equal"
    ]
    return found[::-1]


def main() -> None:
    """Read trl's pairs of templates and write their edits."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    templates = {}
    for file in sorted(folder.glob("*_training.jinja")):
        name = file.stem.removesuffix("_training")
        old = (folder / f"{name}.jinja").read_text(encoding="utf-8")
        edits = edits_between(old, file.read_text(encoding="utf-8"))
        digest = hashlib.sha256(old.encode()).hexdigest()
        templates[digest] = {"name": name, "edits": edits}
    record = {"source": f"trl {trl.__version__} (Apache License 2.0)", "templates": templates}
    OUT.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
