"""The picture of docs/faithfulness.md, of the demo's numbers: scores, an edit beside retraining, a forecast.

    python docs/picture.py            # draws docs/picture.png from docs/picture.json
    python docs/picture.py demo       # computes docs/picture.json first, from what make demo left

Computing takes some minutes on two cores and changes nothing in the demo.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from analysis.drawing import INK, MUTED, NEGATIVE, POSITIVE, STYLE

DOCS = Path(__file__).resolve().parent
#: What is neither one thing nor the other, beside the colours of `analysis.drawing`.
GREY = "#b8c1cb"
#: Left edge and width of the three panels, in shares of the picture.
PANELS = ((0.03, 0.31), (0.41, 0.24), (0.72, 0.25))
#: The person whose rows are taken out, and how many rows are unlearned one by one.
PERSON, MEASUNEGATIVE_ROWS = "p07", 40


def collect(demo: Path) -> dict[str, Any]:
    """Compute every number that is drawn, from a demo's folder."""
    import influence
    from influence.run import Run

    model = influence.load(str(demo / "base"), str(demo / "adapter"), device="cpu")
    train = influence.read_examples(demo / "train.jsonl")
    queries = influence.read_examples(demo / "queries.jsonl")
    run = Run.open(demo / "run", model=model, train=train)
    proponents, opponents = run.score(queries[:1]).top(0, k=4)
    ranked = [*proponents, *opponents[:3][::-1]]
    return {
        "question": queries[0].prompt,
        "rows": [[train[entry.index].completion, entry.score] for entry in ranked],
        "edit": edited_losses(run, demo / "base"),
        "steps": forecast_and_measured_steps(run),
    }


def edited_losses(run: Any, base: Path) -> dict[str, Any]:
    """Mean losses of one person's rows and of all others: before, edited, trained again."""
    import influence
    import unlearn
    from influence.loss import mean_losses
    from influence.tokens import tokenize

    ids = [row.id for row in run.train if row.id.startswith(PERSON)]
    others = [row.id for row in run.train if row.id not in set(ids)]
    sets = [run.train.select(map(run.train.index, part)) for part in (ids, others)]

    def losses(model: Any) -> list[float]:
        return [float(mean_losses(model, tokenize(rows, model.tokenizer)).mean()) for rows in sets]

    before = losses(run.model)
    with run.model.moved(unlearn.remove(run, ids).delta) as model:
        edited = losses(model)
    with tempfile.TemporaryDirectory() as folder:
        unlearn.retrain(run, ids, out=Path(folder) / "retrained", recipe=unlearn.Recipe())
        retrained = losses(influence.load(str(base), str(Path(folder) / "retrained")))
    return {
        "rows": [len(ids), len(others)],
        "before": before,
        "edited": edited,
        "retrained": retrained,
    }


def forecast_and_measured_steps(run: Any) -> list[list[float]]:
    """Steps of gradient ascent on single rows: the forecast, and what it took."""
    from unlearn import difficulty

    drawn = np.random.default_rng(0).choice(len(run.train), MEASUNEGATIVE_ROWS, replace=False)
    ids = [run.train.ids[place] for place in sorted(drawn)]
    forecast = difficulty.predict(run, ids=ids).table["steps"].to_numpy()
    with tempfile.TemporaryDirectory() as folder:
        measured = difficulty.measure(run, ids=ids, out=Path(folder) / "measured.h5").steps
    pairs = np.stack([forecast, measured], 1)
    return pairs[(np.isfinite(pairs) & (pairs > 0)).all(1)].tolist()


def short(text: str, width: int) -> str:
    """One line of a row, cut."""
    text = " ".join(text.removeprefix("Q: ").replace("\nA:", "").split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def draw_scores(axes: Any, question: str, rows: list[tuple[str, float]]) -> None:
    """The strongest proponents and opponents of a question, as bars."""
    for place, (text, value) in enumerate(reversed(rows)):
        axes.barh(place, value, color=POSITIVE if value > 0 else NEGATIVE, height=0.4)
        axes.text(0.06, place + 0.26, short(text, 42), va="bottom", size=7.5)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.5, len(rows) - 0.1)
    axes.set_xlabel("predicted rise of the question's loss\nif the row is removed, nats per token")
    axes.set_title(f"“{short(question, 62)}”", loc="left", size=8, color=MUTED, pad=8)
    ends, middle = axes.get_xlim(), np.mean
    helping = [place for place, (_, value) in enumerate(reversed(rows)) if value > 0]
    hurting = [place for place, (_, value) in enumerate(reversed(rows)) if value < 0]
    style: dict[str, Any] = {"rotation": 90, "va": "center", "weight": "bold", "size": 8.5}
    axes.text(-0.15, middle(helping), "proponents", ha="right", color=POSITIVE, **style)
    axes.text(ends[1], middle(hurting), "opponents", ha="right", color=NEGATIVE, **style)


