"""Slow dense oracles, written out row by row, which share no code with what they check."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch.func import functional_call, hessian, jacrev

from influence.gradients import label_uniforms
from influence.manifest import CalibrationRecord
from influence.run import Run
from tests.conftest import fit_end, tokens_of

N, PATH = 9, (0.4, 0.8)
F64 = torch.float64

F64 = torch.float64


def logits_fn(model, item):
    """A pure function of the flat LoRA parameters: supervised logits [T, V] of one example; and its
    targets.
    """
    ids = torch.from_numpy(item.input_ids)[None]
    where = [t for t in range(1, ids.shape[1]) if item.supervised[t]]
    names = [n for n, _ in model.model.named_parameters() if ".lora_" in n]
    ours = [n for site in model.sites for n in names if site.name + ".lora_" in n]  # A before B

    def f(theta):
        parts = dict(zip(ours, model.space.split(theta), strict=True))
        out = functional_call(model.model, parts, (), {"input_ids": ids, "use_cache": False})
        return out.logits[0, [t - 1 for t in where]]

    return f, ids[0, where]


def summed_loss(f, targets):
    return lambda theta: torch.nn.functional.cross_entropy(f(theta), targets, reduction="sum")


def dense_objective(model, tokens, weights, kind):
    """Dense Hessian or GGN of `sum_i w_i l_i` from torch.func's nested transforms, example by
    example.
    """
    theta = model.snapshot()
    total = torch.zeros(model.space.size, model.space.size, dtype=F64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for item, w in zip(tokens, weights, strict=True):
            f, targets = logits_fn(model, item)
            if kind == "hessian":
                total += w * hessian(summed_loss(f, targets))(theta)
            else:
                J, p = jacrev(f)(theta), f(theta).detach().softmax(-1)
                for t in range(len(targets)):
                    total += w * J[t].T @ (torch.diag(p[t]) - torch.outer(p[t], p[t])) @ J[t]
    return total.detach()


def sampled_rows(model, tokens, samples, seed=0):
    """Gradients at sampled labels by plain autograd, one example and draw at a time."""
    out = []
    for item, id in zip(tokens, tokens.ids, strict=True):
        f, targets = logits_fn(model, item)
        p = f(model.snapshot()).detach().softmax(-1)
        for draw in range(samples):
            u = label_uniforms(seed, draw, id, len(targets))
            labels = torch.tensor(
                [int((p[t].cumsum(0) <= u[t] * p[t].sum()).sum()) for t in range(len(targets))]
            )
            theta = model.snapshot().requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(f(theta), labels, reduction="sum")
            out.append(torch.autograd.grad(loss, theta)[0])
    return out


def plain_kfac(model, tokens, weights):
    leaves = [m for s in model.sites for m in (s.A, s.B)]
    S = [torch.zeros(m.weight.shape[0], m.weight.shape[0], dtype=F64) for m in leaves]
    A = [torch.zeros(m.weight.shape[1], m.weight.shape[1], dtype=F64) for m in leaves]
    mass = 0.0
    for item, id, w in zip(tokens, tokens.ids, weights, strict=True):
        seen = {}
        handles = [
            m.register_forward_hook(
                lambda _m, a, out, i=i, seen=seen: seen.update({i: (a[0], out)})
            )
            for i, m in enumerate(leaves)
        ]
        for m in leaves:
            m.weight.requires_grad_(True)
        ids = torch.from_numpy(item.input_ids)[None, :-1]
        where = [t - 1 for t in range(1, len(item.input_ids)) if item.supervised[t]]
        logits = model.model(input_ids=ids).logits[0, where]
        p = logits.detach().softmax(-1)
        u = label_uniforms(0, 0, id, len(where))
        labels = torch.tensor(
            [int((p[t].cumsum(0) <= u[t] * p[t].sum()).sum()) for t in range(len(where))]
        )
        grads = torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum"),
            [seen[i][1] for i in range(len(leaves))],
        )
        for i, g in enumerate(grads):
            x, g = seen[i][0].detach()[0], g[0]
            S[i] += w * g.T @ g
            A[i] += w * x.T @ x
        mass += w * ids.shape[1]
        for h in handles:
            h.remove()
        for m in leaves:
            m.weight.requires_grad_(False)
    return [torch.kron(s, a / mass) for s, a in zip(S, A, strict=True)]


@contextlib.contextmanager
def b_times(model, c: float):
    """Every B of the live model multiplied by c, in place, by its name."""
    before = {
        name: p.detach().clone() for name, p in model.model.named_parameters() if "lora_" in name
    }
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(c)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.model.named_parameters():
                if name in before:
                    parameter.copy_(before[name])


@contextlib.contextmanager
def differentiable(model):
    """The LoRA matrices require gradients, dropout is off."""
    model.model.eval()
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in model.parameters:
            parameter.requires_grad_(False)


def plain_log_probs(model, item):
    """`log p` [T, V] at one row's supervised tokens and those tokens [T], from a plain forward."""
    ids = torch.as_tensor(np.asarray(item.input_ids, dtype=np.int64))[None]
    wanted = torch.as_tensor(np.asarray(item.supervised, dtype=bool))[1:]
    logits = model.model(input_ids=ids[:, :-1]).logits[0]
    return logits.log_softmax(-1)[wanted], ids[0, 1:][wanted]


def plain_loss(log_probs, targets):
    return -log_probs[torch.arange(len(targets)), targets].sum()


def plain_mean(log_probs, targets):
    return plain_loss(log_probs, targets) / len(targets)


