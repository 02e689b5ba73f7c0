"""Methods and layouts on the embedded teacher, at the same number of network calls of training, cell by cell.

    python tools/compare_methods.py run                       # every cell that is missing; stop and start as you like
    python tools/compare_methods.py run --only dmd2 --seeds 0
    python tools/compare_methods.py table --json rows.json --picture curves.png

A cell trains one entry of tools/comparison.yaml with one seed until its calls are spent, exports the student, loads it with
stock diffusers and lets the judge, which nothing is trained against, measure it. tools/results/compare_methods/ keeps one
file a cell, with the commit and the hash of the config; a cell whose config has changed since is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from comparetables import Cell, Measured, picture, read_cells, table
from diffusers import SD3Transformer2DModel
from pydantic import Field
from torch import nn

from stepdistill.api import training as api
from stepdistill.api.quickstart import TEACHER_ROW
from stepdistill.assets import FLOW_TEACHER, FOLDER, resolve
from stepdistill.config.reading import Settings, parse
from stepdistill.config.schema import RunConfig, load_config
from stepdistill.errors import UserError
from stepdistill.evaluation.fashion import FashionScorer, evaluation_set
from stepdistill.families.recipe import Recipe
from stepdistill.families.sd3 import T5_TOKENS
from stepdistill.files.atomic import write_atomically
from stepdistill.inference.artifact import draw, load_artifact
from stepdistill.planning.network_calls import CallCounter
from stepdistill.training.evaluation_hook import EvaluationResult
from stepdistill.training.run import train
from stepdistill.training.session import DTYPES, Session

sys.path.insert(0, str(Path(__file__).resolve().parent / "teacher"))
from countedzeros import count_zeros

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "compare_methods"
BATCH, FOREVER = 64, 1_000_000
FLOW_TEACHER_ROW = FOLDER / "flow_teacher_row.json"
MEASURES = ("frechet", "prompt_accuracy", "diversity", "saturation")


class EntryConfig(Settings):
    """One row of a comparison."""

    config: str
    set: list[str] = Field([], description="changes to the config, as --set takes them")
    calls: int | None = Field(None, gt=0)
    images: int | None = Field(None, gt=0)
    seeds: list[int] | None = None


class ComparisonConfig(Settings):
    """tools/comparison.yaml."""

    calls: int = Field(gt=0, description="network calls of training, a cell")
    seeds: list[int]
    images: int
    entries: dict[str, EntryConfig]
    tables: dict[str, list[str]]


class Budget:
    """A watcher that ends the run when its network calls are spent."""

    every = 1

    def __init__(self, session: Session, calls: int) -> None:
        self.calls, self.met = calls, False
        quicken(session.triple.base)
        self.counter = CallCounter(session.triple)
        self.counter.__enter__()

    def __call__(self, iteration: int) -> EvaluationResult:
        self.met = sum(self.spent().values()) >= self.calls
        return EvaluationResult({}, None, should_stop=self.met)

    def spent(self) -> dict[str, int]:
        """Rows by role that was asked. Forwards that are left at the features count whole."""
        spent: dict[str, int] = {}
        for call, counted in self.counter.found.items():
            spent[call.network] = spent.get(call.network, 0) + round(counted.rows)
        return spent


def quicken(network: nn.Module) -> None:
    """The flow teacher's network in half the time: T5's absent tokens once instead of 256 times. Results stay the same."""
    if isinstance(network, SD3Transformer2DModel):
        count_zeros(network, T5_TOKENS)


def read_comparison(path: Path) -> ComparisonConfig:
    """Raises UserError."""
    return parse(ComparisonConfig, yaml.safe_load(path.read_text()), str(path))


def config_of(entry: EntryConfig, seed: int) -> RunConfig:
    """The config of a cell: no end but the budget's, and nothing written but the last checkpoint."""
    cadences = [f"training.{key}={FOREVER}" for key in ("max_steps", "save_every", "log_every")]
    quiet = [*cadences, "training.grid_every=0"]
    return load_config(ROOT / entry.config, [*entry.set, *quiet, f"training.seed={seed}"])


def hash_of(config: RunConfig, calls: int, images: int) -> str:
    """Of all that decides a cell's numbers: what is said in its config, so that an option that is new changes no hash."""
    written = {"max_steps", "save_every", "log_every", "grid_every"}
    said = config.model_dump(mode="json", exclude_defaults=True, exclude={"output": True, "training": written})
    said = {"config": said, "calls": calls, "images": images}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def run_cell(name: str, entry: EntryConfig, comparison: ComparisonConfig, seed: int, work: Path) -> Cell:
    """Train, export, draw with stock diffusers, measure."""
    calls, images = entry.calls or comparison.calls, entry.images or comparison.images
    config = config_of(entry, seed)
    folder = work / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    budgets: list[Budget] = []

    def watcher(session: Session, _folder: Path) -> Budget:
        budgets.append(Budget(session, calls))
        return budgets[0]

    begun, used = time.perf_counter(), _processor_seconds()
    outcome = train(config, folder / "run", None, watcher)
    seconds, processor = time.perf_counter() - begun, _processor_seconds() - used
    if not budgets[0].met:
        raise UserError(
            f"{name} with seed {seed} was stopped at iteration {outcome.iteration}: run it again, cells are whole"
        )
    form = api.default_export_format(config)
    artifact = api.export(folder / "run", form, folder / "student", device="cpu")
    rows = measure(artifact, None if form == "pipeline" else config.model.path, images)
    shutil.rmtree(folder)
    return Cell(
        entry=name,
        seed=seed,
        config_sha256=hash_of(config, calls, images),
        commit=_commit(),
        calls=budgets[0].spent(),
        iterations=outcome.iteration,
        seconds=round(seconds, 1),
        processor_seconds=round(processor, 1),
        images=images,
        rows=rows,
    )


