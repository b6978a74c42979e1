"""Several dampings at once are each what it is alone, and what the dense inverse gives."""

from __future__ import annotations

import pytest
import torch

from influence.curvature import Damped
from influence.curvature.base import dense, inverse_products
from influence.curvature.identity import IdentityCurvature
from influence.curvature.kfac import KroneckerBlock
from influence.curvature.several import Several, all_inverse_products, solve_all
from tests.cases import F64
from tests.influence.curvature.helpers import moments_of, random_rows, replace_unit


@pytest.mark.parametrize(
    "options", [{}, {"max_width": 4, "rank": 3, "memory_share": 0}], ids=["whole", "sketched"]
)
def test_dampings_of_several_curvatures_are_those_of_the_dense_inverses(options, monkeypatch):
    leaves = [("s.lora_A", (3, 9)), ("s.lora_B", (7, 2))]
    x = [random_rows(1, 6, 4, 9), random_rows(2, 6, 4, 2)]
    g = [random_rows(3, 6, 4, 3), random_rows(4, 6, 4, 7)]
    space, moments = moments_of(leaves, x, g, **options)
    kfac = replace_unit(moments, 0.1).kronecker()
    assert isinstance(kfac, Several)
    plain = IdentityCurvature(tuple(leaf.stop - leaf.start for leaf in space.leaves))
    lams = [torch.tensor([a, b], dtype=F64) for a, b in ((0.3, 2.0), (5.0, 0.01), (1e-3, 1e-3))]
    one = torch.ones(1, dtype=F64)
    operators = [Damped(kfac, lams[0]), Damped(plain, one), *(Damped(kfac, x) for x in lams[1:])]
    v, kept = random_rows(5, 4, space.size), random_rows(5, 4, space.size)

    rotations, real = [], KroneckerBlock.rotate

    def rotate(block, flat):
        rotations.append(block)
        return real(block, flat)

    with monkeypatch.context() as patch:
        patch.setattr(KroneckerBlock, "rotate", rotate)
        answers, products = solve_all(operators, v), all_inverse_products(operators, v)
    assert len(rotations) == 2 * len(leaves)  # once for the answers, once for the products
    assert torch.equal(v, kept)
    assert len(answers) == len(products) == 4
    for operator, answer, product in zip(operators, answers, products, strict=True):
        matrix = torch.diag(operator.diagonal(v)).to(F64)
        if operator.curvature is kfac:
            matrix = matrix + dense(kfac)
        expected = torch.linalg.solve(matrix, v.T).T
        torch.testing.assert_close(answer, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(product, (v * expected).sum(1), rtol=1e-10, atol=0)
        assert torch.equal(answer, operator.curvature.solve(v, operator.lam))
        assert torch.equal(product, inverse_products(operator, v))
