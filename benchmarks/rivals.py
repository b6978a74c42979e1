"""Rival attribution scores that need no library of their own: each short, each with its source.

Every function returns scores `[Q, n]`, positive = proponent. Gradients are those of the LoRA
parameters, `[., P]`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import influence
from influence.adapter import AdaptedModel, ParamSpace
from influence.batches import collate, plan_batches
from influence.measurements import MeanLoss
from influence.rows import Examples
from influence.text_search import bm25
from influence.tokens import TokenizedExamples, tokenize


def loss_gradients(model: AdaptedModel, tokens: TokenizedExamples, *, mean: bool = True) -> Tensor:
    """Gradients `[n, P]` of every row's cross-entropy: mean over supervised tokens, or sum."""
    out = torch.empty(len(tokens), model.space.size, dtype=model.dtype)
    measurement = MeanLoss() if mean else None
    for rows, gradients, _ in influence.stream_gradients(
        model, tokens, measurement=measurement, token_budget=1024
    ):
        out[torch.from_numpy(rows)] = gradients.cpu()
    return out


def gradient_dot(queries: Tensor, train: Tensor) -> np.ndarray:
    """`grad m(q) . grad l_i`: influence without a curvature.

    TracIn's last checkpoint, arXiv 2002.08484.
    """
    return (queries @ train.T).numpy()


def gradient_cosine(queries: Tensor, train: Tensor) -> np.ndarray:
    """The cosine of the angle between the two gradients.

    Hammoudeh and Lowd 2022, arXiv 2201.10055.
    """
    return cosine(queries, train)


def datainf(queries: Tensor, train: Tensor, space: ParamSpace) -> np.ndarray:
    """DataInf as released.

    Kwon et al. 2023, arXiv 2310.00902, equation 5, and `IFEngineGeneration` of its code.

    For each matrix of the adapter, with v and g_i its part of the query's and of row i's gradient,
    both of **mean** losses, `d` its number of entries, and `lambda = 0.1 mean_i |g_i|^2 / d`:

        hvp = 1 / (n lambda) sum_i [ v - <v, g_i> / (lambda + |g_i|^2) g_i ]
        score[q, i] = sum over the matrices of <hvp, g_i>

    The paper's influence has the opposite sign; its code for language models has this one.
    """
    total = torch.zeros(len(queries), len(train), dtype=torch.float64)
    for leaf in space.leaves:
        v, g = queries[:, leaf.slice].double(), train[:, leaf.slice].double()
        lam = 0.1 * g.square().mean()
        gram, dots = g @ g.T, v @ g.T
        total += (dots - dots / (lam + gram.diagonal()) @ gram / len(g)) / lam
    return total.numpy()


def hidden_states(model: AdaptedModel, tokens: TokenizedExamples, *, last: bool = False) -> Tensor:
    """Hidden states after the last layer, `[n, width]`: mean over supervised tokens, or the last.

    Supervised are the completion and the end-of-sequence token, which is the last one.
    """
    parts: list[Tensor | None] = [None] * len(tokens)
    with model.evaluating(), torch.no_grad():
        for rows in plan_batches(tokens, 1024):
            batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
            states = model.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                output_hidden_states=True,
            ).hidden_states[-1]
            for row, state, chosen in zip(rows, states, batch.supervised, strict=True):
                parts[int(row)] = state[chosen][-1] if last else state[chosen].mean(0)
    return torch.stack([part for part in parts if part is not None]).cpu()


def repsim(queries: Tensor, train: Tensor) -> np.ndarray:
    """The cosine of two rows' `hidden_states` (RepSim).

    As in Pezeshkpour et al. 2021, arXiv 2104.04128.
    """
    return cosine(queries, train)


def cosine(first: Tensor, second: Tensor) -> np.ndarray:
    """Cosine of every row of `first` with every row of `second`."""
    return (
        torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(second, dim=1).T
    ).numpy()


def rival_scores(model: AdaptedModel, train: Examples, queries: Examples) -> dict[str, np.ndarray]:
    """Every rival's scores `[Q, n]`, by name."""
    rows, query_rows = tokenize(train, model.tokenizer), tokenize(queries, model.tokenizer)
    v, g = loss_gradients(model, query_rows), loss_gradients(model, rows)
    sums = g * torch.from_numpy(rows.counts).to(g)[:, None]
    texts, questions = (
        [f"{row.prompt}{row.completion}" for row in part] for part in (train, queries)
    )
    return {
        "gradient dot": gradient_dot(v, sums),
        "gradient cosine": gradient_cosine(v, g),
        "DataInf, released formula": datainf(v, g, model.space),
        "RepSim, mean of the completion": repsim(
            hidden_states(model, query_rows), hidden_states(model, rows)
        ),
        "RepSim, last token": repsim(
            hidden_states(model, query_rows, last=True), hidden_states(model, rows, last=True)
        ),
        "BM25, text alone": bm25(questions, texts),
    }
