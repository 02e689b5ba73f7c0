"""The command line: parses arguments, calls the public functions and prints their results.

A command checks its arguments first and imports PyTorch and diffusers afterwards, so that a typo is answered at once.
"""

from __future__ import annotations

import logging
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from stepdistill import __version__
from stepdistill.errors import UserError
from stepdistill.runtime.noise import disable_loading_bars, silence_libraries
from stepdistill.runtime.threads import bound_spinning

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Few-step distillation of diffusion models: from 50 guided steps to 1-8 network calls.",
)  # fmt: skip


class Kind(str, Enum):
    pairs = "pairs"
    samples = "samples"
    trajectories = "trajectories"


class Format(str, Enum):
    diffusers_lora = "diffusers-lora"
    kohya_lora = "kohya-lora"
    guidance_adapter = "guidance-adapter"
    pipeline = "pipeline"


class Listing(str, Enum):
    methods = "methods"
    families = "families"
    protocols = "protocols"


class Resize(str, Enum):
    clean = "clean"
    legacy_pytorch = "legacy_pytorch"
    legacy_tensorflow = "legacy_tensorflow"


Output = Annotated[Path, typer.Option("--output", help="Folder to write; must be new or empty.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Set a key of the config: section.key=value (repeatable).")
]


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
    api.leave_processes()
    if not outcome.main_process:
        return
    if outcome.finished:
        form = api.natural_format(run_config)
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
    kind: Annotated[Kind, typer.Argument(help="What to collect.")],
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
    api.leave_processes()
    typer.echo(f"{count} {kind.value} in {output}")


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="Diffusers folder, hub id, single file, or builtin:teacher.")],
    output: Output,
    lora: Annotated[Path | None, typer.Option(help="Exported LoRA or guidance adapter, folder or file.")] = None,
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
    from stepdistill.api import training as api

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
    best: Annotated[bool, typer.Option(help="The checkpoint that evaluation liked best, not the newest.")] = False,
) -> None:
    """Write the student as a LoRA, guidance adapters or a pipeline, and prove that stock diffusers reproduces it."""
    from stepdistill.api import training as api

    folder = api.export(
        run, format.value, output, half=half, push_to_hub=push_to_hub, checkpoint="best" if best else "latest"
    )
    typer.echo(f"verified: {folder}")


