"""The methods of gradient-based unlearning, each a composition of parts that one loop runs.

    target     what the forget rows are trained towards      unlearn.methods.targets
    forget     the term of the forget rows                   unlearn.methods.terms
    retain     the term of the retained rows                 unlearn.methods.terms
    combine    how both gradients become one                 unlearn.methods.combine
    finish     what is made of the trained adapter           unlearn.methods.finish

A method of your own is a `Method` of your own parts, in a file of its own: no other file names it
(docs/methods.md has one in ten lines).
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from influence.errors import InputError
from unlearn.methods import targets, terms
from unlearn.methods.combine import Normalised, Sparse, Step, Weighted
from unlearn.methods.finish import Controlled, Negated, Trained, name_of
from unlearn.methods.targets import Setup, Target, TargetRule, rule_of
from unlearn.methods.terms import Term


@dataclass(frozen=True)
class Method:
    """A method of unlearning as a composition of its parts.

    Attributes
    ----------
    name : str
        What it is called.
    forget, retain : Term, optional
        What is minimised on forget rows and on retained rows; at least one.
    target : callable
        `(Setup) -> Target`, makes what the forget rows are trained towards: a `TargetRule`, or a
        plain function.
    combine : callable
        `(forget, retain, step)`, gradients `[P]` or None, to the gradient `[P]` that the
        optimizer gets.
    finish : callable, optional
        `(Trained) -> theta` [P]: the adapter that is made of the training.
    lr : float, optional
        The default learning rate. Without one it is such that the first step's move has `stride`
        of the adapter's length, whatever the optimizer and the size of the model.
    stride : float
        As said; measured by `benchmarks/unlearning.py` (docs/choosing-a-rate.md).
    automatic : bool
        Whether GeN changes the rate on the way (`unlearn.methods.automatic_rate`).
    optimizer : str
        Name of a class of `torch.optim`.
    steps : int
        The most steps.
    until : str
        The default stopping rule.
    general : bool
        Whether its retained rows are meant to come from elsewhere than the forget rows
        (`--retain F`).
    title, source : str
        For the table of methods.
    """

    name: str
    forget: Term | None = None
    retain: Term | None = None
    target: Callable[[Setup], Target] = targets.own
    combine: Callable[[Tensor | None, Tensor | None, Step], Tensor] = field(
        default_factory=Weighted
    )
    finish: Callable[[Trained], Tensor] | None = None
    lr: float | None = None
    stride: float = 0.015
    automatic: bool = False
    optimizer: str = "Adam"
    steps: int = 200
    until: str = "base"
    general: bool = False
    title: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.forget is None and self.retain is None:
            raise InputError(
                f"method {self.name!r} has neither a forget nor a retain term: give it one"
            )

    @property
    def needs_retain(self) -> bool:
        """Whether every step runs retained rows."""
        return self.retain is not None

    @property
    def target_rule(self) -> TargetRule:
        """The target with what it needs."""
        return rule_of(self.target)

    @property
    def needs_reference(self) -> bool:
        """Whether it looks at the adapter before unlearning."""
        terms_need = [term.reference for term in (self.forget, self.retain) if term is not None]
        return any(terms_need) or self.target_rule.reference

    @property
    def cost(self) -> tuple[float, float]:
        """Row-gradients of a step for each forget row and each retained row.

        A forward alone counts a third.
        """
        forget = 0.0 if self.forget is None else 1 + self.forget.logits / 3
        retain = 0.0 if self.retain is None else 1 + self.retain.logits / 3
        if self.automatic:
            from unlearn.methods.automatic_rate import EVERY, POINTS

            retain += len(POINTS) / EVERY / 3
        return forget * (2 if self.target_rule.paired else 1), retain

    def describe(self) -> dict[str, Any]:
        """The row of the methods' table, ready for JSON."""
        forget, retain = self.cost
        return {
            "name": self.name,
            "title": self.title,
            "source": self.source,
            "targets": name_of(self.target_rule.make),
            "forget": None if self.forget is None else self.forget.name,
            "retain": None if self.retain is None else self.retain.name,
            "combine": name_of(self.combine),
            "finish": None if self.finish is None else name_of(self.finish),
            "needs_retain": self.needs_retain,
            "needs_reference": self.needs_reference,
            "retain_rows": None
            if not self.needs_retain
            else "general"
            if self.general
            else "in-distribution",
            "cost_per_step": {
                "per_forget_row": round(forget, 3),
                "per_retain_row": round(retain, 3),
            },
            "optimizer": self.optimizer,
            "lr": "auto" if self.automatic else self.lr,
            "stride": None if self.lr is not None else self.stride,
            "until": self.until,
            "steps": self.steps,
        }


