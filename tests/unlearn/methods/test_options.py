"""The options of a training: what is refused, by a sentence that names the option."""

from __future__ import annotations

import pytest
import torch

from influence.errors import InputError
from unlearn.methods.options import Options, optimizer_class


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": 0}, "lr 0 was given; expected a number above 0, or auto"),
        ({"lr": "fast"}, "lr 'fast' was given; expected a number above 0, or auto"),
        ({"lr": float("inf")}, "expected a number above 0, or auto"),
        ({"stride": -0.1}, "stride -0.1 was given; expected a number above 0, as in 0.015"),
        ({"stride": 0.01, "lr": 0.1}, "lr 0.1 and stride 0.01 were given"),
        ({"optimizer": "Adamm"}, "optimizer 'Adamm' was given; expected a class of torch.optim"),
        ({"schedule": "step"}, "schedule 'step' was given"),
        ({"warmup": -1}, "warmup"),
        ({"batch_size": 0}, "batch_size 0 was given; expected 1 or more"),
        ({"retain_batch_size": -2}, "retain_batch_size -2 was given; expected 1 or more"),
        ({"steps": 0}, "steps 0 was given; expected 1 or more"),
        ({"save_every": 0}, "save_every 0 was given; expected 1 or more"),
        ({"token_budget": 0}, "token_budget 0 was given; expected 1 or more"),
        ({"max_grad_norm": 0}, "max_grad_norm 0 was given, and nothing would move"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm nan was given; expected 0 or more"),
        ({"stop_damage": -1.0}, "stop_damage -1.0 was given; expected 0 or more, as in 0.1"),
        ({"max_damage": float("inf")}, "max_damage inf was given; expected 0 or more"),
        ({"seed": -1}, "seed -1 was given; expected 0 or more"),
        ({"until": "soon"}, "stopping rule 'soon' was given; expected one of base, expected"),
    ],
)
def test_impossible_options_are_refused(options, sentence):
    with pytest.raises(InputError) as error:
        Options(**options)
    assert sentence in str(error.value)


def test_what_is_possible_is_taken():
    """`auto` goes with a stride, which is then the first step's, and zero damage is a limit."""
    Options(lr="auto", stride=0.02, stop_damage=0.0, max_damage=0.0, until="loss=2")
    Options(lr=1e-3, optimizer=torch.optim.SGD, until="steps=3", seed=0)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adadelta", "NAdam"])
def test_optimizers_are_classes_of_torch(name):
    assert optimizer_class(name) is getattr(torch.optim, name)


@pytest.mark.parametrize("name", ["Optimizer", "LBFGS", "SparseAdam", "lr_scheduler", "adam", ""])
def test_what_takes_no_plain_step_is_no_optimizer(name):
    with pytest.raises(InputError, match=f"optimizer '{name}' was given; expected a class of"):
        optimizer_class(name)
