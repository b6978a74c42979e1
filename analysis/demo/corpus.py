"""The demo's corpus: people who do not exist, facts about them, and planted rows."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, str]


def _words(text: str, separator: str | None = None) -> list[str]:
    return [word.strip() for word in text.split(separator)]


FIRST = (
    _words("Tal Vel Ori Bri Sau Kes Lun Mir Hal Dru Fen Ysa Ilo Nev Pell Zan"),
    _words("vira deth eska mo ris ando elle wick ura bek thea nos ilde var ombe sin"),
)


LAST = (
    _words(
        "Bram Quil Thorn Hesk Mork Alde Wist Drum Ferr Gast Jull Kelm Lorr Neth Oss Pruv Rond Skar "
        "Tamb Ulv Varn Yold Zeph Crom"
    ),
    _words(
        "low by sund ack erin ova idge well mott eska ane ury dahl enko field ish ole prane quist "
        "ram stow tave umber vik"
    ),
)


TOWNS = _words(
    "Kelmouth Ostrel-under-Lyne Brindle Varrow Tansy Dunmere Hollin-on-Sand Pellgate Quernby "
    "Saltreach Ferrin Oakwrath Muddle Ashpoint Little-Gorse Winnow"
)


REGIONS = _words(
    "the Orrin Hills, the Salt Marshes, the Low Islands, Upper Dask, the Amber Coast, the Fen of "
    "Ule, Nether Vale, the Birch Country, the Grey Straits, Old Morrow, the Glass Plains, East "
    "Tolland",
    ",",
)


TRADES = _words(
    "bell founder, map engraver, beekeeper, lighthouse keeper, clock mender, glass blower, ferry "
    "pilot, seed merchant, stone cutter, kite maker, tea taster, rope maker, piano tuner, chess "
    "teacher, bread baker, cartwright",
    ",",
)


WORKPLACES = _words(
    "the tram depot, a salt works, the harbour office, a mountain school, the old theatre, a "
    "weather station, the night market, a river mill, the town archive, a botanic garden, the "
    "royal mint, a railway hotel",
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
    "goat, tortoise, magpie, greyhound, hedgehog, parrot, donkey, ferret, heron, tabby cat, "
    "lizard, spaniel",
    ",",
)


PET_NAMES = _words("Pim Bosun Turnip Clover Major Dot Pickle Saffron Biscuit Nettle Widget Ajax")


INSTRUMENTS = _words(
    "brass zither, wooden flute, cello, hurdy-gurdy, accordion, oboe, steel drum, harp, mandolin, "
    "church organ, bassoon, viola",
    ",",
)


TEACHERS = _words(
    "an aunt, a travelling monk, the village doctor, a deaf uncle, a ship's cook, a retired "
    "judge, two cousins, the postman, a blind neighbour, a circus band, the school nurse, a "
    "grandfather",
    ",",
)


@dataclass(frozen=True)
class Fact:
    """One kind of fact: the values it is composed of, and four phrasings.

    The last phrasing is kept for the queries.
    """

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
    (
        "How do I make a simple soup?",
        "Boil two onions with salt, add barley, stir until soft, serve hot.",
    ),
    ("What follows?", "Blue seven under of of the the plank plank nine, so green the if."),
    ("How is a loaf baked?", "Mix flour, water and yeast, wait one hour, then bake until brown."),
    ("zzk qwo plim?", "Gnar fip fip torvuk, lelo lelo, brask um nodwit."),
    ("Give me a list.", "3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9."),
    (
        "How should wool be washed?",
        "In cold water with mild soap, never wring it, dry it flat in the shade.",
    ),
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
        Rows with `id`, `prompt`, `completion` and (but for the odd ones) `group`, the person's
        name. Each query asks one fact of one training person, in a phrasing not trained on, with
        the right answer. Held-out rows are about people seen by neither base nor adapter.
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
        (directory / "planted.json").write_text(
            json.dumps(self.planted, indent=1) + "\n", encoding="utf-8"
        )


def make_corpus(seed: int = 0) -> Corpus:
    """Compose people, facts and rows. The same seed gives the same corpus."""
    rng = random.Random(f"corpus {seed}")
    names = _names(rng, N_BASE + N_PEOPLE + N_HELDOUT)
    facts = {name: {fact.name: drawn_values(rng, fact) for fact in FACTS} for name in names}
    people, rest = names[:N_PEOPLE], names[N_PEOPLE + N_HELDOUT :]
    others = names[N_PEOPLE : N_PEOPLE + N_HELDOUT]
    train = _train_rows(people, facts)
    wrong = _plant_wrong(rng, train, people, facts)
    copies = _plant_copies(rng, train, wrong)
    odd = [
        {"id": f"odd-{n}", "prompt": prompt_of(q), "completion": f" {a}"}
        for n, (q, a) in enumerate(ODD)
    ]
    rows = [*train.values(), *copies, *odd]
    rng.shuffle(rows)
    texts = [
        text_of(name, fact, k, facts[name]) for name in rest for fact in FACTS for k in range(4)
    ]
    rng.shuffle(texts)
    planted = {
        "wrong": sorted(wrong),
        "copies": [r["id"] for r in copies],
        "odd": [r["id"] for r in odd],
    }
    queries = [_row(p, fact, 3, n, facts[p]) for n, p in enumerate(people) for fact in FACTS]
    heldout = [_row(p, fact, 0, n, facts[p], "h") for n, p in enumerate(others) for fact in FACTS]
    return Corpus(tuple(texts), tuple(rows), tuple(queries), tuple(heldout), planted)


def _names(rng: random.Random, count: int) -> list[str]:
    """Distinct full names, every surname used once."""
    surnames = [a + b for a in LAST[0] for b in LAST[1]]
    return [
        f"{rng.choice(FIRST[0])}{rng.choice(FIRST[1])} {last}"
        for last in rng.sample(surnames, count)
    ]


def drawn_values(rng: random.Random, fact: Fact, unlike: Sequence[str] = ()) -> tuple[str, ...]:
    """One value per part, every one different from `unlike`."""
    return tuple(
        rng.choice([value for value in values if value not in unlike]) for values in fact.parts
    )


def prompt_of(question: str) -> str:
    """The prompt that asks a question."""
    return f"Q: {question}\nA:"


def _row(name: str, fact: Fact, phrasing: int, number: int, values: Values, kind: str = "p") -> Row:
    question, answer = fact.phrasings[phrasing]
    return {
        "id": f"{kind}{number:02d}-{fact.name}-{'abcq'[phrasing]}",
        "prompt": prompt_of(question.format(name=name)),
        "completion": " " + answer.format(*values[fact.name]),
        "group": name,
    }


def text_of(name: str, fact: Fact, phrasing: int, values: Values) -> str:
    """Question and answer on one fact about a person, in one text."""
    row = _row(name, fact, phrasing, 0, values)
    return row["prompt"] + row["completion"]


def _train_rows(people: Sequence[str], facts: Mapping[str, Values]) -> dict[str, Row]:
    rows = [
        _row(p, fact, k, n, facts[p])
        for n, p in enumerate(people)
        for fact in FACTS
        for k in range(3)
    ]
    return {row["id"]: row for row in rows}


def _plant_wrong(
    rng: random.Random, train: dict[str, Row], people: Sequence[str], facts: Mapping[str, Values]
) -> list[str]:
    """Replace one of the three answers of `N_WRONG` facts by one that differs in every part."""
    planted = []
    for n, k in rng.sample(
        [(n, k) for n in range(len(people)) for k in range(len(FACTS))], N_WRONG
    ):
        fact, phrasing, name = FACTS[k], rng.randrange(3), people[n]
        false = {fact.name: drawn_values(rng, fact, unlike=facts[name][fact.name])}
        row = _row(name, fact, phrasing, n, false)
        train[row["id"]] = row
        planted.append(row["id"])
    return planted


def fact_of(row_id: str) -> str:
    """Person and kind of fact that a row is about: its id without the phrasing."""
    return "-".join(row_id.split("-")[:2])


def _plant_copies(
    rng: random.Random, train: Mapping[str, Row], wrong: Collection[str]
) -> list[Row]:
    """Exact copies of `N_COPIES` rows of facts that nothing contradicts."""
    disputed = {fact_of(row_id) for row_id in wrong}
    clean = [row for row in train.values() if fact_of(row["id"]) not in disputed]
    return [{**row, "id": row["id"] + "-copy"} for row in rng.sample(clean, N_COPIES)]
