"""The command line: parse, call the public functions, print. Heavy imports wait until a command runs."""

from __future__ import annotations

import logging
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from stepdistill.errors import Refusal

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Few-step distillation of diffusion models: from 50 guided steps to 1-8 network calls.",
)  # fmt: skip


class Kind(str, Enum):
    pairs = "pairs"
    samples = "samples"


class Format(str, Enum):
    diffusers_lora = "diffusers-lora"
    kohya_lora = "kohya-lora"
    pipeline = "pipeline"


class Listing(str, Enum):
    methods = "methods"
    families = "families"


Output = Annotated[Path, typer.Option("--output", help="Folder to write; must be new or empty.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value (repeatable).")]


@app.command()
def quickstart(
    output: Output = Path("quickstart"),
    remeasure: Annotated[
        bool, typer.Option(help="Draw the teacher's row afresh instead of reading the shipped one.")
    ] = False,
) -> None:
    """Distil the embedded teacher into 4 steps, measure it, and write a LoRA that plain diffusers loads."""
    from stepdistill.demo import quickstart as run

    typer.echo(run(output, remeasure=remeasure).text())


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; 'output' of the config by default.")] = None,
    resume: Annotated[str | None, typer.Option(help="'latest', or the path of a checkpoint.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the plan, load no weight.")] = False,
) -> None:
    """Distil a checkpoint."""
    from stepdistill import api
    from stepdistill.config import load_config

    run_config = load_config(config, overrides)
    if dry_run:
        typer.echo("\n".join(api.dry_run(run_config)))
        return
    outcome = api.distill(run_config, output, resume)
    if outcome.finished:
        typer.echo(
            f"done: export it with\n  stepdistill export {outcome.folder} --format diffusers-lora --output {outcome.folder}/lora"
        )
    else:
        typer.echo(
            f"stopped at iteration {outcome.iteration}: go on with\n"
            f"  stepdistill train {outcome.folder}/config.yaml --output {outcome.folder} --resume latest"
        )


@app.command()
def collect(
    kind: Annotated[Kind, typer.Argument(help="What to collect.")],
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    output: Output,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted collection.")] = False,
) -> None:
    """Make the data sets that methods need, from a teacher or a student."""
    from stepdistill import api
    from stepdistill.config import read_settings

    count = api.collect(kind.value, read_settings(api.CollectConfig, config, overrides), output, resume)
    typer.echo(f"{count} {kind.value} in {output}")


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="Diffusers folder, hub id, single file, or builtin:teacher.")],
    output: Output,
    lora: Annotated[Path | None, typer.Option(help="Exported LoRA folder or file.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt file, or builtin:NAME.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Network calls; the recipe's by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale w; 1 is off.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Has an effect with guidance above 1 only.")] = None,
    width: Annotated[int | None, typer.Option(min=8)] = None,
    height: Annotated[int | None, typer.Option(min=8)] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Image i of the call has seed + i, whatever the batch size.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cuda, cpu or mps.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddim, euler, dpm++2m, lcm, tcd or unipc.")] = None,
) -> None:
    """Draw images with a model, and a LoRA if one is given: PNG files and a grid."""
    from stepdistill import api

    paths = api.sample(
        model, output, lora=lora, prompt=prompt, prompts=prompts, steps=steps, guidance=guidance,
        negative_prompt=negative_prompt, width=width, height=height, num_images=num_images, seed=seed,
        batch_size=batch_size, dtype=dtype, device=device, scheduler=scheduler,
    )  # fmt: skip
    typer.echo(f"{len(paths)} images and grid.png in {output}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Output folder of 'stepdistill train'.")],
    output: Output,
    format: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.diffusers_lora,
    half: Annotated[bool, typer.Option(help="Store float16.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload to this hub repository afterwards.")] = None,
) -> None:
    """Write the student as a LoRA or a pipeline, and prove that stock diffusers reproduces it."""
    from stepdistill import api

    typer.echo(f"verified: {api.export(run, format.value, output, half=half, push_to_hub=push_to_hub)}")


@app.command("list")
def listing(what: Annotated[Listing, typer.Argument(help="What to list.")]) -> None:
    """Names that configs may use."""
    from stepdistill.registry import family_names, method_names

    for name in method_names() if what is Listing.methods else family_names():
        typer.echo(name)


def main() -> None:
    """Entry point: a refusal is one sentence on stderr and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "diffusers", "transformers", "accelerate", "torch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except Refusal as refusal:
        typer.echo(f"error: {refusal}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
