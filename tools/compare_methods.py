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
import math
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from pydantic import Field

from stepdistill import api
from stepdistill.assets import TEACHER, resolve
from stepdistill.config import RunConfig, Settings, load_config, parse
from stepdistill.data.tensors import write_atomically
from stepdistill.demo import TEACHER_ROW
from stepdistill.evaluation.fashion import Scorer, evaluation_set
from stepdistill.exporting.artefact import draw, load_artefact
from stepdistill.models.recipe import Recipe
from stepdistill.planning.loop import CallCounter
from stepdistill.training.run import train
from stepdistill.training.session import DTYPES, Session
from stepdistill.training.watch import Seen

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "compare_methods"
BATCH, FOREVER = 64, 1_000_000
MEASURES = ("frechet", "prompt_accuracy", "diversity", "saturation")


class EntryConfig(Settings):
    """One row of a comparison."""

    config: str
    set: list[str] = []
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


@dataclass(frozen=True)
class Measured:
    """The student at one number of steps, by the judge."""

    steps: int
    frechet: float
    prompt_accuracy: float
    diversity: float
    saturation: float


@dataclass(frozen=True)
class Cell:
    """One entry, one seed.

    Attributes:
        calls: network calls that training made, by role.
        iterations: of training.
        seconds, processor_seconds: of training, on whatever machine it was.
        rows: what the judge says.
    """

    entry: str
    seed: int
    config_sha256: str
    commit: str
    calls: Mapping[str, int]
    iterations: int
    seconds: float
    processor_seconds: float
    images: int
    rows: Sequence[Measured]

    @classmethod
    def read(cls, path: Path) -> Cell:
        record = json.loads(path.read_text())
        return cls(**{**record, "rows": [Measured(**row) for row in record["rows"]]})

    def at(self, steps: int) -> Measured | None:
        return next((row for row in self.rows if row.steps == steps), None)


class Budget:
    """A watcher that ends the run when its network calls are spent."""

    every = 1

    def __init__(self, session: Session, calls: int) -> None:
        self.calls = calls
        self.counter = CallCounter(session.triple)
        self.counter.__enter__()

    def __call__(self, iteration: int) -> Seen:
        return Seen({}, None, enough=sum(self.spent().values()) >= self.calls)

    def spent(self) -> dict[str, int]:
        """Rows by role that was asked. Forwards that are left at the features count whole."""
        spent: dict[str, int] = {}
        for call, counted in self.counter.found.items():
            spent[call.network] = spent.get(call.network, 0) + round(counted.rows)
        return spent


def read_comparison(path: Path) -> ComparisonConfig:
    """Raises Refusal."""
    return parse(ComparisonConfig, yaml.safe_load(path.read_text()), str(path))


def config_of(entry: EntryConfig, seed: int) -> RunConfig:
    """The config of a cell: no end but the budget's, and nothing written but the last checkpoint."""
    quiet = [f"training.max_steps={FOREVER}", f"training.save_every={FOREVER}", "training.grid_every=0"]
    return load_config(ROOT / entry.config, [*entry.set, *quiet, f"training.seed={seed}"])


def hash_of(config: RunConfig, calls: int, images: int) -> str:
    """Of all that decides a cell's numbers."""
    said = {"config": config.model_dump(mode="json", exclude={"output"}), "calls": calls, "images": images}
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
    full = config.roles.generator.mode == "full"
    artefact = api.export(folder / "run", "pipeline" if full else "diffusers-lora", folder / "student", device="cpu")
    rows = measure(artefact, full, images)
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


def measure(artefact: Path, full: bool, images: int) -> list[Measured]:
    """The student at its own number of steps, and at every fewer one of 1, 2, 4 that divides its ladder."""
    base = str(artefact) if full else resolve(TEACHER)
    pipeline, recipe = load_artefact(base, None if full else artefact, DTYPES["float32"], "cpu")
    if recipe is None:
        raise RuntimeError(f"{artefact} holds no recipe")
    prompts, seeds = evaluation_set(images)
    scorer, rows = Scorer(), []
    for shorter in _shortened(recipe):
        drawn = np.concatenate(list(draw(pipeline, prompts, seeds, recipe=shorter, batch_size=BATCH)))
        scores = scorer.score(drawn, prompts)
        measures = {key: round(getattr(scores, key), 5) for key in MEASURES}
        rows.append(Measured(shorter.num_inference_steps, **measures))
    return rows