def plain_gradients(model, data, measure=plain_loss) -> torch.Tensor:
    """Gradients `[n, P]` of a function of (log_probs, targets), one row after the other."""
    rows = []
    with differentiable(model):
        for item in tokens_of(model, data):
            grads = torch.autograd.grad(measure(*plain_log_probs(model, item)), model.parameters)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def kappa(run: Run) -> float:
    """The calibration of the additive scores of a run's default setting, 1 before it is measured."""
    (calibration,) = run.manifest.calibration.values() or (CalibrationRecord(1.0, "none"),)
    return calibration.factor


def singles(model, data, queries, folder, path, *, of=None, **options):
    """Additive scores and self-influences of one run of one point for each scale, with the weights
    set in place.
    """
    pairs, of = [], {"credit": "additive", **(of or {})}
    for number, c in enumerate(path):
        with b_times(model, c):
            one = fit_end(model, data, directory=folder / f"single-{number}", **options)
            pairs.append((one.score(queries, **of).values, one.self_influence(**of).values))
    return pairs


def averaged(pairs, shares):
    """`sum_p share_p mean(Z) / Z_p score_p`: the documented rule for scores and self-influences."""
    Z = [self_influence.mean() for _, self_influence in pairs]
    mean = sum(share * z for share, z in zip(shares, Z, strict=True))
    parts = [(share * mean / z, *pair) for share, z, pair in zip(shares, Z, pairs, strict=True)]
    return sum(a * s for a, s, _ in parts), sum(
        a * self_influence for a, _, self_influence in parts
    )


def close(values, expected, tolerance=1e-9):
    values, expected = np.asarray(values), np.asarray(expected)
    assert np.abs(values - expected).max() <= tolerance * np.abs(expected).max()


def sampled_gradients(model, data, collected=None) -> torch.Tensor:
    """Gradients `[n, P]` at labels drawn from the model; `collected` also gets each row's (x, d) at
    the site.
    """
    rows, site = [], model.sites[0].layer
    with differentiable(model):
        for item, id in zip(tokens_of(model, data), data.ids, strict=True):
            seen = []
            hook = lambda _, args, out, seen=seen: seen.append((args[0].detach()[0], out))  # noqa: E731
            handle = site.register_forward_hook(hook)
            log_probs, targets = plain_log_probs(model, item)
            handle.remove()
            cdf = log_probs.detach().exp().cumsum(1)
            u = torch.from_numpy(label_uniforms(0, 0, id, len(targets)))
            labels = (cdf <= u[:, None] * cdf[:, -1:]).sum(1)
            wanted = [*model.parameters, seen[0][1]]
            *grads, outer = torch.autograd.grad(plain_loss(log_probs, labels), wanted)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
            if collected is not None:
                collected.append((seen[0][0], outer[0]))
    return torch.stack(rows)


def matrices(model):
    """s, A [r, d_in] and B [d_out, r] of the only site."""
    site = model.sites[0]
    return site.scaling, site.A.weight.detach(), site.B.weight.detach()


def function_metric(model) -> torch.Tensor:
    """A square root of `(J^T J)^+`, J = d vec(s B A) / d(A, B): any other T of function space
    differs by a rotation.
    """
    s, A, B = matrices(model)
    J = torch.cat(
        [
            s * torch.kron(B, torch.eye(A.shape[1])),
            s * torch.kron(torch.eye(B.shape[0]), A.T.contiguous()),
        ],
        1,
    )
    values, vectors = torch.linalg.eigh(J.T @ J)
    root = torch.where(values > 1e-10 * values[-1], values.clamp(min=1e-300).rsqrt(), 0)
    return vectors * root @ vectors.T


def adam_metric(model, v) -> torch.Tensor:
    """`h = (sqrt(v) + eps)^(-1/2)`, where sqrt(v) is at least a thousandth of its leaf's mean."""
    parts = []
    for leaf in model.space.leaves:
        root = v[leaf.slice].sqrt()
        parts.append((torch.maximum(root, 1e-3 * root.mean()) + 1e-8).rsqrt())
    return torch.diag(torch.cat(parts))


def estimated(g, w) -> torch.Tensor:
    return ((len(w) * torch.from_numpy(w)[:, None] * g) ** 2).mean(0)


def dense_scores(T, C, q, g, w, lam) -> np.ndarray:
    """`w_i (T q)^T (T C T^T + lambda)^-1 T g_i`."""
    inside = T @ C @ T.T
    lam = lam * float(inside.trace()) / len(inside) if isinstance(lam, float) else float(lam[0])
    return (
        q @ T.T @ torch.linalg.solve(inside + lam * torch.eye(len(inside), dtype=F64), T @ g.T)
    ).numpy() * w


def dense_ggn(model, data, w) -> torch.Tensor:
    """`sum_i w_i sum_t J_t^T (diag(p) - p p^T) J_t` by the Jacobian of every supervised logit."""
    C = torch.zeros(model.space.size, model.space.size, dtype=F64)
    with differentiable(model):
        for item, weight in zip(tokens_of(model, data), w, strict=True):
            log_probs, _ = plain_log_probs(model, item)
            eye = torch.eye(log_probs.numel(), dtype=F64).unflatten(1, log_probs.shape)
            jacobians = torch.autograd.grad(log_probs, model.parameters, eye, is_grads_batched=True)
            J = torch.cat([f.flatten(1) for f in jacobians], 1).unflatten(0, log_probs.shape)
            p = log_probs.detach().exp()
            # of log-probabilities, sum_v p_v J_v = 0, so the Fisher of a token is sum_v p_v J_v
            # J_v^T
            C += float(weight) * torch.einsum("tv,tvi,tvj->ij", p, J, J)
    return C
