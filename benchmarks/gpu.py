"""Fit, score, edit and forecast on one GPU, at the shapes of Llama 1B, 3B and 8B.

    python benchmarks/gpu.py [--shapes tiny,1b,3b,8b,8b-4bit] [--out gpu.json] [--budget 660]
    python benchmarks/gpu.py --device cpu --shapes tiny

Needs no network and no files: weights are random, in bfloat16, with LoRA of rank 16 on all linear
layers, and rows are random tokens of lognormal lengths, 50 to 1,000. Losses and scores of such
models mean nothing; seconds, memory and agreement of gradients do.

Steps of a shape: `build`; `gradients` (of two rows, streamed and by a plain loop); `bare` (forward
and backward of some batches by transformers alone); `fit few`; `pass` (the same batches as `bare`
by a fit, and one of them under torch.profiler); `fit`; `score`; `remove` (two rows); `forecast`
(ten rows). A step that fails is reported with its traceback, and the next one goes on. The file is
written after every step, no step begins once the budget is over, and one that takes more than its
share of what is left is stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import influence
import unlearn
from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.curvature import EKFAC
from influence.fitted_point import PointFit, Storage
from influence.gradients import stream_gradients, tape
from influence.precision import computing_in
from influence.run import Run
from influence.tokens import TokenizedExamples, tokenize

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_shapes import (  # pyright: ignore[reportMissingImports]
    LLAMA,
    QUANTISED,
    SHAPES,
    Device,
    build,
    eigen_seconds,
    products,
    token_rows,
)

#: Rows of the short fit that tells how many rows the long one can have, and share of a shape's
#: time that the long one may take.
FEW, FIT_SHARE = 48, 0.35
#: Share of a shape's time left that one step may take, and the least seconds that it gets.
STEP_SHARE, LEAST = 0.7, 5.0
#: Batches that are timed bare and in a pass.
TIMED = 4
#: Kernels of the profile that are listed.
LISTED = 15
#: Calls of CUDA that stop the host, and copies that come back from the device.
STOPS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
COPIES = ("Memcpy DtoH",)
#: The same on a CPU: numbers that are fetched from tensors.
FETCHES = ("aten::_local_scalar_dense",)


@dataclass
class Budget:
    """Seconds that everything may take, from now on."""

    seconds: float
    start: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """What is left of them."""
        return self.seconds - (time.perf_counter() - self.start)


@dataclass
class Report:
    """What was measured, as it is written to a file after every step."""

    path: Path
    record: dict[str, Any]

    def write(self) -> None:
        """Write the file."""
        self.path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


class Bench:
    """The steps of one shape. What a step leaves for the next ones is an attribute."""

    def __init__(
        self, shape: str, device: Device, options: argparse.Namespace, report: Report, folder: Path
    ) -> None:
        self.shape, self.device, self.options, self.report = shape, device, options, report
        self.folder = folder
        self.steps: dict[str, Any] = {}
        report.record["shapes"][shape] = self.steps
        vocabulary = LLAMA[shape.removesuffix(QUANTISED)]["vocab_size"]
        lengths = {"shortest": 5, "longest": 60} if shape.startswith("tiny") else {}
        self.rows = token_rows(options.rows, vocabulary, 0, **lengths)
        self.queries = token_rows(options.queries, vocabulary, 1, **lengths)
        self.model: AdaptedModel | None = None
        self.run: Run | None = None

    def work(self, budget: Budget, share: float) -> None:
        """Every step, while there is time. `share` of what is left is this shape's."""
        end = Budget(budget.left * share)
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "build": self.build,
            "gradients": self.gradients,
            "bare": self.bare,
            "fit few": self.fit_few,
            "pass": self.one_pass,
            "fit": lambda: self.fit(min(end.left, end.seconds * FIT_SHARE)),
            "score": self.score,
            "remove": self.remove,
            "forecast": self.forecast,
        }
        for name, step in steps.items():
            self.steps[name] = self.step(step, end)
            self.report.write()
        self.model = self.run = None
        gc.collect()

    def step(self, work: Callable[[], dict[str, Any]], budget: Budget) -> dict[str, Any]:
        """One step's results, seconds and peak memory, or why there are none."""
        if budget.left <= 0:
            return {"skipped": "no time is left"}
        gc.collect()
        self.device.forget()
        start = time.perf_counter()
        try:
            with at_most(max(LEAST, STEP_SHARE * budget.left)):
                found = work()
                self.device.wait()
        except Skipped as reason:
            return {"skipped": str(reason)}
        except Exception as error:  # the next step may well do
            found = {
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
        return {
            "seconds": time.perf_counter() - start,
            "peak_bytes": self.device.peak_bytes,
            **found,
        }

    # ---- what other steps need

    @property
    def adapted(self) -> AdaptedModel:
        """The model."""
        if self.model is None:
            raise Skipped("no model was built")
        return self.model

    @property
    def fitted(self) -> Run:
        """The last run."""
        if self.run is None:
            raise Skipped("nothing was fitted")
        return self.run

    @property
    def curvature(self) -> EKFAC:
        """EK-FAC as it is asked for."""
        options = self.options
        return EKFAC(
            max_width=options.max_width, rank=options.rank, memory_share=options.memory_share
        )

    def timed(self, tokens: TokenizedExamples) -> list[np.ndarray]:
        """Batches that are timed: the first, and others evenly from there on."""
        plan = plan_batches(tokens, self.options.token_budget)
        places = np.unique(np.linspace(0, len(plan) - 1, min(TIMED, len(plan))).astype(int))
        return [plan[place] for place in places]

    def pace(self, tokens: TokenizedExamples, batches: Sequence[np.ndarray]) -> Any:
        """A function that turns seconds of these batches into tokens a second and a share of the
        peak.
        """
        rows = np.concatenate(batches)
        count, targets = int(tokens.lengths[rows].sum()), int(tokens.counts[rows].sum())
        operations = products(self.adapted, count, targets)

        def of(seconds: float) -> dict[str, Any]:
            return {
                "tokens": count,
                "tokens_per_second": count / seconds,
                "share_of_peak": operations / seconds / self.device.peak,
            }

        return of

    # ---- the steps

    def build(self) -> dict[str, Any]:
        """The model, drawn on the device."""
        self.model = build(self.shape, self.device.place, self.options.r)
        sizes = [p.numel() * p.element_size() for p in self.model.model.parameters()]
        return {
            "lora_parameters": self.model.space.size,
            "sites": len(self.model.sites),
            "weights_bytes": sum(sizes),
        }

    def gradients(self) -> dict[str, Any]:
        """Two rows' gradients in one batch, against autograd through each row alone."""
        tokens = tokenize(self.rows, self.adapted.tokenizer)
        order = np.argsort(tokens.lengths)
        two = tokens.select(np.sort(order[[0, len(order) // 2]]))
        found = {"relative_errors": errors(self.adapted, two)}
        with computing_in(self.adapted, torch.float32):
            found["relative_errors_in_float32"] = errors(self.adapted, two)
        return found

    def bare(self) -> dict[str, Any]:
        """Forward and backward by transformers' own loss, gradients of LoRA parameters only."""
        model = self.adapted
        tokens = tokenize(self.rows, model.tokenizer)
        batches = self.timed(tokens)
        with model.evaluating(model.parameters):

            def once(rows: np.ndarray) -> None:
                batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
                labels = torch.where(batch.supervised, batch.input_ids, -100)
                loss = model.model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
                ).loss
                torch.autograd.grad(loss, model.parameters)

            once(batches[0])
            seconds = self.clock(lambda: [once(rows) for rows in batches])
        return {"work_seconds": seconds, **self.pace(tokens, batches)(seconds)}

    def fit_few(self) -> dict[str, Any]:
        """A fit on few rows, which warms up and gives later steps a run if the long one fails."""
        few = self.rows[: min(FEW, len(self.rows))]
        self.run = self.fit_of(few, "few")
        return {"rows": len(few)}

    def one_pass(self) -> dict[str, Any]:
        """The batches of `bare` as a fit runs them, without what is made of the sums."""
        run = self.fitted
        tokens = tokenize(self.rows, self.adapted.tokenizer)
        batches = self.timed(tokens)
        fit = PassOver(run, self.curvature, tokens)
        with run.model.at(run.points[0].place.theta), tape(run.model) as recorder:
            fit.run_batch(recorder, batches[0])
            self.device.forget()
            seconds = self.clock(lambda: [fit.run_batch(recorder, rows) for rows in batches])
            peak = self.device.peak_bytes
            profile = profiled(lambda: fit.run_batch(recorder, batches[0]), self.device)
        bare = self.steps["bare"].get("work_seconds")
        return {
            "work_seconds": seconds,
            "work_peak_bytes": peak,
            "ratio_to_bare": None if bare is None else seconds / bare,
            **self.pace(tokens, batches)(seconds),
            "profile": profile,
        }

    def fit(self, seconds_left: float) -> dict[str, Any]:
        """The fit on as many rows as there is time for, at the adapter itself."""
        tokens = tokenize(self.rows, self.adapted.tokenizer)
        count = self.rows_for(tokens, seconds_left)
        start = time.perf_counter()
        self.run = self.fit_of(self.rows[:count], "run")
        seconds = time.perf_counter() - start
        pace = self.pace(tokens, [np.arange(count)])(seconds)
        return {"rows": count, "store": self.options.store, **pace}

    def rows_for(self, tokens: TokenizedExamples, seconds: float) -> int:
        """How many rows a fit can have in so many seconds, told from what was measured."""
        once, few = self.steps["pass"], self.steps["fit few"]
        if "tokens_per_second" not in once or "rows" not in few:
            raise Skipped("nothing was measured that tells how many rows there is time for")
        # nothing is stored: two passes, and the second one forms every row's gradient
        per_token = 2.5 / once["tokens_per_second"]
        fixed = few["seconds"] - per_token * int(tokens.lengths[: few["rows"]].sum())
        ends = np.cumsum(tokens.lengths) * per_token + max(0.0, fixed)
        count = int((ends <= seconds).sum())
        if count <= few["rows"] < len(tokens):
            raise Skipped(f"{seconds:.0f} s are too few for more rows than those of `fit few`")
        return count or len(tokens)

    def fit_of(self, rows: influence.Examples, name: str) -> Run:
        """A fit at the adapter itself."""
        return influence.fit(
            self.adapted,
            rows,
            directory=self.folder / f"{self.shape}-{name}",
            curvature=self.curvature,
            path=(1.0,),
            store=self.options.store,
            token_budget=self.options.token_budget,
            overwrite=True,
        )

    def score(self) -> dict[str, Any]:
        """Scores of the queries against every row of the run."""
        scores = self.fitted.score(self.queries)
        return {
            "shape": list(scores.values.shape),
            "finite": bool(np.isfinite(scores.values).all()),
        }

    def remove(self) -> dict[str, Any]:
        """Two rows taken out by the linear edit."""
        run = self.fitted
        edit = unlearn.remove(run, list(run.train.ids[:2]), steps=1, generate=0)
        return {"norm": float(edit.delta.norm()), "finite": bool(edit.delta.isfinite().all())}

    def forecast(self) -> dict[str, Any]:
        """Forecasts of ten rows' difficulty."""
        run = self.fitted
        table = unlearn.difficulty.predict(run, list(run.train.ids[:10]), sample_rows=16).table
        return {"rows": len(table), "columns": list(table.columns)}

    def clock(self, work: Callable[[], Any]) -> float:
        """Seconds of work, until the device is done."""
        self.device.wait()
        start = time.perf_counter()
        work()
        self.device.wait()
        return time.perf_counter() - start


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block once so many seconds are over."""

    def stop(_number: int, _frame: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s, its share of the time left")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Skipped(Exception):
    """A step that cannot be, and why."""


class PassOver(PointFit):
    """The pass of a run's fit over other rows of the same weights."""

    def __init__(self, run: Run, curvature: EKFAC, tokens: TokenizedExamples) -> None:
        self.others = tokens
        super().__init__(run.points[0], curvature, Storage(False, "never", 0), None)

    def rows(self) -> tuple[TokenizedExamples, np.ndarray]:
        """The other rows, each weighed as the run's first."""
        return self.others, np.full(len(self.others), self.run.weights[0])


def errors(model: AdaptedModel, tokens: TokenizedExamples) -> list[float]:
    """Relative distance of streamed gradients from autograd through one row at a time."""
    streamed: Tensor | None = None
    for rows, gradients, _ in stream_gradients(model, tokens, batches=[np.arange(len(tokens))]):
        assert rows.tolist() == list(range(len(tokens)))
        streamed = gradients.double()
    assert streamed is not None
    found = []
    with model.evaluating(model.parameters):
        for row, gradient in zip(tokens, streamed, strict=True):
            ids = torch.from_numpy(row.input_ids).to(model.device)
            targets = torch.from_numpy(row.supervised).to(model.device)[1:]
            logits = model.model(input_ids=ids[None]).logits[0, :-1]
            wide = logits if logits.dtype == torch.float64 else logits.float()
            losses = wide.logsumexp(-1) - wide.gather(1, ids[1:, None])[:, 0]
            plain = torch.autograd.grad((losses * targets).sum(), model.parameters)
            expected = torch.cat([part.flatten() for part in plain]).double()
            found.append(float((gradient - expected).norm() / expected.norm()))
    return found


def profiled(work: Callable[[], Any], device: Device) -> dict[str, Any]:
    """One call under torch.profiler: the kernels that take longest, and how often it stops."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    gpu = device.place.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as found:
        work()
        device.wait()
    events = list(found.key_averages())

    def microseconds(event: Any) -> float:
        return event.self_device_time_total if gpu else event.self_cpu_time_total

    def calls(names: tuple[str, ...]) -> int:
        return sum(event.count for event in events if event.key.startswith(names))

    # on a GPU an operation of the host is told with the kernels that it starts, which are told too
    kernels = [e for e in events if e.device_type == DeviceType.CUDA] if gpu else events
    longest = sorted(kernels, key=microseconds, reverse=True)[:LISTED]
    return {
        "stops": calls(STOPS if gpu else FETCHES),
        "copies_to_host": calls(COPIES),
        "kernels": [
            {"name": event.key[:120], "calls": event.count, "ms": microseconds(event) / 1e3}
            for event in longest
        ],
    }


# ---- for a person --------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """Every step of every shape in a line."""
    lines = [
        f"{record['device']}: {record['peak_flops'] / 1e12:.0f} TFLOP/s in 16 bits "
        f"({record['measured_flops'] / 1e12:.1f} measured)",
        f"{'shape':10} {'step':10} {'seconds':>8} {'peak GB':>8} {'tokens/s':>9} {'of peak':>8}  ",
    ]
    for shape, steps in record["shapes"].items():
        for name, step in steps.items():
            cells = [
                number(step.get("work_seconds", step.get("seconds")), 8, 2),
                number(step.get("work_peak_bytes") or step.get("peak_bytes"), 8, 2, 1e9),
                number(step.get("tokens_per_second"), 9, 0),
                number(step.get("share_of_peak"), 8, 3),
            ]
            lines.append(f"{shape:10} {name:10} {' '.join(cells)}  {remark(step)}")
    return "\n".join(lines)


def number(value: float | None, width: int, digits: int, unit: float = 1) -> str:
    """A number in a column, or a dash."""
    return f"{'-':>{width}}" if value is None else f"{value / unit:{width},.{digits}f}"


def remark(step: dict[str, Any]) -> str:
    """What else is to be said of a step."""
    if "skipped" in step:
        return f"skipped: {step['skipped']}"
    if "error" in step:
        return f"FAILED: {step['error'].splitlines()[0][:120]}"
    parts = []
    if "relative_errors" in step:
        worst, wide = max(step["relative_errors"]), max(step["relative_errors_in_float32"])
        parts.append(f"off by {worst:.1e}, in float32 {wide:.1e}")
    if step.get("ratio_to_bare"):
        parts.append(f"{step['ratio_to_bare']:.2f} x bare")
    if "profile" in step:
        profile = step["profile"]
        parts.append(f"{profile['stops']} stops, {profile['copies_to_host']} copies to the host")
    if "rows" in step:
        parts.append(f"{step['rows']} rows")
    return "; ".join(parts)


def eigen_times(device: Device, budget: Budget) -> dict[str, float | str]:
    """Seconds of eigendecompositions in float64, by their width."""
    found: dict[str, float | str] = {}
    for width in (1024, 2048, 4096) if device.place.type == "cuda" else (64, 128):
        if budget.left <= 0:
            break
        try:
            found[str(width)] = eigen_seconds(width, device.place)
        except Exception as error:  # reported, as a step's
            found[str(width)] = f"{type(error).__name__}: {error}"
    return found


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="tiny,1b,3b,8b", help=", ".join(SHAPES))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--budget", type=float, default=660, help="seconds of everything")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--work", type=Path, help="where runs are kept meanwhile")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--r", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--token-budget", type=int, default=4096)
    parser.add_argument("--store", choices=("auto", "always", "never"), default="never")
    parser.add_argument("--max-width", type=int, default=2048, help="of EK-FAC")
    parser.add_argument("--rank", type=int, default=256, help="of EK-FAC")
    parser.add_argument("--memory-share", type=float, default=0.0, help="of EK-FAC")
    parser.add_argument("--tf32", action="store_true", help="float32 products in TF32")
    options = parser.parse_args(arguments)
    options.shapes = [shape for shape in options.shapes.split(",") if shape]
    if unknown := [shape for shape in options.shapes if shape not in SHAPES]:
        parser.error(f"unknown shapes {', '.join(unknown)}; expected some of {', '.join(SHAPES)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu --shapes tiny runs without")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run every shape, write the record and print the table."""
    options = parsed(arguments)
    budget = Budget(options.budget)
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    device = Device.of(options.device)
    asked = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    }
    record: dict[str, Any] = {
        "device": device.name,
        "torch": torch.__version__,
        "peak_flops": device.peak,
        "measured_flops": device.measured,
        "options": asked,
        "eigen_seconds": eigen_times(device, budget),
        "shapes": {},
    }
    report = Report(options.out, record)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for number, shape in enumerate(options.shapes):
            share = 1 / (len(options.shapes) - number)
            Bench(shape, device, options, report, Path(folder)).work(budget, share)
            record["seconds"] = options.budget - budget.left
            report.write()
            print(table({**record, "shapes": {shape: record["shapes"][shape]}}), flush=True)
    print(f"\n{table(record)}\n\n{options.out}")
    return record


if __name__ == "__main__":
    main()