@app.command()
def evaluate(
    output: Output,
    model: Annotated[str | None, typer.Argument(help="Model as for 'sample', or the folder of a run.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Exported LoRA or guidance adapter, folder or file.")] = None,
    protocol: Annotated[str, typer.Option(help="Protocol name, or a YAML file.")] = "prompts",
    steps: Annotated[str | None, typer.Option(help="Step counts, as 1,2,4; the recipe's own by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale w; 1 is off.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddim, euler, dpm++2m, lcm, tcd or unipc.")] = None,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="Draw the base too, at this many steps.")] = None,
    teacher_guidance: Annotated[float | None, typer.Option(help="Guidance scale w of the teacher.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt file, or builtin:NAME.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of images, or statistics (.npz).")] = None,
    num_images: Annotated[
        int | None, typer.Option(min=2, help="Fewer than the protocol's; renames the numbers.")
    ] = None,
    seeds_per_prompt: Annotated[int, typer.Option(min=1, help="Images of each prompt; diversity needs two.")] = 1,
    images: Annotated[Path | None, typer.Option(help="Measure this folder (or .npz) instead of a model.")] = None,
    features: Annotated[str | None, typer.Option(help="NAME[:WEIGHTS] of the feature network.")] = None,
    resize: Annotated[Resize | None, typer.Option(help="How images reach the Inception's 299 pixels.")] = None,
    metrics: Annotated[str | None, typer.Option(help="fid,fd_infinity,kid,prdc,cmmd,...")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP checkpoint for the CLIP score.")] = None,
    clip_convention: Annotated[
        str, typer.Option(help="hessel, gigagan, torchmetrics or raw; several with commas.")
    ] = "gigagan",
    rewards: Annotated[str | None, typer.Option(help="pickscore,hps,imagereward,aesthetic:CLIP,HEAD")] = None,
    lpips: Annotated[str | None, typer.Option(help="Pairwise LPIPS under alex, vgg or squeeze.")] = None,
    recursive: Annotated[bool, typer.Option(help="Search sub-folders of --images and --reference.")] = False,
    allow_lossy: Annotated[bool, typer.Option(help="Take JPEG and WebP files.")] = False,
    save_statistics: Annotated[
        Path | None, typer.Option(help="With --images: write their statistics to this .npz.")
    ] = None,
    keep_images: Annotated[bool, typer.Option(help="Write the images; a stopped evaluation goes on from them.")] = True,
    width: Annotated[int | None, typer.Option(min=8)] = None,
    height: Annotated[int | None, typer.Option(min=8)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cuda, cpu or mps.")] = None,
    download: Annotated[bool, typer.Option(help="Allow fetching weights that are not on this machine.")] = False,
) -> None:
    """Measure a model by a named protocol, or two image folders against each other: report.json, .md and .html."""
    from stepdistill.api import evaluating
    from stepdistill.evaluation.report import markdown

    chosen = [name.strip() for name in (metrics or "").split(",") if name.strip()]
    if images is not None:
        idle = {
            "--lora": lora, "--steps": steps, "--guidance": guidance, "--scheduler": scheduler, "--prompts": prompts,
            "--teacher-steps": teacher_steps, "--teacher-guidance": teacher_guidance, "--num-images": num_images,
            "--clip": clip, "--rewards": rewards, "--lpips": lpips, "--width": width, "--height": height,
            "--protocol": None if protocol == "prompts" else protocol,
        }  # fmt: skip
        if odd := next((flag for flag, value in idle.items() if value is not None), None):
            raise UserError(f"--images measures a folder, for which {odd} means nothing: leave it out")
        if model is not None or reference is None:
            raise UserError(
                "--images measures a folder against --reference and takes no model: give both, and nothing to draw"
            )
        report = evaluating.evaluate_images(
            images, reference, output, features=features or "inception", resize=(resize or Resize.clean).value,
            metrics=chosen or ["fid"], recursive=recursive, allow_lossy=allow_lossy, save_statistics=save_statistics,
            device=device, download=download,
        )  # fmt: skip
    elif save_statistics is not None:
        raise UserError(
            "--save-statistics goes with --images DIR: evaluate the images that were drawn in a second call"
        )
    elif model is None:
        raise UserError("there is nothing to measure: give a model or a run, or --images DIR")
    elif (width is None) != (height is None):
        raise UserError("--width and --height go together: give both or neither")
    else:
        report = evaluating.evaluate(
            model, output, protocol=protocol, lora=lora, steps=_counts(steps), guidance=guidance, scheduler=scheduler,
            teacher_steps=teacher_steps, teacher_guidance=teacher_guidance, prompts=prompts, reference=reference,
            num_images=num_images, seeds_per_prompt=seeds_per_prompt, features=features,
            resize=resize.value if resize else None, metrics=chosen, clip=clip,
            clip_conventions=clip_convention.split(","), rewards=_specs(rewards), lpips=lpips,
            size=(height, width) if height is not None and width is not None else None,
            keep_images=keep_images, recursive=recursive, allow_lossy=allow_lossy, batch_size=batch_size,
            dtype=dtype, device=device, download=download,
        )  # fmt: skip
    typer.echo(markdown(report) + f"\nreport.json, report.md and report.html in {output}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="report.json of an evaluation, or its folder.")],
    second: Annotated[Path, typer.Argument(help="The other one.")],
) -> None:
    """Two reports in one table; refused where their protocols differ."""
    from stepdistill.api import evaluating

    typer.echo(evaluating.compare(first, second))


@app.command("list")
def listing(what: Annotated[Listing, typer.Argument(help="What to list.")]) -> None:
    """List the names that configs may use."""
    from stepdistill.config.registry import family_names, method_names

    if what is Listing.protocols:
        from stepdistill.evaluation.protocols import protocol_names

        typer.echo("\n".join(protocol_names()))
        return
    names = {Listing.methods: method_names, Listing.families: family_names}
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


def _counts(text: str | None) -> list[int]:
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise UserError(f"--steps is {text!r}, but a list of step counts is wanted: write, say, 1,2,4")
    return [int(word) for word in words]


def _specs(text: str | None) -> list[str]:
    """Splits reward names at commas, except for the comma within `aesthetic:CLIP,HEAD`."""
    found: list[str] = []
    for word in (text or "").split(","):
        if found and found[-1].startswith("aesthetic:") and "," not in found[-1]:
            found[-1] += f",{word}"
        elif word.strip():
            found.append(word.strip())
    return found


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
