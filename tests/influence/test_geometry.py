"""Geometries against dense oracles, and optimiser states as a Trainer really writes them."""

from __future__ import annotations

import json
import os
import warnings

import numpy as np
import pytest
import torch

from influence.adapter import ParamSpace
from influence.batches import collate
from influence.errors import AdapterError, InputError, NumericalError, StoreError
from influence.geometry import Adam, Raw, function_space, load_geometry
from influence.gradients import output_gradient, per_example_gradient, stream_gradients, tape
from influence.loading import from_peft
from influence.optimizer_state import second_moments
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, examples, tokens_of

F64 = torch.float64
FEW = {"layers": 1, "target_modules": ["q_proj", "down_proj"]}


def gradients(model, tokens) -> torch.Tensor:
    out = torch.empty(len(tokens), model.space.size, dtype=model.dtype)
    for rows, stack, _ in stream_gradients(model, tokens):
        out[torch.from_numpy(rows)] = stack
    return out


def dense_gradients(model, tokens) -> list[torch.Tensor]:
    """G [n, d_out, d_in] of every site by autograd: a dense matrix D = 0 is added beside the adapter."""
    deltas = [
        torch.zeros(s.B.weight.shape[0], s.A.weight.shape[1], dtype=F64, requires_grad=True)
        for s in model.sites
    ]
    hooks = [
        site.layer.register_forward_hook(lambda _, given, out, D=D: out + given[0] @ D.T)
        for site, D in zip(model.sites, deltas, strict=True)
    ]
    rows = []
    for item in tokens:
        ids = torch.from_numpy(item.input_ids)[None]
        logp = model.model(input_ids=ids).logits[0].log_softmax(-1)
        loss = sum(-logp[t - 1, ids[0, t]] for t in range(1, ids.shape[1]) if item.supervised[t])
        rows.append(torch.autograd.grad(loss, deltas))
    for hook in hooks:
        hook.remove()
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def jacobian(site) -> torch.Tensor:
    """J = d vec(s B A) / d (A, B), [d_out d_in, r d_in + d_out r], column by column."""
    A, B = site.A.weight.detach(), site.B.weight.detach()
    function = lambda a, b: site.scaling * (b @ a)  # noqa: E731
    parts = torch.autograd.functional.jacobian(function, (A, B))
    return torch.cat([part.reshape(B.shape[0] * A.shape[1], -1) for part in parts], dim=1)


def projection(site, G: torch.Tensor) -> torch.Tensor:
    """G's projection on the range of J, from J's dense SVD."""
    left, values, _ = torch.linalg.svd(jacobian(site), full_matrices=False)
    basis = left[:, values > 1e-10 * values[0]]
    return (G.flatten(1) @ basis @ basis.T).view_as(G)


def reparametrise(model, cond: float = 1e3) -> None:
    """(A, B) -> (R A, B R^-1), R random with the given condition number, a new one for every site."""
    generator = torch.Generator().manual_seed(3)
    for site in model.sites:
        r = site.A.weight.shape[0]
        u, _, w = torch.linalg.svd(torch.randn(r, r, generator=generator, dtype=F64))
        R = u @ torch.diag(torch.logspace(0, -float(np.log10(cond)), r, dtype=F64)) @ w
        site.A.weight.data.copy_(R @ site.A.weight.data)
        site.B.weight.data.copy_(torch.linalg.solve(R.T, site.B.weight.data.T).T)


def scores(rows: torch.Tensor, lam: float = 10.0) -> torch.Tensor:
    """Dense `f_q^T (C + lambda I)^-1 f_i`, C = mean f f^T, lambda relative to its mean eigenvalue."""
    C = rows.T @ rows / len(rows)
    return rows @ torch.linalg.solve(
        C + lam * C.trace() / len(C) * torch.eye(len(C), dtype=F64), rows.T
    )


def make(kind: str, model):
    if kind == "raw":
        return Raw()
    if kind == "function":
        return function_space(model)
    generator = torch.Generator().manual_seed(1)
    return Adam.of(model.space, torch.rand(model.space.size, generator=generator, dtype=F64) ** 4)