def _shortened(recipe: Recipe) -> Iterator[Recipe]:
    own = recipe.num_inference_steps
    for steps in (1, 2, 4):
        if own % steps == 0:
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


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Spread:
    """Mean and standard error over seeds; None of one seed."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ±{self.error:.3f}")


def read_cells(results: Path) -> dict[str, list[Cell]]:
    """Entry -> its cells, by seed."""
    cells: dict[str, list[Cell]] = {}
    for path in sorted(results.glob("*.json")):
        cell = Cell.read(path)
        cells.setdefault(cell.entry, []).append(cell)
    return cells


def table(cells: Mapping[str, Sequence[Cell]], entries: Sequence[str], teacher_diversity: float) -> str:
    """Markdown: means over seeds with standard errors; diversity as a ratio to the teacher's."""
    lines = [
        "| | seeds | Fréchet, 1 step | 2 steps | 4 steps | accuracy | diversity / teacher | generator updates | processor s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in entries:
        found = cells.get(name, [])
        if not found:
            continue
        most = max(row.steps for row in found[0].rows)
        full = [row for cell in found if (row := cell.at(most)) is not None]
        frechet = [
            str(Spread.of(values)) if (values := [row.frechet for cell in found if (row := cell.at(steps))]) else "–"
            for steps in (1, 2, 4)
        ]
        lines.append(
            f"| {name} | {len(found)} | {' | '.join(frechet)} | {Spread.of([row.prompt_accuracy for row in full])} | "
            f"{Spread.of([row.diversity / teacher_diversity for row in full])} | "
            f"{statistics.fmean(cell.iterations for cell in found):.0f} | "
            f"{statistics.fmean(cell.processor_seconds for cell in found):.0f} |"
        )
    return "\n".join(lines)


def picture(cells: Mapping[str, Sequence[Cell]], entries: Sequence[str], path: Path) -> None:
    """Fréchet distance against steps, one line an entry, bars of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in entries:
        found = cells.get(name, [])
        steps = [row.steps for row in found[0].rows] if found else []
        spreads = [Spread.of([row.frechet for cell in found if (row := cell.at(count))]) for count in steps]
        axes.errorbar(steps, [s.mean for s in spreads], [s.error or 0 for s in spreads], marker="o", label=name)
    axes.set(xlabel="network calls of the student", ylabel="Fréchet distance (judge)", xticks=[1, 2, 4])
    axes.legend()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- commands


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
        for name, seed in _missing(comparison, arguments):
            cell = run_cell(name, comparison.entries[name], comparison, seed, arguments.work)
            arguments.results.mkdir(parents=True, exist_ok=True)
            path = arguments.results / f"{name}-seed{seed}.json"
            write_atomically(path, (json.dumps(asdict(cell), indent=2) + "\n").encode())
            last = cell.rows[-1]
            print(f"{name} seed {seed}: {cell.iterations} iterations, {cell.seconds:.0f} s, {last}", flush=True)
        return
    cells = read_cells(arguments.results)
    teacher = json.loads(TEACHER_ROW.read_text())["1.5"]
    for title, entries in comparison.tables.items():
        print(f"{title}\n\n{table(cells, entries, teacher['diversity'])}\n")
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


def _missing(comparison: ComparisonConfig, arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """(entry, seed) of the cells that are not there as configured, seed by seed; one that is being run elsewhere is left."""
    names = arguments.only if arguments.only is not None else list(comparison.entries)
    seeds = arguments.seeds if arguments.seeds is not None else comparison.seeds
    for seed in seeds:
        for name in names:
            entry = comparison.entries[name]
            path = arguments.results / f"{name}-seed{seed}.json"
            wanted = hash_of(config_of(entry, seed), entry.calls or comparison.calls, entry.images or comparison.images)
            if entry.seeds is not None and seed not in entry.seeds:
                continue
            if not path.is_file() or Cell.read(path).config_sha256 != wanted:
                yield name, seed


if __name__ == "__main__":
    main()
