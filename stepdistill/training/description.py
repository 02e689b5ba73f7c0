"""What a run is, in lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.methods.base import Stage
from stepdistill.roles.guidance_modules import GuidanceAdapterSettings
from stepdistill.roles.triple import RoleLayout
from stepdistill.training.option_checks import describe_options
from stepdistill.training.session import Session
from stepdistill.training.setup import RunSetup


def describe_run(setup: RunSetup, session: Session | None = None, processes: int = 1) -> list[str]:
    """What a run is, line by line: the dry run prints it, training logs it."""
    config, problem = setup.config, setup.problem
    training = config.training
    method = setup.method_class(setup.method_config, problem)
    recipe = setup.family.stock_recipe(setup.info, method.recipe())
    options = ", ".join(f"{key}={value}" for key, value in setup.method_config.model_dump(exclude_unset=True).items())
    ladder = ", ".join(f"{time:g}" for time in recipe.times)
    shares = f", by {len(recipe.experts)} experts ({' + '.join(map(str, recipe.experts))})" if recipe.experts else ""
    extra = []
    if setup.images is not None:
        extra.append("a stream of images" if setup.images.count is None else f"{setup.images.count:,} images")
    if setup.pairs is not None:
        extra.append(f"{len(setup.pairs):,} pairs")
    if setup.trajectories is not None:
        extra.append(f"{len(setup.trajectories):,} states of guided trajectories")
    if setup.buckets is not None:
        counts = zip(setup.buckets.sizes, setup.buckets.weights, strict=True)
        extra.append("buckets " + ", ".join(f"{size[0]}x{size[1]} (weight {weight:,})" for size, weight in counts))
    lines = [
        f"teacher     {config.model.path}: family {setup.info.family}, {problem.schedule.prediction.value} prediction, "
        f"latents {'x'.join(map(str, problem.latent_shape))}, base in {config.model.dtype}",
        f"method      {config.method_name}: {options}",
        f"student     {recipe.num_inference_steps} network calls with {recipe.scheduler_class} at {ladder}, "
        + ("guidance off" if recipe.w == 1 else f"told a guidance scale of {recipe.w:g}")
        + shares,
        f"data        {', '.join([f'{len(setup.prompts):,} prompts from {setup.prompts.source}', *extra])}",
        f"training    {training.max_steps:,} iterations of {training.batch_size} x {training.accumulation} samples on "
        f"{'one process' if processes == 1 else f'each of {processes} processes'}",
    ]
    if len(method.stages()) > 1:
        lines.append(f"stages      {_describe_stages(method.stages(), training.max_steps)}")
    if chosen := describe_options(config):
        lines.append(f"options     {', '.join(chosen)}")
    for role, layout in setup.layouts.items():
        held = _describe_layout(layout)
        trained = ""
        if session is not None:
            trained = f", {sum(p.numel() for p in session.triple.parameters(role).values()):,} trained parameters"
        lines.append(f"{role:<11} {held}{trained}")
    return lines


def _describe_stages(stages: Sequence[Stage], last: int) -> str:
    """Name and first iteration of each, with a word for those that the run ends before."""
    descriptions, start = [], 0
    for stage in stages:
        descriptions.append(
            f"{stage.name} from {start:,}" + (" (never: training.max_steps ends before)" if start >= last else "")
        )
        start += stage.iterations or last
    return ", ".join(descriptions)


def _describe_layout(layout: RoleLayout) -> str:
    guide = layout.guide
    if isinstance(guide, GuidanceAdapterSettings):
        return f"guidance adapters ({guide.kind}, width {guide.width}, w in [{guide.w_low:g}, {guide.w_high:g}])"
    lora = layout.lora
    held = "full network" if lora is None else f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}"
    return held if guide is None else f"{held}, with an embedding of w"