# ---- what every geometry holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raw", "function", "adam"])
def test_adjoint_and_state(kind):
    model = build_model("llama", r=3, **FEW)
    geometry = make(kind, model)
    g, v = torch.randn(2, 5, model.space.size, dtype=F64)
    left, right = geometry.features(g) @ v.T, g @ geometry.adjoint(v).T
    assert (left - right).abs().max() < 1e-12 * left.abs().max()
    again = load_geometry(geometry.name, model.space, geometry.state())
    assert torch.equal(again.features(g), geometry.features(g))
    assert again.shares_inputs == geometry.shares_inputs
    assert geometry.features(g.float()).dtype == torch.float32
    torch.testing.assert_close(
        geometry.features(g.float()).double(), geometry.features(g), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["raw", "function", "separable adam"])
def test_factors_multiply_to_the_features(kind):
    model = build_model("llama", r=3, **FEW)
    if kind == "separable adam":
        h = [
            torch.outer(torch.rand(a, dtype=F64) + 0.5, torch.rand(b, dtype=F64) + 0.5)
            for a, b in shapes(model)
        ]
        geometry = Adam(model.space, model.space.flatten(h))
    else:
        geometry = make(kind, model)
    tokens = tokens_of(model, examples(4))
    parts, kept = {}, {}

    def sink(leaf, x, g, valid):
        changed = geometry.factor(leaf, x, g)
        parts[leaf] = per_example_gradient(*changed)
        kept[leaf] = model.space.leaves[leaf].is_A and torch.equal(changed[0], x)

    with tape(model) as recorder:
        part = recorder.forward(collate(tokens, np.arange(4), pad_id=model.pad_id))
        recorder.backward(part.logits, output_gradient(part, None)[1], sink)
    found = model.space.flatten([parts[i] for i in range(len(model.space.leaves))])
    expected = geometry.features(gradients(model, tokens))
    assert (found - expected).norm() / expected.norm() < 1e-12
    assert geometry.shares_inputs == all(
        kept[i] for i, leaf in enumerate(model.space.leaves) if leaf.is_A
    )


def shapes(model):
    return [leaf.shape for leaf in model.space.leaves]


def test_stored_geometries_are_checked():
    model = build_model("llama", **FEW)
    state = function_space(model).state()
    with pytest.raises(
        InputError, match="geometry 'flat' was given; expected one of raw, function, adam"
    ):
        load_geometry("flat", model.space, {})
    with pytest.raises(StoreError, match=r"U/1 of shape \[16, 2\].*no such tensor"):
        load_geometry("function", model.space, {k: t for k, t in state.items() if k != "U/1"})
    with pytest.raises(StoreError, match=r"scale of shape .* found \[3\]"):
        load_geometry("adam", model.space, {"scale": torch.ones(3)})
    with pytest.raises(StoreError, match="all finite"):
        load_geometry("function", model.space, state | {"left/0": torch.full((2, 2), torch.nan)})


# ---- function space ------------------------------------------------------------------------------------------


def test_function_features_are_the_dense_gradient_in_canonical_coordinates():
    model = build_model("llama", r=3, use_rslora=True, **FEW)
    tokens = tokens_of(model, examples(5))
    features = model.space.split(function_space(model).features(gradients(model, tokens)))
    for number, (site, G) in enumerate(
        zip(model.sites, dense_gradients(model, tokens), strict=True)
    ):
        # an oracle of its own: the SVD of the dense product B A; signs are free, so inner products are compared
        u, _, w = torch.linalg.svd(site.B.weight.detach() @ site.A.weight.detach())
        U, V = u[:, :3], w[:3].T
        for found, expected in [
            (features[2 * number], U.T @ G),
            (features[2 * number + 1], G @ V - U @ (U.T @ G @ V)),
        ]:
            # row by row of the narrow side, up to its sign
            narrow = 1 if found.shape[1] == 3 else 2
            for k in range(3):
                a, b = found.select(narrow, k).flatten(), expected.select(narrow, k).flatten()
                assert min((a - b).norm(), (a + b).norm()) / b.norm() < 1e-10


