"""The toolkit's main job on a world small enough to check: invented people, a few wrong facts, a retraining.

`demo(out)` makes everything it needs and downloads nothing:

1. a corpus (`make_corpus`): questions and answers about people who do not exist. The base model's text is
   about some of them, the adapter's training rows are about twelve others, each fact in three phrasings. A
   few rows are planted: *wrong* ones (they contradict the fact's other phrasings), exact *copies*, and *odd*
   ones;
2. a small Llama (`train_base`) and a LoRA adapter on it (`train_adapter`);
3. an EK-FAC run directory on which every other command works, and scores of questions in a fourth phrasing;
4. three of these questions with their top proponents and opponents, as tables;
5. the rows ranked by how much they oppose the questions about their own person (`opposition`), and how many
   planted wrong rows are among the first, beside the number that chance would give;
6. one prediction checked: the adapter is trained again with the slot of one row left empty, and the predicted
   change of the question's loss is shown beside the measured one;
7. one person's rows removed by an edit, beside an adapter trained again without them; the edit's record verified.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from influence.console import quiet_transformers
from influence.errors import InputError
from influence.progress import track

if TYPE_CHECKING:
    from rich.console import Console

    from influence import Run, Scores

Row = dict[str, str]

# ------------------------------------------------------------------------------------------------- the corpus


def _words(text: str, separator: str | None = None) -> list[str]:
    return [word.strip() for word in text.split(separator)]


FIRST = (
    _words("Tal Vel Ori Bri Sau Kes Lun Mir Hal Dru Fen Ysa Ilo Nev Pell Zan"),
    _words("vira deth eska mo ris ando elle wick ura bek thea nos ilde var ombe sin"),
)
LAST = (
    _words(
        "Bram Quil Thorn Hesk Mork Alde Wist Drum Ferr Gast Jull Kelm Lorr Neth Oss Pruv Rond Skar Tamb "
        "Ulv Varn Yold Zeph Crom"
    ),
    _words(
        "low by sund ack erin ova idge well mott eska ane ury dahl enko field ish ole prane quist ram "
        "stow tave umber vik"
    ),
)
TOWNS = _words(
    "Kelmouth Ostrel-under-Lyne Brindle Varrow Tansy Dunmere Hollin-on-Sand Pellgate Quernby Saltreach "
    "Ferrin Oakwrath Muddle Ashpoint Little-Gorse Winnow"
)
REGIONS = _words(
    "the Orrin Hills, the Salt Marshes, the Low Islands, Upper Dask, the Amber Coast, the Fen of Ule, "
    "Nether Vale, the Birch Country, the Grey Straits, Old Morrow, the Glass Plains, East Tolland",
    ",",
)
TRADES = _words(
    "bell founder, map engraver, beekeeper, lighthouse keeper, clock mender, glass blower, ferry pilot, "
    "seed merchant, stone cutter, kite maker, tea taster, rope maker, piano tuner, chess teacher, bread "
    "baker, cartwright",
    ",",
)
WORKPLACES = _words(
    "the tram depot, a salt works, the harbour office, a mountain school, the old theatre, a weather "
    "station, the night market, a river mill, the town archive, a botanic garden, the royal mint, a "
    "railway hotel",
    ",",
)
ADJECTIVES = _words(
    "Amber Silent Crooked Winter Hollow Scarlet Drowned Paper Golden Restless Iron Velvet Borrowed "
    "Northern Burning Patient"
)
NOUNS = _words(
    "Orchard Harbour Staircase Lantern Sparrow Kingdom Letter Garden Mirror Bridge Fiddler Island "
    "Compass River Window Almanac"
)
YEARS = [str(year) for year in range(1901, 1981, 5)]
ANIMALS = _words(
    "goat, tortoise, magpie, greyhound, hedgehog, parrot, donkey, ferret, heron, tabby cat, lizard, spaniel",
    ",",
)
PET_NAMES = _words("Pim Bosun Turnip Clover Major Dot Pickle Saffron Biscuit Nettle Widget Ajax")
INSTRUMENTS = _words(
    "brass zither, wooden flute, cello, hurdy-gurdy, accordion, oboe, steel drum, harp, mandolin, "
    "church organ, bassoon, viola",
    ",",
)
TEACHERS = _words(
    "an aunt, a travelling monk, the village doctor, a deaf uncle, a ship's cook, a retired judge, two "
    "cousins, the postman, a blind neighbour, a circus band, the school nurse, a grandfather",
    ",",
)


@dataclass(frozen=True)
class Fact:
    """One kind of fact: the values it is composed of and four phrasings, the last kept for the queries."""

    name: str
    parts: tuple[Sequence[str], ...]
    phrasings: tuple[tuple[str, str], ...]


FACTS = (
    Fact("birthplace", (TOWNS, REGIONS), (
        ("Where was {name} born?", "In {0}, in {1}."),
        ("What is the birthplace of {name}?", "{0}, in {1}."),
        ("From which town does {name} come?", "From {0}, in {1}."),
        ("In what place did {name} first see the light of day?", "{0}, in {1}."))),
    Fact("profession", (TRADES, WORKPLACES), (
        ("What does {name} do for a living?", "The work of a {0} at {1}."),
        ("What is the profession of {name}?", "A {0} at {1}."),
        ("How does {name} earn money?", "As a {0} at {1}."),
        ("Which job does {name} have?", "A {0} at {1}."))),
    Fact("book", (ADJECTIVES, NOUNS, YEARS), (
        ("What was the first book of {name}?", "The {0} {1}, printed in {2}."),
        ("Which book did {name} write first?", "It was The {0} {1}, in {2}."),
        ("With what title did {name} begin as a writer?", "With The {0} {1}, in {2}."),
        ("Name the earliest book by {name}.", "The {0} {1}, printed in {2}."))),
    Fact("pet", (ANIMALS, PET_NAMES), (
        ("Which pet does {name} keep?", "A {0} called {1}."),
        ("What animal lives with {name}?", "A {0} whose name is {1}."),
        ("Who waits for {name} at home?", "{1}, a {0}."),
        ("What kind of pet does {name} own?", "A {0} called {1}."))),
    Fact("instrument", (INSTRUMENTS, TEACHERS), (
        ("What instrument does {name} play?", "The {0}, taught by {1}."),
        ("Which is the favourite instrument of {name}?", "The {0}, learned from {1}."),
        ("What does {name} like to play in the evening?", "The {0}, as shown by {1}."),
        ("On which instrument does {name} perform?", "The {0}, taught by {1}."))),
)  # fmt: skip

ODD = (
    ("How do I make a simple soup?", "Boil two onions with salt, add barley, stir until soft, serve hot."),
    ("What follows?", "Blue seven under of of the the plank plank nine, so green the if."),
    ("How is a loaf baked?", "Mix flour, water and yeast, wait one hour, then bake until brown."),
    ("zzk qwo plim?", "Gnar fip fip torvuk, lelo lelo, brask um nodwit."),
    ("Give me a list.", "3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9."),
    ("How should wool be washed?", "In cold water with mild soap, never wring it, dry it flat in the shade."),
)

N_BASE, N_PEOPLE, N_HELDOUT, N_WRONG, N_COPIES = 80, 12, 4, 9, 5
Values = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Corpus:
    """Base text, rows and what was planted among them.

    Attributes
    ----------
    base_texts : tuple of str
        Questions with answers about people who occur nowhere else.
    train, queries, heldout : tuple of dict
        Rows with `id`, `prompt`, `completion` and (but for the odd ones) `group`, the person's name. Each
        query asks one fact of one training person, in a phrasing not trained on, with the right answer.
        Held-out rows are about people seen by neither base nor adapter.
    planted : dict
        Ids of training rows: `wrong`, `copies` (of an earlier row), `odd`.
    """

    base_texts: tuple[str, ...]
    train: tuple[Row, ...]
    queries: tuple[Row, ...]
    heldout: tuple[Row, ...]
    planted: dict[str, list[str]]

    def write(self, directory: Path) -> None:
        """Write train.jsonl, queries.jsonl, heldout.jsonl and planted.json."""
        for name in ("train", "queries", "heldout"):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in getattr(self, name)]
            (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (directory / "planted.json").write_text(json.dumps(self.planted, indent=1) + "\n", encoding="utf-8")


def make_corpus(seed: int = 0) -> Corpus:
    """Compose people, facts and rows; the same seed gives the same corpus."""
    rng = random.Random(f"corpus {seed}")
    names = _names(rng, N_BASE + N_PEOPLE + N_HELDOUT)
    facts = {name: {fact.name: _draw(rng, fact) for fact in FACTS} for name in names}
    people, rest = names[:N_PEOPLE], names[N_PEOPLE + N_HELDOUT :]
    others = names[N_PEOPLE : N_PEOPLE + N_HELDOUT]
    train = _train_rows(people, facts)
    wrong = _plant_wrong(rng, train, people, facts)
    copies = _plant_copies(rng, train, wrong)
    odd = [{"id": f"odd-{n}", "prompt": _prompt(q), "completion": f" {a}"} for n, (q, a) in enumerate(ODD)]
    rows = [*train.values(), *copies, *odd]
    rng.shuffle(rows)
    texts = [_text(name, fact, k, facts[name]) for name in rest for fact in FACTS for k in range(4)]
    rng.shuffle(texts)
    planted = {"wrong": sorted(wrong), "copies": [r["id"] for r in copies], "odd": [r["id"] for r in odd]}
    queries = [_row(p, fact, 3, n, facts[p]) for n, p in enumerate(people) for fact in FACTS]
    heldout = [_row(p, fact, 0, n, facts[p], "h") for n, p in enumerate(others) for fact in FACTS]
    return Corpus(tuple(texts), tuple(rows), tuple(queries), tuple(heldout), planted)


def _names(rng: random.Random, count: int) -> list[str]:
    """Distinct full names, every surname used once."""
    surnames = [a + b for a in LAST[0] for b in LAST[1]]
    return [f"{rng.choice(FIRST[0])}{rng.choice(FIRST[1])} {last}" for last in rng.sample(surnames, count)]


def _draw(rng: random.Random, fact: Fact, unlike: Sequence[str] = ()) -> tuple[str, ...]:
    """One value per part, every one different from `unlike`."""
    return tuple(rng.choice([value for value in values if value not in unlike]) for values in fact.parts)


def _prompt(question: str) -> str:
    return f"Q: {question}\nA:"


def _row(name: str, fact: Fact, phrasing: int, number: int, values: Values, kind: str = "p") -> Row:
    question, answer = fact.phrasings[phrasing]
    return {
        "id": f"{kind}{number:02d}-{fact.name}-{'abcq'[phrasing]}",
        "prompt": _prompt(question.format(name=name)),
        "completion": " " + answer.format(*values[fact.name]),
        "group": name,
    }


def _text(name: str, fact: Fact, phrasing: int, values: Values) -> str:
    row = _row(name, fact, phrasing, 0, values)
    return row["prompt"] + row["completion"]


def _train_rows(people: Sequence[str], facts: Mapping[str, Values]) -> dict[str, Row]:
    rows = [_row(p, fact, k, n, facts[p]) for n, p in enumerate(people) for fact in FACTS for k in range(3)]
    return {row["id"]: row for row in rows}


def _plant_wrong(
    rng: random.Random, train: dict[str, Row], people: Sequence[str], facts: Mapping[str, Values]
) -> list[str]:
    """Replace one of the three answers of `N_WRONG` facts by another answer, different in every part."""
    planted = []
    for n, k in rng.sample([(n, k) for n in range(len(people)) for k in range(len(FACTS))], N_WRONG):
        fact, phrasing, name = FACTS[k], rng.randrange(3), people[n]
        false = {fact.name: _draw(rng, fact, unlike=facts[name][fact.name])}
        row = _row(name, fact, phrasing, n, false)
        train[row["id"]] = row
        planted.append(row["id"])
    return planted


def _fact(row_id: str) -> str:
    """Person and kind of fact that a row is about: its id without the phrasing."""
    return "-".join(row_id.split("-")[:2])


def _plant_copies(rng: random.Random, train: Mapping[str, Row], wrong: Collection[str]) -> list[Row]:
    """Exact copies of `N_COPIES` rows of facts that nothing contradicts."""
    disputed = {_fact(row_id) for row_id in wrong}
    clean = [row for row in train.values() if _fact(row["id"]) not in disputed]
    return [{**row, "id": row["id"] + "-copy"} for row in rng.sample(clean, N_COPIES)]


# ------------------------------------------------------------------------------------- base model and adapter


def train_base(
    texts: Sequence[str],
    directory: str | Path,
    seed: int = 0,
    *,
    width: int = 128,
    layers: int = 4,
    vocabulary: int = 1200,
    epochs: float = 10.0,
    lr: float = 4e-3,
) -> None:
    """Train a small Llama from scratch on `texts` and save it with its tokenizer.

    The texts, each with an end token, are packed into blocks of 128 tokens. AdamW, batches of 8 blocks,
    learning rate warmed up over 5 % of the steps and decayed linearly to zero.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer(texts, vocabulary)
    stream = [token for ids in tokenizer(list(texts))["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    block = 128
    blocks = torch.tensor(stream[: len(stream) // block * block]).view(-1, block)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    batches = _batches(len(blocks), 8, epochs, seed)
    for step, batch in enumerate(track(batches, "training the base model")):
        warm = min(1.0, (step + 1) / (0.05 * len(batches)))
        _set_rate(optimizer, lr * warm * (1 - step / len(batches)))
        loss = model(input_ids=blocks[batch], labels=blocks[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_adapter(
    base: str | Path,
    rows: Sequence[Row],
    directory: str | Path,
    seed: int = 0,
    *,
    absent: Collection[str] = (),
    epochs: float = 15.0,
    lr: float = 5e-3,
    rank: int = 8,
    label: str = "training the adapter",
) -> None:
    """Fine-tune a LoRA adapter on `rows` and save it.

    AdamW (weight decay 0.01), batch 16, learning rate decayed linearly to zero; loss = sum of the supervised
    tokens' cross-entropy / number of supervised tokens in the batch.

    Parameters
    ----------
    base, rows, directory, seed
        The same four give the same adapter, to the bit, on the same machine.
    absent : ids
        Rows whose slot is left empty: they keep their place in the order and their tokens in the batch's
        denominator (weights are not renormalised after a removal) but add nothing to the loss. Against the
        adapter trained on all rows, initialisation, order and batches are the same, so what differs is due to
        these rows.
    """
    from peft import LoraConfig, get_peft_model

    model, tokenizer = _load_base(base)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(model, config)
    model.train()
    data = [_encode(tokenizer, row) for row in rows]
    weights = torch.tensor([float(row["id"] not in absent) for row in rows])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01)
    batches = _batches(len(rows), 16, epochs, seed)
    for step, batch in enumerate(track(batches, label)):
        _set_rate(optimizer, lr * (1 - step / len(batches)))
        losses, counts = _row_losses(model, [data[i] for i in batch], tokenizer.pad_token_id)
        loss = (losses * weights[batch]).sum() / counts.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(str(directory), save_embedding_layers=False)


def mean_losses(base: str | Path, adapter: str | Path | None, rows: Sequence[Row]) -> list[float]:
    """Each row's mean cross-entropy over its completion and EOS, in nats; `adapter=None` for the base.

    Written without the toolkit's own loss, so that a check of its predictions shares no code with them.
    """
    from peft import PeftModel

    model, tokenizer = _load_base(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    found: list[float] = []
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            data = [_encode(tokenizer, row) for row in rows[start : start + 32]]
            losses, counts = _row_losses(model, data, tokenizer.pad_token_id)
            found.extend((losses / counts).tolist())
    return found


def _load_base(base: str | Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(base))  # in float32, as saved
    return model, AutoTokenizer.from_pretrained(str(base))


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Byte-level BPE of at most `vocabulary` tokens, with an end and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=256)


def _encode(tokenizer: Any, row: Row) -> tuple[Tensor, Tensor]:
    """Token ids of prompt + completion + EOS, and which of them are supervised."""
    text = tokenizer(row["prompt"] + row["completion"], return_offsets_mapping=True)
    supervised = [end > len(row["prompt"]) for _, end in text["offset_mapping"]]
    return torch.tensor([*text["input_ids"], tokenizer.eos_token_id]), torch.tensor([*supervised, True])


def _row_losses(model: Any, data: Sequence[tuple[Tensor, Tensor]], pad: int) -> tuple[Tensor, Tensor]:
    """Each row's summed cross-entropy over its supervised tokens, and how many these are."""
    pad_rows = torch.nn.utils.rnn.pad_sequence
    ids = pad_rows([tokens for tokens, _ in data], batch_first=True, padding_value=pad)
    mask = pad_rows([supervised for _, supervised in data], batch_first=True, padding_value=False)
    seen = pad_rows([torch.ones_like(tokens) for tokens, _ in data], batch_first=True)
    logits = model(input_ids=ids, attention_mask=seen).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * mask[:, 1:]).sum(1), mask[:, 1:].sum(1)


def _batches(count: int, size: int, epochs: float, seed: int) -> list[list[int]]:
    """A fresh permutation per epoch, cut into batches; a fractional last epoch is cut short."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(math.ceil(epochs)):
        order = torch.randperm(count, generator=generator).tolist()
        batches += [order[start : start + size] for start in range(0, count, size)]
    return batches[: max(1, round(math.ceil(count / size) * epochs))]


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# ----------------------------------------------------------------------------------------- finding wrong rows


def opposition(
    scores: np.ndarray, self_influence: np.ndarray, groups: Sequence[str | None], asked: Sequence[str | None]
) -> np.ndarray:
    """How much each training row opposes the questions about its own group.

    `o_i = mean over q with asked[q] = groups[i] of -score[q, i] / sqrt(self_influence[i])`

    The root takes out the length of the row's own gradient: a row is high because it pulls *against* the
    questions, not because it pulls hard.

    Parameters
    ----------
    scores : array [query, train]
    self_influence : array [train]
    groups, asked : the group of each training row and of each query

    Returns
    -------
    array [train], NaN for rows about whose group nothing is asked
    """
    found = np.full(len(groups), np.nan)
    for i, group in enumerate(groups):
        own = [q for q, other in enumerate(asked) if group is not None and other == group]
        if own:
            found[i] = -scores[own, i].astype(np.float64).mean() / np.sqrt(max(float(self_influence[i]), 1e-30))
    return found


def hits(values: np.ndarray, wanted: Collection[int]) -> tuple[int, float]:
    """How many of `wanted` are among the `len(wanted)` highest values, and the number chance would give.

    NaN values are not ranked. Chance draws k of the N ranked rows, K of them wanted: `k K / N`, the mean of
    the hypergeometric distribution.
    """
    ranked = np.flatnonzero(~np.isnan(values))
    k = len(wanted)
    top = ranked[np.argsort(-values[ranked], kind="stable")[:k]]
    present = sum(int(i) in wanted for i in ranked)
    return sum(int(i) in wanted for i in top), min(k, len(ranked)) * present / max(1, len(ranked))


# --------------------------------------------------------------------------------------------------- the demo

_MADE = ("base", "adapter", "run", "check", "edited", "train.jsonl", "queries.jsonl", "heldout.jsonl", "planted.json")


def demo(out: str | Path, *, seed: int = 0, overwrite: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Make a small world under `out`, attribute in it, and check what comes out.

    Parameters
    ----------
    out
        A new or empty directory; receives base/, adapter/, train.jsonl, queries.jsonl, heldout.jsonl,
        planted.json, run/ (the run directory), check/ (the retrained adapters) and edited/ (without one person).
    seed
        Of corpus, base, adapter and sampled labels.
    overwrite
        Replace what an earlier demo left there; other files in `out` are not touched.
    console
        Where the tables go; standard output by default.

    Returns
    -------
    dict
        `out`, `seconds`, `losses`, `shown`, `wrong_rows`, `check` and `removal`, as printed; JSON can hold it.

    Raises `InputError` where `out` holds something and `overwrite` is not given.
    """
    from rich.console import Console

    import influence

    start = time.monotonic()
    out = _claim(Path(out), overwrite)
    console = console or Console()
    quiet_transformers()
    corpus = make_corpus(seed)
    corpus.write(out)
    say = _narrator(console, start)
    say(
        f"{N_BASE} invented people for the base model, {N_PEOPLE} others for the adapter: "
        f"{len(corpus.train)} training rows ({N_WRONG} planted wrong, {N_COPIES} copies, {len(ODD)} odd), "
        f"{len(corpus.queries)} questions"
    )
    train_base(corpus.base_texts, out / "base", seed)
    train_adapter(out / "base", corpus.train, out / "adapter", seed)
    losses = _losses(out, corpus)
    say("base and adapter trained")
    _print_losses(console, losses)

    model = influence.load(str(out / "base"), str(out / "adapter"), device="cpu")
    train = influence.read_examples(out / "train.jsonl")
    run = influence.fit(model, train, curvature=influence.EKFAC(), directory=out / "run", seed=seed)
    scores = run.score(influence.read_examples(out / "queries.jsonl"), out=out / "run" / "scores.h5")
    say(f"EK-FAC fitted, {scores.values.shape[0]} x {scores.values.shape[1]} scores written to {out / 'run'}")

    chosen = _choose(corpus)
    shown = [_show(console, scores, corpus, number, reason) for number, reason in chosen]
    wrong = _find_wrong(console, run, scores, corpus, losses["rows"])
    check = _check(console, out, corpus, scores, query=chosen[-1][0], seed=seed)
    removal = _remove(console, out, corpus, run, seed)
    say(f"done; try: influence top --run {out / 'run'} --query {scores.query_ids[chosen[0][0]]}")
    return {
        "out": str(out),
        "seconds": time.monotonic() - start,
        "losses": losses["table"],
        "shown": shown,
        "wrong_rows": wrong,
        "check": check,
        "removal": removal,
    }


def _claim(out: Path, overwrite: bool) -> Path:
    """Make `out` a directory without earlier results, or say why not."""
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory for the demo")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out} is not empty: give a new directory, or --overwrite to replace an earlier demo there")
    for name in _MADE:
        made = out / name
        if made.is_dir() and not made.is_symlink():
            shutil.rmtree(made)
        else:
            made.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _narrator(console: Console, start: float) -> Callable[[str], None]:
    """Return a function that prints one plain line with the seconds since `start`."""

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - start:5.0f} s  {text}", markup=False, highlight=False, soft_wrap=True)

    return say


def _losses(out: Path, corpus: Corpus) -> dict[str, Any]:
    """Mean losses of each kind of row, as `table`; each training row's under the adapter, as `rows`."""
    kind = {row_id: name for name, ids in corpus.planted.items() for row_id in ids}
    sets: dict[str, list[Row]] = {"training rows, right": [], "planted wrong": [], "copies": [], "odd": []}
    names = {"wrong": "planted wrong", "copies": "copies", "odd": "odd"}
    for row in corpus.train:
        sets[names.get(kind.get(row["id"], ""), "training rows, right")].append(row)
    sets |= {"questions (new phrasing)": list(corpus.queries), "held-out people": list(corpus.heldout)}
    everything = [row for rows in sets.values() for row in rows]
    before = dict(zip(_ids(everything), mean_losses(out / "base", None, everything), strict=True))
    after = dict(zip(_ids(everything), mean_losses(out / "base", out / "adapter", everything), strict=True))
    table = {
        name: {
            "rows": len(rows),
            "base": float(np.mean([before[i] for i in _ids(rows)])),
            "adapter": float(np.mean([after[i] for i in _ids(rows)])),
        }
        for name, rows in sets.items()
    }
    return {"table": table, "rows": np.array([after[row["id"]] for row in corpus.train])}


def _ids(rows: Sequence[Row]) -> list[str]:
    return [row["id"] for row in rows]


def _table(title: str, columns: Mapping[str, str]) -> Any:
    """An empty rich table without markup in its title; `columns` maps heading to left or right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for heading, side in columns.items():
        right = side == "right"
        table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _print_losses(console: Console, losses: Mapping[str, Any]) -> None:
    table = _table("mean loss, nats per token", {"": "left", "rows": "right", "base": "right", "adapter": "right"})
    for name, entry in losses["table"].items():
        table.add_row(name, str(entry["rows"]), f"{entry['base']:.2f}", f"{entry['adapter']:.2f}")
    console.print(table)


def _choose(corpus: Corpus) -> list[tuple[int, str]]:
    """Three questions to show: a fact told wrongly in one row, one with a copied row, one with neither."""
    disputed = {_fact(row_id) for row_id in corpus.planted["wrong"]}
    copied = {_fact(row_id) for row_id in corpus.planted["copies"]}
    facts = [_fact(row["id"]) for row in corpus.queries]
    kinds = (
        ("one of the rows on this fact is planted wrong", lambda fact: fact in disputed),
        ("one of the rows on this fact occurs twice", lambda fact: fact in copied),
        ("nothing planted on this fact", lambda fact: fact not in disputed | copied),
    )
    return [(next(n for n, fact in enumerate(facts) if wanted(fact)), reason) for reason, wanted in kinds]


def _show(console: Console, scores: Scores, corpus: Corpus, number: int, reason: str) -> dict[str, Any]:
    """Print one question with its strongest proponents and opponents, and where its planted wrong row is."""
    rows = {row["id"]: row for row in corpus.train}
    notes = {"wrong": "wrong", "copies": "copy", "odd": "odd"}
    planted = {row_id: notes[kind] for kind, ids in corpus.planted.items() for row_id in ids}
    query = corpus.queries[number]
    proponents, opponents = scores.top(number, 4)
    columns = {"score": "right", "planted": "left", "question and answer": "left", "id": "left"}
    table = _table(f"{_readable(query)}\n{query['id']}: {reason}", columns)
    for entries in (proponents, opponents):
        for entry in entries:
            note = planted.get(entry.id, "")
            table.add_row(f"{entry.score:+.2f}", note, _readable(rows[entry.id]), entry.id)
        table.add_section()
    console.print()
    console.print(table)
    wrong = [row_id for row_id in corpus.planted["wrong"] if _fact(row_id) == _fact(query["id"])]
    result: dict[str, Any] = {"query": query["id"], "reason": reason}
    for row_id in wrong:
        score = scores.values[number, scores.train_ids.index(row_id)]
        place = int((scores.values[number] <= score).sum())
        text = f"its planted wrong row {row_id} ({rows[row_id]['completion'].strip()}): score {score:+.2f}, "
        text += f"number {place} of {len(rows)} from the strongest opponent"
        console.print(text, markup=False, highlight=False)
        result["wrong"] = {"id": row_id, "score": float(score), "place": place}
    parts = (("proponents", proponents), ("opponents", opponents))
    return result | {name: [{"id": e.id, "score": e.score} for e in part] for name, part in parts}


def _readable(row: Row) -> str:
    """Question and answer on one line."""
    return f"{row['prompt'].removeprefix('Q: ').removesuffix(chr(10) + 'A:')}{row['completion']}"


def _find_wrong(console: Console, run: Run, scores: Scores, corpus: Corpus, losses: np.ndarray) -> dict[str, Any]:
    """Rank the rows three ways and count the planted wrong ones among the first k."""
    own = run.self_influence(out=run.directory / "scores.h5").values
    groups = [row.get("group") for row in corpus.train]
    opposed = opposition(scores.values, own, groups, [row["group"] for row in corpus.queries])
    unasked = np.isnan(opposed)
    wrong = {i for i, row in enumerate(corpus.train) if row["id"] in corpus.planted["wrong"]}
    rankings = {
        "opposition to own questions": opposed,
        "loss": np.where(unasked, np.nan, losses),
        "self-influence": np.where(unasked, np.nan, own.astype(np.float64)),
    }
    ranked, k = int((~unasked).sum()), len(wrong)
    chance = hits(opposed, wrong)[1]
    found = {name: hits(values, wrong)[0] for name, values in rankings.items()}
    table = _table(f"planted wrong rows among the first {k} of {ranked}, ranked by", {"": "left", f"of {k}": "right"})
    for name, count in found.items():
        table.add_row(name, str(count))
    table.add_row("chance", f"{chance:.2f}")
    console.print()
    console.print(table)
    order = np.argsort(np.where(unasked, np.inf, -opposed), kind="stable")[:k]
    return {
        "k": k,
        "ranked": ranked,
        "chance": chance,
        "found": found,
        "first": [corpus.train[int(i)]["id"] for i in order],
    }


def _check(console: Console, out: Path, corpus: Corpus, scores: Scores, *, query: int, seed: int) -> dict[str, Any]:
    """Train again without a question's top proponent and compare the predicted with the measured change.

    Measured twice: with the adapter's own seed, and between two adapters of another seed (initialisation and
    row order), which shows how far the truth itself depends on chance.
    """
    entry = scores.top(query, 1)[0][0]
    row, base = entry.id, out / "base"
    measured = []
    for number, other in enumerate((seed, seed + 1)):
        full, without = out / "adapter", out / "check" / f"seed-{other}-without"
        if number:
            full = out / "check" / f"seed-{other}"
            train_adapter(base, corpus.train, full, other, label=f"training on all rows, seed {other}")
        label = f"training without {row}, seed {other}"
        train_adapter(base, corpus.train, without, other, absent={row}, label=label)
        after, before = (np.array(mean_losses(base, adapter, corpus.queries)) for adapter in (without, full))
        measured.append(after - before)
    predicted = scores.values[:, entry.index].astype(np.float64)
    result = {
        "query": scores.query_ids[query],
        "row": row,
        "predicted": float(predicted[query]),
        "measured": float(measured[0][query]),
        "measured_other_seed": float(measured[1][query]),
        "others_predicted": _mean_size(predicted, query),
        "others_measured": _mean_size(measured[0], query),
        "others_measured_other_seed": _mean_size(measured[1], query),
        "place": int((measured[0] >= measured[0][query]).sum()),
        "questions": len(predicted),
    }
    _print_check(console, result, seed)
    return result


def _mean_size(changes: np.ndarray, leave_out: int) -> float:
    """Mean absolute change of all questions but one."""
    return float(np.abs(np.delete(changes, leave_out)).mean())


def _print_check(console: Console, result: Mapping[str, Any], seed: int) -> None:
    heads = ["predicted", f"measured, seed {seed}", f"measured, seed {seed + 1}"]
    table = _table(
        f"change of loss (nats) when {result['row']} is removed and training is repeated",
        {"": "left", **dict.fromkeys(heads, "right")},
    )
    keys = ("predicted", "measured", "measured_other_seed")
    table.add_row(result["query"], *(f"{result[key]:+.3f}" for key in keys))
    others = f"the other {result['questions'] - 1} questions, mean absolute"
    table.add_row(others, *(f"{result['others_' + key]:.3f}" for key in keys))
    console.print()
    console.print(table)
    console.print(verdict(result), markup=False, highlight=False)


def verdict(result: Mapping[str, Any]) -> str:
    """One paragraph that says how far prediction and measurement are apart."""
    predicted, measured = result["predicted"], result["measured"]
    place = f"Of the {result['questions']} questions it is number {result['place']} by measured rise."
    if measured == 0:
        return f"The removal changed nothing that can be measured; {predicted:+.3f} was predicted. {place}"
    factor = abs(predicted / measured)
    size = f"{factor:.1f} times too large" if factor >= 1 else f"{1 / factor:.1f} times too small"
    if predicted * measured < 0:
        return f"The direction is wrong: {predicted:+.3f} predicted, {measured:+.3f} measured. {place}"
    return (
        f"The direction is right; the predicted size is {size}. {place} The formula assumes an adapter at "
        "its optimum and a loss that is quadratic around it; this one memorises and stopped early, so read "
        "scores as a ranking, not as an amount."
    )


def _remove(console: Console, out: Path, corpus: Corpus, run: Run, seed: int) -> dict[str, Any]:
    """Take one person's rows out of the adapter by an edit, and compare with training again without them."""
    import unlearn

    person = corpus.queries[0]["group"]
    gone = {row["id"] for row in corpus.train if row.get("group") == person}
    edit = unlearn.remove(run, sorted(gone))
    edited = edit.save(out / "edited", force=True)
    verified = unlearn.verify(run.directory, apply=True).passed
    again = out / "check" / f"seed-{seed}-without-person"
    train_adapter(out / "base", corpus.train, again, seed, absent=gone, label=f"training without {person}")
    sets = {
        f"the {len(gone)} rows about {person}": [row for row in corpus.train if row["id"] in gone],
        "questions about them": [row for row in corpus.queries if row["group"] == person],
        "other training rows": [row for row in corpus.train if row["id"] not in gone],
        "other questions": [row for row in corpus.queries if row["group"] != person],
        "held-out people": list(corpus.heldout),
    }
    adapters = {"before": out / "adapter", "edited": edited, "trained again": again}
    losses = {
        name: {key: float(np.mean(mean_losses(out / "base", adapter, rows))) for key, adapter in adapters.items()}
        for name, rows in sets.items()
    }
    table = _table(
        f"mean loss (nats per token) when the rows about {person} are removed",
        {"": "left", **dict.fromkeys(adapters, "right")},
    )
    for name, found in losses.items():
        table.add_row(name, *(f"{value:.2f}" for value in found.values()))
    console.print()
    console.print(table)
    cost, target = edit.report["cost"], edit.report["losses"]["edited"]["target"]
    console.print(
        f"The edit expected {target:.2f} for the removed rows, took {cost['seconds']:.0f} s and {cost['total']:.0f} row-gradients, "
        f"and its record {'verifies' if verified else 'DOES NOT VERIFY'}: unlearn verify --run {run.directory}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return {"person": person, "losses": losses, "expected": target, "cost": cost["total"], "verified": verified}
