"""Chat templates of known models as TRL rewrites them to train on assistant turns alone.

With `assistant_only_loss` TRL's `SFTTrainer` puts a training template in place of a model's own, if
that does not mark what the assistant says by `{% generation %}`. The rows are then rendered by it:
for some models (Qwen 3, GLM 4, ...) it also prints other text, such as the thoughts of earlier
turns. The tokenizer that is saved keeps the model's own template.

`training_templates.json` has the edits by the SHA-256 of the template that they are made to, from
the version of trl that it names. `python docs/training_templates.py` writes it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any


def training_template(template: str) -> str | None:
    """TRL's training template for a model's own chat template. None: it has none for that."""
    known = _templates().get(hashlib.sha256(template.encode()).hexdigest())
    if known is None:
        return None
    for start, end, text in known["edits"]:  # the last one first, so that places stay right
        template = template[:start] + text + template[end:]
    return template


@cache
def _templates() -> dict[str, Any]:
    path = Path(__file__).with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8"))["templates"]
