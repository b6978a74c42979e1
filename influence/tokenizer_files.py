"""The tokenizer beside an adapter, or that of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from influence.errors import AdapterError, libraries_named
from influence.progress import say

#: Files of a tokenizer that hold its vocabulary, by what their names end with.
VOCABULARIES = (
    "tokenizer.json",
    ".model",
    "vocab.json",
    "vocab.txt",
    ".tiktoken",
    "tekken.json",
)
#: All files of a tokenizer, as patterns: what is fetched of an adapter on the hub.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens*",
    "added_tokens.json",
    "merges.txt",
    "*.jinja",
    *(f"*{ending}" for ending in VOCABULARIES),
)
_ADVICE = "Save one beside the base (or the adapter)"


def load_tokenizer(
    folder: Path, base: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer in an adapter's folder where there is a whole one, else that of the base.

    Training saves it there with what it changed: added tokens, a chat template. Says where only a
    part of one lies beside the adapter, and where its chat template is missing and the base has
    one. Errors: `AdapterError` where no tokenizer can be loaded.
    """
    names = [path.name for path in folder.iterdir()]
    if "tokenizer_config.json" not in names:
        return _load(base, revision, trust_remote_code)
    code = [name for name in names if name.endswith(".py")]
    if not code and not any(name.endswith(VOCABULARIES) for name in names):
        say(
            f"note: {folder} holds a tokenizer_config.json without a vocabulary: the tokenizer of "
            f"the base {base} is used, whole"
        )
        return _load(base, revision, trust_remote_code)
    tokenizer = _load(str(folder), None, trust_remote_code)
    if not getattr(tokenizer, "chat_template", None) and _has_template(base, revision):
        say(
            f"note: the tokenizer is that beside the adapter, which has no chat template; that of "
            f"the base {base} has one. Rows of messages need it: where training used it, copy it "
            f"(chat_template.jinja) into {folder}"
        )
    return tokenizer


def _load(source: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    with libraries_named(f"no tokenizer could be loaded from {source!r}", _ADVICE):
        which = {} if revision is None else {"revision": revision}
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, **which
        )
        tokenizer("a")  # what its settings spoil is told here, not at the first row
        if not len(tokenizer):
            raise AdapterError(f"the tokenizer of {source!r} has no vocabulary. {_ADVICE}")
        return tokenizer


def _has_template(base: str, revision: str | None) -> bool:
    """Whether the base's tokenizer has a chat template."""
    try:
        return bool(getattr(_load(base, revision, False), "chat_template", None))
    except AdapterError:
        return False
