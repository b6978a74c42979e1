"""Names that a package hands on, imported on first use: `--help` does not wait for torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def on_first_use(
    package: str, homes: Mapping[str, Sequence[str]], modules: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """The `__getattr__` of a package that hands names on.

    `homes` has the names by the module below the package that defines them; `modules` the modules
    that are handed on themselves, by the name that they have here.
    """
    home_of = {name: module for module, names in homes.items() for name in names}
    whole = modules or {}

    def handed_on(name: str) -> Any:
        if name in whole:
            return import_module(f"{package}.{whole[name]}")
        if name in home_of:
            return getattr(import_module(f"{package}.{home_of[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return handed_on
