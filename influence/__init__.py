"""Influence functions for LoRA adapters: how much did training example i matter for query q?

    import influence

    model = influence.load("base", "adapter")
    train = influence.read_examples("train.jsonl")
    run = influence.fit(model, train, curvature=influence.EKFAC(), directory="run")
    scores = run.score(influence.read_examples("queries.jsonl"))     # .values [query, train]

Names are imported on first use, so that `influence --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from influence.adapter import AdaptedModel, ParamSpace, from_peft, load
    from influence.curvature import EKFAC, GGN, KFAC, Fisher, Hessian, Identity
    from influence.damping import Damping
    from influence.data import Example, Examples, examples_from_rows, read_examples
    from influence.fitting import fit
    from influence.gradients import check_gradients, stream_gradients
    from influence.loss import Contrast, Custom
    from influence.run import Run
    from influence.scores import Scores, SelfInfluence, score, self_influence
    from influence.solvers import ASTRA, CG, SGD, DataInf, Direct, LiSSA, Solution

_HOME = {
    "adapter": ("AdaptedModel", "ParamSpace", "from_peft", "load"),
    "curvature": ("EKFAC", "GGN", "KFAC", "Fisher", "Hessian", "Identity"),
    "damping": ("Damping",),
    "data": ("Example", "Examples", "examples_from_rows", "read_examples"),
    "gradients": ("check_gradients", "stream_gradients"),
    "fitting": ("fit",),
    "loss": ("Contrast", "Custom"),
    "run": ("Run",),
    "scores": ("Scores", "SelfInfluence", "score", "self_influence"),
    "solvers": ("ASTRA", "CG", "SGD", "DataInf", "Direct", "LiSSA", "Solution"),
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
    "check_gradients",
    "examples_from_rows",
    "fit",
    "from_peft",
    "load",
    "read_examples",
    "score",
    "self_influence",
    "stream_gradients",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"influence.{module}"), name)
    raise AttributeError(f"module 'influence' has no attribute {name!r}")
