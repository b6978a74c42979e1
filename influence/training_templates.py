"""Chat templates of known models as TRL rewrites them to train on assistant turns alone.

With `assistant_only_loss` TRL's `SFTTrainer` puts a training template in place of a model's own, if
that does not mark what the assistant says by `{% generation %}`. The rows are then rendered by it:
for some models (Qwen 3, GLM 4, ...) it also prints other text, such as the thoughts of earlier
turns. The tokenizer that is saved keeps the model's own template.

Both are files of the installed trl, `NAME.jinja` and `NAME_training.jinja`, and are read there; trl
itself is not imported.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from influence.progress import say


def training_template(template: str) -> str | None:
    """TRL's training template for a model's own chat template. None: it has none for that."""
    if (templates := _templates()) is None:
        _say_absent()
        return None
    return templates.get(template)


@cache
def _templates() -> dict[str, str] | None:
    """Training templates by the template that they replace. None where trl is not installed."""
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "chat_templates"
    pairs = {
        folder / file.name.replace("_training.jinja", ".jinja"): file
        for file in sorted(folder.glob("*_training.jinja"))
    }
    return {
        own.read_text(encoding="utf-8"): training.read_text(encoding="utf-8")
        for own, training in pairs.items()
        if own.is_file()
    }


@cache
def _say_absent() -> None:
    say(
        "note: trl is not installed, so assistant turns are looked for in the model's own chat "
        "template. TRL's assistant_only_loss trains on templates of its own for some models "
        "(Qwen 3, GLM 4 ...): install trl where it trained this adapter"
    )
