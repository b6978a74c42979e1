"""Change an adapter as if training rows had been absent or different; so far, by training it again."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearn.retrain import Recipe, retrain

__all__ = ["Recipe", "retrain"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("unlearn.retrain"), name)
    raise AttributeError(f"module 'unlearn' has no attribute {name!r}")
