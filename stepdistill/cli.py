"""The command line: parses arguments, calls the public functions and prints their results.

A command checks its arguments first and imports PyTorch and diffusers afterwards, so that a typo is answered at once.
"""

from __future__ import annotations

import logging
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from stepdistill import __version__
from stepdistill.api.command_options import with_options
from stepdistill.api.evaluation_options import FolderOptions, ModelOptions, field_names, flag_of, parse_options
from stepdistill.errors import UserError
from stepdistill.runtime.noise import disable_loading_bars, silence_libraries
from stepdistill.runtime.threads import bound_spinning

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Few-step distillation of diffusion models: from 50 guided steps to 1-8 network calls.",
)  # fmt: skip


class CollectionKind(str, Enum):
    pairs = "pairs"
    samples = "samples"
    trajectories = "trajectories"


class Format(str, Enum):
    diffusers_lora = "diffusers-lora"
    kohya_lora = "kohya-lora"
    guidance_adapter = "guidance-adapter"
    pipeline = "pipeline"


class ListKind(str, Enum):
    methods = "methods"
    families = "families"
    protocols = "protocols"


Output = Annotated[Path, typer.Option("--output", help="Folder to write; must be new or empty.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Set a key of the config: section.key=value (repeatable).")
]


def _existing_model(source: str | None) -> str | None:
    from stepdistill.assets import resolve
    from stepdistill.files.sources import check_source_exists

    if source is not None:
        check_source_exists(resolve(source))
    return source


def _existing_prompts(source: str | None) -> str | None:
    from stepdistill.data.prompts import check_prompt_source

    if source is not None:
        check_prompt_source(source)
    return source


def _existing_path(path: Path | None) -> Path | None:
    if path is not None and not path.expanduser().exists():
        raise UserError(f"there is no file or folder {str(path)!r}: check the path")
    return path


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"stepdistill {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    output: Output = Path("quickstart"),
    remeasure: Annotated[
        bool, typer.Option(help="Sample the teacher again instead of reading its stored results.")
    ] = False,
) -> None:
    """Distil the embedded teacher into 4 steps, measure it, and write a LoRA that plain diffusers loads."""
    from stepdistill.files.outputs import check_folder_is_writable

    check_folder_is_writable(output)
    from stepdistill.api.quickstart import quickstart as run

    disable_loading_bars()
    typer.echo(run(output, remeasure=remeasure).text())


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; by default `output` of the config.")] = None,
    resume: Annotated[str | None, typer.Option(help="'latest', or the path of a checkpoint.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check the config and print what the run would do, without loading weights.")
    ] = False,
) -> None:
    """Distil a checkpoint."""
    from stepdistill.api.arguments import read_run_config

    run_config = read_run_config(config, overrides, output)
    from stepdistill.api import training as api

    if dry_run:
        typer.echo("\n".join(api.dry_run(run_config, output, resume)))
        return
    disable_loading_bars()
    outcome = api.distill(run_config, output, resume)
    api.destroy_process_group()
    if not outcome.main_process:
        return
    if outcome.finished:
        form = api.default_export_format(run_config)
        typer.echo(
            f"done: export it with\n  stepdistill export {outcome.folder} --format {form} --output {outcome.folder}/export"
        )
    else:
        typer.echo(
            f"stopped at iteration {outcome.iteration}: continue with\n"
            f"  stepdistill train {outcome.folder}/config.yaml --output {outcome.folder} --resume latest"
        )


@app.command()
def cache(
    config: Annotated[Path, typer.Argument(help="YAML file of a training run, with a cache section.")],
    overrides: Overrides = None,
) -> None:
    """Encode the prompts and images of a training config once, for all runs that use them."""
    from stepdistill.api.arguments import read_run_config

    run_config = read_run_config(config, overrides)
    from stepdistill.api import training as api

    disable_loading_bars()
    done = api.cache(run_config)
    typer.echo(
        f"{done.encoded:,} of {done.entries:,} entries were encoded; {done.folder} holds {done.size / 1e6:,.1f} MB"
    )


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="GPU: h100, a100, l40s, 5090, 4090, 4080, 4070, 3090, 3060, t4, ...")
    ] = "h100",
    processes: Annotated[int, typer.Option(min=1, help="Processes of the run, one per GPU.")] = 1,
    memory: Annotated[
        float | None, typer.Option(help="Memory of a GPU in GB; by default that of the named GPU.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the forecast to this JSON file.")] = None,
) -> None:
    """Predict the memory, work and time of a run, without downloads and without loading weights."""
    from stepdistill.api.arguments import read_run_config
    from stepdistill.files.outputs import check_file_is_writable
    from stepdistill.planning.hardware import find_gpu

    if json is not None:
        check_file_is_writable(json)
    find_gpu(gpu)
    run_config = read_run_config(config, overrides)
    from stepdistill.planning.plan import forecast_lines
    from stepdistill.planning.plan import plan as run

    forecast = run(run_config, gpu, processes, memory)
    if json is not None:
        forecast.save(json)
    typer.echo("\n".join(forecast_lines(forecast)))


