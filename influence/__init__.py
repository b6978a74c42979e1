"""Influence functions for LoRA adapters: how much did training example i matter for query q?

import influence

model = influence.load("base", "adapter")
train = influence.read_examples("train.jsonl")
run = influence.fit(model, train, curvature=influence.EKFAC(), directory="run")
scores = run.score(influence.read_examples("queries.jsonl"))     # .values [query, train]
"""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from influence.adapter import AdaptedModel, ParamSpace
    from influence.curvature import EKFAC, GGN, KFAC, Fisher, Hessian, Identity
    from influence.damping import Damping
    from influence.estimating import Estimate, estimate
    from influence.fitting import fit
    from influence.gradient_check import check_gradients
    from influence.gradients import stream_gradients
    from influence.loading import from_peft, load
    from influence.measurements import Contrast, Custom
    from influence.memory import bounded
    from influence.row_files import read_examples
    from influence.rows import Example, Examples, examples_from_rows
    from influence.run import Run
    from influence.scorefile import Scores, SelfInfluence
    from influence.scores import score, self_influence
    from influence.solvers import ASTRA, CG, SGD, DataInf, Direct, LiSSA, Solution
    from influence.trainer import from_trainer
    from influence.training_record import TrainingRecord

_HOMES = {
    "adapter": ("AdaptedModel", "ParamSpace"),
    "loading": ("from_peft", "load"),
    "curvature": ("EKFAC", "GGN", "KFAC", "Fisher", "Hessian", "Identity"),
    "damping": ("Damping",),
    "row_files": ("read_examples",),
    "rows": ("Example", "Examples", "examples_from_rows"),
    "gradient_check": ("check_gradients",),
    "gradients": ("stream_gradients",),
    "estimating": ("Estimate", "estimate"),
    "fitting": ("fit",),
    "measurements": ("Contrast", "Custom"),
    "memory": ("bounded",),
    "run": ("Run",),
    "scorefile": ("Scores", "SelfInfluence"),
    "scores": ("score", "self_influence"),
    "solvers": ("ASTRA", "CG", "SGD", "DataInf", "Direct", "LiSSA", "Solution"),
    "trainer": ("from_trainer",),
    "training_record": ("TrainingRecord",),
}

__all__ = [
    "ASTRA",
    "AdaptedModel",
    "CG",
    "Contrast",
    "Custom",
    "Damping",
    "DataInf",
    "Direct",
    "EKFAC",
    "Estimate",
    "Example",
    "Examples",
    "Fisher",
    "GGN",
    "Hessian",
    "Identity",
    "KFAC",
    "LiSSA",
    "ParamSpace",
    "Run",
    "SGD",
    "Scores",
    "SelfInfluence",
    "Solution",
    "TrainingRecord",
    "bounded",
    "check_gradients",
    "estimate",
    "examples_from_rows",
    "fit",
    "from_peft",
    "from_trainer",
    "load",
    "read_examples",
    "score",
    "self_influence",
    "stream_gradients",
]

__getattr__ = on_first_use(__name__, _HOMES)
