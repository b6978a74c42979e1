"""What ascent costs a row, against a plain torch.optim loop on the PEFT model's own weights; the file that survives a kill."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import torch

import influence
from influence.errors import DataError, InputError, MismatchError, StoreError
from influence.store import write_file
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, rows, tokens_of
from unlearn.difficulty.measured import LEVELS, Measured, Protocol, measure, read_measured

#: Ids that a terminal, a path, a table or HDF5 could trip over.
ODD = ["a/b", "line\nbreak", 'quo"te,comma', "\u202ertl", "🙂", "x" * 3000, "", "tab\t"]
ADAM, SGD = Protocol("adam", 3e-3, steps=20), Protocol("sgd", 0.02, steps=20)
HELD = influence.examples_from_rows(rows(3, seed=7))
#: Options of most measurements: a row's ascent is at most 20 steps, and six training rows tell the damage.
SMALL = {"sample_rows": 6, "heldout": HELD}


def weights_of(model) -> list[torch.Tensor]:
    """The LoRA matrices as PEFT holds them, site after site, A before B."""
    return [
        w
        for s in model.sites
        for w in (s.layer.lora_A["default"].weight, s.layer.lora_B["default"].weight)
    ]


def plain_loss(model, item) -> torch.Tensor:
    """Mean loss of one example, alone, through the whole PEFT model with all logits."""
    ids = torch.from_numpy(item.input_ids)[None]
    logp = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
    own = [t for t in range(1, ids.shape[1]) if item.supervised[t]]
    return -sum(logp[t - 1, ids[0, t]] for t in own) / len(own)


def data(n: int = 9) -> list[dict]:
    """Rows of which the last has the words of the third under another id."""
    found = rows(n)
    return [
        *found,
        {"id": "twin", "prompt": found[2]["prompt"], "completion": found[2]["completion"]},
    ]


def trained(train, steps: int = 40):
    """A one-layer GPT-2 (no float32 inside) whose adapter has learnt the rows a little, so that most are below the base's loss."""
    model = build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])
    tokens, leaves = tokens_of(model, train), weights_of(model)
    for w in leaves:
        w.requires_grad_(True)
    optimizer = torch.optim.Adam(leaves, lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([plain_loss(model, item) for item in tokens]).mean().backward()
        optimizer.step()
    for w in leaves:
        w.requires_grad_(False)
        w.grad = None
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    train = influence.examples_from_rows(data())
    return influence.fit(
        trained(train), train, directory=tmp_path_factory.mktemp("difficulty") / "run"
    )


@pytest.fixture(scope="module")
def measured(run):
    return measure(run, protocol=ADAM, **SMALL)


def base_loss(model, item) -> float:
    with model.model.disable_adapter(), torch.no_grad():
        return float(plain_loss(model, item))


def losses_of(model, items) -> np.ndarray:
    with torch.no_grad():
        return np.array([float(plain_loss(model, item)) for item in items])


def climbed(run, members, target, protocol, sample, heldout):
    """The definition, one unit alone: torch.optim on the model's own weights, crossings between two steps by a straight line.

    Returns steps, losses [steps + 1], samples' losses [levels, m] and held-out losses [levels, h] at the levels.
    """
    model, leaves = run.model, weights_of(run.model)
    before = [w.detach().clone() for w in leaves]
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[protocol.optimizer]
    for w in leaves:
        w.requires_grad_(True)
    optimizer = kind(leaves, lr=protocol.rate, maximize=True)
    losses, steps = np.full(protocol.steps + 1, np.nan), np.inf
    at_levels = [np.full((4, len(items)), np.nan) for items in (sample, heldout)]
    passed, previous = 0, None
    for k in range(protocol.steps + 1):
        loss = torch.stack([plain_loss(model, run.tokens[int(row)]) for row in members]).mean()
        losses[k] = float(loss.detach())
        here = [w.detach().clone() for w in leaves]
        while passed < 4 and losses[k] >= losses[0] + (0.25, 0.5, 0.75, 1.0)[passed] * (
            target - losses[0]
        ):
            wanted = losses[0] + (0.25, 0.5, 0.75, 1.0)[passed] * (target - losses[0])
            share = 0.0 if k == 0 else (wanted - losses[k - 1]) / (losses[k] - losses[k - 1])
            if k > 0:
                for w, a, b in zip(leaves, previous, here, strict=True):
                    w.data = a + share * (b - a)
            for found, items in zip(at_levels, (sample, heldout), strict=True):
                found[passed] = losses_of(model, items)
            for w, own in zip(leaves, here, strict=True):
                w.data = own.clone()
            passed += 1
            steps = np.inf if passed < 4 else max(k - 1 + share, 0.0)
        if passed == 4 or k == protocol.steps:
            break
        previous = here
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for w, own in zip(leaves, before, strict=True):
        w.data = own
        w.requires_grad_(False)
        w.grad = None
    return steps, losses, *at_levels


def check(found: Measured, run, members, protocol, heldout=HELD, targets=None) -> None:
    """Every number of a measurement against the plain loop."""
    model, held = run.model, [] if heldout is None else list(tokens_of(run.model, heldout))
    places = [run.train.index(id) for id in found.sample]
    sample = [run.tokens[i] for i in places]
    words = [(row.prompt, row.completion) for row in run.train]
    np.testing.assert_allclose(found.retained_before, losses_of(model, sample), rtol=1e-12)
    np.testing.assert_allclose(found.heldout_before, losses_of(model, held), rtol=1e-12)
    for i, own in enumerate(members):
        target = (
            np.mean([base_loss(model, run.tokens[j]) for j in own])
            if targets is None
            else targets[i]
        )
        steps, losses, retained, heldout_ = climbed(run, own, target, protocol, sample, held)
        rises = retained - losses_of(model, sample)
        rises[:, [words[j] in [words[k] for k in own] for j in places]] = np.nan
        assert found.target[i] == pytest.approx(target, rel=1e-12)
        assert found.start[i] == pytest.approx(losses[0], rel=1e-12)
        np.testing.assert_allclose(found.steps[i], steps, rtol=1e-8)
        np.testing.assert_allclose(found.losses[i], losses, rtol=1e-9)
        np.testing.assert_allclose(found.retained[i], rises, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.heldout[i], heldout_, rtol=1e-8)
        curve = [float("nan") if np.isnan(r).all() else np.nanmean(r) for r in rises]
        np.testing.assert_allclose(found.curve[i], curve, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.damage[i], curve[3], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("protocol", [ADAM, SGD], ids=["adam", "sgd"])
def test_rows_equal_a_plain_loop_row_by_row(run, protocol):
    found = measure(run, protocol=protocol, **SMALL)
    assert found.names == tuple(run.train.ids)
    assert found.levels.tolist() == list(LEVELS) == [0.25, 0.5, 0.75, 1.0]
    assert np.isfinite(found.steps).sum() >= 3  # both kinds are there
    assert np.isinf(found.steps).sum() >= 2
    check(found, run, [[i] for i in range(len(run.train))], protocol)
    assert found.protocol == protocol.record()


@pytest.mark.parametrize("protocol", [ADAM, SGD], ids=["adam", "sgd"])
def test_groups_equal_a_plain_loop_over_their_mean_loss(run, protocol):
    groups = {
        "pair": ["r0-3", "r0-1"],
        "with the twin's words": ["r0-2", "r0-5", "r0-7"],
        "one": ["r0-6"],
    }
    found = measure(run, groups=groups, protocol=protocol, **SMALL)
    assert found.names == tuple(groups)
    check(found, run, [[run.train.index(id) for id in ids] for ids in groups.values()], protocol)


def test_own_rows_and_their_word_for_word_copies_do_not_count_in_the_damage(run):
    found = measure(run, ids=["twin", "r0-2", "r0-0"], protocol=ADAM, sample_rows=10)
    assert sorted(found.sample) == sorted(run.train.ids)  # as many as there are
    unknown = np.isnan(found.retained[:, 0])
    assert [[id for id, no in zip(found.sample, row, strict=True) if no] for row in unknown] == [
        ["r0-2", "twin"],
        ["r0-2", "twin"],
        ["r0-0"],
    ]
    assert np.isnan(found.retained[0]).all(0).sum() == 2
    everyone = measure(
        run,
        groups={"all": run.train.ids},
        protocol=Protocol("adam", 0.01, steps=60),
        sample_rows=10,
    )
    assert np.isfinite(everyone.steps[0])
    assert np.isnan(everyone.damage[0])  # nobody is left to tell it


def test_a_row_at_its_target_from_the_start_costs_nothing(run):
    ahead = [
        i
        for i in range(10)
        if base_loss(run.model, run.tokens[i]) < losses_of(run.model, [run.tokens[i]])[0]
    ]
    model = build_model(
        "gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"], seed=3, std=0.5
    )
    if not ahead:  # with an adapter that learnt nothing there are such rows
        with run.model.at(model.snapshot()):
            ahead = [
                i
                for i in range(10)
                if base_loss(run.model, run.tokens[i]) < losses_of(run.model, [run.tokens[i]])[0]
            ]
            assert ahead
            found = measure(run, protocol=ADAM, **SMALL)
    else:
        found = measure(run, protocol=ADAM, **SMALL)
    assert (found.target < found.start).nonzero()[0].tolist() == ahead
    assert (found.steps[ahead] == 0).all()
    assert np.abs(found.curve[ahead]).max() < 1e-12
    assert np.abs(found.area[ahead]).max() < 1e-12
    np.testing.assert_allclose(
        found.heldout[ahead], np.broadcast_to(found.heldout_before, (len(ahead), 4, 3))
    )
    assert np.isnan(found.losses[ahead, 1:]).all()


def test_a_row_that_does_not_get_there_is_infinite_and_its_levels_are_known_as_far_as_it_got(run):
    short = measure(run, protocol=Protocol("adam", 3e-3, steps=5), **SMALL)
    long = measure(run, protocol=ADAM, **SMALL)
    assert np.isinf(short.steps).all()
    assert np.isnan(short.damage).all()
    assert np.isnan(short.area).all()
    assert np.isnan(short.heldout_damage).all()
    partly = np.isfinite(short.curve[:, 0])
    assert partly.any()
    np.testing.assert_allclose(short.curve[partly, 0], long.curve[partly, 0])
    assert np.isfinite(short.losses).all()


def test_area_and_heldout_damage_by_hand():
    """Means of two counted rows 1, 2, 4, 8 at quarters: 0.25 (0.5 + 1.5 + 3 + 6) = 2.75."""
    retained = np.array([[[0.0, 2.0, np.nan], [1, 3, np.nan], [5, 3, np.nan], [8, 8, np.nan]]])
    nothing = np.zeros(1)
    found = Measured(
        ("a",),
        nothing,
        nothing,
        nothing,
        np.zeros((1, 1)),
        np.array(LEVELS),
        retained,
        np.array([[[9.0, 9], [9, 9], [9, 9], [3, 6]]]),
        np.zeros(3),
        np.array([1.0, 2.0]),
        ("x", "y", "z"),
        {},
    )
    assert found.curve.tolist() == [[1, 2, 4, 8]]
    assert found.damage.tolist() == [8]
    assert found.area.tolist() == [2.75]
    assert found.heldout_damage.tolist() == [3]


def same(one: Measured, other: Measured, rows_=slice(None), **options) -> None:
    for name in ("start", "target", "steps", "losses", "retained", "heldout"):
        np.testing.assert_allclose(
            getattr(one, name)[rows_], getattr(other, name), equal_nan=True, **options
        )


def test_chunks_and_the_other_rows_that_are_asked_change_nothing(run, measured, monkeypatch):
    alone = measure(run, ids=["r0-4", "r0-1"], protocol=ADAM, **SMALL)
    same(measured, alone, [4, 1], rtol=1e-8, atol=1e-10)
    monkeypatch.setattr("influence.run.PART_BYTES", 1)  # one copy at a time
    four = measure(run, ids=run.train.ids[3:7], protocol=ADAM, **SMALL)
    same(measured, four, slice(3, 7), rtol=1e-8, atol=1e-10)


def test_the_run_and_its_model_are_left_alone(run, measured):
    before = {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}
    theta, flags = (
        run.model.snapshot(),
        [parameter.requires_grad for parameter in run.model.model.parameters()],
    )
    measure(run, ids=["r0-4"], protocol=ADAM, **SMALL)
    assert torch.equal(run.model.snapshot(), theta)
    assert {
        path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()
    } == before
    assert [parameter.requires_grad for parameter in run.model.model.parameters()] == flags


def test_the_sample_follows_the_seed_and_does_not_depend_on_what_is_asked(run, measured):
    assert measure(run, ids=["r0-4"], protocol=ADAM, **SMALL).sample == measured.sample
    assert len(set(measured.sample)) == 6
    samples = {
        measure(run, ids=["r0-4"], protocol=ADAM, sample_rows=3, seed=s).sample for s in range(4)
    }
    assert len(samples) > 1


def test_without_heldout_rows_there_is_no_heldout_damage(run, tmp_path):
    for out in (None, tmp_path / "m.h5"):
        found = measure(run, ids=["r0-3"], protocol=ADAM, sample_rows=2, out=out)
        assert found.heldout.shape == (1, 4, 0)
        assert np.isnan(found.heldout_damage).all()
        assert np.isfinite(found.damage).all()


def test_many_heldout_rows_are_thinned_evenly(run):
    many = influence.examples_from_rows(rows(40, seed=8))
    found = measure(run, ids=["r0-3"], protocol=ADAM, sample_rows=2, heldout=many)
    assert found.heldout.shape == (1, 4, 16)
    all_losses = losses_of(run.model, tokens_of(run.model, many))
    np.testing.assert_allclose(found.heldout_before[[0, -1]], all_losses[[0, -1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_move_at_the_default_rate(tmp_path, dtype):
    """Steps of 1e-4 are lost in the parameters' own type: 0.3 has neighbours 0.002 (bfloat16) or 0.0002 (float16) away."""
    model = influence.from_peft(
        add_lora(build_base("gpt2", layers=1).to(dtype)).to(dtype), build_tokenizer()
    )
    train = influence.examples_from_rows(rows(3))
    run = influence.fit(
        model, train, directory=tmp_path / "run", curvature=influence.Identity(), store="never"
    )
    found = measure(run, protocol=Protocol(steps=60, target="unseen"), sample_rows=2)
    going = found.target > found.start + 0.5
    assert going.any()
    rise = found.losses[going]
    first = [row[np.isfinite(row)] for row in rise]
    assert all(row[-1] - row[0] > 0.02 for row in first)
    assert all(np.unique(row).size > 5 for row in first)


def unseen_oracle(run, removed, heldout=None) -> float:
    """The formula of `unlearn.unseen` with plain gradient products at the adapter: identity curvature, lambda 1."""
    model, leaves = run.model, weights_of(run.model)
    gradients = []
    for item in run.tokens:
        for w in leaves:
            w.requires_grad_(True)
        loss = plain_loss(model, item) * int(item.supervised.sum())
        gradients.append(torch.cat([g.ravel() for g in torch.autograd.grad(loss, leaves)]))
        for w in leaves:
            w.requires_grad_(False)
    products = (
        torch.stack(gradients) @ torch.stack(gradients).T
    ).numpy()  # equal weights 1 / N_tok cancel
    kept = [i for i in range(len(run.tokens)) if i not in removed]
    rho = 1.2
    if heldout is not None:
        items = list(tokens_of(model, heldout))
        rho = np.clip(
            losses_of(model, items).mean() / np.mean([base_loss(model, item) for item in items]),
            1,
            2,
        )
    out = []
    for i in removed:
        excess = np.maximum(0, products[i] - np.median(products[i, kept])) ** 1.25
        now, base = losses_of(model, [run.tokens[i]])[0], base_loss(model, run.tokens[i])
        out.append(now + max(0, rho * base - now) * excess[removed].sum() / excess.sum())
    return float(np.mean(out))


@pytest.mark.parametrize("held", [3, 9])
def test_the_unseen_target_is_the_estimate_of_each_unit_alone(run, tmp_path, held):
    plain = influence.fit(
        run.model, run.train, curvature=influence.Identity(), directory=tmp_path / "run"
    )
    heldout = influence.examples_from_rows(rows(held, seed=7))
    protocol = Protocol("adam", 3e-3, "unseen", 6)
    options = {"protocol": protocol, "heldout": heldout, "sample_rows": 2}
    enough = heldout if held >= 8 else None
    found = measure(plain, ids=["r0-1", "r0-6"], **options)
    targets = [unseen_oracle(plain, [1], enough), unseen_oracle(plain, [6], enough)]
    check(found, plain, [[1], [6]], protocol, heldout, targets)
    group = measure(plain, groups={"both": ["r0-1", "r0-6"]}, **options)
    target = unseen_oracle(plain, [1, 6], enough)
    assert abs(target - np.mean(targets)) > 1e-6
    check(group, plain, [[1, 6]], protocol, heldout, [target])


def test_a_run_of_one_training_row_can_be_measured(tmp_path):
    train = influence.examples_from_rows(rows(1))
    run = influence.fit(trained(train, 5), train, directory=tmp_path / "run", store="never")
    found = measure(run, protocol=ADAM)
    assert np.isfinite(found.losses[0, :2]).all()
    assert np.isnan(found.damage).all()  # the sample is the row itself


def test_an_ascent_that_blows_up_is_told_and_not_raised(run):
    for optimizer in ("sgd", "adam"):
        found = measure(
            run, ids=["r0-0", "r0-4"], protocol=Protocol(optimizer, 1e200, steps=4), sample_rows=2
        )
        assert found.steps.shape == (2,)
        assert (np.isinf(found.steps) | (found.steps <= 1)).all()


# ---- what cannot be asked ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"ids": []}, InputError, "no row was given: name at least one"),
        ({"groups": {}}, InputError, "no row was given: name at least one"),
        (
            {"ids": "r0-1"},
            InputError,
            "ids 'r0-1' were given as one string; expected a list, as in \\['r0-1'\\]",
        ),
        (
            {"ids": ["r0-1", "r0-2", "r0-1"]},
            InputError,
            "ids are given more than once: 'r0-1'; name each row once",
        ),
        (
            {"ids": ["r0-1"], "groups": {"a": ["r0-1"]}},
            InputError,
            "ids and groups were given together",
        ),
        (
            {"groups": {"a": []}},
            InputError,
            "group 'a' is \\[\\]; expected a list of different ids, at least one",
        ),
        ({"groups": {"a": "r0-1"}}, InputError, "group 'a' is 'r0-1'; expected a list"),
        ({"groups": {"a": ["r0-1", "r0-1"]}}, InputError, "expected a list of different ids"),
        ({"ids": ["r0-77"]}, DataError, "no example has the id 'r0-77', among 10; the nearest are"),
        ({"groups": {"a": ["nobody"]}}, DataError, "no example has the id 'nobody'"),
        ({"sample_rows": 0}, InputError, "sample_rows 0 was given; expected at least 1"),
        (
            {"heldout": influence.examples_from_rows(rows(3))},
            InputError,
            "3 held-out rows are training rows",
        ),
        ({"heldout": influence.Examples()}, InputError, "the held-out file has no rows"),
        (
            {"out": "m.json"},
            InputError,
            "m.json was given for measurements; they are written as HDF5",
        ),
        ({"out": "m"}, InputError, "name a file that ends in .h5"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(
    run, tmp_path, monkeypatch, given, error, sentence
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=sentence):
        measure(run, protocol=ADAM, **given)
    assert list(tmp_path.iterdir()) == []


# ---- the file ------------------------------------------------------------------------------------------------


class Forwards:
    """Counts forwards of the base model, and kills at the n-th."""

    def __init__(self, run, kill: int | None = None) -> None:
        self.count, self.graph, self.kill = 0, 0, kill
        self._handle = run.model.model.get_base_model().register_forward_pre_hook(
            self._seen, with_kwargs=True
        )

    def _seen(self, module, args, kwargs) -> None:
        self.count += 1
        self.graph += torch.is_grad_enabled()
        if self.count == self.kill:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._handle.remove()


def equal(one: Measured, other: Measured) -> None:
    """Bit for bit."""
    for name in vars(one):
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b, equal_nan=True), name
        else:
            assert a == b, name


def test_a_killed_measurement_goes_on_and_is_the_same_bit_for_bit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "influence.run.PART_BYTES", 18 * 8 * run.model.space.size
    )  # three rows at a time
    options = {"protocol": ADAM, **SMALL}
    expected = measure(run, out=tmp_path / "whole.h5", **options)
    equal(expected, measure(run, **options))
    with Forwards(run) as whole:
        measure(run, **options)
    out, left = tmp_path / "killed.h5", []
    for share in (
        0.02,
        0.4,
        0.1,
        0.3,
    ):  # of all forwards: in the first part, two parts later, in the next part again, later
        with Forwards(run, kill=int(whole.count * share)), pytest.raises(KeyboardInterrupt):
            measure(run, out=out, **options)
        if out.exists():
            with h5py.File(out) as file:
                left.append(int((file["done"][()] == 0).sum()))
            with pytest.raises(
                StoreError,
                match=f"is unfinished: {left[-1]} units are left; run the same measurement",
            ):
                read_measured(out)
    assert len(left) >= 3
    assert left[0] >= 7 > left[-1] > 0
    equal(measure(run, out=out, **options), expected)
    equal(read_measured(out), expected)
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_part_that_was_killed_between_its_arrays_and_its_mark_is_done_again(run, tmp_path):
    options = {"protocol": ADAM, "ids": ["r0-3", "r0-1"], "sample_rows": 3}
    expected = measure(run, out=tmp_path / "m.h5", **options)
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        file["done"][1] = 0
        file["losses"][1, 1:] = 0  # half written
        file["retained"][1] = 99
    found = measure(run, out=tmp_path / "m.h5", **options)
    same(found, expected, rtol=1e-9, atol=1e-11)


def test_a_kill_while_a_part_is_written_leaves_it_undone(run, tmp_path, monkeypatch):
    calls = []

    def dies(file) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise KeyboardInterrupt

    out, options = tmp_path / "m.h5", {"protocol": ADAM, "ids": ["r0-3", "r0-1"], "sample_rows": 2}
    with monkeypatch.context() as patch:
        patch.setattr("influence.store.RowFile.flush", dies)
        with pytest.raises(KeyboardInterrupt):
            measure(run, out=out, **options)
    with h5py.File(out) as file:
        assert file["done"][()].tolist() == [0, 0]
    equal(measure(run, out=out, **options), measure(run, **options))


def test_a_finished_file_is_read_and_nothing_climbs(run, tmp_path, measured):
    out = tmp_path / "m.h5"
    with Forwards(run) as first:
        expected = measure(run, protocol=ADAM, out=out, **SMALL)
    content = out.read_bytes()
    equal(expected, measured)
    for overwrite in (False, True):
        with Forwards(run) as again:
            equal(measure(run, protocol=ADAM, out=out, overwrite=overwrite, **SMALL), expected)
        assert again.graph == 0
        assert again.count <= 2  # the rows' losses under adapter and base, which tell what is asked
        assert first.graph > 10
    assert out.read_bytes() == content
    equal(read_measured(str(out)), expected)


@pytest.mark.parametrize(
    "other",
    [
        {"ids": ["r0-1", "r0-3"]},
        {"groups": {"r0-3": ["r0-3"], "r0-1": ["r0-5"]}},
        {"protocol": Protocol("adam", 3e-3, steps=19)},
        {"protocol": Protocol("adam", 4e-3, steps=20)},
        {"protocol": Protocol("sgd", 3e-3, steps=20)},
        {"protocol": Protocol("adam", 3e-3, "unseen", 20)},
        {"sample_rows": 3},
        {"seed": 1, "sample_rows": 2},
        {"heldout": None},
        {"heldout": influence.examples_from_rows(rows(3, seed=5))},
    ],
)
def test_another_request_is_refused_and_the_file_untouched(run, tmp_path, other):
    out = tmp_path / "m.h5"
    asked = {
        "ids": ["r0-3", "r0-1"],
        "protocol": ADAM,
        "sample_rows": 2,
        "heldout": HELD,
        "out": out,
    }
    measure(run, **asked)
    content = out.read_bytes()
    changed = asked | other | ({"ids": None} if "groups" in other else {})
    with pytest.raises(
        MismatchError,
        match=r"m\.h5 has measurements of another request .*give --overwrite to replace",
    ):
        measure(run, **changed)
    assert out.read_bytes() == content
    found = measure(run, overwrite=True, **changed)
    assert out.read_bytes() != content
    equal(found, read_measured(out))
    if "heldout" not in other:
        equal(found, measure(run, **changed | {"out": None}))


def test_another_run_is_another_request(run, tmp_path):
    out, options = tmp_path / "m.h5", {"protocol": ADAM, "ids": ["r0-1"], "sample_rows": 2}
    measure(run, out=out, **options)
    other = influence.fit(
        run.model, run.train, curvature=influence.Identity(), directory=tmp_path / "run"
    )
    with pytest.raises(MismatchError, match="another request"):
        measure(other, out=out, **options)


def test_an_unfinished_file_of_another_request_is_refused_too(run, tmp_path):
    out, options = tmp_path / "m.h5", {"ids": ["r0-3", "r0-1"], "sample_rows": 2}
    with Forwards(run, kill=8), pytest.raises(KeyboardInterrupt):
        measure(run, protocol=ADAM, out=out, **options)
    content = out.read_bytes()
    with pytest.raises(MismatchError):
        measure(run, protocol=SGD, out=out, **options)
    assert out.read_bytes() == content


def test_files_that_are_something_else(run, tmp_path):
    options = {"protocol": ADAM, "ids": ["r0-3"], "sample_rows": 2}
    foreign, text, damaged = (tmp_path / name for name in ("scores.h5", "text.h5", "damaged.h5"))
    write_file(foreign, {"values": np.zeros(3)}, attrs={"run_digest": run.digest})
    text.write_text("no HDF5 at all")
    measure(run, out=damaged, **options)
    damaged.write_bytes(damaged.read_bytes()[:500])
    before = {path: path.read_bytes() for path in (foreign, text, damaged)}
    for path in before:
        for overwrite in (False, True):
            with pytest.raises((StoreError, InputError)):
                measure(run, out=path, overwrite=overwrite, **options)
        with pytest.raises(
            StoreError,
            match=r"has no measurements of unlearning difficulty|is damaged, truncated, or not",
        ):
            read_measured(path)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(StoreError, match="does not exist"):
        read_measured(tmp_path / "nowhere.h5")


@pytest.mark.parametrize("missing", ["steps", "retained", "names", "sample", "levels", "protocol"])
def test_a_file_that_lacks_something_is_refused_by_name(run, tmp_path, missing):
    out = tmp_path / "m.h5"
    measure(run, out=out, protocol=ADAM, ids=["r0-3"], sample_rows=2)
    with h5py.File(out, "r+") as file:
        del (file.attrs if missing == "protocol" else file)[missing]
    with pytest.raises(StoreError, match=rf"m\.h5.*{missing}"):
        read_measured(out)


def test_a_protocol_that_is_no_json_is_a_damaged_file(run, tmp_path):
    out = tmp_path / "m.h5"
    measure(run, out=out, protocol=ADAM, ids=["r0-3"], sample_rows=2)
    with h5py.File(out, "r+") as file:
        file.attrs["protocol"] = "{"
    with pytest.raises(StoreError, match=r"m\.h5"):
        read_measured(out)


def test_odd_ids_and_group_names_come_back(run, tmp_path):
    named = [
        row | {"id": id}
        for row, id in zip(data(), [*ODD[:6], "n", "tab\t", "日本", "p"], strict=True)
    ]
    train = influence.examples_from_rows(named)
    odd = influence.fit(
        run.model, train, curvature=influence.Identity(), directory=tmp_path / "run", store="never"
    )
    found = measure(
        odd, out=tmp_path / "rows.h5", protocol=Protocol("adam", 3e-3, steps=2), sample_rows=10
    )
    assert found.names == tuple(train.ids)
    assert sorted(found.sample) == sorted(train.ids)
    groups = {name: [train.ids[i % 10]] for i, name in enumerate(ODD)}
    found = measure(
        odd, groups=groups, out=tmp_path / "groups.h5", protocol=Protocol("adam", 3e-3, steps=2)
    )
    assert found.names == tuple(ODD)
    with h5py.File(tmp_path / "groups.h5") as file:
        assert json.loads(file.attrs["protocol"])["steps"] == 2


def test_an_id_with_a_null_byte_is_refused_or_comes_back(run, tmp_path):
    out = tmp_path / "m.h5"
    try:
        found = measure(
            run, groups={"a\0b": ["r0-3"]}, out=out, protocol=Protocol("adam", 3e-3, steps=2)
        )
    except StoreError:
        assert list(tmp_path.iterdir()) == []
    else:
        assert found.names == ("a\0b",)
