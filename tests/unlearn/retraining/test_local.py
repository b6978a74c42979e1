"""Local retraining: fresh starts like PEFT's, trainings on few rows, and which rows these are."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import influence
import unlearn
from influence.cost import Cost
from influence.errors import InputError
from influence.tokens import TokenizedExamples, Tokens
from tests.conftest import build_base, build_model, examples, tokens_of
from tests.oracles import plain_log_probs, plain_mean
from unlearn.record.change import Change, plan
from unlearn.record.version import version
from unlearn.retraining import local, retrain
from unlearn.retraining.local import (
    MOST_LEARNT,
    TRIES,
    TokenIndex,
    Try,
    fresh,
    planned,
    untrained,
)

F64 = torch.float64
RECIPE = unlearn.Recipe(lr=2e-2, epochs=3, batch_size=4, seed=5)


def run_of(model, n, folder):
    """A run that fits next to nothing: only its rows and its adapter are asked for here."""
    return influence.fit(
        model, examples(n), curvature=influence.Identity(), directory=folder, store="never"
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A version of an adapter on sixty rows, which no test changes."""
    model = build_model("llama", layers=1)
    return version(run_of(model, 60, tmp_path_factory.mktemp("local") / "run"))


# ---- the parameters that an adapter begins with --------------------------------------------------

INITS = (True, False, "gaussian", "orthogonal")


def as_peft_draws(how, r, seed):
    """Matrices by name of an adapter that PEFT has just made, in float32 as it draws them."""
    config = LoraConfig(r=r, target_modules="all-linear", init_lora_weights=how)
    base = build_base("llama", layers=1)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(base, config)
    named = made.named_parameters()
    return {name: value.detach() for name, value in named if "lora_" in name}


def sites_of(model, flat):
    """A and B of each site in a flat vector."""
    leaves = model.space.split(flat)
    return list(zip(model.sites, leaves[0::2], leaves[1::2], strict=True))


@pytest.mark.parametrize("how", INITS)
def test_a_fresh_start_is_drawn_as_torch_draws_it(how):
    """Site by site, A before B, from one generator of the seed."""
    model = build_model("llama", layers=2, r=4, init_lora_weights=how)
    found, again = untrained(model, 11), torch.Generator().manual_seed(11)
    assert torch.equal(found, untrained(model, 11))
    assert not torch.equal(found, untrained(model, 12))
    for site, a, b in sites_of(model, found):
        shapes = site.A.weight.shape, site.B.weight.shape
        expected_a, expected_b = (torch.zeros(shape, dtype=F64) for shape in shapes)
        if how == "orthogonal":
            normal = [(4, 4), (shapes[0][1], 2), (2, shapes[1][0])]
            x, left, right = (torch.randn(*n, generator=again, dtype=F64) for n in normal)
            q = torch.linalg.qr(x).Q
            expected_a = left.mm(q[0::2]).T / 10
            expected_b = right.T.mm(q[1::2]) / 10
        elif how == "gaussian":
            nn.init.normal_(expected_a, std=1 / 4, generator=again)
        else:
            nn.init.kaiming_uniform_(expected_a, a=math.sqrt(5), generator=again)
            if how is False:
                nn.init.kaiming_uniform_(expected_b, a=math.sqrt(5), generator=again)
        assert torch.equal(a, expected_a)
        assert torch.equal(b, expected_b)
        product = float((b @ a).abs().max())
        assert product > 0.01 if how is False else product < 1e-14
        assert float(b.abs().max()) > 0 or how in (True, "gaussian")


@pytest.mark.parametrize("how", INITS)
def test_a_fresh_start_is_distributed_as_pefts(how):
    """Each matrix has the scale and the range of PEFT's: over seeds, as PEFT draws by its own."""
    model = build_model("llama", layers=1, r=4, init_lora_weights=how)
    mine = [model.space.split(untrained(model, seed)) for seed in range(40)]
    theirs = [as_peft_draws(how, 4, seed) for seed in range(40)]
    for place, leaf in enumerate(model.space.leaves):
        path, kind = leaf.name.rsplit(".", 1)
        (name,) = (n for n in theirs[0] if f"{path}.{kind}." in n)
        ours = torch.stack([draw[place] for draw in mine])
        pefts = torch.stack([draw[name] for draw in theirs]).to(F64)
        assert ours.shape == pefts.shape
        if not pefts.any():
            assert not ours.any()
            continue
        assert float(ours.std() / pefts.std()) == pytest.approx(1, abs=0.1)
        assert float(ours.mean()) == pytest.approx(0, abs=0.1 * float(pefts.std()))
        if how in (True, False):  # uniform: the ends are the law
            end = 1 / math.sqrt(leaf.shape[1])
            for draws in (ours, pefts):
                assert 0.95 * end < float(draws.abs().max()) <= end
        # how far the tails reach: a normal one further than a uniform one
        kurtosis = [float((d**4).mean() / (d**2).mean() ** 2) for d in (ours, pefts)]
        assert kurtosis[0] == pytest.approx(kurtosis[1], rel=0.25)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda"])
