"""Worlds that notebooks and studies run on: the demo's, and another where its folder is given.

A world is a folder with base/, adapter/, train.jsonl, query.jsonl or queries.jsonl, heldout.jsonl
and, maybe, truth.npz (losses of adapters trained again on random halves of the rows, as
`unlearn.retrain_subsets` writes them). Two environment variables say where things are:

    LORA_INFLUENCE_WORLDS    where what is made here is kept (default: `worlds` in the working
                             directory)
    LORA_INFLUENCE_TESTBED   a second world's folder, which is only read
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from influence.adapter import AdaptedModel
from influence.errors import InputError
from influence.recipe import Recipe
from influence.rows import Examples
from influence.run import Run


@dataclass(frozen=True)
class World:
    """A base, an adapter and their rows.

    Attributes
    ----------
    name : str
    folder : Path
        base/, adapter/, train.jsonl, query.jsonl or queries.jsonl, heldout.jsonl.
    kept : Path
        Where the run directory, and whatever a study makes, is written.
    recipe : Recipe or None
        How the adapter was trained, where no file beside it says so.
    """

    name: str
    folder: Path
    kept: Path
    recipe: Recipe | None = None

    def model(self) -> AdaptedModel:
        """Load the adapter on its base, on the CPU in float32."""
        import influence

        return influence.load(str(self.folder / "base"), str(self.folder / "adapter"), device="cpu")

    def rows(self, name: str) -> Examples:
        """Rows of `train`, `queries` or `heldout`."""
        import influence

        paths = [
            self.folder / f"{stem}.jsonl"
            for stem in ((name, "query") if name == "queries" else (name,))
        ]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise InputError(
                f"{self.folder} has no {' or '.join(p.name for p in paths)}; a world needs its "
                "rows there"
            )
        return influence.read_examples(path)

    @property
    def truth(self) -> Path | None:
        """File of losses of adapters retrained on random halves of the rows, if there is one."""
        path = self.folder / "truth.npz"
        return path if path.is_file() else None

    def run(self) -> Run:
        """Fit the default curvature on the training rows, once: the same call finds it finished."""
        import influence
        from influence.store import write_json

        run = influence.fit(self.model(), self.rows("train"), directory=self.kept / "run")
        if self.recipe is not None:
            write_json(run.directory / "recipe.json", self.recipe.as_json())
        return run


def worlds() -> list[World]:
    """The demo's world, made if it is not there, and the one LORA_INFLUENCE_TESTBED names.

    Making takes about a minute.
    """
    kept = Path(os.environ.get("LORA_INFLUENCE_WORLDS") or "worlds").resolve()
    made = [demo_world(kept / "demo")]
    if folder := os.environ.get("LORA_INFLUENCE_TESTBED"):
        other = Path(folder).resolve()
        (kept / other.name).mkdir(parents=True, exist_ok=True)
        # its README has the recipe, which is the default one
        made.append(World(other.name, other, kept / other.name, Recipe()))
    return made


def demo_world(folder: str | Path, seed: int = 0) -> World:
    """The demo's world in `folder`, its base and adapter trained if they are not yet there.

    See `analysis.demo.walkthrough`.
    """
    from analysis.demo.corpus import make_corpus
    from analysis.demo.training import train_adapter, train_base

    folder = Path(folder).resolve()
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        corpus = make_corpus(seed)
        corpus.write(folder)
        train_base(corpus.base_texts, folder / "base", seed)
        train_adapter(folder / "base", corpus.train, folder / "adapter", seed)
    return World("demo", folder, folder)
