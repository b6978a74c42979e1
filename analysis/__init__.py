"""Did it work, and what do the scores mean?"""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from analysis import metrics as metrics
    from analysis.evaluation.evaluation import evaluate
    from analysis.evaluation.removal import removal
    from analysis.metrics.lds import lds
    from analysis.report.agreement import agreement
    from analysis.studies.memorization import memorization
    from analysis.studies.ood import study

_HOMES = {
    "evaluation.evaluation": ("evaluate",),
    "evaluation.removal": ("removal",),
    "metrics.lds": ("lds",),
    "report.agreement": ("agreement",),
    "studies.memorization": ("memorization",),
    "studies.ood": ("study",),
}

__all__ = [
    "agreement",
    "evaluate",
    "lds",
    "memorization",
    "metrics",
    "removal",
    "study",
]

__getattr__ = on_first_use(__name__, _HOMES, {"metrics": "metrics"})