@app.command()
def collect(
    kind: Annotated[CollectionKind, typer.Argument(help="What to collect.")],
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    output: Output,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted collection.")] = False,
) -> None:
    """Sample a teacher or a student into a data set for the methods that need one."""
    from stepdistill.api.arguments import read_collect_config

    collect_config = read_collect_config(config, overrides, output)
    from stepdistill.api import training as api

    disable_loading_bars()
    count = api.collect(kind.value, collect_config, output, resume)
    api.destroy_process_group()
    typer.echo(f"{count} {kind.value} in {output}")


@app.command()
def sample(
    model: Annotated[
        str,
        typer.Argument(help="Diffusers folder, hub id, single file, or builtin:teacher.", callback=_existing_model),
    ],
    output: Output,
    lora: Annotated[
        Path | None, typer.Option(help="Exported LoRA or guidance adapter, folder or file.", callback=_existing_path)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompt file, or builtin:NAME.", callback=_existing_prompts)
    ] = None,
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
    from stepdistill.api.arguments import check_sample_arguments

    check_sample_arguments(prompt, prompts, width, height)
    from stepdistill.api import training as api

    paths = api.sample(
        model, output, lora=lora, prompt=prompt, prompts=prompts, steps=steps, guidance=guidance,
        negative_prompt=negative_prompt, width=width, height=height, num_images=num_images, seed=seed,
        batch_size=batch_size, dtype=dtype, device=device, scheduler=scheduler,
    )  # fmt: skip
    typer.echo(f"{len(paths)} images and grid.png in {output}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Output folder of 'stepdistill train'.", callback=_existing_path)],
    output: Output,
    format: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.diffusers_lora,
    half: Annotated[bool, typer.Option(help="Store float16.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload to this hub repository afterwards.")] = None,
    best: Annotated[bool, typer.Option(help="The checkpoint that evaluation liked best, not the newest.")] = False,
) -> None:
    """Write the student as a LoRA, guidance adapters or a pipeline, and prove that stock diffusers reproduces it."""
    from stepdistill.api import training as api

    folder = api.export(
        run, format.value, output, half=half, push_to_hub=push_to_hub, checkpoint="best" if best else "latest"
    )
    typer.echo(f"verified: {folder}")


@app.command()
@with_options(ModelOptions, FolderOptions)
def evaluate(
    output: Output,
    model: Annotated[
        str | None, typer.Argument(help="Model as for 'sample', or the folder of a run.", callback=_existing_model)
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Measure this folder (or .npz) instead of a model.", callback=_existing_path)
    ] = None,
    **options: Any,
) -> None:
    """Measure a model by a named protocol, or a folder of images: writes report.json, report.md and report.html."""
    given = {name: value for name, value in options.items() if value is not None}
    allowed = ModelOptions if images is None else FolderOptions
    if odd := next((name for name in given if name not in field_names(allowed)), None):
        if images is not None:
            raise UserError(f"--images measures a folder, for which {flag_of(odd)} means nothing: leave it out")
        raise UserError(f"{flag_of(odd)} goes with --images DIR: evaluate the images that were drawn in a second call")
    if images is not None and model is not None:
        raise UserError(f"--images measures a folder and the model {model!r} was given too: leave one of them out")
    if images is None and model is None:
        raise UserError("there is nothing to measure: give a model or a run, or --images DIR")
    checked = parse_options(allowed, given)
    from stepdistill.api import evaluating
    from stepdistill.evaluation.reports.report import markdown

    if images is not None:
        report = evaluating.measure_folder(images, output, cast("FolderOptions", checked))
    else:
        report = evaluating.measure_model(str(model), output, cast("ModelOptions", checked))
    typer.echo(markdown(report) + f"\nreport.json, report.md and report.html in {output}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="report.json of an evaluation, or its folder.")],
    second: Annotated[Path, typer.Argument(help="The other one.")],
    output: Annotated[
        Path | None, typer.Option(help="Also write comparison.md and comparison.html, with both evaluations' images.")
    ] = None,
) -> None:
    """Put two reports into one table; an error if their protocols differ."""
    from stepdistill.evaluation.reports.report import Report

    for place in (first, second):
        Report.read(place)
    from stepdistill.api import evaluating

    typer.echo(evaluating.compare(first, second, output))


@app.command("list")
def listing(what: Annotated[ListKind, typer.Argument(help="What to list.")]) -> None:
    """List the names that configs may use."""
    from stepdistill.config.registry import family_names, method_names

    if what is ListKind.protocols:
        from stepdistill.evaluation.protocols import protocol_names

        typer.echo("\n".join(protocol_names()))
        return
    names = {ListKind.methods: method_names, ListKind.families: family_names}
    for name in names[what]():
        typer.echo(name)


@app.command("options")
def options(
    method: Annotated[
        str | None, typer.Argument(help="A method, for its options; without one, the options that all configs share.")
    ] = None,
) -> None:
    """Show the options of a config with defaults, ranges and meanings, as YAML to copy from."""
    from stepdistill.config.listing import option_lines
    from stepdistill.config.registry import load_method
    from stepdistill.config.schema import RunConfig

    section = RunConfig if method is None else load_method(method).Config
    typer.echo("\n".join(option_lines(section)))


def main() -> None:
    """Entry point: a `UserError` is printed as one sentence on stderr, with exit code 2."""
    bound_spinning(os.environ)
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, format="%(message)s", stream=sys.stderr)
    silence_libraries(os.environ)
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
