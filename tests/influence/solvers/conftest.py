"""One run per curvature, and its dense matrix, for all solver tests."""

from __future__ import annotations

import pytest
import torch

from influence.curvature import dense
from tests.cases import CURVATURES, damped
from tests.conftest import build_model, examples, fit_end

F64 = torch.float64


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """One run per curvature of one model and rows. EK-FAC's also serves as preconditioner.

    One layer of GPT-2 has four sites of different widths in 168 parameters, few enough that the
    dense GGN and Hessian take no time.
    """
    model = build_model("gpt2", layers=1, r=1)
    assert len(model.sites) == 4
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: fit_end(model, examples(4), curvature=spec, directory=folder / name)
        for name, spec in CURVATURES.items()
    }


@pytest.fixture(scope="session")
def dense_of(runs):
    """The dense `C + lambda I` of each curvature, by products with the identity."""
    matrices = {}

    def get(curvature):
        if curvature not in matrices:
            operator = damped(runs, curvature)
            matrices[curvature] = dense(operator.curvature) + torch.diag(
                operator.diagonal(torch.empty(0, dtype=F64))
            )
        return matrices[curvature]

    return get
