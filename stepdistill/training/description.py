"""What a run is, in lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.methods.base import Stage
from stepdistill.roles.guidance_modules import GuidanceAdapterSettings
from stepdistill.roles.triple import RoleLayout
from stepdistill.training.options import describe_options
from stepdistill.training.session import Session
from stepdistill.training.setup import RunSetup


def describe(plan: RunSetup, session: Session | None = None, processes: int = 1) -> list[str]:
    """What a run is, line by line: the dry run prints it, training logs it."""
    config, problem = plan.config, plan.problem
    training = config.training
    method = plan.method_class(plan.method_config, problem)
    recipe = plan.family.stock_recipe(plan.info, method.recipe())
    options = ", ".join(f"{key}={value}" for key, value in plan.method_config.model_dump(exclude_unset=True).items())
    ladder = ", ".join(f"{time:g}" for time in recipe.times)
    shares = f", by {len(recipe.experts)} experts ({' + '.join(map(str, recipe.experts))})" if recipe.experts else ""
    extra = []
    if plan.images is not None:
        extra.append("a stream of images" if plan.images.count is None else f"{plan.images.count:,} images")
    if plan.pairs is not None:
        extra.append(f"{len(plan.pairs):,} pairs")
    if plan.trajectories is not None:
        extra.append(f"{len(plan.trajectories):,} states of guided trajectories")
    if plan.buckets is not None:
        counts = zip(plan.buckets.sizes, plan.buckets.weights, strict=True)
        extra.append("buckets " + ", ".join(f"{size[0]}x{size[1]} (weight {weight:,})" for size, weight in counts))
    lines = [
        f"teacher     {config.model.path}: family {plan.info.family}, {problem.schedule.prediction.value} prediction, "
        f"latents {'x'.join(map(str, problem.latent_shape))}, base in {config.model.dtype}",
        f"method      {config.method_name}: {options}",
        f"student     {recipe.num_inference_steps} network calls with {recipe.scheduler_class} at {ladder}, "
        + ("guidance off" if recipe.w == 1 else f"told a guidance scale of {recipe.w:g}")
        + shares,
        f"data        {', '.join([f'{len(plan.prompts):,} prompts from {plan.prompts.source}', *extra])}",
        f"training    {training.max_steps:,} iterations of {training.batch_size} x {training.accumulation} samples on "
        f"{'one process' if processes == 1 else f'each of {processes} processes'}",
    ]
    if len(method.stages()) > 1:
        lines.append(f"stages      {_stages(method.stages(), training.max_steps)}")
    if chosen := describe_options(config):
        lines.append(f"options     {', '.join(chosen)}")
    for role, layout in plan.layouts.items():
        held = _held(layout)
        trained = ""
        if session is not None:
            trained = f", {sum(p.numel() for p in session.triple.parameters(role).values()):,} trained parameters"
        lines.append(f"{role:<11} {held}{trained}")
    return lines


def _stages(stages: Sequence[Stage], last: int) -> str:
    """Name and first iteration of each, with a word for those that the run ends before."""
    told, start = [], 0
    for stage in stages:
        told.append(
            f"{stage.name} from {start:,}" + (" (never: training.max_steps ends before)" if start >= last else "")
        )
        start += stage.iterations or last
    return ", ".join(told)


def _held(layout: RoleLayout) -> str:
    guide = layout.guide
    if isinstance(guide, GuidanceAdapterSettings):
        return f"guidance adapters ({guide.kind}, width {guide.width}, w in [{guide.w_low:g}, {guide.w_high:g}])"
    lora = layout.lora
    held = "full network" if lora is None else f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}"
    return held if guide is None else f"{held}, with an embedding of w"