@pytest.mark.parametrize("case", ["full rank", "B = 0", "rank 1 of 3", "A of rank 2", "scaling 0"])
def test_features_have_the_length_of_the_projection_on_the_tangent_space(case):
    model = build_model("llama", r=3, **FEW)
    site = model.sites[1]
    A, B = site.A.weight.data, site.B.weight.data
    if case == "B = 0":
        B.zero_()
    if case == "rank 1 of 3":
        B.copy_(torch.outer(B[:, 0], torch.tensor([1.0, -2.0, 0.5], dtype=F64)))
    if case == "A of rank 2":
        A[2] = A[0] - 3 * A[1]
    if case == "scaling 0":
        site.layer.scaling["default"] = 0.0
        model = from_peft(model.model, model.tokenizer)
        site = model.sites[1]
    if case == "full rank":
        geometry = function_space(model)
    else:
        with pytest.warns(UserWarning, match="1 of 2 sites have an A or B of rank below r"):
            geometry = function_space(model)
    tokens = tokens_of(model, examples(5))
    features = geometry.features(gradients(model, tokens))
    assert bool(torch.isfinite(features).all())
    own = features[:, slice(model.space.leaves[2].start, model.space.leaves[3].stop)]
    projected = projection(site, dense_gradients(model, tokens)[1]).flatten(1)
    gram, expected = own @ own.T, projected @ projected.T
    if case == "scaling 0":
        assert gram.abs().max() == 0
    else:
        assert (gram - expected).norm() / expected.norm() < 1e-9


def test_the_metric_is_the_identity_on_the_features():
    """T J^T has orthonormal rows on the tangent space: (T J^T)(T J^T)^T is a projector of rank r (d_in + d_out - r)."""
    model = build_model("llama", r=3, **FEW)
    geometry = function_space(model)
    J = jacobian(model.sites[0])
    rows = torch.zeros(J.shape[0], model.space.size, dtype=F64)
    rows[:, : J.shape[1]] = J
    T = geometry.features(rows)[:, : J.shape[1]]
    values = torch.linalg.eigvalsh(T.T @ T)
    d_out, d_in = model.sites[0].B.weight.shape[0], model.sites[0].A.weight.shape[1]
    assert int((values > 0.5).sum()) == 3 * (d_in + d_out - 3)
    assert torch.minimum(values.abs(), (values - 1).abs()).max() < 1e-10


@pytest.mark.parametrize("how", ["cond 1e3", "A * 3, B / 3"])
def test_scores_do_not_depend_on_how_the_adapter_is_factored(how):
    model = build_model("llama", r=3, **FEW)
    tokens = tokens_of(model, examples(8))
    raw = gradients(model, tokens)
    features = function_space(model).features(raw)
    before = model.sites[0].B.weight.data @ model.sites[0].A.weight.data
    if how == "cond 1e3":
        reparametrise(model)
    else:
        for site in model.sites:
            site.A.weight.data.mul_(3)
            site.B.weight.data.div_(3)
    torch.testing.assert_close(model.sites[0].B.weight.data @ model.sites[0].A.weight.data, before)
    raw_after = gradients(model, tokens)
    after = function_space(model).features(raw_after)
    assert (
        after.abs() - features.abs()
    ).norm() / features.norm() < 1e-8  # up to the signs of singular vectors
    error = (scores(after) - scores(features)).norm() / scores(features).norm()
    changed = (scores(raw_after) - scores(raw)).norm() / scores(raw).norm()
    print(
        f"{how}: scores change by {error:.1e} in function space, by {changed:.1e} in raw coordinates"
    )
    assert error < 1e-8
    assert changed > 0.1


# ---- Adam ----------------------------------------------------------------------------------------------------


def test_adam_is_the_inverse_root_of_the_second_moments():
    space = ParamSpace.of([("a.lora_A", (2, 3)), ("a.lora_B", (4, 2))])
    v = torch.rand(space.size, dtype=F64) + 0.1
    g = torch.randn(2, space.size, dtype=F64)
    f = Adam.of(space, v).features(g)
    expected = sum(
        float(a * b) / (float(c) ** 0.5 + 1e-8) for a, b, c in zip(g[0], g[1], v, strict=True)
    )
    assert float(f[0] @ f[1]) == pytest.approx(expected, rel=1e-12)


def test_a_dead_coordinate_does_not_explode_and_a_dead_leaf_stays_finite():
    space = ParamSpace.of([("a.lora_A", (2, 3)), ("a.lora_B", (4, 2))])
    v = torch.ones(space.size, dtype=F64)
    v[0], v[6:] = 0, 0
    geometry = Adam.of(space, v)
    assert float(geometry.scale[0]) == pytest.approx((1e-3 * 5 / 6 + 1e-8) ** -0.5)
    torch.testing.assert_close(geometry.scale[1:6], torch.ones(5, dtype=F64))
    torch.testing.assert_close(geometry.scale[6:], torch.full((8,), 1e4, dtype=F64))
    assert v[0] == 0  # the caller's tensor is left alone
    with pytest.raises(InputError, match=r"shape \(3,\) were given; expected \[14\]"):
        Adam.of(space, v[:3])
    with pytest.raises(NumericalError, match="NaN, infinity or negative"):
        Adam.of(space, -v)


