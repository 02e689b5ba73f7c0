"""Writes the teacher as a Stable Diffusion folder from the runs' checkpoints (EMA weights), or its flow-matching twin.

PYTHONPATH=. python tools/teacher/assemble.py --runs runs
PYTHONPATH=. python tools/teacher/assemble.py --runs runs --flow
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import common
import flow_networks
import networks
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline


def export(pipeline: DiffusionPipeline, out: Path) -> None:
    """Saves ``pipeline`` beside ``out`` and swaps the folders, so that a reader never meets half a teacher."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=".teacher-"))
    pipeline.save_pretrained(temporary, safe_serialization=True)
    for tokenizer in temporary.glob("tokenizer*"):
        add_slow_tokenizer_files(tokenizer)
    for config in temporary.rglob("*.json"):
        remove_local_path(config)
    for path in temporary.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    temporary.chmod(0o755)
    retired = Path(tempfile.mkdtemp(dir=out.parent, prefix=".retired-"))
    if out.exists():
        os.replace(out, retired / out.name)
    os.replace(temporary, out)
    shutil.rmtree(retired)


def add_slow_tokenizer_files(folder: Path) -> None:
    """``vocab.json`` and ``merges.txt``, which older transformers and other interfaces read instead."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")


def remove_local_path(config: Path) -> None:
    """Drops the ``_name_or_path`` that a reloaded part remembers: it names a folder of this machine."""
    value = json.loads(config.read_text())
    if isinstance(value, dict) and value.pop("_name_or_path", None) is not None:
        common.write_json(config, value)


def build_pipeline(runs: Path) -> StableDiffusionPipeline:
    """The pipeline of the runs' EMA weights; a part that has no checkpoint yet stays untrained."""
    tokenizer = networks.build_tokenizer()
    autoencoder, unet = networks.build_autoencoder(), networks.build_unet()
    text_encoder = networks.build_text_encoder(tokenizer)
    for phase in ("decoder", "both"):
        checkpoint = runs / f"autoencoder_{phase}_ema.safetensors"
        if common.load_checkpoint(checkpoint, {"autoencoder": autoencoder}, {}) > 0:
            break
    common.load_checkpoint(runs / "unet_ema.safetensors", {"unet": unet, "text_encoder": text_encoder}, {})
    latents = runs / "latents.json"
    scale = json.loads(latents.read_text())["scaling_factor"] if latents.exists() else 1.0
    autoencoder.register_to_config(scaling_factor=scale)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=networks.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # transformers loads weights in the type they are stored in, diffusers in float32: a half text encoder would not fit.
    pipeline.unet.half()
    pipeline.vae.half()
    return pipeline


def build_flow_pipeline(runs: Path) -> StableDiffusion3Pipeline:
    """SD3's pipeline of the runs' EMA transformer and the embedded teacher's autoencoder and text encoder, without T5."""
    teacher = StableDiffusionPipeline.from_pretrained(common.ASSETS / "teacher", safety_checker=None)
    transformer = flow_networks.build_transformer()
    common.load_checkpoint(runs / "flow_ema.safetensors", {"transformer": transformer}, {})
    first, second = flow_networks.build_text_encoders(teacher)
    vae: AutoencoderKL = teacher.vae
    vae.register_to_config(shift_factor=0.0)
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=None,
        tokenizer=teacher.tokenizer,
        tokenizer_2=networks.build_tokenizer(),
        tokenizer_3=None,
        transformer=transformer,
        scheduler=flow_networks.build_scheduler(),
    )
    pipeline.transformer.half()
    pipeline.vae.half()
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--flow", action="store_true", help="the flow-matching twin")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or common.ASSETS / ("flow_teacher" if options.flow else "teacher")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    export(build_flow_pipeline(options.runs) if options.flow else build_pipeline(options.runs), out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    common.log.info("%s: %.1f MB", out, size / 1e6)


if __name__ == "__main__":
    main()
