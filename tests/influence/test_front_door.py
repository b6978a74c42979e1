"""Names that a package hands on, imported on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import influence
from influence.front_door import on_first_use


def test_a_name_comes_from_its_home_and_a_module_whole():
    get = on_first_use("influence", {"damping": ["Damping"]}, {"tables": "tables"})
    from influence import damping, tables

    assert get("Damping") is damping.Damping
    assert get("tables") is tables
    with pytest.raises(AttributeError, match="module 'influence' has no attribute 'nobody'"):
        get("nobody")


@pytest.mark.parametrize("name", influence.__all__)
def test_every_name_that_influence_exports_is_there(name):
    assert getattr(influence, name).__name__ == name


def test_importing_influence_imports_no_heavy_package():
    code = (
        "import sys, influence; "
        "print(sorted({'torch', 'transformers', 'peft', 'pandas', 'scipy', 'datasets'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