def test_initialisations_that_change_the_base_are_refused(start, how):
    model = build_model("llama", layers=1)
    model.model.peft_config["default"].init_lora_weights = how
    other = replace(start, run=copy.copy(start.run))
    other.run.model = model
    for call in (
        lambda: untrained(model, 0),
        lambda: fresh(model, start.tokens, RECIPE),
        lambda: planned(plan(other, remove=["r0-0"]), RECIPE),
    ):
        with pytest.raises(InputError, match=f"init_lora_weights='{how}', which changes the base"):
            call()
    with pytest.raises(InputError, match=r"a loss to reach \(--until loss=X\)"):
        planned(plan(other, remove=["r0-0"]), RECIPE)


# ---- one training --------------------------------------------------------------------------------


def state_of(model):
    """All that a training could leave changed, as it is."""
    tensors = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    grads = {
        name: None if p.grad is None else (id(p.grad), p.grad.clone())
        for name, p in model.model.named_parameters()
    }
    flags = {name: p.requires_grad for name, p in model.model.named_parameters()}
    modes = {name: module.training for name, module in model.model.named_modules()}
    return tensors, grads, flags, modes, torch.get_rng_state()


def assert_same(now, before):
    tensors, grads, *plain, torch_state = now
    tensors_before, grads_before, *plain_before, torch_before = before
    assert plain == plain_before
    assert tensors.keys() == tensors_before.keys()
    assert all(torch.equal(tensors[name], value) for name, value in tensors_before.items())
    for name, grad in grads_before.items():
        if grad is None:
            assert grads[name] is None
        else:
            assert grads[name][0] == grad[0]
            assert torch.equal(grads[name][1], grad[1])
    assert torch.equal(torch_state, torch_before)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("ending", ["whole", "stopped"])
def test_the_model_is_afterwards_what_it_was(ending):
    """With parameters that have gradients, odd flags and a module that trains."""
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(6))
    for number, parameter in enumerate(model.parameters):
        parameter.requires_grad_(number % 3 == 0)
        parameter.grad = None if number % 2 else torch.full_like(parameter, float(number))
    base_weight = model.model.get_input_embeddings().weight
    base_weight.requires_grad_(True)
    base_weight.grad = torch.ones_like(base_weight)
    model.sites[1].layer.train()
    torch.manual_seed(77)
    torch.rand(3)
    before = state_of(model)

    def stop(_):
        raise Stopped

    if ending == "stopped":
        with pytest.raises(Stopped):
            fresh(model, tokens, RECIPE, after_epoch=stop)
    else:
        theta = fresh(model, tokens, RECIPE)
        assert not torch.equal(theta, model.snapshot())
        assert not theta.requires_grad
    assert_same(state_of(model), before)


