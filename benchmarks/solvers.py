"""Products that each solver needs for `(GGN + lambda I) x = v`, v the gradients of queries.

    python benchmarks/solvers.py --model BASE --adapter ADAPTER --train TRAIN --queries QUERIES
    [--run DIR]
        [--columns 4] [--samples 1] [--tolerance 1e-3] [--damping mean:0.1] [--max-products 300]
        [--solvers cg,pcg,astra,lissa,sgd] [--json]

EK-FAC is fitted (or its finished run in DIR opened), and serves as the preconditioner of pcg and
astra with the damping of the GGN. A product costs a forward and two backwards of every training row
for each column that is left; the products of a power iteration count, each as one for every column.
float32; no times are taken.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import influence
from influence.solvers import ASTRA, CG, SGD, LiSSA, Solver
from influence.tokens import tokenize

SOLVERS = ("cg", "pcg", "astra", "lissa", "sgd")


def measure(solver: Solver, operator: Any, v: torch.Tensor) -> dict[str, Any]:
    """Products and final residual of every column."""
    solution = solver.solve(operator, v)
    return {
        "products": solution.iterations.tolist(),
        "residuals": solution.residuals.tolist(),
        "converged": solution.converged.tolist(),
        "message": solution.message,
    }


def main() -> None:
    """Fit, solve with every solver, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "adapter", "train", "queries"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--run", type=Path, help="run directory; a temporary one without it")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument(
        "--samples", type=int, default=1, help="label draws per row in the EK-FAC fit"
    )
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--damping", default="mean:0.1")
    parser.add_argument("--max-products", type=int, default=300)
    parser.add_argument("--solvers", default=",".join(SOLVERS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = args.solvers.split(",")
    if unknown := sorted(set(names) - set(SOLVERS)):
        parser.error(
            f"solvers {', '.join(unknown)} were given; expected some of {', '.join(SOLVERS)}"
        )
    model = influence.load(args.model, args.adapter)
    train = influence.read_examples(args.train)
    queries = tokenize(influence.read_examples(args.queries)[: args.columns], model.tokenizer)
    v = torch.zeros(len(queries), model.space.size, dtype=model.dtype, device=model.device)
    for rows, gradients, *_ in influence.stream_gradients(model, queries):
        v[rows] = gradients
    with tempfile.TemporaryDirectory() as folder:
        directory = args.run or Path(folder) / "run"
        run = influence.fit(
            model,
            train,
            directory=directory,
            curvature=influence.EKFAC(samples=args.samples),
            path=(1.0,),
        )
        operator = run.operator("ggn", args.damping)
        preconditioner = run.preconditioner(operator)
        limits = {"tolerance": args.tolerance, "max_iterations": args.max_products}
        solvers: dict[str, Solver] = {
            "cg": CG(**limits),
            "pcg": CG(**limits, preconditioner=preconditioner, name="pcg"),
            "astra": ASTRA(preconditioner, **limits),
            "lissa": LiSSA(**limits),
            "sgd": SGD(**limits),
        }
        results = {}
        for name in names:
            results[name] = measure(solvers[name], operator, v)
            print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"rows": len(train), "parameters": model.space.size, "solvers": results}))
        return
    print(
        f"{len(train)} rows, {model.space.size} parameters, GGN damped by {args.damping}, {len(v)} "
        "columns"
    )
    print(f"{'':6} {'products':>9} {'converged':>10} {'worst residual':>15}")
    for name, solved in results.items():
        converged = f"{sum(solved['converged'])}/{len(v)}"
        print(
            f"{name:6} {max(solved['products']):9} {converged:>10} {max(solved['residuals']):15.1e}"
        )


if __name__ == "__main__":
    main()