def test_separable_fit_is_the_least_squares_one():
    space = ParamSpace.of([("a.lora_A", (3, 5)), ("a.lora_B", (4, 3))])
    h = torch.rand(space.size, dtype=F64) + 0.1
    for (a, b), leaf in zip(Adam(space, h).separable, space.split(h), strict=True):
        m, n = leaf.shape
        rows, columns = torch.arange(m).repeat_interleave(n), torch.arange(n).repeat(m)
        design = torch.zeros(m * n, m + n, dtype=F64)
        design[torch.arange(m * n), rows] = 1
        design[torch.arange(m * n), m + columns] = 1
        best = design @ torch.linalg.pinv(design) @ leaf.log().flatten()
        torch.testing.assert_close(torch.outer(a, b).log().flatten(), best, rtol=1e-10, atol=1e-10)


def test_second_moments_from_gradients():
    space = ParamSpace.of([("a.lora_A", (2, 3)), ("a.lora_B", (4, 2))])
    g, w = torch.randn(5, space.size, dtype=F64), torch.rand(5, dtype=F64)
    v = torch.zeros(space.size, dtype=F64)
    for i in range(5):
        v += (5 * w[i] * g[i]) ** 2 / 5
    found = Adam.from_rms(space, iter([g[:2], g[2:]]), w)
    torch.testing.assert_close(found.scale, Adam.of(space, v).scale, rtol=1e-12, atol=0)
    for rows in ([g[:4]], [g, g[:1]], []):
        with pytest.raises(InputError, match="expected one weight for each row"):
            Adam.from_rms(space, rows, w)


# ---- a Trainer's checkpoint ----------------------------------------------------------------------------------


def adam_by_hand(history, beta2: float):
    """Bias-corrected second moments of a sequence of gradients: a weighted mean with weights beta2^(t-k)."""
    weights = [beta2 ** (len(history) - 1 - k) for k in range(len(history))]
    return sum(w * g.double().square() for w, g in zip(weights, history, strict=True)) / sum(
        weights
    )


def train(model, optimizer, steps: int = 3) -> list[torch.Tensor]:
    """A few steps on made-up gradients; returns them, flat, in ParamSpace order."""
    generator, history = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        for parameter in model.parameters:
            parameter.grad = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
        history.append(model.space.flatten([p.grad.clone() for p in model.parameters]))
        optimizer.step()
    return history