def plain_loop(model, tokens, recipe):
    """AdamW on a copy of the model, through its ordinary forward.

    The loss is the mean over supervised tokens, from the logits, for the models' own is in float32.
    """
    model = influence.from_peft(copy.deepcopy(model.model), model.tokenizer)
    model.restore(untrained(model, recipe.seed))
    matrices = [p.requires_grad_(True) for p in model.parameters]
    optimizer = torch.optim.AdamW(
        matrices, lr=1.0, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )
    model.model.train(recipe.dropout)
    order, step = torch.Generator().manual_seed(recipe.seed), 0
    total = recipe.epochs * math.ceil(len(tokens) / recipe.batch_size)
    torch.manual_seed(recipe.seed)
    for _ in range(recipe.epochs):
        drawn = torch.randperm(len(tokens), generator=order).tolist()
        for first in range(0, len(tokens), recipe.batch_size):
            batch = [tokens[i] for i in drawn[first : first + recipe.batch_size]]
            width = max(len(item) for item in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.int64)
            labels = torch.full((len(batch), width), -100)
            for i, item in enumerate(batch):
                ids[i, : len(item)] = torch.as_tensor(item.input_ids)
                seen = torch.as_tensor(item.supervised)
                labels[i, : len(item)][seen] = ids[i, : len(item)][seen]
            logits = model.model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            optimizer.param_groups[0]["lr"] = recipe.lr * (1 - step / total)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return model.snapshot()


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("how", [True, "orthogonal"])
def test_a_training_equals_a_plain_loop(dropout, how):
    model = build_model("llama", layers=1, init_lora_weights=how)
    tokens = tokens_of(model, examples(7))
    recipe = replace(RECIPE, dropout=dropout, weight_decay=0.1)
    found = fresh(model, tokens, recipe)
    torch.testing.assert_close(found, plain_loop(model, tokens, recipe), rtol=0, atol=1e-9)
    other = fresh(model, tokens, replace(recipe, dropout=not dropout))
    assert float((found - other).abs().max()) > 1e-3


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, max_steps=4, max_grad_norm=0.1)])
def test_a_training_is_that_of_retraining_from_the_same_start(recipe):
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(6))
    found = fresh(model, tokens, recipe)
    copied = influence.from_peft(copy.deepcopy(model.model), model.tokenizer)
    copied.restore(untrained(copied, recipe.seed))
    torch.manual_seed(recipe.seed)
    retrain.train(copied, tokens, recipe)
    assert torch.equal(found, copied.snapshot())


def test_gradients_are_given_back_also_after_an_error(tiny):
    kept = [torch.ones_like(p) * i for i, p in enumerate(tiny.parameters)]
    for parameter, grad in zip(tiny.parameters[1:], kept[1:], strict=True):
        parameter.grad = grad

    def stopped():
        with retrain.gradients_kept(tiny):
            for parameter in tiny.parameters:
                parameter.grad = torch.zeros_like(parameter)
            raise Stopped

    with pytest.raises(Stopped):
        stopped()
    assert tiny.parameters[0].grad is None
    assert all(p.grad is g for p, g in zip(tiny.parameters[1:], kept[1:], strict=True))


# ---- the rows that are most like others ----------------------------------------------------------


def rows_of(*ids):
    """Rows that hold these tokens."""
    rows = [Tokens(np.array(row), np.arange(len(row)) > 0) for row in ids]
    return TokenizedExamples(rows, [str(i) for i in range(len(rows))])


def random_rows(n, seed, top=40):
    """Rows of 3 to 19 tokens, small ones more often than large ones."""
    rng = np.random.default_rng(seed)
    return [(top * rng.random(rng.integers(3, 20)) ** 2).astype(int).tolist() for _ in range(n)]


def naive_nearest(rows, wanted, among, count):
    """TF-IDF by its formulas: tf 1 + ln c, idf 1 + ln((1 + n) / (1 + df)), and the cosine.

    Each wanted row ranks all rows; a row's rank is the best that it gets, its nearness there.
    """
    known = 1 + max(max(row) for row in rows)

    def weights(row):
        found = {}
        for token, times in Counter(t for t in row if t < known).items():
            holding = sum(token in other for other in rows)
            idf = 1 + math.log((1 + len(rows)) / (1 + holding))
            found[token] = (1 + math.log(times)) * idf
        length = math.sqrt(sum(value**2 for value in found.values())) or 1.0
        return {token: value / length for token, value in found.items()}

    mine, best = [weights(rows[i]) for i in among], {}
    for other in map(weights, wanted):
        cosines = [round(sum(own.get(t, 0) * x for t, x in other.items()), 11) for own in mine]
        for rank, k in enumerate(sorted(range(len(mine)), key=lambda k: (-cosines[k], k))):
            best[k] = min(best.get(k, (rank, 0.0)), (rank, -cosines[k]))
    return [among[k] for k in sorted(best, key=lambda k: (best[k], k))][:count]


@pytest.mark.parametrize(("count", "wanted"), [(7, 1), (15, 20), (40, 3), (12, 130)])
def test_the_nearest_rows_are_those_of_a_naive_tf_idf(count, wanted):
    """Some of the wanted rows hold tokens that no row has, and above all that are known."""
    rows, asked = random_rows(50, 0), random_rows(wanted, 1, top=60)
    assert max(map(max, asked)) > max(map(max, rows))
    among = np.random.default_rng(2).permutation(50)[:30]
    found = TokenIndex(rows_of(*rows)).nearest(rows_of(*asked), among, count)
    expected = naive_nearest(rows, asked, among.tolist(), count)
    assert found.tolist() == expected
    assert len(found) == min(count, 30)