# ---- the methods ---------------------------------------------------------------------------------

_YAO = "Yao et al. 2024, arXiv 2402.15159"


def ga() -> Method:
    """Gradient ascent: the forget rows' loss is maximised."""
    return Method("ga", forget=terms.ascent, title="gradient ascent", source=_YAO)


def random_labels() -> Method:
    """Fine-tuning on random labels."""
    return Method(
        "random-labels",
        forget=terms.descent,
        target=targets.random,
        title="fine-tuning on random labels",
        source=_YAO,
    )


def adversarial_labels() -> Method:
    """Fine-tuning on the best wrong labels."""
    return Method(
        "adversarial-labels",
        forget=terms.descent,
        target=targets.adversarial,
        title="fine-tuning on the likeliest wrong labels",
        source=_YAO,
    )


def ga_gd(retain_weight: float = 1.0) -> Method:
    """Ascent on forget rows, descent on retained rows of their kind."""
    return Method(
        "ga-gd",
        forget=terms.ascent,
        retain=terms.descent,
        combine=Weighted(retain_weight),
        title="gradient ascent + descent on in-distribution rows",
        source=_YAO,
    )


def ga_gd_general(retain_weight: float = 1.0) -> Method:
    """Ascent on forget rows, descent on general rows."""
    return replace(
        ga_gd(retain_weight),
        name="ga-gd-general",
        general=True,
        title="gradient ascent + descent on general rows",
    )


def ga_kl(retain_weight: float = 1.0) -> Method:
    """Ascent on forget rows while outputs on retained rows of their kind are held."""
    return Method(
        "ga-kl",
        forget=terms.ascent,
        retain=terms.divergence,
        combine=Weighted(retain_weight),
        title="gradient ascent + KL on in-distribution rows",
        source=_YAO,
    )


def ga_kl_general(retain_weight: float = 1.0) -> Method:
    """Ascent on forget rows while outputs on general rows are held."""
    return replace(
        ga_kl(retain_weight),
        name="ga-kl-general",
        general=True,
        title="gradient ascent + KL on general rows",
    )


def ngdiff() -> Method:
    """Normalised gradient difference, with an automatic learning rate."""
    return Method(
        "ngdiff",
        forget=terms.ascent,
        retain=terms.descent,
        combine=Normalised(),
        optimizer="SGD",
        stride=0.007,
        automatic=True,
        title="normalised gradient difference, automatic rate",
        source="Bu et al. 2024, arXiv 2410.22086",
    )


def npo(beta: float = 0.1, retain_weight: float = 1.0) -> Method:
    """Negative preference optimisation, with descent on retained rows (retain_weight=0: none)."""
    return _preference(
        "npo",
        terms.npo(beta),
        retain_weight,
        "negative preference optimisation, with descent on retained rows",
        "Zhang et al. 2024, arXiv 2404.05868",
    )


def simnpo(beta: float = 2.5, gamma: float = 0.0, retain_weight: float = 1.0) -> Method:
    """NPO by length and without a reference."""
    return _preference(
        "simnpo",
        terms.simnpo(beta, gamma),
        retain_weight,
        "simple NPO, with descent on retained rows",
        "Fan et al. 2024, arXiv 2410.07163",
    )


def idk_dpo(beta: float = 0.1, retain_weight: float = 1.0) -> Method:
    """Preference of "I do not know" over the row's own completion."""
    made = _preference(
        "idk-dpo",
        terms.dpo(beta),
        retain_weight,
        'DPO towards "I do not know", with descent on retained rows',
        "Maini et al. 2024, arXiv 2401.06121; Zhang et al. 2024",
    )
    return replace(made, target=targets.refusals)


def _preference(name: str, term: Term, retain_weight: float, title: str, source: str) -> Method:
    retain, combine = (
        (terms.descent, Weighted(retain_weight)) if retain_weight else (None, Weighted())
    )
    return Method(name, forget=term, retain=retain, combine=combine, title=title, source=source)


def task_arithmetic(scale: float | None = None) -> Method:
    """Fine-tuning on the forget rows, and the other way."""
    return Method(
        "task-arithmetic",
        forget=terms.descent,
        finish=Negated(scale),
        steps=30,
        until="steps=30",
        title="negated fine-tuning on the forget rows",
        source="Ilharco et al. 2023, arXiv 2212.04089; Shi et al. 2024, arXiv 2407.06460",
    )


def l1_sparse(penalty: float = 5e-4) -> Method:
    """Fine-tuning on retained rows under a falling l1 penalty."""
    return Method(
        "l1-sparse",
        retain=terms.descent,
        combine=Sparse(penalty),
        title="fine-tuning on retained rows with an l1 penalty",
        source="Jia et al. 2023, arXiv 2304.04934",
    )