def draw_edit(axes: Any, numbers: dict[str, Any]) -> None:
    """Losses of the removed rows and of the others: before, edited, trained again without."""
    ways = (
        ("before", "before", GREY),
        ("edited", "unlearn remove", POSITIVE),
        ("retrained", "trained again without", INK),
    )
    for number, (key, label, color) in enumerate(ways):
        places = np.arange(2) + (number - 1) * 0.26
        axes.bar(places, numbers[key], width=0.24, color=color, label=label)
        for place, value in zip(places, numbers[key], strict=True):
            axes.text(place, value, f"{value:.2f}", ha="center", va="bottom", size=7.5)
    removed, others = numbers["rows"]
    axes.set_xticks([0, 1], [f"{removed} removed rows", f"the other {others} rows"])
    axes.tick_params(axis="x", colors=INK, length=0)
    axes.set_ylabel("mean loss, nats per token")
    axes.set_ylim(0, 1.3 * max(*numbers["edited"], *numbers["retrained"]))
    axes.legend(frameon=False, loc="upper right", fontsize=8, borderaxespad=0)
    axes.set_title("all rows of one person taken out", loc="left", size=8, color=MUTED, pad=8)


def draw_forecast(axes: Any, steps: np.ndarray) -> None:
    """Steps of gradient ascent that rows took, against the forecast."""
    ends = [0.8 * steps.min(), 1.25 * steps.max()]
    axes.plot(ends, ends, color=MUTED, linewidth=0.8)
    axes.scatter(steps[:, 0], steps[:, 1], s=18, color=POSITIVE, alpha=0.8, linewidths=0)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.FixedLocator([5, 10, 20, 50]))
        axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("steps to forget a row, forecast")
    axes.set_ylabel("steps it took")
    title = f"{len(steps)} rows, each unlearned alone"
    axes.set_title(title, loc="left", size=8, color=MUTED, pad=8)


def draw_flow(axes: Any) -> None:
    """The strip above the panels: what goes in, the fit, and its three uses."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")

    def box(left: float, bottom: float, width: float, text: str, face: str) -> None:
        style = FancyBboxPatch(
            (left, bottom),
            width,
            0.26,
            boxstyle="round,pad=0,rounding_size=0.02",
            mutation_aspect=4,
            facecolor=face,
            edgecolor=MUTED,
            linewidth=0.8,
        )
        axes.add_patch(style)
        middle = (left + width / 2, bottom + 0.13)
        axes.text(*middle, text, ha="center", va="center", size=9.5)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": MUTED, "linewidth": 1}
        axes.add_patch(FancyArrowPatch(start, end, **style))

    box(0.03, 0.68, 0.22, "LoRA adapter, its training rows", "#f4f6f8")
    box(0.32, 0.68, 0.65, r"$\bf{influence\ fit}$:  every row's gradient, a curvature", "#e8f1f5")
    arrow((0.25, 0.81), (0.32, 0.81))
    uses = (
        r"$\bf{influence\ score}$:  which rows made it say this?",
        r"$\bf{unlearn\ remove}$:  without them",
        r"$\bf{unlearn\ difficulty}$:  how hard?",
    )
    for (left, width), text in zip(PANELS, uses, strict=True):
        box(left, 0.12, width, text, "#e8f1f5")
        middle = max(left + width / 2, 0.33)
        arrow((middle, 0.68), (middle, 0.38))


def draw(numbers: dict[str, Any], picture: Path) -> None:
    """Draw the picture of what `collect` returned."""
    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(11, 5.6), dpi=150, facecolor="white")
        draw_flow(figure.add_axes((0, 0.75, 1, 0.25)))
        scores, edit, forecast = (
            figure.add_axes((left, 0.12, width, 0.57)) for left, width in PANELS
        )
        draw_scores(scores, numbers["question"], numbers["rows"])
        draw_edit(edit, numbers["edit"])
        draw_forecast(forecast, np.array(numbers["steps"]))
        figure.savefig(picture, metadata={"Software": None})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        found = json.dumps(collect(Path(sys.argv[1])), indent=1)
        (DOCS / "picture.json").write_text(found + "\n", encoding="utf-8")
    draw(json.loads((DOCS / "picture.json").read_text(encoding="utf-8")), DOCS / "picture.png")
