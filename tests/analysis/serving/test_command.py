"""`analysis serve` in a process of its own: the address, its end by Ctrl-C, and refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import httpx
import pytest

from analysis.cli import main
from analysis.serving.server import bound


@pytest.fixture
def analysis(run_main):
    return lambda *arguments: run_main(main, "analysis", *arguments)


@pytest.mark.slow
def test_it_prints_its_address_and_ends_by_ctrl_c(served):
    command = [sys.executable, "-m", "analysis", "serve", "--run", served.folder / "run", "--json"]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        with httpx.Client(trust_env=False) as web:
            assert web.get(address).status_code == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out == ""
    assert err.splitlines()[-1] == "stopped"
    assert "Traceback" not in err


def test_a_port_in_use_and_no_run_are_clear_errors(analysis, served, tmp_path):
    taken = bound(0)
    port = taken.getsockname()[1]
    found = analysis("serve", "--run", served.folder / "run", "--port", port)
    taken.close()
    assert (found.status, found.out) == (2, "")
    assert f"port {port} of 127.0.0.1 is in use" in found.err
    missing = analysis("serve", "--run", tmp_path / "nothing")
    assert missing.status != 0
    assert "Traceback" not in missing.err


def test_there_is_no_option_for_another_host(analysis, served):
    found = analysis("serve", "--run", served.folder / "run", "--host", "0.0.0.0")
    assert found.status == 2
    assert "No such option: --host" in found.err


def test_its_help_speaks_of_no_other_option_that_it_needs(analysis):
    """The same options go with --run in `analysis report`, where there is --edit too."""
    found = analysis("serve", "--help")
    assert "--cleaning" in found.out
    assert "With --run" not in found.out
