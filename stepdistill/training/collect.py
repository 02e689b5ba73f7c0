"""Data sets that methods need, drawn from a teacher (`pairs`, `trajectories`) or a student (`samples`): resumable, with progress.

Several processes draw a batch each and the main one writes them, in the order in which one process would have drawn them: a
sample depends on its own seed, so a folder does not tell how many there were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from stepdistill.assets import resolve
from stepdistill.config.collection import CollectConfig, CollectionKind
from stepdistill.config.registry import load_family
from stepdistill.data.latents.latent_shards import ShardWriter, noise_for
from stepdistill.data.latents.shard_index import Fingerprint
from stepdistill.data.latents.trajectories import TrajectoryWriter
from stepdistill.data.prompts import PromptList, read_prompts
from stepdistill.diffusion.draws import Draws, derive_seed, generator
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.timesteps import trailing_timesteps
from stepdistill.errors import UserError
from stepdistill.families.checkpoints.loading import inspect_checkpoint, load_checkpoint
from stepdistill.families.conditioning import MicroConditioning
from stepdistill.files.outputs import check_folder_is_writable
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.guidance_conditioning import attach_guidance_adapter_file
from stepdistill.roles.sampler import guided_trajectory, teacher_sample
from stepdistill.runtime.kernels import compile_blocks, set_attention_and_memory_format
from stepdistill.training.monitoring.grids import student_latents
from stepdistill.training.run import open_run
from stepdistill.training.session import DTYPES, process_device

WriterT = TypeVar("WriterT", bound=ShardWriter)


def collect(kind: CollectionKind, config: CollectConfig, output: str | Path, resume: bool = False) -> int:
    """Draw latents into a folder; returns how many it holds.

    Raises:
        UserError: a non-empty folder without `resume`, pairs of a student, or data made by another config.
    """
    folder, device = Path(output), process_device(config.device)
    check_folder_is_writable(folder)
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise UserError(
            f"the output folder {str(folder)!r} is not empty: add --resume to go on with it, or choose another"
        )
    if (config.model is None) == (config.run is None):
        raise UserError(
            "a collection draws from 'model' (a teacher) or from 'run' (a student), and exactly one must be set: mend the config"
        )
    if kind != "samples" and config.model is None:
        raise UserError(
            f"{kind} are made by a deterministic teacher, and 'run' names a student: set 'model', or collect samples"
        )
    if kind == "trajectories":
        return _collect_trajectories(config, folder, device)
    prompts = read_prompts(config.prompts, config.prompt_column)
    source = _TeacherSource(config, device) if config.model is not None else _Student(config, device)
    fingerprint = _fingerprint(config, source, prompts)
    with _on_main_process(lambda: ShardWriter(folder, kind, fingerprint, config.shard_size or 256)) as writer:
        done = _completed(writer)
        draws = _draw_batches(
            config, prompts, done, "latent", lambda texts, seeds: {"latents": source.draw(texts, seeds)}
        )
        for rows in draws:
            if writer is not None:
                writer.write(rows["seed"], rows["latents"], rows["prompt"])
    return max(done, config.count)


def _collect_trajectories(config: CollectConfig, folder: Path, device: torch.device) -> int:
    """Guided walks with one w each; see `collect`."""
    low, high = config.guidance_range
    keep = config.keep or config.steps
    if not 0 <= low <= high or keep > config.steps:
        raise UserError(
            f"guidance_range is [{low:g}, {high:g}] and {keep} states are kept of {config.steps} steps: give a rising range from 0 up, "
            "and keep no more states than steps"
        )
    prompts, teacher = read_prompts(config.prompts, config.prompt_column), _TeacherSource(config, device)
    if teacher.denoiser.guide is not None:
        raise UserError("trajectories are of a teacher that is guided by two calls: remove model.guidance_adapter")
    fingerprint = replace(_fingerprint(config, teacher, prompts), guidance=0.0, guidance_range=(low, high), keep=keep)
    with _on_main_process(
        lambda: TrajectoryWriter(folder, fingerprint, config.shard_size or 16, config.dtype)
    ) as writer:
        done = _completed(writer)
        for rows in _draw_batches(
            config, prompts, done, "trajectory", lambda texts, seeds: teacher.draw_trajectories(texts, seeds, keep)
        ):
            if writer is not None:
                writer.write_trajectories(rows)
    return max(done, config.count)


def _fingerprint(config: CollectConfig, source: _TeacherSource | _Student, prompts: PromptList) -> Fingerprint:
    return Fingerprint(
        model=source.name,
        guidance=config.guidance,
        steps=config.steps,
        seed=config.seed,
        prompts_sha256=prompts.sha256,
        resolution=source.size,
        sampler=source.sampler,
        precision=source.precision,
        command=" ".join(sys.argv),
        negative_prompt=(config.model.negative_prompt or None) if config.model is not None else None,
    )


@contextmanager
def _on_main_process(make_writer: Callable[[], WriterT]) -> Iterator[WriterT | None]:
    """A writer in the main process alone, None in the others."""
    state = PartialState()
    state.wait_for_everyone()  # all have looked at the folder as it was
    if not state.is_main_process:
        yield None
        return
    writer = make_writer()
    with writer:
        yield writer


def _completed(writer: ShardWriter | None) -> int:
    """What the folder held, in all processes."""
    return int(gather_object([0 if writer is None else writer.completed])[0])


def _draw_batches(
    config: CollectConfig,
    prompts: PromptList,
    done: int,
    unit: str,
    draw: Callable[[list[str], list[int]], Mapping[str, Tensor]],
) -> Iterator[dict[str, Tensor]]:
    """Columns of what is still to be drawn, batch by batch and in order, with progress: a batch of each process at a time.

    `draw` makes columns of texts and seeds, (B, ...) each; `seed` and `prompt` (B,) are put beside them.
    """
    state = PartialState()
    hidden = not state.is_main_process
    with tqdm(total=config.count, initial=done, unit=unit, dynamic_ncols=True, disable=hidden) as bar:
        for start in range(done, config.count, config.batch_size * state.num_processes):
            first = start + config.batch_size * state.process_index
            indices = range(first, min(first + config.batch_size, config.count))
            own: list[dict[str, Tensor]] = []
            if indices:
                seeds = [derive_seed(config.seed, "collect", index) for index in indices]
                columns = draw([prompts[index % len(prompts)] for index in indices], seeds)
                places = torch.tensor([index % len(prompts) for index in indices])
                own = [{"seed": torch.tensor(seeds), "prompt": places, **{k: v.cpu() for k, v in columns.items()}}]
            for rows in gather_object(own):
                yield rows
                bar.update(len(rows["seed"]))


class _TeacherSource:
    """Deterministic, guided draws of a checkpoint."""

    def __init__(self, config: CollectConfig, device: torch.device) -> None:
        if config.model is None:
            raise ValueError("no model in the config")
        model = config.model
        info = inspect_checkpoint(resolve(model.path), model.family, model.config_dir)
        self.config, self.name = config, model.path
        self.precision = model.dtype if model.quantization == "none" else f"{model.dtype}, {model.quantization}"
        self.size = model.size or info.default_size
        self.shape = info.latent_shape(self.size)
        self.schedule: NoiseSchedule = info.schedule.for_tokens(self.shape[1] * self.shape[2] // 4)
        self.family = load_family(info.family)
        self.device = device
        self.checkpoint = load_checkpoint(info, DTYPES[model.dtype], self.device, quantization=model.quantization)
        set_attention_and_memory_format(self.checkpoint.network, model.attention, model.channels_last)
        if model.compile:
            compile_blocks(self.checkpoint.network)
        adapter = None
        if model.guidance_adapter is not None:
            adapter = attach_guidance_adapter_file(self.checkpoint.network, model.guidance_adapter)
        self.denoiser = Denoiser(self.checkpoint.network, self.family, self.schedule, guide=adapter)
        self.negative_prompt = model.negative_prompt
        self.sampler = "euler, shifted" if self.schedule.is_flow else "ddim, trailing"

    @torch.no_grad()
    def draw(self, texts: list[str], seeds: list[int]) -> torch.Tensor:
        sizes = [MicroConditioning.plain(*self.size)] * len(texts)
        cond = self.family.encode(self.checkpoint, texts, sizes)
        null = self.family.null(self.checkpoint, sizes, self.negative_prompt)
        noise = torch.stack([noise_for(seed, self.shape) for seed in seeds]).to(self.device)
        return teacher_sample(self.denoiser, cond, null, noise, self.config.steps, self.config.guidance)

    @torch.no_grad()
    def draw_trajectories(self, texts: list[str], seeds: list[int], keep: int) -> dict[str, torch.Tensor]:
        """Columns of a trajectory folder, but for seeds and prompts. Each walk depends on its seed alone."""
        sizes = [MicroConditioning.plain(*self.size)] * len(texts)
        cond = self.family.encode(self.checkpoint, texts, sizes)
        null = self.family.null(self.checkpoint, sizes, self.negative_prompt)
        noise = torch.stack([noise_for(seed, self.shape) for seed in seeds]).to(self.device)
        (low, high), timesteps = self.config.guidance_range, trailing_timesteps(self.schedule, self.config.steps)
        lots = [torch.rand((), generator=generator(seed, "w"), dtype=torch.float64) for seed in seeds]
        w = low + (high - low) * torch.stack(lots)
        orders = [torch.randperm(len(timesteps), generator=generator(seed, "states")) for seed in seeds]
        kept = [set(order[:keep].tolist()) for order in orders]
        times = [torch.full((len(seeds),), t, dtype=torch.float64, device=self.device) for t in timesteps]
        found: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in seeds]
        for index, state in enumerate(guided_trajectory(self.denoiser, cond, null, noise, times, w.to(self.device))):
            parts = [tensor.cpu() for tensor in (state.x_t, state.target, state.t, state.plain)]
            for row, chosen in enumerate(kept):
                if index in chosen:
                    found[row].append(tuple(part[row].clone() for part in parts))
        names = ("x_t", "target", "t", "plain")
        stacked = {
            name: torch.stack([torch.stack([state[k] for state in walk]) for walk in found])
            for k, name in enumerate(names)
        }
        return {"w": w, **stacked}


class _Student:
    """Draws of a run's student by its recipe."""

    def __init__(self, config: CollectConfig, device: torch.device) -> None:
        if config.run is None:
            raise ValueError("no run in the config")
        self.session, iteration = open_run(config.run, str(device))
        setup = self.session.setup
        self.name, self.precision = f"{config.run}@{iteration}", setup.config.model.dtype
        self.size = setup.problem.size
        self.sampler = self.session.recipe.scheduler_class

    @torch.no_grad()
    def draw(self, texts: list[str], seeds: list[int]) -> torch.Tensor:
        session, setup = self.session, self.session.setup
        cond = session.encoder.text(texts, [MicroConditioning.plain(*self.size)] * len(texts))
        shape = setup.problem.latent_shape
        noise = torch.stack([noise_for(seed, shape) for seed in seeds]).to(session.device, session.dtype)
        draws = Draws(0, 0, "collect", seeds, session.device, session.dtype)
        return student_latents(session, session.student, cond, noise, draws)