def measure(artifact: Path, base: str | None, images: int) -> list[Measured]:
    """The student, a whole pipeline or a LoRA of `base`, at its own number of steps and at every fewer one of 1, 2, 4 that divides
    its ladder; several experts, whose turns are steps of the whole ladder, at their own alone."""
    model, lora = (str(artifact), None) if base is None else (resolve(base), artifact)
    loaded = load_artifact(model, lora, DTYPES["float32"], "cpu")
    if loaded.recipe is None:
        raise RuntimeError(f"{artifact} holds no recipe")
    if "transformer" in loaded.pipeline.components:
        quicken(loaded.pipeline.transformer)
    prompts, seeds = evaluation_set(images)
    scorer, rows = FashionScorer(), []
    for shorter in _shortened(loaded.recipe):
        drawn = np.concatenate(
            list(draw(loaded.pipeline, prompts, seeds, recipe=shorter, experts=loaded.experts, batch_size=BATCH))
        )
        scores = scorer.score(drawn, prompts)
        measures = {key: round(getattr(scores, key), 5) for key in MEASURES}
        rows.append(Measured(shorter.num_inference_steps, **measures))
    return rows


def _shortened(recipe: Recipe) -> Iterator[Recipe]:
    own = recipe.num_inference_steps
    for steps in (1, 2, 4):
        if own == steps or (own % steps == 0 and not recipe.experts and not recipe.spaced):
            kept = [index * own // steps for index in range(steps)]
            timesteps = tuple(recipe.timesteps[i] for i in kept) if recipe.timesteps else ()
            sigmas = tuple(recipe.sigmas[i] for i in kept) if recipe.sigmas else ()
            yield replace(recipe, num_inference_steps=steps, timesteps=timesteps, sigmas=sigmas)


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


@dataclass(frozen=True)
class Wanted:
    """Which cells are asked for: those kept in `results` are there; None is all entries, all seeds."""

    results: Path
    entries: Sequence[str] | None
    seeds: Sequence[int] | None


def missing(comparison: ComparisonConfig, wanted: Wanted) -> Iterator[tuple[str, int]]:
    """(entry, seed) of the cells that are not there as configured, seed by seed.

    Raises:
        UserError: an entry that the comparison does not have.
    """
    for seed in wanted.seeds if wanted.seeds is not None else comparison.seeds:
        for name in wanted.entries if wanted.entries is not None else comparison.entries:
            entry = comparison.entries.get(name)
            if entry is None:
                raise UserError(
                    f"there is no entry {name!r} in the comparison: use one of {', '.join(comparison.entries)}"
                )
            if entry.seeds is not None and seed not in entry.seeds:
                continue
            path = wanted.results / f"{name}-seed{seed}.json"
            own = hash_of(config_of(entry, seed), entry.calls or comparison.calls, entry.images or comparison.images)
            if not path.is_file() or Cell.read(path).config_sha256 != own:
                yield name, seed


def teacher_diversity(comparison: ComparisonConfig, entries: Sequence[str]) -> float:
    """Of the teacher that these entries share, at guidance 1.5."""
    flow = {config_of(comparison.entries[name], 0).model.path == FLOW_TEACHER for name in entries}
    if len(flow) > 1:
        raise UserError(f"the table of {', '.join(entries)} mixes two teachers: give each a table of its own")
    row = FLOW_TEACHER_ROW if flow == {True} else TEACHER_ROW
    return float(json.loads(row.read_text())["1.5"]["diversity"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparison", type=Path, default=Path(__file__).parent / "comparison.yaml")
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the cells that are missing")
    run.add_argument("--only", nargs="*", default=None, help="entries; all by default")
    run.add_argument("--seeds", nargs="*", type=int, default=None)
    run.add_argument("--work", type=Path, default=Path("runs/compare"))
    show = commands.add_parser("table", help="print the tables")
    show.add_argument("--json", type=Path, default=None)
    show.add_argument("--picture", type=Path, default=None)
    arguments = parser.parse_args()
    comparison = read_comparison(arguments.comparison)
    if arguments.command == "run":
        logging.basicConfig(level=logging.WARNING)
        for name, seed in missing(comparison, Wanted(arguments.results, arguments.only, arguments.seeds)):
            cell = run_cell(name, comparison.entries[name], comparison, seed, arguments.work)
            arguments.results.mkdir(parents=True, exist_ok=True)
            path = arguments.results / f"{name}-seed{seed}.json"
            write_atomically(path, (json.dumps(asdict(cell), indent=2) + "\n").encode())
            last = cell.rows[-1]
            print(f"{name} seed {seed}: {cell.iterations} iterations, {cell.seconds:.0f} s, {last}", flush=True)
        return
    cells = read_cells(arguments.results)
    for title, entries in comparison.tables.items():
        print(f"{title}\n\n{table(cells, entries, teacher_diversity(comparison, entries))}\n")
    if arguments.json is not None:
        rows = [
            {"method": cell.entry, "seed": cell.seed, **asdict(row)}
            for found in cells.values()
            for cell in found
            for row in cell.rows
        ]
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.picture is not None:
        picture(cells, comparison.tables["methods"], arguments.picture)


if __name__ == "__main__":
    main()