def datamodel_matching(retain_weight: float = 1.0) -> Method:
    """Towards the outputs predicted of the retrained model, while retained rows keep theirs."""
    return Method(
        "datamodel-matching",
        forget=terms.matching,
        retain=terms.divergence,
        target=targets.predicted,
        combine=Weighted(retain_weight),
        until="expected",
        title="matching the outputs predicted for the retrained model",
        source="Georgiev et al. 2024, arXiv 2410.23232",
    )


def control(bar: float = 0.9) -> Method:
    """Gradient ascent, mixed with the adapter before until the retained rows are back.

    `controlled` does it to any method.
    """
    return replace(
        controlled(ga(), bar), name="control", title="gradient ascent under control of retention"
    )


def controlled(method: Method, bar: float = 0.9) -> Method:
    """Any method, mixed with the adapter before until `bar` of the retained likelihood is left."""
    source = "; ".join(
        part for part in (method.source, "Wang et al. 2024, arXiv 2406.09179") if part
    )
    return replace(method, finish=Controlled(bar, method.finish), source=source)


#: The methods by name. Calling one makes a `Method`; its keywords are the method's own numbers.
METHODS: Mapping[str, Callable[..., Method]] = {
    "ga": ga,
    "random-labels": random_labels,
    "adversarial-labels": adversarial_labels,
    "ga-gd-general": ga_gd_general,
    "ga-gd": ga_gd,
    "ga-kl-general": ga_kl_general,
    "ga-kl": ga_kl,
    "ngdiff": ngdiff,
    "npo": npo,
    "simnpo": simnpo,
    "idk-dpo": idk_dpo,
    "task-arithmetic": task_arithmetic,
    "l1-sparse": l1_sparse,
    "datamodel-matching": datamodel_matching,
    "control": control,
}


def method_of(method: str | Method, **numbers: float) -> Method:
    """A method by its name, or from a Python file of yours, which is run.

    Parameters
    ----------
    method
        A name of `METHODS`, `FILE.py:NAME` with a `Method` or a function that gives one, or itself.
    numbers
        The method's own numbers, as in `beta=0.05`.

    Raises
    ------
    InputError
        For an unknown name or number, and for a file that cannot be run or has no such method.
    """
    if isinstance(method, Method):
        _refuse_numbers(method.name, numbers, [])
        return method
    make = METHODS.get(method) or (_from_file(method) if ".py:" in method else None)
    if make is None:
        near = get_close_matches(method, METHODS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"method {method!r} was given{hint}; expected one of {', '.join(METHODS)}, "
            "or FILE.py:NAME with a method of your own"
        )
    if isinstance(make, Method):
        _refuse_numbers(method, numbers, [])
        return _signed(make, method)
    parameters = inspect.signature(make).parameters
    _refuse_numbers(method, numbers, list(parameters))
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in numbers
    ]
    if missing:
        raise InputError(
            f"{method} needs {', '.join(missing)}: give {missing[0]}=NUMBER (--set), "
            "or a default in the file"
        )
    made = make(**numbers)
    if not isinstance(made, Method):
        raise InputError(
            f"{method} gave a {type(made).__name__}: "
            "expected an unlearn.Method, or a function that makes one"
        )
    return _signed(made, method)


def _signed(method: Method, name: str) -> Method:
    """A method of a file, with the file's digest as part of its source, for the record."""
    if name in METHODS:
        return method
    file = Path(name.rpartition(":")[0])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    signature = f"{name}, sha256 {digest}"
    return replace(method, source=f"{method.source}; {signature}" if method.source else signature)


def _refuse_numbers(name: str, numbers: Mapping[str, float], accepted: list[str]) -> None:
    """Refuse numbers that a method does not have."""
    unknown = [key for key in numbers if key not in accepted]
    if unknown:
        expected = f"expected {', '.join(accepted)}" if accepted else "it has none"
        raise InputError(f"method {name} has no number called {', '.join(unknown)}: {expected}")


def _from_file(place: str) -> Any:
    """The object `NAME` of `FILE.py`, a `Method` or something callable."""
    file, _, name = place.rpartition(":")
    spec = (
        importlib.util.spec_from_file_location("unlearn_method", file)
        if Path(file).is_file()
        else None
    )
    if spec is None or spec.loader is None:
        raise InputError(
            f"method {place!r} was given, and there is no file {file}: give FILE.py:NAME"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own lines do
        raise InputError(f"{file} could not be run: {type(error).__name__}: {error}") from error
    made = getattr(module, name, None)
    if not (isinstance(made, Method) or callable(made)):
        raise InputError(
            f"{file} has no method {name!r}: "
            "expected an unlearn.Method, or a function that makes one"
        )
    return made