def test_every_row_has_its_nearest_among_the_first():
    """Though another row has many that are nearer."""
    rows = [[1, 2, 3, 4 + i] for i in range(10)] + [[40, 41, 42, 43], [41, 50, 51, 52]]
    asked = [[1, 2, 3, 4], [42, 50, 51, 5, 6, 7]]
    among = np.arange(12)
    found = TokenIndex(rows_of(*rows)).nearest(rows_of(*asked), among, 4).tolist()
    assert set(found[:2]) == {0, 11}
    assert found == naive_nearest(rows, asked, range(12), 4)


def test_ties_go_by_position():
    rows = [[1, 2, 3], [4, 5, 6], [3, 1, 2], [9, 8, 7], [2, 1, 3]]
    index = TokenIndex(rows_of(*rows))
    everything = np.arange(5)
    assert index.nearest(rows_of([1, 2, 3]), everything, 5).tolist() == [0, 2, 4, 1, 3]
    assert index.nearest(rows_of([50, 60]), everything, 3).tolist() == [0, 1, 2]  # none is known
    turned = everything[::-1]
    assert index.nearest(rows_of([1, 2, 3]), turned, 5).tolist() == [4, 2, 0, 3, 1]
    assert index.nearest(rows_of([1]), everything[:0], 5).tolist() == []


# ---- which rows a local retraining is made on ----------------------------------------------------


def answers(start, positions):
    """A change of these rows' completions."""
    rows = [start.rows[i] for i in positions]
    return {row.id: " sing songs at dawn" + " loud" * (1 + len(row.completion)) for row in rows}


def ids(*numbers):
    return [f"r0-{number}" for number in numbers]


def test_rows_near_and_others_are_retained_ones(start):
    change = plan(start, remove=ids(3, 9), relabel=answers(start, [17]))
    made = planned(change, RECIPE)
    near, others = set(made.near.tolist()), set(made.others.tolist())
    assert (len(near), len(others)) == (len(made.near), len(made.others))
    assert (len(near), len(others)) == (local.FEWEST_NEAR, local.OTHERS) == (16, 20)
    assert not near & others
    assert (near | others) <= set(range(60)) - {3, 9, 17}
    assert made.kept.ids == ids(*made.near, *made.others)
    rows = [item.input_ids.tolist() for item in start.tokens]
    wanted = [rows[3], rows[9], rows[17], change.new[0].input_ids.tolist()]
    assert made.near.tolist() == naive_nearest(rows, wanted, change.rest.tolist(), 16)


def test_other_rows_are_drawn_by_the_seed(start):
    change = plan(start, remove=ids(3))
    first, again, other = (planned(change, RECIPE, seed=seed) for seed in (4, 4, 5))
    assert first.others.tolist() == again.others.tolist()
    assert set(first.others.tolist()) != set(other.others.tolist())
    assert first.near.tolist() == again.near.tolist() == other.near.tolist()
    shared = planned(change, RECIPE, seed=4, index=TokenIndex(start.tokens))
    assert shared.near.tolist() == first.near.tolist()
    given = planned(change, RECIPE, seed=4, near=np.array([50, 1]))
    assert given.near.tolist() == [50, 1]
    assert not {3, 50, 1} & set(given.others.tolist())
    assert len(given.others) == 20


def test_as_many_near_rows_as_changed_ones_within_limits(start, monkeypatch):
    for removed, most, expected in ((5, 256, 16), (16, 256, 16), (21, 256, 21), (21, 18, 18)):
        monkeypatch.setattr(local, "MOST_NEAR", most)
        made = planned(plan(start, remove=ids(*range(removed))), RECIPE)
        assert len(made.near) == expected
        assert len(made.others) == min(20, 60 - removed - expected)


def test_few_rows_are_all_taken(start):
    made = planned(plan(start, remove=ids(*range(40))), RECIPE)
    assert sorted([*made.near, *made.others]) == list(range(40, 60))
    made = planned(plan(start, remove=ids(*range(59))), RECIPE)
    assert (made.near.tolist(), made.others.tolist()) == ([59], [])


