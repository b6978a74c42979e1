"""The ascent of many copies against torch.optim, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from unlearn.difficulty.ascent import Climb
from unlearn.difficulty.protocol import Protocol

F64 = torch.float64


class Plain:
    """One adapter and torch's own optimizer."""

    def __init__(self, theta: Tensor, optimizer: str, lr: float) -> None:
        self.theta = theta.clone().requires_grad_(True)
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
        self.optimizer = kind([self.theta], lr=lr, maximize=True)

    def step(self, gradient: Tensor) -> None:
        self.theta.grad = gradient.clone()
        self.optimizer.step()


def slopes(seed: int, *shape: int) -> Tensor:
    """Gradients of very different sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(*shape, dtype=F64, generator=generator)
    gradients = directions * 10.0 ** torch.randint(-9, 3, shape[-1:], generator=generator)
    gradients[..., 0] = 0
    return gradients


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_climb_is_torch_optim_step_by_step(optimizer):
    """Steps of all copies, of some only, on another way, and copies that are left behind."""
    start, lr = slopes(1, 12), 0.03
    climb = Climb(start, 5, Protocol(optimizer, lr))
    plain = [Plain(start, optimizer, lr) for _ in range(5)]

    def same(climb: Climb, expected: list[Plain], taken: list[int]) -> None:
        for theta, copy in zip(climb.theta, expected, strict=True):
            torch.testing.assert_close(theta, copy.theta.detach(), rtol=1e-12, atol=1e-15)
        assert climb.taken.tolist() == taken

    for number in range(4):
        gradient = slopes(10 + number, 5, 12)
        climb.step(gradient)
        for copy, g in zip(plain, gradient, strict=True):
            copy.step(g)
    same(climb, plain, [4] * 5)
    for number in range(3):
        gradient = slopes(20 + number, 2, 12)
        climb.step(gradient, np.array([3, 1]))
        for copy, g in zip((plain[3], plain[1]), gradient, strict=True):
            copy.step(g)
    same(climb, plain, [4, 7, 4, 7, 4])
    climb.keep(np.array([0, 1, 3]))
    plain = [plain[0], plain[1], plain[3]]
    same(climb, plain, [4, 7, 7])
    for number in range(3):
        gradient = slopes(40 + number, 3, 12)
        climb.step(gradient)
        for copy, g in zip(plain, gradient, strict=True):
            copy.step(g)
    same(climb, plain, [7, 10, 10])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_first_rate_is_what_a_first_step_gains_to_first_order(optimizer):
    gradient = slopes(5, 3, 12).clamp(min=-50, max=50)
    gradient[gradient.abs() < 1e-4] = 0  # Adam's epsilon is far below the rest
    climb = Climb(slopes(1, 12), 3, Protocol(optimizer, 1e-3))
    rate, before = climb.first_rate(gradient), climb.theta.clone()
    climb.step(gradient)
    np.testing.assert_allclose(rate, ((climb.theta - before) * gradient).sum(1).numpy(), rtol=1e-3)


def test_float32_steps_are_those_of_torch_optim():
    """The bias corrections cost float32 a few digits.

    1 - 0.999 is off by 1.3e-5 of itself, its root by half.
    """
    start = torch.zeros(12)
    climb, plain = Climb(start, 1, Protocol("adam", 1.0)), Plain(start, "adam", 1.0)
    gradient = slopes(2, 1, 12).float()
    climb.step(gradient)
    plain.step(gradient[0])
    assert (climb.theta[0] - plain.theta.detach()).abs().max() < 1e-5
