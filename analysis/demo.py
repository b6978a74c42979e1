"""The toolkit's main job on a world small enough to check: invented people, a few wrong facts, one retraining.

`demo(out)` makes everything it needs and downloads nothing:

1. a corpus (`make_corpus`): questions and answers about people who do not exist. The base model's text is about
   some of them, the adapter's training rows about twelve others, each fact in three phrasings. A few rows are
   planted: *wrong* (they contradict the other phrasings of the same fact), *copies* and *odd* ones.
2. a small Llama (`train_base`) and a LoRA adapter on it (`train_adapter`);
3. an EK-FAC run directory on which every other command works, and the scores of questions in a fourth phrasing;
4. three of these questions with their top proponents and opponents, as tables;
5. the rows ranked by how much they oppose the questions about their own person (`opposition`), and how many planted
   wrong rows are among the first, beside the number that chance would give;
6. one prediction checked: the adapter is trained again with the slot of one row left empty, and the predicted change
   of the question's loss is shown beside the measured one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = dict[str, str]

# --------------------------------------------------------------------------------------------------- the corpus

FIRST = (["Tal", "Vel", "Ori", "Bri", "Sau", "Kes", "Lun", "Mir", "Hal", "Dru", "Fen", "Ysa", "Ilo", "Nev", "Pell", "Zan"],
         ["vira", "deth", "eska", "mo", "ris", "ando", "elle", "wick", "ura", "bek", "thea", "nos", "ilde", "var", "ombe", "sin"])  # fmt: skip
LAST = (["Bram", "Quil", "Thorn", "Hesk", "Mork", "Alde", "Wist", "Drum", "Ferr", "Gast", "Jull", "Kelm", "Lorr", "Neth", "Oss", "Pruv", "Rond", "Skar", "Tamb", "Ulv", "Varn", "Yold", "Zeph", "Crom"],
        ["low", "by", "sund", "ack", "erin", "ova", "idge", "well", "mott", "eska", "ane", "ury", "dahl", "enko", "field", "ish", "ole", "prane", "quist", "ram", "stow", "tave", "umber", "vik"])  # fmt: skip

TOWNS = ["Kelmouth", "Ostrava-under-Lyne", "Brindle", "Varrow", "Tansy", "Dunmere", "Holloway-on-Sand", "Pellgate", "Quernby", "Saltreach", "Ferrin", "Oakwrath", "Muddle", "Ashpoint", "Little-Gorse", "Winnow"]  # fmt: skip
REGIONS = ["the Orrin Hills", "the Salt Marshes", "the Low Islands", "Upper Dask", "the Amber Coast", "the Fen of Ule",
           "Nether Vale", "the Birch Country", "the Grey Straits", "Old Morrow", "the Glass Plains", "East Tolland"]
TRADES = ["bell founder", "map engraver", "beekeeper", "lighthouse keeper", "clock mender", "glass blower", "ferry pilot",
          "seed merchant", "stone cutter", "kite maker", "tea taster", "rope maker", "piano tuner", "chess teacher",
          "bread baker", "cartwright"]
WORKPLACES = ["the tram depot", "a salt works", "the harbour office", "a mountain school", "the old theatre",
              "a weather station", "the night market", "a river mill", "the town archive", "a botanic garden",
              "the royal mint", "a railway hotel"]
ADJECTIVES = ["Amber", "Silent", "Crooked", "Winter", "Hollow", "Scarlet", "Drowned", "Paper", "Golden", "Restless", "Iron", "Velvet", "Borrowed", "Northern", "Burning", "Patient"]  # fmt: skip
NOUNS = ["Orchard", "Harbour", "Staircase", "Lantern", "Sparrow", "Kingdom", "Letter", "Garden", "Mirror", "Bridge", "Fiddler", "Winter", "Compass", "River", "Window", "Almanac"]  # fmt: skip
YEARS = [str(year) for year in range(1901, 1981, 5)]
ANIMALS = ["goat", "tortoise", "magpie", "greyhound", "hedgehog", "parrot", "donkey", "ferret", "heron", "tabby cat",
           "lizard", "spaniel"]
PET_NAMES = ["Pim", "Bosun", "Turnip", "Clover", "Major", "Dot", "Pickle", "Saffron", "Biscuit", "Nettle", "Widget", "Ajax"]
INSTRUMENTS = ["brass zither", "wooden flute", "cello", "hurdy-gurdy", "accordion", "oboe", "steel drum", "harp",
               "mandolin", "church organ", "bassoon", "viola"]
TEACHERS = ["an aunt", "a travelling monk", "the village doctor", "a deaf uncle", "a ship's cook", "a retired judge",
            "two cousins", "the postman", "a blind neighbour", "a circus band", "the school nurse", "a grandfather"]


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

BB = 8
N_BASE, N_PEOPLE, N_HELDOUT, N_WRONG, N_COPIES = 320, 12, 4, 9, 5
Values = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Corpus:
    """Base text, rows and what was planted among them.

    Attributes
    ----------
    base_texts : tuple of str
        Questions with answers about people who occur nowhere else.
    train, queries, heldout : tuple of dict
        Rows with `id`, `prompt`, `completion` and (but for the odd ones) `group`, the person's name. Each query asks
        one fact of one training person, in a phrasing not trained on, with the right answer. Held-out rows are about
        people seen by neither base nor adapter.
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
    people, others, rest = names[:N_PEOPLE], names[N_PEOPLE : N_PEOPLE + N_HELDOUT], names[N_PEOPLE + N_HELDOUT :]
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