def trainer_groups(model) -> list[dict]:
    """The Trainer's groups for a LoRA model: everything decays, and an empty second group."""
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    ours = [p for _, p in model.model.named_parameters() if p.requires_grad]
    return [{"params": ours, "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]


def write(folder, model, optimizer, log=None):
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.model.save_pretrained(folder)
    content = optimizer.state_dict() if hasattr(optimizer, "state_dict") else optimizer
    torch.save(content, folder / "optimizer.pt")
    if log is not None:
        (folder / "trainer_state.json").write_text(json.dumps(log))
    return folder


def test_second_moments_of_adamw(tmp_path):
    model = build_model("llama", r=3)
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3, betas=(0.8, 0.9))
    history = train(model, optimizer)
    log = {
        "global_step": 4,
        "log_history": [{"step": 1, "learning_rate": 0.4}, {"step": 3, "learning_rate": 0.2}],
    }
    log["log_history"].append({"step": 4, "eval_loss": 1.0})
    found = second_moments(write(tmp_path / "c", model, optimizer, log), model)
    torch.testing.assert_close(found.v, adam_by_hand(history, 0.9), rtol=1e-12, atol=0)
    assert found.steps == 3
    assert found.sum_lr == pytest.approx(0.4 + 0.3 + 0.2 + 0.2)
    (tmp_path / "c" / "trainer_state.json").unlink()
    assert second_moments(tmp_path / "c", model).sum_lr is None


def test_recorded_names_are_followed(tmp_path):
    model = build_model("llama", **FEW)
    named = [(name, p) for name, p in model.model.named_parameters() if "lora_" in name][::-1]
    optimizer = torch.optim.AdamW(named, lr=1e-3)
    assert "param_names" in optimizer.state_dict()["param_groups"][0]
    history = train(model, optimizer)
    found = second_moments(write(tmp_path / "c", model, optimizer), model)
    torch.testing.assert_close(found.v, adam_by_hand(history, 0.999), rtol=1e-12, atol=0)


def test_a_layer_that_looks_like_a_norm_is_in_the_second_group(tmp_path):
    """Its name holds `bias`, so the Trainer puts its LoRA matrices into the group without weight decay."""
    base = build_base_with_bias_layer()
    model = from_peft(
        add_lora(base, target_modules=["q_bias_proj", "v_proj"]).double(), build_tokenizer()
    )
    named = [(name, p) for name, p in model.model.named_parameters() if "lora_" in name]
    groups = [[p for name, p in named if ("bias" in name) == flag] for flag in (False, True)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-3)
    history = train(model, optimizer)
    found = second_moments(write(tmp_path / "c", model, optimizer), model)
    torch.testing.assert_close(found.v, adam_by_hand(history, 0.999), rtol=1e-12, atol=0)


def build_base_with_bias_layer():
    base = build_base("llama", layers=1)
    attention = base.model.layers[0].self_attn
    # registered in place of q_proj's name, in front of v_proj, with an alias that forward finds
    project = attention.q_proj
    del attention._modules["q_proj"]
    rest = dict(attention._modules)
    attention._modules.clear()
    attention._modules["q_bias_proj"] = project
    attention._modules.update(rest)
    type_ = type(
        "Attention",
        (type(attention),),
        {"q_proj": property(lambda self: self._modules["q_bias_proj"])},
    )
    attention.__class__ = type_
    return base


@pytest.mark.parametrize("wrapped", [True, False])
def test_second_moments_in_eight_bits(tmp_path, wrapped):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = build_model("llama", dtype=torch.float32, r=2, **FEW)
    optimizer = bitsandbytes.optim.AdamW8bit(trainer_groups(model), lr=1e-3, min_8bit_size=8)
    history = train(model, optimizer)
    folder = write(tmp_path / "c", model, optimizer)
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    if not wrapped:  # as versions before the wrapping wrote the same tensors
        content["state"] = {
            n: s.pop("__bnb_optimizer_quant_state__", {}) | s for n, s in content["state"].items()
        }
        torch.save(content, folder / "optimizer.pt")
    found, expected = second_moments(folder, model).v, adam_by_hand(history, 0.999).float()
    assert (found - expected).norm() / expected.norm() < 0.05  # 8 bits
    assert not torch.equal(found, expected)
    for state in content["state"].values():
        state.get("__bnb_optimizer_quant_state__", state).pop("absmax2")
    torch.save(content, folder / "optimizer.pt")
    with pytest.raises(AdapterError, match="8-bit second moment without its table and scales"):
        second_moments(folder, model)


def test_blocks_of_eight_bit_states(tmp_path):
    """A hand-made state of more than one block: v = qmap[code] * absmax[position // 256]."""
    model = build_model("llama", r=20, **FEW)
    generator, states, expected = torch.Generator().manual_seed(2), {}, []
    names = [name for name, _ in model.model.named_parameters() if "lora_" in name]
    for number, shape in enumerate(shapes(model)):
        size = shape[0] * shape[1]
        assert size > 256
        code = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
        table, scale = torch.linspace(0, 1, 256), torch.rand(-(-size // 256), generator=generator)
        states[number] = {
            "step": 2,
            "state1": code.view(shape),
            "state2": code.view(shape),
            "qmap2": table,
        }
        states[number]["absmax2"] = scale
        values = [
            float(table[int(c)] * scale[i // 256]) / (1 - 0.99**2) for i, c in enumerate(code)
        ]
        expected += values
    group = {"betas": (0.9, 0.99), "weight_decay": 0.0, "params": list(range(len(names)))}
    folder = write(tmp_path / "c", model, {"state": states, "param_groups": [group]})
    torch.testing.assert_close(
        second_moments(folder, model).v, torch.tensor(expected), rtol=1e-5, atol=0
    )
    states[0]["absmax2"] = torch.ones(7)
    torch.save({"state": states, "param_groups": [group]}, folder / "optimizer.pt")
    with pytest.raises(AdapterError, match="with 7 scales"):
        second_moments(folder, model)


def test_a_real_trainer_writes_what_is_read(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = build_model("llama", dtype=torch.float32, lora_dropout=0.0, **FEW)
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    ids = torch.randint(3, 25, (6, 5), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        adam_beta2=0.95,
        logging_steps=1,
    )
    for name, value in {
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }.items():
        setattr(options, name, value)
    history = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure=None):
            history.append(model.space.flatten([p.grad.clone() for p in model.parameters]))
            return super().step(closure)

    class Recording(Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return Recorded, Trainer.get_optimizer_cls_and_kwargs(args, model)[1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Recording(model=model.model, args=options, train_dataset=data).train()
    found = second_moments(tmp_path / "checkpoint-3", model)
    torch.testing.assert_close(found.v, adam_by_hand(history, 0.95).float(), rtol=1e-5, atol=1e-12)
    assert found.steps == 3
    assert found.sum_lr == pytest.approx(
        0.01 + 0.01 * 2 / 3 + 0.01 / 3
    )  # linear decay from 0.01 to 0 in 3 steps


class Attack:
    """Unpickling one would make a folder."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_malicious_optimizer_is_not_run(tmp_path):
    model = build_model("llama", **FEW)
    folder = write(
        tmp_path / "c", model, {"state": {}, "param_groups": [Attack(str(tmp_path / "owned"))]}
    )
    with pytest.raises(AdapterError, match="nothing in it was run"):
        second_moments(folder, model)
    assert not (tmp_path / "owned").exists()
    torch.load(folder / "optimizer.pt", weights_only=False)
    assert (tmp_path / "owned").exists()  # it would have been


def test_what_cannot_be_used_is_refused_with_a_sentence(tmp_path):
    model = build_model("llama", **FEW)
    groups = trainer_groups(model)
    good = torch.optim.AdamW(groups, lr=1e-3)
    train(model, good)
    folder = write(tmp_path / "c", model, good)

    def refused(content, match):
        torch.save(content, folder / "optimizer.pt")
        with pytest.raises(AdapterError, match=match):
            second_moments(folder, model)

    sgd = torch.optim.SGD(model.parameters, lr=1e-3, momentum=0.9)
    train(model, sgd)
    refused(sgd.state_dict(), "not of Adam or AdamW.* found an optimiser with .*momentum")
    content = good.state_dict()
    lion = {
        number: {"step": 1, "exp_avg": state["exp_avg"]}
        for number, state in content["state"].items()
    }
    refused(content | {"state": lion}, "no second moment per parameter; found exp_avg, step")
    factored = {
        number: {"step": 1, "exp_avg_sq_row": 0, "exp_avg_sq_col": 0} for number in content["state"]
    }
    refused(content | {"state": factored}, "found exp_avg_sq_col, exp_avg_sq_row, step")
    swapped = content["state"] | {0: content["state"][1], 1: content["state"][0]}
    refused(
        content | {"state": swapped},
        r"q_proj.lora_A: shape \[16, 2\] there, \[2, 16\] in the model",
    )
    refused(content | {"state": {}}, "the optimiser has no state for it")
    refused(
        content | {"param_groups": [{**content["param_groups"][0], "params": [0, 1]}]},
        "holds 2 parameters",
    )
    halves = [{**content["param_groups"][0], "params": part} for part in ([0, 2], [1, 3])]
    refused(
        content | {"param_groups": halves},
        r"2 parameter groups of \[2, 2\] parameters without names",
    )
    refused([1, 2], "not a torch optimiser's state_dict")
    (folder / "optimizer.pt").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(AdapterError, match="damaged or holds more than tensors"):
        second_moments(folder, model)
    (folder / "optimizer.pt").unlink()
    with pytest.raises(AdapterError, match=r"has no optimizer\.pt"):
        second_moments(folder, model)
    other = build_model("llama", r=4, **FEW)
    with pytest.raises(
        AdapterError,
        match=r"another adapter than the model's.*\n.*lora_A: \[2, 20\] there, \[4, 20\]",
    ):
        second_moments(folder, other)
    torch.save(content, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text("[]")
    with pytest.raises(InputError, match="not a Trainer's state"):
        second_moments(folder, model)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        second_moments(folder, model)
    with pytest.raises(AdapterError, match="is not a folder"):
        second_moments(tmp_path / "nowhere", model)


def test_it_all_goes_together(tmp_path):
    """From a checkpoint to features: `f_q . f_i = g_q^T diag(1 / (sqrt(v) + eps)) g_i`."""
    model = build_model("llama", **FEW)
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3)
    train(model, optimizer)
    found = second_moments(write(tmp_path / "c", model, optimizer), model)
    g = torch.randn(2, model.space.size, dtype=F64)
    f = Adam.of(model.space, found.v).features(g)
    assert float(f[0] @ f[1]) == pytest.approx(
        float((g[0] * g[1] / (found.v.sqrt() + 1e-8)).sum()), rel=1e-2
    )
