"""What `import analysis` hands on, and that it waits for no library before it is used."""

from __future__ import annotations

import subprocess
import sys

import analysis


def test_every_name_is_that_of_its_home():
    from analysis.evaluation.evaluation import evaluate
    from analysis.metrics.lds import lds
    from analysis.studies.memorization import memorization
    from analysis.studies.ood import study

    assert analysis.evaluate is evaluate
    assert analysis.lds is lds
    assert analysis.memorization is memorization
    assert analysis.study is study
    assert analysis.metrics.lds is lds
    assert all(getattr(analysis, name) is not None for name in analysis.__all__)


def test_importing_it_loads_none_of_the_slow_libraries():
    code = (
        "import sys, analysis, analysis.evaluation, analysis.report, analysis.demo\n"
        "import analysis.evaluation.options\n"
        "slow = {'torch', 'transformers', 'peft', 'pandas', 'scipy', 'datasets'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
