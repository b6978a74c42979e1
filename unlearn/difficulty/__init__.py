"""Difficulty of unlearning a row by gradient ascent: measured by doing it, and forecast before."""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from unlearn.difficulty.forecast import Forecast, predict
    from unlearn.difficulty.measured import LEVELS, Measured, measure, read_measured
    from unlearn.difficulty.optimizers import SGD, Adam, Optimizer
    from unlearn.difficulty.protocol import Protocol

_HOMES = {
    "optimizers": ("Adam", "SGD", "Optimizer"),
    "protocol": ("Protocol",),
    "measured": ("LEVELS", "Measured", "measure", "read_measured"),
    "forecast": ("Forecast", "predict"),
}

__all__ = [
    "Adam",
    "Forecast",
    "LEVELS",
    "Measured",
    "Optimizer",
    "Protocol",
    "SGD",
    "measure",
    "predict",
    "read_measured",
]

__getattr__ = on_first_use(__name__, _HOMES)