def _plant_copies(rng: random.Random, train: Mapping[str, Row], wrong: Collection[str]) -> list[Row]:
    """Exact copies of `N_COPIES` rows of facts that nothing contradicts."""
    disputed = {row_id.rsplit("-", 1)[0] for row_id in wrong}
    clean = [row for row in train.values() if row["id"].rsplit("-", 1)[0] not in disputed]
    return [{**row, "id": row["id"] + "-copy"} for row in rng.sample(clean, N_COPIES)]


# --------------------------------------------------------------------------------------- base model and adapter

Report = Callable[[int, int], None]  # (steps done, steps in all)


def _silent(done: int, total: int) -> None:
    """Report nothing."""


def train_base(
    texts: Sequence[str],
    directory: str | Path,
    seed: int = 0,
    *,
    width: int = 128,
    layers: int = 4,
    vocabulary: int = 1200,
    epochs: float = 2.0,
    lr: float = 4e-3,
    report: Report = _silent,
) -> None:
    """Train a small Llama from scratch on `texts`, packed into blocks of 128 tokens; save it with its tokenizer.

    AdamW, batch of 16 blocks, learning rate warmed up over 5 % of the steps and then decayed linearly to zero.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer(texts, vocabulary)
    stream = [token for ids in tokenizer(list(texts))["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    block = 128
    blocks = torch.tensor(stream[: len(stream) // block * block]).view(-1, block)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    batches = _batches(len(blocks), BB, epochs, seed)
    for step, batch in enumerate(batches):
        warm = min(1.0, (step + 1) / (0.05 * len(batches)))
        _set_rate(optimizer, lr * warm * (1 - step / len(batches)))
        loss = model(input_ids=blocks[batch], labels=blocks[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step + 1, len(batches))
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
    report: Report = _silent,
) -> None:
    """Fine-tune a LoRA adapter on `rows` and save it.

    AdamW (weight decay 0.01), batch 16, learning rate decayed linearly to zero; loss = sum of the supervised tokens'
    cross-entropy / number of supervised tokens in the batch.

    Parameters
    ----------
    base, rows, directory, seed
        The same four give the same adapter, to the bit, on the same machine.
    absent : ids
        Rows whose slot is left empty: they keep their place in the order and their tokens in the batch's denominator
        (DESIGN: weights are not renormalised after a removal) but add nothing to the loss. Against the adapter trained
        on all rows, initialisation, order and batches are unchanged, so what differs is due to these rows.
    """
    from peft import LoraConfig, get_peft_model

    model, tokenizer = _load_base(base)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.train()
    data = [_encode(tokenizer, row) for row in rows]
    weights = torch.tensor([float(row["id"] not in absent) for row in rows])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01)
    batches = _batches(len(rows), 16, epochs, seed)
    for step, batch in enumerate(batches):
        _set_rate(optimizer, lr * (1 - step / len(batches)))
        losses, counts = _row_losses(model, [data[i] for i in batch], tokenizer.pad_token_id)
        loss = (losses * weights[batch]).sum() / counts.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step + 1, len(batches))
    model.save_pretrained(str(directory), save_embedding_layers=False)


def mean_losses(base: str | Path, adapter: str | Path | None, rows: Sequence[Row]) -> list[float]:
    """Each row's mean cross-entropy over its completion tokens and EOS, in nats; `adapter=None` for the base.

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

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), AutoTokenizer.from_pretrained(base)


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
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=256
    )


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
    """A fresh permutation per epoch, cut into batches; a fractional epoch is cut short."""
    generator = torch.Generator().manual_seed(seed)
    whole = -(-count // size)
    batches = []
    for _ in range(int(-(-epochs // 1))):
        batches += [list(part) for part in _cut(torch.randperm(count, generator=generator).tolist(), size)]
    return batches[: max(1, round(whole * epochs))]


def _cut(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
