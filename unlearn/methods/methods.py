"""The methods of gradient-based unlearning, each a composition of parts; `unlearn.methods.loop` runs any of them.

    target     what the forget rows are trained towards      unlearn.targets
    forget     the term of the forget rows                   unlearn.terms
    retain     the term of the retained rows                 unlearn.terms
    combine    how both gradients become one                 unlearn.combine
    finish     what is made of the trained adapter           here

A method of your own is a `Method` of your own parts; README has one in ten lines.
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

import torch
from torch import Tensor

from influence.errors import InputError, NumericalError
from unlearn.methods import targets, terms
from unlearn.methods.combine import Normalised, Sparse, Step, Weighted, above_zero
from unlearn.methods.targets import Setup, Target
from unlearn.methods.terms import Term

#: Largest multiple of a move that task arithmetic subtracts.
LARGEST = 16.0
#: Halvings of an interval when a finish looks for a share of a move.
HALVINGS = 7


@dataclass(frozen=True, eq=False)
class Trained:
    """A training's two ends, `[P]`, and what a finish may measure: mean losses of forget and retained rows, and the goal."""

    before: Tensor
    after: Tensor
    forget_loss: Callable[[Tensor], float]
    retain_loss: Callable[[Tensor], float]
    goal: float

    def at(self, share: float) -> Tensor:
        """`before + share (after - before)`, `[P]`."""
        return self.before + share * (self.after - self.before)


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
        Makes what the forget rows are trained towards.
    combine : callable
        `(forget, retain, step)`, gradients `[P]` or None, to the gradient `[P]` that the optimizer gets.
    finish : callable, optional
        `(Trained) -> theta` [P]: the adapter that is made of the training.
    lr : float, optional
        The default learning rate. Without one it is such that the first step's move has `stride` of the adapter's length,
        whatever the optimizer and the size of the model.
    stride : float
        As said; measured, see `unlearn methods --guide`.
    automatic : bool
        Whether GeN changes the rate on the way (`unlearn.methods.automatic_rate`).
    optimizer : str
        Name of a class of `torch.optim`.
    steps : int
        The most steps.
    until : str
        The default stopping rule.
    general : bool
        Whether its retained rows are meant to come from elsewhere than the forget rows (`--retain F`).
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
    def needs_reference(self) -> bool:
        """Whether it looks at the adapter before unlearning."""
        asked = [term.reference for term in (self.forget, self.retain) if term is not None]
        return any(asked) or self.target in (targets.adversarial, targets.predicted)

    @property
    def cost(self) -> tuple[float, float]:
        """Row-gradients of a step for each forget row and each retained row; a forward alone counts a third."""
        forget = 0.0 if self.forget is None else 1 + self.forget.logits / 3
        retain = 0.0 if self.retain is None else 1 + self.retain.logits / 3
        if self.automatic:
            from unlearn.methods.automatic_rate import EVERY, POINTS

            retain += len(POINTS) / EVERY / 3
        return forget * (2 if self.target is targets.refusals else 1), retain

    def describe(self) -> dict[str, Any]:
        """The row of the methods' table, ready for JSON."""
        forget, retain = self.cost
        return {
            "name": self.name,
            "title": self.title,
            "source": self.source,
            "targets": _name(self.target),
            "forget": None if self.forget is None else self.forget.name,
            "retain": None if self.retain is None else self.retain.name,
            "combine": _name(self.combine),
            "finish": None if self.finish is None else _name(self.finish),
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


def _name(part: Any) -> str:
    if inspect.isfunction(part):
        return part.__name__
    return str(part) if type(part).__str__ is not object.__str__ else type(part).__name__


# ---- what is made of a training ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Negated:
    """Task arithmetic: the other way from fine-tuning on the forget rows, `before - a (after - before)`.

    Ilharco et al. 2023, arXiv 2212.04089. Without `scale` a is the least one, up to `LARGEST`, that brings the forget rows to
    their goal, or else the one of the highest loss. It is A and B that are negated, not their product: beside `-a dW` that has a
    term `a^2 dB dA`, which knows no sign, so large a need not forget more.
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            above_zero("scale", self.scale, or_zero=True)

    def __call__(self, trained: Trained) -> Tensor:
        """The negated move from the adapter before, `[P]`."""
        if self.scale is not None:
            return trained.at(-self.scale)
        losses: dict[float, float] = {}

        def reached(a: float) -> bool:
            try:
                losses[a] = trained.forget_loss(trained.at(-a))
            except NumericalError:  # so far out that nothing is finite
                return True
            return losses[a] >= trained.goal

        high = 1.0
        while not reached(high) and high < LARGEST:
            high *= 2
        if losses.get(high, trained.goal) < trained.goal:
            return trained.at(-max(losses, key=lambda a: losses[a]))
        return trained.at(-bisect(reached, 0.0 if high == 1 else high / 2, high))

    def __str__(self) -> str:
        """As the methods' table shows it."""
        return f"before - {'a' if self.scale is None else f'{self.scale:g}'} (after - before)"


@dataclass(frozen=True)
class Controlled:
    """Unlearning with control: as much of the move as keeps the retained rows' likelihood at `bar` of what it was.

    Wang et al. 2024, arXiv 2406.09179: methods are compared at equal retention. The likelihood is the geometric mean per token,
    so the retained rows' mean loss may rise by `-log(bar)` nats. `first` is another finish that comes before.
    """

    bar: float = 0.9
    first: Callable[[Trained], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.bar < 1:
            raise InputError(
                f"control {self.bar:g} was given; expected a share of the likelihood between 0 and 1, as in 0.9"
            )

    def __call__(self, trained: Trained) -> Tensor:
        """The mixture of both ends, `[P]`."""
        if self.first is not None:
            trained = replace(trained, after=self.first(trained))
        allowed = trained.retain_loss(trained.before) - float(
            torch.log(torch.tensor(self.bar, dtype=torch.float64))
        )
        lost = lambda share: trained.retain_loss(trained.at(share)) > allowed  # noqa: E731
        if not lost(1.0):
            return trained.after
        return trained.at(bisect(lost, 0.0, 1.0, above=False))

    def __str__(self) -> str:
        """As the methods' table shows it."""
        first = "" if self.first is None else f"{_name(self.first)}; "
        return f"{first}mix with before until likelihood {self.bar:g} of the retained rows is left"


def bisect(holds: Callable[[float], bool], low: float, high: float, *, above: bool = True) -> float:
    """By bisection about where `holds` begins between low and high: the end where it does (`above`), or does not."""
    for _ in range(HALVINGS):
        half = (low + high) / 2
        low, high = (low, half) if holds(half) else (half, high)
    return high if above else low


# ---- the methods ---------------------------------------------------------------------------------------------

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
    """Ascent on forget rows; outputs on retained rows of their kind are held."""
    return Method(
        "ga-kl",
        forget=terms.ascent,
        retain=terms.divergence,
        combine=Weighted(retain_weight),
        title="gradient ascent + KL on in-distribution rows",
        source=_YAO,
    )


def ga_kl_general(retain_weight: float = 1.0) -> Method:
    """Ascent on forget rows; outputs on general rows are held."""
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
    """Negative preference optimisation, with descent on retained rows (retain_weight=0: without)."""
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
    """Towards the outputs that influence predicts of the retrained model; retained rows keep theirs."""
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
    """Gradient ascent, mixed with the adapter before until the retained rows are back (`controlled` does it to any method)."""
    return replace(
        controlled(ga(), bar), name="control", title="gradient ascent under control of retention"
    )


def controlled(method: Method, bar: float = 0.9) -> Method:
    """Any method, mixed with the adapter before until `bar` of the retained rows' likelihood is left."""
    source = "; ".join(
        part for part in (method.source, "Wang et al. 2024, arXiv 2406.09179") if part
    )
    return replace(method, finish=Controlled(bar, method.finish), source=source)


#: The methods by name; calling one makes a `Method`, its keywords are the method's own numbers.
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
    """A method by its name, or `FILE.py:NAME`, a `Method` (or a function that gives one) in a Python file of yours, which is run.

    `numbers` are its keywords, as in `beta=0.05`. Raises `InputError` for an unknown name or keyword.
    """
    if isinstance(method, Method):
        _refuse_numbers(method.name, numbers, [])
        return method
    make = METHODS.get(method) or (_from_file(method) if ".py:" in method else None)
    if make is None:
        near = get_close_matches(method, METHODS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"method {method!r} was given{hint}; expected one of {', '.join(METHODS)}, or FILE.py:NAME with a method of your own"
        )
    if isinstance(make, Method):
        _refuse_numbers(method, numbers, [])
        return _signed(make, method)
    parameters = inspect.signature(make).parameters
    _refuse_numbers(method, numbers, list(parameters))
    missing = [
        key for key, one in parameters.items() if one.default is one.empty and key not in numbers
    ]
    if missing:
        raise InputError(
            f"{method} needs {', '.join(missing)}: give {missing[0]}=NUMBER (--set), or a default in the file"
        )
    found = make(**numbers)
    if not isinstance(found, Method):
        raise InputError(
            f"{method} gave a {type(found).__name__}: expected an unlearn.Method, or a function that makes one"
        )
    return _signed(found, method)


def _signed(method: Method, name: str) -> Method:
    """A method of a file, with the file's digest as part of its source, for the record."""
    if name in METHODS:
        return method
    file = Path(name.rpartition(":")[0])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return replace(
        method, source="; ".join([*filter(None, [method.source]), f"{name}, sha256 {digest}"])
    )


def _refuse_numbers(name: str, numbers: Mapping[str, float], known: list[str]) -> None:
    unknown = [key for key in numbers if key not in known]
    if unknown:
        expected = f"expected {', '.join(known)}" if known else "it has none"
        raise InputError(f"method {name} has no number called {', '.join(unknown)}: {expected}")


def _from_file(place: str) -> Any:
    """The object `NAME` of `FILE.py`."""
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
    found = getattr(module, name, None)
    if not (isinstance(found, Method) or callable(found)):
        raise InputError(
            f"{file} has no method {name!r}: expected an unlearn.Method, or a function that makes one"
        )
    return found