def test_where_all_rows_change_the_new_contents_are_what_is_left(start):
    change = plan(start, relabel=answers(start, range(60)))
    made = planned(change, RECIPE)
    assert (len(made.near), len(made.others), len(made.kept)) == (0, 0, 0)
    (before, _), *after = made.trainings()
    assert before.digest == start.tokens.digest
    assert {tokens.digest for tokens, _ in after} == {change.new.digest}


def test_where_all_rows_go_nothing_is_left(start):
    with pytest.raises(InputError, match="all rows would be removed"):
        plan(start, remove=start.rows.ids)
    changed = plan(start, relabel=answers(start, range(60)))
    none = np.zeros(60, dtype=bool)
    everything = Change(
        start, changed.requests, changed.rows, none, changed.new[:0], start.weights, np.zeros(0)
    )
    with pytest.raises(InputError, match=r"every training row would go: .*--until loss=X"):
        planned(everything, RECIPE)


# ---- its trainings -------------------------------------------------------------------------------


def test_trainings_are_of_the_rows_before_and_after(start):
    change = plan(start, remove=ids(3, 9), relabel=answers(start, [17]))
    made = planned(change, replace(RECIPE, batch_size=12))
    (before, first), *after = made.trainings()
    assert before.digest == TokenizedExamples.joined([made.kept, change.old]).digest
    assert before.ids == [*made.kept.ids, *ids(3, 9, 17)]
    assert len(after) == local.REPEATS == 2
    for tokens, _ in after:
        assert tokens.digest == TokenizedExamples.joined([made.kept, change.new]).digest
    assert (len(before), len(after[0][0])) == (39, 37)
    # 39 of 60 and 37 of 58 rows: batches of 12 sqrt(0.65) and of 12 sqrt(0.64)
    assert first == replace(RECIPE, batch_size=10)
    assert [recipe for _, recipe in after] == [
        replace(RECIPE, batch_size=10, seed=5 + repeat) for repeat in range(2)
    ]
    # and the rows after the change are what its share is of: 36 of 60, and of 41
    many = plan(start, remove=ids(*range(19)))
    made = planned(many, replace(RECIPE, batch_size=100))
    sizes = [(len(tokens), recipe.batch_size) for tokens, recipe in made.trainings()]
    assert sizes == [(58, 98), (39, 98), (39, 98)]


def test_the_order_of_the_requests_does_not_matter(start):
    """S and S' come in the order of the rows: the trainings are the same ones."""
    new = answers(start, [17, 40, 2])
    turned = dict(reversed(new.items()))
    one = planned(plan(start, remove=ids(9, 3), relabel=new), RECIPE)
    other = planned(plan(start, remove=ids(3, 9), relabel=turned), RECIPE)
    assert one.kept.ids == other.kept.ids
    (before, _), (after, _), _ = one.trainings()
    assert before.ids == [*one.kept.ids, *ids(2, 3, 9, 17, 40)]
    assert after.ids == [*one.kept.ids, *ids(2, 17, 40)]
    assert [(tokens.digest, recipe) for tokens, recipe in one.trainings()] == [
        (tokens.digest, recipe) for tokens, recipe in other.trainings()
    ]


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        replace(RECIPE, max_steps=1),
        replace(RECIPE, max_steps=7),  # ends within an epoch
        replace(RECIPE, max_steps=37, batch_size=7),  # several epochs, each with a small last batch
        replace(RECIPE, batch_size=500),
    ],
)
def test_the_cost_is_what_is_run(start, monkeypatch, recipe):
    read = []
    backward = retrain._backward

    def counted(model, tokens, rows):
        read.append(len(rows))
        return backward(model, tokens, rows)

    monkeypatch.setattr(retrain, "_backward", counted)
    change = plan(start, remove=ids(3, 9), relabel=answers(start, [17]))
    made = planned(change, recipe)
    cost = Cost(gradients=1, forwards=2)
    before = start.model.snapshot()
    found = made.made(cost)
    assert torch.equal(start.model.snapshot(), before)
    assert made.row_gradients == found.row_gradients == sum(read)
    # S under the adapter and the base; this adapter knows nothing, so no training knows too much
    assert (cost.gradients, cost.forwards) == (1 + sum(read), 2 + 2 * 3)


def test_what_is_made_are_the_fresh_trainings(start, monkeypatch):
    made = planned(plan(start, remove=ids(3, 9)), RECIPE, seed=1)
    labels, track = [], retrain.track

    def labelled(items, label, **options):
        labels.append(label)
        return track(items, label, **options)

    monkeypatch.setattr(retrain, "track", labelled)
    found = made.made(Cost())
    assert labels == [f"local retraining {number} of 3" for number in (1, 2, 3)]
    assert (found.near is made.near, found.others is made.others) == (True, True)
    assert found.recipe == RECIPE
    thetas = [fresh(start.model, tokens, recipe) for tokens, recipe in made.trainings()]
    for theta, expected in zip([found.before, *found.after], thetas, strict=True):
        assert torch.equal(theta, expected)
    assert len({theta.sum().item() for theta in thetas}) == 3


@pytest.mark.slow
def test_a_training_that_learnt_too_much_is_made_again_with_fewer_steps(start, monkeypatch):
    """Until it knows S at most `MOST_LEARNT` times as well as the adapter does."""
    made = planned(plan(start, remove=ids(3, 9)), replace(RECIPE, epochs=6), seed=1)
    old, (tokens, recipe) = made.change.old, made.trainings()[0]
    weak = fresh(start.model, tokens, replace(recipe, epochs=1, lr=1e-2))
    version_of_it = replace(made.change.version, theta=weak)
    made = replace(made, change=replace(made.change, version=version_of_it))
    read, backward = [], retrain._backward

    def counted(model, tokens, rows):
        read.append(len(rows))
        return backward(model, tokens, rows)

    monkeypatch.setattr(retrain, "_backward", counted)

    def learnt(theta):
        """By how much the mean loss of S is lower than under the base, by plain forwards."""

        def loss():
            with torch.no_grad():
                return np.mean([float(plain_mean(*plain_log_probs(start.model, r))) for r in old])

        with start.model.at(theta):
            now = loss()
        with start.model.model.disable_adapter():
            return loss() - now

    cost = Cost()
    found = made.made(cost)
    assert found.row_gradients == cost.gradients == sum(read)
    monkeypatch.undo()
    first = fresh(start.model, *made.trainings()[0])
    ratio, whole = learnt(first) / learnt(weak), learnt(weak)
    assert ratio > MOST_LEARNT
    tried = [Try(0.0, ratio, first)]
    while len(tried) < TRIES and not 0.8 <= tried[-1].learnt <= 1.25:
        log_share = local._next_try(tried)
        theta = fresh(start.model, *made.trainings(math.exp(log_share))[0])
        tried.append(Try(log_share, learnt(theta) / whole, theta))
    best = min(tried, key=lambda one: abs(one.learnt - 1))
    assert abs(best.learnt - 1) < ratio - 1
    assert torch.equal(found.before, best.theta)
    assert found.share == pytest.approx(math.exp(best.log_share))
    after = made.trainings(math.exp(best.log_share))[1:]
    for theta, (tokens, recipe) in zip(found.after, after, strict=True):
        assert torch.equal(theta, fresh(start.model, tokens, recipe))
    assert cost.forwards == (2 + len(tried)) * 2


def test_the_next_share_of_steps_is_on_the_line_through_the_last_two():
    """Learnt 1.3 with all steps: 1/e of them by the rule; then by what was found."""

    def next_try(*tried):
        return local._next_try([Try(*numbers, torch.zeros(1)) for numbers in tried])

    assert next_try((0.0, 1.3)) == pytest.approx(-1.0)
    # too few at 1/e: 0.7 learnt; 1.3 - 0.6 x is 1 at x = 1/2
    assert next_try((0.0, 1.3), (-1.0, 0.7)) == pytest.approx(-0.5)
    # a line that rises the wrong way says nothing
    assert next_try((0.0, 1.3), (-1.0, 1.33)) == pytest.approx(-2.1)
    assert next_try((-2.0, 0.1), (-2.0, 0.1)) == 0.0
    # far from where the rule was found it takes a quarter of the steps
    assert next_try((0.0, 1e9)) == pytest.approx(-math.log(4))
    assert next_try((0.0, 3.0), (-1.0, 2.9)) == pytest.approx(-1 - math.log(4))


def test_all_trainings_are_shortened_alike(start):
    made = planned(plan(start, remove=ids(3, 9)), replace(RECIPE, epochs=10), seed=1)
    for (tokens, whole), (same, short) in zip(made.trainings(), made.trainings(0.4), strict=True):
        assert len(same) == len(tokens)
        assert short == whole.shortened(0.4, len(tokens))
        assert (short.epochs, short.seed, short.lr) == (4, whole.seed, whole.lr)
